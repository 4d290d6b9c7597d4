// Routing and filtering of attention heads on the CPU. Equations: docs/ops/sd_decomposition.md.
//
// A head is a task, which knows nothing of threads: the same bits for any number of them. Its steps, all in the
// accumulator's dtype but the last:
//   - columns' magnitudes, and with them their scales (eq. 7);
//   - T: rows of [Q' K'] come in blocks, which reflections merge into the triangle of the rows before, 16 columns at a
//     time, the others by products (compact WY form);
//   - M = Tq Tk^T, and from it and its transpose S and F (eq. 6), each
//   - reduced to a tridiagonal matrix by reflections, from the last row up. Only the lower triangle is kept, and in whole
//     vectors. The update by one reflection and the product with the next one are one walk over it;
//   - whose singular values are found in float64 (cpu_spectrum.hpp).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>

#include <interstate/cpu/gemm.hpp>
#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>
#include <interstate/dispatch.hpp>
#include <sd_decomposition/detail/cpu_spectrum.hpp>
#include <sd_decomposition/detail/outputs.hpp>
#include <sd_decomposition/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition::detail {

inline constexpr Index pad = 16;           // lanes of the widest vector, and columns of a panel
inline constexpr Index block_rows = 128;   // of [Q K] that are merged into T at a time

constexpr Index padded(Index n) { return ceil_div(n, pad) * pad; }
/// Elements from row to row: an odd multiple of the padding, so that a column visits every cache set.
constexpr Index stride_of(Index columns) { return pad * (ceil_div(columns, pad) | 1); }

// ---- Leaf bodies -----------------------------------------------------------------------------------

/// dst[r][c] = src[r][c] root[c]^2 for c in [0, columns), rows of dst `ld` apart.
template <class T>
struct LoadRows {
    using A = acc_t<T>;
    template <class Set>
    static INTERSTATE_INLINE void run(const T* src, Index row_stride, Index step, Index rows, Index columns, const A* root, A* dst,
                                      Index ld) {
        using V = simd::Native<Set, A>;
        const Index whole = step == 1 ? columns / V::lanes * V::lanes : 0;
        for (Index r = 0; r < rows; ++r) {
            const T* from = src + r * row_stride;
            A* to = dst + r * ld;
            for (Index c = 0; c < whole; c += V::lanes) {
                const V scale = simd::load<V>(root + c);
                simd::store(to + c, simd::load_as<V>(from + c) * scale * scale);
            }
            for (Index c = whole; c < columns; ++c) to[c] = static_cast<A>(from[c * step]) * root[c] * root[c];
        }
    }
};

/// Takes rows of x into the largest magnitudes and the sums of squares of its columns, a multiple of the padding. The
/// maxima pass over NaN, the sums keep it.
template <class A>
struct MeasureColumns {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* x, Index ld, Index rows, Index columns, A* largest, A* squares) {
        using V = simd::Native<Set, A>;
        const V zero = simd::broadcast<V>(A(0));
        for (Index c = 0; c < columns; c += V::lanes) {
            V most = simd::load<V>(largest + c), sum = simd::load<V>(squares + c);
            for (Index r = 0; r < rows; ++r) {
                const V e = simd::load<V>(x + r * ld + c);
                most = simd::max(simd::max(e, zero - e), most);
                sum = simd::fma(e, e, sum);
            }
            simd::store(largest + c, most);
            simd::store(squares + c, sum);
        }
    }
};

