// S4D on the CPU: the three methods, sweeps over length and modes, and the same layer by FFTW's and Eigen's
// transforms. Useful operations are those of the method itself, recomputation and what only accuracy asks
// for (the float64 carries) not counted; FMAs per mode and token:
//     scan      8 forward, 16 backward
//     chunked   4 + 12/16 forward, 8 + 32/16 backward (2 more are the forward sums again), and for all modes
//               together 8.5 and 17 a token
//     fft       5 m log2 m FLOPs a transform of m places, 2 + 4/16 a mode and token for K and twice that for
//               its gradients
// The error is the worst of the tensors of the first 4 channels against the float64 reference.
#include <algorithm>
#include <cmath>
#include <complex>
#include <cstdlib>
#include <memory>
#include <vector>

#include <unsupported/Eigen/FFT>
#if INTERSTATE_BENCH_FFTW
#include <fftw3.h>
#endif

#include <s4d/init.hpp>
#include <s4d/s4d.hpp>

#include "../support/cpu_bench.hpp"

namespace {

using namespace interstate;
using bench::check;
using bench::widen;
using s4d::Method;

/// Parameters in P, or their gradients.
template <class P>
struct Parameters {
    Index H, N;
    std::vector<P> log_dt, log_neg_re, im, D;
    std::vector<complex<P>> B, C, C_reverse;  // the last one empty where the layer is causal

    Parameters(Index h, Index n, bool bidirectional = false)
        : H(h),
          N(n),
          log_dt(h),
          log_neg_re(h * n),
          im(h * n),
          D(h),
          B(h * n),
          C(h * n),
          C_reverse(bidirectional ? h * n : 0) {}
    /// Views of the first `channels` channels.
    s4d::BasicParams<P, complex<P>> mutable_views(Index channels) {
        return {view(log_dt.data(), {channels}), view(log_neg_re.data(), {channels, N}),
                view(im.data(), {channels, N}),  view(B.data(), {channels, N}),
                view(C.data(), {channels, N}),   view(D.data(), {channels}),
                reversed(C_reverse, channels)};
    }
    s4d::Params<P> views(Index channels) const {
        return {view(log_dt.data(), {channels}), view(log_neg_re.data(), {channels, N}),
                view(im.data(), {channels, N}),  view(B.data(), {channels, N}),
                view(C.data(), {channels, N}),   view(D.data(), {channels}),
                reversed(C_reverse, channels)};
    }

  private:
    template <class V>
    auto reversed(V& z, Index channels) const {
        const auto v = view(z.data(), {channels, N});
        return z.empty() ? decltype(v){} : v;
    }
};

template <class T>
struct Problem {
    Index B, L, H, N;
    cpu exec;
    s4d::Options options{};
    std::vector<T> u, y, dy, du;
    Parameters<float> params, grads;
    std::vector<char> forward_memory, backward_memory, saved_memory;

