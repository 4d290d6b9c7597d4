// S4D on the CPU as a recurrence: vector lanes are channels, time runs in the inner loop.
//
// Pairs of modes run down a tile of 256 tokens with state and coefficients in registers: 8 FMAs per mode
// and token, and the tile is read from L1. Backward recomputes the states of one tile from a checkpoint
// (one per 256 tokens, kept by forward) and walks it in reverse.
//
// Precision. A float recurrence drifts: Abar rounded to float turns the phase by up to 4e-3 over 65,536
// tokens, and rounding the state at every token adds noise that a slowly decaying mode never forgets.
// So with float tiles the state is carried in float64 from one block of 32 tokens to the next,
//     X <- Abar^32 X + sum_l (Abar^l Bbar) u[31 - l],
// the sum by a float table, and the float recurrence only serves the outputs of its own block: 2 more
// FMAs a token, errors near 1e-6 at any length.
//
// Equation numbers: docs/ops/s4d.md.
#pragma once

#include <s4d/detail/cpu_tile.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

inline constexpr Index carry_tokens = 32;  // divides tile_tokens

/// Coefficients of one mode and one block of channels, W lanes each; C is 2C.
enum Coefficient { Are, Aim, Bre, Bim, Cre, Cim, coefficients };

/// With float tiles, what carries the state of a mode from block to block, W lanes each: Abar and
/// Abar^carry_tokens in float64, and the response table, (carry_tokens, re/im).
enum Carry { A1re, A1im, ABre, ABim, carries };
inline constexpr Index table_rows = 2 * carry_tokens;

template <class A>
inline constexpr bool carried = std::is_same_v<A, float>;

/// Gradients that a backward task accumulates for a mode, W lanes each, in float64; behind those of all modes
/// is that of D.
enum Partial { dAre, dAim, dBre, dBim, dCre, dCim, partials };

template <class A>
struct ScanLayout {
    TileMemory<A> memory;
    A* coefficient;  // (directions, blocks, N, coefficients, W)
    double* carry;   // (blocks, N, carries, W), float tiles
    A* response;     // (blocks, N, table_rows, W), float tiles: Abar^l Bbar
    A* response_dy;  // (directions, blocks, N, table_rows, W), float tiles in backward: conj(2 C Abar^(l+1))
    A* feedthrough;  // (directions, blocks, W): D, and zero for the reversed direction

    ScanLayout(Arena& arena, const Shape& s, pass p, int threads, Index W)
        : memory(arena, s, p, threads, W, p == pass::backward ? 2 * 2 * (tile_tokens + 1) * W : 0,
                 (s.modes * partials + 1) * W) {
        const Index blocks = ceil_div(s.channels, W), modes = blocks * s.modes, both = directions(s);
        const bool back = p == pass::backward;
        coefficient = arena.take<A>(both * modes * coefficients * W);
        carry = carried<A> ? arena.take<double>(modes * carries * W) : nullptr;
        response = carried<A> ? arena.take<A>(modes * table_rows * W) : nullptr;
        response_dy = carried<A> && back ? arena.take<A>(both * modes * table_rows * W) : nullptr;
        feedthrough = arena.take<A>(both * blocks * W);
    }
};

/// The pair of rows at p, converted to the accumulator where it is float64 state.
template <class V, class S>
INTERSTATE_INLINE Complexes<V> load_pair(const S* p) {
    using A = std::remove_cvref_t<decltype(V{}.v[0])>;
    if constexpr (std::is_same_v<S, A>) {
        return {simd::load<V>(p), simd::load<V>(p + V::lanes)};
    } else {
        A lanes[2 * V::lanes];
        for (int i = 0; i < 2 * V::lanes; ++i) lanes[i] = static_cast<A>(p[i]);
        return {simd::load<V>(lanes), simd::load<V>(lanes + V::lanes)};
    }
}
template <class V, class S>
INTERSTATE_INLINE void store_pair(S* p, const Complexes<V>& x) {
    for (int i = 0; i < V::lanes; ++i) {
        p[i] = static_cast<S>(x.re[i]);
        p[V::lanes + i] = static_cast<S>(x.im[i]);
    }
}

