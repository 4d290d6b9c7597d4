// One token of Interdomain Attention on the GPU: a block a batch row and key/value head. A state is read and written
// once, which is what a step costs; a query's a = Xk q, s = C a, w = C^T s and o = Re(Xv^T w) never form G (eq. 8).
//
// The fast kernel keeps the value half of a state in registers until w is known, and C in shared memory. Its warps have
// rows m of the state, its lanes pairs of columns, 16 bytes:
//
//     keys     X = Lam X + Bbar k, written back; a over lanes                  barrier
//     s        over lanes, then a warp's share of C^T s                        barrier
//     w        of a warp's own rows, then its share of Re(Xv^T w)              barrier
//     o        adds the warps in order
//
// A state is float, and Lam two of them: with Lam rounded once a slow mode would drift by 2^-25 a token, and float64
// products cost more in conversions than in products. The general kernel takes every size and stride, in float64.
#pragma once

#include <interdomain/detail/cuda_block.cuh>
#include <interstate/cuda/async.cuh>
#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/launch.cuh>
#include <interstate/dispatch.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail {

inline constexpr int step_threads = 512, step_warps = step_threads / 32;

/// Bytes of shared memory of the fast kernel for 16 rows modes and 64 tiles columns of keys and of values.
template <int rows, int tiles>
struct StepShared {
    static constexpr int modes = step_warps * rows, half = 64 * tiles, pitch = modes + 2;  // pitch keeps banks apart
    static constexpr int Lam = modes * modes * 8, Bbar = Lam + modes * 16, w = Bbar + modes * 8,
                         o = w + step_warps * pitch * 8, den = o + step_warps * half * 4, token = den + step_warps * 4,
                         queries = token + 2 * half * 4;
    static constexpr std::size_t bytes(Index group) {
        return queries + static_cast<std::size_t>(group) * (modes * 8 + half * 4);
    }
};

/// Doubles that the general kernel needs a block: a token, and of each query of the group q, a, s, w, numerators and
/// denominator.
INTERSTATE_HD inline Index general_step_doubles(const Shape& s) {
    return s.columns() + 1 + s.group() * (6 * s.modes + s.features + s.value_dim + 1);
}
inline constexpr Index general_step_shared = 48 * 1024;

/// The general kernel's workspace where shared memory is too small.
inline std::size_t step_workspace_size(const Shape& s) {
    Arena arena;
    const Index doubles = general_step_doubles(s);
    arena.take<double>(doubles * Index{sizeof(double)} > general_step_shared ? s.batch * s.kv_heads * doubles : 0);
    return arena.required();
}

inline namespace INTERSTATE_KERNELS {

template <class P>
__global__ void discretize_kernel(Options options, Params<P> params, Discrete<P> discrete) {
    const Index M = discrete.Lam.extent[1], at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= discrete.Lam.extent[0] * M) return;
    const Mode mode = mode_at(options.disc, params, at / M, at % M);
    discrete.Lam(at / M, at % M) = mode.Abar;
    discrete.Bbar(at / M, at % M) = mode.Bbar;
}

/// Sums each of the first N numbers over a warp's lanes; lane i gets the sum of v[i / (32 / N)].
template <int N, int bit = 16>
__device__ float sum_over_lanes(float* v) {
    if constexpr (N > 1) {
        const bool upper = threadIdx.x & bit;
#pragma unroll
        for (int j = 0; j < N / 2; ++j) {
            const float kept = upper ? v[j + N / 2] : v[j], given = upper ? v[j] : v[j + N / 2];
            v[j] = kept + __shfl_xor_sync(0xffffffffu, given, bit);
        }
        return sum_over_lanes<N / 2, bit / 2>(v);
    } else if constexpr (bit > 0) {
        v[0] += __shfl_xor_sync(0xffffffffu, v[0], bit);
        return sum_over_lanes<1, bit / 2>(v);
    } else {
        return v[0];
    }
}

