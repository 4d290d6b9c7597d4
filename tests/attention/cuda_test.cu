// The cuda executor of attention against the float64 reference. A plain program: exit 0 passed, 1 failed, 77 skipped (no
// device). --quick runs a few small cases, for compute-sanitizer.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>

#include <attention/attention.cuh>
#include <attention/reference.hpp>
#include <interstate/verify.cuh>

#include "../support/cases.hpp"
#include "../support/cuda_graph.cuh"
#include "../support/cuda_packed.cuh"

namespace interstate::test {
namespace {

using attention::Operator;
using attention::Options;
using attention::Score;

const interstate::cuda gpu;

struct Sizes {
    Index batch = 1, queries = 0, keys = 0, query_heads = 1, kv_heads = 1, head_dim = 16, value_dim = 16;
    std::vector<double> cu_seqlens{};
    bool bias = false, dlse = true;
    double magnitude = 1.0;  // of q and k
};
Sizes sized(Index length, Index query_heads, Index kv_heads, Index dim) {
    return {.queries = length, .keys = length, .query_heads = query_heads, .kv_heads = kv_heads, .head_dim = dim, .value_dim = dim};
}

Case make(const Sizes& s, const Options& options, std::uint64_t seed) {
    Random r(seed);
    Case c;
    c.tensors["q"] = r.normal({s.batch, s.queries, s.query_heads, s.head_dim}, s.magnitude);
    c.tensors["k"] = r.normal({s.batch, s.keys, s.kv_heads, s.head_dim}, s.magnitude);
    c.tensors["v"] = r.normal({s.batch, s.keys, s.kv_heads, s.value_dim});
    c.tensors["dout.o"] = r.normal({s.batch, s.queries, s.query_heads, s.value_dim});
    if (s.dlse && options.score == Score::softmax) c.tensors["dout.lse"] = r.normal({s.batch, s.queries, s.query_heads});
    if (s.bias) c.tensors["bias"] = r.normal({s.query_heads});
    if (!s.cu_seqlens.empty()) c.tensors["cu_seqlens"] = {{static_cast<Index>(s.cu_seqlens.size())}, s.cu_seqlens};
    return c;
}

attention::Shape shape_of_case(const Case& c, DType dtype) {
    const auto extent = [&](const char* name, int axis) { return c.tensors.at(name).extent[static_cast<std::size_t>(axis)]; };
    return {.dtype = dtype, .batch = extent("q", 0), .queries = extent("q", 1), .keys = extent("k", 1), .query_heads = extent("q", 2),
            .kv_heads = extent("k", 2), .head_dim = extent("q", 3), .value_dim = extent("v", 3),
            .sequences = c.tensors.contains("cu_seqlens") ? extent("cu_seqlens", 0) - 1 : -1};
}

/// The plain formula with weights and score gradients, which are factors of products, rounded to T: what the 16-bit rule
/// compares with. Everything else is exact.
template <class T>
Case plain_formula(const Case& c, const Options& options) {
    const auto tensor = [&](const char* name) -> const HostTensor* {
        const auto found = c.tensors.find(name);
        return found == c.tensors.end() ? nullptr : &found->second;
    };
    const HostTensor &q = *tensor("q"), &k = *tensor("k"), &v = *tensor("v"), &dout = *tensor("dout.o");
    const HostTensor *dlse = tensor("dout.lse"), *bias = tensor("bias"), *cu = tensor("cu_seqlens");
    const Index B = q.extent[0], Lq = q.extent[1], Hq = q.extent[2], dh = q.extent[3], Lk = k.extent[1], Hkv = k.extent[2], dv = v.extent[3];
    const auto round = [](double x) { return static_cast<double>(T(x)); };
    const double scale = attention::scale_of(options, dh);
    Case out;
    const auto zeros = [](const HostTensor& like) { return HostTensor{like.extent, std::vector<double>(like.values.size())}; };
    HostTensor o = zeros(dout), dq = zeros(q), dk = zeros(k), dvs = zeros(v);
    const Index sequences = cu ? cu->extent[0] - 1 : B;
    for (Index n = 0; n < sequences; ++n)
        for (Index h = 0; h < Hq; ++h) {
            const Index b = cu ? 0 : n, kv = h / (Hq / Hkv);
            const Index k0 = cu ? static_cast<Index>(cu->values[n]) : 0, keys = cu ? static_cast<Index>(cu->values[n + 1]) - k0 : Lk;
            const Index q0 = k0, queries = cu ? keys : Lq;
            const auto at = [&](Index length, Index heads, Index width, Index row, Index head) { return static_cast<std::size_t>(((b * length + row) * heads + head) * width); };
            for (Index i = 0; i < queries; ++i) {
                const RowRange read = attention::keys_read(options, i + keys - queries, keys);
                const double* const qi = &q.values[at(Lq, Hq, dh, q0 + i, h)];
                const double* const doi = dout.values.data() + at(Lq, Hq, dv, q0 + i, h);
                double* const oi = o.values.data() + at(Lq, Hq, dv, q0 + i, h);
                std::vector<double> p(static_cast<std::size_t>(keys)), dp(p.size());
                double largest = -INFINITY, sum = 0.0;
                for (Index j = read.begin; j < read.end; ++j) {
                    const double* const kj = &k.values[at(Lk, Hkv, dh, k0 + j, kv)];
                    for (Index d = 0; d < dh; ++d) p[j] += scale * qi[d] * kj[d];
                    largest = std::max(largest, p[j]);
                }
                for (Index j = read.begin; j < read.end; ++j) {
                    p[j] = options.score == Score::softmax ? std::exp(p[j] - largest) : 1.0 / (1.0 + std::exp(-p[j] - (bias ? bias->values[h] : options.bias)));
                    sum += p[j];
                }
                if (options.score == Score::sigmoid) sum = 1.0;
                double delta = 0.0;
                for (Index j = read.begin; j < read.end; ++j) {
                    p[j] /= sum;
                    const double* const vj = v.values.data() + at(Lk, Hkv, dv, k0 + j, kv);
                    for (Index d = 0; d < dv; ++d) {
                        oi[d] += round(p[j]) * vj[d];
                        dp[j] += doi[d] * vj[d];
                        dvs.values[at(Lk, Hkv, dv, k0 + j, kv) + static_cast<std::size_t>(d)] += round(p[j]) * doi[d];
                    }
                }
                for (Index d = 0; d < dv; ++d) delta += round(oi[d]) * doi[d];
                const double up = dlse ? dlse->values[at(Lq, Hq, 1, q0 + i, h)] : 0.0;
                for (Index j = read.begin; j < read.end; ++j) {
                    const double ds = round(options.score == Score::softmax ? p[j] * (dp[j] - delta + up) : p[j] * (1.0 - p[j]) * dp[j]);
                    for (Index d = 0; d < dh; ++d) {
                        dq.values[at(Lq, Hq, dh, q0 + i, h) + static_cast<std::size_t>(d)] += scale * ds * k.values[at(Lk, Hkv, dh, k0 + j, kv) + static_cast<std::size_t>(d)];
                        dk.values[at(Lk, Hkv, dh, k0 + j, kv) + static_cast<std::size_t>(d)] += scale * ds * qi[d];
                    }
                }
            }
        }
    out.tensors = {{"out.o", o}, {"grad.q", dq}, {"grad.k", dk}, {"grad.v", dvs}};
    return out;
}

std::string describe(const char* dtype, const Options& options, const attention::Shape& s, Layout layout = Layout::contiguous) {
    char what[200];
    std::snprintf(what, sizeof what, "%s%s%s window=%d scale=%g B=%d Lq=%d Lk=%d Hq=%d Hkv=%d dh=%d dv=%d S=%d layout=%d", dtype,
                  options.causal ? " causal" : "", options.score == Score::sigmoid ? " sigmoid" : "", static_cast<int>(options.window), options.scale,
                  static_cast<int>(s.batch), static_cast<int>(s.queries), static_cast<int>(s.keys), static_cast<int>(s.query_heads),
                  static_cast<int>(s.kv_heads), static_cast<int>(s.head_dim), static_cast<int>(s.value_dim), static_cast<int>(s.sequences),
                  static_cast<int>(layout));
    return what;
}

/// Against the float64 reference on inputs rounded alike: float64 to 1e-12, float32 to 1e-5, 16 bits by the 16-bit rule. lse is
/// float and a sum of positive terms.
template <class T>
void expect_close(Checks& checks, const Case& c, const Options& options = {}, RunOptions run = {}) {
    const Case in = rounded<Operator, T, float>(c);
    const std::string what = describe(to_string(dtype_of<T>), options, shape_of_case(in, dtype_of<T>), run.layout);
    Case got, want;
    const Status status = run_case<Operator, T, float>(gpu, options, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, options, in, want);
    checks.expect(status.ok(), what.c_str(), status.message());
    checks.expect(truth.ok(), what.c_str(), truth.message());
    if (!status.ok() || !truth.ok()) return;
    const Case plain = sizeof(T) == 2 ? plain_formula<T>(in, options) : Case{};
    std::string beyond;
    for (const TensorError& e : compare(got, want)) {
        double bound = sizeof(T) == 8 ? 1e-12 : 1e-5;
        if (sizeof(T) == 2 && e.name != "out.lse")
            bound = 2.0 * compare("", plain.tensors.at(e.name), want.tensors.at(e.name)).relative + rounding_floor<T>(want.tensors.at(e.name)) + 1e-5;
        char text[128];
        std::snprintf(text, sizeof text, "%s: %.2e, may be %.2e%s; ", e.name.c_str(), e.relative, bound, e.finite ? "" : ", not finite");
        if (!e.finite || !(e.relative <= bound)) beyond += text;
    }
    checks.expect(beyond.empty() && !want.tensors.empty(), what.c_str(), beyond.c_str());
}
void every_dtype(Checks& checks, const Case& c, const Options& options = {}, RunOptions run = {}) {
    expect_close<f64>(checks, c, options, run);
    expect_close<f32>(checks, c, options, run);
    expect_close<f16>(checks, c, options, run);
    expect_close<bf16>(checks, c, options, run);
}

const std::vector<Options>& every_mask() {
    static const std::vector<Options> all = {{.causal = true}, {.causal = false}, {.causal = true, .window = 7}, {.causal = false, .window = 50},
                                             {.causal = true, .window = 1000, .scale = -0.3}};
    return all;
}

void lengths(Checks& checks) {
    for (const Index L : {0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 211}) {
        every_dtype(checks, make(sized(L, 2, 1, 64), {}, 3), {});
        if (L > 0) every_dtype(checks, make(sized(L, 1, 1, 128), {}, 4), {.causal = L % 2 == 0});
    }
    for (const Index Lq : {1, 5, 64, 100})
        for (const Options& options : every_mask()) {
            Sizes s = sized(130, 4, 2, 32);
            s.queries = Lq;
            s.batch = 2;
            every_dtype(checks, make(s, options, 5), options);
        }
    expect_close<bf16>(checks, make(sized(1021, 2, 2, 64), {}, 6));
    expect_close<f32>(checks, make(sized(1021, 2, 2, 64), {}, 6));
}
void dims(Checks& checks) {
    for (const auto& [dh, dv] : std::vector<std::array<Index, 2>>{{1, 1}, {3, 5}, {8, 64}, {64, 8}, {40, 72}, {96, 96}, {80, 128}, {160, 100}, {192, 128},
                                                                  {256, 256}, {257, 16}, {16, 300}}) {
        Sizes s = sized(70, 4, 2, dh);
        s.value_dim = dv;
        every_dtype(checks, make(s, {}, 7));
        every_dtype(checks, make(s, {}, 7), {.causal = false, .window = 20}, {.layout = Layout::reversed});
        every_dtype(checks, make(s, {}, 7), {}, {.layout = Layout::padded});
    }
    for (const auto& [B, L, Hq, Hkv, dh, dv] : std::vector<std::array<Index, 6>>{{0, 5, 2, 1, 8, 8}, {2, 5, 0, 2, 8, 8}, {2, 5, 0, 0, 8, 8}, {2, 5, 2, 1, 0, 8}, {2, 5, 2, 1, 8, 0}}) {
        Sizes s = sized(L, Hq, Hkv, dh);
        s.batch = B;
        s.value_dim = dv;
        if (Hkv > 0 && Hq > 0) every_dtype(checks, make(s, {}, 8));
        Case got;
        const Status status = run_case<Operator, f32, float>(gpu, {}, make(s, {}, 8), got);
        checks.expect(status.ok(), "no elements", status.message());
    }
}
void scores(Checks& checks) {
    for (const Options& options : {Options{.score = Score::sigmoid, .bias = -2.0}, Options{.causal = false, .window = 30, .score = Score::sigmoid, .bias = -4.0}})
        for (const bool bias : {false, true}) {
            Sizes s = sized(100, 4, 2, 48);
            s.bias = bias;
            every_dtype(checks, make(s, options, 9), options);
        }
    // Scores in the thousands: weights of one key or two, and none that overflows.
    for (const double magnitude : {1e-3, 5.0, 30.0}) {
        Sizes s = sized(150, 2, 2, 64);
        s.magnitude = magnitude;
        s.dlse = false;
        expect_close<f64>(checks, make(s, {}, 10));
        expect_close<bf16>(checks, make(s, {}, 10));
        expect_close<f16>(checks, make(s, {}, 10));
        if (magnitude < 10.0) expect_close<f32>(checks, make(s, {}, 10));
    }
    // Small and large gradients, which float16 has no range for.
    for (const double size : {1e-6, 1e3}) {
        Case c = make(sized(200, 2, 1, 64), {}, 11);
        for (double& x : c.tensors["dout.o"].values) x *= size;
        for (double& x : c.tensors["dout.lse"].values) x *= size;
        expect_close<bf16>(checks, c);
        if (size > 1.0)
            for (double& x : c.tensors["k"].values) x *= 1e-3;
        expect_close<f16>(checks, c);
    }
    // A gradient of lse that is more than float16 holds.
    Case c = make(sized(200, 2, 1, 64), {}, 11);
    for (double& x : c.tensors["dout.lse"].values) x *= 1e5;
    for (const char* name : {"q", "k"})
        for (double& x : c.tensors[name].values) x *= 1e-2;
    expect_close<f16>(checks, c);
}
void packed(Checks& checks) {
    Random r(12);
    for (int i = 0; i < 6; ++i)
        for (const Options& options : every_mask()) {
            Sizes s = sized(300, 4, 2, i % 2 == 0 ? 64 : 24);
            s.cu_seqlens = r.offsets(300);
            every_dtype(checks, make(s, options, 13 + static_cast<std::uint64_t>(i)), options);
        }
    Sizes s = sized(200, 2, 1, 40);
    s.cu_seqlens = {3, 3, 80, 81, 190};
    expect_margins_unread<Operator>(checks, make(s, {}, 14), {"q", "k", "v", "dout.o", "dout.lse"});
    for (const auto& bad : std::vector<std::vector<double>>{{0, 30, 20}, {-5, 10}, {0, 201}, {201}}) {
        s.cu_seqlens = bad;
        expect_bad_offsets_reported<Operator>(checks, {}, make(s, {}, 15));
    }
    for (const double at : {0.0, 200.0, 201.0}) {
        s.cu_seqlens = {at};
        expect_zeros_without_sequences<Operator>(checks, {}, make(s, {}, 16), at > 200.0);
    }
    // NaN in one sequence stays there.
    s.cu_seqlens = {0, 70, 140, 200};
    Case c = make(s, {}, 17), clean, dirty;
    checks.expect(run_case<Operator, bf16, float>(gpu, {}, c, clean).ok(), "neighbours", "clean");
    for (const char* name : {"q", "k", "v", "dout.o"}) {
        HostTensor& x = c.tensors[name];
        const std::size_t row = x.values.size() / 200;
        for (std::size_t i = 70 * row; i < 140 * row; ++i) x.values[i] = std::nan("");
    }
    checks.expect(run_case<Operator, bf16, float>(gpu, {}, c, dirty).ok(), "neighbours", "dirty");
    for (const auto& [name, tensor] : clean.tensors) {
        const std::size_t row = tensor.values.size() / 200;
        bool same = true;
        for (std::size_t i = 0; i < tensor.values.size(); ++i)
            if (i < 70 * row || i >= 140 * row) same = same && tensor.values[i] == dirty.tensors[name].values[i];
        checks.expect(same, name.c_str(), "NaN in a sequence must not reach its neighbours");
    }
}

/// Two calls give the same bits; so do results when what lies behind a token changes (causal).
void determinism(Checks& checks) {
    Case c = make(sized(600, 4, 2, 64), {}, 18), first, second, changed;
    checks.expect(run_case<Operator, bf16, float>(gpu, {}, c, first).ok() && run_case<Operator, bf16, float>(gpu, {}, c, second).ok(), "twice", "runs");
    for (const auto& [name, tensor] : first.tensors) checks.expect(tensor.values == second.tensors[name].values, name.c_str(), "two calls must be the same bits");
    for (const char* name : {"q", "k", "v"}) {
        HostTensor& x = c.tensors[name];
        const std::size_t row = x.values.size() / 600;
        for (std::size_t i = 333 * row; i < x.values.size(); ++i) x.values[i] = -3.0 * x.values[i] + 1.0;
    }
    checks.expect(run_case<Operator, bf16, float>(gpu, {}, c, changed).ok(), "causal", "runs");
    for (const char* name : {"out.o", "out.lse"}) {
        const auto &a = first.tensors[name].values, &b = changed.tensors[name].values;
        const std::size_t n = a.size() / 600 * 333;
        checks.expect(std::equal(a.begin(), a.begin() + static_cast<std::ptrdiff_t>(n), b.begin()), name, "the future must not change a bit of the past");
    }
}

/// A guest that adds to scores: slope times distance, as in arXiv 2108.12409.
struct Alibi : attention::detail::Plain {
    static constexpr bool adds_term = true;
    float slope;
    __device__ float score_term(int head, int query_position, int key_position) const {
        return -slope / static_cast<float>(head + 1) * static_cast<float>(query_position > key_position ? query_position - key_position : key_position - query_position);
    }
};
/// What a policy adds, an extra channel of q and k can say too: q.k + slope (j - i) is causal ALiBi.
template <class T>
void policies(Checks& checks) {
    const Index L = 150, H = 2, dim = 32;
    Case c = make(sized(L, H, H, dim), {}, 19);
    const Options options{.scale = 0.2};
    Case wide = c;
    for (const char* name : {"q", "k"}) {
        HostTensor x{{1, L, H, dim + 2}, {}};
        for (Index i = 0; i < L; ++i)
            for (Index h = 0; h < H; ++h) {
                const auto from = c.tensors[name].values.begin() + (i * H + h) * dim;
                x.values.insert(x.values.end(), from, from + dim);
                const double slope = 0.05 / static_cast<double>(h + 1) / 0.2;
                const bool is_q = name[0] == 'q';
                x.values.push_back(is_q ? slope : static_cast<double>(i));
                x.values.push_back(is_q ? -slope * static_cast<double>(i) : 1.0);
            }
        wide.tensors[name] = x;
    }
    // Truth for what T makes of the inputs, in float64.
    const Case in = rounded<Operator, T, float>(c);
    for (const char* name : {"q", "k"})
        for (Index row = 0; row < L * H; ++row)
            for (Index d = 0; d < dim; ++d) wide.tensors[name].values[row * (dim + 2) + d] = in.tensors.at(name).values[row * dim + d];
    for (const char* name : {"v", "dout.o", "dout.lse"}) wide.tensors[name] = in.tensors.at(name);
    Case want;
    checks.expect(run_case<Operator, double, double>(reference{}, options, wide, want).ok(), "policy", "reference");

    interstate::detail::Tensors<interstate::cuda> memory(gpu, Layout::contiguous, std::numeric_limits<std::size_t>::max());
    std::vector<std::string> seen;
    attention::Inputs<T> inputs{};
    attention::Upstream<T> upstream{};
    interstate::detail::Upload<interstate::cuda> upload{memory, in, "", true, false, &seen, {}};
    visit(inputs, attention::Shape{}, upload);
    const auto shape = shape_of(inputs);
    interstate::detail::Upload<interstate::cuda> upload_upstream{memory, in, "dout.", true, false, &seen, {}};
    visit(upstream, shape, upload_upstream);
    attention::Outputs<T> out{};
    attention::Grads<T> grads{};
    const auto all = [](const char*) { return true; };
    interstate::detail::Allocate<interstate::cuda, decltype(all)> allocate{memory, all, {}};
    visit(out, shape, allocate);
    visit(grads, shape, allocate);
    Workspace ws{nullptr, workspace_size(gpu, options, shape, pass::backward)};
    checks.expect(memory.scratch("workspace", ws.size, ws.data).ok() && allocate.status.ok() && upload.status.ok(), "policy", "memory");
    Status s = forward(gpu, options, inputs, out, Saved{}, Workspace{}, Alibi{{}, 0.05f});
    checks.expect(s.ok(), "policy", s.message());
    s = backward(gpu, options, inputs, out, Saved{}, upstream, grads, ws, Alibi{{}, 0.05f});
    checks.expect(s.ok(), "policy", s.message());
    Case got;
    interstate::detail::Download<interstate::cuda> download{memory, "out.", got, {}}, download_grads{memory, "grad.", got, {}};
    visit(out, shape, download);
    visit(grads, shape, download_grads);
    for (const char* name : {"out.o", "out.lse", "grad.q", "grad.k", "grad.v"}) {
        HostTensor truth = want.tensors.at(name);
        if (truth.extent.size() == 4 && truth.extent[3] == dim + 2) {
            HostTensor cut{{1, L, H, dim}, {}};
            for (Index row = 0; row < L * H; ++row) {
                const auto from = truth.values.begin() + row * (dim + 2);
                cut.values.insert(cut.values.end(), from, from + dim);
            }
            truth = cut;
        }
        const TensorError e = compare(name, got.tensors.at(name), truth);
        const double bound = sizeof(T) == 8 ? 1e-7 : 6e-3;  // the policy is float
        checks.expect(e.finite && e.relative <= bound, name, ("a policy's term, error " + std::to_string(e.relative)).c_str());
    }
}

void refusals(Checks& checks) {
    const Status s = forward(gpu, Options{}, attention::Inputs<float>{}, attention::Outputs<float>{}, Saved{}, Workspace{});
    checks.expect(s.code() == StatusCode::invalid_argument, "null q", s.message());
    float x[64] = {};
    const auto rows = view(static_cast<const float*>(x), {1, 4, 1, 16});
    const attention::Inputs<float> in{.q = rows, .k = rows, .v = rows};
    const attention::Outputs<float> out{.o = view(x, {1, 4, 1, 16}), .lse = view(x, {1, 4, 1})};
    const Status small = backward(gpu, Options{}, in, out, Saved{}, attention::Upstream<float>{.o = rows}, attention::Grads<float>{.q = view(x, {1, 4, 1, 16})}, Workspace{x, 16});
    checks.expect(small.code() == StatusCode::workspace_too_small, "workspace", small.message());
}

void run(Checks& checks, bool quick) {
    const Options sigmoid{.causal = false, .window = 20, .score = Score::sigmoid, .bias = -1.0};
    if (quick) {
        Sizes s = sized(70, 2, 1, 64);
        s.cu_seqlens = {2, 40, 69};
        every_dtype(checks, make(s, {}, 1));
        every_dtype(checks, make(sized(33, 2, 1, 20), sigmoid, 2), sigmoid, {.layout = Layout::reversed});
        every_dtype(checks, make(sized(20, 1, 1, 128), {}, 3), {});
        every_dtype(checks, make(sized(20, 1, 1, 200), {}, 3), {});
        policies<bf16>(checks);
        return;
    }
    refusals(checks);
    lengths(checks);
    dims(checks);
    scores(checks);
    packed(checks);
    determinism(checks);
    policies<f64>(checks);  // the simple kernels
    policies<bf16>(checks);
    for (const Options& options : {Options{}, sigmoid}) {
        Sizes s = sized(90, 4, 2, 64);
        in_a_graph<Operator, bf16>(checks, options, make(s, options, 21), make(s, options, 22));
        in_a_graph<Operator, f16>(checks, options, make(s, options, 21), make(s, options, 22));
    }
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "attention", &interstate::test::run); }
