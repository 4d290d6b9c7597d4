// From gradients of stored channels to those of C, B, lambda, theta and log_alpha (docs/ops/sisa.md, eq. 17 to 25): back through
// decay and rotation chunk by chunk, then reverse sums in two levels, in float64.
#pragma once

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
    auto& tables = *reinterpret_cast<ChunkTables<T>*>(memory);
    const int pairs = p.columns - 1;
    // Of (token, pair), each thread its own: the turn of both sides, and C.dC - B.dB.
    double* const turn = reinterpret_cast<double*>(memory + (ChunkTables<T>::bytes(p) + 15) / 16 * 16);
    double* const pull = turn + chunk_tokens * pairs;
    Chunk at;
    const Index kv = blockIdx.x % p.shape.kv_heads, slot = blockIdx.x / p.shape.kv_heads;
    if (!find_chunk(at, p.shape, p.in.cu_seqlens, p.chunks, slot)) return;
    tables.fill(p, at, slot, kv);

    // A pair of channels as stored and its gradient over `times`: of the pair before rotation, over `strength`, and what they add
    // to the sums of their token.
    const auto back = [&](const View<T, 4>& stored, A dx, A dy, const View<T, 4>& out, Index row, Index head, int token, int n, A strength, A times, double sign) {
        const A x = device::load_as<A>(stored(at.batch, row, head, 2 * n)), y = device::load_as<A>(stored(at.batch, row, head, 2 * n + 1));
        if (out) {
            const Turn<A> angle = tables.turn[token * pairs + n];
            out(at.batch, row, head, 2 * n) = device::store_as<T>((dx * angle.cos + dy * angle.sin) * strength);
            out(at.batch, row, head, 2 * n + 1) = device::store_as<T>((dy * angle.cos - dx * angle.sin) * strength);
        }
        turn[token * pairs + n] += static_cast<double>(times) * (static_cast<double>(x) * dy - static_cast<double>(y) * dx);
        pull[token * pairs + n] += sign * static_cast<double>(times) * (static_cast<double>(x) * dx + static_cast<double>(y) * dy);
    };
    for (int e = threadIdx.x; e < chunk_tokens * pairs; e += chunk_threads) {
        turn[e] = pull[e] = 0.0;
        const int token = e / pairs, n = e % pairs;
        if (token >= at.count) continue;
        const Index row = at.row0 + at.first + token;
        back(p.b, to.db(at.batch, row, kv, 2 * n), to.db(at.batch, row, kv, 2 * n + 1), to.grads.B, row, kv, token, n, tables.key[token].factor, A(1), -1.0);
    }
    const Index missing = p.missing(), group = p.shape.group();
    for (Index h = kv * group; h < (kv + 1) * group; ++h) {
        const A lambda = p.strength[h];
        double sum = 0.0;
        for (int e = threadIdx.x; e < at.count * pairs; e += chunk_threads) {
            const int token = e / pairs, n = e % pairs;
            const Index row = at.row0 + at.first + token - missing;
            if (row < at.row0) continue;
            const A dx = to.dc(at.batch, row, h, 2 * n), dy = to.dc(at.batch, row, h, 2 * n + 1), factor = tables.query[token].factor;
            back(p.c, dx, dy, to.grads.C, row, h, token, n, factor * lambda, p.pairwise ? lambda : p.scale, 1.0);
            // Of C as given, whose strength may be 0.
            const Turn<A> angle = tables.turn[e];
            const A x = device::load_as<A>(p.in.C(at.batch, row, h, 2 * n)), y = device::load_as<A>(p.in.C(at.batch, row, h, 2 * n + 1));
            sum += static_cast<double>(factor * ((x * angle.cos - y * angle.sin) * dx + (x * angle.sin + y * angle.cos) * dy));
        }
        sum = sum_of_block(sum);
        if (threadIdx.x == 0) to.strength[slot * p.shape.query_heads + h] = sum;
    }
    __syncthreads();

    // dg of each token; what a chunk hands on of turns and, in exact mode, of dg.
    double* const dg = tables.g;  // each thread its own tokens
    double dy_sum = 0.0, at_largest = 0.0, at_smallest = 0.0;
    for (int token = threadIdx.x; token < at.count; token += chunk_threads) {
        double sum = 0.0;
        for (int n = 0; n < pairs; ++n) sum += pull[token * pairs + n];
        if (p.published) {
            const double* const bounds = p.bounds_of(slot, kv);
            const double g = dg[token], x = g - (bounds[0] + bounds[1]) / 2.0;
            if (fabs(x) > p.clamp) sum = 0.0;  // eq. 24
            dy_sum += sum;
            at_largest += g == bounds[0] ? 1.0 : 0.0;
            at_smallest += g == bounds[1] ? 1.0 : 0.0;
        }
        dg[token] = sum;
        to.dg(at.batch, at.row0 + at.first + token, kv) = sum;
    }
    __syncthreads();
    if (p.published) {
        const double sums[3] = {sum_of_block(dy_sum), sum_of_block(at_largest), sum_of_block(at_smallest)};
        if (threadIdx.x < 3) to.published_of(slot, kv)[threadIdx.x] = sums[threadIdx.x];
    } else if (threadIdx.x == 0) {
        Carry carry{0.0, 1};
        for (int token = at.count - 1; token >= 0; --token) carry = carry + Carry{to.resets(at, token, kv) ? 0.0 : dg[token], !to.resets(at, token, kv)};
        to.carries[slot * p.shape.kv_heads + kv] = carry;
    }
    for (int n = threadIdx.x; n < pairs; n += chunk_threads) {
        double sum = 0.0;
        for (int token = at.count - 1; token >= 0; --token) {
            sum += turn[token * pairs + n];
            turn[token * pairs + n] = sum;
        }
        to.turns_of(slot, kv)[n] = sum;
    }
    __syncthreads();
    if (to.grads.theta)
        for (int e = threadIdx.x; e < at.count * pairs; e += chunk_threads)
            to.grads.theta(at.batch, at.row0 + at.first + e / pairs, kv, e % pairs) = static_cast<P>(turn[e]);
}

