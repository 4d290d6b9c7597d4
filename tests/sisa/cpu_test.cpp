// SISA on the CPU against the float64 reference: every mode, dtype, instruction set and option, lengths around the
// tiles, decays from none to hard resets, packed sequences, layouts, steps, and the same bits for any number of threads.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <limits>

#include <sisa/sisa.hpp>

#include "../support/isas.hpp"
#include "../support/sanitized.hpp"
#include "decode.hpp"
#include "rounded_formula.hpp"
#include "sisa_cases.hpp"

namespace interstate::test {
namespace {

using sisa::Mode;
using sisa::Operator;
using sisa::Options;
using sisa::Score;

template <class T>
constexpr double tolerance = std::is_same_v<T, double> ? 1e-12 : 1e-5;

/// Names of tensors that are too far from the truth. Sums over all that dC and dB make, whose terms cancel (eq. 22 and 23;
/// docs/ops/sisa.md, "The same in linear time"), are held to the size of their terms. 16-bit storage: sums are float
/// and no operand is rounded again, so that beside float's own error there is the rounding of the result, and in backward
/// what is lost of o: 16 (bf16) or 19 (f16) bits are kept, and delta may be some times the size of dp - delta.
template <class T>
std::string beyond(const Case& c, const Case& got, const Case& want, double more) {
    std::string list;
    for (const auto& [name, truth] : want.tensors) {
        const auto found = got.tensors.find(name);
        if (found == got.tensors.end()) return "no " + name;
        double allowed = tolerance<T> + more;
        if (sizeof(T) == 2 && !is_parameter(name)) allowed += 1.01 * rounding_floor<T>(truth);
        if (sizeof(T) == 2 && name.starts_with("grad.")) allowed += std::is_same_v<T, f16> ? 5e-6 : 4e-5;
        const double scale = size_of_terms(c, want, name);
        double error = 0.0;
        for (std::size_t i = 0; i < truth.values.size(); ++i) {
            const double e = truth.values[i] == found->second.values[i] ? 0.0 : truth.values[i] - found->second.values[i];
            error += e * e;
        }
        error = std::sqrt(error);
        if (!(error <= allowed * scale)) list += name + " " + std::to_string(error / scale / allowed) + " times allowed  ";
    }
    return list;
}

/// Fills a row of the second axis.
void fill_row(HostTensor& x, Index row, double value) {
    const std::size_t width = x.values.size() / static_cast<std::size_t>(x.extent[0] * x.extent[1]);
    std::fill_n(x.values.begin() + static_cast<std::ptrdiff_t>(static_cast<std::size_t>(row) * width), width, value);
}

template <class T>
void expect_close(const Case& c, const Options& options, const std::vector<Isa>& instruction_sets, RunOptions run = {},
                  double more = 0.0) {
    using P = param_t<T>;
    const Case in = rounded<Operator, T, P>(c);
    Case want;
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, in, want).ok()));
    for (const Isa isa : instruction_sets) {
        SCOPED_TRACE(to_string(isa));
        Case got;
        const Status status = run_case<Operator, T, P>(cpu{.threads = 2, .isa = isa}, options, in, got, run);
        ASSERT_TRUE(status.ok()) << status.message();
        EXPECT_EQ(beyond<T>(in, got, want, more), "") << to_string(dtype_of<T>);
    }
}
void expect_close_in_every_dtype(const SisaCase& s, Options options, RunOptions run = {}, std::uint64_t seed = 3) {
    SisaCase o = s;
    o.softmax = options.score == Score::softmax;
    const Case c = make(o, seed);
    expect_close<f64>(c, options, isas(), run);
    expect_close<f32>(c, options, isas(), run);
    if constexpr (!sanitized) expect_close<f16>(c, options, {Isa::automatic}, run);
    expect_close<bf16>(c, options, {Isa::automatic}, run);
}

