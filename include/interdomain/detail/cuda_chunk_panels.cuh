// Chunks with more than 64 modes, features or value columns: the equations of cuda_chunk_output.cuh and
// cuda_chunk_backward.cuh, a panel of 64 at a time, with what passes from step to step in workspace instead of shared memory.
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
    HeadRows<const T> x{}, y{}, z{};         // x of query heads
    HeadRows<T> out{};                       // may be null
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

/// Starts to bring a panel of a head's rows; their first one to row `shift`.
template <class T>
__device__ void bring_rows(typename Form<T>::Element* to, const HeadRows<const T>& from, const Chunk<Sizes<T>::chunk>& chunk, int head, int panel,
                           int shift, int thread) {
    device::copy_in<Sizes<T>::chunk, padded, group_threads>(
        to, device::Rows<const T>(from.view, chunk.batch(), chunk.row(), head, chunk.rows(), from.wide, panel * padded), shift, thread);
}
template <class T>
__device__ void take_rows(const typename Form<T>::Element* from, const HeadRows<T>& to, const Chunk<Sizes<T>::chunk>& chunk, int head, int panel,
                          int shift, int thread) {
    device::copy_out<Sizes<T>::chunk, padded, group_threads>(
        from, device::Rows<T>(to.view, chunk.batch(), chunk.row(), head, chunk.rows(), to.wide, panel * padded), shift, thread);
}

template <class T>
struct PanelCoefficientsShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    E table[S::coefficients], state[S::state], x[S::tokens], y[S::tokens], scores[S::square];
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
    const typename St::Powers powers(steps, tables.powers + table * Tables<T>::power_size);
    device::copy_matrix<S::coefficients, group_threads>(shared.table, tables.table + table * S::coefficients, thread);
    for (ChunkList<S::chunk> list(run.slots, run.slice); list.more(); list.next()) {
        const Index at = list.slot - run.slice.begin;
        typename St::TokenTiles scores;
        typename St::WideTiles c;
        device::clear(scores);
        device::clear(c);
        for (int panel = 0; panel < run.panels_of_x(); ++panel) {
            bring_rows<T>(shared.x, run.x, list.chunk, hq, panel, 0, thread);
            bring_rows<T>(shared.y, run.y, list.chunk, h, panel, 0, thread);
            device::copy_matrix<S::state, group_threads>(shared.state, run.state(at, h, of_modes, run.x_in_state() + panel), thread);
            device::wait_for_copies();
            __syncthreads();
            steps.add_scores(scores, shared.x, shared.y);
            steps.add_products_with_state(c, shared.x, shared.state);
            __syncthreads();
        }
        steps.age(c, powers);
        if (run.of_state) steps.put_kept(c, run.of_state + run.panel(at, hq, 1 - run.side, of_modes));
        steps.put_scores(scores, shared.scores);
        __syncthreads();
        steps.add_coefficients_of_chunk(c, shared.scores, shared.table);
        steps.put_conjugates(c, run.a + run.panel(at, hq, run.side, of_modes));
        if (run.of_state && of_modes == 0)
            device::store_matrix<S::square, group_threads>(run.scores + run.member(at, hq, run.side) * S::square, shared.scores, thread);
    }
}

/// What panel_readout_kernel makes: w of a, or for real_parts s of a and w of s.
enum class Reads { all, halves, of_halves };

