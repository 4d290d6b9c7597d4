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

/// Decoding: the cache that `step` adds the keys and values of new tokens to and reads, a sequence for each batch row. Row r of
/// sequence b is row r of batch row b, or, paged, row r % page_size of page block_table(b, r / page_size). Sequences may
/// share pages that they only read. The caller counts the tokens of a step when it is done.
template <class T>
struct State {
    View<T, 4> k{};                             // (B, capacity, Hkv, dh); paged: (pages, page_size, Hkv, dh)
    View<T, 4> v{};                             // (B, capacity, Hkv, dv); paged: (pages, page_size, Hkv, dv)
    Index length = 0;                           // tokens already in the cache, of every sequence
    View<const std::int32_t, 1> lengths{};      // (B), optional: of each sequence; `length` is then not read
    View<const std::int32_t, 2> block_table{};  // (B, pages of a sequence), optional: the cache is paged
};
/// One token for each batch row.
template <class T>
struct Token {
    View<const T, 3> q{};            // (B, Hq, dh)
    View<const T, 3> k{};            // (B, Hkv, dh)
    View<const T, 3> v{};            // (B, Hkv, dv)
    View<const acc_t<T>, 1> bias{};  // (Hq), sigmoid only, optional: as in Inputs
};
template <class T>
struct TokenOut {
    View<T, 3> o{};           // (B, Hq, dv)
    View<acc_t<T>, 2> lse{};  // (B, Hq), optional, softmax only
};
/// n tokens for each batch row, at rows length, length + 1, ...
template <class T>
struct Tokens {
    View<const T, 4> q{};            // (B, n, Hq, dh)
    View<const T, 4> k{};            // (B, n, Hkv, dh)
    View<const T, 4> v{};            // (B, n, Hkv, dv)
    View<const acc_t<T>, 1> bias{};  // (Hq), sigmoid only, optional
};
template <class T>
struct TokensOut {
    View<T, 4> o{};           // (B, n, Hq, dv)
    View<acc_t<T>, 3> lse{};  // (B, n, Hq), optional, softmax only
};
template <class T>
constexpr Tokens<T> tokens_of(const Token<T>& x) {
    return {as_sequences(x.q), as_sequences(x.k), as_sequences(x.v), x.bias};
}
template <class T>
constexpr TokensOut<T> tokens_of(const TokenOut<T>& x) {
    return {as_sequences(x.o), as_sequences(x.lse)};
}

/// Where the rows of a cache lie, of this operator's State or of a guest's.
struct CacheRows {
    struct Place {
        Index batch, row;  // indices of the views
    };
    View<const std::int32_t, 1> lengths;
    View<const std::int32_t, 2> block_table;
    Index length = 0, capacity = 0, page_size = 0, pages = 0;

