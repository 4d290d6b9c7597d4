// SISA: what goes in, what comes out, and how it is checked. Equations: docs/ops/sisa.md.
#pragma once

#include <cmath>
#include <string_view>

#include <attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {

/// How decay between two tokens is formed: from their difference, at any length and causally, or as
/// published, from one clamped offset of the whole sequence (docs/ops/sisa.md, eq. 3, and 10 to 12).
enum class Mode : std::uint8_t { exact, published };

using attention::Score;

/// log_alpha at or below this is a hard reset and counts as this: its exponential is zero in every dtype, eq. 3.
inline constexpr double hard_reset = -1000.0;

struct Options {
    Mode mode = Mode::exact;
    double clamp = 11.0;  // published only: K of eq. 11
    Index window = 0;     // keys a position sees, itself included; 0 is no window
    double scale = 0.0;   // of q.k; 0 is 1/sqrt(dh)
    Score score = Score::softmax;
    double bias = 0.0;  // sigmoid only; added to every score where Inputs::bias is absent
};

/// The attention that SISA adds its importance to: causal, with the same options.
constexpr attention::Options attention_of(const Options& options) {
    return {.causal = true,
            .window = options.window,
            .scale = options.scale,
            .score = options.score,
            .bias = options.bias};
}

/// Sets one option from its text, as the golden cases and tools/replay write it.
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    double x = 0.0;
    if (name == "mode" && value == "exact") return options.mode = Mode::exact, Status{};
    if (name == "mode" && value == "published") return options.mode = Mode::published, Status{};
    if (name == "clamp" && parse_number(value, x)) return options.clamp = x, Status{};
    if (attention::set_score_option(options, name, value)) return {};
    return unknown_option(name, value,
                          "sisa takes mode=exact|published, clamp=X, window=none|N, scale=X, "
                          "score=softmax|sigmoid, bias=X");
}

/// Sizes of one call. `sequences` counts packed sequences; -1 means a dense batch.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;        // B; 1 when packed
    Index queries = 0;      // Lq; at most Lk: the last query stands at the last key
    Index keys = 0;         // Lk
    Index query_heads = 0;  // Hq, a multiple of Hkv
    Index kv_heads = 0;     // Hkv; query head h reads key/value head h / (Hq / Hkv)
    Index head_dim = 0;     // dh
    Index value_dim = 0;    // dv
    Index state_dim = 0;    // ds, even; 0 is plain attention
    Index sequences = -1;   // S

    INTERSTATE_HD constexpr bool packed() const { return sequences >= 0; }
    INTERSTATE_HD constexpr Index group() const { return kv_heads > 0 ? query_heads / kv_heads : 1; }
    /// Pairs of channels that turn together, ds / 2.
    INTERSTATE_HD constexpr Index pairs() const { return state_dim / 2; }
    /// Whether the tensors of the importance term must be there.
    constexpr Need importance() const { return state_dim > 0 ? Need::required : Need::optional; }
};
constexpr attention::Shape attention_of(const Shape& s) {
    return {.dtype = s.dtype,
            .batch = s.batch,
            .queries = s.queries,
            .keys = s.keys,
            .query_heads = s.query_heads,
            .kv_heads = s.kv_heads,
            .head_dim = s.head_dim,
            .value_dim = s.value_dim,
            .sequences = s.sequences};
}

/// T is the storage dtype of q, k, v, C and B; P (float or double) that of what shapes exponents and angles.
/// With ds = 0, C, B, log_alpha, theta and lam may be left out.
template <class T, class P = param_t<T>>
struct Inputs {
    View<const T, 4> q{};                      // (B, Lq, Hq, dh), RoPE already applied
    View<const T, 4> k{};                      // (B, Lk, Hkv, dh), RoPE already applied
    View<const T, 4> v{};                      // (B, Lk, Hkv, dv)
    View<const T, 4> C{};                      // (B, Lq, Hq, ds)
    View<const T, 4> B{};                      // (B, Lk, Hkv, ds)
    View<const P, 3> log_alpha{};              // (B, Lk, Hkv), at most 0; -1000 and below is a hard reset
    View<const P, 4> theta{};                  // (B, Lk, Hkv, ds/2), radians
    View<const P, 1> lam{};                    // (Hq), lambda
    View<const acc_t<T>, 1> bias{};            // (Hq), sigmoid only, optional
    View<const std::int32_t, 1> cu_seqlens{};  // (S+1), optional: absent is a dense batch; needs Lq = Lk
};
template <class T, class P>
attention::Inputs<T> attention_of(const Inputs<T, P>& in) {
    return {.q = in.q, .k = in.k, .v = in.v, .bias = in.bias, .cu_seqlens = in.cu_seqlens};
}

