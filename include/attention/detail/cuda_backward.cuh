// Backward on tensor cores, in two kernels that form the scores each for itself: blocks of queries against tiles of keys for
// dq, blocks of keys against tiles of queries for dk and dv. That is 7 products where 5 would do, but weights and score
// gradients never leave registers, nothing is added by several blocks, and no array of sums is needed: the same bits always.
#pragma once

#include <attention/detail/cuda_statistics.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

/// dq: blocks of queries, as forward, against tiles of keys, of which `part` at once are in products.
template <class T, int dim, int channels = 0>
struct QueryForm {
    static constexpr bool narrow = sizeof(T) == 2;
    static constexpr int m = narrow && dim == 64 && channels <= 16 ? 2 : 1, warps = 4, threads = 32 * warps, rows = 16 * m * warps;
    static constexpr int tile = narrow ? (dim <= 128 ? 64 : 16) : (dim == 64 ? 32 : 16), part = channels > 16 && tile > 32 ? 32 : tile;
    static constexpr int blocks = (narrow && dim <= 128) || dim == 64 ? 2 : 1;  // a multiprocessor
    static constexpr std::size_t shared =
        sizeof(T) * (dim * (2 * rows + 4 * tile) + channels * (rows + 2 * tile));
};

/// dk and dv: blocks of keys, which are rows, against tiles of queries, which are columns. Registers have room for the sums of
/// 256 columns of dk and dv together; where there are more, `shares` blocks have a share each and form all scores.
template <class T, int dim, int channels = 0>
struct KeyForm {
    static constexpr bool narrow = sizeof(T) == 2;
    static constexpr int m = narrow && dim == 64 && channels <= 16 ? 2 : 1, warps = 4, threads = 32 * warps, rows = 16 * m * warps;
    static constexpr int tile = narrow ? (dim == 64 ? 64 : dim == 128 ? 32 : 16) : (dim == 64 ? 32 : 16), part = narrow && dim <= 128 ? 32 : 16;
    static constexpr int shares = narrow ? (dim == 256 ? 2 : 1) : dim / 64, share = dim / shares;
    static constexpr int blocks = (narrow && dim <= 128) || dim == 64 ? 2 : 1;  // a multiprocessor
    static constexpr std::size_t shared = sizeof(T) * (dim * (2 * rows + 4 * tile) + channels * (rows + 2 * tile)) +
                                          2 * tile * sizeof(RowStatistics<float>);
};

/// What score gradients are multiplied by before they are rounded to float16, which has a narrow range: a power of two that
/// takes the largest that can be, 2 |dout| |v| + |dlse|, to 2^15. Weights are multiplied by 2^12, for the sake of small ones.
inline constexpr float half_weights = 4096.0f;
struct HalfRange {
    std::uint32_t dout2, value2, dlse2;  // the largest squares of norms of rows of dout and of v, and of dlse, as bits
};
__device__ inline float half_gradients(const HalfRange& range) {
    const auto root = [](std::uint32_t square) { return sqrtf(__uint_as_float(square)); };
    const float bound = 2.0f * root(range.dout2) * root(range.value2) + root(range.dlse2);
    if (!(bound > 0.0f && bound < INFINITY)) return 1.0f;
    return exp2f(fminf(fmaxf(floorf(15.0f - log2f(bound)), -100.0f), 100.0f));
}

template <class T>
struct BackwardCall {
    View<const T, 4> dout;
    const RowStatistics<float>* statistics;  // (B, Hq, Lq)
    const HalfRange* range;                  // float16 only
    bool wide_dout;
};

/// Weight and score gradient of a score without scale and its dp (eq. 2 and 9, or 3 and 10).
template <bool softmax>
__device__ void weigh(float& s, float& dp, float c, float lse2, float minus) {
    if constexpr (softmax) {
        s = exp2_of(fmaf(s, c, lse2));
        dp = s * (dp - minus);
    } else {
        s = sigmoid2(fmaf(s, c, lse2));
        dp = s * (1.0f - s) * dp;
    }
}

