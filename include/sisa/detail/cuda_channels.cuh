// From tokens to the channels that attention's CUDA mainloop reads, and back from their gradients: running sums of log_alpha and
// theta, rotation, decay. Equations: docs/ops/sisa.md.
//
// A chunk is 64 tokens of one sequence and one key/value head, as attention's level_tile. Sums run in two levels: of each chunk, over
// the chunks, and inside the chunk again where they are needed, all in float64. Nothing is added in an order that could vary.
#pragma once

#include <cub/block/block_scan.cuh>

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
    if (!s.packed()) {
        const auto of_each = static_cast<unsigned>(chunks.of_each), number = static_cast<unsigned>(slot);
        at.sequence = at.batch = number / of_each;
        at.row0 = 0;
        at.length = static_cast<int>(s.keys);
        at.first = static_cast<int>(number % of_each) * chunk_tokens;
    } else {
        if (s.sequences == 0) return false;
        at.sequence = device::recurrence_of(cu, chunks.sequences, s.keys, slot, chunk_tokens);
        const RowRange rows = device::checked_rows(cu, at.sequence, s.keys);
        at.batch = 0;
        at.row0 = rows.begin;
        at.length = static_cast<int>(rows.end - rows.begin);
        at.first = static_cast<int>(slot - device::first_tile(cu, at.sequence, s.keys, chunk_tokens)) * chunk_tokens;
    }
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
};

/// f(token, n) for n below width, each of them always by the same thread, in the order of memory.
template <class F>
__device__ void each_pair(int tokens, int width, F&& f) {
    if (width <= 0) return;
    const unsigned side = min(width, chunk_threads);
    const bool shifts = (side & (side - 1)) == 0;  // division is slow
    const unsigned by = __ffs(static_cast<int>(side)) - 1, row = shifts ? threadIdx.x >> by : threadIdx.x / side;
    const int rows = shifts ? chunk_threads >> by : chunk_threads / side, first = static_cast<int>(row);
    if (first >= rows) return;
    for (int n = static_cast<int>(threadIdx.x - row * side); n < width; n += chunk_threads)
        for (int token = first; token < tokens; token += rows) f(token, n);
}
/// Rows of one head from a chunk's first token on.
template <class T>
struct HeadRows {
    T* data;
    Index stride, column;
    __device__ HeadRows(const View<T, 4>& x, Index batch, Index row, Index head)
        : data(x ? x.data + batch * x.stride[0] + row * x.stride[1] + head * x.stride[2] : nullptr), stride(x.stride[1]), column(x.stride[3]) {}
    __device__ T* operator()(int token, int c) const { return data + token * stride + c * column; }
    __device__ explicit operator bool() const { return data; }
};
/// Asks for `columns` of them, of tokens from `first` on.
template <class T>
__device__ void ask_for(const HeadRows<T>& x, int first, int tokens, int columns) {
    constexpr int line = 128 / static_cast<int>(sizeof(T));
    for (int token = first + static_cast<int>(threadIdx.x); token < tokens; token += chunk_threads)
        for (int c = 0; c < columns; c += line) device::prefetch(x(token, c));
}
/// The distance of tokens in a table of pairs, which keeps columns in different banks.
INTERSTATE_HD constexpr int table_stride(int pairs) { return pairs | 1; }

/// What the tokens of a chunk add to the sums: of g, and of the angle of every pair, in shared memory.
template <class T, class P>
struct Steps {
    double* log_alpha;  // (tokens)
    P* theta;           // (tokens, pairs)
    int stride;

