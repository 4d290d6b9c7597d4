// The feature map on the GPU, heads of up to 256 channels and up to 4 taps: a team of lanes a head.
//
// A team, 1 to 32 lanes of a warp, has E channels a lane in registers and walks along time. The rows that the
// convolution looks back at stay in registers too, so that x is read once; sums over a head are shuffles. Teams of a
// block are neighbouring heads of the same rows, which lie side by side in memory, then stretches of rows that
// follow each other. Cosines and sines are made once a block, in shared memory, for all of its heads.
//
// Backward recomputes the stages; a row's dc goes into taps pending rows of dx, also in registers, of which the oldest is
// then whole. A team reads on past its own rows until its last one is. Sums over rows stay in registers to the end.
#pragma once

#include <feature_map/detail/cuda_problem.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map::detail {

inline constexpr Index team_features = 256, team_taps = 4;  // what this file's kernels hold

/// E elements of storage, moved 16 bytes (or all, if fewer) at once.
template <class T, int E>
struct Chunk {
    static constexpr int bytes = E * static_cast<int>(sizeof(T));
    using Word = std::conditional_t<bytes % 16 == 0, uint4, std::conditional_t<bytes % 8 == 0, uint2, unsigned>>;
    static constexpr int words = bytes / static_cast<int>(sizeof(Word));
    static_assert(words * sizeof(Word) == bytes);
    Word word[words];

    __device__ void load(const T* p) {
#pragma unroll
        for (int i = 0; i < words; ++i) word[i] = reinterpret_cast<const Word*>(p)[i];
    }
    __device__ void store(T* p) const {
#pragma unroll
        for (int i = 0; i < words; ++i) reinterpret_cast<Word*>(p)[i] = word[i];
    }
};

/// Which channels a lane of a team has: E in a row, or, where RoPE turns channels of both halves, E/2 of each.
template <class T, int E, bool halves>
struct Lane {
    using A = acc_t<T>;
    static constexpr int parts = halves ? 2 : 1, width = E / parts;
    /// What 16-byte (or narrower) moves need of a head: whole chunks.
    static constexpr Index multiple = halves ? 2 * width : width;
    using Raw = Chunk<T, E>;

    int lane;
    int features;

    __device__ int channel(int j) const { return halves ? lane * width + j % width + j / width * (features / 2) : lane * E + j; }
    __device__ bool valid(int j) const { return halves ? lane * width + j % width < features / 2 : lane * E + j < features; }
    /// The second channel of the pair whose first is j, of pairs 0 .. E/2-1 of the lane; pair i of the head is first_pair() + i.
    __device__ static constexpr int first(int pair) { return halves ? pair : 2 * pair; }
    __device__ static constexpr int second(int pair) { return halves ? pair + width : 2 * pair + 1; }
    __device__ int first_pair() const { return lane * (E / 2); }

    __device__ Raw load(const T* head, Index stride, bool wide) const {
        Raw raw{};
        if (wide) {
            Chunk<T, width> part[parts];
#pragma unroll
            for (int i = 0; i < parts; ++i)
                if (valid(i * width)) {
                    part[i].load(head + channel(i * width));
                    memcpy(reinterpret_cast<char*>(&raw) + i * sizeof part[i], &part[i], sizeof part[i]);
                }
            return raw;
        }
        T element[E];
#pragma unroll
        for (int j = 0; j < E; ++j) element[j] = valid(j) ? head[channel(j) * stride] : T(0.0f);
        memcpy(&raw, element, sizeof raw);
        return raw;
    }
    __device__ static void convert(const Raw& raw, A (&x)[E]) {
        T element[E];
        memcpy(element, &raw, sizeof raw);
#pragma unroll
        for (int j = 0; j < E; ++j) x[j] = device::load_as<A>(element[j]);
    }
    __device__ void store(T* head, Index stride, bool wide, const A (&x)[E]) const {
        T element[E];
#pragma unroll
        for (int j = 0; j < E; ++j) element[j] = device::store_as<T>(x[j]);
        if (wide) {
            Chunk<T, width> part[parts];
            memcpy(part, element, sizeof part);
#pragma unroll
            for (int i = 0; i < parts; ++i)
                if (valid(i * width)) part[i].store(head + channel(i * width));
            return;
        }
#pragma unroll
        for (int j = 0; j < E; ++j)
            if (valid(j)) head[channel(j) * stride] = element[j];
    }
};

