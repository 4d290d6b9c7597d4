// The feature map of Interdomain Attention: what goes in, what comes out, and how it is checked. Equations:
// docs/ops/feature_map.md.
#pragma once

#include <cmath>
#include <string_view>

#include <interstate/executor.hpp>
#include <interstate/options.hpp>
#include <interstate/sequences.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace feature_map {

/// Which channels of a head turn together (eq. 2): 2i and 2i+1, or i and i + R/2.
enum class Rope : std::uint8_t { none, interleaved, half_split };

enum class Activation : std::uint8_t { none, silu };

constexpr const char* to_string(Rope rope) {
    switch (rope) {
        case Rope::none: return "none";
        case Rope::interleaved: return "interleaved";
        case Rope::half_split: return "half_split";
    }
    return "?";
}

/// Which stages run, in this order: convolution (wherever there is a weight for it), RoPE, activation, l2, RMSNorm.
struct Options {
    Rope rope = Rope::interleaved;
    double base = 10000.0;  // of RoPE's angles
    Activation activation = Activation::silu;
    bool l2 = true;     // every head of a token to length 1
    bool rms = false;   // RMSNorm of every head of a token, then scale and bias
    double eps = 1e-6;  // inside the square roots of both

    /// The published layer's queries, keys and values. The convolution of the first two is Params::conv_weight.
    static constexpr Options query() { return {}; }
    static constexpr Options key() {
        Options options;
        options.rms = true;
        return options;
    }
    static constexpr Options value() {
        Options options;
        options.rope = Rope::none;
        options.activation = Activation::none;
        options.l2 = false;
        options.rms = true;
        return options;
    }
};

/// Sets one option from its text, as tools/replay writes it.
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    double x = 0.0;
    bool on = false;
    if (name == "rope")
        for (const Rope rope : {Rope::none, Rope::interleaved, Rope::half_split})
            if (value == to_string(rope)) return options.rope = rope, Status{};
    if (name == "base" && parse_number(value, x)) return options.base = x, Status{};
    if (name == "activation" && value == "silu") return options.activation = Activation::silu, Status{};
    if (name == "activation" && value == "none") return options.activation = Activation::none, Status{};
    if (name == "l2" && parse_flag(value, on)) return options.l2 = on, Status{};
    if (name == "rms" && parse_flag(value, on)) return options.rms = on, Status{};
    if (name == "eps" && parse_number(value, x)) return options.eps = x, Status{};
    return unknown_option(name, value,
                          "feature_map takes rope=none|interleaved|half_split, base=X, "
                          "activation=none|silu, l2=true|false, rms=true|false, eps=X");
}

/// The two norms are one (eq. 8): every head of a token times 1 / sqrt(slope sum_r s[r]^2 + offset).
struct Norm {
    double slope = 0.0, offset = 1.0;
};
constexpr Norm norm_of(const Options& options, Index features) {
    const double mean = features > 0 ? 1.0 / static_cast<double>(features) : 0.0, eps = options.eps;
    if (options.l2 && options.rms) return {mean + eps, eps * eps};
    if (options.l2) return {1.0, eps};
    if (options.rms) return {mean, eps};
    return {};
}

/// Sizes of one call. `sequences` counts packed sequences; -1 means a dense batch.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;      // B; 1 when packed
    Index length = 0;     // L
    Index heads = 0;      // H
    Index features = 0;   // R, channels of a head
    Index taps = 0;       // of the convolution; 0 is none
    Index sequences = -1; // S

    INTERSTATE_HD constexpr bool packed() const { return sequences >= 0; }
    INTERSTATE_HD constexpr Index states() const { return packed() ? sequences : batch; }
    /// Tokens that the convolution looks back at.
    INTERSTATE_HD constexpr Index past() const { return taps > 1 ? taps - 1 : 0; }
    INTERSTATE_HD constexpr Index rows() const { return batch * length; }
};

inline constexpr Index largest_taps = 8;

template <class P>
struct BasicParams {
    View<P, 3> conv_weight{};  // (H, R, taps), the last tap is the token's own; optional: absent is no convolution
    View<P, 2> conv_bias{};    // (H, R), optional: absent is zero
    View<P, 1> scale{};        // (R), of RMSNorm, shared by the heads; optional: absent is one
    View<P, 2> bias{};         // (H, R), of RMSNorm; optional: absent is zero
};
template <class P>
using Params = BasicParams<const P>;

/// T is the storage dtype of x, y and the convolution's state; P (float or double) that of the parameters.
template <class T, class P = param_t<T>>
struct Inputs {
    View<const T, 4> x{};                      // (B, L, H, R)
    Params<P> params{};
    View<const T, 4> conv0{};                  // (B or S, taps-1, H, R), rows of x before the first; absent is zero
    View<const std::int32_t, 1> offset{};      // (B or S), the position of a sequence's first token; absent is zero
    View<const std::int32_t, 1> cu_seqlens{};  // (S+1), optional: absent is a dense batch
};

