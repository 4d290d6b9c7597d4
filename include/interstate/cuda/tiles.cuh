// Products of a warp whose left factor is several tiles of 16 rows, in registers or in shared memory, or what an earlier product
// has left.
#pragma once

#include <interstate/cuda/swizzle.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

/// Where a lane stands in a product (cuda/mma.cuh).
struct Lane {
    int group, quad;
    __device__ explicit Lane(int lane) : group(lane / 4), quad(lane % 4) {}
};

template <int m, int tiles>
__device__ void clear(float (&c)[m][tiles][4]) {
#pragma unroll
    for (int i = 0; i < m; ++i) clear(c[i]);
}

/// What a product has left, m tiles of 16 rows, as the left factor of the next one.
template <Precision precision, int m, int count>
struct Rows16 {
    Factors<float, precision, 2> factor[m][count / depth<precision>];

    __device__ explicit Rows16(const float (&c)[m][count / 8][4]) {
        constexpr int pairs = k_pairs<precision>;
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
            for (int t = 0; t < count / 8; ++t)
#pragma unroll
                for (int row = 0; row < 2; ++row)
                    factor[i][t / pairs].set(row, t % pairs, c[i][t][2 * row], c[i][t][2 * row + 1]);
    }
    __device__ void load(Factors<float, precision, 2>& f, int i, int k) const { f = factor[i][k / depth<precision>]; }
};

/// Rows of a matrix in shared memory as a left factor. Registers could keep them, but are worth more elsewhere.
template <class E, int rows, int columns>
struct Shared16 {
    SwizzledLoader<E, rows, panel_columns<E, columns>, Read::as_stored, true> loader;
    __device__ Shared16(const Swizzled<E, rows, columns>& a, int row, int lane) : loader(rows_of(a.as_stored(), row, 0, lane)) {}
    template <Precision precision>
    __device__ void load(Factors<float, precision, 2>& f, int i, int k) const {
        loader.load(f, 16 * i, k);
    }
};

/// c (m x 16 rows, tiles x 8 columns) += rows of a, in registers or in shared memory, times columns n .. of b, over k =
/// first .. first + count - 1 of b, which is 0 .. count - 1 of a.
template <Precision precision, int count, int m, int tiles, class A, class B>
__device__ void multiply_rows(float (&c)[m][tiles][4], const A& a, const B& b, int n, int first, int lane) {
    static_assert(tiles % 2 == 0);
    const auto from_b = columns_of(b, n, first, lane);
    if constexpr (packs<precision>) {
#pragma unroll
        for (int k = 0; k < count; k += 16) {
            Factors<float, precision, 2> fa[m];
#pragma unroll
            for (int i = 0; i < m; ++i) a.load(fa[i], i, k);
#pragma unroll
            for (int t = 0; t < tiles; t += 2) {
                Factors<float, precision, 1> fb[2];
                from_b.load(fb, 8 * t, k);
#pragma unroll
                for (int i = 0; i < m; ++i) {
                    multiply_add(c[i][t], fa[i], fb[0]);
                    multiply_add(c[i][t + 1], fa[i], fb[1]);
                }
            }
        }
    } else {
        // Sums of their own for 64 columns at most (Sums), which registers have room for.
        constexpr int part = tiles < 8 ? tiles : 8;
        static_assert(tiles % part == 0);
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
            for (int t0 = 0; t0 < tiles; t0 += part) {
                Sums<precision, part> sums(reinterpret_cast<float(&)[part][4]>(c[i][t0]));
#pragma unroll
                for (int k = 0; k < count; k += depth<precision>) {
                    Factors<float, precision, 2> fa;
                    a.load(fa, i, k);
#pragma unroll
                    for (int t = 0; t < part; t += 2) {
                        Factors<float, precision, 1> fb[2];
                        from_b.load(fb, 8 * (t0 + t), k);
                        sums.add(t, fa, fb[0]);
                        sums.add(t + 1, fa, fb[1]);
                    }
                }
                sums.finish();
            }
    }
}

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
