// Attention, public: the executor `cuda`. Equations, shapes and units: docs/ops/attention.md.
//
// The same names and arguments as attention/attention.hpp, as overloads for `cuda`. Views point to device memory; calls are
// asynchronous on exec.stream and allocate nothing, so that they can be captured in a CUDA graph.
#pragma once

#include <algorithm>

#include <attention/detail/cuda_calls.cuh>
#include <attention/detail/cuda_step.cuh>
#include <attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
inline namespace INTERSTATE_KERNELS {

/// o and lse are all that backward needs.
inline std::size_t saved_size(const cuda&, const Options&, const Shape&) { return 0; }

/// Bytes of scratch memory for a pass: none for forward; backward wants two accumulators for each row of queries, step sums for
/// each part that the current device's multiprocessors take of a cache.
inline std::size_t workspace_size(const cuda&, const Options& options, const Shape& s, pass which) {
    if (which == pass::step) return detail::step_workspace_size(options, s);
    if (which != pass::backward) return 0;
    Arena arena;
    if (s.dtype == DType::f64)
        detail::BackwardWorkspace<double>(arena, options, s);
    else
        detail::BackwardWorkspace<float>(arena, options, s);
    return arena.required();
}

/// The kernels of forward and, if the current device has the shared memory for it, of backward.
inline KernelChoice which_kernel(const cuda&, const Options&, const Shape& s) {
    if (s.dtype == DType::f64) return {"attention.cuda.simple", "float64: no tensor cores, a row at a time"};
    if (s.head_dim > 256 || s.value_dim > 256)
        return {"attention.cuda.simple", "heads of more than 256 columns: no tensor cores, a row at a time"};
    std::size_t limit = 0, want = 0;
    (void)dispatch_dtype(s.dtype, [&](auto t) {
        using T = decltype(t);
        if constexpr (!std::is_same_v<T, f64>)
            (void)dispatch_size<64, 128, 256>(s.head_dim > s.value_dim ? s.head_dim : s.value_dim, [&](auto dim) {
                if constexpr (dim > 0)
                    want = std::max({detail::ForwardForm<T, dim>::shared, detail::QueryForm<T, dim>::shared, detail::KeyForm<T, dim>::shared});
                return 0;
            });
        return 0;
    });
    if (shared_memory_limit(limit).ok() && want > limit)
        return {"attention.cuda.tiled or simple", "tensor cores where the device has the shared memory that a pass wants, else a row at a time"};
    return {"attention.cuda.tiled", "tensor cores; 16 bytes at once where strides and alignment allow it, single elements otherwise"};
}

/// As on the CPU. A launch error is a Status; cu_seqlens is checked on the device and reported in exec.flags. float32 is
/// multiplied in three parts of tf32, to 22 bits; float16 and bfloat16 as they are, with weights rounded alike; sums are float.
/// `policy`: what a guest adds (docs/ops/attention.md, "Policies"); one with channels makes them in kernels of its own, as sisa does.
template <class T, class Policy = detail::Plain>
Status forward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace, const Policy& policy = {}) {
    static_assert(Policy::channels == 0);
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, in.k.extent[1]));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.o, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.lse, in.cu_seqlens));
    return detail::run_forward(exec, options, in, out, policy);
}

/// dq, dk and dv as on the CPU, the same bits on every call. Errors as in forward.
template <class T, class Policy = detail::Plain>
Status backward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, const Upstream<T>& upstream,
                const Grads<T>& grads, Workspace ws, const Policy& policy = {}) {
    static_assert(Policy::channels == 0);
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape_of(in), pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, in.k.extent[1]));
    if (!grads.q && !grads.k && !grads.v) return {};
    Arena arena(ws.data);
    const detail::BackwardWorkspace<acc_t<T>> memory(arena, options, shape_of(in));
    INTERSTATE_RETURN_IF_ERROR(detail::make_statistics(exec, options, in, out, upstream, memory));
    if (grads.q) {
        INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.q, in.cu_seqlens));
        INTERSTATE_RETURN_IF_ERROR(detail::run_query_gradient(exec, options, in, upstream, memory, grads, policy));
    }
    if (!grads.k && !grads.v) return {};
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.k, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.v, in.cu_seqlens));
    return detail::run_key_gradient(exec, options, in, upstream, memory, grads, policy);
}

/// The kernel of a step, on the current device.
template <class T, class AnyTokens>
KernelChoice which_step_kernel(const cuda&, const Options&, const State<T>& state, const AnyTokens& tokens) {
    const Shape s = shape_of(state, tokens);
    if (s.dtype == DType::f64) return {"attention.cuda.step.simple", "float64: no tensor cores, a row at a time"};
    if (s.head_dim > 256 || s.value_dim > 256)
        return {"attention.cuda.step.simple", "heads of more than 256 columns: no tensor cores, a row at a time"};
    bool fits = false;
    (void)detail::dispatch_step<T, 0>(s, [&](auto dim, auto) { return fits = dim > 0, Status{}; });
    if (!fits) return {"attention.cuda.step.simple", "a block of this device has too little shared memory: a row at a time"};
    if (!device::moves_wide(state.k, s.head_dim) || !device::moves_wide(state.v, s.value_dim))
        return {"attention.cuda.step.split", "rows of the cache in single elements: not contiguous, or not aligned to 16 bytes"};
    return {"attention.cuda.step.split", "tensor cores, the cache split over the device and read once, 16 bytes at a time"};
}

/// n tokens for every batch row, as on the CPU. Lengths and block table are read on the device alone, so that a graph of this call can be
/// replayed at any length: a sequence without room is left alone, its o is 0 and its lse -inf; rows on pages that are none of the
/// cache's are not written, and read as zeros; both are reported in exec.flags.
template <class T>
Status step(const cuda& exec, const Options& options, const Params&, const State<T>& state, const Tokens<T>& tokens, const TokensOut<T>& out,
            Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, tokens, out));
    const Shape s = shape_of(state, tokens);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::run_step(exec, options, state, tokens, out, ws);
}
template <class T>
Status step(const cuda& exec, const Options& options, const Params& params, const State<T>& state, const Token<T>& token, const TokenOut<T>& out,
            Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, token, out));
    return step(exec, options, params, state, tokens_of(token), tokens_of(out), ws);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
