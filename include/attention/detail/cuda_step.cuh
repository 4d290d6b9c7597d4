// Decoding: new tokens against a cache. Reading the cache is all that a step costs, so it is split over as many blocks as fill the GPU:
//
//     write   the tokens' keys and values into the cache
//     split   a block has a part of a sequence's rows and one key/value head; the queries of its group, of all new tokens, are rows of
//             one tile, so that the cache is read once. Each warp goes through tiles of 16 rows for itself, with stages of copies of
//             its own on their way: no barrier until the end, where the sums of the warps are joined (eq. 13)
//     merge   joins the parts, in their order
//
// What is added in which order follows from shapes and lengths alone. Equations: docs/ops/attention.md.
#pragma once

#include <attention/detail/cuda_forward.cuh>
#include <attention/detail/cuda_simple.cuh>
#include <interstate/dispatch.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

/// Attention's own scores in a step.
struct StepPlain {
    static constexpr int channels = 0;
};

/// score[i,j] += strength exp(g[i] - g[j]) c[i].b[j], what belongs to keys in the cache and what belongs to new tokens beside it.
template <class T, int count>
struct StepChannels {
    static constexpr int channels = count;  // as stored in c, zeros behind those that there are; -1 is any number (simple kernel)
    View<const T, 4> b;                     // cache: (B, capacity, Hkv, ds), or pages
    View<const double, 3> g;                // cache: (B, capacity, Hkv), or pages; natural
    View<const T, 4> c;                     // (B, n, Hq, channels)
    View<const double, 3> g_new;            // (B, n, Hkv)
    View<const acc_t<T>, 1> strength;       // (Hq)
    bool wide_b;
};

/// A row of queries of one key/value head takes 16 columns at least of a product; where there are more than 16, so many times 16 share
/// a block, as registers allow. Further ones are other blocks'.
template <class T>
constexpr int most_row_tiles(int dim) {
    return (sizeof(T) == 2 ? 256 : 128) / dim > 1 ? (sizeof(T) == 2 ? 256 : 128) / dim : 1;
}

/// Sizes of a block of the split kernel. About 64 KB of copies are on their way, so that three blocks fit a multiprocessor.
template <class T, int dim, int channels, int m>
struct StepForm {
    static constexpr int tile = 16, rows = 16 * m, pitch = dim + 8;  // of sums in shared memory: banks apart
    static constexpr int stage = tile * (static_cast<int>(sizeof(T)) * (2 * dim + channels) + (channels > 0 ? 8 : 0));
    static constexpr int warps = stage <= 6400 ? 4 : stage <= 12544 ? 2 : 1, threads = 32 * warps;
    static constexpr int stages = 65536 / (warps * stage) > 3 ? 65536 / (warps * stage) : 3;
    static constexpr int blocks = m == 1 ? 3 : 2;  // a multiprocessor
    static constexpr std::size_t loading = warps * stages * stage + rows * sizeof(T) * (dim + channels);
    static constexpr std::size_t joining = rows * (warps * (pitch * sizeof(float) + sizeof(float2)) + sizeof(float2));
    static constexpr std::size_t shared = loading > joining ? loading : joining;
};

/// What the parts of a cache have come to, where there is more than one.
struct StepParts {
    int splits = 1, pitch = 0;
    float2* statistics = nullptr;  // (B, n, Hq, splits): shift, in powers of two, and the sum of weights
    float* sums = nullptr;         // (B, n, Hq, splits, pitch)
};

/// Everything that the kernels of a step read.
template <class T, class Policy>
struct StepCall {
    using A = acc_t<T>;
    Shape shape;  // queries: new tokens; keys: rows that a sequence may have
    Mask mask;
    CacheRows rows;
    View<const T, 4> k, v;  // cache
    Tokens<T> tokens;
    TokensOut<T> out;
    bool softmax;
    A scale, option_bias;
    bool wide_q, wide_k, wide_v;
    Policy policy;
    int row_tiles;
    StepParts parts;
    __device__ A bias(int head) const { return tokens.bias ? tokens.bias(head) : option_bias; }
};

/// Tokens of a sequence before the step; -1 where there is no room for the new ones, or a length is negative: the sequence is then left
/// alone, and its rows read nothing.
__device__ inline int length_before(const CacheRows& rows, Index b, Index tokens) {
    const Index length = rows.length_of(b);
    return rows.has_room(length, tokens) ? static_cast<int>(length) : -1;
}
/// Where a row of a cache is; false where its page is none of the cache's: such rows are not written, and read as zeros.
__device__ inline bool find_cached(const CacheRows& rows, Index b, int row, CacheRows::Place& at) {
    at = rows.place(b, row);
    return !rows.block_table || rows.has_page(at.batch);
}

