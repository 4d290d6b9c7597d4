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

/// Every choice of what is computed.
inline std::vector<interdomain::Options> all_options() {
    using namespace interdomain;
    std::vector<Options> list;
    for (const auto disc : {Discretization::zoh, Discretization::raw})
        for (const auto readout : {Readout::complex_product, Readout::real_parts})
            for (const auto normalizer : {Normalizer::none, Normalizer::nadaraya_watson})
                list.push_back({disc, readout, normalizer});
    return list;
}

/// How far a tensor may be from its float64 truth on inputs rounded alike: f64 1e-12, f32 1e-5, 16-bit storage 1e-5,
/// and the cost of rounding the tensor itself to 16 bits, or to float parameters of float64 storage. (The 16-bit rule
/// allows what rounding the factors of products costs, too; a kernel that multiplies in float needs none of that.)
template <class T, class P = param_t<T>>
double tolerance(const std::string& name, const HostTensor& want) {
    const bool tokens = name == "out.o" || name == "grad.q" || name == "grad.k" || name == "grad.v";
    const bool parameter = name.starts_with("grad.") && !tokens && name != "grad.x0" && name != "grad.eta0";
    return (std::is_same_v<T, double> ? 1e-12 : 1e-5) + (sizeof(T) == 2 && tokens ? 1.02 * rounding_floor<T>(want) : 0.0) +
           (sizeof(P) < sizeof(T) && parameter ? 1.02 * rounding_floor<P>(want) : 0.0);
}

/// Empty where every tensor of `got` is as close to the float64 truth as its dtype promises, or `loosen` times that.
/// The gradient of log_dt is relative to the terms it sums, those of dt A and Bbar, which may cancel.
template <class T, class P = param_t<T>>
std::string beyond_tolerance(const Case& inputs, const Case& got, const Case& want, double loosen = 1.0) {
    std::string text;
    const auto cancelled = [&] {
        const auto& t = want.tensors;
        const auto& log_dt = t.at("grad.log_dt").values;
        const std::size_t M = log_dt.empty() ? 0 : t.at("grad.im").values.size() / log_dt.size();
        double terms = 0.0, sums = 0.0;
        for (std::size_t h = 0; h < log_dt.size(); ++h) {
            double size = 0.0;
            for (std::size_t m = h * M; m < (h + 1) * M; ++m) {
                const auto& B = inputs.tensors.at("B").values;
                const auto& dB = t.at("grad.B").values;
                size += std::abs(t.at("grad.log_neg_re").values[m]) +
                        std::abs(inputs.tensors.at("im").values[m] * t.at("grad.im").values[m]) +
                        std::hypot(B[2 * m], B[2 * m + 1]) * std::hypot(dB[2 * m], dB[2 * m + 1]);
            }
            terms += size * size;
            sums += log_dt[h] * log_dt[h];
        }
        return sums > 0.0 ? std::max(1.0, std::sqrt(terms / sums)) : 1.0;
    };
    const auto errors = compare(got, want);
    if (errors.empty()) return "nothing compared";
    for (const TensorError& e : errors) {
        if (!e.finite) {
            text += e.name + ": not finite, or of another shape; ";
            continue;
        }
        double bound = loosen * tolerance<T, P>(e.name, want.tensors.at(e.name));
        if (e.name == "grad.log_dt") bound *= cancelled();
        // A gradient below the range of float may come out as zero (float's smallest normal is 1e-38).
        const bool vanishes = sizeof(T) < 8 && e.largest < 1e-37;
        if (!(e.relative <= bound || vanishes))
            text += e.name + ": " + std::to_string(e.relative / bound) + " times its bound; ";
    }
    return text;
}

}  // namespace interstate::test
