// What the CUDA kernels of attention share: where a block works, which keys a row reads, and products whose left factor is
// in registers. Equations: docs/ops/attention.md.
#pragma once

#include <attention/params.hpp>
#include <interstate/cuda/sequences.cuh>
#include <interstate/cuda/tiles.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

using device::clear;
using device::exp2_of;
using device::Lane;
using device::multiply_rows;
using device::Rows16;
using device::Shared16;

inline constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

/// How T is multiplied: as it is stored, with float32 kept to 22 bits.
template <class T>
inline constexpr device::Precision precision_of = std::is_same_v<T, bf16>  ? device::Precision::bfloat
                                                  : std::is_same_v<T, f16> ? device::Precision::half
                                                                           : device::Precision::exact;

/// A tile of rows of one head: of queries for o and dq, of keys for dk and dv.
struct Place {
    Index batch;
    int head;
    Index query0, key0;  // where the sequence's rows begin in the tensors
    int queries, keys;   // their number
    int first;           // the tile's first row in the sequence
    /// Query i stands at position i + offset().
    __device__ int offset() const { return keys - queries; }
};

/// Tiles of `tile` rows of an axis of `rows`: those of one head follow each other, so that blocks which run at the same time
/// share what they read.
struct Tiling {
    Index tiles, heads, blocks;
    Tiling(const Shape& s, Index rows, Index heads_, Index tile)
        : tiles(s.packed() ? rows / tile + s.sequences : ceil_div(rows, tile)), heads(heads_), blocks(tiles * heads * s.batch) {}
};

/// Places block `block`; false where it has nothing to do. `backwards`: the last tile first, which is the longest where
/// queries read what is before them.
__device__ inline bool find_place(Place& at, const Shape& s, const View<const std::int32_t, 1>& cu, const Tiling& tiling, Index rows,
                                  int tile, bool backwards, unsigned block) {
    const auto tiles = static_cast<unsigned>(tiling.tiles), heads = static_cast<unsigned>(tiling.heads);
    unsigned slot = block % tiles;
    if (backwards) slot = tiles - 1 - slot;
    at.head = static_cast<int>(block / tiles % heads);
    if (!s.packed()) {
        at.batch = block / tiles / heads;
        at.query0 = at.key0 = 0;
        at.queries = static_cast<int>(s.queries);
        at.keys = static_cast<int>(s.keys);
        at.first = static_cast<int>(slot) * tile;
        return true;
    }
    if (s.sequences == 0) return false;
    const Index sequence = device::recurrence_of(cu, s.sequences, rows, slot, tile);
    const RowRange range = device::checked_rows(cu, sequence, rows);
    at.batch = 0;
    at.query0 = at.key0 = range.begin;
    at.queries = at.keys = static_cast<int>(range.end - range.begin);
    at.first = static_cast<int>(slot - device::first_tile(cu, sequence, rows, tile)) * tile;
    return at.first >= 0 && at.first < at.keys;
}

/// Which keys a position reads and which positions read a key (eq. 5), in ints.
struct Mask {
    bool causal;
    int window;  // 0: none
    __device__ int first_key(int position) const { return window > 0 ? max(position - window + 1, 0) : 0; }
    __device__ int end_key(int position, int keys) const {
        const int end = causal ? position + 1 : window > 0 ? position + min(window, keys) : keys;
        return min(max(end, 0), keys);
    }
    __device__ int first_position(int key) const { return causal ? key : window > 0 ? max(key - window + 1, 0) : 0; }
    __device__ int end_position(int key, int keys) const { return window > 0 ? key + min(window, keys - key) : keys; }
};

/// Everything that the kernels of a call read. `Policy` is what a guest adds (docs/ops/attention.md, "Policies").
template <class T, class Policy>
struct Call {
    using A = acc_t<T>;
    Shape shape;
    Mask mask;
    Inputs<T> in;
    bool softmax;   // or sigmoid
    A scale;        // of products, as given
    A option_bias;  // sigmoid, where in.bias is absent
    bool wide_q, wide_k, wide_v;
    Policy policy;
    __device__ A bias(int head) const { return in.bias ? in.bias(head) : option_bias; }
};

