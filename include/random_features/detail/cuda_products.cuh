// Random Fourier features on the GPU, for any head: three products of matrices, tile by tile in float (f64: double) FMAs.
//
// A block has a tile of 64 x 64 of a product, a thread 4 x 4 of it. W x is turned into features, or in backward into the
// gradients of the phases, before it leaves the registers; the latter go to memory once, for the products with W (dx) and
// with x (dW). dW is summed over fixed parts of the rows, which a last kernel adds up in float64.
#pragma once

#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/launch.cuh>
#include <interstate/cuda/product.cuh>
#include <interstate/dispatch.hpp>
#include <interstate/workspace.hpp>
#include <random_features/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace random_features::detail {

using device::product;
using device::product_threads;
using device::product_tile;
using device::product_tiles;

template <class T, class P>
struct Problem {
    Shape s;
    View<const T, 4> x, dy;
    View<T, 4> y, dx;
    View<const P, 3> W;
    View<P, 3> dW;
    View<const std::int32_t, 1> cu;
    acc_t<T> norm;

    __device__ bool inside(Index n) const {
        if (n >= s.rows()) return false;
        if (!cu) return true;
        return n >= cu(0) && n < cu(s.sequences);
    }
    __device__ Index weight_head(Index h) const { return s.weight_heads == 1 ? 0 : h; }
};

/// Head h of row n of a tensor (B, L, H, .).
template <class E>
__device__ E* head(const View<E, 4>& x, Index n, Index h) {
    const Index b = static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(x.extent[1]);  // both are below 2^31
    return x.data + b * x.stride[0] + (n - b * x.extent[1]) * x.stride[1] + h * x.stride[2];
}

/// Parts of the rows that dW is summed over: enough blocks to fill a GPU, none without rows.
inline Index weight_parts(const Shape& s) {
    const Index blocks = s.heads * product_tiles(s.frequencies) * product_tiles(s.head_dim), tiles = product_tiles(s.rows());
    if (blocks == 0 || tiles == 0) return 0;
    const Index wanted = ceil_div(512, blocks);
    return wanted < tiles ? wanted : tiles;
}

template <class A>
struct CudaLayout {
    A* dp;       // (rows, H, F)
    A* partial;  // (parts, H, F, dh)
    CudaLayout(Arena& arena, const Shape& s)
        : dp(arena.take<A>(s.rows() * s.heads * s.frequencies)),
          partial(arena.take<A>(weight_parts(s) * s.heads * s.frequencies * s.head_dim)) {}
};

inline namespace INTERSTATE_KERNELS {

__device__ inline void sine_cosine(float p, float& sine, float& cosine) { sincosf(p, &sine, &cosine); }
__device__ inline void sine_cosine(double p, double& sine, double& cosine) { sincos(p, &sine, &cosine); }

/// Rows by frequencies, of a head: eq. 1, or with dp eq. 3.
template <class T, class P>
__global__ void __launch_bounds__(product_threads) features_kernel(Problem<T, P> p, acc_t<T>* dp) {
    using A = acc_t<T>;
    const Index row = static_cast<Index>(blockIdx.x) * product_tile, h = blockIdx.y, f0 = static_cast<Index>(blockIdx.z) * product_tile;
    const Index F = p.s.frequencies, hw = p.weight_head(h);
    A phase[4][4];
    product<false, false>(
        p.s.head_dim,
        [&](int m, Index c) {
            return p.inside(row + m) ? device::load_as<A>(head(p.x, row + m, h)[c * p.x.stride[3]]) : A(0);
        },
        [&](Index c, int f) { return f0 + f < F ? static_cast<A>(p.W(hw, f0 + f, c)) : A(0); }, phase);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Index n = row + threadIdx.x / 16 + 16 * i;
        if (n >= p.s.rows()) continue;
        const bool inside = p.inside(n);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Index f = f0 + threadIdx.x % 16 + 16 * j;
            if (f >= F) continue;
            A sine, cosine;
            sine_cosine(phase[i][j], sine, cosine);
            if (dp) {
                A slope = A(0);
                if (inside) {
                    const T* const dy = head(p.dy, n, h);
                    slope = device::load_as<A>(dy[(F + f) * p.dy.stride[3]]) * cosine - device::load_as<A>(dy[f * p.dy.stride[3]]) * sine;
                }
                dp[(n * p.s.heads + h) * F + f] = slope * p.norm;
            } else {
                T* const y = head(p.y, n, h);
                y[f * p.y.stride[3]] = device::store_as<T>(inside ? cosine * p.norm : A(0));
                y[(F + f) * p.y.stride[3]] = device::store_as<T>(inside ? sine * p.norm : A(0));
            }
        }
    }
}

/// Rows by channels, of a head (eq. 4).
template <class T, class P>
__global__ void __launch_bounds__(product_threads) input_gradient_kernel(Problem<T, P> p, const acc_t<T>* dp) {
    using A = acc_t<T>;
    const Index row = static_cast<Index>(blockIdx.x) * product_tile, h = blockIdx.y, c0 = static_cast<Index>(blockIdx.z) * product_tile;
    const Index F = p.s.frequencies, hw = p.weight_head(h);
    A sum[4][4];
    product<false, true>(
        F, [&](int m, Index f) { return row + m < p.s.rows() ? dp[((row + m) * p.s.heads + h) * F + f] : A(0); },
        [&](Index f, int c) { return c0 + c < p.s.head_dim ? static_cast<A>(p.W(hw, f, c0 + c)) : A(0); }, sum);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const Index n = row + threadIdx.x / 16 + 16 * i, c = c0 + threadIdx.x % 16 + 16 * j;
            if (n < p.s.rows() && c < p.s.head_dim)
                head(p.dx, n, h)[c * p.dx.stride[3]] = device::store_as<T>(p.inside(n) ? sum[i][j] : A(0));
        }
}

