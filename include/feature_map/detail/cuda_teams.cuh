// The feature map on the GPU, for heads of up to 32 lanes of channels and up to 4 taps: a team of lanes a head.
//
// A team, 4 to 32 lanes of a warp, has E channels a lane and walks along time. What the convolution needs of earlier rows
// stays in registers, so that x is read once; sums over a head are shuffles. Teams of a block are neighbouring heads of the
// same rows, which lie side by side in memory, then stretches of rows that follow each other. What the heads of a row share
// is made once a block, in shared memory: where the row lies, what is to be done with it, its cosines and sines. Rows come
// into shared memory a few ahead of their use, every lane's channels into slots of its own.
//
// Before its own rows a team reads the taps-1 that the first looks back at. Backward recomputes the stages; a row's dc
// goes into taps pending rows of dx, also in registers, of which the oldest is then whole. A team goes on past its own
// rows until its last one is. Sums over rows stay in registers to the end.
#pragma once

#include <feature_map/detail/cuda_problem.cuh>
#include <interstate/cuda/async.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map::detail {

inline constexpr int team_taps = 4;

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

/// How a lane moves its channels of a row.
enum class Move : std::int32_t {
    none,      // all are beyond the head
    whole,     // at once
    halves,    // each half at once
    elements,  // one by one
};

/// A lane's channels: E in a row or, where RoPE turns channels of both halves, E/2 of each.
template <class T, int E>
struct Lane {
    using A = acc_t<T>;
    static constexpr int width = E / 2;
    bool halves;
    int start, half;  // the first channel, and from there to the first of the second half
    int limit;        // channels of the head from `start` on, in either half

    __device__ Lane(const Problem<T>& p, int lane) : halves(p.rope == Rope::half_split) {
        const int features = static_cast<int>(p.s.features);
        start = halves ? lane * width : lane * E;
        half = halves ? features / 2 : width;
        limit = (halves ? features / 2 : features) - start;
    }
    __device__ int place(int j) const { return j < width ? j : half + j - width; }
    __device__ int channel(int j) const { return start + place(j); }
    __device__ bool valid(int j) const { return (halves ? j % width : j) < limit; }

    /// The lane's first channel of a head of x.
    template <class P>
    __device__ P* first(P* head, const View<P, 4>& x) const { return head + start * x.stride[3]; }
    __device__ Move move(bool wide) const {
        const Move move = !wide ? Move::elements : limit <= 0 ? Move::none : halves ? Move::halves : Move::whole;
        return static_cast<Move>(device::kept(static_cast<int>(move)));
    }

    template <int bytes>
    __device__ static void start_copy(T* slot, const T* from) {
        if constexpr (bytes == 16)
            device::copy_async_16(slot, from, true);
        else
            device::copy_async<bytes>(slot, from);
    }
    /// From the place of the lane's first channel into its slot: asynchronous but for elements. Of channels beyond the head
    /// elements are zeros; else they are left alone.
    __device__ void fetch(T* slot, const T* from, Index stride, Move move) const {
        constexpr int bytes = width * static_cast<int>(sizeof(T));
        if (move == Move::none) return;
        if (move == Move::whole && bytes < 16) {
            start_copy<bytes == 16 ? 16 : 2 * bytes>(slot, from);
            return;
        }
        if (move != Move::elements) {
            start_copy<bytes>(slot, from);
            start_copy<bytes>(slot + width, from + half);
            return;
        }
#pragma unroll 1
        for (int i = 0; i < 2; ++i, slot += width, from += half * stride) {
            T element[width];
#pragma unroll
            for (int j = 0; j < width; ++j) element[j] = (halves ? j : i * width + j) < limit ? from[j * stride] : T(0.0f);
#pragma unroll
            for (int j = 0; j < width; ++j) slot[j] = element[j];
        }
    }
    /// A parameter's elements of the lane's channels, whose first of the head is at `at`.
    __device__ void load(const Parameter& p, Index at, Index stride, A (&x)[E], A otherwise) const {
        const auto take = [&](const auto* from) {
            from += at + start * stride;
#pragma unroll
            for (int j = 0; j < E; ++j) x[j] = valid(j) ? static_cast<A>(from[place(j) * stride]) : A(0);
        };
        if (!p.data)
#pragma unroll
            for (int j = 0; j < E; ++j) x[j] = otherwise;
        else if (p.is_double)
            take(static_cast<const double*>(p.data));
        else
            take(static_cast<const float*>(p.data));
    }
    __device__ static void read(const T* slot, A (&x)[E]) {
        Chunk<T, E> chunk;
        chunk.load(slot);
        device::Pair<T> pair[width];
        memcpy(pair, &chunk, sizeof chunk);
#pragma unroll
        for (int i = 0; i < width; ++i) device::unpack<T>(pair[i], x[2 * i], x[2 * i + 1]);
    }
    __device__ static Chunk<T, E> pack(const A (&x)[E]) {
        device::Pair<T> pair[width];
#pragma unroll
        for (int i = 0; i < width; ++i) pair[i] = device::pack<T>(x[2 * i], x[2 * i + 1]);
        Chunk<T, E> chunk;
        memcpy(&chunk, pair, sizeof chunk);
        return chunk;
    }
    /// To the place of the lane's first channel; elements go through `scratch`.
    __device__ void store(T* to, Index stride, Move move, const A (&x)[E], T* scratch) const {
        const Chunk<T, E> chunk = pack(x);
        if (move == Move::whole) {
            chunk.store(to);
        } else if (move == Move::halves) {
            Chunk<T, width> part[2];
            memcpy(part, &chunk, sizeof chunk);
            part[0].store(to);
            part[1].store(to + half);
        } else if (move == Move::elements) {
            chunk.store(scratch);
            copy(to, stride, scratch);
        }
    }
    /// From a slot, one by one.
    __device__ void copy(T* to, Index stride, const T* slot) const {
#pragma unroll 1
        for (int j = 0; j < E; ++j, to += stride) {
            if (j == width) to += (half - width) * stride;
            if (valid(j)) *to = slot[j];
        }
    }
};

