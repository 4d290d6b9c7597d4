// A state space mixer: every channel runs through its own small linear recurrence (S4D), and a gate
// computed from the input decides what of it is let through.
//
//     [u, g] = x W_in        y = S4D(u)        out = (y * silu(g)) W_out
//
// Decoding keeps `modes` complex numbers a channel, however long the text.
#include <s4d/init.hpp>
#include <s4d/s4d.hpp>

#include "../mixer.hpp"

namespace demo {
namespace {

namespace s4d = interstate::s4d;

class S4dMixer final : public Mixer {
  public:
    S4dMixer(const std::string& name, const MixerConfig& config, Random& random)
        : in_(name + ".in", config.width, 2 * config.width, random),
          out_(name + ".out", config.width, config.width, random, config.out_gain),
          // What shapes the recurrence learns more slowly than weights and does not decay to zero:
          // a small step of an exponent is a large step of what the channel remembers.
          log_dt_(name + ".log_dt", 1, config.width, false, 0.3f),
          log_neg_re_(name + ".log_neg_re", config.width, config.modes, false, 0.3f),
          im_(name + ".im", config.width, config.modes, false, 0.3f),
          B_(name + ".B", config.width, 2 * config.modes, false),
          C_(name + ".C", config.width, 2 * config.modes, false),
          D_(name + ".D", 1, config.width, false),
          channels_(config.width),
          modes_(config.modes) {
        const s4d::MutableParams<float> params{view(log_dt_.value.data(), {channels_}),
                                               view(log_neg_re_.value.data(), {channels_, modes_}),
                                               view(im_.value.data(), {channels_, modes_}),
                                               complex_view(B_.value),
                                               complex_view(C_.value),
                                               view(D_.value.data(), {channels_})};
        check(s4d::initialize(s4d::Init::lin, random.next(), params), "s4d::initialize");
    }

    void collect(Parameters& all) override {
        for (Parameter* p : {&in_.weight, &log_dt_, &log_neg_re_, &im_, &B_, &C_, &D_, &out_.weight})
            all.push_back(p);
    }

    void forward(const Matrix& x, Batch batch, bool train, Matrix& y) override {
        batch_ = batch;
        in_.forward(x, projected_);
        mixed_.resize(x.rows(), channels_);
        gated_.resize(x.rows(), channels_);

        const auto inputs = this->inputs();
        const auto shape = s4d::shape_of(inputs);
        saved_ =
            train ? saved_memory_.saved(s4d::saved_size(executor, options_, shape)) : interstate::Saved{};
        const auto workspace =
            workspace_.workspace(s4d::workspace_size(executor, options_, shape, interstate::pass::forward));
        check(s4d::forward(executor, options_, inputs, outputs(), saved_, workspace), "s4d::forward");

        gate_forward(mixed_, projected_.rightCols(channels_), gated_);
        out_.forward(gated_, y);
    }

    void backward(const Matrix& dy, Matrix& dx) override {
        out_.backward(dy, dgated_);
        dmixed_.resize(mixed_.rows(), channels_);
        dprojected_.resize(projected_.rows(), projected_.cols());
        gate_backward(mixed_, projected_.rightCols(channels_), dgated_, dmixed_,
                      dprojected_.rightCols(channels_));

        const auto inputs = this->inputs();
        const s4d::Upstream<float> upstream{
            .y = view(dmixed_.data(), {batch_.sequences, batch_.length, channels_})};
        const s4d::Grads<float> grads{
            .u = left_half(dprojected_),
            .params = {view(log_dt_.gradient.data(), {channels_}),
                       view(log_neg_re_.gradient.data(), {channels_, modes_}),
                       view(im_.gradient.data(), {channels_, modes_}), complex_view(B_.gradient),
                       complex_view(C_.gradient), view(D_.gradient.data(), {channels_})}};
        const auto workspace = workspace_.workspace(
            s4d::workspace_size(executor, options_, s4d::shape_of(inputs), interstate::pass::backward));
        check(s4d::backward(executor, options_, inputs, outputs(), saved_, upstream, grads, workspace),
              "s4d::backward");

        in_.backward(dprojected_, dx);
    }