TEST(SisaCpu, EveryOptionMatchesTheReference) {
    for (Options o : all_options()) {
        if (o.window > 0) o.window = 45;
        SCOPED_TRACE(describe(o));
        for (const SisaCase& s : {SisaCase{.batch = 2, .queries = 130, .keys = 130, .query_heads = 4, .kv_heads = 2, .head_dim = 8,
                                           .value_dim = 5, .state_dim = 6},
                                  SisaCase{.queries = 65, .keys = 140, .query_heads = 2, .head_dim = 5, .state_dim = 16, .half_life = 100.0},
                                  SisaCase{.queries = 150, .keys = 150, .query_heads = 2, .kv_heads = 2, .cu_seqlens = {2, 3, 3, 70, 141}}})
            expect_close_in_every_dtype(s, o);
    }
}

TEST(SisaCpu, LengthsWidthsAndLayouts) {
    for (const Index L : {1, 2, 63, 64, 65, 127, 128, 129, 257})
        expect_close_in_every_dtype({.queries = L, .keys = L, .half_life = 30.0}, {});
    for (const Index ds : {0, 2, 14, 16, 18, 64, 128})
        expect_close_in_every_dtype({.queries = 70, .keys = 70, .head_dim = 17, .state_dim = ds}, {});
    for (const Layout layout : {Layout::reversed, Layout::padded})
        expect_close_in_every_dtype({.batch = 2, .queries = 70, .keys = 90, .query_heads = 4, .kv_heads = 2}, {}, {.layout = layout});
    // Blocks of 256 keys.
    const Case c = make({.batch = 2, .queries = 270, .keys = 270, .query_heads = 16, .kv_heads = 16, .half_life = 40.0}, 1);
    expect_close<f32>(c, {}, isas());
}

TEST(SisaCpu, EveryDecay) {
    for (const double half_life : {1e9, 1e3, 20.0, 0.5, 0.01})
        for (const Mode mode : {Mode::exact, Mode::published}) {
            SCOPED_TRACE(half_life);
            expect_close_in_every_dtype({.queries = 140, .keys = 140, .half_life = half_life}, {.mode = mode});
        }
    // Hard resets, alone and in a row, and -inf.
    Case c = make({.queries = 200, .keys = 200, .half_life = 30.0}, 4);
    for (const std::size_t t : {0, 20, 21, 64, 100, 128}) values(c, "log_alpha")[t] = t == 21 ? -INFINITY : t == 64 ? -1e4 : -1000.0;
    // The reference sums between tokens; kernels subtract prefixes, and a double near -1000 n has steps of 1e-13 n.
    expect_close<f64>(c, {}, isas(), {}, 6e-13);
    expect_close<f32>(c, {}, isas());
    // No pair has decay across a reset, or the first token between its two: those gradients are exactly zero.
    Case got;
    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {}, c, got).ok()));
    for (const std::size_t t : {0, 20, 21, 64, 100, 128}) EXPECT_EQ(got.tensors["grad.log_alpha"].values[t], 0.0) << t;
    for (const std::size_t n : {0, 1}) EXPECT_EQ(got.tensors["grad.theta"].values[n], 0.0);
}

TEST(SisaCpu, SameBitsForAnyNumberOfThreads) {
    for (const Options& o : all_options()) {
        const Case c = make({.batch = 2, .queries = 150, .keys = 200, .query_heads = 4, .kv_heads = 2,
                             .softmax = o.score == Score::softmax}, 5);
        Case one;
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 1}, o, c, one).ok()));
        for (const int threads : {2, 3, 5}) {
            Case many;
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = threads}, o, c, many).ok()));
            for (const auto& [name, tensor] : one.tensors) EXPECT_EQ(tensor.values, many.tensors[name].values) << name;
        }
    }
}

