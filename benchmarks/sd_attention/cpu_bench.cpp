// S-D attention on the CPU beside attention and linear attention of the same shape, which it may cost little more than. Useful operations
// are those of the operator inside: 2 L L d FLOPs a head forward for causal softmax (scores and values, the half that is read), 2.5 times that
// backward; 4 d d FLOPs a token and head forward for the linear forms, 8 backward. The error is the worst of o, du and dv of the first head
// against the float64 reference.
#include <cmath>
#include <vector>

#include <sd_attention/sd_attention.hpp>

#include "../support/cpu_bench.hpp"

namespace {

using namespace interstate;
using bench::check;
using sd_attention::Normalizer;

/// The operator, or, where `inside`, the one that it calls, on u for queries and keys.
template <class T, Normalizer normalizer, bool inside>
struct Problem {
    using A = acc_t<T>;
    static constexpr bool softmax = normalizer == Normalizer::softmax;
    Index B, H, L, d;
    cpu exec;
    sd_attention::Options options{.normalizer = normalizer};
    std::vector<T> u, v, dout, o, du, dv;
    std::vector<A> lse;
    std::vector<float> P, delta, dP, ddelta;
    std::vector<char> memory;

    explicit Problem(benchmark::State& state)
        : B(state.range(0)), H(state.range(1)), L(state.range(2)), d(state.range(3)), exec{.threads = static_cast<int>(state.range(4))},
          u(size()), v(size()), dout(size()), o(size()), du(size()), dv(size()), lse(static_cast<std::size_t>(B * L * H)),
          P(static_cast<std::size_t>(H * d * d)), delta(static_cast<std::size_t>(H * d)), dP(P.size()), ddelta(delta.size()) {
        for (std::size_t i = 0; i < size(); ++i) {
            const float x = static_cast<float>(i % 9973);
            u[i] = T(std::sin(0.7f * x)), v[i] = T(std::cos(0.9f * x)), dout[i] = T(std::cos(1.7f * x));
        }
        for (std::size_t i = 0; i < P.size(); ++i) P[i] = 0.2f * std::sin(1.1f * static_cast<float>(i % 9973));
        memory.resize(std::max(bytes(pass::forward), bytes(pass::backward)));
    }
    std::size_t size() const { return static_cast<std::size_t>(B * L * H * d); }
    template <class E>
    View<E, 4> all(E* data) const { return view(data, {B, L, H, d}); }
    template <class E>
    View<const E, 4> read(const std::vector<E>& x) const { return view(x.data(), {B, L, H, d}); }
    template <class W>
    sd_attention::Generator<W> generator(const std::vector<W>& p, const std::vector<W>& filter, Index heads) const {
        return {.P = view(p.data(), {heads, d, d}), .delta = view(filter.data(), {heads, d})};
    }
    sd_attention::Inputs<T, float> inputs() const { return {.u = read(u), .v = read(v), .generator = generator(P, delta, H)}; }
    attention::Inputs<T> queries() const { return {.q = read(u), .k = read(u), .v = read(v)}; }
    linear_attention::Inputs<T> linear() const { return {.q = read(u), .k = read(u), .v = read(v)}; }
    auto linear_options() const { return sd_attention::detail::linear_of(options); }
    attention::Outputs<T> outputs() { return {all(o.data()), softmax ? view(lse.data(), {B, L, H}) : View<A, 3>{}}; }
    Workspace workspace() { return {memory.data(), memory.size()}; }
    std::size_t bytes(pass which) const {
        if constexpr (!inside) return workspace_size(exec, options, shape_of(inputs()), which);
        if constexpr (softmax) return workspace_size(exec, attention::Options{}, shape_of(queries()), which);
        return workspace_size(exec, linear_options(), shape_of(linear()), which);
    }
    void forward() {
        if constexpr (!inside)
            check(sd_attention::forward(exec, options, inputs(), outputs(), Saved{}, workspace()));
        else if constexpr (softmax)
            check(attention::forward(exec, {}, queries(), outputs(), Saved{}, workspace()));
        else
            check(linear_attention::forward(exec, linear_options(), linear(), {.o = all(o.data())}, Saved{}, workspace()));
    }
    void backward() {
        if constexpr (!inside)
            check(sd_attention::backward(exec, options, inputs(), outputs(), Saved{}, {.o = read(dout)},
                                         {.u = all(du.data()), .v = all(dv.data()),
                                          .generator = {.P = view(dP.data(), {H, d, d}), .delta = view(ddelta.data(), {H, d})}},
                                         workspace()));
        else if constexpr (softmax)
            check(attention::backward(exec, {}, queries(), outputs(), Saved{}, {.o = read(dout)},
                                      {.q = all(du.data()), .k = all(du.data()), .v = all(dv.data())}, workspace()));
        else
            check(linear_attention::backward(exec, linear_options(), linear(), {}, Saved{}, {.o = read(dout)},
                                             {.q = all(du.data()), .k = all(du.data()), .v = all(dv.data())}, workspace()));
    }
    /// Of the last call, for one head of one row; of the operator inside, which has tests and benchmarks of its own, none.
    double error(bool with_backward) {
        if (inside) return 0.0;
        const auto first = [&](auto& x) { return view(x.data(), {1, L, 1, d}, {L * H * d, H * d, d, 1}); };
        const auto widen = [&](const std::vector<T>& x) { return std::vector<double>(x.begin(), x.begin() + L * H * d); };
        const auto u64 = widen(u), v64 = widen(v), dout64 = widen(dout);
        std::vector<double> o64(u64.size()), du64(u64.size()), dv64(u64.size()), lse64(static_cast<std::size_t>(L));
        const sd_attention::Inputs<double, float> in{.u = first(u64), .v = first(v64), .generator = generator(P, delta, 1)};
        const sd_attention::Outputs<double> out{first(o64), softmax ? view(lse64.data(), {1, L, 1}) : View<double, 3>{}};
        std::vector<char> scratch(workspace_size(reference{}, options, shape_of(in), pass::backward));
        const Workspace ws{scratch.data(), scratch.size()};
        check(sd_attention::forward(reference{}, options, in, out, Saved{}, ws));
        bench::Error e;
        e.add(first(o), first(o64));
        if (!with_backward) return e.worst();
        check(sd_attention::backward(reference{}, options, in, out, Saved{}, {.o = first(dout64)}, {.u = first(du64), .v = first(dv64)}, ws));
        e.add(first(du), first(du64)), e.add(first(dv), first(dv64));
        return e.worst();
    }
    double flops() const {
        const double tokens = static_cast<double>(B * H * L) * static_cast<double>(d);
        return softmax ? 2.0 * tokens * static_cast<double>(L) : 4.0 * tokens * static_cast<double>(d);
    }
};

// Arguments: B, H, L, d, threads.
template <class T, Normalizer normalizer, bool inside>
void forward(benchmark::State& state) {
    Problem<T, normalizer, inside> p(state);
    for (auto _ : state) p.forward();
    bench::report<acc_t<T>>(state, p.flops(), p.exec.threads, p.error(false));
}
template <class T, Normalizer normalizer, bool inside>
void forward_backward(benchmark::State& state) {
    Problem<T, normalizer, inside> p(state);
    for (auto _ : state) {
        p.forward();
        p.backward();
    }
    bench::report<acc_t<T>>(state, (p.softmax ? 3.5 : 3.0) * p.flops(), p.exec.threads, p.error(true));
}

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "H", "L", "d", "threads"});
    for (const int threads : {1, 2}) b->Args({1, 4, 4096, 64, threads});
    bench::timed(b);
}
#define INTERSTATE_SD_BENCH(T, normalizer)                                                           \
    BENCHMARK_TEMPLATE(forward, interstate::T, Normalizer::normalizer, true)->Apply(shapes);           \
    BENCHMARK_TEMPLATE(forward, interstate::T, Normalizer::normalizer, false)->Apply(shapes);          \
    BENCHMARK_TEMPLATE(forward_backward, interstate::T, Normalizer::normalizer, true)->Apply(shapes);  \
    BENCHMARK_TEMPLATE(forward_backward, interstate::T, Normalizer::normalizer, false)->Apply(shapes);
INTERSTATE_SD_BENCH(f32, softmax)
INTERSTATE_SD_BENCH(f32, identity)
INTERSTATE_SD_BENCH(f32, elu1)
INTERSTATE_SD_BENCH(bf16, softmax)
#undef INTERSTATE_SD_BENCH

}  // namespace
