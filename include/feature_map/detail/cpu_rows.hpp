// The feature map on the CPU: rows in stretches, every stage while a row is in the first-level cache.
//
// A stretch is 32 rows of the axis of all tokens, with all heads. Its part of a head, and the rows that the convolution
// looks back at, are copied to scratch as accumulators, the two channels of a RoPE pair W apart: vector lanes are
// channels whatever the layout, dtype or strides. Cosines and sines are made once for all heads.
//
// Backward recomputes the stages. A stretch takes the rows after it that its own reach through the convolution along,
// so that it writes its part of dx whole. Sums over rows are kept for at most 64 fixed groups of stretches.
#pragma once

#include <algorithm>
#include <cmath>

#include <feature_map/detail/rows.hpp>
#include <feature_map/params.hpp>
#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map::detail {

inline constexpr Index stretch_rows = 32;
inline constexpr Index largest_groups = 64;
inline constexpr Index widest_vector = 16;  // what rows in scratch are padded to

/// Where the channels of a head lie in scratch: one plane of `width` places, or two, of the halves of RoPE's pairs.
struct Planes {
    Rope rope;
    Index features, width;

    Planes(const Options& options, const Shape& s)
        : rope(options.rope), features(s.features),
          width(ceil_div(rope == Rope::none ? s.features : s.features / 2, widest_vector) * widest_vector) {}

    INTERSTATE_INLINE Index row() const { return rope == Rope::none ? width : 2 * width; }
    INTERSTATE_INLINE Index place(Index r) const {
        if (rope == Rope::interleaved) return r / 2 + r % 2 * width;
        return rope == Rope::half_split && r >= features / 2 ? r - features / 2 + width : r;
    }
};

template <class A>
struct CpuLayout {
    A *weight, *conv_bias, *scale, *bias;    // (H, taps, row), (H, row), (row), (H, row)
    double *cosine, *sine;                   // (stretch, width): angles of positions 0 .. stretch-1
    struct Thread {
        A *input, *rows, *angles;            // (stretch + 2 past, row) and twice (stretch + past, row)
        A *temporary, *sums;                 // 6 rows; (taps + 3, row)
        double* base;                        // (2, width)
    };
    Thread first;                            // of thread 0; those of thread i are i times `stride` further
    Index strides[6];
    double* groups;                          // (groups, H, taps + 3, row)

    CpuLayout(Arena& arena, const Options& options, const Shape& s, pass p, int threads) {
        const Planes planes(options, s);
        const Index row = planes.row(), H = s.heads;
        const bool backward = p == pass::backward;
        weight = arena.take<A>(H * s.taps * row);
        conv_bias = arena.take<A>(s.taps > 0 ? H * row : 0);
        scale = arena.take<A>(options.rms ? row : 0);
        bias = arena.take<A>(options.rms ? H * row : 0);
        const Index angles = options.rope == Rope::none ? 0 : planes.width;
        cosine = arena.take<double>(stretch_rows * angles);
        sine = arena.take<double>(stretch_rows * angles);
        const Index sizes[] = {(stretch_rows + 2 * s.past()) * row,
                               backward ? (stretch_rows + s.past()) * row : 0,
                               (stretch_rows + s.past()) * 2 * angles,
                               6 * row,
                               backward ? (s.taps + 3) * row : 0,
                               2 * angles};
        for (int i = 0; i < 6; ++i) strides[i] = ceil_div(sizes[i], 64) * 64;
        A** const arrays[] = {&first.input, &first.rows, &first.angles, &first.temporary, &first.sums};
        for (int i = 0; i < 5; ++i) *arrays[i] = arena.take<A>(strides[i] * threads);
        first.base = arena.take<double>(strides[5] * threads);
        groups = arena.take<double>(backward ? group_count(s) * H * (s.taps + 3) * row : 0);
    }
    Thread thread(int i) const {
        return {first.input + i * strides[0],     first.rows + i * strides[1], first.angles + i * strides[2],
                first.temporary + i * strides[3], first.sums + i * strides[4], first.base + i * strides[5]};
    }
    static Index stretches(const Shape& s) { return ceil_div(s.rows(), stretch_rows); }
    static Index group_count(const Shape& s) { return std::min(stretches(s), largest_groups); }
};