    Problem(Index b, Index l, Index h, Index n, int threads, Method method, bool bidirectional = false)
        : B(b),
          L(l),
          H(h),
          N(n),
          exec{.threads = threads},
          options{.method = method},
          u(b * l * h),
          y(u.size()),
          dy(u.size()),
          du(u.size()),
          params(h, n, bidirectional),
          grads(h, n, bidirectional) {
        for (std::size_t i = 0; i < u.size(); ++i) {
            u[i] = T(std::sin(0.1f * static_cast<float>(i % 1009)));
            dy[i] = T(std::cos(0.3f * static_cast<float>(i % 997)));
        }
        check(initialize(s4d::Init::lin, 1, params.mutable_views(H)));
        if (bidirectional) params.C_reverse = params.C;
        const auto shape = shape_of(inputs(H));
        forward_memory.resize(workspace_size(exec, options, shape, pass::forward));
        backward_memory.resize(workspace_size(exec, options, shape, pass::backward));
        saved_memory.resize(saved_size(exec, options, shape));
    }
    static Workspace memory(std::vector<char>& m) { return {m.data(), m.size()}; }
    template <class E>
    View<E, 3> tokens(std::vector<std::remove_const_t<E>>& x, Index channels) const {
        return view(static_cast<E*>(x.data()), {B, L, channels}, {L * H, H, 1});
    }
    s4d::Inputs<T, float> inputs(Index channels) {
        return {.u = tokens<const T>(u, channels), .params = params.views(channels)};
    }
    void forward(bool save) {
        check(s4d::forward(exec, options, inputs(H), s4d::Outputs<T>{.y = tokens<T>(y, H)},
                           save ? Saved{saved_memory.data(), saved_memory.size()} : Saved{},
                           memory(forward_memory)));
    }
    void backward() {
        check(s4d::backward(exec, options, inputs(H), s4d::Outputs<T>{},
                            Saved{saved_memory.data(), saved_memory.size()},
                            s4d::Upstream<T>{.y = tokens<const T>(dy, H)},
                            s4d::Grads<T, float>{.u = tokens<T>(du, H), .params = grads.mutable_views(H)},
                            memory(backward_memory)));
    }
    /// Of the last call, against the reference.
    double error(bool with_backward) {
        const Index few = std::min<Index>(H, 4);
        std::vector<double> u64(u.begin(), u.end()), dy64(dy.begin(), dy.end()), y64(u.size()),
            du64(u.size());
        const bool bidirectional = !params.C_reverse.empty();
        Parameters<double> p(H, N, bidirectional), g(H, N, bidirectional);
        widen(params.log_dt, p.log_dt), widen(params.log_neg_re, p.log_neg_re), widen(params.im, p.im);
        widen(params.B, p.B), widen(params.C, p.C), widen(params.D, p.D);
        widen(params.C_reverse, p.C_reverse);
        const s4d::Inputs<double> in{.u = tokens<const double>(u64, few), .params = p.views(few)};
        std::vector<char> scratch(workspace_size(reference{}, options, shape_of(in), pass::backward));
        bench::Error e;
        check(s4d::forward(reference{}, options, in, s4d::Outputs<double>{.y = tokens<double>(y64, few)},
                           Saved{}, memory(scratch)));
        e.add(tokens<T>(y, few), tokens<double>(y64, few));
        if (!with_backward) return e.worst();
        check(
            s4d::backward(reference{}, options, in, s4d::Outputs<double>{}, Saved{},
                          s4d::Upstream<double>{.y = tokens<const double>(dy64, few)},
                          s4d::Grads<double>{.u = tokens<double>(du64, few), .params = g.mutable_views(few)},
                          memory(scratch)));
        e.add(tokens<T>(du, few), tokens<double>(du64, few));
        const auto got = grads.mutable_views(few);
        const auto want = g.mutable_views(few);
        e.add(got.log_dt, want.log_dt), e.add(got.log_neg_re, want.log_neg_re), e.add(got.im, want.im);
        e.add(got.B, want.B), e.add(got.C, want.C), e.add(got.D, want.D);
        if (bidirectional) e.add(got.C_reverse, want.C_reverse);
        return e.worst();
    }
    double useful_flops(bool with_backward) const {
        const double places = static_cast<double>(B * L * H), n = static_cast<double>(N);
        const Method method =
            s4d::detail::cpu_method(options, shape_of(const_cast<Problem*>(this)->inputs(H)));
        if (method == Method::scan) return places * n * (with_backward ? 48.0 : 16.0);
        if (method == Method::chunked)
            return 2.0 * places * (4.75 * n + 8.5 + (with_backward ? 10.0 * n + 17.0 : 0.0));
        const double m = static_cast<double>(fft::size_for(L)), transform = 5.0 * m * std::log2(m);
        const double rows = static_cast<double>(B * H), kernels = static_cast<double>(H);
        return transform * (rows * (with_backward ? 5.0 : 2.0) + kernels * (with_backward ? 2.0 : 1.0)) +
               2.0 * kernels * static_cast<double>(L) * n * 2.25 * (with_backward ? 3.0 : 1.0);
    }
};

// Arguments: B, L, H, N, threads, method (0 automatic, 1 fft, 2 scan, 3 chunked).
template <class T>
Problem<T> problem(const benchmark::State& state) {
    return {state.range(0),
            state.range(1),
            state.range(2),
            state.range(3),
            static_cast<int>(state.range(4)),
            static_cast<Method>(state.range(5))};
}
template <class T>
void forward(benchmark::State& state) {
    auto p = problem<T>(state);
    for (auto _ : state) p.forward(false);
    state.SetLabel(which_kernel(p.exec, p.options, shape_of(p.inputs(p.H))).name);
    bench::report<acc_t<T>>(state, p.useful_flops(false), p.exec.threads, p.error(false));
}
template <class T>
void forward_backward(benchmark::State& state) {
    auto p = problem<T>(state);
    for (auto _ : state) {
        p.forward(true);
        p.backward();
    }
    state.SetLabel(which_kernel(p.exec, p.options, shape_of(p.inputs(p.H))).name);
    bench::report<acc_t<T>>(state, p.useful_flops(true), p.exec.threads, p.error(true));
}
/// The layer in both directions. Useful operations are not counted.
void bidirectional(benchmark::State& state) {
    Problem<float> p(state.range(0), state.range(1), state.range(2), state.range(3),
                     static_cast<int>(state.range(4)), static_cast<Method>(state.range(5)), true);
    for (auto _ : state) {
        p.forward(true);
        p.backward();
    }
    state.SetLabel(which_kernel(p.exec, p.options, shape_of(p.inputs(p.H))).name);
    bench::report<float>(state, 0.0, p.exec.threads, p.error(true));
}
/// Backward alone, on what one forward has kept.
void backward(benchmark::State& state) {
    auto p = problem<float>(state);
    p.forward(true);
    for (auto _ : state) p.backward();
    state.SetLabel(which_kernel(p.exec, p.options, shape_of(p.inputs(p.H))).name);
    bench::report<float>(state, p.useful_flops(true) - p.useful_flops(false), p.exec.threads, p.error(true));
}

/// Zeros at a multiple of 64 bytes, which lets a peer use its vectors.
template <class T>
class Aligned {
  public:
    explicit Aligned(Index n)
        : data_(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 64) / 64 * 64)), std::free) {
        if (!data_) throw std::bad_alloc();
        std::uninitialized_fill_n(data_.get(), n, T());
    }
    T* data() const { return data_.get(); }

  private:
    std::unique_ptr<T, void (*)(void*)> data_;
};

