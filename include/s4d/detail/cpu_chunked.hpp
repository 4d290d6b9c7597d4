// S4D on the CPU in chunks of 16 tokens: products with small tables instead of a recurrence per token.
// Equation numbers: docs/ops/s4d.md.
//
// Forward (eq. 16). With X[r] the state before chunk r, a mode costs a token 2 FMAs to collect what the
// chunk adds to the state, 2 to spread the state over its outputs, and one for what happens once a
// chunk; the chunk's own tokens are a convolution of 16 taps, for all modes at once. The recurrence
// costs 8.
//
// Backward (eq. 17). du is the same form in reversed time. The parameters' gradients need no state of
// any token: inside chunks they go through the 16 gradients of K, between chunks through the products of
// states and state gradients at chunk boundaries, with tables of the slopes k Abar^(k-1). The states at
// boundaries are recomputed from a checkpoint every 256 tokens, which forward keeps.
//
// A last chunk of c < 16 tokens takes the same formulas with c for 16; it only meets its neighbours
// through Abar^c, which is formed when it comes.
//
// What limits it: 16 FMAs for 8 loads in `collect`, 32 for 16 in `spread`; tables of 8 modes, the tile
// of u and that of y are together twice the first-level cache.
#pragma once

#include <s4d/detail/cpu_powers.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

/// Sums over chunks that a backward task keeps for a mode, rows of W lanes (re, im) in float64. X: state
/// before a chunk; g: conjugate gradient of the state after it; w, q: collected u and dy, with slopes ' .
struct ChunkSums {
    enum Row {
        Xq = 0,
        Xq_slope = 2,
        gw = 4,
        gw_slope = 6,
        gX = 8,
        gX_last = 10,  // of last, shorter chunks: times their c Abar^(c-1)
        rows = 12
    };
};

/// A tile forward: y from u, which is zero beyond `count`.
template <class A>
struct ChunkForward {
    struct Args : ForwardTile<A> {
        PowerTables<A> tables;
        bool reverse;
    };

    template <class Set>
    static INTERSTATE_INLINE void run(const Args& args) {
        using L = Lanes<Set, A>;
        using V = typename L::V;
        constexpr int W = L::W;
        const TileRows rows(args.count);
        constexpr Index Y_row = mode_block * 2 * W;
        A* local = args.scratch + tile_chunks * Y_row;
        const A* kernel = args.tables.kernel + (args.reverse ? chunk_tokens * W : 0);
        for (Index r = 0; r < rows.padded; r += row_group)
            convolve<L::tokens, V>(args.u + r * chunk_tokens * W, args.y + r * chunk_tokens * W, W, kernel);
        for (Index n0 = 0; n0 < args.modes; n0 += mode_block) {
            const Index block = std::min(mode_block, args.modes - n0);
            const A* power = args.tables.power + n0 * chunk_tokens * 2 * W;
            collect_tile<Set, 2>(args.u + (chunk_tokens - 1) * W, Index{-W}, power, rows.padded, block,
                                 args.scratch, Y_row);
            for (Index n = 0; n < block; ++n) {
                const A* coefficient = args.tables.coefficient + (n0 + n) * Coefficients::rows * W;
                const double* exact = args.tables.exact + (n0 + n) * Exact::rows * W;
                double* state = args.state + (n0 + n) * 2 * W;
                const auto a = load_rows<V>(coefficient + Coefficients::chunk * W, W);
                const auto b = load_rows<V>(coefficient + Coefficients::Bbar * W, W);
                const auto c = load_rows<V>(
                    coefficient + (args.reverse ? Coefficients::out_reverse : Coefficients::out) * W, W);
                A* Y = args.scratch + n * 2 * W;
                // X serves the outputs of this tile, `fresh`, from zero, the carry in float64.
                auto X = load_rows<V>(state, W), fresh = zeros<V>();
                for (Index r = 0; r < rows.whole; ++r) {
                    const auto added = b * load_rows<V>(Y + r * Y_row, W);
                    store_rows(Y + r * Y_row, W, c * X);
                    X = fma(a, X, added);
                    fresh = fma(a, fresh, added);
                }
                if (rows.last) store_rows(Y + rows.whole * Y_row, W, c * X);
                store_rows(local, W, fresh);
                if (rows.whole == tile_chunks)
                    carry<Set>(state, exact + Exact::tile * W, 1, static_cast<const A*>(local));
                else if (rows.whole)
                    carry<Set>(state, exact + Exact::chunk * W, rows.whole, static_cast<const A*>(local));
                if (rows.last) {
                    collect<1, 1, 2, V>(args.u + (rows.whole * chunk_tokens + rows.last - 1) * W, Index{-W},
                                        power + n * chunk_tokens * 2 * W, rows.last, local, 0, 0);
                    store_rows(local, W, b * load_rows<V>(local, W));
                    carry<Set>(state, exact + Exact::Abar * W, rows.last, static_cast<const A*>(local));
                }
            }
            for (Index r = 0; r < rows.padded; r += row_group)
                spread<L::tokens, 2, V>(args.y + r * chunk_tokens * W, W, power, args.scratch + r * Y_row,
                                        Y_row, block);
        }
    }
};

