// S4D on the CPU. Counters: useful GFLOP/s (16 FLOPs per mode and token forward, 32 backward: what the
// recurrence needs, recomputation and the float64 carry not counted).
#include <cmath>
#include <stdexcept>
#include <vector>

#include <benchmark/benchmark.h>

#include <s4d/init.hpp>
#include <s4d/s4d.hpp>

namespace {

using namespace interstate;

template <class T>
struct Problem {
    Index B, L, H, N;
    cpu exec;
    s4d::Options options{};
    std::vector<T> u, y, du;
    std::vector<float> log_dt, log_neg_re, im, D, dlog_dt, dlog_neg_re, dim, dD;
    std::vector<complex<float>> Bp, C, dB, dC;
    std::vector<char> forward_memory, backward_memory, saved_memory;

    Problem(Index b, Index l, Index h, Index n, int threads)
        : B(b), L(l), H(h), N(n), exec{.threads = threads}, u(size()), y(size()), du(size()), log_dt(h),
          log_neg_re(h * n), im(h * n), D(h), dlog_dt(h), dlog_neg_re(h * n), dim(h * n), dD(h), Bp(h * n), C(h * n),
          dB(h * n), dC(h * n) {
        for (std::size_t i = 0; i < u.size(); ++i) u[i] = T(std::sin(0.1f * static_cast<float>(i % 1000)));
        const s4d::MutableParams<float> p{view(log_dt.data(), {H}), view(log_neg_re.data(), {H, N}),
                                          view(im.data(), {H, N}),  view(Bp.data(), {H, N}),
                                          view(C.data(), {H, N}),   view(D.data(), {H})};
        check(initialize(s4d::Init::lin, 1, p));
        forward_memory.resize(workspace_size(exec, options, shape_of(inputs()), pass::forward));
        backward_memory.resize(workspace_size(exec, options, shape_of(inputs()), pass::backward));
        saved_memory.resize(saved_size(exec, options, shape_of(inputs())));
    }
    std::size_t size() const { return static_cast<std::size_t>(B * L * H); }
    static void check(const Status& s) {
        if (!s.ok()) throw std::runtime_error(s.message());
    }
    s4d::Params<float> params() const {
        return {view(log_dt.data(), {H}), view(log_neg_re.data(), {H, N}), view(im.data(), {H, N}),
                view(Bp.data(), {H, N}),  view(C.data(), {H, N}),          view(D.data(), {H})};
    }
    s4d::Inputs<T, float> inputs() const { return {.u = view(u.data(), {B, L, H}), .params = params()}; }
    s4d::Outputs<T> outputs() { return {.y = view(y.data(), {B, L, H})}; }
    Saved saved() { return {saved_memory.data(), saved_memory.size()}; }
    void forward(bool save) {
        check(s4d::forward(exec, options, inputs(), outputs(), save ? saved() : Saved{},
                           Workspace{forward_memory.data(), forward_memory.size()}));
    }
    void backward() {
        const s4d::Grads<T, float> grads{.u = view(du.data(), {B, L, H}),
                                  .params = {view(dlog_dt.data(), {H}), view(dlog_neg_re.data(), {H, N}),
                                             view(dim.data(), {H, N}), view(dB.data(), {H, N}),
                                             view(dC.data(), {H, N}), view(dD.data(), {H})}};
        check(s4d::backward(exec, options, inputs(), outputs(), saved(),
                            s4d::Upstream<T>{.y = view(static_cast<const T*>(y.data()), {B, L, H})}, grads,
                            Workspace{backward_memory.data(), backward_memory.size()}));
    }
};

void report(benchmark::State& state, double flops) {
    state.counters["GFLOP/s"] =
        benchmark::Counter(flops * static_cast<double>(state.iterations()) * 1e-9, benchmark::Counter::kIsRate);
}

// Arguments: B, L, H, N, threads.
template <class T>
void forward(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1), state.range(2), state.range(3), static_cast<int>(state.range(4)));
    for (auto _ : state) p.forward(false);
    report(state, 16.0 * static_cast<double>(p.B * p.L * p.H * p.N));
}
template <class T>
void forward_backward(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1), state.range(2), state.range(3), static_cast<int>(state.range(4)));
    for (auto _ : state) {
        p.forward(true);
        p.backward();
    }
    report(state, 48.0 * static_cast<double>(p.B * p.L * p.H * p.N));
}
// Arguments: H, N.
void step(benchmark::State& state) {
    Problem<float> p(1, 1, state.range(0), state.range(1), 1);
    const Index H = p.H, N = p.N;
    std::vector<complex<double>> Abar(H * N), Bbar(H * N);
    std::vector<complex<float>> x(H * N);
    const s4d::Discrete<float> discrete{view(Abar.data(), {H, N}), view(Bbar.data(), {H, N}), p.params().C,
                                        p.params().D};
    p.check(discretize(p.exec, p.options, p.params(), discrete));
    const s4d::Token<float> token{view(static_cast<const float*>(p.u.data()), {Index{1}, H})};
    const s4d::TokenOut<float> out{view(p.y.data(), {Index{1}, H})};
    for (auto _ : state)
        p.check(s4d::step(p.exec, p.options, discrete, s4d::State<float>{view(x.data(), {Index{1}, H, N})}, token, out,
                          Workspace{}));
    report(state, 16.0 * static_cast<double>(H * N));
}

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "L", "H", "N", "threads"});
    for (const int threads : {1, 2}) {
        b->Args({1, 4096, 256, 32, threads});
        b->Args({8, 256, 128, 32, threads});
    }
    b->Unit(benchmark::kMillisecond)->UseRealTime();
}
BENCHMARK_TEMPLATE(forward, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward, interstate::f64)->Apply(shapes);
BENCHMARK_TEMPLATE(forward, interstate::bf16)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f64)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::bf16)->Apply(shapes);
BENCHMARK(step)->ArgNames({"H", "N"})->Args({128, 32})->Args({1024, 32})->Unit(benchmark::kMicrosecond);

}  // namespace
