// What the CPU methods of S4D share. Vector lanes are channels: a task works on one recurrence (batch
// row or packed sequence) and one block of W channels, and copies tiles of tokens to [token][lane]
// memory, which absorbs strides, storage dtype and direction. These copies are the only code that
// knows the storage dtype: what computes is compiled for float and double alone. (Matrix units for
// 16-bit types would take their place beside them: products on the stored elements of a tile.)
//
// Direction. The second half of a bidirectional layer (eq. 12) is the causal layer on the sequence read
// backwards, its output moved by one token: it excludes the token itself. So kernels know one direction,
// and views do the rest: `Reading` flips them and moves dy, and the sums of both directions meet in an
// accumulator before they are rounded to storage.
#pragma once

#include <algorithm>

#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>
#include <interstate/dispatch.hpp>
#include <s4d/detail/discretize.hpp>
#include <s4d/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

inline constexpr Index tile_tokens = 256;  // a checkpoint each; also the tile in L1
inline constexpr Index lane_padding = 16;  // widest block; checkpoints do not depend on the ISA

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

/// One, or two where the layer is bidirectional.
inline Index directions(const Shape& s) { return s.bidirectional ? 2 : 1; }

/// Checkpoints of recurrence i, for one direction and block: (tiles, N, 2, padded H), or null.
template <class A>
A* checkpoints_at(A* saved, const View<const std::int32_t, 1>& cu, const Shape& s, Index i, Index h,
                  bool reverse) {
    if (!saved) return nullptr;
    const Index from = first_checkpoint(cu, s, i) + (reverse ? checkpoint_count(s) : 0);
    return saved + from * checkpoint_size(s) + h;
}
/// From row to row of a checkpoint: padded H.
inline Index checkpoint_lanes(const Shape& s) { return checkpoint_size(s) / std::max<Index>(2 * s.modes, 1); }

template <class A>
void store_checkpoint(A* checkpoint, const double* state, const Shape& s, Index W) {
    for (Index r = 0; r < 2 * s.modes; ++r)
        for (Index lane = 0; lane < W; ++lane)
            checkpoint[r * checkpoint_lanes(s) + lane] = static_cast<A>(state[r * W + lane]);
}

/// Tasks that split the recurrences in backward, at least one, whose sums are zero where there are none.
/// Fixed, so that sums do not depend on threads.
inline Index backward_groups(const Shape& s) { return std::clamp<Index>(s.states(), 1, 16); }

/// The sequence of a task in the order in which it is processed: token p of `length`.
struct Reading {
    Index batch;
    RowRange rows;
    bool reverse = false;

    Index length() const { return rows.end - rows.begin; }

    /// A view whose row rows.begin + p is token p.
    template <class T>
    View<T, 3> operator()(View<T, 3> x) const {
        if (reverse && x && length() > 0) {
            x.data += (rows.begin + rows.end - 1) * x.stride[1];
            x.stride[1] = -x.stride[1];
        }
        return x;
    }
};

/// Copies rows [begin, begin + count) of W channels starting at h to a tile of `padded` tokens, zeros
/// beyond `count` and beyond the last channel. `pitch` is the distance of tokens in the tile.
template <class T>
struct LoadTile {
    template <class Set>
    static INTERSTATE_INLINE void run(acc_t<T>* tile, Index pitch, const View<const T, 3>& x, Index b,
                                      Index begin, Index count, Index padded, Index h, Index width) {
        using A = acc_t<T>;
        using V = simd::Native<Set, A>;
        constexpr int W = V::lanes;
        const T* row = count > 0 ? &x(b, begin, h) : nullptr;
        for (Index t = 0; t < count; ++t, row += x.stride[1]) {
            if (width == W && x.stride[2] == 1) {
                simd::store(tile + t * pitch, simd::load_as<V>(row));
            } else {
                for (Index lane = 0; lane < W; ++lane)
                    tile[t * pitch + lane] = lane < width ? static_cast<A>(row[lane * x.stride[2]]) : A(0);
            }
        }
        for (Index t = std::max<Index>(count, 0); t < padded; ++t)
            simd::store(tile + t * pitch, simd::broadcast<V>(A(0)));
    }
};

