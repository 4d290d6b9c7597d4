// The operators that reference and cpu run. A new operator is an include and a line here: in the first list if both
// run it, in the second while it has no cpu part.
#pragma once

#include <attention/attention.hpp>
#include <component_attention/component_attention.hpp>
#include <feature_map/feature_map.hpp>
#include <gate/gate.hpp>
#include <interdomain/interdomain.hpp>
#include <linear_attention/linear_attention.hpp>
#include <random_features/random_features.hpp>
#include <s4d/s4d.hpp>
#include <sd_attention/sd_attention.hpp>
#include <sd_decomposition/sd_decomposition.hpp>
#include <sisa/sisa.hpp>

#include "operators.hpp"

namespace interstate::tools::replay {

template <class Exec>
inline constexpr Entry<Exec> host_operators[] = {
    run_operator<attention::Operator, Exec>(),
    run_operator<component_attention::Operator, Exec>(),
    run_operator<feature_map::Operator, Exec>(),
    run_operator<gate::Operator, Exec>(),
    run_operator<interdomain::Operator, Exec>(),
    run_operator<linear_attention::Operator, Exec>(),
    run_operator<random_features::Operator, Exec>(),
    run_operator<s4d::Operator, Exec>(),
    run_operator<sd_attention::Operator, Exec>(),
    run_head_operator<sd_decomposition::Operator, Exec>(),
    run_operator<sisa::Operator, Exec>(),
};

inline const std::vector<Entry<reference>> reference_operators = {};

}  // namespace interstate::tools::replay
