// The stability check of S-D attention: the largest real part of the spectrum of K = S - D (docs/ops/sd_attention.md, "Stability").
//
// On the host, in double: K to Hessenberg form by Householder reflections, then to triangular form by QR steps with Wilkinson's shift
// (Golub and Van Loan, "Matrix Computations", 7.4 and 7.5), in complex numbers because eigenvalues of K come in conjugate pairs.
#pragma once

#include <algorithm>
#include <limits>

#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/rows.hpp>
#include <sd_attention/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_attention {

namespace detail {

using Complex = complex<double>;

inline double magnitude(Complex z) { return std::hypot(z.re, z.im); }
inline Complex square_root(Complex z) {
    const double size = magnitude(z), large = std::sqrt((size + std::abs(z.re)) / 2.0);
    if (large == 0.0) return {0.0, 0.0};
    const double small = std::abs(z.im) / (2.0 * large), im = z.re >= 0.0 ? small : large;
    return {z.re >= 0.0 ? large : small, z.im >= 0.0 ? im : -im};
}

/// Memory of one head.
struct SpectrumScratch {
    double* K;        // (r, r)
    double* v;        // (r)
    Complex* h;       // (r, r)
    Complex *c, *s;   // (r), rotations of a step

    SpectrumScratch(Arena& arena, Index r)
        : K(arena.take<double>(r * r)), v(arena.take<double>(r)), h(arena.take<Complex>(r * r)), c(arena.take<Complex>(r)),
          s(arena.take<Complex>(r)) {}
};

/// a (r, r) to upper Hessenberg form by I - 2 v v^T on both sides, column by column.
inline void to_hessenberg(double* a, Index r, double* v) {
    for (Index k = 0; k + 2 < r; ++k) {
        double norm = 0.0;
        for (Index i = k + 1; i < r; ++i) norm = std::hypot(norm, v[i] = a[i * r + k]);
        if (norm == 0.0) continue;
        v[k + 1] += v[k + 1] >= 0.0 ? norm : -norm;
        double length = 0.0;
        for (Index i = k + 1; i < r; ++i) length = std::hypot(length, v[i]);
        for (Index i = k + 1; i < r; ++i) v[i] /= length;
        for (Index j = k; j < r; ++j) {
            double along = 0.0;
            for (Index i = k + 1; i < r; ++i) along += v[i] * a[i * r + j];
            for (Index i = k + 1; i < r; ++i) a[i * r + j] -= 2.0 * along * v[i];
        }
        for (Index i = 0; i < r; ++i) {
            double along = 0.0;
            for (Index j = k + 1; j < r; ++j) along += a[i * r + j] * v[j];
            for (Index j = k + 1; j < r; ++j) a[i * r + j] -= 2.0 * along * v[j];
        }
    }
}

/// The eigenvalue of the last two rows and columns of [.., last] that is nearer to the last element.
inline Complex wilkinson_shift(const Complex* h, Index r, Index last) {
    const Complex a = h[(last - 1) * r + last - 1], b = h[(last - 1) * r + last], c = h[last * r + last - 1], d = h[last * r + last];
    const Complex half = 0.5 * (a - d), root = square_root(half * half + b * c), mean = 0.5 * (a + d);
    const Complex plus = mean + root, minus = mean - root;
    return magnitude(plus - d) < magnitude(minus - d) ? plus : minus;
}

/// One QR step, H - shift = Q R, H' = R Q + shift, on rows and columns [first, last].
inline void qr_step(Complex* h, Index r, Index first, Index last, Complex shift, Complex* c, Complex* s) {
    for (Index k = first; k <= last; ++k) h[k * r + k] = h[k * r + k] - shift;
    for (Index k = first; k < last; ++k) {
        Complex *const top = h + k * r, *const low = top + r;
        const double norm = std::hypot(magnitude(top[k]), magnitude(low[k]));
        c[k] = norm > 0.0 ? (1.0 / norm) * top[k] : Complex{1.0, 0.0};
        s[k] = norm > 0.0 ? (1.0 / norm) * low[k] : Complex{0.0, 0.0};
        for (Index j = k; j <= last; ++j) {
            const Complex x = top[j], y = low[j];
            top[j] = conj(c[k]) * x + conj(s[k]) * y;
            low[j] = c[k] * y - s[k] * x;
        }
    }
    for (Index k = first; k < last; ++k)
        for (Index i = first; i <= std::min(k + 1, last); ++i) {
            const Complex x = h[i * r + k], y = h[i * r + k + 1];
            h[i * r + k] = x * c[k] + y * s[k];
            h[i * r + k + 1] = y * conj(c[k]) - x * conj(s[k]);
        }
    for (Index k = first; k <= last; ++k) h[k * r + k] += shift;
}

/// Of K (r, r), which is overwritten; -inf where r is 0, NaN where K is not finite.
inline double spectral_abscissa(const SpectrumScratch& w, Index r) {
    constexpr double nan = std::numeric_limits<double>::quiet_NaN(), eps = std::numeric_limits<double>::epsilon();
    constexpr int most_steps = 60;  // for one eigenvalue; two or three are usual
    double largest = 0.0, answer = -std::numeric_limits<double>::infinity();
    for (Index n = 0; n < r * r; ++n) {
        if (!std::isfinite(w.K[n])) return nan;
        largest = std::max(largest, std::abs(w.K[n]));
    }
    if (r > 0 && largest == 0.0) return 0.0;
    int exponent = 0;
    std::frexp(largest, &exponent);
    for (Index n = 0; n < r * r; ++n) w.K[n] = std::ldexp(w.K[n], -exponent);
    to_hessenberg(w.K, r, w.v);
    for (Index i = 0; i < r; ++i)
        for (Index j = 0; j < r; ++j) w.h[i * r + j] = {i <= j + 1 ? w.K[i * r + j] : 0.0, 0.0};
    const auto at = [&](Index i, Index j) { return magnitude(w.h[i * r + j]); };
    // Beside its neighbours on the diagonal, or, where those are nothing, beside K, whose largest element is near 1.
    const auto is_small = [&](Index i) { return at(i, i - 1) <= eps * std::max(at(i, i) + at(i - 1, i - 1), eps); };
    int steps = 0;
    for (Index last = r - 1; last >= 0;) {
        Index first = last;
        while (first > 0 && !is_small(first)) --first;
        if (first > 0) w.h[first * r + first - 1] = {0.0, 0.0};
        if (first == last) {
            answer = std::max(answer, std::ldexp(w.h[last * r + last].re, exponent));
            --last, steps = 0;
            continue;
        }
        if (++steps > most_steps) return nan;
        // A step that leaves a cycle now and then: an arbitrary shift of the right size.
        const double off = at(last, last - 1);
        const Complex shift = steps % 12 == 0 ? w.h[last * r + last] + Complex{off, off} : wilkinson_shift(w.h, r, last);
        qr_step(w.h, r, first, last, shift, w.c, w.s);
    }
    return answer;
}

}  // namespace detail

