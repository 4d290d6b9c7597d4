// Timing on the device: medians of CUDA events, the copy ceiling of the same run, random tensors, errors, JSON lines out.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

#include <interstate/cuda/mma.cuh>
#include <interstate/dispatch.hpp>
#include <interstate/verify.cuh>

namespace interstate::bench {

inline void check(cudaError_t e, const char* what) {
    if (e == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
    std::exit(1);
}

inline void check(const Status& s) {
    if (s.ok()) return;
    std::fprintf(stderr, "%s\n", s.message());
    std::exit(1);
}

/// Whether there is a device; says so where there is none, for main to return `skipped`.
inline constexpr int skipped = 77;
inline bool has_device() {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0) return true;
    std::printf("skipped: no device\n");
    return false;
}

/// Device memory that lives as long as the program needs it.
template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(std::size_t n) : size_(n) { check(cudaMalloc(&data_, n * sizeof(T) + 1), "cudaMalloc"); }
    explicit DeviceArray(const std::vector<T>& host) : DeviceArray(host.size()) {
        check(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "copy in");
    }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;
    ~DeviceArray() { cudaFree(data_); }
    T* data() const { return data_; }
    std::size_t size() const { return size_; }

  private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

/// The i-th number in [0, 1) of a sequence.
INTERSTATE_HD inline double random_unit(std::uint64_t i) {
    std::uint64_t z = i * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53;
}

template <class T>
__global__ void fill_kernel(T* x, Index count, std::uint64_t first, double scale, double offset) {
    const Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) x[i] = T(scale * (random_unit(first + static_cast<std::uint64_t>(i)) - 0.5) + offset);
}

/// Device memory of numbers in offset -+ scale/2; no two arrays the same.
template <class T>
class RandomArray : public DeviceArray<T> {
  public:
    RandomArray(Index count, int array, double scale = 1.0, double offset = 0.0) : DeviceArray<T>(static_cast<std::size_t>(count)) {
        if (count == 0) return;
        fill_kernel<<<static_cast<unsigned>(ceil_div(count, 256)), 256>>>(this->data(), count, static_cast<std::uint64_t>(array) << 40,
                                                                          scale, offset);
        check(cudaGetLastError(), "fill_kernel");
    }
};

/// Results of the float64 reference for the inputs of a call on the device.
template <class Op, class Inputs, class Upstream>
Case truth_of(const typename Op::Options& options, const Inputs& in, const Upstream& upstream) {
    Case inputs, truth;
    check(collect_case(cuda{}, in, &upstream, inputs));
    check(run_case<Op, double, double>(reference{}, options, inputs, truth));
    return truth;
}

/// What a call on the device has left.
template <class Inputs, class Outputs, class Grads>
Case results_of(const Inputs& in, Outputs out, Grads grads) {
    Case results;
    const cuda where;
    interstate::detail::Collect<cuda> outputs{where, "out.", results, {}}, gradients{where, "grad.", results, {}};
    visit(out, shape_of(in), outputs);
    visit(grads, shape_of(in), gradients);
    check(outputs.status);
    check(gradients.status);
    return results;
}

/// Errors of a call against the truth, and the largest; stops where one is not finite.
struct Errors {
    std::vector<TensorError> all;
    const TensorError* worst;

    Errors(const Case& got, const Case& truth) : all(compare(got, truth)), worst(&all.front()) {
        for (const TensorError& e : all) {
            if (!e.finite) check(Status::error(StatusCode::device_error, "%s is not finite", e.name.c_str()));
            if (e.relative > worst->relative) worst = &e;
        }
    }
    Errors(const Errors&) = delete;
    Errors& operator=(const Errors&) = delete;

    /// The end of a JSON line.
    void print() const {
        std::printf("\"error\":%.2e,\"error_of\":\"%s\",\"errors\":{", worst->relative, worst->name.c_str());
        for (const TensorError& e : all) std::printf("%s\"%s\":%.2e", &e == &all.front() ? "" : ",", e.name.c_str(), e.relative);
        std::printf("}}\n");
        std::fflush(stdout);
    }
};

/// Median milliseconds of f() after a warm-up: of 20 runs, or of as many, 5 at least, as fit into 300 ms.
template <class F>
double milliseconds(F&& f) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    for (int i = 0; i < 3; ++i) f();
    std::vector<float> times;
    float total = 0.0f;
    while (times.size() < 5 || (times.size() < 20 && total < 300.0f)) {
        check(cudaEventRecord(begin), "record");
        f();
        check(cudaEventRecord(end), "record");
        check(cudaEventSynchronize(end), "the timed work");
        float ms = 0.0f;
        check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
        times.push_back(ms);
        total += ms;
    }
    check(cudaEventDestroy(begin), "event");
    check(cudaEventDestroy(end), "event");
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

