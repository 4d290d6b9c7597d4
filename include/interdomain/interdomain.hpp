// Interdomain Attention, public: so far the executor `reference` (cuda: interdomain/interdomain.cuh). Equations, shapes
// and units: docs/ops/interdomain.md.
//
//     Workspace ws{memory, interdomain::workspace_size(exec, options, shape, pass::forward)};
//     Status status = interdomain::forward(exec, options, in, out, Saved{}, ws);
#pragma once

#include <interdomain/params.hpp>
#include <interdomain/reference.hpp>