/// Sizes of a generator.
template <class W>
Shape shape_of(const Generator<W>& g) {
    return {.heads = g.delta.extent[0], .channels = g.delta.extent[1], .planes = g.a || g.b ? g.a.extent[1] : -1};
}
template <class W>
Status validate(Generator<W> g, const Shape& s) {
    INTERSTATE_RETURN_IF_ERROR(check_generator(g, s));
    CheckPresent present;
    visit_generator(g, s, Need::required, present);
    INTERSTATE_RETURN_IF_ERROR(present.status);
    INTERSTATE_RETURN_IF_ERROR(validate(s));
    CheckTensors tensors;
    visit_generator(g, s, Need::required, tensors);
    return tensors.status;
}
inline std::size_t largest_real_part_workspace_size(const cpu& exec, const Shape& shape) {
    return simd::layout_size<detail::SpectrumScratch>(shape.heads > 0 ? shape.channels : Index(0)) *
           static_cast<std::size_t>(thread_count(exec.threads));
}

/// The largest real part of the eigenvalues of K of every head, largest (H), for options.component: at most 0 but for rounding, which is
/// below 4 r eps ||K||. NaN where K is not finite. Every head costs about 30 r^3 complex multiply-adds.
///
/// The workspace has largest_real_part_workspace_size(exec, shape_of(generator)) bytes. Errors, before anything is written: as in forward.
template <class W>
Status largest_real_part(const cpu& requested, const Options& options, const Generator<W>& generator, const View<double, 1>& largest,
                         Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    const Shape s = shape_of(generator);
    INTERSTATE_RETURN_IF_ERROR(validate(generator, s));
    INTERSTATE_RETURN_IF_ERROR(check_view("largest", largest, {s.heads}, Need::required));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, largest_real_part_workspace_size(exec, s)));
    const std::size_t each = simd::layout_size<detail::SpectrumScratch>(s.channels);
    parallel_for(s.heads, exec.threads, [&](Index h, int worker) {
        Arena arena(static_cast<std::byte*>(ws.data) + static_cast<std::size_t>(worker) * each);
        const detail::SpectrumScratch w(arena, s.channels);
        detail::make_generator(options, s, generator, h, w.K);
        largest(h) = detail::spectral_abscissa(w, s.channels);
    });
    return {};
}

}  // namespace sd_attention
}  // namespace interstate::inline INTERSTATE_ABI
