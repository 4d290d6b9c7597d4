// The Interdomain Attention mixer: keys and values are compressed onto a few modes, by the recurrence of
// a state space layer, and every query reads what they hold of the past.
//
//     [q, k, v] = x W_in        q = map(q)   k = norm(map(k))   v = norm(v)
//     o = Interdomain Attention(q, k, v)      out = o W_out
//
// Decoding keeps `modes` complex numbers for each channel of k and v, however long the text.
#include <feature_map/feature_map.hpp>
#include <interdomain/interdomain.hpp>

#include "../mixer.hpp"
#include "interdomain_layer.hpp"

namespace demo {
namespace {

namespace feature_map = interstate::feature_map;
namespace interdomain = interstate::interdomain;

/// One call of feature_map with its parameters: a convolution along time over the last few positions,
/// rotary positions, SiLU and norms, as far as its options say.
class FeatureMap {
  public:
    /// `taps` 0: no convolution.
    FeatureMap(const std::string& name, const feature_map::Options& options, Index heads, Index features,
               Index taps)
        : options_(options),
          heads_(heads),
          features_(features),
          taps_(taps),
          conv_weight_(name + ".conv_weight", heads * features, taps, false),
          conv_bias_(name + ".conv_bias", 1, taps > 0 ? heads * features : 0, false),
          scale_(name + ".scale", 1, options.rms ? features : 0, false),
          bias_(name + ".bias", 1, options.rms ? heads * features : 0, false) {
        if (taps > 0) conv_weight_.value.col(taps - 1).setOnes();  // it begins as the identity
        scale_.value.setOnes();
    }

    void collect(Parameters& all) {
        for (Parameter* p : {&conv_weight_, &conv_bias_, &scale_, &bias_})
            if (p->value.size() > 0) all.push_back(p);
    }

    void forward(const interstate::View<float, 4>& x, const interstate::View<float, 4>& y, Scratch& scratch) {
        x_ = x;
        const auto in = inputs();
        const auto workspace = scratch.workspace(feature_map::workspace_size(
            executor, options_, feature_map::shape_of(in), interstate::pass::forward));
        check(feature_map::forward(executor, options_, in, feature_map::Outputs<float>{.y = y},
                                   interstate::Saved{}, workspace),
              "feature_map::forward");
    }

    void backward(const interstate::View<float, 4>& dy, const interstate::View<float, 4>& dx,
                  Scratch& scratch) {
        const auto in = inputs();
        const auto workspace = scratch.workspace(feature_map::workspace_size(
            executor, options_, feature_map::shape_of(in), interstate::pass::backward));
        const feature_map::Grads<float> grads{
            .x = dx,
            .params =
                params<float>(conv_weight_.gradient, conv_bias_.gradient, scale_.gradient, bias_.gradient)};
        check(
            feature_map::backward(executor, options_, in, feature_map::Outputs<float>{}, interstate::Saved{},
                                  feature_map::Upstream<float>{.y = dy}, grads, workspace),
            "feature_map::backward");
    }

    void begin_decode() { past_.setZero(past(), heads_ * features_); }

    /// (heads * features) numbers from x to y; they may not be the same.
    void step(const float* x, float* y, std::int32_t position, Scratch& scratch) {
        const feature_map::State<float> state{view(past_.data(), {Index(1), past(), heads_, features_})};
        feature_map::Token<float> token{.x = view(x, {Index(1), heads_, features_})};
        if (options_.rope != feature_map::Rope::none) token.position = view(&position, {Index(1)});
        const feature_map::TokenOut<float> out{view(y, {Index(1), heads_, features_})};
        const auto parameters =
            params<const float>(conv_weight_.value, conv_bias_.value, scale_.value, bias_.value);
        const auto workspace = scratch.workspace(feature_map::workspace_size(
            executor, options_, feature_map::shape_of(parameters, token), interstate::pass::step));
        check(feature_map::step(executor, options_, parameters, state, token, out, workspace),
              "feature_map::step");
    }

    std::size_t decode_state_bytes() const {
        return static_cast<std::size_t>(past() * heads_ * features_) * sizeof(float);
    }

  private:
    Index past() const { return taps_ > 1 ? taps_ - 1 : 0; }

    /// Null views for the stages that the options leave out.
    template <class P>
    feature_map::BasicParams<P> params(Matrix& weight, Matrix& conv_bias, Matrix& scale, Matrix& bias) const {
        feature_map::BasicParams<P> p;
        if (taps_ > 0) {
            p.conv_weight = view<P>(weight.data(), {heads_, features_, taps_});
            p.conv_bias = view<P>(conv_bias.data(), {heads_, features_});
        }
        if (options_.rms) {
            p.scale = view<P>(scale.data(), {features_});
            p.bias = view<P>(bias.data(), {heads_, features_});
        }
        return p;
    }
    feature_map::Inputs<float> inputs() {
        return {
            .x = x_,
            .params = params<const float>(conv_weight_.value, conv_bias_.value, scale_.value, bias_.value)};
    }