template <class T, class Policy>
Call<T, Policy> call_of(const Options& options, const Inputs<T>& in, const Policy& policy) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    return {.shape = s,
            .mask = {options.causal, static_cast<int>(options.window < s.keys ? options.window : s.keys)},
            .in = in,
            .softmax = options.score == Score::softmax,
            .scale = static_cast<A>(scale_of(options, s.head_dim)),
            .option_bias = static_cast<A>(options.bias),
            .wide_q = device::moves_wide(in.q, s.head_dim),
            .wide_k = device::moves_wide(in.k, s.head_dim),
            .wide_v = device::moves_wide(in.v, s.value_dim),
            .policy = policy};
}

/// A grid has fewer than 2^31 blocks.
inline Status check_blocks(Index blocks) {
    if (blocks < (Index{1} << 31)) return {};
    return Status::error(StatusCode::unsupported, "attention on cuda: %lld blocks of rows, heads and batch rows, must be below 2^31",
                         static_cast<long long>(blocks));
}

/// Attention itself, and what a policy may have: an object that kernels get by value.
struct Plain {
    /// score += score_term(head, query_position, key_position), after the scale and before the mask; positions count on the key
    /// axis of their sequence.
    ///     __device__ float score_term(int head, int query_position, int key_position) const;
    static constexpr bool adds_term = false;
    /// score[i,j] += scale c[i].b[j] 2^(query_level[i] - key_level[j]) with as many channels (docs/ops/attention.md); see Channels.
    static constexpr int channels = 0;
};

/// Rows that share a level: queries, or keys, counted from the first of their sequence.
inline constexpr int level_tile = 64;

/// How far below its tile's level a row's own may be, in powers of two, before the row is steep.
template <class T>
inline constexpr float level_range = std::is_same_v<T, f16> ? 4.0f : 80.0f;

/// A policy's channels as the kernels read them: c and b have the distance between a row's own level and the level that is
/// written down for it in them. That is an integer, the same for a whole tile, so that tiles are joined by a power of two,
/// which rounds nothing; but rows further below it than level_range, the steep ones, which come last in their tile, have
/// their own. A row of c or b and its level depend on nothing behind the row: changes of later tokens change no bit.
template <class T, int count>
struct Channels {
    static constexpr bool adds_term = false;
    static constexpr int channels = count;  // a power of two from 16 on; more than there are, are zero
    View<const T, 4> c;                     // (B, Lq, Hq, count)
    View<const T, 4> b;                     // (B, Lk, Hkv, count)
    View<const double, 3> query_level;      // (B, Lq, Hkv), stride 1 along Lq; null: no decay
    View<const double, 3> key_level;        // (B, Lk, Hkv), stride 1 along Lk
    View<float, 4> dc, db;                  // of c, over scale, and of b; backward
};

/// 1 / (1 + 2^-x).
__device__ inline float sigmoid2(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + exp2_of(-x)));
    return y;
}

/// The same times a power of two.
template <device::Precision precision, class E, int rows, int columns>
struct Powered16 {
    Shared16<E, rows, columns> of;
    device::Power<precision> power;
    __device__ void load(device::Factors<float, precision, 2>& f, int i, int k) const {
        of.load(f, i, k);
        f.multiply(power);
    }
};

/// Levels of the rows of one head of a sequence.
struct Levels {
    const double* data;  // null: no decay
    int last;

    __device__ Levels(const View<const double, 3>& levels, Index batch, Index row0, int kv_head, int rows)
        : data(levels && rows > 0 ? &levels(batch, row0, kv_head) : nullptr), last(rows - 1) {}
    /// Of a row; of the last one where there is none.
    __device__ double operator()(int row) const { return data ? data[min(max(row, 0), last)] : 0.0; }
};

/// The level of a tile, that of its first row, and of its last row.
struct Level {
    double first = 0.0, last = 0.0;
    Level() = default;
    __device__ Level(const Levels& levels, int row) : first(levels(row / level_tile * level_tile)), last(levels(row / level_tile * level_tile + level_tile - 1)) {}
};

