// The cuda executor of the decomposition against the float64 reference. A plain program: exit 0 passed, 1 failed, 77 skipped
// (no device). --quick runs a few small cases, for compute-sanitizer.
#include <array>
#include <cstdio>

#include <interstate/verify.cuh>
#include <sd_decomposition/reference.hpp>
#include <sd_decomposition/sd_decomposition.cuh>

#include "../support/cuda_graph.cuh"
#include "../support/cuda_memory.cuh"
#include "sd_decomposition_cases.hpp"

namespace interstate::test {
namespace {

using sd_decomposition::Operator;

const interstate::cuda gpu;

/// Of what is rounded to T, relative to the largest singular value of A's parts: the bounds of the CPU's tests.
template <class T>
void expect_close(Checks& checks, const Case& c, RunOptions run = {}, bool measures = true) {
    const Case in = rounded<Operator, T, float>(c);
    Case got, want;
    const Status status = run_case<Operator, T, float>(gpu, {}, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, {}, in, want);
    const auto &q = in.tensors.at("Q").extent, &k = in.tensors.at("K").extent;
    char what[96], error[96];
    std::snprintf(what, sizeof what, "%s B=%d L=%d H=%d/%d d=%d layout=%d", to_string(dtype_of<T>), static_cast<int>(q[0]),
                  static_cast<int>(q[1]), static_cast<int>(q[2]), static_cast<int>(k[2]), static_cast<int>(q[3]),
                  static_cast<int>(run.layout));
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    if (!status.ok() || !truth.ok()) return;
    const double worst = worst_error(got, want, measures), bound = std::is_same_v<T, double> ? 5e-13 : 2e-6;
    std::snprintf(error, sizeof error, "error %.2e, must be at most %.0e", worst, bound);
    checks.expect(worst <= bound, what, error);
}
void every_dtype(Checks& checks, const Case& c, RunOptions run = {}) {
    expect_close<f64>(checks, c, run);
    expect_close<f32>(checks, c, run);
    expect_close<f16>(checks, c, run);
    expect_close<bf16>(checks, c, run);
}
template <class T>
Case results(Checks& checks, const Case& c) {
    Case got;
    const Status status = run_case<Operator, T, float>(gpu, {}, c, got);
    checks.expect(status.ok(), "run", status.message());
    return got;
}

void sizes(Checks& checks, bool quick) {
    for (const Index d : {1, 2, 3, 7, 8, 9, 16, 21}) {
        for (const Index L : std::array<Index, 6>{1, 2, 2 * d - 1, 2 * d, 2 * d + 1, 45}) {
            const Case c = make({.batch = 1, .length = L, .heads = 2, .head_dim = d}, 10 + d);
            expect_close<f64>(checks, c);
            expect_close<f32>(checks, c);
        }
        if (quick && d == 3) break;
    }
    for (const Index L : {63, 64, 65, 127, 128, 129, 300}) {  // around blocks of rows
        every_dtype(checks, make({.length = L, .head_dim = 19}, 3));
        if (quick) break;
    }
}

/// One panel of columns and several, parts in shared memory and not.
void large_heads(Checks& checks) {
    for (const Index d : {32, 64}) every_dtype(checks, make({.length = 300, .head_dim = d}, 4));
    expect_close<f32>(checks, make({.length = 512, .heads = 3, .head_dim = 64}, 4));
    expect_close<f64>(checks, make({.length = 90, .head_dim = 64}, 4));
    for (const Index d : {65, 90, 96}) expect_close<f32>(checks, make({.length = 2 * d + 70, .head_dim = d}, 6));
    expect_close<f64>(checks, make({.length = 260, .head_dim = 65}, 6));
    expect_close<f64>(checks, make({.length = 257, .head_dim = 128}, 5));
    expect_close<f32>(checks, make({.length = 200, .head_dim = 128}, 5));
    expect_close<f32>(checks, make({.length = 450, .head_dim = 140}, 5));
}

void layouts(Checks& checks) {
    for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
        for (const Index L : {9, 50})
            every_dtype(checks, make({.batch = 2, .length = L, .heads = 4, .kv_heads = 2, .head_dim = 10}, 8), {.layout = layout});
}

void deficient_ranks(Checks& checks) {
    for (const Index L : {20, 150})
        for (const Index rank : {1, 2, 5}) {
            const Case c = make({.length = L, .head_dim = 17, .rank = rank}, 5);
            expect_close<f64>(checks, c);
            expect_close<f32>(checks, c, {}, false);  // noise of 1e-7 in 24 values is seen by effective ranks
        }
    const Case c = make({.length = 300, .head_dim = 64, .rank = 7}, 5);
    expect_close<f64>(checks, c);
    expect_close<f32>(checks, c, {}, false);
}

/// Every result is a number, and zero, if not `all` then where it is about routing.
void expect_zeros(Checks& checks, const Case& c, bool all) {
    for (const Case& got : {results<f64>(checks, c), results<f32>(checks, c)})
        for (const auto& [name, tensor] : got.tensors) {
            bool good = true;
            for (const double x : tensor.values)
                good = good && (all || name.starts_with("out.routing") ? x == 0.0 : std::isfinite(x));
            checks.expect(good, name.c_str(), "must be zero, or else a number");
        }
}
void zeros(Checks& checks) {
    for (const Index L : {1, 16, 33, 200}) {
        Case c = make({.length = L, .heads = 2, .kv_heads = 2, .head_dim = 24}, 7);
        c.tensors["K"] = c.tensors["Q"];
        expect_zeros(checks, c, false);
        for (double& x : values(c, "K")) x = 0.0;
        expect_zeros(checks, c, true);
    }
    for (const auto& [B, L, H, d] : std::vector<std::array<Index, 4>>{{0, 5, 2, 2}, {2, 0, 2, 2}, {2, 5, 0, 2}, {2, 5, 2, 0}})
        expect_zeros(checks, make({.batch = B, .length = L, .heads = H, .kv_heads = H, .head_dim = d}, 3), true);
    // S = a b^T - b a^T of orthogonal a and b: two equal singular values, and F is zero.
    Case c;
    c.tensors["Q"] = {{1, 4, 1, 2}, {3, 0, 0, 2, 0, 0, 0, 0}};
    c.tensors["K"] = {{1, 4, 1, 2}, {0, -3, 2, 0, 0, 0, 0, 0}};
    expect_close<f64>(checks, c);
    for (const auto& [name, tensor] : results<f64>(checks, c).tensors)
        if (name.starts_with("out.filtering"))
            for (const double x : tensor.values) checks.expect(x == 0.0, name.c_str(), "must be zero for one plane");
}

void scales(Checks& checks) {
    for (const Index L : {12, 60}) {
        Case c = make({.length = L, .head_dim = 9}, 6);
        for (std::size_t i = 0; i < values(c, "Q").size(); ++i) {  // what one has too much the other lacks, column by column
            const double power = std::ldexp(1.0, static_cast<int>(i % 9) * 12 - 48);
            values(c, "Q")[i] *= power;
            values(c, "K")[i] /= power;
        }
        expect_close<f64>(checks, c);
        expect_close<f32>(checks, c);
        for (const auto& [q, k] : {std::pair{1e200, 1e-190}, {1e-250, 1e200}, {1e140, 1e140}, {1e-150, 1e-140}})
            expect_close<f64>(checks, make({.length = L, .head_dim = 9, .q_scale = q, .k_scale = k}, 6));
        for (const auto& [q, k] : {std::pair{1e30, 1e-30}, {1e18, 1e18}, {1e-40, 1e10}, {1e-15, 1e-15}})
            expect_close<f32>(checks, make({.length = L, .head_dim = 9, .q_scale = q, .k_scale = k}, 6));
    }
}

void nan_stays_in_its_head(Checks& checks) {
    for (const Index L : {9, 140}) {
        Case c = make({.length = L, .heads = 2, .kv_heads = 2, .head_dim = 5}, 3);
        const Case clean = results<f32>(checks, c);
        values(c, "Q").back() = L == 9 ? std::nan("") : INFINITY;
        Case got = results<f32>(checks, c);
        for (const auto& [name, tensor] : clean.tensors) {
            bool good = true;
            for (std::size_t i = 0; i < tensor.values.size(); ++i)
                good = good && (i < tensor.values.size() / 2 ? values(got, name)[i] == tensor.values[i] : std::isnan(values(got, name)[i]));
            checks.expect(good, name.c_str(), "must be NaN in the head that holds one, and untouched in the other");
        }
    }
}

void same_bits(Checks& checks) {
    const Case c = make({.batch = 2, .length = 70, .heads = 3, .kv_heads = 1, .head_dim = 16}, 2);
    const Case one = results<bf16>(checks, c);
    for (int i = 0; i < 3; ++i) {
        Case again = results<bf16>(checks, c);
        for (const auto& [name, tensor] : one.tensors)
            checks.expect(tensor.values == values(again, name), name.c_str(), "must be the same bits in every run");
    }
}

/// Single outputs, errors, and a call in a graph.
void calls(Checks& checks) {
    std::vector<float> q = {1, 2, 3, 4, 5, 6, 7, 8}, k = {0, 1, 0, -1, 2, 0, 1, 1}, measures(4, -1.0f);
    OnDevice device(checks);
    const sd_decomposition::Inputs<float> in{.Q = view(static_cast<const float*>(device(q)), {1, 4, 1, 2}),
                                             .K = view(static_cast<const float*>(device(k)), {1, 4, 1, 2})};
    const sd_decomposition::Options options{.scale = 1.0};
    float* const to = device(measures);
    const Workspace ws = device.workspace(workspace_size(gpu, options, shape_of(in), pass::forward));
    const sd_decomposition::Outputs<float> out{.routing_energy = view(to, {1, 1}), .filtering_stable_rank = view(to + 1, {1, 1})};
    const Status s = forward(gpu, options, in, out, Saved{}, ws);
    checks.expect(s.ok(), "single outputs", s.message());
    device.bring_back(measures);
    double a[4][4], routing = 0.0, all = 0.0;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j)
            a[i][j] = q[static_cast<std::size_t>(2 * i)] * k[static_cast<std::size_t>(2 * j)] +
                      q[static_cast<std::size_t>(2 * i + 1)] * k[static_cast<std::size_t>(2 * j + 1)];
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) routing += (a[i][j] - a[j][i]) * (a[i][j] - a[j][i]) / 4, all += a[i][j] * a[i][j];
    checks.expect(std::abs(measures[0] - routing / all) < 1e-6, "single outputs", "routing energy");
    checks.expect(measures[1] >= 1.0f && measures[1] <= 4.0f, "single outputs", "stable rank");
    checks.expect(measures[2] == -1.0f && measures[3] == -1.0f, "single outputs", "nothing else may be written");

