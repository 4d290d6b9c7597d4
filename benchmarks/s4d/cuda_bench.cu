// S4D on the GPU: milliseconds, error against float64 on a slice, and the floors, as JSON lines.
// Floors: each input and output moved once at this run's copy speed; 16 useful FLOPs per mode and token
// at this run's float32 FMA rate.
#include <cmath>
#include <cstdint>
#include <cstdlib>

#include <s4d/reference.hpp>
#include <s4d/s4d.cuh>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::DeviceArray;

struct Parameters {
    std::vector<float> log_dt, log_neg_re, im;
    std::vector<complex<float>> B, C;
};

double random_unit(std::uint64_t& state) {
    std::uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

template <class T>
void run(Index B, Index L, Index H, Index N, double copy_gbps, double peak_tflops) {
    std::uint64_t seed = 1;
    Parameters p;
    for (Index h = 0; h < H; ++h) {
        p.log_dt.push_back(static_cast<float>(std::log(1e-3) + random_unit(seed) * std::log(100.0)));
        for (Index n = 0; n < N; ++n) {
            p.log_neg_re.push_back(static_cast<float>(std::log(0.5)));
            p.im.push_back(static_cast<float>(3.14159265358979 * static_cast<double>(n)));
            p.B.push_back({1.0f, 0.0f});
            p.C.push_back({static_cast<float>(random_unit(seed) - 0.5), static_cast<float>(random_unit(seed) - 0.5)});
        }
    }
    std::vector<T> u(static_cast<std::size_t>(B * L * H));
    for (T& x : u) x = T(random_unit(seed) - 0.5);
    const DeviceArray<float> log_dt(p.log_dt), log_neg_re(p.log_neg_re), im(p.im);
    const DeviceArray<complex<float>> dB(p.B), dC(p.C);
    const DeviceArray<T> du(u), dy(u.size());
    const auto inputs = [&](const T* uu, const float* a, const float* b, const float* c, const complex<float>* d,
                            const complex<float>* e) {
        return s4d::Inputs<T>{.u = view(uu, {B, L, H}),
                              .params = {.log_dt = view(a, {H}),
                                         .log_neg_re = view(b, {H, N}),
                                         .im = view(c, {H, N}),
                                         .B = view(d, {H, N}),
                                         .C = view(e, {H, N})}};
    };
    const auto in = inputs(du.data(), log_dt.data(), log_neg_re.data(), im.data(), dB.data(), dC.data());
    const s4d::Outputs<T> out{.y = view(dy.data(), {B, L, H})};
    const interstate::cuda exec;
    const std::size_t bytes = workspace_size(exec, s4d::Options{}, shape_of(in), pass::forward);
    const DeviceArray<char> ws(bytes);
    const auto call = [&] {
        const Status s = forward(exec, s4d::Options{}, in, out, Saved{}, Workspace{ws.data(), bytes});
        if (!s.ok()) {
            std::fprintf(stderr, "%s\n", s.message());
            std::exit(1);
        }
    };
    const double ms = bench::milliseconds(call);

    // Error against float64 on the first channels of the first row (the reference takes minutes on all).
    const Index few = H < 4 ? H : 4;
    const std::vector<T> got = dy.host();
    auto slice = inputs(u.data(), p.log_dt.data(), p.log_neg_re.data(), p.im.data(), p.B.data(), p.C.data());
    slice.u.extent[0] = 1;
    slice.u.extent[2] = few;
    auto& q = slice.params;
    q.log_dt.extent[0] = q.log_neg_re.extent[0] = q.im.extent[0] = q.B.extent[0] = q.C.extent[0] = few;
    std::vector<double> wide(static_cast<std::size_t>(L * few)), want(wide.size());
    for (Index t = 0; t < L; ++t)
        for (Index h = 0; h < few; ++h) wide[static_cast<std::size_t>(t * few + h)] = slice.u(0, t, h);
    const s4d::Inputs<double, float> truth{.u = view(static_cast<const double*>(wide.data()), {Index{1}, L, few}),
                                           .params = q};
    std::vector<char> scratch(workspace_size(reference{}, s4d::Options{}, shape_of(truth), pass::forward));
    const Status s =
        forward(reference{}, s4d::Options{}, truth, s4d::Outputs<double>{.y = view(want.data(), {Index{1}, L, few})},
                Saved{}, Workspace{scratch.data(), scratch.size()});
    if (!s.ok()) std::fprintf(stderr, "%s\n", s.message());
    double difference = 0.0, norm = 0.0;
    for (Index t = 0; t < L; ++t)
        for (Index h = 0; h < few; ++h) {
            const double w = want[static_cast<std::size_t>(t * few + h)];
            const double g = static_cast<double>(got[static_cast<std::size_t>(t * H + h)]);
            difference += (g - w) * (g - w);
            norm += w * w;
        }
    const double moved = 2.0 * static_cast<double>(u.size()) * sizeof(T);
    const double bytes_ms = moved / copy_gbps * 1e-6;
    const double flops_ms = 16.0 * static_cast<double>(B * L * H * N) / peak_tflops * 1e-9;
    std::printf("{\"op\":\"s4d\",\"kernel\":\"%s\",\"pass\":\"forward\",\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,\"H\":%lld,"
                "\"N\":%lld,\"ms\":%.4f,\"error\":%.2e,\"floor_bytes_ms\":%.4f,\"floor_flops_ms\":%.4f}\n",
                which_kernel(exec, s4d::Options{}, shape_of(in)).name, to_string(dtype_of<T>),
                static_cast<long long>(B), static_cast<long long>(L), static_cast<long long>(H),
                static_cast<long long>(N), ms, std::sqrt(difference / norm), bytes_ms, flops_ms);
}

}  // namespace

int main() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("skipped: no device\n");
        return 77;
    }
    cudaDeviceProp device;
    bench::check(cudaGetDeviceProperties(&device, 0), "device");
    const double copy = bench::copy_gbps(), peak = bench::fma_tflops();
    std::printf("{\"device\":\"%s\",\"copy_GBps\":%.0f,\"peak_f32_TFLOPs\":%.1f}\n", device.name, copy, peak);
    run<f32>(8, 4096, 512, 32, copy, peak);
    run<f32>(8, 16384, 512, 32, copy, peak);
    run<bf16>(8, 16384, 512, 32, copy, peak);
    run<f32>(1, 65536, 1024, 32, copy, peak);
    return 0;
}