    feature_map::Options options_;
    Index heads_, features_, taps_;
    Parameter conv_weight_, conv_bias_, scale_, bias_;
    interstate::View<float, 4> x_;
    Matrix past_;  // of decoding: the rows that the convolution looks back at
};

class InterdomainMixer final : public Mixer {
  public:
    InterdomainMixer(const std::string& name, const MixerConfig& config, Random& random)
        : layer_(layer_of(interdomain_layer::Cell::full, config)),
          in_(name + ".in", config.width, interdomain_layer::input_columns(layer_), random),
          out_(name + ".out", interdomain_layer::output_columns(layer_), config.width, random,
               config.out_gain),
          query_(name + ".query", *query_map(layer_), layer_.query_heads, layer_.features, layer_.taps),
          key_(name + ".key", *key_map(layer_), layer_.kv_heads, layer_.features, layer_.taps),
          value_(name + ".value", *value_map(layer_), layer_.kv_heads, layer_.value_dim, 0),
          // As in s4d.hpp: what shapes the recurrence learns more slowly.
          log_dt_(name + ".log_dt", 1, layer_.kv_heads, false, 0.3f),
          log_neg_re_(name + ".log_neg_re", layer_.kv_heads, layer_.modes, false, 0.3f),
          im_(name + ".im", layer_.kv_heads, layer_.modes, false, 0.3f),
          C_(name + ".C", layer_.kv_heads, 2 * layer_.modes * layer_.modes, false),
          B_(static_cast<std::size_t>(layer_.kv_heads * layer_.modes)) {
        auto B = view(B_.data(), {layer_.kv_heads, layer_.modes});
        const interdomain::MutableParams<float> params{vector(log_dt_.value), matrix(log_neg_re_.value),
                                                       matrix(im_.value), B, contraction(C_.value)};
        check(interdomain::initialize(random.next(), params), "interdomain::initialize");
    }

    void collect(Parameters& all) override {
        all.push_back(&in_.weight);
        for (FeatureMap* map : {&query_, &key_, &value_}) map->collect(all);
        for (Parameter* p : {&log_dt_, &log_neg_re_, &im_, &C_, &out_.weight}) all.push_back(p);
    }

    void forward(const Matrix& x, Batch batch, bool train, Matrix& y) override {
        batch_ = batch;
        in_.forward(x, projected_);
        mapped_.resize(projected_.rows(), projected_.cols());
        mixed_.resize(x.rows(), out_.weight.value.rows());
        query_.forward(q_of(projected_), q_of(mapped_), workspace_);
        key_.forward(k_of(projected_), k_of(mapped_), workspace_);
        value_.forward(v_of(projected_), v_of(mapped_), workspace_);

        const auto inputs = this->inputs();
        const auto shape = interdomain::shape_of(inputs);
        saved_ = train ? saved_memory_.saved(interdomain::saved_size(executor, options_, shape))
                       : interstate::Saved{};
        const auto workspace = workspace_.workspace(
            interdomain::workspace_size(executor, options_, shape, interstate::pass::forward));
        check(interdomain::forward(executor, options_, inputs, outputs(), saved_, workspace),
              "interdomain::forward");

        out_.forward(mixed_, y);
    }

    void backward(const Matrix& dy, Matrix& dx) override {
        out_.backward(dy, dmixed_);
        dmapped_.resize(mapped_.rows(), mapped_.cols());
        dprojected_.resize(projected_.rows(), projected_.cols());

        const auto inputs = this->inputs();
        const interdomain::Upstream<float> upstream{
            .o = heads_of(dmixed_, 0, layer_.query_heads, layer_.value_dim)};
        const interdomain::Grads<float> grads{.q = q_of(dmapped_),
                                              .k = k_of(dmapped_),
                                              .v = v_of(dmapped_),
                                              .params = {vector(log_dt_.gradient),
                                                         matrix(log_neg_re_.gradient),
                                                         matrix(im_.gradient),
                                                         {},  // B is fixed at one
                                                         contraction(C_.gradient)}};
        const auto workspace = workspace_.workspace(interdomain::workspace_size(
            executor, options_, interdomain::shape_of(inputs), interstate::pass::backward));
        check(
            interdomain::backward(executor, options_, inputs, outputs(), saved_, upstream, grads, workspace),
            "interdomain::backward");

        query_.backward(q_of(dmapped_), q_of(dprojected_), workspace_);
        key_.backward(k_of(dmapped_), k_of(dprojected_), workspace_);
        value_.backward(v_of(dmapped_), v_of(dprojected_), workspace_);
        in_.backward(dprojected_, dx);
    }

    void begin_decode(Index /*capacity*/) override {
        for (FeatureMap* map : {&query_, &key_, &value_}) map->begin_decode();
        const auto modes = static_cast<std::size_t>(layer_.kv_heads * layer_.modes);
        Lam_.resize(modes);
        Bbar_.resize(modes);
        state_.assign(static_cast<std::size_t>(interdomain_layer::state_size(layer_) / 2), {0.0f, 0.0f});
        position_ = 0;
        check(interdomain::discretize(executor, options_, params(), discrete()), "interdomain::discretize");
    }

