// The cuda executor of random Fourier features against the float64 reference. A plain program: exit 0 passed, 1 failed, 77
// skipped (no device). --quick runs a few small cases, for compute-sanitizer.
#include <array>
#include <cstdio>

#include <interstate/verify.cuh>
#include <random_features/random_features.cuh>
#include <random_features/reference.hpp>

#include "../support/cuda_packed.cuh"
#include "random_features_cases.hpp"

namespace interstate::test {
namespace {

using random_features::Operator;

template <class T, class P>
void expect_close(Checks& checks, const Case& c, RunOptions run = {}, double largest = 1.0) {
    const Case in = rounded<Operator, T, P>(c);
    Case got, want;
    const Status status = run_case<Operator, T, P>(interstate::cuda{}, {}, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, {}, in, want);
    const auto& x = in.tensors.at("x").extent;
    const auto& W = in.tensors.at("W").extent;
    char what[96];
    std::snprintf(what, sizeof what, "%s B=%d L=%d H=%d/%d dh=%d F=%d layout=%d", to_string(dtype_of<T>), static_cast<int>(x[0]),
                  static_cast<int>(x[1]), static_cast<int>(x[2]), static_cast<int>(W[0]), static_cast<int>(x[3]),
                  static_cast<int>(W[1]), static_cast<int>(run.layout));
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    const std::string beyond = beyond_tolerance<T, P>(got, want, largest);
    checks.expect(beyond.empty(), what, beyond.c_str());
}
void every_dtype(Checks& checks, const Case& c, RunOptions run = {}) {
    expect_close<f64, double>(checks, c, run);
    expect_close<f32, float>(checks, c, run);
    expect_close<f16, float>(checks, c, run);
    expect_close<bf16, float>(checks, c, run);
}

void packed(Checks& checks) {
    const Case c = make({.length = 150, .heads = 2, .cu_seqlens = {3, 3, 20, 137}}, 4);
    every_dtype(checks, c);
    expect_margins_unread<Operator>(checks, c, {"x", "dout.y"});
    for (const auto& bad : std::vector<std::vector<double>>{{0, 30, 20}, {-5, 10}, {0, 51}, {51}})
        expect_bad_offsets_reported<Operator>(checks, {}, make({.length = 50, .cu_seqlens = bad}, 4));
}

void steps_and_runs_agree(Checks& checks) {
    const Index B = 3, H = 2, dh = 16, F = 9;
    const Case c = make({.batch = B, .length = 1, .heads = H, .head_dim = dh, .frequencies = F}, 7);
    Case want;
    Status s = run_case<Operator, double, double>(interstate::cuda{}, {}, c, want);
    checks.expect(s.ok(), "step", s.message());
    double* memory = nullptr;
    const Index n = B * H * dh, m = H * F * dh, out = B * H * 2 * F;
    checks.expect(cudaMalloc(&memory, (n + m + out) * sizeof(double)) == cudaSuccess, "step", "cudaMalloc");
    cudaMemcpy(memory, c.tensors.at("x").values.data(), n * sizeof(double), cudaMemcpyHostToDevice);
    cudaMemcpy(memory + n, c.tensors.at("W").values.data(), m * sizeof(double), cudaMemcpyHostToDevice);
    const random_features::Params<double> params{view(static_cast<const double*>(memory + n), {H, F, dh})};
    s = step(interstate::cuda{}, random_features::Options{}, params, random_features::State{},
             random_features::Token<double>{view(static_cast<const double*>(memory), {B, H, dh})},
             random_features::TokenOut<double>{view(memory + n + m, {B, H, 2 * F})}, Workspace{});
    checks.expect(s.ok(), "step", s.message());
    std::vector<double> got(static_cast<std::size_t>(out));
    checks.expect(cudaMemcpy(got.data(), memory + n + m, out * sizeof(double), cudaMemcpyDeviceToHost) == cudaSuccess, "step", "copy");
    checks.expect(got == want.tensors["out.y"].values, "step", "must be forward of one token");
    cudaFree(memory);

    const Case long_case = make({.batch = 2, .length = 3000, .heads = 3, .head_dim = 20, .frequencies = 70, .shared = true}, 8);
    Case one, two;
    s = run_case<Operator, bf16, float>(interstate::cuda{}, {}, long_case, one);
    checks.expect(s.ok(), "two runs", s.message());
    s = run_case<Operator, bf16, float>(interstate::cuda{}, {}, long_case, two);
    checks.expect(s.ok(), "two runs", s.message());
    for (const auto& [name, tensor] : one.tensors) checks.expect(tensor.values == two.tensors[name].values, name.c_str(), "two runs must give the same bits");
    every_dtype(checks, long_case);
    // Rows that are moved 16 bytes at once, of both layouts of a batch, one and several blocks of frequencies.
    for (const Index F : {32, 64}) {
        every_dtype(checks, make({.batch = 2, .length = 2000, .heads = 2, .head_dim = 64, .frequencies = F}, 5));
        every_dtype(checks, make({.length = 700, .heads = 3, .head_dim = 64, .frequencies = F, .shared = true, .cu_seqlens = {5, 300, 651}}, 6));
    }
}

void run(Checks& checks, bool quick) {
    packed(checks);
    const Status s = forward(interstate::cuda{}, random_features::Options{}, random_features::Inputs<float>{}, random_features::Outputs<float>{},
                             Saved{}, Workspace{});
    checks.expect(s.code() == StatusCode::invalid_argument, "null x", s.message());
    every_dtype(checks, make({.batch = 2, .length = 70, .heads = 2, .head_dim = 17, .frequencies = 65}, 3));
    if (quick) return;
    steps_and_runs_agree(checks);
    for (const Index dh : {1, 8, 17, 64, 65, 130})
        for (const Index F : {1, 4, 15, 32, 64, 65, 100})
            for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
                every_dtype(checks, make({.length = 9, .heads = 2, .head_dim = dh, .frequencies = F}, dh + F), {.layout = layout});
    for (const Index L : {0, 1, 2, 31, 63, 64, 65, 129, 257, 1000})
        for (const bool shared : {false, true})
            expect_close<f32, float>(checks, make({.batch = 2, .length = L, .heads = 3, .head_dim = 5, .frequencies = 7, .shared = shared}, 9 + L));
    for (const auto& [B, L, H, d, F] : std::vector<std::array<Index, 5>>{
             {0, 5, 3, 2, 2}, {2, 0, 3, 2, 2}, {2, 5, 0, 2, 2}, {2, 5, 3, 0, 2}, {2, 5, 3, 2, 0}})
        for (const bool shared : {false, true})
            expect_close<f32, float>(checks, make({.batch = B, .length = L, .heads = H, .head_dim = d, .frequencies = F, .shared = shared}, 3));
    const Case c = make({.length = 70, .heads = 2}, 4);
    expect_close<f32, double>(checks, c);
    expect_close<bf16, double>(checks, c);
    expect_close<f64, float>(checks, c);
    // Large phases: their error is that of W x in the accumulator's dtype.
    for (const double bandwidth : {1e-2, 1e-4, 2e-5}) {
        const Case far = make({.length = 40, .head_dim = 1, .frequencies = 33, .bandwidth = bandwidth}, 4);
        expect_close<f64, double>(checks, far, {}, 1e-3 / bandwidth);
        expect_close<f32, float>(checks, far, {}, 2e-2 / bandwidth);
    }
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "random_features.cuda", &interstate::test::run); }