/// From what chunks hand on to what reaches each of them from behind, in place, a block for each sequence and head.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void gradient_carries_kernel(const __grid_constant__ GradientProblem<T, P> to) {
    using Scan = cub::BlockScan<Carry, chunk_threads>;
    __shared__ typename Scan::TempStorage memory;
    __shared__ Carry last;
    const Problem<T, P>& p = to.p;
    const Index kv = blockIdx.x % p.shape.kv_heads, sequence = blockIdx.x / p.shape.kv_heads;
    const RowRange rows = device::checked_rows(p.in.cu_seqlens, sequence, p.shape.keys);
    const Index first = device::first_tile(p.in.cu_seqlens, sequence, p.shape.keys, chunk_tokens), count = ceil_div(rows.end - rows.begin, chunk_tokens);
    const int thread = threadIdx.x;
    if (p.published) {  // eq. 25: the offset's gradient, to equal shares
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
    for (int column = -1; column < p.columns - 1; ++column) {  // dg, then turns
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
}

/// dtheta and dlog_alpha of a chunk, with what reaches it.
template <class T, class P>
__global__ __launch_bounds__(chunk_threads) void finish_gradients_kernel(const __grid_constant__ GradientProblem<T, P> to) {
    const Problem<T, P>& p = to.p;
    Chunk at;
    const Index kv = blockIdx.x % p.shape.kv_heads, slot = blockIdx.x / p.shape.kv_heads;
    if (!find_chunk(at, p.shape, p.in.cu_seqlens, p.chunks, slot)) return;
    const int pairs = p.columns - 1;
    if (to.grads.theta)
        for (int e = threadIdx.x; e < at.count * pairs; e += chunk_threads) {
            P& x = to.grads.theta(at.batch, at.row0 + at.first + e / pairs, kv, e % pairs);
            // No pair of tokens has the first one between them.
            x = at.first + e / pairs == 0 ? P(0) : static_cast<P>(static_cast<double>(x) + to.turns_of(slot, kv)[e % pairs]);
        }
    if (!to.grads.log_alpha || threadIdx.x >= 32) return;
    const int lane = threadIdx.x;
    __shared__ typename cub::WarpScan<Carry>::TempStorage memory;
    __shared__ double g[chunk_tokens];
    if (p.published) run_sums(p, at, kv, 0, p.sums_of(slot, kv)[0], lane, [&](int token, double sum) { g[token] = sum; });
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
