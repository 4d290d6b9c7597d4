// Interdomain Attention as its page of equations reads: token by token in float64, any dtype. Slow and true.
// Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <algorithm>

#include <interdomain/detail/discretize.hpp>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain {

namespace detail {

/// States are kept every so many tokens in backward, and recomputed between.
inline constexpr Index reference_checkpoint = 64;

struct ReferenceLayout {
    Index width;  // columns of a state: keys, values, and ones where there is a normaliser
    Mode* mode;   // (M)
    c64* x;       // (M, width); backward: of the checkpoint + 1 tokens of a stretch
    c64* kept;    // (stretches, M, width), backward
    c64* y;       // (M, width) adjoint of the state
    c64* a;       // (M) each
    c64* s;
    c64* w;
    c64* e;
    c64* p;
    c64* sg;
    c64* dLam;
    c64* dBbar;
    c64* dC;      // (M, M)
    double* up;   // (d + 1) upstream of a query's numerator and denominator
    ReferenceLayout(Arena& arena, const Options& options, const Shape& shape, pass which)
        : width(shape.columns() + (options.normalized() ? 1 : 0)) {
        const bool back = which == pass::backward;
        const Index M = shape.modes, state = M * width;
        mode = arena.take<Mode>(M);
        x = arena.take<c64>((back ? reference_checkpoint + 1 : 1) * state);
        kept = arena.take<c64>(back ? ceil_div(shape.length, reference_checkpoint) * state : 0);
        y = arena.take<c64>(back ? state : 0);
        for (c64** v : {&a, &s, &w}) *v = arena.take<c64>(M);
        for (c64** v : {&e, &p, &sg, &dLam, &dBbar}) *v = arena.take<c64>(back ? M : 0);
        dC = arena.take<c64>(back ? M * M : 0);
        up = arena.take<double>(back ? shape.value_dim + 1 : 0);
    }
};

/// Columns [first, first + n) of a state times a real vector: sum_c X[m, first + c] r(c).
template <class F>
void contract(const c64* X, Index M, Index width, Index first, Index n, F&& r, c64* out) {
    for (Index m = 0; m < M; ++m) {
        out[m] = {};
        for (Index c = 0; c < n; ++c) out[m] += r(c) * X[m * width + first + c];
    }
}

/// What the readout makes of a contracted state a (eq. 8): s = C a and w = C^T s, real parts taken between where
/// they are.
template <class P>
void read_out(Readout readout, const View<const complex<P>, 3>& C, Index h, Index M, const c64* a, c64* s, c64* w) {
    for (Index m = 0; m < M; ++m) {
        s[m] = {};
        for (Index n = 0; n < M; ++n) s[m] += cast<double>(C(h, m, n)) * a[n];
        if (readout == Readout::real_parts) s[m] = {2.0 * s[m].re, 0.0};
    }
    const double twice = readout == Readout::real_parts ? 2.0 : 1.0;
    for (Index n = 0; n < M; ++n) {
        w[n] = {};
        for (Index m = 0; m < M; ++m) w[n] += twice * (cast<double>(C(h, m, n)) * s[m]);
    }
}

/// Re(X[:, c]^T w)
inline double column_dot(const c64* X, Index M, Index width, Index c, const c64* w) {
    double sum = 0.0;
    for (Index m = 0; m < M; ++m) sum += (X[m * width + c] * w[m]).re;
    return sum;
}

/// Column c of token t: key features, then values, then one.
template <class T, class P>
double token_column(const Inputs<T, P>& in, const Shape& s, Index b, Index t, Index h, Index c) {
    if (c < s.features) return in.k(b, t, h, c);
    if (c < s.columns()) return in.v(b, t, h, c - s.features);
    return 1.0;
}

/// X[t] from X[t-1] (eq. 3); `to` may be `from`.
template <class T, class P>
void advance(const ReferenceLayout& l, const Inputs<T, P>& in, const Shape& s, Index b, Index t, Index h, const c64* from,
             c64* to) {
    for (Index m = 0; m < s.modes; ++m)
        for (Index c = 0; c < l.width; ++c)
            to[m * l.width + c] =
                l.mode[m].Abar * from[m * l.width + c] + token_column(in, s, b, t, h, c) * l.mode[m].Bbar;
}

/// The state that a head starts from, for either pass.
template <class Xs, class Etas>
void load_state(const ReferenceLayout& l, const Shape& s, const Xs& x0, const Etas& eta0, Index i, Index h, c64* x) {
    for (Index m = 0; m < s.modes; ++m)
        for (Index c = 0; c < l.width; ++c) {
            c64& to = x[m * l.width + c];
            if (c < s.columns())
                to = x0 ? cast<double>(x0(i, h, m, c)) : c64{};
            else
                to = eta0 ? cast<double>(eta0(i, h, m)) : c64{};
        }
}
template <class A>
void store_state(const ReferenceLayout& l, const Shape& s, const c64* x, const View<complex<A>, 4>& xT,
                 const View<complex<A>, 3>& etaT, Index i, Index h, bool conjugate) {
    for (Index m = 0; m < s.modes; ++m)
        for (Index c = 0; c < l.width; ++c) {
            const c64 from = conjugate ? conj(x[m * l.width + c]) : x[m * l.width + c];
            if (c < s.columns() && xT) xT(i, h, m, c) = cast<A>(from);
            if (c == s.columns() && etaT) etaT(i, h, m) = cast<A>(from);
        }
}

}  // namespace detail

inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"interdomain.reference.scan", "reference: float64 recurrence, one thread"};
}

/// The reference recomputes; it keeps nothing between forward and backward.
inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }

inline std::size_t workspace_size(reference, const Options& options, const Shape& shape, pass p) {
    Arena arena;
    detail::ReferenceLayout(arena, options, shape, p);
    return arena.required();
}

/// o, xT and etaT of eq. 3 to 6, by way of eq. 8.
template <class T, class P>
Status forward(reference exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ReferenceLayout l(arena, options, s, pass::forward);
    const Index M = s.modes, W = l.width;

    zero_outside_sequences(out.o, in.cu_seqlens);
    for (Index h = 0; h < s.kv_heads; ++h) {
        for (Index m = 0; m < M; ++m) l.mode[m] = detail::mode_at(options.disc, in.params, h, m);
        for (Index i = 0; i < s.states(); ++i) {
            const Index b = s.packed() ? 0 : i;
            const RowRange rows = rows_of(in.cu_seqlens, i, s.length);
            detail::load_state(l, s, in.x0, in.eta0, i, h, l.x);
            for (Index t = rows.begin; t < rows.end; ++t) {
                detail::advance(l, in, s, b, t, h, l.x, l.x);
                for (Index hq = h * s.group(); hq < (h + 1) * s.group(); ++hq) {
                    detail::contract(l.x, M, W, 0, s.features, [&](Index r) { return double(in.q(b, t, hq, r)); }, l.a);
                    detail::read_out(options.readout, in.params.C, h, M, l.a, l.s, l.w);
                    const double den = options.normalized() ? detail::column_dot(l.x, M, W, s.columns(), l.w) : 1.0;
                    for (Index c = 0; c < s.value_dim; ++c)
                        out.o(b, t, hq, c) = T(detail::column_dot(l.x, M, W, s.features + c, l.w) / den);
                }
            }
            detail::store_state(l, s, l.x, out.xT, out.etaT, i, h, false);
        }
    }
    return {};
}

