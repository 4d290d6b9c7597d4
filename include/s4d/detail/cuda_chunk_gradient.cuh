// The chunked method of S4D on the GPU, the gradients of a system's parameters (docs/ops/s4d.md, eq. 21): a warp has one or two
// times eight modes of a channel and goes through tiles in any order, from the states that enter them on both ways.
//
// Here products are turned around: rows are the real and imaginary parts of eight modes, columns chunks. A lane
// then has one mode (group) and eight chunks in a row (quad), and what the scans leave in its registers is the left
// factor of the products over chunks that the sums are made of. These stay in registers until the end.
#pragma once

#include <s4d/detail/cuda_chunk_tile.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail::chunks {

template <class T>
using GradientTile = TokenTile<T, Interleave::by_chunk>;
template <class T>
using GradientMover = TileMover<T, Interleave::by_chunk>;
inline constexpr int octet = 8;
inline constexpr int gradient_channels = 8;  // of a block, a warp each
/// Octets of a warp, in step, so that one's latency hides the other's: more modes are more blocks.
template <class T>
inline constexpr int warp_octets = sizeof(T) == 8 ? 1 : 2;

/// Shared memory of a warp in the gradient kernel, in elements of A.
template <class T>
struct GradientLayout {
    using A = acc_t<T>;
    static constexpr int octets = warp_octets<T>, modes = octets * octet;
    static constexpr int left = 2 * ChunkTables<T>::factors_size;  // an octet's factors
    // By octets: beta A^(chunk-1-s) and gamma A^t as left factors, and powers as in ChunkTables.
    static constexpr int V = 0, Q = octets * left, powers = 2 * octets * left;
    static constexpr int tail = powers + octets * 2 * ChunkTables<T>::power_size;  // (modes, 4): A, beta
    static constexpr int slopes = tail + 4 * modes;                      // (modes, 2): finish_tile
    static constexpr int edges = slopes + 2 * modes;                     // (2, modes, 4): first X, last E
    /// Running products of dy and u, two blocks by two blocks of tokens, c of lanes.
    static constexpr int token_pairs = token_blocks<T> / 2;
    static constexpr int products = edges + 2 * 4 * modes;
    static constexpr int size = products + token_pairs * (token_pairs + 1) / 2 * 2 * 128;
    static_assert(16 * (Form<T>::chunk + 1) <= tail && 2 * octet * Form<T>::chunk <= tail);  // where sums over tokens are laid out in the end
};

inline namespace INTERSTATE_KERNELS {

/// Place of a factor of a mode's real or imaginary part among an octet's left factors: steps, lanes, rows and pairs.
template <class T>
__device__ constexpr int left_at(int mode, int part, int token) {
    constexpr int depth = GradientTile<T>::depth;
    const int lane = 4 * mode + token % 8 / 2, place = (token / depth * 32 + lane) * (depth / 2);
    return depth == 16 ? place + 2 * (part + 2 * (token % 16 / 8)) + token % 2 : place + part + 2 * (token % 2);
}

/// By octets, a lane's eight chunks of its mode.
template <class T>
using OctetStates = complex<acc_t<T>> (&)[warp_octets<T>][lane_chunks];

/// Responses to tokens.
template <class T, class A = acc_t<T>>
__device__ void octet_responses(OctetStates<T> W, const typename GradientTile<T>::Element* tile, const A* table, Lane lane) {
    constexpr int octets = warp_octets<T>;
    FormFactors<T, 2> a[octets][2];
#pragma unroll
    for (int o = 0; o < octets; ++o)
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const Four<A> x = four(table + o * GradientLayout<T>::left + 4 * (32 * step + lane.index));
            if constexpr (Form<T>::precision == Precision::bfloat) {
#pragma unroll
                for (int e = 0; e < 4; ++e) a[o][step].word[e] = __float_as_uint(x.x[e]);
            } else {
                a[o][step].set(0, 0, x.x[0], x.x[2]);
                a[o][step].set(1, 0, x.x[1], x.x[3]);
            }
        }
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        FormFactors<T, 1> b[2][2];
        GradientTile<T>::chunks_as_columns(b, tile, p, lane);
        A c[octets][2][4] = {};
        device::multiply_add_each<2>([&](int step, auto&& add) {
#pragma unroll
            for (int o = 0; o < octets; ++o)
#pragma unroll
                for (int i = 0; i < 2; ++i) add(c[o][i], a[o][step], b[i][step]);
        });
#pragma unroll
        for (int o = 0; o < octets; ++o)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                W[o][2 * p + i] = {c[o][i][0], c[o][i][2]};
                W[o][2 * p + i + 4] = {c[o][i][1], c[o][i][3]};
            }
    }
}

