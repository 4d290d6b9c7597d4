// The feature map on the GPU for heads and convolutions of any size: a block a head, one row after the other.
//
// Every row is gone through twice, once for the sums of the norms and once for its result, and x is read again for every
// tap. Backward writes dc, in the accumulator's dtype, for a kernel that turns it into dx.
#pragma once

#include <feature_map/detail/cuda_problem.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map::detail {

inline constexpr int general_threads = 256;
inline constexpr Index general_span = 32;  // rows of a block

inline Index general_parts(const Shape& s) { return ceil_div(s.rows(), general_span); }

inline namespace INTERSTATE_KERNELS {

/// One head of one row.
template <class T>
struct GeneralRow {
    using A = acc_t<T>;
    const Problem<T>& p;
    RowInfo q;
    Index t, h;

    __device__ A input(Index from, Index r) const {
        if (from >= 0) return device::load_as<A>(token(p.x, p.s.packed(), q, from, h)[r * p.x.stride[3]]);
        return p.conv0 ? device::load_as<A>(state_row(p.conv0, q.index, p.s.past() + from, h)[r * p.conv0.stride[3]]) : A(0);
    }
    __device__ A convolved(Index r) const {
        if (p.s.taps == 0) return input(t, r);
        A c = p.conv_bias.data ? p.conv_bias.template get<A>(h, r) : A(0);
        for (Index k = 0; k < p.s.taps; ++k) c += p.weight.template get<A>(h, r, k) * input(t - p.s.past() + k, r);
        return c;
    }
    /// Channels, cosine and sine of pair i; without RoPE, channel i alone (second is then -1).
    struct Pair {
        Index first, second;
        A cosine, sine;
    };
    __device__ Pair pair(Index i) const {
        if (p.rope == Rope::none) return {i, -1, A(1), A(0)};
        Pair pair;
        turn(position_of(p, q, t), frequency(p.base, p.s.features, i), pair.cosine, pair.sine);
        const bool split = p.rope == Rope::half_split;
        pair.first = split ? i : 2 * i;
        pair.second = split ? i + p.s.features / 2 : 2 * i + 1;
        return pair;
    }
    /// u of both channels of a pair (eq. 2).
    __device__ void turned(const Pair& pair, A (&u)[2]) const {
        const A a = convolved(pair.first), b = pair.second >= 0 ? convolved(pair.second) : A(0);
        u[0] = a * pair.cosine - b * pair.sine;
        u[1] = a * pair.sine + b * pair.cosine;
    }
    __device__ A activated(A u) const { return p.silu ? u * sigmoid(u) : u; }
};

/// The sum over a block of two numbers a thread, in a fixed order; all threads get it.
template <class A>
__device__ void block_sum(A& x, A& y) {
    __shared__ A part[2][general_threads / 32];
    for (int step = 16; step > 0; step /= 2) {
        x += __shfl_xor_sync(0xffffffffu, x, step);
        y += __shfl_xor_sync(0xffffffffu, y, step);
    }
    __syncthreads();  // the last sum has been read
    if (threadIdx.x % 32 == 0) part[0][threadIdx.x / 32] = x, part[1][threadIdx.x / 32] = y;
    __syncthreads();
    x = y = A(0);
    for (int i = 0; i < general_threads / 32; ++i) x += part[0][i], y += part[1][i];
}

template <class T>
__global__ void __launch_bounds__(general_threads) general_forward_kernel(Problem<T> p) {
    using A = acc_t<T>;
    const Index h = blockIdx.y, first = static_cast<Index>(blockIdx.x) * general_span, R = p.s.features;
    const Index pairs = p.rope == Rope::none ? R : R / 2;
    for (Index n = first; n < min(first + general_span, p.s.rows()); ++n) {
        const RowInfo q = row_info(p, n);
        if (q.index < 0) {
            for (Index r = threadIdx.x; r < R; r += general_threads) p.y(0, n, h, r) = T(0.0f);
            continue;
        }
        const GeneralRow<T> row{p, q, n - q.begin, h};
        A sum = A(0), none = A(0);
        for (Index i = threadIdx.x; p.normed && i < pairs; i += general_threads) {
            const auto pair = row.pair(i);
            A u[2];
            row.turned(pair, u);
            for (int j = 0; j < (pair.second >= 0 ? 2 : 1); ++j) sum += row.activated(u[j]) * row.activated(u[j]);
        }
        block_sum(sum, none);
        const A gamma = p.normed ? inverse_root(p.slope * sum + p.norm_offset) : A(1);
        T* const y = token(p.y, p.s.packed(), q, row.t, h);
        for (Index i = threadIdx.x; i < pairs; i += general_threads) {
            const auto pair = row.pair(i);
            A u[2];
            row.turned(pair, u);
            for (int j = 0; j < (pair.second >= 0 ? 2 : 1); ++j) {
                const Index r = j == 0 ? pair.first : pair.second;
                A x = row.activated(u[j]) * gamma;
                if (p.scale.data) x *= p.scale.template get<A>(r);
                if (p.bias.data) x += p.bias.template get<A>(h, r);
                y[r * p.y.stride[3]] = device::store_as<T>(x);
                if (!p.convT || n + 1 != q.end) continue;
                // From the oldest on: a step writes where conv0 is.
                for (Index k = 0; k < p.s.past(); ++k)
                    state_row(p.convT, q.index, k, h)[r * p.convT.stride[3]] =
                        device::store_as<T>(row.input(q.end - q.begin + k - p.s.past(), r));
            }
        }
    }
}

/// dc (rows, H, R), and, if wanted, the sums over a block's rows. A thread has the same channels in every row.
template <class T>
__global__ void __launch_bounds__(general_threads)
    general_gradient_kernel(Problem<T> p, acc_t<T>* dc, PartialSums<acc_t<T>> sums) {
    using A = acc_t<T>;
    const Index h = blockIdx.y, first = static_cast<Index>(blockIdx.x) * general_span, R = p.s.features;
    const Index pairs = p.rope == Rope::none ? R : R / 2, size = p.s.heads * R;
    A* const to = sums.data ? sums.data + static_cast<Index>(blockIdx.x) * (p.s.taps + 3) * size + h * R : nullptr;
    for (Index i = threadIdx.x; to && i < pairs; i += general_threads)
        for (Index which = 0; which < p.s.taps + 3; ++which) {
            const bool split = p.rope == Rope::half_split;
            to[which * size + (p.rope == Rope::none || split ? i : 2 * i)] = A(0);
            if (p.rope != Rope::none) to[which * size + (split ? i + R / 2 : 2 * i + 1)] = A(0);
        }
    for (Index n = first; n < min(first + general_span, p.s.rows()); ++n) {
        const RowInfo q = row_info(p, n);
        if (q.index < 0) continue;
        const GeneralRow<T> row{p, q, n - q.begin, h};
        const T* const dy = token(p.dy, p.s.packed(), q, row.t, h);
        const auto upstream = [&](Index r) { return device::load_as<A>(dy[r * p.dy.stride[3]]); };
        const auto scale = [&](Index r) { return p.scale.data ? p.scale.template get<A>(r) : A(1); };
        A square = A(0), dot = A(0);
        for (Index i = threadIdx.x; p.normed && i < pairs; i += general_threads) {
            const auto pair = row.pair(i);
            A u[2];
            row.turned(pair, u);
            for (int j = 0; j < (pair.second >= 0 ? 2 : 1); ++j) {
                const Index r = j == 0 ? pair.first : pair.second;
                const A s = row.activated(u[j]);
                square += s * s;
                dot += upstream(r) * scale(r) * s;
            }
        }
        block_sum(square, dot);
        const A gamma = p.normed ? inverse_root(p.slope * square + p.norm_offset) : A(1);
        const A along = p.normed ? (p.slope * gamma * gamma) * (gamma * dot) : A(0);
        for (Index i = threadIdx.x; i < pairs; i += general_threads) {
            const auto pair = row.pair(i);
            A u[2], g[2] = {A(0), A(0)};
            row.turned(pair, u);
            const int channels = pair.second >= 0 ? 2 : 1;
            for (int j = 0; j < channels; ++j) {
                const Index r = j == 0 ? pair.first : pair.second;
                const A s = row.activated(u[j]), sigma = sigmoid(u[j]);
                if (to) {
                    to[r] += upstream(r) * s * gamma;
                    to[size + r] += upstream(r);
                }
                g[j] = upstream(r) * scale(r) * gamma - along * s;
                if (p.silu) g[j] *= sigma * (A(1) + u[j] * (A(1) - sigma));
            }
            const A a = g[0], b = g[1];
            g[0] = a * pair.cosine + b * pair.sine;  // eq. 13
            g[1] = b * pair.cosine - a * pair.sine;
            for (int j = 0; j < channels; ++j) {
                const Index r = j == 0 ? pair.first : pair.second;
                dc[(n * p.s.heads + h) * R + r] = g[j];
                if (!to) continue;
                to[2 * size + r] += g[j];
                for (Index k = 0; k < p.s.taps; ++k) to[(3 + k) * size + r] += g[j] * row.input(row.t - p.s.past() + k, r);
            }
        }
    }
}

/// dx and dconv0 from dc (eq. 15). A thread an element of dx; that of a sequence's first token also does its states'.
template <class T>
__global__ void general_transposed_kernel(Problem<T> p, const acc_t<T>* dc) {
    using A = acc_t<T>;
    const Index size = p.s.heads * p.s.features, at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= p.s.rows() * size) return;
    const Index n = at / size, h = at % size / p.s.features, r = at % p.s.features;
    const RowInfo q = row_info(p, n);
    if (q.index < 0) {
        if (p.dx) p.dx(0, n, h, r) = T(0.0f);
        return;
    }
    const Index length = q.end - q.begin, past = p.s.past();
    const auto gradient = [&](Index i) {  // of row i of [conv0, x]
        A de = p.s.taps == 0 ? dc[at] : A(0);
        for (Index k = 0; k < p.s.taps; ++k)
            if (i - k >= 0 && i - k < length)
                de += p.weight.template get<A>(h, r, k) * dc[((q.begin + i - k) * p.s.heads + h) * p.s.features + r];
        if (i >= length && p.dconvT) de += device::load_as<A>(state_row(p.dconvT, q.index, i - length, h)[r * p.dconvT.stride[3]]);
        return device::store_as<T>(de);
    };
    const Index t = n - q.begin;
    if (p.dx) token(p.dx, p.s.packed(), q, t, h)[r * p.dx.stride[3]] = gradient(past + t);
    for (Index i = 0; p.dconv0 && t == 0 && i < past; ++i) state_row(p.dconv0, q.index, i, h)[r * p.dconv0.stride[3]] = gradient(i);
}

