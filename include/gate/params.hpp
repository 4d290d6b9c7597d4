// The output gate: what goes in, what comes out, and how it is checked. Equations: docs/ops/gate.md.
#pragma once

#include <string_view>

#include <interstate/executor.hpp>
#include <interstate/options.hpp>
#include <interstate/sequences.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace gate {

struct Options {};

/// Sets one option from its text, as tools/replay writes it: there is none.
inline Status set_option(Options&, std::string_view name, std::string_view value) {
    return unknown_option(name, value, "gate takes no options");
}

/// Sizes of one call. `sequences` counts packed sequences; -1 means a dense batch.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;      // B; 1 when packed
    Index length = 0;     // L
    Index heads = 0;      // H
    Index value_dim = 0;  // d
    Index sequences = -1; // S

    INTERSTATE_HD constexpr bool packed() const { return sequences >= 0; }
    INTERSTATE_HD constexpr Index rows() const { return batch * length; }
};

template <class T>
struct Inputs {
    View<const T, 4> o{};                      // (B, L, H, d)
    View<const T, 4> g{};                      // (B, L, H, d), before the sigmoid
    View<const std::int32_t, 1> cu_seqlens{};  // (S+1), optional: absent is a dense batch
};
template <class T>
struct Outputs {
    View<T, 4> y{};  // (B, L, H, d)
};
template <class T>
struct Upstream {
    View<const T, 4> y{};  // (B, L, H, d)
};
/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T>
struct Grads {
    View<T, 4> o{};
    View<T, 4> g{};
};

/// The gate has neither parameters nor a state; `step` takes these so that every operator is called alike.
struct Params {};
struct State {};
template <class T>
struct Token {
    View<const T, 3> o{};  // (B, H, d)
    View<const T, 3> g{};  // (B, H, d)
};
template <class T>
struct TokenOut {
    View<T, 3> y{};  // (B, H, d)
};

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class T, class F>
void visit(Inputs<T>& in, const Shape& s, F&& f) {
    f("o", in.o, {s.batch, s.length, s.heads, s.value_dim}, Need::required);
    f("g", in.g, {s.batch, s.length, s.heads, s.value_dim}, Need::required);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class T, class F>
void visit(Outputs<T>& out, const Shape& s, F&& f) {
    f("y", out.y, {s.batch, s.length, s.heads, s.value_dim}, Need::required);
}
template <class T, class F>
void visit(Upstream<T>& up, const Shape& s, F&& f) {
    f("y", up.y, {s.batch, s.length, s.heads, s.value_dim}, Need::required);
}
template <class T, class F>
void visit(Grads<T>& g, const Shape& s, F&& f) {
    f("o", g.o, {s.batch, s.length, s.heads, s.value_dim}, Need::optional);
    f("g", g.g, {s.batch, s.length, s.heads, s.value_dim}, Need::optional);
}

template <class T>
Shape shape_of(const Inputs<T>& in) {
    return {.dtype = dtype_of<T>,
            .batch = in.o.extent[0],
            .length = in.o.extent[1],
            .heads = in.o.extent[2],
            .value_dim = in.o.extent[3],
            .sequences = in.cu_seqlens ? in.cu_seqlens.extent[0] - 1 : -1};
}
/// Shape of a decoding step, for its workspace.
template <class T>
Shape shape_of(const Token<T>& token) {
    return {.dtype = dtype_of<T>,
            .batch = token.o.extent[0],
            .length = 1,
            .heads = token.o.extent[1],
            .value_dim = token.o.extent[2]};
}

/// What holds for every executor: sizes, null pointers, strides. Nothing is read but the views.
inline Status validate(const Shape& s) {
    INTERSTATE_RETURN_IF_ERROR(check_size("o: batch", s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("o: length", s.length));
    INTERSTATE_RETURN_IF_ERROR(check_size("o: heads", s.heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("o: value dim", s.value_dim));
    INTERSTATE_RETURN_IF_ERROR(check_size("o: batch times length", s.rows()));
    if (s.packed() && s.batch != 1)
        return Status::error(StatusCode::invalid_argument, "o: batch is %lld, must be 1 with cu_seqlens",
                             static_cast<long long>(s.batch));
    return {};
}
template <class T>
Status validate(const Inputs<T>& in) {
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    INTERSTATE_RETURN_IF_ERROR(check_present(in, Shape{}));
    INTERSTATE_RETURN_IF_ERROR(validate(shape_of(in)));
    return check_tensors(in, shape_of(in));
}
template <class T>
Status validate(const Inputs<T>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(in));
    return check_tensors(out, shape_of(in));
}
template <class T>
Status validate(const Inputs<T>& in, const Upstream<T>& upstream, const Grads<T>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(in));
    INTERSTATE_RETURN_IF_ERROR(check_tensors(upstream, shape_of(in), "dout."));
    return check_tensors(grads, shape_of(in), "grad.");
}

template <class T>
Status validate(const Token<T>& token, const TokenOut<T>& out) {
    return validate(Inputs<T>{.o = as_sequences(token.o), .g = as_sequences(token.g)}, Outputs<T>{as_sequences(out.y)});
}

/// How verify, replay and the golden cases reach the operator. It has no parameters, so P is not used.
struct Operator {
    static constexpr const char* name = "gate";
    using Options = gate::Options;
    template <class T, class P>
    using Inputs = gate::Inputs<T>;
    template <class T>
    using Outputs = gate::Outputs<T>;
    template <class T>
    using Upstream = gate::Upstream<T>;
    template <class T, class P>
    using Grads = gate::Grads<T>;
    template <class Exec>
    static constexpr bool has_backward = true;
    template <class T>
    static Status validate_inputs(const Options&, const gate::Inputs<T>& in) {
        return validate(in);
    }
};

}  // namespace gate
}  // namespace interstate::inline INTERSTATE_ABI
