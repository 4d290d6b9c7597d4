// Random S4D cases in the ranges people use.
#pragma once

#include <s4d/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct S4dCase {
    Index batch = 1, length = 1, channels = 1, modes = 1;
    std::vector<double> cu_seqlens = {};  // packed where not empty
    bool initial_state = true, feedthrough = true, upstream = true;
    double decay = 0.5;  // -Re A
    bool bidirectional = false;
};

inline Case make(const S4dCase& o, std::uint64_t seed) {
    Random r(seed);
    const Index B = o.batch, L = o.length, H = o.channels, N = o.modes;
    const Index states = o.cu_seqlens.empty() ? B : static_cast<Index>(o.cu_seqlens.size()) - 1;
    Case c;
    auto& t = c.tensors;
    t["u"] = r.normal({B, L, H});
    t["log_dt"] = r.uniform({H}, std::log(1e-3), std::log(1e-1));
    t["log_neg_re"] = r.normal({H, N}, 0.1);
    for (double& x : t["log_neg_re"].values) x += std::log(o.decay);
    t["im"] = r.uniform({H, N}, 0.0, std::numbers::pi * static_cast<double>(N));
    t["B"] = r.normal({H, N, 2});
    t["C"] = r.normal({H, N, 2});
    if (o.bidirectional) t["C_reverse"] = r.normal({H, N, 2});
    if (o.feedthrough) t["D"] = r.normal({H});
    if (o.initial_state) t["x0"] = r.normal({states, H, N, 2});
    if (!o.cu_seqlens.empty()) t["cu_seqlens"] = {{states + 1}, o.cu_seqlens};
    if (o.upstream) {
        t["dout.y"] = r.normal({B, L, H});
        t["dout.xT"] = r.normal({states, H, N, 2});
    }
    return c;
}

/// How far a tensor may be from its float64 truth on inputs rounded alike: f64 1e-12, f32 1e-5, 16-bit storage 1e-5
/// and, where the tensor itself is `stored` in 16 bits, the cost of rounding it. That is the 16-bit rule, the plain
/// formula having no matrix products.
template <class T>
double tolerance(const HostTensor& want, bool stored) {
    return (std::is_same_v<T, double> ? 1e-12 : 1e-5) +
           (sizeof(T) == 2 && stored ? 1.02 * rounding_floor<T>(want) : 0.0);
}

/// Empty where every tensor of `got` is as close to the float64 truth as its dtype promises. `factors` is what
/// rounding the factors of matrix products may add, where a kernel has them. It is relative to what is added up:
/// for the gradient of log_dt, to the terms of dt A and Bbar, which may cancel.
template <class T>
std::string beyond_tolerance(const Case& inputs, const Case& got, const Case& want, double factors = 0.0) {
    std::string text;
    const auto errors = compare(got, want);
    const auto cancelled = [&] {
        const auto& t = want.tensors;
        double terms = 0.0, sums = 0.0;
        const auto& log_dt = t.at("grad.log_dt").values;
        const std::size_t N = log_dt.empty() ? 0 : t.at("grad.im").values.size() / log_dt.size();
        for (std::size_t h = 0; h < log_dt.size(); ++h) {
            double size = 0.0;
            for (std::size_t n = h * N; n < (h + 1) * N; ++n) {
                const double im = inputs.tensors.at("im").values[n] * t.at("grad.im").values[n];
                const auto& B = inputs.tensors.at("B").values;
                const auto& dB = t.at("grad.B").values;
                size += std::abs(t.at("grad.log_neg_re").values[n]) + std::abs(im) +
                        std::hypot(B[2 * n], B[2 * n + 1]) * std::hypot(dB[2 * n], dB[2 * n + 1]);
            }
            terms += size * size;
            sums += log_dt[h] * log_dt[h];
        }
        return sums > 0.0 ? std::sqrt(terms / sums) : 1.0;
    };
    if (errors.empty()) return "nothing compared";
    for (const TensorError& e : errors) {
        if (!e.finite) {
            text += e.name + ": not finite, or of another shape; ";
            continue;
        }
        double bound = tolerance<T>(want.tensors.at(e.name), e.name == "out.y" || e.name == "grad.u");
        if (factors > 0.0) bound += e.name == "grad.log_dt" ? factors * cancelled() : factors;
        // A gradient below the range of float may come out as zero (float's smallest normal is 1e-38).
        const bool vanishes = sizeof(T) < 8 && e.largest < 1e-37;
        if (!(e.relative <= bound || vanishes))
            text += e.name + ": " + std::to_string(e.relative / bound) + " times its bound; ";
    }
    return text;
}

}  // namespace interstate::test
