// The output gate on the GPU: a thread moves 16 bytes of each tensor where all of them lie so, one element otherwise.
#pragma once

#include <gate/params.hpp>
#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/launch.cuh>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace gate::detail {

inline constexpr int gate_threads = 256;

/// One tensor of a call, which may be absent.
template <class T>
struct Tensor {
    T* data = nullptr;
    Index stride[4] = {};
    Tensor() = default;
    explicit Tensor(const View<T, 4>& v) : data(v.data), stride{v.stride[0], v.stride[1], v.stride[2], v.stride[3]} {}
};

template <class T>
struct Problem {
    Shape s;
    View<const std::int32_t, 1> cu;
    Tensor<const T> o{}, g{}, dy{};
    Tensor<T> y{}, grad_o{}, grad_g{};
};

/// N elements that lie side by side, N of them 16 bytes or one.
template <class T, int N>
struct alignas(N * sizeof(T)) Elements {
    T x[N];
};

/// Whether a tensor can be moved 16 bytes at once.
template <class T>
bool moves_16_bytes(const Tensor<T>& x, const Shape& s) {
    constexpr Index n = 16 / sizeof(T);
    if (!x.data) return true;
    if (s.value_dim % n != 0 || x.stride[3] != 1 || reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0) return false;
    return (s.batch == 1 || x.stride[0] % n == 0) && (s.length == 1 || x.stride[1] % n == 0) && (s.heads == 1 || x.stride[2] % n == 0);
}

__device__ inline float sigmoid(float g) { return __fdividef(1.0f, 1.0f + __expf(-g)); }
__device__ inline double sigmoid(double g) { return 1.0 / (1.0 + exp(-g)); }

/// a / b of sizes, in 32 bits where they fit: divisions in 64 bits would be most of the kernel's time.
__device__ inline Index quotient(Index a, Index b) {
    return (a | b) >> 32 == 0 ? static_cast<Index>(static_cast<std::uint32_t>(a) / static_cast<std::uint32_t>(b)) : a / b;
}

inline namespace INTERSTATE_KERNELS {

/// Forward where there is y, else backward. Threads are rows of a head in order, N elements each.
template <class T, int N>
__global__ void __launch_bounds__(gate_threads) gate_kernel(Problem<T> p) {
    using A = acc_t<T>;
    using Vector = Elements<T, N>;
    const Index chunks = p.s.value_dim / N, count = p.s.rows() * p.s.heads * chunks;
    const Index step = static_cast<Index>(gridDim.x) * gate_threads;
    for (Index i = static_cast<Index>(blockIdx.x) * gate_threads + threadIdx.x; i < count; i += step) {
        const Index head = quotient(i, chunks), c = (i - head * chunks) * N;
        const Index row = quotient(head, p.s.heads), h = head - row * p.s.heads;
        const Index b = quotient(row, p.s.length), t = row - b * p.s.length;
        const auto at = [&](const auto& x) { return x.data + b * x.stride[0] + t * x.stride[1] + h * x.stride[2] + c * x.stride[3]; };
        const auto load = [&](const Tensor<const T>& x) { return *reinterpret_cast<const Vector*>(at(x)); };
        const auto store = [&](const Tensor<T>& x, const Vector& v) {
            if (x.data) *reinterpret_cast<Vector*>(at(x)) = v;
        };
        Vector first, second;
        if (p.cu && (t < p.cu(0) || t >= p.cu(p.s.sequences))) {
#pragma unroll
            for (int j = 0; j < N; ++j) first.x[j] = T(0.0f);
            store(p.y, first);
            store(p.grad_o, first);
            store(p.grad_g, first);
            continue;
        }
        const Vector o = load(p.o), g = load(p.g);
        if (p.y.data) {
#pragma unroll
            for (int j = 0; j < N; ++j)
                first.x[j] = device::store_as<T>(device::load_as<A>(o.x[j]) * sigmoid(device::load_as<A>(g.x[j])));
            store(p.y, first);
            continue;
        }
        const Vector dy = load(p.dy);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const A x = device::load_as<A>(g.x[j]), along = device::load_as<A>(dy.x[j]) * sigmoid(x);
            first.x[j] = device::store_as<T>(along);
            second.x[j] = device::store_as<T>(along * device::load_as<A>(o.x[j]) * sigmoid(-x));
        }
        store(p.grad_o, first);
        store(p.grad_g, second);
    }
}

template <class T>
Status run(const cuda& exec, const Problem<T>& p) {
    constexpr int wide = 16 / sizeof(T);
    const auto run = [&](auto N) {
        const Index count = p.s.rows() * p.s.heads * (p.s.value_dim / N), blocks = ceil_div(count, gate_threads);
        const Index most = Index{1} << 20;  // threads take several elements beyond
        return launch(exec, "gate_kernel", gate_kernel<T, decltype(N)::value>,
                      {dim3(static_cast<unsigned>(blocks < most ? blocks : most)), dim3(gate_threads)}, p);
    };
    const bool all = moves_16_bytes(p.o, p.s) && moves_16_bytes(p.g, p.s) && moves_16_bytes(p.dy, p.s) &&
                     moves_16_bytes(p.y, p.s) && moves_16_bytes(p.grad_o, p.s) && moves_16_bytes(p.grad_g, p.s);
    return all ? run(std::integral_constant<int, wide>{}) : run(std::integral_constant<int, 1>{});
}

}  // namespace INTERSTATE_KERNELS

}  // namespace gate::detail
}  // namespace interstate::inline INTERSTATE_ABI
