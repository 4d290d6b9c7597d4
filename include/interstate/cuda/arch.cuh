// The namespace kernels live in, and launch errors as Status.
//
// Two translation units built for different architectures must not share one kernel symbol: the linker
// would keep either, and the other's device code would be missing at run time. So kernels, and every function
// that names one, up to the calls of the public headers, sit in an inline namespace that spells the architecture
// list, e.g. sm_800_900a.
#pragma once

#if !defined(__CUDACC__)
#error "interstate: .cuh headers need nvcc (or clang in CUDA mode); the .hpp headers do not."
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "interstate: kernels need compute capability 8.0: pass -arch=sm_80 or newer (nvcc's own default is older)"
#endif

#include <cuda_runtime.h>

#include <interstate/status.hpp>

// Set by the CMake target when sm_90a is among the architectures: neither the host pass nor
// __CUDA_ARCH_LIST__ can tell 90 from 90a.
#if !defined(INTERSTATE_HAS_SM90A)
#define INTERSTATE_HAS_SM90A 0
#endif

#define INTERSTATE_PASTE_(a, b) a##b
#define INTERSTATE_PASTE(a, b) INTERSTATE_PASTE_(a, b)
#define INTERSTATE_ARCHS_1(a) _##a
#define INTERSTATE_ARCHS_2(a, b) _##a##_##b
#define INTERSTATE_ARCHS_3(a, b, c) _##a##_##b##_##c
#define INTERSTATE_ARCHS_4(a, b, c, d) _##a##_##b##_##c##_##d
#define INTERSTATE_ARCHS_5(a, b, c, d, e) _##a##_##b##_##c##_##d##_##e
#define INTERSTATE_ARCHS_6(a, b, c, d, e, f) _##a##_##b##_##c##_##d##_##e##_##f
#define INTERSTATE_ARCHS_7(a, b, c, d, e, f, g) _##a##_##b##_##c##_##d##_##e##_##f##_##g
#define INTERSTATE_ARCHS_8(a, ...) INTERSTATE_PASTE(_##a, INTERSTATE_ARCHS_7(__VA_ARGS__))
#define INTERSTATE_ARCHS_9(a, b, ...) INTERSTATE_PASTE(_##a##_##b, INTERSTATE_ARCHS_7(__VA_ARGS__))
#define INTERSTATE_ARCHS_10(a, b, c, ...) INTERSTATE_PASTE(_##a##_##b##_##c, INTERSTATE_ARCHS_7(__VA_ARGS__))
#define INTERSTATE_ARCHS_PICK(a, b, c, d, e, f, g, h, i, j, NAME, ...) NAME
#define INTERSTATE_ARCHS(...)                                                                                \
    INTERSTATE_ARCHS_PICK(__VA_ARGS__, INTERSTATE_ARCHS_10, INTERSTATE_ARCHS_9, INTERSTATE_ARCHS_8,          \
                          INTERSTATE_ARCHS_7, INTERSTATE_ARCHS_6,                                            \
                          INTERSTATE_ARCHS_5, INTERSTATE_ARCHS_4, INTERSTATE_ARCHS_3, INTERSTATE_ARCHS_2,    \
                          INTERSTATE_ARCHS_1)                                                                \
    (__VA_ARGS__)
#if defined(__CUDA_ARCH_LIST__)
#define INTERSTATE_SM_LIST INTERSTATE_PASTE(sm, INTERSTATE_ARCHS(__CUDA_ARCH_LIST__))
#else
#define INTERSTATE_SM_LIST sm
#endif
#if INTERSTATE_HAS_SM90A
#define INTERSTATE_KERNELS INTERSTATE_PASTE(INTERSTATE_SM_LIST, a)
#else
#define INTERSTATE_KERNELS INTERSTATE_SM_LIST
#endif

namespace interstate::inline INTERSTATE_ABI {

/// A CUDA runtime error as a Status; `what` names the call or kernel.
inline Status cuda_status(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return {};
    return Status::error(StatusCode::device_error, "%s: %s (%s)", what, cudaGetErrorName(error),
                         cudaGetErrorString(error));
}

/// An error that was there before a call, so that it is not taken for the call's own.
inline Status pending_status() { return cuda_status(cudaPeekAtLastError(), "an earlier CUDA call, unchecked"); }

/// Errors of the launch that was just made (asynchronous ones surface when the stream is synchronised).
inline Status launch_status(const char* kernel) { return cuda_status(cudaPeekAtLastError(), kernel); }

}  // namespace interstate::inline INTERSTATE_ABI
