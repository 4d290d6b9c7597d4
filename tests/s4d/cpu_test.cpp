// The CPU executor against the float64 reference: every dtype and instruction set, sizes around every
// tile, states, packing, strides, threads, and the numerics the page promises.
#include <array>

#include <gtest/gtest.h>

#include <s4d/s4d.hpp>

#include "s4d_cases.hpp"

namespace interstate::test {
namespace {

using s4d::Discretization;
using s4d::Operator;

std::vector<Isa> isas() {
    std::vector<Isa> all;
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
        if (simd::machine_has(isa)) all.push_back(isa);
    return all;
}

template <class T, class P>
void expect_close(const Case& c, cpu exec, s4d::Options options = {}, RunOptions run = {}) {
    const Case in = rounded<Operator, T, P>(c);
    Case got, want;
    const Status status = run_case<Operator, T, P>(exec, options, in, got, run);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, in, want).ok()));
    EXPECT_EQ(beyond_tolerance<T>(in, got, want), "")
        << to_string(dtype_of<T>) << " " << to_string(exec.isa) << " L=" << in.tensors.at("u").extent[1]
        << " H=" << in.tensors.at("u").extent[2] << " N=" << in.tensors.at("im").extent[1];
}


void expect_close_in_every_dtype(const Case& c, cpu exec, s4d::Options options = {}, RunOptions run = {}) {
    expect_close<f64, double>(c, exec, options, run);
    expect_close<f32, float>(c, exec, options, run);
    expect_close<f16, float>(c, exec, options, run);
    expect_close<bf16, float>(c, exec, options, run);
}

TEST(S4dCpu, EveryLengthAroundTheTiles) {
    for (const Isa isa : isas())
        for (const Index L : {0, 1, 2, 15, 16, 17, 31, 255, 256, 257, 509, 512, 513, 1021})
            expect_close<f32, float>(make({.length = L, .channels = 5, .modes = 3}, 100 + L), {.threads = 2, .isa = isa});
}

TEST(S4dCpu, EveryDtypeChannelAndModeCount) {
    for (const Isa isa : isas())
        for (const Index H : {1, 3, 7, 8, 9, 16, 17, 33})
            for (const Index N : {1, 2, 5})
                expect_close_in_every_dtype(make({.batch = 2, .length = 61, .channels = H, .modes = N}, 10 * H + N),
                                            {.threads = 2, .isa = isa});
    expect_close_in_every_dtype(make({.length = 300, .channels = 3, .modes = 64}, 5), {});
    expect_close_in_every_dtype(make({.length = 40, .channels = 2, .modes = 131}, 6), {});
}

TEST(S4dCpu, EmptySizesAreLegal) {
    for (const auto& [B, L, H, N] : std::vector<std::array<Index, 4>>{{0, 5, 3, 2}, {2, 0, 3, 2}, {2, 5, 0, 2}, {2, 5, 3, 0}})
        expect_close<f32, float>(make({.batch = B, .length = L, .channels = H, .modes = N}, 3), {});
}

TEST(S4dCpu, BothDiscretizationsOptionalInputsAndParameterDtypes) {
    for (const auto disc : {Discretization::zoh, Discretization::bilinear})
        for (const bool optional : {false, true}) {
            const Case c = make({.batch = 3, .length = 270, .channels = 18, .modes = 4, .initial_state = optional,
                                 .feedthrough = optional},
                                8);
            expect_close_in_every_dtype(c, {}, {.disc = disc});
            expect_close<f32, double>(c, {}, {.disc = disc});
            expect_close<bf16, double>(c, {}, {.disc = disc});
        }
}

TEST(S4dCpu, AnyStrides) {
    const Case c = make({.batch = 2, .length = 265, .channels = 19, .modes = 3}, 12);
    for (const Layout layout : {Layout::reversed, Layout::padded})
        expect_close_in_every_dtype(c, {.threads = 2}, {}, {.layout = layout});
}

