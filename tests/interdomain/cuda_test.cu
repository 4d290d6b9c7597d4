// The cuda executor of Interdomain Attention against the float64 reference. A plain program, because it also runs on
// GPU machines that have no GoogleTest: exit 0 passed, 1 failed, 77 skipped (no device). --quick runs a few small
// cases, for compute-sanitizer.
#include <array>
#include <complex>
#include <cstdio>
#include <cstring>
#include <limits>

#include <interdomain/interdomain.cuh>
#include <interdomain/reference.hpp>
#include <interstate/verify.cuh>

#include "../support/cuda_graph.cuh"
#include "../support/cuda_packed.cuh"
#include "interdomain_cases.hpp"

namespace interstate::test {
namespace {

using interdomain::Discretization;
using interdomain::Method;
using interdomain::Normalizer;
using interdomain::Operator;
using interdomain::Options;
using interdomain::Readout;
using interdomain::Shape;

const interstate::cuda gpu;

Shape shape_of_case(const Case& c, DType dtype) {
    const auto extent = [&](const char* name, int axis) { return c.tensors.at(name).extent[static_cast<std::size_t>(axis)]; };
    return {.dtype = dtype, .batch = extent("q", 0), .length = extent("q", 1), .query_heads = extent("q", 2),
            .kv_heads = extent("k", 2), .features = extent("q", 3), .value_dim = extent("v", 3), .modes = extent("im", 1),
            .sequences = c.tensors.contains("cu_seqlens") ? extent("cu_seqlens", 0) - 1 : -1};
}

bool has_kernel(Options options, Method method, const Shape& shape) {
    options.method = method;
    return *which_kernel(gpu, options, shape).name != '\0';
}

/// What rounding the exact tensor to what it is stored in costs; not finite where it is beyond that type's range.
template <class T, class P>
TensorError stored(const std::string& name, const HostTensor& want) {
    const auto rounded_to = [&]<class E>(E) {
        HostTensor got = want;
        for (double& x : got.values) x = static_cast<double>(E(x));
        return compare(name, got, want);
    };
    if (name == "out.o" || name == "grad.q" || name == "grad.k" || name == "grad.v") return rounded_to(T(0.0f));
    if (name.ends_with("xT") || name.ends_with("x0") || name.ends_with("etaT") || name.ends_with("eta0"))
        return rounded_to(acc_t<T>(0));
    return rounded_to(P(0));
}

constexpr Method methods[] = {Method::scan, Method::chunked, Method::parallel_scan};

/// How far a tensor may be from its float64 truth on inputs rounded alike, beside the rounding of what is stored. The
/// scan computes in float64 whatever the storage. The chunked kernels round the factors of their products, bfloat16 to its
/// own 8 bits, the other 16-bit type to 11: twice that (the 16-bit rule, which sixteen_bit_rule holds where the plain formula is
/// known), and as much again for each of the two more products that a gradient of a state or a parameter passes through.
template <class T>
double computed_tolerance(const Options& options, Method method, const std::string& name) {
    // den changes sign, and what is divided by it has no bound of its own.
    const double conditioned = options.normalized() ? 1e4 : 1.0;
    // Sums over tokens whose terms cancel.
    const double cancelled = name == "grad.log_dt" || name == "grad.log_neg_re" || name == "grad.im" ? 10.0 : 1.0;
    if (method == Method::scan || sizeof(T) == 8) return 1e-12 * conditioned * cancelled;
    if (std::is_same_v<T, float>) return 1e-5 * cancelled;
    return (std::is_same_v<T, bf16> ? 0x1p-9 : 0x1p-12) * 2.0 * 3.0 * cancelled;
}

/// How far results move when every row of q, k, v and dout.o is scaled by 1 +- the rounding of a factor: what sums of terms that
/// cancel cannot be held to more closely, whatever computes them with rounded factors.
template <class T>
Case moved_by_rounding(Case in, const Options& options, RunOptions run) {
    Random r(77);
    const double rounding = std::is_same_v<T, bf16> ? 0x1p-9 : 0x1p-12;
    for (const char* name : {"q", "k", "v", "dout.o"}) {
        HostTensor& t = in.tensors.at(name);
        const std::size_t width = static_cast<std::size_t>(t.extent[3]), rows = width > 0 ? t.values.size() / width : 0;
        const HostTensor signs = r.uniform({static_cast<Index>(rows)}, -1.0, 1.0);
        for (std::size_t i = 0; i < rows * width; ++i) t.values[i] *= signs.values[i / width] < 0.0 ? 1.0 - rounding : 1.0 + rounding;
    }
    Case moved;
    if (!run_case<Operator, double, double>(reference{}, options, in, moved, run).ok()) moved = {};
    return moved;
}

/// Makes a normalised case and its options those of the plain readout, whose results are the numerators.
inline void without_normalizer(Case& c, Options& options) {
    options.normalizer = Normalizer::none;
    c.tensors.erase("eta0");
    c.tensors.erase("dout.etaT");
}

/// With a normaliser gradients are differences of what comes from numerators and from denominators (eq. 11), nearly equal where
/// outputs hardly vary. These are the gradients of the numerators: dout / den into the plain readout.
inline Case gradients_of_numerators(Case in, Options options, RunOptions run, const Case& want) {
    without_normalizer(in, options);
    Case plain, terms;
    if (!run_case<Operator, double, double>(reference{}, options, in, plain, run).ok()) return {};
    HostTensor& up = in.tensors.at("dout.o");
    for (std::size_t i = 0; i < up.values.size(); ++i) {
        const double num = plain.tensors.at("out.o").values[i], o = want.tensors.at("out.o").values[i];
        up.values[i] = num != 0.0 ? up.values[i] * o / num : 0.0;
    }
    if (!run_case<Operator, double, double>(reference{}, options, in, terms, run).ok()) return {};
    return terms;
}
/// The error of outputs where the denominator is at least 0.3 of its root mean square, whatever it is elsewhere.
inline double error_of_safe_quotients(Case in, Options options, RunOptions run, const HostTensor& want, const HostTensor& got) {
    without_normalizer(in, options);
    Case plain;
    if (!run_case<Operator, double, double>(reference{}, options, in, plain, run).ok()) return INFINITY;
    const std::vector<double>& num = plain.tensors.at("out.o").values;
    std::vector<double> den(num.size());
    double mean = 0.0, wrong = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < num.size(); ++i) {
        den[i] = want.values[i] != 0.0 ? num[i] / want.values[i] : 0.0;
        mean += den[i] * den[i] / static_cast<double>(num.size());
    }
    for (std::size_t i = 0; i < num.size(); ++i) {
        if (den[i] * den[i] < 0.09 * mean || mean == 0.0) continue;
        wrong += (got.values[i] - want.values[i]) * (got.values[i] - want.values[i]);
        norm += want.values[i] * want.values[i];
    }
    return norm > 0.0 ? std::sqrt(wrong / norm) : wrong;
}
double norm_of(const HostTensor& t) {
    double sum = 0.0;
    for (const double x : t.values) sum += x * x;
    return std::sqrt(sum);
}

/// Every method that has a kernel, against one run of the reference. With a normaliser whose denominator is not
/// `conditioned`, chunks are held to their states, and to outputs where it is not small.
template <class T, class P>
void expect_close(Checks& checks, const Case& c, Options options = {}, RunOptions run = {}, bool conditioned = false) {
    const Case in = rounded<Operator, T, P>(c);
    const Shape s = shape_of_case(in, dtype_of<T>);
    Case want;
    const Status truth = run_case<Operator, double, double>(reference{}, options, in, want, run);
    checks.expect(truth.ok(), "reference", truth.message());
    for (const Method method : methods) {
        if (!has_kernel(options, method, s)) continue;
        if (method == Method::scan && s.length > 10000) continue;  // minutes, and it has no slices
        options.method = method;
        char what[160];
        std::snprintf(what, sizeof what, "%s %s%s%s%s B=%d L=%d Hq=%d Hkv=%d R=%d d=%d M=%d", to_string(method),
                      to_string(dtype_of<T>), options.disc == Discretization::raw ? " raw" : "",
                      options.readout == Readout::real_parts ? " real_parts" : "", options.normalized() ? " normalised" : "",
                      static_cast<int>(s.batch), static_cast<int>(s.length), static_cast<int>(s.query_heads),
                      static_cast<int>(s.kv_heads), static_cast<int>(s.features), static_cast<int>(s.value_dim),
                      static_cast<int>(s.modes));
        Case got;
        const Status status = run_case<Operator, T, P>(gpu, options, in, got, run);
        checks.expect(status.ok(), what, status.message());
        if (!status.ok()) continue;
        const bool quotients_are_free = options.normalized() && method != Method::scan && !conditioned;
        std::string beyond;
        const auto errors = compare(got, want);
        if (errors.empty()) beyond = "nothing compared";
        Case moved, terms;
        if (quotients_are_free) {
            const double error = error_of_safe_quotients(in, options, run, want.tensors.at("out.o"), got.tensors.at("out.o"));
            const double limit = 10.0 * (computed_tolerance<T>(options, method, "out.o") + stored<T, P>("out.o", want.tensors.at("out.o")).relative);
            if (!(error <= limit)) beyond += "out.o where denominators are safe: " + std::to_string(error) + ", may be " + std::to_string(limit) + "; ";
        }
        for (const TensorError& e : errors) {
            if (quotients_are_free && e.name != "out.xT" && e.name != "out.etaT") continue;
            const TensorError storage = stored<T, P>(e.name, want.tensors.at(e.name));
            if (!storage.finite) continue;  // a small denominator leads beyond float16
            if (!e.finite) {
                beyond += e.name + ": not finite, or of another shape; ";
                continue;
            }
            const double bound = computed_tolerance<T>(options, method, e.name) + 1.02 * storage.relative;
            // What is below the range of float may come out as zero.
            const bool vanishes = sizeof(T) < 8 && e.largest < 1e-37;
            if (e.relative <= bound || vanishes) continue;
            double limit = bound;
            if (options.normalized() && method != Method::scan && e.name.starts_with("grad.")) {
                if (terms.tensors.empty()) terms = gradients_of_numerators(in, options, run, want);
                if (terms.tensors.contains(e.name)) limit *= std::max(1.0, norm_of(terms.tensors.at(e.name)) / norm_of(want.tensors.at(e.name)));
            }
            if (sizeof(T) == 2 && method != Method::scan) {
                if (moved.tensors.empty()) moved = moved_by_rounding<T>(in, options, run);
                if (moved.tensors.contains(e.name)) limit += 3.0 * compare(e.name, moved.tensors.at(e.name), want.tensors.at(e.name)).relative;
            }
            char text[128];
            std::snprintf(text, sizeof text, "%s: %.2e, may be %.2e; ", e.name.c_str(), e.relative, limit);
            if (!(e.relative <= limit)) beyond += text;
        }
        checks.expect(beyond.empty(), what, beyond.c_str());
    }
}

void every_dtype(Checks& checks, const Case& c, Options options = {}, RunOptions run = {}, bool conditioned = false) {
    expect_close<f64, double>(checks, c, options, run, conditioned);
    expect_close<f32, float>(checks, c, options, run, conditioned);
    expect_close<f16, float>(checks, c, options, run, conditioned);
    expect_close<bf16, float>(checks, c, options, run, conditioned);
}

/// Real modes and states, C the identity and positive q and k: a denominator that stays away from zero.
Case well_conditioned(Case c, std::uint64_t seed) {
    Random r(seed);
    auto& t = c.tensors;
    for (double& x : t["im"].values) x = 0.0;
    for (std::size_t i = 0; i < t["B"].values.size(); ++i) t["B"].values[i] = i % 2 == 0 ? 1.0 : 0.0;
    const Index M = t["C"].extent[1];
    for (std::size_t i = 0; i < t["C"].values.size(); ++i) {
        const Index at = static_cast<Index>(i) / 2 % (M * M);
        t["C"].values[i] = i % 2 == 0 && at / M == at % M ? 1.0 : 0.0;
    }
    for (const char* name : {"q", "k"}) t[name] = r.uniform(t[name].extent, 0.2, 1.0);
    for (const char* name : {"x0", "eta0"})
        if (t.contains(name))
            for (std::size_t i = 0; i < t[name].values.size(); ++i) t[name].values[i] = i % 2 == 0 ? std::abs(t[name].values[i]) : 0.0;
    return c;
}

/// The quadratic form with the operands of every product rounded to T, and exact otherwise: what the 16-bit rule
/// compares with. No initial state, one batch row and as many query as key/value heads.
template <class T>
Case plain_formula(const Case& c, const Options& options) {
    using C64 = std::complex<double>;
    const auto real = [](double x) { return static_cast<double>(T(x)); };
    const auto pair = [&](C64 z) { return C64{real(z.real()), real(z.imag())}; };
    const Shape s = shape_of_case(c, dtype_of<T>);
    const auto L = static_cast<std::size_t>(s.length), H = static_cast<std::size_t>(s.kv_heads);
    const auto R = static_cast<std::size_t>(s.features), d = static_cast<std::size_t>(s.value_dim), M = static_cast<std::size_t>(s.modes);
    const auto& q = c.tensors.at("q").values;
    const auto& k = c.tensors.at("k").values;
    const auto& v = c.tensors.at("v").values;
    const auto& up = c.tensors.at("dout.o").values;
    Case results;
    for (const auto& [result, like] : {std::pair{"out.o", "dout.o"}, {"grad.q", "q"}, {"grad.k", "k"}, {"grad.v", "v"}})
        results.tensors[result] = {c.tensors.at(like).extent, std::vector<double>(c.tensors.at(like).values.size())};
    std::vector<double>&o = results.tensors["out.o"].values, &dq = results.tensors["grad.q"].values;
    std::vector<double>&dk = results.tensors["grad.k"].values, &dv = results.tensors["grad.v"].values;
    for (std::size_t h = 0; h < H; ++h) {
        std::vector<C64> table(L * M), C(M * M);
        for (std::size_t m = 0; m < M; ++m) {
            const double dt = std::exp(c.tensors.at("log_dt").values[h]);
            const C64 A{-std::exp(c.tensors.at("log_neg_re").values[h * M + m]), c.tensors.at("im").values[h * M + m]};
            const auto& B = c.tensors.at("B").values;
            C64 Bbar{B[2 * (h * M + m)], B[2 * (h * M + m) + 1]};
            if (options.disc == Discretization::zoh) Bbar *= (std::exp(dt * A) - 1.0) / A;
            for (std::size_t n = 0; n < L; ++n) table[n * M + m] = pair(std::exp(static_cast<double>(n) * dt * A) * Bbar);
            for (std::size_t n = 0; n < M; ++n) {
                const auto& values = c.tensors.at("C").values;
                const std::size_t at = 2 * ((h * M + m) * M + n);
                C[m * M + n] = pair({values[at], values[at + 1]});
            }
        }
        const auto at = [&](std::size_t t, std::size_t n, std::size_t j) { return (t * H + h) * n + j; };
        const bool real_parts = options.readout == Readout::real_parts;
        // The table of Re(w[t] Lam^(t-s) Bbar), from rows x . y.
        const auto weights = [&](const std::vector<double>& x, const std::vector<double>& y, std::size_t n) {
            std::vector<double> P(L * L);
            for (std::size_t t = 0; t < L; ++t) {
                std::vector<C64> a(M), sum(M), w(M);
                for (std::size_t from = 0; from <= t; ++from) {
                    double product = 0.0;
                    for (std::size_t j = 0; j < n; ++j) product += x[at(t, n, j)] * y[at(from, n, j)];
                    product = real(product);
                    for (std::size_t m = 0; m < M; ++m) a[m] += product * table[(t - from) * M + m];
                }
                for (C64& z : a) z = pair(z);
                for (std::size_t m = 0; m < M; ++m) {
                    for (std::size_t j = 0; j < M; ++j) sum[m] += C[m * M + j] * a[j];
                    sum[m] = pair(real_parts ? C64{2.0 * sum[m].real()} : sum[m]);
                }
                for (std::size_t j = 0; j < M; ++j) {
                    for (std::size_t m = 0; m < M; ++m) w[j] += (real_parts ? 2.0 : 1.0) * C[m * M + j] * sum[m];
                    w[j] = pair(w[j]);
                }
                for (std::size_t from = 0; from <= t; ++from) {
                    double weight = 0.0;
                    for (std::size_t m = 0; m < M; ++m) weight += (w[m] * table[(t - from) * M + m]).real();
                    P[t * L + from] = real(weight);
                }
            }
            return P;
        };
        const std::vector<double> P = weights(q, k, R), Q = weights(up, v, d);
        for (std::size_t t = 0; t < L; ++t)
            for (std::size_t from = 0; from <= t; ++from) {
                for (std::size_t j = 0; j < d; ++j) {
                    o[at(t, d, j)] += P[t * L + from] * v[at(from, d, j)];
                    dv[at(from, d, j)] += P[t * L + from] * up[at(t, d, j)];
                }
                for (std::size_t j = 0; j < R; ++j) {
                    dq[at(t, R, j)] += Q[t * L + from] * k[at(from, R, j)];
                    dk[at(from, R, j)] += Q[t * L + from] * q[at(t, R, j)];
                }
            }
    }
    return results;
}

/// The 16-bit rule: at most twice the error of the plain formula, beside the rounding of what is stored.
template <class T>
void sixteen_bit_rule(Checks& checks, Index L, Index size, Index M, const Options& readout, std::uint64_t seed) {
    Options options = readout;
    Case c = make({.length = L, .query_heads = 2, .kv_heads = 2, .features = size, .value_dim = size, .modes = M,
                   .initial_state = false}, seed);
    c.tensors.erase("dout.xT");
    c = rounded<Operator, T, float>(c);
    options.method = Method::chunked;
    if (!has_kernel(options, Method::chunked, shape_of_case(c, dtype_of<T>))) return;
    Case got, want;
    bool ok = run_case<Operator, T, float>(gpu, options, c, got).ok();
    ok = ok && run_case<Operator, double, double>(reference{}, options, c, want).ok();
    checks.expect(ok, "16-bit rule", "runs");
    if (!ok) return;
    for (const auto& [name, plain] : plain_formula<T>(c, options).tensors) {
        const HostTensor& exact = want.tensors.at(name);
        const double ours = compare(name, got.tensors.at(name), exact).relative;
        const double allowed = 2.0 * compare(name, plain, exact).relative + 1.02 * rounding_floor<T>(exact);
        char text[128];
        std::snprintf(text, sizeof text, "%s %s L=%d M=%d: error %.2e, allowed %.2e", to_string(dtype_of<T>), name.c_str(),
                      static_cast<int>(L), static_cast<int>(M), ours, allowed);
        checks.expect(ours <= allowed, "16-bit rule", text);
    }
}

/// Overwrites the rows of a tensor (1, L, ...) for which `which` holds.
template <class Which>
void poison_rows(Case& c, const char* name, Which&& which) {
    HostTensor& t = c.tensors.at(name);
    const std::size_t row = t.values.size() / static_cast<std::size_t>(t.extent[1]);
    for (std::size_t i = 0; i < t.values.size(); ++i)
        if (which(static_cast<Index>(i / row))) t.values[i] = std::nan("");
}

void packed_with_bad_offsets(Checks& checks, bool quick) {
    const InterdomainCase sizes{.query_heads = 4, .kv_heads = 2, .features = 6, .value_dim = 10, .modes = 8};
    // NaN in the margins, of inputs and of dout.
    InterdomainCase o = sizes;
    o.length = quick ? 40 : 420;
    o.cu_seqlens = quick ? std::vector<double>{3, 3, 20, 21, 36} : std::vector<double>{3, 3, 40, 41, 300, 300, 410};
    const Index first = 3, last = static_cast<Index>(o.cu_seqlens.back());
    Case c = make(o, 4);
    for (const char* name : {"q", "k", "v", "dout.o"}) poison_rows(c, name, [&](Index t) { return t < first || t >= last; });
    every_dtype(checks, c);
    if (quick) return;
    // Margins of several chunks, and sequences that begin at none of their boundaries.
    o.length = 700;
    o.cu_seqlens = {290, 290, 355, 356, 560};
    for (const Index size : {16, 64, 66}) {
        InterdomainCase wide = o;
        wide.features = wide.value_dim = wide.modes = size;
        Case margins = make(wide, 5);
        for (const char* name : {"q", "k", "v", "dout.o"}) poison_rows(margins, name, [](Index t) { return t < 290 || t >= 560; });
        every_dtype(checks, margins);
    }

    // NaN of one sequence stays in it: that of rows [41, 300).
    const Shape s = shape_of_case(c, DType::f32);
    for (const Method method : methods) {
        if (!has_kernel({}, method, s)) continue;
        const Options options{.method = method};
        Case dirty = c, a, b;
        for (const char* name : {"q", "k", "v", "dout.o"}) poison_rows(dirty, name, [](Index t) { return t >= 41 && t < 300; });
        const Status one = run_case<Operator, float, float>(gpu, options, c, a);
        const Status two = run_case<Operator, float, float>(gpu, options, dirty, b);
        checks.expect(one.ok() && two.ok(), "packed", one.ok() ? two.message() : one.message());
        bool isolated = one.ok() && two.ok();
        for (const char* name : {"out.o", "grad.q", "grad.k", "grad.v"}) {
            if (!isolated) break;
            const HostTensor& t = a.tensors[name];
            const std::size_t row = t.values.size() / static_cast<std::size_t>(t.extent[1]);
            for (std::size_t i = 0; i < t.values.size(); ++i) {
                const double x = t.values[i], y = b.tensors[name].values[i];
                isolated = isolated && (i / row >= 41 && i / row < 300 ? std::isnan(y) : x == y);
            }
        }
        for (const char* name : {"out.xT", "grad.x0"}) {
            if (!isolated) break;
            const HostTensor& t = a.tensors[name];
            const std::size_t each = t.values.size() / static_cast<std::size_t>(t.extent[0]);
            for (std::size_t i = 0; i < t.values.size(); ++i)
                isolated = isolated && (i / each == 3 || t.values[i] == b.tensors[name].values[i]);
        }
        checks.expect(isolated, "packed", "NaN of one sequence must stay in it");
    }
}

/// Offsets that decrease or leave the range are reported (and compute-sanitizer sees that nothing outside is touched).
void bad_offsets(Checks& checks) {
    const double least = std::numeric_limits<std::int32_t>::min();
    const std::vector<double> offsets[] = {{0, 50, 20, 60}, {-5, 10, 20, 1000}, {-51200, 110}, {least, 110, least}};
    for (const auto& bad : offsets)
        for (const Method method : methods) {
            const Case wrong = make({.length = 110, .query_heads = 2, .kv_heads = 2, .features = 8, .value_dim = 8,
                                     .modes = 8, .cu_seqlens = bad}, 4);
            if (has_kernel({}, method, shape_of_case(wrong, DType::f32)))
                expect_bad_offsets_reported<Operator>(checks, {.method = method}, wrong);
        }
}

/// No sequences at all: nothing to read but the one offset, and gradients of parameters are zero.
void no_sequences(Checks& checks) {
    for (const Method method : methods)
        for (const Index L : {0, 5, 130})
            for (const Index offset : {Index{0}, L, Index{-1}, L + 1}) {
                const Case c = make({.length = L, .query_heads = 4, .kv_heads = 2, .modes = 6,
                                     .cu_seqlens = {static_cast<double>(offset)}}, 3);
                if (!has_kernel({}, method, shape_of_case(c, DType::f32))) continue;
                expect_zeros_without_sequences<Operator>(checks, {.method = method}, c, offset < 0 || offset > L);
            }
}

/// Tokens [begin, end) of a dense case.
Case piece_of(const Case& c, Index begin, Index end) {
    Case piece = c;
    for (const char* name : {"q", "k", "v", "dout.o"}) {
        if (!c.tensors.contains(name)) continue;
        const HostTensor& t = c.tensors.at(name);
        const Index B = t.extent[0], L = t.extent[1], row = t.extent[2] * t.extent[3];
        HostTensor part{{B, end - begin, t.extent[2], t.extent[3]}, {}};
        for (Index b = 0; b < B; ++b) {
            const auto from = t.values.begin() + (b * L + begin) * row;
            part.values.insert(part.values.end(), from, from + (end - begin) * row);
        }
        piece.tensors[name] = part;
    }
    return piece;
}

template <class T>
void states_carry_and_runs_agree(Checks& checks, const Options& base, const InterdomainCase& sizes) {
    Case c = rounded<Operator, T, float>(make(sizes, 6));
    const Shape s = shape_of_case(c, dtype_of<T>);
    for (const Method method : methods) {
        if (!has_kernel(base, method, s)) continue;
        Options options = base;
        options.method = method;
        Case whole, again, truth;
        for (Case* results : {&whole, &again}) {
            const Status status = run_case<Operator, T, float>(gpu, options, c, *results);
            checks.expect(status.ok(), "states", status.message());
        }
        for (const auto& [name, tensor] : whole.tensors)
            checks.expect(tensor.values == again.tensors[name].values, name.c_str(), "two runs must give the same bits");
        const Status status = run_case<Operator, double, double>(reference{}, options, c, truth);
        checks.expect(status.ok(), "states", status.message());
        Case at = c;
        for (const char* name : {"dout.o", "dout.xT", "dout.etaT"}) at.tensors.erase(name);
        const Index L = s.length, cuts[] = {0, L / 3, L / 3 + 24, L / 3 + 25, L};
        const Index row = s.query_heads * s.value_dim;
        HostTensor o = truth.tensors["out.o"];
        for (int i = 0; i < 4; ++i) {
            Case piece = piece_of(at, cuts[i], cuts[i + 1]), results;
            const Status ran = run_case<Operator, T, float>(gpu, options, piece, results);
            checks.expect(ran.ok(), "states", ran.message());
            if (!ran.ok()) return;
            for (Index b = 0; b < s.batch; ++b)
                for (Index j = 0; j < (cuts[i + 1] - cuts[i]) * row; ++j)
                    o.values[static_cast<std::size_t>((b * L + cuts[i]) * row + j)] =
                        results.tensors["out.o"].values[static_cast<std::size_t>(b * (cuts[i + 1] - cuts[i]) * row + j)];
            at.tensors["x0"] = results.tensors["out.xT"];
            if (options.normalized()) at.tensors["eta0"] = results.tensors["out.etaT"];
        }
        const TensorError e = compare("o", o, truth.tensors["out.o"]);
        // States between pieces are float where T is not double.
        const double bound = std::max(computed_tolerance<T>(options, method, "out.o"), sizeof(T) < 8 ? 1e-6 : 0.0) +
                             1.02 * rounding_floor<T>(truth.tensors["out.o"]);
        char text[96];
        std::snprintf(text, sizeof text, "%s: off by %.2e, may be %.2e", to_string(method), e.relative, bound);
        checks.expect(e.finite && e.relative <= bound, "split with carried state", text);
    }
}

/// The tensors of a decoding on the device, from a case (without upstream) whose tokens it takes one by one.
template <class T, class P>
struct Decoding {
    using A = acc_t<T>;
    interstate::detail::Tensors<interstate::cuda> memory;
    interdomain::Inputs<T, P> in{};
    interdomain::Discrete<P> discrete{};
    interdomain::State<A> state{};
    View<T, 4> o{};
    Workspace ws{};
    Status status;