template <class T>
struct PanelReadoutShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    E from[S::coefficients], mix[S::mix];
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
    for (ChunkList<S::chunk> list(run.slots, run.slice); list.more(); list.next()) {
        const Index at = list.slot - run.slice.begin;
        std::conditional_t<reads == Reads::halves, typename St::FeatureTiles, typename St::WideTiles> c;
        device::clear(c);
        for (int from = 0; from < run.panels.modes; ++from) {
            if constexpr (reads == Reads::of_halves)
                device::copy_matrix<S::tokens, group_threads>(shared.from, run.halves + run.panel(at, hq, run.side, from, S::tokens), thread);
            else
                device::copy_matrix<S::coefficients, group_threads>(shared.from, run.a + run.panel(at, hq, run.side, from), thread);
            const int row = reads == Reads::of_halves ? from : of_modes, column = reads == Reads::of_halves ? of_modes : from;
            device::copy_matrix<S::mix, group_threads>(
                shared.mix, tables.mix + ((static_cast<Index>(h) * run.panels.modes + row) * run.panels.modes + column) * S::mix, thread);
            device::wait_for_copies();
            __syncthreads();
            if constexpr (reads == Reads::all) steps.add_mixed(c, shared.from, shared.mix);
            if constexpr (reads == Reads::halves) steps.add_half_of_real_parts(c, shared.from, shared.mix);
            if constexpr (reads == Reads::of_halves) steps.add_mixed_real(c, shared.from, shared.mix);
            __syncthreads();
        }
        if constexpr (reads == Reads::halves) {
            steps.put_doubled(c, run.halves + run.panel(at, hq, run.side, of_modes, S::tokens));
        } else {
            if constexpr (reads == Reads::of_halves) steps.double_and_conjugate(c);
            steps.put(c, run.w + run.panel(at, hq, run.side, of_modes));
        }
    }
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
    const bool reads = static_cast<bool>(run.out.view), leaves = run.of_state && panel == 0;
    for (ChunkList<S::chunk> list(run.slots, run.slice); list.more(); list.next()) {
        const Index at = list.slot - run.slice.begin;
        typename St::TokenTiles weights;
        typename St::FeatureTiles o;
        device::clear(weights);
        device::clear(o);
        if (reads) bring_rows<T>(shared.z, run.z, list.chunk, h, panel, 0, thread);
        for (int of_modes = 0; of_modes < run.panels.modes; ++of_modes) {
            const Index table = static_cast<Index>(h) * run.panels.modes + of_modes;
            device::copy_matrix<S::coefficients, group_threads>(shared.w, run.w + run.panel(at, hq, run.side, of_modes), thread);
            device::copy_matrix<S::coefficients, group_threads>(shared.table, tables.table + table * S::coefficients, thread);
            if (reads) device::copy_matrix<S::state, group_threads>(shared.state, run.state(at, h, of_modes, run.z_in_state() + panel), thread);
            device::wait_for_copies();
            __syncthreads();
            steps.add_weights(weights, shared.w, shared.table);
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
        steps.put_weights(weights, shared.weights);
        __syncthreads();
        if (leaves) device::store_matrix<S::square, group_threads>(run.weights + run.member(at, hq, run.side) * S::square, shared.weights, thread);
        if (reads) {
            device::multiply<F::precision>(o, device::as_stored<S::chunk>(shared.weights), steps.row, device::transposed<padded>(shared.z),
                                           steps.feature_column(), 0, steps.row + 16, lane);
            __syncthreads();
            put_tiles<padded>(o, shared.z, steps.row, steps.feature_column(), steps.lane);
            __syncthreads();
            take_rows<T>(shared.z, run.out, list.chunk, hq, panel, 0, thread);
        }
        __syncthreads();
    }
}

template <class T, bool real_parts>
struct PanelSumsShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    E a[2][S::coefficients], w[2][S::coefficients];
    E scores[2][S::square];
    E halves[real_parts ? 2 * S::tokens : 8];
    float of_warps[4 * padded * (S::chunk / 16)];
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
    const auto bring = [&](auto& to, const auto* from) { device::copy_matrix<sizeof(to) / sizeof(to[0]), query_threads>(to, from, thread); };
    for (ChunkList<S::chunk> list(run.slots, run.slice); list.more(); list.next()) {
        const Index at = list.slot - run.slice.begin;
        bring(shared.a[0], run.a + run.panel(at, hq, 0, of_a));
        bring(shared.a[1], run.a + run.panel(at, hq, 1, real_parts ? of_a : of_e));
        if constexpr (real_parts)
            for (int i = 0; i < 2; ++i)
                device::copy_matrix<S::tokens, query_threads>(shared.halves + i * S::tokens, run.halves + run.panel(at, hq, i, of_e, S::tokens), thread);
        if (lags)
            for (int i = 0; i < 2; ++i) {
                bring(shared.scores[i], run.scores + run.member(at, hq, i) * S::square);
                bring(shared.w[i], run.w + run.panel(at, hq, i, of_e));
            }
        device::wait_for_copies();
        __syncthreads();
        if (lags) {
            typename St::Kept of_state;
            steps.get_kept(of_state, run.of_state + run.panel(at, hq, 1 - side, of_e));
            sums.add_scaled(steps, of_state, shared.w[1 - side]);
            sums.add_lags(steps.lane, shared.scores, shared.w);
        }
        sums.add_mix(steps.lane, shared.a, shared.halves);
        __syncthreads();
    }
    sums.store_mix(steps.lane, own);
    if (lags) sums.store_lags_and_scaled(steps, own, first, shared.of_warps);
}

