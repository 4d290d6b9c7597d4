// The CPU executor against the float64 reference: every method, dtype and instruction set, sizes around
// every tile, states, packing, both directions, strides, threads, and the numerics the page promises.
#include <array>

#include <gtest/gtest.h>

#include <s4d/s4d.hpp>

#include "../support/isas.hpp"
#include "../support/sanitized.hpp"
#include "s4d_cases.hpp"

namespace interstate::test {
namespace {

using s4d::Discretization;
using s4d::Method;
using s4d::Operator;

constexpr Method methods[] = {Method::scan, Method::chunked, Method::fft};

template <class T, class P>
void expect_close(const Case& c, cpu exec, s4d::Options options = {}, RunOptions run = {}) {
    const Case in = rounded<Operator, T, P>(c);
    Case got, want;
    const Status status = run_case<Operator, T, P>(exec, options, in, got, run);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, in, want).ok()));
    EXPECT_EQ(beyond_tolerance<T>(in, got, want), "")
        << to_string(options.method) << " " << to_string(dtype_of<T>) << " " << to_string(exec.isa)
        << (in.tensors.contains("C_reverse") ? " bidirectional" : "") << " L=" << in.tensors.at("u").extent[1]
        << " H=" << in.tensors.at("u").extent[2] << " N=" << in.tensors.at("im").extent[1];
}

void expect_close_in_every_dtype(const Case& c, cpu exec, s4d::Options options = {}, RunOptions run = {}) {
    expect_close<f64, double>(c, exec, options, run);
    expect_close<f32, float>(c, exec, options, run);
    if constexpr (!sanitized) expect_close<f16, float>(c, exec, options, run);
    expect_close<bf16, float>(c, exec, options, run);
}

TEST(S4dCpu, EveryLengthAroundTheTiles) {
    for (const Method method : methods)
        for (const Isa isa : isas())
            for (const bool both : {false, true})
                for (const Index L :
                     {0, 1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 255, 256, 257, 509, 511, 512, 513, 1021})
                    expect_close<f32, float>(
                        make({.length = L, .channels = 5, .modes = 3, .bidirectional = both}, 100 + L),
                        {.threads = 2, .isa = isa}, {.method = method});
}

TEST(S4dCpu, EveryDtypeChannelAndModeCount) {
    for (const Method method : methods)
        for (const Isa isa : isas())
            for (const Index H : {1, 3, 7, 8, 9, 16, 17, 33})
                for (const Index N : {1, 2, 5})
                    expect_close_in_every_dtype(
                        make({.batch = 2, .length = 61, .channels = H, .modes = N, .bidirectional = H == 9},
                             10 * H + N),
                        {.threads = 2, .isa = isa}, {.method = method});
}

TEST(S4dCpu, AnyModeCount) {
    for (const Method method : methods)
        for (const Isa isa : isas())
            for (const Index N : {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 131}) {
                const Case c =
                    make({.length = 83, .channels = 3, .modes = N, .bidirectional = N % 2 == 0}, 5 + N);
                expect_close<f32, float>(c, {.threads = 2, .isa = isa}, {.method = method});
                expect_close<f64, double>(c, {.threads = 2, .isa = isa}, {.method = method});
            }
}

TEST(S4dCpu, EmptySizesAreLegal) {
    for (const Method method : methods)
        for (const auto& [B, L, H, N] :
             std::vector<std::array<Index, 4>>{{0, 5, 3, 2}, {2, 0, 3, 2}, {2, 5, 0, 2}, {2, 5, 3, 0}})
            for (const bool both : {false, true})
                expect_close<f32, float>(
                    make({.batch = B, .length = L, .channels = H, .modes = N, .bidirectional = both}, 3), {},
                    {.method = method});
}

TEST(S4dCpu, BothDiscretizationsOptionalInputsAndParameterDtypes) {
    for (const Method method : methods)
        for (const auto disc : {Discretization::zoh, Discretization::bilinear})
            for (const bool optional : {false, true}) {
                const s4d::Options options{.disc = disc, .method = method};
                const Case c = make({.batch = 3,
                                     .length = 270,
                                     .channels = 18,
                                     .modes = 4,
                                     .initial_state = optional,
                                     .feedthrough = optional},
                                    8);
                expect_close_in_every_dtype(c, {}, options);
                expect_close<f32, double>(c, {}, options);
                expect_close<bf16, double>(c, {}, options);
            }
}

