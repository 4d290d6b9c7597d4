// Interdomain Attention: what goes in, what comes out, and how it is checked. Equations: docs/ops/interdomain.md.
#pragma once

#include <string_view>

#include <s4d/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain {

/// How the continuous system becomes a recurrence (docs/ops/interdomain.md, eq. 2).
enum class Discretization : std::uint8_t { zoh, raw };

/// Which real number is read from the complex coefficients (eq. 4 and 5).
enum class Readout : std::uint8_t { complex_product, real_parts };

/// Whether o is divided by the same readout of a channel of ones (eq. 6).
enum class Normalizer : std::uint8_t { none, nadaraya_watson };

/// How forward and backward are computed; all agree to rounding. `chunked`: matrix products within chunks and
/// with the states between them. `scan`: token by token. `parallel_scan`: chunks, whose states come from an
/// associative scan. `fft`: convolutions mode by mode, for study. `automatic` takes the fastest that the executor
/// has for a shape; `which_kernel` says which that is.
enum class Method : std::uint8_t { automatic, chunked, scan, parallel_scan, fft };

constexpr const char* to_string(Method method) {
    switch (method) {
        case Method::automatic: return "automatic";
        case Method::chunked: return "chunked";
        case Method::scan: return "scan";
        case Method::parallel_scan: return "parallel_scan";
        case Method::fft: return "fft";
    }
    return "?";
}

struct Options {
    Discretization disc = Discretization::zoh;
    Readout readout = Readout::complex_product;
    Normalizer normalizer = Normalizer::none;
    Method method = Method::automatic;

    INTERSTATE_HD constexpr bool normalized() const { return normalizer == Normalizer::nadaraya_watson; }
};

/// Sets one option from its text, as the golden cases and tools/replay write it.
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    if (name == "disc" && value == "zoh") return options.disc = Discretization::zoh, Status{};
    if (name == "disc" && value == "raw") return options.disc = Discretization::raw, Status{};
    if (name == "readout" && value == "complex_product") return options.readout = Readout::complex_product, Status{};
    if (name == "readout" && value == "real_parts") return options.readout = Readout::real_parts, Status{};
    if (name == "normalizer" && value == "none") return options.normalizer = Normalizer::none, Status{};
    if (name == "normalizer" && value == "nadaraya_watson")
        return options.normalizer = Normalizer::nadaraya_watson, Status{};
    if (name == "method")
        for (const Method method :
             {Method::automatic, Method::chunked, Method::scan, Method::parallel_scan, Method::fft})
            if (value == to_string(method)) return options.method = method, Status{};
    return unknown_option(name, value,
                          "interdomain takes disc=zoh|raw, readout=complex_product|real_parts, "
                          "normalizer=none|nadaraya_watson, method=automatic|chunked|scan|parallel_scan|fft");
}

/// Sizes of one call. `sequences` counts packed sequences; -1 means a dense batch.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;        // B; 1 when packed
    Index length = 0;       // L
    Index query_heads = 0;  // Hq, a multiple of Hkv
    Index kv_heads = 0;     // Hkv; query head h reads the state of key/value head h / (Hq / Hkv)
    Index features = 0;     // R, of a query and a key
    Index value_dim = 0;    // d
    Index modes = 0;        // M, basis functions a key/value head
    Index sequences = -1;   // S

    INTERSTATE_HD constexpr bool packed() const { return sequences >= 0; }
    /// How many independent recurrences a key/value head runs: S, or B.
    INTERSTATE_HD constexpr Index states() const { return packed() ? sequences : batch; }
    INTERSTATE_HD constexpr Index group() const { return kv_heads > 0 ? query_heads / kv_heads : 1; }
    /// Columns of a state: those of keys, then those of values.
    INTERSTATE_HD constexpr Index columns() const { return features + value_dim; }
};

