// Rows as every executor walks them: all tokens of a batch on one axis, cut into sequences.
#pragma once

#include <feature_map/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map::detail {

/// A row's sequence: its state, and its rows [begin, end). `index` is -1 for a row of none.
struct Sequence {
    Index index, begin, end;
};

/// The sequence that holds row n of [0, B L). cu_seqlens that are not sorted give some answer that holds n, or none.
INTERSTATE_HD inline Sequence sequence_of(const View<const std::int32_t, 1>& cu, const Shape& s, Index n) {
    if (!s.packed()) {
        const Index b = static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(s.length);  // both are below 2^31
        return {b, b * s.length, (b + 1) * s.length};
    }
    // The first sequence that ends beyond n; empty ones before it end at n or earlier.
    Index low = 0, high = s.sequences;
    while (low < high) {
        const Index middle = (low + high) / 2;
        if (cu(middle + 1) > n)
            high = middle;
        else
            low = middle + 1;
    }
    if (low == s.sequences || cu(low) > n || cu(low) < 0 || cu(low + 1) > s.length) return {-1, 0, 0};
    return {low, cu(low), cu(low + 1)};
}

/// Row n of a tensor (B, L, H, R).
template <class T>
INTERSTATE_HD T* row(const View<T, 4>& x, Index n) {
    const Index b = n / x.extent[1];
    return x.data + b * x.stride[0] + (n - b * x.extent[1]) * x.stride[1];
}

}  // namespace feature_map::detail
}  // namespace interstate::inline INTERSTATE_ABI
