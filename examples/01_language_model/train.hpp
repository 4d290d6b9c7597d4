// Training one mixer's model, judging it on the validation bytes, timing its decoding, and letting
// it write.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <exception>
#include <memory>
#include <numbers>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <unistd.h>

#include <interstate/cpu/parallel.hpp>

#include "mixers/registry.hpp"
#include "model.hpp"
#include "optimizer.hpp"
#include "report.hpp"
#include "text.hpp"

namespace demo {

/// What a finished mixer is compared by.
struct Result {
    double validation_bits = 0.0;   // per byte
    double bytes_per_second = 0.0;  // of training
    double decode_us_256 = 0.0;     // microseconds a token, 256 tokens into the text
    double decode_us_4096 = 0.0;
    Index state_bytes_256 = 0;  // kept between tokens
    Index state_bytes_4096 = 0;
};

/// One mixer on its way: all that a checkpoint has to remember of it.
struct MixerRun {
    std::string name;
    std::unique_ptr<Model> model;
    std::unique_ptr<AdamW> optimizer;
    Random data;           // draws the training windows
    Index step = 0;        // updates done
    double seconds = 0.0;  // of training, over all sittings
    std::optional<Result> result{};
};

/// Every mixer starts from the same seed and sees the same windows in the same order.
inline MixerRun new_run(const MixerEntry& entry, const ModelConfig& config, std::uint64_t seed) {
    Random seeds(seed);
    Random parameters(seeds.next());
    auto model = std::make_unique<Model>(config, entry, parameters);
    auto optimizer = std::make_unique<AdamW>(model->parameters());
    return {.name = entry.name,
            .model = std::move(model),
            .optimizer = std::move(optimizer),
            .data = Random(seeds.next())};
}
inline MixerRun new_run(const std::string& name, const ModelConfig& config, std::uint64_t seed) {
    return new_run(mixer_named(name), config, seed);
}

inline double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Windows below each other: what is read, and what is to be predicted, the same one byte later.
class Windows {
  public:
    explicit Windows(const ModelConfig& config)
        : length_(static_cast<std::size_t>(config.context)), judged_(config.judged) {}

    void clear() {
        bytes_.clear();
        targets_.clear();
    }
    void add(Bytes window) {
        bytes_.insert(bytes_.end(), window.begin(), window.end() - 1);
        targets_.insert(targets_.end(), window.begin() + 1, window.end());
    }
    Bytes bytes() const { return bytes_; }
    Bytes targets() const { return targets_; }
    Batch batch() const {
        return {.sequences = static_cast<Index>(bytes_.size() / length_),
                .length = static_cast<Index>(length_),
                .judged = judged_};
    }

  private:
    std::size_t length_;
    Index judged_;
    std::vector<std::uint8_t> bytes_, targets_;
};

/// How many threads to use from now on. Without OpenMP there is one, whatever is asked for.
inline void use_threads(int threads) {
#if defined(_OPENMP)
    omp_set_num_threads(threads);
#else
    (void)threads;
#endif
}

/// Makes threads that wait sleep instead of spin, which would take the processor from the one they wait
/// for whenever another program is running too. OpenMP reads this as the program starts, so it starts again.
inline void let_waiting_threads_sleep(char** argv) {
    if (std::getenv("OMP_WAIT_POLICY") != nullptr) return;
    setenv("OMP_WAIT_POLICY", "passive", 0);
    execv("/proc/self/exe", argv);  // returns only where it cannot be done; then we do without
}

/// Copies of a model that share a batch among them, as several GPUs would: each reads its own windows
/// and finds its own gradients, which are then averaged. One copy is the work of one thread.
///
/// A sum of floats depends on its order. Here the number of copies, the windows each of them reads and
/// the order in which their results are added are fixed, so the same seed gives the same bits on one
/// thread or sixty-four; threads beyond the number of copies have nothing to do.
class Replicas {
  public:
    Replicas(Model& model, const MixerEntry& entry, const ModelConfig& config) : model_(model) {
        for (Index r = 0; r < config.replicas; ++r) {
            Random unused(0);  // the values are copied from `model` before they are used
            copies_.push_back(std::make_unique<Model>(config, entry, unused));
            windows_.emplace_back(config);
        }
    }

