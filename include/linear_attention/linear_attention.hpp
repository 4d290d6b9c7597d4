// Linear attention, public: the executors `reference` and `cpu`. Equations, shapes and dtypes: docs/ops/linear_attention.md.
//
//     Workspace ws{memory, linear_attention::workspace_size(exec, options, shape, pass::forward)};
//     Status status = linear_attention::forward(exec, options, in, out, Saved{}, ws);
//
// The calls below are the same for every executor.
#pragma once

#include <linear_attention/detail/cpu_chunked.hpp>
#include <linear_attention/params.hpp>
#include <linear_attention/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention {

inline KernelChoice which_kernel(const cpu& exec, const Options&, const Shape&) {
    const char* reason = "chunks of 64 tokens, for any shape and strides";
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512: return {"linear_attention.cpu.chunked.avx512", reason};
        case Isa::avx2: return {"linear_attention.cpu.chunked.avx2", reason};
        default: return {"linear_attention.cpu.chunked.baseline", reason};
    }
}

/// Bytes of `Saved`: none, backward makes states again.
inline std::size_t saved_size(const cpu&, const Options&, const Shape&) { return 0; }

/// Bytes of scratch memory for a pass, for exec.threads threads (0: as many as OpenMP has now): a state for each segment of at least 512
/// tokens, and where rows are normalized two accumulators a query in backward.
inline std::size_t workspace_size(const cpu& exec, const Options& options, const Shape& shape, pass which) {
    const int threads = thread_count(exec.threads);
    if (which == pass::step) return static_cast<std::size_t>(threads) * detail::step_bytes(shape);
    const detail::Tiling tiling(options, shape);
    return shape.dtype == DType::f64 ? simd::layout_size<detail::ChunkedLayout<double>>(tiling, shape, which, threads)
                                     : simd::layout_size<detail::ChunkedLayout<float>>(tiling, shape, which, threads);
}

/// o and the states behind the last token (eq. 2 to 4).
///
/// q (B, L, Hq, dk), k (B, L, Hkv, dk), v (B, L, Hkv, dv) and o (B, L, Hq, dv) of T = f64, f32, f16 or bf16, sums double for f64 and float
/// for all others; s0, sT (B or S, Hkv, dk, dv) and z0, zT (B or S, Hkv, dk) of those. Any strides; Hq a multiple of Hkv. With cu_seqlens
/// (S+1) B is 1. Outputs must not overlap inputs.
///
/// Errors, before anything is written: invalid_argument (shapes, null views, cu_seqlens), unsupported (an instruction set that this
/// machine lacks), workspace_too_small.
///
/// Source: arXiv 2006.16236, eq. 18 to 20, in chunks.
template <class T>
Status forward(const cpu& requested, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ChunkedLayout<acc_t<T>> layout(arena, detail::Tiling(options, s), s, pass::forward, exec.threads);
    detail::ChunkedCall<T>{exec, options, in, layout, pass::forward}.forward(out);
    return {};
}

/// The gradients whose views are not null (eq. 5 to 9); `out` is not read. Errors as in forward.
template <class T>
Status backward(const cpu& requested, const Options& options, const Inputs<T>& in, const Outputs<T>&, Saved, const Upstream<T>& upstream,
                const Grads<T>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const detail::ChunkedLayout<acc_t<T>> layout(arena, detail::Tiling(options, s), s, pass::backward, exec.threads);
    detail::ChunkedCall<T> call{exec, options, in, layout, pass::backward};
    call.upstream = upstream;
    call.grads = grads;
    call.backward();
    return {};
}

/// One token for every batch row (eq. 2 to 4); the state is updated in place.
template <class T>
Status step(const cpu& requested, const Options& options, const Params&, const State<acc_t<T>>& state, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, token, out));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape_of(state, token), pass::step)));
    detail::step_tokens(exec, options, state, token, out, ws);
    return {};
}

}  // namespace linear_attention
}  // namespace interstate::inline INTERSTATE_ABI
