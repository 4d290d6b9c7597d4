// The chunked method of Interdomain Attention on the GPU: which kernels run, over which slices of the sequences, and what
// is kept for backward. Memory and cost: docs/ops/interdomain.md, "CUDA kernels".
#pragma once

#include <numeric>

#include <interdomain/detail/cuda_chunk_backward.cuh>
#include <interdomain/detail/cuda_chunk_output.cuh>
#include <interdomain/detail/cuda_chunk_panels.cuh>
#include <interdomain/detail/cuda_chunk_sweep.cuh>
#include <interdomain/detail/cuda_chunk_tables.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail::chunks {
inline namespace INTERSTATE_KERNELS {

/// Why these kernels cannot take a shape; null where they can.
inline const char* why_not(const Shape& s) {
    constexpr Index most = 4096, grid = 65535;  // blocks of a grid count pairs of panels, and heads
    if (s.dtype == DType::f64) return "float64 has no chunked kernel";
    if (s.modes > most || s.features > most || s.value_dim > most) return "M, R or d is above 4096";
    if (s.query_heads > grid || s.kv_heads > grid) return "there are more than 65535 heads";
    if (slot_count(s, Form<f32>::chunk) > 0x7fffffff) return "there are too many chunks";
    return nullptr;
}

/// How a call is cut: chunks between kernels wait in workspace, so a slice of them is computed at a time.
template <class T>
struct Plan {
    using E = typename Form<T>::Element;
    using S = Sizes<T>;
    Panels panels;
    Index slots, slots_of_slice, slices, carriers;
    // Blocks a head: enough for every multiprocessor of a large GPU, and no more sums than that.
    Index output_parts, query_parts, token_parts;

    Plan(const Options& options, const Shape& s) : panels(options, s) {
        slots = slot_count(s, S::chunk);
        carriers = s.packed() ? 1 : s.batch;
        const auto bytes = [&](Index elements) { return static_cast<double>(elements) * sizeof(E); };
        const Index of_query_head = panels.single() ? S::coefficients + S::square : panels.modes * 3 * S::coefficients + 2 * S::square;
        const double of_slot = bytes(s.kv_heads * 2 * panels.state() * S::state + s.query_heads * 2 * of_query_head);
        const double tensors = 2.0 * static_cast<double>(sizeof(T)) * static_cast<double>(s.batch * s.length) *
                               static_cast<double>((s.query_heads + s.kv_heads) * s.columns());
        // A third of all inputs, outputs and gradients, or what is little anyway.
        const double room = std::max(0.33 * tensors, 0x1p26);
        const Index rows = s.packed() ? 1 : std::max<Index>(s.batch, 1);
        slots_of_slice = static_cast<Index>(room / std::max(of_slot, 1.0)) / rows * rows;
        slots_of_slice = std::max(rows, std::min(slots_of_slice, slots));
        output_parts = parts(2 * multiprocessors, s.query_heads);
        query_parts = parts(multiprocessors, s.query_heads * panels.mix());
        token_parts = parts(2 * multiprocessors, s.kv_heads * panels.modes);
        // Slices of equal size, in which the blocks of a head have equally many chunks.
        if (slots > slots_of_slice) {
            const Index whole = rows * output_parts / std::gcd(rows, output_parts), equal = ceil_div(slots, ceil_div(slots, slots_of_slice));
            const Index unit = whole <= equal ? whole : rows;
            slots_of_slice = ceil_div(equal, unit) * unit;
        }
        slices = ceil_div(slots, slots_of_slice);
    }
    static constexpr Index multiprocessors = 132;
    Index parts(Index blocks, Index heads) const {
        return std::min(std::max<Index>(blocks / std::max<Index>(heads, 1), 1), slots_of_slice);
    }
    Slice slice(Index i) const {
        return {static_cast<int>(i * slots_of_slice), static_cast<int>(std::min((i + 1) * slots_of_slice, slots))};
    }
    Index border_size(const Shape& s) const { return carriers * s.kv_heads * panels.state() * S::state; }
};

/// States at the borders between slices, from forward for backward.
template <class T>
struct Borders {
    float* states;
    Borders(Arena& arena, const Plan<T>& plan, const Shape& s)
        : states(arena.take<float>(std::max<Index>(plan.slices - 1, 0) * plan.border_size(s))) {}
};

/// Chunks that parallel_scan walks through one after the other.
inline constexpr int segment_chunks = 8;

template <class T>
struct Layout {
    using E = typename Form<T>::Element;
    using S = Sizes<T>;
    Plan<T> plan;
    Tables<T> tables;
    E* states;
    float* borders[2];
    // backward
    E *adjoints, *scaled, *weights;
    PartialSums<T> query, token;
    // with several panels
    E *a, *w, *halves, *scores;
    // with a normaliser
    float* raw;
    E* up;
    // of parallel_scan
    int segment = 0;
    float* ends = nullptr;

    Layout(Arena& arena, const Options& options, const Shape& s, pass p) : plan(options, s), tables(arena, s, plan.panels) {
        const Index slots = plan.slots_of_slice, backward = p == pass::backward ? 1 : 0, several = plan.panels.single() ? 0 : 1;
        const Index modes = plan.panels.modes, members = slots * s.query_heads * (1 + backward);
        states = arena.take<E>(slots * s.kv_heads * plan.panels.state() * S::state);
        for (float*& border : borders) border = arena.take<float>(plan.border_size(s));
        adjoints = arena.take<E>(backward * slots * s.kv_heads * plan.panels.state() * S::state);
        scaled = arena.take<E>(backward * members * modes * S::coefficients);
        weights = arena.take<E>(backward * members * S::square);
        const auto sums = [&](Index parts, bool mix) {
            return PartialSums<T>{arena.take<float>(parts * modes * PartialSums<T>::lag_size),
                                  arena.take<complex<float>>(mix ? parts * modes * modes * PartialSums<T>::mix_size : 0),
                                  arena.take<complex<float>>(parts * modes * padded)};
        };
        query = sums(backward * s.query_heads * plan.query_parts, true);
        token = sums(backward * s.kv_heads * plan.token_parts, false);
        a = arena.take<E>(several * members * modes * S::coefficients);
        w = arena.take<E>(several * members * modes * S::coefficients);
        halves = arena.take<E>(options.readout == Readout::real_parts ? several * members * modes * S::tokens : 0);
        scores = arena.take<E>(several * backward * members * S::square);
        const Index of_ones = plan.panels.ones ? slots * s.query_heads * plan.panels.values * S::tokens : 0;
        raw = arena.take<float>(of_ones);
        up = arena.take<E>(backward * of_ones);
        if (options.method == Method::parallel_scan) {
            segment = segment_chunks;
            const Index carriers = std::max<Index>(plan.carriers, 1);
            const Index borders = s.packed() ? slots / segment : slots / carriers / segment;
            ends = arena.take<float>((borders + 1) * plan.border_size(s));
        }
    }
};

/// Calls f(T{}) for the dtypes that have a form.
template <class F>
std::size_t with_form(const Shape& s, F&& f) {
    switch (s.dtype) {
        case DType::f32: return f(f32{});
        case DType::f16: return f(f16{});
        case DType::bf16: return f(bf16{});
        default: return 0;
    }
}
inline std::size_t saved_size(const Options& options, const Shape& s) {
    return with_form(s, [&]<class T>(T) {
        Arena arena;
        Borders<T>(arena, Plan<T>(options, s), s);
        return arena.required();
    });
}
inline std::size_t workspace_size(const Options& options, const Shape& s, pass p) {
    return with_form(s, [&]<class T>(T) {
        Arena arena;
        Layout<T>(arena, options, s, p);
        return arena.required();
    });
}

/// The run of X over a slice.
template <class T, class P>
Sweep<T> states_sweep(const Inputs<T, P>& in, const Shape& s, const Layout<T>& w, Index slice, const float* carry_in,
                      float* carry_out) {
    return {.slots = slots_of(s, in.cu_seqlens),
            .slice = w.plan.slice(slice),
            .panels = w.plan.panels,
            .group = static_cast<int>(s.group()),
            .modes = static_cast<int>(s.modes),
            .features = static_cast<int>(s.features),
            .half = {in.k, Source<T>(in.v, w.plan.panels.ones)},
            .initial = in.x0,
            .initial_ones = in.eta0,
            .carry_in = carry_in,
            .carry_out = carry_out,
            .states = w.states,
            .segment = w.segment,
            .ends = w.ends};
}

/// A slice of chunks with several panels; the caller gives it tensors.
template <class T>
PanelRun<T> panel_run(const Shape& s, const Layout<T>& w, Index slice, const View<const std::int32_t, 1>& cu, int sides) {
    PanelRun<T> run;
    run.slots = slots_of(s, cu);
    run.slice = w.plan.slice(slice);
    run.panels = w.plan.panels;
    run.group = static_cast<int>(s.group());
    run.query_heads = static_cast<int>(s.query_heads);
    run.sides = sides;
    run.states = w.states;
    run.a = w.a, run.w = w.w, run.halves = w.halves;
    if (sides == 2) run.of_state = w.scaled, run.scores = w.scores, run.weights = w.weights;
    return run;
}

/// Block (part, head, z), with as many parts as fill a large GPU twice.
template <class T, class... Parameters, class... Arguments>
Status launch_panel(const cuda& exec, const char* name, void (*kernel)(Parameters...), std::size_t shared, const Plan<T>& plan, Index heads, int z,
                    const Arguments&... arguments) {
    const Index parts = plan.parts(2 * Plan<T>::multiprocessors, heads * z);
    return launch(exec, name, kernel,
                  {dim3(static_cast<unsigned>(parts), static_cast<unsigned>(heads), static_cast<unsigned>(z)), dim3(group_threads), shared}, arguments...);
}

/// a and w of one side of a slice.
template <class T>
Status launch_coefficients(const cuda& exec, const Options& options, const PanelRun<T>& run, const Layout<T>& w) {
    const int modes = run.panels.modes;
    INTERSTATE_RETURN_IF_ERROR(launch_panel(exec, "panel_coefficients_kernel", panel_coefficients_kernel<T>, sizeof(PanelCoefficientsShared<T>), w.plan,
                                            run.query_heads, modes, run, w.tables));
    const auto read_out = [&](auto kernel) {
        return launch_panel(exec, "panel_readout_kernel", kernel, sizeof(PanelReadoutShared<T>), w.plan, run.query_heads, modes, run, w.tables);
    };
    if (options.readout != Readout::real_parts) return read_out(panel_readout_kernel<T, Reads::all>);
    INTERSTATE_RETURN_IF_ERROR(read_out(panel_readout_kernel<T, Reads::halves>));
    return read_out(panel_readout_kernel<T, Reads::of_halves>);
}

/// a, w and o of a slice or, where there is a normaliser, numerators and denominator in w.raw.
template <class T, class P>
Status launch_outputs(const cuda& exec, const Options& options, const Inputs<T, P>& in, const View<T, 4>& o, PanelRun<T> run, const Layout<T>& w) {
    run.x = in.q, run.y = in.k, run.z = HeadRows<const T>(in.v, run.panels.ones);
    if (run.panels.ones)
        run.raw = w.raw;
    else
        run.out = o;
    INTERSTATE_RETURN_IF_ERROR(launch_coefficients(exec, options, run, w));
    return launch_panel(exec, "panel_output_kernel", panel_output_kernel<T>, sizeof(PanelOutputShared<T>), w.plan, run.query_heads, run.panels.values, run,
                        w.tables);
}

template <class T>
Status launch_quotients(const cuda& exec, const Shape& s, const Layout<T>& w, const PanelRun<T>& run, const View<T, 4>& o, const View<const T, 4>& dout,
                        typename Form<T>::Element* up) {
    const Quotients<T> quotients{.slots = run.slots, .slice = run.slice, .panels = run.panels.values, .raw = w.raw, .o = o, .dout = dout, .up = up};
    return launch(exec, "quotient_kernel", quotient_kernel<T>,
                  {dim3(static_cast<unsigned>(run.slice.end - run.slice.begin), static_cast<unsigned>(s.query_heads)), dim3(group_threads)}, quotients);
}

template <class T, class P>
Status run_forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved, Workspace ws) {
    const Shape s = shape_of(in);
    Arena arena(ws.data), saved_arena(saved.data);
    const Layout<T> w(arena, options, s, pass::forward);
    const Borders<T> kept(saved_arena, w.plan, s);
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, out.o, in.cu_seqlens));
    if (w.plan.slots == 0 || s.kv_heads == 0) return {};
    INTERSTATE_RETURN_IF_ERROR(make_tables(exec, options, in.params, s, w.plan.panels, w.tables));
    const Index border = w.plan.border_size(s);
    const float* carry_in = nullptr;
    for (Index i = 0; i < w.plan.slices; ++i) {
        float* const carry_out = i + 1 == w.plan.slices ? nullptr : saved.data ? kept.states + i * border : w.borders[i % 2];
        Sweep<T> sweep = states_sweep(in, s, w, i, carry_in, carry_out);
        sweep.final = out.xT;
        sweep.final_ones = out.etaT;
        INTERSTATE_RETURN_IF_ERROR((launch_sweep<T, false>(exec, sweep, w.tables, s.kv_heads)));
        carry_in = carry_out;
        if (!w.plan.panels.single()) {
            PanelRun<T> run = panel_run(s, w, i, in.cu_seqlens, 1);
            INTERSTATE_RETURN_IF_ERROR(launch_outputs(exec, options, in, out.o, run, w));
            if (w.plan.panels.ones) INTERSTATE_RETURN_IF_ERROR(launch_quotients<T>(exec, s, w, run, out.o, {}, nullptr));
            continue;
        }
        const ChunkOutput<T> run{.slots = sweep.slots,
                                 .slice = sweep.slice,
                                 .group = static_cast<int>(s.group()),
                                 .q = in.q,
                                 .k = in.k,
                                 .v = in.v,
                                 .o = out.o,
                                 .states = w.states};
        INTERSTATE_RETURN_IF_ERROR(launch_output(exec, options, run, w.tables, s.query_heads, w.plan.output_parts));
    }
    return {};
}