/// Median milliseconds of what record(exec) puts on a stream, captured in a CUDA graph.
template <class Record>
double graph_milliseconds(Record&& record) {
    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
    record(cuda{stream});
    check(cudaStreamEndCapture(stream, &graph), "capture");
    check(cudaGraphInstantiate(&executable, graph, 0), "graph");
    // Launched on the stream that the events are recorded on.
    const double ms = milliseconds([&] { check(cudaGraphLaunch(executable, nullptr), "graph"); });
    check(cudaGraphExecDestroy(executable), "graph");
    check(cudaGraphDestroy(graph), "graph");
    check(cudaStreamDestroy(stream), "stream");
    return ms;
}

/// GB/s of a large device-to-device copy, bytes read plus bytes written: this run's memory ceiling.
inline double copy_gbps() {
    const std::size_t bytes = std::size_t{1} << 30;
    DeviceArray<char> a(bytes), b(bytes);
    check(cudaMemset(a.data(), 1, bytes), "memset");
    const double ms =
        milliseconds([&] { check(cudaMemcpyAsync(b.data(), a.data(), bytes, cudaMemcpyDeviceToDevice), "copy"); });
    return 2.0 * static_cast<double>(bytes) / ms * 1e-6;
}

/// The peak kernel's operations: operands in registers, and what adds to one of several independent sums.
struct FloatFma {
    using Sum = float;
    static constexpr double flops = 2.0;  // of a thread
    float y = static_cast<float>(threadIdx.x) * 1e-9f;
    __device__ void add_to(float& x) const { x = fmaf(x, y, 1.0f); }
    __device__ static float value(float x) { return x; }
};
/// A tensor-core product of a warp (cuda/mma.cuh).
template <class A, device::Precision precision>
struct Mma {
    struct Sum {
        A c[4];
    };
    static constexpr double flops = 2.0 * 16 * 8 * device::depth<precision> / 32;
    device::Factors<A, precision, 2> a;
    device::Factors<A, precision, 1> b;
    __device__ Mma() {
        const auto x = static_cast<A>(threadIdx.x);
        for (int pair = 0; pair < device::k_pairs<precision>; ++pair) {
            a.set(0, pair, x, x + A(1));
            a.set(1, pair, x + A(2), x + A(3));
            b.set(0, pair, x, x - A(1));
        }
    }
    __device__ void add_to(Sum& sum) const { device::multiply_add(sum.c, a, b); }
    __device__ static float value(const Sum& sum) { return static_cast<float>(sum.c[0] + sum.c[1] + sum.c[2] + sum.c[3]); }
};
using Tf32Mma = Mma<float, device::Precision::cut>;
using Bf16Mma = Mma<float, device::Precision::bfloat>;
using DoubleMma = Mma<double, device::Precision::exact>;

template <class Operation, int chains>
__global__ void peak_kernel(float* out, int iterations) {
    const Operation operation;
    typename Operation::Sum sums[chains];
#pragma unroll
    for (int j = 0; j < chains; ++j) sums[j] = {static_cast<float>(j)};  // no two the same, which could be merged
    for (int i = 0; i < iterations; ++i)
#pragma unroll
        for (int j = 0; j < chains; ++j) operation.add_to(sums[j]);
    float total = 0.0f;
#pragma unroll
    for (int j = 0; j < chains; ++j) total += Operation::value(sums[j]);
    if (total == 12345.0f) *out = total;  // keeps the work from being dropped
}

/// TFLOP/s of an operation on registers alone: with FloatFma this run's arithmetic ceiling outside the tensor cores,
/// with an Mma (mma.sync) its ceiling for such products.
template <class Operation>
double peak_tflops() {
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0), "device");
    constexpr int chains = 8, iterations = 4096, threads = 512;
    const int blocks = device.multiProcessorCount * 2;
    DeviceArray<float> out(1);
    const double ms = milliseconds([&] { peak_kernel<Operation, chains><<<blocks, threads>>>(out.data(), iterations); });
    check(cudaGetLastError(), "peak_kernel");
    return Operation::flops * blocks * threads * static_cast<double>(iterations) * chains / ms * 1e-9;
}

/// The name of the device, for the first line of a benchmark.
inline const char* device_name() {
    static cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0), "device");
    return device.name;
}

/// What this run's device can do at most, printed as the first line.
struct Ceilings {
    double copy_gbps, tf32_tflops, bf16_tflops, f64_tflops;

    /// Of the products that storage T is computed with.
    template <class T>
    double tflops() const {
        return sizeof(T) == 8 ? f64_tflops : std::is_same_v<T, bf16> ? bf16_tflops : tf32_tflops;
    }
};
inline Ceilings measure_ceilings() {
    const Ceilings c{copy_gbps(), peak_tflops<Tf32Mma>(), peak_tflops<Bf16Mma>(), peak_tflops<DoubleMma>()};
    std::printf("{\"device\":\"%s\",\"copy_GBps\":%.0f,\"ffma_TFLOPs\":%.1f,\"mma_tf32_TFLOPs\":%.1f,"
                "\"mma_bf16_TFLOPs\":%.1f,\"mma_f64_TFLOPs\":%.1f}\n",
                device_name(), c.copy_gbps, peak_tflops<FloatFma>(), c.tf32_tflops, c.bf16_tflops, c.f64_tflops);
    return c;
}

}  // namespace interstate::bench
