// Any dtype and any head dimension, without tensor cores: a block has a row, 128 keys or queries at once and 128 columns at
// once, and forms the scores again for more columns. For float64, and for heads wider than the tiles.
#pragma once

#include <attention/detail/cuda_forward.cuh>
#include <attention/detail/cuda_statistics.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

inline constexpr int simple_threads = 128;

/// The largest, or the sum, over a block; every thread gets it.
template <bool largest, class A>
__device__ A over_block(A x) {
    __shared__ A parts[simple_threads / 32];
    const auto join = [](A a, A b) { return largest ? (a > b ? a : b) : a + b; };
    for (int step = 16; step > 0; step /= 2) x = join(x, __shfl_xor_sync(0xffffffffu, x, step));
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = parts[0];
    for (int i = 1; i < simple_threads / 32; ++i) x = join(x, parts[i]);
    return x;
}

/// The product of two rows, the second in batch row `of_y`.
template <class A, class T>
__device__ A dot(const View<const T, 4>& x, Index b, Index i, Index h, const View<const T, 4>& y, Index of_y, Index j, Index kv) {
    A sum = 0;
    const T *left = &x(b, i, h, 0), *right = &y(of_y, j, kv, 0);
    for (Index d = 0; d < x.extent[3]; ++d) sum += device::load_as<A>(left[d * x.stride[3]]) * device::load_as<A>(right[d * y.stride[3]]);
    return sum;
}

template <class A, class T>
__device__ A dot(const View<const T, 4>& x, Index b, Index i, Index h, const View<const T, 4>& y, Index j, Index kv) {
    return dot<A>(x, b, i, h, y, b, j, kv);
}

/// A policy's channels for the simple kernels, any number of them. With g they are stored without decay. The difference of two Sums is a double.
template <class T, class Sum = double>
struct GeneralChannels {
    using A = acc_t<T>;
    static constexpr bool adds_term = false;
    static constexpr int channels = -1;
    View<const T, 4> c, b;        // (B, Lq, Hq, ds), (B, Lk, Hkv, ds)
    View<const Sum, 3> g;         // (B, Lk, Hkv), the sum of log_alpha; null: no decay
    View<const A, 1> strength;    // (Hq)
    View<A, 4> dc, db;
    /// exp(g of a query - g of a key), rows of the key tensors.
    __device__ A decay(Index batch, Index query, Index key, Index kv) const {
        return g ? static_cast<A>(exp(g(batch, query, kv) - g(batch, key, kv))) : A(1);
    }
};

/// A block's row of an axis of `rows`, in one head.
__device__ inline bool find_row(Place& at, const Shape& s, const View<const std::int32_t, 1>& cu, Index rows, Index heads, Index block) {
    const Index row = block % rows;
    at.head = static_cast<int>(block / rows % heads);
    at.batch = block / rows / heads;
    at.query0 = at.key0 = 0;
    at.queries = static_cast<int>(s.queries);
    at.keys = static_cast<int>(s.keys);
    at.first = static_cast<int>(row);
    if (!s.packed()) return true;
    Index low = 0, high = s.sequences;  // the first sequence that ends behind the row
    while (low < high) {
        const Index middle = (low + high) / 2;
        (cu(middle + 1) > row ? high : low) = cu(middle + 1) > row ? middle : middle + 1;
    }
    if (low == s.sequences) return false;
    const RowRange range = device::checked_rows(cu, low, rows);
    if (row < range.begin || row >= range.end) return false;
    at.query0 = at.key0 = range.begin;
    at.queries = at.keys = static_cast<int>(range.end - range.begin);
    at.first = static_cast<int>(row - range.begin);
    return true;
}

template <class Policy>
__device__ Index channels_of(const Policy& policy) {
    if constexpr (Policy::channels != 0) return policy.c.extent[3];
    return 0;
}

/// What s and dp of one pair of rows become (eq. 2 and 9, or 3 and 10): `lse2` is the bias, in powers of two, of a sigmoid.
template <class A>
__device__ void weigh_simply(bool softmax, A& s, A& dp, A c, A lse2, A minus) {
    if (softmax) {
        s = exp2(s * c + lse2);
        dp = s * (dp - minus);
    } else {
        s = A(1) / (A(1) + exp2(-(s * c + lse2)));
        dp = s * (A(1) - s) * dp;
    }
}

