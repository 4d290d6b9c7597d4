// From the continuous parameters to the recurrence and back to their gradients, in float64 on host
// and device. Equation numbers: docs/ops/s4d.md.
#pragma once

#include <cmath>

#include <interstate/complex.hpp>
#include <s4d/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

using c64 = complex<double>;

INTERSTATE_HD inline c64 exp(c64 z) {
    const double r = std::exp(z.re);
    return {r * std::cos(z.im), r * std::sin(z.im)};
}

/// base^times
INTERSTATE_HD inline c64 raise(c64 base, Index times) {
    c64 power{1.0, 0.0};
    for (; times > 0; times >>= 1) {
        if (times & 1) power = power * base;
        base = base * base;
    }
    return power;
}

/// phi(z) = (e^z - 1)/z and psi(z) = phi'(z) = (e^z (z - 1) + 1)/z^2 (eq. 5). Near zero the closed
/// forms subtract nearly equal numbers; the series has no such loss and 20 terms reach 1e-17 at |z| = 1.
INTERSTATE_HD inline void phi_psi(c64 z, c64& phi, c64& psi) {
    if (z.re * z.re + z.im * z.im < 1.0) {
        phi = psi = {0.0, 0.0};
        const c64 square = z * z;
        c64 even{1.0, 0.0};  // z^n / n!, two terms a step: the chain of products is what takes time
        for (int n = 0; n < 20 && dot(even, even) > 1e-36; n += 2) {
            const double a = 1.0 / (n + 1), b = 1.0 / (n + 2), c = 1.0 / (n + 3);
            const c64 odd = a * (even * z);
            phi += a * even;
            phi += b * odd;
            psi += b * even;
            psi += c * odd;
            even = (a * b) * (even * square);
        }
        return;
    }
    const c64 one{1.0, 0.0};
    const c64 inverse = reciprocal(z);
    const c64 e = exp(z);
    phi = (e - one) * inverse;
    psi = (e * (z - one) + one) * inverse * inverse;
}

/// One mode of one channel.
struct Mode {
    double dt;
    c64 A;     // eq. 1
    c64 zeta;  // dt A
    c64 Abar;  // eq. 2
    c64 Bbar;  // eq. 2
};

/// exp() of a parameter, kept where its powers stay finite: beyond e^150 nothing changes but the
/// overflow.
INTERSTATE_HD inline double exp_parameter(double x) { return std::exp(x < 150.0 ? x : 150.0); }

INTERSTATE_HD inline Mode discretize(Discretization disc, double log_dt, double log_neg_re, double im, c64 B) {
    Mode m;
    m.dt = exp_parameter(log_dt);
    m.A = {-exp_parameter(log_neg_re), im};
    m.zeta = m.dt * m.A;
    if (disc == Discretization::zoh) {
        c64 phi, psi;
        phi_psi(m.zeta, phi, psi);
        m.Abar = exp(m.zeta);
        m.Bbar = m.dt * (phi * B);
    } else {
        const c64 inverse = reciprocal(c64{1.0 - 0.5 * m.zeta.re, -0.5 * m.zeta.im});
        m.Abar = c64{1.0 + 0.5 * m.zeta.re, 0.5 * m.zeta.im} * inverse;
        m.Bbar = m.dt * (B * inverse);
    }
    return m;
}

/// Gradients of one mode; log_dt is this mode's share of its channel's.
struct ModeGrads {
    double log_dt, log_neg_re, im;
    c64 B;
};

/// Backward of `discretize` (eq. 9 and 10) from the gradients of Abar and Bbar.
INTERSTATE_HD inline ModeGrads discretize_backward(Discretization disc, const Mode& m, c64 B, c64 dAbar, c64 dBbar) {
    // d Bbar / d dt is B e^zeta under zoh: written out, because as phi + zeta psi it cancels under
    // strong decay.
    c64 dzeta, b_over_B, decay;  // b_over_B = Bbar / (dt B);  decay: d Abar / d dt = A decay
    if (disc == Discretization::zoh) {
        c64 phi, psi;
        phi_psi(m.zeta, phi, psi);
        dzeta = conj(m.Abar) * dAbar + conj(m.dt * (B * psi)) * dBbar;
        b_over_B = phi;
        decay = m.Abar;
    } else {
        const c64 inverse = reciprocal(c64{1.0 - 0.5 * m.zeta.re, -0.5 * m.zeta.im});
        decay = inverse * inverse;
        dzeta = conj(decay) * (dAbar + conj((0.5 * m.dt) * B) * dBbar);
        b_over_B = inverse;
    }
    const double ddt = dot(B * decay, dBbar) + dot(m.A * decay, dAbar);
    return {.log_dt = m.dt * ddt,
            .log_neg_re = m.A.re * m.dt * dzeta.re,
            .im = m.dt * dzeta.im,
            .B = conj(m.dt * b_over_B) * dBbar};
}

/// Mode (h, n) of a call's parameters.
template <class P>
INTERSTATE_HD Mode mode_at(Discretization disc, const Params<P>& p, Index h, Index n) {
    return discretize(disc, p.log_dt(h), p.log_neg_re(h, n), p.im(h, n), cast<double>(p.B(h, n)));
}

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
