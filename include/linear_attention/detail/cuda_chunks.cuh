// What the chunked CUDA kernels of linear attention share: sizes, where a block works, and a state in registers and in shared memory.
// Equations: docs/ops/linear_attention.md, "In chunks" and "On the GPU".
#pragma once

#include <algorithm>

#include <interstate/cuda/sequences.cuh>
#include <interstate/cuda/tiles.cuh>
#include <interstate/workspace.hpp>
#include <linear_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention::detail {

/// Tokens between states that are kept; lengths that run beside each other are multiples of it.
inline constexpr int segment = 512;

/// How T is multiplied. A state in bfloat16 is two matrices, the second what rounding takes from the first. float16 becomes float, for its range.
template <class T>
struct Form {
    using Element = float;
    static constexpr device::Precision precision = std::is_same_v<T, f16> ? device::Precision::cut : device::Precision::exact;
    static constexpr int chunk = 32, state_parts = 1;
};
template <>
struct Form<bf16> {
    using Element = bf16;
    static constexpr device::Precision precision = device::Precision::bfloat;
    static constexpr int chunk = 64, state_parts = 2;
};

/// A block for heads of up to `dim` columns. A warp has 16 rows and a group of columns, of a product with a row for each token as of a state.
template <class T, int dim>
struct Block {
    using E = typename Form<T>::Element;
    static constexpr device::Precision precision = Form<T>::precision;
    static constexpr int chunk = Form<T>::chunk, parts = Form<T>::state_parts, warps = dim == 64 ? 4 : 8, threads = 32 * warps;
    static constexpr int row_groups = chunk / 16, column_groups = warps / row_groups, columns = dim / column_groups;
    using Tile = device::Swizzled<E, chunk, dim>;
    using Matrix = device::Swizzled<E, dim, dim>;
    static constexpr int blocks = dim == 64 ? 2 : 1;  // a multiprocessor
    /// A record of a state: S, row by row, then z.
    static constexpr int record = dim * dim + dim;
    static constexpr std::size_t shared(int tiles, int floats) {
        return sizeof(E) * (tiles * Tile::size + parts * Matrix::size) + sizeof(float) * static_cast<std::size_t>(dim + floats);
    }
    static constexpr std::size_t sum_shared = sizeof(E) * 4 * Tile::size;
    static constexpr std::size_t forward_shared = shared(6, 0);
    static constexpr std::size_t query_shared = shared(8, (3 + column_groups) * chunk);
    static constexpr std::size_t key_shared = shared(8, 4 * chunk);
    static constexpr std::size_t most_shared = std::max(query_shared, key_shared);
};

/// Rows of every sequence cut into spans of `size`: how many numbers they have. An empty sequence has one too, to hand its state on.
inline Index span_count(const Shape& s, Index size) {
    return s.packed() ? (s.sequences > 0 ? s.length / size + s.sequences : 0) : s.batch * std::max<Index>(ceil_div(s.length, size), 1);
}

/// What the kernels of a call read.
template <class T>
struct Call {
    Shape shape;
    Inputs<T> in;
    bool elu1, divides, wide_q, wide_k, wide_v;
};
template <class T>
Call<T> call_of(const Options& options, const Inputs<T>& in) {
    const Shape s = shape_of(in);
    return {.shape = s,
            .in = in,
            .elu1 = options.feature_map == FeatureMap::elu1,
            .divides = options.divides(),
            .wide_q = device::moves_wide(in.q, s.head_dim),
            .wide_k = device::moves_wide(in.k, s.head_dim),
            .wide_v = device::moves_wide(in.v, s.value_dim)};
}

