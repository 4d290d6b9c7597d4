// Interdomain Attention, public entry for the cuda executor.
//
// The same names and arguments as interdomain/interdomain.hpp, as overloads for `cuda`. Views point to device memory;
// calls are asynchronous on exec.stream and allocate nothing. Equations: docs/ops/interdomain.md.
#pragma once

#include <interdomain/detail/cuda_chunked.cuh>
#include <interdomain/detail/cuda_scan.cuh>
#include <interdomain/detail/cuda_step.cuh>
#include <interdomain/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain {

namespace detail {
inline namespace INTERSTATE_KERNELS {

/// The method that a call will run: chunked, parallel_scan or scan, or else one that the executor lacks.
inline Method cuda_method(const Options& options, const Shape& shape) {
    if (options.method != Method::automatic) return options.method;
    return chunks::why_not(shape) ? Method::scan : Method::chunked;
}

/// Null where the method can run, else why not.
inline const char* why_unsupported(const Options& options, const Shape& shape) {
    switch (cuda_method(options, shape)) {
        case Method::scan: return nullptr;
        case Method::chunked:
        case Method::parallel_scan: return chunks::why_not(shape);
        default: return "fft is for study, on the CPU; chunked, parallel_scan or scan";
    }
}

inline Status check_method(const Options& options, const Shape& shape) {
    const char* const why = why_unsupported(options, shape);
    if (!why) return {};
    return Status::error(StatusCode::unsupported, "method: is %s, unsupported on cuda: %s", to_string(options.method), why);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail

inline namespace INTERSTATE_KERNELS {

inline KernelChoice which_kernel(const cuda&, const Options& options, const Shape& shape) {
    if (const char* const why = detail::why_unsupported(options, shape)) return {"", why};
    if (detail::cuda_method(options, shape) == Method::chunked)
        return {"interdomain.cuda.chunked", "matrix products within chunks and with the states between them"};
    if (detail::cuda_method(options, shape) == Method::parallel_scan)
        return {"interdomain.cuda.parallel_scan", "chunks, the states between which come from an associative scan over runs of them"};
    if (const char* const why = detail::chunks::why_not(shape)) return {"interdomain.cuda.scan", why};
    return {"interdomain.cuda.scan", "token by token in float64, one block a recurrence and key/value head"};
}

/// The kernel of a step: `fast` moves a state in 16-byte pieces, `general` takes any size and stride in float64.
template <class T, class P>
KernelChoice which_step_kernel(const cuda&, const Options&, const Discrete<P>& discrete, const State<acc_t<T>>& state,
                               const Token<T>& token) {
    if (const char* const why = detail::step_is_general<T>(shape_of(discrete, token), discrete, state))
        return {"interdomain.cuda.step.general", why};
    return {"interdomain.cuda.step.fast", "state in float, read and written once"};
}

/// Bytes of `Saved` that forward fills for backward. The scan recomputes and keeps nothing.
inline std::size_t saved_size(const cuda&, const Options& options, const Shape& shape) {
    const bool chunked = !detail::why_unsupported(options, shape) && detail::cuda_method(options, shape) != Method::scan;
    return chunked ? detail::chunks::saved_size(options, shape) : 0;
}

/// Bytes of workspace in device memory; 0 for a method that is not supported.
inline std::size_t workspace_size(const cuda&, const Options& options, const Shape& shape, pass p) {
    if (p == pass::step) return detail::step_workspace_size(shape);
    if (detail::why_unsupported(options, shape)) return 0;
    if (detail::cuda_method(options, shape) != Method::scan) return detail::chunks::workspace_size(options, shape, p);
    Arena arena;
    detail::ScanLayout(arena, options, shape, p);
    return arena.required();
}

/// o (B, L, Hq, d) and the final states xT and etaT. Pass `saved` memory if backward will follow, Saved{} if not. A
/// launch error is a Status; cu_seqlens is checked on the device and reported in exec.flags.
template <class T, class P>
Status forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_method(options, shape));
    if (saved.data)
        INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, shape.length));
    if constexpr (!std::is_same_v<T, f64>)  // which chunked does not support
        if (detail::cuda_method(options, shape) != Method::scan)
            return detail::chunks::run_forward(exec, options, in, out, saved, ws);
    return detail::run_scan_forward(exec, options, in, out, ws);
}

/// Gradients of every input whose view in `grads` is not null. `saved` is what forward filled for the same inputs;
/// `out` is not read.
template <class T, class P>
Status backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_method(options, shape));
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, shape.length));
    if constexpr (!std::is_same_v<T, f64>)
        if (detail::cuda_method(options, shape) != Method::scan)
            return detail::chunks::run_backward(exec, options, in, saved, upstream, grads, ws);
    return detail::run_scan_backward(exec, options, in, upstream, grads, ws);
}

/// Fills Lam and Bbar of `discrete` (eq. 2), in device memory; C is the caller's to set.
template <class P>
Status discretize(const cuda& exec, const Options& options, const Params<P>& params, const Discrete<P>& discrete) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, discrete));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    const Index blocks = ceil_div(discrete.Lam.extent[0] * discrete.Lam.extent[1], 128);
    INTERSTATE_RETURN_IF_ERROR(check_size("Lam: blocks of a grid", blocks));
    return launch(exec, "discretize_kernel", detail::discretize_kernel<P>,
                  {dim3(static_cast<unsigned>(blocks)), dim3(128)}, options, params, discrete);
}

/// One token for every batch row; the state is updated in place. Shapes are fixed: safe to capture in a CUDA graph.
template <class T, class P>
Status step(const cuda& exec, const Options& options, const Discrete<P>& discrete, const State<acc_t<T>>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, discrete, state, token, out));
    const Shape shape = shape_of(discrete, token);
    INTERSTATE_RETURN_IF_ERROR(check_size("q: blocks of a grid", shape.batch * shape.kv_heads));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::step)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::run_step(exec, options, shape, discrete, state, token, out, ws);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain
}  // namespace interstate::inline INTERSTATE_ABI
