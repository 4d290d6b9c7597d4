// Attention on the CPU. Counters: useful GFLOP/s of a causal call (half of the score matrix: 4 d FLOPs a
// score forward, 10 d backward, recomputation not counted).
#include <cmath>
#include <stdexcept>
#include <vector>

#include <benchmark/benchmark.h>

#include <attention/attention.hpp>

namespace {

using namespace interstate;

template <class T>
struct Problem {
    Index B, H, L, d;
    cpu exec;
    attention::Options options{};
    std::vector<T> q, k, v, o, dq, dk, dv;
    std::vector<acc_t<T>> lse;
    std::vector<char> forward_memory, backward_memory;

    Problem(Index b, Index h, Index l, Index dim, int threads)
        : B(b), H(h), L(l), d(dim), exec{.threads = threads}, q(size()), k(size()), v(size()), o(size()), dq(size()),
          dk(size()), dv(size()), lse(static_cast<std::size_t>(B * L * H)) {
        for (std::size_t i = 0; i < size(); ++i) {
            const float x = static_cast<float>(i % 9973);
            q[i] = T(std::sin(0.7f * x));
            k[i] = T(std::sin(1.3f * x));
            v[i] = T(std::cos(0.9f * x));
        }
        forward_memory.resize(workspace_size(exec, options, shape_of(inputs()), pass::forward));
        backward_memory.resize(workspace_size(exec, options, shape_of(inputs()), pass::backward));
    }
    std::size_t size() const { return static_cast<std::size_t>(B * L * H * d); }
    static void check(const Status& s) {
        if (!s.ok()) throw std::runtime_error(s.message());
    }
    attention::Inputs<T> inputs() const {
        return {.q = view(q.data(), {B, L, H, d}), .k = view(k.data(), {B, L, H, d}), .v = view(v.data(), {B, L, H, d})};
    }
    attention::Outputs<T> outputs() {
        return {.o = view(o.data(), {B, L, H, d}), .lse = view(lse.data(), {B, L, H})};
    }
    void forward() {
        check(attention::forward(exec, options, inputs(), outputs(), Saved{},
                                 Workspace{forward_memory.data(), forward_memory.size()}));
    }
    void backward() {
        const attention::Grads<T> grads{.q = view(dq.data(), {B, L, H, d}),
                                        .k = view(dk.data(), {B, L, H, d}),
                                        .v = view(dv.data(), {B, L, H, d})};
        const attention::Upstream<T> upstream{.o = view(static_cast<const T*>(v.data()), {B, L, H, d})};
        check(attention::backward(exec, options, inputs(), outputs(), Saved{}, upstream, grads,
                                  Workspace{backward_memory.data(), backward_memory.size()}));
    }
    double scores() const { return 0.5 * static_cast<double>(B * H * L) * static_cast<double>(L + 1); }
};

void report(benchmark::State& state, double flops) {
    state.counters["GFLOP/s"] =
        benchmark::Counter(flops * static_cast<double>(state.iterations()) * 1e-9, benchmark::Counter::kIsRate);
}

// Arguments: B, H, L, d, threads.
template <class T>
void forward(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1), state.range(2), state.range(3), static_cast<int>(state.range(4)));
    for (auto _ : state) p.forward();
    report(state, 4.0 * static_cast<double>(p.d) * p.scores());
}
template <class T>
void forward_backward(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1), state.range(2), state.range(3), static_cast<int>(state.range(4)));
    for (auto _ : state) {
        p.forward();
        p.backward();
    }
    report(state, 14.0 * static_cast<double>(p.d) * p.scores());
}

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "H", "L", "d", "threads"});
    for (const int threads : {1, 2}) {
        b->Args({1, 8, 2048, 64, threads});
        b->Args({8, 4, 256, 32, threads});
    }
    b->Unit(benchmark::kMillisecond)->UseRealTime();
}
BENCHMARK_TEMPLATE(forward, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward, interstate::bf16)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::bf16)->Apply(shapes);

}  // namespace