/// Frequencies by channels, of a head and a part of the rows (eq. 5).
template <class T, class P>
__global__ void __launch_bounds__(product_threads)
    weight_gradient_kernel(Problem<T, P> p, const acc_t<T>* dp, acc_t<T>* partial, Index parts) {
    using A = acc_t<T>;
    const Index F = p.s.frequencies, dh = p.s.head_dim, across = ceil_div(dh, product_tile), h = blockIdx.y;
    const Index f0 = blockIdx.x / across * product_tile, c0 = blockIdx.x % across * product_tile;
    const Index first = p.s.rows() * blockIdx.z / parts, last = p.s.rows() * (blockIdx.z + 1) / parts;
    A sum[4][4];
    product<true, true>(
        last - first, [&](int f, Index n) { return f0 + f < F ? dp[((first + n) * p.s.heads + h) * F + f0 + f] : A(0); },
        [&](Index n, int c) {
            return c0 + c < dh && p.inside(first + n) ? device::load_as<A>(head(p.x, first + n, h)[(c0 + c) * p.x.stride[3]]) : A(0);
        },
        sum);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const Index f = f0 + threadIdx.x / 16 + 16 * i, c = c0 + threadIdx.x % 16 + 16 * j;
            if (f < F && c < dh) partial[((blockIdx.z * p.s.heads + h) * F + f) * dh + c] = sum[i][j];
        }
}

template <class T, class P>
__global__ void finish_weight_kernel(Problem<T, P> p, const acc_t<T>* partial, Index parts) {
    const Index size = p.s.frequencies * p.s.head_dim, at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= p.s.weight_heads * size) return;
    const Index hw = at / size, rest = at % size, heads = p.s.weight_heads == 1 ? p.s.heads : 1;
    double sum = 0.0;
    for (Index part = 0; part < parts; ++part)
        for (Index i = 0; i < heads; ++i) sum += static_cast<double>(partial[(part * p.s.heads + hw + i) * size + rest]);
    p.dW(hw, rest / p.s.head_dim, rest % p.s.head_dim) = static_cast<P>(sum);
}

/// Features of all rows, or with dp the gradients of their phases.
template <class T, class P>
Status run_features(const cuda& exec, const Problem<T, P>& p, acc_t<T>* dp) {
    return launch(exec, "features_kernel", features_kernel<T, P>,
                  {dim3(static_cast<unsigned>(product_tiles(p.s.rows())), static_cast<unsigned>(p.s.heads),
                        static_cast<unsigned>(product_tiles(p.s.frequencies))),
                   dim3(product_threads)},
                  p, dp);
}

/// dx of all rows from the gradients of their phases.
template <class T, class P>
Status run_input_gradient(const cuda& exec, const Problem<T, P>& p, const acc_t<T>* dp) {
    return launch(exec, "input_gradient_kernel", input_gradient_kernel<T, P>,
                  {dim3(static_cast<unsigned>(product_tiles(p.s.rows())), static_cast<unsigned>(p.s.heads),
                        static_cast<unsigned>(product_tiles(p.s.head_dim))),
                   dim3(product_threads)},
                  p, dp);
}

/// dW from its parts.
template <class T, class P>
Status run_finish_weight(const cuda& exec, const Problem<T, P>& p, const acc_t<T>* partial, Index parts) {
    const Index size = p.s.weight_heads * p.s.frequencies * p.s.head_dim;
    return launch(exec, "finish_weight_kernel", finish_weight_kernel<T, P>,
                  {dim3(static_cast<unsigned>(ceil_div(size, 128))), dim3(128)}, p, partial, parts);
}

template <class T, class P>
Status run_backward(const cuda& exec, const Problem<T, P>& p, const CudaLayout<acc_t<T>>& w) {
    using A = acc_t<T>;
    INTERSTATE_RETURN_IF_ERROR(run_features(exec, p, w.dp));
    if (p.dx) INTERSTATE_RETURN_IF_ERROR(run_input_gradient(exec, p, static_cast<const A*>(w.dp)));
    if (!p.dW) return {};
    const Index parts = weight_parts(p.s);
    INTERSTATE_RETURN_IF_ERROR(
        launch(exec, "weight_gradient_kernel", weight_gradient_kernel<T, P>,
               {dim3(static_cast<unsigned>(product_tiles(p.s.frequencies) * product_tiles(p.s.head_dim)),
                     static_cast<unsigned>(p.s.heads), static_cast<unsigned>(parts)),
                dim3(product_threads)},
               p, static_cast<const A*>(w.dp), w.partial, parts));
    return run_finish_weight(exec, p, static_cast<const A*>(w.partial), parts);
}

}  // namespace INTERSTATE_KERNELS

}  // namespace random_features::detail
}  // namespace interstate::inline INTERSTATE_ABI
