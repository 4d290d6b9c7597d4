// The cuda executor of S-D attention against the float64 reference. A plain program: exit 0 passed, 1 failed, 77 skipped (no device).
// --quick runs a few small cases, for compute-sanitizer.
#include <array>
#include <cmath>
#include <cstdio>

#include <interstate/verify.cuh>
#include <sd_attention/reference.hpp>
#include <sd_attention/sd_attention.cuh>

#include "../support/cuda_graph.cuh"
#include "../support/cuda_memory.cuh"
#include "../support/cuda_packed.cuh"
#include "rounded_formula.hpp"

namespace interstate::test {
namespace {

using sd_attention::Component;
using sd_attention::Normalizer;
using sd_attention::Operator;
using sd_attention::Options;

const interstate::cuda gpu;

/// Against the float64 reference on inputs rounded alike: float64 to 1e-12, float32 to 1e-5, 16 bits by the 16-bit rule. What the truth leaves
/// nothing of but its own rounding (of a single token, grad.P) is held to as much of zero.
template <class T, class W = float>
void expect_close(Checks& checks, const Options& options, const Case& c, RunOptions run = {}) {
    const Case in = rounded<Operator, T, W>(c);
    const auto extent = [&](const char* name, int axis) { return static_cast<int>(in.tensors.at(name).extent[static_cast<std::size_t>(axis)]); };
    char what[200];
    std::snprintf(what, sizeof what, "%s %s B=%d L=%d H=%d r=%d dv=%d planes=%d S=%d layout=%d", to_string(dtype_of<T>), describe(options).c_str(), extent("u", 0),
                  extent("u", 1), extent("u", 2), extent("u", 3), extent("v", 3), in.tensors.contains("a") ? extent("a", 1) : -1,
                  in.tensors.contains("cu_seqlens") ? extent("cu_seqlens", 0) - 1 : -1, static_cast<int>(run.layout));
    Case got, want;
    const Status status = run_case<Operator, T, W>(gpu, options, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, options, in, want);
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    if (!status.ok() || !truth.ok()) return;
    const Case plain = sizeof(T) == 2 ? rounded_formula<T>(options, in) : Case{};
    std::string beyond;
    for (const TensorError& e : compare(got, want)) {
        double bound = sizeof(T) == 8 ? 1e-12 : 1e-5;
        const HostTensor& truth_of = want.tensors.at(e.name);
        const bool zero = norm_of(truth_of) < 1e-13;
        if (sizeof(T) == 2) {
            const bool stored = e.name == "out.o" || e.name == "grad.u" || e.name == "grad.v";
            bound += 2.0 * (zero ? norm_of(plain.tensors.at(e.name)) : compare("", plain.tensors.at(e.name), truth_of).relative);
            bound += stored && !zero ? rounding_floor<T>(truth_of) : 0.0;
        }
        const double error = zero ? norm_of(got.tensors.at(e.name)) : e.relative;
        char text[128];
        std::snprintf(text, sizeof text, "%s: %.2e, may be %.2e%s; ", e.name.c_str(), error, bound, e.finite ? "" : ", not finite");
        if (!e.finite || !(error <= bound)) beyond += text;
    }
    checks.expect(beyond.empty() && !want.tensors.empty(), what, beyond.c_str());
}
void every_dtype(Checks& checks, const Options& options, const Case& c, RunOptions run = {}) {
    expect_close<f64, double>(checks, options, c, run);
    expect_close<f32>(checks, options, c, run);
    expect_close<f16>(checks, options, c, run);
    expect_close<bf16, double>(checks, options, c, run);
}
Case of_form(const Options& options, SdCase o, std::uint64_t seed) {
    o.lse = options.softmax();
    o.unit = true;
    return make(o, seed);
}

void lengths(Checks& checks) {
    for (const Options& options : all_sd_options())
        for (const Index L : {1, 2, 63, 64, 65, 129})
            every_dtype(checks, options, of_form(options, {.batch = 2, .length = L, .heads = 2, .channels = 64, .value_dim = 64, .planes = L % 2 == 0 ? 2 : -1}, 3));
    for (const auto normalizer : {Normalizer::softmax, Normalizer::identity, Normalizer::elu1})
        for (const Index dim : {64, 128}) {  // more than one part of dK
            const Options options{.normalizer = normalizer};
            const Case c = of_form(options, {.length = 1100, .channels = dim, .value_dim = dim}, 4);
            expect_close<f32>(checks, options, c);
            expect_close<f16>(checks, options, c);
            expect_close<bf16>(checks, options, c);
        }
}
void dims(Checks& checks) {
    for (const auto& [r, dv, planes] : std::vector<std::array<Index, 3>>{{1, 1, -1}, {3, 5, 0}, {8, 64, -1}, {40, 72, 3}, {96, 96, -1}, {128, 64, -1}, {130, 16, -1}})
        for (const auto normalizer : {Normalizer::softmax, Normalizer::identity, Normalizer::elu1}) {
            const Options options{.normalizer = normalizer};
            const Case c = of_form(options, {.batch = 2, .length = 70, .heads = 2, .channels = r, .value_dim = dv, .planes = planes}, 6);
            for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded}) every_dtype(checks, options, c, {.layout = layout});
        }
    for (const auto& [B, L, H, r, dv] : std::vector<std::array<Index, 5>>{{0, 5, 2, 3, 4}, {2, 0, 2, 3, 4}, {2, 5, 0, 3, 4}, {2, 5, 2, 0, 4}, {2, 5, 2, 3, 0}})
        for (const Options& options : all_sd_options()) {
            const Case c = of_form(options, {.batch = B, .length = L, .heads = H, .channels = r, .value_dim = dv}, 8);
            expect_close<f64>(checks, options, c);
            expect_close<bf16>(checks, options, c);
        }
}
void sizes(Checks& checks) {
    const Options identity{.normalizer = Normalizer::identity};
    for (const double size : {1e-3, 8.0}) every_dtype(checks, identity, make({.length = 200, .channels = 16, .value_dim = 16, .size = size}, 9));
    expect_close<bf16>(checks, identity, make({.length = 200, .channels = 16, .value_dim = 16, .size = 300.0}, 9));
    expect_close<f32>(checks, identity, make({.length = 3000, .channels = 64, .value_dim = 64}, 10));
}
void packed(Checks& checks) {
    Random r(13);
    for (int i = 0; i < 4; ++i)
        for (const auto normalizer : {Normalizer::softmax, Normalizer::identity, Normalizer::elu1}) {
            const Options options{.normalizer = normalizer};
            every_dtype(checks, options,
                        of_form(options, {.length = 300, .heads = 2, .channels = i % 2 == 0 ? 64 : 24, .value_dim = 40, .cu_seqlens = r.offsets(300)}, 14 + static_cast<std::uint64_t>(i)));
        }
    SdCase s{.length = 200, .heads = 2, .channels = 40, .value_dim = 24, .cu_seqlens = {3, 3, 80, 81, 190}, .lse = true, .unit = true};
    expect_margins_unread<Operator>(checks, make(s, 21), {"u", "v", "dout.o"});
    for (const auto& bad : std::vector<std::vector<double>>{{0, 30, 20}, {-5, 10}, {0, 201}, {201}}) {
        s.cu_seqlens = bad;
        expect_bad_offsets_reported<Operator>(checks, {}, make(s, 22));
    }
    for (const double at : {0.0, 200.0, 201.0}) {
        s.cu_seqlens = {at};
        expect_zeros_without_sequences<Operator>(checks, {}, make(s, 23), at > 200.0);
    }
}
/// Two calls give the same bits, also in a graph.
template <class T>
void determinism(Checks& checks) {
    for (const auto normalizer : {Normalizer::softmax, Normalizer::identity, Normalizer::elu1}) {
        const Options options{.normalizer = normalizer};
        const SdCase sizes{.length = 1300, .heads = 2, .channels = 64, .value_dim = 64};
        const Case c = of_form(options, sizes, 24);
        Case first, second;
        checks.expect(run_case<Operator, T, float>(gpu, options, c, first).ok() && run_case<Operator, T, float>(gpu, options, c, second).ok(), "twice", "runs");
        for (const auto& [name, tensor] : first.tensors) checks.expect(tensor.values == second.tensors[name].values, name.c_str(), "two calls must be the same bits");
        in_a_graph<Operator, T>(checks, options, c, of_form(options, sizes, 25));
    }
}

