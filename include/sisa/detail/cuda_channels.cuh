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

inline constexpr int chunk_tokens = attention::detail::level_tile, chunk_threads = 32, scan_threads = 128;

/// Chunks of all sequences of a call, numbered so that those of a sequence follow each other; packed, some numbers stay unused.
struct Chunks {
    Index sequences, of_each, count;
    explicit Chunks(const Shape& s)
        : sequences(s.packed() ? s.sequences : s.batch), of_each(ceil_div(s.keys, chunk_tokens)),
          count(s.packed() ? s.keys / chunk_tokens + s.sequences : s.batch * of_each) {}
};

/// A sum of float64 with what rounding took from it, so that a running sum that has become large, as behind hard resets, still tells
/// neighbours apart to float64's last bit.
struct Precise {
    double value, rest;
    Precise() = default;
    __device__ Precise(double x) : value(x), rest(0.0) {}
    __device__ explicit operator double() const { return value; }
    friend __device__ Precise operator+(const Precise& a, const Precise& b) {
        const Precise sum = exact_sum(a.value, b.value);
        return exact_sum(sum.value, sum.rest + (a.rest + b.rest));
    }
    friend __device__ double operator-(const Precise& a, const Precise& b) { return (a.value - b.value) + (a.rest - b.rest); }
    friend __device__ bool operator<(const Precise& a, const Precise& b) { return a.value < b.value || (a.value == b.value && a.rest < b.rest); }

private:
    static __device__ Precise exact_sum(double a, double b) {
        Precise sum(a + b);
        const double from_b = sum.value - a;
        sum.rest = (a - (sum.value - from_b)) + (b - from_b);
        return sum;
    }
};
/// What sums of log_alpha have: float32 and 16 bits need no more than float64.
template <class T>
using decay_sum_t = std::conditional_t<std::is_same_v<T, f64>, Precise, double>;

__device__ inline double shuffle_up(double x, int by) { return __shfl_up_sync(0xffffffffu, x, by); }
__device__ inline Precise shuffle_up(Precise x, int by) {
    x.value = shuffle_up(x.value, by);
    x.rest = shuffle_up(x.rest, by);
    return x;
}
__device__ inline double shuffle_down(double x, int by) { return __shfl_down_sync(0xffffffffu, x, by); }
__device__ inline Precise shuffle_down(Precise x, int by) {
    x.value = shuffle_down(x.value, by);
    x.rest = shuffle_down(x.rest, by);
    return x;
}

/// What every kernel here reads.
template <class T, class P>
struct Problem {
    Shape shape;
    Chunks chunks;
    Inputs<T, P> in;
    using Sum = decay_sum_t<T>;
    int pairs;
    int padded;           // channels as stored, zeros behind the last
    bool published, pairwise;  // pairwise: channels are stored without decay, the level of a key is its g, and there is none of a query
    bool wide;            // four pairs of B and C are 16 bytes at once, or 32
    double clamp;
    acc_t<T> scale;       // of attention's products
    Sum* decays;          // (chunks, Hkv), of log_alpha: of each chunk, then of all before it
    double* angles;       // (chunks, Hkv, pairs), of theta, likewise
    Sum* bounds;          // (chunks, Hkv, 2), published: largest and smallest g of a chunk, then of its sequence
    View<double, 3> query_level;  // (B, Lq, Hkv), in powers of two
    View<Sum, 3> key_level;       // (B, Lk, Hkv), in powers of two; pairwise: natural
    View<T, 4> c, b;      // channels as stored
    acc_t<T>* strength;   // (Hq), lambda
    __device__ Sum& decay_of(Index chunk, Index kv) const { return decays[chunk * shape.kv_heads + kv]; }
    __device__ double* angles_of(Index chunk, Index kv) const { return angles + (chunk * shape.kv_heads + kv) * pairs; }
    __device__ Sum* bounds_of(Index chunk, Index kv) const { return bounds + (chunk * shape.kv_heads + kv) * 2; }
    /// x of eq. 11, before the clamp.
    __device__ double published_exponent(Index slot, Index kv, const Sum& g) const {
        const Sum* const of = bounds_of(slot, kv);
        return static_cast<double>(g) - (static_cast<double>(of[0]) + static_cast<double>(of[1])) / 2.0;
    }
    /// Whether g is the largest of its sequence, or the smallest.
    __device__ bool is_bound(Index slot, Index kv, const Sum& g, int which) const { return static_cast<double>(g) == static_cast<double>(bounds_of(slot, kv)[which]); }
    /// Keys before the first query: the last query stands at the last key.
    __device__ Index missing() const { return shape.packed() ? 0 : shape.keys - shape.queries; }
};

