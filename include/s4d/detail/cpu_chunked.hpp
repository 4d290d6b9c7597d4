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

/// A tile forward: y from u, which is zero beyond `count`. state (N, 2, W) moves to the end of the tile.
template <class A>
struct ChunkForward {
    struct Args {
        PowerTables<A> tables;
        bool reverse;
        const A* u;
        A* y;
        A* scratch;
        double* state;
        Index modes, count;
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
            collect_tile<Set, 2>(args.u + (chunk_tokens - 1) * W, Index{-W}, power, rows.padded, block, args.scratch, Y_row);
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
                spread<L::tokens, 2, V>(args.y + r * chunk_tokens * W, W, power, args.scratch + r * Y_row, Y_row, block);
        }
    }
};

/// A tile backward: du from dy, both zero beyond `count`, and the sums over chunks. state (N, 2, W) is the
/// conjugate gradient of the state, and moves to the beginning of the tile.
template <class A>
struct ChunkBackward {
    struct Args {
        PowerTables<A> tables;
        bool reverse;
        const A* u;
        const A* dy;
        A* du;
        A* scratch;
        double* state;
        const A* checkpoint;  // (N, 2) rows of lanes
        Index lane_stride;    // from row to row of the checkpoint
        double* sums;         // (N, ChunkSums::rows, W)
        double* dK;           // (16, W)
        Index modes, count;
    };

    template <class V>
    static INTERSTATE_INLINE void multiply_add(Complexes<V>& sum, const Complexes<V>& a, const Complexes<V>& b) {
        sum = fma(a, b, sum);
    }

