// Device memory of random numbers, for benchmarks whose tensors hold nothing else.
#pragma once

#include <cstdint>

#include <interstate/dispatch.hpp>

#include "cuda_bench.cuh"

namespace interstate::bench {

/// The i-th number in [-1/2, 1/2) of a sequence.
INTERSTATE_HD inline double random_number(std::uint64_t i) {
    std::uint64_t z = i * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ (z >> 31)) >> 11) * 0x1.0p-53 - 0.5;
}
template <class T>
__global__ void random_kernel(T* x, Index count, std::uint64_t first, double scale, double offset) {
    const Index i = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < count) x[i] = T(scale * random_number(first + static_cast<std::uint64_t>(i)) + offset);
}

/// Numbers in offset +- scale/2; no two arrays the same.
template <class T>
class RandomArray : public DeviceArray<T> {
  public:
    RandomArray(Index count, int array, double scale = 4.0, double offset = 0.0) : DeviceArray<T>(static_cast<std::size_t>(count)) {
        if (count == 0) return;
        random_kernel<<<static_cast<unsigned>(ceil_div(count, 256)), 256>>>(this->data(), count,
                                                                            static_cast<std::uint64_t>(array) << 40, scale, offset);
        check(cudaGetLastError(), "random_kernel");
    }
};

}  // namespace interstate::bench
