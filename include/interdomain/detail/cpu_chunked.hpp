// Interdomain Attention on the CPU in chunks of 64 tokens (forward eq. 14 to 19, backward eq. 20 to 25): products of
// matrices of a chunk with each other, with the state that enters it and with tables of powers, which are made
// once a head. No exponent is negative: tables hold Lam^n, n >= 0, and are read skewed or reversed.
//
// Stretches. A state is kept for every 256 tokens, and carried over them in float64 (eq. 19): each stretch adds
// what it leaves from zero, its `local`. Within a stretch states go from chunk to chunk in the accumulator's dtype,
// four times at most. Backward recomputes states from where a stretch begins, and carries the adjoint alike.
//
// Threads. A recurrence (sequence and key/value head) is a task and goes through its stretches in order. Where
// these are few for the threads, stretches are tasks: their locals first, then entering states in order, then the
// rest from there. The arithmetic is the same, so are the bits. Method::parallel_scan always works so, with a
// scan in place of the order: its own bits, but the same for any number of threads.
//
// What it costs, multiply-adds a token with as many query heads as key/value heads: forward 4 M^2 for G, 2 M (R + d) for
// reading the entering state and as many for its update, within the chunk less than 64 (R + d + 4 M), of whose tables only
// the triangles are multiplied; and 1/8 M (R + d) to move states on. Backward twice that, and a, w and states again.
// What limits it: the products, which read tables of G and the state's two layouts from the second-level cache.
//
// Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <interdomain/detail/cpu_tile.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail {

inline constexpr Index chunk_tokens = 64;  // divides stretch_tokens
inline constexpr Index ldt = chunk_tokens + pad;
inline constexpr Index stretch_chunks = stretch_tokens / chunk_tokens;

/// Tables of one head in the accumulator's dtype.
template <class A>
struct HeadTables {
    A* power;     // (chunk_tokens + 1, ldm): Lam^n
    A* table;     // (chunk_tokens, ldm): Tab[n] = Lam^n Bbar
    A* lags;      // (2 Mp, ldt): Tab transposed, imaginary parts negated, for Re(w Tab)
    A* readout;   // (2 Mp, ldm): G
    double* Lam;  // (2 Mp)

    HeadTables(Arena& arena, const Tiling& z) {
        power = arena.take<A>((chunk_tokens + 1) * z.ldm);
        table = arena.take<A>(chunk_tokens * z.ldm);
        lags = arena.take<A>(2 * z.Mp * ldt);
        readout = arena.take<A>(2 * z.Mp * z.ldm);
        Lam = arena.take<double>(2 * z.Mp);
    }
    template <class P>
    void fill(Isa isa, const Tiling& z, const Options& options, const Params<P>& params, Index h,
              const ReadoutScratch& scratch) const {
        std::fill_n(power, (chunk_tokens + 1) * z.ldm, A(0));
        std::fill_n(table, chunk_tokens * z.ldm, A(0));
        std::fill_n(Lam, 2 * z.Mp, 0.0);
        for (Index m = 0; m < z.M; ++m) {
            const Mode mode = mode_at(options.disc, params, h, m);
            Lam[m] = mode.Abar.re;
            Lam[z.Mp + m] = mode.Abar.im;
            c64 p{1.0, 0.0};
            for (Index n = 0; n <= chunk_tokens; ++n, p = p * mode.Abar) {
                power[n * z.ldm + m] = static_cast<A>(p.re);
                power[n * z.ldm + z.Mp + m] = static_cast<A>(p.im);
                if (n == chunk_tokens) break;
                const c64 b = p * mode.Bbar;
                table[n * z.ldm + m] = static_cast<A>(b.re);
                table[n * z.ldm + z.Mp + m] = static_cast<A>(b.im);
            }
        }
        const Products<A> product{isa};
        product.transpose(table, z.ldm, chunk_tokens, z.Mp, lags, ldt);
        product.transpose(table + z.Mp, z.ldm, chunk_tokens, z.Mp, lags + z.Mp * ldt, ldt, A(-1));
        make_readout(isa, z, options.readout, params.C, h, scratch, readout, z.ldm);
    }
};

/// Sums of a task for the gradients of its head's parameters (eq. 23 and 24).
struct ParameterSums {
    Index outer, D, E, size;  // (2 Mp, ldm), (chunk_tokens, ldm), (chunk_tokens + 1, ldm): where each begins
    explicit ParameterSums(const Tiling& z)
        : outer(0), D(2 * z.Mp * z.ldm), E(D + chunk_tokens * z.ldm), size(E + (chunk_tokens + 1) * z.ldm) {}
};

