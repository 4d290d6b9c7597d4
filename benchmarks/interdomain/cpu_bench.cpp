// Interdomain Attention on the CPU. Useful operations are those of the products of `chunked` at 64 tokens a chunk, with
// whole 64 x 64 tables, whatever method runs; what backward forms again (a, w, P and states) is not counted.
// Multiply-adds a token and query head, with W = R + d:
//     forward     4 M W + 4 M^2 + 64 (W + 4 M)
//     backward    2 M d + 64 (d + 2 M) for e,  4 M^2 for p,  64 2 M for Q,  (2 M + 64)(2 R + d) for dq, dk, dv,
//                 2 M W for the adjoint,  4 M^2 + 64 4 M + 2 M W for the parameters
// 73,728 and 147,456 at M = R = d = 64 (with what is formed again, both are 282,624). A decoded token:
// 4 M W for the state, 8 M^2 for C and 2 M W for reading it.
// The error is the worst of the tensors of the first key/value head against the float64 reference.
#include <cmath>
#include <vector>

#include <interdomain/init.hpp>
#include <interdomain/interdomain.hpp>

#include "../support/cpu_bench.hpp"

namespace {

using namespace interstate;
using bench::check;
using bench::widen;
using interdomain::Method;

/// Parameters in P, or their gradients.
template <class P>
struct Parameters {
    Index H, M;
    std::vector<P> log_dt, log_neg_re, im;
    std::vector<complex<P>> B, C;

    Parameters(Index h, Index m) : H(h), M(m), log_dt(h), log_neg_re(h * m), im(h * m), B(h * m), C(h * m * m) {}
    /// Views of the first `heads` heads.
    interdomain::BasicParams<P, complex<P>> mutable_views(Index heads) {
        return {view(log_dt.data(), {heads}), view(log_neg_re.data(), {heads, M}), view(im.data(), {heads, M}),
                view(B.data(), {heads, M}), view(C.data(), {heads, M, M})};
    }
    interdomain::Params<P> views(Index heads) const {
        return {view(log_dt.data(), {heads}), view(log_neg_re.data(), {heads, M}), view(im.data(), {heads, M}),
                view(B.data(), {heads, M}), view(C.data(), {heads, M, M})};
    }
};

template <class T>
struct Problem {
    Index B, H, L, M, R;  // d = R
    cpu exec;
    interdomain::Options options{};
    std::vector<T> q, k, v, o, dO, dq, dk, dv;
    Parameters<float> params, grads;
    std::vector<char> forward_memory, backward_memory, saved_memory;