/// The reflections of 16 columns: block (rows, 16) below the triangle `top` (16, 16), of which elements are taken away.
/// The vectors stay in the block, one in each column, unscaled, their first elements in `heads`; t (16, 16) is minus the
/// triangle of the compact WY form: the product of all reflections is 1 + V t^T V^T.
template <class A>
struct FactorPanel {
    /// row -= x w for all rows, x the element in column j; sums becomes sum_r row[next] row.
    template <class V>
    static INTERSTATE_INLINE void walk(A* block, Index ld, Index rows, Index j, Index next, const A* w, A* sums) {
        constexpr int vecs = static_cast<int>(pad) / V::lanes;
        V along[vecs], sum[2][vecs];
        INTERSTATE_UNROLL
        for (int n = 0; n < vecs; ++n) {
            along[n] = simd::load<V>(w + n * V::lanes);
            sum[0][n] = sum[1][n] = simd::broadcast<V>(A(0));
        }
        for (Index r = 0; r < rows; r += 2) {
            INTERSTATE_UNROLL
            for (int k = 0; k < 2; ++k) {  // two chains of sums
                if (r + k >= rows) continue;
                A* row = block + (r + k) * ld;
                const V x = simd::broadcast<V>(row[j]), head = simd::broadcast<V>(row[next] - row[j] * w[next]);
                INTERSTATE_UNROLL
                for (int n = 0; n < vecs; ++n) {
                    const V e = simd::fnma(x, along[n], simd::load<V>(row + n * V::lanes));
                    simd::store(row + n * V::lanes, e);
                    sum[k][n] = simd::fma(head, e, sum[k][n]);
                }
            }
        }
        INTERSTATE_UNROLL
        for (int n = 0; n < vecs; ++n) simd::store(sums + n * V::lanes, sum[0][n] + sum[1][n]);
    }
    template <class Set>
    static INTERSTATE_INLINE void run(A* block, Index rows, A* top, Index ld, A* heads, A* t) {
        using V = simd::Native<Set, A>;
        A w[pad] = {}, sums[pad];
        for (Index i = 0; i < pad * pad; ++i) t[i] = A(0);
        walk<V>(block, ld, rows, 0, 0, w, sums);
        for (Index j = 0; j < pad; ++j) {
            A* row = top + j * ld;
            const A head = row[j], square = head * head + sums[j], norm = std::sqrt(square);
            heads[j] = A(0);
            for (Index c = 0; c < pad; ++c) w[c] = A(0);
            if (sums[j] > A(0) && square > nothing<A>) {
                const A first = head > A(0) ? head + norm : head - norm;
                const A weight = A(1) / (norm * (norm + std::abs(head)));  // 2 / v.v
                heads[j] = first;
                row[j] = head - first;
                for (Index c = j + 1; c < pad; ++c) {
                    w[c] = (first * row[c] + sums[c]) * weight;
                    row[c] -= first * w[c];
                }
                for (Index i = 0; i < j; ++i) {
                    A dot = A(0);
                    for (Index k = i; k < j; ++k) dot += t[i * pad + k] * sums[k];
                    t[i * pad + j] = -weight * dot;
                }
                t[j * pad + j] = -weight;
            }
            if (j + 1 < pad) walk<V>(block, ld, rows, j, j + 1, w, sums);
        }
    }
};

/// dst[r] += factors[r] src[r], 16 rows; columns a multiple of the padding.
template <class A>
struct AddScaledRows {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* factors, const A* src, A* dst, Index ld, Index columns) {
        using V = simd::Native<Set, A>;
        for (Index r = 0; r < pad; ++r)
            for (Index c = 0; c < columns; c += V::lanes)
                simd::store(dst + r * ld + c, simd::fma(simd::broadcast<V>(factors[r]), simd::load<V>(src + r * ld + c),
                                                        simd::load<V>(dst + r * ld + c)));
    }
};

/// part = factor (m + sign m^T) for n rows, a multiple of the padding; *squares is the sum of its squares.
template <class A>
struct FormPart {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* m, const A* transposed, Index ld, Index n, A sign, A factor, A* part, double* squares) {
        using V = simd::Native<Set, A>;
        const V signs = simd::broadcast<V>(sign), factors = simd::broadcast<V>(factor);
        *squares = 0.0;
        for (Index r = 0; r < n; ++r) {
            V sum = simd::broadcast<V>(A(0));
            for (Index c = 0; c < n; c += V::lanes) {
                const V x = simd::fma(signs, simd::load<V>(transposed + r * ld + c), simd::load<V>(m + r * ld + c)) * factors;
                simd::store(part + r * ld + c, x);
                sum = simd::fma(x, x, sum);
            }
            *squares += static_cast<double>(simd::reduce_add(sum));
        }
    }
};

