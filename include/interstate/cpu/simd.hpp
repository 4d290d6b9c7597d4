// The thin vector layer CPU kernels are written on: compiler vector types behind a few names.
//
// Everything is always-inline and takes vectors by reference, so that a body compiles for the
// instruction set of the function it is inlined into (see cpu/isa.hpp). A product and a sum in one
// expression become one FMA where the target has it.
#pragma once

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "interstate: -ffast-math and -ffinite-math-only break exp() and the handling of NaN and infinities here"
#endif

#include <cstdint>
#include <cstring>
#include <utility>

#include <interstate/cpu/isa.hpp>
#include <interstate/dtype.hpp>

// Before a loop of constant trip count over an array of vectors: only unrolled does it stay in registers.
#if defined(__clang__)
#define INTERSTATE_UNROLL _Pragma("unroll")
#elif defined(__CUDACC__)  // nvcc does not know the pragma and says so, but hands it on to g++, which does
#define INTERSTATE_UNROLL                                                                   \
    _Pragma("nv_diagnostic push") _Pragma("nv_diag_suppress 1675") _Pragma("GCC unroll 64") \
    _Pragma("nv_diagnostic pop")
#else
#define INTERSTATE_UNROLL _Pragma("GCC unroll 64")
#endif

namespace interstate::inline INTERSTATE_ABI {
namespace simd {

template <class T, int N>
struct Vec {
    static constexpr int lanes = N;
    using Int = std::conditional_t<sizeof(T) == 8, std::int64_t, std::int32_t>;
    typedef T type __attribute__((vector_size(N * sizeof(T))));
    typedef Int int_type __attribute__((vector_size(N * sizeof(T))));

    type v;

