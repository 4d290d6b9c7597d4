// The S-D mixers: attention whose scores are made by one projection u and a generator K = S - D a head, in place of queries
// and keys. S, skew-symmetric, moves information between positions; D, diagonal and positive, weighs how alike they are.
//
//     [u, v] = x W_in        o = S-D attention(rope(u), v; P, delta)        out = o W_out
//
// `sd` is its softmax form, which decodes with a cache that grows; `sd_linear` its linear form (ELU + 1), which decodes from a
// state that does not. Both have the same parameters, so that the one can be put in the place of the other.
#include <sd_attention/sd_attention.hpp>

#include "../mixer.hpp"
#include "rope.hpp"

namespace demo {
namespace {

namespace sd_attention = interstate::sd_attention;

template <sd_attention::Normalizer normalizer>
class SdMixer final : public Mixer {
    static constexpr bool softmax = normalizer == sd_attention::Normalizer::softmax;
    static constexpr float generator_rate = 0.3f;  // queries and keys both move where a generator does

  public:
    /// Values are a quarter wider than u: what is saved on queries and keys goes there.
    SdMixer(const std::string& name, const MixerConfig& config, Random& random)
        : heads_(config.heads),
          head_dim_(config.width / config.heads),
          value_dim_(head_dim_ + head_dim_ / 4),
          in_(name + ".in", config.width, heads_ * (head_dim_ + value_dim_), random),
          out_(name + ".out", heads_ * value_dim_, config.width, random, config.out_gain),
          P_(name + ".P", heads_ * head_dim_, head_dim_, false, generator_rate),
          delta_(name + ".delta", heads_, head_dim_, false, generator_rate),
          rope_(head_dim_) {
        P_.fill_normal(random, 0.3 * std::sqrt(2.0 / static_cast<double>(head_dim_)));  // S u about a third as large as u
    }

    void collect(Parameters& all) override {
        for (Parameter* p : {&in_.weight, &P_, &delta_, &out_.weight}) all.push_back(p);
    }

    void forward(const Matrix& x, Batch batch, bool train, Matrix& y) override {
        batch_ = batch;
        in_.forward(x, projected_);
        rope_.prepare(batch.length);
        turn(projected_, 1.0f);
        mixed_.resize(x.rows(), heads_ * value_dim_);
        lse_.resize(x.rows(), heads_);

        const auto inputs = this->inputs();
        const auto shape = sd_attention::shape_of(inputs);
        saved_ = train ? saved_memory_.saved(sd_attention::saved_size(executor, options_, shape)) : interstate::Saved{};
        const auto workspace =
            workspace_.workspace(sd_attention::workspace_size(executor, options_, shape, interstate::pass::forward));
        check(sd_attention::forward(executor, options_, inputs, outputs(), saved_, workspace), "sd_attention::forward");

        out_.forward(mixed_, y);
    }

    void backward(const Matrix& dy, Matrix& dx) override {
        out_.backward(dy, dmixed_);
        dprojected_.resize(projected_.rows(), projected_.cols());

        const auto inputs = this->inputs();
        const sd_attention::Upstream<float> upstream{.o = heads_of(dmixed_, 0, value_dim_)};
        const sd_attention::Grads<float> grads{
            .u = heads_of(dprojected_, 0, head_dim_),
            .v = heads_of(dprojected_, heads_ * head_dim_, value_dim_),
            .generator = {.P = per_head(P_.gradient), .delta = view(delta_.gradient.data(), {heads_, head_dim_})}};
        const auto workspace = workspace_.workspace(sd_attention::workspace_size(
            executor, options_, sd_attention::shape_of(inputs), interstate::pass::backward));
        check(sd_attention::backward(executor, options_, inputs, outputs(), saved_, upstream, grads, workspace),
              "sd_attention::backward");

        turn(dprojected_, -1.0f);
        in_.backward(dprojected_, dx);
    }

    /// Queries are K^T u, keys u.
    Scores scores() override {
        queries_.resize(projected_.rows(), heads_ * head_dim_);
        for (Index h = 0; h < heads_; ++h) {
            const auto P = P_.value.middleRows(h * head_dim_, head_dim_);
            Matrix K = 0.5f * (P - P.transpose());
            for (Index i = 0; i < head_dim_; ++i)
                K(i, i) -= static_cast<float>(sd_attention::softplus(static_cast<double>(delta_.value(h, i))));
            queries_.middleCols(h * head_dim_, head_dim_).noalias() = projected_.middleCols(h * head_dim_, head_dim_) * K;
        }
        return {heads_of(queries_, 0, head_dim_), heads_of(projected_, 0, head_dim_)};
    }

