// Kernel launches that answer with a Status.
#pragma once

#include <cstddef>
#include <utility>

#include <interstate/cuda/arch.cuh>
#include <interstate/executor.hpp>

namespace interstate::inline INTERSTATE_ABI {

struct LaunchShape {
    dim3 grid, block;
    std::size_t shared = 0;  // bytes of dynamic shared memory
};

/// Launches `kernel` on the executor's stream; `name` stands in the message of an error. A grid without
/// blocks is no work.
template <class... Parameters, class... Arguments>
Status launch(const cuda& exec, const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
              Arguments&&... arguments) {
    if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return {};
    if (shape.shared > 48 * 1024)  // beyond this a kernel has to ask
        INTERSTATE_RETURN_IF_ERROR(
            cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                             static_cast<int>(shape.shared)),
                        name));
    kernel<<<shape.grid, shape.block, shape.shared, exec.stream>>>(std::forward<Arguments>(arguments)...);
    return launch_status(name);
}

/// Shared memory that a block of the current device may use.
inline Status shared_memory_limit(std::size_t& bytes) {
    int device = 0, limit = 0;
    INTERSTATE_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device), "cudaGetDevice"));
    INTERSTATE_RETURN_IF_ERROR(cuda_status(
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute"));
    bytes = static_cast<std::size_t>(limit);
    return {};
}

}  // namespace interstate::inline INTERSTATE_ABI
