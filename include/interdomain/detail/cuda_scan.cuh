// Interdomain Attention on the GPU as its page of equations reads: token by token, everything in float64 whatever the
// storage. One block runs a key/value head through its recurrences. For truth, and for every size and stride.
//
// Backward keeps a state every scan_stretch tokens, runs a stretch again to keep one every scan_piece tokens, and a
// piece again to have the state of each: 3 runs, and memory of one state per scan_stretch tokens beside a fixed number
// a block. Gradients of parameters are added up by each block, then over blocks in order by a second kernel.
#pragma once

#include <algorithm>

#include <interdomain/detail/cuda_block.cuh>
#include <interstate/cuda/sequences.cuh>
#include <interstate/dispatch.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail {

inline constexpr Index scan_stretch = 256, scan_piece = 16;

/// Blocks a key/value head: each takes every scan_parts-th recurrence.
inline Index scan_parts(const Shape& s) {
    return std::max<Index>(std::min(ceil_div(528, std::max<Index>(s.kv_heads, 1)), s.states()), 1);
}

/// States that backward keeps in memory, a key/value head: every recurrence starts a new stretch, and `scan_slot` is
/// that of its first. Packed, some stay unused.
INTERSTATE_HD inline Index scan_slots(const Shape& s) {
    return s.packed() ? s.length / scan_stretch + s.sequences : s.batch * ceil_div(s.length, scan_stretch);
}
INTERSTATE_HD inline Index scan_slot(const Shape& s, Index i, Index begin) {
    return s.packed() ? begin / scan_stretch + i : i * ceil_div(s.length, scan_stretch);
}

/// What one block works in.
struct ScanScratch {
    Index modes, width;           // width: columns of a state: keys, values, and ones where there is a normaliser
    Index complexes = 0, reals = 0;
    c64 *Lam, *Bbar;              // (M)
    c64* x;                       // (M, width)
    c64 *a, *s, *w;               // (queries, M), eq. 8
    double* z;                    // (2, width)
    double* q;                    // (queries, R)
    double* read;                 // (queries, d + 1): numerators, denominator
    // backward
    c64 *coarse, *fine;           // states before each piece of a stretch; before and after the tokens of a piece
    c64* y;                       // (M, width), adjoint of the state
    c64 *e, *sg, *p;              // (queries, M), eq. 9
    c64 *dLam, *dBbar, *dC;       // conjugated: (M), (M), (M, M)
    double* up;                   // (queries, d + 1), eq. 11

    INTERSTATE_HD ScanScratch(const Options& options, const Shape& shape, bool backward, c64* c, double* r)
        : modes(shape.modes), width(shape.columns() + (options.normalized() ? 1 : 0)) {
        const Index M = modes, state = M * width, queries = shape.group(), outputs = shape.value_dim + 1;
        const Index back = backward ? 1 : 0;
        Lam = take(c, complexes, M);
        Bbar = take(c, complexes, M);
        x = take(c, complexes, state);
        a = take(c, complexes, queries * M);
        s = take(c, complexes, queries * M);
        w = take(c, complexes, queries * M);
        coarse = take(c, complexes, back * scan_stretch / scan_piece * state);
        fine = take(c, complexes, back * (scan_piece + 1) * state);
        y = take(c, complexes, back * state);
        e = take(c, complexes, back * queries * M);
        sg = take(c, complexes, back * queries * M);
        p = take(c, complexes, back * queries * M);
        dLam = take(c, complexes, back * M);
        dBbar = take(c, complexes, back * M);
        dC = take(c, complexes, back * M * M);
        z = take(r, reals, 2 * width);
        q = take(r, reals, queries * shape.features);
        read = take(r, reals, queries * outputs);
        up = take(r, reals, back * queries * outputs);
    }

  private:
    template <class E>
    INTERSTATE_HD static E* take(E* memory, Index& used, Index n) {
        E* const at = memory ? memory + used : nullptr;
        used += n;
        return at;
    }
};

/// Workspace of a pass; blocks are (key/value head, part).
struct ScanLayout {
    Options options;
    Shape shape;
    bool backward;
    Index parts, complexes, reals;
    c64* kept;  // (Hkv, slots, M, width), backward
    c64* c;     // of every block
    double* r;

