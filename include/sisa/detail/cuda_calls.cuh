// Which kernels a problem runs in, and their launches: channels are made of the tokens, attention's mainloop reads them, and their
// gradients go back.
#pragma once

#include <algorithm>

#include <attention/detail/cuda_calls.cuh>
#include <sisa/detail/cuda_gradients.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {
namespace detail {

/// Memory of a call. Channels are (B, H, L, padded), so that a tile of one head is one piece of memory.
template <class T>
struct CudaWorkspace {
    using A = acc_t<T>;
    using Sum = decay_sum_t<T>;
    Sum* decays;
    double* angles;
    Sum* bounds;
    double* query_level;
    Sum* key_level;
    A* strength;
    T *c, *b;
    attention::detail::BackwardWorkspace<A> of_attention;
    A *dc, *db;
    double* turns;
    Carry* carries;
    double *published, *strengths;

    CudaWorkspace(Arena& arena, const Options& options, const Shape& s, Index padded, bool backward)
        : decays(arena.take<Sum>(chunks(s) * s.kv_heads)),
          angles(arena.take<double>(chunks(s) * s.kv_heads * s.pairs())),
          bounds(arena.take<Sum>(options.mode == Mode::published ? chunks(s) * s.kv_heads * 2 : 0)),
          query_level(arena.take<double>(s.batch * s.queries * s.kv_heads)),
          key_level(arena.take<Sum>(s.batch * s.keys * s.kv_heads)),
          strength(arena.take<A>(s.query_heads)),
          c(arena.take<T>(s.batch * s.queries * s.query_heads * padded)),
          b(arena.take<T>(s.batch * s.keys * s.kv_heads * padded)),
          of_attention(arena, attention_of(options), backward ? attention_of(s) : attention::Shape{.dtype = dtype_of<T>}),
          dc(arena.take<A>(backward ? s.batch * s.queries * s.query_heads * padded : 0)),
          db(arena.take<A>(backward ? s.batch * s.keys * s.kv_heads * padded : 0)),
          turns(arena.take<double>(backward ? chunks(s) * s.kv_heads * s.pairs() : 0)),
          carries(arena.take<Carry>(backward ? chunks(s) * s.kv_heads : 0)),
          published(arena.take<double>(backward && options.mode == Mode::published ? chunks(s) * s.kv_heads * 3 : 0)),
          strengths(arena.take<double>(backward ? chunks(s) * s.query_heads : 0)) {}

