// The reference is the truth of everything else, so it is checked against the coefficients formed as written, and
// against finite differences.
#include <complex>

#include <gtest/gtest.h>

#include <interdomain/init.hpp>
#include <interdomain/interdomain.hpp>

#include "../support/differences.hpp"
#include "interdomain_cases.hpp"

namespace interstate::test {
namespace {

using interdomain::Discretization;
using interdomain::Normalizer;
using interdomain::Operator;
using interdomain::Options;
using interdomain::Readout;
using Cd = std::complex<double>;

Case run(const Case& c, const Options& options) {
    Case results;
    const Status status = run_case<Operator, double, double>(reference{}, options, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

Cd complex_at(Case& c, const std::string& name, Index i) {
    const auto& x = values(c, name);
    return {x[static_cast<std::size_t>(2 * i)], x[static_cast<std::size_t>(2 * i + 1)]};
}

/// Eq. 1 to 6 with U and Gam formed, in std::complex.
TEST(InterdomainReference, EqualsTheCoefficientsFormedAsWritten) {
    const Index B = 2, L = 11, Hkv = 2, group = 2, R = 3, d = 5, M = 4, W = R + d;
    for (const Options& options : all_options()) {
        Case c = make({.batch = B, .length = L, .query_heads = Hkv * group, .kv_heads = Hkv, .features = R,
                       .value_dim = d, .modes = M, .upstream = false, .normalizer = options.normalized()}, 1);
        Case got = run(c, options);
        for (Index b = 0; b < B; ++b)
            for (Index h = 0; h < Hkv; ++h) {
                std::vector<Cd> X(M * (W + 1));
                for (Index m = 0; m < M; ++m)
                    for (Index j = 0; j <= W; ++j)
                        X[m * (W + 1) + j] = j < W ? complex_at(c, "x0", ((b * Hkv + h) * M + m) * W + j)
                                             : options.normalized() ? complex_at(c, "eta0", (b * Hkv + h) * M + m)
                                                                    : Cd{};
                for (Index t = 0; t < L; ++t) {
                    for (Index m = 0; m < M; ++m) {
                        const Cd A{-std::exp(values(c, "log_neg_re")[h * M + m]), values(c, "im")[h * M + m]};
                        const Cd Lam = std::exp(std::exp(values(c, "log_dt")[h]) * A), Bm = complex_at(c, "B", h * M + m);
                        const Cd Bbar = options.disc == Discretization::zoh ? (Lam - 1.0) / A * Bm : Bm;
                        for (Index j = 0; j <= W; ++j) {
                            const double z = j < R   ? values(c, "k")[((b * L + t) * Hkv + h) * R + j]
                                             : j < W ? values(c, "v")[((b * L + t) * Hkv + h) * d + j - R]
                                                     : 1.0;
                            X[m * (W + 1) + j] = Lam * X[m * (W + 1) + j] + Bbar * z;
                        }
                    }
                    std::vector<Cd> coefficients(M * (W + 1));
                    for (Index m = 0; m < M; ++m)
                        for (Index j = 0; j <= W; ++j) {
                            Cd sum{};
                            for (Index n = 0; n < M; ++n)
                                sum += complex_at(c, "C", (h * M + m) * M + n) * X[n * (W + 1) + j];
                            coefficients[m * (W + 1) + j] =
                                options.readout == Readout::real_parts ? Cd{2.0 * sum.real()} : sum;
                        }
                    for (Index hq = h * group; hq < (h + 1) * group; ++hq) {
                        const auto read = [&](Index column) {
                            Cd sum{};
                            for (Index m = 0; m < M; ++m)
                                for (Index r = 0; r < R; ++r)
                                    sum += values(c, "q")[((b * L + t) * Hkv * group + hq) * R + r] *
                                           coefficients[m * (W + 1) + r] * coefficients[m * (W + 1) + column];
                            return sum.real();
                        };
                        const double den = options.normalized() ? read(W) : 1.0;
                        for (Index j = 0; j < d; ++j) {
                            const double want = read(R + j) / den;
                            EXPECT_NEAR(values(got, "out.o")[((b * L + t) * Hkv * group + hq) * d + j], want,
                                        1e-10 * (1.0 + std::abs(want)));
                        }
                    }
                }
            }
    }
}

/// Loss = <dout, out>; every gradient against differences. 67 tokens are more than one stretch of backward.
TEST(InterdomainReference, GradientsMatchFiniteDifferences) {
    for (const Options& options : all_options())
        for (const bool packed : {false, true}) {
            InterdomainCase o{.batch = packed ? 1 : 2, .length = packed ? 9 : 67, .query_heads = 2, .kv_heads = 1,
                              .features = 2, .value_dim = 3, .modes = 2, .normalizer = options.normalized()};
            if (packed) o.cu_seqlens = {1, 4, 4, 8};
            if (options.normalized()) o.length = 9;  // den comes near zero sooner or later
            const Case c = make(o, 11);
            const Case got = run(c, options);
            int compared = 0;
            for (const char* name : {"q", "k", "v", "log_dt", "log_neg_re", "im", "B", "C", "x0", "eta0"}) {
                if (!c.tensors.contains(name)) continue;
                ++compared;
                EXPECT_LT(difference_error(c, got, name, 1e-5, 7, [&](const Case& at) { return run(at, options); }), 1e-6)
                    << name << (packed ? ", packed" : "");
            }
            EXPECT_EQ(compared, options.normalized() ? 10 : 9);
        }
}

/// Pieces that carry the state, and single steps, equal one call.
TEST(InterdomainReference, StatesCarry) {
    const Index B = 2, L = 9, Hq = 4, Hkv = 2, R = 3, d = 2, M = 3;
    for (const Options& options : all_options()) {
        const Case c = make({.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .features = R, .value_dim = d,
                             .modes = M, .upstream = false, .normalizer = options.normalized()}, 5);
        Case whole = run(c, options);
        const auto piece = [&](Case at, Index begin, Index end, Case& results) {
            for (const auto& [name, heads, size] :
                 {std::tuple{"q", Hq, R}, std::tuple{"k", Hkv, R}, std::tuple{"v", Hkv, d}}) {
                HostTensor part{{B, end - begin, heads, size}, {}};
                for (Index b = 0; b < B; ++b) {
                    const auto from = at.tensors[name].values.begin() + (b * L + begin) * heads * size;
                    part.values.insert(part.values.end(), from, from + (end - begin) * heads * size);
                }
                at.tensors[name] = part;
            }
            results = run(at, options);
        };
        Case at = c, first, second;
        piece(at, 0, 4, first);
        at.tensors["x0"] = first.tensors.at("out.xT");
        if (options.normalized()) at.tensors["eta0"] = first.tensors.at("out.etaT");
        piece(at, 4, L, second);
        for (Index b = 0; b < B; ++b)
            for (Index i = 0; i < L * Hq * d; ++i) {
                const bool early = i < 4 * Hq * d;
                EXPECT_EQ(values(whole, "out.o")[b * L * Hq * d + i],
                          early ? values(first, "out.o")[b * 4 * Hq * d + i]
                                : values(second, "out.o")[b * (L - 4) * Hq * d + i - 4 * Hq * d]);
            }
        EXPECT_EQ(values(whole, "out.xT"), values(second, "out.xT"));

        // Token by token, in place.
        Case copy = c;
        const auto complexes = [&](const char* name) { return reinterpret_cast<complex<double>*>(values(copy, name).data()); };
        std::vector<complex<double>> Lam(Hkv * M), Bbar(Hkv * M);
        const interdomain::Params<double> params{
            .log_dt = view(std::as_const(values(copy, "log_dt")).data(), {Hkv}),
            .log_neg_re = view(std::as_const(values(copy, "log_neg_re")).data(), {Hkv, M}),
            .im = view(std::as_const(values(copy, "im")).data(), {Hkv, M}),
            .B = view(static_cast<const complex<double>*>(complexes("B")), {Hkv, M}),
            .C = view(static_cast<const complex<double>*>(complexes("C")), {Hkv, M, M})};
        const interdomain::Discrete<double> discrete{view(Lam.data(), {Hkv, M}), view(Bbar.data(), {Hkv, M}), params.C};
        ASSERT_TRUE(discretize(reference{}, options, params, discrete).ok());
        interdomain::State<double> state{.x = view(complexes("x0"), {B, Hkv, M, R + d})};
        if (options.normalized()) state.eta = view(complexes("eta0"), {B, Hkv, M});
        std::vector<double> o(B * Hq * d);
        for (Index t = 0; t < L; ++t) {
            const auto token_of = [&](const char* name, Index heads, Index size) {
                return View<const double, 3>{values(copy, name).data() + t * heads * size, {B, heads, size},
                                             {L * heads * size, size, 1}};
            };
            const interdomain::Token<double> token{token_of("q", Hq, R), token_of("k", Hkv, R), token_of("v", Hkv, d)};
            const interdomain::Shape shape = shape_of(discrete, token);
            std::vector<char> memory(workspace_size(reference{}, options, shape, pass::step));
            ASSERT_TRUE(step(reference{}, options, discrete, state, token, {view(o.data(), {B, Hq, d})},
                             Workspace{memory.data(), memory.size()})
                            .ok());
            for (Index b = 0; b < B; ++b)
                for (Index i = 0; i < Hq * d; ++i)
                    EXPECT_NEAR(o[b * Hq * d + i], values(whole, "out.o")[(b * L + t) * Hq * d + i], 1e-12);
        }
    }
}

TEST(InterdomainReference, SequencesDoNotTouch) {
    InterdomainCase o{.length = 20, .query_heads = 2, .kv_heads = 2, .cu_seqlens = {2, 7, 7, 15}};
    const Case clean = make(o, 9);
    Case dirty = clean;
    for (const char* name : {"q", "k", "v", "dout.o"})
        for (Index t = 0; t < 20; ++t)
            if (t < 2 || t >= 7)
                for (Index i = 0; i < 8; ++i) values(dirty, name)[t * 8 + i] = std::nan("");
    Case a = run(clean, {}), b = run(dirty, {});
    for (const char* name : {"out.o", "grad.q", "grad.k", "grad.v"})
        for (Index t = 0; t < 20; ++t)
            for (Index i = 0; i < 8; ++i) {
                const double x = values(b, name)[t * 8 + i];
                if (t >= 7 && t < 15)
                    EXPECT_TRUE(std::isnan(x)) << name << t;
                else
                    EXPECT_EQ(x, t >= 2 && t < 7 ? values(a, name)[t * 8 + i] : 0.0) << name << t;
            }
}

TEST(InterdomainReference, SizesOfZero) {
    for (const auto& [B, L, Hkv, R, d, M] :
         {std::array<Index, 6>{0, 3, 1, 2, 2, 2}, std::array<Index, 6>{2, 0, 1, 2, 2, 2}, std::array<Index, 6>{2, 3, 0, 2, 2, 2},
          std::array<Index, 6>{2, 3, 1, 0, 2, 2}, std::array<Index, 6>{2, 3, 1, 2, 0, 2}, std::array<Index, 6>{2, 3, 1, 2, 2, 0}}) {
        Case c = make({.batch = B, .length = L, .query_heads = Hkv, .kv_heads = Hkv, .features = R, .value_dim = d, .modes = M}, 3);
        Case got = run(c, {});
        if (L == 0) {
            EXPECT_EQ(values(got, "out.xT"), values(c, "x0"));
        }
        for (const double x : values(got, "out.o")) {
            if (R == 0 || M == 0) {
                EXPECT_EQ(x, 0.0);
            }
        }
    }
}

/// The four totals of the paper: a softmax model of the same shape, and what each of its layers gains.
TEST(InterdomainInit, ParameterCountsAreThePaper) {
    struct Model {
        Index softmax, published, heads, dim, layers;
    };
    for (const Model& m : {Model{134105856, 135416208, 12, 64, 12}, Model{373867520, 377360768, 16, 64, 24},
                           Model{777856512, 781498752, 16, 96, 24}, Model{1345423360, 1352406784, 32, 64, 24}}) {
        const interdomain::LayerConfig layer{.query_heads = m.heads, .kv_heads = m.heads, .features = m.dim,
                                             .value_dim = m.dim, .modes = 64};
        EXPECT_EQ(m.softmax + m.layers * parameter_count(layer), m.published);
        EXPECT_EQ(state_size(layer), m.heads * 2 * 64 * 2 * m.dim);
    }
}

TEST(InterdomainInit, FillsEveryParameter) {
    const Index H = 3, M = 5;
    std::vector<double> log_dt(H), log_neg_re(H * M), im(H * M);
    std::vector<complex<double>> B(H * M), C(H * M * M);
    const interdomain::MutableParams<double> params{view(log_dt.data(), {H}), view(log_neg_re.data(), {H, M}),
                                                    view(im.data(), {H, M}), view(B.data(), {H, M}),
                                                    view(C.data(), {H, M, M})};
    ASSERT_TRUE(interdomain::initialize(1, params).ok());
    double power = 0.0;
    for (const auto& c : C) power += (c.re * c.re + c.im * c.im) * static_cast<double>(M) / static_cast<double>(C.size());
    EXPECT_NEAR(power, 1.0, 0.5);
    for (Index h = 0; h < H; ++h) {
        EXPECT_TRUE(log_dt[h] >= std::log(1e-3) && log_dt[h] <= std::log(1e-1));
        EXPECT_EQ(log_neg_re[h * M], std::log(0.5));
        EXPECT_NEAR(im[h * M], 5.0 / std::numbers::pi * 4.0, 1e-14);
        EXPECT_NEAR(im[h * M + 4], 5.0 / std::numbers::pi * (5.0 / 9.0 - 1.0), 1e-14);
        EXPECT_TRUE(B[h * M].re == 1.0 && B[h * M].im == 0.0);
    }
    EXPECT_NE(log_dt[0], log_dt[1]);
    auto missing = params;
    missing.C = {};
    EXPECT_FALSE(interdomain::initialize(1, missing).ok());
    EXPECT_FALSE(interdomain::initialize(1, params, 0.0, 1.0).ok());
}

TEST(InterdomainReference, ErrorsNameTheArgument) {
    const auto message = [](Case c, const Options& options) {
        Case results;
        const Status s = run_case<Operator, double, double>(reference{}, options, c, results);
        EXPECT_EQ(s.code(), StatusCode::invalid_argument);
        return std::string(s.message());
    };
    const InterdomainCase good{.length = 3, .query_heads = 2, .kv_heads = 2};
    Case c = make(good, 1);
    c.tensors["eta0"] = Random(1).normal({1, 2, 4, 2});
    EXPECT_NE(message(c, {}).find("eta0"), std::string::npos);
    c = make({.length = 3, .query_heads = 3, .kv_heads = 2}, 1);
    EXPECT_NE(message(c, {}).find("a multiple of the heads of k"), std::string::npos);
    c = make(good, 1);
    c.tensors["k"] = Random(1).normal({1, 3, 2, 5});
    EXPECT_NE(message(c, {}).find("k: "), std::string::npos);
    Options options;
    EXPECT_NE(std::string(set_option(options, "readout", "imaginary").message()).find("complex_product|real_parts"),
              std::string::npos);
}

}  // namespace
}  // namespace interstate::test
