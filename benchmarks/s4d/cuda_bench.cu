// S4D on the GPU: milliseconds of forward and of forward and backward, bytes of memory, error against float64
// on a slice of channels, and the floors, as JSON lines.
//
// Floors: bytes, each input, output and gradient moved once at this run's copy speed; products, what the
// chunked form needs at this run's tensor-core rate (docs/ops/s4d.md, "What it costs").
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <s4d/reference.hpp>
#include <s4d/s4d.cuh>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::DeviceArray;

double random_unit(std::uint64_t& state) {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

void check(const Status& s) {
    if (s.ok()) return;
    std::fprintf(stderr, "%s\n", s.message());
    std::exit(1);
}

struct Ceilings {
    double copy_gbps, mma_tflops;
};

struct Run {
    Index B, L, H, N;
    s4d::Method method = s4d::Method::automatic;
    bool backward = true;
};

/// Parameters of the published initialisation and their gradients.
struct Parameters {
    std::vector<float> log_dt, log_neg_re, im, D;
    std::vector<complex<float>> B, C;

    Parameters(Index H, Index N, std::uint64_t& seed) {
        for (Index h = 0; h < H; ++h) {
            log_dt.push_back(static_cast<float>(std::log(1e-3) + random_unit(seed) * std::log(100.0)));
            D.push_back(1.0f);
            for (Index n = 0; n < N; ++n) {
                log_neg_re.push_back(static_cast<float>(std::log(0.5)));
                im.push_back(static_cast<float>(3.14159265358979 * static_cast<double>(n)));
                B.push_back({1.0f, 0.0f});
                C.push_back({static_cast<float>(random_unit(seed) - 0.5), static_cast<float>(random_unit(seed) - 0.5)});
            }
        }
    }
    s4d::Params<float> views(Index H, Index N) const {
        return {view(log_dt.data(), {H}), view(log_neg_re.data(), {H, N}), view(im.data(), {H, N}),
                view(B.data(), {H, N}),   view(C.data(), {H, N}),          view(D.data(), {H})};
    }
};
struct DeviceParameters {
    DeviceArray<float> log_dt, log_neg_re, im, D;
    DeviceArray<complex<float>> B, C;
    explicit DeviceParameters(const Parameters& p)
        : log_dt(p.log_dt), log_neg_re(p.log_neg_re), im(p.im), D(p.D), B(p.B), C(p.C) {}
    s4d::BasicParams<float, complex<float>> views(Index H, Index N) const {
        return {view(log_dt.data(), {H}), view(log_neg_re.data(), {H, N}), view(im.data(), {H, N}),
                view(B.data(), {H, N}),   view(C.data(), {H, N}),          view(D.data(), {H})};
    }
    s4d::Params<float> inputs(Index H, Index N) const {
        const auto p = views(H, N);
        return {p.log_dt, p.log_neg_re, p.im, p.B, p.C, p.D};
    }
};

/// Relative error in the 2-norm.
class Error {
  public:
    void add(double got, double want) {
        difference_ += (got - want) * (got - want);
        norm_ += want * want;
    }
    double value() const { return std::sqrt(difference_ / norm_); }

  private:
    double difference_ = 0.0, norm_ = 0.0;
};

/// Runs the float64 reference on the first channels and compares y, du and the parameters' gradients.
template <class T>
void compare(const Run& r, const Parameters& p, const std::vector<T>& u, const std::vector<T>& dy,
             const std::vector<T>& y, const std::vector<T>* du, const DeviceParameters* grads, double (&error)[3]) {
    const Index few = r.H < 2 ? r.H : 2, B = du ? r.B : 1;
    const std::size_t size = static_cast<std::size_t>(B * r.L * few);
    std::vector<double> wide(size), wide_dy(size), want(size), want_du(size);
    for (Index t = 0; t < B * r.L; ++t)
        for (Index h = 0; h < few; ++h) {
            wide[static_cast<std::size_t>(t * few + h)] = u[static_cast<std::size_t>(t * r.H + h)];
            wide_dy[static_cast<std::size_t>(t * few + h)] = dy[static_cast<std::size_t>(t * r.H + h)];
        }
    auto params = p.views(few, r.N);
    const s4d::Inputs<double, float> in{.u = view(static_cast<const double*>(wide.data()), {B, r.L, few}), .params = params};
    std::vector<char> scratch(workspace_size(reference{}, s4d::Options{}, shape_of(in), pass::backward));
    const Workspace ws{scratch.data(), scratch.size()};
    const s4d::Outputs<double> out{.y = view(want.data(), {B, r.L, few})};
    check(forward(reference{}, s4d::Options{}, in, out, Saved{}, ws));
    Error e_y, e_du, e_p;
    for (Index t = 0; t < B * r.L; ++t)
        for (Index h = 0; h < few; ++h)
            e_y.add(static_cast<double>(y[static_cast<std::size_t>(t * r.H + h)]),
                    want[static_cast<std::size_t>(t * few + h)]);
    error[0] = e_y.value();
    if (!du) return;
    Parameters g = p;
    const s4d::Grads<double, float> to{.u = view(want_du.data(), {B, r.L, few}),
                                       .params = {view(g.log_dt.data(), {few}), view(g.log_neg_re.data(), {few, r.N}),
                                                  view(g.im.data(), {few, r.N}), view(g.B.data(), {few, r.N}),
                                                  view(g.C.data(), {few, r.N}), view(g.D.data(), {few})}};
    check(backward(reference{}, s4d::Options{}, in, out, Saved{}, {.y = view(static_cast<const double*>(wide_dy.data()), {B, r.L, few})},
                   to, ws));
    for (Index t = 0; t < B * r.L; ++t)
        for (Index h = 0; h < few; ++h)
            e_du.add(static_cast<double>((*du)[static_cast<std::size_t>(t * r.H + h)]),
                     want_du[static_cast<std::size_t>(t * few + h)]);
    const auto im = grads->im.host();
    const auto C = grads->C.host();
    for (Index i = 0; i < few * r.N; ++i) {
        const auto at = static_cast<std::size_t>(i);
        e_p.add(im[at], g.im[at]);
        e_p.add(C[at].re, g.C[at].re);
        e_p.add(C[at].im, g.C[at].im);
    }
    error[1] = e_du.value();
    error[2] = e_p.value();
}

template <class T>
void run(const Run& r, const Ceilings& ceilings) {
    std::uint64_t seed = 1;
    const auto [B, L, H, N, method, backward_too] = r;
    const Parameters p(H, N, seed);
    std::vector<T> u(static_cast<std::size_t>(B * L * H)), dy(u.size());
    for (T& x : u) x = T(random_unit(seed) - 0.5);
    for (T& x : dy) x = T(random_unit(seed) - 0.5);
    const DeviceParameters params(p), grads(p);
    const DeviceArray<T> d_u(u), d_y(u.size()), d_dy(dy), d_du(u.size());
    const s4d::Inputs<T, float> in{.u = view(static_cast<const T*>(d_u.data()), {B, L, H}), .params = params.inputs(H, N)};
    const s4d::Outputs<T> out{.y = view(d_y.data(), {B, L, H})};
    const s4d::Upstream<T> upstream{.y = view(static_cast<const T*>(d_dy.data()), {B, L, H})};
    const s4d::Grads<T, float> to{.u = view(d_du.data(), {B, L, H}), .params = grads.views(H, N)};
    const interstate::cuda exec;
    const s4d::Options options{.method = method};
    const s4d::Shape shape = shape_of(in);
    const std::size_t forward_bytes = workspace_size(exec, options, shape, pass::forward);
    const std::size_t backward_bytes = backward_too ? workspace_size(exec, options, shape, pass::backward) : 0;
    const std::size_t saved_bytes = backward_too ? saved_size(exec, options, shape) : 0;
    const DeviceArray<char> memory(std::max(forward_bytes, backward_bytes)), kept(saved_bytes);
    const Workspace ws{memory.data(), std::max(forward_bytes, backward_bytes)};
    const Saved saved{kept.data(), saved_bytes};

    const double forward_ms = bench::milliseconds([&] { check(forward(exec, options, in, out, Saved{}, ws)); });
    double both_ms = 0.0, error[3] = {};
    if (backward_too)
        both_ms = bench::milliseconds([&] {
            check(forward(exec, options, in, out, saved, ws));
            check(backward(exec, options, in, out, saved, upstream, to, ws));
        });
    const std::vector<T> y = d_y.host(), du = d_du.host();
    compare<T>(r, p, u, dy, y, backward_too ? &du : nullptr, &grads, error);

    const double tensor = static_cast<double>(u.size()) * sizeof(T), tokens = static_cast<double>(u.size());
    const double products = sizeof(T) == 2 ? 1.0 : 3.0, n = static_cast<double>(N);
    const auto bytes_ms = [&](double tensors) { return tensors * tensor / ceilings.copy_gbps * 1e-6; };
    const auto product_ms = [&](double macs) { return 2.0 * macs * tokens * products / ceilings.mma_tflops * 1e-9; };
    std::printf("{\"op\":\"s4d\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,\"H\":%lld,\"N\":%lld,"
                "\"forward_ms\":%.4f,\"error_y\":%.2e,\"floor_bytes_ms\":%.4f,\"floor_products_ms\":%.4f",
                which_kernel(exec, options, shape).name, to_string(dtype_of<T>), static_cast<long long>(B),
                static_cast<long long>(L), static_cast<long long>(H), static_cast<long long>(N), forward_ms, error[0],
                bytes_ms(2), product_ms(4 * n + 8));
    if (backward_too)
        std::printf(",\"both_ms\":%.4f,\"error_du\":%.2e,\"error_params\":%.2e,\"both_floor_bytes_ms\":%.4f,"
                    "\"both_floor_products_ms\":%.4f,\"memory_ratio\":%.3f",
                    both_ms, error[1], error[2], bytes_ms(5), product_ms(12 * n + 24),
                    (4.0 * tensor + static_cast<double>(ws.size + saved_bytes)) / (4.0 * tensor));
    std::printf("}\n");
    std::fflush(stdout);
}

}  // namespace

