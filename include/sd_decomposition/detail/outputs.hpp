// What all executors share of a head: the scales of its columns, when a part is zero, and what norms and spectra become.
// Equations: docs/ops/sd_decomposition.md.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <sd_decomposition/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition::detail {

/// Elements of a matrix; -1, which no Arena has room for, where they cannot be counted.
inline Index area(Index rows, Index columns) {
    Index elements = 0;
    return __builtin_mul_overflow(rows, columns, &elements) ? -1 : elements;
}

/// A squared length that is no length beside elements near 1; its inverse is still a number.
template <class A>
inline constexpr A nothing = sizeof(A) == 8 ? A(1e-280) : A(1e-30f);

/// The outputs of S or of F.
template <class T>
struct PartOutputs {
    View<acc_t<T>, 2> norm;
    View<acc_t<T>, 3> singular_values;
    View<acc_t<T>, 2> effective_rank, participation_ratio, stable_rank;

    INTERSTATE_HD bool want_spectrum() const { return singular_values || effective_rank || participation_ratio || stable_rank; }
};
template <class T>
INTERSTATE_HD PartOutputs<T> routing_of(const Outputs<T>& out) {
    return {out.routing_norm, out.routing_singular_values, out.routing_effective_rank, out.routing_participation_ratio,
            out.routing_stable_rank};
}
template <class T>
INTERSTATE_HD PartOutputs<T> filtering_of(const Outputs<T>& out) {
    return {out.filtering_norm, out.filtering_singular_values, out.filtering_effective_rank,
            out.filtering_participation_ratio, out.filtering_stable_rank};
}

/// A positive factor of any magnitude: fraction 2^exponent.
struct Factor {
    double fraction;
    int exponent;
    INTERSTATE_HD double times(double x) const { return std::ldexp(x * fraction, exponent); }
};
/// |scale| 2^G.
INTERSTATE_HD inline Factor factor_of(double scale, int G) {
    int exponent = 0;
    const double fraction = std::frexp(std::abs(scale), &exponent);
    return {fraction, exponent + G};
}

/// The exponent of a pair of columns of largest magnitudes q and k; `no_pair` where one of them is zero.
inline constexpr int no_pair = std::numeric_limits<int>::min();
INTERSTATE_HD inline int pair_exponent(double q, double k) {
    return q > 0.0 && k > 0.0 ? std::ilogb(q) + std::ilogb(k) : no_pair;
}
/// G of eq. 7 from the largest of all exponents of pairs.
INTERSTATE_HD inline int common_exponent(int largest) { return largest == no_pair ? 0 : 4 * ((largest + 3) >> 2); }
/// eq. 7: replaces the largest magnitudes of a pair of columns by the roots r of their scales, 2^x = r r. Those of a pair
/// that is left out are zero.
INTERSTATE_HD inline void balance_pair(double& q, double& k, int G) {
    const bool both = q > 0.0 && k > 0.0;
    const int root = both ? (std::ilogb(k) - std::ilogb(q) - G) >> 2 : 0;
    q = both ? std::ldexp(1.0, root) : 0.0;
    k = both ? std::ldexp(1.0, -G / 2 - root) : 0.0;
}
/// The same for the columns of Q (d), then of K (d). Returns G.
inline int balance(double* columns, Index d) {
    int largest = no_pair;
    for (Index i = 0; i < d; ++i) largest = std::max(largest, pair_exponent(columns[i], columns[d + i]));
    const int G = common_exponent(largest);
    for (Index i = 0; i < d; ++i) balance_pair(columns[i], columns[d + i], G);
    return G;
}

/// Makes a part that is rounding alone zero (eq. 8); `terms` is the root of the sum there, all without scale.
INTERSTATE_HD inline double part_norm(double norm, double terms, Index n, double eps) {
    return norm <= static_cast<double>(n) * eps * terms ? 0.0 : norm;
}

/// Norms and energy of a head (eq. 2), from the norms of S and F without their factor.
template <class T>
INTERSTATE_HD void write_norms(const Outputs<T>& out, Index b, Index h, double routing, double filtering, Factor factor) {
    using A = acc_t<T>;
    const double norm = std::hypot(routing, filtering);
    const double share = norm > 0.0 ? routing / norm : norm;  // of NaN, NaN
    if (out.norm) out.norm(b, h) = static_cast<A>(factor.times(norm));
    if (out.routing_norm) out.routing_norm(b, h) = static_cast<A>(factor.times(routing));
    if (out.filtering_norm) out.filtering_norm(b, h) = static_cast<A>(factor.times(filtering));
    if (out.routing_energy) out.routing_energy(b, h) = static_cast<A>(share * share);
}

/// Ranks of a part (eq. 3 to 5) from its largest singular value and, of all relative to that, the entropy of p and the sums
/// of squares and of fourth powers.
template <class T>
INTERSTATE_HD void write_ranks(const PartOutputs<T>& out, Index b, Index h, double largest, double entropy, double squares,
                               double fourths) {
    using A = acc_t<T>;
    const bool zero = largest == 0.0;
    if (out.effective_rank) out.effective_rank(b, h) = static_cast<A>(zero ? 0.0 : std::exp(entropy));
    if (out.participation_ratio) out.participation_ratio(b, h) = static_cast<A>(zero ? 0.0 : squares * squares / fourths);
    if (out.stable_rank) out.stable_rank(b, h) = static_cast<A>(zero ? 0.0 : squares);
}

/// Singular values, descending and without their factor, and what follows from them. Of NaN all is NaN.
template <class T>
void write_spectrum(const PartOutputs<T>& out, Index b, Index h, const double* s, Index n, Factor factor) {
    using A = acc_t<T>;
    const double largest = n > 0 ? s[0] : 0.0;
    double sum = 0.0, squares = 0.0, fourths = 0.0, entropy = 0.0;
    for (Index i = 0; i < n; ++i) {
        const double ratio = largest == 0.0 ? 0.0 : s[i] / largest, square = ratio * ratio;
        sum += ratio, squares += square, fourths += square * square;
        if (out.singular_values) out.singular_values(b, h, i) = static_cast<A>(factor.times(s[i]));
    }
    for (Index i = 0; i < n && largest != 0.0; ++i) {
        const double p = s[i] / largest / sum;
        if (p != 0.0) entropy -= p * std::log(p);
    }
    write_ranks(out, b, h, largest, entropy, squares, fourths);
}

/// A head that holds NaN or Inf; `s` has room for n values.
template <class T>
void write_nan(const Outputs<T>& out, Index b, Index h, double* s, Index n) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN();
    for (Index i = 0; i < n; ++i) s[i] = nan;
    write_norms(out, b, h, nan, nan, {1.0, 0});
    write_spectrum(routing_of(out), b, h, s, n, {1.0, 0});
    write_spectrum(filtering_of(out), b, h, s, n, {1.0, 0});
}

}  // namespace sd_decomposition::detail
}  // namespace interstate::inline INTERSTATE_ABI
