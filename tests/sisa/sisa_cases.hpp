// Random cases of SISA in the ranges people use.
#pragma once

#include <sisa/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct SisaCase {
    Index batch = 1, queries = 1, keys = 1, query_heads = 1, kv_heads = 1, head_dim = 3, value_dim = 2,
          state_dim = 4;
    std::vector<double> cu_seqlens = {};  // packed where not empty
    bool upstream = true, softmax = true, bias = false;
    double half_life = 5.0;  // about, in tokens
};

inline Case make(const SisaCase& o, std::uint64_t seed) {
    Random r(seed);
    Case c;
    auto& t = c.tensors;
    t["q"] = r.normal({o.batch, o.queries, o.query_heads, o.head_dim});
    t["k"] = r.normal({o.batch, o.keys, o.kv_heads, o.head_dim});
    t["v"] = r.normal({o.batch, o.keys, o.kv_heads, o.value_dim});
    if (o.state_dim > 0) {
        t["C"] = r.normal({o.batch, o.queries, o.query_heads, o.state_dim});
        t["B"] = r.normal({o.batch, o.keys, o.kv_heads, o.state_dim});
        t["log_alpha"] = r.uniform({o.batch, o.keys, o.kv_heads}, -1.4 / o.half_life, -0.01 / o.half_life);
        t["theta"] = r.normal({o.batch, o.keys, o.kv_heads, o.state_dim / 2}, 0.3);
        t["lam"] = r.uniform({o.query_heads}, 0.2, 1.5);
    }
    if (o.bias) t["bias"] = r.normal({o.query_heads});
    if (!o.cu_seqlens.empty()) t["cu_seqlens"] = {{static_cast<Index>(o.cu_seqlens.size())}, o.cu_seqlens};
    if (o.upstream) t["dout.o"] = r.normal({o.batch, o.queries, o.query_heads, o.value_dim});
    if (o.upstream && o.softmax) t["dout.lse"] = r.normal({o.batch, o.queries, o.query_heads});
    return c;
}

inline std::string describe(const sisa::Options& o) {
    return std::string(o.mode == sisa::Mode::exact ? "exact" : "published") +
           (o.score == sisa::Score::softmax ? " softmax" : " sigmoid") +
           " window=" + std::to_string(o.window);
}

/// Every choice of what is computed.
inline std::vector<sisa::Options> all_options() {
    std::vector<sisa::Options> list;
    for (const auto mode : {sisa::Mode::exact, sisa::Mode::published})
        for (const auto score : {sisa::Score::softmax, sisa::Score::sigmoid})
            for (const Index window : {0, 3}) {
                sisa::Options o{.mode = mode, .window = window, .score = score};
                if (score == sisa::Score::sigmoid) o.bias = -0.7;
                if (window > 0) o.scale = 0.31;
                list.push_back(o);
            }
    return list;
}

}  // namespace interstate::test
