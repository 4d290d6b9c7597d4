// Chunks with more than 64 modes, features or value columns: the equations of cuda_chunk_output.cuh and
// cuda_chunk_backward.cuh, a panel of 64 at a time, with what passes from step to step in workspace instead of shared memory.
// Blocks have at most 99 KiB of it, which every GPU of compute capability 8.0 or later has.
// Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <interdomain/detail/cuda_chunk_backward.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail::chunks {

/// A run from x to w and to what w reads: side 0 from q through k and v to o, side 1 from dout through v and k to dq.
template <class T>
struct PanelRun {
    using E = typename Form<T>::Element;
    using S = Sizes<T>;
    Slots slots{};
    Slice slice{};
    Panels panels{};
    int group = 1, query_heads = 0;
    int side = 0, sides = 1;                 // sides: how many the arrays have
    Source<T> x{};                           // of query heads
    HeadRows<const T> y{}, z{};
    HeadRows<T> out{};                       // may be null
    float* raw = nullptr;                    // may be null: (slot, query head, panel of z) (chunk, columns), out as it is summed
    const E* states = nullptr;               // (slot, kv head, panels)
    E *a = nullptr, *w = nullptr;            // (slot, query head, side, panel of modes) (chunk, 2 modes)
    E* halves = nullptr;                     // the same, (chunk, modes): s of real_parts
    E* of_state = nullptr;                   // as a, sides exchanged: what the state adds to a, in the end w scaled; may be null
    E *scores = nullptr, *weights = nullptr; // (slot, query head, side) (chunk, chunk); null where of_state is

    INTERSTATE_HD int kv_heads() const { return query_heads / group; }
    /// Panels of x and of z, and where they begin among the columns of a state.
    INTERSTATE_HD int panels_of_x() const { return side == 0 ? panels.keys : panels.values; }
    INTERSTATE_HD int panels_of_z() const { return side == 0 ? panels.values : panels.keys; }
    INTERSTATE_HD int x_in_state() const { return side == 0 ? 0 : panels.keys; }
    INTERSTATE_HD int z_in_state() const { return side == 0 ? panels.keys : 0; }
    INTERSTATE_HD const E* state(Index at, int h, int of_modes, int column) const {
        return states + ((at * kv_heads() + h) * panels.state() + of_modes * panels.columns() + column) * S::state;
    }
    INTERSTATE_HD Index member(Index at, int hq, int of_side) const { return (at * query_heads + hq) * sides + of_side; }
    /// The panel `of_modes` of an array of coefficients or halves, `size` elements each.
    INTERSTATE_HD Index panel(Index at, int hq, int of_side, int of_modes, Index size = S::coefficients) const {
        return (member(at, hq, of_side) * panels.modes + of_modes) * size;
    }
};

