// What is left of Interdomain Attention (interdomain.cpp) without keys, values and queries: the same
// recurrence is driven by plain projections, and read by a learned contraction that is the same at every
// position. That is a state space layer, S4D, and no more; it shows what the other parts are worth.
//
//     z = x W_in        y = S4D(z)        out = y W_out
//
// The state has the size of Interdomain Attention's, and so have the projections: z and y are as wide as
// keys and values together. The channels of a head share their modes, as there.
#include <interdomain/init.hpp>
#include <s4d/s4d.hpp>

#include "../mixer.hpp"
#include "interdomain_layer.hpp"

namespace demo {
namespace {

namespace interdomain = interstate::interdomain;
namespace s4d = interstate::s4d;

class S4dOnlyMixer final : public Mixer {
  public:
    S4dOnlyMixer(const std::string& name, const MixerConfig& config, Random& random)
        : layer_(layer_of(interdomain_layer::Cell::s4d_only, config)),
          in_(name + ".in", config.width, interdomain_layer::input_columns(layer_), random),
          out_(name + ".out", interdomain_layer::output_columns(layer_), config.width, random,
               config.out_gain),
          log_dt_(name + ".log_dt", 1, heads(), false, 0.3f),
          log_neg_re_(name + ".log_neg_re", heads(), modes(), false, 0.3f),
          im_(name + ".im", heads(), modes(), false, 0.3f),
          C_(name + ".C", heads() * channels(), 2 * modes(), false),
          dlog_dt_(1, channels()),
          dlog_neg_re_(channels(), modes()),
          dim_(channels(), modes()) {
        // The modes begin as those of Interdomain Attention do.
        std::vector<Complex> B(static_cast<std::size_t>(heads() * modes())),
            C(static_cast<std::size_t>(heads() * modes() * modes()));
        const interdomain::MutableParams<float> shared{
            view(log_dt_.value.data(), {heads()}), view(log_neg_re_.value.data(), {heads(), modes()}),
            view(im_.value.data(), {heads(), modes()}), view(B.data(), {heads(), modes()}),
            view(C.data(), {heads(), modes(), modes()})};
        check(interdomain::initialize(random.next(), shared), "interdomain::initialize");
        C_.fill_normal(random, std::sqrt(0.5));  // complex numbers of variance one, as in s4d/init.hpp
    }

    void collect(Parameters& all) override {
        for (Parameter* p : {&in_.weight, &log_dt_, &log_neg_re_, &im_, &C_, &out_.weight}) all.push_back(p);
    }

    void forward(const Matrix& x, Batch batch, bool train, Matrix& y) override {
        batch_ = batch;
        in_.forward(x, projected_);
        mixed_.resize(x.rows(), projected_.cols());
        saved_memory_.resize(static_cast<std::size_t>(heads()));
        saved_.assign(static_cast<std::size_t>(heads()), {});
        for (Index h = 0; h < heads(); ++h) {
            const auto inputs = this->inputs(h);
            const auto shape = s4d::shape_of(inputs);
            const auto i = static_cast<std::size_t>(h);
            if (train) saved_[i] = saved_memory_[i].saved(s4d::saved_size(executor, options_, shape));
            const auto workspace = workspace_.workspace(
                s4d::workspace_size(executor, options_, shape, interstate::pass::forward));
            check(s4d::forward(executor, options_, inputs, outputs(h), saved_[i], workspace), "s4d::forward");
        }
        out_.forward(mixed_, y);
    }

    void backward(const Matrix& dy, Matrix& dx) override {
        out_.backward(dy, dmixed_);
        dprojected_.resize(projected_.rows(), projected_.cols());
        for (Index h = 0; h < heads(); ++h) {
            const auto inputs = this->inputs(h);
            const s4d::Upstream<float> upstream{.y = head_of(dmixed_, h)};
            const s4d::Grads<float> grads{
                .u = head_of(dprojected_, h),
                .params = {.log_dt = view(dlog_dt_.data(), {channels()}),
                           .log_neg_re = view(dlog_neg_re_.data(), {channels(), modes()}),
                           .im = view(dim_.data(), {channels(), modes()}),
                           .C = contraction(C_.gradient, h)}};
            const auto workspace = workspace_.workspace(
                s4d::workspace_size(executor, options_, s4d::shape_of(inputs), interstate::pass::backward));
            check(s4d::backward(executor, options_, inputs, outputs(h), saved_[static_cast<std::size_t>(h)],
                                upstream, grads, workspace),
                  "s4d::backward");
            // What channels share has the sum of their gradients.
            log_dt_.gradient(0, h) = dlog_dt_.sum();
            log_neg_re_.gradient.row(h) = dlog_neg_re_.colwise().sum();
            im_.gradient.row(h) = dim_.colwise().sum();
        }
        in_.backward(dprojected_, dx);
    }

