// Forward on tensor cores: blocks of queries, a warp 16 or 32 of them, against tiles of keys with the online softmax (eq. 13).
// The weights stay in registers: what the first product leaves is the left factor of the second.
#pragma once

#include <attention/detail/cuda_tiles.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

/// Sizes of a block for rows of `dim` columns: warps of m times 16 queries, which read tiles of keys. Two tiles of 16 rows
/// share what is read from shared memory; registers allow them up to 128 columns of 16 bits.
template <class T, int dim, int channels = 0>
struct ForwardForm {
    static constexpr bool narrow = sizeof(T) == 2;
    static constexpr int m = narrow && dim <= 128 ? 2 : 1, warps = 4, threads = 32 * warps, rows = 16 * m * warps;
    static constexpr int tile = narrow ? (dim == 64 || (dim == 128 && channels == 0) ? 64 : 32) : (dim <= 128 ? 32 : 16);
    static constexpr int blocks = narrow || dim <= 128 ? 2 : 1;  // a multiprocessor
    static constexpr std::size_t shared = sizeof(T) * (dim * (rows + 4 * tile) + channels * (rows + 2 * tile));
};

/// Takes tile scores in columns [first, first + 8 tiles) of keys for rows `position`, `position` + 8 of a lane out of what
/// they do not read.
template <int tiles>
__device__ void mask_scores(float (&s)[tiles][4], const Mask& mask, int position, int first, int keys, int quad) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        const int p = position + 8 * row, begin = mask.first_key(p) - first, end = mask.end_key(p, keys) - first;
#pragma unroll
        for (int t = 0; t < tiles; ++t)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int column = 8 * t + 2 * quad + e;
                if (column < begin || column >= end) s[t][2 * row + e] = -INFINITY;
            }
    }
}

/// What rounding to T takes from x.
template <class T>
__device__ float rounding_of(float x) {
    return x - device::load_as<float>(device::store_as<T>(x));
}

/// By how much, as a power of two, weights may exceed 1 before sums are scaled down.
inline constexpr float slack = 8.0f;