/// A tile backward: du from dy, both zero beyond `count`, and the sums over chunks (N, ChunkSums::rows, W),
/// behind them dK (16, W). The state is the conjugate gradient.
template <class A>
struct ChunkBackward {
    struct Args : BackwardTile<A> {
        PowerTables<A> tables;
        bool reverse;
    };

    template <class V>
    static INTERSTATE_INLINE void multiply_add(Complexes<V>& sum, const Complexes<V>& a,
                                               const Complexes<V>& b) {
        sum = fma(a, b, sum);
    }

    /// dK[j] += sum of dy[r, k] u[r, k-j] over the tile (eq. 17).
    template <int Taps, class V>
    static INTERSTATE_INLINE void kernel_gradient(const A* u, const A* dy, Index rows, double* dK) {
        using Wide = simd::Vec<double, V::lanes* static_cast<int>(sizeof(A)) / 8>;
        constexpr int W = V::lanes;
        INTERSTATE_UNROLL
        for (int j0 = 0; j0 < chunk_tokens; j0 += Taps) {
            V sum[Taps];
            INTERSTATE_UNROLL
            for (int j = 0; j < Taps; ++j) sum[j] = simd::broadcast<V>(0.0);
            for (Index r = 0; r < rows; ++r) {
                INTERSTATE_UNROLL
                for (int k = j0; k < chunk_tokens; ++k) {
                    const V dyk = simd::load<V>(dy + (r * chunk_tokens + k) * W);
                    INTERSTATE_UNROLL
                    for (int j = 0; j < Taps; ++j)
                        if (j0 + j <= k)
                            sum[j] = simd::fma(dyk, simd::load<V>(u + (r * chunk_tokens + k - j0 - j) * W),
                                               sum[j]);
                }
            }
            INTERSTATE_UNROLL
            for (int j = 0; j < Taps; ++j) add_lanes<Wide>(dK + (j0 + j) * W, sum[j]);
        }
    }
    template <class Wide, class V>
    static INTERSTATE_INLINE void add_lanes(double* sum, const V& x) {
        A lanes[V::lanes];
        simd::store(lanes, x);
        INTERSTATE_UNROLL
        for (int at = 0; at < V::lanes; at += Wide::lanes)
            simd::store(sum + at, simd::load<Wide>(sum + at) + simd::load_as<Wide>(lanes + at));
    }
    template <class Wide, class V>
    static INTERSTATE_INLINE void add_lanes(double* sum, const Complexes<V>& x) {
        add_lanes<Wide>(sum, x.re);
        add_lanes<Wide>(sum + V::lanes, x.im);
    }

