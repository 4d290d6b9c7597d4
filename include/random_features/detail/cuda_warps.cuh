// Random Fourier features on the GPU, for heads of up to 64 channels in float: warps of tensor cores, 16 rows at a time.
//
// A warp reads rows of a head from memory as factors of a product, 8 neighbouring channels a lane, and has the phases of 8
// neighbouring frequencies a lane, which it stores as features. Nothing but W, split once a block, is in shared memory. Factors
// are split into bf16 numbers, of which floats need three; of nine products the six largest are taken.
//
// In backward the gradients of the phases are, as they lie in registers, a factor of dx; for dW, which sums over rows,
// they and x go through shared memory of the warp. dW stays in registers to the end of the block's rows. Of more than 32
// frequencies a block has 32, and dx comes from a kernel of its own.
#pragma once

#include <interstate/cuda/mma.cuh>
#include <interstate/cuda/rows.cuh>
#include <random_features/detail/cuda_products.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace random_features::detail {

inline constexpr int warp_rows = 16, warp_channels = 64, chunk_frequencies = 32;
inline constexpr int forward_warps = 8, backward_warps = 4;  // of a block

inline bool fits_warps(const Shape& s) { return s.dtype != DType::f64 && s.head_dim <= warp_channels; }
inline Index frequency_chunks(const Shape& s) { return ceil_div(s.frequencies, chunk_frequencies); }
/// Parts of the rows that blocks have: as many blocks as a large GPU runs at once.
inline Index row_parts(const Shape& s, Index blocks, int warps) {
    const Index columns = s.heads * frequency_chunks(s), steps = ceil_div(s.rows(), Index{warp_rows} * warps);
    if (columns == 0) return 0;
    const Index wanted = columns < blocks ? blocks / columns : 1;
    return wanted < steps ? wanted : steps;
}
inline Index forward_parts(const Shape& s) { return row_parts(s, 264, forward_warps); }
inline Index backward_parts(const Shape& s) { return row_parts(s, 396, backward_warps); }

struct WarpLayout {
    float* dp;       // (rows, H, F), with several chunks of frequencies
    float* partial;  // (parts, H, F, dh)
    WarpLayout(Arena& arena, const Shape& s)
        : dp(arena.take<float>(frequency_chunks(s) > 1 ? s.rows() * s.heads * s.frequencies : 0)),
          partial(arena.take<float>(backward_parts(s) * s.heads * s.frequencies * s.head_dim)) {}
};

inline namespace INTERSTATE_KERNELS {

/// Up to 8 neighbouring columns of a row, as a lane moves them.
struct Columns {
    Index stride;
    int count;
    bool wide;  // 16 bytes at once

    template <class T>
    __device__ void load(const T* from, bool inside, device::Pair<T> (&pair)[4]) const {
        if (wide) {
            constexpr int V = 16 / static_cast<int>(sizeof(T));
            int4 word[8 / V];
#pragma unroll
            for (int i = 0; i < 8 / V; ++i)
                word[i] = inside && i * V < count ? *reinterpret_cast<const int4*>(from + i * V) : int4{};
            memcpy(pair, word, sizeof word);
        } else {
            T element[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) element[i] = inside && i < count ? from[i * stride] : T(0.0f);
            memcpy(pair, element, sizeof element);
        }
    }
    template <class T>
    __device__ void load(const T* from, bool inside, float (&x)[8]) const {
        device::Pair<T> pair[4];
        load(from, inside, pair);
#pragma unroll
        for (int i = 0; i < 4; ++i) device::unpack<T>(pair[i], x[2 * i], x[2 * i + 1]);
    }
    template <class T>
    __device__ void store(T* to, const float (&x)[8]) const {
        if (wide) {
            constexpr int V = 16 / static_cast<int>(sizeof(T));
            device::Pair<T> pair[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) pair[i] = device::pack<T>(x[2 * i], x[2 * i + 1]);
            int4 word[8 / V];
            memcpy(word, pair, sizeof word);
#pragma unroll
            for (int i = 0; i < 8 / V; ++i)
                if (i * V < count) *reinterpret_cast<int4*>(to + i * V) = word[i];
        } else {
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (i < count) to[i * stride] = device::store_as<T>(x[i]);
        }
    }
};

/// bf16 numbers that add up to one of storage.
template <class T>
inline constexpr int parts_of = std::is_same_v<T, bf16> ? 1 : std::is_same_v<T, f16> ? 2 : 3;

/// The parts of two numbers, as pairs.
template <int parts>
__device__ void split(float x, float y, std::uint32_t (&part)[parts]) {
#pragma unroll
    for (int i = 0; i < parts; ++i) {
        part[i] = device::pack<bf16>(x, y);
        x -= __uint_as_float(part[i] << 16);
        y -= __uint_as_float(part[i] & 0xffff0000u);
    }
}

/// The parts of 8 neighbours.
template <int parts>
struct Eight {
    std::uint32_t pair[parts][4];

    __device__ void set(const float (&x)[8]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            std::uint32_t part[parts];
            split<parts>(x[2 * i], x[2 * i + 1], part);
#pragma unroll
            for (int j = 0; j < parts; ++j) pair[j][i] = part[j];
        }
    }
    template <class T>
    __device__ void load(const Columns& columns, const T* from, bool inside) {
        if constexpr (parts == 1) {
            columns.load(from, inside, pair[0]);
        } else {
            float x[8];
            columns.load(from, inside, x);
            set(x);
        }
    }
    /// To rows of shared memory, `gap` bytes from a part to the next one.
    __device__ void put(unsigned char* to, int gap) const {
#pragma unroll
        for (int j = 0; j < parts; ++j) *reinterpret_cast<uint4*>(to + j * gap) = {pair[j][0], pair[j][1], pair[j][2], pair[j][3]};
    }
};

