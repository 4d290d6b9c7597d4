// Interdomain Attention on the CPU token by token (eq. 3, 8, 9 and 12), vector lanes over modes. Everything is
// float64: a float recurrence drifts with every token, and what this method is for is being simple.
//
// Backward goes through segments from checkpoints: a state for every 256 tokens, which forward keeps; from it one
// for every 16 of them; from that one for every token of the 16, which are walked in reverse.
//
// Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <interdomain/detail/cpu_tile.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail {

inline constexpr Index segment_tokens = 16;  // divides stretch_tokens

/// x[r] = power o x[r] + z[r] b: a token into a state (eq. 3), rows without gaps.
struct Advance {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* power, const double* b, const double* z, const double* from, double* to,
                                      Index rows, Index Mp) {
        using V = simd::Native<Set, double>;
        for (Index r = 0; r < rows; ++r) {
            const V scale = simd::broadcast<V>(z[r]);
            for (Index m = 0; m < Mp; m += V::lanes) {
                const auto gain = load_planes<V>(b + m, Mp);
                store_planes(to + r * 2 * Mp + m, Mp,
                             fma(load_planes<V>(power + m, Mp), load_planes<V>(from + r * 2 * Mp + m, Mp),
                                 Planes<V>{scale * gain.re, scale * gain.im}));
            }
        }
    }
};

/// y[r] += x[r] v for real x and planes v, rows without gaps.
struct AddOuter {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* x, const double* v, double* y, Index rows, Index width) {
        using V = simd::Native<Set, double>;
        for (Index r = 0; r < rows; ++r) {
            const V scale = simd::broadcast<V>(x[r]);
            for (Index m = 0; m < width; m += V::lanes)
                simd::store(y + r * width + m, simd::fma(scale, simd::load<V>(v + m), simd::load<V>(y + r * width + m)));
        }
    }
};

/// out[r] = Re sum_m x[r, m] v[m]
struct RealDots {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* x, const double* v, double* out, Index rows, Index Mp) {
        using V = simd::Native<Set, double>;
        for (Index r = 0; r < rows; ++r) {
            V sum = simd::broadcast<V>(0.0);
            for (Index m = 0; m < Mp; m += V::lanes) {
                const auto a = load_planes<V>(x + r * 2 * Mp + m, Mp), b = load_planes<V>(v + m, Mp);
                sum = simd::fnma(a.im, b.im, simd::fma(a.re, b.re, sum));
            }
            out[r] = simd::reduce_add(sum);
        }
    }
};

/// What a head needs in float64: the recurrence and the readout.
struct ExactHead {
    double *Lam, *Bbar;  // (2 Mp)
    double* readout;     // (2 Mp, 2 Mp): G
    ExactHead(Arena& arena, const Tiling& z) {
        Lam = arena.take<double>(2 * z.Mp);
        Bbar = arena.take<double>(2 * z.Mp);
        readout = arena.take<double>(4 * z.Mp * z.Mp);
    }
    template <class P>
    void fill(Isa isa, const Tiling& z, const Options& options, const Params<P>& params, Index h,
              const ReadoutScratch& scratch) const {
        for (Index m = 0; m < z.Mp; ++m) {
            const Mode mode = m < z.M ? mode_at(options.disc, params, h, m) : Mode{};
            Lam[m] = mode.Abar.re, Lam[z.Mp + m] = mode.Abar.im;
            Bbar[m] = mode.Bbar.re, Bbar[z.Mp + m] = mode.Bbar.im;
        }
        make_readout(isa, z, options.readout, params.C, h, scratch, readout, 2 * z.Mp);
    }
};

/// Sums of a task for its head's parameters: (2 Mp, 2 Mp) of e a^T, then dLam and dBbar before conjugation.
struct DiscreteSums {
    Index Lam, Bbar, size;
    explicit DiscreteSums(const Tiling& z) : Lam(4 * z.Mp * z.Mp), Bbar(Lam + 2 * z.Mp), size(Bbar + 2 * z.Mp) {}
};

/// Gradients of all heads' parameters from sums (Hkv, groups, DiscreteSums::size), added in their order.
template <class P, class F>
void write_discrete_gradients(const cpu& exec, const Tiling& z, const Options& options, const Params<P>& params,
                              const BasicParams<P, complex<P>>& grads, Index heads, Index groups, double* sums,
                              F&& readout_scratch) {
    const DiscreteSums at(z);
    parallel_for(heads, exec.threads, [&](Index h, int worker) {
        double* total = sums + h * groups * at.size;
        for (Index group = 1; group < groups; ++group)
            for (Index j = 0; j < at.size; ++j) total[j] += total[group * at.size + j];
        write_head_gradients(exec.isa, z, options, params, grads, h, total, 2 * z.Mp, readout_scratch(worker),
                             [&](Index m, const Mode&, c64& dLam, c64& dBbar) {
                                 dLam = {total[at.Lam + m], -total[at.Lam + z.Mp + m]};
                                 dBbar = {total[at.Bbar + m], -total[at.Bbar + z.Mp + m]};
                             });
    });
}

