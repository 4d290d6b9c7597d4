// Random Fourier features on the CPU: GFLOP/s of the products (2 dh F forward, three times that backward, of which W x is
// done again) beside the FMA rate of the same threads, and the error against the float64 reference on 128 tokens.
#include <cmath>
#include <vector>

#include <random_features/init.hpp>
#include <random_features/random_features.hpp>

#include "../support/cpu_bench.hpp"

namespace {

using namespace interstate;
using bench::check;

template <class T>
struct Problem {
    Index L, H, dh, F;
    std::vector<T> x, dy, y, dx;
    std::vector<float> W, dW;

    Problem(Index l, Index h, Index d, Index f)
        : L(l), H(h), dh(d), F(f), x(static_cast<std::size_t>(L * H * dh)), dy(static_cast<std::size_t>(2 * L * H * F)),
          y(dy.size()), dx(x.size()), W(static_cast<std::size_t>(H * F * dh)), dW(W.size()) {
        check(random_features::initialize(1, view(W.data(), {H, F, dh}), 4.0));
        for (std::size_t i = 0; i < x.size(); ++i) x[i] = T(std::sin(0.7f * static_cast<float>(i % 9973)));
        for (std::size_t i = 0; i < dy.size(); ++i) dy[i] = T(std::cos(0.9f * static_cast<float>(i % 9973)));
    }
    template <class Exec>
    void run(const Exec& exec, Index length, bool backwards, std::vector<char>& memory) {
        const random_features::Inputs<T, float> in{.x = view(std::as_const(x).data(), {Index{1}, length, H, dh}),
                                                   .params = {view(std::as_const(W).data(), {H, F, dh})}};
        const random_features::Outputs<T> out{view(y.data(), {Index{1}, length, H, 2 * F})};
        memory.resize(workspace_size(exec, {}, shape_of(in), backwards ? pass::backward : pass::forward));
        const Workspace ws{memory.data(), memory.size()};
        if (!backwards) return check(forward(exec, {}, in, out, Saved{}, ws));
        check(backward(exec, {}, in, out, Saved{},
                       random_features::Upstream<T>{view(std::as_const(dy).data(), {Index{1}, length, H, 2 * F})},
                       random_features::Grads<T, float>{view(dx.data(), {Index{1}, length, H, dh}), {view(dW.data(), {H, F, dh})}}, ws));
    }
    double error(const cpu& exec, bool backwards) {
        Problem<double> truth(std::min<Index>(L, 128), H, dh, F);
        for (std::size_t i = 0; i < truth.x.size(); ++i) truth.x[i] = static_cast<double>(x[i]);
        for (std::size_t i = 0; i < truth.dy.size(); ++i) truth.dy[i] = static_cast<double>(dy[i]);
        std::vector<char> memory;
        run(exec, truth.L, backwards, memory);
        truth.run(reference{}, truth.L, backwards, memory);
        bench::Error e;
        const auto add = [&](auto& got, auto& want) {
            const auto n = static_cast<Index>(want.size());
            e.add(view(got.data(), {n}), view(want.data(), {n}));
        };
        if (!backwards) return add(y, truth.y), e.worst();
        add(dx, truth.dx), add(dW, truth.dW);
        return e.worst();
    }
};

// Arguments: L, H, dh, F, threads.
template <class T, bool backwards>
void run(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1), state.range(2), state.range(3));
    const cpu exec{.threads = static_cast<int>(state.range(4))};
    std::vector<char> memory;
    for (auto _ : state) p.run(exec, p.L, backwards, memory);
    const double flops = 2.0 * static_cast<double>(p.L * p.H * p.dh * p.F) * (backwards ? 3.0 : 1.0);
    bench::report<acc_t<T>>(state, flops, exec.threads, p.error(exec, backwards));
}
template <class T>
void forward_of(benchmark::State& state) { run<T, false>(state); }
template <class T>
void backward_of(benchmark::State& state) { run<T, true>(state); }

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"L", "H", "dh", "F", "threads"});
    for (const int threads : {1, 2}) b->Args({4096, 8, 64, 32, threads});
    bench::timed(b);
}
BENCHMARK_TEMPLATE(forward_of, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_of, interstate::bf16)->Apply(shapes);
BENCHMARK_TEMPLATE(backward_of, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(backward_of, interstate::bf16)->Apply(shapes);

}  // namespace
