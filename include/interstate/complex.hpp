// A complex number as a plain (re, im) pair: the layout of std::complex, float2 and torch.complex64,
// usable in device code, and without the NaN recovery that makes std::complex products slow.
#pragma once

#include <complex>

#include <interstate/dtype.hpp>

namespace interstate::inline INTERSTATE_ABI {

template <class T>
struct complex {
    T re;
    T im;
};

template <class T>
INTERSTATE_HD constexpr complex<T> operator+(complex<T> a, complex<T> b) {
    return {a.re + b.re, a.im + b.im};
}
template <class T>
INTERSTATE_HD constexpr complex<T> operator-(complex<T> a, complex<T> b) {
    return {a.re - b.re, a.im - b.im};
}
template <class T>
INTERSTATE_HD constexpr complex<T> operator*(complex<T> a, complex<T> b) {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
}
template <class T>
INTERSTATE_HD constexpr complex<T> operator*(T a, complex<T> b) {
    return {a * b.re, a * b.im};
}
template <class T>
INTERSTATE_HD constexpr complex<T>& operator+=(complex<T>& a, complex<T> b) {
    a.re += b.re;
    a.im += b.im;
    return a;
}
template <class T>
INTERSTATE_HD constexpr complex<T> conj(complex<T> a) {
    return {a.re, -a.im};
}
/// Re(conj(a) b): the real inner product of two complex numbers.
template <class T>
INTERSTATE_HD constexpr T dot(complex<T> a, complex<T> b) {
    return a.re * b.re + a.im * b.im;
}
template <class T>
INTERSTATE_HD constexpr complex<T> reciprocal(complex<T> a) {
    const T n = a.re * a.re + a.im * a.im;
    return {a.re / n, -a.im / n};
}
template <class U, class T>
INTERSTATE_HD constexpr complex<U> cast(complex<T> a) {
    return {static_cast<U>(a.re), static_cast<U>(a.im)};
}

/// std::complex arrays are used as they are.
template <class T>
complex<T>* as_complex(std::complex<T>* p) {
    static_assert(sizeof(complex<T>) == sizeof(std::complex<T>));
    return reinterpret_cast<complex<T>*>(p);
}
template <class T>
const complex<T>* as_complex(const std::complex<T>* p) {
    return reinterpret_cast<const complex<T>*>(p);
}

}  // namespace interstate::inline INTERSTATE_ABI
