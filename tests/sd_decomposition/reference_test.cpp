// The decomposition's reference against dense A, whose parts are diagonalised by another method, and closed forms.
#include <gtest/gtest.h>

#include <sd_decomposition/reference.hpp>

#include "sd_decomposition_cases.hpp"

namespace interstate::test {
namespace {

using sd_decomposition::Operator;
using sd_decomposition::Options;

Case run(const Case& c, const Options& options = {}) {
    Case results;
    const Status status = run_case<Operator, double, double>(reference{}, options, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

/// Singular values of G (L, L): eigenvalues of [[0, G], [G^T, 0]], which come as sigma and -sigma, by turning rows and
/// columns of it until it is diagonal.
std::vector<double> dense_singular_values(const std::vector<double>& G, Index L) {
    const Index n = 2 * L;
    std::vector<double> M(static_cast<std::size_t>(n * n));
    for (Index i = 0; i < L; ++i)
        for (Index j = 0; j < L; ++j) M[i * n + L + j] = M[(L + j) * n + i] = G[i * L + j];
    double scale = 0.0;
    for (const double x : M) scale = std::max(scale, std::abs(x));
    for (int sweep = 0; sweep < 30; ++sweep)
        for (Index p = 0; p < n; ++p)
            for (Index q = p + 1; q < n; ++q) {
                if (std::abs(M[p * n + q]) <= 1e-17 * scale) continue;
                const double theta = (M[q * n + q] - M[p * n + p]) / (2.0 * M[p * n + q]);
                const double t = (theta < 0.0 ? -1.0 : 1.0) / (std::abs(theta) + std::hypot(theta, 1.0));
                const double c = 1.0 / std::hypot(t, 1.0), s = t * c;
                for (const auto& [step, other] : {std::pair{Index{1}, n}, std::pair{n, Index{1}}})
                    for (Index i = 0; i < n; ++i) {
                        double &x = M[p * other + i * step], &y = M[q * other + i * step];
                        const double a = x, b = y;
                        x = c * a - s * b, y = s * a + c * b;
                    }
            }
    std::vector<double> sigma;
    for (Index i = 0; i < n; ++i) sigma.push_back(M[i * n + i]);
    std::sort(sigma.begin(), sigma.end(), std::greater<>{});
    sigma.resize(static_cast<std::size_t>(L));
    return sigma;
}

/// All outputs from dense A, whatever its length.
Case dense(const Case& c, double scale) {
    const HostTensor &Q = c.tensors.at("Q"), &K = c.tensors.at("K");
    const Index B = Q.extent[0], L = Q.extent[1], H = Q.extent[2], d = Q.extent[3], Hk = K.extent[2];
    const Index N = std::min(L, 2 * d);
    Case results;
    const auto add = [&](const std::string& name, std::vector<Index> extent, double x) {
        HostTensor& t = results.tensors["out." + name];
        t.extent = std::move(extent);
        t.values.push_back(x);
    };
    for (Index b = 0; b < B; ++b)
        for (Index h = 0; h < H; ++h) {
            std::vector<double> A(static_cast<std::size_t>(L * L));
            for (Index i = 0; i < L; ++i)
                for (Index j = 0; j < L; ++j)
                    for (Index x = 0; x < d; ++x)
                        A[i * L + j] += Q.values[((b * L + i) * H + h) * d + x] * K.values[((b * L + j) * Hk + h / (H / Hk)) * d + x];
            for (double& x : A) x *= scale;  // the sum is exact: a part that cancels is zero
            double norms[2];
            for (const bool filtering : {false, true}) {
                std::vector<double> part(A.size());
                double squares = 0.0, sum = 0.0, fourths = 0.0, entropy = 0.0;
                for (Index i = 0; i < L; ++i)
                    for (Index j = 0; j < L; ++j) part[i * L + j] = 0.5 * (A[i * L + j] + (filtering ? 1.0 : -1.0) * A[j * L + i]);
                for (const double x : part) squares += x * x;
                norms[filtering] = std::sqrt(squares);
                const std::string name = filtering ? "filtering_" : "routing_";
                const std::vector<double> sigma = dense_singular_values(part, L);
                for (Index i = 0; i < N; ++i) add(name + "singular_values", {B, H, N}, std::max(0.0, sigma[i]));
                for (const double x : sigma) sum += std::max(0.0, x), fourths += x * x * x * x;
                for (const double x : sigma) entropy -= x > 1e-14 * sum ? x / sum * std::log(x / sum) : 0.0;
                const bool none = squares == 0.0;
                add(name + "norm", {B, H}, norms[filtering]);
                add(name + "effective_rank", {B, H}, none ? 0.0 : std::exp(entropy));
                add(name + "participation_ratio", {B, H}, none ? 0.0 : squares * squares / fourths);
                add(name + "stable_rank", {B, H}, none ? 0.0 : squares / (sigma[0] * sigma[0]));
            }
            const double squares = norms[0] * norms[0] + norms[1] * norms[1];
            add("norm", {B, H}, std::sqrt(squares));
            add("routing_energy", {B, H}, squares == 0.0 ? 0.0 : norms[0] * norms[0] / squares);
        }
    return results;
}

TEST(SdDecompositionReference, IsThatOfDenseA) {
    for (const Heads heads : every_kind_of_heads)
        for (const auto& [L, d] : std::vector<std::pair<Index, Index>>{{1, 1}, {2, 1}, {3, 1}, {5, 3}, {6, 3}, {7, 3}, {20, 4}, {29, 16}}) {
            const Case c = make({.length = L, .head_dim = d, .heads = heads}, 3);
            const Case got = run(c), want = dense(c, 1.0 / std::sqrt(static_cast<double>(d)));
            EXPECT_LE(spectrum_error(got, want), 1e-13) << static_cast<int>(heads) << " L=" << L << " d=" << d;
            EXPECT_LE(summary_error(got, want), 1e-12) << static_cast<int>(heads) << " L=" << L << " d=" << d;
        }
}

TEST(SdDecompositionReference, BatchesAndGroupsOfHeads) {
    const Case c = make({.batch = 2, .length = 9, .query_heads = 4, .key_heads = 2, .head_dim = 3}, 5);
    for (const double scale : {1.0, -0.25}) {
        const Case want = dense(c, scale);
        EXPECT_LE(spectrum_error(run(c, {.scale = scale}), want), 1e-13);
        EXPECT_LE(summary_error(run(c, {.scale = scale}), want), 1e-12);
    }
}

TEST(SdDecompositionReference, OfOneFeatureIsTheClosedForm) {
    const Case c = make({.length = 50, .head_dim = 1}, 7);
    double qq = 0.0, kk = 0.0, qk = 0.0;
    for (std::size_t i = 0; i < 50; ++i) {
        const double q = c.tensors.at("Q").values[i], k = c.tensors.at("K").values[i];
        qq += q * q, kk += k * k, qk += q * k;
    }
    Case got = run(c);
    const double area = std::sqrt(qq * kk - qk * qk), size = std::sqrt(qq * kk);
    for (const double x : values(got, "out.routing_singular_values")) EXPECT_NEAR(x, 0.5 * area, 1e-13 * size);
    EXPECT_NEAR(values(got, "out.filtering_singular_values")[0], 0.5 * (size + std::abs(qk)), 1e-13 * size);
    EXPECT_NEAR(values(got, "out.filtering_singular_values")[1], 0.5 * (size - std::abs(qk)), 1e-13 * size);
    EXPECT_NEAR(values(got, "out.norm")[0], size, 1e-13 * size);
    EXPECT_NEAR(values(got, "out.routing_energy")[0], 0.5 * area * area / (size * size), 1e-13);
    EXPECT_NEAR(values(got, "out.routing_effective_rank")[0], 2.0, 1e-12);
    EXPECT_NEAR(values(got, "out.routing_participation_ratio")[0], 2.0, 1e-12);
    EXPECT_NEAR(values(got, "out.routing_stable_rank")[0], 2.0, 1e-12);
}

TEST(SdDecompositionReference, APartThatIsNotThereHasRankZero) {
    for (const Index L : {6, 40}) {
        Case got = run(make({.length = L, .head_dim = 4, .heads = Heads::equal}, 11));
        EXPECT_EQ(values(got, "out.routing_energy")[0], 0.0);
        EXPECT_EQ(values(got, "out.routing_effective_rank")[0], 0.0);
        EXPECT_NEAR(values(got, "out.filtering_norm")[0], values(got, "out.norm")[0], 1e-14 * values(got, "out.norm")[0]);
        got = run(make({.length = L, .head_dim = 4, .heads = Heads::skew}, 11));
        EXPECT_EQ(values(got, "out.routing_energy")[0], 1.0);
        EXPECT_EQ(values(got, "out.filtering_stable_rank")[0], 0.0);
        got = run(make({.length = L, .head_dim = 4, .heads = Heads::zero}, 11));
        for (const auto& [name, tensor] : got.tensors)
            for (const double x : tensor.values) EXPECT_EQ(x, 0.0) << name;
    }
}

TEST(SdDecompositionReference, PowersOfTwoChangeNothingButTheScale) {
    const Case one = run(make({.length = 12, .head_dim = 4}, 13));
    for (const auto& [q, k] : std::vector<std::pair<double, double>>{{0x1p1000, 0x1p-990}, {0x1p-700, 0x1p-300}, {0x1p500, 0x1p500}}) {
        const Case other = run(make({.length = 12, .head_dim = 4, .scale_q = q, .scale_k = k}, 13));
        for (const auto& [name, tensor] : one.tensors) {
            const bool scales = name.ends_with("values") || name.ends_with("norm");
            for (std::size_t i = 0; i < tensor.values.size(); ++i)
                EXPECT_EQ(other.tensors.at(name).values[i], scales ? tensor.values[i] * q * k : tensor.values[i]) << name;
        }
    }
    // What double cannot hold is infinite, and what has no scale is right.
    Case huge = run(make({.length = 12, .head_dim = 4, .scale_q = 0x1p1000, .scale_k = 0x1p1000}, 13));
    EXPECT_TRUE(std::isinf(values(huge, "out.norm")[0]));
    EXPECT_EQ(values(huge, "out.routing_energy"), one.tensors.at("out.routing_energy").values);
}

TEST(SdDecompositionReference, AHeadThatIsNotFiniteIsNaNAndNoOther) {
    Case c = make({.length = 5, .query_heads = 3, .key_heads = 3, .head_dim = 2}, 17);
    const Case clean = run(c);
    values(c, "Q")[2] = std::numeric_limits<double>::quiet_NaN();  // of head 1
    values(c, "K")[4] = std::numeric_limits<double>::infinity();   // of head 2
    const Case dirty = run(c);
    for (const auto& [name, tensor] : clean.tensors)
        for (std::size_t i = 0; i < tensor.values.size(); ++i)
            if (i < tensor.values.size() / 3)
                EXPECT_EQ(dirty.tensors.at(name).values[i], tensor.values[i]) << name;
            else
                EXPECT_TRUE(std::isnan(dirty.tensors.at(name).values[i])) << name;
}

TEST(SdDecompositionReference, EmptySizesAreLegal) {
    for (const DecompositionCase& o : std::vector<DecompositionCase>{{.batch = 0}, {.length = 0}, {.query_heads = 0, .key_heads = 0}, {.head_dim = 0}})
        for (const auto& [name, tensor] : run(make(o, 19)).tensors)
            for (const double x : tensor.values) EXPECT_EQ(x, 0.0) << name;
}

TEST(SdDecompositionReference, ErrorsNameTheArgument) {
    Case results, c = make({.length = 3, .query_heads = 4, .key_heads = 3}, 1);
    const auto message = [&](const Options& options) {
        return std::string(run_case<Operator, double, double>(reference{}, options, c, results).message());
    };
    EXPECT_EQ(message({}), "Q: heads are 4, must be a multiple of the 3 of K");
    c = make({.length = 3}, 1);
    EXPECT_EQ(message({.scale = std::numeric_limits<double>::infinity()}), "options.scale is inf, must be finite");
    c.tensors["K"] = Random(1).normal({1, 4, 1, 4});
    EXPECT_EQ(message({}), "K: extent of axis 1 is 4, must be 3");
    c.tensors.erase("K");
    EXPECT_EQ(message({}), "K: is missing");
    c = make({.length = 3}, 1);
    c.tensors["dout.norm"] = {{1, 1}, {1.0}};
    EXPECT_NE(message({}).find("no input of that name"), std::string::npos);
    Options options;
    EXPECT_TRUE(set_option(options, "scale", "1").ok());
    EXPECT_EQ(options.scale, 1.0);
    EXPECT_FALSE(set_option(options, "scale", "nan").ok());
}

}  // namespace
}  // namespace interstate::test
