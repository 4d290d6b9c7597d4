// Random Fourier features by plain loops in float64, written like docs/ops/random_features.md, whose equations are
// cited.
#pragma once

#include <cmath>

#include <random_features/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace random_features {

inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }

/// Backward keeps the gradients of x and W in float64 until they are whole.
inline std::size_t workspace_size(reference, const Options&, const Shape& s, pass which) {
    Arena arena;
    if (which == pass::backward) arena.take<double>(s.head_dim), arena.take<double>(s.weight_heads * s.frequencies * s.head_dim);
    return arena.required();
}
inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"random_features.reference", "plain float64 loops, for any shape and strides"};
}

namespace detail {

/// f(b, t, h) for every head of every token of every sequence.
template <class T, class P, class F>
void reference_heads(const Inputs<T, P>& in, const Shape& s, F&& f) {
    const Index begin = in.cu_seqlens ? in.cu_seqlens(0) : 0;
    const Index end = in.cu_seqlens ? in.cu_seqlens(s.sequences) : s.length;
    for (Index b = 0; b < s.batch; ++b)
        for (Index t = begin; t < end; ++t)
            for (Index h = 0; h < s.heads; ++h) f(b, t, h);
}

template <class T, class P>
double reference_phase(const Inputs<T, P>& in, const Shape& s, Index b, Index t, Index h, Index f) {
    double p = 0.0;
    for (Index c = 0; c < s.head_dim; ++c)
        p += static_cast<double>(in.params.W(s.weight_heads == 1 ? 0 : h, f, c)) * static_cast<double>(in.x(b, t, h, c));
    return p;
}

inline double reference_norm(const Shape& s) { return 1.0 / std::sqrt(static_cast<double>(s.frequencies)); }

}  // namespace detail

template <class T, class P>
Status forward(reference, const Options&, const Inputs<T, P>& in, const Outputs<T>& out, Saved, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    zero_outside_sequences(out.y, in.cu_seqlens);
    const Index F = s.frequencies;
    detail::reference_heads(in, s, [&](Index b, Index t, Index h) {
        for (Index f = 0; f < F; ++f) {
            const double p = detail::reference_phase(in, s, b, t, h, f);
            out.y(b, t, h, f) = static_cast<T>(detail::reference_norm(s) * std::cos(p));  // eq. 1
            out.y(b, t, h, F + f) = static_cast<T>(detail::reference_norm(s) * std::sin(p));
        }
    });
    return {};
}

template <class T, class P>
Status backward(reference exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const Index F = s.frequencies, dh = s.head_dim;
    double* const dx = arena.take<double>(dh);
    double* const dW = arena.take<double>(s.weight_heads * F * dh);
    for (Index i = 0; i < s.weight_heads * F * dh; ++i) dW[i] = 0.0;
    zero_outside_sequences(grads.x, in.cu_seqlens);
    detail::reference_heads(in, s, [&](Index b, Index t, Index h) {
        const Index hw = s.weight_heads == 1 ? 0 : h;
        for (Index c = 0; c < dh; ++c) dx[c] = 0.0;
        for (Index f = 0; f < F; ++f) {
            const double p = detail::reference_phase(in, s, b, t, h, f);
            const double dp = detail::reference_norm(s) * (static_cast<double>(upstream.y(b, t, h, F + f)) * std::cos(p) -
                                                           static_cast<double>(upstream.y(b, t, h, f)) * std::sin(p));  // eq. 3
            for (Index c = 0; c < dh; ++c) {
                dx[c] += dp * static_cast<double>(in.params.W(hw, f, c));                  // eq. 4
                dW[(hw * F + f) * dh + c] += dp * static_cast<double>(in.x(b, t, h, c));  // eq. 5
            }
        }
        for (Index c = 0; grads.x && c < dh; ++c) grads.x(b, t, h, c) = static_cast<T>(dx[c]);
    });
    for (Index h = 0; grads.params.W && h < s.weight_heads; ++h)
        for (Index f = 0; f < F; ++f)
            for (Index c = 0; c < dh; ++c) grads.params.W(h, f, c) = static_cast<P>(dW[(h * F + f) * dh + c]);
    return {};
}

/// One token for every batch row.
template <class T, class P>
Status step(reference exec, const Options& options, const Params<P>& params, const State&, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(params, token, out));
    return forward(exec, options, Inputs<T, P>{.x = as_sequences(token.x), .params = params},
                   Outputs<T>{as_sequences(out.y)}, Saved{}, ws);
}

}  // namespace random_features
}  // namespace interstate::inline INTERSTATE_ABI
