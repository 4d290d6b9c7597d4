// Linear attention: what goes in, what comes out, and how it is checked. Equations: docs/ops/linear_attention.md.
#pragma once

#include <cmath>
#include <string_view>

#include <interstate/executor.hpp>
#include <interstate/options.hpp>
#include <interstate/sequences.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention {

/// phi of eq. 1, element by element: x, or ELU(x) + 1.
enum class FeatureMap : std::uint8_t { identity, elu1 };
/// Whether a row is divided by its sum of weights, eq. 4; by_feature_map: with elu1, whose weights are positive.
enum class Normalized : std::uint8_t { by_feature_map, yes, no };

struct Options {
    FeatureMap feature_map = FeatureMap::identity;
    Normalized normalized = Normalized::by_feature_map;

    constexpr bool divides() const {
        return normalized == Normalized::yes || (normalized == Normalized::by_feature_map && feature_map == FeatureMap::elu1);
    }
};

/// Sets one option from its text, as the golden cases and tools/replay write it.
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    bool on = false;
    if (name == "feature_map" && value == "identity") return options.feature_map = FeatureMap::identity, Status{};
    if (name == "feature_map" && value == "elu1") return options.feature_map = FeatureMap::elu1, Status{};
    if (name == "normalized" && value == "by_feature_map") return options.normalized = Normalized::by_feature_map, Status{};
    if (name == "normalized" && parse_flag(value, on)) return options.normalized = on ? Normalized::yes : Normalized::no, Status{};
    return unknown_option(name, value, "linear_attention takes feature_map=identity|elu1, normalized=by_feature_map|true|false");
}

/// Sizes of one call. `sequences` counts packed sequences; -1 means a dense batch.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;        // B; 1 when packed
    Index length = 0;       // L
    Index query_heads = 0;  // Hq, a multiple of Hkv
    Index kv_heads = 0;     // Hkv; query head h reads the state of key/value head h / (Hq / Hkv)
    Index head_dim = 0;     // dk, of a query and a key
    Index value_dim = 0;    // dv
    Index sequences = -1;   // S

    INTERSTATE_HD constexpr bool packed() const { return sequences >= 0; }
    /// How many independent states a key/value head has: S, or B.
    INTERSTATE_HD constexpr Index states() const { return packed() ? sequences : batch; }
    INTERSTATE_HD constexpr Index group() const { return kv_heads > 0 ? query_heads / kv_heads : 1; }
};

template <class T>
struct Inputs {
    View<const T, 4> q{};                      // (B, L, Hq, dk)
    View<const T, 4> k{};                      // (B, L, Hkv, dk)
    View<const T, 4> v{};                      // (B, L, Hkv, dv)
    View<const acc_t<T>, 4> s0{};              // (B or S, Hkv, dk, dv), optional: absent is zero
    View<const acc_t<T>, 3> z0{};              // (B or S, Hkv, dk), normalized only, optional: absent is zero
    View<const std::int32_t, 1> cu_seqlens{};  // (S+1), optional: absent is a dense batch
};

/// The states behind the last token.
template <class T>
struct Outputs {
    View<T, 4> o{};          // (B, L, Hq, dv)
    View<acc_t<T>, 4> sT{};  // (B or S, Hkv, dk, dv), optional
    View<acc_t<T>, 3> zT{};  // (B or S, Hkv, dk), normalized only, optional
};

/// Gradients of the loss with respect to the outputs.
template <class T>
struct Upstream {
    View<const T, 4> o{};          // (B, L, Hq, dv)
    View<const acc_t<T>, 4> sT{};  // (B or S, Hkv, dk, dv), optional: absent is zero
    View<const acc_t<T>, 3> zT{};  // (B or S, Hkv, dk), normalized only, optional: absent is zero
};

/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T>
struct Grads {
    View<T, 4> q{};
    View<T, 4> k{};
    View<T, 4> v{};
    View<acc_t<T>, 4> s0{};
    View<acc_t<T>, 3> z0{};
};

/// Linear attention has no parameters; `step` takes this so that every operator is called alike.
struct Params {};

