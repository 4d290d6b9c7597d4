// The output gate on the CPU against the float64 reference: every dtype, instruction set and size around vectors,
// strides, packing, threads, steps.
#include <array>

#include <gtest/gtest.h>

#include <gate/gate.hpp>

#include "../support/isas.hpp"
#include "gate_cases.hpp"

namespace interstate::test {
namespace {

using gate::Operator;

template <class T>
void expect_close(const Case& c, cpu exec, RunOptions run = {}) {
    const Case in = rounded<Operator, T, float>(c);
    Case got, want;
    const Status status = run_case<Operator, T, float>(exec, {}, in, got, run);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, {}, in, want).ok()));
    EXPECT_EQ(beyond_tolerance<T>(got, want), "") << to_string(dtype_of<T>) << " " << to_string(exec.isa);
}
void expect_close_in_every_dtype(const Case& c, cpu exec, RunOptions run = {}) {
    expect_close<f64>(c, exec, run);
    expect_close<f32>(c, exec, run);
    expect_close<f16>(c, exec, run);
    expect_close<bf16>(c, exec, run);
}

TEST(GateCpu, EverySizeLayoutAndInstructionSet) {
    for (const Isa isa : isas())
        for (const Index d : {1, 3, 4, 7, 8, 9, 15, 16, 17, 33, 64, 100})
            for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
                expect_close_in_every_dtype(make({.batch = 2, .length = 11, .heads = 3, .value_dim = d}, 10 + d),
                                            {.threads = 2, .isa = isa}, {.layout = layout});
}

TEST(GateCpu, EmptySizesAreLegal) {
    for (const auto& [B, L, H, d] : std::vector<std::array<Index, 4>>{{0, 5, 3, 2}, {2, 0, 3, 2}, {2, 5, 0, 2}, {2, 5, 3, 0}})
        expect_close<f32>(make({.batch = B, .length = L, .heads = H, .value_dim = d}, 3), {});
}

TEST(GateCpu, ExtremesAreThoseOfTheReference) {
    for (const double scale : {0.0, 1e-3, 10.0}) expect_close_in_every_dtype(make({.length = 9, .value_dim = 33, .scale = scale}, 4), {});
    Case c = make({.length = 3, .value_dim = 2}, 4), got;
    c.tensors["g"].values = {1e4, -1e4, 300.0, -300.0, 0.0, -0.0};
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, got).ok()));
    for (const char* name : {"out.y", "grad.o", "grad.g"})
        for (const double x : got.tensors[name].values) EXPECT_TRUE(std::isfinite(x));
    EXPECT_EQ(got.tensors["out.y"].values[0], static_cast<float>(c.tensors["o"].values[0]));
    EXPECT_EQ(got.tensors["out.y"].values[1], 0.0);
}

TEST(GateCpu, RowsOutsideOfSequencesAreZeroAndNotRead) {
    Case c = make({.length = 50, .heads = 2, .value_dim = 5, .cu_seqlens = {3, 3, 20, 47}}, 4);
    expect_close_in_every_dtype(c, {.threads = 2});
    Case clean, dirty;
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, clean).ok()));
    for (const char* name : {"o", "g", "dout.y"})
        for (Index i = 0; i < 500; ++i)
            if (i < 30 || i >= 470) c.tensors[name].values[i] = std::nan("");
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, dirty).ok()));
    for (const auto& [name, tensor] : clean.tensors) {
        EXPECT_EQ(tensor.values, dirty.tensors[name].values) << name;
        EXPECT_EQ(tensor.values[29], 0.0);
        EXPECT_EQ(tensor.values[470], 0.0);
    }
}

TEST(GateCpu, SameBitsForAnyNumberOfThreadsAndInSteps) {
    const Index B = 3, L = 200, H = 5, d = 37;
    const Case c = rounded<Operator, bf16, float>(make({.batch = B, .length = L, .heads = H, .value_dim = d}, 2));
    Case one;
    ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = 1}, {}, c, one).ok()));
    for (const int threads : {2, 5}) {
        Case many;
        ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = threads}, {}, c, many).ok()));
        for (const auto& [name, tensor] : one.tensors) EXPECT_EQ(tensor.values, many.tensors[name].values) << name;
    }
    std::vector<bf16> o, g, y(B * H * d);
    for (const double x : c.tensors.at("o").values) o.push_back(bf16(x));
    for (const double x : c.tensors.at("g").values) g.push_back(bf16(x));
    const auto at = [&](const std::vector<bf16>& x, Index t) {
        return View<const bf16, 3>{x.data() + t * H * d, {B, H, d}, {L * H * d, d, 1}};
    };
    for (Index t = 0; t < L; t += 17) {
        ASSERT_TRUE(step(cpu{}, gate::Options{}, gate::Params{}, gate::State{}, gate::Token<bf16>{at(o, t), at(g, t)},
                         gate::TokenOut<bf16>{view(y.data(), {B, H, d})}, Workspace{}).ok());
        for (Index b = 0; b < B; ++b)
            for (Index i = 0; i < H * d; ++i)
                ASSERT_EQ(static_cast<double>(y[b * H * d + i]), one.tensors["out.y"].values[(b * L + t) * H * d + i]);
    }
}

TEST(GateCpu, GradientsOneByOneAndErrors) {
    const std::vector<float> o(12, 2.0f), g(12, 0.0f), dy(12, 1.0f);
    std::vector<float> only(12);
    const gate::Inputs<float> in{.o = view(o.data(), {1, 3, 2, 2}), .g = view(g.data(), {1, 3, 2, 2})};
    const gate::Upstream<float> up{view(dy.data(), {1, 3, 2, 2})};
    ASSERT_TRUE(backward(cpu{}, gate::Options{}, in, {}, Saved{}, up, {.o = view(only.data(), {1, 3, 2, 2})}, Workspace{}).ok());
    EXPECT_EQ(only, std::vector<float>(12, 0.5f));
    ASSERT_TRUE(backward(cpu{}, gate::Options{}, in, {}, Saved{}, up, {.g = view(only.data(), {1, 3, 2, 2})}, Workspace{}).ok());
    EXPECT_EQ(only, std::vector<float>(12, 0.5f));
    EXPECT_EQ(forward(cpu{}, gate::Options{}, in, gate::Outputs<float>{}, Saved{}, Workspace{}).code(), StatusCode::invalid_argument);
    EXPECT_EQ(forward(cpu{.threads = -1}, gate::Options{}, in, gate::Outputs<float>{view(only.data(), {1, 3, 2, 2})}, Saved{}, Workspace{}).code(),
              StatusCode::invalid_argument);
}

}  // namespace
}  // namespace interstate::test
