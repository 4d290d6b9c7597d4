// Rotary positions, for the mixers whose scores are products of queries and keys.
#pragma once

#include <cmath>

#include "../layers.hpp"

namespace demo {

/// RoPE: pairs of channels of a head turn by an angle proportional to the position, so that the
/// product of a query and a key depends on how far apart they are. Attention itself has no idea of
/// position. A plain layer: its gradient is the turn in the other direction.
class Rope {
  public:
    explicit Rope(Index head_dim) : pairs_(head_dim / 2) {}

    void prepare(Index positions) {
        for (Index t = turns_.rows(), old = t; t < positions; ++t) {
            if (t == old) turns_.conservativeResize(positions, 2 * pairs_);
            for (Index i = 0; i < pairs_; ++i) {
                const double angle = static_cast<double>(t) *
                                     std::pow(1e4, -static_cast<double>(i) / static_cast<double>(pairs_));
                turns_(t, 2 * i) = static_cast<float>(std::cos(angle));
                turns_(t, 2 * i + 1) = static_cast<float>(std::sin(angle));
            }
        }
    }

    /// Turns `heads` heads that lie next to each other; direction is 1, or -1 for the gradient.
    void apply(float* row, Index heads, Index position, float direction) const {
        const float* turn = &turns_(position, 0);
        for (Index pair = 0; pair < heads * pairs_; ++pair) {
            const float c = turn[2 * (pair % pairs_)], s = direction * turn[2 * (pair % pairs_) + 1];
            const float a = row[2 * pair], b = row[2 * pair + 1];
            row[2 * pair] = a * c - b * s;
            row[2 * pair + 1] = a * s + b * c;
        }
    }

  private:
    Index pairs_;
    Matrix turns_;  // (position, cos and sin of each pair's angle)
};

}  // namespace demo