/// Decoding, one token for every batch row; updated in place.
template <class A>
struct State {
    View<A, 4> s{};  // (B, Hkv, dk, dv)
    View<A, 3> z{};  // (B, Hkv, dk), normalized only
};
template <class T>
struct Token {
    View<const T, 3> q{};  // (B, Hq, dk)
    View<const T, 3> k{};  // (B, Hkv, dk)
    View<const T, 3> v{};  // (B, Hkv, dv)
};
template <class T>
struct TokenOut {
    View<T, 3> o{};  // (B, Hq, dv)
};

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class Tensors, class F>
void visit_inputs(Tensors& t, const Shape& s, Need need, F&& f) {
    f("q", t.q, {s.batch, s.length, s.query_heads, s.head_dim}, need);
    f("k", t.k, {s.batch, s.length, s.kv_heads, s.head_dim}, need);
    f("v", t.v, {s.batch, s.length, s.kv_heads, s.value_dim}, need);
    f("s0", t.s0, {s.states(), s.kv_heads, s.head_dim, s.value_dim}, Need::optional);
    f("z0", t.z0, {s.states(), s.kv_heads, s.head_dim}, Need::optional);
}
template <class T, class F>
void visit(Inputs<T>& in, const Shape& s, F&& f) {
    visit_inputs(in, s, Need::required, f);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class Tensors, class F>
void visit_outputs(Tensors& t, const Shape& s, F&& f) {
    f("o", t.o, {s.batch, s.length, s.query_heads, s.value_dim}, Need::required);
    f("sT", t.sT, {s.states(), s.kv_heads, s.head_dim, s.value_dim}, Need::optional);
    f("zT", t.zT, {s.states(), s.kv_heads, s.head_dim}, Need::optional);
}
template <class T, class F>
void visit(Outputs<T>& out, const Shape& s, F&& f) {
    visit_outputs(out, s, f);
}
template <class T, class F>
void visit(Upstream<T>& up, const Shape& s, F&& f) {
    visit_outputs(up, s, f);
}
template <class T, class F>
void visit(Grads<T>& g, const Shape& s, F&& f) {
    visit_inputs(g, s, Need::optional, f);
}

template <class T>
Shape shape_of(const Inputs<T>& in) {
    return {.dtype = dtype_of<T>,
            .batch = in.q.extent[0],
            .length = in.q.extent[1],
            .query_heads = in.q.extent[2],
            .kv_heads = in.k.extent[2],
            .head_dim = in.q.extent[3],
            .value_dim = in.v.extent[3],
            .sequences = in.cu_seqlens ? in.cu_seqlens.extent[0] - 1 : -1};
}
/// Shape of a decoding step, for its workspace.
template <class T>
Shape shape_of(const State<acc_t<T>>&, const Token<T>& token) {
    return {.dtype = dtype_of<T>,
            .batch = token.q.extent[0],
            .length = 1,
            .query_heads = token.q.extent[1],
            .kv_heads = token.k.extent[1],
            .head_dim = token.q.extent[2],
            .value_dim = token.v.extent[2]};
}

/// What holds for every executor: sizes, null pointers, strides. Nothing is read but the views.
inline Status validate(const Shape& s) {
    const auto bad = [](const char* what, Index was, const char* must) {
        return Status::error(StatusCode::invalid_argument, "%s is %lld, must be %s", what, static_cast<long long>(was), must);
    };
    if (s.packed() && s.batch != 1) return bad("q: batch", s.batch, "1 with cu_seqlens");
    INTERSTATE_RETURN_IF_ERROR(check_size("q: batch", s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("q: length", s.length));
    INTERSTATE_RETURN_IF_ERROR(check_size("q: heads", s.query_heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("k: heads", s.kv_heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("q: head dim", s.head_dim));
    INTERSTATE_RETURN_IF_ERROR(check_size("v: head dim", s.value_dim));
    if (s.kv_heads == 0 ? s.query_heads != 0 : s.query_heads % s.kv_heads != 0)
        return bad("q: heads", s.query_heads, "a multiple of the heads of k");
    const double state = static_cast<double>(s.states()) * static_cast<double>(s.kv_heads) * static_cast<double>(s.head_dim) *
                         static_cast<double>(s.value_dim + 1);
    if (state > 0x1p48)
        return Status::error(StatusCode::invalid_argument, "the state's elements are %g, must be at most 2^48", state);
    return {};
}
inline Status check_sum(const Options& options, bool given) {
    if (!given || options.divides()) return {};
    return Status::error(StatusCode::invalid_argument, "z, z0, zT: are given, must be null where rows are not normalized");
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in) {
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    INTERSTATE_RETURN_IF_ERROR(check_present(in, Shape{}));
    INTERSTATE_RETURN_IF_ERROR(check_sum(options, static_cast<bool>(in.z0)));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(validate(shape));
    return check_tensors(in, shape);
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in));
    INTERSTATE_RETURN_IF_ERROR(check_sum(options, static_cast<bool>(out.zT)));
    return check_tensors(out, shape_of(in));
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in, const Upstream<T>& upstream, const Grads<T>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in));
    INTERSTATE_RETURN_IF_ERROR(check_sum(options, upstream.zT || grads.z0));
    INTERSTATE_RETURN_IF_ERROR(check_tensors(upstream, shape_of(in), "dout."));
    return check_tensors(grads, shape_of(in), "grad.");
}
template <class T>
Status validate(const Options& options, const State<acc_t<T>>& state, const Token<T>& token, const TokenOut<T>& out) {
    const Shape s = shape_of(state, token);
    const auto walk = [&](auto&& check) {
        check("q", token.q, {s.batch, s.query_heads, s.head_dim}, Need::required);
        check("k", token.k, {s.batch, s.kv_heads, s.head_dim}, Need::required);
        check("v", token.v, {s.batch, s.kv_heads, s.value_dim}, Need::required);
        check("s", state.s, {s.batch, s.kv_heads, s.head_dim, s.value_dim}, Need::required);
        check("z", state.z, {s.batch, s.kv_heads, s.head_dim}, options.divides() ? Need::required : Need::optional);
        check("o", out.o, {s.batch, s.query_heads, s.value_dim}, Need::required);
        return check.status;
    };
    INTERSTATE_RETURN_IF_ERROR(walk(CheckPresent{}));
    INTERSTATE_RETURN_IF_ERROR(validate(s));
    INTERSTATE_RETURN_IF_ERROR(check_sum(options, static_cast<bool>(state.z)));
    return walk(CheckTensors{});
}