/// How a grid of teams covers heads and rows; a function of the shape alone.
struct TeamPlan {
    int lanes;         // of a team, a power of two
    int heads;         // of a block
    int stretches;     // of rows, of a block
    int threads;
    int chunk;         // rows whose angles are in shared memory, a multiple of 4
    Index span;        // rows of a team
    Index blocks;      // along the rows
    Index head_blocks;

    TeamPlan(const Shape& s, int elements, int block_threads, Index wanted_threads, Index least, Index most) : threads(block_threads) {
        lanes = 1;
        while (lanes * elements < s.features) lanes *= 2;
        const int teams = threads / lanes;
        heads = 1;
        while (heads < teams && heads < s.heads) heads *= 2;
        stretches = teams / heads;
        const Index pairs = s.features / 2 > 2 ? s.features / 2 : 2, fitting = 4096 / (stretches * pairs) / 4 * 4;
        chunk = static_cast<int>(fitting < 4 ? 4 : fitting > 16 ? 16 : fitting);
        // Enough teams to fill a GPU, but stretches long enough for what is done twice at their borders to be little.
        span = ceil_div(s.rows() * s.heads * lanes, wanted_threads);
        span = span < least ? least : span > most ? most : span;
        blocks = ceil_div(s.rows(), span * stretches);
        head_blocks = ceil_div(s.heads, heads);
    }
    Index parts() const { return blocks * stretches; }
    template <class A>
    std::size_t shared(const Shape& s, bool rope) const {
        return static_cast<std::size_t>(stretches * chunk) * (sizeof(RowInfo) + 4 + (rope ? sizeof(A) * static_cast<std::size_t>(s.features) : 0)) +
               (rope ? sizeof(double) * static_cast<std::size_t>(s.features / 2) : 0) + 32;
    }
};

/// Elements of a lane: four where registers are short, eight where four would take more than a warp.
inline int forward_elements(const Shape& s) { return s.taps > 1 && s.features <= 128 ? 4 : 8; }
inline int backward_elements(const Shape& s) { return s.features <= 128 ? 4 : 8; }
inline TeamPlan forward_plan(const Shape& s) { return {s, forward_elements(s), 256, Index{1} << 17, 16, 64}; }
inline TeamPlan backward_plan(const Shape& s) { return {s, backward_elements(s), 128, Index{1} << 17, 32, 1024}; }

/// Rows loaded at once, so that their latencies overlap.
template <class T, int E>
inline constexpr int rows_at_once = E * sizeof(T) <= 8 ? 4 : E * sizeof(T) <= 16 ? 4 : 2;

