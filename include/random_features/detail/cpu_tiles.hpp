// Random Fourier features on the CPU: 64 rows of a head at a time, as products of small matrices in scratch.
//
// Vector lanes are frequencies in W x, channels in the gradients; rows in scratch are padded to whole vectors with
// zeros. Gradients of W are added up in float over a tile, in float64 over tiles, in at most 16 fixed groups of them.
#pragma once

#include <algorithm>
#include <cmath>

#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>
#include <interstate/dispatch.hpp>
#include <random_features/detail/cpu_sincos.hpp>
#include <random_features/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace random_features::detail {

inline constexpr Index tile_rows = 64;
inline constexpr Index largest_groups = 16;

inline Index padded(Index n) { return ceil_div(n, 16) * 16; }

template <class A>
struct CpuLayout {
    A *turned, *flat;  // (heads of W, dh, F) and (heads of W, F, dh), last axis padded
    A *x, *p, *dx;     // of a thread: (tile, dh), (tile, F), (tile, dh)
    A* dW;             // of a thread: (F, dh)
    double* groups;    // (groups, H, F, dh)
    Index strides[4];

    CpuLayout(Arena& arena, const Shape& s, pass p_, int threads) {
        const bool backward = p_ == pass::backward;
        const Index dh = padded(s.head_dim), F = padded(s.frequencies);
        turned = arena.take<A>(s.weight_heads * s.head_dim * F);
        flat = arena.take<A>(backward ? s.weight_heads * s.frequencies * dh : 0);
        const Index sizes[] = {tile_rows * dh, tile_rows * F, backward ? tile_rows * dh : 0, backward ? s.frequencies * dh : 0};
        A** const arrays[] = {&x, &p, &dx, &dW};
        for (int i = 0; i < 4; ++i) *arrays[i] = arena.take<A>((strides[i] = ceil_div(sizes[i], 64) * 64) * threads);
        groups = arena.take<double>(backward ? group_count(s) * s.heads * s.frequencies * dh : 0);
    }
    static Index tiles(const Shape& s) { return ceil_div(s.rows(), tile_rows); }
    static Index group_count(const Shape& s) { return std::min(tiles(s), largest_groups); }
};

/// c (m, n) = a b, with a(i, k) at a[i * row + k * column], b (k, n) and c with rows of `n` places, n whole vectors.
template <class A>
struct ProductBody {
    template <class Set, int rows, int vectors>
    static INTERSTATE_INLINE void block(const A* a, Index row, Index column, const A* b, A* c, Index n, Index k) {
        using V = simd::Native<Set, A>;
        V sum[rows][vectors];
        INTERSTATE_UNROLL
        for (int i = 0; i < rows; ++i)
            INTERSTATE_UNROLL
            for (int j = 0; j < vectors; ++j) sum[i][j] = simd::broadcast<V>(A(0));
        for (Index l = 0; l < k; ++l) {
            V right[vectors];
            INTERSTATE_UNROLL
            for (int j = 0; j < vectors; ++j) right[j] = simd::load<V>(b + l * n + j * V::lanes);
            INTERSTATE_UNROLL
            for (int i = 0; i < rows; ++i) {
                const V left = simd::broadcast<V>(a[i * row + l * column]);
                INTERSTATE_UNROLL
                for (int j = 0; j < vectors; ++j) sum[i][j] = simd::fma(left, right[j], sum[i][j]);
            }
        }
        INTERSTATE_UNROLL
        for (int i = 0; i < rows; ++i)
            INTERSTATE_UNROLL
            for (int j = 0; j < vectors; ++j) simd::store(c + i * n + j * V::lanes, sum[i][j]);
    }
    template <class Set, int rows>
    static INTERSTATE_INLINE void stripe(const A* a, Index row, Index column, const A* b, A* c, Index n, Index k) {
        constexpr int lanes = simd::Native<Set, A>::lanes;
        Index j = 0;
        for (; j + 2 * lanes <= n; j += 2 * lanes) block<Set, rows, 2>(a, row, column, b + j, c + j, n, k);
        for (; j < n; j += lanes) block<Set, rows, 1>(a, row, column, b + j, c + j, n, k);
    }
    template <class Set>
    static INTERSTATE_INLINE void run(const A* a, Index row, Index column, const A* b, A* c, Index m, Index n, Index k) {
        Index i = 0;
        for (; i + 4 <= m; i += 4) stripe<Set, 4>(a + i * row, row, column, b, c + i * n, n, k);
        for (; i < m; ++i) stripe<Set, 1>(a + i * row, row, column, b, c + i * n, n, k);
    }
};