inline namespace INTERSTATE_KERNELS {

template <class T>
__device__ void bring_rows(typename Form<T>::Element* to, const Source<T>& from, const Chunk<Sizes<T>::chunk>& chunk, Index at, int head, int panel,
                           int thread) {
    if (from.panels)
        device::copy_matrix<Sizes<T>::tokens, group_threads>(to, from.panel(at, head, panel), thread);
    else
        bring_rows<T, group_threads>(to, from.rows, chunk, head, 0, thread, panel);
}
/// With the column of ones, where there is one.
template <class T>
__device__ void bring_rows_and_ones(typename Form<T>::Element* to, const HeadRows<const T>& from, const Chunk<Sizes<T>::chunk>& chunk, int head,
                                    int panel, int shift, int thread) {
    if (from.ones)
        bring_rows<T, group_threads, true>(to, from, chunk, head, shift, thread, panel);
    else
        bring_rows<T, group_threads>(to, from, chunk, head, shift, thread, panel);
}

/// Where there is room in shared memory, what the next step needs is on its way during a step.
template <class T>
inline constexpr int step_buffers = sizeof(typename Form<T>::Element) == 2 ? 2 : 1;

/// For each chunk of a block, `count` steps: bring(chunk, at, step, buffer) starts copies, work(chunk, at, step, buffer) has them
/// (between barriers), and finish(chunk, at, buffer) follows the last step.
template <class T, int buffers = step_buffers<T>, class Bring, class Work, class Finish>
__device__ void in_steps(const Slots& slots, const Slice& slice, int count, Bring&& bring, Work&& work, Finish&& finish) {
    using Chunk = chunks::Chunk<Sizes<T>::chunk>;
    ChunkList<Sizes<T>::chunk> list(slots, slice);
    struct Place {
        Chunk chunk;
        Index at;
        int step;
    } next{list.chunk, list.slot - slice.begin, 0};
    int buffer = 0;
    const auto bring_next = [&](int to) {
        bring(next.chunk, next.at, next.step, to);
        device::commit_copies();
    };
    if (list.more()) bring_next(0);
    while (list.more()) {
        const Place here = next;
        if (++next.step == count) {
            list.next();
            next = {list.chunk, list.slot - slice.begin, 0};
        }
        if (buffers == 2 && list.more()) {
            bring_next(buffer ^ 1);
            device::wait_for_all_but<1>();
        } else {
            device::wait_for_all_but<0>();
        }
        __syncthreads();
        work(here.chunk, here.at, here.step, buffer);
        __syncthreads();
        if (here.step + 1 == count) finish(here.chunk, here.at, buffer);
        buffer ^= buffers - 1;
        if (buffers == 1 && list.more()) {
            __syncthreads();
            bring_next(0);
        }
    }
}

template <class T>
struct PanelCoefficientsShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    static constexpr int buffers = step_buffers<T>;
    E table[S::coefficients], state[buffers][S::state], x[buffers][S::tokens], y[buffers][S::tokens], scores[S::square];
};

/// Block (part, query head, panel of modes): a, or e (eq. 14, 20).
template <class T>
__global__ void __launch_bounds__(group_threads, 2) panel_coefficients_kernel(PanelRun<T> run, Tables<T> tables) {
    using S = Sizes<T>;
    using St = Steps<T>;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<PanelCoefficientsShared<T>*>(shared_bytes);
    const St steps;
    const int thread = static_cast<int>(threadIdx.x), hq = static_cast<int>(blockIdx.y), h = hq / run.group, of_modes = static_cast<int>(blockIdx.z);
    const Index table = static_cast<Index>(h) * run.panels.modes + of_modes;
    device::copy_matrix<S::coefficients, group_threads>(shared.table, tables.table + table * S::coefficients, thread);
    using Chunk = chunks::Chunk<S::chunk>;
    typename St::TokenTiles scores;
    typename St::WideTiles c;
    in_steps<T>(
        run.slots, run.slice, run.panels_of_x(),
        [&](const Chunk& chunk, Index at, int panel, int buffer) {
            bring_rows<T>(shared.x[buffer], run.x, chunk, at, hq, panel, thread);
            bring_rows_and_ones<T>(shared.y[buffer], run.y, chunk, h, panel, 0, thread);
            device::copy_matrix<S::state, group_threads>(shared.state[buffer], run.state(at, h, of_modes, run.x_in_state() + panel), thread);
        },
        [&](const Chunk&, Index, int panel, int buffer) {
            if (panel == 0) {
                device::clear(scores);
                device::clear(c);
            }
            if (steps.has_scores()) steps.add_scores(scores, shared.x[buffer], shared.y[buffer]);
            steps.add_products_with_state(c, shared.x[buffer], shared.state[buffer]);
        },
        [&](const Chunk&, Index at, int) {
            if (steps.has_scores()) steps.put_scores(scores, shared.scores);
            steps.age(c, typename St::Powers(steps, tables.powers + table * Tables<T>::power_size));
            if (run.of_state) steps.put_kept(c, run.of_state + run.panel(at, hq, 1 - run.side, of_modes));
            __syncthreads();
            steps.add_coefficients_of_chunk(c, shared.scores, shared.table);
            steps.put_conjugates(c, run.a + run.panel(at, hq, run.side, of_modes));
            if (run.of_state && of_modes == 0)
                device::store_matrix<S::square, group_threads>(run.scores + run.member(at, hq, run.side) * S::square, shared.scores, thread);
        });
}

