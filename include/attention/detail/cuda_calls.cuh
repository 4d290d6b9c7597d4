// Which kernels a problem runs in, and their launches.
#pragma once

#include <attention/detail/cuda_backward.cuh>
#include <attention/detail/cuda_forward.cuh>
#include <attention/detail/cuda_simple.cuh>
#include <interstate/dispatch.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

/// What backward carves out of its workspace.
template <class A>
struct BackwardWorkspace {
    RowStatistics<A>* statistics;  // (B, Hq, Lq), softmax
    HalfRange* range;              // float16
    BackwardWorkspace(Arena& arena, const Options& options, const Shape& s)
        : statistics(arena.take<RowStatistics<A>>(options.score == Score::softmax ? s.batch * s.query_heads * s.queries : 0)),
          range(arena.take<HalfRange>(s.dtype == DType::f16 ? 1 : 0)) {}
};

inline namespace INTERSTATE_KERNELS {

/// Calls f(std::integral_constant<int, dim>) with the columns of the tiles that hold a head, 64, 128 or 256; 0 asks for the
/// simple kernels: float64, wider heads, and a GPU without the shared memory that `Form` wants.
template <class T, template <class, int, int> class Form, class F>
Status dispatch_dim(const Shape& s, F&& f) {
    if constexpr (std::is_same_v<T, f64>) {
        return f(std::integral_constant<int, 0>{});
    } else {
        std::size_t limit = 0;
        INTERSTATE_RETURN_IF_ERROR(shared_memory_limit(limit));
        return dispatch_size<64, 128, 256>(s.head_dim > s.value_dim ? s.head_dim : s.value_dim, [&](auto dim) -> Status {
            if constexpr (dim > 0)
                if (Form<T, dim, 0>::shared <= limit) return f(dim);
            return f(std::integral_constant<int, 0>{});
        });
    }
}

/// Forward in tiles of `dim` columns, or by the simple kernel (0). `rest`, where not null, takes what rounding takes from o.
template <class T, int dim, class Policy>
Status launch_forward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, const Policy& policy,
                      const View<bf16, 4>& rest = {}) {
    const auto call = call_of(options, in, policy);
    const Shape& s = call.shape;
    if constexpr (dim == 0) {
        const Index blocks = s.batch * s.queries * s.query_heads;
        INTERSTATE_RETURN_IF_ERROR(check_blocks(blocks));
        return launch(exec, "attention.cuda.simple forward", simple_forward_kernel<T, Policy>,
                      {dim3(static_cast<unsigned>(blocks)), dim3(simple_threads)}, call, out.o, out.lse, rest);
    } else {
        using Form = ForwardForm<T, dim, Policy::channels>;
        const Tiling tiling(s, s.queries, s.query_heads, Form::rows);
        INTERSTATE_RETURN_IF_ERROR(check_blocks(tiling.blocks));
        return launch(exec, "attention.cuda.tiled forward",
                      call.softmax ? forward_kernel<T, dim, true, Policy> : forward_kernel<T, dim, false, Policy>,
                      {dim3(static_cast<unsigned>(tiling.blocks)), dim3(Form::threads), Form::shared}, call, tiling, out.o, out.lse,
                      device::moves_wide(out.o, s.value_dim), rest);
    }
}

template <class T, class Policy>
Status run_forward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, const Policy& policy) {
    return dispatch_dim<T, ForwardForm>(shape_of(in), [&](auto dim) { return launch_forward<T, dim>(exec, options, in, out, policy); });
}

template <class T>
Status make_statistics(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, const Upstream<T>& upstream,
                       const BackwardWorkspace<acc_t<T>>& memory, const View<const bf16, 4>& rest = {}) {
    const Shape s = shape_of(in);
    const Index rows = s.batch * s.queries * s.query_heads;
    if (options.score == Score::softmax) {
        const bool wide = device::moves_wide(out.o, s.value_dim) && device::moves_wide(upstream.o, s.value_dim);
        INTERSTATE_RETURN_IF_ERROR(check_blocks(ceil_div(rows, 32)));
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "attention.cuda statistics", statistics_kernel<T>,
                                          {dim3(static_cast<unsigned>(ceil_div(rows, 32))), dim3(256)}, View<const T, 4>(out.o), upstream.o,
                                          View<const acc_t<T>, 3>(out.lse), upstream.lse, rest, memory.statistics, wide));
    }
    if constexpr (std::is_same_v<T, f16>) {
        INTERSTATE_RETURN_IF_ERROR(cuda_status(cudaMemsetAsync(memory.range, 0, sizeof(HalfRange), exec.stream), "cudaMemsetAsync"));
        const auto norm = [&]<class E>(const View<const E, 4>& x, std::uint32_t* to) {
            const Index blocks = ceil_div(x.extent[0] * x.extent[1] * x.extent[2], 32);
            return launch(exec, "attention.cuda largest norm", largest_norm_kernel<E>, {dim3(static_cast<unsigned>(blocks < 4096 ? blocks : 4096)), dim3(256)},
                          x, in.cu_seqlens, to);
        };
        INTERSTATE_RETURN_IF_ERROR(norm(upstream.o, &memory.range->dout2));
        INTERSTATE_RETURN_IF_ERROR(norm(in.v, &memory.range->value2));
        if (const auto& d = upstream.lse; d && options.score == Score::softmax)
            INTERSTATE_RETURN_IF_ERROR(norm(view(d.data, {s.batch, s.queries, s.query_heads, Index{1}}, {d.stride[0], d.stride[1], d.stride[2], Index{1}}), &memory.range->dlse2));
    }
    return {};
}

