// What makes log_alpha and lambda of a layer's projections (docs/ops/sisa.md, eq. 27 and 28), forward and backward: the executor `cuda`.
//
// The same names and arguments as sisa/prelude.hpp, as overloads for `cuda`. Views point to device memory; calls are asynchronous on
// exec.stream and allocate nothing.
#pragma once

#include <algorithm>

#include <cub/block/block_reduce.cuh>

#include <interstate/cuda/sequences.cuh>
#include <sisa/prelude.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa::prelude {
namespace detail {

inline constexpr int element_threads = 256, sum_threads = 1024;

/// f(b, t, h) of every element of alpha, and f(h) of every one of lambda_raw.
template <class F, class G>
__device__ void each_element(const Index (&extent)[3], Index strengths, F&& element, G&& strength) {
    const Index step = static_cast<Index>(gridDim.x) * element_threads, first = static_cast<Index>(blockIdx.x) * element_threads + threadIdx.x;
    for (Index i = first; i < extent[0] * extent[1] * extent[2]; i += step) {
        const Index row = i / extent[2];
        element(row / extent[1], row % extent[1], i % extent[2]);
    }
    for (Index h = first; h < strengths; h += step) strength(h);
}

inline namespace INTERSTATE_KERNELS {

template <class T, class P>
__global__ __launch_bounds__(element_threads) void prelude_forward_kernel(const Inputs<T, P> in, const Outputs<P> out) {
    each_element(in.alpha.extent, out.lam ? in.lambda_raw.extent[0] : 0,
                 [&](Index b, Index t, Index h) {
                     out.log_alpha(b, t, h) = static_cast<P>(in_a_sequence(in, t) ? -softplus(raw_alpha(in, b, t, h)) : 0.0);  // eq. 27
                 },
                 [&](Index h) { out.lam(h) = static_cast<P>(softplus(static_cast<double>(in.lambda_raw(h)))); });  // eq. 28
}

template <class T, class P>
__global__ __launch_bounds__(element_threads) void prelude_backward_kernel(const Inputs<T, P> in, const Upstream<P> upstream, const Grads<T, P> grads) {
    each_element(in.alpha.extent, upstream.lam && grads.lambda_raw ? in.lambda_raw.extent[0] : 0,
                 [&](Index b, Index t, Index h) {
                     if (grads.alpha) grads.alpha(b, t, h) = static_cast<T>(slope(in, upstream, b, t, h));
                 },
                 [&](Index h) {
                     grads.lambda_raw(h) = static_cast<P>(sigmoid(static_cast<double>(in.lambda_raw(h))) * static_cast<double>(upstream.lam(h)));
                 });
}

/// The gradient of b_alpha, a block a head; sums have one order.
template <class T, class P>
__global__ __launch_bounds__(sum_threads) void prelude_bias_kernel(const Inputs<T, P> in, const Upstream<P> upstream, const View<P, 1> grad) {
    using Reduce = cub::BlockReduce<double, sum_threads>;
    __shared__ typename Reduce::TempStorage memory;
    const Index h = blockIdx.x, length = in.alpha.extent[1];
    double sum = 0.0;
    for (Index n = threadIdx.x; n < in.alpha.extent[0] * length; n += sum_threads) sum += slope(in, upstream, n / length, n % length, h);
    sum = Reduce(memory).Sum(sum);
    if (threadIdx.x == 0) grad(h) = static_cast<P>(sum);
}

/// Enough blocks to fill a GPU, and no more than there are elements for; at least one, for lambda.
inline LaunchShape element_blocks(const Index (&extent)[3]) {
    const Index blocks = ceil_div(extent[0] * extent[1] * extent[2], Index{element_threads});
    return {dim3(static_cast<unsigned>(std::clamp(blocks, Index{1}, Index{2048}))), dim3(element_threads)};
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail

inline namespace INTERSTATE_KERNELS {

/// log_alpha (B, L, Hkv) of alpha (B, L, Hkv) and b_alpha (Hkv), and lam (Hq) of lambda_raw (Hq), formed in double. Rows that belong to no
/// sequence of cu_seqlens are zero. Errors as on the CPU; cu_seqlens is checked on the device and reported in exec.flags.
template <class T, class P>
Status forward(const cuda& exec, const Inputs<T, P>& in, const Outputs<P>& out) {
    INTERSTATE_RETURN_IF_ERROR(detail::validate(in, out, "log_alpha", "lam"));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, in.alpha.extent[1]));
    return launch(exec, "sisa.cuda prelude", detail::prelude_forward_kernel<T, P>, detail::element_blocks(in.alpha.extent), in, out);
}

/// The gradients whose views are not null, of those of log_alpha and lam. Errors as in forward.
template <class T, class P>
Status backward(const cuda& exec, const Inputs<T, P>& in, const Upstream<P>& upstream, const Grads<T, P>& grads) {
    INTERSTATE_RETURN_IF_ERROR(detail::validate(in, upstream, grads));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, in.alpha.extent[1]));
    if (grads.alpha || grads.lambda_raw)
        INTERSTATE_RETURN_IF_ERROR(
            launch(exec, "sisa.cuda prelude gradients", detail::prelude_backward_kernel<T, P>, detail::element_blocks(in.alpha.extent), in, upstream, grads));
    if (!grads.b_alpha) return {};
    return launch(exec, "sisa.cuda prelude bias", detail::prelude_bias_kernel<T, P>,
                  {dim3(static_cast<unsigned>(in.alpha.extent[2])), dim3(detail::sum_threads)}, in, upstream, grads.b_alpha);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace sisa::prelude
}  // namespace interstate::inline INTERSTATE_ABI
