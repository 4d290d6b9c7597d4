// Rows of a tensor, tokens of one head, on their way to and from a blocked matrix in shared memory (cuda/matrix.cuh).
#pragma once

#include <interstate/cuda/matrix.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

/// 16 bytes of T, moved at once.
template <class T>
struct alignas(16) Wide {
    T x[16 / sizeof(T)];
};
template <class T>
__device__ Wide<T> load_wide(const T* from) {
    return __builtin_bit_cast(Wide<T>, *reinterpret_cast<const int4*>(from));
}

/// May rows of `width` elements of x (batch, token, head, column) be moved 16 bytes at once?
template <class T>
__host__ __device__ bool moves_wide(const View<T, 4>& x, Index width) {
    constexpr Index V = 16 / sizeof(T);
    if (!x.data || width % V != 0 || x.stride[3] != 1 || reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0) return false;
    for (int axis = 0; axis < 3; ++axis)
        // Of tokens in any case: addresses of rows behind the last one are formed, though nothing is read there.
        if ((axis == 1 || x.extent[axis] > 1) && x.stride[axis] % V != 0) return false;
    return true;
}

/// `count` rows of one head, from `row` on.
template <class T>
struct Rows {
    T* data;
    Index stride, column_stride;
    int count, width;
    bool wide;
    /// Their columns from `column` on, a multiple of 8.
    __device__ Rows(const View<T, 4>& x, Index batch, Index row, Index head, int count_, bool wide_, int column = 0)
        : data(x.data + batch * x.stride[0] + row * x.stride[1] + head * x.stride[2] + column * x.stride[3]),
          stride(x.stride[1]),
          column_stride(x.stride[3]),
          count(count_),
          width(static_cast<int>(x.extent[3]) - column),
          wide(wide_) {}
};

/// What a thread moves of a blocked matrix, V elements at once: every `row_step`-th row from `row` on, at `column`. The
/// elements of unit i begin at (thread + i threads) V.
template <int columns, int threads, int V>
struct Units {
    static constexpr int of_eight_rows = 8 * columns / V, row_step = threads / of_eight_rows * 8;
    static_assert(threads % of_eight_rows == 0);
    int row, column;
    __device__ explicit Units(int thread)
        : row(thread / of_eight_rows * 8 + thread * V / 8 % 8), column(thread * V / 64 % (columns / 8) * 8 + thread * V % 8) {}
};

/// Brings rows into a blocked matrix, row i to row i + shift, zeros elsewhere. Wide rows of T = E fly until
/// wait_for_copies. `ones`: behind the last column comes one of ones. By `threads` threads.
template <int rows, int columns, int threads, bool ones = false, class T, class E>
__device__ void copy_in(E* to, const Rows<const T>& from, int shift, int thread) {
    constexpr int V = 16 / static_cast<int>(sizeof(T));
    if (from.wide) {
        using U = Units<columns, threads, V>;
        const U unit(thread);
        const bool there = unit.column < from.width;
        const T* source = from.data + (unit.row - shift) * from.stride + unit.column;
        const Index step = U::row_step * from.stride;
#pragma unroll
        for (int i = 0; i < (rows + U::row_step - 1) / U::row_step; ++i, source += step) {
            const int row = unit.row + i * U::row_step;
            if (rows % U::row_step != 0 && row >= rows) break;
            const bool inside = there && row >= shift && row - shift < from.count;
            E* const place = to + (thread + i * threads) * V;
            if constexpr (ones)
                if (unit.column == from.width) {
#pragma unroll
                    for (int e = 0; e < V; e += 2) put_pair(place + e, e == 0 && row >= shift && row - shift < from.count ? 1.0f : 0.0f, 0.0f);
                    continue;
                }
            if constexpr (std::is_same_v<T, E>) {
                copy_async_16(place, source, inside);
            } else {
                Wide<T> x{};
                if (inside) x = load_wide(source);
#pragma unroll
                for (int e = 0; e < V; e += 2) put_pair(place + e, load_as<float>(x.x[e]), load_as<float>(x.x[e + 1]));
            }
        }
    } else {
#pragma unroll 1
        for (int e = thread; e < rows * columns; e += threads) {
            const int row = e / (8 * columns) * 8 + e / 8 % 8 - shift, column = e / 64 % (columns / 8) * 8 + e % 8;
            T x = T(0.0f);
            if (row >= 0 && row < from.count && column < from.width) x = from.data[row * from.stride + column * from.column_stride];
            if constexpr (ones)
                if (row >= 0 && row < from.count && column == from.width) x = T(1.0f);
            to[e] = store_as<E>(load_as<float>(x));
        }
    }
}

