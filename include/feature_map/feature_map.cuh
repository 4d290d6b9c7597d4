// The feature map of Interdomain Attention, public: the executor `cuda`.
//
// The same names and arguments as feature_map/feature_map.hpp, as overloads for `cuda`: every dtype, stage, stride and
// size. Views point to device memory; calls are asynchronous on exec.stream and allocate nothing. Equations:
// docs/ops/feature_map.md.
#pragma once

#include <feature_map/detail/cuda_general.cuh>
#include <feature_map/detail/cuda_teams.cuh>
#include <feature_map/params.hpp>
#include <interstate/cuda/sequences.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map {

namespace detail {

/// Backward's workspace: sums over rows and, in general, dc.
template <class A>
struct CudaLayout {
    PartialSums<A> sums;
    A* dc;
    CudaLayout(Arena& arena, const Shape& s) {
        const bool any = s.rows() > 0 && s.heads > 0 && s.features > 0, teams = fits_teams(s);
        const Index size = s.heads * s.features;
        sums.parts = !any ? 0 : teams ? backward_plan(s).parts() : general_parts(s);
        sums.data = arena.take<A>(sums.parts * (s.taps + 3) * size);
        sums.scales = arena.take<double>(size);
        dc = arena.take<A>(teams ? 0 : s.rows() * size);
    }
};

/// What a grid can hold of heads and states, in any kernel.
inline Status check_grid(const Shape& s) {
    if (s.heads > 65535)
        return Status::error(StatusCode::unsupported, "x: heads are %lld, must be at most 65535 on cuda",
                             static_cast<long long>(s.heads));
    return {};
}

}  // namespace detail

inline namespace INTERSTATE_KERNELS {

inline KernelChoice which_kernel(const cuda&, const Options& options, const Shape& shape) {
    if (!detail::fits_teams(shape))
        return {"feature_map.cuda.general", "a block a head, row by row: more than 256 features (f64: 128) or 4 taps"};
    if (!detail::whole_chunks(shape, options.rope, detail::elements_of(shape)))
        return {"feature_map.cuda.teams.narrow", "single elements: features are no whole number of what a lane moves at once"};
    return {"feature_map.cuda.teams", "lanes move 8 elements (f64: 4), or twice half as many, at once of tensors whose strides and "
                                      "alignment allow it, single elements of others"};
}

inline std::size_t saved_size(const cuda&, const Options&, const Shape&) { return 0; }

/// Bytes of workspace in device memory; forward and step need none.
inline std::size_t workspace_size(const cuda&, const Options&, const Shape& shape, pass p) {
    if (p != pass::backward) return 0;
    Arena arena;
    if (shape.dtype == DType::f64)
        detail::CudaLayout<double>(arena, shape);
    else
        detail::CudaLayout<float>(arena, shape);
    return arena.required();
}

/// As on the CPU, but outputs must not overlap inputs (convT is not conv0; `step` updates its state in place). A launch
/// error is a Status; cu_seqlens is checked on the device and reported in exec.flags.
template <class T, class P>
Status forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.length));
    detail::Problem<T> p(options, in);
    p.y = out.y;
    p.convT = out.convT;
    if (s.heads == 0 || s.features == 0) return {};
    INTERSTATE_RETURN_IF_ERROR(detail::empty_states(exec, p, false));
    if (s.rows() == 0) return {};
    return detail::fits_teams(s) ? detail::team_forward(exec, p) : detail::general_forward(exec, p);
}

/// Gradients of every input whose view in `grads` is not null, from the inputs and dy alone; `out` is not read.
template <class T, class P>
Status backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    using A = acc_t<T>;
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec, in.cu_seqlens, s.length));
    detail::Problem<T> p(options, in);
    p.dy = upstream.y;
    p.dconvT = upstream.convT;
    p.dx = grads.x;
    p.dconv0 = grads.conv0;
    INTERSTATE_RETURN_IF_ERROR(detail::empty_states(exec, p, true));
    Arena arena(ws.data);
    detail::CudaLayout<A> w(arena, s);
    const detail::ParameterGrads params{detail::Parameter(grads.params.conv_weight), detail::Parameter(grads.params.conv_bias),
                                        detail::Parameter(grads.params.scale), detail::Parameter(grads.params.bias)};
    if (!params.wanted()) w.sums.data = nullptr;
    if (w.sums.parts > 0)
        INTERSTATE_RETURN_IF_ERROR(detail::fits_teams(s) ? detail::team_backward(exec, p, w.sums)
                                                         : detail::general_backward(exec, p, w.dc, w.sums));
    return detail::finish_sums(exec, s, w.sums, params);
}

/// One token for every batch row, each at its own position; the convolution's state is updated in place. Needs no
/// workspace. Safe to capture in a CUDA graph, as the others.
template <class T, class P>
Status step(const cuda& exec, const Options& options, const Params<P>& params, const State<T>& state, const Token<T>& token,
            const TokenOut<T>& out, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, token, out));
    return forward(exec, options, step_inputs(options, params, state, token), step_outputs(state, out), Saved{}, Workspace{});
}

}  // namespace INTERSTATE_KERNELS
}  // namespace feature_map
}  // namespace interstate::inline INTERSTATE_ABI