/// Lam x + Bbar z, Lam being (re, im) and what they leave of it; the small terms first.
__device__ inline float2 advance_element(const float4& Lam, const float2& Bbar, float2 x, float z) {
    float re = fmaf(-Lam.w, x.y, fmaf(Lam.z, x.x, Bbar.x * z)), im = fmaf(Lam.w, x.x, fmaf(Lam.z, x.y, Bbar.y * z));
    re = fmaf(Lam.x, x.x, fmaf(-Lam.y, x.y, re));
    im = fmaf(Lam.x, x.y, fmaf(Lam.y, x.x, im));
    return {re, im};
}
__device__ inline float4 advance_pair(const float4& Lam, const float2& Bbar, const float4& x, const float2& z) {
    const float2 first = advance_element(Lam, Bbar, {x.x, x.y}, z.x), second = advance_element(Lam, Bbar, {x.z, x.w}, z.y);
    return {first.x, first.y, second.x, second.y};
}

/// Up to 16 rows modes, even, and 64 tiles even columns of keys and of values, in rows of 16-byte pairs.
template <int rows, int tiles, class T, class P>
__global__ void __launch_bounds__(step_threads, rows * tiles == 4 ? 2 : 1)
    step_kernel(Options options, Discrete<P> discrete, State<float> state, Token<T> token, TokenOut<T> out) {
    using S = StepShared<rows, tiles>;
    constexpr int modes = S::modes, half = S::half, chunk = 4;
    extern __shared__ float4 step_shared[];
    char* const shared = reinterpret_cast<char*>(step_shared);
    auto* const C = reinterpret_cast<float2*>(shared);
    auto* const Lam = reinterpret_cast<float4*>(shared + S::Lam);
    auto* const Bbar = reinterpret_cast<float2*>(shared + S::Bbar);
    auto* const w_parts = reinterpret_cast<float2*>(shared + S::w);
    auto* const o_parts = reinterpret_cast<float*>(shared + S::o);
    auto* const den_parts = reinterpret_cast<float*>(shared + S::den);
    auto* const z = reinterpret_cast<float*>(shared + S::token);  // keys, then values from `half` on

    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int M = static_cast<int>(discrete.Lam.extent[1]), R = static_cast<int>(token.q.extent[2]);
    const int d = static_cast<int>(token.v.extent[2]);
    const Index H = token.k.extent[1], b = static_cast<Index>(blockIdx.x) / H, h = static_cast<Index>(blockIdx.x) % H;
    const int queries = static_cast<int>(token.q.extent[1] / H);
    const bool real_parts = options.readout == Readout::real_parts, normalized = options.normalized();
    auto* const a = reinterpret_cast<float2*>(shared + S::queries);                // (queries, modes)
    auto* const q = reinterpret_cast<float*>(shared + S::queries) + queries * modes * 2;  // (queries, half)

    // Row r of this warp is mode warp + 16 r; its lane has columns 2 lane + 64 j and the next.
    const Index pitch = state.x.stride[2];
    char* const x = reinterpret_cast<char*>(&state.x(b, h, 0, 0) + warp * pitch + 2 * lane);
    unsigned next_row = static_cast<unsigned>(step_warps * pitch * 8);  // bytes; step_is_general keeps it in range
    const auto pair_at = [&](int r, int first, int j) {
        return reinterpret_cast<float4*>(x + (static_cast<unsigned>(r) * next_row + static_cast<unsigned>(8 * (first + 64 * j))));
    };
    const auto row_used = [&](int r) { return warp + step_warps * r < M; };
    const auto pair_used = [&](int j, int columns) { return 64 * j + 2 * lane < columns; };
    constexpr float4 zero4{0.0f, 0.0f, 0.0f, 0.0f};
    float4 keys[chunk][tiles], values[rows][tiles];
    device::wait_for_previous_kernel();
    device::let_next_kernel_start();
    const auto load_keys = [&](int first) {
#pragma unroll
        for (int r = 0; r < chunk; ++r)
#pragma unroll
            for (int j = 0; j < tiles; ++j)
                keys[r][j] = row_used(first + r) && pair_used(j, R) ? *pair_at(first + r, 0, j) : zero4;
    };
    load_keys(0);
#pragma unroll
    for (int r = 0; r < rows; ++r)
#pragma unroll
        for (int j = 0; j < tiles; ++j) values[r][j] = row_used(r) && pair_used(j, d) ? *pair_at(r, R, j) : zero4;

    // While those are on their way: C, the modes, the token.
    for (int i = thread; i < M * (modes / 2); i += step_threads) {
        const int m = i / (modes / 2), n = i % (modes / 2) * 2;
        if constexpr (std::is_same_v<P, float>) {
            device::copy_async_16(C + m * modes + n, &discrete.C(h, m, n < M ? n : 0), n < M);
        } else {
            float4 pair = zero4;
            if (n < M) {
                const complex<float> first = cast<float>(discrete.C(h, m, n)), second = cast<float>(discrete.C(h, m, n + 1));
                pair = {first.re, first.im, second.re, second.im};
            }
            *reinterpret_cast<float4*>(C + m * modes + n) = pair;
        }
    }
    for (int m = thread; m < M; m += step_threads) {
        const c64 exact = discrete.Lam(h, m), beta = discrete.Bbar(h, m);
        const float re = static_cast<float>(exact.re), im = static_cast<float>(exact.im);
        Lam[m] = {re, im, static_cast<float>(exact.re - re), static_cast<float>(exact.im - im)};
        Bbar[m] = {static_cast<float>(beta.re), static_cast<float>(beta.im)};
    }
    for (int i = thread; i < queries * half; i += step_threads) {
        const int g = i / half, c = i % half;
        q[i] = c < R ? device::load_as<float>(token.q(b, h * queries + g, c)) : 0.0f;
    }
    if (thread < R) z[thread] = device::load_as<float>(token.k(b, h, thread));
    if (thread >= half && thread < half + d) z[thread] = device::load_as<float>(token.v(b, h, thread - half));
    device::wait_for_copies();
    __syncthreads();
    asm volatile("" : "+r"(next_row));  // addresses are made again for the stores: registers are short

#pragma unroll
    for (int first = 0; first < rows; first += chunk) {
        if (first > 0) load_keys(first);
#pragma unroll
        for (int r = 0; r < chunk; ++r) {
            if (!row_used(first + r)) continue;
            const float4 L = Lam[warp + step_warps * (first + r)];
            const float2 beta = Bbar[warp + step_warps * (first + r)];
#pragma unroll
            for (int j = 0; j < tiles; ++j) {
                if (!pair_used(j, R)) continue;
                keys[r][j] = advance_pair(L, beta, keys[r][j], *reinterpret_cast<const float2*>(z + 64 * j + 2 * lane));
                *pair_at(first + r, 0, j) = keys[r][j];
            }
        }
        for (int g = 0; g < queries; ++g) {
            float sums[2 * chunk] = {};
#pragma unroll
            for (int j = 0; j < tiles; ++j) {
                const float2 of = *reinterpret_cast<const float2*>(q + g * half + 64 * j + 2 * lane);
#pragma unroll
                for (int r = 0; r < chunk; ++r) {
                    sums[2 * r] = fmaf(keys[r][j].z, of.y, fmaf(keys[r][j].x, of.x, sums[2 * r]));
                    sums[2 * r + 1] = fmaf(keys[r][j].w, of.y, fmaf(keys[r][j].y, of.x, sums[2 * r + 1]));
                }
            }
            const float sum = sum_over_lanes<2 * chunk>(sums);
            constexpr int share = 32 / (2 * chunk);
            const int at = lane / share;  // 2 r + (0 re, 1 im)
            if (lane % share == 0)
                reinterpret_cast<float*>(a + g * modes + warp + step_warps * (first + at / 2))[at % 2] = sum;
        }
    }
#pragma unroll
    for (int r = 0; r < rows; ++r) {
        if (!row_used(r)) continue;
        const float4 L = Lam[warp + step_warps * r];
        const float2 beta = Bbar[warp + step_warps * r];
#pragma unroll
        for (int j = 0; j < tiles; ++j) {
            if (!pair_used(j, d)) continue;
            values[r][j] = advance_pair(L, beta, values[r][j], *reinterpret_cast<const float2*>(z + half + 64 * j + 2 * lane));
            *pair_at(r, R, j) = values[r][j];
        }
    }
    float2 eta{0.0f, 0.0f};  // of row `lane`
    if (normalized && lane < rows && row_used(lane)) {
        const int m = warp + step_warps * lane;
        complex<float>& stored = state.eta(b, h, m);
        eta = advance_element(Lam[m], Bbar[m], {stored.re, stored.im}, 1.0f);
        stored = {eta.x, eta.y};
    }
    __syncthreads();

    for (int g = 0; g < queries; ++g) {
        // s of this warp's rows, then what they add to w.
        float2 s[rows];
        {
            float sums[2 * rows] = {};
#pragma unroll
            for (int n = 2 * lane; n < modes; n += 64) {
                const float4 of = *reinterpret_cast<const float4*>(a + g * modes + n);
#pragma unroll
                for (int r = 0; r < rows; ++r) {
                    if (!row_used(r)) continue;
                    const float4 c = *reinterpret_cast<const float4*>(C + (warp + step_warps * r) * modes + n);
                    sums[2 * r] += c.x * of.x - c.y * of.y + (c.z * of.z - c.w * of.w);
                    sums[2 * r + 1] += c.x * of.y + c.y * of.x + (c.z * of.w + c.w * of.z);
                }
            }
            const float sum = sum_over_lanes<2 * rows>(sums);
            constexpr int share = 32 / (2 * rows);
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                s[r].x = __shfl_sync(0xffffffffu, sum, 2 * r * share);
                s[r].y = __shfl_sync(0xffffffffu, sum, (2 * r + 1) * share);
                if (real_parts) s[r] = {2.0f * s[r].x, 0.0f};
            }
        }
#pragma unroll
        for (int n = 2 * lane; n < modes; n += 64) {
            float4 sum = zero4;
#pragma unroll
            for (int r = 0; r < rows; ++r) {
                if (!row_used(r)) continue;
                const float4 c = *reinterpret_cast<const float4*>(C + (warp + step_warps * r) * modes + n);
                sum.x += c.x * s[r].x - c.y * s[r].y;
                sum.y += c.x * s[r].y + c.y * s[r].x;
                sum.z += c.z * s[r].x - c.w * s[r].y;
                sum.w += c.z * s[r].y + c.w * s[r].x;
            }
            *reinterpret_cast<float4*>(w_parts + warp * S::pitch + n) = sum;
        }
        __syncthreads();

        // w of this warp's rows, then what they add to o.
        constexpr int share = 32 / rows;
        float2 mine{0.0f, 0.0f};
#pragma unroll
        for (int other = lane % share; other < step_warps; other += share) {
            const float2 part = w_parts[other * S::pitch + warp + step_warps * (lane / share)];
            mine.x += part.x;
            mine.y += part.y;
        }
#pragma unroll
        for (int bit = share / 2; bit > 0; bit /= 2) {
            mine.x += __shfl_xor_sync(0xffffffffu, mine.x, bit);
            mine.y += __shfl_xor_sync(0xffffffffu, mine.y, bit);
        }
        if (real_parts) mine = {2.0f * mine.x, 2.0f * mine.y};
        float2 sums[tiles] = {};
#pragma unroll
        for (int r = 0; r < rows; ++r) {
            const float re = __shfl_sync(0xffffffffu, mine.x, r * share), im = __shfl_sync(0xffffffffu, mine.y, r * share);
#pragma unroll
            for (int j = 0; j < tiles; ++j) {
                sums[j].x = fmaf(-values[r][j].y, im, fmaf(values[r][j].x, re, sums[j].x));
                sums[j].y = fmaf(-values[r][j].w, im, fmaf(values[r][j].z, re, sums[j].y));
            }
        }
#pragma unroll
        for (int j = 0; j < tiles; ++j) *reinterpret_cast<float2*>(o_parts + warp * half + 64 * j + 2 * lane) = sums[j];
        if (normalized) {
            const float re = __shfl_sync(0xffffffffu, mine.x, lane % rows * share);
            const float im = __shfl_sync(0xffffffffu, mine.y, lane % rows * share);
            float den = eta.x * re - eta.y * im;
            const float sum = sum_over_lanes<1>(&den);
            if (lane == 0) den_parts[warp] = sum;
        }
        __syncthreads();

        for (int c = thread; c < d; c += step_threads) {
            float o = 0.0f, den = normalized ? 0.0f : 1.0f;
#pragma unroll
            for (int part = 0; part < step_warps; ++part) o += o_parts[part * half + c];
            if (normalized)
                for (int part = 0; part < step_warps; ++part) den += den_parts[part];
            out.o(b, h * queries + g, c) = device::store_as<T>(normalized ? o / den : o);
        }
    }
}

