// Matrices in shared memory with rows of up to 128 bytes, as factors of products (cuda/matrix.cuh) and on their way from and
// to tensors. Rows are read from and written to memory by whole cache lines, which asks the second-level cache for as little as
// can be; blocks of 8 x 8 (cuda/matrix.cuh) ask four times as often.
//
// A matrix lies in panels of columns, 64 of 16 bits or 32 of 32 bits; one that is narrower is one panel of 64 or 32 bytes. The
// chunks of 16 bytes of a row are exchanged, chunk c to c ^ x(row), so that a column of chunks is in eight different banks too.
// What a warp loads is then free of conflicts (but for columns of floats in narrow panels).
#pragma once

#include <interstate/cuda/rows.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

template <class E>
inline constexpr int chunk_columns = 16 / static_cast<int>(sizeof(E));
/// Of a matrix of `columns` columns.
template <class E, int columns>
inline constexpr int panel_columns = columns * static_cast<int>(sizeof(E)) < 128 ? columns : 128 / static_cast<int>(sizeof(E));

/// What chunks of a row are exchanged by. In floats a quarter of a warp reads two chunks each of rows 0 1 2 3 or of 0 2 4 6.
template <class E, int panel>
__host__ __device__ constexpr int exchanged(int row) {
    constexpr int bytes = panel * static_cast<int>(sizeof(E)), rows = 128 / bytes;  // rows of a line of banks
    static_assert(bytes == 32 || bytes == 64 || bytes == 128);
    if constexpr (sizeof(E) == 2) return row / rows % (bytes / 16);
    if constexpr (bytes == 128) return 2 * ((row % 4) ^ (row / 4 % 2));
    return bytes == 64 ? 2 * (row / 2 % 2) : 0;
}

/// Where element (r, c) of a matrix is.
template <class E, int rows, int columns>
__host__ __device__ constexpr int swizzled(int r, int c) {
    constexpr int panel = panel_columns<E, columns>, chunk = chunk_columns<E>;
    return c / panel * (rows * panel) + r * panel + ((c % panel / chunk) ^ exchanged<E, panel>(r)) * chunk + c % chunk;
}

/// A swizzled matrix as a factor of products, as Operand is for a blocked one.
template <class E, int rows, int panel, Read read>
struct SwizzledOperand {
    using Element = E;
    static constexpr bool is_transposed = read == Read::transposed;
    const E* data;
};

/// A lane's way to the factors of a product. Offsets are constants once loops are unrolled: those of rows are added, those of
/// columns inside a panel are exclusive-ors.
template <class E, int rows, int panel, Read read, bool as_a>
class SwizzledLoader {
    static constexpr bool is_transposed = read == Read::transposed, wide = sizeof(E) == 4;
    static constexpr unsigned row_bytes = panel * sizeof(E);