/// The carry of the top comment over `count` tokens: state <- power state + local, where power is
/// Abar^count, conjugated in backward (sign = -1).
template <class V>
INTERSTATE_INLINE void carry_state(double* state, const double* carry, const Complexes<V>& local, Index count,
                                   double sign) {
    constexpr int W = V::lanes;
    for (int i = 0; i < W; ++i) {
        double pr = carry[ABre * W + i], pi = carry[ABim * W + i];
        if (count != carry_tokens) {
            const double ar = carry[A1re * W + i], ai = carry[A1im * W + i];
            pr = 1.0;
            pi = 0.0;
            for (Index t = 0; t < count; ++t) {
                const double r = pr * ar - pi * ai;
                pi = pr * ai + pi * ar;
                pr = r;
            }
        }
        pi *= sign;
        const double xr = state[i], xi = state[W + i];
        state[i] = pr * xr - pi * xi + static_cast<double>(local.re[i]);
        state[W + i] = pr * xi + pi * xr + static_cast<double>(local.im[i]);
    }
}

/// One token of eq. 3.
template <class V>
INTERSTATE_INLINE void advance(Complexes<V>& x, const Complexes<V>& a, const Complexes<V>& b, const V& u) {
    const V re = simd::fnma(a.im, x.im, simd::fma(a.re, x.re, b.re * u));
    const V im = simd::fma(a.im, x.re, simd::fma(a.re, x.im, b.im * u));
    x.re = re;
    x.im = im;
}

/// Carries one mode's state, or in backward (sign = -1) the gradient of it (eq. 6), over `count` tokens of a
/// tile; table[k] is what the token at in + k step leaves in it.
template <class V, class A>
INTERSTATE_INLINE void carry_over(double* state, const double* carry, const A* table, const A* in, Index step,
                                  Index count, double sign) {
    constexpr int W = V::lanes;
    Complexes<V> local{simd::broadcast<V>(0.0), simd::broadcast<V>(0.0)};
    for (Index k = 0; k < count; ++k) {
        const V x = simd::load<V>(in + k * step);
        local.re = simd::fma(simd::load<V>(table + k * 2 * W), x, local.re);
        local.im = simd::fma(simd::load<V>(table + (k * 2 + 1) * W), x, local.im);
    }
    carry_state(state, carry, local, count, sign);
}

/// The tables of one block of channels, from mode `n` on.
template <class A>
struct ModeTables {
    const A* coefficient;
    const double* carry;
    const A* response;
    const A* response_dy;

    INTERSTATE_INLINE ModeTables from(Index n, Index W) const {
        return {offset(coefficient, n * coefficients * W), offset(carry, n * carries * W),
                offset(response, n * table_rows * W), offset(response_dy, n * table_rows * W)};
    }
    /// Tables that this dtype or pass has no use for are null.
    template <class E>
    static INTERSTATE_INLINE const E* offset(const E* p, Index n) {
        return p ? p + n : nullptr;
    }
};

template <class A>
struct ScanForward {
    struct Args : ForwardTile<A> {
        ModeTables<A> tables;
        const A* feedthrough;
    };

    /// A pair of modes (or the odd one) down a tile; tables and state start at the first of them.
    template <int Modes, class V>
    static INTERSTATE_INLINE void tile(const A* u, A* y, double* state, const ModeTables<A>& tables,
                                       Index count) {
        constexpr int W = V::lanes;
        Complexes<V> x[Modes], a[Modes], b[Modes], c[Modes];
        for (int m = 0; m < Modes; ++m) {
            const A* k = tables.coefficient + m * coefficients * W;
            x[m] = load_pair<V>(state + 2 * m * W);
            a[m] = load_pair<V>(k + Are * W);
            b[m] = load_pair<V>(k + Bre * W);
            c[m] = load_pair<V>(k + Cre * W);
        }
        for (Index begin = 0; begin < count; begin += carry_tokens) {
            const Index end = begin + carry_tokens < count ? begin + carry_tokens : count;
            for (Index t = begin; t < end; ++t) {
                const V ut = simd::load<V>(u + t * W);
                V yt = simd::load<V>(y + t * W);
                for (int m = 0; m < Modes; ++m) {
                    advance(x[m], a[m], b[m], ut);
                    yt = simd::fma(c[m].re, x[m].re, simd::fnma(c[m].im, x[m].im, yt));  // eq. 4
                }
                simd::store(y + t * W, yt);
            }
            if constexpr (carried<A>)
                for (int m = 0; m < Modes; ++m) {
                    const ModeTables<A> mode = tables.from(m, W);
                    carry_over<V>(state + 2 * m * W, mode.carry, mode.response, u + (end - 1) * W, Index{-W},
                                  end - begin, 1.0);
                    x[m] = load_pair<V>(state + 2 * m * W);
                }
        }
        if constexpr (!carried<A>)
            for (int m = 0; m < Modes; ++m) store_pair(state + 2 * m * W, x[m]);
    }