inline namespace INTERSTATE_KERNELS {

/// The largest square of the norm of a row of x, into `to`, which is zero before: as bits, whose order is that of the numbers,
/// so that an integer maximum does. Rows outside packed sequences do not count.
template <class T>
__global__ __launch_bounds__(256) void largest_norm_kernel(View<const T, 4> x, View<const std::int32_t, 1> cu, std::uint32_t* to) {
    const Index rows = x.extent[1], heads = x.extent[2];
    float largest = 0.0f;
    for (Index row = static_cast<Index>(blockIdx.x) * 32 + threadIdx.x / 8; row < x.extent[0] * rows * heads; row += static_cast<Index>(gridDim.x) * 32) {
        const Index h = row % heads, i = row / heads % rows, b = row / heads / rows;
        float sum = 0.0f;
        if (!cu || (i >= cu(0) && i < cu(cu.extent[0] - 1)))
            for (Index d = threadIdx.x % 8; d < x.extent[3]; d += 8) {
                const auto value = device::load_as<float>(x(b, i, h, d));
                sum = fmaf(value, value, sum);
            }
        // Of the 8 lanes of a row, which all run to the end of it.
        const unsigned team = 0xffu << (threadIdx.x % 32 / 8 * 8);
        for (int step = 4; step > 0; step /= 2) sum += __shfl_xor_sync(team, sum, step);
        largest = fmaxf(largest, sum);
    }
    for (int step = 16; step > 0; step /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    if (threadIdx.x % 32 == 0) atomicMax(to, __float_as_uint(largest));
}

template <class T, int dim, bool softmax, class Policy>
__global__ __launch_bounds__(QueryForm<T, dim, Policy::channels>::threads, QueryForm<T, dim, Policy::channels>::blocks) void query_gradient_kernel(
    const __grid_constant__ Call<T, Policy> call, const __grid_constant__ BackwardCall<T> up, const __grid_constant__ Tiling tiling,
    const View<T, 4> dq, const bool wide_dq) {
    constexpr int channels = Policy::channels;
    using Form = QueryForm<T, dim, channels>;
    constexpr int m = Form::m, tile = Form::tile, part = Form::part, tiles = part / 8, threads = Form::threads;
    constexpr auto precision = precision_of<T>;
    constexpr bool is_half = std::is_same_v<T, f16>;
    extern __shared__ __align__(128) unsigned char memory[];
    using Own = device::Swizzled<T, Form::rows, dim>;
    using Keys = device::Swizzled<T, tile, dim>;
    const Own q{reinterpret_cast<T*>(memory)}, dout{q.data + Own::size};
    T* const stages = dout.data + Own::size;
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
    const auto first_key = [&](int step) { return begin + (steps - 1 - step) * tile; };
    const auto fetch = [&](int step) {
        const int j = first_key(step), there = min(tile, at.keys - j);
        keys(step).template copy_in<threads>({call.in.k, at.batch, at.key0 + j, kv_head, there, call.wide_k}, thread);
        values(step).template copy_in<threads>({call.in.v, at.batch, at.key0 + j, kv_head, there, call.wide_v}, thread);
        if constexpr (channels > 0) channel_keys(step).template copy_in<threads>({call.policy.b, at.batch, at.key0 + j, kv_head, there, true}, thread);
    };
    q.template copy_in<threads>({call.in.q, at.batch, at.query0 + at.first, at.head, count, call.wide_q}, thread);
    dout.template copy_in<threads>({up.dout, at.batch, at.query0 + at.first, at.head, count, up.wide_dout}, thread);
    if constexpr (channels > 0)
        channel_rows.template copy_in<threads>({call.policy.c, at.batch, at.query0 + at.first, at.head, count, true}, thread);
    if (steps > 0) fetch(0);

    float lse2[m][2], minus[m][2];
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int r = 16 * (m * warp + i) + lane.group + 8 * row;
            lse2[i][row] = !softmax ? call.bias(at.head) * float(log2_e) : -INFINITY;
            minus[i][row] = 0.0f;
            if (softmax && r < count) {
                const RowStatistics<float> x = up.statistics[(at.batch * call.shape.query_heads + at.head) * call.shape.queries + at.query0 + at.first + r];
                lse2[i][row] = x.lse2;
                minus[i][row] = x.minus;
            }
        }
    device::wait_for_copies();
    __syncthreads();

    const Shared16<T, Form::rows, dim> queries(q, 16 * m * warp, lane_id);
    const Shared16<T, Form::rows, dim> douts(dout, 16 * m * warp, lane_id);
    float sum[m][dim / 8][4], sum_c[m][channels ? channels / 8 : 1][4];
    clear(sum);
    clear(sum_c);
    const float c = call.scale * float(log2_e), larger = is_half ? half_gradients(*up.range) : 1.0f, scale = call.scale / larger;
    Joints<channels> joints(call.policy, at, kv_head, at.first + 16 * m * warp, first_key(0));

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            fetch(step + 1);
            if constexpr (channels > 0) joints.load_keys(first_key(step + 1));
        }
#pragma unroll 1
        for (int n = 0; n < tile; n += part) {
            const int j = first_key(step) + n, low = position0 + 16 * m * warp, high = low + 16 * m - 1;
            if (j >= call.mask.end_key(high, at.keys) || j + part <= call.mask.first_key(low)) continue;
            float s[m][tiles][4], dp[m][tiles][4];
            clear(s);
            clear(dp);
            const int position = low + lane.group;
            const auto pair = [&](int i, int t, int e) { return make_int2(at.first + 16 * (m * warp + i) + lane.group + 8 * (e / 2), j + 8 * t + 2 * lane.quad + e % 2); };
            if constexpr (channels > 0)
                add_channels<precision>(s, Shared16<T, Form::rows, channels>(channel_rows, 16 * m * warp, lane_id), channel_keys(step).as_stored(), n, joints, lane_id, pair);
            multiply_rows<precision, dim>(s, queries, keys(step).as_stored(), n, 0, lane_id);
            multiply_rows<precision, dim>(dp, douts, values(step).as_stored(), n, 0, lane_id);
            if constexpr (Policy::adds_term)
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int t = 0; t < tiles; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            s[i][t][e] += call.policy.score_term(at.head, position + 16 * i + 8 * (e / 2), j + 8 * t + 2 * lane.quad + e % 2) / call.scale;
            const bool masked = j < call.mask.first_key(high) || j + part > call.mask.end_key(low, at.keys);
#pragma unroll
            for (int i = 0; i < m; ++i) {
#pragma unroll
                for (int t = 0; t < tiles; ++t)
#pragma unroll
                    for (int e = 0; e < 4; ++e) weigh<softmax>(s[i][t][e], dp[i][t][e], c, lse2[i][e / 2], minus[i][e / 2]);
                if (masked)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int p = position + 16 * i + 8 * (e / 2), first = call.mask.first_key(p) - j, last = call.mask.end_key(p, at.keys) - j;
#pragma unroll
                        for (int t = 0; t < tiles; ++t) {
                            const int column = 8 * t + 2 * lane.quad + e % 2;
                            if (column < first || column >= last) dp[i][t][e] = 0.0f;
                        }
                    }
            }
            if constexpr (is_half)
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int t = 0; t < tiles; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e) dp[i][t][e] *= larger;
            multiply_rows<precision, part>(sum, Rows16<precision, m, part>(dp), keys(step).transposed(), 0, n, lane_id);
            if constexpr (channels > 0) add_channel_gradients<precision, channels, part>(sum_c, dp, channel_keys(step).transposed(), n, joints, lane_id, pair);
        }
        if constexpr (channels > 0) joints.next();
        device::wait_for_copies();
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
#pragma unroll
            for (int t = 0; t < dim / 8; ++t)
                device::put_pair(q.at(16 * (m * warp + i) + lane.group + 4 * e, 8 * t + 2 * lane.quad), sum[i][t][e] * scale,
                                 sum[i][t][e + 1] * scale);
    __syncthreads();
    if (dq) q.template copy_out<threads>({dq, at.batch, at.query0 + at.first, at.head, count, wide_dq}, thread);
    if constexpr (channels > 0)
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int r = 16 * (m * warp + i) + lane.group + 4 * e;
                if (r >= count) continue;
