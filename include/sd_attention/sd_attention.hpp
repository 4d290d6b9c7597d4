// S-D attention, public: the executors `reference` and `cpu`. Equations, shapes and dtypes: docs/ops/sd_attention.md.
//
//     Workspace ws{memory, sd_attention::workspace_size(exec, options, shape, pass::forward)};
//     Status status = sd_attention::forward(exec, options, in, out, Saved{}, ws);
//
// The calls below are the same for every executor.
#pragma once

#include <sd_attention/detail/cpu_projected.hpp>
#include <sd_attention/params.hpp>
#include <sd_attention/reference.hpp>
#include <sd_attention/stability.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_attention {

inline KernelChoice which_kernel(const cpu& exec, const Options&, const Shape&) {
    const char* reason = "the projection, then attention or linear attention, for any shape and strides";
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512: return {"sd_attention.cpu.projected.avx512", reason};
        case Isa::avx2: return {"sd_attention.cpu.projected.avx2", reason};
        default: return {"sd_attention.cpu.projected.baseline", reason};
    }
}

/// Bytes of `Saved`: none, backward projects again.
inline std::size_t saved_size(const cpu&, const Options&, const Shape&) { return 0; }

/// Bytes of scratch memory for a pass, for exec.threads threads (0: as many as OpenMP has now): u and x in the accumulator's dtype, and
/// their gradients in backward; of 16-bit storage v and o as well; and what attention or linear attention needs.
inline std::size_t workspace_size(const cpu& exec, const Options& options, const Shape& shape, pass which) {
    return shape.dtype == DType::f64 ? simd::layout_size<detail::ProjectedLayout<double>>(exec, options, shape, which)
                                     : simd::layout_size<detail::ProjectedLayout<float>>(exec, options, shape, which);
}

/// o and, of softmax, lse (eq. 1 to 6).
///
/// u (B, L, H, r), v (B, L, H, dv) and o (B, L, H, dv) of T = f64, f32, f16 or bf16; lse (B, L, H) of double for f64, else float, may be
/// null. The generator: P (H, r, r), or a and b (H, p, r), and delta (H, r), of W = float or double. Any strides. With cu_seqlens
/// (S+1) B is 1. Outputs must not overlap inputs. Sums are double for f64 and float for all others.
///
/// Errors, before anything is written: invalid_argument (shapes, null views, cu_seqlens), unsupported (an instruction set that this
/// machine lacks), workspace_too_small.
///
/// Source: the generator S - D of arXiv 2605.18826.
template <class T, class W>
Status forward(const cpu& requested, const Options& options, const Inputs<T, W>& in, const Outputs<T>& out, Saved, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ProjectedLayout<acc_t<T>> layout(arena, exec, options, s, pass::forward);
    return detail::ProjectedCall<T, W>{exec, options, in, layout}.forward(out);
}

/// The gradients whose views are not null (eq. 7 to 10). Softmax reads out.o and out.lse, the other normalizers neither. Errors as in
/// forward.
template <class T, class W>
Status backward(const cpu& requested, const Options& options, const Inputs<T, W>& in, const Outputs<T>& out, Saved,
                const Upstream<T>& upstream, const Grads<T, W>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const detail::ProjectedLayout<acc_t<T>> layout(arena, exec, options, s, pass::backward);
    return detail::ProjectedCall<T, W>{exec, options, in, layout}.backward(out, upstream, grads);
}

/// Decodes n tokens for every batch row, softmax: writes u (B, n, H, r) and v (B, n, H, dv) at rows length, length + 1, ... of the cache,
/// and o (B, n, H, dv) and optionally lse (B, n, H) as the last n rows of forward would be, with x rounded to T. The caller then counts the
/// tokens. Errors as in forward, and those of attention's step.
template <class T, class W>
Status step(const cpu& requested, const Options& options, const Params<W>& params, const Cache<T>& cache, const Tokens<T>& tokens,
            const TokensOut<T>& out, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, cache, tokens, out));
    const Shape s = shape_of(params, cache, tokens);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    Arena arena(ws.data);
    const detail::ProjectedLayout<acc_t<T>> layout(arena, exec, options, s, pass::step);
    const Inputs<T, W> in = inputs_of(params, tokens);
    const auto x = detail::ProjectedCall<T, W>{exec, options, in, layout}.queries();
    return attention::step(exec, detail::softmax_options(), attention::Params{}, cache,
                           attention::Tokens<T>{.q = x, .k = tokens.u, .v = tokens.v}, out, layout.memory());
}
/// One token: u (B, H, r), v (B, H, dv), o (B, H, dv), lse (B, H).
template <class T, class W>
Status step(const cpu& exec, const Options& options, const Params<W>& params, const Cache<T>& cache, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    return step(exec, options, params, cache, tokens_of(token), attention::tokens_of(out), ws);
}
/// One token for every batch row, identity and elu1: o (B, H, dv), and the state s (B, H, r, dv), z (B, H, r) is updated in place.
template <class T, class W>
Status step(const cpu& requested, const Options& options, const Params<W>& params, const State<acc_t<T>>& state, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, token, out));
    const Shape s = shape_of(params, state, token);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    Arena arena(ws.data);
    const detail::ProjectedLayout<acc_t<T>> layout(arena, exec, options, s, pass::step);
    const Inputs<T, W> in = inputs_of(params, tokens_of(token));
    const auto x = detail::only_token(detail::ProjectedCall<T, W>{exec, options, in, layout}.queries());
    return linear_attention::step(exec, detail::linear_of(options), linear_attention::Params{}, state,
                                  linear_attention::Token<T>{.q = x, .k = token.u, .v = token.v}, linear_attention::TokenOut<T>{out.o},
                                  layout.memory());
}

}  // namespace sd_attention
}  // namespace interstate::inline INTERSTATE_ABI
