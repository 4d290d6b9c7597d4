// Attention by one component of its scores, by plain loops in float64, written like docs/ops/component_attention.md, whose equations are
// cited: both products of every pair, and none of the wider heads that kernels make of them.
#pragma once

#include <cmath>

#include <attention/reference.hpp>
#include <component_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace component_attention {

namespace detail {

/// Scratch of one call: rows of weights and of their gradients, a row of o, and sums over a sequence that T is too narrow for.
struct ReferenceScratch {
    double *p, *dp, *o;    // (L), (L), (dv)
    double *dq, *dk, *dv;  // (L, dh), of a query head; (L, dh) and (L, dv), of its group

    ReferenceScratch(Arena& arena, const Shape& s, pass which) {
        const bool back = which == pass::backward;
        p = arena.take<double>(s.keys);
        dp = arena.take<double>(back ? s.keys : 0);
        o = arena.take<double>(s.value_dim);
        dq = arena.take<double>(back ? s.keys * s.head_dim : 0);
        dk = arena.take<double>(back ? s.keys * s.head_dim : 0);
        dv = arena.take<double>(back ? s.keys * s.value_dim : 0);
    }
};

/// The weights of query i of a sequence that begins at row `first`; returns lse.
template <class T>
double reference_row(const Options& options, const Inputs<T>& in, const Shape& s, Index b, Index h, Index first, Index i, RowRange keys,
                     double* p) {
    const double scale = attention::scale_of(attention_of(options), s.head_dim);
    const Parts parts = parts_of(options.component);
    const Index kv = h / s.group();
    for (Index j = keys.begin; j < keys.end; ++j) {
        double own = 0.0, turned = 0.0;
        for (Index d = 0; d < s.head_dim; ++d) {
            own += static_cast<double>(in.q(b, first + i, h, d)) * static_cast<double>(in.k(b, first + j, kv, d));     // eq. 1
            turned += static_cast<double>(in.q(b, first + j, h, d)) * static_cast<double>(in.k(b, first + i, kv, d));  // and its transpose
        }
        p[j] = scale * (parts.own * own + (parts.turned == 0.0 ? 0.0 : parts.turned * turned));  // eq. 2
    }
    return attention::detail::reference_weights(attention_of(options), attention::detail::reference_bias(attention_of(options), in.bias, h),
                                                keys, p);
}

}  // namespace detail

/// Nothing is kept for backward beside o and lse.
inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }

inline std::size_t workspace_size(reference, const Options&, const Shape& shape, pass which) {
    Arena arena;
    detail::ReferenceScratch(arena, shape, which);
    return arena.required();
}

inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"component_attention.reference", "plain float64 loops, for any shape and strides"};
}

template <class T>
Status forward(reference exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.keys));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch scratch(arena, s, pass::forward);
    double *const p = scratch.p, *const o = scratch.o;
    // Rows that belong to no sequence are zero.
    attention::detail::fill_zero(out.o);
    if (out.lse)
        for (Index b = 0; b < s.batch; ++b)
            for (Index i = 0; i < s.queries; ++i)
                for (Index h = 0; h < s.query_heads; ++h) out.lse(b, i, h) = 0;
    attention::detail::reference_sequences(in, s, [&](Index b, Index h, RowRange rows, RowRange) {
        const Index L = rows.end - rows.begin;
        for (Index i = 0; i < L; ++i) {
            const RowRange read = attention::keys_read(attention_of(options), i, L);
            const double lse = detail::reference_row(options, in, s, b, h, rows.begin, i, read, p);
            for (Index d = 0; d < s.value_dim; ++d) o[d] = 0.0;
            for (Index j = read.begin; j < read.end; ++j)
                for (Index d = 0; d < s.value_dim; ++d)
                    o[d] += p[j] * static_cast<double>(in.v(b, rows.begin + j, h / s.group(), d));  // eq. 3
            for (Index d = 0; d < s.value_dim; ++d) out.o(b, rows.begin + i, h, d) = static_cast<T>(o[d]);
            if (out.lse) out.lse(b, rows.begin + i, h) = static_cast<acc_t<T>>(lse);
        }
    });
    return {};
}

template <class T>
Status backward(reference exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, const Upstream<T>& upstream,
                const Grads<T>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.keys));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch scratch(arena, s, pass::backward);
    double *const p = scratch.p, *const dp = scratch.dp;
    const double scale = attention::scale_of(attention_of(options), s.head_dim);
    const Parts parts = parts_of(options.component);
    const Index dh = s.head_dim, dv = s.value_dim;
    attention::detail::fill_zero(grads.q);
    attention::detail::fill_zero(grads.k);
    attention::detail::fill_zero(grads.v);
    attention::detail::reference_sequences(in, s, [&](Index b, Index h, RowRange rows, RowRange) {
        const Index L = rows.end - rows.begin, kv = h / s.group(), first = rows.begin;
        // The heads of a group come one after the other: the first clears its sums, the last writes them.
        if (h % s.group() == 0) {
            for (Index x = 0; x < L * dh; ++x) scratch.dk[x] = 0.0;
            for (Index x = 0; x < L * dv; ++x) scratch.dv[x] = 0.0;
        }
        for (Index x = 0; x < L * dh; ++x) scratch.dq[x] = 0.0;
        for (Index i = 0; i < L; ++i) {
            const RowRange read = attention::keys_read(attention_of(options), i, L);
            const double lse = detail::reference_row(options, in, s, b, h, first, i, read, p);
            if (options.score == Score::softmax && std::isinf(lse) && lse < 0) continue;  // only keys of score -inf
            double delta = 0.0;
            for (Index j = read.begin; j < read.end; ++j) {
                dp[j] = 0.0;
                for (Index d = 0; d < dv; ++d) {
                    const double dout = static_cast<double>(upstream.o(b, first + i, h, d));
                    scratch.dv[j * dv + d] += p[j] * dout;
                    dp[j] += dout * static_cast<double>(in.v(b, first + j, kv, d));
                }
                delta += p[j] * dp[j];
            }
            const double dlse = upstream.lse ? static_cast<double>(upstream.lse(b, first + i, h)) : 0.0;
            for (Index j = read.begin; j < read.end; ++j) {
                const double ds = scale * (options.score == Score::softmax ? p[j] * (dp[j] - delta + dlse) : p[j] * (1.0 - p[j]) * dp[j]);
                const auto q = [&](Index t, Index d) { return static_cast<double>(in.q(b, first + t, h, d)); };
                const auto k = [&](Index t, Index d) { return static_cast<double>(in.k(b, first + t, kv, d)); };
                for (Index d = 0; d < dh; ++d) {
                    scratch.dq[i * dh + d] += parts.own * ds * k(j, d);  // eq. 4
                    scratch.dk[j * dh + d] += parts.own * ds * q(i, d);  // eq. 5
                    if (parts.turned == 0.0) continue;
                    scratch.dq[j * dh + d] += parts.turned * ds * k(i, d);
                    scratch.dk[i * dh + d] += parts.turned * ds * q(j, d);
                }
            }
        }
        const auto write = [&](const View<T, 4>& to, Index head, const double* from, Index width) {
            for (Index j = 0; to && j < L; ++j)
                for (Index d = 0; d < width; ++d) to(b, first + j, head, d) = static_cast<T>(from[j * width + d]);
        };
        write(grads.q, h, scratch.dq, dh);
        if (h % s.group() != s.group() - 1) return;
        write(grads.k, kv, scratch.dk, dh);
        write(grads.v, kv, scratch.dv, dv);
    });
    return {};
}

}  // namespace component_attention
}  // namespace interstate::inline INTERSTATE_ABI