    static INTERSTATE_HD std::size_t bytes(const Problem<T, P>& p) {
        return sizeof(double) * chunk_tokens + (sizeof(P) * static_cast<std::size_t>(chunk_tokens * table_stride(p.columns - 1)) + 15) / 16 * 16;
    }
    __device__ Steps(void* memory, const Problem<T, P>& p)
        : log_alpha(static_cast<double*>(memory)), theta(reinterpret_cast<P*>(log_alpha + chunk_tokens)), stride(table_stride(p.columns - 1)) {}
    /// Ends with a barrier.
    __device__ void load(const Problem<T, P>& p, const Chunk& at, Index kv, bool with_theta = true) {
        __syncthreads();
        const Index row = at.row0 + at.first;
        for (int token = threadIdx.x; token < chunk_tokens; token += chunk_threads) {
            const double x = token < at.count ? static_cast<double>(p.in.log_alpha(at.batch, row + token, kv)) : 0.0;
            log_alpha[token] = !p.published && x <= hard_reset ? hard_reset : x;
        }
        if (with_theta) {
            const HeadRows<const P> from(p.in.theta, at.batch, row, kv);
            each_pair(chunk_tokens, p.columns - 1, [&](int token, int n) { theta[token * stride + n] = token < at.count ? *from(token, n) : P(0); });
        }
        __syncthreads();
    }
    __device__ double operator()(int token, int column) const {
        return column == 0 ? log_alpha[token] : static_cast<double>(theta[token * stride + column - 1]);
    }
    /// Running sums of all columns below `columns`, by the block: to(column, token, sum, total). A lane has 8 tokens of a column, a warp
    /// 4 columns.
    template <class F>
    __device__ void run(int columns, F&& to) const {
        static_assert(chunk_tokens == 64);
        const int lane = threadIdx.x % 32, segment = lane / 4;
        for (int i = static_cast<int>(threadIdx.x) / 32 * 4 + lane % 4; i - lane % 4 < columns; i += chunk_threads / 8) {
            const int column = i + 1 < columns ? i + 1 : 0;  // the angles first, which are most of the work
            double sums[8], sum = 0.0;
            if (i < columns)
#pragma unroll
                for (int k = 0; k < 8; ++k) sums[k] = sum += (*this)(8 * segment + k, column);
            double reached = sum;
#pragma unroll
            for (int step = 1; step < 8; step *= 2) {
                const double further = __shfl_up_sync(0xffffffffu, reached, 4 * step);
                if (segment >= step) reached += further;
            }
            const double before = __shfl_up_sync(0xffffffffu, reached, 4), total = __shfl_sync(0xffffffffu, reached, 28 + lane % 4);
            if (i < columns)
#pragma unroll
                for (int k = 0; k < 8; ++k) to(column, 8 * segment + k, segment > 0 ? before + sums[k] : sums[k], total);
        }
    }
};

/// The angle Phi as a turn, cos and sin.
template <class A>
struct Turn {
    A cos, sin;
    Turn() = default;
    __device__ Turn(A cos_, A sin_) : cos(cos_), sin(sin_) {}
    __device__ explicit Turn(double angle) {
        if constexpr (sizeof(A) == 8) {
            sincos(angle, &sin, &cos);
        } else {
            // Halves of a turn, whole turns less, in float64, so that float has what is below 1.
            const double halves = angle * 0.3183098861837907;
            sincospif(static_cast<float>(halves - 2.0 * rint(halves / 2.0)), &sin, &cos);
        }
    }
};

