// Linear attention on the CPU in chunks of 64 tokens (docs/ops/linear_attention.md, eq. 10 to 13): products of a chunk's matrices with
// each other and with the state that enters it.
//
// Where there are few sequences and heads, sequences are cut into segments, whose tasks are: what the tokens of a segment add to the
// state; then, for each head, the states that enter its segments, in order; then the segments from there. Backward does so twice, forward in
// time for dq and back for dk and dv. Segments follow from the shape alone, so that results are the same bits for any number of threads.
//
// What it costs, multiply-adds a token and head, half of those that have 64 in them above the diagonal: forward 64 (dk + dv) + 2 dk dv,
// backward 192 (dk + dv) + 6 dk dv; in segments dk dv more a pass. What limits it: products of matrices that lie in the second-level cache.
#pragma once

#include <algorithm>

#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/rows.hpp>
#include <linear_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention::detail {

using simd::load_rows;
using simd::pad;
using simd::padded;
using simd::store_rows;
using simd::Terms;

inline constexpr Index chunk_tokens = 64, ldt = chunk_tokens + pad;
inline constexpr Index wanted_tasks = 32, least_segment = 512;

// ---- Leaf bodies: rows of A, `columns` a multiple of the padding unless said otherwise --------------

/// phi of the first `columns`, any number, in place (eq. 1); zeros behind them.
template <class A>
struct MapFeatures {
    template <class Set>
    static INTERSTATE_INLINE void run(A* x, Index ld, Index rows, Index columns) {
        using V = simd::Native<Set, A>;
        const V zero = simd::broadcast<V>(A(0)), one = simd::broadcast<V>(A(1));
        for (Index r = 0; r < rows; ++r) {
            A* const row = x + r * ld;
            for (Index c = 0; c < columns; c += V::lanes) {
                const V at = simd::load<V>(row + c), below = simd::exp(simd::min(zero, at)), above = at + one;
                simd::store(row + c, V{at.v > A(0) ? above.v : below.v});
            }
            for (Index c = columns; c < padded(columns); ++c) row[c] = A(0);
        }
    }
};
/// x times phi' of what has these features: phi where that is below 1, elsewhere 1.
template <class A>
struct TimesSlope {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* features, A* x, Index ld, Index rows, Index columns) {
        using V = simd::Native<Set, A>;
        const V one = simd::broadcast<V>(A(1));
        for (Index r = 0; r < rows; ++r)
            for (Index c = 0; c < columns; c += V::lanes)
                simd::store(x + r * ld + c, simd::load<V>(x + r * ld + c) * simd::min(one, simd::load<V>(features + r * ld + c)));
    }
};
/// to[t] = z + x[0] + .. + x[t]; z becomes the last of them.
template <class A>
struct PrefixRows {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* x, Index ld, Index rows, Index columns, A* z, A* to) {
        using V = simd::Native<Set, A>;
        for (Index c = 0; c < columns; c += V::lanes) {
            V sum = simd::load<V>(z + c);
            for (Index t = 0; t < rows; ++t) {
                sum = sum + simd::load<V>(x + t * ld + c);
                simd::store(to + t * ld + c, sum);
            }
            simd::store(z + c, sum);
        }
    }
};
/// to[t] += z + x[t] + .. + x[rows - 1]; z becomes the sum of all.
template <class A>
struct AddSuffixRows {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* x, Index ld, Index rows, Index columns, A* z, A* to) {
        using V = simd::Native<Set, A>;
        for (Index c = 0; c < columns; c += V::lanes) {
            V sum = simd::load<V>(z + c);
            for (Index t = rows - 1; t >= 0; --t) {
                sum = sum + simd::load<V>(x + t * ld + c);
                simd::store(to + t * ld + c, simd::load<V>(to + t * ld + c) + sum);
            }
            simd::store(z + c, sum);
        }
    }
};
/// dot[t] = a[t].b[t]
template <class A>
struct RowDots {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* a, const A* b, Index ld, Index rows, Index columns, A* dot) {
        using V = simd::Native<Set, A>;
        for (Index t = 0; t < rows; ++t) {
            V sum = simd::broadcast<V>(A(0));
            for (Index c = 0; c < columns; c += V::lanes)
                sum = simd::fma(simd::load<V>(a + t * ld + c), simd::load<V>(b + t * ld + c), sum);
            dot[t] = simd::reduce_add(sum);
        }
    }
};
/// to[t] /= by[t], and 0 where that is 0.
template <class A>
struct DivideRows {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* by, A* to, Index ld, Index rows, Index columns) {
        using V = simd::Native<Set, A>;
        for (Index t = 0; t < rows; ++t) {
            const V w = simd::broadcast<V>(by[t]);
            for (Index c = 0; c < columns; c += V::lanes)
                simd::store(to + t * ld + c, by[t] == A(0) ? simd::broadcast<V>(A(0)) : V{simd::load<V>(to + t * ld + c).v / w.v});
        }
    }
};
/// to[t] = keep[t] to[t] + weight[t] x[t]; a null `keep` is ones, a null x no second term.
template <class A>
struct CombineRows {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* keep, A* to, const A* weight, const A* x, Index ld, Index rows, Index columns) {
        using V = simd::Native<Set, A>;
        for (Index t = 0; t < rows; ++t)
            for (Index c = 0; c < columns; c += V::lanes) {
                V y = simd::load<V>(to + t * ld + c);
                if (keep) y = y * simd::broadcast<V>(keep[t]);
                if (x) y = simd::fma(simd::load<V>(x + t * ld + c), simd::broadcast<V>(weight[t]), y);
                simd::store(to + t * ld + c, y);
            }
    }
};
/// One token: row r of the state gains k[r] v, and o[g] is the sum of q[g][r] times it. dv any number, of element stride `step`.
template <class A>
struct StepRows {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* k, const A* v, const A* q, Index ldq, Index group, A* state, Index row, Index step, Index dk,
                                      Index dv, A* o, Index ldo) {
        using V = simd::Native<Set, A>;
        const Index whole = step == 1 ? dv / V::lanes * V::lanes : 0;
        for (Index r = 0; r < dk; ++r) {
            A* const s = state + r * row;
            for (Index c = 0; c < whole; c += V::lanes) {
                const V now = simd::fma(simd::broadcast<V>(k[r]), simd::load<V>(v + c), simd::load<V>(s + c));
                simd::store(s + c, now);
                for (Index g = 0; g < group; ++g)
                    simd::store(o + g * ldo + c, simd::fma(simd::broadcast<V>(q[g * ldq + r]), now, simd::load<V>(o + g * ldo + c)));
            }
            for (Index c = whole; c < dv; ++c) {
                const A now = s[c * step] += k[r] * v[c];
                for (Index g = 0; g < group; ++g) o[g * ldo + c] += q[g * ldq + r] * now;
            }
        }
    }
};

