// S4D, the diagonal state space layer: public entry for the cuda executor.
//
// The same names and arguments as s4d/s4d.hpp, as overloads for `cuda`: forward today, in every dtype,
// with states and packed sequences. Views point to device memory; calls are asynchronous on
// exec.stream and allocate nothing. Equations: docs/ops/s4d.md.
#pragma once

#include <s4d/detail/cuda_scan.cuh>
#include <s4d/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d {

inline KernelChoice which_kernel(const cuda&, const Options&, const Shape&) {
    return {"s4d.cuda.scan", "block scan over time, one block a channel"};
}

/// The cuda executor keeps nothing for backward yet.
inline std::size_t saved_size(const cuda&, const Options&, const Shape&) { return 0; }

/// Bytes of workspace in device memory.
inline std::size_t workspace_size(const cuda&, const Options&, const Shape& shape, pass) {
    Arena arena;
    if (shape.dtype == DType::f64)
        detail::CudaScanLayout<double>(arena, shape);
    else
        detail::CudaScanLayout<float>(arena, shape);
    return arena.required();
}

/// y (B, L, H) and the final states xT. A launch error is a Status; cu_seqlens is checked on the
/// device and reported in exec.flags.
template <class T, class P>
Status forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape shape = shape_of(in);
    constexpr Index limit = 0x7fffffff;  // blocks of a grid
    if (shape.states() * shape.channels > limit)
        return Status::error(StatusCode::unsupported, "u: %lld recurrences, must be below 2^31 on cuda",
                             static_cast<long long>(shape.states() * shape.channels));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::cuda_scan_forward(exec, options, in, out, ws);
}

}  // namespace s4d
}  // namespace interstate::inline INTERSTATE_ABI