/// A real transform of n places and back, for one thread: what the peers differ in.
class EigenTransform {
  public:
    explicit EigenTransform(Index n) : n_(n) { fft_.SetFlag(Eigen::FFT<float>::HalfSpectrum); }
    void forward(const float* x, std::complex<float>* values) { fft_.fwd(values, x, n_); }
    /// Scaled by 1/n.
    void inverse(std::complex<float>* values, float* x) { fft_.inv(x, values, n_); }
    float scale() const { return 1.0f; }

  private:
    Index n_;
    Eigen::FFT<float> fft_;
};
#if INTERSTATE_BENCH_FFTW
class FftwTransform {
  public:
    explicit FftwTransform(Index n) : n_(n), x_(n), values_(n / 2 + 1) {
        auto* values = reinterpret_cast<fftwf_complex*>(values_.data());
        forward_ = fftwf_plan_dft_r2c_1d(static_cast<int>(n), x_.data(), values, FFTW_MEASURE);
        inverse_ = fftwf_plan_dft_c2r_1d(static_cast<int>(n), values, x_.data(), FFTW_MEASURE);
    }
    FftwTransform(const FftwTransform&) = delete;
    FftwTransform& operator=(const FftwTransform&) = delete;
    ~FftwTransform() {
        fftwf_destroy_plan(forward_);
        fftwf_destroy_plan(inverse_);
    }
    void forward(const float* x, std::complex<float>* values) {
        fftwf_execute_dft_r2c(forward_, const_cast<float*>(x), reinterpret_cast<fftwf_complex*>(values));
    }
    void inverse(std::complex<float>* values, float* x) {
        fftwf_execute_dft_c2r(inverse_, reinterpret_cast<fftwf_complex*>(values), x);
    }
    float scale() const { return 1.0f / static_cast<float>(n_); }

