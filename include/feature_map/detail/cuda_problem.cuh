// The feature map on the GPU: what every kernel is handed, and the arithmetic they share.
#pragma once

#include <type_traits>

#include <feature_map/detail/rows.hpp>
#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/launch.cuh>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map::detail {

/// A parameter of float or double: kernels read each once, and need not be compiled for both.
struct Parameter {
    void* data = nullptr;
    Index stride[3] = {};
    bool is_double = false;

    Parameter() = default;
    template <class P, int Rank>
    explicit Parameter(const View<P, Rank>& v)
        : data(const_cast<std::remove_const_t<P>*>(v.data)), is_double(sizeof(P) == sizeof(double)) {
        for (int a = 0; a < Rank; ++a) stride[a] = v.stride[a];
    }
    __device__ Index at(Index i, Index j, Index k) const { return i * stride[0] + j * stride[1] + k * stride[2]; }
    template <class A>
    __device__ A get(Index i, Index j = 0, Index k = 0) const {
        return is_double ? static_cast<A>(static_cast<const double*>(data)[at(i, j, k)])
                         : static_cast<A>(static_cast<const float*>(data)[at(i, j, k)]);
    }
    __device__ void set(double x, Index i, Index j = 0, Index k = 0) const {
        if (is_double)
            static_cast<double*>(data)[at(i, j, k)] = x;
        else
            static_cast<float*>(data)[at(i, j, k)] = static_cast<float>(x);
    }
};

/// A call, for either direction. What a direction does not have is null.
template <class T>
struct Problem {
    using A = acc_t<T>;
    Shape s;
    View<const T, 4> x, conv0, dy, dconvT;
    View<T, 4> y, convT, dx, dconv0;
    View<const std::int32_t, 1> offset, cu;
    Parameter weight, conv_bias, scale, bias;
    Rope rope;
    bool silu, normed, rms;
    A slope, norm_offset;
    double base;
    bool wide_x, wide_y, wide_dy, wide_dx;  // whether lanes move their elements at once

    template <class P>
    Problem(const Options& options, const Inputs<T, P>& in)
        : s(shape_of(in)), x(in.x), conv0(in.conv0), offset(in.offset), cu(in.cu_seqlens), weight(in.params.conv_weight),
          conv_bias(in.params.conv_bias), scale(in.params.scale), bias(in.params.bias), rope(options.rope),
          silu(options.activation == Activation::silu), normed(options.l2 || options.rms), rms(options.rms),
          slope(static_cast<A>(norm_of(options, s.features).slope)),
          norm_offset(static_cast<A>(norm_of(options, s.features).offset)), base(options.base) {}

    Index pairs() const { return rope == Rope::none ? 0 : s.features / 2; }
};

/// A row of the axis of all tokens as a kernel meets it: its sequence, and its place in it.
struct RowInfo {
    std::int32_t index, begin, end;  // of the sequence; index -1: of none
};

template <class T>
__device__ RowInfo row_info(const Problem<T>& p, Index n) {
    if (n >= p.s.rows()) return {-1, 0, 0};
    const Sequence q = sequence_of(p.cu, p.s, n);
    return {static_cast<std::int32_t>(q.index), static_cast<std::int32_t>(q.begin), static_cast<std::int32_t>(q.end)};
}

/// Token t of a sequence (row begin + t): its place in a tensor, of head 0.
template <class E>
__device__ Index row_offset(const View<E, 4>& x, bool packed, const RowInfo& q, Index t) {
    return packed ? (q.begin + t) * x.stride[1] : q.index * x.stride[0] + t * x.stride[1];
}
template <class E>
__device__ E* token(const View<E, 4>& x, bool packed, const RowInfo& q, Index t, Index h) {
    return x.data + row_offset(x, packed, q, t) + h * x.stride[2];
}
/// Row i of a sequence's state.
template <class E>
__device__ E* state_row(const View<E, 4>& x, Index sequence, Index i, Index h) {
    return x.data + sequence * x.stride[0] + i * x.stride[1] + h * x.stride[2];
}

/// The approximations, of 2 and 1 units in the last place, give what is right at both ends: exp(-u) of infinity or 0.
__device__ inline float sigmoid(float u) {
    float power, sigma;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(u * -1.442695041f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(sigma) : "f"(1.0f + power));
    return sigma;
}
__device__ inline double sigmoid(double u) { return 1.0 / (1.0 + exp(-u)); }
/// Of slope P + offset: 1e-30 at least.
__device__ inline float inverse_root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ inline double inverse_root(double x) { return rsqrt(x); }

__device__ inline double frequency(double base, Index features, Index pair) {
    return pow(base, -2.0 * static_cast<double>(pair) / static_cast<double>(features));
}
/// Cosine and sine of position times frequency. The product is float64, and only what is left of it after whole turns
/// becomes float.
__device__ inline void turn(double position, double frequency, float& cosine, float& sine) {
    double turns = position * frequency * 0.15915494309189533577;
    turns -= rint(turns);
    sincospif(static_cast<float>(2.0 * turns), &sine, &cosine);
}
__device__ inline void turn(double position, double frequency, double& cosine, double& sine) {
    sincos(position * frequency, &sine, &cosine);
}
template <class T>
__device__ double position_of(const Problem<T>& p, const RowInfo& q, Index t) {
    return static_cast<double>(t) + (p.offset ? static_cast<double>(p.offset(q.index)) : 0.0);
}

