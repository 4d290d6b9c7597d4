// Interdomain Attention on the CPU by convolutions, for study: every element of the state is a convolution of a
// column of keys or values with powers of one mode (eq. 27). Modes are streamed: the states of one mode and one
// vector of columns are made, used for all tokens, and forgotten, so that no L x M x (R + d) array appears. What a
// query makes of them over all modes, a, w, e and p, are arrays of L x M. Everything is float64.
//
// Lanes are columns. A kernel is real: real and imaginary parts of Lam^n are two lanes of one transform.
// A transform mixes all tokens of a sequence: an Inf or NaN reaches all of its tokens, not only later ones as with
// the other methods. Other sequences are not touched.
//
// Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <interdomain/detail/cpu_scan.hpp>
#include <interstate/cpu/fft.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail {

using fft::detail::Pair;

/// Values of Re and Im of X from those of a column block and of the kernel of a mode, times Bbar.
struct StateValues {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* kernel, const double* column, c64 Bbar, Index m, double* re, double* im) {
        using V = simd::Native<Set, double>;
        constexpr int W = V::lanes;
        const double scale = 1.0 / static_cast<double>(m);
        for (Index j = 0; j < m * 2 * W; j += 2 * W) {
            const c64 kr{kernel[j], kernel[j + W]}, ki{kernel[j + 1], kernel[j + W + 1]};
            const c64 r = (scale * Bbar.re) * kr + (-scale * Bbar.im) * ki, i = (scale * Bbar.im) * kr + (scale * Bbar.re) * ki;
            const auto x = fft::detail::get<V>(column + j);
            for (const auto& [k, to] : {std::pair{r, re}, std::pair{i, im}}) {
                const V kre = simd::broadcast<V>(k.re), kim = simd::broadcast<V>(k.im);
                fft::detail::put(to + j, Pair<V>{simd::fnma(kim, x.im, kre * x.re), simd::fma(kim, x.re, kre * x.im)});
            }
        }
    }
};

/// Values of the adjoint's parts from those of its sources' (eq. 28), in place: correlation, by conjugate kernels.
struct AdjointValues {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* kernel, double* re, double* im, Index m) {
        using V = simd::Native<Set, double>;
        constexpr int W = V::lanes;
        const double scale = 1.0 / static_cast<double>(m);
        for (Index j = 0; j < m * 2 * W; j += 2 * W) {
            const Pair<V> kr{simd::broadcast<V>(scale * kernel[j]), simd::broadcast<V>(scale * kernel[j + W])};
            const Pair<V> ki{simd::broadcast<V>(scale * kernel[j + 1]), simd::broadcast<V>(scale * kernel[j + W + 1])};
            const auto fr = fft::detail::get<V>(re + j), fi = fft::detail::get<V>(im + j);
            fft::detail::put(re + j, fft::detail::turn_back(kr, fr) - fft::detail::turn_back(ki, fi));
            fft::detail::put(im + j, fft::detail::turn_back(ki, fr) + fft::detail::turn_back(kr, fi));
        }
    }
};

/// (re, im)[t] += power[t * step] start, lane by lane; rows of a transform are 2 W apart.
struct AddResponse {
    template <class Set>
    static INTERSTATE_INLINE void run(const c64* power, Index step, const double* start, Index length, double* re,
                                      double* im) {
        using V = simd::Native<Set, double>;
        constexpr int W = V::lanes;
        const V sr = simd::load<V>(start), si = simd::load<V>(start + W);
        for (Index t = 0; t < length; ++t) {
            const V pr = simd::broadcast<V>(power[t * step].re), pi = simd::broadcast<V>(power[t * step].im);
            simd::store(re + t * 2 * W, simd::fnma(pi, si, simd::fma(pr, sr, simd::load<V>(re + t * 2 * W))));
            simd::store(im + t * 2 * W, simd::fma(pi, sr, simd::fma(pr, si, simd::load<V>(im + t * 2 * W))));
        }
    }
};

/// a[t] += sum over lanes of X[t] x[t], for one mode: planes of `a` are Mp apart, its tokens 2 Mp.
struct ContractLanes {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* re, const double* im, const double* x, Index length, double* a, Index Mp) {
        using V = simd::Native<Set, double>;
        constexpr int W = V::lanes;
        for (Index t = 0; t < length; ++t) {
            const V at = simd::load<V>(x + t * W);
            a[t * 2 * Mp] += simd::reduce_add(simd::load<V>(re + t * 2 * W) * at);
            a[t * 2 * Mp + Mp] += simd::reduce_add(simd::load<V>(im + t * 2 * W) * at);
        }
    }
};

