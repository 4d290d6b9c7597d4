// SPDX-License-Identifier: Apache-2.0
//
// A BERT encoder as Hugging Face stores it, run in float32 for what its attention is given: attention is the library's own, matrix
// products are Eigen's.
#pragma once

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <numbers>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <Eigen/Core>
#include <nlohmann/json.hpp>

#include <attention/attention.hpp>

#include "../support/safetensors.hpp"
#include "tokenizer.hpp"

namespace interstate::tools {

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using RowVector = Eigen::Matrix<float, 1, Eigen::Dynamic, Eigen::RowMajor>;

inline void check(const Status& status) {
    if (!status.ok()) throw DecomposeError(status.message());
}

struct BertConfig {
    Index width = 0, layers = 0, heads = 0, inner = 0, positions = 0, vocabulary = 0, types = 0;
    double epsilon = 1e-12;

    Index head_dim() const { return width / heads; }
};

inline constexpr const char* supported_models =
    "supported: BERT encoders (model_type bert: BertModel, BertForMaskedLM and the like; LayerNorm after every residual, hidden_act "
    "gelu, absolute positions, not a decoder) in one model.safetensors of F32, F16 or BF16";

inline nlohmann::json read_json(const std::filesystem::path& path) {
    const nlohmann::json json = nlohmann::json::parse(read_text_file(path), nullptr, false);
    if (!json.is_object()) throw DecomposeError(path.string() + ": not a JSON object");
    return json;
}

inline BertConfig read_bert_config(const std::filesystem::path& path) {
    const nlohmann::json json = read_json(path);
    const auto must_be = [&](const char* key, const char* want, bool required) {
        const auto found = json.find(key);
        if (found == json.end() && !required) return;
        if (found == json.end() || *found != want)
            throw DecomposeError(path.string() + ": " + key + " is " + (found == json.end() ? "missing" : found->dump()) + "; " +
                                 supported_models);
    };
    must_be("model_type", "bert", true);
    must_be("hidden_act", "gelu", true);
    must_be("position_embedding_type", "absolute", false);
    if (const auto decoder = json.find("is_decoder"); decoder != json.end() && *decoder != false)
        throw DecomposeError(path.string() + ": is_decoder is " + decoder->dump() + "; " + supported_models);
    const auto size = [&](const char* key) {
        const auto found = json.find(key);
        if (found == json.end() || !found->is_number_integer() || *found < 1 || *found > (1 << 24))
            throw DecomposeError(path.string() + ": " + key + " is " + (found == json.end() ? "missing" : found->dump()) +
                                 ", must be a number from 1 to 2^24");
        return found->get<Index>();
    };
    BertConfig c{.width = size("hidden_size"), .layers = size("num_hidden_layers"), .heads = size("num_attention_heads"),
                 .inner = size("intermediate_size"), .positions = size("max_position_embeddings"),
                 .vocabulary = size("vocab_size"), .types = size("type_vocab_size")};
    if (c.width % c.heads != 0)
        throw DecomposeError(path.string() + ": hidden_size is " + std::to_string(c.width) + ", must be a multiple of the " +
                             std::to_string(c.heads) + " heads");
    if (c.positions < 3) throw DecomposeError(path.string() + ": max_position_embeddings is below 3");
    if (const auto epsilon = json.find("layer_norm_eps"); epsilon != json.end()) {
        if (!epsilon->is_number() || !(*epsilon >= 0.0))
            throw DecomposeError(path.string() + ": layer_norm_eps is " + epsilon->dump() + ", must be 0 or above");
        c.epsilon = epsilon->get<double>();
    }
    return c;
}

/// What tokenizer_config.json says; BERT's defaults where there is none.
inline TokenizerOptions read_tokenizer_options(const std::filesystem::path& path) {
    TokenizerOptions options;
    if (!std::filesystem::exists(path)) return options;
    const nlohmann::json json = read_json(path);
    const auto flag = [&](const char* key, bool otherwise) {
        const auto found = json.find(key);
        if (found == json.end() || found->is_null()) return otherwise;
        if (!found->is_boolean()) throw DecomposeError(path.string() + ": " + key + " is " + found->dump() + ", must be true or false");
        return found->get<bool>();
    };
    options.lower_case = flag("do_lower_case", true);
    options.strip_accents = flag("strip_accents", options.lower_case);
    options.split_cjk = flag("tokenize_chinese_chars", true);
    return options;
}

struct Linear {
    Matrix weight;  // (out, in)
    RowVector bias;

