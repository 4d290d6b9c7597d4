// The decomposition on the GPU: milliseconds of whole calls with all outputs, and of norms alone, beside floors of this run,
// and errors against float64, as JSON lines.
//
// Floors: the operations of a head (eq. 6: 2 L n^2 - 2 n^3 / 3 of the triangle T, n d^2 of the product, 4 n^3 / 3 of each
// tridiagonal matrix, n = 2d; three a step of the recurrence in float64, 36 or 55 halvings for 3 n / 2 values) at this run's
// rates outside the tensor cores, and each input moved once at its copy speed. The errors are those of a call on two heads:
// every output, relative in the 2-norm, and the largest of them.
#include <cstring>

#include <sd_decomposition/reference.hpp>
#include <sd_decomposition/sd_decomposition.cuh>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;
using sd_decomposition::Options;

struct DoubleFma {
    using Sum = double;
    static constexpr double flops = 2.0;  // of a thread
    double y = static_cast<double>(threadIdx.x) * 1e-9;
    __device__ void add_to(double& x) const { x = fma(x, y, 1.0); }
    __device__ static float value(double x) { return static_cast<float>(x); }
};

struct Ceilings {
    double copy_gbps, float_tflops, double_tflops;
};

struct Sizes {
    Index B, L, H, d;
    Index values() const { return std::min(L, 2 * d); }
};

template <class T>
struct Heads {
    using A = acc_t<T>;
    Sizes size;
    RandomArray<T> q, k;
    DeviceArray<A> measures, spectra;

    explicit Heads(const Sizes& s)
        : size(s), q(s.B * s.L * s.H * s.d, 1, 3.4), k(s.B * s.L * s.H * s.d, 2, 3.4), measures(static_cast<std::size_t>(10 * s.B * s.H)),
          spectra(static_cast<std::size_t>(2 * s.B * s.H * s.values())) {}
    /// The first heads of the first batch rows.
    sd_decomposition::Inputs<T> inputs(Index batch, Index heads) const {
        const auto rows = [&](const RandomArray<T>& x) {
            return view(static_cast<const T*>(x.data()), {batch, size.L, heads, size.d},
                        {size.L * size.H * size.d, size.H * size.d, size.d, Index{1}});
        };
        return {.Q = rows(q), .K = rows(k)};
    }
    sd_decomposition::Outputs<T> outputs(Index batch, Index heads, bool norms_alone) const {
        const auto measure = [&](Index i) { return view(measures.data() + i * size.B * size.H, {batch, heads}); };
        const auto spectrum = [&](Index i) { return view(spectra.data() + i * size.B * size.H * size.values(), {batch, heads, size.values()}); };
        sd_decomposition::Outputs<T> out{.routing_energy = measure(0), .norm = measure(1), .routing_norm = measure(2), .filtering_norm = measure(3)};
        if (norms_alone) return out;
        out.routing_singular_values = spectrum(0), out.filtering_singular_values = spectrum(1);
        out.routing_effective_rank = measure(4), out.filtering_effective_rank = measure(5);
        out.routing_participation_ratio = measure(6), out.filtering_participation_ratio = measure(7);
        out.routing_stable_rank = measure(8), out.filtering_stable_rank = measure(9);
        return out;
    }
};

template <class T>
void run(const Sizes& size, const Ceilings& c) {
    const Heads<T> heads(size);
    const interstate::cuda exec;
    const Options options{};
    const auto [B, L, H, d] = size;
    const auto in = heads.inputs(B, H);
    const auto shape = shape_of(in);
    const DeviceArray<char> memory(workspace_size(exec, options, shape, pass::forward));
    const Workspace ws{memory.data(), memory.size()};
    const auto forwards = [&](Index batch, Index count, bool norms_alone) {
        check(forward(exec, options, heads.inputs(batch, count), heads.outputs(batch, count, norms_alone), Saved{}, ws));
    };
    const sd_decomposition::Upstream<T> none{};
    const auto few = heads.inputs(1, std::min<Index>(H, 2));
    forwards(1, few.Q.extent[2], false);
    const bench::Errors errors(bench::results_of(few, heads.outputs(1, few.Q.extent[2], false), none),
                               bench::truth_of<sd_decomposition::Operator>(options, few, none));
    const double forward_ms = bench::milliseconds([&] { forwards(B, H, false); });
    const double norms_ms = bench::milliseconds([&] { forwards(B, H, true); });

    const auto count = static_cast<double>(B * H), l = static_cast<double>(L), n = static_cast<double>(size.values()), dim = static_cast<double>(d);
    const double triangle = L > 2 * d ? 2.0 * l * n * n - 2.0 / 3.0 * n * n * n : 0.0;
    const double product = L > 2 * d ? n * dim * dim : 2.0 * n * n * dim;
    const double halvings = sizeof(T) == 8 ? 55.0 : 36.0, searches = 1.5 * n * halvings * 3.0 * n;
    const double arithmetic_ms = count * ((triangle + product + 8.0 / 3.0 * n * n * n) / (sizeof(T) == 8 ? c.double_tflops : c.float_tflops) +
                                          searches / c.double_tflops) * 1e-9;
    const double bytes_ms = 2.0 * count * l * dim * sizeof(T) / c.copy_gbps * 1e-6;
    std::printf("{\"op\":\"sd_decomposition\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"heads\":%lld,\"L\":%lld,\"d\":%lld,\"forward_ms\":%.4f,"
                "\"norms_ms\":%.4f,\"floor_arithmetic_ms\":%.4f,\"floor_bytes_ms\":%.4f,\"workspace_MiB\":%.0f,",
                which_kernel(exec, options, shape).name, to_string(dtype_of<T>), static_cast<long long>(B * H), static_cast<long long>(L),
                static_cast<long long>(d), forward_ms, norms_ms, arithmetic_ms, bytes_ms, static_cast<double>(memory.size()) / 1048576.0);
    errors.print();
}

}  // namespace

/// `cuda_bench brief` leaves the sweeps out.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    const Ceilings c{bench::copy_gbps(), bench::peak_tflops<bench::FloatFma>(), bench::peak_tflops<DoubleFma>()};
    std::printf("{\"device\":\"%s\",\"copy_GBps\":%.0f,\"ffma_TFLOPs\":%.1f,\"dfma_TFLOPs\":%.1f}\n", bench::device_name(), c.copy_gbps,
                c.float_tflops, c.double_tflops);
    run<f32>({148, 512, 12, 64}, c);
    run<bf16>({148, 512, 12, 64}, c);
    run<f64>({148, 512, 12, 64}, c);
    if (argc > 1 && std::strcmp(argv[1], "brief") == 0) return 0;
    run<f16>({148, 512, 12, 64}, c);
    for (const Index L : {128, 2048}) run<f32>({37, L, 12, 64}, c);
    for (const Index d : {32, 128}) run<f32>({37, 512, 12, d}, c);
    run<f32>({1, 4096, 32, 128}, c);
    return 0;
}
