// The CPU executor against the float64 reference: every dtype, instruction set and stage, sizes around stretches,
// vectors and taps, states, packing, strides, threads, steps.
#include <array>

#include <gtest/gtest.h>

#include <feature_map/feature_map.hpp>

#include "../support/isas.hpp"
#include "../support/sanitized.hpp"
#include "feature_map_cases.hpp"

namespace interstate::test {
namespace {

using feature_map::Activation;
using feature_map::Operator;
using feature_map::Options;
using feature_map::Rope;

template <class T, class P>
void expect_close(const Case& c, cpu exec, const Options& options, RunOptions run = {}) {
    const Case in = rounded<Operator, T, P>(c);
    Case got, want;
    const Status status = run_case<Operator, T, P>(exec, options, in, got, run);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, in, want).ok()));
    const auto& x = in.tensors.at("x").extent;
    EXPECT_EQ((beyond_tolerance<T, P>(got, want)), "")
        << to_string(dtype_of<T>) << " " << to_string(exec.isa) << " " << describe(options) << " B=" << x[0]
        << " L=" << x[1] << " H=" << x[2] << " R=" << x[3];
}

void expect_close_in_every_dtype(const Case& c, cpu exec, const Options& options, RunOptions run = {}) {
    expect_close<f64, double>(c, exec, options, run);
    expect_close<f32, float>(c, exec, options, run);
    if constexpr (!sanitized) expect_close<f16, float>(c, exec, options, run);
    expect_close<bf16, float>(c, exec, options, run);
}

TEST(FeatureMapCpu, EveryLengthAroundStretchesAndTaps) {
    for (const Isa isa : isas())
        for (const Index L : {0, 1, 2, 3, 4, 5, 7, 28, 29, 31, 32, 33, 35, 61, 64, 67, 97, 257})
            for (const Index taps : {1, 4, 8})
                expect_close<f32, float>(make({.batch = 2, .length = L, .heads = 2, .features = 6, .taps = taps}, Options::key(), 100 + L),
                                         {.threads = 2, .isa = isa}, Options::key());
}

TEST(FeatureMapCpu, EveryStageAndTapCount) {
    for (const Isa isa : isas())
        for (const Options& options : all_options())
            for (const Index taps : {0, 1, 2, 4, 5})
                expect_close_in_every_dtype(make({.batch = 2, .length = 37, .heads = 2, .features = 34, .taps = taps}, options, 3),
                                            {.threads = 2, .isa = isa}, options);
}

TEST(FeatureMapCpu, AnyFeatureCount) {
    for (const Isa isa : isas())
        for (const Index R : {1, 2, 7, 8, 15, 16, 17, 30, 31, 32, 33, 64, 66, 96, 128, 256, 258, 521})
            for (const Rope rope : {Rope::none, Rope::interleaved, Rope::half_split}) {
                Options options = Options::key();
                options.rope = rope;
                if (rope != Rope::none && R % 2 != 0) continue;
                if (R == 1) options.l2 = options.rms = false;  // the norm of one number is its sign, whose slope is lost in float
                const Case c = make({.length = 6, .heads = 3, .features = R}, options, 5 + R);
                expect_close<f32, float>(c, {.isa = isa}, options);
                expect_close<bf16, float>(c, {.isa = isa}, options);
            }
}

TEST(FeatureMapCpu, ParameterDtypesAndOptionalTensors) {
    for (const bool optional : {false, true}) {
        Case c = make({.batch = 3, .length = 40, .heads = 2, .features = 16, .state = optional, .offset = optional,
                       .conv_bias = optional}, Options::key(), 8);
        if (!optional)
            for (const char* name : {"scale", "bias", "dout.convT"}) c.tensors.erase(name);
        expect_close_in_every_dtype(c, {}, Options::key());
        expect_close<f32, double>(c, {}, Options::key());
        expect_close<bf16, double>(c, {}, Options::key());
        expect_close<f64, float>(c, {}, Options::key());
    }
}

TEST(FeatureMapCpu, EmptySizesAreLegal) {
    for (const Options& options : {Options::query(), Options::key(), Options::value()})
        for (const auto& [B, L, H, R] :
             std::vector<std::array<Index, 4>>{{0, 5, 3, 2}, {2, 0, 3, 2}, {2, 5, 0, 2}, {2, 5, 3, 0}})
            expect_close<f32, float>(make({.batch = B, .length = L, .heads = H, .features = R}, options, 3), {}, options);
}

