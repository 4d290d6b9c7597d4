// Random cases of the output gate.
#pragma once

#include <gate/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct GateCase {
    Index batch = 1, length = 1, heads = 1, value_dim = 4;
    std::vector<double> cu_seqlens = {};
    double scale = 2.0;  // of g
    bool upstream = true;
};

inline Case make(const GateCase& o, std::uint64_t seed) {
    Random r(seed);
    const std::vector<Index> extent{o.batch, o.length, o.heads, o.value_dim};
    Case c;
    c.tensors["o"] = r.normal(extent);
    c.tensors["g"] = r.normal(extent, o.scale);
    if (o.upstream) c.tensors["dout.y"] = r.normal(extent);
    if (!o.cu_seqlens.empty()) c.tensors["cu_seqlens"] = {{static_cast<Index>(o.cu_seqlens.size())}, o.cu_seqlens};
    return c;
}

/// Every output is elementwise: f64 1e-12, f32 1e-6 and in 16 bits the cost of rounding alone.
template <class T>
std::string beyond_tolerance(const Case& got, const Case& want) {
    std::string text;
    const auto errors = compare(got, want);
    if (errors.empty()) return "nothing compared";
    for (const TensorError& e : errors) {
        const double bound = (std::is_same_v<T, double> ? 1e-12 : 1e-6) +
                             (sizeof(T) == 2 ? 1.02 * rounding_floor<T>(want.tensors.at(e.name)) : 0.0);
        if (!e.finite || !(e.relative <= bound)) text += e.name + ": " + std::to_string(e.relative / bound) + " times its bound; ";
    }
    return text;
}

}  // namespace interstate::test
