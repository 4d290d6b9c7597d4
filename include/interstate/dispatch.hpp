// From sizes known at run time to kernels compiled for a few padded ones.
#pragma once

#include <type_traits>

#include <interstate/dtype.hpp>

namespace interstate::inline INTERSTATE_ABI {

/// Calls f(std::integral_constant<int, P>) with the first of the ascending Padded sizes that holds
/// n; with 0 when n is larger than all of them, which asks for the kernel of general size. An
/// integral_constant converts to int, so the same code takes compile-time and run-time sizes.
template <int... Padded, class F>
auto dispatch_size(Index n, F&& f) {
    using R = decltype(f(std::integral_constant<int, 0>{}));
    R result{};
    const bool found = ((n <= Padded ? (result = f(std::integral_constant<int, Padded>{}), true) : false) || ...);
    if (!found) result = f(std::integral_constant<int, 0>{});
    return result;
}

/// Calls f(T{}) with the storage type that a DType names.
template <class F>
auto dispatch_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::f64: return f(f64{});
        case DType::f16: return f(f16{});
        case DType::bf16: return f(bf16{});
        case DType::f32: break;
    }
    return f(f32{});
}

INTERSTATE_HD constexpr Index ceil_div(Index a, Index b) { return (a + b - 1) / b; }

}  // namespace interstate::inline INTERSTATE_ABI
