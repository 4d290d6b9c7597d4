// Backward of chunks, in any order, in two kernels with the adjoint's sweep between them (eq. 20 to 25 of
// docs/ops/interdomain.md): query_gradient_kernel needs the states that enter chunks, token_gradient_kernel the adjoints
// that come back into them.
#pragma once

#include <interdomain/detail/cuda_chunk_steps.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail::chunks {

/// Sums over tokens that the parameters' gradients are made of; each block leaves its own.
/// lags: (chunk, 2 modes), D of eq. 24 by columns of the table, conjugated. mix: (modes, modes), H of eq. 23, conjugated
/// (for real_parts half of dC). scaled: (modes), the sum for Lam dLam that does not pass through `lags`, conjugated.
template <class T>
struct PartialSums {
    static constexpr Index lag_size = Sizes<T>::coefficients, mix_size = padded * padded;
    float* lags = nullptr;
    complex<float>* mix = nullptr;
    complex<float>* scaled = nullptr;
    INTERSTATE_HD PartialSums of(Index lag_part, Index mix_part) const {
        return {lags + lag_part * lag_size, mix + mix_part * mix_size, scaled + lag_part * padded};
    }
};

template <class T>
struct ChunkBackward {
    using E = typename Form<T>::Element;
    Slots slots{};
    Slice slice{};
    int group = 1;
    HeadRows<const T> q{}, k{}, v{}, dout{};
    HeadRows<T> dq{}, dk{}, dv{};
    const E* states = nullptr;         // (slot, kv head, 2)
    const E* adjoints = nullptr;       // (slot, kv head, 2)
    E* scaled = nullptr;               // (slot, query head, 2): conj(Lam^(t+1)) o conj(p or w)
    E* weights = nullptr;              // (slot, query head, 2): P and Q
    PartialSums<T> sums{};             // (query head, part) or (kv head, part)
    bool first = true;                 // of the slices: sums begin at zero
};

inline namespace INTERSTATE_KERNELS {

inline constexpr int query_threads = 2 * group_threads;

/// f(sum, its place in `sums`) for a warp's tiles of D, rows row ... by columns column ...
template <class T, int tiles, class Function>
__device__ void each_lag_sum(float (&lags)[tiles][4], float* sums, int row, int column, const Lane& lane, Function&& f) {
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            f(lags[i][e], sums[(row + lane.group + e / 2 * 8) * Sizes<T>::wide + column + 8 * i + 2 * lane.quad + e % 2]);
}

template <class T>
struct QueryShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    E table[S::coefficients], mix[S::mix];
    E state[2][S::state];          // of keys and values; real_parts puts s where the values' were
    // q, k, v, dout; where there is room, those of the next chunk are on their way meanwhile.
    static constexpr int buffers = sizeof(E) == 2 ? 2 : 1;
    E tokens[buffers][4][S::tokens];
    E scores[2][S::square];        // q k^T and dout v^T
    E a[2][S::coefficients];       // a and e
    E w[2][S::coefficients];       // w and p
    E weights[2][S::square];       // P and Q
};

/// What 16 warps sum over the tokens of queries, in registers: D and H for one panel of modes each, and `scaled`.
template <class T, bool real_parts>
class QuerySums {
    using S = Sizes<T>;
    using F = Form<T>;
    using St = Steps<T>;
    using E = typename F::Element;
    static constexpr int lag_tiles = S::wide / 8 / (2 * St::column_groups);
    static_assert(padded == 64 && query_threads == 512);