/// o (B, Lq, Hq, dv) and lse (B, Lq, Hq), and their gradients.
using attention::Outputs;
using attention::Upstream;

/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T, class P = param_t<T>>
struct Grads {
    View<T, 4> q{};
    View<T, 4> k{};
    View<T, 4> v{};
    View<T, 4> C{};
    View<T, 4> B{};
    View<P, 3> log_alpha{};
    View<P, 4> theta{};
    View<P, 1> lam{};
};

/// What `step` needs beside the token.
template <class P>
struct Params {
    View<const P, 1> lam{};  // (Hq), lambda
};

/// Decoding. `step` and `append` write tokens at rows `length` and on, and move g_last and Phi on by them;
/// the caller then counts the tokens. With length = 0 nothing here is read, so that a new state needs no
/// preparation. The recurrent values are float64 whatever T: they are sums over all of the past. With ds = 0
/// only k and v are needed. Lengths and pages are as in attention's State: paged, (pages, page_size, ...) for (B, capacity, ...).
template <class T>
struct State {
    View<T, 4> k{};                             // (B, capacity, Hkv, dh)
    View<T, 4> v{};                             // (B, capacity, Hkv, dv)
    View<T, 4> B{};                             // (B, capacity, Hkv, ds), rotated: R(Phi[j]) B[j]
    View<double, 3> g{};                        // (B, capacity, Hkv), the sum of log_alpha up to a row
    View<double, 2> g_last{};                   // (B, Hkv), g of the last token
    View<double, 3> Phi{};                      // (B, Hkv, ds/2), the sum of theta up to the last token
    Index length = 0;                           // tokens already in the cache, of every sequence
    View<const std::int32_t, 1> lengths{};      // (B), optional: of each sequence; `length` is then not read
    View<const std::int32_t, 2> block_table{};  // (B, pages of a sequence), optional: the cache is paged
};
/// One token for each batch row.
template <class T, class P = param_t<T>>
struct Token {
    View<const T, 3> q{};            // (B, Hq, dh)
    View<const T, 3> k{};            // (B, Hkv, dh)
    View<const T, 3> v{};            // (B, Hkv, dv)
    View<const T, 3> C{};            // (B, Hq, ds)
    View<const T, 3> B{};            // (B, Hkv, ds)
    View<const P, 2> log_alpha{};    // (B, Hkv)
    View<const P, 3> theta{};        // (B, Hkv, ds/2)
    View<const acc_t<T>, 1> bias{};  // (Hq), sigmoid only, optional: as in Inputs
};
/// n tokens for each batch row, at rows length, length + 1, ...
template <class T, class P = param_t<T>>
struct Tokens {
    View<const T, 4> q{};            // (B, n, Hq, dh)
    View<const T, 4> k{};            // (B, n, Hkv, dh)
    View<const T, 4> v{};            // (B, n, Hkv, dv)
    View<const T, 4> C{};            // (B, n, Hq, ds)
    View<const T, 4> B{};            // (B, n, Hkv, ds)
    View<const P, 3> log_alpha{};    // (B, n, Hkv)
    View<const P, 4> theta{};        // (B, n, Hkv, ds/2)
    View<const acc_t<T>, 1> bias{};  // (Hq), sigmoid only, optional
};
template <class T, class P>
constexpr Tokens<T, P> tokens_of(const Token<T, P>& x) {
    return {as_sequences(x.q), as_sequences(x.k),         as_sequences(x.v),     as_sequences(x.C),
            as_sequences(x.B), as_sequences(x.log_alpha), as_sequences(x.theta), x.bias};
}
/// o (B, Hq, dv) and lse (B, Hq) of a token; o (B, n, Hq, dv) and lse (B, n, Hq) of n.
using attention::TokenOut;
using attention::TokensOut;
using attention::tokens_of;
template <class T>
constexpr attention::State<T> attention_of(const State<T>& x) {
    return {x.k, x.v, x.length, x.lengths, x.block_table};
}
template <class T, class P>
constexpr attention::Token<T> attention_of(const Token<T, P>& x) {
    return {x.q, x.k, x.v, x.bias};
}
template <class T, class P>
constexpr attention::Tokens<T> attention_of(const Tokens<T, P>& x) {
    return {x.q, x.k, x.v, x.bias};
}
/// What `append` puts into the cache: n tokens of a prompt, as Inputs has them.
template <class T, class P = param_t<T>>
struct Keys {
    View<const T, 4> k{};          // (B, n, Hkv, dh)
    View<const T, 4> v{};          // (B, n, Hkv, dv)
    View<const T, 4> B{};          // (B, n, Hkv, ds)
    View<const P, 3> log_alpha{};  // (B, n, Hkv)
    View<const P, 4> theta{};      // (B, n, Hkv, ds/2)
};

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class Tensors, class F>
void visit_inputs(Tensors& t, const Shape& s, Need need, Need importance, F&& f) {
    f("q", t.q, {s.batch, s.queries, s.query_heads, s.head_dim}, need);
    f("k", t.k, {s.batch, s.keys, s.kv_heads, s.head_dim}, need);
    f("v", t.v, {s.batch, s.keys, s.kv_heads, s.value_dim}, need);
    f("C", t.C, {s.batch, s.queries, s.query_heads, s.state_dim}, importance);
    f("B", t.B, {s.batch, s.keys, s.kv_heads, s.state_dim}, importance);
    f("log_alpha", t.log_alpha, {s.batch, s.keys, s.kv_heads}, importance);
    f("theta", t.theta, {s.batch, s.keys, s.kv_heads, s.pairs()}, importance);
    f("lam", t.lam, {s.query_heads}, importance);
}
template <class T, class P, class F>
void visit(Inputs<T, P>& in, const Shape& s, F&& f) {
    visit_inputs(in, s, Need::required, s.importance(), f);
    f("bias", in.bias, {s.query_heads}, Need::optional);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class T, class P, class F>
void visit(Grads<T, P>& g, const Shape& s, F&& f) {
    visit_inputs(g, s, Need::optional, Need::optional, f);
}

/// ds: the larger of what C and B say, so that one of them cannot be forgotten, and where both were, what theta says.
template <class Tensors>
Index state_dim_of(const Tensors& x) {
    const Index channels = x.C.extent[3] > x.B.extent[3] ? x.C.extent[3] : x.B.extent[3];
    return channels != 0 ? channels : 2 * x.theta.extent[3];
}

template <class T, class P>
Shape shape_of(const Inputs<T, P>& in) {
    return {.dtype = dtype_of<T>,
            .batch = in.q.extent[0],
            .queries = in.q.extent[1],
            .keys = in.k.extent[1],
            .query_heads = in.q.extent[2],
            .kv_heads = in.k.extent[2],
            .head_dim = in.q.extent[3],
            .value_dim = in.v.extent[3],
            .state_dim = state_dim_of(in),
            .sequences = in.cu_seqlens ? in.cu_seqlens.extent[0] - 1 : -1};
}

/// What holds for every executor: options, sizes, null pointers, strides.
inline Status validate(const Options& options, const Shape& s) {
    INTERSTATE_RETURN_IF_ERROR(attention::validate(attention_of(options), attention_of(s)));
    if (!(options.clamp > 0.0) || !std::isfinite(options.clamp))
        return Status::error(StatusCode::invalid_argument, "options.clamp is %g, must be positive and finite",
                             options.clamp);
    INTERSTATE_RETURN_IF_ERROR(check_size("C: state dim", s.state_dim));
    if (s.state_dim % 2 != 0)
        return Status::error(StatusCode::invalid_argument, "C: state dim is %lld, must be even",
                             static_cast<long long>(s.state_dim));
    return {};
}
inline Status check_bias(const Options& options, bool given) {
    if (!given || options.score == Score::sigmoid) return {};
    return Status::error(StatusCode::invalid_argument,
                         "bias: must be null with score = softmax, which has none");
}
template <class T, class P>
Status validate(const Options& options, const Inputs<T, P>& in) {
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    INTERSTATE_RETURN_IF_ERROR(check_bias(options, static_cast<bool>(in.bias)));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_present(in, shape));
    INTERSTATE_RETURN_IF_ERROR(validate(options, shape));
    return check_tensors(in, shape);
}
template <class T, class P>
Status validate(const Options& options, const Inputs<T, P>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in));
    if (options.score == Score::sigmoid && out.lse)
        return Status::error(StatusCode::invalid_argument,
                             "lse: must be null with score = sigmoid, which has none");
    return check_tensors(out, shape_of(in));
}
template <class T, class P>
Status validate(const Options& options, const Inputs<T, P>& in, const Outputs<T>& out,
                const Upstream<T>& upstream, const Grads<T, P>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape shape = shape_of(in);
    if (options.score == Score::softmax && !out.lse && shape.batch * shape.queries * shape.query_heads > 0)
        return Status::error(StatusCode::invalid_argument,
                             "lse: is null, must be forward's for backward of softmax");
    INTERSTATE_RETURN_IF_ERROR(check_tensors(upstream, shape, "dout."));
    return check_tensors(grads, shape, "grad.");
}

