// CPU SISA: attention's mainloop with a policy (attention/policy.hpp). Equations: docs/ops/sisa.md.
//
//   prelude   goes through each (batch row, key/value head) once: g in float64 (published: clamped, eq. 11), Phi in
//             float64 and its cosines and sines, and the rotated channels R(Phi) B and R(Phi) C of the accumulator's dtype
//   mainloop  a score is one product of dh + ds columns; published is the same with another g
//   epilogue  turns the gradients of rotated channels back and takes those of log_alpha, theta and lambda from them (eq. 22 to 25)
//
// Rotated rows hold all even channels and then all odd ones: a product of two such rows is the same, and a rotation
// is one of vectors.
#pragma once

#include <cmath>

#include <attention/detail/cpu_tiled.hpp>
#include <sisa/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {
namespace detail {

inline constexpr Index rows_at_once = 64;

// ---- Leaf bodies -----------------------------------------------------------------------------------

/// cosine and sine of n angles, to about 1 ulp of double below 1e5 and to 1e-11 below 5e5. x = k pi/2 + r, |r| <= pi/4,
/// and Taylor's series of r, whose rest is below 2^-54.
template <class A>
struct CosSin {
    static constexpr double largest = 5e5;
    template <class V>
    static INTERSTATE_INLINE void vector(const V& x, V& cosine, V& sine) {
        using Int = typename V::int_type;
        const V shifter = simd::broadcast<V>(6755399441055744.0);  // 1.5 * 2^52
        const V t = simd::fma(x, simd::broadcast<V>(0.63661977236758134308), shifter);
        const V n = t - shifter;
        V r = simd::fnma(n, simd::broadcast<V>(1.57079632673412561417), x);  // 33 bits of pi/2: exact
        r = simd::fnma(n, simd::broadcast<V>(6.07710050650619224932e-11), r);
        const V z = r * r;
        V s = simd::broadcast<V>(-1.0 / 1307674368000.0);
        s = simd::fma(s, z, simd::broadcast<V>(1.0 / 6227020800.0));
        s = simd::fma(s, z, simd::broadcast<V>(-1.0 / 39916800.0));
        s = simd::fma(s, z, simd::broadcast<V>(1.0 / 362880.0));
        s = simd::fma(s, z, simd::broadcast<V>(-1.0 / 5040.0));
        s = simd::fma(s, z, simd::broadcast<V>(1.0 / 120.0));
        s = simd::fma(s, z, simd::broadcast<V>(-1.0 / 6.0));
        s = simd::fma(s * z, r, r);
        V k = simd::broadcast<V>(1.0 / 20922789888000.0);
        k = simd::fma(k, z, simd::broadcast<V>(-1.0 / 87178291200.0));
        k = simd::fma(k, z, simd::broadcast<V>(1.0 / 479001600.0));
        k = simd::fma(k, z, simd::broadcast<V>(-1.0 / 3628800.0));
        k = simd::fma(k, z, simd::broadcast<V>(1.0 / 40320.0));
        k = simd::fma(k, z, simd::broadcast<V>(-1.0 / 720.0));
        k = simd::fma(k, z, simd::broadcast<V>(1.0 / 24.0));
        k = simd::fma(k, z, simd::broadcast<V>(-0.5));
        k = simd::fma(k, z, simd::broadcast<V>(1.0));
        // The quarter turns are the low bits of t.
        Int quarter;
        std::memcpy(&quarter, &t.v, sizeof quarter);
        const Int odd = (quarter & 1) != 0, cos_minus = ((quarter + 1) & 2) != 0, sin_minus = (quarter & 2) != 0;
        const V a{odd ? s.v : k.v}, b{odd ? k.v : s.v};
        cosine.v = cos_minus ? -a.v : a.v;
        sine.v = sin_minus ? -b.v : b.v;
    }
    template <class Set>
    static INTERSTATE_INLINE void run(const double* x, Index n, A* cosine, A* sine) {
        using V = simd::Native<Set, double>;
        for (Index i = 0; i < n; i += V::lanes) {
            double at[V::lanes] = {}, c[V::lanes], s[V::lanes];
            const Index count = n - i < V::lanes ? n - i : V::lanes;
            for (Index l = 0; l < count; ++l) at[l] = x[i + l];
            V cos_v, sin_v;
            vector(simd::load<V>(at), cos_v, sin_v);
            simd::store(c, cos_v), simd::store(s, sin_v);
            for (Index l = 0; l < count; ++l) {
                const bool huge = std::abs(at[l]) > largest;
                cosine[i + l] = static_cast<A>(huge ? std::cos(at[l]) : c[l]);
                sine[i + l] = static_cast<A>(huge ? std::sin(at[l]) : s[l]);
            }
        }
    }
};

/// to[r] = R(Phi[r]) x[r], evens first.
template <class T>
struct RotateRows {
    using A = acc_t<T>;
    using Pairs = simd::Vec<A, 16>;
    using Half = simd::Vec<A, 8>;
    template <class Set>
    static INTERSTATE_INLINE void run(const T* x, Index row_stride, Index step, Index rows, Index pairs, const A* cosine,
                                      const A* sine, A* to) {
        for (Index r = 0; r < rows; ++r) {
            const T* from = x + r * row_stride;
            const A *c = cosine + r * pairs, *s = sine + r * pairs;
            A* out = to + 2 * r * pairs;
            Index n = 0;
            if (step == 1)
                for (; n + 8 <= pairs; n += 8) {
                    const Pairs x = simd::load_as<Pairs>(from + 2 * n);
                    const Half even{__builtin_shufflevector(x.v, x.v, 0, 2, 4, 6, 8, 10, 12, 14)};
                    const Half odd{__builtin_shufflevector(x.v, x.v, 1, 3, 5, 7, 9, 11, 13, 15)};
                    const Half cosines = simd::load<Half>(c + n), sines = simd::load<Half>(s + n);
                    simd::store(out + n, even * cosines - odd * sines);
                    simd::store(out + pairs + n, even * sines + odd * cosines);
                }
            for (; n < pairs; ++n) {
                const A even = static_cast<A>(from[2 * n * step]), odd = static_cast<A>(from[(2 * n + 1) * step]);
                out[n] = even * c[n] - odd * s[n];
                out[pairs + n] = even * s[n] + odd * c[n];
            }
        }
    }
};

/// x[r] = factor R(-Phi[r]) d[r]: a gradient of rotated channels goes back.
template <class T>
struct RotateBack {
    using A = acc_t<T>;
    template <class Set>
    static INTERSTATE_INLINE void run(const A* d, Index rows, Index pairs, const A* cosine, const A* sine, A factor, T* x,
                                      Index row_stride, Index step) {
        for (Index r = 0; r < rows; ++r) {
            T* to = x + r * row_stride;
            const A *c = cosine + r * pairs, *s = sine + r * pairs, *from = d + 2 * r * pairs;
            for (Index n = 0; n < pairs; ++n) {
                const A even = from[n] * factor, odd = from[pairs + n] * factor;
                to[2 * n * step] = static_cast<T>(even * c[n] + odd * s[n]);
                to[(2 * n + 1) * step] = static_cast<T>(odd * c[n] - even * s[n]);
            }
        }
    }
};

/// What rows give to eq. 22 and 23: dg[r] += sign factor x.d and dPhi[r][n] += factor (x_e d_o - x_o d_e). Returns sum of
/// x.d in `total`.
template <class A>
struct RowProducts {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* x, const A* d, Index rows, Index pairs, double factor, double sign, double* dg,
                                      double* dPhi, double* total) {
        double sum = 0.0;
        for (Index r = 0; r < rows; ++r) {
            const A *xe = x + 2 * r * pairs, *xo = xe + pairs, *de = d + 2 * r * pairs, *od = de + pairs;
            double dot = 0.0;
            for (Index n = 0; n < pairs; ++n) {
                const double a = xe[n], b = xo[n], u = de[n], v = od[n];
                dot += a * u + b * v;
                dPhi[r * pairs + n] += factor * (a * v - b * u);
            }
            dg[r] += sign * factor * dot;
            sum += dot;
        }
        *total += sum;
    }
};

