// What makes log_alpha and lambda of a layer's projections (docs/ops/sisa.md, eq. 27 and 28), forward and
// backward, for the executors `reference` and `cpu`; sisa/prelude.cuh has them for `cuda`. B, C and theta are
// projections as they are; RoPE of q and k is feature_map's.
//
//     log_alpha = -softplus(alpha + b_alpha),   lam = softplus(lambda_raw)
//
// The bias is added here and not by the projection, because bfloat16 numbers near -5 are 1/32 apart, which
// would be steps of 3 percent in the decay.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <interstate/cpu/parallel.hpp>
#include <sisa/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa::prelude {

/// T is the storage dtype of the projection; P (float or double) that of parameters and results.
template <class T, class P = param_t<T>>
struct Inputs {
    View<const T, 3> alpha{};                  // (B, L, Hkv), w_alpha.x
    View<const P, 1> b_alpha{};                // (Hkv), optional: absent is zero
    View<const P, 1> lambda_raw{};             // (Hq), optional, if lam is not wanted
    View<const std::int32_t, 1> cu_seqlens{};  // (S+1), optional: absent is a dense batch
};
template <class P>
struct Outputs {
    View<P, 3> log_alpha{};  // (B, L, Hkv)
    View<P, 1> lam{};        // (Hq), given with lambda_raw
};
template <class P>
struct Upstream {
    View<const P, 3> log_alpha{};  // (B, L, Hkv)
    View<const P, 1> lam{};        // (Hq), given with lambda_raw
};
/// Gradients with respect to the inputs; overwritten. A null view is not computed.
template <class T, class P = param_t<T>>
struct Grads {
    View<T, 3> alpha{};
    View<P, 1> b_alpha{};
    View<P, 1> lambda_raw{};
};

/// log(1 + exp(x)), right for any x.
INTERSTATE_HD inline double softplus(double x) { return (x > 0.0 ? x : 0.0) + std::log1p(std::exp(-std::abs(x))); }
/// Its derivative.
INTERSTATE_HD inline double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

namespace detail {

template <class T, class P>
Status validate(const Inputs<T, P>& in) {
    const auto& e = in.alpha.extent;
    if (in.cu_seqlens && in.cu_seqlens.extent[0] < 1)
        return Status::error(StatusCode::invalid_argument, "cu_seqlens: has no elements, must have S+1");
    INTERSTATE_RETURN_IF_ERROR(check_size("alpha: batch", e[0]));
    INTERSTATE_RETURN_IF_ERROR(check_size("alpha: length", e[1]));
    INTERSTATE_RETURN_IF_ERROR(check_size("alpha: heads", e[2]));
    INTERSTATE_RETURN_IF_ERROR(check_size("lambda_raw: heads", in.lambda_raw.extent[0]));
    if (in.cu_seqlens && e[0] != 1)
        return Status::error(StatusCode::invalid_argument, "alpha: batch is %lld, must be 1 with cu_seqlens",
                             static_cast<long long>(e[0]));
    CheckTensors check;
    check("alpha", in.alpha, {e[0], e[1], e[2]}, Need::required);
    check("b_alpha", in.b_alpha, {e[2]}, Need::optional);
    check("lambda_raw", in.lambda_raw, {in.lambda_raw.extent[0]}, Need::optional);
    return check.status;
}
/// Of results or of their upstream gradients, which have the same shapes.
template <class T, class P, class Results>
Status validate(const Inputs<T, P>& in, const Results& results, const char* log_alpha, const char* lam) {
    INTERSTATE_RETURN_IF_ERROR(validate(in));
    const auto& e = in.alpha.extent;
    CheckTensors check;
    check(log_alpha, results.log_alpha, {e[0], e[1], e[2]}, Need::required);
    check(lam, results.lam, {in.lambda_raw.extent[0]}, in.lambda_raw ? Need::required : Need::optional);
    return check.status;
}

template <class T, class P>
Status validate(const Inputs<T, P>& in, const Upstream<P>& upstream, const Grads<T, P>& grads) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, "dout.log_alpha", "dout.lam"));
    const auto& e = in.alpha.extent;
    CheckTensors check;
    check("grad.alpha", grads.alpha, {e[0], e[1], e[2]}, Need::optional);
    check("grad.b_alpha", grads.b_alpha, {e[2]}, Need::optional);
    check("grad.lambda_raw", grads.lambda_raw, {in.lambda_raw.extent[0]}, Need::optional);
    return check.status;
}