template <class T, class P>
Keys<T, P> keys_of(const Tokens<T, P>& x) {
    return {x.k, x.v, x.B, x.log_alpha, x.theta};
}
template <class T, class P, class F>
void visit(Token<T, P>& x, const Shape& s, F&& f) {
    f("q", x.q, {s.batch, s.query_heads, s.head_dim}, Need::required);
    f("k", x.k, {s.batch, s.kv_heads, s.head_dim}, Need::required);
    f("v", x.v, {s.batch, s.kv_heads, s.value_dim}, Need::required);
    f("C", x.C, {s.batch, s.query_heads, s.state_dim}, s.importance());
    f("B", x.B, {s.batch, s.kv_heads, s.state_dim}, s.importance());
    f("log_alpha", x.log_alpha, {s.batch, s.kv_heads}, s.importance());
    f("theta", x.theta, {s.batch, s.kv_heads, s.pairs()}, s.importance());
    f("bias", x.bias, {s.query_heads}, Need::optional);
}
template <class T, class P, class F>
void visit(Keys<T, P>& x, const Shape& s, F&& f) {
    const Index n = x.k.extent[1];
    f("k", x.k, {s.batch, n, s.kv_heads, s.head_dim}, Need::required);
    f("v", x.v, {s.batch, n, s.kv_heads, s.value_dim}, Need::required);
    f("B", x.B, {s.batch, n, s.kv_heads, s.state_dim}, s.importance());
    f("log_alpha", x.log_alpha, {s.batch, n, s.kv_heads}, s.importance());
    f("theta", x.theta, {s.batch, n, s.kv_heads, s.pairs()}, s.importance());
}
template <class T, class P, class F>
void visit(Tokens<T, P>& x, const Shape& s, F&& f) {
    f("q", x.q, {s.batch, s.queries, s.query_heads, s.head_dim}, Need::required);
    f("k", x.k, {s.batch, s.queries, s.kv_heads, s.head_dim}, Need::required);
    f("v", x.v, {s.batch, s.queries, s.kv_heads, s.value_dim}, Need::required);
    f("C", x.C, {s.batch, s.queries, s.query_heads, s.state_dim}, s.importance());
    f("B", x.B, {s.batch, s.queries, s.kv_heads, s.state_dim}, s.importance());
    f("log_alpha", x.log_alpha, {s.batch, s.queries, s.kv_heads}, s.importance());
    f("theta", x.theta, {s.batch, s.queries, s.kv_heads, s.pairs()}, s.importance());
    f("bias", x.bias, {s.query_heads}, Need::optional);
}
/// Sizes of a decoding step: n queries against `capacity` keys.
template <class T, class P>
Shape shape_of(const State<T>& state, const Tokens<T, P>& tokens) {
    return {.dtype = dtype_of<T>,
            .batch = tokens.q.extent[0],
            .queries = tokens.q.extent[1],
            .keys = attention::cache_rows(state).capacity,
            .query_heads = tokens.q.extent[2],
            .kv_heads = tokens.k.extent[2],
            .head_dim = tokens.q.extent[3],
            .value_dim = tokens.v.extent[3],
            .state_dim = state_dim_of(tokens)};
}
template <class T, class P>
Shape shape_of(const State<T>& state, const Token<T, P>& token) {
    return shape_of(state, tokens_of(token));
}
/// Sizes of the cache that n tokens are appended to; there are no queries.
template <class T, class P>
Shape shape_of(const State<T>& state, const Keys<T, P>& keys) {
    return {.dtype = dtype_of<T>,
            .batch = keys.k.extent[0],
            .keys = attention::cache_rows(state).capacity,
            .kv_heads = keys.k.extent[2],
            .head_dim = keys.k.extent[3],
            .value_dim = keys.v.extent[3],
            .state_dim = keys.B.extent[3]};
}
/// The state, for n more tokens. Nothing but `exact` decodes: the offset of `published` needs the tokens to
/// come.
template <class T>
Status validate(const Options& options, const Shape& s, const State<T>& state, Index tokens) {
    if (options.mode == Mode::published)
        return Status::error(
            StatusCode::unsupported,
            "options.mode is published, must be exact to decode: the published offset is taken over "
            "the whole sequence, tokens to come included");
    INTERSTATE_RETURN_IF_ERROR(attention::check_cache(state, s.batch, tokens));
    INTERSTATE_RETURN_IF_ERROR(validate(options, s));
    CheckTensors check;
    const Index batch = state.block_table ? state.k.extent[0] : s.batch, rows = state.k.extent[1];
    check("state.k", state.k, {batch, rows, s.kv_heads, s.head_dim}, Need::required);
    check("state.v", state.v, {batch, rows, s.kv_heads, s.value_dim}, Need::required);
    check("state.B", state.B, {batch, rows, s.kv_heads, s.state_dim}, s.importance());
    check("state.g", state.g, {batch, rows, s.kv_heads}, s.importance());
    check("state.g_last", state.g_last, {s.batch, s.kv_heads}, s.importance());
    check("state.Phi", state.Phi, {s.batch, s.kv_heads, s.pairs()}, s.importance());
    return check.status;
}
/// A step of one token (Token and TokenOut) or of n of them (Tokens and TokensOut).
template <class T, class P, class AnyTokens, class AnyOut>
Status validate(const Options& options, const Params<P>& params, const State<T>& state,
                const AnyTokens& tokens, const AnyOut& out) {
    const Shape s = shape_of(state, tokens);
    INTERSTATE_RETURN_IF_ERROR(check_bias(options, static_cast<bool>(tokens.bias)));
    if (out.lse && options.score == Score::sigmoid)
        return Status::error(StatusCode::invalid_argument, "lse: must be null with score = sigmoid, which has none");
    INTERSTATE_RETURN_IF_ERROR(validate(options, s, state, s.queries));
    INTERSTATE_RETURN_IF_ERROR(check_tensors(tokens, s));
    INTERSTATE_RETURN_IF_ERROR(check_view("lam", params.lam, {s.query_heads}, s.importance()));
    return check_tensors(out, s);
}
template <class T, class P>
Status validate(const Options& options, const State<T>& state, const Keys<T, P>& keys) {
    const Shape s = shape_of(state, keys);
    INTERSTATE_RETURN_IF_ERROR(validate(options, s, state, keys.k.extent[1]));
    return check_tensors(keys, s);
}
/// Which rows `append` reads of a cache: none but its own.
inline constexpr attention::Options reads_nothing{.window = 1};

