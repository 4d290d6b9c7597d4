// SISA by plain loops in float64, written like docs/ops/sisa.md, whose equations are cited.
// This is the truth that kernels are held to. Where the page has prefix sums with cancellation (g[i] - g[j],
// and the reverse sums of eq. 22 and 23) it sums between the two tokens instead, so that no distance and no
// decay costs precision.
#pragma once

#include <cmath>

#include <attention/reference.hpp>
#include <sisa/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {

namespace detail {

/// Scratch of one call: what a sequence and a key/value head need once, a row of pairs, and sums that T is
/// too narrow for.
struct ReferenceScratch {
    double* Phi;     // (Lk, ds/2)
    double* Bhat;    // (Lk, ds), R(Phi) B
    double* g;       // (Lk), published only: less the offset, not clamped
    double* Chat;    // (ds), R(Phi) C of the query
    double* decay;   // (Lk)
    double* dot;     // (Lk), Chat.Bhat
    double* p;       // (Lk), scores, then weights
    double* row;     // (max(dh, dv)), o or the gradient of q
    double* dp;      // (Lk)
    double* dk;      // (Lk, dh)
    double* dv;      // (Lk, dv)
    double* dB;      // (Lk, ds), of Bhat
    double* dC;      // (ds), of Chat
    double* dalpha;  // (Lk), of log_alpha; of the clamped g in published
    double* dtheta;  // (Lk, ds/2)
    double* turn;    // (ds/2)
    double* dlam;    // (Hq)

