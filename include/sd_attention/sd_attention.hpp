// S-D attention, public: the executor `reference`. Equations, shapes and dtypes: docs/ops/sd_attention.md.
#pragma once

#include <sd_attention/params.hpp>
#include <sd_attention/reference.hpp>