    ScanLayout(Arena& arena, const Options& o, const Shape& s, pass which)
        : options(o), shape(s), backward(which == pass::backward), parts(scan_parts(s)) {
        const ScanScratch size(o, s, backward, nullptr, nullptr);
        complexes = size.complexes;
        reals = size.reals;
        kept = arena.take<c64>(backward ? s.kv_heads * scan_slots(s) * size.modes * size.width : 0);
        c = arena.take<c64>(s.kv_heads * parts * complexes);
        r = arena.take<double>(s.kv_heads * parts * reals);
    }
    INTERSTATE_HD ScanScratch block(Index h, Index part) const {
        const Index at = h * parts + part;
        return {options, shape, backward, c + at * complexes, r + at * reals};
    }
};

inline namespace INTERSTATE_KERNELS {

/// Token t: keys, values, and one where there is a normaliser.
template <class T, class P>
__device__ void stage_token(const Inputs<T, P>& in, const Shape& s, Index width, Index b, Index t, Index h, double* z) {
    for (Index c = threadIdx.x; c < width; c += block_threads)
        z[c] = c < s.features    ? static_cast<double>(in.k(b, t, h, c))
               : c < s.columns() ? static_cast<double>(in.v(b, t, h, c - s.features))
                                 : 1.0;
}

/// to(g, c) from (b, t, first head of the group + g, c) of a tensor.
template <class T>
__device__ void stage_queries(const View<T, 4>& from, Index b, Index t, Index h, Index queries, Index n, Index row, double* to) {
    each_element(queries, n, [&](Index g, Index c) { to[g * row + c] = static_cast<double>(from(b, t, h * queries + g, c)); });
}

/// X[t] from X[t-1] (eq. 3); `to` may be `from`. Each thread has its own elements: only z needs a barrier before.
__device__ inline void advance_state(const ScanScratch& l, const double* z, const c64* from, c64* to) {
    each_element(l.modes, l.width, [&](Index m, Index c) {
        to[m * l.width + c] = l.Lam[m] * from[m * l.width + c] + z[c] * l.Bbar[m];
    });
}

/// Runs tokens [first, last) from x, in place; before(t) sees in x what token t starts from. z has two rows in turn, so
/// that one barrier a token is enough.
template <class T, class P, class Before>
__device__ void advance_tokens(const ScanScratch& l, const Inputs<T, P>& in, const Shape& s, Index b, Index first, Index last,
                               Index h, Before&& before) {
    for (Index t = first; t < last; ++t) {
        double* const z = l.z + (t & 1) * l.width;
        stage_token(in, s, l.width, b, t, h, z);
        before(t);
        __syncthreads();
        advance_state(l, z, l.x, l.x);
    }
}

template <class Xs, class Etas>
__device__ void load_recurrence(const ScanScratch& l, const Shape& s, const Xs& x0, const Etas& eta0, Index i, Index h,
                                bool conjugate, c64* x) {
    each_element(l.modes, l.width, [&](Index m, Index c) {
        c64 from{0.0, 0.0};
        if (c < s.columns() && x0) from = cast<double>(x0(i, h, m, c));
        if (c == s.columns() && eta0) from = cast<double>(eta0(i, h, m));
        x[m * l.width + c] = conjugate ? conj(from) : from;
    });
}
template <class A>
__device__ void store_recurrence(const ScanScratch& l, const Shape& s, const c64* x, const View<complex<A>, 4>& xT,
                                 const View<complex<A>, 3>& etaT, Index i, Index h, bool conjugate) {
    each_element(l.modes, l.width, [&](Index m, Index c) {
        const c64 from = conjugate ? conj(x[m * l.width + c]) : x[m * l.width + c];
        if (c < s.columns() && xT) xT(i, h, m, c) = cast<A>(from);
        if (c == s.columns() && etaT) etaT(i, h, m) = cast<A>(from);
    });
}

template <class P>
__device__ void load_modes(const ScanScratch& l, const Options& options, const Params<P>& params, Index h) {
    for (Index m = threadIdx.x; m < l.modes; m += block_threads) {
        const Mode mode = mode_at(options.disc, params, h, m);
        l.Lam[m] = mode.Abar;
        l.Bbar[m] = mode.Bbar;
    }
}

/// a = Xk q of every query, or e = Xv do: columns [first, first + n) of a state times rows of `stride` reals.
__device__ inline void contract_state(const ScanScratch& l, const c64* X, Index queries, Index first, Index n, const double* r,
                                      Index stride, c64* out) {
    sum_rows<c64>(
        queries, l.modes, n, [&](Index g, Index m, Index c) { return r[g * stride + c] * X[m * l.width + first + c]; },
        [&](Index g, Index m, c64 sum) { out[g * l.modes + m] = sum; });
}
/// Re(X[:, first + c]^T w) of every query, to store(g, c, sum).
template <class Store>
__device__ void dot_columns(const ScanScratch& l, const c64* X, Index queries, Index first, Index n, const c64* w, Store&& store) {
    sum_rows<double>(
        queries, n, l.modes,
        [&](Index g, Index c, Index m) { return (X[m * l.width + first + c] * w[g * l.modes + m]).re; }, store);
}

/// Eq. 3 to 6, by way of eq. 8.
template <class T, class P>
__global__ void __launch_bounds__(block_threads)
    scan_forward_kernel(ScanLayout layout, Inputs<T, P> in, Outputs<T> out) {
    const Options& options = layout.options;
    const Shape& s = layout.shape;
    const Index h = blockIdx.x, part = blockIdx.y, queries = s.group(), R = s.features, d = s.value_dim;
    const ScanScratch l = layout.block(h, part);
    const Index read = options.normalized() ? d + 1 : d;
    load_modes(l, options, in.params, h);
    __syncthreads();
    for (Index i = part; i < s.states(); i += layout.parts) {
        const Index b = s.packed() ? 0 : i;
        const RowRange rows = device::checked_rows(in.cu_seqlens, i, s.length);
        load_recurrence(l, s, in.x0, in.eta0, i, h, false, l.x);
        for (Index t = rows.begin; t < rows.end; ++t) {
            stage_token(in, s, l.width, b, t, h, l.z);
            stage_queries(in.q, b, t, h, queries, R, R, l.q);
            __syncthreads();
            advance_state(l, l.z, l.x, l.x);
            __syncthreads();
            contract_state(l, l.x, queries, 0, R, l.q, R, l.a);
            __syncthreads();
            read_out_queries(options.readout, in.params.C, h, queries, l.modes, l.a, l.s, l.w);
            dot_columns(l, l.x, queries, R, read, l.w, [&](Index g, Index c, double sum) {
                if (options.normalized())
                    l.read[g * (d + 1) + c] = sum;
                else
                    out.o(b, t, h * queries + g, c) = T(sum);
            });
            __syncthreads();
            if (options.normalized())
                each_element(queries, d, [&](Index g, Index c) {
                    const double* const of = l.read + g * (d + 1);
                    out.o(b, t, h * queries + g, c) = T(of[c] / of[d]);
                });
        }
        store_recurrence(l, s, l.x, out.xT, out.etaT, i, h, false);
        __syncthreads();
    }
}

/// Eq. 9 to 12 of one token, whose state is X and that before it `before`.
template <class T, class P>
__device__ void scan_token_backward(const ScanScratch& l, const Options& options, const Shape& s, const Inputs<T, P>& in,
                                    const Upstream<T>& upstream, const Grads<T, P>& grads, Index b, Index t, Index h,
                                    const c64* before, const c64* X) {
    const Index queries = s.group(), M = l.modes, W = l.width, R = s.features, d = s.value_dim;
    const Index row = d + 1, outputs = options.normalized() ? d + 1 : d;
    stage_token(in, s, W, b, t, h, l.z);
    stage_queries(in.q, b, t, h, queries, R, R, l.q);
    stage_queries(upstream.o, b, t, h, queries, d, row, l.up);
    __syncthreads();
    contract_state(l, X, queries, 0, R, l.q, R, l.a);
    __syncthreads();
    read_out_queries(options.readout, in.params.C, h, queries, M, l.a, l.s, l.w);
    if (options.normalized()) {  // eq. 11
        dot_columns(l, X, queries, R, outputs, l.w, [&](Index g, Index c, double sum) { l.read[g * row + c] = sum; });
        __syncthreads();
        for (Index g = threadIdx.x / 32; g < queries; g += block_warps) {
            const double den = l.read[g * row + d];
            double carried = 0.0;
            for (Index c = threadIdx.x % 32; c < d; c += 32) {
                carried -= l.up[g * row + c] * (l.read[g * row + c] / den);
                l.up[g * row + c] /= den;
            }
            carried = over_lanes(carried);
            if (threadIdx.x % 32 == 0) l.up[g * row + d] = carried / den;
        }
        __syncthreads();
    }
    contract_state(l, X, queries, R, outputs, l.up, row, l.e);
    __syncthreads();
    read_out_queries(options.readout, in.params.C, h, queries, M, l.e, l.sg, l.p);
    each_element(M, W, [&](Index m, Index c) {
        c64 sum = l.y[m * W + c];
        for (Index g = 0; g < queries; ++g)
            sum += c < R ? l.q[g * R + c] * l.p[g * M + m] : l.up[g * row + c - R] * l.w[g * M + m];
        l.y[m * W + c] = sum;
    });
    if (grads.params.C) {  // eq. 10
        const double twice = options.readout == Readout::real_parts ? 2.0 : 1.0;
        each_element(M, M, [&](Index m, Index n) {
            c64 sum{0.0, 0.0};
            for (Index g = 0; g < queries; ++g)
                sum += l.sg[g * M + m] * l.a[g * M + n] + l.s[g * M + m] * l.e[g * M + n];
            l.dC[m * M + n] += twice * sum;
        });
    }
    if (grads.q)
        dot_columns(l, X, queries, 0, R, l.p, [&](Index g, Index c, double sum) { grads.q(b, t, h * queries + g, c) = T(sum); });
    __syncthreads();
    // Eq. 12.
    sum_rows<double>(
        1, s.columns(), M, [&](Index, Index c, Index m) { return (l.Bbar[m] * l.y[m * W + c]).re; },
        [&](Index, Index c, double sum) {
            if (c < R && grads.k) grads.k(b, t, h, c) = T(sum);
            if (c >= R && grads.v) grads.v(b, t, h, c - R) = T(sum);
        });
    __syncthreads();
    for (Index m = threadIdx.x / 32; m < M; m += block_warps) {
        c64 dLam{0.0, 0.0}, dBbar{0.0, 0.0};
        for (Index c = threadIdx.x % 32; c < W; c += 32) {
            const c64 y = l.y[m * W + c];
            dBbar += l.z[c] * y;
            dLam += y * before[m * W + c];
            l.y[m * W + c] = l.Lam[m] * y;
        }
        dLam = over_lanes(dLam);
        dBbar = over_lanes(dBbar);
        if (threadIdx.x % 32 == 0) {
            l.dLam[m] += dLam;
            l.dBbar[m] += dBbar;
        }
    }
    __syncthreads();  // before the next token is staged
}

template <class T, class P>
__global__ void __launch_bounds__(block_threads)
    scan_backward_kernel(ScanLayout layout, Inputs<T, P> in, Upstream<T> upstream, Grads<T, P> grads) {
    const Options& options = layout.options;
    const Shape& s = layout.shape;
    const Index h = blockIdx.x, part = blockIdx.y;
    const ScanScratch l = layout.block(h, part);
    const Index M = l.modes, W = l.width, state = M * W;
    const auto copy = [&](const c64* from, c64* to) {
        each_element(M, W, [&](Index m, Index c) { to[m * W + c] = from[m * W + c]; });
    };
    load_modes(l, options, in.params, h);
    for (Index m = threadIdx.x; m < M; m += block_threads) l.dLam[m] = l.dBbar[m] = {0.0, 0.0};
    each_element(M, M, [&](Index m, Index n) { l.dC[m * M + n] = {0.0, 0.0}; });
    __syncthreads();
    for (Index i = part; i < s.states(); i += layout.parts) {
        const Index b = s.packed() ? 0 : i;
        const RowRange rows = device::checked_rows(in.cu_seqlens, i, s.length);
        const Index length = rows.end - rows.begin, stretches = ceil_div(length, scan_stretch);
        c64* const kept = layout.kept + (h * scan_slots(s) + scan_slot(s, i, rows.begin)) * state;
        load_recurrence(l, s, in.x0, in.eta0, i, h, false, l.x);
        // The last stretch runs below.
        advance_tokens(l, in, s, b, rows.begin, rows.begin + (stretches > 0 ? stretches - 1 : 0) * scan_stretch, h, [&](Index t) {
            if ((t - rows.begin) % scan_stretch == 0) copy(l.x, kept + (t - rows.begin) / scan_stretch * state);
        });
        if (stretches > 0) copy(l.x, kept + (stretches - 1) * state);
        load_recurrence(l, s, upstream.xT, upstream.etaT, i, h, true, l.y);
        for (Index stretch = stretches - 1; stretch >= 0; --stretch) {
            const Index first = rows.begin + stretch * scan_stretch;
            const Index last = first + scan_stretch < rows.end ? first + scan_stretch : rows.end;
            const Index pieces = ceil_div(last - first, scan_piece);
            __syncthreads();  // z may still be read
            copy(kept + stretch * state, l.x);
            advance_tokens(l, in, s, b, first, first + (pieces - 1) * scan_piece, h, [&](Index t) {
                if ((t - first) % scan_piece == 0) copy(l.x, l.coarse + (t - first) / scan_piece * state);
            });
            copy(l.x, l.coarse + (pieces - 1) * state);
            for (Index piece = pieces - 1; piece >= 0; --piece) {
                const Index begin = first + piece * scan_piece;
                const Index end = begin + scan_piece < last ? begin + scan_piece : last;
                __syncthreads();
                copy(l.coarse + piece * state, l.x);
                // fine[t - begin] is the state before token t.
                advance_tokens(l, in, s, b, begin, end, h, [&](Index t) { copy(l.x, l.fine + (t - begin) * state); });
                copy(l.x, l.fine + (end - begin) * state);
                __syncthreads();
                for (Index t = end - 1; t >= begin; --t)
                    scan_token_backward(l, options, s, in, upstream, grads, b, t, h, l.fine + (t - begin) * state,
                                        l.fine + (t + 1 - begin) * state);
            }
        }
        store_recurrence(l, s, l.y, grads.x0, grads.eta0, i, h, true);
        __syncthreads();
    }
}

/// One block a key/value head: adds the parts in order, then the chain rule of eq. 1 and 2.
template <class P>
__global__ void __launch_bounds__(block_threads)
    scan_finish_kernel(ScanLayout layout, Params<P> params, BasicParams<P, complex<P>> grads) {
    const Index h = blockIdx.x, M = layout.shape.modes;
    const auto total = [&](auto&& of) {
        c64 sum{0.0, 0.0};
        for (Index part = 0; part < layout.parts; ++part) sum += of(layout.block(h, part));
        return conj(sum);
    };
    if (grads.C)
        each_element(M, M, [&](Index m, Index n) {
            grads.C(h, m, n) = cast<P>(total([&](const ScanScratch& l) { return l.dC[m * M + n]; }));
        });
    __shared__ double log_dt[block_threads];
    double dlog_dt = 0.0;
    for (Index m = threadIdx.x; m < M; m += block_threads) {
        const c64 dLam = total([&](const ScanScratch& l) { return l.dLam[m]; });
        const c64 dBbar = total([&](const ScanScratch& l) { return l.dBbar[m]; });
        const ModeGrads g = discretize_backward(layout.options.disc, mode_at(layout.options.disc, params, h, m),
                                                cast<double>(params.B(h, m)), dLam, dBbar);
        dlog_dt += g.log_dt;
        if (grads.log_neg_re) grads.log_neg_re(h, m) = static_cast<P>(g.log_neg_re);
        if (grads.im) grads.im(h, m) = static_cast<P>(g.im);
        if (grads.B) grads.B(h, m) = cast<P>(g.B);
    }
    log_dt[threadIdx.x] = dlog_dt;
    __syncthreads();
    if (threadIdx.x != 0 || !grads.log_dt) return;
    double sum = 0.0;
    for (int i = 0; i < block_threads; ++i) sum += log_dt[i];
    grads.log_dt(h) = static_cast<P>(sum);
}

inline dim3 scan_grid(const ScanLayout& l) {
    return dim3(static_cast<unsigned>(l.shape.kv_heads), static_cast<unsigned>(l.parts));
}

template <class T, class P>
Status run_scan_forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Workspace ws) {
    const Shape s = shape_of(in);
    Arena arena(ws.data);
    const ScanLayout layout(arena, options, s, pass::forward);
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.o, in.cu_seqlens));
    if (s.states() == 0) return {};
    return launch(exec, "scan_forward_kernel", scan_forward_kernel<T, P>, {scan_grid(layout), dim3(block_threads)}, layout,
                  in, out);
}

template <class T, class P>
Status run_scan_backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Upstream<T>& upstream,
                         const Grads<T, P>& grads, Workspace ws) {
    const Shape s = shape_of(in);
    Arena arena(ws.data);
    const ScanLayout layout(arena, options, s, pass::backward);
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.q, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.k, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.v, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(launch(exec, "scan_backward_kernel", scan_backward_kernel<T, P>,
                                      {scan_grid(layout), dim3(block_threads)}, layout, in, upstream, grads));
    const auto& g = grads.params;
    if (!(g.log_dt || g.log_neg_re || g.im || g.B || g.C)) return {};
    return launch(exec, "scan_finish_kernel", scan_finish_kernel<P>,
                  {dim3(static_cast<unsigned>(s.kv_heads)), dim3(block_threads)}, layout, in.params, g);
}

}  // namespace INTERSTATE_KERNELS

}  // namespace interdomain::detail
}  // namespace interstate::inline INTERSTATE_ABI
