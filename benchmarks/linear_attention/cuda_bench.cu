// Linear attention on the GPU: milliseconds of forward and of forward and backward, bytes of memory, errors against float64, and the floors, as JSON
// lines.
//
// Floor of bytes: inputs, outputs and gradients moved once at this run's copy speed (q, k and v once more for both passes). Floor of products:
// multiply-adds of a token and head by chunks of 64 (docs/ops/linear_attention.md, "On the GPU"), at this run's rate of tensor cores. The errors
// are those of one more call, of the first tokens of two heads.
//
// A decoding step reads and writes the state once, and that is its floor.
#include <algorithm>
#include <cstring>

#include <interstate/verify.cuh>
#include <linear_attention/linear_attention.cuh>
#include <linear_attention/reference.hpp>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::Ceilings;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;
using linear_attention::FeatureMap;
using linear_attention::Options;

struct Sizes {
    Index B, L, H, d, Hkv = 0;
    Index kv_heads() const { return Hkv > 0 ? Hkv : H; }
};

template <class T>
struct Layer {
    static constexpr Index slice_tokens = 2048;
    Sizes size;
    RandomArray<T> q, k, v, dout;
    DeviceArray<T> o, dq, dk, dv;
    DeviceArray<acc_t<T>> sT, zT;  // of a slice

    explicit Layer(const Sizes& s)
        : size(s), q(queries() * s.d, 1, 3.4), k(keys() * s.d, 2, 3.4), v(keys() * s.d, 3, 3.4), dout(queries() * s.d, 4, 3.4), o(q.size()), dq(q.size()), dk(k.size()),
          dv(v.size()), sT(static_cast<std::size_t>(2 * s.d * s.d)), zT(static_cast<std::size_t>(2 * s.d)) {}
    Index queries() const { return size.B * size.L * size.H; }
    Index keys() const { return size.B * size.L * size.kv_heads(); }
    /// One batch row, the query heads of one key/value head or two heads.
    Sizes slice() const {
        const Index group = size.H / size.kv_heads(), kv = std::min<Index>(size.kv_heads(), group > 1 ? 1 : 2);
        return {1, std::min(size.L, slice_tokens), kv * group, size.d, kv};
    }
    template <class E, class M>
    View<E, 4> rows(const M& memory, const Sizes& s, Index heads, Index all) const {
        return view(static_cast<E*>(memory.data()), {s.B, s.L, heads, s.d}, {size.L * all * s.d, all * s.d, s.d, Index{1}});
    }
    linear_attention::Inputs<T> inputs(const Sizes& s) const {
        return {.q = rows<const T>(q, s, s.H, size.H), .k = rows<const T>(k, s, s.kv_heads(), size.kv_heads()), .v = rows<const T>(v, s, s.kv_heads(), size.kv_heads())};
    }
    linear_attention::Upstream<T> upstream(const Sizes& s) const { return {.o = rows<const T>(dout, s, s.H, size.H)}; }
    linear_attention::Outputs<T> outputs(const Sizes& s) const { return {.o = rows<T>(o, s, s.H, size.H), .sT = {}, .zT = {}}; }
    /// With states, of a slice.
    linear_attention::Outputs<T> outputs(const Sizes& s, const Options& options) const {
        auto out = outputs(s);
        out.sT = view(sT.data(), {Index{1}, s.kv_heads(), s.d, s.d});
        if (options.divides()) out.zT = view(zT.data(), {Index{1}, s.kv_heads(), s.d});
        return out;
    }
    linear_attention::Grads<T> gradients(const Sizes& s) const {
        return {.q = rows<T>(dq, s, s.H, size.H), .k = rows<T>(dk, s, s.kv_heads(), size.kv_heads()), .v = rows<T>(dv, s, s.kv_heads(), size.kv_heads())};
    }
};

const char* name_of(FeatureMap map) { return map == FeatureMap::elu1 ? "elu1" : "identity"; }