    INTERSTATE_INLINE T operator[](int i) const { return v[i]; }
};

/// The widest vector of T that an instruction set has.
template <class Set, class T>
using Native = Vec<T, Set::bytes / static_cast<int>(sizeof(T))>;

template <class V, class T>
INTERSTATE_INLINE V load(const T* p) {
    V r;
    std::memcpy(&r.v, p, sizeof r.v);
    return r;
}
template <class T, int N>
INTERSTATE_INLINE void store(T* p, const Vec<T, N>& a) {
    std::memcpy(p, &a.v, sizeof a.v);
}
template <class V, class T>
INTERSTATE_INLINE V broadcast(T x) {
    V r{};
    r.v = static_cast<std::remove_cvref_t<decltype(r.v[0])>>(x) - r.v;  // not a sum: -0 stays -0, at no cost
    return r;
}

template <class T, int N>
INTERSTATE_INLINE Vec<T, N> operator+(const Vec<T, N>& a, const Vec<T, N>& b) {
    return {a.v + b.v};
}
template <class T, int N>
INTERSTATE_INLINE Vec<T, N> operator-(const Vec<T, N>& a, const Vec<T, N>& b) {
    return {a.v - b.v};
}
template <class T, int N>
INTERSTATE_INLINE Vec<T, N> operator*(const Vec<T, N>& a, const Vec<T, N>& b) {
    return {a.v * b.v};
}
/// a * b + c
template <class T, int N>
INTERSTATE_INLINE Vec<T, N> fma(const Vec<T, N>& a, const Vec<T, N>& b, const Vec<T, N>& c) {
    return {a.v * b.v + c.v};
}
/// c - a * b
template <class T, int N>
INTERSTATE_INLINE Vec<T, N> fnma(const Vec<T, N>& a, const Vec<T, N>& b, const Vec<T, N>& c) {
    return {c.v - a.v * b.v};
}
/// a > b ? a : b: where a is NaN the result is b, where b is NaN it is NaN.
template <class T, int N>
INTERSTATE_INLINE Vec<T, N> max(const Vec<T, N>& a, const Vec<T, N>& b) {
    return {a.v > b.v ? a.v : b.v};
}
template <class T, int N>
INTERSTATE_INLINE Vec<T, N> min(const Vec<T, N>& a, const Vec<T, N>& b) {
    return {a.v < b.v ? a.v : b.v};
}

/// Sums and maxima over lanes, in a fixed tree order.
template <class T, int N>
INTERSTATE_INLINE T reduce_add(const Vec<T, N>& a) {
    T part[N];
    std::memcpy(part, &a.v, sizeof part);
    for (int width = N / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}
template <class T, int N>
INTERSTATE_INLINE T reduce_max(const Vec<T, N>& a) {
    T part[N];
    std::memcpy(part, &a.v, sizeof part);
    for (int width = N / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] = part[i] > part[i + width] ? part[i] : part[i + width];
    return part[0];
}

namespace detail {
template <class T, int N>
struct Bits {
    typedef T type __attribute__((vector_size(N * sizeof(T))));
};
}  // namespace detail

/// Loads V::lanes elements of type T as the element type of V: 16-bit types are widened exactly, by
/// integer operations that every instruction set has.
template <class V, class T>
INTERSTATE_INLINE V load_as(const T* p) {
    if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
        using half_type = typename detail::Bits<std::uint16_t, V::lanes>::type;
        using word_type = typename detail::Bits<std::uint32_t, V::lanes>::type;
        half_type h;
        std::memcpy(&h, p, sizeof h);
        word_type w = __builtin_convertvector(h, word_type);
        if constexpr (std::is_same_v<T, bf16>) {
            w <<= 16;
        } else {
            // Exponents move by 112; Inf and NaN to the top; a subnormal is what is above 2^-14.
            const word_type sign = (w & 0x8000u) << 16;
            const word_type a = (w & 0x7fffu) << 13;
            typename V::type above;
            const word_type raised = a + 0x38800000u;
            std::memcpy(&above, &raised, sizeof above);
            above -= 6.103515625e-05f;
            word_type small;
            std::memcpy(&small, &above, sizeof small);
            w = a + 0x38000000u;
            w = a < 0x00800000u ? small : w;
            w = a >= 0x0f800000u ? (a | 0x7f800000u) : w;
            w |= sign;
        }
        V r;
        std::memcpy(&r.v, &w, sizeof r.v);
        return r;
    } else if constexpr (std::is_same_v<T, std::remove_cvref_t<decltype(V{}.v[0])>>) {
        return load<V>(p);
    } else {
        return {__builtin_convertvector(load<Vec<T, V::lanes>>(p).v, typename V::type)};
    }
}

/// Stores N lanes as elements of storage type T, rounded to nearest even: the inverse of load_as.
template <class T, class A, int N>
INTERSTATE_INLINE void store_as(T* p, const Vec<A, N>& x) {
    if constexpr (std::is_same_v<T, f16> || std::is_same_v<T, bf16>) {
        static_assert(std::is_same_v<A, float>, "interstate: 16-bit storage is written from float");
        using half_type = typename detail::Bits<std::uint16_t, N>::type;
        using word_type = typename detail::Bits<std::uint32_t, N>::type;
        word_type bits;
        std::memcpy(&bits, &x.v, sizeof bits);
        const word_type a = bits & 0x7fffffffu;
        word_type w;
        if constexpr (std::is_same_v<T, bf16>) {
            w = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
            w = a > 0x7f800000u ? (bits >> 16) | 0x40u : w;
        } else {
            // As detail::f16_bits does: subnormals by the float adder, overflow to Inf, NaN stays NaN.
            typename Vec<float, N>::type above;
            std::memcpy(&above, &a, sizeof above);
            above += 0.5f;
            word_type small;
            std::memcpy(&small, &above, sizeof small);
            small -= 0x3f000000u;
            w = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
            w = a < 0x38800000u ? small : w;
            w = a >= 0x477ff000u ? (a ^ a) | 0x7c00u : w;
            w = a > 0x7f800000u ? (a ^ a) | 0x7e00u : w;
            w |= (bits >> 16) & 0x8000u;
        }
        const half_type h = __builtin_convertvector(w, half_type);
        std::memcpy(p, &h, sizeof h);
    } else if constexpr (std::is_same_v<T, A>) {
        store(p, x);
    } else {
        store(p, Vec<T, N>{__builtin_convertvector(x.v, typename Vec<T, N>::type)});
    }
}

/// x = n ln2 + r with |r| <= ln2/2; ln2 in two parts makes n ln2 exact to both. Returns exp(r), and n.
template <int N>
INTERSTATE_INLINE Vec<float, N> exp_of_rest(const Vec<float, N>& x, typename Vec<float, N>::int_type& n_out) {
    using V = Vec<float, N>;
    const V shifter = broadcast<V>(12582912.0f);  // 1.5 * 2^23: its sum with t holds round(t) in the low bits
    const V t = fma(x, broadcast<V>(1.44269504088896341f), shifter);
    const V n = t - shifter;
    V r = fnma(n, broadcast<V>(0.693359375f), x);
    r = fnma(n, broadcast<V>(-2.12194440e-4f), r);
    V p = broadcast<V>(1.9875691500e-4f);
    p = fma(p, r, broadcast<V>(1.3981999507e-3f));
    p = fma(p, r, broadcast<V>(8.3334519073e-3f));
    p = fma(p, r, broadcast<V>(4.1665795894e-2f));
    p = fma(p, r, broadcast<V>(1.6666665459e-1f));
    p = fma(p, r, broadcast<V>(5.0000001201e-1f));
    std::memcpy(&n_out, &t.v, sizeof n_out);
    n_out -= 0x4b400000;
    return fma(p, r * r, r) + broadcast<V>(1.0f);
}
/// 2^(biased - 127), from 0 and up to what floats have.
template <int N>
INTERSTATE_INLINE Vec<float, N> power_of_two(const typename Vec<float, N>::int_type& biased) {
    const typename Vec<float, N>::int_type bits = biased << 23;
    Vec<float, N> scale;
    std::memcpy(&scale.v, &bits, sizeof bits);
    return scale;
}

/// exp(x), to about 1 ulp for float and 2 for double. NaN stays NaN, overflow is +inf, and what would
/// be below 2^-125 (float) or 2^-1021 (double), exp(-inf) included, is 0: a softmax has no use for
/// subnormal weights.
template <int N>
INTERSTATE_INLINE Vec<float, N> exp(const Vec<float, N>& x0) {
    using V = Vec<float, N>;
    // The constant comes first: max(c, NaN) is NaN.
    const V x = min(broadcast<V>(89.0f), max(broadcast<V>(-87.34f), x0));
    typename V::int_type n;
    V p = exp_of_rest(x, n);
    // 2^(n-1), doubled afterwards: n = 128 is still finite, and n = -126 gives zero.
    p = p * power_of_two<N>(n + 126);
    return p + p;
}
template <int N>
INTERSTATE_INLINE Vec<double, N> exp(const Vec<double, N>& x0) {
    using V = Vec<double, N>;
    using Int = typename V::int_type;
    const V x = min(broadcast<V>(710.0), max(broadcast<V>(-708.5), x0));
    const V shifter = broadcast<V>(6755399441055744.0);  // 1.5 * 2^52
    const V t = fma(x, broadcast<V>(1.4426950408889634074), shifter);
    const V n = t - shifter;
    V r = fnma(n, broadcast<V>(6.93145751953125e-1), x);
    r = fnma(n, broadcast<V>(1.42860682030941723212e-6), r);
    V p = broadcast<V>(1.0 / 6227020800.0);  // Taylor to r^13: the rest is below 2^-57
    p = fma(p, r, broadcast<V>(1.0 / 479001600.0));
    p = fma(p, r, broadcast<V>(1.0 / 39916800.0));
    p = fma(p, r, broadcast<V>(1.0 / 3628800.0));
    p = fma(p, r, broadcast<V>(1.0 / 362880.0));
    p = fma(p, r, broadcast<V>(1.0 / 40320.0));
    p = fma(p, r, broadcast<V>(1.0 / 5040.0));
    p = fma(p, r, broadcast<V>(1.0 / 720.0));
    p = fma(p, r, broadcast<V>(1.0 / 120.0));
    p = fma(p, r, broadcast<V>(1.0 / 24.0));
    p = fma(p, r, broadcast<V>(1.0 / 6.0));
    p = fma(p, r, broadcast<V>(0.5));
    p = fma(p, r * r, r) + broadcast<V>(1.0);
    Int e;
    std::memcpy(&e, &t.v, sizeof e);
    e = (e - 0x4338000000000000 + 1022) << 52;
    V scale;
    std::memcpy(&scale.v, &e, sizeof e);
    p = p * scale;
    return p + p;
}

/// exp(x) for x <= 0 or NaN, the difference of a score to the largest one: the bits of exp for less work. What would be
/// below about 2^-126 (float) is 0.
template <int N>
INTERSTATE_INLINE Vec<float, N> exp_nonpositive(const Vec<float, N>& x0) {
    using V = Vec<float, N>;
    typename V::int_type n;
    const V p = exp_of_rest(max(broadcast<V>(-88.0f), x0), n);
    return p * power_of_two<N>(n + 127);  // n = 0 at most, and n = -127 gives zero
}
template <int N>
INTERSTATE_INLINE Vec<double, N> exp_nonpositive(const Vec<double, N>& x) {
    return exp(x);
}

namespace detail {
template <class T, int N, int... I>
INTERSTATE_INLINE Vec<T, N> interleave_sum(const Vec<T, N>& a, const Vec<T, N>& b,
                                           std::integer_sequence<int, I...>) {
#if defined(__clang__)
    return {__builtin_shufflevector(a.v, b.v, (I / 2 + (I % 2) * N)...) +
            __builtin_shufflevector(a.v, b.v, (N / 2 + I / 2 + (I % 2) * N)...)};
#else  // not the other one, whose packs nvcc's host pass loses
    using Mask = typename Vec<T, N>::int_type;
    return {__builtin_shuffle(a.v, b.v, Mask{(I / 2 + (I % 2) * N)...}) +
            __builtin_shuffle(a.v, b.v, Mask{(N / 2 + I / 2 + (I % 2) * N)...})};
#endif
}
}  // namespace detail

/// Lane i of the result is the sum over the lanes of a[i]; `a` is used up. N sums for the work of a few.
template <class T, int N>
INTERSTATE_INLINE Vec<T, N> reduce_add_each(Vec<T, N> (&a)[N]) {
    INTERSTATE_UNROLL
    for (int width = N / 2; width > 0; width /= 2) {
        INTERSTATE_UNROLL
        for (int i = 0; i < width; ++i)
            a[i] = detail::interleave_sum(a[i], a[i + width], std::make_integer_sequence<int, N>{});
    }
    return a[0];
}

}  // namespace simd
}  // namespace interstate::inline INTERSTATE_ABI
