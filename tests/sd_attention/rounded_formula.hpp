// S-D attention by the plain formula with operands of products rounded: what the 16-bit rule allows twice the error of.
#pragma once

#include <algorithm>
#include <cmath>

#include <sd_attention/reference.hpp>

#include "sd_attention_cases.hpp"

namespace interstate::test {

/// Attention or linear attention of q, k and v, pair by pair, with features, weights and the gradients of scores, operands of products,
/// rounded to T: o, lse of softmax, and where there is dout the gradients of q, k and v.
template <class T>
Case rounded_pairs(const sd_attention::Options& options, const Case& c) {
    const auto round = [](double x) { return static_cast<double>(T(x)); };
    const bool softmax = options.softmax(), elu1 = options.normalizer == sd_attention::Normalizer::elu1, back = c.tensors.contains("dout.o");
    HostTensor q = c.tensors.at("q"), k = c.tensors.at("k");
    const HostTensor& v = c.tensors.at("v");
    const Index B = q.extent[0], L = q.extent[1], H = q.extent[2], r = q.extent[3], dv = v.extent[3];
    if (elu1)
        for (HostTensor* x : {&q, &k})
            for (double& value : x->values) value = round(linear_attention::feature(linear_attention::FeatureMap::elu1, value));
    const auto zeros = [](const HostTensor& like) { return HostTensor{like.extent, std::vector<double>(like.values.size())}; };
    HostTensor o = zeros(v), lse{{B, L, H}, std::vector<double>(static_cast<std::size_t>(B * L * H))}, dq = zeros(q), dk = zeros(k), dvalues = zeros(v);
    std::vector<Index> cu;
    if (c.tensors.contains("cu_seqlens"))
        for (const double x : c.tensors.at("cu_seqlens").values) cu.push_back(static_cast<Index>(x));
    const double scale = softmax ? 1.0 / std::sqrt(static_cast<double>(std::max<Index>(r, 1))) : 1.0;
    const auto slope = [&](double phi) { return elu1 ? std::min(1.0, phi) : 1.0; };
    const Index sequences = cu.empty() ? B : static_cast<Index>(cu.size()) - 1;
    for (Index n = 0; n < sequences; ++n)
        for (Index h = 0; h < H; ++h) {
            const RowRange rows = cu.empty() ? RowRange{n * L, (n + 1) * L} : RowRange{cu[static_cast<std::size_t>(n)], cu[static_cast<std::size_t>(n) + 1]};
            for (Index i = rows.begin; i < rows.end; ++i) {
                const auto at = [&](HostTensor& x, Index t) { return x.values.data() + (t * H + h) * x.extent[3]; };
                const auto from = [&](const HostTensor& x, Index t) { return x.values.data() + (t * H + h) * x.extent[3]; };
                std::vector<double> p, dp;
                double sum = 0.0, largest = -1e300, along = 0.0;
                for (Index j = rows.begin; j <= i; ++j) {
                    double dot = 0.0;
                    for (Index e = 0; e < r; ++e) dot += at(q, i)[e] * at(k, j)[e];
                    p.push_back(scale * dot), largest = std::max(largest, scale * dot);
                }
                for (double& x : p) sum += softmax ? x = std::exp(x - largest) : x;
                if (softmax) lse.values[static_cast<std::size_t>(i * H + h)] = largest + std::log(sum);
                const double over = !softmax && !elu1 ? 1.0 : sum == 0.0 ? 0.0 : 1.0 / sum;
                const double* const up = back ? from(c.tensors.at("dout.o"), i) : nullptr;
                for (Index j = rows.begin; j <= i; ++j) {
                    const double weight = round(p[static_cast<std::size_t>(j - rows.begin)]);
                    dp.push_back(0.0);
                    for (Index e = 0; e < dv; ++e) {
                        at(o, i)[e] += weight * over * from(v, j)[e];
                        if (!back) continue;
                        at(dvalues, j)[e] += round(p[static_cast<std::size_t>(j - rows.begin)] * over) * up[e];
                        dp.back() += up[e] * from(v, j)[e];
                    }
                }
                if (!back) continue;
                for (Index e = 0; e < dv; ++e) along += round(at(o, i)[e]) * up[e];
                if (c.tensors.contains("dout.lse")) along -= c.tensors.at("dout.lse").values[static_cast<std::size_t>(i * H + h)];
                for (Index j = rows.begin; j <= i; ++j) {
                    const double share = dp[static_cast<std::size_t>(j - rows.begin)] - (softmax || elu1 ? along : 0.0);
                    const double ds = scale * round(share * over * (softmax ? p[static_cast<std::size_t>(j - rows.begin)] : 1.0));
                    for (Index e = 0; e < r; ++e) {
                        at(dq, i)[e] += ds * at(k, j)[e] * slope(at(q, i)[e]);
                        at(dk, j)[e] += ds * at(q, i)[e] * slope(at(k, j)[e]);
                    }
                }
            }
        }
    Case out;
    out.tensors = {{"out.o", o}, {"grad.q", dq}, {"grad.k", dk}, {"grad.v", dvalues}};
    if (softmax) out.tensors["out.lse"] = lse;
    return out;
}

/// The plain formula with operands of products rounded to T and all else exact.
template <class T>
Case rounded_formula(const sd_attention::Options& options, const Case& c) {
    const auto round = [](double x) { return static_cast<double>(T(x)); };
    const auto& u = c.tensors.at("u");
    const Index B = u.extent[0], L = u.extent[1], H = u.extent[2], r = u.extent[3];
    sd_attention::Generator<double> g;
    for (auto [name, view_of] : {std::pair{"P", &g.P}, std::pair{"a", &g.a}, std::pair{"b", &g.b}})
        if (c.tensors.contains(name)) {
            const auto& e = c.tensors.at(name).extent;
            *view_of = view(c.tensors.at(name).values.data(), {e[0], e[1], e[2]});
        }
    g.delta = view(c.tensors.at("delta").values.data(), {H, r});
    const sd_attention::Shape s{.heads = H, .channels = r, .planes = c.tensors.contains("a") ? c.tensors.at("a").extent[1] : -1};
    std::vector<double> K(r * r);
    Case inner, results;
    inner.tensors["q"] = u, inner.tensors["k"] = u, inner.tensors["v"] = c.tensors.at("v");
    for (const char* name : {"cu_seqlens", "dout.o", "dout.lse"})
        if (c.tensors.contains(name)) inner.tensors[name] = c.tensors.at(name);
    const double factor = sd_attention::detail::factor_of(options, s);
    const auto generator = [&](Index h) {
        sd_attention::detail::make_generator(options, s, g, h, K.data());
        for (double& x : K) x = round(x);
    };
    for (Index h = 0; h < H; ++h) {
        generator(h);
        for (Index t = 0; t < B * L; ++t)
            for (Index j = 0; j < r; ++j) {
                double sum = 0.0;
                for (Index i = 0; i < r; ++i) sum += u.values[(t * H + h) * r + i] * K[i * r + j];
                values(inner, "q")[(t * H + h) * r + j] = round(factor * sum);
            }
    }
    results = rounded_pairs<T>(options, inner);
    Case out;
    out.tensors["out.o"] = results.tensors["out.o"];
    if (options.softmax()) out.tensors["out.lse"] = results.tensors["out.lse"];
    if (!c.tensors.contains("dout.o")) return out;
    out.tensors["grad.v"] = results.tensors["grad.v"];
    HostTensor du = results.tensors["grad.k"];
    sd_attention::BasicGenerator<double> gradient;
    for (auto [name, view_of] : {std::pair{"P", &gradient.P}, std::pair{"a", &gradient.a}, std::pair{"b", &gradient.b}})
        if (c.tensors.contains(name)) {
            auto& to = out.tensors["grad." + std::string(name)] = c.tensors.at(name);
            *view_of = view(to.values.data(), {to.extent[0], to.extent[1], to.extent[2]});
        }
    out.tensors["grad.delta"] = c.tensors.at("delta");
    gradient.delta = view(values(out, "grad.delta").data(), {H, r});
    for (Index h = 0; h < H; ++h) {
        generator(h);
        std::vector<double> dK(r * r);
        for (Index t = 0; t < B * L; ++t)
            for (Index i = 0; i < r; ++i)
                for (Index j = 0; j < r; ++j) {
                    const double dx = round(factor * values(results, "grad.q")[(t * H + h) * r + j]);
                    du.values[(t * H + h) * r + i] += K[i * r + j] * dx;
                    if (dx != 0.0) dK[i * r + j] += u.values[(t * H + h) * r + i] * dx;  // no u of rows of no sequence, which may be NaN
                }
        sd_attention::detail::generator_gradients(options, s, g, gradient, h, dK.data());
    }
    out.tensors["grad.u"] = du;
    return out;
}

/// ||x||.
inline double norm_of(const HostTensor& x) {
    double sum = 0.0;
    for (const double value : x.values) sum += value * value;
    return std::sqrt(sum);
}

}  // namespace interstate::test
