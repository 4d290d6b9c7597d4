// Linear attention, public: the executor `cuda`. Equations, shapes and dtypes: docs/ops/linear_attention.md.
//
// The same names and arguments as linear_attention/linear_attention.hpp, as overloads for `cuda`. Views point to device memory; calls are asynchronous on
// exec.stream and allocate nothing, so that they can be captured in a CUDA graph.
#pragma once

#include <interstate/dispatch.hpp>
#include <linear_attention/detail/cuda_backward.cuh>
#include <linear_attention/detail/cuda_forward.cuh>
#include <linear_attention/detail/cuda_scan.cuh>
#include <linear_attention/detail/cuda_step.cuh>
#include <linear_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention {

namespace detail {
inline namespace INTERSTATE_KERNELS {

/// Calls f(std::integral_constant<int, dim>) with the columns of the tiles that hold a head, 64 or 128; 0 asks for the scan: float64, wider heads, and a GPU
/// without the shared memory that a pass wants. Without queries, too: chunks are walked through once a query head.
template <class T, class F>
auto dispatch_dim(const Shape& s, F&& f) {
    if constexpr (std::is_same_v<T, f64>) {
        return f(std::integral_constant<int, 0>{});
    } else {
        std::size_t limit = 0;
        const bool known = shared_memory_limit(limit).ok();
        return dispatch_size<64, 128>(std::max(s.head_dim, s.value_dim), [&](auto dim) {
            if constexpr (dim > 0)
                if (known && Block<T, dim>::most_shared <= limit && s.query_heads > 0) return f(dim);
            return f(std::integral_constant<int, 0>{});
        });
    }
}

/// A grid has fewer than 2^31 blocks.
inline Status check_grid(const Options& options, const Shape& s) {
    const Index most = std::max({s.batch * s.length * s.query_heads, span_count(s, segment) * s.kv_heads,
                                 s.states() * s.kv_heads * ceil_div(std::max(s.head_dim, s.value_dim + (options.divides() ? 1 : 0)), scan_columns),
                                 s.states() * s.kv_heads * Block<bf16, 128>::record / 256 + 1});
    if (most < (Index{1} << 31)) return {};
    return Status::error(StatusCode::unsupported, "linear_attention on cuda: %lld blocks of rows, heads and batch rows, must be below 2^31", static_cast<long long>(most));
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail

inline namespace INTERSTATE_KERNELS {

/// Bytes of `Saved`, on the current device: the state that enters each segment of 512 tokens, and w of each row. None where the scan runs.
inline std::size_t saved_size(const cuda&, const Options& options, const Shape& s) {
    return dispatch_dtype(s.dtype, [&](auto t) {
        using T = decltype(t);
        return detail::dispatch_dim<T>(s, [&](auto dim) {
            Arena arena;
            if constexpr (dim > 0) detail::Kept(arena, options, s, detail::Block<T, dim>::record);
            return arena.required();
        });
    });
}

/// Bytes of scratch memory for a pass, on the current device: states of spans where there are few heads, adjoints of segments in backward.
inline std::size_t workspace_size(const cuda&, const Options& options, const Shape& s, pass which) {
    if (which == pass::step) return 0;
    return dispatch_dtype(s.dtype, [&](auto t) {
        using T = decltype(t);
        return detail::dispatch_dim<T>(s, [&](auto dim) {
            Arena arena;
            if constexpr (dim == 0)
                detail::ScanMemory(arena, s, options.divides(), which == pass::backward);
            else if (which == pass::forward)
                arena.take<float>(detail::span_records(s) * detail::Block<T, dim>::record);
            else
                detail::Adjoints(arena, options, s, detail::Block<T, dim>::record);
            return arena.required();
        });
    });
}

/// The kernels of forward and backward on the current device.
inline KernelChoice which_kernel(const cuda&, const Options&, const Shape& s) {
    if (s.dtype == DType::f64) return {"linear_attention.cuda.scan", "float64: token by token, no tensor cores"};
    if (s.head_dim > 128 || s.value_dim > 128) return {"linear_attention.cuda.scan", "heads of more than 128 columns: token by token, in float64"};
    if (std::size_t limit = 0; !shared_memory_limit(limit).ok())
        return {"linear_attention.cuda.chunked or scan", "there is no device to ask for its shared memory: tensor cores where it suffices, else token by token"};
    const bool fits = dispatch_dtype(s.dtype, [&](auto t) { return detail::dispatch_dim<decltype(t)>(s, [](auto dim) { return dim > 0; }); });
    if (s.query_heads == 0) return {"linear_attention.cuda.scan", "no queries"};
    if (!fits) return {"linear_attention.cuda.scan", "a block of this device has too little shared memory: token by token, in float64"};
    return {"linear_attention.cuda.chunked", "tensor cores; 16 bytes at once where strides and alignment allow it, single elements otherwise"};
}

/// As on the CPU. Pass `saved` memory if backward will follow, Saved{} if not. A launch error is a Status; cu_seqlens is checked on the device and reported in
/// exec.flags. float32 is multiplied in three parts of tf32, to 22 bits, float16 as tf32, bfloat16 as it is with states in two parts; sums are float.
template <class T>
Status forward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(options, s));
    if (saved.data) INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, s)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.o, in.cu_seqlens));
    return detail::dispatch_dim<T>(s, [&](auto dim) {
        if constexpr (dim == 0)
            return detail::run_scan_forward(exec, options, in, out, ws);
        else
            return detail::run_forward<T, dim>(exec, options, in, out, saved, ws);
    });
}

/// The gradients whose views are not null, the same bits on every call. `saved` is what forward filled for the same inputs; `out` is not read.
template <class T>
Status backward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>&, Saved saved, const Upstream<T>& upstream, const Grads<T>& grads,
                Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(options, s));
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, s)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.q, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.k, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.v, in.cu_seqlens));
    return detail::dispatch_dim<T>(s, [&](auto dim) {
        if constexpr (dim == 0)
            return detail::run_scan_backward(exec, options, in, upstream, grads, ws);
        else
            return detail::run_backward<T, dim>(exec, options, in, saved, upstream, grads, ws);
    });
}

/// One token for every batch row; the state is updated in place. Shapes are fixed: safe to capture in a CUDA graph.
template <class T>
Status step(const cuda& exec, const Options& options, const Params&, const State<acc_t<T>>& state, const Token<T>& token, const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, token, out));
    const Shape s = shape_of(state, token);
    INTERSTATE_RETURN_IF_ERROR(check_size("q: blocks of a grid", s.batch * s.kv_heads));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::run_step(exec, options, state, token, out);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace linear_attention
}  // namespace interstate::inline INTERSTATE_ABI
