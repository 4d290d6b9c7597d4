// CPU attention: tiles of queries against tiles of keys, never an L x L array.
// Equations: docs/ops/attention.md.
//
// A task owns one block of `outer_block` rows of the output it writes (queries for o and dq, keys for
// dk and dv) and walks the other side in tiles of `inner_block` rows. Scores are formed transposed to
// that walk: one row of the tile for each inner row, one column for each outer row, so that
//   - the outer operand is transposed once for a task, and inner rows are used as they lie;
//   - the running maximum and sum of a query (eq. 13) are lanes of vectors: nothing crosses lanes;
//   - all products are one micro-kernel (simd::Gemm), because reading its left operand transposed is free.
// Threads share tasks and nothing else, and a task does not know how many there are: the same bits for
// any number of threads. Backward forms the scores twice, once for dq and once for dk and dv, which
// costs 7 products instead of 5 and needs neither atomics nor partial sums.
//
// Leaf bodies hold the loops that are compiled for each instruction set; what is left between them
// is bookkeeping. Instruction sets differ in the last bits (they sum in lanes of different number).
#pragma once

#include <cmath>
#include <limits>

#include <attention/params.hpp>
#include <interstate/cpu/gemm.hpp>
#include <interstate/cpu/isa.hpp>
#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

inline constexpr Index outer_block = 128;
inline constexpr Index inner_block = 64;
inline constexpr Index pad = 16;  // lanes of the widest vector: rows are padded to a multiple of it
// Rows of a tile are 9 cache lines apart (18 for double), not 8: a column then visits every cache set.
inline constexpr Index tile_stride = outer_block + pad;

constexpr Index padded(Index n) { return ceil_div(n, pad) * pad; }

// ---- Leaf bodies -----------------------------------------------------------------------------------

/// dst[r][0, ld) = scale * src[r][0, dim), widened and filled up with zeros.
template <class T>
struct LoadRows {
    using A = acc_t<T>;
    template <class Set>
    static INTERSTATE_INLINE void run(const T* src, Index row_stride, Index step, Index rows, Index dim,
                                      A scale, A* dst, Index ld) {
        using V = simd::Native<Set, A>;
        const V scales = simd::broadcast<V>(scale);
        const Index whole = step == 1 ? dim / V::lanes * V::lanes : 0;
        for (Index r = 0; r < rows; ++r) {
            const T* from = src + r * row_stride;
            A* to = dst + r * ld;
            for (Index d = 0; d < whole; d += V::lanes)
                simd::store(to + d, simd::load_as<V>(from + d) * scales);
            for (Index d = whole; d < dim; ++d) to[d] = static_cast<A>(from[d * step]) * scale;
            for (Index d = dim; d < ld; ++d) to[d] = A(0);
        }
    }
};

/// Whether all of x[0, n) is finite, n a multiple of the padding.
template <class A>
struct Finite {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* x, Index n, bool* finite) {
        using V = simd::Native<Set, A>;
        const V zero = simd::broadcast<V>(A(0));
        V probe = zero;  // 0 * NaN and 0 * inf are NaN, and stay
        for (Index i = 0; i < n; i += V::lanes) probe = simd::fma(simd::load<V>(x + i), zero, probe);
        *finite = simd::reduce_add(probe) == A(0);
    }
};

/// c (M, N) = or += a b, for a left operand of any strides; N is a multiple of the padding.
template <class A>
void multiply(Isa isa, const A* a, Index a_row, Index a_col, const A* b, Index ldb, A* c, Index ldc, Index M, Index N, Index K,
              bool add) {
    using G = simd::Gemm<A>;
    simd::run_body<G>(isa, typename G::Args{a, a_row, a_col, b, ldb, c, ldc, M, N, K, add});
}

/// Running statistics of the queries of a block (eq. 13), one lane each.
template <class A>
struct Running {
    A* largest;  // of the scores so far; -inf before the first
    A* sum;      // of exp(score - largest)
    A* shrink;   // exp(old largest - new largest), for what has been summed up to here
};

/// Scores of a tile become weights relative to the largest score so far (eq. 13), columns [begin, end).
template <class A>
struct OnlineSoftmax {
    template <class Set>
    static INTERSTATE_INLINE void run(A* tile, Index rows, Index begin, Index end, Running<A> running) {
        using V = simd::Native<Set, A>;
        constexpr A inf = std::numeric_limits<A>::infinity();
        for (Index c = begin; c < end; c += V::lanes) {
            A* column = tile + c;
            const V before = simd::load<V>(running.largest + c);
            V largest = before;
            for (Index r = 0; r < rows; ++r)
                largest = simd::max(simd::load<V>(column + r * tile_stride), largest);
            // Where every score so far is -inf, -inf - (-inf) must not be formed.
            V shift = largest;
            shift.v = largest.v == -inf ? simd::broadcast<V>(A(0)).v : largest.v;
            const V shrink = simd::exp(before - shift);
            V sum = simd::load<V>(running.sum + c) * shrink;
            for (Index r = 0; r < rows; ++r) {
                const V p = simd::exp(simd::load<V>(column + r * tile_stride) - shift);
                simd::store(column + r * tile_stride, p);
                sum = sum + p;
            }
            simd::store(running.largest + c, largest);
            simd::store(running.sum + c, sum);
            simd::store(running.shrink + c, shrink);
        }
    }
};

