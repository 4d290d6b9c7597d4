// The CPU kernels of attention by components against the float64 reference.
#include <algorithm>
#include <array>
#include <cmath>

#include <gtest/gtest.h>

#include <component_attention/component_attention.hpp>

#include "../support/isas.hpp"
#include "component_cases.hpp"

namespace interstate::test {
namespace {

using component_attention::Component;
using component_attention::Operator;
using component_attention::Options;

template <class T>
void expect_close(const Options& options, const Case& c, cpu exec, RunOptions run = {}) {
    const Case in = rounded<Operator, T, float>(c);
    Case got, want;
    const Status status = run_case<Operator, T, float>(exec, options, in, got, run);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, in, want).ok()));
    EXPECT_EQ(beyond_tolerance<T>(options, in, got, want), "")
        << describe(options) << " " << to_string(dtype_of<T>) << " " << to_string(exec.isa);
}
/// Full and half width: what is packed is any dtype's, and attention has tests of its own in all of them.
void expect_close_in_both_widths(const Options& options, const Case& c, cpu exec, RunOptions run = {}) {
    expect_close<f32>(options, c, exec, run);
    expect_close<bf16>(options, c, exec, run);
}

TEST(ComponentAttentionCpu, EveryFormLayoutAndInstructionSet) {
    for (const Options& options : all_component_options())
        for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
            for (const Isa isa : isas())
                expect_close_in_both_widths(
                    options,
                    of_options(options, {.batch = 2, .length = 37, .query_heads = 4, .kv_heads = 2, .head_dim = 9, .value_dim = 7}, 10),
                    {.threads = 2, .isa = isa}, {.layout = layout});
}

TEST(ComponentAttentionCpu, LengthsHeadsAndPackedSequences) {
    for (const Options& options : all_component_options()) {
        for (const Index L : {1, 64, 129})
            expect_close<f32>(options,
                              of_options(options, {.length = L, .query_heads = 2, .kv_heads = 2, .head_dim = 40, .value_dim = 16}, 11), {});
        const bool sigmoid = options.score == component_attention::Score::sigmoid;
        expect_close_in_both_widths(
            options,
            of_options(options,
                       {.length = 90, .query_heads = 3, .kv_heads = 1, .value_dim = 5, .cu_seqlens = {3, 3, 40, 41, 86}, .bias = sigmoid},
                       12),
            {.threads = 2});
    }
}

TEST(ComponentAttentionCpu, EmptySizesAreLegal) {
    for (const auto& [B, L, Hq, Hkv, dh, dv] : std::vector<std::array<Index, 6>>{{0, 5, 2, 1, 3, 4},
                                                                                 {2, 0, 2, 1, 3, 4},
                                                                                 {2, 5, 0, 0, 3, 4},
                                                                                 {2, 5, 0, 1, 3, 4},
                                                                                 {2, 5, 2, 1, 0, 4},
                                                                                 {2, 5, 2, 1, 3, 0},
                                                                                 {2, 5, 2, 2, 3, 0}})
        for (const Options& options : all_component_options())
            expect_close<f32>(
                options,
                of_options(options, {.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dh, .value_dim = dv}, 13),
                {});
}

/// Both components are attention itself, bit for bit.
TEST(ComponentAttentionCpu, BothComponentsAreAttention) {
    const Case c = make({.length = 50, .query_heads = 4, .kv_heads = 2, .head_dim = 16}, 14);
    Case got, want;
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, got).ok()));
    ASSERT_TRUE((run_case<attention::Operator, float, float>(cpu{}, {}, c, want).ok()));
    for (const auto& [name, tensor] : want.tensors) EXPECT_EQ(got.tensors.at(name).values, tensor.values) << name;
}