/// Any size and stride, in float64: a block a batch row and key/value head. `memory` may be null: then shared.
template <class T, class P>
__global__ void __launch_bounds__(block_threads)
    general_step_kernel(Options options, Shape shape, Discrete<P> discrete, State<acc_t<T>> state, Token<T> token,
                        TokenOut<T> out, double* memory) {
    using A = acc_t<T>;
    extern __shared__ double general_shared[];
    const Index queries = shape.group(), M = shape.modes, R = shape.features, d = shape.value_dim, columns = shape.columns();
    const Index b = static_cast<Index>(blockIdx.x) / shape.kv_heads, h = static_cast<Index>(blockIdx.x) % shape.kv_heads;
    double* const z = memory ? memory + static_cast<Index>(blockIdx.x) * general_step_doubles(shape) : general_shared;
    double* const q = z + columns + 1;            // (queries, R)
    double* const read = q + queries * R;         // (queries, d + 1)
    // Pairs of doubles: loads of 16 bytes are never made of them, so 8 is aligned enough.
    auto* const a = reinterpret_cast<c64*>(read + queries * (d + 1));
    c64* const s = a + queries * M;
    c64* const w = s + queries * M;

    for (Index c = threadIdx.x; c < columns; c += block_threads)
        z[c] = c < R ? static_cast<double>(token.k(b, h, c)) : static_cast<double>(token.v(b, h, c - R));
    each_element(queries, R, [&](Index g, Index c) { q[g * R + c] = static_cast<double>(token.q(b, h * queries + g, c)); });
    __syncthreads();
    each_element(M, columns, [&](Index m, Index c) {
        state.x(b, h, m, c) = cast<A>(discrete.Lam(h, m) * cast<double>(state.x(b, h, m, c)) + z[c] * discrete.Bbar(h, m));
    });
    if (options.normalized())
        for (Index m = threadIdx.x; m < M; m += block_threads)
            state.eta(b, h, m) = cast<A>(discrete.Lam(h, m) * cast<double>(state.eta(b, h, m)) + discrete.Bbar(h, m));
    __syncthreads();
    sum_rows<c64>(
        queries, M, R, [&](Index g, Index m, Index c) { return q[g * R + c] * cast<double>(state.x(b, h, m, c)); },
        [&](Index g, Index m, c64 sum) { a[g * M + m] = sum; });
    __syncthreads();
    read_out_queries(options.readout, discrete.C, h, queries, M, a, s, w);
    const auto column = [&](Index c, Index m) {
        return cast<double>(c < d ? state.x(b, h, m, R + c) : state.eta(b, h, m));
    };
    sum_rows<double>(
        queries, options.normalized() ? d + 1 : d, M,
        [&](Index g, Index c, Index m) { return (column(c, m) * w[g * M + m]).re; },
        [&](Index g, Index c, double sum) { read[g * (d + 1) + c] = sum; });
    __syncthreads();
    each_element(queries, d, [&](Index g, Index c) {
        const double* const of = read + g * (d + 1);
        out.o(b, h * queries + g, c) = T(options.normalized() ? of[c] / of[d] : of[c]);
    });
}