    template <class Set>
    static INTERSTATE_INLINE void run(const Args& args) {
        using V = simd::Native<Set, A>;
        constexpr int W = V::lanes;
        const V d = simd::load<V>(args.feedthrough);
        for (Index t = 0; t < args.count; ++t) simd::store(args.y + t * W, d * simd::load<V>(args.u + t * W));
        Index n = 0;
        for (; n + 2 <= args.modes; n += 2)
            tile<2, V>(args.u, args.y, args.state + 2 * n * W, args.tables.from(n, W), args.count);
        if (n < args.modes)
            tile<1, V>(args.u, args.y, args.state + 2 * n * W, args.tables.from(n, W), args.count);
    }
};

template <class A>
struct ScanBackward {
    struct Args : BackwardTile<A> {
        ModeTables<A> tables;
        const A* feedthrough;
    };

    template <class V>
    static INTERSTATE_INLINE void add(double* sum, const V& x) {
        for (int lane = 0; lane < V::lanes; ++lane) sum[lane] += static_cast<double>(x[lane]);
    }
    template <class V>
    static INTERSTATE_INLINE void add(double* sum, const Complexes<V>& x) {
        add(sum, x.re);
        add(sum + V::lanes, x.im);
    }

    /// Recomputes the states of a tile from its checkpoint into x: x[0] before the first token, x[t+1]
    /// after token t, each (Modes, 2, W).
    template <int Modes, class V>
    static INTERSTATE_INLINE void recompute(const A* u, A* x, const A* checkpoint, Index lane_stride,
                                            const ModeTables<A>& tables, Index count) {
        constexpr int W = V::lanes;
        Complexes<V> s[Modes], a[Modes], b[Modes];
        double state[Modes * 2 * W];
        for (int m = 0; m < Modes; ++m) {
            const A* k = tables.coefficient + m * coefficients * W;
            const A* from = checkpoint + 2 * m * lane_stride;
            s[m] = {simd::load<V>(from), simd::load<V>(from + lane_stride)};
            store_pair(state + 2 * m * W, s[m]);
            store_pair(x + 2 * m * W, s[m]);
            a[m] = load_pair<V>(k + Are * W);
            b[m] = load_pair<V>(k + Bre * W);
        }
        for (Index begin = 0; begin < count; begin += carry_tokens) {
            const Index end = begin + carry_tokens < count ? begin + carry_tokens : count;
            for (Index t = begin; t < end; ++t) {
                const V ut = simd::load<V>(u + t * W);
                for (int m = 0; m < Modes; ++m) {
                    advance(s[m], a[m], b[m], ut);
                    simd::store(x + ((t + 1) * Modes + m) * 2 * W, s[m].re);
                    simd::store(x + (((t + 1) * Modes + m) * 2 + 1) * W, s[m].im);
                }
            }
            if constexpr (carried<A>)
                for (int m = 0; m < Modes; ++m) {
                    const ModeTables<A> mode = tables.from(m, W);
                    carry_over<V>(state + 2 * m * W, mode.carry, mode.response, u + (end - 1) * W, Index{-W},
                                  end - begin, 1.0);
                    s[m] = load_pair<V>(state + 2 * m * W);
                }
        }
    }