inline namespace INTERSTATE_KERNELS {

/// phi of eq. 1, without a branch: max(x, 0) + exp(min(x, 0)).
__device__ inline float feature_of(float x) { return fmaxf(x, 0.0f) + device::exp2_of(device::least_of(x, 0.0f) * 1.44269504f); }

/// x as a factor of products has it.
template <class T>
__device__ float rounding(float x) {
    if constexpr (std::is_same_v<T, bf16>) return device::load_as<float>(device::store_as<bf16>(x));
    return device::rounded<Form<T>::precision>(x);
}

/// A span of a sequence.
struct Span {
    Index batch, row;            // its first row
    int sequence, index, count;  // which span of the sequence; rows
    bool exists, last;
    /// Span `slot` of those of `size` rows.
    __device__ Span(const Shape& s, const View<const std::int32_t, 1>& cu, Index slot, int size) {
        RowRange rows{0, s.length};
        if (s.packed()) {
            sequence = static_cast<int>(device::recurrence_of(cu, s.sequences, s.length, slot, size));
            index = static_cast<int>(slot - device::first_tile(cu, sequence, s.length, size));
            rows = device::checked_rows(cu, sequence, s.length);
            batch = 0;
        } else {
            const Index spans = s.length > 0 ? ceil_div(s.length, size) : 1;
            sequence = static_cast<int>(slot / spans);
            index = static_cast<int>(slot % spans);
            batch = sequence;
        }
        row = rows.begin + static_cast<Index>(index) * size;
        const Index left = rows.end - row;
        count = static_cast<int>(left < 0 ? 0 : left < size ? left : size);
        exists = index == 0 || (index > 0 && left > 0);
        last = left <= size;
    }
};

/// A warp's share of a state, in registers, as products leave it; z, of the same rows, in every lane.
template <class T, int dim>
struct StateRows {
    using B = Block<T, dim>;
    static constexpr int row_groups = dim / 16, columns = dim / (B::warps / row_groups), tiles = columns / 8;
    float s[tiles][4], z[2];
    int thread = static_cast<int>(threadIdx.x);

    __device__ void clear() {
        device::clear(s);
        z[0] = z[1] = 0.0f;
    }
    __device__ int first_row() const { return thread / 32 % row_groups * 16; }
    __device__ int first_column() const { return thread / 32 / row_groups * columns; }
    __device__ bool has_sum() const { return first_column() == 0; }
    __device__ int row(int e) const { return first_row() + thread % 32 / 4 + e / 2 * 8; }
    __device__ int column(int t) const { return first_column() + 8 * t + thread % 4 * 2; }

    /// From a record and to one.
    __device__ void load(const float* record) {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
#pragma unroll
            for (int t = 0; t < tiles; ++t) {
                const float2 pair = *reinterpret_cast<const float2*>(record + row(e) * dim + column(t));
                s[t][e] = pair.x;
                s[t][e + 1] = pair.y;
            }
            z[e / 2] = record[dim * dim + row(e)];
        }
    }
    __device__ void store(float* record) const {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
#pragma unroll
            for (int t = 0; t < tiles; ++t) *reinterpret_cast<float2*>(record + row(e) * dim + column(t)) = {s[t][e], s[t][e + 1]};
            if (has_sum() && thread % 4 == 0) record[dim * dim + row(e)] = z[e / 2];
        }
    }
};

/// A record in shared memory of tensors, null ones being zeros, and the way back.
template <class T, int dim>
__device__ void fill_record(float* record, const View<const float, 4>& S, const View<const float, 3>& Z, Index n, Index h, int thread) {
#pragma unroll 1
    for (int i = thread; i < dim * dim; i += Block<T, dim>::threads) {
        const int m = i / dim, c = i % dim;
        record[i] = S && m < S.extent[2] && c < S.extent[3] ? S(n, h, m, c) : 0.0f;
    }
#pragma unroll 1
    for (int m = thread; m < dim; m += Block<T, dim>::threads) record[dim * dim + m] = Z && m < Z.extent[2] ? Z(n, h, m) : 0.0f;
}
template <class T, int dim>
__device__ void take_record(const float* record, const View<float, 4>& S, const View<float, 3>& Z, Index n, Index h, int thread) {
#pragma unroll 1
    for (int i = thread; S && i < dim * dim; i += Block<T, dim>::threads) {
        const int m = i / dim, c = i % dim;
        if (m < S.extent[2] && c < S.extent[3]) S(n, h, m, c) = record[i];
    }
#pragma unroll 1
    for (int m = thread; Z && m < Z.extent[2]; m += Block<T, dim>::threads) Z(n, h, m) = record[dim * dim + m];
}

