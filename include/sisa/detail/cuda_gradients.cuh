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

    __device__ bool resets(const Chunk& at, int token, Index kv) const {
        return !p.published && static_cast<double>(p.in.log_alpha(at.batch, at.row0 + at.first + token, kv)) <= hard_reset;
    }
    __device__ double* turns_of(Index slot, Index kv) const { return turns + (slot * p.shape.kv_heads + kv) * (p.columns - 1); }
    __device__ double* published_of(Index slot, Index kv) const { return published + (slot * p.shape.kv_heads + kv) * 3; }
};

/// The sum over a block, in one order; every thread gets it.
__device__ inline double sum_of_block(double x) {
    __shared__ double parts[chunk_threads / 32];
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.0;
    for (int i = 0; i < chunk_threads / 32; ++i) x += parts[i];
    return x;
}

inline namespace INTERSTATE_KERNELS {

/// dC and dB, and what every token adds to the reverse sums; a block for each chunk and key/value head.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void channel_gradients_kernel(const __grid_constant__ GradientProblem<T, P> to) {
    using A = acc_t<T>;
    const Problem<T, P>& p = to.p;
    extern __shared__ __align__(16) unsigned char memory[];
    const int pairs = p.columns - 1, stride = table_stride(pairs), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // Of (token, pair): the turn of both sides, and C.dC - B.dB.
    double* const turn = reinterpret_cast<double*>(memory + ChunkTables<T>::bytes(p));
    double* const pull = turn + chunk_tokens * stride;
    Chunk at;
    const auto heads = static_cast<unsigned>(p.shape.kv_heads);
    const Index kv = blockIdx.x % heads, slot = blockIdx.x / heads;
    if (!find_chunk(at, p.shape, p.in.cu_seqlens, p.chunks, slot)) return;
    // The chunk's first token among queries, and how many of its tokens are before the first of them.
    const Index missing = p.missing(), row = at.row0 + at.first, query_row = row - missing, group = p.shape.group();
    const int before = static_cast<int>(max(missing - at.first, Index{0}));
    const HeadRows<T> b(p.b, at.batch, row, kv), dB(to.grads.B, at.batch, row, kv);
    const HeadRows<const A> db(to.db, at.batch, row, kv);
    ask_for(b, 0, at.count, 2 * pairs);
    ask_for(db, 0, at.count, 2 * pairs);
    for (Index h = kv * group; h < (kv + 1) * group; ++h) {
        ask_for(HeadRows<T>(p.c, at.batch, query_row, h), before, at.count, 2 * pairs);
        ask_for(HeadRows<const A>(to.dc, at.batch, query_row, h), before, at.count, 2 * pairs);
        ask_for(HeadRows<const T>(p.in.C, at.batch, query_row, h), before, at.count, 2 * pairs);
    }
    const auto& tables = ChunkTables<T>::make(memory, p, at, slot, kv);

    // Four pairs at once: back to what was before rotation, times `strength`.
    struct Turns {
        Turn<A> by[4];
    };
    const auto turns_at = [&](int token, int n) {
        Turns turns;
#pragma unroll
        for (int k = 0; k < 4; ++k) turns.by[k] = n + k < pairs ? tables.turn[token * tables.stride + n + k] : Turn<A>(A(0), A(0));
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
        device::store_row(out(token, 2 * n), out.column, 2 * (pairs - n), y);
    };
    const int fours = (pairs + 3) / 4;
    each_pair(chunk_tokens, fours, [&](int token, int four) {
        const int n = 4 * four;
        A x[8] = {}, d[8] = {};
        if (token < at.count) {
            device::load_row(b(token, 2 * n), 1, 2 * (pairs - n), x);
            device::load_row(db(token, 2 * n), 1, 2 * (pairs - n), d);
            turn_back(dB, token, n, turns_at(token, n), d, tables.key[token].factor);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (n + k >= pairs) break;
            turn[token * stride + n + k] = static_cast<double>(x[2 * k]) * d[2 * k + 1] - static_cast<double>(x[2 * k + 1]) * d[2 * k];
            pull[token * stride + n + k] = -(static_cast<double>(x[2 * k]) * d[2 * k] + static_cast<double>(x[2 * k + 1]) * d[2 * k + 1]);
        }
    });
    for (Index h = kv * group; h < (kv + 1) * group; ++h) {
        const A lambda = p.strength[h];
        const double times = static_cast<double>(p.pairwise ? lambda : p.scale);
        const HeadRows<T> c(p.c, at.batch, query_row, h), dC(to.grads.C, at.batch, query_row, h);
        const HeadRows<const A> dc(to.dc, at.batch, query_row, h);
        const HeadRows<const T> C(p.in.C, at.batch, query_row, h);
        double sum = 0.0;
        each_pair(at.count, fours, [&](int token, int four) {
            if (token < before) return;
            const int n = 4 * four;
            A x[8], d[8];
            device::load_row(c(token, 2 * n), 1, 2 * (pairs - n), x);
            device::load_row(dc(token, 2 * n), 1, 2 * (pairs - n), d);
            const A factor = tables.query[token].factor;
            const Turns turns = turns_at(token, n);
            turn_back(dC, token, n, turns, d, factor * lambda);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (n + k >= pairs) break;
                turn[token * stride + n + k] += times * (static_cast<double>(x[2 * k]) * d[2 * k + 1] - static_cast<double>(x[2 * k + 1]) * d[2 * k]);
                pull[token * stride + n + k] += times * (static_cast<double>(x[2 * k]) * d[2 * k] + static_cast<double>(x[2 * k + 1]) * d[2 * k + 1]);
            }
            // lambda's own: of C as given, since the strength in what is stored may be 0.
            device::load_row(C(token, 2 * n), C.column, 2 * (pairs - n), x);
            A own = 0;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const Turn<A> by = turns.by[k];
                own += (x[2 * k] * by.cos - x[2 * k + 1] * by.sin) * d[2 * k] + (x[2 * k] * by.sin + x[2 * k + 1] * by.cos) * d[2 * k + 1];
            }
            sum += static_cast<double>(factor * own);
        });
        sum = sum_of_block(sum);
        if (threadIdx.x == 0) to.strength[slot * p.shape.query_heads + h] = sum;
    }
    __syncthreads();

    // dg of each token; what a chunk hands on of it and of turns.
    __shared__ Carry dg[chunk_tokens];
    double dy_sum = 0.0, at_largest = 0.0, at_smallest = 0.0;
    for (int token = threadIdx.x; token < chunk_tokens; token += chunk_threads) {
        double sum = 0.0;
        for (int n = 0; n < pairs; ++n) sum += pull[token * stride + n];
        const bool there = token < at.count;
        if (there && p.published) {
            const double* const bounds = p.bounds_of(slot, kv);
            const double x = tables.g[token] - (bounds[0] + bounds[1]) / 2.0;
            if (fabs(x) > p.clamp) sum = 0.0;  // eq. 24
            dy_sum += sum;
            at_largest += tables.g[token] == bounds[0] ? 1.0 : 0.0;
            at_smallest += tables.g[token] == bounds[1] ? 1.0 : 0.0;
        }
        if (there) to.dg(at.batch, row + token, kv) = sum;
        const bool cut = there && to.resets(at, token, kv);
        dg[token] = {there && !cut ? sum : 0.0, !cut};
    }
    if (p.published) {
        const double sums[3] = {sum_of_block(dy_sum), sum_of_block(at_largest), sum_of_block(at_smallest)};
        if (threadIdx.x < 3) to.published_of(slot, kv)[threadIdx.x] = sums[threadIdx.x];
    }
    __syncthreads();
    // From the last token to the first, two a lane.
    const int later = chunk_tokens - 1 - 2 * lane, earlier = later - 1;
    if (warp == 0 && !p.published) {
        Carry carry = dg[later] + dg[earlier];
        for (int step = 1; step < 32; step *= 2) {  // lane 0 has what is last
            const Carry further{__shfl_down_sync(0xffffffffu, carry.sum, step), __shfl_down_sync(0xffffffffu, carry.open, step)};
            if (lane + step < 32) carry = carry + further;
        }
        if (lane == 0) to.carries[slot * p.shape.kv_heads + kv] = carry;
    }
    // A lane has 8 tokens of a pair, the last ones first, a warp 4 pairs.
    const int segment = lane / 4, last = chunk_tokens - 1 - 8 * segment;
    for (int n = warp * 4 + lane % 4; n - lane % 4 < pairs; n += chunk_threads / 8) {
        double sums[8], sum = 0.0;
        if (n < pairs)
#pragma unroll
            for (int k = 0; k < 8; ++k) sums[k] = sum += turn[(last - k) * stride + n];
        double reached = sum;
#pragma unroll
        for (int step = 1; step < 8; step *= 2) {
            const double further = __shfl_up_sync(0xffffffffu, reached, 4 * step);
            if (segment >= step) reached += further;
        }
        const double before = __shfl_up_sync(0xffffffffu, reached, 4);
        if (n >= pairs) continue;
#pragma unroll
        for (int k = 0; k < 8; ++k) turn[(last - k) * stride + n] = segment > 0 ? before + sums[k] : sums[k];
        if (segment == 7) to.turns_of(slot, kv)[n] = reached;
    }
    if (!to.grads.theta) return;
    __syncthreads();
    const HeadRows<P> dtheta(to.grads.theta, at.batch, row, kv);
    each_pair(at.count, pairs, [&](int token, int n) { *dtheta(token, n) = static_cast<P>(turn[token * stride + n]); });
}