/// In place of W, the states that enter the chunks, from `start`; in place of Q, those that follow them in
/// reverse time, E[r-1] = A^chunk E[r] + Q[r], from `last`.
template <class T, class A = acc_t<T>>
__device__ void scan_octets(OctetStates<T> W, OctetStates<T> Q, const A* powers, const complex<A> (&start)[warp_octets<T>],
                            const complex<A> (&last)[warp_octets<T>], Lane lane) {
    constexpr int back = lane_chunks - 1, octets = warp_octets<T>;
    const complex<A> zero{A(0), A(0)};
    complex<A> x[octets], e[octets], chunk[octets];
#pragma unroll
    for (int o = 0; o < octets; ++o) {
        chunk[o] = power_of(powers + o * 2 * ChunkTables<T>::power_size, over_chunk);
        x[o] = affine(chunk[o], lane.quad == 0 ? start[o] : zero, W[o][0]);
        e[o] = affine(chunk[o], lane.quad == 3 ? last[o] : zero, Q[o][back]);
    }
#pragma unroll
    for (int r = 1; r < lane_chunks; ++r)
#pragma unroll
        for (int o = 0; o < octets; ++o) {
            x[o] = affine(chunk[o], x[o], W[o][r]);
            e[o] = affine(chunk[o], e[o], Q[o][back - r]);
        }
    static_assert(lane_chunks == 2 * own);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int o = 0; o < octets; ++o) {
            const complex<A> before = shuffle_up(x[o], 1 << i), after = shuffle_down(e[o], 1 << i);
            const complex<A> over =
                power_of(powers + o * 2 * ChunkTables<T>::power_size, i == 0 ? over_2_own : over_4_own);
            if (lane.quad >= 1 << i) x[o] = affine(over, before, x[o]);
            if (lane.quad < 4 - (1 << i)) e[o] = affine(over, after, e[o]);
        }
#pragma unroll
    for (int o = 0; o < octets; ++o) {
        x[o] = shuffle_up(x[o], 1);
        e[o] = shuffle_down(e[o], 1);
        if (lane.quad == 0) x[o] = start[o];
        if (lane.quad == 3) e[o] = last[o];
    }
#pragma unroll
    for (int r = 0; r < lane_chunks; ++r)
#pragma unroll
        for (int o = 0; o < octets; ++o) {
            const complex<A> next = affine(chunk[o], x[o], W[o][r]), previous = affine(chunk[o], e[o], Q[o][back - r]);
            W[o][r] = x[o];
            Q[o][back - r] = e[o];
            x[o] = next;
            e[o] = previous;
        }
}

/// c[mode, token] += sum over chunks of x[mode, chunk] times the chunk's token.
template <class T, class A = acc_t<T>>
__device__ void add_chunk_products(A (&c)[warp_octets<T>][token_blocks<T>][4], OctetStates<T> x,
                                   const typename GradientTile<T>::Element* tile, Lane lane) {
    // The tensor core truncates what it adds up: where that would show after many tiles, a tile's sums are added apart.
    constexpr bool apart = Form<T>::precision != Precision::bfloat;
    constexpr int octets = warp_octets<T>;
    FormFactors<T, 2> a[octets][GradientTile<T>::chunk_steps];
#pragma unroll
    for (int o = 0; o < octets; ++o) chunks_as_pairs<T>(a[o], x[o]);
#pragma unroll
    for (int i = 0; i < token_blocks<T> / 2; ++i) {
        A fresh[octets][2][4] = {};
#pragma unroll
        for (int step = 0; step < GradientTile<T>::chunk_steps; ++step) {
            FormFactors<T, 1> b[2];
            GradientTile<T>::tokens_as_columns(b, tile, i, step, lane);
            device::multiply_add_each<1>([&](int, auto&& add) {
#pragma unroll
                for (int o = 0; o < octets; ++o)
#pragma unroll
                    for (int j = 0; j < 2; ++j) add(apart ? fresh[o][j] : c[o][2 * i + j], a[o][step], b[j]);
            });
        }
        if constexpr (apart)
#pragma unroll
            for (int o = 0; o < octets; ++o)
#pragma unroll
                for (int j = 0; j < 2; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) c[o][2 * i + j][e] += fresh[o][j][e];
    }
}

