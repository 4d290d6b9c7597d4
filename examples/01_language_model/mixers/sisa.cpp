// The SISA mixer: softmax attention in whose scores every key has, beside its content, an importance from a
// state space model, which fades and turns with the tokens that follow. How fast, each token says itself.
//
//     [q, k, v, C, B, theta, alpha] = x W_in        log_alpha = -softplus(alpha + b_alpha)
//     o = SISA(rope(q), rope(k), v, C, B, log_alpha, theta, softplus(lambda_raw))        out = o W_out
//
// Decoding keeps the key, the value and what else a query asks for of every position: as with attention, its
// state grows with the text.
#include <sisa/init.hpp>
#include <sisa/prelude.hpp>
#include <sisa/sisa.hpp>

#include "../mixer.hpp"
#include "rope.hpp"

namespace demo {
namespace {

namespace sisa = interstate::sisa;

class SisaMixer final : public Mixer {
  public:
    SisaMixer(const std::string& name, const MixerConfig& config, Random& random)
        : heads_(config.heads),
          value_dim_(config.width / config.heads),
          // A score sums over as many channels as the softmax mixer's, a quarter of them for the importance.
          state_dim_(value_dim_ / 8 * 2),
          head_dim_(value_dim_ - state_dim_),
          in_(name + ".in", config.width, alpha_column() + heads_, random),
          out_(name + ".out", config.width, config.width, random, config.out_gain),
          b_alpha_(name + ".b_alpha", 1, heads_, false),
          lambda_raw_(name + ".lambda_raw", 1, heads_, false),
          rope_(head_dim_) {
        check(sisa::initialize(random.next(), importance()), "sisa::initialize");
    }

    void collect(Parameters& all) override {
        for (Parameter* p : {&in_.weight, &b_alpha_, &lambda_raw_, &out_.weight}) all.push_back(p);
    }

    void forward(const Matrix& x, Batch batch, bool train, Matrix& y) override {
        batch_ = batch;
        in_.forward(x, projected_);
        rope_.prepare(batch.length);
        turn(projected_, 1.0f);
        log_alpha_.resize(x.rows(), heads_);
        lambda_.resize(heads_);
        mixed_.resize(x.rows(), heads_ * value_dim_);
        lse_.resize(x.rows(), heads_);

        check(sisa::prelude::forward(executor, prelude_inputs(),
                                     sisa::prelude::Outputs<float>{per_head(log_alpha_, 0), vector(lambda_)}),
              "sisa::prelude::forward");
        const auto inputs = this->inputs();
        const auto shape = sisa::shape_of(inputs);
        saved_ =
            train ? saved_memory_.saved(sisa::saved_size(executor, options_, shape)) : interstate::Saved{};
        const auto workspace =
            workspace_.workspace(sisa::workspace_size(executor, options_, shape, interstate::pass::forward));
        check(sisa::forward(executor, options_, inputs, outputs(), saved_, workspace), "sisa::forward");

        out_.forward(mixed_, y);
    }

    void backward(const Matrix& dy, Matrix& dx) override {
        out_.backward(dy, dmixed_);
        dprojected_.resize(projected_.rows(), projected_.cols());
        dlog_alpha_.resize(log_alpha_.rows(), heads_);
        dlambda_.resize(heads_);

        const auto inputs = this->inputs();
        const sisa::Upstream<float> upstream{.o = heads_of(dmixed_, 0, value_dim_)};
        const sisa::Grads<float> grads{.q = heads_of(dprojected_, 0, head_dim_),
                                       .k = heads_of(dprojected_, k_column(), head_dim_),
                                       .v = heads_of(dprojected_, v_column(), value_dim_),
                                       .C = heads_of(dprojected_, C_column(), state_dim_),
                                       .B = heads_of(dprojected_, B_column(), state_dim_),
                                       .log_alpha = per_head(dlog_alpha_, 0),
                                       .theta = heads_of(dprojected_, theta_column(), state_dim_ / 2),
                                       .lam = vector(dlambda_)};
        const auto workspace = workspace_.workspace(
            sisa::workspace_size(executor, options_, sisa::shape_of(inputs), interstate::pass::backward));
        check(sisa::backward(executor, options_, inputs, outputs(), saved_, upstream, grads, workspace),
              "sisa::backward");
        check(sisa::prelude::backward(
                  executor, prelude_inputs(),
                  sisa::prelude::Upstream<float>{per_head(dlog_alpha_, 0), vector(dlambda_)},
                  sisa::prelude::Grads<float>{.alpha = per_head(dprojected_, alpha_column()),
                                              .b_alpha = vector(b_alpha_.gradient),
                                              .lambda_raw = vector(lambda_raw_.gradient)}),
              "sisa::prelude::backward");

        turn(dprojected_, -1.0f);
        in_.backward(dprojected_, dx);
    }

