// SISA, public: the executors `reference` and `cpu`. Equations, shapes and units: docs/ops/sisa.md.
//
//     Workspace ws{memory, sisa::workspace_size(exec, options, shape, pass::forward)};
//     Saved saved{more_memory, sisa::saved_size(exec, options, shape)};  // or Saved{}, if no backward will follow
//     Status status = sisa::forward(exec, options, in, out, saved, ws);
//
// forward    o and, for softmax, lse, of q, k, v, C, B, log_alpha, theta and lam (eq. 1 to 12)
// backward   gradients of all of them from the inputs, lse and upstream gradients (eq. 13 to 25)
// append     a prompt's keys into the cache that step reads (eq. 26)
// step       one token or several for every batch row; options.mode = exact only
//
// Shapes are in sisa/params.hpp, beside each view. A layer's projections become log_alpha and lam in
// sisa/prelude.hpp; the values that it starts from are in sisa/init.hpp.
//
// Source: SISA, arXiv 2606.02332; the mode `exact` is ours.
#pragma once

#include <sisa/detail/cpu_step.hpp>
#include <sisa/detail/cpu_tiled.hpp>
#include <sisa/params.hpp>
#include <sisa/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {

/// Bytes of `Saved`: what rounding takes from o, where that is of 16 bits and there is a softmax; else none.
inline std::size_t saved_size(const cpu&, const Options& options, const Shape& shape) {
    return detail::rest_size(options, shape);
}

/// Bytes of scratch memory for a pass, for exec.threads threads (0: as many as OpenMP has now): that of attention, and
/// the rotated channels, cosines, sines and sums of all tokens.
inline std::size_t workspace_size(const cpu& exec, const Options&, const Shape& shape, pass which) {
    return which == pass::step ? detail::step_workspace_size(exec, shape) : detail::tiled_workspace_size(exec, shape, which);
}

inline KernelChoice which_kernel(const cpu& exec, const Options&, const Shape&) {
    const bool chosen = exec.isa == Isa::automatic;
    const char* reason = chosen ? "the best instruction set of this machine; any shape, strides and options"
                                : "the instruction set that was asked for; any shape, strides and options";
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512: return {"sisa.cpu.tiled.avx512", reason};
        case Isa::avx2: return {"sisa.cpu.tiled.avx2", reason};
        default: return {"sisa.cpu.tiled.baseline", reason};
    }
}

/// o and, for softmax, lse (eq. 1 to 12). Any strides; sums are double for f64 and float for all others, g and Phi double.
/// Pass `saved` memory if backward will follow, Saved{} if not.
///
/// Errors, before anything is written: invalid_argument (options, shapes, null views, cu_seqlens), unsupported (an
/// instruction set that this machine lacks), workspace_too_small.
template <class T, class P>
Status forward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
               Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.keys));
    if (saved.data)
        INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    detail::tiled_forward(exec, options, in, out, saved, ws);
    return {};
}

/// The gradients whose views are not null (eq. 13 to 25), overwritten. Softmax reads out.o and out.lse, and `saved`, what
/// forward filled for the same inputs. Errors as in forward.
template <class T, class P>
Status backward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.keys));
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    detail::tiled_backward(exec, options, in, out, saved, upstream, grads, ws);
    return {};
}

/// Adds n tokens of a prompt to the cache: that of the reference, which is a pass over memory.
template <class T, class P>
Status append(const cpu& requested, const Options& options, const State<T>& state, const Keys<T, P>& keys) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    return append(reference{}, options, state, keys);
}

/// n tokens for every batch row against the cache (eq. 26): the last n rows of forward over length + n keys. Errors as in
/// forward, and invalid_argument where the cache has no room, or a length or a page is out of range.
template <class T, class P>
Status step(const cpu& requested, const Options& options, const Params<P>& params, const State<T>& state,
            const Tokens<T, P>& tokens, const TokensOut<T>& out, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, tokens, out));
    const Shape shape = shape_of(state, tokens);
    INTERSTATE_RETURN_IF_ERROR(attention::check_rows(attention_of(options), state, shape.batch, shape.queries));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::step)));
    detail::cached_step(exec, options, params, state, tokens, out, ws);
    return {};
}
template <class T, class P>
Status step(const cpu& exec, const Options& options, const Params<P>& params, const State<T>& state,
            const Token<T, P>& token, const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, token, out));
    return step(exec, options, params, state, tokens_of(token), tokens_of(out), ws);
}

}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