TEST(SisaCpu, NaNDoesNotLeaveItsSequence) {
    for (const Mode mode : {Mode::exact, Mode::published}) {
        Case c = make({.queries = 200, .keys = 200, .query_heads = 2, .kv_heads = 2, .cu_seqlens = {10, 70, 180}}, 6), clean, dirty;
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {.mode = mode}, c, clean).ok()));
        for (auto& [name, x] : c.tensors)
            if (name != "cu_seqlens" && name != "lam") {
                const std::size_t width = x.values.size() / 200;
                for (std::size_t i = 0; i < x.values.size(); ++i)
                    if (i / width < 70 || i / width >= 180) x.values[i] = NAN;
            }
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, {.mode = mode}, c, dirty).ok()));
        for (const auto& [name, x] : clean.tensors) {
            if (name == "grad.lam") continue;
            const std::size_t width = x.values.size() / 200;
            for (std::size_t i = 0; i < x.values.size(); ++i) {
                const std::size_t row = i / width;
                if (row >= 70 && row < 180) {
                    EXPECT_EQ(x.values[i], dirty.tensors[name].values[i]) << name << i;
                } else if (row < 10 || row >= 180) {
                    EXPECT_EQ(dirty.tensors[name].values[i], 0.0) << name << i;
                }
            }
        }
    }
}

TEST(SisaCpu, NaNDoesNotReachEarlierTokens) {
    // All of token 100 is NaN. What reads it is NaN, as in the reference; what does not is as close to the truth as ever.
    for (const Options& o : {Options{}, Options{.window = 30}, Options{.score = Score::sigmoid}}) {
        Case c = make({.queries = 200, .keys = 200, .query_heads = 2, .kv_heads = 2, .softmax = o.score == Score::softmax}, 6);
        for (auto& [name, x] : c.tensors)
            if (name != "lam") fill_row(x, 100, NAN);
        Case want;
        ASSERT_TRUE((run_case<Operator, double, double>(reference{}, o, c, want).ok()));
        for (const Isa isa : isas()) {
            Case got;
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{.isa = isa}, o, c, got).ok()));
            for (const char* name : {"out.o", "grad.q", "grad.C"}) {
                const std::vector<double>&x = got.tensors[name].values, &y = want.tensors[name].values;
                for (std::size_t i = 0; i < y.size(); ++i) {
                    ASSERT_EQ(std::isnan(x[i]), std::isnan(y[i])) << name << " " << i;
                    if (!std::isnan(y[i])) {
                        ASSERT_NEAR(x[i], y[i], 1e-4) << name << " " << i;
                    }
                }
            }
        }
    }
}

/// Bits of `name` in rows before query `end`, of every batch row.
std::vector<std::uint64_t> bits_before(const Case& c, const char* name, Index end) {
    const HostTensor& x = c.tensors.at(name);
    const std::size_t rows = static_cast<std::size_t>(x.extent[1]);
    const std::size_t width = x.values.size() / static_cast<std::size_t>(x.extent[0]) / rows;
    std::vector<std::uint64_t> bits;
    for (std::size_t i = 0; i < x.values.size(); ++i)
        if (static_cast<Index>(i / width % rows) < end) bits.push_back(std::bit_cast<std::uint64_t>(x.values[i]));
    return bits;
}

/// What becomes of the tokens from some token on.
enum class Future { other, faster, slower, reset, nan };

/// All inputs of tokens from position t on are others.
Case with_future(Case c, Index t, Future future, std::uint64_t seed) {
    Random r(seed);
    const Index offset = c.tensors["k"].extent[1] - c.tensors["q"].extent[1];
    for (const char* name : {"q", "k", "v", "C", "B", "log_alpha", "theta"}) {
        HostTensor& x = c.tensors.at(name);
        const std::string of = name;
        const Index first = of == "q" || of == "C" ? std::max<Index>(t - offset, 0) : t, rows = x.extent[1];
        const Index width = static_cast<Index>(x.values.size()) / x.extent[0] / rows;
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            const Index row = static_cast<Index>(i) / width % rows;
            if (row < first) continue;
            double& v = x.values[i];
            if (future == Future::nan)
                v = NAN;
            else if (of != "log_alpha")
                v = r.normal();
            else if (future == Future::other)
                v *= r.uniform(0.1, 3.0);
            else if (future == Future::faster)
                v -= r.uniform(0.0, 12.0);
            else if (future == Future::slower)
                v = 0.0;
            else if (row < first + 2 || r.uniform(0.0, 1.0) < 0.1)
                v = row == first ? -INFINITY : -1000.0;
        }
    }
    return c;
}