/// x[r][0, ld) *= factor[r]
template <class A>
struct ScaleRows {
    template <class Set>
    static INTERSTATE_INLINE void run(A* x, Index rows, Index ld, const A* factor) {
        using V = simd::Native<Set, A>;
        for (Index r = 0; r < rows; ++r) {
            if (factor[r] == A(1)) continue;
            const V f = simd::broadcast<V>(factor[r]);
            for (Index d = 0; d < ld; d += V::lanes)
                simd::store(x + r * ld + d, simd::load<V>(x + r * ld + d) * f);
        }
    }
};

/// 1 / (1 + exp(-(score + bias))): eq. 3. exp of a large number is inf, and the weight then 0.
template <class V, class A>
INTERSTATE_INLINE V sigmoid(const V& score, A bias) {
    const V one = simd::broadcast<V>(A(1));
    V p;
    p.v = one.v / (one + simd::exp(simd::broadcast<V>(-bias) - score)).v;
    return p;
}

template <class A>
struct Sigmoid {
    template <class Set>
    static INTERSTATE_INLINE void run(A* tile, Index rows, Index begin, Index end, A bias) {
        using V = simd::Native<Set, A>;
        for (Index r = 0; r < rows; ++r)
            for (Index c = begin; c < end; c += V::lanes) {
                A* at = tile + r * tile_stride + c;
                simd::store(at, sigmoid(simd::load<V>(at), bias));
            }
    }
};

/// What a query brings to its row of weights in backward: eq. 9 reads p (dp - minus), minus = delta - dlse.
template <class A>
struct Statistics {
    const A* lse;
    const A* minus;
};

/// Scores become weights and dp becomes dscore (eq. 2, 9 or 3, 10). Queries are the columns of the
/// tile (for dq) or its rows (for dk and dv).
template <class A, Score score, bool query_columns>
struct ScoreGradient {
    template <class Set>
    static INTERSTATE_INLINE void run(A* tile, A* dtile, Index rows, Index begin, Index end,
                                      Statistics<A> statistics, A bias) {
        using V = simd::Native<Set, A>;
        for (Index r = 0; r < rows; ++r)
            for (Index c = begin; c < end; c += V::lanes) {
                A* at = tile + r * tile_stride + c;
                A* dat = dtile + r * tile_stride + c;
                const V dp = simd::load<V>(dat);
                if constexpr (score == Score::softmax) {
                    const V lse = query_columns ? simd::load<V>(statistics.lse + c)
                                                : simd::broadcast<V>(statistics.lse[r]);
                    const V minus = query_columns ? simd::load<V>(statistics.minus + c)
                                                  : simd::broadcast<V>(statistics.minus[r]);
                    const V p = simd::exp(simd::load<V>(at) - lse);
                    simd::store(at, p);
                    simd::store(dat, p * (dp - minus));
                } else {
                    const V p = sigmoid(simd::load<V>(at), bias);
                    simd::store(at, p);
                    simd::store(dat, p * (simd::broadcast<V>(A(1)) - p) * dp);
                }
            }
    }
};

/// out[r] = sum_d a[r][d] b[r][d], ld a multiple of the padding.
template <class A>
struct DotRows {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* a, const A* b, Index rows, Index ld, A* out) {
        using V = simd::Native<Set, A>;
        for (Index r = 0; r < rows; ++r) {
            V sum = simd::broadcast<V>(A(0));
            for (Index d = 0; d < ld; d += V::lanes)
                sum = simd::fma(simd::load<V>(a + r * ld + d), simd::load<V>(b + r * ld + d), sum);
            out[r] = simd::reduce_add(sum);
        }
    }
};

