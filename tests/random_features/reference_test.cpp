// The reference of random Fourier features against what they are for, the Gaussian kernel, and finite differences.
#include <complex>

#include <gtest/gtest.h>

#include <random_features/init.hpp>
#include <random_features/reference.hpp>

#include "../support/differences.hpp"
#include "random_features_cases.hpp"

namespace interstate::test {
namespace {

using random_features::Operator;

Case run(const Case& c) {
    Case results;
    const Status status = run_case<Operator, double, double>(reference{}, {}, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

TEST(RandomFeaturesReference, EqualsComplexExponentials) {
    for (const bool shared : {false, true}) {
        const Index B = 2, L = 3, H = 3, dh = 4, F = 5;
        Case c = make({.batch = B, .length = L, .heads = H, .head_dim = dh, .frequencies = F, .shared = shared}, 1);
        Case got = run(c);
        for (Index n = 0; n < B * L * H; ++n)
            for (Index f = 0; f < F; ++f) {
                std::complex<double> z = 1.0;
                for (Index i = 0; i < dh; ++i)
                    z *= std::polar(1.0, values(c, "x")[n * dh + i] * values(c, "W")[((shared ? 0 : n % H) * F + f) * dh + i]);
                EXPECT_NEAR(values(got, "out.y")[n * 2 * F + f], z.real() / std::sqrt(5.0), 1e-14);
                EXPECT_NEAR(values(got, "out.y")[n * 2 * F + F + f], z.imag() / std::sqrt(5.0), 1e-14);
            }
    }
}

TEST(RandomFeaturesReference, TendToTheGaussianKernel) {
    const Index F = 20000, dh = 3;
    const double bandwidth = 0.7;
    Case c;
    c.tensors["x"] = Random(2).normal({1, 2, 1, dh}, 0.8);
    std::vector<double> W(F * dh);
    ASSERT_TRUE(random_features::initialize(3, view(W.data(), {1, F, dh}), bandwidth).ok());
    c.tensors["W"] = {{1, F, dh}, W};
    Case got = run(c);
    double dot = 0.0, distance = 0.0;
    for (Index i = 0; i < 2 * F; ++i) dot += values(got, "out.y")[i] * values(got, "out.y")[2 * F + i];
    for (Index i = 0; i < dh; ++i) distance += std::pow(values(c, "x")[i] - values(c, "x")[dh + i], 2);
    EXPECT_NEAR(dot, std::exp(-distance / (2.0 * bandwidth * bandwidth)), 4.0 / std::sqrt(static_cast<double>(F)));
    EXPECT_LT(std::exp(-distance / (2.0 * bandwidth * bandwidth)), 0.9);  // two points that are told apart
    std::vector<double> again(F * dh);
    ASSERT_TRUE(random_features::initialize(3, view(again.data(), {1, F, dh}), bandwidth).ok());
    EXPECT_EQ(W, again);
    EXPECT_FALSE(random_features::initialize(3, view(again.data(), {1, F, dh}), 0.0).ok());
    EXPECT_FALSE(random_features::initialize(3, View<double, 3>{nullptr, {1, 2, 3}, {6, 3, 1}}).ok());
}

TEST(RandomFeaturesReference, GradientsMatchFiniteDifferences) {
    for (const bool packed : {false, true})
        for (const bool shared : {false, true}) {
            RandomFeaturesCase o{.batch = packed ? 1 : 2, .length = 7, .heads = 2, .head_dim = 3, .frequencies = 4, .shared = shared};
            if (packed) o.cu_seqlens = {1, 3, 3, 6};
            const Case c = make(o, 2);
            const Case got = run(c);
            for (const char* name : {"x", "W"}) EXPECT_LE(difference_error(c, got, name, 1e-4, 1, run), 1e-9) << name;
        }
}

TEST(RandomFeaturesReference, ErrorsNameTheArgument) {
    Case c = make({.length = 3, .heads = 3}, 1), results;
    c.tensors["W"] = Random(1).normal({2, 3, 4});
    Status s = run_case<Operator, double, double>(reference{}, {}, c, results);
    EXPECT_NE(std::string(s.message()).find("W: heads are 2, must be 1 or the 3 of x"), std::string::npos) << s.message();
    c = make({.length = 3}, 1);
    c.tensors["W"] = Random(1).normal({1, 3, 5});
    s = run_case<Operator, double, double>(reference{}, {}, c, results);
    EXPECT_NE(std::string(s.message()).find("W: extent of axis 2 is 5, must be 4"), std::string::npos) << s.message();
    random_features::Options options;
    EXPECT_FALSE(set_option(options, "method", "fast").ok());
}

}  // namespace
}  // namespace interstate::test