inline namespace INTERSTATE_KERNELS {

/// A block's view of the plan: its team, and what the teams share.
template <class T>
struct TeamBlock {
    using A = acc_t<T>;
    double* frequencies;  // (pairs)
    A* angles;            // (stretches, chunk, pairs, 2)
    RowInfo* rows;        // (stretches, chunk)
    int pairs, lane, head_in_block, stretch;
    unsigned mask;        // of the team's lanes
    Index h, first, last;  // head; own rows [first, last)

    __device__ TeamBlock(const Problem<T>& p, const TeamPlan& plan) {
        extern __shared__ __align__(16) unsigned char memory[];
        pairs = p.rope == Rope::none ? 0 : static_cast<int>(p.s.features / 2);
        frequencies = reinterpret_cast<double*>(memory);
        angles = reinterpret_cast<A*>(frequencies + (pairs + 1) / 2 * 2);
        rows = reinterpret_cast<RowInfo*>(angles + plan.stretches * plan.chunk * pairs * 2);
        const int team = static_cast<int>(threadIdx.x) / plan.lanes;
        lane = static_cast<int>(threadIdx.x) % plan.lanes;
        head_in_block = team % plan.heads;
        stretch = team / plan.heads;
        mask = (plan.lanes == 32 ? 0xffffffffu : (1u << plan.lanes) - 1u) << (threadIdx.x % 32 / plan.lanes * plan.lanes);
        h = static_cast<Index>(blockIdx.y) * plan.heads + head_in_block;
        first = first_row(plan, stretch);
        last = min(first + plan.span, p.s.rows());
        for (int i = threadIdx.x; i < pairs; i += blockDim.x) frequencies[i] = frequency(p.base, p.s.features, i);
    }
    __device__ static Index first_row(const TeamPlan& plan, int stretch) {
        return (static_cast<Index>(blockIdx.x) * plan.stretches + stretch) * plan.span;
    }
    /// Sequences and angles of rows `at` to at + chunk of every stretch, up to `count` rows of it.
    __device__ void prepare(const Problem<T>& p, const TeamPlan& plan, Index at, Index count) const {
        __syncthreads();
        for (int i = threadIdx.x; i < plan.stretches * plan.chunk; i += blockDim.x) {
            const Index row = at + i % plan.chunk;
            rows[i] = row < count ? row_info(p, first_row(plan, i / plan.chunk) + row) : RowInfo{-1, 0, 0};
        }
        __syncthreads();
        for (int i = threadIdx.x; i < plan.stretches * plan.chunk * pairs; i += blockDim.x) {
            const int row = i / pairs;
            const RowInfo q = rows[row];
            if (q.index < 0) continue;
            const Index t = first_row(plan, row / plan.chunk) + at + row % plan.chunk - q.begin;
            turn(position_of(p, q, t), frequencies[i % pairs], angles[2 * i], angles[2 * i + 1]);
        }
        __syncthreads();
    }
    __device__ A sum(const TeamPlan& plan, A x) const {
        for (int step = plan.lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(mask, x, step);
        return x;
    }
};

/// The convolution in registers: weights, and the rows of x that it looks at.
template <class T, int taps, int E, bool halves>
struct Window {
    using A = acc_t<T>;
    using L = Lane<T, E, halves>;
    A x[taps][E], weight[taps][E], bias[E];
    int missing;  // taps that the weight does not have: the first

    __device__ Window(const Problem<T>& p, const L& lane, Index h, bool active) : missing(taps - max(static_cast<int>(p.s.taps), 1)) {
#pragma unroll
        for (int j = 0; j < E; ++j) {
            const bool valid = active && lane.valid(j);
            const int r = lane.channel(j);
            bias[j] = valid && p.conv_bias.data ? p.conv_bias.template get<A>(h, r) : A(0);
#pragma unroll
            for (int k = 0; k < taps; ++k) {
                x[k][j] = A(0);
                weight[k][j] = !valid || k < missing ? A(0)
                               : p.weight.data       ? p.weight.template get<A>(h, r, k - missing)
                                                     : A(1);
            }
        }
    }
    /// Rows before token t of a sequence, from memory.
    __device__ void fill(const Problem<T>& p, const L& lane, const RowInfo& q, Index t, Index h) {
#pragma unroll
        for (int k = 0; k + 1 < taps; ++k) {
            const Index from = t - (taps - 1 - k);
            if (k < missing) continue;
            if (from >= 0)
                L::convert(lane.load(token(p.x, p.s.packed(), q, from, h), p.x.stride[3], p.wide_x), x[k]);
            else if (p.conv0)
                L::convert(lane.load(state_row(p.conv0, q, p.s.past() + from, h), p.conv0.stride[3], false), x[k]);
            else
#pragma unroll
                for (int j = 0; j < E; ++j) x[k][j] = A(0);
        }
    }
    __device__ void shift() {
#pragma unroll
        for (int k = 0; k + 1 < taps; ++k)
#pragma unroll
            for (int j = 0; j < E; ++j) x[k][j] = k < missing ? A(0) : x[k + 1][j];
    }
    /// eq. 1
    __device__ void convolve(A (&c)[E]) const {
#pragma unroll
        for (int j = 0; j < E; ++j) {
            c[j] = bias[j];
#pragma unroll
            for (int k = 0; k < taps; ++k) c[j] += weight[k][j] * x[k][j];
        }
    }
};

/// eq. 2, or with `back` eq. 13, of a row whose angles are given.
template <bool back, class L, class A, int E>
__device__ void rotate(const L& lane, const A* angles, int pairs, A (&x)[E]) {
    if (pairs == 0) return;
#pragma unroll
    for (int i = 0; i < E / 2; ++i) {
        const int pair = lane.first_pair() + i;
        if (pair >= pairs) continue;
        const A cosine = angles[2 * pair], sine = back ? -angles[2 * pair + 1] : angles[2 * pair + 1];
        const A a = x[L::first(i)], b = x[L::second(i)];
        x[L::first(i)] = a * cosine - b * sine;
        x[L::second(i)] = a * sine + b * cosine;
    }
}

template <class T, int taps, bool halves, int E>
__global__ void __launch_bounds__(256) team_forward_kernel(Problem<T> p, TeamPlan plan) {
    using A = acc_t<T>;
    using L = Lane<T, E, halves>;
    constexpr int batch = rows_at_once<T, E>;
    const TeamBlock<T> block(p, plan);
    const L lane{block.lane, static_cast<int>(p.s.features)};
    const bool active = block.h < p.s.heads;
    Window<T, taps, E, halves> window(p, lane, block.h, active);
    A scale[E], bias[E];
#pragma unroll
    for (int j = 0; j < E; ++j) {
        const bool valid = active && lane.valid(j);
        scale[j] = valid && p.scale.data ? p.scale.template get<A>(lane.channel(j)) : A(1);
        bias[j] = valid && p.bias.data ? p.bias.template get<A>(block.h, lane.channel(j)) : A(0);
    }
    std::int32_t running = -1;  // the sequence of the row before, if the window has followed it
    for (Index at = 0; at < plan.span; at += plan.chunk) {
        block.prepare(p, plan, at, plan.span);
        if (!active) continue;
        for (int group = 0; group < plan.chunk; group += batch) {
            typename L::Raw raw[batch];
            RowInfo rows[batch];
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                rows[i] = block.rows[block.stretch * plan.chunk + group + i];
                const Index t = block.first + at + group + i - rows[i].begin;
                if (rows[i].index >= 0)
                    raw[i] = lane.load(token(p.x, p.s.packed(), rows[i], t, block.h), p.x.stride[3], p.wide_x);
            }
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                const RowInfo& q = rows[i];
                const Index n = block.first + at + group + i, t = n - q.begin;
                if (q.index < 0) {
                    // Only packed rows (batch 1) belong to no sequence.
                    running = -1;
                    const A zeros[E] = {};
                    if (n < block.last) lane.store(p.y.data + n * p.y.stride[1] + block.h * p.y.stride[2], p.y.stride[3], p.wide_y, zeros);
                    continue;
                }
                if (taps > 1) {
                    if (running == q.index && t > 0)
                        window.shift();
                    else
                        window.fill(p, lane, q, t, block.h);
                }
                L::convert(raw[i], window.x[taps - 1]);
                running = q.index;
                A s[E], sum = A(0);
                window.convolve(s);
                rotate<false>(lane, block.angles + (block.stretch * plan.chunk + group + i) * block.pairs * 2, block.pairs, s);
#pragma unroll
                for (int j = 0; j < E; ++j) {
                    if (p.silu) s[j] *= sigmoid(s[j]);
                    sum += s[j] * s[j];
                }
                A gamma = A(1);
                if (p.normed) gamma = inverse_root(p.slope * block.sum(plan, sum) + p.norm_offset);
#pragma unroll
                for (int j = 0; j < E; ++j) s[j] = s[j] * gamma * scale[j] + bias[j];
                lane.store(token(p.y, p.s.packed(), q, t, block.h), p.y.stride[3], p.wide_y, s);
                if (taps > 1 && p.convT && n + 1 == q.end)
#pragma unroll
                    for (int k = 1; k < taps; ++k)
                        if (k > window.missing)
                            lane.store(state_row(p.convT, q, k - window.missing - 1, block.h), p.convT.stride[3], false, window.x[k]);
            }
        }
    }
}