/// Decoding: scores[g][r] = q[g] . k[r] for each head of a group against a tile of keys, then the
/// running softmax of each (eq. 13) with keys along the lanes, or the sigmoid. Rows of `scores` are
/// inner_block long.
template <class A, Score score>
struct StepScores {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* q, Index heads, Index ldq, const A* k, Index ldk, Index rows,
                                      A* scores, const A* bias, Running<A> running) {
        using V = simd::Native<Set, A>;
        constexpr int lanes = V::lanes;
        constexpr A inf = std::numeric_limits<A>::infinity();
        for (Index g = 0; g < heads; ++g) {
            A* row = scores + g * inner_block;
            V largest = simd::broadcast<V>(-inf);
            for (Index r = 0; r < rows; r += lanes) {
                V sums[lanes];
                INTERSTATE_UNROLL
                for (int i = 0; i < lanes; ++i) sums[i] = simd::broadcast<V>(A(0));
                if (rows - r >= lanes) {
                    for (Index d = 0; d < ldq; d += lanes) {
                        const V left = simd::load<V>(q + g * ldq + d);
                        INTERSTATE_UNROLL
                        for (int i = 0; i < lanes; ++i)
                            sums[i] = simd::fma(left, simd::load<V>(k + (r + i) * ldk + d), sums[i]);
                    }
                } else {
                    // The last key stands in for those behind it.
                    for (Index d = 0; d < ldq; d += lanes) {
                        const V left = simd::load<V>(q + g * ldq + d);
                        INTERSTATE_UNROLL
                        for (int i = 0; i < lanes; ++i) {
                            const Index at = r + i < rows ? r + i : rows - 1;
                            sums[i] = simd::fma(left, simd::load<V>(k + at * ldk + d), sums[i]);
                        }
                    }
                }
                const V s = simd::reduce_add_each(sums);
                largest = simd::max(s, largest);
                simd::store(row + r, s);
            }
            if constexpr (score == Score::softmax) {
                const A before = running.largest[g];
                A now = simd::reduce_max(largest);
                now = before > now ? before : now;
                const V shift = simd::broadcast<V>(now == -inf ? A(0) : now);
                const V shrink = simd::exp(simd::broadcast<V>(before) - shift);
                V sum = simd::broadcast<V>(A(0));
                for (Index r = 0; r < rows; r += lanes) {
                    const V p = simd::exp(simd::load<V>(row + r) - shift);
                    simd::store(row + r, p);
                    if (rows - r >= lanes) sum = sum + p;
                }
                A total = simd::reduce_add(sum);
                for (Index r = rows / lanes * lanes; r < rows; ++r) total += row[r];
                running.largest[g] = now;
                running.shrink[g] = shrink[0];
                running.sum[g] = running.sum[g] * shrink[0] + total;
            } else {
                for (Index r = 0; r < rows; r += lanes)
                    simd::store(row + r, sigmoid(simd::load<V>(row + r), bias[g]));
            }
        }
    }
};

// ---- Sequences and masks ---------------------------------------------------------------------------

/// One sequence: where its rows lie in the tensors. Query i stands at position i + keys - queries.
struct Sequence {
    Index query0, queries;
    Index key0, keys;

    Index offset() const { return keys - queries; }
    RowRange keys_of(const Options& options, Index query) const {
        return keys_read(options, query + offset(), keys);
    }
    RowRange queries_of(const Options& options, Index key) const {
        RowRange r = positions_reading(options, key, keys);
        r.begin = r.begin > offset() ? r.begin - offset() : 0;
        r.end = r.end > offset() ? r.end - offset() : 0;
        return r;
    }
};

/// Cuts rows [begin, end) of the query or the key axis into pieces of one sequence each: calls
/// piece(sequence, first, last) with rows counted inside the sequence, and gap(first, last) for rows
/// of the tensor that belong to none.
template <class Piece, class Gap>
void for_each_piece(const Shape& s, const View<const std::int32_t, 1>& cu, Index begin, Index end,
                    Piece&& piece, Gap&& gap) {
    if (!s.packed()) return piece(Sequence{0, s.queries, 0, s.keys}, begin, end);
    // The first sequence that ends behind `begin`.
    Index low = 0, high = s.sequences;
    while (low < high) {
        const Index middle = (low + high) / 2;
        if (cu(middle + 1) > begin)
            high = middle;
        else
            low = middle + 1;
    }
    Index at = begin;
    for (Index n = low; n < s.sequences && at < end; ++n) {
        const RowRange rows = rows_of(cu, n, s.keys);
        if (rows.begin >= end) break;
        if (rows.begin > at) gap(at, rows.begin), at = rows.begin;
        const Index last = rows.end < end ? rows.end : end;
        const Index length = rows.end - rows.begin;
        if (last > at)
            piece(Sequence{rows.begin, length, rows.begin, length}, at - rows.begin, last - rows.begin);
        at = last > at ? last : at;
    }
    if (at < end) gap(at, end);
}

/// A tile of scores: inner rows [inner, inner + rows) against outer columns [outer, outer + columns),
/// both counted inside the sequence.
struct Tile {
    const Options& options;
    const Sequence& sequence;
    bool query_columns;  // columns are queries and rows are keys, or the other way round
    Index outer, columns;
    Index inner, rows;

    static RowRange inside(RowRange r, Index first, Index count) {
        const auto at = [&](Index x) { return x < first ? 0 : x - first < count ? x - first : count; };
        return {at(r.begin), at(r.end)};
    }
    /// Columns that take part in a row of the tile.
    RowRange columns_of(Index row) const {
        return inside(query_columns ? sequence.queries_of(options, inner + row)
                                    : sequence.keys_of(options, inner + row),
                      outer, columns);
    }
    /// Rows that take part in a column of the tile.
    RowRange rows_of(Index column) const {
        return inside(query_columns ? sequence.keys_of(options, outer + column)
                                    : sequence.queries_of(options, outer + column),
                      inner, rows);
    }
    /// Columns with anything to do. Both ends of columns_of only move forward from row to row.
    RowRange active() const { return {columns_of(0).begin, columns_of(rows - 1).end}; }
    /// Whether some pair of rows and of columns in `range` takes no part.
    bool masked(RowRange range) const {
        return columns_of(0).end < range.end || columns_of(rows - 1).begin > range.begin;
    }
    template <class A>
    void fill_masked(A* tile, RowRange range, A value) const {
        for (Index r = 0; r < rows; ++r) {
            const RowRange in = columns_of(r);
            A* row = tile + r * tile_stride;
            for (Index c = range.begin; c < in.begin && c < range.end; ++c) row[c] = value;
            for (Index c = in.end > range.begin ? in.end : range.begin; c < range.end; ++c) row[c] = value;
        }
    }
};

