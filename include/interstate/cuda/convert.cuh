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

/// Hides where a number, or a pointer to global memory, comes from: it is not computed again wherever it is used, nor is what a loop computes of it
/// computed before the loop, where it would take registers from everything in it.
__device__ inline int kept(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
template <class E>
__device__ E* kept(E* p) {
    asm volatile("" : "+l"(p));
    __builtin_assume(__isGlobal(p));
    return p;
}

/// 2^x.
__device__ inline float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// The smaller of two, and NaN where either is, which fminf drops.
__device__ inline float least_of(float x, float y) {
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(x), "f"(y));
    return least;
}

/// Two elements that lie side by side, the first in the lower half of a register.
template <class T>
using Pair = std::conditional_t<sizeof(T) == 2, std::uint32_t, std::conditional_t<sizeof(T) == 4, float2, double2>>;

template <class T>
__device__ Pair<T> pack(acc_t<T> x, acc_t<T> y) {
    if constexpr (std::is_same_v<T, f16>) {
        std::uint32_t pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
        return pair;
    } else if constexpr (std::is_same_v<T, bf16>) {
        std::uint32_t pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
        return pair;
    } else {
        return {x, y};
    }
}
template <class T>
__device__ void unpack(const Pair<T>& pair, acc_t<T>& x, acc_t<T>& y) {
    if constexpr (std::is_same_v<T, bf16>) {
        x = __uint_as_float(pair << 16);
        y = __uint_as_float(pair & 0xffff0000u);
    } else if constexpr (std::is_same_v<T, f16>) {
        asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
            : "=f"(x), "=f"(y)
            : "r"(pair));
    } else {
        x = pair.x;
        y = pair.y;
    }
}

/// n elements of a row, `stride` apart, of which `count` are there; zeros for those that are not. `wide`: all are there, side by side, and
/// begin at 16 bytes. `constant`: no thread of the kernel writes them, so that they may come before what was written earlier.
template <bool wide, bool constant, int n, class T>
__device__ void load_row(const T* from, Index stride, int count, acc_t<T> (&x)[n]) {
    if constexpr (wide) {
        constexpr int pairs = 16 / static_cast<int>(sizeof(Pair<T>));
        struct alignas(16) Chunk {
            Pair<T> pair[pairs];
        };
#pragma unroll
        for (int i = 0; i < n; i += 2 * pairs) {
            const auto* const at = reinterpret_cast<const int4*>(from + i);
            const auto chunk = __builtin_bit_cast(Chunk, constant ? __ldg(at) : *at);
#pragma unroll
            for (int k = 0; k < pairs; ++k) unpack<T>(chunk.pair[k], x[i + 2 * k], x[i + 2 * k + 1]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i) x[i] = i < count ? load_as<acc_t<T>>(from[i * stride]) : acc_t<T>(0);
    }
}
/// The way back, of those that are there.
template <bool wide, int n, class T>
__device__ void store_row(T* to, Index stride, int count, const acc_t<T> (&x)[n]) {
    if constexpr (wide) {
        constexpr int pairs = 16 / static_cast<int>(sizeof(Pair<T>));
        struct alignas(16) Chunk {
            Pair<T> pair[pairs];
        };
#pragma unroll
        for (int i = 0; i < n; i += 2 * pairs) {
            Chunk chunk;
#pragma unroll
            for (int k = 0; k < pairs; ++k) chunk.pair[k] = pack<T>(x[i + 2 * k], x[i + 2 * k + 1]);
            *reinterpret_cast<Chunk*>(to + i) = chunk;
        }
    } else {
#pragma unroll
        for (int i = 0; i < n; ++i)
            if (i < count) to[i * stride] = store_as<T>(x[i]);
    }
}

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
