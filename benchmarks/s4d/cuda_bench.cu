// S4D on the GPU: milliseconds of forward and of forward and backward, bytes of memory, errors against float64
// on a slice of channels, and the floors, as JSON lines. With cuFFT (INTERSTATE_BENCH_CUFFT) also of the method fft.
//
// Timed calls have no states. The errors are those of one more call that has them: every output and gradient,
// relative in the 2-norm, and the largest of them.
//
// Floors: bytes, each input, output and gradient moved once at this run's copy speed; products, what the
// chunked form needs at this run's tensor-core rate (docs/ops/s4d.md, "What it costs").
#include <cmath>
#include <cstdint>
#include <cstring>

#include <s4d/reference.hpp>
#include <s4d/s4d.cuh>
#if INTERSTATE_BENCH_CUFFT
#include <s4d/fft.cuh>
#endif

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::Ceilings;
using bench::check;
using bench::DeviceArray;
using bench::random_unit;
using bench::RandomArray;
using s4d::Method;

struct Sizes {
    Index B, L, H, N;
};

/// Parameters of the published initialisation, in device memory, and room for their gradients.
struct Parameters {
    DeviceArray<float> log_dt, log_neg_re, im, D;
    DeviceArray<complex<float>> B, C;

    static std::vector<float> filled(Index count, auto&& f) {
        std::vector<float> x;
        for (Index i = 0; i < count; ++i) x.push_back(static_cast<float>(f(i)));
        return x;
    }
    static std::vector<complex<float>> pairs(Index count, auto&& f) {
        std::vector<complex<float>> x;
        for (Index i = 0; i < count; ++i) x.push_back({static_cast<float>(f(2 * i)), static_cast<float>(f(2 * i + 1))});
        return x;
    }
    Parameters(Index H, Index N)
        : log_dt(filled(H, [](Index h) {
              return std::log(1e-3) + random_unit(static_cast<std::uint64_t>(h) + 1) * std::log(100.0);
          })),
          log_neg_re(filled(H * N, [](Index) { return std::log(0.5); })),
          im(filled(H * N, [&](Index i) { return 3.14159265358979 * static_cast<double>(i % N); })),
          D(filled(H, [](Index) { return 1.0; })),
          B(pairs(H * N, [](Index i) { return i % 2 == 0 ? 1.0 : 0.0; })),
          C(pairs(H * N, [&](Index i) { return random_unit(static_cast<std::uint64_t>(H + i) + 1) - 0.5; })) {}

    /// Of the first h channels.
    s4d::BasicParams<float, complex<float>> views(Index h, Index N) const {
        return {view(log_dt.data(), {h}), view(log_neg_re.data(), {h, N}), view(im.data(), {h, N}),
                view(B.data(), {h, N}),   view(C.data(), {h, N}),          view(D.data(), {h})};
    }
};

/// The tensors of a layer, and views of them or of their first h channels.
template <class T>
struct Layer {
    using State = complex<acc_t<T>>;
    using Real = acc_t<T>;
    Sizes size;
    Parameters params, grads;
    RandomArray<T> u, dy;
    DeviceArray<T> y, du;
    RandomArray<Real> x0, dxT;  // pairs
    DeviceArray<State> xT, dx0;

    explicit Layer(const Sizes& s)
        : size(s), params(s.H, s.N), grads(s.H, s.N), u(tokens(), 1), dy(tokens(), 2), y(u.size()), du(u.size()),
          x0(2 * states(), 3), dxT(2 * states(), 4), xT(static_cast<std::size_t>(states())), dx0(xT.size()) {}

    Index tokens() const { return size.B * size.L * size.H; }
    Index states() const { return size.B * size.H * size.N; }

    s4d::Inputs<T, float> inputs(Index h) const {
        const auto p = params.views(h, size.N);
        return {.u = rows<const T>(u.data(), h), .params = {p.log_dt, p.log_neg_re, p.im, p.B, p.C, p.D},
                .x0 = modes<const State>(reinterpret_cast<const State*>(x0.data()), h)};
    }
    s4d::Upstream<T> upstream(Index h) const {
        return {.y = rows<const T>(dy.data(), h), .xT = modes<const State>(reinterpret_cast<const State*>(dxT.data()), h)};
    }
    s4d::Outputs<T> outputs(Index h) const { return {.y = rows<T>(y.data(), h), .xT = modes<State>(xT.data(), h)}; }
    s4d::Grads<T, float> gradients(Index h) const {
        return {.u = rows<T>(du.data(), h), .params = grads.views(h, size.N), .x0 = modes<State>(dx0.data(), h)};
    }

  private:
    template <class E>
    View<E, 3> rows(E* data, Index h) const {
        return view(data, {size.B, size.L, h}, {size.L * size.H, size.H, Index{1}});
    }
    template <class E>
    View<E, 3> modes(E* data, Index h) const {
        return view(data, {size.B, h, size.N}, {size.H * size.N, size.N, Index{1}});
    }
};