/// `cuda_bench brief` leaves the sweeps out.
int main(int argc, char** argv) {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("skipped: no device\n");
        return 77;
    }
    cudaDeviceProp device;
    bench::check(cudaGetDeviceProperties(&device, 0), "device");
    const Ceilings c{bench::copy_gbps(), bench::peak_tflops<bench::Tf32Mma>()};
    std::printf("{\"device\":\"%s\",\"copy_GBps\":%.0f,\"ffma_TFLOPs\":%.1f,\"mma_tf32_TFLOPs\":%.1f}\n", device.name,
                c.copy_gbps, bench::peak_tflops<bench::FloatFma>(), c.mma_tflops);
    run<f32>({8, 16384, 512, 32}, c);
    run<bf16>({8, 16384, 512, 32}, c);
    run<f16>({8, 16384, 512, 32}, c);
    run<f32>({1, 65536, 1024, 32}, c);
    run<bf16>({1, 65536, 1024, 32}, c);
    run<f32>({8, 16384, 512, 32, s4d::Method::scan}, c);
    if (argc > 1 && std::strcmp(argv[1], "brief") == 0) return 0;
    for (const Index L : {256, 1024, 4096, 65536}) run<f32>({8, L, 512, 32}, c);
    for (const Index N : {4, 8, 16, 64, 96}) run<f32>({8, 16384, 512, N}, c);
    for (const s4d::Method method : {s4d::Method::chunked, s4d::Method::scan}) {
        run<f64>({8, 4096, 512, 32, method}, c);
        for (const Index L : {1, 16, 64}) run<f32>({8, L, 512, 32, method}, c);
    }
    for (const Index B : {1, 2, 4}) run<f32>({B, 16384, 256, 32}, c);
    return 0;
}