template <class T>
struct StoreTile {
    template <class Set>
    static INTERSTATE_INLINE void run(const acc_t<T>* tile, Index pitch, const View<T, 3>& x, Index b,
                                      Index begin, Index count, Index h, Index width) {
        using V = simd::Native<Set, acc_t<T>>;
        constexpr int W = V::lanes;
        T* row = &x(b, begin, h);
        for (Index t = 0; t < count; ++t, row += x.stride[1]) {
            if (width == W && x.stride[2] == 1) {
                simd::store_as(row, simd::load<V>(tile + t * pitch));
            } else {
                for (Index lane = 0; lane < width; ++lane)
                    row[lane * x.stride[2]] = T(tile[t * pitch + lane]);
            }
        }
    }
};

/// The tokens of the other direction, which are in reverse order: tile[t] += last[-t].
template <class A>
struct AddReversed {
    template <class Set>
    static INTERSTATE_INLINE void run(A* tile, const A* last, Index count) {
        using V = simd::Native<Set, A>;
        constexpr int W = V::lanes;
        for (Index t = 0; t < count; ++t)
            simd::store(tile + t * W, simd::load<V>(tile + t * W) + simd::load<V>(last - t * W));
    }
};

/// Tiles of one task in one direction, for a lane count W known at run time. `sum` (length + 1, W) is
/// where the reversed direction leaves its tokens for the causal one; null where there is one direction.
template <class T>
struct TileStream {
    using A = acc_t<T>;
    Isa isa;
    Reading reading;
    Index h, width, W;
    A* sum;

    Index length() const { return reading.length(); }
    bool causal() const { return !reading.reverse; }

    /// Tokens [begin, begin + count) of an input, zeros up to `padded`.
    void load(A* tile, const View<const T, 3>& x, Index begin, Index count, Index padded) const {
        simd::run_body<LoadTile<T>>(isa, tile, W, reading(x), reading.batch, reading.rows.begin + begin,
                                    count, padded, h, width);
    }
    /// The same of dy: output p of the reversed direction is that of the token after p.
    void load_dy(A* tile, const View<const T, 3>& dy, Index begin, Index count, Index padded) const {
        if (reading.reverse) {
            ++begin;
            count = std::min(count, length() - begin);
        }
        load(tile, dy, begin, count, padded);
    }
    /// Rounds a finished tile to storage, with what the reversed direction has left for it.
    void store(A* tile, const View<T, 3>& x, Index begin, Index count) const {
        if (sum) simd::run_body<AddReversed<A>>(isa, tile, sum + (length() - 1 - begin) * W, count);
        if (x)
            simd::run_body<StoreTile<T>>(isa, static_cast<const A*>(tile), W, x, reading.batch,
                                         reading.rows.begin + begin, count, h, width);
    }
    void store_y(A* tile, const View<T, 3>& y, Index begin, Index count) const {
        if (causal()) return store(tile, y, begin, count);
        if (begin == 0) std::fill_n(sum, W, A(0));
        std::copy_n(tile, count * W, sum + (begin + 1) * W);
    }
    void store_du(A* tile, const View<T, 3>& du, Index begin, Index count) const {
        if (causal()) return store(tile, du, begin, count);
        std::copy_n(tile, count * W, sum + begin * W);
    }
};

/// States (i, h.., n) between memory and (N, 2, W) lanes of float64; an absent tensor reads as zero.
/// `sign` = -1 conjugates.
template <class A>
void load_state(double* state, const View<const complex<A>, 3>& x, Index i, Index h, Index width, Index modes,
                Index W, double sign = 1.0) {
    for (Index n = 0; n < modes; ++n)
        for (Index lane = 0; lane < W; ++lane) {
            const complex<A> z = x && lane < width ? x(i, h + lane, n) : complex<A>{};
            state[(2 * n) * W + lane] = static_cast<double>(z.re);
            state[(2 * n + 1) * W + lane] = sign * static_cast<double>(z.im);
        }
}
template <class A>
void store_state(const double* state, const View<complex<A>, 3>& x, Index i, Index h, Index width,
                 Index modes, Index W, double sign = 1.0) {
    if (!x) return;
    for (Index n = 0; n < modes; ++n)
        for (Index lane = 0; lane < width; ++lane)
            x(i, h + lane, n) = {static_cast<A>(state[(2 * n) * W + lane]),
                                 static_cast<A>(sign * state[(2 * n + 1) * W + lane])};
}

