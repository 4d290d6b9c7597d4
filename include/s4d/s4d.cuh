// S4D, the diagonal state space layer: public entry for the cuda executor.
//
// The same names and arguments as s4d/s4d.hpp, as overloads for `cuda`: every dtype, states, packed
// sequences, both directions. Views point to device memory; calls are asynchronous on exec.stream and
// allocate nothing. Equations: docs/ops/s4d.md.
#pragma once

#include <s4d/detail/cuda_chunked.cuh>
#include <s4d/detail/cuda_driver.cuh>
#include <s4d/detail/cuda_kernel.cuh>
#include <s4d/detail/cuda_scan.cuh>
#include <s4d/detail/cuda_step.cuh>
#include <s4d/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d {

namespace detail {
inline namespace INTERSTATE_KERNELS {

/// The method that a call will run. Chunks beat the scan everywhere, from one token on (docs/benchmarks/s4d.md).
inline Method cuda_method(const Options& options) {
    return options.method == Method::automatic ? Method::chunked : options.method;
}

/// Calls f(method) with the driver's type of the method.
template <class T, class F>
auto with_method(const Options& options, F&& f) {
    if (cuda_method(options) == Method::chunked) return f(chunks::Chunked<T>{});
    return f(Scanned<T>{});
}

inline Status check_method(const Options& options) {
    if (options.method != Method::fft) return {};
    return Status::error(StatusCode::unsupported, "method: is fft, which needs cuFFT plans: the executor cuda_fft of s4d/fft.cuh");
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail

inline namespace INTERSTATE_KERNELS {

inline KernelChoice which_kernel(const cuda&, const Options& options, const Shape& shape) {
    switch (detail::cuda_method(options)) {
        case Method::chunked:
            return {"s4d.cuda.chunked", shape.dtype == DType::bf16
                                            ? "chunks of 32 tokens as bfloat16 products on tensor cores"
                                            : "chunks of 16 tokens as products on tensor cores"};
        case Method::scan: return {"s4d.cuda.scan", "block scan over time, one block a channel"};
        default: return {"", "unsupported: fft needs the executor cuda_fft of s4d/fft.cuh"};
    }
}

/// Bytes of `Saved` that forward fills for backward: one state per tile.
inline std::size_t saved_size(const cuda&, const Options& options, const Shape& shape) {
    Arena arena;
    dispatch_dtype(shape.dtype, [&]<class T>(T) {
        return detail::with_method<T>(options, [&]<class Method>(Method) {
            return detail::SavedStates<T, Method>(arena, shape), 0;
        });
    });
    return arena.required();
}

/// Bytes of workspace in device memory.
inline std::size_t workspace_size(const cuda&, const Options& options, const Shape& shape, pass p) {
    if (p == pass::step) return 0;
    Arena arena;
    dispatch_dtype(shape.dtype, [&]<class T>(T) {
        return detail::with_method<T>(options, [&]<class Method>(Method) {
            return detail::DriverLayout<T, Method>(arena, shape, p), 0;
        });
    });
    return arena.required();
}

/// y (B, L, H) and the final states xT. Pass `saved` memory if backward will follow, Saved{} if not. A launch
/// error is a Status; cu_seqlens is checked on the device and reported in exec.flags.
template <class T, class P>
Status forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_method(options));
    if (saved.data)
        INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, shape.length));
    return detail::with_method<T>(options, [&]<class Method>(Method) {
        return detail::run_forward<T, Method>(exec, options, in, out, saved, ws);
    });
}

/// Gradients of every input whose view in `grads` is not null. `saved` is what forward filled for the
/// same inputs; `out` is not read.
template <class T, class P>
Status backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_method(options));
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, shape.length));
    return detail::with_method<T>(options, [&]<class Method>(Method) {
        return detail::run_backward<T, Method>(exec, options, in, saved, upstream, grads, ws);
    });
}

/// Bytes of workspace of `generate_kernel` (pass::forward) and of its backward, for a K of (channels, length).
inline std::size_t generate_kernel_workspace_size(const cuda&, const Options&, const Shape& shape, pass p) {
    Arena arena;
    detail::powers::KernelLayout(arena, shape, p);
    return arena.required();
}

/// The Vandermonde kernel K[h,l] = 2 Re sum_n C Bbar Abar^l (eq. 14), K (H, L) in f32 or f64, any strides.
template <class A, class P>
Status generate_kernel(const cuda& exec, const Options& options, const Params<P>& params, const View<A, 2>& K,
                       Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, K));
    const Shape shape = shape_of(params, K);
    INTERSTATE_RETURN_IF_ERROR(check_workspace(
        "workspace", ws, generate_kernel_workspace_size(exec, options, shape, pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    Arena arena(ws.data);
    const detail::powers::KernelLayout w(arena, shape, pass::forward);
    Params<P> without_D = params;
    without_D.D = {};
    return detail::powers::causal_kernel(exec, options, without_D, shape, w.modes, K);
}

/// Gradients of the parameters from dK (H, L) (eq. 15); those of D and C_reverse, which K does not
/// depend on, are set to zero.
template <class A, class P>
Status generate_kernel_backward(const cuda& exec, const Options& options, const Params<P>& params,
                                const View<const A, 2>& dK, const BasicParams<P, complex<P>>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, dK, grads));
    INTERSTATE_RETURN_IF_ERROR(check_workspace(
        "workspace", ws, generate_kernel_workspace_size(exec, options, shape_of(params, dK), pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::powers::run_generate_kernel_backward(exec, options, params, dK, grads, ws);
}

/// Fills Abar and Bbar of `discrete` (eq. 2), in device memory; C and D are the caller's to set.
template <class P>
Status discretize(const cuda& exec, const Options& options, const Params<P>& params, const Discrete<P>& discrete) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, discrete));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    const Index modes = discrete.Abar.extent[0] * discrete.Abar.extent[1];
    const Index blocks = ceil_div(modes, 128);
    INTERSTATE_RETURN_IF_ERROR(check_size("Abar: blocks of a grid", blocks));
    return launch(exec, "discretize_kernel", detail::discretize_kernel<P>,
                  {dim3(static_cast<unsigned>(blocks)), dim3(128)}, options.disc, params, discrete);
}

/// One token for every batch row; the state is updated in place. Needs no workspace.
template <class T, class P>
Status step(const cuda& exec, const Options&, const Discrete<P>& discrete, const State<acc_t<T>>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(discrete, state, token, out));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    const Index blocks = ceil_div(token.u.extent[0] * token.u.extent[1] * 32, detail::step_threads);
    INTERSTATE_RETURN_IF_ERROR(check_size("u: blocks of a grid", blocks));
    return launch(exec, "step_kernel", detail::step_kernel<T, P>,
                  {dim3(static_cast<unsigned>(blocks)), dim3(detail::step_threads)}, discrete, state, token, out);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace s4d
}  // namespace interstate::inline INTERSTATE_ABI
