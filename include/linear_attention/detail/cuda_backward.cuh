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

/// 1 / w of the rows of a step, which the step before it has read: a thread a row.
struct Inverse {
    const float* weights;
    float next;
    __device__ void read(Index at, bool there) { next = there ? weights[at] : 0.0f; }
    __device__ float value() const { return inverse_weight(next); }
};

/// dq and dw of a segment's rows, and what they add to R and r.
template <class T, int dim>
__global__ __launch_bounds__(Block<T, dim>::threads, Block<T, dim>::blocks) void query_gradient_kernel(const __grid_constant__ Call<T> call, const __grid_constant__ View<const T, 4> dout,
                                                                                bool wide_do, const float* entry, const float* weights, const __grid_constant__ View<T, 4> dq,
                                                                                bool wide_dq, float* sums, float* dw_rows) {
    using B = Block<T, dim>;
    constexpr int chunk = B::chunk, threads = B::threads, keys = 32, tiles = B::columns / 8;
    extern __shared__ __align__(128) unsigned char memory[];
    const Shape& shape = call.shape;
    const Index slot = blockIdx.x / shape.kv_heads;
    const int h = static_cast<int>(blockIdx.x % shape.kv_heads);
    const Span span(shape, call.in.cu_seqlens, slot, segment);
    if (!span.exists || span.count == 0) return;
    const int group = static_cast<int>(shape.group());
    auto* const data = reinterpret_cast<typename B::E*>(memory);
    const auto tile = [&](int i) { return typename B::Tile{data + i * B::Tile::size}; };
    const auto q_tile = [&](int step) { return tile(step % 2); };
    const auto e_tile = [&](int step) { return tile(2 + step % 2); };
    const auto k_tile = [&](int n) { return tile(4 + n % 2); };
    const auto v_tile = [&](int n) { return tile(6 + n % 2); };
    const StateMatrix<T, dim> matrix{data + 8 * B::Tile::size, reinterpret_cast<float*>(data + 8 * B::Tile::size + B::parts * B::Matrix::size)};
    float *const inverses = matrix.z + dim, *const dw = inverses + 2 * chunk, *const dots = dw + chunk;

    const int chunks = (span.count + chunk - 1) / chunk, steps = chunks * group;
    const auto rows = [&](int n) { return min(chunk, span.count - n * chunk); };
    const auto row_at = [&](int step, int r) {
        return (span.batch * shape.length + span.row + step / group * chunk + r) * shape.query_heads + h * group + step % group;
    };
    const auto fetch = [&](int step, int thread) {
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
    matrix.put(state);

    Inverse inverse{weights, 0.0f};
#pragma unroll 1
    for (int step = -1; step < steps; ++step) {
        const int thread = device::kept(static_cast<int>(threadIdx.x));
        device::wait_for_copies();
        __syncthreads();
        if (step + 1 < steps) fetch(step + 1, thread);
        if (call.divides && thread < chunk) {
            if (step + 1 < steps) inverse.read(row_at(step + 1, thread), thread < rows((step + 1) / group));
            // Nobody reads this half before the next barrier but one.
            if (step < 0) inverses[thread] = inverse.value();
        }
        if (step < 0) continue;
        const int lane_id = thread % 32;
        const device::Lane lane(lane_id);
        state.thread = adjoint.thread = thread;
        const int column_group = thread / 32 / B::row_groups, row0 = thread / 32 % B::row_groups * 16, column0 = column_group * B::columns;
        const int n = step / group, g = step % group, head = h * group + g;
        const auto q = q_tile(step), e = e_tile(step), k = k_tile(n), v = v_tile(n);
        if (call.elu1) {
            map_features<T, dim>(q, rows(n), shape.head_dim, thread);
            if (g == 0) map_features<T, dim>(k, rows(n), shape.head_dim, thread);
        }
        const float* const over = inverses + step % 2 * chunk;
        if (call.divides) scale_rows<T, dim>(e, over, thread);
        if (call.elu1 || call.divides) __syncthreads();

        float dx[1][tiles][4];
        // G, and of normalized rows, by the same loads, the sum of the keys that each reads.
        const device::Shared16<typename B::E, chunk, dim> upstream(e, row0, lane_id);
        const auto multiply = [&]<int m>(std::integral_constant<int, m>) {
            float c[m][tiles][4];
            device::clear(c);
#pragma unroll 1
            for (int j = 0; j < row0 + 16; j += keys) {
                float s[m][keys / 8][4], of_values[1][keys / 8][4];
                device::clear(of_values);
                device::multiply_rows<B::precision, dim>(of_values, upstream, v.as_stored(), j, 0, lane_id);
#pragma unroll
                for (int t = 0; t < keys / 8; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const bool reads = j + 8 * t + 2 * lane.quad + i % 2 <= row0 + lane.group + i / 2 * 8;
                        s[0][t][i] = reads ? device::rounded<B::precision>(of_values[0][t][i]) : 0.0f;
                        if constexpr (m == 2) s[1][t][i] = reads ? 1.0f : 0.0f;
                    }
                device::multiply_rows<B::precision, keys>(c, device::Rows16<B::precision, m, keys>(s), k.transposed(), column0, j, lane_id);
            }
#pragma unroll
            for (int t = 0; t < tiles; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) dx[0][t][i] = c[0][t][i];
            matrix.template multiply<true>(dx, upstream, column0, lane_id);
            if constexpr (m == 2) {
                // o.e = phi(q).G / w, and with it dw.
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
                        for (int group = 0; group < B::column_groups; ++group) dot[i] += dots[group * chunk + row0 + lane.group + 8 * i];
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int r = row0 + lane.group + 8 * i;
                    const float of_row = -dot[i] * over[r];
                    if (column_group == 0 && lane.quad == 0) {
                        dw[r] = of_row;
                        if (dw_rows && r < rows(n)) dw_rows[row_at(step, r)] = of_row;
                    }
#pragma unroll
                    for (int t = 0; t < tiles; ++t) {
                        const float* const z = matrix.z + column0 + 8 * t + 2 * lane.quad;
#pragma unroll
                        for (int x = 0; x < 2; ++x) dx[0][t][2 * i + x] = fmaf(of_row, c[1][t][2 * i + x] + z[x], dx[0][t][2 * i + x]);
                    }
                }
            }
        };
        if (call.divides)
            multiply(std::integral_constant<int, 2>{});
        else
            multiply(std::integral_constant<int, 1>{});
        if (call.elu1)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
#pragma unroll
                for (int t = 0; t < tiles; ++t) {
                    const float2 x = device::get_pair(q.at(row0 + lane.group + i / 2 * 8, column0 + 8 * t + 2 * lane.quad));
                    dx[0][t][i] *= device::least_of(x.x, 1.0f);
                    dx[0][t][i + 1] *= device::least_of(x.y, 1.0f);
                }
        const bool advances = g + 1 == group && n + 1 < chunks;
        if (advances) {
            add_outer<T, dim>(state, k, v, lane_id);
            if (call.divides) add_sum<T, dim>(state, k, nullptr, lane_id);
        }
        if (sums) add_outer<T, dim>(adjoint, q, e, lane_id);
        if (call.divides && sums) {
            __syncthreads();  // dw
            add_sum<T, dim>(adjoint, q, dw, lane_id);
        }
        __syncthreads();
        if (advances) matrix.put(state);
        if (dq) take_out<T, dim>(dx[0], q, row0, column0, device::Rows<T>(dq, span.batch, span.row + n * chunk, head, rows(n), wide_dq), lane_id);
        // The half that the step before this one has read.
        if (call.divides && thread < chunk) inverses[(step + 1) % 2 * chunk + thread] = inverse.value();
    }
    if (sums) adjoint.store(sums + (slot * shape.kv_heads + h) * B::record);
}

