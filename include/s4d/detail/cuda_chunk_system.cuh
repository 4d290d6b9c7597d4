// The chunked method of S4D on the GPU, running a system: a warp takes a channel through time, a tile of 32 chunks at
// once, as small matrix products on the tensor cores. With X[r] the state that enters chunk r, u[r] its T tokens
// (docs/ops/s4d.md, eq. 16, 19 and 21):
//
//     W[r] = sum_s beta A^(T-1-s) u[r,s]         (32 chunks x T) times (T x modes)
//     X[r+1] = A^T X[r] + W[r]                   a scan over the 32 chunks, 4 in a thread and 8 across lanes
//     y[r,t] = sum_s K[t-s] u[r,s] + Re sum_n gamma A^t X[r]     (32 x T)(T x T) + (32 x modes)(modes x T)
//
// Products run eight modes at a time, so that nothing of the size of the state is kept: what the first product
// leaves in a thread's registers is what the scan wants (a mode, four chunks in a row), and what the scan leaves
// is what the last product takes. Only tokens go through shared memory, once in and once out, transposed there
// because channels are next to each other in memory.
//
// The state that leaves a tile is corrected for the rounding of the float powers it was carried with, so that
// nothing drifts over long sequences.
#pragma once

#include <s4d/detail/cuda_chunk_tile.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail::chunks {

template <class T>
using SystemTile = TokenTile<T, Interleave::by_token>;

inline namespace INTERSTATE_KERNELS {

/// W of `together` groups of modes: for a lane, its own chunks of mode `quad` of each.
template <class T, int together, int steps, class A = acc_t<T>>
__device__ void chunk_responses(complex<A> (&W)[together][own], const FormFactors<T, 2> (&u)[own / 2][steps],
                                const ChunkTables<T>& at, const A* table, int group, Lane lane) {
    A c[together][own / 2][4] = {};
    FormFactors<T, 1> b[together][steps];
#pragma unroll
    for (int j = 0; j < together; ++j) {
        const TablePairs<T> v(reinterpret_cast<const typename Form<T>::Factor*>(table + at.V(group + j)), lane.index);
#pragma unroll
        for (int i = 0; i < token_blocks<T>; ++i) v.as(b[j][i * steps / token_blocks<T>], i % (token_blocks<T> / steps), i);
    }
    // The products of one sum are apart from each other: each waits for the one before.
    device::multiply_add_each<steps>([&](int k, auto&& add) {
#pragma unroll
        for (int j = 0; j < together; ++j)
#pragma unroll
            for (int m = 0; m < own / 2; ++m) add(c[j][m], u[m][k], b[j][k]);
    });
#pragma unroll
    for (int j = 0; j < together; ++j)
#pragma unroll
        for (int m = 0; m < own / 2; ++m) {
            W[j][2 * m] = {c[j][m][0], c[j][m][1]};
            W[j][2 * m + 1] = {c[j][m][2], c[j][m][3]};
        }
}

/// From W to the states that enter a lane's own chunks, in place; `end` becomes the state after the last chunk.
/// `start` enters the first. In step for all groups, so that one's latency hides the other's.
template <int together, class A>
__device__ void scan_chunks(complex<A> (&W)[together][own], const Powers<A> (&p)[together],
                            const complex<A> (&start)[together], complex<A> (&end)[together], Lane lane) {
    const bool first = lane.group == 0;
#pragma unroll
    for (int j = 0; j < together; ++j)
        end[j] = affine(p[j].chunk, first ? start[j] : complex<A>{A(0), A(0)}, W[j][0]);
#pragma unroll
    for (int r = 1; r < own; ++r)
#pragma unroll
        for (int j = 0; j < together; ++j) end[j] = affine(p[j].chunk, end[j], W[j][r]);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        complex<A> before[together];
#pragma unroll
        for (int j = 0; j < together; ++j) before[j] = shuffle_up(end[j], 4 << i);
#pragma unroll
        for (int j = 0; j < together; ++j)
            if (lane.group >= 1 << i) end[j] = affine(i == 0 ? p[j].own : i == 1 ? p[j].two : p[j].four_, before[j], end[j]);
    }
    complex<A> x[together];
#pragma unroll
    for (int j = 0; j < together; ++j) x[j] = shuffle_up(end[j], 4);
#pragma unroll
    for (int j = 0; j < together; ++j) {
        end[j] = shuffle(end[j], 28 + lane.quad);
        if (first) x[j] = start[j];
    }
#pragma unroll
    for (int r = 0; r < own; ++r)
#pragma unroll
        for (int j = 0; j < together; ++j) {
            const complex<A> next = affine(p[j].chunk, x[j], W[j][r]);
            W[j][r] = x[j];
            x[j] = next;
        }
}

