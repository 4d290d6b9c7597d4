// Attention: what goes in, what comes out, and how it is checked. Equations: docs/ops/attention.md.
#pragma once

#include <cmath>
#include <limits>
#include <string_view>

#include <interstate/executor.hpp>
#include <interstate/options.hpp>
#include <interstate/sequences.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {

/// How a row of scores becomes weights (docs/ops/attention.md, eq. 2 and 3).
enum class Score : std::uint8_t { softmax, sigmoid };

struct Options {
    bool causal = true;
    Index window = 0;    // keys a position sees on one side, itself included; 0 is no window
    double scale = 0.0;  // 0 is 1/sqrt(dh)
    Score score = Score::softmax;
    double bias = 0.0;   // sigmoid only; added to every score where Inputs::bias is absent

    constexpr bool windowed() const { return window > 0; }
};

inline double scale_of(const Options& options, Index dh) {
    return options.scale != 0.0 ? options.scale : 1.0 / std::sqrt(static_cast<double>(dh > 0 ? dh : 1));
}

/// Sets window, scale, score or bias of an operator that has them; false where the text names or says something else.
template <class AnyOptions>
bool set_score_option(AnyOptions& options, std::string_view name, std::string_view value) {
    double x = 0.0;
    if (name == "window" && value == "none") return options.window = 0, true;
    if (name == "window" && parse_number(value, x) && x >= 1 && x < 9e15 && x == std::floor(x))
        return options.window = static_cast<Index>(x), true;
    if (name == "scale" && parse_number(value, x)) return options.scale = x, true;
    if (name == "score" && value == "softmax") return options.score = Score::softmax, true;
    if (name == "score" && value == "sigmoid") return options.score = Score::sigmoid, true;
    if (name == "bias" && parse_number(value, x)) return options.bias = x, true;
    return false;
}

/// Sets one option from its text, as the golden cases and tools/replay write it.
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    bool on = false;
    if (name == "causal" && parse_flag(value, on)) return options.causal = on, Status{};
    if (set_score_option(options, name, value)) return {};
    return unknown_option(name, value,
                          "attention takes causal=true|false, window=none|N, scale=X, "
                          "score=softmax|sigmoid, bias=X");
}

/// Sizes of one call. `sequences` counts packed sequences; -1 means a dense batch.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;       // B; 1 when packed
    Index queries = 0;     // Lq; at most Lk: the last query stands at the last key
    Index keys = 0;        // Lk
    Index query_heads = 0; // Hq, a multiple of Hkv
    Index kv_heads = 0;    // Hkv; query head h reads key/value head h / (Hq / Hkv)
    Index head_dim = 0;    // dh
    Index value_dim = 0;   // dv
    Index sequences = -1;  // S

    INTERSTATE_HD constexpr bool packed() const { return sequences >= 0; }
    INTERSTATE_HD constexpr Index group() const { return kv_heads > 0 ? query_heads / kv_heads : 1; }
};

template <class T>
struct Inputs {
    View<const T, 4> q{};                      // (B, Lq, Hq, dh)
    View<const T, 4> k{};                      // (B, Lk, Hkv, dh)
    View<const T, 4> v{};                      // (B, Lk, Hkv, dv)
    View<const acc_t<T>, 1> bias{};            // (Hq), sigmoid only, optional
    View<const std::int32_t, 1> cu_seqlens{};  // (S+1), optional: absent is a dense batch; needs Lq = Lk
};

/// lse is the log-sum-exp of each row of scores (natural log), -inf for a row that reads nothing.
/// Softmax only; optional in forward, required by backward.
template <class T>
struct Outputs {
    View<T, 4> o{};           // (B, Lq, Hq, dv)
    View<acc_t<T>, 3> lse{};  // (B, Lq, Hq)
};

template <class T>
struct Upstream {
    View<const T, 4> o{};           // (B, Lq, Hq, dv)
    View<const acc_t<T>, 3> lse{};  // (B, Lq, Hq), optional: absent is zero
};

/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T>
struct Grads {
    View<T, 4> q{};
    View<T, 4> k{};
    View<T, 4> v{};
};

/// Attention has no parameters of its own; `step` takes this so that every operator is called alike.
struct Params {};

