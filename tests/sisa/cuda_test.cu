// The cuda executor of SISA against the float64 reference. A plain program: exit 0 passed, 1 failed, 77 skipped (no device).
// --quick runs a few small cases, for compute-sanitizer.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <type_traits>
#include <utility>
#include <vector>

#include <interstate/verify.cuh>
#include <sisa/prelude.cuh>
#include <sisa/reference.hpp>
#include <sisa/sisa.cuh>

#include "../support/cuda_graph.cuh"
#include "../support/cuda_memory.cuh"
#include "../support/cuda_packed.cuh"
#include "prelude_case.hpp"
#include "rounded_formula.hpp"
#include "sisa_cases.hpp"

namespace interstate::test {
namespace {

using sisa::Mode;
using sisa::Operator;
using sisa::Options;
using sisa::Score;

const interstate::cuda gpu;

SisaCase sized(Index length, Index query_heads, Index kv_heads, Index dim, Index state_dim) {
    return {.queries = length, .keys = length, .query_heads = query_heads, .kv_heads = kv_heads, .head_dim = dim, .value_dim = dim,
            .state_dim = state_dim};
}

std::string described(const char* dtype, const Options& options, const Case& c, Layout layout) {
    const auto& q = c.tensors.at("q").extent;
    char what[200];
    std::snprintf(what, sizeof what, "%s %s B=%d Lq=%d Lk=%d Hq=%d Hkv=%d dh=%d dv=%d ds=%d%s layout=%d", dtype, describe(options).c_str(),
                  static_cast<int>(q[0]), static_cast<int>(q[1]), static_cast<int>(c.tensors.at("k").extent[1]), static_cast<int>(q[2]),
                  static_cast<int>(c.tensors.at("k").extent[2]), static_cast<int>(q[3]), static_cast<int>(c.tensors.at("v").extent[3]),
                  c.tensors.contains("C") ? static_cast<int>(c.tensors.at("C").extent[3]) : 0, c.tensors.contains("cu_seqlens") ? " packed" : "",
                  static_cast<int>(layout));
    return what;
}

/// Against the float64 reference on inputs rounded alike, to the size of the terms: float and double to their own rounding, 16-bit
/// storage by the 16-bit rule, with the largest error of four samples, since that of a few numbers may be small by chance, or, what is
/// float, to two roundings of its terms.
template <class T>
void expect_close(Checks& checks, const Case& c, const Options& options = {}, RunOptions run = {}) {
    const Case in = rounded<Operator, T, acc_t<T>>(c);
    const std::string what = described(to_string(dtype_of<T>), options, in, run.layout);
    Case got, want, formulas[4];
    const Status status = run_case<Operator, T, acc_t<T>>(gpu, options, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, options, in, want);
    checks.expect(status.ok(), what.c_str(), status.message());
    checks.expect(truth.ok(), what.c_str(), truth.message());
    if (!status.ok() || !truth.ok()) return;
    if constexpr (sizeof(T) == 2)
        for (int i = 0; i < 4; ++i) formulas[i] = rounded_formula<T>(options, in, 1.0 + 0.19 * i);
    std::string beyond;
    for (const TensorError& e : compare(got, want)) {
        const HostTensor& exact = want.tensors.at(e.name);
        constexpr double roundings = std::is_same_v<T, bf16> ? 2.0 * 0x1p-8 : 2.0 * 0x1p-11;
        double bound = sizeof(T) == 8 ? 1e-11 : sizeof(T) == 4 ? 1e-5 : is_parameter(e.name) ? roundings : 0.0;
        const double own = norm(exact);
        if (own > 0.0) bound *= size_of_terms(in, want, e.name) / own;
        if constexpr (sizeof(T) == 2)
            for (const Case& formula : formulas) bound = std::max(bound, sixteen_bit_bound<T>(e.name, formula, exact));
        char text[128];
        std::snprintf(text, sizeof text, "%s: %.2e, may be %.2e%s; ", e.name.c_str(), e.relative, bound, e.finite ? "" : ", not finite");
        if (!e.finite || !(e.relative <= bound)) beyond += text;
    }
    checks.expect(beyond.empty() && !want.tensors.empty(), what.c_str(), beyond.c_str());
}
void every_dtype(Checks& checks, const Case& c, const Options& options = {}, RunOptions run = {}) {
    expect_close<f64>(checks, c, options, run);
    expect_close<f32>(checks, c, options, run);
    if (options.mode == Mode::exact) expect_close<f16>(checks, c, options, run);  // exp(+-11) C leaves float16's range
    expect_close<bf16>(checks, c, options, run);
}

void lengths(Checks& checks) {
    for (const Index L : {0, 1, 2, 31, 63, 64, 65, 127, 128, 129, 200})
        for (const Index ds : {2, 16}) every_dtype(checks, make(sized(L, 2, 1, 64, ds), 3));
    for (const Index Lq : {1, 30, 64})
        for (const Options& options : all_options()) {
            SisaCase s = sized(150, 4, 2, 32, 8);
            s.queries = Lq;
            s.batch = 2;
            s.softmax = options.score == Score::softmax;
            every_dtype(checks, make(s, 4), options);
        }
}
/// Queries whose tiles begin inside tiles of keys.
void prefill(Checks& checks) {
    for (const Index Lq : {70, 129, 200})
        for (const double half_life : {0.2, 3.0, 100.0}) {
            SisaCase s = sized(300, 4, 2, 64, 16);
            s.queries = Lq;
            s.half_life = half_life;
            every_dtype(checks, make(s, 24));
        }
}
void dims(Checks& checks) {
    for (const auto& [dh, dv, ds] : std::vector<std::array<Index, 3>>{{3, 5, 2}, {64, 64, 32}, {64, 40, 48}, {128, 64, 16}, {100, 128, 64}, {64, 64, 128}, {128, 128, 128}, {130, 16, 4}, {16, 16, 130}, {8, 8, 700}}) {
        SisaCase s = sized(90, 4, 2, dh, ds);
        s.value_dim = dv;
        every_dtype(checks, make(s, 5));
        every_dtype(checks, make(s, 5), {.window = 20}, {.layout = Layout::reversed});
        every_dtype(checks, make(s, 5), {.mode = Mode::published}, {.layout = Layout::padded});
    }
    for (const auto& [B, L, Hq, Hkv, ds] : std::vector<std::array<Index, 5>>{{0, 5, 2, 1, 4}, {2, 5, 0, 2, 4}, {2, 5, 0, 0, 4}, {2, 5, 2, 1, 0}}) {
        SisaCase s = sized(L, Hq, Hkv, 8, ds);
        s.batch = B;
        Case got;
        const Status status = run_case<Operator, f32, float>(gpu, {}, make(s, 8), got);
        checks.expect(status.ok(), "no elements", status.message());
    }
    expect_close<float>(checks, make(sized(70, 2, 1, 64, 0), 9));
}
/// Half-lives from a tenth of a token to a million, with and without hard resets.
void decays(Checks& checks) {
    for (const double half_life : {0.1, 1.0, 10.0, 1e3, 1e6})
        for (const bool resets : {false, true}) {
            SisaCase s = sized(300, 2, 1, 64, 16);
            s.half_life = half_life;
            Case c = make(s, 6);
            if (resets)
                for (std::size_t i = 0; i < c.tensors["log_alpha"].values.size(); i += 37) c.tensors["log_alpha"].values[i] = i % 2 == 0 ? -1000.0 : -INFINITY;
            every_dtype(checks, c);
            every_dtype(checks, c, {.window = 50, .score = Score::sigmoid, .bias = -1.0});
        }
}
void packed(Checks& checks) {
    Random r(12);
    for (int i = 0; i < 4; ++i)
        for (const Options& options : all_options()) {
            SisaCase s = sized(300, 4, 2, i % 2 == 0 ? 64 : 24, i < 2 ? 16 : 6);
            s.cu_seqlens = r.offsets(300);
            s.softmax = options.score == Score::softmax;
            every_dtype(checks, make(s, 13 + static_cast<std::uint64_t>(i)), options);
        }
    SisaCase s = sized(200, 2, 1, 40, 8);
    s.cu_seqlens = {3, 3, 80, 81, 190};
    expect_margins_unread<Operator>(checks, make(s, 14), {"q", "k", "v", "C", "B", "log_alpha", "theta", "dout.o", "dout.lse"});
    for (const auto& bad : std::vector<std::vector<double>>{{0, 30, 20}, {-5, 10}, {0, 201}, {201}}) {
        s.cu_seqlens = bad;
        expect_bad_offsets_reported<Operator>(checks, {}, make(s, 15));
    }
}
/// Two calls are the same bits, and in exact mode nothing that comes later changes a bit of what was before, log_alpha included.
template <class T>
void causality(Checks& checks, const SisaCase& s, const Options& options = {}) {
    const Case c = rounded<Operator, T, acc_t<T>>(make(s, 18));
    const std::string what = described(to_string(dtype_of<T>), options, c, Layout::contiguous);
    const auto results = [&](const Case& in) {
        Case out;
        const Status status = run_case<Operator, T, acc_t<T>>(gpu, options, in, out);
        checks.expect(status.ok(), what.c_str(), status.message());
        return out.tensors;
    };
    const auto first = results(c);
    auto second = results(c);
    for (const auto& [name, tensor] : first) checks.expect(tensor.values == second[name].values, (what + " " + name).c_str(), "two calls must be the same bits");
    // Numbers that are large and of other signs, resets, and no numbers at all; the last in all but v, which weights of 0 multiply.
    for (const int way : {0, 1})
        for (const Index t : {5, 64, 100, 127, 128, 333}) {
            Case later = c;
            for (const char* name : {"q", "k", "v", "C", "B", "log_alpha", "theta"}) {
                HostTensor& x = later.tensors[name];
                const Index length = x.extent[1], from = std::max(t - (s.keys - length), Index{0});
                const std::size_t row = x.values.size() / static_cast<std::size_t>(length);
                for (std::size_t i = static_cast<std::size_t>(from) * row; i < x.values.size(); ++i)
                    x.values[i] = way == 1 && name[0] != 'v'     ? NAN
                                  : name[0] == 'l'               ? (i % 3 == 0 ? -1000.0 : 2.0 * x.values[i])
                                                                 : -3.0 * x.values[i] + 1.0;
            }
            auto changed = results(later);
            for (const char* name : {"out.o", "out.lse"}) {
                if (!first.contains(name)) continue;
                const auto &a = first.at(name).values, &b = changed[name].values;
                const Index rows = std::max(t - (s.keys - s.queries), Index{0});
                const auto n = static_cast<std::ptrdiff_t>(a.size() / static_cast<std::size_t>(s.queries) * static_cast<std::size_t>(rows));
                checks.expect(std::equal(a.begin(), a.begin() + n, b.begin()), (what + " " + name).c_str(), "the future must not change a bit of the past");
            }
        }
}
template <class T>
void causalities(Checks& checks) {
    for (const double half_life : {0.3, 50.0}) {
        SisaCase s = sized(400, 4, 2, 64, 16);
        s.half_life = half_life;
        causality<T>(checks, s);
        s.state_dim = 64;
        causality<T>(checks, s, {.window = 70, .score = Score::sigmoid, .bias = -1.0});
        s.queries = 310;
        causality<T>(checks, s);
        s.queries = 400;
        s.cu_seqlens = {0, 90, 131, 400};
        causality<T>(checks, s);
    }
    causality<T>(checks, sized(400, 2, 1, 20, 6));
}
/// Angles of 65,536 tokens of about a radian each, and sums of log_alpha as long.
void long_sums(Checks& checks) {
    SisaCase s = sized(65536, 1, 1, 4, 4);
    s.half_life = 20.0;
    Case c = make(s, 41);
    for (double& x : c.tensors["theta"].values) x += 1.0;
    every_dtype(checks, c, {.window = 16});
}
/// A lambda of 0, none that attention's scale could divide, and no number where log_alpha is none.
void edges(Checks& checks) {
    const SisaCase s = sized(100, 4, 2, 64, 16);
    for (const double lambda : {0.0, -0.7}) {
        Case c = make(s, 31);
        for (double& x : c.tensors["lam"].values) x = lambda;
        every_dtype(checks, c);
    }
    for (const double scale : {-0.2, 0.002}) every_dtype(checks, make(s, 32), {.scale = scale});
    Case c = make(s, 33), got;
    c.tensors["log_alpha"].values[2 * 50] = NAN;  // token 50 of head 0
    checks.expect(run_case<Operator, bf16, float>(gpu, {}, c, got).ok(), "NaN", "runs");
    const auto& o = got.tensors["out.o"].values;
    for (const Index i : {0, 49, 50, 99})
        for (Index h = 0; h < 4; ++h)
            checks.expect(std::isnan(o[static_cast<std::size_t>((i * 4 + h) * 64)]) == (i >= 50 && h < 2), "NaN", "NaN is what reads it and nothing else");
}

/// eq. 27 and 28 against the reference: more elements than threads, none, packed, and rows of no sequence full of NaN.
template <class T>
void prelude(Checks& checks, Index batch, Index length, std::vector<std::int32_t> cu) {
    PreludeCase<T> want(batch, length, 61);
    want.cu = std::move(cu);
    for (std::size_t i = 0; !want.cu.empty() && i < want.alpha.size(); ++i)
        if (const auto row = static_cast<std::int32_t>(i / 3); row < want.cu.front() || row >= want.cu.back()) want.alpha[i] = T(NAN);
    PreludeCase<T> got = want;
    OnDevice at(checks);
    for (const Status& s : {want.forward(reference{}), want.backward(reference{}), got.forward(gpu, at), got.backward(gpu, at)})
        checks.expect(s.ok(), "prelude", s.message());
    checks.expect(cudaDeviceSynchronize() == cudaSuccess, "prelude", "runs");
    const auto close = [&](const char* what, auto& x, const auto& exact, double rounding) {
        at.bring_back(x);
        double largest = 0.0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double a = static_cast<double>(x[i]), b = static_cast<double>(exact[i]);
            if (!(std::fabs(a - b) <= rounding * std::fabs(b))) largest = std::fmax(largest, std::isnan(a - b) ? INFINITY : std::fabs(a - b));
        }
        char text[80];
        std::snprintf(text, sizeof text, "prelude %s: off by %.2e", what, largest);
        checks.expect(largest == 0.0, to_string(dtype_of<T>), text);
    };
    close("log_alpha", got.log_alpha, want.log_alpha, 1e-14);
    close("lam", got.lam, want.lam, 1e-14);
    // Neighbours of T may be met: both are within one rounding of the same number.
    close("grad.alpha", got.dalpha, want.dalpha, sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 0x1p-23 : std::is_same_v<T, bf16> ? 0x1p-7 : 0x1p-10);
    close("grad.b_alpha", got.db, want.db, 1e-12);
    close("grad.lambda_raw", got.dlambda, want.dlambda, 1e-14);
}
void preludes(Checks& checks) {
    prelude<f64>(checks, 2, 1500, {});
    prelude<f32>(checks, 1, 7, {2, 4, 6});
    prelude<bf16>(checks, 3, 301, {});
    prelude<f16>(checks, 2, 0, {});
}

void run(Checks& checks, bool quick) {
    if (quick) {
        preludes(checks);
        SisaCase s = sized(70, 2, 1, 64, 16);
        s.cu_seqlens = {2, 40, 69};
        every_dtype(checks, make(s, 1));
        every_dtype(checks, make(s, 1), {.mode = Mode::published});
        every_dtype(checks, make(sized(33, 2, 1, 20, 6), 2), {.window = 20, .score = Score::sigmoid, .bias = -1.0}, {.layout = Layout::reversed});
        s = sized(80, 2, 1, 100, 40);
        s.half_life = 0.3;
        every_dtype(checks, make(s, 3));
        return;
    }
    SisaCase published = sized(5, 2, 1, 8, 4);
    Case unused;
    const Status refused = run_case<Operator, f16, float>(gpu, {.mode = Mode::published}, make(published, 1), unused);
    checks.expect(refused.code() == StatusCode::unsupported, "published in float16", refused.message());
    const Status null = forward(gpu, Options{}, sisa::Inputs<float>{}, sisa::Outputs<float>{}, Saved{}, Workspace{});
    checks.expect(null.code() == StatusCode::invalid_argument, "null q", null.message());
    lengths(checks);
    prefill(checks);
    dims(checks);
    decays(checks);
    packed(checks);
    causalities<f32>(checks);
    causalities<f16>(checks);
    causalities<bf16>(checks);
    causality<f64>(checks, sized(400, 2, 1, 8, 4));
    long_sums(checks);
    edges(checks);
    preludes(checks);
    in_a_graph<Operator, bf16>(checks, {}, make(sized(90, 4, 2, 64, 16), 21), make(sized(90, 4, 2, 64, 16), 22));
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "sisa", &interstate::test::run); }
