// Storage to and from accumulator on the device, one instruction each (the types' own conversions are
// integer arithmetic that every compiler knows).
#pragma once

#include <interstate/cuda/arch.cuh>
#include <interstate/dtype.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

template <class A, class T>
__device__ A load_as(T x) {
    if constexpr (std::is_same_v<A, T>) {
        return x;
    } else if constexpr (std::is_same_v<T, f16>) {
        float y;
        asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
        return y;
    } else {
        return static_cast<A>(x);  // bf16 is a shift
    }
}

template <class T, class A>
__device__ T store_as(A x) {
    if constexpr (std::is_same_v<A, T>) {
        return x;
    } else if constexpr (std::is_same_v<T, f16>) {
        f16 y;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    } else if constexpr (std::is_same_v<T, bf16>) {
        bf16 y;
        asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
        return y;
    } else {
        return static_cast<T>(x);
    }
}

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