/// Calls f(rows, tiles), as types, of the fast kernel for a shape.
template <class F>
auto with_step_sizes(const Shape& s, F&& f) {
    using std::integral_constant;
    const bool wide = s.features > 64 || s.value_dim > 64;
    if (s.modes <= 64) return wide ? f(integral_constant<int, 4>{}, integral_constant<int, 2>{}) : f(integral_constant<int, 4>{}, integral_constant<int, 1>{});
    return wide ? f(integral_constant<int, 8>{}, integral_constant<int, 2>{}) : f(integral_constant<int, 8>{}, integral_constant<int, 1>{});
}
inline std::size_t step_bytes(const Shape& s) {
    return with_step_sizes(s, [&](auto rows, auto tiles) { return StepShared<rows, tiles>::bytes(s.group()); });
}

/// Why the fast kernel cannot take a step; null where it can.
template <class T, class P>
const char* step_is_general(const Shape& s, const Discrete<P>& discrete, const State<acc_t<T>>& state) {
    if constexpr (sizeof(T) == 8) {
        return "general: float64";
    } else {
        const auto aligned = [](const auto& v, std::size_t bytes) {
            bool even = reinterpret_cast<std::uintptr_t>(v.data) % bytes == 0;
            for (int axis = 0; axis + 1 < v.rank; ++axis) even = even && (v.extent[axis] <= 1 || v.stride[axis] % 2 == 0);
            return even && v.stride[v.rank - 1] == 1;
        };
        if (s.modes % 2 != 0 || s.features % 2 != 0 || s.value_dim % 2 != 0) return "general: an odd size of M, R or d";
        if (s.modes == 0 || s.features == 0 || s.value_dim == 0) return "general: M, R or d of zero";
        if (s.modes > 128 || s.features > 128 || s.value_dim > 128) return "general: M, R or d above 128";
        if (s.group() > 16) return "general: more than 16 query heads a key/value head";
        std::size_t limit = 0;
        if (!shared_memory_limit(limit).ok() || step_bytes(s) > limit) return "general: a block of this device has too little shared memory";
        if (s.modes * state.x.stride[2] > (Index{1} << 27) || state.x.stride[2] < 0) return "general: rows of the state are far apart";
        if (!aligned(state.x, 16)) return "general: rows of the state are not contiguous or not aligned to 16 bytes";
        if (std::is_same_v<P, float> && !aligned(discrete.C, 16))
            return "general: rows of C are not contiguous or not aligned to 16 bytes";
        return nullptr;
    }
}