template <class A, class P>
void pack_params(const Shape& s, const Planes& planes, const Options& options, const Params<P>& p, const CpuLayout<A>& w) {
    const Index row = planes.row();
    // Places between the channels hold zeros, so that they add nothing to the sums of norms.
    std::fill_n(w.weight, s.heads * s.taps * row, A(0));
    std::fill_n(w.conv_bias, s.taps > 0 ? s.heads * row : 0, A(0));
    if (options.rms) std::fill_n(w.scale, row, A(0)), std::fill_n(w.bias, s.heads * row, A(0));
    for (Index h = 0; h < s.heads; ++h)
        for (Index r = 0; r < s.features; ++r) {
            const Index at = planes.place(r);
            for (Index k = 0; k < s.taps; ++k) w.weight[(h * s.taps + k) * row + at] = static_cast<A>(p.conv_weight(h, r, k));
            if (p.conv_bias) w.conv_bias[h * row + at] = static_cast<A>(p.conv_bias(h, r));
            if (options.rms) w.bias[h * row + at] = p.bias ? static_cast<A>(p.bias(h, r)) : A(0);
            if (options.rms) w.scale[at] = p.scale ? static_cast<A>(p.scale(r)) : A(1);
        }
}

inline double rope_frequency(const Options& options, Index R, Index i) {
    return std::pow(options.base, -2.0 * static_cast<double>(i) / static_cast<double>(R));
}

/// Angles of positions 0 .. stretch-1, from which those of any position are one product of complex numbers away.
template <class A>
void small_angles(const Options& options, const Shape& s, const Planes& planes, const CpuLayout<A>& w) {
    if (options.rope == Rope::none) return;
    for (Index t = 0; t < stretch_rows; ++t)
        for (Index i = 0; i < planes.width; ++i) {
            const double angle = i < s.features / 2 ? static_cast<double>(t) * rope_frequency(options, s.features, i) : 0.0;
            w.cosine[t * planes.width + i] = std::cos(angle);
            w.sine[t * planes.width + i] = std::sin(angle);
        }
}

/// Cosines and sines of `count` positions from `position` on, a row each. They depend on the position alone, not on
/// where a stretch begins: position = 32 high + low, and the angles add up.
template <class A>
void stretch_angles(const Options& options, const Shape& s, const Planes& planes, const CpuLayout<A>& w, double* base,
                    Index position, Index count, A* angles) {
    const Index W = planes.width;
    for (Index t = 0; t < count; ++t, ++position) {
        const Index low = position & (stretch_rows - 1);
        if (t == 0 || low == 0)
            for (Index i = 0; i < W; ++i) {
                const double angle =
                    i < s.features / 2 ? static_cast<double>(position - low) * rope_frequency(options, s.features, i) : 0.0;
                base[i] = std::cos(angle);
                base[W + i] = std::sin(angle);
            }
        const double *cosine = w.cosine + low * W, *sine = w.sine + low * W;
        for (Index i = 0; i < W; ++i) {
            angles[t * 2 * W + i] = static_cast<A>(base[i] * cosine[i] - base[W + i] * sine[i]);
            angles[t * 2 * W + W + i] = static_cast<A>(base[W + i] * cosine[i] + base[i] * sine[i]);
        }
    }
}

