// The feature map by plain loops in float64, written like docs/ops/feature_map.md, whose equations are cited. Both
// norms are taken one after the other, as they are defined.
#pragma once

#include <cmath>

#include <feature_map/params.hpp>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map {

namespace detail {

/// What the stages of one row and head leave behind.
struct ReferenceRow {
    double *u, *s, *n, *hat;  // (R) after RoPE; after the activation; after l2; after RMSNorm without scale and bias
    double l2, rms;           // what the norms multiply by
};
struct ReferenceScratch {
    ReferenceRow row;
    double* grad;    // (R)
    double* dc;      // (L, R), of one sequence and head
    double* params;  // (R, taps + 1) of a head: weight, bias
    double* norms;   // (R, 2): scale, over all heads; bias, of a head

    ReferenceScratch(Arena& arena, const Shape& s, pass which) {
        const Index R = s.features;
        for (double** x : {&row.u, &row.s, &row.n, &row.hat, &grad}) *x = arena.take<double>(R);
        const bool backward = which == pass::backward;
        dc = arena.take<double>(backward ? s.length * R : 0);
        params = arena.take<double>(backward ? R * (s.taps + 1) : 0);
        norms = arena.take<double>(backward ? 2 * R : 0);
    }
};

/// One sequence of a call: row t of it is x(b, begin + t).
struct ReferenceSequence {
    Index index, b, begin, length;
};
template <class T, class P>
ReferenceSequence reference_sequence(const Inputs<T, P>& in, const Shape& s, Index index) {
    const RowRange rows = rows_of(in.cu_seqlens, index, s.length);
    return {index, s.packed() ? 0 : index, rows.begin, rows.end - rows.begin};
}

/// Row i of conv0 followed by the sequence: row 0 is the oldest of conv0.
template <class T, class P>
double reference_input(const Inputs<T, P>& in, const Shape& s, const ReferenceSequence& q, Index i, Index h, Index r) {
    if (i >= s.past()) return static_cast<double>(in.x(q.b, q.begin + i - s.past(), h, r));
    return in.conv0 ? static_cast<double>(in.conv0(q.index, i, h, r)) : 0.0;
}

/// The two channels that turn together, and cosine and sine of their angle (eq. 2).
struct ReferencePair {
    Index first, second;
    double cosine, sine;
};
inline ReferencePair reference_pair(const Options& options, Index R, Index i, double position) {
    const double angle =
        position * std::pow(options.base, -2.0 * static_cast<double>(i) / static_cast<double>(R));
    const bool split = options.rope == Rope::half_split;
    return {split ? i : 2 * i, split ? i + R / 2 : 2 * i + 1, std::cos(angle), std::sin(angle)};
}

/// Every stage of token t of a sequence, of one head, up to `hat`.
template <class T, class P>
void reference_row(const Options& options, const Inputs<T, P>& in, const Shape& s, const ReferenceSequence& q, Index t,
                   Index h, ReferenceRow& row) {
    const Index R = s.features;
    for (Index r = 0; r < R; ++r) {
        if (s.taps == 0) {
            row.u[r] = static_cast<double>(in.x(q.b, q.begin + t, h, r));
            continue;
        }
        row.u[r] = in.params.conv_bias ? static_cast<double>(in.params.conv_bias(h, r)) : 0.0;
        for (Index k = 0; k < s.taps; ++k)
            row.u[r] += static_cast<double>(in.params.conv_weight(h, r, k)) * reference_input(in, s, q, t + k, h, r);  // eq. 1
    }
    const double position = static_cast<double>(t) + (in.offset ? static_cast<double>(in.offset(q.index)) : 0.0);
    for (Index i = 0; options.rope != Rope::none && i < R / 2; ++i) {
        const ReferencePair p = reference_pair(options, R, i, position);
        const double a = row.u[p.first], b = row.u[p.second];
        row.u[p.first] = a * p.cosine - b * p.sine;  // eq. 2
        row.u[p.second] = a * p.sine + b * p.cosine;
    }
    double sum = 0.0;
    for (Index r = 0; r < R; ++r) {
        row.s[r] = options.activation == Activation::silu ? row.u[r] / (1.0 + std::exp(-row.u[r])) : row.u[r];  // eq. 3
        sum += row.s[r] * row.s[r];
    }
    row.l2 = options.l2 ? 1.0 / std::sqrt(sum + options.eps) : 1.0;
    sum = 0.0;
    for (Index r = 0; r < R; ++r) {
        row.n[r] = row.s[r] * row.l2;  // eq. 4
        sum += row.n[r] * row.n[r];
    }
    row.rms = options.rms ? 1.0 / std::sqrt(sum / static_cast<double>(R) + options.eps) : 1.0;
    for (Index r = 0; r < R; ++r) row.hat[r] = row.n[r] * row.rms;  // eq. 5
}

}  // namespace detail

/// Nothing is kept for backward.
inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }

inline std::size_t workspace_size(reference, const Options&, const Shape& shape, pass which) {
    Arena arena;
    detail::ReferenceScratch(arena, shape, which);
    return arena.required();
}

inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"feature_map.reference", "plain float64 loops, for any shape and strides"};
}

