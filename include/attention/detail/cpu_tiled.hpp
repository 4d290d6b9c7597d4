// CPU attention: tiles of queries against tiles of keys, never an L x L array.
// Equations: docs/ops/attention.md.
//
// A task owns a block of rows (queries in forward, keys in backward), cut into panels of `panel` rows, and
// walks the other side in tiles of `inner_block` rows. Scores are formed transposed to that walk: one row of
// the tile for each inner row, one column for each row of the panel, so that
//   - the panels are transposed once for a task, and inner rows are loaded once for all panels of it;
//   - the running maximum and sum of a query (eq. 13) are lanes of vectors: nothing crosses lanes;
//   - all products are one micro-kernel (simd::Gemm), because reading its left operand transposed is free.
// A task does not know how many threads there are, and the size of its block follows from the shape alone: the same
// bits for any number of threads. Backward forms the scores once (5 products): dk and dv are sums of the task's own,
// and dq of a query tile is added up over the key blocks in their order, which a counter for each block keeps.
//
// Leaf bodies hold the loops that are compiled for each instruction set; what is left between them
// is bookkeeping. Instruction sets differ in the last bits (they sum in lanes of different number).
#pragma once

#include <atomic>
#include <cmath>
#include <limits>
#include <thread>

#include <attention/params.hpp>
#include <attention/policy.hpp>
#include <interstate/cpu/gemm.hpp>
#include <interstate/cpu/isa.hpp>
#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

inline constexpr Index inner_block = 64;     // rows of a tile
inline constexpr Index panel = 64;           // columns of a tile
inline constexpr Index largest_block = 256;  // rows of a task
inline constexpr Index pad = 16;             // lanes of the widest vector: rows are padded to a multiple of it
// Rows of a tile are 5 cache lines apart (10 for double), not 4: a column then visits every cache set.
inline constexpr Index tile_stride = panel + pad;

/// Rows of a task: many, because every task loads all of the other side, but tasks enough for 64 threads where there
/// can be. The shape alone decides, never the threads.
constexpr Index block_of(Index lines, Index rows) {
    Index block = largest_block;
    while (block > panel && lines * ((rows + block - 1) / block) < 64) block /= 2;
    return block;
}

constexpr Index padded(Index n) { return ceil_div(n, pad) * pad; }

// ---- Leaf bodies -----------------------------------------------------------------------------------

/// dst[r][0, width) = scale * src[r][0, dim), widened and filled up with zeros; rows of dst are `ld` apart.
template <class T>
struct LoadRows {
    using A = acc_t<T>;
    template <class Set>
    static INTERSTATE_INLINE void run(const T* src, Index row_stride, Index step, Index rows, Index dim,
                                      A scale, A* dst, Index width, Index ld) {
        using V = simd::Native<Set, A>;
        const V scales = simd::broadcast<V>(scale);
        const Index whole = step == 1 ? dim / V::lanes * V::lanes : 0;
        for (Index r = 0; r < rows; ++r) {
            const T* from = src + r * row_stride;
            A* to = dst + r * ld;
            for (Index d = 0; d < whole; d += V::lanes)
                simd::store(to + d, simd::load_as<V>(from + d) * scales);
            for (Index d = whole; d < dim; ++d) to[d] = static_cast<A>(from[d * step]) * scale;
            for (Index d = dim; d < width; ++d) to[d] = A(0);
        }
    }
};

/// Whether all of x[r][0, width) is finite, width a multiple of the padding.
template <class A>
struct Finite {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* x, Index rows, Index ld, Index width, bool* finite) {
        using V = simd::Native<Set, A>;
        const V zero = simd::broadcast<V>(A(0));
        V probe = zero;  // 0 * NaN and 0 * inf are NaN, and stay
        for (Index r = 0; r < rows; ++r)
            for (Index d = 0; d < width; d += V::lanes) probe = simd::fma(simd::load<V>(x + r * ld + d), zero, probe);
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
    Running from(Index row) const { return {largest + row, sum + row, shrink + row}; }
};