/// Memory of one thread.
template <class A>
struct ChunkScratch {
    A *Z, *ZT;           // (T, ldz) [k | v]; (Wp, ldt)
    A *U;                // (T, ldz) [q | do]
    A *S, *SV;           // (T, ldt) q.k, do.v
    A *P, *Q;            // (T, ldt) lags of eq. 16 and 20
    A *ai, *a, *w, *lw;  // (T, ldm); ai: what the entering state gives to a, lw: Lam^(t+1) w
    A *ei, *e, *p, *lp;  // the same of backward
    A *o, *dZ, *dU;      // (T, ldz)
    A *X, *local;        // (Wp, ldm) states; X: one for each chunk of a stretch in backward
    A *gain;             // (Wp, ldm)
    A *XN;               // (2 Mp, ldz): a state, imaginary parts negated, rows over modes
    A *Y, *YN;
    A *parts;            // (ParameterSums::size) of a stretch
    double *exact;       // (Wp, 2 Mp)
    double *decay;       // (2 Mp)
    ChunkScratch(Arena& arena, const Tiling& z, pass which) {
        const bool back = which == pass::backward;
        const auto tokens = [&](Index ld, bool needed) { return arena.take<A>(needed ? chunk_tokens * ld : 0); };
        const auto state = [&](bool needed) { return arena.take<A>(needed ? z.Wp * z.ldm : 0); };
        Z = tokens(z.ldz, true);
        ZT = arena.take<A>(z.Wp * ldt);
        U = tokens(z.ldz, true);
        S = tokens(ldt, true), SV = tokens(ldt, back);
        P = tokens(ldt, true), Q = tokens(ldt, back);
        ai = tokens(z.ldm, true), a = tokens(z.ldm, true), w = tokens(z.ldm, true), lw = tokens(z.ldm, true);
        ei = tokens(z.ldm, back), e = tokens(z.ldm, back), p = tokens(z.ldm, back), lp = tokens(z.ldm, back);
        o = tokens(z.ldz, true), dZ = tokens(z.ldz, back), dU = tokens(z.ldz, back);
        X = arena.take<A>((back ? stretch_chunks : 1) * z.Wp * z.ldm);
        local = state(true), gain = state(true), Y = state(back);
        XN = arena.take<A>(2 * z.Mp * z.ldz);
        YN = arena.take<A>(back ? 2 * z.Mp * z.ldz : 0);
        parts = arena.take<A>(back ? ParameterSums(z).size : 0);
        exact = arena.take<double>(z.state_size());
        decay = arena.take<double>(2 * z.Mp);
    }
};

/// Whether stretches are tasks of their own.
inline bool split_stretches(const Options& options, const Shape& s, int threads) {
    return options.method == Method::parallel_scan ||
           (2 * s.states() * s.kv_heads <= threads && s.length > stretch_tokens);
}

/// Layout of a workspace: tables of every head, states between stretches where these are tasks, sums, and then
/// scratch of every thread, which begins at `scratch`.
template <class A>
struct ChunkedLayout {
    std::byte* tables;
    A* between;    // (stretches, Hkv, Wp, 2 Mp); of forward only where there is no Saved
    double* sums;  // (Hkv, split.size(), ParameterSums::size), backward
    std::byte* scratch;
    Index table_bytes, scratch_bytes;

    ChunkedLayout(Arena& arena, const Options& options, const Shape& s, pass which, int threads)
        : ChunkedLayout(arena, Tiling(options, s), options, s, which, threads) {}
    ChunkedLayout(Arena& arena, const Tiling& z, const Options& options, const Shape& s, pass which, int threads) {
        const bool back = which == pass::backward;
        table_bytes = static_cast<Index>(layout_size<HeadTables<A>>(z));
        scratch_bytes = static_cast<Index>(
            std::max(layout_size<ChunkScratch<A>>(z, which), layout_size<ReadoutScratch>(z)));
        tables = arena.take<std::byte>(s.kv_heads * table_bytes);
        between = arena.take<A>(split_stretches(options, s, threads) ? stretch_count(s) * s.kv_heads * z.state_size() : 0);
        sums = arena.take<double>(back ? s.kv_heads * SumSplit(s).size() * ParameterSums(z).size : 0);
        scratch = arena.take<std::byte>(threads * scratch_bytes);
    }
    template <class L, class... Args>
    L carve(std::byte* base, Index bytes, Index n, const Args&... args) const {
        Arena arena(base + n * bytes);
        return L(arena, args...);
    }
};

/// A call, and the steps its tasks are made of.
template <class T, class Param>
struct ChunkedCall {
    using A = acc_t<T>;
    using Scratch = ChunkScratch<A>;
    using Terms = simd::Terms;

