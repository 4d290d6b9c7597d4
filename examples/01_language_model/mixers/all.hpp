// The registry. A new mixer is one file beside this one, one #include and one line.
#pragma once

#include "interdomain.hpp"
#include "linear.hpp"
#include "s4d.hpp"
#include "s4d_only.hpp"
#include "sd.hpp"
#include "sisa.hpp"
#include "softmax.hpp"

namespace demo {

template <class M>
std::unique_ptr<Mixer> make_mixer(const std::string& name, const MixerConfig& config, Random& random) {
    return std::make_unique<M>(name, config, random);
}

inline const std::vector<MixerEntry>& all_mixers() {
    static const std::vector<MixerEntry> entries{
        {"s4d", "diagonal state space layer, gated", true, make_mixer<S4dMixer>},
        {"softmax", "causal softmax attention, rotary positions", true, make_mixer<SoftmaxMixer>, "linear"},
        {"sisa", "SISA: softmax attention with an importance from a state space model", true,
         make_mixer<SisaMixer>},
        {"interdomain", "Interdomain Attention: queries read a compressed past", true,
         make_mixer<InterdomainMixer>},
        {"s4d_only", "ablation of interdomain: its recurrence without queries, keys and values", true,
         make_mixer<S4dOnlyMixer>},
        {"sd", "S-D attention: one projection for queries and keys, routing minus filtering", true,
         make_mixer<SdMixer<sd_attention::Normalizer::softmax>>, "sd_linear"},
        {"sd_linear", "S-D attention in its linear form: ELU + 1 in place of the softmax", false,
         make_mixer<SdMixer<sd_attention::Normalizer::elu1>>},
        {"linear", "softmax in its linear form: linear attention, ELU + 1 in place of the softmax", false,
         make_mixer<LinearMixer>},
    };
    return entries;
}

inline const MixerEntry& mixer_named(const std::string& name) {
    std::string known;
    for (const MixerEntry& entry : all_mixers()) {
        if (entry.name == name) return entry;
        known += (known.empty() ? "" : ", ") + entry.name;
    }
    throw InputError("mixer " + name + ": unknown, must be one of " + known);
}

}  // namespace demo
