// S4D on the GPU in chunks: a warp runs a channel through time, 512 tokens at once, as small matrix products
// on the tensor cores. With chunks of 16 tokens, X[r] the state that enters chunk r, and u[r] its tokens
// (docs/ops/s4d.md, eq. 16, 19 and 21):
//
//     W[r] = sum_s beta A^(15-s) u[r,s]          (32 chunks x 16) times (16 x modes)
//     X[r+1] = A^16 X[r] + W[r]                  a scan over the 32 chunks, 4 in a thread and 8 across lanes
//     y[r,t] = sum_s K[t-s] u[r,s] + Re sum_n gamma A^t X[r]     (32 x 16)(16 x 16) + (32 x modes)(modes x 16)
//
// Products run four modes at a time, so that nothing of the size of the state is kept: what the first product
// leaves in a thread's registers is what the scan wants (a mode, four chunks in a row), and what the scan leaves
// is what the last product takes. Only tokens go through shared memory, once in and once out, transposed there
// because channels are next to each other in memory.
//
// Numerics: tables are formed in float64. float32 is kept by splitting factors into two tf32 numbers; 16-bit
// storage rounds factors to tf32, which has the bits of f16. The state that leaves a tile is corrected for
// the rounding of the float powers it was carried with, so that nothing drifts over long sequences.
#pragma once

#include <algorithm>

#include <interstate/cuda/async.cuh>
#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/launch.cuh>
#include <interstate/cuda/mma.cuh>
#include <interstate/workspace.hpp>
#include <s4d/detail/cuda_system.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail::chunks {

inline constexpr int chunk_tokens = 16;
inline constexpr int tile_chunks = 32;
inline constexpr int tile_tokens = chunk_tokens * tile_chunks;
inline constexpr int own = tile_chunks / 8;        // consecutive chunks of a thread
inline constexpr int max_chunked_modes = 64;       // more do not fit into shared memory

/// float32 must stay float32; 16-bit storage may round factors of products (docs/ops/s4d.md, "CUDA kernels").
template <class T>
inline constexpr device::Precision precision_of =
    sizeof(T) == 2 ? device::Precision::rounded : device::Precision::exact;

/// Tables of a channel: one array of A, in the order in which lanes read it. Modes are padded to groups of
/// four (an mma is 8 wide), groups to pairs; what is padded is zero.
struct ChunkTables {
    static constexpr int V_size = 8 * chunk_tokens;  // per group: [re/im of 4 modes][V_at(token)] beta A^(15-s)
    static constexpr int M_size = 8 * chunk_tokens;  // per group: [lane][re, im of 2 tokens] gamma A^t
    static constexpr int mode_powers = 12, power_size = 4 * mode_powers;  // per mode and group: ChunkPower, complex
    int groups;

    INTERSTATE_HD explicit constexpr ChunkTables(Index modes) : groups(static_cast<int>((modes + 7) / 8 * 2)) {}
    INTERSTATE_HD constexpr int V(int group) const { return group * V_size; }
    INTERSTATE_HD constexpr int M(int group) const { return groups * V_size + group * M_size; }
    INTERSTATE_HD constexpr int power(int group, int mode) const {
        return groups * (V_size + M_size) + group * power_size + mode * mode_powers;
    }
    INTERSTATE_HD constexpr int K() const { return groups * (V_size + M_size + power_size); }
    INTERSTATE_HD constexpr int size() const { return K() + chunk_tokens; }
};

/// Powers with which a mode is carried: over a chunk, over 1, 2 and 4 times the chunks of a thread, what the
/// product of their roundings lacks of A^512, and A itself.
enum ChunkPower { over_chunk, over_own, over_2_own, over_4_own, correction, over_token };

/// Place of token t in a column of V: four in a row are the two factors that a lane needs.
INTERSTATE_HD constexpr int V_at(int t) { return 4 * (t % 8 / 2) + 2 * (t / 8) + t % 2; }

/// Where token t of a chunk lies in shared memory. Two chunks are interleaved, so that four elements in a row
/// are tokens 2 j and 2 j + 1 of both: a lane's part of a fragment whose rows are chunks (token by token), or of
/// two whose columns are (chunk by chunk). Swizzled so that fragments are read without bank conflicts.
enum class Interleave { by_token, by_chunk };
__device__ constexpr int swizzle(Interleave order, int pair) {
    return order == Interleave::by_token ? 4 * ((pair ^ (pair >> 1)) & 1) : 4 * (((pair >> 1) ^ (pair >> 2)) & 1);
}
inline constexpr int swizzle_period = 16 * chunk_tokens;
template <Interleave order>
__device__ constexpr int tile_at(int chunk, int t) {
    const int place = order == Interleave::by_token ? t % 2 * 2 + chunk % 2 : chunk % 2 * 2 + t % 2;
    return chunk / 2 * 2 * chunk_tokens + 4 * ((t / 2) ^ swizzle(order, chunk / 2)) + place;
}
inline constexpr int tile_stride = tile_tokens + 4;  // of channels

/// Channels of a block, a warp each: 32 bytes of a row in memory, 16 in 16-bit storage, where the neighbouring
/// block reads the other half at about the same time.
template <class T>
inline constexpr int block_channels = sizeof(T) == 8 ? 4 : 8;

