// The cuda executor of the output gate against the float64 reference. A plain program: exit 0 passed, 1 failed, 77
// skipped (no device). --quick runs a few small cases, for compute-sanitizer.
#include <array>
#include <cstdio>

#include <gate/gate.cuh>
#include <gate/reference.hpp>
#include <interstate/verify.cuh>

#include "../support/cuda_packed.cuh"
#include "gate_cases.hpp"

namespace interstate::test {
namespace {

using gate::Operator;

template <class T>
void expect_close(Checks& checks, const Case& c, RunOptions run = {}) {
    const Case in = rounded<Operator, T, float>(c);
    Case got, want;
    const Status status = run_case<Operator, T, float>(interstate::cuda{}, {}, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, {}, in, want);
    const auto& o = in.tensors.at("o").extent;
    char what[96];
    std::snprintf(what, sizeof what, "%s B=%d L=%d H=%d d=%d layout=%d", to_string(dtype_of<T>), static_cast<int>(o[0]),
                  static_cast<int>(o[1]), static_cast<int>(o[2]), static_cast<int>(o[3]), static_cast<int>(run.layout));
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    const std::string beyond = beyond_tolerance<T>(got, want);
    checks.expect(beyond.empty(), what, beyond.c_str());
}
void every_dtype(Checks& checks, const Case& c, RunOptions run = {}) {
    expect_close<f64>(checks, c, run);
    expect_close<f32>(checks, c, run);
    expect_close<f16>(checks, c, run);
    expect_close<bf16>(checks, c, run);
}

void packed(Checks& checks) {
    for (const Index d : {5, 16}) {
        const Case c = make({.length = 50, .heads = 2, .value_dim = d, .cu_seqlens = {3, 3, 20, 47}}, 4);
        every_dtype(checks, c);
        expect_margins_unread<Operator>(checks, c, {"o", "g", "dout.y"});
    }
    for (const auto& bad : std::vector<std::vector<double>>{{0, 30, 20}, {-5, 10}, {0, 51}, {51}})
        expect_bad_offsets_reported<Operator>(checks, {}, make({.length = 50, .cu_seqlens = bad}, 4));
}

/// `step` is forward of one token; y may be o.
void steps(Checks& checks) {
    const Index B = 3, H = 2, d = 16, n = B * H * d;
    const Case c = make({.batch = B, .length = 1, .heads = H, .value_dim = d}, 7);
    Case want;
    Status s = run_case<Operator, double, double>(reference{}, {}, c, want);
    checks.expect(s.ok(), "step", s.message());
    double* memory = nullptr;
    checks.expect(cudaMalloc(&memory, 2 * n * sizeof(double)) == cudaSuccess, "step", "cudaMalloc");
    cudaMemcpy(memory, c.tensors.at("o").values.data(), n * sizeof(double), cudaMemcpyHostToDevice);
    cudaMemcpy(memory + n, c.tensors.at("g").values.data(), n * sizeof(double), cudaMemcpyHostToDevice);
    s = step(interstate::cuda{}, gate::Options{}, gate::Params{}, gate::State{},
             gate::Token<double>{view(static_cast<const double*>(memory), {B, H, d}), view(static_cast<const double*>(memory + n), {B, H, d})},
             gate::TokenOut<double>{view(memory, {B, H, d})}, Workspace{});
    checks.expect(s.ok(), "step", s.message());
    HostTensor got{{B, 1, H, d}, std::vector<double>(static_cast<std::size_t>(n))};
    checks.expect(cudaMemcpy(got.values.data(), memory, n * sizeof(double), cudaMemcpyDeviceToHost) == cudaSuccess, "step", "copy");
    const TensorError e = compare("y", got, want.tensors["out.y"]);
    checks.expect(e.finite && e.relative < 1e-12, "step", "must be forward of one token");
    cudaFree(memory);
}

void run(Checks& checks, bool quick) {
    packed(checks);
    steps(checks);
    const Status s = forward(interstate::cuda{}, gate::Options{}, gate::Inputs<float>{}, gate::Outputs<float>{}, Saved{}, Workspace{});
    checks.expect(s.code() == StatusCode::invalid_argument, "null o", s.message());
    for (const Index d : {1, 2, 3, 4, 7, 8, 9, 16, 33, 64, 100}) {
        for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
            every_dtype(checks, make({.batch = 2, .length = 11, .heads = 3, .value_dim = d}, 10 + d), {.layout = layout});
        if (quick) return;
    }
    for (const auto& [B, L, H, d] : std::vector<std::array<Index, 4>>{{0, 5, 3, 2}, {2, 0, 3, 2}, {2, 5, 0, 2}, {2, 5, 3, 0}})
        expect_close<f32>(checks, make({.batch = B, .length = L, .heads = H, .value_dim = d}, 3));
    for (const double scale : {0.0, 1e-3, 10.0}) every_dtype(checks, make({.length = 9, .value_dim = 33, .scale = scale}, 4));
    every_dtype(checks, make({.batch = 2, .length = 2000, .heads = 8, .value_dim = 64}, 4));
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "gate.cuda", &interstate::test::run); }
