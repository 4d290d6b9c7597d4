// Attention by one component of its scores, public: the executors `reference` and `cpu`. Equations, shapes and dtypes:
// docs/ops/component_attention.md.
//
//     Workspace ws{memory, component_attention::workspace_size(exec, options, shape, pass::forward)};
//     Status status = component_attention::forward(exec, options, in, out, Saved{}, ws);
//
// The calls below are the same for every executor.
#pragma once

#include <attention/attention.hpp>
#include <component_attention/detail/pairs.hpp>
#include <component_attention/params.hpp>
#include <component_attention/reference.hpp>
#include <interstate/cpu/parallel.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace component_attention {

namespace detail {

/// Packing on the host, a task a row (eq. 6 to 8).
struct HostRows {
    const cpu& exec;

    std::size_t bytes(const attention::Options& options, const Shape& s, pass which) const {
        return attention::workspace_size(exec, options, s, which);
    }

    template <class F>
    void each_row(const Shape& s, F&& f) const {
        parallel_for(s.batch * s.queries, exec.threads, [&](Index row, int) { f(row / s.queries, row % s.queries); });
    }
    template <class T>
    Status pack(const Options& options, const Inputs<T>& in, const PairMemory<T>& memory) const {
        const Shape& s = memory.s;
        const auto q = memory.pairs(memory.q), k = memory.pairs(memory.k), v = memory.rows(memory.v, s.value_dim);
        const acc_t<T> sign = options.component == Component::routing ? -1 : 1;
        each_row(s, [&](Index b, Index t) {
            for (Index h = 0; h < s.query_heads; ++h) {
                const Index kv = h / s.group();
                for (Index d = 0; d < s.head_dim; ++d) {
                    const T of_q = in.q(b, t, h, d), of_k = in.k(b, t, kv, d);
                    q(b, t, h, d) = k(b, t, h, s.head_dim + d) = of_q;
                    k(b, t, h, d) = of_k;
                    q(b, t, h, s.head_dim + d) = static_cast<T>(sign * static_cast<acc_t<T>>(of_k));
                }
                for (Index d = 0; memory.groups && d < s.value_dim; ++d) v(b, t, h, d) = in.v(b, t, kv, d);
            }
        });
        return {};
    }
    template <class T>
    Status add(const Options& options, const PairMemory<T>& memory, const Grads<T>& grads) const {
        using A = acc_t<T>;
        const Shape& s = memory.s;
        const auto dq = memory.pairs(memory.dq), dk = memory.pairs(memory.dk), dv = memory.rows(memory.dv, s.value_dim);
        const A sign = options.component == Component::routing ? -1 : 1;
        each_row(s, [&](Index b, Index t) {
            for (Index h = 0; grads.q && h < s.query_heads; ++h)
                for (Index d = 0; d < s.head_dim; ++d)
                    grads.q(b, t, h, d) = static_cast<T>(static_cast<A>(dq(b, t, h, d)) + static_cast<A>(dk(b, t, h, s.head_dim + d)));
            for (Index kv = 0; kv < s.kv_heads; ++kv) {
                const auto sum = [&](auto&& term) {
                    A x = 0;
                    for (Index h = kv * s.group(); h < (kv + 1) * s.group(); ++h) x += term(h);
                    return static_cast<T>(x);
                };
                for (Index d = 0; grads.k && d < s.head_dim; ++d)
                    grads.k(b, t, kv, d) =
                        sum([&](Index h) { return static_cast<A>(dk(b, t, h, d)) + sign * static_cast<A>(dq(b, t, h, s.head_dim + d)); });
                for (Index d = 0; grads.v && memory.groups && d < s.value_dim; ++d)
                    grads.v(b, t, kv, d) = sum([&](Index h) { return static_cast<A>(dv(b, t, h, d)); });
            }
        });
        return {};
    }
};

}  // namespace detail

/// Attention's own where it is asked as it is: both components, or no scores.
inline KernelChoice which_kernel(const cpu& exec, const Options& options, const Shape& s) {
    if (detail::is_plain(options, s)) return attention::which_kernel(exec, attention_of(options), s);
    const char* reason = "attention of pairs of queries and keys; any shape, strides and options";
    switch (simd::resolve(exec.isa)) {
        case Isa::avx512: return {"component_attention.cpu.pairs.avx512", reason};
        case Isa::avx2: return {"component_attention.cpu.pairs.avx2", reason};
        default: return {"component_attention.cpu.pairs.baseline", reason};
    }
}

/// Bytes of `Saved`: none, o and lse are all that backward needs.
inline std::size_t saved_size(const cpu&, const Options&, const Shape&) { return 0; }

/// Bytes of scratch memory for a pass, for exec.threads threads (0: as many as OpenMP has now): of one component pairs of queries and keys,
/// values of groups of heads, in backward their gradients; and what attention needs.
inline std::size_t workspace_size(const cpu& exec, const Options& options, const Shape& shape, pass which) {
    return detail::pair_workspace_size(detail::HostRows{exec}, options, shape, which);
}

/// o and, of softmax, lse (eq. 1 to 3).
///
/// q (B, L, Hq, dh), k (B, L, Hkv, dh), v (B, L, Hkv, dv) and o (B, L, Hq, dv) of T = f64, f32, f16 or bf16; lse (B, L, Hq) of double for
/// f64, else float, may be null. Any strides; Hq a multiple of Hkv. With cu_seqlens (S+1) B is 1. Outputs must not overlap inputs. Sums are
/// double for f64 and float for all others.
///
/// Errors, before anything is written: invalid_argument (options, shapes, null views, cu_seqlens), unsupported (an instruction set that
/// this machine lacks), workspace_too_small.
///
/// Source: the decomposition of a kernel into a skew-symmetric and a symmetric part, arXiv 2605.18826.
template <class T>
Status forward(const cpu& requested, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.keys));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    return detail::pair_forward(detail::HostRows{exec}, options, in, out, ws);
}

/// dq, dk and dv (eq. 4 and 5) from the inputs, forward's o and lse, and upstream gradients do and, optionally, dlse. Gradients have the
/// shapes of the inputs, are overwritten, and one whose view is null is not computed. Errors as in forward.
template <class T>
Status backward(const cpu& requested, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved,
                const Upstream<T>& upstream, const Grads<T>& grads, Workspace ws) {
    cpu exec;
    INTERSTATE_RETURN_IF_ERROR(resolve(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, shape.keys));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    return detail::pair_backward(detail::HostRows{exec}, options, in, out, upstream, grads, ws);
}

}  // namespace component_attention
}  // namespace interstate::inline INTERSTATE_ABI