/// A tile of one task, as what computes sees it: tokens (count, W), and scratch behind them.
template <class A>
struct ForwardTile {
    const A* u;
    A* y;
    A* scratch;
    double* state;  // (N, 2, W), moved to the end of the tile
    Index modes, count;
};
template <class A>
struct BackwardTile {
    const A* u;
    const A* dy;
    A* du;
    A* scratch;
    double* state;        // (N, 2, W), gradient of the state, moved to the beginning of the tile
    const A* checkpoint;  // (N, 2) rows of lanes, the state before the tile
    Index lane_stride;    // from row to row of the checkpoint
    double* sums;         // (sums_size) of the task and direction, added to
    Index modes, count;
};

/// Memory of a method that goes through time in tiles, its tables apart.
template <class A>
struct TileMemory {
    A* tiles;        // (threads, tiles_size): u and y, or u, dy and du; then scratch
    A* sum;          // (threads, L + 1, W), bidirectional
    double* states;  // (threads, N, 2, W)
    double* sums;    // (groups, blocks, directions, sums_size), backward
    Index tiles_size, sum_size, states_size, sums_size;

    TileMemory(Arena& arena, const Shape& s, pass p, int threads, Index W, Index scratch,
               Index backward_sums) {
        const bool back = p == pass::backward;
        tiles_size = (back ? 3 : 2) * tile_tokens * W + scratch;
        tiles = arena.take<A>(threads * tiles_size);
        sum_size = s.bidirectional ? (s.length + 1) * W : 0;
        sum = arena.take<A>(threads * sum_size);
        states_size = 2 * s.modes * W;
        states = arena.take<double>(threads * states_size);
        sums_size = back ? backward_sums : 0;
        sums = arena.take<double>(backward_groups(s) * ceil_div(s.channels, W) * directions(s) * sums_size);
    }
};

/// The loops of a method over tasks, directions and tiles. exec has been resolved.
template <class T, class P>
struct TileLoops {
    using A = acc_t<T>;
    const cpu& exec;
    const Inputs<T, P>& in;
    const TileMemory<A>& memory;
    Saved saved;
    Index group;  // tiles end with zeros up to a multiple of so many tokens
    Shape s = shape_of(in);
    Index W = simd::lanes<A>(exec.isa), blocks = ceil_div(s.channels, W);

    /// compute(block, direction, tile) makes tile.y and moves tile.state.
    template <class F>
    void forward(const Outputs<T>& out, F&& compute) const {
        zero_outside_sequences(out.y, in.cu_seqlens);
        parallel_for(s.states() * blocks, exec.threads, [&](Index task, int worker) {
            const Index block = task % blocks;
            A* u = memory.tiles + worker * memory.tiles_size;
            A* y = u + tile_tokens * W;
            const auto tiles = [&](const TileStream<T>& stream, Index d, double* state, A* checkpoint) {
                for (Index begin = 0; begin < stream.length(); begin += tile_tokens) {
                    const Index count = std::min(tile_tokens, stream.length() - begin);
                    if (checkpoint) {
                        store_checkpoint(checkpoint, state, s, W);
                        checkpoint += checkpoint_size(s);
                    }
                    stream.load(u, in.u, begin, count, padded(count));
                    compute(block, d, ForwardTile<A>{u, y, y + tile_tokens * W, state, s.modes, count});
                    stream.store_y(y, out.y, begin, count);
                }
            };
            each_direction(task / blocks, block, worker, in.x0, out.xT, 1.0, tiles);
        });
    }