inline namespace INTERSTATE_KERNELS {

/// Four neighbours in shared memory.
template <class A>
struct alignas(4 * sizeof(A) < 16 ? 4 * sizeof(A) : 16) Four {
    A x[4];
};
template <class A>
__device__ Four<A>& four(A* p) {
    return *reinterpret_cast<Four<A>*>(p);
}
template <class A>
__device__ const Four<A>& four(const A* p) {
    return *reinterpret_cast<const Four<A>*>(p);
}
template <class A>
__device__ void put(A* p, complex<A> z) {
    p[0] = z.re;
    p[1] = z.im;
}

inline constexpr int table_parts = 4, part_powers = chunk_tokens / table_parts;  // powers that a thread fills in

/// Fills a part of one mode's tables, powers A^(4 part) .. A^(4 part + 3).
template <device::Precision precision, class A>
__device__ void fill_mode(A* table, const ChunkTables& at, int n, int part, const SystemMode& m) {
    const int group = n / 4, mode = n % 4;
    const c64 second = m.A * m.A, fourth = second * second, eighth = fourth * fourth;
    c64 power{1.0, 0.0};
    if (part & 1) power = fourth;
    if (part & 2) power = power * eighth;
    const auto factor = [](double x) { return device::representable<precision>(static_cast<A>(x)); };
    for (int l = part_powers * part; l < part_powers * (part + 1); ++l) {
        const c64 v = power * m.beta, w = power * m.gamma;
        A* V = table + at.V(group) + 2 * mode * chunk_tokens + V_at(chunk_tokens - 1 - l);
        V[0] = factor(v.re);
        V[chunk_tokens] = factor(v.im);
        A* M = table + at.M(group) + (l % 8 * 4 + mode) * 4 + 2 * (l / 8);
        M[0] = factor(w.re);
        M[1] = factor(-w.im);
        power = power * m.A;
    }
    if (part != 0) return;
    A* out = table + at.power(group, mode);
    const auto put = [&](ChunkPower which, c64 z) {
        const complex<A> rounded = cast<A>(z);
        out[2 * which] = rounded.re;
        out[2 * which + 1] = rounded.im;
        return cast<double>(rounded);
    };
    static_assert(own == 4);
    const c64 chunk = eighth * eighth;
    c64 carried = put(over_chunk, chunk);
    carried = carried * carried;
    carried = carried * carried;
    c64 exact = chunk * chunk;
    exact = exact * exact;
    for (const ChunkPower which : {over_own, over_2_own, over_4_own}) {
        carried = carried * put(which, exact);
        exact = exact * exact;
    }
    put(correction, exact - carried);
    put(over_token, m.A);
}

/// One block a channel, four threads a mode: the tables of a half's system and, where asked for, of the
/// exchanged one.
template <class T, class P, class A = acc_t<T>>
__global__ void __launch_bounds__(table_parts* max_chunked_modes)
    chunk_tables_kernel(Discretization disc, Params<P> p, Half half, Index N, SystemMode* modes, A* tables, A* exchanged) {
    const Index h = blockIdx.x;
    const int n = static_cast<int>(threadIdx.x) % max_chunked_modes, part = static_cast<int>(threadIdx.x) / max_chunked_modes;
    const ChunkTables at(N);
    __shared__ SystemMode shared_modes[max_chunked_modes];
    __shared__ double sums[max_chunked_modes / 32][chunk_tokens + 1];  // K by warps of modes, and K0 at the end
    double K0 = 0.0;
    if (part == 0) {
        SystemMode m{};
        if (n < N) {
            m = system_mode(disc, p, half, h, n, K0);
            modes[h * N + n] = m;
        }
        shared_modes[n] = m;
        for (int d = 16; d > 0; d /= 2) K0 += __shfl_xor_sync(0xffffffffu, K0, d);
        if (n % 32 == 0) sums[n / 32][chunk_tokens] = K0;
    }
    __syncthreads();
    const SystemMode m = shared_modes[n];
    if (n < 4 * at.groups) {
        fill_mode<precision_of<T>>(tables + h * at.size(), at, n, part, m);
        if (exchanged) fill_mode<precision_of<T>>(exchanged + h * at.size(), at, n, part, {m.A, m.gamma, m.beta});
    }
    // K[l + 1] = Re sum_n gamma A^l beta.
    c64 response = m.beta * m.gamma;
    for (int i = 0; i < part_powers * part; ++i) response = response * m.A;
    for (int i = 0; i < part_powers; ++i) {
        double K = response.re;
        for (int d = 16; d > 0; d /= 2) K += __shfl_xor_sync(0xffffffffu, K, d);
        if (n % 32 == 0) sums[n / 32][part_powers * part + i] = K;
        response = response * m.A;
    }
    __syncthreads();
    const int l = static_cast<int>(threadIdx.x);
    if (l >= chunk_tokens) return;
    double K = l == 0 && half == Half::causal && p.D ? static_cast<double>(p.D(h)) : 0.0;
    for (int warp = 0; warp < max_chunked_modes / 32; ++warp) K += sums[warp][l == 0 ? chunk_tokens : l - 1];
    const A rounded = device::representable<precision_of<T>>(static_cast<A>(K));
    tables[h * at.size() + at.K() + l] = rounded;
    if (exchanged) exchanged[h * at.size() + at.K() + l] = rounded;
}

/// Who a thread is, read once: the compiler would read the special register again wherever it is wanted, and
/// wait for it. `group` picks the row of a fragment, `quad` the column pair (cuda/mma.cuh).
struct Lane {
    int thread, index, group, quad;
    __device__ Lane() {
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        index = thread % 32;
        group = index / 4;
        quad = index % 4;
    }
};

/// The rows of a tile in the order of processing: where the first one is, and the way to the next.
struct TileRows {
    Index batch, row;
    int direction;
    __device__ TileRows(Index batch_, Index begin, int count, bool backwards)
        : batch(batch_), row(backwards ? begin + count - 1 : begin), direction(backwards ? -1 : 1) {}
    /// Element of token t, and the stride from token to token.
    template <class T>
    __device__ T* at(const View<T, 3>& x, int t, Index channel) const {
        return x.data + batch * x.stride[0] + (row + direction * t) * x.stride[1] + channel * x.stride[2];
    }
    template <class T>
    __device__ Index stride(const View<T, 3>& x) const {
        return direction * x.stride[1];
    }
    /// On to the tile that follows one of `count` tokens.
    __device__ void advance(int count) { row += direction * count; }
};

/// What a thread moves between memory and the tile, 16 elements. Where memory allows, 16 bytes at once: the
/// neighbouring channels of one token; else single elements.
template <class T, Interleave order>
struct TileMover {
    static constexpr int V = 16 / static_cast<int>(sizeof(T));
    static constexpr int units = block_channels<T> / V;  // of 16 bytes a token
    static constexpr int pass_tokens = 32 * block_channels<T> / units, passes = tile_tokens / pass_tokens;
    static constexpr int narrow_step = 32, narrow_passes = tile_tokens / narrow_step;
    struct alignas(16) Unit {
        T x[V];
    };
    static constexpr int staging_bytes = tile_tokens * static_cast<int>(sizeof(T));  // a channel
    Unit* staging;  // in shared memory, `passes` a thread: where the next tile waits
    int G, thread;

    __device__ TileMover(int channels, Lane lane, void* shared)
        : staging(static_cast<Unit*>(shared) + lane.thread), G(channels), thread(lane.thread) {}

    /// May channels h0 .. h0 + G of x be moved 16 bytes at once?
    __device__ bool wide(const View<T, 3>& x, Index h0, Index H) const {
        return x.data && G == block_channels<T> && h0 + G <= H && x.stride[2] == 1 && x.stride[1] % V == 0 &&
               x.stride[0] % V == 0 && reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
    }
    __device__ bool wide(const View<const T, 3>& x, Index h0, Index H) const {
        return wide(View<T, 3>{const_cast<T*>(x.data), {}, {x.stride[0], x.stride[1], x.stride[2]}}, h0, H);
    }

    // Wide: thread = (token, unit), and `passes` tokens. Narrow: thread = (token, channel), every narrow_step-th token.
    __device__ int unit() const { return thread % units; }
    __device__ int token() const { return thread / units; }
    __device__ int narrow_channel() const { return thread % G; }
    __device__ int narrow_token() const { return thread / G; }
    /// The tile's element of the thread's token of pass i, first channel.
    __device__ int wide_at(int i) const {
        constexpr int period = swizzle_period / pass_tokens < 1 ? 1 : swizzle_period / pass_tokens;
        const int t = token() + i % period * pass_tokens;
        return unit() * V * tile_stride + tile_at<order>(t / chunk_tokens, t % chunk_tokens) +
               i / period * period * pass_tokens;
    }
    __device__ int narrow_at(int i) const {
        const int t = narrow_token() + narrow_step * i;
        return narrow_channel() * tile_stride + tile_at<order>(t / chunk_tokens, t % chunk_tokens);
    }

    /// The thread's first unit of a tile.
    template <class U>
    __device__ U* at(const View<U, 3>& x, const TileRows& rows, Index h0) const {
        return rows.at(x, token(), h0 + unit() * V);
    }
    /// Starts the wide loads of a tile from p = at(...), which fly while the one before it is computed.
    __device__ void start(const T* p, Index stride, int count) {
        const T* const readable = p;
        const Index step = stride * pass_tokens;
#pragma unroll
        for (int i = 0; i < passes; ++i, p += step) {
            const bool inside = token() + i * pass_tokens < count;
            device::copy_async_16(staging + i * narrow_step * G, inside ? p : readable, inside);
        }
    }
    /// Puts the tile in its place, after wait_for_copies.
    template <class A>
    __device__ void finish(A* tiles, const View<const T, 3>& x, bool is_wide, const TileRows& rows, Index h0, Index H,
                           int count) const {
        if (is_wide) {
#pragma unroll
            for (int i = 0; i < passes; ++i) {
                const Unit unit = staging[i * narrow_step * G];
#pragma unroll
                for (int e = 0; e < V; ++e) tiles[wide_at(i) + e * tile_stride] = device::load_as<A>(unit.x[e]);
            }
        } else {
            const int limit = h0 + narrow_channel() < H ? count : 0;
#pragma unroll 1  // small rather than fast: beside the wide path it would crowd the instruction cache
            for (int i = 0; i < narrow_passes; ++i) {
                const int t = narrow_token() + narrow_step * i;
                T value = T(0.0f);
                if (t < limit) value = *rows.at(x, t, h0 + narrow_channel());
                tiles[narrow_at(i)] = device::load_as<A>(value);
            }
        }
    }
    template <class A>
    __device__ void store(const A* tiles, T* p, Index stride, int count) const {
        const Index step = stride * pass_tokens;
#pragma unroll
        for (int i = 0; i < passes; ++i, p += step)
            if (token() + i * pass_tokens < count) {
                Unit unit;
#pragma unroll
                for (int e = 0; e < V; ++e) unit.x[e] = device::store_as<T>(tiles[wide_at(i) + e * tile_stride]);
                *reinterpret_cast<int4*>(p) = __builtin_bit_cast(int4, unit);  // one store, not V
            }
    }
    /// f(value, row, channel) for what the thread holds by narrow steps.
    template <class A, class F>
    __device__ void each(const A* tiles, const TileRows& rows, Index h0, Index H, int count, F&& f) const {
        if (h0 + narrow_channel() >= H) return;
#pragma unroll 1
        for (int i = 0; i < narrow_passes; ++i) {
            const int t = narrow_token() + narrow_step * i;
            if (t < count) f(tiles[narrow_at(i)], rows.row + rows.direction * t, h0 + narrow_channel());
        }
    }
};

template <class A>
__device__ complex<A> shuffle_up(complex<A> z, int lanes) {
    return {__shfl_up_sync(0xffffffffu, z.re, lanes), __shfl_up_sync(0xffffffffu, z.im, lanes)};
}
template <class A>
__device__ complex<A> shuffle_down(complex<A> z, int lanes) {
    return {__shfl_down_sync(0xffffffffu, z.re, lanes), __shfl_down_sync(0xffffffffu, z.im, lanes)};
}
template <class A>
__device__ complex<A> shuffle(complex<A> z, int lane) {
    return {__shfl_sync(0xffffffffu, z.re, lane), __shfl_sync(0xffffffffu, z.im, lane)};
}
/// a * x + b
template <class A>
__device__ complex<A> affine(complex<A> a, complex<A> x, complex<A> b) {
    return {fma(a.re, x.re, fma(-a.im, x.im, b.re)), fma(a.re, x.im, fma(a.im, x.re, b.im))};
}

/// The carrying powers of a mode, from shared memory.
template <class A>
struct Powers {
    complex<A> chunk, own, two, four_, correction, token;
    __device__ explicit Powers(const A* p) {
        const Four<A> a = four(p), b = four(p + 4), c = four(p + 8);
        chunk = {a.x[0], a.x[1]};
        own = {a.x[2], a.x[3]};
        two = {b.x[0], b.x[1]};
        four_ = {b.x[2], b.x[3]};
        correction = {c.x[0], c.x[1]};
        token = {c.x[2], c.x[3]};
    }
};

/// Tokens of a lane's own chunks as factors: rows are chunks, columns tokens in the order of V_at.
template <class A, device::Precision precision>
struct ChunkFactors {
    device::Factors<A, precision, 4> f[own / 2][2];
    __device__ void load(const A* tile, Lane lane) {
#pragma unroll
        for (int m = 0; m < own / 2; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Four<A> x = four(tile + tile_at<Interleave::by_token>(lane.group * own + 2 * m, 2 * lane.quad + 8 * half));
#pragma unroll
                for (int e = 0; e < 4; ++e) f[m][half].set_representable(e, x.x[e]);
            }
    }
};

/// W of `together` groups of modes: for a lane, its own chunks of mode `quad` of each.
template <int together, class A, device::Precision precision>
__device__ void chunk_responses(complex<A> (&W)[together][own], const ChunkFactors<A, precision>& u, const A* V,
                                Lane lane) {
    A c[together][own / 2][4] = {};
    device::Factors<A, precision, 2> b[together][2];
#pragma unroll
    for (int j = 0; j < together; ++j) {
        const Four<A> v = four(V + j * ChunkTables::V_size + lane.group * chunk_tokens + 4 * lane.quad);
#pragma unroll
        for (int e = 0; e < 4; ++e) b[j][e / 2].set_representable(e % 2, v.x[e]);
    }
    // The products of one sum are apart from each other: each waits for the one before.
    device::multiply_add_each<2>([&](int k, auto&& add) {
#pragma unroll
        for (int j = 0; j < together; ++j)
#pragma unroll
            for (int m = 0; m < own / 2; ++m) add(c[j][m], u.f[m][k], b[j][k]);
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

/// The state after `chunks` whole chunks of a tile, for one mode: what a tile that is not full needs beside the
/// products. factor(t) is the mode's beta A^(15-t).
template <Interleave order, class A, class F>
__device__ complex<A> state_after(complex<A> x, complex<A> over_chunk, F&& factor, const A* tile, int chunks) {
    for (int c = 0; c < chunks; ++c) {
        x = over_chunk * x;
        for (int t = 0; t < chunk_tokens; ++t) x += tile[tile_at<order>(c, t)] * factor(t);
    }
    return x;
}

/// A warp's recurrence, rows and segment.
struct Segment {
    Index i, batch, begin, length;  // rows of the sequence
    int first, last;                // tiles [first, last), counted from the sequence's begin
    int last_of_all, tokens_of_it;  // the sequence's last tile, which may not be full
    __device__ int count(int k) const { return k == last_of_all ? tokens_of_it : tile_tokens; }
};
__device__ inline Segment segment_of(const View<const std::int32_t, 1>& cu, Index length, Index unit, int segments,
                                     int segment_tiles, std::uint32_t* flags) {
    const Index i = unit / segments;
    const int j = static_cast<int>(unit % segments);
    const RowRange rows = device::checked_rows(cu, i, length, threadIdx.x == 0 ? flags : nullptr);
    const int tiles = static_cast<int>(ceil_div(rows.end - rows.begin, tile_tokens));
    Segment s{i, cu ? 0 : i, rows.begin, rows.end - rows.begin, j * segment_tiles, (j + 1) * segment_tiles, tiles - 1,
              static_cast<int>(rows.end - rows.begin - static_cast<Index>(tiles - 1) * tile_tokens)};
    s.first = s.first < tiles ? s.first : tiles;
    s.last = s.last < tiles && j + 1 < segments ? s.last : tiles;
    return s;
}

/// After a tile that is not full: `carry` has the states that enter it, and becomes those after its tokens. A
/// lane a mode.
template <class A>
__device__ __noinline__ void finish_state(A* carry, const A* tile, const A* table, const ChunkTables& at, int count) {
    const int full = count / chunk_tokens;
    for (int n = static_cast<int>(threadIdx.x % 32); n < 4 * at.groups; n += 32) {
        const A* V = table + at.V(n / 4) + 2 * (n % 4) * chunk_tokens;
        const Powers<A> p(table + at.power(n / 4, n % 4));
        const auto factor = [&](int t) { return complex<A>{V[V_at(t)], V[chunk_tokens + V_at(t)]}; };
        const complex<A> beta = factor(chunk_tokens - 1);
        complex<A> x = state_after<Interleave::by_token>({carry[2 * n], carry[2 * n + 1]}, p.chunk, factor, tile, full);
        for (int s = 0; s < count % chunk_tokens; ++s)
            x = affine(p.token, x, tile[tile_at<Interleave::by_token>(full, s)] * beta);
        put(carry + 2 * n, x);
    }
}

/// Runs a system: blocks are G channels (a warp each) of one segment of one recurrence. With `states_only` it
/// leaves in `segment_states` what the segment adds to the state; without, it starts from there.
template <class T, bool states_only>
__global__ void __launch_bounds__(32 * block_channels<T>, 2)
    chunked_system_kernel(SystemRun<T> run, const acc_t<T>* tables, complex<acc_t<T>>* segment_states, int segments,
                          int segment_tiles, std::uint32_t* flags) {
    using A = acc_t<T>;
    constexpr device::Precision precision = precision_of<T>;
    extern __shared__ __align__(16) unsigned char shared[];

    const Lane lane;
    const int G = static_cast<int>(blockDim.x) / 32, warp = lane.thread / 32;
    const Index H = run.shape.channels, N = run.shape.modes;
    const int modes = static_cast<int>(N);
    const Index blocks_a_row = ceil_div(H, G), unit = blockIdx.x / blocks_a_row;  // neighbours share rows
    const Index h0 = blockIdx.x % blocks_a_row * G, h = h0 + warp;
    const ChunkTables at(N);
    A* const tiles = reinterpret_cast<A*>(shared);
    A* const tile = tiles + warp * tile_stride;
    A* const all_tables = tiles + G * tile_stride;
    const A* const table = all_tables + warp * at.size();
    A* const carry = all_tables + G * at.size() + warp * 8 * at.groups;

    const Segment seg = segment_of(run.cu, run.shape.length, unit, segments, segment_tiles, flags);
    const bool whole = segments == 1;
    TileMover<T, Interleave::by_token> mover(G, lane, all_tables + G * at.size() + G * 8 * at.groups);
    const bool wide_u = mover.wide(run.u, h0, H), wide_y = mover.wide(run.y, h0, H);
    const int tile_step = run.backwards ? -1 : 1;
    int k = run.backwards ? seg.last - 1 : seg.first;
    TileRows rows(seg.batch, seg.begin + static_cast<Index>(k) * tile_tokens, seg.count(k), run.backwards);
    const T* next_u = wide_u ? mover.at(run.u, rows, h0) : nullptr;
    T* this_y = wide_y ? mover.at(run.y, rows, h0) : nullptr;
    const Index u_stride = rows.stride(run.u), y_stride = rows.stride(run.y);
    if (wide_u && seg.first < seg.last) mover.start(next_u, u_stride, seg.count(k));

    const int words = static_cast<int>(H - h0 < G ? H - h0 : G) * at.size();
    for (int i = lane.thread; i < words / 4; i += 32 * G)
        four(all_tables + 4 * i) = four(tables + h0 * at.size() + 4 * i);

    // The state that enters the segment; without segments, the caller's.
    for (int n = lane.index; n < 4 * at.groups; n += 32) {
        complex<A> x{A(0), A(0)};
        if (h < H && n < N) {
            if (!whole && !states_only) x = segment_states[(unit * H + h) * N + n];
            if (whole && run.initial) {
                x = run.initial(seg.i, h, n);
                if (run.conjugate) x = conj(x);
            }
        }
        carry[2 * n] = x.re;
        carry[2 * n + 1] = x.im;
    }
    __syncthreads();

    // K[t - s] for the columns of this lane: the products within chunks.
    device::Factors<A, precision, 2> toeplitz[2][2];
    if constexpr (!states_only) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int lag = 8 * half + lane.group - (8 * j + 2 * lane.quad + e);
                    toeplitz[j][half].set_representable(e, lag >= 0 && h < H ? table[at.K() + lag] : A(0));
                }
    }
    complex<A>* checkpoint = nullptr;
    if (run.checkpoints)
        checkpoint = run.checkpoints + ((first_tile(run.cu, seg.i, run.shape.length, tile_tokens) + k) * H + h) * N;

    for (int left = seg.last - seg.first; left > 0; --left, k += tile_step) {
        const int count = seg.count(k);
        device::wait_for_copies();
        mover.finish(tiles, run.u, wide_u, rows, h0, H, count);
        __syncthreads();
        next_u += count * u_stride;
        if (wide_u && left > 1) mover.start(next_u, u_stride, seg.count(k + tile_step));

        if (h < H) {
            if (checkpoint) {
#pragma unroll 1
                for (int n = lane.index; n < modes; n += 32)
                    checkpoint[n] = {carry[2 * n], carry[2 * n + 1]};
                checkpoint += tile_step * H * N;
            }
            ChunkFactors<A, precision> u;
            u.load(tile, lane);
            A y[own / 2][2][4] = {};
            if constexpr (!states_only)
#pragma unroll
                for (int m = 0; m < own / 2; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int j = 0; j <= half; ++j) device::multiply_add(y[m][half], u.f[m][j], toeplitz[j][half]);

            constexpr int together = 2;
            const bool write = lane.group == 0 && count == tile_tokens;
            for (int group = 0; group < at.groups; group += together) {
                complex<A> X[together][own];
                chunk_responses(X, u, table + at.V(group), lane);
                const Powers<A> p[together] = {Powers<A>(table + at.power(group, lane.quad)),
                                               Powers<A>(table + at.power(group + 1, lane.quad))};
                A* const slot = carry + 2 * (4 * group + lane.quad);
                const complex<A> start[together] = {{slot[0], slot[1]}, {slot[8], slot[9]}};
                complex<A> end[together];
                scan_chunks(X, p, start, end, lane);
                __syncwarp();  // all have read start
#pragma unroll
                for (int j = 0; j < together; ++j)
                    if (write) put(slot + 8 * j, affine(p[j].correction, start[j], end[j]));
                if constexpr (!states_only) {
                    device::Factors<A, precision, 2> b[together][2];
                    device::Factors<A, precision, 4> a[together][own / 2];
#pragma unroll
                    for (int j = 0; j < together; ++j) {
                        const Four<A> w = four(table + at.M(group + j) + (4 * lane.group + lane.quad) * 4);
#pragma unroll
                        for (int e = 0; e < 4; ++e) b[j][e / 2].set_representable(e % 2, w.x[e]);
#pragma unroll
                        for (int m = 0; m < own / 2; ++m) {
                            a[j][m].set(0, X[j][2 * m].re);
                            a[j][m].set(1, X[j][2 * m + 1].re);
                            a[j][m].set(2, X[j][2 * m].im);
                            a[j][m].set(3, X[j][2 * m + 1].im);
                        }
                    }
                    device::multiply_add_each<together>([&](int j, auto&& add) {
#pragma unroll
                        for (int m = 0; m < own / 2; ++m)
#pragma unroll
                            for (int half = 0; half < 2; ++half) add(y[m][half], a[j][m], b[j][half]);
                    });
                }
            }
            __syncwarp();  // all have read the tokens, and the state is written
            if (count < tile_tokens) finish_state(carry, tile, table, at, count);
            if constexpr (!states_only) {
                __syncwarp();
#pragma unroll
                for (int m = 0; m < own / 2; ++m)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
                        four(tile + tile_at<Interleave::by_token>(lane.group * own + 2 * m, 2 * lane.quad + 8 * half)) = {
                            {y[m][half][0], y[m][half][2], y[m][half][1], y[m][half][3]}};
            }
        }
        __syncthreads();
        if constexpr (!states_only) {
            const auto flat = [&](Index row, Index channel) {
                return (seg.batch * run.shape.length + row) * H + channel;
            };
            if (run.sum)
                mover.each(tiles, rows, h0, H, count, [&](A y_, Index row, Index c) { run.sum[flat(row, c)] = y_; });
            else if (run.addend)
                mover.each(tiles, rows, h0, H, count, [&](A y_, Index row, Index c) {
                    if (run.y) run.y(seg.batch, row, c) = device::store_as<T>(y_ + run.addend[flat(row, c)]);
                });
            else if (wide_y)
                mover.store(tiles, this_y, y_stride, count);
            else if (run.y)
                mover.each(tiles, rows, h0, H, count,
                           [&](A y_, Index row, Index c) { run.y(seg.batch, row, c) = device::store_as<T>(y_); });
            this_y += count * y_stride;
            // Else a thread took out what it will overwrite with the next tokens.
            if (run.sum || run.addend ? wide_u : wide_u != wide_y) __syncthreads();
        }
        rows.advance(count);
    }

    // The state that leaves: the segment's own part, or the sequence's.
    __syncwarp();
    if (h < H)
        for (int n = lane.index; n < N; n += 32) {
            const complex<A> x{carry[2 * n], carry[2 * n + 1]};
            if constexpr (states_only)
                segment_states[(unit * H + h) * N + n] = x;
            else if (run.final && unit % segments == (run.backwards ? 0 : segments - 1))
                run.final(seg.i, h, n) = run.conjugate ? conj(x) : x;
        }
}

/// One thread a mode walks the segments of a recurrence: from what each adds to the state that enters it.
template <class A>
__global__ void combine_segments_kernel(View<const std::int32_t, 1> cu, Shape shape, bool backwards, bool conjugate,
                                        View<const complex<A>, 3> initial, const SystemMode* modes, int segments,
                                        int segment_tiles, complex<A>* states) {
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
        const Segment s = segment_of(cu, shape.length, i * segments + j, segments, segment_tiles, nullptr);
        const Index last = static_cast<Index>(s.last) * tile_tokens, end = last < s.length ? last : s.length;
        const Index begin = static_cast<Index>(s.first) * tile_tokens;
        return end > begin ? end - begin : Index{0};
    };
    const c64 Abar = modes[at].A;
    for (int step = 0; step < segments; ++step) {
        const int j = backwards ? segments - 1 - step : step;
        complex<A>& slot = states[((i * segments + j) * H + h) * N + n];
        c64 power{1.0, 0.0}, square = Abar;
        for (Index e = tokens(j); e > 0; e /= 2) {
            if (e % 2) power = power * square;
            square = square * square;
        }
        const c64 added = cast<double>(slot);
        slot = cast<A>(x);
        x = power * x + added;
    }
}

// The gradient kernel turns the products around: rows are the real and imaginary parts of eight modes, columns
// chunks. A lane then has one mode (group) and eight chunks in a row (quad), and what the scans leave in its
// registers is the left factor of the products over chunks that the sums are made of.
inline constexpr int octet = 8, lane_chunks = tile_chunks / 4;
inline constexpr int block_octets = 4;  // of a block: more modes are more blocks

/// Shared memory of a channel in the gradient kernel, in elements of A, for the block's octets.
struct GradientLayout {
    int octets;
    INTERSTATE_HD explicit constexpr GradientLayout(Index modes, int block = 0)
        : octets(ChunkTables(modes).groups / 2 - block * block_octets) {
        if (octets > block_octets) octets = block_octets;
    }
    // Left factors, (octets, 2 halves of a chunk, 32 lanes, 4): beta A^(15-s) and gamma A^t.
    INTERSTATE_HD constexpr int V() const { return 0; }
    INTERSTATE_HD constexpr int Q() const { return octets * 256; }
    INTERSTATE_HD constexpr int powers() const { return 2 * octets * 256; }             // as in ChunkTables
    INTERSTATE_HD constexpr int u_E() const { return powers() + octets * 2 * ChunkTables::power_size; }  // (octets, 2, 32, 4)
    INTERSTATE_HD constexpr int dy_X() const { return u_E() + octets * 256; }           // (octets, 2, 32, 4)
    INTERSTATE_HD constexpr int X_E() const { return dy_X() + octets * 256; }           // (octets, 32, 2)
    INTERSTATE_HD constexpr int tail() const { return X_E() + octets * 64; }            // (modes, 4): A, beta
    INTERSTATE_HD constexpr int edges() const { return tail() + octets * 32; }          // (2, modes, 4): first X, last E
    INTERSTATE_HD constexpr int size() const { return edges() + 2 * octets * 32; }
    /// Beside it: tokens of u and of dy.
    static constexpr int tokens = 2 * tile_stride;
};

/// Tokens as right factors. `chunks`: columns are chunks 4 col + n, rows tokens. `tokens`: columns are tokens
/// 8 half + col, rows chunks 8 row + n (and 4 further).
template <class A, device::Precision precision>
struct RightFactors {
    device::Factors<A, precision, 2> chunks[4][2], tokens[4][2];
    __device__ void load(const A* tile, Lane lane) {
#pragma unroll
        for (int pair = 0; pair < 2; ++pair)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Four<A> x =
                    four(tile + tile_at<Interleave::by_chunk>(4 * lane.group + 2 * pair, 2 * lane.quad + 8 * half));
#pragma unroll
                for (int e = 0; e < 4; ++e) chunks[2 * pair + e / 2][half].set_representable(e % 2, x.x[e]);
            }
#pragma unroll
        for (int n = 0; n < 4; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    tokens[n][half].set_representable(
                        e, tile[tile_at<Interleave::by_chunk>(8 * lane.quad + n + 4 * e, lane.group + 8 * half)]);
    }
};

/// Responses to u and to dy of a lane's eight chunks, for its mode of an octet.
template <class A, device::Precision precision>
__device__ void octet_responses(complex<A> (&W)[lane_chunks], complex<A> (&Q)[lane_chunks],
                                const RightFactors<A, precision>& u, const RightFactors<A, precision>& dy,
                                const A* table_W, const A* table_Q, Lane lane) {
    device::Factors<A, precision, 4> a[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int at = (32 * half + lane.index) * 4;
        const Four<A> w = four(table_W + at), q = four(table_Q + at);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            a[0][half].set_representable(e, w.x[e]);
            a[1][half].set_representable(e, q.x[e]);
        }
    }
    A c[2][4][4] = {};
    device::multiply_add_each<2>([&](int half, auto&& add) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            add(c[0][n], a[0][half], u.chunks[n][half]);
            add(c[1][n], a[1][half], dy.chunks[n][half]);
        }
    });
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        W[n] = {c[0][n][0], c[0][n][2]};
        W[n + 4] = {c[0][n][1], c[0][n][3]};
        Q[n] = {c[1][n][0], c[1][n][2]};
        Q[n + 4] = {c[1][n][1], c[1][n][3]};
    }
}