/// Eq. 9 to 12.
template <class T, class P>
Status backward(reference exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const detail::ReferenceLayout l(arena, options, s, pass::backward);
    using detail::c64;
    const Index M = s.modes, W = l.width, state = M * W, R = s.features, d = s.value_dim;
    const Index outputs = options.normalized() ? d + 1 : d;

    zero_outside_sequences(grads.q, in.cu_seqlens);
    zero_outside_sequences(grads.k, in.cu_seqlens);
    zero_outside_sequences(grads.v, in.cu_seqlens);
    for (Index h = 0; h < s.kv_heads; ++h) {
        for (Index m = 0; m < M; ++m) {
            l.mode[m] = detail::mode_at(options.disc, in.params, h, m);
            l.dLam[m] = l.dBbar[m] = {};
        }
        for (Index j = 0; j < M * M; ++j) l.dC[j] = {};
        for (Index i = 0; i < s.states(); ++i) {
            const Index b = s.packed() ? 0 : i;
            const RowRange rows = rows_of(in.cu_seqlens, i, s.length);
            const Index length = rows.end - rows.begin, stretches = ceil_div(length, detail::reference_checkpoint);
            detail::load_state(l, s, in.x0, in.eta0, i, h, l.x);
            for (Index t = 0; t < length; ++t) {
                if (t % detail::reference_checkpoint == 0)
                    for (Index j = 0; j < state; ++j) l.kept[t / detail::reference_checkpoint * state + j] = l.x[j];
                detail::advance(l, in, s, b, rows.begin + t, h, l.x, l.x);
            }
            detail::load_state(l, s, upstream.xT, upstream.etaT, i, h, l.y);
            for (Index j = 0; j < state; ++j) l.y[j] = conj(l.y[j]);
            for (Index stretch = stretches - 1; stretch >= 0; --stretch) {
                const Index first = stretch * detail::reference_checkpoint;
                const Index last = std::min(first + detail::reference_checkpoint, length);
                // x[t + 1 - first] in memory is the state after token t.
                for (Index j = 0; j < state; ++j) l.x[j] = l.kept[stretch * state + j];
                for (Index t = first; t < last; ++t)
                    detail::advance(l, in, s, b, rows.begin + t, h, l.x + (t - first) * state, l.x + (t + 1 - first) * state);
                for (Index t = last - 1; t >= first; --t) {
                    const Index row = rows.begin + t;
                    const c64* const X = l.x + (t + 1 - first) * state;
                    for (Index hq = h * s.group(); hq < (h + 1) * s.group(); ++hq) {
                        const auto q = [&](Index r) { return double(in.q(b, row, hq, r)); };
                        detail::contract(X, M, W, 0, R, q, l.a);
                        detail::read_out(options.readout, in.params.C, h, M, l.a, l.s, l.w);
                        for (Index c = 0; c < d; ++c) l.up[c] = upstream.o(b, row, hq, c);
                        if (options.normalized()) {  // eq. 11
                            const double den = detail::column_dot(X, M, W, s.columns(), l.w);
                            double carried = 0.0;
                            for (Index c = 0; c < d; ++c) {
                                carried -= l.up[c] * (detail::column_dot(X, M, W, R + c, l.w) / den);
                                l.up[c] /= den;
                            }
                            l.up[d] = carried / den;
                        }
                        detail::contract(X, M, W, R, outputs, [&](Index c) { return l.up[c]; }, l.e);  // eq. 9
                        detail::read_out(options.readout, in.params.C, h, M, l.e, l.sg, l.p);
                        for (Index m = 0; m < M; ++m) {
                            for (Index r = 0; r < R; ++r) l.y[m * W + r] += q(r) * l.p[m];
                            for (Index c = 0; c < outputs; ++c) l.y[m * W + R + c] += l.up[c] * l.w[m];
                        }
                        const double twice = options.readout == Readout::real_parts ? 2.0 : 1.0;
                        for (Index m = 0; m < M; ++m)
                            for (Index n = 0; n < M; ++n)
                                l.dC[m * M + n] += twice * (l.sg[m] * l.a[n] + l.s[m] * l.e[n]);  // eq. 10
                        if (grads.q)
                            for (Index r = 0; r < R; ++r)
                                grads.q(b, row, hq, r) = T(detail::column_dot(X, M, W, r, l.p));
                    }
                    const c64* const before = X - state;
                    for (Index c = 0; c < s.columns(); ++c) {
                        double dz = 0.0;
                        for (Index m = 0; m < M; ++m) dz += (l.mode[m].Bbar * l.y[m * W + c]).re;
                        if (c < R && grads.k) grads.k(b, row, h, c) = T(dz);
                        if (c >= R && grads.v) grads.v(b, row, h, c - R) = T(dz);
                    }
                    for (Index m = 0; m < M; ++m)
                        for (Index c = 0; c < W; ++c) {
                            c64& y = l.y[m * W + c];
                            l.dBbar[m] += detail::token_column(in, s, b, row, h, c) * y;  // eq. 12
                            l.dLam[m] += y * before[m * W + c];
                            y = l.mode[m].Abar * y;
                        }
                }
            }
            detail::store_state(l, s, l.y, grads.x0, grads.eta0, i, h, true);
        }
        double dlog_dt = 0.0;
        for (Index m = 0; m < M; ++m) {
            const auto g = detail::discretize_backward(options.disc, l.mode[m], cast<double>(in.params.B(h, m)),
                                                       conj(l.dLam[m]), conj(l.dBbar[m]));
            dlog_dt += g.log_dt;
            if (grads.params.log_neg_re) grads.params.log_neg_re(h, m) = static_cast<P>(g.log_neg_re);
            if (grads.params.im) grads.params.im(h, m) = static_cast<P>(g.im);
            if (grads.params.B) grads.params.B(h, m) = cast<P>(g.B);
            if (grads.params.C)
                for (Index n = 0; n < M; ++n) grads.params.C(h, m, n) = cast<P>(conj(l.dC[m * M + n]));
        }
        if (grads.params.log_dt) grads.params.log_dt(h) = static_cast<P>(dlog_dt);
    }
    return {};
}

