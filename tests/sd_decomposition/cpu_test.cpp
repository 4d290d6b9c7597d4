// The decomposition on the CPU against the float64 reference: every dtype, instruction set and size around panels, vectors
// and blocks of rows, deficient ranks, scales, strides, threads.
#include <array>

#include <gtest/gtest.h>

#include <sd_decomposition/sd_decomposition.hpp>

#include "../support/isas.hpp"
#include "../support/sanitized.hpp"
#include "sd_decomposition_cases.hpp"

namespace interstate::test {
namespace {

using sd_decomposition::Operator;

/// Of what is rounded to T, relative to the largest singular value of A's parts.
template <class T>
void expect_close(const Case& c, cpu exec, RunOptions run = {}, bool measures = true) {
    const Case in = rounded<Operator, T, float>(c);
    Case got, want;
    const Status status = run_case<Operator, T, float>(exec, {}, in, got, run);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, {}, in, want).ok()));
    EXPECT_LE(worst_error(got, want, measures), (std::is_same_v<T, double> ? 5e-13 : 2e-6))
        << to_string(dtype_of<T>) << " " << to_string(exec.isa) << " L " << c.tensors.at("Q").extent[1] << " d "
        << c.tensors.at("Q").extent[3];
}
void expect_close_in_every_dtype(const Case& c, cpu exec, RunOptions run = {}) {
    expect_close<f64>(c, exec, run);
    expect_close<f32>(c, exec, run);
    expect_close<f16>(c, exec, run);
    expect_close<bf16>(c, exec, run);
}

TEST(SdDecompositionCpu, EverySizeAndInstructionSet) {
    for (const Isa isa : isas())
        for (const Index d : {1, 2, 3, 7, 8, 9, 16, 21})
            for (const Index L : std::array<Index, 6>{1, 2, 2 * d - 1, 2 * d, 2 * d + 1, 45}) {
                const Case c = make({.batch = 1, .length = L, .heads = 2, .head_dim = d}, 10 + d);
                expect_close<f64>(c, {.threads = 2, .isa = isa});
                expect_close<f32>(c, {.threads = 2, .isa = isa});
            }
}

TEST(SdDecompositionCpu, BlocksOfRowsAndLargeHeads) {
    for (const Index L : {127, 128, 129, 400})
        expect_close_in_every_dtype(make({.length = L, .head_dim = 19}, 3), {});
    if (sanitized) return;
    for (const Index d : {32, 64}) expect_close_in_every_dtype(make({.length = 300, .head_dim = d}, 4), {});
    expect_close<f64>(make({.length = 90, .head_dim = 64}, 4), {});
    expect_close<f64>(make({.length = 257, .head_dim = 128}, 5), {});
}

TEST(SdDecompositionCpu, LayoutsAndGroupedHeads) {
    for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
        for (const Index L : {9, 50})
            expect_close_in_every_dtype(make({.batch = 2, .length = L, .heads = 4, .kv_heads = 2, .head_dim = 10}, 8), {},
                                        {.layout = layout});
}

TEST(SdDecompositionCpu, DeficientRanks) {
    for (const Isa isa : isas())
        for (const Index L : {20, 150})
            for (const Index rank : {1, 2, 5}) {
                const Case c = make({.length = L, .head_dim = 17, .rank = rank}, 5);
                expect_close<f64>(c, {.isa = isa});
                expect_close<f32>(c, {.isa = isa}, {}, false);  // noise of 1e-7 in 24 values is seen by effective ranks
            }
}

TEST(SdDecompositionCpu, ZerosAndEqualQueriesAndKeysAreDefined) {
    const auto expect_zeros = [](const Case& c, bool all) {
        for (const auto run : {&run_case<Operator, double, float, cpu>, &run_case<Operator, float, float, cpu>}) {
            Case got;
            ASSERT_TRUE(run(cpu{}, {}, c, got, {}).ok());
            for (const auto& [name, tensor] : got.tensors)
                for (const double x : tensor.values) {
                    ASSERT_TRUE(std::isfinite(x)) << name;
                    if (all || name.starts_with("out.routing")) {
                        EXPECT_EQ(x, 0.0) << name;
                    }
                }
        }
    };
    for (const Index L : {1, 16, 33, 200}) {
        Case c = make({.length = L, .heads = 2, .kv_heads = 2, .head_dim = 24}, 7);
        c.tensors["K"] = c.tensors["Q"];
        expect_zeros(c, false);
        for (double& x : values(c, "K")) x = 0.0;
        expect_zeros(c, true);
    }
    for (const auto& [B, L, H, d] : std::vector<std::array<Index, 4>>{{0, 5, 2, 2}, {2, 0, 2, 2}, {2, 5, 0, 2}, {2, 5, 2, 0}})
        expect_zeros(make({.batch = B, .length = L, .heads = H, .kv_heads = H, .head_dim = d}, 3), true);
}

