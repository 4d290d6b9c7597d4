// One token of S4D on the GPU: a warp a channel and batch row, lanes are modes. The state is read and written
// once; products are float64, so that a float state does not drift over long decodes.
#pragma once

#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/launch.cuh>
#include <interstate/dispatch.hpp>
#include <s4d/detail/discretize.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

inline constexpr int step_threads = 128;

inline namespace INTERSTATE_KERNELS {

template <class P>
__global__ void discretize_kernel(Discretization disc, Params<P> p, Discrete<P> discrete) {
    const Index N = discrete.Abar.extent[1], at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= discrete.Abar.extent[0] * N) return;
    const Mode m = mode_at(disc, p, at / N, at % N);
    discrete.Abar(at / N, at % N) = m.Abar;
    discrete.Bbar(at / N, at % N) = m.Bbar;
}

template <class T, class P>
__global__ void __launch_bounds__(step_threads)
    step_kernel(Discrete<P> d, State<acc_t<T>> state, Token<T> token, TokenOut<T> out) {
    using A = acc_t<T>;
    const Index H = token.u.extent[1], N = d.Abar.extent[1];
    const Index warp = (static_cast<Index>(blockIdx.x) * step_threads + threadIdx.x) / 32;
    if (warp >= token.u.extent[0] * H) return;
    const Index b = warp / H, h = warp % H;
    const double u = static_cast<double>(device::load_as<A>(token.u(b, h)));
    double y = 0.0;
    for (Index n = threadIdx.x % 32; n < N; n += 32) {
        const c64 x = d.Abar(h, n) * cast<double>(state.x(b, h, n)) + u * d.Bbar(h, n);
        state.x(b, h, n) = cast<A>(x);
        y += 2.0 * (cast<double>(d.C(h, n)) * x).re;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) y += __shfl_xor_sync(0xffffffffu, y, lanes);
    if (threadIdx.x % 32 == 0) out.y(b, h) = T(d.D ? y + static_cast<double>(d.D(h)) * u : y);
}

}  // namespace INTERSTATE_KERNELS

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