/// Vectors of the reduction, (n padded) each.
template <class A>
struct Reflections {
    A *v, *w;  // of the reflection that the matrix is still to be updated by
    A* u;      // the next one
    A* p;      // matrix times u
};

/// x (n, n), symmetric for sign = 1 and skew-symmetric for -1, becomes tridiagonal: diagonal (n), and off (n - 1) to its
/// left in rows from 1 on. Rows and columns are there up to a multiple of the padding.
///
/// A reflection 1 - g u u^T takes x to x - sign u w^T - w u^T, w = g p - (g^2 p.u / 2) u, p = x u; p.u = 0 where x is skew.
template <class A>
struct Tridiagonalize {
    /// Rows [i, i + V::lanes) of the matrix: the update by v and w, and their share of p.
    template <int Rows, class V>
    static INTERSTATE_INLINE void rows_at(A* x, Index ld, Index i, A sign, const Reflections<A>& f) {
        V dots[V::lanes];
        for (Index k0 = 0; k0 < V::lanes; k0 += Rows) {
            A* row[Rows];
            V v[Rows], w[Rows], u[Rows], dot[Rows];
            INTERSTATE_UNROLL
            for (int k = 0; k < Rows; ++k) {
                row[k] = x + (i + k0 + k) * ld;
                v[k] = simd::broadcast<V>(sign * f.v[i + k0 + k]);
                w[k] = simd::broadcast<V>(f.w[i + k0 + k]);
                u[k] = simd::broadcast<V>(sign * f.u[i + k0 + k]);
                dot[k] = simd::broadcast<V>(A(0));
            }
            for (Index c = 0; c < i; c += V::lanes) {
                const V vc = simd::load<V>(f.v + c), wc = simd::load<V>(f.w + c), uc = simd::load<V>(f.u + c);
                V pc = simd::load<V>(f.p + c);
                INTERSTATE_UNROLL
                for (int k = 0; k < Rows; ++k) {
                    const V e = simd::fnma(w[k], vc, simd::fnma(v[k], wc, simd::load<V>(row[k] + c)));
                    simd::store(row[k] + c, e);
                    dot[k] = simd::fma(e, uc, dot[k]);
                    pc = simd::fma(e, u[k], pc);  // for the triangle that is not kept
                }
                simd::store(f.p + c, pc);
            }
            const V vc = simd::load<V>(f.v + i), wc = simd::load<V>(f.w + i), uc = simd::load<V>(f.u + i);
            INTERSTATE_UNROLL
            for (int k = 0; k < Rows; ++k) {  // squares on the diagonal are kept whole
                const V e = simd::fnma(w[k], vc, simd::fnma(v[k], wc, simd::load<V>(row[k] + i)));
                simd::store(row[k] + i, e);
                dots[k0 + k] = simd::fma(e, uc, dot[k]);
            }
        }
        simd::store(f.p + i, simd::load<V>(f.p + i) + simd::reduce_add_each(dots));
    }
    template <class Set>
    static INTERSTATE_INLINE void run(A* x, Index ld, Index n, A sign, Reflections<A> f, double* diagonal, double* off) {
        using V = simd::Native<Set, A>;
        constexpr int rows = Set::registers >= 32 ? 4 : 2;
        const V zero = simd::broadcast<V>(A(0));
        for (Index c = 0; c < padded(n); c += V::lanes) {
            simd::store(f.v + c, zero);
            simd::store(f.w + c, zero);
        }
        for (Index r = n - 1; r >= 0; --r) {
            const Index end = ceil_div(r + 1, V::lanes) * V::lanes;
            const V vr = simd::broadcast<V>(sign * f.v[r]), wr = simd::broadcast<V>(f.w[r]);
            for (Index c = 0; c < end; c += V::lanes) {
                simd::store(f.u + c, simd::fnma(wr, simd::load<V>(f.v + c),
                                                simd::fnma(vr, simd::load<V>(f.w + c), simd::load<V>(x + r * ld + c))));
                simd::store(f.p + c, zero);
            }
            diagonal[r] = static_cast<double>(f.u[r]);
            if (r == 0) return;
            const A head = f.u[r - 1];
            for (Index c = r - 1; c < end; ++c) f.u[c] = A(0);
            V sum = zero;
            for (Index c = 0; c < end; c += V::lanes) sum = simd::fma(simd::load<V>(f.u + c), simd::load<V>(f.u + c), sum);
            const A rest = simd::reduce_add(sum), square = head * head + rest, norm = std::sqrt(square);
            A weight = A(0), first = A(0);
            if (rest > A(0) && square > nothing<A>) {
                first = head > A(0) ? head + norm : head - norm;
                weight = A(1) / (norm * (norm + std::abs(head)));  // 2 / u.u
            }
            f.u[r - 1] = first;
            off[r - 1] = static_cast<double>(head - first);

            for (Index i = 0; i < r; i += V::lanes) rows_at<rows, V>(x, ld, i, sign, f);
            for (Index c = r; c < end; ++c) f.p[c] = A(0);  // of the rows that are done
            V along = zero;
            for (Index c = 0; c < end && sign > A(0); c += V::lanes)
                along = simd::fma(simd::load<V>(f.p + c), simd::load<V>(f.u + c), along);
            const V g = simd::broadcast<V>(weight);
            const V half = simd::broadcast<V>(A(0.5) * weight * (weight * simd::reduce_add(along)));
            for (Index c = 0; c < end; c += V::lanes)
                simd::store(f.w + c, simd::fnma(half, simd::load<V>(f.u + c), g * simd::load<V>(f.p + c)));
            std::swap(f.u, f.v);
        }
    }
};