/// What panel_readout_kernel makes: w of a, or for real_parts s of a and w of s.
enum class Reads { all, halves, of_halves };

template <class T>
struct PanelReadoutShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    static constexpr int buffers = step_buffers<T>;
    E from[buffers][S::coefficients], mix[buffers][S::mix];
};

/// Block (part, query head, panel of modes): w, or p (eq. 15).
template <class T, Reads reads>
__global__ void __launch_bounds__(group_threads, 2) panel_readout_kernel(PanelRun<T> run, Tables<T> tables) {
    using S = Sizes<T>;
    using St = Steps<T>;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<PanelReadoutShared<T>*>(shared_bytes);
    const St steps;
    const int thread = static_cast<int>(threadIdx.x), hq = static_cast<int>(blockIdx.y), h = hq / run.group, of_modes = static_cast<int>(blockIdx.z);
    using Chunk = chunks::Chunk<S::chunk>;
    std::conditional_t<reads == Reads::halves, typename St::FeatureTiles, typename St::WideTiles> c;
    in_steps<T>(
        run.slots, run.slice, run.panels.modes,
        [&](const Chunk&, Index at, int from, int buffer) {
            if constexpr (reads == Reads::of_halves)
                device::copy_matrix<S::tokens, group_threads>(shared.from[buffer], run.halves + run.panel(at, hq, run.side, from, S::tokens), thread);
            else
                device::copy_matrix<S::coefficients, group_threads>(shared.from[buffer], run.a + run.panel(at, hq, run.side, from), thread);
            const int row = reads == Reads::of_halves ? from : of_modes, column = reads == Reads::of_halves ? of_modes : from;
            device::copy_matrix<S::mix, group_threads>(
                shared.mix[buffer], tables.mix + ((static_cast<Index>(h) * run.panels.modes + row) * run.panels.modes + column) * S::mix, thread);
        },
        [&](const Chunk&, Index, int from, int buffer) {
            if (from == 0) device::clear(c);
            if constexpr (reads == Reads::all) steps.add_mixed(c, shared.from[buffer], shared.mix[buffer]);
            if constexpr (reads == Reads::halves) steps.add_half_of_real_parts(c, shared.from[buffer], shared.mix[buffer]);
            if constexpr (reads == Reads::of_halves) steps.add_mixed_real(c, shared.from[buffer], shared.mix[buffer]);
        },
        [&](const Chunk&, Index at, int) {
            if constexpr (reads == Reads::halves) {
                steps.put_doubled(c, run.halves + run.panel(at, hq, run.side, of_modes, S::tokens));
            } else {
                if constexpr (reads == Reads::of_halves) steps.double_and_conjugate(c);
                steps.put(c, run.w + run.panel(at, hq, run.side, of_modes));
            }
        });
}

template <class T>
struct PanelOutputShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    E w[S::coefficients], scaled[S::coefficients], table[S::coefficients], state[S::state], weights[S::square];
    E z[S::tokens];  // in the end out
};