    void begin_decode(Index capacity) override {
        rope_.prepare(capacity);
        keys_.setZero(capacity, heads_ * head_dim_);
        values_.setZero(capacity, heads_ * value_dim_);
        written_.setZero(capacity, heads_ * state_dim_);
        g_.assign(static_cast<std::size_t>(capacity * heads_), 0.0);
        g_last_.assign(static_cast<std::size_t>(heads_), 0.0);
        Phi_.assign(static_cast<std::size_t>(heads_ * state_dim_ / 2), 0.0);
        length_ = 0;
    }

    void step(const Row& x, Row& y) override {
        in_.step(x, row_);
        rope_.apply(row_.data(), 2 * heads_, length_, 1.0f);
        log_alpha_.resize(1, heads_);
        lambda_.resize(heads_);
        mixed_row_.resize(heads_ * value_dim_);
        const sisa::prelude::Inputs<float> raw{
            .alpha = view(row_.data() + alpha_column(), {Index(1), Index(1), heads_}),
            .b_alpha = vector(b_alpha_.value),
            .lambda_raw = vector(lambda_raw_.value)};
        check(sisa::prelude::forward(
                  executor, raw,
                  sisa::prelude::Outputs<float>{view(log_alpha_.data(), {Index(1), Index(1), heads_}),
                                                vector(lambda_)}),
              "sisa::prelude::forward");

        const auto token_view = [&](Row& row, Index column, Index size) {
            return view(row.data() + column, {Index(1), heads_, size});
        };
        const auto cache_view = [&](Matrix& m) {
            return view(m.data(), {Index(1), m.rows(), heads_, m.cols() / heads_});
        };
        const sisa::State<float> state{.k = cache_view(keys_),
                                       .v = cache_view(values_),
                                       .B = cache_view(written_),
                                       .g = view(g_.data(), {Index(1), keys_.rows(), heads_}),
                                       .g_last = view(g_last_.data(), {Index(1), heads_}),
                                       .Phi = view(Phi_.data(), {Index(1), heads_, state_dim_ / 2}),
                                       .length = length_};
        const sisa::Token<float> token{.q = token_view(row_, 0, head_dim_),
                                       .k = token_view(row_, k_column(), head_dim_),
                                       .v = token_view(row_, v_column(), value_dim_),
                                       .C = token_view(row_, C_column(), state_dim_),
                                       .B = token_view(row_, B_column(), state_dim_),
                                       .log_alpha = view(log_alpha_.data(), {Index(1), heads_}),
                                       .theta = token_view(row_, theta_column(), state_dim_ / 2)};
        const sisa::TokenOut<float> out{token_view(mixed_row_, 0, value_dim_)};
        const auto workspace = workspace_.workspace(
            sisa::workspace_size(executor, options_, sisa::shape_of(state, token), interstate::pass::step));
        check(sisa::step(executor, options_, sisa::Params<float>{vector(lambda_)}, state, token, out,
                         workspace),
              "sisa::step");
        ++length_;
        out_.step(mixed_row_, y);
    }

    std::size_t decode_state_bytes(Index position) const override {
        const Index kept = position * heads_, floats = head_dim_ + value_dim_ + state_dim_;
        return static_cast<std::size_t>(kept * floats) * sizeof(float) +
               (static_cast<std::size_t>(kept) + g_last_.size() + Phi_.size()) * sizeof(double);
    }