/// Storage to and from a row of scratch. `flat` is a row for what RoPE's pairs are picked from.
template <class Set, class T, class A>
INTERSTATE_INLINE void load_row(const T* x, Index stride, const Planes& p, A* flat, A* row) {
    using V = simd::Native<Set, A>;
    const Index R = p.features, half = p.rope == Rope::none ? R : R / 2;
    A* const to = p.rope == Rope::none ? row : flat;
    Index r = 0;
    if (stride == 1)
        for (; r + V::lanes <= R; r += V::lanes) simd::store(to + r, simd::load_as<V>(x + r));
    for (; r < R; ++r) to[r] = static_cast<A>(x[r * stride]);
    if (p.rope == Rope::interleaved) {
        for (Index i = 0; i < half; ++i) row[i] = flat[2 * i];
        for (Index i = 0; i < half; ++i) row[p.width + i] = flat[2 * i + 1];
    } else if (p.rope == Rope::half_split) {
        for (Index i = 0; i < half; ++i) row[i] = flat[i];
        for (Index i = 0; i < half; ++i) row[p.width + i] = flat[half + i];
    }
    for (Index i = half; i < p.width; ++i) row[i] = A(0);
    if (p.rope != Rope::none)
        for (Index i = half; i < p.width; ++i) row[p.width + i] = A(0);
}
template <class Set, class T, class A>
INTERSTATE_INLINE void store_row(T* x, Index stride, const Planes& p, A* flat, const A* row) {
    using V = simd::Native<Set, A>;
    const Index R = p.features, half = R / 2;
    const A* from = row;
    if (p.rope == Rope::interleaved)
        for (Index i = 0; i < half; ++i) flat[2 * i] = row[i], flat[2 * i + 1] = row[p.width + i];
    else if (p.rope == Rope::half_split)
        for (Index i = 0; i < half; ++i) flat[i] = row[i], flat[half + i] = row[p.width + i];
    if (p.rope != Rope::none) from = flat;
    Index r = 0;
    if (stride == 1)
        for (; r + V::lanes <= R; r += V::lanes) simd::store_as(x + r, simd::load<V>(from + r));
    for (; r < R; ++r) x[r * stride] = T(from[r]);
}

/// Rows [begin, begin + count) of one sequence and one head, in scratch.
template <class A>
struct CpuHead {
    Options options;
    Planes planes;
    Index taps, past;
    A slope, offset;                                // of the norm
    const A *weight, *conv_bias, *scale, *bias;     // of the head; null where there is none
    const A *input, *angles;                        // (past + count, row), (count, 2, width)
    A* temporary;
};

/// Places i to i + lanes of eq. 1.
template <class V, class A>
INTERSTATE_INLINE V convolved(const CpuHead<A>& c, const A* input, Index row, Index i) {
    if (c.taps == 0) return simd::load<V>(input + i);
    V x = simd::load<V>(c.conv_bias + i);
    for (Index k = 0; k < c.taps; ++k)
        x = simd::fma(simd::load<V>(c.weight + k * row + i), simd::load<V>(input + k * row + i), x);
    return x;
}
template <class V>
INTERSTATE_INLINE V sigmoid(const V& x) {
    V y = simd::broadcast<V>(decltype(x[0])(1));
    y.v = y.v / (y + simd::exp(simd::broadcast<V>(decltype(x[0])(0)) - x)).v;
    return y;
}
/// eq. 3, u and s to memory; adds s^2 to `sum`.
template <class V, class A>
INTERSTATE_INLINE void activate(const CpuHead<A>& c, const V& x, A* u, A* s, V& sum) {
    simd::store(u, x);
    const V y = c.options.activation == Activation::silu ? x * sigmoid(x) : x;
    simd::store(s, y);
    sum = simd::fma(y, y, sum);
}

/// eq. 1 to 3 of one row: u before the activation, s after it. Returns the sum of s^2.
template <class Set, class A>
INTERSTATE_INLINE A head_row(const CpuHead<A>& c, Index t, A* u, A* s) {
    using V = simd::Native<Set, A>;
    const Index row = c.planes.row(), W = c.planes.width;
    const A* const input = c.input + t * row;
    V sum = simd::broadcast<V>(A(0));
    for (Index i = 0; i < W; i += V::lanes) {
        V a = convolved<V>(c, input, row, i);
        if (c.planes.rope != Rope::none) {
            const V b = convolved<V>(c, input, row, W + i);
            const V cosine = simd::load<V>(c.angles + t * 2 * W + i), sine = simd::load<V>(c.angles + t * 2 * W + W + i);
            activate(c, simd::fma(a, sine, b * cosine), u + W + i, s + W + i, sum);
            a = simd::fnma(b, sine, a * cosine);
        }
        activate(c, a, u + i, s + i, sum);
    }
    return simd::reduce_add(sum);
}

