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

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
