// Random Fourier features on the CPU against the float64 reference: every dtype, instruction set and size around tiles
// and vectors, large phases, strides, packing, threads, steps.
#include <array>

#include <gtest/gtest.h>

#include <random_features/random_features.hpp>

#include "../support/isas.hpp"
#include "random_features_cases.hpp"

namespace interstate::test {
namespace {

using random_features::Operator;

template <class T, class P>
void expect_close(const Case& c, cpu exec, RunOptions run = {}, double largest = 1.0) {
    const Case in = rounded<Operator, T, P>(c);
    Case got, want;
    const Status status = run_case<Operator, T, P>(exec, {}, in, got, run);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, {}, in, want).ok()));
    EXPECT_EQ((beyond_tolerance<T, P>(got, want, largest)), "") << to_string(dtype_of<T>) << " " << to_string(exec.isa);
}
void expect_close_in_every_dtype(const Case& c, cpu exec, RunOptions run = {}) {
    expect_close<f64, double>(c, exec, run);
    expect_close<f32, float>(c, exec, run);
    expect_close<f16, float>(c, exec, run);
    expect_close<bf16, float>(c, exec, run);
}

TEST(RandomFeaturesCpu, EveryLengthAroundTheTiles) {
    for (const Isa isa : isas())
        for (const Index L : {0, 1, 2, 3, 4, 5, 31, 63, 64, 65, 127, 130, 257})
            for (const bool shared : {false, true})
                expect_close<f32, float>(make({.batch = 2, .length = L, .heads = 3, .head_dim = 5, .frequencies = 7, .shared = shared}, 9 + L),
                                         {.threads = 2, .isa = isa});
}

TEST(RandomFeaturesCpu, EverySizeLayoutAndDtype) {
    for (const Isa isa : isas())
        for (const Index dh : {1, 8, 17, 64})
            for (const Index F : {1, 4, 15, 16, 32, 33, 100})
                for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
                    expect_close_in_every_dtype(make({.length = 9, .heads = 2, .head_dim = dh, .frequencies = F}, dh + F),
                                                {.isa = isa}, {.layout = layout});
}

TEST(RandomFeaturesCpu, ParameterDtypes) {
    const Case c = make({.length = 70, .heads = 2}, 4);
    expect_close<f32, double>(c, {});
    expect_close<bf16, double>(c, {});
    expect_close<f64, float>(c, {});
}

/// Phases around the reach of the vectors' sines, and beyond: their error is that of W x in the accumulator's dtype.
TEST(RandomFeaturesCpu, LargePhases) {
    for (const Isa isa : isas())
        for (const double bandwidth : {1e-2, 1e-4, 2e-5}) {
            const Case c = make({.length = 40, .head_dim = 1, .frequencies = 33, .bandwidth = bandwidth}, 4);
            expect_close<f64, double>(c, {.isa = isa}, {}, 1e-3 / bandwidth);
            expect_close<f32, float>(c, {.isa = isa}, {}, 2e-2 / bandwidth);
        }
    // One product is rounded alike here and there: what is left are the sines themselves.
    Case c;
    c.tensors["x"] = {{1, 1, 1, 1}, {1.0}};
    for (const double top : {3.0, 8000.0, 9.9e5, 1e7, 1e30}) {
        c.tensors["W"] = Random(5).uniform({1, 997, 1}, -top, top);
        for (const Isa isa : isas()) {
            Case got, want;
            const Case in = rounded<Operator, float, float>(c);
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{.isa = isa}, {}, in, got).ok()));
            ASSERT_TRUE((run_case<Operator, double, double>(reference{}, {}, in, want).ok()));
            for (const TensorError& e : compare(got, want)) EXPECT_LE(e.largest * std::sqrt(997.0), 3e-7) << top;
            ASSERT_TRUE((run_case<Operator, double, double>(cpu{.isa = isa}, {}, c, got).ok()));
            ASSERT_TRUE((run_case<Operator, double, double>(reference{}, {}, c, want).ok()));
            for (const TensorError& e : compare(got, want)) EXPECT_LE(e.largest * std::sqrt(997.0), 6e-16) << top;
        }
    }
}

TEST(RandomFeaturesCpu, EmptySizesAreLegal) {
    for (const auto& [B, L, H, d, F] : std::vector<std::array<Index, 5>>{
             {0, 5, 3, 2, 2}, {2, 0, 3, 2, 2}, {2, 5, 0, 2, 2}, {2, 5, 3, 0, 2}, {2, 5, 3, 2, 0}})
        for (const bool shared : {false, true})
            expect_close<f32, float>(make({.batch = B, .length = L, .heads = H, .head_dim = d, .frequencies = F, .shared = shared}, 3), {});
}