/// What takes the place of queries in backward: dout, or what the normaliser makes of it.
template <class T>
Source<T> upstream_of(const Upstream<T>& upstream, const Shape& s, const Layout<T>& w) {
    Source<T> source(upstream.o);
    if (w.plan.panels.ones) {
        source.panels = w.up;
        source.heads = static_cast<int>(s.query_heads);
        source.each = w.plan.panels.values;
    }
    return source;
}

/// query_gradient_kernel's work on several panels.
template <class T, class P>
Status run_query_panels(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Shape& s, const Upstream<T>& upstream,
                        const Grads<T, P>& grads, const Layout<T>& w, Index slice) {
    PanelRun<T> sides[2] = {panel_run(s, w, slice, in.cu_seqlens, 2), panel_run(s, w, slice, in.cu_seqlens, 2)};
    const HeadRows<const T> v(in.v, w.plan.panels.ones);
    sides[0].x = in.q, sides[0].y = in.k, sides[0].z = v;
    sides[1].side = 1, sides[1].x = upstream_of(upstream, s, w), sides[1].y = v, sides[1].z = in.k, sides[1].out = grads.q;
    if (w.plan.panels.ones) {
        const PanelRun<T> forward = panel_run(s, w, slice, in.cu_seqlens, 1);
        INTERSTATE_RETURN_IF_ERROR(launch_outputs(exec, options, in, {}, forward, w));
        INTERSTATE_RETURN_IF_ERROR(launch_quotients<T>(exec, s, w, forward, {}, upstream.o, w.up));
    }
    for (const PanelRun<T>& run : sides) INTERSTATE_RETURN_IF_ERROR(launch_coefficients(exec, options, run, w));
    const auto sum = [&](auto kernel, std::size_t shared) {
        return launch(exec, "panel_sums_kernel", kernel,
                      {dim3(static_cast<unsigned>(w.plan.query_parts), static_cast<unsigned>(s.query_heads), static_cast<unsigned>(w.plan.panels.mix())),
                       dim3(query_threads), shared},
                      sides[0], w.query, slice == w.plan.slices - 1);
    };
    INTERSTATE_RETURN_IF_ERROR(options.readout == Readout::real_parts ? sum(panel_sums_kernel<T, true>, sizeof(PanelSumsShared<T, true>))
                                                                      : sum(panel_sums_kernel<T, false>, sizeof(PanelSumsShared<T, false>)));
    for (const PanelRun<T>& run : sides)
        INTERSTATE_RETURN_IF_ERROR(launch_panel(exec, "panel_output_kernel", panel_output_kernel<T>, sizeof(PanelOutputShared<T>), w.plan, s.query_heads,
                                                run.out.view ? run.panels_of_z() : 1, run, w.tables));
    return {};
}

