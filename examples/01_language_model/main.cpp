// Trains a small byte-level language model once for every mixer, on the CPU, with the library's
// forward and backward behind the mixer, and compares the mixers. README.md is the place to start.
#include <atomic>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "checkpoint.hpp"
#include "routing.hpp"

namespace demo {
namespace {

constexpr Index default_steps = 800;  // enough to beat both baselines clearly

/// Exit codes; interrupted runs give 128 and the signal, as shells do.
enum Exit { success = 0, not_learned = 1, bad_input = 2, defect = 3 };

/// Set by Ctrl-C and by SIGTERM; everything that takes long looks at it.
std::atomic<bool> stop{false};
std::atomic<int> stop_signal{0};
static_assert(std::atomic<bool>::is_always_lock_free && std::atomic<int>::is_always_lock_free);

void on_signal(int signal) {
    stop_signal = signal;
    stop = true;
}

void listen_for_signals() {
    struct sigaction action {};
    action.sa_handler = on_signal;
    action.sa_flags =
        SA_RESTART | static_cast<int>(SA_RESETHAND);  // a second Ctrl-C ends the program at once
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
}

struct Arguments {
    std::vector<std::string> mixers;  // empty: those of the registry that run by default
    std::string text;
    Index steps = default_steps;
    std::uint64_t seed = 1;
    int threads = 0;
    std::string checkpoint, resume;
    Index sample = 120;  // with the prompt, no more than the context it was trained on
    std::string prompt = "And ";
    bool steps_given = false, seed_given = false;
};

/// The text beside this source file.
std::string default_text() {
    const auto examples = std::filesystem::path(__FILE__).parent_path().parent_path();
    return (examples / "data" / "kjv_psalms_new_testament.txt").lexically_normal().string();
}

std::vector<std::string> mixers_of_registry(bool all) {
    std::vector<std::string> names;
    for (const MixerEntry& entry : all_mixers())
        if (all || entry.by_default) names.push_back(entry.name);
    return names;
}

/// Exits inside for --help; throws CLI::ParseError or InputError.
Arguments parse(int argc, char** argv) {
    Arguments arguments;
    arguments.text = default_text();
    bool all = false;
    CLI::App app{"Trains a small byte-level language model with each mixer and compares them.",
                 "language_model"};
    std::string known = "A mixer to train; may be repeated (default:";
    for (const std::string& name : mixers_of_registry(false)) known += " " + name;
    known += "). Known:";
    for (const MixerEntry& entry : all_mixers()) known += "\n  " + entry.name + ": " + entry.description;
    auto* mixer =
        app.add_option("--mixer", arguments.mixers, known)->type_name("NAME")->allow_extra_args(false);
    app.add_flag("--all", all, "Train every mixer")->excludes(mixer);
    app.add_option("--text", arguments.text, "Text to learn (default: the one in examples/data)")
        ->type_name("FILE");
    auto* steps =
        app.add_option("--steps", arguments.steps, "Updates a mixer")
            ->check(CLI::Range(1, 10'000'000))
            ->capture_default_str();
    auto* seed = app.add_option("--seed", arguments.seed, "Same seed, same bits, for any number of threads")
                     ->check(CLI::NonNegativeNumber)
                     ->capture_default_str();
    app.add_option("--threads", arguments.threads, "Threads (default: all cores)")
        ->check(CLI::Range(1, 1024));
    app.add_option("--checkpoint", arguments.checkpoint,
                   "New file for the state of the run: after every mixer, and on Ctrl-C "
                   "(default: language_model.safetensors, on Ctrl-C only)")
        ->type_name("PATH");
    app.add_option("--resume", arguments.resume,
                   "Continue the run of this checkpoint, and keep it up to date")
        ->type_name("PATH");
    app.add_option("--sample", arguments.sample, "Bytes each model writes in the end")
        ->check(CLI::Range(0, 1'000'000))
        ->capture_default_str();
    app.add_option("--prompt", arguments.prompt, "Text they continue")->default_str("\"" + arguments.prompt + "\"");
    try {
        app.parse(argc, argv);
    } catch (const CLI::CallForHelp& help) {
        std::exit(app.exit(help));
    }
    if (all) arguments.mixers = mixers_of_registry(true);
    for (std::size_t i = 0; i < arguments.mixers.size(); ++i) {
        mixer_named(arguments.mixers[i]);  // throws if there is none
        for (std::size_t j = 0; j < i; ++j)
            if (arguments.mixers[i] == arguments.mixers[j])
                throw InputError("--mixer " + arguments.mixers[i] + ": given twice");
    }
    arguments.steps_given = steps->count() > 0;
    arguments.seed_given = seed->count() > 0;
    return arguments;
}

/// The run to continue. What the command line says too must agree with it.
Experiment resumed_experiment(const Arguments& arguments, const ModelConfig& config, const Text& text) {
    Experiment run = load_checkpoint(arguments.resume, config, text);
    const auto disagree = [&](const std::string& option, const std::string& was) {
        throw InputError("checkpoint " + arguments.resume + ": was made with " + option + " " + was +
                         ", which cannot change");
    };
    if (arguments.steps_given && arguments.steps != run.steps) disagree("--steps", std::to_string(run.steps));
    if (arguments.seed_given && arguments.seed != run.seed) disagree("--seed", std::to_string(run.seed));
    std::vector<std::string> names;
    std::string list;
    for (const MixerRun& mixer : run.mixers) {
        names.push_back(mixer.name);
        list += (list.empty() ? "" : " --mixer ") + mixer.name;
    }
    if (!arguments.mixers.empty() && arguments.mixers != names) disagree("--mixer", list);
    return run;
}

void print_header(const Experiment& run, const Text& text) {
    const ModelConfig& c = run.config;
    std::printf("text      %s\n", text.name().c_str());
    std::printf("          %zu bytes: %zu to train on, the last %zu to validate\n", text.size(),
                text.training().size(), text.validation().size());
    std::printf("model     %lld blocks, width %lld, SwiGLU %lld, context %lld bytes\n",
                static_cast<long long>(c.blocks), static_cast<long long>(c.width),
                static_cast<long long>(c.hidden), static_cast<long long>(c.context));
    std::printf("training  %lld steps of %lld windows, seed %llu, %d threads\n\n",
                static_cast<long long>(run.steps), static_cast<long long>(c.batch),
                static_cast<unsigned long long>(run.seed), interstate::thread_count(0));
    std::fflush(stdout);
}

void print_table(const Experiment& run, const Baselines& bits) {
    std::printf("\n%-12s %10s %10s %10s %21s %23s\n", "", "", "validation", "training", "decode us/token at",
                "decode state bytes at");
    std::printf("%-12s %10s %10s %10s %10s %10s %11s %11s\n", "mixer", "parameters", "bits/byte", "bytes/s",
                "256", "4096", "256", "4096");
    std::printf("%-12s %10s %10.3f\n", "unigram", "-", bits.unigram);
    std::printf("%-12s %10s %10.3f\n", "bigram", "-", bits.bigram);
    for (const MixerRun& mixer : run.mixers) {
        const Result& r = *mixer.result;
        std::printf("%-12s %10lld %10.3f %10.0f %10.1f %10.1f %11lld %11lld\n", mixer.name.c_str(),
                    static_cast<long long>(mixer.model->parameter_count()), r.validation_bits,
                    r.bytes_per_second, r.decode_us_256, r.decode_us_4096,
                    static_cast<long long>(r.state_bytes_256), static_cast<long long>(r.state_bytes_4096));
    }
    std::printf("\nBits per byte, microseconds and state: lower is better. Training bytes/s: higher is better.\n");
    for (const MixerRun& mixer : run.mixers)
        std::printf("  %-12s %s\n", mixer.name.c_str(), mixer_named(mixer.name).description.c_str());
    std::printf("Same seed, same bits, for any number of threads. Hashes of the trained parameters:");
    for (const MixerRun& mixer : run.mixers)
        std::printf("  %s %016llx", mixer.name.c_str(),
                    static_cast<unsigned long long>(fingerprint(*mixer.model)));
    std::printf("\n");
}

/// What the heads of trained mixers that have queries and keys do, and what the softmax of their first layer is worth.
void print_routing(const Experiment& run, const Text& text) {
    bool any = false;
    for (const MixerRun& mixer : run.mixers) {
        if (stop) return;
        const std::vector<LayerRouting> layers = routing_of(*mixer.model, text, run.config);
        if (layers.empty()) continue;
        if (!any) {
            std::printf("\nRouting: the skew-symmetric part of the scores, which moves information between positions.\n");
            std::printf("Its effective rank and its share of the scores' squares, means over heads on held-out text, layer by layer:\n");
        }
        any = true;
        std::printf("  %-12s", mixer.name.c_str());
        for (std::size_t l = 0; l < layers.size(); ++l)
            std::printf("%s layer %zu: rank %4.1f, %2.0f%%", l == 0 ? "" : "  ", l + 1, layers[l].rank, 100.0 * layers[l].energy);
        std::printf("\n");
    }
    any = false;
    for (const MixerRun& mixer : run.mixers) {
        if (mixer_named(mixer.name).linear_form.empty()) continue;
        if (!any)
            std::printf("The first layer made linear (softmax replaced by ELU + 1, same weights), validation bits/byte:\n"
                        "  %-12s %8s %9s %s %lld %s\n",
                        "", "softmax", "linear", " after", static_cast<long long>(retraining_steps), "more steps of training");
        any = true;
        const LinearisedFirstLayer bits = linearise_first_layer(mixer, text, run.config, run.seed, stop);
        if (stop) return;
        std::printf("  %-12s %8.3f %9.3f %7.3f\n", mixer.name.c_str(), mixer.result->validation_bits, bits.at_once, bits.retrained);
        std::fflush(stdout);
    }
}

void print_samples(const Experiment& run, const Arguments& arguments) {
    for (const MixerRun& mixer : run.mixers) {
        if (arguments.sample == 0 || stop) return;
        std::printf("\n--- %s writes, token by token ---\n%s", mixer.name.c_str(), arguments.prompt.c_str());
        sample(*mixer.model, arguments.prompt, arguments.sample, run.seed, stop, print_byte);
        std::printf("\n");
    }
    std::fflush(stdout);
}

/// Says whether every model beats both baselines, as each must after a full run. A short run is not judged.
int judge(const Experiment& run, const Baselines& bits) {
    if (run.steps < default_steps) {
        std::printf("\nVerdict: none, which takes a run of at least %lld steps; this one had %lld.\n",
                    static_cast<long long>(default_steps), static_cast<long long>(run.steps));
        return success;
    }
    const bool pairs = bits.bigram < bits.unigram;
    const double mark = pairs ? bits.bigram : bits.unigram;
    std::string failed;
    const MixerRun* last = nullptr;  // of those that beat the mark, the one nearest to it
    for (const MixerRun& mixer : run.mixers) {
        const double reached = mixer.result->validation_bits;
        if (reached < mark) {
            if (last == nullptr || last->result->validation_bits < reached) last = &mixer;
            continue;
        }
        failed += " " + mixer.name;
        std::fprintf(stderr, "language_model: %s has not learned: %.3f bits per byte, must be below %.3f\n",
                     mixer.name.c_str(), reached, mark);
    }
    const char* baseline = pairs ? "bigram" : "unigram";
    if (!failed.empty()) {
        std::printf("\nVerdict: failed. Not below the %s's %.3f bits per byte:%s.\n", baseline, mark,
                    failed.c_str());
        return not_learned;
    }
    std::printf("\nVerdict: passed. Every mixer beats the %s's %.3f bits per byte; the worst, %s, has %.3f.\n",
                baseline, mark, last->name.c_str(), last->result->validation_bits);
    return success;
}

int interrupted(const Experiment& run, const Text& text, const std::string& checkpoint) {
    const std::string path = checkpoint.empty() ? free_checkpoint_path() : checkpoint;
    save_checkpoint(path, run, text);
    std::fprintf(stderr, "language_model: stopped; continue with --resume %s\n", path.c_str());
    return 128 + stop_signal;
}

int run_demo(const Arguments& arguments) {
    if (arguments.threads > 0) use_threads(arguments.threads);
    Eigen::setNbThreads(1);  // the threads are ours: see Replicas in train.hpp

    const ModelConfig config;
    const Text text = read_text(arguments.text, config.context);
    const bool resuming = !arguments.resume.empty();
    std::string checkpoint = arguments.checkpoint;
    if (!checkpoint.empty() && checkpoint != arguments.resume) check_new_checkpoint_path(checkpoint);
    if (checkpoint.empty()) checkpoint = arguments.resume;
    const auto& names = arguments.mixers;
    Experiment run = resuming ? resumed_experiment(arguments, config, text)
                              : new_experiment(config, names.empty() ? mixers_of_registry(false) : names,
                                               arguments.steps, arguments.seed);
    const Baselines bits = baselines(text.training(), text.validation());

    print_header(run, text);
    for (MixerRun& mixer : run.mixers) {
        if (mixer.result) continue;  // the run we resume had finished this one
        train(mixer, text, config, run.steps, stop);
        if (stop) return interrupted(run, text, checkpoint);
        mixer.result = evaluate(mixer, text, config);
        if (!checkpoint.empty()) save_checkpoint(checkpoint, run, text);
    }
    print_table(run, bits);
    print_routing(run, text);
    print_samples(run, arguments);
    if (stop) return interrupted(run, text, checkpoint);
    return judge(run, bits);
}

}  // namespace
}  // namespace demo

int main(int argc, char** argv) {
    demo::let_waiting_threads_sleep(argv);
    demo::listen_for_signals();
    const auto complain = [](const std::exception& error, int exit) {
        std::fflush(stdout);
        std::fprintf(stderr, "language_model: %s\n", error.what());
        return exit;
    };
    try {
        return demo::run_demo(demo::parse(argc, argv));
    } catch (const demo::LibraryError& error) {
        return complain(error, demo::defect);
    } catch (const std::exception& error) {  // arguments, text, checkpoint, memory
        return complain(error, demo::bad_input);
    }
}