TEST(S4dCpu, PackedSequencesWithNaNNeighboursAndMargins) {
    const std::vector<double> cu{3, 3, 40, 41, 300, 300, 700};
    for (const double poison : {0.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
        Case c = make({.length = 710, .channels = 9, .modes = 4, .cu_seqlens = cu}, 4);
        if (poison != 0.0)  // margins belong to no sequence
            for (const char* name : {"u", "dout.y"})
                for (Index t = 0; t < 710; ++t)
                    if (t < 3 || t >= 700)
                        for (Index h = 0; h < 9; ++h) c.tensors[name].values[t * 9 + h] = poison;
        expect_close_in_every_dtype(c, {.threads = 2});
    }
    // A sequence full of NaN changes nothing in the others.
    Case c = make({.length = 700, .channels = 9, .modes = 4, .cu_seqlens = cu}, 4);
    Case clean, dirty;
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, clean).ok()));
    for (Index i = 41 * 9; i < 300 * 9; ++i)
        c.tensors["u"].values[i] = c.tensors["dout.y"].values[i] = std::nan("");
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, dirty).ok()));
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
                    ASSERT_EQ(dirty.tensors[name].values[at], clean.tensors[name].values[at]) << name << t;
        }
}

TEST(S4dCpu, SameBitsForAnyThreadCountAndRun) {
    for (const bool packed : {false, true}) {
        S4dCase o{.batch = packed ? 1 : 19, .length = 130, .channels = 37, .modes = 3};
        if (packed) o.cu_seqlens = {0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 96, 97, 98, 99, 100, 101, 105, 130};
        const Case c = make(o, 21);
        Case first;
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 1}, {}, c, first).ok()));
        for (const int threads : {1, 2, 3, 5}) {
            Case again;
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = threads}, {}, c, again).ok()));
            for (const auto& [name, tensor] : first.tensors)
                EXPECT_EQ(tensor.values, again.tensors.at(name).values) << name << " with " << threads << " threads";
        }
    }
}

/// docs/ops/s4d.md, "Phase": slowly decaying modes at 65,536 tokens. A plain float recurrence is off by
/// 1e-3 here.
TEST(S4dCpu, PhaseHoldsOverSixtyFiveThousandTokens) {
    Case c = make({.length = 65536, .channels = 3, .modes = 4, .decay = 1e-4}, 31);
    for (double& x : c.tensors["log_dt"].values) x = -4.6;
    for (const Isa isa : isas()) expect_close<f32, float>(c, {.threads = 2, .isa = isa});
}