/// The continuous parameters (eq. 1 and 4), for input (const P) and, mutable, for gradients.
/// A = -exp(log_neg_re) + i im, dt = exp(log_dt).
template <class P, class Pc>
struct BasicParams {
    View<P, 1> log_dt{};      // (Hkv)
    View<P, 2> log_neg_re{};  // (Hkv, M)
    View<P, 2> im{};          // (Hkv, M)
    View<Pc, 2> B{};          // (Hkv, M) complex
    View<Pc, 3> C{};          // (Hkv, M, M) complex
};
template <class P>
using Params = BasicParams<const P, const complex<P>>;

/// T is the storage dtype of q, k, v and o; P (float or double) that of the parameters.
template <class T, class P = param_t<T>>
struct Inputs {
    View<const T, 4> q{};                        // (B, L, Hq, R), query features
    View<const T, 4> k{};                        // (B, L, Hkv, R), key features
    View<const T, 4> v{};                        // (B, L, Hkv, d)
    Params<P> params{};
    View<const complex<acc_t<T>>, 4> x0{};       // (B or S, Hkv, M, R + d), optional: absent is zero
    View<const complex<acc_t<T>>, 3> eta0{};     // (B or S, Hkv, M), nadaraya_watson only, optional: absent is zero
    View<const std::int32_t, 1> cu_seqlens{};    // (S+1), optional: absent is a dense batch
};

template <class T>
struct Outputs {
    View<T, 4> o{};                        // (B, L, Hq, d)
    View<complex<acc_t<T>>, 4> xT{};       // (B or S, Hkv, M, R + d), optional
    View<complex<acc_t<T>>, 3> etaT{};     // (B or S, Hkv, M), nadaraya_watson only, optional
};

/// Gradients of the loss with respect to the outputs.
template <class T>
struct Upstream {
    View<const T, 4> o{};                        // (B, L, Hq, d)
    View<const complex<acc_t<T>>, 4> xT{};       // (B or S, Hkv, M, R + d), optional: absent is zero
    View<const complex<acc_t<T>>, 3> etaT{};     // (B or S, Hkv, M), optional: absent is zero
};

/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T, class P = param_t<T>>
struct Grads {
    View<T, 4> q{};
    View<T, 4> k{};
    View<T, 4> v{};
    BasicParams<P, complex<P>> params{};
    View<complex<acc_t<T>>, 4> x0{};
    View<complex<acc_t<T>>, 3> eta0{};
};

/// The recurrence in discrete form (eq. 2): `discretize` fills Lam and Bbar once, `step` reads them for every
/// token. They are float64 whatever P: a rounded Lam would drift over long decodes.
template <class P>
struct Discrete {
    View<complex<double>, 2> Lam{};   // (Hkv, M)
    View<complex<double>, 2> Bbar{};  // (Hkv, M)
    View<const complex<P>, 3> C{};    // (Hkv, M, M)
};

