// cu_seqlens on the device: kept in bounds by every kernel, checked and reported by one.
#pragma once

#include <interstate/cuda/launch.cuh>
#include <interstate/dispatch.hpp>
#include <interstate/sequences.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

/// Rows of sequence i, clamped into [0, length]; that offsets are wrong is for check_offsets to say.
__device__ inline RowRange checked_rows(const View<const std::int32_t, 1>& cu, Index i, Index length) {
    if (!cu) return {0, length};
    const Index begin = cu(i), end = cu(i + 1);
    if (begin >= 0 && begin <= end && end <= length) return {begin, end};
    const Index b = begin < 0 ? 0 : begin > length ? length : begin;
    return {b, end < b ? b : end > length ? length : end};
}

/// Tiles of the length axis, numbered so that every sequence starts a new one: that of the first tile of recurrence i. Packed,
/// some numbers stay unused; offsets are kept in bounds as by checked_rows.
INTERSTATE_HD inline Index first_tile(const View<const std::int32_t, 1>& cu, Index i, Index length, Index tile) {
    if (!cu) return i * ceil_div(length, tile);
    const Index begin = cu(i) < 0 ? 0 : cu(i) > length ? length : cu(i);
    return begin / tile + i;
}

/// The recurrence whose tile has number `slot`: the last one that starts at or before it.
__device__ inline Index recurrence_of(const View<const std::int32_t, 1>& cu, Index recurrences, Index length, Index slot, Index tile) {
    if (!cu) return slot / ceil_div(length, tile);
    Index low = 0, high = recurrences;
    while (high - low > 1) {
        const Index middle = (low + high) / 2;
        (first_tile(cu, middle, length, tile) <= slot ? low : high) = middle;
    }
    return low;
}

}  // namespace device

inline namespace INTERSTATE_KERNELS {
/// Sets the rows of x, (1, L, H) or (1, L, H, D), that belong to no packed sequence to zero. One block a row.
template <class T, int Rank>
__global__ void zero_outside_sequences_kernel(View<T, Rank> x, View<const std::int32_t, 1> cu) {
    static_assert(Rank == 3 || Rank == 4, "interstate: rows are (H) or (H, D)");
    const Index t = blockIdx.x;
    if (t >= cu(0) && t < cu(cu.extent[0] - 1)) return;
    if constexpr (Rank == 3)
        for (Index h = threadIdx.x; h < x.extent[2]; h += blockDim.x) x(0, t, h) = T(0.0f);
    else
        for (Index h = 0; h < x.extent[2]; ++h)
            for (Index c = threadIdx.x; c < x.extent[3]; c += blockDim.x) x(0, t, h, c) = T(0.0f);
}

/// The same as a call; nothing to do without cu_seqlens or for a null or empty x.
template <class T, int Rank>
Status zero_outside(const cuda& exec, const View<T, Rank>& x, const View<const std::int32_t, 1>& cu) {
    if (!cu || !x || x.size() == 0) return {};
    return launch(exec, "zero_outside_sequences_kernel", zero_outside_sequences_kernel<T, Rank>,
                  {dim3(static_cast<unsigned>(x.extent[1])), dim3(128)}, x, cu);
}

/// Sets flag_bad_cu_seqlens where an offset is below the one before it, or leaves [0, length] (an integer OR: the
/// order of threads does not matter).
template <class Offset>
__global__ void check_offsets_kernel(View<const Offset, 1> cu, Index length, std::uint32_t* flags) {
    const Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= cu.extent[0]) return;
    if (cu(i) < (i > 0 ? cu(i - 1) : 0) || cu(i) > length) atomicOr(flags, flag_bad_cu_seqlens);
}

/// The same as a call, once for every forward and backward: their kernels only keep cu_seqlens in bounds.
inline Status check_offsets(const cuda& exec, const View<const std::int32_t, 1>& cu, Index length) {
    if (!cu || !exec.flags) return {};
    return launch(exec, "check_offsets_kernel", check_offsets_kernel<std::int32_t>,
                  {dim3(static_cast<unsigned>((cu.extent[0] + 255) / 256)), dim3(256)}, cu, length, exec.flags);
}
}  // namespace INTERSTATE_KERNELS

}  // namespace interstate::inline INTERSTATE_ABI