    const cpu& exec;
    const Options& options;
    const Inputs<T, Param>& in;
    ChunkedLayout<A> layout;
    Shape s = shape_of(in);
    Tiling z{options, s};
    Products<A> product{exec.isa};
    ParameterSums sums_at{z};
    Upstream<T> upstream{};
    Grads<T, Param> grads{};

    HeadTables<A> tables(Index h) const {
        return layout.template carve<HeadTables<A>>(layout.tables, layout.table_bytes, h, z);
    }
    Scratch scratch(int worker, pass which) const {
        return layout.template carve<Scratch>(layout.scratch, layout.scratch_bytes, worker, z, which);
    }
    ReadoutScratch readout_scratch(int worker) const {
        return layout.template carve<ReadoutScratch>(layout.scratch, layout.scratch_bytes, worker, z);
    }
    void fill_tables() const {
        parallel_for(s.kv_heads, exec.threads, [&](Index h, int worker) {
            tables(h).fill(exec.isa, z, options, in.params, h, readout_scratch(worker));
        });
    }

    // ---- States ----

    void load_tokens(const Recurrence& r, Index first, Index count, A* Z) const {
        load_rows<T>(exec.isa, in.k, r.b, r.rows.begin + first, r.h, count, Z, z.ldz);
        load_values<T>(exec.isa, z, in.v, r.b, r.rows.begin + first, r.h, count, Z + z.Rp, z.ldz, 1.0);
    }
    /// to[r] = power o from[r] + gain[r] for the rows of a state.
    void decay(const A* power, const A* from, const A* gain, A* to) const {
        simd::run_body<Decay<A>>(exec.isa, power, Index{0}, from, gain, to, z.ldm, z.Wp, z.Mp);
    }
    /// What the tokens of a chunk add to its state (eq. 18).
    void collect(const HeadTables<A>& t, Index count, const Scratch& w) const {
        product({w.Z, 1, z.ldz}, t.table + (count - 1) * z.ldm, -z.ldm, w.gain, z.ldm, z.Wp, 2 * z.Mp, count, false);
    }
    void transpose_state(const A* X, Index first_row, Index rows, A* XN) const {
        product.transpose(X + first_row * z.ldm, z.ldm, rows, z.Mp, XN + first_row, z.ldz);
        product.transpose(X + first_row * z.ldm + z.Mp, z.ldm, rows, z.Mp, XN + z.Mp * z.ldz + first_row, z.ldz, A(-1));
    }
    /// exact = Lam^tokens exact + local (eq. 19)
    void carry(const HeadTables<A>& t, Index tokens, const A* local, Index ld, const Scratch& w) const {
        raise_all(z, t.Lam, tokens, w.decay);
        simd::run_body<CarryExact<A>>(exec.isa, static_cast<const double*>(w.decay), w.exact, local, ld, z.Wp, z.Mp);
    }
    A* between(A* states, const Recurrence& r, Index stretch) const {
        return states + ((r.first + stretch) * s.kv_heads + r.h) * z.state_size();
    }
    void narrow(const double* exact, A* X) const { copy_rows(exact, 2 * z.Mp, X, z.ldm, z.Wp, 2 * z.Mp); }

    // ---- Steps that both passes take ----