  public:
    /// From what earlier slices left in `sums`, or from zero.
    __device__ QuerySums(const Lane& lane, const PartialSums<T>& sums, bool first) {
        device::clear(lags_);
        device::clear(mix_);
        if (first) return;
        each_lag(lane, sums.lags, [](float& sum, const float& kept) { sum = kept; });
        each_mix(lane, sums.mix, [](float& re, float& im, const complex<float>& kept) { re = kept.re, im = kept.im; });
    }
    /// D (eq. 24): scores of both sides by p and w. w: (2, chunk, 2 modes), that of queries, then that of dout.
    __device__ void add_lags(const Lane& lane, const E (&scores)[2][S::square], const E (&w)[2][S::coefficients]) {
        const int row = lag_row(lane);
#pragma unroll
        for (int side = 0; side < 2; ++side)
            device::multiply<F::precision>(lags_, device::transposed<S::chunk>(scores[side]), row, device::transposed<S::wide>(w[1 - side]),
                                           lag_column(lane), S::chunk - 16 - row, row + 16, lane.index);
    }
    /// H (eq. 23) of a and e; for real_parts of s and a, both sides.
    __device__ void add_mix(const Lane& lane, const E (&a)[2][S::coefficients], const E* s) {
        if constexpr (real_parts) {
#pragma unroll
            for (int side = 0; side < 2; ++side)
                device::multiply<F::precision, S::chunk>(mix_, device::transposed<padded>(s + side * S::tokens), 16 * mix_row(lane),
                                                         device::transposed<S::wide>(a[1 - side]), 32 * mix_column(lane), 0, lane.index);
        } else {
            multiply_mix<T>(mix_, mix_row(lane), mix_column(lane), a[1], a[0], lane.index);
        }
    }
    /// Lam dLam from what crossed into the chunk: age t + 1 at its token t (eq. 24).
    __device__ void add_scaled(const St& steps, const typename St::Kept& of_state, const E* w) { steps.add_scaled(scaled_, of_state, w); }

    __device__ void store_mix(const Lane& lane, const PartialSums<T>& sums) {
        each_mix(lane, sums.mix, [](const float& re, const float& im, complex<float>& kept) { kept = {re, im}; });
    }
    /// `of_warps`: shared memory that nobody uses, 4 padded row_groups floats.
    __device__ void store_lags_and_scaled(const St& steps, const PartialSums<T>& sums, bool first, float* of_warps) {
        each_lag(steps.lane, sums.lags, [](const float& sum, float& kept) { kept = sum; });
        const int side = steps.lane.warp / group_warps, thread = static_cast<int>(threadIdx.x);
        steps.each_scaled(scaled_, [&](int m, int of_number, float sum) {
            of_warps[(side * St::row_groups + steps.row_group) * 2 * padded + 2 * m + of_number] = sum;
        });
        __syncthreads();
        for (int i = thread; i < 2 * padded; i += query_threads) {
            float* const kept = &sums.scaled->re + i;
            float sum = first ? 0.0f : *kept;
            for (int j = 0; j < 2 * St::row_groups; ++j) sum += of_warps[j * 2 * padded + i];
            *kept = sum;
        }
    }

  private:
    // A warp's share: lags, 16 rows of the table; mix, 16 modes of e by 16 of a.
    __device__ static int lag_row(const Lane& lane) { return lane.warp % St::row_groups * 16; }
    __device__ static int lag_column(const Lane& lane) { return lane.warp / St::row_groups * 8 * lag_tiles; }
    __device__ static int mix_row(const Lane& lane) { return lane.warp % 4; }
    __device__ static int mix_column(const Lane& lane) { return lane.warp / 4; }
    template <class Function>
    __device__ void each_lag(const Lane& lane, float* sums, Function&& f) {
        each_lag_sum<T>(lags_, sums, lag_row(lane), lag_column(lane), lane, f);
    }
    template <class Function>
    __device__ void each_mix(const Lane& lane, complex<float>* sums, Function&& f) {
#pragma unroll
        for (int i = 0; i < 4; i += 2)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                f(mix_[i][e], mix_[i + 1][e],
                  sums[(16 * mix_row(lane) + lane.group + e / 2 * 8) * padded + 16 * mix_column(lane) + 4 * i + 2 * lane.quad + e % 2]);
    }
    float lags_[lag_tiles][4], mix_[4][4];
    typename St::ScaledSums scaled_ = {};
};

static_assert(sizeof(QueryShared<bf16>) <= whole_chunk_shared && sizeof(QueryShared<f16>) <= whole_chunk_shared &&
              sizeof(QueryShared<f32>) <= whole_chunk_shared);