/// Rows of a transposed matrix in shared memory as a left factor: columns `row` .. of it.
template <class E, int rows, int columns>
struct Transposed16 {
    device::SwizzledLoader<E, rows, device::panel_columns<E, columns>, device::Read::transposed, true> loader;
    __device__ Transposed16(const device::Swizzled<E, rows, columns>& a, int row, int lane) : loader(device::rows_of(a.transposed(), row, 0, lane)) {}
    template <device::Precision precision>
    __device__ void load(device::Factors<float, precision, 2>& f, int i, int k) const {
        loader.load(f, 16 * i, k);
    }
};

/// sum += a (16 rows, over k) times a column of numbers, ones where null, of which what rounding takes is a second column. In every lane of a row.
template <class T, int count, class A>
__device__ void multiply_column(float (&sum)[2], const A& a, const float* x, int lane) {
    constexpr device::Precision precision = Form<T>::precision;
    float c[1][4];
    device::clear(c);
    device::Sums<precision, 1> of(c);
#pragma unroll
    for (int k = 0; k < count; k += device::depth<precision>) {
        device::Factors<float, precision, 2> fa;
        device::Factors<float, precision, 1> fx;
        a.load(fa, 0, k);
#pragma unroll
        for (int pair = 0; pair < device::k_pairs<precision>; ++pair) {
            const int at = k + 8 * pair + lane % 4 * 2;
            const float x0 = x ? x[at] : 1.0f, x1 = x ? x[at + 1] : 1.0f, kept0 = rounding<T>(x0), kept1 = rounding<T>(x1);
            const float y0 = lane < 4 ? kept0 : x0 - kept0, y1 = lane < 4 ? kept1 : x1 - kept1;
            fx.set(0, pair, lane < 8 ? y0 : 0.0f, lane < 8 ? y1 : 0.0f);
        }
        of.add(0, fa, fx);
    }
    of.finish();
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] += __shfl_sync(0xffffffffu, c[0][2 * i] + c[0][2 * i + 1], lane / 4 * 4);
}

/// S += X^T Y over the tokens of a chunk.
template <class T, int dim>
__device__ void add_outer(StateRows<T, dim>& state, const typename Block<T, dim>::Tile& x, const typename Block<T, dim>::Tile& y, int lane) {
    using B = Block<T, dim>;
    constexpr int chunk = B::chunk, tiles = state.tiles, part = tiles < 8 ? tiles : 8;
    const Transposed16<typename B::E, chunk, dim> rows(x, state.first_row(), lane);
#pragma unroll
    for (int t0 = 0; t0 < tiles; t0 += part) {
        // What tensor cores add to is cut with every product: a long sum is rounded here instead.
        float sum[1][part][4];
        device::clear(sum);
        device::multiply_rows<B::precision, chunk>(sum, rows, y.transposed(), state.first_column() + 8 * t0, 0, lane);
#pragma unroll
        for (int t = 0; t < part; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) state.s[t0 + t][e] += sum[0][t][e];
    }
}
/// z += X^T weight; ones where null.
template <class T, int dim>
__device__ void add_sum(StateRows<T, dim>& state, const typename Block<T, dim>::Tile& x, const float* weight, int lane) {
    using B = Block<T, dim>;
    if (state.has_sum()) multiply_column<T, B::chunk>(state.z, Transposed16<typename B::E, B::chunk, dim>(x, state.first_row(), lane), weight, lane);
}