// ---- Tables ----------------------------------------------------------------------------------------

/// What the prelude leaves for the mainloop and the epilogue, and scratch of each thread.
template <class A>
struct Tables {
    double* g;               // (B, Hkv, Lk)
    A *B, *C;                // (B, Hkv, Lk, ds), (B, Hq, Lq, ds): rotated, evens first
    A *cosine, *sine;        // (B, Hkv, Lk, pairs)
    A *dB, *dC;              // of the rotated channels
    double *dg;              // (B, Hkv, Lk), published only
    double* dlam;            // (B, Hq)
    double *angles, *turns;  // (threads, rows_at_once, pairs), (threads, pairs)
    std::byte* rest;         // the mainloop's workspace

    Tables(Arena& arena, const cpu& exec, const Shape& s, pass which) {
        const bool backward = which == pass::backward;
        const Index threads = thread_count(exec.threads);
        const Index keys = s.batch * s.kv_heads * s.keys, queries = s.batch * s.query_heads * s.queries;
        g = arena.take<double>(keys);
        B = arena.take<A>(keys * s.state_dim);
        C = arena.take<A>(queries * s.state_dim);
        cosine = arena.take<A>(keys * s.pairs());
        sine = arena.take<A>(keys * s.pairs());
        dB = arena.take<A>(backward ? keys * s.state_dim : 0);
        dC = arena.take<A>(backward ? queries * s.state_dim : 0);
        dg = arena.take<double>(backward ? keys : 0);
        dlam = arena.take<double>(backward ? s.batch * s.query_heads : 0);
        angles = arena.take<double>(threads * rows_at_once * s.pairs());
        turns = arena.take<double>(threads * s.pairs());
        rest = arena.take<std::byte>(static_cast<Index>(
            attention::detail::tiled_workspace_size(exec, attention_of(s), which, s.state_dim)));
    }
};

