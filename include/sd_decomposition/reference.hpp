// Routing and filtering of attention heads in float64, by plain loops, written like docs/ops/sd_decomposition.md, whose
// equations are cited.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include <sd_decomposition/detail/outputs.hpp>
#include <sd_decomposition/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition {

namespace detail {

/// Scratch of one head.
struct ReferenceScratch {
    double* columns;  // (2d): largest magnitudes, then roots of scales
    double* x;        // (L, 2d): [Q' K'], then T in its first n rows
    double* part;     // (n, n)
    double* values;   // (n)

    ReferenceScratch(Arena& arena, const Shape& s) {
        columns = arena.take<double>(2 * s.head_dim);
        x = arena.take<double>(area(s.length, 2 * s.head_dim));
        part = arena.take<double>(area(s.values(), s.values()));
        values = arena.take<double>(s.values());
    }
};

/// Householder reflections of x (rows, columns), rows > columns: T in the upper triangle of its first rows, zeros below.
inline void reference_triangle(double* x, Index rows, Index columns) {
    for (Index j = 0; j < columns; ++j) {
        double below = 0.0;
        for (Index r = j + 1; r < rows; ++r) below += x[r * columns + j] * x[r * columns + j];
        const double head = x[j * columns + j], norm = std::sqrt(head * head + below);
        if (below == 0.0 || norm < 1e-140) continue;  // beside elements near 1, as good as none
        const double top = head > 0.0 ? head + norm : head - norm;  // v = (top, the column below)
        const double half = norm * (norm + std::abs(head));         // v.v / 2
        for (Index c = j + 1; c < columns; ++c) {
            double dot = top * x[j * columns + c];
            for (Index r = j + 1; r < rows; ++r) dot += x[r * columns + j] * x[r * columns + c];
            x[j * columns + c] -= dot / half * top;
            for (Index r = j + 1; r < rows; ++r) x[r * columns + c] -= dot / half * x[r * columns + j];
        }
        x[j * columns + j] = head - top;
        for (Index r = j + 1; r < rows; ++r) x[r * columns + j] = 0.0;
    }
}

/// Singular values of m (n, n), descending: plane rotations until all pairs of rows are orthogonal (one-sided Jacobi).
inline void reference_singular_values(double* m, Index n, double* values) {
    const double orthogonal = 4.0 * std::numeric_limits<double>::epsilon() * std::sqrt(static_cast<double>(n));
    bool rotated = true;
    for (int sweep = 0; rotated && sweep < 40; ++sweep) {
        rotated = false;
        for (Index i = 0; i < n; ++i)
            for (Index j = i + 1; j < n; ++j) {
                double *a = m + i * n, *b = m + j * n, aa = 0.0, bb = 0.0, ab = 0.0;
                for (Index c = 0; c < n; ++c) aa += a[c] * a[c], bb += b[c] * b[c], ab += a[c] * b[c];
                if (std::abs(ab) <= orthogonal * std::sqrt(aa) * std::sqrt(bb)) continue;
                rotated = true;
                const double zeta = (bb - aa) / (2.0 * ab);
                const double tangent = (zeta < 0.0 ? -1.0 : 1.0) / (std::abs(zeta) + std::hypot(1.0, zeta));
                const double cosine = 1.0 / std::sqrt(1.0 + tangent * tangent), sine = cosine * tangent;
                for (Index c = 0; c < n; ++c) {
                    const double old = a[c];
                    a[c] = cosine * old - sine * b[c];
                    b[c] = sine * old + cosine * b[c];
                }
            }
    }
    for (Index i = 0; i < n; ++i) {
        double square = 0.0;
        for (Index c = 0; c < n; ++c) square += m[i * n + c] * m[i * n + c];
        values[i] = std::sqrt(square);
    }
    std::sort(values, values + n, std::greater<>());
}

/// The part between Z and Z^T in eq. 6: S for sign = -1, F for +1. Returns its norm.
inline double reference_part(const double* t, Index n, Index d, double sign, double* part) {
    double squares = 0.0;
    for (Index i = 0; i < n; ++i)
        for (Index j = 0; j < n; ++j) {
            const double *a = t + i * 2 * d, *b = t + j * 2 * d;
            double along = 0.0, back = 0.0;
            for (Index c = 0; c < d; ++c) along += a[c] * b[d + c], back += b[c] * a[d + c];
            part[i * n + j] = 0.5 * (along + sign * back);
            squares += part[i * n + j] * part[i * n + j];
        }
    return std::sqrt(squares);
}

template <class T>
void reference_head(const Options& options, const Inputs<T>& in, const Outputs<T>& out, const Shape& s, Index b, Index h,
                    const ReferenceScratch& scratch) {
    const Index L = s.length, d = s.head_dim, n = s.values(), g = h / s.group();
    const auto element = [&](Index t, Index c) {
        return static_cast<double>(c < d ? in.Q(b, t, h, c) : in.K(b, t, g, c - d));
    };
    bool finite = true;
    for (Index c = 0; c < 2 * d; ++c) {
        scratch.columns[c] = 0.0;
        for (Index t = 0; t < L; ++t) {
            const double x = std::abs(element(t, c));
            finite = finite && std::isfinite(x);
            scratch.columns[c] = std::max(scratch.columns[c], x);
        }
    }
    if (!finite) return write_nan(out, b, h, scratch.values, n);
    const Factor factor = factor_of(scale_of(options, d), balance(scratch.columns, d));
    double* x = scratch.x;
    for (Index t = 0; t < L; ++t)
        for (Index c = 0; c < 2 * d; ++c) x[t * 2 * d + c] = element(t, c) * scratch.columns[c] * scratch.columns[c];  // eq. 7
    double terms = 0.0;
    for (Index c = 0; c < d; ++c) {
        double q = 0.0, k = 0.0;
        for (Index t = 0; t < L; ++t) {
            q += x[t * 2 * d + c] * x[t * 2 * d + c];
            k += x[t * 2 * d + d + c] * x[t * 2 * d + d + c];
        }
        terms += q * k;
    }
    terms = std::sqrt(terms);
    if (L > 2 * d) reference_triangle(x, L, 2 * d);

    double norms[2];
    for (const int part : {0, 1}) {
        const double eps = std::numeric_limits<double>::epsilon();
        norms[part] = part_norm(reference_part(x, n, d, part == 0 ? -1.0 : 1.0, scratch.part), terms, n, eps);  // eq. 6
        if (norms[part] == 0.0)
            std::fill(scratch.values, scratch.values + n, 0.0);
        else
            reference_singular_values(scratch.part, n, scratch.values);
        write_spectrum(part == 0 ? routing_of(out) : filtering_of(out), b, h, scratch.values, n, factor);
    }
    write_norms(out, b, h, norms[0], norms[1], factor);
}

}  // namespace detail

inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }
inline std::size_t workspace_size(reference, const Options&, const Shape& s, pass) {
    Arena arena;
    detail::ReferenceScratch(arena, s);
    return arena.required();
}
inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"sd_decomposition.reference", "plain float64 loops, for any shape and strides"};
}

template <class T>
Status forward(reference exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch scratch(arena, s);
    for (Index b = 0; b < s.batch; ++b)
        for (Index h = 0; h < s.query_heads; ++h) detail::reference_head(options, in, out, s, b, h, scratch);
    return {};
}

}  // namespace sd_decomposition
}  // namespace interstate::inline INTERSTATE_ABI
