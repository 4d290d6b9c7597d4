// Gradients against finite differences.
#pragma once

#include <cmath>
#include <limits>
#include <string>

#include "cases.hpp"

namespace interstate::test {

/// <dout, out>: the loss whose gradients backward gives.
inline double loss(const Case& upstream, const Case& results) {
    double sum = 0.0;
    for (const auto& [name, w] : upstream.tensors) {
        if (!name.starts_with("dout.")) continue;
        const auto& x = results.tensors.at("out." + name.substr(5)).values;
        for (std::size_t i = 0; i < x.size(); ++i) sum += w.values[i] * x[i];
    }
    return sum;
}

/// ||gradient - differences|| / ||differences|| of an input; `got` is run(c), with gradients. Of more than 40 elements only
/// every `stride`-th is moved.
template <class Run>
double difference_error(const Case& c, const Case& got, const std::string& name, double step, std::size_t stride, Run&& run) {
    const auto& gradient = got.tensors.at("grad." + name).values;
    if (gradient.size() != c.tensors.at(name).values.size()) return std::numeric_limits<double>::infinity();
    double error = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < gradient.size(); i += gradient.size() > 40 ? stride : 1) {
        const auto slope = [&](double h) {
            Case up = c, down = c;
            up.tensors.at(name).values[i] += h;
            down.tensors.at(name).values[i] -= h;
            return (loss(up, run(up)) - loss(down, run(down))) / (2.0 * h);
        };
        const double want = (4.0 * slope(step) - slope(2.0 * step)) / 3.0;  // of fourth order
        error += (gradient[i] - want) * (gradient[i] - want);
        norm += want * want;
    }
    return std::sqrt(error / (norm > 0.0 ? norm : 1.0));
}

}  // namespace interstate::test
