// Pairs of queries and keys on the GPU, and their gradients added up (docs/ops/component_attention.md, eq. 6 to 8): a block a row, 16 bytes
// at a time where strides and alignment allow it. Both move bytes and no more.
#pragma once

#include <component_attention/detail/pairs.hpp>
#include <interstate/cuda/launch.cuh>
#include <interstate/cuda/rows.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace component_attention::detail {
inline namespace INTERSTATE_KERNELS {

inline constexpr int pair_threads = 256;

/// V elements of a row, and where they are.
template <class T, int V>
struct alignas(V * sizeof(T)) Unit {
    T x[V];
};
template <int V, class T>
__device__ auto& unit_at(const View<T, 4>& x, Index b, Index t, Index h, Index d) {
    using U = std::conditional_t<std::is_const_v<T>, const Unit<std::remove_const_t<T>, V>, Unit<T, V>>;
    return *reinterpret_cast<U*>(&x(b, t, h, d));
}

template <class T, int V>
__global__ __launch_bounds__(pair_threads) void pack_kernel(Inputs<T> in, Shape s, float sign, View<T, 4> q, View<T, 4> k, View<T, 4> v,
                                                            int pair_units, int value_units) {
    const Index b = blockIdx.x / s.queries, t = blockIdx.x % s.queries;
    const int group = static_cast<int>(s.group());
    for (int i = static_cast<int>(threadIdx.x); i < pair_units; i += pair_threads) {
        const int units = static_cast<int>(s.head_dim) / V, h = i / units;
        const Index d = i % units * V;
        const Unit<T, V> of_q = unit_at<V>(in.q, b, t, h, d);
        Unit<T, V> of_k = unit_at<V>(in.k, b, t, h / group, d);
        unit_at<V>(q, b, t, h, d) = of_q;
        unit_at<V>(k, b, t, h, s.head_dim + d) = of_q;
        unit_at<V>(k, b, t, h, d) = of_k;
#pragma unroll
        for (int e = 0; e < V; ++e) of_k.x[e] = device::store_as<T>(static_cast<acc_t<T>>(sign) * device::load_as<acc_t<T>>(of_k.x[e]));
        unit_at<V>(q, b, t, h, s.head_dim + d) = of_k;
    }
    for (int i = static_cast<int>(threadIdx.x); i < value_units; i += pair_threads) {
        const int units = static_cast<int>(s.value_dim) / V, h = i / units;
        unit_at<V>(v, b, t, h, i % units * V) = unit_at<V>(in.v, b, t, h / group, i % units * V);
    }
}

template <class T, int V>
__global__ __launch_bounds__(pair_threads) void add_pairs_kernel(Shape s, float sign, View<const T, 4> dq, View<const T, 4> dk,
                                                                 View<const T, 4> dv, Grads<T> grads, int pair_units, int value_units) {
    using A = acc_t<T>;
    const Index b = blockIdx.x / s.queries, t = blockIdx.x % s.queries;
    const int group = static_cast<int>(s.group());
    for (int i = static_cast<int>(threadIdx.x); i < pair_units; i += pair_threads) {
        const int units = static_cast<int>(s.head_dim) / V, kv = i / units;
        const Index d = i % units * V;
        A of_k[V] = {};
        for (int h = kv * group; h < (kv + 1) * group; ++h) {
            const Unit<T, V> as_query = unit_at<V>(dq, b, t, h, d), turned_query = unit_at<V>(dk, b, t, h, s.head_dim + d);
            const Unit<T, V> as_key = unit_at<V>(dk, b, t, h, d), turned_key = unit_at<V>(dq, b, t, h, s.head_dim + d);
            Unit<T, V> of_q;
#pragma unroll
            for (int e = 0; e < V; ++e) {
                of_q.x[e] = device::store_as<T>(device::load_as<A>(as_query.x[e]) + device::load_as<A>(turned_query.x[e]));
                of_k[e] += device::load_as<A>(as_key.x[e]) + static_cast<A>(sign) * device::load_as<A>(turned_key.x[e]);
            }
            if (grads.q) unit_at<V>(grads.q, b, t, h, d) = of_q;
        }
        if (!grads.k) continue;
        Unit<T, V> sum;
#pragma unroll
        for (int e = 0; e < V; ++e) sum.x[e] = device::store_as<T>(of_k[e]);
        unit_at<V>(grads.k, b, t, kv, d) = sum;
    }
    for (int i = static_cast<int>(threadIdx.x); i < value_units; i += pair_threads) {
        const int units = static_cast<int>(s.value_dim) / V, kv = i / units;
        const Index d = i % units * V;
        A of_v[V] = {};
        for (int h = kv * group; h < (kv + 1) * group; ++h) {
            const Unit<T, V> x = unit_at<V>(dv, b, t, h, d);
#pragma unroll
            for (int e = 0; e < V; ++e) of_v[e] += device::load_as<A>(x.x[e]);
        }
        Unit<T, V> sum;
#pragma unroll
        for (int e = 0; e < V; ++e) sum.x[e] = device::store_as<T>(of_v[e]);
        unit_at<V>(grads.v, b, t, kv, d) = sum;
    }
}

/// A grid has fewer than 2^31 blocks, and a block of a row counts its elements in 32 bits.
inline Status check_grid(const Shape& s) {
    const Index most = std::max(s.batch * s.queries, s.query_heads * std::max(2 * s.head_dim, s.value_dim));
    if (most < (Index{1} << 31)) return {};
    return Status::error(StatusCode::unsupported, "component_attention on cuda: %lld rows, or elements of a row, must be below 2^31",
                         static_cast<long long>(most));
}

struct DeviceRows {
    const cuda& exec;

    std::size_t bytes(const attention::Options& options, const Shape& s, pass which) const {
        return attention::workspace_size(exec, options, s, which);
    }

    /// f(std::integral_constant<int, V>) with the elements that move at once.
    template <class T, class F>
    Status with_units(bool wide, F&& f) const {
        if (wide) return f(std::integral_constant<int, 16 / sizeof(T)>{});
        return f(std::integral_constant<int, 1>{});
    }
    template <class T>
    Status pack(const Options& options, const Inputs<T>& in, const PairMemory<T>& memory) const {
        const Shape& s = memory.s;
        const bool wide = device::moves_wide(in.q, s.head_dim) && device::moves_wide(in.k, s.head_dim) &&
                          (!memory.groups || device::moves_wide(in.v, s.value_dim));
        return with_units<T>(wide, [&](auto V) {
            return launch(exec, "component_attention.cuda pack", pack_kernel<T, V()>,
                          {dim3(static_cast<unsigned>(s.batch * s.queries)), dim3(pair_threads)}, in, s,
                          options.component == Component::routing ? -1.0f : 1.0f, memory.pairs(memory.q), memory.pairs(memory.k),
                          memory.rows(memory.v, s.value_dim), static_cast<int>(s.query_heads * s.head_dim / V()),
                          memory.groups ? static_cast<int>(s.query_heads * s.value_dim / V()) : 0);
        });
    }
    template <class T>
    Status add(const Options& options, const PairMemory<T>& memory, const Grads<T>& grads) const {
        const Shape& s = memory.s;
        const bool pairs = grads.q || grads.k, values = grads.v && memory.groups;
        if (!pairs && !values) return {};
        const auto moves = [](const View<T, 4>& x, Index width) { return !x || device::moves_wide(x, width); };
        const bool wide = s.head_dim % (16 / static_cast<Index>(sizeof(T))) == 0 && moves(grads.q, s.head_dim) &&
                          moves(grads.k, s.head_dim) && (!values || moves(grads.v, s.value_dim));
        return with_units<T>(wide, [&](auto V) {
            const auto read = [](const View<T, 4>& x) { return View<const T, 4>(x); };
            return launch(exec, "component_attention.cuda add", add_pairs_kernel<T, V()>,
                          {dim3(static_cast<unsigned>(s.batch * s.queries)), dim3(pair_threads)}, s,
                          options.component == Component::routing ? -1.0f : 1.0f, read(memory.pairs(memory.dq)),
                          read(memory.pairs(memory.dk)), read(memory.rows(memory.dv, s.value_dim)), grads,
                          pairs ? static_cast<int>(s.kv_heads * s.head_dim / V()) : 0,
                          values ? static_cast<int>(s.kv_heads * s.value_dim / V()) : 0);
        });
    }
};

}  // namespace INTERSTATE_KERNELS
}  // namespace component_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