    INTERSTATE_HD constexpr Index length_of(Index b) const { return lengths ? lengths(b) : length; }
    /// Whether a sequence of this length has room for more tokens.
    INTERSTATE_HD constexpr bool has_room(Index tokens_there, Index tokens) const {
        return tokens_there >= 0 && tokens_there <= capacity - tokens;
    }
    INTERSTATE_HD constexpr bool has_page(Index page) const { return page >= 0 && page < pages; }
    INTERSTATE_HD constexpr Place place(Index b, Index row) const {
        if (!block_table) return {b, row};
        const auto r = static_cast<std::uint32_t>(row), size = static_cast<std::uint32_t>(page_size);
        return {block_table(b, r / size), r % size};
    }
    /// How many rows from `row` on follow each other in memory.
    constexpr Index run_at(Index row) const { return block_table ? page_size - row % page_size : capacity - row; }
};
template <class AnyState>
constexpr CacheRows cache_rows(const AnyState& state) {
    CacheRows rows{state.lengths, state.block_table, state.length, state.k.extent[1], state.k.extent[1], state.k.extent[0]};
    if (state.block_table && __builtin_mul_overflow(state.block_table.extent[1], rows.page_size, &rows.capacity))
        rows.capacity = std::numeric_limits<Index>::max();  // which no size check lets pass
    return rows;
}

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class T, class F>
void visit(Inputs<T>& in, const Shape& s, F&& f) {
    f("q", in.q, {s.batch, s.queries, s.query_heads, s.head_dim}, Need::required);
    f("k", in.k, {s.batch, s.keys, s.kv_heads, s.head_dim}, Need::required);
    f("v", in.v, {s.batch, s.keys, s.kv_heads, s.value_dim}, Need::required);
    f("bias", in.bias, {s.query_heads}, Need::optional);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class T, class AnyShape, class F>
void visit(Outputs<T>& out, const AnyShape& s, F&& f) {
    f("o", out.o, {s.batch, s.queries, s.query_heads, s.value_dim}, Need::required);
    f("lse", out.lse, {s.batch, s.queries, s.query_heads}, Need::optional);
}
template <class T, class AnyShape, class F>
void visit(Upstream<T>& up, const AnyShape& s, F&& f) {
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

template <class T, class F>
void visit(Token<T>& x, const Shape& s, F&& f) {
    f("q", x.q, {s.batch, s.query_heads, s.head_dim}, Need::required);
    f("k", x.k, {s.batch, s.kv_heads, s.head_dim}, Need::required);
    f("v", x.v, {s.batch, s.kv_heads, s.value_dim}, Need::required);
    f("bias", x.bias, {s.query_heads}, Need::optional);
}
template <class T, class F>
void visit(Tokens<T>& x, const Shape& s, F&& f) {
    f("q", x.q, {s.batch, s.queries, s.query_heads, s.head_dim}, Need::required);
    f("k", x.k, {s.batch, s.queries, s.kv_heads, s.head_dim}, Need::required);
    f("v", x.v, {s.batch, s.queries, s.kv_heads, s.value_dim}, Need::required);
    f("bias", x.bias, {s.query_heads}, Need::optional);
}
template <class T, class AnyShape, class F>
void visit(TokenOut<T>& out, const AnyShape& s, F&& f) {
    f("o", out.o, {s.batch, s.query_heads, s.value_dim}, Need::required);
    f("lse", out.lse, {s.batch, s.query_heads}, Need::optional);
}
template <class T, class AnyShape, class F>
void visit(TokensOut<T>& out, const AnyShape& s, F&& f) {
    f("o", out.o, {s.batch, s.queries, s.query_heads, s.value_dim}, Need::required);
    f("lse", out.lse, {s.batch, s.queries, s.query_heads}, Need::optional);
}

/// Sizes of a decoding step: n queries against `capacity` keys.
template <class T>
Shape shape_of(const State<T>& state, const Tokens<T>& tokens) {
    return {.dtype = dtype_of<T>,
            .batch = tokens.q.extent[0],
            .queries = tokens.q.extent[1],
            .keys = cache_rows(state).capacity,
            .query_heads = tokens.q.extent[2],
            .kv_heads = tokens.k.extent[2],
            .head_dim = tokens.q.extent[3],
            .value_dim = tokens.v.extent[3]};
}
template <class T>
Shape shape_of(const State<T>& state, const Token<T>& token) {
    return shape_of(state, tokens_of(token));
}

/// What can be said of a cache without reading lengths and block table, which may be on a device.
template <class AnyState>
Status check_cache(const AnyState& state, Index batch, Index tokens) {
    INTERSTATE_RETURN_IF_ERROR(check_size("q: length", tokens));
    if (state.block_table) {
        INTERSTATE_RETURN_IF_ERROR(check_size("state.block_table: pages of a sequence", state.block_table.extent[1]));
        INTERSTATE_RETURN_IF_ERROR(check_size("state.k: pages", state.k.extent[0]));
        INTERSTATE_RETURN_IF_ERROR(check_size("state.k: rows of a page", state.k.extent[1]));
    }
    const CacheRows rows = cache_rows(state);
    INTERSTATE_RETURN_IF_ERROR(check_size("state.k: rows of a sequence", rows.capacity));
    if (!state.lengths && !rows.has_room(state.length, tokens))
        return Status::error(StatusCode::invalid_argument,
                             "state.length is %lld, must be at least 0 and leave %lld of the %lld rows of the cache",
                             static_cast<long long>(state.length), static_cast<long long>(tokens),
                             static_cast<long long>(rows.capacity));
    INTERSTATE_RETURN_IF_ERROR(check_view("state.lengths", state.lengths, {batch}, Need::optional));
    return check_view("state.block_table", state.block_table, {batch, state.block_table.extent[1]}, Need::optional);
}
/// The rest, on the host: lengths, and the pages of the rows that are read or written.
template <class AnyState>
Status check_rows(const Options& options, const AnyState& state, Index batch, Index tokens) {
    const CacheRows rows = cache_rows(state);
    for (Index b = 0; b < batch && tokens > 0; ++b) {
        const Index length = rows.length_of(b);
        if (!rows.has_room(length, tokens))
            return Status::error(StatusCode::invalid_argument,
                                 "state.lengths: element %lld is %lld, must be at least 0 and leave %lld of the %lld rows of the cache",
                                 static_cast<long long>(b), static_cast<long long>(length), static_cast<long long>(tokens),
                                 static_cast<long long>(rows.capacity));
        if (!state.block_table) continue;
        const Index first = keys_read(options, length, length + tokens).begin / rows.page_size;
        for (Index i = first; i <= (length + tokens - 1) / rows.page_size; ++i)
            if (const Index page = state.block_table(b, i); !rows.has_page(page))
                return Status::error(StatusCode::invalid_argument,
                                     "state.block_table: element (%lld, %lld) is %lld, must be at least 0 and below the %lld pages of the cache",
                                     static_cast<long long>(b), static_cast<long long>(i), static_cast<long long>(page),
                                     static_cast<long long>(rows.pages));
    }
    return {};
}

/// A step of one token (Token and TokenOut) or of n of them (Tokens and TokensOut).
template <class T, class AnyTokens, class AnyOut>
Status validate(const Options& options, const State<T>& state, const AnyTokens& tokens, const AnyOut& out) {
    const Shape s = shape_of(state, tokens);
    INTERSTATE_RETURN_IF_ERROR(check_cache(state, s.batch, s.queries));
    INTERSTATE_RETURN_IF_ERROR(validate(options, s));
    if (tokens.bias && options.score != Score::sigmoid)
        return Status::error(StatusCode::invalid_argument, "bias: must be null with score = softmax, which has none");
    if (out.lse && options.score == Score::sigmoid)
        return Status::error(StatusCode::invalid_argument, "lse: must be null with score = sigmoid, which has none");
    INTERSTATE_RETURN_IF_ERROR(check_tensors(tokens, s));
    CheckTensors check;
    const Index batch = state.block_table ? state.k.extent[0] : s.batch, rows = state.k.extent[1];
    check("state.k", state.k, {batch, rows, s.kv_heads, s.head_dim}, Need::required);
    check("state.v", state.v, {batch, rows, s.kv_heads, s.value_dim}, Need::required);
    INTERSTATE_RETURN_IF_ERROR(check.status);
    return check_tensors(out, s);
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