template <class T>
void expect_causal(const Case& c, const Options& options, const std::vector<std::pair<Index, Future>>& futures) {
    using P = param_t<T>;
    const Index offset = c.tensors.at("k").extent[1] - c.tensors.at("q").extent[1];
    for (const Isa isa : isas()) {
        const cpu exec{.threads = 1, .isa = isa};
        Case one;
        ASSERT_TRUE((run_case<Operator, T, P>(exec, options, c, one).ok()));
        for (const auto& [t, future] : futures) {
            Case two;
            ASSERT_TRUE((run_case<Operator, T, P>(exec, options, with_future(c, t, future, 7), two).ok()));
            for (const auto& [name, x] : one.tensors)
                EXPECT_TRUE(bits_before(one, name.c_str(), t - offset) == bits_before(two, name.c_str(), t - offset))
                    << name << " before " << t << ", future " << static_cast<int>(future) << ", " << to_string(isa) << ", "
                    << to_string(dtype_of<T>);
        }
    }
}

TEST(SisaCpu, LaterTokensDoNotMoveABitOfEarlierRows) {
    std::uint64_t seed = 20;
    for (const Index L : {33, 64, 100, 150, 290})
        for (const double half_life : {0.1, 0.7, 1.5, 4.0, 20.0, 300.0, 1e6})
            for (const Options& o : {Options{}, Options{.window = 37}, Options{.score = Score::sigmoid, .bias = -0.5},
                                     Options{.window = 80, .score = Score::sigmoid}}) {
                Random r(++seed);
                SisaCase shape{.queries = L, .keys = L, .query_heads = 2, .head_dim = 5, .value_dim = 3, .state_dim = 6,
                               .upstream = false, .half_life = half_life};
                if (seed % 3 == 0) shape.queries = L - 20;
                if (seed % 3 == 1) shape.cu_seqlens = {2, 9, static_cast<double>(L / 2), static_cast<double>(L)};
                if (seed % 5 == 0) shape.head_dim = 17, shape.value_dim = 16, shape.state_dim = 16;
                Case c = make(shape, seed);
                if (seed % 2)
                    for (double& a : values(c, "log_alpha")) a = r.uniform(0.0, 1.0) < 0.02 ? -1000.0 : a;
                SCOPED_TRACE(describe(o) + " L=" + std::to_string(L) + " half-life=" + std::to_string(half_life));
                std::vector<std::pair<Index, Future>> futures;
                for (const Future f : {Future::other, Future::faster, Future::slower, Future::reset, Future::nan})
                    futures.push_back({r.up_to(L - 1), f});
                expect_causal<f32>(c, o, futures);
                expect_causal<f64>(c, o, futures);
                expect_causal<bf16>(c, o, futures);
            }
}

