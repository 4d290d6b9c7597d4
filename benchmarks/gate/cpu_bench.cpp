// The output gate on the CPU: GB/s, each tensor counted once, beside the copy of the same threads, and the error against
// the float64 reference.
#include <cmath>
#include <vector>

#include <gate/gate.hpp>

#include "../support/cpu_copy.hpp"

namespace {

using namespace interstate;
using bench::check;

template <class T>
struct Problem {
    Index rows, d;
    std::vector<T> o, g, dy, y, grad_o, grad_g;

    Problem(Index n, Index dim) : rows(n), d(dim), o(size()), g(size()), dy(size()), y(size()), grad_o(size()), grad_g(size()) {
        for (std::size_t i = 0; i < size(); ++i) {
            const float at = static_cast<float>(i % 9973);
            o[i] = T(std::sin(0.7f * at)), g[i] = T(4.0f * std::cos(1.3f * at)), dy[i] = T(std::cos(0.9f * at));
        }
    }
    std::size_t size() const { return static_cast<std::size_t>(rows * d); }
    template <class E>
    View<E, 4> all(E* data) const { return view(data, {Index{1}, rows, Index{1}, d}); }

    template <class Exec>
    void run(const Exec& exec, bool backwards) {
        const gate::Inputs<T> in{.o = all<const T>(o.data()), .g = all<const T>(g.data())};
        const gate::Outputs<T> out{all(y.data())};
        if (!backwards) return check(forward(exec, gate::Options{}, in, out, Saved{}, Workspace{}));
        check(backward(exec, gate::Options{}, in, out, Saved{}, gate::Upstream<T>{all<const T>(dy.data())},
                       gate::Grads<T>{all(grad_o.data()), all(grad_g.data())}, Workspace{}));
    }
    double error(bool backwards) {
        Problem<double> truth(rows, d);
        for (std::size_t i = 0; i < size(); ++i)
            truth.o[i] = static_cast<double>(o[i]), truth.g[i] = static_cast<double>(g[i]), truth.dy[i] = static_cast<double>(dy[i]);
        truth.run(reference{}, backwards);
        bench::Error e;
        if (!backwards) return e.add(all(y.data()), truth.all(truth.y.data())), e.worst();
        e.add(all(grad_o.data()), truth.all(truth.grad_o.data()));
        e.add(all(grad_g.data()), truth.all(truth.grad_g.data()));
        return e.worst();
    }
};

// Arguments: rows (tokens times heads), d, threads.
template <class T, bool backwards>
void run(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1));
    const cpu exec{.threads = static_cast<int>(state.range(2))};
    for (auto _ : state) p.run(exec, backwards);
    bench::report_bytes(state, (backwards ? 5.0 : 3.0) * static_cast<double>(p.size() * sizeof(T)), exec.threads, p.error(backwards));
}
template <class T>
void forward_of(benchmark::State& state) { run<T, false>(state); }
template <class T>
void backward_of(benchmark::State& state) { run<T, true>(state); }

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"rows", "d", "threads"});
    for (const int threads : {1, 2}) b->Args({65536, 64, threads});
    bench::timed(b);
}
BENCHMARK_TEMPLATE(forward_of, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_of, interstate::bf16)->Apply(shapes);
BENCHMARK_TEMPLATE(backward_of, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(backward_of, interstate::bf16)->Apply(shapes);

}  // namespace