/// Decoding against a contiguous cache: `step` writes the token's key and value at row `length` and
/// the caller then counts it (state.length is the number of rows before the token).
template <class T>
struct State {
    View<T, 4> k{};      // (B, capacity, Hkv, dh)
    View<T, 4> v{};      // (B, capacity, Hkv, dv)
    Index length = 0;    // tokens already in the cache
};
template <class T>
struct Token {
    View<const T, 3> q{};            // (B, Hq, dh)
    View<const T, 3> k{};            // (B, Hkv, dh)
    View<const T, 3> v{};            // (B, Hkv, dv)
    View<const acc_t<T>, 1> bias{};  // (Hq), sigmoid only, optional: as in Inputs
};
template <class T>
struct TokenOut {
    View<T, 3> o{};  // (B, Hq, dv)
};

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class T, class F>
void visit(Inputs<T>& in, const Shape& s, F&& f) {
    f("q", in.q, {s.batch, s.queries, s.query_heads, s.head_dim}, Need::required);
    f("k", in.k, {s.batch, s.keys, s.kv_heads, s.head_dim}, Need::required);
    f("v", in.v, {s.batch, s.keys, s.kv_heads, s.value_dim}, Need::required);
    f("bias", in.bias, {s.query_heads}, Need::optional);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class T, class F>
void visit(Outputs<T>& out, const Shape& s, F&& f) {
    f("o", out.o, {s.batch, s.queries, s.query_heads, s.value_dim}, Need::required);
    f("lse", out.lse, {s.batch, s.queries, s.query_heads}, Need::optional);
}
template <class T, class F>
void visit(Upstream<T>& up, const Shape& s, F&& f) {
    f("o", up.o, {s.batch, s.queries, s.query_heads, s.value_dim}, Need::required);
    f("lse", up.lse, {s.batch, s.queries, s.query_heads}, Need::optional);
}
template <class T, class F>
void visit(Grads<T>& g, const Shape& s, F&& f) {
    f("q", g.q, {s.batch, s.queries, s.query_heads, s.head_dim}, Need::optional);
    f("k", g.k, {s.batch, s.keys, s.kv_heads, s.head_dim}, Need::optional);
    f("v", g.v, {s.batch, s.keys, s.kv_heads, s.value_dim}, Need::optional);
}

template <class T>
Shape shape_of(const Inputs<T>& in) {
    return {.dtype = dtype_of<T>,
            .batch = in.q.extent[0],
            .queries = in.q.extent[1],
            .keys = in.k.extent[1],
            .query_heads = in.q.extent[2],
            .kv_heads = in.k.extent[2],
            .head_dim = in.q.extent[3],
            .value_dim = in.v.extent[3],
            .sequences = in.cu_seqlens ? in.cu_seqlens.extent[0] - 1 : -1};
}

/// The keys that a query position reads: [begin, end) on the key axis of its sequence. `position` is
/// the query's own place on that axis (i + Lk - Lq), `keys` the length of the sequence.
constexpr RowRange keys_read(const Options& options, Index position, Index keys) {
    const Index window = options.window < keys ? options.window : keys;  // wider reads no more, and cannot overflow
    Index begin = 0;
    Index end = options.causal ? position + 1 : keys;
    if (options.windowed()) {
        if (position - window + 1 > begin) begin = position - window + 1;
        if (!options.causal && position + window < end) end = position + window;
    }
    if (end > keys) end = keys;
    return {begin, end > begin ? end : begin};
}

/// The other way round: positions [begin, end) that read a key.
constexpr RowRange positions_reading(const Options& options, Index key, Index keys) {
    const Index window = options.window < keys ? options.window : keys;
    Index begin = options.causal ? key : 0;
    Index end = keys;
    if (options.windowed()) {
        if (!options.causal && key - window + 1 > begin) begin = key - window + 1;
        if (key + window < end) end = key + window;
    }
    return {begin, end > begin ? end : begin};
}

/// What holds for every executor: options, sizes, null pointers, strides.
inline Status validate(const Options& options, const Shape& s) {
    const auto bad = [](const char* what, Index was, const char* must) {
        return Status::error(StatusCode::invalid_argument, "%s is %lld, must be %s", what,
                             static_cast<long long>(was), must);
    };
    if (options.window < 0) return bad("options.window", options.window, "at least 1, or 0 for none");
    const double largest = s.dtype == DType::f64 ? std::numeric_limits<double>::max()
                                                 : static_cast<double>(std::numeric_limits<float>::max());
    if (!(std::abs(options.scale) <= largest) || !(std::abs(options.bias) <= largest))
        return Status::error(StatusCode::invalid_argument,
                             "options.scale and options.bias are %g and %g, must be finite in the accumulator's dtype",
                             options.scale, options.bias);
    INTERSTATE_RETURN_IF_ERROR(check_size("q: batch", s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("q: length", s.queries));
    INTERSTATE_RETURN_IF_ERROR(check_size("k: length", s.keys));
    INTERSTATE_RETURN_IF_ERROR(check_size("q: heads", s.query_heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("k: heads", s.kv_heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("q: head dim", s.head_dim));
    INTERSTATE_RETURN_IF_ERROR(check_size("v: head dim", s.value_dim));
    if (s.kv_heads == 0 ? s.query_heads != 0 : s.query_heads % s.kv_heads != 0)
        return bad("q: heads", s.query_heads, "a multiple of the heads of k");
    if (s.queries > s.keys) return bad("q: length", s.queries, "at most the length of k");
    if (s.packed() && s.batch != 1) return bad("q: batch", s.batch, "1 with cu_seqlens");
    if (s.packed() && s.queries != s.keys) return bad("q: length", s.queries, "the length of k with cu_seqlens");
    return {};
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in) {
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    if (in.bias && options.score != Score::sigmoid)
        return Status::error(StatusCode::invalid_argument, "bias: must be null with score = softmax, which has none");
    INTERSTATE_RETURN_IF_ERROR(check_present(in, Shape{}));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(validate(options, shape));
    return check_tensors(in, shape);
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in));
    if (options.score == Score::sigmoid && out.lse)
        return Status::error(StatusCode::invalid_argument, "lse: must be null with score = sigmoid, which has none");
    return check_tensors(out, shape_of(in));
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in, const Outputs<T>& out, const Upstream<T>& upstream,
                const Grads<T>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape shape = shape_of(in);
    if (options.score == Score::softmax && !out.lse && shape.batch * shape.queries * shape.query_heads > 0)
        return Status::error(StatusCode::invalid_argument, "lse: is null, must be forward's for backward of softmax");
    INTERSTATE_RETURN_IF_ERROR(check_tensors(upstream, shape, "dout."));
    return check_tensors(grads, shape, "grad.");
}

/// Sizes of one decoding step: one query against `capacity` keys.
template <class T>
Shape shape_of(const State<T>& state, const Token<T>& token) {
    return {.dtype = dtype_of<T>,
            .batch = token.q.extent[0],
            .queries = 1,
            .keys = state.k.extent[1],
            .query_heads = token.q.extent[1],
            .kv_heads = token.k.extent[1],
            .head_dim = token.q.extent[2],
            .value_dim = token.v.extent[2]};
}
template <class T>
Status validate(const Options& options, const State<T>& state, const Token<T>& token, const TokenOut<T>& out) {
    const Shape s = shape_of(state, token);
    if (state.length < 0 || state.length >= s.keys)
        return Status::error(StatusCode::invalid_argument,
                             "state.length is %lld, must be at least 0 and below the %lld rows of the cache",
                             static_cast<long long>(state.length), static_cast<long long>(s.keys));
    INTERSTATE_RETURN_IF_ERROR(validate(options, s));
    if (token.bias && options.score != Score::sigmoid)
        return Status::error(StatusCode::invalid_argument, "bias: must be null with score = softmax, which has none");
    CheckTensors check;
    check("q", token.q, {s.batch, s.query_heads, s.head_dim}, Need::required);
    check("k", token.k, {s.batch, s.kv_heads, s.head_dim}, Need::required);
    check("v", token.v, {s.batch, s.kv_heads, s.value_dim}, Need::required);
    check("bias", token.bias, {s.query_heads}, Need::optional);
    check("state.k", state.k, {s.batch, s.keys, s.kv_heads, s.head_dim}, Need::required);
    check("state.v", state.v, {s.batch, s.keys, s.kv_heads, s.value_dim}, Need::required);
    check("o", out.o, {s.batch, s.query_heads, s.value_dim}, Need::required);
    return check.status;
}

/// How verify, replay and the golden cases reach the operator. Attention has no parameters beside
/// its storage dtype, so P is not used.
struct Operator {
    static constexpr const char* name = "attention";
    using Options = attention::Options;
    template <class T, class P>
    using Inputs = attention::Inputs<T>;
    template <class T>
    using Outputs = attention::Outputs<T>;
    template <class T>
    using Upstream = attention::Upstream<T>;
    template <class T, class P>
    using Grads = attention::Grads<T>;
    template <class Exec>
    static constexpr bool has_backward = true;
    static bool has_output(const Options& options, std::string_view output) {
        return output != "lse" || options.score == Score::softmax;
    }
    template <class T>
    static Status validate_inputs(const Options& options, const attention::Inputs<T>& in) {
        return validate(options, in);
    }
};

}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