/// each(i, j): the products, of a's part i and b's part j, that are added to sums of products: small ones first, then (0, 0).
template <int parts, class F>
__device__ void each_small_product(F&& each) {
#pragma unroll
    for (int i = parts - 1; i >= 0; --i)
#pragma unroll
        for (int j = 2 - i; j >= 0; --j)
            if (i + j > 0) each(i, j);
}

/// W as a factor, of one tile and step of products after the other, every lane's side by side.
struct SplitWeights {
    static constexpr int entries = 512;
    uint4 first[entries];   // of the parts 0 and 1
    uint2 second[entries];  // of part 2
    __device__ void set(int i, float x0, float y0, float x1, float y1) {
        std::uint32_t a[3], b[3];
        split<3>(x0, y0, a);
        split<3>(x1, y1, b);
        first[i] = {a[0], b[0], a[1], b[1]};
        second[i] = {a[2], b[2]};
    }
};

/// Four tiles of 16 x 8. The unit cuts what it adds, so small products have sums of their own.
struct SplitSums {
    float large[4][4] = {}, small[4][4] = {};

    /// Products with neighbours of rows group (x) and group + 8 (y), the half of them that is step 0 or 1, and b from `at`
    /// on, 32 entries a tile.
    template <int parts>
    __device__ void add(const Eight<parts>& x, const Eight<parts>& y, int step, const SplitWeights& w, int at) {
        std::uint32_t a[parts][4], b[4][3][2];
#pragma unroll
        for (int i = 0; i < parts; ++i) {
            a[i][0] = x.pair[i][2 * step];
            a[i][1] = y.pair[i][2 * step];
            a[i][2] = x.pair[i][2 * step + 1];
            a[i][3] = y.pair[i][2 * step + 1];
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const uint4 first = w.first[at + 32 * n];
            const uint2 second = w.second[at + 32 * n];
            b[n][0][0] = first.x, b[n][0][1] = first.y;
            b[n][1][0] = first.z, b[n][1][1] = first.w;
            b[n][2][0] = second.x, b[n][2][1] = second.y;
        }
        each_small_product<parts>([&](int i, int j) {
#pragma unroll
            for (int n = 0; n < 4; ++n) device::mma_bf16(small[n], a[i], b[n][j]);
        });
#pragma unroll
        for (int n = 0; n < 4; ++n) device::mma_bf16(large[n], a[0], b[n][0]);
    }
    /// Of row group + 8 i, the lane's neighbours.
    __device__ void get(int i, float (&x)[8]) const {
#pragma unroll
        for (int e = 0; e < 8; ++e) x[e] = large[e / 2][2 * i + e % 2] + small[e / 2][2 * i + e % 2];
    }
};