/// A vector from element i on of n; zeros beyond.
template <class Set, class T, class A>
INTERSTATE_INLINE simd::Native<Set, A> load_vector(const T* x, Index stride, Index i, Index n) {
    using V = simd::Native<Set, A>;
    if (stride == 1 && i + V::lanes <= n) return simd::load_as<V>(x + i);
    A spare[V::lanes];
    for (Index j = 0; j < V::lanes; ++j) spare[j] = i + j < n ? static_cast<A>(x[(i + j) * stride]) : A(0);
    return simd::load<V>(spare);
}
template <class Set, class T, class A>
INTERSTATE_INLINE void store_vector(T* x, Index stride, Index i, Index n, const simd::Native<Set, A>& v) {
    using V = simd::Native<Set, A>;
    if (stride == 1 && i + V::lanes <= n) return simd::store_as(x + i, v);
    A spare[V::lanes];
    simd::store(spare, v);
    for (Index j = 0; j < V::lanes && i + j < n; ++j) x[(i + j) * stride] = T(spare[j]);
}
/// Elements of one row of a tensor as accumulators, zeros up to `width`.
template <class T, class A>
struct LoadBody {
    template <class Set>
    static INTERSTATE_INLINE void run(const T* x, Index stride, Index n, A* to, Index width) {
        using V = simd::Native<Set, A>;
        for (Index i = 0; i < width; i += V::lanes) simd::store(to + i, load_vector<Set, T, A>(x, stride, i, n));
    }
};

template <class T, class A>
struct StoreBody {
    template <class Set>
    static INTERSTATE_INLINE void run(T* x, Index stride, Index n, const A* from) {
        using V = simd::Native<Set, A>;
        for (Index i = 0; i < n; i += V::lanes) store_vector<Set, T, A>(x, stride, i, n, simd::load<V>(from + i));
    }
};

/// One row: phases to features.
template <class T, class A>
struct FeaturesBody {
    template <class Set>
    static INTERSTATE_INLINE void run(const A* p, Index F, A norm, T* y, Index stride) {
        using V = simd::Native<Set, A>;
        for (Index i = 0; i < F; i += V::lanes) {
            V sine, cosine;
            sincos(simd::load<V>(p + i), sine, cosine);
            store_vector<Set, T, A>(y, stride, i, F, cosine * simd::broadcast<V>(norm));
            store_vector<Set, T, A>(y + F * stride, stride, i, F, sine * simd::broadcast<V>(norm));
        }
    }
};
/// One row: phases to their gradients (eq. 3), in place; zeros beyond F.
template <class T, class A>
struct PhaseGradientBody {
    template <class Set>
    static INTERSTATE_INLINE void run(A* p, Index F, A norm, const T* dy, Index stride) {
        using V = simd::Native<Set, A>;
        for (Index i = 0; i < F; i += V::lanes) {
            V sine, cosine;
            sincos(simd::load<V>(p + i), sine, cosine);
            const V of_cosine = load_vector<Set, T, A>(dy, stride, i, F);
            const V of_sine = load_vector<Set, T, A>(dy + F * stride, stride, i, F);
            const V dp = simd::fnma(of_cosine, sine, of_sine * cosine);
            simd::store(p + i, dp * simd::broadcast<V>(norm));
        }
    }
};