    void begin_decode(Index capacity) override {
        rope_.prepare(capacity);
        cache_u_.setZero(softmax ? capacity : 0, heads_ * head_dim_);
        cache_v_.setZero(softmax ? capacity : 0, heads_ * value_dim_);
        state_.assign(static_cast<std::size_t>(softmax ? 0 : heads_ * head_dim_ * value_dim_), 0.0f);
        sums_.assign(static_cast<std::size_t>(softmax ? 0 : heads_ * head_dim_), 0.0f);
        length_ = 0;
    }

    void step(const Row& x, Row& y) override {
        in_.step(x, row_);
        rope_.apply(row_.data(), heads_, length_, 1.0f);
        mixed_row_.resize(heads_ * value_dim_);
        const sd_attention::Params<float> params{generator()};
        const sd_attention::Token<float> token{view(row_.data(), {Index(1), heads_, head_dim_}),
                                               view(row_.data() + heads_ * head_dim_, {Index(1), heads_, value_dim_})};
        const sd_attention::TokenOut<float> out{.o = view(mixed_row_.data(), {Index(1), heads_, value_dim_})};
        const auto run = [&](const auto& state) {
            const auto workspace = workspace_.workspace(sd_attention::workspace_size(
                executor, options_, sd_attention::shape_of(params, state, token), interstate::pass::step));
            check(sd_attention::step(executor, options_, params, state, token, out, workspace), "sd_attention::step");
        };
        if constexpr (softmax)
            run(sd_attention::Cache<float>{.k = view(cache_u_.data(), {Index(1), cache_u_.rows(), heads_, head_dim_}),
                                           .v = view(cache_v_.data(), {Index(1), cache_v_.rows(), heads_, value_dim_}),
                                           .length = length_});
        else
            run(sd_attention::State<float>{view(state_.data(), {Index(1), heads_, head_dim_, value_dim_}),
                                           view(sums_.data(), {Index(1), heads_, head_dim_})});
        ++length_;
        out_.step(mixed_row_, y);
    }

    std::size_t decode_state_bytes(Index position) const override {
        const Index kept = softmax ? position * (head_dim_ + value_dim_) : head_dim_ * (value_dim_ + 1);
        return static_cast<std::size_t>(heads_ * kept) * sizeof(float);
    }

  private:
    /// Heads that lie next to each other in the rows of m, as (sequences, length, heads, size): a view.
    interstate::View<float, 4> heads_of(Matrix& m, Index column, Index size) const {
        return view(m.data() + column, {batch_.sequences, batch_.length, heads_, size},
                    {batch_.length * m.cols(), m.cols(), size, Index(1)});
    }
    interstate::View<float, 3> per_head(Matrix& m) const { return view(m.data(), {heads_, head_dim_, head_dim_}); }
    sd_attention::Generator<float> generator() {
        return {.P = per_head(P_.value), .delta = view(delta_.value.data(), {heads_, head_dim_})};
    }
    sd_attention::Inputs<float> inputs() {
        return {.u = heads_of(projected_, 0, head_dim_),
                .v = heads_of(projected_, heads_ * head_dim_, value_dim_),
                .generator = generator()};
    }
    sd_attention::Outputs<float> outputs() {
        sd_attention::Outputs<float> out{.o = heads_of(mixed_, 0, value_dim_)};
        if (softmax) out.lse = view(lse_.data(), {batch_.sequences, batch_.length, heads_});
        return out;
    }
    /// RoPE on u.
    void turn(Matrix& m, float direction) const {
        for (Index r = 0; r < m.rows(); ++r) rope_.apply(&m(r, 0), heads_, r % batch_.length, direction);
    }

    Index heads_, head_dim_, value_dim_;
    Linear in_, out_;
    Parameter P_, delta_;
    Rope rope_;
    sd_attention::Options options_{.normalizer = normalizer};

    Batch batch_;
    Matrix projected_, mixed_, lse_, queries_;  // [u, v], o
    Matrix dprojected_, dmixed_;
    interstate::Saved saved_;
    Scratch saved_memory_, workspace_;

    Matrix cache_u_, cache_v_;  // of decoding, as is the rest
    std::vector<float> state_, sums_;
    Index length_ = 0;
    Row row_, mixed_row_;
};

}  // namespace

std::unique_ptr<Mixer> make_sd(const std::string& name, const MixerConfig& config, Random& random) {
    return std::make_unique<SdMixer<sd_attention::Normalizer::softmax>>(name, config, random);
}

std::unique_ptr<Mixer> make_sd_linear(const std::string& name, const MixerConfig& config, Random& random) {
    return std::make_unique<SdMixer<sd_attention::Normalizer::elu1>>(name, config, random);
}

}  // namespace demo