inline namespace INTERSTATE_KERNELS {

/// convT, or with `backward` dconv0, of sequences without tokens. A block a sequence.
template <class T>
__global__ void empty_states_kernel(Problem<T> p, bool backward) {
    const Index index = blockIdx.x;
    if (p.s.packed() ? p.cu(index) < p.cu(index + 1) : p.s.length > 0) return;
    const View<T, 4>& to = backward ? p.dconv0 : p.convT;
    const View<const T, 4>& from = backward ? p.dconvT : p.conv0;
    const Index size = p.s.heads * p.s.features;
    for (Index i = threadIdx.x; i < p.s.past() * size; i += blockDim.x) {
        const Index j = i / size, h = i % size / p.s.features, r = i % p.s.features;
        to(index, j, h, r) = from ? from(index, j, h, r) : T(0.0f);
    }
}
template <class T>
Status empty_states(const cuda& exec, const Problem<T>& p, bool backward) {
    if (!(backward ? p.dconv0 : p.convT) || (!p.s.packed() && p.s.length > 0)) return {};
    return launch(exec, "empty_states_kernel", empty_states_kernel<T>,
                  {dim3(static_cast<unsigned>(p.s.states())), dim3(128)}, p, backward);
}

}  // namespace INTERSTATE_KERNELS

/// Sums over rows: every part of the rows has (taps + 3, H, R) of them, in the order scale, bias, conv_bias, then the taps.
template <class A>
struct PartialSums {
    A* data = nullptr;         // (parts, taps + 3, H, R)
    double* scales = nullptr;  // (H, R)
    Index parts = 0;
};
/// Gradients of the parameters.
struct ParameterGrads {
    Parameter weight, conv_bias, scale, bias;
    bool wanted() const { return weight.data || conv_bias.data || scale.data || bias.data; }
};

inline namespace INTERSTATE_KERNELS {

inline constexpr int sum_columns = 32, sum_rows = 8;

/// Adds up f(0) .. f(count - 1) in a fixed order: thread row y takes every eighth, the first row joins them.
template <class F>
__device__ double ordered_sum(Index count, F&& f) {
    __shared__ double part[sum_rows][sum_columns];
    double sum = 0.0;
    for (Index i = threadIdx.y; i < count; i += sum_rows) sum += f(i);
    part[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    sum = 0.0;
    if (threadIdx.y == 0)
        for (int y = 0; y < sum_rows; ++y) sum += part[y][threadIdx.x];
    return sum;
}

/// Over the parts. Blocks are 32 channels of all heads, grid.y is which sum.
template <class A>
__global__ void finish_sums_kernel(PartialSums<A> sums, Index heads, Index features, Index taps, ParameterGrads grads) {
    const Index size = heads * features, which = blockIdx.y;
    const Index at = static_cast<Index>(blockIdx.x) * sum_columns + threadIdx.x;
    const double sum = ordered_sum(at < size ? sums.parts : 0, [&](Index part) {
        return static_cast<double>(sums.data[(part * (taps + 3) + which) * size + at]);
    });
    if (threadIdx.y != 0 || at >= size) return;
    const Index h = at / features, r = at % features;
    if (which == 0) sums.scales[at] = sum;
    if (which == 1 && grads.bias.data) grads.bias.set(sum, h, r);
    if (which == 2 && grads.conv_bias.data) grads.conv_bias.set(sum, h, r);
    if (which > 2 && grads.weight.data) grads.weight.set(sum, h, r, which - 3);
}
/// dscale: over the heads.
template <class Sum>
__global__ void finish_scale_kernel(const Sum* scales, Index heads, Index features, Parameter scale) {
    const Index r = static_cast<Index>(blockIdx.x) * sum_columns + threadIdx.x;
    const double sum = ordered_sum(r < features ? heads : 0, [&](Index h) { return scales[h * features + r]; });
    if (threadIdx.y == 0 && r < features) scale.set(sum, r);
}
template <class A>
Status finish_sums(const cuda& exec, const Shape& s, const PartialSums<A>& sums, const ParameterGrads& grads) {
    if (!grads.wanted()) return {};
    const dim3 block(sum_columns, sum_rows);
    INTERSTATE_RETURN_IF_ERROR(
        launch(exec, "finish_sums_kernel", finish_sums_kernel<A>,
               {dim3(static_cast<unsigned>(ceil_div(s.heads * s.features, sum_columns)), static_cast<unsigned>(s.taps + 3)), block},
               sums, s.heads, s.features, s.taps, grads));
    if (!grads.scale.data) return {};
    return launch(exec, "finish_scale_kernel", finish_scale_kernel<double>,
                  {dim3(static_cast<unsigned>(ceil_div(s.features, sum_columns))), block}, static_cast<const double*>(sums.scales), s.heads, s.features,
                  grads.scale);
}

}  // namespace INTERSTATE_KERNELS

}  // namespace feature_map::detail
}  // namespace interstate::inline INTERSTATE_ABI
