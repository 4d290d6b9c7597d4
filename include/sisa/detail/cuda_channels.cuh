// From tokens to the channels that attention's CUDA mainloop reads, and back from their gradients: running sums of log_alpha and
// theta, rotation, decay. Equations: docs/ops/sisa.md.
//
// A chunk is 64 tokens of one sequence and one key/value head, as attention's level_tile. Sums run in two levels: of each chunk, over
// the chunks, and inside the chunk again where they are needed, all in float64. Nothing is added in an order that could vary.
#pragma once

#include <cub/block/block_scan.cuh>
#include <cub/warp/warp_scan.cuh>

#include <attention/detail/cuda_tiles.cuh>
#include <sisa/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {
namespace detail {

inline constexpr int chunk_tokens = attention::detail::level_tile, chunk_threads = 128;

/// Chunks of all sequences of a call, numbered so that those of a sequence follow each other; packed, some numbers stay unused.
struct Chunks {
    Index sequences, of_each, count;
    explicit Chunks(const Shape& s)
        : sequences(s.packed() ? s.sequences : s.batch), of_each(ceil_div(s.keys, chunk_tokens)),
          count(s.packed() ? s.keys / chunk_tokens + s.sequences : s.batch * of_each) {}
};

/// A chunk as a block finds it.
struct Chunk {
    Index sequence, batch, row0;  // row0: where the sequence begins in the tensors of keys
    int first, count, length;     // position of the first token, tokens here, tokens of the sequence
};
__device__ inline bool find_chunk(Chunk& at, const Shape& s, const View<const std::int32_t, 1>& cu, const Chunks& chunks, Index slot) {
    at.sequence = device::recurrence_of(cu, chunks.sequences, s.keys, slot, chunk_tokens);
    const RowRange rows = device::checked_rows(cu, at.sequence, s.keys);
    at.batch = s.packed() ? 0 : at.sequence;
    at.row0 = rows.begin;
    at.length = static_cast<int>(rows.end - rows.begin);
    at.first = static_cast<int>(slot - device::first_tile(cu, at.sequence, s.keys, chunk_tokens)) * chunk_tokens;
    at.count = min(chunk_tokens, at.length - at.first);
    return at.first >= 0 && at.count > 0;
}

/// What every kernel here reads. Sums have one column for g and one for each pair of channels.
template <class T, class P>
struct Problem {
    Shape shape;
    Chunks chunks;
    Inputs<T, P> in;
    int columns;          // 1 + pairs
    int padded;           // channels as stored, zeros behind the last
    bool published, pairwise;  // pairwise: channels are stored without decay, the level of a token is its g
    double clamp;
    acc_t<T> scale;       // of attention's products
    double* sums;         // (chunks, Hkv, columns): of each chunk, then of all before it
    double* bounds;       // (chunks, Hkv, 2), published: largest and smallest g of a chunk, then the offset of its sequence
    View<double, 3> query_level, key_level;  // (B, Lq, Hkv) and (B, Lk, Hkv), in powers of two
    View<T, 4> c, b;      // channels as stored
    acc_t<T>* strength;   // (Hq), lambda
    __device__ double* sums_of(Index chunk, Index kv) const { return sums + (chunk * shape.kv_heads + kv) * columns; }
    __device__ double* bounds_of(Index chunk, Index kv) const { return bounds + (chunk * shape.kv_heads + kv) * 2; }
    /// Keys before the first query: the last query stands at the last key.
    __device__ Index missing() const { return shape.packed() ? 0 : shape.keys - shape.queries; }
    /// What a token adds to a sum.
    __device__ double step(const Chunk& at, int token, Index kv, int column) const {
        if (token >= at.count) return 0.0;
        const Index row = at.row0 + at.first + token;
        if (column > 0) return static_cast<double>(in.theta(at.batch, row, kv, column - 1));
        const auto x = static_cast<double>(in.log_alpha(at.batch, row, kv));
        return !published && x <= hard_reset ? hard_reset : x;
    }
};

/// Running sums of a column inside a chunk, from `before` on, by a warp: to(token, sum).
template <class T, class P, class F>
__device__ void run_sums(const Problem<T, P>& p, const Chunk& at, Index kv, int column, double before, int lane, F&& to) {
    __shared__ typename cub::WarpScan<double>::TempStorage memory[chunk_threads / 32];
    static_assert(chunk_tokens == 64);
    const double x = p.step(at, 2 * lane, kv, column), y = p.step(at, 2 * lane + 1, kv, column);
    double sum = 0.0;
    cub::WarpScan<double>(memory[threadIdx.x / 32]).ExclusiveSum(x + y, sum);
    __syncwarp();
    to(2 * lane, before + (sum + x));
    to(2 * lane + 1, before + (sum + x + y));
}

/// The angle Phi as a turn, cos and sin.
template <class A>
struct Turn {
    A cos, sin;
    Turn() = default;
    __device__ explicit Turn(double angle) {
        if constexpr (sizeof(A) == 8) {
            sincos(angle, &sin, &cos);
        } else {
            // A few turns less, in float64, so that float has an angle below pi.
            const double turns = rint(angle * 0.15915494309189535);
            sincosf(static_cast<float>(fma(turns, -6.283185307179586, angle) - turns * 2.4492935982947064e-16), &sin, &cos);
        }
    }
};

inline namespace INTERSTATE_KERNELS {

/// Sums of every chunk, a block each; in published mode also how far g goes up and down inside it.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void chunk_sums_kernel(const __grid_constant__ Problem<T, P> p) {
    Chunk at;
    const Index kv = blockIdx.x % p.shape.kv_heads, slot = blockIdx.x / p.shape.kv_heads;
    if (blockIdx.x == 0)
        for (Index h = threadIdx.x; h < p.shape.query_heads; h += chunk_threads) p.strength[h] = static_cast<acc_t<T>>(p.in.lam(h));
    if (!find_chunk(at, p.shape, p.in.cu_seqlens, p.chunks, slot)) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int column = warp; column < p.columns; column += chunk_threads / 32) {
        const double x = p.step(at, 2 * lane, kv, column), y = p.step(at, 2 * lane + 1, kv, column);
        double sum = x + y;
        for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (lane == 0) p.sums_of(slot, kv)[column] = sum;
        if (!p.published || column > 0) continue;
        double largest = -INFINITY, smallest = INFINITY;
        run_sums(p, at, kv, 0, 0.0, lane, [&](int token, double g) {
            if (token >= at.count) return;
            largest = fmax(largest, g);
            smallest = fmin(smallest, g);
        });
        for (int step = 16; step > 0; step /= 2) {
            largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, step));
            smallest = fmin(smallest, __shfl_xor_sync(0xffffffffu, smallest, step));
        }
        if (lane == 0) {
            p.bounds_of(slot, kv)[0] = largest;
            p.bounds_of(slot, kv)[1] = smallest;
        }
    }
}