/// Block (part, query head): every gridDim.x-th chunk of the slice. Half of the warps go from q to w, half from dout to p.
template <class T, bool real_parts>
__global__ void __launch_bounds__(query_threads, 1) query_gradient_kernel(ChunkBackward<T> run, Tables<T> tables) {
    using S = Sizes<T>;
    using F = Form<T>;
    using St = Steps<T>;
    using E = typename F::Element;
    constexpr int chunk_size = S::chunk;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<QueryShared<T>*>(shared_bytes);
    const St steps;
    const Lane& lane = steps.lane;
    const int thread = static_cast<int>(threadIdx.x), side = lane.warp / group_warps;  // 0: from q, 1: from dout
    const int hq = static_cast<int>(blockIdx.y), query_heads = static_cast<int>(gridDim.y), h = hq / run.group, heads = query_heads / run.group;
    const Index part = static_cast<Index>(blockIdx.y) * gridDim.x + blockIdx.x;
    const auto* const powers = tables.powers + h * Tables<T>::power_size;
    E* const s = shared.state[1];

    QuerySums<T, real_parts> sums(lane, run.sums.of(part, part), run.first);
    device::copy_matrix<S::coefficients, query_threads>(shared.table, tables.table + h * S::coefficients, thread);
    device::copy_matrix<S::mix, query_threads>(shared.mix, tables.mix + h * S::mix, thread);
    device::wait_for_previous_kernel();

    const auto bring_tokens = [&](const Chunk<chunk_size>& chunk, int buffer) {
        auto& to = shared.tokens[buffer];
        bring_rows<T, query_threads>(to[0], run.q, chunk, hq, 0, thread);
        bring_rows<T, query_threads>(to[1], run.k, chunk, h, 0, thread);
        bring_rows<T, query_threads>(to[2], run.v, chunk, h, 0, thread);
        bring_rows<T, query_threads>(to[3], run.dout, chunk, hq, 0, thread);
        device::commit_copies();
    };
    constexpr int buffers = QueryShared<T>::buffers;
    const auto states_of = [&](int slot) { return run.states + (static_cast<Index>(slot - run.slice.begin) * heads + h) * 2 * S::state; };
    ChunkList<chunk_size> list(run.slots, run.slice);
    int buffer = 0;
    if (list.more()) bring_tokens(list.chunk, 0);
    while (list.more()) {
        const Chunk<chunk_size> chunk = list.chunk;
        const Index at = list.slot - run.slice.begin;
        device::copy_matrix<2 * S::state, query_threads>(shared.state[0], states_of(list.slot), thread);
        device::commit_copies();
        list.next();
        auto& tokens = shared.tokens[buffer];
        if (buffers == 2 && list.more()) {
            bring_tokens(list.chunk, buffer ^ 1);
            device::wait_for_all_but<2>();
        } else {
            device::wait_for_all_but<1>();
        }
        __syncthreads();
        const E* const from = tokens[side == 0 ? 0 : 3];
        E* const scores = shared.scores[side];
        E* const a = shared.a[side];
        E* const w = shared.w[side];
        steps.scores(from, tokens[1 + side], scores);
        if (buffers == 2 && list.more())
            device::wait_for_all_but<1>();
        else
            device::wait_for_all_but<0>();
        __syncthreads();

        typename St::WideTiles c;
        steps.coefficients_of_state(c, from, shared.state[side], typename St::Powers(steps, powers));
        typename St::Kept kept;
        steps.keep(c, kept);
        steps.add_coefficients_of_chunk(c, scores, shared.table);
        steps.put_conjugates(c, a);
        if constexpr (real_parts) {
            __syncthreads();  // the values' states have been read
            steps.real_parts(a, shared.mix, s + side * S::tokens);
            wait_for_group<group_threads>(1 + side);
            steps.read_out_real(c, s + side * S::tokens, shared.mix);
        } else {
            wait_for_group<group_threads>(1 + side);
            steps.read_out(c, a, shared.mix);
        }
        steps.put(c, w);
        steps.scale(c, typename St::Powers(steps, powers));
        E* const scaled = run.scaled + (at * query_heads + hq) * 2 * S::coefficients;
        steps.put(c, scaled + (1 - side) * S::coefficients);  // p, then w
        __syncthreads();

        sums.add_scaled(steps, kept, shared.w[1 - side]);
        steps.weights(w, shared.table, shared.weights[side]);
        sums.add_lags(lane, shared.scores, shared.w);
        sums.add_mix(lane, shared.a, s);
        __syncthreads();

        if (side == 1) {
            steps.get(c, w);
            steps.scale(c, typename St::Powers(steps, powers));
            steps.put(c, w);
        }
        device::store_matrix<2 * S::square, query_threads>(run.weights + (at * query_heads + hq) * 2 * S::square, shared.weights[0], thread);
        __syncthreads();
        if (run.dq.view) {
            constexpr int tiles = padded / 8 / (2 * St::column_groups) < 2 ? 2 : padded / 8 / (2 * St::column_groups);
            const int first = lane.warp / St::row_groups * 8 * tiles;
            if (first < padded) {
                float dq[tiles][4];
                device::clear(dq);
                read_tokens<T>(dq, shared.weights[1], tokens[1], shared.w[1], shared.state[0], steps.row, first, lane.index);
                put_tiles<padded>(dq, tokens[2], steps.row, first, lane);
            }
            __syncthreads();
            take_rows<T, query_threads>(tokens[2], run.dq, chunk, hq, 0, thread);
        }
        __syncthreads();
        buffer ^= buffers - 1;
        if (buffers == 1 && list.more()) bring_tokens(list.chunk, 0);
    }

    sums.store_mix(lane, run.sums.of(part, part));
    device::wait_for_copies();
    __syncthreads();
    sums.store_lags_and_scaled(steps, run.sums.of(part, part), run.first, reinterpret_cast<float*>(&shared.tokens));
}

