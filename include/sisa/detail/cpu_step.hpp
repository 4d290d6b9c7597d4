// CPU SISA, decoding: attention's step over rows [k, exp(g - g[j]) R(Phi) B], which are put together tile by tile.
#pragma once

#include <sisa/detail/cpu_tiled.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {
namespace detail {

template <class A>
struct StepScratch {
    A *q, *k, *v, *scores, *sum, *bias, *decay;
    double *g, *Chat;
    attention::detail::Running<A> running;

    StepScratch(Arena& arena, const Shape& s) {
        using attention::detail::inner_block;
        using attention::detail::padded;
        const Index ld = padded(s.head_dim) + padded(s.state_dim), dv = padded(s.value_dim), heads = s.group();
        q = arena.take<A>(heads * ld);
        k = arena.take<A>(inner_block * ld);
        v = arena.take<A>(inner_block * dv);
        scores = arena.take<A>(heads * inner_block);
        sum = arena.take<A>(heads * dv);
        bias = arena.take<A>(heads);
        decay = arena.take<A>(inner_block);
        g = arena.take<double>(inner_block);
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

/// A task is a key/value head of a batch row, whose cache it reads once for all query heads of the group.
template <class T, class P>
void cached_step(const cpu& exec, const Options& options, const Params<P>& params, const State<T>& state,
                 const Token<T, P>& token, const TokenOut<T>& out, Workspace ws) {
    using A = acc_t<T>;
    using attention::detail::inner_block;
    using attention::detail::LoadRows;
    using attention::detail::padded;
    using attention::detail::ScaleRows;
    using attention::detail::StepScores;
    const Shape s = shape_of(state, token);
    const attention::Options plain = attention_of(options);
    const Isa isa = exec.isa;
    const Index length = state.length, group = s.group(), ds = s.state_dim;
    const Index channel = padded(s.head_dim), ldk = channel + padded(ds), ldv = padded(s.value_dim);
    const RowRange read = attention::keys_read(plain, length, length + 1);  // eq. 9
    const A scale = static_cast<A>(attention::scale_of(plain, s.head_dim));
    const std::size_t each = StepScratch<A>::bytes(s);
    const double work = static_cast<double>(s.batch * s.query_heads) * static_cast<double>(read.end - read.begin) *
                        static_cast<double>(s.head_dim + ds + s.value_dim);
    const auto load = [&](const View<T, 4>& x, Index b, Index first, Index h, Index count, A* to, Index ld) {
        if (x.extent[3] > 0)
            simd::run_body<LoadRows<T>>(isa, static_cast<const T*>(&x(b, first, h, 0)), x.stride[1], x.stride[3], count,
                                        x.extent[3], A(1), to, padded(x.extent[3]), ld);
    };

    // As reference's append, for one row.
    const auto append_row = [&](Index b, Index kv) {
        for (Index d = 0; d < s.head_dim; ++d) state.k(b, length, kv, d) = token.k(b, kv, d);
        for (Index d = 0; d < s.value_dim; ++d) state.v(b, length, kv, d) = token.v(b, kv, d);
        if (ds == 0) return;
        state.g_last(b, kv) =
            (length > 0 ? state.g_last(b, kv) : 0.0) + floored(static_cast<double>(token.log_alpha(b, kv)));
        state.g(b, length, kv) = state.g_last(b, kv);
        for (Index n = 0; n < s.pairs(); ++n) {
            state.Phi(b, kv, n) = (length > 0 ? state.Phi(b, kv, n) : 0.0) + static_cast<double>(token.theta(b, kv, n));
            double pair[2] = {static_cast<double>(token.B(b, kv, 2 * n)), static_cast<double>(token.B(b, kv, 2 * n + 1))};
            turn_pair(pair, 0, state.Phi(b, kv, n));
            for (Index e = 0; e < 2; ++e) state.B(b, length, kv, 2 * n + e) = static_cast<T>(pair[e]);
        }
    };
    parallel_for(s.batch * s.kv_heads, attention::detail::threads_for(work, exec.threads), [&](Index task, int worker) {
        const Index b = task / s.kv_heads, kv = task % s.kv_heads;
        Arena arena(attention::detail::worker_memory(ws, 0, each, worker));
        const StepScratch<A> w(arena, s);
        append_row(b, kv);
        for (Index n = 0; n < group; ++n) {
            const Index h = kv * group + n;
            A* const q = w.q + n * ldk;
            for (Index d = 0; d < ldk; ++d) q[d] = d < s.head_dim ? scale * static_cast<A>(token.q(b, h, d)) : A(0);
            for (Index d = 0; d < ds; ++d) w.Chat[d] = static_cast<double>(token.C(b, h, d));
            for (Index d = 0; d < s.pairs(); ++d) turn_pair(w.Chat, d, state.Phi(b, kv, d));
            for (Index d = 0; d < ds; ++d) q[channel + d] = static_cast<A>(static_cast<double>(params.lam(h)) * w.Chat[d]);
            for (Index d = 0; d < ldv; ++d) w.sum[n * ldv + d] = A(0);
            w.bias[n] = token.bias ? token.bias(h) : static_cast<A>(options.bias);
            w.running.largest[n] = -std::numeric_limits<A>::infinity();
            w.running.sum[n] = A(0);
        }
        for (Index j = read.begin; j < read.end; j += inner_block) {
            const Index rows = read.end - j < inner_block ? read.end - j : inner_block;
            load(state.k, b, j, kv, rows, w.k, ldk);
            load(state.v, b, j, kv, rows, w.v, ldv);
            if (ds > 0) {
                load(state.B, b, j, kv, rows, w.k + channel, ldk);
                for (Index r = 0; r < inner_block; ++r) w.g[r] = state.g(b, j + (r < rows ? r : rows - 1), kv);
                simd::run_body<attention::detail::DecayFactors<A>>(isa, static_cast<const double*>(w.g), state.g_last(b, kv),
                                                                   -1.0, inner_block, w.decay);
                simd::run_body<attention::detail::AddRows<A>>(isa, static_cast<const A*>(w.k + channel), ldk, rows, padded(ds),
                                                              static_cast<const A*>(w.decay), false, w.k + channel, ldk);
            }
            const A *q = w.q, *k = w.k, *bias = w.bias;
            if (options.score == Score::softmax) {
                simd::run_body<StepScores<A, Score::softmax>>(isa, q, group, ldk, k, ldk, rows, w.scores, bias, w.running);
                simd::run_body<ScaleRows<A>>(isa, w.sum, group, ldv, static_cast<const A*>(w.running.shrink));
            } else {
                simd::run_body<StepScores<A, Score::sigmoid>>(isa, q, group, ldk, k, ldk, rows, w.scores, bias, w.running);
            }
            attention::detail::multiply<A>(isa, w.scores, inner_block, 1, w.v, ldv, w.sum, ldv, group, ldv, rows, true);
        }
        for (Index n = 0; n < group; ++n) {
            const A factor = options.score == Score::softmax ? attention::detail::normalizer(w.running.sum[n]) : A(1);
            for (Index d = 0; d < s.value_dim; ++d)
                out.o(b, kv * group + n, d) = static_cast<T>(w.sum[n * ldv + d] * factor);
        }
    });
}

}  // namespace detail
}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