    void step(const Row& x, Row& y) override {
        in_.step(x, row_);
        mapped_row_.resize(row_.cols());
        mixed_row_.resize(out_.weight.value.rows());
        query_.step(row_.data(), mapped_row_.data(), position_, workspace_);
        key_.step(row_.data() + k_column(), mapped_row_.data() + k_column(), position_, workspace_);
        value_.step(row_.data() + v_column(), mapped_row_.data() + v_column(), position_, workspace_);
        ++position_;

        const auto [cell, Hq, Hkv, R, d, M, taps, gate] = layer_;
        const float* mapped = mapped_row_.data();
        const interdomain::State<float> state{.x = view(state_.data(), {Index(1), Hkv, M, R + d})};
        const interdomain::Token<float> token{.q = view(mapped, {Index(1), Hq, R}),
                                              .k = view(mapped + k_column(), {Index(1), Hkv, R}),
                                              .v = view(mapped + v_column(), {Index(1), Hkv, d})};
        const interdomain::TokenOut<float> out{view(mixed_row_.data(), {Index(1), Hq, d})};
        const auto workspace = workspace_.workspace(interdomain::workspace_size(
            executor, options_, interdomain::shape_of(discrete(), token), interstate::pass::step));
        check(interdomain::step(executor, options_, discrete(), state, token, out, workspace),
              "interdomain::step");
        out_.step(mixed_row_, y);
    }

    std::size_t decode_state_bytes(Index /*position*/) const override {
        return state_.size() * sizeof(state_[0]) + query_.decode_state_bytes() + key_.decode_state_bytes();
    }

  private:
    using Complex = interstate::complex<float>;

    /// Columns of a row [q, k, v] where keys and where values begin.
    Index k_column() const { return layer_.query_heads * layer_.features; }
    Index v_column() const { return k_column() + layer_.kv_heads * layer_.features; }

    /// Heads that lie next to each other in the rows of m, as (sequences, length, heads, size): a view.
    interstate::View<float, 4> heads_of(Matrix& m, Index column, Index heads, Index size) const {
        return view(m.data() + column, {batch_.sequences, batch_.length, heads, size},
                    {batch_.length * m.cols(), m.cols(), size, Index(1)});
    }
    interstate::View<float, 4> q_of(Matrix& m) const {
        return heads_of(m, 0, layer_.query_heads, layer_.features);
    }
    interstate::View<float, 4> k_of(Matrix& m) const {
        return heads_of(m, k_column(), layer_.kv_heads, layer_.features);
    }
    interstate::View<float, 4> v_of(Matrix& m) const {
        return heads_of(m, v_column(), layer_.kv_heads, layer_.value_dim);
    }
    static interstate::View<float, 1> vector(Matrix& m) { return view(m.data(), {m.size()}); }
    static interstate::View<float, 2> matrix(Matrix& m) { return view(m.data(), {m.rows(), m.cols()}); }
    /// (kv_heads, 2 modes^2) floats as (kv_heads, modes, modes) complex numbers.
    interstate::View<Complex, 3> contraction(Matrix& m) const {
        return view(reinterpret_cast<Complex*>(m.data()), {layer_.kv_heads, layer_.modes, layer_.modes});
    }

    interdomain::Params<float> params() {
        return {vector(log_dt_.value), matrix(log_neg_re_.value), matrix(im_.value),
                view(B_.data(), {layer_.kv_heads, layer_.modes}), contraction(C_.value)};
    }
    interdomain::Inputs<float> inputs() {
        return {.q = q_of(mapped_), .k = k_of(mapped_), .v = v_of(mapped_), .params = params()};
    }
    interdomain::Outputs<float> outputs() {
        return {.o = heads_of(mixed_, 0, layer_.query_heads, layer_.value_dim)};
    }
    interdomain::Discrete<float> discrete() {
        return {view(Lam_.data(), {layer_.kv_heads, layer_.modes}),
                view(Bbar_.data(), {layer_.kv_heads, layer_.modes}), contraction(C_.value)};
    }

    interdomain_layer::Config layer_;
    Linear in_, out_;
    FeatureMap query_, key_, value_;
    Parameter log_dt_, log_neg_re_, im_, C_;
    std::vector<Complex> B_;
    interdomain::Options options_{};

    Batch batch_;
    Matrix projected_, mapped_, mixed_;  // [q, k, v] before and after the feature maps, o
    Matrix dprojected_, dmapped_, dmixed_;
    interstate::Saved saved_;
    Scratch saved_memory_, workspace_;

    std::vector<interstate::complex<double>> Lam_, Bbar_;  // of decoding, as is the rest
    std::vector<Complex> state_;
    std::int32_t position_ = 0;
    Row row_, mapped_row_, mixed_row_;
};

}  // namespace

std::unique_ptr<Mixer> make_interdomain(const std::string& name, const MixerConfig& config, Random& random) {
    return std::make_unique<InterdomainMixer>(name, config, random);
}

}  // namespace demo
