// Linear attention forward on tensor cores: what spans of tokens add to the state, where there are few heads; then blocks that walk through a span
// of a head chunk by chunk, the state in registers (docs/ops/linear_attention.md, eq. 10).
#pragma once

#include <linear_attention/detail/cuda_chunks.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention::detail {

/// Where forward keeps what backward wants: the state that enters each segment, record after record, and w of each row, (B, L, Hq).
struct Kept {
    float *records, *weights;
    Kept(Arena& arena, const Options& options, const Shape& s, Index record)
        : records(arena.take<float>(span_count(s, segment) * s.kv_heads * record)),
          weights(arena.take<float>(options.divides() ? s.batch * s.length * s.query_heads : 0)) {}
};

inline namespace INTERSTATE_KERNELS {

/// What a span adds to S and z. The last one of a sequence adds to nothing.
template <class T, int dim>
__global__ __launch_bounds__(Block<T, dim>::threads, Block<T, dim>::blocks) void sum_kernel(const __grid_constant__ Call<T> call, int size, float* records) {
    using B = Block<T, dim>;
    extern __shared__ __align__(128) unsigned char memory[];
    const Index slot = blockIdx.x / call.shape.kv_heads;
    const int h = static_cast<int>(blockIdx.x % call.shape.kv_heads), thread = static_cast<int>(threadIdx.x);
    const Span span(call.shape, call.in.cu_seqlens, slot, size);
    if (!span.exists || span.last) return;
    const auto tile = [&](int i) { return typename B::Tile{reinterpret_cast<typename B::E*>(memory) + i * B::Tile::size}; };
    const int chunks = (span.count + B::chunk - 1) / B::chunk;
    const auto rows = [&](int n) { return min(B::chunk, span.count - n * B::chunk); };
    const auto fetch = [&](int n) {
        const Index row = span.row + n * B::chunk;
        tile(n % 2 * 2).template copy_in<B::threads>(device::Rows<const T>(call.in.k, span.batch, row, h, rows(n), call.wide_k), thread);
        tile(n % 2 * 2 + 1).template copy_in<B::threads>(device::Rows<const T>(call.in.v, span.batch, row, h, rows(n), call.wide_v), thread);
    };
    StateRows<T, dim> state;
    state.clear();
    // One turn ahead, so that the code of a fetch is there once.
#pragma unroll 1
    for (int n = -1; n < chunks; ++n) {
        device::wait_for_copies();
        __syncthreads();
        if (n + 1 < chunks) fetch(n + 1);
        if (n < 0) continue;
        state.thread = device::kept(thread);
        if (call.elu1) {
            map_features<T, dim>(tile(n % 2 * 2), rows(n), call.shape.head_dim, thread);
            __syncthreads();
        }
        add_outer<T, dim>(state, tile(n % 2 * 2), tile(n % 2 * 2 + 1), thread % 32);
        if (call.divides) add_sum<T, dim>(state, tile(n % 2 * 2), nullptr, thread % 32);
    }
    state.store(records + (slot * call.shape.kv_heads + h) * B::record);
}

/// The rows of a span, chunk by chunk, and the queries of a key/value head, head by head. `entry`: the states that enter the spans; null: those of
/// the call. `kept` has no records where backward will not follow.
template <class T, int dim>
__global__ __launch_bounds__(Block<T, dim>::threads, Block<T, dim>::blocks) void forward_kernel(const __grid_constant__ Call<T> call, int size, const float* entry,
                                                                         const __grid_constant__ Outputs<T> out, bool wide_o, float* kept_records, float* kept_weights) {
    using B = Block<T, dim>;
    constexpr int chunk = B::chunk, threads = B::threads, keys = 32, tiles = B::columns / 8;
    extern __shared__ __align__(128) unsigned char memory[];
    const Shape& shape = call.shape;
    const Index slot = blockIdx.x / shape.kv_heads;
    const int h = static_cast<int>(blockIdx.x % shape.kv_heads), thread = static_cast<int>(threadIdx.x);
    const Span span(shape, call.in.cu_seqlens, slot, size);
    if (!span.exists) return;
    const int group = static_cast<int>(shape.group());
    auto* const data = reinterpret_cast<typename B::E*>(memory);
    const auto tile = [&](int i) { return typename B::Tile{data + i * B::Tile::size}; };
    const auto q_tile = [&](int step) { return tile(step % 2); };
    const auto k_tile = [&](int n) { return tile(2 + n % 2); };
    const auto v_tile = [&](int n) { return tile(4 + n % 2); };
    const StateMatrix<T, dim> matrix{data + 6 * B::Tile::size, reinterpret_cast<float*>(data + 6 * B::Tile::size + B::parts * B::Matrix::size)};
    const int chunks = (span.count + chunk - 1) / chunk, steps = chunks * group;
    const auto rows = [&](int n) { return min(chunk, span.count - n * chunk); };
    const auto fetch = [&](int step, int thread) {
        const int n = step / group, g = step % group;
        const Index row = span.row + n * chunk;
        q_tile(step).template copy_in<threads>(device::Rows<const T>(call.in.q, span.batch, row, h * group + g, rows(n), call.wide_q), thread);
        if (g > 0) return;
        k_tile(n).template copy_in<threads>(device::Rows<const T>(call.in.k, span.batch, row, h, rows(n), call.wide_k), thread);
        v_tile(n).template copy_in<threads>(device::Rows<const T>(call.in.v, span.batch, row, h, rows(n), call.wide_v), thread);
    };
    StateRows<T, dim> state;
    // A record of the call's states has room where tiles will be.
    auto* const own = reinterpret_cast<float*>(memory);
    static_assert(sizeof(float) * B::record <= sizeof(typename B::E) * 6 * B::Tile::size);
    const bool enters = entry && span.count > 0;
    if (!enters) {
        fill_record<T, dim>(own, call.in.s0, call.in.z0, span.sequence, h, thread);
        __syncthreads();
    }
    state.load(enters ? entry + (slot * shape.kv_heads + h) * B::record : own);
    matrix.put(state);

#pragma unroll 1
    for (int step = -1; step < steps; ++step) {
        const int thread = device::kept(static_cast<int>(threadIdx.x));
        device::wait_for_copies();
        __syncthreads();
        if (step + 1 < steps) fetch(step + 1, thread);
        if (step < 0) continue;
        const int lane_id = thread % 32;
        const device::Lane lane(lane_id);
        state.thread = thread;
        const int row0 = thread / 32 % B::row_groups * 16, column0 = thread / 32 / B::row_groups * B::columns;
        const int n = step / group, g = step % group;
        const auto q = q_tile(step), k = k_tile(n), v = v_tile(n);
        if (call.elu1) {
            map_features<T, dim>(q, rows(n), shape.head_dim, thread);
            if (g == 0) map_features<T, dim>(k, rows(n), shape.head_dim, thread);
            __syncthreads();
        }
        const device::Shared16<typename B::E, chunk, dim> queries(q, row0, lane_id);
        float o[1][tiles][4], weight[2] = {};
        device::clear(o);
#pragma unroll 1
        for (int j = 0; j < row0 + 16; j += keys) {
            float s[1][keys / 8][4];
            device::clear(s);
            device::multiply_rows<B::precision, dim>(s, queries, k.as_stored(), j, 0, lane_id);
            const bool all_read = j + keys <= row0;
#pragma unroll
            for (int t = 0; t < keys / 8; ++t)
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (!all_read && j + 8 * t + 2 * lane.quad + e % 2 > row0 + lane.group + e / 2 * 8) s[0][t][e] = 0.0f;
                    weight[e / 2] += s[0][t][e];
                    s[0][t][e] = device::rounded<B::precision>(s[0][t][e]);
                }
            device::multiply_rows<B::precision, keys>(o, device::Rows16<B::precision, 1, keys>(s), v.transposed(), column0, j, lane_id);
        }
        matrix.template multiply<false>(o, queries, column0, lane_id);
        if (call.divides) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                weight[i] += __shfl_xor_sync(0xffffffffu, weight[i], 1);
                weight[i] += __shfl_xor_sync(0xffffffffu, weight[i], 2);
            }
            multiply_column<T, dim>(weight, queries, matrix.z, lane_id);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int r = row0 + lane.group + 8 * i;
                if (kept_weights && column0 == 0 && lane.quad == 0 && r < rows(n))
                    kept_weights[(span.batch * shape.length + span.row + n * chunk + r) * shape.query_heads + h * group + g] = weight[i];
                // In two steps: the reciprocal of a small float is none.
                const float up = fabsf(weight[i]) < 0x1p-60f ? 0x1p80f : 1.0f, over = weight[i] == 0.0f ? 0.0f : 1.0f / (weight[i] * up);
#pragma unroll
                for (int t = 0; t < tiles; ++t)
#pragma unroll
                    for (int e = 0; e < 2; ++e) o[0][t][2 * i + e] = o[0][t][2 * i + e] * up * over;
            }
        }
        const bool advances = g + 1 == group && (n + 1 < chunks || !span.last || out.sT || out.zT);
        if (kept_records && g == 0 && (n * chunk) % segment == 0) {
            // Spans begin where segments do.
            const Index first = shape.packed() ? device::first_tile(call.in.cu_seqlens, span.sequence, shape.length, segment) : span.sequence * ceil_div(shape.length, segment);
            state.store(kept_records + ((first + (static_cast<Index>(span.index) * size + n * chunk) / segment) * shape.kv_heads + h) * B::record);
        }
        if (advances) {
            add_outer<T, dim>(state, k, v, lane_id);
            if (call.divides) add_sum<T, dim>(state, k, nullptr, lane_id);
        }
        __syncthreads();
        if (advances) matrix.put(state);
        take_out<T, dim>(o[0], q, row0, column0, device::Rows<T>(out.o, span.batch, span.row + n * chunk, h * group + g, rows(n), wide_o), lane_id);
    }
    if (!span.last || !(out.sT || out.zT)) return;
    __syncthreads();
    state.store(own);
    __syncthreads();
    take_record<T, dim>(own, out.sT, out.zT, span.sequence, h, thread);
}