/// From sums of chunks to sums of all chunks before, in place, a block for each sequence and head. Published: the offset c (eq. 11).
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void chunk_offsets_kernel(const __grid_constant__ Problem<T, P> p) {
    using Scan = cub::BlockScan<double, chunk_threads>;
    __shared__ typename Scan::TempStorage memory;
    __shared__ double largest[chunk_threads], smallest[chunk_threads];
    const Index kv = blockIdx.x % p.shape.kv_heads, sequence = blockIdx.x / p.shape.kv_heads;
    const RowRange rows = device::checked_rows(p.in.cu_seqlens, sequence, p.shape.keys);
    const Index first = device::first_tile(p.in.cu_seqlens, sequence, p.shape.keys, chunk_tokens), count = ceil_div(rows.end - rows.begin, chunk_tokens);
    const int thread = threadIdx.x;
    double high = -INFINITY, low = INFINITY;
    for (int column = 0; column < p.columns; ++column) {
        double before = 0.0;
        for (Index i = 0; i < count; i += chunk_threads) {
            const bool there = i + thread < count;
            double* const at = there ? p.sums_of(first + i + thread, kv) + column : nullptr;
            double sum = 0.0, total = 0.0;
            Scan(memory).ExclusiveSum(there ? *at : 0.0, sum, total);
            __syncthreads();
            if (there) {
                *at = before + sum;
                if (p.published && column == 0) {
                    const double* const bounds = p.bounds_of(first + i + thread, kv);
                    high = fmax(high, before + sum + bounds[0]);
                    low = fmin(low, before + sum + bounds[1]);
                }
            }
            before += total;
        }
    }
    if (!p.published) return;
    largest[thread] = high;
    smallest[thread] = low;
    __syncthreads();
    for (int i = 0; i < chunk_threads; ++i) {
        high = fmax(high, largest[i]);
        low = fmin(low, smallest[i]);
    }
    for (Index i = thread; i < count; i += chunk_threads) {
        p.bounds_of(first + i, kv)[0] = high;
        p.bounds_of(first + i, kv)[1] = low;
    }
}

}  // namespace INTERSTATE_KERNELS

/// A level and the distance of a token's g from it, as a factor of what is stored: attention::detail::Channels.
template <class A>
struct Leveled {
    double level;
    A factor;
    /// `top`: g of the first token of the tile; `sign`: 1 of a query, -1 of a key.
    static __device__ Leveled of(double g, double top, float range, int sign) {
        const double own = g * attention::detail::log2_e, tile = rint(top * attention::detail::log2_e);
        if (!(tile - own <= static_cast<double>(range))) return {own, A(1)};
        return {tile, static_cast<A>(exp2(sign * (own - tile)))};
    }
};

/// A chunk's turns and decay, in shared memory: for every kernel that goes from tokens to channels or back.
template <class T>
struct ChunkTables {
    using A = acc_t<T>;
    double g[chunk_tokens];              // natural; published: x of eq. 11, not clamped
    Leveled<A> key[chunk_tokens];        // what B is stored with; published: exp(-x)
    Leveled<A> query[chunk_tokens];      // what C is stored with, beside its strength; published: exp(x)
    Turn<A> turn[1];                     // (tokens, pairs), behind the end

