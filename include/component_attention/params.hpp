// Attention by one component of its scores: what goes in, what comes out, and how it is checked. Equations:
// docs/ops/component_attention.md.
#pragma once

#include <string_view>

#include <attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace component_attention {

/// Which part of the matrix of scores weighs (docs/ops/component_attention.md, eq. 2): all of it, the skew-symmetric part or the symmetric
/// one.
enum class Component : std::uint8_t { both, routing, filtering };
using attention::Score;

/// As attention's, but for `component`.
struct Options {
    Component component = Component::both;
    bool causal = true;
    Index window = 0;    // keys a position sees on one side, itself included; 0 is no window
    double scale = 0.0;  // 0 is 1/sqrt(dh)
    Score score = Score::softmax;
    double bias = 0.0;  // sigmoid only; added to every score where Inputs::bias is absent
};

constexpr attention::Options attention_of(const Options& options) {
    return {.causal = options.causal, .window = options.window, .scale = options.scale, .score = options.score, .bias = options.bias};
}

/// Sets one option from its text, as tools/replay writes it.
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    bool on = false;
    if (name == "component" && value == "both") return options.component = Component::both, Status{};
    if (name == "component" && value == "routing") return options.component = Component::routing, Status{};
    if (name == "component" && value == "filtering") return options.component = Component::filtering, Status{};
    if (name == "causal" && parse_flag(value, on)) return options.causal = on, Status{};
    if (attention::set_score_option(options, name, value)) return {};
    return unknown_option(name, value,
                          "component_attention takes component=both|routing|filtering, causal=true|false, window=none|N, scale=X, "
                          "score=softmax|sigmoid, bias=X");
}

/// Attention's tensors and sizes; Lq = Lk.
using attention::Grads;
using attention::Inputs;
using attention::Outputs;
using attention::Shape;
using attention::Upstream;

/// What the products of (1) and of its transpose count for, times the scale (eq. 2).
struct Parts {
    double own, turned;
};
constexpr Parts parts_of(Component component) {
    return component == Component::both ? Parts{1.0, 0.0} : Parts{0.5, component == Component::routing ? -0.5 : 0.5};
}

/// A turned score is that of a key as a query, so that every position has both.
template <class T>
Status check_lengths(const Inputs<T>& in) {
    const Shape s = shape_of(in);
    if (s.queries == s.keys) return {};
    return Status::error(StatusCode::invalid_argument, "q: length is %lld, must be that of k, %lld", static_cast<long long>(s.queries),
                         static_cast<long long>(s.keys));
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in) {
    INTERSTATE_RETURN_IF_ERROR(attention::validate(attention_of(options), in));
    return check_lengths(in);
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(attention::validate(attention_of(options), in, out));
    return check_lengths(in);
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in, const Outputs<T>& out, const Upstream<T>& upstream, const Grads<T>& grads) {
    INTERSTATE_RETURN_IF_ERROR(attention::validate(attention_of(options), in, out, upstream, grads));
    return check_lengths(in);
}

/// How verify and replay reach the operator. It has no parameters beside its storage dtype, so P is not used.
struct Operator {
    static constexpr const char* name = "component_attention";
    using Options = component_attention::Options;
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
    static bool has_output(const Options& options, std::string_view output) { return output != "lse" || options.score == Score::softmax; }
    template <class T>
    static Status validate_inputs(const Options& options, const attention::Inputs<T>& in) {
        return validate(options, in);
    }
};

}  // namespace component_attention
}  // namespace interstate::inline INTERSTATE_ABI
