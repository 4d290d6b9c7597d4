// SISA, public: the executor `cuda`. Equations, shapes and units: docs/ops/sisa.md.
//
// The same names and arguments as sisa/sisa.hpp, as overloads for `cuda`. Views point to device memory; calls are asynchronous on
// exec.stream and allocate nothing, so that they can be captured in a CUDA graph.
#pragma once

#include <attention/attention.cuh>
#include <sisa/detail/cuda_calls.cuh>
#include <sisa/detail/cuda_step.cuh>
#include <sisa/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {
inline namespace INTERSTATE_KERNELS {

/// Bytes of `Saved`, as on the CPU: for 16-bit storage and softmax, two for each number of o, else none.
inline std::size_t saved_size(const cuda&, const Options& options, const Shape& s) { return s.state_dim > 0 ? detail::rest_size(options, s) : 0; }

/// Bytes of scratch memory for a pass: channels as attention's kernels read them, and sums of tokens.
inline std::size_t workspace_size(const cuda& exec, const Options& options, const Shape& s, pass which) {
    if (s.state_dim == 0) return workspace_size(exec, attention_of(options), attention_of(s), which);
    if (which == pass::step) return detail::step_workspace_size(options, s);
    const Index padded = detail::stored_channels(s.state_dim);  // of the kernels that want most
    Arena arena;
    dispatch_dtype(s.dtype, [&](auto t) {
        detail::CudaWorkspace<decltype(t)>(arena, options, s, padded, which == pass::backward);
        return 0;
    });
    return arena.required();
}

/// The kernels of forward and backward, on the current device.
inline KernelChoice which_kernel(const cuda& exec, const Options& options, const Shape& s) {
    if (s.state_dim == 0) return which_kernel(exec, attention_of(options), attention_of(s));
    if (s.dtype == DType::f64) return {"sisa.cuda.simple", "float64: no tensor cores, a row at a time"};
    if (s.head_dim > 128 || s.value_dim > 128 || s.state_dim > 128)
        return {"sisa.cuda.simple", "heads or channels of more than 128 columns: no tensor cores, a row at a time"};
    if (std::size_t limit = 0; !shared_memory_limit(limit).ok())
        return {"sisa.cuda.tiled or simple", "there is no device to ask for its shared memory: tensor cores where it suffices, else a row at a time"};
    const auto fits = [&](bool backward) {
        bool tiled = false;
        (void)dispatch_dtype(s.dtype, [&](auto t) { return detail::dispatch_channels<decltype(t)>(s, backward, [&](auto dim, auto) { return tiled = dim > 0, Status{}; }); });
        return tiled;
    };
    if (fits(true)) return {"sisa.cuda.tiled", "tensor cores; 16 bytes at once where strides and alignment allow it, single elements otherwise"};
    if (fits(false)) return {"sisa.cuda.tiled, backward simple", "a block of this device has too little shared memory for the tiles of backward: a row at a time"};
    return {"sisa.cuda.simple", "a block of this device has too little shared memory for tiles: a row at a time"};
}

/// What `cuda` leaves to other executors: exp(+-clamp) times C or B, and lambda C over a small scale, leave the range of what channels
/// are stored in.
inline Status check_supported(const Options& options, const Shape& s) {
    if (s.state_dim == 0) return {};
    if (options.mode == Mode::published && s.dtype == DType::f16)
        return Status::error(StatusCode::unsupported, "options.mode is published, must be exact for float16 on cuda: exp(clamp) times C or B is not in its range");
    const double least = s.dtype == DType::f16 ? 0x1p-10 : s.dtype == DType::f64 ? 0.0 : 0x1p-64;
    if (options.scale != 0.0 && std::abs(options.scale) < least)
        return Status::error(StatusCode::unsupported, "options.scale is %g, must be %g or more on cuda: lambda C is stored over it", options.scale, least);
    return {};
}

/// As on the CPU. A launch error is a Status; cu_seqlens is checked on the device and reported in exec.flags.
template <class T, class P>
Status forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_supported(options, s));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    if (saved.data) INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, s)));
    if (s.state_dim == 0) return forward(exec, attention_of(options), attention_of(in), out, saved, ws);
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.keys));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.o, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.lse, in.cu_seqlens));
    return detail::run_forward(exec, options, in, out, saved, ws);
}

