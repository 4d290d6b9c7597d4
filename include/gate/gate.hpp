// The output gate of Interdomain Attention, public: the executors `reference` and `cpu`.
//
//   y = o sigmoid(g)
//
// where g is the caller's projection of the layer's input. Source: arXiv 2605.24330; equations, shapes and dtypes:
// docs/ops/gate.md. The cuda executor: gate/gate.cuh. Arguments and their shapes: gate/params.hpp.
#pragma once

#include <gate/detail/cpu_rows.hpp>
#include <gate/params.hpp>
#include <gate/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace gate {

inline std::size_t saved_size(const cpu&, const Options&, const Shape&) { return 0; }
inline std::size_t workspace_size(const cpu&, const Options&, const Shape&, pass) { return 0; }

inline KernelChoice which_kernel(const cpu& exec, const Options&, const Shape&) {
    const char* reason = exec.isa == Isa::automatic ? "the best instruction set of this machine; any shape and strides"
                                                    : "the instruction set that was asked for; any shape and strides";
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512: return {"gate.cpu.rows.avx512", reason};
        case Isa::avx2: return {"gate.cpu.rows.avx2", reason};
        default: return {"gate.cpu.rows.baseline", reason};
    }
}

/// y (B, L, H, d) of o and g (B, L, H, d), of T = f64, f32, f16 or bf16, any strides; arithmetic is double for f64, else
/// float. y may be o or g itself. Needs neither workspace nor saved.
///
/// Errors, before anything is written: invalid_argument (shapes, null views, cu_seqlens), unsupported (an instruction set
/// that this machine lacks).
template <class T>
Status forward(const cpu& requested, const Options&, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, in.o.extent[1]));
    detail::cpu_forward(exec, in, out);
    return {};
}

/// The gradients of o and g whose views are not null, from the inputs and dy; `out` is not read.
template <class T>
Status backward(const cpu& requested, const Options&, const Inputs<T>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T>& grads, Workspace) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, in.o.extent[1]));
    detail::cpu_backward(exec, in, upstream, grads);
    return {};
}

/// One token for every batch row: o, g and y (B, H, d). The bits are those of `forward`.
template <class T>
Status step(const cpu& requested, const Options&, const Params&, const State&, const Token<T>& token,
            const TokenOut<T>& out, Workspace) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(token, out));
    detail::cpu_forward(exec, Inputs<T>{.o = as_sequences(token.o), .g = as_sequences(token.g)},
                        Outputs<T>{as_sequences(out.y)});
    return {};
}

}  // namespace gate
}  // namespace interstate::inline INTERSTATE_ABI
