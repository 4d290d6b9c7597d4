// A new mixer is one file beside this one, its name in the declaration below, and one line of the list.
#include "registry.hpp"

namespace demo {

MakeMixer make_interdomain, make_linear, make_s4d, make_s4d_only, make_sd, make_sd_linear, make_sisa, make_softmax;

const std::vector<MixerEntry>& all_mixers() {
    static const std::vector<MixerEntry> entries{
        {"s4d", "diagonal state space layer, gated", true, make_s4d},
        {"softmax", "causal softmax attention, rotary positions", true, make_softmax, "linear"},
        {"sisa", "SISA: softmax attention with an importance from a state space model", true, make_sisa},
        {"interdomain", "Interdomain Attention: queries read a compressed past", true, make_interdomain},
        {"s4d_only", "ablation of interdomain: its recurrence without queries, keys and values", true, make_s4d_only},
        {"sd", "S-D attention: one projection for queries and keys, routing minus filtering", true, make_sd, "sd_linear"},
        {"sd_linear", "S-D attention in its linear form: ELU + 1 in place of the softmax", false, make_sd_linear},
        {"linear", "softmax in its linear form: linear attention, ELU + 1 in place of the softmax", false, make_linear},
    };
    return entries;
}

const MixerEntry& mixer_named(const std::string& name) {
    std::string known;
    for (const MixerEntry& entry : all_mixers()) {
        if (entry.name == name) return entry;
        known += (known.empty() ? "" : ", ") + entry.name;
    }
    throw InputError("mixer " + name + ": unknown, must be one of " + known);
}

}  // namespace demo