/// Sets flags where a sequence has no room, or needs a page that is none. By the threads of a block.
__device__ inline void report_rows(const CacheRows& rows, const Mask& mask, Index b, int length, int tokens, std::uint32_t* flags) {
    if (!flags) return;
    if (length < 0) {
        if (threadIdx.x == 0) atomicOr(flags, flag_bad_lengths);
        return;
    }
    if (!rows.block_table) return;
    const int size = static_cast<int>(rows.page_size), last = (length + tokens - 1) / size;
    for (int i = mask.first_key(length) / size + static_cast<int>(threadIdx.x); i <= last; i += static_cast<int>(blockDim.x))
        if (!rows.has_page(rows.block_table(b, i))) atomicOr(flags, flag_bad_block_table);
}

/// Copies a token's rows of `heads` heads into a cache, by `threads` threads.
template <class T>
__device__ void write_rows(const View<const T, 4>& from, Index b, Index i, const View<T, 4>& to, const CacheRows::Place& at, int head, int heads,
                           bool wide, int thread, int threads) {
    constexpr int V = 16 / static_cast<int>(sizeof(T));
    const int width = static_cast<int>(from.extent[3]), units = wide ? width / V : width;
    for (int e = thread; e < heads * units; e += threads) {
        const int h = head + e / units, c = e % units;
        if (wide)
            *reinterpret_cast<int4*>(&to(at.batch, at.row, h, c * V)) = *reinterpret_cast<const int4*>(&from(b, i, h, c * V));
        else
            to(at.batch, at.row, h, c) = from(b, i, h, c);
    }
}

/// A row of a cache on its way to row `row` of a tile, by the eight lanes that have it; zeros where it is not `there`.
template <class T, int columns>
__device__ void fetch_row(const device::Swizzled<T, 16, columns>& to, int row, const View<const T, 4>& from, const CacheRows::Place& at, Index head,
                          bool there, bool wide, int lane) {
    constexpr int V = device::chunk_columns<T>;
    const int width = static_cast<int>(from.extent[3]);
    const T* const source = from.data + at.batch * from.stride[0] + at.row * from.stride[1] + head * from.stride[2];
    if (wide) {
#pragma unroll
        for (int i = 0; i < (columns + 8 * V - 1) / (8 * V); ++i) {
            const int c = (8 * i + lane) * V;
            if (columns % (8 * V) == 0 || c < columns) device::copy_async_16(to.at(row, c), source + c, there && c < width);
        }
    } else {
#pragma unroll 1
        for (int c = lane; c < columns; c += 8) *to.at(row, c) = there && c < width ? source[c * from.stride[3]] : T(0.0f);
    }
}

/// 2^(g of a query - g of a key); 1 where the query is before the key, so that what a mask leaves out stays finite. NaN stays NaN.
__device__ inline float decay_of(double query, double key) {
    const auto x = static_cast<float>(query - key);
    return exp2_of(x > 0.0f ? 0.0f : x);
}

