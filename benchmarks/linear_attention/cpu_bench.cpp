// Linear attention on the CPU. Useful operations are those of the recurrence token by token (4 dk dv FLOPs a token and head forward, 8
// backward), which chunks exceed. The error is the worst of o, dq, dk and dv of the first head against the float64 reference.
#include <cmath>
#include <vector>

#include <linear_attention/linear_attention.hpp>

#include "../support/cpu_bench.hpp"

namespace {

using namespace interstate;
using bench::check;

template <class T>
struct Problem {
    Index B, H, L, d;
    cpu exec;
    linear_attention::Options options;
    std::vector<T> q, k, v, dout, o, dq, dk, dv;
    std::vector<char> memory;

    Problem(benchmark::State& state, linear_attention::FeatureMap map)
        : B(state.range(0)), H(state.range(1)), L(state.range(2)), d(state.range(3)), exec{.threads = static_cast<int>(state.range(4))},
          options{.feature_map = map}, q(size()), k(size()), v(size()), dout(size()), o(size()), dq(size()), dk(size()), dv(size()) {
        for (std::size_t i = 0; i < size(); ++i) {
            const float x = static_cast<float>(i % 9973);
            q[i] = T(std::sin(0.7f * x)), k[i] = T(std::sin(1.3f * x)), v[i] = T(std::cos(0.9f * x)), dout[i] = T(std::cos(1.7f * x));
        }
        memory.resize(std::max(workspace_size(exec, options, shape_of(inputs()), pass::forward),
                               workspace_size(exec, options, shape_of(inputs()), pass::backward)));
    }
    std::size_t size() const { return static_cast<std::size_t>(B * L * H * d); }
    template <class E>
    View<E, 4> all(E* data) const { return view(data, {B, L, H, d}); }
    linear_attention::Inputs<T> inputs() const { return {.q = all(q.data()), .k = all(k.data()), .v = all(v.data())}; }
    Workspace workspace() { return {memory.data(), memory.size()}; }
    void forward() { check(linear_attention::forward(exec, options, inputs(), {.o = all(o.data())}, Saved{}, workspace())); }
    void backward() {
        check(linear_attention::backward(exec, options, inputs(), {}, Saved{}, {.o = all(static_cast<const T*>(dout.data()))},
                                         {.q = all(dq.data()), .k = all(dk.data()), .v = all(dv.data())}, workspace()));
    }
    /// Of the last call, for one head of one row.
    double error(bool with_backward) {
        const auto first = [&](auto& x) { return view(x.data(), {1, L, 1, d}, {L * H * d, H * d, d, 1}); };
        const auto widen = [&](const std::vector<T>& x) { return std::vector<double>(x.begin(), x.begin() + L * H * d); };
        const auto q64 = widen(q), k64 = widen(k), v64 = widen(v), dout64 = widen(dout);
        std::vector<double> o64(q64.size()), dq64(q64.size()), dk64(q64.size()), dv64(q64.size());
        const linear_attention::Inputs<double> in{.q = first(q64), .k = first(k64), .v = first(v64)};
        std::vector<char> scratch(workspace_size(reference{}, options, shape_of(in), pass::backward));
        const Workspace ws{scratch.data(), scratch.size()};
        check(linear_attention::forward(reference{}, options, in, {.o = first(o64)}, Saved{}, ws));
        bench::Error e;
        e.add(first(o), first(o64));
        if (!with_backward) return e.worst();
        check(linear_attention::backward(reference{}, options, in, {}, Saved{}, {.o = first(dout64)},
                                         {.q = first(dq64), .k = first(dk64), .v = first(dv64)}, ws));
        e.add(first(dq), first(dq64)), e.add(first(dk), first(dk64)), e.add(first(dv), first(dv64));
        return e.worst();
    }
    double products() const { return static_cast<double>(B * H * L) * static_cast<double>(d * d); }
};

// Arguments: B, H, L, d, threads.
template <class T, bool elu1>
void forward(benchmark::State& state) {
    Problem<T> p(state, elu1 ? linear_attention::FeatureMap::elu1 : linear_attention::FeatureMap::identity);
    for (auto _ : state) p.forward();
    bench::report<acc_t<T>>(state, 4.0 * p.products(), p.exec.threads, p.error(false));
}
template <class T, bool elu1>
void forward_backward(benchmark::State& state) {
    Problem<T> p(state, elu1 ? linear_attention::FeatureMap::elu1 : linear_attention::FeatureMap::identity);
    for (auto _ : state) {
        p.forward();
        p.backward();
    }
    bench::report<acc_t<T>>(state, 12.0 * p.products(), p.exec.threads, p.error(true));
}

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "H", "L", "d", "threads"});
    for (const int threads : {1, 2}) {
        b->Args({1, 8, 4096, 64, threads});
        b->Args({1, 1, 16384, 64, threads});
    }
    bench::timed(b);
}
BENCHMARK_TEMPLATE(forward, interstate::f32, false)->Apply(shapes);
BENCHMARK_TEMPLATE(forward, interstate::f32, true)->Apply(shapes);
BENCHMARK_TEMPLATE(forward, interstate::bf16, true)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f32, false)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f32, true)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::bf16, true)->Apply(shapes);

}  // namespace