    template <class Set>
    static INTERSTATE_INLINE void run(const Args& args) {
        using L = Lanes<Set, A>;
        using V = typename L::V;
        using Wide = typename L::Wide;
        constexpr int W = L::W;
        const TileRows rows(args.count);
        const Index used = rows.whole + (rows.last ? 1 : 0);
        constexpr Index Z_row = mode_block * 2 * W;
        A* Z = args.scratch;                      // (16, mode_block, 2, W): what is spread over du
        A* w = Z + tile_chunks * Z_row;           // (16, 4, W)
        A* q = w + tile_chunks * 4 * W;           // (16, 4, W)
        A* X = q + tile_chunks * 4 * W;           // (16, 2, W)
        A* Z_last = X + tile_chunks * 2 * W;      // (4 rows of Z, the first used): of a short chunk
        A* du_last = Z_last + row_group * Z_row;  // (4 chunks)
        A* local = du_last + row_group * chunk_tokens * W;
        const A* kernel = args.tables.kernel + (args.reverse ? chunk_tokens * W : 0);
        constexpr Index backwards = -W;
        const Index end = (chunk_tokens - 1) * W;

        for (Index r = 0; r < rows.padded; r += row_group)
            convolve<L::tokens, V>(args.dy + r * chunk_tokens * W + end, args.du + r * chunk_tokens * W + end,
                                   backwards, kernel);
        kernel_gradient<Set::registers == 32 ? 16 : 8, V>(args.u, args.dy, used,
                                                          args.sums + args.modes * ChunkSums::rows * W);

        for (Index n0 = 0; n0 < args.modes; n0 += mode_block) {
            const Index block = std::min(mode_block, args.modes - n0);
            const A* powers = args.tables.power + n0 * chunk_tokens * 4 * W;
            for (Index n = 0; n < block; ++n) {
                const A* coefficient = args.tables.coefficient + (n0 + n) * Coefficients::rows * W;
                const double* exact = args.tables.exact + (n0 + n) * Exact::rows * W;
                const A* power = powers + n * chunk_tokens * 4 * W;
                double* state = args.state + (n0 + n) * 2 * W;
                double* sums = args.sums + (n0 + n) * ChunkSums::rows * W;
                const auto a = load_rows<V>(coefficient + Coefficients::chunk * W, W);
                const auto b = load_rows<V>(coefficient + Coefficients::Bbar * W, W);
                const auto c = load_rows<V>(
                    coefficient + (args.reverse ? Coefficients::out_reverse : Coefficients::out) * W, W);
                collect_tile<Set, 4>(args.u + end, backwards, power, rows.whole, 1, w, Index{4 * W});
                const A* checkpoint = args.checkpoint + (n0 + n) * 2 * args.lane_stride;
                auto x = load_rows<V>(checkpoint, args.lane_stride);
                for (Index r = 0; r < rows.whole; ++r) {
                    store_rows(X + r * 2 * W, W, x);
                    x = fma(a, x, b * load_rows<V>(w + r * 4 * W, W));
                }
                // Here, where its many independent sums fill the latencies of the chain before it.
                collect_tile<Set, 4>(args.dy, Index{W}, power, used, 1, q, Index{4 * W});

                auto g = load_rows<V>(static_cast<const double*>(state), W);
                auto Xq = zeros<V>(), Xq_slope = Xq, gw = Xq, gw_slope = Xq, gX = Xq;
                if (rows.last) {
                    // The short chunk: x is the state before it, g what comes from after the sequence.
                    const Index r = rows.whole;
                    collect<1, 1, 4, V>(args.u + (r * chunk_tokens + rows.last - 1) * W, backwards, power,
                                        rows.last, local, 0, 0);
                    Xq = x * load_rows<V>(q + r * 4 * W, W);
                    Xq_slope = x * load_rows<V>(q + r * 4 * W + 2 * W, W);
                    gw = g * load_rows<V>(local, W);
                    gw_slope = g * load_rows<V>(local + 2 * W, W);
                    store_rows(Z_last + n * 2 * W, W, b * g);
                    const auto gx = g * x;
                    store_rows(local, W, gx);
                    for (int at = 0; at < W; at += Wide::lanes) {
                        const auto slope =
                            raise(load_rows<Wide>(exact + Exact::Abar * W + at, W), rows.last - 1);
                        const Wide times = simd::broadcast<Wide>(static_cast<double>(rows.last));
                        double* sum = sums + ChunkSums::gX_last * W + at;
                        store_rows(sum, W,
                                   fma(Complexes<Wide>{times * slope.re, times * slope.im},
                                       load_rows<Wide>(local + at, W), load_rows<Wide>(sum, W)));
                    }
                    store_rows(local, W, c * load_rows<V>(q + r * 4 * W, W));
                    carry<Set>(state, exact + Exact::Abar * W, rows.last, static_cast<const A*>(local));
                    g = load_rows<V>(static_cast<const double*>(state), W);
                }
                auto fresh = zeros<V>();
                for (Index r = rows.whole - 1; r >= 0; --r) {
                    x = load_rows<V>(X + r * 2 * W, W);
                    const auto qr = load_rows<V>(q + r * 4 * W, W);
                    multiply_add(Xq, x, qr);
                    multiply_add(Xq_slope, x, load_rows<V>(q + r * 4 * W + 2 * W, W));
                    multiply_add(gw, g, load_rows<V>(w + r * 4 * W, W));
                    multiply_add(gw_slope, g, load_rows<V>(w + r * 4 * W + 2 * W, W));
                    multiply_add(gX, g, x);
                    store_rows(Z + r * Z_row + n * 2 * W, W, b * g);
                    const auto added = c * qr;
                    g = fma(a, g, added);
                    fresh = fma(a, fresh, added);
                }
                store_rows(local, W, fresh);
                if (rows.whole == tile_chunks)
                    carry<Set>(state, exact + Exact::tile * W, 1, static_cast<const A*>(local));
                else if (rows.whole)
                    carry<Set>(state, exact + Exact::chunk * W, rows.whole, static_cast<const A*>(local));
                add_lanes<Wide>(sums + ChunkSums::Xq * W, Xq);
                add_lanes<Wide>(sums + ChunkSums::Xq_slope * W, Xq_slope);
                add_lanes<Wide>(sums + ChunkSums::gw * W, gw);
                add_lanes<Wide>(sums + ChunkSums::gw_slope * W, gw_slope);
                add_lanes<Wide>(sums + ChunkSums::gX * W, gX);
            }
            for (Index r = 0; r < rows.whole; r += row_group) {
                for (Index i = rows.whole; i < r + row_group; ++i) std::fill_n(Z + i * Z_row, Z_row, A(0));
                spread<L::tokens, 4, V>(args.du + r * chunk_tokens * W + end, backwards, powers,
                                        Z + r * Z_row, Z_row, block);
            }
            if (rows.last) {
                // k runs back from the last token of the short chunk, so its places differ from the others'.
                std::fill_n(Z_last + Z_row, (row_group - 1) * Z_row, A(0));
                std::fill_n(du_last, row_group * chunk_tokens * W, A(0));
                spread<L::tokens, 4, V>(du_last, Index{W}, powers, static_cast<const A*>(Z_last), Z_row,
                                        block);
                A* to = args.du + (rows.whole * chunk_tokens + rows.last - 1) * W;
                for (Index k = 0; k < rows.last; ++k)
                    simd::store(to - k * W, simd::load<V>(to - k * W) + simd::load<V>(du_last + k * W));
            }
        }
    }
    static Index scratch(Index W) {
        const Index Z_row = mode_block * 2 * W;
        return (tile_chunks + row_group) * Z_row + tile_chunks * 10 * W + row_group * chunk_tokens * W +
               4 * W;
    }
};

