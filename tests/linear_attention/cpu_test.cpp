// Linear attention on the CPU against the float64 reference: every form, dtype and instruction set, lengths around chunks and segments,
// strides, packing, threads, steps.
#include <array>

#include <gtest/gtest.h>

#include <linear_attention/linear_attention.hpp>

#include "../support/isas.hpp"
#include "../support/sanitized.hpp"
#include "linear_attention_cases.hpp"

namespace interstate::test {
namespace {

using linear_attention::FeatureMap;
using linear_attention::Normalized;
using linear_attention::Operator;
using linear_attention::Options;

template <class T>
void expect_close(const Options& options, const Case& c, cpu exec, RunOptions run = {}) {
    const Case in = rounded<Operator, T, float>(c);
    Case got, want;
    const Status status = run_case<Operator, T, float>(exec, options, in, got, run);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, in, want).ok()));
    EXPECT_EQ(beyond_tolerance<T>(got, want), "") << describe(options) << " " << to_string(dtype_of<T>) << " " << to_string(exec.isa);
}
void expect_close_in_every_dtype(const Options& options, const Case& c, cpu exec, RunOptions run = {}) {
    expect_close<f64>(options, c, exec, run);
    expect_close<f32>(options, c, exec, run);
    if constexpr (!sanitized) expect_close<f16>(options, c, exec, run);
    expect_close<bf16>(options, c, exec, run);
}
TEST(LinearAttentionCpu, EveryFormLengthAndInstructionSet) {
    for (const Isa isa : isas())
        for (const Options& options : linear_forms())
            for (const Index L : sanitized ? std::vector<Index>{65} : std::vector<Index>{1, 33, 64, 130})
                expect_close_in_every_dtype(options,
                                            of_form(options, {.batch = 2, .length = L, .query_heads = 4, .kv_heads = 2, .head_dim = 20, .value_dim = 35}, 10),
                                            {.threads = 2, .isa = isa});
}

TEST(LinearAttentionCpu, EveryHeadAndLayout) {
    for (const auto& [dk, dv] : std::vector<std::array<Index, 2>>{{2, 1}, {7, 33}, {64, 16}, {16, 64}, {130, 70}})
        for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
            for (const Options& options : linear_forms())
                expect_close<f32>(options, of_form(options, {.length = 70, .query_heads = 3, .kv_heads = 3, .head_dim = dk, .value_dim = dv}, 11), {},
                                  {.layout = layout});
}

/// Longer than a segment, alone and packed, states and all.
TEST(LinearAttentionCpu, Segments) {
    const Index L = sanitized ? 1100 : 2100;
    for (const Options& options : linear_forms()) {
        expect_close<f32>(options, of_form(options, {.length = L, .query_heads = 2, .head_dim = 8, .value_dim = 8}, 12), {.threads = 2});
        expect_close<f64>(options,
                          of_form(options, {.length = L, .head_dim = 5, .value_dim = 3, .cu_seqlens = {3, 3, 520, 521, 1050, double(L - 1)}}, 13),
                          {.threads = 2});
    }
}

TEST(LinearAttentionCpu, EmptySizesAreLegal) {
    for (const auto& [B, L, Hq, Hkv, dk, dv] :
         std::vector<std::array<Index, 6>>{{0, 5, 2, 1, 3, 4}, {2, 0, 2, 1, 3, 4}, {2, 5, 0, 0, 3, 4}, {2, 5, 0, 1, 3, 4}, {2, 5, 2, 1, 0, 4}, {2, 5, 2, 1, 3, 0}})
        for (const Options& options : linear_forms())
            expect_close<f32>(options, of_form(options, {.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dk, .value_dim = dv}, 14), {});
    expect_close<f32>({}, make({.length = 7, .cu_seqlens = {3}}, 15), {});
}

