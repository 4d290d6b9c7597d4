// The reference is the truth of everything else, so it is checked against the stages written out another way, and
// against finite differences.
#include <complex>

#include <gtest/gtest.h>

#include <feature_map/reference.hpp>

#include "../support/differences.hpp"
#include "feature_map_cases.hpp"

namespace interstate::test {
namespace {

using feature_map::Activation;
using feature_map::Operator;
using feature_map::Options;
using feature_map::Rope;

Case run(const Case& c, const Options& options) {
    Case results;
    const Status status = run_case<Operator, double, double>(reference{}, options, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

/// One stage at a time over the whole tensor, RoPE as a product of complex numbers.
TEST(FeatureMapReference, EqualsTheStagesOneByOne) {
    const Index B = 2, L = 9, H = 3, R = 6;
    for (const Index taps : {0, 1, 3, 4, 8})
        for (const Options& options : all_options()) {
            Case c = make({.batch = B, .length = L, .heads = H, .features = R, .taps = taps, .upstream = false}, options, 7);
            std::vector<double> y = values(c, "x");
            const auto at = [&](Index b, Index t, Index h, Index r) { return ((b * L + t) * H + h) * R + r; };
            for (Index b = 0; b < B && taps > 0; ++b)
                for (Index t = 0; t < L; ++t)
                    for (Index h = 0; h < H; ++h)
                        for (Index r = 0; r < R; ++r) {
                            double sum = values(c, "conv_bias")[h * R + r];
                            for (Index lag = 0; lag < taps; ++lag) {
                                const Index from = t - lag, state = taps - 1 + from;
                                const double x = from >= 0
                                                     ? values(c, "x")[at(b, from, h, r)]
                                                     : values(c, "conv0")[((b * (taps - 1) + state) * H + h) * R + r];
                                sum += values(c, "conv_weight")[(h * R + r) * taps + taps - 1 - lag] * x;
                            }
                            y[at(b, t, h, r)] = sum;
                        }
            for (Index i = 0; i < B * L * H; ++i) {
                double* const row = y.data() + i * R;
                for (Index pair = 0; pair < R / 2 && options.rope != Rope::none; ++pair) {
                    const Index step = options.rope == Rope::interleaved ? 1 : R / 2;
                    const Index first = options.rope == Rope::interleaved ? 2 * pair : pair;
                    const double position = values(c, "offset")[i / (L * H)] + static_cast<double>(i / H % L);
                    const double frequency = 1.0 / std::pow(10000.0, 2.0 * static_cast<double>(pair) / static_cast<double>(R));
                    const std::complex<double> z = std::complex<double>(row[first], row[first + step]) *
                                                   std::polar(1.0, position * frequency);
                    row[first] = z.real();
                    row[first + step] = z.imag();
                }
                double sum = 0.0;
                for (Index r = 0; r < R; ++r) {
                    if (options.activation == Activation::silu) row[r] *= 0.5 * (1.0 + std::tanh(0.5 * row[r]));
                    sum += row[r] * row[r];
                }
                if (options.l2)
                    for (Index r = 0; r < R; ++r) row[r] /= std::sqrt(sum + 1e-6);
                sum = 0.0;
                for (Index r = 0; r < R; ++r) sum += row[r] * row[r] / static_cast<double>(R);
                if (options.rms)
                    for (Index r = 0; r < R; ++r)
                        row[r] = row[r] / std::sqrt(sum + 1e-6) * values(c, "scale")[r] + values(c, "bias")[i % H * R + r];
            }
            Case got = run(c, options);
            for (std::size_t i = 0; i < y.size(); ++i)
                ASSERT_NEAR(values(got, "out.y")[i], y[i], 1e-11 * (1.0 + std::abs(y[i]))) << describe(options) << taps;
        }
}

TEST(FeatureMapReference, PublishedLayer) {
    EXPECT_EQ(describe(Options::query()), "rope=interleaved silu l2");
    EXPECT_EQ(describe(Options::key()), "rope=interleaved silu l2 rms");
    EXPECT_EQ(describe(Options::value()), "rope=none rms");
    EXPECT_EQ(Options::key().base, 10000.0);
    EXPECT_EQ(Options::key().eps, 1e-6);
}

/// eq. 8: the norms one after the other are one, also where eps is most of the sum.
TEST(FeatureMapReference, TwoNormsAreOne) {
    for (const double size : {0.0, 1e-6, 1e-3, 1.0, 1e4})
        for (const int norms : {1, 2, 3}) {
            Options options{.rope = Rope::none, .activation = Activation::none};
            options.l2 = norms & 1;
            options.rms = norms & 2;
            const Index R = 7;
            Case c;
            c.tensors["x"] = Random(3).normal({1, 1, 1, R}, size);
            double sum = 0.0;
            for (const double x : values(c, "x")) sum += x * x;
            const feature_map::Norm norm = norm_of(options, R);
            Case got = run(c, options);
            for (Index r = 0; r < R; ++r) {
                const double want = values(c, "x")[r] / std::sqrt(norm.slope * sum + norm.offset);
                EXPECT_NEAR(values(got, "out.y")[r], want, 1e-14 * std::abs(want));
            }
        }
}

/// Loss = <dout, out>; every gradient against differences.
TEST(FeatureMapReference, GradientsMatchFiniteDifferences) {
    for (const Options& options : all_options())
        for (const Index taps : {0, 1, 4})
            for (const bool packed : {false, true}) {
                FeatureMapCase o{.batch = packed ? 1 : 2, .length = packed ? 9 : 6, .heads = 2, .features = 4, .taps = taps};
                if (packed) o.cu_seqlens = {1, 3, 3, 8};
                const Case c = make(o, options, 11);
                const Case got = run(c, options);
                for (const char* name : {"x", "conv_weight", "conv_bias", "scale", "bias", "conv0"}) {
                    if (!c.tensors.contains(name)) continue;
                    EXPECT_LE(difference_error(c, got, name, 1e-4, 5, [&](const Case& at) { return run(at, options); }), 2e-7)
                        << name << " " << describe(options) << " taps " << taps << (packed ? ", packed" : "");
                }
            }
}

/// Angles hold at positions where float ones are off by whole turns: RoPE depends on differences of positions alone.
TEST(FeatureMapReference, AnglesHoldAtLargePositions) {
    const Options options{.activation = Activation::none, .l2 = false};
    Case c;
    c.tensors["x"] = Random(5).normal({1, 2, 1, 64});
    const auto dot = [&](double offset) {
        c.tensors["offset"] = {{1}, {offset}};
        Case got = run(c, options);
        double sum = 0.0;
        for (Index r = 0; r < 64; ++r) sum += values(got, "out.y")[r] * values(got, "out.y")[64 + r];
        return sum;
    };
    for (const double offset : {1.0, 65536.0, 1e6}) EXPECT_NEAR(dot(offset), dot(0.0), 1e-9);
}

TEST(FeatureMapReference, PiecesThatCarryTheStateAndStepsAreOneCall) {
    const Index B = 2, L = 9, H = 2, R = 6;
    for (const Options& options : {Options::query(), Options::key(), Options::value()})
        for (const Index taps : {1, 2, 4, 8}) {
            const Index past = taps - 1;
            const Case c = make({.batch = B, .length = L, .heads = H, .features = R, .taps = taps, .upstream = false}, options, 5);
            Case whole = run(c, options);
            Case rest = c;
            std::vector<double> y(values(whole, "out.y").size());
            Index done = 0;
            for (const Index piece : {2, 0, 1, 6}) {
                Case part = rest;
                part.tensors["x"] = {{B, piece, H, R}, {}};
                for (Index b = 0; b < B; ++b) {
                    const auto from = c.tensors.at("x").values.begin() + (b * L + done) * H * R;
                    auto& x = values(part, "x");
                    x.insert(x.end(), from, from + piece * H * R);
                }
                Case got = run(part, options);
                for (Index b = 0; b < B; ++b)
                    for (Index i = 0; i < piece * H * R; ++i)
                        y[(b * L + done) * H * R + i] = values(got, "out.y")[b * piece * H * R + i];
                rest.tensors["conv0"] = got.tensors.at("out.convT");
                if (options.rope != Rope::none)
                    for (double& at : values(rest, "offset")) at += static_cast<double>(piece);
                done += piece;
            }
            ASSERT_EQ(done, L);
            EXPECT_EQ(y, values(whole, "out.y"));
            EXPECT_EQ(values(rest, "conv0"), values(whole, "out.convT"));

            // Token by token, in place.
            Case copy = c;
            const auto data = [&](const char* name) -> const double* {
                return copy.tensors.contains(name) ? values(copy, name).data() : nullptr;
            };
            feature_map::Params<double> params{.conv_weight = view(data("conv_weight"), {H, R, taps}),
                                               .conv_bias = view(data("conv_bias"), {H, R})};
            if (options.rms) params.scale = view(data("scale"), {R}), params.bias = view(data("bias"), {H, R});
            std::vector<std::int32_t> position(B, 0);
            for (Index b = 0; b < B && options.rope != Rope::none; ++b)
                position[b] = static_cast<std::int32_t>(values(copy, "offset")[b]);
            std::vector<double> state = values(copy, "conv0"), out(B * H * R);
            state.push_back(0.0);  // not null, even where it holds nothing
            for (Index t = 0; t < L; ++t) {
                const feature_map::Token<double> token{
                    .x = {data("x") + t * H * R, {B, H, R}, {L * H * R, R, 1}},
                    .position = view(static_cast<const std::int32_t*>(position.data()), {B})};
                std::vector<char> memory(workspace_size(reference{}, options, shape_of(params, token), pass::step));
                const Status s = step(reference{}, options, params,
                                      feature_map::State<double>{view(state.data(), {B, past, H, R})}, token,
                                      feature_map::TokenOut<double>{view(out.data(), {B, H, R})},
                                      Workspace{memory.data(), memory.size()});
                ASSERT_TRUE(s.ok()) << s.message();
                for (Index b = 0; b < B; ++b)
                    for (Index i = 0; i < H * R; ++i)
                        ASSERT_EQ(out[b * H * R + i], values(whole, "out.y")[(b * L + t) * H * R + i]);
                for (std::int32_t& p : position) ++p;
            }
            state.pop_back();
            EXPECT_EQ(state, values(whole, "out.convT"));
        }
}

TEST(FeatureMapReference, SequencesDoNotTouch) {
    const Options options = Options::key();
    const Case clean = make({.length = 20, .heads = 2, .cu_seqlens = {2, 7, 7, 15}}, options, 9);
    Case dirty = clean;
    for (const char* name : {"x", "dout.y"})
        for (Index t = 0; t < 20; ++t)
            if (t < 2 || t >= 7)
                for (Index i = 0; i < 8; ++i) values(dirty, name)[t * 8 + i] = std::nan("");
    Case a = run(clean, options), b = run(dirty, options);
    for (const char* name : {"out.y", "grad.x"})
        for (Index t = 0; t < 20; ++t)
            for (Index i = 0; i < 8; ++i) {
                const double x = values(b, name)[t * 8 + i];
                if (t >= 7 && t < 15)
                    EXPECT_TRUE(std::isnan(x)) << name << t;
                else
                    EXPECT_EQ(x, t >= 2 && t < 7 ? values(a, name)[t * 8 + i] : 0.0) << name << t;
            }
    // The empty sequence passes its state on.
    for (Index i = 0; i < 3 * 8; ++i) {
        EXPECT_EQ(values(a, "out.convT")[24 + i], clean.tensors.at("conv0").values[24 + i]);
        EXPECT_EQ(values(a, "grad.conv0")[24 + i], clean.tensors.at("dout.convT").values[24 + i]);
    }
}

TEST(FeatureMapReference, ErrorsNameTheArgument) {
    const auto message = [](const Case& c, const Options& options) {
        Case results;
        const Status s = run_case<Operator, double, double>(reference{}, options, c, results);
        EXPECT_EQ(s.code(), StatusCode::invalid_argument);
        return std::string(s.message());
    };
    const auto says = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
    const FeatureMapCase good{.length = 3, .heads = 2};
    Case c = make({.length = 3, .heads = 2, .features = 5}, Options{}, 1);
    EXPECT_TRUE(says(message(c, {}), "features are 5, must be even"));
    c = make({.length = 3, .heads = 2, .taps = 9}, Options{}, 1);
    EXPECT_TRUE(says(message(c, {}), "taps are 9"));
    c = make(good, Options::key(), 1);
    EXPECT_TRUE(says(message(c, Options::query()), "scale: must be null"));
    c = make(good, Options::query(), 1);
    c.tensors.erase("conv_weight");
    EXPECT_TRUE(says(message(c, {}), "conv_bias: must be null"));
    c = make(good, Options::query(), 1);
    EXPECT_TRUE(says(message(c, {.rope = Rope::none}), "offset: must be null"));
    EXPECT_TRUE(says(message(c, {.base = 0.0}), "options.base is 0"));
    EXPECT_TRUE(says(message(c, {.eps = 0.0}), "options.eps is 0"));
    c.tensors["conv0"] = Random(1).normal({1, 4, 2, 4});
    EXPECT_TRUE(says(message(c, {}), "conv0: extent of axis 1 is 4, must be 3"));
    c = make(good, Options::query(), 1);
    c.tensors["cu_seqlens"] = {{2}, {1, 4}};
    EXPECT_TRUE(says(message(c, {}), "cu_seqlens: element 1 is 4"));
    Options options;
    for (const auto& [name, value] : {std::pair{"rope", "half_split"}, std::pair{"activation", "none"}, std::pair{"l2", "false"},
                                      std::pair{"rms", "true"}, std::pair{"base", "500"}, std::pair{"eps", "1e-5"}})
        EXPECT_TRUE(set_option(options, name, value).ok());
    EXPECT_TRUE(options.rope == Rope::half_split && options.activation == Activation::none && !options.l2 && options.rms &&
                options.base == 500.0 && options.eps == 1e-5);
    EXPECT_TRUE(says(set_option(options, "rope", "spiral").message(), "none|interleaved|half_split"));
}

}  // namespace
}  // namespace interstate::test
