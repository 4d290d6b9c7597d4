// One token of Interdomain Attention on the CPU (eq. 3 to 8): a task is a batch row and a key/value head, vector
// lanes are (re, im) pairs of a row of the state as it lies. Products are float64, so that a state kept in float
// takes no more from a long decode than its own rounding. C is applied twice: forming G costs M times as much.
//
// What limits it: converting the state to float64 and back while a few heads fit the caches; then reading and writing it.
//
// Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <interdomain/detail/cpu_tile.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail {

/// Rows of pairs, each padded to whole vectors.
struct StepScratch {
    Index queries, values, state, modes;  // reals of a row: 2 R and 2 V, padded, both of them, 2 M, padded
    double *x, *c;                        // a row of the state, keys then values; a row of C
    double* z;                            // the token, each element twice
    double *q, *a, *w, *o;                // for each query head of the group
    StepScratch(Arena& arena, const Tiling& t, Index group)
        : queries(padded(2 * t.R)), values(padded(2 * t.V)), state(queries + values), modes(padded(2 * t.M)) {
        x = arena.take<double>(state);
        c = arena.take<double>(modes);
        z = arena.take<double>(state);
        q = arena.take<double>(group * queries);
        a = arena.take<double>(group * modes);
        w = arena.take<double>(group * modes);
        o = arena.take<double>(group * values);
    }
};

template <class T, class P>
struct StepBody {
    using A = acc_t<T>;
    struct Args {
        Readout readout;
        const Tiling& tiling;
        const Discrete<P>& discrete;
        const State<A>& state;
        const Token<T>& token;
        const TokenOut<T>& out;
        StepScratch scratch;
        Index group, b, h;
    };

    template <class V, int... I>
    static INTERSTATE_INLINE V swap_pairs(const V& x, std::integer_sequence<int, I...>) {
#if defined(__clang__)
        return {__builtin_shufflevector(x.v, x.v, (I ^ 1)...)};
#else
        using Mask = typename V::int_type;
        return {__builtin_shuffle(x.v, Mask{(I ^ 1)...})};
#endif
    }
    template <class V>
    static INTERSTATE_INLINE V swap_pairs(const V& x) {
        return swap_pairs(x, std::make_integer_sequence<int, V::lanes>{});
    }
    template <class V>
    static INTERSTATE_INLINE V pairs(double even, double odd) {
        double lanes[V::lanes];
        for (int i = 0; i < V::lanes; i += 2) lanes[i] = even, lanes[i + 1] = odd;
        return simd::load<V>(lanes);
    }
    template <class V>
    static INTERSTATE_INLINE c64 sum_pairs(const V& x) {
        c64 sum{};
        for (int i = 0; i < V::lanes; i += 2) sum += c64{x[i], x[i + 1]};
        return sum;
    }
    /// n complex numbers, `step` apart, to and from a row of pairs.
    template <class V, class E>
    static INTERSTATE_INLINE void load_row(const complex<E>* from, Index step, Index n, double* to) {
        Index i = 0;
        if (step == 1)
            for (; 2 * i + V::lanes <= 2 * n; i += V::lanes / 2)
                simd::store(to + 2 * i, simd::load_as<V>(reinterpret_cast<const E*>(from) + 2 * i));
        for (; i < n; ++i) {
            to[2 * i] = static_cast<double>(from[i * step].re);
            to[2 * i + 1] = static_cast<double>(from[i * step].im);
        }
    }
    template <class V>
    static INTERSTATE_INLINE void store_row(const double* from, complex<A>* to, Index step, Index n) {
        Index i = 0;
        if (step == 1)
            for (; 2 * i + V::lanes <= 2 * n; i += V::lanes / 2)
                simd::store_as(reinterpret_cast<A*>(to) + 2 * i, simd::load<V>(from + 2 * i));
        for (; i < n; ++i) to[i * step] = {static_cast<A>(from[2 * i]), static_cast<A>(from[2 * i + 1])};
    }