/// Sums of thousands keep their dtype's rounding; features of elu1 may vanish.
TEST(LinearAttentionCpu, LargeAndVanishingFeatures) {
    for (const double size : {0.0, 1e-4, 10.0})
        expect_close_in_every_dtype({}, make({.length = 200, .head_dim = 16, .value_dim = 16, .states = false, .size = size}, 16), {});
    for (const double size : {0.3, 30.0})  // of nothing but equal features, every gradient of q would be zero
        expect_close_in_every_dtype({.feature_map = FeatureMap::elu1}, make({.length = 200, .head_dim = 16, .value_dim = 16, .states = false, .size = size}, 17), {});
    Case c = make({.length = 90, .states = false}, 18), got;
    for (const char* name : {"q", "k"})
        for (double& x : values(c, name)) x = -200.0;  // exp(-200) is no float: no weights, no output
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {.feature_map = FeatureMap::elu1}, c, got).ok()));
    for (const char* name : {"out.o", "grad.q", "grad.k"})
        for (const double x : values(got, name)) EXPECT_EQ(x, 0.0) << name;
}

/// Sums of weights whose inverse is no float still divide; their rows have no gradients. Of equal keys o is the mean of the values so far.
TEST(LinearAttentionCpu, SumsOfWeightsBelowNormalNumbers) {
    const Index L = 20, n = 4;
    for (const Options& options : linear_forms()) {
        if (!options.divides()) continue;
        const bool elu1 = options.feature_map == FeatureMap::elu1;
        Case c = make({.length = L, .head_dim = n, .value_dim = n, .states = false}, 18), got;
        for (const char* name : {"q", "k"})
            for (double& x : values(c, name)) x = elu1 ? -46.0 : 1e-20;  // w is from 4e-40 to 9e-39
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, options, c, got).ok()));
        std::vector<float> v(L * n), s(n * n), z(n), y(n);
        std::vector<double> mean(n);
        const std::vector<float> x(n, elu1 ? -46.0f : 1e-20f);
        std::vector<std::byte> memory(1 << 12);
        for (Index i = 0; i < L * n; ++i) v[i] = float(values(c, "v")[i]);
        for (Index t = 0; t < L; ++t) {
            const linear_attention::Token<float> token{view(x.data(), {1, 1, n}), view(x.data(), {1, 1, n}), view<const float>(v.data() + t * n, {1, 1, n})};
            ASSERT_TRUE(step(cpu{}, options, linear_attention::Params{}, linear_attention::State<float>{view(s.data(), {1, 1, n, n}), view(z.data(), {1, 1, n})}, token,
                             linear_attention::TokenOut<float>{view(y.data(), {1, 1, n})}, Workspace{memory.data(), memory.size()})
                            .ok());
            for (Index i = 0; i < n; ++i) {
                mean[i] += (v[t * n + i] - mean[i]) / double(t + 1);
                EXPECT_NEAR(values(got, "out.o")[t * n + i], mean[i], 1e-4) << describe(options) << " " << t;  // such numbers have 18 bits here
                EXPECT_NEAR(y[i], mean[i], 1e-4) << describe(options) << " " << t;
            }
        }
        for (const char* name : {"grad.q", "grad.k", "grad.v"})
            for (const double g : values(got, name)) EXPECT_EQ(g, 0.0) << name << " " << describe(options);
    }
}

TEST(LinearAttentionCpu, NeitherLaterTokensNorOtherSequencesAreRead) {
    for (const Options& options : linear_forms()) {
        Case c = of_form(options, {.length = 150, .head_dim = 5, .value_dim = 6, .cu_seqlens = {3, 80, 147}}, 19), clean, dirty;
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, options, c, clean).ok()));
        for (const char* name : {"q", "k", "v"}) {
            auto& x = values(c, name);
            const std::size_t row = x.size() / 150;
            for (std::size_t i = 0; i < x.size(); ++i)
                if (i / row < 3 || i / row >= 60) x[i] = std::nan("");
        }
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, options, c, dirty).ok()));
        for (std::size_t i = 0; i < 60 * 6; ++i) EXPECT_EQ(values(clean, "out.o")[i], values(dirty, "out.o")[i]) << i;
        for (std::size_t i = 0; i < 3 * 6; ++i) EXPECT_EQ(values(dirty, "grad.v")[i], 0.0);
    }
}

