// The chunked method on tensor cores: a stand-in that supports nothing yet, so that `automatic` is the scan.
#pragma once

#include <interdomain/params.hpp>
#include <interstate/cuda/launch.cuh>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail::chunks {
inline namespace INTERSTATE_KERNELS {

inline bool supports(const Options&, const Shape&) { return false; }
inline std::size_t saved_size(const Options&, const Shape&) { return 0; }
inline std::size_t workspace_size(const Options&, const Shape&, pass) { return 0; }
template <class T, class P>
Status run_forward(const cuda&, const Options&, const Inputs<T, P>&, const Outputs<T>&, Saved, Workspace) {
    return Status::error(StatusCode::unsupported, "method: chunked is not there yet");
}
template <class T, class P>
Status run_backward(const cuda&, const Options&, const Inputs<T, P>&, Saved, const Upstream<T>&, const Grads<T, P>&, Workspace) {
    return Status::error(StatusCode::unsupported, "method: chunked is not there yet");
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