inline namespace INTERSTATE_KERNELS {

template <class T, int dim, bool softmax, class Policy>
__global__ __launch_bounds__(ForwardForm<T, dim, Policy::channels>::threads, ForwardForm<T, dim, Policy::channels>::blocks) void forward_kernel(
    const __grid_constant__ Call<T, Policy> call, const __grid_constant__ Tiling tiling, const View<T, 4> o, const View<float, 3> lse,
    const bool wide_o, const View<bf16, 4> rest) {
    constexpr int channels = Policy::channels;
    using Form = ForwardForm<T, dim, channels>;
    constexpr int m = Form::m, tile = Form::tile, tiles = tile / 8, threads = Form::threads;
    constexpr auto precision = precision_of<T>;
    extern __shared__ __align__(128) unsigned char memory[];
    using Keys = device::Swizzled<T, tile, dim>;
    const device::Swizzled<T, Form::rows, dim> q{reinterpret_cast<T*>(memory)};
    T* const stages = q.data + q.size;
    const auto keys = [&](int step) { return Keys{stages + step % 2 * 2 * Keys::size}; };
    const auto values = [&](int step) { return Keys{stages + (step % 2 * 2 + 1) * Keys::size}; };
    using ChannelRows = device::Swizzled<T, Form::rows, channels ? channels : dim>;
    using ChannelKeys = device::Swizzled<T, tile, channels ? channels : dim>;
    const ChannelRows channel_rows{stages + 4 * Keys::size};
    const auto channel_keys = [&](int step) { return ChannelKeys{channel_rows.data + ChannelRows::size + step % 2 * ChannelKeys::size}; };

    Place at;
    if (!find_place(at, call.shape, call.in.cu_seqlens, tiling, call.shape.queries, Form::rows, call.mask.causal, blockIdx.x)) return;
    const int thread = threadIdx.x, warp = thread / 32, lane_id = thread % 32;
    const Lane lane(lane_id);
    const int kv_head = at.head / static_cast<int>(call.shape.group());
    const int count = min(Form::rows, at.queries - at.first);
    const int position0 = at.first + at.offset();

    const int begin = call.mask.first_key(position0) / tile * tile;
    const int end = call.mask.end_key(position0 + count - 1, at.keys);
    const int steps = end > begin ? (end - begin + tile - 1) / tile : 0;
    // From the last tile to the first.
    const auto first_key = [&](int step) { return begin + (steps - 1 - step) * tile; };
    const auto fetch = [&](int step) {
        const int j = first_key(step), there = min(tile, at.keys - j);
        keys(step).template copy_in<threads>({call.in.k, at.batch, at.key0 + j, kv_head, there, call.wide_k}, thread);
        values(step).template copy_in<threads>({call.in.v, at.batch, at.key0 + j, kv_head, there, call.wide_v}, thread);
        if constexpr (channels > 0) channel_keys(step).template copy_in<threads>({call.policy.b, at.batch, at.key0 + j, kv_head, there, true}, thread);
    };
    q.template copy_in<threads>({call.in.q, at.batch, at.query0 + at.first, at.head, count, call.wide_q}, thread);
    if constexpr (channels > 0)
        channel_rows.template copy_in<threads>({call.policy.c, at.batch, at.query0 + at.first, at.head, count, true}, thread);
    if (steps > 0) fetch(0);
    device::wait_for_copies();
    __syncthreads();

    const Shared16<T, Form::rows, dim> queries(q, 16 * m * warp, lane_id);
    float sum[m][dim / 8][4], shift[m][2], total[m][2];
    clear(sum);
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            shift[i][row] = -INFINITY;
            total[i][row] = 0.0f;
        }
    // Scores as they leave the product are s / scale; the sign of the scale is put into them.
    const float c = fabsf(call.scale) * float(log2_e);
    Joints<channels> joints(call.policy, at, kv_head, at.first + 16 * m * warp, first_key(0));
    const float bias = !softmax ? call.bias(at.head) * float(log2_e) : 0.0f;

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            fetch(step + 1);
            if constexpr (channels > 0) joints.load_keys(first_key(step + 1));
        }
        const int j = first_key(step);
        const int low = position0 + 16 * m * warp, high = low + 16 * m - 1;
        if (j < call.mask.end_key(high, at.keys) && j + tile > call.mask.first_key(low)) {
            float s[m][tiles][4];
            clear(s);
            if constexpr (channels > 0)
                add_channels<precision>(s, Shared16<T, Form::rows, channels>(channel_rows, 16 * m * warp, lane_id), channel_keys(step).as_stored(), 0, joints, lane_id,
                                        [&](int i, int t, int e) { return make_int2(at.first + 16 * (m * warp + i) + lane.group + 8 * (e / 2), j + 8 * t + 2 * lane.quad + e % 2); });
            multiply_rows<precision, dim>(s, queries, keys(step).as_stored(), 0, 0, lane_id);
            if (call.scale < 0.0f)
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int t = 0; t < tiles; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e) s[i][t][e] = -s[i][t][e];
            const int position = low + lane.group;
            if constexpr (Policy::adds_term)
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int t = 0; t < tiles; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            s[i][t][e] += call.policy.score_term(at.head, position + 16 * i + 8 * (e / 2), j + 8 * t + 2 * lane.quad + e % 2) / fabsf(call.scale);
            if (j < call.mask.first_key(high) || j + tile > call.mask.end_key(low, at.keys))