inline constexpr int token_threads = group_threads;

/// What the 8 warps of a block sum over tokens for a later chunk, in registers, for one panel of modes.
template <class T>
class TokenSums {
    using S = Sizes<T>;
    using F = Form<T>;
    using E = typename F::Element;
    static constexpr int row_groups = S::chunk / 16, lag_tiles = S::wide / 8 * row_groups / (token_threads / 32);

  public:
    using Shared = complex<float>[token_threads / padded][padded];
    __device__ TokenSums(const Lane& lane, const PartialSums<T>& sums, bool first) {
        device::clear(lags_);
        if (!first) each_lag(lane, sums.lags, [](float& sum, const float& kept) { sum = kept; });
    }
    /// D (eq. 24) of a panel of tokens, the last one in the last row, by its adjoint.
    __device__ void add_lags(const Lane& lane, const E* z, const E* adjoint) {
        device::multiply<F::precision, padded>(lags_, device::as_stored<padded>(z), row(lane), device::as_stored<padded>(adjoint), column(lane), 0, lane.index);
    }
    /// passing += rowsum(Y o X) over `columns` columns of a panel, for this thread's mode.
    template <int columns>
    __device__ static void add_passing(complex<float>& passing, const E* states, const E* adjoint, int first_column) {
        const int place = device::blocked<padded>(mode() / 8 * 16 + mode() % 8, first_column);
        const E* const x = states + place;
        const E* const y = adjoint + place;
#pragma unroll 2
        for (int block = 0; block < columns / 8; ++block) {
            using Line = device::Line<E>;
            const Line xr(x + 64 * block), xi(x + 64 * block + 8 * padded), yr(y + 64 * block), yi(y + 64 * block + 8 * padded);
#pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const float2 a = xr.pair(e), b = xi.pair(e), f = yr.pair(e), g = yi.pair(e);
                passing.re += f.x * a.x + g.x * b.x + (f.y * a.y + g.y * b.y);
                passing.im += g.x * a.x - f.x * b.x + (g.y * a.y - f.y * b.y);
            }
        }
    }
    /// What passes the whole chunk ages by all of its rows; power: Lam^rows of each mode.
    __device__ void add_scaled(int rows, const complex<double>* power, const complex<float>& passing) {
        scaled_ += static_cast<float>(rows) * (conj(cast<float>(power[mode()])) * passing);
    }
    __device__ void store(const Lane& lane, const PartialSums<T>& sums, bool first, Shared& shared) {
        each_lag(lane, sums.lags, [](const float& sum, float& kept) { kept = sum; });
        shared[quarter()][mode()] = scaled_;
        __syncthreads();
        const int thread = static_cast<int>(threadIdx.x);
        if (thread < padded) {
            complex<float> sum = first ? complex<float>{} : sums.scaled[thread];
            for (int i = 0; i < token_threads / padded; ++i) sum += shared[i][thread];
            sums.scaled[thread] = sum;
        }
    }
    __device__ static int mode() { return static_cast<int>(threadIdx.x) % padded; }
    __device__ static int quarter() { return static_cast<int>(threadIdx.x) / padded; }

  private:
    __device__ static int row(const Lane& lane) { return lane.warp % row_groups * 16; }
    __device__ static int column(const Lane& lane) { return lane.warp / row_groups * 8 * lag_tiles; }
    template <class Function>
    __device__ void each_lag(const Lane& lane, float* sums, Function&& f) {
        each_lag_sum<T>(lags_, sums, row(lane), column(lane), lane, f);
    }
    float lags_[lag_tiles][4];
    complex<float> scaled_{};
};