/// Block (part, query head, panel of z): o, or dq (eq. 16, 17, 20, 21). The first panel's blocks leave weights and w scaled.
template <class T>
__global__ void __launch_bounds__(group_threads, 2) panel_output_kernel(PanelRun<T> run, Tables<T> tables) {
    using S = Sizes<T>;
    using St = Steps<T>;
    using F = Form<T>;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<PanelOutputShared<T>*>(shared_bytes);
    const St steps;
    const int thread = static_cast<int>(threadIdx.x), lane = steps.lane.index;
    const int hq = static_cast<int>(blockIdx.y), h = hq / run.group, panel = static_cast<int>(blockIdx.z);
    const bool reads = run.raw || run.out.view, leaves = run.of_state && panel == 0;
    for (ChunkList<S::chunk> list(run.slots, run.slice); list.more(); list.next()) {
        const Index at = list.slot - run.slice.begin;
        typename St::TokenTiles weights;
        typename St::FeatureTiles o;
        device::clear(weights);
        device::clear(o);
        if (reads) bring_rows_and_ones<T>(shared.z, run.z, list.chunk, h, panel, 0, thread);
        for (int of_modes = 0; of_modes < run.panels.modes; ++of_modes) {
            const Index table = static_cast<Index>(h) * run.panels.modes + of_modes;
            device::copy_matrix<S::coefficients, group_threads>(shared.w, run.w + run.panel(at, hq, run.side, of_modes), thread);
            device::copy_matrix<S::coefficients, group_threads>(shared.table, tables.table + table * S::coefficients, thread);
            if (reads) device::copy_matrix<S::state, group_threads>(shared.state, run.state(at, h, of_modes, run.z_in_state() + panel), thread);
            if (reads && of_modes + 1 < run.panels.modes)
                device::prefetch_matrix<S::state, group_threads>(run.state(at, h, of_modes + 1, run.z_in_state() + panel), thread);
            device::wait_for_copies();
            __syncthreads();
            if (steps.has_weights()) steps.add_weights(weights, shared.w, shared.table);
            typename St::WideTiles c;
            steps.get(c, shared.w);
            steps.scale(c, typename St::Powers(steps, tables.powers + table * Tables<T>::power_size));
            steps.put(c, shared.scaled);
            if (leaves) steps.put(c, run.of_state + run.panel(at, hq, 1 - run.side, of_modes));
            __syncthreads();
            if (reads)
                device::multiply<F::precision, S::wide>(o, device::as_stored<S::wide>(shared.scaled), steps.row, device::transposed<padded>(shared.state),
                                                        steps.feature_column(), 0, lane);
            __syncthreads();
        }
        if (steps.has_weights()) steps.put_weights(weights, shared.weights);
        __syncthreads();
        if (leaves) device::store_matrix<S::square, group_threads>(run.weights + run.member(at, hq, run.side) * S::square, shared.weights, thread);
        if (reads) {
            device::multiply<F::precision>(o, device::as_stored<S::chunk>(shared.weights), steps.row, device::transposed<padded>(shared.z),
                                           steps.feature_column(), 0, steps.row + 16, lane);
            if (run.raw) {
                put_tiles<padded>(o, run.raw + ((at * run.query_heads + hq) * run.panels_of_z() + panel) * S::tokens, steps.row, steps.feature_column(),
                                  steps.lane);
            } else {
                __syncthreads();
                put_tiles<padded>(o, shared.z, steps.row, steps.feature_column(), steps.lane);
                __syncthreads();
                take_rows<T, group_threads>(shared.z, run.out, list.chunk, hq, 0, thread, panel);
            }
        }
        __syncthreads();
    }
}

/// Numerators and denominator, the column behind them, of a slice.
template <class T>
struct Quotients {
    using E = typename Form<T>::Element;
    Slots slots{};
    Slice slice{};
    int panels = 1;
    const float* raw = nullptr;  // (slot, query head, panel) (chunk, columns)
    View<T, 4> o{};              // forward's; or else
    View<const T, 4> dout{};
    E* up = nullptr;             // the same panels, for eq. 11
};

inline constexpr int quotient_lanes = 16;