inline namespace INTERSTATE_KERNELS {

/// New keys and values into the cache, a block a token; reports what is wrong with lengths and block table.
template <class T>
__global__ __launch_bounds__(256) void write_tokens_kernel(const __grid_constant__ CacheRows rows, const Mask mask, const int tokens,
                                                           const View<const T, 4> k, const View<const T, 4> v, const View<T, 4> cache_k,
                                                           const View<T, 4> cache_v, const bool wide_k, const bool wide_v, std::uint32_t* flags) {
    device::wait_for_previous_kernel();
    device::let_next_kernel_start();
    const int i = static_cast<int>(blockIdx.x) % tokens;
    const Index b = static_cast<int>(blockIdx.x) / tokens;
    const int length = length_before(rows, b, tokens);
    if (i == 0) report_rows(rows, mask, b, length, tokens, flags);
    CacheRows::Place at;
    if (length < 0 || !find_cached(rows, b, length + i, at)) return;
    const int heads = static_cast<int>(k.extent[2]);
    write_rows(k, b, i, cache_k, at, 0, heads, wide_k, static_cast<int>(threadIdx.x), 256);
    write_rows(v, b, i, cache_v, at, 0, heads, wide_v, static_cast<int>(threadIdx.x), 256);
}

template <class T, int dim, int m, class Policy>
__global__ __launch_bounds__(StepForm<T, dim, Policy::channels, m>::threads, StepForm<T, dim, Policy::channels, m>::blocks) void split_step_kernel(
    const __grid_constant__ StepCall<T, Policy> call) {
    constexpr int channels = Policy::channels;
    using Form = StepForm<T, dim, channels, m>;
    constexpr int tile = Form::tile, tiles = tile / 8, rows = Form::rows, warps = Form::warps, threads = Form::threads, stages = Form::stages;
    constexpr int V = device::chunk_columns<T>;
    constexpr auto precision = precision_of<T>;
    extern __shared__ __align__(128) unsigned char memory[];
    using Keys = device::Swizzled<T, tile, dim>;
    using ChannelKeys = device::Swizzled<T, tile, channels ? channels : dim>;
    using ChannelRows = device::Swizzled<T, rows, channels ? channels : dim>;
    const device::Swizzled<T, rows, dim> q{reinterpret_cast<T*>(memory + warps * stages * Form::stage)};
    const ChannelRows channel_rows{q.data + q.size};

    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane_id = thread % 32;
    const Lane lane(lane_id);
    unsigned block = blockIdx.x;
    const int heads = static_cast<int>(call.shape.kv_heads), group = static_cast<int>(call.shape.group()), n = static_cast<int>(call.shape.queries);
    // Blocks that run at the same time read the same rows of all heads.
    const int kv = static_cast<int>(block % static_cast<unsigned>(heads));
    block /= static_cast<unsigned>(heads);
    const int row0 = static_cast<int>(block % static_cast<unsigned>(call.row_tiles)) * rows;
    block /= static_cast<unsigned>(call.row_tiles);
    const int split = static_cast<int>(block % static_cast<unsigned>(call.parts.splits));
    const int b = static_cast<int>(block / static_cast<unsigned>(call.parts.splits));

    // Row r is query r % group of token r / group. The rows of the block together read [begin, end).
    const int count = min(rows, group * n - row0), first_token = row0 / group, last_token = (row0 + count - 1) / group;
    const int length = length_before(call.rows, b, n);
    const int begin = length < 0 ? 0 : call.mask.first_key(length + first_token);
    const int end = length < 0 ? 0 : call.mask.end_key(length + last_token, length + n);
    const Index all_tiles = end > begin ? (end - begin + tile - 1) / tile : 0;
    const int tile0 = static_cast<int>(all_tiles * split / call.parts.splits), tile1 = static_cast<int>(all_tiles * (split + 1) / call.parts.splits);
    const int steps = (tile1 - tile0 - warp + warps - 1) / warps;
    const auto first_key = [&](int step) { return begin + (tile0 + warp + step * warps) * tile; };

    unsigned char* const own = memory + warp * stages * Form::stage;
    const auto keys = [&](int slot) { return Keys{reinterpret_cast<T*>(own + slot * Form::stage)}; };
    const auto values = [&](int slot) { return Keys{reinterpret_cast<T*>(own + slot * Form::stage) + Keys::size}; };
    const auto channel_keys = [&](int slot) { return ChannelKeys{reinterpret_cast<T*>(own + slot * Form::stage) + 2 * Keys::size}; };
    const auto decays = [&](int slot) { return reinterpret_cast<double*>(own + (slot + 1) * Form::stage) - tile; };
    const auto fetch = [&](int step, int slot) {
        const int j = first_key(step);
#pragma unroll
        for (int i = 0; i < tile / 4; ++i) {
            const int row = 4 * i + lane_id / 8;
            CacheRows::Place at{};
            const bool there = j + row < end && find_cached(call.rows, b, j + row, at);
            fetch_row(keys(slot), row, call.k, at, kv, there, call.wide_k, lane_id % 8);
            fetch_row(values(slot), row, call.v, at, kv, there, call.wide_v, lane_id % 8);
            if constexpr (channels > 0) {
                fetch_row(channel_keys(slot), row, call.policy.b, at, kv, there, call.policy.wide_b, lane_id % 8);
                if (lane_id % 8 == 0) {
                    if (there)
                        device::copy_async<8>(decays(slot) + row, &call.policy.g(at.batch, at.row, kv));
                    else
                        decays(slot)[row] = 0.0;
                }
            }
        }
    };
    // Rows that were there before the step may be read while its tokens are written.
    if (steps > 0 && first_key(min(steps, stages - 1) - 1) + tile > length) device::wait_for_previous_kernel();
#pragma unroll 1
    for (int step = 0; step < stages - 1; ++step) {
        if (step < steps) fetch(step, step);
        device::commit_copies();
    }
    device::wait_for_previous_kernel();
    device::let_next_kernel_start();

    // Scores as they leave the product are s / |scale|: the sign of the scale goes into the queries.
    const auto load_rows = [&](const auto& to, const View<const T, 4>& from, int columns, bool wide, unsigned flip) {
        for (int u = thread; u < rows * columns / V; u += threads) {
            const int r = u / (columns / V), c = u % (columns / V) * V, at = row0 + r, width = static_cast<int>(from.extent[3]);
            uint4 x{0u, 0u, 0u, 0u};
            if (r < count) {
                const T* const source = &from(b, at / group, kv * group + at % group, 0);
                if (wide) {
                    if (c < width) x = *reinterpret_cast<const uint4*>(source + c);
                } else {
                    device::Wide<T> y;
#pragma unroll
                    for (int e = 0; e < V; ++e) y.x[e] = c + e < width ? source[(c + e) * from.stride[3]] : T(0.0f);
                    x = __builtin_bit_cast(uint4, y);
                }
            }
            *reinterpret_cast<uint4*>(to.at(r, c)) = {x.x ^ flip, x.y ^ flip, x.z ^ flip, x.w ^ flip};
        }
    };
    load_rows(q, call.tokens.q, dim, call.wide_q, !(call.scale < 0.0f) ? 0u : sizeof(T) == 2 ? 0x80008000u : 0x80000000u);
    const float c = fabsf(call.scale) * float(log2_e);
    float bias[m][2] = {}, strength[channels > 0 ? m : 1][2];
    double g[channels > 0 ? m : 1][2];
    if constexpr (channels > 0) load_rows(channel_rows, call.policy.c, channels, true, 0u);
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int r = row0 + min(16 * i + lane.group + 8 * row, count - 1), head = kv * group + r % group;
            if (!call.softmax) bias[i][row] = call.bias(head) * float(log2_e);
            if constexpr (channels > 0) {
                strength[i][row] = call.policy.strength(head) / fabsf(call.scale);
                g[i][row] = call.policy.g_new(b, r / group, kv) * log2_e;
            }
        }
    __syncthreads();

    const Shared16<T, rows, dim> queries(q, 0, lane_id);
    float sum[m][dim / 8][4], shift[m][2], total[m][2];
    clear(sum);
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            shift[i][row] = call.softmax ? -INFINITY : 0.0f;
            total[i][row] = 0.0f;
        }
    const int level_begin = call.mask.first_key(length + last_token), level_end = call.mask.end_key(length + first_token, length + n);

    int slot = 0;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        device::wait_for_all_but<stages - 2>();
        __syncwarp();
        if (step + stages - 1 < steps) fetch(step + stages - 1, slot == 0 ? stages - 1 : slot - 1);
        device::commit_copies();

        const int j = first_key(step);
        float s[m][tiles][4];
        clear(s);
        if constexpr (channels > 0) {
            multiply_rows<precision, channels>(s, Shared16<T, rows, channels>(channel_rows, 0, lane_id), channel_keys(slot).as_stored(), 0, 0, lane_id);
#pragma unroll
            for (int t = 0; t < tiles; ++t)
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const double key = decays(slot)[8 * t + 2 * lane.quad + e] * log2_e;
#pragma unroll
                    for (int i = 0; i < m; ++i)
#pragma unroll
                        for (int row = 0; row < 2; ++row) s[i][t][2 * row + e] *= strength[i][row] * decay_of(g[i][row], key);
                }
        }
        multiply_rows<precision, dim>(s, queries, keys(slot).as_stored(), 0, 0, lane_id);
        if (j < level_begin || j + tile > level_end)