  private:
    /// Columns of a row [q, k, v, C, B, theta, alpha] where each part begins.
    Index k_column() const { return heads_ * head_dim_; }
    Index v_column() const { return k_column() + heads_ * head_dim_; }
    Index C_column() const { return v_column() + heads_ * value_dim_; }
    Index B_column() const { return C_column() + heads_ * state_dim_; }
    Index theta_column() const { return B_column() + heads_ * state_dim_; }
    Index alpha_column() const { return theta_column() + heads_ * state_dim_ / 2; }

    /// Heads that lie next to each other in the rows of m, as (sequences, length, heads, size): a view.
    interstate::View<float, 4> heads_of(Matrix& m, Index column, Index size) const {
        return view(m.data() + column, {batch_.sequences, batch_.length, heads_, size},
                    {batch_.length * m.cols(), m.cols(), size, Index(1)});
    }
    /// One number a head, as (sequences, length, heads).
    interstate::View<float, 3> per_head(Matrix& m, Index column) const {
        return view(m.data() + column, {batch_.sequences, batch_.length, heads_},
                    {batch_.length * m.cols(), m.cols(), Index(1)});
    }
    template <class M>
    static interstate::View<float, 1> vector(M& m) {
        return view(m.data(), {m.size()});
    }
    /// The part of W_in that writes `size` columns a head, as (heads, size, width): it lies transposed.
    interstate::View<float, 3> weights_of(Index column, Index size) {
        Matrix& W = in_.weight.value;
        return view(W.data() + column, {heads_, size, W.rows()}, {size, Index(1), W.cols()});
    }

    sisa::MutableParams<float> importance() {
        Matrix& W = in_.weight.value;
        return {.W_B = weights_of(B_column(), state_dim_),
                .W_C = weights_of(C_column(), state_dim_),
                .W_alpha = view(W.data() + alpha_column(), {heads_, W.rows()}, {Index(1), W.cols()}),
                .b_alpha = vector(b_alpha_.value),
                .W_theta = weights_of(theta_column(), state_dim_ / 2),
                .lambda_raw = vector(lambda_raw_.value)};
    }
    sisa::prelude::Inputs<float> prelude_inputs() {
        return {.alpha = per_head(projected_, alpha_column()),
                .b_alpha = vector(b_alpha_.value),
                .lambda_raw = vector(lambda_raw_.value)};
    }
    sisa::Inputs<float> inputs() {
        return {.q = heads_of(projected_, 0, head_dim_),
                .k = heads_of(projected_, k_column(), head_dim_),
                .v = heads_of(projected_, v_column(), value_dim_),
                .C = heads_of(projected_, C_column(), state_dim_),
                .B = heads_of(projected_, B_column(), state_dim_),
                .log_alpha = per_head(log_alpha_, 0),
                .theta = heads_of(projected_, theta_column(), state_dim_ / 2),
                .lam = vector(lambda_)};
    }
    sisa::Outputs<float> outputs() {
        return {.o = heads_of(mixed_, 0, value_dim_), .lse = per_head(lse_, 0)};
    }
    /// RoPE on q and k, which lie next to each other in every row.
    void turn(Matrix& m, float direction) const {
        for (Index r = 0; r < m.rows(); ++r) rope_.apply(&m(r, 0), 2 * heads_, r % batch_.length, direction);
    }

    Index heads_, value_dim_, state_dim_, head_dim_;
    Linear in_, out_;
    Parameter b_alpha_, lambda_raw_;
    Rope rope_;
    sisa::Options options_{};  // exact, causal softmax

    Batch batch_;
    Matrix projected_, log_alpha_, mixed_, lse_;  // [q, k, v, C, B, theta, alpha], ..., o
    Row lambda_;
    Matrix dprojected_, dlog_alpha_, dmixed_;
    Row dlambda_;
    interstate::Saved saved_;
    Scratch saved_memory_, workspace_;

    Matrix keys_, values_, written_;  // of decoding, as is the rest; written: rotated B
    std::vector<double> g_, g_last_, Phi_;
    Index length_ = 0;
    Row row_, mixed_row_;
};

}  // namespace

std::unique_ptr<Mixer> make_sisa(const std::string& name, const MixerConfig& config, Random& random) {
    return std::make_unique<SisaMixer>(name, config, random);
}

}  // namespace demo
