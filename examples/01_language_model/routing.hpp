// What is asked of trained attention heads: how many dimensions of routing they use, and what their first layer's softmax is worth.
#pragma once

#include <sd_decomposition/sd_decomposition.hpp>

#include "train.hpp"

namespace demo {

/// Means over the heads of a layer and over windows of held-out text. A = Q K^T / sqrt(d) has a skew-symmetric part, which moves
/// information from position to position (routing), and a symmetric part.
struct LayerRouting {
    double rank = 0.0;    // effective rank of the skew-symmetric part; d of Q and K allow 2 d
    double energy = 0.0;  // its share of the squares of all scores
};

/// Of every layer; empty for mixers whose heads have no queries and keys.
inline std::vector<LayerRouting> routing_of(Model& model, const Text& text, const ModelConfig& config) {
    namespace sd = interstate::sd_decomposition;
    constexpr std::size_t most_windows = 16;
    Windows windows(config);
    const std::size_t count = std::min(most_windows, text.windows());
    for (std::size_t w = 0; w < count; ++w) windows.add(text.validation_window(w * text.windows() / count));
    model.forward(windows.bytes(), windows.batch(), false);
    std::vector<LayerRouting> layers;
    for (Index b = 0; b < config.blocks; ++b) {
        const Scores scores = model.mixer(b).scores();
        if (!scores.queries) return {};
        const sd::Inputs<float> in{.Q = scores.queries, .K = scores.keys};
        const sd::Shape shape = sd::shape_of(in);
        Matrix rank(shape.batch, shape.query_heads), energy(shape.batch, shape.query_heads);
        const interstate::Index extent[] = {shape.batch, shape.query_heads};
        const interstate::cpu all_threads;
        std::vector<std::byte> memory(sd::workspace_size(all_threads, {}, shape, interstate::pass::forward));
        check(sd::forward(all_threads, {}, in,
                          sd::Outputs<float>{.routing_energy = view(energy.data(), extent),
                                             .routing_effective_rank = view(rank.data(), extent)},
                          interstate::Saved{}, interstate::Workspace{memory.data(), memory.size()}),
              "sd_decomposition::forward");
        layers.push_back({rank.mean(), energy.mean()});
    }
    return layers;
}

/// Validation bits per byte with the first layer in its linear form: as it stands, and after a short training of the whole model.
struct LinearisedFirstLayer {
    double at_once = 0.0;
    double retrained = 0.0;
};

inline constexpr Index retraining_steps = 50;

/// A mixer like `entry` whose first layer is that of its linear form.
inline MixerEntry with_linear_first_layer(const MixerEntry& entry) {
    MixerEntry mixed = entry;
    mixed.make = [rest = entry.make, first = mixer_named(entry.linear_form).make](const std::string& name, const MixerConfig& config,
                                                                                 Random& random) {
        return (name.starts_with("block0.") ? first : rest)(name, config, random);
    };
    return mixed;
}

/// The trained model is left as it is. Stops early, and says nothing of use then, when `stop` is set.
inline LinearisedFirstLayer linearise_first_layer(const MixerRun& trained, const Text& text, const ModelConfig& config, std::uint64_t seed,
                                                  const std::atomic<bool>& stop) {
    const MixerEntry entry = with_linear_first_layer(mixer_named(trained.name));
    ModelConfig gentle = config;
    gentle.peak_rate = config.peak_rate / 10.0;  // where training ended
    MixerRun run = new_run(entry, gentle, seed);
    for (std::size_t p = 0; p < run.model->parameters().size(); ++p)
        run.model->parameters()[p]->value = trained.model->parameters()[p]->value;
    LinearisedFirstLayer bits;
    bits.at_once = validate(*run.model, entry, text, config);
    Trainer trainer(run, entry, text, gentle, retraining_steps);
    for (Index i = 0; i < retraining_steps && !stop; ++i) trainer.step();
    bits.retrained = stop ? 0.0 : validate(*run.model, entry, text, config);
    return bits;
}

}  // namespace demo