/// Block (slot, query head): o (eq. 6), or what goes into numerators and denominator (eq. 11).
template <class T>
__global__ void __launch_bounds__(group_threads) quotient_kernel(Quotients<T> run) {
    using S = Sizes<T>;
    const int slot = run.slice.begin + static_cast<int>(blockIdx.x), hq = static_cast<int>(blockIdx.y);
    const Chunk<S::chunk> chunk(run.slots, slot);
    if (!chunk.exists()) return;
    const Index first = (static_cast<Index>(blockIdx.x) * gridDim.y + hq) * run.panels * S::tokens;
    const int columns = static_cast<int>(run.up ? run.dout.extent[3] : run.o.extent[3]);
    const auto place = [&](int t, int c) { return first + c / padded * S::tokens + device::blocked<padded>(t, c % padded); };
    const int lane = static_cast<int>(threadIdx.x) % quotient_lanes;
    for (int t = static_cast<int>(threadIdx.x) / quotient_lanes; t < S::chunk; t += group_threads / quotient_lanes) {
        const bool inside = t < chunk.rows();
        const Index b = chunk.batch(), row = chunk.row() + (inside ? t : 0);
        const float den = run.raw[place(t, columns)];
        float along = 0.0f;  // do . o
        for (int c = lane; c < columns; c += quotient_lanes) {
            const float o = run.raw[place(t, c)] / den;
            if (run.up) {
                const float up = inside ? device::load_as<float>(run.dout(b, row, hq, c)) : 0.0f;
                along += up * o;
                run.up[place(t, c)] = device::store_as<typename Form<T>::Element>(inside ? factor<T>(up / den) : 0.0f);
            } else if (inside) {
                run.o(b, row, hq, c) = device::store_as<T>(o);
            }
        }
        if (!run.up) continue;
#pragma unroll
        for (int lanes = quotient_lanes / 2; lanes > 0; lanes /= 2) along += __shfl_xor_sync(0xffffffffu, along, lanes);
        for (int c = columns + lane; c < run.panels * padded; c += quotient_lanes)
            run.up[place(t, c)] = device::store_as<typename Form<T>::Element>(inside && c == columns ? factor<T>(-along / den) : 0.0f);
    }
}

template <class T, bool real_parts>
struct PanelSumsShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    struct Step {
        E a[2][S::coefficients], w[2][S::coefficients];
        E scores[2][S::square];
        E halves[real_parts ? 2 * S::tokens : 8];
    } step[1];
    static_assert(sizeof(Step) >= 4 * padded * (S::chunk / 16) * sizeof(float));
};

/// Block (part, query head, panels of modes of e and of a): their H (eq. 23) and, with the first panel of a, D and what crossed
/// into chunks (eq. 24) for the panel of e. Reads what both sides left.
template <class T, bool real_parts>
__global__ void __launch_bounds__(query_threads, 1) panel_sums_kernel(PanelRun<T> run, PartialSums<T> partial, bool first) {
    using S = Sizes<T>;
    using St = Steps<T>;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<PanelSumsShared<T, real_parts>*>(shared_bytes);
    const St steps;
    const int thread = static_cast<int>(threadIdx.x), side = steps.lane.warp / group_warps, hq = static_cast<int>(blockIdx.y);
    const int of_e = static_cast<int>(blockIdx.z) / run.panels.modes, of_a = static_cast<int>(blockIdx.z) % run.panels.modes;
    const bool lags = of_a == 0;
    const Index part = static_cast<Index>(blockIdx.y) * gridDim.x + blockIdx.x;
    const PartialSums<T> own = partial.of(part * run.panels.modes + of_e, part * run.panels.mix() + blockIdx.z);
    QuerySums<T, real_parts> sums(steps.lane, own, first);
    using Chunk = chunks::Chunk<S::chunk>;
    const auto bring = [&](auto& to, const auto* from) { device::copy_matrix<sizeof(to) / sizeof(to[0]), query_threads>(to, from, thread); };
    in_steps<T, 1>(
        run.slots, run.slice, 1,
        [&](const Chunk&, Index at, int, int buffer) {
            auto& to = shared.step[buffer];
            bring(to.a[0], run.a + run.panel(at, hq, 0, of_a));
            bring(to.a[1], run.a + run.panel(at, hq, 1, real_parts ? of_a : of_e));
            for (int i = 0; i < 2; ++i) {
                if constexpr (real_parts)
                    device::copy_matrix<S::tokens, query_threads>(to.halves + i * S::tokens, run.halves + run.panel(at, hq, i, of_e, S::tokens), thread);
                if (!lags) continue;
                bring(to.scores[i], run.scores + run.member(at, hq, i) * S::square);
                bring(to.w[i], run.w + run.panel(at, hq, i, of_e));
            }
        },
        [&](const Chunk&, Index at, int, int buffer) {
            const auto& from = shared.step[buffer];
            if (lags) {
                typename St::Kept of_state;
                steps.get_kept(of_state, run.of_state + run.panel(at, hq, 1 - side, of_e));
                sums.add_scaled(steps, of_state, from.w[1 - side]);
                sums.add_lags(steps.lane, from.scores, from.w);
            }
            sums.add_mix(steps.lane, from.a, from.halves);
        },
        [](const Chunk&, Index, int) {});
    sums.store_mix(steps.lane, own);
    if (lags) sums.store_lags_and_scaled(steps, own, first, reinterpret_cast<float*>(&shared.step));
}