template <class T>
Status general_forward(const cuda& exec, const Problem<T>& p) {
    return launch(exec, "general_forward_kernel", general_forward_kernel<T>,
                  {dim3(static_cast<unsigned>(general_parts(p.s)), static_cast<unsigned>(p.s.heads)), dim3(general_threads)}, p);
}
template <class T>
Status general_backward(const cuda& exec, const Problem<T>& p, acc_t<T>* dc, const PartialSums<acc_t<T>>& sums) {
    INTERSTATE_RETURN_IF_ERROR(
        launch(exec, "general_gradient_kernel", general_gradient_kernel<T>,
               {dim3(static_cast<unsigned>(general_parts(p.s)), static_cast<unsigned>(p.s.heads)), dim3(general_threads)}, p, dc, sums));
    if (!p.dx && !p.dconv0) return {};
    const Index blocks = ceil_div(p.s.rows() * p.s.heads * p.s.features, 256);
    INTERSTATE_RETURN_IF_ERROR(check_size("x: blocks of a grid", blocks));
    return launch(exec, "general_transposed_kernel", general_transposed_kernel<T>,
                  {dim3(static_cast<unsigned>(blocks)), dim3(256)}, p, static_cast<const acc_t<T>*>(dc));
}

}  // namespace INTERSTATE_KERNELS

}  // namespace feature_map::detail
}  // namespace interstate::inline INTERSTATE_ABI