    ReferenceScratch(Arena& arena, const Options& options, const Shape& s, pass which) {
        const bool backward = which == pass::backward;
        const Index forward_keys = which == pass::step ? 0 : s.keys, back_keys = backward ? s.keys : 0;
        Phi = arena.take<double>(forward_keys * s.pairs());
        Bhat = arena.take<double>(forward_keys * s.state_dim);
        g = arena.take<double>(options.mode == Mode::published ? s.keys : 0);
        Chat = arena.take<double>(s.state_dim);
        decay = arena.take<double>(forward_keys);
        dot = arena.take<double>(forward_keys);
        p = arena.take<double>(s.keys);
        row = arena.take<double>(s.head_dim > s.value_dim ? s.head_dim : s.value_dim);
        dp = arena.take<double>(back_keys);
        dk = arena.take<double>(back_keys * s.head_dim);
        dv = arena.take<double>(back_keys * s.value_dim);
        dB = arena.take<double>(back_keys * s.state_dim);
        dC = arena.take<double>(backward ? s.state_dim : 0);
        dalpha = arena.take<double>(back_keys);
        dtheta = arena.take<double>(back_keys * s.pairs());
        turn = arena.take<double>(backward ? s.pairs() : 0);
        dlam = arena.take<double>(backward ? s.query_heads : 0);
    }
};

/// What running sums take a hard reset for (eq. 3): -1000, so that their differences stay finite. NaN stays NaN.
inline double floored(double log_alpha) { return log_alpha <= hard_reset ? hard_reset : log_alpha; }

/// R(angle) of pair n of a row of channels, in place (eq. 2); back with the angle's negative.
inline void turn_pair(double* row, Index n, double angle) {
    const double even = row[2 * n], odd = row[2 * n + 1], c = std::cos(angle), s = std::sin(angle);
    row[2 * n] = even * c - odd * s;
    row[2 * n + 1] = even * s + odd * c;
}

inline double clamped(double x, double K) { return x < -K ? -K : x > K ? K : x; }

/// Phi, R(Phi) B and, in published, g - c of one sequence and key/value head.
template <class T, class P>
void reference_keys(const Options& options, const Inputs<T, P>& in, const Shape& s, Index b, Index kv,
                    RowRange keys, const ReferenceScratch& at) {
    if (s.state_dim == 0) return;
    const Index Lk = keys.end - keys.begin;
    for (Index j = 0; j < Lk; ++j) {
        for (Index d = 0; d < s.state_dim; ++d)
            at.Bhat[j * s.state_dim + d] = static_cast<double>(in.B(b, keys.begin + j, kv, d));
        for (Index n = 0; n < s.pairs(); ++n) {
            at.Phi[j * s.pairs() + n] = (j > 0 ? at.Phi[(j - 1) * s.pairs() + n] : 0.0) +
                                        static_cast<double>(in.theta(b, keys.begin + j, kv, n));  // eq. 1
            turn_pair(at.Bhat + j * s.state_dim, n, at.Phi[j * s.pairs() + n]);
        }
    }
    if (options.mode == Mode::exact || Lk == 0) return;
    double g = 0.0, largest = 0.0, smallest = 0.0;
    for (Index j = 0; j < Lk; ++j) {
        g += static_cast<double>(in.log_alpha(b, keys.begin + j, kv));  // eq. 10
        at.g[j] = g;
        largest = j == 0 || g > largest ? g : largest;
        smallest = j == 0 || g < smallest ? g : smallest;
    }
    for (Index j = 0; j < Lk; ++j) at.g[j] -= (largest + smallest) / 2.0;  // eq. 11
}

/// What query i, at a position of its sequence, and the keys that it reads have to do with each other:
/// weights p, and decay and dot for backward. Returns lse.
template <class T, class P>
double reference_row(const Options& options, const Inputs<T, P>& in, const Shape& s, Index b, Index h,
                     Index query, Index position, Index key0, RowRange read, const ReferenceScratch& at) {
    const Index kv = h / s.group();
    const double scale = attention::scale_of(attention_of(options), s.head_dim);
    for (Index j = read.begin; j < read.end; ++j) {
        double dot = 0.0;
        for (Index d = 0; d < s.head_dim; ++d)
            dot += static_cast<double>(in.q(b, query, h, d)) * static_cast<double>(in.k(b, key0 + j, kv, d));
        at.p[j] = scale * dot;
    }
    if (s.state_dim > 0) {
        for (Index d = 0; d < s.state_dim; ++d) at.Chat[d] = static_cast<double>(in.C(b, query, h, d));
        for (Index n = 0; n < s.pairs(); ++n) turn_pair(at.Chat, n, at.Phi[position * s.pairs() + n]);
        double between = 0.0;  // the sum of log_alpha over (j, position]
        for (Index j = position; j >= read.begin; --j) {
            if (options.mode == Mode::published)
                between = clamped(at.g[position], options.clamp) - clamped(at.g[j], options.clamp);
            at.decay[j] = std::exp(between);  // eq. 3, eq. 12
            between += static_cast<double>(in.log_alpha(b, key0 + j, kv));
        }
        for (Index j = read.begin; j < read.end; ++j) {
            at.dot[j] = 0.0;
            for (Index d = 0; d < s.state_dim; ++d) at.dot[j] += at.Chat[d] * at.Bhat[j * s.state_dim + d];
            at.p[j] += static_cast<double>(in.lam(h)) * at.decay[j] * at.dot[j];  // eq. 4 and 5
        }
    }
    const attention::Options plain = attention_of(options);
    return attention::detail::reference_weights(plain, attention::detail::reference_bias(plain, in.bias, h),
                                                read,
                                                at.p);  // eq. 6 and 7
}

/// Of the clamped g, to of log_alpha, in place (published): the clamp passes what it does not bound, the
/// offset takes from all for the largest and the smallest g, and every g holds all log_alpha before it.
inline void reference_published_gradient(double K, const double* g, Index Lk, double* d) {
    if (Lk == 0) return;
    double largest = g[0], smallest = g[0], offset = 0.0;
    for (Index j = 0; j < Lk; ++j) {
        // eq. 24. All dx sum to zero: minus those that pass is those that do not, nothing at all where nothing is clamped.
        if (std::abs(g[j]) > K) offset += d[j], d[j] = 0.0;
        largest = g[j] > largest ? g[j] : largest;
        smallest = g[j] < smallest ? g[j] : smallest;
    }
    Index at_largest = 0, at_smallest = 0;
    for (Index j = 0; j < Lk; ++j) {
        at_largest += g[j] == largest ? 1 : 0;
        at_smallest += g[j] == smallest ? 1 : 0;
    }
    for (Index j = 0; j < Lk; ++j) {  // eq. 25: equal shares
        if (g[j] == largest) d[j] += offset / 2.0 / static_cast<double>(at_largest);
        if (g[j] == smallest) d[j] += offset / 2.0 / static_cast<double>(at_smallest);
    }
    for (Index j = Lk - 1; j > 0; --j) d[j - 1] += d[j];  // eq. 22
}

/// Calls f(b, h, queries, keys) for every sequence and query head: rows of q and rows of k.
template <class T, class P, class F>
void reference_sequences(const Inputs<T, P>& in, const Shape& s, F&& f) {
    attention::detail::reference_sequences(attention_of(in), attention_of(s), f);
}

template <class T, int Rank>
void fill_zero(const View<T, Rank>& x) {
    if (!x) return;
    if constexpr (Rank == 1)
        for (Index h = 0; h < x.extent[0]; ++h) x(h) = T(0);
    else if constexpr (Rank == 3)
        for (Index b = 0; b < x.extent[0]; ++b)
            for (Index i = 0; i < x.extent[1]; ++i)
                for (Index h = 0; h < x.extent[2]; ++h) x(b, i, h) = T(0);
    else
        attention::detail::fill_zero(x);
}

}  // namespace detail