    const auto code = [&](const sd_decomposition::Options& o, const sd_decomposition::Inputs<float>& inputs, Workspace memory) {
        return forward(gpu, o, inputs, out, Saved{}, memory).code();
    };
    checks.expect(code(options, in, Workspace{ws.data, ws.size - 1}) == StatusCode::workspace_too_small, "errors", "workspace");
    checks.expect(code({.scale = INFINITY}, in, ws) == StatusCode::invalid_argument, "errors", "scale");
    checks.expect(code(options, {.Q = in.Q}, ws) == StatusCode::invalid_argument, "errors", "null K");

    const std::vector<float> plain = measures;
    measures.assign(4, -1.0f);
    device.refill(measures);
    Graph graph(checks, "graph", [&](const interstate::cuda& recorded) { return forward(recorded, options, in, out, Saved{}, ws); });
    graph.replay();
    device.bring_back(measures);
    checks.expect(measures == plain, "graph", "must be the bits of a plain call");
}

/// More heads than go through the kernels together; each is a window of the same numbers.
void many_heads(Checks& checks) {
    const Index d = 128, L = 257, H = 400;
    const sd_decomposition::Options options{};
    std::vector<float> numbers(static_cast<std::size_t>(L * d + 3 * H + 7)), together(static_cast<std::size_t>(H)), alone(1);
    Random r(9);
    for (float& x : numbers) x = static_cast<float>(r.normal());
    OnDevice device(checks);
    const float* const at = device(numbers);
    const auto run = [&](Index first, Index heads, std::vector<float>& ranks) {
        const sd_decomposition::Inputs<float> in{.Q = view(at + first, {1, L, heads, d}, {0, d, 1, 1}),
                                                 .K = view(at + 7 + 2 * first, {1, L, heads, d}, {0, d, 2, 1})};
        const Workspace ws = device.workspace(workspace_size(gpu, options, shape_of(in), pass::forward));
        const Status s = forward(gpu, options, in, {.routing_effective_rank = view(device(ranks), {Index{1}, heads})}, Saved{}, ws);
        checks.expect(s.ok(), "many heads", s.message());
        device.bring_back(ranks);
    };
    checks.expect(sd_decomposition::detail::CudaLayout<float>::together({.batch = 1, .length = L, .query_heads = H, .kv_heads = H, .head_dim = d}) < H,
                  "many heads", "must be more than go together, to be worth a test");
    run(0, H, together);
    for (const Index h : {0, 1, 150, 399}) {
        run(h, 1, alone);
        checks.expect(alone[0] > 1.0f && together[static_cast<std::size_t>(h)] == alone[0], "many heads", "must be the bits of a head alone");
    }
}

void run(Checks& checks, bool quick) {
    sizes(checks, quick);
    calls(checks);
    nan_stays_in_its_head(checks);
    if (quick) {
        expect_close<f32>(checks, make({.length = 150, .head_dim = 66}, 6));
        return;
    }
    large_heads(checks);
    layouts(checks);
    deficient_ranks(checks);
    zeros(checks);
    scales(checks);
    same_bits(checks);
    many_heads(checks);
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "sd_decomposition.cuda", &interstate::test::run); }
