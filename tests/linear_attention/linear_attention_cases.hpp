// Random cases of linear attention.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include <linear_attention/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct LinearCase {
    Index batch = 1, length = 1, query_heads = 1, kv_heads = 1, head_dim = 4, value_dim = 4;
    std::vector<double> cu_seqlens = {};  // packed where not empty
    bool states = true, sums = false;     // s0 and dout.sT; z0 and dout.zT
    bool positive = false;                // queries and keys above 0: a denominator far from 0 with the identity
    double size = 1.0;                    // of queries and keys
};

inline Case make(const LinearCase& o, std::uint64_t seed) {
    Random r(seed);
    const Index states = o.cu_seqlens.empty() ? o.batch : static_cast<Index>(o.cu_seqlens.size()) - 1;
    Case c;
    auto& t = c.tensors;
    t["q"] = r.normal({o.batch, o.length, o.query_heads, o.head_dim}, o.size);
    t["k"] = r.normal({o.batch, o.length, o.kv_heads, o.head_dim}, o.size);
    t["v"] = r.normal({o.batch, o.length, o.kv_heads, o.value_dim});
    if (o.states) t["s0"] = r.normal({states, o.kv_heads, o.head_dim, o.value_dim});
    if (o.states && o.sums) t["z0"] = r.uniform({states, o.kv_heads, o.head_dim}, 0.5, 1.5);
    if (o.positive)
        for (const char* name : {"q", "k"})
            for (double& x : t[name].values) x = std::abs(x) + 0.1;
    if (!o.cu_seqlens.empty()) t["cu_seqlens"] = {{states + 1}, o.cu_seqlens};
    t["dout.o"] = r.normal({o.batch, o.length, o.query_heads, o.value_dim});
    if (o.states) t["dout.sT"] = r.normal({states, o.kv_heads, o.head_dim, o.value_dim});
    if (o.states && o.sums) t["dout.zT"] = r.normal({states, o.kv_heads, o.head_dim});
    return c;
}

inline std::string describe(const linear_attention::Options& o) {
    return std::string(o.feature_map == linear_attention::FeatureMap::elu1 ? "elu1" : "identity") + (o.divides() ? " normalized" : "");
}

/// The four forms: with or without elu1, divided or not.
inline std::vector<linear_attention::Options> linear_forms() {
    using namespace linear_attention;
    return {{}, {FeatureMap::elu1, Normalized::by_feature_map}, {FeatureMap::identity, Normalized::yes}, {FeatureMap::elu1, Normalized::no}};
}

/// With the states that a form has, and denominators far from zero.
inline Case of_form(const linear_attention::Options& options, LinearCase o, std::uint64_t seed) {
    o.sums = options.divides();
    o.positive = options.normalized == linear_attention::Normalized::yes;
    Case c = make(o, seed);
    if (o.positive && o.states)
        for (double& x : values(c, "s0")) x *= 0.1;
    return c;
}

/// Empty where every tensor is as close to the float64 truth on inputs rounded alike as its dtype promises: f64 1e-12, f32 1e-5, and 16-bit
/// storage that and the rounding of the tensor itself.
template <class T>
std::string beyond_tolerance(const Case& got, const Case& want) {
    std::string text;
    for (const TensorError& e : compare(got, want)) {
        const bool stored = e.name == "out.o" || e.name == "grad.q" || e.name == "grad.k" || e.name == "grad.v";
        const double bound = (sizeof(T) == 8 ? 1e-12 : 1e-5) + (sizeof(T) == 2 && stored ? 1.02 * rounding_floor<T>(want.tensors.at(e.name)) : 0.0);
        if (e.finite && e.relative <= bound) continue;
        char line[160];
        std::snprintf(line, sizeof line, "%s: %.2e, may be %.2e%s; ", e.name.c_str(), e.relative, bound, e.finite ? "" : ", not finite");
        text += line;
    }
    return text;
}

}  // namespace interstate::test
