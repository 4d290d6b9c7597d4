// Attention on the CPU. Useful operations are those of a causal call (half of the score matrix: 4 d FLOPs a
// score forward, 10 d backward, recomputation not counted). The error is the worst of o, dq, dk and dv of
// the first head and batch row against the float64 reference.
#include <cmath>
#include <vector>

#include <attention/attention.hpp>

#include "../support/cpu_bench.hpp"

namespace {

using namespace interstate;
using bench::check;

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
    /// Of the last call, for one head of one row.
    double error(bool with_backward) {
        const auto first = [&](auto& x) { return view(x.data(), {1, L, 1, d}, {L * H * d, H * d, d, 1}); };
        const auto widen = [&](const std::vector<T>& x) { return std::vector<double>(x.begin(), x.begin() + L * H * d); };
        const auto q64 = widen(q), k64 = widen(k), v64 = widen(v);
        std::vector<double> o64(q64.size()), dq64(q64.size()), dk64(q64.size()), dv64(q64.size()), lse64(L);
        const attention::Inputs<double> in{.q = first(q64), .k = first(k64), .v = first(v64)};
        const attention::Outputs<double> out{.o = first(o64), .lse = view(lse64.data(), {Index{1}, L, Index{1}})};
        std::vector<char> memory(workspace_size(reference{}, options, shape_of(in), pass::backward) +
                                 workspace_size(reference{}, options, shape_of(in), pass::forward));
        const Workspace ws{memory.data(), memory.size()};
        check(attention::forward(reference{}, options, in, out, Saved{}, ws));
        bench::Error e;
        e.add(first(o), first(o64));
        if (!with_backward) return e.worst();
        check(attention::backward(reference{}, options, in, out, Saved{}, attention::Upstream<double>{.o = first(v64)},
                                  attention::Grads<double>{.q = first(dq64), .k = first(dk64), .v = first(dv64)}, ws));
        e.add(first(dq), first(dq64)), e.add(first(dk), first(dk64)), e.add(first(dv), first(dv64));
        return e.worst();
    }
    double scores() const { return 0.5 * static_cast<double>(B * H * L) * static_cast<double>(L + 1); }
};

// Arguments: B, H, L, d, threads.
template <class T>
void forward(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1), state.range(2), state.range(3), static_cast<int>(state.range(4)));
    for (auto _ : state) p.forward();
    bench::report<acc_t<T>>(state, 4.0 * static_cast<double>(p.d) * p.scores(), p.exec.threads, p.error(false));
}
template <class T>
void forward_backward(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1), state.range(2), state.range(3), static_cast<int>(state.range(4)));
    for (auto _ : state) {
        p.forward();
        p.backward();
    }
    bench::report<acc_t<T>>(state, 14.0 * static_cast<double>(p.d) * p.scores(), p.exec.threads, p.error(true));
}

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "H", "L", "d", "threads"});
    for (const int threads : {1, 2}) {
        b->Args({1, 8, 2048, 64, threads});
        b->Args({8, 4, 256, 32, threads});
    }
    bench::timed(b);
}
BENCHMARK_TEMPLATE(forward, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward, interstate::bf16)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::bf16)->Apply(shapes);

}  // namespace