/// Steps against the reference's whole sequences.
template <class T>
void steps(Checks& checks, const Options& options, Index r, Index dv, bool paged) {
    using A = acc_t<T>;
    const Index B = 2, L = 20, H = 2, page = 4, pages = L / page;
    Case c = rounded<Operator, T, float>(of_form(options, {.batch = B, .length = L, .heads = H, .channels = r, .value_dim = dv}, 26)), want;
    c.tensors.erase("dout.o"), c.tensors.erase("dout.lse");
    checks.expect(run_case<Operator, double, double>(reference{}, options, c, want).ok(), "step", "reference");
    const auto n = [](Index x) { return static_cast<std::size_t>(x); };
    std::vector<T> u(n(B * H * r)), v(n(B * H * dv)), o(n(B * H * dv)), cache_u(n(B * L * H * r)), cache_v(n(B * L * H * dv));
    std::vector<float> P(c.tensors.at("P").values.begin(), c.tensors.at("P").values.end());
    std::vector<float> delta(c.tensors.at("delta").values.begin(), c.tensors.at("delta").values.end());
    std::vector<A> s(n(B * H * r * dv)), z(n(B * H * r));
    std::vector<std::int32_t> table;
    for (Index i = 0; i < B * pages; ++i) table.push_back(static_cast<std::int32_t>(B * pages - 1 - i));
    OnDevice on(checks);
    const sd_attention::Params<float> params{{.P = view<const float>(on(P), {H, r, r}), .delta = view<const float>(on(delta), {H, r})}};
    const sd_attention::Token<T> token{view<const T>(on(u), {B, H, r}), view<const T>(on(v), {B, H, dv})};
    const sd_attention::TokenOut<T> out{.o = view(on(o), {B, H, dv})};
    sd_attention::Cache<T> cache;
    if (paged) {
        cache.k = view(on(cache_u), {B * pages, page, H, r}), cache.v = view(on(cache_v), {B * pages, page, H, dv});
        cache.block_table = view<const std::int32_t>(on(table), {B, pages});
    } else {
        cache.k = view(on(cache_u), {B, L, H, r}), cache.v = view(on(cache_v), {B, L, H, dv});
    }
    sd_attention::State<A> state{.s = view(on(s), {B, H, r, dv}), .z = {}};
    if (options.normalizer == Normalizer::elu1) state.z = view(on(z), {B, H, r});
    std::vector<std::byte> memory(std::max<std::size_t>(1, options.softmax() ? workspace_size(gpu, options, shape_of(params, cache, token), pass::step)
                                                                              : workspace_size(gpu, options, shape_of(params, state, token), pass::step)));
    const Workspace ws{on(memory), memory.size()};
    HostTensor got{{B, L, H, dv}, std::vector<double>(n(B * L * H * dv))};
    for (Index t = 0; t < L; ++t) {
        const auto fill = [&](const char* name, auto& to, Index width) {
            for (Index b = 0; b < B; ++b)
                for (Index i = 0; i < width; ++i) to[n(b * width + i)] = T(c.tensors.at(name).values[n((b * L + t) * width + i)]);
            on.refill(to);
        };
        fill("u", u, H * r);
        fill("v", v, H * dv);
        cache.length = t;
        const Status status = options.softmax() ? step(gpu, options, params, cache, token, out, ws) : step(gpu, options, params, state, token, out, ws);
        checks.expect(status.ok(), "step", status.message());
        on.bring_back(o);
        for (Index b = 0; b < B; ++b)
            for (Index i = 0; i < H * dv; ++i) got.values[n((b * L + t) * H * dv + i)] = static_cast<double>(o[n(b * H * dv + i)]);
    }
    const HostTensor& truth = want.tensors.at("out.o");
    const TensorError e = compare("o", got, truth);
    double bound = sizeof(T) == 8 ? 1e-12 : 1e-5;
    if (sizeof(T) == 2) bound += 2.0 * compare("", rounded_formula<T>(options, c).tensors.at("out.o"), truth).relative + rounding_floor<T>(truth);
    char text[160];
    std::snprintf(text, sizeof text, "%s %s r=%d dv=%d: %.2e, may be %.2e", to_string(dtype_of<T>), describe(options).c_str(), static_cast<int>(r), static_cast<int>(dv), e.relative, bound);
    checks.expect(e.finite && e.relative <= bound, "step", text);
}
void every_step(Checks& checks) {
    for (const auto normalizer : {Normalizer::softmax, Normalizer::identity, Normalizer::elu1})
        for (const auto& [r, dv] : std::vector<std::array<Index, 2>>{{64, 64}, {20, 30}, {7, 5}, {130, 40}})
            for (const bool paged : {false, true}) {
                const Options options{.normalizer = normalizer};
                if (paged && !options.softmax()) continue;
                steps<f64>(checks, options, r, dv, paged);
                steps<f32>(checks, options, r, dv, paged);
                steps<f16>(checks, options, r, dv, paged);
                steps<bf16>(checks, options, r, dv, paged);
            }
}

