// How kernels form a component: attention of heads twice as wide, whose scores are those of the component (docs/ops/component_attention.md,
// eq. 6 to 8). What packs rows and adds gradients up is an executor's; the rest is here, once.
#pragma once

#include <algorithm>

#include <component_attention/params.hpp>
#include <interstate/dispatch.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace component_attention::detail {

/// Whether attention itself is asked: for both components, and where there are no scores to take apart.
inline bool is_plain(const Options& options, const Shape& s) {
    return options.component == Component::both || s.batch == 0 || s.queries == 0 || s.query_heads == 0 || s.head_dim == 0;
}
/// What attention is asked.
inline attention::Options pair_options(const Options& options, const Shape& s) {
    attention::Options inner = attention_of(options);
    if (!is_plain(options, s)) inner.scale = 0.5 * attention::scale_of(inner, s.head_dim);
    return inner;
}
inline Shape pair_shape(const Options& options, Shape s) {
    if (is_plain(options, s)) return s;
    s.kv_heads = s.query_heads;
    s.head_dim *= 2;
    return s;
}

/// Of T, with a head for each of q: pairs (q, -+ k) and (k, q), (B, L, Hq, 2 dh), and the values, (B, L, Hq, dv), of groups of heads; and
/// their gradients. `inner`: what attention needs.
template <class T>
struct PairMemory {
    Shape s;
    bool groups;
    T *q, *k, *v, *dq, *dk, *dv;
    Workspace inner;

    PairMemory(Arena& arena, const Options& options, const Shape& shape, pass which, std::size_t inner_bytes)
        : s(shape), groups(shape.group() > 1) {
        const bool back = which == pass::backward;
        const Index rows = is_plain(options, s) ? 0 : s.batch * s.queries * s.query_heads, pairs = 2 * rows * s.head_dim;
        const Index values =
            rows > 0 && groups ? std::max<Index>(rows * s.value_dim, 1) : 0;  // never null, as a view without elements may be
        q = arena.take<T>(pairs), k = arena.take<T>(pairs), v = arena.take<T>(values);
        dq = arena.take<T>(back ? pairs : 0), dk = arena.take<T>(back ? pairs : 0), dv = arena.take<T>(back ? values : 0);
        inner = {arena.take<std::byte>(static_cast<Index>(inner_bytes)), inner_bytes};
    }
    template <class E>
    View<E, 4> rows(E* of, Index width) const {
        return view(of, {s.batch, s.queries, s.query_heads, width});
    }
    View<T, 4> pairs(T* of) const { return rows(of, 2 * s.head_dim); }
    Inputs<T> inputs(const Inputs<T>& in) const {
        return {.q = rows(static_cast<const T*>(q), 2 * s.head_dim),
                .k = rows(static_cast<const T*>(k), 2 * s.head_dim),
                .v = groups ? rows(static_cast<const T*>(v), s.value_dim) : in.v,
                .bias = in.bias,
                .cu_seqlens = in.cu_seqlens};
    }
    /// Of those that are wanted; where they go is `grads` for the values of heads without groups.
    Grads<T> gradients(const Grads<T>& grads) const {
        const bool scores = grads.q || grads.k;
        return {.q = scores ? pairs(dq) : View<T, 4>{},
                .k = scores ? pairs(dk) : View<T, 4>{},
                .v = grads.v && groups ? rows(dv, s.value_dim) : grads.v};
    }
};

/// `Rows` has the executor, `bytes(options, shape, pass)` of its attention, `pack` and `add`.
template <class Rows>
std::size_t pair_workspace_size(const Rows& rows, const Options& options, const Shape& s, pass which) {
    return dispatch_dtype(s.dtype, [&](auto t) {
        Arena arena;
        PairMemory<decltype(t)>(arena, options, s, which, rows.bytes(pair_options(options, s), pair_shape(options, s), which));
        return arena.required();
    });
}
template <class T, class Rows>
Status pair_forward(const Rows& rows, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Workspace ws) {
    const Shape s = shape_of(in);
    const attention::Options inner = pair_options(options, s);
    Arena arena(ws.data);
    const PairMemory<T> memory(arena, options, s, pass::forward, rows.bytes(inner, pair_shape(options, s), pass::forward));
    if (is_plain(options, s)) return forward(rows.exec, inner, in, out, Saved{}, memory.inner);
    INTERSTATE_RETURN_IF_ERROR(rows.pack(options, in, memory));
    return forward(rows.exec, inner, memory.inputs(in), out, Saved{}, memory.inner);
}
template <class T, class Rows>
Status pair_backward(const Rows& rows, const Options& options, const Inputs<T>& in, const Outputs<T>& out, const Upstream<T>& upstream,
                     const Grads<T>& grads, Workspace ws) {
    const Shape s = shape_of(in);
    const attention::Options inner = pair_options(options, s);
    Arena arena(ws.data);
    const PairMemory<T> memory(arena, options, s, pass::backward, rows.bytes(inner, pair_shape(options, s), pass::backward));
    if (is_plain(options, s)) return backward(rows.exec, inner, in, out, Saved{}, upstream, grads, memory.inner);
    INTERSTATE_RETURN_IF_ERROR(rows.pack(options, in, memory));
    INTERSTATE_RETURN_IF_ERROR(
        backward(rows.exec, inner, memory.inputs(in), out, Saved{}, upstream, memory.gradients(grads), memory.inner));
    return rows.add(options, memory, grads);
}

}  // namespace component_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
