// Random cases of the decomposition, and dense matrices to check it by.
#pragma once

#include <sd_decomposition/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct DecompositionCase {
    Index batch = 1, length = 1, heads = 1, kv_heads = 1, head_dim = 4;
    double q_scale = 1.0, k_scale = 1.0;
    Index rank = 0;  // of Q and K each; 0 is full
};

/// A tensor (B, L, H, d) whose columns from `rank` on are sums of those before.
inline HostTensor of_rank(Random& r, const std::vector<Index>& extent, Index rank, double scale) {
    HostTensor t = r.normal(extent, scale);
    const auto d = static_cast<std::size_t>(extent[3]), from = static_cast<std::size_t>(rank);
    for (std::size_t i = 0; rank > 0 && i < t.values.size(); i += d)
        for (std::size_t c = from; c < d; ++c) t.values[i + c] = t.values[i + c % from] + t.values[i + (c + 1) % from];
    return t;
}

inline Case make(const DecompositionCase& o, std::uint64_t seed) {
    Random r(seed);
    Case c;
    c.tensors["Q"] = of_rank(r, {o.batch, o.length, o.heads, o.head_dim}, o.rank, o.q_scale);
    c.tensors["K"] = of_rank(r, {o.batch, o.length, o.kv_heads, o.head_dim}, o.rank, o.k_scale);
    return c;
}

/// What `got` misses of `want`, in units of the bound: singular values relative to the largest of S and F of their head
/// (bound), norms to that of A, measures to themselves where `measures` (a small factor more).
inline double worst_error(const Case& got, const Case& want, bool measures = true) {
    const auto at = [](const Case& c, const std::string& name) -> const HostTensor& { return c.tensors.at("out." + name); };
    double worst = 0.0;
    const auto hold = [&](double difference, double size) {
        const double relative = difference == 0.0 ? 0.0 : difference / size;
        worst = relative <= worst ? worst : relative;  // NaN is kept
    };
    const HostTensor& s = at(want, "routing_singular_values");
    const std::size_t heads = at(want, "norm").values.size(), n = heads == 0 ? 0 : s.values.size() / heads;
    for (std::size_t h = 0; h < heads; ++h) {
        const double norm = at(want, "norm").values[h];
        double largest = 0.0;
        for (const char* part : {"routing_singular_values", "filtering_singular_values"})
            if (n > 0) largest = std::max(largest, at(want, part).values[h * n]);
        for (const char* part : {"routing_singular_values", "filtering_singular_values"})
            for (std::size_t i = h * n; i < (h + 1) * n; ++i)
                hold(std::abs(at(got, part).values[i] - at(want, part).values[i]), largest);
        for (const char* name : {"norm", "routing_norm", "filtering_norm"})
            hold(std::abs(at(got, name).values[h] - at(want, name).values[h]), norm);
        hold(std::abs(at(got, "routing_energy").values[h] - at(want, "routing_energy").values[h]), 1.0);
        for (const char* part : {"routing_", "filtering_"})
            for (const char* name : {"effective_rank", "participation_ratio", "stable_rank"}) {
                const double x = at(want, std::string(part) + name).values[h], y = at(got, std::string(part) + name).values[h];
                if (measures || x == 0.0 || std::isnan(x) || std::isnan(y)) hold(std::abs(y - x), x == 0.0 ? 1e-300 : 10.0 * x);
            }
    }
    return worst;
}

}  // namespace interstate::test
