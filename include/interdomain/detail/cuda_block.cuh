// A block of threads at work on one recurrence in float64: sums by warps, and the readout (eq. 8). For the kernels
// that are for truth and for every size, cuda_scan.cuh and the general one of cuda_step.cuh.
#pragma once

#include <interdomain/detail/discretize.hpp>
#include <interstate/cuda/arch.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail {

inline constexpr int block_threads = 256, block_warps = block_threads / 32;

inline namespace INTERSTATE_KERNELS {

__device__ inline double over_lanes(double x) {
    for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}
__device__ inline c64 over_lanes(c64 x) { return {over_lanes(x.re), over_lanes(x.im)}; }

/// store(g, i, sum of term(g, i, j) over j < count) for g < groups and i < rows: a warp a row, in an order that
/// depends on `count` alone.
template <class Sum, class Term, class Store>
__device__ void sum_rows(Index groups, Index rows, Index count, Term&& term, Store&& store) {
    const Index lane = threadIdx.x % 32;
    for (Index at = threadIdx.x / 32; at < groups * rows; at += block_warps) {
        const Index g = at / rows, i = at % rows;
        Sum sum{};
        for (Index j = lane; j < count; j += 32) sum += term(g, i, j);
        sum = over_lanes(sum);
        if (lane == 0) store(g, i, sum);
    }
}

/// f(row, column) of every element of a matrix; a thread always has the same ones.
template <class F>
__device__ void each_element(Index rows, Index columns, F&& f) {
    for (Index m = threadIdx.x / 32; m < rows; m += block_warps)
        for (Index c = threadIdx.x % 32; c < columns; c += 32) f(m, c);
}

/// s = C a and w = C^T s of every query of the group (eq. 8), real parts taken between where they are. a, s and w are
/// (queries, M); a must be there for all threads to see, and w is on return.
template <class P>
__device__ void read_out_queries(Readout readout, const View<const complex<P>, 3>& C, Index h, Index queries, Index M,
                                 const c64* a, c64* s, c64* w) {
    const bool real_parts = readout == Readout::real_parts;
    sum_rows<c64>(
        queries, M, M, [&](Index g, Index m, Index n) { return cast<double>(C(h, m, n)) * a[g * M + n]; },
        [&](Index g, Index m, c64 sum) { s[g * M + m] = real_parts ? c64{2.0 * sum.re, 0.0} : sum; });
    __syncthreads();
    sum_rows<c64>(
        queries, M, M, [&](Index g, Index n, Index m) { return cast<double>(C(h, m, n)) * s[g * M + m]; },
        [&](Index g, Index n, c64 sum) { w[g * M + n] = real_parts ? 2.0 * sum : sum; });
    __syncthreads();
}

}  // namespace INTERSTATE_KERNELS

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
