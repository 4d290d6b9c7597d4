// S-D attention: what goes in, what comes out, and how it is checked. Equations: docs/ops/sd_attention.md.
#pragma once

#include <cmath>
#include <string_view>

#include <attention/params.hpp>
#include <linear_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_attention {

/// How scores become weights (docs/ops/sd_attention.md, eq. 4 to 6).
enum class Normalizer : std::uint8_t { softmax, identity, elu1 };
/// Which part of the generator scores (eq. 2): S - D, S alone or -D alone.
enum class Component : std::uint8_t { both, routing, filtering };

struct Options {
    Normalizer normalizer = Normalizer::softmax;
    Component component = Component::both;

    INTERSTATE_HD constexpr bool softmax() const { return normalizer == Normalizer::softmax; }
    INTERSTATE_HD constexpr bool routes() const { return component != Component::filtering; }
    INTERSTATE_HD constexpr bool filters() const { return component != Component::routing; }
};

/// Sets one option from its text, as the golden cases and tools/replay write it.
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    if (name == "normalizer" && value == "softmax") return options.normalizer = Normalizer::softmax, Status{};
    if (name == "normalizer" && value == "identity") return options.normalizer = Normalizer::identity, Status{};
    if (name == "normalizer" && value == "elu1") return options.normalizer = Normalizer::elu1, Status{};
    if (name == "component" && value == "both") return options.component = Component::both, Status{};
    if (name == "component" && value == "routing") return options.component = Component::routing, Status{};
    if (name == "component" && value == "filtering") return options.component = Component::filtering, Status{};
    return unknown_option(name, value, "sd_attention takes normalizer=softmax|identity|elu1, component=both|routing|filtering");
}

/// Sizes of one call. `sequences` counts packed sequences; -1 means a dense batch.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;       // B; 1 when packed
    Index length = 0;      // L
    Index heads = 0;       // H
    Index channels = 0;    // r, of the shared projection
    Index value_dim = 0;   // dv
    Index planes = -1;     // p, of S in low rank; -1: S of a dense P
    Index sequences = -1;  // S

    INTERSTATE_HD constexpr bool packed() const { return sequences >= 0; }
    INTERSTATE_HD constexpr bool dense() const { return planes < 0; }
    // What attention calls these sizes; keys, of `step`: rows of a sequence in the cache.
    Index queries = 0, query_heads = 0, keys = 0;
};

/// The generator K = S - D of every head (eq. 1 and 2): of P, or of a and b. W is float or double.
template <class W>
struct BasicGenerator {
    View<W, 3> P{};      // (H, r, r)
    View<W, 3> a{};      // (H, p, r), with b instead of P
    View<W, 3> b{};      // (H, p, r)
    View<W, 2> delta{};  // (H, r), before its softplus
};
template <class W>
using Generator = BasicGenerator<const W>;

/// T is the storage dtype of u, v and o; W (float or double) that of the generator.
template <class T, class W = param_t<T>>
struct Inputs {
    View<const T, 4> u{};                      // (B, L, H, r), query and key in one
    View<const T, 4> v{};                      // (B, L, H, dv)
    Generator<W> generator{};
    View<const std::int32_t, 1> cu_seqlens{};  // (S+1), optional: absent is a dense batch
};

/// o (B, L, H, dv) and, of softmax, lse (B, L, H), and their gradients.
using attention::Outputs;
using attention::Upstream;

/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T, class W = param_t<T>>
struct Grads {
    View<T, 4> u{};
    View<T, 4> v{};
    BasicGenerator<W> generator{};
};

/// What `step` needs beside the token.
template <class W>
struct Params {
    Generator<W> generator{};
};

