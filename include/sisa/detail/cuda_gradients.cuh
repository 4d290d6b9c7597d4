// From gradients of stored channels to those of C, B, lambda, theta and log_alpha (docs/ops/sisa.md, eq. 17 to 25): back through
// decay and rotation chunk by chunk, then reverse sums in two levels, in float64.
#pragma once

#include <cub/warp/warp_scan.cuh>

#include <sisa/detail/cuda_channels.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {
namespace detail {

/// A reverse sum that a hard reset cuts: what a chunk hands to the one before it.
struct Carry {
    double sum;
    int open;  // no reset in between
    friend __device__ Carry operator+(const Carry& behind, const Carry& here) {
        return {here.sum + (here.open ? behind.sum : 0.0), behind.open & here.open};
    }
};

template <class T, class P>
struct GradientProblem {
    using A = acc_t<T>;
    Problem<T, P> p;
    View<const A, 4> dc, db;  // of the channels as stored; dc over scale, or over lambda if pairwise
    Grads<T, P> grads;
    View<double, 3> dg;       // (B, Lk, Hkv); in the memory of key_level, which is not read any more
    double* turns;            // (chunks, Hkv, pairs): of each chunk, then of all behind it
    Carry* carries;           // (chunks, Hkv): likewise, of dg
    double* published;        // (chunks, Hkv, 3): sum of dy, how often g is the largest and the smallest; then the two shares
    double* strength;         // (chunks, Hq): of lambda, what a chunk adds
    bool wide, wide_theta;    // four pairs of B, C, dB and dC are 16 bytes at once, or 32; and of dtheta