template <class T, int taps, bool halves, int E>
__global__ void __launch_bounds__(128) team_backward_kernel(Problem<T> p, TeamPlan plan, PartialSums<acc_t<T>> sums) {
    using A = acc_t<T>;
    using L = Lane<T, E, halves>;
    constexpr int batch = rows_at_once<T, E> / 2;
    const TeamBlock<T> block(p, plan);
    const L lane{block.lane, static_cast<int>(p.s.features)};
    const bool active = block.h < p.s.heads;
    const int past = static_cast<int>(p.s.past());
    Window<T, taps, E, halves> window(p, lane, block.h, active);
    A scale[E], pending[taps][E] = {};  // pending[j]: de of the token j before the last
    A sum_scale[E] = {}, sum_bias[E] = {}, sum_conv_bias[E] = {}, sum_weight[taps][E] = {};
#pragma unroll
    for (int j = 0; j < E; ++j)
        scale[j] = active && lane.valid(j) && p.scale.data ? p.scale.template get<A>(lane.channel(j)) : A(1);

    std::int32_t running = -1;
    bool done = !active;  // beyond its own rows a team goes on while rows of theirs are pending
    const Index count = plan.span + past;
    for (Index at = 0; at < count; at += plan.chunk) {
        block.prepare(p, plan, at, count);
        if (done) continue;
        for (int group = 0; group < plan.chunk && !done; group += batch) {
            typename L::Raw raw[batch], raw_dy[batch];
            RowInfo rows[batch];
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                rows[i] = block.rows[block.stretch * plan.chunk + group + i];
                const Index t = block.first + at + group + i - rows[i].begin;
                if (rows[i].index < 0) continue;
                raw[i] = lane.load(token(p.x, p.s.packed(), rows[i], t, block.h), p.x.stride[3], p.wide_x);
                raw_dy[i] = lane.load(token(p.dy, p.s.packed(), rows[i], t, block.h), p.dy.stride[3], p.wide_dy);
            }
#pragma unroll
            for (int i = 0; i < batch; ++i) {
                const RowInfo& q = rows[i];
                const Index n = block.first + at + group + i, t = n - q.begin;
                const bool own = n < block.last;
                if (done) continue;
                if (q.index < 0) {
                    running = -1;
                    const A zeros[E] = {};
                    if (own && p.dx)
                        lane.store(p.dx.data + n * p.dx.stride[1] + block.h * p.dx.stride[2], p.dx.stride[3], p.wide_dx, zeros);
                    continue;
                }
                if (running != q.index || t == 0) {
                    if (!own) {  // nothing of the team's is pending
                        done = true;
                        continue;
                    }
                    if (taps > 1) window.fill(p, lane, q, t, block.h);
#pragma unroll
                    for (int k = 0; k < taps; ++k)
#pragma unroll
                        for (int j = 0; j < E; ++j) pending[k][j] = A(0);
                } else if (taps > 1) {
                    window.shift();
                }
                L::convert(raw[i], window.x[taps - 1]);
                running = q.index;

                A u[E], s[E], g[E], slope[E], square = A(0), dot = A(0);
                const A* const angles = block.angles + (block.stretch * plan.chunk + group + i) * block.pairs * 2;
                window.convolve(u);
                rotate<false>(lane, angles, block.pairs, u);
                L::convert(raw_dy[i], g);
#pragma unroll
                for (int j = 0; j < E; ++j) {
                    slope[j] = A(1);
                    s[j] = u[j];
                    if (p.silu) {
                        const A sigma = sigmoid(u[j]);
                        s[j] = u[j] * sigma;
                        slope[j] = sigma * (A(1) + u[j] * (A(1) - sigma));
                    }
                    square += s[j] * s[j];
                    dot += g[j] * scale[j] * s[j];
                }
                if (p.normed) {
                    const A gamma = inverse_root(p.slope * block.sum(plan, square) + p.norm_offset);
                    // eq. 11, in an order in which nothing overflows where s is tiny.
                    const A along = (p.slope * gamma * gamma) * (gamma * block.sum(plan, dot));
#pragma unroll
                    for (int j = 0; j < E; ++j) {
                        if (own) {
                            sum_scale[j] += g[j] * s[j] * gamma;
                            sum_bias[j] += g[j];
                        }
                        g[j] = (g[j] * scale[j] * gamma - along * s[j]) * slope[j];
                    }
                } else {
#pragma unroll
                    for (int j = 0; j < E; ++j) g[j] *= slope[j];
                }
                rotate<true>(lane, angles, block.pairs, g);  // dc

#pragma unroll
                for (int j = 0; j < E; ++j) {
                    if (own) {
                        sum_conv_bias[j] += g[j];
#pragma unroll
                        for (int k = 0; k < taps; ++k) sum_weight[k][j] += g[j] * window.x[k][j];
                    }
                    // eq. 15: token t - k gets weight taps-1-k.
#pragma unroll
                    for (int k = taps - 1; k > 0; --k) pending[k][j] = pending[k - 1][j] + window.weight[taps - 1 - k][j] * g[j];
                    pending[0][j] = window.weight[taps - 1][j] * g[j];
                }
                // Whole is now the oldest, and at the end of the sequence every one. Tokens before the first are conv0's.
                const bool last = n + 1 == q.end;
#pragma unroll
                for (int k = taps - 1; k >= 0; --k) {
                    if (k != past && !(last && k < past)) continue;
                    const Index token_at = t - k, row = q.begin + token_at, beyond = token_at + past - (q.end - q.begin);
                    const bool state = token_at < 0;
                    const Index owner = state ? q.begin : row;
                    if (owner < block.first || owner >= block.last || (state ? !p.dconv0 : !p.dx)) continue;
                    A de[E];
#pragma unroll
                    for (int j = 0; j < E; ++j) de[j] = pending[k][j];
                    if (beyond >= 0 && p.dconvT) {
                        A more[E];
                        L::convert(lane.load(state_row(p.dconvT, q, beyond, block.h), p.dconvT.stride[3], false), more);
#pragma unroll
                        for (int j = 0; j < E; ++j) de[j] += more[j];
                    }
                    if (state)
                        lane.store(state_row(p.dconv0, q, token_at + past, block.h), p.dconv0.stride[3], false, de);
                    else
                        lane.store(token(p.dx, p.s.packed(), q, token_at, block.h), p.dx.stride[3], p.wide_dx, de);
                }
                if (last) running = -1;
            }
        }
    }
    if (!active || !sums.data) return;
    const Index size = p.s.heads * p.s.features, part = static_cast<Index>(blockIdx.x) * plan.stretches + block.stretch;
    A* const to = sums.data + part * (p.s.taps + 3) * size + block.h * p.s.features;