// ---- Sizes and memory ------------------------------------------------------------------------------

/// Sizes of a call as its tiles have them; rows are never a power of two apart.
struct Tiling {
    Index dk, dv, dkp, dvp, ldk, ldv;
    Index state;           // (dkp, ldv) of S, then (ldk) of z
    Index segment, slots;  // tokens of a segment; segments of all sequences, packed some unused
    bool divides, elu1;

    Tiling(const Options& options, const Shape& s)
        : dk(s.head_dim), dv(s.value_dim), dkp(padded(dk)), dvp(padded(dv)), ldk(dkp + pad), ldv(dvp + pad), state(dkp * ldv + ldk),
          divides(options.divides()), elu1(options.feature_map == FeatureMap::elu1) {
        const Index heads = std::max<Index>(s.states() * s.kv_heads, 1), wanted = std::max<Index>(wanted_tasks / heads, 1);
        segment = std::max(ceil_div(ceil_div(s.length, wanted), chunk_tokens) * chunk_tokens, least_segment);
        slots = !has_work(s) ? 0 : s.packed() ? s.length / segment + s.sequences : s.batch * of_each(s.length);
    }
    /// Whether there is anything to write; where there is not, extents may be anything and mean nothing.
    static bool has_work(const Shape& s) {
        return s.states() > 0 && s.kv_heads > 0 && (s.head_dim > 0 || (s.value_dim > 0 && s.length > 0));
    }
    /// Segments of a sequence; one that is empty has one, which hands its state on.
    Index of_each(Index length) const { return std::max<Index>(ceil_div(length, segment), 1); }
};

