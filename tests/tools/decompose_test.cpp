// tools/decompose on a small BERT, against what tests/tools/decompose/make_bert.py recorded: tokens of Hugging Face's tokenizers, hidden
// states, queries and keys of numpy in float64.
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "../../tools/decompose/analysis.hpp"
#include "../../tools/decompose/pictures.hpp"

namespace interstate::tools {
namespace {

namespace fs = std::filesystem;

const fs::path small = fs::path(INTERSTATE_GOLDEN_DIR).parent_path() / "tools" / "decompose";

/// A copy of the small model that a test may break; removed in the end.
struct Copy {
    fs::path path = fs::temp_directory_path() / std::string("decompose_test_").append(std::to_string(::getpid()));

    Copy() {
        fs::remove_all(path);
        fs::create_directories(path);
        for (const char* name : {"config.json", "vocab.txt", "model.safetensors"}) fs::copy_file(small / name, path / name);
    }
    Copy(const Copy&) = delete;
    Copy& operator=(const Copy&) = delete;
    ~Copy() { fs::remove_all(path); }

    void config(const std::function<void(nlohmann::json&)>& change) const {
        nlohmann::json json = read_json(path / "config.json");
        change(json);
        std::ofstream(path / "config.json") << json;
    }
    void weights(const std::function<void(SafetensorsFile&)>& change) const {
        SafetensorsFile file = read_safetensors(path / "model.safetensors");
        change(file);
        write_safetensors(path / "model.safetensors", file);
    }
};

std::string error_of(const std::function<void()>& f) {
    try {
        f();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    return "no error";
}
std::string load_error(const Copy& copy) {
    return error_of([&] { Bert bert(copy.path); });
}
#define EXPECT_SAYS(text, part) EXPECT_NE((text).find(part), std::string::npos) << (text)

std::vector<std::int64_t> integers(const SafetensorsTensor& tensor) {
    const std::vector<double> values = to_doubles(tensor);
    return {values.begin(), values.end()};
}
/// ||got - want|| / ||want||
double error_against(const Matrix& got, const double* want) {
    double difference = 0.0, size = 0.0;
    for (Index i = 0; i < got.size(); ++i) {
        difference += std::pow(static_cast<double>(got.data()[i]) - want[i], 2.0);
        size += want[i] * want[i];
    }
    return std::sqrt(difference / size);
}

TEST(Tokenizer, GivesTheIdsOfHuggingFace) {
    const nlohmann::json recorded = read_json(small / "tokens.json");
    for (const nlohmann::json& c : recorded.at("cases")) {
        const Tokenizer tokenizer(small / "vocab.txt", {.lower_case = c.at("lower_case"), .strip_accents = c.at("strip_accents")});
        const std::string text = c.at("text");
        EXPECT_EQ(tokenizer.encode(text, "text"), c.at("ids").get<std::vector<std::int64_t>>())
            << text << " lower_case " << c.at("lower_case") << " strip_accents " << c.at("strip_accents");
    }
}
TEST(Tokenizer, RefusesWhatIsNotUtf8) {
    const Tokenizer tokenizer(small / "vocab.txt", {});
    const nlohmann::json recorded = read_json(small / "tokens.json");
    for (const auto& [name, bytes] : recorded.at("bad").items()) {
        std::string text;
        for (const int byte : bytes) text.push_back(static_cast<char>(byte));
        EXPECT_SAYS(error_of([&] { tokenizer.encode(text, name); }), name + ": not UTF-8 at byte ");
    }
    EXPECT_EQ(error_of([&] { tokenizer.encode("ab\xe4\xb8", "t"); }), "t: not UTF-8 at byte 2");
}
TEST(Tokenizer, RefusesAVocabularyWithoutItsSpecialTokens) {
    const Copy copy;
    std::ofstream(copy.path / "vocab.txt") << "[UNK]\n[CLS]\nthe\n";
    EXPECT_SAYS(error_of([&] { Tokenizer(copy.path / "vocab.txt", {}); }), "has no [SEP]");
}
TEST(Tokenizer, ReadsItsOptions) {
    const Copy copy;
    const fs::path path = copy.path / "tokenizer_config.json";
    EXPECT_TRUE(read_tokenizer_options(path).lower_case && read_tokenizer_options(path).strip_accents);
    std::ofstream(path) << R"({"do_lower_case": false, "strip_accents": null, "tokenize_chinese_chars": false})";
    const TokenizerOptions cased = read_tokenizer_options(path);
    EXPECT_TRUE(!cased.lower_case && !cased.strip_accents && !cased.split_cjk);
    std::ofstream(path) << R"({"do_lower_case": "no"})";
    EXPECT_SAYS(error_of([&] { read_tokenizer_options(path); }), "must be true or false");
}

TEST(Bert, GivesTheHiddenStatesOfNumpy) {
    const Bert bert(small);
    const SafetensorsFile expected = read_safetensors(small / "expected.safetensors");
    int texts = 0;
    for (const auto& [name, tensor] : expected.tensors) {
        if (!name.ends_with(".ids")) continue;
        const std::string text = name.substr(0, name.size() - 4);
        const std::vector<double> q_want = to_doubles(expected.tensors.at(text + ".q"));
        const std::vector<double> k_want = to_doubles(expected.tensors.at(text + ".k"));
        const Matrix hidden = bert.run(integers(tensor), [&](Index layer, const Matrix&, const Matrix& q, const Matrix& k) {
            EXPECT_LT(error_against(q, q_want.data() + layer * q.size()), 1e-5) << text << " layer " << layer;
            EXPECT_LT(error_against(k, k_want.data() + layer * k.size()), 1e-5) << text << " layer " << layer;
        });
        EXPECT_LT(error_against(hidden, to_doubles(expected.tensors.at(text + ".hidden")).data()), 1e-5) << text;
        ++texts;
    }
    EXPECT_GT(texts, 10);
}

std::vector<std::vector<double>> numbers_of(const std::string& csv) {
    std::vector<std::vector<double>> rows;
    std::istringstream in(csv);
    for (std::string line; std::getline(in, line);) {
        rows.emplace_back();
        std::istringstream cells(line.substr(line.find(',') + 1));
        for (std::string cell; std::getline(cells, cell, ',');) rows.back().push_back(std::strtod(cell.c_str(), nullptr));
    }
    return rows;
}

/// The reference on Q (L, H, d) and K, in double, in the CSV's order.
std::vector<std::vector<double>> by_reference(const double* q, const double* k, Index L, Index H, Index d, double scale) {
    const sd_decomposition::Inputs<double> in{.Q = view(q, {Index(1), L, H, d}), .K = view(k, {Index(1), L, H, d})};
    std::vector<std::vector<double>> values(quantities.size(), std::vector<double>(static_cast<std::size_t>(H)));
    const auto out = [&](std::size_t i) { return view(values[i].data(), {Index(1), H}); };
    const sd_decomposition::Outputs<double> outputs{.routing_energy = out(0), .norm = out(1), .routing_norm = out(2),
                                                    .filtering_norm = out(3),
                                                    .routing_effective_rank = out(4), .filtering_effective_rank = out(5),
                                                    .routing_participation_ratio = out(6), .filtering_participation_ratio = out(7),
                                                    .routing_stable_rank = out(8), .filtering_stable_rank = out(9)};
    const reference exec;
    const sd_decomposition::Options options{.scale = scale};
    std::vector<char> memory(sd_decomposition::workspace_size(exec, options, sd_decomposition::shape_of(in), pass::forward));
    const Status status = sd_decomposition::forward(exec, options, in, outputs, Saved{}, Workspace{memory.data(), memory.size()});
    EXPECT_TRUE(status.ok()) << status.message();
    return values;
}

TEST(Analysis, CsvIsTheReferenceOnRecordedQueriesAndKeys) {
    const Bert bert(small);
    const SafetensorsFile expected = read_safetensors(small / "expected.safetensors");
    const std::vector<std::vector<std::int64_t>> windows{integers(expected.tensors.at("0.ids")), integers(expected.tensors.at("1.ids"))};
    const Index H = 2, d = 8, layers = 3;
    const auto rows = numbers_of(csv_rows(analyse_text(bert, windows), "text"));
    ASSERT_EQ(rows.size(), static_cast<std::size_t>(H * layers));
    for (Index layer = 0; layer < layers; ++layer) {
        std::vector<std::vector<double>> mean(quantities.size(), std::vector<double>(2));
        for (int w = 0; w < 2; ++w) {
            const auto L = static_cast<Index>(windows[static_cast<std::size_t>(w)].size());
            const auto q = to_doubles(expected.tensors.at(std::to_string(w) + ".q"));
            const auto k = to_doubles(expected.tensors.at(std::to_string(w) + ".k"));
            const auto values = by_reference(q.data() + layer * L * H * d, k.data() + layer * L * H * d, L, H, d, 0.0);
            for (std::size_t i = 0; i < quantities.size(); ++i)
                for (std::size_t h = 0; h < 2; ++h) mean[i][h] += 0.5 * values[i][h];
        }
        for (std::size_t h = 0; h < 2; ++h) {
            const std::vector<double>& row = rows[static_cast<std::size_t>(layer) * 2 + h];
            EXPECT_EQ(row[0], static_cast<double>(layer));
            EXPECT_EQ(row[1], static_cast<double>(h));
            EXPECT_EQ(row[2], 2.0);
            for (std::size_t i = 0; i < quantities.size(); ++i)
                EXPECT_NEAR(row[4 + i], mean[i][h], 2e-5 * mean[i][h]) << quantities[i] << " layer " << layer << " head " << h;
        }
    }
}
TEST(Analysis, CsvIsTheReferenceOnTheWeights) {
    const Bert bert(small);
    const SafetensorsFile file = read_safetensors(small / "model.safetensors");
    const auto rows = numbers_of(csv_rows(analyse_weights(bert), "weights"));
    ASSERT_EQ(rows.size(), 6U);
    for (std::size_t layer = 0; layer < 3; ++layer) {
        const auto heads = [&](const char* name) {  // (out, in) to (in, out)
            const auto w = to_doubles(file.tensors.at("encoder.layer." + std::to_string(layer) + ".attention.self." + name + ".weight"));
            std::vector<double> t(w.size());
            for (std::size_t i = 0; i < 16; ++i)
                for (std::size_t j = 0; j < 16; ++j) t[i * 16 + j] = w[j * 16 + i];
            return t;
        };
        const auto values = by_reference(heads("query").data(), heads("key").data(), 16, 2, 8, 1.0);
        for (std::size_t h = 0; h < 2; ++h)
            for (std::size_t i = 0; i < quantities.size(); ++i)
                EXPECT_NEAR(rows[layer * 2 + h][4 + i], values[i][h], 2e-5 * values[i][h]) << quantities[i];
    }
}
TEST(Analysis, WindowsHoldEveryTokenOnceAndDifferByOne) {
    const Tokenizer tokenizer(small / "vocab.txt", {});
    for (const std::size_t n : {1U, 17U, 18U, 19U, 36U, 37U, 1000U}) {
        std::vector<std::int64_t> tokens(n), back;
        for (std::size_t i = 0; i < n; ++i) tokens[i] = static_cast<std::int64_t>(i);
        const auto windows = cut_windows(tokens, tokenizer, 20);
        EXPECT_EQ(windows.size(), (n + 17) / 18);
        std::size_t least = n + 2, most = 0;
        for (const auto& w : windows) {
            EXPECT_TRUE(w.front() == tokenizer.cls() && w.back() == tokenizer.sep());
            back.insert(back.end(), w.begin() + 1, w.end() - 1);
            least = std::min(least, w.size()), most = std::max(most, w.size());
        }
        EXPECT_EQ(back, tokens);
        EXPECT_TRUE(most <= 20 && most - least <= 1);
    }
}
TEST(Analysis, PicturesHaveAPointAndACellForEveryHead) {
    const Bert bert(small);
    const Analysis a = analyse_text(bert, {{2, 5, 9, 10, 3}});
    const auto count = [](const std::string& text, const std::string& part) {
        int n = 0;
        for (std::size_t at = text.find(part); at != text.npos; at = text.find(part, at + 1)) ++n;
        return n;
    };
    EXPECT_EQ(count(picture_of_ranks(a, "t"), "<circle"), 2 * 6);
    EXPECT_EQ(count(picture_of_energy(a, "t"), "rgb("), 6);
}

/// The same numbers under other names, and nearly the same in other dtypes.
TEST(Loading, TakesPrefixesOldNamesAndSixteenBits) {
    const std::vector<std::int64_t> ids{2, 5, 9, 10, 3};
    const auto none = [](Index, const Matrix&, const Matrix&, const Matrix&) {};
    const Matrix want = Bert(small).run(ids, none);
    const Copy copy;
    copy.weights([](SafetensorsFile& file) {
        SafetensorsFile renamed;
        for (const auto& [old, tensor] : file.tensors) {
            std::string name = old;
            if (name.ends_with("LayerNorm.weight")) name.replace(name.size() - 6, 6, "gamma");
            if (name.ends_with("LayerNorm.bias")) name.replace(name.size() - 4, 4, "beta");
            renamed.tensors["bert." + name] = tensor;
        }
        file = renamed;
    });
    EXPECT_EQ(Bert(copy.path).run(ids, none), want);

    for (const char* dtype : {"F16", "BF16"}) {
        const Copy halves;
        halves.weights([&](SafetensorsFile& file) {
            for (auto& [name, tensor] : file.tensors) {
                const std::vector<double> values = to_doubles(tensor);
                tensor.dtype = dtype;
                tensor.data.resize(values.size() * 2);
                for (std::size_t i = 0; i < values.size(); ++i) {
                    const f16 half(static_cast<float>(values[i]));
                    const bf16 brain(static_cast<float>(values[i]));
                    std::memcpy(&tensor.data[2 * i], dtype[0] == 'F' ? static_cast<const void*>(&half) : &brain, 2);
                }
            }
        });
        const Matrix got = Bert(halves.path).run(ids, none);
        const double error = static_cast<double>((got - want).norm() / want.norm());
        EXPECT_LT(error, dtype[0] == 'F' ? 5e-3 : 5e-2) << dtype;
        EXPECT_GT(error, 1e-5) << dtype;
    }
}
TEST(Loading, SaysWhatIsSupported) {
    for (const auto& [key, value] : std::vector<std::pair<std::string, nlohmann::json>>{{"model_type", "roberta"},
                                                                                     {"model_type", nullptr},
                                                                                     {"hidden_act", "relu"},
                                                                                     {"position_embedding_type", "relative_key"},
                                                                                     {"is_decoder", true}}) {
        const Copy copy;
        copy.config([&](nlohmann::json& json) { json[key] = value; });
        EXPECT_SAYS(load_error(copy), "supported: BERT encoders") << key;
        EXPECT_SAYS(load_error(copy), key + " is " + value.dump()) << key;
    }
    const Copy copy;
    fs::remove(copy.path / "model.safetensors");
    EXPECT_SAYS(load_error(copy), "supported: BERT encoders");
}
TEST(Loading, RefusesWhatDoesNotFit) {
    const Copy missing;
    missing.weights([](SafetensorsFile& file) { file.tensors.erase("encoder.layer.1.output.dense.bias"); });
    EXPECT_SAYS(load_error(missing), "has no tensor 'encoder.layer.1.output.dense.bias'");

    const Copy shape;
    shape.weights([](SafetensorsFile& file) { file.tensors.at("encoder.layer.2.attention.self.key.bias").shape = {4, 4}; });
    EXPECT_SAYS(load_error(shape), "tensor 'encoder.layer.2.attention.self.key.bias' has shape [4, 4], config.json wants [16]");

    const Copy dtype;
    dtype.weights([](SafetensorsFile& file) {
        SafetensorsTensor& tensor = file.tensors.at("embeddings.LayerNorm.bias");
        tensor = make_tensor(std::vector<double>(16, 0.0), {16});
    });
    EXPECT_SAYS(load_error(dtype), "tensor 'embeddings.LayerNorm.bias' is F64; supported");

    const Copy cut;
    fs::resize_file(cut.path / "model.safetensors", 20000);
    EXPECT_SAYS(load_error(cut), "model.safetensors");

    const Copy heads;
    heads.config([](nlohmann::json& json) { json["num_attention_heads"] = 3; });
    EXPECT_SAYS(load_error(heads), "hidden_size is 16, must be a multiple of the 3 heads");
    heads.config([](nlohmann::json& json) { json["num_attention_heads"] = -2; });
    EXPECT_SAYS(load_error(heads), "num_attention_heads is -2, must be a number from 1");
    std::ofstream(heads.path / "config.json") << "{";
    EXPECT_SAYS(load_error(heads), "not a JSON object");

    const Bert bert(small);
    const auto none = [](Index, const Matrix&, const Matrix&, const Matrix&) {};
    EXPECT_SAYS(error_of([&] { bert.run(std::vector<std::int64_t>(21, 5), none); }), "21 tokens, but the model has 20 positions");
    EXPECT_SAYS(error_of([&] { bert.run({100000}, none); }), "token 100000 is beyond the");
}

}  // namespace
}  // namespace interstate::tools