/// o[t] += Re(X[t] w[t]) for one mode.
struct ExpandLanes {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* re, const double* im, const double* w, Index Mp, Index length, double* o) {
        using V = simd::Native<Set, double>;
        constexpr int W = V::lanes;
        for (Index t = 0; t < length; ++t) {
            const V wr = simd::broadcast<V>(w[t * 2 * Mp]), wi = simd::broadcast<V>(w[t * 2 * Mp + Mp]);
            simd::store(o + t * W, simd::fnma(wi, simd::load<V>(im + t * 2 * W),
                                              simd::fma(wr, simd::load<V>(re + t * 2 * W), simd::load<V>(o + t * W))));
        }
    }
};

/// Sources of the adjoint of one mode: (re, im)[t] += p[t] x[t].
struct AddSources {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* p, Index Mp, const double* x, Index length, double* re, double* im) {
        using V = simd::Native<Set, double>;
        constexpr int W = V::lanes;
        for (Index t = 0; t < length; ++t) {
            const V at = simd::load<V>(x + t * W);
            simd::store(re + t * 2 * W, simd::fma(simd::broadcast<V>(p[t * 2 * Mp]), at, simd::load<V>(re + t * 2 * W)));
            simd::store(im + t * 2 * W, simd::fma(simd::broadcast<V>(p[t * 2 * Mp + Mp]), at, simd::load<V>(im + t * 2 * W)));
        }
    }
};

/// What one mode's adjoint Y gives (eq. 12): dz[t] += Re(Bbar Y[t]), and sums over tokens and lanes of Y[t] z[t] and of
/// Y[t] X[t-1], X[-1] being `start`.
struct AdjointSums {
    struct Args {
        const double *Yre, *Yim, *Xre, *Xim, *start, *z;
        double* dz;
        c64 Bbar;
        Index length;
        double *dBbar, *dLam;  // (re, im) Mp apart
        Index Mp;
    };
    template <class Set>
    static INTERSTATE_INLINE void run(const Args& g) {
        using V = simd::Native<Set, double>;
        constexpr int W = V::lanes;
        const V br = simd::broadcast<V>(g.Bbar.re), bi = simd::broadcast<V>(g.Bbar.im);
        V Br = simd::broadcast<V>(0.0), Bi = Br, Lr = Br, Li = Br;
        V xr = simd::load<V>(g.start), xi = simd::load<V>(g.start + W);
        for (Index t = 0; t < g.length; ++t) {
            const V yr = simd::load<V>(g.Yre + t * 2 * W), yi = simd::load<V>(g.Yim + t * 2 * W);
            const V z = simd::load<V>(g.z + t * W);
            simd::store(g.dz + t * W, simd::fnma(bi, yi, simd::fma(br, yr, simd::load<V>(g.dz + t * W))));
            Br = simd::fma(yr, z, Br), Bi = simd::fma(yi, z, Bi);
            Lr = simd::fnma(yi, xi, simd::fma(yr, xr, Lr)), Li = simd::fma(yi, xr, simd::fma(yr, xi, Li));
            xr = simd::load<V>(g.Xre + t * 2 * W), xi = simd::load<V>(g.Xim + t * 2 * W);
        }
        g.dBbar[0] += simd::reduce_add(Br), g.dBbar[g.Mp] += simd::reduce_add(Bi);
        g.dLam[0] += simd::reduce_add(Lr), g.dLam[g.Mp] += simd::reduce_add(Li);
    }
};

