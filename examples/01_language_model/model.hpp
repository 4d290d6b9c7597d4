// The language model: embedding, blocks, norm, output head.
//
//     x = embedding[byte]
//     every block:   x = x + mixer(norm(x)),   x = x + SwiGLU(norm(x))
//     logits = norm(x) W_head
#pragma once

#include <memory>

#include "mixer.hpp"

namespace demo {

/// Everything that decides what is trained, and so what a checkpoint must agree with.
struct ModelConfig {
    Index width = 96;
    Index hidden = 192;  // of SwiGLU
    Index blocks = 2;
    Index heads = 3;
    Index modes = 16;
    Index context = 128;     // bytes of one training window,
    Index judged = context;  // of which the loss counts the last so many predictions
    Index batch = 4;         // windows of one step,
    Index replicas = 4;      // shared out among this many copies of the model (see train.hpp)
    double peak_rate = 6e-3;

    bool operator==(const ModelConfig&) const = default;
};

/// Pre-norm residual block. The mixer moves information between positions, SwiGLU works on each.
class Block {
  public:
    Block(const std::string& name, const ModelConfig& config, const MixerEntry& entry, Random& random)
        : mixer_norm_(name + ".mixer_norm", config.width),
          mixer_(entry.make(name + ".mixer", mixer_config(config), random)),
          network_norm_(name + ".network_norm", config.width),
          network_(name + ".network", config.width, config.hidden, random, out_gain(config)) {}

    void collect(Parameters& all) {
        all.push_back(&mixer_norm_.gain);
        mixer_->collect(all);
        all.push_back(&network_norm_.gain);
        network_.collect(all);
    }

    void forward(const Matrix& x, Batch batch, bool train, Matrix& y) {
        mixer_norm_.forward(x, normed_);
        mixer_->forward(normed_, batch, train, middle_);
        middle_ += x;
        network_norm_.forward(middle_, network_normed_);
        network_.forward(network_normed_, y);
        y += middle_;
    }

    /// The residual stream carries the gradient back unchanged; each branch adds its own.
    void backward(Matrix& gradient) {
        network_.backward(gradient, branch_);
        network_norm_.backward(branch_, gradient);
        mixer_->backward(gradient, branch_);
        mixer_norm_.backward(branch_, gradient);
    }

    Mixer& mixer() { return *mixer_; }

    void begin_decode(Index capacity) { mixer_->begin_decode(capacity); }

    void step(Row& x) {
        mixer_norm_.step(x, row_);
        mixer_->step(row_, branch_row_);
        x += branch_row_;
        network_norm_.step(x, row_);
        network_.step(row_, branch_row_);
        x += branch_row_;
    }

    std::size_t decode_state_bytes(Index position) const { return mixer_->decode_state_bytes(position); }

  private:
    /// Branches start small, so that the sum over all of them starts at the size of one.
    static double out_gain(const ModelConfig& config) {
        return 1.0 / std::sqrt(2.0 * static_cast<double>(config.blocks));
    }
    static MixerConfig mixer_config(const ModelConfig& config) {
        return {.width = config.width,
                .heads = config.heads,
                .modes = config.modes,
                .out_gain = out_gain(config)};
    }

    RmsNorm mixer_norm_;
    std::unique_ptr<Mixer> mixer_;
    RmsNorm network_norm_;
    SwiGlu network_;
    Matrix normed_, middle_, network_normed_, branch_;
    Row row_, branch_row_;
};

class Model {
  public:
    Model(const ModelConfig& config, const MixerEntry& entry, Random& random)
        : embedding_("embedding", config.width, random),
          norm_("norm", config.width),
          head_("head", config.width, 256, random, 0.3) {
        for (Index b = 0; b < config.blocks; ++b)
            blocks_.push_back(std::make_unique<Block>("block" + std::to_string(b), config, entry, random));
        activations_.resize(blocks_.size() + 1);
        parameters_.push_back(&embedding_.table);
        for (auto& block : blocks_) block->collect(parameters_);
        parameters_.push_back(&norm_.gain);
        parameters_.push_back(&head_.weight);
    }

    const Parameters& parameters() const { return parameters_; }
    Index parameter_count() const {
        Index count = 0;
        for (const Parameter* p : parameters_) count += p->value.size();
        return count;
    }

    Mixer& mixer(Index block) { return blocks_[static_cast<std::size_t>(block)]->mixer(); }

    /// Logits of the byte after each of `bytes`, which hold batch.rows() of them. With `train`,
    /// backward() may follow; `bytes` must live until then.
    const Matrix& forward(std::span<const std::uint8_t> bytes, Batch batch, bool train) {
        embedding_.forward(bytes, activations_[0]);
        for (std::size_t b = 0; b < blocks_.size(); ++b)
            blocks_[b]->forward(activations_[b], batch, train, activations_[b + 1]);
        norm_.forward(activations_.back(), normed_);
        head_.forward(normed_, logits_);
        return logits_;
    }

    /// Mean cross-entropy, in nats, of the judged `targets` under those logits.
    double loss(std::span<const std::uint8_t> bytes, std::span<const std::uint8_t> targets, Batch batch,
                bool train) {
        forward(bytes, batch, train);
        return cross_entropy(logits_, targets, batch.length, batch.judged);
    }

    /// Fills the gradient of every parameter, after loss() with `train`.
    void backward() {
        head_.backward(logits_, branch_);  // which cross_entropy() turned into their gradient
        gradient_.setZero(branch_.rows(), branch_.cols());
        norm_.backward(branch_, gradient_);
        for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) (*block)->backward(gradient_);
        embedding_.backward(gradient_);
    }

    void begin_decode(Index capacity) {
        for (auto& block : blocks_) block->begin_decode(capacity);
    }

    /// Reads one byte and returns the logits of the next one.
    const Row& step(std::uint8_t byte) {
        embedding_.step(byte, row_);
        for (auto& block : blocks_) block->step(row_);
        norm_.step(row_, normed_row_);
        head_.step(normed_row_, logits_row_);
        return logits_row_;
    }

    /// What must be kept between tokens once `position` of them have been read.
    std::size_t decode_state_bytes(Index position) const {
        std::size_t bytes = 0;
        for (const auto& block : blocks_) bytes += block->decode_state_bytes(position);
        return bytes;
    }

  private:
    Embedding embedding_;
    std::vector<std::unique_ptr<Block>> blocks_;
    RmsNorm norm_;
    Linear head_;
    Parameters parameters_;
    std::vector<Matrix> activations_;  // the residual stream before and after every block
    Matrix normed_, logits_, gradient_, branch_;
    Row row_, normed_row_, logits_row_;
};

}  // namespace demo
