// Tensor-core products of one warp, c (16 x 8) += a (16 x depth) b (depth x 8), for what accumulates in float
// or double, under one description, so that a kernel is written once.
//
// Who holds what, with group = lane / 4 and quad = lane % 4: a lane has columns k of `a`, which are rows of `b`,
// in pairs (one where depth is 8, two where it is 16). Which k they are is up to the caller, as long as a and b
// agree: a sum does not mind its order.
//     a: rows group (0) and group + 8 (1), pairs of quad
//     b: column group, pairs of quad
//     c[0], c[1]: (group, 2 quad + {0, 1})      c[2], c[3]: (group + 8, 2 quad + {0, 1})
#pragma once

#include <cstdint>

#include <interstate/cuda/convert.cuh>
#include <interstate/dtype.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

/// What a float product makes of its factors: `exact` splits each into two tf32 numbers and takes three of the
/// four products (22 bits), `cut` drops what tf32 does not have (11 bits remain), `half` rounds to f16 (11 bits, and its
/// range), `bfloat` to bf16 (8 bits). Products of double are double.
enum class Precision { exact, cut, half, bfloat };

template <Precision precision>
inline constexpr bool packs = precision == Precision::half || precision == Precision::bfloat;
template <Precision precision>
inline constexpr int depth = packs<precision> ? 16 : 8;
/// What the pairs of a product that packs are made of.
template <Precision precision>
using Packed = std::conditional_t<precision == Precision::half, f16, bf16>;
template <Precision precision>
inline constexpr int k_pairs = depth<precision> / 8;

/// Rounds what becomes a factor, ties to even: where the unit cuts low bits, cutting would be a bias, and so would ties away from zero,
/// which sums of short numbers are full of.
template <Precision precision>
__device__ float rounded(float x) {
    if constexpr (precision == Precision::cut) {
        std::uint32_t y;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
        asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
#else
        y = __float_as_uint(x);
        if (x == x) y = (y + 0xfffu + (y >> 13 & 1u)) & 0xffffe000u;
#endif
        return __uint_as_float(y);
    }
    return x;
}

/// A power of two as factors are multiplied by it, which rounds nothing that does not leave the range.
template <Precision precision>
struct Power {
    std::uint32_t word;  // a pair of them where the precision packs
    __device__ explicit Power(float power) {
        if constexpr (packs<precision>)
            word = pack<Packed<precision>>(power, power);
        else
            word = __float_as_uint(power);
    }
};

/// A lane's factors of a product: `rows` is 2 for a, 1 for b.
template <class A, Precision precision, int rows>
struct Factors;

template <Precision precision, int rows>
struct Factors<double, precision, rows> {
    double value[2 * rows];
    __device__ void set(int row, int, double x, double y) {
        value[row] = x;
        value[row + rows] = y;
    }
    /// Column k of b as a row of a.
    __device__ void take_row(int row, const Factors<double, precision, 1>& b) {
        value[row] = b.value[0];
        value[row + rows] = b.value[1];
    }
};

template <int rows>
struct Factors<float, Precision::cut, rows> {
    std::uint32_t value[2 * rows];
    // The unit ignores the 13 lowest bits.
    __device__ void set(int row, int, float x, float y) {
        value[row] = __float_as_uint(x);
        value[row + rows] = __float_as_uint(y);
    }
    __device__ void take_row(int row, const Factors<float, Precision::cut, 1>& b) {
        value[row] = b.value[0];
        value[row + rows] = b.value[1];
    }
};

template <int rows>
struct Factors<float, Precision::exact, rows> {
    std::uint32_t high[2 * rows], low[2 * rows];
    __device__ void set(int row, int, float x, float y) {
        split(row, x);
        split(row + rows, y);
    }
    __device__ void take_row(int row, const Factors<float, Precision::exact, 1>& b) {
        high[row] = b.high[0];
        low[row] = b.low[0];
        high[row + rows] = b.high[1];
        low[row + rows] = b.low[1];
    }
    __device__ void multiply(Power<Precision::exact> by) {
#pragma unroll
        for (int i = 0; i < 2 * rows; ++i) {
            high[i] = __float_as_uint(__uint_as_float(high[i]) * __uint_as_float(by.word));
            low[i] = __float_as_uint(__uint_as_float(low[i]) * __uint_as_float(by.word));
        }
    }
    // The high part is cut, and what it misses is the low part.
    __device__ void split(int i, float x) {
        high[i] = __float_as_uint(x) & 0xffffe000u;
        low[i] = __float_as_uint(x - __uint_as_float(high[i]));
    }
};

template <Precision precision, int rows>
    requires(packs<precision>)
struct Factors<float, precision, rows> {
    std::uint32_t word[2 * rows];  // a pair each
    __device__ void set(int row, int pair, float x, float y) { word[row + rows * pair] = pack<Packed<precision>>(x, y); }
    __device__ void set_packed(int row, int pair, std::uint32_t xy) { word[row + rows * pair] = xy; }
    __device__ void multiply(Power<precision> by) {
#pragma unroll
        for (std::uint32_t& x : word) {
            // Plus -0: before 9.0, bfloat16 has fused products only.
            if constexpr (precision == Precision::half)
                asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(x) : "r"(by.word), "r"(0x80008000u));
            else
                asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(x) : "r"(by.word), "r"(0x80008000u));
        }
    }
    __device__ void take_row(int row, const Factors<float, precision, 1>& b) {
        word[row] = b.word[0];
        word[row + rows] = b.word[1];
    }
};

__device__ inline void mma_tf32(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_bf16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_f16(float (&c)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_f64(double& c0, double& c1, double a, double b) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
        : "+d"(c0), "+d"(c1)
        : "d"(a), "d"(b));
}

template <Precision precision>
__device__ void multiply_add(double (&c)[4], const Factors<double, precision, 2>& a,
                             const Factors<double, precision, 1>& b) {
    mma_f64(c[0], c[1], a.value[0], b.value[0]);
    mma_f64(c[2], c[3], a.value[1], b.value[0]);
    mma_f64(c[0], c[1], a.value[2], b.value[1]);
    mma_f64(c[2], c[3], a.value[3], b.value[1]);
}
__device__ inline void multiply_add(float (&c)[4], const Factors<float, Precision::cut, 2>& a,
                                    const Factors<float, Precision::cut, 1>& b) {
    mma_tf32(c, a.value, b.value);
}
template <Precision precision>
    requires(packs<precision>)
__device__ void multiply_add(float (&c)[4], const Factors<float, precision, 2>& a, const Factors<float, precision, 1>& b) {
    if constexpr (precision == Precision::half)
        mma_f16(c, a.word, b.word);
    else
        mma_bf16(c, a.word, b.word);
}
__device__ inline void multiply_add(float (&c)[4], const Factors<float, Precision::exact, 2>& a,
                                    const Factors<float, Precision::exact, 1>& b) {
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

/// Four 8 x 8 matrices of 16-bit elements from shared memory; lane i has the address of row i % 8 (16 bytes) of
/// matrix i / 8. A lane gets of each (row group, columns 2 quad + {0, 1}); transposed, (rows 2 quad + {0, 1},
/// column group).
template <bool transposed>
__device__ void load_matrices(std::uint32_t (&x)[4], unsigned row) {
    if constexpr (transposed)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(row)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                     : "r"(row)
                     : "memory");
}
template <bool transposed>
__device__ void load_matrices(std::uint32_t (&x)[4], const void* row) {
    load_matrices<transposed>(x, static_cast<unsigned>(__cvta_generic_to_shared(row)));
}

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