/// SISA keeps nothing for backward beside o and lse.
inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }

inline std::size_t workspace_size(reference, const Options& options, const Shape& shape, pass which) {
    Arena arena;
    detail::ReferenceScratch(arena, options, shape, which);
    return arena.required();
}

inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"sisa.reference", "plain float64 loops, for any shape and strides"};
}

template <class T, class P>
Status forward(reference exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.keys));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch at(arena, options, s, pass::forward);
    double *const p = at.p, *const o = at.row;

    // Rows that belong to no sequence are zero.
    detail::fill_zero(out.o);
    detail::fill_zero(out.lse);

    detail::reference_sequences(in, s, [&](Index b, Index h, RowRange queries, RowRange keys) {
        const Index Lq = queries.end - queries.begin, Lk = keys.end - keys.begin, kv = h / s.group();
        if (h % s.group() == 0) detail::reference_keys(options, in, s, b, kv, keys, at);
        for (Index i = 0; i < Lq; ++i) {
            const Index position = i + Lk - Lq, row = queries.begin + i;
            const RowRange read = attention::keys_read(attention_of(options), position, Lk);  // eq. 9
            const double lse =
                detail::reference_row(options, in, s, b, h, row, position, keys.begin, read, at);
            for (Index d = 0; d < s.value_dim; ++d) o[d] = 0.0;
            for (Index j = read.begin; j < read.end; ++j)
                for (Index d = 0; d < s.value_dim; ++d)
                    o[d] += p[j] * static_cast<double>(in.v(b, keys.begin + j, kv, d));  // eq. 8
            for (Index d = 0; d < s.value_dim; ++d) out.o(b, row, h, d) = static_cast<T>(o[d]);
            if (out.lse) out.lse(b, row, h) = static_cast<acc_t<T>>(lse);
        }
    });
    return {};
}