    /// dK[j] += sum of dy[r, k] u[r, k-j] over the tile (eq. 17).
    template <int Taps, class V>
    static INTERSTATE_INLINE void kernel_gradient(const A* u, const A* dy, Index rows, double* dK) {
        using Wide = simd::Vec<double, V::lanes * static_cast<int>(sizeof(A)) / 8>;
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
                            sum[j] = simd::fma(dyk, simd::load<V>(u + (r * chunk_tokens + k - j0 - j) * W), sum[j]);
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
        A* Z = args.scratch;                     // (16, mode_block, 2, W): what is spread over du
        A* w = Z + tile_chunks * Z_row;          // (16, 4, W)
        A* q = w + tile_chunks * 4 * W;          // (16, 4, W)
        A* X = q + tile_chunks * 4 * W;          // (16, 2, W)
        A* Z_last = X + tile_chunks * 2 * W;     // (4 rows of Z, the first used): of a short chunk
        A* du_last = Z_last + row_group * Z_row; // (4 chunks)
        A* local = du_last + row_group * chunk_tokens * W;
        const A* kernel = args.tables.kernel + (args.reverse ? chunk_tokens * W : 0);
        constexpr Index backwards = -W;
        const Index end = (chunk_tokens - 1) * W;

        for (Index r = 0; r < rows.padded; r += row_group)
            convolve<L::tokens, V>(args.dy + r * chunk_tokens * W + end, args.du + r * chunk_tokens * W + end, backwards,
                                   kernel);
        kernel_gradient<Set::registers == 32 ? 16 : 8, V>(args.u, args.dy, used, args.dK);

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
                collect_tile<Set, 4>(args.dy, Index{W}, power, used, 1, q, Index{4 * W});

                const A* checkpoint = args.checkpoint + (n0 + n) * 2 * args.lane_stride;
                auto x = load_rows<V>(checkpoint, args.lane_stride);
                for (Index r = 0; r < rows.whole; ++r) {
                    store_rows(X + r * 2 * W, W, x);
                    x = fma(a, x, b * load_rows<V>(w + r * 4 * W, W));
                }

                auto g = load_rows<V>(static_cast<const double*>(state), W);
                auto Xq = zeros<V>(), Xq_slope = Xq, gw = Xq, gw_slope = Xq, gX = Xq;
                if (rows.last) {
                    // The short chunk: x is the state before it, g what comes from after the sequence.
                    const Index r = rows.whole;
                    collect<1, 1, 4, V>(args.u + (r * chunk_tokens + rows.last - 1) * W, backwards, power, rows.last, local,
                                        0, 0);
                    Xq = x * load_rows<V>(q + r * 4 * W, W);
                    Xq_slope = x * load_rows<V>(q + r * 4 * W + 2 * W, W);
                    gw = g * load_rows<V>(local, W);
                    gw_slope = g * load_rows<V>(local + 2 * W, W);
                    store_rows(Z_last + n * 2 * W, W, b * g);
                    const auto gx = g * x;
                    store_rows(local, W, gx);
                    for (int at = 0; at < W; at += Wide::lanes) {
                        const auto slope = raise(load_rows<Wide>(exact + Exact::Abar * W + at, W), rows.last - 1);
                        const Wide times = simd::broadcast<Wide>(static_cast<double>(rows.last));
                        double* sum = sums + ChunkSums::gX_last * W + at;
                        store_rows(sum, W, fma(Complexes<Wide>{times * slope.re, times * slope.im},
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
                spread<L::tokens, 4, V>(args.du + r * chunk_tokens * W + end, backwards, powers, Z + r * Z_row, Z_row, block);
            }
            if (rows.last) {
                // k runs back from the last token of the short chunk, so its places differ from the others'.
                std::fill_n(Z_last + Z_row, (row_group - 1) * Z_row, A(0));
                std::fill_n(du_last, row_group * chunk_tokens * W, A(0));
                spread<L::tokens, 4, V>(du_last, Index{W}, powers, static_cast<const A*>(Z_last), Z_row, block);
                A* to = args.du + (rows.whole * chunk_tokens + rows.last - 1) * W;
                for (Index k = 0; k < rows.last; ++k)
                    simd::store(to - k * W, simd::load<V>(to - k * W) + simd::load<V>(du_last + k * W));
            }
        }
    }
    static Index scratch(Index W) {
        const Index Z_row = mode_block * 2 * W;
        return (tile_chunks + row_group) * Z_row + tile_chunks * 10 * W + row_group * chunk_tokens * W + 4 * W;
    }
};

template <class A>
struct ChunkedLayout {
    PowerLayout<A> powers;
    A* tiles;       // (threads, tiles_size): u, and y or dy and du, then scratch
    A* sum;         // (threads, L + 1, W), bidirectional
    double* states; // (threads, N, 2, W)
    double* sums;   // (groups, blocks, directions, sums_size), backward
    Index tiles_size, sum_size, states_size, sums_size;

    ChunkedLayout(Arena& arena, const Shape& s, pass p, int threads, Index W)
        : powers(arena, s, p == pass::backward, W) {
        const bool back = p == pass::backward;
        tiles_size = (back ? 3 : 2) * tile_tokens * W + (back ? ChunkBackward<A>::scratch(W) : powers_scratch(W));
        tiles = arena.take<A>(threads * tiles_size);
        sum_size = s.bidirectional ? (s.length + 1) * W : 0;
        sum = arena.take<A>(threads * sum_size);
        states_size = 2 * s.modes * W;
        states = arena.take<double>(threads * states_size);
        sums_size = (s.modes * ChunkSums::rows + chunk_tokens) * W;
        sums = arena.take<double>(back ? backward_groups(s) * ceil_div(s.channels, W) * directions(s) * sums_size : 0);
    }
};

/// exec has been resolved.
template <class T, class P>
void chunked_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
                     Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W), N = s.modes;
    Arena arena(ws.data), saved_arena(saved.data);
    const ChunkedLayout<A> w(arena, s, pass::forward, exec.threads, W);
    A* kept = saved_arena.take<A>(directions(s) * checkpoint_count(s) * checkpoint_size(s));
    fill_powers<A>(exec, options, in.params, w.powers);
    zero_outside_sequences(out.y, in.cu_seqlens, s);
    parallel_for(s.states() * blocks, exec.threads, [&](Index task, int worker) {
        const Index i = task / blocks, h = task % blocks * W, width = std::min(W, s.channels - h);
        const auto [batch, rows] = place_of(in.cu_seqlens, s, i);
        A* u = w.tiles + worker * w.tiles_size;
        A* y = u + tile_tokens * W;
        double* state = w.states + worker * w.states_size;
        for (Index d = directions(s) - 1; d >= 0; --d) {
            const bool reverse = d == 1;
            const TileStream<T> stream{exec.isa, {batch, rows, reverse}, h, width, W,
                                       s.bidirectional ? w.sum + worker * w.sum_size : nullptr};
            load_state(state, reverse ? View<const complex<A>, 3>{} : in.x0, i, h, width, N, W);
            A* checkpoint = checkpoints_at(kept, in.cu_seqlens, s, i, h, reverse);
            for (Index begin = 0; begin < stream.length(); begin += tile_tokens) {
                const Index count = std::min(tile_tokens, stream.length() - begin);
                if (checkpoint) {
                    store_checkpoint(checkpoint, state, s, W);
                    checkpoint += checkpoint_size(s);
                }
                stream.load(u, in.u, begin, count, TileRows::padded_tokens(count));
                simd::run_body<ChunkForward<A>>(
                    exec.isa, typename ChunkForward<A>::Args{w.powers.block(task % blocks), reverse, u, y, y + tile_tokens * W,
                                                             state, N, count});
                stream.store_y(y, out.y, begin, count);
            }
            if (!reverse) store_state(state, out.xT, i, h, width, N, W);
        }
    });
}