void errors(Checks& checks) {
    float x[16] = {};
    const sd_attention::Inputs<float> in{.u = view<const float>(x, {1, 2, 2, 2}), .v = view<const float>(x, {1, 2, 2, 2}),
                                         .generator = {.P = view<const float>(x, {2, 2, 2}), .delta = view<const float>(x, {2, 2})}};
    const sd_attention::Outputs<float> out{.o = view(x, {1, 2, 2, 2})};
    checks.expect(forward(gpu, Options{}, in, out, Saved{}, Workspace{}).code() == StatusCode::workspace_too_small, "forward", "workspace");
    checks.expect(forward(gpu, Options{}, sd_attention::Inputs<float>{}, sd_attention::Outputs<float>{}, Saved{}, Workspace{}).code() == StatusCode::invalid_argument, "null", "views");
    const auto name = [](DType dtype, Index r) { return std::string(which_kernel(gpu, Options{}, sd_attention::Shape{.dtype = dtype, .channels = r}).name); };
    checks.expect(name(DType::bf16, 64) == "sd_attention.cuda.projected", "kernel", "projected");
    checks.expect(name(DType::f32, 129) == "sd_attention.cuda.general" && name(DType::f64, 8) == "sd_attention.cuda.general", "kernel", "general");
}

void run(Checks& checks, bool quick) {
    if (quick) {
        for (const auto normalizer : {Normalizer::softmax, Normalizer::identity, Normalizer::elu1}) {
            const Options options{.normalizer = normalizer};
            every_dtype(checks, options, of_form(options, {.length = 70, .heads = 2, .channels = 20, .value_dim = 24, .planes = 2}, 3));
            expect_close<bf16>(checks, options, of_form(options, {.length = 600, .channels = 64, .value_dim = 64, .cu_seqlens = {3, 560, 590}}, 4));
            expect_close<f32>(checks, options, of_form(options, {.length = 70, .channels = 100, .value_dim = 72}, 5));
            steps<bf16>(checks, options, 20, 24, false);
        }
        return;
    }
    lengths(checks);
    dims(checks);
    sizes(checks);
    packed(checks);
    determinism<bf16>(checks);
    determinism<f32>(checks);
    every_step(checks);
    errors(checks);
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "sd_attention", interstate::test::run); }
