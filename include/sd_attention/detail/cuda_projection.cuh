// The kernels that S-D attention adds to attention and linear attention (docs/ops/sd_attention.md): K of every head, the projection
// x = K^T u, and, in backward, du += K dx and dK = sum u dx^T in one pass over u and dx.
//
// Tensor cores for heads of up to 64 or 128 columns: a block keeps K of its head in shared memory and goes through 64 tokens at a time;
// x and dx are in the storage dtype, as factors of products are. The rest (float64, wider heads, a GPU with little shared memory) goes by
// FMAs in tiles of 64 x 64 (cuda/product.cuh). dK is summed in parts, which follow from the shape, and the parts are added in order.
//
// What it costs: the projection reads u and writes x once; backward reads u and dx once, and du twice. What limits it: memory.
#pragma once

#include <algorithm>

#include <interstate/cuda/product.cuh>
#include <interstate/cuda/sequences.cuh>
#include <interstate/cuda/tiles.cuh>
#include <interstate/workspace.hpp>
#include <sd_attention/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_attention {
namespace detail {

/// Tokens of all batch rows and sequences are cut into parts of dK; a block of the tensor-core kernels has one.
inline constexpr Index most_gpu_parts = 64, least_part_tokens = 512;

inline Index part_tokens(const Shape& s) {
    return std::max(least_part_tokens, ceil_div(ceil_div(s.batch * s.length, most_gpu_parts), Index{64}) * 64);
}
/// Of one batch row.
inline Index parts_of_row(const Shape& s) { return ceil_div(s.length, part_tokens(s)); }

/// A block for heads of up to `dim` columns: a warp has 16 of 64 tokens and 64 columns of a product with a row for each token, and 16
/// rows of dK.
template <class T, int dim>
struct ProjectionForm {
    static constexpr device::Precision precision = std::is_same_v<T, bf16>  ? device::Precision::bfloat
                                                   : std::is_same_v<T, f16> ? device::Precision::half
                                                                            : device::Precision::exact;
    static constexpr int rows = 64, warps = dim / 16, threads = 32 * warps;
    using Tile = device::Swizzled<T, rows, dim>;
    using Matrix = device::Swizzled<T, dim, dim>;
    static constexpr std::size_t forward_shared = sizeof(T) * (Matrix::size + Tile::size);
    static constexpr std::size_t backward_shared = sizeof(T) * (Matrix::size + 2 * Tile::size);
};

/// Tensors of the kernels: (B, L, H, r), and which rows of L there are.
template <class T>
struct ProjectionCall {
    View<const T, 4> u;
    View<const std::int32_t, 1> cu_seqlens;
    View<const T, 4> K;  // (1, r, H, r), times the scale of eq. 5
    Index heads, parts, tokens;  // parts of a batch row, and the tokens of one
    bool u_wide, K_wide;

