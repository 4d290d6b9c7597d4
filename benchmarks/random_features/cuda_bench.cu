// Random Fourier features on the GPU: milliseconds of both directions, TFLOP/s of their products (2 dh F a head and token
// forward; three times that backward, of which one is done again) beside the FMA peak of the same run, GB/s beside its
// copy, and errors against float64 on the first 128 tokens, as JSON lines.
#include <random_features/random_features.cuh>
#include <random_features/reference.hpp>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;

template <class T>
void run(Index L, Index H, Index dh, Index F, double copy_gbps, double fma_tflops) {
    const RandomArray<T> x(L * H * dh, 1), dy(2 * L * H * F, 2);
    const RandomArray<float> W(H * F * dh, 3, 1.0);
    const DeviceArray<T> y(dy.size()), dx(x.size());
    const DeviceArray<float> dW(W.size());
    const interstate::cuda exec;
    const random_features::Options options;
    const auto inputs = [&](Index length) {
        return random_features::Inputs<T, float>{.x = view(static_cast<const T*>(x.data()), {Index{1}, length, H, dh}),
                                                 .params = {view(static_cast<const float*>(W.data()), {H, F, dh})}};
    };
    const auto outputs = [&](Index length) { return random_features::Outputs<T>{view(y.data(), {Index{1}, length, H, 2 * F})}; };
    const auto upstream = [&](Index length) {
        return random_features::Upstream<T>{view(static_cast<const T*>(dy.data()), {Index{1}, length, H, 2 * F})};
    };
    const auto gradients = [&](Index length) {
        return random_features::Grads<T, float>{view(dx.data(), {Index{1}, length, H, dh}), {view(dW.data(), {H, F, dh})}};
    };
    const DeviceArray<char> memory(workspace_size(exec, options, shape_of(inputs(L)), pass::backward) +
                                   workspace_size(exec, options, shape_of(inputs(128)), pass::backward));
    const Workspace ws{memory.data(), memory.size()};
    const auto forwards = [&](Index length) { check(forward(exec, options, inputs(length), outputs(length), Saved{}, Workspace{})); };
    const auto backwards = [&](Index length) {
        check(backward(exec, options, inputs(length), outputs(length), Saved{}, upstream(length), gradients(length), ws));
    };
    const Index few = std::min<Index>(L, 128);
    forwards(few);
    backwards(few);
    const bench::Errors errors(bench::results_of(inputs(few), outputs(few), gradients(few)),
                               bench::truth_of<random_features::Operator>(options, inputs(few), upstream(few)));
    const double forward_ms = bench::milliseconds([&] { forwards(L); }), backward_ms = bench::milliseconds([&] { backwards(L); });
    const double tokens = static_cast<double>(L * H), product = 2.0 * tokens * static_cast<double>(dh * F);
    const double forward_bytes = tokens * static_cast<double>(dh + 2 * F) * sizeof(T), backward_bytes = tokens * static_cast<double>(2 * dh + 2 * F) * sizeof(T);
    std::printf("{\"op\":\"random_features\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"L\":%lld,\"H\":%lld,\"dh\":%lld,\"F\":%lld,"
                "\"forward_ms\":%.4f,\"forward_TFLOPs\":%.2f,\"forward_of_fma\":%.3f,\"forward_of_copy\":%.3f,\"backward_ms\":%.4f,"
                "\"backward_TFLOPs\":%.2f,\"backward_of_fma\":%.3f,\"backward_of_copy\":%.3f,",
                which_kernel(exec, options, shape_of(inputs(L))).name, to_string(dtype_of<T>), static_cast<long long>(L),
                static_cast<long long>(H), static_cast<long long>(dh), static_cast<long long>(F), forward_ms,
                product / forward_ms * 1e-9, product / forward_ms * 1e-9 / fma_tflops, forward_bytes / forward_ms * 1e-6 / copy_gbps,
                backward_ms, 3.0 * product / backward_ms * 1e-9, 3.0 * product / backward_ms * 1e-9 / fma_tflops,
                backward_bytes / backward_ms * 1e-6 / copy_gbps);
    errors.print();
}

}  // namespace

int main() {
    if (!bench::has_device()) return bench::skipped;
    const double copy = bench::copy_gbps(), fma = bench::peak_tflops<bench::FloatFma>();
    std::printf("{\"device\":\"%s\",\"copy_GBps\":%.0f,\"ffma_TFLOPs\":%.1f}\n", bench::device_name(), copy, fma);
    run<bf16>(16384, 32, 64, 32, copy, fma);
    run<f32>(16384, 32, 64, 32, copy, fma);
    run<bf16>(16384, 32, 64, 128, copy, fma);
    run<f32>(16384, 32, 64, 128, copy, fma);
    return 0;
}