#pragma unroll
    for (int j = 0; j < E; ++j) {
        if (!lane.valid(j)) continue;
        A* const channel = to + lane.channel(j);
        channel[0] = sum_scale[j];
        channel[size] = sum_bias[j];
        channel[2 * size] = sum_conv_bias[j];
#pragma unroll
        for (int k = 0; k < taps; ++k)
            if (k >= window.missing && p.s.taps > 0) channel[(3 + k - window.missing) * size] = sum_weight[k][j];
    }
}

/// Whether lanes can move `elements` of every head of a tensor at once.
template <class T>
bool moves_chunks(const View<T, 4>& x, Index elements, bool whole) {
    if (!x || !whole || (x.stride[3] != 1 && x.extent[3] > 1)) return false;
    const Index bytes = elements * static_cast<Index>(sizeof(T)), align = bytes > 16 ? 16 : bytes;
    if (reinterpret_cast<std::uintptr_t>(x.data) % static_cast<std::uintptr_t>(align) != 0) return false;
    for (int a = 0; a < 3; ++a)
        if (x.extent[a] > 1 && x.stride[a] * static_cast<Index>(sizeof(T)) % align != 0) return false;
    return true;
}
inline bool turns_halves(Rope rope) { return rope == Rope::half_split; }
/// Elements in a row that a lane moves, and whether heads are whole numbers of them.
inline Index chunk_elements(Rope rope, int elements) { return turns_halves(rope) ? elements / 2 : elements; }
inline bool whole_chunks(const Shape& s, Rope rope, int elements) {
    return (turns_halves(rope) ? s.features / 2 : s.features) % chunk_elements(rope, elements) == 0;
}
template <class T>
void choose_moves(Problem<T>& p, int elements) {
    const Index chunk = chunk_elements(p.rope, elements);
    const bool whole = whole_chunks(p.s, p.rope, elements);
    p.wide_x = moves_chunks(p.x, chunk, whole);
    p.wide_y = moves_chunks(p.y, chunk, whole);
    p.wide_dy = moves_chunks(p.dy, chunk, whole);
    p.wide_dx = moves_chunks(p.dx, chunk, whole);
}