  private:
    Index n_;
    Aligned<float> x_;
    Aligned<std::complex<float>> values_;
    fftwf_plan forward_{}, inverse_{};
};
#endif

/// The layer (without D) as a peer would build it: our K, their transforms of 2L places, spectra of u and K
/// kept for backward, threads over blocks of 16 channels. `rows`: the tensors already are (B, H, L), which
/// spares the peer what the layer's own (B, L, H) costs it, the copies to rows and back.
template <class Transform>
void peer_convolution(benchmark::State& state, bool rows, bool with_backward) {
    const Index B = state.range(0), L = state.range(1), H = state.range(2), N = state.range(3), few = 16;
    const cpu exec{.threads = static_cast<int>(state.range(4))};
    const s4d::Options options;
    // Ours, to compare with; the rows of its benchmarks hold it against the reference.
    Problem<float> p(B, L, H, N, exec.threads, Method::chunked);
    std::fill(p.params.D.begin(), p.params.D.end(), 0.0f);
    p.forward(true);
    p.backward();
    const Index n = 2 * fft::size_for(L), half = n / 2 + 1, stride = (half + 7) / 8 * 8;
    const auto at = [&](float* x, Index b) {  // (H, L) of batch row b
        return rows ? view(x + b * H * L, {H, L}) : view(x + b * H * L, {H, L}, {1, H});
    };
    std::vector<float> K(H * L), dK(H * L), u(B * H * L), dy(u.size()), y(u.size()), du(u.size());
    for (Index b = 0; b < B; ++b)
        for (Index h = 0; h < H; ++h)
            for (Index t = 0; t < L; ++t) {
                at(u.data(), b)(h, t) = p.u[(b * L + t) * H + h];
                at(dy.data(), b)(h, t) = p.dy[(b * L + t) * H + h];
            }
    Parameters<float> grads(H, N);
    const auto K_view = view(K.data(), {H, L});
    const s4d::Shape shape = shape_of(p.params.views(H), K_view);
    std::vector<char> memory(std::max(generate_kernel_workspace_size(exec, options, shape, pass::forward),
                                      generate_kernel_workspace_size(exec, options, shape, pass::backward)));
    const Workspace ws{memory.data(), memory.size()};
    struct Worker {
        Transform transform;
        Aligned<float> x, in, out;
        Aligned<std::complex<float>> z, v, k, sum;
        Worker(Index size, Index values, Index length, Index channels)
            : transform(size),
              x(size),
              in(channels * length),
              out(channels * length),
              z(values),
              v(values),
              k(channels * values),
              sum(channels * values) {}
    };
    std::vector<std::unique_ptr<Worker>> workers;
    for (int t = 0; t < exec.threads; ++t) workers.push_back(std::make_unique<Worker>(n, stride, L, few));
    const Aligned<std::complex<float>> K_values(with_backward ? H * stride : 1),
        u_values(with_backward ? B * H * stride : 1);
    const auto transform_row = [&](Worker& w, const float* from, std::complex<float>* values) {
        std::copy_n(from, L, w.x.data());
        std::fill_n(w.x.data() + L, n - L, 0.0f);
        w.transform.forward(w.x.data(), values);
    };
    const auto invert_row = [&](Worker& w, std::complex<float>* values, float* to) {
        w.transform.inverse(values, w.x.data());
        std::copy_n(w.x.data(), L, to);
    };
    // Rows [h, h + width) of a batch row: where they are, or copied.
    const auto read = [&](Worker& w, std::vector<float>& x, Index b, Index h, Index width) -> const float* {
        if (rows) return x.data() + (b * H + h) * L;
        for (Index t = 0; t < L; ++t)
            for (Index c = 0; c < width; ++c) w.in.data()[c * L + t] = x[(b * L + t) * H + h + c];
        return w.in.data();
    };
    const auto target = [&](Worker& w, std::vector<float>& x, Index b, Index h) {
        return rows ? x.data() + (b * H + h) * L : w.out.data();
    };
    const auto write = [&](Worker& w, std::vector<float>& x, Index b, Index h, Index width) {
        if (rows) return;
        for (Index t = 0; t < L; ++t)
            for (Index c = 0; c < width; ++c) x[(b * L + t) * H + h + c] = w.out.data()[c * L + t];
    };
    for (auto _ : state) {
        check(generate_kernel(exec, options, p.params.views(H), K_view, ws));
        parallel_for(ceil_div(H, few), exec.threads, [&](Index block, int worker) {
            Worker& w = *workers[worker];
            const Index h = block * few, width = std::min(few, H - h);
            auto* k_block = with_backward ? K_values.data() + h * stride : w.k.data();
            auto* z = w.z.data();
            for (Index c = 0; c < width; ++c) transform_row(w, K.data() + (h + c) * L, k_block + c * stride);
            for (Index b = 0; b < B; ++b) {
                const float* from = read(w, u, b, h, width);
                float* to = target(w, y, b, h);
                for (Index c = 0; c < width; ++c) {
                    const auto* k = k_block + c * stride;
                    auto* v = with_backward ? u_values.data() + (b * H + h + c) * stride : w.v.data();
                    transform_row(w, from + c * L, v);
                    for (Index i = 0; i < half; ++i) {
                        const float re = v[i].real() * k[i].real() - v[i].imag() * k[i].imag();
                        const float im = v[i].real() * k[i].imag() + v[i].imag() * k[i].real();
                        z[i] = {w.transform.scale() * re, w.transform.scale() * im};
                    }
                    invert_row(w, z, to + c * L);
                }
                write(w, y, b, h, width);
            }
        });
        if (!with_backward) continue;
        parallel_for(ceil_div(H, few), exec.threads, [&](Index block, int worker) {
            Worker& w = *workers[worker];
            const Index h = block * few, width = std::min(few, H - h);
            auto* z = w.z.data();
            std::fill_n(w.sum.data(), width * stride, 0.0f);
            for (Index b = 0; b < B; ++b) {
                const float* from = read(w, dy, b, h, width);
                float* to = target(w, du, b, h);
                for (Index c = 0; c < width; ++c) {
                    const auto* k = K_values.data() + (h + c) * stride;
                    const auto* v = u_values.data() + (b * H + h + c) * stride;
                    auto* sum = w.sum.data() + c * stride;
                    transform_row(w, from + c * L, z);
                    for (Index i = 0; i < half; ++i) {
                        const float re = w.transform.scale() * z[i].real(),
                                    im = w.transform.scale() * z[i].imag();
                        sum[i] += std::complex<float>(v[i].real() * re + v[i].imag() * im,
                                                      v[i].real() * im - v[i].imag() * re);
                        z[i] = {k[i].real() * re + k[i].imag() * im, k[i].real() * im - k[i].imag() * re};
                    }
                    invert_row(w, z, to + c * L);
                }
                write(w, du, b, h, width);
            }
            for (Index c = 0; c < width; ++c)
                invert_row(w, w.sum.data() + c * stride, dK.data() + (h + c) * L);
        });
        check(generate_kernel_backward(exec, options, p.params.views(H),
                                       view(static_cast<const float*>(dK.data()), {H, L}),
                                       grads.mutable_views(H), ws));
    }
    bench::Error e;
    for (Index b = 0; b < B; ++b) {
        e.add(at(y.data(), b), view(p.y.data() + b * H * L, {H, L}, {1, H}));
        if (with_backward) e.add(at(du.data(), b), view(p.du.data() + b * H * L, {H, L}, {1, H}));
    }
    if (with_backward) e.add(view(grads.B.data(), {H, N}), view(p.grads.B.data(), {H, N}));
    bench::report<float>(state, 0.0, exec.threads, e.worst());
}
/// Arguments of the benchmark: whether tensors are rows, whether backward runs too.
template <class Transform, bool rows>
void peer_forward(benchmark::State& state) {
    peer_convolution<Transform>(state, rows, false);
}
template <class Transform, bool rows>
void peer_forward_backward(benchmark::State& state) {
    peer_convolution<Transform>(state, rows, true);
}

