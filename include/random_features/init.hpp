// Frequencies of random Fourier features.
#pragma once

#include <cmath>

#include <interstate/random.hpp>
#include <random_features/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace random_features {

/// W (H or 1, F, dh) normal of standard deviation 1 / bandwidth, so that xi(x) . xi(y) tends to
/// exp(-||x - y||^2 / (2 bandwidth^2)) as F grows (eq. 2). Deterministic in `seed` on every platform.
template <class P>
Status initialize(std::uint64_t seed, const View<P, 3>& W, double bandwidth = 1.0) {
    const Index heads = W.extent[0], F = W.extent[1], dh = W.extent[2];
    INTERSTATE_RETURN_IF_ERROR(check_view("W", W, {heads, F, dh}, Need::required));
    if (!(bandwidth > 0.0 && std::isfinite(bandwidth)))
        return Status::error(StatusCode::invalid_argument, "bandwidth is %g, must be positive and finite", bandwidth);
    Random64 random(seed);
    for (Index h = 0; h < heads; ++h)
        for (Index f = 0; f < F; ++f)
            for (Index c = 0; c < dh; ++c) W(h, f, c) = static_cast<P>(random.normal() / bandwidth);
    return {};
}

}  // namespace random_features
}  // namespace interstate::inline INTERSTATE_ABI
