// S4D, the diagonal state space layer: public entry for the cuda executor.
//
// The same names and arguments as s4d/s4d.hpp, as overloads for `cuda`: every dtype, states, packed
// sequences, both directions. Views point to device memory; calls are asynchronous on exec.stream and
// allocate nothing. Equations: docs/ops/s4d.md.
#pragma once

#include <s4d/detail/cuda_chunked.cuh>
#include <s4d/detail/cuda_driver.cuh>
#include <s4d/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d {

inline KernelChoice which_kernel(const cuda&, const Options&, const Shape&) {
    return {"s4d.cuda.chunked", "chunks of 16 tokens as products on tensor cores"};
}

/// Bytes of `Saved` that forward fills for backward: one state per tile.
inline std::size_t saved_size(const cuda&, const Options&, const Shape& shape) {
    Arena arena;
    dispatch_dtype(shape.dtype, [&]<class T>(T) { return detail::SavedStates<T, detail::Chunked<T>>(arena, shape), 0; });
    return arena.required();
}

/// Bytes of workspace in device memory.
inline std::size_t workspace_size(const cuda&, const Options&, const Shape& shape, pass p) {
    Arena arena;
    dispatch_dtype(shape.dtype, [&]<class T>(T) { return detail::DriverLayout<T, detail::Chunked<T>>(arena, shape, p), 0; });
    return arena.required();
}

/// y (B, L, H) and the final states xT. Pass `saved` memory if backward will follow, Saved{} if not. A launch
/// error is a Status; cu_seqlens is checked on the device and reported in exec.flags.
template <class T, class P>
Status forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape shape = shape_of(in);
    if (saved.data)
        INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::run_forward<T, detail::Chunked<T>>(exec, options, in, out, saved, ws);
}

/// Gradients of every input whose view in `grads` is not null. `saved` is what forward filled for the
/// same inputs; `out` is not read.
template <class T, class P>
Status backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::run_backward<T, detail::Chunked<T>>(exec, options, in, saved, upstream, grads, ws);
}

}  // namespace s4d
}  // namespace interstate::inline INTERSTATE_ABI
