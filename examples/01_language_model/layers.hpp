// The plain layers, on Eigen. Rows are positions (all sequences of a batch below each other), columns
// are channels.
//
// A layer's forward() remembers where its input lies, so the caller keeps that matrix alive and
// unchanged until backward(). backward() receives the gradient of the loss with respect to the
// layer's output, fills in the gradients of its parameters, and passes on the gradient of its input.
// step() does for one position, while decoding, what forward() does for all of them.
//
// There are no threads here: train.hpp gives every thread its own copy of the whole model.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <interstate/dtype.hpp>

#include "random.hpp"

namespace demo {

using interstate::Index;

using Matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
using Row = Eigen::Matrix<float, 1, Eigen::Dynamic, Eigen::RowMajor>;
/// Some columns of a matrix, to read or to write.
using Columns = Eigen::Ref<const Matrix, 0, Eigen::OuterStride<>>;
using MutableColumns = Eigen::Ref<Matrix, 0, Eigen::OuterStride<>>;

inline constexpr float norm_epsilon = 1e-6f;

/// A weight and the gradient of the loss with respect to it.
struct Parameter {
    std::string name;
    Matrix value;
    Matrix gradient;
    bool decays = true;  // weight decay is for matrices that multiply, not for gains and the like
    float rate = 1.0f;   // multiplies the learning rate

    Parameter(std::string name_, Index rows, Index columns, bool decays_ = true, float rate_ = 1.0f)
        : name(std::move(name_)),
          value(Matrix::Zero(rows, columns)),
          gradient(Matrix::Zero(rows, columns)),
          decays(decays_),
          rate(rate_) {}

    void fill_normal(Random& random, double deviation) {
        for (Index i = 0; i < value.size(); ++i)
            value.data()[i] = static_cast<float>(deviation * random.normal());
    }
};

/// All parameters of a model, in a fixed order.
using Parameters = std::vector<Parameter*>;

/// y = x W
class Linear {
  public:
    Linear(const std::string& name, Index in, Index out, Random& random, double gain = 1.0)
        : weight(name, in, out) {
        weight.fill_normal(random, gain / std::sqrt(static_cast<double>(in)));
    }

    void forward(const Matrix& x, Matrix& y) {
        x_ = &x;
        y.noalias() = x * weight.value;
    }

    void backward(const Matrix& dy, Matrix& dx) {
        weight.gradient.noalias() = x_->transpose() * dy;
        dx.noalias() = dy * weight.value.transpose();
    }

    void step(const Row& x, Row& y) const { y.noalias() = x * weight.value; }

    Parameter weight;

  private:
    const Matrix* x_ = nullptr;
};

/// y = x / rms(x) * gain, rms(x) = sqrt(mean(x^2) + epsilon)
class RmsNorm {
  public:
    RmsNorm(const std::string& name, Index width) : gain(name, 1, width, false) { gain.value.setOnes(); }

    void forward(const Matrix& x, Matrix& y) {
        x_ = &x;
        y.resize(x.rows(), x.cols());
        inverse_rms_.resize(x.rows());
        for (Index r = 0; r < x.rows(); ++r) {
            inverse_rms_(r) = 1.0f / rms(x.row(r));
            y.row(r) = (x.row(r) * inverse_rms_(r)).cwiseProduct(gain.value.row(0));
        }
    }

    /// Adds to dx, which already holds the gradient that bypasses the norm on the residual stream.
    void backward(const Matrix& dy, Matrix& dx) {
        const Matrix& x = *x_;
        gain.gradient.setZero();
        for (Index r = 0; r < x.rows(); ++r) {
            unit_ = x.row(r) * inverse_rms_(r);
            scaled_ = dy.row(r).cwiseProduct(gain.value.row(0));
            const float along = unit_.dot(scaled_) / static_cast<float>(x.cols());
            dx.row(r) += inverse_rms_(r) * (scaled_ - along * unit_);
            gain.gradient.row(0) += dy.row(r).cwiseProduct(unit_);
        }
    }

    void step(const Row& x, Row& y) const { y = (x / rms(x)).cwiseProduct(gain.value.row(0)); }

    Parameter gain;

  private:
    template <class R>
    static float rms(const R& x) {
        return std::sqrt(x.squaredNorm() / static_cast<float>(x.cols()) + norm_epsilon);
    }

