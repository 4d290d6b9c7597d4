// The linear mixer: `softmax` with the softmax left out, ELU + 1 of queries and keys in its place.
//
//     [q, k, v] = x W_in        o = linear attention(rope(q), rope(k), v)        out = o W_out
//
// It has the parameters of `softmax`, so that it can be put in its place, but decodes from a state that does not grow.
#include <linear_attention/linear_attention.hpp>

#include "../mixer.hpp"
#include "rope.hpp"

namespace demo {
namespace {

namespace linear_attention = interstate::linear_attention;

class LinearMixer final : public Mixer {
  public:
    LinearMixer(const std::string& name, const MixerConfig& config, Random& random)
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

    void forward(const Matrix& x, Batch batch, bool, Matrix& y) override {
        batch_ = batch;
        in_.forward(x, projected_);
        rope_.prepare(batch.length);
        turn(projected_, 1.0f);
        mixed_.resize(x.rows(), width_);
        const auto inputs = this->inputs();
        const auto workspace = workspace_.workspace(linear_attention::workspace_size(
            executor, options_, linear_attention::shape_of(inputs), interstate::pass::forward));
        check(linear_attention::forward(executor, options_, inputs, outputs(), interstate::Saved{}, workspace),
              "linear_attention::forward");
        out_.forward(mixed_, y);
    }

    void backward(const Matrix& dy, Matrix& dx) override {
        out_.backward(dy, dmixed_);
        dprojected_.resize(projected_.rows(), projected_.cols());
        const auto inputs = this->inputs();
        const linear_attention::Upstream<float> upstream{.o = heads_of(dmixed_, 0)};
        const linear_attention::Grads<float> grads{
            .q = heads_of(dprojected_, 0), .k = heads_of(dprojected_, 1), .v = heads_of(dprojected_, 2)};
        const auto workspace = workspace_.workspace(linear_attention::workspace_size(
            executor, options_, linear_attention::shape_of(inputs), interstate::pass::backward));
        check(linear_attention::backward(executor, options_, inputs, outputs(), interstate::Saved{}, upstream, grads, workspace),
              "linear_attention::backward");
        turn(dprojected_, -1.0f);
        in_.backward(dprojected_, dx);
    }

    Scores scores() override { return {heads_of(projected_, 0), heads_of(projected_, 1)}; }

    void begin_decode(Index capacity) override {
        rope_.prepare(capacity);
        state_.assign(static_cast<std::size_t>(width_ * head_dim_), 0.0f);
        sums_.assign(static_cast<std::size_t>(width_), 0.0f);
        length_ = 0;
    }

    void step(const Row& x, Row& y) override {
        in_.step(x, row_);
        rope_.apply(row_.data(), 2 * heads_, length_, 1.0f);
        mixed_row_.resize(width_);
        const auto token_view = [&](float* data) { return view(data, {Index(1), heads_, head_dim_}); };
        const linear_attention::State<float> state{view(state_.data(), {Index(1), heads_, head_dim_, head_dim_}),
                                                   token_view(sums_.data())};
        const linear_attention::Token<float> token{token_view(row_.data()), token_view(row_.data() + width_),
                                                   token_view(row_.data() + 2 * width_)};
        const linear_attention::TokenOut<float> out{token_view(mixed_row_.data())};
        const auto workspace = workspace_.workspace(linear_attention::workspace_size(
            executor, options_, linear_attention::shape_of(state, token), interstate::pass::step));
        check(linear_attention::step(executor, options_, linear_attention::Params{}, state, token, out, workspace),
              "linear_attention::step");
        ++length_;
        out_.step(mixed_row_, y);
    }

    std::size_t decode_state_bytes(Index) const override { return (state_.size() + sums_.size()) * sizeof(float); }

  private:
    /// Part 0, 1, 2 (q, k, v) of each row of m as (sequences, length, heads, head_dim): a view.
    interstate::View<float, 4> heads_of(Matrix& m, Index part) const {
        return view(m.data() + part * width_, {batch_.sequences, batch_.length, heads_, head_dim_},
                    {batch_.length * m.cols(), m.cols(), head_dim_, Index(1)});
    }
    linear_attention::Inputs<float> inputs() {
        return {.q = heads_of(projected_, 0), .k = heads_of(projected_, 1), .v = heads_of(projected_, 2)};
    }
    linear_attention::Outputs<float> outputs() { return {.o = heads_of(mixed_, 0)}; }
    /// RoPE on q and k, which lie next to each other in every row.
    void turn(Matrix& m, float direction) const {
        for (Index r = 0; r < m.rows(); ++r) rope_.apply(&m(r, 0), 2 * heads_, r % batch_.length, direction);
    }

    Linear in_, out_;
    Index width_, heads_, head_dim_;
    Rope rope_;
    linear_attention::Options options_{.feature_map = linear_attention::FeatureMap::elu1};

    Batch batch_;
    Matrix projected_, mixed_;  // [q, k, v], o
    Matrix dprojected_, dmixed_;
    Scratch workspace_;

    std::vector<float> state_, sums_;  // of decoding
    Index length_ = 0;
    Row row_, mixed_row_;
};

}  // namespace

std::unique_ptr<Mixer> make_linear(const std::string& name, const MixerConfig& config, Random& random) {
    return std::make_unique<LinearMixer>(name, config, random);
}

}  // namespace demo