struct ScanScratch {
    double *X, *Y;           // (Wp, 2 Mp); X: one for each token of a segment and one before it
    double* segments;        // (stretch_tokens / segment_tokens, Wp, 2 Mp)
    double *z, *u, *o, *dz;  // (Wp) a token's [k | v], [q | do], results
    double *a, *w, *e, *p;   // (2 Mp)
    ScanScratch(Arena& arena, const Tiling& t, pass which) {
        const bool back = which == pass::backward;
        X = arena.take<double>((back ? segment_tokens + 1 : 1) * t.state_size());
        Y = arena.take<double>(back ? t.state_size() : 0);
        segments = arena.take<double>(back ? stretch_tokens / segment_tokens * t.state_size() : 0);
        for (double** x : {&z, &u, &o, &dz}) *x = arena.take<double>(t.Wp);
        for (double** x : {&a, &w, &e, &p}) *x = arena.take<double>(2 * t.Mp);
    }
};

/// Constants of every head, sums, then scratch of every thread.
struct ScanLayout {
    std::byte *heads, *scratch;
    double* sums;  // (Hkv, SumSplit::groups, DiscreteSums::size), backward
    Index head_bytes, scratch_bytes;

    ScanLayout(Arena& arena, const Options& options, const Shape& s, pass which, int threads)
        : ScanLayout(arena, Tiling(options, s), s, which, threads) {}
    ScanLayout(Arena& arena, const Tiling& z, const Shape& s, pass which, int threads) {
        head_bytes = static_cast<Index>(layout_size<ExactHead>(z));
        scratch_bytes = static_cast<Index>(std::max(layout_size<ScanScratch>(z, which), layout_size<ReadoutScratch>(z)));
        heads = arena.take<std::byte>(s.kv_heads * head_bytes);
        sums = arena.take<double>(which == pass::backward ? s.kv_heads * SumSplit(s).groups * DiscreteSums(z).size : 0);
        scratch = arena.take<std::byte>(threads * scratch_bytes);
    }
};

template <class T, class Param>
struct ScanCall {
    using A = acc_t<T>;
    const cpu& exec;
    const Options& options;
    const Inputs<T, Param>& in;
    ScanLayout layout;
    Shape s = shape_of(in);
    Tiling z{options, s};
    Products<double> product{exec.isa};
    Upstream<T> upstream{};
    Grads<T, Param> grads{};

    template <class L, class... Args>
    static L carve(std::byte* base, Index bytes, Index n, const Args&... args) {
        Arena arena(base + n * bytes);
        return L(arena, args...);
    }
    ExactHead head(Index h) const { return carve<ExactHead>(layout.heads, layout.head_bytes, h, z); }
    ScanScratch scratch(int worker, pass which) const {
        return carve<ScanScratch>(layout.scratch, layout.scratch_bytes, worker, z, which);
    }
    ReadoutScratch readout_scratch(int worker) const {
        return carve<ReadoutScratch>(layout.scratch, layout.scratch_bytes, worker, z);
    }
    void fill_heads() const {
        parallel_for(s.kv_heads, exec.threads, [&](Index h, int worker) {
            head(h).fill(exec.isa, z, options, in.params, h, readout_scratch(worker));
        });
    }
    A* kept_at(A* kept, const Recurrence& r, Index stretch) const {
        return kept + ((r.first + stretch) * s.kv_heads + r.h) * z.state_size();
    }

