// Linear attention by plain loops in float64, written like docs/ops/linear_attention.md, whose equations are cited.
#pragma once

#include <linear_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention {

namespace detail {

/// Scratch of one call: the running states of one head, or their gradients, and of one token what its products need.
struct ReferenceScratch {
    double* s;          // (dk, dv)
    double* z;          // (dk)
    double* q;          // (dk), phi(q)
    double* k;          // (dk), phi(k)
    double* o;          // (dv), the numerator of eq. 3 or its gradient
    double *over, *dw;  // (group, L), backward: 1 over the denominator, and the denominator's gradient

    ReferenceScratch(Arena& arena, const Shape& s_, pass which) {
        const Index rows = which == pass::backward ? s_.group() * s_.length : 0;
        s = arena.take<double>(s_.head_dim * s_.value_dim);
        z = arena.take<double>(s_.head_dim);
        q = arena.take<double>(s_.head_dim);
        k = arena.take<double>(s_.head_dim);
        o = arena.take<double>(s_.value_dim);
        over = arena.take<double>(rows);
        dw = arena.take<double>(rows);
    }
};

/// phi of a row, (n) of any tensor.
template <class At>
void map_features(FeatureMap map, Index n, At&& at, double* to) {
    for (Index r = 0; r < n; ++r) to[r] = feature(map, static_cast<double>(at(r)));
}
/// A state of dtype A, or zeros where there is none.
template <class S, class Z>
void load_state(const Shape& s, const S& from, const Z& from_z, Index i, Index h, const ReferenceScratch& at) {
    for (Index r = 0; r < s.head_dim; ++r) {
        for (Index c = 0; c < s.value_dim; ++c) at.s[r * s.value_dim + c] = from ? static_cast<double>(from(i, h, r, c)) : 0.0;
        at.z[r] = from_z ? static_cast<double>(from_z(i, h, r)) : 0.0;
    }
}
template <class A>
void store_state(const Shape& s, const View<A, 4>& to, const View<A, 3>& to_z, Index i, Index h, const ReferenceScratch& at) {
    for (Index r = 0; r < s.head_dim; ++r) {
        if (to)
            for (Index c = 0; c < s.value_dim; ++c) to(i, h, r, c) = static_cast<A>(at.s[r * s.value_dim + c]);
        if (to_z) to_z(i, h, r) = static_cast<A>(at.z[r]);
    }
}
/// s += a b^T and z += weight a.
template <class B>
void add_product(const Shape& s, const double* a, B&& b, double weight, const ReferenceScratch& at) {
    for (Index r = 0; r < s.head_dim; ++r) {
        for (Index c = 0; c < s.value_dim; ++c) at.s[r * s.value_dim + c] += a[r] * b(c);
        at.z[r] += weight * a[r];
    }
}
/// at.o = s^T phi(q), and w, what it is divided by (eq. 3 and 4).
inline double read_state(const Options& options, const Shape& s, const ReferenceScratch& at) {
    for (Index c = 0; c < s.value_dim; ++c) {
        at.o[c] = 0.0;
        for (Index r = 0; r < s.head_dim; ++r) at.o[c] += at.q[r] * at.s[r * s.value_dim + c];
    }
    if (!options.divides()) return 1.0;
    double weights = 0.0;
    for (Index r = 0; r < s.head_dim; ++r) weights += at.q[r] * at.z[r];
    return weights;
}
/// o of that; 0 where w is.
inline double output(const ReferenceScratch& at, Index c, double weights) { return weights == 0.0 ? 0.0 : at.o[c] / weights; }

}  // namespace detail

inline KernelChoice which_kernel(reference, const Options&, const Shape&) {
    return {"linear_attention.reference", "plain float64 loops, for any shape and strides"};
}

/// The reference recomputes; it keeps nothing between forward and backward.
inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }

inline std::size_t workspace_size(reference, const Options&, const Shape& shape, pass which) {
    Arena arena;
    detail::ReferenceScratch(arena, shape, which);
    return arena.required();
}

/// o and the states behind the last token (eq. 2 to 4).
template <class T>
Status forward(reference exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch at(arena, s, pass::forward);
    zero_outside_sequences(out.o, in.cu_seqlens);
    for (Index i = 0; i < s.states(); ++i)
        for (Index h = 0; h < s.kv_heads; ++h) {
            const Index b = s.packed() ? 0 : i;
            const RowRange rows = rows_of(in.cu_seqlens, i, s.length);
            detail::load_state(s, in.s0, in.z0, i, h, at);
            for (Index t = rows.begin; t < rows.end; ++t) {
                detail::map_features(options.feature_map, s.head_dim, [&](Index r) { return in.k(b, t, h, r); }, at.k);
                detail::add_product(s, at.k, [&](Index c) { return static_cast<double>(in.v(b, t, h, c)); }, 1.0, at);  // eq. 2
                for (Index g = h * s.group(); g < (h + 1) * s.group(); ++g) {
                    detail::map_features(options.feature_map, s.head_dim, [&](Index r) { return in.q(b, t, g, r); }, at.q);
                    const double weights = detail::read_state(options, s, at);
                    for (Index c = 0; c < s.value_dim; ++c) out.o(b, t, g, c) = static_cast<T>(detail::output(at, c, weights));
                }
            }
            detail::store_state(s, out.sT, out.zT, i, h, at);
        }
    return {};
}