template <class T, class P>
Status forward(reference exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    detail::ReferenceScratch w(arena, s, pass::forward);

    zero_outside_sequences(out.y, in.cu_seqlens);
    for (Index index = 0; index < s.states(); ++index) {
        const detail::ReferenceSequence q = detail::reference_sequence(in, s, index);
        for (Index h = 0; h < s.heads; ++h) {
            for (Index t = 0; t < q.length; ++t) {
                detail::reference_row(options, in, s, q, t, h, w.row);
                for (Index r = 0; r < s.features; ++r) {
                    double y = w.row.hat[r];
                    if (in.params.scale) y *= static_cast<double>(in.params.scale(r));  // eq. 6
                    if (in.params.bias) y += static_cast<double>(in.params.bias(h, r));
                    out.y(q.b, q.begin + t, h, r) = static_cast<T>(y);
                }
            }
            // From the oldest on: a step writes where conv0 is.
            for (Index j = 0; out.convT && j < s.past(); ++j)
                for (Index r = 0; r < s.features; ++r)
                    out.convT(index, j, h, r) = static_cast<T>(detail::reference_input(in, s, q, q.length + j, h, r));
        }
    }
    return {};
}

template <class T, class P>
Status backward(reference exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    detail::ReferenceScratch w(arena, s, pass::backward);
    const Index R = s.features, taps = s.taps;
    auto* const g = w.grad;

    zero_outside_sequences(grads.x, in.cu_seqlens);
    for (Index r = 0; r < R; ++r) w.norms[2 * r] = 0.0;
    for (Index h = 0; h < s.heads; ++h) {
        for (Index i = 0; i < R * (taps + 1); ++i) w.params[i] = 0.0;
        for (Index r = 0; r < R; ++r) w.norms[2 * r + 1] = 0.0;
        for (Index index = 0; index < s.states(); ++index) {
            const detail::ReferenceSequence q = detail::reference_sequence(in, s, index);
            for (Index t = 0; t < q.length; ++t) {
                detail::reference_row(options, in, s, q, t, h, w.row);
                double dot = 0.0;
                for (Index r = 0; r < R; ++r) {
                    g[r] = static_cast<double>(upstream.y(q.b, q.begin + t, h, r));
                    w.norms[2 * r] += g[r] * w.row.hat[r];  // eq. 9
                    w.norms[2 * r + 1] += g[r];
                    if (in.params.scale) g[r] *= static_cast<double>(in.params.scale(r));
                    dot += g[r] * w.row.hat[r];
                }
                for (Index r = 0; options.rms && r < R; ++r)
                    g[r] = w.row.rms * (g[r] - w.row.hat[r] * dot / static_cast<double>(R));  // eq. 10
                dot = 0.0;
                for (Index r = 0; r < R; ++r) dot += g[r] * w.row.n[r];
                for (Index r = 0; options.l2 && r < R; ++r) g[r] = w.row.l2 * (g[r] - w.row.n[r] * dot);  // eq. 11
                for (Index r = 0; options.activation == Activation::silu && r < R; ++r) {
                    const double sigmoid = 1.0 / (1.0 + std::exp(-w.row.u[r]));
                    g[r] *= sigmoid * (1.0 + w.row.u[r] * (1.0 - sigmoid));  // eq. 12
                }
                const double position = static_cast<double>(t) + (in.offset ? static_cast<double>(in.offset(index)) : 0.0);
                for (Index i = 0; options.rope != Rope::none && i < R / 2; ++i) {
                    const detail::ReferencePair p = detail::reference_pair(options, R, i, position);
                    const double a = g[p.first], b = g[p.second];
                    g[p.first] = a * p.cosine + b * p.sine;  // eq. 13
                    g[p.second] = b * p.cosine - a * p.sine;
                }
                for (Index r = 0; r < R; ++r) {
                    w.dc[t * R + r] = g[r];
                    w.params[r * (taps + 1) + taps] += g[r];  // eq. 14
                    for (Index k = 0; k < taps; ++k)
                        w.params[r * (taps + 1) + k] += g[r] * detail::reference_input(in, s, q, t + k, h, r);
                }
            }
            for (Index i = 0; i < s.past() + q.length; ++i)  // rows of conv0, then of x
                for (Index r = 0; r < R; ++r) {
                    double de = taps == 0 ? w.dc[i * R + r] : 0.0;
                    for (Index k = 0; k < taps; ++k)  // eq. 15
                        if (i - k >= 0 && i - k < q.length)
                            de += static_cast<double>(in.params.conv_weight(h, r, k)) * w.dc[(i - k) * R + r];
                    if (upstream.convT && i >= q.length)
                        de += static_cast<double>(upstream.convT(index, i - q.length, h, r));
                    if (i >= s.past()) {
                        if (grads.x) grads.x(q.b, q.begin + i - s.past(), h, r) = static_cast<T>(de);
                    } else if (grads.conv0) {
                        grads.conv0(index, i, h, r) = static_cast<T>(de);
                    }
                }
        }
        for (Index r = 0; r < R; ++r) {
            for (Index k = 0; grads.params.conv_weight && k < taps; ++k)
                grads.params.conv_weight(h, r, k) = static_cast<P>(w.params[r * (taps + 1) + k]);
            if (grads.params.conv_bias) grads.params.conv_bias(h, r) = static_cast<P>(w.params[r * (taps + 1) + taps]);
            if (grads.params.bias) grads.params.bias(h, r) = static_cast<P>(w.norms[2 * r + 1]);
        }
    }
    for (Index r = 0; grads.params.scale && r < R; ++r) grads.params.scale(r) = static_cast<P>(w.norms[2 * r]);
    return {};
}

/// One token for every batch row, at its own position; the convolution's state is updated in place.
template <class T, class P>
Status step(reference exec, const Options& options, const Params<P>& params, const State<T>& state, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, token, out));
    return forward(exec, options, step_inputs(options, params, state, token), step_outputs(state, out), Saved{}, ws);
}

}  // namespace feature_map
}  // namespace interstate::inline INTERSTATE_ABI
