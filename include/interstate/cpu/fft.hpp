// Fast Fourier transforms of W channels at once, one a vector lane, for convolutions of real sequences.
//
// A sequence x of up to m real numbers is the polynomial sum_j x[j] z^j. The transform takes it modulo
// z^m - i to its values at the m roots of z^m = i, all complex, on arrays (m, re/im, W) in place. Real and
// imaginary parts of a product's residue are its coefficients 0..m-1 and m..2m-1, so that a transform of m
// complex numbers does what a real one of 2m zero-padded numbers would, without its separate last pass:
//
//     forward: x in the real parts, zeros in the imaginary ones;  product of values;  inverse:
//     coefficient j < m is re[j], coefficient m + j is im[j], and coefficient -l is -im[m - l]
//     (z^(2m) = -1: what runs beyond 2m comes back with its sign changed).
//
// The conjugate of the values of a real sequence is that of x[-j]: it turns convolution into correlation.
//
// z^s - c^2 = (z^(s/2) - c)(z^(s/2) + c): each step replaces a residue by two of half its size,
// (a + c b, a - c b), with one number c for the whole node of the tree, four residues in one pass over
// memory. Values come out in the order of the tree's leaves, which a product of values does not mind, so
// nothing is ever permuted. Node k of level v, whose residue has size m/2^v, has
//     c = exp(i pi (1 + 4 reverse_v(k)) / (4 2^v)),     reverse_v: v bits in reverse order,
// which does not depend on m: one table serves every power of two up to its own size.
#pragma once

#include <cmath>
#include <numbers>

#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace fft {

/// The smallest transform that holds `length` numbers.
constexpr Index size_for(Index length) {
    Index m = 1;
    while (m < length) m *= 2;
    return m;
}

/// Values in the table of roots for transforms of up to m.
constexpr Index roots_size(Index m) { return 2 * m; }

/// Fills a table of roots, formed in float64: node k of level v is entry 2^v - 1 + k, (re, im).
template <class A>
void fill_roots(A* roots, Index m, int threads) {
    constexpr Index piece = 512;
    parallel_for((m + piece - 1) / piece, threads, [&](Index task, int) {
        const Index end = (task + 1) * piece < m ? (task + 1) * piece : m;
        for (Index entry = task * piece; entry < end; ++entry) {
            Index level = 0;
            while ((Index{2} << level) <= entry + 1) ++level;
            Index reverse = 0;
            for (Index bit = 0, k = entry + 1 - (Index{1} << level); bit < level; ++bit, k >>= 1)
                reverse = 2 * reverse + (k & 1);
            const double angle = std::numbers::pi * static_cast<double>(1 + 4 * reverse) /
                                 static_cast<double>(Index{4} << level);
            roots[2 * entry] = static_cast<A>(std::cos(angle));
            roots[2 * entry + 1] = static_cast<A>(std::sin(angle));
        }
    });
}

