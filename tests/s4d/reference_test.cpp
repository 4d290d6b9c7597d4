// The reference is the truth of everything else, so it is checked against independent formulas: the
// Vandermonde kernel and a convolution in std::complex, finite differences, series in long double.
#include <complex>

#include <gtest/gtest.h>

#include <s4d/init.hpp>
#include <s4d/reference.hpp>

#include "../support/differences.hpp"
#include "s4d_cases.hpp"

namespace interstate::test {
namespace {

using s4d::Discretization;
using Cd = std::complex<double>;

Case run(const Case& c, s4d::Options options = {}) {
    Case results;
    const Status status = run_case<s4d::Operator, double, double>(reference{}, options, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

/// y = K * u + D u + response of x0 with K[l] = 2 Re sum C Bbar Abar^l, all in std::complex.
TEST(S4dReference, EqualsConvolutionWithTheVandermondeKernel) {
    for (const auto disc : {Discretization::zoh, Discretization::bilinear}) {
        const Index B = 2, L = 29, H = 3, N = 4;
        Case c = make({.batch = B, .length = L, .channels = H, .modes = N}, 1);
        Case got = run(c, {.disc = disc});
        for (Index h = 0; h < H; ++h)
            for (Index b = 0; b < B; ++b)
                for (Index t = 0; t < L; ++t) {
                    Cd y = values(c, "D")[h] * values(c, "u")[(b * L + t) * H + h];
                    for (Index n = 0; n < N; ++n) {
                        const Index i = h * N + n;
                        const double dt = std::exp(values(c, "log_dt")[h]);
                        const Cd A{-std::exp(values(c, "log_neg_re")[i]), values(c, "im")[i]};
                        const Cd Bn{values(c, "B")[2 * i], values(c, "B")[2 * i + 1]};
                        const Cd C{values(c, "C")[2 * i], values(c, "C")[2 * i + 1]};
                        const Index j = (b * H + h) * N + n;
                        const Cd x0{values(c, "x0")[2 * j], values(c, "x0")[2 * j + 1]};
                        Cd Abar, Bbar;
                        if (disc == Discretization::zoh) {
                            Abar = std::exp(dt * A);
                            Bbar = (Abar - 1.0) / A * Bn;
                        } else {
                            Abar = (1.0 + dt * A / 2.0) / (1.0 - dt * A / 2.0);
                            Bbar = dt * Bn / (1.0 - dt * A / 2.0);
                        }
                        y += 2.0 * (C * std::pow(Abar, static_cast<double>(t + 1)) * x0).real();
                        for (Index l = 0; l <= t; ++l)
                            y += 2.0 * (C * Bbar * std::pow(Abar, static_cast<double>(l))).real() *
                                 values(c, "u")[(b * L + t - l) * H + h];
                    }
                    EXPECT_NEAR(values(got, "out.y")[(b * L + t) * H + h], y.real(), 1e-11);
                }
    }
}

/// y[t] gains 2 Re sum_n C_reverse Bbar Abar^(s-t-1) u[s] over s > t, as S4 pads its second kernel.
TEST(S4dReference, BidirectionalAddsTheReversedKernel) {
    const Index L = 11, H = 2, N = 3;
    Case c = make({.batch = 2, .length = L, .channels = H, .modes = N, .bidirectional = true}, 5);
    Case both = run(c);
    const auto reverse = c.tensors.at("C_reverse");
    c.tensors.erase("C_reverse");
    Case causal = run(c);
    for (Index b = 0; b < 2; ++b)
        for (Index h = 0; h < H; ++h)
            for (Index t = 0; t < L; ++t) {
                const Index at = (b * L + t) * H + h;
                double y = values(causal, "out.y")[at];
                for (Index n = 0; n < N; ++n) {
                    const Index i = h * N + n;
                    const double dt = std::exp(values(c, "log_dt")[h]);
                    const Cd A{-std::exp(values(c, "log_neg_re")[i]), values(c, "im")[i]};
                    const Cd Abar = std::exp(dt * A);
                    const Cd Bbar = (Abar - 1.0) / A * Cd{values(c, "B")[2 * i], values(c, "B")[2 * i + 1]};
                    const Cd C{reverse.values[2 * i], reverse.values[2 * i + 1]};
                    for (Index s = t + 1; s < L; ++s)
                        y += 2.0 * (C * Bbar * std::pow(Abar, static_cast<double>(s - t - 1))).real() *
                             values(c, "u")[(b * L + s) * H + h];
                }
                EXPECT_NEAR(values(both, "out.y")[at], y, 1e-11);
            }
    EXPECT_EQ(values(both, "out.xT"), values(causal, "out.xT"));
}

/// K from its formula, and its backward against finite differences.
TEST(S4dReference, KernelGenerationAndItsBackward) {
    const Index L = 13, H = 2, N = 3;
    for (const auto disc : {Discretization::zoh, Discretization::bilinear}) {
        Case c = make({.length = 1, .channels = H, .modes = N}, 9);
        const s4d::Options options{.disc = disc};
        const auto complexes = [&](const char* name) {
            return view(reinterpret_cast<const complex<double>*>(values(c, name).data()), {H, N});
        };
        const auto generate = [&]<class A>(A) {
            std::vector<A> K(H * L);
            const s4d::Params<double> p{.log_dt = view(std::as_const(values(c, "log_dt")).data(), {H}),
                                        .log_neg_re = view(std::as_const(values(c, "log_neg_re")).data(), {H, N}),
                                        .im = view(std::as_const(values(c, "im")).data(), {H, N}),
                                        .B = complexes("B"),
                                        .C = complexes("C")};
            const auto K_view = view(K.data(), {H, L});
            std::vector<char> memory(
                generate_kernel_workspace_size(reference{}, options, shape_of(p, K_view), pass::forward));
            EXPECT_TRUE(
                generate_kernel(reference{}, options, p, K_view, Workspace{memory.data(), memory.size()}).ok());
            return std::pair{K, p};
        };
        const auto [K, params] = generate(double{});
        EXPECT_EQ(generate(float{}).first, std::vector<float>(K.begin(), K.end()));  // rounded once
        Random r(3);
        const HostTensor dK = r.normal({H, L});
        for (Index h = 0; h < H; ++h)
            for (Index l = 0; l < L; ++l) {
                double want = 0.0;
                for (Index n = 0; n < N; ++n) {
                    const auto m = s4d::detail::mode_at(disc, params, h, n);
                    const auto C = params.C(h, n);
                    want += 2.0 * (Cd{C.re, C.im} * Cd{m.Bbar.re, m.Bbar.im} *
                                   std::pow(Cd{m.Abar.re, m.Abar.im}, static_cast<double>(l))).real();
                }
                EXPECT_NEAR(K[h * L + l], want, 1e-12);
            }
        std::map<std::string, HostTensor> grad{{"log_dt", {{H}, std::vector<double>(H)}}};
        for (const char* name : {"log_neg_re", "im"}) grad[name] = {{H, N}, std::vector<double>(H * N)};
        for (const char* name : {"B", "C"}) grad[name] = {{H, N, 2}, std::vector<double>(H * N * 2)};
        const auto out = [&](const char* name) {
            return view(reinterpret_cast<complex<double>*>(grad[name].values.data()), {H, N});
        };
        ASSERT_TRUE(generate_kernel_backward(reference{}, options, params, view(dK.values.data(), {H, L}),
                                             {.log_dt = view(grad["log_dt"].values.data(), {H}),
                                              .log_neg_re = view(grad["log_neg_re"].values.data(), {H, N}),
                                              .im = view(grad["im"].values.data(), {H, N}),
                                              .B = out("B"),
                                              .C = out("C")},
                                             Workspace{})
                        .ok());
        const auto loss = [&] {
            const std::vector<double> K = generate(double{}).first;
            double sum = 0.0;
            for (std::size_t i = 0; i < K.size(); ++i) sum += K[i] * dK.values[i];
            return sum;
        };
        for (const auto& [name, analytic] : grad) {
            HostTensor numeric = analytic;
            for (std::size_t i = 0; i < numeric.values.size(); ++i) {
                double& x = values(c, name)[i];
                const double before = x, step = 1e-5;
                x = before + step;
                const double up = loss();
                x = before - step;
                numeric.values[i] = (up - loss()) / (2 * step);
                x = before;
            }
            const TensorError e = compare(name, analytic, numeric);
            EXPECT_TRUE(e.finite);
            EXPECT_LT(e.relative, 1e-8) << name;
        }
    }
}

/// Loss = <dout, out>; every gradient against central differences.
TEST(S4dReference, GradientsMatchFiniteDifferences) {
    for (const auto disc : {Discretization::zoh, Discretization::bilinear})
        for (const auto& [packed, bidirectional] : {std::pair{false, false}, std::pair{true, false}, std::pair{true, true}}) {
            S4dCase o{.batch = packed ? 1 : 2, .length = 9, .channels = 2, .modes = 3, .bidirectional = bidirectional};
            if (packed) o.cu_seqlens = {1, 4, 4, 8};
            const Case c = make(o, 7);
            const Case got = run(c, {.disc = disc});
            std::size_t compared = 0;
            for (const char* name : {"u", "log_dt", "log_neg_re", "im", "B", "C", "C_reverse", "D", "x0"}) {
                if (!c.tensors.contains(name)) continue;
                compared += c.tensors.at(name).values.size();
                EXPECT_LT(difference_error(c, got, name, 1e-4, 1, [&](const Case& at) { return run(at, {.disc = disc}); }), 1e-8)
                    << name;
            }
            EXPECT_GT(compared, 50u);
        }
}

/// phi and psi against long double, where the closed forms still have digits to spare, and their
/// values at zero.
TEST(S4dReference, PhiAndPsiKeepTheirDigitsNearZero) {
    using Cl = std::complex<long double>;
    for (const double magnitude : {1e-300, 1e-12, 1e-8, 1e-5, 1e-3, 0.1, 0.7, 0.999, 1.001, 3.0, 40.0})
        for (const double angle : {0.6, 1.5707963267948966, 2.5, 3.141592653589793}) {
            const s4d::detail::c64 z{magnitude * std::cos(angle), magnitude * std::sin(angle)};
            s4d::detail::c64 phi, psi;
            s4d::detail::phi_psi(z, phi, psi);
            // Truth: Taylor series in long double; at the largest |z| the terms peak at e^40 = 2e17, so
            // the closed form in long double is the better truth there.
            const Cl zl{z.re, z.im};
            Cl phi_l = 0, psi_l = 0, term = 1;
            if (magnitude < 5) {
                for (int n = 0; n < 60; ++n) {
                    phi_l += term / static_cast<long double>(n + 1);
                    psi_l += term / static_cast<long double>(n + 2);
                    term *= zl / static_cast<long double>(n + 1);
                }
            } else {
                phi_l = (std::exp(zl) - 1.0L) / zl;
                psi_l = (std::exp(zl) * (zl - 1.0L) + 1.0L) / (zl * zl);
            }
            EXPECT_LT(std::abs(Cl{phi.re, phi.im} - phi_l) / std::abs(phi_l), 2e-15L) << magnitude << " " << angle;
            EXPECT_LT(std::abs(Cl{psi.re, psi.im} - psi_l) / std::abs(psi_l), 4e-15L) << magnitude << " " << angle;
        }
}

TEST(S4dReference, StrongDecayUnderflowsWithoutNaN) {
    for (const auto disc : {Discretization::zoh, Discretization::bilinear})
        for (const double log_neg_re : {5.0, 50.0, 1000.0})
            for (const double log_dt : {-5.0, 3.0, 500.0}) {
                Case c = make({.length = 12, .channels = 2, .modes = 3}, 3);
                for (double& x : values(c, "log_neg_re")) x = log_neg_re;
                for (double& x : values(c, "log_dt")) x = log_dt;
                Case got = run(c, {.disc = disc});
                EXPECT_EQ(got.tensors.size(), 10u);
                for (const auto& [name, tensor] : got.tensors)
                    for (const double x : tensor.values) ASSERT_TRUE(std::isfinite(x)) << name << " " << log_neg_re;
                if (log_neg_re == 1000.0) {
                    const auto mode = s4d::detail::discretize(disc, log_dt, log_neg_re, 1.0, {1.0, 0.0});
                    EXPECT_NEAR(mode.Abar.re, disc == Discretization::zoh ? 0.0 : -1.0, 1e-12);
                }
            }
}

Case slice(const Case& c, Index begin, Index end, Index state) {
    Case s = c;
    s.tensors.erase("cu_seqlens");
    for (const char* name : {"u", "dout.y"}) {
        auto& t = s.tensors.at(name);
        const Index row = t.extent[2];
        t.values.assign(t.values.begin() + begin * row, t.values.begin() + end * row);
        t.extent[1] = end - begin;
    }
    for (const char* name : {"x0", "dout.xT"}) {
        auto& t = s.tensors.at(name);
        const auto size = static_cast<Index>(t.values.size()) / t.extent[0];
        t.values.assign(t.values.begin() + state * size, t.values.begin() + (state + 1) * size);
        t.extent[0] = 1;
    }
    return s;
}

TEST(S4dReference, PackedSequencesAreIndependentAndMarginsAreZero) {
    const std::vector<double> cu{2, 7, 7, 12};
    Case c = make({.length = 15, .channels = 2, .modes = 3, .cu_seqlens = cu}, 5);
    const double nan = std::nan("");
    for (const Index t : {0, 1, 12, 13, 14})
        for (const char* name : {"u", "dout.y"})
            for (Index h = 0; h < 2; ++h) values(c, name)[t * 2 + h] = nan;
    Case whole = run(c);
    std::vector<double> grad_B(12, 0.0);
    for (Index s = 0; s < 3; ++s) {
        const auto begin = static_cast<Index>(cu[s]), end = static_cast<Index>(cu[s + 1]);
        Case one = run(slice(c, begin, end, s));
        for (Index i = 0; i < (end - begin) * 2; ++i) {
            EXPECT_EQ(values(whole, "out.y")[begin * 2 + i], values(one, "out.y")[i]);
            EXPECT_EQ(values(whole, "grad.u")[begin * 2 + i], values(one, "grad.u")[i]);
        }
        for (Index i = 0; i < 12; ++i) {
            EXPECT_EQ(values(whole, "out.xT")[s * 12 + i], values(one, "out.xT")[i]);
            EXPECT_EQ(values(whole, "grad.x0")[s * 12 + i], values(one, "grad.x0")[i]);
            if (begin == end) {
                EXPECT_EQ(values(one, "out.xT")[i], values(c, "x0")[s * 12 + i]);
            }
            grad_B[i] += values(one, "grad.B")[i];
        }
    }
    for (const Index t : {0, 1, 12, 13, 14})
        for (Index h = 0; h < 2; ++h) {
            EXPECT_EQ(values(whole, "out.y")[t * 2 + h], 0.0);
            EXPECT_EQ(values(whole, "grad.u")[t * 2 + h], 0.0);
        }
    for (Index i = 0; i < 12; ++i) EXPECT_NEAR(values(whole, "grad.B")[i], grad_B[i], 1e-12);
}

TEST(S4dReference, AnySplitWithCarriedStateIsOneRun) {
    Case c = make({.length = 20, .channels = 2, .modes = 3, .upstream = false}, 9);
    Case whole = run(c);
    std::vector<double> y;
    Case rest = c;
    for (const Index split : {1, 7, 0, 12}) {
        Case piece = c;
        const auto at = values(c, "u").begin() + static_cast<Index>(y.size());
        piece.tensors["u"] = {{1, split, 2}, {at, at + split * 2}};
        piece.tensors["x0"] = rest.tensors.at("x0");
        Case got = run(piece);
        y.insert(y.end(), values(got, "out.y").begin(), values(got, "out.y").end());
        rest.tensors["x0"] = got.tensors.at("out.xT");
    }
    ASSERT_EQ(y.size(), values(whole, "out.y").size());
    for (std::size_t i = 0; i < y.size(); ++i) EXPECT_NEAR(y[i], values(whole, "out.y")[i], 1e-13);
}

TEST(S4dReference, StepIsForward) {
    const Index L = 11, H = 3, N = 4;
    Case c = make({.length = L, .channels = H, .modes = N, .initial_state = false, .upstream = false}, 2);
    Case whole = run(c);
    const auto p = [&](const char* name) { return values(c, name).data(); };
    const auto pc = [&](const char* name) { return reinterpret_cast<complex<double>*>(p(name)); };
    const s4d::Params<double> params{.log_dt = view(p("log_dt"), {H}),
                                     .log_neg_re = view(p("log_neg_re"), {H, N}),
                                     .im = view(p("im"), {H, N}),
                                     .B = view(pc("B"), {H, N}),
                                     .C = view(pc("C"), {H, N}),
                                     .D = view(p("D"), {H})};
    std::vector<complex<double>> Abar(H * N), Bbar(H * N), x(H * N);
    const s4d::Discrete<double> discrete{view(Abar.data(), {H, N}), view(Bbar.data(), {H, N}), params.C, params.D};
    ASSERT_TRUE(discretize(reference{}, s4d::Options{}, params, discrete).ok());
    std::vector<double> y(H);
    for (Index t = 0; t < L; ++t) {
        ASSERT_TRUE(step(reference{}, s4d::Options{}, discrete, s4d::State<double>{view(x.data(), {Index(1), H, N})},
                         s4d::Token<double>{view(static_cast<const double*>(p("u")) + t * H, {Index(1), H})},
                         s4d::TokenOut<double>{view(y.data(), {Index(1), H})}, Workspace{})
                        .ok());
        for (Index h = 0; h < H; ++h) EXPECT_NEAR(y[h], values(whole, "out.y")[t * H + h], 1e-13);
    }
}

TEST(S4dInit, SpectraAreThePublishedOnes) {
    const auto inv = s4d::spectrum(s4d::Init::inv, 4), lin = s4d::spectrum(s4d::Init::lin, 4),
               real = s4d::spectrum(s4d::Init::real, 4), legs1 = s4d::spectrum(s4d::Init::legs, 1),
               legs = s4d::spectrum(s4d::Init::legs, 4);
    EXPECT_DOUBLE_EQ(inv.im[0], 8.0 / std::numbers::pi * 7.0);
    EXPECT_DOUBLE_EQ(inv.im[3], 8.0 / std::numbers::pi * (8.0 / 7.0 - 1.0));
    EXPECT_DOUBLE_EQ(lin.im[2], 2.0 * std::numbers::pi);
    EXPECT_DOUBLE_EQ(real.neg_re[3], 4.0);
    EXPECT_DOUBLE_EQ(real.im[3], 0.0);
    EXPECT_NEAR(legs1.im[0], std::sqrt(3.0) / 2.0, 1e-14);  // [[0, a], [-a, 0]] with a = sqrt(3)/2
    // The squares of the eigenvalues of a skew-symmetric matrix add up to its squared entries.
    double squares = 0.0, entries = 0.0;
    for (int i = 0; i < 4; ++i) {
        squares += legs.im[i] * legs.im[i];
        EXPECT_GT(legs.im[i], i ? legs.im[i - 1] : 0.0);
        EXPECT_DOUBLE_EQ(legs.neg_re[i], 0.5);
    }
    for (int i = 0; i < 8; ++i)
        for (int j = i + 1; j < 8; ++j) entries += 0.25 * (2 * i + 1) * (2 * j + 1);
    EXPECT_NEAR(squares, entries, 1e-10 * entries);
}

TEST(S4dInit, FillsParametersReproducibly) {
    const Index H = 50, N = 8;
    std::vector<float> log_dt(H), log_neg_re(H * N), im(H * N), D(H);
    std::vector<complex<float>> B(H * N), C(H * N);
    const s4d::MutableParams<float> params{view(log_dt.data(), {H}), view(log_neg_re.data(), {H, N}),
                                           view(im.data(), {H, N}),  view(B.data(), {H, N}),
                                           view(C.data(), {H, N}),   view(D.data(), {H})};
    ASSERT_TRUE(initialize(s4d::Init::lin, 1, params).ok());
    const auto first = C;
    double power = 0.0;
    for (const auto& z : C) power += dot(z, z);
    EXPECT_NEAR(power / static_cast<double>(H * N), 1.0, 0.2);
    for (const float x : log_dt) {
        EXPECT_GE(x, std::log(1e-3f) - 1e-5f);
        EXPECT_LE(x, std::log(1e-1f) + 1e-5f);
    }
    ASSERT_TRUE(initialize(s4d::Init::lin, 1, params).ok());
    EXPECT_EQ(first[17].re, C[17].re);
    ASSERT_TRUE(initialize(s4d::Init::lin, 2, params).ok());
    EXPECT_NE(first[17].re, C[17].re);
    EXPECT_EQ(initialize(s4d::Init::lin, 2, params, 0.1, 0.01).code(), StatusCode::invalid_argument);
}

/// The message names the argument, what it was and what it must be.
TEST(S4dReference, ErrorsNameTheArgument) {
    const auto message = [](const Case& c) {
        Case results;
        const Status status = run_case<s4d::Operator, double, double>(reference{}, {}, c, results);
        EXPECT_EQ(status.code(), StatusCode::invalid_argument);
        return std::string(status.message());
    };
    const Case good = make({.length = 4, .channels = 2, .modes = 3}, 1);
    Case c = good;
    c.tensors.erase("C");
    EXPECT_EQ(message(c), "C: is missing");
    c = good;
    c.tensors["im"] = HostTensor{{2, 4}, std::vector<double>(8)};
    EXPECT_EQ(message(c), "im: extent of axis 1 is 4, must be 3");
    c = good;
    c.tensors["cu_seqlens"] = {{3}, {0, 3, 2}};
    c.tensors["x0"] = HostTensor{{2, 2, 3, 2}, std::vector<double>(24)};
    c.tensors.erase("dout.xT");
    EXPECT_EQ(message(c), "cu_seqlens: element 2 is 2, must be at least 3 and at most 4");
    c = good;
    c.tensors["speed"] = HostTensor{{1}, {1}};
    EXPECT_EQ(message(c), "tensor speed: s4d has no input of that name");

    std::vector<double> u(8);
    s4d::Inputs<double> in{.u = view(u.data(), {1, 4, 2})};
    in.params.log_neg_re.extent[0] = 2;
    in.params.log_neg_re.extent[1] = 3;
    EXPECT_EQ(std::string(forward(reference{}, {}, in, s4d::Outputs<double>{}, {}, {}).message()),
              "log_dt: is missing, must be a view");
    s4d::Options options;
    EXPECT_FALSE(set_option(options, "disc", "foh").ok());
    EXPECT_TRUE(set_option(options, "disc", "bilinear").ok());
    EXPECT_EQ(options.disc, Discretization::bilinear);
}

}  // namespace
}  // namespace interstate::test