/// Matrices of one chunk, and the state that a task carries along; memory of one thread.
template <class A>
struct ChunkScratch {
    A *q, *k, *dq, *dk, *z;  // (T, ldk); z: prefix sums of k, or what q adds to r
    A *v, *o, *dv;           // (T, ldv); o: or do
    A *kt, *vt, *qt, *ot;    // transposed, (dkp or dvp, ldt)
    A* w;                    // (T, ldt)
    A *state, *turned;       // (Tiling::state); S transposed, (dvp, ldk)
    A* weight;               // (T), forward: w of eq. 4

    ChunkScratch(Arena& arena, const Tiling& z_, pass which) {
        const bool back = which == pass::backward;
        const auto take = [&](Index n, bool needed) { return arena.take<A>(needed ? n : 0); };
        q = take(chunk_tokens * z_.ldk, true), k = take(chunk_tokens * z_.ldk, true), z = take(chunk_tokens * z_.ldk, true);
        dq = take(chunk_tokens * z_.ldk, back), dk = take(chunk_tokens * z_.ldk, back);
        v = take(chunk_tokens * z_.ldv, true), o = take(chunk_tokens * z_.ldv, true), dv = take(chunk_tokens * z_.ldv, back);
        kt = take(z_.dkp * ldt, true), vt = take(z_.dvp * ldt, back), qt = take(z_.dkp * ldt, back), ot = take(z_.dvp * ldt, back);
        w = take(chunk_tokens * ldt, true);
        state = take(z_.state, true), turned = take(z_.dvp * z_.ldk, back);
        weight = take(chunk_tokens, !back);
    }
};

template <class A>
struct ChunkedLayout {
    A* entering;        // (slots, Hkv, state)
    A *over, *weight;   // (B, Hq, L), backward: 1 / w and dw of eq. 4 and 5
    std::byte* scratch;
    Index scratch_bytes;

    ChunkedLayout(Arena& arena, const Tiling& z, const Shape& s, pass which, int threads)
        : scratch_bytes(z.slots > 0 ? static_cast<Index>(simd::layout_size<ChunkScratch<A>>(z, which)) : 0) {
        const Index rows = which == pass::backward && z.divides && z.slots > 0 ? s.batch * s.query_heads * s.length : 0;
        entering = arena.take<A>(z.slots > 0 ? z.slots * s.kv_heads * z.state : 0);
        over = arena.take<A>(rows);
        weight = arena.take<A>(rows);
        scratch = arena.take<std::byte>(threads * scratch_bytes);
    }
};
/// Of `step`: a token of one head and its group, for each thread.
template <class A>
struct StepScratch {
    A *k, *v, *q, *o;
    StepScratch(Arena& arena, const Shape& s)
        : k(arena.take<A>(padded(s.head_dim))), v(arena.take<A>(padded(s.value_dim))), q(arena.take<A>(s.group() * padded(s.head_dim))),
          o(arena.take<A>(s.group() * padded(s.value_dim))) {}
};

// ---- Passes ----------------------------------------------------------------------------------------

template <class T>
struct ChunkedCall {
    using A = acc_t<T>;
    using Scratch = ChunkScratch<A>;

    const cpu& exec;
    const Options& options;
    const Inputs<T>& in;
    ChunkedLayout<A> layout;
    pass which;
    Shape s = shape_of(in);
    Tiling z{options, s};
    simd::Products<A> product{exec.isa};
    Upstream<T> upstream{};
    Grads<T> grads{};

    /// Tokens of one head and sequence that a task goes through.
    struct Segment {
        Index i, h, b, slot;  // sequence, key/value head, batch row
        Index begin, end;     // rows
        bool first, last;     // of its sequence
    };