inline std::size_t tiled_workspace_size(const cpu& exec, const Shape& s, pass which) {
    if (s.state_dim == 0) return attention::detail::tiled_workspace_size(exec, attention_of(s), which);
    Arena measure;
    if (s.dtype == DType::f64)
        Tables<double>(measure, exec, s, which);
    else
        Tables<float>(measure, exec, s, which);
    return measure.required();
}

template <class T, class P>
bf16* rest_of_o(const Options& options, const Inputs<T, P>& in, Saved saved) {
    return rest_size(options, shape_of(in)) > 0 ? static_cast<bf16*>(saved.data) : nullptr;
}

/// The importance term as a policy of attention.
template <class A, class P>
struct Importance : attention::Plain {
    static constexpr bool has_channels = true;
    Tables<A> tables;
    Shape shape;
    View<const P, 1> lam;

    Importance(const Tables<A>& t, const Shape& s, const View<const P, 1>& l) : tables(t), shape(s), lam(l) {}

    Index query(Index b, Index h, Index row) const { return (b * shape.query_heads + h) * shape.queries + row; }
    Index key(Index b, Index kv, Index row) const { return (b * shape.kv_heads + kv) * shape.keys + row; }
    Index channel_dim() const { return shape.state_dim; }
    void load(Isa isa, const A* from, Index count, A factor, A* to, Index ld) const {
        const Index ds = shape.state_dim;
        simd::run_body<attention::detail::LoadRows<A>>(isa, from, ds, Index{1}, count, ds, factor, to,
                                                       attention::detail::padded(ds), ld);
    }
    void load_c(Isa isa, Index b, Index h, Index row, Index count, A* to, Index ld) const {
        load(isa, tables.C + query(b, h, row) * shape.state_dim, count, static_cast<A>(lam(h)), to, ld);
    }
    void load_b(Isa isa, Index b, Index kv, Index row, Index count, A* to, Index ld) const {
        load(isa, tables.B + key(b, kv, row) * shape.state_dim, count, A(1), to, ld);
    }
    void decay(Index b, Index kv, Index row, Index count, double* g) const {
        std::memcpy(g, tables.g + key(b, kv, row), static_cast<std::size_t>(count) * sizeof(double));
    }
    void store(const A* from, Index count, Index ld, A* to) const {
        for (Index r = 0; r < count; ++r)
            std::memcpy(to + r * shape.state_dim, from + r * ld, static_cast<std::size_t>(shape.state_dim) * sizeof(A));
    }
    void store_dc(Isa, Index b, Index h, Index row, Index count, const A* from, Index ld) const {
        store(from, count, ld, tables.dC + query(b, h, row) * shape.state_dim);
    }
    void store_db(Isa, Index b, Index kv, Index row, Index count, const A* from, Index ld) const {
        store(from, count, ld, tables.dB + key(b, kv, row) * shape.state_dim);
    }
};