inline constexpr float near_limit = 65536.0f;

/// The sine and cosine of a phase beyond near_limit; a call, to stay out of the way of the others.
__device__ __noinline__ inline float2 far_sine_cosine(float p) {
    float2 y;
    sincosf(p, &y.x, &y.y);
    return y;
}

/// Within 1e-7 up to near_limit: a reduction to [-pi/4, pi/4], pi/2 in three parts, and polynomials of the Cephes library (Moshier).
__device__ inline void near_sine_cosine(float p, float& sine, float& cosine) {
    const float t = fmaf(p, 0.636619772f, 12582912.0f), n = t - 12582912.0f;
    float r = fmaf(n, -0x1.921fb4p+0f, p);
    r = fmaf(n, -0x1.4442d0p-24f, r);
    r = fmaf(n, -0x1.846988p-48f, r);
    const float z = r * r;
    float s = fmaf(fmaf(-1.9515295891e-4f, z, 8.3321608736e-3f), z, -1.6666654611e-1f);
    float c = fmaf(fmaf(2.443315711809948e-5f, z, -1.388731625493765e-3f), z, 4.166664568298827e-2f);
    s = fmaf(s * z, r, r);
    c = fmaf(c * z, z, fmaf(z, -0.5f, 1.0f));
    // A quarter turn swaps them; the signs are those of the quadrant, which is in the low bits of t.
    const std::uint32_t q = __float_as_uint(t);
    const bool odd = q & 1;
    sine = __uint_as_float(__float_as_uint(odd ? c : s) ^ ((q & 2) << 30));
    cosine = __uint_as_float(__float_as_uint(odd ? s : c) ^ (((q + 1) & 2) << 30));
}
__device__ inline void fast_sine_cosine(float p, float& sine, float& cosine) {
    near_sine_cosine(p, sine, cosine);
    if (fabsf(p) > near_limit) {
        const float2 y = far_sine_cosine(p);
        sine = y.x;
        cosine = y.y;
    }
}

/// Which tensors are moved 16 bytes at once.
struct WideMoves {
    bool x, y, dy, dx, dp;
    template <class T, class P>
    explicit WideMoves(const Problem<T, P>& p)
        : x(device::moves_wide(p.x, p.s.head_dim)), y(device::moves_wide(p.y, p.s.frequencies)), dy(device::moves_wide(p.dy, p.s.frequencies)),
          dx(device::moves_wide(p.dx, p.s.head_dim)), dp(p.s.frequencies % 4 == 0) {}
};

/// Rows group and group + 8 of 16: where they are and whether they are of a sequence.
struct RowPair {
    Index batch[2], token[2];
    bool exists[2], inside[2];

    template <class T, class P>
    __device__ RowPair(const Problem<T, P>& p, Index first, int group) {
        const Index begin = p.cu ? p.cu(0) : 0, end = p.cu ? p.cu(p.s.sequences) : p.s.rows();
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Index n = first + group + 8 * i;
            exists[i] = n < p.s.rows();
            inside[i] = exists[i] && n >= begin && n < end;
            // Both are below 2^31.
            batch[i] = p.s.batch == 1 ? 0 : static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(p.s.length);
            token[i] = n - batch[i] * p.s.length;
        }
    }
    template <class E>
    __device__ E* of(const View<E, 4>& x, int i, Index h, Index column) const {
        return x.data + batch[i] * x.stride[0] + token[i] * x.stride[1] + h * x.stride[2] + column * x.stride[3];
    }
};

/// What a warp has: rows of one head, 32 frequencies. In products, column n of tile i of four is frequency or channel
/// 8 (n / 2) + 2 i + n % 2, and quad q gives 8 q .. 8 q + 7 to the sums of two steps: what a lane has are neighbours.
template <class T, class P>
struct WarpBlock {
    using Factor = Eight<parts_of<T>>;
    const Problem<T, P>& p;
    int group, quad, dh, left;  // left: frequencies of the chunk
    Index h, part, f0;

