// The list of mixers: see registry.cpp to add one.
#pragma once

#include <string>
#include <vector>

#include "../mixer.hpp"

namespace demo {

const std::vector<MixerEntry>& all_mixers();

/// Throws InputError, with the names that are known.
const MixerEntry& mixer_named(const std::string& name);

}  // namespace demo
