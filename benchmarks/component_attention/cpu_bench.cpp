// Attention by one component on the CPU beside attention of the same heads. Useful operations are those of attention: 4 L L d FLOPs a head
// forward, half of them for causal, and 2.5 times that backward. The error is the worst of o, dq, dk and dv of the first head against the
// float64 reference.
#include <algorithm>
#include <cmath>
#include <vector>

#include <component_attention/component_attention.hpp>

#include "../support/cpu_bench.hpp"

namespace {

using namespace interstate;
using bench::check;
using component_attention::Component;

struct Problem {
    Index H, L, d;
    cpu exec;
    component_attention::Options options;
    std::vector<float> q, k, v, dout, o, dq, dk, dv, lse;
    std::vector<char> memory;

    Problem(benchmark::State& state, Component component)
        : H(state.range(0)),
          L(state.range(1)),
          d(state.range(2)),
          exec{.threads = static_cast<int>(state.range(3))},
          options{.component = component},
          q(size()),
          k(size()),
          v(size()),
          dout(size()),
          o(size()),
          dq(size()),
          dk(size()),
          dv(size()),
          lse(static_cast<std::size_t>(L * H)) {
        for (std::size_t i = 0; i < size(); ++i) {
            const auto x = static_cast<float>(i % 9973);
            q[i] = std::sin(0.7f * x), k[i] = std::cos(1.3f * x), v[i] = std::cos(0.9f * x), dout[i] = std::sin(1.7f * x);
        }
        memory.resize(std::max(workspace_size(exec, options, shape_of(inputs()), pass::forward),
                               workspace_size(exec, options, shape_of(inputs()), pass::backward)));
    }
    std::size_t size() const { return static_cast<std::size_t>(L * H * d); }
    View<float, 4> all(std::vector<float>& x) const { return view(x.data(), {1, L, H, d}); }
    View<const float, 4> read(const std::vector<float>& x) const { return view(x.data(), {1, L, H, d}); }
    attention::Inputs<float> inputs() const { return {.q = read(q), .k = read(k), .v = read(v)}; }
    attention::Outputs<float> outputs() { return {all(o), view(lse.data(), {Index{1}, L, H})}; }
    Workspace workspace() { return {memory.data(), memory.size()}; }
    void forward() { check(component_attention::forward(exec, options, inputs(), outputs(), Saved{}, workspace())); }
    void backward() {
        check(component_attention::backward(exec, options, inputs(), outputs(), Saved{}, {.o = read(dout)},
                                            {.q = all(dq), .k = all(dk), .v = all(dv)}, workspace()));
    }
    double error(bool with_backward) {
        const auto first = [&](auto& x) { return view(x.data(), {1, L, 1, d}, {L * H * d, H * d, d, 1}); };
        const auto widen = [](const std::vector<float>& x) { return std::vector<double>(x.begin(), x.end()); };
        const auto q64 = widen(q), k64 = widen(k), v64 = widen(v), dout64 = widen(dout);
        std::vector<double> o64(size()), dq64(size()), dk64(size()), dv64(size()), lse64(lse.size());
        const attention::Inputs<double> in{.q = first(q64), .k = first(k64), .v = first(v64)};
        const attention::Outputs<double> out{first(o64), view(lse64.data(), {Index{1}, L, Index{1}})};
        std::vector<char> scratch(workspace_size(reference{}, options, shape_of(in), pass::backward));
        const Workspace ws{scratch.data(), scratch.size()};
        check(component_attention::forward(reference{}, options, in, out, Saved{}, ws));
        bench::Error e;
        e.add(first(o), first(o64));
        if (!with_backward) return e.worst();
        check(component_attention::backward(reference{}, options, in, out, Saved{}, {.o = first(dout64)},
                                            {.q = first(dq64), .k = first(dk64), .v = first(dv64)}, ws));
        e.add(first(dq), first(dq64)), e.add(first(dk), first(dk64)), e.add(first(dv), first(dv64));
        return e.worst();
    }
    double flops() const { return 2.0 * static_cast<double>(H * L * L) * static_cast<double>(d); }
};

// Arguments: H, L, d, threads.
template <Component component>
void forward(benchmark::State& state) {
    Problem p(state, component);
    for (auto _ : state) p.forward();
    bench::report<float>(state, p.flops(), p.exec.threads, p.error(false));
}
template <Component component>
void forward_backward(benchmark::State& state) {
    Problem p(state, component);
    for (auto _ : state) {
        p.forward();
        p.backward();
    }
    bench::report<float>(state, 3.5 * p.flops(), p.exec.threads, p.error(true));
}

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"H", "L", "d", "threads"});
    for (const int threads : {1, 2}) b->Args({8, 2048, 64, threads});
    bench::timed(b);
}
BENCHMARK_TEMPLATE(forward, Component::both)->Apply(shapes);
BENCHMARK_TEMPLATE(forward, Component::routing)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, Component::both)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, Component::routing)->Apply(shapes);

}  // namespace