    const Matrix* x_ = nullptr;
    Eigen::VectorXf inverse_rms_;
    Row unit_, scaled_;
};

/// out = value * silu(gate), silu(g) = g / (1 + exp(-g)): a smooth switch that the gate operates.
inline void gate_forward(Columns value, Columns gate, MutableColumns out) {
    for (Index r = 0; r < out.rows(); ++r) {
        const auto g = gate.row(r).array();
        out.row(r) = value.row(r).array() * g * g.logistic();
    }
}

inline void gate_backward(Columns value, Columns gate, Columns dout, MutableColumns dvalue,
                          MutableColumns dgate) {
    Eigen::Array<float, 1, Eigen::Dynamic> open(dout.cols());
    for (Index r = 0; r < dout.rows(); ++r) {
        const auto g = gate.row(r).array(), d = dout.row(r).array();
        open = g.logistic();
        dgate.row(r) = d * value.row(r).array() * open * (1.0f + g * (1.0f - open));
        dvalue.row(r) = d * g * open;
    }
}

/// SwiGLU: the position-wise network of a block, y = (x V * silu(x G)) W.
class SwiGlu {
  public:
    SwiGlu(const std::string& name, Index width, Index hidden, Random& random, double out_gain)
        : in_(name + ".in", width, 2 * hidden, random),
          out_(name + ".out", hidden, width, random, out_gain) {}

    void forward(const Matrix& x, Matrix& y) {
        in_.forward(x, both_);  // value and gate side by side: one matrix product instead of two
        const Index hidden = both_.cols() / 2;
        gated_.resize(x.rows(), hidden);
        gate_forward(both_.leftCols(hidden), both_.rightCols(hidden), gated_);
        out_.forward(gated_, y);
    }

    void backward(const Matrix& dy, Matrix& dx) {
        out_.backward(dy, dgated_);
        const Index hidden = both_.cols() / 2;
        dboth_.resize(both_.rows(), both_.cols());
        gate_backward(both_.leftCols(hidden), both_.rightCols(hidden), dgated_, dboth_.leftCols(hidden),
                      dboth_.rightCols(hidden));
        in_.backward(dboth_, dx);
    }

    void step(const Row& x, Row& y) {
        in_.step(x, row_);
        const Index hidden = row_.cols() / 2;
        const auto gate = row_.rightCols(hidden).array();
        gated_row_ = row_.leftCols(hidden).array() * gate * gate.logistic();
        out_.step(gated_row_, y);
    }

    void collect(Parameters& all) {
        all.push_back(&in_.weight);
        all.push_back(&out_.weight);
    }

  private:
    Linear in_, out_;
    Matrix both_, gated_, dboth_, dgated_;
    Row row_, gated_row_;
};

/// One row of a table for each of the 256 bytes.
class Embedding {
  public:
    Embedding(const std::string& name, Index width, Random& random) : table(name, 256, width, false) {
        table.fill_normal(random, 0.05);
    }

    void forward(std::span<const std::uint8_t> bytes, Matrix& y) {
        bytes_ = bytes;
        y.resize(static_cast<Index>(bytes.size()), table.value.cols());
        for (std::size_t i = 0; i < bytes.size(); ++i)
            y.row(static_cast<Index>(i)) = table.value.row(bytes[i]);
    }

    void backward(const Matrix& dy) {
        table.gradient.setZero();
        for (std::size_t i = 0; i < bytes_.size(); ++i)
            table.gradient.row(bytes_[i]) += dy.row(static_cast<Index>(i));
    }

    void step(std::uint8_t byte, Row& y) const { y = table.value.row(byte); }

    Parameter table;

  private:
    std::span<const std::uint8_t> bytes_;
};

/// Replaces logits by the gradient of the mean cross-entropy with respect to them, softmax(logits) -
/// onehot(target), and returns that mean, in nats. Of every `length` rows only the last `judged` count.
inline double cross_entropy(Matrix& logits, std::span<const std::uint8_t> targets, Index length,
                            Index judged) {
    const Index counted = logits.rows() / length * judged;
    const float share = 1.0f / static_cast<float>(counted);
    double loss = 0.0;
    for (Index r = 0; r < logits.rows(); ++r) {
        auto row = logits.row(r).array();
        if (r % length < length - judged) {
            row.setZero();
            continue;
        }
        const Index target = targets[static_cast<std::size_t>(r)];
        const float top = row.maxCoeff(), wanted = row(target) - top;
        row = (row - top).exp();
        const float sum = row.sum();
        loss += std::log(static_cast<double>(sum)) - wanted;
        row *= share / sum;
        row(target) -= share;
    }
    return loss / static_cast<double>(counted);
}

}  // namespace demo