/// sum[c][d] += sum_r weights[r][c] x[r][d] for the columns of `range`. In a masked tile a weight of
/// zero may meet a NaN or an infinity of a row that its column does not read: where there is one, each
/// column sums only the rows it reads.
template <class A>
void accumulate(Isa isa, const Tile& tile, RowRange range, bool masked, const A* weights, const A* x,
                Index ld, A* sum) {
    bool together = true;
    if (masked) simd::run_body<Finite<A>>(isa, x, tile.rows * ld, &together);
    if (together) {
        multiply(isa, weights + range.begin, 1, tile_stride, x, ld, sum + range.begin * ld, ld, range.end - range.begin, ld,
                 tile.rows, true);
        return;
    }
    for (Index c = range.begin; c < range.end; ++c) {
        const RowRange r = tile.rows_of(c);
        multiply(isa, weights + r.begin * tile_stride + c, 1, tile_stride, x + r.begin * ld, ld, sum + c * ld, ld, 1, ld,
                 r.end - r.begin, true);
    }
}

// ---- Tasks -----------------------------------------------------------------------------------------

/// Scratch of one thread. Measured and carved by the same code.
template <class A>
struct TiledScratch {
    A *outer_a, *outer_b;  // transposed outer operands: (dh or dv, tile_stride)
    A *inner_a, *inner_b;  // rows of the inner operands
    A* rows;               // rows of an outer operand, before it is transposed
    A *sum_a, *sum_b;      // results
    A *tile, *dtile;       // scores, and dp then dscore
    A *lse, *minus;        // of the queries of a block or tile
    Running<A> running;

    TiledScratch(Arena& arena, const Shape& s, pass which) {
        const Index dh = padded(s.head_dim), dv = padded(s.value_dim);
        const bool backward = which == pass::backward;
        outer_a = arena.take<A>(s.head_dim * tile_stride);
        outer_b = arena.take<A>(backward ? s.value_dim * tile_stride : 0);
        inner_a = arena.take<A>(inner_block * dh);
        inner_b = arena.take<A>(inner_block * dv);
        rows = arena.take<A>(outer_block * (dh > dv ? dh : dv));
        sum_a = arena.take<A>(backward ? outer_block * dh : 0);
        sum_b = arena.take<A>(outer_block * dv);
        tile = arena.take<A>(inner_block * tile_stride);
        dtile = arena.take<A>(backward ? inner_block * tile_stride : 0);
        lse = arena.take<A>(outer_block);
        minus = arena.take<A>(outer_block);
        running.largest = arena.take<A>(outer_block);
        running.sum = arena.take<A>(outer_block);
        running.shrink = arena.take<A>(outer_block);
    }
};
template <class A>
struct StepScratch {
    A *q, *k, *v, *scores, *sum, *bias;
    Running<A> running;

    StepScratch(Arena& arena, const Shape& s) {
        const Index dh = padded(s.head_dim), dv = padded(s.value_dim), heads = s.group();
        q = arena.take<A>(heads * dh);
        k = arena.take<A>(inner_block * dh);
        v = arena.take<A>(inner_block * dv);
        scores = arena.take<A>(heads * inner_block);
        sum = arena.take<A>(heads * dv);
        bias = arena.take<A>(heads);
        running.largest = arena.take<A>(heads);
        running.sum = arena.take<A>(heads);
        running.shrink = arena.take<A>(heads);
    }
};

/// Layout of a workspace: delta of every query for backward, then one scratch a thread.
template <class A>
struct TiledWorkspace {
    A* minus;  // (B, Hq, Lq)

    TiledWorkspace(Arena& arena, const Shape& s, pass which) {
        minus = arena.take<A>(which == pass::backward ? s.batch * s.query_heads * s.queries : 0);
    }
    /// Bytes of the scratch of one thread.
    static std::size_t bytes(const Shape& s, pass which) {
        Arena measure;
        if (which == pass::step)
            StepScratch<A>(measure, s);
        else
            TiledScratch<A>(measure, s, which);
        return measure.required();
    }
};

/// 1 / l of eq. 14; a row that read nothing is zero.
template <class A>
A normalizer(A sum) {
    return sum == A(0) ? A(0) : A(1) / sum;
}

/// Everything a task of forward or backward reads.
template <class T>
struct TiledCall {
    using A = acc_t<T>;
    const Options& options;
    const Inputs<T>& in;
    const Outputs<T>& out;
    Shape shape;
    Isa isa;
    Upstream<T> upstream{};
    Grads<T> grads{};
    A* minus = nullptr;

    A scale() const { return static_cast<A>(scale_of(options, shape.head_dim)); }
    A bias(Index h) const { return in.bias ? in.bias(h) : static_cast<A>(options.bias); }
    bool softmax() const { return options.score == Score::softmax; }