template <class A, class P>
void pack_frequencies(const Params<P>& params, const Shape& s, const CpuLayout<A>& w, bool backward) {
    const Index dh = padded(s.head_dim), F = padded(s.frequencies);
    std::fill_n(w.turned, s.weight_heads * s.head_dim * F, A(0));
    if (backward) std::fill_n(w.flat, s.weight_heads * s.frequencies * dh, A(0));
    for (Index h = 0; h < s.weight_heads; ++h)
        for (Index f = 0; f < s.frequencies; ++f)
            for (Index c = 0; c < s.head_dim; ++c) {
                const A x = static_cast<A>(params.W(h, f, c));
                w.turned[(h * s.head_dim + c) * F + f] = x;
                if (backward) w.flat[(h * s.frequencies + f) * dh + c] = x;
            }
}

/// A tile of rows of one head.
template <class T, class P>
class CpuTile {
  public:
    using A = acc_t<T>;

    CpuTile(const cpu& exec, const Inputs<T, P>& in, const CpuLayout<A>& w, int thread)
        : exec_(exec), in_(in), s_(shape_of(in)), w_(w), x_(w.x + thread * w.strides[0]), p_(w.p + thread * w.strides[1]),
          dx_(w.dx + thread * w.strides[2]), dW_(w.dW + thread * w.strides[3]), dh_(padded(s_.head_dim)),
          F_(padded(s_.frequencies)), norm_(static_cast<A>(1.0 / std::sqrt(static_cast<double>(s_.frequencies)))),
          begin_(in.cu_seqlens ? in.cu_seqlens(0) : 0), end_(in.cu_seqlens ? in.cu_seqlens(s_.sequences) : s_.length) {}

    void forward(Index tile, Index h, const Outputs<T>& out) const {
        const Index rows = phases(tile, h);
        for (Index i = 0; i < rows; ++i) {
            const Index n = tile * tile_rows + i;
            T* const y = at(out.y, n, h);
            if (inside(n))
                simd::run_body<FeaturesBody<T, A>>(exec_.isa, p_ + i * F_, s_.frequencies, norm_, y, out.y.stride[3]);
            else
                for (Index f = 0; f < 2 * s_.frequencies; ++f) y[f * out.y.stride[3]] = T(0.0f);
        }
    }

    /// Adds dW to `sums`, (F, padded dh), unless it is null.
    void backward(Index tile, Index h, const Upstream<T>& up, const Grads<T, P>& grads, double* sums) const {
        const Index rows = phases(tile, h), hw = s_.weight_heads == 1 ? 0 : h, size = s_.frequencies * dh_;
        for (Index i = 0; i < rows; ++i) {
            const Index n = tile * tile_rows + i;
            if (inside(n))
                simd::run_body<PhaseGradientBody<T, A>>(exec_.isa, p_ + i * F_, s_.frequencies, norm_, at(up.y, n, h),
                                                        up.y.stride[3]);
            else
                std::fill_n(p_ + i * F_, F_, A(0));
        }
        if (grads.x) {
            simd::run_body<ProductBody<A>>(exec_.isa, static_cast<const A*>(p_), F_, Index{1},
                                           static_cast<const A*>(w_.flat + hw * size), dx_, rows, dh_, s_.frequencies);
            for (Index i = 0; i < rows; ++i) {
                const Index n = tile * tile_rows + i;
                if (!inside(n)) std::fill_n(dx_ + i * dh_, dh_, A(0));  // a frequency may be infinite
                simd::run_body<StoreBody<T, A>>(exec_.isa, at(grads.x, n, h), grads.x.stride[3], s_.head_dim,
                                                static_cast<const A*>(dx_ + i * dh_));
            }
        }
        if (!sums) return;
        simd::run_body<ProductBody<A>>(exec_.isa, static_cast<const A*>(p_), Index{1}, F_, static_cast<const A*>(x_), dW_,
                                       s_.frequencies, dh_, rows);
        for (Index i = 0; i < size; ++i) sums[i] += static_cast<double>(dW_[i]);
    }