inline namespace INTERSTATE_KERNELS {

/// Sums of every chunk, a block each; in published mode also how far g goes up and down inside it.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void chunk_sums_kernel(const __grid_constant__ Problem<T, P> p) {
    extern __shared__ __align__(16) unsigned char memory[];
    Chunk at;
    const auto heads = static_cast<unsigned>(p.shape.kv_heads);
    const Index kv = blockIdx.x % heads, slot = blockIdx.x / heads;
    if (blockIdx.x == 0)
        for (Index h = threadIdx.x; h < p.shape.query_heads; h += chunk_threads) p.strength[h] = static_cast<acc_t<T>>(p.in.lam(h));
    if (!find_chunk(at, p.shape, p.in.cu_seqlens, p.chunks, slot)) return;
    Steps<T, P> steps(memory, p);
    steps.load(p, at, kv);
    double largest = -INFINITY, smallest = INFINITY;
    steps.run(p.columns, [&](int column, int token, double sum, double total) {
        if (token == 0) p.sums_of(slot, kv)[column] = total;
        if (column == 0 && token < at.count) {
            largest = fmax(largest, sum);
            smallest = fmin(smallest, sum);
        }
    });
    // The warp that has column 0, see run().
    if (!p.published || static_cast<int>(threadIdx.x) / 32 != (p.columns - 1) / 4 % (chunk_threads / 32)) return;
    for (int step = 16; step > 0; step /= 2) {
        largest = fmax(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        smallest = fmin(smallest, __shfl_xor_sync(0xffffffffu, smallest, step));
    }
    if (threadIdx.x % 32 == 0) {
        p.bounds_of(slot, kv)[0] = largest;
        p.bounds_of(slot, kv)[1] = smallest;
    }
}

/// From sums of chunks to sums of all chunks before, in place, a block for each sequence and head, and column. Published: the offset c (eq. 11).
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void chunk_offsets_kernel(const __grid_constant__ Problem<T, P> p) {
    using Scan = cub::BlockScan<double, chunk_threads>;
    __shared__ typename Scan::TempStorage memory;
    __shared__ double largest[chunk_threads], smallest[chunk_threads];
    const auto heads = static_cast<unsigned>(p.shape.kv_heads);
    const Index kv = blockIdx.x % heads, sequence = blockIdx.x / heads;
    const auto column = static_cast<int>(blockIdx.y);
    const RowRange rows = device::checked_rows(p.in.cu_seqlens, sequence, p.shape.keys);
    const Index first = device::first_tile(p.in.cu_seqlens, sequence, p.shape.keys, chunk_tokens), count = ceil_div(rows.end - rows.begin, chunk_tokens);
    const int thread = threadIdx.x;
    const bool bounded = p.published && column == 0;
    double high = -INFINITY, low = INFINITY, before = 0.0;
    for (Index i = 0; i < count; i += chunk_threads) {
        const bool there = i + thread < count;
        double* const at = there ? p.sums_of(first + i + thread, kv) + column : nullptr;
        double sum = 0.0, total = 0.0;
        Scan(memory).ExclusiveSum(there ? *at : 0.0, sum, total);
        __syncthreads();
        if (there) {
            *at = before + sum;
            if (bounded) {
                const double* const bounds = p.bounds_of(first + i + thread, kv);
                high = fmax(high, before + sum + bounds[0]);
                low = fmin(low, before + sum + bounds[1]);
            }
        }
        before += total;
    }
    if (!bounded) return;
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
        const double exponent = sign * (own - tile);
        if constexpr (sizeof(A) == 8) {
            return {tile, exp2(exponent)};
        } else {
            const double whole = rint(exponent);
            return {tile, ldexpf(exp2f(static_cast<float>(exponent - whole)), static_cast<int>(whole))};
        }
    }
};

/// A chunk's turns and decay, in shared memory: for every kernel that goes from tokens to channels or back.
template <class T>
struct ChunkTables {
    using A = acc_t<T>;
    double g[chunk_tokens];              // natural; published: x of eq. 11, not clamped
    Leveled<A> key[chunk_tokens];        // what B is stored with; published: exp(-x)
    Leveled<A> query[chunk_tokens];      // what C is stored with, beside its strength; published: exp(x)
    Turn<A>* turn;                       // (tokens, pairs)
    int stride;                          // of turn, between tokens

    template <class P>
    static INTERSTATE_HD std::size_t bytes(const Problem<T, P>& p) {
        return (sizeof(ChunkTables) + 15) / 16 * 16 + Steps<T, P>::bytes(p) +
               (sizeof(Turn<A>) * static_cast<std::size_t>(chunk_tokens * table_stride(p.columns - 1)) + 15) / 16 * 16;
    }
    /// In `memory`, of bytes(p).
    template <class P>
    static __device__ ChunkTables& make(unsigned char* memory, const Problem<T, P>& p, const Chunk& at, Index slot, Index kv) {
        auto& tables = *reinterpret_cast<ChunkTables*>(memory);
        unsigned char* const behind = memory + (sizeof(ChunkTables) + 15) / 16 * 16;
        if (threadIdx.x == 0) {
            tables.turn = reinterpret_cast<Turn<A>*>(behind + Steps<T, P>::bytes(p));
            tables.stride = table_stride(p.columns - 1);
        }
        Steps<T, P> steps(behind, p);
        tables.fill(p, at, slot, kv, steps);
        return tables;
    }