namespace detail {
/// Bytes of what rounding takes from o in 16-bit storage and softmax, kept for delta: a score gradient is p (dp - delta + dlse), and
/// where values are much alike dp - delta is far below delta, whose share of o's rounding is then most of its error.
inline std::size_t rest_size(const Options& options, const Shape& s) {
    const bool keep = options.score == Score::softmax && (s.dtype == DType::f16 || s.dtype == DType::bf16);
    return keep ? static_cast<std::size_t>(s.batch * s.query_heads * s.queries * s.value_dim) * sizeof(bf16) : 0;
}
}  // namespace detail

/// How verify, replay and the golden cases reach the operator.
struct Operator {
    static constexpr const char* name = "sisa";
    using Options = sisa::Options;
    template <class T, class P>
    using Inputs = sisa::Inputs<T, P>;
    template <class T>
    using Outputs = sisa::Outputs<T>;
    template <class T>
    using Upstream = sisa::Upstream<T>;
    template <class T, class P>
    using Grads = sisa::Grads<T, P>;
    template <class Exec>
    static constexpr bool has_backward = true;
    static bool has_output(const Options& options, std::string_view output) {
        return output != "lse" || options.score == Score::softmax;
    }
    template <class T, class P>
    static Status validate_inputs(const Options& options, const sisa::Inputs<T, P>& in) {
        return validate(options, in);
    }
};

}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