/// The gradients whose views are not null (eq. 5 to 9): those of q from the first token to the last, those of k and v back.
template <class T>
Status backward(reference exec, const Options& options, const Inputs<T>& in, const Outputs<T>&, Saved, const Upstream<T>& upstream,
                const Grads<T>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, s.length));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    Arena arena(ws.data);
    const detail::ReferenceScratch at(arena, s, pass::backward);
    const FeatureMap map = options.feature_map;
    const Index dk = s.head_dim, dv = s.value_dim;
    zero_outside_sequences(grads.q, in.cu_seqlens);
    zero_outside_sequences(grads.k, in.cu_seqlens);
    zero_outside_sequences(grads.v, in.cu_seqlens);
    for (Index i = 0; i < s.states(); ++i)
        for (Index h = 0; h < s.kv_heads; ++h) {
            const Index b = s.packed() ? 0 : i;
            const RowRange rows = rows_of(in.cu_seqlens, i, s.length);
            const auto query = [&](Index t, Index g) {
                detail::map_features(map, dk, [&](Index r) { return in.q(b, t, g, r); }, at.q);
            };
            const auto key = [&](Index t) { detail::map_features(map, dk, [&](Index r) { return in.k(b, t, h, r); }, at.k); };

            detail::load_state(s, in.s0, in.z0, i, h, at);
            for (Index t = rows.begin; t < rows.end; ++t) {
                key(t);
                detail::add_product(s, at.k, [&](Index c) { return static_cast<double>(in.v(b, t, h, c)); }, 1.0, at);
                for (Index g = h * s.group(); g < (h + 1) * s.group(); ++g) {
                    query(t, g);
                    const Index row = (g - h * s.group()) * s.length + t;
                    const double over = at.over[row] = inverse_weight(detail::read_state(options, s, at));
                    double along = 0.0;
                    for (Index c = 0; c < dv; ++c) along += at.o[c] * over * static_cast<double>(upstream.o(b, t, g, c));
                    at.dw[row] = options.divides() ? -along * over : 0.0;  // eq. 5
                    if (!grads.q) continue;
                    for (Index r = 0; r < dk; ++r) {  // eq. 6
                        double sum = at.z[r] * at.dw[row];
                        for (Index c = 0; c < dv; ++c) sum += at.s[r * dv + c] * over * static_cast<double>(upstream.o(b, t, g, c));
                        grads.q(b, t, g, r) = static_cast<T>(sum * feature_slope(map, static_cast<double>(in.q(b, t, g, r))));
                    }
                }
            }

            detail::load_state(s, upstream.sT, upstream.zT, i, h, at);
            for (Index t = rows.end - 1; t >= rows.begin; --t) {
                for (Index g = h * s.group(); g < (h + 1) * s.group(); ++g) {  // eq. 7
                    query(t, g);
                    const Index row = (g - h * s.group()) * s.length + t;
                    const double over = at.over[row];
                    detail::add_product(s, at.q, [&](Index c) { return over * static_cast<double>(upstream.o(b, t, g, c)); }, at.dw[row], at);
                }
                key(t);
                for (Index r = 0; r < dk && grads.k; ++r) {  // eq. 8
                    double sum = at.z[r];
                    for (Index c = 0; c < dv; ++c) sum += at.s[r * dv + c] * static_cast<double>(in.v(b, t, h, c));
                    grads.k(b, t, h, r) = static_cast<T>(sum * feature_slope(map, static_cast<double>(in.k(b, t, h, r))));
                }
                for (Index c = 0; c < dv && grads.v; ++c) {  // eq. 9
                    double sum = 0.0;
                    for (Index r = 0; r < dk; ++r) sum += at.s[r * dv + c] * at.k[r];
                    grads.v(b, t, h, c) = static_cast<T>(sum);
                }
            }
            detail::store_state(s, grads.s0, grads.z0, i, h, at);
        }
    return {};
}

/// One token for every batch row (eq. 2 to 4); the state is updated in place.
template <class T>
Status step(reference exec, const Options& options, const Params&, const State<acc_t<T>>& state, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, state, token, out));
    const Shape s = shape_of(state, token);
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    Arena arena(ws.data);
    const detail::ReferenceScratch at(arena, s, pass::step);
    for (Index b = 0; b < s.batch; ++b)
        for (Index h = 0; h < s.kv_heads; ++h) {
            detail::load_state(s, state.s, state.z, b, h, at);
            detail::map_features(options.feature_map, s.head_dim, [&](Index r) { return token.k(b, h, r); }, at.k);
            detail::add_product(s, at.k, [&](Index c) { return static_cast<double>(token.v(b, h, c)); }, 1.0, at);
            for (Index g = h * s.group(); g < (h + 1) * s.group(); ++g) {
                detail::map_features(options.feature_map, s.head_dim, [&](Index r) { return token.q(b, g, r); }, at.q);
                const double weights = detail::read_state(options, s, at);
                for (Index c = 0; c < s.value_dim; ++c) out.o(b, g, c) = static_cast<T>(detail::output(at, c, weights));
            }
            detail::store_state(s, state.s, state.z, b, h, at);
        }
    return {};
}

}  // namespace linear_attention
}  // namespace interstate::inline INTERSTATE_ABI
