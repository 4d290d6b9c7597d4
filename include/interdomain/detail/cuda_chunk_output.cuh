// Outputs of chunks, in any order, from the states that enter them (eq. 14 to 17 of docs/ops/interdomain.md).
#pragma once

#include <interdomain/detail/cuda_chunk_steps.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail::chunks {

template <class T>
struct ChunkOutput {
    using E = typename Form<T>::Element;
    Slots slots{};
    Slice slice{};
    int group = 1;
    HeadRows<const T> q{}, k{}, v{};
    HeadRows<T> o{};
    const E* states = nullptr;
};

inline namespace INTERSTATE_KERNELS {

template <class T>
struct OutputShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    E table[S::coefficients], mix[S::mix];
    E state[2][S::state];
    E q[S::tokens], k[S::tokens];  // in the end w, then o
    E v[S::tokens];
    E square[S::chunk * (S::chunk > padded ? S::chunk : padded)];  // scores, s of real_parts, weights
    E a[S::coefficients];                                          // in the end w scaled
};

/// Block (part, query head): every gridDim.x-th chunk of the slice.
template <class T, bool real_parts>
__global__ void __launch_bounds__(group_threads, sizeof(typename Form<T>::Element) == 2 ? 2 : 1)
    output_kernel(ChunkOutput<T> run, Tables<T> tables) {
    using S = Sizes<T>;
    using St = Steps<T>;
    using E = typename Form<T>::Element;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<OutputShared<T>*>(shared_bytes);
    const St steps;
    const int thread = static_cast<int>(threadIdx.x);
    const int hq = static_cast<int>(blockIdx.y), h = hq / run.group, heads = static_cast<int>(gridDim.y) / run.group;
    const typename St::Powers powers(steps, tables.powers + h * Tables<T>::power_size);
    E* const w = shared.q;
    static_assert(2 * S::tokens == S::coefficients);

    device::copy_matrix<S::coefficients, group_threads>(shared.table, tables.table + h * S::coefficients, thread);
    device::copy_matrix<S::mix, group_threads>(shared.mix, tables.mix + h * S::mix, thread);
    device::wait_for_previous_kernel();
    const auto states_of = [&](int slot) { return run.states + (static_cast<Index>(slot - run.slice.begin) * heads + h) * 2 * S::state; };
    for (ChunkList<S::chunk> list(run.slots, run.slice); list.more(); list.next()) {
        const Chunk<S::chunk> chunk = list.chunk;
        const E* const states = states_of(list.slot);
        bring_rows<T, group_threads>(shared.q, run.q, chunk, hq, 0, thread);
        bring_rows<T, group_threads>(shared.k, run.k, chunk, h, 0, thread);
        device::commit_copies();
        device::copy_matrix<S::state, group_threads>(shared.state[0], states, thread);
        device::commit_copies();
        bring_rows<T, group_threads>(shared.v, run.v, chunk, h, 0, thread);
        device::copy_matrix<S::state, group_threads>(shared.state[1], states + S::state, thread);
        device::commit_copies();

        if (list.slot + list.parts < list.end) device::prefetch_matrix<2 * S::state, group_threads>(states_of(list.slot + list.parts), thread);

        device::wait_for_all_but<2>();
        __syncthreads();
        steps.scores(shared.q, shared.k, shared.square);
        device::wait_for_all_but<1>();
        __syncthreads();
        typename St::WideTiles c;
        steps.coefficients_of_state(c, shared.q, shared.state[0], powers);
        steps.add_coefficients_of_chunk(c, shared.square, shared.table);
        steps.put_conjugates(c, shared.a);
        __syncthreads();
        if constexpr (real_parts) {
            steps.real_parts(shared.a, shared.mix, shared.square);
            __syncthreads();
            steps.read_out_real(c, shared.square, shared.mix);
        } else {
            steps.read_out(c, shared.a, shared.mix);
        }
        steps.put(c, w);
        steps.scale(c, powers);
        device::wait_for_all_but<0>();
        __syncthreads();
        steps.put(c, shared.a);
        steps.weights(w, shared.table, shared.square);
        __syncthreads();
        float o[St::feature_tiles][4];
        device::clear(o);
        read_tokens<T>(o, shared.square, shared.v, shared.a, shared.state[1], steps.row, steps.feature_column(), steps.lane.index);
        put_tiles<padded>(o, w, steps.row, steps.feature_column(), steps.lane);
        __syncthreads();
        take_rows<T, group_threads>(w, run.o, chunk, hq, 0, thread);
        __syncthreads();
    }
}

template <class T>
Status launch_output(const cuda& exec, const Options& options, const ChunkOutput<T>& run, const Tables<T>& tables, Index query_heads, Index parts) {
    return launch(exec, "output_kernel",
                  options.readout == Readout::real_parts ? output_kernel<T, true> : output_kernel<T, false>,
                  {dim3(static_cast<unsigned>(parts), static_cast<unsigned>(query_heads)), dim3(group_threads), sizeof(OutputShared<T>), true}, run, tables);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
