// Copies from global to shared memory that a thread starts and waits for later (cp.async).
#pragma once

#include <interstate/cuda/arch.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

/// Starts a copy of 16 bytes, both sides aligned to 16; zeros where not `inside` (`from` is then not read, and may be
/// anything).
__device__ inline void copy_async_16(void* shared, const void* from, bool inside) {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

/// Starts a copy of 8 or 16 bytes, both sides aligned to as many.
template <int bytes>
__device__ inline void copy_async(void* shared, const void* from) {
    const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(from), "n"(bytes) : "memory");
}

/// Asks for the 128 bytes around `from` to be brought into the second-level cache.
__device__ inline void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

/// Ends a group of copies that this thread has started.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/// Waits until at most the last `groups` groups of this thread's copies still fly.
template <int groups>
__device__ void wait_for_all_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

/// Waits for every copy that this thread has started; other threads see them after a barrier.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