template <class T>
struct PanelTokens {
    using E = typename Form<T>::Element;
    using S = Sizes<T>;
    Slots slots{};
    Slice slice{};
    Panels panels{};
    int group = 1;
    HeadRows<const T> z[2]{};             // k and v
    Source<T> from[2]{};                  // q and dout
    HeadRows<T> dz[2]{};                  // dk and dv, may be null
    const E *states = nullptr, *adjoints = nullptr, *weights = nullptr;
    /// Panel (modes, columns) of a state or an adjoint of a (slot, kv head).
    INTERSTATE_HD Index state(Index member, int of_modes, int column) const {
        return (member * panels.state() + of_modes * panels.columns() + column) * S::state;
    }
};

template <class T>
struct PanelTokenShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    struct Step {
        E table[S::coefficients];  // or tokens of q or dout, then dk or dv
        E adjoint[S::state];       // or weights
    } step[step_buffers<T>];
};

/// Block (part, kv head, panel of columns): dk or dv (eq. 21).
template <class T>
__global__ void __launch_bounds__(token_threads, 2) panel_token_gradient_kernel(PanelTokens<T> run, Tables<T> tables) {
    using S = Sizes<T>;
    using F = Form<T>;
    using St = Steps<T>;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<PanelTokenShared<T>*>(shared_bytes);
    const St steps;
    const int thread = static_cast<int>(threadIdx.x), lane = steps.lane.index, row = steps.row, first = steps.feature_column();
    const int h = static_cast<int>(blockIdx.y), heads = static_cast<int>(gridDim.y), column = static_cast<int>(blockIdx.z);
    const int side = column < run.panels.keys ? 0 : 1, panel = column - side * run.panels.keys;
    if (!run.dz[side].view) return;
    using Chunk = chunks::Chunk<S::chunk>;
    typename St::FeatureTiles c;
    // A step for each query head of the group, then one for each panel of modes.
    in_steps<T>(
        run.slots, run.slice, run.group + run.panels.modes,
        [&](const Chunk& chunk, Index at, int step, int buffer) {
            auto& to = shared.step[buffer];
            if (step < run.group) {
                const int hq = h * run.group + step;
                bring_rows<T>(to.table, run.from[side], chunk, at, hq, panel, thread);
                // Those of the other side: dk from Q, dv from P.
                bring_weights<T, 1>(to.adjoint, run.weights + ((at * heads * run.group + hq) * 2 + 1 - side) * S::square, S::chunk - chunk.rows(), thread);
            } else {
                const int of_modes = step - run.group;
                device::copy_matrix<S::coefficients, token_threads>(
                    to.table, tables.table + (static_cast<Index>(h) * run.panels.modes + of_modes) * S::coefficients, thread);
                device::copy_matrix<S::state, token_threads>(to.adjoint, run.adjoints + run.state(at * heads + h, of_modes, column), thread);
            }
        },
        [&](const Chunk& chunk, Index, int step, int buffer) {
            const auto& from = shared.step[buffer];
            if (step == 0) device::clear(c);
            if (step < run.group) {
                const bool whole = chunk.rows() == S::chunk;
                device::multiply<F::precision>(c, device::transposed<S::chunk>(from.adjoint), row, device::transposed<padded>(from.table), first,
                                               whole ? row : 0, whole ? S::chunk - row : S::chunk, lane);
            } else {
                device::multiply<F::precision, S::wide>(c, device::as_stored<S::wide>(from.table), row, device::transposed<padded>(from.adjoint), first, 0,
                                                        lane);
            }
        },
        [&](const Chunk& chunk, Index, int buffer) {
            auto* const out = shared.step[buffer].table;
            put_tiles<padded>(c, out, row, first, steps.lane);
            __syncthreads();
            take_rows<T, token_threads>(out, run.dz[side], chunk, h, S::chunk - chunk.rows(), thread, panel);
            __syncthreads();
        });
}

