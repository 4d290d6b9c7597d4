// SISA on the CPU, and attention beside it in the same run (ds = 0 is attention). Useful operations are those of a causal
// call: 2 (dh + ds + dv) a score forward and 2 (3 (dh + ds) + 2 dv) backward, recomputation not counted. The error is the
// worst of o and all gradients but that of lambda, of the first head and batch row, against the float64 reference. log_alpha
// is what a layer begins with, about -0.0067 a token.
#include <cmath>
#include <vector>

#include <sisa/sisa.hpp>

#include "../support/cpu_bench.hpp"

namespace {

using namespace interstate;
using bench::check;

template <class T>
struct Tensors {
    using P = param_t<T>;
    Index B, H, L, d, ds;
    std::vector<T> q, k, v, C, Bc, o, dout, dq, dk, dv, dC, dB;
    std::vector<P> log_alpha, theta, lam, dlog_alpha, dtheta, dlam;
    std::vector<acc_t<T>> lse;

    Tensors(Index b, Index h, Index l, Index dim, Index state) : B(b), H(h), L(l), d(dim), ds(state) {
        const auto fill = [&](auto& x, Index width, auto&& value) {
            x.resize(static_cast<std::size_t>(B * L * H * width));
            for (std::size_t i = 0; i < x.size(); ++i)
                x[i] = static_cast<std::remove_reference_t<decltype(x[0])>>(value(static_cast<float>(i % 9973)));
        };
        const auto wave = [](float by) { return [by](float x) { return std::sin(by * x); }; };
        fill(q, d, wave(0.7f)), fill(k, d, wave(1.3f)), fill(v, d, wave(2.1f)), fill(dout, d, wave(1.1f));
        fill(C, ds, wave(0.3f)), fill(Bc, ds, wave(1.7f));
        fill(log_alpha, 1, [](float x) { return -0.0067f * (1.0f + 0.5f * std::sin(x)); });
        fill(theta, ds / 2, [](float x) { return 0.05f * std::sin(0.1f * x); });
        lam.assign(static_cast<std::size_t>(H), P(0.31f)), dlam = lam;
        o = dq = dk = dv = q, dC = C, dB = Bc, dlog_alpha = log_alpha, dtheta = theta;
        lse.resize(static_cast<std::size_t>(B * L * H));
    }
    /// The first head of the first row, in float64.
    template <class U>
    explicit Tensors(const Tensors<U>& other) : Tensors(1, 1, other.L, other.d, other.ds) {
        const auto copy = [&](auto& to, const auto& from, Index width) {
            for (Index t = 0; t < L; ++t)
                for (Index x = 0; x < width; ++x)
                    to[static_cast<std::size_t>(t * width + x)] = from[static_cast<std::size_t>(t * other.H * width + x)];
        };
        copy(q, other.q, d), copy(k, other.k, d), copy(v, other.v, d), copy(dout, other.dout, d);
        copy(C, other.C, ds), copy(Bc, other.Bc, ds), copy(log_alpha, other.log_alpha, 1), copy(theta, other.theta, ds / 2);
        lam[0] = other.lam[0];
    }
    template <class X>
    auto rows(X& x, Index width) const {
        return view(x.data(), {B, L, H, width});
    }
    sisa::Inputs<T, P> inputs() const {
        return {.q = rows(q, d), .k = rows(k, d), .v = rows(v, d), .C = rows(C, ds), .B = rows(Bc, ds),
                .log_alpha = view(log_alpha.data(), {B, L, H}), .theta = rows(theta, ds / 2), .lam = view(lam.data(), {H})};
    }
    sisa::Outputs<T> outputs() { return {.o = rows(o, d), .lse = view(lse.data(), {B, L, H})}; }
    sisa::Grads<T, P> grads() {
        return {.q = rows(dq, d), .k = rows(dk, d), .v = rows(dv, d), .C = rows(dC, ds), .B = rows(dB, ds),
                .log_alpha = view(dlog_alpha.data(), {B, L, H}), .theta = rows(dtheta, ds / 2), .lam = view(dlam.data(), {H})};
    }
};

template <class T, class Exec>
struct Problem : Tensors<T> {
    Exec exec;
    sisa::Options options;
    std::vector<char> memory, kept;