    __device__ WarpBlock(const Problem<T, P>& p_, int chunks)
        : p(p_), group(threadIdx.x % 32 / 4), quad(threadIdx.x % 4), dh(static_cast<int>(p.s.head_dim)), h(blockIdx.y),
          part(blockIdx.x / static_cast<unsigned>(chunks)) {
        set_chunk(static_cast<int>(blockIdx.x % static_cast<unsigned>(chunks)));
    }
    __device__ void set_chunk(int chunk) {
        f0 = static_cast<Index>(chunk) * chunk_frequencies;
        const Index rest = p.s.frequencies - f0;
        left = static_cast<int>(rest < chunk_frequencies ? rest : chunk_frequencies);
    }
    __device__ float weight(int f, int c) const {
        return f < left && c < dh ? static_cast<float>(p.W(p.weight_head(h), f0 + f, c)) : 0.0f;
    }
    __device__ static int neighbours(int group, int tile) { return group / 2 * 8 + 2 * tile + group % 2; }
    /// W as a factor of phases: step j of channels 32 m .. 32 m + 31, tile n, at ((2 m + j) 4 + n) 32 + lane.
    template <int threads>
    __device__ void phase_weights(SplitWeights& to) const {
#pragma unroll 2
        for (int i = threadIdx.x; i < SplitWeights::entries; i += threads) {
            const int f = neighbours(i % 32 / 4, i / 32 % 4), c = 32 * (i / 256) + 8 * (i % 4) + 4 * (i / 128 % 2);
            to.set(i, weight(f, c), weight(f, c + 1), weight(f, c + 2), weight(f, c + 3));
        }
    }
    /// W as a factor of dx: step j of the frequencies, tile n of channels 32 m .. 32 m + 31, at ((2 m + j) 4 + n) 32 + lane.
    template <int threads>
    __device__ void input_weights(SplitWeights& to) const {
#pragma unroll 2
        for (int i = threadIdx.x; i < SplitWeights::entries; i += threads) {
            const int c = 32 * (i / 256) + neighbours(i % 32 / 4, i / 32 % 4), f = 8 * (i % 4) + 4 * (i / 128 % 2);
            to.set(i, weight(f, c), weight(f + 1, c), weight(f + 2, c), weight(f + 3, c));
        }
    }

    /// each(row, next): for every 16 rows of this warp, by the first, and by that of those that come then.
    template <int warps, class F>
    __device__ void walk(int parts, F&& each) const {
        const Index rows = p.s.rows(), tiles = (rows + warp_rows - 1) / warp_rows;
        const int last = static_cast<int>(tiles * (part + 1) / parts);
#pragma unroll 1
        for (int tile = static_cast<int>(tiles * part / parts) + threadIdx.x / 32; tile < last; tile += warps)
            each(static_cast<Index>(tile) * warp_rows, tile + warps < last ? static_cast<Index>(tile + warps) * warp_rows : rows);
    }
    /// Asks for 16 rows, of each 128 bytes from `column` on, a lane's choice.
    template <class E>
    __device__ void ask_for(const View<E, 4>& x, Index first, Index column, bool wide) const {
        const Index n = first + threadIdx.x % 16;
        if (!wide || n >= p.s.rows() || column >= x.extent[3]) return;
        const Index b = p.s.batch == 1 ? 0 : static_cast<std::uint32_t>(n) / static_cast<std::uint32_t>(p.s.length);
        device::prefetch(x.data + b * x.stride[0] + (n - b * p.s.length) * x.stride[1] + h * x.stride[2] + column);
    }
    __device__ void ask_for_x(Index first, bool wide) const {
        ask_for(p.x, first, threadIdx.x / 16 % 2 * (128 / sizeof(T)), wide);
    }
    /// Columns of a lane from 8 quad + first on, of `width`.
    __device__ Columns columns(Index stride, int first, int width, bool wide) const { return {stride, width - first - 8 * quad, wide}; }