TEST(S4dCpu, StatesAreOptionalOneByOne) {
    for (const Method method : methods)
        for (const bool x0 : {false, true})
            for (const bool dxT : {false, true}) {
                Case c =
                    make({.batch = 2, .length = 300, .channels = 6, .modes = 5, .initial_state = x0}, 77);
                if (!dxT) c.tensors.erase("dout.xT");
                expect_close<f32, float>(c, {.threads = 2}, {.method = method});
                expect_close<f64, double>(c, {.threads = 2}, {.method = method});
            }
}

TEST(S4dCpu, AnyStrides) {
    for (const Method method : methods)
        for (const bool both : {false, true}) {
            const Case c =
                make({.batch = 2, .length = 265, .channels = 19, .modes = 3, .bidirectional = both}, 12);
            for (const Layout layout : {Layout::reversed, Layout::padded})
                expect_close_in_every_dtype(c, {.threads = 2}, {.method = method}, {.layout = layout});
        }
}

TEST(S4dCpu, PackedSequencesWithNaNNeighboursAndMargins) {
    const std::vector<double> cu{3, 3, 40, 41, 300, 300, 700};
    for (const Method method : methods)
        for (const bool both : {false, true}) {
            const s4d::Options options{.method = method};
            const S4dCase shape{
                .length = 710, .channels = 9, .modes = 4, .cu_seqlens = cu, .bidirectional = both};
            for (const double poison : {0.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
                Case c = make(shape, 4);
                if (poison != 0.0)  // margins belong to no sequence
                    for (const char* name : {"u", "dout.y"})
                        for (Index t = 0; t < 710; ++t)
                            if (t < 3 || t >= 700)
                                for (Index h = 0; h < 9; ++h) c.tensors[name].values[t * 9 + h] = poison;
                expect_close_in_every_dtype(c, {.threads = 2}, options);
            }
            // A sequence full of NaN changes nothing in the others.
            Case c = make(shape, 4);
            Case clean, dirty;
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, options, c, clean).ok()));
            for (Index i = 41 * 9; i < 300 * 9; ++i)
                c.tensors["u"].values[i] = c.tensors["dout.y"].values[i] = std::nan("");
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, options, c, dirty).ok()));
            for (const char* name : {"out.xT", "grad.x0"})  // sequence 3 is the one with NaN
                for (Index i = 0; i < 6 * 9 * 4 * 2; ++i) {
                    if (i / (9 * 4 * 2) != 3) {
                        ASSERT_EQ(dirty.tensors[name].values[i], clean.tensors[name].values[i]) << name;
                    }
                }
            for (Index t = 0; t < 700; ++t)
                for (Index h = 0; h < 9; ++h) {
                    const auto at = static_cast<std::size_t>(t * 9 + h);
                    if (t >= 41 && t < 300)
                        EXPECT_TRUE(std::isnan(dirty.tensors["out.y"].values[at]));
                    else
                        for (const char* name : {"out.y", "grad.u"})
                            ASSERT_EQ(dirty.tensors[name].values[at], clean.tensors[name].values[at])
                                << name << t;
                }
        }
}

/// Not so for fft, whose page says so: a transform mixes all tokens of a sequence.
TEST(S4dCpu, NothingReachesEarlierTokensByScanAndChunked) {
    const Index L = 700, H = 5;
    for (const Method method : {Method::scan, Method::chunked})
        for (const double poison : {std::nan(""), std::numeric_limits<double>::infinity()})
            for (const Index at : {0, 9, 15, 16, 100, 255, 256, 690, 699}) {
                Case c = make({.length = L, .channels = H, .modes = 3}, 9);
                Case clean, dirty;
                ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {.method = method}, c, clean).ok()));
                for (const char* name : {"u", "dout.y"})
                    for (Index h = 0; h < H; ++h) c.tensors[name].values[at * H + h] = poison;
                ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {.method = method}, c, dirty).ok()));
                for (Index i = 0; i < at * H; ++i)
                    ASSERT_EQ(dirty.tensors["out.y"].values[i], clean.tensors["out.y"].values[i]) << at;
                for (Index i = (at + 1) * H; i < L * H; ++i)
                    ASSERT_EQ(dirty.tensors["grad.u"].values[i], clean.tensors["grad.u"].values[i]) << at;
                EXPECT_FALSE(std::isfinite(dirty.tensors["out.y"].values[at * H]));
                EXPECT_FALSE(std::isfinite(dirty.tensors["grad.u"].values[at * H]));
            }
}