    /// Mean cross-entropy of the windows, in nats; with `train`, also the gradients of the model.
    double loss(const std::vector<Bytes>& windows, bool train) {
        const std::size_t share = (windows.size() + copies_.size() - 1) / copies_.size();
        std::vector<double> losses(copies_.size(), 0.0);
        std::vector<float> weights(copies_.size(), 0.0f);  // a copy's share of all windows
        in_parallel(copies_.size(), [&](std::size_t r) {
            windows_[r].clear();
            for (std::size_t w = r * share; w < std::min((r + 1) * share, windows.size()); ++w)
                windows_[r].add(windows[w]);
            const Batch batch = windows_[r].batch();
            if (batch.sequences == 0) return;
            weights[r] = static_cast<float>(batch.sequences) / static_cast<float>(windows.size());
            Model& copy = *copies_[r];
            for (std::size_t p = 0; p < copy.parameters().size(); ++p)
                copy.parameters()[p]->value = model_.parameters()[p]->value;
            losses[r] = weights[r] * copy.loss(windows_[r].bytes(), windows_[r].targets(), batch, train);
            if (train) copy.backward();
        });
        if (train) {
            in_parallel(model_.parameters().size(), [&](std::size_t p) {
                Matrix& sum = model_.parameters()[p]->gradient;
                sum.setZero();
                for (std::size_t r = 0; r < copies_.size(); ++r)
                    if (weights[r] > 0.0f) sum += weights[r] * copies_[r]->parameters()[p]->gradient;
            });
        }
        double sum = 0.0;
        for (const double part : losses) sum += part;
        return sum;
    }

  private:
    /// f(task) on all threads. An exception may not leave a thread, so it waits for the others here.
    template <class F>
    static void in_parallel(std::size_t tasks, F&& f) {
        std::vector<std::exception_ptr> errors(tasks);
        interstate::parallel_for(static_cast<Index>(tasks), 0, [&](Index task, int) {
            const auto t = static_cast<std::size_t>(task);
            try {
                f(t);
            } catch (...) {
                errors[t] = std::current_exception();
            }
        });
        for (const std::exception_ptr& error : errors)
            if (error) std::rethrow_exception(error);
    }

    Model& model_;
    std::vector<std::unique_ptr<Model>> copies_;
    std::vector<Windows> windows_;
};

/// Training, one update at a time.
class Trainer {
  public:
    Trainer(MixerRun& run, const MixerEntry& entry, const Text& text, const ModelConfig& config, Index steps)
        : run_(run), text_(text), config_(config), steps_(steps), replicas_(*run.model, entry, config) {}
    Trainer(MixerRun& run, const Text& text, const ModelConfig& config, Index steps)
        : Trainer(run, mixer_named(run.name), text, config, steps) {}

    /// Returns the loss before the update, in bits per byte.
    double step() {
        std::vector<Bytes> windows;
        for (Index w = 0; w < config_.batch; ++w) windows.push_back(text_.random_window(run_.data));
        const double nats = replicas_.loss(windows, true);
        ++run_.step;
        run_.optimizer->update(run_.step, learning_rate(config_.peak_rate, run_.step, steps_));
        return nats / std::numbers::ln2;
    }