/// K alone. Arguments: L, H, N, threads.
void kernel(benchmark::State& state) {
    const Index L = state.range(0), H = state.range(1), N = state.range(2);
    const cpu exec{.threads = static_cast<int>(state.range(3))};
    Parameters<float> params(H, N);
    check(initialize(s4d::Init::lin, 1, params.mutable_views(H)));
    std::vector<float> K(H * L);
    const auto K_view = view(K.data(), {H, L});
    std::vector<char> memory(generate_kernel_workspace_size(
        exec, s4d::Options{}, shape_of(params.views(H), K_view), pass::forward));
    for (auto _ : state)
        check(generate_kernel(exec, s4d::Options{}, params.views(H), K_view,
                              Workspace{memory.data(), memory.size()}));
    const Index few = std::min<Index>(H, 4);
    std::vector<double> want(few * L);
    const auto want_view = view(want.data(), {few, L});
    memory.resize(generate_kernel_workspace_size(reference{}, s4d::Options{},
                                                 shape_of(params.views(few), want_view), pass::forward));
    check(generate_kernel(reference{}, s4d::Options{}, params.views(few), want_view,
                          Workspace{memory.data(), memory.size()}));
    bench::Error e;
    e.add(view(K.data(), {few, L}), view(want.data(), {few, L}));
    bench::report<float>(state, 4.5 * static_cast<double>(L * H * N), exec.threads, e.worst());
}