template <int rows, int tiles, class T, class P>
Status launch_step(const cuda& exec, const Options& options, const Shape& s, const Discrete<P>& discrete,
                   const State<float>& state, const Token<T>& token, const TokenOut<T>& out) {
    return launch(exec, "step_kernel", step_kernel<rows, tiles, T, P>,
                  {dim3(static_cast<unsigned>(s.batch * s.kv_heads)), dim3(step_threads),
                   StepShared<rows, tiles>::bytes(s.group()), true},
                  options, discrete, state, token, out);
}

template <class T, class P>
Status run_step(const cuda& exec, const Options& options, const Shape& s, const Discrete<P>& discrete,
                const State<acc_t<T>>& state, const Token<T>& token, const TokenOut<T>& out, Workspace ws) {
    if (!step_is_general<T>(s, discrete, state)) {
        if constexpr (sizeof(T) < 8) {
            return with_step_sizes(s, [&](auto rows, auto tiles) { return launch_step<rows, tiles>(exec, options, s, discrete, state, token, out); });
        }
    }
    const Index bytes = general_step_doubles(s) * Index{sizeof(double)};
    Arena arena(ws.data);
    double* const memory = bytes > general_step_shared ? arena.take<double>(s.batch * s.kv_heads * bytes / 8) : nullptr;
    return launch(exec, "general_step_kernel", general_step_kernel<T, P>,
                  {dim3(static_cast<unsigned>(s.batch * s.kv_heads)), dim3(block_threads),
                   memory ? 0 : static_cast<std::size_t>(bytes)},
                  options, s, discrete, state, token, out, memory);
}

}  // namespace INTERSTATE_KERNELS

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
