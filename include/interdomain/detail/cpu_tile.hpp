// What the CPU methods of Interdomain Attention share: how states and rows of tokens lie in memory, the readout
// as one real matrix, where sums of parameters' gradients are kept, and how they end.
//
// Complex numbers of the M axis are two planes of a row, [re | im], each padded to whole vectors of any
// instruction set: a real operand times such rows is one real product, and the complex map G of eq. 15 is a real
// matrix of twice the size. A state is transposed, one row a column of X (keys first, then values, then the ones
// of a normaliser), so that a token's features are what its rows are multiplied with. Padding is zero everywhere.
// The storage dtype is known to load_rows and store_rows alone.
//
// Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <algorithm>

#include <interdomain/reference.hpp>
#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/rows.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail {

using simd::layout_size;
using simd::load_rows;
using simd::Operand;
using simd::pad;
using simd::padded;
using simd::Products;
using simd::store_rows;

inline constexpr Index stretch_tokens = 256;  // one state is kept for so many tokens
inline constexpr Index max_runs = 16;         // of tasks whose sums are kept apart, for each head

/// The shape that memory is laid out for: without sequences or heads, extents may be anything and mean nothing.
inline Shape sized(Shape s) {
    if (s.states() > 0 && s.kv_heads > 0) return s;
    s.length = s.features = s.value_dim = 0;
    s.query_heads = s.kv_heads;
    if (s.kv_heads == 0) s.modes = 0;
    return s;
}

/// Sizes of a call as its tiles have them.
struct Tiling {
    Index M, R, d, V;        // V: columns of values, d, and one more for a normaliser
    Index Mp, Rp, Vp, Wp;    // padded; Wp = Rp + Vp rows of a state
    Index ldm, ldz;          // from row to row over modes and over columns: never a power of two apart
    bool normalized;

    Tiling(const Options& options, const Shape& s)
        : M(sized(s).modes),
          R(sized(s).features),
          d(sized(s).value_dim),
          V(d + (options.normalized() ? 1 : 0)),
          Mp(padded(M)),
          Rp(padded(R)),
          Vp(padded(V)),
          Wp(Rp + Vp),
          ldm(2 * Mp + pad),
          ldz(Wp + pad),
          normalized(options.normalized()) {}

    Index state_size() const { return Wp * 2 * Mp; }  // kept between stretches, without gaps
    /// Row of a state for column c of X, the ones column being s.columns().
    Index row(Index c) const { return c < R ? c : Rp + c - R; }
};

/// Stretches before sequence i, an upper bound that leaves no overlap, and all of them.
inline Index first_stretch(const View<const std::int32_t, 1>& cu, const Shape& s, Index i) {
    return s.packed() ? cu(i) / stretch_tokens + i : i * ceil_div(s.length, stretch_tokens);
}
inline Index stretch_count(const Shape& s) {
    return s.packed() ? s.length / stretch_tokens + s.sequences : s.batch * ceil_div(s.length, stretch_tokens);
}

/// One recurrence: the rows of one sequence, and the key/value head.
struct Recurrence {
    Index i, h, b;
    RowRange rows;
    Index first;  // its first stretch

    template <class T, class P>
    static Recurrence at(const Inputs<T, P>& in, const Shape& s, Index i, Index h) {
        return {i, h, s.packed() ? 0 : i, rows_of(in.cu_seqlens, i, s.length), first_stretch(in.cu_seqlens, s, i)};
    }
    Index length() const { return rows.end - rows.begin; }
    Index stretches() const { return ceil_div(length(), stretch_tokens); }
    Index tokens_of(Index stretch) const { return std::min(stretch_tokens, length() - stretch * stretch_tokens); }
};

// ---- Leaf bodies -----------------------------------------------------------------------------------

template <class V>
struct Planes {
    V re, im;
};
template <class V, class A>
INTERSTATE_INLINE Planes<V> load_planes(const A* row, Index Mp) {
    return {simd::load<V>(row), simd::load<V>(row + Mp)};
}
template <class V, class A>
INTERSTATE_INLINE void store_planes(A* row, Index Mp, const Planes<V>& x) {
    simd::store(row, x.re);
    simd::store(row + Mp, x.im);
}
/// a b + c
template <class V>
INTERSTATE_INLINE Planes<V> fma(const Planes<V>& a, const Planes<V>& b, const Planes<V>& c) {
    return {simd::fnma(a.im, b.im, simd::fma(a.re, b.re, c.re)), simd::fma(a.im, b.re, simd::fma(a.re, b.im, c.im))};
}