#pragma unroll
                for (int t = 0; t < channels / 8; ++t)
                    *reinterpret_cast<float2*>(&call.policy.dc(at.batch, at.query0 + at.first + r, at.head, 8 * t + 2 * lane.quad)) =
                        make_float2(sum_c[i][t][e] / larger, sum_c[i][t][e + 1] / larger);
            }
}

template <class T, int dim, bool softmax, class Policy>
__global__ __launch_bounds__(KeyForm<T, dim, Policy::channels>::threads, KeyForm<T, dim, Policy::channels>::blocks) void key_gradient_kernel(
    const __grid_constant__ Call<T, Policy> call, const __grid_constant__ BackwardCall<T> up, const __grid_constant__ Tiling tiling,
    const View<T, 4> dk, const View<T, 4> dv, const bool wide_dk, const bool wide_dv) {
    constexpr int channels = Policy::channels;
    using Form = KeyForm<T, dim, channels>;
    constexpr int m = Form::m, tile = Form::tile, part = Form::part, tiles = part / 8, threads = Form::threads;
    constexpr auto precision = precision_of<T>;
    constexpr bool is_half = std::is_same_v<T, f16>;
    extern __shared__ __align__(128) unsigned char memory[];
    using Own = device::Swizzled<T, Form::rows, dim>;
    using Queries = device::Swizzled<T, tile, dim>;
    const Own k{reinterpret_cast<T*>(memory)}, v{k.data + Own::size};
    T* const stages = v.data + Own::size;
    const auto queries = [&](int step) { return Queries{stages + step % 2 * 2 * Queries::size}; };
    const auto douts = [&](int step) { return Queries{stages + (step % 2 * 2 + 1) * Queries::size}; };
    using ChannelRows = device::Swizzled<T, Form::rows, channels ? channels : dim>;
    using ChannelQueries = device::Swizzled<T, tile, channels ? channels : dim>;
    const ChannelRows channel_rows{stages + 4 * Queries::size};
    const auto channel_queries = [&](int step) { return ChannelQueries{channel_rows.data + ChannelRows::size + step % 2 * ChannelQueries::size}; };
    auto* const statistics = reinterpret_cast<RowStatistics<float>*>(stages + 4 * Queries::size + channels * (Form::rows + 2 * tile));

    Place at;
    if (!find_place(at, call.shape, call.in.cu_seqlens, tiling, call.shape.keys, Form::rows, false, blockIdx.x / Form::shares)) return;
    const int column0 = static_cast<int>(blockIdx.x % Form::shares) * Form::share;
    const int thread = threadIdx.x, warp = thread / 32, lane_id = thread % 32;
    const Lane lane(lane_id);
    const int group = static_cast<int>(call.shape.group()), offset = at.offset();
    const int count = min(Form::rows, at.keys - at.first);
    // Queries that read any of the keys, counted from the sequence's first query.
    const int begin = max(call.mask.first_position(at.first) - offset, 0) / tile * tile;
    const int end = min(call.mask.end_position(at.first + count - 1, at.keys) - offset, at.queries);
    const int steps = end > begin ? (end - begin + tile - 1) / tile * group : 0;
    // Where a step's queries begin, head by head.
    const auto after = [&](int2 x) { return x.x + tile < end ? make_int2(x.x + tile, x.y) : make_int2(begin, x.y + 1); };
    int2 now = make_int2(begin, at.head * group);
    const auto fetch = [&](int step, int i, int head) {
        const int there = min(tile, at.queries - i);
        queries(step).template copy_in<threads>({call.in.q, at.batch, at.query0 + i, head, there, call.wide_q}, thread);
        douts(step).template copy_in<threads>({up.dout, at.batch, at.query0 + i, head, there, up.wide_dout}, thread);
        if constexpr (channels > 0) channel_queries(step).template copy_in<threads>({call.policy.c, at.batch, at.query0 + i, head, there, true}, thread);
        if (thread < tile) {
            RowStatistics<float>* const to = statistics + step % 2 * tile + thread;
            if (softmax && thread < there)
                device::copy_async<8>(to, up.statistics + (at.batch * call.shape.query_heads + head) * call.shape.queries + at.query0 + i + thread);
            else
                *to = {!softmax ? call.bias(head) * float(log2_e) : -INFINITY, 0.0f};
        }
    };
    k.template copy_in<threads>({call.in.k, at.batch, at.key0 + at.first, at.head, count, call.wide_k}, thread);
    v.template copy_in<threads>({call.in.v, at.batch, at.key0 + at.first, at.head, count, call.wide_v}, thread);
    if constexpr (channels > 0)
        channel_rows.template copy_in<threads>({call.policy.b, at.batch, at.key0 + at.first, at.head, count, true}, thread);
    if (steps > 0) fetch(0, now.x, now.y);
    Joints<channels> joints(call.policy, at, at.head, begin, at.first + 16 * m * warp);
    device::wait_for_copies();
    __syncthreads();

    const Shared16<T, Form::rows, dim> keys(k, 16 * m * warp, lane_id);
    const Shared16<T, Form::rows, dim> values(v, 16 * m * warp, lane_id);
    float sum_k[m][Form::share / 8][4], sum_v[m][Form::share / 8][4];
    float sum_b[m][channels ? channels / 8 : 1][4];
    clear(sum_k);
    clear(sum_v);
    clear(sum_b);
    const float c = call.scale * float(log2_e), larger = is_half ? half_gradients(*up.range) : 1.0f;
    const float scale_k = call.scale / larger, scale_v = is_half ? 1.0f / half_weights : 1.0f;

#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
            fetch(step + 1, after(now).x, after(now).y);
            if constexpr (channels > 0) joints.load_queries(after(now).x);
        }
        const int i0 = now.x;
