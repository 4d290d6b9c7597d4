// The umbrella for the cuda executor: every operator that has one.
//
// s4d/fft.cuh (the executor cuda_fft) is not part of it: it is the one header that needs cuFFT.
#pragma once

#include <interstate/verify.cuh>

#include <attention/attention.cuh>
#include <component_attention/component_attention.cuh>
#include <feature_map/feature_map.cuh>
#include <gate/gate.cuh>
#include <interdomain/interdomain.cuh>
#include <linear_attention/linear_attention.cuh>
#include <random_features/random_features.cuh>
#include <s4d/s4d.cuh>
#include <sd_attention/sd_attention.cuh>
#include <sd_decomposition/sd_decomposition.cuh>
#include <sisa/prelude.cuh>
#include <sisa/sisa.cuh>