/// A chunk as a block finds it: that of its number unless told another.
struct Chunk {
    Index slot, kv;               // its number, and the key/value head
    Index sequence, batch, row0;  // row0: where the sequence begins in the tensors of keys
    int first, count, length;     // position of the first token, tokens here, tokens of the sequence
};
template <class T, class P>
__device__ bool find_chunk(Chunk& at, const Problem<T, P>& p, Index slot, Index kv) {
    const Shape& s = p.shape;
    const auto& cu = p.in.cu_seqlens;
    at.slot = slot;
    at.kv = kv;
    if (!s.packed()) {
        const auto of_each = static_cast<unsigned>(p.chunks.of_each), number = static_cast<unsigned>(slot);
        at.sequence = at.batch = number / of_each;
        at.row0 = 0;
        at.length = static_cast<int>(s.keys);
        at.first = static_cast<int>(number % of_each) * chunk_tokens;
    } else {
        if (s.sequences == 0) return false;
        at.sequence = device::recurrence_of(cu, p.chunks.sequences, s.keys, slot, chunk_tokens);
        const RowRange rows = device::checked_rows(cu, at.sequence, s.keys);
        at.batch = 0;
        at.row0 = rows.begin;
        at.length = static_cast<int>(rows.end - rows.begin);
        at.first = static_cast<int>(slot - device::first_tile(cu, at.sequence, s.keys, chunk_tokens)) * chunk_tokens;
    }
    at.count = min(chunk_tokens, at.length - at.first);
    return at.first >= 0 && at.count > 0;
}
template <class T, class P>
__device__ bool find_chunk(Chunk& at, const Problem<T, P>& p) {
    const auto heads = static_cast<unsigned>(p.shape.kv_heads);
    return find_chunk(at, p, blockIdx.x / heads, blockIdx.x % heads);
}