/// Threads whose places in shared memory lie side by side; blocks are whole numbers of them.
inline constexpr int team_group = 128;

/// E numbers of every thread in shared memory rather than in registers, 16 bytes of all threads of a group side by side.
template <class A, int E>
struct Parked {
    static constexpr int words = E * static_cast<int>(sizeof(A)) / 16;
    uint4* data;  // the thread's first

    __device__ void put(const A (&x)[E]) const {
        uint4 word[words];
        memcpy(word, x, sizeof word);
#pragma unroll
        for (int i = 0; i < words; ++i) data[i * team_group] = word[i];
    }
    __device__ void get(A (&x)[E]) const {
        uint4 word[words];
#pragma unroll
        for (int i = 0; i < words; ++i) word[i] = data[i * team_group];
        memcpy(x, word, sizeof word);
    }
    /// The i-th of several.
    __device__ Parked at(int i) const { return {data + i * words * team_group}; }
};

/// How a grid of teams covers heads and rows; a function of the shape alone.
struct TeamPlan {
    int lanes;         // of a team, a power of two
    int heads;         // of a block, a power of two
    int stretches;     // of rows, of a block
    int threads;
    int pitch;         // pairs of a row that have angles, a power of two
    int chunk;         // rows that are prepared at once, a power of two
    Index span;        // rows of a team
    Index blocks;      // along the rows
    Index head_blocks;

    TeamPlan(const Shape& s, int elements, int most_threads, Index wanted_threads, Index least, Index most) {
        lanes = 4;
        while (lanes * elements < s.features) lanes *= 2;
        heads = 1;
        while (heads < most_threads / lanes && heads < s.heads) heads *= 2;
        threads = heads * lanes < team_group ? team_group : heads * lanes;
        stretches = threads / lanes / heads;
        pitch = lanes * elements / 2;
        chunk = 16;
        while (chunk > 4 && chunk * stretches * pitch > 1024) chunk /= 2;
        // Enough teams to fill a GPU, but stretches long enough for what is done twice at their borders to be little.
        span = ceil_div(s.rows() * s.heads * lanes, wanted_threads);
        span = span < least ? least : span > most ? most : span;
        blocks = ceil_div(s.rows(), span * stretches);
        head_blocks = ceil_div(s.heads, heads);
    }
    Index parts() const { return blocks * stretches; }
};

/// Channels of a lane: 16 bytes of 16-bit storage, registers for four doubles.
template <class T>
inline constexpr int team_elements = sizeof(T) == 8 ? 4 : 8;
inline int elements_of(const Shape& s) { return s.dtype == DType::f64 ? team_elements<double> : team_elements<float>; }
inline bool fits_teams(const Shape& s) { return s.features <= 32 * elements_of(s) && s.taps <= team_taps; }
inline constexpr int forward_threads = 2 * team_group, backward_threads = team_group;  // of a block, at most
inline TeamPlan forward_plan(const Shape& s) { return {s, elements_of(s), forward_threads, Index{1} << 16, 1, 128}; }
inline TeamPlan backward_plan(const Shape& s) { return {s, elements_of(s), backward_threads, Index{1} << 15, 8, 1024}; }

