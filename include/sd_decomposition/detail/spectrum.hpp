// From two spectra to what is said about a head: the same for every executor on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include <sd_decomposition/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition::detail {

/// Q and K are divided by powers of two, so that squares of what is large neither overflow nor vanish. This is the way
/// back, which overflows only where the result does.
struct Scale {
    double factor = 0.0;
    int exponent = 0;

    /// `divided` is the sum of the exponents of both powers.
    Scale(double scale, int divided) {
        factor = std::abs(std::frexp(scale, &exponent));
        exponent += divided;
    }
    double operator()(double x) const { return std::ldexp(x * factor, exponent); }
};

/// Below this a singular value is rounding (eq. 5). cancelled is sum_c |q_c| |k_c|, the norm that A would have at most
/// if none of its terms cancelled.
template <class A>
double rounding_level(double cancelled) {
    return 8.0 * static_cast<double>(std::numeric_limits<A>::epsilon()) * cancelled;
}

/// Descending, and zero where there is nothing but rounding.
inline void finish(double* sigma, Index n, double level) {
    for (Index i = 0; i < n; ++i) sigma[i] = sigma[i] > level ? sigma[i] : 0.0;
    std::sort(sigma, sigma + n, std::greater<>{});
}

/// Of singular values sigma[0, n), descending (eq. 6 to 9). All zero gives zeros.
struct Summary {
    double norm = 0.0;
    double effective_rank = 0.0;
    double participation_ratio = 0.0;
    double stable_rank = 0.0;

    Summary(const double* sigma, Index n) {
        if (n == 0 || sigma[0] == 0.0) return;
        double sum = 0.0, squares = 0.0, fourths = 0.0, entropy = 0.0;
        for (Index i = 0; i < n; ++i) {
            const double r = sigma[i] / sigma[0];
            sum += r;
            squares += r * r;
            fourths += r * r * r * r;
        }
        for (Index i = 0; i < n; ++i) {
            const double p = sigma[i] / sigma[0] / sum;
            if (p > 0.0) entropy -= p * std::log(p);  // 0 log 0 = 0
        }
        norm = sigma[0] * std::sqrt(squares);
        effective_rank = std::exp(entropy);
        participation_ratio = squares * squares / fourths;
        stable_rank = squares;
    }
};

template <class A>
void put(const View<A, 2>& to, Index b, Index h, double x) {
    if (to) to(b, h) = static_cast<A>(x);
}
template <class A>
void put(const View<A, 3>& to, Index b, Index h, const double* sigma, const Scale& scale) {
    for (Index i = 0; to && i < to.extent[2]; ++i) to(b, h, i) = static_cast<A>(scale(sigma[i]));
}

/// Writes head h of row b from its finished spectra.
template <class T>
void write_head(const Outputs<T>& out, Index b, Index h, const double* routing, const double* filtering, Index n,
                const Scale& scale) {
    const Summary S(routing, n), F(filtering, n);
    const double norm = std::hypot(S.norm, F.norm), share = norm > 0.0 ? S.norm / norm : 0.0;
    put(out.norm, b, h, scale(norm));
    put(out.routing_energy, b, h, share * share);
    put(out.routing_norm, b, h, scale(S.norm));
    put(out.filtering_norm, b, h, scale(F.norm));
    put(out.routing_singular_values, b, h, routing, scale);
    put(out.filtering_singular_values, b, h, filtering, scale);
    put(out.routing_effective_rank, b, h, S.effective_rank);
    put(out.filtering_effective_rank, b, h, F.effective_rank);
    put(out.routing_participation_ratio, b, h, S.participation_ratio);
    put(out.filtering_participation_ratio, b, h, F.participation_ratio);
    put(out.routing_stable_rank, b, h, S.stable_rank);
    put(out.filtering_stable_rank, b, h, F.stable_rank);
}

/// What a head with NaN or infinities among its inputs has for results: NaN.
struct Undefined {
    Index b, h;
    template <class A, int Rank>
    void operator()(const char*, View<A, Rank>& v, const Index (&)[Rank], Need) const {
        constexpr A nan = std::numeric_limits<A>::quiet_NaN();
        if (!v) return;
        if constexpr (Rank == 2)
            v(b, h) = nan;
        else
            for (Index i = 0; i < v.extent[2]; ++i) v(b, h, i) = nan;
    }
};
template <class T>
void write_undefined(Outputs<T> out, Index b, Index h, const Shape& s) {
    visit(out, s, Undefined{b, h});
}

}  // namespace sd_decomposition::detail
}  // namespace interstate::inline INTERSTATE_ABI