    /// a (eq. 14), of columns `row0`, `n` of them, for products x.z in S; ai is what the entering state X gives.
    void contract(const HeadTables<A>& t, const A* x, Index row0, Index n, const A* X, const A* S, Index count, A* ai,
                  A* a) const {
        product({x + row0, z.ldz}, X + row0 * z.ldm, z.ldm, ai, z.ldm, count, 2 * z.Mp, n, false);
        times_power(t, ai, count, a);
        product.template operator()<Terms::lower>({S, ldt + 1, -1}, t.table, z.ldm, a, z.ldm, count, 2 * z.Mp, count, true);
    }
    /// to[t] = Lam^(t+1) from[t]
    void times_power(const HeadTables<A>& t, const A* from, Index count, A* to) const {
        simd::run_body<Decay<A>>(exec.isa, static_cast<const A*>(t.power + z.ldm), z.ldm, from, static_cast<const A*>(nullptr),
                                 to, z.ldm, count, z.Mp);
    }
    /// sum[t] += x[t] o y[t]
    void add_products(const A* x, const A* y, Index count, A* sum) const {
        simd::run_body<Decay<A>>(exec.isa, x, z.ldm, y, static_cast<const A*>(sum), sum, z.ldm, count, z.Mp);
    }
    void read_out(const HeadTables<A>& t, const A* a, Index count, A* w) const {
        product({a, z.ldm}, t.readout, z.ldm, w, z.ldm, count, 2 * z.Mp, 2 * z.Mp, false);
    }
    /// Lower triangle of x y^T (or of what replaces y^T) as S[t][j], in two steps: no column beyond a row's block.
    void lower_products(const A* x, Index ld, Index terms, const A* right, Index count, A* S) const {
        constexpr Index half = chunk_tokens / 2;
        const Index head = std::min(count, half);
        product({x, ld}, right, ldt, S, ldt, head, half, terms, false);
        if (count > half) product({x + half * ld, ld}, right, ldt, S + half * ldt, ldt, count - half, chunk_tokens, terms, false);
    }
    /// P[t, n] = Re sum_m w[t, m] Tab[n, m] (eq. 16)
    void lag_weights(const HeadTables<A>& t, const A* w, Index count, A* P) const {
        lower_products(w, z.ldm, 2 * z.Mp, t.lags, count, P);
    }
    /// to = Re(X^T lw) + sum_{s<=t} P[t, t-s] z[s], columns [row0, row0 + n) (eq. 17)
    void read_columns(const A* lw, const A* XN, const A* P, const A* Z, Index row0, Index n, Index count, A* to) const {
        product({lw, z.ldm}, XN + row0, z.ldz, to + row0, z.ldz, count, n, 2 * z.Mp, false);
        product.template operator()<Terms::lower>({P, ldt + 1, -1}, Z + row0, z.ldz, to + row0, z.ldz, count, n, count, true);
    }

    // ---- Forward ----

    /// o of a chunk; w.Z and w.ZT hold its tokens, XN the state that enters it.
    void forward_chunk(const HeadTables<A>& t, const Recurrence& r, Index first, Index count, const A* X, const Scratch& w,
                       const Outputs<T>& out) const {
        const Index row = r.rows.begin + first;
        for (Index hq = r.h * s.group(); hq < (r.h + 1) * s.group(); ++hq) {
            load_rows<T>(exec.isa, in.q, r.b, row, hq, count, w.U, z.ldz);
            lower_products(w.U, z.ldz, z.R, w.ZT, count, w.S);
            contract(t, w.U, 0, z.R, X, w.S, count, w.ai, w.a);
            read_out(t, w.a, count, w.w);
            times_power(t, w.w, count, w.lw);
            lag_weights(t, w.w, count, w.P);
            read_columns(w.lw, w.XN, w.P, w.Z, z.Rp, z.Vp, count, w.o);
            A* o = w.o + z.Rp;
            if (z.normalized)
                for (Index i = 0; i < count; ++i)
                    for (Index c = 0; c < z.d; ++c) o[i * z.ldz + c] /= o[i * z.ldz + z.d];  // eq. 6
            store_rows<T>(exec.isa, o, z.ldz, out.o, r.b, row, hq, count);
        }
    }
    /// A stretch from the state in w.X, which moves on, and its local where that is not null.
    void forward_stretch(const HeadTables<A>& t, const Recurrence& r, Index stretch, A* local, bool outputs, const Scratch& w,
                         const Outputs<T>& out) const {
        const Index begin = stretch * stretch_tokens, end = begin + r.tokens_of(stretch);
        if (local) std::fill_n(local, z.Wp * z.ldm, A(0));
        for (Index first = begin; first < end; first += chunk_tokens) {
            const Index count = std::min(chunk_tokens, end - first);
            load_tokens(r, first, count, w.Z);
            if (outputs) {
                product.transpose(w.Z, z.ldz, padded(count), z.Rp, w.ZT, ldt);
                transpose_state(w.X, z.Rp, z.Vp, w.XN);
                forward_chunk(t, r, first, count, w.X, w, out);
            }
            if (!local && first + count == end) break;
            collect(t, count, w);
            if (outputs && first + count < end) decay(t.power + count * z.ldm, w.X, w.gain, w.X);
            if (local) decay(t.power + count * z.ldm, local, w.gain, local);
        }
    }
    void forward(const Outputs<T>& out, Saved saved) const {
        zero_outside_sequences(out.o, in.cu_seqlens);
        fill_tables();
        A* kept = Arena(saved.data).take<A>(stretch_count(s) * s.kv_heads * z.state_size());
        if (!split_stretches(options, s, exec.threads)) {
            each_recurrence([&](const Recurrence& r, int worker) {
                const Scratch w = scratch(worker, pass::forward);
                const HeadTables<A> t = tables(r.h);
                load_state(z, in.x0, in.eta0, r.i, r.h, 1.0, w.exact);
                for (Index stretch = 0; stretch < r.stretches(); ++stretch) {
                    narrow(w.exact, w.X);
                    if (kept) copy_rows(w.X, z.ldm, between(kept, r, stretch), 2 * z.Mp, z.Wp, 2 * z.Mp);
                    const bool last = stretch + 1 == r.stretches() && !out.xT && !out.etaT;
                    forward_stretch(t, r, stretch, last ? nullptr : w.local, true, w, out);
                    if (!last) carry(t, r.tokens_of(stretch), w.local, z.ldm, w);
                }
                store_state(z, w.exact, out.xT, out.etaT, r.i, r.h, 1.0);
            });
            return;
        }
        A* states = kept ? kept : layout.between;
        each_stretch([&](const Recurrence& r, Index stretch, int worker) {
            const Scratch w = scratch(worker, pass::forward);
            forward_stretch(tables(r.h), r, stretch, w.local, false, w, out);
            copy_rows(w.local, z.ldm, between(states, r, stretch), 2 * z.Mp, z.Wp, 2 * z.Mp);
        });
        combine(states, false, in.x0, in.eta0, out.xT, out.etaT);
        each_stretch([&](const Recurrence& r, Index stretch, int worker) {
            const Scratch w = scratch(worker, pass::forward);
            copy_rows(between(states, r, stretch), 2 * z.Mp, w.X, z.ldm, z.Wp, 2 * z.Mp);
            forward_stretch(tables(r.h), r, stretch, nullptr, true, w, out);
        });
    }