template <class A>
struct ChunkedLayout {
    PowerLayout<A> powers;
    TileMemory<A> memory;

    ChunkedLayout(Arena& arena, const Shape& s, pass p, int threads, Index W)
        : powers(arena, s, p == pass::backward, W),
          memory(arena, s, p, threads, W,
                 p == pass::backward ? ChunkBackward<A>::scratch(W) : powers_scratch(W),
                 (s.modes * ChunkSums::rows + chunk_tokens) * W) {}
};

/// exec has been resolved.
template <class T, class P>
void chunked_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out,
                     Saved saved, Workspace ws) {
    using A = acc_t<T>;
    Arena arena(ws.data);
    const ChunkedLayout<A> w(arena, shape_of(in), pass::forward, exec.threads, simd::lanes<A>(exec.isa));
    fill_powers<A>(exec, options, in.params, w.powers);
    const TileLoops<T, P> loops{exec, in, w.memory, saved, group_tokens};
    loops.forward(out, [&](Index block, Index d, const ForwardTile<A>& tile) {
        simd::run_body<ChunkForward<A>>(exec.isa,
                                        typename ChunkForward<A>::Args{tile, w.powers.block(block), d == 1});
    });
}

/// Gradients in discrete form (eq. 17) from the sums over chunks: rows of W lanes a mode, (re, im) of
/// DiscreteGrads' members, in the sums of the first group. Those of other groups and directions are added
/// in a fixed order.
template <class A>
struct ChunkGradients {
    enum Row { Abar = 0, Bbar = 2, C = 4, C_reverse = 6 };

    template <class V>
    static INTERSTATE_INLINE void put_conj(double* p, Index W, const Complexes<V>& x) {
        store_rows(p, W, Complexes<V>{x.re, simd::broadcast<V>(0.0) - x.im});
    }

