// Products of small matrices: every instruction set, size, stride and set of terms against plain loops.
#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include <interstate/cpu/gemm.hpp>

#include "support/isas.hpp"

namespace interstate {
namespace {

using test::isas;

/// Small integers, so that sums are exact in any order.
template <class A>
std::vector<A> numbers(Index n, Index seed) {
    std::vector<A> x(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<A>(static_cast<Index>(i * 7 + seed) % 11 - 5);
    return x;
}

struct Strides {
    Index at, row, col;
};

template <class A, simd::Terms terms>
void expect_product(Isa isa, Index M, Index N, Index K, bool add, Strides left, bool reversed) {
    const Index ldb = N + 16, ldc = N + 16;
    const auto a = numbers<A>(20000, 3);
    auto b = numbers<A>((K + 1) * ldb, 5);
    auto c = numbers<A>((M + 1) * ldc, 1);
    const auto before = c;
    const bool triangle = terms != simd::Terms::all;
    // In the terms that are not there, B is NaN: row k is in no term of rows m < k (lower) or m > k (upper).
    const Index poison = triangle && K > 0 ? (terms == simd::Terms::lower ? K - 1 : 0) : -1;
    if (poison >= 0)
        for (Index n = 0; n < N; ++n) b[poison * ldb + n] = std::numeric_limits<A>::quiet_NaN();
    const A* const right = reversed && K > 0 ? b.data() + (K - 1) * ldb : b.data();
    const Index right_step = reversed ? -ldb : ldb;
    if (reversed && poison >= 0) GTEST_FAIL() << "a triangle is read in order";
    A* const to = c.data();
    using G = simd::Gemm<A, terms>;
    simd::run_body<G>(isa, typename G::Args{a.data() + left.at, left.row, left.col, right, right_step, to, ldc, M, N, K, add});
    for (Index m = 0; m <= M; ++m)
        for (Index n = 0; n < ldc; ++n) {
            A want = before[m * ldc + n];
            if (m < M && n < N) {
                if (!add) want = 0;
                for (Index k = 0; k < K; ++k) {
                    const bool there = !triangle || (terms == simd::Terms::lower ? k <= m : k >= m);
                    if (there) want += a[left.at + m * left.row + k * left.col] * right[k * right_step + n];
                }
            }
            const A got = c[m * ldc + n];
            ASSERT_TRUE(got == want || (std::isnan(got) && std::isnan(want)))
                << to_string(isa) << " M=" << M << " N=" << N << " K=" << K << " at " << m << ", " << n << ": " << got << ", not " << want;
        }
}

template <class A>
void expect_products() {
    for (const Isa isa : isas())
        for (const Index N : {0, 16, 32, 48, 64, 80, 112})
            for (const Index M : {0, 1, 2, 3, 5, 6, 7, 12, 13, 64})
                for (const bool add : {false, true}) {
                    for (const Index K : {0, 1, 7, 64})
                        for (const auto& [left, reversed] :
                             {std::pair{Strides{0, 70, 1}, false}, {Strides{0, 1, 70}, true}, {Strides{9000, -70, 2}, false}})
                            expect_product<A, simd::Terms::all>(isa, M, N, K, add, left, reversed);
                    // A Toeplitz-like table read with a skew, element (m, k) at [m][m - k]; and its transpose.
                    expect_product<A, simd::Terms::lower>(isa, M, N, M, add, {100, 81, -1}, false);
                    expect_product<A, simd::Terms::upper>(isa, M, N, M, add, {100, -1, 81}, false);
                }
}
TEST(Gemm, EverySizeStrideAndSetOfTerms) {
    expect_products<float>();
    expect_products<double>();
}

template <class A>
void expect_transposes() {
    for (const Isa isa : isas())
        for (const Index rows : {0, 16, 48})
            for (const Index columns : {0, 16, 64}) {
                const Index lds = columns + 3, ldd = rows + 5;
                const auto from = numbers<A>(rows * lds + 1, 2);
                std::vector<A> to(static_cast<std::size_t>(columns * ldd + 1), A(77));
                simd::run_body<simd::Transpose<A>>(isa, from.data(), lds, rows, columns, to.data(), ldd, A(-2));
                for (Index j = 0; j < columns; ++j)
                    for (Index i = 0; i < ldd; ++i)
                        ASSERT_EQ(to[j * ldd + i], i < rows ? A(-2) * from[i * lds + j] : A(77)) << to_string(isa) << i << j;
            }
}
TEST(Transpose, EverySize) {
    expect_transposes<float>();
    expect_transposes<double>();
}

}  // namespace
}  // namespace interstate