    __device__ bool resets(const Chunk& at, int token, Index kv) const {
        return !p.published && static_cast<double>(p.in.log_alpha(at.batch, at.row0 + at.first + token, kv)) <= hard_reset;
    }
    __device__ double* turns_of(Index slot, Index kv) const { return turns + (slot * p.shape.kv_heads + kv) * p.pairs; }
    __device__ double* published_of(Index slot, Index kv) const { return published + (slot * p.shape.kv_heads + kv) * 3; }
};

/// The sum over a block of scan_threads, in one order; every thread gets it.
__device__ inline double sum_of_block(double x) {
    __shared__ double parts[scan_threads / 32];
    x = sum_of_warp(x);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0;
    for (int i = 0; i < scan_threads / 32; ++i) x += parts[i];
    return x;
}

/// Shared memory of channel_gradients_kernel: a chunk's tables, and of each token C.dC - B.dB (four pairs together) and turns.
template <class T>
struct GradientTables {
    using A = acc_t<T>;
    ChunkTables<T>& chunk;
    A *pull, *turn;  // table_at(..)
    static INTERSTATE_HD int wide(int pairs) { return pairs < pairs_at_once ? pairs : pairs_at_once; }
    static INTERSTATE_HD int fours(int pairs) { return (wide(pairs) + 3) / 4; }
    static INTERSTATE_HD std::size_t bytes(int pairs) {
        return ChunkTables<T>::bytes(wide(pairs)) + sizeof(A) * static_cast<std::size_t>(table_size(fours(pairs)) + table_size(wide(pairs)));
    }
    __device__ GradientTables(unsigned char* memory, int pairs)
        : chunk(*reinterpret_cast<ChunkTables<T>*>(memory)), pull(reinterpret_cast<A*>(memory + ChunkTables<T>::bytes(wide(pairs)))),
          turn(pull + table_size(fours(pairs))) {}
};

inline namespace INTERSTATE_KERNELS {

/// dC and dB, and what every token adds to the reverse sums; a warp for each chunk and key/value head.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads, 16) void channel_gradients_kernel(const __grid_constant__ GradientProblem<T, P> to) {
    using A = acc_t<T>;
    const Problem<T, P>& p = to.p;
    extern __shared__ __align__(16) unsigned char memory[];
    const int pairs = p.pairs, all_fours = GradientTables<T>::fours(pairs), lane = threadIdx.x;
    const GradientTables<T> tables(memory, pairs);
    Chunk at;
    if (!find_chunk(at, p)) return;
    const Index kv = at.kv, slot = at.slot;
    // The chunk's first token among queries, and how many of its tokens are before the first of them.
    const Index missing = p.missing(), row = at.row0 + at.first, query_row = row - missing, group = p.shape.group();
    const int before = static_cast<int>(max(missing - at.first, Index{0}));
    const HeadRows<const T> b(p.b, at.batch, row, kv);
    const HeadRows<T> dB(to.grads.B, at.batch, row, kv);
    const HeadRows<const A> db(to.db, at.batch, row, kv);
    tables.chunk.make_decay(p, at, slot, kv, [](int, double, const auto&) {});

    struct Turns {
        Turn<A> by[4];
    };
    const auto turn_back_pairs = [&](int first, auto is_wide) {
        constexpr bool wide = decltype(is_wide)::value;
        constexpr int together = wide ? 2 : 1;
        const int count = min(pairs_at_once, pairs - first), fours = (count + 3) / 4;
        tables.chunk.make_turns(p, at, slot, kv, first, count);
        // Four pairs at once: back to what was before rotation, times `strength`.
        const auto turns_at = [&](int token, int n) {
            Turns turns;
#pragma unroll
            for (int k = 0; k < 4; ++k) turns.by[k] = wide || n + k < count ? tables.chunk.turns()[table_at(count, token, n + k)] : Turn<A>(A(0), A(0));
            return turns;
        };
        const auto turn_back = [&](const HeadRows<T>& out, int token, int n, const Turns& turns, const A(&d)[8], A strength) {
            if (!out) return;
            A y[8];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Turn<A> by = turns.by[k];
                y[2 * k] = (d[2 * k] * by.cos + d[2 * k + 1] * by.sin) * strength;
                y[2 * k + 1] = (d[2 * k + 1] * by.cos - d[2 * k] * by.sin) * strength;
            }
            device::store_row<wide>(out(token, 2 * (first + n)), out.column, 2 * (count - n), y);
        };
        // What x.d and x's turn against d add to a token's pull and turn, four pairs at once. The one that begins sets them.
        const auto gather = [&](int token, int four, const A(&x)[8], const A(&d)[8], A to_pull, A to_turn, bool begins) {
            A along = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                along += x[2 * k] * d[2 * k] + x[2 * k + 1] * d[2 * k + 1];
                if (!wide && 4 * four + k >= count) continue;
                A& turn = tables.turn[table_at(count, token, 4 * four + k)];
                const A across = to_turn * (x[2 * k] * d[2 * k + 1] - x[2 * k + 1] * d[2 * k]);
                turn = begins ? across : turn + across;
            }
            A& pull = tables.pull[table_at(all_fours, token, four)];
            pull = begins && first == 0 ? to_pull * along : pull + to_pull * along;
        };
        each_pair<together>(0, at.count, fours, [&](int token, int four) {
            const int n = 4 * four;
            A x[8], d[8];
            device::load_row<wide, true>(b(token, 2 * (first + n)), 1, 2 * (count - n), x);
            device::load_row<wide, true>(db(token, 2 * (first + n)), 1, 2 * (count - n), d);
            turn_back(dB, token, n, turns_at(token, n), d, tables.chunk.key[token]);
            gather(token, four, x, d, A(-1), A(1), true);
        });
        each_pair<1>(at.count, chunk_tokens, fours, [&](int token, int four) {
            const A none[8] = {};
            gather(token, four, none, none, A(-1), A(1), true);
        });
        for (Index h = kv * group; h < (kv + 1) * group; ++h) {
            const A lambda = p.strength[h], times = p.pairwise ? lambda : p.scale;
            const HeadRows<const T> c(p.c, at.batch, query_row, h);
            const HeadRows<T> dC(to.grads.C, at.batch, query_row, h);
            const HeadRows<const A> dc(to.dc, at.batch, query_row, h);
            const HeadRows<const T> C(p.in.C, at.batch, query_row, h);
            double sum = 0.0;
            each_pair<together>(before, at.count, fours, [&](int token, int four) {
                const int n = 4 * four;
                A x[8], d[8], given[8];
                device::load_row<wide, true>(c(token, 2 * (first + n)), 1, 2 * (count - n), x);
                device::load_row<wide, true>(dc(token, 2 * (first + n)), 1, 2 * (count - n), d);
                device::load_row<wide, true>(C(token, 2 * (first + n)), C.column, 2 * (count - n), given);
                const A factor = tables.chunk.query[token];
                const Turns turns = turns_at(token, n);
                turn_back(dC, token, n, turns, d, factor * lambda);
                gather(token, four, x, d, times, times, false);
                // lambda's own: of C as given, since the strength in what is stored may be 0.
                A own = 0;
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    const Turn<A> by = turns.by[k];
                    own += (given[2 * k] * by.cos - given[2 * k + 1] * by.sin) * d[2 * k] + (given[2 * k] * by.sin + given[2 * k + 1] * by.cos) * d[2 * k + 1];
                }
                sum += static_cast<double>(factor * own);
            });
            sum = sum_of_warp(sum);
            double& strength = to.strength[slot * p.shape.query_heads + h];
            if (lane == 0) strength = first > 0 ? strength + sum : sum;
        }
        __syncwarp();

        // Turns that the chunk hands on, and the sums inside it. A lane has 8 tokens of a pair, the last ones first, the warp 4 pairs.
        const HeadRows<P> dtheta(to.grads.theta, at.batch, row, kv);
        const int last = chunk_tokens - 1 - lane / 4 * 8;
        for (int n = lane % 4; n - lane % 4 < count; n += 4) {
            double sums[8], sum = 0.0;
#pragma unroll
            for (int k = 0; k < 8; ++k) sums[k] = sum += n < count ? static_cast<double>(tables.turn[table_at(count, last - k, n)]) : 0.0;
            const double reached = running_sum(sum, lane, 4), behind = __shfl_up_sync(0xffffffffu, reached, 4);
            if (n >= count) continue;
            if (dtheta)
#pragma unroll
                for (int k = 0; k < 8; ++k)
                    if (last - k < at.count) *dtheta(last - k, first + n) = static_cast<P>(lane >= 4 ? behind + sums[k] : sums[k]);
            if (lane >= 28) to.turns_of(slot, kv)[first + n] = reached;
        }
        __syncwarp();
    };
    for (int first = 0; first < pairs; first += pairs_at_once)
        if (to.wide)
            turn_back_pairs(first, std::true_type{});
        else
            turn_back_pairs(first, std::false_type{});

    // dg of each token; what a chunk hands on of it.
    __shared__ Carry dg[chunk_tokens];
    double dy_sum = 0.0, at_largest = 0.0, at_smallest = 0.0;
    for (int token = lane; token < chunk_tokens; token += chunk_threads) {
        double sum = 0.0;
        for (int four = 0; four < all_fours; ++four) sum += static_cast<double>(tables.pull[table_at(all_fours, token, four)]);
        const bool there = token < at.count;
        if (there && p.published) {
            const auto& g = tables.chunk.g[token];
            if (fabs(p.published_exponent(slot, kv, g)) > p.clamp) sum = 0.0;  // eq. 24
            dy_sum += sum;
            at_largest += p.is_bound(slot, kv, g, 0) ? 1.0 : 0.0;
            at_smallest += p.is_bound(slot, kv, g, 1) ? 1.0 : 0.0;
        }
        if (there) to.dg(at.batch, row + token, kv) = sum;
        const bool cut = there && to.resets(at, token, kv);
        dg[token] = {there && !cut ? sum : 0.0, !cut};
    }
    if (p.published) {
        const double sums[3] = {sum_of_warp(dy_sum), sum_of_warp(at_largest), sum_of_warp(at_smallest)};
        if (lane < 3) to.published_of(slot, kv)[lane] = sums[lane];
        return;
    }
    __syncwarp();
    // From the last token to the first, two a lane; lane 0 has what is last.
    Carry carry = dg[chunk_tokens - 1 - 2 * lane] + dg[chunk_tokens - 2 - 2 * lane];
    for (int step = 1; step < 32; step *= 2) {
        const Carry further{__shfl_down_sync(0xffffffffu, carry.sum, step), __shfl_down_sync(0xffffffffu, carry.open, step)};
        if (lane + step < 32) carry = carry + further;
    }
    if (lane == 0) to.carries[slot * p.shape.kv_heads + kv] = carry;
}

