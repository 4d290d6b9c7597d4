// Needles in a haystack: how many steps of training does a small transformer take until it retrieves every
// needle, with softmax attention and with SISA? README.md is the place to start.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <CLI/CLI.hpp>

#include "../01_language_model/train.hpp"

namespace demo {
namespace {

/// Exit codes.
enum Exit { success = 0, bad_input = 2, defect = 3 };

constexpr std::size_t held_out = 200;  // needles that every evaluation asks for
constexpr std::size_t depths = 5;      // ranges of depth in the tables

struct Arguments {
    std::vector<std::string> mixers{"softmax", "sisa"};
    std::string text;
    Index length = 128;
    Index needles = 1;
    Index steps = 800;
    Index every = 20;
    Index seeds = 3;
    std::uint64_t seed = 1;
    int threads = 0;
};

/// The text that the language model learns from.
std::string default_text() {
    const auto examples = std::filesystem::path(__FILE__).parent_path().parent_path();
    return (examples / "data" / "kjv_psalms_new_testament.txt").lexically_normal().string();
}

/// Exits inside for --help; throws CLI::ParseError or InputError.
Arguments parse(int argc, char** argv) {
    Arguments arguments;
    arguments.text = default_text();
    CLI::App app{"Trains small transformers to find a needle in a haystack, and counts the steps they take.",
                 "needle"};
    std::string known = "A mixer to train; may be repeated (default: softmax sisa). Known:";
    for (const MixerEntry& entry : all_mixers()) known += "\n  " + entry.name + ": " + entry.description;
    app.add_option("--mixer", arguments.mixers, known)->type_name("NAME")->allow_extra_args(false);
    app.add_option("--text", arguments.text, "Text that hay is made of (default: the one in examples/data)")
        ->type_name("FILE");
    app.add_option("--length", arguments.length, "Bytes of hay, needles and question")
        ->check(CLI::Range(64, 100'000))
        ->capture_default_str();
    app.add_option("--needles", arguments.needles, "Needles in each haystack, of which one is asked for")
        ->check(CLI::Range(1, 8))
        ->capture_default_str();
    app.add_option("--steps", arguments.steps, "Updates of a run at most; the learning rate falls to zero over as many")
        ->check(CLI::Range(1, 10'000'000))
        ->capture_default_str();
    app.add_option("--every", arguments.every, "Updates between two evaluations")
        ->check(CLI::Range(1, 10'000'000))
        ->capture_default_str();
    app.add_option("--seed", arguments.seed, "The first seed; same seed, same bits, for any number of threads")
        ->check(CLI::NonNegativeNumber)
        ->capture_default_str();
    app.add_option("--seeds", arguments.seeds, "Runs of each mixer, from seeds that follow each other")
        ->check(CLI::Range(1, 1000))
        ->capture_default_str();
    app.add_option("--threads", arguments.threads, "Threads (default: all cores)")
        ->check(CLI::Range(1, 1024));
    try {
        app.parse(argc, argv);
    } catch (const CLI::CallForHelp& help) {
        std::exit(app.exit(help));
    }
    for (std::size_t i = 0; i < arguments.mixers.size(); ++i) {
        mixer_named(arguments.mixers[i]);  // throws if there is none
        for (std::size_t j = 0; j < i; ++j)
            if (arguments.mixers[i] == arguments.mixers[j])
                throw InputError("--mixer " + arguments.mixers[i] + ": given twice");
    }
    return arguments;
}

ModelConfig model_config(const Arguments& arguments) {
    return {.width = 64,
            .hidden = 128,
            .blocks = 2,
            .heads = 2,
            .context = arguments.length,
            .judged = 1,  // the answer is one byte
            .batch = 16};
}

/// A needle is a key and a value, {K7}: the key a capital, the value a digit. The question is its beginning, {K,
/// at the end of the hay, and the answer the byte that follows: 7. Hay has no braces.
class Haystacks {
  public:
    Haystacks(Index length, Index needles)
        : needles_(static_cast<std::size_t>(needles)),
          hay_(static_cast<std::size_t>(length) + 1 - needles_ * needle_size - question_size) {}

    /// `depth` of the needle that is asked for: 0 at the beginning, towards 1 at the question. Others lie anywhere.
    std::vector<std::uint8_t> draw(Bytes split, double depth, Random& random) const {
        std::string keys = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
        std::vector<std::pair<std::size_t, std::string>> needles;  // how much hay is before each of them
        for (std::size_t n = 0; n < needles_; ++n) {
            std::swap(keys[n], keys[n + random.below(keys.size() - n)]);
            const double place = n == 0 ? depth : random.uniform();
            const char value = static_cast<char>('0' + random.below(10));
            needles.emplace_back(static_cast<std::size_t>(place * static_cast<double>(hay_)),
                                 std::string{'{', keys[n], value, '}'});
        }
        const std::string question = needles.front().second.substr(0, question_size);
        std::sort(needles.begin(), needles.end());

        const Bytes hay = split.subspan(random.below(split.size() - hay_), hay_);
        std::vector<std::uint8_t> bytes;
        std::size_t done = 0;
        for (const auto& [before, needle] : needles) {
            bytes.insert(bytes.end(), hay.begin() + done, hay.begin() + before);
            bytes.insert(bytes.end(), needle.begin(), needle.end());
            done = before;
        }
        bytes.insert(bytes.end(), hay.begin() + done, hay.end());
        bytes.insert(bytes.end(), question.begin(), question.end());
        return bytes;
    }

  private:
    static constexpr std::size_t needle_size = 4, question_size = 3;  // with its answer

    std::size_t needles_, hay_;
};

/// How many of the held-out needles were retrieved, by depth, after so many steps.
struct Evaluation {
    Index step = 0;
    std::array<std::size_t, depths> retrieved{};

    std::size_t all() const {
        std::size_t sum = 0;
        for (const std::size_t r : retrieved) sum += r;
        return sum;
    }
};

/// One model on its way to the needles.
struct Search {
    std::string mixer;
    std::uint64_t seed = 0;
    Index parameters = 0;
    std::vector<Evaluation> evaluations;
    Index steps = 0;  // to full retrieval: the first of two evaluations in a row; 0, not reached

    /// After `step` steps; a search that ended before counts with what it ended with.
    const Evaluation& at(Index step) const {
        const Evaluation* last = &evaluations.front();
        for (const Evaluation& e : evaluations)
            if (e.step <= step) last = &e;
        return *last;
    }
};

/// Whether the most likely byte is the answer, for haystacks in the order of their depth.
Evaluation evaluate(MixerRun& run, const ModelConfig& config,
                    const std::vector<std::vector<std::uint8_t>>& haystacks) {
    Evaluation evaluation{.step = run.step};
    const auto batch = static_cast<std::size_t>(config.batch);
    Windows windows(config);
    for (std::size_t first = 0; first < haystacks.size(); first += batch) {
        const std::size_t end = std::min(first + batch, haystacks.size());
        windows.clear();
        for (std::size_t h = first; h < end; ++h) windows.add(haystacks[h]);
        const Matrix& logits = run.model->forward(windows.bytes(), windows.batch(), false);
        for (std::size_t h = first; h < end; ++h) {
            Index answer = 0;
            logits.row(static_cast<Index>(h - first + 1) * config.context - 1).maxCoeff(&answer);
            if (answer == haystacks[h].back()) ++evaluation.retrieved[h * depths / haystacks.size()];
        }
    }
    return evaluation;
}

/// Trains until all needles are retrieved twice in a row, or for as many steps as there may be.
Search search(const std::string& mixer, std::uint64_t seed, const Arguments& arguments, const Text& text,
              const Haystacks& source, const std::vector<std::vector<std::uint8_t>>& asked) {
    const ModelConfig config = model_config(arguments);
    MixerRun run = new_run(mixer, config, seed);
    Replicas replicas(*run.model, mixer_named(mixer), config);
    Search search{.mixer = mixer, .seed = seed, .parameters = run.model->parameter_count(), .evaluations = {}};
    std::vector<std::vector<std::uint8_t>> haystacks(static_cast<std::size_t>(config.batch));
    while (run.step < arguments.steps && search.steps == 0) {
        for (auto& haystack : haystacks) {
            const double depth = run.data.uniform();
            haystack = source.draw(text.training(), depth, run.data);
        }
        replicas.loss({haystacks.begin(), haystacks.end()}, true);
        ++run.step;
        run.optimizer->update(run.step, learning_rate(config.peak_rate, run.step, arguments.steps));
        if (run.step % arguments.every != 0 && run.step != arguments.steps) continue;
        const bool before = !search.evaluations.empty() && search.evaluations.back().all() == asked.size();
        search.evaluations.push_back(evaluate(run, config, asked));
        if (before && search.evaluations.back().all() == asked.size())
            search.steps = search.evaluations.end()[-2].step;
    }
    return search;
}

/// What a haystack looks like: its first needle with some hay around it, and its end.
void print_haystack(const std::vector<std::uint8_t>& haystack) {
    std::string text(haystack.begin(), haystack.end());
    std::replace(text.begin(), text.end(), '\n', ' ');
    const std::size_t needle = text.find('{'), from = needle < 28 ? 0 : needle - 28;
    std::printf("haystack  ...%s...%s\n", text.substr(from, 60).c_str(),
                text.substr(text.size() - 24, 23).c_str());
    std::printf("          to be answered with: %c\n", text.back());
}

void print_steps(const std::vector<Search>& searches, const Arguments& arguments) {
    std::printf("\nSteps until all %zu held-out needles are retrieved, in two evaluations in a row (fewer is better)\n\n",
                held_out);
    std::printf("%-12s %10s", "mixer", "parameters");
    for (Index s = 0; s < arguments.seeds; ++s)
        std::printf(" %10s", ("seed " + std::to_string(arguments.seed + static_cast<std::uint64_t>(s))).c_str());
    for (const std::string& mixer : arguments.mixers) {
        bool first = true;
        for (const Search& s : searches) {
            if (s.mixer != mixer) continue;
            if (first) std::printf("\n%-12s %10lld", mixer.c_str(), static_cast<long long>(s.parameters));
            first = false;
            const std::string steps =
                s.steps > 0 ? std::to_string(s.steps) : "> " + std::to_string(arguments.steps);
            std::printf(" %10s", steps.c_str());
        }
    }
    std::printf("\n");
}

/// The mean over seeds, a row for every evaluation, or for some of them where they are many.
void print_depths(const std::vector<Search>& searches, const std::string& mixer) {
    constexpr std::size_t most_rows = 16;
    std::vector<const Search*> of_mixer;
    const Search* longest = nullptr;
    for (const Search& s : searches) {
        if (s.mixer != mixer) continue;
        of_mixer.push_back(&s);
        if (longest == nullptr || s.evaluations.size() > longest->evaluations.size()) longest = &s;
    }
    std::printf("\n%s: needles retrieved, %%, by depth (0 is the beginning)\n\n%8s", mixer.c_str(), "steps");
    for (std::size_t d = 0; d < depths; ++d)
        std::printf(" %8s", (std::to_string(100 * d / depths) + "-" + std::to_string(100 * (d + 1) / depths)).c_str());
    std::printf(" %8s\n", "all");
    const std::size_t rows = longest->evaluations.size(), stride = (rows + most_rows - 1) / most_rows;
    for (std::size_t r = 0; r < rows; ++r) {
        if ((r + 1) % stride != 0 && r + 1 != rows) continue;
        const Index step = longest->evaluations[r].step;
        Evaluation sum;
        for (const Search* s : of_mixer)
            for (std::size_t d = 0; d < depths; ++d) sum.retrieved[d] += s->at(step).retrieved[d];
        const double percent = 100.0 / static_cast<double>(of_mixer.size() * held_out);
        std::printf("%8lld", static_cast<long long>(step));
        for (const std::size_t r : sum.retrieved) std::printf(" %8.1f", percent * depths * static_cast<double>(r));
        std::printf(" %8.1f\n", percent * static_cast<double>(sum.all()));
    }
}

int compare(const Arguments& arguments) {
    if (arguments.threads > 0) use_threads(arguments.threads);
    Eigen::setNbThreads(1);  // the threads are ours: see Replicas in train.hpp

    const ModelConfig config = model_config(arguments);
    const Text text = read_text(arguments.text, config.context);
    for (const Bytes split : {text.training(), text.validation()})
        if (std::find(split.begin(), split.end(), '{') != split.end())
            throw InputError("text " + text.name() + ": has a brace {, which must be the needles' alone");
    const Haystacks source(arguments.length, arguments.needles);
    Random random(0);  // the same questions for every seed, from text that nobody trains on
    std::vector<std::vector<std::uint8_t>> asked;
    for (std::size_t i = 0; i < held_out; ++i)
        asked.push_back(source.draw(text.validation(), (static_cast<double>(i) + 0.5) / held_out, random));

    std::printf("text      %s\n", text.name().c_str());
    print_haystack(asked[held_out / 2]);
    std::printf("          %lld bytes, needles in it: %lld\n", static_cast<long long>(arguments.length),
                static_cast<long long>(arguments.needles));
    std::printf("model     %lld blocks, width %lld, %lld heads, SwiGLU %lld\n",
                static_cast<long long>(config.blocks), static_cast<long long>(config.width),
                static_cast<long long>(config.heads), static_cast<long long>(config.hidden));
    std::printf("training  at most %lld steps of %lld haystacks, an evaluation every %lld, %d threads\n\n",
                static_cast<long long>(arguments.steps), static_cast<long long>(config.batch),
                static_cast<long long>(arguments.every), interstate::thread_count(0));

    std::vector<Search> searches;
    for (Index s = 0; s < arguments.seeds; ++s)
        for (const std::string& mixer : arguments.mixers) {
            const std::uint64_t seed = arguments.seed + static_cast<std::uint64_t>(s);
            const double started = now();
            searches.push_back(search(mixer, seed, arguments, text, source, asked));
            const Evaluation& last = searches.back().evaluations.back();
            std::printf("%-12s seed %llu: %zu of %zu needles after %lld steps, %.0f s\n", mixer.c_str(),
                        static_cast<unsigned long long>(seed), last.all(), held_out,
                        static_cast<long long>(last.step), now() - started);
            std::fflush(stdout);
        }
    print_steps(searches, arguments);
    for (const std::string& mixer : arguments.mixers) print_depths(searches, mixer);
    return success;
}

}  // namespace
}  // namespace demo

int main(int argc, char** argv) {
    demo::let_waiting_threads_sleep(argv);
    const auto complain = [](const std::exception& error, int exit) {
        std::fflush(stdout);
        std::fprintf(stderr, "needle: %s\n", error.what());
        return exit;
    };
    try {
        return demo::compare(demo::parse(argc, argv));
    } catch (const demo::LibraryError& error) {
        return complain(error, demo::defect);
    } catch (const std::exception& error) {  // arguments, text, memory
        return complain(error, demo::bad_input);
    }
}
