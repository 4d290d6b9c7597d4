// Linear attention backward on tensor cores (docs/ops/linear_attention.md, eq. 11 to 13): blocks walk through a segment of a head forwards for dq, from
// the state that forward kept, and sum what the segment adds to the adjoint; then backwards for dk and dv.
#pragma once

#include <linear_attention/detail/cuda_forward.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention::detail {

/// What backward carves out of its workspace: adjoints of segments, and dw of each row, (B, L, Hq).
struct Adjoints {
    float *records, *dw;
    Adjoints(Arena& arena, const Options& options, const Shape& s, Index record)
        : records(arena.take<float>(span_count(s, segment) * s.kv_heads * record)),
          dw(arena.take<float>(options.divides() ? s.batch * s.length * s.query_heads : 0)) {}
};

inline namespace INTERSTATE_KERNELS {

/// dq and dw of a segment's rows, and what they add to R and r.
template <class T, int dim>
__global__ __launch_bounds__(Block<T, dim>::threads, Block<T, dim>::blocks) void query_gradient_kernel(const __grid_constant__ Call<T> call, const View<const T, 4> dout, bool wide_do,
                                                                                const float* entry, const float* weights, const View<T, 4> dq, bool wide_dq,
                                                                                float* sums, float* dw_rows) {
    using B = Block<T, dim>;
    constexpr int chunk = B::chunk, threads = B::threads, keys = 32, tiles = B::columns / 8;
    extern __shared__ __align__(128) unsigned char memory[];
    const Shape& shape = call.shape;
    const Index slot = blockIdx.x / shape.kv_heads;
    const int h = static_cast<int>(blockIdx.x % shape.kv_heads), thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane_id = thread % 32;
    const Span span(shape, call.in.cu_seqlens, slot, segment);
    if (!span.exists || span.count == 0) return;
    const device::Lane lane(lane_id);
    const int group = static_cast<int>(shape.group());
    auto* const data = reinterpret_cast<typename B::E*>(memory);
    const auto tile = [&](int i) { return typename B::Tile{data + i * B::Tile::size}; };
    const auto q_tile = [&](int step) { return tile(step % 2); };
    const auto e_tile = [&](int step) { return tile(2 + step % 2); };
    const auto k_tile = [&](int n) { return tile(4 + n % 2); };
    const auto v_tile = [&](int n) { return tile(6 + n % 2); };
    const StateMatrix<T, dim> matrix{data + 8 * B::Tile::size};
    auto* const z = reinterpret_cast<float*>(matrix.data + B::parts * B::Matrix::size);
    float *const inverse = z + dim, *const dw = inverse + chunk, *const dots = dw + chunk;

    const int chunks = (span.count + chunk - 1) / chunk, steps = chunks * group;
    const auto rows = [&](int n) { return min(chunk, span.count - n * chunk); };
    const auto fetch = [&](int step) {
        const int n = step / group, head = h * group + step % group;
        const Index row = span.row + n * chunk;
        q_tile(step).template copy_in<threads>(device::Rows<const T>(call.in.q, span.batch, row, head, rows(n), call.wide_q), thread);
        e_tile(step).template copy_in<threads>(device::Rows<const T>(dout, span.batch, row, head, rows(n), wide_do), thread);
        if (step % group > 0) return;
        k_tile(n).template copy_in<threads>(device::Rows<const T>(call.in.k, span.batch, row, h, rows(n), call.wide_k), thread);
        v_tile(n).template copy_in<threads>(device::Rows<const T>(call.in.v, span.batch, row, h, rows(n), call.wide_v), thread);
    };
    StateRows<T, dim> state, adjoint;
    adjoint.clear();
    state.load(entry + (slot * shape.kv_heads + h) * B::record);
    const auto put_state = [&] {
        matrix.put(state);
        if (call.divides && state.column(0) == 0) {
            z[state.row(0)] = state.z[0];
            z[state.row(2)] = state.z[1];
        }
    };
    put_state();

    const int column_group = warp / B::row_groups, row0 = warp % B::row_groups * 16, column0 = column_group * B::columns;
#pragma unroll 1
    for (int step = -1; step < steps; ++step) {
        device::wait_for_copies();
        __syncthreads();
        if (step + 1 < steps) fetch(step + 1);
        if (step < 0) continue;
        const int n = step / group, g = step % group, head = h * group + g;
        const auto q = q_tile(step), e = e_tile(step), k = k_tile(n), v = v_tile(n);
        const auto row_at = [&](int r) { return (span.batch * shape.length + span.row + n * chunk + r) * shape.query_heads + head; };
        if (call.divides)
            for (int r = thread; r < chunk; r += threads) {
                const float w = r < rows(n) ? weights[row_at(r)] : 0.0f;
                inverse[r] = w == 0.0f ? 0.0f : 1.0f / w;
            }
        if (call.elu1) {
            map_features<T, dim>(q, rows(n), shape.head_dim, thread);
            if (g == 0) map_features<T, dim>(k, rows(n), shape.head_dim, thread);
        }
        if (call.elu1 || call.divides) __syncthreads();

        // G, of do before it is divided.
        float dx[1][tiles][4];
        device::clear(dx);
        const device::Shared16<typename B::E, chunk, dim> upstream(e, row0, lane_id);
#pragma unroll 1
        for (int j = 0; j < row0 + 16; j += keys) {
            float s[1][keys / 8][4];
            device::clear(s);
            device::multiply_rows<B::precision, dim>(s, upstream, v.as_stored(), j, 0, lane_id);
#pragma unroll
            for (int t = 0; t < keys / 8; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const bool reads = j + 8 * t + 2 * lane.quad + i % 2 <= row0 + lane.group + i / 2 * 8;
                    s[0][t][i] = reads ? device::rounded<B::precision>(s[0][t][i]) : 0.0f;
                }
            device::multiply_rows<B::precision, keys>(dx, device::Rows16<B::precision, 1, keys>(s), k.transposed(), column0, j, lane_id);
        }
        matrix.template multiply<true>(dx, upstream, column0, lane_id);
        if (call.divides) {
            // w o.e = phi(q).G, and with it dw; then z of each row, whose share of this chunk is a product with ones.
            float dot[2] = {};
#pragma unroll
            for (int i = 0; i < 4; i += 2)
#pragma unroll
                for (int t = 0; t < tiles; ++t) {
                    const float2 x = device::get_pair(q.at(row0 + lane.group + i / 2 * 8, column0 + 8 * t + 2 * lane.quad));
                    dot[i / 2] = fmaf(x.x, dx[0][t][i], fmaf(x.y, dx[0][t][i + 1], dot[i / 2]));
                }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                dot[i] += __shfl_xor_sync(0xffffffffu, dot[i], 1);
                dot[i] += __shfl_xor_sync(0xffffffffu, dot[i], 2);
                if (B::column_groups > 1 && lane.quad == 0) dots[column_group * chunk + row0 + lane.group + 8 * i] = dot[i];
            }
            if constexpr (B::column_groups > 1) {
                __syncthreads();
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    dot[i] = 0.0f;
#pragma unroll
                    for (int c = 0; c < B::column_groups; ++c) dot[i] += dots[c * chunk + row0 + lane.group + 8 * i];
                }
            }
            float along[1][tiles][4];
            device::clear(along);
#pragma unroll 1
            for (int j = 0; j < row0 + 16; j += keys) {
                float s[1][keys / 8][4];
#pragma unroll
                for (int t = 0; t < keys / 8; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) s[0][t][i] = j + 8 * t + 2 * lane.quad + i % 2 <= row0 + lane.group + i / 2 * 8 ? 1.0f : 0.0f;
                device::multiply_rows<B::precision, keys>(along, device::Rows16<B::precision, 1, keys>(s), k.transposed(), column0, j, lane_id);
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int r = row0 + lane.group + 8 * i;
                const float over = inverse[r], of_row = -dot[i] * over * over;
                if (column_group == 0 && lane.quad == 0) {
                    dw[r] = of_row;
                    if (dw_rows && r < rows(n)) dw_rows[row_at(r)] = of_row;
                }
#pragma unroll
                for (int t = 0; t < tiles; ++t)
#pragma unroll
                    for (int c = 0; c < 2; ++c)
                        dx[0][t][2 * i + c] = fmaf(of_row, along[0][t][2 * i + c] + z[column0 + 8 * t + 2 * lane.quad + c], dx[0][t][2 * i + c] * over);
            }
        }
        if (call.elu1)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
#pragma unroll
                for (int t = 0; t < tiles; ++t) {
                    const float2 x = device::get_pair(q.at(row0 + lane.group + i / 2 * 8, column0 + 8 * t + 2 * lane.quad));
                    dx[0][t][i] *= fminf(x.x, 1.0f);
                    dx[0][t][i + 1] *= fminf(x.y, 1.0f);
                }
        if (sums) {
            if (call.divides) {
                __syncthreads();
                scale_rows<T, dim>(e, inverse, thread);
                __syncthreads();
            }
            add_outer<T, dim>(adjoint, q, e, call.divides, dw, lane_id);
        }
        const bool advances = g + 1 == group && n + 1 < chunks;
        if (advances) add_outer<T, dim>(state, k, v, call.divides, nullptr, lane_id);
        __syncthreads();
        if (advances) put_state();
        if (dq) take_out<T, dim>(dx[0], q, row0, column0, device::Rows<T>(dq, span.batch, span.row + n * chunk, head, rows(n), wide_dq), lane_id);
    }
    if (sums) adjoint.store(sums + (slot * shape.kv_heads + h) * B::record);
}

