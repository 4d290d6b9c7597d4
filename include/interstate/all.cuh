// The umbrella for the cuda executor: every operator that has one.
#pragma once

#include <interstate/verify.cuh>

#include <s4d/s4d.cuh>