template <class T, class P>
Status backward(reference exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.keys));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch at(arena, options, s, pass::backward);
    double *const p = at.p, *const dp = at.dp, *const dq = at.row;
    const double scale = attention::scale_of(attention_of(options), s.head_dim);
    const Index dh = s.head_dim, dv = s.value_dim, ds = s.state_dim, pairs = s.pairs();
    const bool exact = options.mode == Mode::exact;

    detail::fill_zero(grads.q);
    detail::fill_zero(grads.k);
    detail::fill_zero(grads.v);
    detail::fill_zero(grads.C);
    detail::fill_zero(grads.B);
    detail::fill_zero(grads.log_alpha);
    detail::fill_zero(grads.theta);
    for (Index h = 0; h < s.query_heads; ++h) at.dlam[h] = 0.0;

    detail::reference_sequences(in, s, [&](Index b, Index h, RowRange queries, RowRange keys) {
        const Index Lq = queries.end - queries.begin, Lk = keys.end - keys.begin, kv = h / s.group();
        // The heads of a group come one after the other: the first clears its sums, the last writes them.
        if (h % s.group() == 0) {
            detail::reference_keys(options, in, s, b, kv, keys, at);
            for (Index x = 0; x < Lk * dh; ++x) at.dk[x] = 0.0;
            for (Index x = 0; x < Lk * dv; ++x) at.dv[x] = 0.0;
            for (Index x = 0; x < Lk * ds; ++x) at.dB[x] = 0.0;
            for (Index x = 0; x < Lk; ++x) at.dalpha[x] = 0.0;
            for (Index x = 0; x < Lk * pairs; ++x) at.dtheta[x] = 0.0;
        }
        const double lam = ds > 0 ? static_cast<double>(in.lam(h)) : 0.0;
        for (Index i = 0; i < Lq; ++i) {
            const Index position = i + Lk - Lq, row = queries.begin + i;
            const RowRange read = attention::keys_read(attention_of(options), position, Lk);
            const double lse =
                detail::reference_row(options, in, s, b, h, row, position, keys.begin, read, at);
            if (options.score == Score::softmax && std::isinf(lse) && lse < 0) continue;  // read nothing
            double delta = 0.0;
            for (Index j = read.begin; j < read.end; ++j) {
                dp[j] = 0.0;
                for (Index d = 0; d < dv; ++d) {
                    const double dout = static_cast<double>(upstream.o(b, row, h, d));
                    at.dv[j * dv + d] += p[j] * dout;                                     // eq. 15
                    dp[j] += dout * static_cast<double>(in.v(b, keys.begin + j, kv, d));  // eq. 13
                }
                delta += p[j] * dp[j];
            }
            const double dlse = upstream.lse ? static_cast<double>(upstream.lse(b, row, h)) : 0.0;
            for (Index d = 0; d < dh; ++d) dq[d] = 0.0;
            for (Index d = 0; d < ds; ++d) at.dC[d] = 0.0;
            for (Index n = 0; n < pairs; ++n) at.turn[n] = 0.0;
            double sum =
                0.0;  // of w[i, j] over the keys so far: what the log_alpha of the next key has part in
            for (Index j = read.begin; j < read.end; ++j) {
                const double dscore = options.score == Score::softmax
                                          ? p[j] * (dp[j] - delta + dlse)
                                          : p[j] * (1.0 - p[j]) * dp[j];  // eq. 14
                for (Index d = 0; d < dh; ++d) {
                    dq[d] += dscore * static_cast<double>(in.k(b, keys.begin + j, kv, d));
                    at.dk[j * dh + d] += scale * dscore * static_cast<double>(in.q(b, row, h, d));  // eq. 16
                }
                if (ds == 0) continue;
                const double* const Bhat = at.Bhat + j * ds;
                at.dlam[h] += dscore * at.decay[j] * at.dot[j];  // eq. 17
                const double pull = dscore * lam * at.decay[j];
                for (Index d = 0; d < ds; ++d) {
                    at.dC[d] += pull * Bhat[d];              // eq. 18
                    at.dB[j * ds + d] += pull * at.Chat[d];  // eq. 19
                }
                const double w = pull * at.dot[j];
                sum += w;
                for (Index n = 0; n < pairs; ++n)
                    at.turn[n] +=
                        pull * (at.Chat[2 * n] * Bhat[2 * n + 1] - at.Chat[2 * n + 1] * Bhat[2 * n]);
                if (j < position) {
                    if (exact) at.dalpha[j + 1] += sum;                                              // eq. 20
                    for (Index n = 0; n < pairs; ++n) at.dtheta[(j + 1) * pairs + n] += at.turn[n];  // eq. 21
                }
                if (!exact) {  // eq. 24
                    at.dalpha[position] += w;
                    at.dalpha[j] -= w;
                }
            }
            if (grads.q)
                for (Index d = 0; d < dh; ++d) grads.q(b, row, h, d) = static_cast<T>(scale * dq[d]);
            for (Index n = 0; n < pairs; ++n) detail::turn_pair(at.dC, n, -at.Phi[position * pairs + n]);
            if (grads.C)
                for (Index d = 0; d < ds; ++d) grads.C(b, row, h, d) = static_cast<T>(at.dC[d]);
        }
        if (h % s.group() != s.group() - 1) return;
        if (!exact && ds > 0) detail::reference_published_gradient(options.clamp, at.g, Lk, at.dalpha);
        for (Index j = 0; j < Lk; ++j) {
            const Index row = keys.begin + j;
            if (grads.k)
                for (Index d = 0; d < dh; ++d) grads.k(b, row, kv, d) = static_cast<T>(at.dk[j * dh + d]);
            if (grads.v)
                for (Index d = 0; d < dv; ++d) grads.v(b, row, kv, d) = static_cast<T>(at.dv[j * dv + d]);
            for (Index n = 0; n < pairs; ++n) detail::turn_pair(at.dB + j * ds, n, -at.Phi[j * pairs + n]);
            if (grads.B)
                for (Index d = 0; d < ds; ++d) grads.B(b, row, kv, d) = static_cast<T>(at.dB[j * ds + d]);
            if (grads.theta)
                for (Index n = 0; n < pairs; ++n)
                    grads.theta(b, row, kv, n) = static_cast<P>(at.dtheta[j * pairs + n]);
            // Zero at a hard reset without being told: every pair that has it between has no decay left.
            if (grads.log_alpha) grads.log_alpha(b, row, kv) = static_cast<P>(at.dalpha[j]);
        }
    });
    if (grads.lam)
        for (Index h = 0; h < s.query_heads; ++h) grads.lam(h) = static_cast<P>(at.dlam[h]);
    return {};
}