/// A gradient that is asked for alone has the bits that it has among all.
TEST(ComponentAttentionCpu, GradientsAlone) {
    const Index B = 2, L = 30, Hq = 4, Hkv = 2, dh = 6, dv = 5;
    const Options options{.component = Component::filtering};
    const Case c = rounded<Operator, float, float>(
        make({.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dh, .value_dim = dv, .lse = false}, 17));
    Case all;
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, options, c, all).ok()));
    const auto floats = [&](const char* name) {
        return std::vector<float>(c.tensors.at(name).values.begin(), c.tensors.at(name).values.end());
    };
    const std::vector<float> q = floats("q"), k = floats("k"), v = floats("v"), dout = floats("dout.o");
    std::vector<float> o(dout.size()), lse(static_cast<std::size_t>(B * L * Hq));
    const component_attention::Inputs<float> in{
        .q = view(q.data(), {B, L, Hq, dh}), .k = view(k.data(), {B, L, Hkv, dh}), .v = view(v.data(), {B, L, Hkv, dv})};
    const component_attention::Outputs<float> out{view(o.data(), {B, L, Hq, dv}), view(lse.data(), {B, L, Hq})};
    const component_attention::Upstream<float> upstream{.o = view(dout.data(), {B, L, Hq, dv})};
    std::vector<char> memory(std::max(workspace_size(cpu{}, options, shape_of(in), pass::forward),
                                      workspace_size(cpu{}, options, shape_of(in), pass::backward)));
    const Workspace ws{memory.data(), memory.size()};
    ASSERT_TRUE(forward(cpu{}, options, in, out, Saved{}, ws).ok());
    for (const int which : {0, 1, 2}) {
        static constexpr const char* names[] = {"grad.q", "grad.k", "grad.v"};
        const std::vector<double>& want = values(all, names[which]);
        std::vector<float> got(want.size());
        component_attention::Grads<float> grads;
        if (which == 0) grads.q = view(got.data(), {B, L, Hq, dh});
        if (which == 1) grads.k = view(got.data(), {B, L, Hkv, dh});
        if (which == 2) grads.v = view(got.data(), {B, L, Hkv, dv});
        ASSERT_TRUE(backward(cpu{}, options, in, out, Saved{}, upstream, grads, ws).ok());
        EXPECT_EQ(std::vector<double>(got.begin(), got.end()), want) << names[which];
    }
}

TEST(ComponentAttentionCpu, TheSameBitsForAnyNumberOfThreads) {
    for (const auto component : {Component::routing, Component::filtering}) {
        const Case c = make({.batch = 2, .length = 150, .query_heads = 4, .kv_heads = 2, .head_dim = 16}, 15);
        Case one, many;
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 1}, {.component = component}, c, one).ok()));
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 3}, {.component = component}, c, many).ok()));
        for (const auto& [name, tensor] : one.tensors) EXPECT_EQ(many.tensors.at(name).values, tensor.values) << name;
    }
}

/// A later token, or one of no sequence, moves nothing.
TEST(ComponentAttentionCpu, LaterTokensAreNotRead) {
    Case c = make({.length = 80, .query_heads = 2, .kv_heads = 1, .cu_seqlens = {2, 70}}, 16), clean, dirty;
    const Options options{.component = Component::routing};
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, options, c, clean).ok()));
    for (const char* name : {"q", "k", "v"}) {
        auto& x = values(c, name);
        const std::size_t row = x.size() / 80;
        for (std::size_t i = 0; i < x.size(); ++i)
            if (i / row < 2 || i / row >= 50) x[i] = std::nan("");
    }
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, options, c, dirty).ok()));
    const auto &want = values(clean, "out.o"), &got = values(dirty, "out.o");
    for (std::size_t i = 0; i < want.size() / 80 * 50; ++i) ASSERT_EQ(got[i], want[i]) << i;
}

TEST(ComponentAttentionCpu, ErrorsComeBeforeAnythingIsWritten) {
    std::vector<float> x(64, 1.0f), o(64, 7.0f);
    const component_attention::Inputs<float> in{.q = view<const float>(x.data(), {1, 4, 2, 4}),
                                                .k = view<const float>(x.data(), {1, 4, 1, 4}),
                                                .v = view<const float>(x.data(), {1, 4, 1, 4})};
    const component_attention::Outputs<float> out{.o = view(o.data(), {1, 4, 2, 4})};
    const Options options{.component = Component::filtering};
    EXPECT_EQ(forward(cpu{}, options, in, out, Saved{}, Workspace{}).code(), StatusCode::workspace_too_small);
    EXPECT_EQ(forward(cpu{.threads = -1}, options, in, out, Saved{}, Workspace{}).code(), StatusCode::invalid_argument);
    EXPECT_EQ(forward(cpu{}, options, component_attention::Inputs<float>{}, out, Saved{}, Workspace{}).code(),
              StatusCode::invalid_argument);
    for (const float y : o) EXPECT_EQ(y, 7.0f);
    EXPECT_EQ(std::string(which_kernel(cpu{.isa = Isa::baseline}, options, shape_of(in)).name), "component_attention.cpu.pairs.baseline");
    EXPECT_EQ(std::string(which_kernel(cpu{.isa = Isa::baseline}, {}, shape_of(in)).name), "attention.cpu.tiled.baseline");
}

}  // namespace
}  // namespace interstate::test