#pragma unroll
            for (int i = 0; i < m; ++i)
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const int position = length + (row0 + 16 * i + lane.group + 8 * row) / group;
                    const int low = call.mask.first_key(position), high = call.mask.end_key(position, length + n);
#pragma unroll
                    for (int t = 0; t < tiles; ++t)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int key = j + 8 * t + 2 * lane.quad + e;
                            if (key < low || key >= high) s[i][t][2 * row + e] = -INFINITY;
                        }
                }

        if (call.softmax) {
#pragma unroll
            for (int i = 0; i < m; ++i)
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    float top = fmaxf(s[i][0][2 * row], s[i][0][2 * row + 1]);
#pragma unroll
                    for (int t = 1; t < tiles; ++t) top = fmaxf(top, fmaxf(s[i][t][2 * row], s[i][t][2 * row + 1]));
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
                    top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2)) * c;
                    // Any shift near the largest score will do, so that sums are scaled down only when scores have grown.
                    if (top > shift[i][row] + slack) {
                        const float shrink = exp2_of(shift[i][row] - top);
                        shift[i][row] = top;
                        total[i][row] *= shrink;
#pragma unroll
                        for (int t = 0; t < dim / 8; ++t) {
                            sum[i][t][2 * row] *= shrink;
                            sum[i][t][2 * row + 1] *= shrink;
                        }
                    }
                    const float minus = shift[i][row] == -INFINITY ? 0.0f : -shift[i][row];
