// Random Fourier features, public: the executors `reference` and `cpu`.
//
//   xi(x) = sqrt(2/R) [cos(W x), sin(W x)],   W (R/2, dh)
//
// the features with which Interdomain Attention, normalised, reads as kernel regression. Source: arXiv 2605.24330, after
// Rahimi and Recht, "Random Features for Large-Scale Kernel Machines"; equations, shapes and dtypes:
// docs/ops/random_features.md. The cuda executor: random_features/random_features.cuh. Arguments and their shapes:
// random_features/params.hpp. Frequencies to begin with: random_features/init.hpp.
#pragma once

#include <random_features/detail/cpu_tiles.hpp>
#include <random_features/params.hpp>
#include <random_features/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace random_features {

/// Bytes of `Saved`: none, backward recomputes.
inline std::size_t saved_size(const cpu&, const Options&, const Shape&) { return 0; }

/// Bytes of scratch memory for a pass, for exec.threads threads (0: as many as OpenMP has now). It does not grow with
/// the length.
inline std::size_t workspace_size(const cpu& exec, const Options&, const Shape& shape, pass p) {
    Arena arena;
    if (shape.dtype == DType::f64)
        detail::CpuLayout<double>(arena, shape, p, thread_count(exec.threads));
    else
        detail::CpuLayout<float>(arena, shape, p, thread_count(exec.threads));
    return arena.required();
}

inline KernelChoice which_kernel(const cpu& exec, const Options&, const Shape&) {
    const char* reason = exec.isa == Isa::automatic ? "the best instruction set of this machine; any shape and strides"
                                                    : "the instruction set that was asked for; any shape and strides";
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512: return {"random_features.cpu.tiles.avx512", reason};
        case Isa::avx2: return {"random_features.cpu.tiles.avx2", reason};
        default: return {"random_features.cpu.tiles.baseline", reason};
    }
}

/// y (B, L, H, 2 F) of x (B, L, H, dh) and W (H or 1, F, dh). x and y are of T = f64, f32, f16 or bf16, W of float or
/// double, any strides; arithmetic is double for f64, else float. y must not overlap x.
///
/// Errors, before anything is written: invalid_argument (shapes, null views, cu_seqlens), unsupported (an instruction set
/// that this machine lacks), workspace_too_small.
template <class T, class P>
Status forward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    detail::cpu_forward(exec, in, out, ws);
    return {};
}

/// The gradients of x and W whose views are not null, from the inputs and dy; `out` is not read.
template <class T, class P>
Status backward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    detail::cpu_backward(exec, in, upstream, grads, ws);
    return {};
}

/// One token for every batch row: x (B, H, dh), y (B, H, 2 F). The bits are those of `forward`.
template <class T, class P>
Status step(const cpu& requested, const Options& options, const Params<P>& params, const State&, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(params, token, out));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape_of(params, token), pass::step)));
    detail::cpu_forward(exec, Inputs<T, P>{.x = as_sequences(token.x), .params = params},
                        Outputs<T>{as_sequences(out.y)}, ws);
    return {};
}

}  // namespace random_features
}  // namespace interstate::inline INTERSTATE_ABI
