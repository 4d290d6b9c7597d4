// A problem of attention with memory of its own, and the calls that tests make on it.
#pragma once

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include <attention/attention.hpp>
#include <gtest/gtest.h>

namespace attention_test {

using namespace interstate;

struct Sizes {
    Index B = 1, Lq = 0, Lk = 0, Hq = 1, Hkv = 1, dh = 1, dv = 1;
    std::vector<std::int32_t> cu{};  // empty: a dense batch
};

template <class T>
struct Case {
    using A = acc_t<T>;
    Sizes sizes;
    attention::Options options;
    bool with_bias = false;
    std::vector<T> q, k, v, dout, o, dq, dk, dv;
    std::vector<A> bias, dlse, lse;

    Case() = default;
    Case(const Sizes& s, const attention::Options& opt, unsigned seed = 1, double magnitude = 1.0)
        : sizes(s), options(opt) {
        std::mt19937 random(seed);
        const auto fill = [&](auto& x, Index n, double scale) {
            x.resize(static_cast<std::size_t>(n));
            using E = std::remove_reference_t<decltype(x[0])>;
            for (auto& e : x) e = static_cast<E>(scale * (double(random()) / 2147483648.0 - 1.0) * 1.7);
        };
        fill(q, s.B * s.Lq * s.Hq * s.dh, magnitude);
        fill(k, s.B * s.Lk * s.Hkv * s.dh, magnitude);
        fill(v, s.B * s.Lk * s.Hkv * s.dv, 1.0);
        fill(dout, s.B * s.Lq * s.Hq * s.dv, 1.0);
        fill(dlse, s.B * s.Lq * s.Hq, 1.0);
        fill(bias, s.Hq, 1.0);
        clear();
    }
    /// The same numbers in another dtype.
    template <class U>
    explicit Case(const Case<U>& other)
        : sizes(other.sizes), options(other.options), with_bias(other.with_bias) {
        const auto copy = [](auto& to, const auto& from) {
            to.clear();
            using E = typename std::remove_reference_t<decltype(to)>::value_type;
            for (const auto& x : from) to.push_back(static_cast<E>(x));
        };
        copy(q, other.q), copy(k, other.k), copy(v, other.v), copy(dout, other.dout);
        copy(dlse, other.dlse), copy(bias, other.bias);
        clear();
    }
    /// Results full of a number that must not survive.
    void clear() {
        const auto junk = [](auto& x, std::size_t n) {
            using E = typename std::remove_reference_t<decltype(x)>::value_type;
            x.assign(n, static_cast<E>(777.0f));
        };
        junk(o, dout.size()), junk(lse, dlse.size());
        junk(dq, q.size()), junk(dk, k.size()), junk(dv, v.size());
    }
    bool softmax() const { return options.score == attention::Score::softmax; }

    attention::Inputs<T> in() const {
        const Sizes& s = sizes;
        attention::Inputs<T> x;
        x.q = view(q.data(), {s.B, s.Lq, s.Hq, s.dh});
        x.k = view(k.data(), {s.B, s.Lk, s.Hkv, s.dh});
        x.v = view(v.data(), {s.B, s.Lk, s.Hkv, s.dv});
        if (with_bias && !softmax()) x.bias = view(bias.data(), {s.Hq});
        if (!s.cu.empty()) x.cu_seqlens = view(s.cu.data(), {static_cast<Index>(s.cu.size())});
        return x;
    }
    attention::Outputs<T> out() {
        const Sizes& s = sizes;
        attention::Outputs<T> x{.o = view(o.data(), {s.B, s.Lq, s.Hq, s.dv})};
        if (softmax()) x.lse = view(lse.data(), {s.B, s.Lq, s.Hq});
        return x;
    }
    attention::Upstream<T> upstream() const {
        const Sizes& s = sizes;
        attention::Upstream<T> x{.o = view(dout.data(), {s.B, s.Lq, s.Hq, s.dv})};
        if (softmax()) x.lse = view(dlse.data(), {s.B, s.Lq, s.Hq});
        return x;
    }
    attention::Grads<T> grads() {
        const Sizes& s = sizes;
        return {view(dq.data(), {s.B, s.Lq, s.Hq, s.dh}), view(dk.data(), {s.B, s.Lk, s.Hkv, s.dh}),
                view(dv.data(), {s.B, s.Lk, s.Hkv, s.dv})};
    }
};

/// Workspace of exactly the size asked for, on a bad alignment and full of junk.
struct Memory {
    explicit Memory(std::size_t size)
        : bytes(size + 8, std::byte{0xff}), ws{size ? bytes.data() + 8 : nullptr, size} {}
    std::vector<std::byte> bytes;
    Workspace ws;
};

template <class Exec, class T>
Status forward(const Exec& exec, Case<T>& c) {
    Memory m(attention::workspace_size(exec, c.options, attention::shape_of(c.in()), pass::forward));
    return attention::forward(exec, c.options, c.in(), c.out(), Saved{}, m.ws);
}
template <class Exec, class T>
Status backward(const Exec& exec, Case<T>& c) {
    Memory m(attention::workspace_size(exec, c.options, attention::shape_of(c.in()), pass::backward));
    return attention::backward(exec, c.options, c.in(), c.out(), Saved{}, c.upstream(), c.grads(), m.ws);
}
template <class Exec, class T>
void run(const Exec& exec, Case<T>& c) {
    const Status f = forward(exec, c);
    ASSERT_TRUE(f.ok()) << f.message();
    const Status b = backward(exec, c);
    ASSERT_TRUE(b.ok()) << b.message();
}

/// ||got - want|| / ||want||, absolute where want is zero; NaN and inf are infinitely wrong, unless
/// both have the same infinity.
template <class X, class Y>
double error(const std::vector<X>& got, const std::vector<Y>& want) {
    double difference = 0, norm = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
        const double g = static_cast<double>(got[i]), w = static_cast<double>(want[i]);
        if (std::isinf(w) && g == w) continue;
        difference += (g - w) * (g - w);
        norm += w * w;
    }
    const double e = norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
    return std::isfinite(e) ? e : INFINITY;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

inline std::string describe(const Sizes& s, const attention::Options& o) {
    char text[256];
    std::snprintf(text, sizeof text,
                  "B=%d Lq=%d Lk=%d Hq=%d Hkv=%d dh=%d dv=%d S=%d causal=%d window=%d sigmoid=%d", int(s.B),
                  int(s.Lq), int(s.Lk), int(s.Hq), int(s.Hkv), int(s.dh), int(s.dv), int(s.cu.size()) - 1,
                  int(o.causal), int(o.window), int(o.score == attention::Score::sigmoid));
    return text;
}

}  // namespace attention_test
