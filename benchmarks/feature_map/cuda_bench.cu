// The feature map on the GPU: milliseconds and GB/s of both directions, each tensor counted once, beside the copy of the
// same run, and errors against float64 on one batch row, as JSON lines.
//
// Forward moves x and y, backward x, dy and dx. The errors are those of a call on the first 256 tokens: every output and
// gradient, relative in the 2-norm, and the largest of them.
#include <cstring>

#include <feature_map/feature_map.cuh>
#include <feature_map/reference.hpp>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;
using feature_map::Options;

struct Sizes {
    Index B, L, H, R;
};

template <class T>
struct Layer {
    Sizes size;
    Options options;
    Index taps;
    RandomArray<T> x, dy;
    DeviceArray<T> y, dx;
    RandomArray<float> weight, conv_bias, scale, bias;
    DeviceArray<float> dweight, dconv_bias, dscale, dbias;

    Layer(const Sizes& s, const Options& o, Index t)
        : size(s), options(o), taps(t), x(count(), 1), dy(count(), 2), y(x.size()), dx(x.size()), weight(s.H * s.R * t, 3, 1.0),
          conv_bias(s.H * s.R, 4, 0.5), scale(s.R, 5, 0.5, 1.0), bias(s.H * s.R, 6, 0.5), dweight(weight.size()),
          dconv_bias(conv_bias.size()), dscale(scale.size()), dbias(bias.size()) {}
    Index count() const { return size.B * size.L * size.H * size.R; }
    template <class E>
    View<E, 4> rows(E* data, Index batch, Index length) const {
        return view(data, {batch, length, size.H, size.R}, {size.L * size.H * size.R, size.H * size.R, size.R, Index{1}});
    }
    template <class Ps>
    Ps params(const DeviceArray<float>& w, const DeviceArray<float>& b, const DeviceArray<float>& s, const DeviceArray<float>& o) const {
        Ps p;
        if (taps > 0) p.conv_weight = view(w.data(), {size.H, size.R, taps}), p.conv_bias = view(b.data(), {size.H, size.R});
        if (options.rms) p.scale = view(s.data(), {size.R}), p.bias = view(o.data(), {size.H, size.R});
        return p;
    }
    feature_map::Inputs<T, float> inputs(Index batch, Index length) const {
        return {.x = rows<const T>(x.data(), batch, length),
                .params = params<feature_map::Params<float>>(weight, conv_bias, scale, bias)};
    }
    feature_map::Upstream<T> upstream(Index batch, Index length) const { return {.y = rows<const T>(dy.data(), batch, length)}; }
    feature_map::Outputs<T> outputs(Index batch, Index length) const { return {.y = rows(y.data(), batch, length)}; }
    feature_map::Grads<T, float> gradients(Index batch, Index length) const {
        return {.x = rows(dx.data(), batch, length),
                .params = params<feature_map::BasicParams<float>>(dweight, dconv_bias, dscale, dbias)};
    }
};

template <class T>
void run(const char* what, const Sizes& size, const Options& options, Index taps, double copy_gbps) {
    const Layer<T> layer(size, options, taps);
    const interstate::cuda exec;
    const auto [B, L, H, R] = size;
    const auto in = layer.inputs(B, L);
    const auto shape = shape_of(in);
    const DeviceArray<char> memory(std::max(workspace_size(exec, options, shape, pass::backward), std::size_t{1}));
    const Workspace ws{memory.data(), memory.size()};

    const Index few = std::min<Index>(L, 256);
    const auto small_in = layer.inputs(1, few);
    const auto small_up = layer.upstream(1, few);
    const auto small_out = layer.outputs(1, few);
    const auto small_grads = layer.gradients(1, few);
    const std::size_t small_bytes = workspace_size(exec, options, shape_of(small_in), pass::backward);
    const DeviceArray<char> small_memory(small_bytes);
    check(forward(exec, options, small_in, small_out, Saved{}, Workspace{}));
    check(backward(exec, options, small_in, small_out, Saved{}, small_up, small_grads, Workspace{small_memory.data(), small_bytes}));
    Case truth = bench::truth_of<feature_map::Operator>(options, small_in, small_up);
    truth.tensors.erase("out.convT");
    const bench::Errors errors(bench::results_of(small_in, small_out, small_grads), truth);

    const double forward_ms =
        bench::milliseconds([&] { check(forward(exec, options, in, layer.outputs(B, L), Saved{}, Workspace{})); });
    const double backward_ms = bench::milliseconds([&] {
        check(backward(exec, options, in, layer.outputs(B, L), Saved{}, layer.upstream(B, L), layer.gradients(B, L), ws));
    });
    const double tensor = static_cast<double>(layer.count()) * sizeof(T);
    const auto gbps = [&](double tensors, double ms) { return tensors * tensor / ms * 1e-6; };
    std::printf("{\"op\":\"feature_map\",\"kernel\":\"%s\",\"what\":\"%s\",\"rope\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,"
                "\"H\":%lld,\"R\":%lld,\"taps\":%lld,\"forward_ms\":%.4f,\"forward_GBps\":%.0f,\"forward_of_copy\":%.3f,"
                "\"backward_ms\":%.4f,\"backward_GBps\":%.0f,\"backward_of_copy\":%.3f,",
                which_kernel(exec, options, shape).name, what, to_string(options.rope), to_string(dtype_of<T>),
                static_cast<long long>(B), static_cast<long long>(L), static_cast<long long>(H), static_cast<long long>(R),
                static_cast<long long>(taps), forward_ms, gbps(2, forward_ms), gbps(2, forward_ms) / copy_gbps, backward_ms,
                gbps(3, backward_ms), gbps(3, backward_ms) / copy_gbps);
    errors.print();
}

}  // namespace

/// `cuda_bench brief` leaves the sweeps out.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    const double copy = bench::copy_gbps();
    std::printf("{\"device\":\"%s\",\"copy_GBps\":%.0f}\n", bench::device_name(), copy);
    Options split = Options::key();
    split.rope = feature_map::Rope::half_split;
    const Sizes layer{4, 8192, 32, 64};
    run<bf16>("query", layer, Options::query(), 4, copy);
    run<bf16>("key", layer, Options::key(), 4, copy);
    run<bf16>("key", layer, split, 4, copy);
    run<bf16>("value", layer, Options::value(), 0, copy);
    run<f32>("query", layer, Options::query(), 4, copy);
    run<f32>("key", layer, Options::key(), 4, copy);
    run<f32>("value", layer, Options::value(), 0, copy);
    if (argc > 1 && std::strcmp(argv[1], "brief") == 0) return 0;
    run<f16>("key", layer, Options::key(), 4, copy);
    run<f64>("key", {2, 4096, 32, 64}, Options::key(), 4, copy);
    for (const Index R : {32, 128, 256}) run<bf16>("key", {4, 8192, 2048 / R, R}, Options::key(), 4, copy);
    for (const Index L : {1024, 4096, 65536}) run<bf16>("key", {1, L, 32, 64}, Options::key(), 4, copy);
    run<bf16>("key", {4, 8192, 1, 64}, Options::key(), 4, copy);
    run<bf16>("key", {1, 4096, 4, 512}, Options::key(), 4, copy);
    return 0;
}