TEST(S4dCpu, SameBitsForAnyThreadCountAndRun) {
    for (const Method method : methods)
        for (const bool packed : {false, true})
            for (const bool both : {false, true}) {
                S4dCase o{.batch = packed ? 1 : 19,
                          .length = 130,
                          .channels = 37,
                          .modes = 3,
                          .bidirectional = both};
                if (packed)
                    o.cu_seqlens = {0,  10, 20, 30, 40, 50,  60,  70,  80, 90,
                                    95, 96, 97, 98, 99, 100, 101, 105, 130};
                const Case c = make(o, 21);
                const s4d::Options options{.method = method};
                Case first;
                ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 1}, options, c, first).ok()));
                for (const int threads : {1, 2, 3, 5}) {
                    Case again;
                    ASSERT_TRUE(
                        (run_case<Operator, float, float>(cpu{.threads = threads}, options, c, again).ok()));
                    for (const auto& [name, tensor] : first.tensors)
                        EXPECT_EQ(tensor.values, again.tensors.at(name).values)
                            << name << " with " << threads << " threads";
                }
            }
}

/// Shapes, options and inputs at random: every method finds the same.
TEST(S4dCpu, MethodsAgreeOnRandomCases) {
    Random r(2026);
    const auto up_to = [&](Index n) { return r.up_to(n); };
    for (int trial = 0; trial < 40; ++trial) {
        S4dCase o{.batch = 1 + up_to(3),
                  .length = up_to(700),
                  .channels = 1 + up_to(20),
                  .modes = 1 + up_to(12),
                  .initial_state = up_to(1) == 1,
                  .feedthrough = up_to(1) == 1,
                  .decay = std::pow(10.0, r.uniform(-3.0, 1.0)),
                  .bidirectional = up_to(1) == 1};
        if (up_to(2) == 0) {
            o.batch = 1;
            o.cu_seqlens = r.offsets(o.length);
        }
        const Case c = make(o, 1000 + trial);
        const auto disc = up_to(1) == 1 ? Discretization::zoh : Discretization::bilinear;
        const Isa isa = isas()[static_cast<std::size_t>(up_to(static_cast<Index>(isas().size()) - 1))];
        for (const Method method : {Method::automatic, Method::scan, Method::chunked, Method::fft}) {
            const s4d::Options options{.disc = disc, .method = method};
            expect_close<f64, double>(c, {.threads = 2, .isa = isa}, options);
            expect_close<f32, float>(c, {.threads = 2, .isa = isa}, options);
            expect_close<bf16, float>(c, {.threads = 2, .isa = isa}, options);
        }
    }
}

/// docs/ops/s4d.md, "Phase": slowly decaying modes at 65,536 tokens. A plain float recurrence is off by
/// 1e-3 here.
TEST(S4dCpu, PhaseHoldsOverSixtyFiveThousandTokens) {
    Case c = make({.length = 65536, .channels = 3, .modes = 4, .decay = 1e-4}, 31);
    for (double& x : c.tensors["log_dt"].values) x = -4.6;
    for (const bool both : {false, true}) {
        if (both) c.tensors["C_reverse"] = c.tensors["C"];
        Case in = rounded<Operator, float, float>(c), want;
        ASSERT_TRUE((run_case<Operator, double, double>(reference{}, {}, in, want).ok()));
        for (const Method method : methods)
            for (const Isa isa : isas()) {
                Case got;
                ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 2, .isa = isa},
                                                              {.method = method}, in, got)
                                 .ok()));
                EXPECT_EQ(beyond_tolerance<f32>(in, got, want), "") << to_string(method) << " " << to_string(isa);
            }
    }
}

TEST(S4dCpu, StrongDecayAndHugeInputs) {
    for (const Method method : methods)
        for (const bool both : {false, true}) {
            const S4dCase shape{.length = 300, .channels = 17, .modes = 3, .bidirectional = both};
            for (const auto disc : {Discretization::zoh, Discretization::bilinear})
                for (const double decay : {1e3, 1e8, 1e30}) {
                    S4dCase strong = shape;
                    strong.decay = decay;
                    expect_close<f32, float>(make(strong, 2), {}, {.disc = disc, .method = method});
                }
            Case c = make(shape, 2);
            for (double& x : c.tensors["u"].values) x *= 1e15;
            expect_close<f32, float>(c, {}, {.method = method});
            for (double& x : c.tensors["u"].values) x = 0.0;
            expect_close<f32, float>(c, {}, {.method = method});
        }
}