/// Decoding, one token for every batch row.
template <class A>
struct State {
    View<complex<A>, 4> x{};    // (B, Hkv, M, R + d), updated in place
    View<complex<A>, 3> eta{};  // (B, Hkv, M), nadaraya_watson only, updated in place
};
template <class T>
struct Token {
    View<const T, 3> q{};  // (B, Hq, R)
    View<const T, 3> k{};  // (B, Hkv, R)
    View<const T, 3> v{};  // (B, Hkv, d)
};
template <class T>
struct TokenOut {
    View<T, 3> o{};  // (B, Hq, d)
};

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class Ps, class F>
void visit_params(Ps& p, const Shape& s, Need need, F&& f) {
    f("log_dt", p.log_dt, {s.kv_heads}, need);
    f("log_neg_re", p.log_neg_re, {s.kv_heads, s.modes}, need);
    f("im", p.im, {s.kv_heads, s.modes}, need);
    f("B", p.B, {s.kv_heads, s.modes}, need);
    f("C", p.C, {s.kv_heads, s.modes, s.modes}, need);
}
template <class Tensors, class F>
void visit_qkv(Tensors& t, const Shape& s, Need need, F&& f) {
    f("q", t.q, {s.batch, s.length, s.query_heads, s.features}, need);
    f("k", t.k, {s.batch, s.length, s.kv_heads, s.features}, need);
    f("v", t.v, {s.batch, s.length, s.kv_heads, s.value_dim}, need);
}
template <class T, class P, class F>
void visit(Inputs<T, P>& in, const Shape& s, F&& f) {
    visit_qkv(in, s, Need::required, f);
    visit_params(in.params, s, Need::required, f);
    f("x0", in.x0, {s.states(), s.kv_heads, s.modes, s.columns()}, Need::optional);
    f("eta0", in.eta0, {s.states(), s.kv_heads, s.modes}, Need::optional);
    f("cu_seqlens", in.cu_seqlens, {s.sequences + 1}, s.packed() ? Need::required : Need::optional);
}
template <class Tensors, class F>
void visit_outputs(Tensors& t, const Shape& s, F&& f) {
    f("o", t.o, {s.batch, s.length, s.query_heads, s.value_dim}, Need::required);
    f("xT", t.xT, {s.states(), s.kv_heads, s.modes, s.columns()}, Need::optional);
    f("etaT", t.etaT, {s.states(), s.kv_heads, s.modes}, Need::optional);
}
template <class T, class F>
void visit(Outputs<T>& out, const Shape& s, F&& f) {
    visit_outputs(out, s, f);
}
template <class T, class F>
void visit(Upstream<T>& up, const Shape& s, F&& f) {
    visit_outputs(up, s, f);
}
template <class T, class P, class F>
void visit(Grads<T, P>& g, const Shape& s, F&& f) {
    visit_qkv(g, s, Need::optional, f);
    visit_params(g.params, s, Need::optional, f);
    f("x0", g.x0, {s.states(), s.kv_heads, s.modes, s.columns()}, Need::optional);
    f("eta0", g.eta0, {s.states(), s.kv_heads, s.modes}, Need::optional);
}

template <class T, class P>
Shape shape_of(const Inputs<T, P>& in) {
    return {.dtype = dtype_of<T>,
            .batch = in.q.extent[0],
            .length = in.q.extent[1],
            .query_heads = in.q.extent[2],
            .kv_heads = in.k.extent[2],
            .features = in.q.extent[3],
            .value_dim = in.v.extent[3],
            .modes = in.params.log_neg_re.extent[1],
            .sequences = in.cu_seqlens ? in.cu_seqlens.extent[0] - 1 : -1};
}
/// Shape of a decoding step, for its workspace.
template <class T, class P>
Shape shape_of(const Discrete<P>& discrete, const Token<T>& token) {
    return {.dtype = dtype_of<T>,
            .batch = token.q.extent[0],
            .length = 1,
            .query_heads = token.q.extent[1],
            .kv_heads = token.k.extent[1],
            .features = token.q.extent[2],
            .value_dim = token.v.extent[2],
            .modes = discrete.Lam.extent[1]};
}

