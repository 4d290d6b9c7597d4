// The chunked method of Interdomain Attention on the GPU: chunks, what is kept for each, and in which order.
// Equation numbers: docs/ops/interdomain.md, "In chunks" and "CUDA kernels".
//
// A complex axis of modes is stored as 8 real parts, then the 8 imaginary ones, in turn: a warp's products then have both
// parts of a number in one lane. Adjoints are stored as conjugates, which are the gradients that are reported.
#pragma once

#include <interdomain/detail/discretize.hpp>
#include <interstate/cuda/launch.cuh>
#include <interstate/cuda/rows.cuh>
#include <interstate/cuda/sequences.cuh>
#include <interstate/workspace.hpp>
#include <s4d/detail/discretize.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail::chunks {

/// How a storage dtype is computed with: the element of matrices and states between kernels, what products make of it,
/// and tokens of a chunk.
template <class T>
struct Form;
template <>
struct Form<bf16> {
    using Element = bf16;
    static constexpr device::Precision precision = device::Precision::bfloat;
    static constexpr int chunk = 64;
};
template <>
struct Form<f32> {
    using Element = float;
    static constexpr device::Precision precision = device::Precision::exact;
    static constexpr int chunk = 32;
};
template <>
struct Form<f16> {
    using Element = float;
    static constexpr device::Precision precision = device::Precision::cut;
    static constexpr int chunk = 32;
};

/// Modes, features and value columns, padded to one size: a panel of a matrix has that many.
inline constexpr int padded = 64;

/// Shared memory of a block that works on a whole chunk in both directions.
inline constexpr std::size_t whole_chunk_shared = 224 * 1024;

/// Panels of a shape: of modes, and of the columns of keys and of values. With one of each and no normaliser, kernels that keep a whole chunk in
/// shared memory run (cuda_chunk_output.cuh, cuda_chunk_backward.cuh), else those of cuda_chunk_panels.cuh.
struct Panels {
    int modes = 1, keys = 1, values = 1;
    bool ones = false;   // the normaliser's channel of ones is another column of values
    bool whole = true;  // the device has room for a whole chunk
    Panels() = default;
    Panels(const Options& options, const Shape& s)
        : modes(count(s.modes)), keys(count(s.features)), values(count(s.value_dim + (options.normalized() ? 1 : 0))), ones(options.normalized()) {
        std::size_t limit = 0;
        whole = shared_memory_limit(limit).ok() && limit >= whole_chunk_shared;
    }
    INTERSTATE_HD int columns() const { return keys + values; }
    /// Of a state, panel (modes, columns) after panel.
    INTERSTATE_HD int state() const { return modes * columns(); }
    INTERSTATE_HD int mix() const { return modes * modes; }
    bool single() const { return modes == 1 && keys == 1 && values == 1 && !ones && whole; }

  private:
    static int count(Index columns) { return static_cast<int>(std::max<Index>(ceil_div(columns, padded), 1)); }
};

/// Elements of a chunk's arrays, of a panel each.
template <class T>
struct Sizes {
    static constexpr int chunk = Form<T>::chunk, wide = 2 * padded;
    static constexpr int tokens = chunk * padded;        // rows of q, k, v or dout
    static constexpr int coefficients = chunk * wide;    // a, e, w or p; the table of powers
    static constexpr int state = wide * padded;          // half a state: keys or values
    static constexpr int mix = padded * wide;            // G or C
    static constexpr int square = chunk * chunk;         // scores, P, Q
};

/// A tensor of rows of heads, and whether they move 16 bytes at once; `ones`: with a column of ones behind the last.
template <class T>
struct HeadRows {
    View<T, 4> view{};
    bool wide = false, ones = false;
    HeadRows() = default;
    HeadRows(const View<T, 4>& view_, bool ones_ = false) : view(view_), wide(device::moves_wide(view_, view_.extent[3])), ones(ones_) {}
};

/// Rows of heads by chunks: those of a tensor or, if not null, panels (slot, head, panel) (chunk, columns) made from it.
template <class T>
struct Source {
    HeadRows<const T> rows{};
    const typename Form<T>::Element* panels = nullptr;
    int heads = 0, each = 0;  // panels of a slot and head
    Source() = default;
    Source(const View<const T, 4>& view, bool ones = false) : rows(view, ones) {}
    INTERSTATE_HD const auto* panel(Index at, int head, int column) const {
        return panels + ((at * heads + head) * each + column) * Sizes<T>::tokens;
    }
    Index columns() const { return rows.view.extent[3]; }
};

/// Chunks of all recurrences, numbered so that those which can be computed at the same time are neighbours: a dense batch
/// counts through its rows first; packed sequences come one after the other, and some numbers stay unused.
struct Slots {
    View<const std::int32_t, 1> cu{};
    int length = 0, recurrences = 0;

    /// From a chunk to the next of the same recurrence.
    INTERSTATE_HD int stride() const { return cu ? 1 : recurrences; }
};
inline Slots slots_of(const Shape& s, const View<const std::int32_t, 1>& cu) {
    return {cu, static_cast<int>(s.length), static_cast<int>(s.states())};
}
inline Index slot_count(const Shape& s, int chunk) {
    if (s.states() == 0) return 0;
    return s.packed() ? s.length / chunk + s.sequences : s.batch * std::max<Index>(ceil_div(s.length, chunk), 1);
}

/// The slots of one launch: workspace holds the chunks of a slice at a time.
struct Slice {
    int begin, end;
};

