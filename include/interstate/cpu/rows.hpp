// Rows of one head of a tensor as tiles in the accumulator's dtype, padded to whole vectors, and products of such tiles: what kernels
// that work chunk by chunk are made of. The storage dtype is known to LoadRows and StoreRows alone.
#pragma once

#include <interstate/cpu/gemm.hpp>
#include <interstate/dispatch.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace simd {

inline constexpr Index pad = 16;  // lanes of the widest vector

constexpr Index padded(Index n) { return ceil_div(n, pad) * pad; }

/// Rows of `columns` elements, widened, and zeros up to `ld_used` columns and `padded_rows` rows.
template <class T>
struct LoadRows {
    using A = acc_t<T>;
    template <class Set>
    static INTERSTATE_INLINE void run(const T* src, Index row_stride, Index step, Index rows, Index columns, A* dst,
                                      Index ld, Index ld_used, Index padded_rows) {
        using V = Native<Set, A>;
        const Index whole = step == 1 ? columns / V::lanes * V::lanes : 0;
        for (Index r = 0; r < rows; ++r) {
            const T* from = src + r * row_stride;
            A* to = dst + r * ld;
            for (Index c = 0; c < whole; c += V::lanes) store(to + c, load_as<V>(from + c));
            for (Index c = whole; c < columns; ++c) to[c] = static_cast<A>(from[c * step]);
            for (Index c = columns; c < ld_used; ++c) to[c] = A(0);
        }
        for (Index r = rows; r < padded_rows; ++r)
            for (Index c = 0; c < ld_used; ++c) dst[r * ld + c] = A(0);
    }
};
template <class T>
struct StoreRows {
    using A = acc_t<T>;
    template <class Set>
    static INTERSTATE_INLINE void run(const A* src, Index ld, T* dst, Index row_stride, Index step, Index rows,
                                      Index columns) {
        using V = Native<Set, A>;
        const Index whole = step == 1 ? columns / V::lanes * V::lanes : 0;
        for (Index r = 0; r < rows; ++r) {
            const A* from = src + r * ld;
            T* to = dst + r * row_stride;
            for (Index c = 0; c < whole; c += V::lanes) store_as(to + c, load<V>(from + c));
            for (Index c = whole; c < columns; ++c) to[c * step] = T(from[c]);
        }
    }
};

/// An operand of a product: element (r, c) is at[r * row + c * col].
template <class A>
struct Operand {
    const A* at;
    Index row;
    Index col = 1;
};

template <class A>
struct Products {
    Isa isa;

    /// c (M, N) = or += a (M, K) b (K, N), b and c in rows.
    template <Terms terms = Terms::all>
    void operator()(Operand<A> a, const A* b, Index ldb, A* c, Index ldc, Index M, Index N, Index K, bool add) const {
        using G = Gemm<A, terms>;
        run_body<G>(isa, typename G::Args{a.at, a.row, a.col, b, ldb, c, ldc, M, N, K, add});
    }
    void transpose(const A* from, Index ld_from, Index rows, Index columns, A* to, Index ld_to, A scale = A(1)) const {
        run_body<Transpose<A>>(isa, from, ld_from, rows, columns, to, ld_to, scale);
    }
};

/// Rows [first, first + count) of head h into `to`, zeros up to whole vectors of columns and of rows.
template <class T, class X>
void load_rows(Isa isa, const View<X, 4>& x, Index b, Index first, Index h, Index count, acc_t<T>* to, Index ld) {
    const Index columns = x.extent[3];
    if (columns > 0)
        run_body<LoadRows<T>>(isa, static_cast<const T*>(&x(b, first, h, 0)), x.stride[1], x.stride[3], count, columns, to, ld,
                              padded(columns), padded(count));
}
template <class T>
void store_rows(Isa isa, const acc_t<T>* from, Index ld, const View<T, 4>& x, Index b, Index first, Index h, Index count) {
    if (x && x.extent[3] > 0)
        run_body<StoreRows<T>>(isa, from, ld, &x(b, first, h, 0), x.stride[1], x.stride[3], count, x.extent[3]);
}

/// Bytes of a layout, whose first argument is an Arena.
template <class Layout, class... Args>
std::size_t layout_size(const Args&... args) {
    Arena arena;
    Layout(arena, args...);
    return arena.required();
}

}  // namespace simd
}  // namespace interstate::inline INTERSTATE_ABI