  public:
    /// `outer` and `k` are multiples of 8; what counts columns is one of the columns that will be loaded from there on, up to a panel.
    __device__ SwizzledLoader(const SwizzledOperand<E, rows, panel, read>& from, int outer, int k, int lane) {
        int row = is_transposed ? k : outer, chunk = 0;
        if constexpr (wide) {
            row += is_transposed ? lane % 4 * 2 : lane / 4;
            chunk = is_transposed ? lane / 16 : lane % 4 / 2;
        } else {
            // Lane i has the address of line i % 8 of the i / 8-th of four blocks: of a, the second is 8 rows of the matrix
            // on and the third 8 of what is summed over; of b the other way round.
            const int first = lane / 8 % 2, second = lane / 16, next_outer = as_a ? first : second, next_k = as_a ? second : first;
            row += (is_transposed ? next_k : next_outer) * 8 + lane % 8;
            chunk = is_transposed ? next_outer : next_k;
        }
        const int column = is_transposed ? outer : k;
        chunk += column % panel / chunk_columns<E>;
        const auto start = static_cast<unsigned>(__cvta_generic_to_shared(from.data)) + static_cast<unsigned>(column / panel * rows + row) * row_bytes;
        at_ = start + static_cast<unsigned>(chunk ^ exchanged<E, panel>(row)) * 16;
        if constexpr (wide) {
            const int inside = is_transposed ? lane / 4 % 4 : lane % 2 * 2;
            at_ += static_cast<unsigned>(inside) * 4;
            if constexpr (is_transposed) next_ = start + row_bytes + static_cast<unsigned>((chunk ^ exchanged<E, panel>(row + 1)) * 16 + inside * 4);
        }
    }
    template <Precision precision>
    __device__ void load(Factors<float, precision, 2>& f, int outer, int k) const {
        static_assert(as_a);
        if constexpr (wide) {
            const float2 x = pair(outer, k), y = pair(outer + 8, k);
            f.set(0, 0, x.x, x.y);
            f.set(1, 0, y.x, y.y);
        } else {
            load_matrices<is_transposed>(f.word, moved(at_, outer, k));
        }
    }
    template <Precision precision>
    __device__ void load(Factors<float, precision, 1> (&f)[2], int outer, int k) const {
        static_assert(!as_a);
        if constexpr (wide) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float2 x = pair(outer + 8 * i, k);
                f[i].set(0, 0, x.x, x.y);
            }
        } else {
            std::uint32_t x[4];
            load_matrices<is_transposed>(x, moved(at_, outer, k));
#pragma unroll
            for (int i = 0; i < 4; ++i) f[i / 2].word[i % 2] = x[i];
        }
    }

  private:
    __device__ static unsigned moved(unsigned at, int outer, int k) {
        const int row = is_transposed ? k : outer, column = is_transposed ? outer : k;
        return (at ^ static_cast<unsigned>(column % panel / chunk_columns<E> * 16)) +
               static_cast<unsigned>(column / panel * rows + row) * row_bytes;
    }
    __device__ float2 pair(int outer, int k) const {
        float2 x;
        if constexpr (is_transposed) {
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x.x) : "r"(moved(at_, outer, k)) : "memory");
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x.y) : "r"(moved(next_, outer, k)) : "memory");
        } else {
            asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(moved(at_, outer, k)) : "memory");
        }
        return x;
    }
    unsigned at_, next_ = 0;
};

/// Rows row .. row + 7 and row + 8 .. row + 15 of `a`, from k on.
template <class E, int rows, int panel, Read read>
__device__ SwizzledLoader<E, rows, panel, read, true> rows_of(const SwizzledOperand<E, rows, panel, read>& a, int row, int k, int lane) {
    return {a, row, k, lane};
}
/// Columns n .. n + 7 and n + 8 .. n + 15 of `b`.
template <class E, int rows, int panel, Read read>
__device__ SwizzledLoader<E, rows, panel, read, false> columns_of(const SwizzledOperand<E, rows, panel, read>& b, int n, int k, int lane) {
    return {b, n, k, lane};
}

/// A matrix of rows of a tensor in shared memory.
template <class E, int rows, int columns>
struct Swizzled {
    static constexpr int panel = panel_columns<E, columns>;
    static_assert(columns % panel == 0);
    static constexpr int size = rows * columns;  // elements
    E* data;
    __device__ SwizzledOperand<E, rows, panel, Read::as_stored> as_stored() const { return {data}; }
    __device__ SwizzledOperand<E, rows, panel, Read::transposed> transposed() const { return {data}; }
    __device__ E* at(int r, int c) const { return data + swizzled<E, rows, columns>(r, c); }

