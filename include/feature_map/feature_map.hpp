// The feature map of Interdomain Attention, public: the executors `reference` and `cpu`. From a projection to what the
// core takes, in one pass over memory:
//
//   causal convolution -> RoPE -> SiLU -> l2 norm of every head -> RMSNorm with scale and bias
//
// each stage optional: Options::query(), key() and value() are the published layer's (value is its "input norm").
// Source: arXiv 2605.24330; equations, shapes and dtypes: docs/ops/feature_map.md. The cuda executor:
// feature_map/feature_map.cuh. Arguments and their shapes: feature_map/params.hpp.
#pragma once

#include <feature_map/detail/cpu_rows.hpp>
#include <feature_map/params.hpp>
#include <feature_map/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map {

/// Bytes of `Saved`: none, backward recomputes.
inline std::size_t saved_size(const cpu&, const Options&, const Shape&) { return 0; }

/// Bytes of scratch memory for a pass, for exec.threads threads (0: as many as OpenMP has now). It does not grow with
/// the length.
inline std::size_t workspace_size(const cpu& exec, const Options& options, const Shape& shape, pass p) {
    Arena arena;
    if (shape.dtype == DType::f64)
        detail::CpuLayout<double>(arena, options, shape, p, thread_count(exec.threads));
    else
        detail::CpuLayout<float>(arena, options, shape, p, thread_count(exec.threads));
    return arena.required();
}

inline KernelChoice which_kernel(const cpu& exec, const Options&, const Shape&) {
    const char* reason = exec.isa == Isa::automatic
                             ? "the best instruction set of this machine; any shape, strides and options"
                             : "the instruction set that was asked for; any shape, strides and options";
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512: return {"feature_map.cpu.rows.avx512", reason};
        case Isa::avx2: return {"feature_map.cpu.rows.avx2", reason};
        default: return {"feature_map.cpu.rows.baseline", reason};
    }
}

/// y (B, L, H, R) of x (B, L, H, R), and convT (B or S, taps-1, H, R), the convolution's state, which may be null. x, y
/// and states are of T = f64, f32, f16 or bf16, any strides; arithmetic is double for f64, else float. Outputs must not
/// overlap inputs, but convT may be conv0.
///
/// Errors, before anything is written: invalid_argument (options, shapes, null views, cu_seqlens, tensors of stages that
/// do not run), unsupported (an instruction set that this machine lacks), workspace_too_small.
template <class T, class P>
Status forward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    detail::cpu_forward(exec, options, in, out, ws);
    return {};
}

/// Gradients of every input whose view in `grads` is not null, from the inputs and dy alone; `out` is not read.
/// Errors as in forward.
template <class T, class P>
Status backward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    detail::cpu_backward(exec, options, in, upstream, grads, ws);
    return {};
}

/// One token for every batch row, each at its own position; the convolution's state (B, taps-1, H, R) moves on in place.
/// The bits are those of `forward`. Errors as in forward.
template <class T, class P>
Status step(const cpu& requested, const Options& options, const Params<P>& params, const State<T>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, token, out));
    INTERSTATE_RETURN_IF_ERROR(check_workspace(
        "workspace", ws, workspace_size(exec, options, shape_of(params, token), pass::step)));
    detail::cpu_forward(exec, options, step_inputs(options, params, state, token), step_outputs(state, out), ws);
    return {};
}

}  // namespace feature_map
}  // namespace interstate::inline INTERSTATE_ABI
