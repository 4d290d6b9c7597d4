// The reference of attention: hand-computed cases, finite differences of every gradient, edges, errors.
#include "case.hpp"
#include "decode.hpp"

namespace {

using namespace attention_test;
using attention::Options;
using attention::Score;

constexpr double inf = std::numeric_limits<double>::infinity();

std::vector<Options> all_options() {
    std::vector<Options> list;
    for (const bool causal : {true, false})
        for (const Index window : {0, 3})
            for (const Score score : {Score::softmax, Score::sigmoid}) {
                Options o{.causal = causal, .window = window, .score = score};
                if (score == Score::sigmoid) o.bias = -0.7;
                if (window) o.scale = 0.31;
                list.push_back(o);
            }
    return list;
}

TEST(AttentionReference, TwoTokensByHand) {
    // q.k = {1, 2; 3, 4} with scale 1; the second row reads both keys: weights 1/(1+e) and e/(1+e).
    Case<double> c({.B = 1, .Lq = 2, .Lk = 2, .dh = 2, .dv = 1}, {.scale = 1.0});
    c.q = {1, 0, 0, 1};
    c.k = {1, 3, 2, 4};
    c.v = {10, 20};
    ASSERT_TRUE(forward(reference{}, c).ok());
    const double e = std::exp(1.0);
    EXPECT_DOUBLE_EQ(c.o[0], 10);
    EXPECT_DOUBLE_EQ(c.lse[0], 1);
    EXPECT_NEAR(c.o[1], (10 + 20 * e) / (1 + e), 1e-14);
    EXPECT_NEAR(c.lse[1], std::log(std::exp(3.0) + std::exp(4.0)), 1e-14);

    c.options.causal = false;
    ASSERT_TRUE(forward(reference{}, c).ok());
    EXPECT_NEAR(c.o[0], (10 + 20 * e) / (1 + e), 1e-14);
}

TEST(AttentionReference, SigmoidByHand) {
    Case<double> c({.B = 1, .Lq = 2, .Lk = 2, .dh = 1, .dv = 1},
                   {.scale = 2.0, .score = Score::sigmoid, .bias = 0.5});
    c.q = {1, -1};
    c.k = {0.25, 3};
    c.v = {4, 8};
    ASSERT_TRUE(forward(reference{}, c).ok());
    EXPECT_NEAR(c.o[0], 4 / (1 + std::exp(-1.0)), 1e-14);
    EXPECT_NEAR(c.o[1], 4 / (1 + std::exp(0.0)) + 8 / (1 + std::exp(5.5)), 1e-14);
    c.bias = {-0.5};
    c.with_bias = true;  // takes the place of options.bias
    ASSERT_TRUE(forward(reference{}, c).ok());
    EXPECT_NEAR(c.o[0], 4 / (1 + std::exp(0.0)), 1e-14);
}

TEST(AttentionReference, WindowsReadTheKeysTheySay) {
    // Equal scores and v = unit vectors: o shows which keys were read.
    const auto keys_of_row = [](const Options& options, Index Lq, Index Lk, Index row) {
        Case<double> c({.B = 1, .Lq = Lq, .Lk = Lk, .dh = 1, .dv = Lk}, options);
        for (auto& x : c.q) x = 0;
        for (Index j = 0; j < Lk; ++j)
            for (Index d = 0; d < Lk; ++d) c.v[std::size_t(j * Lk + d)] = j == d;
        EXPECT_TRUE(forward(reference{}, c).ok());
        std::string read;
        for (Index j = 0; j < Lk; ++j) read += c.o[std::size_t(row * Lk + j)] > 0 ? 'x' : '.';
        return read;
    };
    EXPECT_EQ(keys_of_row({.causal = true}, 6, 6, 2), "xxx...");
    EXPECT_EQ(keys_of_row({.causal = true, .window = 1}, 6, 6, 2), "..x...");
    EXPECT_EQ(keys_of_row({.causal = true, .window = 2}, 6, 6, 2), ".xx...");
    EXPECT_EQ(keys_of_row({.causal = false}, 6, 6, 2), "xxxxxx");
    EXPECT_EQ(keys_of_row({.causal = false, .window = 1}, 6, 6, 2), "..x...");
    EXPECT_EQ(keys_of_row({.causal = false, .window = 3}, 6, 6, 2), "xxxxx.");
    EXPECT_EQ(keys_of_row({.causal = true}, 2, 6, 0), "xxxxx.");  // the last query stands at the last key
    EXPECT_EQ(keys_of_row({.causal = true, .window = 2}, 2, 6, 1), "....xx");
    EXPECT_EQ(keys_of_row({.causal = false, .window = 2}, 2, 6, 0), "...xxx");
    EXPECT_EQ(keys_of_row({.causal = true, .window = std::numeric_limits<Index>::max()}, 6, 6, 5), "xxxxxx");
    EXPECT_EQ(keys_of_row({.causal = false, .window = std::numeric_limits<Index>::max()}, 6, 6, 5), "xxxxxx");
}

TEST(AttentionReference, BothViewsOfTheMaskAgree) {
    for (const Options& o : all_options())
        for (Index keys = 0; keys < 9; ++keys)
            for (Index i = 0; i < keys; ++i)
                for (Index j = 0; j < keys; ++j) {
                    const RowRange read = attention::keys_read(o, i, keys);
                    const RowRange by = attention::positions_reading(o, j, keys);
                    EXPECT_EQ(j >= read.begin && j < read.end, i >= by.begin && i < by.end);
                }
}

/// Loss = sum dout.o + sum dlse.lse, whose gradients backward must return.
double loss(Case<double>& c) {
    EXPECT_TRUE(forward(reference{}, c).ok());
    double sum = 0;
    for (std::size_t i = 0; i < c.o.size(); ++i) sum += c.o[i] * c.dout[i];
    if (c.softmax())
        for (std::size_t i = 0; i < c.lse.size(); ++i) sum += c.lse[i] * c.dlse[i];
    return sum;
}

TEST(AttentionReference, GradientsMatchFiniteDifferences) {
    const std::vector<Sizes> shapes = {
        {.B = 2, .Lq = 5, .Lk = 5, .Hq = 4, .Hkv = 2, .dh = 3, .dv = 2},
        {.B = 1, .Lq = 3, .Lk = 7, .Hq = 3, .Hkv = 1, .dh = 2, .dv = 4},
        {.B = 1, .Lq = 12, .Lk = 12, .Hq = 2, .Hkv = 1, .dh = 2, .dv = 2, .cu = {1, 4, 4, 10}},
    };
    for (const Sizes& s : shapes)
        for (const Options& o : all_options()) {
            SCOPED_TRACE(describe(s, o));
            Case<double> c(s, o, 7);
            c.with_bias = o.window > 0 && !c.softmax();
            run(reference{}, c);
            const auto check = [&](std::vector<double>& x, const std::vector<double>& grad) {
                Case<double>& moved = c;
                for (std::size_t i = 0; i < x.size(); ++i) {
                    const double old = x[i], h = 1e-4;
                    double at[4];
                    for (int n = 0; n < 4; ++n) {
                        x[i] = old + h * (n < 2 ? n - 2 : n - 1);
                        at[n] = loss(moved);
                    }
                    x[i] = old;
                    // Fourth order: the error is near 1e-11, most of it rounding.
                    EXPECT_NEAR((at[0] - 8 * at[1] + 8 * at[2] - at[3]) / (12 * h), grad[i], 2e-9)
                        << "element " << i;
                }
            };
            check(c.q, std::vector<double>(c.dq));
            check(c.k, std::vector<double>(c.dk));
            check(c.v, std::vector<double>(c.dv));
        }
}

TEST(AttentionReference, AnyStorageIsTheSameFormulaRounded) {
    Case<float> narrow({.B = 1, .Lq = 9, .Lk = 9, .Hq = 2, .Hkv = 1, .dh = 4, .dv = 3}, {}, 3);
    Case<double> wide(narrow);
    run(reference{}, narrow);
    run(reference{}, wide);
    EXPECT_LT(error(narrow.o, wide.o), 6e-8);
    EXPECT_LT(error(narrow.dq, wide.dq), 6e-8);
    EXPECT_LT(error(narrow.dk, wide.dk), 6e-8);
    Case<bf16> half(narrow);
    Case<double> half_wide(half);
    run(reference{}, half);
    run(reference{}, half_wide);
    EXPECT_LT(error(half.o, half_wide.o), 4e-3);
    EXPECT_LT(error(half.dk, half_wide.dk), 4e-3);
}

TEST(AttentionReference, RowsOutsideSequencesAreZeroAndNaNDoesNotCross) {
    for (const Options& o : all_options()) {
        SCOPED_TRACE(o.causal);
        const Sizes s{.B = 1, .Lq = 11, .Lk = 11, .Hq = 2, .Hkv = 1, .dh = 3, .dv = 2, .cu = {2, 5, 5, 9}};
        Case<double> clean(s, o), dirty(s, o);
        for (Index row = 0; row < 11; ++row) {
            if (row >= 5 && row < 9) continue;  // only the last sequence stays clean
            for (Index x = 0; x < 6; ++x) dirty.q[std::size_t(row * 6 + x)] = NAN;
            for (Index x = 0; x < 3; ++x) dirty.k[std::size_t(row * 3 + x)] = NAN;
            for (Index x = 0; x < 2; ++x) dirty.v[std::size_t(row * 2 + x)] = NAN;
            for (Index x = 0; x < 4; ++x) dirty.dout[std::size_t(row * 4 + x)] = NAN;
        }
        run(reference{}, clean);
        run(reference{}, dirty);
        const auto rows = [](const std::vector<double>& x, std::size_t width, std::size_t a, std::size_t b) {
            return std::vector<double>(x.begin() + long(a * width), x.begin() + long(b * width));
        };
        EXPECT_TRUE(same_bits(rows(clean.o, 4, 5, 9), rows(dirty.o, 4, 5, 9)));
        EXPECT_TRUE(same_bits(rows(clean.dq, 6, 5, 9), rows(dirty.dq, 6, 5, 9)));
        EXPECT_TRUE(same_bits(rows(clean.dk, 3, 5, 9), rows(dirty.dk, 3, 5, 9)));
        EXPECT_TRUE(same_bits(rows(clean.dv, 2, 5, 9), rows(dirty.dv, 2, 5, 9)));
        for (const std::size_t row : {0, 1, 9, 10}) {
            EXPECT_EQ(rows(dirty.o, 4, row, row + 1), std::vector<double>(4));
            EXPECT_EQ(rows(dirty.dq, 6, row, row + 1), std::vector<double>(6));
            EXPECT_EQ(rows(dirty.dk, 3, row, row + 1), std::vector<double>(3));
            EXPECT_EQ(rows(dirty.dv, 2, row, row + 1), std::vector<double>(2));
            if (dirty.softmax()) {
                EXPECT_EQ(rows(dirty.lse, 2, row, row + 1), std::vector<double>(2));
            }
        }
    }
}

TEST(AttentionReference, EmptyExtents) {
    for (const Options& o : all_options()) {
        for (const Sizes& s :
             {Sizes{.B = 0, .Lq = 3, .Lk = 3, .dh = 2, .dv = 2}, Sizes{.Lq = 0, .Lk = 3, .dh = 2, .dv = 2},
              Sizes{.Lq = 0, .Lk = 0}, Sizes{.Lq = 2, .Lk = 2, .Hq = 0, .Hkv = 0},
              Sizes{.Lq = 2, .Lk = 2, .Hq = 0, .Hkv = 1}, Sizes{.Lq = 0, .Lk = 0, .cu = {0, 0, 0}}}) {
            Case<double> c(s, o);
            run(reference{}, c);
            EXPECT_EQ(c.dk, std::vector<double>(c.dk.size()));  // nobody read the keys
        }
        Case<double> no_values({.Lq = 2, .Lk = 2, .dh = 3, .dv = 0}, o);
        run(reference{}, no_values);
        // No width of keys: all scores are zero, and weights are even.
        Case<double> c({.Lq = 4, .Lk = 4, .dh = 0, .dv = 1}, {.causal = false});
        run(reference{}, c);
        EXPECT_NEAR(c.o[0], (c.v[0] + c.v[1] + c.v[2] + c.v[3]) / 4, 1e-15);
        EXPECT_NEAR(c.lse[0], std::log(4.0), 1e-15);
    }
}

TEST(AttentionReference, ARowThatReadsNothing) {
    // All scores are -inf: no weight is left, o is zero, lse is -inf, and its gradient is ignored.
    Case<double> c({.Lq = 3, .Lk = 3, .dh = 1, .dv = 2}, {.scale = 1});
    c.q = {1, 1, 1};
    c.k = {-inf, 1, 2};
    run(reference{}, c);
    EXPECT_EQ(c.o[0], 0);
    EXPECT_EQ(c.lse[0], -inf);
    EXPECT_EQ(c.dq[0], 0);
    EXPECT_NEAR(c.o[2], c.v[2], 1e-14);  // -inf is a masked key to the rows below
}

TEST(AttentionReference, HugeScoresDoNotOverflow) {
    Case<double> c({.Lq = 3, .Lk = 3, .dh = 1, .dv = 1}, {.causal = false, .scale = 1});
    c.q = {1e154, -1e154, 0};
    c.k = {1e154, 2, 1e100};
    run(reference{}, c);
    EXPECT_DOUBLE_EQ(c.o[0], c.v[0]);
    EXPECT_DOUBLE_EQ(c.lse[0], 1e308);
    EXPECT_DOUBLE_EQ(c.o[1], c.v[1]);
    for (const double x : c.dq) EXPECT_TRUE(std::isfinite(x));
}

TEST(AttentionReference, StepsAreRowsOfForward) {
    for (const Options& o : all_options()) {
        if (!o.causal) continue;  // a step reads all of the cache: the causal row
        Case<double> c({.B = 2, .Lq = 7, .Lk = 7, .Hq = 4, .Hkv = 2, .dh = 3, .dv = 2}, o);
        c.with_bias = c.options.windowed() && !c.softmax();
        ASSERT_TRUE(forward(reference{}, c).ok());
        std::vector<double> k(2 * 9 * 2 * 3, NAN), v(2 * 9 * 2 * 2, NAN), row(2 * 4 * 2);
        attention::State<double> state{view(k.data(), {2, 9, 2, 3}), view(v.data(), {2, 9, 2, 2})};
        for (Index t = 0; t < 7; ++t) {
            const attention::Inputs<double> in = c.in();
            attention::Token<double> token;
            token.q = view(&in.q(0, t, 0, 0), {2, 4, 3}, {7 * 4 * 3, 3, 1});
            token.k = view(&in.k(0, t, 0, 0), {2, 2, 3}, {7 * 2 * 3, 3, 1});
            token.v = view(&in.v(0, t, 0, 0), {2, 2, 2}, {7 * 2 * 2, 2, 1});
            token.bias = in.bias;
            const attention::TokenOut<double> out{view(row.data(), {2, 4, 2})};
            Memory m(
                attention::workspace_size(reference{}, o, attention::shape_of(state, token), pass::step));
            const Status status =
                attention::step(reference{}, o, attention::Params{}, state, token, out, m.ws);
            ASSERT_TRUE(status.ok()) << status.message();
            ++state.length;
            for (Index b = 0; b < 2; ++b)
                for (Index h = 0; h < 4; ++h)
                    for (Index d = 0; d < 2; ++d) EXPECT_NEAR(out.o(b, h, d), c.out().o(b, t, h, d), 1e-15);
        }
    }
}

TEST(AttentionReference, StepsOfSeveralTokensAreRowsOfForward) {
    using interstate::test::Decode;
    for (const Options& o : all_options())
        for (const Index n : {1, 2, 5})
            for (interstate::test::DecodeSizes s : interstate::test::every_cache(n)) {
                s.bias = o.windowed();
                Decode<double> c(s, o, 7);
                SCOPED_TRACE(c.describe());
                const Status status = interstate::test::run_step(reference{}, c);
                ASSERT_TRUE(status.ok()) << status.message();
                const auto tokens = c.tokens(interstate::test::on_host);
                for (Index b = 0; b < c.batch(); ++b) {
                    const Index Lk = s.lengths[std::size_t(b)] + n, row = s.query_heads * s.value_dim;
                    attention::Inputs<double> in{.q = tokens.q, .bias = tokens.bias};
                    in.q.data = &tokens.q(b, 0, 0, 0), in.q.extent[0] = 1;
                    in.k = view(static_cast<const double*>(&c.all_k[std::size_t(b * s.capacity * s.kv_heads * s.head_dim)]), {Index(1), Lk, s.kv_heads, s.head_dim});
                    in.v = view(static_cast<const double*>(&c.all_v[std::size_t(b * s.capacity * s.kv_heads * s.value_dim)]), {Index(1), Lk, s.kv_heads, s.value_dim});
                    std::vector<double> o_want(std::size_t(n * row)), lse_want(std::size_t(n * s.query_heads));
                    attention::Outputs<double> out{.o = view(o_want.data(), {Index(1), n, s.query_heads, s.value_dim})};
                    if (c.softmax()) out.lse = view(lse_want.data(), {Index(1), n, s.query_heads});
                    Memory m(attention::workspace_size(reference{}, o, attention::shape_of(in), pass::forward));
                    ASSERT_TRUE(attention::forward(reference{}, o, in, out, Saved{}, m.ws).ok());
                    for (std::size_t i = 0; i < o_want.size(); ++i) EXPECT_NEAR(c.o[std::size_t(b * n * row) + i], o_want[i], 1e-14);
                    for (std::size_t i = 0; i < lse_want.size() && c.softmax(); ++i)
                        EXPECT_NEAR(c.lse[std::size_t(b * n * s.query_heads) + i], lse_want[i], 1e-14);
                }
                // What was written, and nothing else.
                for (Index b = 0; b < c.batch(); ++b)
                    for (Index r = 0; r < s.capacity; ++r) {
                        const auto state = c.state(interstate::test::on_host);
                        if (r >= s.lengths[std::size_t(b)] + n) {
                            EXPECT_TRUE(s.page_size > 0 || std::isnan(state.k(b, r, 0, 0)));
                            continue;
                        }
                        const auto at = attention::cache_rows(state).place(b, r);
                        EXPECT_EQ(state.k(at.batch, at.row, 1, 3), c.all_k[std::size_t(((b * s.capacity + r) * s.kv_heads + 1) * s.head_dim + 3)]);
                        EXPECT_EQ(state.v(at.batch, at.row, 0, 2), c.all_v[std::size_t(((b * s.capacity + r) * s.kv_heads) * s.value_dim + 2)]);
                    }
            }
}

TEST(AttentionReference, DecodingErrorsNameTheArgumentAndWriteNothing) {
    using namespace interstate::test;
    const auto message = [](const DecodeSizes& s, auto&& change) {
        Decode<double> c(s, {}, 3);
        const std::vector<double> before = c.cache_k;
        auto state = c.state(on_host);
        auto tokens = c.tokens(on_host);
        auto out = c.out(on_host);
        change(c, state, tokens, out);
        std::vector<std::byte> memory(1 << 16);
        const Status status = attention::step(reference{}, c.options, attention::Params{}, state, tokens, out, Workspace{memory.data(), memory.size()});
        EXPECT_FALSE(status.ok());
        EXPECT_TRUE(same_bits(before, c.cache_k));
        for (const double x : c.o) EXPECT_EQ(x, 777.0);
        return std::string(status.message());
    };
    const DecodeSizes flat{.capacity = 8, .tokens = 2, .lengths = {3, 6}}, paged{.capacity = 8, .tokens = 2, .lengths = {3, 6}, .page_size = 4};
    const auto nothing = [](auto&...) {};
    EXPECT_EQ(message(flat, [](auto&, auto& state, auto&, auto&) { state.lengths = {}; }),
              "state.length is -1, must be at least 0 and leave 2 of the 8 rows of the cache");
    EXPECT_EQ(message({.capacity = 8, .tokens = 2, .lengths = {3, 7}}, nothing),
              "state.lengths: element 1 is 7, must be at least 0 and leave 2 of the 8 rows of the cache");
    EXPECT_EQ(message(flat, [](auto& c, auto&, auto&, auto&) { c.sizes.lengths[0] = -2; }),
              "state.lengths: element 0 is -2, must be at least 0 and leave 2 of the 8 rows of the cache");
    EXPECT_EQ(message(flat, [](auto&, auto& state, auto&, auto&) { state.lengths.extent[0] = 3; }), "state.lengths: extent of axis 0 is 3, must be 2");
    EXPECT_EQ(message(paged, [](auto& c, auto&, auto&, auto&) { c.table[1] = 99; }),
              "state.block_table: element (0, 1) is 99, must be at least 0 and below the 7 pages of the cache");
    EXPECT_EQ(message(paged, [](auto& c, auto&, auto&, auto&) { c.table[2] = -1; }),
              "state.block_table: element (1, 0) is -1, must be at least 0 and below the 7 pages of the cache");
    EXPECT_EQ(message(paged, [](auto&, auto& state, auto&, auto&) { state.block_table.extent[0] = 1; }), "state.block_table: extent of axis 0 is 1, must be 2");
    EXPECT_EQ(message(paged, [](auto&, auto& state, auto&, auto&) { state.v.extent[1] = 5; }), "state.v: extent of axis 1 is 5, must be 4");
    EXPECT_EQ(message(flat, [](auto&, auto&, auto& tokens, auto&) { tokens.k.extent[1] = 1; }), "k: extent of axis 1 is 1, must be 2");
    EXPECT_EQ(message(flat, [](auto&, auto&, auto&, auto& out) { out.lse.extent[2] = 2; }), "lse: extent of axis 2 is 2, must be 1");
    EXPECT_EQ(message({.capacity = 2, .tokens = 3, .lengths = {0, 0}}, nothing), "q: length is 3, must be at most the length of k");
    EXPECT_EQ(message(flat, [](auto& c, auto&, auto&, auto&) { c.options.score = Score::sigmoid; }), "lse: must be null with score = sigmoid, which has none");
}

TEST(AttentionReference, ErrorsNameTheArgumentAndWriteNothing) {
    const Sizes s{.Lq = 4, .Lk = 4, .Hq = 4, .Hkv = 2, .dh = 2, .dv = 2};
    const auto message = [](Case<double>& c, const attention::Inputs<double>& in,
                            const attention::Outputs<double>& out, std::size_t short_of = 0) {
        Memory m(attention::workspace_size(reference{}, c.options, attention::shape_of(in), pass::forward) -
                 short_of);
        const Status status = attention::forward(reference{}, c.options, in, out, Saved{}, m.ws);
        EXPECT_FALSE(status.ok());
        for (const double x : c.o) EXPECT_EQ(x, 777.0);
        return std::string(status.message());
    };
    Case<double> c(s, {});
    auto in = c.in();
    auto out = c.out();
    EXPECT_EQ(message(c, in, out, 1).substr(0, 10), "workspace:");
    in.k.data = nullptr;
    EXPECT_EQ(message(c, in, out), "k: is null, must point to 16 elements");
    in = c.in(), in.v = {};
    EXPECT_EQ(message(c, in, out), "v: is missing, must be a view");
    in = c.in(), in.q.extent[3] = in.k.extent[3] = -1000;
    EXPECT_EQ(message(c, in, out), "q: head dim is -1000, must be at least 0 and below 2^31");
    const double bias[4] = {};
    in = c.in(), in.bias = view(bias, {4});
    EXPECT_EQ(message(c, in, out), "bias: must be null with score = softmax, which has none");
    in = c.in(), in.v.extent[1] = 3;
    EXPECT_EQ(message(c, in, out), "v: extent of axis 1 is 3, must be 4");
    in = c.in(), in.k.extent[2] = in.v.extent[2] = 3;
    EXPECT_EQ(message(c, in, out), "q: heads is 4, must be a multiple of the heads of k");
    in = c.in(), in.k.extent[1] = in.v.extent[1] = 3;
    EXPECT_EQ(message(c, in, out), "q: length is 4, must be at most the length of k");
    in = c.in(), out.o.stride[1] = 0;
    EXPECT_EQ(message(c, in, out), "o: stride of axis 1 is 0, must not be 0 for a tensor that is written");
    out = c.out();
    c.options.window = -2;
    EXPECT_EQ(message(c, in, out), "options.window is -2, must be at least 1, or 0 for none");
    c.options = {.score = Score::sigmoid};
    EXPECT_EQ(message(c, in, out), "lse: must be null with score = sigmoid, which has none");
    c.options = {};
    const std::int32_t cu[] = {0, 3, 2}, beyond[] = {0, 5};
    in.cu_seqlens = view(cu, {3});
    EXPECT_EQ(message(c, in, out), "cu_seqlens: element 2 is 2, must be at least 3 and at most 4");
    in.cu_seqlens = view(beyond, {2});
    EXPECT_EQ(message(c, in, out), "cu_seqlens: element 1 is 5, must be at least 0 and at most 4");

    out.lse.data = nullptr;
    Memory m(attention::workspace_size(reference{}, c.options, attention::shape_of(c.in()), pass::backward));
    EXPECT_STREQ(
        attention::backward(reference{}, c.options, c.in(), out, Saved{}, c.upstream(), c.grads(), m.ws)
            .message(),
        "lse: is null, must be forward's for backward of softmax");
}

TEST(AttentionReference, NullGradientsAreNotComputed) {
    Case<double> c({.Lq = 4, .Lk = 4, .dh = 2, .dv = 2}, {});
    ASSERT_TRUE(forward(reference{}, c).ok());
    Memory m(attention::workspace_size(reference{}, c.options, attention::shape_of(c.in()), pass::backward));
    attention::Grads<double> grads = c.grads();
    grads.k.data = nullptr;
    ASSERT_TRUE(
        attention::backward(reference{}, c.options, c.in(), c.out(), Saved{}, c.upstream(), grads, m.ws)
            .ok());
    EXPECT_EQ(c.dk[0], 777.0);
    EXPECT_NE(c.dq[2], 777.0);
    EXPECT_NE(c.dv[0], 777.0);
}

}  // namespace
