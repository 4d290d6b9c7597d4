// Random cases of attention by components, and the plain formula with operands of products rounded: what the 16-bit rule allows twice the
// error of.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <component_attention/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

struct ComponentCase {
    Index batch = 1, length = 1, query_heads = 1, kv_heads = 1, head_dim = 4, value_dim = 3;
    std::vector<double> cu_seqlens = {};  // packed where not empty
    bool lse = true, bias = false;        // dout.lse; bias
};

inline Case make(const ComponentCase& o, std::uint64_t seed) {
    Random r(seed);
    Case c;
    auto& t = c.tensors;
    t["q"] = r.normal({o.batch, o.length, o.query_heads, o.head_dim});
    t["k"] = r.normal({o.batch, o.length, o.kv_heads, o.head_dim});
    t["v"] = r.normal({o.batch, o.length, o.kv_heads, o.value_dim});
    if (o.bias) t["bias"] = r.normal({o.query_heads});
    if (!o.cu_seqlens.empty()) t["cu_seqlens"] = {{static_cast<Index>(o.cu_seqlens.size())}, o.cu_seqlens};
    t["dout.o"] = r.normal({o.batch, o.length, o.query_heads, o.value_dim});
    if (o.lse) t["dout.lse"] = r.normal({o.batch, o.length, o.query_heads});
    return c;
}
/// With lse where the options have it.
inline Case of_options(const component_attention::Options& options, ComponentCase o, std::uint64_t seed) {
    o.lse = options.score == component_attention::Score::softmax;
    return make(o, seed);
}

/// Every component; with every mask, and sigmoid once.
inline std::vector<component_attention::Options> all_component_options() {
    using component_attention::Component, component_attention::Score;
    std::vector<component_attention::Options> list;
    for (const auto component : {Component::both, Component::routing, Component::filtering}) {
        list.push_back({.component = component});
        list.push_back({.component = component, .causal = false});
        list.push_back({.component = component, .window = 5, .scale = -0.4});
        list.push_back({.component = component, .causal = false, .window = 4, .score = Score::sigmoid, .bias = -0.6});
    }
    return list;
}

inline std::string describe(const component_attention::Options& o) {
    static constexpr const char* components[] = {"both", "routing", "filtering"};
    return std::string(components[static_cast<int>(o.component)]) + (o.causal ? " causal" : " bidirectional") + " window " +
           std::to_string(o.window) + (o.score == component_attention::Score::softmax ? " softmax" : " sigmoid");
}

