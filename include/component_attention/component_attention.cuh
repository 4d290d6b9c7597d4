// Attention by one component of its scores, public: the executor `cuda`. Equations, shapes and dtypes: docs/ops/component_attention.md.
//
// The same names and arguments as component_attention/component_attention.hpp, as overloads for `cuda`. Views point to device memory; calls
// are asynchronous on exec.stream and allocate nothing, so that they can be captured in a CUDA graph.
#pragma once

#include <attention/attention.cuh>
#include <component_attention/detail/cuda_pairs.cuh>
#include <component_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace component_attention {
inline namespace INTERSTATE_KERNELS {

/// o and lse are all that backward needs.
inline std::size_t saved_size(const cuda&, const Options&, const Shape&) { return 0; }

/// Bytes of scratch memory for a pass, on the current device: of one component pairs of queries and keys, values of groups of heads, in
/// backward their gradients; and what attention needs.
inline std::size_t workspace_size(const cuda& exec, const Options& options, const Shape& s, pass which) {
    return detail::pair_workspace_size(detail::DeviceRows{exec}, options, s, which);
}

/// Attention's own where it is asked as it is: both components, or no scores. Else the reason is attention's, for heads twice as wide.
inline KernelChoice which_kernel(const cuda& exec, const Options& options, const Shape& s) {
    const KernelChoice inner = attention::which_kernel(exec, detail::pair_options(options, s), detail::pair_shape(options, s));
    return detail::is_plain(options, s) ? inner : KernelChoice{"component_attention.cuda.pairs", inner.reason};
}

/// As on the CPU. A launch error is a Status; cu_seqlens is checked on the device and reported in exec.flags. Precision is attention's.
template <class T>
Status forward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    if (!detail::is_plain(options, s)) INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::pair_forward(detail::DeviceRows{exec}, options, in, out, ws);
}

/// dq, dk and dv as on the CPU, the same bits on every call. Errors as in forward.
template <class T>
Status backward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, const Upstream<T>& upstream,
                const Grads<T>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape s = shape_of(in);
    if (!detail::is_plain(options, s)) INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    if (!grads.q && !grads.k && !grads.v) return {};
    return detail::pair_backward(detail::DeviceRows{exec}, options, in, out, upstream, grads, ws);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace component_attention
}  // namespace interstate::inline INTERSTATE_ABI