    /// Rows of the part that block or tile number `part` of a batch row has.
    __device__ RowRange rows(Index part) const {
        const Index length = u.extent[1];
        RowRange all{0, length};
        if (cu_seqlens) {
            const Index sequences = cu_seqlens.extent[0] - 1;
            if (sequences == 0) return {0, 0};
            all = {device::checked_rows(cu_seqlens, 0, length).begin, device::checked_rows(cu_seqlens, sequences - 1, length).end};
        }
        const Index first = all.begin + part * tokens, last = first + tokens;
        return {first, last < all.end ? last : all.end};
    }
};

inline namespace INTERSTATE_KERNELS {

/// K of head blockIdx.x (eq. 1 and 2), times `factor`, in the storage dtype.
template <class T, class W>
__global__ void generator_kernel(Options options, Shape s, Generator<W> g, double factor, T* to) {
    const Index h = blockIdx.x, r = s.channels;
    for (Index n = threadIdx.x; n < r * r; n += blockDim.x)
        to[h * r * r + n] = static_cast<T>(factor * generator_element(options, s, g, h, n / r, n % r));
}

template <class T, int dim>
__global__ void __launch_bounds__(ProjectionForm<T, dim>::threads) project_kernel(ProjectionCall<T> call, View<T, 4> x, bool x_wide) {
    using F = ProjectionForm<T, dim>;
    extern __shared__ __align__(128) unsigned char projection_memory[];
    const typename F::Matrix K{reinterpret_cast<T*>(projection_memory)};
    const typename F::Tile tile{K.data + F::Matrix::size};
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, row = warp % 4 * 16, column = warp / 4 * 64;
    const Index part = blockIdx.x % call.parts, head = blockIdx.x / call.parts % call.heads, batch = blockIdx.x / call.parts / call.heads;
    const RowRange range = call.rows(part);
    if (range.begin >= range.end) return;
    K.template copy_in<F::threads>(device::Rows<const T>(call.K, 0, 0, head, static_cast<int>(call.K.extent[1]), call.K_wide), thread);
    const device::Lane at(lane);
#pragma unroll 1
    for (Index first = range.begin; first < range.end; first += F::rows) {
        const int count = static_cast<int>(min(static_cast<Index>(F::rows), range.end - first));
        tile.template copy_in<F::threads>(device::Rows<const T>(call.u, batch, first, head, count, call.u_wide), thread);
        device::wait_for_copies();
        __syncthreads();
        float c[8][4];
        device::clear(c);
        device::multiply<F::precision, dim>(c, tile.as_stored(), row, K.transposed(), column, 0, lane);  // eq. 3
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            device::put_pair(tile.at(row + at.group, column + 8 * i + 2 * at.quad), c[i][0], c[i][1]);
            device::put_pair(tile.at(row + at.group + 8, column + 8 * i + 2 * at.quad), c[i][2], c[i][3]);
        }
        __syncthreads();
        tile.template copy_out<F::threads>(device::Rows<T>(x, batch, first, head, count, x_wide), thread);
        __syncthreads();
    }
}

/// du += K dx, if there is du, and this part's sum of u dx^T to `sums` (parts, r, r), if there is that.
template <class T, int dim>
__global__ void __launch_bounds__(ProjectionForm<T, dim>::threads)
    project_gradient_kernel(ProjectionCall<T> call, View<const T, 4> dx, bool dx_wide, View<T, 4> du, bool du_wide, float* sums) {
    using F = ProjectionForm<T, dim>;
    constexpr device::Precision precision = F::precision;
    extern __shared__ __align__(128) unsigned char projection_memory[];
    const typename F::Matrix K{reinterpret_cast<T*>(projection_memory)};
    const typename F::Tile u{K.data + F::Matrix::size}, d{u.data + F::Tile::size};
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32, row = warp % 4 * 16, column = warp / 4 * 64;
    const Index part = blockIdx.x % call.parts, head = blockIdx.x / call.parts % call.heads, batch = blockIdx.x / call.parts / call.heads;
    const int r = static_cast<int>(call.K.extent[1]);
    const RowRange range = call.rows(part);
    if (du) K.template copy_in<F::threads>(device::Rows<const T>(call.K, 0, 0, head, r, call.K_wide), thread);
    const device::Lane at(lane);
    float sum[dim / 8][4];
    device::clear(sum);
#pragma unroll 1
    for (Index first = range.begin; first < range.end; first += F::rows) {
        const int count = static_cast<int>(min(static_cast<Index>(F::rows), range.end - first));
        if (sums) u.template copy_in<F::threads>(device::Rows<const T>(call.u, batch, first, head, count, call.u_wide), thread);
        d.template copy_in<F::threads>(device::Rows<const T>(dx, batch, first, head, count, dx_wide), thread);
        device::wait_for_copies();
        __syncthreads();
        if (sums) {  // eq. 8: rows 16 warp .. of this warp
            const auto left = device::rows_of(u.transposed(), 0, 0, lane);
#pragma unroll
            for (int n = 0; n < dim; n += 64) {
                const auto right = device::columns_of(d.transposed(), n, 0, lane);
                device::Sums<precision, 8> parts(reinterpret_cast<float(&)[8][4]>(sum[n / 8]));
#pragma unroll
                for (int k = 0; k < F::rows; k += device::depth<precision>) {
                    device::Factors<float, precision, 2> fa;
                    left.load(fa, 16 * warp, k);
#pragma unroll
                    for (int i = 0; i < 8; i += 2) {
                        device::Factors<float, precision, 1> fb[2];
                        right.load(fb, 8 * i, k);
                        parts.add(i, fa, fb[0]);
                        parts.add(i + 1, fa, fb[1]);
                    }
                }
                parts.finish();
            }
        }
        if (du) {  // eq. 7
            float c[8][4];
            device::clear(c);
            device::multiply<precision, dim>(c, d.as_stored(), row, K.as_stored(), column, 0, lane);
            __syncthreads();
            const device::Rows<T> to(du, batch, first, head, count, du_wide);
            d.template copy_in<F::threads>(device::Rows<const T>(View<const T, 4>(du), batch, first, head, count, du_wide), thread);
            device::wait_for_copies();
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    T* const place = d.at(row + at.group + 8 * half, column + 8 * i + 2 * at.quad);
                    const float2 before = device::get_pair(place);
                    device::put_pair(place, before.x + c[i][2 * half], before.y + c[i][2 * half + 1]);
                }
            __syncthreads();
            d.template copy_out<F::threads>(to, thread);
        }
        __syncthreads();
    }
    if (!sums) return;
    float* const out = sums + static_cast<Index>(blockIdx.x) * r * r;
#pragma unroll
    for (int i = 0; i < dim / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int m = 16 * warp + at.group + 8 * (e / 2), n = 8 * i + 2 * at.quad + e % 2;
            if (m < r && n < r) out[m * r + n] = sum[i][e];
        }
}

