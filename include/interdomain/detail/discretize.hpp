// From the continuous parameters of a key/value head to the recurrence and back, in float64 on host and device.
// Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <interdomain/params.hpp>
#include <s4d/detail/discretize.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail {

using c64 = complex<double>;
using s4d::detail::Mode;
using s4d::detail::ModeGrads;

/// Mode m of head h (eq. 1 and 2): Abar is Lam. `raw` leaves B as it is.
template <class P>
INTERSTATE_HD Mode mode_at(Discretization disc, const Params<P>& p, Index h, Index m) {
    const c64 B = cast<double>(p.B(h, m));
    Mode mode = s4d::detail::discretize(s4d::Discretization::zoh, p.log_dt(h), p.log_neg_re(h, m), p.im(h, m), B);
    if (disc == Discretization::raw) mode.Bbar = B;
    return mode;
}

/// Gradients of the continuous parameters from those of Lam and Bbar; log_dt is this mode's share of its head's.
INTERSTATE_HD inline ModeGrads discretize_backward(Discretization disc, const Mode& mode, c64 B, c64 dLam, c64 dBbar) {
    if (disc == Discretization::zoh)
        return s4d::detail::discretize_backward(s4d::Discretization::zoh, mode, B, dLam, dBbar);
    ModeGrads g = s4d::detail::discretize_backward(s4d::Discretization::zoh, mode, B, dLam, c64{});
    g.B = dBbar;
    return g;
}

/// The same from Lam dLam, summed as it is: where Lam is next to zero it could not be had back from dLam.
INTERSTATE_HD inline ModeGrads discretize_backward_scaled(Discretization disc, const Mode& mode, c64 B, c64 scaled, c64 dBbar) {
    if (disc == Discretization::raw)
        return {.log_dt = mode.dt * dot(mode.A, scaled),
                .log_neg_re = mode.A.re * mode.dt * scaled.re,
                .im = mode.dt * scaled.im,
                .B = dBbar};
    c64 phi, psi;
    s4d::detail::phi_psi(mode.zeta, phi, psi);
    const c64 dzeta = scaled + conj(mode.dt * (B * psi)) * dBbar;
    return {.log_dt = mode.dt * (dot(B * mode.Abar, dBbar) + dot(mode.A, scaled)),
            .log_neg_re = mode.A.re * mode.dt * dzeta.re,
            .im = mode.dt * dzeta.im,
            .B = conj(mode.dt * phi) * dBbar};
}

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
