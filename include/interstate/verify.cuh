// Lets verify, run_case and tools/replay run on the cuda executor: memory on the current device.
#pragma once

#include <interstate/cuda/arch.cuh>
#include <interstate/verify.hpp>

namespace interstate::inline INTERSTATE_ABI {

template <>
struct Memory<cuda> {
    static void* allocate(std::size_t bytes) {
        void* p = nullptr;
        if (cudaMalloc(&p, bytes) != cudaSuccess) throw std::bad_alloc();
        // Scratch is handed out as garbage on purpose, the same garbage every time.
        if (cudaMemset(p, 0xff, bytes) != cudaSuccess) throw std::bad_alloc();
        // The fill runs on the default stream, which a non-blocking stream would not wait for.
        if (cudaStreamSynchronize(nullptr) != cudaSuccess) throw std::bad_alloc();
        return p;
    }
    static void release(void* p) { cudaFree(p); }
    static Status to_executor(const cuda& exec, void* destination, const void* source, std::size_t bytes) {
        INTERSTATE_RETURN_IF_ERROR(cuda_status(
            cudaMemcpyAsync(destination, source, bytes, cudaMemcpyHostToDevice, exec.stream), "copy to device"));
        return finish(exec);
    }
    static Status to_host(const cuda& exec, void* destination, const void* source, std::size_t bytes) {
        INTERSTATE_RETURN_IF_ERROR(cuda_status(
            cudaMemcpyAsync(destination, source, bytes, cudaMemcpyDeviceToHost, exec.stream), "copy to host"));
        return finish(exec);
    }
    static Status finish(const cuda& exec) {
        return cuda_status(cudaStreamSynchronize(exec.stream), "synchronise the stream");
    }
};

}  // namespace interstate::inline INTERSTATE_ABI