    template <int Modes, class V>
    static INTERSTATE_INLINE void tile(const A* u, const A* dy, A* du, double* g_state, const A* x,
                                       const ModeTables<A>& tables, double* partial, Index count) {
        constexpr int W = V::lanes;
        const V zero = simd::broadcast<V>(0.0);
        Complexes<V> a[Modes], b[Modes], c[Modes], g[Modes], da[Modes], db[Modes], dc[Modes];
        for (int m = 0; m < Modes; ++m) {
            const A* k = tables.coefficient + m * coefficients * W;
            a[m] = load_pair<V>(k + Are * W);
            b[m] = load_pair<V>(k + Bre * W);
            c[m] = load_pair<V>(k + Cre * W);
            g[m] = load_pair<V>(g_state + 2 * m * W);
            da[m] = db[m] = dc[m] = {zero, zero};
        }
        for (Index end = count; end > 0;) {
            const Index begin = (end - 1) / carry_tokens * carry_tokens;
            for (Index t = end - 1; t >= begin; --t) {
                const V ut = simd::load<V>(u + t * W);
                const V dyt = simd::load<V>(dy + t * W);
                V dut = simd::load<V>(du + t * W);
                for (int m = 0; m < Modes; ++m) {
                    const Complexes<V> now = load_pair<V>(x + ((t + 1) * Modes + m) * 2 * W);
                    const Complexes<V> before = load_pair<V>(x + (t * Modes + m) * 2 * W);
                    g[m].re = simd::fma(c[m].re, dyt, g[m].re);                               // eq. 6
                    g[m].im = simd::fnma(c[m].im, dyt, g[m].im);
                    dc[m].re = simd::fma(now.re, dyt, dc[m].re);                              // eq. 8
                    dc[m].im = simd::fnma(now.im, dyt, dc[m].im);
                    db[m].re = simd::fma(g[m].re, ut, db[m].re);
                    db[m].im = simd::fma(g[m].im, ut, db[m].im);
                    da[m].re = simd::fma(g[m].re, before.re, simd::fma(g[m].im, before.im, da[m].re));
                    da[m].im = simd::fma(g[m].im, before.re, simd::fnma(g[m].re, before.im, da[m].im));
                    dut = simd::fma(b[m].re, g[m].re, simd::fma(b[m].im, g[m].im, dut));      // eq. 7
                    g[m] = {simd::fma(a[m].re, g[m].re, a[m].im * g[m].im),                   // eq. 6
                            simd::fnma(a[m].im, g[m].re, a[m].re * g[m].im)};
                }
                simd::store(du + t * W, dut);
            }
            if constexpr (carried<A>)
                for (int m = 0; m < Modes; ++m) {
                    const ModeTables<A> mode = tables.from(m, W);
                    carry_over<V>(g_state + 2 * m * W, mode.carry, mode.response_dy, dy + begin * W, Index{W},
                                  end - begin, -1.0);
                    g[m] = load_pair<V>(g_state + 2 * m * W);
                }
            end = begin;
        }
        for (int m = 0; m < Modes; ++m) {
            if constexpr (!carried<A>) store_pair(g_state + 2 * m * W, g[m]);
            double* sum = partial + m * partials * W;
            add(sum + dAre * W, da[m]);
            add(sum + dBre * W, db[m]);
            add(sum + dCre * W, dc[m]);
        }
    }

    template <class Set>
    static INTERSTATE_INLINE void run(const Args& args) {
        using V = simd::Native<Set, A>;
        constexpr int W = V::lanes;
        const V d = simd::load<V>(args.feedthrough);
        V dd = simd::broadcast<V>(0.0);
        for (Index t = 0; t < args.count; ++t) {
            const V dyt = simd::load<V>(args.dy + t * W);
            dd = simd::fma(simd::load<V>(args.u + t * W), dyt, dd);
            simd::store(args.du + t * W, d * dyt);
        }
        add(args.sums + args.modes * partials * W, dd);
        Index n = 0;
        for (; n + 2 <= args.modes; n += 2) modes<2, V>(args, n);
        if (n < args.modes) modes<1, V>(args, n);
    }