/// y of `count` rows (eq. 1 to 6).
template <class T, class A>
struct ForwardBody {
    template <class Set>
    static INTERSTATE_INLINE void run(const CpuHead<A>& c, Index count, T* y, Index stride_row, Index stride_channel) {
        using V = simd::Native<Set, A>;
        const Index row = c.planes.row();
        A *const u = c.temporary, *const s = u + row, *const flat = s + row;
        for (Index t = 0; t < count; ++t) {
            const A sum = head_row<Set>(c, t, u, s);
            const V gamma = simd::broadcast<V>(A(1) / std::sqrt(c.slope * sum + c.offset));
            for (Index i = 0; i < row; i += V::lanes) {
                V x = simd::load<V>(s + i) * gamma;
                if (c.scale) x = simd::fma(x, simd::load<V>(c.scale + i), simd::load<V>(c.bias + i));
                simd::store(s + i, x);
            }
            store_row<Set>(y + t * stride_row, stride_channel, c.planes, flat, s);
        }
    }
};

template <class V, class A>
INTERSTATE_INLINE void add_to(A* to, const V& x) {
    simd::store(to, simd::load<V>(to) + x);
}
/// The gradient of u (eq. 11 and 12) from those of the norm's output.
template <class V, class A>
INTERSTATE_INLINE V before_activation(const CpuHead<A>& c, bool normed, const V& gamma, const V& along, const A* g, const A* s,
                                      const A* u) {
    V x = simd::load<V>(g);
    if (normed) x = simd::fnma(along, simd::load<V>(s), x * gamma);
    if (c.options.activation == Activation::silu) {
        const V y = simd::load<V>(u), one = simd::broadcast<V>(A(1)), slope = sigmoid(y);
        x = x * slope * simd::fma(y, one - slope, one);
    }
    return x;
}

/// dc of `count` rows (eq. 9 to 13), and the sums of the first `own` of them over rows.
template <class T, class A>
struct GradientBody {
    template <class Set>
    static INTERSTATE_INLINE void run(const CpuHead<A>& c, Index count, Index own, const T* dy, Index stride_row,
                                      Index stride_channel, A* dc, A* sums) {
        using V = simd::Native<Set, A>;
        const Index row = c.planes.row(), W = c.planes.width;
        const bool normed = c.options.l2 || c.options.rms;
        A *const u = c.temporary, *const s = u + row, *const flat = s + row, *const g = flat + row;
        A* const conv_sums = sums + 3 * row;
        for (Index t = 0; t < count; ++t) {
            const A sum = head_row<Set>(c, t, u, s);
            const A gamma = A(1) / std::sqrt(c.slope * sum + c.offset);
            const V scaled = simd::broadcast<V>(gamma);
            load_row<Set>(dy + t * stride_row, stride_channel, c.planes, flat, g);
            V dot = simd::broadcast<V>(A(0));
            for (Index i = 0; i < row; i += V::lanes) {
                const V si = simd::load<V>(s + i);
                V gi = simd::load<V>(g + i);
                if (c.scale) {
                    if (t < own) {
                        add_to(sums + i, gi * si * scaled);
                        add_to(sums + row + i, gi);
                    }
                    gi = gi * simd::load<V>(c.scale + i);
                    simd::store(g + i, gi);
                }
                dot = simd::fma(gi, si, dot);
            }
            // In an order in which nothing overflows where s is tiny.
            const V along = simd::broadcast<V>((c.slope * gamma * gamma) * (gamma * simd::reduce_add(dot)));
            A* const out = dc + t * row;
            for (Index i = 0; i < W; i += V::lanes) {
                V a = before_activation(c, normed, scaled, along, g + i, s + i, u + i);
                if (c.planes.rope != Rope::none) {
                    const Index j = W + i;
                    const V b = before_activation(c, normed, scaled, along, g + j, s + j, u + j);
                    const V cosine = simd::load<V>(c.angles + t * 2 * W + i);
                    const V sine = simd::load<V>(c.angles + t * 2 * W + j);
                    simd::store(out + j, simd::fnma(a, sine, b * cosine));
                    a = simd::fma(b, sine, a * cosine);
                }
                simd::store(out + i, a);
            }
            if (t >= own || c.taps == 0) continue;
            for (Index i = 0; i < row; i += V::lanes) {
                const V x = simd::load<V>(out + i);
                add_to(sums + 2 * row + i, x);
                for (Index k = 0; k < c.taps; ++k)
                    add_to(conv_sums + k * row + i, x * simd::load<V>(c.input + (t + k) * row + i));
            }
        }
    }
};

