// Linear attention's reference against the double sum over pairs of tokens, finite differences, and itself in pieces.
#include <gtest/gtest.h>

#include <linear_attention/reference.hpp>

#include "../support/differences.hpp"
#include "linear_attention_cases.hpp"

namespace interstate::test {
namespace {

using linear_attention::FeatureMap;
using linear_attention::Normalized;
using linear_attention::Operator;
using linear_attention::Options;

Case run(const Options& options, const Case& c) {
    Case results;
    const Status status = run_case<Operator, double, double>(reference{}, options, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

TEST(LinearAttentionReference, IsTheSumOverPairs) {
    const Index L = 9, Hq = 4, Hkv = 2, dk = 3, dv = 5;
    for (const Options& options : linear_forms()) {
        Case c = make({.length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dk, .value_dim = dv, .states = false,
                       .positive = options.normalized == Normalized::yes}, 1);
        Case got = run(options, c);
        const auto phi = [&](double x) { return options.feature_map == FeatureMap::identity ? x : x > 0 ? x + 1 : std::exp(x); };
        const auto at = [](const Case& from, const char* name, Index t, Index h, Index H, Index r, Index n) {
            return from.tensors.at(name).values[static_cast<std::size_t>((t * H + h) * n + r)];
        };
        for (Index t = 0; t < L; ++t)
            for (Index h = 0; h < Hq; ++h)
                for (Index e = 0; e < dv; ++e) {
                    double sum = 0.0, weights = 0.0;
                    for (Index j = 0; j <= t; ++j) {
                        double dot = 0.0;
                        for (Index r = 0; r < dk; ++r) dot += phi(at(c, "q", t, h, Hq, r, dk)) * phi(at(c, "k", j, h / 2, Hkv, r, dk));
                        sum += dot * at(c, "v", j, h / 2, Hkv, e, dv);
                        weights += dot;
                    }
                    EXPECT_NEAR(at(got, "out.o", t, h, Hq, e, dv), options.divides() ? sum / weights : sum, 1e-12);
                }
    }
}

TEST(LinearAttentionReference, GradientsMatchFiniteDifferences) {
    for (const Options& options : linear_forms())
        for (const bool packed : {false, true}) {
            LinearCase o{.batch = packed ? 1 : 2, .length = 7, .query_heads = 4, .kv_heads = 2, .head_dim = 3, .value_dim = 2,
                         .sums = options.divides(), .positive = options.normalized == Normalized::yes};
            if (packed) o.cu_seqlens = {1, 3, 3, 6};
            Case c = make(o, 2);
            if (o.positive)
                for (double& x : values(c, "s0")) x *= 0.1;
            const Case got = run(options, c);
            for (const char* name : {"q", "k", "v", "s0", "z0"}) {
                if (!c.tensors.contains(name)) continue;
                EXPECT_LE(difference_error(c, got, name, 1e-4, 3, [&](const Case& x) { return run(options, x); }), 1e-8)
                    << describe(options) << " " << name << " packed " << packed;
            }
        }
}

TEST(LinearAttentionReference, GoesOnFromItsState) {
    for (const Options& options : linear_forms()) {
        const LinearCase whole{.length = 12, .query_heads = 2, .head_dim = 3, .value_dim = 4, .sums = options.divides()};
        Case c = make(whole, 3);
        Case want = run(options, c);
        const auto part = [&](Index begin, Index end) {
            Case x = c;
            for (const char* name : {"q", "k", "v", "dout.o"}) {
                HostTensor& t = x.tensors.at(name);
                const auto row = static_cast<std::ptrdiff_t>(t.values.size()) / 12;
                t.values = {t.values.begin() + begin * row, t.values.begin() + end * row};
                t.extent[1] = end - begin;
            }
            return x;
        };
        Case first = run(options, part(0, 5)), second_in = part(5, 12);
        values(second_in, "s0") = values(first, "out.sT");
        if (options.divides()) values(second_in, "z0") = values(first, "out.zT");
        const Case second = run(options, second_in);
        std::vector<double> o = values(first, "out.o");
        o.insert(o.end(), second.tensors.at("out.o").values.begin(), second.tensors.at("out.o").values.end());
        EXPECT_EQ(o, values(want, "out.o"));
        EXPECT_EQ(second.tensors.at("out.sT").values, values(want, "out.sT"));

        // The same tokens one by one.
        std::vector<double> s = values(c, "s0"), z = options.divides() ? values(c, "z0") : std::vector<double>{}, y(2 * 4);
        std::vector<std::byte> memory(1 << 12);
        for (Index t = 0; t < 12; ++t) {
            const auto row = [&](const char* name, Index heads, Index n) {
                return view(static_cast<const double*>(values(c, name).data()) + t * heads * n, {Index{1}, heads, n});
            };
            linear_attention::State<double> state{view(s.data(), {1, 1, 3, 4}), {}};
            if (options.divides()) state.z = view(z.data(), {1, 1, 3});
            const Status status = step(reference{}, options, linear_attention::Params{}, state,
                                       linear_attention::Token<double>{row("q", 2, 3), row("k", 1, 3), row("v", 1, 4)},
                                       linear_attention::TokenOut<double>{view(y.data(), {1, 2, 4})}, Workspace{memory.data(), memory.size()});
            ASSERT_TRUE(status.ok()) << status.message();
            for (std::size_t i = 0; i < y.size(); ++i) EXPECT_EQ(y[i], values(want, "out.o")[static_cast<std::size_t>(t) * 8 + i]);
        }
        EXPECT_EQ(s, values(want, "out.sT"));
    }
}

/// With k = 0 the identity's rows have no weights: 0, and no gradients.
TEST(LinearAttentionReference, NoWeightIsNoOutput) {
    Case c = make({.length = 4, .states = false}, 4);
    for (double& x : values(c, "k")) x = 0.0;
    Case got = run({.normalized = Normalized::yes}, c);
    for (const char* name : {"out.o", "grad.q", "grad.k", "grad.v"})
        for (const double x : values(got, name)) EXPECT_EQ(x, 0.0) << name;
}

TEST(LinearAttentionReference, EachSequenceIsAlone) {
    Case c = make({.length = 10, .cu_seqlens = {2, 5, 5, 9}}, 5), got = run({}, c), dirty = c;
    for (const char* name : {"q", "k", "v"}) {
        auto& x = values(dirty, name);
        for (std::size_t i = 0; i < x.size(); ++i)
            if (const std::size_t t = i / 4; t < 2 || t >= 5) x[i] = NAN;
    }
    const Case other = run({}, dirty);
    for (std::size_t i = 0; i < 40; ++i) {
        const std::size_t t = i / 4;
        if (t >= 2 && t < 5) {
            EXPECT_EQ(values(got, "out.o")[i], other.tensors.at("out.o").values[i]);
        }
        if (t < 2 || t == 9) {
            EXPECT_EQ(other.tensors.at("grad.v").values[i], 0.0);
        }
    }
    const auto& sT = values(got, "out.sT");
    EXPECT_TRUE(std::equal(sT.begin() + 16, sT.begin() + 32, values(c, "s0").begin() + 16));  // of an empty sequence
}

TEST(LinearAttentionReference, ErrorsNameTheArgument) {
    const auto message = [](const Options& options, Case c) {
        Case results;
        const Status s = run_case<Operator, double, double>(reference{}, options, c, results);
        EXPECT_FALSE(s.ok());
        return std::string(s.message());
    };
    Case c = make({.length = 3}, 6);
    c.tensors["v"] = Random(1).normal({1, 2, 1, 4});
    EXPECT_EQ(message({}, c), "v: extent of axis 1 is 2, must be 3");
    c = make({.length = 3, .query_heads = 3, .kv_heads = 2}, 6);
    EXPECT_EQ(message({}, c), "q: heads is 3, must be a multiple of the heads of k");
    c = make({.length = 3, .sums = true}, 6);
    EXPECT_EQ(message({}, c), "z, z0, zT: are given, must be null where rows are not normalized");
    c = make({.length = 3, .cu_seqlens = {0, 4}}, 6);
    EXPECT_EQ(message({}, c), "cu_seqlens: element 1 is 4, must be at least 0 and at most 3");
    Options options;
    EXPECT_TRUE(set_option(options, "normalized", "true").ok());
    EXPECT_EQ(options.normalized, Normalized::yes);
    EXPECT_FALSE(set_option(options, "feature_map", "relu").ok());
}

}  // namespace
}  // namespace interstate::test
