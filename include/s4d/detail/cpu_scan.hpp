// S4D on the CPU as a recurrence: vector lanes are channels, time runs in the inner loop.
//
// A task is one recurrence (batch row or packed sequence) and one block of W channels. It copies 256
// tokens of u into a [token][lane] tile (which absorbs any strides and storage dtype), then runs pairs
// of modes down the tile with state and coefficients in registers: 8 FMAs per mode and token, and the
// tile is read from L1. Backward recomputes the states of one tile from a checkpoint (one per 256
// tokens, kept by forward) and walks it in reverse.
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

#include <algorithm>

#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>
#include <interstate/dispatch.hpp>
#include <s4d/detail/discretize.hpp>
#include <s4d/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

inline constexpr Index tile_tokens = 256;   // a checkpoint each; also the tile in L1
inline constexpr Index carry_tokens = 32;   // divides tile_tokens
inline constexpr Index lane_padding = 16;   // widest block; checkpoints do not depend on the ISA

/// Coefficients of one mode and one block of channels, W lanes each; C is 2C.
enum Coefficient { Are, Aim, Bre, Bim, Cre, Cim, coefficients };

/// With float tiles, what carries the state of a mode from block to block, W lanes each: Abar and
/// Abar^carry_tokens in float64, and the response table, (carry_tokens, re/im).
enum Carry { A1re, A1im, ABre, ABim, carries };
inline constexpr Index table_rows = 2 * carry_tokens;

template <class A>
inline constexpr bool carried = std::is_same_v<A, float>;

/// Number of checkpointed tiles before sequence i, an upper bound that leaves no overlap.
inline Index first_checkpoint(const View<const std::int32_t, 1>& cu, const Shape& s, Index i) {
    return s.packed() ? cu(i) / tile_tokens + i : i * ceil_div(s.length, tile_tokens);
}
inline Index checkpoint_count(const Shape& s) {
    return s.packed() ? s.length / tile_tokens + s.sequences : s.batch * ceil_div(s.length, tile_tokens);
}
/// Values in one checkpoint: (N, 2, padded H).
inline Index checkpoint_size(const Shape& s) {
    return s.modes * 2 * ceil_div(s.channels, lane_padding) * lane_padding;
}

/// Gradients that a backward task accumulates for a mode, W lanes each, in float64.
enum Partial { dAre, dAim, dBre, dBim, dCre, dCim, partials };

/// Tasks that split the recurrences in backward. Fixed, so that sums do not depend on threads.
inline Index backward_groups(const Shape& s) { return std::min<Index>(s.states(), 16); }

template <class A>
struct ScanLayout {
    A* coefficient;      // (blocks, N, coefficients, W)
    double* carry;       // (blocks, N, carries, W), float tiles
    A* response;         // (blocks, N, table_rows, W), float tiles: Abar^l Bbar
    A* response_dy;      // (blocks, N, table_rows, W), float tiles in backward: conj(2 C Abar^(l+1))
    A* feedthrough;      // (blocks, W): D
    A* tiles;            // (threads, tiles_size)
    double* states;      // (threads, states_size)
    double* partial;     // (groups, blocks, N, partials, W), backward
    double* partial_D;   // (groups, blocks, W), backward
    Index tiles_size, states_size;

    ScanLayout(Arena& arena, const Shape& s, pass p, int threads, Index W) {
        const Index blocks = ceil_div(s.channels, W), modes = blocks * s.modes;
        const bool back = p == pass::backward;
        coefficient = arena.take<A>(modes * coefficients * W);
        carry = carried<A> ? arena.take<double>(modes * carries * W) : nullptr;
        response = carried<A> ? arena.take<A>(modes * table_rows * W) : nullptr;
        response_dy = carried<A> && back ? arena.take<A>(modes * table_rows * W) : nullptr;
        feedthrough = arena.take<A>(blocks * W);
        tiles_size = back ? (3 * tile_tokens + 2 * 2 * (tile_tokens + 1)) * W : 2 * tile_tokens * W;
        tiles = arena.take<A>(threads * tiles_size);
        states_size = 2 * s.modes * W;
        states = arena.take<double>(threads * states_size);
        const Index groups = back ? backward_groups(s) : 0;
        partial = arena.take<double>(groups * modes * partials * W);
        partial_D = arena.take<double>(groups * blocks * W);
    }
};

