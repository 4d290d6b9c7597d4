// Initial parameters of what a layer of SISA has beside softmax attention, and how many there are
// (docs/ops/sisa.md, "From a token").
#pragma once

#include <interstate/random.hpp>
#include <sisa/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sisa {

/// Mutable parameters, to be initialised or updated: B = W_B x, C = W_C x, theta = W_theta x, and those of
/// sisa/prelude.hpp. D is the width of a token x.
template <class P>
struct MutableParams {
    View<P, 3> W_B{};         // (Hkv, ds, D)
    View<P, 3> W_C{};         // (Hq, ds, D)
    View<P, 2> W_alpha{};     // (Hkv, D)
    View<P, 1> b_alpha{};     // (Hkv)
    View<P, 3> W_theta{};     // (Hkv, ds/2, D)
    View<P, 1> lambda_raw{};  // (Hq)
};

/// Weights normal of deviation 0.02, those of the angles 0.01; b_alpha = -5, a half-life of 103 tokens;
/// lambda_raw = -1, which is lambda = 0.31 (eq. 27 to 29). Deterministic in `seed` on every platform.
template <class P>
Status initialize(std::uint64_t seed, const MutableParams<P>& params) {
    const Index Hq = params.lambda_raw.extent[0], Hkv = params.b_alpha.extent[0], ds = params.W_B.extent[1],
                D = params.W_B.extent[2];
    CheckTensors check;
    check("W_B", params.W_B, {Hkv, ds, D}, Need::required);
    check("W_C", params.W_C, {Hq, ds, D}, Need::required);
    check("W_alpha", params.W_alpha, {Hkv, D}, Need::required);
    check("b_alpha", params.b_alpha, {Hkv}, Need::required);
    check("W_theta", params.W_theta, {Hkv, ds / 2, D}, Need::required);
    check("lambda_raw", params.lambda_raw, {Hq}, Need::required);
    INTERSTATE_RETURN_IF_ERROR(check.status);
    if (ds % 2 != 0)
        return Status::error(StatusCode::invalid_argument, "W_B: state dim is %lld, must be even",
                             static_cast<long long>(ds));
    Random64 random(seed);
    const auto fill = [&](const View<P, 3>& w, double deviation) {
        for (Index h = 0; h < w.extent[0]; ++h)
            for (Index r = 0; r < w.extent[1]; ++r)
                for (Index c = 0; c < D; ++c) w(h, r, c) = static_cast<P>(deviation * random.normal());
    };
    fill(params.W_B, 0.02);
    fill(params.W_C, 0.02);
    fill(params.W_theta, 0.01);
    for (Index h = 0; h < Hkv; ++h) {
        params.b_alpha(h) = P(-5);
        for (Index c = 0; c < D; ++c) params.W_alpha(h, c) = static_cast<P>(0.02 * random.normal());
    }
    for (Index h = 0; h < Hq; ++h) params.lambda_raw(h) = P(-1);
    return {};
}

struct LayerConfig {
    Index width = 0;        // D
    Index query_heads = 0;  // Hq
    Index kv_heads = 0;     // Hkv
    Index state_dim = 0;    // ds
};

/// Parameters of a layer beyond those of softmax attention; with Hq = Hkv = H the published
/// 2 D H ds + D H + H + D H ds/2 + H.
constexpr Index parameter_count(const LayerConfig& c) {
    const Index projections = c.width * (c.query_heads + c.kv_heads) * c.state_dim;
    const Index decay = c.width * c.kv_heads + c.kv_heads, angles = c.width * c.kv_heads * (c.state_dim / 2);
    return projections + decay + angles + c.query_heads;
}

}  // namespace sisa
}  // namespace interstate::inline INTERSTATE_ABI