/// token_gradient_kernel's work on several panels.
template <class T, class P>
Status run_token_panels(const cuda& exec, const Inputs<T, P>& in, const Shape& s, const Upstream<T>& upstream, const Grads<T, P>& grads,
                        const Layout<T>& w, Index slice) {
    PanelTokens<T> run;
    run.slots = slots_of(s, in.cu_seqlens);
    run.slice = w.plan.slice(slice);
    run.panels = w.plan.panels;
    run.group = static_cast<int>(s.group());
    run.z[0] = in.k, run.z[1] = HeadRows<const T>(in.v, run.panels.ones), run.from[0] = in.q, run.from[1] = upstream_of(upstream, s, w), run.dz[0] = grads.k, run.dz[1] = grads.v;
    run.states = w.states, run.adjoints = w.adjoints, run.weights = w.weights;
    INTERSTATE_RETURN_IF_ERROR(launch_panel(exec, "panel_token_gradient_kernel", panel_token_gradient_kernel<T>, sizeof(PanelTokenShared<T>), w.plan,
                                            s.kv_heads, run.panels.columns(), run, w.tables));
    return launch(exec, "panel_token_sums_kernel", panel_token_sums_kernel<T>,
                  {dim3(static_cast<unsigned>(w.plan.token_parts), static_cast<unsigned>(s.kv_heads), static_cast<unsigned>(run.panels.modes)),
                   dim3(token_threads), sizeof(PanelTokenSumsShared<T>)},
                  run, w.tables, w.token, slice == w.plan.slices - 1);
}

