// The cuda executor of linear attention against the float64 reference. A plain program: exit 0 passed, 1 failed, 77 skipped (no
// device). --quick runs a few small cases, for compute-sanitizer.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include <interstate/verify.cuh>
#include <linear_attention/linear_attention.cuh>
#include <linear_attention/reference.hpp>

#include "../support/cuda_graph.cuh"
#include "../support/cuda_memory.cuh"
#include "../support/cuda_packed.cuh"
#include "linear_attention_cases.hpp"

namespace interstate::test {
namespace {

using linear_attention::FeatureMap;
using linear_attention::Normalized;
using linear_attention::Operator;
using linear_attention::Options;

const interstate::cuda gpu;

/// The plain formula with features, weights and their gradients, which are factors of products, rounded to T: what the 16-bit rule compares
/// with. Everything else is exact.
template <class T>
Case plain_formula(const Case& c, const Options& options) {
    const auto find = [&](const char* name) -> const HostTensor* {
        const auto found = c.tensors.find(name);
        return found == c.tensors.end() ? nullptr : &found->second;
    };
    const HostTensor &q = *find("q"), &k = *find("k"), &v = *find("v"), &dout = *find("dout.o");
    const HostTensor *s0 = find("s0"), *z0 = find("z0"), *dS = find("dout.sT"), *dz = find("dout.zT"), *cu = find("cu_seqlens");
    const Index B = q.extent[0], L = q.extent[1], Hq = q.extent[2], dk = q.extent[3], Hkv = k.extent[2], dv = v.extent[3];
    const auto round = [](double x) { return static_cast<double>(T(x)); };
    const auto features = [&](const HostTensor& x) {
        HostTensor f = x;
        for (double& y : f.values) y = round(feature(options.feature_map, y));
        return f;
    };
    const HostTensor fq = features(q), fk = features(k);
    const auto slope = [&](double phi) { return options.feature_map == FeatureMap::identity ? 1.0 : std::min(1.0, phi); };
    const auto zeros = [](const HostTensor& like) { return HostTensor{like.extent, std::vector<double>(like.values.size())}; };
    HostTensor o = zeros(dout), dq = zeros(q), dks = zeros(k), dvs = zeros(v);
    const Index states = cu ? cu->extent[0] - 1 : B;
    const std::vector<Index> of_state{states, Hkv, dk, dv}, of_sum{states, Hkv, dk};
    const auto start = [](const HostTensor* from, const std::vector<Index>& extent) {
        Index n = 1;
        for (const Index e : extent) n *= e;
        return from ? *from : HostTensor{extent, std::vector<double>(static_cast<std::size_t>(n))};
    };
    HostTensor sT = start(s0, of_state), zT = start(z0, of_sum), ds0 = start(dS, of_state), dz0 = start(dz, of_sum);
    for (Index n = 0; n < states; ++n)
        for (Index h = 0; h < Hq; ++h) {
            const Index b = cu ? 0 : n, kv = h / (Hq / Hkv), begin = cu ? static_cast<Index>(cu->values[n]) : 0, end = cu ? static_cast<Index>(cu->values[n + 1]) : L;
            const auto row = [&](Index heads, Index width, Index t, Index head) { return static_cast<std::size_t>(((b * L + t) * heads + head) * width); };
            const auto in_state = [&](Index m, Index x) { return static_cast<std::size_t>(((n * Hkv + kv) * dk + m) * dv + x); };
            const auto in_sum = [&](Index m) { return static_cast<std::size_t>((n * Hkv + kv) * dk + m); };
            const bool first = h % (Hq / Hkv) == 0;
            for (Index i = begin; i < end; ++i) {
                const double* const qi = &fq.values[row(Hq, dk, i, h)];
                const double* const up = dout.values.data() + row(Hq, dv, i, h);
                double* const oi = o.values.data() + row(Hq, dv, i, h);
                std::vector<double> p(static_cast<std::size_t>(i - begin + 1));
                double w = 0.0;
                for (Index m = 0; z0 && m < dk; ++m) w += qi[m] * z0->values[in_sum(m)];
                for (Index j = begin; j <= i; ++j) {
                    for (Index m = 0; m < dk; ++m) p[j - begin] += qi[m] * fk.values[row(Hkv, dk, j, kv) + m];
                    w += p[j - begin];
                }
                std::vector<double> weights;
                for (const double x : p) weights.push_back(round(x));
                const double over = !options.divides() ? 1.0 : w == 0.0 ? 0.0 : 1.0 / w;
                double along = 0.0;
                for (Index x = 0; x < dv; ++x) {
                    for (Index j = begin; j <= i; ++j) oi[x] += weights[j - begin] * v.values[row(Hkv, dv, j, kv) + x];
                    for (Index m = 0; s0 && m < dk; ++m) oi[x] += qi[m] * s0->values[in_state(m, x)];
                    oi[x] *= over;
                    along += round(oi[x]) * round(up[x] * over);
                }
                const double dw = options.divides() ? -along : 0.0;
                for (Index j = begin; j <= i; ++j) {
                    double ds = 0.0;
                    for (Index x = 0; x < dv; ++x) ds += up[x] * v.values[row(Hkv, dv, j, kv) + x];
                    ds = round(ds * over + dw);
                    const double weight = round(p[j - begin] * over);
                    for (Index x = 0; x < dv; ++x) dvs.values[row(Hkv, dv, j, kv) + x] += weight * up[x];
                    for (Index m = 0; m < dk; ++m) {
                        const std::size_t at = row(Hkv, dk, j, kv) + m;
                        dq.values[row(Hq, dk, i, h) + m] += slope(qi[m]) * ds * fk.values[at];
                        dks.values[at] += slope(fk.values[at]) * ds * qi[m];
                    }
                }
                for (Index m = 0; m < dk; ++m) {
                    for (Index x = 0; x < dv; ++x) {
                        if (s0) dq.values[row(Hq, dk, i, h) + m] += slope(qi[m]) * s0->values[in_state(m, x)] * up[x] * over;
                        if (dS) ds0.values[in_state(m, x)] += qi[m] * round(up[x] * over);
                    }
                    if (z0) dq.values[row(Hq, dk, i, h) + m] += slope(qi[m]) * z0->values[in_sum(m)] * dw;
                    if (dz) dz0.values[in_sum(m)] += qi[m] * dw;
                }
            }
            for (Index j = begin; first && j < end; ++j)
                for (Index m = 0; m < dk; ++m) {
                    const std::size_t at = row(Hkv, dk, j, kv) + m;
                    for (Index x = 0; x < dv; ++x) {
                        const double value = v.values[row(Hkv, dv, j, kv) + x];
                        sT.values[in_state(m, x)] += fk.values[at] * value;
                        if (dS) dks.values[at] += slope(fk.values[at]) * dS->values[in_state(m, x)] * value;
                        if (dS) dvs.values[row(Hkv, dv, j, kv) + x] += dS->values[in_state(m, x)] * fk.values[at];
                    }
                    zT.values[in_sum(m)] += fk.values[at];
                    if (dz) dks.values[at] += slope(fk.values[at]) * dz->values[in_sum(m)];
                }
        }
    Case out;
    out.tensors = {{"out.o", o}, {"grad.q", dq}, {"grad.k", dks}, {"grad.v", dvs}, {"out.sT", sT}, {"out.zT", zT}, {"grad.s0", ds0}, {"grad.z0", dz0}};
    return out;
}

/// Against the float64 reference on inputs rounded alike: float64 to 1e-12, float32 to 1e-5, 16 bits by the 16-bit rule.
template <class T>
void expect_close(Checks& checks, const Options& options, const Case& c, RunOptions run = {}) {
    const Case in = rounded<Operator, T, float>(c);
    const auto extent = [&](const char* name, int axis) { return static_cast<int>(in.tensors.at(name).extent[static_cast<std::size_t>(axis)]); };
    char what[200];
    std::snprintf(what, sizeof what, "%s %s B=%d L=%d Hq=%d Hkv=%d dk=%d dv=%d S=%d layout=%d", to_string(dtype_of<T>), describe(options).c_str(), extent("q", 0), extent("q", 1),
                  extent("q", 2), extent("k", 2), extent("q", 3), extent("v", 3), in.tensors.contains("cu_seqlens") ? extent("cu_seqlens", 0) - 1 : -1, static_cast<int>(run.layout));
    Case got, want;
    const Status status = run_case<Operator, T, float>(gpu, options, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, options, in, want);
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    if (!status.ok() || !truth.ok()) return;
    const Case plain = sizeof(T) == 2 ? plain_formula<T>(in, options) : Case{};
    std::string beyond;
    for (const TensorError& e : compare(got, want)) {
        double bound = sizeof(T) == 8 ? 1e-12 : 1e-5;
        if (sizeof(T) == 2) {
            const HostTensor& truth_of = want.tensors.at(e.name);
            const bool stored = e.name == "out.o" || e.name == "grad.q" || e.name == "grad.k" || e.name == "grad.v";
            bound += 2.0 * compare("", plain.tensors.at(e.name), truth_of).relative + (stored ? rounding_floor<T>(truth_of) : 0.0);
        }
        char text[128];
        std::snprintf(text, sizeof text, "%s: %.2e, may be %.2e%s; ", e.name.c_str(), e.relative, bound, e.finite ? "" : ", not finite");
        if (!e.finite || !(e.relative <= bound)) beyond += text;
    }
    checks.expect(beyond.empty() && !want.tensors.empty(), what, beyond.c_str());
}
void every_dtype(Checks& checks, const Options& options, const Case& c, RunOptions run = {}) {
    expect_close<f64>(checks, options, c, run);
    expect_close<f32>(checks, options, c, run);
    expect_close<f16>(checks, options, c, run);
    expect_close<bf16>(checks, options, c, run);
}

void lengths(Checks& checks) {
    for (const Options& options : linear_forms()) {
        for (const Index L : {0, 1, 2, 31, 32, 33, 63, 64, 65, 127, 129, 200})
            every_dtype(checks, options, of_form(options, {.batch = 2, .length = L, .query_heads = 2, .kv_heads = 1, .head_dim = 64, .value_dim = 64}, 3));
        for (const Index L : {511, 512, 513, 1100})
            for (const Index dim : {64, 128}) {
                if (dim == 128 && L != 513) continue;
                const Case c = of_form(options, {.length = L, .query_heads = 1, .kv_heads = 1, .head_dim = dim, .value_dim = dim}, 4);
                expect_close<f32>(checks, options, c);
                expect_close<f16>(checks, options, c);
                expect_close<bf16>(checks, options, c);
            }
        // As many heads as make spans of whole sequences, in a walk through several segments.
        const Case c = of_form(options, {.batch = 2, .length = 600, .query_heads = 56, .kv_heads = 56, .head_dim = 8, .value_dim = 8}, 5);
        expect_close<f32>(checks, options, c);
        expect_close<bf16>(checks, options, c);
    }
}
void dims(Checks& checks) {
    for (const auto& [dk, dv] : std::vector<std::array<Index, 2>>{{2, 1}, {3, 5}, {8, 64}, {64, 8}, {40, 72}, {96, 96}, {128, 64}, {130, 16}, {16, 200}})
        for (const Options& options : linear_forms()) {
            const Case c = of_form(options, {.batch = 2, .length = 70, .query_heads = 4, .kv_heads = 2, .head_dim = dk, .value_dim = dv}, 6);
            for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded}) every_dtype(checks, options, c, {.layout = layout});
        }
    // X of the scan is in memory.
    for (const Options& options : linear_forms())
        expect_close<f32>(checks, options, of_form(options, {.length = 5, .head_dim = 400, .value_dim = 390}, 7));
    for (const auto& [B, L, Hq, Hkv, dk, dv] :
         std::vector<std::array<Index, 6>>{{0, 5, 2, 1, 3, 4}, {2, 0, 2, 1, 3, 4}, {2, 5, 0, 0, 3, 4}, {2, 5, 0, 1, 3, 4}, {2, 5, 2, 1, 0, 4}, {2, 5, 2, 1, 3, 0}})
        for (const Options& options : linear_forms()) {
            const Case c = of_form(options, {.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dk, .value_dim = dv}, 8);
            expect_close<f64>(checks, options, c);
            expect_close<f32>(checks, options, c);
        }
}
/// Sums of thousands keep their dtype's rounding; features of elu1 may vanish; float16 has the range that they need.
void sizes(Checks& checks) {
    for (const double size : {0.0, 1e-4, 10.0}) every_dtype(checks, {}, make({.length = 200, .head_dim = 64, .value_dim = 64, .states = false, .size = size}, 9));
    expect_close<bf16>(checks, {}, make({.length = 200, .head_dim = 64, .value_dim = 64, .states = false, .size = 300.0}, 9));  // beyond float16
    for (const double size : {0.3, 30.0})
        every_dtype(checks, {.feature_map = FeatureMap::elu1}, make({.length = 200, .head_dim = 64, .value_dim = 64, .states = false, .size = size}, 10));
    Case c = make({.length = 90, .states = false}, 11), got;
    for (const char* name : {"q", "k"})
        for (double& x : values(c, name)) x = -200.0;  // exp(-200) is no float: no weights, no output
    checks.expect(run_case<Operator, float, float>(gpu, {.feature_map = FeatureMap::elu1}, c, got).ok(), "no weights", "runs");
    for (const char* name : {"out.o", "grad.q", "grad.k"})
        for (const double x : values(got, name))
            if (x != 0.0) checks.expect(false, name, "must be zero without weights");
    // A key that is no number is in every row's sum.
    c = make({.length = 90, .head_dim = 64, .value_dim = 64, .states = false}, 11);
    values(c, "k")[0] = std::nan("");
    checks.expect(run_case<Operator, bf16, float>(gpu, {.feature_map = FeatureMap::elu1}, c, got).ok(), "NaN", "runs");
    for (const double x : values(got, "out.o"))
        if (!std::isnan(x)) checks.expect(false, "NaN", "must be in every row");
    // One token, whose stride nobody needs.
    c = make({.batch = 2, .length = 1, .head_dim = 64, .value_dim = 64, .states = false}, 11);
    for (const Layout layout : {Layout::reversed, Layout::padded}) every_dtype(checks, {}, c, {.layout = layout});
    expect_close<bf16>(checks, {.feature_map = FeatureMap::elu1}, make({.length = 2500, .head_dim = 64, .value_dim = 64, .states = false}, 12));
    expect_close<f32>(checks, {.feature_map = FeatureMap::elu1}, make({.length = 2500, .head_dim = 64, .value_dim = 64, .states = false}, 12));
}
void packed(Checks& checks) {
    Random r(13);
    for (int i = 0; i < 5; ++i)
        for (const Options& options : linear_forms())
            every_dtype(checks, options,
                        of_form(options, {.length = 300, .query_heads = 4, .kv_heads = 2, .head_dim = i % 2 == 0 ? 64 : 24, .value_dim = 40, .cu_seqlens = r.offsets(300)},
                                14 + static_cast<std::uint64_t>(i)));
    for (const Options& options : linear_forms()) {
        const Case c = of_form(options, {.length = 2300, .query_heads = 2, .kv_heads = 1, .head_dim = 64, .value_dim = 64, .cu_seqlens = {3, 3, 520, 521, 2200, 2290}}, 20);
        expect_close<f32>(checks, options, c);
        expect_close<bf16>(checks, options, c);
    }
    LinearCase s{.length = 200, .query_heads = 2, .kv_heads = 1, .head_dim = 40, .value_dim = 24, .cu_seqlens = {3, 3, 80, 81, 190}};
    expect_margins_unread<Operator>(checks, make(s, 21), {"q", "k", "v", "dout.o"});
    s.states = false;
    for (const auto& bad : std::vector<std::vector<double>>{{0, 30, 20}, {-5, 10}, {0, 201}, {201}}) {
        s.cu_seqlens = bad;
        expect_bad_offsets_reported<Operator>(checks, {}, make(s, 22));
    }
    for (const double at : {0.0, 200.0, 201.0}) {
        s.cu_seqlens = {at};
        expect_zeros_without_sequences<Operator>(checks, {}, make(s, 23), at > 200.0);
    }
}
/// Two calls give the same bits, also in a graph; so does what is before a token that changes.
template <class T>
void determinism(Checks& checks) {
    for (const Options& options : linear_forms()) {
        const LinearCase sizes{.length = 1300, .query_heads = 4, .kv_heads = 2, .head_dim = 64, .value_dim = 64};
        Case c = of_form(options, sizes, 24), first, second, changed;
        checks.expect(run_case<Operator, T, float>(gpu, options, c, first).ok() && run_case<Operator, T, float>(gpu, options, c, second).ok(), "twice", "runs");
        for (const auto& [name, tensor] : first.tensors) checks.expect(tensor.values == second.tensors[name].values, name.c_str(), "two calls must be the same bits");
        in_a_graph<Operator, T>(checks, options, c, of_form(options, sizes, 25));
        for (const char* name : {"q", "k", "v"}) {
            HostTensor& x = c.tensors[name];
            const std::size_t row = x.values.size() / 1300;
            for (std::size_t i = 777 * row; i < x.values.size(); ++i) x.values[i] = -3.0 * x.values[i] + 1.0;
        }
        checks.expect(run_case<Operator, T, float>(gpu, options, c, changed).ok(), "causal", "runs");
        const auto &a = first.tensors["out.o"].values, &b = changed.tensors["out.o"].values;
        const std::size_t n = a.size() / 1300 * 777;
        checks.expect(std::equal(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin()), "out.o", "the future must not change a bit of the past");
    }
}