/// dk and dv of a segment's rows. `entry`: the adjoints behind the segments.
template <class T, int dim>
__global__ __launch_bounds__(Block<T, dim>::threads, Block<T, dim>::blocks) void key_gradient_kernel(const __grid_constant__ Call<T> call, const __grid_constant__ View<const T, 4> dout,
                                                                              bool wide_do, const float* entry, const float* weights, const float* dw_rows,
                                                                              const __grid_constant__ View<T, 4> dk, bool wide_dk, const __grid_constant__ View<T, 4> dv, bool wide_dv) {
    using B = Block<T, dim>;
    constexpr int chunk = B::chunk, threads = B::threads, queries = 32, tiles = B::columns / 8;
    extern __shared__ __align__(128) unsigned char memory[];
    const Shape& shape = call.shape;
    const Index slot = blockIdx.x / shape.kv_heads;
    const int h = static_cast<int>(blockIdx.x % shape.kv_heads);
    const Span span(shape, call.in.cu_seqlens, slot, segment);
    if (!span.exists || span.count == 0) return;
    const int group = static_cast<int>(shape.group());
    auto* const data = reinterpret_cast<typename B::E*>(memory);
    const auto tile = [&](int i) { return typename B::Tile{data + i * B::Tile::size}; };
    const auto q_tile = [&](int step) { return tile(step % 2); };
    const auto e_tile = [&](int step) { return tile(2 + step % 2); };
    const StateMatrix<T, dim> matrix{data + 8 * B::Tile::size, reinterpret_cast<float*>(data + 8 * B::Tile::size + B::parts * B::Matrix::size)};
    float *const inverses = matrix.z + dim, *const dws = inverses + 2 * chunk;

    const int chunks = (span.count + chunk - 1) / chunk, steps = chunks * group;
    const auto chunk_of = [&](int step) { return chunks - 1 - step / group; };
    const auto k_tile = [&](int n) { return tile(4 + n % 2); };
    const auto v_tile = [&](int n) { return tile(6 + n % 2); };
    const auto rows = [&](int n) { return min(chunk, span.count - n * chunk); };
    const auto fetch = [&](int step, int thread) {
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
    matrix.put(adjoint);

    float of_k[1][tiles][4], of_v[1][tiles][4];
    Inverse inverse{weights, 0.0f};
    float next_dw = 0.0f;
#pragma unroll 1
    for (int step = -1; step < steps; ++step) {
        const int thread = device::kept(static_cast<int>(threadIdx.x));
        device::wait_for_copies();
        __syncthreads();
        if (step + 1 < steps) fetch(step + 1, thread);
        if (call.divides && thread < chunk) {
            if (step + 1 < steps) {
                const int n = chunk_of(step + 1);
                const Index at = (span.batch * shape.length + span.row + n * chunk + thread) * shape.query_heads + h * group + (step + 1) % group;
                inverse.read(at, thread < rows(n));
                next_dw = thread < rows(n) ? dw_rows[at] : 0.0f;
            }
            // Nobody reads this half before the next barrier but one.
            if (step < 0) {
                inverses[thread] = inverse.value();
                dws[thread] = next_dw;
            }
        }
        if (step < 0) continue;
        const int lane_id = thread % 32;
        const device::Lane lane(lane_id);
        adjoint.thread = thread;
        const int row0 = thread / 32 % B::row_groups * 16, column0 = thread / 32 / B::row_groups * B::columns;
        const int n = chunk_of(step), g = step % group;
        const auto q = q_tile(step), e = e_tile(step), k = k_tile(n), v = v_tile(n);
        const float* const dw = dws + step % 2 * chunk;
        if (call.elu1) {
            map_features<T, dim>(q, rows(n), shape.head_dim, thread);
            if (g == 0) map_features<T, dim>(k, rows(n), shape.head_dim, thread);
        }
        if (call.divides) scale_rows<T, dim>(e, inverses + step % 2 * chunk, thread);
        if (call.elu1 || call.divides) __syncthreads();

        const device::Shared16<typename B::E, chunk, dim> key_rows(k, row0, lane_id), value_rows(v, row0, lane_id);
        // Of both, c: what the state gives, and what the chunk's queries give: masked products of own rows with `with`, times `by`.
        const auto add_chunk = [&](auto& c, const auto& own, const auto& with, const auto& by, const float* plus) {
#pragma unroll 1
            for (int j = row0 / queries * queries; j < chunk; j += queries) {
                float s[1][queries / 8][4];
                device::clear(s);
                device::multiply_rows<B::precision, dim>(s, own, with.as_stored(), j, 0, lane_id);
#pragma unroll
                for (int t = 0; t < queries / 8; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        const int query = j + 8 * t + 2 * lane.quad + i % 2;
                        const float x = plus ? s[0][t][i] + plus[query] : s[0][t][i];
                        s[0][t][i] = query >= row0 + lane.group + i / 2 * 8 ? device::rounded<B::precision>(x) : 0.0f;
                    }
                device::multiply_rows<B::precision, queries>(c, device::Rows16<B::precision, 1, queries>(s), by.transposed(), column0, j, lane_id);
            }
        };
        if (g == 0) {
            device::clear(of_v);
            matrix.template multiply<false>(of_v, key_rows, column0, lane_id);
        }
        add_chunk(of_v, key_rows, q, e, nullptr);
        if (g == 0) {
            device::clear(of_k);
            matrix.template multiply<true>(of_k, value_rows, column0, lane_id);
            if (call.divides)
#pragma unroll
                for (int t = 0; t < tiles; ++t)
#pragma unroll
                    for (int i = 0; i < 4; ++i) of_k[0][t][i] += matrix.z[column0 + 8 * t + 2 * lane.quad + i % 2];
        }
        add_chunk(of_k, value_rows, e, q, call.divides ? dw : nullptr);
        if (n > 0) {
            add_outer<T, dim>(adjoint, q, e, lane_id);
            if (call.divides) add_sum<T, dim>(adjoint, q, dw, lane_id);
        }
        // The half that the step before this one has read.
        if (call.divides && thread < chunk) {
            inverses[(step + 1) % 2 * chunk + thread] = inverse.value();
            dws[(step + 1) % 2 * chunk + thread] = next_dw;
        }
        if (g + 1 < group) continue;
        if (call.elu1)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
#pragma unroll
                for (int t = 0; t < tiles; ++t) {
                    const float2 x = device::get_pair(k.at(row0 + lane.group + i / 2 * 8, column0 + 8 * t + 2 * lane.quad));
                    of_k[0][t][i] *= device::least_of(x.x, 1.0f);
                    of_k[0][t][i + 1] *= device::least_of(x.y, 1.0f);
                }
        __syncthreads();
        if (n > 0) matrix.put(adjoint);
        if (dk) take_out<T, dim>(of_k[0], k, row0, column0, device::Rows<T>(dk, span.batch, span.row + n * chunk, h, rows(n), wide_dk), lane_id);
        if (dv) take_out<T, dim>(of_v[0], v, row0, column0, device::Rows<T>(dv, span.batch, span.row + n * chunk, h, rows(n), wide_dv), lane_id);
    }
}

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

}  // namespace INTERSTATE_KERNELS
}  // namespace linear_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