template <class T>
struct Outputs {
    View<T, 4> y{};      // (B, L, H, R)
    View<T, 4> convT{};  // (B or S, taps-1, H, R), the last rows of conv0 and x: the next call's conv0; optional
};

template <class T>
struct Upstream {
    View<const T, 4> y{};      // (B, L, H, R)
    View<const T, 4> convT{};  // (B or S, taps-1, H, R), optional: absent is zero
};

/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T, class P = param_t<T>>
struct Grads {
    View<T, 4> x{};
    BasicParams<P> params{};
    View<T, 4> conv0{};
};

/// Decoding, one token for every batch row: the convolution's state moves on by it, in place.
template <class T>
struct State {
    View<T, 4> conv{};  // (B, taps-1, H, R); may be null without a convolution
};
template <class T>
struct Token {
    View<const T, 3> x{};                    // (B, H, R)
    View<const std::int32_t, 1> position{};  // (B), of the tokens; absent is zero
};
template <class T>
struct TokenOut {
    View<T, 3> y{};  // (B, H, R)
};

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class Ps, class F>
void visit_params(Ps& p, const Shape& s, F&& f) {
    f("conv_weight", p.conv_weight, {s.heads, s.features, s.taps}, Need::optional);
    f("conv_bias", p.conv_bias, {s.heads, s.features}, Need::optional);
    f("scale", p.scale, {s.features}, Need::optional);
    f("bias", p.bias, {s.heads, s.features}, Need::optional);
}
template <class T, class P, class F>
void visit(Inputs<T, P>& in, const Shape& s, F&& f) {
    f("x", in.x, {s.batch, s.length, s.heads, s.features}, Need::required);
    visit_params(in.params, s, f);
    f("conv0", in.conv0, {s.states(), s.past(), s.heads, s.features}, Need::optional);
    f("offset", in.offset, {s.states()}, Need::optional);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class T, class F>
void visit(Outputs<T>& out, const Shape& s, F&& f) {
    f("y", out.y, {s.batch, s.length, s.heads, s.features}, Need::required);
    f("convT", out.convT, {s.states(), s.past(), s.heads, s.features}, Need::optional);
}
template <class T, class F>
void visit(Upstream<T>& up, const Shape& s, F&& f) {
    f("y", up.y, {s.batch, s.length, s.heads, s.features}, Need::required);
    f("convT", up.convT, {s.states(), s.past(), s.heads, s.features}, Need::optional);
}
template <class T, class P, class F>
void visit(Grads<T, P>& g, const Shape& s, F&& f) {
    f("x", g.x, {s.batch, s.length, s.heads, s.features}, Need::optional);
    visit_params(g.params, s, f);
    f("conv0", g.conv0, {s.states(), s.past(), s.heads, s.features}, Need::optional);
}

template <class T, class P>
Shape shape_of(const Inputs<T, P>& in) {
    return {.dtype = dtype_of<T>,
            .batch = in.x.extent[0],
            .length = in.x.extent[1],
            .heads = in.x.extent[2],
            .features = in.x.extent[3],
            .taps = in.params.conv_weight ? in.params.conv_weight.extent[2] : 0,
            .sequences = in.cu_seqlens ? in.cu_seqlens.extent[0] - 1 : -1};
}

/// Shape of a decoding step, for its workspace.
template <class T, class P>
Shape shape_of(const Params<P>& params, const Token<T>& token) {
    return {.dtype = dtype_of<T>,
            .batch = token.x.extent[0],
            .length = 1,
            .heads = token.x.extent[1],
            .features = token.x.extent[2],
            .taps = params.conv_weight ? params.conv_weight.extent[2] : 0};
}

/// What holds for every executor: options, sizes, null pointers, strides. Nothing is read but the views.
inline Status validate(const Options& options, const Shape& s) {
    INTERSTATE_RETURN_IF_ERROR(check_size("x: batch", s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("x: length", s.length));
    INTERSTATE_RETURN_IF_ERROR(check_size("x: heads", s.heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("x: features", s.features));
    INTERSTATE_RETURN_IF_ERROR(check_size("x: batch times length", s.rows()));
    if (s.packed() && s.batch != 1)
        return Status::error(StatusCode::invalid_argument, "x: batch is %lld, must be 1 with cu_seqlens",
                             static_cast<long long>(s.batch));
    if (s.taps < 0 || s.taps > largest_taps)
        return Status::error(StatusCode::invalid_argument, "conv_weight: taps are %lld, must be from 1 to %lld",
                             static_cast<long long>(s.taps), static_cast<long long>(largest_taps));
    if (options.rope != Rope::none && s.features % 2 != 0)
        return Status::error(StatusCode::invalid_argument, "x: features are %lld, must be even with rope = %s",
                             static_cast<long long>(s.features), to_string(options.rope));
    if (options.rope != Rope::none && !(options.base > 0.0 && std::isfinite(options.base)))
        return Status::error(StatusCode::invalid_argument, "options.base is %g, must be positive and finite", options.base);
    // The square of eps is added in float too (eq. 8).
    if ((options.l2 || options.rms) && !(options.eps >= 1e-15 && options.eps <= 1.0))
        return Status::error(StatusCode::invalid_argument, "options.eps is %g, must be from 1e-15 to 1", options.eps);
    return {};
}
/// Tensors of stages that do not run are errors, not ignored.
template <class P>
Status validate_params(const Options& options, const BasicParams<P>& p, bool convolves) {
    const auto unused = [](const char* name, const char* why) {
        return Status::error(StatusCode::invalid_argument, "%s: must be null %s", name, why);
    };
    if (p.conv_bias && !convolves) return unused("conv_bias", "without conv_weight");
    if (p.scale && !options.rms) return unused("scale", "with rms = false");
    if (p.bias && !options.rms) return unused("bias", "with rms = false");
    return {};
}
template <class T, class P>
Status validate(const Options& options, const Inputs<T, P>& in) {
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    INTERSTATE_RETURN_IF_ERROR(check_present(in, Shape{}));
    const Shape shape = shape_of(in);
    if (in.params.conv_weight && shape.taps == 0)
        return Status::error(StatusCode::invalid_argument, "conv_weight: taps are 0, must be from 1 to %lld",
                             static_cast<long long>(largest_taps));
    INTERSTATE_RETURN_IF_ERROR(validate(options, shape));
    INTERSTATE_RETURN_IF_ERROR(validate_params(options, in.params, shape.taps > 0));
    if (in.offset && options.rope == Rope::none)
        return Status::error(StatusCode::invalid_argument, "offset: must be null with rope = none");
    return check_tensors(in, shape);
}
template <class T, class P>
Status validate(const Options& options, const Inputs<T, P>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in));
    return check_tensors(out, shape_of(in));
}
template <class T, class P>
Status validate(const Options& options, const Inputs<T, P>& in, const Upstream<T>& upstream, const Grads<T, P>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in));
    const Shape shape = shape_of(in);
    if (grads.params.conv_weight && shape.taps == 0)
        return Status::error(StatusCode::invalid_argument, "grads.conv_weight: must be null without conv_weight");
    INTERSTATE_RETURN_IF_ERROR(validate_params(options, grads.params, shape.taps > 0));
    INTERSTATE_RETURN_IF_ERROR(check_tensors(upstream, shape, "dout."));
    return check_tensors(grads, shape, "grad.");
}