/// In place of W, the states that enter the chunks, from `start`; in place of Q, those that follow them in
/// reverse time, E[r-1] = A^16 E[r] + Q[r], from `last`. In step, so that one's latency hides the other's.
template <class A>
__device__ void scan_octet(complex<A> (&W)[lane_chunks], complex<A> (&Q)[lane_chunks], const Powers<A>& p,
                           complex<A> start, complex<A> last, int quad) {
    constexpr int back = lane_chunks - 1;
    const complex<A> zero{A(0), A(0)};
    complex<A> x = affine(p.chunk, quad == 0 ? start : zero, W[0]);
    complex<A> e = affine(p.chunk, quad == 3 ? last : zero, Q[back]);
#pragma unroll
    for (int r = 1; r < lane_chunks; ++r) {
        x = affine(p.chunk, x, W[r]);
        e = affine(p.chunk, e, Q[back - r]);
    }
    static_assert(lane_chunks == 2 * own);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const complex<A> before = shuffle_up(x, 1 << i), after = shuffle_down(e, 1 << i);
        const complex<A> over = i == 0 ? p.two : p.four_;
        if (quad >= 1 << i) x = affine(over, before, x);
        if (quad < 4 - (1 << i)) e = affine(over, after, e);
    }
    x = shuffle_up(x, 1);
    e = shuffle_down(e, 1);
    if (quad == 0) x = start;
    if (quad == 3) e = last;
