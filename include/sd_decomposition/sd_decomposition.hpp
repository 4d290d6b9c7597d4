// Routing and filtering of attention heads, public: the executors `reference` and `cpu`.
//
//   A = scale Q K^T,   S = (A - A^T) / 2,   F = (A + A^T) / 2
//
// with their norms, singular values and ranks. Equations, shapes and dtypes: docs/ops/sd_decomposition.md. Arguments and
// their shapes: sd_decomposition/params.hpp.
#pragma once

#include <sd_decomposition/detail/cpu_tridiagonal.hpp>
#include <sd_decomposition/params.hpp>
#include <sd_decomposition/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition {

inline std::size_t saved_size(const cpu&, const Options&, const Shape&) { return 0; }
/// A few matrices of 2d x 2d and 128 rows of [Q K] for each thread that has a head.
inline std::size_t workspace_size(const cpu& exec, const Options&, const Shape& s, pass) {
    return dispatch_dtype(s.dtype, [&]<class T>(T) {
        Arena arena;
        const auto bytes = static_cast<Index>(detail::Scratch<acc_t<T>>::bytes(s));
        arena.take<std::byte>(detail::area(detail::workers(exec, s), bytes));
        return arena.required();
    });
}

inline KernelChoice which_kernel(const cpu& exec, const Options&, const Shape&) {
    const char* reason = exec.isa == Isa::automatic ? "the best instruction set of this machine; any shape and strides"
                                                    : "the instruction set that was asked for; any shape and strides";
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512: return {"sd_decomposition.cpu.tridiagonal.avx512", reason};
        case Isa::avx2: return {"sd_decomposition.cpu.tridiagonal.avx2", reason};
        default: return {"sd_decomposition.cpu.tridiagonal.baseline", reason};
    }
}

/// Norms, singular values and ranks of S and F (eq. 1 to 5) of every head.
///
/// Q (B, L, H, d) and K (B, L, Hkv, d) of T = f64, f32, f16 or bf16, H a multiple of Hkv; outputs (B, H), and singular values
/// (B, H, min(L, 2d)), of double for f64, else float, which is also what the arithmetic is; a null one is not
/// written. Any strides. For the kernel of weights, W_Q W_K^T: Q = W_Q, K = W_K (1, D, heads, dh) and options.scale = 1.
///
/// Errors, before anything is written: invalid_argument (options, shapes, null inputs), unsupported (an instruction set that
/// this machine lacks), workspace_too_small.
template <class T>
Status forward(const cpu& requested, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape_of(in), pass::forward)));
    detail::cpu_forward(exec, options, in, out, ws);
    return {};
}

}  // namespace sd_decomposition
}  // namespace interstate::inline INTERSTATE_ABI
