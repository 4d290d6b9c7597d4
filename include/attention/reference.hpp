// Attention by plain loops in float64, written like docs/ops/attention.md, whose equations are cited.
// This is the truth that kernels are held to, so backward forms every weight and every delta again
// from the inputs, and never trusts a rounded o or lse.
#pragma once

#include <cmath>
#include <limits>

#include <attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {

namespace detail {

/// Scratch of one call: a row of weights, a row of their gradients, and sums that T is too narrow for.
struct ReferenceScratch {
    double* p;    // (Lk)
    double* dp;   // (Lk)
    double* row;  // (max(dh, dv))
    double* dk;   // (Lk, dh)
    double* dv;   // (Lk, dv)

    ReferenceScratch(Arena& arena, const Shape& s, pass which) {
        const bool backward = which == pass::backward;
        p = arena.take<double>(s.keys);
        dp = arena.take<double>(backward ? s.keys : 0);
        row = arena.take<double>(s.head_dim > s.value_dim ? s.head_dim : s.value_dim);
        dk = arena.take<double>(backward ? s.keys * s.head_dim : 0);
        dv = arena.take<double>(backward ? s.keys * s.value_dim : 0);
    }
};

/// Turns the scores p[begin, end) of a row into weights in place; returns lse (0 for sigmoid).
inline double reference_weights(const Options& options, double bias, RowRange keys, double* p) {
    if (options.score == Score::sigmoid) {
        for (Index j = keys.begin; j < keys.end; ++j) p[j] = 1.0 / (1.0 + std::exp(-(p[j] + bias)));  // eq. 3
        return 0.0;
    }
    // eq. 2. Subtracting the largest score changes nothing but keeps exp in range.
    double largest = -std::numeric_limits<double>::infinity();
    for (Index j = keys.begin; j < keys.end; ++j) largest = p[j] > largest ? p[j] : largest;
    double sum = 0.0;
    for (Index j = keys.begin; j < keys.end; ++j) {
        p[j] = std::exp(p[j] - (std::isinf(largest) && largest < 0 ? 0.0 : largest));
        sum += p[j];
    }
    if (sum == 0.0) return -std::numeric_limits<double>::infinity();  // nothing read: all weights are zero
    for (Index j = keys.begin; j < keys.end; ++j) p[j] /= sum;
    return largest + std::log(sum);
}

template <class T>
double reference_bias(const Options& options, const View<const T, 1>& bias, Index h) {
    return bias ? static_cast<double>(bias(h)) : options.bias;
}

/// The weights of query i of a sequence whose queries and keys start at these rows of the tensors.
template <class T>
double reference_row(const Options& options, const Inputs<T>& in, const Shape& s, Index b, Index h,
                     Index query, Index key0, RowRange keys, double* p) {
    const double scale = scale_of(options, s.head_dim);
    for (Index j = keys.begin; j < keys.end; ++j) {
        double dot = 0.0;
        for (Index d = 0; d < s.head_dim; ++d)
            dot += static_cast<double>(in.q(b, query, h, d)) *
                   static_cast<double>(in.k(b, key0 + j, h / s.group(), d));
        p[j] = scale * dot;  // eq. 1
    }
    return reference_weights(options, reference_bias(options, in.bias, h), keys, p);
}

/// Calls f(b, h, queries, keys) for every sequence and query head: rows of q and rows of k.
template <class T, class F>
void reference_sequences(const Inputs<T>& in, const Shape& s, F&& f) {
    const Index sequences = s.packed() ? s.sequences : s.batch;
    for (Index n = 0; n < sequences; ++n) {
        const RowRange keys = rows_of(in.cu_seqlens, n, s.keys);
        const RowRange queries = s.packed() ? keys : RowRange{0, s.queries};
        for (Index h = 0; h < s.query_heads; ++h) f(s.packed() ? 0 : n, h, queries, keys);
    }
}

template <class T>
void fill_zero(const View<T, 4>& x) {
    if (!x) return;
    for (Index b = 0; b < x.extent[0]; ++b)
        for (Index i = 0; i < x.extent[1]; ++i)
            for (Index h = 0; h < x.extent[2]; ++h)
                for (Index d = 0; d < x.extent[3]; ++d) x(b, i, h, d) = static_cast<T>(0.0f);
}

}  // namespace detail

