// Forward and backward of S4D on the GPU out of a method's two kernels (cuda_system.cuh): which systems
// run, in which direction, and what is kept between them.
#pragma once

#include <interstate/cuda/launch.cuh>
#include <interstate/workspace.hpp>
#include <s4d/detail/cuda_system.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

/// States that enter the tiles of both halves, from forward for backward.
template <class T, class Method>
struct SavedStates {
    complex<acc_t<T>>* half[2];
    SavedStates(Arena& arena, const Shape& s) {
        const Index size = tile_count(s, Method::tile) * s.channels * s.modes;
        half[0] = arena.take<complex<acc_t<T>>>(size);
        half[1] = s.bidirectional ? arena.take<complex<acc_t<T>>>(size) : nullptr;
    }
};

template <class T, class Method>
struct DriverLayout {
    using A = acc_t<T>;
    using Tables = typename Method::Tables;
    struct System {
        SystemMode* modes;
        Tables tables, exchanged;
        System(Arena& arena, const Shape& s, bool used, bool backward)
            : modes(arena.take<SystemMode>(used ? s.channels * s.modes : 0)),
              tables(arena, s, used),
              exchanged(arena, s, used && backward) {}
    };
    System system[2];                        // of the causal and the reversed half
    A* sum;                                  // (B, L, H), bidirectional: one half waits for the other
    typename Method::Scratch scratch;
    complex<A>* exchanged_checkpoints[2];    // (slots, H, N)
    PartialSums sums[2];

    DriverLayout(Arena& arena, const Shape& s, pass p)
        : system{{arena, s, true, p == pass::backward}, {arena, s, s.bidirectional, p == pass::backward}},
          sum(s.bidirectional ? arena.take<A>(s.batch * s.length * s.channels) : nullptr),
          scratch(arena, s) {
        for (int half = 0; half < 2; ++half) {
            const bool used = p == pass::backward && (half == 0 || s.bidirectional);
            const Index modes = used ? s.channels * s.modes : 0;
            exchanged_checkpoints[half] = arena.take<complex<A>>(tile_count(s, Method::tile) * modes);
            const int parts = used ? Method::parts(s) : 0;
            sums[half] = {arena.take<SystemSums>(parts * modes), arena.take<double>(parts * s.channels * Method::lag_count),
                          parts, Method::lag_count};
        }
    }
};

/// Modes and tables of one half.
template <class T, class Method, class P>
Status prepare_half(const cuda& exec, const Options& options, const Params<P>& params, const Shape& s, Half half,
                    const DriverLayout<T, Method>& w) {
    const auto& system = w.system[half == Half::causal ? 0 : 1];
    return Method::prepare(exec, options, params, s, half, system.modes, system.tables, system.exchanged);
}

template <class T>
Status zero_outside(const cuda& exec, const View<T, 3>& y, const View<const std::int32_t, 1>& cu, const Shape& s) {
    if (!cu || !y || s.channels == 0) return {};
    return launch(exec, "zero_outside_sequences_kernel", zero_outside_sequences_kernel<T>,
                  {dim3(static_cast<unsigned>(s.length)), dim3(128)}, y, cu);
}

template <class T, class Method, class P>
Status run_forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
                   Workspace ws) {
    const Shape s = shape_of(in);
    Arena arena(ws.data), saved_arena(saved.data);
    const DriverLayout<T, Method> w(arena, s, pass::forward);
    const SavedStates<T, Method> states(saved_arena, s);
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.y, in.cu_seqlens, s));
    if (s.states() == 0 || s.channels == 0) return {};
    SystemRun<T> run{.u = in.u, .cu = in.cu_seqlens, .shape = s};
    if (s.bidirectional) {
        INTERSTATE_RETURN_IF_ERROR(prepare_half(exec, options, in.params, s, Half::reversed, w));
        run.backwards = true;
        run.sum = w.sum;
        run.checkpoints = saved.data ? states.half[1] : nullptr;
        INTERSTATE_RETURN_IF_ERROR(Method::run(exec, run, w.system[1].modes, w.system[1].tables, w.scratch));
    }
    INTERSTATE_RETURN_IF_ERROR(prepare_half(exec, options, in.params, s, Half::causal, w));
    run.backwards = false;
    run.sum = nullptr;
    run.addend = w.sum;
    run.y = out.y;
    run.initial = in.x0;
    run.final = out.xT;
    run.checkpoints = saved.data ? states.half[0] : nullptr;
    return Method::run(exec, run, w.system[0].modes, w.system[0].tables, w.scratch);
}

template <class T, class Method, class P>
Status run_backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, Saved saved,
                    const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    const Shape s = shape_of(in);
    Arena arena(ws.data), saved_arena(saved.data);
    const DriverLayout<T, Method> w(arena, s, pass::backward);
    const SavedStates<T, Method> states(saved_arena, s);
    const auto& g = grads.params;
    const bool params = g.log_dt || g.log_neg_re || g.im || g.B || g.C || g.D || g.C_reverse;
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.u, in.cu_seqlens, s));
    if (s.channels == 0) return {};

    SystemRun<T> run{.u = upstream.y, .cu = in.cu_seqlens, .shape = s};
    if (s.bidirectional) {
        INTERSTATE_RETURN_IF_ERROR(prepare_half(exec, options, in.params, s, Half::reversed, w));
        run.sum = w.sum;
        run.checkpoints = params ? w.exchanged_checkpoints[1] : nullptr;
        INTERSTATE_RETURN_IF_ERROR(Method::run(exec, run, w.system[1].modes, w.system[1].exchanged, w.scratch));
    }
    INTERSTATE_RETURN_IF_ERROR(prepare_half(exec, options, in.params, s, Half::causal, w));
    run.backwards = true;
    run.sum = nullptr;
    run.addend = w.sum;
    run.y = grads.u;
    run.initial = upstream.xT;
    run.final = grads.x0;
    run.conjugate = true;
    run.checkpoints = params ? w.exchanged_checkpoints[0] : nullptr;
    INTERSTATE_RETURN_IF_ERROR(Method::run(exec, run, w.system[0].modes, w.system[0].exchanged, w.scratch));
    if (!params) return {};

    for (int half = 0; half < (s.bidirectional ? 2 : 1); ++half) {
        const SystemRun<T> system{.u = in.u, .cu = in.cu_seqlens, .backwards = half == 1,
                                  .checkpoints = states.half[half], .shape = s};
        INTERSTATE_RETURN_IF_ERROR(Method::gradient(exec, system, upstream.y, w.system[half].modes, w.system[half].tables,
                                                    w.system[half].exchanged, w.exchanged_checkpoints[half],
                                                    w.sums[half]));
    }
    return launch(exec, "finish_gradients_kernel", finish_gradients_kernel<P>,
                  {dim3(static_cast<unsigned>(s.channels)), dim3(finish_threads)}, options.disc, in.params, s.modes,
                  w.sums[0], w.sums[1], grads.params);
}

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