/// Any split, single tokens included, is one run up to rounding, in float too: neither small chunks nor
/// `step` may drift.
TEST(S4dCpu, SplitsAndStepsDoNotDrift) {
    const Index L = 4096, H = 5, N = 3;
    Case c = rounded<Operator, float, float>(
        make({.length = L, .channels = H, .modes = N, .upstream = false, .decay = 1e-3}, 14));
    Case whole;
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, {}, c, whole).ok()));
    const HostTensor u = c.tensors["u"], x0 = c.tensors["x0"];

    for (const Method method : methods)
        for (const Index chunk : {Index{1}, Index{7}, Index{100}}) {
            HostTensor y{{1, L, H}, {}};
            Case piece = c;
            for (Index t = 0; t < L; t += chunk) {
                const Index count = std::min(chunk, L - t);
                piece.tensors["u"] = {{1, count, H},
                                      {u.values.begin() + t * H, u.values.begin() + (t + count) * H}};
                Case got;
                ASSERT_TRUE(
                    (run_case<Operator, float, float>(cpu{.threads = 1}, {.method = method}, piece, got)
                         .ok()));
                y.values.insert(y.values.end(), got.tensors["out.y"].values.begin(),
                                got.tensors["out.y"].values.end());
                piece.tensors["x0"] = got.tensors["out.xT"];
            }
            const TensorError e = compare("y", y, whole.tensors["out.y"]);
            EXPECT_TRUE(e.finite);
            EXPECT_LT(e.relative, 1e-5) << to_string(method) << " in pieces of " << chunk;
        }

    for (const Isa isa : isas()) {
        const auto floats = [](const HostTensor& t) {
            return std::vector<float>(t.values.begin(), t.values.end());
        };
        auto log_dt = floats(c.tensors["log_dt"]), log_neg_re = floats(c.tensors["log_neg_re"]);
        auto im = floats(c.tensors["im"]), B = floats(c.tensors["B"]), C = floats(c.tensors["C"]);
        auto D = floats(c.tensors["D"]), state = floats(x0), input = floats(u);
        const auto as_complex = [](std::vector<float>& v) {
            return reinterpret_cast<complex<float>*>(v.data());
        };
        const s4d::Params<float> params{view(log_dt.data(), {H}),    view(log_neg_re.data(), {H, N}),
                                        view(im.data(), {H, N}),     view(as_complex(B), {H, N}),
                                        view(as_complex(C), {H, N}), view(D.data(), {H})};
        std::vector<complex<double>> Abar(H * N), Bbar(H * N);
        const s4d::Discrete<float> discrete{view(Abar.data(), {H, N}), view(Bbar.data(), {H, N}), params.C,
                                            params.D};
        const cpu exec{.isa = isa};
        ASSERT_TRUE(discretize(exec, s4d::Options{}, params, discrete).ok());
        std::vector<float> out(H);
        HostTensor y{{1, L, H}, {}};
        for (Index t = 0; t < L; ++t) {
            ASSERT_TRUE(
                step(exec, s4d::Options{}, discrete,
                     s4d::State<float>{view(as_complex(state), {Index{1}, H, N})},
                     s4d::Token<float>{view(static_cast<const float*>(input.data()) + t * H, {Index{1}, H})},
                     s4d::TokenOut<float>{view(out.data(), {Index{1}, H})}, Workspace{})
                    .ok());
            y.values.insert(y.values.end(), out.begin(), out.end());
        }
        const TensorError e = compare("y", y, whole.tensors["out.y"]);
        EXPECT_TRUE(e.finite);
        EXPECT_LT(e.relative, 1e-5) << to_string(isa);
    }
}

TEST(S4dCpu, StepTakesAnyStridesAndDtypes) {
    const Index B = 3, H = 4, N = 11;
    Random r(3);
    std::vector<complex<double>> Abar(H * N), Bbar(H * N);
    std::vector<complex<float>> C(H * N), x(B * H * N), x_strided(B * H * N);
    for (Index i = 0; i < H * N; ++i) {
        Abar[i] = {r.uniform(-0.7, 0.7), r.uniform(-0.7, 0.7)};
        Bbar[i] = {r.normal(), r.normal()};
        C[i] = {static_cast<float>(r.normal()), static_cast<float>(r.normal())};
    }
    const s4d::Discrete<float> discrete{view(Abar.data(), {H, N}),
                                        view(Bbar.data(), {H, N}),
                                        view(static_cast<const complex<float>*>(C.data()), {H, N}),
                                        {}};
    std::vector<bf16> u(B * H), y(B * H), y_reference(B * H);
    for (int t = 0; t < 5; ++t) {
        for (auto& v : u) v = bf16(r.normal());
        const s4d::Token<bf16> token{view(static_cast<const bf16*>(u.data()), {B, H})};
        ASSERT_TRUE(step(reference{}, s4d::Options{}, discrete, s4d::State<float>{view(x.data(), {B, H, N})},
                         token, s4d::TokenOut<bf16>{view(y_reference.data(), {B, H})}, Workspace{})
                        .ok());
        const s4d::State<float> strided{view(x_strided.data(), {B, H, N}, {1, B, B * H})};
        ASSERT_TRUE(step(cpu{}, s4d::Options{}, discrete, strided, token,
                         s4d::TokenOut<bf16>{view(y.data(), {B, H})}, Workspace{})
                        .ok());
        for (Index i = 0; i < B * H; ++i)
            EXPECT_NEAR(float(y[i]), float(y_reference[i]), 0.01 * (1.0 + std::abs(float(y_reference[i]))));
    }
}

