// The four storage dtypes, one name each on CPU and GPU, and what each of them computes with.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include <interstate/config.hpp>

namespace interstate::inline INTERSTATE_ABI {

using Index = std::int64_t;

enum class DType : std::uint8_t { f64, f32, f16, bf16 };

using f64 = double;
using f32 = float;

namespace detail {

/// Nearest float with the lowest bit set when inexact, so that a second rounding to 16 bits is the
/// only one that counts (a plain cast through float would round twice).
INTERSTATE_HD constexpr float round_to_odd(double x) {
    const float f = static_cast<float>(x);
    if (static_cast<double>(f) == x || x != x) return f;
    auto bits = __builtin_bit_cast(std::uint32_t, f);
    if ((bits & 0x7fffffffu) == 0x7f800000u) return f;  // overflow stays infinite
    const bool away = (x > 0) ? static_cast<double>(f) > x : static_cast<double>(f) < x;
    if (away) bits -= 1;  // truncate towards zero, then make it odd
    return __builtin_bit_cast(float, bits | 1u);
}

INTERSTATE_HD constexpr std::uint16_t bf16_bits(float x) {
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

INTERSTATE_HD constexpr float bf16_value(std::uint16_t b) {
    return __builtin_bit_cast(float, static_cast<std::uint32_t>(b) << 16);
}

INTERSTATE_HD constexpr std::uint16_t f16_bits(float x) {
    const auto bits = __builtin_bit_cast(std::uint32_t, x);
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    std::uint32_t a = bits & 0x7fffffffu;
    if (a > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);
    if (a >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);  // rounds to infinity
    if (a < 0x38800000u) {
        // Subnormal: adding 0.5 makes the float adder do the rounding at 2^-24.
        const float v = __builtin_bit_cast(float, a) + 0.5f;
        return static_cast<std::uint16_t>(sign | (__builtin_bit_cast(std::uint32_t, v) - 0x3f000000u));
    }
    a += 0xfffu + ((a >> 13) & 1u) - 0x38000000u;
    return static_cast<std::uint16_t>(sign | (a >> 13));
}

INTERSTATE_HD constexpr float f16_value(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
    const std::uint32_t a = static_cast<std::uint32_t>(h & 0x7fffu) << 13;
    if (a >= 0x0f800000u) return __builtin_bit_cast(float, sign | a | 0x7f800000u);
    if (a < 0x00800000u) {
        // Subnormal: the mantissa counts units of 2^-24.
        const float v = static_cast<float>(a >> 13) * 5.9604644775390625e-8f;
        return sign ? -v : v;
    }
    return __builtin_bit_cast(float, sign | (a + 0x38000000u));
}

}  // namespace detail

/// bfloat16: storage only; arithmetic happens in float. Rounds to nearest even.
struct bf16 {
    std::uint16_t bits;
    bf16() = default;
    INTERSTATE_HD constexpr explicit bf16(float x) : bits(detail::bf16_bits(x)) {}
    INTERSTATE_HD constexpr explicit bf16(double x) : bits(detail::bf16_bits(detail::round_to_odd(x))) {}
    INTERSTATE_HD constexpr operator float() const { return detail::bf16_value(bits); }
};

/// IEEE binary16: storage only; arithmetic happens in float. Rounds to nearest even.
struct f16 {
    std::uint16_t bits;
    f16() = default;
    INTERSTATE_HD constexpr explicit f16(float x) : bits(detail::f16_bits(x)) {}
    INTERSTATE_HD constexpr explicit f16(double x) : bits(detail::f16_bits(detail::round_to_odd(x))) {}
    INTERSTATE_HD constexpr operator float() const { return detail::f16_value(bits); }
};

constexpr const char* to_string(DType t) {
    switch (t) {
        case DType::f64: return "f64";
        case DType::f32: return "f32";
        case DType::f16: return "f16";
        case DType::bf16: return "bf16";
    }
    return "?";
}

namespace detail {
template <class T>
struct dtype_traits;
template <>
struct dtype_traits<f64> {
    static constexpr DType dtype = DType::f64;
    using accumulator = double;
};
template <>
struct dtype_traits<f32> {
    static constexpr DType dtype = DType::f32;
    using accumulator = float;
};
template <>
struct dtype_traits<f16> {
    static constexpr DType dtype = DType::f16;
    using accumulator = float;
};
template <>
struct dtype_traits<bf16> {
    static constexpr DType dtype = DType::bf16;
    using accumulator = float;
};
}  // namespace detail

template <class T>
inline constexpr DType dtype_of = detail::dtype_traits<std::remove_cv_t<T>>::dtype;

/// What storage T accumulates in, and the dtype of its recurrent states and saved statistics:
/// double for f64, float for f32, f16 and bf16.
template <class T>
using acc_t = typename detail::dtype_traits<std::remove_cv_t<T>>::accumulator;

/// Default dtype of the parameters beside storage T (they are f32 or f64 whatever the storage).
template <class T>
using param_t = acc_t<T>;

}  // namespace interstate::inline INTERSTATE_ABI
