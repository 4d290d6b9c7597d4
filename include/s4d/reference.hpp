// S4D as its page of equations reads: plain loops in float64, any dtype. Slow and true.
// Equation numbers: docs/ops/s4d.md.
#pragma once

#include <s4d/detail/discretize.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d {

namespace detail {

struct ReferenceLayout {
    Mode* mode;      // (N)
    c64* x;          // (L+1, N) in backward, (1, N) in forward
    c64* g;          // (N) gradient of the state
    c64* dAbar;      // (N)
    c64* dBbar;      // (N)
    c64* dC;         // (N)
    c64* dC_reverse; // (N)
    double* sum;     // (L): y, or du, before it is rounded to storage
    ReferenceLayout(Arena& arena, const Shape& s, pass p)
        : mode(arena.take<Mode>(s.modes)),
          x(arena.take<c64>((p == pass::backward ? s.length + 1 : 1) * s.modes)),
          g(arena.take<c64>(s.modes)),
          dAbar(arena.take<c64>(s.modes)),
          dBbar(arena.take<c64>(s.modes)),
          dC(arena.take<c64>(s.modes)),
          dC_reverse(arena.take<c64>(s.modes)),
          sum(arena.take<double>(s.length)) {}
};

/// Batch row and rows on the length axis of independent recurrence i.
struct Place {
    Index batch;
    RowRange rows;
};
inline Place place_of(const View<const std::int32_t, 1>& cu, const Shape& s, Index i) {
    return {s.packed() ? 0 : i, rows_of(cu, i, s.length)};
}

}  // namespace detail

inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"s4d.reference.scan", "reference: float64 recurrence, one thread"};
}

/// The reference recomputes; it keeps nothing between forward and backward.
inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }

inline std::size_t workspace_size(reference, const Options&, const Shape& shape, pass p) {
    if (p == pass::step) return 0;
    Arena arena;
    detail::ReferenceLayout(arena, shape, p);
    return arena.required();
}

/// y and xT of eq. 3 and 4.
template <class T, class P>
Status forward(reference exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ReferenceLayout w(arena, s, pass::forward);
    using detail::c64;

    zero_outside_sequences(out.y, in.cu_seqlens);
    for (Index h = 0; h < s.channels; ++h) {
        for (Index n = 0; n < s.modes; ++n) w.mode[n] = detail::mode_at(options.disc, in.params, h, n);
        const double D = in.params.D ? in.params.D(h) : 0.0;
        for (Index i = 0; i < s.states(); ++i) {
            const auto [b, rows] = detail::place_of(in.cu_seqlens, s, i);
            for (Index n = 0; n < s.modes; ++n) w.x[n] = in.x0 ? cast<double>(in.x0(i, h, n)) : c64{};
            for (Index t = rows.begin; t < rows.end; ++t) {
                const double u = in.u(b, t, h);
                double y = D * u;
                for (Index n = 0; n < s.modes; ++n) {
                    w.x[n] = w.mode[n].Abar * w.x[n] + u * w.mode[n].Bbar;        // eq. 3
                    y += 2.0 * (cast<double>(in.params.C(h, n)) * w.x[n]).re;     // eq. 4
                }
                w.sum[t - rows.begin] = y;
            }
            if (out.xT)
                for (Index n = 0; n < s.modes; ++n) out.xT(i, h, n) = cast<acc_t<T>>(w.x[n]);
            if (in.params.C_reverse) {
                for (Index n = 0; n < s.modes; ++n) w.x[n] = {};
                for (Index t = rows.end - 1; t >= rows.begin; --t)
                    for (Index n = 0; n < s.modes; ++n) {
                        w.sum[t - rows.begin] += 2.0 * (cast<double>(in.params.C_reverse(h, n)) * w.x[n]).re;  // eq. 12
                        w.x[n] = w.mode[n].Abar * w.x[n] + static_cast<double>(in.u(b, t, h)) * w.mode[n].Bbar;
                    }
            }
            for (Index t = rows.begin; t < rows.end; ++t) out.y(b, t, h) = T(w.sum[t - rows.begin]);
        }
    }
    return {};
}