/// to[r] = power[r * power_ld] o from[r] + gain[r], complex, for rows [0, rows); gain may be null, `to` may be any
/// of them.
template <class A>
struct Decay {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* power, Index power_ld, const A* from, const A* gain, A* to, Index ld,
                                      Index rows, Index Mp) {
        using V = simd::Native<Set, A>;
        const Planes<V> zero{simd::broadcast<V>(A(0)), simd::broadcast<V>(A(0))};
        for (Index r = 0; r < rows; ++r)
            for (Index m = 0; m < Mp; m += V::lanes) {
                const auto add = gain ? load_planes<V>(gain + r * ld + m, Mp) : zero;
                store_planes(to + r * ld + m, Mp,
                             fma(load_planes<V>(power + r * power_ld + m, Mp), load_planes<V>(from + r * ld + m, Mp), add));
            }
    }
};

/// A state in float64, rows without gaps: state = power o state + local (eq. 19).
template <class A>
struct CarryExact {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* power, double* state, const A* local, Index ld, Index rows, Index Mp) {
        using V = simd::Native<Set, double>;
        for (Index r = 0; r < rows; ++r)
            for (Index m = 0; m < Mp; m += V::lanes) {
                double* at = state + r * 2 * Mp + m;
                const A* add = local + r * ld + m;
                store_planes(at, Mp,
                             fma(load_planes<V>(power + m, Mp), load_planes<V>(at, Mp),
                                 Planes<V>{simd::load_as<V>(add), simd::load_as<V>(add + Mp)}));
            }
    }
};
template <class To, class From>
void copy_rows(const From* from, Index ld_from, To* to, Index ld_to, Index rows, Index columns) {
    for (Index r = 0; r < rows; ++r)
        for (Index c = 0; c < columns; ++c) to[r * ld_to + c] = static_cast<To>(from[r * ld_from + c]);
}

/// sum[m] += sum_r x[r, m] o y[r, m], complex.
template <class A>
struct RowSum {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* x, const A* y, A* sum, Index ld, Index rows, Index Mp) {
        using V = simd::Native<Set, A>;
        for (Index m = 0; m < Mp; m += V::lanes) {
            auto total = load_planes<V>(sum + m, Mp);
            for (Index r = 0; r < rows; ++r)
                total = fma(load_planes<V>(x + r * ld + m, Mp), load_planes<V>(y + r * ld + m, Mp), total);
            store_planes(sum + m, Mp, total);
        }
    }
};

/// sum += part, part = 0: what is summed in the accumulator's dtype ends in float64.
template <class A>
struct Flush {
    template <class Set>
    static INTERSTATE_INLINE void run(A* part, double* sum, Index n) {
        using V = simd::Native<Set, double>;
        for (Index i = 0; i < n; i += V::lanes)  // n is a multiple of the padding
            simd::store(sum + i, simd::load<V>(sum + i) + simd::load_as<V>(part + i));
        std::fill_n(part, n, A(0));
    }
};

// ---- Products, loads and states --------------------------------------------------------------------

/// Values of a chunk, and the column of ones of a normaliser, which may begin a new vector.
template <class T, class X>
void load_values(Isa isa, const Tiling& z, const View<X, 4>& v, Index b, Index first, Index h, Index count, acc_t<T>* to,
                 Index ld, double ones) {
    load_rows<T>(isa, v, b, first, h, count, to, ld);
    if (!z.normalized) return;
    for (Index r = 0; r < padded(count); ++r)
        for (Index c = padded(z.d); c < z.Vp; ++c) to[r * ld + c] = 0;
    for (Index r = 0; r < count; ++r) to[r * ld + z.d] = static_cast<acc_t<T>>(ones);
}

