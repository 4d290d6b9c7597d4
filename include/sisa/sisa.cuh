// SISA, public: the executor `cuda`. Equations, shapes and units: docs/ops/sisa.md.
//
// The same names and arguments as sisa/sisa.hpp, as overloads for `cuda`. Views point to device memory; calls are asynchronous on
// exec.stream and allocate nothing, so that they can be captured in a CUDA graph.
#pragma once

#include <attention/attention.cuh>
#include <sisa/detail/cuda_calls.cuh>
#include <sisa/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {
inline namespace INTERSTATE_KERNELS {

/// Bytes of `Saved`, as on the CPU: for 16-bit storage and softmax, two for each number of o, else none.
inline std::size_t saved_size(const cuda&, const Options& options, const Shape& s) { return s.state_dim > 0 ? detail::rest_size(options, s) : 0; }

/// Bytes of scratch memory for a pass: channels as attention's kernels read them, and sums of tokens.
inline std::size_t workspace_size(const cuda& exec, const Options& options, const Shape& s, pass which) {
    if (s.state_dim == 0) return workspace_size(exec, attention_of(options), attention_of(s), which);
    // Of the kernels that want most.
    const Index padded = s.state_dim <= 16 ? 16 : s.state_dim <= 32 ? 32 : s.state_dim <= 64 ? 64 : s.state_dim <= 128 ? 128 : s.state_dim;
    Arena arena;
    dispatch_dtype(s.dtype, [&](auto t) {
        detail::CudaWorkspace<decltype(t)>(arena, options, s, padded, which == pass::backward);
        return 0;
    });
    return arena.required();
}

/// The kernels of a pass, if the current device has the shared memory for them.
inline KernelChoice which_kernel(const cuda& exec, const Options& options, const Shape& s) {
    if (s.state_dim == 0) return which_kernel(exec, attention_of(options), attention_of(s));
    if (s.dtype == DType::f64) return {"sisa.cuda.simple", "float64: no tensor cores, a row at a time"};
    if (s.head_dim > 128 || s.value_dim > 128 || s.state_dim > 128)
        return {"sisa.cuda.simple", "heads or channels of more than 128 columns: no tensor cores, a row at a time"};
    return {"sisa.cuda.tiled", "tensor cores, where the device has the shared memory that a pass wants, else a row at a time"};
}

/// As on the CPU. A launch error is a Status; cu_seqlens is checked on the device and reported in exec.flags.
template <class T, class P>
Status forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    if (saved.data) INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, s)));
    if (s.state_dim == 0) return forward(exec, attention_of(options), attention_of(in), attention::Outputs<T>{out.o, out.lse}, saved, ws);
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.keys));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.o, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.lse, in.cu_seqlens));
    return detail::run_forward(exec, options, in, out, saved, ws);
}

/// The gradients whose views are not null, overwritten, the same bits on every call. Errors as in forward.
template <class T, class P>
Status backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved, const Upstream<T>& upstream,
                const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, s)));
    if (s.state_dim == 0)
        return backward(exec, attention_of(options), attention_of(in), attention::Outputs<T>{out.o, out.lse}, saved,
                        attention::Upstream<T>{upstream.o, upstream.lse}, attention::Grads<T>{grads.q, grads.k, grads.v}, ws);
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.keys));
    const auto outside = [&](const auto&... x) {
        Status first;
        ((first.ok() ? void(first = zero_outside(exec, x, in.cu_seqlens)) : void()), ...);
        return first;
    };
    INTERSTATE_RETURN_IF_ERROR(outside(grads.q, grads.k, grads.v, grads.C, grads.B, grads.log_alpha, grads.theta));
    return detail::run_backward(exec, options, in, out, saved, upstream, grads, ws);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