/// From what chunks hand on to what reaches each of them from behind, in place, a block for each sequence and head, and column:
/// dg, then turns.
template <class T, class P>
__global__ __launch_bounds__(scan_threads) void gradient_carries_kernel(const __grid_constant__ GradientProblem<T, P> to) {
    using Scan = cub::BlockScan<Carry, scan_threads>;
    __shared__ typename Scan::TempStorage memory;
    __shared__ Carry last;
    const Problem<T, P>& p = to.p;
    const auto heads = static_cast<unsigned>(p.shape.kv_heads);
    const Index kv = blockIdx.x % heads, sequence = blockIdx.x / heads;
    const RowRange rows = device::checked_rows(p.in.cu_seqlens, sequence, p.shape.keys);
    const Index first = device::first_tile(p.in.cu_seqlens, sequence, p.shape.keys, chunk_tokens), count = ceil_div(rows.end - rows.begin, chunk_tokens);
    const int thread = threadIdx.x, column = static_cast<int>(blockIdx.y) - 1;
    if (p.published && column < 0) {  // eq. 25: the offset's gradient, to equal shares
        double sums[3] = {};
        for (Index i = thread; i < count; i += scan_threads)
            for (int k = 0; k < 3; ++k) sums[k] += to.published_of(first + i, kv)[k];
        for (double& sum : sums) sum = sum_of_block(sum);
        const double high = sums[1] > 0.0 ? sums[0] / 2.0 / sums[1] : 0.0, low = sums[2] > 0.0 ? sums[0] / 2.0 / sums[2] : 0.0;
        for (Index i = thread; i < count; i += scan_threads) {
            double* const of = to.published_of(first + i, kv);
            to.carries[(first + i) * p.shape.kv_heads + kv] = {of[0] - high * of[1] - low * of[2], 1};
            of[0] = high;
            of[1] = low;
        }
        __syncthreads();
    }
    Carry behind{0.0, 1};
    for (Index i = 0; i < count; i += scan_threads) {
        const Index slot = first + count - 1 - i - thread;
        const bool there = i + thread < count;
        Carry own{0.0, 1}, before{};
        if (there) own = column < 0 ? to.carries[slot * p.shape.kv_heads + kv] : Carry{to.turns_of(slot, kv)[column], 1};
        Scan(memory).ExclusiveScan(own, before, Carry{0.0, 1}, [](const Carry& a, const Carry& b) { return a + b; });
        if (there) {
            const Carry reaches = behind + before;
            if (column < 0)
                to.carries[slot * p.shape.kv_heads + kv] = reaches;
            else
                to.turns_of(slot, kv)[column] = reaches.sum;
        }
        if (thread == scan_threads - 1) last = behind + (before + own);
        __syncthreads();
        behind = last;
        __syncthreads();
    }
}