#pragma unroll
                    for (int t = 0; t < tiles; ++t)
#pragma unroll
                        for (int e = 2 * row; e < 2 * row + 2; ++e) {
                            s[i][t][e] = exp2_of(fmaf(s[i][t][e], c, minus));
                            total[i][row] += s[i][t][e];
                        }
                }
        } else {
#pragma unroll
            for (int i = 0; i < m; ++i)
#pragma unroll
                for (int t = 0; t < tiles; ++t)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[i][t][e] = sigmoid2(fmaf(s[i][t][e], c, bias[i][e / 2]));
        }
        multiply_rows<precision, tile>(sum, Rows16<precision, m, tile>(s), values(slot).transposed(), 0, 0, lane_id);
        slot = slot + 1 == stages ? 0 : slot + 1;
    }

    // The warps' sums, each relative to the largest of their shifts. A sum of weights of 0 says that there are none.
    __syncthreads();
    float* const joined = reinterpret_cast<float*>(memory);                                   // (warps, rows, pitch)
    float2* const of_warps = reinterpret_cast<float2*>(joined + warps * rows * Form::pitch);  // (warps, rows)
    float2* const of_rows = of_warps + warps * rows;
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            float l = total[i][row];
            l += __shfl_xor_sync(0xffffffffu, l, 1);
            l += __shfl_xor_sync(0xffffffffu, l, 2);
            if (!call.softmax) l = steps > 0 ? 1.0f : 0.0f;
            if (lane.quad == 0) of_warps[warp * rows + 16 * i + lane.group + 8 * row] = {shift[i][row], l};
        }
    __syncthreads();
    for (int r = thread; r < rows; r += threads) {
        float top = -INFINITY, l = 0.0f;
        for (int w = 0; w < warps; ++w) top = fmaxf(top, of_warps[w * rows + r].x);
        for (int w = 0; w < warps; ++w) {
            const float2 part = of_warps[w * rows + r];
            if (part.y != 0.0f) l += part.y * exp2_of(part.x - top);
        }
        of_rows[r] = {top, call.softmax ? l : fminf(l, 1.0f)};
    }
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const int r = 16 * i + lane.group + 8 * row;
            float top = -INFINITY;
            for (int w = 0; w < warps; ++w) top = fmaxf(top, of_warps[w * rows + r].x);
            const float factor = of_warps[warp * rows + r].y == 0.0f ? 0.0f : exp2_of(shift[i][row] - top);
#pragma unroll
            for (int t = 0; t < dim / 8; ++t)
                *reinterpret_cast<float2*>(joined + (warp * rows + r) * Form::pitch + 8 * t + 2 * lane.quad) =
                    float2{sum[i][t][2 * row] * factor, sum[i][t][2 * row + 1] * factor};
        }
    __syncthreads();
    const int width = static_cast<int>(call.shape.value_dim);
    for (int e = thread; e < count * dim; e += threads) {
        const int r = e / dim, d = e % dim, token = (row0 + r) / group, head = kv * group + (row0 + r) % group;
        const float2 of_row = of_rows[r];
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < warps; ++w) x += joined[(w * rows + r) * Form::pitch + d];
        if (call.parts.splits == 1) {
            if (d < width) call.out.o(b, token, head, d) = device::store_as<T>(!call.softmax ? x : of_row.y == 0.0f ? 0.0f : x / of_row.y);
            if (d == 0 && call.out.lse) call.out.lse(b, token, head) = of_row.y == 0.0f ? -INFINITY : (of_row.x + log2f(of_row.y)) * float(ln_2);
        } else {
            const Index part = ((static_cast<Index>(b) * n + token) * call.shape.query_heads + head) * call.parts.splits + split;
            if (d < call.parts.pitch) call.parts.sums[part * call.parts.pitch + d] = x;
            if (d == 0) call.parts.statistics[part] = of_row;
        }
    }
}

