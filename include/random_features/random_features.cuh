// Random Fourier features, public: the executor `cuda`.
//
// The same names and arguments as random_features/random_features.hpp, as overloads for `cuda`. Views point to device
// memory; calls are asynchronous on exec.stream and allocate nothing. Equations: docs/ops/random_features.md.
#pragma once

#include <cmath>

#include <interstate/cuda/sequences.cuh>
#include <random_features/detail/cuda_products.cuh>
#include <random_features/detail/cuda_warps.cuh>
#include <random_features/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace random_features {

namespace detail {
inline Status check_grid(const Shape& s) {
    if (s.heads > 65535 || product_tiles(s.frequencies) > 65535 || product_tiles(s.head_dim) > 65535)
        return Status::error(StatusCode::unsupported, "x: heads, and frequencies and head dim in tiles of 64, are %lld, %lld and "
                             "%lld, must be at most 65535 on cuda", static_cast<long long>(s.heads),
                             static_cast<long long>(product_tiles(s.frequencies)), static_cast<long long>(product_tiles(s.head_dim)));
    return {};
}
}  // namespace detail

inline namespace INTERSTATE_KERNELS {

inline KernelChoice which_kernel(const cuda&, const Options&, const Shape& shape) {
    if (detail::fits_warps(shape))
        return {"random_features.cuda.warps", "tensor cores, factors split into bf16 numbers; any strides"};
    return {"random_features.cuda.products", shape.dtype == DType::f64 ? "tiles of 64 x 64 in double FMAs: f64"
                                                                       : "tiles of 64 x 64 in float FMAs: heads of more than 64 channels"};
}

inline std::size_t saved_size(const cuda&, const Options&, const Shape&) { return 0; }

/// Bytes of workspace in device memory: backward keeps parts of dW and, but for floats of up to 64 channels and 32
/// frequencies, the gradients of the phases, (B, L, H, F).
inline std::size_t workspace_size(const cuda&, const Options&, const Shape& shape, pass p) {
    if (p != pass::backward) return 0;
    Arena arena;
    if (detail::fits_warps(shape))
        detail::WarpLayout(arena, shape);
    else if (shape.dtype == DType::f64)
        detail::CudaLayout<double>(arena, shape);
    else
        detail::CudaLayout<float>(arena, shape);
    return arena.required();
}

/// As on the CPU. A launch error is a Status; cu_seqlens is checked on the device and reported in exec.flags.
template <class T, class P>
Status forward(const cuda& exec, const Options&, const Inputs<T, P>& in, const Outputs<T>& out, Saved, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.length));
    const auto norm = static_cast<acc_t<T>>(1.0 / std::sqrt(static_cast<double>(s.frequencies > 0 ? s.frequencies : 1)));
    const detail::Problem<T, P> p{.s = s, .x = in.x, .dy = {}, .y = out.y, .dx = {}, .W = in.params.W, .dW = {}, .cu = in.cu_seqlens, .norm = norm};
    if constexpr (!std::is_same_v<T, f64>)
        if (detail::fits_warps(s)) return detail::run_warp_features(exec, p);
    return detail::run_features(exec, p, static_cast<acc_t<T>*>(nullptr));
}

/// The gradients of x and W whose views are not null, from the inputs and dy; `out` is not read.
template <class T, class P>
Status backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.length));
    Arena arena(ws.data);
    const auto norm = static_cast<acc_t<T>>(1.0 / std::sqrt(static_cast<double>(s.frequencies > 0 ? s.frequencies : 1)));
    const detail::Problem<T, P> p{.s = s, .x = in.x, .dy = upstream.y, .y = {}, .dx = grads.x, .W = in.params.W, .dW = grads.params.W,
                                  .cu = in.cu_seqlens, .norm = norm};
    if constexpr (!std::is_same_v<T, f64>)
        if (detail::fits_warps(s)) return detail::run_warp_backward(exec, p, detail::WarpLayout(arena, s));
    return detail::run_backward(exec, p, detail::CudaLayout<acc_t<T>>(arena, s));
}

/// One token for every batch row: x (B, H, dh), y (B, H, 2 F). Safe to capture in a CUDA graph, as the others.
template <class T, class P>
Status step(const cuda& exec, const Options& options, const Params<P>& params, const State&, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, token, out));
    return forward(exec, options, Inputs<T, P>{.x = as_sequences(token.x), .params = params},
                   Outputs<T>{as_sequences(out.y)}, Saved{}, ws);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace random_features
}  // namespace interstate::inline INTERSTATE_ABI
