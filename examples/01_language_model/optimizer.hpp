// AdamW with gradient clipping, and the learning rate's schedule.
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>

#include <interstate/cpu/parallel.hpp>

#include "layers.hpp"

namespace demo {

/// Keeps two running means for every parameter, of its gradient and of the gradient's square, and
/// moves the parameter by their ratio: by about the learning rate, whatever the gradient's size.
class AdamW {
  public:
    struct Moments {
        Matrix first;   // running mean of the gradient
        Matrix second;  // and of its square
    };

    explicit AdamW(const Parameters& parameters) : parameters_(parameters) {
        for (const Parameter* p : parameters_) {
            const Matrix zero = Matrix::Zero(p->value.rows(), p->value.cols());
            moments_.push_back({zero, zero});
        }
    }

    std::vector<Moments>& moments() { return moments_; }
    const std::vector<Moments>& moments() const { return moments_; }

    /// One update from the gradients of the parameters; `step` counts from 1.
    void update(Index step, double rate) {
        // All gradients taken as one vector are not allowed to be longer than `clip`.
        double squares = 0.0;
        for (const Parameter* p : parameters_) squares += p->gradient.cast<double>().squaredNorm();
        const double norm = std::sqrt(squares);
        const auto shrink = static_cast<float>(norm > clip ? clip / norm : 1.0);

        // The running means start at zero; dividing by these shares undoes that bias.
        const auto first_share = static_cast<float>(1.0 - std::pow(first_memory, static_cast<double>(step)));
        const auto second_share =
            static_cast<float>(1.0 - std::pow(second_memory, static_cast<double>(step)));
        constexpr auto b1 = static_cast<float>(first_memory), b2 = static_cast<float>(second_memory);
        interstate::parallel_for(static_cast<Index>(parameters_.size()), 0, [&](Index task, int) {
            const auto i = static_cast<std::size_t>(task);
            Parameter& p = *parameters_[i];
            const auto size = static_cast<float>(rate) * p.rate;
            const auto gradient = p.gradient.array() * shrink;
            auto first = moments_[i].first.array(), second = moments_[i].second.array();
            first = b1 * first + (1.0f - b1) * gradient;
            second = b2 * second + (1.0f - b2) * gradient.square();
            if (p.decays) p.value *= 1.0f - size * decay;
            p.value.array() -= size * (first / first_share) / ((second / second_share).sqrt() + epsilon);
        });
    }

  private:
    static constexpr double first_memory = 0.9;
    static constexpr double second_memory = 0.98;
    static constexpr double clip = 1.0;
    static constexpr float decay = 0.1f;
    static constexpr float epsilon = 1e-8f;

    Parameters parameters_;
    std::vector<Moments> moments_;
};

/// Linear warm-up, then half a cosine down to a tenth of the peak. `step` counts from 1.
inline double learning_rate(double peak, Index step, Index steps) {
    const double warmup = std::max(1.0, std::min(40.0, static_cast<double>(steps) / 10.0));
    const auto at = static_cast<double>(step);
    if (at < warmup) return peak * at / warmup;
    const double progress = (at - warmup) / std::max(1.0, static_cast<double>(steps) - warmup);
    return peak * (0.1 + 0.9 * 0.5 * (1.0 + std::cos(std::numbers::pi * progress)));
}

}  // namespace demo