TEST(S4dCpu, ErrorsComeBeforeAnythingIsWritten) {
    const Index L = 300, H = 2, N = 3;
    std::vector<float> u(L * H, 1.0f), y(L * H, 7.0f), real(H * N, 0.0f);
    std::vector<complex<float>> z(H * N, {1.0f, 0.0f});
    s4d::Inputs<float> in{.u = view(u.data(), {Index{1}, L, H}),
                          .params = {.log_dt = view(real.data(), {H}),
                                     .log_neg_re = view(real.data(), {H, N}),
                                     .im = view(real.data(), {H, N}),
                                     .B = view(z.data(), {H, N}),
                                     .C = view(z.data(), {H, N})}};
    const s4d::Outputs<float> out{.y = view(y.data(), {Index{1}, L, H})};
    std::vector<float> real_y(L * H);
    const cpu exec{.threads = 2};
    const s4d::Options options;
    const auto shape = shape_of(in);
    std::vector<char> memory(workspace_size(exec, options, shape, pass::forward));
    const Workspace ws{memory.data(), memory.size()};
    const auto untouched = [&] {
        for (const float v : y)
            if (v != 7.0f) return false;
        return true;
    };

    const Status small =
        forward(exec, options, in, out, Saved{}, Workspace{memory.data(), memory.size() - 1});
    EXPECT_EQ(small.code(), StatusCode::workspace_too_small);
    EXPECT_NE(std::string(small.message()).find("must have " + std::to_string(memory.size())),
              std::string::npos);
    EXPECT_EQ(forward(exec, options, in, out, Saved{memory.data(), 1}, ws).code(),
              StatusCode::workspace_too_small);

    auto broadcast = out;
    broadcast.y.stride[1] = 0;
    EXPECT_EQ(std::string(forward(exec, options, in, broadcast, Saved{}, ws).message()),
              "y: stride of axis 1 is 0, must not be 0 for a tensor that is written");

    std::int32_t cu[] = {0, 301};
    auto packed = in;
    packed.cu_seqlens = view(static_cast<const std::int32_t*>(cu), {2});
    EXPECT_EQ(forward(exec, options, packed, out, Saved{}, ws).code(), StatusCode::invalid_argument);
    packed.u = view(static_cast<const float*>(u.data()), {Index{2}, L / 2, H});
    EXPECT_EQ(std::string(forward(exec, options, packed, out, Saved{}, ws).message()),
              "u: batch is 2, must be 1 with cu_seqlens");

    const s4d::Upstream<float> upstream{.y = view(static_cast<const float*>(u.data()), {Index{1}, L, H})};
    const Status unsaved = backward(exec, options, in, out, Saved{}, upstream, s4d::Grads<float>{}, ws);
    EXPECT_EQ(unsaved.code(), StatusCode::workspace_too_small);
    EXPECT_EQ(std::string(unsaved.message()).rfind("saved:", 0), 0u);
    EXPECT_EQ(forward(cpu{.threads = -7}, options, in, out, Saved{}, ws).code(),
              StatusCode::invalid_argument);
    auto huge = in;
    huge.u.extent[1] = 0;
    huge.u.extent[2] = Index{1} << 62;
    EXPECT_EQ(forward(exec, options, huge, out, Saved{}, ws).code(), StatusCode::invalid_argument);
    auto null_offsets = in;
    null_offsets.cu_seqlens.extent[0] = 3;  // no data: a dense batch
    EXPECT_TRUE(forward(exec, options, null_offsets,
                        s4d::Outputs<float>{.y = view(real_y.data(), {Index{1}, L, H})}, Saved{}, ws)
                    .ok());
    for (const Isa isa : {Isa::avx2, Isa::avx512})
        if (!simd::machine_has(isa)) {
            EXPECT_EQ(forward(cpu{.isa = isa}, options, in, out, Saved{}, ws).code(),
                      StatusCode::unsupported);
        }
    EXPECT_TRUE(untouched());
    EXPECT_TRUE(forward(exec, options, in, out, Saved{}, ws).ok());
    EXPECT_FALSE(untouched());
}

