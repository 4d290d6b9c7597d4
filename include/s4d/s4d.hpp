// S4D, the diagonal state space layer: public entry for the reference and the CPU.
//
//   x[t] = Abar x[t-1] + Bbar u[t],   y[t] = 2 Re sum_n C[n] x[t,n] + D u[t]
//
// Source: "On the Parameterization and Initialization of Diagonal State Space Models",
// arXiv 2206.11893; equations, shapes and dtypes: docs/ops/s4d.md. The cuda executor: s4d/s4d.cuh.
// Arguments and their shapes: s4d/params.hpp. The plain loops: s4d/reference.hpp.
#pragma once

#include <s4d/detail/cpu_scan.hpp>
#include <s4d/params.hpp>
#include <s4d/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d {

/// The kernel that forward and backward will run. The CPU has one method today, the recurrence.
inline KernelChoice which_kernel(const cpu& exec, const Options&, const Shape&) {
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512: return {"s4d.cpu.scan.avx512", "recurrence, channels on 512-bit lanes"};
        case Isa::avx2: return {"s4d.cpu.scan.avx2", "recurrence, channels on 256-bit lanes"};
        default: return {"s4d.cpu.scan.baseline", "recurrence, channels on 128-bit lanes"};
    }
}

/// Bytes of `Saved` that forward fills for backward: one state per 256 tokens.
inline std::size_t saved_size(const cpu&, const Options&, const Shape& shape) {
    const std::size_t element = shape.dtype == DType::f64 ? sizeof(double) : sizeof(float);
    Arena arena;
    arena.take<std::byte>(static_cast<Index>(element) * detail::checkpoint_count(shape) *
                          detail::checkpoint_size(shape));
    return arena.required();
}

/// Bytes of workspace; depends on the number of threads.
inline std::size_t workspace_size(const cpu& exec, const Options&, const Shape& shape, pass p) {
    if (p == pass::step) return 0;
    const int threads = thread_count(exec.threads);
    const Isa isa = simd::resolve(exec.isa);
    Arena arena;
    if (shape.dtype == DType::f64)
        detail::ScanLayout<double>(arena, shape, p, threads, simd::lanes<double>(isa));
    else
        detail::ScanLayout<float>(arena, shape, p, threads, simd::lanes<float>(isa));
    return arena.required();
}

/// y (B, L, H) and the final states xT. Pass `saved` memory if backward will follow, Saved{} if not.
template <class T, class P>
Status forward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
               Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    if (saved.data)
        INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    detail::scan_forward(exec, options, in, out, saved, ws);
    return {};
}

/// Gradients of every input whose view in `grads` is not null. `saved` is what forward filled for the
/// same inputs; `out` is not read.
template <class T, class P>
Status backward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    detail::scan_backward(exec, options, in, saved, upstream, grads, ws);
    return {};
}

/// Fills Abar and Bbar of `discrete` (eq. 2); C and D are the caller's to set.
template <class P>
Status discretize(const cpu&, const Options& options, const Params<P>& params, const Discrete<P>& discrete) {
    return discretize(reference{}, options, params, discrete);
}

/// One token for every batch row; the state is updated in place. Needs no workspace.
template <class T, class P>
Status step(const cpu& requested, const Options&, const Discrete<P>& discrete, const State<acc_t<T>>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(discrete, state, token, out));
    const Index B = token.u.extent[0];
    // One row is microseconds of work: starting threads pays only for many of them.
    const Index work = B * discrete.Abar.extent[0] * discrete.Abar.extent[1];
    parallel_for(B, work < (Index{1} << 17) ? 1 : exec.threads, [&](Index b, int) {
        simd::run_body<detail::StepBody<T, P>>(exec.isa, discrete, state, token, out, b);
    });
    return {};
}

}  // namespace s4d
}  // namespace interstate::inline INTERSTATE_ABI