    /// Products of channels 32 m .. 32 m + 31 of 16 rows of x with W: tiles of the sums are frequencies.
    __device__ void phases(const Factor (&x)[2], int m, const SplitWeights& weights, SplitSums& sums) const {
#pragma unroll
        for (int j = 0; j < 2; ++j) sums.add(x[0], x[1], j, weights, (2 * m + j) * 128 + threadIdx.x % 32);
    }
    /// Products of gradients of phases with W: tiles of the sums are channels 32 m .. 32 m + 31.
    __device__ void inputs(const Eight<3> (&dp)[2], int m, const SplitWeights& weights, SplitSums& sums) const {
#pragma unroll
        for (int j = 0; j < 2; ++j) sums.add(dp[0], dp[1], j, weights, (2 * m + j) * 128 + threadIdx.x % 32);
    }
    /// Those channels of 16 rows of dx.
    __device__ void store_input(const RowPair& row, int m, bool wide, const SplitSums& sums) const {
        const Columns to = columns(p.dx.stride[3], 32 * m, dh, wide);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float dx[8];
            sums.get(i, dx);
#pragma unroll
            for (int e = 0; e < 8; ++e) dx[e] = row.inside[i] ? dx[e] : 0.0f;
            if (row.exists[i]) to.store(row.of(p.dx, i, h, 32 * m + 8 * quad), dx);
        }
    }
};

/// 16 rows of x, every lane's channels of both halves of the head.
template <class T, class P>
__device__ void load_rows(const WarpBlock<T, P>& block, const RowPair& row, bool wide, Eight<parts_of<T>> (&x)[2][2]) {
    const auto& view = block.p.x;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            x[m][i].load(block.columns(view.stride[3], 32 * m, block.dh, wide),
                         row.of(view, i, block.h, 32 * m + 8 * block.quad), row.inside[i]);
}

/// Rows by 32 frequencies, of a head (eq. 1).
template <class T, class P>
__global__ void __launch_bounds__(32 * forward_warps, 2) warp_features_kernel(Problem<T, P> p, WideMoves wide, int chunks, int parts) {
    __shared__ SplitWeights weights;
    const WarpBlock<T, P> block(p, chunks);
    block.template phase_weights<32 * forward_warps>(weights);
    __syncthreads();
    block.template walk<forward_warps>(parts, [&](Index first, Index next) {
        const RowPair row(p, first, block.group);
        typename WarpBlock<T, P>::Factor x[2][2];
        load_rows(block, row, wide.x, x);
        block.ask_for_x(next, wide.x);
        SplitSums sums;
#pragma unroll
        for (int m = 0; m < 2; ++m)
            if (32 * m < block.dh) block.phases(x[m], m, weights, sums);
        const Columns columns = block.columns(p.y.stride[3], 0, block.left, wide.y);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float phase[8], sine[8], cosine[8];
            sums.get(i, phase);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                fast_sine_cosine(phase[e], sine[e], cosine[e]);
                sine[e] = row.inside[i] ? sine[e] * p.norm : 0.0f;
                cosine[e] = row.inside[i] ? cosine[e] * p.norm : 0.0f;
            }
            if (!row.exists[i]) continue;
            const Index f = block.f0 + 8 * block.quad;
            columns.store(row.of(p.y, i, block.h, f), cosine);
            columns.store(row.of(p.y, i, block.h, p.s.frequencies + f), sine);
        }
    });
}

/// Bytes from a row in shared memory to the next one: 8 rows of 16 bytes have all banks.
inline constexpr int x_pitch = 2 * warp_channels + 16, dp_pitch = 2 * chunk_frequencies + 16;
inline constexpr int x_gap = warp_rows * x_pitch, dp_gap = warp_rows * dp_pitch;  // from a part to the next one
template <int parts>
union BackwardShared {
    struct {
        SplitWeights phase, input;
        struct {
            alignas(16) unsigned char x[parts * x_gap];
            alignas(16) unsigned char dp[3 * dp_gap];
        } warp[backward_warps];
    } rows;
    float sums[backward_warps][chunk_frequencies * warp_channels];  // once all rows are done
};

