// Decoding on the GPU: new tokens go into the cache with their running sums and rotations, and attention's step reads it, with SISA's
// channels in the scores. Equations: docs/ops/sisa.md.
#pragma once

#include <attention/detail/cuda_step.cuh>
#include <sisa/detail/cuda_channels.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {
namespace detail {

inline constexpr int append_threads = 256;

/// Queries' side of the channels of a step: R(Phi) C, g of the new tokens, lambda.
template <class T>
struct StepQueries {
    View<T, 4> c{};               // (B, n, Hq, padded)
    View<double, 3> g{};          // (B, n, Hkv)
    View<acc_t<T>, 1> strength{}; // (Hq)
    StepQueries() = default;
    StepQueries(Arena& arena, const Shape& s, Index padded)
        : c(view(arena.take<T>(s.batch * s.queries * s.query_heads * padded), {s.batch, s.queries, s.query_heads, padded})),
          g(view(arena.take<double>(s.batch * s.queries * s.kv_heads), {s.batch, s.queries, s.kv_heads})),
          strength(view(arena.take<acc_t<T>>(s.query_heads), {s.query_heads})) {}
};

/// What the append kernel reads. `queries` has no views where there is no step.
template <class T, class P>
struct AppendProblem {
    Shape shape;
    attention::CacheRows rows;
    attention::detail::Mask mask;  // of what is read later, for reports
    State<T> state;
    Keys<T, P> keys;
    View<const T, 4> C;
    View<const P, 1> lam;
    StepQueries<T> queries;
    int tokens, tile;  // new tokens of a sequence, and how many have their sums in shared memory at once
    bool wide_k, wide_v;
    std::uint32_t* flags;
};

inline namespace INTERSTATE_KERNELS {

/// A pair of channels turned by an angle, as float64 has it.
template <class T>
__device__ void turn_channels(const View<const T, 4>& from, Index b, Index i, Index h, int n, double angle, T& even, T& odd) {
    const Turn<double> turn(angle);
    const auto x = static_cast<double>(from(b, i, h, 2 * n)), y = static_cast<double>(from(b, i, h, 2 * n + 1));
    even = static_cast<T>(x * turn.cos - y * turn.sin);
    odd = static_cast<T>(x * turn.sin + y * turn.cos);
}

/// New tokens of a sequence and key/value head into the cache, a block each; of a step also what its queries want. Sums go on token by
/// token, in a thread each, so that n tokens at once are the bits of n calls.
template <class T, class P>
__global__ __launch_bounds__(append_threads) void append_kernel(const __grid_constant__ AppendProblem<T, P> p) {
    extern __shared__ double sums[];  // (tile, 1 + pairs)
    device::wait_for_previous_kernel();
    device::let_next_kernel_start();
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
    const int heads = static_cast<int>(p.shape.kv_heads), kv = static_cast<int>(blockIdx.x) % heads;
    const Index b = static_cast<int>(blockIdx.x) / heads, group = p.shape.group();
    const int pairs = static_cast<int>(p.shape.pairs()), columns = pairs > 0 ? 1 + pairs : 0;
    if (blockIdx.x == 0 && p.queries.strength)
        for (Index h = thread; h < p.shape.query_heads; h += append_threads) p.queries.strength(h) = static_cast<acc_t<T>>(p.lam(h));
    const int length = attention::detail::length_before(p.rows, b, p.tokens);
    if (kv == 0) attention::detail::report_rows(p.rows, p.mask, b, length, p.tokens, p.flags);
    if (length < 0) return;
    for (int first = 0; first < p.tokens; first += p.tile) {
        const int count = min(p.tile, p.tokens - first);
        for (int column = thread; column < columns; column += append_threads) {
            double& last = column == 0 ? p.state.g_last(b, kv) : p.state.Phi(b, kv, column - 1);
            double sum = length + first > 0 ? last : 0.0;
#pragma unroll 4
            for (int t = 0; t < count; ++t) {
                double x = column == 0 ? static_cast<double>(p.keys.log_alpha(b, first + t, kv))
                                       : static_cast<double>(p.keys.theta(b, first + t, kv, column - 1));
                if (column == 0 && x <= hard_reset) x = hard_reset;
                sum += x;
                sums[t * columns + column] = sum;
            }
            last = sum;
        }
        __syncthreads();
        attention::CacheRows::Place at;
        for (int t = warp; t < count; t += append_threads / 32) {
            if (!attention::detail::find_cached(p.rows, b, length + first + t, at)) continue;
            attention::detail::write_rows(p.keys.k, b, first + t, p.state.k, at, kv, 1, p.wide_k, lane, 32);
            attention::detail::write_rows(p.keys.v, b, first + t, p.state.v, at, kv, 1, p.wide_v, lane, 32);
            if (pairs > 0 && lane == 0) p.state.g(at.batch, at.row, kv) = sums[t * columns];
        }
        for (int e = thread; e < count * pairs; e += append_threads) {
            const int t = e / pairs, n = e % pairs;
            if (!attention::detail::find_cached(p.rows, b, length + first + t, at)) continue;
            turn_channels(p.keys.B, b, first + t, kv, n, sums[t * columns + 1 + n], p.state.B(at.batch, at.row, kv, 2 * n),
                          p.state.B(at.batch, at.row, kv, 2 * n + 1));
        }
        if (p.queries.c) {
            const int stored = static_cast<int>(p.queries.c.extent[3]) / 2;
            for (int t = thread; t < count; t += append_threads) p.queries.g(b, first + t, kv) = sums[t * columns];
            for (int e = thread; e < count * static_cast<int>(group) * stored; e += append_threads) {
                const int t = e / stored / static_cast<int>(group), n = e % stored;
                const Index h = kv * group + e / stored % group;
                T even = T(0.0f), odd = T(0.0f);
                if (n < pairs) turn_channels(p.C, b, first + t, h, n, sums[t * columns + 1 + n], even, odd);
                p.queries.c(b, first + t, h, 2 * n) = even;
                p.queries.c(b, first + t, h, 2 * n + 1) = odd;
            }
        }
        __syncthreads();
    }
}

/// Channels as a step's kernels have them: 16, 32, 64 or 128, or as they are.
inline Index stored_channels(Index ds) { return ds <= 16 ? 16 : ds <= 32 ? 32 : ds <= 64 ? 64 : ds <= 128 ? 128 : ds; }

inline std::size_t step_workspace_size(const Options& options, const Shape& s) {
    std::size_t most = 0;
    (void)dispatch_dtype(s.dtype, [&](auto t) {
        using T = decltype(t);
        const auto measure = [&](int m) {
            Arena arena;
            StepQueries<T>(arena, s, stored_channels(s.state_dim));
            attention::detail::StepWorkspace(arena, attention_of(options), attention_of(s), m);
            most = arena.required() > most ? arena.required() : most;
        };
        measure(0);
        attention::detail::each_row_tiles<T>(attention_of(s), measure);
        return 0;
    });
    return most;
}

template <class T, class P>
Status run_append(const cuda& exec, const attention::Options& reads, const Shape& s, const State<T>& state, const Keys<T, P>& keys,
                  const View<const T, 4>& C, const View<const P, 1>& lam, const StepQueries<T>& queries) {
    const Index tokens = keys.k.extent[1], blocks = tokens > 0 ? s.batch * s.kv_heads : 0, columns = 1 + s.pairs();
    INTERSTATE_RETURN_IF_ERROR(attention::detail::check_blocks(blocks));
    Index tile = 32768 / (columns * Index{sizeof(double)});
    tile = tile > 64 ? 64 : tile < 1 ? 1 : tile;
    tile = tile > tokens ? tokens : tile;
    const AppendProblem<T, P> p{.shape = s,
                                .rows = attention::cache_rows(state),
                                .mask = {true, static_cast<int>(reads.window < s.keys ? reads.window : s.keys)},
                                .state = state,
                                .keys = keys,
                                .C = C,
                                .lam = lam,
                                .queries = queries,
                                .tokens = static_cast<int>(tokens),
                                .tile = static_cast<int>(tile),
                                .wide_k = device::moves_wide(keys.k, s.head_dim) && device::moves_wide(state.k, s.head_dim),
                                .wide_v = device::moves_wide(keys.v, s.value_dim) && device::moves_wide(state.v, s.value_dim),
                                .flags = exec.flags};
    return launch(exec, "sisa.cuda append", append_kernel<T, P>,
                  {dim3(static_cast<unsigned>(blocks)), dim3(append_threads), static_cast<std::size_t>(tile * columns) * sizeof(double), true}, p);
}

/// Calls f(dim, m, channels), integral constants: attention's dispatch_step, with channels; f(0, 0, -1) asks for the simple kernel.
template <class T, class F>
Status dispatch_step(const Shape& s, F&& f) {
    using Simple = std::integral_constant<int, 0>;
    return dispatch_size<16, 32, 64, 128>(s.state_dim, [&](auto channels) -> Status {
        if constexpr (channels == 0)
            return f(Simple{}, Simple{}, std::integral_constant<int, -1>{});
        else
            return attention::detail::dispatch_step<T, channels>(attention_of(s), [&](auto dim, auto m) -> Status {
                if constexpr (dim == 0)
                    return f(Simple{}, Simple{}, std::integral_constant<int, -1>{});
                else
                    return f(dim, m, channels);
            });
    });
}

template <class T, class P>
Status run_step(const cuda& exec, const Options& options, const Params<P>& params, const State<T>& state, const Tokens<T, P>& tokens,
                const TokensOut<T>& out, Workspace ws) {
    namespace a = attention::detail;
    const Shape s = shape_of(state, tokens);
    const attention::Options plain = attention_of(options);
    return dispatch_step<T>(s, [&](auto dim, auto m, auto channels) -> Status {
        Arena arena(ws.data);
        const StepQueries<T> queries(arena, s, channels > 0 ? Index{channels} : s.state_dim);
        INTERSTATE_RETURN_IF_ERROR(run_append(exec, plain, s, state, keys_of(tokens), tokens.C, params.lam, queries));
        const a::StepChannels<T, channels> policy{.b = state.B,
                                                  .g = state.g,
                                                  .c = queries.c,
                                                  .g_new = queries.g,
                                                  .strength = queries.strength,
                                                  .wide_b = device::moves_wide(state.B, s.state_dim)};
        return a::launch_step<T, dim, m>(exec, plain, attention_of(s), attention::cache_rows(state), View<const T, 4>(state.k),
                                         View<const T, 4>(state.v), attention_of(tokens), out, arena, policy);
    });
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