template <class T, int dim, class Policy>
Status launch_query_gradient(const cuda& exec, const Options& options, const Inputs<T>& in, const Upstream<T>& upstream,
                             const BackwardWorkspace<acc_t<T>>& memory, const Grads<T>& grads, const Policy& policy) {
    const auto call = call_of(options, in, policy);
    const Shape& s = call.shape;
    if constexpr (dim == 0) {
        const Index blocks = s.batch * s.queries * s.query_heads;
        INTERSTATE_RETURN_IF_ERROR(check_blocks(blocks));
        return launch(exec, "attention.cuda.simple dq", simple_query_gradient_kernel<T, Policy>,
                      {dim3(static_cast<unsigned>(blocks)), dim3(simple_threads)}, call, upstream.o, memory.statistics, grads.q);
    } else {
        using Form = QueryForm<T, dim, Policy::channels>;
        const Tiling tiling(s, s.queries, s.query_heads, Form::rows);
        const BackwardCall<T> up{upstream.o, memory.statistics, memory.range, device::moves_wide(upstream.o, s.value_dim)};
        INTERSTATE_RETURN_IF_ERROR(check_blocks(tiling.blocks));
        return launch(exec, "attention.cuda.tiled dq",
                      call.softmax ? query_gradient_kernel<T, dim, true, Policy> : query_gradient_kernel<T, dim, false, Policy>,
                      {dim3(static_cast<unsigned>(tiling.blocks)), dim3(Form::threads), Form::shared}, call, up, tiling, grads.q,
                      device::moves_wide(grads.q, s.head_dim));
    }
}

template <class T, class Policy>
Status run_query_gradient(const cuda& exec, const Options& options, const Inputs<T>& in, const Upstream<T>& upstream,
                          const BackwardWorkspace<acc_t<T>>& memory, const Grads<T>& grads, const Policy& policy) {
    return dispatch_dim<T, QueryForm>(shape_of(in),
                                      [&](auto dim) { return launch_query_gradient<T, dim>(exec, options, in, upstream, memory, grads, policy); });
}

template <class T, int dim, class Policy>
Status launch_key_gradient(const cuda& exec, const Options& options, const Inputs<T>& in, const Upstream<T>& upstream,
                           const BackwardWorkspace<acc_t<T>>& memory, const Grads<T>& grads, const Policy& policy) {
    const auto call = call_of(options, in, policy);
    const Shape& s = call.shape;
    if constexpr (dim == 0) {
        const Index blocks = s.batch * s.keys * s.kv_heads;
        INTERSTATE_RETURN_IF_ERROR(check_blocks(blocks));
        return launch(exec, "attention.cuda.simple dk dv", simple_key_gradient_kernel<T, Policy>,
                      {dim3(static_cast<unsigned>(blocks)), dim3(simple_threads)}, call, upstream.o, memory.statistics, grads.k, grads.v);
    } else {
        using Form = KeyForm<T, dim, Policy::channels>;
        const Tiling tiling(s, s.keys, s.kv_heads, Form::rows);
        const BackwardCall<T> up{upstream.o, memory.statistics, memory.range, device::moves_wide(upstream.o, s.value_dim)};
        INTERSTATE_RETURN_IF_ERROR(check_blocks(tiling.blocks * Form::shares));
        return launch(exec, "attention.cuda.tiled dk dv",
                      call.softmax ? key_gradient_kernel<T, dim, true, Policy> : key_gradient_kernel<T, dim, false, Policy>,
                      {dim3(static_cast<unsigned>(tiling.blocks * Form::shares)), dim3(Form::threads), Form::shared}, call, up, tiling,
                      grads.k, grads.v, device::moves_wide(grads.k, s.head_dim), device::moves_wide(grads.v, s.value_dim));
    }
}

template <class T, class Policy>
Status run_key_gradient(const cuda& exec, const Options& options, const Inputs<T>& in, const Upstream<T>& upstream,
                        const BackwardWorkspace<acc_t<T>>& memory, const Grads<T>& grads, const Policy& policy) {
    return dispatch_dim<T, KeyForm>(shape_of(in),
                                    [&](auto dim) { return launch_key_gradient<T, dim>(exec, options, in, upstream, memory, grads, policy); });
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