/// Joins the parts of a row, a block each.
template <class T>
__global__ __launch_bounds__(simple_threads) void merge_step_kernel(const __grid_constant__ Shape s, const StepParts parts,
                                                                    const __grid_constant__ TokensOut<T> out, const bool softmax) {
    extern __shared__ __align__(128) unsigned char memory[];
    float4* const of_teams = reinterpret_cast<float4*>(memory);                  // a thread's columns
    float* const factors = reinterpret_cast<float*>(of_teams + simple_threads);  // (splits)
    const int thread = static_cast<int>(threadIdx.x);
    device::wait_for_previous_kernel();
    device::let_next_kernel_start();
    const Index row = blockIdx.x, head = row % s.query_heads, token = row / s.query_heads % s.queries, b = row / s.query_heads / s.queries;
    const float2* const statistics = parts.statistics + row * parts.splits;
    const float* const sums = parts.sums + row * parts.splits * parts.pitch;
    float top = -INFINITY, l = 0.0f;
    for (int i = thread; i < parts.splits; i += simple_threads) top = fmaxf(top, statistics[i].x);
    top = over_block<true>(top);
    for (int i = thread; i < parts.splits; i += simple_threads) {
        const float2 part = statistics[i];
        factors[i] = part.y == 0.0f ? 0.0f : exp2_of(part.x - top);
        l += part.y == 0.0f ? 0.0f : part.y * factors[i];
    }
    l = over_block<false>(l);  // with barriers that factors need too
    const float norm = !softmax ? 1.0f : l == 0.0f ? 0.0f : 1.0f / l;
    if (thread == 0 && out.lse) out.lse(b, token, head) = l == 0.0f ? -INFINITY : (top + log2f(l)) * float(ln_2);

    // Four columns a thread; teams of threads take every so many-th part, and are added up in their order.
    const int width = static_cast<int>(s.value_dim), columns = parts.pitch / 4, teams = simple_threads / columns, team = thread / columns;
    float4 x{0.0f, 0.0f, 0.0f, 0.0f};
    if (team < teams) {
#pragma unroll 4
        for (int i = team; i < parts.splits; i += teams) {
            const float factor = factors[i];
            if (factor == 0.0f) continue;  // what lies there may be anything
            const float4 y = *reinterpret_cast<const float4*>(sums + static_cast<Index>(i) * parts.pitch + thread % columns * 4);
            x = {fmaf(y.x, factor, x.x), fmaf(y.y, factor, x.y), fmaf(y.z, factor, x.z), fmaf(y.w, factor, x.w)};
        }
        of_teams[thread] = x;
    }
    __syncthreads();
    for (int d = thread; d < width; d += simple_threads) {
        float y = 0.0f;
        for (int i = 0; i < teams; ++i) y += reinterpret_cast<const float*>(of_teams + i * columns)[d];
        out.o(b, token, head, d) = device::store_as<T>(y * norm);
    }
}

/// Any dtype and any sizes, without tensor cores and without splits: a block a row of queries.
template <class T, class Policy>
__global__ __launch_bounds__(simple_threads) void simple_step_kernel(const __grid_constant__ StepCall<T, Policy> call) {
    using A = acc_t<T>;
    __shared__ A weights[simple_threads];
    device::wait_for_previous_kernel();
    device::let_next_kernel_start();
    const Index row = blockIdx.x, head = row % call.shape.query_heads, token = row / call.shape.query_heads % call.shape.queries;
    const Index b = row / call.shape.query_heads / call.shape.queries, kv = head / call.shape.group();
    const int n = static_cast<int>(call.shape.queries), length = length_before(call.rows, b, n), position = length + static_cast<int>(token);
    const int begin = length < 0 ? 0 : call.mask.first_key(position), end = length < 0 ? 0 : call.mask.end_key(position, length + n);
    const A c = static_cast<A>(call.scale * log2_e), bias = call.softmax ? A(0) : static_cast<A>(call.bias(static_cast<int>(head)) * log2_e);
    Index first = 0;
    do {
        A largest = -A(INFINITY), total = 0, sum = 0;
        const Index column = first + threadIdx.x;
        for (int j0 = begin; j0 < end; j0 += simple_threads) {
            const int j = j0 + static_cast<int>(threadIdx.x), some = min(simple_threads, end - j0);
            A s = -A(INFINITY);
            CacheRows::Place at;
            if (j < end) {
                s = A(0);
                if (find_cached(call.rows, b, j, at)) {
                    s = dot<A>(call.tokens.q, b, token, head, call.k, at.batch, at.row, kv) * c;
                    if constexpr (Policy::channels != 0)
                        s += static_cast<A>(log2_e) * call.policy.strength(head) *
                             static_cast<A>(exp2((call.policy.g_new(b, token, kv) - call.policy.g(at.batch, at.row, kv)) * log2_e)) *
                             dot<A>(call.policy.c, b, token, head, call.policy.b, at.batch, at.row, kv);
                }
            }
            A shrink = 1;
            if (call.softmax) {
                const A top = over_block<true>(s), now = top > largest ? top : largest, shift = now == -A(INFINITY) ? A(0) : now;
                shrink = exp2(largest - shift);
                s = exp2(s - shift);
                total = total * shrink + over_block<false>(s);
                largest = now;
            } else {
                s = A(1) / (A(1) + exp2(-(s + bias)));
            }
            __syncthreads();
            weights[threadIdx.x] = s;
            __syncthreads();
            sum *= shrink;
            if (column < call.v.extent[3])
                for (int i = 0; i < some; ++i)
                    if (find_cached(call.rows, b, j0 + i, at)) sum += weights[i] * device::load_as<A>(call.v(at.batch, at.row, kv, column));
        }
        if (column < call.v.extent[3])
            call.out.o(b, token, head, column) = device::store_as<T>(!call.softmax ? sum : total == A(0) ? A(0) : sum / total);
        if (call.out.lse && first == 0 && threadIdx.x == 0)
            call.out.lse(b, token, head) = total == A(0) ? -A(INFINITY) : (largest + log2(total)) * A(ln_2);
        first += simple_threads;
    } while (first < call.v.extent[3]);
}