/// f(token, n) for tokens from `begin` to `end` and n below width, each of them always by the same lane, in the order of memory. What a lane
/// does for `together` tokens follows each other without branches.
template <int together, class F>
__device__ void each_pair(int begin, int end, int width, F&& f) {
    if (width <= 0) return;
    const unsigned side = min(width, chunk_threads);
    const bool shifts = (side & (side - 1)) == 0;  // division is slow
    const unsigned by = __ffs(static_cast<int>(side)) - 1, row = shifts ? threadIdx.x >> by : threadIdx.x / side;
    const int rows = shifts ? chunk_threads >> by : chunk_threads / side;
    int first = static_cast<int>(row);
    if (first >= rows) return;
    if (first < begin) first += (begin - first + rows - 1) / rows * rows;
    for (int n = static_cast<int>(threadIdx.x - row * side); n < width; n += chunk_threads) {
        int token = first;
        if constexpr (together > 1)
            for (; token + (together - 1) * rows < end; token += together * rows)
#pragma unroll
                for (int i = 0; i < together; ++i) f(token + i * rows, n);
#pragma unroll 1
        for (; token < end; token += rows) f(token, n);
    }
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
/// A table of (tokens, pairs) in shared memory: its size and where an entry is. Lanes with the same column of eight tokens each,
/// and lanes with the same token of columns that follow each other, meet few banks.
INTERSTATE_HD constexpr int table_size(int pairs) { return chunk_tokens * (pairs | 1) + chunk_tokens / 2; }
__device__ constexpr int table_at(int pairs, int token, int pair) { return token * (pairs | 1) + token / 8 * 4 + pair; }

/// The sum over a warp, in one order; every lane gets it.
__device__ inline double sum_of_warp(double x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
}
/// The sum of a lane's x and those of all lanes before it that are a multiple of `apart`, a power of two, away.
template <class Sum>
__device__ Sum running_sum(Sum x, int lane, int apart) {
    for (int step = apart; step < 32; step *= 2) {
        const Sum further = shuffle_up(x, step);
        if (lane >= step) x = x + further;
    }
    return x;
}

/// What tokens 2 lane and 2 lane + 1 of a chunk have as sums of log_alpha from its first token on, and what the chunk has.
template <class Sum>
struct DecaySums {
    Sum earlier, later, total;
    template <class T, class P>
    __device__ DecaySums(const Problem<T, P>& p, const Chunk& at, Index kv) {
        const int lane = threadIdx.x;
        const auto own = [&](int token) {
            const double x = token < at.count ? static_cast<double>(p.in.log_alpha(at.batch, at.row0 + at.first + token, kv)) : 0.0;
            return !p.published && x <= hard_reset ? hard_reset : x;
        };
        const Sum a = own(2 * lane), both = a + Sum(own(2 * lane + 1)), reached = running_sum(both, lane, 1), before = shuffle_up(reached, 1);
        total = reached;  // of the last lane
        earlier = lane > 0 ? before + a : a;
        later = lane > 0 ? before + both : both;
    }
};

/// Sums of theta from a chunk's first token on: to(n, token, sum, total) of `count` pairs from `first` on. A lane has 8 tokens of a pair, the
/// warp 4 pairs.
template <class T, class P, class F>
__device__ void sum_angles(const Problem<T, P>& p, const Chunk& at, Index kv, int first, int count, F&& to) {
    static_assert(chunk_tokens == 64 && chunk_threads == 32);
    const int lane = threadIdx.x, token = lane / 4 * 8;
    const HeadRows<const P> from(p.in.theta, at.batch, at.row0 + at.first, kv);
    for (int n = lane % 4; n - lane % 4 < count; n += 4) {
        double sums[8], sum = 0.0;
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[k] = sum += n < count && token + k < at.count ? static_cast<double>(*from(token + k, first + n)) : 0.0;
        const double reached = running_sum(sum, lane, 4), before = __shfl_up_sync(0xffffffffu, reached, 4);
        const double total = __shfl_sync(0xffffffffu, reached, 28 + lane % 4);
        if (n < count)
#pragma unroll
            for (int k = 0; k < 8; ++k) to(n, token + k, token > 0 ? before + sums[k] : sums[k], total);
    }
}

/// The angle Phi as a turn, cos and sin.
template <class A>
struct Turn {
    A cos, sin;
    Turn() = default;
    __device__ Turn(A cos_, A sin_) : cos(cos_), sin(sin_) {}
    __device__ explicit Turn(double angle) {
        if constexpr (sizeof(A) == 8)
            sincos(angle, &sin, &cos);
        else
            sincospif(halves_of(angle), &sin, &cos);
    }
    /// Halves of a turn, whole turns less, in float64, so that float has what is below 1.
    static __device__ float halves_of(double angle) {
        const double halves = angle * 0.3183098861837907;
        return static_cast<float>(halves - 2.0 * rint(halves / 2.0));
    }
};
/// To what T can tell apart: of 16 bits, to 2^-21.
template <class T>
__device__ Turn<acc_t<T>> turn_for(double angle) {
    if constexpr (sizeof(T) == 2) {
        Turn<float> turn;
        __sincosf(3.14159265f * Turn<float>::halves_of(angle), &turn.sin, &turn.cos);
        return turn;
    } else {
        return Turn<acc_t<T>>(angle);
    }
}

inline namespace INTERSTATE_KERNELS {

/// Sums of every chunk and key/value head, a warp each; in published mode also how far g goes up and down inside it.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void chunk_sums_kernel(const __grid_constant__ Problem<T, P> p) {
    Chunk at;
    const int lane = threadIdx.x;
    if (blockIdx.x == 0)
        for (Index h = lane; h < p.shape.query_heads; h += chunk_threads) p.strength[h] = static_cast<acc_t<T>>(p.in.lam(h));
    if (!find_chunk(at, p)) return;
    const Index kv = at.kv, slot = at.slot;
    using Sum = decay_sum_t<T>;
    double* const angles = p.angles_of(slot, kv);
    const DecaySums<Sum> decay(p, at, kv);
    if (lane == chunk_threads - 1) p.decay_of(slot, kv) = decay.total;
    sum_angles(p, at, kv, 0, p.pairs, [&](int n, int token, double, double total) {
        if (token == 0) angles[n] = total;
    });
    if (!p.published) return;
    const bool has_two = 2 * lane + 1 < at.count;
    Sum largest = 2 * lane < at.count ? decay.earlier : Sum(-INFINITY), smallest = 2 * lane < at.count ? decay.earlier : Sum(INFINITY);
    if (has_two && largest < decay.later) largest = decay.later;
    if (has_two && decay.later < smallest) smallest = decay.later;
    for (int step = 16; step > 0; step /= 2) {
        const Sum high = shuffle_down(largest, step), low = shuffle_down(smallest, step);
        if (largest < high) largest = high;
        if (low < smallest) smallest = low;
    }
    if (lane == 0) {
        p.bounds_of(slot, kv)[0] = largest;
        p.bounds_of(slot, kv)[1] = smallest;
    }
}

/// From a sum of each of `count` chunks, at(i), to that of all before it, in place: what(i, sum). A block's.
template <class Sum, class At, class F>
__device__ void add_before(Index count, At&& at, F&& what) {
    using Scan = cub::BlockScan<Sum, scan_threads>;
    __shared__ typename Scan::TempStorage memory;
    Sum before(0.0);
    for (Index i = threadIdx.x; i - threadIdx.x < count; i += scan_threads) {
        Sum sum(0.0), total(0.0);
        Scan(memory).ExclusiveScan(i < count ? at(i) : Sum(0.0), sum, Sum(0.0), [](const Sum& a, const Sum& b) { return a + b; }, total);
        __syncthreads();
        if (i < count) what(i, at(i) = before + sum);
        before = before + total;
    }
}

/// From sums of chunks to sums of all chunks before, in place, a block for each sequence and head, and column: decay, then angles. Published:
/// the largest and smallest g of all.
template <class T, class P>
__global__ __launch_bounds__(scan_threads) void chunk_offsets_kernel(const __grid_constant__ Problem<T, P> p) {
    using Sum = decay_sum_t<T>;
    const auto heads = static_cast<unsigned>(p.shape.kv_heads);
    const Index kv = blockIdx.x % heads, sequence = blockIdx.x / heads;
    const auto column = static_cast<int>(blockIdx.y) - 1;
    const RowRange rows = device::checked_rows(p.in.cu_seqlens, sequence, p.shape.keys);
    const Index first = device::first_tile(p.in.cu_seqlens, sequence, p.shape.keys, chunk_tokens), count = ceil_div(rows.end - rows.begin, chunk_tokens);
    if (column >= 0) {
        add_before<double>(count, [&](Index i) -> double& { return p.angles_of(first + i, kv)[column]; }, [](Index, double) {});
        return;
    }
    __shared__ Sum largest[scan_threads], smallest[scan_threads];
    const int thread = threadIdx.x;
    Sum high(-INFINITY), low(INFINITY);
    const auto reach = [&](const Sum& top, const Sum& bottom) {
        if (high < top) high = top;
        if (bottom < low) low = bottom;
    };
    add_before<Sum>(count, [&](Index i) -> Sum& { return p.decay_of(first + i, kv); }, [&](Index i, const Sum& before) {
        if (p.published) reach(before + p.bounds_of(first + i, kv)[0], before + p.bounds_of(first + i, kv)[1]);
    });
    if (!p.published) return;
    largest[thread] = high;
    smallest[thread] = low;
    __syncthreads();
    for (int i = 0; i < scan_threads; ++i) reach(largest[i], smallest[i]);
    for (Index i = thread; i < count; i += scan_threads) {
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

/// Pairs of channels that have their turns in shared memory at once.
inline constexpr int pairs_at_once = 32;

/// A chunk's decay and turns, in shared memory: for every kernel that goes from tokens to channels or back.
template <class T>
struct ChunkTables {
    using A = acc_t<T>;
    using Sum = decay_sum_t<T>;
    Sum g[chunk_tokens];     // natural; published: x of eq. 11, not clamped
    A key[chunk_tokens];     // what B is stored with; published: exp(-x)
    A query[chunk_tokens];   // what C is stored with, beside its strength; published: exp(x)

    /// Of this and the turns behind it.
    static INTERSTATE_HD std::size_t bytes(int pairs) {
        static_assert(sizeof(ChunkTables) % 16 == 0);
        return sizeof(ChunkTables) + sizeof(Turn<A>) * static_cast<std::size_t>(table_size(pairs));
    }
    /// table_at(..), of the pairs that make_turns() made.
    __device__ Turn<A>* turns() { return reinterpret_cast<Turn<A>*>(this + 1); }

    /// g of a chunk's tokens, two a lane.
    template <class P>
    static __device__ void write_sums(Sum* to, const Problem<T, P>& p, const Chunk& at, Index slot, Index kv) {
        const DecaySums<Sum> sums(p, at, kv);
        const Sum before = p.decay_of(slot, kv);
        to[2 * threadIdx.x] = before + sums.earlier;
        to[2 * threadIdx.x + 1] = before + sums.later;
    }

    /// level(token, of its query, of its key), where there are levels.
    template <class P, class F>
    __device__ void make_decay(const Problem<T, P>& p, const Chunk& at, Index slot, Index kv, F&& level) {
        Sum* const previous = reinterpret_cast<Sum*>(turns());  // g of the chunk before, where the first query's tile may begin
        const int missing = static_cast<int>(p.missing()), lane = threadIdx.x;
        if (missing % chunk_tokens != 0 && at.first > 0) {
            Chunk earlier = at;
            earlier.first -= chunk_tokens;
            earlier.count = chunk_tokens;
            write_sums(previous, p, earlier, slot - 1, kv);
        }
        write_sums(g, p, at, slot, kv);
        __syncwarp();
        for (int token = lane; token < at.count; token += chunk_threads) {
            constexpr float range = attention::detail::level_range<T>;
            const int position = at.first + token;
            if (p.published) {
                const double x = p.published_exponent(slot, kv, g[token]), y = fmin(fmax(x, -p.clamp), p.clamp);
                key[token] = static_cast<A>(exp(-y));
                query[token] = static_cast<A>(exp(y));
                continue;
            }
            key[token] = query[token] = A(1);
            double of_query = 0.0;
            Sum of_key = g[token];
            if constexpr (std::is_same_v<Sum, double>) {  // pairwise otherwise
                if (!p.pairwise) {
                    const auto leveled = Leveled<A>::of(g[token], g[0], range, -1);
                    key[token] = leveled.factor;
                    of_key = leveled.level;
                }
                if (!p.pairwise && position >= missing) {
                    const int top = position - (position - missing) % chunk_tokens - at.first;
                    const auto leveled = Leveled<A>::of(g[token], top >= 0 ? g[top] : previous[top + chunk_tokens], range, 1);
                    query[token] = leveled.factor;
                    of_query = leveled.level;
                }
            }
            level(token, of_query, of_key);
        }
        __syncwarp();
    }

    /// Of `count` pairs from `first` on.
    template <class P>
    __device__ void make_turns(const Problem<T, P>& p, const Chunk& at, Index slot, Index kv, int first, int count) {
        const double* const before = p.angles_of(slot, kv) + first;
        __syncwarp();
        sum_angles(p, at, kv, first, count, [&](int n, int token, double sum, double) {
            turns()[table_at(count, token, n)] = turn_for<T>(before[n] + sum);
        });
        __syncwarp();
    }
};

inline namespace INTERSTATE_KERNELS {

/// g, R(Phi) B and R(Phi) C as they are stored, a warp for each chunk and key/value head, with its group of query heads.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads, 28) void make_channels_kernel(const __grid_constant__ Problem<T, P> p) {
    using A = acc_t<T>;
    extern __shared__ __align__(16) unsigned char memory[];
    Chunk at;
    if (!find_chunk(at, p)) return;
    const Index kv = at.kv, slot = at.slot;
    const int pairs = p.pairs, stored = p.padded / 2, group = static_cast<int>(p.shape.group());
    // The chunk's first token among queries, and how many of its tokens are before the first of them.
    const Index missing = p.missing(), row = at.row0 + at.first, query_row = row - missing;
    const int before = static_cast<int>(max(missing - at.first, Index{0}));
    const HeadRows<const T> B(p.in.B, at.batch, row, kv);
    const HeadRows<T> b(p.b, at.batch, row, kv);
    auto& tables = *reinterpret_cast<ChunkTables<T>*>(memory);
    tables.make_decay(p, at, slot, kv, [&](int token, double of_query, const decay_sum_t<T>& of_key) {
        p.key_level(at.batch, row + token, kv) = of_key;
        if (!p.pairwise && token >= before) p.query_level(at.batch, query_row + token, kv) = of_query;
    });
    const auto rotate = [&](auto is_wide) {
        constexpr bool wide = decltype(is_wide)::value;
        constexpr int together = wide ? 4 : 1;
        for (int first = 0; first < stored; first += pairs_at_once) {
            const int columns = min(pairs_at_once, stored - first), there = min(columns, pairs - first);  // stored, and given
            tables.make_turns(p, at, slot, kv, first, there);
            // Four pairs at once.
            const auto turned = [&](const HeadRows<const T>& from, const HeadRows<T>& to, int token, int n, A factor) {
                A x[8], y[8];
                device::load_row<wide, true>(from(token, 2 * (first + n)), from.column, 2 * (there - n), x);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const Turn<A> by = wide || n + k < there ? tables.turns()[table_at(there, token, n + k)] : Turn<A>{A(0), A(0)};
                    y[2 * k] = (x[2 * k] * by.cos - x[2 * k + 1] * by.sin) * factor;
                    y[2 * k + 1] = (x[2 * k] * by.sin + x[2 * k + 1] * by.cos) * factor;
                }
                device::store_row<wide>(to(token, 2 * (first + n)), 1, 2 * (columns - n), y);
            };
            const int fours = (columns + 3) / 4;
            each_pair<together>(0, at.count, fours, [&](int token, int n) { turned(B, b, token, 4 * n, tables.key[token]); });
            for (Index h = kv * group; h < (kv + 1) * group; ++h) {
                const A strength = p.pairwise ? A(1) : p.strength[h] / p.scale;
                const HeadRows<const T> C(p.in.C, at.batch, query_row, h);
                const HeadRows<T> c(p.c, at.batch, query_row, h);
                each_pair<together>(before, at.count, fours, [&](int token, int n) { turned(C, c, token, 4 * n, tables.query[token] * strength); });
            }
        }
    };
    if (p.wide)
        rotate(std::true_type{});
    else
        rotate(std::false_type{});
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