#pragma unroll
    for (int r = 0; r < lane_chunks; ++r) {
        const complex<A> next = affine(p.chunk, x, W[r]), previous = affine(p.chunk, e, Q[back - r]);
        W[r] = x;
        Q[back - r] = e;
        x = next;
        e = previous;
    }
}

/// A tile that is not full ends inside chunk `full`, and `last` follows its tokens, not the chunk. What it does
/// to these tokens is summed here, and what it does to the chunk before takes its place among the edges. A lane
/// a mode.
template <class A>
__device__ __noinline__ void finish_tile(A* mine, A* edges, const A* u_tile, const GradientLayout& layout, int count) {
    const int full = count / chunk_tokens;
    for (int n = static_cast<int>(threadIdx.x % 32); n < octet * layout.octets; n += 32) {
        const Powers<A> p(mine + layout.powers() + n * ChunkTables::mode_powers);
        A* const edge = edges + n * 4;
        const complex<A> last{edge[2], edge[3]};
        // The mode's column of left factors: tokens 8 half + 2 quad + (0, 1) in lane 4 group + quad.
        const A* V = mine + layout.V() + 256 * (n / octet) + 16 * (n % octet);
        const auto factor = [&](int t) {
            const A* v = V + 128 * (t / 8) + 4 * (t % 8 / 2) + 2 * (t % 2);
            return complex<A>{v[0], v[1]};
        };
        const complex<A> x = state_after<Interleave::by_chunk>({edge[0], edge[1]}, p.chunk, factor, u_tile, full);
        const complex<A> beta = factor(chunk_tokens - 1);
        complex<A> dA{A(0), A(0)}, dbeta{A(0), A(0)}, power{A(1), A(0)}, slope{A(0), A(0)};
        for (int s = count % chunk_tokens - 1; s >= 0; --s) {
            const A us = u_tile[tile_at<Interleave::by_chunk>(full, s)];
            dbeta += us * (power * last);
            dA += us * (beta * (slope * last));
            slope = slope * p.token + power;
            power = power * p.token;
        }
        dA += slope * last * x;
        A* const tail = mine + layout.tail() + n * 4;
        put(tail, complex<A>{tail[0] + dA.re, tail[1] + dA.im});
        put(tail + 2, complex<A>{tail[2] + dbeta.re, tail[3] + dbeta.im});
        put(edge + 2, power * last);
    }
}

