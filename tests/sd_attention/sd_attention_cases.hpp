// Random cases of S-D attention.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include <sd_attention/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct SdCase {
    Index batch = 1, length = 1, heads = 1, channels = 4, value_dim = 3, planes = -1;
    std::vector<double> cu_seqlens = {};  // packed where not empty
    bool lse = false;                     // dout.lse
    double size = 1.0;                    // of u
    bool unit = false;                    // a generator of about unit size whatever r is, so that scores do not grow with it
};

inline Case make(const SdCase& o, std::uint64_t seed) {
    Random r(seed);
    Case c;
    auto& t = c.tensors;
    const double small = o.unit ? 1.0 / std::sqrt(static_cast<double>(std::max<Index>(o.channels, 1))) : 1.0;
    t["u"] = r.normal({o.batch, o.length, o.heads, o.channels}, o.size);
    t["v"] = r.normal({o.batch, o.length, o.heads, o.value_dim});
    if (o.planes < 0) {
        t["P"] = r.normal({o.heads, o.channels, o.channels}, small);
    } else {
        t["a"] = r.normal({o.heads, o.planes, o.channels}, small);
        t["b"] = r.normal({o.heads, o.planes, o.channels});
    }
    t["delta"] = r.normal({o.heads, o.channels});
    if (!o.cu_seqlens.empty()) t["cu_seqlens"] = {{static_cast<Index>(o.cu_seqlens.size())}, o.cu_seqlens};
    t["dout.o"] = r.normal({o.batch, o.length, o.heads, o.value_dim});
    if (o.lse) t["dout.lse"] = r.normal({o.batch, o.length, o.heads});
    return c;
}

inline std::vector<sd_attention::Options> all_sd_options() {
    using sd_attention::Component, sd_attention::Normalizer;
    std::vector<sd_attention::Options> list;
    for (const auto normalizer : {Normalizer::softmax, Normalizer::identity, Normalizer::elu1})
        for (const auto component : {Component::both, Component::routing, Component::filtering}) list.push_back({normalizer, component});
    return list;
}

inline std::string describe(const sd_attention::Options& o) {
    static constexpr const char* normalizers[] = {"softmax", "identity", "elu1"};
    static constexpr const char* components[] = {"both", "routing", "filtering"};
    return std::string(normalizers[static_cast<int>(o.normalizer)]) + " " + components[static_cast<int>(o.component)];
}

}  // namespace interstate::test