/// Brings weights P and Q of a query head, or one of them, columns moved on by `shift`.
template <class T, int squares>
__device__ void bring_weights(typename Form<T>::Element* to, const typename Form<T>::Element* from, int shift, int thread) {
    using E = typename Form<T>::Element;
    constexpr int chunk = Sizes<T>::chunk, square = Sizes<T>::square;
    if (shift == 0) {
        device::copy_matrix<squares * square, token_threads>(to, from, thread);
        return;
    }
    for (int i = thread; i < squares * square; i += token_threads) {
        const int t = i % square / chunk, s = i % chunk - shift;
        const E x = s >= 0 && s <= t ? from[i / square * square + device::blocked<chunk>(t, s)] : device::store_as<E>(0.0f);
        to[i / square * square + device::blocked<chunk>(t, s + shift)] = x;
    }
}

template <class T>
struct TokenShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    E table[S::coefficients];
    E adjoint[2][S::state];  // of keys and values
    E z[2][S::tokens];       // k and v, the last token in the last row
    E from[2][S::tokens];    // q and dout of one query head; in the end dk and dv
    E weights[2][S::square]; // P and Q, their columns like the rows of z
    typename TokenSums<T>::Shared scaled;
};

/// Block (part, kv head): every gridDim.x-th chunk of the slice. dk, dv, and what tokens add to the sums for a later chunk.
template <class T>
__global__ void __launch_bounds__(token_threads, sizeof(typename Form<T>::Element) == 2 ? 2 : 1)
    token_gradient_kernel(ChunkBackward<T> run, Tables<T> tables) {
    using S = Sizes<T>;
    using F = Form<T>;
    using E = typename F::Element;
    constexpr int chunk_size = S::chunk, row_groups = chunk_size / 16, warps = token_threads / 32;
    extern __shared__ __align__(128) unsigned char shared_bytes[];
    auto& shared = *reinterpret_cast<TokenShared<T>*>(shared_bytes);
    const Lane lane;
    const int thread = static_cast<int>(threadIdx.x);
    const int h = static_cast<int>(blockIdx.y), heads = static_cast<int>(gridDim.y), query_heads = heads * run.group;
    const Index part = static_cast<Index>(blockIdx.y) * gridDim.x + blockIdx.x;

    // A warp has 16 tokens of dk (side 0) or dv.
    constexpr int tiles = padded / 8 * 2 * row_groups / warps;
    const int row = lane.warp % row_groups * 16, side = lane.warp / row_groups % 2, first = lane.warp / (2 * row_groups) * 8 * tiles;
    TokenSums<T> sums(lane, run.sums.of(part, part), run.first);
    device::copy_matrix<S::coefficients, token_threads>(shared.table, tables.table + h * S::coefficients, thread);
    device::wait_for_previous_kernel();

    for (ChunkList<chunk_size> list(run.slots, run.slice); list.more(); list.next()) {
        const Chunk<chunk_size> chunk = list.chunk;
        const Index at = list.slot - run.slice.begin;
        const int count = chunk.rows(), shift = chunk_size - count;
        bring_rows<T, token_threads>(shared.z[0], run.k, chunk, h, shift, thread);
        bring_rows<T, token_threads>(shared.z[1], run.v, chunk, h, shift, thread);
        device::copy_matrix<2 * S::state, token_threads>(shared.adjoint[0], run.adjoints + (at * heads + h) * 2 * S::state, thread);
        float c[tiles][4];
        device::clear(c);
        for (int hq = h * run.group; hq < (h + 1) * run.group; ++hq) {
            bring_rows<T, token_threads>(shared.from[0], run.q, chunk, hq, 0, thread);
            bring_rows<T, token_threads>(shared.from[1], run.dout, chunk, hq, 0, thread);
            bring_weights<T, 2>(shared.weights[0], run.weights + (at * query_heads + hq) * 2 * S::square, shift, thread);
            device::wait_for_copies();
            __syncthreads();
            device::multiply<F::precision>(c, device::transposed<chunk_size>(shared.weights[1 - side]), row,
                                           device::transposed<padded>(shared.from[side]), first, shift == 0 ? row : 0, shift == 0 ? chunk_size - row : chunk_size, lane.index);
            __syncthreads();
        }
        if (run.group == 0) {  // nothing has waited yet
            device::wait_for_copies();
            __syncthreads();
        }
        device::multiply<F::precision, S::wide>(c, device::as_stored<S::wide>(shared.table), row, device::transposed<padded>(shared.adjoint[side]),
                                                first, 0, lane.index);
#pragma unroll
        for (int half = 0; half < 2; ++half) sums.add_lags(lane, shared.z[half], shared.adjoint[half]);
        const int quarter = TokenSums<T>::quarter(), half = quarter / 2;
        complex<float> passing{};
        TokenSums<T>::template add_passing<padded / 2>(passing, run.states + ((at * heads + h) * 2 + half) * S::state, shared.adjoint[half], quarter % 2 * (padded / 2));
        sums.add_scaled(count, tables.powers64 + h * Tables<T>::power_size + count * padded, passing);

        put_tiles<padded>(c, shared.from[side], row, first, lane);
        __syncthreads();
        if (run.dk.view) take_rows<T, token_threads>(shared.from[0], run.dk, chunk, h, shift, thread);
        if (run.dv.view) take_rows<T, token_threads>(shared.from[1], run.dv, chunk, h, shift, thread);
        __syncthreads();
    }

    sums.store(lane, run.sums.of(part, part), run.first, shared.scaled);
}

