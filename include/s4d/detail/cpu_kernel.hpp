// The Vandermonde kernel on the CPU (eq. 14) and its backward (eq. 15), tile by tile of 256 tokens: K is
// the response of the modes to 2 C Bbar, its gradients are moments of dK. Both in cpu_powers.hpp.
// Equation numbers: docs/ops/s4d.md.
#pragma once

#include <s4d/detail/cpu_powers.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

/// Gradients of one mode's Abar, Bbar and C from the moments of dK: S = sum_l dK Abar^l, slope = dS/dAbar.
inline DiscreteGrads kernel_gradients(const Mode& mode, c64 C, c64 S, c64 slope) {
    return {2.0 * conj(C * mode.Bbar * slope), 2.0 * conj(C * S), 2.0 * conj(mode.Bbar * S), {}};
}

/// Start of the kernel's response: Z (N, 2, W) = 2 C Bbar, of C_reverse where `reverse`.
template <class A>
void kernel_start(const PowerTables<A>& t, bool reverse, Index modes, Index W, double* Z) {
    for (Index n = 0; n < modes; ++n)
        for (Index lane = 0; lane < W; ++lane) {
            const double* exact = t.exact + n * Exact::rows * W + lane;
            const auto at = [&](Index row) { return c64{exact[row * W], exact[(row + 1) * W]}; };
            const c64 z = at(reverse ? Exact::C_reverse : Exact::C) * at(Exact::Bbar);
            Z[2 * n * W + lane] = z.re;
            Z[(2 * n + 1) * W + lane] = z.im;
        }
}

template <class A>
struct KernelLayout {
    PowerLayout<A> powers;
    A* tiles;       // (threads, tiles_size): a tile, then scratch
    double* modes;  // (blocks, N, 2 or 4, W): in forward the start, in backward moments of dK
    Index tiles_size;

    KernelLayout(Arena& arena, const Shape& s, pass p, int threads, Index W)
        : powers(arena, s, p == pass::backward, W) {
        tiles_size = tile_tokens * W + powers_scratch(W);
        tiles = arena.take<A>(threads * tiles_size);
        modes = arena.take<double>(ceil_div(s.channels, W) * s.modes * (p == pass::backward ? 4 : 2) * W);
    }
};

template <class A, class P>
void kernel_forward(const cpu& exec, const Options& options, const Params<P>& params, const View<A, 2>& K,
                    Workspace ws) {
    const Shape s = shape_of(params, K);
    const Index W = simd::lanes<A>(exec.isa), N = s.modes;
    Arena arena(ws.data);
    const KernelLayout<A> w(arena, s, pass::forward, exec.threads, W);
    fill_powers<A>(exec, options, params, w.powers);
    parallel_for(ceil_div(s.channels, W), exec.threads, [&](Index block, int worker) {
        A* tile = w.tiles + worker * w.tiles_size;
        double* Z = w.modes + block * N * 2 * W;
        kernel_start(w.powers.block(block), false, N, W, Z);
        const auto store = [&](const A* from, Index begin, Index count) {
            for (Index lane = 0; lane < std::min(W, s.channels - block * W); ++lane)
                for (Index t = 0; t < count; ++t) K(block * W + lane, begin + t) = from[t * W + lane];
        };
        each_response(exec.isa, w.powers.block(block), false, Z, tile, N, s.length, store);
    });
}

template <class A, class P>
void kernel_backward(const cpu& exec, const Options& options, const Params<P>& params,
                     const View<const A, 2>& dK, const BasicParams<P, complex<P>>& grads, Workspace ws) {
    const Shape s = shape_of(params, dK);
    const Index W = simd::lanes<A>(exec.isa), N = s.modes;
    Arena arena(ws.data);
    const KernelLayout<A> w(arena, s, pass::backward, exec.threads, W);
    fill_powers<A>(exec, options, params, w.powers);
    parallel_for(ceil_div(s.channels, W), exec.threads, [&](Index block, int worker) {
        A* tile = w.tiles + worker * w.tiles_size;
        double* S = w.modes + block * N * 4 * W;
        // From the last lag to the first: powers count from the first.
        const auto load = [&](A* to, Index begin, Index count) {
            for (Index lane = 0; lane < std::min(W, s.channels - block * W); ++lane)
                for (Index t = 0; t < count; ++t)
                    to[t * W + lane] = dK(block * W + lane, s.length - 1 - begin - t);
        };
        all_moments(exec.isa, w.powers.block(block), true, S, tile, N, s.length, load);
    });
    parallel_for(s.channels, exec.threads, [&](Index h, int) {
        write_grads(options, params, grads, h, 0.0, [&](Index n, const Mode& mode) {
            const double* S = w.modes + (h / W * N + n) * 4 * W + h % W;
            return kernel_gradients(mode, cast<double>(params.C(h, n)), {S[0], S[W]}, {S[2 * W], S[3 * W]});
        });
    });
}

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