    static Index chunks(const Shape& s) { return Chunks(s).count; }
};

/// (B, L, H, columns) of memory that lies as (B, H, L, columns).
template <class E>
View<E, 4> by_heads(E* data, Index batch, Index length, Index heads, Index columns) {
    return view(data, {batch, length, heads, columns}, {heads * length * columns, columns, length * columns, Index{1}});
}

/// Where `saved` keeps what rounding took from o.
inline View<bf16, 4> rest_of_o(const Options& options, const Shape& s, Saved saved) {
    if (!saved.data || rest_size(options, s) == 0) return {};
    return view(static_cast<bf16*>(saved.data), {s.batch, s.queries, s.query_heads, s.value_dim});
}
template <class E>
View<E, 3> by_heads(E* data, Index batch, Index length, Index heads) {
    return view(data, {batch, length, heads}, {heads * length, Index{1}, length});
}

inline namespace INTERSTATE_KERNELS {

/// Calls f(dim, channels) with the sizes of tiles that hold heads and channels, 64 or 128 and 16, 32, 64 or 128; f(0, 0) asks for
/// the simple kernels: float64, more of either, and a GPU without the shared memory that the pass wants.
template <class T, class F>
Status dispatch_channels(const Shape& s, bool backward, F&& f) {
    using None = std::integral_constant<int, 0>;
    if constexpr (std::is_same_v<T, f64>) {
        return f(None{}, None{});
    } else {
        namespace a = attention::detail;
        std::size_t limit = 0;
        INTERSTATE_RETURN_IF_ERROR(shared_memory_limit(limit));
        return dispatch_size<64, 128>(s.head_dim > s.value_dim ? s.head_dim : s.value_dim, [&](auto dim) -> Status {
            return dispatch_size<16, 32, 64, 128>(s.state_dim, [&](auto channels) -> Status {
                if constexpr (dim > 0 && channels > 0) {
                    const std::size_t wants = backward ? std::max(a::QueryForm<T, dim, channels>::shared, a::KeyForm<T, dim, channels>::shared)
                                                       : a::ForwardForm<T, dim, channels>::shared;
                    if (wants <= limit) return f(dim, channels);
                }
                return f(None{}, None{});
            });
        });
    }
}

template <class T, class P>
Problem<T, P> problem_of(const Options& options, const Inputs<T, P>& in, const CudaWorkspace<T>& memory, Index padded, bool pairwise) {
    const Shape s = shape_of(in);
    return {.shape = s,
            .chunks = Chunks(s),
            .in = in,
            .pairs = static_cast<int>(s.pairs()),
            .padded = static_cast<int>(padded),
            .published = options.mode == Mode::published,
            .pairwise = pairwise,
            .wide = padded == s.state_dim && s.state_dim % 8 == 0 && device::moves_wide(in.B, s.state_dim) && device::moves_wide(in.C, s.state_dim),
            .clamp = options.clamp,
            .scale = static_cast<acc_t<T>>(attention::scale_of(attention_of(options), s.head_dim)),
            .decays = memory.decays,
            .angles = memory.angles,
            .bounds = memory.bounds,
            .query_level = by_heads(memory.query_level, s.batch, s.queries, s.kv_heads),
            .key_level = by_heads(memory.key_level, s.batch, s.keys, s.kv_heads),
            .c = by_heads(memory.c, s.batch, s.queries, s.query_heads, padded),
            .b = by_heads(memory.b, s.batch, s.keys, s.kv_heads, padded),
            .strength = memory.strength};
}

template <class T, class P>
Status make_channels(const cuda& exec, const Problem<T, P>& p) {
    const Index blocks = p.chunks.count * p.shape.kv_heads;
    INTERSTATE_RETURN_IF_ERROR(attention::detail::check_blocks(blocks));
    const dim3 grid(static_cast<unsigned>(blocks)), threads(chunk_threads);
    INTERSTATE_RETURN_IF_ERROR(launch(exec, "sisa.cuda sums", chunk_sums_kernel<T, P>, {grid, threads}, p));
    INTERSTATE_RETURN_IF_ERROR(launch(exec, "sisa.cuda offsets", chunk_offsets_kernel<T, P>,
                                      {dim3(static_cast<unsigned>(p.chunks.sequences * p.shape.kv_heads), static_cast<unsigned>(1 + p.pairs)), dim3(scan_threads)}, p));
    const std::size_t shared = ChunkTables<T>::bytes(std::min(p.pairs, pairs_at_once));
    return launch(exec, "sisa.cuda channels", make_channels_kernel<T, P>, {grid, threads, shared}, p);
}

/// The policy that attention's kernels get.
template <class T, class P, int count>
auto policy_of(const Problem<T, P>& p, const CudaWorkspace<T>& memory) {
    const Shape& s = p.shape;
    const auto levels = [&]<class E>(const View<E, 3>& of) { return p.published ? View<const E, 3>{} : View<const E, 3>(of); };
    const auto dc = by_heads(memory.dc, s.batch, s.queries, s.query_heads, p.padded), db = by_heads(memory.db, s.batch, s.keys, s.kv_heads, p.padded);
    if constexpr (count > 0) {
        return attention::detail::Channels<T, count>{p.c, p.b, levels(p.query_level), levels(p.key_level), dc, db};
    } else {
        const auto strength = view(static_cast<const acc_t<T>*>(memory.strength), {s.query_heads});
        return attention::detail::GeneralChannels<T, decay_sum_t<T>>{p.c, p.b, levels(p.key_level), strength, dc, db};
    }
}

template <class T, class P>
Status run_forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved, Workspace ws) {
    namespace a = attention::detail;
    const Shape s = shape_of(in);
    return dispatch_channels<T>(s, false, [&](auto dim, auto channels) -> Status {
        const Index padded = channels > 0 ? Index{channels} : s.state_dim;
        Arena arena(ws.data);
        const CudaWorkspace<T> memory(arena, options, s, padded, false);
        const auto p = problem_of(options, in, memory, padded, channels == 0);
        INTERSTATE_RETURN_IF_ERROR(make_channels(exec, p));
        const auto policy = policy_of<T, P, channels>(p, memory);
        return a::launch_forward<T, dim>(exec, attention_of(options), attention_of(in), out, policy, rest_of_o(options, s, saved));
    });
}

template <class T, class P>
Status run_backward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved saved, const Upstream<T>& upstream,
                    const Grads<T, P>& grads, Workspace ws) {
    namespace a = attention::detail;
    const Shape s = shape_of(in);
    const bool sums = grads.log_alpha || grads.theta, tokens = sums || grads.C || grads.B || grads.lam;
    return dispatch_channels<T>(s, true, [&](auto dim, auto channels) -> Status {
        const Index padded = channels > 0 ? Index{channels} : s.state_dim;
        Arena arena(ws.data);
        const CudaWorkspace<T> memory(arena, options, s, padded, true);
        const auto p = problem_of(options, in, memory, padded, channels == 0);
        INTERSTATE_RETURN_IF_ERROR(make_channels(exec, p));
        const auto policy = policy_of<T, P, channels>(p, memory);
        const auto plain = attention_of(options);
        const auto plain_in = attention_of(in);
        const attention::Grads<T> plain_grads{grads.q, grads.k, grads.v};
        INTERSTATE_RETURN_IF_ERROR(a::make_statistics(exec, plain, plain_in, out, upstream, memory.of_attention,
                                                   View<const bf16, 4>(rest_of_o(options, s, saved))));
        if (grads.q || tokens)
            INTERSTATE_RETURN_IF_ERROR((a::launch_query_gradient<T, dim>(exec, plain, plain_in, upstream, memory.of_attention, plain_grads, policy)));
        if (grads.k || grads.v || tokens)
            INTERSTATE_RETURN_IF_ERROR((a::launch_key_gradient<T, dim>(exec, plain, plain_in, upstream, memory.of_attention, plain_grads, policy)));
        if (!tokens) return {};

        const auto moves = [](const auto& x, Index width) { return !x || device::moves_wide(x, width); };
        const GradientProblem<T, P> to{.p = p,
                                       .dc = policy.dc,
                                       .db = policy.db,
                                       .grads = grads,
                                       .dg = by_heads(reinterpret_cast<double*>(memory.key_level), s.batch, s.keys, s.kv_heads),
                                       .turns = memory.turns,
                                       .carries = memory.carries,
                                       .published = memory.published,
                                       .strength = memory.strengths,
                                       .wide = p.wide && moves(grads.B, s.state_dim) && moves(grads.C, s.state_dim),
                                       .wide_theta = s.pairs() % 4 == 0 && moves(grads.theta, s.pairs())};
        const dim3 grid(static_cast<unsigned>(p.chunks.count * s.kv_heads)), threads(chunk_threads);
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "sisa.cuda channel gradients", channel_gradients_kernel<T, P>, {grid, threads, GradientTables<T>::bytes(p.pairs)}, to));
        if (sums) {
            INTERSTATE_RETURN_IF_ERROR(launch(exec, "sisa.cuda carries", gradient_carries_kernel<T, P>,
                                              {dim3(static_cast<unsigned>(p.chunks.sequences * s.kv_heads), static_cast<unsigned>(1 + p.pairs)), dim3(scan_threads)}, to));
            INTERSTATE_RETURN_IF_ERROR(launch(exec, "sisa.cuda sums of gradients", finish_gradients_kernel<T, P>, {grid, threads}, to));
        }
        if (!grads.lam) return {};
        return launch(exec, "sisa.cuda dlambda", strength_gradient_kernel<T, P>, {dim3(static_cast<unsigned>(s.query_heads)), dim3(scan_threads)}, to);
    });
}

}  // namespace INTERSTATE_KERNELS
}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
