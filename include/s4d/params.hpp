// S4D: what goes in, what comes out, and how it is checked. Equations: docs/ops/s4d.md.
#pragma once

#include <string_view>

#include <interstate/executor.hpp>
#include <interstate/options.hpp>
#include <interstate/sequences.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d {

/// How the continuous system becomes a recurrence (docs/ops/s4d.md, eq. 2).
enum class Discretization : std::uint8_t { zoh, bilinear };

/// How forward and backward are computed; all agree to rounding. `fft`: one long convolution. `scan`: the
/// recurrence, token by token. `chunked`: matrix products within chunks, the recurrence between them.
/// `automatic` takes the fastest that the executor has for a shape; `which_kernel` says which that is.
enum class Method : std::uint8_t { automatic, fft, scan, chunked };

constexpr const char* to_string(Method method) {
    switch (method) {
        case Method::automatic: return "automatic";
        case Method::fft: return "fft";
        case Method::scan: return "scan";
        case Method::chunked: return "chunked";
    }
    return "?";
}

struct Options {
    Discretization disc = Discretization::zoh;
    Method method = Method::automatic;
};

/// Sets one option from its text, as the golden cases and tools/replay write it.
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    if (name == "disc" && value == "zoh") return options.disc = Discretization::zoh, Status{};
    if (name == "disc" && value == "bilinear") return options.disc = Discretization::bilinear, Status{};
    if (name == "method")
        for (const Method method : {Method::automatic, Method::fft, Method::scan, Method::chunked})
            if (value == to_string(method)) return options.method = method, Status{};
    return unknown_option(name, value, "s4d takes disc=zoh|bilinear, method=automatic|fft|scan|chunked");
}

/// Sizes of one call. `sequences` counts packed sequences; -1 means a dense batch.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;      // B; 1 when packed
    Index length = 0;     // L
    Index channels = 0;   // H
    Index modes = 0;      // N, complex modes a channel (real state size 2N)
    Index sequences = -1; // S
    bool bidirectional = false;  // whether C_reverse is there

    INTERSTATE_HD constexpr bool packed() const { return sequences >= 0; }
    /// How many independent recurrences a channel runs: S, or B.
    INTERSTATE_HD constexpr Index states() const { return packed() ? sequences : batch; }
};

/// The continuous parameters (eq. 1), for input (const P) and, mutable, for gradients.
/// A = -exp(log_neg_re) + i im, dt = exp(log_dt).
template <class P, class Pc>
struct BasicParams {
    View<P, 1> log_dt{};      // (H)
    View<P, 2> log_neg_re{};  // (H, N)
    View<P, 2> im{};          // (H, N)
    View<Pc, 2> B{};          // (H, N) complex
    View<Pc, 2> C{};          // (H, N) complex
    View<P, 1> D{};           // (H), optional: absent is zero
    View<Pc, 2> C_reverse{};  // (H, N) complex, optional: makes the layer bidirectional (eq. 12)
};
template <class P>
using Params = BasicParams<const P, const complex<P>>;

/// T is the storage dtype of u and y; P (float or double) that of the parameters.
template <class T, class P = param_t<T>>
struct Inputs {
    View<const T, 3> u{};                        // (B, L, H)
    Params<P> params{};
    View<const complex<acc_t<T>>, 3> x0{};       // (B or S, H, N), optional: absent is zero
    View<const std::int32_t, 1> cu_seqlens{};    // (S+1), optional: absent is a dense batch
};

template <class T>
struct Outputs {
    View<T, 3> y{};                        // (B, L, H)
    View<complex<acc_t<T>>, 3> xT{};       // (B or S, H, N), optional
};

/// Gradients of the loss with respect to the outputs.
template <class T>
struct Upstream {
    View<const T, 3> y{};                        // (B, L, H)
    View<const complex<acc_t<T>>, 3> xT{};       // (B or S, H, N), optional: absent is zero
};

/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T, class P = param_t<T>>
struct Grads {
    View<T, 3> u{};
    BasicParams<P, complex<P>> params{};
    View<complex<acc_t<T>>, 3> x0{};
};

