// Timing on the device: medians of CUDA events, the copy ceiling of the same run, JSON lines out.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include <cuda_runtime.h>

#include <interstate/cuda/mma.cuh>

namespace interstate::bench {

inline void check(cudaError_t e, const char* what) {
    if (e == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(e));
    std::exit(1);
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
    std::vector<T> host() const {
        std::vector<T> h(size_);
        check(cudaMemcpy(h.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "copy out");
        return h;
    }

  private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

/// Median milliseconds of f() over `repeats` runs after a warm-up.
template <class F>
double milliseconds(F&& f, int repeats = 20) {
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    for (int i = 0; i < 3; ++i) f();
    std::vector<float> times;
    for (int i = 0; i < repeats; ++i) {
        check(cudaEventRecord(begin), "record");
        f();
        check(cudaEventRecord(end), "record");
        check(cudaEventSynchronize(end), "the timed work");
        float ms = 0.0f;
        check(cudaEventElapsedTime(&ms, begin, end), "elapsed");
        times.push_back(ms);
    }
    check(cudaEventDestroy(begin), "event");
    check(cudaEventDestroy(end), "event");
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
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

template <int unrolled>
__global__ void fma_peak_kernel(float* out, int iterations) {
    float x[unrolled];
    const float y = static_cast<float>(threadIdx.x) * 1e-9f;
#pragma unroll
    for (int j = 0; j < unrolled; ++j) x[j] = static_cast<float>(j);
    for (int i = 0; i < iterations; ++i)
#pragma unroll
        for (int j = 0; j < unrolled; ++j) x[j] = fmaf(x[j], y, 1.0f);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < unrolled; ++j) sum += x[j];
    if (sum == 12345.0f) *out = sum;  // keeps the work from being dropped
}

/// TFLOP/s of float32 FMAs outside the tensor cores: this run's arithmetic ceiling.
inline double fma_tflops() {
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0), "device");
    constexpr int unrolled = 8, iterations = 4096, threads = 512;
    const int blocks = device.multiProcessorCount * 4;
    DeviceArray<float> out(1);
    const double ms = milliseconds([&] { fma_peak_kernel<unrolled><<<blocks, threads>>>(out.data(), iterations); });
    check(cudaGetLastError(), "fma_peak_kernel");
    return 2.0 * blocks * threads * static_cast<double>(iterations) * unrolled / ms * 1e-9;
}

template <int chains>
__global__ void mma_peak_kernel(float* out, int iterations) {
    device::Factors<float, device::Precision::cut, 2> a;
    device::Factors<float, device::Precision::cut, 1> b;
    const auto x = static_cast<float>(threadIdx.x);
    a.set(0, 0, x, x + 1.0f);
    a.set(1, 0, x + 2.0f, x + 3.0f);
    b.set(0, 0, x, x - 1.0f);
    float c[chains][4] = {};
    for (int i = 0; i < iterations; ++i)
#pragma unroll
        for (int j = 0; j < chains; ++j) device::multiply_add(c[j], a, b);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < chains; ++j) sum += c[j][0] + c[j][1] + c[j][2] + c[j][3];
    if (sum == 12345.0f) *out = sum;  // keeps the work from being dropped
}

/// TFLOP/s of mma.sync m16n8k8 in tf32 from registers: this run's tensor-core ceiling for float.
inline double mma_tf32_tflops() {
    cudaDeviceProp device;
    check(cudaGetDeviceProperties(&device, 0), "device");
    constexpr int chains = 8, iterations = 4096, threads = 512;
    const int blocks = device.multiProcessorCount * 2;
    DeviceArray<float> out(1);
    const double ms = milliseconds([&] { mma_peak_kernel<chains><<<blocks, threads>>>(out.data(), iterations); });
    check(cudaGetLastError(), "mma_peak_kernel");
    return 2048.0 * blocks * (threads / 32) * static_cast<double>(iterations) * chains / ms * 1e-9;
}

}  // namespace interstate::bench
