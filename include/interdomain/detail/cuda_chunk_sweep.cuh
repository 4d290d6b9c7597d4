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
    // parallel_scan: runs of so many chunks start at the same time, first from zero, which leaves `ends`, then from there.
    int segment = 0;
    bool from_zero = false;
    float* ends = nullptr;  // (border between segments, carrier, kv head, panels)

    INTERSTATE_HD int slot_count() const { return slice.end - slice.begin; }
    INTERSTATE_HD int carriers() const { return slots.cu ? 1 : slots.recurrences; }
    /// Chunks of a recurrence (packed, of all) between the one at `at` in the slice and where its run begins.
    INTERSTATE_HD int position(int at, bool adjoint) const { return (adjoint ? slot_count() - 1 - at : at) / slots.stride(); }
    /// Does a segment begin so many chunks from there?
    INTERSTATE_HD bool cuts(int position) const { return segment > 0 && position % segment == 0; }
    INTERSTATE_HD Index end_of(int border, int carrier, int heads, int h, int panel) const {
        return (((static_cast<Index>(border) * carriers() + carrier) * heads + h) * panels.state() + panel) * Sizes<T>::state;
    }
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

/// Block (recurrence or slot, kv head, panel and columns): X = Lam^N X + table^T z (eq. 18), or Y = conj(Lam)^N Y + scaled^T z
/// (eq. 22), N being the chunk's tokens. A warp has 8 modes, real and imaginary parts in one lane, and all of the columns.
template <class T, bool adjoint, bool plain>
__global__ void __launch_bounds__(sweep_threads, sizeof(typename Form<T>::Element) == 2 ? 4 : 2) sweep_kernel(Sweep<T> run, Tables<T> tables) {
    using S = Sizes<T>;
    using F = Form<T>;
    using E = typename F::Element;
    constexpr int tiles = sweep_columns / 8;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<SweepShared<T, adjoint>*>(shared_bytes);

    device::wait_for_previous_kernel();
    device::let_next_kernel_start();
    const Panels panels = plain ? Panels() : run.panels;  // constants where there is one of each
    const Slots& slots = run.slots;
    const int stride = slots.stride(), h = static_cast<int>(blockIdx.y), heads = static_cast<int>(gridDim.y);
    const int panel = static_cast<int>(blockIdx.z) / sweep_blocks, of_modes = panel / panels.columns(), of_columns = panel % panels.columns();
    const int half = of_columns < panels.keys ? 0 : 1;
    // Columns of this block in its panel, and where they begin in the tensor.
    const int in_panel = static_cast<int>(blockIdx.z) % sweep_blocks * sweep_columns;
    const int first_column = (of_columns - half * panels.keys) * padded + in_panel;
    const Index table_at = static_cast<Index>(h) * panels.modes + of_modes;
    int slot = run.slice.begin + static_cast<int>(blockIdx.x);
    if (!slots.cu) {
        const int begin = plain ? 0 : static_cast<int>(blockIdx.x) / stride * run.segment * stride, carrier = static_cast<int>(blockIdx.x) % stride;
        slot = adjoint ? run.slice.end - stride - begin + carrier : run.slice.begin + begin + carrier;
    }
    Chunk<S::chunk> chunk(slots, slot);
    const int last = chunk.count_of_chunks > 0 ? chunk.count_of_chunks - 1 : 0;
    // Packed, there is a block for every slot, and those that begin a recurrence, or go on with one from another slice, run.
    const bool at_end = adjoint ? chunk.index == last : chunk.index == 0;
    const bool at_border = adjoint ? slot + stride >= run.slice.end : slot - stride < run.slice.begin;
    const bool at_segment = !plain && run.cuts(run.position(slot - run.slice.begin, adjoint));
    if (chunk.index < 0 || chunk.index > last || !(at_end || at_border || at_segment)) return;

    const int thread = static_cast<int>(threadIdx.x);
    const Lane lane;
    const int row = 16 * lane.warp + lane.group, m_of_panel = 8 * lane.warp + lane.group, m = of_modes * padded + m_of_panel;
    const int carrier = slots.cu ? 0 : chunk.recurrence;
    const Index border = ((static_cast<Index>(carrier) * heads + h) * panels.state() + panel) * S::state + in_panel;
    const auto end_of = [&](int chunks) { return run.ends + run.end_of(chunks / run.segment, carrier, heads, h, panel) + in_panel; };
    const float* start = run.carry_in ? run.carry_in + border : nullptr;
    if (!plain && !at_border) start = at_segment && !run.from_zero ? end_of(run.position(slot - run.slice.begin, adjoint)) : nullptr;
    const int columns = static_cast<int>(run.half[half].rows.view.extent[3]), column0 = half == 0 ? 0 : run.features;

    float x[tiles][4];
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const int at_column = 8 * i + 2 * lane.quad + e % 2, c = first_column + at_column;
            float value = 0.0f;
            if (!at_end) {
                if (plain || start) value = start[(row + e / 2 * 8) * padded + at_column];
            } else if (run.initial && m < run.modes && c < columns) {
                const complex<float> z = run.initial(chunk.recurrence, h, m, column0 + c);
                value = e / 2 == 0 ? z.re : z.im;
            } else if (!plain && run.initial_ones && m < run.modes && half == 1 && c == columns) {
                const complex<float> z = run.initial_ones(chunk.recurrence, h, m);
                value = e / 2 == 0 ? z.re : z.im;
            }
            x[i][e] = value;
        }

    // Brings what a chunk and query head `member` of the group add to the state.
    const auto bring = [&](const Chunk<S::chunk>& c, Index at, int member, int buffer) {
        if (adjoint && run.group == 0) {  // nothing reads these keys and values
            for (int i = thread; i < S::chunk * sweep_columns; i += sweep_threads) shared.z[buffer][i] = device::store_as<E>(0.0f);
            for (int i = thread; i < S::coefficients; i += sweep_threads) shared.a[adjoint ? buffer : 0][i] = device::store_as<E>(0.0f);
            return;
        }
        const Source<T>& from = run.half[half];
        const int head = adjoint ? h * run.group + member : h, count = c.rows();
        if (!plain && adjoint && from.panels) {
            device::copy_columns<S::chunk, sweep_columns, padded, sweep_threads>(
                shared.z[buffer], from.panel(at, head, of_columns - half * panels.keys), in_panel, thread);
        } else {
            const device::Rows<const T> rows(from.rows.view, c.batch(), c.row(), head, count, from.rows.wide, first_column);
            const int shift = adjoint ? 0 : S::chunk - count;
            if (!plain && !adjoint && from.rows.ones)
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
    const int members = adjoint && run.group > 0 ? run.group : 1;
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
                more = next.exists() && next_at >= 0 && next_at < run.slot_count() && (plain || !run.cuts(run.position(next_at, adjoint)));
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
                const bool leaves = plain || !run.from_zero;
                E* const state = run.states + ((static_cast<Index>(at) * heads + h) * panels.state() + panel) * S::state + device::blocked<padded>(row, in_panel) + 2 * lane.quad;
#pragma unroll
                for (int i = 0; i < tiles; ++i) {
                    if (leaves) {
                        put_factors<T>(state + 64 * i, x[i][0], x[i][1]);
                        put_factors<T>(state + 64 * i + 8 * padded, x[i][2], x[i][3]);
                    }
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

    // Where it goes on: into another slice, or into the next segment.
    float* end = !finished && run.carry_out ? run.carry_out + border : nullptr;
    const int behind = run.position(at, adjoint) + 1;
    if (!plain && !finished && run.cuts(behind) && behind * stride < run.slot_count()) end = run.from_zero ? end_of(behind) : nullptr;
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int at_column = 8 * i + 2 * lane.quad + e, c = first_column + at_column;
            if (end) {
                end[row * padded + at_column] = x[i][e];
                end[(row + 8) * padded + at_column] = x[i][e + 2];
            }
            if (finished && run.final && m < run.modes && c < columns)
                run.final(chunk.recurrence, h, m, column0 + c) = {x[i][e], x[i][e + 2]};
            if (!plain && finished && run.final_ones && m < run.modes && half == 1 && c == columns)
                run.final_ones(chunk.recurrence, h, m) = {x[i][e], x[i][e + 2]};
        }
}

inline constexpr int combine_threads = 256;

/// Block (border, carrier; kv head; panel): level `level` of the scan of what segments leave (eq. 26).
template <class T, bool adjoint>
__global__ void __launch_bounds__(combine_threads) combine_kernel(Sweep<T> run, Tables<T> tables, int level) {
    using S = Sizes<T>;
    const int carriers = run.carriers(), carrier = static_cast<int>(blockIdx.x) % carriers, border = static_cast<int>(blockIdx.x) / carriers + 1;
    const int number = border - 1;
    if ((number >> level) % 2 == 0) return;
    const int distance = number % (1 << level) + 1, stride = run.slots.stride(), begin = border * run.segment * stride;
    const int slot = adjoint ? run.slice.end - stride - begin + carrier : run.slice.begin + begin + carrier;
    if (begin >= run.slot_count()) return;
    // Not across the beginning of a recurrence.
    const Chunk<S::chunk> chunk(run.slots, slot);
    if (!chunk.exists() || (adjoint ? chunk.count_of_chunks - 1 - chunk.index : chunk.index) <= run.segment * distance) return;
    const int heads = static_cast<int>(gridDim.y), h = static_cast<int>(blockIdx.y), panel = static_cast<int>(blockIdx.z);
    constexpr int shares = combine_threads / padded;
    const int m = static_cast<int>(threadIdx.x) / shares, share = static_cast<int>(threadIdx.x) % shares;
    const Index table = static_cast<Index>(h) * run.panels.modes + panel / run.panels.columns();
    c64 power = s4d::detail::raise(tables.powers64[table * Tables<T>::power_size + S::chunk * padded + m], run.segment * distance);
    if (adjoint) power = conj(power);
    const int place = m / 8 * 16 * padded + m % 8 * padded;
    float* const to = run.ends + run.end_of(border, carrier, heads, h, panel) + place;
    const float* const from = run.ends + run.end_of(border - distance, carrier, heads, h, panel) + place;
    for (int c = share; c < padded; c += shares) {
        const c64 x = c64{to[c], to[c + 8 * padded]} + power * c64{from[c], from[c + 8 * padded]};
        to[c] = static_cast<float>(x.re);
        to[c + 8 * padded] = static_cast<float>(x.im);
    }
}

template <class T, bool adjoint>
Status launch_segments(const cuda& exec, const Sweep<T>& run, const Tables<T>& tables, Index heads) {
    const int chunks = run.slot_count() / run.slots.stride();
    const int blocks = run.slots.cu ? run.slot_count() : run.slots.stride() * (run.segment > 0 ? (chunks + run.segment - 1) / run.segment : 1);
    return launch(exec, adjoint ? "adjoint_sweep_kernel" : "sweep_kernel",
                  run.panels.single() && run.segment == 0 ? sweep_kernel<T, adjoint, true> : sweep_kernel<T, adjoint, false>,
                  {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(heads), static_cast<unsigned>(run.panels.state() * sweep_blocks)), dim3(sweep_threads),
                   sizeof(SweepShared<T, adjoint>), true},
                  run, tables);
}

template <class T, bool adjoint>
Status launch_sweep(const cuda& exec, const Sweep<T>& run, const Tables<T>& tables, Index heads) {
    if (run.segment == 0) return launch_segments<T, adjoint>(exec, run, tables, heads);
    Sweep<T> first = run;
    first.from_zero = true;
    first.final = {};
    first.final_ones = {};
    first.carry_out = nullptr;
    INTERSTATE_RETURN_IF_ERROR((launch_segments<T, adjoint>(exec, first, tables, heads)));
    const int borders = (run.slot_count() / run.slots.stride() - 1) / run.segment;
    for (int level = 0; 1 << level < borders; ++level)
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "combine_kernel", combine_kernel<T, adjoint>,
                                          {dim3(static_cast<unsigned>(borders * run.carriers()), static_cast<unsigned>(heads), static_cast<unsigned>(run.panels.state())),
                                           dim3(combine_threads)},
                                          run, tables, level));
    return launch_segments<T, adjoint>(exec, run, tables, heads);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