#pragma unroll 1
        for (int n = 0; n < tile; n += part) {
            // Queries i0 + n .. of these columns, keys first_key .. of the warp's rows.
            const int first = i0 + n + offset, low = at.first + 16 * m * warp, high = low + 16 * m - 1;
            if (first + part <= call.mask.first_position(low) || first >= call.mask.end_position(high, at.keys) || low >= at.keys) continue;
            float s[m][tiles][4], dp[m][tiles][4];
            clear(s);
            clear(dp);
            const auto pair = [&](int i, int t, int e) { return make_int2(i0 + n + 8 * t + 2 * lane.quad + e % 2, low + 16 * i + lane.group + 8 * (e / 2)); };
            if constexpr (channels > 0)
                add_channels<precision>(s, Shared16<T, Form::rows, channels>(channel_rows, 16 * m * warp, lane_id), channel_queries(step).as_stored(), n, joints, lane_id, pair);
            multiply_rows<precision, dim>(s, keys, queries(step).as_stored(), n, 0, lane_id);
            multiply_rows<precision, dim>(dp, values, douts(step).as_stored(), n, 0, lane_id);
            if constexpr (Policy::adds_term)
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int t = 0; t < tiles; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e)
                            s[i][t][e] += call.policy.score_term(now.y, first + 8 * t + 2 * lane.quad + e % 2,
                                                          low + 16 * i + lane.group + 8 * (e / 2)) / call.scale;
            const bool masked = first < call.mask.first_position(high) || first + part > call.mask.end_position(low, at.keys) || i0 + n + part > at.queries;
