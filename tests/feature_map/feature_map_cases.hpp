// Random cases of the feature map.
#pragma once

#include <feature_map/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct FeatureMapCase {
    Index batch = 1, length = 1, heads = 1, features = 4, taps = 4;  // taps 0: no convolution
    std::vector<double> cu_seqlens = {};                            // packed where not empty
    bool state = true, offset = true, conv_bias = true, upstream = true;
    double scale = 1.0;  // of x
};

/// Tensors of the stages that `options` runs.
inline Case make(const FeatureMapCase& o, const feature_map::Options& options, std::uint64_t seed) {
    Random r(seed);
    const Index states = o.cu_seqlens.empty() ? o.batch : static_cast<Index>(o.cu_seqlens.size()) - 1;
    const Index H = o.heads, R = o.features, past = o.taps > 1 ? o.taps - 1 : 0;
    Case c;
    auto& t = c.tensors;
    t["x"] = r.normal({o.batch, o.length, H, R}, o.scale);
    if (o.taps > 0) {
        t["conv_weight"] = r.normal({H, R, o.taps}, 0.5);
        if (o.conv_bias) t["conv_bias"] = r.normal({H, R}, 0.3);
        if (o.state) t["conv0"] = r.normal({states, past, H, R}, o.scale);
    }
    if (options.rms) {
        t["scale"] = r.normal({R}, 0.2);
        for (double& x : t["scale"].values) x += 1.0;
        t["bias"] = r.normal({H, R}, 0.3);
    }
    if (options.rope != feature_map::Rope::none && o.offset) {
        t["offset"] = r.uniform({states}, 0.0, 3000.0);
        for (double& x : t["offset"].values) x = std::floor(x);
    }
    if (!o.cu_seqlens.empty()) t["cu_seqlens"] = {{states + 1}, o.cu_seqlens};
    if (o.upstream) {
        t["dout.y"] = r.normal({o.batch, o.length, H, R});
        if (o.taps > 0) t["dout.convT"] = r.normal({states, past, H, R});
    }
    return c;
}

/// Every layout of RoPE with every choice of the stages after it.
inline std::vector<feature_map::Options> all_options() {
    std::vector<feature_map::Options> list;
    for (const auto rope : {feature_map::Rope::none, feature_map::Rope::interleaved, feature_map::Rope::half_split})
        for (const auto activation : {feature_map::Activation::none, feature_map::Activation::silu})
            for (const int norms : {0, 1, 2, 3}) {
                feature_map::Options options{.rope = rope, .activation = activation};
                options.l2 = norms & 1;
                options.rms = norms & 2;
                list.push_back(options);
            }
    return list;
}

inline std::string describe(const feature_map::Options& options) {
    return std::string("rope=") + to_string(options.rope) +
           (options.activation == feature_map::Activation::silu ? " silu" : "") + (options.l2 ? " l2" : "") +
           (options.rms ? " rms" : "");
}

/// How far a tensor may be from its float64 truth on inputs rounded alike: f64 (with f64 parameters) 1e-12, all others 1e-5 and, where the
/// tensor is stored in 16 bits, the cost of rounding it: that is the 16-bit rule, there being no matrix products.
template <class T, class P>
std::string beyond_tolerance(const Case& got, const Case& want) {
    std::string text;
    const auto errors = compare(got, want);
    if (errors.empty()) return "nothing compared";
    for (const TensorError& e : errors) {
        if (!e.finite) {
            text += e.name + ": not finite, missing or of another shape; ";
            continue;
        }
        const bool stored = e.name == "out.y" || e.name == "out.convT" || e.name == "grad.x" || e.name == "grad.conv0";
        const double bound = (std::is_same_v<T, double> && std::is_same_v<P, double> ? 1e-12 : 1e-5) +
                             (sizeof(T) == 2 && stored ? 1.02 * rounding_floor<T>(want.tensors.at(e.name)) : 0.0);
        if (!(e.relative <= bound)) text += e.name + ": " + std::to_string(e.relative / bound) + " times its bound; ";
    }
    return text;
}

}  // namespace interstate::test