/// How tiles of queries and of keys are joined, step by step: the levels of the next step are on their way while one runs.
template <int channels>
class Joints {
  public:
    /// `queries` and `keys`: rows of the tiles of the first step.
    template <class Policy>
    __device__ Joints(const Policy& policy, const Place& at, int kv_head, int queries, int keys)
        : queries_(policy.query_level, at.batch, at.query0, kv_head, at.queries), keys_(policy.key_level, at.batch, at.key0, kv_head, at.keys),
          of_queries_(queries_, queries), of_keys_(keys_, keys) {
        next();
    }
    __device__ void load_queries(int row) { of_queries_ = Level(queries_, row); }
    __device__ void load_keys(int row) { of_keys_ = Level(keys_, row); }
    /// After the loads.
    __device__ void next() {
        power_ = __int_as_float((min(max(__double2int_rn(of_queries_.first - of_keys_.first), -127), 127) + 127) << 23);
        // Levels fall from row to row: the first query and the last key are the nearest.
        steep_ = (of_queries_.first != of_queries_.last || of_keys_.first != of_keys_.last) && !(of_queries_.first - of_keys_.last < -127.0);
    }
    /// What joins rows that are not steep, a power of two or 0.
    __device__ float power() const { return power_; }
    /// Whether some rows are steep and near enough to be joined.
    __device__ bool steep() const { return steep_; }
    __device__ bool steep(int query, int key) const {
        return queries_(query) != queries_(query / level_tile * level_tile) || keys_(key) != keys_(key / level_tile * level_tile);
    }
    /// What joins any two rows, finite also where a mask will leave the pair out. NaN stays NaN.
    __device__ float between(int query, int key) const {
        const auto x = static_cast<float>(queries_(query) - keys_(key));
        return exp2_of(x > 126.0f ? 126.0f : x);
    }

  private:
    Levels queries_, keys_;
    Level of_queries_, of_keys_;
    float power_;
    bool steep_;
};
template <>
class Joints<0> {
  public:
    template <class... Unused>
    __device__ explicit Joints(const Unused&...) {}
};

/// x[i][t][e] = f(n, i, t, e, x[i][t][e]), n = 0, 1, .., in a loop: slow, by way of memory, for what is rare and would cost the rest registers.
template <int m, int tiles, class F>
__device__ void each_apart(float (&x)[m][tiles][4], F&& f) {
    float copy[m * tiles * 4];
#pragma unroll
    for (int n = 0; n < m * tiles * 4; ++n) copy[n] = x[n / (4 * tiles)][n / 4 % tiles][n % 4];
#pragma unroll 1
    for (int n = 0; n < m * tiles * 4; ++n) copy[n] = f(n, n / (4 * tiles), n / 4 % tiles, n % 4, copy[n]);
#pragma unroll
    for (int n = 0; n < m * tiles * 4; ++n) x[n / (4 * tiles)][n / 4 % tiles][n % 4] = copy[n];
}

/// What channels add to scores without scale, a's rows times columns n .. of b; pair(i, t, e) has a lane's rows of queries, x, and keys, y.
template <device::Precision precision, int channels, int m, int tiles, class E, int rows, class B, class F>
__device__ void add_channels(float (&s)[m][tiles][4], const Shared16<E, rows, channels>& a, const B& b, int n, const Joints<channels>& joints, int lane, F&& pair) {
    if (joints.power() != 0.0f)
        multiply_rows<precision, channels>(s, Powered16<precision, E, rows, channels>{a, device::Power<precision>(joints.power())}, b, n, 0, lane);
    if (!joints.steep()) return;
    float joined[m * tiles * 4];
#pragma unroll
    for (int k = 0; k < m * tiles * 4; ++k) joined[k] = s[k / (4 * tiles)][k / 4 % tiles][k % 4];
    clear(s);
    multiply_rows<precision, channels>(s, a, b, n, 0, lane);
    each_apart(s, [&](int k, int i, int t, int e, float value) {
        const int2 at = pair(i, t, e);
        return joints.steep(at.x, at.y) ? value * joints.between(at.x, at.y) : joined[k];
    });
}

/// sum += x b, rows of score gradients x times columns of b, as add_channels joins them.
template <device::Precision precision, int channels, int count, int m, int tiles, class B, class F>
__device__ void add_channel_gradients(float (&sum)[m][channels / 8][4], float (&x)[m][tiles][4], const B& b, int first, const Joints<channels>& joints, int lane, F&& pair) {
    if (joints.steep())
        each_apart(x, [&](int, int i, int t, int e, float value) {
            const int2 at = pair(i, t, e);
            return value * joints.between(at.x, at.y);
        });
    const float power = joints.steep() ? 1.0f : joints.power();
    if (power == 0.0f) return;
    float of_tile[m][channels / 8][4];
    clear(of_tile);
    multiply_rows<precision, count>(of_tile, Rows16<precision, m, count>(x), b, 0, first, lane);
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
        for (int t = 0; t < channels / 8; ++t)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[i][t][e] = fmaf(of_tile[i][t][e], power, sum[i][t][e]);
}

}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