inline constexpr int finish_threads = 256;

/// One block a kv head: adds the parts in order, then the chain rule (eq. 25), panel after panel of its modes.
template <class T, class P>
__global__ void __launch_bounds__(finish_threads)
    finish_parameters_kernel(Discretization disc, Params<P> params, Index M, Index panels, Tables<T> tables, PartialSums<T> query, Index query_parts,
                             PartialSums<T> token, Index token_parts, BasicParams<P, complex<P>> grads) {
    constexpr int chunk_size = Sizes<T>::chunk, wide = Sizes<T>::wide, shares = finish_threads / padded;
    __shared__ complex<double> Bbar_sums[shares][padded], scaled_sums[shares][padded];
    __shared__ double log_dt[padded];
    const Index h = blockIdx.x;
    const int of_panel = static_cast<int>(threadIdx.x) % padded, share = static_cast<int>(threadIdx.x) / padded;
    double dlog_dt = 0.0;
    for (Index panel = 0; panel < panels; ++panel) {
        const Index m = panel * padded + of_panel;
        const Mode mode = m < M ? mode_at(disc, params, h, m) : Mode{};
        const complex<double>* const powers = tables.powers64 + (h * panels + panel) * Tables<T>::power_size + of_panel;
        c64 dBbar{}, scaled{};
        if (m < M) {
            for (int j = share; j < chunk_size; j += shares) {
                const int at = j * wide + of_panel / 8 * 16 + of_panel % 8, n = chunk_size - 1 - j;
                c64 D{};
                const auto add = [&](const PartialSums<T>& sums, Index parts) {
                    for (Index part = h * parts; part < (h + 1) * parts; ++part) {
                        const float* const lags = sums.of(part * panels + panel, 0).lags + at;
                        D += c64{lags[0], lags[8]};
                    }
                };
                add(query, query_parts);
                add(token, token_parts);
                D = conj(powers[n * padded]) * D;
                dBbar += D;
                scaled += static_cast<double>(n) * (conj(mode.Bbar) * D);
            }
            const auto add = [&](const PartialSums<T>& sums, Index parts) {
                for (Index part = h * parts + share; part < (h + 1) * parts; part += shares)
                    scaled += cast<double>(sums.of(part * panels + panel, 0).scaled[of_panel]);
            };
            add(query, query_parts);
            add(token, token_parts);
        }
        Bbar_sums[share][of_panel] = dBbar;
        scaled_sums[share][of_panel] = scaled;
        __syncthreads();
        if (share == 0 && m < M) {
            for (int i = 1; i < shares; ++i) {
                dBbar += Bbar_sums[i][of_panel];
                scaled += scaled_sums[i][of_panel];
            }
            const ModeGrads g = discretize_backward_scaled(disc, mode, cast<double>(params.B(h, m)), scaled, dBbar);
            dlog_dt += g.log_dt;
            if (grads.log_neg_re) grads.log_neg_re(h, m) = static_cast<P>(g.log_neg_re);
            if (grads.im) grads.im(h, m) = static_cast<P>(g.im);
            if (grads.B) grads.B(h, m) = cast<P>(g.B);
        }
        __syncthreads();
    }
    if (share == 0) log_dt[of_panel] = dlog_dt;
    __syncthreads();
    if (threadIdx.x == 0 && grads.log_dt) {
        double sum = 0.0;
        for (int i = 0; i < padded; ++i) sum += log_dt[i];
        grads.log_dt(h) = static_cast<P>(sum);
    }
}