inline namespace INTERSTATE_KERNELS {

template <class T, class Policy>
__global__ __launch_bounds__(simple_threads) void simple_forward_kernel(const __grid_constant__ Call<T, Policy> call, const View<T, 4> o,
                                                                       const View<acc_t<T>, 3> lse, const View<bf16, 4> rest) {
    using A = acc_t<T>;
    __shared__ A weights[simple_threads];
    Place at;
    if (!find_row(at, call.shape, call.in.cu_seqlens, call.shape.queries, call.shape.query_heads, blockIdx.x)) return;
    const Index kv = at.head / call.shape.group(), row = at.query0 + at.first;
    const int position = at.first + at.offset(), begin = call.mask.first_key(position), end = call.mask.end_key(position, at.keys);
    const A c = static_cast<A>(call.scale * log2_e), bias = call.softmax ? A(0) : static_cast<A>(call.bias(at.head) * log2_e);
    Index first = 0;
    do {
        A largest = -A(INFINITY), total = 0, sum = 0;
        const Index column = first + threadIdx.x;
        for (int j0 = begin; j0 < end; j0 += simple_threads) {
            const int j = j0 + static_cast<int>(threadIdx.x), there = min(simple_threads, end - j0);
            A s = -A(INFINITY);
            if (j < end) {
                s = dot<A>(call.in.q, at.batch, row, at.head, call.in.k, at.key0 + j, kv) * c;
                if constexpr (Policy::adds_term) s += static_cast<A>(call.policy.score_term(at.head, position, j) * log2_e);
                if constexpr (Policy::channels != 0)
                    s += static_cast<A>(log2_e) * call.policy.strength(at.head) * call.policy.decay(at.batch, at.key0 + position, at.key0 + j, kv) *
                         dot<A>(call.policy.c, at.batch, row, at.head, call.policy.b, at.key0 + j, kv);
            }
            A shrink = 1;
            if (call.softmax) {
                const A top = over_block<true>(s), now = top > largest ? top : largest, shift = now == -A(INFINITY) ? A(0) : now;
                shrink = exp2(largest - shift);
                s = exp2(s - shift);
                total = total * shrink + over_block<false>(j < end ? s : A(0));
                largest = now;
            } else {
                A unused = 0;
                weigh_simply<A>(false, s, unused, A(1), bias, A(0));
            }
            __syncthreads();
            weights[threadIdx.x] = s;
            __syncthreads();
            sum *= shrink;
            if (column < o.extent[3])
                for (int i = 0; i < there; ++i) sum += weights[i] * device::load_as<A>(call.in.v(at.batch, at.key0 + j0 + i, kv, column));
        }
        const A factor = !call.softmax ? A(1) : total == A(0) ? A(0) : A(1) / total;
        if (column < o.extent[3]) o(at.batch, row, at.head, column) = device::store_as<T>(sum * factor);
        if constexpr (sizeof(T) == 2)
            if (rest && column < o.extent[3]) rest(at.batch, row, at.head, column) = bf16(rounding_of<T>(sum * factor));
        if (lse && first == 0 && threadIdx.x == 0) lse(at.batch, row, at.head) = total == A(0) ? -A(INFINITY) : (largest + log2(total)) * A(ln_2);
        first += simple_threads;
    } while (first < o.extent[3]);
}

template <class T, class Policy>
__global__ __launch_bounds__(simple_threads) void simple_query_gradient_kernel(const __grid_constant__ Call<T, Policy> call,
                                                                              const View<const T, 4> dout,
                                                                              const RowStatistics<acc_t<T>>* statistics, const View<T, 4> dq) {
    using A = acc_t<T>;
    __shared__ A gradients[simple_threads], decayed[simple_threads];
    Place at;
    if (!find_row(at, call.shape, call.in.cu_seqlens, call.shape.queries, call.shape.query_heads, blockIdx.x)) return;
    const Index kv = at.head / call.shape.group(), row = at.query0 + at.first;
    const int position = at.first + at.offset(), begin = call.mask.first_key(position), end = call.mask.end_key(position, at.keys);
    const A c = static_cast<A>(call.scale * log2_e);
    RowStatistics<A> x{call.softmax ? A(0) : static_cast<A>(call.bias(at.head) * log2_e), A(0)};
    if (call.softmax) x = statistics[(at.batch * call.shape.query_heads + at.head) * call.shape.queries + row];
    const Index wide_q = dq ? dq.extent[3] : 0, columns = channels_of(call.policy) > wide_q ? channels_of(call.policy) : wide_q;
    for (Index first = 0; first < columns; first += simple_threads) {
        const Index column = first + threadIdx.x;
        A sum = 0, sum_c = 0;
        for (int j0 = begin; j0 < end; j0 += simple_threads) {
            const int j = j0 + static_cast<int>(threadIdx.x), there = min(simple_threads, end - j0);
            __syncthreads();
            if (j < end) {
                A s = dot<A>(call.in.q, at.batch, row, at.head, call.in.k, at.key0 + j, kv);
                A dp = dot<A>(dout, at.batch, row, at.head, call.in.v, at.key0 + j, kv);
                if constexpr (Policy::adds_term) s += static_cast<A>(call.policy.score_term(at.head, position, j) / call.scale);
                A decay = 0;
                if constexpr (Policy::channels != 0) {
                    decay = call.policy.decay(at.batch, at.key0 + position, at.key0 + j, kv);
                    s += call.policy.strength(at.head) / call.scale * decay * dot<A>(call.policy.c, at.batch, row, at.head, call.policy.b, at.key0 + j, kv);
                }
                weigh_simply(call.softmax, s, dp, c, x.lse2, x.minus);
                gradients[threadIdx.x] = dp;
                decayed[threadIdx.x] = dp * decay;
            }
            __syncthreads();
            if constexpr (Policy::channels != 0)
                if (column < channels_of(call.policy))
                    for (int i = 0; i < there; ++i) sum_c += decayed[i] * device::load_as<A>(call.policy.b(at.batch, at.key0 + j0 + i, kv, column));
            if (column < wide_q)
                for (int i = 0; i < there; ++i) sum += gradients[i] * device::load_as<A>(call.in.k(at.batch, at.key0 + j0 + i, kv, column));
        }
        if constexpr (Policy::channels != 0)
            if (column < channels_of(call.policy)) call.policy.dc(at.batch, row, at.head, column) = sum_c;
        if (column < wide_q) dq(at.batch, row, at.head, column) = device::store_as<T>(sum * static_cast<A>(call.scale));
    }
}

template <class T, class Policy>
__global__ __launch_bounds__(simple_threads) void simple_key_gradient_kernel(const __grid_constant__ Call<T, Policy> call,
                                                                            const View<const T, 4> dout,
                                                                            const RowStatistics<acc_t<T>>* statistics, const View<T, 4> dk,
                                                                            const View<T, 4> dv) {
    using A = acc_t<T>;
    __shared__ A weights[simple_threads], gradients[simple_threads], decayed[simple_threads];
    Place at;
    if (!find_row(at, call.shape, call.in.cu_seqlens, call.shape.keys, call.shape.kv_heads, blockIdx.x)) return;
    const Index kv = at.head, row = at.key0 + at.first, group = call.shape.group();
    const int begin = max(call.mask.first_position(at.first) - at.offset(), 0),
              end = min(call.mask.end_position(at.first, at.keys) - at.offset(), at.queries);
    const A c = static_cast<A>(call.scale * log2_e);
    const Index wide_k = dk ? dk.extent[3] : 0, wide_v = dv ? dv.extent[3] : 0, wide_b = channels_of(call.policy),
                columns = max(max(wide_k, wide_v), wide_b);
    for (Index first = 0; first < columns; first += simple_threads) {
        const Index column = first + threadIdx.x;
        A sum_k = 0, sum_v = 0, sum_b = 0;
        for (Index h = kv * group; h < (kv + 1) * group; ++h)
            for (int i0 = begin; i0 < end; i0 += simple_threads) {
                const int i = i0 + static_cast<int>(threadIdx.x), there = min(simple_threads, end - i0);
                const Index query = at.query0 + i;
                __syncthreads();
                if (i < end) {
                    A s = dot<A>(call.in.q, at.batch, query, h, call.in.k, row, kv), dp = dot<A>(dout, at.batch, query, h, call.in.v, row, kv);
                    if constexpr (Policy::adds_term) s += static_cast<A>(call.policy.score_term(static_cast<int>(h), i + at.offset(), at.first) / call.scale);
                    RowStatistics<A> x{call.softmax ? A(0) : static_cast<A>(call.bias(static_cast<int>(h)) * log2_e), A(0)};
                    if (call.softmax) x = statistics[(at.batch * call.shape.query_heads + h) * call.shape.queries + query];
                    A decay = 0;
                    if constexpr (Policy::channels != 0) {
                        decay = call.policy.strength(h) * call.policy.decay(at.batch, at.key0 + i + at.offset(), row, kv);
                        s += decay / call.scale * dot<A>(call.policy.c, at.batch, query, h, call.policy.b, row, kv);
                    }
                    weigh_simply(call.softmax, s, dp, c, x.lse2, x.minus);
                    weights[threadIdx.x] = s;
                    gradients[threadIdx.x] = dp;
                    decayed[threadIdx.x] = dp * decay;
                }
                __syncthreads();
                for (int n = 0; n < there; ++n) {
                    if (column < wide_k) sum_k += gradients[n] * device::load_as<A>(call.in.q(at.batch, at.query0 + i0 + n, h, column));
                    if (column < wide_v) sum_v += weights[n] * device::load_as<A>(dout(at.batch, at.query0 + i0 + n, h, column));
                    if constexpr (Policy::channels != 0)
                        if (column < wide_b) sum_b += decayed[n] * device::load_as<A>(call.policy.c(at.batch, at.query0 + i0 + n, h, column));
                }
            }
        if (column < wide_k) dk(at.batch, row, kv, column) = device::store_as<T>(sum_k * static_cast<A>(call.scale));
        if (column < wide_v) dv(at.batch, row, kv, column) = device::store_as<T>(sum_v);
        if constexpr (Policy::channels != 0)
            if (column < wide_b) call.policy.db(at.batch, row, kv, column) = sum_b;
    }
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
