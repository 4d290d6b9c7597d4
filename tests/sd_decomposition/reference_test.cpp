// The decomposition's reference against dense matrices and their eigenvalues, closed forms, and scales.
#include <algorithm>
#include <functional>

#include <gtest/gtest.h>

#include <sd_decomposition/reference.hpp>

#include "sd_decomposition_cases.hpp"

namespace interstate::test {
namespace {

using sd_decomposition::Operator;

Case run(const Case& c, sd_decomposition::Options options = {}) {
    Case results;
    const Status status = run_case<Operator, double, double>(reference{}, options, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

/// A square matrix, row by row.
struct Matrix {
    Index n;
    std::vector<double> x = std::vector<double>(static_cast<std::size_t>(n * n));
    double& operator()(Index i, Index j) { return x[static_cast<std::size_t>(i * n + j)]; }
    double norm() const {
        double squares = 0.0;
        for (const double e : x) squares += e * e;
        return std::sqrt(squares);
    }
};

/// Magnitudes of the eigenvalues of a symmetric matrix, descending: rotations from both sides until it is diagonal.
std::vector<double> magnitudes(Matrix m) {
    for (int sweep = 0; sweep < 12; ++sweep)
        for (Index p = 0; p < m.n; ++p)
            for (Index q = p + 1; q < m.n; ++q) {
                const double angle = 0.5 * std::atan2(2.0 * m(p, q), m(q, q) - m(p, p)), c = std::cos(angle), s = std::sin(angle);
                for (Index i = 0; i < m.n; ++i) {
                    const double a = m(i, p), b = m(i, q);
                    m(i, p) = c * a - s * b, m(i, q) = s * a + c * b;
                }
                for (Index i = 0; i < m.n; ++i) {
                    const double a = m(p, i), b = m(q, i);
                    m(p, i) = c * a - s * b, m(q, i) = s * a + c * b;
                }
            }
    std::vector<double> s;
    for (Index i = 0; i < m.n; ++i) s.push_back(std::abs(m(i, i)));
    std::sort(s.begin(), s.end(), std::greater<>());
    return s;
}
/// The same of a skew-symmetric matrix: i S is Hermitian, and as a real matrix of twice the size it has each value twice.
std::vector<double> skew_magnitudes(Matrix m) {
    Matrix real{2 * m.n};
    for (Index i = 0; i < m.n; ++i)
        for (Index j = 0; j < m.n; ++j) real(i, m.n + j) = -m(i, j), real(m.n + i, j) = m(i, j);
    const std::vector<double> twice = magnitudes(real);
    std::vector<double> s;
    for (std::size_t i = 0; i < twice.size(); i += 2) s.push_back(twice[i]);
    return s;
}

/// The definitions (eq. 1 to 5), with A formed.
Case dense(const Case& c, double scale) {
    const auto &q = c.tensors.at("Q"), &k = c.tensors.at("K");
    const Index B = q.extent[0], L = q.extent[1], H = q.extent[2], d = q.extent[3], Hkv = k.extent[2], n = std::min(L, 2 * d);
    Case results;
    const auto push = [&](const std::string& name, double x) { results.tensors["out." + name].values.push_back(x); };
    for (Index b = 0; b < B; ++b)
        for (Index h = 0; h < H; ++h) {
            Matrix A{L}, S{L}, F{L};
            for (Index i = 0; i < L; ++i)
                for (Index j = 0; j < L; ++j)
                    for (Index e = 0; e < d; ++e)
                        A(i, j) += scale * q.values[static_cast<std::size_t>(((b * L + i) * H + h) * d + e)] *
                                   k.values[static_cast<std::size_t>(((b * L + j) * Hkv + h / (H / Hkv)) * d + e)];
            for (Index i = 0; i < L; ++i)
                for (Index j = 0; j < L; ++j) S(i, j) = (A(i, j) - A(j, i)) / 2, F(i, j) = (A(i, j) + A(j, i)) / 2;
            push("norm", A.norm());
            push("routing_energy", S.norm() / A.norm() * S.norm() / A.norm());
            const auto part = [&](const std::string& name, const Matrix& m, std::vector<double> s) {
                for (std::size_t i = static_cast<std::size_t>(n); i < s.size(); ++i) EXPECT_LE(s[i], 1e-13 * s[0]);
                s.resize(static_cast<std::size_t>(n));
                double sum = 0.0, entropy = 0.0, squares = 0.0, fourths = 0.0;
                for (const double x : s) sum += x, squares += x * x, fourths += x * x * x * x;
                for (const double x : s) entropy -= x > 0.0 ? x / sum * std::log(x / sum) : 0.0;
                for (const double x : s) push(name + "_singular_values", x);
                push(name + "_norm", m.norm());
                push(name + "_effective_rank", std::exp(entropy));
                push(name + "_participation_ratio", squares * squares / fourths);
                push(name + "_stable_rank", squares / (s[0] * s[0]));
            };
            part("routing", S, skew_magnitudes(S));
            part("filtering", F, magnitudes(F));
        }
    return results;
}

TEST(SdDecompositionReference, EqualsTheDenseMatrices) {
    std::uint64_t seed = 1;
    for (const Index d : {1, 2, 5, 8})
        for (const Index L : {2, 7, 2 * static_cast<int>(d) - 1, 2 * static_cast<int>(d), 2 * static_cast<int>(d) + 1, 24}) {
            if (L < 2) continue;
            const Case c = make({.batch = 2, .length = L, .heads = 2, .kv_heads = 1, .head_dim = d}, ++seed);
            EXPECT_LE(worst_error(run(c), dense(c, 1.0 / std::sqrt(static_cast<double>(d)))), 2e-13) << L << " " << d;
        }
}

TEST(SdDecompositionReference, DeficientRanksAndTheScaleOption) {
    for (const Index L : {9, 50}) {
        const Case c = make({.length = L, .head_dim = 8, .rank = 3}, 5);
        const Case got = run(c, {.scale = 2.5});
        EXPECT_LE(worst_error(got, dense(c, 2.5)), 2e-13);
        for (const char* name : {"out.routing_singular_values", "out.filtering_singular_values"}) {
            const auto& s = got.tensors.at(name).values;
            for (std::size_t i = 6; i < s.size(); ++i) EXPECT_LE(s[i], 1e-14 * s[0]);
        }
        EXPECT_LE(worst_error(run(c, {.scale = -2.5}), got), 1e-15);
    }
}

TEST(SdDecompositionReference, OnePlaneIsRoutingAlone) {
    Case c;  // S = a b^T - b a^T of orthogonal a and b: two equal singular values |a| |b|
    c.tensors["Q"] = {{1, 4, 1, 2}, {3, 0, 0, 2, 0, 0, 0, 0}};
    c.tensors["K"] = {{1, 4, 1, 2}, {0, -3, 2, 0, 0, 0, 0, 0}};
    Case got = run(c, {.scale = 1.0});
    EXPECT_NEAR(values(got, "out.routing_energy")[0], 1.0, 1e-15);
    const std::vector<double> six = {6.0, 6.0, 0.0, 0.0};
    for (std::size_t i = 0; i < 4; ++i) EXPECT_NEAR(values(got, "out.routing_singular_values")[i], six[i], 1e-14);
    EXPECT_EQ(values(got, "out.filtering_singular_values"), std::vector<double>(4, 0.0));
    for (const char* name : {"effective_rank", "participation_ratio", "stable_rank"}) {
        EXPECT_NEAR(values(got, std::string("out.routing_") + name)[0], 2.0, 1e-14);
        EXPECT_EQ(values(got, std::string("out.filtering_") + name)[0], 0.0);
    }
}

TEST(SdDecompositionReference, ZerosAndEqualQueriesAndKeysAreDefined) {
    for (const Index L : {1, 7, 16, 33}) {
        Case c = make({.length = L, .heads = 2, .kv_heads = 2, .head_dim = 8}, 7);
        c.tensors["K"] = c.tensors["Q"];
        Case got = run(c);
        for (const char* name : {"energy", "norm", "singular_values", "effective_rank", "participation_ratio", "stable_rank"})
            for (const double x : values(got, std::string("out.routing_") + name)) EXPECT_EQ(x, 0.0) << name;
        for (const double x : values(got, "out.filtering_effective_rank")) EXPECT_GE(x, 1.0 - 1e-12);
        for (double& x : values(c, "K")) x = 0.0;
        got = run(c);
        for (const auto& [name, tensor] : got.tensors)
            for (const double x : tensor.values) EXPECT_EQ(x, 0.0) << name;
    }
}

TEST(SdDecompositionReference, ScalesChangeNothingElse) {
    const Case c = make({.length = 30, .head_dim = 4}, 3);
    const Case want = run(c);
    for (const auto& [q, k] : {std::pair{1e200, 1e-190}, {1e-250, 1e200}, {1e150, 1e150}, {1e-160, 1e-140}}) {
        Case scaled = c;
        for (double& x : values(scaled, "Q")) x *= q;
        for (double& x : values(scaled, "K")) x *= k;
        Case got = run(scaled);
        for (auto& [name, tensor] : got.tensors)
            if (name.ends_with("norm") || name.ends_with("values"))
                for (double& x : tensor.values) x = x / q / k;
        EXPECT_LE(worst_error(got, want), 1e-13) << q << " " << k;
    }
}

TEST(SdDecompositionReference, NanStaysInItsHead) {
    Case c = make({.length = 5, .heads = 2, .kv_heads = 2, .head_dim = 2}, 3);
    Case clean = run(c);
    values(c, "K")[2] = std::nan("");  // of the second head
    Case got = run(c);
    for (const auto& [name, tensor] : clean.tensors)
        for (std::size_t i = 0; i < tensor.values.size(); ++i) {
            const double x = values(got, name)[i];
            if (i < tensor.values.size() / 2)
                EXPECT_EQ(x, tensor.values[i]) << name;
            else
                EXPECT_TRUE(std::isnan(x)) << name;
        }
}

TEST(SdDecompositionReference, ErrorsNameTheArgument) {
    Case c = make({.length = 3, .heads = 3, .kv_heads = 2}, 1), results;
    Status s = run_case<Operator, double, double>(reference{}, {}, c, results);
    EXPECT_NE(std::string(s.message()).find("Q: heads is 3, must be a multiple of the 2 of K"), std::string::npos) << s.message();
    c = make({.length = 3}, 1);
    c.tensors["K"] = Random(1).normal({1, 4, 1, 4});
    s = run_case<Operator, double, double>(reference{}, {}, c, results);
    EXPECT_NE(std::string(s.message()).find("K: extent of axis 1 is 4, must be 3"), std::string::npos) << s.message();
    sd_decomposition::Options options;
    EXPECT_FALSE(set_option(options, "scale", "nan").ok());
    EXPECT_FALSE(set_option(options, "causal", "true").ok());
    EXPECT_TRUE(set_option(options, "scale", "1").ok());
    c = make({.length = 3}, 1);
    options.scale = INFINITY;
    EXPECT_EQ((run_case<Operator, double, double>(reference{}, options, c, results).code()), StatusCode::invalid_argument);
}

}  // namespace
}  // namespace interstate::test