template <class T>
void expect_steps(const Options& o, Index ds) {
    using P = param_t<T>;
    const Index B = 2, L = 150, Hq = 4, Hkv = 2, dh = 9, dv = 7;
    Case c = rounded<Operator, T, P>(make({.batch = B, .queries = L, .keys = L, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dh,
                                           .value_dim = dv, .state_dim = ds, .upstream = false, .half_life = 20.0}, 8));
    if (ds > 0) values(c, "log_alpha")[200] = -INFINITY;
    Case want;
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, o, c, want).ok()));
    const auto typed = [&]<class E>(const char* name, E) {
        std::vector<E> x;
        if (c.tensors.contains(name))
            for (const double v : values(c, name)) x.push_back(static_cast<E>(v));
        return x;
    };
    const auto q = typed("q", T()), k = typed("k", T()), v = typed("v", T()), C = typed("C", T()), Bc = typed("B", T());
    const auto la = typed("log_alpha", P()), theta = typed("theta", P()), lam = typed("lam", P());
    const Index capacity = L + 1;
    const auto size = [](Index n) { return static_cast<std::size_t>(n); };
    for (const Isa isa : isas()) {
        std::vector<T> ck(size(B * capacity * Hkv * dh), T(NAN)), cv(size(B * capacity * Hkv * dv), T(NAN)),
            cb(size(B * capacity * Hkv * ds), T(NAN)), row(size(B * Hq * dv));
        std::vector<double> g(size(B * capacity * Hkv), NAN), last(size(B * Hkv), NAN), Phi(size(B * Hkv * ds / 2), NAN);
        sisa::State<T> state{view(ck.data(), {B, capacity, Hkv, dh}), view(cv.data(), {B, capacity, Hkv, dv}),
                             view(cb.data(), {B, capacity, Hkv, ds}), view(g.data(), {B, capacity, Hkv}),
                             view(last.data(), {B, Hkv}), view(Phi.data(), {B, Hkv, ds / 2})};
        sisa::Params<P> params{.lam = view(lam.data(), {static_cast<Index>(lam.size())})};
        HostTensor got = want.tensors["out.o"];
        for (Index t = 0; t < L; ++t) {
            const auto at = [&](const auto& x, Index H, Index d) {
                return view(x.data() + t * H * d, {B, H, d}, {L * H * d, d, Index{1}});
            };
            sisa::Token<T, P> token{.q = at(q, Hq, dh), .k = at(k, Hkv, dh), .v = at(v, Hkv, dv)};
            if (ds > 0) {
                token.C = at(C, Hq, ds), token.B = at(Bc, Hkv, ds), token.theta = at(theta, Hkv, ds / 2);
                token.log_alpha = view(la.data() + t * Hkv, {B, Hkv}, {L * Hkv, Index{1}});
            }
            const sisa::TokenOut<T> out{view(row.data(), {B, Hq, dv})};
            const cpu exec{.threads = 2, .isa = isa};
            std::vector<std::byte> memory(sisa::workspace_size(exec, o, shape_of(state, token), pass::step));
            const Status status = sisa::step(exec, o, params, state, token, out, Workspace{memory.data(), memory.size()});
            ASSERT_TRUE(status.ok()) << status.message();
            ++state.length;
            for (Index b = 0; b < B; ++b)
                for (Index x = 0; x < Hq * dv; ++x)
                    got.values[size((b * L + t) * Hq * dv + x)] = static_cast<double>(row[size(b * Hq * dv + x)]);
        }
        // 16-bit caches round B again after its rotation.
        const double allowed = sizeof(T) == 2 ? (std::is_same_v<T, f16> ? 1e-3 : 1e-2) : tolerance<T>;
        EXPECT_LE(compare("", got, want.tensors["out.o"]).relative, allowed) << to_string(isa) << to_string(dtype_of<T>);
    }
}
TEST(SisaCpu, StepsAreRowsOfForward) {
    for (const Options& o : {Options{}, Options{.window = 40}, Options{.score = Score::sigmoid, .bias = -0.5}})
        for (const Index ds : {0, 6, 16}) {
            expect_steps<f64>(o, ds);
            expect_steps<f32>(o, ds);
            if constexpr (!sanitized) expect_steps<f16>(o, ds);
            expect_steps<bf16>(o, ds);
        }
}

