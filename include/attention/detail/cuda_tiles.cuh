// What the CUDA kernels of attention share: where a block works, which keys a row reads, and products whose left factor is
// in registers. Equations: docs/ops/attention.md.
#pragma once

#include <attention/params.hpp>
#include <interstate/cuda/sequences.cuh>
#include <interstate/cuda/swizzle.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {
namespace detail {

inline constexpr double log2_e = 1.4426950408889634, ln_2 = 0.6931471805599453;

/// How T is multiplied: as it is stored, with float32 kept to 22 bits.
template <class T>
inline constexpr device::Precision precision_of = std::is_same_v<T, bf16>  ? device::Precision::bfloat
                                                  : std::is_same_v<T, f16> ? device::Precision::half
                                                                           : device::Precision::exact;

struct Lane {
    int group, quad;
    __device__ explicit Lane(int lane) : group(lane / 4), quad(lane % 4) {}
};

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
    /// score[i,j] += strength exp(g[i] - g[j]) C[i].B[j] with as many channels (docs/ops/attention.md); see Channels.
    static constexpr int channels = 0;
};

/// Tokens whose decay is measured from the first of them, counted from the beginning of their sequence.
inline constexpr int decay_tile = 64;

/// How far g may fall inside a decay tile, in powers of two, before keys are steep.
template <class T>
inline constexpr float decay_limit = std::is_same_v<T, f16> ? 1.0f : 80.0f;

/// A policy's channels as the kernels read them. B is stored with the decay since the first key of its tile in it, exp(g[first] -
/// g[j]) B[j], as long as that is no more than 2^decay_limit; keys from there to the end of the tile, `steep` ones, are stored as they
/// are, and their decay is formed pair by pair. What is stored, and how it is used, depends on nothing behind the key: changes
/// of later tokens change no bit.
template <class T, int count>
struct Channels {
    static constexpr bool adds_term = false;
    static constexpr int channels = count;  // a power of two from 16 on; more than there are, are zero
    View<const T, 4> c;                     // (B, Lq, Hq, count)
    View<const T, 4> b;                     // (B, Lk, Hkv, count)
    View<const double, 3> g;                // (B, Lk, Hkv), in powers of two, never increasing, stride 1 along Lk; null: no decay
    View<const float, 1> strength;          // (Hq)
    View<float, 4> dc, db;                  // of c, over strength, and of b as it is stored; backward

    static __device__ bool steep(double first, double here) { return first - here > static_cast<double>(decay_limit<T>); }
};

/// 2^x.
__device__ inline float exp2_of(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/// 1 / (1 + 2^-x).
__device__ inline float sigmoid2(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.0f + exp2_of(-x)));
    return y;
}

/// What a product has left, m tiles of 16 rows, as the left factor of the next one.
template <device::Precision precision, int m, int count>
struct Rows16 {
    device::Factors<float, precision, 2> factor[m][count / device::depth<precision>];

    __device__ explicit Rows16(const float (&c)[m][count / 8][4]) {
        constexpr int pairs = device::k_pairs<precision>;
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
            for (int t = 0; t < count / 8; ++t)
#pragma unroll
                for (int row = 0; row < 2; ++row)
                    factor[i][t / pairs].set(row, t % pairs, c[i][t][2 * row], c[i][t][2 * row + 1]);
    }
    __device__ void load(device::Factors<float, precision, 2>& f, int i, int k) const { f = factor[i][k / device::depth<precision>]; }
};

/// Rows of a matrix in shared memory as a left factor. Registers could keep them, but are worth more elsewhere.
template <class E, int rows, int columns>
struct Shared16 {
    device::SwizzledLoader<E, rows, device::panel_columns<E, columns>, device::Read::as_stored, true> loader;
    __device__ Shared16(const device::Swizzled<E, rows, columns>& a, int row, int lane) : loader(device::rows_of(a.as_stored(), row, 0, lane)) {}
    template <device::Precision precision>
    __device__ void load(device::Factors<float, precision, 2>& f, int i, int k) const {
        loader.load(f, 16 * i, k);
    }
};

/// c (m x 16 rows, tiles x 8 columns) += rows of a, in registers or in shared memory, times columns n .. of b, over k =
/// first .. first + count - 1 of b, which is 0 .. count - 1 of a.
template <device::Precision precision, int count, int m, int tiles, class A, class B>
__device__ void multiply_rows(float (&c)[m][tiles][4], const A& a, const B& b, int n, int first, int lane) {
    static_assert(tiles % 2 == 0);
    const auto from_b = device::columns_of(b, n, first, lane);
    if constexpr (device::packs<precision>) {
#pragma unroll
        for (int k = 0; k < count; k += 16) {
            device::Factors<float, precision, 2> fa[m];
#pragma unroll
            for (int i = 0; i < m; ++i) a.load(fa[i], i, k);
#pragma unroll
            for (int t = 0; t < tiles; t += 2) {
                device::Factors<float, precision, 1> fb[2];
                from_b.load(fb, 8 * t, k);
#pragma unroll
                for (int i = 0; i < m; ++i) {
                    device::multiply_add(c[i][t], fa[i], fb[0]);
                    device::multiply_add(c[i][t + 1], fa[i], fb[1]);
                }
            }
        }
    } else {
        // Sums of their own for 64 columns at most (device::Sums), which registers have room for.
        constexpr int part = tiles < 8 ? tiles : 8;
        static_assert(tiles % part == 0);
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
            for (int t0 = 0; t0 < tiles; t0 += part) {
                device::Sums<precision, part> sums(reinterpret_cast<float(&)[part][4]>(c[i][t0]));
#pragma unroll
                for (int k = 0; k < count; k += device::depth<precision>) {
                    device::Factors<float, precision, 2> fa;
                    a.load(fa, i, k);
#pragma unroll
                    for (int t = 0; t < part; t += 2) {
                        device::Factors<float, precision, 1> fb[2];
                        from_b.load(fb, 8 * (t0 + t), k);
                        sums.add(t, fa, fb[0]);
                        sums.add(t + 1, fa, fb[1]);
                    }
                }
                sums.finish();
            }
    }
}