#pragma unroll
            for (int t = 0; t < tiles; ++t) {
                const float4 x = *reinterpret_cast<const float4*>(statistics + step % 2 * tile + n + 8 * t + 2 * lane.quad);
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) weigh<softmax>(s[i][t][e], dp[i][t][e], c, e % 2 == 0 ? x.x : x.z, e % 2 == 0 ? x.y : x.w);
            }
            if (masked)
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int key = low + 16 * i + lane.group + 8 * (e / 2);
                        const int from = call.mask.first_position(key) - first, to = min(call.mask.end_position(key, at.keys), at.queries + offset) - first;
#pragma unroll
                        for (int t = 0; t < tiles; ++t) {
                            const int column = 8 * t + 2 * lane.quad + e % 2;
                            if (column < from || column >= to) s[i][t][e] = dp[i][t][e] = 0.0f;
                        }
                    }
            if constexpr (is_half)
#pragma unroll
                for (int i = 0; i < m; ++i)
#pragma unroll
                    for (int t = 0; t < tiles; ++t)
#pragma unroll
                        for (int e = 0; e < 4; ++e) {
                            s[i][t][e] *= half_weights;
                            dp[i][t][e] *= larger;
                        }
            multiply_rows<precision, part>(sum_v, Rows16<precision, m, part>(s), douts(step).transposed(), column0, n, lane_id);
            multiply_rows<precision, part>(sum_k, Rows16<precision, m, part>(dp), queries(step).transposed(), column0, n, lane_id);
            if constexpr (channels > 0) add_channel_gradients<precision, channels, part>(sum_b, dp, channel_queries(step).transposed(), n, joints, lane_id, pair);
        }
        if constexpr (channels > 0) joints.next();
        now = after(now);
        device::wait_for_copies();
        __syncthreads();
    }
    const device::Swizzled<T, Form::rows, Form::share> dk_tile{k.data}, dv_tile{v.data};
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
#pragma unroll
            for (int t = 0; t < Form::share / 8; ++t) {
                const int r = 16 * (m * warp + i) + lane.group + 4 * e, column = 8 * t + 2 * lane.quad;
                device::put_pair(dk_tile.at(r, column), sum_k[i][t][e] * scale_k, sum_k[i][t][e + 1] * scale_k);
                device::put_pair(dv_tile.at(r, column), sum_v[i][t][e] * scale_v, sum_v[i][t][e + 1] * scale_v);
            }
    __syncthreads();
    if (dk) dk_tile.template copy_out<threads>({dk, at.batch, at.key0 + at.first, at.head, count, wide_dk, column0}, thread);
    if (dv) dv_tile.template copy_out<threads>({dv, at.batch, at.key0 + at.first, at.head, count, wide_dv, column0}, thread);
    if constexpr (channels > 0) {
        if (column0 > 0) return;  // every share has all of it
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
                const int r = 16 * (m * warp + i) + lane.group + 4 * e;
                if (r >= count) continue;
#pragma unroll
                for (int t = 0; t < channels / 8; ++t)
                    *reinterpret_cast<float2*>(&call.policy.db(at.batch, at.key0 + at.first + r, at.head, 8 * t + 2 * lane.quad)) =
                        make_float2(sum_b[i][t][e] * scale_k, sum_b[i][t][e + 1] * scale_k);
            }
    }
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