/// Steps against the reference's whole sequences; in a graph, which is replayed for every token.
template <class T>
void steps(Checks& checks, const Options& options, Index Hq, Index Hkv, Index dk, Index dv) {
    using A = acc_t<T>;
    const Index B = 3, L = 40;
    LinearCase sizes{.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dk, .value_dim = dv, .states = false};
    sizes.positive = options.normalized == Normalized::yes;
    const Case c = rounded<Operator, T, float>(make(sizes, 26));
    Case want;
    checks.expect(run_case<Operator, double, double>(reference{}, options, c, want).ok(), "step", "reference");
    const auto n = [](Index x) { return static_cast<std::size_t>(x); };
    std::vector<T> q(n(B * Hq * dk)), k(n(B * Hkv * dk)), v(n(B * Hkv * dv)), o(n(B * Hq * dv));
    std::vector<A> s(n(B * Hkv * dk * dv)), z(n(B * Hkv * dk));
    OnDevice on(checks);
    const linear_attention::Token<T> token{.q = view<const T>(on(q), {B, Hq, dk}), .k = view<const T>(on(k), {B, Hkv, dk}), .v = view<const T>(on(v), {B, Hkv, dv})};
    linear_attention::State<A> state{.s = view(on(s), {B, Hkv, dk, dv}), .z = {}};
    if (options.divides()) state.z = view(on(z), {B, Hkv, dk});
    const linear_attention::TokenOut<T> out{view(on(o), {B, Hq, dv})};
    Graph graph(checks, "step", [&](const interstate::cuda& recorded) { return step(recorded, options, linear_attention::Params{}, state, token, out, Workspace{}); });
    HostTensor got{{B, L, Hq, dv}, std::vector<double>(n(B * L * Hq * dv))};
    for (Index t = 0; t < L; ++t) {
        const auto fill = [&](const char* name, auto& to, Index width) {
            for (Index b = 0; b < B; ++b)
                for (Index i = 0; i < width; ++i) to[n(b * width + i)] = T(c.tensors.at(name).values[n((b * L + t) * width + i)]);
            on.refill(to);
        };
        fill("q", q, Hq * dk);
        fill("k", k, Hkv * dk);
        fill("v", v, Hkv * dv);
        graph.replay();
        on.bring_back(o);
        for (Index b = 0; b < B; ++b)
            for (Index i = 0; i < Hq * dv; ++i) got.values[n((b * L + t) * Hq * dv + i)] = static_cast<double>(o[n(b * Hq * dv + i)]);
    }
    const HostTensor& truth = want.tensors.at("out.o");
    const TensorError e = compare("o", got, truth);
    const double bound = (sizeof(T) == 8 ? 1e-12 : 1e-5) + (sizeof(T) == 2 ? 1.02 * rounding_floor<T>(truth) : 0.0);
    char text[128];
    std::snprintf(text, sizeof text, "%s Hq=%d dk=%d dv=%d: %.2e, may be %.2e", to_string(dtype_of<T>), static_cast<int>(Hq), static_cast<int>(dk), static_cast<int>(dv), e.relative, bound);
    checks.expect(e.finite && e.relative <= bound, "step", text);
}
void every_step(Checks& checks) {
    for (const Options& options : linear_forms())
        for (const auto& [Hq, Hkv, dk, dv] : std::vector<std::array<Index, 4>>{{2, 2, 64, 64}, {6, 1, 64, 64}, {10, 2, 20, 30}, {1, 1, 7, 5}, {2, 1, 200, 130}}) {
            steps<f64>(checks, options, Hq, Hkv, dk, dv);
            steps<f32>(checks, options, Hq, Hkv, dk, dv);
            steps<f16>(checks, options, Hq, Hkv, dk, dv);
            steps<bf16>(checks, options, Hq, Hkv, dk, dv);
        }
}