    void begin_decode(Index /*capacity*/) override {
        const auto entries = static_cast<std::size_t>(heads() * channels() * modes());
        Abar_.resize(entries);
        Bbar_.resize(entries);
        state_.assign(entries, {0.0f, 0.0f});
        for (Index h = 0; h < heads(); ++h)
            check(s4d::discretize(executor, options_, params(h), discrete(h)), "s4d::discretize");
    }

    void step(const Row& x, Row& y) override {
        in_.step(x, row_);
        mixed_row_.resize(row_.cols());
        for (Index h = 0; h < heads(); ++h) {
            const s4d::State<float> state{
                view(state_.data() + h * channels() * modes(), {Index(1), channels(), modes()})};
            const s4d::Token<float> token{view(row_.data() + h * channels(), {Index(1), channels()})};
            const s4d::TokenOut<float> out{view(mixed_row_.data() + h * channels(), {Index(1), channels()})};
            const auto workspace = workspace_.workspace(s4d::workspace_size(
                executor, options_, s4d::shape_of(discrete(h), token), interstate::pass::step));
            check(s4d::step(executor, options_, discrete(h), state, token, out, workspace), "s4d::step");
        }
        out_.step(mixed_row_, y);
    }

    std::size_t decode_state_bytes(Index /*position*/) const override {
        return state_.size() * sizeof(state_[0]);
    }

  private:
    using Complex = interstate::complex<float>;

    Index heads() const { return layer_.kv_heads; }
    Index modes() const { return layer_.modes; }
    Index channels() const { return layer_.features + layer_.value_dim; }  // of a head

    /// The columns of head h as (sequences, length, channels): a view.
    interstate::View<float, 3> head_of(Matrix& m, Index h) const {
        return view(m.data() + h * channels(), {batch_.sequences, batch_.length, channels()},
                    {batch_.length * m.cols(), m.cols(), Index(1)});
    }
    interstate::View<Complex, 2> contraction(Matrix& m, Index h) const {
        return view(reinterpret_cast<Complex*>(&m(h * channels(), 0)), {channels(), modes()});
    }
    /// What all channels of a head share has stride 0 along them: nothing is copied.
    s4d::Params<float> params(Index h) {
        const Index vector[] = {channels()}, matrix[] = {channels(), modes()};
        return {.log_dt = view<const float>(&log_dt_.value(0, h), vector, {Index(0)}),
                .log_neg_re = view<const float>(&log_neg_re_.value(h, 0), matrix, {Index(0), Index(1)}),
                .im = view<const float>(&im_.value(h, 0), matrix, {Index(0), Index(1)}),
                .B = view<const Complex>(&one_, matrix, {Index(0), Index(0)}),
                .C = contraction(C_.value, h)};
    }
    s4d::Inputs<float> inputs(Index h) { return {.u = head_of(projected_, h), .params = params(h)}; }
    s4d::Outputs<float> outputs(Index h) { return {.y = head_of(mixed_, h)}; }
    s4d::Discrete<float> discrete(Index h) {
        const Index first = h * channels() * modes();
        return {.Abar = view(Abar_.data() + first, {channels(), modes()}),
                .Bbar = view(Bbar_.data() + first, {channels(), modes()}),
                .C = contraction(C_.value, h)};
    }

    interdomain_layer::Config layer_;
    Linear in_, out_;
    Parameter log_dt_, log_neg_re_, im_, C_;
    Complex one_{1.0f, 0.0f};  // B
    s4d::Options options_{};

    Batch batch_;
    Matrix projected_, mixed_;  // z, y
    Matrix dprojected_, dmixed_;
    Matrix dlog_dt_, dlog_neg_re_, dim_;  // of the channels of one head
    std::vector<interstate::Saved> saved_;
    std::vector<Scratch> saved_memory_;
    Scratch workspace_;

    std::vector<interstate::complex<double>> Abar_, Bbar_;  // of decoding, as is the rest
    std::vector<Complex> state_;
    Row row_, mixed_row_;
};

}  // namespace

std::unique_ptr<Mixer> make_s4d_only(const std::string& name, const MixerConfig& config, Random& random) {
    return std::make_unique<S4dOnlyMixer>(name, config, random);
}

}  // namespace demo