  private:
    template <class P>
    __device__ void fill(const Problem<T, P>& p, const Chunk& at, Index slot, Index kv, Steps<T, P>& steps) {
        __shared__ double previous[chunk_tokens];  // g of the chunk before, where the first query's tile may begin
        const auto missing = static_cast<int>(p.missing());
        if (missing % chunk_tokens != 0 && at.first > 0) {
            Chunk earlier = at;
            earlier.first -= chunk_tokens;
            earlier.count = chunk_tokens;
            steps.load(p, earlier, kv, false);
            steps.run(1, [&](int, int token, double sum, double) { previous[token] = p.sums_of(slot - 1, kv)[0] + sum; });
        }
        steps.load(p, at, kv);
        const double* const before = p.sums_of(slot, kv);
        steps.run(p.columns, [&](int column, int token, double sum, double) {
            if (column == 0)
                g[token] = before[0] + sum;
            else
                turn[token * stride + column - 1] = Turn<A>(before[column] + sum);
        });
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
    Chunk at;
    const auto heads = static_cast<unsigned>(p.shape.kv_heads);
    const Index kv = blockIdx.x % heads, slot = blockIdx.x / heads;
    if (!find_chunk(at, p.shape, p.in.cu_seqlens, p.chunks, slot)) return;
    const int pairs = p.columns - 1, stored = p.padded / 2, group = static_cast<int>(p.shape.group());
    // The chunk's first token among queries, and how many of its tokens are before the first of them.
    const Index missing = p.missing(), row = at.row0 + at.first, query_row = row - missing;
    const int before = static_cast<int>(max(missing - at.first, Index{0}));
    const HeadRows<const T> B(p.in.B, at.batch, row, kv);
    ask_for(B, 0, at.count, 2 * pairs);
    for (int h = 0; h < group; ++h) ask_for(HeadRows<const T>(p.in.C, at.batch, query_row, kv * group + h), before, at.count, 2 * pairs);
    const auto& tables = ChunkTables<T>::make(memory, p, at, slot, kv);
    for (int token = threadIdx.x; token < at.count && !p.published; token += chunk_threads) {
        p.key_level(at.batch, row + token, kv) = tables.key[token].level;
        if (token >= before) p.query_level(at.batch, query_row + token, kv) = tables.query[token].level;
    }
    // Four pairs at once.
    const auto turned = [&](const HeadRows<const T>& from, const HeadRows<T>& to, int token, int n, A factor) {
        A x[8], y[8];
        device::load_row(from(token, 2 * n), from.column, 2 * (pairs - n), x);
        const Turn<A>* const turn = tables.turn + token * tables.stride + n;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const Turn<A> by = n + k < pairs ? turn[k] : Turn<A>{A(0), A(0)};
            y[2 * k] = (x[2 * k] * by.cos - x[2 * k + 1] * by.sin) * factor;
            y[2 * k + 1] = (x[2 * k] * by.sin + x[2 * k + 1] * by.cos) * factor;
        }
        device::store_row(to(token, 2 * n), 1, 2 * (stored - n), y);
    };
    const int fours = (stored + 3) / 4;
    const HeadRows<T> b(p.b, at.batch, row, kv);
    each_pair(at.count, fours, [&](int token, int n) { turned(B, b, token, 4 * n, tables.key[token].factor); });
    for (Index h = kv * group; h < (kv + 1) * group; ++h) {
        const A strength = p.pairwise ? A(1) : p.strength[h] / p.scale;
        const HeadRows<const T> C(p.in.C, at.batch, query_row, h);
        const HeadRows<T> c(p.c, at.batch, query_row, h);
        each_pair(at.count, fours, [&](int token, int n) {
            if (token >= before) turned(C, c, token, 4 * n, tables.query[token].factor * strength);
        });
    }
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