    /// [left | right] of a token, zeros between and behind; the ones column where there is one.
    template <class X>
    void load_token(const View<X, 4>& left, Index left_head, const View<X, 4>& right, Index right_head, Index b, Index row,
                    double ones, double* to) const {
        std::fill_n(to, z.Wp, 0.0);
        for (Index c = 0; c < z.R; ++c) to[c] = static_cast<double>(left(b, row, left_head, c));
        for (Index c = 0; c < z.d; ++c) to[z.Rp + c] = static_cast<double>(right(b, row, right_head, c));
        if (z.normalized) to[z.Rp + z.d] = ones;
    }
    void advance(const ExactHead& t, const Recurrence& r, Index token, const ScanScratch& w, const double* from,
                 double* to) const {
        load_token(in.k, r.h, in.v, r.h, r.b, r.rows.begin + token, 1.0, w.z);
        simd::run_body<Advance>(exec.isa, static_cast<const double*>(t.Lam), static_cast<const double*>(t.Bbar),
                                static_cast<const double*>(w.z), from, to, z.Wp, z.Mp);
    }
    /// a = X[first row on] x, then w = G a
    void contract(const ExactHead& t, const double* X, const double* x, Index row0, Index n, double* a, double* w) const {
        const Index n2 = 2 * z.Mp;
        product({x + row0, z.Wp}, X + row0 * n2, n2, a, n2, 1, n2, n, false);
        product({a, n2}, t.readout, n2, w, n2, 1, n2, n2, false);
    }
    void dots(const double* X, const double* v, Index row0, Index n, double* out) const {
        simd::run_body<RealDots>(exec.isa, X + row0 * 2 * z.Mp, v, out + row0, n, z.Mp);
    }
    template <class X>
    void store_token(const View<X, 4>& x, Index b, Index row, Index h, const double* from) const {
        if (x)
            for (Index c = 0; c < x.extent[3]; ++c) x(b, row, h, c) = X(from[c]);
    }

    void forward(const Outputs<T>& out, Saved saved) const {
        zero_outside_sequences(out.o, in.cu_seqlens);
        fill_heads();
        A* kept = Arena(saved.data).take<A>(stretch_count(s) * s.kv_heads * z.state_size());
        parallel_for(s.states() * s.kv_heads, exec.threads, [&](Index task, int worker) {
            const ScanScratch w = scratch(worker, pass::forward);
            const Recurrence r = Recurrence::at(in, s, task / s.kv_heads, task % s.kv_heads);
            const ExactHead t = head(r.h);
            load_state(z, in.x0, in.eta0, r.i, r.h, 1.0, w.X);
            for (Index token = 0; token < r.length(); ++token) {
                const Index row = r.rows.begin + token;
                if (kept && token % stretch_tokens == 0)
                    copy_rows(w.X, 2 * z.Mp, kept_at(kept, r, token / stretch_tokens), 2 * z.Mp, z.Wp, 2 * z.Mp);
                advance(t, r, token, w, w.X, w.X);
                for (Index hq = r.h * s.group(); hq < (r.h + 1) * s.group(); ++hq) {
                    for (Index c = 0; c < z.R; ++c) w.u[c] = static_cast<double>(in.q(r.b, row, hq, c));
                    contract(t, w.X, w.u, 0, z.R, w.a, w.w);
                    dots(w.X, w.w, z.Rp, z.V, w.o);
                    double* o = w.o + z.Rp;
                    if (z.normalized)
                        for (Index c = 0; c < z.d; ++c) o[c] /= o[z.d];
                    store_token(out.o, r.b, row, hq, o);
                }
            }
            store_state(z, w.X, out.xT, out.etaT, r.i, r.h, 1.0);
        });
    }