namespace detail {

template <class V>
struct Pair {
    V re, im;
};
template <class V, class A>
INTERSTATE_INLINE Pair<V> get(const A* p) {
    return {simd::load<V>(p), simd::load<V>(p + V::lanes)};
}
template <class V, class A>
INTERSTATE_INLINE void put(A* p, const Pair<V>& x) {
    simd::store(p, x.re);
    simd::store(p + V::lanes, x.im);
}
template <class V>
INTERSTATE_INLINE Pair<V> operator+(const Pair<V>& a, const Pair<V>& b) {
    return {a.re + b.re, a.im + b.im};
}
template <class V>
INTERSTATE_INLINE Pair<V> operator-(const Pair<V>& a, const Pair<V>& b) {
    return {a.re - b.re, a.im - b.im};
}
/// a + c b
template <class V>
INTERSTATE_INLINE Pair<V> plus(const Pair<V>& a, const Pair<V>& c, const Pair<V>& b) {
    return {simd::fnma(c.im, b.im, simd::fma(c.re, b.re, a.re)),
            simd::fma(c.im, b.re, simd::fma(c.re, b.im, a.im))};
}
/// a - c b
template <class V>
INTERSTATE_INLINE Pair<V> minus(const Pair<V>& a, const Pair<V>& c, const Pair<V>& b) {
    return {simd::fma(c.im, b.im, simd::fnma(c.re, b.re, a.re)),
            simd::fnma(c.im, b.re, simd::fnma(c.re, b.im, a.im))};
}
/// conj(c) b
template <class V>
INTERSTATE_INLINE Pair<V> turn_back(const Pair<V>& c, const Pair<V>& b) {
    return {simd::fma(c.im, b.im, c.re * b.re), simd::fnma(c.im, b.re, c.re * b.im)};
}
template <class V, class A>
INTERSTATE_INLINE Pair<V> root(const A* roots, Index level, Index k) {
    const A* c = roots + 2 * ((Index{1} << level) - 1 + k);
    return {simd::broadcast<V>(c[0]), simd::broadcast<V>(c[1])};
}

/// Two levels below node k of `level`: four residues of size s/4 from one of size s.
template <class V, class A>
INTERSTATE_INLINE void split4(A* x, Index s, Index level, Index k, const A* roots) {
    const Index q = s / 4 * 2 * V::lanes;
    const auto c = root<V>(roots, level, k), d = root<V>(roots, level + 1, 2 * k);
    const Pair<V> id{simd::broadcast<V>(A(0)) - d.im, d.re};
    for (A* p = x; p < x + q; p += 2 * V::lanes) {
        const auto a0 = get<V>(p), a1 = get<V>(p + q), a2 = get<V>(p + 2 * q), a3 = get<V>(p + 3 * q);
        const auto b0 = plus(a0, c, a2), b1 = plus(a1, c, a3), b2 = minus(a0, c, a2), b3 = minus(a1, c, a3);
        put(p, plus(b0, d, b1));
        put(p + q, minus(b0, d, b1));
        put(p + 2 * q, plus(b2, id, b3));
        put(p + 3 * q, minus(b2, id, b3));
    }
}
template <class V, class A>
INTERSTATE_INLINE void join4(A* x, Index s, Index level, Index k, const A* roots) {
    const Index q = s / 4 * 2 * V::lanes;
    const auto c = root<V>(roots, level, k), d = root<V>(roots, level + 1, 2 * k);
    const Pair<V> id{simd::broadcast<V>(A(0)) - d.im, d.re};
    for (A* p = x; p < x + q; p += 2 * V::lanes) {
        const auto a0 = get<V>(p), a1 = get<V>(p + q), a2 = get<V>(p + 2 * q), a3 = get<V>(p + 3 * q);
        const auto b0 = a0 + a1, b1 = turn_back(d, a0 - a1), b2 = a2 + a3, b3 = turn_back(id, a2 - a3);
        put(p, b0 + b2);
        put(p + q, b1 + b3);
        put(p + 2 * q, turn_back(c, b0 - b2));
        put(p + 3 * q, turn_back(c, b1 - b3));
    }
}
template <class V, class A>
INTERSTATE_INLINE void split2(A* x, Index level, Index k, const A* roots) {
    const auto c = root<V>(roots, level, k);
    const auto a = get<V>(x), b = get<V>(x + 2 * V::lanes);
    put(x, plus(a, c, b));
    put(x + 2 * V::lanes, minus(a, c, b));
}
template <class V, class A>
INTERSTATE_INLINE void join2(A* x, Index level, Index k, const A* roots) {
    const auto c = root<V>(roots, level, k);
    const auto a = get<V>(x), b = get<V>(x + 2 * V::lanes);
    put(x, a + b);
    put(x + 2 * V::lanes, turn_back(c, a - b));
}

/// Residues of this size and below are finished one subtree after the other, in the first-level cache.
inline constexpr Index subtree = 128;

/// Splits the node of size s at (level, k) until residues have size `until` or 1, a power of 4 smaller.
template <class V, class A>
INTERSTATE_INLINE void descend(A* x, Index s, Index level, Index k, Index until, const A* roots) {
    for (Index nodes = 1; s > until; nodes *= 4, s /= 4, level += 2, k *= 4) {
        if (s == 2) {
            for (Index i = 0; i < nodes; ++i) split2<V>(x + i * 4 * V::lanes, level, k + i, roots);
            return;
        }
        for (Index i = 0; i < nodes; ++i) split4<V>(x + i * s * 2 * V::lanes, s, level, k + i, roots);
    }
}
/// The inverse, 2 at every level left to the caller. `size` is that of the node, joined from `from`.
template <class V, class A>
INTERSTATE_INLINE void ascend(A* x, Index size, Index level, Index k, Index from, const A* roots) {
    // The levels of descend, last first.
    Index s = size, nodes = 1, down = 0;
    for (; s > from && s > 2; s /= 4, nodes *= 4) ++down;
    if (s == 2 && s > from)
        for (Index i = 0; i < nodes; ++i)
            join2<V>(x + i * 4 * V::lanes, level + 2 * down, k * nodes + i, roots);
    for (; down > 0; --down) {
        nodes /= 4;
        s *= 4;
        for (Index i = 0; i < nodes; ++i)
            join4<V>(x + i * s * 2 * V::lanes, s, level + 2 * (down - 1), k * nodes + i, roots);
    }
}

}  // namespace detail