/// Sums over the tiles of a part (eq. 21): blocks are G channels, a warp each, and up to
/// 32 modes. run.checkpoints are the states of the system's run, exchanged_checkpoints those of the exchanged one.
template <class T>
__global__ void __launch_bounds__(32 * block_channels<T>, 1)
    chunked_gradient_kernel(SystemRun<T> run, View<const T, 3> dy, const SystemMode* modes, const acc_t<T>* tables,
                            const acc_t<T>* exchanged_tables, const complex<acc_t<T>>* exchanged_checkpoints,
                            PartialSums sums) {
    using A = acc_t<T>;
    constexpr device::Precision precision = precision_of<T>;
    extern __shared__ __align__(16) unsigned char shared[];
    const Lane lane;
    const int G = static_cast<int>(blockDim.x) / 32, channel = lane.thread / 32;
    const Index H = run.shape.channels, L = run.shape.length;
    const int N = static_cast<int>(run.shape.modes);
    const Index h0 = static_cast<Index>(blockIdx.x) * G, h = h0 + channel;
    const ChunkTables at(N);
    const int block = static_cast<int>(blockIdx.z), first_mode = block * block_octets * octet;
    const GradientLayout layout(N, block);
    const int block_modes = N - first_mode < layout.octets * octet ? N - first_mode : layout.octets * octet;
    A* const tiles = reinterpret_cast<A*>(shared);
    A* const all = tiles + G * GradientLayout::tokens;
    A* const mine = all + channel * layout.size();
    A* const u_tile = tiles + channel * tile_stride;
    A* const dy_tile = u_tile + G * tile_stride;

    if (h < H) {
        const A* from = tables + h * at.size();
        const A* exchanged = exchanged_tables + h * at.size();
        for (int i = lane.index; i < layout.octets * 256; i += 32) {
            const int element = i % 4, quad = i / 4 % 4, mode = i / 16 % 8, half = i / 128 % 2, o = i / 256;
            const int t = 8 * half + 2 * quad + element / 2;
            const int column =
                at.V(first_mode / 4 + 2 * o + mode / 4) + (mode % 4 * 2 + element % 2) * chunk_tokens;
            mine[layout.V() + i] = from[column + V_at(t)];
            mine[layout.Q() + i] = exchanged[column + V_at(chunk_tokens - 1 - t)];
        }
        for (int i = lane.index; i < layout.u_E() - layout.powers(); i += 32)
            mine[layout.powers() + i] = from[at.power(first_mode / 4, 0) + i];
        for (int i = lane.index; i < layout.size() - layout.u_E(); i += 32) mine[layout.u_E() + i] = A(0);
    }
    __syncthreads();

    A lags[2][4] = {};  // dy of token group (+ 8) times u of token 8 half + 2 quad (+ 1)
    using Mover = TileMover<T, Interleave::by_chunk>;
    A* const staging = all + G * layout.size();
    Mover mover_u(G, lane, staging), mover_dy(G, lane, reinterpret_cast<unsigned char*>(staging) + G * Mover::staging_bytes);
    const bool wide_u = mover_u.wide(run.u, h0, H), wide_dy = mover_dy.wide(dy, h0, H);
    const Index slots = tile_count(run.shape, tile_tokens);
    // A tile of this part: its number (slots when there is no more), tokens and rows.
    struct Tile {
        Index slot;
        int count;
        TileRows rows;
    };
    const auto tile_from = [&](Index slot) {
        for (; slot < slots; slot += gridDim.y) {
            const Index i = recurrence_of(run.cu, run.shape, slot, tile_tokens);
            const RowRange range = device::checked_rows(run.cu, i, L, nullptr);
            const Index begin = range.begin + (slot - first_tile(run.cu, i, L, tile_tokens)) * tile_tokens;
            if (begin < range.begin || begin >= range.end) continue;  // a number that no tile has
            const int count = static_cast<int>(range.end - begin < tile_tokens ? range.end - begin : tile_tokens);
            return Tile{slot, count, TileRows(run.cu ? 0 : i, begin, count, run.backwards)};
        }
        return Tile{slots, 0, TileRows(0, 0, 0, false)};
    };
    int turn = 0;  // which of the two sets of edges
    const auto start = [&](const Tile& t) {
        if (wide_u) mover_u.start(mover_u.at(run.u, t.rows, h0), t.rows.stride(run.u), t.count);
        if (wide_dy) mover_dy.start(mover_dy.at(dy, t.rows, h0), t.rows.stride(dy), t.count);
        if (h < H && t.slot < slots)
            for (int n = lane.index; n < block_modes; n += 32) {
                A* const edge = mine + layout.edges() + (octet * layout.octets * turn + n) * 4;
                const Index at_state = (t.slot * H + h) * N + first_mode + n;
                device::copy_async<sizeof(complex<A>)>(edge, run.checkpoints + at_state);
                device::copy_async<sizeof(complex<A>)>(edge + 2, exchanged_checkpoints + at_state);
            }
    };
    Tile next = tile_from(blockIdx.y);
    start(next);
    while (next.slot < slots) {
        const auto [slot, count, rows] = next;
        A* const edges = mine + layout.edges() + octet * layout.octets * turn * 4;
        turn ^= 1;
        device::wait_for_copies();
        __syncthreads();
        mover_u.finish(tiles, run.u, wide_u, rows, h0, H, count);
        mover_dy.finish(tiles + G * tile_stride, dy, wide_dy, rows, h0, H, count);
        next = tile_from(slot + gridDim.y);
        start(next);
        __syncthreads();
        if (h >= H) continue;

        RightFactors<A, precision> u, g;
        u.load(u_tile, lane);
        g.load(dy_tile, lane);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            A c[4] = {};
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                device::Factors<A, precision, 4> a;  // as a left factor, tokens are rows: the same elements
#pragma unroll
                for (int e = 0; e < 4; ++e) a.take(e, g.tokens[n][e % 2], e / 2);
                device::multiply_add(c, a, u.tokens[n][half]);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) lags[half][e] += c[e];
        }
        if (count < tile_tokens) {
            finish_tile(mine, edges, u_tile, layout, count);
            __syncwarp();
        }

        for (int o = 0; o < layout.octets; ++o) {
            const int n = octet * o + lane.group;
            const Powers<A> p(mine + layout.powers() + n * ChunkTables::mode_powers);
            const Four<A> edge = four(edges + n * 4);
            complex<A> last{edge.x[2], edge.x[3]};
            complex<A> X[lane_chunks], E[lane_chunks];
            octet_responses(X, E, u, g, mine + layout.V() + 256 * o, mine + layout.Q() + 256 * o, lane);
            if (count < tile_tokens) {  // what comes from behind enters at chunk `full` (finish_tile)
#pragma unroll
                for (int r = 0; r < lane_chunks; ++r)
                    if (lane.quad * lane_chunks + r == count / chunk_tokens) E[r] += last;
                last = {A(0), A(0)};
            }
            scan_octet(X, E, p, {edge.x[0], edge.x[1]}, last, lane.quad);

            complex<A> XE{A(0), A(0)};
#pragma unroll
            for (int r = 0; r < lane_chunks; ++r) XE = affine(X[r], E[r], XE);
            const int place = 256 * o + 4 * lane.index;
            Four<A> totals[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                totals[half] = four(mine + layout.u_E() + place + 128 * half);
                totals[2 + half] = four(mine + layout.dy_X() + place + 128 * half);
            }
            A u_E[2][4] = {}, dy_X[2][4] = {};
            device::multiply_add_each<4>([&](int r, auto&& add) {
                device::Factors<A, precision, 4> x, e;
                x.set(0, X[r].re);
                x.set(1, X[r].im);
                x.set(2, X[r + 4].re);
                x.set(3, X[r + 4].im);
                e.set(0, E[r].re);
                e.set(1, E[r].im);
                e.set(2, E[r + 4].re);
                e.set(3, E[r + 4].im);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    add(u_E[half], e, u.tokens[r][half]);
                    add(dy_X[half], x, g.tokens[r][half]);
                }
            });
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    totals[half].x[e] += u_E[half][e];
                    totals[2 + half].x[e] += dy_X[half][e];
                }
                four(mine + layout.u_E() + place + 128 * half) = totals[half];
                four(mine + layout.dy_X() + place + 128 * half) = totals[2 + half];
            }
            A* const total_XE = mine + layout.X_E() + 2 * (32 * o + lane.index);
            put(total_XE, complex<A>{total_XE[0] + XE.re, total_XE[1] + XE.im});
        }
    }

    if (h >= H) return;
    // The powers come in now, in float64: a lane has mode `group` and tokens 2 quad, 2 quad + 1 of both halves.
    for (int o = 0; o < layout.octets; ++o) {
        const int n = octet * o + lane.group;
        const Index at_mode = h * N + first_mode + n;
        const SystemMode m = n < block_modes ? modes[at_mode] : SystemMode{};
        SystemSums sum{};
        const auto element = [&](int base, int t) {
            const A* p = mine + base + 4 * (64 * o + 32 * (t / 8) + lane.index) + t % 2;
            return c64{static_cast<double>(p[0]), static_cast<double>(p[2])};
        };
        c64 power{1.0, 0.0}, slope{0.0, 0.0};  // A^e and its slope in A
        for (int e = 0; e < chunk_tokens; ++e) {
            const int s = chunk_tokens - 1 - e;
            if (s % 8 / 2 == lane.quad) {
                const c64 uE = element(layout.u_E(), s);
                sum.beta += power * uE;
                sum.A += slope * m.beta * uE;
            }
            if (e % 8 / 2 == lane.quad) {
                const c64 dyX = element(layout.dy_X(), e);
                sum.gamma += power * dyX;
                sum.A += slope * m.gamma * dyX;
            }
            slope = slope * m.A + power;
            power = power * m.A;
        }
        const A* const XE = mine + layout.X_E() + 2 * (32 * o + lane.index);
        sum.A += slope * c64{static_cast<double>(XE[0]), static_cast<double>(XE[1])};
        for (int d = 1; d < 4; d *= 2) {
            sum.A += {__shfl_xor_sync(0xffffffffu, sum.A.re, d), __shfl_xor_sync(0xffffffffu, sum.A.im, d)};
            sum.beta += {__shfl_xor_sync(0xffffffffu, sum.beta.re, d), __shfl_xor_sync(0xffffffffu, sum.beta.im, d)};
            sum.gamma += {__shfl_xor_sync(0xffffffffu, sum.gamma.re, d), __shfl_xor_sync(0xffffffffu, sum.gamma.im, d)};
        }
        const Four<A> tail = four(mine + layout.tail() + n * 4);
        sum.A += {static_cast<double>(tail.x[0]), static_cast<double>(tail.x[1])};
        sum.beta += {static_cast<double>(tail.x[2]), static_cast<double>(tail.x[3])};
        if (lane.quad == 0 && n < block_modes) sums.modes[static_cast<Index>(blockIdx.y) * H * N + at_mode] = sum;
    }
    if (block != 0) return;
    // Diagonals of the products of tokens: lag = token of dy - token of u.
    A* const products = u_tile;  // (16, 17)
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            products[(lane.group + 8 * (e / 2)) * 17 + 8 * half + 2 * lane.quad + e % 2] = lags[half][e];
    __syncwarp();
    if (lane.index < chunk_tokens) {
        double sum = 0.0;
        for (int t = lane.index; t < chunk_tokens; ++t) sum += static_cast<double>(products[t * 17 + t - lane.index]);
        sums.lags[(static_cast<Index>(blockIdx.y) * H + h) * chunk_tokens + lane.index] = sum;
    }
}

}  // namespace INTERSTATE_KERNELS

