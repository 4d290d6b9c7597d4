// The layer around Interdomain Attention: which operators it is made of, in what order, and what is left of it in each
// ablation. Source: arXiv 2605.24330; docs/ops/interdomain_layer.md.
//
// It is a description and calls nothing: the projections between the operators are matrix products that belong to the user's
// framework. Cell::full without the gate is composed, with backward and step, in examples/01_language_model/mixers/interdomain.cpp,
// Cell::s4d_only in s4d_only.hpp beside it; the gate and the other cells have no example. A folder of its own, because it
// looks at operators that must not look at each other.
#pragma once

#include <optional>

#include <feature_map/params.hpp>
#include <interdomain/init.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain_layer {

/// The published layer and its ablations. Each takes away what its name says and nothing else.
enum class Cell : std::uint8_t {
    full,                // queries read a state that keys and values drive
    no_rope,             // the feature maps without rotary positions
    single_input,        // generic projections a and b, as they are, in the place of keys and values
    linear_contraction,  // a learned contraction in the place of the query: S4D over the channels of keys and values
    s4d_only,            // both: S4D over generic projections
};
inline constexpr Cell all_cells[] = {Cell::full, Cell::no_rope, Cell::single_input, Cell::linear_contraction, Cell::s4d_only};

constexpr const char* to_string(Cell cell) {
    switch (cell) {
        case Cell::full: return "full";
        case Cell::no_rope: return "no_rope";
        case Cell::single_input: return "single_input";
        case Cell::linear_contraction: return "linear_contraction";
        case Cell::s4d_only: return "s4d_only";
    }
    return "?";
}

struct Config {
    Cell cell = Cell::full;
    Index query_heads = 0;  // Hq, a multiple of Hkv; not used without a query
    Index kv_heads = 0;     // Hkv
    Index features = 0;     // R, of a query and a key (or of a)
    Index value_dim = 0;    // d (or of b)
    Index modes = 0;        // M
    Index taps = 4;         // of the convolutions of queries and keys
    bool gate = false;      // the output gate, off in the published layer

    /// Whether queries read the state (then `interdomain` is called), or a learned contraction (then `s4d` is).
    constexpr bool has_query() const { return cell != Cell::linear_contraction && cell != Cell::s4d_only; }
    /// Whether keys and values drive the state, or the projections a and b as they are.
    constexpr bool has_keys() const { return cell != Cell::single_input && cell != Cell::s4d_only; }
};

/// The options with which feature_map is called for queries, keys and values; none where the cell does not call it.
constexpr std::optional<feature_map::Options> query_map(const Config& c) {
    if (!c.has_query()) return std::nullopt;
    auto options = feature_map::Options::query();
    if (c.cell == Cell::no_rope) options.rope = feature_map::Rope::none;
    return options;
}
constexpr std::optional<feature_map::Options> key_map(const Config& c) {
    if (!c.has_keys()) return std::nullopt;
    auto options = feature_map::Options::key();
    if (c.cell == Cell::no_rope) options.rope = feature_map::Rope::none;
    return options;
}
constexpr std::optional<feature_map::Options> value_map(const Config& c) {
    if (!c.has_keys()) return std::nullopt;
    return feature_map::Options::value();
}

/// Columns of what the state is read into, and rows of the output projection: a head's values, or without a query every
/// channel of the state.
constexpr Index output_columns(const Config& c) {
    return c.has_query() ? c.query_heads * c.value_dim : c.kv_heads * (c.features + c.value_dim);
}
/// Columns of the input projection: queries (where there are some), keys and values or a and b, and the gate's.
constexpr Index input_columns(const Config& c) {
    return (c.has_query() ? c.query_heads * c.features : 0) + c.kv_heads * (c.features + c.value_dim) +
           (c.gate ? output_columns(c) : 0);
}

/// Parameters beside the two projections, that in with input_columns (the gate's are among them) and that out; complex
/// numbers count twice. For `full` it is interdomain::parameter_count, which is what the paper's totals contain.
constexpr Index parameter_count(const Config& c) {
    Index count = interdomain::parameter_count({.query_heads = c.query_heads,
                                                .kv_heads = c.kv_heads,
                                                .features = c.features,
                                                .value_dim = c.value_dim,
                                                .modes = c.modes,
                                                .taps = c.taps});
    if (!c.has_query()) {
        count -= c.query_heads * c.features * (c.taps + 1);                        // the convolution of queries
        count += c.kv_heads * 2 * c.modes * (c.features + c.value_dim - c.modes);  // C: (R + d, M), not (M, M)
    }
    if (!c.has_keys())  // the convolution of keys, and the norms of keys and values
        count -= c.kv_heads * c.features * (c.taps + 1) + (c.features + c.value_dim) * (1 + c.kv_heads);
    return count;
}

/// Reals that decoding keeps of a sequence whatever its length, 2 M (R + d) a key/value head in every cell,
constexpr Index state_size(const Config& c) { return c.kv_heads * 2 * c.modes * (c.features + c.value_dim); }
/// and beside them the last taps-1 rows of what the convolutions read.
constexpr Index conv_state_size(const Config& c) {
    const Index heads = (c.has_query() ? c.query_heads : 0) + (c.has_keys() ? c.kv_heads : 0);
    return heads * c.features * (c.taps > 1 ? c.taps - 1 : 0);
}

}  // namespace interdomain_layer
}  // namespace interstate::inline INTERSTATE_ABI