/// products[t, s] += sum over chunks of dy's token t times u's token s, where s may come before t: blocks of 16 by 8.
template <class T, class A = acc_t<T>>
__device__ void add_token_products(A* products, const typename GradientTile<T>::Element* u, const typename GradientTile<T>::Element* dy,
                                   Lane lane) {
    constexpr int steps = GradientTile<T>::chunk_steps;
#pragma unroll
    for (int i = 0; i < GradientLayout<T>::token_pairs; ++i) {
        FormFactors<T, 2> a[steps];
#pragma unroll
        for (int step = 0; step < steps; ++step) {
            FormFactors<T, 1> rows[2];
            GradientTile<T>::tokens_as_columns(rows, dy, i, step, lane);
            a[step].take_row(0, rows[0]);
            a[step].take_row(1, rows[1]);
        }
#pragma unroll
        for (int j = 0; j <= i; ++j) {
            A c[2][4] = {};
#pragma unroll
            for (int step = 0; step < steps; ++step) {
                FormFactors<T, 1> b[2];
                GradientTile<T>::tokens_as_columns(b, u, j, step, lane);
#pragma unroll
                for (int e = 0; e < 2; ++e) device::multiply_add(c[e], a[step], b[e]);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                Four<A>& total = four(products + (i * (i + 1) + 2 * j + e) * 128 + 4 * lane.index);
                total = {{total.x[0] + c[e][0], total.x[1] + c[e][1], total.x[2] + c[e][2], total.x[3] + c[e][3]}};
            }
        }
    }
}
/// f(place, t, s) for a lane's products of rows block i.
template <class T, class F>
__device__ void each_token_product(int i, Lane lane, F&& f) {
    for (int block = 0; block <= 2 * i + 1; ++block)
        for (int e = 0; e < 4; ++e)
            f((i * (i + 1) + block) * 128 + 4 * lane.index + e, GradientTile<T>::token_of(2 * i + e / 2, lane.group),
              GradientTile<T>::token_of(block, 2 * lane.quad + e % 2));
}

/// f(A^l, its slope in A, c[mode, l]) for a lane's mode and a quarter of the tokens l of a chunk, counted from its end
/// where `reversed`; the answer is the slope of A^chunk. Goes through `place`, (chunk, octet) complex.
template <class T, class F, class A = acc_t<T>>
__device__ c64 weigh(A* place, const A (&c)[token_blocks<T>][4], bool reversed, c64 Abar, Lane lane, F&& f) {
    constexpr int chunk = Form<T>::chunk;
    __syncwarp();
#pragma unroll
    for (int block = 0; block < token_blocks<T>; ++block)
#pragma unroll
        for (int e = 0; e < 2; ++e)
            put(place + 2 * (GradientTile<T>::token_of(block, 2 * lane.quad + e) * octet + lane.group),
                complex<A>{c[block][e], c[block][2 + e]});
    __syncwarp();
    c64 power{1.0, 0.0}, slope{0.0, 0.0};
    for (int l = 0; l < chunk; ++l) {
        if (l % 4 == lane.quad) {
            const A* const x = place + 2 * ((reversed ? chunk - 1 - l : l) * octet + lane.group);
            f(power, slope, uncut<T> * c64{static_cast<double>(x[0]), static_cast<double>(x[1])});
        }
        slope = slope * Abar + power;
        power = power * Abar;
    }
    return slope;
}

/// A tile that is not full ends inside chunk `count / chunk`, and `last` follows its tokens, not the chunk. What it does
/// to these tokens is summed here, all but a factor of the state that enters the chunk, which goes to `slopes`; and
/// what it does to the chunk before takes its place among the edges. A lane a mode.
template <class T, class A = acc_t<T>>
__device__ __noinline__ void finish_tile(A* mine, A* edges, const typename GradientTile<T>::Element* u_tile, int count) {
    using Layout = GradientLayout<T>;
    constexpr int chunk = Form<T>::chunk;
    const int full = count / chunk, n = static_cast<int>(threadIdx.x % 32);
    if (n >= Layout::modes) return;
    const complex<A> step = power_of(mine + Layout::powers + n * ChunkTables<T>::mode_powers, over_token);
    A* const edge = edges + n * 4;
    const complex<A> last{edge[2], edge[3]};
    const auto* const V = reinterpret_cast<const typename Form<T>::Factor*>(mine + Layout::V + n / octet * Layout::left);
    const auto beta_part = [&](int part) { return device::load_as<A>(V[left_at<T>(n % octet, part, chunk - 1)]); };
    const complex<A> beta{beta_part(0), beta_part(1)};
    complex<A> dA{A(0), A(0)}, dbeta{A(0), A(0)}, power{A(1), A(0)}, slope{A(0), A(0)};
    for (int s = count % chunk - 1; s >= 0; --s) {
        const A us = device::load_as<A>(u_tile[GradientTile<T>::at(full, s)]);
        dbeta += us * (power * last);
        dA += us * (beta * (slope * last));
        slope = slope * step + power;
        power = power * step;
    }
    A* const tail = mine + Layout::tail + n * 4;
    put(tail, complex<A>{tail[0] + dA.re, tail[1] + dA.im});
    put(tail + 2, complex<A>{tail[2] + dbeta.re, tail[3] + dbeta.im});
    put(mine + Layout::slopes + 2 * n, slope * last);
    put(edge + 2, power * last);
}