    /// Rows [first, first + count) of head h, widened.
    template <class X>
    void load(const View<X, 4>& x, Index b, Index first, Index h, Index count, A factor, A* to) const {
        if (x.extent[3] > 0)
            simd::run_body<LoadRows<T>>(isa, static_cast<const T*>(&x(b, first, h, 0)), x.stride[1],
                                        x.stride[3], count, x.extent[3], factor, to, padded(x.extent[3]));
    }
    /// The same as columns of (dim, tile_stride), filled up with zero columns.
    template <class X>
    void load_transposed(const View<X, 4>& x, Index b, Index first, Index h, Index count, A factor, A* rows,
                         A* to) const {
        load(x, b, first, h, count, factor, rows);
        const Index dim = x.extent[3], ld = padded(dim);
        for (Index d = 0; d < dim; ++d) {
            for (Index r = 0; r < count; ++r) to[d * tile_stride + r] = rows[r * ld + d];
            for (Index r = count; r < padded(count); ++r) to[d * tile_stride + r] = A(0);
        }
    }
    static void store(const View<T, 4>& x, Index b, Index row, Index h, const A* from, A factor) {
        for (Index d = 0; d < x.extent[3]; ++d) x(b, row, h, d) = static_cast<T>(from[d] * factor);
    }
    static void store_zero(const View<T, 4>& x, Index b, Index begin, Index end, Index h) {
        for (Index i = begin; i < end; ++i)
            for (Index d = 0; d < x.extent[3]; ++d) x(b, i, h, d) = static_cast<T>(A(0));
    }
    /// tile[r][c] = left row r . transposed column c
    void products(const A* left, Index dim, const A* right, RowRange columns, Index rows, A* tile) const {
        multiply(isa, left, padded(dim), 1, right + columns.begin, tile_stride, tile + columns.begin, tile_stride, rows,
                 columns.end - columns.begin, dim, false);
    }
    /// lse and delta - dlse of queries of a sequence. A row that read nothing has no weights: inf.
    void load_statistics(Index b, Index h, const Sequence& q, Index first, Index count, A* lse,
                         A* minus_out) const {
        if (!softmax()) return;
        for (Index i = 0; i < count; ++i) {
            const A x = out.lse(b, q.query0 + first + i, h);
            lse[i] = x == -std::numeric_limits<A>::infinity() ? -x : x;
            minus_out[i] = minus[(b * shape.query_heads + h) * shape.queries + q.query0 + first + i];
        }
        for (Index i = count; i < padded(count); ++i) {
            lse[i] = std::numeric_limits<A>::infinity();
            minus_out[i] = A(0);
        }
    }
    template <bool query_columns>
    void score_gradient(A* tile, A* dtile, Index rows, RowRange c, const A* lse, const A* minus_in,
                        A head_bias) const {
        const Statistics<A> statistics{lse, minus_in};
        if (softmax())
            simd::run_body<ScoreGradient<A, Score::softmax, query_columns>>(isa, tile, dtile, rows, c.begin,
                                                                            c.end, statistics, head_bias);
        else
            simd::run_body<ScoreGradient<A, Score::sigmoid, query_columns>>(isa, tile, dtile, rows, c.begin,
                                                                            c.end, statistics, head_bias);
    }

    // o and lse of queries [first, last) of a sequence (eq. 13 and 14).
    void forward_piece(Index b, Index h, const Sequence& q, Index first, Index last,
                       const TiledScratch<A>& w) const {
        const Index count = last - first, kv = h / shape.group(), ldv = padded(shape.value_dim);
        constexpr A inf = std::numeric_limits<A>::infinity();
        load_transposed(in.q, b, q.query0 + first, h, count, scale(), w.rows, w.outer_a);
        for (Index x = 0; x < count * ldv; ++x) w.sum_b[x] = A(0);
        for (Index i = 0; i < padded(count); ++i) w.running.largest[i] = -inf, w.running.sum[i] = A(0);

        const Index end = q.keys_of(options, last - 1).end;
        for (Index j = q.keys_of(options, first).begin; j < end; j += inner_block) {
            const Tile tile{options, q, true, first, count, j, end - j < inner_block ? end - j : inner_block};
            const RowRange real = tile.active();
            const RowRange wide{real.begin / pad * pad, padded(real.end)};  // whole vectors
            const RowRange range{wide.begin, wide.end < count ? wide.end : count};
            load(in.k, b, q.key0 + j, kv, tile.rows, A(1), w.inner_a);
            load(in.v, b, q.key0 + j, kv, tile.rows, A(1), w.inner_b);
            products(w.inner_a, shape.head_dim, w.outer_a, wide, tile.rows, w.tile);
            const bool masked = tile.masked(range);
            if (softmax()) {
                if (masked) tile.fill_masked(w.tile, range, -inf);
                simd::run_body<OnlineSoftmax<A>>(isa, w.tile, tile.rows, wide.begin, wide.end, w.running);
                simd::run_body<ScaleRows<A>>(isa, w.sum_b + range.begin * ldv, range.end - range.begin, ldv,
                                             static_cast<const A*>(w.running.shrink + range.begin));
            } else {
                simd::run_body<Sigmoid<A>>(isa, w.tile, tile.rows, wide.begin, wide.end, bias(h));
                if (masked) tile.fill_masked(w.tile, range, A(0));
            }
            accumulate<A>(isa, tile, range, masked, w.tile, w.inner_b, ldv, w.sum_b);
        }
        for (Index i = 0; i < count; ++i) {
            const Index row = q.query0 + first + i;
            const A sum = w.running.sum[i];
            store(out.o, b, row, h, w.sum_b + i * ldv, softmax() ? normalizer(sum) : A(1));
            if (out.lse) out.lse(b, row, h) = sum == A(0) ? -inf : w.running.largest[i] + std::log(sum);
        }
    }