struct FftScratch {
    double *column, *kernel, *Xre, *Xim, *Yre, *Yim;  // (m, 2, W)
    c64* power;                                       // (L + 1): Lam^n of a mode
    double *z, *dz, *x, *sum;                         // (L, W), (L, W), (group, L, W), (group, L, W)
    double *up;                                       // (group, L, V): do, and do+ of a normaliser
    double *a, *w, *e, *p;                            // (group, L, 2 Mp)
    double *start, *end;                              // (2, W)
    FftScratch(Arena& arena, const Tiling& t, const Shape& s, pass which, Index W) {
        const bool back = which == pass::backward;
        const Index L = s.length, m = fft::size_for(L), tokens = s.group() * L;
        for (double** at : {&column, &kernel, &Xre, &Xim}) *at = arena.take<double>(m * 2 * W);
        for (double** at : {&Yre, &Yim}) *at = arena.take<double>(back ? m * 2 * W : 0);
        power = arena.take<c64>(L + 1);
        z = arena.take<double>(L * W);
        dz = arena.take<double>(back ? L * W : 0);
        x = arena.take<double>(tokens * W);
        sum = arena.take<double>(tokens * W);
        up = arena.take<double>(back ? tokens * t.V : 0);
        for (double** at : {&a, &w}) *at = arena.take<double>(tokens * 2 * t.Mp);
        for (double** at : {&e, &p}) *at = arena.take<double>(back ? tokens * 2 * t.Mp : 0);
        start = arena.take<double>(2 * W);
        end = arena.take<double>(2 * W);
    }
};

struct FftLayout {
    std::byte *heads, *scratch;
    double *sums, *roots;
    Index head_bytes, scratch_bytes;

    FftLayout(Arena& arena, const Options& options, const Shape& s, pass which, int threads, Index W)
        : FftLayout(arena, Tiling(options, s), sized(s), which, threads, W) {}
    FftLayout(Arena& arena, const Tiling& z, const Shape& s, pass which, int threads, Index W) {
        head_bytes = static_cast<Index>(layout_size<ExactHead>(z));
        scratch_bytes = static_cast<Index>(
            std::max(layout_size<FftScratch>(z, s, which, W), layout_size<ReadoutScratch>(z)));
        heads = arena.take<std::byte>(s.kv_heads * head_bytes);
        sums = arena.take<double>(which == pass::backward ? s.kv_heads * SumSplit(s).groups * DiscreteSums(z).size : 0);
        roots = arena.take<double>(fft::roots_size(fft::size_for(s.length)));
        scratch = arena.take<std::byte>(threads * scratch_bytes);
    }
};

template <class T, class Param>
struct FftCall {
    using A = acc_t<T>;
    const cpu& exec;
    const Options& options;
    const Inputs<T, Param>& in;
    FftLayout layout;
    Shape s = shape_of(in);
    Tiling z{options, s};
    Index W = simd::lanes<double>(exec.isa);
    Products<double> product{exec.isa};
    Upstream<T> upstream{};
    Grads<T, Param> grads{};

    template <class L, class... Args>
    static L carve(std::byte* base, Index bytes, Index n, const Args&... args) {
        Arena arena(base + n * bytes);
        return L(arena, args...);
    }
    ExactHead head(Index h) const { return carve<ExactHead>(layout.heads, layout.head_bytes, h, z); }
    ReadoutScratch readout_scratch(int worker) const {
        return carve<ReadoutScratch>(layout.scratch, layout.scratch_bytes, worker, z);
    }
    FftScratch scratch(int worker, pass which) const {
        return carve<FftScratch>(layout.scratch, layout.scratch_bytes, worker, z, s, which, W);
    }
    void prepare() const {
        fft::fill_roots(layout.roots, fft::size_for(sized(s).length), exec.threads);
        parallel_for(s.kv_heads, exec.threads, [&](Index h, int worker) {
            head(h).fill(exec.isa, z, options, in.params, h, readout_scratch(worker));
        });
    }
    template <class Body, class... Args>
    void run(const Args&... args) const {
        simd::run_body<Body>(exec.isa, args...);
    }
    static const double* as_const(double* x) { return x; }

    /// One sequence and head, a task: what its steps share.
    struct Sequence {
        Recurrence r;
        ExactHead head;
        FftScratch w;
        Index length, m;
        Index query(Index g, Index group) const { return r.h * group + g; }
    };
    Sequence sequence(Index i, Index h, int worker, pass which) const {
        const Recurrence r = Recurrence::at(in, s, i, h);
        return {r, head(h), scratch(worker, which), r.length(), fft::size_for(r.length())};
    }
    c64 Lam(const Sequence& q, Index m) const { return {q.head.Lam[m], q.head.Lam[z.Mp + m]}; }
    c64 Bbar(const Sequence& q, Index m) const { return {q.head.Bbar[m], q.head.Bbar[z.Mp + m]}; }