TEST(FeatureMapCpu, AnyStrides) {
    for (const Options& options : all_options()) {
        const Case c = make({.batch = 2, .length = 35, .heads = 3, .features = 20}, options, 12);
        for (const Layout layout : {Layout::reversed, Layout::padded})
            expect_close_in_every_dtype(c, {.threads = 2}, options, {.layout = layout});
    }
}

/// Values far from one, and zeros: the norm's derivative is steep there.
TEST(FeatureMapCpu, ZerosAndExtremes) {
    for (const Options& options : all_options())
        for (const double scale : {0.0, 1e-5, 1e-3, 1e3}) {
            Case c = make({.length = 20, .features = 32, .taps = 4, .conv_bias = false, .scale = scale}, options, 6);
            expect_close<f64, double>(c, {}, options);
            expect_close<f32, float>(c, {}, options);
            c = make({.length = 20, .features = 32, .taps = 0, .scale = scale}, options, 6);
            expect_close<f32, float>(c, {}, options);
        }
}

TEST(FeatureMapCpu, AnglesHoldAtLargePositions) {
    for (const Rope rope : {Rope::interleaved, Rope::half_split})
        for (const double offset : {65536.0 - 7, 1e6 - 3, 2147483000.0}) {
            Options options = Options::key();
            options.rope = rope;
            Case c = make({.length = 40, .features = 64}, options, 4);
            c.tensors["offset"].values[0] = offset;
            // Angles of 2e9 radians hold 1e-7 of a float64's 2e-16; 1e6 of them 2e-10.
            if (offset <= 1e6) {
                expect_close<f32, float>(c, {}, options);
                expect_close<bf16, float>(c, {}, options);
            }
            Case got, want;
            ASSERT_TRUE((run_case<Operator, double, double>(cpu{}, options, c, got).ok()));
            ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, c, want).ok()));
            for (const TensorError& e : compare(got, want)) EXPECT_LE(e.relative, 1e-15 * offset) << e.name << offset;
        }
}

TEST(FeatureMapCpu, PackedSequencesWithNaNNeighboursAndMargins) {
    const std::vector<double> cu{3, 3, 5, 6, 40, 40, 130};
    for (const Index taps : {0, 1, 4, 8})
        for (const Options& options : {Options::query(), Options::key(), Options::value()}) {
            const Case c = make({.length = 140, .heads = 2, .features = 6, .taps = taps, .cu_seqlens = cu}, options, 4);
            expect_close_in_every_dtype(c, {.threads = 2}, options);
            Case clean, dirty_case = c, dirty;
            // Margins, and the sequence of rows 6 to 39.
            for (const char* name : {"x", "dout.y"})
                for (Index t = 0; t < 140; ++t)
                    if (t < 3 || (t >= 6 && t < 40) || t >= 130)
                        for (Index i = 0; i < 12; ++i) dirty_case.tensors[name].values[t * 12 + i] = std::nan("");
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 2}, options, c, clean).ok()));
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 2}, options, dirty_case, dirty).ok()));
            for (const char* name : {"out.y", "grad.x"})
                for (Index i = 0; i < 140 * 12; ++i) {
                    const Index t = i / 12;
                    const double got = dirty.tensors[name].values[i];
                    if (t >= 6 && t < 40)
                        ASSERT_TRUE(std::isnan(got)) << name << t;
                    else
                        ASSERT_EQ(got, t >= 3 && t < 130 ? clean.tensors[name].values[i] : 0.0) << name << t;
                }
            if (taps < 2) continue;
            const Index state = (taps - 1) * 12;
            for (const char* name : {"out.convT", "grad.conv0"})
                for (Index i = 0; i < 6 * state; ++i)
                    ASSERT_TRUE(i / state == 3 || dirty.tensors[name].values[i] == clean.tensors[name].values[i]) << name;
        }
}

TEST(FeatureMapCpu, SameBitsForAnyNumberOfThreads) {
    for (const auto& cu : {std::vector<double>{}, std::vector<double>{5, 500, 501, 2990}})
        for (const Options& options : {Options::key(), Options::value()}) {
            const Case c = make({.length = 3000, .heads = 3, .features = 10, .cu_seqlens = cu}, options, 2);
            Case one;
            ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = 1}, options, c, one).ok()));
            for (const int threads : {2, 3, 7}) {
                Case many;
                ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = threads}, options, c, many).ok()));
                ASSERT_EQ(one.tensors.size(), many.tensors.size());
                for (const auto& [name, tensor] : one.tensors) EXPECT_EQ(tensor.values, many.tensors[name].values) << name;
            }
        }
}