TEST(RandomFeaturesCpu, RowsOutsideOfSequencesAreZeroAndNotRead) {
    Case c = make({.length = 150, .heads = 2, .cu_seqlens = {3, 3, 20, 137}}, 4);
    expect_close_in_every_dtype(c, {.threads = 2});
    Case clean, dirty;
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, clean).ok()));
    for (const auto& [name, row] : {std::pair{"x", 8}, std::pair{"dout.y", 12}})
        for (Index i = 0; i < 150 * row; ++i)
            if (i < 3 * row || i >= 137 * row) c.tensors[name].values[i] = std::nan("");
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, dirty).ok()));
    for (const auto& [name, tensor] : clean.tensors) EXPECT_EQ(tensor.values, dirty.tensors[name].values) << name;
    for (Index i = 0; i < 150 * 12; ++i)
        ASSERT_TRUE((i >= 36 && i < 137 * 12) || clean.tensors["out.y"].values[i] == 0.0);
}

TEST(RandomFeaturesCpu, SameBitsForAnyNumberOfThreadsAndInSteps) {
    const Index B = 3, L = 200, H = 3, dh = 21, F = 37;
    const Case c = rounded<Operator, bf16, float>(make({.batch = B, .length = L, .heads = H, .head_dim = dh, .frequencies = F}, 2));
    Case one;
    ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = 1}, {}, c, one).ok()));
    for (const int threads : {2, 5}) {
        Case many;
        ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = threads}, {}, c, many).ok()));
        for (const auto& [name, tensor] : one.tensors) EXPECT_EQ(tensor.values, many.tensors[name].values) << name;
    }
    std::vector<bf16> x, y(B * H * 2 * F);
    std::vector<float> W;
    for (const double v : c.tensors.at("x").values) x.push_back(bf16(v));
    for (const double v : c.tensors.at("W").values) W.push_back(static_cast<float>(v));
    const random_features::Params<float> params{view(static_cast<const float*>(W.data()), {H, F, dh})};
    for (Index t = 0; t < L; t += 13) {
        const random_features::Token<bf16> token{{x.data() + t * H * dh, {B, H, dh}, {L * H * dh, dh, 1}}};
        std::vector<char> memory(workspace_size(cpu{}, {}, shape_of(params, token), pass::step));
        ASSERT_TRUE(step(cpu{}, random_features::Options{}, params, random_features::State{}, token,
                         random_features::TokenOut<bf16>{view(y.data(), {B, H, 2 * F})}, Workspace{memory.data(), memory.size()}).ok());
        for (Index b = 0; b < B; ++b)
            for (Index i = 0; i < H * 2 * F; ++i)
                ASSERT_EQ(static_cast<double>(y[b * H * 2 * F + i]), one.tensors["out.y"].values[(b * L + t) * H * 2 * F + i]);
    }
}

TEST(RandomFeaturesCpu, GradientsOneByOneAndErrors) {
    const Index L = 70, H = 2, dh = 4, F = 3;
    Case c = make({.length = L, .heads = H}, 5), all;
    ASSERT_TRUE((run_case<Operator, double, double>(cpu{}, {}, c, all).ok()));
    const random_features::Inputs<double> in{.x = view(std::as_const(c.tensors["x"].values).data(), {1, L, H, dh}),
                                             .params = {view(std::as_const(c.tensors["W"].values).data(), {H, F, dh})}};
    const random_features::Upstream<double> up{view(std::as_const(c.tensors["dout.y"].values).data(), {1, L, H, 2 * F})};
    std::vector<char> memory(workspace_size(cpu{}, {}, shape_of(in), pass::backward));
    const Workspace ws{memory.data(), memory.size()};
    std::vector<double> dx(L * H * dh), dW(H * F * dh);
    ASSERT_TRUE(backward(cpu{}, {}, in, {}, Saved{}, up, {.x = view(dx.data(), {1, L, H, dh})}, ws).ok());
    EXPECT_EQ(dx, all.tensors["grad.x"].values);
    ASSERT_TRUE(backward(cpu{}, {}, in, {}, Saved{}, up, {.params = {view(dW.data(), {H, F, dh})}}, ws).ok());
    EXPECT_EQ(dW, all.tensors["grad.W"].values);
    EXPECT_EQ(backward(cpu{}, {}, in, {}, Saved{}, up, {}, Workspace{}).code(), StatusCode::workspace_too_small);
    EXPECT_EQ(forward(cpu{}, {}, in, {}, Saved{}, ws).code(), StatusCode::invalid_argument);
}

}  // namespace
}  // namespace interstate::test