/// out = u K, or, transposed, out += dx K^T, for any r: 64 tokens and 64 columns a block, parts of 64 tokens.
template <class T, bool transposed>
__global__ void __launch_bounds__(device::product_threads) general_project_kernel(ProjectionCall<T> call, View<const T, 4> from, View<T, 4> out) {
    using A = acc_t<T>;
    const Index r = call.K.extent[1], column = static_cast<Index>(blockIdx.y) * device::product_tile;
    const Index part = blockIdx.x % call.parts, head = blockIdx.x / call.parts % call.heads, batch = blockIdx.x / call.parts / call.heads;
    const RowRange range = call.rows(part);
    if (range.begin >= range.end) return;
    A c[4][4];
    device::product<false, !transposed>(
        r, [&](Index m, Index k) { return range.begin + m < range.end ? static_cast<A>(from(batch, range.begin + m, head, k)) : A(0); },
        [&](Index k, Index n) {
            if (column + n >= r) return A(0);
            return static_cast<A>(transposed ? call.K(0, column + n, head, k) : call.K(0, k, head, column + n));
        },
        c);
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const Index row = range.begin + threadIdx.x / 16 + 16 * i, n = column + threadIdx.x % 16 + 16 * j;
            if (row >= range.end || n >= r) continue;
            T& to = out(batch, row, head, n);
            to = static_cast<T>(transposed ? static_cast<A>(to) + c[i][j] : c[i][j]);
        }
}
/// A part's sum of u dx^T, 64 x 64 of it a block: tiles of dK along y.
template <class T>
__global__ void __launch_bounds__(device::product_threads) general_sum_kernel(ProjectionCall<T> call, View<const T, 4> dx, acc_t<T>* sums) {
    using A = acc_t<T>;
    const Index r = call.K.extent[1], across = ceil_div(r, device::product_tile);
    const Index top = static_cast<Index>(blockIdx.y) / across * device::product_tile, left = static_cast<Index>(blockIdx.y) % across * device::product_tile;
    const Index part = blockIdx.x % call.parts, head = blockIdx.x / call.parts % call.heads, batch = blockIdx.x / call.parts / call.heads;
    const RowRange range = call.rows(part);
    A c[4][4];
    device::product<true, true>(
        range.end > range.begin ? range.end - range.begin : Index{0},
        [&](Index m, Index k) { return top + m < r ? static_cast<A>(call.u(batch, range.begin + k, head, top + m)) : A(0); },
        [&](Index k, Index n) { return left + n < r ? static_cast<A>(dx(batch, range.begin + k, head, left + n)) : A(0); }, c);
    A* const out = sums + static_cast<Index>(blockIdx.x) * r * r;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const Index m = top + threadIdx.x / 16 + 16 * i, n = left + threadIdx.x % 16 + 16 * j;
            if (m < r && n < r) out[m * r + n] = c[i][j];
        }
}

/// dK of head blockIdx.x: the parts (B, H, parts, r, r) in order, in double.
template <class A>
__global__ void sum_parts_kernel(const A* sums, Index batch, Index parts, Index r, double factor, double* dK) {
    const Index h = blockIdx.x, heads = gridDim.x, n = static_cast<Index>(blockIdx.y) * blockDim.x + threadIdx.x;
    if (n >= r * r) return;
    double sum = 0.0;
    for (Index b = 0; b < batch; ++b)
        for (Index p = 0; p < parts; ++p) sum += static_cast<double>(sums[((b * heads + h) * parts + p) * r * r + n]);
    dK[h * r * r + n] = factor * sum;
}
/// The gradients of the generator of head blockIdx.x (eq. 9 and 10), a row i a thread.
template <class W>
__global__ void generator_gradient_kernel(Options options, Shape s, Generator<W> in, BasicGenerator<W> grads, const double* dK) {
    const Index h = blockIdx.x, r = s.channels;
    for (Index i = threadIdx.x; i < r; i += blockDim.x) generator_gradient_row(options, s, in, grads, h, dK + h * r * r, i);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace sd_attention
}  // namespace interstate::inline INTERSTATE_ABI