    /// W columns of x from `first` on, `columns` there are, to (length, W); x[columns] reads as `ones` where `extra`.
    template <class X>
    void load_columns(const Sequence& q, const View<X, 4>& x, Index head, Index first, Index columns, bool extra, double ones,
                      double* to) const {
        for (Index t = 0; t < q.length; ++t)
            for (Index lane = 0; lane < W; ++lane) {
                const Index c = first + lane;
                to[t * W + lane] = c < columns ? static_cast<double>(x(q.r.b, q.r.rows.begin + t, head, c))
                                   : c == columns && extra ? ones
                                                           : 0.0;
            }
    }
    template <class X>
    void store_columns(const Sequence& q, const double* from, const View<X, 4>& x, Index head, Index first) const {
        if (!x) return;
        for (Index t = 0; t < q.length; ++t)
            for (Index lane = 0; lane < std::min(W, x.extent[3] - first); ++lane)
                x(q.r.b, q.r.rows.begin + t, head, first + lane) = X(from[t * W + lane]);
    }
    void transform(double* x, Index m) const { run<fft::Forward<double>>(x, m, as_const(layout.roots)); }
    void invert(double* x, Index m) const { run<fft::Inverse<double>>(x, m, as_const(layout.roots)); }

    /// Element (m, column) of a state given as x and eta; zero where absent or beyond the columns.
    template <class X, class Eta>
    c64 element(const Sequence& q, const X& x, const Eta& eta, Index m, Index column) const {
        if (column < s.columns()) return x ? cast<double>(x(q.r.i, q.r.h, m, column)) : c64{};
        return column == s.columns() && z.normalized && eta ? cast<double>(eta(q.r.i, q.r.h, m)) : c64{};
    }
    /// The column of X that lane 0 of a block is, for `values` or keys; whether a lane is a column at all.
    Index column_of(bool values, Index first, Index lane) const { return (values ? z.R : 0) + first + lane; }
    bool has_column(bool values, Index first, Index lane) const { return first + lane < (values ? z.V : z.R); }

    /// Values of the tokens of a block of columns.
    void load_block(const Sequence& q, bool values, Index first) const {
        if (values)
            load_columns(q, in.v, q.r.h, first, z.d, z.normalized, 1.0, q.w.z);
        else
            load_columns(q, in.k, q.r.h, first, z.R, false, 0.0, q.w.z);
        std::fill_n(q.w.column, q.m * 2 * W, 0.0);
        for (Index t = 0; t < q.length; ++t) std::copy_n(q.w.z + t * W, W, q.w.column + t * 2 * W);
        transform(q.w.column, q.m);
    }
    /// States of mode m after every token, for the block that was loaded (eq. 27); w.start: the initial one.
    void make_states(const Sequence& q, bool values, Index first, Index m) const {
        const FftScratch& w = q.w;
        for (Index t = 0; t <= q.length; ++t)  // restarted, so that errors do not grow with t
            w.power[t] = t % 64 == 0 ? s4d::detail::raise(Lam(q, m), t) : w.power[t - 1] * Lam(q, m);
        std::fill_n(w.kernel, q.m * 2 * W, 0.0);
        for (Index t = 0; t < q.length; ++t) w.kernel[t * 2 * W] = w.power[t].re, w.kernel[t * 2 * W + 1] = w.power[t].im;
        transform(w.kernel, q.m);
        run<StateValues>(as_const(w.kernel), as_const(w.column), Bbar(q, m), q.m, w.Xre, w.Xim);
        invert(w.Xre, q.m);
        invert(w.Xim, q.m);
        for (Index lane = 0; lane < W; ++lane) {
            const c64 x0 = has_column(values, first, lane)
                               ? element(q, in.x0, in.eta0, m, column_of(values, first, lane))
                               : c64{};
            w.start[lane] = x0.re, w.start[W + lane] = x0.im;
        }
        run<AddResponse>(static_cast<const c64*>(w.power + 1), Index{1}, as_const(w.start), q.length, w.Xre, w.Xim);
    }
    /// f(first, m) with the states of every block of columns and mode.
    template <class Begin, class F, class End>
    void each_state(const Sequence& q, bool values, Begin&& begin, F&& f, End&& end) const {
        for (Index first = 0; first < (values ? z.V : z.R); first += W) {
            load_block(q, values, first);
            begin(first);
            for (Index m = 0; m < z.M; ++m) {
                make_states(q, values, first, m);
                f(first, m);
            }
            end(first);
        }
    }
    double* row(double* x, Index g, const Sequence& q, Index width) const { return x + g * q.length * width; }
    void read_out(const Sequence& q, const double* a, double* w) const {
        const Index n2 = 2 * z.Mp;
        product({a, n2}, q.head.readout, n2, w, n2, s.group() * q.length, n2, n2, false);
    }
    /// a of every query (eq. 8), then w.
    void contract_keys(const Sequence& q) const {
        const FftScratch& w = q.w;
        std::fill_n(w.a, s.group() * q.length * 2 * z.Mp, 0.0);
        each_state(
            q, false,
            [&](Index first) {
                for (Index g = 0; g < s.group(); ++g)
                    load_columns(q, in.q, q.query(g, s.group()), first, z.R, false, 0.0, row(w.x, g, q, W));
            },
            [&](Index, Index m) {
                for (Index g = 0; g < s.group(); ++g)
                    run<ContractLanes>(as_const(w.Xre), as_const(w.Xim), as_const(row(w.x, g, q, W)), q.length,
                                       row(w.a, g, q, 2 * z.Mp) + m, z.Mp);
            },
            [](Index) {});
        read_out(q, w.a, w.w);
    }
    /// Numerators and denominators, block by block: use(first, g, o (length, W)).
    template <class Each, class Use>
    void expand_values(const Sequence& q, Each&& each, Use&& use) const {
        const FftScratch& w = q.w;
        each_state(
            q, true, [&](Index) { std::fill_n(w.sum, s.group() * q.length * W, 0.0); },
            [&](Index first, Index m) {
                each(first, m);
                for (Index g = 0; g < s.group(); ++g)
                    run<ExpandLanes>(as_const(w.Xre), as_const(w.Xim), as_const(row(w.w, g, q, 2 * z.Mp) + m), z.Mp, q.length,
                                     row(w.sum, g, q, W));
            },
            [&](Index first) {
                for (Index g = 0; g < s.group(); ++g) use(first, g, row(w.sum, g, q, W));
            });
    }