    template <class Set>
    static INTERSTATE_INLINE void run(const PowerTables<A>& t, double* sums, Index group_stride, Index groups,
                                      Index direction_stride, Index directions, Index modes) {
        using V = typename Lanes<Set, A>::Wide;
        constexpr int W = Lanes<Set, A>::W;
        const V two = simd::broadcast<V>(2.0),
                sixteen = simd::broadcast<V>(static_cast<double>(chunk_tokens));
        for (Index at = 0; at < directions * direction_stride; at += V::lanes) {
            V sum = simd::load<V>(sums + at);
            for (Index g = 1; g < groups; ++g) sum = sum + simd::load<V>(sums + g * group_stride + at);
            simd::store(sums + at, sum);
        }
        for (Index n = 0; n < modes; ++n)
            for (int at = 0; at < W; at += V::lanes) {
                const double* exact = t.exact + n * Exact::rows * W + at;
                const auto a = load_rows<V>(exact + Exact::Abar * W, W),
                           b = load_rows<V>(exact + Exact::Bbar * W, W);
                Complexes<V> dA = zeros<V>(), dB = dA, dC[2] = {dA, dA};
                for (Index d = 0; d < directions; ++d) {
                    const double* from = sums + d * direction_stride + n * ChunkSums::rows * W + at;
                    const double* dK = sums + d * direction_stride + modes * ChunkSums::rows * W + at;
                    const auto c2 = load_rows<V>(exact + (d ? Exact::C_reverse : Exact::C) * W, W);
                    // sum_k dK[k] Abar^k and its derivative; at the end before = Abar^15.
                    Complexes<V> p{simd::broadcast<V>(1.0), simd::broadcast<V>(0.0)},
                        before = zeros<V>(), taps = before, slope = before;
                    for (int k = 0; k < chunk_tokens; ++k) {
                        const V g = simd::load<V>(dK + k * W),
                                gk = simd::broadcast<V>(static_cast<double>(k)) * g;
                        taps = {simd::fma(g, p.re, taps.re), simd::fma(g, p.im, taps.im)};
                        slope = {simd::fma(gk, before.re, slope.re), simd::fma(gk, before.im, slope.im)};
                        before = p;
                        p = p * a;
                    }
                    const auto Xq = load_rows<V>(from + ChunkSums::Xq * W, W);
                    const auto Xq_slope = load_rows<V>(from + ChunkSums::Xq_slope * W, W);
                    const auto gw = load_rows<V>(from + ChunkSums::gw * W, W);
                    const auto gw_slope = load_rows<V>(from + ChunkSums::gw_slope * W, W);
                    const auto gX = load_rows<V>(from + ChunkSums::gX * W, W);
                    const auto gX_last = load_rows<V>(from + ChunkSums::gX_last * W, W);
                    const auto own = fma(a, Xq, b * taps);
                    dC[d] = {two * own.re, two * own.im};
                    dB = fma(c2, taps, Complexes<V>{dB.re + gw.re, dB.im + gw.im});
                    dA = fma(c2, fma(a, Xq_slope, fma(b, slope, Xq)), dA);
                    dA = fma(b, gw_slope, dA);
                    dA = fma(before, Complexes<V>{sixteen * gX.re, sixteen * gX.im}, dA);
                    dA = {dA.re + gX_last.re, dA.im + gX_last.im};
                }
                double* to = sums + n * ChunkSums::rows * W + at;
                put_conj(to + Abar * W, W, dA);
                put_conj(to + Bbar * W, W, dB);
                put_conj(to + C * W, W, dC[0]);
                put_conj(to + C_reverse * W, W, dC[1]);
            }
    }
};

template <class T, class P>
void chunked_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in, Saved saved,
                      const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W), N = s.modes;
    Arena arena(ws.data);
    const ChunkedLayout<A> w(arena, s, pass::backward, exec.threads, W);
    fill_powers<A>(exec, options, in.params, w.powers);
    const TileLoops<T, P> loops{exec, in, w.memory, saved, group_tokens};
    loops.backward(upstream, grads, -1.0, [&](Index block, Index d, const BackwardTile<A>& tile) {
        simd::run_body<ChunkBackward<A>>(
            exec.isa, typename ChunkBackward<A>::Args{tile, w.powers.block(block), d == 1});
    });
    parallel_for(blocks, exec.threads, [&](Index block, int) {
        double* sums = w.memory.sums + block * directions(s) * w.memory.sums_size;
        simd::run_body<ChunkGradients<A>>(exec.isa, w.powers.block(block), sums,
                                          blocks * directions(s) * w.memory.sums_size, backward_groups(s),
                                          w.memory.sums_size, directions(s), N);
        for (Index lane = 0; lane < std::min(W, s.channels - block * W); ++lane)
            write_grads(options, in.params, grads.params, block * W + lane,
                        sums[N * ChunkSums::rows * W + lane], [&](Index n, const Mode&) {
                            const auto at = [&](Index row) {
                                const double* from = sums + (n * ChunkSums::rows + row) * W + lane;
                                return c64{from[0], from[W]};
                            };
                            using G = ChunkGradients<A>;
                            return DiscreteGrads{at(G::Abar), at(G::Bbar), at(G::C), at(G::C_reverse)};
                        });
    });
}

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