/// Calls f(dim, m) with the columns of tiles that hold a head and the tiles of rows of a block; f(0, 0) asks for the simple kernel:
/// float64, wider heads, and a GPU without the shared memory.
template <class T, int channels, class F>
Status dispatch_step(const Shape& s, F&& f) {
    using None = std::integral_constant<int, 0>;
    if constexpr (std::is_same_v<T, f64>) {
        return f(None{}, None{});
    } else {
        std::size_t limit = 0;
        INTERSTATE_RETURN_IF_ERROR(shared_memory_limit(limit));
        return dispatch_size<64, 128, 256>(s.head_dim > s.value_dim ? s.head_dim : s.value_dim, [&](auto dim) -> Status {
            if constexpr (dim > 0 && (channels == 0 || dim < 256)) {
                constexpr int many = most_row_tiles<T>(dim);
                if constexpr (many > 1)
                    if (s.group() * s.queries > 16 && StepForm<T, dim, channels, many>::shared <= limit)
                        return f(dim, std::integral_constant<int, many>{});
                if (StepForm<T, dim, channels, 1>::shared <= limit) return f(dim, std::integral_constant<int, 1>{});
            }
            return f(None{}, None{});
        });
    }
}

/// The parts that a sequence's rows are split into, by shapes alone: where there are few sequences and heads, what fills the GPU once;
/// where there are many, so many that no multiprocessor waits long for the last ones, and sequences of different lengths level out.
inline Index step_splits(const Options& options, const Shape& s, Index blocks, Index multiprocessors) {
    const Index rows = options.windowed() && options.window < s.keys - s.queries ? options.window + s.queries : s.keys;
    const Index most = rows > 128 ? ceil_div(rows, 128) : 1, slots = 3 * multiprocessors;
    if (blocks == 0) return 1;
    const Index once = slots / blocks, several = ceil_div(4 * slots, blocks) < 8 ? ceil_div(4 * slots, blocks) : 8;
    const Index splits = once >= 4 ? once : several;
    return splits < most ? splits : most;
}
inline Index multiprocessors() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
    return count;
}

/// Where the parts are.
struct StepWorkspace {
    Index row_tiles = 0;
    StepParts parts;
    /// For tiles of m times 16 rows; 0 is the simple kernel, which needs nothing.
    StepWorkspace(Arena& arena, const Options& options, const Shape& s, int m) {
        if (m == 0) return;
        row_tiles = ceil_div(s.group() * s.queries, 16 * m);
        parts.splits = static_cast<int>(step_splits(options, s, s.batch * s.kv_heads * row_tiles, multiprocessors()));
        parts.pitch = static_cast<int>(ceil_div(s.value_dim > 1 ? s.value_dim : 1, 4) * 4);
        const Index rows = parts.splits > 1 ? s.batch * s.queries * s.query_heads * parts.splits : 0;
        parts.statistics = arena.take<float2>(rows);
        parts.sums = arena.take<float>(rows * parts.pitch);
    }
};