TEST(S4dCpu, WhichKernelNamesMethodAndInstructionSet) {
    const s4d::Shape shape{.batch = 1, .length = 4096, .channels = 256, .modes = 32};
    for (const Isa isa : isas())
        for (const Method method : methods)
            EXPECT_EQ(std::string(which_kernel(cpu{.isa = isa}, s4d::Options{.method = method}, shape).name),
                      std::string("s4d.cpu.") + to_string(method) + "." + to_string(isa));
    const auto chosen = [](const s4d::Shape& s) {
        return std::string(which_kernel(cpu{}, s4d::Options{}, s).name);
    };
    const std::string best = to_string(isas().back());
    EXPECT_EQ(chosen(shape), "s4d.cpu.chunked." + best);
    EXPECT_EQ(chosen({.batch = 64, .length = 1024, .channels = 64, .modes = 64}), "s4d.cpu.fft." + best);
    EXPECT_EQ(chosen({.batch = 64, .length = 1, .channels = 64, .modes = 64}), "s4d.cpu.scan." + best);
    EXPECT_EQ(chosen({.batch = 1, .length = 1024, .channels = 64, .modes = 64, .sequences = 200}),
              "s4d.cpu.scan." + best);
    EXPECT_EQ(chosen({.batch = 1, .length = 4096, .channels = 64, .modes = 64, .sequences = 9}),
              "s4d.cpu.chunked." + best);
    EXPECT_EQ(chosen({}), "s4d.cpu.scan." + best);
    EXPECT_NE(std::string(which_kernel(cpu{}, s4d::Options{}, shape).reason),
              which_kernel(cpu{}, s4d::Options{.method = Method::chunked}, shape).reason);
    EXPECT_EQ(saved_size(cpu{}, s4d::Options{.method = Method::fft}, shape), 0u);
    s4d::Shape both = shape;
    both.bidirectional = true;
    for (const Method method : {Method::scan, Method::chunked})
        EXPECT_GT(saved_size(cpu{}, {.method = method}, both), saved_size(cpu{}, {.method = method}, shape));
}

/// The crossovers of docs/benchmarks/s4d.md where one method is ahead by more than 10%.
TEST(S4dCpu, AutomaticTakesTheFasterMethodOfTheMeasuredTable) {
    struct Row {
        Index B, L, N;
        bool bidirectional;
        Method method;
    };
    for (const Row& row : {Row{1, 1024, 32, false, Method::chunked},
                           {1, 1024, 64, false, Method::fft},
                           {1, 4096, 4, false, Method::chunked},
                           {1, 4096, 16, false, Method::chunked},
                           {1, 4096, 32, false, Method::chunked},
                           {1, 4096, 128, false, Method::fft},
                           {1, 16384, 32, false, Method::chunked},
                           {1, 65536, 32, false, Method::chunked},
                           {1, 65536, 64, false, Method::chunked},
                           {8, 256, 4, false, Method::chunked},
                           {8, 256, 32, false, Method::fft},
                           {8, 4096, 4, false, Method::chunked},
                           {8, 4096, 16, false, Method::chunked},
                           {8, 4096, 32, false, Method::fft},
                           {8, 16384, 32, false, Method::fft},
                           {1, 4096, 8, true, Method::chunked},
                           {1, 4096, 64, true, Method::fft},
                           {8, 256, 16, true, Method::fft}}) {
        const s4d::Shape shape{.batch = row.B,
                               .length = row.L,
                               .channels = 64,
                               .modes = row.N,
                               .bidirectional = row.bidirectional};
        const cpu exec{.isa = Isa::baseline};
        EXPECT_EQ(std::string(which_kernel(exec, s4d::Options{}, shape).name),
                  std::string("s4d.cpu.") + to_string(row.method) + ".baseline")
            << "B=" << row.B << " L=" << row.L << " N=" << row.N << (row.bidirectional ? " bidirectional" : "");
    }
}

/// Parameters as P, views into vectors.
template <class P>
struct KernelCase {
    Index H, N;
    std::vector<P> log_dt, log_neg_re, im, D;
    std::vector<complex<P>> B, C;