// ---- A head ----------------------------------------------------------------------------------------

/// Scratch of one worker.
template <class A>
struct Scratch {
    Index n, ld, ldm;  // n = min(L, 2d); rows of block and t, rows of m are that far apart
    double* magnitudes;           // (2d)
    A *largest, *squares, *root;  // (ld) each, of columns
    A* block;                     // (block_rows, ld); nothing where L <= 2d
    A* t;                         // (n padded, ld): T of eq. 6
    A *heads, *wy;                // (16), (16, 16)
    A *w, *wt;                    // (16, ld) each
    A *m, *transposed, *part;     // (n padded, ldm) each
    A* keys;                      // (d padded, ldm): Tk^T
    Reflections<A> reflections;
    double *diagonal, *off, *values;  // (n) each
    SpectrumScratch spectrum;

    Scratch(Arena arena, const Shape& s) : Scratch(arena, s, 0) {}
    static std::size_t bytes(const Shape& s) {
        Arena arena;
        Scratch(arena, s, 0);
        return arena.required();
    }

  private:
    Scratch(Arena& arena, const Shape& s, int)
        : n(s.values()),
          ld(stride_of(s.head_dim + padded(s.head_dim))),
          ldm(stride_of(n)),
          magnitudes(arena.take<double>(2 * s.head_dim)),
          largest(arena.take<A>(std::max(ld, ldm))),
          squares(arena.take<A>(std::max(ld, ldm))),
          root(arena.take<A>(ld)),
          block(arena.take<A>(area(block_rows, ld))),
          t(arena.take<A>(area(padded(2 * s.head_dim), ld))),
          heads(arena.take<A>(pad)),
          wy(arena.take<A>(pad * pad)),
          w(arena.take<A>(area(pad, ld))),
          wt(arena.take<A>(area(pad, ld))),
          m(arena.take<A>(area(padded(n), ldm))),
          transposed(arena.take<A>(area(padded(n), ldm))),
          part(arena.take<A>(area(padded(n), ldm))),
          keys(arena.take<A>(area(padded(s.head_dim), ldm))),
          reflections{arena.take<A>(padded(n)), arena.take<A>(padded(n)), arena.take<A>(padded(n)), arena.take<A>(padded(n))},
          diagonal(arena.take<double>(n)),
          off(arena.take<double>(n)),
          values(arena.take<double>(n)),
          spectrum(arena, n) {}
};

template <class A>
void multiply(Isa isa, const A* a, Index a_row, Index a_col, const A* b, Index ldb, A* c, Index ldc, Index M, Index N, Index K,
              bool add) {
    using G = simd::Gemm<A>;
    simd::run_body<G>(isa, typename G::Args{a, a_row, a_col, b, ldb, c, ldc, M, N, K, add});
}