template <class T, class P>
Status run_backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, Saved saved, const Upstream<T>& upstream,
                    const Grads<T, P>& grads, Workspace ws) {
    const Shape s = shape_of(in);
    Arena arena(ws.data), saved_arena(saved.data);
    const Layout<T> w(arena, options, s, pass::backward);
    const Borders<T> kept(saved_arena, w.plan, s);
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.q, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.k, in.cu_seqlens));
    INTERSTATE_RETURN_IF_ERROR(zero_outside(exec, grads.v, in.cu_seqlens));
    if (s.kv_heads == 0) return {};
    INTERSTATE_RETURN_IF_ERROR(make_tables(exec, options, in.params, s, w.plan.panels, w.tables));
    const Index border = w.plan.border_size(s);
    const float* adjoint_in = nullptr;
    ChunkBackward<T> run{.slots = slots_of(s, in.cu_seqlens),
                         .group = static_cast<int>(s.group()),
                         .q = in.q,
                         .k = in.k,
                         .v = in.v,
                         .dout = upstream.o,
                         .dq = grads.q,
                         .dk = grads.k,
                         .dv = grads.v,
                         .states = w.states,
                         .adjoints = w.adjoints,
                         .scaled = w.scaled,
                         .weights = w.weights};
    for (Index i = w.plan.slices - 1; i >= 0; --i) {
        run.slice = w.plan.slice(i);
        run.first = i == w.plan.slices - 1;
        const Sweep<T> states = states_sweep(in, s, w, i, i == 0 ? nullptr : kept.states + (i - 1) * border, nullptr);
        INTERSTATE_RETURN_IF_ERROR((launch_sweep<T, false>(exec, states, w.tables, s.kv_heads)));

        const bool single = w.plan.panels.single();
        run.sums = w.query;
        if (single)
            INTERSTATE_RETURN_IF_ERROR(launch(
                exec, "query_gradient_kernel",
                options.readout == Readout::real_parts ? query_gradient_kernel<T, true> : query_gradient_kernel<T, false>,
                {dim3(static_cast<unsigned>(w.plan.query_parts), static_cast<unsigned>(s.query_heads)), dim3(query_threads), sizeof(QueryShared<T>), true},
                run, w.tables));
        else
            INTERSTATE_RETURN_IF_ERROR(run_query_panels(exec, options, in, s, upstream, grads, w, i));

        Sweep<T> adjoint = states;
        adjoint.half[0] = in.q;
        adjoint.half[1] = upstream_of(upstream, s, w);
        adjoint.scaled = w.scaled;
        adjoint.initial = upstream.xT;
        adjoint.final = grads.x0;
        adjoint.initial_ones = upstream.etaT;
        adjoint.final_ones = grads.eta0;
        adjoint.carry_in = adjoint_in;
        adjoint.carry_out = i == 0 ? nullptr : w.borders[i % 2];
        adjoint.states = w.adjoints;
        adjoint_in = adjoint.carry_out;
        INTERSTATE_RETURN_IF_ERROR((launch_sweep<T, true>(exec, adjoint, w.tables, s.kv_heads)));

        run.sums = w.token;
        if (single)
            INTERSTATE_RETURN_IF_ERROR(launch(
                exec, "token_gradient_kernel", token_gradient_kernel<T>,
                {dim3(static_cast<unsigned>(w.plan.token_parts), static_cast<unsigned>(s.kv_heads)), dim3(token_threads), sizeof(TokenShared<T>), true},
                run, w.tables));
        else
            INTERSTATE_RETURN_IF_ERROR(run_token_panels(exec, in, s, upstream, grads, w, i));
    }

    // Without any slice there are no parts to add: the sums are zero.
    const Index query_parts = w.plan.slices > 0 ? s.group() * w.plan.query_parts : 0, token_parts = w.plan.slices > 0 ? w.plan.token_parts : 0;
    const auto& g = grads.params;
    if (g.log_dt || g.log_neg_re || g.im || g.B)
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "finish_parameters_kernel", finish_parameters_kernel<T, P>,
                                          {dim3(static_cast<unsigned>(s.kv_heads)), dim3(finish_threads)}, options.disc, in.params, s.modes,
                                          Index{w.plan.panels.modes}, w.tables, w.query, query_parts, w.token, token_parts, g));
    if (g.C)
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "finish_mix_kernel", finish_mix_kernel<T, P>,
                                          {dim3(static_cast<unsigned>(s.kv_heads), static_cast<unsigned>(w.plan.panels.modes * padded / finish_rows),
                                            static_cast<unsigned>(w.plan.panels.modes)),
                                           dim3(finish_threads)},
                                          options.readout, in.params.C, s.modes, w.query, query_parts, g.C));
    return {};
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
