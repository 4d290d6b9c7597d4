// The routing/filtering decomposition by plain loops in float64, written like docs/ops/sd_decomposition.md, whose
// equations are cited.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include <sd_decomposition/detail/spectrum.hpp>
#include <sd_decomposition/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition {

namespace detail {

/// Scratch of one call: one head's [Q K], which becomes T, a reflector, and a part of the reduced problem.
struct ReferenceScratch {
    double* X;          // (L, 2d)
    double* v;          // (L)
    double* G;          // (N, N)
    double* routing;    // (N)
    double* filtering;  // (N)

    ReferenceScratch(Arena& arena, const Shape& s) {
        const Index N = s.values();
        X = arena.take<double>(s.length * 2 * s.head_dim);
        v = arena.take<double>(s.length);
        G = arena.take<double>(N * N);
        routing = arena.take<double>(N);
        filtering = arena.take<double>(N);
    }
};

/// One head of Q or K into d columns of X, divided by the smallest power of two above all of it, whose exponent is
/// returned; false where an element is not finite.
template <class T>
bool reference_load(const View<const T, 4>& from, Index b, Index h, double* X, Index columns, int& exponent) {
    double largest = 0.0, probe = 0.0;
    for (Index t = 0; t < from.extent[1]; ++t)
        for (Index c = 0; c < from.extent[3]; ++c) {
            const double x = static_cast<double>(from(b, t, h, c));
            largest = std::max(largest, std::abs(x));
            probe += 0.0 * x;
        }
    std::frexp(largest, &exponent);
    for (Index t = 0; t < from.extent[1]; ++t)
        for (Index c = 0; c < from.extent[3]; ++c)
            X[t * columns + c] = std::ldexp(static_cast<double>(from(b, t, h, c)), -exponent);
    return probe == 0.0;
}

/// X (L, n) = Z T by Householder reflections: T takes the first min(L, n) rows of X (eq. 3).
inline void reference_triangle(double* X, Index L, Index n, double* v) {
    for (Index c = 0; c < std::min(L, n); ++c) {
        double squares = 0.0;
        for (Index r = c; r < L; ++r) squares += X[r * n + c] * X[r * n + c];
        if (squares == 0.0) continue;
        for (Index r = c; r < L; ++r) v[r] = X[r * n + c];
        v[c] += std::copysign(std::sqrt(squares), v[c]);
        double norm = 0.0;
        for (Index r = c; r < L; ++r) norm += v[r] * v[r];
        for (Index k = c; k < n; ++k) {
            double dot = 0.0;
            for (Index r = c; r < L; ++r) dot += v[r] * X[r * n + k];
            for (Index r = c; r < L; ++r) X[r * n + k] -= 2.0 * dot / norm * v[r];
        }
        for (Index r = c + 1; r < L; ++r) X[r * n + c] = 0.0;
    }
}

/// Singular values of G (n, n), by turning its rows in pairs until all are orthogonal (one-sided Jacobi).
inline void reference_singular_values(double* G, Index n, double* sigma) {
    bool turned = true;
    for (int sweep = 0; turned && sweep < 60; ++sweep) {
        turned = false;
        for (Index p = 0; p < n; ++p)
            for (Index q = p + 1; q < n; ++q) {
                double *const x = G + p * n, *const y = G + q * n;
                double xx = 0.0, yy = 0.0, xy = 0.0;
                for (Index i = 0; i < n; ++i) xx += x[i] * x[i], yy += y[i] * y[i], xy += x[i] * y[i];
                if (std::abs(xy) <= 1e-14 * std::sqrt(xx) * std::sqrt(yy)) continue;
                turned = true;
                const double slope = (yy - xx) / (2.0 * xy);
                const double tangent = std::copysign(1.0, slope) / (std::abs(slope) + std::hypot(1.0, slope));
                const double cosine = 1.0 / std::hypot(1.0, tangent), sine = cosine * tangent;
                for (Index i = 0; i < n; ++i) {
                    const double a = x[i], b = y[i];
                    x[i] = cosine * a - sine * b;
                    y[i] = sine * a + cosine * b;
                }
            }
    }
    for (Index p = 0; p < n; ++p) {
        double squares = 0.0;
        for (Index i = 0; i < n; ++i) squares += G[p * n + i] * G[p * n + i];
        sigma[p] = std::sqrt(squares);
    }
}

}  // namespace detail

inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }
inline std::size_t workspace_size(reference, const Options&, const Shape& shape, pass) {
    Arena arena;
    detail::ReferenceScratch(arena, shape);
    return arena.required();
}
inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"sd_decomposition.reference", "plain float64 loops, for any shape and strides"};
}

template <class T>
Status forward(reference exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch scratch(arena, s);
    const Index L = s.length, d = s.head_dim, N = s.values();
    double *const T_Q = scratch.X, *const T_K = scratch.X + d;

    for (Index b = 0; b < s.batch; ++b)
        for (Index h = 0; h < s.query_heads; ++h) {
            int of_q = 0, of_k = 0;
            const bool q_finite = detail::reference_load(in.Q, b, h, T_Q, 2 * d, of_q);
            const bool k_finite = detail::reference_load(in.K, b, h / s.group(), T_K, 2 * d, of_k);
            if (!q_finite || !k_finite) {
                detail::write_undefined(out, b, h, s);
                continue;
            }
            detail::reference_triangle(scratch.X, L, 2 * d, scratch.v);
            for (const double sign : {-1.0, 1.0}) {
                double* const sigma = sign < 0.0 ? scratch.routing : scratch.filtering;
                for (Index i = 0; i < N; ++i)
                    for (Index j = 0; j < N; ++j) {
                        double sum = 0.0;
                        for (Index c = 0; c < d; ++c)
                            sum += T_Q[i * 2 * d + c] * T_K[j * 2 * d + c] + sign * T_K[i * 2 * d + c] * T_Q[j * 2 * d + c];
                        scratch.G[i * N + j] = 0.5 * sum;  // eq. 4
                    }
                detail::reference_singular_values(scratch.G, N, sigma);
            }
            double cancelled = 0.0;
            for (Index c = 0; c < d; ++c) {
                double q = 0.0, k = 0.0;
                for (Index i = 0; i < N; ++i) {
                    q += T_Q[i * 2 * d + c] * T_Q[i * 2 * d + c];
                    k += T_K[i * 2 * d + c] * T_K[i * 2 * d + c];
                }
                cancelled += std::sqrt(q) * std::sqrt(k);
            }
            const double level = detail::rounding_level<double>(cancelled);  // eq. 5
            detail::finish(scratch.routing, N, level);
            detail::finish(scratch.filtering, N, level);
            detail::write_head(out, b, h, scratch.routing, scratch.filtering, N,
                               detail::Scale(scale_of(options, d), of_q + of_k));
        }
    return {};
}

}  // namespace sd_decomposition
}  // namespace interstate::inline INTERSTATE_ABI