    template <class P>
    static INTERSTATE_HD std::size_t bytes(const Problem<T, P>& p) {
        return sizeof(ChunkTables) + sizeof(Turn<A>) * static_cast<std::size_t>(chunk_tokens * p.shape.pairs());
    }
    template <class P>
    __device__ void fill(const Problem<T, P>& p, const Chunk& at, Index slot, Index kv) {
        __shared__ double previous[chunk_tokens];  // g of the chunk before, where the first query's tile may begin
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, pairs = p.columns - 1;
        const double* const before = p.sums_of(slot, kv);
        for (int column = warp; column < p.columns; column += chunk_threads / 32)
            run_sums(p, at, kv, column, before[column], lane, [&](int token, double sum) {
                if (column == 0)
                    g[token] = sum;
                else
                    turn[token * pairs + column - 1] = Turn<A>(sum);
            });
        const auto missing = static_cast<int>(p.missing());
        if (missing % chunk_tokens != 0 && at.first > 0 && warp == 0) {
            Chunk earlier = at;
            earlier.first -= chunk_tokens;
            earlier.count = chunk_tokens;
            run_sums(p, earlier, kv, 0, p.sums_of(slot - 1, kv)[0], lane, [&](int token, double sum) { previous[token] = sum; });
        }
        __syncthreads();
        for (int token = threadIdx.x; token < at.count; token += chunk_threads) {
            constexpr float range = attention::detail::level_range<T>;
            const int position = at.first + token;
            if (p.published) {
                const double* const bounds = p.bounds_of(slot, kv);
                const double x = g[token] - (bounds[0] + bounds[1]) / 2.0, y = fmin(fmax(x, -p.clamp), p.clamp);
                key[token] = {0.0, static_cast<A>(exp(-y))};
                query[token] = {0.0, static_cast<A>(exp(y))};
            } else if (p.pairwise) {
                key[token] = query[token] = {g[token] * attention::detail::log2_e, A(1)};
            } else {
                key[token] = Leveled<A>::of(g[token], g[0], range, -1);
                if (position >= missing) {
                    const int top = position - (position - missing) % chunk_tokens - at.first;
                    query[token] = Leveled<A>::of(g[token], top >= 0 ? g[top] : previous[top + chunk_tokens], range, 1);
                }
            }
        }
        __syncthreads();
    }
};

inline namespace INTERSTATE_KERNELS {

/// g, R(Phi) B and R(Phi) C as they are stored, a block for each chunk and key/value head, with its group of query heads.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void make_channels_kernel(const __grid_constant__ Problem<T, P> p) {
    using A = acc_t<T>;
    extern __shared__ __align__(16) unsigned char memory[];
    auto& tables = *reinterpret_cast<ChunkTables<T>*>(memory);
    Chunk at;
    const Index kv = blockIdx.x % p.shape.kv_heads, slot = blockIdx.x / p.shape.kv_heads;
    if (!find_chunk(at, p.shape, p.in.cu_seqlens, p.chunks, slot)) return;
    tables.fill(p, at, slot, kv);
    const int pairs = p.columns - 1, stored = p.padded / 2;
    const Index missing = p.missing(), group = p.shape.group();
    for (int token = threadIdx.x; token < at.count && !p.published; token += chunk_threads) {
        const Index row = at.row0 + at.first + token;
        p.key_level(at.batch, row, kv) = tables.key[token].level;
        if (row - missing >= at.row0) p.query_level(at.batch, row - missing, kv) = tables.query[token].level;
    }
    const auto turned = [&](const View<const T, 4>& from, Index row, Index head, int token, int n, A factor, T* to) {
        A even = 0, odd = 0;
        if (n < pairs) {
            const A x = device::load_as<A>(from(at.batch, row, head, 2 * n)), y = device::load_as<A>(from(at.batch, row, head, 2 * n + 1));
            const Turn<A> turn = tables.turn[token * pairs + n];
            even = (x * turn.cos - y * turn.sin) * factor;
            odd = (x * turn.sin + y * turn.cos) * factor;
        }
        *reinterpret_cast<device::Pair<T>*>(to) = device::pack<T>(even, odd);
    };
    for (int e = threadIdx.x; e < at.count * stored; e += chunk_threads) {
        const int token = e / stored, n = e % stored;
        const Index row = at.row0 + at.first + token;
        turned(p.in.B, row, kv, token, n, tables.key[token].factor, &p.b(at.batch, row, kv, 2 * n));
    }
    for (Index h = kv * group; h < (kv + 1) * group; ++h) {
        const A strength = p.pairwise ? A(1) : p.strength[h] / p.scale;
        for (int e = threadIdx.x; e < at.count * stored; e += chunk_threads) {
            const int token = e / stored, n = e % stored;
            const Index row = at.row0 + at.first + token - missing;
            if (row < at.row0) continue;
            turned(p.in.C, row, h, token, n, tables.query[token].factor * strength, &p.c(at.batch, row, h, 2 * n));
        }
    }
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