void errors(Checks& checks) {
    float x[8] = {};
    const linear_attention::Inputs<float> in{.q = view<const float>(x, {1, 2, 2, 2}), .k = view<const float>(x, {1, 2, 2, 2}), .v = view<const float>(x, {1, 2, 2, 2})};
    const Options elu1{.feature_map = FeatureMap::elu1};
    const Status status = backward(gpu, elu1, in, {}, Saved{}, {.o = view<const float>(x, {1, 2, 2, 2})}, {.q = view(x, {1, 2, 2, 2})}, Workspace{});
    checks.expect(status.code() == StatusCode::workspace_too_small || status.code() == StatusCode::invalid_argument, "saved missing", status.message());
    checks.expect(forward(gpu, {}, {}, linear_attention::Outputs<float>{}, Saved{}, Workspace{}).code() == StatusCode::invalid_argument, "null", "views");
    checks.expect(which_kernel(gpu, {}, linear_attention::Shape{.dtype = DType::bf16, .query_heads = 1, .head_dim = 128, .value_dim = 64}).name == std::string("linear_attention.cuda.chunked"), "kernel", "chunked");
    checks.expect(which_kernel(gpu, {}, linear_attention::Shape{.dtype = DType::f64, .head_dim = 8, .value_dim = 8}).name == std::string("linear_attention.cuda.scan"), "kernel", "scan");
}

void run(Checks& checks, bool quick) {
    if (quick) {
        for (const Options& options : linear_forms()) {
            every_dtype(checks, options, of_form(options, {.length = 70, .query_heads = 2, .kv_heads = 1, .head_dim = 20, .value_dim = 24}, 3));
            const Case c = of_form(options, {.length = 600, .query_heads = 2, .kv_heads = 1, .head_dim = 64, .value_dim = 64, .cu_seqlens = {0, 560, 600}}, 4);
            expect_close<f32>(checks, options, c);
            expect_close<bf16>(checks, options, c);
            expect_close<bf16>(checks, options, of_form(options, {.length = 70, .head_dim = 100, .value_dim = 72}, 5));
            steps<bf16>(checks, options, 6, 2, 20, 24);
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

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "linear_attention", interstate::test::run); }