/// Row i - past of the gradient of what the convolution reads, for dc of rows [0, count) (eq. 15).
template <class T, class A>
struct TransposedBody {
    template <class Set>
    static INTERSTATE_INLINE void run(const CpuHead<A>& c, Index i, Index count, const A* dc, const T* addend,
                                      Index addend_stride, T* dx, Index stride) {
        using V = simd::Native<Set, A>;
        const Index row = c.planes.row();
        A *const sum = c.temporary, *const flat = sum + row, *const more = flat + row;
        if (addend) load_row<Set>(addend, addend_stride, c.planes, flat, more);
        for (Index j = 0; j < row; j += V::lanes) {
            V x = addend ? simd::load<V>(more + j) : simd::broadcast<V>(A(0));
            if (c.taps == 0) x = x + simd::load<V>(dc + i * row + j);
            for (Index k = std::max<Index>(0, i - count + 1); k < c.taps && k <= i; ++k)
                x = simd::fma(simd::load<V>(c.weight + k * row + j), simd::load<V>(dc + (i - k) * row + j), x);
            simd::store(sum + j, x);
        }
        store_row<Set>(dx, stride, c.planes, flat, sum);
    }
};

template <class T, class A>
struct LoadBody {
    template <class Set>
    static INTERSTATE_INLINE void run(const T* x, Index stride, const Planes& p, A* flat, A* row) {
        load_row<Set>(x, stride, p, flat, row);
    }
};

/// What a stretch does: its rows, sequence by sequence, and every head of them.
template <class T, class P>
class CpuStretch {
  public:
    using A = acc_t<T>;

    CpuStretch(const cpu& exec, const Options& options, const Inputs<T, P>& in, const CpuLayout<A>& layout, int thread)
        : exec_(exec), options_(options), in_(in), s_(shape_of(in)), planes_(options, s_), layout_(layout),
          w_(layout.thread(thread)) {}

    void forward(Index stretch, const Outputs<T>& out) const {
        walk(stretch, out.y, [&](const Sequence& q, Index begin, Index end) {
            make_angles(q, begin, end - begin);
            for (Index h = 0; h < s_.heads; ++h) {
                const CpuHead<A> head = load_head(q, begin, end - begin, h);
                simd::run_body<ForwardBody<T, A>>(exec_.isa, head, end - begin, row(out.y, begin) + h * out.y.stride[2],
                                                  out.y.stride[1], out.y.stride[3]);
            }
        });
    }