/// A warp's recurrence, rows and segment.
struct Segment {
    Index i, batch, begin, length;  // rows of the sequence
    int first, last;                // tiles [first, last), counted from the sequence's begin
    int last_of_all, tokens_of_it;  // the sequence's last tile, which may not be full
    int tile;
    __device__ int count(int k) const { return k == last_of_all ? tokens_of_it : tile; }
};
__device__ inline Segment segment_of(const View<const std::int32_t, 1>& cu, Index length, Index unit, int segments,
                                     int segment_tiles, int tile) {
    const Index i = unit / segments;
    const int j = static_cast<int>(unit % segments);
    const RowRange rows = device::checked_rows(cu, i, length);
    const int tiles = static_cast<int>(ceil_div(rows.end - rows.begin, tile));
    Segment s{i, cu ? 0 : i, rows.begin, rows.end - rows.begin, j * segment_tiles, (j + 1) * segment_tiles, tiles - 1,
              static_cast<int>(rows.end - rows.begin - static_cast<Index>(tiles - 1) * tile), tile};
    s.first = s.first < tiles ? s.first : tiles;
    s.last = s.last < tiles && j + 1 < segments ? s.last : tiles;
    return s;
}

/// After a tile that is not full: `carry` has the states that enter its chunk `count / chunk`, and becomes those
/// after its tokens. A lane a mode.
template <class T, class A = acc_t<T>>
__device__ __noinline__ void finish_state(A* carry, const typename SystemTile<T>::Element* tile, const A* table,
                                          const ChunkTables<T>& at, int count) {
    constexpr int chunk = Form<T>::chunk;
    const int full = count / chunk;
    for (int n = static_cast<int>(threadIdx.x % 32); n < 4 * at.groups; n += 32) {
        const auto* const V = reinterpret_cast<const typename Form<T>::Factor*>(table + at.V(n / 4));
        const complex<A> step = power_of(table + at.power(n / 4, n % 4), over_token);
        const complex<A> beta{device::load_as<A>(V[at.V_at(n % 4, 0, chunk - 1)]),
                              device::load_as<A>(V[at.V_at(n % 4, 1, chunk - 1)])};
        complex<A> x{carry[2 * n], carry[2 * n + 1]};
        for (int s = 0; s < count % chunk; ++s)
            x = affine(step, x, device::load_as<A>(tile[SystemTile<T>::at(full, s)]) * beta);
        put(carry + 2 * n, x);
    }
}

/// What a run leaves: only states, y, or a part of y (run.sum or run.addend).
enum class Leaves { states, y, part };