/// f(taps, halves): the kernel's numbers for a call.
template <class T, class F>
Status with_team_kernel(const Problem<T>& p, F&& f) {
    const auto with_halves = [&](auto taps) {
        return turns_halves(p.rope) ? f(taps, std::true_type{}) : f(taps, std::false_type{});
    };
    return p.s.taps <= 1 ? with_halves(std::integral_constant<int, 1>{}) : with_halves(std::integral_constant<int, 4>{});
}

template <class T>
Status team_forward(const cuda& exec, Problem<T> p) {
    const int elements = forward_elements(p.s);
    choose_moves(p, elements);
    const TeamPlan plan = forward_plan(p.s);
    INTERSTATE_RETURN_IF_ERROR(check_size("x: blocks of a grid", plan.blocks));
    return with_team_kernel(p, [&](auto taps, auto halves) {
        const auto run = [&](auto E) {
            return launch(exec, "team_forward_kernel",
                          team_forward_kernel<T, decltype(taps)::value, decltype(halves)::value, decltype(E)::value>,
                          {dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.head_blocks)),
                           dim3(plan.threads), plan.shared<acc_t<T>>(p.s, p.rope != Rope::none)},
                          p, plan);
        };
        if constexpr (decltype(taps)::value > 1)
            if (elements == 4) return run(std::integral_constant<int, 4>{});
        return run(std::integral_constant<int, 8>{});
    });
}

template <class T>
Status team_backward(const cuda& exec, Problem<T> p, const PartialSums<acc_t<T>>& sums) {
    const int elements = backward_elements(p.s);
    choose_moves(p, elements);
    const TeamPlan plan = backward_plan(p.s);
    INTERSTATE_RETURN_IF_ERROR(check_size("x: blocks of a grid", plan.blocks));
    return with_team_kernel(p, [&](auto taps, auto halves) {
        const auto run = [&](auto E) {
            return launch(exec, "team_backward_kernel",
                          team_backward_kernel<T, decltype(taps)::value, decltype(halves)::value, decltype(E)::value>,
                          {dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.head_blocks)),
                           dim3(plan.threads), plan.shared<acc_t<T>>(p.s, p.rope != Rope::none)},
                          p, plan, sums);
        };
        return elements == 4 ? run(std::integral_constant<int, 4>{}) : run(std::integral_constant<int, 8>{});
    });
}

}  // namespace INTERSTATE_KERNELS

}  // namespace feature_map::detail
}  // namespace interstate::inline INTERSTATE_ABI
