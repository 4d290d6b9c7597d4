// One token of linear attention on the GPU: a block a batch row and key/value head, which reads and writes the state once; that is what a step costs.
#pragma once

#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/launch.cuh>
#include <linear_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention::detail {

/// Threads of a block: 16 of them have a row of 16 times V columns.
inline constexpr int step_threads = 256, step_lanes = 16, step_rows = step_threads / step_lanes, step_ahead = 4;

inline namespace INTERSTATE_KERNELS {

/// phi of eq. 1 in the precision of A.
template <class A>
__device__ A step_feature(FeatureMap map, A x) {
    if (map == FeatureMap::identity) return x;
    return x > A(0) ? x + A(1) : exp(x);
}

/// V elements of a row of the state at once, for `most` queries of a group at once; in shared memory phi(k), z, phi(q) of those queries, and partial sums.
template <int V, int most, class T>
__global__ __launch_bounds__(step_threads, most == 1 ? 4 : 2) void step_kernel(FeatureMap map, bool divides, Index dk, Index dv, State<acc_t<T>> state, Token<T> token, TokenOut<T> out) {
    using A = acc_t<T>;
    constexpr int columns = step_lanes * V;
    struct alignas(V * sizeof(A)) Chunk {
        A x[V];
    };
    extern __shared__ double step_shared[];
    A* const k = reinterpret_cast<A*>(step_shared);
    A *const z = k + dk, *const q = z + dk, *const partial = q + most * dk, *const weights = partial + most * step_rows * columns;
    const Index H = token.k.extent[1], b = static_cast<Index>(blockIdx.x) / H, h = static_cast<Index>(blockIdx.x) % H, G = token.q.extent[1] / H;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % step_lanes, row = thread / step_lanes;
    device::wait_for_previous_kernel();
    device::let_next_kernel_start();
    // Rows m0, m0 + step_rows, .. of the state, on their way before anything else.
    const auto load = [&](Chunk(&s)[step_ahead], Index m0, Index c) {
#pragma unroll
        for (int i = 0; i < step_ahead; ++i)
            if (c < dv && m0 + i * step_rows < dk) s[i] = *reinterpret_cast<const Chunk*>(&state.s(b, h, m0 + i * step_rows, c));
    };
    Chunk s[step_ahead];
    load(s, row, lane * V);
    for (Index m = thread; m < dk; m += step_threads) {
        k[m] = step_feature(map, device::load_as<A>(token.k(b, h, m)));
        if (divides) state.z(b, h, m) = z[m] = state.z(b, h, m) + k[m];
    }
    for (Index g0 = 0; g0 == 0 || g0 < G; g0 += most) {
        const int queries = static_cast<int>(G - g0 < most ? G - g0 : most);
        for (Index i = thread; i < queries * dk; i += step_threads) q[i] = step_feature(map, device::load_as<A>(token.q(b, h * G + g0 + i / dk, i % dk)));
        __syncthreads();
        // w of a query by a warp each.
        if (divides && thread / 32 < queries) {
            A sum = A(0);
            for (Index m = thread % 32; m < dk; m += 32) sum += q[thread / 32 * dk + m] * z[m];
            for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
            if (thread % 32 == 0) weights[thread / 32] = sum;
        }
        for (Index c0 = 0; c0 < dv; c0 += columns) {
            const Index c = c0 + lane * V;
            A v[V], sum[most][V] = {};
#pragma unroll
            for (int j = 0; j < V; ++j) v[j] = c + j < dv ? device::load_as<A>(token.v(b, h, c + j)) : A(0);
            for (Index m0 = row; m0 < dk; m0 += step_ahead * step_rows) {
                if (g0 > 0 || c0 > 0 || m0 > row) load(s, m0, c);
#pragma unroll
                for (int i = 0; i < step_ahead; ++i) {
                    const Index m = m0 + i * step_rows;
                    if (c >= dv || m >= dk) continue;
                    if (g0 == 0) {
#pragma unroll
                        for (int j = 0; j < V; ++j) s[i].x[j] += k[m] * v[j];
                        *reinterpret_cast<Chunk*>(&state.s(b, h, m, c)) = s[i];
                    }
#pragma unroll
                    for (int g = 0; g < most; ++g)
                        if (g < queries)
#pragma unroll
                            for (int j = 0; j < V; ++j) sum[g][j] += q[g * dk + m] * s[i].x[j];
                }
            }
#pragma unroll
            for (int g = 0; g < most; ++g)
#pragma unroll
                for (int j = 0; j < V; ++j)
                    if (g < queries) partial[(g * step_rows + row) * columns + lane * V + j] = sum[g][j];
            __syncthreads();
            for (int i = thread; i < queries * columns; i += step_threads) {
                const int g = i / columns, column = i % columns;
                if (c0 + column >= dv) continue;
                A o = A(0);
#pragma unroll
                for (int r = 0; r < step_rows; ++r) o += partial[(g * step_rows + r) * columns + column];
                if (divides) o = weights[g] == A(0) ? A(0) : o / weights[g];
                out.o(b, h * G + g0 + g, c0 + column) = device::store_as<T>(o);
            }
            __syncthreads();
        }
    }
}

/// May V elements of a row of the state move at once?
template <class A>
bool moves_at_once(const View<A, 4>& s, Index V) {
    if (s.extent[3] % V != 0 || s.stride[3] != 1 || reinterpret_cast<std::uintptr_t>(s.data) % (sizeof(A) * static_cast<std::size_t>(V)) != 0) return false;
    for (int axis = 0; axis < 3; ++axis)
        if (s.extent[axis] > 1 && s.stride[axis] % V != 0) return false;
    return true;
}

template <class T>
Status run_step(const cuda& exec, const Options& options, const State<acc_t<T>>& state, const Token<T>& token, const TokenOut<T>& out) {
    using A = acc_t<T>;
    constexpr int wide = 16 / sizeof(A);
    const Shape s = shape_of(state, token);
    const bool at_once = moves_at_once(state.s, wide);
    const int most = s.group() > 1 ? 4 : 1, columns = step_lanes * (at_once ? wide : 1);
    const std::size_t bytes = sizeof(A) * static_cast<std::size_t>((2 + most) * s.head_dim + most * step_rows * columns + most);
    const auto kernel = at_once ? (most > 1 ? step_kernel<wide, 4, T> : step_kernel<wide, 1, T>) : (most > 1 ? step_kernel<1, 4, T> : step_kernel<1, 1, T>);
    return launch(exec, "linear_attention.cuda step", kernel, {dim3(static_cast<unsigned>(s.batch * s.kv_heads)), dim3(step_threads), bytes, true}, options.feature_map,
                  options.divides(), s.head_dim, s.value_dim, state, token, out);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace linear_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
