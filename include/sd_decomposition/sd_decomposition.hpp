// The routing/filtering decomposition of attention heads, public: the executor `reference`.
//
//   A = Q K^T / sqrt(d) = S + F,   S = (A - A^T) / 2 moves information,   F = (A + A^T) / 2 scales relevance
//
// Source: arXiv 2605.18826; equations, shapes and dtypes: docs/ops/sd_decomposition.md. Arguments and their shapes:
// sd_decomposition/params.hpp.
#pragma once

#include <sd_decomposition/params.hpp>
#include <sd_decomposition/reference.hpp>