    template <int Modes, class V>
    static INTERSTATE_INLINE void modes(const Args& args, Index n) {
        constexpr int W = V::lanes;
        const ModeTables<A> tables = args.tables.from(n, W);
        A* x = args.scratch;  // states of these modes
        recompute<Modes, V>(args.u, x, args.checkpoint + 2 * n * args.lane_stride, args.lane_stride,
                            tables, args.count);
        tile<Modes, V>(args.u, args.dy, args.du, args.state + 2 * n * W, x, tables,
                       args.sums + n * partials * W, args.count);
    }
};

/// Tables of every block, formed in float64; lanes beyond the last channel are zero.
template <class A, class P>
void fill_tables(const Options& options, const Params<P>& p, const ScanLayout<A>& w, Index W, int threads) {
    const Index H = p.log_neg_re.extent[0], N = p.log_neg_re.extent[1], blocks = ceil_div(H, W);
    parallel_for(blocks, threads, [&](Index block, int) {
        for (Index lane = 0; lane < W; ++lane) {
            const Index h = block * W + lane;
            w.feedthrough[h] = h < H && p.D ? static_cast<A>(p.D(h)) : A(0);
            if (p.C_reverse) w.feedthrough[blocks * W + h] = A(0);
            for (Index n = 0; n < N; ++n) {
                const Index at = block * N + n, at_reverse = at + blocks * N;
                const Mode m = h < H ? mode_at(options.disc, p, h, n) : Mode{};
                const c64 C2 = h < H ? 2.0 * cast<double>(p.C(h, n)) : c64{};
                const c64 C2_reverse = h < H && p.C_reverse ? 2.0 * cast<double>(p.C_reverse(h, n)) : c64{};
                const auto put = [&](A* to, c64 z) {
                    to[lane] = static_cast<A>(z.re);
                    to[lane + W] = static_cast<A>(z.im);
                };
                const auto put_all = [&](A* k, c64 C) {
                    put(k + Are * W, m.Abar);
                    put(k + Bre * W, m.Bbar);
                    put(k + Cre * W, C);
                };
                put_all(w.coefficient + at * coefficients * W, C2);
                if (p.C_reverse) put_all(w.coefficient + at_reverse * coefficients * W, C2_reverse);
                if constexpr (carried<A>) {
                    c64 power{1.0, 0.0};  // Abar^l
                    for (Index l = 0; l < carry_tokens; ++l) {
                        put(w.response + (at * table_rows + 2 * l) * W, power * m.Bbar);
                        power = power * m.Abar;
                        if (w.response_dy) put(w.response_dy + (at * table_rows + 2 * l) * W, conj(C2 * power));
                        if (w.response_dy && p.C_reverse)
                            put(w.response_dy + (at_reverse * table_rows + 2 * l) * W,
                                conj(C2_reverse * power));
                    }
                    double* carry = w.carry + at * carries * W + lane;
                    carry[A1re * W] = m.Abar.re;
                    carry[A1im * W] = m.Abar.im;
                    carry[ABre * W] = power.re;
                    carry[ABim * W] = power.im;
                }
            }
        }
    });
}

/// The tables of one block of channels in direction d.
template <class A>
ModeTables<A> scan_tables(const ScanLayout<A>& w, const Shape& s, Index W, Index block, Index d) {
    const Index modes = ceil_div(s.channels, W) * s.modes;
    const ModeTables<A> tables{w.coefficient + d * modes * coefficients * W, w.carry, w.response,
                               w.response_dy ? w.response_dy + d * modes * table_rows * W : nullptr};
    return tables.from(block * s.modes, W);
}

/// exec has been resolved.
template <class T, class P>
void scan_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out,
                  Saved saved, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W);
    Arena arena(ws.data);
    const ScanLayout<A> w(arena, s, pass::forward, exec.threads, W);
    fill_tables<A>(options, in.params, w, W, exec.threads);
    const TileLoops<T, P> loops{exec, in, w.memory, saved, 1};
    loops.forward(out, [&](Index block, Index d, const ForwardTile<A>& tile) {
        simd::run_body<ScanForward<A>>(
            exec.isa, typename ScanForward<A>::Args{tile, scan_tables(w, s, W, block, d),
                                                    w.feedthrough + (d * blocks + block) * W});
    });
}