/// Into which tiles of rows a step may go, of T and heads of a size.
template <class T, class F>
void each_row_tiles(const Shape& s, F&& f) {
    if constexpr (!std::is_same_v<T, f64>)
        (void)dispatch_size<64, 128, 256>(s.head_dim > s.value_dim ? s.head_dim : s.value_dim, [&](auto dim) {
            if constexpr (dim > 0) {
                f(1);
                if (most_row_tiles<T>(dim) > 1) f(most_row_tiles<T>(dim));
            }
            return 0;
        });
}
/// Bytes of StepWorkspace at most.
inline std::size_t step_workspace_size(const Options& options, const Shape& s) {
    std::size_t most = 0;
    (void)dispatch_dtype(s.dtype, [&](auto t) {
        each_row_tiles<decltype(t)>(s, [&](int m) {
            Arena arena;
            StepWorkspace(arena, options, s, m);
            most = arena.required() > most ? arena.required() : most;
        });
        return 0;
    });
    return most;
}

/// The kernels that read the cache. `dim` and `m` as dispatch_step says.
template <class T, int dim, int m, class Policy>
Status launch_step(const cuda& exec, const Options& options, const Shape& s, const CacheRows& rows, const View<const T, 4>& k,
                   const View<const T, 4>& v, const Tokens<T>& tokens, const TokensOut<T>& out, Arena& arena, const Policy& policy) {
    using A = acc_t<T>;
    const StepWorkspace memory(arena, options, s, m);
    const StepCall<T, Policy> call{.shape = s,
                                   .mask = {options.causal, static_cast<int>(options.window < s.keys ? options.window : s.keys)},
                                   .rows = rows,
                                   .k = k,
                                   .v = v,
                                   .tokens = tokens,
                                   .out = out,
                                   .softmax = options.score == Score::softmax,
                                   .scale = static_cast<A>(scale_of(options, s.head_dim)),
                                   .option_bias = static_cast<A>(options.bias),
                                   .wide_q = device::moves_wide(tokens.q, s.head_dim),
                                   .wide_k = device::moves_wide(k, s.head_dim),
                                   .wide_v = device::moves_wide(v, s.value_dim),
                                   .policy = policy,
                                   .row_tiles = static_cast<int>(memory.row_tiles),
                                   .parts = memory.parts};
    const Index queries = s.batch * s.queries * s.query_heads;
    INTERSTATE_RETURN_IF_ERROR(check_blocks(queries));
    const dim3 of_rows(static_cast<unsigned>(queries));
    if constexpr (m == 0) {
        return launch(exec, "attention.cuda.step.simple", simple_step_kernel<T, Policy>, {of_rows, dim3(simple_threads), 0, true}, call);
    } else {
        using Form = StepForm<T, dim, Policy::channels, m>;
        const Index blocks = queries > 0 ? s.batch * s.kv_heads * memory.row_tiles * memory.parts.splits : 0;
        INTERSTATE_RETURN_IF_ERROR(check_blocks(blocks));
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "attention.cuda.step.split", split_step_kernel<T, dim, m, Policy>,
                                          {dim3(static_cast<unsigned>(blocks)), dim3(Form::threads), Form::shared, true}, call));
        if (memory.parts.splits == 1) return {};
        return launch(exec, "attention.cuda.step merge", merge_step_kernel<T>,
                      {of_rows, dim3(simple_threads), simple_threads * sizeof(float4) + static_cast<std::size_t>(memory.parts.splits) * sizeof(float), true},
                      s, memory.parts, out, call.softmax);
    }
}

template <class T>
Status run_step(const cuda& exec, const Options& options, const State<T>& state, const Tokens<T>& tokens, const TokensOut<T>& out, Workspace ws) {
    const Shape s = shape_of(state, tokens);
    const CacheRows rows = cache_rows(state);
    INTERSTATE_RETURN_IF_ERROR(check_blocks(s.batch * s.queries));
    INTERSTATE_RETURN_IF_ERROR(launch(exec, "attention.cuda.step write", write_tokens_kernel<T>,
                                      {dim3(static_cast<unsigned>(s.batch * s.queries)), dim3(256), 0, true}, rows,
                                      Mask{options.causal, static_cast<int>(options.window < s.keys ? options.window : s.keys)},
                                      static_cast<int>(s.queries), tokens.k, tokens.v,
                                      state.k, state.v, device::moves_wide(tokens.k, s.head_dim) && device::moves_wide(state.k, s.head_dim),
                                      device::moves_wide(tokens.v, s.value_dim) && device::moves_wide(state.v, s.value_dim), exec.flags));
    return dispatch_step<T, 0>(s, [&](auto dim, auto m) {
        Arena arena(ws.data);
        return launch_step<T, dim, m>(exec, options, s, rows, View<const T, 4>(state.k), View<const T, 4>(state.v), tokens, out, arena, StepPlain{});
    });
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
