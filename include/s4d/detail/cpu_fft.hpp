// S4D on the CPU as one long convolution per sequence: the kernel K by cpu_kernel.hpp, the product by
// interstate/cpu/fft.hpp, channels on vector lanes. Equation numbers: docs/ops/s4d.md.
//
// Both directions of a bidirectional layer are one kernel with lags of both signs (eq. 12). D is part of
// K[0]. States (eq. 18) stand beside the convolution: the response of x0 and that of the upstream xT
// are powers of Abar, the final state and the gradients that belong to states are moments of u and dy.
// Gradients of the parameters go through dK, summed over sequences as values of transforms, and eq. 15.
//
// A transform takes the power of two that holds a sequence, so one of 2^k + 1 tokens costs that of 2^(k+1).
// Sequences of one length share the values of K; each new length transforms it again.
// A convolution by transforms mixes all tokens of a sequence: an Inf or NaN in u reaches all of its y,
// not only later ones as with the other methods. Other sequences are not touched.
#pragma once

#include <interstate/cpu/fft.hpp>
#include <s4d/detail/cpu_kernel.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

/// Tasks that split the recurrences, each with its own values of K and, in backward, its own dK: enough for
/// many threads where blocks of channels are few. Fixed by the shape, so that sums do not depend on threads.
inline Index fft_groups(const Shape& s, Index W) {
    const Index blocks = std::max<Index>(ceil_div(s.channels, W), 1);
    return std::min(s.states(), std::max<Index>(8 / blocks, 1));
}

/// Sums of a backward task for the gradients that belong to states: dAbar, dBbar, dC, (re, im) in float64.
inline constexpr Index state_sums = 6;

template <class A>
struct FftLayout {
    PowerLayout<A> powers;
    A* roots;
    A* kernel;        // (blocks, directions, kernel_size): K, D in its first element
    A* dK;            // (groups, blocks, directions, kernel_size), backward
    A* buffers;       // (threads, buffers_size): values of K, u, dy, dK; then a tile and scratch
    double* modes;    // (threads, 2, N, 4, W): starts and moments
    double* moments;  // (blocks, directions, N, 4, W): of dK, backward
    double* sums;     // (groups, blocks, N, state_sums, W), backward
    Index transform_size, kernel_size, buffers_size;

    FftLayout(Arena& arena, const Shape& s, pass p, int threads, Index W)
        : powers(arena, s, p == pass::backward, W) {
        const bool back = p == pass::backward;
        const Index blocks = ceil_div(s.channels, W), m = fft::size_for(s.length), groups = fft_groups(s, W);
        roots = arena.take<A>(fft::roots_size(m));
        transform_size = m * 2 * W;
        kernel_size = s.length * W;
        kernel = arena.take<A>(blocks * directions(s) * kernel_size);
        dK = arena.take<A>(back ? groups * blocks * directions(s) * kernel_size : 0);
        buffers_size = (back ? 4 : 2) * transform_size + tile_tokens * W + powers_scratch(W);
        buffers = arena.take<A>(threads * buffers_size);
        modes = arena.take<double>(threads * 2 * s.modes * 4 * W);
        moments = arena.take<double>(back ? blocks * directions(s) * s.modes * 4 * W : 0);
        sums = arena.take<double>(back ? groups * blocks * s.modes * state_sums * W : 0);
    }
};

/// What a task of either pass has, and the steps that both take.
template <class T>
struct FftTask {
    using A = acc_t<T>;
    Isa isa;
    PowerTables<A> tables;
    bool slopes, bidirectional;
    const A* roots;
    const A* kernel;  // (directions, kernel_size)
    Index kernel_size, h, width, W, modes;
    A* kernel_values;
    A* tile;              // and scratch behind it
    Index values_of = 0;  // size of the transform that kernel_values holds

    A* row(A* x, Index t) const { return x + t * 2 * W; }

    void forward_transform(A* x, Index m) const { simd::run_body<fft::Forward<A>>(isa, x, m, roots); }
    void inverse_transform(A* x, Index m) const { simd::run_body<fft::Inverse<A>>(isa, x, m, roots); }