    /// One token of backward: X the state after it, before the one before it; the adjoint in w.Y moves back.
    void token_backward(const ExactHead& t, const Recurrence& r, Index token, const double* before, const double* X,
                        double* sums, const ScanScratch& w) const {
        const Index row = r.rows.begin + token, n2 = 2 * z.Mp;
        for (Index hq = r.h * s.group(); hq < (r.h + 1) * s.group(); ++hq) {
            load_token(in.q, hq, upstream.o, hq, r.b, row, 0.0, w.u);
            contract(t, X, w.u, 0, z.R, w.a, w.w);
            if (z.normalized) {  // eq. 11
                dots(X, w.w, z.Rp, z.V, w.o);
                double* up = w.u + z.Rp;
                const double* o = w.o + z.Rp;
                double carried = 0.0;
                for (Index c = 0; c < z.d; ++c) {
                    carried -= up[c] * (o[c] / o[z.d]);
                    up[c] /= o[z.d];
                }
                up[z.d] = carried / o[z.d];
            }
            contract(t, X, w.u, z.Rp, z.V, w.e, w.p);
            const double *u = w.u, *p = w.p, *v = w.w;
            simd::run_body<AddOuter>(exec.isa, u, p, w.Y, z.Rp, n2);
            simd::run_body<AddOuter>(exec.isa, u + z.Rp, v, w.Y + z.Rp * n2, z.Vp, n2);
            simd::run_body<AddOuter>(exec.isa, static_cast<const double*>(w.e), static_cast<const double*>(w.a), sums, n2, n2);
            if (grads.q) {
                dots(X, w.p, 0, z.R, w.dz);
                store_token(grads.q, r.b, row, hq, w.dz);
            }
        }
        load_token(in.k, r.h, in.v, r.h, r.b, row, 1.0, w.z);
        dots(w.Y, t.Bbar, 0, z.Wp, w.dz);  // eq. 12
        store_token(grads.k, r.b, row, r.h, w.dz);
        store_token(grads.v, r.b, row, r.h, w.dz + z.Rp);
        const DiscreteSums at(z);
        product({w.z, z.Wp}, w.Y, n2, sums + at.Bbar, n2, 1, n2, z.Wp, true);
        simd::run_body<RowSum<double>>(exec.isa, static_cast<const double*>(w.Y), before, sums + at.Lam, n2, z.Wp, z.Mp);
        simd::run_body<Decay<double>>(exec.isa, static_cast<const double*>(t.Lam), Index{0}, static_cast<const double*>(w.Y),
                                      static_cast<const double*>(nullptr), w.Y, n2, z.Wp, z.Mp);
    }
    void stretch_backward(const ExactHead& t, const Recurrence& r, Index stretch, const A* entering, double* sums,
                          const ScanScratch& w) const {
        const Index begin = stretch * stretch_tokens, tokens = r.tokens_of(stretch), size = z.state_size();
        std::copy_n(entering, size, w.X);
        for (Index j = 0; j < tokens; ++j) {
            if (j % segment_tokens == 0) std::copy_n(w.X, size, w.segments + j / segment_tokens * size);
            advance(t, r, begin + j, w, w.X, w.X);
        }
        for (Index segment = ceil_div(tokens, segment_tokens) - 1; segment >= 0; --segment) {
            const Index first = segment * segment_tokens, count = std::min(segment_tokens, tokens - first);
            std::copy_n(w.segments + segment * size, size, w.X);
            for (Index j = 0; j < count; ++j) advance(t, r, begin + first + j, w, w.X + j * size, w.X + (j + 1) * size);
            for (Index j = count - 1; j >= 0; --j)
                token_backward(t, r, begin + first + j, w.X + j * size, w.X + (j + 1) * size, sums, w);
        }
    }
    void backward(Saved saved) const {
        zero_outside_sequences(grads.q, in.cu_seqlens);
        zero_outside_sequences(grads.k, in.cu_seqlens);
        zero_outside_sequences(grads.v, in.cu_seqlens);
        fill_heads();
        const Index groups = SumSplit(s).groups;
        const DiscreteSums at(z);
        A* kept = Arena(saved.data).take<A>(stretch_count(s) * s.kv_heads * z.state_size());
        parallel_for(s.kv_heads * groups, exec.threads, [&](Index task, int worker) {
            const ScanScratch w = scratch(worker, pass::backward);
            double* sums = layout.sums + task * at.size;
            std::fill_n(sums, at.size, 0.0);
            const Index h = task / groups;
            const ExactHead t = head(h);
            for (Index i = task % groups; i < s.states(); i += groups) {
                const Recurrence r = Recurrence::at(in, s, i, h);
                load_state(z, upstream.xT, upstream.etaT, i, h, -1.0, w.Y);
                for (Index stretch = r.stretches() - 1; stretch >= 0; --stretch)
                    stretch_backward(t, r, stretch, kept_at(kept, r, stretch), sums, w);
                store_state(z, w.Y, grads.x0, grads.eta0, i, h, -1.0);
            }
        });
        write_discrete_gradients(exec, z, options, in.params, grads.params, s.kv_heads, groups, layout.sums,
                                 [&](int worker) { return readout_scratch(worker); });
    }
};

template <class T, class P>
ScanCall<T, P> scan_call(const cpu& exec, const Options& options, const Inputs<T, P>& in, pass which, Workspace ws) {
    Arena arena(ws.data);
    return {exec, options, in, ScanLayout(arena, options, shape_of(in), which, exec.threads)};
}

/// exec has been resolved.
template <class T, class P>
void scan_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
                  Workspace ws) {
    scan_call(exec, options, in, pass::forward, ws).forward(out, saved);
}
template <class T, class P>
void scan_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in, Saved saved, const Upstream<T>& upstream,
                   const Grads<T, P>& grads, Workspace ws) {
    auto call = scan_call(exec, options, in, pass::backward, ws);
    call.upstream = upstream;
    call.grads = grads;
    call.backward(saved);
}

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