template <class T>
struct PanelTokens {
    using E = typename Form<T>::Element;
    using S = Sizes<T>;
    Slots slots{};
    Slice slice{};
    Panels panels{};
    int group = 1;
    HeadRows<const T> z[2]{}, from[2]{};  // k and v; q and dout
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
    E from[S::tokens], weights[S::square], table[S::coefficients], adjoint[S::state];
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
    for (ChunkList<S::chunk> list(run.slots, run.slice); list.more(); list.next()) {
        const Index at = list.slot - run.slice.begin;
        const int shift = S::chunk - list.chunk.rows();
        typename St::FeatureTiles c;
        device::clear(c);
        for (int hq = h * run.group; hq < (h + 1) * run.group; ++hq) {
            bring_rows<T>(shared.from, run.from[side], list.chunk, hq, panel, 0, thread);
            // Those of the other side: dk from Q, dv from P.
            bring_weights<T, 1>(shared.weights, run.weights + ((at * heads * run.group + hq) * 2 + 1 - side) * S::square, shift, thread);
            device::wait_for_copies();
            __syncthreads();
            device::multiply<F::precision>(c, device::transposed<S::chunk>(shared.weights), row, device::transposed<padded>(shared.from), first,
                                           shift == 0 ? row : 0, shift == 0 ? S::chunk - row : S::chunk, lane);
            __syncthreads();
        }
        for (int of_modes = 0; of_modes < run.panels.modes; ++of_modes) {
            device::copy_matrix<S::coefficients, token_threads>(
                shared.table, tables.table + (static_cast<Index>(h) * run.panels.modes + of_modes) * S::coefficients, thread);
            device::copy_matrix<S::state, token_threads>(shared.adjoint, run.adjoints + run.state(at * heads + h, of_modes, column), thread);
            device::wait_for_copies();
            __syncthreads();
            device::multiply<F::precision, S::wide>(c, device::as_stored<S::wide>(shared.table), row, device::transposed<padded>(shared.adjoint), first, 0,
                                                    lane);
            __syncthreads();
        }
        put_tiles<padded>(c, shared.from, row, first, steps.lane);
        __syncthreads();
        take_rows<T>(shared.from, run.dz[side], list.chunk, h, panel, shift, thread);
        __syncthreads();
    }
}

template <class T>
struct PanelTokenSumsShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    E z[S::tokens], adjoint[S::state];
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
    for (ChunkList<S::chunk> list(run.slots, run.slice); list.more(); list.next()) {
        const Index at = list.slot - run.slice.begin;
        const int count = list.chunk.rows();
        complex<float> passing{};
        for (int column = 0; column < run.panels.columns(); ++column) {
            const int side = column < run.panels.keys ? 0 : 1;
            const Index panel = run.state(at * heads + h, of_modes, column);
            bring_rows<T>(shared.z, run.z[side], list.chunk, h, column - side * run.panels.keys, S::chunk - count, thread);
            device::copy_matrix<S::state, token_threads>(shared.adjoint, run.adjoints + panel, thread);
            device::wait_for_copies();
            __syncthreads();
            sums.add_lags(lane, shared.z, shared.adjoint);
            TokenSums<T>::template add_passing<padded / 4>(passing, run.states + panel, shared.adjoint, TokenSums<T>::quarter() * (padded / 4));
            __syncthreads();
        }
        sums.add_scaled(count, powers + count * padded, passing);
    }
    sums.store(lane, partial.of(part, 0), begin, shared.scaled);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