    Decoding(const Options& options, const Case& c, Layout layout)
        : memory(gpu, layout, std::numeric_limits<std::size_t>::max()) {
        std::vector<std::string> seen;
        interstate::detail::Upload<interstate::cuda> upload{memory, c, "", true, false, &seen, {}};
        visit(in, Shape{}, upload);
        const Shape s = shape_of(in);
        state.x = writable(in.x0);
        if (options.normalized()) state.eta = writable(in.eta0);
        discrete.C = in.params.C;
        Shape one = s;
        one.length = 1;
        ws.size = workspace_size(gpu, options, one, pass::step);
        for (const Status& made : {upload.status, memory.allocate("Lam", discrete.Lam, {s.kv_heads, s.modes}),
                                   memory.allocate("Bbar", discrete.Bbar, {s.kv_heads, s.modes}),
                                   memory.allocate("o", o, {s.batch, s.length, s.query_heads, s.value_dim}),
                                   memory.scratch("workspace", ws.size, ws.data)})
            if (!made.ok()) status = made;
    }
    template <class E, int Rank>
    static View<E, Rank> writable(const View<const E, Rank>& v) {
        View<E, Rank> w;
        w.data = const_cast<E*>(v.data);
        std::copy(v.extent, v.extent + Rank, w.extent);
        std::copy(v.stride, v.stride + Rank, w.stride);
        return w;
    }
    template <class E>
    static View<E, 3> at(const View<E, 4>& v, Index t) {
        return view(v.data + t * v.stride[1], {v.extent[0], v.extent[2], v.extent[3]}, {v.stride[0], v.stride[2], v.stride[3]});
    }
    interdomain::Token<T> token(Index t) const { return {at(in.q, t), at(in.k, t), at(in.v, t)}; }
    Status take(const interstate::cuda& exec, const Options& options, Index t) const {
        return step(exec, options, discrete, state, token(t), interdomain::TokenOut<T>{at(o, t)}, ws);
    }
};

/// `step`, token by token with a state kept in T's accumulator, is forward.
template <class T, class P>
void steps(Checks& checks, const Options& options, const Case& c0, const char* kernel, Layout layout = Layout::contiguous) {
    const Case c = rounded<Operator, T, P>(c0);
    Case truth;
    const Status ran = run_case<Operator, double, double>(reference{}, options, c, truth);
    checks.expect(ran.ok(), "steps", ran.message());
    Decoding<T, P> decoding(options, c, layout);
    checks.expect(decoding.status.ok(), "steps", decoding.status.message());
    const Shape s = shape_of(decoding.in);
    const std::string chosen = which_step_kernel(gpu, options, decoding.discrete, decoding.state, decoding.token(0)).name;
    char what[160];
    std::snprintf(what, sizeof what, "step %s Hq=%d Hkv=%d R=%d d=%d M=%d%s%s", to_string(dtype_of<T>),
                  static_cast<int>(s.query_heads), static_cast<int>(s.kv_heads), static_cast<int>(s.features),
                  static_cast<int>(s.value_dim), static_cast<int>(s.modes), options.normalized() ? " normalised" : "",
                  options.readout == Readout::real_parts ? " real_parts" : "");
    checks.expect(chosen == std::string("interdomain.cuda.step.") + kernel, what, chosen.c_str());
    Status status = discretize(gpu, options, decoding.in.params, decoding.discrete);
    for (Index t = 0; t < s.length && status.ok(); ++t) status = decoding.take(gpu, options, t);
    checks.expect(status.ok(), what, status.message());
    const auto close = [&](const char* name, const auto& got, double floor) {
        HostTensor host;
        const Status copied = decoding.memory.download(name, got, host);
        checks.expect(copied.ok(), what, copied.message());
        const TensorError e = compare(name, host, truth.tensors.at(name));
        const double bound = (sizeof(T) == 8 ? 1e-12 * (options.normalized() ? 1e4 : 1.0) : 1e-5) + 1.02 * floor;
        char text[128];
        std::snprintf(text, sizeof text, "%s: off by %.2e, may be %.2e", name, e.relative, bound);
        checks.expect(e.finite && e.relative <= bound, what, text);
    };
    close("out.o", decoding.o, rounding_floor<T>(truth.tensors.at("out.o")));
    close("out.xT", decoding.state.x, 0.0);
    if (options.normalized()) close("out.etaT", decoding.state.eta, 0.0);
}

template <class T>
void step_sizes(Checks& checks, bool quick) {
    const bool fast = sizeof(T) < 8;
    const auto sized = [](Index Hq, Index Hkv, Index R, Index d, Index M, Index L) {
        return InterdomainCase{.batch = 2, .length = L, .query_heads = Hq, .kv_heads = Hkv, .features = R, .value_dim = d,
                               .modes = M, .upstream = false};
    };
    const auto run = [&](const InterdomainCase& o, bool even, Options options = {}, Layout layout = Layout::contiguous) {
        const Case c = make(o, 9);
        steps<T, float>(checks, options, options.normalized() ? well_conditioned(c, 10) : c, fast && even ? "fast" : "general", layout);
    };
    run(sized(4, 2, 6, 10, 8, quick ? 5 : 40), true);
    run(sized(2, 2, 5, 7, 9, quick ? 5 : 40), false);
    if (quick) return;
    for (Options options : all_options()) {
        InterdomainCase o = sized(3, 1, 12, 20, 16, 30);
        o.normalizer = options.normalized();
        run(o, true, options);
        o.modes = 15;
        run(o, false, options);
    }
    run(sized(4, 4, 64, 64, 64, 100), true);
    run(sized(4, 2, 64, 64, 64, 20), true);
    for (const auto& [R, d, M] : {std::array<Index, 3>{64, 128, 64}, {32, 32, 32}, {66, 2, 64}, {2, 130 - 4, 66}, {16, 32, 128},
                                  {128, 128, 128}, {2, 2, 2}, {62, 64, 100}})
        run(sized(2, 1, R, d, M, 12), true);
    for (const auto& [R, d, M] : {std::array<Index, 3>{130, 64, 64}, {64, 130, 64}, {64, 64, 130}, {1, 1, 1}, {33, 64, 64}})
        run(sized(2, 1, R, d, M, 12), false);
    run(sized(34, 2, 8, 8, 8, 6), false);  // too many queries a head
    run(sized(2, 1, 1200, 8, 6, 3), false);
    run(sized(4, 1, 16, 16, 400, 3), false);  // vectors beyond shared memory
    for (const Layout layout : {Layout::reversed, Layout::padded}) run(sized(4, 2, 16, 16, 16, 10), false, {}, layout);
    const Case c = make(sized(4, 2, 16, 16, 16, 20), 9);
    steps<T, double>(checks, {}, c, fast ? "fast" : "general");
}

/// A float state does not drift over long decodes: slow modes, against the scan, which computes in float64.
void long_decode(Checks& checks) {
    const Index L = 16384;
    InterdomainCase sizes{.length = L, .features = 16, .value_dim = 16, .modes = 16, .upstream = false, .decay = 1e-2};
    Case c = make(sizes, 21);
    for (double& x : c.tensors["log_dt"].values) x = std::log(1e-3);
    c = rounded<Operator, float, float>(c);
    Case want;
    const Status ran = run_case<Operator, double, float>(gpu, {.method = Method::scan}, c, want);
    checks.expect(ran.ok(), "long decode", ran.message());
    Decoding<float, float> decoding({}, c, Layout::contiguous);
    checks.expect(decoding.status.ok(), "long decode", decoding.status.message());
    Status status = discretize(gpu, Options{}, decoding.in.params, decoding.discrete);
    for (Index t = 0; t < L && status.ok(); ++t) status = decoding.take(gpu, {}, t);
    checks.expect(status.ok(), "long decode", status.message());
    HostTensor o, x;
    checks.expect(decoding.memory.download("o", decoding.o, o).ok() && decoding.memory.download("x", decoding.state.x, x).ok(),
                  "long decode", "download");
    for (const auto& [name, got] : {std::pair{"out.o", &o}, {"out.xT", &x}}) {
        const TensorError e = compare(name, *got, want.tensors.at(name));
        char text[96];
        std::snprintf(text, sizeof text, "%s: off by %.2e, may be 2e-05", name, e.relative);
        checks.expect(e.finite && e.relative <= 2e-5, "long decode", text);
    }
}

/// discretize and step in a graph, whose state goes on from replay to replay, give the bits of plain calls.
template <class T>
void step_in_a_graph(Checks& checks, Index size) {
    const Case c = rounded<Operator, T, float>(make({.batch = 2, .length = 3, .query_heads = 4, .kv_heads = 2, .features = size,
                                                     .value_dim = size, .modes = size, .upstream = false}, 9));
    Decoding<T, float> plain({}, c, Layout::contiguous), graphed({}, c, Layout::contiguous);
    const auto expect = [&](const Status& s) { checks.expect(s.ok(), "step graph", s.message()); };
    expect(plain.status);
    expect(graphed.status);
    // The graph reads the first token's place, and writes the first output's.
    Graph graph(checks, "step graph", [&](const interstate::cuda& recorded) -> Status {
        INTERSTATE_RETURN_IF_ERROR(discretize(recorded, Options{}, graphed.in.params, graphed.discrete));
        return graphed.take(recorded, {}, 0);
    });
    expect(discretize(gpu, Options{}, plain.in.params, plain.discrete));
    for (Index t = 0; t < 3; ++t) {
        Case token = piece_of(c, t, t + 1);
        expect(plain.take(gpu, {}, t));
        expect(cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
        Decoding<T, float> fresh({}, token, Layout::contiguous);
        for (Index b = 0; b < 2; ++b)
            for (const auto& [to, from] : {std::pair{&graphed.in.q, &fresh.in.q}, {&graphed.in.k, &fresh.in.k}, {&graphed.in.v, &fresh.in.v}})
                expect(cuda_status(cudaMemcpy(const_cast<T*>(to->data) + b * to->stride[0], from->data + b * from->stride[0],
                                              static_cast<std::size_t>(from->stride[0]) * sizeof(T), cudaMemcpyDeviceToDevice),
                                   "cudaMemcpy"));
        expect(cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
        graph.replay();
        HostTensor o[2], x[2];
        expect(plain.memory.download("o", plain.o, o[0]));
        expect(graphed.memory.download("o", graphed.o, o[1]));
        expect(plain.memory.download("x", plain.state.x, x[0]));
        expect(graphed.memory.download("x", graphed.state.x, x[1]));
        const Index row = 4 * size;
        bool same = x[0].values == x[1].values;
        for (Index b = 0; b < 2; ++b)
            for (Index j = 0; j < row; ++j)
                same = same && o[0].values[static_cast<std::size_t>((b * 3 + t) * row + j)] ==
                                   o[1].values[static_cast<std::size_t>(b * 3 * row + j)];
        checks.expect(same, "step graph", "replayed, must be the bits of plain calls");
    }
}

/// Each gradient wanted alone has the bits that it has among the others: null views are not written, whatever their strides.
template <class T>
void gradients_alone(Checks& checks, const Options& base) {
    const Case c = rounded<Operator, T, float>(make({.batch = 2, .length = 70, .query_heads = 4, .kv_heads = 2, .features = 16,
                                                     .value_dim = 16, .modes = 16, .normalizer = base.normalized()}, 7));
    for (const Method method : methods) {
        if (!has_kernel(base, method, shape_of_case(c, dtype_of<T>))) continue;
        Options options = base;
        options.method = method;
        Case all;
        const Status ran = run_case<Operator, T, float>(gpu, options, c, all);
        checks.expect(ran.ok(), "alone", ran.message());
        interstate::detail::Tensors<interstate::cuda> memory(gpu, Layout::contiguous, std::numeric_limits<std::size_t>::max());
        std::vector<std::string> seen;
        interdomain::Inputs<T, float> in{};
        interdomain::Upstream<T> upstream{};
        interdomain::Outputs<T> out{};
        interstate::detail::Upload<interstate::cuda> upload{memory, c, "", true, false, &seen, {}};
        visit(in, Shape{}, upload);
        interstate::detail::Upload<interstate::cuda> upload_upstream{memory, c, "dout.", true, false, &seen, {}};
        const Shape s = shape_of(in);
        visit(upstream, s, upload_upstream);
        const auto only_o = [](const char* name) { return std::strcmp(name, "o") == 0; };
        interstate::detail::Allocate<interstate::cuda, decltype(only_o)> allocate{memory, only_o, {}};
        visit(out, s, allocate);
        Saved saved{nullptr, saved_size(gpu, options, s)};
        Workspace ws{nullptr, std::max(workspace_size(gpu, options, s, pass::forward), workspace_size(gpu, options, s, pass::backward))};
        for (const Status& made : {upload.status, upload_upstream.status, allocate.status,
                                   memory.scratch("saved", saved.size, saved.data), memory.scratch("workspace", ws.size, ws.data)})
            checks.expect(made.ok(), "alone", made.message());
        const Status went = forward(gpu, options, in, out, saved, ws);
        checks.expect(went.ok(), "alone", went.message());
        for (const char* name : {"q", "k", "v", "log_dt", "log_neg_re", "im", "B", "C", "x0", "eta0"}) {
            if (!c.tensors.contains(name)) continue;
            interdomain::Grads<T, float> grads{};
            const auto only = [&](const char* field) { return std::strcmp(field, name) == 0; };
            interstate::detail::Allocate<interstate::cuda, decltype(only)> allocate_one{memory, only, {}};
            visit(grads, s, allocate_one);
            if (!grads.k) grads.k = view(static_cast<T*>(nullptr), {s.batch, s.length, s.kv_heads, s.features});
            const Status status = backward(gpu, options, in, out, saved, upstream, grads, ws);
            checks.expect(status.ok(), "alone", status.message());
            const cudaError_t finished = cudaDeviceSynchronize();
            checks.expect(finished == cudaSuccess, "alone", cudaGetErrorString(finished));
            Case got;
            interstate::detail::Download<interstate::cuda> download{memory, "grad.", got, {}};
            visit(grads, s, download);
            const std::string full = std::string("grad.") + name;
            checks.expect(download.status.ok() && got.tensors[full].values == all.tensors[full].values, full.c_str(),
                          "wanted alone, must be the bits that it has among the others");
        }
        // Nothing wanted is nothing to do.
        const Status none = backward(gpu, options, in, out, saved, upstream, interdomain::Grads<T, float>{}, ws);
        checks.expect(none.ok(), "alone", none.message());
    }
}

void host_errors(Checks& checks) {
    interdomain::Inputs<float> in{};
    const Status null = forward(gpu, Options{}, in, interdomain::Outputs<float>{}, Saved{}, Workspace{});
    checks.expect(null.code() == StatusCode::invalid_argument, "null q", null.message());
    const Shape s{.batch = 1, .length = 3, .query_heads = 2, .kv_heads = 2, .features = 5, .value_dim = 5, .modes = 5};
    const Case c = make({.length = 3, .query_heads = 2, .kv_heads = 2, .features = 5, .value_dim = 5, .modes = 5}, 1);
    Case results;
    const Status status = run_case<Operator, float, float>(gpu, {.method = Method::fft}, c, results);
    checks.expect(status.code() == StatusCode::unsupported, "fft", status.message());
    checks.expect(!has_kernel({}, Method::fft, s), "which_kernel", "must name nothing where nothing runs");
    checks.expect(std::string(which_kernel(gpu, {.method = Method::scan}, s).name) == "interdomain.cuda.scan", "which_kernel",
                  "must name what runs");
}

/// Forward and backward in a graph, every method.
template <class T>
void graphs(Checks& checks, const Options& base, Index length, Index size) {
    Case cases[2];
    for (int i = 0; i < 2; ++i)
        cases[i] = rounded<Operator, T, float>(make({.batch = 2, .length = length, .query_heads = 4, .kv_heads = 2, .features = size,
                                                     .value_dim = size, .modes = size, .normalizer = base.normalized()},
                                                    static_cast<std::uint64_t>(20 + i)));
    for (const Method method : methods) {
        if (!has_kernel(base, method, shape_of_case(cases[0], dtype_of<T>))) continue;
        Options options = base;
        options.method = method;
        in_a_graph<Operator, T>(checks, options, cases[0], cases[1]);
    }
}

/// Every option, on a denominator that behaves and on one that does not.
void every_option(Checks& checks, const InterdomainCase& sizes) {
    for (const Options& options : all_options()) {
        InterdomainCase o = sizes;
        o.normalizer = options.normalized();
        const Case c = make(o, 8);
        every_dtype(checks, c, options);
        expect_close<f32, double>(checks, c, options);
        expect_close<bf16, double>(checks, c, options);
        if (options.normalized()) every_dtype(checks, well_conditioned(c, 9), options, {}, true);
        o.initial_state = false;
        expect_close<f32, float>(checks, make(o, 10), options);
    }
}

/// Lengths at which a call goes through its chunks in several slices, forward with Saved and backward from it.
void several_slices(Checks& checks) {
    const auto expect_slices = [&](const InterdomainCase& o, const Options& base, bool conditioned) {
        Options options = base;
        options.method = Method::chunked;
        Case c = make(o, 21);
        if (conditioned) c = well_conditioned(c, 9);
        const std::size_t kept = saved_size(gpu, options, shape_of_case(c, DType::bf16));
        checks.expect(kept > 0, "several slices", "nothing is kept at their borders: the case has one");
        expect_close<bf16, float>(checks, c, base, {}, conditioned);
        expect_close<f32, float>(checks, c, base, {}, conditioned);
    };
    InterdomainCase o{.batch = 1, .length = 40000, .query_heads = 4, .kv_heads = 2, .features = 8, .value_dim = 8, .modes = 8};
    expect_slices(o, {}, false);
    o.cu_seqlens = {100, 100, 5000, 5064, 17000, 39000};
    expect_slices(o, {.readout = Readout::real_parts}, false);
    o.length = 20000;
    o.cu_seqlens = {};
    o.batch = 2;
    o.features = 66;
    expect_slices(o, {}, false);
    o.normalizer = true;
    o.features = 8;
    expect_slices(o, {.readout = Readout::real_parts, .normalizer = Normalizer::nadaraya_watson}, true);
    o.batch = 1;
    o.cu_seqlens = {0, 700, 19000, 19999};
    expect_slices(o, {.normalizer = Normalizer::nadaraya_watson}, true);
}

void run(Checks& checks, bool quick) {
    every_dtype(checks, make({.batch = 2, .length = 35, .query_heads = 2, .kv_heads = 1, .features = 6, .value_dim = 10, .modes = 8}, 1));
    every_dtype(checks, make({.length = 66, .features = 16, .value_dim = 16, .modes = 16, .normalizer = true}, 2),
                {.readout = Readout::real_parts, .normalizer = Normalizer::nadaraya_watson});
    packed_with_bad_offsets(checks, quick);
    bad_offsets(checks);
    host_errors(checks);
    step_sizes<f32>(checks, quick);
    step_in_a_graph<f32>(checks, 6);
    if (quick) {
        for (const Index size : {64, 66}) {
            expect_close<bf16, float>(checks, make({.length = 70, .features = size, .value_dim = size, .modes = size}, 3));
            expect_close<f32, float>(checks, make({.length = 70, .features = size, .value_dim = size, .modes = size}, 3));
        }
        expect_close<bf16, float>(checks, make({.length = 1100, .features = 8, .value_dim = 8, .modes = 8}, 3));
        expect_close<f32, float>(checks, well_conditioned(make({.length = 70, .modes = 8, .normalizer = true}, 3), 9),
                                 {.normalizer = Normalizer::nadaraya_watson}, {}, true);
        return;
    }
    no_sequences(checks);
    for (const Index L : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 193, 255, 256, 257, 1000})
        every_dtype(checks, make({.length = L, .query_heads = 2, .kv_heads = 2, .features = 16, .value_dim = 16, .modes = 16},
                                 static_cast<std::uint64_t>(50 + L)));
    for (const Index L : {1, 63, 64, 65, 193})
        every_dtype(checks, make({.length = L, .query_heads = 2, .kv_heads = 2, .features = 64, .value_dim = 64, .modes = 64},
                                 static_cast<std::uint64_t>(90 + L)));
    // Segments of parallel_scan: 8 chunks of 32 or 64 tokens.
    for (const Index L : {511, 512, 513, 1500})
        every_dtype(checks, make({.batch = 2, .length = L, .query_heads = 2, .kv_heads = 1, .features = 16, .value_dim = 24, .modes = 8},
                                 static_cast<std::uint64_t>(70 + L)));
    every_dtype(checks, make({.length = 3000, .query_heads = 2, .kv_heads = 2, .features = 8, .value_dim = 8, .modes = 8,
                              .cu_seqlens = {3, 3, 40, 105, 106, 1400, 1656, 1656, 2990}}, 71));
    for (const auto& [R, d, M] :
         {std::array<Index, 3>{1, 1, 1}, {5, 5, 5}, {16, 33, 5}, {33, 16, 16}, {1, 64, 64}, {64, 1, 64}, {64, 64, 1}, {64, 64, 16},
          {16, 64, 64}, {64, 16, 33}, {65, 64, 64}, {64, 65, 64}, {64, 64, 65}, {128, 64, 64}, {64, 128, 64}, {64, 64, 128},
          {128, 128, 128}, {32, 32, 32}, {130, 130, 130}})
        every_dtype(checks, make({.length = 70, .features = R, .value_dim = d, .modes = M}, static_cast<std::uint64_t>(R + 3 * d + 7 * M)));
    every_option(checks, {.batch = 2, .length = 75, .query_heads = 4, .kv_heads = 2, .features = 16, .value_dim = 16, .modes = 16});
    every_option(checks, {.length = 66, .query_heads = 2, .kv_heads = 1, .features = 64, .value_dim = 64, .modes = 64});
    every_option(checks, {.length = 700, .query_heads = 2, .kv_heads = 2, .features = 66, .value_dim = 5, .modes = 65});
    every_option(checks, {.length = 300, .query_heads = 4, .kv_heads = 2, .features = 66, .value_dim = 64, .modes = 65,
                          .cu_seqlens = {3, 3, 40, 105, 106, 290}});
    every_dtype(checks, make({.batch = 2, .length = 600, .query_heads = 4, .kv_heads = 2, .features = 64, .value_dim = 64, .modes = 64}, 3));
    every_dtype(checks, make({.length = 80, .query_heads = 8, .kv_heads = 1, .features = 32, .value_dim = 32, .modes = 32}, 4));
    every_dtype(checks, make({.length = 400, .query_heads = 2, .kv_heads = 2, .features = 64, .value_dim = 64, .modes = 64,
                              .cu_seqlens = {0, 1, 64, 64, 129, 130, 321, 400}}, 14));
    for (const Layout layout : {Layout::reversed, Layout::padded})
        for (const Index size : {5, 16, 64})
            every_dtype(checks, make({.batch = 2, .length = 70, .query_heads = 2, .kv_heads = 1, .features = size, .value_dim = size,
                                      .modes = size}, 12), {}, {.layout = layout});
    for (const double decay : {1e-4, 1e3, 1e8, 1e30})
        for (const Index size : {8, 64})
            every_dtype(checks, make({.length = 140, .features = size, .value_dim = size, .modes = size, .decay = decay}, 2));
    for (const double scale : {1e-3, 1e3})
        for (const Index size : {8, 64}) {
            Case c = make({.length = 140, .features = size, .value_dim = size, .modes = size}, 16);
            for (const char* name : {"q", "k", "v", "x0", "dout.o", "dout.xT"})
                for (double& x : c.tensors[name].values) x *= scale;
            expect_close<f64, double>(checks, c);
            expect_close<f32, float>(checks, c);
            if (scale < 1.0) expect_close<f16, float>(checks, c);  // else beyond its range
            expect_close<bf16, float>(checks, c);
        }
    for (const auto& [B, L, H, R, d, M] :
         {std::array<Index, 6>{0, 3, 1, 2, 2, 2}, {2, 0, 1, 2, 2, 2}, {2, 3, 0, 2, 2, 2}, {2, 3, 1, 0, 2, 2}, {2, 3, 1, 2, 0, 2},
          {2, 3, 1, 2, 2, 0}})
        every_dtype(checks, make({.batch = B, .length = L, .query_heads = H, .kv_heads = H, .features = R, .value_dim = d, .modes = M}, 3));
    // Keys and values that no query reads.
    for (const Index size : {2, 66}) {
        every_dtype(checks, make({.batch = 2, .length = 70, .query_heads = 0, .features = size, .value_dim = size, .modes = size}, 4));
        every_dtype(checks, make({.length = 300, .query_heads = 0, .kv_heads = 2, .features = size, .value_dim = size, .modes = size,
                                  .cu_seqlens = {3, 3, 40, 105, 290}}, 5));
    }
    several_slices(checks);
    for (const Options& options : {Options{}, Options{.readout = Readout::real_parts}})
        for (const std::uint64_t seed : {1, 2})
            for (const auto& [size, M] : {std::array<Index, 2>{16, 16}, {64, 64}, {32, 64}, {100, 72}}) {
                sixteen_bit_rule<bf16>(checks, 200, size, M, options, seed);
                sixteen_bit_rule<f16>(checks, 200, size, M, options, seed);
            }
    for (const Options& options : {Options{}, Options{Discretization::raw, Readout::real_parts, Normalizer::nadaraya_watson}}) {
        gradients_alone<f32>(checks, options);
        gradients_alone<bf16>(checks, options);
        for (const Index size : {6, 64, 80}) {
            graphs<f32>(checks, options, 140, size);
            graphs<bf16>(checks, options, 140, size);
        }
    }
    const InterdomainCase carried{.batch = 2, .length = 400, .query_heads = 4, .kv_heads = 2, .features = 32, .value_dim = 32, .modes = 32};
    states_carry_and_runs_agree<f64>(checks, {}, carried);
    states_carry_and_runs_agree<f32>(checks, {}, carried);
    states_carry_and_runs_agree<bf16>(checks, {.disc = Discretization::raw, .readout = Readout::real_parts}, carried);
    step_sizes<f64>(checks, quick);
    step_sizes<f16>(checks, quick);
    step_sizes<bf16>(checks, quick);
    step_in_a_graph<bf16>(checks, 64);
    step_in_a_graph<f64>(checks, 6);
    long_decode(checks);
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) {
    return interstate::test::cuda_main(argc, argv, "interdomain", interstate::test::run);
}