    // ---- Backward ----

    bool wants_parameters() const {
        const auto& g = grads.params;
        return g.log_dt || g.log_neg_re || g.im || g.B || g.C;
    }

    /// A chunk of backward: Y is the adjoint of its final state. Leaves in w.gain what the chunk adds to Lam^N Y
    /// (eq. 22); where not `adjoint_only`, writes dq, dk and dv and adds to w.parts.
    void backward_chunk(const HeadTables<A>& t, const Recurrence& r, Index first, Index count, const A* X, const A* Y,
                        bool adjoint_only, const Scratch& w) const {
        const Index row = r.rows.begin + first, n2 = 2 * z.Mp;
        A* const D = w.parts + sums_at.D;
        A* const E = w.parts + sums_at.E;
        const bool tokens = !adjoint_only && (grads.k || grads.v), parameters = !adjoint_only && wants_parameters();
        load_tokens(r, first, count, w.Z);
        product.transpose(w.Z, z.ldz, padded(count), z.Wp, w.ZT, ldt);
        transpose_state(X, 0, z.Wp, w.XN);
        if (tokens) {
            transpose_state(Y, 0, z.Wp, w.YN);
            product({t.table + (count - 1) * z.ldm, -z.ldm}, w.YN, z.ldz, w.dZ, z.ldz, count, z.Wp, n2, false);
        }
        if (parameters) {
            product({w.Z, z.ldz}, Y, z.ldm, D + (count - 1) * z.ldm, -z.ldm, count, n2, z.Wp, true);
            simd::run_body<RowSum<A>>(exec.isa, X, Y, E + count * z.ldm, z.ldm, z.Wp, z.Mp);
        }
        if (s.group() == 0) std::fill_n(w.gain, z.Wp * z.ldm, A(0));
        for (Index hq = r.h * s.group(); hq < (r.h + 1) * s.group(); ++hq) {
            const bool add = hq > r.h * s.group();
            A* const up = w.U + z.Rp;
            load_rows<T>(exec.isa, in.q, r.b, row, hq, count, w.U, z.ldz);
            load_values<T>(exec.isa, z, upstream.o, r.b, row, hq, count, up, z.ldz, 0.0);
            lower_products(w.U, z.ldz, z.R, w.ZT, count, w.S);
            contract(t, w.U, 0, z.R, X, w.S, count, w.ai, w.a);
            read_out(t, w.a, count, w.w);
            times_power(t, w.w, count, w.lw);
            if (z.normalized || tokens) lag_weights(t, w.w, count, w.P);
            if (z.normalized) normalize(count, w);
            lower_products(up, z.ldz, z.V, w.ZT + z.Rp * ldt, count, w.SV);
            contract(t, w.U, z.Rp, z.V, X, w.SV, count, w.ei, w.e);
            read_out(t, w.e, count, w.p);
            times_power(t, w.p, count, w.lp);
            product({w.U, 1, z.ldz}, w.lp, z.ldm, w.gain, z.ldm, z.Rp, n2, count, add);
            product({up, 1, z.ldz}, w.lw, z.ldm, w.gain + z.Rp * z.ldm, z.ldm, z.Vp, n2, count, add);
            if (adjoint_only) continue;
            if (grads.q || grads.k) lag_weights(t, w.p, count, w.Q);
            if (grads.q) {
                read_columns(w.lp, w.XN, w.Q, w.Z, 0, z.Rp, count, w.dU);
                store_rows<T>(exec.isa, w.dU, z.ldz, grads.q, r.b, row, hq, count);
            }
            if (grads.k)
                product.template operator()<Terms::upper>({w.Q, -1, ldt + 1}, w.U, z.ldz, w.dZ, z.ldz, count, z.Rp, count,
                                                          true);
            if (grads.v)
                product.template operator()<Terms::upper>({w.P, -1, ldt + 1}, up, z.ldz, w.dZ + z.Rp, z.ldz, count, z.Vp,
                                                          count, true);
            if (!parameters) continue;
            product({w.e, 1, z.ldm}, w.a, z.ldm, w.parts + sums_at.outer, z.ldm, n2, n2, count, true);
            product.template operator()<Terms::upper>({w.S, -1, ldt + 1}, w.p, z.ldm, D, z.ldm, count, n2, count, true);
            product.template operator()<Terms::upper>({w.SV, -1, ldt + 1}, w.w, z.ldm, D, z.ldm, count, n2, count, true);
            add_products(w.p, w.ai, count, E + z.ldm);
            add_products(w.w, w.ei, count, E + z.ldm);
        }
        if (grads.k && !adjoint_only) store_rows<T>(exec.isa, w.dZ, z.ldz, grads.k, r.b, row, r.h, count);
        if (grads.v && !adjoint_only) store_rows<T>(exec.isa, w.dZ + z.Rp, z.ldz, grads.v, r.b, row, r.h, count);
    }
    /// do becomes [do / den, -(do . o) / den] (eq. 11).
    void normalize(Index count, const Scratch& w) const {
        read_columns(w.lw, w.XN, w.P, w.Z, z.Rp, z.Vp, count, w.o);
        for (Index i = 0; i < count; ++i) {
            const A* o = w.o + i * z.ldz + z.Rp;
            A* up = w.U + i * z.ldz + z.Rp;
            A carried = 0;
            for (Index c = 0; c < z.d; ++c) {
                carried -= up[c] * (o[c] / o[z.d]);
                up[c] /= o[z.d];
            }
            up[z.d] = carried / o[z.d];
        }
    }
    /// A stretch from the adjoint in w.Y, which moves to its beginning, and its local where that is not null.
    void backward_stretch(const HeadTables<A>& t, const Recurrence& r, Index stretch, const A* entering, A* local,
                          bool adjoint_only, const Scratch& w) const {
        const Index begin = stretch * stretch_tokens, tokens = r.tokens_of(stretch), size = z.Wp * z.ldm;
        copy_rows(entering, 2 * z.Mp, w.X, z.ldm, z.Wp, 2 * z.Mp);
        for (Index j = 0; (j + 1) * chunk_tokens < tokens; ++j) {
            load_tokens(r, begin + j * chunk_tokens, chunk_tokens, w.Z);
            collect(t, chunk_tokens, w);
            decay(t.power + chunk_tokens * z.ldm, w.X + j * size, w.gain, w.X + (j + 1) * size);
        }
        if (local) std::fill_n(local, size, A(0));
        for (Index j = ceil_div(tokens, chunk_tokens) - 1; j >= 0; --j) {
            const Index count = std::min(chunk_tokens, tokens - j * chunk_tokens);
            backward_chunk(t, r, begin + j * chunk_tokens, count, w.X + j * size, w.Y, adjoint_only, w);
            const A* power = t.power + count * z.ldm;
            if (!adjoint_only && j > 0) decay(power, w.Y, w.gain, w.Y);
            if (local) decay(power, local, w.gain, local);
        }
    }
    double* sums(Index h, Index group, Index run) const {
        const SumSplit split(s);
        return layout.sums + ((h * split.groups + group) * split.runs + run) * sums_at.size;
    }
    void backward(Saved saved) const {
        zero_outside_sequences(grads.q, in.cu_seqlens);
        zero_outside_sequences(grads.k, in.cu_seqlens);
        zero_outside_sequences(grads.v, in.cu_seqlens);
        fill_tables();
        const SumSplit split(s);
        A* kept = Arena(saved.data).take<A>(stretch_count(s) * s.kv_heads * z.state_size());
        parallel_for(s.kv_heads * split.size(), exec.threads,
                     [&](Index at, int) { std::fill_n(layout.sums + at * sums_at.size, sums_at.size, 0.0); });
        const auto flush = [&](const Recurrence& r, Index stretch, const Scratch& w) {
            if (!wants_parameters()) return;
            const Index run = stretch * split.runs / r.stretches();
            simd::run_body<Flush<A>>(exec.isa, w.parts, sums(r.h, r.i % split.groups, run), sums_at.size);
        };
        if (!split_stretches(options, s, exec.threads)) {
            // Sequences of a group share sums, so they are one task.
            parallel_for(s.kv_heads * split.groups, exec.threads, [&](Index task, int worker) {
                const Scratch w = scratch(worker, pass::backward);
                std::fill_n(w.parts, sums_at.size, A(0));
                const Index h = task % s.kv_heads;
                const HeadTables<A> t = tables(h);
                for (Index i = task / s.kv_heads; i < s.states(); i += split.groups) {
                    const Recurrence r = Recurrence::at(in, s, i, h);
                    load_state(z, upstream.xT, upstream.etaT, i, h, -1.0, w.exact);
                    for (Index stretch = r.stretches() - 1; stretch >= 0; --stretch) {
                        narrow(w.exact, w.Y);
                        const bool last = stretch == 0 && !grads.x0 && !grads.eta0;
                        backward_stretch(t, r, stretch, between(kept, r, stretch), last ? nullptr : w.local, false, w);
                        flush(r, stretch, w);
                        if (!last) carry(t, r.tokens_of(stretch), w.local, z.ldm, w);
                    }
                    store_state(z, w.exact, grads.x0, grads.eta0, i, h, -1.0);
                }
            });
        } else {
            each_stretch([&](const Recurrence& r, Index stretch, int worker) {
                const Scratch w = scratch(worker, pass::backward);
                backward_stretch(tables(r.h), r, stretch, between(kept, r, stretch), w.local, true, w);
                copy_rows(w.local, z.ldm, between(layout.between, r, stretch), 2 * z.Mp, z.Wp, 2 * z.Mp);
            });
            combine(layout.between, true, upstream.xT, upstream.etaT, grads.x0, grads.eta0);
            parallel_for(s.kv_heads * split.size(), exec.threads, [&](Index task, int worker) {
                const Scratch w = scratch(worker, pass::backward);
                std::fill_n(w.parts, sums_at.size, A(0));
                const Index h = task % s.kv_heads, run = task / s.kv_heads % split.runs;
                for (Index i = task / s.kv_heads / split.runs; i < s.states(); i += split.groups) {
                    const Recurrence r = Recurrence::at(in, s, i, h);
                    for (Index stretch = r.stretches() - 1; stretch >= 0; --stretch) {
                        if (stretch * split.runs / r.stretches() != run) continue;
                        copy_rows(between(layout.between, r, stretch), 2 * z.Mp, w.Y, z.ldm, z.Wp, 2 * z.Mp);
                        backward_stretch(tables(h), r, stretch, between(kept, r, stretch), nullptr, false, w);
                        flush(r, stretch, w);
                    }
                }
            });
        }
        if (wants_parameters())
            parallel_for(s.kv_heads, exec.threads, [&](Index h, int worker) { parameter_gradients(h, worker); });
    }
    /// Eq. 23 to 25 from the sums of all tasks, in their order.
    void parameter_gradients(Index h, int worker) const {
        double* total = sums(h, 0, 0);
        for (Index part = 1; part < SumSplit(s).size(); ++part)
            for (Index j = 0; j < sums_at.size; ++j) total[j] += total[part * sums_at.size + j];
        const auto discrete = [&](Index m, const Mode& mode, c64& dLam, c64& dBbar) {
            const auto entry = [&](Index table, Index n) {
                const double* at = total + table + n * z.ldm + m;
                return c64{at[0], at[z.Mp]};
            };
            c64 beta{}, slope{};
            c64 power{1.0, 0.0}, before{};  // Lam^n and n Lam^(n-1)
            for (Index n = 0; n <= chunk_tokens; ++n) {
                const c64 D = n < chunk_tokens ? entry(sums_at.D, n) : c64{};
                beta += power * D;
                slope += before * (entry(sums_at.E, n) + mode.Bbar * D);
                before = static_cast<double>(n + 1) * power;
                power = power * mode.Abar;
            }
            dLam = conj(slope);
            dBbar = conj(beta);
        };
        write_head_gradients(exec.isa, z, options, in.params, grads.params, h, total + sums_at.outer, z.ldm,
                             readout_scratch(worker), discrete);
    }

