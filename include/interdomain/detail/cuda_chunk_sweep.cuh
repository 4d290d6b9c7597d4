// The states between chunks, kept for the kernels that compute chunks in any order: forward in time for X, back in time
// for its adjoint. Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <interdomain/detail/cuda_chunk_form.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail::chunks {

template <class T>
struct Sweep {
    using E = typename Form<T>::Element;
    Slots slots{};
    Slice slice{};
    Panels panels{};
    int group = 1, modes = 0, features = 0;
    Source<T> half[2]{};                      // k and v, whose columns a state has; for the adjoint q and dout
    const E* scaled = nullptr;                // adjoint: (slot, query head, 2, panel of modes) coefficients of z, p for q and w for dout
    View<const complex<float>, 4> initial{};  // may be null: zero
    View<complex<float>, 4> final{};          // may be null
    View<const complex<float>, 3> initial_ones{};  // of the column behind the last, where there is one
    View<complex<float>, 3> final_ones{};
    const float* carry_in = nullptr;          // states at the border to the slice before; carry_out likewise, may be null
    float* carry_out = nullptr;
    E* states = nullptr;                      // (slot, kv head, panels) the state that enters each chunk
};

inline namespace INTERSTATE_KERNELS {

/// A block has the 2 modes by some columns of a half.
inline constexpr int sweep_threads = 2 * padded / 16 * 32, sweep_columns = 32, sweep_blocks = padded / sweep_columns;

template <class T, bool adjoint>
struct SweepShared {
    using E = typename Form<T>::Element;
    E z[2][Sizes<T>::chunk * sweep_columns];
    E a[adjoint ? 2 : 1][Sizes<T>::coefficients];
};

/// Block (recurrence or slot, kv head, panel and columns): X = Lam^T X + table^T z (eq. 18), or Y = conj(Lam)^T Y + scaled^T z (eq. 22). A warp
/// has 8 modes, real and imaginary parts in one lane, and all of the columns.
template <class T, bool adjoint, bool single>
__global__ void __launch_bounds__(sweep_threads, sizeof(typename Form<T>::Element) == 2 ? 4 : 2) sweep_kernel(Sweep<T> run, Tables<T> tables) {
    using S = Sizes<T>;
    using F = Form<T>;
    using E = typename F::Element;
    constexpr int tiles = sweep_columns / 8;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<SweepShared<T, adjoint>*>(shared_bytes);

    device::wait_for_previous_kernel();
    device::let_next_kernel_start();
    const Panels panels = single ? Panels() : run.panels;  // constants where there is one of each
    const Slots& slots = run.slots;
    const int stride = slots.stride(), h = static_cast<int>(blockIdx.y), heads = static_cast<int>(gridDim.y);
    const int panel = static_cast<int>(blockIdx.z) / sweep_blocks, of_modes = panel / panels.columns(), of_columns = panel % panels.columns();
    const int half = of_columns < panels.keys ? 0 : 1;
    // Columns of this block in its panel, and where they begin in the tensor.
    const int in_panel = static_cast<int>(blockIdx.z) % sweep_blocks * sweep_columns;
    const int first_column = (of_columns - half * panels.keys) * padded + in_panel;
    const Index table_at = static_cast<Index>(h) * panels.modes + of_modes;
    int slot = run.slice.begin + static_cast<int>(blockIdx.x);
    if (adjoint && !slots.cu) slot = run.slice.end - stride + static_cast<int>(blockIdx.x);
    Chunk<S::chunk> chunk(slots, slot);
    const int last = chunk.count_of_chunks > 0 ? chunk.count_of_chunks - 1 : 0;
    // Packed, there is a block for every slot, and those that begin a recurrence, or go on with one from another slice, run.
    const bool at_end = adjoint ? chunk.index == last : chunk.index == 0;
    const bool at_border = adjoint ? slot + stride >= run.slice.end : slot - stride < run.slice.begin;
    if (chunk.index < 0 || chunk.index > last || !(at_end || at_border)) return;

    const int thread = static_cast<int>(threadIdx.x);
    const Lane lane;
    const int row = 16 * lane.warp + lane.group, m_of_panel = 8 * lane.warp + lane.group, m = of_modes * padded + m_of_panel;
    const Index carrier = static_cast<Index>(slots.cu ? 0 : chunk.recurrence) * heads + h, border = (carrier * panels.state() + panel) * S::state + in_panel;
    const int columns = static_cast<int>(run.half[half].rows.view.extent[3]), column0 = half == 0 ? 0 : run.features;

    float x[tiles][4];
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int at_column = 8 * i + 2 * lane.quad + e % 2, c = first_column + at_column;
            float value = 0.0f;
            if (!at_end) {
                value = run.carry_in[border + (row + e / 2 * 8) * padded + at_column];
            } else if (run.initial && m < run.modes && c < columns) {
                const complex<float> z = run.initial(chunk.recurrence, h, m, column0 + c);
                value = e / 2 == 0 ? z.re : z.im;
            } else if (!single && run.initial_ones && m < run.modes && half == 1 && c == columns) {
                const complex<float> z = run.initial_ones(chunk.recurrence, h, m);
                value = e / 2 == 0 ? z.re : z.im;
            }
            x[i][e] = value;
        }

    // Brings what a chunk and query head `member` of the group add to the state.
    const auto bring = [&](const Chunk<S::chunk>& c, Index at, int member, int buffer) {
        const Source<T>& from = run.half[half];
        const int head = adjoint ? h * run.group + member : h, count = c.rows();
        if (!single && adjoint && from.panels) {
            device::copy_columns<S::chunk, sweep_columns, padded, sweep_threads>(
                shared.z[buffer], from.panel(at, head, of_columns - half * panels.keys), in_panel, thread);
        } else {
            const device::Rows<const T> rows(from.rows.view, c.batch(), c.row(), head, count, from.rows.wide, first_column);
            const int shift = adjoint ? 0 : S::chunk - count;
            if (!single && !adjoint && from.rows.ones)
                device::copy_in<S::chunk, sweep_columns, sweep_threads, true>(shared.z[buffer], rows, shift, thread);
            else
                device::copy_in<S::chunk, sweep_columns, sweep_threads>(shared.z[buffer], rows, shift, thread);
        }
        if constexpr (adjoint)
            device::copy_matrix<S::coefficients, sweep_threads>(
                shared.a[buffer], run.scaled + (((at * heads * run.group + head) * 2 + half) * panels.modes + of_modes) * S::coefficients, thread);
        device::commit_copies();
    };
    if constexpr (!adjoint)
        device::copy_matrix<S::coefficients, sweep_threads>(shared.a[0], tables.table + table_at * S::coefficients, thread);

    constexpr int direction = adjoint ? -1 : 1;
    const int members = adjoint ? run.group : 1, slots_here = run.slice.end - run.slice.begin;
    int at = slot - run.slice.begin;
    int buffer = 0, powers_of = -1;
    complex<float> decay{}, decay_low{};  // Lam^rows as sums of two floats: rounding it would be the same error in each chunk
    bool more = chunk.exists();
    bool finished = !more;
    if (more) bring(chunk, at, 0, 0);
    while (more) {
        for (int member = 0; member < members; ++member) {
            Chunk<S::chunk> next = chunk;
            int next_at = at;
            const bool same = member + 1 < members;
            if (!same) {
                next.index += direction;
                next_at += direction * stride;
                more = next.exists() && next_at >= 0 && next_at < slots_here;
                finished = !next.exists();
            }
            if (same || more) {
                bring(next, next_at, same ? member + 1 : 0, buffer ^ 1);
                device::wait_for_all_but<1>();
            } else {
                device::wait_for_all_but<0>();
            }
            __syncthreads();
            if (member == 0) {
                if (chunk.rows() != powers_of) {
                    powers_of = chunk.rows();
                    const c64 power = tables.powers64[table_at * Tables<T>::power_size + powers_of * padded + m_of_panel];
                    decay = cast<float>(power);
                    decay_low = cast<float>(power - cast<double>(decay));
                    if (adjoint) decay = conj(decay), decay_low = conj(decay_low);
                }
                E* const state = run.states + ((static_cast<Index>(at) * heads + h) * panels.state() + panel) * S::state + device::blocked<padded>(row, in_panel) + 2 * lane.quad;
#pragma unroll
                for (int i = 0; i < tiles; ++i) {
                    put_factors<T>(state + 64 * i, x[i][0], x[i][1]);
                    put_factors<T>(state + 64 * i + 8 * padded, x[i][2], x[i][3]);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        const float re = x[i][e], im = x[i][e + 2];
                        x[i][e] = decay.re * re - decay.im * im;
                        x[i][e + 2] = decay.re * im + decay.im * re;
                        if constexpr (F::precision == device::Precision::exact) {
                            x[i][e] += decay_low.re * re - decay_low.im * im;
                            x[i][e + 2] += decay_low.re * im + decay_low.im * re;
                        }
                    }
                }
            }
            device::multiply<F::precision, S::chunk>(x, device::transposed<S::wide>(shared.a[adjoint ? buffer : 0]), 16 * lane.warp,
                                                     device::transposed<sweep_columns>(shared.z[buffer]), 0, 0, lane.index);
            __syncthreads();
            buffer ^= 1;
            if (!same && more) {
                chunk = next;
                at = next_at;
            }
        }
    }