template <class T, class P>
void scan_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in, Saved saved,
                   const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W), both = directions(s);
    Arena arena(ws.data);
    const ScanLayout<A> w(arena, s, pass::backward, exec.threads, W);
    fill_tables<A>(options, in.params, w, W, exec.threads);
    const TileLoops<T, P> loops{exec, in, w.memory, saved, 1};
    loops.backward(upstream, grads, 1.0, [&](Index block, Index d, const BackwardTile<A>& tile) {
        simd::run_body<ScanBackward<A>>(
            exec.isa, typename ScanBackward<A>::Args{tile, scan_tables(w, s, W, block, d),
                                                     w.feedthrough + (d * blocks + block) * W});
    });
    parallel_for(s.channels, exec.threads, [&](Index h, int) {
        const Index block = h / W, lane = h % W;
        const auto total = [&](Index d, Index row) {
            double sum = 0.0;
            for (Index group = 0; group < backward_groups(s); ++group)
                sum += w.memory.sums[((group * blocks + block) * both + d) * w.memory.sums_size + row * W +
                                     lane];
            return sum;
        };
        const auto of_mode = [&](Index d, Index n, Partial re) {
            return c64{total(d, n * partials + re), total(d, n * partials + re + 1)};
        };
        const double dD = total(0, s.modes * partials);
        write_grads(options, in.params, grads.params, h, dD, [&](Index n, const Mode&) {
            DiscreteGrads g{of_mode(0, n, dAre), of_mode(0, n, dBre), 2.0 * of_mode(0, n, dCre), {}};
            if (both == 2) {
                g.Abar += of_mode(1, n, dAre);
                g.Bbar += of_mode(1, n, dBre);
                g.C_reverse = 2.0 * of_mode(1, n, dCre);
            }
            return g;
        });
    });
}

/// One token of eq. 3 and 4 for one batch row: lanes are modes, products in float64 so that a state kept
/// in float does not drift over long decodes.
template <class T, class P>
struct StepBody {
    static constexpr int lanes = 8;

    static INTERSTATE_INLINE void mode(c64 A, c64 B, complex<P> C, double u, complex<acc_t<T>>& x,
                                       double& sum) {
        const double xr = static_cast<double>(x.re), xi = static_cast<double>(x.im);
        const double re = A.re * xr - A.im * xi + B.re * u;
        const double im = A.re * xi + A.im * xr + B.im * u;
        x.re = static_cast<acc_t<T>>(re);
        x.im = static_cast<acc_t<T>>(im);
        sum += static_cast<double>(C.re) * re - static_cast<double>(C.im) * im;
    }

    template <class Set>
    static INTERSTATE_INLINE void run(const Discrete<P>& d, const State<acc_t<T>>& state, const Token<T>& token,
                                      const TokenOut<T>& out, Index b) {
        const Index H = d.Abar.extent[0], N = d.Abar.extent[1];
        const bool unit =
            state.x.stride[2] == 1 && d.Abar.stride[1] == 1 && d.Bbar.stride[1] == 1 && d.C.stride[1] == 1;
        for (Index h = 0; h < H; ++h) {
            const double u = static_cast<double>(token.u(b, h));
            double sum[lanes] = {};
            Index n = 0;
            if (unit && N > 0) {
                const c64* A = &d.Abar(h, 0);
                const c64* B = &d.Bbar(h, 0);
                const complex<P>* C = &d.C(h, 0);
                complex<acc_t<T>>* x = &state.x(b, h, 0);
                for (; n + lanes <= N; n += lanes)
                    for (int lane = 0; lane < lanes; ++lane)
                        mode(A[n + lane], B[n + lane], C[n + lane], u, x[n + lane], sum[lane]);
            }
            for (; n < N; ++n) mode(d.Abar(h, n), d.Bbar(h, n), d.C(h, n), u, state.x(b, h, n), sum[n % lanes]);
            double y = d.D ? static_cast<double>(d.D(h)) * u : 0.0;
            for (int lane = 0; lane < lanes; ++lane) y += 2.0 * sum[lane];
            out.y(b, h) = T(y);
        }
    }
};

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
