// The output gate on the CPU: vectors along the channels of a head where they lie side by side, single elements
// where they do not. It is bound by memory; what matters is that 16-bit storage is converted in vectors.
#pragma once

#include <algorithm>
#include <cmath>

#include <gate/params.hpp>
#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace gate::detail {

/// A head of a token: pointers to its first channel, and from channel to channel. Null where there is none.
template <class T>
struct Channels {
    T* data = nullptr;
    Index stride = 0;
};
template <class T>
Channels<T> channels(const View<T, 4>& x, Index b, Index t, Index h) {
    if (!x) return {};
    return {x.data + b * x.stride[0] + t * x.stride[1] + h * x.stride[2], x.stride[3]};
}

/// Channels [i, i + count) of up to V::lanes, as V. `spare` is room for a vector.
template <class V, class A, class T>
INTERSTATE_INLINE V load_some(const Channels<const T>& x, Index i, Index count, A* spare) {
    if (x.stride == 1 && count >= V::lanes) return simd::load_as<V>(x.data + i);
    for (Index j = 0; j < V::lanes; ++j) spare[j] = j < count ? static_cast<A>(x.data[(i + j) * x.stride]) : A(0);
    return simd::load<V>(spare);
}
template <class V, class A, class T>
INTERSTATE_INLINE void store_some(const Channels<T>& x, Index i, Index count, const V& v, A* spare) {
    if (x.stride == 1 && count >= V::lanes) return simd::store_as(x.data + i, v);
    simd::store(spare, v);
    for (Index j = 0; j < count && j < V::lanes; ++j) x.data[(i + j) * x.stride] = T(spare[j]);
}

template <class T>
struct ForwardBody {
    template <class Set>
    static INTERSTATE_INLINE void run(Channels<const T> o, Channels<const T> g, Channels<T> y, Index d) {
        using A = acc_t<T>;
        using V = simd::Native<Set, A>;
        A spare[V::lanes];
        const V one = simd::broadcast<V>(A(1)), zero = simd::broadcast<V>(A(0));
        for (Index i = 0; i < d; i += V::lanes) {
            V x = load_some<V>(o, i, d - i, spare);
            x.v = x.v / (one + simd::exp(zero - load_some<V>(g, i, d - i, spare))).v;
            store_some(y, i, d - i, x, spare);
        }
    }
};

template <class T>
struct BackwardBody {
    template <class Set>
    static INTERSTATE_INLINE void run(Channels<const T> o, Channels<const T> g, Channels<const T> dy, Channels<T> grad_o,
                                      Channels<T> grad_g, Index d) {
        using A = acc_t<T>;
        using V = simd::Native<Set, A>;
        A spare[V::lanes];
        const V one = simd::broadcast<V>(A(1)), zero = simd::broadcast<V>(A(0));
        for (Index i = 0; i < d; i += V::lanes) {
            const V x = load_some<V>(g, i, d - i, spare);
            V sigmoid, rest;  // 1 - sigmoid on its own: the difference would lose what is small
            sigmoid.v = one.v / (one + simd::exp(zero - x)).v;
            rest.v = one.v / (one + simd::exp(x)).v;
            const V along = load_some<V>(dy, i, d - i, spare) * sigmoid;
            if (grad_o.data) store_some(grad_o, i, d - i, along, spare);
            if (grad_g.data) store_some(grad_g, i, d - i, along * load_some<V>(o, i, d - i, spare) * rest, spare);
        }
    }
};

/// f(b, t, h) for every head of every token, in tasks that do not depend on the number of threads; zero(b, t, h) for
/// those outside of all sequences.
template <class T, class F, class Z>
void cpu_heads(const cpu& exec, const Inputs<T>& in, const Shape& s, F&& f, Z&& zero) {
    const Index begin = in.cu_seqlens ? in.cu_seqlens(0) : 0;
    const Index end = in.cu_seqlens ? in.cu_seqlens(s.sequences) : s.length;
    const Index rows = s.batch * s.length, size = s.heads * s.value_dim;
    const Index stretch = std::max<Index>(1, (Index{1} << 14) / std::max<Index>(size, 1));
    parallel_for(ceil_div(rows, stretch), exec.threads, [&](Index task, int) {
        for (Index n = task * stretch; n < std::min(rows, (task + 1) * stretch); ++n) {
            const Index b = n / s.length, t = n % s.length;
            for (Index h = 0; h < s.heads; ++h) t >= begin && t < end ? f(b, t, h) : zero(b, t, h);
        }
    });
}

template <class T>
void zero_head(const View<T, 4>& x, Index b, Index t, Index h) {
    for (Index c = 0; x && c < x.extent[3]; ++c) x(b, t, h, c) = T(0.0f);
}

template <class T>
void cpu_forward(const cpu& exec, const Inputs<T>& in, const Outputs<T>& out) {
    const Shape s = shape_of(in);
    cpu_heads(exec, in, s, [&](Index b, Index t, Index h) {
        simd::run_body<ForwardBody<T>>(exec.isa, channels(in.o, b, t, h), channels(in.g, b, t, h), channels(out.y, b, t, h),
                                       s.value_dim);
    }, [&](Index b, Index t, Index h) { zero_head(out.y, b, t, h); });
}

template <class T>
void cpu_backward(const cpu& exec, const Inputs<T>& in, const Upstream<T>& upstream, const Grads<T>& grads) {
    const Shape s = shape_of(in);
    cpu_heads(exec, in, s, [&](Index b, Index t, Index h) {
        simd::run_body<BackwardBody<T>>(exec.isa, channels(in.o, b, t, h), channels(in.g, b, t, h),
                                        channels(upstream.y, b, t, h), channels(grads.o, b, t, h),
                                        channels(grads.g, b, t, h), s.value_dim);
    }, [&](Index b, Index t, Index h) {
        zero_head(grads.o, b, t, h);
        zero_head(grads.g, b, t, h);
    });
}

}  // namespace gate::detail
}  // namespace interstate::inline INTERSTATE_ABI
