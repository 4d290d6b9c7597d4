// Attention, public: the executors `reference` and `cpu`. Equations, shapes and units: docs/ops/attention.md.
//
//     Workspace ws{memory, attention::workspace_size(exec, options, shape, pass::forward)};
//     Status status = attention::forward(exec, options, in, out, Saved{}, ws);
//
// The calls below are the same for every executor.
#pragma once

#include <attention/detail/cpu_tiled.hpp>
#include <attention/params.hpp>
#include <attention/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {

/// Bytes of `Saved`: none, o and lse are all that backward needs.
inline std::size_t saved_size(const cpu&, const Options&, const Shape&) { return 0; }

/// Bytes of scratch memory for a pass, for exec.threads threads (0: as many as OpenMP has now). It does
/// not grow with the length, but in backward for dh + 1 accumulators a query.
inline std::size_t workspace_size(const cpu& exec, const Options&, const Shape& shape, pass which) {
    return detail::tiled_workspace_size(exec, shape, which);
}

inline KernelChoice which_kernel(const cpu& exec, const Options&, const Shape&) {
    const bool chosen = exec.isa == Isa::automatic;
    const char* reason = chosen ? "the best instruction set of this machine; any shape, strides and options"
                                : "the instruction set that was asked for; any shape, strides and options";
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512:
            return {"attention.cpu.tiled.avx512", reason};
        case Isa::avx2:
            return {"attention.cpu.tiled.avx2", reason};
        default:
            return {"attention.cpu.tiled.baseline", reason};
    }
}

/// o[i] = sum_j p[i,j] v[j] and, for softmax, lse (eq. 1 to 5).
///
/// q (B, Lq, Hq, dh), k (B, Lk, Hkv, dh), v (B, Lk, Hkv, dv) and o (B, Lq, Hq, dv) of T = f64, f32, f16
/// or bf16; lse (B, Lq, Hq) of double for f64, else float, may be null. Any strides; Lq <= Lk, the
/// last query stands at the last key; Hq a multiple of Hkv. With cu_seqlens (S+1) B is 1 and Lq = Lk.
/// Outputs must not overlap inputs. Sums are double for f64 and float for all others.
///
/// Errors, before anything is written: invalid_argument (options, shapes, null views, cu_seqlens),
/// unsupported (an instruction set that this machine lacks), workspace_too_small.
///
/// Source: the online softmax of Milakov and Gimelshein, arXiv 1805.02867, in tiles as FlashAttention,
/// arXiv 2205.14135.
template <class T>
Status forward(const cpu& requested, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.keys));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    detail::tiled_forward(exec, options, in, out, ws);
    return {};
}

/// dq, dk and dv (eq. 6 to 12) from the inputs, forward's o and lse, and upstream gradients: do (B, Lq, Hq,
/// dv) and, optionally, dlse (B, Lq, Hq). Gradients have the shapes of the inputs, are overwritten, and
/// one whose view is null is not computed. Softmax reads out.o and out.lse, sigmoid neither (o is
/// still checked). Errors as in forward.
template <class T>
Status backward(const cpu& requested, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved,
                const Upstream<T>& upstream, const Grads<T>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.keys));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    detail::tiled_backward(exec, options, in, out, upstream, grads, ws);
    return {};
}

/// Decodes n tokens for every batch row: writes k (B, n, Hkv, dh) and v (B, n, Hkv, dv) at rows length, length + 1, ... of the
/// cache (B, capacity, Hkv, .), or (pages, page_size, Hkv, .) with a block table, and o (B, n, Hq, dv) and optionally lse
/// (B, n, Hq) as the last n rows of forward over length + n keys would be. The caller then counts the tokens. Rows of the cache
/// from length + n on are not read. Errors as in forward, and invalid_argument where the cache has no room, or a length or a page is
/// out of range.
template <class T>
Status step(const cpu& requested, const Options& options, const Params&, const State<T>& state,
            const Tokens<T>& tokens, const TokensOut<T>& out, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, tokens, out));
    const Shape shape = shape_of(state, tokens);
    INTERSTATE_RETURN_IF_ERROR(check_rows(options, state, shape.batch, shape.queries));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::step)));
    detail::cached_step(exec, options, state, tokens, out, ws);
    return {};
}
/// One token: q (B, Hq, dh), k (B, Hkv, dh), v (B, Hkv, dv), o (B, Hq, dv), lse (B, Hq).
template <class T>
Status step(const cpu& exec, const Options& options, const Params& params, const State<T>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, token, out));
    return step(exec, options, params, state, tokens_of(token), tokens_of(out), ws);
}

}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
