// Random cases and tolerances that the tests of every operator share.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>
#include <string>
#include <utility>
#include <vector>

#include <interstate/random.hpp>
#include <interstate/verify.hpp>

namespace interstate::test {

/// Tensors of random numbers.
class Random {
  public:
    explicit Random(std::uint64_t seed) : numbers_(seed) {}

    double uniform(double low, double high) { return low + (high - low) * numbers_.uniform(); }
    double normal() { return numbers_.normal(); }
    /// A whole number, n at most.
    Index up_to(Index n) { return static_cast<Index>(uniform(0.0, static_cast<double>(n) + 1.0 - 1e-9)); }
    /// cu_seqlens of one to six sequences, with rows before and after them.
    std::vector<double> offsets(Index length) {
        std::vector<double> cu{static_cast<double>(up_to(length))};
        for (Index i = up_to(5); i >= 0; --i) cu.push_back(uniform(cu.back(), static_cast<double>(length) + 0.99));
        for (double& x : cu) x = std::floor(x);
        return cu;
    }

    HostTensor normal(std::vector<Index> extent, double scale = 1.0) {
        return fill(std::move(extent), [&] { return scale * normal(); });
    }
    HostTensor uniform(std::vector<Index> extent, double low, double high) {
        return fill(std::move(extent), [&] { return uniform(low, high); });
    }

  private:
    template <class F>
    static HostTensor fill(std::vector<Index> extent, F&& draw) {
        Index n = 1;
        for (const Index e : extent) n *= e;
        HostTensor t{std::move(extent), {}};
        for (Index i = 0; i < n; ++i) t.values.push_back(draw());
        return t;
    }
    Random64 numbers_;
};

inline std::vector<double>& values(Case& c, const std::string& name) { return c.tensors.at(name).values; }

namespace detail {
/// Rounds tensors of a case to the element types of the views that will hold them.
struct Round {
    Case& c;
    const char* prefix;
    template <class T, int Rank>
    void operator()(const char* name, View<T, Rank>&, const Index (&)[Rank], Need) {
        using E = interstate::detail::Element<std::remove_const_t<T>>;
        const auto found = c.tensors.find(std::string(prefix) + name);
        if (found == c.tensors.end()) return;
        auto& values = found->second.values;
        // By way of memory: at -O2, g++ 12 drops the conversions of a pair to float and back.
        std::vector<std::remove_const_t<T>> staged;
        for (std::size_t i = 0; i + E::width <= values.size(); i += E::width) staged.push_back(E::from(values.data() + i));
        for (std::size_t i = 0; i < staged.size(); ++i) E::to(staged[i], values.data() + i * E::width);
    }
};
}  // namespace detail

/// The case as storage T and parameters P will see it, so that a float64 run on it is the truth for them.
template <class Op, class T, class P>
Case rounded(Case c) {
    typename Op::template Inputs<T, P> in{};
    typename Op::template Upstream<T> upstream{};
    const auto shape = decltype(shape_of(in)){};
    visit(in, shape, detail::Round{c, ""});
    visit(upstream, shape, detail::Round{c, "dout."});
    return c;
}

/// What rounding the exact value to T alone costs: the floor of the 16-bit rule for one tensor.
template <class T>
double rounding_floor(const HostTensor& want) {
    HostTensor got = want;
    for (double& x : got.values) x = static_cast<double>(T(x));
    return compare("", got, want).relative;
}

}  // namespace interstate::test
