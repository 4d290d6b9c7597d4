// Initial parameters of Interdomain Attention, and what a layer of it has (docs/ops/interdomain.md, "The layer").
#pragma once

#include <cmath>
#include <numbers>

#include <interdomain/params.hpp>
#include <interstate/random.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain {

/// Mutable parameters, to be initialised or updated.
template <class P>
using MutableParams = BasicParams<P, complex<P>>;

/// Re A = -1/2, im[m] = M/pi (M/(2m+1) - 1), log_dt uniform in [log dt_min, log dt_max], B = 1 (eq. 13), and C complex
/// normal of variance 1/M, so that it keeps the length of what it is applied to. Deterministic in `seed` on every platform.
template <class P>
Status initialize(std::uint64_t seed, const MutableParams<P>& params, double dt_min = 1e-3, double dt_max = 1e-1) {
    const Index H = params.log_neg_re.extent[0], M = params.log_neg_re.extent[1];
    CheckTensors check;
    auto tensors = params;
    visit_params(tensors, Shape{.kv_heads = H, .modes = M}, Need::required, check);
    INTERSTATE_RETURN_IF_ERROR(check.status);
    if (!(dt_min > 0.0) || !(dt_max >= dt_min))
        return Status::error(StatusCode::invalid_argument, "dt_min and dt_max are %g and %g, must be 0 < dt_min <= dt_max",
                             dt_min, dt_max);
    Random64 random(seed);
    const auto modes = static_cast<double>(M);
    const double deviation = M > 0 ? 1.0 / std::sqrt(modes) : 0.0;
    for (Index h = 0; h < H; ++h) {
        params.log_dt(h) = static_cast<P>(std::log(dt_min) + random.uniform() * (std::log(dt_max) - std::log(dt_min)));
        for (Index m = 0; m < M; ++m) {
            params.log_neg_re(h, m) = static_cast<P>(std::log(0.5));
            params.im(h, m) = static_cast<P>(modes / std::numbers::pi * (modes / (2.0 * static_cast<double>(m) + 1.0) - 1.0));
            params.B(h, m) = {P(1), P(0)};
            for (Index n = 0; n < M; ++n) params.C(h, m, n) = cast<P>(deviation * random.complex_normal());
        }
    }
    return {};
}

/// A published layer: q and k through short convolutions, keys and values through a norm, B fixed at one.
struct LayerConfig {
    Index query_heads = 0;
    Index kv_heads = 0;
    Index features = 0;   // R
    Index value_dim = 0;  // d
    Index modes = 0;      // M
    Index taps = 4;       // of the convolutions
};

/// Parameters of a layer beyond the projections that softmax attention has too: two depthwise convolutions with bias,
/// a scale shared by all heads and a bias for each, of keys and of values; A, C and dt. Complex numbers count twice.
constexpr Index parameter_count(const LayerConfig& c) {
    const Index convolutions = (c.query_heads + c.kv_heads) * c.features * (c.taps + 1);
    const Index norms = (c.features + c.value_dim) * (1 + c.kv_heads);
    return convolutions + norms + c.kv_heads * (2 * c.modes + 2 * c.modes * c.modes + 1);
}

/// Reals that a sequence's state takes, whatever its length: 2 M (R + d) a key/value head.
constexpr Index state_size(const LayerConfig& c) { return c.kv_heads * 2 * c.modes * (c.features + c.value_dim); }

}  // namespace interdomain
}  // namespace interstate::inline INTERSTATE_ABI
