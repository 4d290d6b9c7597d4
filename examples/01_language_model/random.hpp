// Random numbers that are the same everywhere: std::normal_distribution and friends differ between
// standard libraries, and their hidden state cannot be written to a checkpoint.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

namespace demo {

/// splitmix64. Its whole state is one number, which is what makes resuming a run bit for bit easy.
class Random {
  public:
    explicit Random(std::uint64_t state) : state_(state) {}

    std::uint64_t state() const { return state_; }

    std::uint64_t next() {
        std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    /// Uniform in (0, 1), ends excluded: its logarithm is finite.
    double uniform() { return (static_cast<double>(next() >> 11) + 0.5) * 0x1.0p-53; }

    /// Uniform in [0, n). The modulo favours small values by n / 2^64, which nobody will see.
    std::uint64_t below(std::uint64_t n) { return next() % n; }

    /// Standard normal, by Box and Muller.
    double normal() {
        const double radius = std::sqrt(-2.0 * std::log(uniform()));
        return radius * std::cos(2.0 * std::numbers::pi * uniform());
    }

  private:
    std::uint64_t state_;
};

}  // namespace demo