TEST(SisaCpu, StepsOfEveryCacheAreThoseOfTheReference) {
    const auto expect = []<class T>(T, const Options& o, const SisaDecodeSizes& s) {
        SisaDecode<T> stored(s, o, 33);
        SisaDecode<double> truth(stored);
        SCOPED_TRACE(truth.describe());
        const Status status = run_step(reference{}, truth);
        ASSERT_TRUE(status.ok()) << status.message();
        const auto bounds = bounds_of_step<T>(truth);
        for (const Isa isa : isas()) {
            SisaDecode<T> one(s, o, 33), many(s, o, 33);
            const Status ran = run_step(cpu{.threads = 1, .isa = isa}, one);
            ASSERT_TRUE(ran.ok()) << ran.message();
            ASSERT_TRUE(run_step(cpu{.threads = 3, .isa = isa}, many).ok());
            for (std::size_t i = 0; i < one.o.size(); ++i) ASSERT_EQ(static_cast<double>(one.o[i]), static_cast<double>(many.o[i]));
            EXPECT_LE(relative_error(one.o, truth.o), bounds.o) << to_string(dtype_of<T>);
            EXPECT_LE(one.softmax() ? relative_error(one.lse, truth.lse) : 0.0, bounds.lse) << to_string(dtype_of<T>);
            EXPECT_EQ(one.Phi, truth.Phi);
        }
    };
    for (const Options& o : {Options{}, Options{.window = 40}, Options{.score = Score::sigmoid, .bias = -0.5}})
        for (const Index n : {1, 2, 5})
            for (SisaDecodeSizes s : every_sisa_cache(n)) {
                s.bias = n == 2;
                s.head_dim = n == 2 ? 19 : 16;
                expect(f64{}, o, s);
                expect(f32{}, o, s);
                expect(f16{}, o, s);
                expect(bf16{}, o, s);
            }
}

/// The 16-bit rule: the error is at most twice that of the formula with rounded operands, and the rounding of the result.
template <class T>
void expect_sixteen_bit_rule(const Case& c, const Options& options) {
    const Case in = rounded<Operator, T, float>(c), formula = rounded_formula<T>(options, in);
    Case want;
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, in, want).ok()));
    for (const Isa isa : isas()) {
        Case got;
        ASSERT_TRUE((run_case<Operator, T, float>(cpu{.isa = isa}, options, in, got).ok()));
        for (const auto& [name, truth] : want.tensors)
            EXPECT_LE(compare(name, got.tensors[name], truth).relative, sixteen_bit_bound<T>(name, formula, truth))
                << name << " " << to_string(dtype_of<T>) << " " << to_string(isa) << " " << describe(options);
    }
}
/// Values that differ little: delta is much larger than dp - delta.
Case alike(const SisaCase& s, std::uint64_t seed) {
    Case c = make(s, seed);
    for (double& v : values(c, "v")) v = 1.0 + 0.05 * v;
    for (double& v : values(c, "dout.o")) v += 1.0;
    return c;
}
TEST(SisaCpu, SixteenBitRule) {
    // Without rounding the formula is the reference.
    for (const Options& o : all_options()) {
        const Case c = make({.batch = 2, .queries = 50, .keys = 60, .query_heads = 4, .kv_heads = 2,
                             .softmax = o.score == Score::softmax, .half_life = o.mode == Mode::published ? 1.0 : 5.0}, 11);
        Case want;
        ASSERT_TRUE((run_case<Operator, double, double>(reference{}, o, c, want).ok()));
        const Case got = formula_with_operands(o, c, [](double x) { return x; });
        for (const auto& [name, truth] : want.tensors)
            EXPECT_LE(compare(name, got.tensors.at(name), truth).relative, 1e-11) << name << describe(o);
    }
    for (Options o : all_options()) {
        if (o.window > 0) o.window = 45;
        const bool softmax = o.score == Score::softmax;
        for (const SisaCase& s : {SisaCase{.batch = 2, .queries = 130, .keys = 130, .query_heads = 4, .kv_heads = 2, .head_dim = 16,
                                           .value_dim = 5, .state_dim = 6, .softmax = softmax, .half_life = 20.0},
                                  SisaCase{.queries = 65, .keys = 140, .query_heads = 2, .head_dim = 32, .value_dim = 16,
                                           .state_dim = 16, .softmax = softmax, .half_life = 100.0},
                                  SisaCase{.queries = 150, .keys = 150, .query_heads = 2, .kv_heads = 2, .cu_seqlens = {2, 3, 3, 70, 141},
                                           .softmax = softmax, .half_life = 3.0}})
            for (const Case& c : {make(s, 12), alike(s, 13)}) {
                if constexpr (!sanitized) expect_sixteen_bit_rule<f16>(c, o);
                expect_sixteen_bit_rule<bf16>(c, o);
            }
    }
}

