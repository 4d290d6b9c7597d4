// Interdomain Attention, public: the executors `reference` and `cpu` (cuda: interdomain/interdomain.cuh). Equations, shapes and
// units: docs/ops/interdomain.md.
//
//     Workspace ws{memory, interdomain::workspace_size(exec, options, shape, pass::forward)};
//     Status status = interdomain::forward(exec, options, in, out, Saved{}, ws);
#pragma once

#include <interdomain/detail/cpu_chunked.hpp>
#include <interdomain/detail/cpu_fft.hpp>
#include <interdomain/detail/cpu_scan.hpp>
#include <interdomain/detail/cpu_step.hpp>
#include <interdomain/params.hpp>
#include <interdomain/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain {

namespace detail {
/// What Method::automatic stands for on the CPU: chunks do the fewest operations at any length, and do them as
/// products of matrices.
constexpr Method cpu_method(const Options& options) {
    return options.method == Method::automatic ? Method::chunked : options.method;
}
}  // namespace detail

/// The kernel that forward and backward will run: interdomain.cpu.<method>.<instruction set>.
inline KernelChoice which_kernel(const cpu& exec, const Options& options, const Shape&) {
    const bool chosen = options.method == Method::automatic;
    const Isa isa = simd::resolve(exec.isa);
    const auto named = [&](const char* baseline, const char* avx2, const char* avx512, const char* why) -> KernelChoice {
        return {isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : baseline, why};
    };
    switch (detail::cpu_method(options)) {
        case Method::scan:
            return named("interdomain.cpu.scan.baseline", "interdomain.cpu.scan.avx2", "interdomain.cpu.scan.avx512",
                         "token by token in float64: as options.method asks");
        case Method::parallel_scan:
            return named("interdomain.cpu.parallel_scan.baseline", "interdomain.cpu.parallel_scan.avx2",
                         "interdomain.cpu.parallel_scan.avx512",
                         "chunks of 64 tokens, states by an associative scan: as options.method asks");
        case Method::fft:
            return named("interdomain.cpu.fft.baseline", "interdomain.cpu.fft.avx2", "interdomain.cpu.fft.avx512",
                         "convolutions mode by mode in float64: as options.method asks");
        default:
            return named("interdomain.cpu.chunked.baseline", "interdomain.cpu.chunked.avx2", "interdomain.cpu.chunked.avx512",
                         chosen ? "chunks of 64 tokens: the fewest operations at any length"
                                : "chunks of 64 tokens: as options.method asks");
    }
}

/// Bytes of `Saved` that forward fills for backward: one state per 256 tokens; none with Method::fft, which
/// recomputes.
inline std::size_t saved_size(const cpu&, const Options& options, const Shape& shape) {
    if (detail::cpu_method(options) == Method::fft) return 0;
    const std::size_t element = shape.dtype == DType::f64 ? sizeof(double) : sizeof(float);
    Arena arena;
    arena.take<std::byte>(static_cast<Index>(element) * detail::stretch_count(shape) * shape.kv_heads *
                          detail::Tiling(options, shape).state_size());
    return arena.required();
}

/// Bytes of workspace; depends on the method and on the number of threads.
inline std::size_t workspace_size(const cpu& exec, const Options& options, const Shape& shape, pass p) {
    const int threads = thread_count(exec.threads);
    if (p == pass::step) return static_cast<std::size_t>(threads) * detail::step_scratch(options, shape);
    switch (detail::cpu_method(options)) {
        case Method::scan: return detail::layout_size<detail::ScanLayout>(options, shape, p, threads);
        case Method::fft:
            return detail::layout_size<detail::FftLayout>(options, shape, p, threads,
                                                          Index{simd::lanes<double>(simd::resolve(exec.isa))});
        default:
            return shape.dtype == DType::f64
                       ? detail::layout_size<detail::ChunkedLayout<double>>(options, shape, p, threads)
                       : detail::layout_size<detail::ChunkedLayout<float>>(options, shape, p, threads);
    }
}

/// o (B, L, Hq, d) and the final states. Pass `saved` memory if backward will follow, Saved{} if not.
template <class T, class P>
Status forward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
               Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    if (saved.data)
        INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    switch (detail::cpu_method(options)) {
        case Method::scan: detail::scan_forward(exec, options, in, out, saved, ws); break;
        case Method::fft: detail::fft_forward(exec, options, in, out, ws); break;
        default: detail::chunked_forward(exec, options, in, out, saved, ws);
    }
    return {};
}

/// Gradients of every input whose view in `grads` is not null. `saved` is what forward filled for the same inputs;
/// `out` is not read.
template <class T, class P>
Status backward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    switch (detail::cpu_method(options)) {
        case Method::scan: detail::scan_backward(exec, options, in, saved, upstream, grads, ws); break;
        case Method::fft: detail::fft_backward(exec, options, in, upstream, grads, ws); break;
        default: detail::chunked_backward(exec, options, in, saved, upstream, grads, ws);
    }
    return {};
}

/// Fills Lam and Bbar of `discrete` (eq. 2); C is the caller's to set.
template <class P>
Status discretize(const cpu&, const Options& options, const Params<P>& params, const Discrete<P>& discrete) {
    return discretize(reference{}, options, params, discrete);
}

/// One token for every batch row; the state is updated in place.
template <class T, class P>
Status step(const cpu& requested, const Options& options, const Discrete<P>& discrete, const State<acc_t<T>>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, discrete, state, token, out));
    const Shape shape = shape_of(discrete, token);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::step)));
    detail::step_tokens(exec, options, discrete, state, token, out, ws);
    return {};
}

}  // namespace interdomain
}  // namespace interstate::inline INTERSTATE_ABI