/// A state (Wp, 2 Mp) in float64 from x (i, h) and eta, zero where absent; `sign` = -1 conjugates.
template <class A>
void load_state(const Tiling& z, const View<const complex<A>, 4>& x, const View<const complex<A>, 3>& eta, Index i, Index h,
                double sign, double* state) {
    std::fill_n(state, z.state_size(), 0.0);
    for (Index m = 0; m < z.M; ++m)
        for (Index c = 0; c < z.R + z.V; ++c) {
            const bool ones = c == z.R + z.d;
            if (ones ? !eta : !x) continue;
            const c64 from = cast<double>(ones ? eta(i, h, m) : x(i, h, m, c));
            double* at = state + z.row(c) * 2 * z.Mp + m;
            at[0] = from.re;
            at[z.Mp] = sign * from.im;
        }
}
template <class A>
void store_state(const Tiling& z, const double* state, const View<complex<A>, 4>& x, const View<complex<A>, 3>& eta, Index i,
                 Index h, double sign) {
    for (Index m = 0; m < z.M; ++m)
        for (Index c = 0; c < z.R + z.V; ++c) {
            const double* at = state + z.row(c) * 2 * z.Mp + m;
            const c64 from{at[0], sign * at[z.Mp]};
            if (c < z.R + z.d && x) x(i, h, m, c) = cast<A>(from);
            if (c == z.R + z.d && eta) eta(i, h, m) = cast<A>(from);
        }
}

// ---- A head's constants ----------------------------------------------------------------------------

/// Lam^times of all modes of a head, [re | im], zero in the padding.
inline void raise_all(const Tiling& z, const double* Lam, Index times, double* power) {
    for (Index m = 0; m < z.Mp; ++m) {
        const c64 p = m < z.M ? s4d::detail::raise({Lam[m], Lam[z.Mp + m]}, times) : c64{};
        power[m] = p.re;
        power[z.Mp + m] = p.im;
    }
}

/// The planes of C (M, 2 Mp) of a head.
template <class P>
void load_C(const Tiling& z, const View<const complex<P>, 3>& C, Index h, double* planes) {
    std::fill_n(planes, z.M * 2 * z.Mp, 0.0);
    for (Index m = 0; m < z.M; ++m)
        for (Index n = 0; n < z.M; ++n) {
            const c64 c = cast<double>(C(h, m, n));
            planes[m * 2 * z.Mp + n] = c.re;
            planes[m * 2 * z.Mp + z.Mp + n] = c.im;
        }
}

/// Scratch of make_readout and head_gradients: planes of C, and square matrices of them.
struct ReadoutScratch {
    double *C, *square, *sum;
    ReadoutScratch(Arena& arena, const Tiling& z) {
        C = arena.take<double>(z.M * 2 * z.Mp);
        square = arena.take<double>(4 * z.Mp * z.Mp);
        sum = arena.take<double>(4 * z.Mp * z.Mp);
    }
};

/// The real matrix (2 Mp, 2 Mp) of a |-> w (eq. 15): rows are planes of a, columns planes of w.
template <class A, class P>
void make_readout(Isa isa, const Tiling& z, Readout readout, const View<const complex<P>, 3>& C, Index h,
                  const ReadoutScratch& scratch, A* G, Index ld) {
    const Index M = z.M, Mp = z.Mp, n2 = 2 * Mp;
    load_C(z, C, h, scratch.C);
    // square = [Cre | Cim]^T [Cre | Cim]
    const double* planes = scratch.C;
    Products<double>{isa}({planes, 1, n2}, planes, n2, scratch.square, n2, n2, n2, M, false);
    const auto S = [&](Index i, Index j) { return scratch.square[i * n2 + j]; };
    for (Index j = 0; j < Mp; ++j)
        for (Index i = 0; i < Mp; ++i) {
            A* from_re = G + j * ld + i;
            A* from_im = G + (Mp + j) * ld + i;
            if (readout == Readout::complex_product) {
                const double re = S(i, j) - S(Mp + i, Mp + j), im = S(i, Mp + j) + S(Mp + i, j);
                from_re[0] = static_cast<A>(re), from_re[Mp] = static_cast<A>(im);
                from_im[0] = static_cast<A>(-im), from_im[Mp] = static_cast<A>(re);
            } else {
                from_re[0] = static_cast<A>(4.0 * S(i, j)), from_re[Mp] = static_cast<A>(4.0 * S(Mp + i, j));
                from_im[0] = static_cast<A>(-4.0 * S(i, Mp + j)), from_im[Mp] = static_cast<A>(-4.0 * S(Mp + i, Mp + j));
            }
        }
}

