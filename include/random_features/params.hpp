// Random Fourier features: what goes in, what comes out, and how it is checked. Equations: docs/ops/random_features.md.
#pragma once

#include <string_view>

#include <interstate/executor.hpp>
#include <interstate/options.hpp>
#include <interstate/sequences.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace random_features {

struct Options {};

/// Sets one option from its text, as tools/replay writes it: there is none.
inline Status set_option(Options&, std::string_view name, std::string_view value) {
    return unknown_option(name, value, "random_features takes no options");
}

/// Sizes of one call. `sequences` counts packed sequences; -1 means a dense batch.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;         // B; 1 when packed
    Index length = 0;        // L
    Index heads = 0;         // H
    Index head_dim = 0;      // dh
    Index frequencies = 0;   // F; features are R = 2 F
    Index weight_heads = 0;  // H, or 1: all heads have the same frequencies
    Index sequences = -1;    // S

    INTERSTATE_HD constexpr bool packed() const { return sequences >= 0; }
    INTERSTATE_HD constexpr Index rows() const { return batch * length; }
};

/// T is the storage dtype of x and y; P (float or double) that of the frequencies.
template <class P>
struct BasicParams {
    View<P, 3> W{};  // (H or 1, F, dh)
};
template <class P>
using Params = BasicParams<const P>;

template <class T, class P = param_t<T>>
struct Inputs {
    View<const T, 4> x{};                      // (B, L, H, dh)
    Params<P> params{};
    View<const std::int32_t, 1> cu_seqlens{};  // (S+1), optional: absent is a dense batch
};
template <class T>
struct Outputs {
    View<T, 4> y{};  // (B, L, H, 2 F): cosines, then sines
};
template <class T>
struct Upstream {
    View<const T, 4> y{};  // (B, L, H, 2 F)
};
/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T, class P = param_t<T>>
struct Grads {
    View<T, 4> x{};
    BasicParams<P> params{};
};

/// There is no state; `step` takes this so that every operator is called alike.
struct State {};
template <class T>
struct Token {
    View<const T, 3> x{};  // (B, H, dh)
};
template <class T>
struct TokenOut {
    View<T, 3> y{};  // (B, H, 2 F)
};

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class T, class P, class F>
void visit(Inputs<T, P>& in, const Shape& s, F&& f) {
    f("x", in.x, {s.batch, s.length, s.heads, s.head_dim}, Need::required);
    f("W", in.params.W, {s.weight_heads, s.frequencies, s.head_dim}, Need::required);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class T, class F>
void visit(Outputs<T>& out, const Shape& s, F&& f) {
    f("y", out.y, {s.batch, s.length, s.heads, 2 * s.frequencies}, Need::required);
}
template <class T, class F>
void visit(Upstream<T>& up, const Shape& s, F&& f) {
    f("y", up.y, {s.batch, s.length, s.heads, 2 * s.frequencies}, Need::required);
}
template <class T, class P, class F>
void visit(Grads<T, P>& g, const Shape& s, F&& f) {
    f("x", g.x, {s.batch, s.length, s.heads, s.head_dim}, Need::optional);
    f("W", g.params.W, {s.weight_heads, s.frequencies, s.head_dim}, Need::optional);
}

template <class T, class P>
Shape shape_of(const Inputs<T, P>& in) {
    return {.dtype = dtype_of<T>,
            .batch = in.x.extent[0],
            .length = in.x.extent[1],
            .heads = in.x.extent[2],
            .head_dim = in.x.extent[3],
            .frequencies = in.params.W.extent[1],
            .weight_heads = in.params.W.extent[0],
            .sequences = in.cu_seqlens ? in.cu_seqlens.extent[0] - 1 : -1};
}
/// Shape of a decoding step, for its workspace.
template <class T, class P>
Shape shape_of(const Params<P>& params, const Token<T>& token) {
    return {.dtype = dtype_of<T>,
            .batch = token.x.extent[0],
            .length = 1,
            .heads = token.x.extent[1],
            .head_dim = token.x.extent[2],
            .frequencies = params.W.extent[1],
            .weight_heads = params.W.extent[0]};
}

/// What holds for every executor: sizes, null pointers, strides. Nothing is read but the views.
inline Status validate(const Shape& s) {
    INTERSTATE_RETURN_IF_ERROR(check_size("x: batch", s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("x: length", s.length));
    INTERSTATE_RETURN_IF_ERROR(check_size("x: heads", s.heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("x: head dim", s.head_dim));
    INTERSTATE_RETURN_IF_ERROR(check_size("W: frequencies", s.frequencies));
    INTERSTATE_RETURN_IF_ERROR(check_size("x: batch times length", s.rows()));
    if (s.weight_heads != 1 && s.weight_heads != s.heads)
        return Status::error(StatusCode::invalid_argument, "W: heads are %lld, must be 1 or the %lld of x",
                             static_cast<long long>(s.weight_heads), static_cast<long long>(s.heads));
    if (s.packed() && s.batch != 1)
        return Status::error(StatusCode::invalid_argument, "x: batch is %lld, must be 1 with cu_seqlens",
                             static_cast<long long>(s.batch));
    return {};
}
template <class T, class P>
Status validate(const Inputs<T, P>& in) {
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    INTERSTATE_RETURN_IF_ERROR(check_present(in, Shape{}));
    INTERSTATE_RETURN_IF_ERROR(validate(shape_of(in)));
    return check_tensors(in, shape_of(in));
}
template <class T, class P>
Status validate(const Inputs<T, P>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(in));
    return check_tensors(out, shape_of(in));
}
template <class T, class P>
Status validate(const Inputs<T, P>& in, const Upstream<T>& upstream, const Grads<T, P>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(in));
    INTERSTATE_RETURN_IF_ERROR(check_tensors(upstream, shape_of(in), "dout."));
    return check_tensors(grads, shape_of(in), "grad.");
}

template <class T, class P>
Status validate(const Params<P>& params, const Token<T>& token, const TokenOut<T>& out) {
    return validate(Inputs<T, P>{.x = as_sequences(token.x), .params = params}, Outputs<T>{as_sequences(out.y)});
}

/// How verify, replay and the golden cases reach the operator.
struct Operator {
    static constexpr const char* name = "random_features";
    using Options = random_features::Options;
    template <class T, class P>
    using Inputs = random_features::Inputs<T, P>;
    template <class T>
    using Outputs = random_features::Outputs<T>;
    template <class T>
    using Upstream = random_features::Upstream<T>;
    template <class T, class P>
    using Grads = random_features::Grads<T, P>;
    template <class Exec>
    static constexpr bool has_backward = true;
    template <class T, class P>
    static Status validate_inputs(const Options&, const random_features::Inputs<T, P>& in) {
        return validate(in);
    }
};

}  // namespace random_features
}  // namespace interstate::inline INTERSTATE_ABI