    /// Adds its sums to those of a group, (H, taps + 3, row).
    void backward(Index stretch, const Upstream<T>& up, const Grads<T, P>& grads, double* group) const {
        const Index size = (s_.taps + 3) * planes_.row(), past = s_.past();
        walk(stretch, grads.x, [&](const Sequence& q, Index begin, Index end) {
            const Index own = end - begin, count = std::min(end + past, q.end) - begin;
            make_angles(q, begin, count);
            for (Index h = 0; h < s_.heads; ++h) {
                const CpuHead<A> head = load_head(q, begin, count, h);
                std::fill_n(w_.sums, size, A(0));
                simd::run_body<GradientBody<T, A>>(exec_.isa, head, count, own,
                                                   row(up.y, begin) + h * up.y.stride[2], up.y.stride[1], up.y.stride[3],
                                                   w_.rows, w_.sums);
                for (Index i = 0; i < size; ++i) group[h * size + i] += static_cast<double>(w_.sums[i]);
                // Row i of what the convolution reads, the first `past` being conv0's; the stretch has dc from `begin` on.
                const Index first = begin == q.begin && grads.conv0 ? 0 : past;
                for (Index i = first; i < past + own; ++i) {
                    const Index beyond = begin - q.begin + i - (q.end - q.begin);
                    const T* const addend = up.convT && beyond >= 0 ? &up.convT(q.index, beyond, h, 0) : nullptr;
                    const bool state = i < past;
                    if (!state && !grads.x) break;
                    T* const to = state ? &grads.conv0(q.index, i, h, 0)
                                        : row(grads.x, begin + i - past) + h * grads.x.stride[2];
                    simd::run_body<TransposedBody<T, A>>(exec_.isa, head, i, count, w_.rows, addend, up.convT.stride[3], to,
                                                         state ? grads.conv0.stride[3] : grads.x.stride[3]);
                }
            }
        });
    }

  private:
    /// f(sequence, begin, end) for the sequences of a stretch; rows of none are zeroed in `zero`.
    template <class F>
    void walk(Index stretch, const View<T, 4>& zero, F&& f) const {
        const Index last = std::min((stretch + 1) * stretch_rows, s_.rows());
        for (Index n = stretch * stretch_rows; n < last;) {
            const Sequence q = sequence_of(in_.cu_seqlens, s_, n);
            if (q.index < 0) {
                for (Index h = 0; zero && h < s_.heads; ++h)
                    for (Index r = 0; r < s_.features; ++r) row(zero, n)[h * zero.stride[2] + r * zero.stride[3]] = T(0.0f);
                ++n;
                continue;
            }
            const Index end = std::min(q.end, last);
            f(q, n, end);
            n = end;
        }
    }

    void make_angles(const Sequence& q, Index begin, Index count) const {
        if (options_.rope == Rope::none) return;
        const Index position = begin - q.begin + (in_.offset ? in_.offset(q.index) : 0);
        stretch_angles(options_, s_, planes_, layout_, w_.base, position, count, w_.angles);
    }

    CpuHead<A> load_head(const Sequence& q, Index begin, Index count, Index h) const {
        const Index size = planes_.row(), past = s_.past();
        for (Index i = 0; i < past + count; ++i) {
            const Index n = begin - past + i;
            A* const to = w_.input + i * size;
            if (n >= q.begin)
                simd::run_body<LoadBody<T, A>>(exec_.isa, row(in_.x, n) + h * in_.x.stride[2], in_.x.stride[3], planes_,
                                               w_.temporary, to);
            else if (in_.conv0)
                simd::run_body<LoadBody<T, A>>(exec_.isa, &in_.conv0(q.index, n - q.begin + past, h, 0), in_.conv0.stride[3],
                                               planes_, w_.temporary, to);
            else
                std::fill_n(to, size, A(0));
        }
        const Norm norm = norm_of(options_, s_.features);
        return {.options = options_,
                .planes = planes_,
                .taps = s_.taps,
                .past = past,
                .slope = static_cast<A>(norm.slope),
                .offset = static_cast<A>(norm.offset),
                .weight = layout_.weight + h * s_.taps * size,
                .conv_bias = layout_.conv_bias + h * size,
                .scale = options_.rms ? layout_.scale : nullptr,
                .bias = options_.rms ? layout_.bias + h * size : nullptr,
                .input = w_.input,
                .angles = w_.angles,
                .temporary = w_.temporary};
    }

    const cpu& exec_;
    const Options& options_;
    const Inputs<T, P>& in_;
    Shape s_;
    Planes planes_;
    const CpuLayout<A>& layout_;
    typename CpuLayout<A>::Thread w_;
};

/// A few microseconds of work are not worth starting threads for.
inline int threads_for(const cpu& exec, const Shape& s) {
    return s.rows() * s.heads * s.features < (Index{1} << 14) ? 1 : exec.threads;
}