    Matrix operator()(const Matrix& x) const {
        Matrix y = x * weight.transpose();
        y.rowwise() += bias;
        return y;
    }
};

struct LayerNorm {
    RowVector gain, bias;
    double epsilon = 0.0;

    void operator()(Matrix& x) const {
        for (Index t = 0; t < x.rows(); ++t) {
            const double mean = x.row(t).cast<double>().mean();
            const double variance = (x.row(t).cast<double>().array() - mean).square().mean();
            const auto scale = static_cast<float>(1.0 / std::sqrt(variance + epsilon));
            x.row(t) = ((x.row(t).array() - static_cast<float>(mean)) * scale * gain.array() + bias.array()).matrix();
        }
    }
};

struct BertLayer {
    Linear query, key, value, attention_output, intermediate, output;
    LayerNorm attention_norm, output_norm;
};

class Bert {
  public:
    explicit Bert(const std::filesystem::path& directory) : config_(read_bert_config(directory / "config.json")) {
        const std::filesystem::path path = directory / "model.safetensors";
        if (!std::filesystem::exists(path)) throw DecomposeError(path.string() + ": is not there; " + supported_models);
        const SafetensorsFile file = read_safetensors(path);
        std::string prefix;
        for (const char* candidate : {"", "bert."})
            if (file.tensors.contains(std::string(candidate) + "embeddings.word_embeddings.weight")) prefix = candidate;

        const auto tensor = [&](const std::string& name, std::vector<std::int64_t> shape) {
            const auto found = file.tensors.find(prefix + name);
            if (found == file.tensors.end()) throw DecomposeError(path.string() + ": has no tensor '" + prefix + name + "'");
            const SafetensorsTensor& t = found->second;
            if (t.shape != shape)
                throw DecomposeError(path.string() + ": tensor '" + prefix + name + "' has shape " + st_detail::shape_text(t.shape) +
                                     ", config.json wants " + st_detail::shape_text(shape));
            if (t.dtype != "F32" && t.dtype != "F16" && t.dtype != "BF16")
                throw DecomposeError(path.string() + ": tensor '" + prefix + name + "' is " + t.dtype + "; " + supported_models);
            return to_doubles(t);
        };
        const auto matrix = [&](const std::string& name, Index rows, Index columns) -> Matrix {
            const std::vector<double> values = tensor(name, {rows, columns});
            using Stored = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
            return Eigen::Map<const Stored>(values.data(), rows, columns).cast<float>();
        };
        const auto vector = [&](const std::string& name, Index n) -> RowVector {
            const std::vector<double> values = tensor(name, {n});
            return Eigen::Map<const Eigen::RowVectorXd>(values.data(), n).cast<float>();
        };
        const auto linear = [&](const std::string& name, Index in, Index out) {
            return Linear{matrix(name + ".weight", out, in), vector(name + ".bias", out)};
        };
        const auto norm = [&](const std::string& name) {  // older checkpoints say gamma and beta
            const bool old = file.tensors.contains(prefix + name + ".gamma");
            return LayerNorm{vector(name + (old ? ".gamma" : ".weight"), config_.width),
                             vector(name + (old ? ".beta" : ".bias"), config_.width), config_.epsilon};
        };

        const Index D = config_.width;
        words_ = matrix("embeddings.word_embeddings.weight", config_.vocabulary, D);
        positions_ = matrix("embeddings.position_embeddings.weight", config_.positions, D);
        type_ = matrix("embeddings.token_type_embeddings.weight", config_.types, D).row(0);
        norm_ = norm("embeddings.LayerNorm");
        for (Index n = 0; n < config_.layers; ++n) {
            const std::string at = "encoder.layer." + std::to_string(n) + ".";
            layers_.push_back({.query = linear(at + "attention.self.query", D, D),
                               .key = linear(at + "attention.self.key", D, D),
                               .value = linear(at + "attention.self.value", D, D),
                               .attention_output = linear(at + "attention.output.dense", D, D),
                               .intermediate = linear(at + "intermediate.dense", D, config_.inner),
                               .output = linear(at + "output.dense", config_.inner, D),
                               .attention_norm = norm(at + "attention.output.LayerNorm"),
                               .output_norm = norm(at + "output.LayerNorm")});
        }
    }

