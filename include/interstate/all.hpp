// The umbrella: every operator for the reference and the CPU. The cuda executor: interstate/all.cuh.
//
// s4d/init.hpp (initial parameters) is not part of it: it is the one public header that needs Eigen.
#pragma once

#include <interstate/dispatch.hpp>
#include <interstate/dlpack.hpp>
#include <interstate/executor.hpp>
#include <interstate/options.hpp>
#include <interstate/sequences.hpp>
#include <interstate/verify.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

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
#include <sisa/prelude.hpp>
#include <sisa/sisa.hpp>
