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
};

template <class T>
struct ChunkBackward {
    using E = typename Form<T>::Element;
    Slots slots{};
    Slice slice{};
    int group = 1;
    View<const T, 4> q{}, k{}, v{}, dout{};
    View<T, 4> dq{}, dk{}, dv{};
    bool wide_q = false, wide_k = false, wide_v = false, wide_dout = false, wide_dq = false, wide_dk = false, wide_dv = false;
    const E* states = nullptr;         // (slot, kv head, 2)
    const E* adjoints = nullptr;       // (slot, kv head, 2)
    E* scaled = nullptr;               // (slot, query head, 2): conj(Lam^(t+1)) o conj(p or w)
    E* weights = nullptr;              // (slot, query head, 2): P and Q
    PartialSums<T> sums{};             // (query head, part) or (kv head, part)
    bool first = true;                 // of the slices: sums begin at zero
};

inline namespace INTERSTATE_KERNELS {

inline constexpr int query_threads = 2 * group_threads;

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

    // What a warp sums: lags, rows 16 lag_row ... of the table; mix, 16 modes of e by 16 of a.
    constexpr int lag_tiles = S::wide / 8 / (2 * St::column_groups);
    const int lag_row = lane.warp % St::row_groups, lag_column = lane.warp / St::row_groups * 8 * lag_tiles;
    const int mix_row = lane.warp % 4, mix_column = lane.warp / 4;
    static_assert(padded == 64 && query_threads == 512);
    float lags[lag_tiles][4], mix[4][4];
    float* const lag_sums = run.sums.lags + part * PartialSums<T>::lag_size;
    complex<float>* const mix_sums = run.sums.mix + part * PartialSums<T>::mix_size;
    device::clear(lags);
    device::clear(mix);
    const auto each_lag = [&](auto&& f) {
#pragma unroll
        for (int i = 0; i < lag_tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                f(lags[i][e], lag_sums[(16 * lag_row + lane.group + e / 2 * 8) * S::wide + lag_column + 8 * i + 2 * lane.quad + e % 2]);
    };
    const auto each_mix = [&](auto&& f) {
#pragma unroll
        for (int i = 0; i < 4; i += 2)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                f(mix[i][e], mix[i + 1][e],
                  mix_sums[(16 * mix_row + lane.group + e / 2 * 8) * padded + 16 * mix_column + 4 * i + 2 * lane.quad + e % 2]);
    };
    if (!run.first) {
        each_lag([](float& sum, const float& kept) { sum = kept; });
        each_mix([](float& re, float& im, const complex<float>& kept) { re = kept.re, im = kept.im; });
    }
    typename St::ScaledSums scaled_sum = {};
    device::copy_matrix<S::coefficients, query_threads>(shared.table, tables.table + h * S::coefficients, thread);
    device::copy_matrix<S::mix, query_threads>(shared.mix, tables.mix + h * S::mix, thread);
    device::wait_for_previous_kernel();

    const auto bring_tokens = [&](const Chunk<chunk_size>& chunk, int buffer) {
        const int count = chunk.rows(), row = chunk.row();
        auto& to = shared.tokens[buffer];
        using Rows = device::Rows<const T>;
        device::copy_in<chunk_size, padded, query_threads>(to[0], Rows(run.q, chunk.batch(), row, hq, count, run.wide_q), 0, thread);
        device::copy_in<chunk_size, padded, query_threads>(to[1], Rows(run.k, chunk.batch(), row, h, count, run.wide_k), 0, thread);
        device::copy_in<chunk_size, padded, query_threads>(to[2], Rows(run.v, chunk.batch(), row, h, count, run.wide_v), 0, thread);
        device::copy_in<chunk_size, padded, query_threads>(to[3], Rows(run.dout, chunk.batch(), row, hq, count, run.wide_dout), 0, thread);
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

        // Lam dLam from what crossed into the chunk: age t + 1 at its token t (eq. 24).
        steps.add_scaled(scaled_sum, kept, shared.w[1 - side]);
        steps.weights(w, shared.table, shared.weights[side]);
#pragma unroll
        for (int other = 0; other < 2; ++other)
            device::multiply<F::precision>(lags, device::transposed<chunk_size>(shared.scores[other]), 16 * lag_row,
                                           device::transposed<S::wide>(shared.w[1 - other]), lag_column,
                                           chunk_size - 16 * (lag_row + 1), 16 * (lag_row + 1), lane.index);
        if constexpr (real_parts) {
#pragma unroll
            for (int other = 0; other < 2; ++other)
                device::multiply<F::precision, chunk_size>(mix, device::transposed<padded>(s + other * S::tokens), 16 * mix_row,
                                                           device::transposed<S::wide>(shared.a[1 - other]), 32 * mix_column, 0, lane.index);
        } else {
            multiply_mix<T>(mix, mix_row, mix_column, shared.a[1], shared.a[0], lane.index);
        }
        __syncthreads();

        if (side == 1) {
            steps.get(c, w);
            steps.scale(c, typename St::Powers(steps, powers));
            steps.put(c, w);
        }
        device::store_matrix<2 * S::square, query_threads>(run.weights + (at * query_heads + hq) * 2 * S::square, shared.weights[0], thread);
        __syncthreads();
        if (run.dq) {
            constexpr int tiles = padded / 8 / (2 * St::column_groups) < 2 ? 2 : padded / 8 / (2 * St::column_groups);
            const int first = lane.warp / St::row_groups * 8 * tiles;
            if (first < padded) {
                float dq[tiles][4];
                device::clear(dq);
                read_tokens<T>(dq, shared.weights[1], tokens[1], shared.w[1], shared.state[0], steps.row, first, lane.index);
                put_tiles<padded>(dq, tokens[2], steps.row, first, lane);
            }
            __syncthreads();
            device::copy_out<chunk_size, padded, query_threads>(
                tokens[2], device::Rows<T>(run.dq, chunk.batch(), chunk.row(), hq, chunk.rows(), run.wide_dq), 0, thread);
        }
        __syncthreads();
        buffer ^= buffers - 1;
        if (buffers == 1 && list.more()) bring_tokens(list.chunk, 0);
    }

    each_lag([](const float& sum, float& kept) { kept = sum; });
    each_mix([](const float& re, const float& im, complex<float>& kept) { kept = {re, im}; });
    // The tokens' place is free: sums of the two sides and their rows, then of both.
    device::wait_for_copies();
    __syncthreads();
    float* const of_warps = reinterpret_cast<float*>(&shared.tokens);
    steps.each_scaled(scaled_sum, [&](int m, int of_number, float sum) {
        of_warps[(side * St::row_groups + steps.row_group) * 2 * padded + 2 * m + of_number] = sum;
    });
    __syncthreads();
    for (int i = thread; i < 2 * padded; i += query_threads) {
        float* const kept = &run.sums.scaled[part * padded].re + i;
        float sum = run.first ? 0.0f : *kept;
        for (int j = 0; j < 2 * St::row_groups; ++j) sum += of_warps[j * 2 * padded + i];
        *kept = sum;
    }
}

inline constexpr int token_threads = group_threads;

template <class T>
struct TokenShared {
    using S = Sizes<T>;
    using E = typename Form<T>::Element;
    E table[S::coefficients];
    E adjoint[2][S::state];  // of keys and values
    E z[2][S::tokens];       // k and v, the last token in the last row
    E from[2][S::tokens];    // q and dout of one query head; in the end dk and dv
    E weights[2][S::square]; // Q and P, their columns like the rows of z
    complex<float> scaled[token_threads / padded][padded];
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
    constexpr int lag_tiles = S::wide / 8 * row_groups / warps;
    const int lag_column = lane.warp / row_groups * 8 * lag_tiles;
    float lags[lag_tiles][4];
    float* const lag_sums = run.sums.lags + part * PartialSums<T>::lag_size;
    const auto each_lag = [&](auto&& f) {
#pragma unroll
        for (int i = 0; i < lag_tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e)
                f(lags[i][e], lag_sums[(row + lane.group + e / 2 * 8) * S::wide + lag_column + 8 * i + 2 * lane.quad + e % 2]);
    };
    device::clear(lags);
    if (!run.first) each_lag([](float& sum, const float& kept) { sum = kept; });
    // For the ages of what passes a whole chunk: a thread has a mode and a quarter of the columns.
    const int m = thread % padded, quarter = thread / padded;
    complex<float> scaled{};
    device::copy_matrix<S::coefficients, token_threads>(shared.table, tables.table + h * S::coefficients, thread);
    device::wait_for_previous_kernel();

    for (ChunkList<chunk_size> list(run.slots, run.slice); list.more(); list.next()) {
        const Chunk<chunk_size> chunk = list.chunk;
        const Index first_row = chunk.row(), at = list.slot - run.slice.begin;
        const int count = chunk.rows(), shift = chunk_size - count;
        using Rows = device::Rows<const T>;
        device::copy_in<chunk_size, padded, token_threads>(shared.z[0], Rows(run.k, chunk.batch(), first_row, h, count, run.wide_k), shift, thread);
        device::copy_in<chunk_size, padded, token_threads>(shared.z[1], Rows(run.v, chunk.batch(), first_row, h, count, run.wide_v), shift, thread);
        device::copy_matrix<2 * S::state, token_threads>(shared.adjoint[0], run.adjoints + (at * heads + h) * 2 * S::state, thread);
        float c[tiles][4];
        device::clear(c);
        for (int hq = h * run.group; hq < (h + 1) * run.group; ++hq) {
            device::copy_in<chunk_size, padded, token_threads>(shared.from[0], Rows(run.q, chunk.batch(), first_row, hq, count, run.wide_q), 0, thread);
            device::copy_in<chunk_size, padded, token_threads>(shared.from[1], Rows(run.dout, chunk.batch(), first_row, hq, count, run.wide_dout), 0, thread);
            const E* const weights = run.weights + (at * query_heads + hq) * 2 * S::square;
            if (shift == 0) {
                device::copy_matrix<2 * S::square, token_threads>(shared.weights[0], weights, thread);
            } else {
                for (int i = thread; i < 2 * S::square; i += token_threads) {
                    const int t = i % S::square / chunk_size, s = i % chunk_size - shift;
                    const E x = s >= 0 && s <= t ? weights[i / S::square * S::square + device::blocked<chunk_size>(t, s)] : device::store_as<E>(0.0f);
                    shared.weights[i / S::square][device::blocked<chunk_size>(t, s + shift)] = x;
                }
            }
            device::wait_for_copies();
            __syncthreads();
            device::multiply<F::precision>(c, device::transposed<chunk_size>(shared.weights[1 - side]), row,
                                           device::transposed<padded>(shared.from[side]), first, shift == 0 ? row : 0, shift == 0 ? chunk_size - row : chunk_size, lane.index);
            __syncthreads();
        }
        device::multiply<F::precision, S::wide>(c, device::as_stored<S::wide>(shared.table), row, device::transposed<padded>(shared.adjoint[side]),
                                                first, 0, lane.index);
#pragma unroll
        for (int half = 0; half < 2; ++half)
            device::multiply<F::precision, padded>(lags, device::as_stored<padded>(shared.z[half]), row,
                                                   device::as_stored<padded>(shared.adjoint[half]), lag_column, 0, lane.index);

        // What passes the whole chunk ages by all of its rows.
        complex<float> passing{};
        const int place = device::blocked<padded>(m / 8 * 16 + m % 8, quarter % 2 * (padded / 2));
        const E* const x = run.states + ((at * heads + h) * 2 + quarter / 2) * S::state + place;
        const E* const y = shared.adjoint[quarter / 2] + place;
#pragma unroll 2
        for (int block = 0; block < padded / 16; ++block) {
            using Line = device::Line<E>;
            const Line xr(x + 64 * block), xi(x + 64 * block + 8 * padded), yr(y + 64 * block), yi(y + 64 * block + 8 * padded);
#pragma unroll
            for (int e = 0; e < 8; e += 2) {
                const float2 a = xr.pair(e), b = xi.pair(e), f = yr.pair(e), g = yi.pair(e);
                passing.re += f.x * a.x + g.x * b.x + (f.y * a.y + g.y * b.y);
                passing.im += g.x * a.x - f.x * b.x + (g.y * a.y - f.y * b.y);
            }
        }
        const complex<float> power = conj(cast<float>(tables.powers64[h * Tables<T>::power_size + count * padded + m]));
        scaled += static_cast<float>(count) * (power * passing);

        put_tiles<padded>(c, shared.from[side], row, first, lane);
        __syncthreads();
        if (run.dk)
            device::copy_out<chunk_size, padded, token_threads>(shared.from[0], device::Rows<T>(run.dk, chunk.batch(), first_row, h, count, run.wide_dk), shift, thread);
        if (run.dv)
            device::copy_out<chunk_size, padded, token_threads>(shared.from[1], device::Rows<T>(run.dv, chunk.batch(), first_row, h, count, run.wide_dv), shift, thread);
        __syncthreads();
    }

    each_lag([](const float& sum, float& kept) { kept = sum; });
    shared.scaled[quarter][m] = scaled;
    __syncthreads();
    if (thread < padded) {
        complex<float> sum = run.first ? complex<float>{} : run.sums.scaled[part * padded + m];
        for (int i = 0; i < token_threads / padded; ++i) sum += shared.scaled[i][m];
        run.sums.scaled[part * padded + m] = sum;
    }
}

inline constexpr int finish_threads = 256;

/// One block a kv head: adds the parts in order, then the chain rule (eq. 25).
template <class T, class P>
__global__ void __launch_bounds__(finish_threads)
    finish_parameters_kernel(Discretization disc, Params<P> params, Index M, Tables<T> tables, PartialSums<T> query, Index query_parts,
                             PartialSums<T> token, Index token_parts, BasicParams<P, complex<P>> grads) {
    constexpr int chunk_size = Sizes<T>::chunk, wide = Sizes<T>::wide, shares = finish_threads / padded;
    __shared__ complex<double> Bbar_sums[shares][padded], scaled_sums[shares][padded];
    __shared__ double log_dt[padded];
    const Index h = blockIdx.x;
    const int m = static_cast<int>(threadIdx.x) % padded, share = static_cast<int>(threadIdx.x) / padded;
    const Mode mode = m < M ? mode_at(disc, params, h, m) : Mode{};
    c64 dBbar{}, scaled{};
    if (m < M) {
        for (int j = share; j < chunk_size; j += shares) {
            const int at = j * wide + m / 8 * 16 + m % 8, n = chunk_size - 1 - j;
            c64 D{};
            const auto add = [&](const PartialSums<T>& sums, Index parts) {
                for (Index part = h * parts; part < (h + 1) * parts; ++part) {
                    const float* const lags = sums.lags + part * PartialSums<T>::lag_size + at;
                    D += c64{lags[0], lags[8]};
                }
            };
            add(query, query_parts);
            add(token, token_parts);
            D = conj(tables.powers64[h * Tables<T>::power_size + n * padded + m]) * D;
            dBbar += D;
            scaled += static_cast<double>(n) * (conj(mode.Bbar) * D);
        }
        const auto add = [&](const PartialSums<T>& sums, Index parts) {
            for (Index part = h * parts + share; part < (h + 1) * parts; part += shares)
                scaled += cast<double>(sums.scaled[part * padded + m]);
        };
        add(query, query_parts);
        add(token, token_parts);
    }
    Bbar_sums[share][m] = dBbar;
    scaled_sums[share][m] = scaled;
    __syncthreads();
    if (share == 0) {
        double dlog_dt = 0.0;
        if (m < M) {
            for (int i = 1; i < shares; ++i) {
                dBbar += Bbar_sums[i][m];
                scaled += scaled_sums[i][m];
            }
            const ModeGrads g = discretize_backward_scaled(disc, mode, cast<double>(params.B(h, m)), scaled, dBbar);
            dlog_dt = g.log_dt;
            if (grads.log_neg_re) grads.log_neg_re(h, m) = static_cast<P>(g.log_neg_re);
            if (grads.im) grads.im(h, m) = static_cast<P>(g.im);
            if (grads.B) grads.B(h, m) = cast<P>(g.B);
        }
        log_dt[m] = dlog_dt;
    }
    __syncthreads();
    if (threadIdx.x == 0 && grads.log_dt) {
        double sum = 0.0;
        for (int i = 0; i < padded; ++i) sum += log_dt[i];
        grads.log_dt(h) = static_cast<P>(sum);
    }
}

/// dC = conj(C) (H + H^T) (eq. 23), or, for real_parts, twice what the parts have. A block has finish_rows rows of a head.
inline constexpr int finish_rows = 8;
template <class T, class P>
__global__ void __launch_bounds__(finish_threads)
    finish_mix_kernel(Readout readout, View<const complex<P>, 3> C, Index M, PartialSums<T> query, Index query_parts, View<complex<P>, 3> dC) {
    __shared__ complex<double> row_of_C[finish_rows][padded];
    const Index h = blockIdx.x;
    const auto sum_of = [&](Index j, Index n) {
        c64 sum{};
        for (Index part = h * query_parts; part < (h + 1) * query_parts; ++part)
            sum += cast<double>(query.mix[part * PartialSums<T>::mix_size + j * padded + n]);
        return sum;
    };
    const int first = static_cast<int>(blockIdx.y) * finish_rows;
    for (int i = static_cast<int>(threadIdx.x); i < finish_rows * padded; i += finish_threads) {
        const int j = first + i / padded, n = i % padded;
        row_of_C[i / padded][n] = j < M && n < M ? conj(cast<double>(C(h, j, n))) : c64{};
    }
    __syncthreads();
    // A thread has some rows of one column, for which H + H^T is summed once.
    constexpr int shares = finish_threads / padded, rows = finish_rows / shares;
    const int n = static_cast<int>(threadIdx.x) % padded, share = static_cast<int>(threadIdx.x) / padded;
    if (n >= M) return;
    c64 sums[rows] = {};
    if (readout == Readout::real_parts) {
        for (int r = 0; r < rows; ++r)
            if (first + share * rows + r < M) sums[r] = 2.0 * sum_of(first + share * rows + r, n);
    } else {
        for (Index i = 0; i < M; ++i) {
            const c64 both = sum_of(i, n) + sum_of(n, i);
#pragma unroll
            for (int r = 0; r < rows; ++r) sums[r] += row_of_C[share * rows + r][i] * both;
        }
    }
    for (int r = 0; r < rows; ++r)
        if (first + share * rows + r < M) dC(h, first + share * rows + r, n) = cast<P>(sums[r]);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