/// Runs a system: blocks are G channels (a warp each) of one segment of one recurrence. Where it leaves states they
/// go to `segment_states`, what the segment adds to the state; else it starts from there.
template <class T, Leaves leaves>
__global__ void __launch_bounds__(32 * block_channels<T>, sizeof(T) == 2 ? 1 : 2)
    chunked_system_kernel(SystemRun<T> run, const acc_t<T>* tables, complex<acc_t<T>>* segment_states, int segments,
                          int segment_tiles) {
    using A = acc_t<T>;
    using Tile = SystemTile<T>;
    constexpr bool states_only = leaves == Leaves::states;
    constexpr int chunk = Form<T>::chunk, tile_size = tile_tokens<T>, blocks = token_blocks<T>, steps = chunk / Tile::depth;
    constexpr int k_pairs = device::k_pairs<Form<T>::precision>;
    extern __shared__ __align__(16) unsigned char shared[];

    const Lane lane;
    const int G = static_cast<int>(blockDim.x) / 32, warp = lane.thread / 32;
    const Index H = run.shape.channels, N = run.shape.modes, L = run.shape.length;
    const int modes = static_cast<int>(run.modes.count);
    const Index blocks_a_row = ceil_div(H, G), unit = blockIdx.x / blocks_a_row;  // neighbours share rows
    const Index h0 = blockIdx.x % blocks_a_row * G, h = h0 + warp;
    const ChunkTables<T> at(modes);
    A* const all_tables = reinterpret_cast<A*>(shared);
    const A* const table = all_tables + warp * at.size();
    A* const carry = all_tables + G * at.size() + warp * 8 * at.groups;
    auto* const tiles = reinterpret_cast<typename Tile::Element*>(all_tables + G * (at.size() + 8 * at.groups));
    auto* const tile = tiles + warp * Tile::stride;

    const Segment seg = segment_of(run.cu, L, unit, segments, segment_tiles, tile_size);
    const bool whole = segments == 1;
    TileMover<T, Interleave::by_token> mover(G, h0, H, lane.thread, tiles + G * Tile::stride);
    const bool wide_u = mover.wide(run.u, h0, H), wide_y = mover.wide(run.y, h0, H);
    const int tile_step = run.backwards ? -1 : 1;
    int k = run.backwards ? seg.last - 1 : seg.first;
    TileRows rows(seg.batch, seg.begin + static_cast<Index>(k) * tile_size, seg.count(k), run.backwards);
    const Index u_offset = mover.offset(run.u, rows.direction);
    if (wide_u && seg.first < seg.last) mover.start(run.u, u_offset, rows, h0, seg.count(k));

    const int words = static_cast<int>(H - h0 < G ? H - h0 : G) * at.size();
    for (int i = lane.thread; i < words / 4; i += 32 * G)
        four(all_tables + 4 * i) = four(tables + h0 * at.size() + 4 * i);

    // The state that enters the segment; without segments, the caller's.
    for (int n = lane.index; n < 4 * at.groups; n += 32) {
        complex<A> x{A(0), A(0)};
        if (h < H && n < modes) {
            if (!whole && !states_only) x = segment_states[(unit * H + h) * N + n];
            if (whole && run.initial) {
                x = run.initial(seg.i, h, n);
                if (run.conjugate) x = conj(x);
            }
        }
        put(carry + 2 * n, x);
    }
    __syncthreads();

    const Index first_slot = run.checkpoints ? device::first_tile(run.cu, seg.i, L, tile_size) : 0;
    for (int left = seg.last - seg.first; left > 0; --left, k += tile_step) {
        const int count = seg.count(k);
        device::wait_for_copies();
        mover.finish(tiles, run.u, wide_u, rows, h0, H, count);
        __syncthreads();
        const TileRows these = rows;
        rows.advance(count);
        if (wide_u && left > 1) mover.start(run.u, u_offset, rows, h0, seg.count(k + tile_step));

        if (h < H) {
            if (!states_only && run.checkpoints) {
                complex<A>* const checkpoint = run.checkpoints + ((first_slot + k) * H + h) * N;
#pragma unroll 1
                for (int n = lane.index; n < modes; n += 32) checkpoint[n] = {carry[2 * n], carry[2 * n + 1]};
            }
            FormFactors<T, 2> u[own / 2][steps];
#pragma unroll
            for (int m = 0; m < own / 2; ++m)
#pragma unroll
                for (int step = 0; step < steps; ++step) Tile::chunks_as_rows(u[m][step], tile, m, step, lane);
            A y[own / 2][blocks][4] = {};
            if constexpr (!states_only) {
                FormFactors<T, 1> toeplitz[blocks];  // K[t - s], by how many blocks of tokens t is further
#pragma unroll
                for (int i = 0; i < blocks; ++i)
#pragma unroll
                    for (int pair = 0; pair < k_pairs; ++pair)
                        TablePairs<T>::lags(toeplitz[i], pair, table + at.K_at(8 * (i - pair) + lane.group - 2 * lane.quad));
#pragma unroll
                for (int m = 0; m < own / 2; ++m)
#pragma unroll
                    for (int block = 0; block < blocks; ++block)
#pragma unroll
                        for (int step = 0; step <= block / k_pairs; ++step)
                            device::multiply_add(y[m][block], u[m][step], toeplitz[block - k_pairs * step]);
            }

            constexpr int together = 2, products = together / k_pairs;
            for (int group = 0; group < at.groups; group += together) {
                complex<A> X[together][own];
                chunk_responses<T>(X, u, at, table, group, lane);
                const A* const powers = table + at.power(group, lane.quad);
                const Powers<A> p[together] = {Powers<A>(powers), Powers<A>(powers + at.power_size)};
                A* const slot = carry + 2 * (4 * group + lane.quad);
                const complex<A> start[together] = {{slot[0], slot[1]}, {slot[8], slot[9]}};
                complex<A> end[together];
                scan_chunks(X, p, start, end, lane);
                __syncwarp();  // all have read start
                if (count == tile_size) {
#pragma unroll
                    for (int j = 0; j < together; ++j)
                        if (lane.group == 0)
                            put(slot + 8 * j, affine(power_of(powers + j * at.power_size, correction), start[j], end[j]));
                } else if (lane.group == count / (chunk * own)) {  // finish_state goes on from here
#pragma unroll
                    for (int r = 0; r < own; ++r)  // the last one stays
#pragma unroll
                        for (int j = 0; j < together; ++j)
                            if (r <= count / chunk % own) put(slot + 8 * j, X[j][r]);
                }
                if constexpr (!states_only) {
                    FormFactors<T, 1> b[products][blocks];
                    FormFactors<T, 2> a[products][own / 2];
#pragma unroll
                    for (int j = 0; j < together; ++j) {
                        const TablePairs<T> w(
                            reinterpret_cast<const typename Form<T>::Factor*>(table + at.M(group + j)), lane.index);
#pragma unroll
                        for (int block = 0; block < blocks; ++block) w.as(b[j / k_pairs][block], j % k_pairs, block);
#pragma unroll
                        for (int m = 0; m < own / 2; ++m)
#pragma unroll
                            for (int row = 0; row < 2; ++row)
                                a[j / k_pairs][m].set(row, j % k_pairs, X[j][2 * m + row].re, X[j][2 * m + row].im);
                    }
                    device::multiply_add_each<products>([&](int j, auto&& add) {
#pragma unroll
                        for (int m = 0; m < own / 2; ++m)
#pragma unroll
                            for (int block = 0; block < blocks; ++block) add(y[m][block], a[j][m], b[j][block]);
                    });
                }
            }
            __syncwarp();  // all have read the tokens, and the state is written
            if (count < tile_size) {
                finish_state<T>(carry, tile, table, at, count);
                __syncwarp();
            }
            if constexpr (!states_only) {
                if constexpr (leaves == Leaves::part) {
                    const auto each_sum = [&](A* sums, auto&& f) {
                        A* const first = sums + (seg.batch * H + h) * L + these.row;
#pragma unroll
                        for (int m = 0; m < own / 2; ++m)
#pragma unroll
                            for (int block = 0; block < blocks; ++block)
#pragma unroll
                                for (int e = 0; e < 4; ++e) {
                                    const int t =
                                        (lane.group * own + 2 * m + e / 2) * chunk + 8 * block + 2 * lane.quad + e % 2;
                                    if (t < count) f(first[these.direction * t], y[m][block][e]);
                                }
                    };
                    if (run.addend) each_sum(run.addend, [](A sum, A& y_) { y_ += sum; });
                    if (run.sum) each_sum(run.sum, [](A& sum, A y_) { sum = y_; });
                }
#pragma unroll
                for (int m = 0; m < own / 2; ++m)
#pragma unroll
                    for (int block = 0; block < blocks; ++block) Tile::put_products(tile, y[m][block], m, block, lane);
            }
        }
        __syncthreads();
        if constexpr (!states_only) {
            if (run.y && !run.sum) mover.store(tiles, run.y, wide_y, these, h0, H, count);
            if (wide_u != wide_y) __syncthreads();  // else a thread took out what it will overwrite with the next tokens
        }
    }

    // The state that leaves: the segment's own part, or the sequence's.
    __syncwarp();
    if (h < H)
        for (int n = lane.index; n < modes; n += 32) {
            const complex<A> x{carry[2 * n], carry[2 * n + 1]};
            if constexpr (states_only)
                segment_states[(unit * H + h) * N + n] = x;
            else if (run.final && unit % segments == (run.backwards ? 0 : segments - 1))
                run.final(seg.i, h, n) = run.conjugate ? conj(x) : x;
        }
}