    // delta - dlse of queries of a sequence (eq. 8).
    void delta_piece(Index b, Index h, const Sequence& q, Index first, Index last,
                     const TiledScratch<A>& w) const {
        const Index count = last - first, row = q.query0 + first;
        for (Index i = 0; i < count; ++i) w.minus[i] = A(0);
        if (shape.value_dim > 0) {
            load(out.o, b, row, h, count, A(1), w.rows);
            load(upstream.o, b, row, h, count, A(1), w.sum_b);
            simd::run_body<DotRows<A>>(isa, static_cast<const A*>(w.rows), static_cast<const A*>(w.sum_b),
                                       count, padded(shape.value_dim), w.minus);
        }
        for (Index i = 0; i < count; ++i) {
            const bool empty = out.lse(b, row + i, h) == -std::numeric_limits<A>::infinity();
            const A dlse = upstream.lse ? upstream.lse(b, row + i, h) : A(0);
            minus[(b * shape.query_heads + h) * shape.queries + row + i] = empty ? A(0) : w.minus[i] - dlse;
        }
    }

    // dq of queries [first, last) of a sequence (eq. 11).
    void dq_piece(Index b, Index h, const Sequence& q, Index first, Index last,
                  const TiledScratch<A>& w) const {
        const Index count = last - first, kv = h / shape.group(), ldk = padded(shape.head_dim);
        load_transposed(in.q, b, q.query0 + first, h, count, scale(), w.rows, w.outer_a);
        load_transposed(upstream.o, b, q.query0 + first, h, count, A(1), w.rows, w.outer_b);
        load_statistics(b, h, q, first, count, w.lse, w.minus);
        for (Index x = 0; x < count * ldk; ++x) w.sum_a[x] = A(0);

        const Index end = q.keys_of(options, last - 1).end;
        for (Index j = q.keys_of(options, first).begin; j < end; j += inner_block) {
            const Tile tile{options, q, true, first, count, j, end - j < inner_block ? end - j : inner_block};
            const RowRange real = tile.active();
            const RowRange wide{real.begin / pad * pad, padded(real.end)};
            const RowRange range{wide.begin, wide.end < count ? wide.end : count};
            load(in.k, b, q.key0 + j, kv, tile.rows, A(1), w.inner_a);
            load(in.v, b, q.key0 + j, kv, tile.rows, A(1), w.inner_b);
            products(w.inner_a, shape.head_dim, w.outer_a, wide, tile.rows, w.tile);
            products(w.inner_b, shape.value_dim, w.outer_b, wide, tile.rows, w.dtile);
            score_gradient<true>(w.tile, w.dtile, tile.rows, wide, w.lse, w.minus, bias(h));
            const bool masked = tile.masked(range);
            if (masked) tile.fill_masked(w.dtile, range, A(0));
            accumulate<A>(isa, tile, range, masked, w.dtile, w.inner_a, ldk, w.sum_a);
        }
        for (Index i = 0; i < count; ++i)
            store(grads.q, b, q.query0 + first + i, h, w.sum_a + i * ldk, scale());
    }

    // dk and dv of keys [first, last) of a sequence (eq. 12 and 6), over the query heads of the group.
    void dkv_piece(Index b, Index kv, const Sequence& q, Index first, Index last,
                   const TiledScratch<A>& w) const {
        const Index count = last - first, ldk = padded(shape.head_dim), ldv = padded(shape.value_dim);
        load_transposed(in.k, b, q.key0 + first, kv, count, A(1), w.rows, w.outer_a);
        load_transposed(in.v, b, q.key0 + first, kv, count, A(1), w.rows, w.outer_b);
        for (Index x = 0; x < count * ldk; ++x) w.sum_a[x] = A(0);
        for (Index x = 0; x < count * ldv; ++x) w.sum_b[x] = A(0);

        const Index begin = q.queries_of(options, first).begin, end = q.queries_of(options, last - 1).end;
        for (Index h = kv * shape.group(); h < (kv + 1) * shape.group(); ++h)
            for (Index i = begin; i < end; i += inner_block) {
                const Tile tile{
                    options, q, false, first, count, i, end - i < inner_block ? end - i : inner_block};
                const RowRange real = tile.active();
                const RowRange wide{real.begin / pad * pad, padded(real.end)};
                const RowRange range{wide.begin, wide.end < count ? wide.end : count};
                // The scale sits in q: once for the scores and once for dk.
                load(in.q, b, q.query0 + i, h, tile.rows, scale(), w.inner_a);
                load(upstream.o, b, q.query0 + i, h, tile.rows, A(1), w.inner_b);
                load_statistics(b, h, q, i, tile.rows, w.lse, w.minus);
                products(w.inner_a, shape.head_dim, w.outer_a, wide, tile.rows, w.tile);
                products(w.inner_b, shape.value_dim, w.outer_b, wide, tile.rows, w.dtile);
                score_gradient<false>(w.tile, w.dtile, tile.rows, wide, w.lse, w.minus, bias(h));
                const bool masked = tile.masked(range);
                if (masked) {
                    tile.fill_masked(w.tile, range, A(0));
                    tile.fill_masked(w.dtile, range, A(0));
                }
                if (grads.v) accumulate<A>(isa, tile, range, masked, w.tile, w.inner_b, ldv, w.sum_b);
                if (grads.k) accumulate<A>(isa, tile, range, masked, w.dtile, w.inner_a, ldk, w.sum_a);
            }
        for (Index j = 0; j < count; ++j) {
            if (grads.k) store(grads.k, b, q.key0 + first + j, kv, w.sum_a + j * ldk, A(1));
            if (grads.v) store(grads.v, b, q.key0 + first + j, kv, w.sum_b + j * ldv, A(1));
        }
    }
};