/// Takes rows shift .. shift + count out of a blocked matrix.
template <int rows, int columns, int threads, class T, class E>
__device__ void copy_out(const E* from, const Rows<T>& to, int shift, int thread) {
    constexpr int V = 16 / static_cast<int>(sizeof(T));
    if (to.wide) {
        using U = Units<columns, threads, V>;
        const U unit(thread);
        const bool there = unit.column < to.width;
        T* place = to.data + (unit.row - shift) * to.stride + unit.column;
        const Index step = U::row_step * to.stride;
#pragma unroll
        for (int i = 0; i < (rows + U::row_step - 1) / U::row_step; ++i, place += step) {
            const int row = unit.row + i * U::row_step;
            if (!there || row >= rows || row < shift || row - shift >= to.count) continue;
            const E* const source = from + (thread + i * threads) * V;
            Wide<T> x;
            if constexpr (std::is_same_v<T, E>) {
                x = load_wide(source);
            } else {
#pragma unroll
                for (int e = 0; e < V; e += 2) {
                    const float2 pair = get_pair(source + e);
                    x.x[e] = store_as<T>(pair.x);
                    x.x[e + 1] = store_as<T>(pair.y);
                }
            }
            *reinterpret_cast<int4*>(place) = __builtin_bit_cast(int4, x);
        }
    } else {
#pragma unroll 1
        for (int e = thread; e < rows * columns; e += threads) {
            const int row = e / (8 * columns) * 8 + e / 8 % 8 - shift, column = e / 64 % (columns / 8) * 8 + e % 8;
            if (row >= 0 && row < to.count && column < to.width)
                to.data[row * to.stride + column * to.column_stride] = store_as<T>(load_as<float>(from[e]));
        }
    }
}

/// f(to, from) for a thread's share of `count` elements, units of 16 bytes.
template <int count, int threads, class E, class Function>
__device__ void each_unit(E* to, const E* from, int thread, Function&& f) {
    constexpr int V = 16 / static_cast<int>(sizeof(E)), units = count / V;
    static_assert(count % V == 0);
    to += thread * V;
    from += thread * V;
#pragma unroll
    for (int i = 0; i < (units + threads - 1) / threads; ++i)
        if (units % threads == 0 || thread + i * threads < units) f(to + i * threads * V, from + i * threads * V);
}
/// Starts a copy of `count` elements, whole units of 16 bytes, as they lie.
template <int count, int threads, class E>
__device__ void copy_matrix(E* to, const E* from, int thread) {
    each_unit<count, threads>(to, from, thread, [](E* a, const E* b) { copy_async_16(a, b, true); });
}
/// The same out to memory.
template <int count, int threads, class E>
__device__ void store_matrix(E* to, const E* from, int thread) {
    each_unit<count, threads>(to, from, thread, [](E* a, const E* b) { *reinterpret_cast<int4*>(a) = *reinterpret_cast<const int4*>(b); });
}

/// Starts a copy of columns first ... first + columns - 1 of a blocked matrix of `all` columns.
template <int rows, int columns, int all, int threads, class E>
__device__ void copy_columns(E* to, const E* from, int first, int thread) {
    constexpr int V = 16 / static_cast<int>(sizeof(E)), of_eight_rows = 8 * columns / V, units = rows / 8 * of_eight_rows;
    from += first * 8;
#pragma unroll
    for (int i = 0; i < (units + threads - 1) / threads; ++i) {
        const int unit = thread + i * threads;
        if (units % threads == 0 || unit < units)
            copy_async_16(to + unit * V, from + unit / of_eight_rows * (8 * all) + unit % of_eight_rows * V, true);
    }
}

/// Asks for a matrix before it is copied.
template <int count, int threads, class E>
__device__ void prefetch_matrix(const E* from, int thread) {
    constexpr int line = 128 / static_cast<int>(sizeof(E)), lines = (count + line - 1) / line;
#pragma unroll
    for (int i = 0; i < (lines + threads - 1) / threads; ++i)
        if (lines % threads == 0 || thread + i * threads < lines) prefetch(from + (thread + i * threads) * line);
}

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