/// convT: the last rows of conv0 and x, from the oldest on, because a step writes where conv0 is.
template <class T, class P>
void final_states(const Inputs<T, P>& in, const Shape& s, const View<T, 4>& convT) {
    for (Index q = 0; convT && q < s.states(); ++q) {
        const RowRange rows = rows_of(in.cu_seqlens, q, s.length);
        const Index b = s.packed() ? 0 : q, length = rows.end - rows.begin;
        for (Index j = 0; j < s.past(); ++j)
            for (Index h = 0; h < s.heads; ++h)
                for (Index r = 0; r < s.features; ++r) {
                    const Index i = length + j;
                    convT(q, j, h, r) = i >= s.past()  ? in.x(b, rows.begin + i - s.past(), h, r)
                                        : in.conv0 ? in.conv0(q, i, h, r)
                                                   : T(0.0f);
                }
    }
}

template <class T, class P>
void cpu_forward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Planes planes(options, s);
    Arena arena(ws.data);
    const CpuLayout<A> w(arena, options, s, pass::forward, exec.threads);
    if (s.rows() > 0) {
        pack_params(s, planes, options, in.params, w);
        small_angles(options, s, planes, w);
        parallel_for(CpuLayout<A>::stretches(s), threads_for(exec, s), [&](Index stretch, int thread) {
            CpuStretch<T, P>(exec, options, in, w, thread).forward(stretch, out);
        });
    }
    final_states(in, s, out.convT);
}

template <class T, class P>
void cpu_backward(const cpu& exec, const Options& options, const Inputs<T, P>& in, const Upstream<T>& upstream,
                  const Grads<T, P>& grads, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Planes planes(options, s);
    Arena arena(ws.data);
    const CpuLayout<A> w(arena, options, s, pass::backward, exec.threads);
    const Index row = planes.row(), taps = s.taps, size = (taps + 3) * row;
    const Index stretches = CpuLayout<A>::stretches(s), groups = CpuLayout<A>::group_count(s);
    if (s.rows() > 0) {
        pack_params(s, planes, options, in.params, w);
        small_angles(options, s, planes, w);
        std::fill_n(w.groups, groups * s.heads * size, 0.0);
        parallel_for(groups, threads_for(exec, s), [&](Index group, int thread) {
            const CpuStretch<T, P> task(exec, options, in, w, thread);
            for (Index i = stretches * group / groups; i < stretches * (group + 1) / groups; ++i)
                task.backward(i, upstream, grads, w.groups + group * s.heads * size);
        });
    }
    // A sequence without rows passes its state through.
    for (Index q = 0; grads.conv0 && q < s.states(); ++q) {
        const RowRange rows = rows_of(in.cu_seqlens, q, s.length);
        if (rows.begin < rows.end) continue;
        for (Index j = 0; j < s.past(); ++j)
            for (Index h = 0; h < s.heads; ++h)
                for (Index r = 0; r < s.features; ++r)
                    grads.conv0(q, j, h, r) = upstream.convT ? upstream.convT(q, j, h, r) : T(0.0f);
    }
    const auto total = [&](Index h, Index which, Index r) {
        double sum = 0.0;
        for (Index group = 0; group < groups; ++group)
            sum += w.groups[(group * s.heads + h) * size + which * row + planes.place(r)];
        return sum;
    };
    for (Index r = 0; r < s.features; ++r) {
        double scale = 0.0;
        for (Index h = 0; h < s.heads; ++h) {
            if (grads.params.scale) scale += total(h, 0, r);
            if (grads.params.bias) grads.params.bias(h, r) = static_cast<P>(total(h, 1, r));
            if (grads.params.conv_bias) grads.params.conv_bias(h, r) = static_cast<P>(total(h, 2, r));
            for (Index k = 0; grads.params.conv_weight && k < taps; ++k)
                grads.params.conv_weight(h, r, k) = static_cast<P>(total(h, 3 + k, r));
        }
        if (grads.params.scale) grads.params.scale(r) = static_cast<P>(scale);
    }
}

}  // namespace feature_map::detail
}  // namespace interstate::inline INTERSTATE_ABI
