// The output gate of Interdomain Attention, public: the executor `cuda`.
//
// The same names and arguments as gate/gate.hpp, as overloads for `cuda`. Views point to device memory; calls are
// asynchronous on exec.stream and allocate nothing. Equations: docs/ops/gate.md.
#pragma once

#include <gate/detail/cuda_elements.cuh>
#include <gate/params.hpp>
#include <interstate/cuda/sequences.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace gate {
inline namespace INTERSTATE_KERNELS {

inline KernelChoice which_kernel(const cuda&, const Options&, const Shape& shape) {
    const Index n = shape.dtype == DType::f64 ? 2 : shape.dtype == DType::f32 ? 4 : 8;
    if (shape.value_dim % n != 0) return {"gate.cuda.narrow", "single elements: heads are no whole number of 16 bytes"};
    return {"gate.cuda", "16 bytes at once where strides and alignment of all tensors allow it, single elements otherwise"};
}

inline std::size_t saved_size(const cuda&, const Options&, const Shape&) { return 0; }
inline std::size_t workspace_size(const cuda&, const Options&, const Shape&, pass) { return 0; }

/// As on the CPU. A launch error is a Status; cu_seqlens is checked on the device and reported in exec.flags.
template <class T>
Status forward(const cuda& exec, const Options&, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, in.o.extent[1]));
    detail::Problem<T> p{.s = shape_of(in), .cu = in.cu_seqlens};
    if (p.s.rows() * p.s.heads * p.s.value_dim == 0) return {};
    p.o = detail::Tensor<const T>(in.o);
    p.g = detail::Tensor<const T>(in.g);
    p.y = detail::Tensor<T>(out.y);
    return detail::run(exec, p);
}

/// The gradients of o and g whose views are not null, from the inputs and dy; `out` is not read.
template <class T>
Status backward(const cuda& exec, const Options&, const Inputs<T>& in, const Outputs<T>&, Saved, const Upstream<T>& upstream,
                const Grads<T>& grads, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, in.o.extent[1]));
    detail::Problem<T> p{.s = shape_of(in), .cu = in.cu_seqlens};
    if (p.s.rows() * p.s.heads * p.s.value_dim == 0 || (!grads.o && !grads.g)) return {};
    p.o = detail::Tensor<const T>(in.o);
    p.g = detail::Tensor<const T>(in.g);
    p.dy = detail::Tensor<const T>(upstream.y);
    p.grad_o = detail::Tensor<T>(grads.o);
    p.grad_g = detail::Tensor<T>(grads.g);
    return detail::run(exec, p);
}

/// One token for every batch row: o, g and y (B, H, d). Safe to capture in a CUDA graph, as the others.
template <class T>
Status step(const cuda& exec, const Options& options, const Params&, const State&, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(token, out));
    return forward(exec, options, Inputs<T>{.o = as_sequences(token.o), .g = as_sequences(token.g)},
                   Outputs<T>{as_sequences(out.y)}, Saved{}, ws);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace gate
}  // namespace interstate::inline INTERSTATE_ABI