/// Everything the passes over lines of keys read.
template <class T, class P>
struct Lines {
    using A = acc_t<T>;
    const cpu& exec;
    const Options& options;
    const Inputs<T, P>& in;
    Shape shape;
    Tables<A> at;

    bool exact() const { return options.mode == Mode::exact; }
    Index key(Index b, Index kv, Index row) const { return (b * shape.kv_heads + kv) * shape.keys + row; }
    Index query(Index b, Index h, Index row) const { return (b * shape.query_heads + h) * shape.queries + row; }

    /// f(b, kv, keys, worker) for every sequence and key/value head; a task has all sequences of its line.
    template <class F>
    void for_each(F&& f) const {
        parallel_for(shape.batch * shape.kv_heads, attention::detail::threads_for(
            static_cast<double>(shape.batch * shape.kv_heads) * static_cast<double>(shape.keys * shape.state_dim) * 4.0, exec.threads),
            [&](Index task, int worker) {
                const Index b = task / shape.kv_heads, kv = task % shape.kv_heads;
                for (Index n = 0; n < (shape.packed() ? shape.sequences : 1); ++n)
                    f(b, kv, rows_of(in.cu_seqlens, n, shape.keys), worker);
            });
    }
    /// Rows of queries that stand at positions [first, first + count) of the key axis.
    RowRange queries_at(Index first, Index count) const {
        const Index offset = shape.keys - shape.queries, end = first + count - offset;
        return {first > offset ? first - offset : 0, end > 0 ? end : 0};
    }

    void prelude(Index b, Index kv, RowRange keys, int worker) const {
        const Index pairs = shape.pairs(), ds = shape.state_dim;
        double* const angles = at.angles + worker * rows_at_once * pairs;
        double* const Phi = at.turns + worker * pairs;
        for (Index n = 0; n < pairs; ++n) Phi[n] = 0.0;
        double g = 0.0;
        for (Index t = keys.begin; t < keys.end; t += rows_at_once) {
            const Index count = keys.end - t < rows_at_once ? keys.end - t : rows_at_once, line = key(b, kv, t);
            for (Index r = 0; r < count; ++r) {
                const double a = static_cast<double>(in.log_alpha(b, t + r, kv));
                at.g[line + r] = g += exact() ? floored(a) : a;  // eq. 3 and 10
                for (Index n = 0; n < pairs; ++n)
                    angles[r * pairs + n] = Phi[n] += static_cast<double>(in.theta(b, t + r, kv, n));  // eq. 1
            }
            A *const cosine = at.cosine + line * pairs, *const sine = at.sine + line * pairs;
            simd::run_body<CosSin<A>>(exec.isa, static_cast<const double*>(angles), count * pairs, cosine, sine);
            const auto rotate = [&](const View<const T, 4>& x, Index row, Index h, Index rows, Index skip, A* to) {
                if (rows > 0)
                    simd::run_body<RotateRows<T>>(exec.isa, &x(b, row, h, 0), x.stride[1], x.stride[3], rows, pairs,
                                                  static_cast<const A*>(cosine + skip * pairs),
                                                  static_cast<const A*>(sine + skip * pairs), to);
            };
            rotate(in.B, t, kv, count, 0, at.B + line * ds);
            const RowRange q = queries_at(t, count);
            for (Index h = kv * shape.group(); h < (kv + 1) * shape.group(); ++h)
                rotate(in.C, q.begin, h, q.end - q.begin, q.begin + shape.keys - shape.queries - t,
                       at.C + query(b, h, q.begin) * ds);
        }
        if (exact() || keys.begin == keys.end) return;
        double* const x = at.g + key(b, kv, keys.begin);
        const double c = offset(x, keys.end - keys.begin);
        for (Index j = 0; j < keys.end - keys.begin; ++j) x[j] = clamped(x[j] - c, options.clamp);  // eq. 11
    }
    static double offset(const double* g, Index n) {
        double largest = g[0], smallest = g[0];
        for (Index j = 0; j < n; ++j) {
            largest = g[j] > largest ? g[j] : largest;
            smallest = g[j] < smallest ? g[j] : smallest;
        }
        return (largest + smallest) / 2.0;
    }

