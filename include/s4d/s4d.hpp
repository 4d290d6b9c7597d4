// S4D, the diagonal state space layer: public entry for the reference and the CPU.
//
//   x[t] = Abar x[t-1] + Bbar u[t],   y[t] = 2 Re sum_n C[n] x[t,n] + D u[t]
//
// Source: "On the Parameterization and Initialization of Diagonal State Space Models",
// arXiv 2206.11893; equations, shapes and dtypes: docs/ops/s4d.md. The cuda executor: s4d/s4d.cuh.
// Arguments and their shapes: s4d/params.hpp. The plain loops: s4d/reference.hpp.
#pragma once

#include <s4d/detail/cpu_chunked.hpp>
#include <s4d/detail/cpu_fft.hpp>
#include <s4d/detail/cpu_scan.hpp>
#include <s4d/params.hpp>
#include <s4d/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d {

namespace detail {
/// What Method::automatic stands for on the CPU: the faster of forward and backward together, by a model of
/// nanoseconds a channel and sequence on one thread, fitted to times of an EPYC with AVX-512 (float32, B 1 to
/// 64, L 16 to 65,536, N 4 to 256; some of them in docs/benchmarks/s4d.md), without what both methods need.
/// fft: 5 transforms, and 3 of K, which a batch shares as it does the making of K. chunked: 3 + 0.4 N a
/// token, 1.6 times that in both directions, in whole groups of chunks. Below a chunk of tokens a call is a
/// piece of a stream, which carries states: the recurrence has the least to set up. Packed sequences differ
/// in length, and K would be transformed for each of them: no fft.
inline Method cpu_method(const Options& options, const Shape& s) {
    if (options.method != Method::automatic) return options.method;
    const Index mean = s.packed() ? s.length / std::max<Index>(s.sequences, 1) : s.length;
    if (mean < chunk_tokens) return Method::scan;
    if (s.packed()) return Method::chunked;
    const double N = static_cast<double>(s.modes), B = static_cast<double>(std::max<Index>(s.batch, 1));
    const double L = static_cast<double>(s.length), m = static_cast<double>(fft::size_for(s.length));
    const double tokens = static_cast<double>(ceil_div(s.length, group_tokens) * group_tokens);
    const double transforms = 0.15 * m * std::log2(m) * (5.0 + 3.0 / B);
    const double kernel = (s.bidirectional ? 2.0 : 1.0) * 0.2 * N * L / B;
    const double chunks = (s.bidirectional ? 1.6 : 1.0) * (3.0 + 0.4 * N) * tokens;
    return transforms + kernel < chunks ? Method::fft : Method::chunked;
}

/// Bytes of a layout, whose first argument is an Arena.
template <class Layout, class... Args>
std::size_t layout_size(const Args&... args) {
    Arena arena;
    Layout(arena, args...);
    return arena.required();
}
template <class A>
std::size_t cpu_workspace_size(Method method, const Shape& shape, pass p, int threads, Index W) {
    switch (method) {
        case Method::fft: return layout_size<FftLayout<A>>(shape, p, threads, W);
        case Method::scan: return layout_size<ScanLayout<A>>(shape, p, threads, W);
        default: return layout_size<ChunkedLayout<A>>(shape, p, threads, W);
    }
}
}  // namespace detail

/// The kernel that forward and backward will run: s4d.cpu.<method>.<instruction set>.
inline KernelChoice which_kernel(const cpu& exec, const Options& options, const Shape& shape) {
    const bool chosen = options.method == Method::automatic;
    const Isa isa = simd::resolve(exec.isa);
    const auto named = [&](const char* baseline, const char* avx2, const char* avx512, const char* why,
                           const char* asked) -> KernelChoice {
        return {isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : baseline, chosen ? why : asked};
    };
    switch (detail::cpu_method(options, shape)) {
        case Method::fft:
            return named(
                "s4d.cpu.fft.baseline", "s4d.cpu.fft.avx2", "s4d.cpu.fft.avx512",
                "convolution by transforms: modes cost once a batch, not once a token, and there are many",
                "convolution by transforms: as options.method asks");
        case Method::scan:
            return named("s4d.cpu.scan.baseline", "s4d.cpu.scan.avx2", "s4d.cpu.scan.avx512",
                         "recurrence: sequences are shorter than a chunk of 16 tokens",
                         "recurrence: as options.method asks");
        default:
            return named("s4d.cpu.chunked.baseline", "s4d.cpu.chunked.avx2", "s4d.cpu.chunked.avx512",
                         "chunks of 16 tokens: the fastest by a model of measured times",
                         "chunks of 16 tokens: as options.method asks");
    }
}

/// Bytes of `Saved` that forward fills for backward: one state per 256 tokens and direction; none with
/// Method::fft, which recomputes.
inline std::size_t saved_size(const cpu&, const Options& options, const Shape& shape) {
    if (detail::cpu_method(options, shape) == Method::fft) return 0;
    const std::size_t element = shape.dtype == DType::f64 ? sizeof(double) : sizeof(float);
    Arena arena;
    arena.take<std::byte>(static_cast<Index>(element) * detail::directions(shape) *
                          detail::checkpoint_count(shape) * detail::checkpoint_size(shape));
    return arena.required();
}

