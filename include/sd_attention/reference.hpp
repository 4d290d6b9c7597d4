// S-D attention in float64, written like docs/ops/sd_attention.md, whose equations are cited: the projection x = u K by plain loops, then
// the references of attention or linear attention, whose pages say what they compute.
#pragma once

#include <algorithm>

#include <attention/reference.hpp>
#include <linear_attention/reference.hpp>
#include <sd_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_attention {

namespace detail {

inline attention::Options softmax_options() { return {.causal = true}; }
inline linear_attention::Options linear_of(const Options& options) {
    return {options.normalizer == Normalizer::elu1 ? linear_attention::FeatureMap::elu1 : linear_attention::FeatureMap::identity};
}
/// What x is multiplied with before it scores: the scale of identity (eq. 5). That of softmax is attention's own, elu1 has none.
inline double factor_of(const Options& options, const Shape& s) {
    return options.normalizer == Normalizer::identity ? 1.0 / std::sqrt(static_cast<double>(std::max<Index>(s.channels, 1))) : 1.0;
}
/// Of tensors of a dtype, x for the queries and u for the keys.
inline attention::Shape attention_of(const Shape& s, DType dtype) {
    return {.dtype = dtype, .batch = s.batch, .queries = s.length, .keys = s.length, .query_heads = s.heads, .kv_heads = s.heads,
            .head_dim = s.channels, .value_dim = s.value_dim, .sequences = s.sequences};
}
inline linear_attention::Shape linear_shape_of(const Shape& s, DType dtype) {
    return {.dtype = dtype, .batch = s.batch, .length = s.length, .query_heads = s.heads, .kv_heads = s.heads,
            .head_dim = s.channels, .value_dim = s.value_dim, .sequences = s.sequences};
}

/// Bytes that the step of attention or of linear attention asks for.
template <class Exec>
std::size_t step_bytes(const Exec& exec, const Options& options, const Shape& s) {
    attention::Shape cached = attention_of(s, s.dtype);
    cached.keys = s.keys;
    return options.softmax() ? workspace_size(exec, softmax_options(), cached, pass::step)
                             : workspace_size(exec, linear_of(options), linear_shape_of(s, s.dtype), pass::step);
}
/// x of a step of one token, (B, H, r) of (B, 1, H, r).
template <class T>
View<T, 3> only_token(const View<T, 4>& x) {
    return {x.data, {x.extent[0], x.extent[2], x.extent[3]}, {x.stride[0], x.stride[2], x.stride[3]}};
}

/// Everything in double: (B, L, H, r) or (B, L, H, dv) unless it says otherwise.
struct ReferenceTensors {
    double *x, *u, *v, *o, *lse;      // lse: (B, L, H)
    double *dx, *du, *dv, *dout, *dlse;
    double *K, *dK;                   // (r, r) of one head
    std::byte* inner;
    std::size_t inner_bytes;