    /// Starts copies of the rows, zeros behind them; wide rows fly until wait_for_copies. By `threads` threads, neighbours of
    /// which have the chunks of a row of a panel.
    template <int threads>
    __device__ void copy_in(const Rows<const E>& from, int thread) const {
        constexpr int V = chunk_columns<E>, step = threads / (panel / V);
        static_assert(threads % (panel / V) == 0 && step % 8 == 0);
        if (from.wide) {
            const int row = thread / (panel / V), first = thread % (panel / V) * V;
            const E* source = from.data + row * from.stride + first;
            const Index next = step * from.stride;
            E* const to = at(row, first);
#pragma unroll
            for (int i = 0; i < (rows + step - 1) / step; ++i, source += next) {
                if (rows % step != 0 && row + i * step >= rows) break;
#pragma unroll
                for (int column = 0; column < columns; column += panel)
                    copy_async_16(to + i * step * panel + column * rows, source + column, first + column < from.width && row + i * step < from.count);
            }
        } else {
#pragma unroll 1
            for (int e = thread; e < rows * columns; e += threads) {
                const int row = e / columns, column = e % columns;
                *at(row, column) = row < from.count && column < from.width ? from.data[row * from.stride + column * from.column_stride] : E(0.0f);
            }
        }
    }
    /// The same of another dtype, which is converted on the way: complete when it returns.
    template <int threads, class T>
    __device__ void copy_in(const Rows<const T>& from, int thread) const {
        constexpr int V = chunk_columns<T>;
        if (from.wide) {
#pragma unroll 4
            for (int unit = thread; unit < rows * columns / V; unit += threads) {
                const int row = unit / (columns / V), column = unit % (columns / V) * V;
                Wide<T> x{};
                if (row < from.count && column < from.width) x = load_wide(from.data + row * from.stride + column);
#pragma unroll
                for (int e = 0; e < V; e += 2) put_pair(at(row, column + e), load_as<float>(x.x[e]), load_as<float>(x.x[e + 1]));
            }
        } else {
#pragma unroll 1
            for (int e = thread; e < rows * columns; e += threads) {
                const int row = e / columns, column = e % columns;
                const bool there = row < from.count && column < from.width;
                *at(row, column) = there ? load_as<E>(from.data[row * from.stride + column * from.column_stride]) : E(0.0f);
            }
        }
    }
    /// Takes rows out.
    template <int threads>
    __device__ void copy_out(const Rows<E>& to, int thread) const {
        constexpr int V = chunk_columns<E>, step = threads / (panel / V);
        if (to.wide) {
            for (int row = thread / (panel / V); row < min(rows, to.count); row += step)
#pragma unroll
                for (int column = thread % (panel / V) * V; column < columns; column += panel)
                    if (column < to.width)
                        *reinterpret_cast<int4*>(to.data + row * to.stride + column) = *reinterpret_cast<const int4*>(at(row, column));
        } else {
#pragma unroll 1
            for (int e = thread; e < rows * columns; e += threads) {
                const int row = e / columns, column = e % columns;
                if (row < to.count && column < to.width) to.data[row * to.stride + column * to.column_stride] = *at(row, column);
            }
        }
    }
    /// Takes some rows and columns out, by a warp, as any dtype.
    template <int some_rows, int some_columns, class T>
    __device__ void copy_part_out(const Rows<T>& to, int row0, int column0, int lane) const {
        constexpr int V = chunk_columns<T>;
        static_assert(some_columns % V == 0);
        if (to.wide) {
#pragma unroll
            for (int unit = lane; unit < some_rows * (some_columns / V); unit += 32) {
                const int row = row0 + unit / (some_columns / V), column = column0 + unit % (some_columns / V) * V;
                if (row >= to.count || column >= to.width) continue;
                Wide<T> x;
                if constexpr (std::is_same_v<T, E>) {
                    x = load_wide(at(row, column));
                } else {
#pragma unroll
                    for (int e = 0; e < V; e += 2) {
                        const float2 pair = get_pair(at(row, column + e));
                        x.x[e] = store_as<T>(pair.x);
                        x.x[e + 1] = store_as<T>(pair.y);
                    }
                }
                *reinterpret_cast<int4*>(to.data + row * to.stride + column) = __builtin_bit_cast(int4, x);
            }
        } else {
#pragma unroll 1
            for (int e = lane; e < some_rows * some_columns; e += 32) {
                const int row = row0 + e / some_columns, column = column0 + e % some_columns;
                if (row < to.count && column < to.width) to.data[row * to.stride + column * to.column_stride] = store_as<T>(load_as<float>(*at(row, column)));
            }
        }
    }
};

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