TEST(SdDecompositionCpu, ScalesOfQueriesKeysAndColumns) {
    for (const Index L : {12, 60}) {
        Case c = make({.length = L, .head_dim = 9}, 6);
        for (std::size_t i = 0; i < values(c, "Q").size(); ++i) {  // what one has too much the other lacks, column by column
            const double power = std::ldexp(1.0, static_cast<int>(i % 9) * 12 - 48);
            values(c, "Q")[i] *= power;
            values(c, "K")[i] /= power;
        }
        expect_close<f64>(c, {});
        expect_close<f32>(c, {});
        for (const auto& [q, k] : {std::pair{1e200, 1e-190}, {1e-250, 1e200}, {1e140, 1e140}, {1e-150, 1e-140}})
            expect_close<f64>(make({.length = L, .head_dim = 9, .q_scale = q, .k_scale = k}, 6), {});
        for (const auto& [q, k] : {std::pair{1e30, 1e-30}, {1e18, 1e18}, {1e-40, 1e10}, {1e-15, 1e-15}})
            expect_close<f32>(make({.length = L, .head_dim = 9, .q_scale = q, .k_scale = k}, 6), {});
    }
}

TEST(SdDecompositionCpu, NanStaysInItsHead) {
    for (const Index L : {9, 140}) {
        Case c = make({.length = L, .heads = 2, .kv_heads = 2, .head_dim = 5}, 3), clean, got;
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, clean).ok()));
        values(c, "Q").back() = L == 9 ? std::nan("") : INFINITY;
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, got).ok()));
        for (const auto& [name, tensor] : clean.tensors)
            for (std::size_t i = 0; i < tensor.values.size(); ++i)
                EXPECT_TRUE(i < tensor.values.size() / 2 ? values(got, name)[i] == tensor.values[i] : std::isnan(values(got, name)[i]))
                    << name;
    }
}

TEST(SdDecompositionCpu, SameBitsForAnyNumberOfThreads) {
    const Case c = make({.batch = 2, .length = 70, .heads = 3, .kv_heads = 1, .head_dim = 16}, 2);
    Case one;
    ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = 1}, {}, c, one).ok()));
    for (const int threads : {2, 5, 9}) {
        Case many;
        ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = threads}, {}, c, many).ok()));
        for (const auto& [name, tensor] : one.tensors) EXPECT_EQ(tensor.values, values(many, name)) << name;
    }
}

TEST(SdDecompositionCpu, OutputsOneByOneAndErrors) {
    const std::vector<float> q = {1, 2, 3, 4, 5, 6, 7, 8}, k = {0, 1, 0, -1, 2, 0, 1, 1};
    const sd_decomposition::Inputs<float> in{.Q = view(q.data(), {1, 4, 1, 2}), .K = view(k.data(), {1, 4, 1, 2})};
    const sd_decomposition::Options options{.scale = 1.0};
    std::vector<std::byte> memory(workspace_size(cpu{}, options, shape_of(in), pass::forward));
    const Workspace ws{memory.data(), memory.size()};
    float energy = -1.0f, rank = -1.0f;
    ASSERT_TRUE(forward(cpu{}, options, in, {.routing_energy = view(&energy, {1, 1}), .filtering_stable_rank = view(&rank, {1, 1})}, Saved{}, ws).ok());
    double a[4][4], routing = 0.0, all = 0.0;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) a[i][j] = q[2 * i] * k[2 * j] + q[2 * i + 1] * k[2 * j + 1];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) routing += (a[i][j] - a[j][i]) * (a[i][j] - a[j][i]) / 4, all += a[i][j] * a[i][j];
    EXPECT_NEAR(energy, routing / all, 1e-6);
    EXPECT_GE(rank, 1.0f);

    const sd_decomposition::Outputs<float> out{.routing_energy = view(&energy, {1, 1})};
    EXPECT_EQ(forward(cpu{}, options, in, out, Saved{}, Workspace{memory.data(), memory.size() - 1}).code(), StatusCode::workspace_too_small);
    EXPECT_EQ(forward(cpu{.threads = -1}, options, in, out, Saved{}, ws).code(), StatusCode::invalid_argument);
    EXPECT_EQ(forward(cpu{}, {.scale = INFINITY}, in, out, Saved{}, ws).code(), StatusCode::invalid_argument);
    EXPECT_EQ(forward(cpu{}, options, {.Q = in.Q}, out, Saved{}, ws).code(), StatusCode::invalid_argument);
}

}  // namespace
}  // namespace interstate::test
