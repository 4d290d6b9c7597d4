// SISA, public: the executor `reference`. Equations, shapes and units: docs/ops/sisa.md.
//
//     Workspace ws{memory, sisa::workspace_size(exec, options, shape, pass::forward)};
//     Status status = sisa::forward(exec, options, in, out, Saved{}, ws);
//
// forward    o and, for softmax, lse, of q, k, v, C, B, log_alpha, theta and lam (eq. 1 to 12)
// backward   gradients of all of them from the inputs, lse and upstream gradients (eq. 13 to 25)
// append     a prompt's keys into the cache that step reads (eq. 26)
// step       one token for every batch row; options.mode = exact only
//
// Shapes are in sisa/params.hpp, beside each view. A layer's projections become log_alpha and lam in
// sisa/prelude.hpp; the values that it starts from are in sisa/init.hpp.
//
// Source: SISA, arXiv 2606.02332; the mode `exact` is ours.
#pragma once

#include <sisa/params.hpp>
#include <sisa/reference.hpp>