template <class T>
struct PanelTokenSumsShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    struct Step {
        E z[S::tokens], state[S::state], adjoint[S::state];
    } step[step_buffers<T>];
    typename TokenSums<T>::Shared scaled;
};

/// Block (part, kv head, panel of modes): what tokens add to the sums for a later chunk (eq. 24).
template <class T>
__global__ void __launch_bounds__(token_threads, 2) panel_token_sums_kernel(PanelTokens<T> run, Tables<T> tables, PartialSums<T> partial, bool begin) {
    using S = Sizes<T>;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<PanelTokenSumsShared<T>*>(shared_bytes);
    const Lane lane;
    const int thread = static_cast<int>(threadIdx.x);
    const int h = static_cast<int>(blockIdx.y), heads = static_cast<int>(gridDim.y), of_modes = static_cast<int>(blockIdx.z);
    const Index part = (static_cast<Index>(blockIdx.y) * gridDim.x + blockIdx.x) * run.panels.modes + of_modes;
    const complex<double>* const powers = tables.powers64 + (static_cast<Index>(h) * run.panels.modes + of_modes) * Tables<T>::power_size;
    TokenSums<T> sums(lane, partial.of(part, 0), begin);
    using Chunk = chunks::Chunk<S::chunk>;
    complex<float> passing{};
    in_steps<T>(
        run.slots, run.slice, run.panels.columns(),
        [&](const Chunk& chunk, Index at, int column, int buffer) {
            auto& to = shared.step[buffer];
            const int side = column < run.panels.keys ? 0 : 1;
            const Index panel = run.state(at * heads + h, of_modes, column);
            bring_rows_and_ones<T>(to.z, run.z[side], chunk, h, column - side * run.panels.keys, S::chunk - chunk.rows(), thread);
            device::copy_matrix<S::state, token_threads>(to.state, run.states + panel, thread);
            device::copy_matrix<S::state, token_threads>(to.adjoint, run.adjoints + panel, thread);
        },
        [&](const Chunk&, Index, int, int buffer) {
            const auto& from = shared.step[buffer];
            sums.add_lags(lane, from.z, from.adjoint);
            TokenSums<T>::template add_passing<padded / 4>(passing, from.state, from.adjoint, TokenSums<T>::quarter() * (padded / 4));
        },
        [&](const Chunk& chunk, Index, int) {
            sums.add_scaled(chunk.rows(), powers + chunk.rows() * padded, passing);
            passing = {};
        });
    sums.store(lane, partial.of(part, 0), begin, shared.scaled);
}

template <class T>
constexpr bool fits_everywhere() {
    constexpr std::size_t most = 99 * 1024;
    return sizeof(PanelCoefficientsShared<T>) <= most && sizeof(PanelReadoutShared<T>) <= most && sizeof(PanelOutputShared<T>) <= most &&
           sizeof(PanelSumsShared<T, false>) <= most && sizeof(PanelSumsShared<T, true>) <= most && sizeof(PanelTokenShared<T>) <= most &&
           sizeof(PanelTokenSumsShared<T>) <= most;
}
static_assert(fits_everywhere<bf16>() && fits_everywhere<f16>() && fits_everywhere<f32>());

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