/// phi(x) and its derivative (eq. 1).
INTERSTATE_HD inline double feature(FeatureMap map, double x) { return map == FeatureMap::identity ? x : x > 0.0 ? x + 1.0 : std::exp(x); }
INTERSTATE_HD inline double feature_slope(FeatureMap map, double x) { return map == FeatureMap::identity || x > 0.0 ? 1.0 : std::exp(x); }

/// 1 / w of eq. 5 to 9, and 0 where w is 0 or so small that this may be no number.
template <class A>
INTERSTATE_HD A inverse_weight(A w) {
    constexpr A smallest = sizeof(A) == sizeof(double) ? static_cast<A>(0x1p-1022) : static_cast<A>(0x1p-126);  // normal number
    return std::abs(w) < smallest ? A(0) : A(1) / w;
}

/// How verify, replay and the golden cases reach the operator. There are no parameters beside the storage dtype, so P is not used.
struct Operator {
    static constexpr const char* name = "linear_attention";
    using Options = linear_attention::Options;
    template <class T, class P>
    using Inputs = linear_attention::Inputs<T>;
    template <class T>
    using Outputs = linear_attention::Outputs<T>;
    template <class T>
    using Upstream = linear_attention::Upstream<T>;
    template <class T, class P>
    using Grads = linear_attention::Grads<T>;
    template <class Exec>
    static constexpr bool has_backward = true;
    static bool has_output(const Options& options, std::string_view output) { return output != "zT" || options.divides(); }
    template <class T>
    static Status validate_inputs(const Options& options, const linear_attention::Inputs<T>& in) {
        return validate(options, in);
    }
};

}  // namespace linear_attention
}  // namespace interstate::inline INTERSTATE_ABI