/// Threads worth waking for this many multiply-adds: one for work of some tens of microseconds.
inline int threads_for(double work, int requested) { return work < 1e6 ? 1 : thread_count(requested); }

inline double tiled_work(const Shape& s) {
    return static_cast<double>(s.batch * s.query_heads) * static_cast<double>(s.queries) *
           static_cast<double>(s.keys) * static_cast<double>(s.head_dim + s.value_dim);
}

/// Scratch of a worker behind the shared part of a workspace.
inline void* worker_memory(Workspace ws, std::size_t shared, std::size_t each, int worker) {
    return static_cast<std::byte*>(ws.data) + shared + each * static_cast<std::size_t>(worker);
}

template <class A>
std::size_t tiled_shared(const Shape& s, pass which) {
    Arena measure;
    TiledWorkspace<A>(measure, s, which);
    return measure.required();
}

inline std::size_t tiled_workspace_size(const cpu& exec, const Shape& s, pass which) {
    const auto size = [&](auto accumulator) {
        using A = decltype(accumulator);
        return tiled_shared<A>(s, which) +
               TiledWorkspace<A>::bytes(s, which) * static_cast<std::size_t>(thread_count(exec.threads));
    };
    return s.dtype == DType::f64 ? size(double{}) : size(float{});
}

/// Cuts a (batch row, head, rows) space into tasks of `outer_block` rows and these into pieces of one
/// sequence each: piece(b, h, sequence, first, last, scratch), and gap(b, h, first, last) for rows that
/// belong to none. Blocks come first to last, or last to first: the longest ones should start first.
template <class T, class Piece, class Gap>
void tiled_tasks(const cpu& exec, const TiledCall<T>& call, Workspace ws, pass which, Index heads, Index rows,
                 bool from_last, Piece&& piece, Gap&& gap) {
    using A = acc_t<T>;
    const Shape& s = call.shape;
    const Index blocks = ceil_div(rows, outer_block), lines = s.batch * heads;
    const std::size_t shared = tiled_shared<A>(s, which), each = TiledWorkspace<A>::bytes(s, which);
    const auto task = [&](Index t, int worker) {
        Arena arena(worker_memory(ws, shared, each, worker));
        const TiledScratch<A> scratch(arena, s, which);
        const Index b = t % lines / heads, h = t % heads;
        const Index begin = (from_last ? blocks - 1 - t / lines : t / lines) * outer_block;
        const Index end = begin + outer_block < rows ? begin + outer_block : rows;
        for_each_piece(
            s, call.in.cu_seqlens, begin, end,
            [&](const Sequence& q, Index first, Index last) { piece(b, h, q, first, last, scratch); },
            [&](Index first, Index last) { gap(b, h, first, last); });
    };
    parallel_for(blocks * lines, threads_for(tiled_work(s), exec.threads), task);
}

template <class T>
void tiled_forward(const cpu& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out,
                   Workspace ws) {
    using Scratch = TiledScratch<acc_t<T>>;
    const TiledCall<T> call{options, in, out, shape_of(in), exec.isa};
    const auto piece = [&](Index b, Index h, const Sequence& q, Index first, Index last, const Scratch& w) {
        call.forward_piece(b, h, q, first, last, w);
    };
    const auto gap = [&](Index b, Index h, Index first, Index last) {
        call.store_zero(out.o, b, first, last, h);
        if (out.lse)
            for (Index i = first; i < last; ++i) out.lse(b, i, h) = 0;
    };
    tiled_tasks(exec, call, ws, pass::forward, call.shape.query_heads, call.shape.queries, options.causal,
                piece, gap);
}