/// The recurrence in discrete form (eq. 2): `discretize` fills Abar and Bbar once, `step` reads them
/// for every token. They are float64 whatever P: a rounded Abar would drift over long decodes.
template <class P>
struct Discrete {
    View<complex<double>, 2> Abar{};  // (H, N)
    View<complex<double>, 2> Bbar{};  // (H, N)
    View<const complex<P>, 2> C{};    // (H, N)
    View<const P, 1> D{};             // (H), optional: absent is zero
};

/// What `generate_kernel` reads and its backward writes: sizes are those of K (H, L).
template <class A, class P>
Shape shape_of(const Params<P>& params, const View<A, 2>& K) {
    return {.dtype = dtype_of<A>,
            .batch = 1,
            .length = K.extent[1],
            .channels = K.extent[0],
            .modes = params.log_neg_re.extent[1]};
}

/// Decoding, one token for every batch row.
template <class A>
struct State {
    View<complex<A>, 3> x{};  // (B, H, N), updated in place
};
template <class T>
struct Token {
    View<const T, 2> u{};  // (B, H)
};
template <class T>
struct TokenOut {
    View<T, 2> y{};  // (B, H)
};

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
/// Validation, `verify` and tools/replay all stand on these walks.
template <class Ps, class F>
void visit_params(Ps& p, const Shape& s, Need need, F&& f) {
    f("log_dt", p.log_dt, {s.channels}, need);
    f("log_neg_re", p.log_neg_re, {s.channels, s.modes}, need);
    f("im", p.im, {s.channels, s.modes}, need);
    f("B", p.B, {s.channels, s.modes}, need);
    f("C", p.C, {s.channels, s.modes}, need);
    f("D", p.D, {s.channels}, Need::optional);
    f("C_reverse", p.C_reverse, {s.channels, s.modes}, Need::optional);
}
template <class T, class P, class F>
void visit(Inputs<T, P>& in, const Shape& s, F&& f) {
    f("u", in.u, {s.batch, s.length, s.channels}, Need::required);
    visit_params(in.params, s, Need::required, f);
    f("x0", in.x0, {s.states(), s.channels, s.modes}, Need::optional);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class T, class F>
void visit(Outputs<T>& out, const Shape& s, F&& f) {
    f("y", out.y, {s.batch, s.length, s.channels}, Need::required);
    f("xT", out.xT, {s.states(), s.channels, s.modes}, Need::optional);
}
template <class T, class F>
void visit(Upstream<T>& up, const Shape& s, F&& f) {
    f("y", up.y, {s.batch, s.length, s.channels}, Need::required);
    f("xT", up.xT, {s.states(), s.channels, s.modes}, Need::optional);
}
template <class T, class P, class F>
void visit(Grads<T, P>& g, const Shape& s, F&& f) {
    f("u", g.u, {s.batch, s.length, s.channels}, Need::optional);
    visit_params(g.params, s, Need::optional, f);
    f("x0", g.x0, {s.states(), s.channels, s.modes}, Need::optional);
}

template <class T, class P>
Shape shape_of(const Inputs<T, P>& in) {
    return {.dtype = dtype_of<T>,
            .batch = in.u.extent[0],
            .length = in.u.extent[1],
            .channels = in.u.extent[2],
            .modes = in.params.log_neg_re.extent[1],
            .sequences = in.cu_seqlens ? in.cu_seqlens.extent[0] - 1 : -1,
            .bidirectional = static_cast<bool>(in.params.C_reverse)};
}

/// Shape of a decoding step, for its workspace.
template <class T, class P>
Shape shape_of(const Discrete<P>& discrete, const Token<T>& token) {
    return {.dtype = dtype_of<T>,
            .batch = token.u.extent[0],
            .length = 1,
            .channels = token.u.extent[1],
            .modes = discrete.Abar.extent[1]};
}

/// What holds for every executor: sizes, null pointers, strides. Nothing is read but the views.
inline Status validate(const Shape& s) {
    if (s.packed() && s.batch != 1)
        return Status::error(StatusCode::invalid_argument, "u: batch is %lld, must be 1 with cu_seqlens",
                             static_cast<long long>(s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("u: batch", s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("u: length", s.length));
    INTERSTATE_RETURN_IF_ERROR(check_size("u: channels", s.channels));
    INTERSTATE_RETURN_IF_ERROR(check_size("log_neg_re: modes", s.modes));
    const double states = static_cast<double>(s.states()) * static_cast<double>(s.channels) * static_cast<double>(s.modes);
    if (states > 0x1p48)
        return Status::error(StatusCode::invalid_argument, "states, channels and modes are %lld, %lld and %lld, their "
                             "product must be at most 2^48", static_cast<long long>(s.states()),
                             static_cast<long long>(s.channels), static_cast<long long>(s.modes));
    return {};
}
template <class T, class P>
Status validate(const Inputs<T, P>& in) {
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    INTERSTATE_RETURN_IF_ERROR(check_present(in, Shape{}));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(validate(shape));
    return check_tensors(in, shape);
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

/// K (H, L) is f32 or f64; D and C_reverse are not read.
template <class A, class P>
Status validate(const Params<P>& params, const View<A, 2>& K) {
    static_assert(std::is_same_v<std::remove_const_t<A>, float> || std::is_same_v<std::remove_const_t<A>, double>,
                  "interstate: the kernel K is f32 or f64");
    const Shape shape = shape_of(params, K);
    INTERSTATE_RETURN_IF_ERROR(validate(shape));
    CheckTensors check;
    auto tensors = params;
    visit_params(tensors, shape, Need::required, check);
    check("K", K, {shape.channels, shape.length}, Need::required);
    return check.status;
}
template <class A, class P>
Status validate(const Params<P>& params, const View<const A, 2>& dK, const BasicParams<P, complex<P>>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, dK));
    CheckTensors check;
    auto tensors = grads;
    visit_params(tensors, shape_of(params, dK), Need::optional, check);
    return check.status;
}

template <class P>
Status validate(const Params<P>& params, const Discrete<P>& discrete) {
    if (params.C_reverse)
        return Status::error(StatusCode::unsupported,
                             "C_reverse: is given, must be absent: a bidirectional layer cannot go token by token");
    const Shape shape{.channels = params.log_neg_re.extent[0], .modes = params.log_neg_re.extent[1]};
    CheckTensors check;
    auto tensors = params;
    visit_params(tensors, shape, Need::required, check);
    check("Abar", discrete.Abar, {shape.channels, shape.modes}, Need::required);
    check("Bbar", discrete.Bbar, {shape.channels, shape.modes}, Need::required);
    return check.status;
}
template <class T, class P>
Status validate(const Discrete<P>& discrete, const State<acc_t<T>>& state, const Token<T>& token,
                const TokenOut<T>& out) {
    const Index B = token.u.extent[0], H = token.u.extent[1], N = discrete.Abar.extent[1];
    CheckTensors check;
    check("u", token.u, {B, H}, Need::required);
    check("y", out.y, {B, H}, Need::required);
    check("x", state.x, {B, H, N}, Need::required);
    check("Abar", discrete.Abar, {H, N}, Need::required);
    check("Bbar", discrete.Bbar, {H, N}, Need::required);
    check("C", discrete.C, {H, N}, Need::required);
    check("D", discrete.D, {H}, Need::optional);
    return check.status;
}

/// How verify, replay and the golden cases reach the operator.
struct Operator {
    static constexpr const char* name = "s4d";
    using Options = s4d::Options;
    template <class T, class P>
    using Inputs = s4d::Inputs<T, P>;
    template <class T>
    using Outputs = s4d::Outputs<T>;
    template <class T>
    using Upstream = s4d::Upstream<T>;
    template <class T, class P>
    using Grads = s4d::Grads<T, P>;
    template <class Exec>
    static constexpr bool has_backward = true;
    template <class T, class P>
    static Status validate_inputs(const Options&, const Inputs<T, P>& in) {
        return validate(in);
    }
};

}  // namespace s4d
}  // namespace interstate::inline INTERSTATE_ABI