/// The gradients whose views are not null, overwritten, the same bits on every call. Errors as in forward.
template <class T, class P>
Status backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved, const Upstream<T>& upstream,
                const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_supported(options, s));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, s)));
    if (s.state_dim == 0)
        return backward(exec, attention_of(options), attention_of(in), out, saved,
                        upstream, attention::Grads<T>{grads.q, grads.k, grads.v}, ws);
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.keys));
    const auto outside = [&](const auto&... x) {
        Status first;
        ((first.ok() ? void(first = zero_outside(exec, x, in.cu_seqlens)) : void()), ...);
        return first;
    };
    INTERSTATE_RETURN_IF_ERROR(outside(grads.q, grads.k, grads.v, grads.C, grads.B, grads.log_alpha, grads.theta));
    return detail::run_backward(exec, options, in, out, saved, upstream, grads, ws);
}

/// The kernel of a step, on the current device.
template <class T, class AnyTokens>
KernelChoice which_step_kernel(const cuda& exec, const Options& options, const State<T>& state, const AnyTokens& tokens) {
    const Shape s = shape_of(state, tokens);
    if (s.state_dim == 0) return which_step_kernel(exec, attention_of(options), attention_of(state), attention_of(tokens));
    if (s.dtype == DType::f64) return {"sisa.cuda.step.simple", "float64: no tensor cores, a row at a time"};
    if (s.head_dim > 128 || s.value_dim > 128 || s.state_dim > 128)
        return {"sisa.cuda.step.simple", "heads or channels of more than 128 columns: no tensor cores, a row at a time"};
    if (std::size_t limit = 0; !shared_memory_limit(limit).ok())
        return {"sisa.cuda.step.split or simple", "there is no device to ask for its shared memory: tensor cores where it suffices, else a row at a time"};
    bool fits = false;
    (void)detail::dispatch_step<T>(s, [&](auto dim, auto, auto) { return fits = dim > 0, Status{}; });
    if (!fits) return {"sisa.cuda.step.simple", "a block of this device has too little shared memory: a row at a time"};
    if (!device::moves_wide(state.k, s.head_dim) || !device::moves_wide(state.v, s.value_dim) || !device::moves_wide(state.B, s.state_dim))
        return {"sisa.cuda.step.split", "rows of the cache in single elements: not contiguous, or not aligned to 16 bytes"};
    return {"sisa.cuda.step.split", "tensor cores, the cache split over the device and read once, 16 bytes at a time"};
}

/// Adds n tokens of a prompt to the cache, as on the CPU, the bits of n steps; it needs no workspace. A sequence without room is left
/// alone, rows on pages that are none of the cache's are not written; both are reported in exec.flags.
template <class T, class P>
Status append(const cuda& exec, const Options& options, const State<T>& state, const Keys<T, P>& keys) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, keys));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::run_append(exec, reads_nothing, shape_of(state, keys), state, keys, View<const T, 4>{}, View<const P, 1>{},
                              detail::StepQueries<T>{});
}

/// n tokens for every batch row, as on the CPU. Lengths and block table are read on the device alone, as by attention's step; the
/// recurrent values of a sequence without room stay as they are.
template <class T, class P>
Status step(const cuda& exec, const Options& options, const Params<P>& params, const State<T>& state, const Tokens<T, P>& tokens,
            const TokensOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, tokens, out));
    const Shape s = shape_of(state, tokens);
    if (s.state_dim == 0)
        return step(exec, attention_of(options), attention::Params{}, attention_of(state), attention_of(tokens),
                    out, ws);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    return detail::run_step(exec, options, params, state, tokens, out, ws);
}
template <class T, class P>
Status step(const cuda& exec, const Options& options, const Params<P>& params, const State<T>& state, const Token<T, P>& token,
            const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, token, out));
    return step(exec, options, params, state, tokens_of(token), tokens_of(out), ws);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