    ReferenceTensors(Arena& arena, const Options& options, const Shape& s, pass which) {
        const bool back = which == pass::backward;
        // Products of extents that the elements of a view bound: a tensor without elements may have any others.
        const Index tokens = s.channels > 0 || s.value_dim > 0 ? s.batch * s.length : 0;
        const Index wide = tokens * s.heads * s.channels, values = tokens * s.heads * s.value_dim;
        const Index square = s.heads > 0 ? s.channels * s.channels : 0;
        const bool many = static_cast<double>(s.batch) * static_cast<double>(s.length) * static_cast<double>(s.heads) > 0x1p48;
        const Index rows = many ? -1 : s.batch * s.length * s.heads;  // no memory has so many
        const auto take = [&](Index n, bool needed) { return arena.take<double>(needed ? n : 0); };
        x = take(wide, true), u = take(wide, true), v = take(values, true), o = take(values, true), lse = take(rows, true);
        dx = take(wide, back), du = take(wide, back), dv = take(values, back), dout = take(values, back), dlse = take(rows, back);
        K = take(square, true), dK = take(square, back);
        const reference exec;
        const auto softmax_bytes = [&](pass p) { return workspace_size(exec, softmax_options(), attention_of(s, DType::f64), p); };
        inner_bytes = !options.softmax() ? workspace_size(exec, linear_of(options), linear_shape_of(s, DType::f64), which)
                      : back             ? std::max(softmax_bytes(pass::forward), softmax_bytes(pass::backward))
                                         : softmax_bytes(pass::forward);
        inner = arena.take<std::byte>(static_cast<Index>(inner_bytes));
    }
};

/// Element (i, j) of K of head h (eq. 1 and 2).
template <class W>
INTERSTATE_HD double generator_element(const Options& options, const Shape& s, const Generator<W>& g, Index h, Index i, Index j) {
    double skew = 0.0;
    if (options.routes() && s.dense()) skew = (static_cast<double>(g.P(h, i, j)) - static_cast<double>(g.P(h, j, i))) / 2.0;
    for (Index p = 0; options.routes() && p < s.planes; ++p)
        skew += static_cast<double>(g.a(h, p, i)) * static_cast<double>(g.b(h, p, j)) -
                static_cast<double>(g.b(h, p, i)) * static_cast<double>(g.a(h, p, j));
    return skew - (options.filters() && i == j ? softplus(static_cast<double>(g.delta(h, i))) : 0.0);
}
template <class W>
void make_generator(const Options& options, const Shape& s, const Generator<W>& g, Index h, double* K) {
    for (Index i = 0; i < s.channels; ++i)
        for (Index j = 0; j < s.channels; ++j) K[i * s.channels + j] = generator_element(options, s, g, h, i, j);
}
/// Row i of what dK is to P, and to a, b and delta (eq. 9 and 10).
template <class W>
INTERSTATE_HD void generator_gradient_row(const Options& options, const Shape& s, const Generator<W>& in, const BasicGenerator<W>& grads, Index h,
                                          const double* dK, Index i) {
    const Index r = s.channels;
    const auto turn = [&](Index j) { return options.routes() ? dK[i * r + j] - dK[j * r + i] : 0.0; };
    for (Index j = 0; j < r && grads.P; ++j) grads.P(h, i, j) = static_cast<W>(turn(j) / 2.0);
    for (Index p = 0; p < s.planes; ++p) {
        double da = 0.0, db = 0.0;
        for (Index j = 0; j < r; ++j) {
            da += turn(j) * static_cast<double>(in.b(h, p, j));
            db -= turn(j) * static_cast<double>(in.a(h, p, j));
        }
        if (grads.a) grads.a(h, p, i) = static_cast<W>(da);
        if (grads.b) grads.b(h, p, i) = static_cast<W>(db);
    }
    const double slope = options.filters() ? -sigmoid(static_cast<double>(in.delta(h, i))) : 0.0;
    if (grads.delta) grads.delta(h, i) = static_cast<W>(slope * dK[i * r + i]);
}
template <class W>
void generator_gradients(const Options& options, const Shape& s, const Generator<W>& in, const BasicGenerator<W>& grads, Index h,
                         const double* dK) {
    for (Index i = 0; i < s.channels; ++i) generator_gradient_row(options, s, in, grads, h, dK, i);
}

/// f(t, b, i) for every row t of (B, L), those of no sequence left out.
template <class T, class W, class F>
void each_token(const Inputs<T, W>& in, const Shape& s, F&& f) {
    for (Index b = 0; b < s.batch; ++b)
        for (Index i = 0; i < s.length; ++i)
            if (!in.cu_seqlens || (i >= in.cu_seqlens(0) && i < in.cu_seqlens(s.sequences))) f(b * s.length + i, b, i);
}

/// u, v and x in double, and forward's results from them.
template <class T, class W>
Status reference_forward(const Options& options, const Inputs<T, W>& in, const Shape& s, const ReferenceTensors& at) {
    const Index r = s.channels, dv = s.value_dim;
    const double factor = factor_of(options, s);
    for (Index h = 0; h < s.heads; ++h) {
        make_generator(options, s, in.generator, h, at.K);
        each_token(in, s, [&](Index t, Index b, Index i) {
            double *const u = at.u + (t * s.heads + h) * r, *const x = at.x + (t * s.heads + h) * r;
            for (Index c = 0; c < r; ++c) u[c] = static_cast<double>(in.u(b, i, h, c));
            for (Index c = 0; c < dv; ++c) at.v[(t * s.heads + h) * dv + c] = static_cast<double>(in.v(b, i, h, c));
            for (Index c = 0; c < r; ++c) {  // eq. 3
                x[c] = 0.0;
                for (Index e = 0; e < r; ++e) x[c] += u[e] * at.K[e * r + c];
                x[c] *= factor;
            }
        });
    }
    const Index narrow[] = {s.batch, s.length, s.heads, r}, wide[] = {s.batch, s.length, s.heads, dv};
    const Workspace ws{at.inner, at.inner_bytes};
    const auto x = view<const double>(at.x, narrow), u = view<const double>(at.u, narrow), v = view<const double>(at.v, wide);
    if (options.softmax())  // eq. 4
        return attention::forward(reference{}, softmax_options(),
                                  attention::Inputs<double>{.q = x, .k = u, .v = v, .cu_seqlens = in.cu_seqlens},
                                  {.o = view(at.o, wide), .lse = view(at.lse, {s.batch, s.length, s.heads})}, Saved{}, ws);
    return linear_attention::forward(reference{}, linear_of(options),
                                     linear_attention::Inputs<double>{.q = x, .k = u, .v = v, .cu_seqlens = in.cu_seqlens},
                                     {.o = view(at.o, wide)}, Saved{}, ws);  // eq. 5 and 6
}

/// Of `step`: K of a head, x of all tokens in T, and what the step of attention or linear attention needs.
template <class T>
struct ReferenceStep {
    double* K;
    T* x;
    std::byte* inner;
    std::size_t inner_bytes;