/// Scores of a tile become weights relative to the largest score so far (eq. 13), columns [begin, end).
template <class A>
struct OnlineSoftmax {
    /// Vecs vectors of columns side by side: the maxima and sums of a column are chains, which others fill up.
    template <int Vecs, class V>
    static INTERSTATE_INLINE void columns(A* column, Index rows, const Running<A>& running, Index c) {
        constexpr A inf = std::numeric_limits<A>::infinity();
        V before[Vecs], largest[Vecs], sum[Vecs];
        INTERSTATE_UNROLL
        for (int n = 0; n < Vecs; ++n) largest[n] = before[n] = simd::load<V>(running.largest + c + n * V::lanes);
        for (Index r = 0; r < rows; ++r) {
            INTERSTATE_UNROLL
            for (int n = 0; n < Vecs; ++n)
                largest[n] = simd::max(simd::load<V>(column + r * tile_stride + n * V::lanes), largest[n]);
        }
        INTERSTATE_UNROLL
        for (int n = 0; n < Vecs; ++n) {
            const Index at = c + n * V::lanes;
            simd::store(running.largest + at, largest[n]);
            // Where every score so far is -inf, -inf - (-inf) must not be formed.
            largest[n].v = largest[n].v == -inf ? simd::broadcast<V>(A(0)).v : largest[n].v;
            const V shrink = simd::exp(before[n] - largest[n]);
            sum[n] = simd::load<V>(running.sum + at) * shrink;
            simd::store(running.shrink + at, shrink);
        }
        for (Index r = 0; r < rows; ++r) {
            INTERSTATE_UNROLL
            for (int n = 0; n < Vecs; ++n) {
                A* at = column + r * tile_stride + n * V::lanes;
                const V p = simd::exp_nonpositive(simd::load<V>(at) - largest[n]);
                simd::store(at, p);
                sum[n] = sum[n] + p;
            }
        }
        INTERSTATE_UNROLL
        for (int n = 0; n < Vecs; ++n) simd::store(running.sum + c + n * V::lanes, sum[n]);
    }
    template <class Set>
    static INTERSTATE_INLINE void run(A* tile, Index rows, Index begin, Index end, Running<A> running) {
        using V = simd::Native<Set, A>;
        constexpr int widest = Set::registers >= 32 ? 4 : 1;
        Index c = begin;
        for (; c + widest * V::lanes <= end; c += widest * V::lanes) columns<widest, V>(tile + c, rows, running, c);
        if constexpr (widest > 1)
            for (; c < end; c += V::lanes) columns<1, V>(tile + c, rows, running, c);
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

/// Scores become weights and dp becomes dscore (eq. 2, 9 or 3, 10). Rows of the tile are queries.
template <class A, Score score>
struct ScoreGradient {
    template <class Set>
    static INTERSTATE_INLINE void run(A* tile, A* dtile, Index rows, Index begin, Index end,
                                      Statistics<A> statistics, A bias) {
        using V = simd::Native<Set, A>;
        for (Index r = 0; r < rows; ++r) {
            // Out of the inner loop: stores into the tile might alias them.
            const V lse = simd::broadcast<V>(score == Score::softmax ? statistics.lse[r] : A(0));
            const V minus = simd::broadcast<V>(score == Score::softmax ? statistics.minus[r] : A(0));
            for (Index c = begin; c < end; c += V::lanes) {
                A* at = tile + r * tile_stride + c;
                A* dat = dtile + r * tile_stride + c;
                const V dp = simd::load<V>(dat);
                if constexpr (score == Score::softmax) {
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
    }
};

/// out[r] = or += sum_d a[r][d] b[r][d], rows as they lie in two tensors.
template <class T, class U = T>
struct DotRows {
    using A = acc_t<T>;
    template <class Set>
    static INTERSTATE_INLINE void run(const U* a, Index a_row, Index a_step, const T* b, Index b_row, Index b_step,
                                      Index rows, Index dim, A* out, bool add = false) {
        using V = simd::Native<Set, A>;
        constexpr int lanes = V::lanes;
        const Index whole = a_step == 1 && b_step == 1 ? dim / lanes * lanes : 0;
        for (Index r = 0; r < rows; ++r) {
            const U* x = a + r * a_row;
            const T* y = b + r * b_row;
            V sum = simd::broadcast<V>(A(0));
            // In the same lanes and by one statement, which the compiler fuses or does not, so that strides do not change the sum.
            for (Index d = 0; d < dim; d += lanes) {
                V left, right;
                if (d < whole) {
                    left = simd::load_as<V>(x + d);
                    right = simd::load_as<V>(y + d);
                } else {
                    A some[2][lanes] = {};
                    for (Index i = 0; i < lanes && d + i < dim; ++i) {
                        some[0][i] = static_cast<A>(x[(d + i) * a_step]);
                        some[1][i] = static_cast<A>(y[(d + i) * b_step]);
                    }
                    left = simd::load<V>(some[0]);
                    right = simd::load<V>(some[1]);
                }
                sum = simd::fma(left, right, sum);
            }
            out[r] = (add ? out[r] : A(0)) + simd::reduce_add(sum);
        }
    }
};

/// dst[r][0, dim) = what rounding to T takes from scale[r] * src[r].
template <class T>
struct StoreRest {
    template <class Set>
    static INTERSTATE_INLINE void run(const float* src, Index ld, const float* scale, Index rows, Index dim, bf16* dst) {
        for (Index r = 0; r < rows; ++r)
            for (Index d = 0; d < dim; d += pad) {
                using V = simd::Vec<float, pad>;
                const V x = simd::load<V>(src + r * ld + d) * simd::broadcast<V>(scale[r]);
                T rounded[pad];
                simd::store_as<T>(rounded, x);
                bf16 rest[pad];
                simd::store_as<bf16>(rest, x - simd::load_as<V>(rounded));
                const Index n = dim - d < pad ? dim - d : pad;
                std::memcpy(dst + r * dim + d, rest, static_cast<std::size_t>(n) * sizeof(bf16));
            }
    }
};

/// dst[r][0, dim) = scale[r or 0] * src[r], rounded to the storage dtype.
template <class T>
struct StoreRows {
    using A = acc_t<T>;
    template <class Set>
    static INTERSTATE_INLINE void run(const A* src, Index ld, const A* scale, Index scale_step, Index rows, Index dim,
                                      T* dst, Index row_stride, Index step) {
        using V = simd::Native<Set, A>;
        const Index whole = step == 1 ? dim / V::lanes * V::lanes : 0;
        for (Index r = 0; r < rows; ++r) {
            const A factor = scale[r * scale_step];
            const A* from = src + r * ld;
            T* to = dst + r * row_stride;
            const V factors = simd::broadcast<V>(factor);
            for (Index d = 0; d < whole; d += V::lanes)
                simd::store_as<T>(to + d, simd::load<V>(from + d) * factors);
            for (Index d = whole; d < dim; ++d) to[d * step] = static_cast<T>(from[d] * factor);
        }
    }
};

/// to[r][0, width) = from[r] * factor[r] + (add ? to[r] : 0), width a multiple of the padding; no factors are ones.
template <class A>
struct AddRows {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* from, Index ld, Index rows, Index width, const A* factor, bool add, A* to,
                                      Index ldt) {
        using V = simd::Native<Set, A>;
        for (Index r = 0; r < rows; ++r) {
            const V f = simd::broadcast<V>(factor ? factor[r] : A(1));
            for (Index d = 0; d < width; d += V::lanes) {
                V x = simd::load<V>(from + r * ld + d) * f;
                if (add) x = x + simd::load<V>(to + r * ldt + d);
                simd::store(to + r * ldt + d, x);
            }
        }
    }
};

/// score += term of a policy.
template <class A, class Policy>
struct AddTerm {
    template <class Set>
    static INTERSTATE_INLINE void run(A* tile, Index rows, Index begin, Index end, Policy policy, Cells first) {
        using V = simd::Native<Set, A>;
        for (Index r = 0; r < rows; ++r)
            for (Index c = begin; c < end; c += V::lanes) {
                Cells at = first;
                at.query += first.query_lanes ? c : r;
                at.key += first.query_lanes ? r : c;
                A* to = tile + r * tile_stride + c;
                simd::store(to, simd::load<V>(to) + policy.template score_term<V>(at));
            }
    }
};

/// out[i] = exp(sign (g[i] - reference)) for n a multiple of the padding. What a float cannot hold of a difference comes
/// as a factor: rounding 50 to float would move exp(50) by 2e-6 of itself.
template <class A>
struct DecayFactors {
    template <class Set>
    static INTERSTATE_INLINE void run(const double* g, double reference, double sign, Index n, A* out) {
        using V = simd::Native<Set, A>;
        using D = simd::Vec<double, V::lanes>;
        const D from = simd::broadcast<D>(reference), by = simd::broadcast<D>(sign);
        for (Index i = 0; i < n; i += V::lanes) {
            const D x = (simd::load<D>(g + i) - from) * by;
            if constexpr (std::is_same_v<A, double>) {
                simd::store(out + i, simd::exp(x));
            } else {
                const V near{__builtin_convertvector(x.v, typename V::type)};
                const D rest{x.v - __builtin_convertvector(near.v, typename D::type)};
                const V e = simd::exp(near);
                simd::store(out + i, simd::fma(e, V{__builtin_convertvector(rest.v, typename V::type)}, e));
            }
        }
    }
};

/// to[s][c] = from[s][c] * factor[c], rows `panel` apart.
template <class A>
struct ScaleColumns {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* from, Index rows, Index begin, Index end, const A* factor, A* to) {
        using V = simd::Native<Set, A>;
        for (Index c = begin; c < end; c += V::lanes) {
            const V f = simd::load<V>(factor + c);
            for (Index s = 0; s < rows; ++s) simd::store(to + s * panel + c, simd::load<V>(from + s * panel + c) * f);
        }
    }
};

/// What a steep tile needs of the decay: e[r][c] becomes exp(g) of its pair, at most 1. Differences are formed in
/// double; pairs above the diagonal, which a mask takes out, become 1.
template <class A>
struct DecayTile {
    template <class Set>
    static INTERSTATE_INLINE void run(A* tile, Index rows, Index begin, Index end, const double* of_rows,
                                      const double* of_columns, bool query_columns) {
        using V = simd::Native<Set, A>;
        const V zero = simd::broadcast<V>(A(0));
        for (Index r = 0; r < rows; ++r) {
            A* row = tile + r * tile_stride;
            const double g = of_rows[r];
            for (Index c = begin; c < end; ++c) row[c] = static_cast<A>(query_columns ? of_columns[c] - g : g - of_columns[c]);
            for (Index c = begin; c < end; c += V::lanes)
                simd::store(row + c, simd::exp(simd::min(zero, simd::load<V>(row + c))));
        }
    }
};

/// to[r][c] += a[r][c] * b[r][c], or = without `add`.
template <class A>
struct MultiplyTile {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* a, const A* b, Index rows, Index begin, Index end, bool add, A* to) {
        using V = simd::Native<Set, A>;
        for (Index r = 0; r < rows; ++r)
            for (Index c = begin; c < end; c += V::lanes) {
                const Index at = r * tile_stride + c;
                const V x = simd::load<V>(a + at) * simd::load<V>(b + at);
                simd::store(to + at, add ? simd::load<V>(to + at) + x : x);
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
    /// Columns [begin, end), and the rows with anything to do there: both ends of rows_of move forward, too.
    Tile strip(Index begin, Index end) const {
        const RowRange r{rows_of(begin).begin, rows_of(end - 1).end};
        return {options, sequence, query_columns, outer + begin, end - begin, inner + r.begin,
                r.end > r.begin ? r.end - r.begin : 0};
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

/// sum[c][d] += sum_r weights[r][c] x[r][d] for the columns of `range` and d in [0, width). In a masked tile a weight of
/// zero may meet a NaN or an infinity of a row that its column does not read: where there is one, each
/// column sums only the rows it reads.
template <class A>
void accumulate(Isa isa, const Tile& tile, RowRange range, bool masked, const A* weights, const A* x, Index ld, Index width,
                A* sum, Index ld_sum) {
    bool together = true;
    if (masked) simd::run_body<Finite<A>>(isa, x, tile.rows, ld, width, &together);
    if (together) {
        multiply(isa, weights + range.begin, 1, tile_stride, x, ld, sum + range.begin * ld_sum, ld_sum,
                 range.end - range.begin, width, tile.rows, true);
        return;
    }
    for (Index c = range.begin; c < range.end; ++c) {
        const RowRange r = tile.rows_of(c);
        multiply(isa, weights + r.begin * tile_stride + c, 1, tile_stride, x + r.begin * ld, ld, sum + c * ld_sum, ld_sum, 1,
                 width, r.end - r.begin, true);
    }
}

/// The other way: sum[r][d] += sum_c weights[r][c] x[c][d], x the rows of the panel.
template <class A>
void accumulate_rows(Isa isa, const Tile& tile, RowRange range, bool masked, const A* weights, const A* x, Index ld,
                     Index width, A* sum, Index ld_sum) {
    bool together = true;
    if (masked)
        simd::run_body<Finite<A>>(isa, x + range.begin * ld, range.end - range.begin, ld, width, &together);
    if (together) {
        multiply(isa, weights + range.begin, tile_stride, 1, x + range.begin * ld, ld, sum, ld_sum, tile.rows, width,
                 range.end - range.begin, true);
        return;
    }
    for (Index r = 0; r < tile.rows; ++r) {
        const RowRange c = tile.columns_of(r);
        multiply(isa, weights + r * tile_stride + c.begin, tile_stride, 1, x + c.begin * ld, ld, sum + r * ld_sum, ld_sum, 1,
                 width, c.end - c.begin, true);
    }
}

/// Asks for rows that will be loaded soon: rows of a head lie far apart, where no hardware prefetcher follows.
/// Inlined, because g++ drops calls of functions that do nothing but prefetch.
template <class X>
INTERSTATE_INLINE void prefetch_rows(const View<X, 4>& x, Index b, Index first, Index end, Index h) {
    if (x.extent[3] == 0 || x.stride[3] != 1) return;
    constexpr Index line = 64 / static_cast<Index>(sizeof(X));
    for (Index r = first; r < end; ++r)
        for (Index d = 0; d < x.extent[3]; d += line) __builtin_prefetch(&x(b, r, h, d), 0, 3);
}

// ---- Tasks -----------------------------------------------------------------------------------------

/// Columns of an operand of the scores: head_dim of q and k, and behind them (from a whole vector on) the channels of
/// a policy.
struct Widths {
    Index score;     // columns that a product for scores sums over
    Index channel;   // where channels begin
    Index channels;  // ds
    Index ld;        // of rows, padded
    Index value_ld;

    Widths(const Shape& s, Index ds)
        : score(ds > 0 ? padded(s.head_dim) + ds : s.head_dim),
          channel(padded(s.head_dim)),
          channels(ds),
          ld(padded(s.head_dim) + padded(ds)),
          value_ld(padded(s.value_dim)) {}
};

/// Scratch of one thread. Measured and carved by the same code.
template <class A>
struct TiledScratch {
    A *outer_a, *outer_b;   // transposed outer operands, panel by panel: (panels, ld or value_ld, panel)
    A* outer_rows;          // rows of the outer operand of dq, (largest_block, ld)
    A *inner_a, *inner_b;   // rows of the inner operands
    A* rows;                // rows of an outer operand, before it is transposed
    A *sum_a, *sum_b;       // results of the block
    A* sum_q;               // dq of a tile
    A *tile, *dtile;        // scores, and dp then dscore
    A *lse, *minus;         // of the queries of a tile
    Running<A> running;
    // Channels of a policy.
    A* channels_a;            // as they are: transposed in forward, (panels, ds, panel)
    A* channels_b;            // of the tile, in forward
    A *decay_tile, *channel_tile;
    A* factors;
    double *outer_g, *inner_g;

    TiledScratch(Arena& arena, const Shape& s, pass which, Index ds) {
        const Widths w(s, ds);
        const bool backward = which == pass::backward;
        outer_a = arena.take<A>(largest_block * w.ld);
        outer_b = arena.take<A>(backward ? largest_block * w.value_ld : 0);
        outer_rows = arena.take<A>(backward ? largest_block * w.ld : 0);
        inner_a = arena.take<A>(inner_block * w.ld);
        inner_b = arena.take<A>(inner_block * w.value_ld);
        rows = arena.take<A>(panel * (w.ld > w.value_ld ? w.ld : w.value_ld));
        sum_a = arena.take<A>(backward ? largest_block * w.ld : 0);
        sum_b = arena.take<A>(largest_block * w.value_ld);
        sum_q = arena.take<A>(backward ? inner_block * w.ld : 0);
        tile = arena.take<A>(inner_block * tile_stride + 8 * pad);  // not a multiple of 4096 bytes from dtile
        dtile = arena.take<A>(backward ? inner_block * tile_stride : 0);
        lse = arena.take<A>(backward ? inner_block : 0);
        minus = arena.take<A>(backward ? largest_block : 0);
        running.largest = arena.take<A>(backward ? 0 : largest_block);
        running.sum = arena.take<A>(backward ? 0 : largest_block);
        running.shrink = arena.take<A>(backward ? 0 : largest_block);
        const Index on = ds > 0 ? 1 : 0;
        channels_a = arena.take<A>(backward ? 0 : largest_block * padded(ds));
        channels_b = arena.take<A>(backward ? 0 : inner_block * padded(ds));
        decay_tile = arena.take<A>(on * inner_block * tile_stride);
        channel_tile = arena.take<A>(on * inner_block * tile_stride);
        factors = arena.take<A>(on * largest_block);
        outer_g = arena.take<double>(on * largest_block);
        inner_g = arena.take<double>(on * inner_block);
    }
};
template <class A>
struct StepScratch {
    A *q, *k, *v, *scores, *sum, *bias;
    Running<A> running;

    StepScratch(Arena& arena, const Shape& s) {
        const Index dh = padded(s.head_dim), dv = padded(s.value_dim), heads = s.group() * s.queries;
        q = arena.take<A>(heads * dh);
        k = arena.take<A>(inner_block * dh);
        v = arena.take<A>(inner_block * dv);
        scores = arena.take<A>(s.group() * inner_block);
        sum = arena.take<A>(heads * dv);
        bias = arena.take<A>(heads);
        running.largest = arena.take<A>(heads);
        running.sum = arena.take<A>(heads);
        running.shrink = arena.take<A>(heads);
    }
};

/// Layout of a workspace: what tasks of backward share, then one scratch a thread.
template <class A>
struct TiledWorkspace {
    A* minus;         // (B, Hq, Lq), delta - dlse of every query
    A* dq;            // (B, Hq, Lq, ld), sums over the key blocks so far; none where there is one block
    Index* progress;  // (B, Hkv, key blocks): tiles of queries that a block has added to dq, see Turn

    TiledWorkspace(Arena& arena, const Shape& s, pass which, Index ds) {
        const bool backward = which == pass::backward;
        const Index blocks = ceil_div(s.keys, block_of(s.batch * s.kv_heads, s.keys));
        const Index queries = s.batch * s.query_heads * s.queries;
        minus = arena.take<A>(backward ? queries : 0);
        dq = arena.take<A>(backward && blocks > 1 ? queries * Widths(s, ds).ld : 0);
        progress = arena.take<Index>(backward ? s.batch * s.kv_heads * blocks : 0);
    }
    /// Bytes of the scratch of one thread.
    static std::size_t bytes(const Shape& s, pass which, Index ds = 0) {
        Arena measure;
        if (which == pass::step)
            StepScratch<A>(measure, s);
        else
            TiledScratch<A>(measure, s, which, ds);
        return measure.required();
    }
};

/// The order in which key blocks of a sequence add to dq. A block counts the tiles that it is through with; for each
/// tile the next block waits until the block before it has passed that tile. Tasks are handed out in the order of their
/// blocks, so that whoever is waited for has begun.
struct Turn {
    const Index* before;  // null: no block before, nothing to wait for
    Index* own;           // null: no block behind

    void wait(Index tiles) const {
        if (!before) return;
        for (int spins = 0; __atomic_load_n(before, __ATOMIC_ACQUIRE) < tiles; ++spins)
            if (spins > 64) std::this_thread::yield();
    }
    void pass(Index tiles) const {
        if (own) __atomic_store_n(own, tiles, __ATOMIC_RELEASE);
    }
};

/// 1 / l of eq. 14; a row that read nothing is zero.
template <class A>
A normalizer(A sum) {
    return sum == A(0) ? A(0) : A(1) / sum;
}

/// Keys whose g is further than this below that of the first key of their tile are steep: exp(g[first] - g[j]) would near
/// the end of the range. What exp(g[i] - g[first]) loses by being zero below its range is decay below exp(-32), or -500.
template <class A>
inline constexpr double steepest = sizeof(A) == 8 ? 200.0 : 55.0;

/// How many keys of a tile come before the first steep one. This asks g up to that key and no further.
template <class A>
Index level_keys(const double* g, Index count) {
    Index n = 0;
    while (n < count && g[0] - g[n] <= steepest<A>) ++n;  // a NaN is steep
    return n;
}

/// Everything a task of forward or backward reads.
template <class T, class Policy>
struct TiledCall {
    using A = acc_t<T>;
    const Options& options;
    const Inputs<T>& in;
    const Outputs<T>& out;
    Shape shape;
    Isa isa;
    Policy policy;
    Upstream<T> upstream{};
    Grads<T> grads{};
    A* minus = nullptr;
    A* dq = nullptr;
    bf16* rest = nullptr;  // (B, Hq, Lq, dv): what rounding took from o, for backward; null: not kept

    A scale() const { return static_cast<A>(scale_of(options, shape.head_dim)); }
    A bias(Index h) const { return in.bias ? in.bias(h) : static_cast<A>(options.bias); }
    bool softmax() const { return options.score == Score::softmax; }
    Index channels() const {
        if constexpr (Policy::has_channels) return policy.channel_dim();
        return 0;
    }
    Widths widths() const { return Widths(shape, channels()); }
    /// Whether a pass has to go through the queries for the gradients of their side.
    bool wants_query_side() const { return static_cast<bool>(grads.q) || Policy::has_channels; }
    bool wants_key_side() const { return static_cast<bool>(grads.k) || Policy::has_channels; }

    /// Rows [first, first + count) of head h, widened.
    template <class X>
    void load(const View<X, 4>& x, Index b, Index first, Index h, Index count, A factor, A* to, Index ld) const {
        if (x.extent[3] > 0)
            simd::run_body<LoadRows<T>>(isa, static_cast<const T*>(&x(b, first, h, 0)), x.stride[1],
                                        x.stride[3], count, x.extent[3], factor, to, padded(x.extent[3]), ld);
    }
    /// Rows of queries with the scale in them, and channels behind.
    void load_queries(Index b, Index h, Index row, Index count, A* to, Index ld) const {
        if constexpr (Policy::changes_query) {
            load(in.q, b, row, h, count, A(1), to, ld);
            policy.transform(isa, b, h, row, count, to, ld);
            const A factor = scale();
            for (Index r = 0; r < count; ++r)
                for (Index d = 0; d < shape.head_dim; ++d) to[r * ld + d] *= factor;
        } else {
            load(in.q, b, row, h, count, scale(), to, ld);
        }
        if constexpr (Policy::has_channels) {
            const Widths w = widths();
            for (Index r = 0; r < count; ++r)
                for (Index d = w.channel + w.channels; d < w.ld; ++d) to[r * ld + d] = A(0);
            policy.load_c(isa, b, h, row, count, to + w.channel, ld);
        }
    }
    void load_keys(Index b, Index kv, Index row, Index count, A* to, Index ld) const {
        load(in.k, b, row, kv, count, A(1), to, ld);
        if constexpr (Policy::has_channels) {
            const Widths w = widths();
            for (Index r = 0; r < count; ++r)
                for (Index d = w.channel + w.channels; d < w.ld; ++d) to[r * ld + d] = A(0);
            policy.load_b(isa, b, kv, row, count, to + w.channel, ld);
        }
    }
    /// Rows that a product can read where they lie, as its left operand; null where they must be loaded.
    template <class X>
    const A* in_place(const View<X, 4>& x, Index b, Index row, Index h, Index& ld) const {
        if constexpr (std::is_same_v<T, A> && !Policy::has_channels)
            if (x.extent[3] > 0 && x.stride[3] == 1) {
                ld = x.stride[1];
                return &x(b, row, h, 0);
            }
        return nullptr;
    }
    /// Calls f(tile, columns, masked) for a tile, or for strips of it where a mask leaves out a part: there is less to
    /// do in each than in the whole.
    template <class F>
    static void for_each_strip(const Tile& whole, F&& f) {
        constexpr Index width = 2 * pad;
        const RowRange real = whole.active();
        if (real.begin >= real.end) return;
        const RowRange wide{real.begin / pad * pad, padded(real.end)};
        const RowRange range{wide.begin, wide.end < whole.columns ? wide.end : whole.columns};
        if (!whole.masked(range)) return f(whole, range, false);
        for (Index c = range.begin; c < range.end; c += width) {
            const Tile tile = whole.strip(c, c + width < range.end ? c + width : range.end);
            if (tile.rows > 0) f(tile, RowRange{0, tile.columns}, tile.masked({0, tile.columns}));
        }
    }
    /// Rows become columns of (ld, panel), up to whole vectors of columns; those behind `count` are zero.
    void transpose(A* rows, Index count, Index ld, A* to) const {
        for (Index x = count * ld; x < padded(count) * ld; ++x) rows[x] = A(0);
        simd::run_body<simd::Transpose<A>>(isa, static_cast<const A*>(rows), ld, padded(count), ld, to, panel, A(1));
    }
    void store(const View<T, 4>& x, Index b, Index row, Index h, Index count, const A* from, Index ld, const A* factor,
               Index factor_step) const {
        if (count > 0 && x.extent[3] > 0)
            simd::run_body<StoreRows<T>>(isa, from, ld, factor, factor_step, count, x.extent[3], &x(b, row, h, 0),
                                         x.stride[1], x.stride[3]);
    }
    static void store_zero(const View<T, 4>& x, Index b, Index begin, Index end, Index h) {
        for (Index i = begin; i < end; ++i)
            for (Index d = 0; d < x.extent[3]; ++d) x(b, i, h, d) = static_cast<T>(A(0));
    }
    /// tile[r][c] = left row r . transposed column c
    void products(const A* left, Index ld, Index dim, const A* right, RowRange columns, Index rows, A* tile) const {
        multiply(isa, left, ld, 1, right + columns.begin, panel, tile + columns.begin, tile_stride, rows,
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
    }
    void score_gradient(A* tile, A* dtile, Index rows, RowRange c, const A* lse, const A* minus_in, A head_bias) const {
        const Statistics<A> statistics{lse, minus_in};
        if (softmax())
            simd::run_body<ScoreGradient<A, Score::softmax>>(isa, tile, dtile, rows, c.begin, c.end, statistics, head_bias);
        else
            simd::run_body<ScoreGradient<A, Score::sigmoid>>(isa, tile, dtile, rows, c.begin, c.end, statistics, head_bias);
    }
    /// The tile's scores += the term of the policy.
    void add_term(const Tile& tile, Index b, Index h, RowRange c, A* scores) const {
        if constexpr (Policy::adds_term) {
            const Sequence& q = tile.sequence;
            const Cells first{b, h, q.key0, (tile.query_columns ? tile.outer : tile.inner) + q.offset(),
                              tile.query_columns ? tile.inner : tile.outer, tile.query_columns};
            simd::run_body<AddTerm<A, Policy>>(isa, scores, tile.rows, c.begin, c.end, policy, first);
        }
    }
    void decay(Index b, Index kv, Index row, Index count, double* g) const {
        if constexpr (Policy::has_channels) {
            policy.decay(b, kv, row, count, g);
            for (Index i = count; i < padded(count); ++i) g[i] = g[count - 1];
        }
    }
    /// Rows of channels times a factor each.
    void scale_channels(A* rows, Index ld, Index count, const A* factor) const {
        const Widths w = widths();
        simd::run_body<AddRows<A>>(isa, static_cast<const A*>(rows + w.channel), ld, count, padded(w.channels), factor, false,
                                   rows + w.channel, ld);
    }

    // o and lse of queries [first, last) of a sequence (eq. 13 and 14).
    void forward_piece(Index b, Index h, const Sequence& q, Index first, Index last,
                       const TiledScratch<A>& s) const {
        const Index count = last - first, kv = h / shape.group(), panels = ceil_div(count, panel);
        const Widths w = widths();
        const Index ldv = w.value_ld;
        constexpr A inf = std::numeric_limits<A>::infinity();
        for (Index p = 0; p < panels; ++p) {
            const Index row = q.query0 + first + p * panel, n = count - p * panel < panel ? count - p * panel : panel;
            load_queries(b, h, row, n, s.rows, w.ld);
            transpose(s.rows, n, w.ld, s.outer_a + p * w.ld * panel);
            if constexpr (Policy::has_channels) {
                const A* from = s.outer_a + (p * w.ld + w.channel) * panel;
                A* to = s.channels_a + p * padded(w.channels) * panel;
                for (Index x = 0; x < w.channels * panel; ++x) to[x] = from[x];
                decay(b, kv, q.key0 + q.offset() + first + p * panel, n, s.outer_g + p * panel);
            }
        }
        for (Index x = 0; x < count * ldv; ++x) s.sum_b[x] = A(0);
        for (Index i = 0; i < panels * panel; ++i) s.running.largest[i] = -inf, s.running.sum[i] = A(0);

        const Index end = q.keys_of(options, last - 1).end;
        for (Index j = q.keys_of(options, first).begin; j < end; j += inner_block) {
            const Index rows = end - j < inner_block ? end - j : inner_block;
            Index ldk = w.ld;
            const A* keys = in_place(in.k, b, q.key0 + j, kv, ldk);
            if (!keys) {
                load_keys(b, kv, q.key0 + j, rows, s.inner_a, ldk);
                keys = s.inner_a;
            }
            load(in.v, b, q.key0 + j, kv, rows, A(1), s.inner_b, ldv);
            const Index soon = end - j - rows < inner_block ? end - j - rows : inner_block;
            // Nothing that is done with a pair of a query and a key asks for tokens behind the query: outputs before a
            // token are the same bits whatever the token is.
            Index level = rows;  // keys from here on are steep: their channels are zero here and come pair by pair
            if constexpr (Policy::has_channels) {
                const Index lds = padded(w.channels);
                decay(b, kv, q.key0 + j, rows, s.inner_g);
                level = level_keys<A>(s.inner_g, rows);
                simd::run_body<DecayFactors<A>>(isa, static_cast<const double*>(s.inner_g), s.inner_g[0], -1.0, padded(rows),
                                                s.factors);
                scale_channels(s.inner_a, w.ld, level, s.factors);
                for (Index r = level; r < rows; ++r)
                    for (Index d = 0; d < lds; ++d) {
                        A& x = s.inner_a[r * w.ld + w.channel + d];
                        s.channels_b[r * lds + d] = x;
                        x = A(0);
                    }
            }
            for (Index p = 0; p < panels; ++p) {
                const Index ahead = q.key0 + j + rows;
                prefetch_rows(in.k, b, ahead + p * soon / panels, ahead + (p + 1) * soon / panels, kv);
                const Index n = count - p * panel < panel ? count - p * panel : panel;
                for_each_strip({options, q, true, first + p * panel, n, j, rows}, [&](const Tile& tile, RowRange range,
                                                                                     bool masked) {
                    // The tile may be a strip of (j, p): rows from r0 and columns from c0 on.
                    const Index r0 = tile.inner - j, c0 = tile.outer - first - p * panel;
                    const RowRange wide{range.begin, padded(range.end)};  // whole vectors
                    const A* const left = keys + r0 * ldk;
                    A* const right = s.outer_a + p * w.ld * panel + c0;
                    A* const sum = s.sum_b + (p * panel + c0) * ldv;
                    const Running<A> running{s.running.largest + p * panel + c0, s.running.sum + p * panel + c0,
                                             s.running.shrink + p * panel + c0};
                    if constexpr (Policy::has_channels) {
                        const A* from = s.channels_a + p * padded(w.channels) * panel + c0;
                        const double* g = s.outer_g + p * panel + c0;
                        // A query before the first key has a factor above 1, infinity even, but no key here.
                        simd::run_body<DecayFactors<A>>(isa, g, s.inner_g[0], 1.0, wide.end, s.factors);
                        simd::run_body<ScaleColumns<A>>(isa, from, w.channels, wide.begin, wide.end,
                                                        static_cast<const A*>(s.factors), right + w.channel * panel);
                        products(left, ldk, w.score, right, wide, tile.rows, s.tile);
                        if (r0 + tile.rows > level) {
                            const Index r = level > r0 ? level - r0 : 0, steep = tile.rows - r;
                            products(s.channels_b + (r0 + r) * padded(w.channels), padded(w.channels), w.channels, from, wide,
                                     steep, s.channel_tile);
                            simd::run_body<DecayTile<A>>(isa, s.decay_tile, steep, wide.begin, wide.end,
                                                         static_cast<const double*>(s.inner_g + r0 + r), g, true);
                            simd::run_body<MultiplyTile<A>>(isa, static_cast<const A*>(s.channel_tile),
                                                            static_cast<const A*>(s.decay_tile), steep, wide.begin, wide.end,
                                                            true, s.tile + r * tile_stride);
                        }
                    } else {
                        products(left, ldk, w.score, right, wide, tile.rows, s.tile);
                    }
                    add_term(tile, b, h, wide, s.tile);
                    if (softmax()) {
                        if (masked) tile.fill_masked(s.tile, range, -inf);
                        simd::run_body<OnlineSoftmax<A>>(isa, s.tile, tile.rows, wide.begin, wide.end, running);
                        simd::run_body<ScaleRows<A>>(isa, sum + range.begin * ldv, range.end - range.begin, ldv,
                                                     static_cast<const A*>(running.shrink + range.begin));
                    } else {
                        simd::run_body<Sigmoid<A>>(isa, s.tile, tile.rows, wide.begin, wide.end, bias(h));
                        if (masked) tile.fill_masked(s.tile, range, A(0));
                    }
                    accumulate<A>(isa, tile, range, masked, s.tile, s.inner_b + r0 * ldv, ldv, ldv, sum, ldv);
                });
                prefetch_rows(in.v, b, ahead + p * soon / panels, ahead + (p + 1) * soon / panels, kv);
            }
        }
        for (Index i = 0; i < count; ++i) {
            const A sum = s.running.sum[i];
            s.running.shrink[i] = softmax() ? normalizer(sum) : A(1);
            if (out.lse)
                out.lse(b, q.query0 + first + i, h) = sum == A(0) ? -inf : s.running.largest[i] + std::log(sum);
        }
        store(out.o, b, q.query0 + first, h, count, s.sum_b, ldv, s.running.shrink, 1);
        if constexpr (sizeof(T) == 2)
            if (rest && shape.value_dim > 0)
                simd::run_body<StoreRest<T>>(isa, static_cast<const A*>(s.sum_b), ldv, static_cast<const A*>(s.running.shrink),
                                             count, shape.value_dim, rest_of(b, h, q.query0 + first));
    }

    // delta - dlse of queries of a sequence (eq. 8).
    void delta_piece(Index b, Index h, const Sequence& q, Index first, Index last,
                     const TiledScratch<A>& s) const {
        const Index count = last - first, row = q.query0 + first;
        for (Index i = 0; i < count; ++i) s.minus[i] = A(0);
        if (shape.value_dim > 0)
            simd::run_body<DotRows<T>>(isa, static_cast<const T*>(&out.o(b, row, h, 0)), out.o.stride[1], out.o.stride[3],
                                       static_cast<const T*>(&upstream.o(b, row, h, 0)), upstream.o.stride[1],
                                       upstream.o.stride[3], count, shape.value_dim, s.minus, false);
        if constexpr (sizeof(T) == 2)
            if (rest && shape.value_dim > 0)
                simd::run_body<DotRows<T, bf16>>(isa, static_cast<const bf16*>(rest_of(b, h, row)), shape.value_dim, Index{1},
                                                 static_cast<const T*>(&upstream.o(b, row, h, 0)), upstream.o.stride[1],
                                                 upstream.o.stride[3], count, shape.value_dim, s.minus, true);
        for (Index i = 0; i < count; ++i) {
            const bool empty = out.lse(b, row + i, h) == -std::numeric_limits<A>::infinity();
            const A dlse = upstream.lse ? upstream.lse(b, row + i, h) : A(0);
            minus[(b * shape.query_heads + h) * shape.queries + row + i] = empty ? A(0) : s.minus[i] - dlse;
        }
    }

    bf16* rest_of(Index b, Index h, Index row) const {
        return rest + ((b * shape.query_heads + h) * shape.queries + row) * shape.value_dim;
    }

    /// Adds what keys [first, last) give to dq of queries [i, i + rows) (and to dC); rows whose first key lies there
    /// begin with it, and rows whose last key does are complete.
    void add_queries(Index b, Index h, const Sequence& q, Index i, Index rows, Index first, Index last,
                     const A* channel_factors, const TiledScratch<A>& s) const {
        const Widths w = widths();
        const A factor = scale();
        Index begun = rows, done = 0;  // rows [begun, rows) begin here, rows [0, done) end here
        while (begun > 0 && q.keys_of(options, i + begun - 1).begin >= first) --begun;
        while (done < rows && q.keys_of(options, i + done).end <= last) ++done;
        A* at = s.sum_q;
        Index ld = w.ld;
        if constexpr (Policy::has_channels)
            if (channel_factors) scale_channels(s.sum_q, w.ld, rows, channel_factors);
        if (begun > 0 || done < rows) {
            at = dq + ((b * shape.query_heads + h) * shape.queries + q.query0 + i) * w.ld;
            const A* none = nullptr;
            simd::run_body<AddRows<A>>(isa, static_cast<const A*>(s.sum_q), w.ld, begun, w.ld, none, true, at, ld);
            simd::run_body<AddRows<A>>(isa, static_cast<const A*>(s.sum_q + begun * w.ld), w.ld, rows - begun, w.ld, none,
                                       false, at + begun * ld, ld);
        }
        if (done == 0) return;
        const Index row = q.query0 + i;
        if constexpr (Policy::has_channels) policy.store_dc(isa, b, h, row, done, static_cast<const A*>(at + w.channel), ld);
        if (!grads.q) return;
        if constexpr (Policy::changes_query) {
            for (Index r = 0; r < done; ++r)
                for (Index d = 0; d < shape.head_dim; ++d) at[r * ld + d] *= factor;
            policy.transform_gradient(isa, b, h, row, done, at, ld);
            const A one(1);
            store(grads.q, b, row, h, done, at, ld, &one, 0);
        } else {
            store(grads.q, b, row, h, done, at, ld, &factor, 0);
        }
    }

    // What keys [first, last) of a sequence have to do with its queries: dk and dv (eq. 12 and 6), summed over the
    // query heads of the group, and their part of dq (eq. 11).
    void backward_piece(Index b, Index kv, const Sequence& q, Index first, Index last, const Turn& turn,
                        const TiledScratch<A>& s) const {
        const Index count = last - first, panels = ceil_div(count, panel);
        const Widths w = widths();
        const Index ldk = w.ld, ldv = w.value_ld;
        double reference = 0;
        bool steep = false;
        load_keys(b, kv, q.key0 + first, count, s.outer_rows, ldk);
        if constexpr (Policy::has_channels) {
            decay(b, kv, q.key0 + first, count, s.outer_g);
            reference = s.outer_g[0];
            steep = level_keys<A>(s.outer_g, count) < count;  // one steep key makes all of the block pairs: gradients may
            if (!steep) {
                simd::run_body<DecayFactors<A>>(isa, static_cast<const double*>(s.outer_g), reference, -1.0, padded(count),
                                                s.factors);
                scale_channels(s.outer_rows, ldk, count, s.factors);
            }
        }
        for (Index p = 0; p < panels; ++p) {
            const Index n = count - p * panel < panel ? count - p * panel : panel;
            const A* from = s.outer_rows + p * panel * ldk;
            for (Index x = 0; x < n * ldk; ++x) s.rows[x] = from[x];
            transpose(s.rows, n, ldk, s.outer_a + p * ldk * panel);
            load(in.v, b, q.key0 + first + p * panel, kv, n, A(1), s.rows, ldv);
            transpose(s.rows, n, ldv, s.outer_b + p * ldv * panel);
        }
        for (Index x = 0; x < count * ldk; ++x) s.sum_a[x] = A(0);
        for (Index x = 0; x < count * ldv; ++x) s.sum_b[x] = A(0);

        const Index begin = q.queries_of(options, first).begin, end = q.queries_of(options, last - 1).end;
        const Index tiles = ceil_div(q.queries, inner_block);  // of the sequence, the same for every block of keys
        for (Index g = 0; g < shape.group(); ++g) {
            const Index h = kv * shape.group() + g;
            for (Index i = begin; i < end;) {
                const Index number = i / inner_block, next = (number + 1) * inner_block < end ? (number + 1) * inner_block : end;
                const Index rows = next - i, soon = end - next < inner_block ? end - next : inner_block;
                // The scale sits in q: once for the scores and once for dk.
                load_queries(b, h, q.query0 + i, rows, s.inner_a, ldk);
                load(upstream.o, b, q.query0 + i, h, rows, A(1), s.inner_b, ldv);
                load_statistics(b, h, q, i, rows, s.lse, s.minus);
                A* query_factors = nullptr;
                if constexpr (Policy::has_channels) {
                    decay(b, kv, q.key0 + q.offset() + i, rows, s.inner_g);
                    if (!steep) {
                        query_factors = s.factors;
                        simd::run_body<DecayFactors<A>>(isa, static_cast<const double*>(s.inner_g), reference, 1.0,
                                                        padded(rows), s.factors);
                        scale_channels(s.inner_a, ldk, rows, query_factors);
                    }
                }
                if (wants_query_side())
                    for (Index x = 0; x < rows * ldk; ++x) s.sum_q[x] = A(0);
                for (Index p = 0; p < panels; ++p) {
                    const Index ahead = q.query0 + next;
                    prefetch_rows(in.q, b, ahead + p * soon / panels, ahead + (p + 1) * soon / panels, h);
                    const Index n = count - p * panel < panel ? count - p * panel : panel;
                    for_each_strip({options, q, false, first + p * panel, n, i, rows}, [&](const Tile& tile, RowRange range,
                                                                                          bool masked) {
                        // The tile may be a strip of (i, p): rows from r0 and columns from c0 on.
                        const Index r0 = tile.inner - i, c0 = tile.outer - first - p * panel, c = p * panel + c0;
                        const RowRange wide{range.begin, padded(range.end)};
                        const A* const left = s.inner_a + r0 * ldk;
                        const A* const dout = s.inner_b + r0 * ldv;
                        const A* const keys = s.outer_a + p * ldk * panel + c0;
                        const A* const k = s.outer_rows + c * ldk;
                        A* const dk = s.sum_a + c * ldk;
                        A* const dv = s.sum_b + c * ldv;
                        A* const dq_rows = s.sum_q + r0 * ldk;
                        const Index channel = w.channel, ds = padded(w.channels);
                        products(left, ldk, steep ? shape.head_dim : w.score, keys, wide, tile.rows, s.tile);
                        if constexpr (Policy::has_channels)
                            if (steep) {
                                products(left + channel, ldk, w.channels, keys + channel * panel, wide, tile.rows,
                                         s.channel_tile);
                                simd::run_body<DecayTile<A>>(isa, s.decay_tile, tile.rows, wide.begin, wide.end,
                                                             static_cast<const double*>(s.inner_g + r0),
                                                             static_cast<const double*>(s.outer_g + c), false);
                                simd::run_body<MultiplyTile<A>>(isa, static_cast<const A*>(s.channel_tile),
                                                                static_cast<const A*>(s.decay_tile), tile.rows, wide.begin,
                                                                wide.end, true, s.tile);
                            }
                        products(dout, ldv, shape.value_dim, s.outer_b + p * ldv * panel + c0, wide, tile.rows, s.dtile);
                        add_term(tile, b, h, wide, s.tile);
                        score_gradient(s.tile, s.dtile, tile.rows, wide, s.lse + r0, s.minus + r0, bias(h));
                        if (masked) {
                            tile.fill_masked(s.tile, range, A(0));
                            tile.fill_masked(s.dtile, range, A(0));
                        }
                        const Index width = steep ? channel : ldk;
                        if (grads.v) accumulate<A>(isa, tile, range, masked, s.tile, dout, ldv, ldv, dv, ldv);
                        if (wants_key_side()) accumulate<A>(isa, tile, range, masked, s.dtile, left, ldk, width, dk, ldk);
                        if (wants_query_side())
                            accumulate_rows<A>(isa, tile, range, masked, s.dtile, k, ldk, width, dq_rows, ldk);
                        if constexpr (Policy::has_channels)
                            if (steep) {
                                simd::run_body<MultiplyTile<A>>(isa, static_cast<const A*>(s.dtile),
                                                                static_cast<const A*>(s.decay_tile), tile.rows, wide.begin,
                                                                wide.end, false, s.channel_tile);
                                if (masked) tile.fill_masked(s.channel_tile, range, A(0));  // the decay may be NaN there
                                accumulate<A>(isa, tile, range, masked, s.channel_tile, left + channel, ldk, ds, dk + channel,
                                              ldk);
                                accumulate_rows<A>(isa, tile, range, masked, s.channel_tile, k + channel, ldk, ds,
                                                   dq_rows + channel, ldk);
                            }
                    });
                    prefetch_rows(upstream.o, b, ahead + p * soon / panels, ahead + (p + 1) * soon / panels, h);
                }
                if (wants_query_side()) {
                    turn.wait(g * tiles + number + 1);
                    add_queries(b, h, q, i, rows, first, last, query_factors, s);
                    turn.pass(g * tiles + number + 1);
                }
                i = next;
            }
            turn.pass((g + 1) * tiles);
        }
        const A one(1);
        if constexpr (Policy::has_channels) {
            if (!steep) {
                simd::run_body<DecayFactors<A>>(isa, static_cast<const double*>(s.outer_g), reference, -1.0, padded(count),
                                                s.factors);
                scale_channels(s.sum_a, ldk, count, s.factors);
            }
            policy.store_db(isa, b, kv, q.key0 + first, count, static_cast<const A*>(s.sum_a + w.channel), ldk);
        }
        if (grads.k) store(grads.k, b, q.key0 + first, kv, count, s.sum_a, ldk, &one, 0);
        if (grads.v) store(grads.v, b, q.key0 + first, kv, count, s.sum_b, ldv, &one, 0);
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
std::size_t tiled_shared(const Shape& s, pass which, Index ds) {
    Arena measure;
    TiledWorkspace<A>(measure, s, which, ds);
    return measure.required();
}

/// For a policy of `ds` channels.
inline std::size_t tiled_workspace_size(const cpu& exec, const Shape& s, pass which, Index ds = 0) {
    const auto size = [&](auto accumulator) {
        using A = decltype(accumulator);
        return tiled_shared<A>(s, which, ds) +
               TiledWorkspace<A>::bytes(s, which, ds) * static_cast<std::size_t>(thread_count(exec.threads));
    };
    return s.dtype == DType::f64 ? size(double{}) : size(float{});
}

/// Cuts a (batch row, head, rows) space into tasks of a block of rows and these into pieces of one
/// sequence each: piece(b, h, block, sequence, first, last, scratch), and gap(b, h, first, last) for rows that
/// belong to none. Blocks come first to last, or last to first: the longest ones should start first. A task begins
/// after all tasks of blocks before it have begun.
template <class T, class Policy, class Piece, class Gap>
void tiled_tasks(const cpu& exec, const TiledCall<T, Policy>& call, Workspace ws, pass which, Index heads, Index rows,
                 bool from_last, Piece&& piece, Gap&& gap) {
    using A = acc_t<T>;
    const Shape& s = call.shape;
    const Index lines = s.batch * heads, size = block_of(lines, rows), blocks = ceil_div(rows, size);
    const std::size_t shared = tiled_shared<A>(s, which, call.channels());
    const std::size_t each = TiledWorkspace<A>::bytes(s, which, call.channels());
    std::atomic<Index> tickets{0};  // OpenMP does not promise an order
    const auto task = [&](Index, int worker) {
        const Index t = tickets.fetch_add(1, std::memory_order_relaxed);
        Arena arena(worker_memory(ws, shared, each, worker));
        const TiledScratch<A> scratch(arena, s, which, call.channels());
        const Index b = t % lines / heads, h = t % heads, block = from_last ? blocks - 1 - t / lines : t / lines;
        const Index begin = block * size, end = begin + size < rows ? begin + size : rows;
        for_each_piece(
            s, call.in.cu_seqlens, begin, end,
            [&](const Sequence& q, Index first, Index last) { piece(b, h, block, q, first, last, scratch); },
            [&](Index first, Index last) { gap(b, h, first, last); });
    };
    parallel_for(blocks * lines, threads_for(tiled_work(s), exec.threads), task);
}

template <class T, class Policy = Plain>
void tiled_forward(const cpu& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out,
                   Workspace ws, const Policy& policy = {}, bf16* rest = nullptr) {
    using Scratch = TiledScratch<acc_t<T>>;
    TiledCall<T, Policy> call{options, in, out, shape_of(in), exec.isa, policy};
    call.rest = rest;
    const auto piece = [&](Index b, Index h, Index, const Sequence& q, Index first, Index last, const Scratch& w) {
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

template <class T, class Policy = Plain>
void tiled_backward(const cpu& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out,
                    const Upstream<T>& upstream, const Grads<T>& grads, Workspace ws, const Policy& policy = {},
                    bf16* rest = nullptr) {
    using A = acc_t<T>;
    using Scratch = TiledScratch<A>;
    TiledCall<T, Policy> call{options, in, out, shape_of(in), exec.isa, policy, upstream, grads};
    const Shape& s = call.shape;
    Arena arena(ws.data);
    const TiledWorkspace<A> shared(arena, s, pass::backward, call.channels());
    call.minus = shared.minus;
    call.dq = shared.dq;
    call.rest = rest;
    const Index blocks = ceil_div(s.keys, block_of(s.batch * s.kv_heads, s.keys));
    for (Index x = 0; x < s.batch * s.kv_heads * blocks; ++x) shared.progress[x] = 0;

    // Rows that belong to no sequence are zero. (Every other query reads a key.)
    const auto delta = [&](Index b, Index h, Index, const Sequence& q, Index first, Index last, const Scratch& w) {
        if (call.softmax()) call.delta_piece(b, h, q, first, last, w);
    };
    const auto zero_q = [&](Index b, Index h, Index first, Index last) {
        if (grads.q) call.store_zero(grads.q, b, first, last, h);
    };
    const auto keys = [&](Index b, Index kv, Index block, const Sequence& q, Index first, Index last, const Scratch& w) {
        Index* own = shared.progress + (b * s.kv_heads + kv) * blocks + block;
        call.backward_piece(b, kv, q, first, last,
                            Turn{first > 0 ? own - 1 : nullptr, last < q.keys ? own : nullptr}, w);
    };
    const auto zero_kv = [&](Index b, Index kv, Index first, Index last) {
        if (grads.k) call.store_zero(grads.k, b, first, last, kv);
        if (grads.v) call.store_zero(grads.v, b, first, last, kv);
    };
    if (call.wants_query_side() || call.wants_key_side())
        tiled_tasks(exec, call, ws, pass::backward, s.query_heads, s.queries, false, delta, zero_q);
    tiled_tasks(exec, call, ws, pass::backward, s.kv_heads, s.keys, false, keys, zero_kv);
}

/// Scores that a step reads, over all batch rows and query heads.
inline double step_scores(const Options& options, const Shape& s, const CacheRows& rows) {
    double sum = 0.0;
    for (Index b = 0; b < s.batch && s.queries > 0; ++b) {
        const Index length = rows.length_of(b);
        sum += static_cast<double>(length + s.queries - keys_read(options, length, length + s.queries).begin);
    }
    return sum * static_cast<double>(s.query_heads * s.queries);
}

/// Rows `first` and on of sequence b, in the accumulator's dtype and filled up with zeros, `ld` apart.
template <class T>
void load_cached(Isa isa, const CacheRows& rows, const View<T, 4>& x, Index b, Index first, Index h, Index count, acc_t<T>* to, Index ld) {
    const Index dim = x.extent[3];
    for (Index done = 0; done < count && dim > 0;) {
        const Index run = rows.run_at(first + done), some = run < count - done ? run : count - done;
        const CacheRows::Place at = rows.place(b, first + done);
        simd::run_body<LoadRows<T>>(isa, static_cast<const T*>(&x(at.batch, at.row, h, 0)), x.stride[1], x.stride[3], some, dim,
                                    acc_t<T>(1), to + done * ld, padded(dim), ld);
        done += some;
    }
}
/// The same, where they are if they are already what the kernel reads.
template <class T>
const acc_t<T>* rows_of_cache(Isa isa, const CacheRows& rows, const View<T, 4>& x, Index b, Index first, Index h, Index count,
                              acc_t<T>* copy, Index& ld) {
    if constexpr (std::is_same_v<T, acc_t<T>>)
        if (x.stride[3] == 1 && x.extent[3] > 0 && x.extent[3] % pad == 0 && rows.run_at(first) >= count) {
            const CacheRows::Place at = rows.place(b, first);
            ld = x.stride[1];
            return &x(at.batch, at.row, h, 0);
        }
    load_cached(isa, rows, x, b, first, h, count, copy, ld);
    return copy;
}

/// What the queries of a token, `heads` of them, add to their sums from keys [begin, end) of a tile whose first key is `first`.
template <class A>
void step_tile(Isa isa, Score score, const A* q, Index heads, Index ldq, const A* k, Index ldk, const A* v, Index ldv, Index first,
               RowRange keys, A* scores, const A* bias, Running<A> running, A* sum, Index ld_sum) {
    const Index count = keys.end - keys.begin, skip = keys.begin - first;
    k += skip * ldk;
    v += skip * ldv;
    if (score == Score::softmax) {
        simd::run_body<StepScores<A, Score::softmax>>(isa, q, heads, ldq, k, ldk, count, scores, bias, running);
        simd::run_body<ScaleRows<A>>(isa, sum, heads, ld_sum, static_cast<const A*>(running.shrink));
    } else {
        simd::run_body<StepScores<A, Score::sigmoid>>(isa, q, heads, ldq, k, ldk, count, scores, bias, running);
    }
    multiply<A>(isa, scores, inner_block, 1, v, ldv, sum, ld_sum, heads, ld_sum, count, true);
}

/// o and lse of a row of sums.
template <class T>
void finish_step(const View<T, 4>& o, const View<acc_t<T>, 3>& lse, Score score, Index b, Index i, Index h, const acc_t<T>* sum, Index dim,
                 const Running<acc_t<T>>& running, Index row) {
    using A = acc_t<T>;
    const A l = running.sum[row], factor = score == Score::softmax ? normalizer(l) : A(1);
    for (Index d = 0; d < dim; ++d) o(b, i, h, d) = static_cast<T>(sum[d] * factor);
    if (lse) lse(b, i, h) = l == A(0) ? -std::numeric_limits<A>::infinity() : running.largest[row] + std::log(l);
}

/// Decoding: every key/value head of every batch row is a task, which reads its cache once for all
/// query heads of the group and all tokens.
template <class T>
void cached_step(const cpu& exec, const Options& options, const State<T>& state, const Tokens<T>& tokens,
                 const TokensOut<T>& out, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(state, tokens);
    const CacheRows rows = cache_rows(state);
    const Isa isa = exec.isa;
    const Index group = s.group();
    const Index ldk = padded(s.head_dim), ldv = padded(s.value_dim);
    const A scale = static_cast<A>(scale_of(options, s.head_dim));
    const std::size_t each = TiledWorkspace<A>::bytes(s, pass::step);
    const double work = step_scores(options, s, rows) * static_cast<double>(s.head_dim + s.value_dim);

    parallel_for(s.batch * s.kv_heads, threads_for(work, exec.threads), [&](Index task, int worker) {
        const Index b = task / s.kv_heads, kv = task % s.kv_heads, length = rows.length_of(b), end = length + s.queries;
        Arena arena(worker_memory(ws, 0, each, worker));
        const StepScratch<A> w(arena, s);
        for (Index i = 0; i < s.queries; ++i) {
            const CacheRows::Place at = rows.place(b, length + i);
            for (Index d = 0; d < s.head_dim; ++d) state.k(at.batch, at.row, kv, d) = tokens.k(b, i, kv, d);
            for (Index d = 0; d < s.value_dim; ++d) state.v(at.batch, at.row, kv, d) = tokens.v(b, i, kv, d);
            for (Index n = 0; n < group; ++n) {
                const Index h = kv * group + n, row = i * group + n;
                for (Index d = 0; d < ldk; ++d)
                    w.q[row * ldk + d] = d < s.head_dim ? scale * static_cast<A>(tokens.q(b, i, h, d)) : A(0);
                for (Index d = 0; d < ldv; ++d) w.sum[row * ldv + d] = A(0);
                w.bias[row] = tokens.bias ? tokens.bias(h) : static_cast<A>(options.bias);
                w.running.largest[row] = -std::numeric_limits<A>::infinity();
                w.running.sum[row] = A(0);
            }
        }
        for (Index j = s.queries > 0 ? keys_read(options, length, end).begin : end; j < end; j += inner_block) {
            const Index count = end - j < inner_block ? end - j : inner_block;
            Index k_stride = ldk, v_stride = ldv;
            const A* k = rows_of_cache(isa, rows, state.k, b, j, kv, count, w.k, k_stride);
            const A* v = rows_of_cache(isa, rows, state.v, b, j, kv, count, w.v, v_stride);
            for (Index i = 0; i < s.queries; ++i) {
                const RowRange read = keys_read(options, length + i, end);  // eq. 5
                const RowRange keys{read.begin > j ? read.begin : j, read.end < j + count ? read.end : j + count};
                const Index row = i * group;
                if (keys.begin < keys.end)
                    step_tile(isa, options.score, static_cast<const A*>(w.q + row * ldk), group, ldk, k, k_stride, v, v_stride, j,
                              keys, w.scores, static_cast<const A*>(w.bias + row), w.running.from(row), w.sum + row * ldv, ldv);
            }
        }
        for (Index i = 0; i < s.queries; ++i)
            for (Index n = 0; n < group; ++n)
                finish_step(out.o, out.lse, options.score, b, i, kv * group + n, w.sum + (i * group + n) * ldv, s.value_dim,
                            w.running, i * group + n);
    });
}

}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