    // ---- Stretches as tasks ----

    template <class F>
    void each_recurrence(F&& f) const {
        parallel_for(s.states() * s.kv_heads, exec.threads, [&](Index task, int worker) {
            f(Recurrence::at(in, s, task / s.kv_heads, task % s.kv_heads), worker);
        });
    }
    template <class F>
    void each_stretch(F&& f) const {
        const Index longest = ceil_div(s.length, stretch_tokens);  // of a sequence; shorter ones leave tasks empty
        parallel_for(s.states() * longest * s.kv_heads, exec.threads, [&](Index task, int worker) {
            const Index h = task % s.kv_heads, stretch = task / s.kv_heads % longest;
            const Recurrence r = Recurrence::at(in, s, task / s.kv_heads / longest, h);
            if (stretch < r.stretches()) f(r, stretch, worker);
        });
    }
    /// States between stretches: what each leaves from zero becomes what enters it, starting from `from`, and
    /// the end goes to `to`. In reverse for adjoints.
    void combine(A* states, bool reverse, const View<const complex<A>, 4>& from, const View<const complex<A>, 3>& from_eta,
                 const View<complex<A>, 4>& to, const View<complex<A>, 3>& to_eta) const {
        const double sign = reverse ? -1.0 : 1.0;
        const auto at = [&](const Recurrence& r, Index k) {
            return between(states, r, reverse ? r.stretches() - 1 - k : k);
        };
        const auto tokens = [&](const Recurrence& r, Index k) {
            return r.tokens_of(reverse ? r.stretches() - 1 - k : k);
        };
        const bool tree = options.method == Method::parallel_scan;
        if (tree) scan_stretches(at);
        each_recurrence([&](const Recurrence& r, int worker) {
            const Scratch w = scratch(worker, reverse ? pass::backward : pass::forward);
            const HeadTables<A> t = tables(r.h);
            const Index last = r.stretches() - 1;
            load_state(z, from, from_eta, r.i, r.h, sign, w.exact);
            const auto enter = [&](Index k) {
                copy_rows(w.exact, 2 * z.Mp, at(r, k), 2 * z.Mp, z.Wp, 2 * z.Mp);
            };
            for (Index k = 0; k <= last; ++k) {
                // With the scan, at(k - 1) held what stretches 0 to k - 1 leave together.
                const A* previous = w.X;
                if (k > 0 && !tree) {
                    carry(t, tokens(r, k - 1), previous, 2 * z.Mp, w);
                } else if (k > 0) {
                    load_state(z, from, from_eta, r.i, r.h, sign, w.exact);
                    carry(t, tokens(r, 0) + (k - 1) * stretch_tokens, previous, 2 * z.Mp, w);
                }
                std::copy_n(at(r, k), z.state_size(), w.X);
                enter(k);
            }
            if (last >= 0) carry(t, tokens(r, last), w.X, 2 * z.Mp, w);
            store_state(z, w.exact, to, to_eta, r.i, r.h, sign);
        });
    }
    /// Inclusive scan of all stretches but the last, level by level (eq. 26): level j adds to the upper halves of
    /// blocks of 2^(j+1) stretches what the lower half leaves at its end.
    template <class At>
    void scan_stretches(At&& at) const {
        const Index longest = ceil_div(s.length, stretch_tokens);
        for (Index half = 1; half < longest; half *= 2)
            each_stretch([&](const Recurrence& r, Index k, int worker) {
                if (k / half % 2 == 0 || k + 1 >= r.stretches()) return;
                const Scratch w = scratch(worker, pass::forward);
                raise_all(z, tables(r.h).Lam, (k % half + 1) * stretch_tokens, w.decay);
                A* const power = w.a;
                copy_rows(w.decay, 2 * z.Mp, power, 2 * z.Mp, 1, 2 * z.Mp);
                A* const state = at(r, k);
                simd::run_body<Decay<A>>(exec.isa, static_cast<const A*>(power), Index{0},
                                         static_cast<const A*>(at(r, k / half * half - 1)), static_cast<const A*>(state), state,
                                         2 * z.Mp, z.Wp, z.Mp);
            });
    }
};

template <class T, class P>
ChunkedCall<T, P> chunked_call(const cpu& exec, const Options& options, const Inputs<T, P>& in, pass which, Workspace ws) {
    Arena arena(ws.data);
    return {exec, options, in, ChunkedLayout<acc_t<T>>(arena, options, shape_of(in), which, exec.threads)};
}

/// exec has been resolved.
template <class T, class P>
void chunked_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
                     Workspace ws) {
    chunked_call(exec, options, in, pass::forward, ws).forward(out, saved);
}
template <class T, class P>
void chunked_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in, Saved saved, const Upstream<T>& upstream,
                      const Grads<T, P>& grads, Workspace ws) {
    auto call = chunked_call(exec, options, in, pass::backward, ws);
    call.upstream = upstream;
    call.grads = grads;
    call.backward(saved);
}

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
