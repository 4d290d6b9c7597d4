// The library's random numbers: bit for bit the same everywhere, and one number of state to write to a checkpoint.
#pragma once

#include <interstate/random.hpp>

namespace demo {

using Random = interstate::Random64;

}  // namespace demo