    Problem(const Tensors<T>& x, const Exec& e, const sisa::Options& o) : Tensors<T>(x), exec(e), options(o) {
        const auto shape = shape_of(this->inputs());
        memory.resize(std::max(workspace_size(exec, options, shape, pass::forward),
                               workspace_size(exec, options, shape, pass::backward)));
        kept.resize(saved_size(exec, options, shape));
    }
    Saved saved() { return {kept.data(), kept.size()}; }
    void forward() {
        check(sisa::forward(exec, options, this->inputs(), this->outputs(), saved(), Workspace{memory.data(), memory.size()}));
    }
    void backward() {
        check(sisa::backward(exec, options, this->inputs(), this->outputs(), saved(),
                             sisa::Upstream<T>{.o = this->rows(std::as_const(this->dout), this->d)}, this->grads(),
                             Workspace{memory.data(), memory.size()}));
    }
    /// Of the last call, for one head of one row.
    double error(bool with_backward) {
        Problem<double, reference> truth(Tensors<double>(static_cast<const Tensors<T>&>(*this)), reference{}, options);
        truth.forward();
        bench::Error e;
        const auto add = [&](auto& got, auto& want, Index width) {
            if (width > 0)
                e.add(view(got.data(), {Index{1}, this->L, Index{1}, width}, {Index{0}, this->H * width, width, Index{1}}),
                      view(want.data(), {Index{1}, this->L, Index{1}, width}));
        };
        add(this->o, truth.o, this->d);
        if (!with_backward) return e.worst();
        truth.backward();
        add(this->dq, truth.dq, this->d), add(this->dk, truth.dk, this->d), add(this->dv, truth.dv, this->d);
        add(this->dC, truth.dC, this->ds), add(this->dB, truth.dB, this->ds);
        if (this->ds > 0) add(this->dlog_alpha, truth.dlog_alpha, 1), add(this->dtheta, truth.dtheta, this->ds / 2);
        return e.worst();
    }
    double scores() const { return 0.5 * static_cast<double>(this->B * this->H * this->L) * static_cast<double>(this->L + 1); }
};

template <class T>
Problem<T, cpu> problem(const benchmark::State& s, sisa::Mode mode) {
    return {Tensors<T>(s.range(0), s.range(1), s.range(2), s.range(3), s.range(4)),
            cpu{.threads = static_cast<int>(s.range(5))}, sisa::Options{.mode = mode}};
}

// Arguments: B, H, L, d, ds, threads.
template <class T, sisa::Mode mode>
void forward(benchmark::State& state) {
    auto p = problem<T>(state, mode);
    for (auto _ : state) p.forward();
    bench::report<acc_t<T>>(state, 2.0 * static_cast<double>(2 * p.d + p.ds) * p.scores(), p.exec.threads, p.error(false));
}
template <class T, sisa::Mode mode>
void forward_backward(benchmark::State& state) {
    auto p = problem<T>(state, mode);
    for (auto _ : state) {
        p.forward();
        p.backward();
    }
    bench::report<acc_t<T>>(state, 2.0 * static_cast<double>(7 * p.d + 4 * p.ds) * p.scores(), p.exec.threads, p.error(true));
}

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "H", "L", "d", "ds", "threads"});
    for (const int threads : {1, 2})
        for (const int ds : {0, 16, 32, 64}) b->Args({1, 8, 2048, 64, ds, threads});
    bench::timed(b);
}
void published_shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "H", "L", "d", "ds", "threads"})->Args({1, 8, 2048, 64, 16, 2});
    bench::timed(b);
}
using sisa::Mode;
BENCHMARK_TEMPLATE(forward, interstate::f32, Mode::exact)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f32, Mode::exact)->Apply(shapes);
BENCHMARK_TEMPLATE(forward, interstate::f32, Mode::published)->Apply(published_shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f32, Mode::published)->Apply(published_shapes);
BENCHMARK_TEMPLATE(forward, interstate::bf16, Mode::exact)->Apply(published_shapes);
BENCHMARK_TEMPLATE(forward_backward, interstate::bf16, Mode::exact)->Apply(published_shapes);

}  // namespace