/// Attention keeps nothing for backward beside o and lse.
inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }

inline std::size_t workspace_size(reference, const Options&, const Shape& shape, pass which) {
    Arena arena;
    detail::ReferenceScratch(arena, shape, which);
    return arena.required();
}

inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"attention.reference", "plain float64 loops, for any shape and strides"};
}

template <class T>
Status forward(reference exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.keys));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch scratch(arena, s, pass::forward);
    double* const p = scratch.p;
    double* const o = scratch.row;

    // Rows that belong to no sequence are zero.
    detail::fill_zero(out.o);
    if (out.lse)
        for (Index b = 0; b < s.batch; ++b)
            for (Index i = 0; i < s.queries; ++i)
                for (Index h = 0; h < s.query_heads; ++h) out.lse(b, i, h) = 0;

    detail::reference_sequences(in, s, [&](Index b, Index h, RowRange queries, RowRange keys) {
        const Index Lq = queries.end - queries.begin, Lk = keys.end - keys.begin;
        for (Index i = 0; i < Lq; ++i) {
            const RowRange read = keys_read(options, i + Lk - Lq, Lk);  // eq. 5
            const double lse =
                detail::reference_row(options, in, s, b, h, queries.begin + i, keys.begin, read, p);
            for (Index d = 0; d < s.value_dim; ++d) o[d] = 0.0;
            for (Index j = read.begin; j < read.end; ++j)
                for (Index d = 0; d < s.value_dim; ++d)
                    o[d] += p[j] * static_cast<double>(in.v(b, keys.begin + j, h / s.group(), d));  // eq. 4
            for (Index d = 0; d < s.value_dim; ++d) out.o(b, queries.begin + i, h, d) = static_cast<T>(o[d]);
            if (out.lse) out.lse(b, queries.begin + i, h) = static_cast<acc_t<T>>(lse);
        }
    });
    return {};
}

template <class T>
Status backward(reference exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved,
                const Upstream<T>& upstream, const Grads<T>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.keys));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch scratch(arena, s, pass::backward);
    double *const p = scratch.p, *const dp = scratch.dp, *const dq = scratch.row;
    const double scale = scale_of(options, s.head_dim);
    const Index dh = s.head_dim, dv = s.value_dim;

    detail::fill_zero(grads.q);
    detail::fill_zero(grads.k);
    detail::fill_zero(grads.v);

    detail::reference_sequences(in, s, [&](Index b, Index h, RowRange queries, RowRange keys) {
        const Index Lq = queries.end - queries.begin, Lk = keys.end - keys.begin, kv = h / s.group();
        // The heads of a group come one after the other: the first clears its sums, the last writes them.
        if (h % s.group() == 0) {
            for (Index x = 0; x < Lk * dh; ++x) scratch.dk[x] = 0.0;
            for (Index x = 0; x < Lk * dv; ++x) scratch.dv[x] = 0.0;
        }
        for (Index i = 0; i < Lq; ++i) {
            const Index row = queries.begin + i;
            const RowRange read = keys_read(options, i + Lk - Lq, Lk);
            const double lse = detail::reference_row(options, in, s, b, h, row, keys.begin, read, p);
            if (options.score == Score::softmax && std::isinf(lse) && lse < 0) continue;  // read nothing
            double delta = 0.0;
            for (Index j = read.begin; j < read.end; ++j) {
                dp[j] = 0.0;
                for (Index d = 0; d < dv; ++d) {
                    const double dout = static_cast<double>(upstream.o(b, row, h, d));
                    scratch.dv[j * dv + d] += p[j] * dout;                                // eq. 6
                    dp[j] += dout * static_cast<double>(in.v(b, keys.begin + j, kv, d));  // eq. 7
                }
                delta += p[j] * dp[j];  // eq. 8
            }
            const double dlse = upstream.lse ? static_cast<double>(upstream.lse(b, row, h)) : 0.0;
            for (Index d = 0; d < dh; ++d) dq[d] = 0.0;
            for (Index j = read.begin; j < read.end; ++j) {
                const double ds = options.score == Score::softmax ? p[j] * (dp[j] - delta + dlse)  // eq. 9
                                                                  : p[j] * (1.0 - p[j]) * dp[j];   // eq. 10
                for (Index d = 0; d < dh; ++d) {
                    dq[d] += ds * static_cast<double>(in.k(b, keys.begin + j, kv, d));               // eq. 11
                    scratch.dk[j * dh + d] += scale * ds * static_cast<double>(in.q(b, row, h, d));  // eq. 12
                }
            }
            if (grads.q)
                for (Index d = 0; d < dh; ++d) grads.q(b, row, h, d) = static_cast<T>(scale * dq[d]);
        }
        if (h % s.group() != s.group() - 1) return;
        for (Index j = 0; j < Lk; ++j) {
            if (grads.k)
                for (Index d = 0; d < dh; ++d)
                    grads.k(b, keys.begin + j, kv, d) = static_cast<T>(scratch.dk[j * dh + d]);
            if (grads.v)
                for (Index d = 0; d < dv; ++d)
                    grads.v(b, keys.begin + j, kv, d) = static_cast<T>(scratch.dv[j * dv + d]);
        }
    });
    return {};
}