/// Channels of a block: `wanted`, fewer where there are fewer or where shared memory is short (`bytes` a channel). Results do not depend on it.
inline Status channels_per_block(int wanted, Index H, std::size_t bytes, int& G) {
    std::size_t limit = 0;
    INTERSTATE_RETURN_IF_ERROR(shared_memory_limit(limit));
    G = wanted;
    while (G > 1 && (G / 2 >= H || static_cast<std::size_t>(G) * bytes > limit)) G /= 2;
    if (static_cast<std::size_t>(G) * bytes > limit)
        return Status::error(StatusCode::unsupported, "s4d.cuda.chunked: needs %zu bytes of shared memory, the device has %zu",
                             bytes, limit);
    return {};
}

/// The chunked method for the driver in cuda_driver.cuh.
template <class T>
struct Chunked {
    using A = acc_t<T>;
    static constexpr Index tile = tile_tokens;
    static constexpr int lag_count = chunk_tokens;

    /// Segments of a recurrence, so that there is work for every multiprocessor. A function of the shape
    /// alone: the order of sums does not depend on the device. Each recurrence of several segments is read twice.
    static int segments(const Shape& s) {
        const Index units = s.states() * ceil_div(s.channels, block_channels<T>), tiles = ceil_div(s.length, tile);
        if (units == 0 || units >= 100 || tiles < 2) return 1;
        return static_cast<int>(std::min(ceil_div(200, units), tiles));
    }
    static int parts(const Shape& s) {
        const Index wanted = 264 / std::max<Index>(ceil_div(s.channels, 8), 1);
        return static_cast<int>(std::max<Index>(std::min(wanted, tile_count(s, tile)), 1));
    }

