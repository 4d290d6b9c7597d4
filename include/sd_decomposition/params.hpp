// Routing and filtering of attention heads: what goes in, what comes out, and how it is checked. Equations:
// docs/ops/sd_decomposition.md.
#pragma once

#include <cmath>
#include <string_view>

#include <interstate/executor.hpp>
#include <interstate/options.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition {

struct Options {
    double scale = 0.0;  // 0 is 1/sqrt(d); 1 for the kernel of weights
};

inline double scale_of(const Options& options, Index head_dim) {
    return options.scale != 0.0 ? options.scale : 1.0 / std::sqrt(static_cast<double>(head_dim > 0 ? head_dim : 1));
}

/// Sets one option from its text, as the golden cases and tools/replay write it.
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    double x = 0.0;
    if (name == "scale" && parse_number(value, x)) return options.scale = x, Status{};
    return unknown_option(name, value, "sd_decomposition takes scale=X");
}

/// Sizes of one call.
struct Shape {
    DType dtype = DType::f32;
    Index batch = 0;        // B
    Index length = 0;       // L; of weights: the width D of the model
    Index query_heads = 0;  // H, a multiple of Hkv
    Index kv_heads = 0;     // Hkv; query head h is taken with key head h / (H / Hkv)
    Index head_dim = 0;     // d

    INTERSTATE_HD constexpr Index group() const { return kv_heads > 0 ? query_heads / kv_heads : 1; }
    /// n = min(L, 2d): how many singular values there are.
    INTERSTATE_HD constexpr Index values() const { return length < 2 * head_dim ? length : 2 * head_dim; }
};

template <class T>
struct Inputs {
    View<const T, 4> Q{};  // (B, L, H, d)
    View<const T, 4> K{};  // (B, L, Hkv, d)
};

/// Of S and F as `routing_` and `filtering_`; a null view is not written. Singular values descend.
template <class T>
struct Outputs {
    View<acc_t<T>, 2> routing_energy{};             // (B, H)
    View<acc_t<T>, 2> norm{};                       // (B, H), of A: Frobenius
    View<acc_t<T>, 2> routing_norm{};               // (B, H)
    View<acc_t<T>, 2> filtering_norm{};             // (B, H)
    View<acc_t<T>, 3> routing_singular_values{};    // (B, H, min(L, 2d))
    View<acc_t<T>, 3> filtering_singular_values{};  // (B, H, min(L, 2d))
    View<acc_t<T>, 2> routing_effective_rank{};     // (B, H)
    View<acc_t<T>, 2> filtering_effective_rank{};
    View<acc_t<T>, 2> routing_participation_ratio{};
    View<acc_t<T>, 2> filtering_participation_ratio{};
    View<acc_t<T>, 2> routing_stable_rank{};
    View<acc_t<T>, 2> filtering_stable_rank{};
};

/// A diagnostic has no backward; verify asks for the type.
template <class T>
struct Upstream {};

/// Walks the named tensors of a struct with the extents each must have: f(name, view, extents, need).
template <class T, class F>
void visit(Inputs<T>& in, const Shape& s, F&& f) {
    f("Q", in.Q, {s.batch, s.length, s.query_heads, s.head_dim}, Need::required);
    f("K", in.K, {s.batch, s.length, s.kv_heads, s.head_dim}, Need::required);
}
template <class T, class F>
void visit(Outputs<T>& out, const Shape& s, F&& f) {
    const Index B = s.batch, H = s.query_heads;
    f("routing_energy", out.routing_energy, {B, H}, Need::optional);
    f("norm", out.norm, {B, H}, Need::optional);
    f("routing_norm", out.routing_norm, {B, H}, Need::optional);
    f("filtering_norm", out.filtering_norm, {B, H}, Need::optional);
    f("routing_singular_values", out.routing_singular_values, {B, H, s.values()}, Need::optional);
    f("filtering_singular_values", out.filtering_singular_values, {B, H, s.values()}, Need::optional);
    f("routing_effective_rank", out.routing_effective_rank, {B, H}, Need::optional);
    f("filtering_effective_rank", out.filtering_effective_rank, {B, H}, Need::optional);
    f("routing_participation_ratio", out.routing_participation_ratio, {B, H}, Need::optional);
    f("filtering_participation_ratio", out.filtering_participation_ratio, {B, H}, Need::optional);
    f("routing_stable_rank", out.routing_stable_rank, {B, H}, Need::optional);
    f("filtering_stable_rank", out.filtering_stable_rank, {B, H}, Need::optional);
}
template <class T, class F>
void visit(Upstream<T>&, const Shape&, F&&) {}

template <class T>
Shape shape_of(const Inputs<T>& in) {
    return {.dtype = dtype_of<T>,
            .batch = in.Q.extent[0],
            .length = in.Q.extent[1],
            .query_heads = in.Q.extent[2],
            .kv_heads = in.K.extent[2],
            .head_dim = in.Q.extent[3]};
}

/// What holds for every executor: options, sizes, null pointers, strides. Nothing is read but the views.
inline Status validate(const Options& options, const Shape& s) {
    if (!std::isfinite(options.scale))
        return Status::error(StatusCode::invalid_argument, "options.scale is %g, must be finite", options.scale);
    INTERSTATE_RETURN_IF_ERROR(check_size("Q: batch", s.batch));
    INTERSTATE_RETURN_IF_ERROR(check_size("Q: length", s.length));
    INTERSTATE_RETURN_IF_ERROR(check_size("Q: heads", s.query_heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("K: heads", s.kv_heads));
    INTERSTATE_RETURN_IF_ERROR(check_size("Q: head dim", s.head_dim));
    if (s.kv_heads == 0 ? s.query_heads != 0 : s.query_heads % s.kv_heads != 0)
        return Status::error(StatusCode::invalid_argument, "Q: heads is %lld, must be a multiple of the %lld of K",
                             static_cast<long long>(s.query_heads), static_cast<long long>(s.kv_heads));
    return {};
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in) {
    INTERSTATE_RETURN_IF_ERROR(check_present(in, Shape{}));
    INTERSTATE_RETURN_IF_ERROR(validate(options, shape_of(in)));
    return check_tensors(in, shape_of(in));
}
template <class T>
Status validate(const Options& options, const Inputs<T>& in, const Outputs<T>& out) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in));
    return check_tensors(out, shape_of(in));
}

/// How verify, replay and the golden cases reach the operator. It has no parameters, so P is not used.
struct Operator {
    static constexpr const char* name = "sd_decomposition";
    using Options = sd_decomposition::Options;
    template <class T, class P>
    using Inputs = sd_decomposition::Inputs<T>;
    template <class T>
    using Outputs = sd_decomposition::Outputs<T>;
    template <class T>
    using Upstream = sd_decomposition::Upstream<T>;
    template <class Exec>
    static constexpr bool has_backward = false;
    template <class T>
    static Status validate_inputs(const Options& options, const sd_decomposition::Inputs<T>& in) {
        return validate(options, in);
    }
};

}  // namespace sd_decomposition
}  // namespace interstate::inline INTERSTATE_ABI