/// A state as a right factor, to more bits than its dtype has, because one error in it is in every row of a chunk: in bfloat16 what rounding leaves of
/// it and what it takes, else float to 22 bits; and z, as float.
template <class T, int dim>
struct StateMatrix {
    using B = Block<T, dim>;
    static constexpr device::Precision precision = B::precision == device::Precision::cut ? device::Precision::exact : B::precision;
    typename B::E* data;
    float* z;
    __device__ typename B::Matrix part(int i) const { return {data + i * B::Matrix::size}; }
    __device__ void put(const StateRows<T, dim>& state) const {
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
#pragma unroll
            for (int t = 0; t < state.tiles; ++t) {
                const float x = state.s[t][e], y = state.s[t][e + 1];
                const device::Pair<typename B::E> kept = device::pack<typename B::E>(x, y);
                *reinterpret_cast<device::Pair<typename B::E>*>(part(0).at(state.row(e), state.column(t))) = kept;
                if constexpr (B::parts == 2) {
                    float2 of;
                    device::unpack<typename B::E>(kept, of.x, of.y);
                    device::put_pair(part(1).at(state.row(e), state.column(t)), x - of.x, y - of.y);
                }
            }
            if (state.has_sum() && state.thread % 4 == 0) z[state.row(e)] = state.z[e / 2];
        }
    }
    /// c += rows of a times S (over m), columns n .. of it, or times S^T (over c), columns n .. of that.
    template <bool of_transpose, int tiles, class A>
    __device__ void multiply(float (&c)[1][tiles][4], const A& a, int n, int lane) const {
#pragma unroll
        for (int i = 0; i < B::parts; ++i) {
            if constexpr (of_transpose)
                device::multiply_rows<precision, dim>(c, a, part(i).as_stored(), n, 0, lane);
            else
                device::multiply_rows<precision, dim>(c, a, part(i).transposed(), n, 0, lane);
        }
    }
};

/// Elements of a tile, 16 bytes at a time: f(element, row, column).
template <class T, int dim, class F>
__device__ void each_element(const typename Block<T, dim>::Tile& x, int thread, F&& f) {
    using B = Block<T, dim>;
    using E = typename B::E;
    constexpr int V = device::chunk_columns<E>;
    struct alignas(16) Chunk {
        device::Pair<E> pair[V / 2];
    };
    static_assert(B::Tile::size / V % B::threads == 0);
#pragma unroll
    for (int i = 0; i < B::Tile::size / V / B::threads; ++i) {
        const int unit = thread + i * B::threads, row = unit / (dim / V), column = unit % (dim / V) * V;
        auto& at = *reinterpret_cast<Chunk*>(x.at(row, column));
        Chunk chunk = at;
#pragma unroll
        for (int k = 0; k < V / 2; ++k) {
            float2 y;
            device::unpack<E>(chunk.pair[k], y.x, y.y);
            chunk.pair[k] = device::pack<E>(device::rounded<B::precision>(f(y.x, row, column + 2 * k)), device::rounded<B::precision>(f(y.y, row, column + 2 * k + 1)));
        }
        at = chunk;
    }
}

/// phi of the first `count` rows and `width` columns, in place (eq. 1); what is behind them stays zero.
template <class T, int dim>
__device__ void map_features(const typename Block<T, dim>::Tile& x, int count, Index width, int thread) {
    if (count == Block<T, dim>::chunk && width == dim)
        each_element<T, dim>(x, thread, [](float y, int, int) { return feature_of(y); });
    else
        each_element<T, dim>(x, thread, [&](float y, int row, int column) { return row < count && column < width ? feature_of(y) : 0.0f; });
}

/// Rows times a number each, in place.
template <class T, int dim>
__device__ void scale_rows(const typename Block<T, dim>::Tile& x, const float* by, int thread) {
    each_element<T, dim>(x, thread, [&](float y, int row, int) { return y * by[row]; });
}

