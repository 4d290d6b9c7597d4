// The softmax mixer: causal multi-head attention with rotary positions.
//
//     [q, k, v] = x W_in        o = softmax attention(rope(q), rope(k), v)        out = o W_out
//
// Decoding keeps the key and the value of every position: its state grows with the text.
#include <attention/attention.hpp>

#include "../mixer.hpp"
#include "rope.hpp"

namespace demo {
namespace {

namespace attention = interstate::attention;

class SoftmaxMixer final : public Mixer {
  public:
    SoftmaxMixer(const std::string& name, const MixerConfig& config, Random& random)
        : in_(name + ".in", config.width, 3 * config.width, random),
          out_(name + ".out", config.width, config.width, random, config.out_gain),
          width_(config.width),
          heads_(config.heads),
          head_dim_(config.width / config.heads),
          rope_(head_dim_) {}

    void collect(Parameters& all) override {
        all.push_back(&in_.weight);
        all.push_back(&out_.weight);
    }

    void forward(const Matrix& x, Batch batch, bool train, Matrix& y) override {
        batch_ = batch;
        in_.forward(x, projected_);
        rope_.prepare(batch.length);
        turn(projected_, 1.0f);
        mixed_.resize(x.rows(), width_);
        lse_.resize(x.rows(), heads_);

        const auto inputs = this->inputs();
        const auto shape = attention::shape_of(inputs);
        saved_ = train ? saved_memory_.saved(attention::saved_size(executor, options_, shape))
                       : interstate::Saved{};
        const auto workspace = workspace_.workspace(
            attention::workspace_size(executor, options_, shape, interstate::pass::forward));
        check(attention::forward(executor, options_, inputs, outputs(), saved_, workspace),
              "attention::forward");

        out_.forward(mixed_, y);
    }

    void backward(const Matrix& dy, Matrix& dx) override {
        out_.backward(dy, dmixed_);
        dprojected_.resize(projected_.rows(), projected_.cols());

        const auto inputs = this->inputs();
        const attention::Upstream<float> upstream{.o = heads_of(dmixed_, 0)};
        const attention::Grads<float> grads{
            .q = heads_of(dprojected_, 0), .k = heads_of(dprojected_, 1), .v = heads_of(dprojected_, 2)};
        const auto workspace = workspace_.workspace(attention::workspace_size(
            executor, options_, attention::shape_of(inputs), interstate::pass::backward));
        check(attention::backward(executor, options_, inputs, outputs(), saved_, upstream, grads, workspace),
              "attention::backward");

        turn(dprojected_, -1.0f);
        in_.backward(dprojected_, dx);
    }

    Scores scores() override { return {heads_of(projected_, 0), heads_of(projected_, 1)}; }

    void begin_decode(Index capacity) override {
        rope_.prepare(capacity);
        keys_.setZero(capacity, width_);
        values_.setZero(capacity, width_);
        length_ = 0;
    }

    void step(const Row& x, Row& y) override {
        in_.step(x, row_);
        rope_.apply(row_.data(), 2 * heads_, length_, 1.0f);
        mixed_row_.resize(width_);
        const auto token_view = [&](float* data) { return view(data, {Index(1), heads_, head_dim_}); };
        const auto cache_view = [&](Matrix& m) {
            return view(m.data(), {Index(1), m.rows(), heads_, head_dim_});
        };
        const attention::State<float> state{cache_view(keys_), cache_view(values_), length_};
        const attention::Token<float> token{token_view(row_.data()), token_view(row_.data() + width_),
                                            token_view(row_.data() + 2 * width_)};
        const attention::TokenOut<float> out{token_view(mixed_row_.data())};
        const auto workspace = workspace_.workspace(attention::workspace_size(
            executor, options_, attention::shape_of(state, token), interstate::pass::step));
        check(attention::step(executor, options_, attention::Params{}, state, token, out, workspace),
              "attention::step");
        ++length_;
        out_.step(mixed_row_, y);
    }

    std::size_t decode_state_bytes(Index position) const override {
        return static_cast<std::size_t>(2 * position * width_) * sizeof(float);
    }

  private:
    /// Part 0, 1, 2 (q, k, v) of each row of m as (sequences, length, heads, head_dim): a view.
    interstate::View<float, 4> heads_of(Matrix& m, Index part) const {
        return view(m.data() + part * width_, {batch_.sequences, batch_.length, heads_, head_dim_},
                    {batch_.length * m.cols(), m.cols(), head_dim_, Index(1)});
    }
    attention::Inputs<float> inputs() {
        return {.q = heads_of(projected_, 0), .k = heads_of(projected_, 1), .v = heads_of(projected_, 2)};
    }
    attention::Outputs<float> outputs() {
        return {.o = heads_of(mixed_, 0),
                .lse = view(lse_.data(), {batch_.sequences, batch_.length, heads_})};
    }
    /// RoPE on q and k, which lie next to each other in every row.
    void turn(Matrix& m, float direction) const {
        for (Index r = 0; r < m.rows(); ++r) rope_.apply(&m(r, 0), 2 * heads_, r % batch_.length, direction);
    }

    Linear in_, out_;
    Index width_, heads_, head_dim_;
    Rope rope_;
    attention::Options options_{};  // causal softmax

    Batch batch_;
    Matrix projected_, mixed_, lse_;  // [q, k, v], o
    Matrix dprojected_, dmixed_;
    interstate::Saved saved_;
    Scratch saved_memory_, workspace_;

    Matrix keys_, values_;  // of decoding
    Index length_ = 0;
    Row row_, mixed_row_;
};

}  // namespace

std::unique_ptr<Mixer> make_softmax(const std::string& name, const MixerConfig& config, Random& random) {
    return std::make_unique<SoftmaxMixer>(name, config, random);
}

}  // namespace demo
