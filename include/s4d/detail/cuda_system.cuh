// What every CUDA method of S4D shares. A method runs *systems*: in the order of processing, with
// e before token t,
//
//     y[t] = Re sum_n gamma[n] x[t-1,n] + K0 u[t],    x[t] = A x[t-1] + beta u[t]
//
// The causal half of the layer is (beta, gamma, K0) = (Bbar, 2 C Abar, 2 Re sum C Bbar + D), the reversed
// half is (Bbar, 2 C_reverse, 0) run from the last token to the first. The gradient of u is the same system
// with beta and gamma exchanged, run the other way; its state is the conjugate of the gradient of x. So
// two kernels make a method: one that runs a system, and one that sums the gradients of A, beta and gamma
// from the states of both runs. Derivation: docs/ops/s4d.md, "As systems".
#pragma once

#include <interstate/cuda/sequences.cuh>
#include <interstate/dispatch.hpp>
#include <s4d/detail/discretize.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

/// A mode of a system, and which half of the layer the system is.
struct SystemMode {
    c64 A, beta, gamma;
};
enum class Half : std::uint8_t { causal, reversed };

/// Sums over tokens that the gradients of a system's parameters need, conjugated (eq. 20).
struct SystemSums {
    c64 A, beta, gamma;
};

/// Modes [first, first + count) of a system: those of one run, which takes pointers to the first of them; strides are
/// those of all. What runs of the same system leave adds up.
struct ModeRange {
    Index first = 0, count = 0;
};

/// One run of a system over every recurrence.
template <class T>
struct SystemRun {
    using A = acc_t<T>;
    View<const T, 3> u{};
    View<T, 3> y{};                       // may be null: states only
    View<const std::int32_t, 1> cu{};
    bool backwards = false;               // from the last token to the first
    View<const complex<A>, 3> initial{};  // may be null: zero
    View<complex<A>, 3> final{};          // may be null
    bool conjugate = false;               // initial and final are conjugates of the state
    complex<A>* checkpoints = nullptr;    // (slots, H, N) the state that enters each tile; may be null
    A* addend = nullptr;                  // (B, H, L), added to y before it is rounded; may be null
    A* sum = nullptr;                     // (B, H, L), receives y instead of `y`; may be null, or `addend`
    Shape shape{};
    ModeRange modes{};                    // only the chunked method, which sets it
};

/// How many tiles are numbered (device::first_tile). Packed, some numbers stay unused.
INTERSTATE_HD inline Index tile_count(const Shape& s, Index tile) {
    if (s.states() == 0) return 0;
    return s.packed() ? s.length / tile + s.sequences : s.batch * ceil_div(s.length, tile);
}

/// Doubles that a method's gradient kernel leaves for `finish_gradients_kernel`, per part: sums (parts, H, N)
/// and kernel gradients (parts, H, lags), lags 0 the feedthrough.
inline constexpr int max_lags = 32, finish_threads = 64;
struct PartialSums {
    SystemSums* modes = nullptr;
    double* lags = nullptr;
    int parts = 0, lag_count = 0;
};

inline namespace INTERSTATE_KERNELS {

/// The system of one half in float64 (eq. 2), and what its mode adds to K0.
template <class P>
__device__ SystemMode system_mode(Discretization disc, const Params<P>& p, Half half, Index h, Index n, double& K0) {
    const Mode m = mode_at(disc, p, h, n);
    if (half == Half::reversed) return {m.Abar, m.Bbar, 2.0 * cast<double>(p.C_reverse(h, n))};
    const c64 C = cast<double>(p.C(h, n));
    K0 += 2.0 * (C * m.Bbar).re;
    return {m.Abar, m.Bbar, 2.0 * (C * m.Abar)};
}

/// One block a channel, one thread a mode: adds the parts in order, then the chain rule (eq. 9, 10, 20 and 21).
template <class P>
__global__ void finish_gradients_kernel(Discretization disc, Params<P> p, Index N, PartialSums causal,
                                        PartialSums reversed, BasicParams<P, complex<P>> grads) {
    const Index h = blockIdx.x, H = gridDim.x;
    __shared__ double lags[2][max_lags];
    for (int i = threadIdx.x; i < 2 * max_lags; i += blockDim.x) {
        const PartialSums& s = i < max_lags ? causal : reversed;
        const int l = i % max_lags;
        double sum = 0.0;
        if (l < s.lag_count)
            for (int part = 0; part < s.parts; ++part) sum += s.lags[(part * H + h) * s.lag_count + l];
        lags[i / max_lags][l] = sum;
    }
    __syncthreads();
    __shared__ double log_dt[finish_threads];
    double dlog_dt = 0.0;
    for (Index n = threadIdx.x; n < N; n += blockDim.x) {
        const Mode m = mode_at(disc, p, h, n);
        const auto total = [&](const PartialSums& s, const double* lag, c64 gamma) {
            SystemSums sum{};
            for (int part = 0; part < s.parts; ++part) {
                const SystemSums& x = s.modes[(part * H + h) * N + n];
                sum.A += x.A;
                sum.beta += x.beta;
                sum.gamma += x.gamma;
            }
            // What goes through the kernel inside chunks, K[l] = Re(gamma A^(l-1) beta).
            c64 power{1.0, 0.0}, slope{0.0, 0.0};
            for (int l = 1; l < s.lag_count; ++l) {
                const double dK = lag[l];
                sum.gamma += dK * (power * m.Bbar);
                sum.beta += dK * (power * gamma);
                sum.A += dK * (slope * m.Bbar * gamma);
                slope = slope * m.Abar + power;
                power = power * m.Abar;
            }
            return SystemSums{conj(sum.A), conj(sum.beta), conj(sum.gamma)};
        };
        const c64 C = cast<double>(p.C(h, n));
        const double dK0 = lags[0][0];
        const SystemSums forward = total(causal, lags[0], 2.0 * (C * m.Abar));
        c64 dAbar = forward.A + 2.0 * (conj(C) * forward.gamma);
        c64 dBbar = forward.beta + (2.0 * dK0) * conj(C);
        const c64 dC = 2.0 * (conj(m.Abar) * forward.gamma) + (2.0 * dK0) * conj(m.Bbar);
        if (grads.C) grads.C(h, n) = cast<P>(dC);
        if (p.C_reverse) {
            const SystemSums reverse = total(reversed, lags[1], 2.0 * cast<double>(p.C_reverse(h, n)));
            dAbar += reverse.A;
            dBbar += reverse.beta;
            if (grads.C_reverse) grads.C_reverse(h, n) = cast<P>(2.0 * reverse.gamma);
        } else if (grads.C_reverse) {
            grads.C_reverse(h, n) = {};
        }
        const ModeGrads g = discretize_backward(disc, m, cast<double>(p.B(h, n)), dAbar, dBbar);
        dlog_dt += g.log_dt;
        if (grads.log_neg_re) grads.log_neg_re(h, n) = static_cast<P>(g.log_neg_re);
        if (grads.im) grads.im(h, n) = static_cast<P>(g.im);
        if (grads.B) grads.B(h, n) = cast<P>(g.B);
    }
    log_dt[threadIdx.x] = dlog_dt;
    __syncthreads();
    if (threadIdx.x == 0) {
        double sum = 0.0;
        for (unsigned i = 0; i < blockDim.x; ++i) sum += log_dt[i];
        if (grads.log_dt) grads.log_dt(h) = static_cast<P>(sum);
        if (grads.D) grads.D(h) = static_cast<P>(lags[0][0]);
    }
}

}  // namespace INTERSTATE_KERNELS

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
