// Singular values of tridiagonal matrices, symmetric or skew-symmetric, in float64.
//
// Symmetric: the root-free QL iteration of Pal, Walker and Kahan (Parlett, "The Symmetric Eigenvalue Problem", 8.15), with
// Wilkinson's shift.
//
// Skew-symmetric: its even rows taken before the odd ones, the matrix is [0 B; -B^T 0] with B bidiagonal of half the size, whose
// singular values it has twice. Those are found by dqds (Fernando and Parlett, "Accurate singular values and differential qd
// algorithms", 1994), which never squares them; the bound of `qd_shift` is that of Parlett and Marques, "An implementation of
// the dqds algorithm (positive case)", 2000.
//
// Both are one long chain of divisions; there is nothing here for vectors to do.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include <interstate/cpu/isa.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition::detail {

struct SpectrumScratch {
    double *q, *e;            // (n) each
    double *next_q, *next_e;  // (n) each: what a dqds sweep makes of them
    double* taken;            // (n): what was taken off a block that ends here, when it was left

    SpectrumScratch(Arena& arena, Index n) {
        q = arena.take<double>(n);
        e = arena.take<double>(n);
        next_q = arena.take<double>(n);
        next_e = arena.take<double>(n);
        taken = arena.take<double>(n);
    }
};

struct QdSweep {
    double smallest;       // d: no eigenvalue is larger than the smallest of them
    double smallest_else;  // of all d but the last
    double last;           // d
    double smallest_e;
};

/// One dqds transformation of rows [lo, hi]: q and e of L R become those of R L - shift.
INTERSTATE_INLINE QdSweep qd_sweep(const SpectrumScratch& x, Index lo, Index hi, double shift) {
    double d = x.q[lo] - shift, smallest = d, smallest_else = d, smallest_e = std::numeric_limits<double>::infinity();
    for (Index i = lo; i < hi; ++i) {
        const double sum = d + x.e[i], ratio = x.q[i + 1] / sum, link = x.e[i] * ratio;
        x.next_q[i] = sum;
        x.next_e[i] = link;
        d = d * ratio - shift;
        smallest_else = smallest;
        smallest = d < smallest ? d : smallest;
        smallest_e = link < smallest_e ? link : smallest_e;
    }
    x.next_q[hi] = d;
    return {smallest, smallest_else, d, smallest_e};
}

/// A shift that is below the smallest eigenvalue of rows [lo, hi], or nearly always.
INTERSTATE_INLINE double qd_shift(const SpectrumScratch& x, Index lo, Index hi, const QdSweep& before) {
    if (x.q[hi] <= before.smallest) {
        // z with 1 at hi and, going up, products of sqrt(e/q) solves R^T z = (0, ..., 0, 1) but for scale: its Rayleigh
        // quotient is q[hi] / |z|^2, and an eigenvalue lies within `radius` of that, or radius^2 / gap where the others are far.
        double norm = 0.0, product = 1.0;
        for (Index i = hi - 1; i >= lo && norm < 0.6; --i) {
            product *= x.e[i] / x.q[i];
            norm += product;
            if (product < 0.01 * norm) break;
        }
        norm *= 1.05;  // for what the loop left out
        if (norm < 0.6) {
            const double quotient = x.q[hi] / (1.0 + norm), radius = quotient * std::sqrt(norm);
            const double gap = before.smallest_else - quotient - radius;
            return quotient - (gap > radius ? radius * (radius / gap) : radius);
        }
    }
    return 0.3 * before.smallest;
}

/// Eigenvalues, in no order, of the qd array of n rows in x.q and x.e; a link of at most `nothing` is none.
INTERSTATE_INLINE void qd_eigenvalues(SpectrumScratch x, Index n, double nothing, double* values) {
    for (Index i = 0; i < n; ++i) x.taken[i] = -1.0;
    Index lo = 0, hi = n - 1, found = 0;
    double taken = 0.0;  // off rows [lo, hi]: the sum of their shifts
    QdSweep sweep{};
    bool known = false;  // whether `sweep` is theirs
    while (hi >= 0) {
        if (!known || sweep.smallest_e <= nothing) {
            Index i = hi - 1;
            while (i >= lo && !(x.e[i] <= nothing)) --i;
            if (i >= lo) {  // rows up to i wait, in both arrays
                if (x.taken[i] < 0.0) x.taken[i] = taken;
                std::copy(x.q + lo, x.q + i + 1, x.next_q + lo);
                std::copy(x.e + lo, x.e + i + 1, x.next_e + lo);
                lo = i + 1;
                known = false;
            }
        }
        if (hi - lo <= 1) {
            if (hi == lo) {
                values[found++] = x.q[hi] + taken;
            } else {
                const double a = x.q[lo], b = x.q[hi], c = x.e[lo], half = 0.5 * (a - b + c);
                const double large = 0.5 * (a + b + c) + std::sqrt(half * half + b * c);  // above nothing, as c is
                values[found++] = large + taken;
                values[found++] = a / large * b + taken;
            }
            hi = lo - 1;
            lo = 0;
            taken = hi >= 0 ? x.taken[hi] : 0.0;
            known = false;
            continue;
        }
        if (!known && 1.5 * x.q[lo] < x.q[hi]) {  // the small end has to be the last
            std::reverse(x.q + lo, x.q + hi + 1);
            std::reverse(x.e + lo, x.e + hi);
        }
        double shift = known ? std::max(0.0, qd_shift(x, lo, hi, sweep)) : 0.0;
        sweep = qd_sweep(x, lo, hi, shift);
        for (int attempt = 0; !(sweep.smallest >= 0.0 && sweep.last >= 0.0); ++attempt) {
            // The shift was too large. With a shift of zero nothing can become negative; where the last d alone did,
            // it says how much too large.
            if (attempt == 0 && sweep.smallest_else > 0.0)
                shift = std::max(0.0, (shift + sweep.last) * (1.0 - 4.0 * std::numeric_limits<double>::epsilon()));
            else
                shift = attempt < 2 ? 0.25 * shift : 0.0;
            sweep = qd_sweep(x, lo, hi, shift);
        }
        taken += shift;
        std::swap(x.q, x.next_q);
        std::swap(x.e, x.next_e);
        known = true;
        if (x.e[hi - 1] <= nothing) {
            values[found++] = x.q[hi] + taken;
            --hi;
            sweep.smallest = sweep.smallest_else;
        }
    }
}