    void epilogue(const Grads<T, P>& grads, Index b, Index kv, RowRange keys, int worker) const {
        const Index pairs = shape.pairs(), ds = shape.state_dim;
        double* const dPhi = at.angles + worker * rows_at_once * pairs;
        double* const turn = at.turns + worker * pairs;  // of all later rows
        for (Index n = 0; n < pairs; ++n) turn[n] = 0.0;
        const Index blocks = ceil_div(keys.end - keys.begin, rows_at_once);
        for (Index block = blocks - 1; block >= 0; --block) {
            const Index t = keys.begin + block * rows_at_once;
            const Index count = keys.end - t < rows_at_once ? keys.end - t : rows_at_once, line = key(b, kv, t);
            const A *const cosine = at.cosine + line * pairs, *const sine = at.sine + line * pairs;
            double* const dg = at.dg + line;
            for (Index r = 0; r < count; ++r) dg[r] = 0.0;
            for (Index x = 0; x < count * pairs; ++x) dPhi[x] = 0.0;
            const RowRange q = queries_at(t, count);
            const Index skip = q.begin + shape.keys - shape.queries - t;
            double unused = 0.0;
            simd::run_body<RowProducts<A>>(exec.isa, static_cast<const A*>(at.B + line * ds),
                                           static_cast<const A*>(at.dB + line * ds), count, pairs, 1.0, -1.0, dg, dPhi, &unused);
            if (grads.B)
                simd::run_body<RotateBack<T>>(exec.isa, static_cast<const A*>(at.dB + line * ds), count, pairs, cosine, sine,
                                              A(1), &grads.B(b, t, kv, 0), grads.B.stride[1], grads.B.stride[3]);
            for (Index h = kv * shape.group(); q.end > q.begin && h < (kv + 1) * shape.group(); ++h) {
                const Index row = query(b, h, q.begin);
                const double lam = static_cast<double>(in.lam(h));
                simd::run_body<RowProducts<A>>(exec.isa, static_cast<const A*>(at.C + row * ds),
                                               static_cast<const A*>(at.dC + row * ds), q.end - q.begin, pairs, lam, 1.0,
                                               dg + skip, dPhi + skip * pairs, at.dlam + b * shape.query_heads + h);  // eq. 17
                if (grads.C)
                    simd::run_body<RotateBack<T>>(exec.isa, static_cast<const A*>(at.dC + row * ds), q.end - q.begin, pairs,
                                                  cosine + skip * pairs, sine + skip * pairs, static_cast<A>(in.lam(h)),
                                                  &grads.C(b, q.begin, h, 0), grads.C.stride[1], grads.C.stride[3]);
            }
            if (grads.theta)
                for (Index r = count - 1; r >= 0; --r)
                    for (Index n = 0; n < pairs; ++n) {
                        turn[n] += dPhi[r * pairs + n];
                        // No pair lies on both sides of the first token.
                        grads.theta(b, t + r, kv, n) = static_cast<P>(t + r == keys.begin ? 0.0 : turn[n]);  // eq. 23
                    }
        }
        if (!grads.log_alpha || keys.begin == keys.end) return;
        const Index n = keys.end - keys.begin;
        double* const dg = at.dg + key(b, kv, keys.begin);
        if (!exact()) {
            // g - c as it was before the clamp.
            double* const g = at.g + key(b, kv, keys.begin);
            double sum = 0.0;
            for (Index j = 0; j < n; ++j) g[j] = sum += static_cast<double>(in.log_alpha(b, keys.begin + j, kv));
            const double c = offset(g, n);
            for (Index j = 0; j < n; ++j) g[j] -= c;
            reference_published_gradient(options.clamp, g, n, dg);  // eq. 24 and 25
            for (Index j = 0; j < n; ++j) grads.log_alpha(b, keys.begin + j, kv) = static_cast<P>(dg[j]);
            return;
        }
        double sum = 0.0;
        for (Index j = n - 1; j >= 0; --j) {
            sum += dg[j];
            // Nothing goes across a reset, and there is no pair on both sides of the first token: what the sum holds is rounding.
            if (j == 0 || static_cast<double>(in.log_alpha(b, keys.begin + j, kv)) <= hard_reset) sum = 0.0;
            grads.log_alpha(b, keys.begin + j, kv) = static_cast<P>(sum);  // eq. 22
        }
    }
};