    const BertConfig& config() const { return config_; }
    const std::vector<BertLayer>& layers() const { return layers_; }

    /// What a layer sees: its number, its input, and its queries and keys with their biases, heads side by side. All (L, width).
    using Visit = std::function<void(Index layer, const Matrix& x, const Matrix& q, const Matrix& k)>;

    /// Runs the encoder on one sequence, of which every position sees every other; returns the last hidden states (L, width).
    Matrix run(const std::vector<std::int64_t>& ids, const Visit& visit) const {
        const auto L = static_cast<Index>(ids.size());
        if (L > config_.positions)
            throw DecomposeError(std::to_string(L) + " tokens, but the model has " + std::to_string(config_.positions) + " positions");
        Matrix x(L, config_.width);
        for (Index t = 0; t < L; ++t) {
            const std::int64_t id = ids[static_cast<std::size_t>(t)];
            if (id < 0 || id >= config_.vocabulary)
                throw DecomposeError("token " + std::to_string(id) + " is beyond the " + std::to_string(config_.vocabulary) +
                                     " that the model knows");
            x.row(t) = words_.row(id) + positions_.row(t) + type_;
        }
        norm_(x);
        for (Index n = 0; n < config_.layers; ++n) {
            const BertLayer& layer = layers_[static_cast<std::size_t>(n)];
            const Matrix q = layer.query(x), k = layer.key(x), v = layer.value(x);
            visit(n, x, q, k);
            x += layer.attention_output(attend(q, k, v));
            layer.attention_norm(x);
            Matrix inner = layer.intermediate(x);
            inner = inner.unaryExpr([](float z) { return 0.5f * z * (1.0f + std::erf(z / std::numbers::sqrt2_v<float>)); });
            x += layer.output(inner);
            layer.output_norm(x);
        }
        return x;
    }

    /// (L, width) as (1, L, heads, head dim).
    View<const float, 4> heads_of(const Matrix& x) const {
        return view(x.data(), {Index(1), Index(x.rows()), config_.heads, config_.head_dim()});
    }

  private:
    Matrix attend(const Matrix& q, const Matrix& k, const Matrix& v) const {
        Matrix o(q.rows(), q.cols());
        const attention::Options options{.causal = false};
        const attention::Inputs<float> in{.q = heads_of(q), .k = heads_of(k), .v = heads_of(v)};
        const attention::Outputs<float> out{.o = view(o.data(), {Index(1), Index(o.rows()), config_.heads, config_.head_dim()})};
        const cpu exec;
        std::vector<char> memory(attention::workspace_size(exec, options, attention::shape_of(in), pass::forward));
        check(attention::forward(exec, options, in, out, Saved{}, Workspace{memory.data(), memory.size()}));
        return o;
    }

    BertConfig config_;
    Matrix words_, positions_;
    RowVector type_;
    LayerNorm norm_;
    std::vector<BertLayer> layers_;
};

}  // namespace interstate::tools
