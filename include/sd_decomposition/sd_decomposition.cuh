// Routing and filtering of attention heads, public: the executor `cuda`.
//
// The same names and arguments as sd_decomposition/sd_decomposition.hpp, as overloads for `cuda`. Views point to device
// memory; calls are asynchronous on exec.stream and allocate nothing. Equations: docs/ops/sd_decomposition.md.
#pragma once

#include <sd_decomposition/detail/cuda_spectrum.cuh>
#include <sd_decomposition/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition {
inline namespace INTERSTATE_KERNELS {

inline std::size_t saved_size(const cuda&, const Options&, const Shape&) { return 0; }

/// Bytes of workspace in device memory: the triangles and products of as many heads as go through the kernels together, in
/// 256 MiB, or of 16 where that is more.
inline std::size_t workspace_size(const cuda&, const Options&, const Shape& s, pass) {
    return dispatch_dtype(s.dtype, [&]<class T>(T) {
        using Layout = detail::CudaLayout<acc_t<T>>;
        Arena arena;
        Layout(arena, s, Layout::together(s));
        return arena.required();
    });
}

inline KernelChoice which_kernel(const cuda&, const Options&, const Shape& s) {
    return dispatch_dtype(s.dtype, [&]<class T>(T) -> KernelChoice {
        if (detail::tridiagonal_in_shared(detail::PartLayout<acc_t<T>>(s.values())))
            return {"sd_decomposition.cuda.tridiagonal", "S and F fit into the shared memory of a block; any strides"};
        return {"sd_decomposition.cuda.tridiagonal.memory", "S and F are too large for the shared memory of a block of this device; any strides"};
    });
}

/// As on the CPU. A launch error is a Status.
template <class T>
Status forward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape_of(in), pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::cuda_forward(exec, options, in, out, ws);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace sd_decomposition
}  // namespace interstate::inline INTERSTATE_ABI