    ReferenceStep(Arena& arena, const Options& options, const Shape& s) {
        K = arena.take<double>(s.heads > 0 ? s.channels * s.channels : 0);
        x = arena.take<T>(s.batch * s.length * s.heads * s.channels);
        inner_bytes = step_bytes(reference{}, options, s);
        inner = arena.take<std::byte>(static_cast<Index>(inner_bytes));
    }
    Workspace memory() const { return {inner, inner_bytes}; }
};
/// x (B, n, H, r) of the tokens of a step (eq. 3), in T as queries are.
template <class T, class W>
View<const T, 4> reference_queries(const Options& options, const Inputs<T, W>& in, const Shape& s, const ReferenceStep<T>& at) {
    const auto x = view(at.x, {s.batch, s.length, s.heads, s.channels});
    for (Index h = 0; h < s.heads; ++h) {
        make_generator(options, s, in.generator, h, at.K);
        each_token(in, s, [&](Index, Index b, Index i) {
            for (Index c = 0; c < s.channels; ++c) {
                double sum = 0.0;
                for (Index e = 0; e < s.channels; ++e) sum += static_cast<double>(in.u(b, i, h, e)) * at.K[e * s.channels + c];
                x(b, i, h, c) = static_cast<T>(factor_of(options, s) * sum);
            }
        });
    }
    return x;
}

}  // namespace detail

inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"sd_attention.reference", "plain float64 loops, for any shape and strides"};
}

/// The reference keeps nothing between forward and backward.
inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }

inline std::size_t workspace_size(reference, const Options& options, const Shape& shape, pass which) {
    Arena arena;
    if (which == pass::step)
        detail::ReferenceStep<double>(arena, options, shape);
    else
        detail::ReferenceTensors(arena, options, shape, which);
    return arena.required();
}

/// o and, of softmax, lse (eq. 1 to 6).
template <class T, class W>
Status forward(reference exec, const Options& options, const Inputs<T, W>& in, const Outputs<T>& out, Saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ReferenceTensors at(arena, options, s, pass::forward);
    INTERSTATE_RETURN_IF_ERROR(detail::reference_forward(options, in, s, at));
    for (Index b = 0; b < s.batch; ++b)
        for (Index i = 0; i < s.length; ++i)
            for (Index h = 0; h < s.heads; ++h) {
                const Index row = (b * s.length + i) * s.heads + h;
                for (Index c = 0; c < s.value_dim; ++c) out.o(b, i, h, c) = static_cast<T>(at.o[row * s.value_dim + c]);
                if (out.lse) out.lse(b, i, h) = static_cast<acc_t<T>>(at.lse[row]);
            }
    return {};
}