/// Eq. 6 to 10, and 13 where the layer is bidirectional.
template <class T, class P>
Status backward(reference exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const detail::ReferenceLayout w(arena, s, pass::backward);
    using detail::c64;
    const Index N = s.modes;

    zero_outside_sequences(grads.u, in.cu_seqlens);
    for (Index h = 0; h < s.channels; ++h) {
        for (Index n = 0; n < N; ++n) {
            w.mode[n] = detail::mode_at(options.disc, in.params, h, n);
            w.dAbar[n] = w.dBbar[n] = w.dC[n] = w.dC_reverse[n] = {};
        }
        const double D = in.params.D ? in.params.D(h) : 0.0;
        double dD = 0.0;
        for (Index i = 0; i < s.states(); ++i) {
            const auto [b, rows] = detail::place_of(in.cu_seqlens, s, i);
            // x[t+1] in memory is the state after token t, x[0] the initial one (eq. 3).
            for (Index n = 0; n < N; ++n) w.x[n] = in.x0 ? cast<double>(in.x0(i, h, n)) : c64{};
            for (Index t = 0; t < rows.end - rows.begin; ++t) {
                const double u = in.u(b, rows.begin + t, h);
                for (Index n = 0; n < N; ++n)
                    w.x[(t + 1) * N + n] = w.mode[n].Abar * w.x[t * N + n] + u * w.mode[n].Bbar;
            }
            for (Index n = 0; n < N; ++n) w.g[n] = upstream.xT ? cast<double>(upstream.xT(i, h, n)) : c64{};
            for (Index t = rows.end - rows.begin - 1; t >= 0; --t) {
                const double u = in.u(b, rows.begin + t, h);
                const double dy = upstream.y(b, rows.begin + t, h);
                double du = D * dy;
                dD += u * dy;
                for (Index n = 0; n < N; ++n) {
                    const c64 C = cast<double>(in.params.C(h, n));
                    w.g[n] += (2.0 * dy) * conj(C);                           // eq. 6
                    w.dC[n] += (2.0 * dy) * conj(w.x[(t + 1) * N + n]);       // eq. 8
                    w.dBbar[n] += u * w.g[n];                                 // eq. 8
                    w.dAbar[n] += w.g[n] * conj(w.x[t * N + n]);              // eq. 8
                    du += dot(w.mode[n].Bbar, w.g[n]);                        // eq. 7
                    w.g[n] = conj(w.mode[n].Abar) * w.g[n];                   // eq. 6
                }
                w.sum[t] = du;
            }
            if (grads.x0)
                for (Index n = 0; n < N; ++n) grads.x0(i, h, n) = cast<acc_t<T>>(w.g[n]);
            if (in.params.C_reverse) {
                // x[t] in memory is the state after token t of the reversed recurrence, x[length] is zero.
                const Index length = rows.end - rows.begin;
                for (Index n = 0; n < N; ++n) w.x[length * N + n] = w.g[n] = {};
                for (Index t = length - 1; t >= 0; --t)
                    for (Index n = 0; n < N; ++n)
                        w.x[t * N + n] = w.mode[n].Abar * w.x[(t + 1) * N + n] +
                                         static_cast<double>(in.u(b, rows.begin + t, h)) * w.mode[n].Bbar;
                for (Index t = 0; t < length; ++t) {
                    const double u = in.u(b, rows.begin + t, h);
                    const double dy = upstream.y(b, rows.begin + t, h);
                    for (Index n = 0; n < N; ++n) {
                        const c64 C = cast<double>(in.params.C_reverse(h, n));
                        w.dC_reverse[n] += (2.0 * dy) * conj(w.x[(t + 1) * N + n]);  // eq. 13
                        w.dBbar[n] += u * w.g[n];
                        w.dAbar[n] += w.g[n] * conj(w.x[(t + 1) * N + n]);
                        w.sum[t] += dot(w.mode[n].Bbar, w.g[n]);
                        w.g[n] = conj(w.mode[n].Abar) * w.g[n] + (2.0 * dy) * conj(C);
                    }
                }
            }
            if (grads.u)
                for (Index t = rows.begin; t < rows.end; ++t) grads.u(b, t, h) = T(w.sum[t - rows.begin]);
        }
        double dlog_dt = 0.0;
        for (Index n = 0; n < N; ++n) {
            const auto g = detail::discretize_backward(options.disc, w.mode[n], cast<double>(in.params.B(h, n)),
                                                       w.dAbar[n], w.dBbar[n]);
            dlog_dt += g.log_dt;
            if (grads.params.log_neg_re) grads.params.log_neg_re(h, n) = static_cast<P>(g.log_neg_re);
            if (grads.params.im) grads.params.im(h, n) = static_cast<P>(g.im);
            if (grads.params.B) grads.params.B(h, n) = cast<P>(g.B);
            if (grads.params.C) grads.params.C(h, n) = cast<P>(w.dC[n]);
            if (grads.params.C_reverse) grads.params.C_reverse(h, n) = cast<P>(w.dC_reverse[n]);
        }
        if (grads.params.log_dt) grads.params.log_dt(h) = static_cast<P>(dlog_dt);
        if (grads.params.D) grads.params.D(h) = static_cast<P>(dD);
    }
    return {};
}

/// Workspace of generate_kernel (pass::forward): K of a channel before it is rounded. Its backward needs none.
inline std::size_t generate_kernel_workspace_size(reference, const Options&, const Shape& shape, pass p) {
    Arena arena;
    arena.take<double>(p == pass::forward ? shape.length : 0);
    return arena.required();
}

