// Random cases of Interdomain Attention in the ranges people use.
#pragma once

#include <interdomain/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct InterdomainCase {
    Index batch = 1, length = 1, query_heads = 1, kv_heads = 1, features = 4, value_dim = 4, modes = 4;
    std::vector<double> cu_seqlens = {};  // packed where not empty
    bool initial_state = true, upstream = true;
    bool normalizer = false;  // adds eta0 and dout.etaT
    double decay = 0.5;       // -Re A
};

inline Case make(const InterdomainCase& o, std::uint64_t seed) {
    Random r(seed);
    const Index states = o.cu_seqlens.empty() ? o.batch : static_cast<Index>(o.cu_seqlens.size()) - 1;
    const Index M = o.modes, Hkv = o.kv_heads, W = o.features + o.value_dim;
    Case c;
    auto& t = c.tensors;
    t["q"] = r.normal({o.batch, o.length, o.query_heads, o.features});
    t["k"] = r.normal({o.batch, o.length, Hkv, o.features});
    t["v"] = r.normal({o.batch, o.length, Hkv, o.value_dim});
    t["log_dt"] = r.uniform({Hkv}, std::log(1e-3), std::log(1e-1));
    t["log_neg_re"] = r.normal({Hkv, M}, 0.1);
    for (double& x : t["log_neg_re"].values) x += std::log(o.decay);
    t["im"] = r.uniform({Hkv, M}, 0.0, static_cast<double>(M));
    t["B"] = r.normal({Hkv, M, 2});
    t["C"] = r.normal({Hkv, M, M, 2}, 1.0 / static_cast<double>(M));
    if (o.initial_state) t["x0"] = r.normal({states, Hkv, M, W, 2});
    if (o.initial_state && o.normalizer) t["eta0"] = r.normal({states, Hkv, M, 2});
    if (!o.cu_seqlens.empty()) t["cu_seqlens"] = {{states + 1}, o.cu_seqlens};
    if (o.upstream) {
        t["dout.o"] = r.normal({o.batch, o.length, o.query_heads, o.value_dim});
        t["dout.xT"] = r.normal({states, Hkv, M, W, 2});
        if (o.normalizer) t["dout.etaT"] = r.normal({states, Hkv, M, 2});
    }
    return c;
}

}  // namespace interstate::test