    /// Values of K for transforms of size m; `length` taps, or as many as the kernel has.
    void transform_kernel(Index m) {
        const Index taps = std::min(m, kernel_size / W);
        std::fill_n(kernel_values, m * 2 * W, A(0));
        for (Index l = 0; l < taps; ++l) std::copy_n(kernel + l * W, W, row(kernel_values, l));
        if (bidirectional)
            for (Index l = 1; l < taps; ++l)
                for (Index lane = 0; lane < W; ++lane)
                    row(kernel_values, m - l)[W + lane] = -kernel[kernel_size + (l - 1) * W + lane];
        forward_transform(kernel_values, m);
        values_of = m;
    }
    void load_values(A* x, const View<const T, 3>& from, const Reading& reading, Index m) const {
        std::fill_n(x, m * 2 * W, A(0));
        simd::run_body<LoadTile<T>>(isa, x, 2 * W, from, reading.batch, reading.rows.begin, reading.length(),
                                    reading.length(), h, width);
        forward_transform(x, m);
    }
    void store(const A* x, const View<T, 3>& to, const Reading& reading) const {
        if (to && reading.length() > 0)
            simd::run_body<StoreTile<T>>(isa, x, 2 * W, to, reading.batch, reading.rows.begin,
                                         reading.length(), h, width);
    }
    /// x[k] += sum_n Re(factor(n, lane) z[n] Abar[n]^k) for a state z; backwards: of conj(z), from the end of
    /// the sequence. Z (N, 2, W) is scratch.
    template <class F>
    void add_response(const View<const complex<A>, 3>& z, Index i, bool backwards, F&& factor, double* Z,
                      A* x, Index length) const {
        load_state(Z, z, i, h, width, modes, W, backwards ? -1.0 : 1.0);
        for (Index n = 0; n < modes; ++n)
            for (Index lane = 0; lane < W; ++lane) {
                double* at = Z + 2 * n * W + lane;
                const c64 start = factor(n, lane) * c64{at[0], at[W]};
                at[0] = start.re;
                at[W] = start.im;
            }
        const auto add = [&](const A* from, Index begin, Index count) {
            for (Index t = 0; t < count; ++t) {
                A* to = row(x, backwards ? length - 1 - begin - t : begin + t);
                for (Index lane = 0; lane < W; ++lane) to[lane] += from[t * W + lane];
            }
        };
        each_response(isa, tables, slopes, Z, tile, modes, length, add);
    }
    /// Moments S (N, 2 or 4, W) of an input, the power 0 at its last token, or at its first in reverse.
    void moments(double* S, const View<const T, 3>& from, const Reading& reading) const {
        const auto load = [&](A* to, Index begin, Index count) {
            simd::run_body<LoadTile<T>>(isa, to, W, reading(from), reading.batch, reading.rows.begin + begin,
                                        count, count, h, width);
        };
        all_moments(isa, tables, slopes, S, tile, modes, reading.length(), load);
    }
    c64 exact(Index n, Index lane, Index which) const {
        const double* at = tables.exact + (n * Exact::rows + which) * W + lane;
        return {at[0], at[W]};
    }
};

/// The tables and K of every block.
template <class A, class P>
void fft_prepare(const cpu& exec, const Options& options, const Params<P>& params, const Shape& s,
                 const FftLayout<A>& w, Index W) {
    fill_powers<A>(exec, options, params, w.powers);
    fft::fill_roots(w.roots, fft::size_for(s.length), exec.threads);
    parallel_for(ceil_div(s.channels, W), exec.threads, [&](Index block, int worker) {
        double* Z = w.modes + worker * 2 * s.modes * 4 * W;
        A* tile = w.buffers + worker * w.buffers_size;
        for (Index d = 0; d < directions(s); ++d) {
            A* K = w.kernel + (block * directions(s) + d) * w.kernel_size;
            kernel_start(w.powers.block(block), d == 1, s.modes, W, Z);
            each_response(exec.isa, w.powers.block(block), w.powers.slopes, Z, tile, s.modes, s.length,
                          [&](const A* from, Index begin, Index count) {
                              std::copy_n(from, count * W, K + begin * W);
                          });
            if (d == 0 && params.D && s.length > 0)
                for (Index lane = 0; lane < std::min(W, s.channels - block * W); ++lane)
                    K[lane] = static_cast<A>(static_cast<double>(K[lane]) +
                                             static_cast<double>(params.D(block * W + lane)));
        }
    });
}

template <class T, class A>
FftTask<T> fft_task(const cpu& exec, const Shape& s, const FftLayout<A>& w, Index W, Index block,
                    int worker) {
    A* buffers = w.buffers + worker * w.buffers_size;
    A* tile = buffers + w.buffers_size - tile_tokens * W - powers_scratch(W);
    return {exec.isa,
            w.powers.block(block),
            w.powers.slopes,
            s.bidirectional,
            w.roots,
            w.kernel + block * directions(s) * w.kernel_size,
            w.kernel_size,
            block * W,
            std::min(W, s.channels - block * W),
            W,
            s.modes,
            buffers,
            tile};
}