    KernelCase(Index channels, Index modes, std::uint64_t seed, double decay = 0.5) : H(channels), N(modes) {
        const Case c = make({.channels = H, .modes = N, .decay = decay}, seed);
        const auto real = [&](const char* name) {
            const auto& v = c.tensors.at(name).values;
            return std::vector<P>(v.begin(), v.end());
        };
        const auto pairs = [&](const char* name) {
            const auto& v = c.tensors.at(name).values;
            std::vector<complex<P>> z;
            for (std::size_t i = 0; i + 1 < v.size(); i += 2)
                z.push_back({static_cast<P>(v[i]), static_cast<P>(v[i + 1])});
            return z;
        };
        log_dt = real("log_dt"), log_neg_re = real("log_neg_re"), im = real("im"), D = real("D");
        B = pairs("B"), C = pairs("C");
    }
    template <class Q>
    static std::vector<complex<Q>> cast_all(const std::vector<complex<P>>& z) {
        std::vector<complex<Q>> out;
        for (const auto x : z) out.push_back(cast<Q>(x));
        return out;
    }
    KernelCase<double> wide() const {
        KernelCase<double> w(H, N, 0);
        w.log_dt.assign(log_dt.begin(), log_dt.end());
        w.log_neg_re.assign(log_neg_re.begin(), log_neg_re.end());
        w.im.assign(im.begin(), im.end());
        w.B = cast_all<double>(B), w.C = cast_all<double>(C);
        return w;
    }
    s4d::Params<P> params() const {
        return {view(log_dt.data(), {H}), view(log_neg_re.data(), {H, N}), view(im.data(), {H, N}),
                view(B.data(), {H, N}),   view(C.data(), {H, N}),          view(D.data(), {H})};
    }
};

/// Gradients of a KernelCase, NaN until written.
template <class P>
struct KernelGrads {
    KernelCase<P> g;
    explicit KernelGrads(Index H, Index N) : g(H, N, 0) {
        for (auto* v : {&g.log_dt, &g.log_neg_re, &g.im, &g.D})
            for (P& x : *v) x = static_cast<P>(std::nan(""));
        for (auto* v : {&g.B, &g.C})
            for (auto& z : *v) z = {static_cast<P>(std::nan("")), static_cast<P>(std::nan(""))};
    }
    s4d::BasicParams<P, complex<P>> views() {
        return {view(g.log_dt.data(), {g.H}),  view(g.log_neg_re.data(), {g.H, g.N}),
                view(g.im.data(), {g.H, g.N}), view(g.B.data(), {g.H, g.N}),
                view(g.C.data(), {g.H, g.N}),  view(g.D.data(), {g.H})};
    }
    std::vector<std::pair<std::string, HostTensor>> tensors() const {
        std::vector<std::pair<std::string, HostTensor>> all;
        for (const auto& [name, v] :
             {std::pair{"log_dt", &g.log_dt}, {"log_neg_re", &g.log_neg_re}, {"im", &g.im}, {"D", &g.D}})
            all.push_back({name, {{static_cast<Index>(v->size())}, {v->begin(), v->end()}}});
        for (const auto& [name, v] : {std::pair{"B", &g.B}, {"C", &g.C}}) {
            HostTensor t{{2 * static_cast<Index>(v->size())}, {}};
            for (const auto z : *v)
                t.values.insert(t.values.end(), {static_cast<double>(z.re), static_cast<double>(z.im)});
            all.push_back({name, t});
        }
        return all;
    }
};