/// g of one head of a sequence.
struct Levels {
    const double* g;  // null: no decay
    int last;         // position

    template <class Policy>
    __device__ Levels(const Policy& policy, const Place& at, int kv_head)
        : g(policy.g && at.keys > 0 ? &policy.g(at.batch, at.key0, kv_head) : nullptr), last(at.keys - 1) {}
    /// Of a position, the last one where there is none.
    __device__ double operator()(int position) const { return g ? g[min(max(position, 0), last)] : 0.0; }
};

/// exp(g of a query - g of a key); 1 where the query is before the key, so that what a mask leaves out stays finite.
__device__ inline float decay_of(double query, double key) { return exp2_of(fminf(static_cast<float>(query - key), 0.0f)); }

/// x[i][t][e] = f(i, t, e, x[i][t][e]) in a loop: slow, by way of memory, for what is rare and would cost the rest registers.
template <int m, int tiles, class F>
__device__ void each_apart(float (&x)[m][tiles][4], F&& f) {
    float copy[m * tiles * 4];
#pragma unroll
    for (int n = 0; n < m * tiles * 4; ++n) copy[n] = x[n / (4 * tiles)][n / 4 % tiles][n % 4];
#pragma unroll 1
    for (int n = 0; n < m * tiles * 4; ++n) copy[n] = f(n / (4 * tiles), n / 4 % tiles, n % 4, copy[n]);
#pragma unroll
    for (int n = 0; n < m * tiles * 4; ++n) x[n / (4 * tiles)][n / 4 % tiles][n % 4] = copy[n];
}

/// What the decay since the first key of a decay tile makes of each row of queries of a block, for the tile of keys of a step
/// and the next one, in shared memory. A thread makes that of its row, in the time that the products of a step take.
template <class T, int rows, int channels>
class RowDecays {
  public:
    static constexpr std::size_t bytes = channels > 0 ? 2 * (rows * sizeof(float) + 2 * sizeof(double)) : 0;

    template <class Policy>
    __device__ RowDecays(void* memory, const Policy& policy, const Place& at, int kv_head, int first_position, int thread)
        : ends_(static_cast<double*>(memory)), factors_(reinterpret_cast<float*>(ends_ + 4)), thread_(thread), levels_(policy, at, kv_head),
          own_(levels_(first_position + thread)) {}

    /// Begins with the step whose keys begin at j, and later ends.
    __device__ void load(int j) {
        const int tile = j / decay_tile * decay_tile;
        first_ = levels_(tile);
        last_ = levels_(tile + decay_tile - 1);
    }
    __device__ void store(int step) const {
        if (thread_ < rows) factors_[step % 2 * rows + thread_] = decay_of(own_, first_);
        if (thread_ == 0) {
            ends_[step % 2 * 2] = first_;
            ends_[step % 2 * 2 + 1] = last_;
        }
    }
    /// Whether some keys of the step's decay tile are steep.
    __device__ bool steep(int step) const { return Channels<T, channels>::steep(ends_[step % 2 * 2], ends_[step % 2 * 2 + 1]); }
    __device__ float factor(int step, int row) const { return factors_[step % 2 * rows + row]; }

    /// x[i][t][e] *= strength times the decay of its pair: a lane's rows from `row` on, at `position`, and columns of keys from
    /// j on.
    template <int m, int tiles>
    __device__ void apply(float (&x)[m][tiles][4], float strength, int step, int row, int position, int j, int quad) const {
        if (steep(step)) {
            each_apart(x, [&](int i, int t, int e, float value) {
                const double g = levels_(position + 16 * i + 8 * (e / 2)), key = levels_(j + 8 * t + 2 * quad + e % 2);
                return value * (strength * (Channels<T, channels>::steep(ends_[step % 2 * 2], key) ? decay_of(g, key) : factor(step, row + 16 * i + 8 * (e / 2))));
            });
            return;
        }
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float f = strength * factor(step, row + 16 * i + 8 * r);
#pragma unroll
                for (int t = 0; t < tiles; ++t) {
                    x[i][t][2 * r] *= f;
                    x[i][t][2 * r + 1] *= f;
                }
            }
    }

  private:
    double* ends_;
    float* factors_;
    int thread_;
    Levels levels_;
    double own_, first_ = 0.0, last_ = 0.0;
};
template <class T, int rows>
class RowDecays<T, rows, 0> {
  public:
    static constexpr std::size_t bytes = 0;
    template <class... Unused>
    __device__ explicit RowDecays(const Unused&...) {}
};

template <int m, int tiles>
__device__ void clear(float (&c)[m][tiles][4]) {
#pragma unroll
    for (int i = 0; i < m; ++i) device::clear(c[i]);
}

}  // namespace detail
}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