namespace detail {

/// Token t of the new ones, and its key/value head h, into the cache; moves g_last and Phi on.
template <class T, class P>
void append_token(const State<T>& state, const Keys<T, P>& keys, const Shape& s, Index b, Index t, Index h) {
    const attention::CacheRows rows = attention::cache_rows(state);
    const Index row = rows.length_of(b) + t;
    const attention::CacheRows::Place at = rows.place(b, row);
    for (Index d = 0; d < s.head_dim; ++d) state.k(at.batch, at.row, h, d) = keys.k(b, t, h, d);
    for (Index d = 0; d < s.value_dim; ++d) state.v(at.batch, at.row, h, d) = keys.v(b, t, h, d);
    if (s.state_dim == 0) return;
    const double g = row > 0 ? state.g_last(b, h) : 0.0;
    state.g_last(b, h) = g + floored(static_cast<double>(keys.log_alpha(b, t, h)));
    state.g(at.batch, at.row, h) = state.g_last(b, h);  // eq. 26
    for (Index n = 0; n < s.pairs(); ++n) {
        const double Phi = row > 0 ? state.Phi(b, h, n) : 0.0;
        state.Phi(b, h, n) = Phi + static_cast<double>(keys.theta(b, t, h, n));  // eq. 1
        double pair[2] = {static_cast<double>(keys.B(b, t, h, 2 * n)), static_cast<double>(keys.B(b, t, h, 2 * n + 1))};
        turn_pair(pair, 0, state.Phi(b, h, n));
        for (Index e = 0; e < 2; ++e) state.B(at.batch, at.row, h, 2 * n + e) = static_cast<T>(pair[e]);
    }
}

}  // namespace detail