    /// The continuous system becomes a discrete one once; every token then costs one multiplication
    /// and one addition a mode.
    void begin_decode(Index /*capacity*/) override {
        const auto entries = static_cast<std::size_t>(channels_ * modes_);
        Abar_.resize(entries);
        Bbar_.resize(entries);
        state_.assign(entries, {0.0f, 0.0f});
        check(s4d::discretize(executor, options_, params(), discrete()), "s4d::discretize");
    }

    void step(const Row& x, Row& y) override {
        in_.step(x, row_);
        mixed_row_.resize(channels_);
        const s4d::State<float> state{view(state_.data(), {Index(1), channels_, modes_})};
        const s4d::Token<float> token{view(row_.data(), {Index(1), channels_})};
        const s4d::TokenOut<float> out{view(mixed_row_.data(), {Index(1), channels_})};
        const auto workspace = workspace_.workspace(s4d::workspace_size(
            executor, options_, s4d::shape_of(discrete(), token), interstate::pass::step));
        check(s4d::step(executor, options_, discrete(), state, token, out, workspace), "s4d::step");
        const auto gate = row_.rightCols(channels_).array();
        mixed_row_.array() *= gate * gate.logistic();
        out_.step(mixed_row_, y);
    }

    std::size_t decode_state_bytes(Index /*position*/) const override {
        return static_cast<std::size_t>(channels_ * modes_) * sizeof(interstate::complex<float>);
    }

  private:
    /// A (channels, 2 modes) matrix of floats as (channels, modes) complex numbers.
    static interstate::View<interstate::complex<float>, 2> complex_view(Matrix& m) {
        return view(reinterpret_cast<interstate::complex<float>*>(m.data()), {m.rows(), m.cols() / 2});
    }
    /// The left half of a (rows, 2 channels) matrix as (sequences, length, channels): a view with
    /// wide strides, nothing is copied.
    interstate::View<float, 3> left_half(Matrix& m) const {
        return view(m.data(), {batch_.sequences, batch_.length, channels_},
                    {batch_.length * m.cols(), m.cols(), Index(1)});
    }

    s4d::Params<float> params() {
        return {view(log_dt_.value.data(), {channels_}),
                view(log_neg_re_.value.data(), {channels_, modes_}),
                view(im_.value.data(), {channels_, modes_}),
                complex_view(B_.value),
                complex_view(C_.value),
                view(D_.value.data(), {channels_})};
    }
    s4d::Inputs<float> inputs() { return {.u = left_half(projected_), .params = params()}; }
    s4d::Outputs<float> outputs() {
        return {.y = view(mixed_.data(), {batch_.sequences, batch_.length, channels_})};
    }
    s4d::Discrete<float> discrete() {
        return {view(Abar_.data(), {channels_, modes_}), view(Bbar_.data(), {channels_, modes_}),
                complex_view(C_.value), view(D_.value.data(), {channels_})};
    }

    Linear in_, out_;
    Parameter log_dt_, log_neg_re_, im_, B_, C_, D_;
    Index channels_, modes_;
    s4d::Options options_{};

    Batch batch_;
    Matrix projected_, mixed_, gated_;  // [u, g], y, y * silu(g)
    Matrix dprojected_, dmixed_, dgated_;
    interstate::Saved saved_;
    Scratch saved_memory_, workspace_;

    std::vector<interstate::complex<double>> Abar_, Bbar_;  // of decoding, as is the rest
    std::vector<interstate::complex<float>> state_;
    Row row_, mixed_row_;
};

}  // namespace

std::unique_ptr<Mixer> make_s4d(const std::string& name, const MixerConfig& config, Random& random) {
    return std::make_unique<S4dMixer>(name, config, random);
}

}  // namespace demo