/// A decoding step as a call of `forward` with sequences of one token, whose convT is its conv0.
template <class T, class P>
Inputs<T, P> step_inputs(const Options& options, const Params<P>& params, const State<T>& state, const Token<T>& token) {
    return {.x = as_sequences(token.x),
            .params = params,
            .conv0 = state.conv,
            .offset = options.rope == Rope::none ? View<const std::int32_t, 1>{} : token.position};
}
template <class T>
Outputs<T> step_outputs(const State<T>& state, const TokenOut<T>& out) {
    return {.y = as_sequences(out.y), .convT = state.conv};
}
template <class T, class P>
Status validate(const Options& options, const Params<P>& params, const State<T>& state, const Token<T>& token,
                const TokenOut<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, step_inputs(options, params, state, token)));
    const Shape s = shape_of(params, token);
    CheckTensors check;
    check("state.conv", state.conv, {s.batch, s.past(), s.heads, s.features},
          s.past() > 0 ? Need::required : Need::optional);
    check("position", token.position, {s.batch}, Need::optional);
    check("y", out.y, {s.batch, s.heads, s.features}, Need::required);
    return check.status;
}

/// How verify, replay and the golden cases reach the operator.
struct Operator {
    static constexpr const char* name = "feature_map";
    using Options = feature_map::Options;
    template <class T, class P>
    using Inputs = feature_map::Inputs<T, P>;
    template <class T>
    using Outputs = feature_map::Outputs<T>;
    template <class T>
    using Upstream = feature_map::Upstream<T>;
    template <class T, class P>
    using Grads = feature_map::Grads<T, P>;
    template <class Exec>
    static constexpr bool has_backward = true;
    template <class T, class P>
    static Status validate_inputs(const Options& options, const Inputs<T, P>& in) {
        return validate(options, in);
    }
};

}  // namespace feature_map
}  // namespace interstate::inline INTERSTATE_ABI