/// Times one method on a layer and prints its line. `truth` is the layer's first channels in float64; `plans` are
/// bytes of memory beside workspace and saved.
template <class T, class Exec>
void measure(const Layer<T>& layer, const Exec& exec, Method method, const Case& truth, std::size_t plans,
             const Ceilings& ceilings) {
    const auto [B, L, H, N] = layer.size;
    const s4d::Options options{.method = method};
    auto in = layer.inputs(H);
    auto out = layer.outputs(H);
    auto upstream = layer.upstream(H);
    auto grads = layer.gradients(H);
    const s4d::Shape shape = shape_of(in);
    const DeviceArray<char> memory(std::max(workspace_size(exec, options, shape, pass::forward),
                                            workspace_size(exec, options, shape, pass::backward)));
    const DeviceArray<char> kept(saved_size(exec, options, shape));
    const Workspace ws{memory.data(), memory.size()};
    const Saved saved{kept.data(), kept.size()};
    const auto both = [&] {
        check(forward(exec, options, in, out, saved, ws));
        check(backward(exec, options, in, out, saved, upstream, grads, ws));
    };

    both();
    const Index few = truth.tensors.at("out.y").extent[2];
    const bench::Errors errors(bench::results_of(layer.inputs(few), layer.outputs(few), layer.gradients(few)), truth);

    in.x0 = {};
    out.xT = {};
    upstream.xT = {};
    grads.x0 = {};
    const double forward_ms = bench::milliseconds([&] { check(forward(exec, options, in, out, Saved{}, ws)); });
    const double both_ms = bench::milliseconds(both);

    const double tokens = static_cast<double>(layer.tokens()), tensor = tokens * sizeof(T), n = static_cast<double>(N);
    // What the chunked form computes with (docs/ops/s4d.md, "What it costs").
    const double products = std::is_same_v<T, f32> ? 3.0 : 1.0, chunk = std::is_same_v<T, bf16> ? 32.0 : 16.0;
    const double tflops = ceilings.tflops<T>();
    const auto bytes_ms = [&](double tensors) { return tensors * tensor / ceilings.copy_gbps * 1e-6; };
    const auto product_ms = [&](double macs) { return 2.0 * macs * tokens * products / tflops * 1e-9; };
    std::printf("{\"op\":\"s4d\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,\"H\":%lld,\"N\":%lld,"
                "\"forward_ms\":%.4f,\"both_ms\":%.4f,\"floor_bytes_ms\":%.4f,\"floor_products_ms\":%.4f,"
                "\"both_floor_bytes_ms\":%.4f,\"both_floor_products_ms\":%.4f,\"memory_ratio\":%.3f,",
                which_kernel(exec, options, shape).name, to_string(dtype_of<T>), static_cast<long long>(B),
                static_cast<long long>(L), static_cast<long long>(H), static_cast<long long>(N), forward_ms, both_ms,
                bytes_ms(2), product_ms(4 * n + chunk / 2), bytes_ms(5), product_ms(12 * n + 1.5 * chunk),
                1.0 + static_cast<double>(ws.size + saved.size + plans) / (4.0 * tensor));
    errors.print();
}

#if INTERSTATE_BENCH_CUFFT
template <class T>
void measure_fft(const Layer<T>& layer, const Case& truth, const Ceilings& ceilings) {
    s4d::cuda_fft exec;
    check(make_fft_plans(shape_of(layer.inputs(layer.size.H)), exec));
    std::size_t first = 0, second = 0;
    check(s4d::detail::spectra::cufft_status(cufftGetSize(exec.to_spectrum, &first), "cufftGetSize"));
    check(s4d::detail::spectra::cufft_status(cufftGetSize(exec.to_rows, &second), "cufftGetSize"));
    measure(layer, exec, Method::fft, truth, first + second, ceilings);
    check(destroy_fft_plans(exec));
}
#endif

template <class T>
void run(const Sizes& size, std::initializer_list<Method> methods, const Ceilings& ceilings) {
    const Layer<T> layer(size);
    const Index few = std::min<Index>(size.H, 2);
    const Case truth = bench::truth_of<s4d::Operator>({}, layer.inputs(few), layer.upstream(few));
    for (const Method method : methods) {
        if (method != Method::fft) measure(layer, interstate::cuda{}, method, truth, 0, ceilings);
#if INTERSTATE_BENCH_CUFFT
        if (method == Method::fft) measure_fft(layer, truth, ceilings);
#endif
    }
}

}  // namespace

/// `cuda_bench brief` leaves the sweeps out.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    const Ceilings c = bench::measure_ceilings();
    run<f32>({8, 16384, 512, 32}, {Method::chunked, Method::scan, Method::fft}, c);
    run<bf16>({8, 16384, 512, 32}, {Method::chunked}, c);
    run<f16>({8, 16384, 512, 32}, {Method::chunked}, c);
    run<f32>({1, 65536, 1024, 32}, {Method::chunked, Method::fft}, c);
    run<bf16>({1, 65536, 1024, 32}, {Method::chunked}, c);
    if (argc > 1 && std::strcmp(argv[1], "brief") == 0) return 0;
    // Where one method overtakes another.
    for (const Index L : {64, 256, 1024, 4096}) {
        for (const Index N : {4, 16, 32, 64, 96})
            run<f32>({8, L, 512, N}, {Method::chunked, Method::scan, Method::fft}, c);
    }
    for (const Index L : {1, 16}) run<f32>({8, L, 512, 32}, {Method::chunked, Method::scan}, c);
    run<f32>({8, 65536, 512, 32}, {Method::chunked, Method::fft}, c);
    for (const Index N : {4, 8, 16, 64, 96, 128, 192}) run<f32>({8, 16384, 512, N}, {Method::chunked, Method::fft}, c);
    run<f64>({8, 4096, 512, 32}, {Method::chunked, Method::scan, Method::fft}, c);
    for (const Index B : {1, 2, 4}) run<f32>({B, 16384, 256, 32}, {Method::chunked}, c);
    return 0;
}