    Problem(Index b, Index h, Index l, Index m, Index r, int threads, Method method)
        : B(b), H(h), L(l), M(m), R(r), exec{.threads = threads}, options{.method = method}, q(size()), k(size()), v(size()),
          o(size()), dO(size()), dq(size()), dk(size()), dv(size()), params(h, m), grads(h, m) {
        for (std::size_t i = 0; i < size(); ++i) {
            const float x = static_cast<float>(i % 9973);
            q[i] = T(std::sin(0.7f * x)), k[i] = T(std::sin(1.3f * x));
            v[i] = T(std::cos(0.9f * x)), dO[i] = T(std::cos(0.31f * x));
        }
        check(initialize(1, params.mutable_views(H)));
        const auto shape = shape_of(inputs(H));
        forward_memory.resize(workspace_size(exec, options, shape, pass::forward));
        backward_memory.resize(workspace_size(exec, options, shape, pass::backward));
        saved_memory.resize(saved_size(exec, options, shape));
    }
    std::size_t size() const { return static_cast<std::size_t>(B * L * H * R); }
    static Workspace memory(std::vector<char>& m) { return {m.data(), m.size()}; }
    template <class E>
    View<E, 4> tokens(std::vector<std::remove_const_t<E>>& x, Index heads) const {
        return view(static_cast<E*>(x.data()), {B, L, heads, R}, {L * H * R, H * R, R, 1});
    }
    interdomain::Inputs<T, float> inputs(Index heads) {
        return {.q = tokens<const T>(q, heads), .k = tokens<const T>(k, heads), .v = tokens<const T>(v, heads),
                .params = params.views(heads)};
    }
    void forward(bool save) {
        check(interdomain::forward(exec, options, inputs(H), interdomain::Outputs<T>{.o = tokens<T>(o, H)},
                                   save ? Saved{saved_memory.data(), saved_memory.size()} : Saved{}, memory(forward_memory)));
    }
    void backward() {
        check(interdomain::backward(exec, options, inputs(H), interdomain::Outputs<T>{},
                                    Saved{saved_memory.data(), saved_memory.size()},
                                    interdomain::Upstream<T>{.o = tokens<const T>(dO, H)},
                                    interdomain::Grads<T, float>{.q = tokens<T>(dq, H),
                                                                 .k = tokens<T>(dk, H),
                                                                 .v = tokens<T>(dv, H),
                                                                 .params = grads.mutable_views(H)},
                                    memory(backward_memory)));
    }
    /// Of the last call, for the first head.
    double error(bool with_backward) {
        const auto widened = [](const std::vector<T>& x) { return std::vector<double>(x.begin(), x.end()); };
        std::vector<double> q64 = widened(q), k64 = widened(k), v64 = widened(v), dO64 = widened(dO), o64(size()),
                            dq64(size()), dk64(size()), dv64(size());
        Parameters<double> p(H, M), g(H, M);
        widen(params.log_dt, p.log_dt), widen(params.log_neg_re, p.log_neg_re), widen(params.im, p.im);
        widen(params.B, p.B), widen(params.C, p.C);
        const interdomain::Inputs<double> in{.q = tokens<const double>(q64, 1), .k = tokens<const double>(k64, 1),
                                             .v = tokens<const double>(v64, 1), .params = p.views(1)};
        std::vector<char> scratch(workspace_size(reference{}, options, shape_of(in), pass::backward));
        bench::Error e;
        check(interdomain::forward(reference{}, options, in, interdomain::Outputs<double>{.o = tokens<double>(o64, 1)},
                                   Saved{}, memory(scratch)));
        e.add(tokens<T>(o, 1), tokens<double>(o64, 1));
        if (!with_backward) return e.worst();
        check(interdomain::backward(reference{}, options, in, interdomain::Outputs<double>{}, Saved{},
                                    interdomain::Upstream<double>{.o = tokens<const double>(dO64, 1)},
                                    interdomain::Grads<double>{.q = tokens<double>(dq64, 1),
                                                               .k = tokens<double>(dk64, 1),
                                                               .v = tokens<double>(dv64, 1),
                                                               .params = g.mutable_views(1)},
                                    memory(scratch)));
        e.add(tokens<T>(dq, 1), tokens<double>(dq64, 1)), e.add(tokens<T>(dk, 1), tokens<double>(dk64, 1));
        e.add(tokens<T>(dv, 1), tokens<double>(dv64, 1));
        const auto got = grads.mutable_views(1);
        const auto want = g.mutable_views(1);
        e.add(got.log_dt, want.log_dt), e.add(got.log_neg_re, want.log_neg_re), e.add(got.im, want.im);
        e.add(got.B, want.B), e.add(got.C, want.C);
        return e.worst();
    }
    double useful_flops(bool with_backward) const {
        const double m = static_cast<double>(M), r = static_cast<double>(R), d = r, w = r + d, chunk = 64.0;
        const double forward = 4.0 * m * w + 4.0 * m * m + chunk * (w + 4.0 * m);
        const double backward = 2.0 * m * d + chunk * (d + 2.0 * m) + 4.0 * m * m + chunk * 2.0 * m +
                                (2.0 * m + chunk) * (2.0 * r + d) + 2.0 * m * w + 4.0 * m * m + chunk * 4.0 * m + 2.0 * m * w;
        return 2.0 * static_cast<double>(B * L * H) * (forward + (with_backward ? backward : 0.0));
    }
};

// Arguments: B, H, L, M, R = d, threads, method.
template <class T>
Problem<T> problem(const benchmark::State& state) {
    return {state.range(0), state.range(1), state.range(2), state.range(3), state.range(4), static_cast<int>(state.range(5)),
            static_cast<Method>(state.range(6))};
}
template <class T>
void forward(benchmark::State& state) {
    auto p = problem<T>(state);
    for (auto _ : state) p.forward(false);
    bench::report<acc_t<T>>(state, p.useful_flops(false), p.exec.threads, p.error(false));
}
template <class T>
void forward_backward(benchmark::State& state) {
    auto p = problem<T>(state);
    for (auto _ : state) {
        p.forward(true);
        p.backward();
    }
    bench::report<acc_t<T>>(state, p.useful_flops(true), p.exec.threads, p.error(true));
}

/// One token. Arguments: B, H, M, R = d, threads.
template <class T>
void step(benchmark::State& state) {
    const Index B = state.range(0), H = state.range(1), M = state.range(2), R = state.range(3);
    Problem<T> p(B, H, 1, M, R, static_cast<int>(state.range(4)), Method::automatic);
    std::vector<complex<double>> Lam(H * M), Bbar(H * M);
    std::vector<complex<acc_t<T>>> x(B * H * M * 2 * R);
    const auto params = p.params.views(H);
    const interdomain::Discrete<float> discrete{view(Lam.data(), {H, M}), view(Bbar.data(), {H, M}), params.C};
    check(discretize(p.exec, p.options, params, discrete));
    const auto token = [&](const std::vector<T>& from) { return view(from.data(), {B, H, R}); };
    const interdomain::Token<T> in{token(p.q), token(p.k), token(p.v)};
    const interdomain::TokenOut<T> out{view(p.o.data(), {B, H, R})};
    std::vector<char> memory(workspace_size(p.exec, p.options, shape_of(discrete, in), pass::step));
    const auto run = [&] {
        check(interdomain::step(p.exec, p.options, discrete, interdomain::State<acc_t<T>>{view(x.data(), {B, H, M, 2 * R})}, in,
                                out, Problem<T>::memory(memory)));
    };
    for (auto _ : state) run();
    std::fill(x.begin(), x.end(), complex<acc_t<T>>{});
    run();
    const double m = static_cast<double>(M), w = 2.0 * static_cast<double>(R);
    bench::report<double>(state, 2.0 * static_cast<double>(B * H) * (6.0 * m * w + 8.0 * m * m), p.exec.threads, p.error(false));
    state.counters["GB/s"] = benchmark::Counter(static_cast<double>(2 * x.size() * sizeof(x[0]) * state.iterations()) * 1e-9,
                                                benchmark::Counter::kIsRate);
}

void named(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "H", "L", "M", "R", "threads", "method"});
    bench::timed(b);
}
/// The shape whose times the page promises, smaller modes and features, one long sequence of one head, and a batch of
/// short ones; then what the other methods cost.
void shapes(benchmark::internal::Benchmark* b) {
    named(b);
    const int chunked = static_cast<int>(Method::chunked);
    for (const int threads : {1, 2}) b->Args({1, 4, 2048, 64, 64, threads, chunked});
    b->Args({1, 4, 2048, 32, 32, 2, chunked});
    b->Args({1, 4, 2048, 16, 64, 2, chunked});
    b->Args({1, 1, 16384, 64, 64, 2, chunked});
    b->Args({64, 4, 40, 64, 64, 2, chunked});
    for (const Method method : {Method::parallel_scan, Method::scan, Method::fft})
        b->Args({1, 4, 2048, 64, 64, 2, static_cast<int>(method)});
}
void other_dtypes(benchmark::internal::Benchmark* b) {
    named(b);
    b->Args({1, 4, 2048, 64, 64, 2, static_cast<int>(Method::chunked)});
}
BENCHMARK_TEMPLATE(forward, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward, interstate::f64)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward, interstate::f16)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward, interstate::bf16)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f64)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f16)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward_backward, interstate::bf16)->Apply(other_dtypes);
void steps(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "H", "M", "R", "threads"});
    b->Args({1, 4, 64, 64, 1});
    for (const int threads : {1, 2}) b->Args({1, 32, 64, 64, threads});
    b->Args({8, 32, 64, 64, 2});
    bench::timed(b);
    b->Unit(benchmark::kMicrosecond);
}
BENCHMARK_TEMPLATE(step, interstate::f32)->Apply(steps);
BENCHMARK_TEMPLATE(step, interstate::bf16)->Apply(steps);

}  // namespace