TEST(S4dCpu, StrongDecayAndHugeInputs) {
    for (const auto disc : {Discretization::zoh, Discretization::bilinear})
        for (const double decay : {1e3, 1e8, 1e30})
            expect_close<f32, float>(make({.length = 300, .channels = 17, .modes = 3, .decay = decay}, 2), {},
                                     {.disc = disc});
    Case c = make({.length = 300, .channels = 17, .modes = 3}, 2);
    for (double& x : c.tensors["u"].values) x *= 1e15;
    expect_close<f32, float>(c, {});
    for (double& x : c.tensors["u"].values) x = 0.0;
    expect_close<f32, float>(c, {});
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

    for (const Index chunk : {Index{1}, Index{7}, Index{100}}) {
        HostTensor y{{1, L, H}, {}};
        Case piece = c;
        for (Index t = 0; t < L; t += chunk) {
            const Index count = std::min(chunk, L - t);
            piece.tensors["u"] = {{1, count, H}, {u.values.begin() + t * H, u.values.begin() + (t + count) * H}};
            Case got;
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 1}, {}, piece, got).ok()));
            y.values.insert(y.values.end(), got.tensors["out.y"].values.begin(), got.tensors["out.y"].values.end());
            piece.tensors["x0"] = got.tensors["out.xT"];
        }
        const TensorError e = compare("y", y, whole.tensors["out.y"]);
        EXPECT_TRUE(e.finite);
        EXPECT_LT(e.relative, 1e-5) << "chunks of " << chunk;
    }

    for (const Isa isa : isas()) {
        const auto floats = [](const HostTensor& t) { return std::vector<float>(t.values.begin(), t.values.end()); };
        auto log_dt = floats(c.tensors["log_dt"]), log_neg_re = floats(c.tensors["log_neg_re"]);
        auto im = floats(c.tensors["im"]), B = floats(c.tensors["B"]), C = floats(c.tensors["C"]);
        auto D = floats(c.tensors["D"]), state = floats(x0), input = floats(u);
        const auto as_complex = [](std::vector<float>& v) { return reinterpret_cast<complex<float>*>(v.data()); };
        const s4d::Params<float> params{view(log_dt.data(), {H}),       view(log_neg_re.data(), {H, N}),
                                        view(im.data(), {H, N}),        view(as_complex(B), {H, N}),
                                        view(as_complex(C), {H, N}),    view(D.data(), {H})};
        std::vector<complex<double>> Abar(H * N), Bbar(H * N);
        const s4d::Discrete<float> discrete{view(Abar.data(), {H, N}), view(Bbar.data(), {H, N}), params.C, params.D};
        const cpu exec{.isa = isa};
        ASSERT_TRUE(discretize(exec, s4d::Options{}, params, discrete).ok());
        std::vector<float> out(H);
        HostTensor y{{1, L, H}, {}};
        for (Index t = 0; t < L; ++t) {
            ASSERT_TRUE(step(exec, s4d::Options{}, discrete,
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
    const s4d::Discrete<float> discrete{view(Abar.data(), {H, N}), view(Bbar.data(), {H, N}),
                                        view(static_cast<const complex<float>*>(C.data()), {H, N}), {}};
    std::vector<bf16> u(B * H), y(B * H), y_reference(B * H);
    for (int t = 0; t < 5; ++t) {
        for (auto& v : u) v = bf16(r.normal());
        const s4d::Token<bf16> token{view(static_cast<const bf16*>(u.data()), {B, H})};
        ASSERT_TRUE(step(reference{}, s4d::Options{}, discrete, s4d::State<float>{view(x.data(), {B, H, N})}, token,
                         s4d::TokenOut<bf16>{view(y_reference.data(), {B, H})}, Workspace{})
                        .ok());
        const s4d::State<float> strided{view(x_strided.data(), {B, H, N}, {1, B, B * H})};
        ASSERT_TRUE(step(cpu{}, s4d::Options{}, discrete, strided, token, s4d::TokenOut<bf16>{view(y.data(), {B, H})},
                         Workspace{})
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

    const Status small = forward(exec, options, in, out, Saved{}, Workspace{memory.data(), memory.size() - 1});
    EXPECT_EQ(small.code(), StatusCode::workspace_too_small);
    EXPECT_NE(std::string(small.message()).find("must have " + std::to_string(memory.size())), std::string::npos);
    EXPECT_EQ(forward(exec, options, in, out, Saved{memory.data(), 1}, ws).code(), StatusCode::workspace_too_small);

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
    EXPECT_EQ(forward(cpu{.threads = -7}, options, in, out, Saved{}, ws).code(), StatusCode::invalid_argument);
    auto huge = in;
    huge.u.extent[1] = 0;
    huge.u.extent[2] = Index{1} << 62;
    EXPECT_EQ(forward(exec, options, huge, out, Saved{}, ws).code(), StatusCode::invalid_argument);
    auto null_offsets = in;
    null_offsets.cu_seqlens.extent[0] = 3;  // no data: a dense batch
    EXPECT_TRUE(forward(exec, options, null_offsets, s4d::Outputs<float>{.y = view(real_y.data(), {Index{1}, L, H})},
                        Saved{}, ws)
                    .ok());
    for (const Isa isa : {Isa::avx2, Isa::avx512})
        if (!simd::machine_has(isa)) {
            EXPECT_EQ(forward(cpu{.isa = isa}, options, in, out, Saved{}, ws).code(), StatusCode::unsupported);
        }
    EXPECT_TRUE(untouched());
    EXPECT_TRUE(forward(exec, options, in, out, Saved{}, ws).ok());
    EXPECT_FALSE(untouched());
}

TEST(S4dCpu, WhichKernelNamesTheInstructionSet) {
    for (const Isa isa : isas())
        EXPECT_EQ(std::string(which_kernel(cpu{.isa = isa}, s4d::Options{}, s4d::Shape{}).name),
                  std::string("s4d.cpu.scan.") + to_string(isa));
    const auto best = which_kernel(cpu{}, s4d::Options{}, s4d::Shape{});
    EXPECT_EQ(std::string(best.name), std::string("s4d.cpu.scan.") + to_string(isas().back()));
}

}  // namespace
}  // namespace interstate::test
