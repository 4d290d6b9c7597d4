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
    /// The kernel calls device::wait_for_previous_kernel() before it touches memory that an earlier kernel may still use,
    /// so its blocks may start while the last ones of that kernel run.
    bool overlaps = false;
};

namespace device {

/// Waits until the kernels before this one are complete and what they wrote can be seen; nothing where kernels do not
/// overlap. Every thread calls it.
__device__ inline void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
/// Lets blocks of the next kernel start where this one leaves room, if that kernel overlaps. After
/// wait_for_previous_kernel(): the next kernel may then take what was there before this one for complete.
__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace device

/// Shared memory that a block of the current device may use.
inline Status shared_memory_limit(std::size_t& bytes) {
    int device = 0, limit = 0;
    INTERSTATE_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device), "cudaGetDevice"));
    INTERSTATE_RETURN_IF_ERROR(cuda_status(
        cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute"));
    bytes = static_cast<std::size_t>(limit);
    return {};
}

/// Launches `kernel` on the executor's stream; `name` stands in the message of an error. A grid without
/// blocks is no work.
template <class... Parameters, class... Arguments>
Status launch(const cuda& exec, const char* name, void (*kernel)(Parameters...), const LaunchShape& shape,
              Arguments&&... arguments) {
    if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return {};
    cudaFuncAttributes attributes{};
    const bool asks = shape.shared > 32 * 1024;  // a kernel has to ask for more than 48 KiB, its static memory included
    if (asks || shape.overlaps) INTERSTATE_RETURN_IF_ERROR(cuda_status(cudaFuncGetAttributes(&attributes, kernel), name));
    if (asks) {
        std::size_t limit = 0;
        INTERSTATE_RETURN_IF_ERROR(shared_memory_limit(limit));
        if (shape.shared + attributes.sharedSizeBytes > limit)
            return Status::error(StatusCode::device_error, "%s: wants %zu bytes of shared memory a block, the device has %zu", name,
                                 shape.shared + attributes.sharedSizeBytes, limit);
        // For all there is: the attribute belongs to the kernel, not to this launch, and other threads launch it too.
        INTERSTATE_RETURN_IF_ERROR(cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                                    static_cast<int>(limit - attributes.sharedSizeBytes)),
                                               name));
    }
    if (!shape.overlaps) {
        kernel<<<shape.grid, shape.block, shape.shared, exec.stream>>>(std::forward<Arguments>(arguments)...);
        return launch_status(name);
    }
    // Only code made for 9.0 or later waits; the driver may have chosen other code for this device.
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.shared;
    config.stream = exec.stream;
    config.attrs = &overlap;
    config.numAttrs = attributes.ptxVersion >= 90 ? 1 : 0;
    INTERSTATE_RETURN_IF_ERROR(cuda_status(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name));
    return launch_status(name);
}

}  // namespace interstate::inline INTERSTATE_ABI