/// The gradients whose views are not null (eq. 7 to 10); `out` is not read.
template <class T, class W>
Status backward(reference exec, const Options& options, const Inputs<T, W>& in, const Outputs<T>& out, Saved, const Upstream<T>& upstream,
                const Grads<T, W>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const detail::ReferenceTensors at(arena, options, s, pass::backward);
    INTERSTATE_RETURN_IF_ERROR(detail::reference_forward(options, in, s, at));
    const Index H = s.heads, r = s.channels, dv = s.value_dim;
    for (Index b = 0; b < s.batch; ++b)
        for (Index i = 0; i < s.length; ++i)
            for (Index h = 0; h < H; ++h) {
                const Index row = (b * s.length + i) * H + h;
                for (Index c = 0; c < dv; ++c) at.dout[row * dv + c] = static_cast<double>(upstream.o(b, i, h, c));
                at.dlse[row] = upstream.lse ? static_cast<double>(upstream.lse(b, i, h)) : 0.0;
            }
    const Index narrow[] = {s.batch, s.length, H, r}, wide[] = {s.batch, s.length, H, dv}, rows[] = {s.batch, s.length, H};
    const Workspace inner{at.inner, at.inner_bytes};
    const auto x = view<const double>(at.x, narrow), u = view<const double>(at.u, narrow), v = view<const double>(at.v, wide),
               dout = view<const double>(at.dout, wide);
    const auto dx = view(at.dx, narrow), du = view(at.du, narrow), dvalues = view(at.dv, wide);
    if (options.softmax())
        INTERSTATE_RETURN_IF_ERROR(attention::backward(
            exec, detail::softmax_options(), attention::Inputs<double>{.q = x, .k = u, .v = v, .cu_seqlens = in.cu_seqlens},
            attention::Outputs<double>{.o = view(at.o, wide), .lse = view(at.lse, rows)}, Saved{},
            attention::Upstream<double>{.o = dout, .lse = view<const double>(at.dlse, rows)},
            attention::Grads<double>{dx, du, dvalues}, inner));
    else
        INTERSTATE_RETURN_IF_ERROR(linear_attention::backward(
            exec, detail::linear_of(options), linear_attention::Inputs<double>{.q = x, .k = u, .v = v, .cu_seqlens = in.cu_seqlens},
            linear_attention::Outputs<double>{}, Saved{}, linear_attention::Upstream<double>{.o = dout},
            linear_attention::Grads<double>{.q = dx, .k = du, .v = dvalues}, inner));

    const double factor = detail::factor_of(options, s);
    zero_outside_sequences(grads.u, in.cu_seqlens);
    zero_outside_sequences(grads.v, in.cu_seqlens);
    for (Index h = 0; h < H; ++h) {
        detail::make_generator(options, s, in.generator, h, at.K);
        for (Index n = 0; n < r * r; ++n) at.dK[n] = 0.0;
        detail::each_token(in, s, [&](Index t, Index b, Index i) {
            const double *const own = at.u + (t * H + h) * r, *const d = at.dx + (t * H + h) * r;
            for (Index e = 0; e < r; ++e) {
                double sum = at.du[(t * H + h) * r + e];
                for (Index c = 0; c < r; ++c) {
                    sum += factor * at.K[e * r + c] * d[c];       // eq. 7
                    at.dK[e * r + c] += factor * own[e] * d[c];  // eq. 8
                }
                if (grads.u) grads.u(b, i, h, e) = static_cast<T>(sum);
            }
            for (Index c = 0; c < dv && grads.v; ++c) grads.v(b, i, h, c) = static_cast<T>(at.dv[(t * H + h) * dv + c]);
        });
        detail::generator_gradients(options, s, in.generator, grads.generator, h, at.dK);
    }
    return {};
}

/// New tokens against the cache (eq. 1 to 4), as attention's step; x is rounded to T.
template <class T, class W>
Status step(reference exec, const Options& options, const Params<W>& params, const Cache<T>& cache, const Tokens<T>& tokens,
            const TokensOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, cache, tokens, out));
    const Shape s = shape_of(params, cache, tokens);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    Arena arena(ws.data);
    const detail::ReferenceStep<T> at(arena, options, s);
    const auto x = detail::reference_queries(options, inputs_of(params, tokens), s, at);
    return attention::step(exec, detail::softmax_options(), attention::Params{}, cache,
                           attention::Tokens<T>{.q = x, .k = tokens.u, .v = tokens.v}, out, at.memory());
}
template <class T, class W>
Status step(reference exec, const Options& options, const Params<W>& params, const Cache<T>& cache, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    return step(exec, options, params, cache, tokens_of(token), attention::tokens_of(out), ws);
}
/// One token for every batch row (eq. 5 and 6); the state is updated in place.
template <class T, class W>
Status step(reference exec, const Options& options, const Params<W>& params, const State<acc_t<T>>& state, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, token, out));
    const Shape s = shape_of(params, state, token);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    Arena arena(ws.data);
    const detail::ReferenceStep<T> at(arena, options, s);
    const auto x = detail::only_token(detail::reference_queries(options, inputs_of(params, tokens_of(token)), s, at));
    return linear_attention::step(exec, detail::linear_of(options), linear_attention::Params{}, state,
                                  linear_attention::Token<T>{.q = x, .k = token.u, .v = token.v}, linear_attention::TokenOut<T>{out.o},
                                  at.memory());
}

}  // namespace sd_attention
}  // namespace interstate::inline INTERSTATE_ABI