/// One head of the inputs.
template <class T>
struct Head {
    const T *q, *k;
    Index q_row, q_step, k_row, k_step, d;

    Head(const Inputs<T>& in, Index b, Index h, Index kv)
        : q(in.Q.data + b * in.Q.stride[0] + h * in.Q.stride[2]),
          k(in.K.data + b * in.K.stride[0] + kv * in.K.stride[2]),
          q_row(in.Q.stride[1]), q_step(in.Q.stride[3]), k_row(in.K.stride[1]), k_step(in.K.stride[3]), d(in.Q.extent[3]) {}

    /// Rows [first, first + rows) of [Q' K'] (eq. 7).
    void load(Isa isa, Index first, Index rows, const acc_t<T>* root, acc_t<T>* dst, Index ld) const {
        simd::run_body<LoadRows<T>>(isa, q + first * q_row, q_row, q_step, rows, d, root, dst, ld);
        simd::run_body<LoadRows<T>>(isa, k + first * k_row, k_row, k_step, rows, d, root + d, dst + d, ld);
    }
};

/// Merges rows of x into the triangle t of those before them; columns a multiple of the padding. x is used up.
template <class A>
void merge_rows(Isa isa, const Scratch<A>& x, Index rows, Index columns) {
    for (Index j = 0; j < columns; j += pad) {
        A *vectors = x.block + j, *top = x.t + j * x.ld + j;
        simd::run_body<FactorPanel<A>>(isa, vectors, rows, top, x.ld, x.heads, x.wy);
        const Index rest = columns - j - pad;
        if (rest == 0) return;
        multiply(isa, vectors, 1, x.ld, vectors + pad, x.ld, x.w, x.ld, pad, rest, rows, false);
        simd::run_body<AddScaledRows<A>>(isa, x.heads, top + pad, x.w, x.ld, rest);
        multiply(isa, x.wy, 1, pad, x.w, x.ld, x.wt, x.ld, pad, rest, pad, false);
        simd::run_body<AddScaledRows<A>>(isa, x.heads, x.wt, top + pad, x.ld, rest);
        multiply(isa, vectors, x.ld, 1, x.wt, x.ld, vectors + pad, x.ld, rows, rest, pad, true);
    }
}