/// Rows [begin, begin + count) of W channels starting at h, into or out of a [token][lane] tile.
template <int W, class A, class T>
INTERSTATE_INLINE void load_tile(A* tile, const View<const T, 3>& x, Index b, Index begin, Index count, Index h,
                                 Index width) {
    const T* row = &x(b, begin, h);
    for (Index t = 0; t < count; ++t, row += x.stride[1]) {
        if (width == W && x.stride[2] == 1) {
            for (Index lane = 0; lane < W; ++lane) tile[t * W + lane] = static_cast<A>(row[lane]);
        } else {
            for (Index lane = 0; lane < W; ++lane)
                tile[t * W + lane] = lane < width ? static_cast<A>(row[lane * x.stride[2]]) : A(0);
        }
    }
}
template <int W, class A, class T>
INTERSTATE_INLINE void store_tile(const A* tile, const View<T, 3>& x, Index b, Index begin, Index count, Index h,
                                  Index width) {
    T* row = &x(b, begin, h);
    for (Index t = 0; t < count; ++t, row += x.stride[1]) {
        if (width == W && x.stride[2] == 1) {
            for (Index lane = 0; lane < W; ++lane) row[lane] = T(tile[t * W + lane]);
        } else {
            for (Index lane = 0; lane < width; ++lane) row[lane * x.stride[2]] = T(tile[t * W + lane]);
        }
    }
}

/// States (i, h.., n) between memory and (N, 2, W) lanes of float64; an absent tensor reads as zero.
template <int W, class A>
INTERSTATE_INLINE void load_state(double* state, const View<const complex<A>, 3>& x, Index i, Index h, Index width,
                                  Index modes) {
    for (Index n = 0; n < modes; ++n)
        for (Index lane = 0; lane < W; ++lane) {
            const complex<A> z = x && lane < width ? x(i, h + lane, n) : complex<A>{};
            state[(2 * n) * W + lane] = static_cast<double>(z.re);
            state[(2 * n + 1) * W + lane] = static_cast<double>(z.im);
        }
}
template <int W, class A>
INTERSTATE_INLINE void store_state(const double* state, const View<complex<A>, 3>& x, Index i, Index h, Index width,
                                   Index modes) {
    if (!x) return;
    for (Index n = 0; n < modes; ++n)
        for (Index lane = 0; lane < width; ++lane)
            x(i, h + lane, n) = {static_cast<A>(state[(2 * n) * W + lane]),
                                 static_cast<A>(state[(2 * n + 1) * W + lane])};
}