/// s (n), descending: of the skew-symmetric matrix with off[i] beside the diagonal in row i + 1.
struct SkewSpectrum {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* off, Index n, SpectrumScratch x, double* s) {
        const Index half = n / 2, rows = half + n % 2;  // an odd one has a row of B that is zero, and a zero among its values
        double largest = 0.0;
        for (Index i = 0; i < rows; ++i) {
            const double a = 2 * i + 1 < n ? off[2 * i] : 0.0, b = 2 * i + 2 < n ? off[2 * i + 1] : 0.0;
            x.q[i] = a * a;
            x.e[i] = b * b;
            largest = std::max(largest, x.q[i] + x.e[i]);
        }
        constexpr double eps = 0.125 * std::numeric_limits<double>::epsilon();
        qd_eigenvalues(x, rows, eps * eps * largest, s);
        std::sort(s, s + rows, std::greater<>());
        for (Index i = rows - 1; i >= 0; --i) {  // from the end: each value goes to two places at or behind its own
            const double value = std::sqrt(s[i]);
            s[2 * i] = value;
            if (2 * i + 1 < n) s[2 * i + 1] = value;
        }
    }
};

/// s (n), descending: of the symmetric matrix with this diagonal and off[i] beside it in row i + 1.
struct SymmetricSpectrum {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* diagonal, const double* off, Index n, SpectrumScratch x, double* s) {
        double largest = 0.0;
        for (Index i = 0; i < n; ++i) {
            s[i] = diagonal[i];
            x.e[i] = i + 1 < n ? off[i] * off[i] : 0.0;
            largest = std::max(largest, std::abs(diagonal[i]) + (i > 0 ? std::abs(off[i - 1]) : 0.0));
        }
        const double eps = 0.25 * std::numeric_limits<double>::epsilon() * largest, nothing = eps * eps;
        for (Index last = n - 1; last >= 0;) {
            Index lo = last;
            while (lo > 0 && x.e[lo - 1] > nothing) --lo;
            if (std::abs(s[last]) < std::abs(s[lo])) {  // the small end has to be the first
                std::reverse(s + lo, s + last + 1);
                std::reverse(x.e + lo, x.e + last);
            }
            for (Index i = lo; i < last;) {
                if (x.e[i] <= nothing) {
                    ++i;
                    continue;
                }
                Index end = i + 1;
                while (end < last && x.e[end] > nothing) ++end;
                ql_sweep(s, x.e, i, end);
            }
            last = lo - 1;
        }
        for (Index i = 0; i < n; ++i) s[i] = std::abs(s[i]);
        std::sort(s, s + n, std::greater<>());
    }

  private:
    /// One iteration on rows [first, last] of the diagonal d and the squares e beside it.
    static INTERSTATE_INLINE void ql_sweep(double* d, double* e, Index first, Index last) {
        const double root = std::sqrt(e[first]), slope = (d[first + 1] - d[first]) / (2.0 * root);
        const double shift = d[first] - root / (slope + std::copysign(std::sqrt(slope * slope + 1.0), slope));
        double cosine = 1.0, sine = 0.0, gamma = d[last] - shift, p = gamma * gamma;  // squares of cosine and sine
        for (Index i = last - 1; i >= first; --i) {
            const double link = e[i], r = p + link, before = cosine, old = gamma, alpha = d[i];
            if (i + 1 < last) e[i + 1] = sine * r;
            cosine = p / r;
            sine = link / r;
            gamma = cosine * (alpha - shift) - sine * old;
            d[i + 1] = old + (alpha - gamma);
            p = p > 1e-200 ? gamma * gamma * (r / p) : before * link;  // the limit for p = 0, before r / p overflows
        }
        e[first] = sine * p;
        d[first] = shift + gamma;
    }
};

}  // namespace sd_decomposition::detail
}  // namespace interstate::inline INTERSTATE_ABI
