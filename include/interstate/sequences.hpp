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

}  // namespace interstate::inline INTERSTATE_ABI