template <class T>
void cpu_head(Isa isa, const Options& options, const Inputs<T>& in, const Outputs<T>& out, const Shape& s, Index b, Index h,
              const Scratch<acc_t<T>>& x) {
    using A = acc_t<T>;
    const Index L = s.length, d = s.head_dim, n = x.n, columns = padded(2 * d), rows = padded(n);
    if (n == 0) {
        write_norms(out, b, h, 0.0, 0.0, {1.0, 0});
        write_spectrum(routing_of(out), b, h, x.values, n, {1.0, 0});
        return write_spectrum(filtering_of(out), b, h, x.values, n, {1.0, 0});
    }
    const Head<T> head(in, b, h, h / s.group());
    const auto measure = [&](const A* matrix, Index ld, Index count, Index width) {
        simd::run_body<MeasureColumns<A>>(isa, matrix, ld, count, width, x.largest, x.squares);
    };
    const auto forget = [&](Index width) {
        std::fill(x.largest, x.largest + width, A(0));
        std::fill(x.squares, x.squares + width, A(0));
    };

    // Padding is zero, and stays so.
    std::fill(x.block, x.block + block_rows * x.ld, A(0));
    std::fill(x.t, x.t + columns * x.ld, A(0));
    std::fill(x.root, x.root + x.ld, A(1));
    forget(columns);
    for (Index first = 0; first < L; first += block_rows) {
        const Index count = std::min(block_rows, L - first);
        head.load(isa, first, count, x.root, x.block, x.ld);
        measure(x.block, x.ld, count, columns);
    }
    for (Index c = 0; c < 2 * d; ++c) {
        if (!std::isfinite(x.largest[c]) || std::isnan(x.squares[c])) return write_nan(out, b, h, x.values, n);
        x.magnitudes[c] = static_cast<double>(x.largest[c]);
    }
    const Factor factor = factor_of(scale_of(options, d), balance(x.magnitudes, d));
    for (Index c = 0; c < 2 * d; ++c) x.root[c] = static_cast<A>(x.magnitudes[c]);

    const bool tall = L > 2 * d;
    if (!tall) head.load(isa, 0, L, x.root, x.t, x.ld);
    for (Index first = 0; tall && first < L; first += block_rows) {
        const Index count = std::min(block_rows, L - first);
        head.load(isa, first, count, x.root, x.block, x.ld);
        merge_rows(isa, x, count, columns);
    }
    forget(columns);
    measure(x.t, x.ld, n, columns);
    double terms = 0.0;  // eq. 8
    for (Index c = 0; c < d; ++c) terms += static_cast<double>(x.squares[c]) * static_cast<double>(x.squares[d + c]);
    terms = std::sqrt(terms);

    // M, whose rows from d on are zero where Tq is a triangle; and its transpose.
    const Index top = tall ? d : n;
    const auto transpose = [&](const A* from, Index ld, Index height, Index width, A* to) {
        simd::run_body<simd::Transpose<A>>(isa, from, ld, height, width, to, x.ldm, A(1));
    };
    transpose(x.t + d, x.ld, rows, padded(d), x.keys);
    multiply(isa, x.t, x.ld, 1, x.keys, x.ldm, x.m, x.ldm, top, rows, d, false);
    std::fill(x.m + top * x.ldm, x.m + rows * x.ldm, A(0));
    transpose(x.m, x.ldm, rows, rows, x.transposed);
    forget(rows);
    measure(x.m, x.ldm, top, rows);
    const A largest = *std::max_element(x.largest, x.largest + rows);
    // The parts are scaled once more: Q' K'^T may be small by cancellation.
    const int shift = largest > A(0) ? std::clamp(std::ilogb(largest), -100, 100) : 0;
    const Factor part_factor{factor.fraction, factor.exponent + shift};

    double norms[2];
    for (const int part : {0, 1}) {
        const A sign = part == 0 ? A(-1) : A(1);
        const PartOutputs<T> outputs = part == 0 ? routing_of(out) : filtering_of(out);
        simd::run_body<FormPart<A>>(isa, x.m, x.transposed, x.ldm, rows, sign,
                                    static_cast<A>(std::ldexp(0.5, -shift)), x.part, &norms[part]);
        norms[part] = part_norm(std::sqrt(norms[part]), std::ldexp(terms, -shift), n,
                                static_cast<double>(std::numeric_limits<A>::epsilon()));
        if (!outputs.want_spectrum()) continue;
        std::fill(x.values, x.values + n, 0.0);
        if (norms[part] > 0.0) {
            simd::run_body<Tridiagonalize<A>>(isa, x.part, x.ldm, n, sign, x.reflections, x.diagonal, x.off);
            if (part == 0)
                simd::run_body<SkewSpectrum>(isa, x.off, n, x.spectrum, x.values);
            else
                simd::run_body<SymmetricSpectrum>(isa, x.diagonal, x.off, n, x.spectrum, x.values);
        }
        write_spectrum(outputs, b, h, x.values, n, part_factor);
    }
    write_norms(out, b, h, norms[0], norms[1], part_factor);
}

inline Index workers(const cpu& exec, const Shape& s) {
    return std::min<Index>(s.batch * s.query_heads, thread_count(exec.threads));
}

template <class T>
void cpu_forward(const cpu& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Workspace ws) {
    const Shape s = shape_of(in);
    const std::size_t bytes = Scratch<acc_t<T>>::bytes(s);
    parallel_for(s.batch * s.query_heads, exec.threads, [&](Index task, int worker) {
        const Scratch<acc_t<T>> scratch(Arena(static_cast<std::byte*>(ws.data) + static_cast<std::size_t>(worker) * bytes), s);
        cpu_head(exec.isa, options, in, out, s, task / s.query_heads, task % s.query_heads, scratch);
    });
}

}  // namespace sd_decomposition::detail
}  // namespace interstate::inline INTERSTATE_ABI