/// Writes the gradients of head h's parameters: `outer` (2 Mp, ld) is sum e a^T over planes (eq. 23), and
/// dLam, dBbar of mode m come from the method.
template <class P, class F>
void write_head_gradients(Isa isa, const Tiling& z, const Options& options, const Params<P>& params,
                          const BasicParams<P, complex<P>>& grads, Index h, const double* outer, Index ld,
                          const ReadoutScratch& scratch, F&& discrete) {
    const Index M = z.M, Mp = z.Mp, n2 = 2 * Mp;
    double dlog_dt = 0.0;
    for (Index m = 0; m < M; ++m) {
        const Mode mode = mode_at(options.disc, params, h, m);
        c64 dLam, dBbar;
        discrete(m, mode, dLam, dBbar);
        const ModeGrads g = discretize_backward(options.disc, mode, cast<double>(params.B(h, m)), dLam, dBbar);
        dlog_dt += g.log_dt;
        if (grads.log_neg_re) grads.log_neg_re(h, m) = static_cast<P>(g.log_neg_re);
        if (grads.im) grads.im(h, m) = static_cast<P>(g.im);
        if (grads.B) grads.B(h, m) = cast<P>(g.B);
    }
    if (grads.log_dt) grads.log_dt(h) = static_cast<P>(dlog_dt);
    if (!grads.C) return;
    // dC = conj(Cs F) with Cs the planes that the readout takes of C. complex_product: F = H + H^T, H = sum e a^T
    // complex. real_parts: F = 4 sum (e a^T + a e^T) with the first factor's planes kept apart: rows of Re(C e).
    load_C(z, params.C, h, scratch.C);
    const double* planes = scratch.C;
    const auto O = [&](Index i, Index j) { return outer[i * ld + j]; };
    double* F_ = scratch.square;  // (2 Mp, 2 Mp): what planes [Cre | Cim] are multiplied with, to planes of conj(dC)
    for (Index i = 0; i < Mp; ++i)
        for (Index j = 0; j < Mp; ++j) {
            double* from_re = F_ + i * n2 + j;
            double* from_im = F_ + (Mp + i) * n2 + j;
            if (options.readout == Readout::complex_product) {
                const double re = O(i, j) - O(Mp + i, Mp + j) + O(j, i) - O(Mp + j, Mp + i);
                const double im = O(i, Mp + j) + O(Mp + i, j) + O(j, Mp + i) + O(Mp + j, i);
                from_re[0] = re, from_re[Mp] = im;
                from_im[0] = -im, from_im[Mp] = re;
            } else {
                from_re[0] = 4.0 * (O(i, j) + O(j, i)), from_re[Mp] = 4.0 * (O(i, Mp + j) + O(Mp + j, i));
                from_im[0] = -4.0 * (O(Mp + i, j) + O(j, Mp + i));
                from_im[Mp] = -4.0 * (O(Mp + i, Mp + j) + O(Mp + j, Mp + i));
            }
        }
    Products<double>{isa}({planes, n2}, F_, n2, scratch.sum, n2, M, n2, n2, false);
    for (Index m = 0; m < M; ++m)
        for (Index n = 0; n < M; ++n)
            grads.C(h, m, n) = cast<P>(c64{scratch.sum[m * n2 + n], -scratch.sum[m * n2 + Mp + n]});
}

/// How sums of parameters' gradients are split: `groups` sets of sequences times `runs` pieces of each
/// sequence. From the shape alone, so that sums do not depend on threads.
struct SumSplit {
    Index groups, runs;
    explicit SumSplit(const Shape& s)
        : groups(std::clamp<Index>(s.states(), 1, max_runs)),
          runs(std::clamp<Index>(s.length / (4 * stretch_tokens), 1, max_runs / groups)) {}
    Index size() const { return groups * runs; }
};

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