/// New tokens against the cache: the last n rows of `forward` over length + n keys.
template <class T>
Status step(reference exec, const Options& options, const Params&, const State<T>& state,
            const Tokens<T>& tokens, const TokensOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, tokens, out));
    const Shape s = shape_of(state, tokens);
    INTERSTATE_RETURN_IF_ERROR(check_rows(options, state, s.batch, s.queries));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    Arena arena(ws.data);
    const detail::ReferenceScratch scratch(arena, s, pass::step);
    const CacheRows rows = cache_rows(state);
    const double scale = scale_of(options, s.head_dim);
    double* const p = scratch.p;
    for (Index b = 0; b < s.batch; ++b)
        for (Index i = 0; i < s.queries; ++i) {
            const CacheRows::Place at = rows.place(b, rows.length_of(b) + i);
            for (Index h = 0; h < s.kv_heads; ++h) {
                for (Index d = 0; d < s.head_dim; ++d) state.k(at.batch, at.row, h, d) = tokens.k(b, i, h, d);
                for (Index d = 0; d < s.value_dim; ++d) state.v(at.batch, at.row, h, d) = tokens.v(b, i, h, d);
            }
        }

    for (Index b = 0; b < s.batch; ++b)
        for (Index i = 0; i < s.queries; ++i)
            for (Index h = 0; h < s.query_heads; ++h) {
                const Index kv = h / s.group(), length = rows.length_of(b);
                const RowRange read = keys_read(options, length + i, length + s.queries);  // eq. 5
                for (Index j = read.begin; j < read.end; ++j) {
                    const CacheRows::Place at = rows.place(b, j);
                    double dot = 0.0;
                    for (Index d = 0; d < s.head_dim; ++d)
                        dot += static_cast<double>(tokens.q(b, i, h, d)) * static_cast<double>(state.k(at.batch, at.row, kv, d));
                    p[j] = scale * dot;  // eq. 1
                }
                const double lse =
                    detail::reference_weights(options, detail::reference_bias(options, tokens.bias, h), read, p);
                for (Index d = 0; d < s.value_dim; ++d) {
                    double o = 0.0;
                    for (Index j = read.begin; j < read.end; ++j) {
                        const CacheRows::Place at = rows.place(b, j);
                        o += p[j] * static_cast<double>(state.v(at.batch, at.row, kv, d));  // eq. 4
                    }
                    out.o(b, i, h, d) = static_cast<T>(o);
                }
                if (out.lse) out.lse(b, i, h) = static_cast<acc_t<T>>(lse);
            }
    return {};
}
template <class T>
Status step(reference exec, const Options& options, const Params& params, const State<T>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, token, out));
    return step(exec, options, params, state, tokens_of(token), tokens_of(out), ws);
}

}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