template <class T>
void run(const Sizes& s, FeatureMap map, const Ceilings& ceilings) {
    const Layer<T> layer(s);
    const Options options{.feature_map = map};
    const interstate::cuda exec;
    const auto shape = shape_of(layer.inputs(s));
    const DeviceArray<char> memory(std::max(workspace_size(exec, options, shape, pass::forward), workspace_size(exec, options, shape, pass::backward)));
    const DeviceArray<char> kept(saved_size(exec, options, shape));
    const Workspace ws{memory.data(), memory.size()};
    const auto forwards = [&](const Sizes& of, bool keeps) { check(forward(exec, options, layer.inputs(of), layer.outputs(of), keeps ? Saved{kept.data(), kept.size()} : Saved{}, ws)); };
    const auto both = [&](const Sizes& of) {
        forwards(of, true);
        check(backward(exec, options, layer.inputs(of), layer.outputs(of), Saved{kept.data(), kept.size()}, layer.upstream(of), layer.gradients(of), ws));
    };
    const Sizes few = layer.slice();
    both(few);
    check(forward(exec, options, layer.inputs(few), layer.outputs(few, options), Saved{}, ws));
    const bench::Errors errors(bench::results_of(layer.inputs(few), layer.outputs(few, options), layer.gradients(few)),
                               bench::truth_of<linear_attention::Operator>(options, layer.inputs(few), layer.upstream(few)));

    const double forward_ms = bench::milliseconds([&] { forwards(s, false); }), both_ms = bench::milliseconds([&] { both(s); });
    const auto q = static_cast<double>(layer.queries()), k = static_cast<double>(layer.keys()), d = static_cast<double>(s.d);
    const double tflops = sizeof(T) == 2 ? ceilings.bf16_tflops : ceilings.tflops<T>(), products = std::is_same_v<T, f32> ? 3.0 : 1.0;
    const auto product_ms = [&](double macs) { return 2.0 * macs * products / tflops * 1e-9; };
    const auto bytes_ms = [&](double elements) { return elements * sizeof(T) / ceilings.copy_gbps * 1e-6; };
    const double tensors = (4.0 * q + 4.0 * k) * d * sizeof(T);
    // A chunk of 64 is half above the diagonal: forward 2 products of scores, 1 by the state and 1 for it; backward 5 of scores, 3 and 2.
    const double forward_macs = q * d * (64.0 + d) + k * d * d, both_macs = forward_macs + q * d * (160.0 + 2.0 * d) + k * d * 3.0 * d;
    std::printf("{\"op\":\"linear_attention\",\"kernel\":\"%s\",\"feature_map\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,\"Hq\":%lld,\"Hkv\":%lld,\"d\":%lld,"
                "\"forward_ms\":%.4f,\"both_ms\":%.4f,\"floor_bytes_ms\":%.4f,\"floor_products_ms\":%.4f,\"both_floor_bytes_ms\":%.4f,\"both_floor_products_ms\":%.4f,"
                "\"memory_ratio\":%.3f,",
                which_kernel(exec, options, shape).name, name_of(map), to_string(dtype_of<T>), static_cast<long long>(s.B), static_cast<long long>(s.L),
                static_cast<long long>(s.H), static_cast<long long>(s.kv_heads()), static_cast<long long>(s.d), forward_ms, both_ms, bytes_ms((2.0 * q + 2.0 * k) * d),
                product_ms(forward_macs), bytes_ms((5.0 * q + 6.0 * k) * d), product_ms(both_macs), 1.0 + static_cast<double>(memory.size() + kept.size()) / tensors);
    errors.print();
}

/// Milliseconds of a step, in a CUDA graph of steps on so many states (a model's layers) that the second-level cache holds none of them.
template <class T>
void decode(Index B, FeatureMap map, const Ceilings& ceilings) {
    constexpr Index H = 32, d = 64;
    const Options options{.feature_map = map};
    const Index of_state = B * H * d * d, layers = std::max<Index>(1, static_cast<Index>(1e9 / static_cast<double>(4 * of_state)));
    const RandomArray<T> q(B * H * d, 1, 3.4), k(B * H * d, 2, 3.4), v(B * H * d, 3, 3.4);
    const RandomArray<float> s(layers * of_state, 4, 3.4), z(layers * B * H * d, 5, 3.4);
    const DeviceArray<T> o(static_cast<std::size_t>(B * H * d));
    const linear_attention::Token<T> token{view(static_cast<const T*>(q.data()), {B, H, d}), view(static_cast<const T*>(k.data()), {B, H, d}),
                                           view(static_cast<const T*>(v.data()), {B, H, d})};
    const auto steps = [&](const interstate::cuda& exec) {
        for (Index i = 0; i < layers; ++i) {
            linear_attention::State<float> state{.s = view(s.data() + i * of_state, {B, H, d, d}), .z = {}};
            if (options.divides()) state.z = view(z.data() + i * B * H * d, {B, H, d});
            check(step(exec, options, linear_attention::Params{}, state, token, linear_attention::TokenOut<T>{view(o.data(), {B, H, d})}, Workspace{}));
        }
    };
    steps(interstate::cuda{});
    const double ms = bench::graph_milliseconds(steps) / static_cast<double>(layers);
    const double moved = 8.0 * static_cast<double>(of_state) + static_cast<double>(B * H * d) * (4.0 * sizeof(T) + (options.divides() ? 8.0 : 0.0));
    std::printf("{\"op\":\"linear_attention\",\"case\":\"decode\",\"kernel\":\"linear_attention.cuda.step\",\"feature_map\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"H\":%lld,\"d\":%lld,"
                "\"step_ms\":%.5f,\"floor_bytes_ms\":%.5f,\"of_copy\":%.3f}\n",
                name_of(map), to_string(dtype_of<T>), static_cast<long long>(B), static_cast<long long>(H), static_cast<long long>(d), ms, moved / ceilings.copy_gbps * 1e-6,
                moved / ms * 1e-6 / ceilings.copy_gbps);
    std::fflush(stdout);
}

}  // namespace

/// `cuda_bench brief` leaves the sweeps out.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    const Ceilings c = bench::measure_ceilings();
    for (const FeatureMap map : {FeatureMap::identity, FeatureMap::elu1}) {
        run<bf16>({4, 4096, 32, 64}, map, c);
        run<bf16>({2, 16384, 32, 64}, map, c);
        run<bf16>({4, 4096, 32, 128}, map, c);
        run<bf16>({4, 4096, 32, 64, 8}, map, c);
        run<f16>({4, 4096, 32, 64}, map, c);
        run<f32>({4, 4096, 32, 64}, map, c);
        for (const Index B : {1, 8, 64}) decode<bf16>(B, map, c);
        if (argc > 1 && std::strcmp(argv[1], "brief") == 0) continue;
        for (const Index L : {1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144}) run<bf16>({1, L, 32, 64}, map, c);
    }
}