/// The Vandermonde kernel K[h,l] = 2 Re sum_n C Bbar Abar^l (eq. 14), K (H, L) in f32 or f64.
template <class A, class P>
Status generate_kernel(reference exec, const Options& options, const Params<P>& params, const View<A, 2>& K,
                       Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, K));
    const Shape s = shape_of(params, K);
    INTERSTATE_RETURN_IF_ERROR(check_workspace(
        "workspace", ws, generate_kernel_workspace_size(exec, options, s, pass::forward)));
    double* sum = Arena(ws.data).take<double>(s.length);
    for (Index h = 0; h < s.channels; ++h) {
        for (Index l = 0; l < s.length; ++l) sum[l] = 0.0;
        for (Index n = 0; n < s.modes; ++n) {
            const auto mode = detail::mode_at(options.disc, params, h, n);
            const auto CB = 2.0 * (cast<double>(params.C(h, n)) * mode.Bbar);
            detail::c64 power{1.0, 0.0};
            for (Index l = 0; l < s.length; ++l, power = power * mode.Abar) sum[l] += (CB * power).re;
        }
        for (Index l = 0; l < s.length; ++l) K(h, l) = static_cast<A>(sum[l]);
    }
    return {};
}

/// Gradients of the parameters from dK (H, L) (eq. 15); those of D and C_reverse, which K does not
/// depend on, are set to zero.
template <class A, class P>
Status generate_kernel_backward(reference, const Options& options, const Params<P>& params, const View<const A, 2>& dK,
                                const BasicParams<P, complex<P>>& grads, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, dK, grads));
    using detail::c64;
    for (Index h = 0; h < dK.extent[0]; ++h) {
        double dlog_dt = 0.0;
        for (Index n = 0; n < params.log_neg_re.extent[1]; ++n) {
            const auto mode = detail::mode_at(options.disc, params, h, n);
            c64 power{1.0, 0.0}, previous{}, sum{}, slope{};  // sum_l dK Abar^l and its derivative in Abar
            for (Index l = 0; l < dK.extent[1]; ++l) {
                const double g = dK(h, l);
                sum += g * power;
                slope += (g * static_cast<double>(l)) * previous;
                previous = power;
                power = power * mode.Abar;
            }
            const c64 C = cast<double>(params.C(h, n));
            const auto g = detail::discretize_backward(options.disc, mode, cast<double>(params.B(h, n)),
                                                       2.0 * conj(C * mode.Bbar * slope), 2.0 * conj(C * sum));
            dlog_dt += g.log_dt;
            if (grads.log_neg_re) grads.log_neg_re(h, n) = static_cast<P>(g.log_neg_re);
            if (grads.im) grads.im(h, n) = static_cast<P>(g.im);
            if (grads.B) grads.B(h, n) = cast<P>(g.B);
            if (grads.C) grads.C(h, n) = cast<P>(2.0 * conj(mode.Bbar * sum));
            if (grads.C_reverse) grads.C_reverse(h, n) = {};
        }
        if (grads.log_dt) grads.log_dt(h) = static_cast<P>(dlog_dt);
        if (grads.D) grads.D(h) = P(0);
    }
    return {};
}

/// Fills Abar and Bbar of `discrete` (eq. 2); C and D are the caller's to set.
template <class P>
Status discretize(reference, const Options& options, const Params<P>& params, const Discrete<P>& discrete) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, discrete));
    for (Index h = 0; h < discrete.Abar.extent[0]; ++h)
        for (Index n = 0; n < discrete.Abar.extent[1]; ++n) {
            const auto mode = detail::mode_at(options.disc, params, h, n);
            discrete.Abar(h, n) = mode.Abar;
            discrete.Bbar(h, n) = mode.Bbar;
        }
    return {};
}

/// One token of eq. 3 and 4 for every batch row; the state is updated in place.
template <class T, class P>
Status step(reference, const Options&, const Discrete<P>& discrete, const State<acc_t<T>>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(discrete, state, token, out));
    for (Index b = 0; b < token.u.extent[0]; ++b)
        for (Index h = 0; h < token.u.extent[1]; ++h) {
            const double u = token.u(b, h);
            double y = discrete.D ? discrete.D(h) * u : 0.0;
            for (Index n = 0; n < discrete.Abar.extent[1]; ++n) {
                const auto x = discrete.Abar(h, n) * cast<double>(state.x(b, h, n)) + u * discrete.Bbar(h, n);
                state.x(b, h, n) = cast<acc_t<T>>(x);
                y += 2.0 * (cast<double>(discrete.C(h, n)) * x).re;
            }
            out.y(b, h) = T(y);
        }
    return {};
}

}  // namespace s4d
}  // namespace interstate::inline INTERSTATE_ABI