template <class V>
struct Complexes {
    V re, im;
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

/// Carries one mode's state over tokens [begin, end) of a tile of u.
template <class V, class A>
INTERSTATE_INLINE void carry_forward(double* state, const double* carry, const A* response, const A* u, Index begin,
                                     Index end) {
    constexpr int W = V::lanes;
    Complexes<V> local{simd::broadcast<V>(0.0), simd::broadcast<V>(0.0)};
    for (Index t = begin; t < end; ++t) {
        const V ut = simd::load<V>(u + t * W);
        const A* k = response + (end - 1 - t) * 2 * W;
        local.re = simd::fma(simd::load<V>(k), ut, local.re);
        local.im = simd::fma(simd::load<V>(k + W), ut, local.im);
    }
    carry_state(state, carry, local, end - begin, 1.0);
}

/// Carries one mode's gradient of the state back over tokens [begin, end) of a tile of dy (eq. 6).
template <class V, class A>
INTERSTATE_INLINE void carry_backward(double* g, const double* carry, const A* response_dy, const A* dy, Index begin,
                                      Index end) {
    constexpr int W = V::lanes;
    Complexes<V> local{simd::broadcast<V>(0.0), simd::broadcast<V>(0.0)};
    for (Index t = begin; t < end; ++t) {
        const V dyt = simd::load<V>(dy + t * W);
        const A* k = response_dy + (t - begin) * 2 * W;
        local.re = simd::fma(simd::load<V>(k), dyt, local.re);
        local.im = simd::fma(simd::load<V>(k + W), dyt, local.im);
    }
    carry_state(g, carry, local, end - begin, -1.0);
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

/// What a task works on: one recurrence and one block of channels, with its thread's scratch.
template <class A>
struct ScanTask {
    Index i, batch;  // recurrence, and its batch row
    RowRange rows;
    Index h, width;  // first channel of the block, and how many of its lanes are channels
    Index modes;
    ModeTables<A> tables;
    const A* feedthrough;
    A* tiles;
    double* state;
    A* checkpoint;           // of the first tile and this block, or null
    Index checkpoint_stride; // from tile to tile
    Index lane_stride;       // padded H
};

template <class T>
struct ForwardBody {
    using A = acc_t<T>;
    struct Args {
        View<const T, 3> u;
        View<const complex<A>, 3> x0;
        Outputs<T> out;
        ScanTask<A> task;
    };

    /// A pair of modes (or the odd one) down a tile; tables and state start at the first of them.
    template <int Modes, class V>
    static INTERSTATE_INLINE void tile(const A* u, A* y, double* state, const ModeTables<A>& tables, Index count) {
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
                    carry_forward<V>(state + 2 * m * W, mode.carry, mode.response, u, begin, end);
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
        const ScanTask<A>& task = args.task;
        const Index N = task.modes;
        A* u = task.tiles;
        A* y = u + tile_tokens * W;
        load_state<W, A>(task.state, args.x0, task.i, task.h, task.width, N);
        const V d = simd::load<V>(task.feedthrough);
        A* checkpoint = task.checkpoint;
        for (Index begin = task.rows.begin; begin < task.rows.end; begin += tile_tokens) {
            const Index count = task.rows.end - begin < tile_tokens ? task.rows.end - begin : tile_tokens;
            if (checkpoint) {
                for (Index r = 0; r < 2 * N; ++r)
                    for (int lane = 0; lane < W; ++lane)
                        checkpoint[r * task.lane_stride + lane] = static_cast<A>(task.state[r * W + lane]);
                checkpoint += task.checkpoint_stride;
            }
            load_tile<W, A, T>(u, args.u, task.batch, begin, count, task.h, task.width);
            for (Index t = 0; t < count; ++t) simd::store(y + t * W, d * simd::load<V>(u + t * W));
            Index n = 0;
            for (; n + 2 <= N; n += 2)
                tile<2, V>(u, y, task.state + 2 * n * W, task.tables.from(n, W), count);
            if (n < N) tile<1, V>(u, y, task.state + 2 * n * W, task.tables.from(n, W), count);
            store_tile<W, A, T>(y, args.out.y, task.batch, begin, count, task.h, task.width);
        }
        store_state<W, A>(task.state, args.out.xT, task.i, task.h, task.width, N);
    }
};

template <class T>
struct BackwardBody {
    using A = acc_t<T>;
    struct Args {
        View<const T, 3> u;
        Upstream<T> upstream;
        View<T, 3> du;                // may be null
        View<complex<A>, 3> dx0;      // may be null
        ScanTask<A> task;
        double* partial;  // of this group and block
        double* partial_D;
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
                    carry_forward<V>(state + 2 * m * W, mode.carry, mode.response, u, begin, end);
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
                    carry_backward<V>(g_state + 2 * m * W, mode.carry, mode.response_dy, dy, begin, end);
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
        const ScanTask<A>& task = args.task;
        const Index N = task.modes;
        A* u = task.tiles;
        A* dy = u + tile_tokens * W;
        A* du = dy + tile_tokens * W;
        A* x = du + tile_tokens * W;
        load_state<W, A>(task.state, args.upstream.xT, task.i, task.h, task.width, N);
        const V d = simd::load<V>(task.feedthrough);
        for (Index c = ceil_div(task.rows.end - task.rows.begin, tile_tokens) - 1; c >= 0; --c) {
            const Index begin = task.rows.begin + c * tile_tokens;
            const Index count = task.rows.end - begin < tile_tokens ? task.rows.end - begin : tile_tokens;
            load_tile<W, A, T>(u, args.u, task.batch, begin, count, task.h, task.width);
            load_tile<W, A, T>(dy, args.upstream.y, task.batch, begin, count, task.h, task.width);
            V dd = simd::broadcast<V>(0.0);
            for (Index t = 0; t < count; ++t) {
                const V dyt = simd::load<V>(dy + t * W);
                dd = simd::fma(simd::load<V>(u + t * W), dyt, dd);
                simd::store(du + t * W, d * dyt);
            }
            add(args.partial_D, dd);
            const A* checkpoint = task.checkpoint + c * task.checkpoint_stride;
            Index n = 0;
            for (; n + 2 <= N; n += 2) modes<2, V>(args, u, dy, du, x, checkpoint, n, count);
            if (n < N) modes<1, V>(args, u, dy, du, x, checkpoint, n, count);
            if (args.du) store_tile<W, A, T>(du, args.du, task.batch, begin, count, task.h, task.width);
        }
        store_state<W, A>(task.state, args.dx0, task.i, task.h, task.width, N);
    }

    template <int Modes, class V>
    static INTERSTATE_INLINE void modes(const Args& args, const A* u, const A* dy, A* du, A* x, const A* checkpoint,
                                        Index n, Index count) {
        constexpr int W = V::lanes;
        const ModeTables<A> tables = args.task.tables.from(n, W);
        recompute<Modes, V>(u, x, checkpoint + 2 * n * args.task.lane_stride, args.task.lane_stride, tables, count);
        tile<Modes, V>(u, dy, du, args.task.state + 2 * n * W, x, tables, args.partial + n * partials * W, count);
    }
};

/// Tables of every block, formed in float64; lanes beyond the last channel are zero.
template <class A, class P>
void fill_tables(const Options& options, const Params<P>& p, const ScanLayout<A>& w, Index W, int threads) {
    const Index H = p.log_neg_re.extent[0], N = p.log_neg_re.extent[1];
    parallel_for(ceil_div(H, W), threads, [&](Index block, int) {
        for (Index lane = 0; lane < W; ++lane) {
            const Index h = block * W + lane;
            w.feedthrough[h] = h < H && p.D ? static_cast<A>(p.D(h)) : A(0);
            for (Index n = 0; n < N; ++n) {
                const Index at = block * N + n;
                const Mode m = h < H ? mode_at(options.disc, p, h, n) : Mode{};
                const c64 C2 = h < H ? 2.0 * cast<double>(p.C(h, n)) : c64{};
                A* k = w.coefficient + at * coefficients * W + lane;
                const auto put = [&](A* to, c64 z) {
                    to[0] = static_cast<A>(z.re);
                    to[W] = static_cast<A>(z.im);
                };
                put(k + Are * W, m.Abar);
                put(k + Bre * W, m.Bbar);
                put(k + Cre * W, C2);
                if constexpr (carried<A>) {
                    c64 power{1.0, 0.0};  // Abar^l
                    for (Index l = 0; l < carry_tokens; ++l) {
                        put(w.response + (at * table_rows + 2 * l) * W + lane, power * m.Bbar);
                        power = power * m.Abar;
                        if (w.response_dy)
                            put(w.response_dy + (at * table_rows + 2 * l) * W + lane, conj(C2 * power));
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

/// The task of recurrence i and a block of channels.
template <class T, class P, class A>
ScanTask<A> scan_task(const Inputs<T, P>& in, const Shape& s, const ScanLayout<A>& w, A* checkpoints, Index W, Index i,
                      Index block, int worker) {
    const auto [batch, rows] = place_of(in.cu_seqlens, s, i);
    const Index size = checkpoint_size(s);
    return {.i = i,
            .batch = batch,
            .rows = rows,
            .h = block * W,
            .width = std::min(W, s.channels - block * W),
            .modes = s.modes,
            .tables = ModeTables<A>{w.coefficient, w.carry, w.response, w.response_dy}.from(block * s.modes, W),
            .feedthrough = w.feedthrough + block * W,
            .tiles = w.tiles + worker * w.tiles_size,
            .state = w.states + worker * w.states_size,
            .checkpoint = checkpoints ? checkpoints + first_checkpoint(in.cu_seqlens, s, i) * size + block * W : nullptr,
            .checkpoint_stride = size,
            .lane_stride = size / std::max<Index>(2 * s.modes, 1)};
}

/// exec has been resolved.
template <class T, class P>
void scan_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out,
                  Saved saved, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W);
    Arena arena(ws.data);
    const ScanLayout<A> w(arena, s, pass::forward, thread_count(exec.threads), W);
    fill_tables<A>(options, in.params, w, W, exec.threads);
    zero_outside_sequences(out.y, in.cu_seqlens, s);
    Arena saved_arena(saved.data);
    A* checkpoints = saved_arena.take<A>(checkpoint_count(s) * checkpoint_size(s));
    parallel_for(s.states() * blocks, exec.threads, [&](Index task, int worker) {
        simd::run_body<ForwardBody<T>>(
            exec.isa, typename ForwardBody<T>::Args{
                     in.u, in.x0, out, scan_task(in, s, w, checkpoints, W, task / blocks, task % blocks, worker)});
    });
}

template <class T, class P>
void scan_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in, Saved saved,
                   const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W), N = s.modes;
    const Index groups = backward_groups(s);
    Arena arena(ws.data);
    const ScanLayout<A> w(arena, s, pass::backward, thread_count(exec.threads), W);
    fill_tables<A>(options, in.params, w, W, exec.threads);
    zero_outside_sequences(grads.u, in.cu_seqlens, s);
    Arena saved_arena(saved.data);
    A* checkpoints = saved_arena.take<A>(checkpoint_count(s) * checkpoint_size(s));
    const Index partial_size = N * partials * W;
    std::fill_n(w.partial, groups * blocks * partial_size, 0.0);
    std::fill_n(w.partial_D, groups * blocks * W, 0.0);
    parallel_for(groups * blocks, exec.threads, [&](Index task, int worker) {
        for (Index i = task / blocks; i < s.states(); i += groups)
            simd::run_body<BackwardBody<T>>(
                exec.isa, typename BackwardBody<T>::Args{
                         in.u, upstream, grads.u, grads.x0,
                         scan_task(in, s, w, checkpoints, W, i, task % blocks, worker),
                         w.partial + task * partial_size, w.partial_D + task * W});
    });
    parallel_for(s.channels, exec.threads, [&](Index h, int) {
        const Index block = h / W, lane = h % W;
        const auto total = [&](Index n, Partial which) {
            c64 sum{};
            for (Index group = 0; group < groups; ++group) {
                const double* at = w.partial + (group * blocks + block) * partial_size + (n * partials + which) * W + lane;
                sum += {at[0], at[W]};
            }
            return sum;
        };
        double dlog_dt = 0.0, dD = 0.0;
        for (Index group = 0; group < groups; ++group) dD += w.partial_D[(group * blocks + block) * W + lane];
        for (Index n = 0; n < N; ++n) {
            const ModeGrads g = discretize_backward(options.disc, mode_at(options.disc, in.params, h, n),
                                                    cast<double>(in.params.B(h, n)), total(n, dAre), total(n, dBre));
            dlog_dt += g.log_dt;
            if (grads.params.log_neg_re) grads.params.log_neg_re(h, n) = static_cast<P>(g.log_neg_re);
            if (grads.params.im) grads.params.im(h, n) = static_cast<P>(g.im);
            if (grads.params.B) grads.params.B(h, n) = cast<P>(g.B);
            if (grads.params.C) grads.params.C(h, n) = cast<P>(2.0 * total(n, dCre));
        }
        if (grads.params.log_dt) grads.params.log_dt(h) = static_cast<P>(dlog_dt);
        if (grads.params.D) grads.params.D(h) = static_cast<P>(dD);
    });
}

/// One token of eq. 3 and 4 for one batch row: lanes are modes, products in float64 so that a state kept
/// in float does not drift over long decodes.
template <class T, class P>
struct StepBody {
    static constexpr int lanes = 8;

    static INTERSTATE_INLINE void mode(c64 A, c64 B, complex<P> C, double u, complex<acc_t<T>>& x, double& sum) {
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
