// Forward and backward of S4D on the GPU out of a method's two kernels (cuda_system.cuh): which systems
// run, in which direction, and what is kept between them.
#pragma once

#include <interstate/cuda/launch.cuh>
#include <interstate/workspace.hpp>
#include <s4d/detail/cuda_system.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {
inline namespace INTERSTATE_KERNELS {

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
    A* sum;                                  // (B, H, L), bidirectional: one half waits for the other
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

/// Runs the systems of both halves or, for `backward`, the exchanged ones the other way. `causal` has what only
/// the causal half has: y, and the first and the last state. The reversed half goes first and waits in w.sum.
template <class T, class Method, class P>
Status run_halves(const cuda& exec, const Options& options, const Params<P>& params, const DriverLayout<T, Method>& w,
                  bool backward, SystemRun<T> causal, complex<acc_t<T>>* const (&checkpoints)[2]) {
    const auto run_half = [&](Half half, const SystemRun<T>& run) -> Status {
        const auto& system = w.system[half == Half::causal ? 0 : 1];
        INTERSTATE_RETURN_IF_ERROR(Method::prepare(exec, options, params, run.shape, half, system.modes, system.tables,
                                                   system.exchanged));
        return Method::run(exec, run, system.modes, backward ? system.exchanged : system.tables, w.scratch);
    };
    if (causal.shape.bidirectional)
        INTERSTATE_RETURN_IF_ERROR(run_half(Half::reversed, {.u = causal.u, .cu = causal.cu, .backwards = !backward,
                                                             .checkpoints = checkpoints[1], .sum = w.sum,
                                                             .shape = causal.shape}));
    causal.backwards = backward;
    causal.checkpoints = checkpoints[0];
    causal.addend = w.sum;
    return run_half(Half::causal, causal);
}

template <class T, class Method, class P>
Status run_forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved,
                   Workspace ws) {
    const Shape s = shape_of(in);
    Arena arena(ws.data), saved_arena(saved.data);
    const DriverLayout<T, Method> w(arena, s, pass::forward);
    const SavedStates<T, Method> states(saved_arena, s);
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.y, in.cu_seqlens));
    if (s.states() == 0 || s.channels == 0) return {};
    return run_halves(exec, options, in.params, w, false,
                      SystemRun<T>{.u = in.u, .y = out.y, .cu = in.cu_seqlens, .initial = in.x0, .final = out.xT, .shape = s},
                      {saved.data ? states.half[0] : nullptr, saved.data ? states.half[1] : nullptr});
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
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.u, in.cu_seqlens));
    if (s.channels == 0) return {};

    INTERSTATE_RETURN_IF_ERROR(run_halves(
        exec, options, in.params, w, true,
        SystemRun<T>{.u = upstream.y, .y = grads.u, .cu = in.cu_seqlens, .initial = upstream.xT, .final = grads.x0,
                     .conjugate = true, .shape = s},
        {params ? w.exchanged_checkpoints[0] : nullptr, params ? w.exchanged_checkpoints[1] : nullptr}));
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

}  // namespace INTERSTATE_KERNELS
}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
