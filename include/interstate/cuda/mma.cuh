// Tensor-core products of one warp, c (16 x 8) += a (16 x 8) b (8 x 8), for what accumulates in float or
// double: the one tile shape both have, so that a kernel is written once.
//
// Who holds what, with group = lane / 4 and quad = lane % 4 (the layout of mma.m16n8k8):
//     a[0] (group, quad)      a[1] (group + 8, quad)      a[2] (group, quad + 4)      a[3] (group + 8, quad + 4)
//     b[0] (quad, group)      b[1] (quad + 4, group)
//     c[0], c[1] (group, 2 quad + {0, 1})                 c[2], c[3] (group + 8, 2 quad + {0, 1})
#pragma once

#include <cstdint>

#include <interstate/cuda/arch.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

/// How exact the factors of a float product are: `exact` splits each into two tf32 numbers and takes three
/// of the four products (22 bits), `rounded` takes one product of factors rounded to 11 bits. Products of
/// double are double.
enum class Precision { exact, rounded };

/// n factors of a product as the tensor cores take them. `set` takes any number, `set_representable` one that
/// `rounded` need not round (16-bit storage, or the result of `representable`).
template <class A, Precision precision, int n>
struct Factors;

template <Precision precision, int n>
struct Factors<double, precision, n> {
    double value[n];
    __device__ void set(int i, double x) { value[i] = x; }
    __device__ void set_representable(int i, double x) { value[i] = x; }
    /// Takes element j of factors that have been made already.
    template <int m>
    __device__ void take(int i, const Factors<double, precision, m>& from, int j) {
        value[i] = from.value[j];
    }
};

template <int n>
struct Factors<float, Precision::rounded, n> {
    std::uint32_t value[n];
    __device__ void set(int i, float x) { asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(value[i]) : "f"(x)); }
    __device__ void set_representable(int i, float x) { value[i] = __float_as_uint(x); }
    template <int m>
    __device__ void take(int i, const Factors<float, Precision::rounded, m>& from, int j) {
        value[i] = from.value[j];
    }
};

template <int n>
struct Factors<float, Precision::exact, n> {
    std::uint32_t high[n], low[n];
    // The unit ignores the 13 lowest bits: the high part is cut, and what it misses is the low part.
    __device__ void set(int i, float x) {
        high[i] = __float_as_uint(x) & 0xffffe000u;
        low[i] = __float_as_uint(x - __uint_as_float(high[i]));
    }
    __device__ void set_representable(int i, float x) { set(i, x); }
    template <int m>
    __device__ void take(int i, const Factors<float, Precision::exact, m>& from, int j) {
        high[i] = from.high[j];
        low[i] = from.low[j];
    }
};

/// The number that `rounded` would make of x, once and for all.
template <Precision precision, class A>
__device__ A representable(A x) {
    if constexpr (precision == Precision::rounded && sizeof(A) == 4) {
        std::uint32_t bits;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
        return __uint_as_float(bits);
    } else {
        return x;
    }
}

__device__ inline void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_f64(double& c0, double& c1, double a, double b) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+d"(c0), "+d"(c1)
        : "d"(a), "d"(b));
}

template <Precision precision>
__device__ inline void multiply_add(double (&c)[4], const Factors<double, precision, 4>& a,
                                    const Factors<double, precision, 2>& b) {
    mma_f64(c[0], c[1], a.value[0], b.value[0]);
    mma_f64(c[2], c[3], a.value[1], b.value[0]);
    mma_f64(c[0], c[1], a.value[2], b.value[1]);
    mma_f64(c[2], c[3], a.value[3], b.value[1]);
}
__device__ inline void multiply_add(float (&c)[4], const Factors<float, Precision::rounded, 4>& a,
                                    const Factors<float, Precision::rounded, 2>& b) {
    mma_tf32(c, a.value, b.value);
}
__device__ inline void multiply_add(float (&c)[4], const Factors<float, Precision::exact, 4>& a,
                                    const Factors<float, Precision::exact, 2>& b) {
    mma_tf32(c, a.low, b.high);  // the small products first
    mma_tf32(c, a.high, b.low);
    mma_tf32(c, a.high, b.high);
}

/// Sums of `steps` products, several at once: f(k, add) calls add(c, a, b) for the k-th product of each sum. The
/// instructions of one sum, which wait for each other, are issued as far apart as the sums allow.
template <int steps, class F>
__device__ void multiply_add_each(F&& f) {
#pragma unroll
    for (int k = 0; k < steps; ++k) {
        f(k, [](auto& c, const auto& a, const auto& b) {
            if constexpr (requires { a.low; })
                mma_tf32(c, a.low, b.high);
            else
                multiply_add(c, a, b);
        });
        f(k, [](auto& c, const auto& a, const auto& b) {
            if constexpr (requires { a.low; }) mma_tf32(c, a.high, b.low);
        });
        f(k, [](auto& c, const auto& a, const auto& b) {
            if constexpr (requires { a.low; }) mma_tf32(c, a.high, b.high);
        });
    }
}

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
