// The cuda executor of attention by components against the float64 reference. A plain program: exit 0 passed, 1 failed, 77 skipped (no
// device).
// --quick runs a few small cases, for compute-sanitizer.
#include <algorithm>
#include <array>
#include <cstdio>

#include <component_attention/component_attention.cuh>
#include <component_attention/reference.hpp>
#include <interstate/verify.cuh>

#include "../support/cuda_graph.cuh"
#include "../support/cuda_memory.cuh"
#include "../support/cuda_packed.cuh"
#include "component_cases.hpp"

namespace interstate::test {
namespace {

using component_attention::Component;
using component_attention::Operator;
using component_attention::Options;

const interstate::cuda gpu;

template <class T>
void expect_close(Checks& checks, const Options& options, const Case& c, RunOptions run = {}) {
    const Case in = rounded<Operator, T, float>(c);
    const auto extent = [&](const char* name, int axis) {
        return static_cast<int>(in.tensors.at(name).extent[static_cast<std::size_t>(axis)]);
    };
    char what[200];
    std::snprintf(what, sizeof what, "%s %s B=%d L=%d Hq=%d Hkv=%d dh=%d dv=%d layout=%d", to_string(dtype_of<T>),
                  describe(options).c_str(), extent("q", 0), extent("q", 1), extent("q", 2), extent("k", 2), extent("q", 3), extent("v", 3),
                  static_cast<int>(run.layout));
    Case got, want;
    const Status status = run_case<Operator, T, float>(gpu, options, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, options, in, want);
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    if (!status.ok() || !truth.ok()) return;
    const std::string beyond = beyond_tolerance<T>(options, in, got, want);
    checks.expect(beyond.empty() && !want.tensors.empty(), what, beyond.c_str());
}
void every_dtype(Checks& checks, const Options& options, const Case& c, RunOptions run = {}) {
    expect_close<f64>(checks, options, c, run);
    expect_close<f32>(checks, options, c, run);
    expect_close<f16>(checks, options, c, run);
    expect_close<bf16>(checks, options, c, run);
}

void sizes(Checks& checks) {
    for (const Options& options : all_component_options()) {
        for (const auto& [L, Hq, Hkv, dh, dv] : std::vector<std::array<Index, 5>>{
                 {1, 2, 1, 8, 8}, {65, 4, 2, 64, 64}, {129, 2, 2, 64, 32}, {70, 3, 1, 7, 5}, {40, 2, 1, 130, 16}})
            for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
                every_dtype(
                    checks, options,
                    of_options(options, {.batch = 2, .length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dh, .value_dim = dv}, 3),
                    {.layout = layout});
        for (const auto& [B, L, Hq, Hkv, dh, dv] : std::vector<std::array<Index, 6>>{
                 {0, 5, 2, 1, 3, 4}, {2, 0, 2, 1, 3, 4}, {2, 5, 0, 0, 3, 4}, {2, 5, 0, 1, 3, 4}, {2, 5, 2, 1, 0, 4}, {2, 5, 2, 1, 3, 0}})
            expect_close<f32>(
                checks, options,
                of_options(options, {.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dh, .value_dim = dv}, 4));
    }
}
void packed(Checks& checks) {
    ComponentCase s{.length = 200, .query_heads = 4, .kv_heads = 2, .head_dim = 32, .value_dim = 24, .cu_seqlens = {3, 3, 80, 81, 190}};
    for (const Options& options : all_component_options()) every_dtype(checks, options, of_options(options, s, 5));
    expect_margins_unread<Operator>(checks, make(s, 6), {"q", "k", "v", "dout.o"}, {.component = Component::routing});
    for (const auto& bad : std::vector<std::vector<double>>{{0, 30, 20}, {-5, 10}, {0, 201}}) {
        s.cu_seqlens = bad;
        expect_bad_offsets_reported<Operator>(checks, {.component = Component::routing}, make(s, 7));
    }
}
/// A gradient that is asked for alone has the bits that it has among all.
void gradients_alone(Checks& checks) {
    const Index B = 2, L = 40, Hq = 4, Hkv = 2, dh = 16, dv = 8;
    const Options options{.component = Component::filtering};
    const Case c = rounded<Operator, float, float>(
        make({.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dh, .value_dim = dv, .lse = false}, 10));
    Case all;
    checks.expect(run_case<Operator, float, float>(gpu, options, c, all).ok(), "alone", "all gradients");
    const auto floats = [&](const char* name) {
        return std::vector<float>(c.tensors.at(name).values.begin(), c.tensors.at(name).values.end());
    };
    std::vector<float> q = floats("q"), k = floats("k"), v = floats("v"), dout = floats("dout.o"), o(dout.size()),
                       lse(static_cast<std::size_t>(B * L * Hq));
    OnDevice on(checks);
    const component_attention::Inputs<float> in{.q = view<const float>(on(q), {B, L, Hq, dh}),
                                                .k = view<const float>(on(k), {B, L, Hkv, dh}),
                                                .v = view<const float>(on(v), {B, L, Hkv, dv})};
    const component_attention::Outputs<float> out{view(on(o), {B, L, Hq, dv}), view(on(lse), {B, L, Hq})};
    const component_attention::Upstream<float> upstream{.o = view<const float>(on(dout), {B, L, Hq, dv})};
    const Workspace ws = on.workspace(
        std::max(workspace_size(gpu, options, shape_of(in), pass::forward), workspace_size(gpu, options, shape_of(in), pass::backward)));
    checks.expect(forward(gpu, options, in, out, Saved{}, ws).ok(), "alone", "forward");
    std::vector<float> results[3];
    for (const int which : {0, 1, 2}) {
        static constexpr const char* names[] = {"grad.q", "grad.k", "grad.v"};
        const std::vector<double>& want = all.tensors.at(names[which]).values;
        std::vector<float>& got = results[which];
        got.resize(want.size());
        component_attention::Grads<float> grads;
        if (which == 0) grads.q = view(on(got), {B, L, Hq, dh});
        if (which == 1) grads.k = view(on(got), {B, L, Hkv, dh});
        if (which == 2) grads.v = view(on(got), {B, L, Hkv, dv});
        checks.expect(backward(gpu, options, in, out, Saved{}, upstream, grads, ws).ok(), "alone", names[which]);
        on.bring_back(got);
        checks.expect(std::vector<double>(got.begin(), got.end()) == want, names[which], "asked for alone, must be the same bits");
    }
}
void errors(Checks& checks) {
    float x[16] = {};
    const Options options{.component = Component::routing};
    const auto in = [&](Index keys) {
        return component_attention::Inputs<float>{.q = view<const float>(x, {1, 2, 2, 2}),
                                                  .k = view<const float>(x, {1, keys, 1, 2}),
                                                  .v = view<const float>(x, {1, keys, 1, 2})};
    };
    const component_attention::Outputs<float> out{.o = view(x, {1, 2, 2, 2})};
    checks.expect(forward(gpu, options, in(2), out, Saved{}, Workspace{}).code() == StatusCode::workspace_too_small, "forward",
                  "workspace");
    checks.expect(forward(gpu, options, in(3), out, Saved{}, Workspace{}).code() == StatusCode::invalid_argument, "forward", "lengths");
    const auto name = [&](const Options& of) {
        return std::string(which_kernel(gpu, of,
                                        component_attention::Shape{.dtype = DType::bf16,
                                                                   .batch = 1,
                                                                   .queries = 4,
                                                                   .keys = 4,
                                                                   .query_heads = 2,
                                                                   .kv_heads = 1,
                                                                   .head_dim = 8,
                                                                   .value_dim = 8})
                               .name);
    };
    checks.expect(name(options) == "component_attention.cuda.pairs" && name({}) == "attention.cuda.tiled", "kernel", "names");
}
/// Two calls give the same bits, also in a graph.
void determinism(Checks& checks) {
    for (const auto component : {Component::routing, Component::filtering}) {
        const Options options{.component = component};
        const ComponentCase sizes{.batch = 2, .length = 300, .query_heads = 4, .kv_heads = 2, .head_dim = 64, .value_dim = 64};
        const Case c = make(sizes, 8);
        Case first, second;
        checks.expect(
            run_case<Operator, bf16, float>(gpu, options, c, first).ok() && run_case<Operator, bf16, float>(gpu, options, c, second).ok(),
            "twice", "runs");
        for (const auto& [name, tensor] : first.tensors)
            checks.expect(tensor.values == second.tensors[name].values, name.c_str(), "two calls must be the same bits");
        in_a_graph<Operator, bf16>(checks, options, c, make(sizes, 9));
    }
}

void run(Checks& checks, bool quick) {
    if (quick) {
        for (const auto component : {Component::routing, Component::filtering}) {
            every_dtype(checks, {.component = component},
                        make({.batch = 2, .length = 40, .query_heads = 4, .kv_heads = 2, .head_dim = 16, .value_dim = 24}, 3));
            expect_close<bf16>(checks, {.component = component, .causal = false}, make({.length = 30, .head_dim = 5}, 4));
        }
        return;
    }
    sizes(checks);
    packed(checks);
    gradients_alone(checks);
    determinism(checks);
    errors(checks);
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "component_attention", interstate::test::run); }