template <class A, class P>
void expect_kernel_close(Index H, Index N, Index L, cpu exec, s4d::Options options = {}, double decay = 0.5) {
    const KernelCase<P> c(H, N, 7 * H + N, decay);
    const KernelCase<double> wide = c.wide();
    const double bound = std::is_same_v<A, double> ? 1e-12 : 1e-5;
    std::vector<A> K(H * L);
    std::vector<double> want(H * L);
    // (L, H) in memory: any strides.
    const View<A, 2> K_view = view(K.data(), {H, L}, {1, H});
    std::vector<char> memory(
        generate_kernel_workspace_size(exec, options, shape_of(c.params(), K_view), pass::forward));
    const Status status =
        generate_kernel(exec, options, c.params(), K_view, Workspace{memory.data(), memory.size()});
    ASSERT_TRUE(status.ok()) << status.message();
    const View<double, 2> want_view = view(want.data(), {H, L}, {1, H});
    memory.resize(generate_kernel_workspace_size(reference{}, options, shape_of(wide.params(), want_view),
                                                 pass::forward));
    ASSERT_TRUE(generate_kernel(reference{}, options, wide.params(), want_view,
                                Workspace{memory.data(), memory.size()})
                    .ok());
    const HostTensor truth{{H * L}, want};
    const TensorError e = compare("K", {{H * L}, {K.begin(), K.end()}}, truth);
    EXPECT_TRUE(e.finite);
    EXPECT_LE(e.relative, bound) << "L=" << L << " N=" << N << " " << to_string(exec.isa);

    Random r(11);
    std::vector<A> dK(H * L);
    std::vector<double> dK_wide(H * L);
    for (std::size_t i = 0; i < dK.size(); ++i) dK_wide[i] = dK[i] = static_cast<A>(r.normal());
    const View<const A, 2> dK_view = view(static_cast<const A*>(dK.data()), {H, L});
    memory.resize(
        generate_kernel_workspace_size(exec, options, shape_of(c.params(), dK_view), pass::backward));
    KernelGrads<P> got(H, N);
    KernelGrads<double> truth_grads(H, N);
    ASSERT_TRUE(generate_kernel_backward(exec, options, c.params(), dK_view, got.views(),
                                         Workspace{memory.data(), memory.size()})
                    .ok());
    ASSERT_TRUE(generate_kernel_backward(reference{}, options, wide.params(),
                                         view(static_cast<const double*>(dK_wide.data()), {H, L}),
                                         truth_grads.views(), Workspace{})
                    .ok());
    const auto all = got.tensors(), wanted = truth_grads.tensors();
    for (std::size_t i = 0; i < all.size(); ++i) {
        const TensorError error = compare(all[i].first, all[i].second, wanted[i].second);
        EXPECT_TRUE(error.finite) << error.name;
        EXPECT_LE(error.relative, bound) << error.name << " L=" << L << " N=" << N;
    }
}

TEST(S4dCpu, KernelGenerationAndItsBackward) {
    for (const Isa isa : isas())
        for (const auto disc : {Discretization::zoh, Discretization::bilinear})
            for (const Index L : {0, 1, 15, 16, 17, 255, 256, 257, 1021}) {
                expect_kernel_close<float, float>(5, 3, L, {.threads = 2, .isa = isa}, {.disc = disc});
                expect_kernel_close<double, double>(17, 9, L, {.threads = 2, .isa = isa}, {.disc = disc});
                expect_kernel_close<float, double>(3, 33, L, {.threads = 2, .isa = isa}, {.disc = disc});
            }
    for (const double decay : {1e-4, 1e8})
        expect_kernel_close<float, float>(3, 4, 65536, {.threads = 2}, {}, decay);
    expect_kernel_close<float, float>(0, 4, 16, {});
    expect_kernel_close<float, float>(4, 0, 16, {});

    const KernelCase<float> c(3, 2, 1);
    std::vector<float> K(3 * 10);
    EXPECT_EQ(generate_kernel(cpu{}, s4d::Options{}, c.params(), view(K.data(), {3, 10}), Workspace{}).code(),
              StatusCode::workspace_too_small);
    EXPECT_EQ(
        std::string(generate_kernel(cpu{}, s4d::Options{}, c.params(), view(K.data(), {2, 10}), Workspace{})
                        .message())
            .rfind("log_dt", 0),
        0u);
    EXPECT_EQ(
        generate_kernel(cpu{.threads = -1}, s4d::Options{}, c.params(), view(K.data(), {3, 10}), Workspace{})
            .code(),
        StatusCode::invalid_argument);
}

/// The page, "K alone": bytes a mode, a channel and a thread.
TEST(S4dCpu, KernelGenerationTakesTheMemoryThatThePageSays) {
    for (const Isa isa : isas())
        for (const DType dtype : {DType::f32, DType::f64})
            for (const pass p : {pass::forward, pass::backward}) {
                const bool wide = dtype == DType::f64, back = p == pass::backward;
                const auto size = [&](Index H, Index N, int threads) {
                    const s4d::Shape shape{.dtype = dtype, .length = 1000, .channels = H, .modes = N};
                    return static_cast<Index>(generate_kernel_workspace_size(
                        cpu{.threads = threads, .isa = isa}, s4d::Options{}, shape, p));
                };
                const Index mode = wide ? (back ? 736 : 464) : back ? 440 : 296, channel = wide ? 256 : 128;
                const Index vector = wide ? simd::lanes<double>(isa) * 8 : simd::lanes<float>(isa) * 4;
                EXPECT_EQ(size(64, 96, 1) - size(64, 32, 1), 64 * 64 * mode) << to_string(isa);
                EXPECT_EQ(size(128, 32, 1) - size(64, 32, 1), 64 * (32 * mode + channel)) << to_string(isa);
                EXPECT_EQ(size(64, 32, 3) - size(64, 32, 1), 2 * 544 * vector) << to_string(isa);
            }
}

}  // namespace
}  // namespace interstate::test
