// Packed sequences: cu_seqlens as every operator and executor reads it.
#pragma once

#include <interstate/view.hpp>

namespace interstate::inline INTERSTATE_ABI {

/// Rows [begin, end) of one sequence on the packed length axis.
struct RowRange {
    Index begin;
    Index end;
};

/// Host check: S+1 offsets, non-decreasing, inside [0, length]. Absent offsets are right.
inline Status check_cu_seqlens(const View<const std::int32_t, 1>& cu, Index length) {
    if (!cu) return {};
    for (Index s = 0; s < cu.extent[0]; ++s) {
        const Index at = cu(s);
        const Index low = s == 0 ? 0 : cu(s - 1);
        if (at < low || at > length)
            return Status::error(StatusCode::invalid_argument,
                                 "cu_seqlens: element %lld is %lld, must be at least %lld and at most %lld",
                                 static_cast<long long>(s), static_cast<long long>(at), static_cast<long long>(low),
                                 static_cast<long long>(length));
    }
    return {};
}

/// Rows of sequence s: the packed range, or batch row s of a dense tensor, [0, length).
INTERSTATE_HD constexpr RowRange rows_of(const View<const std::int32_t, 1>& cu, Index s, Index length) {
    if (!cu) return {0, length};
    return {cu(s), cu(s + 1)};
}

/// Sets the rows that belong to no packed sequence to zero, on the host: x (1, L, H) or (1, L, H, D), may be null.
template <class T, int Rank>
void zero_outside_sequences(const View<T, Rank>& x, const View<const std::int32_t, 1>& cu) {
    static_assert(Rank == 3 || Rank == 4, "interstate: rows are (H) or (H, D)");
    if (!cu || !x) return;
    for (Index t = 0; t < x.extent[1]; ++t) {
        if (t >= cu(0) && t < cu(cu.extent[0] - 1)) continue;
        for (Index h = 0; h < x.extent[2]; ++h)
            if constexpr (Rank == 3)
                x(0, t, h) = T(0.0f);
            else
                for (Index c = 0; c < x.extent[3]; ++c) x(0, t, h, c) = T(0.0f);
    }
}

}  // namespace interstate::inline INTERSTATE_ABI