/// The tiles of a part of the whole, in the order of their numbers.
struct Tiles {
    View<const std::int32_t, 1> cu;
    Index length, recurrences, i, row, end;  // of recurrence i, whose rows end at `end`
    Index slot, last_slot;      // of the tile, and where the part ends
    int tile;
    bool backwards;

    __device__ Tiles(const View<const std::int32_t, 1>& cu_, const Shape& s, int tile_, bool backwards_, Index part, Index parts)
        : cu(cu_), length(s.length), recurrences(s.states()), tile(tile_), backwards(backwards_) {
        const Index slots = tile_count(s, tile), each = ceil_div(slots, parts);
        slot = part * each;
        last_slot = slot + each < slots ? slot + each : slots;
        if (!more()) return;
        i = device::recurrence_of(cu, s.states(), s.length, slot, tile);
        const RowRange range = device::checked_rows(cu, i, length);
        const Index first = device::first_tile(cu, i, length, tile);
        if (slot < first) slot = first;  // before the first recurrence
        row = range.begin + (slot - first) * tile;
        end = range.end;
        skip_to_rows();
    }
    __device__ bool more() const { return slot < last_slot; }
    __device__ int count() const { return static_cast<int>(end - row < tile ? end - row : tile); }
    __device__ TileRows rows() const { return TileRows(cu ? 0 : i, row, count(), backwards); }
    __device__ void advance() {
        ++slot;
        row += tile;
        skip_to_rows();
    }

   private:
    /// On to a number that a tile has: recurrences may be empty, and numbers unused.
    __device__ void skip_to_rows() {
        while (row >= end && more()) {
            slot = ++i < recurrences ? device::first_tile(cu, i, length, tile) : last_slot;
            if (!more()) return;
            const RowRange range = device::checked_rows(cu, i, length);
            row = range.begin;
            end = range.end;
        }
    }
};