/// dC = conj(C) (H + H^T) (eq. 23), or, for real_parts, twice what the parts have. Block (head, finish_rows rows, panel of columns).
inline constexpr int finish_rows = 8;
template <class T, class P>
__global__ void __launch_bounds__(finish_threads)
    finish_mix_kernel(Readout readout, View<const complex<P>, 3> C, Index M, PartialSums<T> query, Index query_parts, View<complex<P>, 3> dC) {
    __shared__ complex<double> rows_of_C[finish_rows][padded];
    const Index h = blockIdx.x, panels = gridDim.z;
    const auto sum_of = [&](Index j, Index n) {
        c64 sum{};
        for (Index part = h * query_parts; part < (h + 1) * query_parts; ++part)
            sum += cast<double>(query.of(0, (part * panels + j / padded) * panels + n / padded).mix[j % padded * padded + n % padded]);
        return sum;
    };
    const Index first = static_cast<Index>(blockIdx.y) * finish_rows;
    // A thread has some rows of one column, for which H + H^T is summed once.
    constexpr int shares = finish_threads / padded, rows = finish_rows / shares;
    const int share = static_cast<int>(threadIdx.x) / padded;
    const Index n = static_cast<Index>(blockIdx.z) * padded + threadIdx.x % padded;
    c64 sums[rows] = {};
    if (readout == Readout::real_parts) {
        if (n < M)
            for (int r = 0; r < rows; ++r)
                if (first + share * rows + r < M) sums[r] = 2.0 * sum_of(first + share * rows + r, n);
    } else {
        for (Index begin = 0; begin < M; begin += padded) {
            for (int i = static_cast<int>(threadIdx.x); i < finish_rows * padded; i += finish_threads) {
                const Index j = first + i / padded, k = begin + i % padded;
                rows_of_C[i / padded][i % padded] = j < M && k < M ? conj(cast<double>(C(h, j, k))) : c64{};
            }
            __syncthreads();
            for (Index i = begin; i < begin + padded && i < M && n < M; ++i) {
                const c64 both = sum_of(i, n) + sum_of(n, i);
#pragma unroll
                for (int r = 0; r < rows; ++r) sums[r] += rows_of_C[share * rows + r][i - begin] * both;
            }
            __syncthreads();
        }
    }
    if (n < M)
        for (int r = 0; r < rows; ++r)
            if (first + share * rows + r < M) dC(h, first + share * rows + r, n) = cast<P>(sums[r]);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
