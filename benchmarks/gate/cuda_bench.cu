// The output gate on the GPU: milliseconds and GB/s of both directions, each tensor counted once, beside the copy of the
// same run, and errors against float64 on the first 256 tokens, as JSON lines.
#include <gate/gate.cuh>
#include <gate/reference.hpp>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;

template <class T>
void run(Index L, Index H, Index d, double copy_gbps) {
    const Index count = L * H * d, few = std::min<Index>(L, 256);
    const RandomArray<T> o(count, 1), g(count, 2, 8.0), dy(count, 3);
    const DeviceArray<T> y(o.size()), grad_o(o.size()), grad_g(o.size());
    const interstate::cuda exec;
    const auto rows = [&](auto* data, Index length) { return view(data, {Index{1}, length, H, d}); };
    const auto inputs = [&](Index length) {
        return gate::Inputs<T>{.o = rows(static_cast<const T*>(o.data()), length), .g = rows(static_cast<const T*>(g.data()), length)};
    };
    const auto upstream = [&](Index length) { return gate::Upstream<T>{rows(static_cast<const T*>(dy.data()), length)}; };
    const auto forwards = [&] { check(forward(exec, gate::Options{}, inputs(L), gate::Outputs<T>{rows(y.data(), L)}, Saved{}, Workspace{})); };
    const auto backwards = [&] {
        check(backward(exec, gate::Options{}, inputs(L), gate::Outputs<T>{}, Saved{}, upstream(L),
                       gate::Grads<T>{rows(grad_o.data(), L), rows(grad_g.data(), L)}, Workspace{}));
    };
    forwards();
    backwards();
    const Case got = bench::results_of(inputs(few), gate::Outputs<T>{rows(y.data(), few)},
                                       gate::Grads<T>{rows(grad_o.data(), few), rows(grad_g.data(), few)});
    const bench::Errors errors(got, bench::truth_of<gate::Operator>({}, inputs(few), upstream(few)));
    const double forward_ms = bench::milliseconds(forwards), backward_ms = bench::milliseconds(backwards);
    const auto gbps = [&](double tensors, double ms) { return tensors * static_cast<double>(count * Index{sizeof(T)}) / ms * 1e-6; };
    std::printf("{\"op\":\"gate\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"L\":%lld,\"H\":%lld,\"d\":%lld,\"forward_ms\":%.4f,"
                "\"forward_GBps\":%.0f,\"forward_of_copy\":%.3f,\"backward_ms\":%.4f,\"backward_GBps\":%.0f,"
                "\"backward_of_copy\":%.3f,",
                which_kernel(exec, {}, shape_of(inputs(L))).name, to_string(dtype_of<T>), static_cast<long long>(L),
                static_cast<long long>(H), static_cast<long long>(d), forward_ms, gbps(3, forward_ms), gbps(3, forward_ms) / copy_gbps,
                backward_ms, gbps(5, backward_ms), gbps(5, backward_ms) / copy_gbps);
    errors.print();
}

}  // namespace

int main() {
    if (!bench::has_device()) return bench::skipped;
    const double copy = bench::copy_gbps();
    std::printf("{\"device\":\"%s\",\"copy_GBps\":%.0f}\n", bench::device_name(), copy);
    run<bf16>(32768, 32, 64, copy);
    run<f16>(32768, 32, 64, copy);
    run<f32>(32768, 32, 64, copy);
    run<f64>(16384, 32, 64, copy);
    run<bf16>(32768, 32, 63, copy);
    return 0;
}