/// Blocks that a forward wants beside each other, and rows of a head that one walks through: a multiple of the segment.
inline constexpr Index wanted_blocks = 112;
inline Index span_size(const Shape& s) {
    const Index heads = std::max<Index>(s.states() * s.kv_heads, 1);
    const Index longest = ceil_div(std::max<Index>(s.length, 1), segment) * segment;
    if (!s.packed() && heads >= wanted_blocks) return longest;
    const Index rows = s.packed() ? s.length * s.kv_heads / (2 * wanted_blocks) : ceil_div(s.length * heads, 2 * wanted_blocks);
    return std::clamp<Index>(ceil_div(rows, segment) * segment, segment, longest);
}

/// The states that enter spans: none where each sequence is one span.
inline Index span_records(const Shape& s) {
    const Index size = span_size(s);
    return size >= s.length ? 0 : span_count(s, size) * s.kv_heads;
}

template <class T, int dim>
Status run_forward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved saved, Workspace ws) {
    using B = Block<T, dim>;
    const auto call = call_of(options, in);
    const Shape& s = call.shape;
    const auto size = static_cast<int>(span_size(s));
    const Index blocks = span_count(s, size) * s.kv_heads;
    float* records = nullptr;
    if (span_records(s) > 0) {
        Arena arena(ws.data);
        records = arena.take<float>(span_records(s) * B::record);
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "linear_attention.cuda sums", sum_kernel<T, dim>, {dim3(static_cast<unsigned>(blocks)), dim3(B::threads), B::sum_shared}, call, size, records));
        INTERSTATE_RETURN_IF_ERROR(scan_records<dim>(exec, s, in.cu_seqlens, size, false, records, in.s0, in.z0, {}, {}));
    }
    float *kept_records = nullptr, *kept_weights = nullptr;
    if (saved.data) {
        Arena arena(saved.data);
        const Kept kept(arena, options, s, B::record);
        kept_records = kept.records;
        if (options.divides()) kept_weights = kept.weights;
    }
    return launch(exec, "linear_attention.cuda forward", forward_kernel<T, dim>, {dim3(static_cast<unsigned>(blocks)), dim3(B::threads), B::forward_shared}, call, size,
                  static_cast<const float*>(records), out, device::moves_wide(out.o, s.value_dim), kept_records, kept_weights);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace linear_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