    template <class Set>
    static INTERSTATE_INLINE void run(const Args& args) {
        using V = simd::Native<Set, double>;
        const Tiling& t = args.tiling;
        const StepScratch& w = args.scratch;
        const auto& x = args.state.x;
        const Index b = args.b, h = args.h, group = args.group, first = h * group;
        double *const values = w.x + w.queries, *const ones = values + 2 * t.d;
        const auto twice = [](double* to, Index i, double value) { to[2 * i] = to[2 * i + 1] = value; };
        std::fill_n(w.x, w.state, 0.0);
        std::fill_n(w.z, w.state, 0.0);
        std::fill_n(w.c, w.modes, 0.0);
        std::fill_n(w.q, group * w.queries, 0.0);
        std::fill_n(w.a, group * w.modes, 0.0);
        std::fill_n(w.w, group * w.modes, 0.0);
        std::fill_n(w.o, group * w.values, 0.0);
        for (Index c = 0; c < t.R; ++c) twice(w.z, c, static_cast<double>(args.token.k(b, h, c)));
        for (Index c = 0; c < t.d; ++c) twice(w.z + w.queries, c, static_cast<double>(args.token.v(b, h, c)));
        if (t.normalized) twice(w.z + w.queries, t.d, 1.0);
        for (Index g = 0; g < group; ++g)
            for (Index c = 0; c < t.R; ++c)
                twice(w.q + g * w.queries, c, static_cast<double>(args.token.q(b, first + g, c)));

        const auto load_values = [&](Index m) {
            if (t.d > 0) load_row<V>(&x(b, h, m, t.R), x.stride[3], t.d, values);
            if (!t.normalized) return;
            const c64 eta = cast<double>(args.state.eta(b, h, m));
            ones[0] = eta.re, ones[1] = eta.im;
        };
        for (Index m = 0; m < t.M; ++m) {
            if (t.R > 0) load_row<V>(&x(b, h, m, 0), x.stride[3], t.R, w.x);
            load_values(m);
            const c64 Lam = args.discrete.Lam(h, m), Bbar = args.discrete.Bbar(h, m);
            const V re = simd::broadcast<V>(Lam.re), im = pairs<V>(-Lam.im, Lam.im), gain = pairs<V>(Bbar.re, Bbar.im);
            for (Index i = 0; i < w.state; i += V::lanes) {
                const V now = simd::load<V>(w.x + i);
                simd::store(w.x + i, simd::fma(re, now, simd::fma(im, swap_pairs(now), gain * simd::load<V>(w.z + i))));
            }
            if (t.R > 0) store_row<V>(w.x, &x(b, h, m, 0), x.stride[3], t.R);
            if (t.d > 0) store_row<V>(values, &x(b, h, m, t.R), x.stride[3], t.d);
            if (t.normalized) args.state.eta(b, h, m) = cast<A>(c64{ones[0], ones[1]});
            for (Index g = 0; g < group; ++g) {
                V sum = simd::broadcast<V>(0.0);
                for (Index i = 0; i < w.queries; i += V::lanes)
                    sum = simd::fma(simd::load<V>(w.x + i), simd::load<V>(w.q + g * w.queries + i), sum);
                const c64 a = sum_pairs(sum);
                w.a[g * w.modes + 2 * m] = a.re, w.a[g * w.modes + 2 * m + 1] = a.im;
            }
        }
        const bool real_parts = args.readout == Readout::real_parts;
        const auto& C = args.discrete.C;
        for (Index m = 0; m < t.M; ++m) {  // eq. 8: s = C a row by row, w gathers C^T s
            load_row<V>(&C(h, m, 0), C.stride[2], t.M, w.c);
            for (Index g = 0; g < group; ++g) {
                V straight = simd::broadcast<V>(0.0), crossed = straight;
                const double* a = w.a + g * w.modes;
                for (Index i = 0; i < w.modes; i += V::lanes) {
                    const V c = simd::load<V>(w.c + i), at = simd::load<V>(a + i);
                    straight = simd::fma(c, at, straight);
                    crossed = simd::fma(c, swap_pairs(at), crossed);
                }
                const c64 same = sum_pairs(straight), other = sum_pairs(crossed);
                c64 s{same.re - same.im, other.re + other.im};
                if (real_parts) s = {4.0 * s.re, 0.0};
                const V re = simd::broadcast<V>(s.re), im = pairs<V>(-s.im, s.im);
                double* to = w.w + g * w.modes;
                for (Index i = 0; i < w.modes; i += V::lanes) {
                    const V c = simd::load<V>(w.c + i);
                    simd::store(to + i, simd::fma(re, c, simd::fma(im, swap_pairs(c), simd::load<V>(to + i))));
                }
            }
        }
        for (Index m = 0; m < t.M; ++m) {
            load_values(m);
            for (Index g = 0; g < group; ++g) {
                const V v = pairs<V>(w.w[g * w.modes + 2 * m], -w.w[g * w.modes + 2 * m + 1]);
                double* o = w.o + g * w.values;
                for (Index i = 0; i < w.values; i += V::lanes)
                    simd::store(o + i, simd::fma(v, simd::load<V>(values + i), simd::load<V>(o + i)));
            }
        }
        for (Index g = 0; g < group; ++g) {
            const double* o = w.o + g * w.values;
            const double den = t.normalized ? o[2 * t.d] + o[2 * t.d + 1] : 1.0;
            for (Index c = 0; c < t.d; ++c) args.out.o(b, first + g, c) = T((o[2 * c] + o[2 * c + 1]) / den);
        }
    }
};

/// Bytes of the scratch of one thread.
inline std::size_t step_scratch(const Options& options, const Shape& s) {
    return layout_size<StepScratch>(Tiling(options, s), sized(s).group());
}

/// exec has been resolved.
template <class T, class P>
void step_tokens(const cpu& exec, const Options& options, const Discrete<P>& discrete, const State<acc_t<T>>& state,
                 const Token<T>& token, const TokenOut<T>& out, Workspace ws) {
    const Shape s = shape_of(discrete, token);
    const Tiling z(options, s);
    const std::size_t each = step_scratch(options, s);
    // One head is microseconds of work: starting threads pays only for many of them.
    const double work = static_cast<double>(s.batch * s.kv_heads * s.modes) *
                        static_cast<double>(s.columns() + s.group() * s.modes);
    parallel_for(s.batch * s.kv_heads, work < 1e5 ? 1 : exec.threads, [&](Index task, int worker) {
        Arena arena(static_cast<std::byte*>(ws.data) + each * static_cast<std::size_t>(worker));
        const typename StepBody<T, P>::Args args{options.readout, z,   discrete,         state,
                                                 token,           out, StepScratch(arena, z, s.group()), s.group(),
                                                 task / s.kv_heads, task % s.kv_heads};
        simd::run_body<StepBody<T, P>>(exec.isa, args);
    });
}

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
