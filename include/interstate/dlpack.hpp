// From DLPack tensors (PyTorch, JAX, CuPy, NumPy) to views, without depending on dlpack.h.
#pragma once

#include <interstate/view.hpp>

namespace interstate::inline INTERSTATE_ABI {

namespace detail {
// DLDataTypeCode of the DLPack ABI.
inline constexpr int dlpack_int = 0, dlpack_uint = 1, dlpack_float = 2, dlpack_bfloat = 4, dlpack_complex = 5;

template <class T>
struct dlpack_type {
    static constexpr int code =
        !std::is_integral_v<T> ? dlpack_float : std::is_signed_v<T> ? dlpack_int : dlpack_uint;
};
template <>
struct dlpack_type<bf16> {
    static constexpr int code = dlpack_bfloat;
};
template <class T>
struct dlpack_type<complex<T>> {
    static constexpr int code = dlpack_complex;
};
}  // namespace detail

/// Makes `out` a view of a DLTensor (any dlpack.h version: only the ABI's field names are used).
/// The rank and the dtype must match T, and the tensor must be on the device the executor reads: 1 is
/// kDLCPU, 2 kDLCUDA. It stays the caller's.
template <class T, int Rank, class DLTensor>
Status view_from_dlpack(const char* name, const DLTensor& tensor, View<T, Rank>& out, int device_type = 1) {
    using Element = std::remove_cv_t<T>;
    constexpr int bits = static_cast<int>(sizeof(Element)) * 8;
    if (static_cast<int>(tensor.device.device_type) != device_type)
        return Status::error(StatusCode::invalid_argument, "%s: DLPack device type is %d, must be %d", name,
                             static_cast<int>(tensor.device.device_type), device_type);
    if (tensor.ndim != Rank)
        return Status::error(StatusCode::invalid_argument, "%s: has %d axes, must have %d", name,
                             static_cast<int>(tensor.ndim), Rank);
    if (static_cast<int>(tensor.dtype.code) != detail::dlpack_type<Element>::code ||
        static_cast<int>(tensor.dtype.bits) != bits || static_cast<int>(tensor.dtype.lanes) != 1)
        return Status::error(StatusCode::invalid_argument,
                             "%s: DLPack dtype is code %d, %d bits, %d lanes, must be code %d, %d bits, 1 lane", name,
                             static_cast<int>(tensor.dtype.code), static_cast<int>(tensor.dtype.bits),
                             static_cast<int>(tensor.dtype.lanes), detail::dlpack_type<Element>::code, bits);
    out.data = tensor.data ? reinterpret_cast<T*>(static_cast<char*>(tensor.data) + tensor.byte_offset) : nullptr;
    Index step = 1;
    for (int a = Rank - 1; a >= 0; --a) {
        out.extent[a] = tensor.shape[a];
        out.stride[a] = tensor.strides ? tensor.strides[a] : step;  // no strides: row-major
        step *= out.extent[a];
    }
    return {};
}

}  // namespace interstate::inline INTERSTATE_ABI