/// Rows of keys or queries that belong to no sequence.
template <class X>
void zero_outside(const View<X, 4>& x, const View<const std::int32_t, 1>& cu) {
    if (!x || !cu) return;
    const Index first = cu(0), last = cu(cu.extent[0] - 1);
    for (Index i = 0; i < x.extent[1]; ++i)
        if (i < first || i >= last)
            for (Index h = 0; h < x.extent[2]; ++h)
                for (Index d = 0; d < x.extent[3]; ++d) x(0, i, h, d) = static_cast<X>(0.0f);
}

template <class T, class P>
void tiled_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
                   Workspace ws) {
    bf16* const rest = rest_of_o(options, in, saved);
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const attention::Inputs<T> plain_in = attention_of(in);
    const attention::Options plain = attention_of(options);
    if (s.state_dim == 0) return attention::detail::tiled_forward(exec, plain, plain_in, out, ws, attention::Plain{}, rest);
    Arena arena(ws.data);
    const Tables<A> tables(arena, exec, s, pass::forward);
    const Lines<T, P> lines{exec, options, in, s, tables};
    lines.for_each([&](Index b, Index kv, RowRange keys, int worker) { lines.prelude(b, kv, keys, worker); });
    attention::detail::tiled_forward(exec, plain, plain_in, out, Workspace{tables.rest, 0},
                                     Importance<A, P>(tables, s, in.lam), rest);
}

template <class T, class P>
void tiled_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
                    const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    using A = acc_t<T>;
    bf16* const rest = rest_of_o(options, in, saved);
    const Shape s = shape_of(in);
    const attention::Inputs<T> plain_in = attention_of(in);
    const attention::Grads<T> plain_grads{grads.q, grads.k, grads.v};
    const attention::Options plain = attention_of(options);
    if (s.state_dim == 0) {
        attention::detail::tiled_backward(exec, plain, plain_in, out, upstream, plain_grads, ws,
                                          attention::Plain{}, rest);
        fill_zero(grads.log_alpha), fill_zero(grads.lam);
        return;
    }
    Arena arena(ws.data);
    const Tables<A> tables(arena, exec, s, pass::backward);
    const Lines<T, P> lines{exec, options, in, s, tables};
    lines.for_each([&](Index b, Index kv, RowRange keys, int worker) { lines.prelude(b, kv, keys, worker); });
    attention::detail::tiled_backward(exec, plain, plain_in, out, upstream, plain_grads,
                                      Workspace{tables.rest, 0}, Importance<A, P>(tables, s, in.lam), rest);
    for (Index x = 0; x < s.batch * s.query_heads; ++x) tables.dlam[x] = 0.0;
    lines.for_each([&](Index b, Index kv, RowRange keys, int worker) { lines.epilogue(grads, b, kv, keys, worker); });
    zero_outside(grads.C, in.cu_seqlens), zero_outside(grads.B, in.cu_seqlens), zero_outside(grads.theta, in.cu_seqlens);
    if (grads.log_alpha && in.cu_seqlens) {
        const auto& x = grads.log_alpha;
        zero_outside(view(x.data, {x.extent[0], x.extent[1], x.extent[2], Index{1}},
                          {x.stride[0], x.stride[1], x.stride[2], Index{1}}), in.cu_seqlens);
    }
    for (Index h = 0; grads.lam && h < s.query_heads; ++h) {
        double sum = 0.0;
        for (Index b = 0; b < s.batch; ++b) sum += tables.dlam[b * s.query_heads + h];
        grads.lam(h) = static_cast<P>(sum);
    }
}

}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