/// Of a head, a part of the rows and 32 frequencies: dW of the part (eq. 5), and dx (eq. 4), or the gradients of the
/// phases (eq. 3) for those who sum over all frequencies.
template <class T, class P>
__global__ void __launch_bounds__(32 * backward_warps, 3)
    warp_gradients_kernel(Problem<T, P> p, WideMoves wide, float* dp_out, float* partial, int chunks, int parts) {
    extern __shared__ __align__(16) unsigned char memory[];
    constexpr int threads = 32 * backward_warps, x_parts = parts_of<T>;
    auto& shared = *reinterpret_cast<BackwardShared<x_parts>*>(memory);
    const WarpBlock<T, P> block(p, chunks);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = block.group, quad = block.quad;
    const bool input = p.dx && !dp_out;
    block.template phase_weights<threads>(shared.rows.phase);
    if (input) block.template input_weights<threads>(shared.rows.input);
    __syncthreads();
    auto& own = shared.rows.warp[warp];
    float total[2][8][4] = {};  // dW: frequencies 16 t + group (+ 8), channels 8 u + 2 quad (+ 1)
    block.template walk<backward_warps>(parts, [&](Index first, [[maybe_unused]] Index next) {
        const RowPair row(p, first, group);
        SplitSums sums;
        {
            Eight<x_parts> x[2][2];
            load_rows(block, row, wide.x, x);
            if constexpr (sizeof(T) == 2) {  // floats leave no registers for it
                block.ask_for_x(next, wide.x);
                block.ask_for(p.dy, next, threadIdx.x / 16 % 2 * p.s.frequencies + block.f0, wide.dy);
            }
            __syncwarp();
#pragma unroll
            for (int m = 0; m < 2; ++m) {
#pragma unroll
                for (int i = 0; i < 2; ++i) x[m][i].put(own.x + (group + 8 * i) * x_pitch + 64 * m + 16 * quad, x_gap);
                if (32 * m < block.dh) block.phases(x[m], m, shared.rows.phase, sums);
            }
        }
        Eight<3> dp[2];  // of row group + 8 i
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Columns columns = block.columns(p.dy.stride[3], 0, block.left, wide.dy);
            const Index f = block.f0 + 8 * quad;
            float dc[8], ds[8], slope[8];
            columns.load(row.of(p.dy, i, block.h, f), row.inside[i], dc);
            columns.load(row.of(p.dy, i, block.h, p.s.frequencies + f), row.inside[i], ds);
            sums.get(i, slope);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                float sine, cosine;
                fast_sine_cosine(slope[e], sine, cosine);
                slope[e] = (ds[e] * cosine - dc[e] * sine) * p.norm;
            }
            dp[i].set(slope);
            dp[i].put(own.dp + (group + 8 * i) * dp_pitch + 16 * quad, dp_gap);
            if (dp_out && row.exists[i])
                block.columns(1, 0, block.left, wide.dp)
                    .store(dp_out + ((first + group + 8 * i) * p.s.heads + block.h) * p.s.frequencies + f, slope);
        }
        __syncwarp();
        if (input)
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                if (32 * m >= block.dh) break;
                SplitSums dx;
                block.inputs(dp, m, shared.rows.input, dx);
                block.store_input(row, m, wide.dx, dx);
            }
        if (!partial) return;
        // Sums over the rows: factors are read across, 8 rows by 8 columns at once.
        std::uint32_t a[2][3][4];
#pragma unroll
        for (int t = 0; t < 2; ++t)
#pragma unroll
            for (int i = 0; i < 3; ++i)
                device::load_matrices<true>(a[t][i], own.dp + i * dp_gap + (lane / 16 * 8 + lane % 8) * dp_pitch + 32 * t + lane / 8 % 2 * 16);
#pragma unroll
        for (int u = 0; u < 8; u += 2) {
            if (8 * u >= block.dh) break;
            std::uint32_t x[x_parts][4];
#pragma unroll
            for (int i = 0; i < x_parts; ++i)
                device::load_matrices<true>(x[i], own.x + i * x_gap + lane % 16 * x_pitch + 16 * u + lane / 16 * 16);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float sum[2][4] = {};
                const auto add = [&](int i, int j) {
                    const std::uint32_t b[2] = {x[i][2 * half], x[i][2 * half + 1]};
#pragma unroll
                    for (int t = 0; t < 2; ++t) device::mma_bf16(sum[t], a[t][j], b);
                };
                each_small_product<x_parts>(add);
                add(0, 0);
                // The unit cuts what it adds; sums over all rows are added to by rounding.
#pragma unroll
                for (int t = 0; t < 2; ++t)
#pragma unroll
                    for (int e = 0; e < 4; ++e) total[t][u + half][e] += sum[t][e];
            }
        }
    });
    if (!partial) return;
    __syncthreads();
