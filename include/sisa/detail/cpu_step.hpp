// CPU SISA, decoding: attention's step over rows [k, exp(g - g[j]) R(Phi) B], which are put together tile by tile.
#pragma once

#include <sisa/detail/cpu_tiled.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {
namespace detail {

template <class A>
struct StepScratch {
    A *q, *k, *b, *v, *scores, *sum, *bias, *decay;
    double *g, *g_new, *Chat;
    attention::detail::Running<A> running;

    StepScratch(Arena& arena, const Shape& s) {
        using attention::detail::inner_block;
        using attention::detail::padded;
        const Index ds = padded(s.state_dim), ld = padded(s.head_dim) + ds, dv = padded(s.value_dim), heads = s.group() * s.queries;
        q = arena.take<A>(heads * ld);
        k = arena.take<A>(inner_block * ld);
        b = arena.take<A>(inner_block * ds);
        v = arena.take<A>(inner_block * dv);
        scores = arena.take<A>(s.group() * inner_block);
        sum = arena.take<A>(heads * dv);
        bias = arena.take<A>(heads);
        decay = arena.take<A>(inner_block);
        g = arena.take<double>(inner_block);
        g_new = arena.take<double>(s.queries);
        Chat = arena.take<double>(s.state_dim);
        running.largest = arena.take<A>(heads);
        running.sum = arena.take<A>(heads);
        running.shrink = arena.take<A>(heads);
    }
    static std::size_t bytes(const Shape& s) {
        Arena measure;
        StepScratch(measure, s);
        return measure.required();
    }
};

inline std::size_t step_workspace_size(const cpu& exec, const Shape& s) {
    const std::size_t each = s.dtype == DType::f64 ? StepScratch<double>::bytes(s) : StepScratch<float>::bytes(s);
    return each * static_cast<std::size_t>(thread_count(exec.threads));
}

/// A task is a key/value head of a batch row, whose cache it reads once for all query heads of the group and all tokens.
template <class T, class P>
void cached_step(const cpu& exec, const Options& options, const Params<P>& params, const State<T>& state,
                 const Tokens<T, P>& tokens, const TokensOut<T>& out, Workspace ws) {
    using A = acc_t<T>;
    namespace a = attention::detail;
    const Shape s = shape_of(state, tokens);
    const attention::Options plain = attention_of(options);
    const attention::CacheRows rows = attention::cache_rows(state);
    const Isa isa = exec.isa;
    const Index group = s.group(), ds = s.state_dim;
    const Index channel = a::padded(s.head_dim), ldb = a::padded(ds), ldk = channel + ldb, ldv = a::padded(s.value_dim);
    const A scale = static_cast<A>(attention::scale_of(plain, s.head_dim));
    const std::size_t each = StepScratch<A>::bytes(s);
    const double work = a::step_scores(plain, attention_of(s), rows) * static_cast<double>(s.head_dim + ds + s.value_dim);

    parallel_for(s.batch * s.kv_heads, a::threads_for(work, exec.threads), [&](Index task, int worker) {
        const Index b = task / s.kv_heads, kv = task % s.kv_heads, length = rows.length_of(b), end = length + s.queries;
        Arena arena(a::worker_memory(ws, 0, each, worker));
        const StepScratch<A> w(arena, s);
        for (Index i = 0; i < s.queries; ++i) {
            append_token(state, keys_of(tokens), s, b, i, kv);
            if (ds > 0) w.g_new[i] = state.g_last(b, kv);
            for (Index n = 0; n < group; ++n) {
                const Index h = kv * group + n, row = i * group + n;
                A* const q = w.q + row * ldk;
                for (Index d = 0; d < ldk; ++d) q[d] = d < s.head_dim ? scale * static_cast<A>(tokens.q(b, i, h, d)) : A(0);
                for (Index d = 0; d < ds; ++d) w.Chat[d] = static_cast<double>(tokens.C(b, i, h, d));
                for (Index d = 0; d < s.pairs(); ++d) turn_pair(w.Chat, d, state.Phi(b, kv, d));
                for (Index d = 0; d < ds; ++d) q[channel + d] = static_cast<A>(static_cast<double>(params.lam(h)) * w.Chat[d]);
                for (Index d = 0; d < ldv; ++d) w.sum[row * ldv + d] = A(0);
                w.bias[row] = tokens.bias ? tokens.bias(h) : static_cast<A>(options.bias);
                w.running.largest[row] = -std::numeric_limits<A>::infinity();
                w.running.sum[row] = A(0);
            }
        }
        for (Index j = s.queries > 0 ? attention::keys_read(plain, length, end).begin : end; j < end; j += a::inner_block) {
            const Index count = end - j < a::inner_block ? end - j : a::inner_block;
            Index v_stride = ldv;
            a::load_cached(isa, rows, state.k, b, j, kv, count, w.k, ldk);
            const A* const v = a::rows_of_cache(isa, rows, state.v, b, j, kv, count, w.v, v_stride);
            if (ds > 0) {
                a::load_cached(isa, rows, state.B, b, j, kv, count, w.b, ldb);
                for (Index r = 0; r < a::inner_block; ++r) {
                    const attention::CacheRows::Place at = rows.place(b, j + (r < count ? r : count - 1));
                    w.g[r] = state.g(at.batch, at.row, kv);
                }
            }
            for (Index i = 0; i < s.queries; ++i) {
                const RowRange read = attention::keys_read(plain, length + i, end);  // eq. 9
                const RowRange keys{read.begin > j ? read.begin : j, read.end < j + count ? read.end : j + count};
                if (keys.begin >= keys.end) continue;
                if (ds > 0) {
                    simd::run_body<a::DecayFactors<A>>(isa, static_cast<const double*>(w.g), w.g_new[i], -1.0, a::inner_block, w.decay);
                    simd::run_body<a::AddRows<A>>(isa, static_cast<const A*>(w.b), ldb, count, ldb, static_cast<const A*>(w.decay), false,
                                                  w.k + channel, ldk);
                }
                const Index row = i * group;
                a::step_tile(isa, options.score, static_cast<const A*>(w.q + row * ldk), group, ldk, static_cast<const A*>(w.k), ldk, v,
                             v_stride, j, keys, w.scores, static_cast<const A*>(w.bias + row), w.running.from(row), w.sum + row * ldv, ldv);
            }
        }
        for (Index i = 0; i < s.queries; ++i)
            for (Index n = 0; n < group; ++n)
                a::finish_step(out.o, out.lse, options.score, b, i, kv * group + n, w.sum + (i * group + n) * ldv, s.value_dim, w.running,
                               i * group + n);
    });
}

}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