#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int at_column = 8 * i + 2 * lane.quad + e, c = first_column + at_column;
            if (!finished && run.carry_out) {
                run.carry_out[border + row * padded + at_column] = x[i][e];
                run.carry_out[border + (row + 8) * padded + at_column] = x[i][e + 2];
            }
            if (finished && run.final && m < run.modes && c < columns)
                run.final(chunk.recurrence, h, m, column0 + c) = {x[i][e], x[i][e + 2]};
            if (!single && finished && run.final_ones && m < run.modes && half == 1 && c == columns)
                run.final_ones(chunk.recurrence, h, m) = {x[i][e], x[i][e + 2]};
        }
}

template <class T, bool adjoint>
Status launch_sweep(const cuda& exec, const Sweep<T>& run, const Tables<T>& tables, Index heads) {
    const int blocks = run.slots.cu ? run.slice.end - run.slice.begin : run.slots.stride();
    return launch(exec, adjoint ? "adjoint_sweep_kernel" : "sweep_kernel",
                  run.panels.single() ? sweep_kernel<T, adjoint, true> : sweep_kernel<T, adjoint, false>,
                  {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads), static_cast<unsigned>(run.panels.state() * sweep_blocks)), dim3(sweep_threads),
                   sizeof(SweepShared<T, adjoint>), true},
                  run, tables);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