    /// compute(block, direction, tile) makes tile.du, moves tile.state, whose imaginary parts are those of
    /// the gradient times `sign`, and adds to tile.sums.
    template <class F>
    void backward(const Upstream<T>& upstream, const Grads<T, P>& grads, double sign, F&& compute) const {
        zero_outside_sequences(grads.u, in.cu_seqlens);
        const Index groups = backward_groups(s);
        parallel_for(groups * blocks, exec.threads, [&](Index task, int worker) {
            const Index block = task % blocks;
            A* u = memory.tiles + worker * memory.tiles_size;
            A* dy = u + tile_tokens * W;
            A* du = dy + tile_tokens * W;
            double* sums = memory.sums + task * directions(s) * memory.sums_size;
            std::fill_n(sums, directions(s) * memory.sums_size, 0.0);
            const auto tiles = [&](const TileStream<T>& stream, Index d, double* state,
                                   const A* checkpoints) {
                for (Index c = ceil_div(stream.length(), tile_tokens) - 1; c >= 0; --c) {
                    const Index begin = c * tile_tokens,
                                count = std::min(tile_tokens, stream.length() - begin);
                    stream.load(u, in.u, begin, count, padded(count));
                    stream.load_dy(dy, upstream.y, begin, count, padded(count));
                    compute(block, d,
                            BackwardTile<A>{u, dy, du, du + tile_tokens * W, state,
                                            checkpoints + c * checkpoint_size(s), checkpoint_lanes(s),
                                            sums + d * memory.sums_size, s.modes, count});
                    stream.store_du(du, grads.u, begin, count);
                }
            };
            for (Index i = task / blocks; i < s.states(); i += groups)
                each_direction(i, block, worker, upstream.xT, grads.x0, sign, tiles);
        });
    }

  private:
    Index padded(Index count) const { return ceil_div(count, group) * group; }

    /// Recurrence i of a block, the reversed direction first, to which the causal one adds. Only the causal
    /// one starts from `from` and leaves `to`.
    template <class F>
    void each_direction(Index i, Index block, int worker, const View<const complex<A>, 3>& from,
                        const View<complex<A>, 3>& to, double sign, F&& tiles) const {
        const auto [batch, rows] = place_of(in.cu_seqlens, s, i);
        const Index h = block * W, width = std::min(W, s.channels - h);
        A* kept = Arena(saved.data).take<A>(directions(s) * checkpoint_count(s) * checkpoint_size(s));
        A* sum = s.bidirectional ? memory.sum + worker * memory.sum_size : nullptr;
        double* state = memory.states + worker * memory.states_size;
        for (Index d = directions(s) - 1; d >= 0; --d) {
            const bool reverse = d == 1;
            load_state(state, reverse ? View<const complex<A>, 3>{} : from, i, h, width, s.modes, W, sign);
            tiles(TileStream<T>{exec.isa, {batch, rows, reverse}, h, width, W, sum}, d, state,
                  checkpoints_at(kept, in.cu_seqlens, s, i, h, reverse));
            if (!reverse) store_state(state, to, i, h, width, s.modes, W, sign);
        }
    }
};

/// Gradients of one mode in discrete form.
struct DiscreteGrads {
    c64 Abar{}, Bbar{}, C{}, C_reverse{};
};

/// Writes the gradients of channel h's parameters (eq. 9 and 10); totals(n) gives those of mode n.
template <class P, class F>
void write_grads(const Options& options, const Params<P>& params, const BasicParams<P, complex<P>>& grads,
                 Index h, double dD, F&& totals) {
    double dlog_dt = 0.0;
    for (Index n = 0; n < params.log_neg_re.extent[1]; ++n) {
        const Mode mode = mode_at(options.disc, params, h, n);
        const DiscreteGrads d = totals(n, mode);
        const ModeGrads g =
            discretize_backward(options.disc, mode, cast<double>(params.B(h, n)), d.Abar, d.Bbar);
        dlog_dt += g.log_dt;
        if (grads.log_neg_re) grads.log_neg_re(h, n) = static_cast<P>(g.log_neg_re);
        if (grads.im) grads.im(h, n) = static_cast<P>(g.im);
        if (grads.B) grads.B(h, n) = cast<P>(g.B);
        if (grads.C) grads.C(h, n) = cast<P>(d.C);
        if (grads.C_reverse) grads.C_reverse(h, n) = cast<P>(d.C_reverse);
    }
    if (grads.log_dt) grads.log_dt(h) = static_cast<P>(dlog_dt);
    if (grads.D) grads.D(h) = static_cast<P>(dD);
}

template <class V>
struct Complexes {
    V re, im;
};

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