    template <template <class> class Body, class... Args>
    void leaf(Args... args) const {
        simd::run_body<Body<A>>(exec.isa, args...);
    }
    A* entering(const Segment& at) const { return layout.entering + (at.slot * s.kv_heads + at.h) * z.state; }
    Index first_slot(Index i) const {
        return s.packed() ? in.cu_seqlens(i) / z.segment + i : i * z.of_each(s.length);
    }
    /// The last sequence whose segments begin at or before a slot.
    Index sequence_of(Index slot) const {
        if (!s.packed()) return slot / z.of_each(s.length);
        Index low = 0, high = s.sequences;
        while (high - low > 1) {
            const Index middle = (low + high) / 2;
            (first_slot(middle) <= slot ? low : high) = middle;
        }
        return low;
    }
    template <class F>
    void each_segment(F&& f) const {
        parallel_for(z.slots * s.kv_heads, exec.threads, [&](Index n, int worker) {
            const Index slot = n / s.kv_heads;
            const Index i = sequence_of(slot);
            const RowRange rows = rows_of(in.cu_seqlens, i, s.length);
            const Index number = slot - first_slot(i), of_each = z.of_each(rows.end - rows.begin);
            if (number < 0 || number >= of_each) return;
            const Index begin = rows.begin + number * z.segment;
            Arena arena(layout.scratch + worker * layout.scratch_bytes);
            f(Segment{i, n % s.kv_heads, s.packed() ? 0 : i, slot, begin, std::min(begin + z.segment, rows.end), number == 0, number == of_each - 1},
              Scratch(arena, z, which));
        });
    }
    /// Chunks of a segment in order, or from the last to the first: f(row, count).
    template <class F>
    static void each_chunk(const Segment& at, bool back, F&& f) {
        const Index chunks = ceil_div(at.end - at.begin, chunk_tokens);
        for (Index n = 0; n < chunks; ++n) {
            const Index row = at.begin + (back ? chunks - 1 - n : n) * chunk_tokens;
            f(row, std::min(chunk_tokens, at.end - row));
        }
    }

    void load_features(const View<const T, 4>& x, Index b, Index row, Index h, Index count, A* to) const {
        load_rows<T>(exec.isa, x, b, row, h, count, to, z.ldk);
        if (z.elu1 && z.dk > 0) leaf<MapFeatures>(to, z.ldk, count, z.dk);
    }
    /// S += a^T b
    void add_tokens(const A* a, const A* b, Index count, A* state) const {
        product({a, 1, z.ldk}, b, z.ldv, state, z.ldv, z.dk, z.dvp, count, true);
    }
    A* sum_of(A* state) const { return state + z.dkp * z.ldv; }
    /// w of rows q (eq. 4): q.z.
    void sum_weights(const A* q, Index count, const Scratch& w, A* to) const { leaf<RowDots>(q, static_cast<const A*>(w.z), z.ldk, count, z.dkp, to); }
    /// Lower triangle of x y^T, y given transposed, in two steps: no column beyond a row's half.
    void lower_products(const A* x, Index ld, Index terms, const A* yt, Index count, A* w) const {
        constexpr Index half = chunk_tokens / 2;
        const Index head = std::min(count, half);
        product({x, ld}, yt, ldt, w, ldt, head, half, terms, false);
        if (count > half) product({x + half * ld, ld}, yt, ldt, w + half * ldt, ldt, count - half, chunk_tokens, terms, false);
    }

    // ---- States ----

    void load_state(const View<const A, 4>& from, const View<const A, 3>& from_z, Index i, Index h, A* state) const {
        std::fill_n(state, z.state, A(0));
        for (Index r = 0; r < z.dk && from; ++r)
            for (Index c = 0; c < z.dv; ++c) state[r * z.ldv + c] = from(i, h, r, c);
        for (Index r = 0; r < z.dk && from_z; ++r) sum_of(state)[r] = from_z(i, h, r);
    }
    void store_state(const View<A, 4>& to, const View<A, 3>& to_z, Index i, Index h, A* state) const {
        for (Index r = 0; r < z.dk && to; ++r)
            for (Index c = 0; c < z.dv; ++c) to(i, h, r, c) = state[r * z.ldv + c];
        for (Index r = 0; r < z.dk && to_z; ++r) to_z(i, h, r) = sum_of(state)[r];
    }
    /// What a chunk adds to S and z, forward in time.
    void add_keys(const Segment& at, Index row, Index count, const Scratch& w) const {
        load_features(in.k, at.b, row, at.h, count, w.k);
        load_rows<T>(exec.isa, in.v, at.b, row, at.h, count, w.v, z.ldv);
        add_tokens(w.k, w.v, count, w.state);
        if (z.divides) leaf<PrefixRows>(static_cast<const A*>(w.k), z.ldk, count, z.dkp, sum_of(w.state), w.z);
    }
    /// The same of R and r, back in time (eq. 7).
    void add_queries(const Segment& at, Index row, Index count, const Scratch& w) const {
        for (Index g = at.h * s.group(); g < (at.h + 1) * s.group(); ++g) {
            load_query(at, row, g, count, w);
            add_tokens(w.q, w.o, count, w.state);
            if (z.divides) product({weights(layout.weight, at, g, row), 0, 1}, w.q, z.ldk, sum_of(w.state), z.ldk, 1, z.dkp, count, true);
        }
    }
    /// phi(q) and e = do / w of a chunk and a query head.
    void load_query(const Segment& at, Index row, Index g, Index count, const Scratch& w) const {
        load_features(in.q, at.b, row, g, count, w.q);
        load_rows<T>(exec.isa, upstream.o, at.b, row, g, count, w.o, z.ldv);
        if (z.divides)
            leaf<CombineRows>(static_cast<const A*>(weights(layout.over, at, g, row)), w.o, static_cast<const A*>(nullptr),
                              static_cast<const A*>(nullptr), z.ldv, count, z.dvp);
    }
    A* weights(A* of, const Segment& at, Index g, Index row) const { return of + (at.b * s.query_heads + g) * s.length + row; }