/// One token. Arguments: H, N.
void step(benchmark::State& state) {
    Problem<float> p(1, 1, state.range(0), state.range(1), 1, Method::automatic);
    const Index H = p.H, N = p.N;
    std::vector<complex<double>> Abar(H * N), Bbar(H * N);
    std::vector<complex<float>> x(H * N);
    const auto params = p.params.views(H);
    const s4d::Discrete<float> discrete{view(Abar.data(), {H, N}), view(Bbar.data(), {H, N}), params.C,
                                        params.D};
    check(discretize(p.exec, p.options, params, discrete));
    const s4d::Token<float> token{view(static_cast<const float*>(p.u.data()), {Index{1}, H})};
    const s4d::TokenOut<float> out{view(p.y.data(), {Index{1}, H})};
    const auto run = [&] {
        check(s4d::step(p.exec, p.options, discrete, s4d::State<float>{view(x.data(), {Index{1}, H, N})},
                        token, out, Workspace{}));
    };
    for (auto _ : state) run();
    std::fill(x.begin(), x.end(), complex<float>{});
    run();
    bench::report<float>(state, 16.0 * static_cast<double>(H * N), 1, p.error(false));
}

void named(benchmark::internal::Benchmark* b) {
    b->ArgNames({"B", "L", "H", "N", "threads", "method"});
    bench::timed(b);
}
/// The shape whose times the page promises, and batches of short sequences.
void headline(benchmark::internal::Benchmark* b) {
    named(b);
    for (const int threads : {1, 2})
        for (const Method method : {Method::chunked, Method::fft, Method::scan})
            b->Args({1, 4096, 256, 32, threads, static_cast<int>(method)});
    b->Args({8, 256, 128, 32, 2, static_cast<int>(Method::automatic)});
}
/// Where methods overtake each other. On one thread, which a busy machine disturbs the least.
void sweeps(benchmark::internal::Benchmark* b) {
    headline(b);
    for (const Method method : {Method::chunked, Method::fft, Method::scan}) {
        for (const Index L : {256, 1024, 16384, 65536})
            for (const Index N : {32, 64}) b->Args({1, L, 64, N, 1, static_cast<int>(method)});
        for (const Index N : {4, 16, 32, 64, 128}) b->Args({1, 4096, 64, N, 1, static_cast<int>(method)});
        for (const Index N : {4, 32}) b->Args({8, 256, 64, N, 1, static_cast<int>(method)});
        for (const Index N : {4, 16, 32}) b->Args({8, 4096, 64, N, 1, static_cast<int>(method)});
        b->Args({8, 16384, 64, 32, 1, static_cast<int>(method)});
    }
}
void bidirectional_sweeps(benchmark::internal::Benchmark* b) {
    named(b);
    for (const Method method : {Method::chunked, Method::fft, Method::scan}) {
        for (const Index L : {256, 4096})
            for (const Index N : {8, 64}) b->Args({1, L, 64, N, 1, static_cast<int>(method)});
        b->Args({8, 256, 64, 16, 1, static_cast<int>(method)});
    }
}
void other_dtypes(benchmark::internal::Benchmark* b) {
    named(b);
    b->Args({1, 4096, 256, 32, 2, static_cast<int>(Method::automatic)});
}
void peer_shapes(benchmark::internal::Benchmark* b) {
    named(b);
    for (const int threads : {1, 2}) b->Args({1, 4096, 256, 32, threads, static_cast<int>(Method::fft)});
    for (const Index L : {1024, 16384}) b->Args({1, L, 64, 32, 2, static_cast<int>(Method::fft)});
    b->Args({8, 4096, 64, 32, 2, static_cast<int>(Method::fft)});
}
BENCHMARK_TEMPLATE(forward, interstate::f32)->Apply(sweeps);
BENCHMARK_TEMPLATE(forward_backward, interstate::f32)->Apply(sweeps);
BENCHMARK(bidirectional)->Apply(bidirectional_sweeps);
BENCHMARK(backward)->Apply(headline);
BENCHMARK_TEMPLATE(forward, interstate::f64)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward, interstate::f16)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward, interstate::bf16)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f64)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward_backward, interstate::f16)->Apply(other_dtypes);
BENCHMARK_TEMPLATE(forward_backward, interstate::bf16)->Apply(other_dtypes);
#if INTERSTATE_BENCH_FFTW
BENCHMARK_TEMPLATE(peer_forward, FftwTransform, false)->Apply(peer_shapes);
BENCHMARK_TEMPLATE(peer_forward, FftwTransform, true)->Apply(peer_shapes);
BENCHMARK_TEMPLATE(peer_forward_backward, FftwTransform, false)->Apply(peer_shapes);
BENCHMARK_TEMPLATE(peer_forward_backward, FftwTransform, true)->Apply(peer_shapes);
#endif
BENCHMARK_TEMPLATE(peer_forward, EigenTransform, false)->Apply(peer_shapes);
BENCHMARK_TEMPLATE(peer_forward_backward, EigenTransform, false)->Apply(peer_shapes);
BENCHMARK(kernel)
    ->ArgNames({"L", "H", "N", "threads"})
    ->Args({4096, 256, 32, 2})
    ->Args({65536, 64, 32, 2})
    ->Apply(bench::timed);
BENCHMARK(step)
    ->ArgNames({"H", "N"})
    ->Args({128, 32})
    ->Args({1024, 32})
    ->Apply(bench::timed)
    ->Unit(benchmark::kMicrosecond);

}  // namespace