template <class T>
void tiled_backward(const cpu& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out,
                    const Upstream<T>& upstream, const Grads<T>& grads, Workspace ws) {
    using A = acc_t<T>;
    using Scratch = TiledScratch<A>;
    TiledCall<T> call{options, in, out, shape_of(in), exec.isa, upstream, grads};
    const Shape& s = call.shape;
    Arena arena(ws.data);
    call.minus = TiledWorkspace<A>(arena, s, pass::backward).minus;
    const auto delta = [&](Index b, Index h, const Sequence& q, Index first, Index last, const Scratch& w) {
        call.delta_piece(b, h, q, first, last, w);
    };
    const auto dq = [&](Index b, Index h, const Sequence& q, Index first, Index last, const Scratch& w) {
        call.dq_piece(b, h, q, first, last, w);
    };
    const auto dkv = [&](Index b, Index kv, const Sequence& q, Index first, Index last, const Scratch& w) {
        call.dkv_piece(b, kv, q, first, last, w);
    };
    const auto nothing = [](Index, Index, Index, Index) {};
    const auto zero_q = [&](Index b, Index h, Index first, Index last) {
        call.store_zero(grads.q, b, first, last, h);
    };
    const auto zero_kv = [&](Index b, Index kv, Index first, Index last) {
        if (grads.k) call.store_zero(grads.k, b, first, last, kv);
        if (grads.v) call.store_zero(grads.v, b, first, last, kv);
    };
    if (call.softmax() && (grads.q || grads.k))
        tiled_tasks(exec, call, ws, pass::backward, s.query_heads, s.queries, false, delta, nothing);
    if (grads.q)
        tiled_tasks(exec, call, ws, pass::backward, s.query_heads, s.queries, options.causal, dq, zero_q);
    if (grads.k || grads.v)
        tiled_tasks(exec, call, ws, pass::backward, s.kv_heads, s.keys, false, dkv, zero_kv);
}

/// Decoding: every key/value head of every batch row is a task, which reads its cache once for all
/// query heads of the group.
template <class T>
void cached_step(const cpu& exec, const Options& options, const State<T>& state, const Token<T>& token,
                 const TokenOut<T>& out, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(state, token);
    const Isa isa = exec.isa;
    const Index length = state.length, group = s.group();
    const Index ldk = padded(s.head_dim), ldv = padded(s.value_dim);
    const RowRange read = keys_read(options, length, length + 1);  // eq. 5
    const A scale = static_cast<A>(scale_of(options, s.head_dim));
    const std::size_t each = TiledWorkspace<A>::bytes(s, pass::step);
    const double work = static_cast<double>(s.batch * s.query_heads) *
                        static_cast<double>(read.end - read.begin) *
                        static_cast<double>(s.head_dim + s.value_dim);

    // Rows of a cache that are already what the kernel reads stay where they are.
    const auto rows_at = [&](const View<T, 4>& x, Index b, Index first, Index h, Index count, A* copy,
                             Index& ld) {
        const Index dim = x.extent[3];
        ld = padded(dim);
        if (dim == 0) return static_cast<const A*>(copy);
        const T* at = &x(b, first, h, 0);
        if constexpr (std::is_same_v<T, A>)
            if (x.stride[3] == 1 && dim % pad == 0) {
                ld = x.stride[1];
                return static_cast<const A*>(at);
            }
        simd::run_body<LoadRows<T>>(isa, at, x.stride[1], x.stride[3], count, dim, A(1), copy, ld);
        return static_cast<const A*>(copy);
    };

    parallel_for(s.batch * s.kv_heads, threads_for(work, exec.threads), [&](Index task, int worker) {
        const Index b = task / s.kv_heads, kv = task % s.kv_heads;
        Arena arena(worker_memory(ws, 0, each, worker));
        const StepScratch<A> w(arena, s);
        for (Index d = 0; d < s.head_dim; ++d) state.k(b, length, kv, d) = token.k(b, kv, d);
        for (Index d = 0; d < s.value_dim; ++d) state.v(b, length, kv, d) = token.v(b, kv, d);
        for (Index g = 0; g < group; ++g) {
            const Index h = kv * group + g;
            for (Index d = 0; d < ldk; ++d)
                w.q[g * ldk + d] = d < s.head_dim ? scale * static_cast<A>(token.q(b, h, d)) : A(0);
            for (Index d = 0; d < ldv; ++d) w.sum[g * ldv + d] = A(0);
            w.bias[g] = token.bias ? token.bias(h) : static_cast<A>(options.bias);
            w.running.largest[g] = -std::numeric_limits<A>::infinity();
            w.running.sum[g] = A(0);
        }
        for (Index j = read.begin; j < read.end; j += inner_block) {
            const Index rows = read.end - j < inner_block ? read.end - j : inner_block;
            Index k_stride, v_stride;
            const A* k = rows_at(state.k, b, j, kv, rows, w.k, k_stride);
            const A* v = rows_at(state.v, b, j, kv, rows, w.v, v_stride);
            const A* q = w.q;
            const A* bias = w.bias;
            if (options.score == Score::softmax) {
                simd::run_body<StepScores<A, Score::softmax>>(isa, q, group, ldk, k, k_stride, rows, w.scores,
                                                              bias, w.running);
                simd::run_body<ScaleRows<A>>(isa, w.sum, group, ldv, static_cast<const A*>(w.running.shrink));
            } else {
                simd::run_body<StepScores<A, Score::sigmoid>>(isa, q, group, ldk, k, k_stride, rows, w.scores,
                                                              bias, w.running);
            }
            multiply<A>(isa, w.scores, inner_block, 1, v, v_stride, w.sum, ldv, group, ldv, rows, true);
        }
        for (Index g = 0; g < group; ++g) {
            const A factor = options.score == Score::softmax ? normalizer(w.running.sum[g]) : A(1);
            for (Index d = 0; d < s.value_dim; ++d)
                out.o(b, kv * group + g, d) = static_cast<T>(w.sum[g * ldv + d] * factor);
        }
    });
}

}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