/// dk and dv of a segment's rows. `entry`: the adjoints behind the segments.
template <class T, int dim>
__global__ __launch_bounds__(Block<T, dim>::threads, Block<T, dim>::blocks) void key_gradient_kernel(const __grid_constant__ Call<T> call, const View<const T, 4> dout, bool wide_do,
                                                                              const float* entry, const float* weights, const float* dw_rows, const View<T, 4> dk,
                                                                              bool wide_dk, const View<T, 4> dv, bool wide_dv) {
    using B = Block<T, dim>;
    constexpr int chunk = B::chunk, threads = B::threads, queries = 32, tiles = B::columns / 8;
    extern __shared__ __align__(128) unsigned char memory[];
    const Shape& shape = call.shape;
    const Index slot = blockIdx.x / shape.kv_heads;
    const int h = static_cast<int>(blockIdx.x % shape.kv_heads), thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane_id = thread % 32;
    const Span span(shape, call.in.cu_seqlens, slot, segment);
    if (!span.exists || span.count == 0) return;
    const device::Lane lane(lane_id);
    const int group = static_cast<int>(shape.group());
    auto* const data = reinterpret_cast<typename B::E*>(memory);
    const auto tile = [&](int i) { return typename B::Tile{data + i * B::Tile::size}; };
    const auto q_tile = [&](int step) { return tile(step % 2); };
    const auto e_tile = [&](int step) { return tile(2 + step % 2); };
    const StateMatrix<T, dim> matrix{data + 8 * B::Tile::size};
    auto* const r = reinterpret_cast<float*>(matrix.data + B::parts * B::Matrix::size);
    float *const inverse = r + dim, *const dw = inverse + chunk;

    const int chunks = (span.count + chunk - 1) / chunk, steps = chunks * group;
    const auto chunk_of = [&](int step) { return chunks - 1 - step / group; };
    const auto k_tile = [&](int n) { return tile(4 + n % 2); };
    const auto v_tile = [&](int n) { return tile(6 + n % 2); };
    const auto rows = [&](int n) { return min(chunk, span.count - n * chunk); };
    const auto fetch = [&](int step) {
        const int n = chunk_of(step), head = h * group + step % group;
        const Index row = span.row + n * chunk;
        q_tile(step).template copy_in<threads>(device::Rows<const T>(call.in.q, span.batch, row, head, rows(n), call.wide_q), thread);
        e_tile(step).template copy_in<threads>(device::Rows<const T>(dout, span.batch, row, head, rows(n), wide_do), thread);
        if (step % group > 0) return;
        k_tile(n).template copy_in<threads>(device::Rows<const T>(call.in.k, span.batch, row, h, rows(n), call.wide_k), thread);
        v_tile(n).template copy_in<threads>(device::Rows<const T>(call.in.v, span.batch, row, h, rows(n), call.wide_v), thread);
    };
    StateRows<T, dim> adjoint;
    adjoint.load(entry + (slot * shape.kv_heads + h) * B::record);
    const auto put_adjoint = [&] {
        matrix.put(adjoint);
        if (call.divides && adjoint.column(0) == 0) {
            r[adjoint.row(0)] = adjoint.z[0];
            r[adjoint.row(2)] = adjoint.z[1];
        }
    };
    put_adjoint();

    const int row0 = warp % B::row_groups * 16, column0 = warp / B::row_groups * B::columns;
    float of_k[1][tiles][4], of_v[1][tiles][4];
#pragma unroll 1
    for (int step = -1; step < steps; ++step) {
        device::wait_for_copies();
        __syncthreads();
        if (step + 1 < steps) fetch(step + 1);
        if (step < 0) continue;
        const int n = chunk_of(step), g = step % group, head = h * group + g;
        const auto q = q_tile(step), e = e_tile(step), k = k_tile(n), v = v_tile(n);
        if (call.divides)
            for (int i = thread; i < chunk; i += threads) {
                const Index at = (span.batch * shape.length + span.row + n * chunk + i) * shape.query_heads + head;
                const float w = i < rows(n) ? weights[at] : 0.0f;
                inverse[i] = w == 0.0f ? 0.0f : 1.0f / w;
                dw[i] = i < rows(n) ? dw_rows[at] : 0.0f;
            }
        if (call.elu1) {
            map_features<T, dim>(q, rows(n), shape.head_dim, thread);
            if (g == 0) map_features<T, dim>(k, rows(n), shape.head_dim, thread);
        }
        if (call.elu1 || call.divides) __syncthreads();

        const device::Shared16<typename B::E, chunk, dim> key_rows(k, row0, lane_id), value_rows(v, row0, lane_id);
        if (g == 0) {
            device::clear(of_k);
            device::clear(of_v);
            matrix.template multiply<true>(of_k, value_rows, column0, lane_id);
            matrix.template multiply<false>(of_v, key_rows, column0, lane_id);
            if (call.divides)
#pragma unroll
                for (int t = 0; t < tiles; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) of_k[0][t][i] += r[column0 + 8 * t + 2 * lane.quad + i % 2];
        }
#pragma unroll 1
        for (int j = row0 / queries * queries; j < chunk; j += queries) {
            float s[1][queries / 8][4];
            const auto read_by = [&](int t, int i) { return j + 8 * t + 2 * lane.quad + i % 2 >= row0 + lane.group + i / 2 * 8; };
            // Weights and their gradients are divided before they are rounded.
            const auto over = [&](int t, int i) { return call.divides ? inverse[j + 8 * t + 2 * lane.quad + i % 2] : 1.0f; };
            device::clear(s);
            device::multiply_rows<B::precision, dim>(s, key_rows, q.as_stored(), j, 0, lane_id);
#pragma unroll
            for (int t = 0; t < queries / 8; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[0][t][i] = read_by(t, i) ? device::rounded<B::precision>(s[0][t][i] * over(t, i)) : 0.0f;
            device::multiply_rows<B::precision, queries>(of_v, device::Rows16<B::precision, 1, queries>(s), e.transposed(), column0, j, lane_id);
            device::clear(s);
            device::multiply_rows<B::precision, dim>(s, value_rows, e.as_stored(), j, 0, lane_id);
#pragma unroll
            for (int t = 0; t < queries / 8; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float x = call.divides ? fmaf(s[0][t][i], over(t, i), dw[j + 8 * t + 2 * lane.quad + i % 2]) : s[0][t][i];
                    s[0][t][i] = read_by(t, i) ? device::rounded<B::precision>(x) : 0.0f;
                }
            device::multiply_rows<B::precision, queries>(of_k, device::Rows16<B::precision, 1, queries>(s), q.transposed(), column0, j, lane_id);
        }
        if (n > 0 && call.divides) {
            __syncthreads();
            scale_rows<T, dim>(e, inverse, thread);
            __syncthreads();
        }
        if (n > 0) add_outer<T, dim>(adjoint, q, e, call.divides, dw, lane_id);
        if (g + 1 < group) continue;
        if (call.elu1)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
#pragma unroll
                for (int t = 0; t < tiles; ++t) {
                    const float2 x = device::get_pair(k.at(row0 + lane.group + i / 2 * 8, column0 + 8 * t + 2 * lane.quad));
                    of_k[0][t][i] *= fminf(x.x, 1.0f);
                    of_k[0][t][i + 1] *= fminf(x.y, 1.0f);
                }
        __syncthreads();
        if (n > 0) put_adjoint();
        if (dk) take_out<T, dim>(of_k[0], k, row0, column0, device::Rows<T>(dk, span.batch, span.row + n * chunk, h, rows(n), wide_dk), lane_id);
        if (dv) take_out<T, dim>(of_v[0], v, row0, column0, device::Rows<T>(dv, span.batch, span.row + n * chunk, h, rows(n), wide_dv), lane_id);
    }
}

}  // namespace INTERSTATE_KERNELS