/// Takes a warp's 16 rows and group of columns of a product to a tensor, by way of its own share of a tile that nobody reads any more.
template <class T, int dim>
__device__ void take_out(const float (&c)[Block<T, dim>::columns / 8][4], const typename Block<T, dim>::Tile& x, int row0, int column0, const device::Rows<T>& to, int lane) {
    using B = Block<T, dim>;
#pragma unroll
    for (int e = 0; e < 4; e += 2)
#pragma unroll
        for (int t = 0; t < B::columns / 8; ++t) device::put_pair(x.at(row0 + lane / 4 + e / 2 * 8, column0 + 8 * t + lane % 4 * 2), c[t][e], c[t][e + 1]);
    __syncwarp();
    x.template copy_part_out<16, B::columns>(to, row0, column0, lane);
}

/// Running sums over the spans of each sequence and head: of record i comes what is before it (or, backwards, behind it), beginning with S and Z
/// of the sequence; what is left in the end goes to `S_end` and `Z_end`. A thread an element.
template <int dim>
__global__ __launch_bounds__(256) void scan_records_kernel(Shape shape, View<const std::int32_t, 1> cu, int size, bool backwards, float* records,
                                                           View<const float, 4> S, View<const float, 3> Z, View<float, 4> S_end, View<float, 3> Z_end) {
    constexpr int record = dim * dim + dim;
    constexpr unsigned blocks = (record + 255) / 256;
    const int i = static_cast<int>(blockIdx.x % blocks * blockDim.x + threadIdx.x);
    if (i >= record) return;
    const Index n = blockIdx.x / blocks / shape.kv_heads, h = blockIdx.x / blocks % shape.kv_heads;
    Index first = 0, spans = 0;
    if (shape.packed()) {
        const RowRange rows = device::checked_rows(cu, n, shape.length);
        first = device::first_tile(cu, n, shape.length, size);
        spans = ceil_div(rows.end - rows.begin, size);
    } else {
        spans = ceil_div(shape.length, size);
        first = n * (spans > 0 ? spans : 1);
    }
    const bool is_sum = i >= dim * dim;
    const int m = is_sum ? i - dim * dim : i / dim, c = is_sum ? 0 : i % dim;
    const bool there = m < shape.head_dim && c < shape.value_dim;
    float sum = 0.0f;
    if (is_sum ? static_cast<bool>(Z) && m < shape.head_dim : static_cast<bool>(S) && there) sum = is_sum ? Z(n, h, m) : S(n, h, m, c);
    const Index step = (backwards ? -1 : 1) * shape.kv_heads * record;
    float* at = records + ((first + (backwards ? spans - 1 : 0)) * shape.kv_heads + h) * record + i;
    constexpr int ahead = 8;  // loads that fly at once
    for (Index k = 0; k < spans; k += ahead, at += ahead * step) {
        float add[ahead];
#pragma unroll
        for (int j = 0; j < ahead; ++j) add[j] = k + j < spans ? at[j * step] : 0.0f;
#pragma unroll
        for (int j = 0; j < ahead; ++j) {
            if (k + j < spans) at[j * step] = sum;
            sum += add[j];
        }
    }
    if (is_sum ? static_cast<bool>(Z_end) && m < shape.head_dim : static_cast<bool>(S_end) && there) (is_sum ? Z_end(n, h, m) : S_end(n, h, m, c)) = sum;
}

/// Launches the scan above.
template <int dim>
Status scan_records(const cuda& exec, const Shape& s, const View<const std::int32_t, 1>& cu, int size, bool backwards, float* records, const View<const float, 4>& S,
                    const View<const float, 3>& Z, const View<float, 4>& S_end, const View<float, 3>& Z_end) {
    return launch(exec, "linear_attention.cuda scan", scan_records_kernel<dim>,
                  {dim3(static_cast<unsigned>(ceil_div(dim * dim + dim, 256) * s.states() * s.kv_heads)), dim3(256)}, s, cu, size, backwards, records, S, Z, S_end,
                  Z_end);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace linear_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
