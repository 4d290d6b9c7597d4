// S-D attention's reference against the sum over pairs of tokens, and finite differences.
#include <gtest/gtest.h>

#include <sd_attention/reference.hpp>

#include "../support/differences.hpp"
#include "sd_attention_cases.hpp"

namespace interstate::test {
namespace {

using sd_attention::Component;
using sd_attention::Normalizer;
using sd_attention::Operator;
using sd_attention::Options;

Case run(const Options& options, const Case& c) {
    Case results;
    const Status status = run_case<Operator, double, double>(reference{}, options, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

TEST(SdAttentionReference, IsTheSumOverPairs) {
    const Index L = 6, r = 4, dv = 3;
    for (const Index planes : {-1, 2})
        for (const Options& options : all_sd_options()) {
            Case c = make({.length = L, .channels = r, .value_dim = dv, .planes = planes}, 1), got = run(options, c);
            const auto& u = values(c, "u");
            double K[r][r];
            for (Index i = 0; i < r; ++i)
                for (Index j = 0; j < r; ++j) {
                    double skew = planes < 0 ? 0.5 * (values(c, "P")[i * r + j] - values(c, "P")[j * r + i]) : 0.0;
                    for (Index p = 0; p < planes; ++p)
                        skew += values(c, "a")[p * r + i] * values(c, "b")[p * r + j] - values(c, "b")[p * r + i] * values(c, "a")[p * r + j];
                    K[i][j] = (options.component == Component::filtering ? 0.0 : skew) -
                              (i == j && options.component != Component::routing ? std::log(1.0 + std::exp(values(c, "delta")[i])) : 0.0);
                }
            const auto phi = [&](double x) { return options.normalizer == Normalizer::elu1 ? (x > 0 ? x + 1 : std::exp(x)) : x; };
            for (Index i = 0; i < L; ++i) {
                std::vector<double> o(dv);
                double total = 0.0;
                for (Index j = 0; j <= i; ++j) {
                    double score = 0.0;
                    for (Index e = 0; e < r; ++e) {
                        double x = 0.0;
                        for (Index d = 0; d < r; ++d) x += u[i * r + d] * K[d][e];
                        score += phi(x) * phi(u[j * r + e]);
                    }
                    if (options.normalizer != Normalizer::elu1) score /= std::sqrt(double(r));
                    const double weight = options.normalizer == Normalizer::softmax ? std::exp(score) : score;
                    total += weight;
                    for (Index e = 0; e < dv; ++e) o[e] += weight * values(c, "v")[j * dv + e];
                }
                for (Index e = 0; e < dv; ++e)
                    EXPECT_NEAR(values(got, "out.o")[i * dv + e], options.normalizer == Normalizer::identity ? o[e] : o[e] / total, 1e-11);
            }
        }
}

TEST(SdAttentionReference, GradientsMatchFiniteDifferences) {
    for (const Options& options : all_sd_options())
        for (const bool packed : {false, true}) {
            SdCase o{.batch = packed ? 1 : 2, .length = 6, .heads = 2, .planes = packed ? 2 : -1, .lse = options.softmax()};
            if (packed) o.cu_seqlens = {1, 3, 3, 5};
            const Case c = make(o, 2), got = run(options, c);
            for (const char* name : {"u", "v", "P", "a", "b", "delta"}) {
                if (!c.tensors.contains(name)) continue;
                EXPECT_LE(difference_error(c, got, name, 1e-4, 1, [&](const Case& x) { return run(options, x); }), 1e-7)
                    << name << " " << describe(options);
            }
        }
}

/// A dense P with S = a b^T - b a^T scores as the planes do.
TEST(SdAttentionReference, PlanesAreADenseGenerator) {
    Case planes = make({.length = 9, .heads = 2, .planes = 3}, 3), dense = planes;
    HostTensor P{{2, 4, 4}, std::vector<double>(32)};
    for (Index h = 0; h < 2; ++h)
        for (Index p = 0; p < 3; ++p)
            for (Index i = 0; i < 4; ++i)
                for (Index j = 0; j < 4; ++j)
                    P.values[static_cast<std::size_t>((h * 4 + i) * 4 + j)] +=
                        2.0 * values(planes, "a")[static_cast<std::size_t>((h * 3 + p) * 4 + i)] * values(planes, "b")[static_cast<std::size_t>((h * 3 + p) * 4 + j)];
    dense.tensors.erase("a"), dense.tensors.erase("b");
    dense.tensors["P"] = P;
    Case want = run({}, planes), got = run({}, dense);
    for (std::size_t i = 0; i < values(want, "out.o").size(); ++i) EXPECT_NEAR(values(got, "out.o")[i], values(want, "out.o")[i], 1e-12);
}

TEST(SdAttentionReference, ErrorsNameTheArgument) {
    const auto message = [](const Options& options, const Case& c) {
        Case results;
        const Status s = run_case<Operator, double, double>(reference{}, options, c, results);
        EXPECT_FALSE(s.ok());
        return std::string(s.message());
    };
    Case c = make({.length = 3}, 4);
    c.tensors["a"] = c.tensors["b"] = Random(1).normal({1, 2, 4});
    EXPECT_EQ(message({}, c), "P: is given beside a or b, must be null with planes");
    c = make({.length = 3, .planes = 2}, 4);
    c.tensors["b"] = Random(1).normal({1, 3, 4});
    EXPECT_EQ(message({}, c), "b: extent of axis 1 is 3, must be 2");
    c = make({.length = 3}, 4);
    c.tensors["delta"] = Random(1).normal({1, 5});
    EXPECT_EQ(message({}, c), "delta: extent of axis 1 is 5, must be 4");
    c = make({.length = 3, .lse = true}, 4);
    EXPECT_EQ(message({.normalizer = Normalizer::elu1}, c), "lse: must be null where the normalizer is not softmax");
    Options options;
    EXPECT_FALSE(set_option(options, "normalizer", "relu").ok());
}

}  // namespace
}  // namespace interstate::test
