// Sines and cosines of vectors, for phases.
#pragma once

#include <cmath>
#include <iterator>

#include <interstate/cpu/simd.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace random_features::detail {

/// Constants of a reduction to [-pi/4, pi/4] and of polynomials there. pi/2 comes in three parts, of which products with
/// counts up to that of `limit` are exact. Polynomials of the Cephes library (Moshier).
template <class A>
struct SinCos;
template <>
struct SinCos<float> {
    static constexpr float limit = 8192.0f, shifter = 12582912.0f;
    static constexpr float parts[] = {1.5703125f, 4.837512969970703125e-4f, 7.54978995489188216e-8f};
    static constexpr float sine[] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
    static constexpr float cosine[] = {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f};
};
template <>
struct SinCos<double> {
    static constexpr double limit = 1e6, shifter = 6755399441055744.0;
    static constexpr double parts[] = {1.57079625129699707031, 7.54978941586159635335e-8, 5.39030285815811905290e-15};
    static constexpr double sine[] = {1.58962301576546568060e-10, -2.50507477628578072866e-8, 2.75573136213857245213e-6,
                                      -1.98412698295895385996e-4, 8.33333333332211858878e-3, -1.66666666666666307295e-1};
    static constexpr double cosine[] = {-1.13585365213876817300e-11, 2.08757008419747316778e-9, -2.75573141792967388112e-7,
                                        2.48015872888517045348e-5,   -1.38888888888730564116e-3, 4.16666666666665929218e-2};
};

/// Within 2 ulp of 1. Beyond `limit` the library's functions are called, one lane after the other.
template <class A, int N>
INTERSTATE_INLINE void sincos(const simd::Vec<A, N>& x, simd::Vec<A, N>& sine, simd::Vec<A, N>& cosine) {
    using V = simd::Vec<A, N>;
    using Int = typename V::int_type;
    using C = SinCos<A>;
    const V size = simd::max(x, simd::broadcast<V>(A(0)) - x);
    if (simd::reduce_max(size) > C::limit) {
        A in[N], out[2][N];
        simd::store(in, x);
        for (int i = 0; i < N; ++i) out[0][i] = std::sin(in[i]), out[1][i] = std::cos(in[i]);
        sine = simd::load<V>(out[0]);
        cosine = simd::load<V>(out[1]);
        return;
    }
    const V shifter = simd::broadcast<V>(C::shifter);
    const V t = simd::fma(x, simd::broadcast<V>(A(0.63661977236758134308)), shifter);
    const V n = t - shifter;
    V r = x;
    for (const A part : C::parts) r = simd::fnma(n, simd::broadcast<V>(part), r);
    const V z = r * r, one = simd::broadcast<V>(A(1));
    V s = simd::broadcast<V>(C::sine[0]), c = simd::broadcast<V>(C::cosine[0]);
    for (std::size_t i = 1; i < std::size(C::sine); ++i) {
        s = simd::fma(s, z, simd::broadcast<V>(C::sine[i]));
        c = simd::fma(c, z, simd::broadcast<V>(C::cosine[i]));
    }
    s = simd::fma(s * z, r, r);
    c = simd::fma(c * z, z, simd::fnma(z, simd::broadcast<V>(A(0.5)), one));
    // A quarter turn swaps them; the signs are those of the quadrant, which is in the low bits of t.
    Int q;
    std::memcpy(&q, &t.v, sizeof q);
    const Int odd = -(q & 1);
    constexpr int top = sizeof(A) * 8 - 2;  // bit 1 to the sign
    Int si, ci;
    std::memcpy(&si, &s.v, sizeof si);
    std::memcpy(&ci, &c.v, sizeof ci);
    const Int sine_bits = ((odd & ci) | (~odd & si)) ^ ((q & 2) << top);
    const Int cosine_bits = ((odd & si) | (~odd & ci)) ^ (((q + 1) & 2) << top);
    std::memcpy(&sine.v, &sine_bits, sizeof sine_bits);
    std::memcpy(&cosine.v, &cosine_bits, sizeof cosine_bits);
}

}  // namespace random_features::detail
}  // namespace interstate::inline INTERSTATE_ABI