/// What holds for every executor: sizes, null pointers, strides. Nothing is read but the views.
inline Status validate(const Shape& s) {
    const auto bad = [](const char* what, Index was, const char* must) {
        return Status::error(StatusCode::invalid_argument, "%s is %lld, must be %s", what,
                             static_cast<long long>(was), must);
    };
    if (s.packed() && s.batch != 1) return bad("q: batch", s.batch, "1 with cu_seqlens");
    INTERSTATE_RETURN_IF_ERROR(check_size("q: batch", s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("q: length", s.length));
    INTERSTATE_RETURN_IF_ERROR(check_size("q: heads", s.query_heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("k: heads", s.kv_heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("q: features", s.features));
    INTERSTATE_RETURN_IF_ERROR(check_size("v: head dim", s.value_dim));
    INTERSTATE_RETURN_IF_ERROR(check_size("log_neg_re: modes", s.modes));
    if (s.kv_heads == 0 ? s.query_heads != 0 : s.query_heads % s.kv_heads != 0)
        return bad("q: heads", s.query_heads, "a multiple of the heads of k");
    const double state = static_cast<double>(s.states()) * static_cast<double>(s.kv_heads) *
                         static_cast<double>(s.modes) * static_cast<double>(s.columns() + s.modes + 1);
    if (state > 0x1p48)
        return Status::error(StatusCode::invalid_argument, "the state's elements are %g, must be at most 2^48", state);
    return {};
}
inline Status check_eta(const Options& options, bool given) {
    if (!given || options.normalized()) return {};
    return Status::error(StatusCode::invalid_argument, "eta, eta0, etaT: are given, must be null with normalizer = none, which has none");
}
template <class T, class P>
Status validate(const Options& options, const Inputs<T, P>& in) {
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    INTERSTATE_RETURN_IF_ERROR(check_present(in, Shape{}));
    INTERSTATE_RETURN_IF_ERROR(check_eta(options, static_cast<bool>(in.eta0)));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(validate(shape));
    return check_tensors(in, shape);
}
template <class T, class P>
Status validate(const Options& options, const Inputs<T, P>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in));
    INTERSTATE_RETURN_IF_ERROR(check_eta(options, static_cast<bool>(out.etaT)));
    return check_tensors(out, shape_of(in));
}
template <class T, class P>
Status validate(const Options& options, const Inputs<T, P>& in, const Upstream<T>& upstream, const Grads<T, P>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in));
    INTERSTATE_RETURN_IF_ERROR(check_eta(options, upstream.etaT || grads.eta0));
    INTERSTATE_RETURN_IF_ERROR(check_tensors(upstream, shape_of(in), "dout."));
    return check_tensors(grads, shape_of(in), "grad.");
}
template <class P>
Status validate(const Params<P>& params, const Discrete<P>& discrete) {
    const Index H = params.log_neg_re.extent[0], M = params.log_neg_re.extent[1];
    CheckTensors check;
    auto tensors = params;
    visit_params(tensors, Shape{.kv_heads = H, .modes = M}, Need::required, check);
    check("Lam", discrete.Lam, {H, M}, Need::required);
    check("Bbar", discrete.Bbar, {H, M}, Need::required);
    return check.status;
}
template <class T, class P>
Status validate(const Options& options, const Discrete<P>& discrete, const State<acc_t<T>>& state, const Token<T>& token,
                const TokenOut<T>& out) {
    const Shape s = shape_of(discrete, token);
    const auto walk = [&](auto&& check) {
        check("q", token.q, {s.batch, s.query_heads, s.features}, Need::required);
        check("k", token.k, {s.batch, s.kv_heads, s.features}, Need::required);
        check("v", token.v, {s.batch, s.kv_heads, s.value_dim}, Need::required);
        check("Lam", discrete.Lam, {s.kv_heads, s.modes}, Need::required);
        check("Bbar", discrete.Bbar, {s.kv_heads, s.modes}, Need::required);
        check("C", discrete.C, {s.kv_heads, s.modes, s.modes}, Need::required);
        check("x", state.x, {s.batch, s.kv_heads, s.modes, s.columns()}, Need::required);
        check("eta", state.eta, {s.batch, s.kv_heads, s.modes}, options.normalized() ? Need::required : Need::optional);
        check("o", out.o, {s.batch, s.query_heads, s.value_dim}, Need::required);
        return check.status;
    };
    INTERSTATE_RETURN_IF_ERROR(walk(CheckPresent{}));
    INTERSTATE_RETURN_IF_ERROR(validate(s));
    INTERSTATE_RETURN_IF_ERROR(check_eta(options, static_cast<bool>(state.eta)));
    return walk(CheckTensors{});
}

/// How verify, replay and the golden cases reach the operator.
struct Operator {
    static constexpr const char* name = "interdomain";
    using Options = interdomain::Options;
    template <class T, class P>
    using Inputs = interdomain::Inputs<T, P>;
    template <class T>
    using Outputs = interdomain::Outputs<T>;
    template <class T>
    using Upstream = interdomain::Upstream<T>;
    template <class T, class P>
    using Grads = interdomain::Grads<T, P>;
    template <class Exec>
    static constexpr bool has_backward = true;
    static bool has_output(const Options& options, std::string_view output) {
        return output != "etaT" || options.normalized();
    }
    template <class T, class P>
    static Status validate_inputs(const Options& options, const Inputs<T, P>& in) {
        return validate(options, in);
    }
};

}  // namespace interdomain
}  // namespace interstate::inline INTERSTATE_ABI
