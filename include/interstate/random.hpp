// Random numbers that are the same everywhere: standard distributions differ between libraries, and their hidden
// state cannot be written to a checkpoint.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>

#include <interstate/complex.hpp>

namespace interstate::inline INTERSTATE_ABI {

/// splitmix64. Its whole state is one number.
class Random64 {
  public:
    explicit constexpr Random64(std::uint64_t state) : state_(state) {}

    constexpr std::uint64_t state() const { return state_; }

    constexpr std::uint64_t next() {
        std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }

    /// Uniform in (0, 1), ends excluded: its logarithm is finite.
    constexpr double uniform() { return (static_cast<double>(next() >> 11) + 0.5) * 0x1.0p-53; }

    /// Uniform in [0, n). The modulo favours small values by n / 2^64, which nobody will see.
    constexpr std::uint64_t below(std::uint64_t n) { return next() % n; }

    /// Standard normal, by Box and Muller.
    double normal() {
        const double radius = std::sqrt(-2.0 * std::log(uniform()));
        return radius * std::cos(2.0 * std::numbers::pi * uniform());
    }

    /// Complex normal of unit variance: |z|^2 is exponential.
    complex<double> complex_normal() {
        const double radius = std::sqrt(-std::log(uniform())), angle = 2.0 * std::numbers::pi * uniform();
        return {radius * std::cos(angle), radius * std::sin(angle)};
    }

  private:
    std::uint64_t state_;
};

}  // namespace interstate::inline INTERSTATE_ABI