    void store_end(const Sequence& q, bool values, Index first, Index m, const Outputs<T>& out) const {
        for (Index lane = 0; lane < W; ++lane) {
            if (!has_column(values, first, lane)) continue;
            const Index at = (q.length - 1) * 2 * W + lane, column = column_of(values, first, lane);
            const c64 end{q.w.Xre[at], q.w.Xim[at]};
            if (column < s.columns() && out.xT) out.xT(q.r.i, q.r.h, m, column) = cast<A>(end);
            if (column == s.columns() && out.etaT) out.etaT(q.r.i, q.r.h, m) = cast<A>(end);
        }
    }
    /// The states of an empty sequence, or adjoints: what goes in comes out.
    void pass_through(const Recurrence& r, const View<const complex<A>, 4>& x, const View<const complex<A>, 3>& eta,
                      const View<complex<A>, 4>& to, const View<complex<A>, 3>& to_eta) const {
        for (Index m = 0; m < z.M; ++m) {
            for (Index c = 0; c < s.columns() && to; ++c)
                to(r.i, r.h, m, c) = x ? x(r.i, r.h, m, c) : complex<A>{};
            if (to_eta) to_eta(r.i, r.h, m) = eta ? eta(r.i, r.h, m) : complex<A>{};
        }
    }
    void forward(const Outputs<T>& out) const {
        zero_outside_sequences(out.o, in.cu_seqlens);
        prepare();
        parallel_for(s.states() * s.kv_heads, exec.threads, [&](Index task, int worker) {
            const Sequence q = sequence(task / s.kv_heads, task % s.kv_heads, worker, pass::forward);
            if (q.length == 0) return pass_through(q.r, in.x0, in.eta0, out.xT, out.etaT);
            contract_keys(q);
            // A normaliser's denominators are a column: o of eq. 6 has to wait for it in w.a, which is free by now.
            const Index n2 = 2 * z.Mp;
            expand_values(
                q, [&](Index first, Index m) { store_end(q, true, first, m, out); },
                [&](Index first, Index g, const double* o) {
                    if (z.normalized && first <= z.d && z.d < first + W)
                        for (Index t = 0; t < q.length; ++t) row(q.w.a, g, q, n2)[t * n2] = o[t * W + z.d - first];
                    store_columns(q, o, out.o, q.query(g, s.group()), first);
                });
            if (out.xT)
                each_state(
                    q, false, [](Index) {}, [&](Index first, Index m) { store_end(q, false, first, m, out); }, [](Index) {});
            if (z.normalized && z.M > 0)
                expand_values(
                    q, [](Index, Index) {},
                    [&](Index first, Index g, double* o) {
                        for (Index t = 0; t < q.length; ++t)
                            for (Index lane = 0; lane < W; ++lane) o[t * W + lane] /= row(q.w.a, g, q, n2)[t * n2];
                        store_columns(q, o, out.o, q.query(g, s.group()), first);
                    });
        });
    }

