// The language model example: gradients, decoding, determinism, checkpoints, baselines.
#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "../../examples/01_language_model/checkpoint.hpp"
#include "../../examples/01_language_model/routing.hpp"

namespace demo {
namespace {

ModelConfig tiny_config() {
    return {.width = 16,
            .hidden = 24,
            .blocks = 2,
            .heads = 2,
            .modes = 3,
            .context = 24,
            .batch = 6,
            .replicas = 4,
            .peak_rate = 1e-2};
}

/// English enough to be learned: words in an order that a seed decides.
Text tiny_text(std::uint64_t seed = 1) {
    const std::vector<std::string> words{"the ", "river ", "runs ", "to ", "sea ", "and ", "not ", "full.\n"};
    Random random(seed);
    std::string text;
    while (text.size() < 4000) text += words[random.below(words.size())];
    return {"tiny", std::vector<std::uint8_t>(text.begin(), text.end()), tiny_config().context};
}

std::vector<std::string> mixer_names() {
    std::vector<std::string> names;
    for (const MixerEntry& entry : all_mixers()) names.push_back(entry.name);
    return names;
}

/// A folder that is gone when the test ends.
class Folder {
  public:
    Folder() {
        std::string name = (std::filesystem::temp_directory_path() / "language_model_test_XXXXXX").string();
        path_ = mkdtemp(name.data());
    }
    ~Folder() { std::filesystem::remove_all(path_); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    std::string file(const char* name) const { return (path_ / name).string(); }

  private:
    std::filesystem::path path_;
};

std::string read_all(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

void write_all(const std::string& path, const std::string& content) {
    std::ofstream(path, std::ios::binary) << content;
}

class EveryMixer : public testing::TestWithParam<std::string> {};

// The derivative of the loss along random directions of every parameter, by differences.
TEST_P(EveryMixer, GradientMatchesFiniteDifferences) {
    const ModelConfig config = tiny_config();
    const Text text = tiny_text();
    Random random(7);
    Model model(config, mixer_named(GetParam()), random);
    Windows windows(config);
    for (int w = 0; w < 3; ++w) windows.add(text.random_window(random));
    const auto loss = [&] { return model.loss(windows.bytes(), windows.targets(), windows.batch(), true); };
    loss();
    model.backward();

    for (Parameter* p : model.parameters()) {
        const double size = p->gradient.cast<double>().norm();
        EXPECT_GT(size, 0.0) << p->name << " has no gradient";
        const Matrix value = p->value;
        for (int direction = 0; direction < 3; ++direction) {
            // Along the gradient itself, then along random directions.
            Matrix along = p->gradient;
            if (direction > 0)
                for (Index i = 0; i < along.size(); ++i)
                    along.data()[i] = static_cast<float>(random.normal());
            along /= along.norm();
            const double expected = p->gradient.cast<double>().cwiseProduct(along.cast<double>()).sum();
            const auto at = [&](double distance) {
                p->value = value + static_cast<float>(distance) * along;
                return loss();
            };
            const double h = 2e-3;  // larger than the rounding of float wants, so of fourth order
            const double slope = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
            p->value = value;
            EXPECT_NEAR(slope, expected, 0.005 * size + 3e-4) << p->name << ", direction " << direction;
        }
    }
}

// Reading a text token by token gives the logits of reading it at once.
TEST_P(EveryMixer, StepMatchesForward) {
    ModelConfig config = tiny_config();
    config.context = 150;
    const Text text = tiny_text();
    Random random(3);
    Model model(config, mixer_named(GetParam()), random);
    const Bytes bytes = text.training().first(150);
    const Matrix logits = model.forward(bytes, {.sequences = 1, .length = 150}, false);
    for (int again = 0; again < 2; ++again) {  // begin_decode starts afresh
        model.begin_decode(150);
        for (Index t = 0; t < 150; ++t) {
            const Row& step = model.step(bytes[static_cast<std::size_t>(t)]);
            ASSERT_LE((step - logits.row(t)).cwiseAbs().maxCoeff(),
                      2e-5f * logits.cwiseAbs().maxCoeff() + 1e-6f)
                << t;
        }
    }
}

// Later bytes must not change earlier logits, or the model would be cheating.
TEST_P(EveryMixer, IsCausal) {
    Random random(3);
    Model model(tiny_config(), mixer_named(GetParam()), random);
    std::vector<std::uint8_t> bytes(40, 'a');
    const Batch batch{.sequences = 1, .length = 40};
    const Matrix before = model.forward(bytes, batch, false);
    bytes[25] = 'b';
    const Matrix after = model.forward(bytes, batch, false);
    EXPECT_EQ(before.topRows(25), after.topRows(25));
    EXPECT_NE(before.row(39), after.row(39));
}

TEST_P(EveryMixer, SequencesOfABatchAreIndependent) {
    Random random(3);
    Model model(tiny_config(), mixer_named(GetParam()), random);
    std::vector<std::uint8_t> bytes(60);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random.below(256));
    const Matrix together = model.forward(bytes, {.sequences = 3, .length = 20}, false);
    const Matrix alone = model.forward(Bytes(bytes).subspan(20, 20), {.sequences = 1, .length = 20}, false);
    EXPECT_LE((together.middleRows(20, 20) - alone).cwiseAbs().maxCoeff(), 1e-5f);
}

TEST_P(EveryMixer, SameBitsForAnyNumberOfThreads) {
    const int threads_before = interstate::thread_count(0);
    const Text text = tiny_text();
    std::vector<std::uint64_t> prints;
    std::vector<double> bits;
    for (const int threads : {1, 2, 3}) {
        use_threads(threads);
        MixerRun run = new_run(GetParam(), tiny_config(), 11);
        Trainer trainer(run, text, tiny_config(), 12);
        for (int i = 0; i < 12; ++i) trainer.step();
        prints.push_back(fingerprint(*run.model));
        bits.push_back(validate(run, text, tiny_config()));
    }
    use_threads(threads_before);
    EXPECT_EQ(prints[0], prints[1]);
    EXPECT_EQ(prints[0], prints[2]);
    EXPECT_EQ(bits[0], bits[1]);
    EXPECT_EQ(bits[0], bits[2]);
    EXPECT_NE(prints[0], fingerprint(*new_run(GetParam(), tiny_config(), 11).model));
}

TEST_P(EveryMixer, Learns) {
    const Text text = tiny_text();
    MixerRun run = new_run(GetParam(), tiny_config(), 1);
    Trainer trainer(run, text, tiny_config(), 150);
    for (int i = 0; i < 150; ++i) trainer.step();
    EXPECT_LT(validate(run, text, tiny_config()), baselines(text.training(), text.validation()).bigram);
}

TEST_P(EveryMixer, ResumesBitForBit) {
    const Folder folder;
    const std::string path = folder.file("a.safetensors");
    const Text text = tiny_text();
    const ModelConfig config = tiny_config();

    Experiment whole = new_experiment(config, {GetParam()}, 10, 5);
    Trainer trainer(whole.mixers[0], text, config, whole.steps);
    for (int i = 0; i < 10; ++i) trainer.step();

    Experiment part = new_experiment(config, {GetParam()}, 10, 5);
    Trainer first_sitting(part.mixers[0], text, config, part.steps);
    for (int i = 0; i < 4; ++i) first_sitting.step();
    save_checkpoint(path, part, text);

    Experiment resumed = load_checkpoint(path, config, text);
    ASSERT_EQ(resumed.mixers.size(), 1u);
    EXPECT_EQ(resumed.mixers[0].step, 4);
    EXPECT_EQ(resumed.steps, 10);
    EXPECT_EQ(resumed.seed, 5u);
    Trainer second_sitting(resumed.mixers[0], text, config, resumed.steps);
    for (int i = 0; i < 6; ++i) second_sitting.step();
    EXPECT_EQ(fingerprint(*resumed.mixers[0].model), fingerprint(*whole.mixers[0].model));
    EXPECT_NE(fingerprint(*resumed.mixers[0].model), fingerprint(*part.mixers[0].model));
}

// The models that are compared are of nearly the same size; s4d_only, the ablation, has the most.
TEST_P(EveryMixer, HasAboutAsManyParametersAsTheOthers) {
    const auto count = [](const std::string& name) {
        return static_cast<double>(new_run(name, ModelConfig{}, 1).model->parameter_count());
    };
    EXPECT_NEAR(count(GetParam()) / count(all_mixers().front().name), 1.0, 0.06);
}

TEST_P(EveryMixer, SamplesAreDecidedByTheSeed) {
    MixerRun run = new_run(GetParam(), tiny_config(), 1);
    const std::atomic<bool> stop{false};
    const auto written = [&](std::uint64_t seed, const char* prompt) {
        std::vector<std::uint8_t> bytes;
        sample(*run.model, prompt, 30, seed, stop, [&](std::uint8_t byte) { bytes.push_back(byte); });
        return bytes;
    };
    EXPECT_EQ(written(1, "the ").size(), 30u);
    EXPECT_EQ(written(1, "the "), written(1, "the "));
    EXPECT_NE(written(1, "the "), written(2, "the "));
    EXPECT_EQ(written(1, "").size(), 30u);
}

INSTANTIATE_TEST_SUITE_P(Mixers, EveryMixer, testing::ValuesIn(mixer_names()),
                         [](const auto& info) { return info.param; });

// The scores of S-D attention are u K u with K = S - D: without D nothing but routing, without S none.
TEST(Routing, IsWhatTheGeneratorSays) {
    const ModelConfig config = tiny_config();
    const Text text = tiny_text();
    for (const char* mixer : {"sd", "sd_linear"}) {
        MixerRun run = new_run(mixer, config, 3);
        const auto set = [&](const char* suffix, float value) {
            for (Parameter* p : run.model->parameters())
                if (p->name.ends_with(suffix)) p->value.setConstant(value);
        };
        for (const LayerRouting& layer : routing_of(*run.model, text, config)) {
            EXPECT_GT(layer.energy, 0.005);  // P begins small beside D
            EXPECT_LT(layer.energy, 0.95);
        }
        set(".delta", -50.0f);
        std::vector<LayerRouting> layers = routing_of(*run.model, text, config);
        ASSERT_EQ(layers.size(), static_cast<std::size_t>(config.blocks));
        for (const LayerRouting& layer : layers) {
            EXPECT_NEAR(layer.energy, 1.0, 1e-5);
            EXPECT_GT(layer.rank, 1.9);  // singular values come in pairs
        }
        set(".delta", 0.0f);
        set(".P", 0.0f);
        for (const LayerRouting& layer : routing_of(*run.model, text, config)) EXPECT_LT(layer.energy, 1e-5);
    }
    MixerRun other = new_run("s4d", config, 3);
    EXPECT_TRUE(routing_of(*other.model, text, config).empty());
}

TEST(LinearForm, TakesThePlaceOfTheFirstLayerAlone) {
    ModelConfig config = tiny_config();
    const Text text = tiny_text();
    const std::atomic<bool> stop{false};
    for (const char* mixer : {"softmax", "sd"}) {
        const MixerEntry& entry = mixer_named(mixer);
        const auto bits = [&](const MixerEntry& e, Index blocks) {
            config.blocks = blocks;
            MixerRun run = new_run(e, config, 5);  // the same parameters, whichever form reads them
            for (Parameter* p : run.model->parameters())
                if (p->name.ends_with(".out")) p->value *= 30.0f;  // so that the mixer matters before any training
            return validate(*run.model, e, text, config);
        };
        const MixerEntry first = with_linear_first_layer(entry);
        EXPECT_EQ(bits(first, 1), bits(mixer_named(entry.linear_form), 1));
        EXPECT_NE(bits(first, 1), bits(entry, 1));
        EXPECT_NE(bits(first, 2), bits(mixer_named(entry.linear_form), 2));
        EXPECT_NE(bits(first, 2), bits(entry, 2));

        config.blocks = 2;
        MixerRun run = new_run(mixer, config, 5);
        const std::uint64_t before = fingerprint(*run.model);
        const LinearisedFirstLayer linear = linearise_first_layer(run, text, config, 5, stop);
        EXPECT_EQ(fingerprint(*run.model), before);
        EXPECT_LT(linear.retrained, linear.at_once);  // an untrained model, which any training improves
    }
}

// SISA's importance begins so small that above its gradients lie within the bounds. Here it is as large as content.
TEST(SisaMixer, GradientMatchesFiniteDifferences) {
    const Batch batch{.sequences = 2, .length = 40};
    Random random(5);
    const auto mixer = mixer_named("sisa").make("sisa", {.width = 32, .heads = 2}, random);
    Parameters parameters;
    mixer->collect(parameters);
    for (Parameter* p : parameters) p->fill_normal(random, p->value.rows() == 1 ? 0.5 : 0.2);
    Matrix x(batch.rows(), 32), dy = x, y, dx;
    for (Matrix* m : {&x, &dy})
        for (Index i = 0; i < m->size(); ++i) m->data()[i] = static_cast<float>(random.normal());
    const auto loss = [&] {
        mixer->forward(x, batch, true, y);
        return y.cast<double>().cwiseProduct(dy.cast<double>()).sum();
    };
    loss();
    mixer->backward(dy, dx);

    const auto compare = [&](const std::string& name, Matrix& value, const Matrix& gradient) {
        const Matrix before = value;
        for (int direction = 0; direction < 3; ++direction) {
            Matrix along = gradient;
            if (direction > 0)
                for (Index i = 0; i < along.size(); ++i)
                    along.data()[i] = static_cast<float>(random.normal());
            along /= along.norm();
            const double expected = gradient.cast<double>().cwiseProduct(along.cast<double>()).sum();
            const auto at = [&](double distance) {
                value = before + static_cast<float>(distance) * along;
                return loss();
            };
            const double h = 5e-3;
            const double slope = (8.0 * (at(h) - at(-h)) - (at(2.0 * h) - at(-2.0 * h))) / (12.0 * h);
            value = before;
            EXPECT_NEAR(slope, expected, 1e-3 * gradient.cast<double>().norm() + 1e-3)
                << name << ", direction " << direction;
        }
    };
    for (Parameter* p : parameters) {
        EXPECT_GT(p->gradient.norm(), 0.5) << p->name << " is too small to be compared";
        compare(p->name, p->value, p->gradient);
    }
    compare("x", x, dx);
}

// A step of training on the ends of windows: what comes before is read, and not judged.
TEST(Judged, OnlyTheLastPredictionsOfAWindowCount) {
    ModelConfig config = tiny_config();
    config.judged = 3;
    const Text text = tiny_text();
    Random random(7);
    Model model(config, all_mixers().front(), random);
    Windows windows(config);
    for (int w = 0; w < 2; ++w) windows.add(text.random_window(random));
    const Matrix logits = model.forward(windows.bytes(), windows.batch(), false);
    double nats = 0.0;
    for (Index w = 0; w < 2; ++w)
        for (Index t = config.context - 3; t < config.context; ++t) {
            const Index row = w * config.context + t;
            const auto l = logits.row(row).cast<double>().array();
            nats += std::log(l.exp().sum()) - l(windows.targets()[static_cast<std::size_t>(row)]);
        }
    EXPECT_NEAR(model.loss(windows.bytes(), windows.targets(), windows.batch(), true), nats / 6.0, 1e-5);

    std::vector<std::uint8_t> targets(windows.targets().begin(), windows.targets().end());
    model.backward();
    const Matrix gradient = model.parameters().front()->gradient;
    targets[0] ^= 1;
    model.loss(windows.bytes(), targets, windows.batch(), true);
    model.backward();
    EXPECT_EQ(gradient, model.parameters().front()->gradient);
}

TEST(Text, Splits) {
    const Text text = tiny_text();
    const auto context = static_cast<std::size_t>(tiny_config().context);
    EXPECT_EQ(text.training().size() + text.validation().size(), text.size());
    EXPECT_EQ(text.validation().size(), text.windows() * context + 1);
    EXPECT_EQ(text.training().data() + text.training().size(), text.validation().data());
    Random random(1);
    for (int i = 0; i < 1000; ++i) {
        const Bytes window = text.random_window(random);
        ASSERT_EQ(window.size(), context + 1);
        ASSERT_GE(window.data(), text.training().data());
        ASSERT_LE(window.data() + window.size(), text.validation().data());
    }
    EXPECT_EQ(&text.validation_window(text.windows() - 1).back(), &text.validation().back());
}

TEST(Text, RefusesWhatCannotBeLearned) {
    EXPECT_THROW(Text("empty", {}, 24), InputError);
    EXPECT_THROW(Text("short", std::vector<std::uint8_t>(16 * 25 - 1, 'a'), 24), InputError);
    EXPECT_NO_THROW(Text("enough", std::vector<std::uint8_t>(16 * 25, 'a'), 24));
    const Folder folder;
    EXPECT_THROW(read_text(folder.file("missing"), 24), InputError);
    EXPECT_THROW(read_text(folder.file("."), 24), InputError);
    write_all(folder.file("text"), std::string(500, 'x'));
    EXPECT_EQ(read_text(folder.file("text"), 24).size(), 500u);
}

TEST(Baselines, CountByHand) {
    const std::vector<std::uint8_t> training{'a', 'a', 'b', 'a'}, validation{'a', 'b', 'b'};
    const Baselines bits = baselines(training, validation);
    // Counts start at one: a was seen 3 times and b once, of 4 bytes.
    EXPECT_DOUBLE_EQ(bits.unigram, -std::log2(2.0 / 260.0));  // b, b
    // After a came a and b; after b came a. So P(b|a) = 2/258, P(b|b) = 1/257.
    EXPECT_DOUBLE_EQ(bits.bigram, (-std::log2(2.0 / 258.0) - std::log2(1.0 / 257.0)) / 2.0);
}

TEST(Baselines, OfAConstantTextNearZero) {
    const std::vector<std::uint8_t> text(1'000'000, 'z');
    const Baselines bits = baselines(text, Bytes(text).first(100));
    EXPECT_LT(bits.unigram, 1e-3);
    EXPECT_LT(bits.bigram, 1e-3);
}

TEST(AdamW, FirstStepHasTheSizeOfTheLearningRate) {
    Parameter p("p", 1, 3, false);
    p.gradient << 0.5f, -0.01f, 0.0f;
    AdamW optimizer({&p});
    optimizer.update(1, 0.1);
    EXPECT_NEAR(p.value(0, 0), -0.1f, 1e-4f);
    EXPECT_NEAR(p.value(0, 1), 0.1f, 1e-4f);
    EXPECT_EQ(p.value(0, 2), 0.0f);
}

TEST(LearningRate, RisesThenFalls) {
    EXPECT_NEAR(learning_rate(1.0, 1, 1000), 1.0 / 40.0, 1e-12);
    EXPECT_NEAR(learning_rate(1.0, 40, 1000), 1.0, 1e-12);
    EXPECT_NEAR(learning_rate(1.0, 1000, 1000), 0.1, 1e-12);
    for (Index step = 41; step <= 1000; ++step)
        EXPECT_LT(learning_rate(1.0, step, 1000), learning_rate(1.0, step - 1, 1000));
    EXPECT_GT(learning_rate(1.0, 1, 1), 0.0);
}

/// A run whose first mixer is finished and whose second is on its way.
Experiment two_mixers(const Text& text) {
    Experiment run = new_experiment(tiny_config(), {all_mixers()[0].name, all_mixers()[1].name}, 6, 9);
    Trainer first(run.mixers[0], text, run.config, run.steps);
    for (int i = 0; i < 6; ++i) first.step();
    run.mixers[0].result = Result{.validation_bits = 2.5, .decode_us_256 = 1.0 / 3.0, .state_bytes_4096 = 77};
    Trainer second(run.mixers[1], text, run.config, run.steps);
    for (int i = 0; i < 2; ++i) second.step();
    return run;
}

TEST(Checkpoint, KeepsFinishedMixersBesideTheOneInTraining) {
    const Folder folder;
    const Text text = tiny_text();
    const Experiment run = two_mixers(text);
    save_checkpoint(folder.file("a"), run, text);
    const Experiment back = load_checkpoint(folder.file("a"), tiny_config(), text);
    ASSERT_EQ(back.mixers.size(), 2u);
    for (int m = 0; m < 2; ++m) {
        EXPECT_EQ(back.mixers[m].name, run.mixers[m].name);
        EXPECT_EQ(back.mixers[m].step, run.mixers[m].step);
        EXPECT_EQ(back.mixers[m].data.state(), run.mixers[m].data.state());
        EXPECT_EQ(fingerprint(*back.mixers[m].model), fingerprint(*run.mixers[m].model));
    }
    ASSERT_TRUE(back.mixers[0].result.has_value());
    EXPECT_EQ(back.mixers[0].result->validation_bits, 2.5);
    EXPECT_EQ(back.mixers[0].result->decode_us_256, 1.0 / 3.0);
    EXPECT_EQ(back.mixers[0].result->state_bytes_4096, 77);
    EXPECT_FALSE(back.mixers[1].result.has_value());
    save_checkpoint(folder.file("b"), back, text);
    EXPECT_EQ(read_all(folder.file("a")), read_all(folder.file("b")));
}

TEST(Checkpoint, BelongsToItsTextAndSizes) {
    const Folder folder;
    const Text text = tiny_text();
    save_checkpoint(folder.file("a"), two_mixers(text), text);
    EXPECT_THROW(load_checkpoint(folder.file("a"), tiny_config(), tiny_text(2)), InputError);
    ModelConfig wider = tiny_config();
    wider.width = 32;
    EXPECT_THROW(load_checkpoint(folder.file("a"), wider, text), InputError);
}

TEST(Checkpoint, DamageIsFound) {
    const Folder folder;
    const Text text = tiny_text();
    const std::string path = folder.file("a");
    save_checkpoint(path, two_mixers(text), text);
    const std::string whole = read_all(path);
    EXPECT_THROW(load_checkpoint(folder.file("missing"), tiny_config(), text), InputError);
    EXPECT_THROW(load_checkpoint(folder.file("."), tiny_config(), text), InputError);
    for (const std::size_t length :
         {std::size_t{0}, std::size_t{7}, std::size_t{100}, whole.size() / 2, whole.size() - 1}) {
        write_all(path, whole.substr(0, length));
        EXPECT_THROW(load_checkpoint(path, tiny_config(), text), InputError) << length;
    }
    write_all(path, "And God said, Let there be a checkpoint.");
    EXPECT_THROW(load_checkpoint(path, tiny_config(), text), InputError);
    write_all(path, whole + "x");
    EXPECT_THROW(load_checkpoint(path, tiny_config(), text), InputError);
    // One bit, anywhere: in the header or in the numbers. Padding of the header carries no meaning.
    Random random(1);
    for (int i = 0; i < 200; ++i) {
        std::string flipped = whole;
        const std::size_t at = random.below(whole.size());
        flipped[at] = static_cast<char>(flipped[at] ^ (1 << random.below(8)));
        write_all(path, flipped);
        EXPECT_THROW(load_checkpoint(path, tiny_config(), text), InputError) << "byte " << at;
    }
    write_all(path, whole);
    EXPECT_NO_THROW(load_checkpoint(path, tiny_config(), text));
}

TEST(Check, StatusThatIsNotOkBecomesAnException) {
    EXPECT_THROW(check(interstate::Status::error(interstate::StatusCode::unsupported, "no"), "call"),
                 LibraryError);
}

TEST(Checkpoint, NothingThatExistsIsReplaced) {
    const Folder folder;
    write_all(folder.file("a"), "something dear");
    EXPECT_THROW(check_new_checkpoint_path(folder.file("a")), InputError);
    EXPECT_THROW(check_new_checkpoint_path(folder.file("no folder/a")), InputError);
    EXPECT_THROW(check_new_checkpoint_path(folder.file("")), InputError);
    EXPECT_NO_THROW(check_new_checkpoint_path(folder.file("b")));
    EXPECT_EQ(read_all(folder.file("a")), "something dear");
}

}  // namespace
}  // namespace demo