/// Gradients of mode n in discrete form from the sums over chunks of one direction (eq. 17). `C` is C or
/// C_reverse of that direction.
template <class Sums, class Taps>
DiscreteGrads chunk_gradients(const Mode& mode, c64 C, bool reverse, Sums&& sums, Taps&& dK) {
    const c64 out = 2.0 * (C * mode.Abar);
    c64 power{1.0, 0.0}, previous{}, taps{}, slope{};  // sum_k dK Abar^k, its derivative; at the end Abar^16
    for (int k = 0; k < chunk_tokens; ++k) {
        const double g = dK(k);
        taps += g * power;
        slope += (g * k) * previous;
        previous = power;
        power = power * mode.Abar;
    }
    const c64 CB = C * mode.Bbar, Xq = sums(ChunkSums::Xq);
    const c64 dC = 2.0 * (mode.Abar * Xq + mode.Bbar * taps);
    const c64 dAbar = 2.0 * (C * Xq) + out * sums(ChunkSums::Xq_slope) + mode.Bbar * sums(ChunkSums::gw_slope) +
                      static_cast<double>(chunk_tokens) * (previous * sums(ChunkSums::gX)) + sums(ChunkSums::gX_last) +
                      2.0 * (CB * slope);
    DiscreteGrads g;
    g.Abar = conj(dAbar);
    g.Bbar = conj(sums(ChunkSums::gw) + 2.0 * (C * taps));
    (reverse ? g.C_reverse : g.C) = conj(dC);
    return g;
}

template <class T, class P>
void chunked_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in, Saved saved,
                      const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W), N = s.modes;
    const Index groups = backward_groups(s);
    Arena arena(ws.data), saved_arena(saved.data);
    const ChunkedLayout<A> w(arena, s, pass::backward, exec.threads, W);
    A* kept = saved_arena.take<A>(directions(s) * checkpoint_count(s) * checkpoint_size(s));
    fill_powers<A>(exec, options, in.params, w.powers);
    zero_outside_sequences(grads.u, in.cu_seqlens, s);
    parallel_for(groups * blocks, exec.threads, [&](Index task, int worker) {
        const Index h = task % blocks * W, width = std::min(W, s.channels - h);
        A* u = w.tiles + worker * w.tiles_size;
        A* dy = u + tile_tokens * W;
        A* du = dy + tile_tokens * W;
        double* state = w.states + worker * w.states_size;
        double* all_sums = w.sums + task * directions(s) * w.sums_size;
        std::fill_n(all_sums, directions(s) * w.sums_size, 0.0);
        for (Index i = task / blocks; i < s.states(); i += groups) {
            const auto [batch, rows] = place_of(in.cu_seqlens, s, i);
            for (Index d = directions(s) - 1; d >= 0; --d) {
                const bool reverse = d == 1;
                const TileStream<T> stream{exec.isa, {batch, rows, reverse}, h, width, W,
                                           s.bidirectional ? w.sum + worker * w.sum_size : nullptr};
                double* sums = all_sums + d * w.sums_size;
                const A* checkpoints = checkpoints_at(kept, in.cu_seqlens, s, i, h, reverse);
                load_state(state, reverse ? View<const complex<A>, 3>{} : upstream.xT, i, h, width, N, W, -1.0);
                for (Index c = ceil_div(stream.length(), tile_tokens) - 1; c >= 0; --c) {
                    const Index begin = c * tile_tokens, count = std::min(tile_tokens, stream.length() - begin);
                    const Index padded = TileRows::padded_tokens(count);
                    stream.load(u, in.u, begin, count, padded);
                    stream.load_dy(dy, upstream.y, begin, count, padded);
                    simd::run_body<ChunkBackward<A>>(
                        exec.isa, typename ChunkBackward<A>::Args{
                                      w.powers.block(task % blocks), reverse, u, dy, du, du + tile_tokens * W, state,
                                      checkpoints + c * checkpoint_size(s), checkpoint_lanes(s), sums,
                                      sums + N * ChunkSums::rows * W, N, count});
                    stream.store_du(du, grads.u, begin, count);
                }
                if (!reverse) store_state(state, grads.x0, i, h, width, N, W, -1.0);
            }
        }
    });
    parallel_for(s.channels, exec.threads, [&](Index h, int) {
        const auto total = [&](Index d, Index row) {
            double sum = 0.0;
            for (Index group = 0; group < groups; ++group)
                sum += w.sums[((group * blocks + h / W) * directions(s) + d) * w.sums_size + row * W + h % W];
            return sum;
        };
        double dK[2][chunk_tokens] = {};
        for (Index d = 0; d < directions(s); ++d)
            for (int k = 0; k < chunk_tokens; ++k) dK[d][k] = total(d, N * ChunkSums::rows + k);
        write_grads(options, in.params, grads.params, h, dK[0][0], [&](Index n, const Mode& mode) {
            DiscreteGrads all;
            for (Index d = 0; d < directions(s); ++d) {
                const auto& C = d ? in.params.C_reverse : in.params.C;
                const DiscreteGrads g = chunk_gradients(
                    mode, cast<double>(C(h, n)), d == 1,
                    [&](ChunkSums::Row row) {
                        return c64{total(d, n * ChunkSums::rows + row), total(d, n * ChunkSums::rows + row + 1)};
                    },
                    [&](int k) { return dK[d][k]; });
                all.Abar += g.Abar;
                all.Bbar += g.Bbar;
                (d ? all.C_reverse : all.C) = d ? g.C_reverse : g.C;
            }
            return all;
        });
    });
}

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
