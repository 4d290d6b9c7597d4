// The reference of attention by components: the matrices written out, finite differences, what the components are to each other, errors.
#include <gtest/gtest.h>

#include <component_attention/reference.hpp>

#include "../support/differences.hpp"
#include "component_cases.hpp"

namespace interstate::test {
namespace {

using component_attention::Component;
using component_attention::Operator;
using component_attention::Options;

Case run(const Options& options, const Case& c) {
    Case results;
    const Status status = run_case<Operator, double, double>(reference{}, options, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

TEST(ComponentAttentionReference, IsTheSoftmaxOfAPartOfTheMatrix) {
    constexpr Index L = 5, d = 3;
    for (const auto component : {Component::both, Component::routing, Component::filtering})
        for (const bool causal : {true, false}) {
            Case c = make({.length = L, .head_dim = d, .value_dim = 2}, 1), got = run({.component = component, .causal = causal}, c);
            double A[L][L] = {};
            for (Index i = 0; i < L; ++i)
                for (Index j = 0; j < L; ++j)
                    for (Index e = 0; e < d; ++e) A[i][j] += values(c, "q")[i * d + e] * values(c, "k")[j * d + e] / std::sqrt(double(d));
            for (Index i = 0; i < L; ++i) {
                double total = 0.0, o[2] = {};
                for (Index j = 0; j < (causal ? i + 1 : L); ++j) {
                    const double S = (A[i][j] - A[j][i]) / 2, F = (A[i][j] + A[j][i]) / 2;
                    const double weight = std::exp(component == Component::both ? A[i][j] : component == Component::routing ? S : F);
                    total += weight;
                    for (Index e = 0; e < 2; ++e) o[e] += weight * values(c, "v")[j * 2 + e];
                }
                EXPECT_NEAR(values(got, "out.lse")[i], std::log(total), 1e-13);
                for (Index e = 0; e < 2; ++e) EXPECT_NEAR(values(got, "out.o")[i * 2 + e], o[e] / total, 1e-13);
            }
        }
}

TEST(ComponentAttentionReference, GradientsMatchFiniteDifferences) {
    for (const Options& options : all_component_options())
        for (const bool packed : {false, true}) {
            ComponentCase o{.batch = packed ? 1 : 2, .length = 7, .query_heads = 4, .kv_heads = 2, .head_dim = 3, .value_dim = 2};
            if (packed) o.cu_seqlens = {1, 3, 3, 6};
            const Case c = of_options(options, o, 2), got = run(options, c);
            for (const char* name : {"q", "k", "v"})
                EXPECT_LE(difference_error(c, got, name, 1e-4, 1, [&](const Case& x) { return run(options, x); }), 1e-7)
                    << name << " " << describe(options);
        }
}

/// Keys that are the queries make A symmetric: nothing is routed, and filtering is all of attention.
TEST(ComponentAttentionReference, SymmetricScoresOnlyFilter) {
    Case c = make({.length = 9, .query_heads = 2, .kv_heads = 2}, 3);
    c.tensors["k"] = c.tensors["q"];
    Case routing = run({.component = Component::routing}, c), filtering = run({.component = Component::filtering}, c), both = run({}, c);
    EXPECT_EQ(values(filtering, "out.o"), values(both, "out.o"));
    for (Index i = 0; i < 9; ++i)
        for (Index h = 0; h < 2; ++h) {
            EXPECT_NEAR(values(routing, "out.lse")[i * 2 + h], std::log(double(i + 1)), 1e-13);
            for (Index e = 0; e < 3; ++e) {
                double mean = 0.0;
                for (Index j = 0; j <= i; ++j) mean += values(c, "v")[(j * 2 + h) * 3 + e] / double(i + 1);
                EXPECT_NEAR(values(routing, "out.o")[(i * 2 + h) * 3 + e], mean, 1e-13);
            }
        }
}

TEST(ComponentAttentionReference, ErrorsNameTheArgument) {
    const auto message = [](const Options& options, const Case& c) {
        Case results;
        const Status s = run_case<Operator, double, double>(reference{}, options, c, results);
        EXPECT_FALSE(s.ok());
        return std::string(s.message());
    };
    Case c = make({.length = 4}, 4);
    c.tensors["q"] = Random(1).normal({1, 3, 1, 4});
    c.tensors["dout.o"] = Random(1).normal({1, 3, 1, 3});
    c.tensors.erase("dout.lse");
    EXPECT_EQ(message({}, c), "q: length is 3, must be that of k, 4");
    EXPECT_EQ(message({.window = -1}, make({.length = 4}, 4)), "options.window is -1, must be at least 1, or 0 for none");
    Options options;
    EXPECT_FALSE(set_option(options, "component", "symmetric").ok());
    EXPECT_TRUE(set_option(options, "component", "filtering").ok());
    EXPECT_EQ(options.component, Component::filtering);
}

}  // namespace
}  // namespace interstate::test