  private:
    MixerRun& run_;
    const Text& text_;
    ModelConfig config_;
    Index steps_;
    Replicas replicas_;
};

/// Trains until `steps` updates are done or `stop` is set, always ending between two updates.
inline void train(MixerRun& run, const Text& text, const ModelConfig& config, Index steps,
                  const std::atomic<bool>& stop) {
    Trainer trainer(run, text, config, steps);
    Progress progress(run.name, steps, run.step);
    const double started = now(), seconds_before = run.seconds;
    const Index step_before = run.step;
    while (run.step < steps && !stop) {
        const double bits = trainer.step();
        const double here = now() - started;
        run.seconds = seconds_before + here;
        const auto bytes = static_cast<double>((run.step - step_before) * config.batch * config.context);
        progress.update(run.step, bits, bytes / here);
    }
    progress.finish();
}

/// Mean bits per byte over all validation windows.
inline double validate(Model& model, const MixerEntry& entry, const Text& text, const ModelConfig& config) {
    Replicas replicas(model, entry, config);
    const auto batch = static_cast<std::size_t>(config.batch);
    double nats = 0.0;
    for (std::size_t first = 0; first < text.windows(); first += batch) {
        std::vector<Bytes> windows;
        for (std::size_t w = first; w < std::min(first + batch, text.windows()); ++w)
            windows.push_back(text.validation_window(w));
        nats += static_cast<double>(windows.size()) * replicas.loss(windows, false);
    }
    return nats / static_cast<double>(text.windows()) / std::numbers::ln2;
}
inline double validate(MixerRun& run, const Text& text, const ModelConfig& config) {
    return validate(*run.model, mixer_named(run.name), text, config);
}

/// Median microseconds a token at the next `timed` positions.
inline double time_decode(Model& model, Bytes bytes, std::size_t position, std::size_t timed) {
    std::vector<double> seconds;
    for (std::size_t i = position; i < position + timed; ++i) {
        const double start = now();
        model.step(bytes[i % bytes.size()]);
        seconds.push_back(now() - start);
    }
    std::nth_element(seconds.begin(), seconds.begin() + static_cast<std::ptrdiff_t>(timed / 2),
                     seconds.end());
    return 1e6 * seconds[timed / 2];
}

/// Everything the table says about a trained model.
inline Result evaluate(MixerRun& run, const Text& text, const ModelConfig& config) {
    constexpr std::size_t early = 256, late = 4096, timed = 65;
    Model& model = *run.model;
    Result result;
    result.validation_bits = validate(run, text, config);
    result.bytes_per_second = static_cast<double>(run.step * config.batch * config.context) / run.seconds;
    model.begin_decode(late + timed);
    const Bytes bytes = text.validation();
    time_decode(model, bytes, 0, early);
    result.decode_us_256 = time_decode(model, bytes, early, timed);
    time_decode(model, bytes, early + timed, late - early - timed);
    result.decode_us_4096 = time_decode(model, bytes, late, timed);
    result.state_bytes_256 = static_cast<Index>(model.decode_state_bytes(early));
    result.state_bytes_4096 = static_cast<Index>(model.decode_state_bytes(late));
    return result;
}

/// A byte drawn from softmax(logits / temperature): below 1, likely bytes become likelier still.
inline std::uint8_t draw(const Row& logits, double temperature, Random& random) {
    const double top = logits.maxCoeff();
    std::vector<double> weight(static_cast<std::size_t>(logits.size()));
    double sum = 0.0;
    for (std::size_t b = 0; b < weight.size(); ++b)
        sum += weight[b] = std::exp((logits(static_cast<Index>(b)) - top) / temperature);
    double left = sum * random.uniform();
    for (std::size_t b = 0; b + 1 < weight.size(); ++b)
        if ((left -= weight[b]) < 0.0) return static_cast<std::uint8_t>(b);
    return static_cast<std::uint8_t>(weight.size() - 1);
}

/// Reads the prompt, then writes `count` bytes, each handed to `write` as it is drawn, until `stop`.
template <class Write>
void sample(Model& model, std::string_view prompt, Index count, std::uint64_t seed,
            const std::atomic<bool>& stop, Write&& write) {
    constexpr double temperature = 0.7;
    if (prompt.empty()) prompt = "\n";
    Random random(seed);
    model.begin_decode(static_cast<Index>(prompt.size()) + count);
    const Row* logits = nullptr;
    for (const char c : prompt) logits = &model.step(static_cast<std::uint8_t>(c));
    for (Index i = 0; i < count && !stop; ++i) {
        const std::uint8_t byte = draw(*logits, temperature, random);
        write(byte);
        if (i + 1 < count) logits = &model.step(byte);
    }
}

/// A number that differs if any bit of any parameter does.
inline std::uint64_t fingerprint(const Model& model) {
    std::uint64_t hash = fnv1a(nullptr, 0);
    for (const Parameter* p : model.parameters())
        hash = fnv1a(p->value.data(), static_cast<std::size_t>(p->value.size()) * sizeof(float), hash);
    return hash;
}

}  // namespace demo
