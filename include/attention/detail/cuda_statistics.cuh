// Per row of queries, what both gradients' kernels need. Equations: docs/ops/attention.md.
#pragma once

#include <attention/detail/cuda_tiles.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

/// What a row of queries brings to its weights and their gradients (eq. 2 and 9): -lse / ln 2, -inf for a row without
/// weights, and delta - dlse.
template <class A>
struct alignas(2 * sizeof(A)) RowStatistics {
    A lse2, minus;
};

inline namespace INTERSTATE_KERNELS {

/// Statistics of every row of queries (eq. 8), (B, Hq, Lq), by teams of 8 lanes. `rest`: what rounding took from o, laid out without gaps,
/// or null.
template <class T>
__global__ __launch_bounds__(256) void statistics_kernel(View<const T, 4> o, View<const T, 4> dout, View<const acc_t<T>, 3> lse,
                                                         View<const acc_t<T>, 3> dlse, View<const bf16, 4> rest, RowStatistics<acc_t<T>>* to, bool wide) {
    using A = acc_t<T>;
    constexpr int V = 16 / static_cast<int>(sizeof(T));
    const Index queries = o.extent[1], heads = o.extent[2], row = static_cast<Index>(blockIdx.x) * (blockDim.x / 8) + threadIdx.x / 8;
    const bool there = row < o.extent[0] * queries * heads;
    // In the order of (B, L, H), which is mostly that of memory: neighbouring teams read neighbouring rows.
    const Index h = row % heads, i = row / heads % queries, b = row / heads / queries;
    const int lane = threadIdx.x % 8, width = static_cast<int>(o.extent[3]);
    A delta = 0;
    const auto add = [&](const auto* x, Index x_stride, const T* y) {
        if (wide) {
#pragma unroll 2
            for (int d = lane * V; d < width; d += 8 * V) {
                const auto left = device::load_wide(x + d);
                const auto right = device::load_wide(y + d);
#pragma unroll
                for (int e = 0; e < V; ++e) delta += device::load_as<A>(left.x[e]) * device::load_as<A>(right.x[e]);
            }
        } else {
            for (int d = lane; d < width; d += 8) delta += device::load_as<A>(x[d * x_stride]) * device::load_as<A>(y[d * dout.stride[3]]);
        }
    };
    if (there) add(&o(b, i, h, 0), o.stride[3], &dout(b, i, h, 0));
    if constexpr (sizeof(T) == 2)
        if (there && rest) add(&rest(b, i, h, 0), Index{1}, &dout(b, i, h, 0));
    for (int step = 4; step > 0; step /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
    if (!there || lane != 0) return;
    const A l = lse(b, i, h);
    const bool empty = l == -A(INFINITY);
    to[(b * heads + h) * queries + i] = {empty ? -A(INFINITY) : -l * A(log2_e), empty ? A(0) : delta - (dlse ? dlse(b, i, h) : A(0))};
}

}  // namespace INTERSTATE_KERNELS

}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