TEST(SisaCpu, BackwardOfSixteenBitsWantsWhatForwardKept) {
    const auto status = [&](Index missing) {
        sisa::Inputs<bf16, float> in{};
        std::vector<bf16> x(100, bf16(0.5f)), o(10);
        std::vector<float> p(20, -0.5f), lse(5);
        in.q = view(x.data(), {1, 5, 1, 3}), in.k = in.q, in.v = view(x.data(), {1, 5, 1, 2});
        in.C = view(x.data(), {1, 5, 1, 4}), in.B = in.C, in.theta = view(p.data(), {1, 5, 1, 2});
        in.log_alpha = view(p.data(), {1, 5, 1}), in.lam = view(p.data(), {1});
        const sisa::Outputs<bf16> out{view(o.data(), {1, 5, 1, 2}), view(lse.data(), {1, 5, 1})};
        const cpu exec;
        std::vector<std::byte> memory(sisa::workspace_size(exec, {}, shape_of(in), pass::backward));
        std::vector<std::byte> kept(sisa::saved_size(exec, {}, shape_of(in)));
        EXPECT_EQ(kept.size(), 20u);
        EXPECT_EQ(sisa::saved_size(exec, {.score = Score::sigmoid}, shape_of(in)), 0u);
        const Saved saved{kept.data(), kept.size() - static_cast<std::size_t>(missing)};
        return sisa::backward(exec, {}, in, out, saved, sisa::Upstream<bf16>{.o = in.v}, sisa::Grads<bf16, float>{},
                              Workspace{memory.data(), memory.size()});
    };
    EXPECT_EQ(status(1).code(), StatusCode::workspace_too_small);
    EXPECT_TRUE(status(0).ok());
}

TEST(SisaCpu, LongSumsKeepTheirPrecision) {
    // 65,536 tokens of about a radian each: g goes to the hundreds and Phi to the ten thousands, their differences must not lose it.
    // Queries are the last ones only.
    Case c = make({.queries = 3, .keys = 65536, .half_life = 60.0}, 9);
    for (double& x : c.tensors["theta"].values) x += 1.0;
    expect_close<f32>(c, {}, {Isa::automatic});
    if constexpr (!sanitized) expect_close<f16>(c, {}, {Isa::automatic});
    expect_close<bf16>(c, {}, {Isa::automatic});
}

TEST(SisaCpu, CosSin) {
    std::vector<double> x, c, s;
    for (int i = -4000; i <= 4000; ++i) x.push_back(i * 0.37 + 1e-3 * i * i);
    for (const double v : {0.0, 1e5, -3e5, 1e7, -1e300}) x.push_back(v);
    c.resize(x.size()), s.resize(x.size());
    for (const Isa isa : isas()) {
        simd::run_body<sisa::detail::CosSin<double>>(isa, static_cast<const double*>(x.data()), static_cast<Index>(x.size()),
                                                     c.data(), s.data());
        for (std::size_t i = 0; i < x.size(); ++i) {
            const double allowed = std::abs(x[i]) < 2e4 ? 4e-16 : 1e-11;
            ASSERT_NEAR(c[i], std::cos(x[i]), allowed) << x[i];
            ASSERT_NEAR(s[i], std::sin(x[i]), allowed) << x[i];
        }
    }
}

}  // namespace
}  // namespace interstate::test