/// Adds n tokens of a prompt (keys.k and the others, from row 0) to the cache at rows `length` and on, as
/// n steps would, and moves g_last and Phi on by them. The caller then adds n to the length.
template <class T, class P>
Status append(reference, const Options& options, const State<T>& state, const Keys<T, P>& keys) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, keys));
    const Shape s = shape_of(state, keys);
    INTERSTATE_RETURN_IF_ERROR(attention::check_rows(reads_nothing, state, s.batch, keys.k.extent[1]));
    for (Index b = 0; b < s.batch; ++b)
        for (Index t = 0; t < keys.k.extent[1]; ++t)
            for (Index h = 0; h < s.kv_heads; ++h) detail::append_token(state, keys, s, b, t, h);
    return {};
}

/// New tokens against the cache: the last n rows of `forward` over length + n keys.
template <class T, class P>
Status step(reference exec, const Options& options, const Params<P>& params, const State<T>& state,
            const Tokens<T, P>& tokens, const TokensOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, tokens, out));
    const Shape s = shape_of(state, tokens);
    const attention::Options plain = attention_of(options);
    INTERSTATE_RETURN_IF_ERROR(attention::check_rows(plain, state, s.batch, s.queries));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    Arena arena(ws.data);
    const detail::ReferenceScratch at(arena, options, s, pass::step);
    const double scale = attention::scale_of(plain, s.head_dim);
    const attention::CacheRows rows = attention::cache_rows(state);
    for (Index b = 0; b < s.batch; ++b)
        for (Index i = 0; i < s.queries; ++i) {
            for (Index kv = 0; kv < s.kv_heads; ++kv) detail::append_token(state, keys_of(tokens), s, b, i, kv);
            const Index position = rows.length_of(b) + i;
            const RowRange read = attention::keys_read(plain, position, position + 1);  // eq. 9
            for (Index h = 0; h < s.query_heads; ++h) {
                const Index kv = h / s.group();
                for (Index d = 0; d < s.state_dim; ++d) at.Chat[d] = static_cast<double>(tokens.C(b, i, h, d));
                for (Index n = 0; n < s.pairs(); ++n) detail::turn_pair(at.Chat, n, state.Phi(b, kv, n));
                for (Index j = read.begin; j < read.end; ++j) {
                    const attention::CacheRows::Place key = rows.place(b, j);
                    double dot = 0.0, importance = 0.0;
                    for (Index d = 0; d < s.head_dim; ++d)
                        dot += static_cast<double>(tokens.q(b, i, h, d)) * static_cast<double>(state.k(key.batch, key.row, kv, d));
                    for (Index d = 0; d < s.state_dim; ++d)
                        importance += at.Chat[d] * static_cast<double>(state.B(key.batch, key.row, kv, d));
                    at.p[j] = scale * dot;
                    if (s.state_dim > 0)
                        at.p[j] += static_cast<double>(params.lam(h)) *
                                   std::exp(state.g_last(b, kv) - state.g(key.batch, key.row, kv)) * importance;  // eq. 26
                }
                const double lse = attention::detail::reference_weights(
                    plain, attention::detail::reference_bias(plain, tokens.bias, h), read, at.p);
                for (Index d = 0; d < s.value_dim; ++d) {
                    double o = 0.0;
                    for (Index j = read.begin; j < read.end; ++j) {
                        const attention::CacheRows::Place key = rows.place(b, j);
                        o += at.p[j] * static_cast<double>(state.v(key.batch, key.row, kv, d));  // eq. 8
                    }
                    out.o(b, i, h, d) = static_cast<T>(o);
                }
                if (out.lse) out.lse(b, i, h) = static_cast<acc_t<T>>(lse);
            }
        }
    return {};
}
template <class T, class P>
Status step(reference exec, const Options& options, const Params<P>& params, const State<T>& state,
            const Token<T, P>& token, const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, token, out));
    return step(exec, options, params, state, tokens_of(token), tokens_of(out), ws);
}

}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
