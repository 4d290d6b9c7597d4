// The reference of SISA: the definition evaluated another way, finite differences of every gradient,
// causality (and what `published` does to it), decoding, plain attention as a special case, edges and errors;
// then the prelude.
#include <gtest/gtest.h>

#include <algorithm>
#include <complex>
#include <limits>

#include <attention/reference.hpp>
#include <sisa/init.hpp>
#include <sisa/prelude.hpp>
#include <sisa/sisa.hpp>

#include "../support/differences.hpp"
#include "decode.hpp"
#include "prelude_case.hpp"
#include "sisa_cases.hpp"

namespace interstate::test {
namespace {

using sisa::Mode;
using sisa::Operator;
using sisa::Options;
using sisa::Score;

constexpr double inf = std::numeric_limits<double>::infinity();
const char* const every_input[] = {"q", "k", "v", "C", "B", "log_alpha", "theta", "lam"};

template <class T = double, class P = double>
Case run(const Options& options, const Case& c, bool backward = true) {
    Case results;
    const Status status =
        run_case<Operator, T, P>(reference{}, options, c, results, RunOptions{.backward = backward});
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

/// A tensor's rows [begin, end) of its second axis.
HostTensor rows(const HostTensor& x, Index begin, Index end) {
    HostTensor part{x.extent, {}};
    part.extent[1] = end - begin;
    Index width = 1;
    for (std::size_t a = 2; a < x.extent.size(); ++a) width *= x.extent[a];
    for (Index b = 0; b < x.extent[0]; ++b)
        for (Index i = (b * x.extent[1] + begin) * width; i < (b * x.extent[1] + end) * width; ++i)
            part.values.push_back(x.values[static_cast<std::size_t>(i)]);
    return part;
}
/// Fills rows of a tensor's second axis with a number.
void fill_rows(HostTensor& x, Index begin, Index end, double value) {
    Index width = 1;
    for (std::size_t a = 2; a < x.extent.size(); ++a) width *= x.extent[a];
    for (Index b = 0; b < x.extent[0]; ++b)
        for (Index i = (b * x.extent[1] + begin) * width; i < (b * x.extent[1] + end) * width; ++i)
            x.values[static_cast<std::size_t>(i)] = value;
}
/// The values as they lie in memory: NaN equals NaN, 0 is not -0.
bool same_bits(const HostTensor& a, const HostTensor& b) {
    return a.extent == b.extent && a.values.size() == b.values.size() &&
           (a.values.empty() ||
            std::memcmp(a.values.data(), b.values.data(), a.values.size() * sizeof(double)) == 0);
}
double difference(const HostTensor& a, const HostTensor& b) {
    double largest = a.values.size() == b.values.size() ? 0.0 : inf;
    for (std::size_t i = 0; i < a.values.size(); ++i)
        largest = std::max(largest, std::abs(a.values[i] - b.values[i]));
    return largest;
}

/// o of a dense case with one head and one batch row by the definition, in long double and by way of complex
/// numbers: a channel pair is one, R(Phi) a factor exp(i Phi). And the gradient of lam.
struct Direct {
    std::vector<double> o;
    double dlam = 0.0;
};
Direct direct(const Options& options, Case& c) {
    using complex_t = std::complex<long double>;
    const Index L = c.tensors.at("k").extent[1], dh = c.tensors.at("q").extent[3],
                dv = c.tensors.at("v").extent[3], pairs = c.tensors.at("theta").extent[3];
    const auto at = [&](const char* name, Index i) {
        return static_cast<long double>(values(c, name)[std::size_t(i)]);
    };
    Direct result;
    long double dlam = 0;
    for (Index i = 0; i < L; ++i) {
        std::vector<long double> score, slope, weight, total(static_cast<std::size_t>(dv));
        long double largest = -inf, sum = 0;
        for (Index j = 0; j <= i; ++j) {
            long double qk = 0, log_decay = 0;
            for (Index d = 0; d < dh; ++d) qk += at("q", i * dh + d) * at("k", j * dh + d);
            for (Index t = j + 1; t <= i; ++t) log_decay += at("log_alpha", t);
            complex_t importance = 0;
            for (Index n = 0; n < pairs; ++n) {
                long double angle = 0;
                for (Index t = j + 1; t <= i; ++t) angle += at("theta", t * pairs + n);
                const auto channel = [&](const char* name, Index row) {
                    return complex_t(at(name, (row * pairs + n) * 2), at(name, (row * pairs + n) * 2 + 1));
                };
                importance += std::polar(1.0L, angle) * channel("C", i) * std::conj(channel("B", j));
            }
            slope.push_back(std::exp(log_decay) * importance.real());
            score.push_back(qk / std::sqrt(static_cast<long double>(dh)) + at("lam", 0) * slope.back());
            largest = std::max(largest, score.back());
        }
        for (Index j = 0; j <= i; ++j) {
            const long double x = score[std::size_t(j)];
            const long double p = options.score == Score::softmax ? std::exp(x - largest)
                                                                  : 1 / (1 + std::exp(-x - options.bias));
            weight.push_back(p);
            sum += options.score == Score::softmax ? p : 0;
        }
        if (options.score == Score::sigmoid) sum = 1;
        for (Index j = 0; j <= i; ++j)
            for (Index d = 0; d < dv; ++d)
                total[std::size_t(d)] += weight[std::size_t(j)] / sum * at("v", j * dv + d);
        for (Index j = 0; j <= i; ++j) {
            const long double p = weight[std::size_t(j)] / sum;
            long double dp = 0, delta = 0;
            for (Index d = 0; d < dv; ++d) {
                dp += at("dout.o", i * dv + d) * at("v", j * dv + d);
                delta += at("dout.o", i * dv + d) * total[std::size_t(d)];
            }
            const bool softmax = options.score == Score::softmax;
            dlam += slope[std::size_t(j)] * p * (softmax ? dp - delta + at("dout.lse", i) : (1 - p) * dp);
        }
        for (const long double x : total) result.o.push_back(static_cast<double>(x));
    }
    result.dlam = static_cast<double>(dlam);
    return result;
}

// The definition.

TEST(SisaReference, ThreeTokensByHand) {
    // q = 0, so that scores are importance alone; a quarter turn a token, alpha = 1/2, 1/4, 1/8, lambda = 2.
    const double quarter = std::numbers::pi / 2;
    Case c;
    c.tensors = {{"q", {{1, 3, 1, 1}, {0, 0, 0}}},
                 {"k", {{1, 3, 1, 1}, {1, 2, 3}}},
                 {"v", {{1, 3, 1, 1}, {10, 20, 40}}},
                 {"C", {{1, 3, 1, 2}, {1, 0, 0, 1, 0, 3}}},
                 {"B", {{1, 3, 1, 2}, {1, 0, 1, 5, 1, 1}}},
                 {"log_alpha", {{1, 3, 1}, {-std::log(2.0), -std::log(4.0), -std::log(8.0)}}},
                 {"theta", {{1, 3, 1, 1}, {quarter, quarter, quarter}}},
                 {"lam", {{1}, {2}}}};
    const Case got = run({}, c);
    // Row 0: one key. Row 1: C = (0, 1) a quarter turn on is (-1, 0) where B[0] = (1, 0) stands: -1, times
    // 2/4.
    EXPECT_DOUBLE_EQ(got.tensors.at("out.o").values[0], 10);
    EXPECT_NEAR(got.tensors.at("out.lse").values[0], 2.0, 1e-14);
    const double a = std::exp(2.0 * -1.0 / 4.0), b = std::exp(2.0 * 5.0);
    EXPECT_NEAR(got.tensors.at("out.o").values[1], (10 * a + 20 * b) / (a + b), 1e-13);
    // Row 2: C = (0, 3), after two quarters (0, -3), after one (-3, 0): 0 with B[0], -3 with B[1], 3 with
    // B[2].
    const double d = 1.0, e = std::exp(2.0 * -3.0 / 8.0), f = std::exp(2.0 * 3.0);
    EXPECT_NEAR(got.tensors.at("out.o").values[2], (10 * d + 20 * e + 40 * f) / (d + e + f), 1e-13);
    EXPECT_NEAR(got.tensors.at("out.lse").values[2], std::log(d + e + f), 1e-14);
}

TEST(SisaReference, IsTheDefinitionForEveryHalfLife) {
    for (const double half_life : {0.1, 1.0, 10.0, 1e3, 1e6})
        for (const Score score : {Score::softmax, Score::sigmoid})
            for (const bool resets : {false, true}) {
                SCOPED_TRACE(half_life);
                Case c =
                    make({.queries = 60, .keys = 60, .state_dim = 6, .softmax = score == Score::softmax}, 3);
                for (double& x : values(c, "log_alpha")) x = -std::log(2.0) / half_life;
                if (resets) {
                    values(c, "log_alpha")[20] = -inf;
                    values(c, "log_alpha")[21] = -1000.0;
                    values(c, "log_alpha")[30] = -2000.0;
                    values(c, "log_alpha")[40] = -1e300;
                }
                const Options options{.score = score, .bias = score == Score::sigmoid ? -2.0 : 0.0};
                const Case got = run(options, c);
                const Direct want = direct(options, c);
                EXPECT_LT(compare("o", got.tensors.at("out.o"), {{1, 60, 1, 2}, want.o}).relative, 1e-14);
                EXPECT_NEAR(got.tensors.at("grad.lam").values[0], want.dlam,
                            1e-14 * std::max(1.0, std::abs(want.dlam)));
            }
}

TEST(SisaReference, DecayOfAnyLengthCostsNoPrecision) {
    // 4,000 tokens of half-life 0.1 come first: prefix sums would be near -28,000, and their differences off
    // by 1e-12.
    Case near = make({.queries = 6, .keys = 6, .upstream = false}, 5);
    for (double& x : values(near, "theta")) x = 0.0;
    Case far = near;
    const Index ahead = 4000;
    for (const char* name : {"k", "v", "B", "log_alpha", "theta"}) {
        HostTensor& t = far.tensors.at(name);
        const auto width = static_cast<Index>(t.values.size()) / 6;
        t.values.insert(t.values.begin(), static_cast<std::size_t>(ahead * width),
                        std::string(name) == "log_alpha" ? -6.9 : 0.0);
        t.extent[1] += ahead;
    }
    // A window hides them, and leaves what their decay does to the sums.
    const Options options{.window = 6};
    const Case a = run(options, near), b = run(options, far);
    for (Index i = 5; i < 6; ++i)
        EXPECT_TRUE(same_bits(rows(a.tensors.at("out.o"), i, i + 1), rows(b.tensors.at("out.o"), i, i + 1)));
}

TEST(SisaReference, HardResets) {
    Case c = make({.batch = 2, .queries = 9, .keys = 9, .query_heads = 2, .kv_heads = 1}, 6);
    auto& log_alpha = values(c, "log_alpha");
    log_alpha[4] = -1000.0;
    log_alpha[9 + 6] = -inf;
    const Case got = run({}, c);
    EXPECT_EQ(got.tensors.at("grad.log_alpha").values[4], 0.0);
    EXPECT_EQ(got.tensors.at("grad.log_alpha").values[9 + 6], 0.0);
    for (const auto& [name, tensor] : got.tensors)
        for (const double x : tensor.values) EXPECT_TRUE(std::isfinite(x)) << name;
    // Across it only q.k is left: with B zeroed before it, rows from it on are the same bits.
    Case cut = c;
    fill_rows(cut.tensors.at("B"), 0, 4, 0.0);
    const Case without = run({}, cut);
    for (const Index row : {4, 5, 8}) {
        const auto first = [&](const Case& r) {
            HostTensor x = rows(r.tensors.at("out.o"), row, row + 1);
            x.values.resize(4);  // the first batch row
            x.extent[0] = 1;
            return x;
        };
        EXPECT_EQ(difference(first(got), first(without)), 0.0) << row;
    }
    EXPECT_GT(difference(rows(got.tensors.at("out.o"), 3, 4), rows(without.tensors.at("out.o"), 3, 4)), 1e-3);
}

TEST(SisaReference, LamZeroAndNoStateAreAttention) {
    for (const Options& options : all_options()) {
        SCOPED_TRACE(describe(options));
        const bool softmax = options.score == Score::softmax;
        SisaCase o{.batch = 2, .queries = 7, .keys = 11, .query_heads = 4, .kv_heads = 2, .softmax = softmax};
        o.bias = !softmax && options.window > 0;
        o.state_dim = 0;
        const Case c = make(o, 7);
        Case want;
        ASSERT_TRUE((
            run_case<attention::Operator, double, double>(reference{}, attention_of(options), c, want).ok()));
        const Case got = run(options, c);
        ASSERT_EQ(got.tensors.size(), want.tensors.size());
        for (const auto& [name, tensor] : want.tensors)
            EXPECT_TRUE(same_bits(got.tensors.at(name), tensor)) << name;

        o.state_dim = 4;
        Case silent = make(o, 7);
        for (const char* name : {"q", "k", "v", "dout.o", "dout.lse", "bias"})
            if (c.tensors.contains(name)) silent.tensors[name] = c.tensors.at(name);
        for (double& x : values(silent, "lam")) x = 0.0;
        const Case same = run(options, silent);
        for (const auto& [name, tensor] : want.tensors)
            EXPECT_EQ(difference(same.tensors.at(name), tensor), 0.0) << name;
        for (const char* name : {"grad.C", "grad.B", "grad.log_alpha", "grad.theta"})
            for (const double x : same.tensors.at(name).values) EXPECT_EQ(x, 0.0) << name;
        double moved = 0.0;
        for (const double x : same.tensors.at("grad.lam").values) moved = std::max(moved, std::abs(x));
        EXPECT_GT(moved, 1e-3);
    }
}

// Gradients.

TEST(SisaReference, GradientsMatchFiniteDifferences) {
    std::vector<SisaCase> shapes = {
        {.batch = 2, .queries = 5, .keys = 5, .query_heads = 4, .kv_heads = 2, .state_dim = 4},
        {.batch = 1,
         .queries = 3,
         .keys = 7,
         .query_heads = 3,
         .kv_heads = 1,
         .head_dim = 2,
         .value_dim = 3,
         .state_dim = 2},
        {.queries = 12, .keys = 12, .query_heads = 2, .kv_heads = 1, .cu_seqlens = {1, 4, 4, 10}},
    };
    for (const SisaCase& shape : shapes)
        for (Options options : all_options()) {
            // With a small clamp, some of `published` is clamped and some is not.
            for (const double clamp : {11.0, 0.15}) {
                if (options.mode == Mode::exact && clamp != 11.0) continue;
                SCOPED_TRACE(describe(options) + " clamp=" + std::to_string(clamp));
                options.clamp = clamp;
                SisaCase o = shape;
                o.softmax = options.score == Score::softmax;
                o.bias = !o.softmax && options.window > 0;
                const Case c = make(o, 8);
                const auto again = [&](const Case& moved) { return run(options, moved, false); };
                const Case got = run(options, c);
                for (const char* name : every_input)
                    EXPECT_LT(difference_error(c, got, name, 1e-3, 3, again), 1e-9) << name;
            }
        }
}

TEST(SisaReference, GradientsAcrossResetsAndFastDecay) {
    for (const double half_life : {0.1, 1.0, 1e4}) {
        Case c = make({.queries = 9, .keys = 9, .query_heads = 2, .half_life = half_life}, 9);
        values(c, "log_alpha")[3] = -inf;
        values(c, "log_alpha")[6] = -1000.0;
        const auto again = [&](const Case& moved) { return run({}, moved, false); };
        const Case got = run({}, c);
        // Fast decay leaves small gradients of log_alpha and theta: a wider step keeps rounding below them.
        for (const char* name : every_input)
            EXPECT_LT(difference_error(c, got, name, 4e-3, 1, again), 1e-9)
                << name << ", half-life " << half_life;
    }
}

TEST(SisaReference, TiesOfThePublishedOffsetShareEqually) {
    // The two largest and the two smallest g are equal, and clamped: a central difference moves half of the
    // offset's gradient to each of the two.
    const Options options{.mode = Mode::published, .clamp = 0.5};
    Case c = make({.queries = 6, .keys = 6}, 10);
    values(c, "log_alpha") = {-0.3, 0.0, -1.4, -0.2, -2.0, 0.0};
    const auto again = [&](const Case& moved) { return run(options, moved, false); };
    const Case got = run(options, c);
    // At a tie the loss has a kink, of which a difference is of first order only.
    EXPECT_LT(difference_error(c, got, "log_alpha", 1e-7, 1, again), 1e-6);
    double offset = 0.0;
    for (const double x : got.tensors.at("grad.log_alpha").values) offset = std::max(offset, std::abs(x));
    EXPECT_GT(offset, 1e-3);
}

/// eq. 22 and 23: what kernels compute instead of sums between tokens.
TEST(SisaReference, GradientsOfDecayAndAnglesAreReverseSums) {
    const Index L = 12, ds = 6;
    for (const Score score : {Score::softmax, Score::sigmoid}) {
        Case c = make({.queries = L, .keys = L, .state_dim = ds, .softmax = score == Score::softmax}, 11);
        const Case got = run({.score = score}, c);
        const auto value = [&](const Case& of, const std::string& name, Index t, Index d) {
            return of.tensors.at(name).values[static_cast<std::size_t>(t * ds + d)];
        };
        double dg = 0.0, of_lam = 0.0;
        std::vector<double> dPhi(ds / 2, 0.0);
        for (Index t = L - 1; t >= 0; --t) {
            for (Index d = 0; d < ds; ++d) {
                of_lam += value(got, "grad.C", t, d) * value(c, "C", t, d);
                dg += value(got, "grad.C", t, d) * value(c, "C", t, d) -
                      value(got, "grad.B", t, d) * value(c, "B", t, d);
            }
            EXPECT_NEAR(got.tensors.at("grad.log_alpha").values[std::size_t(t)], dg, 1e-13);
            for (Index n = 0; n < ds / 2; ++n) {
                const Index e = 2 * n, o = 2 * n + 1;
                // Rotating a vector and its gradient alike leaves their cross product.
                dPhi[std::size_t(n)] += value(got, "grad.C", t, o) * value(c, "C", t, e) -
                                        value(got, "grad.C", t, e) * value(c, "C", t, o) +
                                        value(got, "grad.B", t, o) * value(c, "B", t, e) -
                                        value(got, "grad.B", t, e) * value(c, "B", t, o);
                EXPECT_NEAR(got.tensors.at("grad.theta").values[std::size_t(t * ds / 2 + n)],
                            dPhi[std::size_t(n)], 1e-13);
            }
        }
        EXPECT_NEAR(got.tensors.at("grad.lam").values[0], of_lam / values(c, "lam")[0], 1e-13);
    }
}

// Causality, and what the published offset does to it.

TEST(SisaReference, ExactIsCausalBitForBit) {
    const Index L = 20;
    for (const Options& options : all_options()) {
        if (options.mode != Mode::exact) continue;
        SCOPED_TRACE(describe(options));
        const Case c = make({.queries = L, .keys = L, .query_heads = 2, .upstream = false}, 12);
        const Case before = run(options, c);
        for (const char* name : {"q", "k", "v", "C", "B", "log_alpha", "theta"})
            for (const Index t : {1, 7, 19})
                for (const double value : {-3.5, -2000.0, double(NAN), -inf}) {
                    Case moved = c;
                    fill_rows(moved.tensors.at(name), t, t + 1, value);
                    const Case after = run(options, moved);
                    for (const auto& [result, tensor] : before.tensors)
                        EXPECT_TRUE(same_bits(rows(tensor, 0, t), rows(after.tensors.at(result), 0, t)))
                            << result << " before " << t << " moved with " << name;
                    EXPECT_FALSE(same_bits(rows(before.tensors.at("out.o"), t, L),
                                           rows(after.tensors.at("out.o"), t, L)))
                        << name << " at " << t << " changed nothing";
                }
    }
}

/// One head of constant decay as a layer begins with: log_alpha = -softplus(-5), 149 tokens to 1/e.
Case published_start(Index L) {
    Case c =
        make({.queries = L, .keys = L, .head_dim = 2, .value_dim = 1, .state_dim = 4, .upstream = false}, 13);
    for (double& x : values(c, "log_alpha")) x = -sisa::prelude::softplus(-5.0);
    return c;
}

TEST(SisaReference, PublishedIsExactUntilTheClampActs) {
    const Options published{.mode = Mode::published};
    const Case c = published_start(2048);
    const Case exact = run({}, c), got = run(published, c);
    for (const char* name : {"out.o", "out.lse"})
        EXPECT_LT(compare(name, got.tensors.at(name), exact.tensors.at(name)).relative, 1e-12) << name;

    // g spans 27 at 4,096 tokens, of which the clamp leaves 22.
    const Case longer = published_start(4096);
    const Case want = run({}, longer), wrong = run(published, longer);
    EXPECT_GT(compare("o", wrong.tensors.at("out.o"), want.tensors.at("out.o")).relative, 0.05);
}

TEST(SisaReference, PublishedLeaksTheFutureOnceTheClampActs) {
    const Options published{.mode = Mode::published};
    const auto past_moves_by = [&](Index L, const Options& options) {
        Case c = published_start(L);
        const Case before = run(options, c);
        values(c, "log_alpha")[static_cast<std::size_t>(L) - 1] = -8.0;  // of the last token
        const Case after = run(options, c);
        return difference(rows(before.tensors.at("out.o"), 0, L - 1),
                          rows(after.tensors.at("out.o"), 0, L - 1));
    };
    EXPECT_LT(past_moves_by(1024, published), 1e-12);
    EXPECT_GT(past_moves_by(4096, published), 0.1);
    EXPECT_EQ(past_moves_by(4096, {}), 0.0);
}

// Packed sequences, parts of a sequence, decoding.

TEST(SisaReference, PackedSequencesAreSequencesOfTheirOwn) {
    const std::vector<double> cu = {2, 5, 5, 9};
    for (Options options : all_options()) {
        SCOPED_TRACE(describe(options));
        options.clamp = 0.2;
        SisaCase o{.queries = 11, .keys = 11, .query_heads = 2, .kv_heads = 1, .cu_seqlens = cu};
        o.softmax = options.score == Score::softmax;
        Case c = make(o, 14);
        for (auto& [name, tensor] : c.tensors)  // NaN where no sequence is, and in the first one
            if (tensor.extent.size() > 2) {
                fill_rows(tensor, 0, 5, NAN);
                fill_rows(tensor, 9, 11, NAN);
            }
        Case alone = c;
        alone.tensors.erase("cu_seqlens");
        for (auto& [name, tensor] : alone.tensors)
            if (tensor.extent.size() > 2) tensor = rows(tensor, 5, 9);
        const Case got = run(options, c), want = run(options, alone);
        for (const auto& [name, tensor] : want.tensors) {
            if (name == "grad.lam") continue;  // a sum over the sequences, one of which is NaN
            EXPECT_TRUE(same_bits(rows(got.tensors.at(name), 5, 9), tensor)) << name;
            for (const Index row : {0, 1, 9, 10})
                for (const double x : rows(got.tensors.at(name), row, row + 1).values)
                    EXPECT_EQ(x, 0.0) << name;
        }
    }
}

TEST(SisaReference, LamOfPackedSequencesIgnoresRowsOutside) {
    Case c = make({.queries = 8, .keys = 8, .cu_seqlens = {2, 6}}, 15);
    for (auto& [name, tensor] : c.tensors)
        if (tensor.extent.size() > 2) fill_rows(tensor, 6, 8, NAN), fill_rows(tensor, 0, 2, NAN);
    EXPECT_TRUE(std::isfinite(run({}, c).tensors.at("grad.lam").values[0]));
}

TEST(SisaReference, PartsOfAPromptAreRowsOfForward) {
    for (const Options& options : all_options()) {
        if (options.mode == Mode::published) continue;  // its offset differs with the keys that there are
        SCOPED_TRACE(describe(options));
        const Case c = make(
            {.batch = 2, .queries = 10, .keys = 10, .query_heads = 4, .kv_heads = 2, .upstream = false}, 16);
        const Case whole = run(options, c);
        for (Index begin = 0; begin < 10; ++begin)
            for (Index end = begin; end <= 10; ++end) {
                Case part = c;
                for (const char* name : {"q", "C"}) part.tensors[name] = rows(c.tensors.at(name), begin, end);
                for (const char* name : {"k", "v", "B", "log_alpha", "theta"})
                    part.tensors[name] = rows(c.tensors.at(name), 0, end);
                const Case got = run(options, part);
                for (const auto& [name, tensor] : got.tensors)
                    EXPECT_TRUE(same_bits(tensor, rows(whole.tensors.at(name), begin, end))) << name;
            }
    }
}

/// A cache with memory of its own, all of it NaN.
template <class T>
struct Cache {
    std::vector<T> k, v, B;
    std::vector<double> g, g_last, Phi;
    sisa::State<T> state;
    Cache(Index batch, Index capacity, Index heads, Index dh, Index dv, Index ds)
        : k(std::size_t(batch * capacity * heads * dh), T(NAN)),
          v(std::size_t(batch * capacity * heads * dv), T(NAN)),
          B(std::size_t(batch * capacity * heads * ds), T(NAN)),
          g(std::size_t(batch * capacity * heads), NAN),
          g_last(std::size_t(batch * heads), NAN),
          Phi(std::size_t(batch * heads * ds / 2), NAN) {
        state.k = view(k.data(), {batch, capacity, heads, dh});
        state.v = view(v.data(), {batch, capacity, heads, dv});
        if (ds == 0) return;
        state.B = view(B.data(), {batch, capacity, heads, ds});
        state.g = view(g.data(), {batch, capacity, heads});
        state.g_last = view(g_last.data(), {batch, heads});
        state.Phi = view(Phi.data(), {batch, heads, ds / 2});
    }
};

/// The tensors of a case in dtype T, as step and append take them: row t of every batch row.
template <class T>
struct Prompt {
    Case& c;
    std::map<std::string, std::vector<T>> storage = {};
    std::map<std::string, std::vector<double>> parameters = {};

    const T* row(const char* name, Index t, Index width) {
        auto& x = storage[name];
        if (x.empty())
            for (const double value : values(c, name)) x.push_back(T(value));
        return x.data() + t * width;
    }
    sisa::Token<T, double> token(Index t) {
        const auto& q = c.tensors.at("q").extent;
        const auto& v = c.tensors.at("v").extent;
        const Index B = q[0], L = q[1], Hq = q[2], dh = q[3], Hkv = v[2], dv = v[3];
        sisa::Token<T, double> token;
        token.q = view(row("q", t, Hq * dh), {B, Hq, dh}, {L * Hq * dh, dh, Index{1}});
        token.k = view(row("k", t, Hkv * dh), {B, Hkv, dh}, {L * Hkv * dh, dh, Index{1}});
        token.v = view(row("v", t, Hkv * dv), {B, Hkv, dv}, {L * Hkv * dv, dv, Index{1}});
        if (!c.tensors.contains("C")) return token;
        const Index ds = c.tensors.at("C").extent[3], pairs = ds / 2;
        token.C = view(row("C", t, Hq * ds), {B, Hq, ds}, {L * Hq * ds, ds, Index{1}});
        token.B = view(row("B", t, Hkv * ds), {B, Hkv, ds}, {L * Hkv * ds, ds, Index{1}});
        token.log_alpha = view(static_cast<const double*>(values(c, "log_alpha").data() + t * Hkv), {B, Hkv},
                               {L * Hkv, Index{1}});
        token.theta = view(static_cast<const double*>(values(c, "theta").data() + t * Hkv * pairs),
                           {B, Hkv, pairs}, {L * Hkv * pairs, pairs, Index{1}});
        return token;
    }
    /// Tokens [begin, end).
    sisa::Keys<T, double> keys(Index begin, Index end) {
        const auto t = token(begin);
        const auto along = [&]<class E>(const View<E, 3>& x) {
            return view(x.data, {x.extent[0], end - begin, x.extent[1], x.extent[2]},
                        {x.stride[0], x.extent[1] * x.extent[2], x.stride[1], x.stride[2]});
        };
        const auto& a = t.log_alpha;
        return {
            along(t.k), along(t.v), along(t.B),
            view(a.data, {a.extent[0], end - begin, a.extent[1]}, {a.stride[0], a.extent[1], a.stride[1]}),
            along(t.theta)};
    }
};

TEST(SisaReference, StepsAreRowsOfForward) {
    const Index B = 2, L = 12, Hq = 4, Hkv = 2, dh = 3, dv = 2;
    for (const Options& options : all_options())
        for (const auto& [ds, resets] : {std::pair<Index, bool>{0, false}, {4, false}, {4, true}})
            for (const Index prompt : {0, 1, 7}) {
                if (options.mode == Mode::published) continue;
                SCOPED_TRACE(describe(options) + " ds=" + std::to_string(ds) +
                             " prompt=" + std::to_string(prompt) + (resets ? " with resets" : ""));
                // A reset takes the running g to -1000 and on, where its steps are 1e-13.
                const double bound = resets ? 1e-12 : 1e-14;
                SisaCase o{.batch = B,
                           .queries = L,
                           .keys = L,
                           .query_heads = Hq,
                           .kv_heads = Hkv,
                           .head_dim = dh,
                           .value_dim = dv,
                           .state_dim = ds,
                           .upstream = false};
                o.bias = options.score == Score::sigmoid && options.window > 0;
                Case c = make(o, 17);
                if (resets)
                    values(c, "log_alpha")[5 * Hkv] = -inf, values(c, "log_alpha")[9 * Hkv + 1] = -1000.0;
                const Case whole = run(options, c);
                Cache<double> cache(B, L + 2, Hkv, dh, dv, ds);
                Prompt<double> tokens{c};
                const Status appended =
                    sisa::append(reference{}, options, cache.state, tokens.keys(0, prompt));
                ASSERT_TRUE(appended.ok()) << appended.message();
                cache.state.length = prompt;
                for (Index t = prompt; t < L; ++t) {
                    sisa::Token<double, double> token = tokens.token(t);
                    if (o.bias) token.bias = view(static_cast<const double*>(values(c, "bias").data()), {Hq});
                    sisa::Params<double> params;
                    if (ds > 0) params.lam = view(static_cast<const double*>(values(c, "lam").data()), {Hq});
                    HostTensor got{{B, 1, Hq, dv}, std::vector<double>(std::size_t(B * Hq * dv))};
                    const sisa::TokenOut<double> out{view(got.values.data(), {B, Hq, dv})};
                    std::vector<std::byte> memory(
                        sisa::workspace_size(reference{}, options, shape_of(cache.state, token), pass::step));
                    const Status status = sisa::step(reference{}, options, params, cache.state, token, out,
                                                     Workspace{memory.data(), memory.size()});
                    ASSERT_TRUE(status.ok()) << status.message();
                    ++cache.state.length;
                    EXPECT_LT(difference(got, rows(whole.tensors.at("out.o"), t, t + 1)), bound) << t;
                }
            }
}

TEST(SisaReference, StepsOfSeveralTokensAreRowsOfForward) {
    for (const Options& options : all_options()) {
        if (options.mode == Mode::published) continue;
        for (const Index n : {1, 2, 5})
            for (SisaDecodeSizes s : every_sisa_cache(n)) {
                s.bias = options.window > 0;
                SisaDecode<double> c(s, options, 31);
                SCOPED_TRACE(c.describe());
                const Status status = run_step(reference{}, c);
                ASSERT_TRUE(status.ok()) << status.message();
                const auto tokens = c.tokens(on_host);
                for (Index b = 0; b < c.batch(); ++b) {
                    const auto keys = c.prompt(b, 0, c.length(b) + n);
                    sisa::Inputs<double, double> in{.q = tokens.q, .k = keys.k, .v = keys.v, .C = tokens.C, .B = keys.B, .log_alpha = keys.log_alpha,
                                                    .theta = keys.theta, .lam = c.params(on_host).lam, .bias = tokens.bias};
                    in.q.data = &tokens.q(b, 0, 0, 0), in.q.extent[0] = 1;
                    if (in.C) in.C.data = &tokens.C(b, 0, 0, 0), in.C.extent[0] = 1;
                    std::vector<double> o(std::size_t(n * s.query_heads * s.value_dim)), lse(std::size_t(n * s.query_heads));
                    sisa::Outputs<double> out{.o = view(o.data(), {Index{1}, n, s.query_heads, s.value_dim})};
                    if (c.softmax()) out.lse = view(lse.data(), {Index{1}, n, s.query_heads});
                    std::vector<std::byte> memory(sisa::workspace_size(reference{}, options, shape_of(in), pass::forward));
                    const Status forward = sisa::forward(reference{}, options, in, out, Saved{}, Workspace{memory.data(), memory.size()});
                    ASSERT_TRUE(forward.ok()) << forward.message();
                    const auto cut = [&](const std::vector<double>& x) {
                        const auto each = static_cast<std::ptrdiff_t>(x.size()) / c.batch();
                        return std::vector<double>(x.begin() + b * each, x.begin() + (b + 1) * each);
                    };
                    EXPECT_LT(relative_error(cut(c.o), o), s.resets ? 1e-11 : 1e-13);
                    EXPECT_LT(c.softmax() ? relative_error(cut(c.lse), lse) : 0.0, s.resets ? 1e-11 : 1e-13);
                }
            }
    }
}

TEST(SisaReference, BadLengthsAndPagesAreRefused) {
    SisaDecode<double> full({{.capacity = 32, .tokens = 2, .lengths = {3, 30}, .page_size = 8}}, {}, 32);
    const std::vector<double> g = full.g_last;
    full.sizes.lengths[1] = 31;
    EXPECT_STREQ(run_step(reference{}, full).message(), "state.lengths: element 1 is 31, must be at least 0 and leave 2 of the 32 rows of the cache");
    full.sizes.lengths[1] = 30;
    full.table[7] = 11;
    EXPECT_STREQ(run_step(reference{}, full).message(), "state.block_table: element (1, 3) is 11, must be at least 0 and below the 11 pages of the cache");
    auto state = full.state(on_host);
    state.g.extent[0] = 2;
    EXPECT_STREQ(sisa::append(reference{}, {}, state, keys_of(full.tokens(on_host))).message(), "state.g: extent of axis 0 is 2, must be 11");
    EXPECT_EQ(g, full.g_last);
    for (const double x : full.o) EXPECT_EQ(x, 777.0);
}

TEST(SisaReference, AppendingInPartsIsAppendingAtOnce) {
    Case c = make({.batch = 2, .queries = 9, .keys = 9, .query_heads = 2, .kv_heads = 2}, 18);
    values(c, "log_alpha")[6] = -inf;
    Prompt<float> tokens{c};
    Cache<float> whole(2, 9, 2, 3, 2, 4), parts(2, 9, 2, 3, 2, 4);
    ASSERT_TRUE(sisa::append(reference{}, {}, whole.state, tokens.keys(0, 9)).ok());
    for (const auto& [begin, end] : {std::pair<Index, Index>{0, 4}, {4, 4}, {4, 5}, {5, 9}}) {
        parts.state.length = begin;
        ASSERT_TRUE(sisa::append(reference{}, {}, parts.state, tokens.keys(begin, end)).ok());
    }
    EXPECT_EQ(whole.k, parts.k);
    EXPECT_EQ(whole.v, parts.v);
    EXPECT_EQ(whole.B, parts.B);
    EXPECT_EQ(whole.g, parts.g);
    EXPECT_EQ(whole.g_last, parts.g_last);
    EXPECT_EQ(whole.Phi, parts.Phi);
    for (const double g : whole.g)
        EXPECT_TRUE(std::isfinite(g)) << "a reset must not make later differences NaN";
}

// Dtypes, edges, errors.

TEST(SisaReference, AnyStorageIsTheSameFormulaRounded) {
    const Case c = make({.batch = 2, .queries = 9, .keys = 9, .query_heads = 2, .kv_heads = 1}, 19);
    const auto narrow = [&]<class T, class P>(T, P, double bound) {
        const Case inputs = rounded<Operator, T, P>(c);
        const Case want = run({}, inputs), got = run<T, P>({}, inputs);
        ASSERT_EQ(want.tensors.size(), 10u);
        for (const TensorError& e : compare(got, want))
            EXPECT_TRUE(e.finite && e.relative < bound) << e.name << e.relative;
    };
    narrow(float{}, float{}, 6e-8);
    narrow(float{}, double{}, 6e-8);
    narrow(double{}, float{}, 6e-8);
    narrow(f16{}, float{}, 5e-4);
    narrow(bf16{}, float{}, 4e-3);
}

TEST(SisaReference, EmptyExtents) {
    for (const Options& options : all_options()) {
        SCOPED_TRACE(describe(options));
        const bool softmax = options.score == Score::softmax;
        for (SisaCase o : {SisaCase{.batch = 0, .queries = 3, .keys = 3}, SisaCase{.queries = 0, .keys = 3},
                           SisaCase{.queries = 0, .keys = 0}, SisaCase{.queries = 1, .keys = 1},
                           SisaCase{.queries = 2, .keys = 2, .query_heads = 0, .kv_heads = 0},
                           SisaCase{.queries = 2, .keys = 2, .query_heads = 0, .kv_heads = 1},
                           SisaCase{.queries = 3, .keys = 3, .value_dim = 0},
                           SisaCase{.queries = 3, .keys = 3, .head_dim = 0},
                           SisaCase{.queries = 0, .keys = 0, .cu_seqlens = {0, 0, 0}},
                           SisaCase{.queries = 3, .keys = 3, .cu_seqlens = {2}}}) {
            o.softmax = softmax;
            const Case got = run(options, make(o, 20));
            EXPECT_EQ(got.tensors.size(), softmax ? 10u : 9u);
            for (const auto& [name, tensor] : got.tensors)
                for (const double x : tensor.values) {
                    EXPECT_TRUE(std::isfinite(x)) << name;
                    if (o.queries == 0 || o.query_heads == 0 || o.cu_seqlens.size() == 1) {
                        EXPECT_EQ(x, 0.0) << name;
                    }
                }
        }
    }
    // One token reads itself: decay and angle are nothing.
    const Case c = make({.queries = 1, .keys = 1}, 21);
    const Case got = run({}, c);
    EXPECT_EQ(difference(got.tensors.at("out.o"), c.tensors.at("v")), 0.0);
    EXPECT_EQ(got.tensors.at("grad.log_alpha").values[0], 0.0);
    EXPECT_EQ(got.tensors.at("grad.theta").values, std::vector<double>(2));
}

/// The views of a small call, and the message of what is wrong with it.
struct Call {
    static constexpr Index L = 4, Hq = 4, Hkv = 2, dh = 2, dv = 2, ds = 4;
    std::vector<double> q = std::vector<double>(L * Hq * dh), k = q, v = q,
                        C = std::vector<double>(L * Hq * ds), B = C, log_alpha = std::vector<double>(L * Hkv),
                        theta = q, lam = std::vector<double>(Hq, 1.0),
                        o = std::vector<double>(L * Hq * dv, 777.0), lse = std::vector<double>(L * Hq, 777.0),
                        dq = o;
    Options options;
    sisa::Inputs<double, double> in{.q = view(cq(q), {Index{1}, L, Hq, dh}),
                                    .k = view(cq(k), {Index{1}, L, Hkv, dh}),
                                    .v = view(cq(v), {Index{1}, L, Hkv, dv}),
                                    .C = view(cq(C), {Index{1}, L, Hq, ds}),
                                    .B = view(cq(B), {Index{1}, L, Hkv, ds}),
                                    .log_alpha = view(cq(log_alpha), {Index{1}, L, Hkv}),
                                    .theta = view(cq(theta), {Index{1}, L, Hkv, ds / 2}),
                                    .lam = view(cq(lam), {Hq})};
    sisa::Outputs<double> out{view(o.data(), {Index{1}, L, Hq, dv}), view(lse.data(), {Index{1}, L, Hq})};

    static const double* cq(const std::vector<double>& x) { return x.data(); }
    std::string message(std::size_t short_of = 0) const {
        std::vector<std::byte> memory(
            sisa::workspace_size(reference{}, options, Call().shape(), pass::forward) - short_of);
        const Status status =
            sisa::forward(reference{}, options, in, out, Saved{}, Workspace{memory.data(), memory.size()});
        EXPECT_FALSE(status.ok());
        for (const double x : o) EXPECT_EQ(x, 777.0);
        return status.message();
    }
    sisa::Shape shape() const { return shape_of(in); }
};

template <class F>
std::string message_of(F&& change, std::size_t short_of = 0) {
    Call call;
    change(call);
    return call.message(short_of);
}

TEST(SisaReference, ErrorsNameTheArgumentAndWriteNothing) {
    const auto nothing = [](Call&) {};
    EXPECT_EQ(message_of(nothing, 1).substr(0, 10), "workspace:");
    EXPECT_EQ(message_of([](Call& c) { c.in.k.data = nullptr; }), "k: is null, must point to 16 elements");
    EXPECT_EQ(message_of([](Call& c) { c.in.v = {}; }), "v: is missing, must be a view");
    EXPECT_EQ(message_of([](Call& c) { c.in.C = {}; }), "C: is missing, must be a view");
    EXPECT_EQ(message_of([](Call& c) { c.in.B = {}; }), "B: is missing, must be a view");
    EXPECT_EQ(message_of([](Call& c) { c.in.C = {}, c.in.B = {}; }), "C: is missing, must be a view");
    EXPECT_EQ(message_of([](Call& c) { c.in.log_alpha = {}; }), "log_alpha: is missing, must be a view");
    EXPECT_EQ(message_of([](Call& c) { c.in.theta.data = nullptr; }),
              "theta: is null, must point to 16 elements");
    EXPECT_EQ(message_of([](Call& c) { c.in.lam = {}; }), "lam: is missing, must be a view");
    EXPECT_EQ(message_of([](Call& c) { c.in.theta.extent[3] = 1; }),
              "theta: extent of axis 3 is 1, must be 2");
    EXPECT_EQ(message_of([](Call& c) { c.in.log_alpha.extent[1] = 3; }),
              "log_alpha: extent of axis 1 is 3, must be 4");
    EXPECT_EQ(message_of([](Call& c) { c.in.C.extent[3] = c.in.B.extent[3] = 3; }),
              "C: state dim is 3, must be even");
    EXPECT_EQ(message_of([](Call& c) { c.in.C.extent[3] = 2; }), "C: extent of axis 3 is 2, must be 4");
    EXPECT_EQ(message_of([](Call& c) { c.in.B.extent[3] = 2; }), "B: extent of axis 3 is 2, must be 4");
    EXPECT_EQ(message_of([](Call& c) { c.in.C.extent[3] = c.in.B.extent[3] = -2; }),
              "C: state dim is -2, must be at least 0 and below 2^31");
    EXPECT_EQ(message_of([](Call& c) { c.in.lam.extent[0] = 2; }), "lam: extent of axis 0 is 2, must be 4");
    EXPECT_EQ(message_of([](Call& c) { c.in.k.extent[2] = 3; }),
              "q: heads is 4, must be a multiple of the heads of k");
    EXPECT_EQ(message_of([](Call& c) { c.in.k.extent[1] = 3; }),
              "q: length is 4, must be at most the length of k");
    EXPECT_EQ(message_of([](Call& c) { c.out.o.stride[1] = 0; }),
              "o: stride of axis 1 is 0, must not be 0 for a tensor that is written");
    EXPECT_EQ(message_of([](Call& c) { c.options.window = -2; }),
              "options.window is -2, must be at least 1, or 0 for none");
    EXPECT_EQ(message_of([](Call& c) { c.options.clamp = 0; }),
              "options.clamp is 0, must be positive and finite");
    EXPECT_EQ(message_of([](Call& c) { c.options.clamp = NAN; }),
              "options.clamp is nan, must be positive and finite");
    EXPECT_EQ(message_of([](Call& c) { c.options.score = Score::sigmoid; }),
              "lse: must be null with score = sigmoid, which has none");
    static const double bias[4] = {};
    EXPECT_EQ(message_of([](Call& c) { c.in.bias = view(bias, {4}); }),
              "bias: must be null with score = softmax, which has none");
    static const std::int32_t decreasing[] = {0, 3, 2}, beyond[] = {0, 5};
    EXPECT_EQ(message_of([](Call& c) { c.in.cu_seqlens = view(decreasing, {3}); }),
              "cu_seqlens: element 2 is 2, must be at least 3 and at most 4");
    EXPECT_EQ(message_of([](Call& c) { c.in.cu_seqlens = view(beyond, {2}); }),
              "cu_seqlens: element 1 is 5, must be at least 0 and at most 4");
    EXPECT_EQ(message_of([](Call& c) {
                  c.in.cu_seqlens = view(beyond, {1});
                  c.in.q.extent[1] = c.in.C.extent[1] = 3;
              }),
              "q: length is 3, must be the length of k with cu_seqlens");

    Call call;
    std::vector<std::byte> memory(
        sisa::workspace_size(reference{}, call.options, call.shape(), pass::backward));
    const auto backward = [&](const sisa::Grads<double, double>& grads) {
        const Status status = sisa::backward(reference{}, call.options, call.in, call.out, Saved{},
                                             sisa::Upstream<double>{.o = call.out.o, .lse = {}}, grads,
                                             Workspace{memory.data(), memory.size()});
        return std::string(status.message());
    };
    EXPECT_EQ(backward({.C = view(call.dq.data(), {Index{1}, Call::L, Call::Hq, Index{2}})}),
              "grad.C: extent of axis 3 is 2, must be 4");
    call.out.lse = {};
    EXPECT_EQ(backward({}), "lse: is null, must be forward's for backward of softmax");

    Options options;
    EXPECT_TRUE(set_option(options, "mode", "published").ok());
    EXPECT_TRUE(set_option(options, "clamp", "7.5").ok());
    EXPECT_EQ(options.mode, Mode::published);
    EXPECT_EQ(options.clamp, 7.5);
    EXPECT_FALSE(set_option(options, "mode", "clamped").ok());
    EXPECT_FALSE(set_option(options, "causal", "false").ok());
}

TEST(SisaReference, DecodingErrors) {
    Case c = make({.queries = 3, .keys = 3}, 22);
    Prompt<double> tokens{c};
    Cache<double> cache(1, 3, 1, 3, 2, 4);
    std::vector<double> o(2, 777.0);
    const auto step = [&](const Options& options, const sisa::State<double>& state,
                          const sisa::Token<double, double>& token) {
        std::vector<std::byte> memory(1 << 14);
        return sisa::step(
            reference{}, options,
            sisa::Params<double>{view(static_cast<const double*>(values(c, "lam").data()), {1})}, state,
            token, sisa::TokenOut<double>{view(o.data(), {1, 1, 2})},
            Workspace{memory.data(), memory.size()});
    };
    const Status published = step({.mode = Mode::published}, cache.state, tokens.token(0));
    EXPECT_EQ(published.code(), StatusCode::unsupported);
    EXPECT_EQ(std::string(published.message()),
              "options.mode is published, must be exact to decode: the published offset is taken over the "
              "whole sequence, "
              "tokens to come included");
    EXPECT_EQ(sisa::append(reference{}, {.mode = Mode::published}, cache.state, tokens.keys(0, 2)).code(),
              StatusCode::unsupported);
    const auto with = [&](auto&& change) {
        sisa::State<double> state = cache.state;
        sisa::Token<double, double> token = tokens.token(0);
        change(state, token);
        const Status status = step({}, state, token);
        EXPECT_FALSE(status.ok());
        return std::string(status.message());
    };
    EXPECT_EQ(with([](auto& state, auto&) { state.length = 3; }),
              "state.length is 3, must be at least 0 and leave 1 of the 3 rows of the cache");
    EXPECT_EQ(with([](auto& state, auto&) { state.length = -1; }),
              "state.length is -1, must be at least 0 and leave 1 of the 3 rows of the cache");
    EXPECT_EQ(with([](auto& state, auto&) { state.g.data = nullptr; }),
              "state.g: is null, must point to 3 elements");
    EXPECT_EQ(with([](auto& state, auto&) { state.Phi.extent[2] = 1; }),
              "state.Phi: extent of axis 2 is 1, must be 2");
    EXPECT_EQ(with([](auto&, auto& token) { token.theta.data = nullptr; }),
              "theta: is null, must point to 2 elements");
    EXPECT_EQ(with([](auto&, auto& token) {
                  token.bias = View<const double, 1>{token.q.data, {1}, {1}};
              }),
              "bias: must be null with score = softmax, which has none");
    EXPECT_EQ(std::string(sisa::append(
                              reference{}, {},
                              [&] {
                                  auto s = cache.state;
                                  s.length = 2;
                                  return s;
                              }(),
                              tokens.keys(0, 2))
                              .message()),
              "state.length is 2, must be at least 0 and leave 2 of the 3 rows of the cache");
    for (const auto* x : {&cache.k, &cache.v, &cache.B, &cache.g, &cache.g_last, &cache.Phi})
        for (const double y : *x) EXPECT_TRUE(std::isnan(y));
    EXPECT_EQ(o, std::vector<double>(2, 777.0));
}

TEST(SisaReference, NullGradientsAreNotComputed) {
    Case c = make({.queries = 4, .keys = 4}, 23);
    const Case all = run({}, c);
    Call call;
    std::vector<std::byte> memory(sisa::workspace_size(reference{}, {}, call.shape(), pass::backward));
    const Workspace ws{memory.data(), memory.size()};
    for (std::size_t i = 0; i < call.C.size(); ++i)
        call.C[i] = std::sin(double(i)), call.B[i] = std::cos(1.0 + double(i));
    for (std::size_t i = 0; i < call.v.size(); ++i) call.v[i] = std::sin(2.0 * double(i));
    ASSERT_TRUE(sisa::forward(reference{}, {}, call.in, call.out, Saved{}, ws).ok());
    std::vector<double> dlam(Call::Hq, 777.0);
    const sisa::Upstream<double> upstream{.o = call.out.o, .lse = {}};
    ASSERT_TRUE(sisa::backward(reference{}, {}, call.in, call.out, Saved{}, upstream,
                               sisa::Grads<double, double>{.lam = view(dlam.data(), {Call::Hq})}, ws)
                    .ok());
    for (const double x : dlam) EXPECT_TRUE(x != 777.0 && x != 0.0);
    ASSERT_TRUE(sisa::backward(reference{}, {}, call.in, call.out, Saved{}, upstream,
                               sisa::Grads<double, double>{}, ws)
                    .ok());
}

// The prelude, and the values that a layer starts from.

TEST(SisaPrelude, SoftplusOfAnySize) {
    using sisa::prelude::softplus;
    EXPECT_DOUBLE_EQ(softplus(0.0), std::log(2.0));
    EXPECT_EQ(softplus(1000.0), 1000.0);
    EXPECT_DOUBLE_EQ(softplus(-700.0), std::exp(-700.0));  // log(1 + exp(x)) would be 0
    EXPECT_EQ(softplus(-inf), 0.0);
    EXPECT_EQ(softplus(inf), inf);
    EXPECT_NEAR(softplus(-5.0), 0.0067153484891180, 1e-16);
    EXPECT_NEAR(std::log(2.0) / softplus(-5.0), 103.2, 0.1);  // the half-life that a layer starts with
}

TEST(SisaPrelude, ForwardAndGradients) {
    PreludeCase<double> raw(2, 5, 24);
    ASSERT_TRUE(raw.forward(reference{}).ok());
    ASSERT_TRUE(raw.backward(reference{}).ok());
    for (std::size_t i = 0; i < raw.alpha.size(); ++i)
        EXPECT_NEAR(raw.log_alpha[i], -std::log(1.0 + std::exp(raw.alpha[i] + raw.b_alpha[i % 3])), 1e-14);
    for (std::size_t h = 0; h < 6; ++h)
        EXPECT_NEAR(raw.lam[h], std::log(1.0 + std::exp(raw.lambda_raw[h])), 1e-14);

    const auto loss = [](PreludeCase<double> moved) {
        EXPECT_TRUE(moved.forward(reference{}).ok());
        double sum = 0.0;
        for (std::size_t i = 0; i < moved.log_alpha.size(); ++i)
            sum += moved.log_alpha[i] * moved.up_alpha[i];
        for (std::size_t h = 0; h < 6; ++h) sum += moved.lam[h] * moved.up_lam[h];
        return sum;
    };
    const auto check = [&](std::vector<double> PreludeCase<double>::*x, const std::vector<double>& gradient) {
        for (std::size_t i = 0; i < gradient.size(); ++i) {
            PreludeCase<double> up = raw, down = raw;
            (up.*x)[i] += 1e-5, (down.*x)[i] -= 1e-5;
            EXPECT_NEAR((loss(up) - loss(down)) / 2e-5, gradient[i], 1e-9) << i;
        }
    };
    check(&PreludeCase<double>::alpha, raw.dalpha);
    check(&PreludeCase<double>::b_alpha, raw.db);
    check(&PreludeCase<double>::lambda_raw, raw.dlambda);
}

TEST(SisaPrelude, TheCpuGivesTheSameBitsForAnyNumberOfThreads) {
    PreludeCase<bf16> want(3, 301, 25);
    ASSERT_TRUE(want.forward(reference{}).ok());
    ASSERT_TRUE(want.backward(reference{}).ok());
    for (const int threads : {1, 2, 3}) {
        PreludeCase<bf16> got(3, 301, 25);
        ASSERT_TRUE(got.forward(cpu{.threads = threads}).ok());
        ASSERT_TRUE(got.backward(cpu{.threads = threads}).ok());
        EXPECT_EQ(got.log_alpha, want.log_alpha);
        EXPECT_EQ(got.lam, want.lam);
        EXPECT_EQ(got.db, want.db);
        EXPECT_EQ(got.dlambda, want.dlambda);
        for (std::size_t i = 0; i < got.dalpha.size(); ++i)
            EXPECT_EQ(got.dalpha[i].bits, want.dalpha[i].bits);
    }
    EXPECT_FALSE(want.forward(cpu{.threads = -1}).ok());
}

TEST(SisaPrelude, RowsOutsideSequencesAreZero) {
    PreludeCase<double> raw(1, 7, 26);
    raw.cu = {2, 4, 6};
    for (const std::size_t row : {0, 1, 6})
        for (std::size_t h = 0; h < 3; ++h) raw.alpha[row * 3 + h] = raw.up_alpha[row * 3 + h] = NAN;
    for (const bool on_cpu : {false, true}) {
        ASSERT_TRUE((on_cpu ? raw.forward(cpu{}) : raw.forward(reference{})).ok());
        ASSERT_TRUE((on_cpu ? raw.backward(cpu{}) : raw.backward(reference{})).ok());
        for (const std::size_t row : {0, 1, 6})
            for (std::size_t h = 0; h < 3; ++h) {
                EXPECT_EQ(raw.log_alpha[row * 3 + h], 0.0);
                EXPECT_EQ(raw.dalpha[row * 3 + h], 0.0);
            }
        for (const double x : raw.db) EXPECT_TRUE(std::isfinite(x) && x != 0.0);
        EXPECT_LT(raw.log_alpha[2 * 3], 0.0);
    }
    raw.cu = {2, 8};
    EXPECT_EQ(std::string(raw.forward(reference{}).message()),
              "cu_seqlens: element 1 is 8, must be at least 2 and at most 7");
}

TEST(SisaPrelude, ErrorsNameTheArgument) {
    PreludeCase<double> raw(1, 4, 27);
    auto in = raw.in(OnHost{});
    const sisa::prelude::Outputs<double> out{view(raw.log_alpha.data(), {Index{1}, Index{4}, Index{3}}), {}};
    EXPECT_EQ(std::string(sisa::prelude::forward(reference{}, in, out).message()),
              "lam: is null, must point to 6 elements");
    in.b_alpha.extent[0] = 2;
    EXPECT_EQ(std::string(sisa::prelude::forward(reference{}, in, out).message()),
              "b_alpha: extent of axis 0 is 2, must be 3");
    in = raw.in(OnHost{}), in.alpha.data = nullptr;
    EXPECT_EQ(std::string(sisa::prelude::forward(reference{}, in, out).message()),
              "alpha: is null, must point to 12 elements");
    in = raw.in(OnHost{}), in.lambda_raw = {};
    EXPECT_TRUE(sisa::prelude::forward(reference{}, in, out).ok());  // lam is not wanted
    for (const double x : raw.lam) EXPECT_EQ(x, 777.0);
}

TEST(SisaInit, ValuesOfTheLayer) {
    const Index D = 40, Hq = 6, Hkv = 3, ds = 8;
    std::vector<float> wb(std::size_t(Hkv * ds * D)), wc(std::size_t(Hq * ds * D)), wa(std::size_t(Hkv * D)),
        ba(Hkv), wt(std::size_t(Hkv * ds / 2 * D)), lr(Hq);
    const sisa::MutableParams<float> params{view(wb.data(), {Hkv, ds, D}),     view(wc.data(), {Hq, ds, D}),
                                            view(wa.data(), {Hkv, D}),         view(ba.data(), {Hkv}),
                                            view(wt.data(), {Hkv, ds / 2, D}), view(lr.data(), {Hq})};
    ASSERT_TRUE(sisa::initialize(1, params).ok());
    const auto deviation = [](const std::vector<float>& w) {
        double sum = 0.0;
        for (const float x : w) sum += double(x) * double(x);
        return std::sqrt(sum / double(w.size()));
    };
    EXPECT_NEAR(deviation(wb), 0.02, 0.002);
    EXPECT_NEAR(deviation(wc), 0.02, 0.002);
    EXPECT_NEAR(deviation(wa), 0.02, 0.004);
    EXPECT_NEAR(deviation(wt), 0.01, 0.001);
    EXPECT_EQ(ba, std::vector<float>(3, -5.0f));
    EXPECT_EQ(lr, std::vector<float>(6, -1.0f));
    EXPECT_NEAR(sisa::prelude::softplus(-1.0), 0.3133, 1e-4);

    const std::size_t total = wb.size() + wc.size() + wa.size() + ba.size() + wt.size() + lr.size();
    EXPECT_EQ(sisa::parameter_count({.width = D, .query_heads = Hq, .kv_heads = Hkv, .state_dim = ds}),
              Index(total));
    const Index H = 12;  // the published count, 2 D H ds + D H + H + D H ds/2 + H
    EXPECT_EQ(sisa::parameter_count({.width = 768, .query_heads = H, .kv_heads = H, .state_dim = 16}),
              2 * 768 * H * 16 + 768 * H + H + 768 * H * 8 + H);

    auto missing = params;
    missing.W_theta = {};
    EXPECT_EQ(std::string(sisa::initialize(1, missing).message()),
              "W_theta: is null, must point to 480 elements");
    auto odd = params;
    odd.W_B.extent[1] = odd.W_C.extent[1] = 7;
    odd.W_theta.extent[1] = 3;
    EXPECT_EQ(std::string(sisa::initialize(1, odd).message()), "W_B: state dim is 7, must be even");
}

}  // namespace
}  // namespace interstate::test