/// exec has been resolved.
template <class T, class P>
void fft_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out,
                 Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W), N = s.modes,
                groups = fft_groups(s, W);
    Arena arena(ws.data);
    const FftLayout<A> w(arena, s, pass::forward, exec.threads, W);
    fft_prepare<A>(exec, options, in.params, s, w, W);
    zero_outside_sequences(out.y, in.cu_seqlens);
    parallel_for(groups * blocks, exec.threads, [&](Index at, int worker) {
        FftTask<T> task = fft_task<T>(exec, s, w, W, at % blocks, worker);
        A* x = task.kernel_values + w.transform_size;
        double* Z = w.modes + worker * 2 * N * 4 * W;
        for (Index i = at / blocks; i < s.states(); i += groups) {
            const auto [batch, rows] = place_of(in.cu_seqlens, s, i);
            const Reading reading{batch, rows};
            const Index length = reading.length(), m = fft::size_for(length);
            if (length > 0) {
                if (task.values_of != m) task.transform_kernel(m);
                task.load_values(x, in.u, reading, m);
                simd::run_body<fft::Convolve<A>>(exec.isa, static_cast<const A*>(task.kernel_values), x, m,
                                                 A(1) / static_cast<A>(m));
                task.inverse_transform(x, m);
                if (in.x0) {
                    const auto factor = [&](Index n, Index lane) {
                        return task.exact(n, lane, Exact::C) * task.exact(n, lane, Exact::Abar);
                    };
                    task.add_response(in.x0, i, false, factor, Z, x, length);
                }
                task.store(x, out.y, reading);
            }
            if (out.xT) {
                task.moments(Z, in.u, reading);
                for (Index n = 0; n < N; ++n)
                    for (Index lane = 0; lane < task.width; ++lane) {
                        const double* S = Z + 2 * n * W + lane;
                        c64 xT = task.exact(n, lane, Exact::Bbar) * c64{S[0], S[W]};
                        if (in.x0)
                            xT += raise(task.exact(n, lane, Exact::Abar), length) *
                                  cast<double>(in.x0(i, task.h + lane, n));
                        out.xT(i, task.h + lane, n) = cast<A>(xT);
                    }
            }
        }
    });
}

/// dK (directions, kernel_size) += the residue of the values in sum, which are cleared.
template <class T>
void fft_flush(FftTask<T>& task, acc_t<T>* sum, acc_t<T>* dK) {
    const Index m = task.values_of, W = task.W, taps = std::min(m, task.kernel_size / W);
    if (m == 0) return;
    task.inverse_transform(sum, m);
    for (Index l = 0; l < taps; ++l)
        for (Index lane = 0; lane < W; ++lane) dK[l * W + lane] += task.row(sum, l)[lane];
    if (task.bidirectional)
        for (Index l = 1; l < taps; ++l)
            for (Index lane = 0; lane < W; ++lane)
                dK[task.kernel_size + (l - 1) * W + lane] -= task.row(sum, m - l)[W + lane];
}