inline namespace INTERSTATE_KERNELS {

/// A chunk of `size` tokens: which recurrence, how far in it, its rows.
template <int size>
struct Chunk {
    int recurrence, index, count_of_chunks, begin, end;  // begin, end: rows of the recurrence
    __device__ Chunk(const Slots& slots, int slot) {
        if (slots.cu) {
            recurrence = static_cast<int>(device::recurrence_of(slots.cu, slots.recurrences, slots.length, slot, size));
            index = slot - static_cast<int>(device::first_tile(slots.cu, recurrence, slots.length, size));
            const RowRange range = device::checked_rows(slots.cu, recurrence, slots.length);
            begin = static_cast<int>(range.begin);
            end = static_cast<int>(range.end);
            batch_ = 0;
        } else {
            index = static_cast<int>(static_cast<unsigned>(slot) / static_cast<unsigned>(slots.recurrences));
            recurrence = batch_ = slot - index * slots.recurrences;
            begin = 0;
            end = slots.length;
        }
        count_of_chunks = static_cast<int>((static_cast<unsigned>(end - begin) + size - 1) / size);
    }
    /// What a slot has where none is left.
    __device__ Chunk() : recurrence(0), index(-1), count_of_chunks(0), begin(0), end(0), batch_(0) {}
    __device__ bool exists() const { return index >= 0 && index < count_of_chunks; }
    __device__ Index batch() const { return batch_; }
    __device__ int row() const { return begin + index * size; }
    __device__ int rows() const { return end - row() < size ? end - row() : size; }

  private:
    int batch_;
};

/// The chunks of a block: those of every `parts`-th slot of a slice that have any rows.
template <int size>
struct ChunkList {
    const Slots& slots;
    int end, parts, slot;  // slot: of `chunk`, or at least `end`
    Chunk<size> chunk;
    __device__ ChunkList(const Slots& slots_, const Slice& slice)
        : slots(slots_), end(slice.end), parts(static_cast<int>(gridDim.x)), slot(slice.begin + static_cast<int>(blockIdx.x) - parts) {
        next();
    }
    __device__ bool more() const { return slot < end; }
    __device__ void next() {
        do {
            slot += parts;
            if (slot < end) chunk = Chunk<size>(slots, slot);
        } while (slot < end && !chunk.exists());
    }
};

/// Starts to bring a panel of a head's rows, their first one to row `shift`, by `threads` threads. `ones`: with a column of ones
/// behind the last.
template <class T, int threads, bool ones = false>
__device__ void bring_rows(typename Form<T>::Element* to, const HeadRows<const T>& from, const Chunk<Form<T>::chunk>& chunk, int head, int shift,
                           int thread, int panel = 0) {
    device::copy_in<Form<T>::chunk, padded, threads, ones>(
        to, device::Rows<const T>(from.view, chunk.batch(), chunk.row(), head, chunk.rows(), from.wide, panel * padded), shift, thread);
}
/// Takes them out again.
template <class T, int threads>
__device__ void take_rows(const typename Form<T>::Element* from, const HeadRows<T>& to, const Chunk<Form<T>::chunk>& chunk, int head, int shift,
                          int thread, int panel = 0) {
    device::copy_out<Form<T>::chunk, padded, threads>(
        from, device::Rows<T>(to.view, chunk.batch(), chunk.row(), head, chunk.rows(), to.wide, panel * padded), shift, thread);
}

/// What becomes a factor of products.
template <class T>
__device__ float factor(float x) {
    return device::rounded<Form<T>::precision>(x);
}
template <class T>
__device__ void put_factors(typename Form<T>::Element* to, float x, float y) {
    device::put_pair(to, factor<T>(x), factor<T>(y));
}

/// Who a thread is.
struct Lane {
    int warp, index, group, quad;
    __device__ Lane()
        : warp(static_cast<int>(threadIdx.x / 32)),
          index(static_cast<int>(threadIdx.x % 32)),
          group(static_cast<int>(threadIdx.x % 32 / 4)),
          quad(static_cast<int>(threadIdx.x % 4)) {}
};

}  // namespace INTERSTATE_KERNELS

/// A power as the kernels of chunks multiply by it: where products have 8 bits, 11 are enough.
template <class T>
using Power = std::conditional_t<Form<T>::precision == device::Precision::bfloat, f16, float>;

/// What kernels share of a key/value head, for each of its panels of modes: powers Lam^n, n = 0 .. chunk, in float64 and as
/// Power (chunk + 1, modes); table[j] = Lam^(chunk - 1 - j) Bbar (chunk, 2 modes). And for each pair of panels mix,
/// conj(C^T C) or, for real_parts, C (modes, 2 modes).
template <class T>
struct Tables {
    using E = typename Form<T>::Element;
    complex<double>* powers64;
    complex<Power<T>>* powers;
    E *table, *mix;
    Tables(Arena& arena, const Shape& s, const Panels& panels)
        : powers64(arena.take<complex<double>>(s.kv_heads * panels.modes * power_size)),
          powers(arena.take<complex<Power<T>>>(s.kv_heads * panels.modes * power_size)),
          table(arena.take<E>(s.kv_heads * panels.modes * Sizes<T>::coefficients)),
          mix(arena.take<E>(s.kv_heads * panels.mix() * Sizes<T>::mix)) {}
    static constexpr Index power_size = (Sizes<T>::chunk + 1) * padded;
};

}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
