// Random cases of random Fourier features.
#pragma once

#include <random_features/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct RandomFeaturesCase {
    Index batch = 1, length = 1, heads = 1, head_dim = 4, frequencies = 3;
    bool shared = false;  // one W for all heads
    std::vector<double> cu_seqlens = {};
    double bandwidth = 1.0;
    bool upstream = true;
};

inline Case make(const RandomFeaturesCase& o, std::uint64_t seed) {
    Random r(seed);
    Case c;
    // Heads of size dh have length about 1.
    const double size = 1.0 / std::sqrt(static_cast<double>(std::max<Index>(o.head_dim, 1)));
    c.tensors["x"] = r.normal({o.batch, o.length, o.heads, o.head_dim}, size);
    c.tensors["W"] = r.normal({o.shared ? 1 : o.heads, o.frequencies, o.head_dim}, 1.0 / o.bandwidth);
    if (o.upstream) c.tensors["dout.y"] = r.normal({o.batch, o.length, o.heads, 2 * o.frequencies});
    if (!o.cu_seqlens.empty()) c.tensors["cu_seqlens"] = {{static_cast<Index>(o.cu_seqlens.size())}, o.cu_seqlens};
    return c;
}

/// f64 (with f64 frequencies) 1e-12, all others 1e-5 and, where the tensor is stored in 16 bits, the cost of rounding it.
/// An error of a phase is relative to the phase: `largest` is that of the case.
template <class T, class P>
std::string beyond_tolerance(const Case& got, const Case& want, double largest = 1.0) {
    std::string text;
    const auto errors = compare(got, want);
    if (errors.empty()) return "nothing compared";
    for (const TensorError& e : errors) {
        const bool stored = e.name != "grad.W";
        const double bound = largest * (std::is_same_v<T, double> && std::is_same_v<P, double> ? 1e-12 : 1e-5) +
                             (sizeof(T) == 2 && stored ? 1.02 * rounding_floor<T>(want.tensors.at(e.name)) : 0.0);
        if (!e.finite || !(e.relative <= bound)) text += e.name + ": " + std::to_string(e.relative / bound) + " times its bound; ";
    }
    return text;
}

}  // namespace interstate::test