template <class T, class P>
void fft_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in,
                  const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W), N = s.modes,
                groups = fft_groups(s, W);
    const Index both = directions(s);
    Arena arena(ws.data);
    const FftLayout<A> w(arena, s, pass::backward, exec.threads, W);
    fft_prepare<A>(exec, options, in.params, s, w, W);
    zero_outside_sequences(grads.u, in.cu_seqlens);
    parallel_for(groups * blocks, exec.threads, [&](Index at, int worker) {
        FftTask<T> task = fft_task<T>(exec, s, w, W, at % blocks, worker);
        A* x = task.kernel_values + w.transform_size;
        A* dy = x + w.transform_size;
        A* sum = dy + w.transform_size;
        A* dK = w.dK + at * both * w.kernel_size;
        double* S = w.modes + worker * 2 * N * 4 * W;
        double* Z = S + N * 4 * W;
        double* sums = w.sums + at * N * state_sums * W;
        std::fill_n(dK, both * w.kernel_size, A(0));
        std::fill_n(sums, N * state_sums * W, 0.0);
        for (Index i = at / blocks; i < s.states(); i += groups) {
            const auto [batch, rows] = place_of(in.cu_seqlens, s, i);
            const Reading reading{batch, rows};
            const Index length = reading.length(), m = fft::size_for(length);
            if (length > 0) {
                if (task.values_of != m) {
                    fft_flush(task, sum, dK);
                    task.transform_kernel(m);
                    std::fill_n(sum, m * 2 * W, A(0));
                }
                task.load_values(x, in.u, reading, m);
                task.load_values(dy, upstream.y, reading, m);
                simd::run_body<fft::Correlate<A>>(exec.isa, static_cast<const A*>(x),
                                                  static_cast<const A*>(task.kernel_values), dy, sum, m,
                                                  A(1) / static_cast<A>(m));
            }
            const auto each = [&](auto&& f) {
                for (Index n = 0; n < N; ++n)
                    for (Index lane = 0; lane < task.width; ++lane) {
                        double* to = sums + n * state_sums * W + lane;
                        DiscreteGrads g;
                        f(n, lane, g);
                        const c64 gs[] = {g.Abar, g.Bbar, g.C};
                        for (int k = 0; k < 3; ++k) {
                            to[2 * k * W] += gs[k].re;
                            to[(2 * k + 1) * W] += gs[k].im;
                        }
                    }
            };
            const auto moment = [&](Index n, Index lane, Index which) {
                const double* from = S + (n * 4 + which) * W + lane;
                return c64{from[0], from[W]};
            };
            const auto x0 = [&](Index n, Index lane) {
                return in.x0 ? cast<double>(in.x0(i, task.h + lane, n)) : c64{};
            };
            if (grads.x0 || in.x0) {  // y's response to x0 (eq. 18): moments of dy from its first token
                task.moments(S, upstream.y, Reading{batch, rows, true});
                each([&](Index n, Index lane, DiscreteGrads& g) {
                    const c64 C2 = task.exact(n, lane, Exact::C), Abar = task.exact(n, lane, Exact::Abar);
                    const c64 q = moment(n, lane, 0), start = x0(n, lane);
                    g.C = 2.0 * conj(Abar * start * q);
                    g.Abar = conj(C2 * start * (q + Abar * moment(n, lane, 2)));
                    if (grads.x0) grads.x0(i, task.h + lane, n) = cast<A>(conj(C2 * Abar * q));
                });
            }
            if (upstream.xT) {  // xT's dependence on u and x0: moments of u from its last token
                task.moments(S, in.u, reading);
                each([&](Index n, Index lane, DiscreteGrads& g) {
                    const c64 Abar = task.exact(n, lane, Exact::Abar),
                              Bbar = task.exact(n, lane, Exact::Bbar);
                    const c64 dxT = cast<double>(upstream.xT(i, task.h + lane, n));
                    const c64 before = length > 0 ? raise(Abar, length - 1) : c64{};
                    const c64 power = length > 0 ? before * Abar : c64{1.0, 0.0};
                    g.Bbar = conj(moment(n, lane, 0)) * dxT;
                    g.Abar = conj(Bbar * moment(n, lane, 2) +
                                  static_cast<double>(length) * (before * x0(n, lane))) *
                             dxT;
                    if (grads.x0) {
                        const c64 more = conj(power) * dxT;
                        auto& dx0 = grads.x0(i, task.h + lane, n);
                        dx0 = cast<A>(cast<double>(dx0) + more);
                    }
                });
            }
            if (length > 0 && grads.u) {
                task.inverse_transform(dy, m);
                if (upstream.xT) {
                    const auto factor = [&](Index n, Index lane) { return task.exact(n, lane, Exact::Bbar); };
                    task.add_response(upstream.xT, i, true, factor, Z, dy, length);
                }
                task.store(dy, grads.u, reading);
            }
        }
        fft_flush(task, sum, dK);
    });
    // dK of all groups, in a fixed order, to moments: from the last tap to the first.
    parallel_for(blocks * both, exec.threads, [&](Index at, int worker) {
        const Index block = at / both, d = at % both;
        A* tile = w.buffers + worker * w.buffers_size;
        double* S = w.moments + at * N * 4 * W;
        const auto load = [&](A* to, Index begin, Index count) {
            for (Index group = 0; group < groups; ++group) {
                const A* last =
                    w.dK + ((group * blocks + block) * both + d) * w.kernel_size + (s.length - 1 - begin) * W;
                for (Index t = 0; t < count; ++t)
                    for (Index lane = 0; lane < W; ++lane) to[t * W + lane] += last[lane - t * W];
            }
        };
        all_moments(exec.isa, w.powers.block(block), true, S, tile, N, s.length, load);
    });
    parallel_for(s.channels, exec.threads, [&](Index h, int) {
        const Index block = h / W, lane = h % W;
        double dD = 0.0;
        for (Index group = 0; group < groups && s.length > 0; ++group)
            dD += static_cast<double>(w.dK[(group * blocks + block) * both * w.kernel_size + lane]);
        write_grads(options, in.params, grads.params, h, dD, [&](Index n, const Mode& mode) {
            const auto of = [&](Index d, const auto& C) {
                const double* S = w.moments + ((block * both + d) * N + n) * 4 * W + lane;
                return kernel_gradients(mode, cast<double>(C(h, n)), {S[0], S[W]}, {S[2 * W], S[3 * W]});
            };
            DiscreteGrads g = of(0, in.params.C);
            if (both == 2) {
                const DiscreteGrads r = of(1, in.params.C_reverse);
                g.Abar += r.Abar;
                g.Bbar += r.Bbar;
                g.C_reverse = r.C;
            }
            for (Index group = 0; group < groups; ++group) {
                const double* from = w.sums + ((group * blocks + block) * N + n) * state_sums * W + lane;
                g.Abar += {from[0], from[W]};
                g.Bbar += {from[2 * W], from[3 * W]};
                g.C += {from[4 * W], from[5 * W]};
            }
            return g;
        });
    });
}

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