/// Fills Lam and Bbar of `discrete` (eq. 2); C is the caller's to set.
template <class P>
Status discretize(reference, const Options& options, const Params<P>& params, const Discrete<P>& discrete) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, discrete));
    for (Index h = 0; h < discrete.Lam.extent[0]; ++h)
        for (Index m = 0; m < discrete.Lam.extent[1]; ++m) {
            const auto mode = detail::mode_at(options.disc, params, h, m);
            discrete.Lam(h, m) = mode.Abar;
            discrete.Bbar(h, m) = mode.Bbar;
        }
    return {};
}

/// One token of eq. 3 to 6 for every batch row; the state is updated in place.
template <class T, class P>
Status step(reference exec, const Options& options, const Discrete<P>& discrete, const State<acc_t<T>>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, discrete, state, token, out));
    const Shape s = shape_of(discrete, token);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    Arena arena(ws.data);
    const detail::ReferenceLayout l(arena, options, s, pass::step);
    const Index M = s.modes, W = l.width;
    for (Index h = 0; h < s.kv_heads; ++h)
        for (Index b = 0; b < s.batch; ++b) {
            detail::load_state(l, s, state.x, state.eta, b, h, l.x);
            for (Index m = 0; m < M; ++m)
                for (Index c = 0; c < W; ++c) {
                    const double z = c < s.features    ? double(token.k(b, h, c))
                                     : c < s.columns() ? double(token.v(b, h, c - s.features))
                                                       : 1.0;
                    l.x[m * W + c] = discrete.Lam(h, m) * l.x[m * W + c] + z * discrete.Bbar(h, m);
                }
            for (Index hq = h * s.group(); hq < (h + 1) * s.group(); ++hq) {
                detail::contract(l.x, M, W, 0, s.features, [&](Index r) { return double(token.q(b, hq, r)); }, l.a);
                detail::read_out(options.readout, discrete.C, h, M, l.a, l.s, l.w);
                const double den = options.normalized() ? detail::column_dot(l.x, M, W, s.columns(), l.w) : 1.0;
                for (Index c = 0; c < s.value_dim; ++c)
                    out.o(b, hq, c) = T(detail::column_dot(l.x, M, W, s.features + c, l.w) / den);
            }
            detail::store_state(l, s, l.x, state.x, state.eta, b, h, false);
        }
    return {};
}

}  // namespace interdomain
}  // namespace interstate::inline INTERSTATE_ABI