/// One thread a mode walks the segments of a recurrence: from what each adds to the state that enters it.
template <class T, class A = acc_t<T>>
__global__ void combine_segments_kernel(View<const std::int32_t, 1> cu, Shape shape, bool backwards, bool conjugate,
                                        View<const complex<A>, 3> initial, const SystemMode* modes, int segments,
                                        int segment_tiles, complex<A>* states) {
    constexpr int tile = tile_tokens<T>;
    const Index H = shape.channels, N = shape.modes;
    const Index thread = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (thread >= shape.states() * H * N) return;
    const Index i = thread / (H * N), at = thread % (H * N), h = at / N, n = at % N;
    c64 x{0.0, 0.0};
    if (initial) {
        x = cast<double>(initial(i, h, n));
        if (conjugate) x = conj(x);
    }
    const auto tokens = [&](int j) {
        const Segment s = segment_of(cu, shape.length, i * segments + j, segments, segment_tiles, tile);
        const Index last = static_cast<Index>(s.last) * tile, end = last < s.length ? last : s.length;
        const Index begin = static_cast<Index>(s.first) * tile;
        return end > begin ? end - begin : Index{0};
    };
    const c64 Abar = modes[at].A;
    for (int step = 0; step < segments; ++step) {
        const int j = backwards ? segments - 1 - step : step;
        complex<A>& slot = states[((i * segments + j) * H + h) * N + n];
        const c64 power = raise(Abar, tokens(j));
        const c64 added = cast<double>(slot);
        slot = cast<A>(x);
        x = power * x + added;
    }
}

}  // namespace INTERSTATE_KERNELS

}  // namespace s4d::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