#pragma unroll
    for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int u = 0; u < 8; ++u)
#pragma unroll
            for (int i = 0; i < 2; ++i)
                *reinterpret_cast<float2*>(shared.sums[warp] + (16 * t + group + 8 * i) * warp_channels + 8 * u + 2 * quad) = {
                    total[t][u][2 * i], total[t][u][2 * i + 1]};
    __syncthreads();
    float* const to = partial + ((block.part * p.s.heads + block.h) * p.s.frequencies + block.f0) * p.s.head_dim;
    for (int i = threadIdx.x; i < block.left * warp_channels; i += threads) {
        const int f = i / warp_channels, c = i % warp_channels;
        if (c >= block.dh) continue;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < backward_warps; ++w) sum += shared.sums[w][i];
        to[f * block.dh + c] = sum;
    }
}

/// dx of rows of a head from the gradients of all phases (eq. 4).
template <class T, class P>
__global__ void __launch_bounds__(32 * forward_warps, 1) warp_input_kernel(Problem<T, P> p, WideMoves wide, const float* dp, int chunks) {
    __shared__ SplitWeights weights;
    WarpBlock<T, P> block(p, 1);
    const Index first = (static_cast<Index>(blockIdx.x) * forward_warps + threadIdx.x / 32) * warp_rows;
    const RowPair row(p, first, block.group);
    SplitSums dx[2];
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        block.set_chunk(chunk);
        __syncthreads();
        block.template input_weights<32 * forward_warps>(weights);
        __syncthreads();
        Eight<3> factor[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
            factor[i].load(block.columns(1, 0, block.left, wide.dp),
                           dp + ((first + block.group + 8 * i) * p.s.heads + block.h) * p.s.frequencies + block.f0 + 8 * block.quad, row.inside[i]);
#pragma unroll
        for (int m = 0; m < 2; ++m)
            if (32 * m < block.dh) block.inputs(factor, m, weights, dx[m]);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) block.store_input(row, m, wide.dx, dx[m]);
}

template <class T, class P>
Status run_warp_features(const cuda& exec, const Problem<T, P>& p) {
    const Index chunks = frequency_chunks(p.s), parts = forward_parts(p.s);
    return launch(exec, "warp_features_kernel", warp_features_kernel<T, P>,
                  {dim3(static_cast<unsigned>(chunks * parts), static_cast<unsigned>(p.s.heads)), dim3(32 * forward_warps)}, p,
                  WideMoves(p), static_cast<int>(chunks), static_cast<int>(parts));
}

template <class T, class P>
Status run_warp_backward(const cuda& exec, const Problem<T, P>& p, const WarpLayout& w) {
    const Index chunks = frequency_chunks(p.s), parts = backward_parts(p.s);
    float* const dp = chunks > 1 && p.dx ? w.dp : nullptr;
    INTERSTATE_RETURN_IF_ERROR(launch(exec, "warp_gradients_kernel", warp_gradients_kernel<T, P>,
                                      {dim3(static_cast<unsigned>(chunks * parts), static_cast<unsigned>(p.s.heads)),
                                       dim3(32 * backward_warps), sizeof(BackwardShared<parts_of<T>>)},
                                      p, WideMoves(p), dp, p.dW ? w.partial : nullptr, static_cast<int>(chunks), static_cast<int>(parts)));
    // Without frequencies dx is zero, and no block has it.
    if (p.dx && chunks != 1)
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "warp_input_kernel", warp_input_kernel<T, P>,
                                          {dim3(static_cast<unsigned>(ceil_div(p.s.rows(), Index{warp_rows} * forward_warps)),
                                                static_cast<unsigned>(p.s.heads)),
                                           dim3(32 * forward_warps)},
                                          p, WideMoves(p), dp, static_cast<int>(chunks)));
    if (!p.dW) return {};
    return run_finish_weight(exec, p, static_cast<const float*>(w.partial), parts);
}

}  // namespace INTERSTATE_KERNELS

}  // namespace random_features::detail
}  // namespace interstate::inline INTERSTATE_ABI