/// x (m, 2, W) <- its values, in place.
template <class A>
struct Forward {
    template <class Set>
    static INTERSTATE_INLINE void run(A* x, Index m, const A* roots) {
        using V = simd::Native<Set, A>;
        Index leaf = m, level = 0;
        for (; leaf > detail::subtree; leaf /= 4) level += 2;
        detail::descend<V>(x, m, 0, 0, leaf, roots);
        for (Index k = 0; k < m / leaf; ++k)
            detail::descend<V>(x + k * leaf * 2 * V::lanes, leaf, level, k, 1, roots);
    }
};

/// x (m, 2, W) <- m times the residue of which x holds the values, in place.
template <class A>
struct Inverse {
    template <class Set>
    static INTERSTATE_INLINE void run(A* x, Index m, const A* roots) {
        using V = simd::Native<Set, A>;
        Index leaf = m, level = 0;
        for (; leaf > detail::subtree; leaf /= 4) level += 2;
        for (Index k = 0; k < m / leaf; ++k)
            detail::ascend<V>(x + k * leaf * 2 * V::lanes, leaf, level, k, 1, roots);
        detail::ascend<V>(x, m, 0, 0, leaf, roots);
    }
};

/// y <- scale x y, values (m, 2, W).
template <class A>
struct Convolve {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* x, A* y, Index m, A scale) {
        using V = simd::Native<Set, A>;
        const V s = simd::broadcast<V>(scale);
        for (Index at = 0; at < m * 2 * V::lanes; at += 2 * V::lanes) {
            const auto a = detail::get<V>(x + at), b = detail::get<V>(y + at);
            detail::put(y + at, detail::Pair<V>{s * simd::fnma(a.im, b.im, a.re * b.re),
                                                s * simd::fma(a.im, b.re, a.re * b.im)});
        }
    }
};

/// Backward of y = x * k in values: sum_k += scale conj(x) dy, then dy <- scale conj(k) dy.
template <class A>
struct Correlate {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* x, const A* k, A* dy, A* sum_k, Index m, A scale) {
        using V = simd::Native<Set, A>;
        const V s = simd::broadcast<V>(scale);
        for (Index at = 0; at < m * 2 * V::lanes; at += 2 * V::lanes) {
            auto g = detail::get<V>(dy + at);
            g = {s * g.re, s * g.im};
            detail::put(sum_k + at,
                        detail::get<V>(sum_k + at) + detail::turn_back(detail::get<V>(x + at), g));
            detail::put(dy + at, detail::turn_back(detail::get<V>(k + at), g));
        }
    }
};

}  // namespace fft
}  // namespace interstate::inline INTERSTATE_ABI