/// Sums over the tiles of a part: blocks are G channels, a warp each, and warp_octets octets. Neighbouring blocks are
/// the octets of the same channels, which read the same tokens. run.checkpoints are the states of the system's run,
/// exchanged_checkpoints those of the exchanged one.
template <class T>
__global__ void __launch_bounds__(32 * gradient_channels, 1)
    chunked_gradient_kernel(SystemRun<T> run, View<const T, 3> dy, const SystemMode* modes, const acc_t<T>* tables,
                            const acc_t<T>* exchanged_tables, const complex<acc_t<T>>* exchanged_checkpoints,
                            PartialSums sums) {
    using A = acc_t<T>;
    using Tile = GradientTile<T>;
    using Element = typename Tile::Element;
    using Factor = typename Form<T>::Factor;
    using Layout = GradientLayout<T>;
    constexpr int chunk = Form<T>::chunk, tile_size = tile_tokens<T>, blocks = token_blocks<T>, octets = Layout::octets;
    extern __shared__ __align__(16) unsigned char shared[];
    const Lane lane;
    const int G = static_cast<int>(blockDim.x) / 32, channel = lane.thread / 32;
    const Index H = run.shape.channels, N = run.shape.modes;
    const int count_modes = static_cast<int>(run.modes.count);
    const ChunkTables<T> at(count_modes);
    const int mode_blocks = count_modes == 0 ? 1 : (count_modes + Layout::modes - 1) / Layout::modes;
    const Index h0 = static_cast<Index>(blockIdx.x) / mode_blocks * G, h = h0 + channel;
    const int first_mode = static_cast<int>(blockIdx.x) % mode_blocks * Layout::modes;  // of the run's
    const bool sums_lags = run.modes.first + first_mode == 0;
    A* const mine = reinterpret_cast<A*>(shared) + channel * Layout::size;
    A* const products = mine + Layout::products;
    Element* const tiles = reinterpret_cast<Element*>(reinterpret_cast<A*>(shared) + G * Layout::size);
    Element* const dy_tiles = tiles + G * Tile::stride;
    const Element* const u_tile = tiles + channel * Tile::stride;
    const Element* const dy_tile = dy_tiles + channel * Tile::stride;

    for (int i = lane.index; i < Layout::size; i += 32) mine[i] = A(0);
    __syncwarp();
    if (h < H) {
        const A* const from = tables + h * at.size();
        const A* const exchanged = exchanged_tables + h * at.size();
        const int here = 4 * at.groups - first_mode < Layout::modes ? 4 * at.groups - first_mode : Layout::modes;
        const auto factor = [&](const A* table, int mode, int part, int t) {
            return reinterpret_cast<const Factor*>(table + at.V((first_mode + mode) / 4))[at.V_at(mode % 4, part, t)];
        };
        for (int i = lane.index; i < 2 * here * chunk; i += 32) {
            const int t = i % chunk, part = i / chunk % 2, mode = i / (2 * chunk);
            const int to = left_at<T>(mode % octet, part, t), o = mode / octet * Layout::left;
            reinterpret_cast<Factor*>(mine + Layout::V + o)[to] = factor(from, mode, part, t);
            reinterpret_cast<Factor*>(mine + Layout::Q + o)[to] = factor(exchanged, mode, part, chunk - 1 - t);
        }
        for (int i = lane.index; i < here * at.mode_powers; i += 32)
            mine[Layout::powers + i] = from[at.power(first_mode / 4, 0) + i];
    }

    GradientMover<T> mover_u(G, h0, H, lane.thread, dy_tiles + G * Tile::stride), mover_dy = mover_u;
    mover_dy.staging += G * GradientMover<T>::staging_bytes / static_cast<int>(sizeof(typename GradientMover<T>::Unit));
    const bool wide_u = mover_u.wide(run.u, h0, H), wide_dy = mover_dy.wide(dy, h0, H);
    const Index u_offset = mover_u.offset(run.u, run.backwards ? -1 : 1), dy_offset = mover_dy.offset(dy, run.backwards ? -1 : 1);
    // A lane fetches the state that enters a tile, or the exchanged one, of a mode.
    static_assert(2 * Layout::modes <= 32);
    const int edge_mode = lane.index % Layout::modes, edge_kind = lane.index / Layout::modes;
    const bool moves_edge = h < H && edge_kind < 2 && first_mode + edge_mode < count_modes;
    const complex<A>* const edge_from =
        (edge_kind == 0 ? run.checkpoints : exchanged_checkpoints) + h * N + first_mode + edge_mode;
    A* const edge_to = mine + Layout::edges + 4 * edge_mode + 2 * edge_kind;
    int turn = 0;  // which of the two sets of edges
    const auto start = [&](const Tiles& next) {
        const TileRows rows = next.rows();
        if (wide_u) mover_u.start(run.u, u_offset, rows, h0, next.count());
        if (wide_dy) mover_dy.start(dy, dy_offset, rows, h0, next.count());
        if (moves_edge) device::copy_async<sizeof(complex<A>)>(edge_to + 4 * Layout::modes * turn, edge_from + next.slot * H * N);
    };
    Tiles next(run.cu, run.shape, tile_size, run.backwards, blockIdx.y, gridDim.y);
    if (next.more()) start(next);

    A u_E[octets][blocks][4] = {}, dy_X[octets][blocks][4] = {};
    complex<A> XE[octets] = {};
    while (next.more()) {
        const int count = next.count();
        A* const edges = mine + Layout::edges + 4 * Layout::modes * turn;
        turn ^= 1;
        device::wait_for_copies();
        __syncthreads();
        mover_u.finish(tiles, run.u, wide_u, next.rows(), h0, H, count);
        mover_dy.finish(dy_tiles, dy, wide_dy, next.rows(), h0, H, count);
        next.advance();
        if (next.more()) start(next);
        __syncthreads();
        if (h >= H) continue;

        if (sums_lags) add_token_products<T>(products, u_tile, dy_tile, lane);
        if (count < tile_size) {
            finish_tile<T>(mine, edges, u_tile, count);
            __syncwarp();
        }
        complex<A> X[octets][lane_chunks], E[octets][lane_chunks], first[octets], last[octets];
        octet_responses<T>(X, u_tile, mine + Layout::V, lane);
        octet_responses<T>(E, dy_tile, mine + Layout::Q, lane);
        const int full = count / chunk;
#pragma unroll
        for (int o = 0; o < octets; ++o) {
            const Four<A> edge = four(edges + 4 * (octet * o + lane.group));
            first[o] = {edge.x[0], edge.x[1]};
            last[o] = {edge.x[2], edge.x[3]};
            if (count < tile_size) {  // what comes from behind enters at chunk `full` (finish_tile)
#pragma unroll
                for (int r = 0; r < lane_chunks; ++r)
                    if (lane.quad * lane_chunks + r == full) E[o][r] += last[o];
                last[o] = {A(0), A(0)};
            }
        }
        scan_octets<T>(X, E, mine + Layout::powers + lane.group * ChunkTables<T>::mode_powers, first, last, lane);
#pragma unroll
        for (int o = 0; o < octets; ++o) {
            if (count < tile_size) {
                const A* const slope = mine + Layout::slopes + 2 * (octet * o + lane.group);
                A* const tail = mine + Layout::tail + 4 * (octet * o + lane.group);
#pragma unroll
                for (int r = 0; r < lane_chunks; ++r)
                    if (lane.quad * lane_chunks + r == full) put(tail, affine({slope[0], slope[1]}, X[o][r], {tail[0], tail[1]}));
            }
#pragma unroll
            for (int r = 0; r < lane_chunks; ++r) XE[o] = affine(X[o][r], E[o][r], XE[o]);
        }
        add_chunk_products<T>(u_E, E, u_tile, lane);
        add_chunk_products<T>(dy_X, X, dy_tile, lane);
    }

    if (h >= H) return;
    if (sums_lags) {
        A* const rows = mine + Layout::V;  // (16, chunk + 1), of 16 tokens of dy at a time
        double sum = 0.0;
        for (int i = 0; i < Layout::token_pairs; ++i) {
            __syncwarp();
            each_token_product<T>(i, lane, [&](int place, int t, int s) { rows[t % 16 * (chunk + 1) + s] = products[place]; });
            __syncwarp();
            for (int t = 16 * i; t < 16 * (i + 1); ++t)
                if (lane.index <= t) sum += static_cast<double>(rows[t % 16 * (chunk + 1) + t - lane.index]);
        }
        if (lane.index < chunk) sums.lags[(static_cast<Index>(blockIdx.y) * H + h) * chunk + lane.index] = sum;
    }
    // The powers come in now, in float64: a lane has mode `group` and the tokens of its columns.
#pragma unroll
    for (int o = 0; o < octets; ++o) {
        const int n = octet * o + lane.group;
        const bool inside = first_mode + n < count_modes;
        const SystemMode m = inside ? modes[h * N + first_mode + n] : SystemMode{};
        SystemSums sum{};
        const c64 over = weigh<T>(mine, u_E[o], true, m.A, lane, [&](c64 power, c64 slope, c64 x) {
            sum.beta += power * x;
            sum.A += slope * m.beta * x;
        });
        weigh<T>(mine, dy_X[o], false, m.A, lane, [&](c64 power, c64 slope, c64 x) {
            sum.gamma += power * x;
            sum.A += slope * m.gamma * x;
        });
        sum.A += over * cast<double>(XE[o]);
        for (int d = 1; d < 4; d *= 2) {
            sum.A += {__shfl_xor_sync(0xffffffffu, sum.A.re, d), __shfl_xor_sync(0xffffffffu, sum.A.im, d)};
            sum.beta += {__shfl_xor_sync(0xffffffffu, sum.beta.re, d), __shfl_xor_sync(0xffffffffu, sum.beta.im, d)};
            sum.gamma += {__shfl_xor_sync(0xffffffffu, sum.gamma.re, d), __shfl_xor_sync(0xffffffffu, sum.gamma.im, d)};
        }
        const Four<A> tail = four(mine + Layout::tail + 4 * (octet * o + lane.group));
        sum.A += {static_cast<double>(tail.x[0]), static_cast<double>(tail.x[1])};
        sum.beta += {static_cast<double>(tail.x[2]), static_cast<double>(tail.x[3])};
        if (lane.quad == 0 && inside) sums.modes[(static_cast<Index>(blockIdx.y) * H + h) * N + first_mode + n] = sum;
    }
}

}  // namespace INTERSTATE_KERNELS

}  // namespace s4d::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
