// The layer around Interdomain Attention: what its cells are made of. That the composition learns is tested with the language
// model (tests/examples).
#include <gtest/gtest.h>

#include <feature_map/feature_map.hpp>
#include <interdomain_layer/interdomain_layer.hpp>

namespace interstate::test {
namespace {

using interdomain_layer::Cell;
using interdomain_layer::Config;

constexpr Config layer(Cell cell) {
    return {.cell = cell, .query_heads = 12, .kv_heads = 12, .features = 64, .value_dim = 64, .modes = 64};
}

/// The smallest of the paper's models: 12 layers of width 768 beside a softmax model's 134,105,856 parameters.
TEST(InterdomainLayer, FullIsThePublishedLayer) {
    static_assert(134105856 + 12 * parameter_count(layer(Cell::full)) == 135416208);
    static_assert(input_columns(layer(Cell::full)) == 3 * 768 && output_columns(layer(Cell::full)) == 768);
    const auto query = query_map(layer(Cell::full)), key = key_map(layer(Cell::full)), value = value_map(layer(Cell::full));
    ASSERT_TRUE(query && key && value);
    EXPECT_TRUE(query->rope == feature_map::Rope::interleaved && query->l2 && !query->rms);
    EXPECT_TRUE(key->rope == feature_map::Rope::interleaved && key->l2 && key->rms);
    EXPECT_TRUE(value->rope == feature_map::Rope::none && !value->l2 && value->rms);
}

TEST(InterdomainLayer, EachCellLacksWhatItsNameSays) {
    const auto no_rope = layer(Cell::no_rope);
    EXPECT_TRUE(query_map(no_rope)->rope == feature_map::Rope::none && key_map(no_rope)->rope == feature_map::Rope::none);
    EXPECT_TRUE(query_map(no_rope)->l2 && key_map(no_rope)->rms);
    for (const Cell cell : {Cell::single_input, Cell::s4d_only}) EXPECT_FALSE(key_map(layer(cell)) || value_map(layer(cell)));
    for (const Cell cell : {Cell::linear_contraction, Cell::s4d_only}) EXPECT_FALSE(query_map(layer(cell)));
    EXPECT_TRUE(query_map(layer(Cell::single_input)) && key_map(layer(Cell::linear_contraction)));
}

/// Parameters listed one by one, with sizes that cannot be confused.
TEST(InterdomainLayer, ParametersAreThoseOfTheParts) {
    const Index Hq = 6, Hkv = 2, R = 8, d = 10, M = 5, taps = 3;
    const Index A_and_dt = Hkv * (2 * M + 1), norms = R + d + Hkv * (R + d);
    const auto of = [&](Cell cell) {
        return parameter_count(Config{cell, Hq, Hkv, R, d, M, taps});
    };
    const Index conv_q = Hq * R * (taps + 1), conv_k = Hkv * R * (taps + 1);
    EXPECT_EQ(of(Cell::full), conv_q + conv_k + norms + A_and_dt + Hkv * 2 * M * M);
    EXPECT_EQ(of(Cell::no_rope), of(Cell::full));
    EXPECT_EQ(of(Cell::single_input), conv_q + A_and_dt + Hkv * 2 * M * M);
    EXPECT_EQ(of(Cell::linear_contraction), conv_k + norms + A_and_dt + Hkv * (R + d) * 2 * M);
    EXPECT_EQ(of(Cell::s4d_only), A_and_dt + Hkv * (R + d) * 2 * M);
}

TEST(InterdomainLayer, EveryCellHasTheSameStateAndProjections) {
    for (const Cell cell : interdomain_layer::all_cells) {
        Config c = layer(cell);
        EXPECT_EQ(state_size(c), 12 * 2 * 64 * 128) << to_string(cell);
        // With as many features as values, and as many heads of both kinds: four square matrices.
        EXPECT_EQ(input_columns(c) + output_columns(c), 4 * 768) << to_string(cell);
        EXPECT_EQ(conv_state_size(c), (c.has_query() + c.has_keys()) * 3 * 768) << to_string(cell);
        c.gate = true;
        EXPECT_EQ(input_columns(c), input_columns(layer(cell)) + output_columns(c)) << to_string(cell);
        EXPECT_EQ(parameter_count(c), parameter_count(layer(cell))) << to_string(cell);
    }
}

}  // namespace
}  // namespace interstate::test