#pragma unroll
                for (int i = 0; i < m; ++i) mask_scores(s[i], call.mask, position + 16 * i, j, at.keys, lane.quad);

            if constexpr (softmax) {
                float top[m][2];
                bool grows = false;
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int row = 0; row < 2; ++row) {
                        float x = fmaxf(s[i][0][2 * row], s[i][0][2 * row + 1]);
#pragma unroll
                        for (int t = 1; t < tiles; ++t) x = fmaxf(x, fmaxf(s[i][t][2 * row], s[i][t][2 * row + 1]));
                        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
                        x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
                        top[i][row] = x * c;
                        grows |= top[i][row] > shift[i][row] + slack;
                    }
                // Any shift near the largest score will do, so that sums are scaled down only when scores have grown.
                if (__any_sync(0xffffffffu, grows)) {
#pragma unroll
                    for (int i = 0; i < m; ++i)
#pragma unroll
                        for (int row = 0; row < 2; ++row) {
                            // Row by row, so that a row's bits do not depend on its neighbours.
                            if (!(top[i][row] > shift[i][row] + slack)) continue;
                            const float now = top[i][row], shrink = exp2_of(shift[i][row] - now);
                            shift[i][row] = now;
                            total[i][row] *= shrink;
#pragma unroll
                            for (int t = 0; t < dim / 8; ++t) {
                                sum[i][t][2 * row] *= shrink;
                                sum[i][t][2 * row + 1] *= shrink;
                            }
                        }
                }
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int row = 0; row < 2; ++row) {
                        const float minus = shift[i][row] == -INFINITY ? 0.0f : -shift[i][row];
                        float part = 0.0f;
#pragma unroll
                        for (int t = 0; t < tiles; ++t)
#pragma unroll
                            for (int e = 2 * row; e < 2 * row + 2; ++e) {
                                s[i][t][e] = exp2_of(fmaf(s[i][t][e], c, minus));
                                part += s[i][t][e];
                            }
                        total[i][row] += part;
                    }
            } else {
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int t = 0; t < tiles; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e) s[i][t][e] = sigmoid2(fmaf(s[i][t][e], c, bias));
            }
            multiply_rows<precision, tile>(sum, Rows16<precision, m, tile>(s), values(step).transposed(), 0, 0, lane_id);
        }
        if constexpr (channels > 0) joints.next();
        device::wait_for_copies();
        __syncthreads();
    }

#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float factor = 1.0f;
            const int r = 16 * (m * warp + i) + lane.group + 8 * row;
            if constexpr (softmax) {
                float l = total[i][row];
                l += __shfl_xor_sync(0xffffffffu, l, 1);
                l += __shfl_xor_sync(0xffffffffu, l, 2);
                factor = l == 0.0f ? 0.0f : 1.0f / l;
                if (lse && lane.quad == 0 && r < count)
                    lse(at.batch, at.query0 + at.first + r, at.head) = l == 0.0f ? -INFINITY : (shift[i][row] + log2f(l)) * float(ln_2);
            }
#pragma unroll
            for (int t = 0; t < dim / 8; ++t) {
                sum[i][t][2 * row] *= factor;
                sum[i][t][2 * row + 1] *= factor;
                device::put_pair(q.at(r, 8 * t + 2 * lane.quad), sum[i][t][2 * row], sum[i][t][2 * row + 1]);
            }
        }
    __syncthreads();
    q.template copy_out<threads>({o, at.batch, at.query0 + at.first, at.head, count, wide_o}, thread);
    if constexpr (sizeof(T) == 2)
        if (rest) {
            __syncthreads();
            const device::Swizzled<bf16, Form::rows, dim> taken{reinterpret_cast<bf16*>(q.data)};
#pragma unroll
            for (int i = 0; i < m; ++i)
#pragma unroll
                for (int e = 0; e < 4; e += 2)
#pragma unroll
                    for (int t = 0; t < dim / 8; ++t)
                        device::put_pair(taken.at(16 * (m * warp + i) + lane.group + 4 * e, 8 * t + 2 * lane.quad), rounding_of<T>(sum[i][t][e]),
                                         rounding_of<T>(sum[i][t][e + 1]));
            __syncthreads();
            taken.template copy_out<threads>({rest, at.batch, at.query0 + at.first, at.head, count, device::moves_wide(rest, rest.extent[3])}, thread);
        }
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