    /// The states that enter all segments: `add` says what a chunk adds. `back`: from the last segment to the first.
    template <class Add>
    void make_states(bool back, const View<const A, 4>& start, const View<const A, 3>& start_z, Add&& add) const {
        each_segment([&](const Segment& at, const Scratch& w) {
            if (back ? at.first : at.last) return;  // nobody asks
            std::fill_n(w.state, z.state, A(0));
            each_chunk(at, back, [&](Index row, Index count) { add(at, row, count, w); });
            std::copy_n(w.state, z.state, entering(at));
        });
        each_segment([&](const Segment& at, const Scratch& w) {
            if (!(back ? at.last : at.first)) return;  // a task for each sequence and head
            load_state(start, start_z, at.i, at.h, w.state);
            const RowRange rows = rows_of(in.cu_seqlens, at.i, s.length);
            const Index of_each = z.of_each(rows.end - rows.begin);
            Segment here = at;
            for (Index n = 0; n < of_each; ++n, here.slot += back ? -1 : 1) {
                A* const own = entering(here);
                for (Index x = 0; x < z.state; ++x) {
                    const A before = w.state[x];
                    if (n + 1 < of_each) w.state[x] += own[x];
                    own[x] = before;
                }
            }
        });
    }

    // ---- Forward ----

    void forward(const Outputs<T>& out) const {
        zero_outside_sequences(out.o, in.cu_seqlens);
        const auto add = [this](const Segment& at, Index row, Index count, const Scratch& w) { add_keys(at, row, count, w); };
        make_states(false, in.s0, in.z0, add);
        each_segment([&](const Segment& at, const Scratch& w) {
            std::copy_n(entering(at), z.state, w.state);
            each_chunk(at, false, [&](Index row, Index count) {
                load_features(in.k, at.b, row, at.h, count, w.k);
                load_rows<T>(exec.isa, in.v, at.b, row, at.h, count, w.v, z.ldv);
                product.transpose(w.k, z.ldk, padded(count), z.dkp, w.kt, ldt);
                if (z.divides) leaf<PrefixRows>(static_cast<const A*>(w.k), z.ldk, count, z.dkp, sum_of(w.state), w.z);
                for (Index g = at.h * s.group(); g < (at.h + 1) * s.group(); ++g) {
                    load_features(in.q, at.b, row, g, count, w.q);
                    lower_products(w.q, z.ldk, z.dk, w.kt, count, w.w);
                    product({w.q, z.ldk}, w.state, z.ldv, w.o, z.ldv, count, z.dvp, z.dk, false);
                    product.template operator()<Terms::lower>({w.w, ldt}, w.v, z.ldv, w.o, z.ldv, count, z.dvp, count, true);  // eq. 10
                    if (z.divides) {
                        sum_weights(w.q, count, w, w.weight);
                        leaf<DivideRows>(static_cast<const A*>(w.weight), w.o, z.ldv, count, z.dvp);
                    }
                    store_rows<T>(exec.isa, w.o, z.ldv, out.o, at.b, row, g, count);
                }
                if (row + count < at.end || (at.last && out.sT)) add_tokens(w.k, w.v, count, w.state);
            });
            if (at.last) store_state(out.sT, out.zT, at.i, at.h, w.state);
        });
    }

    // ---- Backward ----