/// From what chunks hand on to what reaches each of them from behind, in place, a block for each sequence and head, and column:
/// dg, then turns.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void gradient_carries_kernel(const __grid_constant__ GradientProblem<T, P> to) {
    using Scan = cub::BlockScan<Carry, chunk_threads>;
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
        for (Index i = thread; i < count; i += chunk_threads)
            for (int k = 0; k < 3; ++k) sums[k] += to.published_of(first + i, kv)[k];
        for (double& sum : sums) sum = sum_of_block(sum);
        const double high = sums[1] > 0.0 ? sums[0] / 2.0 / sums[1] : 0.0, low = sums[2] > 0.0 ? sums[0] / 2.0 / sums[2] : 0.0;
        for (Index i = thread; i < count; i += chunk_threads) {
            double* const of = to.published_of(first + i, kv);
            to.carries[(first + i) * p.shape.kv_heads + kv] = {of[0] - high * of[1] - low * of[2], 1};
            of[0] = high;
            of[1] = low;
        }
        __syncthreads();
    }
    Carry behind{0.0, 1};
    for (Index i = 0; i < count; i += chunk_threads) {
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
        if (thread == chunk_threads - 1) last = behind + (before + own);
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
    const auto heads = static_cast<unsigned>(p.shape.kv_heads);
    const Index kv = blockIdx.x % heads, slot = blockIdx.x / heads;
    if (!find_chunk(at, p.shape, p.in.cu_seqlens, p.chunks, slot)) return;
    if (to.grads.theta) {
        const double* const reaches = to.turns_of(slot, kv);
        const HeadRows<P> dtheta(to.grads.theta, at.batch, at.row0 + at.first, kv);
        each_pair(at.count, p.columns - 1, [&](int token, int n) {
            P& x = *dtheta(token, n);
            // No pair of tokens has the first one between them.
            x = at.first + token == 0 ? P(0) : static_cast<P>(static_cast<double>(x) + reaches[n]);
        });
    }
    if (!to.grads.log_alpha) return;
    __shared__ __align__(16) unsigned char steps_memory[sizeof(double) * chunk_tokens];
    Steps<T, P> steps(steps_memory, p);
    __shared__ typename cub::WarpScan<Carry>::TempStorage memory;
    __shared__ double g[chunk_tokens];
    if (p.published) {
        steps.load(p, at, kv, false);
        steps.run(1, [&](int, int token, double sum, double) { g[token] = p.sums_of(slot, kv)[0] + sum; });
    }
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x;
    __syncwarp();
    const auto share = [&](int token) {
        if (!p.published) return 0.0;
        const double *const bounds = p.bounds_of(slot, kv), *const shares = to.published_of(slot, kv);
        return (g[token] == bounds[0] ? shares[0] : 0.0) + (g[token] == bounds[1] ? shares[1] : 0.0);
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
__global__ __launch_bounds__(chunk_threads) void strength_gradient_kernel(const __grid_constant__ GradientProblem<T, P> to) {
    const Problem<T, P>& p = to.p;
    const Index h = blockIdx.x;
    double sum = 0.0;
    for (Index slot = threadIdx.x; slot < p.chunks.count; slot += chunk_threads) {
        Chunk at;
        if (find_chunk(at, p.shape, p.in.cu_seqlens, p.chunks, slot)) sum += to.strength[slot * p.shape.query_heads + h];
    }
    sum = sum_of_block(sum);
    if (threadIdx.x == 0) to.grads.lam(h) = static_cast<P>(sum);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