TEST(LinearAttentionCpu, SameBitsForAnyNumberOfThreadsAndInSteps) {
    const Index B = 2, L = 600, Hq = 4, Hkv = 2, dk = 20, dv = 24;
    const Options options{.feature_map = FeatureMap::elu1};
    const Case c = rounded<Operator, bf16, float>(make({.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dk, .value_dim = dv, .states = false}, 20));
    Case one, want;
    ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = 1}, options, c, one).ok()));
    for (const int threads : {2, 5}) {
        Case many;
        ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = threads}, options, c, many).ok()));
        for (const auto& [name, tensor] : one.tensors) EXPECT_EQ(tensor.values, many.tensors[name].values) << name;
    }
    // Steps, held to the truth of whole sequences.
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, c, want).ok()));
    std::vector<float> q, k, v, s(B * Hkv * dk * dv), z(B * Hkv * dk), y(B * Hq * dv);
    for (const double x : c.tensors.at("q").values) q.push_back(float(x));
    for (const double x : c.tensors.at("k").values) k.push_back(float(x));
    for (const double x : c.tensors.at("v").values) v.push_back(float(x));
    const auto at = [&](const std::vector<float>& x, Index t, Index H, Index n) {
        return View<const float, 3>{x.data() + t * H * n, {B, H, n}, {L * H * n, n, 1}};
    };
    const linear_attention::State<float> state{view(s.data(), {B, Hkv, dk, dv}), view(z.data(), {B, Hkv, dk})};
    std::vector<std::byte> memory(1 << 14);
    double error = 0.0, norm = 0.0;
    for (Index t = 0; t < L; ++t) {
        const linear_attention::Token<float> token{at(q, t, Hq, dk), at(k, t, Hkv, dk), at(v, t, Hkv, dv)};
        const Workspace ws{memory.data(), workspace_size(cpu{}, options, shape_of(state, token), pass::step)};
        ASSERT_LE(ws.size, memory.size());
        ASSERT_TRUE(step(cpu{}, options, linear_attention::Params{}, state, token, linear_attention::TokenOut<float>{view(y.data(), {B, Hq, dv})}, ws).ok());
        for (Index b = 0; b < B; ++b)
            for (Index i = 0; i < Hq * dv; ++i) {
                const double exact = want.tensors.at("out.o").values[(b * L + t) * Hq * dv + i], off = y[b * Hq * dv + i] - exact;
                error += off * off, norm += exact * exact;
            }
    }
    EXPECT_LE(std::sqrt(error / norm), 1e-5);
}

TEST(LinearAttentionCpu, GradientsOneByOneAndErrors) {
    const Index L = 70, n = 4;
    Random r(21);
    std::vector<float> from[4], got[3], one(L * n);
    for (auto& x : from)
        for (Index i = 0; i < L * n; ++i) x.push_back(static_cast<float>(r.normal()));
    for (auto& x : got) x.resize(one.size());
    const auto tensor = [&](std::vector<float>& x) { return view(x.data(), {1, L, 1, n}); };
    const auto input = [&](int i) { return view(static_cast<const float*>(from[i].data()), {1, L, 1, n}); };
    const linear_attention::Inputs<float> tokens{.q = input(0), .k = input(1), .v = input(2)};
    for (const Options& options : linear_forms()) {
        std::vector<std::byte> memory(workspace_size(cpu{}, options, shape_of(tokens), pass::backward));
        const auto run = [&](const linear_attention::Grads<float>& grads) {
            ASSERT_TRUE(backward(cpu{}, options, tokens, {}, Saved{}, {.o = input(3)}, grads, Workspace{memory.data(), memory.size()}).ok());
        };
        run({.q = tensor(got[0]), .k = tensor(got[1]), .v = tensor(got[2])});
        run({.q = tensor(one)});
        EXPECT_EQ(one, got[0]);
        run({.k = tensor(one)});
        EXPECT_EQ(one, got[1]);
        run({.v = tensor(one)});
        EXPECT_EQ(one, got[2]);
    }
    std::vector<float> x(8), o(8);
    const linear_attention::Inputs<float> in{.q = view<const float>(x.data(), {1, 2, 2, 2}), .k = view<const float>(x.data(), {1, 2, 2, 2}), .v = view<const float>(x.data(), {1, 2, 2, 2})};
    EXPECT_EQ(forward(cpu{}, Options{}, in, {.o = view(o.data(), {1, 2, 2, 2})}, Saved{}, Workspace{}).code(), StatusCode::workspace_too_small);
    EXPECT_EQ(forward(cpu{.threads = -1}, Options{}, in, {.o = view(o.data(), {1, 2, 2, 2})}, Saved{}, Workspace{}).code(), StatusCode::invalid_argument);
}

}  // namespace
}  // namespace interstate::test