template <class T, int dim>
Status run_backward(const cuda& exec, const Options& options, const Inputs<T>& in, Saved saved, const Upstream<T>& upstream, const Grads<T>& grads, Workspace ws) {
    using B = Block<T, dim>;
    const auto call = call_of(options, in);
    const Shape& s = call.shape;
    Arena kept_arena(saved.data), arena(ws.data);
    const Kept kept(kept_arena, options, s, B::record);
    const Adjoints adjoints(arena, options, s, B::record);
    const float* const weights = options.divides() ? kept.weights : nullptr;
    float* const dw = options.divides() ? adjoints.dw : nullptr;
    const bool behind = grads.k || grads.v || grads.s0 || grads.z0;
    const bool wide_do = device::moves_wide(upstream.o, s.value_dim);
    const auto blocks = static_cast<unsigned>(span_count(s, segment) * s.kv_heads);
    if (grads.q || behind)
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "linear_attention.cuda query gradient", query_gradient_kernel<T, dim>, {dim3(blocks), dim3(B::threads), B::query_shared}, call,
                                          upstream.o, wide_do, static_cast<const float*>(kept.records), weights, grads.q,
                                          static_cast<bool>(grads.q) && device::moves_wide(grads.q, s.head_dim), behind ? adjoints.records : nullptr, dw));
    if (!behind) return {};
    INTERSTATE_RETURN_IF_ERROR(scan_records<dim>(exec, s, in.cu_seqlens, segment, true, adjoints.records, upstream.sT, upstream.zT, grads.s0, grads.z0));
    if (!grads.k && !grads.v) return {};
    return launch(exec, "linear_attention.cuda key gradient", key_gradient_kernel<T, dim>, {dim3(blocks), dim3(B::threads), B::key_shared}, call, upstream.o, wide_do,
                  static_cast<const float*>(adjoints.records), weights, static_cast<const float*>(dw), grads.k,
                  static_cast<bool>(grads.k) && device::moves_wide(grads.k, s.head_dim), grads.v,
                  static_cast<bool>(grads.v) && device::moves_wide(grads.v, s.value_dim));
}

}  // namespace linear_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
