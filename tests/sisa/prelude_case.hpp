// Inputs and results of SISA's prelude that own their memory.
#pragma once

#include <cstdint>
#include <vector>

#include <sisa/prelude.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

/// Where elements of a vector are for executors of the host; test::OnDevice says it for the device's.
struct OnHost {
    template <class E>
    E* operator()(std::vector<E>& x) const {
        return x.data();
    }
};

template <class T>
struct PreludeCase {
    Index B, L, Hkv, Hq;
    std::vector<T> alpha, dalpha;
    std::vector<double> b_alpha, lambda_raw, log_alpha, lam, up_alpha, up_lam, db, dlambda;
    std::vector<std::int32_t> cu;
    PreludeCase(Index batch, Index length, std::uint64_t seed) : B(batch), L(length), Hkv(3), Hq(6) {
        Random r(seed);
        const auto n = static_cast<std::size_t>(B * L * Hkv);
        for (std::size_t i = 0; i < n; ++i)
            alpha.push_back(T(3.0 * r.normal())), up_alpha.push_back(r.normal());
        for (Index h = 0; h < Hkv; ++h) b_alpha.push_back(-5.0 + r.normal());
        for (Index h = 0; h < Hq; ++h) lambda_raw.push_back(r.normal()), up_lam.push_back(r.normal());
        dalpha.assign(n, T(777.0f)), log_alpha.assign(n, 777.0), lam.assign(6, 777.0), db.assign(3, 777.0),
            dlambda.assign(6, 777.0);
    }
    template <class At>
    sisa::prelude::Inputs<T, double> in(At&& at) {
        sisa::prelude::Inputs<T, double> x{.alpha = view<const T>(at(alpha), {B, L, Hkv}),
                                           .b_alpha = view<const double>(at(b_alpha), {Hkv}),
                                           .lambda_raw = view<const double>(at(lambda_raw), {Hq})};
        if (!cu.empty()) x.cu_seqlens = view<const std::int32_t>(at(cu), {static_cast<Index>(cu.size())});
        return x;
    }
    template <class Exec, class At = OnHost>
    Status forward(const Exec& exec, At&& at = {}) {
        return sisa::prelude::forward(exec, in(at),
                                      sisa::prelude::Outputs<double>{view(at(log_alpha), {B, L, Hkv}), view(at(lam), {Hq})});
    }
    template <class Exec, class At = OnHost>
    Status backward(const Exec& exec, At&& at = {}) {
        return sisa::prelude::backward(
            exec, in(at), sisa::prelude::Upstream<double>{view<const double>(at(up_alpha), {B, L, Hkv}), view<const double>(at(up_lam), {Hq})},
            sisa::prelude::Grads<T, double>{view(at(dalpha), {B, L, Hkv}), view(at(db), {Hkv}), view(at(dlambda), {Hq})});
    }
};

}  // namespace interstate::test