/// dtheta and dlog_alpha of a chunk, with what reaches it.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void finish_gradients_kernel(const __grid_constant__ GradientProblem<T, P> to) {
    const Problem<T, P>& p = to.p;
    Chunk at;
    if (!find_chunk(at, p)) return;
    const Index kv = at.kv, slot = at.slot;
    if (to.grads.theta) {
        const double* const reaches = to.turns_of(slot, kv);
        const HeadRows<P> dtheta(to.grads.theta, at.batch, at.row0 + at.first, kv);
        const int pairs = p.pairs;
        const auto finish = [&](auto is_wide) {
            constexpr bool wide = decltype(is_wide)::value;
            each_pair<1>(0, at.count, (pairs + 3) / 4, [&](int token, int four) {
                const int n = 4 * four;
                P x[4];
                device::load_row<wide, false>(dtheta(token, n), dtheta.column, pairs - n, x);
#pragma unroll
                for (int k = 0; k < 4; ++k)  // no pair of tokens has the first one between them
                    x[k] = at.first + token == 0 || (!wide && n + k >= pairs) ? P(0) : static_cast<P>(static_cast<double>(x[k]) + reaches[n + k]);
                device::store_row<wide>(dtheta(token, n), dtheta.column, pairs - n, x);
            });
        };
        if (to.wide_theta)
            finish(std::true_type{});
        else
            finish(std::false_type{});
    }
    if (!to.grads.log_alpha) return;
    __shared__ typename cub::WarpScan<Carry>::TempStorage memory;
    __shared__ decay_sum_t<T> g[chunk_tokens];
    static_assert(chunk_threads == 32);
    const int lane = threadIdx.x;
    if (p.published) {
        ChunkTables<T>::write_sums(g, p, at, slot, kv);
        __syncwarp();
    }
    const auto share = [&](int token) {
        if (!p.published) return 0.0;
        const double* const shares = to.published_of(slot, kv);
        return (p.is_bound(slot, kv, g[token], 0) ? shares[0] : 0.0) + (p.is_bound(slot, kv, g[token], 1) ? shares[1] : 0.0);
    };
    // Lane 0 has the last two tokens.
    const int later = chunk_tokens - 1 - 2 * lane, earlier = later - 1;
    const auto of = [&](int token) {
        if (token >= at.count) return Carry{0.0, 1};
        const bool cut = to.resets(at, token, kv);
        return Carry{cut ? 0.0 : to.dg(at.batch, at.row0 + at.first + token, kv) - share(token), !cut};
    };
    const Carry a = of(later), b = of(earlier);
    Carry before{};
    cub::WarpScan<Carry>(memory).ExclusiveScan(a + b, before, Carry{0.0, 1}, [](const Carry& x, const Carry& y) { return x + y; });
    const Carry reaches = to.carries[slot * p.shape.kv_heads + kv] + before;
    const auto write = [&](int token, const Carry& sum) {
        if (token < at.count)
            to.grads.log_alpha(at.batch, at.row0 + at.first + token, kv) =
                static_cast<P>(to.resets(at, token, kv) || (!p.published && at.first + token == 0) ? 0.0 : sum.sum);
    };
    write(later, reaches + a);
    write(earlier, reaches + a + b);
}

/// dlambda, summed over all chunks, a block for each query head.
template <class T, class P>
__global__ __launch_bounds__(scan_threads) void strength_gradient_kernel(const __grid_constant__ GradientProblem<T, P> to) {
    const Problem<T, P>& p = to.p;
    const Index h = blockIdx.x;
    double sum = 0.0;
    for (Index slot = threadIdx.x; slot < p.chunks.count; slot += scan_threads) {
        Chunk at;
        if (find_chunk(at, p, slot, 0)) sum += to.strength[slot * p.shape.query_heads + h];
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) to.grads.lam(h) = static_cast<P>(sum);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