/// Pieces that carry the state, and steps, give the bits of one call.
template <class T>
void pieces_and_steps(const Options& options, Index taps) {
    const Index B = 2, L = 75, H = 2, R = 22, past = taps - 1;
    const Case c = rounded<Operator, T, float>(make({.batch = B, .length = L, .heads = H, .features = R, .taps = taps, .upstream = false}, options, 5));
    const auto fill = [&]<class E>(E, const char* name) {
        std::vector<E> v;
        if (c.tensors.contains(name))
            for (const double x : c.tensors.at(name).values) v.push_back(E(x));
        v.resize(v.size() + 1);
        return v;
    };
    const std::vector<T> x = fill(T(0.0f), "x");
    const auto weight = fill(0.0f, "conv_weight"), conv_bias = fill(0.0f, "conv_bias"), scale = fill(0.0f, "scale"), bias = fill(0.0f, "bias");
    const auto offset = fill(std::int32_t{}, "offset");
    feature_map::Params<float> params{.conv_weight = view(weight.data(), {H, R, taps}), .conv_bias = view(conv_bias.data(), {H, R})};
    if (options.rms) params.scale = view(scale.data(), {R}), params.bias = view(bias.data(), {H, R});
    std::vector<T> y[3], state[3];
    for (int way = 0; way < 3; ++way) {  // at once, in pieces, in steps
        y[way].resize(B * L * H * R);
        state[way] = fill(T(0.0f), "conv0");
        const auto conv = view(state[way].data(), {B, past, H, R});
        std::vector<std::int32_t> at = offset;
        at.resize(B);
        const std::vector<Index> lengths = way == 0 ? std::vector<Index>{L} : std::vector<Index>{1, 30, 2, 42};
        for (Index t = 0, i = 0; t < L; ++i) {
            const Index n = way == 2 ? 1 : lengths[i];
            Status s;
            if (way == 2) {
                const feature_map::Token<T> token{.x = {x.data() + t * H * R, {B, H, R}, {L * H * R, R, 1}},
                                                  .position = view(static_cast<const std::int32_t*>(at.data()), {B})};
                std::vector<char> memory(workspace_size(cpu{}, options, shape_of(params, token), pass::step));
                s = step(cpu{}, options, params, feature_map::State<T>{conv}, token,
                         feature_map::TokenOut<T>{{y[way].data() + t * H * R, {B, H, R}, {L * H * R, R, 1}}},
                         Workspace{memory.data(), memory.size()});
            } else {
                feature_map::Inputs<T, float> in{.x = {x.data() + t * H * R, {B, n, H, R}, {L * H * R, H * R, R, 1}},
                                                 .params = params, .conv0 = conv};
                if (options.rope != Rope::none) in.offset = view(static_cast<const std::int32_t*>(at.data()), {B});
                std::vector<char> memory(workspace_size(cpu{}, options, shape_of(in), pass::forward));
                s = forward(cpu{}, options, in, {.y = {y[way].data() + t * H * R, {B, n, H, R}, {L * H * R, H * R, R, 1}}, .convT = conv},
                            Saved{}, Workspace{memory.data(), memory.size()});
            }
            ASSERT_TRUE(s.ok()) << s.message();
            for (std::int32_t& p : at) p += static_cast<std::int32_t>(n);
            t += n;
        }
        const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
            return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
        };
        EXPECT_TRUE(same(y[way], y[0])) << way << describe(options) << taps;
        EXPECT_TRUE(same(state[way], state[0])) << way << describe(options) << taps;
    }
    Case truth;
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, c, truth).ok()));
    double error = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < y[0].size(); ++i) {
        const double want = truth.tensors["out.y"].values[i];
        error += std::pow(static_cast<double>(y[2][i]) - want, 2), norm += want * want;
    }
    EXPECT_LT(std::sqrt(error / norm), sizeof(T) == 2 ? 4e-3 : 1e-6);
}
TEST(FeatureMapCpu, PiecesAndStepsAreOneCallBitForBit) {
    for (const Options& options : {Options::query(), Options::key(), Options::value()})
        for (const Index taps : {1, 2, 4, 8}) {
            pieces_and_steps<f64>(options, taps);
            pieces_and_steps<f32>(options, taps);
            pieces_and_steps<bf16>(options, taps);
            if constexpr (!sanitized) pieces_and_steps<f16>(options, taps);
        }
}