/// f(n) for every n below count, in tasks of `stretch` that do not depend on the number of threads.
template <class Exec, class F>
void for_each(const Exec& exec, Index count, Index stretch, F&& f) {
    const auto task = [&](Index n) {
        for (Index i = n * stretch; i < std::min(count, (n + 1) * stretch); ++i) f(i);
    };
    const Index tasks = (count + stretch - 1) / stretch;
    if constexpr (std::is_same_v<Exec, cpu>)
        parallel_for(tasks, exec.threads, [&](Index n, int) { task(n); });
    else
        for (Index n = 0; n < tasks; ++n) task(n);
}
/// f(b, t) for every row of alpha.
template <class Exec, class T, class P, class F>
void rows(const Exec& exec, const Inputs<T, P>& in, F&& f) {
    const Index length = in.alpha.extent[1];
    for_each(exec, in.alpha.extent[0] * length, 256, [&](Index n) { f(n / length, n % length); });
}

/// Whether row t belongs to a sequence.
template <class T, class P>
INTERSTATE_HD bool in_a_sequence(const Inputs<T, P>& in, Index t) {
    return !in.cu_seqlens || (t >= in.cu_seqlens(0) && t < in.cu_seqlens(in.cu_seqlens.extent[0] - 1));
}
template <class T, class P>
INTERSTATE_HD double raw_alpha(const Inputs<T, P>& in, Index b, Index t, Index h) {
    return static_cast<double>(in.alpha(b, t, h)) + (in.b_alpha ? static_cast<double>(in.b_alpha(h)) : 0.0);
}
/// The gradient of alpha, and what a row adds to b_alpha's.
template <class T, class P>
INTERSTATE_HD double slope(const Inputs<T, P>& in, const Upstream<P>& upstream, Index b, Index t, Index h) {
    if (!in_a_sequence(in, t)) return 0.0;
    return -sigmoid(raw_alpha(in, b, t, h)) * static_cast<double>(upstream.log_alpha(b, t, h));
}

inline Status settle(const reference&, reference&) { return {}; }
inline Status settle(const cpu& requested, cpu& exec) { return resolve(requested, exec); }

}  // namespace detail

/// log_alpha (B, L, Hkv) of alpha (B, L, Hkv) and b_alpha (Hkv), and lam (Hq) of lambda_raw (Hq). `exec` is
/// reference or cpu. Formed in double for every dtype, so that both give the same bits, for any number of
/// threads. Rows that belong to no sequence of cu_seqlens are zero.
///
/// Errors, before anything is written: invalid_argument (shapes, null views, cu_seqlens), unsupported (an
/// instruction set that this machine lacks).
template <class Exec, class T, class P>
Status forward(const Exec& requested, const Inputs<T, P>& in, const Outputs<P>& out) {
    Exec exec;
    INTERSTATE_RETURN_IF_ERROR(detail::settle(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(detail::validate(in, out, "log_alpha", "lam"));
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, in.alpha.extent[1]));
    detail::rows(exec, in, [&](Index b, Index t) {
        const bool inside = detail::in_a_sequence(in, t);
        for (Index h = 0; h < in.alpha.extent[2]; ++h)
            out.log_alpha(b, t, h) =
                static_cast<P>(inside ? -softplus(detail::raw_alpha(in, b, t, h)) : 0.0);  // eq. 27
    });
    if (out.lam)
        for (Index h = 0; h < in.lambda_raw.extent[0]; ++h)
            out.lam(h) = static_cast<P>(softplus(static_cast<double>(in.lambda_raw(h))));  // eq. 28
    return {};
}

/// The gradients whose views are not null, of those of log_alpha and lam. Errors as in forward.
template <class Exec, class T, class P>
Status backward(const Exec& requested, const Inputs<T, P>& in, const Upstream<P>& upstream,
                const Grads<T, P>& grads) {
    Exec exec;
    INTERSTATE_RETURN_IF_ERROR(detail::settle(requested, exec));
    INTERSTATE_RETURN_IF_ERROR(detail::validate(in, upstream, grads));
    const Index B = in.alpha.extent[0], L = in.alpha.extent[1], H = in.alpha.extent[2];
    INTERSTATE_RETURN_IF_ERROR(check_cu_seqlens(in.cu_seqlens, L));
    if (grads.alpha)
        detail::rows(exec, in, [&](Index b, Index t) {
            for (Index h = 0; h < H; ++h) grads.alpha(b, t, h) = static_cast<T>(detail::slope(in, upstream, b, t, h));
        });
    if (grads.b_alpha)
        detail::for_each(exec, H, 1, [&](Index h) {
            double sum = 0.0;
            for (Index b = 0; b < B; ++b)
                for (Index t = 0; t < L; ++t) sum += detail::slope(in, upstream, b, t, h);
            grads.b_alpha(h) = static_cast<P>(sum);
        });
    if (grads.lambda_raw && upstream.lam)
        for (Index h = 0; h < in.lambda_raw.extent[0]; ++h)
            grads.lambda_raw(h) = static_cast<P>(sigmoid(static_cast<double>(in.lambda_raw(h))) *
                                                 static_cast<double>(upstream.lam(h)));
    return {};
}

}  // namespace sisa::prelude
}  // namespace interstate::inline INTERSTATE_ABI
