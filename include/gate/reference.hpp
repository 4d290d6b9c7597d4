// The output gate by plain loops in float64, written like docs/ops/gate.md, whose equations are cited.
#pragma once

#include <cmath>

#include <gate/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace gate {

inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }
inline std::size_t workspace_size(reference, const Options&, const Shape&, pass) { return 0; }
inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"gate.reference", "plain float64 loops, for any shape and strides"};
}

namespace detail {
/// f(b, t, h, c) for every element of every sequence.
template <class T, class F>
void reference_elements(const Inputs<T>& in, const Shape& s, F&& f) {
    const Index begin = in.cu_seqlens ? in.cu_seqlens(0) : 0;
    const Index end = in.cu_seqlens ? in.cu_seqlens(s.sequences) : s.length;
    for (Index b = 0; b < s.batch; ++b)
        for (Index t = begin; t < end; ++t)
            for (Index h = 0; h < s.heads; ++h)
                for (Index c = 0; c < s.value_dim; ++c) f(b, t, h, c);
}
}  // namespace detail

template <class T>
Status forward(reference, const Options&, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    zero_outside_sequences(out.y, in.cu_seqlens);
    detail::reference_elements(in, s, [&](Index b, Index t, Index h, Index c) {
        const double sigmoid = 1.0 / (1.0 + std::exp(-static_cast<double>(in.g(b, t, h, c))));
        out.y(b, t, h, c) = static_cast<T>(static_cast<double>(in.o(b, t, h, c)) * sigmoid);  // eq. 1
    });
    return {};
}

template <class T>
Status backward(reference, const Options&, const Inputs<T>& in, const Outputs<T>&, Saved, const Upstream<T>& upstream,
                const Grads<T>& grads, Workspace) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    zero_outside_sequences(grads.o, in.cu_seqlens);
    zero_outside_sequences(grads.g, in.cu_seqlens);
    detail::reference_elements(in, s, [&](Index b, Index t, Index h, Index c) {
        const double g = static_cast<double>(in.g(b, t, h, c)), dy = static_cast<double>(upstream.y(b, t, h, c));
        const double sigmoid = 1.0 / (1.0 + std::exp(-g)), rest = 1.0 / (1.0 + std::exp(g));
        if (grads.o) grads.o(b, t, h, c) = static_cast<T>(dy * sigmoid);                                       // eq. 2
        if (grads.g) grads.g(b, t, h, c) = static_cast<T>(dy * static_cast<double>(in.o(b, t, h, c)) * sigmoid * rest);  // eq. 3
    });
    return {};
}

/// One token for every batch row.
template <class T>
Status step(reference exec, const Options& options, const Params&, const State&, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(token, out));
    return forward(exec, options, Inputs<T>{.o = as_sequences(token.o), .g = as_sequences(token.g)},
                   Outputs<T>{as_sequences(out.y)}, Saved{}, ws);
}

}  // namespace gate
}  // namespace interstate::inline INTERSTATE_ABI
