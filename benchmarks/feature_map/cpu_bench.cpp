// The feature map on the CPU: GB/s, each tensor counted once, beside the copy of the same threads. The error is the worst
// of every output and gradient of one batch row of 128 tokens against the float64 reference.
#include <cmath>
#include <vector>

#include <feature_map/feature_map.hpp>

#include "../support/cpu_copy.hpp"

namespace {

using namespace interstate;
using bench::check;
using feature_map::Options;

Options options_of(Index which) { return which == 0 ? Options::query() : which == 1 ? Options::key() : Options::value(); }

template <class T>
struct Problem {
    Index B, L, H, R, taps;
    Options options;
    std::vector<T> x, dy, y, dx;
    std::vector<float> weight, conv_bias, scale, bias, dweight, dconv_bias, dscale, dbias;

    Problem(Index b, Index l, Index h, Index r, Index which)
        : B(b), L(l), H(h), R(r), taps(which == 2 ? 0 : 4), options(options_of(which)), x(size()), dy(size()), y(size()),
          dx(size()), weight(fill(H * R * taps)), conv_bias(fill(H * R)), scale(fill(R)), bias(fill(H * R)),
          dweight(weight.size()), dconv_bias(conv_bias.size()), dscale(scale.size()), dbias(bias.size()) {
        for (std::size_t i = 0; i < size(); ++i) {
            const float at = static_cast<float>(i % 9973);
            x[i] = T(std::sin(0.7f * at));
            dy[i] = T(std::cos(0.9f * at));
        }
    }
    static std::vector<float> fill(Index n) {
        std::vector<float> v;
        for (Index i = 0; i < n; ++i) v.push_back(0.5f + 0.25f * std::sin(static_cast<float>(i)));
        return v;
    }
    std::size_t size() const { return static_cast<std::size_t>(B * L * H * R); }

    template <class E>
    View<E, 4> rows(E* data, Index batch, Index length) const {
        return view(data, {batch, length, H, R}, {L * H * R, H * R, R, Index{1}});
    }
    template <class Ps, class E>
    Ps params(E& w, E& b, E& s, E& o) const {
        Ps p;
        if (taps > 0) p.conv_weight = view(w.data(), {H, R, taps}), p.conv_bias = view(b.data(), {H, R});
        if (options.rms) p.scale = view(s.data(), {R}), p.bias = view(o.data(), {H, R});
        return p;
    }
    feature_map::Inputs<T, float> inputs(Index batch, Index length) const {
        return {.x = rows<const T>(x.data(), batch, length),
                .params = params<feature_map::Params<float>>(weight, conv_bias, scale, bias)};
    }
    template <class Exec>
    void run(const Exec& exec, Index batch, Index length, bool backwards, std::vector<char>& memory) {
        const auto in = inputs(batch, length);
        const feature_map::Outputs<T> out{.y = rows(y.data(), batch, length)};
        memory.resize(workspace_size(exec, options, shape_of(in), backwards ? pass::backward : pass::forward));
        const Workspace ws{memory.data(), memory.size()};
        if (!backwards) return check(forward(exec, options, in, out, Saved{}, ws));
        const feature_map::Grads<T, float> grads{
            .x = rows(dx.data(), batch, length),
            .params = params<feature_map::BasicParams<float>>(dweight, dconv_bias, dscale, dbias)};
        check(backward(exec, options, in, out, Saved{}, feature_map::Upstream<T>{.y = rows<const T>(dy.data(), batch, length)},
                       grads, ws));
    }
    double error(const cpu& exec, bool backwards) {
        Problem<T>& self = *this;
        Problem<double> truth(1, std::min<Index>(L, 128), H, R, taps == 0 ? 2 : options.rms ? 1 : 0);
        for (std::size_t i = 0; i < truth.size(); ++i) truth.x[i] = static_cast<double>(x[i]), truth.dy[i] = static_cast<double>(dy[i]);
        std::vector<char> memory;
        bench::Error e;
        self.run(exec, 1, truth.L, backwards, memory);
        truth.run(reference{}, 1, truth.L, backwards, memory);
        const auto add = [&](auto& got, auto& want, Index n) { e.add(view(got.data(), {n}), view(want.data(), {n})); };
        const auto n = static_cast<Index>(truth.size());
        if (!backwards) return add(y, truth.y, n), e.worst();
        add(dx, truth.dx, n);
        if (taps > 0) add(dweight, truth.dweight, H * R * taps), add(dconv_bias, truth.dconv_bias, H * R);
        if (options.rms) add(dscale, truth.dscale, R), add(dbias, truth.dbias, H * R);
        return e.worst();
    }
};

// Arguments: B, L, H, R, which (0 query, 1 key, 2 value), threads.
template <class T, bool backwards>
void run(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1), state.range(2), state.range(3), state.range(4));
    const cpu exec{.threads = static_cast<int>(state.range(5))};
    std::vector<char> memory;
    for (auto _ : state) p.run(exec, p.B, p.L, backwards, memory);
    const double tensors = backwards ? 3.0 : 2.0;
    bench::report_bytes(state, tensors * static_cast<double>(p.size() * sizeof(T)), exec.threads, p.error(exec, backwards));
}
template <class T>
void forward_of(benchmark::State& state) { run<T, false>(state); }
template <class T>
void backward_of(benchmark::State& state) { run<T, true>(state); }

void shapes(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "L", "H", "R", "which", "threads"});
    for (const int threads : {1, 2})
        for (const Index which : {0, 1, 2}) b->Args({1, 4096, 16, 64, which, threads});
    bench::timed(b);
}
BENCHMARK_TEMPLATE(forward_of, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(forward_of, interstate::bf16)->Apply(shapes);
BENCHMARK_TEMPLATE(backward_of, interstate::f32)->Apply(shapes);
BENCHMARK_TEMPLATE(backward_of, interstate::bf16)->Apply(shapes);

}  // namespace
