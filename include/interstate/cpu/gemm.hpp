// Products of small matrices that lie in the caches, for kernels that work tile by tile.
//
// The left operand is read one element at a time and broadcast, so that its strides are free: transposed,
// reversed and skewed (element (m, k) of a Toeplitz-like table at [m][m - k]) cost what rows cost. The right
// operand and the result are rows of vectors.
#pragma once

#include <interstate/cpu/simd.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace simd {

/// Which terms of sum_k A(m, k) B[k] there are; lower and upper are of square A. Terms that are not there are
/// not multiplied by zero either: what B holds there may be NaN.
enum class Terms : std::uint8_t { all, lower, upper };  // lower: k <= m, upper: k >= m

/// C[m][n] = sum_k A(m, k) B[k][n], or += where `add`, for m in [0, M), n in [0, N), k in [0, K); N is a multiple
/// of the vector lanes. A(m, k) is a[m * a_row + k * a_col].
template <class A, Terms terms = Terms::all>
struct Gemm {
    struct Args {
        const A* a;
        Index a_row, a_col;
        const A* b;
        Index ldb;
        A* c;
        Index ldc;
        Index M, N, K;
        bool add;
    };

    template <int Rows, int Vecs, class V>
    static INTERSTATE_INLINE void term(const A* a, Index a_row, const A* b, V (&sum)[Rows][Vecs], int first, int last) {
        V right[Vecs];
        INTERSTATE_UNROLL
        for (int n = 0; n < Vecs; ++n) right[n] = load<V>(b + n * V::lanes);
        INTERSTATE_UNROLL
        for (int m = 0; m < Rows; ++m) {
            if (m < first || m > last) continue;
            const V left = broadcast<V>(a[m * a_row]);
            INTERSTATE_UNROLL
            for (int n = 0; n < Vecs; ++n) sum[m][n] = fma(left, right[n], sum[m][n]);
        }
    }

    /// Rows [m0, m0 + Rows) of a panel of columns.
    template <class Set, int Rows, int Vecs>
    static INTERSTATE_INLINE void block(const Args& g, Index m0, Index n0) {
        using V = Native<Set, A>;
        const A* a = g.a + m0 * g.a_row;
        const A* b = g.b + n0;
        V sum[Rows][Vecs];
        INTERSTATE_UNROLL
        for (int m = 0; m < Rows; ++m) {
            INTERSTATE_UNROLL
            for (int n = 0; n < Vecs; ++n) sum[m][n] = broadcast<V>(A(0));
        }
        // The corner where rows differ in what they sum has Rows - 1 terms, before or behind all others.
        Index begin = 0, end = g.K;
        if constexpr (terms == Terms::lower) end = m0 + 1;
        if constexpr (terms == Terms::upper) {
            begin = m0 + Rows - 1;
            INTERSTATE_UNROLL
            for (int i = 0; i + 1 < Rows; ++i)
                term<Rows, Vecs, V>(a + (m0 + i) * g.a_col, g.a_row, b + (m0 + i) * g.ldb, sum, 0, i);
        }
        for (Index k = begin; k < end; ++k)
            term<Rows, Vecs, V>(a + k * g.a_col, g.a_row, b + k * g.ldb, sum, 0, Rows - 1);
        if constexpr (terms == Terms::lower) {
            INTERSTATE_UNROLL
            for (int i = 1; i < Rows; ++i)
                term<Rows, Vecs, V>(a + (m0 + i) * g.a_col, g.a_row, b + (m0 + i) * g.ldb, sum, i, Rows - 1);
        }
        INTERSTATE_UNROLL
        for (int m = 0; m < Rows; ++m) {
            A* to = g.c + (m0 + m) * g.ldc + n0;
            INTERSTATE_UNROLL
            for (int n = 0; n < Vecs; ++n)
                store(to + n * V::lanes, g.add ? load<V>(to + n * V::lanes) + sum[m][n] : sum[m][n]);
        }
    }
    template <class Set, int Vecs>
    static INTERSTATE_INLINE void panel(const Args& g, Index n0) {
        Index m = 0;
        for (; m + 6 <= g.M; m += 6) block<Set, 6, Vecs>(g, m, n0);
        for (; m + 4 <= g.M; m += 4) block<Set, 4, Vecs>(g, m, n0);
        for (; m + 2 <= g.M; m += 2) block<Set, 2, Vecs>(g, m, n0);
        if (m < g.M) block<Set, 1, Vecs>(g, m, n0);
    }
    template <class Set>
    static INTERSTATE_INLINE void run(const Args& g) {
        constexpr int widest = Set::registers >= 32 ? 4 : 2;  // 6 x 4 or 6 x 2 sums stay in registers
        constexpr Index lanes = Native<Set, A>::lanes;
        Index n = 0;
        for (; n + widest * lanes <= g.N; n += widest * lanes) panel<Set, widest>(g, n);
        if constexpr (widest > 2)
            for (; n + 2 * lanes <= g.N; n += 2 * lanes) panel<Set, 2>(g, n);
        for (; n < g.N; n += lanes) panel<Set, 1>(g, n);
    }
};

/// dst[j][i] = scale src[i][j] for i in [0, rows), j in [0, columns), both multiples of the vector lanes.
template <class A>
struct Transpose {
    template <int N, int Half, int... I>
    static INTERSTATE_INLINE Vec<A, N> interleave(const Vec<A, N>& a, const Vec<A, N>& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
        return {__builtin_shufflevector(a.v, b.v, (Half * N / 2 + I / 2 + (I % 2) * N)...)};
#else
        using Mask = typename Vec<A, N>::int_type;
        return {__builtin_shuffle(a.v, b.v, Mask{(Half * N / 2 + I / 2 + (I % 2) * N)...})};
#endif
    }
    template <class Set>
    static INTERSTATE_INLINE void run(const A* src, Index lds, Index rows, Index columns, A* dst, Index ldd, A scale) {
        using V = Native<Set, A>;
        constexpr int N = V::lanes;
        using Lane = std::make_integer_sequence<int, N>;
        const V factor = broadcast<V>(scale);
        for (Index i = 0; i < rows; i += N)
            for (Index j = 0; j < columns; j += N) {
                V x[N];
                INTERSTATE_UNROLL
                for (int r = 0; r < N; ++r) x[r] = load<V>(src + (i + r) * lds + j) * factor;
                // Shuffling the rows as a deck of N * N cards moves each by one bit of its index.
                INTERSTATE_UNROLL
                for (int step = 1; step < N; step *= 2) {
                    V y[N];
                    INTERSTATE_UNROLL
                    for (int r = 0; r < N / 2; ++r) {
                        y[2 * r] = interleave<N, 0>(x[r], x[r + N / 2], Lane{});
                        y[2 * r + 1] = interleave<N, 1>(x[r], x[r + N / 2], Lane{});
                    }
                    INTERSTATE_UNROLL
                    for (int r = 0; r < N; ++r) x[r] = y[r];
                }
                INTERSTATE_UNROLL
                for (int r = 0; r < N; ++r) store(dst + (j + r) * ldd + i, x[r]);
            }
    }
};

}  // namespace simd
}  // namespace interstate::inline INTERSTATE_ABI
