// Products of matrices of any size and layout, a tile of 64 x 64 a block, in FMAs of the accumulator's dtype.
#pragma once

#include <interstate/cuda/arch.cuh>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

inline constexpr int product_threads = 256, product_tile = 64, product_depth = 16;

inline Index product_tiles(Index n) { return ceil_div(n, product_tile); }

/// sum[i][j] = sum_k left(m, k) right(k, n), with m = ty + 16 i and n = tx + 16 j of the tile. Neighbouring threads load
/// what is next to each other in k, or, where `across`, in m or n. Outside of the matrices the loads must give zeros.
template <bool left_across, bool right_across, class A, class Left, class Right>
__device__ void product(Index depth, Left&& left, Right&& right, A (&sum)[4][4]) {
    __shared__ A tile[2][product_depth][product_tile + 1];
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) sum[i][j] = A(0);
    for (Index first = 0; first < depth; first += product_depth) {
        for (int i = threadIdx.x; i < product_tile * product_depth; i += product_threads) {
            const int lk = left_across ? i / product_tile : i % product_depth, m = left_across ? i % product_tile : i / product_depth;
            const int rk = right_across ? i / product_tile : i % product_depth, n = right_across ? i % product_tile : i / product_depth;
            tile[0][lk][m] = first + lk < depth ? left(m, first + lk) : A(0);
            tile[1][rk][n] = first + rk < depth ? right(first + rk, n) : A(0);
        }
        __syncthreads();
#pragma unroll
        for (int k = 0; k < product_depth; ++k) {
            A a[4], b[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) a[i] = tile[0][k][ty + 16 * i], b[i] = tile[1][k][tx + 16 * i];
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j) sum[i][j] += a[i] * b[j];
        }
        __syncthreads();
    }
}

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