    /// do of every query into w.up, as eq. 11 has it with a normaliser.
    void load_upstream(const Sequence& q) const {
        const FftScratch& w = q.w;
        const auto at = [&](Index g, Index t) { return w.up + (g * q.length + t) * z.V; };
        for (Index g = 0; g < s.group(); ++g)
            for (Index t = 0; t < q.length; ++t)
                for (Index c = 0; c < z.V; ++c) {
                    const Index row = q.r.rows.begin + t;
                    at(g, t)[c] = c < z.d ? static_cast<double>(upstream.o(q.r.b, row, q.query(g, s.group()), c)) : 0.0;
                }
        if (!z.normalized) return;
        // up[d] gathers do . numerator, and e's place holds the denominator until then.
        const Index n2 = 2 * z.Mp;
        expand_values(
            q, [](Index, Index) {},
            [&](Index first, Index g, const double* o) {
                for (Index t = 0; t < q.length; ++t)
                    for (Index lane = 0; lane < std::min(W, z.V - first); ++lane) {
                        const Index c = first + lane;
                        if (c < z.d)
                            at(g, t)[z.d] += at(g, t)[c] * o[t * W + lane];
                        else
                            row(w.e, g, q, n2)[t * n2] = o[t * W + lane];
                    }
            });
        for (Index g = 0; g < s.group(); ++g)
            for (Index t = 0; t < q.length; ++t) {
                const double den = row(w.e, g, q, n2)[t * n2];
                for (Index c = 0; c < z.d; ++c) at(g, t)[c] /= den;
                at(g, t)[z.d] /= -den * den;
            }
    }
    /// W columns of w.up of one head of the group.
    void upstream_columns(const Sequence& q, Index first, Index g, double* to) const {
        for (Index t = 0; t < q.length; ++t)
            for (Index lane = 0; lane < W; ++lane)
                to[t * W + lane] = first + lane < z.V ? q.w.up[(g * q.length + t) * z.V + first + lane] : 0.0;
    }
    void backward_sequence(const Sequence& q, double* sums) const {
        const FftScratch& w = q.w;
        const Index group = s.group(), n2 = 2 * z.Mp;
        const DiscreteSums sums_at(z);
        if (z.M == 0) {
            for (Index t = 0; t < q.length; ++t) {
                for (Index g = 0; g < group && grads.q; ++g)
                    for (Index c = 0; c < z.R; ++c) grads.q(q.r.b, q.r.rows.begin + t, q.query(g, group), c) = T(0.0f);
                for (Index c = 0; c < z.R && grads.k; ++c) grads.k(q.r.b, q.r.rows.begin + t, q.r.h, c) = T(0.0f);
                for (Index c = 0; c < z.d && grads.v; ++c) grads.v(q.r.b, q.r.rows.begin + t, q.r.h, c) = T(0.0f);
            }
            return;
        }
        contract_keys(q);
        load_upstream(q);
        std::fill_n(w.e, group * q.length * n2, 0.0);
        each_state(
            q, true,
            [&](Index first) {
                for (Index g = 0; g < group; ++g) upstream_columns(q, first, g, row(w.x, g, q, W));
            },
            [&](Index, Index m) {
                for (Index g = 0; g < group; ++g)
                    run<ContractLanes>(as_const(w.Xre), as_const(w.Xim), as_const(row(w.x, g, q, W)), q.length,
                                       row(w.e, g, q, n2) + m, z.Mp);
            },
            [](Index) {});
        read_out(q, w.e, w.p);
        product({w.e, 1, n2}, w.a, n2, sums, n2, n2, n2, group * q.length, true);
        for (const bool values : {false, true})
            each_state(
                q, values,
                [&](Index first) {
                    std::fill_n(w.dz, q.length * W, 0.0);
                    std::fill_n(w.sum, group * q.length * W, 0.0);
                    for (Index g = 0; g < group; ++g) {
                        double* x = row(w.x, g, q, W);
                        if (values)
                            upstream_columns(q, first, g, x);
                        else
                            load_columns(q, in.q, q.query(g, group), first, z.R, false, 0.0, x);
                    }
                },
                [&](Index first, Index m) {
                    std::fill_n(w.Yre, q.m * 2 * W, 0.0);
                    std::fill_n(w.Yim, q.m * 2 * W, 0.0);
                    for (Index g = 0; g < group; ++g) {
                        const double* p = row(values ? w.w : w.p, g, q, n2) + m;
                        run<AddSources>(p, z.Mp, as_const(row(w.x, g, q, W)), q.length, w.Yre, w.Yim);
                        if (!values)
                            run<ExpandLanes>(as_const(w.Xre), as_const(w.Xim), p, z.Mp, q.length, row(w.sum, g, q, W));
                    }
                    transform(w.Yre, q.m);
                    transform(w.Yim, q.m);
                    run<AdjointValues>(as_const(w.kernel), w.Yre, w.Yim, q.m);
                    invert(w.Yre, q.m);
                    invert(w.Yim, q.m);
                    for (Index lane = 0; lane < W; ++lane) {
                        const c64 end = has_column(values, first, lane)
                                            ? conj(element(q, upstream.xT, upstream.etaT, m, column_of(values, first, lane)))
                                            : c64{};
                        w.end[lane] = end.re, w.end[W + lane] = end.im;
                    }
                    run<AddResponse>(static_cast<const c64*>(w.power + q.length - 1), Index{-1}, as_const(w.end), q.length, w.Yre,
                                     w.Yim);
                    run<AdjointSums>(AdjointSums::Args{w.Yre, w.Yim, w.Xre, w.Xim, w.start, w.z, w.dz, Bbar(q, m), q.length,
                                                       sums + sums_at.Bbar + m, sums + sums_at.Lam + m, z.Mp});
                    for (Index lane = 0; lane < W; ++lane) {
                        if (!has_column(values, first, lane)) continue;
                        const Index column = column_of(values, first, lane);
                        const c64 dx0 = conj(Lam(q, m) * c64{w.Yre[lane], w.Yim[lane]});
                        if (column < s.columns() && grads.x0) grads.x0(q.r.i, q.r.h, m, column) = cast<A>(dx0);
                        if (column == s.columns() && grads.eta0) grads.eta0(q.r.i, q.r.h, m) = cast<A>(dx0);
                    }
                },
                [&](Index first) {
                    store_columns(q, w.dz, values ? grads.v : grads.k, q.r.h, first);
                    for (Index g = 0; g < group && !values; ++g)
                        store_columns(q, row(w.sum, g, q, W), grads.q, q.query(g, group), first);
                });
    }
    void backward() const {
        zero_outside_sequences(grads.q, in.cu_seqlens);
        zero_outside_sequences(grads.k, in.cu_seqlens);
        zero_outside_sequences(grads.v, in.cu_seqlens);
        prepare();
        const Index groups = SumSplit(s).groups, size = DiscreteSums(z).size;
        parallel_for(s.kv_heads * groups, exec.threads, [&](Index task, int worker) {
            double* sums = layout.sums + task * size;
            std::fill_n(sums, size, 0.0);
            for (Index i = task % groups; i < s.states(); i += groups) {
                const Sequence q = sequence(i, task / groups, worker, pass::backward);
                if (q.length > 0)
                    backward_sequence(q, sums);
                else
                    pass_through(q.r, upstream.xT, upstream.etaT, grads.x0, grads.eta0);
            }
        });
        write_discrete_gradients(exec, z, options, in.params, grads.params, s.kv_heads, groups, layout.sums,
                                 [&](int worker) { return readout_scratch(worker); });
    }
};

template <class T, class P>
FftCall<T, P> fft_call(const cpu& exec, const Options& options, const Inputs<T, P>& in, pass which, Workspace ws) {
    Arena arena(ws.data);
    return {exec, options, in,
            FftLayout(arena, options, shape_of(in), which, exec.threads, simd::lanes<double>(exec.isa))};
}

/// exec has been resolved.
template <class T, class P>
void fft_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Workspace ws) {
    fft_call(exec, options, in, pass::forward, ws).forward(out);
}
template <class T, class P>
void fft_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Upstream<T>& upstream,
                  const Grads<T, P>& grads, Workspace ws) {
    auto call = fft_call(exec, options, in, pass::backward, ws);
    call.upstream = upstream;
    call.grads = grads;
    call.backward();
}

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
