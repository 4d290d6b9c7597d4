// Checkpoints: one safetensors file from which a run continues bit for bit. It is also an ordinary
// file of weights that any tool reads.
//
//     metadata "run"        JSON: sizes, seed, text, and how far every mixer has come
//     metadata "checksum"   of everything else, so that damage is found before it is trained on
//     tensors               "s4d/block0.mixer.in" and so on; for a mixer still in training also
//                           AdamW's two moments, ".first_moment" and ".second_moment"
//
// A mixer that has not started has no tensors: its seed is all it needs.
#pragma once

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

#include <unistd.h>

#include <nlohmann/json.hpp>

#include "../../tools/support/safetensors.hpp"
#include "train.hpp"

namespace demo {

/// All the mixers of one run of the program: what was asked for, and how far it has come.
struct Experiment {
    ModelConfig config;
    Index steps = 0;
    std::uint64_t seed = 0;
    std::vector<MixerRun> mixers;
};

inline Experiment new_experiment(const ModelConfig& config, const std::vector<std::string>& names,
                                 Index steps, std::uint64_t seed) {
    Experiment run{.config = config, .steps = steps, .seed = seed, .mixers = {}};
    for (const std::string& name : names) run.mixers.push_back(new_run(name, config, seed));
    return run;
}

namespace detail {

using Json = nlohmann::json;
using interstate::tools::SafetensorsFile;
using interstate::tools::SafetensorsTensor;

inline constexpr const char* format_name = "interstate language model, version 1";

inline Json to_json(const ModelConfig& c) {
    return {{"width", c.width}, {"hidden", c.hidden},   {"blocks", c.blocks}, {"heads", c.heads},
            {"modes", c.modes}, {"context", c.context}, {"batch", c.batch},   {"peak_rate", c.peak_rate}};
}

inline Json to_json(const Result& r) {
    return {{"validation_bits", r.validation_bits}, {"bytes_per_second", r.bytes_per_second},
            {"decode_us_256", r.decode_us_256},     {"decode_us_4096", r.decode_us_4096},
            {"state_bytes_256", r.state_bytes_256}, {"state_bytes_4096", r.state_bytes_4096}};
}

inline Result result_from(const Json& json) {
    return {.validation_bits = json.at("validation_bits").get<double>(),
            .bytes_per_second = json.at("bytes_per_second").get<double>(),
            .decode_us_256 = json.at("decode_us_256").get<double>(),
            .decode_us_4096 = json.at("decode_us_4096").get<double>(),
            .state_bytes_256 = json.at("state_bytes_256").get<Index>(),
            .state_bytes_4096 = json.at("state_bytes_4096").get<Index>()};
}

inline std::string checksum(const SafetensorsFile& file) {
    const std::string& run = file.metadata.at("run");
    std::uint64_t hash = fnv1a(run.data(), run.size());
    for (const auto& [name, tensor] : file.tensors) {
        hash = fnv1a(name.data(), name.size(), hash);
        hash = fnv1a(tensor.data.data(), tensor.data.size(), hash);
    }
    return std::to_string(hash);
}

/// f(tensor name, matrix) for what a checkpoint holds of a mixer that has done at least one step.
template <class MaybeConstRun, class F>
void for_each_tensor(MaybeConstRun& mixer, F&& f) {
    if (mixer.step == 0) return;
    const Parameters& parameters = mixer.model->parameters();
    for (std::size_t i = 0; i < parameters.size(); ++i) {
        const std::string name = mixer.name + "/" + parameters[i]->name;
        f(name, parameters[i]->value);
        if (mixer.result) continue;
        f(name + ".first_moment", mixer.optimizer->moments()[i].first);
        f(name + ".second_moment", mixer.optimizer->moments()[i].second);
    }
}

}  // namespace detail

/// Writes atomically: whatever happens, `path` holds either its old content or all of the new.
inline void save_checkpoint(const std::string& path, const Experiment& run, const Text& text) {
    detail::Json mixers = detail::Json::array();
    interstate::tools::SafetensorsFile file;
    for (const MixerRun& mixer : run.mixers) {
        detail::Json entry{{"name", mixer.name},
                           {"step", mixer.step},
                           {"random", mixer.data.state()},
                           {"seconds", mixer.seconds}};
        if (mixer.result) entry["result"] = detail::to_json(*mixer.result);
        mixers.push_back(entry);
        detail::for_each_tensor(mixer, [&](const std::string& name, const Matrix& m) {
            const std::span<const float> values(m.data(), static_cast<std::size_t>(m.size()));
            file.tensors.emplace(name, interstate::tools::make_tensor(values, {m.rows(), m.cols()}));
        });
    }
    file.metadata["format"] = detail::format_name;
    file.metadata["run"] = detail::Json{
        {"config", detail::to_json(run.config)},
        {"steps", run.steps},
        {"seed", run.seed},
        {"text", {{"bytes", text.size()}, {"hash", text.hash()}}},
        {"mixers", mixers}}.dump();
    file.metadata["checksum"] = detail::checksum(file);
    interstate::tools::write_safetensors(path, file);
}

/// Reads a checkpoint back. It must belong to this text and to models of these sizes; anything wrong
/// with it is an InputError that says what.
inline Experiment load_checkpoint(const std::string& path, const ModelConfig& config, const Text& text) {
    const auto bad = [&](const std::string& what) { return InputError("checkpoint " + path + ": " + what); };
    interstate::tools::SafetensorsFile file;
    try {
        file = interstate::tools::read_safetensors(path);
    } catch (const interstate::tools::SafetensorsError& error) {
        throw InputError(std::string("checkpoint ") + error.what());
    }
    const auto has = [&](const char* key) { return file.metadata.count(key) == 1; };
    if (!has("format") || file.metadata["format"] != detail::format_name || !has("run") || !has("checksum"))
        throw bad("is not a checkpoint of this program");
    if (file.metadata["checksum"] != detail::checksum(file))
        throw bad("is damaged, its checksum does not match");

    try {
        const auto json = detail::Json::parse(file.metadata["run"]);
        if (json.at("text").at("hash") != text.hash() || json.at("text").at("bytes") != text.size())
            throw bad("was made with another text than " + text.name());
        if (json.at("config") != detail::to_json(config))
            throw bad("was made with models of other sizes: " + json.at("config").dump() + ", now " +
                      detail::to_json(config).dump());
        Experiment run{.config = config,
                       .steps = json.at("steps").get<Index>(),
                       .seed = json.at("seed").get<std::uint64_t>(),
                       .mixers = {}};
        if (run.steps < 1) throw bad("was made for no steps");
        for (const auto& entry : json.at("mixers")) {
            MixerRun mixer = new_run(entry.at("name").get<std::string>(), config, run.seed);
            mixer.step = entry.at("step").get<Index>();
            mixer.data = Random(entry.at("random").get<std::uint64_t>());
            mixer.seconds = entry.at("seconds").get<double>();
            if (mixer.step < 0 || mixer.step > run.steps)
                throw bad("has an impossible step for mixer " + mixer.name);
            if (entry.contains("result")) mixer.result = detail::result_from(entry.at("result"));
            detail::for_each_tensor(mixer, [&](const std::string& name, Matrix& m) {
                const auto found = file.tensors.find(name);
                if (found == file.tensors.end()) throw bad("lacks the tensor " + name);
                const auto& tensor = found->second;
                if (tensor.dtype != "F32" || tensor.shape != std::vector<std::int64_t>{m.rows(), m.cols()})
                    throw bad("tensor " + name + " must be F32 of shape [" + std::to_string(m.rows()) + ", " +
                              std::to_string(m.cols()) + "]");
                std::memcpy(m.data(), tensor.data.data(), tensor.data.size());
            });
            run.mixers.push_back(std::move(mixer));
        }
        if (run.mixers.empty()) throw bad("holds no mixer");
        return run;
    } catch (const nlohmann::json::exception& error) {
        throw bad(std::string("cannot be understood: ") + error.what());
    }
}

/// Refuses, before hours are spent, a path that could not be written in the end, and one that holds
/// something already: nothing is ever replaced but the checkpoint that a run continues.
inline void check_new_checkpoint_path(const std::string& path) {
    namespace fs = std::filesystem;
    const auto bad = [&](const std::string& what) { return InputError("checkpoint " + path + ": " + what); };
    std::error_code error;
    if (fs::symlink_status(path, error).type() != fs::file_type::not_found)
        throw bad("exists already; continue it with --resume, or name a new file");
    const fs::path folder = fs::path(path).has_parent_path() ? fs::path(path).parent_path() : fs::path(".");
    if (!fs::is_directory(folder, error)) throw bad("there is no folder " + folder.string());
    if (access(folder.c_str(), W_OK | X_OK) != 0)
        throw bad("cannot be written: " + std::string(std::strerror(errno)));
    if (!fs::path(path).has_filename()) throw bad("must be the name of a file");
}

/// A name for the checkpoint of a run that was not given one: the first that is free.
inline std::string free_checkpoint_path() {
    const std::string stem = "language_model";
    std::string path = stem + ".safetensors";
    for (int n = 2; std::filesystem::exists(std::filesystem::symlink_status(path)); ++n)
        path = stem + "-" + std::to_string(n) + ".safetensors";
    return path;
}

}  // namespace demo