TEST(FeatureMapCpu, GradientsOneByOneAreThoseOfAll) {
    const Options options = Options::key();
    const Index L = 70, H = 2, R = 8;
    Case c = make({.length = L, .heads = H, .features = R}, options, 5), all;
    ASSERT_TRUE((run_case<Operator, double, double>(cpu{}, options, c, all).ok()));
    const auto data = [&](const char* name) -> const double* { return c.tensors.at(name).values.data(); };
    const std::vector<std::int32_t> offset{static_cast<std::int32_t>(data("offset")[0])};
    const feature_map::Inputs<double> in{
        .x = view(data("x"), {1, L, H, R}),
        .params = {view(data("conv_weight"), {H, R, 4}), view(data("conv_bias"), {H, R}), view(data("scale"), {R}), view(data("bias"), {H, R})},
        .conv0 = view(data("conv0"), {1, 3, H, R}),
        .offset = view(offset.data(), {1})};
    const feature_map::Upstream<double> up{.y = view(data("dout.y"), {1, L, H, R}), .convT = view(data("dout.convT"), {1, 3, H, R})};
    std::vector<char> memory(workspace_size(cpu{}, options, shape_of(in), pass::backward));
    for (const char* name : {"x", "conv_weight", "conv_bias", "scale", "bias", "conv0"}) {
        std::vector<double> g(all.tensors.at(std::string("grad.") + name).values.size());
        feature_map::Grads<double> grads;
        const std::string_view which = name;
        if (which == "x") grads.x = view(g.data(), {1, L, H, R});
        if (which == "conv_weight") grads.params.conv_weight = view(g.data(), {H, R, 4});
        if (which == "conv_bias") grads.params.conv_bias = view(g.data(), {H, R});
        if (which == "scale") grads.params.scale = view(g.data(), {R});
        if (which == "bias") grads.params.bias = view(g.data(), {H, R});
        if (which == "conv0") grads.conv0 = view(g.data(), {1, 3, H, R});
        ASSERT_TRUE(backward(cpu{}, options, in, {}, Saved{}, up, grads, Workspace{memory.data(), memory.size()}).ok());
        EXPECT_EQ(g, all.tensors.at(std::string("grad.") + name).values) << name;
    }
}

TEST(FeatureMapCpu, ErrorsComeBeforeAnythingIsWritten) {
    const Options options = Options::query();
    Case c = make({.length = 3, .heads = 2}, options, 1), results;
    EXPECT_EQ((run_case<Operator, float, float>(cpu{.threads = -1}, options, c, results).code()), StatusCode::invalid_argument);
    c.tensors["cu_seqlens"] = {{2}, {2, 1}};
    EXPECT_EQ((run_case<Operator, float, float>(cpu{}, options, c, results).code()), StatusCode::invalid_argument);
    float x[8] = {}, y[8] = {7.0f};
    const feature_map::Inputs<float> in{.x = view(static_cast<const float*>(x), {1, 1, 2, 4})};
    const Status s = forward(cpu{}, options, in, {.y = view(y, {1, 1, 2, 4})}, Saved{}, Workspace{});
    EXPECT_EQ(s.code(), StatusCode::workspace_too_small);
    EXPECT_EQ(y[0], 7.0f);
    EXPECT_FALSE(forward(cpu{}, options, in, feature_map::Outputs<float>{}, Saved{}, Workspace{}).ok());
    // A convolution needs its state to step.
    const std::vector<float> weight(2 * 4 * 4);
    const feature_map::Params<float> params{.conv_weight = view(weight.data(), {2, 4, 4})};
    const Status stepped = step(cpu{}, options, params, feature_map::State<float>{}, {.x = view(static_cast<const float*>(x), {1, 2, 4})},
                                {view(y, {1, 2, 4})}, Workspace{});
    EXPECT_NE(std::string(stepped.message()).find("state.conv"), std::string::npos) << stepped.message();
}

}  // namespace
}  // namespace interstate::test