    /// Tables of a system, and scratch of a run.
    struct Tables {
        A* data;
        Tables(Arena& arena, const Shape& s, bool used)
            : data(used ? arena.take<A>(s.channels * ChunkTables(s.modes).size()) : nullptr) {}
    };
    struct Scratch {
        complex<A>* segment_states;
        Scratch(Arena& arena, const Shape& s) {
            const int n = segments(s);
            segment_states = n > 1 ? arena.take<complex<A>>(n * s.states() * s.channels * s.modes) : nullptr;
        }
    };

    template <class P>
    static Status prepare(const cuda& exec, const Options& options, const Params<P>& params, const Shape& s, Half half,
                          SystemMode* modes, const Tables& tables, const Tables& exchanged) {
        return launch(exec, "chunk_tables_kernel", chunk_tables_kernel<T, P>,
                      {dim3(static_cast<unsigned>(s.channels)), dim3(table_parts * max_chunked_modes)}, options.disc, params, half,
                      s.modes, modes, tables.data, exchanged.data);
    }

    static Status run(const cuda& exec, const SystemRun<T>& run, const SystemMode* modes, const Tables& tables,
                      const Scratch& scratch) {
        const Shape& s = run.shape;
        const ChunkTables at(s.modes);
        const std::size_t bytes =
            sizeof(A) * static_cast<std::size_t>(tile_stride + at.size() + 8 * at.groups) + tile_tokens * sizeof(T);
        int G = 0;
        INTERSTATE_RETURN_IF_ERROR(channels_per_block(block_channels<T>, s.channels, bytes, G));
        const int n = segments(s);
        const Index tiles = ceil_div(s.length, tile);
        const int segment_tiles = static_cast<int>(std::max<Index>(ceil_div(tiles, n), 1));
        const Index blocks = ceil_div(s.channels, G) * s.states() * n;
        INTERSTATE_RETURN_IF_ERROR(check_size("u: blocks of a grid", blocks));
        const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * G)),
                                static_cast<std::size_t>(G) * bytes};
        if (n > 1) {
            INTERSTATE_RETURN_IF_ERROR(launch(exec, "chunked_system_kernel, states", chunked_system_kernel<T, true>, shape,
                                              run, tables.data, scratch.segment_states, n, segment_tiles, exec.flags));
            const Index threads = s.states() * s.channels * s.modes;
            INTERSTATE_RETURN_IF_ERROR(
                launch(exec, "combine_segments_kernel", combine_segments_kernel<A>,
                       {dim3(static_cast<unsigned>(ceil_div(threads, 128))), dim3(128)}, run.cu, s, run.backwards,
                       run.conjugate, run.initial, modes, n, segment_tiles, scratch.segment_states));
        }
        return launch(exec, "chunked_system_kernel", chunked_system_kernel<T, false>, shape, run, tables.data,
                      scratch.segment_states, n, segment_tiles, exec.flags);
    }

    static Status gradient(const cuda& exec, const SystemRun<T>& run, const View<const T, 3>& dy, const SystemMode* modes,
                           const Tables& tables, const Tables& exchanged, const complex<A>* exchanged_checkpoints,
                           const PartialSums& sums) {
        const Shape& s = run.shape;
        const std::size_t bytes =
            sizeof(A) * static_cast<std::size_t>(GradientLayout(s.modes).size() + GradientLayout::tokens) +
                                  2 * tile_tokens * sizeof(T);
        int G = 0;
        INTERSTATE_RETURN_IF_ERROR(channels_per_block(block_channels<T>, s.channels, bytes, G));
        return launch(exec, "chunked_gradient_kernel", chunked_gradient_kernel<T>,
                      {dim3(static_cast<unsigned>(ceil_div(s.channels, G)), static_cast<unsigned>(sums.parts),
                            static_cast<unsigned>(std::max<Index>(ceil_div(s.modes, block_octets * octet), 1))),
                       dim3(static_cast<unsigned>(32 * G)), static_cast<std::size_t>(G) * bytes},
                      run, dy, modes, tables.data, exchanged.data, exchanged_checkpoints, sums);
    }
};

}  // namespace s4d::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
