// The sizes that interdomain and its ablation share.
#pragma once

#include <interdomain_layer/interdomain_layer.hpp>

#include "../mixer.hpp"

namespace demo {

namespace interdomain_layer = interstate::interdomain_layer;

/// A head as wide as its share of the residual stream, for queries, keys and values alike.
inline interdomain_layer::Config layer_of(interdomain_layer::Cell cell, const MixerConfig& config) {
    return {.cell = cell,
            .query_heads = config.heads,
            .kv_heads = config.heads,
            .features = config.width / config.heads,
            .value_dim = config.width / config.heads,
            .modes = config.modes};
}

}  // namespace demo