    /// dq, and 1 / w and dw of every row.
    void query_gradients() const {
        const auto add = [this](const Segment& at, Index row, Index count, const Scratch& w) { add_keys(at, row, count, w); };
        make_states(false, in.s0, in.z0, add);
        each_segment([&](const Segment& at, const Scratch& w) {
            std::copy_n(entering(at), z.state, w.state);
            product.transpose(w.state, z.ldv, z.dkp, z.dvp, w.turned, z.ldk);
            each_chunk(at, false, [&](Index row, Index count) {
                load_features(in.k, at.b, row, at.h, count, w.k);
                load_rows<T>(exec.isa, in.v, at.b, row, at.h, count, w.v, z.ldv);
                product.transpose(w.v, z.ldv, padded(count), z.dvp, w.vt, ldt);
                if (z.divides) leaf<PrefixRows>(static_cast<const A*>(w.k), z.ldk, count, z.dkp, sum_of(w.state), w.z);
                for (Index g = at.h * s.group(); g < (at.h + 1) * s.group(); ++g) {
                    load_features(in.q, at.b, row, g, count, w.q);
                    load_rows<T>(exec.isa, upstream.o, at.b, row, g, count, w.o, z.ldv);
                    lower_products(w.o, z.ldv, z.dv, w.vt, count, w.w);
                    product({w.o, z.ldv}, w.turned, z.ldk, w.dq, z.ldk, count, z.dkp, z.dv, false);
                    product.template operator()<Terms::lower>({w.w, ldt}, w.k, z.ldk, w.dq, z.ldk, count, z.dkp, count, true);  // eq. 11
                    if (z.divides) {  // do.(S^T phi(q)) is phi(q).(S do): o is not needed
                        A *const over = weights(layout.over, at, g, row), *const weight = weights(layout.weight, at, g, row);
                        sum_weights(w.q, count, w, over);
                        leaf<RowDots>(static_cast<const A*>(w.q), static_cast<const A*>(w.dq), z.ldk, count, z.dkp, weight);
                        for (Index t = 0; t < count; ++t) {
                            over[t] = inverse_weight(over[t]);
                            weight[t] = -weight[t] * over[t] * over[t];
                        }
                        leaf<CombineRows>(static_cast<const A*>(over), w.dq, static_cast<const A*>(weight), static_cast<const A*>(w.z), z.ldk,
                                          count, z.dkp);
                    }
                    if (z.elu1) leaf<TimesSlope>(static_cast<const A*>(w.q), w.dq, z.ldk, count, z.dkp);
                    store_rows<T>(exec.isa, w.dq, z.ldk, grads.q, at.b, row, g, count);
                }
                if (row + count < at.end) product({w.v, 1, z.ldv}, w.k, z.ldk, w.turned, z.ldk, z.dv, z.dkp, count, true);
            });
        });
    }
    void key_gradients() const {
        const auto add = [this](const Segment& at, Index row, Index count, const Scratch& w) { add_queries(at, row, count, w); };
        make_states(true, upstream.sT, upstream.zT, add);
        each_segment([&](const Segment& at, const Scratch& w) {
            std::copy_n(entering(at), z.state, w.state);
            each_chunk(at, true, [&](Index row, Index count) {
                load_features(in.k, at.b, row, at.h, count, w.k);
                load_rows<T>(exec.isa, in.v, at.b, row, at.h, count, w.v, z.ldv);
                product.transpose(w.state, z.ldv, z.dkp, z.dvp, w.turned, z.ldk);
                product({w.v, z.ldv}, w.turned, z.ldk, w.dk, z.ldk, count, z.dkp, z.dv, false);
                product({w.k, z.ldk}, w.state, z.ldv, w.dv, z.ldv, count, z.dvp, z.dk, false);
                if (z.divides) std::fill_n(w.z, chunk_tokens * z.ldk, A(0));
                for (Index g = at.h * s.group(); g < (at.h + 1) * s.group(); ++g) {
                    load_query(at, row, g, count, w);
                    product.transpose(w.q, z.ldk, padded(count), z.dkp, w.qt, ldt);
                    product.transpose(w.o, z.ldv, padded(count), z.dvp, w.ot, ldt);
                    product({w.v, z.ldv}, w.ot, ldt, w.w, ldt, count, padded(count), z.dv, false);
                    product.template operator()<Terms::upper>({w.w, ldt}, w.q, z.ldk, w.dk, z.ldk, count, z.dkp, count, true);  // eq. 12
                    product({w.k, z.ldk}, w.qt, ldt, w.w, ldt, count, padded(count), z.dk, false);
                    product.template operator()<Terms::upper>({w.w, ldt}, w.o, z.ldv, w.dv, z.ldv, count, z.dvp, count, true);  // eq. 13
                    if (z.divides)
                        leaf<CombineRows>(static_cast<const A*>(nullptr), w.z, static_cast<const A*>(weights(layout.weight, at, g, row)),
                                          static_cast<const A*>(w.q), z.ldk, count, z.dkp);
                    add_tokens(w.q, w.o, count, w.state);
                }
                if (z.divides) leaf<AddSuffixRows>(static_cast<const A*>(w.z), z.ldk, count, z.dkp, sum_of(w.state), w.dk);
                if (z.elu1) leaf<TimesSlope>(static_cast<const A*>(w.k), w.dk, z.ldk, count, z.dkp);
                store_rows<T>(exec.isa, w.dk, z.ldk, grads.k, at.b, row, at.h, count);
                store_rows<T>(exec.isa, w.dv, z.ldv, grads.v, at.b, row, at.h, count);
            });
            if (at.first) store_state(grads.s0, grads.z0, at.i, at.h, w.state);
        });
    }
    void backward() const {
        zero_outside_sequences(grads.q, in.cu_seqlens);
        zero_outside_sequences(grads.k, in.cu_seqlens);
        zero_outside_sequences(grads.v, in.cu_seqlens);
        if (grads.q || z.divides) query_gradients();
        if (grads.k || grads.v || grads.s0 || grads.z0) key_gradients();
    }
};