inline namespace INTERSTATE_KERNELS {

inline constexpr int team_stages = 4;  // rows of which a lane has slots

/// What is to be done with a row of a stretch.
enum RowKind : std::int32_t {
    row_is_read = 1,      // it belongs to a sequence, and its own rows need it
    row_is_computed = 2,  // not only looked back at
    row_is_own = 4,
    row_starts = 8,       // a sequence
    row_ends = 16,        // a sequence
    row_is_zero = 32,     // own, of no sequence
    row_is_stored = 64,   // the row of y, or the row of dx that becomes whole
    row_is_rare = 128     // backward: rows become whole that are not stored so
};
/// A row of a stretch as its teams find it in shared memory: offsets into tensors, of head 0.
struct alignas(16) TeamRow {
    Index x, dy, out;  // out: of y, or of the row of dx that becomes whole
    double position;
    std::int32_t kind, index, begin, t;  // of its sequence: index, first row; the row's own place in it
};

/// A block's view of the plan: its team, and what the teams share.
template <class T, int taps, int E, bool backward>
struct TeamBlock {
    using A = acc_t<T>;
    static constexpr int past = taps - 1, tensors = backward ? 2 : 1, parked = backward ? 0 : 2;
    static constexpr int places = team_stages * tensors + 1;  // of a thread for its channels: the last is scratch
    double* frequencies;  // (pitch)
    A* angles;            // (2, stretches, chunk, pitch, 2)
    TeamRow* rows;        // (stretches, 3, chunk)
    Parked<A, E> park;
    T* slots;             // (groups, places, team_group, E), from the thread's first on
    int pitch, lane, stretch;
    Index h, first, last;  // head; own rows [first, last)

    static std::size_t shared(const TeamPlan& plan, bool rope) {
        const auto rows = static_cast<std::size_t>(plan.stretches * plan.chunk), elements = static_cast<std::size_t>(plan.threads * E);
        const auto pitch = static_cast<std::size_t>(rope ? plan.pitch : 0);
        return sizeof(double) * pitch + 2 * rows * pitch * 2 * sizeof(A) + 3 * rows * sizeof(TeamRow) +
               elements * (parked * sizeof(A) + places * sizeof(T));
    }
    __device__ TeamBlock(const Problem<T>& p, const TeamPlan& plan) {
        extern __shared__ __align__(16) unsigned char memory[];
        pitch = p.rope == Rope::none ? 0 : plan.pitch;
        frequencies = reinterpret_cast<double*>(memory);
        angles = reinterpret_cast<A*>(frequencies + pitch);
        rows = reinterpret_cast<TeamRow*>(angles + 2 * plan.stretches * plan.chunk * pitch * 2);
        uint4* const parks = reinterpret_cast<uint4*>(rows + 3 * plan.stretches * plan.chunk);
        const int group = static_cast<int>(threadIdx.x) / team_group, in_group = static_cast<int>(threadIdx.x) % team_group;
        park.data = parks + group * parked * park.words * team_group + in_group;
        slots = reinterpret_cast<T*>(parks + parked * park.words * plan.threads) + (group * places * team_group + in_group) * E;
        const int team = static_cast<int>(threadIdx.x) / plan.lanes;
        lane = static_cast<int>(threadIdx.x) % plan.lanes;
        stretch = team / plan.heads;
        h = static_cast<Index>(blockIdx.y) * plan.heads + team % plan.heads;
        first = first_row(plan, stretch);
        last = min(first + plan.span, p.s.rows());
        const Chunk<T, E> zeros{};
#pragma unroll 1
        for (int i = 0; i + 1 < places; ++i) zeros.store(slots + i * team_group * E);
        for (int i = threadIdx.x; i < pitch; i += blockDim.x) frequencies[i] = frequency(p.base, p.s.features, i);
    }
    __device__ static Index first_row(const TeamPlan& plan, int stretch) {
        return (static_cast<Index>(blockIdx.x) * plan.stretches + stretch) * plan.span;
    }
    __device__ T* slot(int stage, int tensor) const { return slots + (stage * tensors + tensor) * team_group * E; }
    __device__ T* scratch() const { return slot(team_stages, 0); }

    /// Rows of the stretch: the taps-1 before, its own and, backward, the taps-1 after.
    __device__ static Index count(const TeamPlan& plan) { return plan.span + (backward ? 2 : 1) * past; }
    __device__ static TeamRow describe(const Problem<T>& p, const TeamPlan& plan, Index first, Index i) {
        const Index last = min(first + plan.span, p.s.rows()), n = first - past + i;
        TeamRow row{};
        if (n < 0 || i >= count(plan)) return row;
        const RowInfo q = row_info(p, n);
        const bool own = n >= first && n < last;
        if (q.index < 0) {
            const View<T, 4>& to = backward ? p.dx : p.y;
            if (own && to) row.kind = row_is_zero | row_is_stored, row.out = n * to.stride[1];
            return row;
        }
        if (n >= last && !(backward && q.begin < last)) return row;
        const Index t = n - q.begin;
        row.index = q.index, row.begin = q.begin, row.t = static_cast<std::int32_t>(t);
        row.kind = row_is_read | (n >= first ? row_is_computed : 0) | (own ? row_is_own : 0) | (t == 0 ? row_starts : 0) |
                   (n + 1 == q.end ? row_ends : 0);
        row.x = row_offset(p.x, p.s.packed(), q, t);
        if (p.rope != Rope::none) row.position = position_of(p, q, t);
        if constexpr (backward) {
            row.dy = row_offset(p.dy, p.s.packed(), q, t);
            row.out = row_offset(p.dx, p.s.packed(), q, t - past);
            if (past > 0 && n >= first && (n + 1 == q.end || (t < past && p.dconv0)))
                row.kind |= row_is_rare;
            else if (p.dx && t >= past && n - past >= first)
                row.kind |= row_is_stored;
        } else {
            row.out = row_offset(p.y, p.s.packed(), q, t);
            if (own) row.kind |= row_is_stored;
        }
        return row;
    }
    /// Chunk c of the rows, and the angles of the one before.
    __device__ void prepare(const Problem<T>& p, const TeamPlan& plan, int c) const {
        const int block_rows = plan.stretches * plan.chunk, shift = 31 - __clz(plan.pitch);
        const auto at = [&](int i, int chunk) -> TeamRow& {
            return rows[(i / plan.chunk * 3 + chunk % 3) * plan.chunk + i % plan.chunk];
        };
        for (int i = threadIdx.x; i < block_rows; i += blockDim.x)
            at(i, c) = describe(p, plan, first_row(plan, i / plan.chunk), static_cast<Index>(c) * plan.chunk + i % plan.chunk);
        if (c == 0) return;
        A* const to = angles + (c - 1) % 2 * block_rows * pitch * 2;
        for (int i = threadIdx.x; i < block_rows * pitch; i += blockDim.x) {
            const TeamRow& row = at(i >> shift, c - 1);
            if (row.kind & row_is_computed) turn(row.position, frequencies[i & (pitch - 1)], to[2 * i], to[2 * i + 1]);
        }
    }

    /// fetch(row, kind, stage) starts bringing a row into a stage's slots; run(row, kind, stage, angles) works on it,
    /// team_stages - 1 rows later. While a chunk is worked on, the next one lies ready to be fetched. All lanes of a warp call
    /// run together, with kinds of their own; idle teams have rows of kind 0.
    template <class Fetch, class Run>
    __device__ void walk(const Problem<T>& p, const TeamPlan& plan, Fetch&& fetch, Run&& run) const {
        constexpr unsigned lead = team_stages - 1;
        const int total = static_cast<int>(count(plan)), chunks = (total + plan.chunk - 1) / plan.chunk;
        const int ring = device::kept(3 * plan.chunk), kinds = device::kept(h < p.s.heads ? -1 : 0);
        const TeamRow* const own = rows + stretch * ring;
        int now = 0, ahead = 0;
        for (int c = -2; c < chunks; ++c) {
            if (c >= -1) {
                // Before the first chunk there is nothing to work on, but its first rows are fetched.
                const auto end = static_cast<unsigned>(min(plan.chunk, total - c * plan.chunk));
                const A* angle = angles + ((c & 1) * plan.stretches + stretch) * plan.chunk * pitch * 2 + lane * E;
#pragma unroll 1
                for (unsigned i = c < 0 ? plan.chunk - lead : 0; i < end; ++i) {
                    fetch(own[ahead], own[ahead].kind & kinds, (i + lead) % team_stages);
                    device::commit_copies();
                    ahead = ahead + 1 == ring ? 0 : ahead + 1;
                    if (c < 0) continue;
                    device::wait_for_all_but<static_cast<int>(lead)>();
                    run(own[now], own[now].kind & kinds, i % team_stages, angle);
                    now = now + 1 == ring ? 0 : now + 1;
                    angle += pitch * 2;
                }
            }
            prepare(p, plan, c + 2);
            __syncthreads();
        }
    }
    /// Over the lanes of the team; all lanes of a warp call it together.
    template <class... Sums>
    __device__ static void sum(const TeamPlan& plan, Sums&... x) {
        const auto add = [&](int step) { ((x += __shfl_xor_sync(0xffffffffu, x, step)), ...); };
        add(1);
        add(2);
        if (plan.lanes > 4) add(4);
        if (plan.lanes > 8) add(8);
        if (plan.lanes > 16) add(16);
    }
};

/// The convolution's weights in registers.
template <class T, int taps, int E>
struct Weights {
    using A = acc_t<T>;
    A weight[taps][E], bias[E];
    int missing;  // taps that the weight does not have: the first

    __device__ Weights(const Problem<T>& p, const Lane<T, E>& lane, Index h) : missing(taps - max(static_cast<int>(p.s.taps), 1)) {
        lane.load(p.conv_bias, h * p.conv_bias.stride[0], p.conv_bias.stride[1], bias, A(0));
#pragma unroll
        for (int k = 0; k < taps; ++k) {
#pragma unroll
            for (int j = 0; j < E; ++j) weight[k][j] = A(0);
            if (k >= missing) lane.load(p.weight, p.weight.at(h, 0, k - missing), p.weight.stride[1], weight[k], A(1));
        }
    }
};
/// push(slot), with the slot of every row before the first of a sequence.
template <class T, int E, class Push>
__device__ void push_state(const Problem<T>& p, const Lane<T, E>& lane, const TeamRow& row, Index h, T* scratch, Push&& push) {
    if (!p.conv0) return;
#pragma unroll 1
    for (int i = 0; i < static_cast<int>(p.s.past()); ++i) {
        lane.fetch(scratch, lane.first(state_row(p.conv0, row.index, i, h), p.conv0), p.conv0.stride[3], Move::elements);
        push(scratch);
    }
}

/// eq. 1 as it comes about row by row: what the rows so far give to tokens to come.
template <class T, int taps, int E>
struct Convolution : Weights<T, taps, E> {
    using A = acc_t<T>;
    A begun[taps][E];  // of the token that many ahead; the last is the bias

    __device__ Convolution(const Problem<T>& p, const Lane<T, E>& lane, Index h) : Weights<T, taps, E>(p, lane, h) { clear(); }
    __device__ void clear() {
#pragma unroll
        for (int k = 0; k < taps; ++k)
#pragma unroll
            for (int j = 0; j < E; ++j) begun[k][j] = this->bias[j];
    }
    __device__ void push(const T* slot, A (&c)[E]) {
        A x[E];
        Lane<T, E>::read(slot, x);
#pragma unroll
        for (int j = 0; j < E; ++j) c[j] = begun[0][j] + this->weight[taps - 1][j] * x[j];
        const auto add = [&](int k) {
#pragma unroll
            for (int j = 0; j < E; ++j) begun[k][j] = begun[k + 1][j] + this->weight[taps - 2 - k][j] * x[j];
        };
        if (this->missing == 0) {
#pragma unroll
            for (int k = 0; k + 1 < taps; ++k) add(k);
            return;
        }
#pragma unroll
        for (int k = 0; k + 1 < taps; ++k)  // a missing tap must not see a NaN
            if (taps - 2 - k >= this->missing)
                add(k);
            else
#pragma unroll
                for (int j = 0; j < E; ++j) begun[k][j] = begun[k + 1][j];
    }
};

/// eq. 1 with the rows of x that it looks at, the last the token's own, which the weight's gradient needs too.
template <class T, int taps, int E>
struct Window : Weights<T, taps, E> {
    using A = acc_t<T>;
    A x[taps][E] = {};

    using Weights<T, taps, E>::Weights;
    __device__ void clear() {
#pragma unroll
        for (int k = 0; k < taps; ++k)
#pragma unroll
            for (int j = 0; j < E; ++j) x[k][j] = A(0);
    }
    __device__ void push(const T* slot) {
#pragma unroll
        for (int k = 0; k + 1 < taps; ++k)
#pragma unroll
            for (int j = 0; j < E; ++j) x[k][j] = x[k + 1][j];
        Lane<T, E>::read(slot, x[taps - 1]);
    }
    __device__ void convolve(A (&c)[E]) const {
#pragma unroll
        for (int j = 0; j < E; ++j) c[j] = this->bias[j] + this->weight[taps - 1][j] * x[taps - 1][j];
#pragma unroll
        for (int k = taps - 2; k >= 0; --k)
            if (k >= this->missing)
#pragma unroll
                for (int j = 0; j < E; ++j) c[j] += this->weight[k][j] * x[k][j];
    }
};

/// eq. 2, or with `back` eq. 13, of a row whose angles are given from the lane's first pair on.
template <bool back, class A, int E>
__device__ void rotate(const A* angles, bool halves, A (&x)[E]) {
    Chunk<A, E> chunk;
    chunk.load(angles);
    A angle[E];
    memcpy(angle, &chunk, sizeof chunk);
    const auto turn_pair = [&](A& a, A& b, int i) {
        const A cosine = angle[2 * i], sine = back ? -angle[2 * i + 1] : angle[2 * i + 1], before = a;
        a = before * cosine - b * sine;
        b = before * sine + b * cosine;
    };
    if (halves) {
#pragma unroll
        for (int i = 0; i < E / 2; ++i) turn_pair(x[i], x[i + E / 2], i);
    } else {
#pragma unroll
        for (int i = 0; i < E / 2; ++i) turn_pair(x[2 * i], x[2 * i + 1], i);
    }
}

template <class T, int taps, int E>
__global__ void __launch_bounds__(forward_threads, sizeof(T) == 8 ? 1 : 2) team_forward_kernel(Problem<T> p, TeamPlan plan) {
    using A = acc_t<T>;
    using Block = TeamBlock<T, taps, E, false>;
    const Block block(p, plan);
    const Lane<T, E> lane(p, block.lane);
    const Index h = min(block.h, p.s.heads - 1);  // an idle team reads the parameters of another
    Convolution<T, taps, E> convolution(p, lane, h);
    const auto parked_scale = block.park.at(0), parked_bias = block.park.at(1);
    if (p.rms) {
        A scale[E], bias[E];
        lane.load(p.scale, 0, p.scale.stride[0], scale, A(1));
        lane.load(p.bias, h * p.bias.stride[0], p.bias.stride[1], bias, A(0));
        parked_scale.put(scale);
        parked_bias.put(bias);
    }
    const T* const x = device::kept(lane.first(p.x.data + block.h * p.x.stride[2], p.x));
    T* const y = device::kept(lane.first(p.y.data + block.h * p.y.stride[2], p.y));
    const Move move_x = lane.move(p.wide_x), move_y = lane.move(p.wide_y);
    block.walk(
        p, plan,
        [&](const TeamRow& row, int kind, int stage) {
            if (kind & row_is_read) lane.fetch(block.slot(stage, 0), x + row.x, p.x.stride[3], move_x);
        },
        [&](const TeamRow& row, int kind, int stage, const A* angles) {
            A s[E];
            if (taps > 1 && (kind & row_starts)) {
                convolution.clear();
                push_state(p, lane, row, block.h, block.scratch(), [&](const T* slot) { convolution.push(slot, s); });
            }
            // Teams whose row is not read or not computed go along; what they make is not used.
            convolution.push(block.slot(stage, 0), s);
            if (__any_sync(0xffffffffu, kind & row_is_computed)) {
                if (p.rope != Rope::none) rotate<false>(angles, lane.halves, s);
                if (p.silu)
#pragma unroll
                    for (int j = 0; j < E; ++j) s[j] *= sigmoid(s[j]);
                if (p.normed) {
                    A half[2] = {};
#pragma unroll
                    for (int j = 0; j < E; ++j) half[j % 2] += s[j] * s[j];
                    A sum = half[0] + half[1];
                    block.sum(plan, sum);
                    const A gamma = inverse_root(p.slope * sum + p.norm_offset);
#pragma unroll
                    for (int j = 0; j < E; ++j) s[j] *= gamma;
                }
                if (p.rms) {
                    A scale[E], bias[E];
                    parked_scale.get(scale);
                    parked_bias.get(bias);
#pragma unroll
                    for (int j = 0; j < E; ++j) s[j] = s[j] * scale[j] + bias[j];
                }
            }
            if (__any_sync(0xffffffffu, kind & row_is_zero))
#pragma unroll
                for (int j = 0; j < E; ++j) s[j] = kind & row_is_zero ? A(0) : s[j];
            if (!(kind & row_is_stored)) return;
            lane.store(y + row.out, p.y.stride[3], move_y, s, block.scratch());
            if (taps == 1 || !(kind & row_ends) || !p.convT) return;
            // From the oldest on: a step writes where conv0 is.
            const int past = static_cast<int>(p.s.past());
#pragma unroll 1
            for (int i = 0; i < past; ++i) {
                const int back = past - 1 - i, token_at = row.t - back;
                T* const slot = block.scratch();
                if (token_at >= 0)
                    lane.fetch(slot, x + row.x - back * p.x.stride[1], p.x.stride[3], Move::elements);
                else if (p.conv0)
                    lane.fetch(slot, lane.first(state_row(p.conv0, row.index, token_at + past, block.h), p.conv0), p.conv0.stride[3],
                               Move::elements);
                else
                    Chunk<T, E>{}.store(slot);
                lane.copy(lane.first(state_row(p.convT, row.index, i, block.h), p.convT), p.convT.stride[3], slot);
            }
        });
}

template <class T, int taps, int E>
__global__ void __launch_bounds__(backward_threads, 2)
    team_backward_kernel(Problem<T> p, TeamPlan plan, PartialSums<acc_t<T>> sums) {
    using A = acc_t<T>;
    using Block = TeamBlock<T, taps, E, true>;
    const Block block(p, plan);
    const Lane<T, E> lane(p, block.lane);
    const int past = static_cast<int>(p.s.past());
    const Index h = min(block.h, p.s.heads - 1);  // an idle team reads the parameters of another
    Window<T, taps, E> window(p, lane, h);
    A scale[E], pending[taps][E] = {};  // pending[k]: de of the token k before the last
    A sum_scale[E] = {}, sum_bias[E] = {}, sum_conv_bias[E] = {}, sum_weight[taps][E] = {};
    lane.load(p.scale, 0, p.scale.stride[0], scale, A(1));
    const T* const x = device::kept(lane.first(p.x.data + block.h * p.x.stride[2], p.x));
    const T* const dy = device::kept(lane.first(p.dy.data + block.h * p.dy.stride[2], p.dy));
    T* const dx = device::kept(lane.first(p.dx.data + block.h * p.dx.stride[2], p.dx));
    const Move move_x = lane.move(p.wide_x), move_dy = lane.move(p.wide_dy), move_dx = lane.move(p.wide_dx);
    block.walk(
        p, plan,
        [&](const TeamRow& row, int kind, int stage) {
            if (kind & row_is_read) lane.fetch(block.slot(stage, 0), x + row.x, p.x.stride[3], move_x);
            if (kind & row_is_computed) lane.fetch(block.slot(stage, 1), dy + row.dy, p.dy.stride[3], move_dy);
        },
        [&](const TeamRow& row, int kind, int stage, const A* angles) {
            if (taps > 1 && (kind & row_starts)) {
                window.clear();
                push_state(p, lane, row, block.h, block.scratch(), [&](const T* slot) { window.push(slot); });
#pragma unroll
                for (int k = 0; k < taps; ++k)
#pragma unroll
                    for (int j = 0; j < E; ++j) pending[k][j] = A(0);
            }
            // Teams whose row is not read or not computed go along; what they make is not used.
            window.push(block.slot(stage, 0));
            if (__any_sync(0xffffffffu, kind & row_is_computed)) {
                A s[E], g[E], slope[E];
                window.convolve(s);
                if (p.rope != Rope::none) rotate<false>(angles, lane.halves, s);
                Lane<T, E>::read(block.slot(stage, 1), g);
                if (p.silu) {
#pragma unroll
                    for (int j = 0; j < E; ++j) {
                        const A sigma = sigmoid(s[j]);
                        s[j] *= sigma;
                        slope[j] = sigma + s[j] * (A(1) - sigma);  // eq. 12
                    }
                }
                const bool own = kind & row_is_own;
                if (p.normed) {
                    A squares[2] = {}, dots[2] = {}, product[E];
#pragma unroll
                    for (int j = 0; j < E; ++j) {
                        product[j] = g[j] * s[j];
                        squares[j % 2] += s[j] * s[j];
                        dots[j % 2] += product[j] * scale[j];
                    }
                    A square = squares[0] + squares[1], dot = dots[0] + dots[1];
                    block.sum(plan, square, dot);
                    const A gamma = inverse_root(p.slope * square + p.norm_offset);
                    // eq. 11, in an order in which nothing overflows where s is tiny.
                    const A along = (p.slope * gamma * gamma) * (gamma * dot);
                    if (own && p.rms)
#pragma unroll
                        for (int j = 0; j < E; ++j) sum_scale[j] += product[j] * gamma, sum_bias[j] += g[j];
#pragma unroll
                    for (int j = 0; j < E; ++j) g[j] = g[j] * (scale[j] * gamma) - along * s[j];
                }
                if (p.silu)
#pragma unroll
                    for (int j = 0; j < E; ++j) g[j] *= slope[j];
                if (p.rope != Rope::none) rotate<true>(angles, lane.halves, g);  // dc

                if (own)
#pragma unroll
                    for (int j = 0; j < E; ++j) {
                        sum_conv_bias[j] += g[j];
#pragma unroll
                        for (int k = 0; k < taps; ++k) sum_weight[k][j] += g[j] * window.x[k][j];
                    }
                // eq. 15: token t - k gets weight taps-1-k.
                const auto add = [&](int k) {
#pragma unroll
                    for (int j = 0; j < E; ++j) pending[k][j] = pending[k - 1][j] + window.weight[taps - 1 - k][j] * g[j];
                };
                if (window.missing == 0) {
#pragma unroll
                    for (int k = taps - 1; k > 0; --k) add(k);
                } else {
#pragma unroll
                    for (int k = taps - 1; k > 0; --k)
                        if (k <= past)
                            add(k);
                        else
#pragma unroll
                            for (int j = 0; j < E; ++j) pending[k][j] = pending[k - 1][j];
                }
#pragma unroll
                for (int j = 0; j < E; ++j) pending[0][j] = window.weight[taps - 1][j] * g[j];
            }
            if (__any_sync(0xffffffffu, kind & row_is_zero))
#pragma unroll
                for (int j = 0; j < E; ++j) pending[taps - 1][j] = kind & row_is_zero ? A(0) : pending[taps - 1][j];
            if (kind & row_is_stored) lane.store(dx + row.out, p.dx.stride[3], move_dx, pending[taps - 1], block.scratch());
            if (taps == 1 || !(kind & row_is_rare)) return;
            // Other rows are whole: at the end of a sequence all, and near its first token one of conv0's.
            const bool ends = kind & row_ends;
#pragma unroll 1
            for (int k = taps - 1;; --k) {
                const Index token_at = row.t - k, owner = row.begin + max(token_at, Index{0}), state = token_at + past;
                const bool wanted = token_at >= 0 ? static_cast<bool>(p.dx) : p.dconv0 && state >= 0;
                if (wanted && owner >= block.first && owner < block.last) {
                    A de[E];
#pragma unroll
                    for (int j = 0; j < E; ++j) de[j] = pending[taps - 1][j];
                    if (ends && k < past && p.dconvT) {
                        A more[E];
                        lane.fetch(block.scratch(), lane.first(state_row(p.dconvT, row.index, past - 1 - k, block.h), p.dconvT),
                                   p.dconvT.stride[3], Move::elements);
                        Lane<T, E>::read(block.scratch(), more);
#pragma unroll
                        for (int j = 0; j < E; ++j) de[j] += more[j];
                    }
                    if (token_at >= 0)
                        lane.store(dx + row.out + (taps - 1 - k) * p.dx.stride[1], p.dx.stride[3], Move::elements, de, block.scratch());
                    else
                        lane.store(lane.first(state_row(p.dconv0, row.index, state, block.h), p.dconv0), p.dconv0.stride[3],
                                   Move::elements, de, block.scratch());
                }
                if (!ends || k == 0) break;
#pragma unroll
                for (int older = taps - 1; older > 0; --older)
#pragma unroll
                    for (int j = 0; j < E; ++j) pending[older][j] = pending[older - 1][j];
            }
        });
    if (block.h >= p.s.heads || !sums.data) return;
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

/// run(taps): with the taps of the kernel for a call.
template <class F>
Status with_taps(const Shape& s, F&& run) {
    return s.taps <= 1 ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, team_taps>{});
}
template <class Block, class T, class Kernel, class... Arguments>
Status launch_teams(const cuda& exec, const char* name, Kernel kernel, const Problem<T>& p, const TeamPlan& plan,
                    const Arguments&... arguments) {
    INTERSTATE_RETURN_IF_ERROR(check_size("x: blocks of a grid", plan.blocks));
    return launch(exec, name, kernel,
                  {dim3(static_cast<unsigned>(plan.blocks), static_cast<unsigned>(plan.head_blocks)), dim3(static_cast<unsigned>(plan.threads)),
                   Block::shared(plan, p.rope != Rope::none)},
                  p, plan, arguments...);
}

template <class T>
Status team_forward(const cuda& exec, Problem<T> p) {
    constexpr int E = team_elements<T>;
    choose_moves(p, E);
    return with_taps(p.s, [&](auto taps) {
        constexpr int K = decltype(taps)::value;
        return launch_teams<TeamBlock<T, K, E, false>>(exec, "team_forward_kernel", team_forward_kernel<T, K, E>, p,
                                                       forward_plan(p.s));
    });
}

template <class T>
Status team_backward(const cuda& exec, Problem<T> p, const PartialSums<acc_t<T>>& sums) {
    constexpr int E = team_elements<T>;
    choose_moves(p, E);
    return with_taps(p.s, [&](auto taps) {
        constexpr int K = decltype(taps)::value;
        return launch_teams<TeamBlock<T, K, E, true>>(exec, "team_backward_kernel", team_backward_kernel<T, K, E>, p,
                                                      backward_plan(p.s), sums);
    });
}

}  // namespace INTERSTATE_KERNELS

}  // namespace feature_map::detail
}  // namespace interstate::inline INTERSTATE_ABI