  private:
    bool inside(Index n) const { return n % s_.length >= begin_ && n % s_.length < end_; }
    template <class E>
    static E* at(const View<E, 4>& x, Index n, Index h) {
        return x.data + n / x.extent[1] * x.stride[0] + n % x.extent[1] * x.stride[1] + h * x.stride[2];
    }
    /// x and p = W x of the tile's rows; returns how many there are.
    Index phases(Index tile, Index h) const {
        const Index first = tile * tile_rows, rows = std::min(tile_rows, s_.rows() - first);
        for (Index i = 0; i < rows; ++i)
            if (inside(first + i))
                simd::run_body<LoadBody<T, A>>(exec_.isa, at(in_.x, first + i, h), in_.x.stride[3], s_.head_dim, x_ + i * dh_, dh_);
            else
                std::fill_n(x_ + i * dh_, dh_, A(0));
        const A* const W = w_.turned + (s_.weight_heads == 1 ? 0 : h) * s_.head_dim * F_;
        simd::run_body<ProductBody<A>>(exec_.isa, static_cast<const A*>(x_), dh_, Index{1}, W, p_, rows, F_, s_.head_dim);
        return rows;
    }

    const cpu& exec_;
    const Inputs<T, P>& in_;
    Shape s_;
    const CpuLayout<A>& w_;
    A *x_, *p_, *dx_, *dW_;
    Index dh_, F_;
    A norm_;
    Index begin_, end_;
};

template <class T, class P>
void cpu_forward(const cpu& exec, const Inputs<T, P>& in, const Outputs<T>& out, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    if (s.rows() == 0 || s.heads == 0) return;
    Arena arena(ws.data);
    const CpuLayout<A> w(arena, s, pass::forward, exec.threads);
    pack_frequencies(in.params, s, w, false);
    const Index tiles = CpuLayout<A>::tiles(s);
    const int threads = s.rows() * s.heads * s.head_dim < 4096 ? 1 : exec.threads;
    parallel_for(tiles * s.heads, threads, [&](Index task, int thread) {
        CpuTile<T, P>(exec, in, w, thread).forward(task / s.heads, task % s.heads, out);
    });
}

template <class T, class P>
void cpu_backward(const cpu& exec, const Inputs<T, P>& in, const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    Arena arena(ws.data);
    const CpuLayout<A> w(arena, s, pass::backward, exec.threads);
    const Index dh = padded(s.head_dim), size = s.frequencies * dh;
    const Index tiles = CpuLayout<A>::tiles(s), groups = CpuLayout<A>::group_count(s);
    if (s.rows() > 0 && s.heads > 0) {
        pack_frequencies(in.params, s, w, true);
        std::fill_n(w.groups, groups * s.heads * size, 0.0);
        parallel_for(groups * s.heads, exec.threads, [&](Index task, int thread) {
            const CpuTile<T, P> tile(exec, in, w, thread);
            const Index group = task / s.heads, h = task % s.heads;
            for (Index i = tiles * group / groups; i < tiles * (group + 1) / groups; ++i)
                tile.backward(i, h, upstream, grads, grads.params.W ? w.groups + task * size : nullptr);
        });
    }
    for (Index hw = 0; grads.params.W && hw < s.weight_heads; ++hw)
        for (Index f = 0; f < s.frequencies; ++f)
            for (Index c = 0; c < s.head_dim; ++c) {
                double sum = 0.0;
                for (Index h = s.weight_heads == 1 ? 0 : hw; h < (s.weight_heads == 1 ? s.heads : hw + 1); ++h)
                    for (Index group = 0; group < groups; ++group)
                        sum += w.groups[(group * s.heads + h) * size + f * dh + c];
                grads.params.W(hw, f, c) = static_cast<P>(sum);
            }
}

}  // namespace random_features::detail
}  // namespace interstate::inline INTERSTATE_ABI