inline std::size_t step_bytes(const Shape& s) {
    return s.dtype == DType::f64 ? simd::layout_size<StepScratch<double>>(s) : simd::layout_size<StepScratch<float>>(s);
}

template <class T>
void step_tokens(const cpu& exec, const Options& options, const State<acc_t<T>>& state, const Token<T>& token, const TokenOut<T>& out,
                 Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(state, token);
    const Index dk = s.head_dim, dv = s.value_dim, ldq = padded(dk), ldo = padded(dv), group = s.group();
    const auto bytes = static_cast<Index>(step_bytes(s));
    const auto o = as_sequences(out.o);
    parallel_for(s.batch * s.kv_heads, exec.threads, [&](Index n, int worker) {
        Arena arena(static_cast<std::byte*>(ws.data) + worker * bytes);
        const StepScratch<A> w(arena, s);
        const Index b = n / s.kv_heads, h = n % s.kv_heads;
        const auto row = [&](const View<const T, 3>& x, Index head, A* to, Index columns) {
            if (columns > 0)
                simd::run_body<simd::LoadRows<T>>(exec.isa, &x(b, head, 0), Index{0}, x.stride[2], Index{1}, columns, to, padded(columns),
                                                  padded(columns), Index{1});
        };
        const auto features = [&](const View<const T, 3>& x, Index head, A* to) {
            row(x, head, to, dk);
            if (options.feature_map == FeatureMap::elu1 && dk > 0) simd::run_body<MapFeatures<A>>(exec.isa, to, ldq, Index{1}, dk);
        };
        features(token.k, h, w.k);
        row(token.v, h, w.v, dv);
        for (Index g = 0; g < group; ++g) features(token.q, h * group + g, w.q + g * ldq);
        std::fill_n(w.o, group * ldo, A(0));
        if (dk > 0 && dv > 0)
            simd::run_body<StepRows<A>>(exec.isa, static_cast<const A*>(w.k), static_cast<const A*>(w.v), static_cast<const A*>(w.q), ldq, group,
                                        &state.s(b, h, 0, 0), state.s.stride[2], state.s.stride[3], dk, dv, w.o, ldo);
        for (Index r = 0; r < dk && options.divides(); ++r) state.z(b, h, r) += w.k[r];
        for (Index g = 0; g < group; ++g) {
            A weights = options.divides() ? A(0) : A(1);
            for (Index r = 0; r < dk && options.divides(); ++r) weights += w.q[g * ldq + r] * state.z(b, h, r);
            for (Index c = 0; c < dv; ++c) w.o[g * ldo + c] = weights == A(0) ? A(0) : w.o[g * ldo + c] / weights;
            store_rows<T>(exec.isa, w.o + g * ldo, ldo, o, b, 0, h * group + g, 1);
        }
    });
}

}  // namespace linear_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