/// Weights and gradients of scores, operands of products, rounded to T, and so what each head and each of its two roles adds to a gradient.
template <class T>
Case rounded_formula(const component_attention::Options& options, const Case& c) {
    const auto round = [](double x) { return static_cast<double>(T(x)); };
    const HostTensor &q = c.tensors.at("q"), &k = c.tensors.at("k"), &v = c.tensors.at("v"), &up = c.tensors.at("dout.o");
    const Index B = q.extent[0], L = q.extent[1], Hq = q.extent[2], dh = q.extent[3], Hkv = k.extent[2], dv = v.extent[3];
    const auto zeros = [](const HostTensor& like) { return HostTensor{like.extent, std::vector<double>(like.values.size())}; };
    HostTensor o = zeros(up), dq = zeros(q), dk = zeros(k), dvalues = zeros(v),
               lse{{B, L, Hq}, std::vector<double>(static_cast<std::size_t>(B * L * Hq))};
    const auto inner = component_attention::attention_of(options);
    const double scale = attention::scale_of(inner, dh);
    const auto parts = component_attention::parts_of(options.component);
    const bool softmax = options.score == component_attention::Score::softmax, packed = c.tensors.contains("cu_seqlens");
    const auto offset = [&](Index n) { return static_cast<Index>(c.tensors.at("cu_seqlens").values[static_cast<std::size_t>(n)]); };
    const Index sequences = packed ? c.tensors.at("cu_seqlens").extent[0] - 1 : B;
    for (Index n = 0; n < sequences; ++n)
        for (Index h = 0; h < Hq; ++h) {
            const Index first = packed ? offset(n) : n * L, length = packed ? offset(n + 1) - first : L, kv = h / (Hq / Hkv);
            const auto row = [&](auto& x, Index t, Index head) {
                return x.values.data() + ((first + t) * x.extent[2] + head) * x.extent[3];
            };
            const auto dot = [](const double* x, const double* y, Index width) {
                double sum = 0.0;
                for (Index d = 0; d < width; ++d) sum += x[d] * y[d];
                return sum;
            };
            // What a row gets as a query and as a key, of both products.
            std::vector<double> as_query(static_cast<std::size_t>(4 * length * dh)), of_values(static_cast<std::size_t>(length * dv));
            const auto role = [&](int which, Index t) { return as_query.data() + (which * length + t) * dh; };
            for (Index i = 0; i < length; ++i) {
                const RowRange read = attention::keys_read(inner, i, length);
                std::vector<double> p, dp;
                double largest = -1e300, sum = 0.0, delta = 0.0;
                for (Index j = read.begin; j < read.end; ++j) {
                    p.push_back(scale *
                                (parts.own * dot(row(q, i, h), row(k, j, kv), dh) + parts.turned * dot(row(q, j, h), row(k, i, kv), dh)));
                    largest = std::max(largest, p.back());
                }
                const double bias = c.tensors.contains("bias") ? c.tensors.at("bias").values[static_cast<std::size_t>(h)] : options.bias;
                for (double& x : p) sum += x = softmax ? std::exp(x - largest) : 1.0 / (1.0 + std::exp(-x - bias));
                if (softmax) lse.values[static_cast<std::size_t>((first + i) * Hq + h)] = largest + std::log(sum);
                for (Index j = read.begin; j < read.end; ++j) {
                    double& x = p[static_cast<std::size_t>(j - read.begin)];
                    if (softmax) x /= sum;
                    dp.push_back(dot(row(up, i, h), row(v, j, kv), dv));
                    delta += x * dp.back();
                    for (Index d = 0; d < dv; ++d) {
                        row(o, i, h)[d] += round(x) * row(v, j, kv)[d];
                        of_values[static_cast<std::size_t>(j * dv + d)] += round(x) * row(up, i, h)[d];
                    }
                }
                const double dlse = softmax && c.tensors.contains("dout.lse")
                                        ? c.tensors.at("dout.lse").values[static_cast<std::size_t>((first + i) * Hq + h)]
                                        : 0.0;
                for (Index j = read.begin; j < read.end; ++j) {
                    const auto at = static_cast<std::size_t>(j - read.begin);
                    const double ds = scale * round(softmax ? p[at] * (dp[at] - delta + dlse) : p[at] * (1.0 - p[at]) * dp[at]);
                    for (Index d = 0; d < dh; ++d) {
                        role(0, i)[d] += parts.own * ds * row(k, j, kv)[d];
                        role(1, j)[d] += parts.turned * ds * row(k, i, kv)[d];
                        role(2, j)[d] += parts.own * ds * row(q, i, h)[d];
                        role(3, i)[d] += parts.turned * ds * row(q, j, h)[d];
                    }
                }
            }
            for (Index t = 0; t < length; ++t) {
                for (Index d = 0; d < dh; ++d) {
                    row(dq, t, h)[d] += round(role(0, t)[d]) + round(role(1, t)[d]);
                    row(dk, t, kv)[d] += round(role(2, t)[d]) + round(role(3, t)[d]);
                }
                for (Index d = 0; d < dv; ++d) row(dvalues, t, kv)[d] += round(of_values[static_cast<std::size_t>(t * dv + d)]);
            }
        }
    Case out;
    out.tensors = {{"out.o", o}, {"grad.q", dq}, {"grad.k", dk}, {"grad.v", dvalues}};
    if (softmax) out.tensors["out.lse"] = lse;
    return out;
}

/// Every tensor of `got` whose error against `want` is beyond its bound: float64 1e-12, float32 1e-5, 16 bits by the 16-bit rule.
template <class T>
std::string beyond_tolerance(const component_attention::Options& options, const Case& in, const Case& got, const Case& want) {
    const Case plain = sizeof(T) == 2 ? rounded_formula<T>(options, in) : Case{};
    std::string beyond;
    for (const TensorError& e : compare(got, want)) {
        double bound = sizeof(T) == 8 ? 1e-12 : 1e-5;
        if (sizeof(T) == 2 && e.name != "out.lse") {
            const HostTensor& truth = want.tensors.at(e.name);
            bound += 2.0 * compare("", plain.tensors.at(e.name), truth).relative + rounding_floor<T>(truth);
        }
        if (!e.finite || !(e.relative <= bound))
            beyond += e.name + ": " + std::to_string(e.relative) + " > " + std::to_string(bound) + "; ";
    }
    return beyond;
}

}  // namespace interstate::test