/// Bytes of workspace; depends on the method and on the number of threads.
inline std::size_t workspace_size(const cpu& exec, const Options& options, const Shape& shape, pass p) {
    if (p == pass::step) return 0;
    const int threads = thread_count(exec.threads);
    const Isa isa = simd::resolve(exec.isa);
    const Method method = detail::cpu_method(options, shape);
    return shape.dtype == DType::f64
               ? detail::cpu_workspace_size<double>(method, shape, p, threads, simd::lanes<double>(isa))
               : detail::cpu_workspace_size<float>(method, shape, p, threads, simd::lanes<float>(isa));
}

/// y (B, L, H) and the final states xT. Pass `saved` memory if backward will follow, Saved{} if not.
template <class T, class P>
Status forward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out,
               Saved saved, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    if (saved.data)
        INTERSTATE_RETURN_IF_ERROR(
            check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    switch (detail::cpu_method(options, shape)) {
        case Method::fft: detail::fft_forward(exec, options, in, out, ws); break;
        case Method::scan: detail::scan_forward(exec, options, in, out, saved, ws); break;
        default: detail::chunked_forward(exec, options, in, out, saved, ws);
    }
    return {};
}

/// Gradients of every input whose view in `grads` is not null. `saved` is what forward filled for the
/// same inputs; `out` is not read.
template <class T, class P>
Status backward(const cpu& requested, const Options& options, const Inputs<T, P>& in, const Outputs<T>&,
                Saved saved, const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.length));
    INTERSTATE_RETURN_IF_ERROR(
        check_memory("saved", saved.data, saved.size, saved_size(exec, options, shape)));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    switch (detail::cpu_method(options, shape)) {
        case Method::fft: detail::fft_backward(exec, options, in, upstream, grads, ws); break;
        case Method::scan: detail::scan_backward(exec, options, in, saved, upstream, grads, ws); break;
        default: detail::chunked_backward(exec, options, in, saved, upstream, grads, ws);
    }
    return {};
}

/// Workspace of generate_kernel (pass::forward) and of its backward; shape from shape_of(params, K).
inline std::size_t generate_kernel_workspace_size(const cpu& exec, const Options&, const Shape& shape,
                                                  pass p) {
    const int threads = thread_count(exec.threads);
    const Isa isa = simd::resolve(exec.isa);
    return shape.dtype == DType::f64
               ? detail::layout_size<detail::KernelLayout<double>>(shape, p, threads,
                                                                   simd::lanes<double>(isa))
               : detail::layout_size<detail::KernelLayout<float>>(shape, p, threads, simd::lanes<float>(isa));
}

/// The Vandermonde kernel K[h,l] = 2 Re sum_n C Bbar Abar^l (eq. 14), K (H, L) in f32 or f64, in O(L + N)
/// memory a channel.
template <class A, class P>
Status generate_kernel(const cpu& requested, const Options& options, const Params<P>& params,
                       const View<A, 2>& K, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(params, K));
    INTERSTATE_RETURN_IF_ERROR(check_workspace(
        "workspace", ws, generate_kernel_workspace_size(exec, options, shape_of(params, K), pass::forward)));
    detail::kernel_forward(exec, options, params, K, ws);
    return {};
}

/// Gradients of the parameters from dK (H, L) (eq. 15); those of D and C_reverse, which K does not depend
/// on, are set to zero.
template <class A, class P>
Status generate_kernel_backward(const cpu& requested, const Options& options, const Params<P>& params,
                                const View<const A, 2>& dK, const BasicParams<P, complex<P>>& grads,
                                Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(params, dK, grads));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws,
                        generate_kernel_workspace_size(exec, options, shape_of(params, dK), pass::backward)));
    detail::kernel_backward(exec, options, params, dK, grads, ws);
    return {};
}

/// Fills Abar and Bbar of `discrete` (eq. 2); C and D are the caller's to set.
template <class P>
Status discretize(const cpu&, const Options& options, const Params<P>& params, const Discrete<P>& discrete) {
    return discretize(reference{}, options, params, discrete);
}

/// One token for every batch row; the state is updated in place. Needs no workspace.
template <class T, class P>
Status step(const cpu& requested, const Options&, const Discrete<P>& discrete, const State<acc_t<T>>& state,
            const Token<T>& token, const TokenOut<T>& out, Workspace) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(discrete, state, token, out));
    const Index B = token.u.extent[0];
    // One row is microseconds of work: starting threads pays only for many of them.
    const Index work = B * discrete.Abar.extent[0] * discrete.Abar.extent[1];
    parallel_for(B, work < (Index{1} << 17) ? 1 : exec.threads, [&](Index b, int) {
        simd::run_body<detail::StepBody<T, P>>(exec.isa, discrete, state, token, out, b);
    });
    return {};
}

}  // namespace s4d
}  // namespace interstate::inline INTERSTATE_ABI