/// Decoding with softmax: the cache of attention, contiguous or paged, its keys the rows of u.
template <class T>
using Cache = attention::State<T>;
/// Decoding with identity or elu1: s (B, H, r, dv) and, of elu1, z (B, H, r).
template <class A>
using State = linear_attention::State<A>;
/// One token for each batch row.
template <class T>
struct Token {
    View<const T, 3> u{};  // (B, H, r)
    View<const T, 3> v{};  // (B, H, dv)
};
/// o (B, H, dv) and, of softmax and optional, lse (B, H).
using attention::TokenOut;
/// n tokens for each batch row, softmax only.
template <class T>
struct Tokens {
    View<const T, 4> u{};  // (B, n, H, r)
    View<const T, 4> v{};  // (B, n, H, dv)
};
using attention::TokensOut;
template <class T>
constexpr Tokens<T> tokens_of(const Token<T>& x) {
    return {as_sequences(x.u), as_sequences(x.v)};
}
/// The tokens of a step as a call of forward has them.
template <class T, class W>
constexpr Inputs<T, W> inputs_of(const Params<W>& params, const Tokens<T>& x) {
    return {.u = x.u, .v = x.v, .generator = params.generator};
}

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class W, class F>
void visit_generator(BasicGenerator<W>& g, const Shape& s, Need need, F&& f) {
    const Index planes = s.dense() ? 0 : s.planes;
    f("P", g.P, {s.heads, s.channels, s.channels}, Need::optional);  // this or the next two: validate()
    f("a", g.a, {s.heads, planes, s.channels}, Need::optional);
    f("b", g.b, {s.heads, planes, s.channels}, Need::optional);
    f("delta", g.delta, {s.heads, s.channels}, need);
}
template <class T, class W, class F>
void visit(Inputs<T, W>& in, const Shape& s, F&& f) {
    f("u", in.u, {s.batch, s.length, s.heads, s.channels}, Need::required);
    f("v", in.v, {s.batch, s.length, s.heads, s.value_dim}, Need::required);
    visit_generator(in.generator, s, Need::required, f);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class T, class W, class F>
void visit(Grads<T, W>& g, const Shape& s, F&& f) {
    f("u", g.u, {s.batch, s.length, s.heads, s.channels}, Need::optional);
    f("v", g.v, {s.batch, s.length, s.heads, s.value_dim}, Need::optional);
    visit_generator(g.generator, s, Need::optional, f);
}

template <class T, class W>
Shape shape_of(const Inputs<T, W>& in) {
    const bool dense = !in.generator.a && !in.generator.b;
    return {.dtype = dtype_of<T>,
            .batch = in.u.extent[0],
            .length = in.u.extent[1],
            .heads = in.u.extent[2],
            .channels = in.u.extent[3],
            .value_dim = in.v.extent[3],
            .planes = dense ? -1 : in.generator.a.extent[1],
            .sequences = in.cu_seqlens ? in.cu_seqlens.extent[0] - 1 : -1,
            .queries = in.u.extent[1],
            .query_heads = in.u.extent[2]};
}

/// Shapes of a decoding step, for its workspace.
template <class T, class W>
Shape shape_of(const Params<W>& params, const Cache<T>& cache, const Tokens<T>& tokens) {
    Shape s = shape_of(inputs_of(params, tokens));
    s.keys = attention::cache_rows(cache).capacity;
    return s;
}
template <class T, class W>
Shape shape_of(const Params<W>& params, const Cache<T>& cache, const Token<T>& token) {
    return shape_of(params, cache, tokens_of(token));
}
template <class T, class W>
Shape shape_of(const Params<W>& params, const State<acc_t<T>>&, const Token<T>& token) {
    return shape_of(inputs_of(params, tokens_of(token)));
}

/// What holds for every executor: sizes, null pointers, strides. Nothing is read but the views.
inline Status validate(const Shape& s) {
    if (s.packed() && s.batch != 1)
        return Status::error(StatusCode::invalid_argument, "u: batch is %lld, must be 1 with cu_seqlens", static_cast<long long>(s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("u: batch", s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("u: length", s.length));
    INTERSTATE_RETURN_IF_ERROR(check_size("u: heads", s.heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("u: channels", s.channels));
    INTERSTATE_RETURN_IF_ERROR(check_size("v: head dim", s.value_dim));
    if (!s.dense()) INTERSTATE_RETURN_IF_ERROR(check_size("a: planes", s.planes));
    return {};
}
/// Dense or in planes, and not both.
template <class W>
Status check_generator(const Generator<W>& g, const Shape& s) {
    if (g.P && (g.a || g.b)) return Status::error(StatusCode::invalid_argument, "P: is given beside a or b, must be null with planes");
    if (g.a ? !g.b : static_cast<bool>(g.b))
        return Status::error(StatusCode::invalid_argument, "%s: is missing, must be a view beside %s", g.a ? "b" : "a", g.a ? "a" : "b");
    if (!g.P && !g.a && s.heads > 0 && s.channels > 0)
        return Status::error(StatusCode::invalid_argument, "P: is missing, must be a view where a and b are none");
    return {};
}
template <class T, class W>
Status validate(const Inputs<T, W>& in) {
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_generator(in.generator, shape));
    INTERSTATE_RETURN_IF_ERROR(check_present(in, shape));
    INTERSTATE_RETURN_IF_ERROR(validate(shape));
    return check_tensors(in, shape);
}
inline Status check_lse(const Options& options, bool given) {
    if (!given || options.softmax()) return {};
    return Status::error(StatusCode::invalid_argument, "lse: must be null where the normalizer is not softmax");
}
template <class T, class W>
Status validate(const Options& options, const Inputs<T, W>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(in));
    INTERSTATE_RETURN_IF_ERROR(check_lse(options, static_cast<bool>(out.lse)));
    return check_tensors(out, shape_of(in));
}
template <class T, class W>
Status validate(const Options& options, const Inputs<T, W>& in, const Outputs<T>& out, const Upstream<T>& upstream,
                const Grads<T, W>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    INTERSTATE_RETURN_IF_ERROR(check_lse(options, static_cast<bool>(upstream.lse)));
    const Shape s = shape_of(in);
    if (options.softmax() && !out.lse && s.batch * s.length * s.heads > 0)
        return Status::error(StatusCode::invalid_argument, "lse: is null, must be forward's for backward of softmax");
    INTERSTATE_RETURN_IF_ERROR(check_tensors(upstream, s, "dout."));
    return check_tensors(grads, s, "grad.");
}

/// Of a step; the cache or the state is checked by the operator that it is of.
template <class T, class W>
Status validate(const Options& options, const Params<W>& params, const Cache<T>&, const Tokens<T>& tokens, const TokensOut<T>& out) {
    if (!options.softmax())
        return Status::error(StatusCode::invalid_argument,
                             "options.normalizer: must be softmax with a cache, identity and elu1 have a state");
    return validate(options, inputs_of(params, tokens), Outputs<T>{out.o, out.lse});
}
template <class T, class W>
Status validate(const Options& options, const Params<W>& params, const State<acc_t<T>>&, const Token<T>& token, const TokenOut<T>& out) {
    if (options.softmax())
        return Status::error(StatusCode::invalid_argument,
                             "options.normalizer: must be identity or elu1 with a state, softmax has a cache");
    return validate(options, inputs_of(params, tokens_of(token)), Outputs<T>{as_sequences(out.o), as_sequences(out.lse)});
}

/// softplus and its derivative (eq. 1), right for any argument.
INTERSTATE_HD inline double softplus(double x) { return (x > 0.0 ? x : 0.0) + std::log1p(std::exp(-std::abs(x))); }
INTERSTATE_HD inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

/// How verify, replay and the golden cases reach the operator.
struct Operator {
    static constexpr const char* name = "sd_attention";
    using Options = sd_attention::Options;
    template <class T, class W>
    using Inputs = sd_attention::Inputs<T, W>;
    template <class T>
    using Outputs = attention::Outputs<T>;
    template <class T>
    using Upstream = attention::Upstream<T>;
    template <class T, class W>
    using Grads = sd_attention::Grads<T, W>;
    template <class Exec>
    static constexpr bool has_backward = true;
    static bool has_output(const Options& options, std::string_view output) { return output != "lse" || options.softmax(); }
    template <class T, class W>
    static Status validate_inputs(const Options&, const Inputs<T, W>& in) {
        return validate(in);
    }
};

}  // namespace sd_attention
}  // namespace interstate::inline INTERSTATE_ABI
