// Views: a pointer, extents and strides in elements. Nothing is owned.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include <interstate/complex.hpp>
#include <interstate/dtype.hpp>
#include <interstate/status.hpp>

namespace interstate::inline INTERSTATE_ABI {

/// Strided view of `Rank` axes; strides count elements and may be anything (a transposed tensor is
/// a view, not a copy; 0 broadcasts an input). A view without data means "absent".
template <class T, int Rank>
struct View {
    using value_type = T;
    static constexpr int rank = Rank;

    T* data = nullptr;
    Index extent[Rank] = {};
    Index stride[Rank] = {};

    template <class... I>
        requires(sizeof...(I) == Rank)
    INTERSTATE_HD constexpr T& operator()(I... i) const {
        Index offset = 0;
        int axis = 0;
        ((offset += static_cast<Index>(i) * stride[axis++]), ...);
        return data[offset];
    }

    INTERSTATE_HD constexpr explicit operator bool() const { return data != nullptr; }

    INTERSTATE_HD constexpr Index size() const {
        Index n = 1;
        for (int a = 0; a < Rank; ++a) n *= extent[a];
        return n;
    }

    template <class U>
        requires(std::is_same_v<U, const T> && !std::is_const_v<T>)
    INTERSTATE_HD constexpr operator View<U, Rank>() const {
        View<U, Rank> v;
        v.data = data;
        for (int a = 0; a < Rank; ++a) {
            v.extent[a] = extent[a];
            v.stride[a] = stride[a];
        }
        return v;
    }
};

/// view(p, {B, L, H}): contiguous, last axis fastest.
template <class T, std::size_t Rank>
constexpr View<T, static_cast<int>(Rank)> view(T* data, const Index (&extent)[Rank]) {
    View<T, static_cast<int>(Rank)> v;
    v.data = data;
    Index step = 1;
    for (int a = static_cast<int>(Rank) - 1; a >= 0; --a) {
        v.extent[a] = extent[a];
        v.stride[a] = step;
        step *= extent[a];
    }
    return v;
}

/// view(p, {B, L, H}, {sB, sL, sH}): any strides, in elements.
template <class T, std::size_t Rank>
constexpr View<T, static_cast<int>(Rank)> view(T* data, const Index (&extent)[Rank], const Index (&stride)[Rank]) {
    View<T, static_cast<int>(Rank)> v;
    v.data = data;
    for (std::size_t a = 0; a < Rank; ++a) {
        v.extent[a] = extent[a];
        v.stride[a] = stride[a];
    }
    return v;
}

/// The same for extents that are all of one other integer type (int, std::size_t).
template <class T, std::integral I, std::size_t Rank>
constexpr View<T, static_cast<int>(Rank)> view(T* data, const I (&extent)[Rank]) {
    Index converted[Rank];
    for (std::size_t a = 0; a < Rank; ++a) converted[a] = static_cast<Index>(extent[a]);
    return view(data, converted);
}

/// A step's (B, H, d) as sequences of one token.
template <class T>
constexpr View<T, 4> as_sequences(const View<T, 3>& x) {
    return {x.data, {x.extent[0], 1, x.extent[1], x.extent[2]}, {x.stride[0], 0, x.stride[1], x.stride[2]}};
}
/// The same of (B, H).
template <class T>
constexpr View<T, 3> as_sequences(const View<T, 2>& x) {
    return {x.data, {x.extent[0], 1, x.extent[1]}, {x.stride[0], 0, x.stride[1]}};
}

enum class Need : std::uint8_t { required, optional };

/// Checks one named argument against the extents it must have. A writable view may not have stride 0;
/// that no two of its indices share an element otherwise is the caller's promise.
template <class T, int Rank>
Status check_view(const char* name, const View<T, Rank>& v, const Index (&want)[Rank], Need need) {
    Index elements = 1;
    bool overflow = false;
    for (int a = 0; a < Rank; ++a) {
        if (want[a] < 0)
            return Status::error(StatusCode::invalid_argument, "%s: extent of axis %d is %lld, must not be negative",
                                 name, a, static_cast<long long>(want[a]));
        overflow = __builtin_mul_overflow(elements, want[a], &elements) || overflow;
    }
    if (overflow)
        return Status::error(StatusCode::invalid_argument, "%s: has more than 2^63 elements", name);
    if (!v.data) {
        if (need == Need::optional || elements == 0) return {};
        return Status::error(StatusCode::invalid_argument, "%s: is null, must point to %lld elements", name,
                             static_cast<long long>(elements));
    }
    for (int a = 0; a < Rank; ++a) {
        if (v.extent[a] != want[a])
            return Status::error(StatusCode::invalid_argument, "%s: extent of axis %d is %lld, must be %lld", name, a,
                                 static_cast<long long>(v.extent[a]), static_cast<long long>(want[a]));
        if (!std::is_const_v<T> && elements > 0 && v.stride[a] == 0 && v.extent[a] > 1)
            return Status::error(StatusCode::invalid_argument,
                                 "%s: stride of axis %d is 0, must not be 0 for a tensor that is written", name, a);
    }
    if (reinterpret_cast<std::uintptr_t>(v.data) % alignof(T) != 0)
        return Status::error(StatusCode::invalid_argument, "%s: pointer must be aligned to %zu bytes", name,
                             alignof(T));
    return {};
}

/// Collects the first failure of a walk over the named tensors of a struct (see `visit` in each
/// operator's params.hpp).
struct CheckTensors {
    Status status;
    const char* prefix = "";  // of names in messages
    template <class T, int Rank>
    void operator()(const char* name, const View<T, Rank>& v, const Index (&want)[Rank], Need need) {
        if (!status.ok()) return;
        status = check_view(name, v, want, need);
        if (status.ok() || !*prefix) return;
        char full[64];  // made only where there is something to say
        std::snprintf(full, sizeof full, "%s%s", prefix, name);
        status = check_view(full, v, want, need);
    }
};

/// Finds the first required view that was never set: sizes are read off the views, so this comes before
/// anything about sizes can be said.
struct CheckPresent {
    Status status;
    template <class T, int Rank>
    void operator()(const char* name, const View<T, Rank>& v, const Index (&)[Rank], Need need) {
        if (!status.ok() || need == Need::optional || v.data) return;
        for (int a = 0; a < Rank; ++a)
            if (v.extent[a] != 0 || v.stride[a] != 0) return;  // an empty tensor, which may be null
        status = Status::error(StatusCode::invalid_argument, "%s: is missing, must be a view", name);
    }
};
template <class Tensors, class Shape>
Status check_present(Tensors tensors, const Shape& shape) {
    CheckPresent check;
    visit(tensors, shape, check);
    return check.status;
}

/// Bounds the sizes of a call, so that products of them do not overflow: each below 2^31.
inline Status check_size(const char* name, Index size) {
    if (size >= 0 && size <= 0x7fffffff) return {};
    return Status::error(StatusCode::invalid_argument, "%s is %lld, must be at least 0 and below 2^31", name,
                         static_cast<long long>(size));
}

/// Checks every tensor of a struct of views (taken by value: the walk wants a mutable one). Messages name gradients
/// "grad.q" and their upstream "dout.o", as files of cases do.
template <class Tensors, class Shape>
Status check_tensors(Tensors tensors, const Shape& shape, const char* prefix = "") {
    CheckTensors check{{}, prefix};
    visit(tensors, shape, check);
    return check.status;
}

}  // namespace interstate::inline INTERSTATE_ABI
