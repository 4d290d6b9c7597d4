// The frame of every cuda_test.cu: find a device or say why not, run, count, exit code.
#pragma once

#include <cstdio>
#include <cstring>

#include <interstate/cuda/arch.cuh>
#include <interstate/executor.hpp>

namespace interstate::test {

class Checks {
  public:
    void expect(bool good, const char* what, const char* detail) {
        good ? ++passed_ : ++failed_;
        if (!good) std::printf("FAILED  %s: %s\n", what, detail);
    }
    int passed() const { return passed_; }
    int failed() const { return failed_; }

  private:
    int passed_ = 0, failed_ = 0;
};

/// What run(flags) -> Status leaves in an executor's flags.
template <class Run>
std::uint32_t flags_after(Checks& checks, const char* what, Run&& run) {
    std::uint32_t* flags = nullptr;
    std::uint32_t seen = 0;
    checks.expect(cudaMalloc(&flags, sizeof *flags) == cudaSuccess, what, "cudaMalloc");
    checks.expect(cudaMemset(flags, 0, sizeof *flags) == cudaSuccess, what, "cudaMemset");
    const Status status = run(flags);
    checks.expect(status.ok(), what, status.message());
    checks.expect(cudaMemcpy(&seen, flags, sizeof seen, cudaMemcpyDeviceToHost) == cudaSuccess, what, "copy");
    cudaFree(flags);
    return seen;
}

/// Exit codes: 0 passed, 1 failed, 77 skipped because no CUDA device can be used.
inline int cuda_main(int argc, char** argv, const char* name, void (*run)(Checks&, bool quick)) {
    std::setvbuf(stdout, nullptr, _IOLBF, 0);  // what a test that is cut off has found is still seen
    const bool quick = argc > 1 && std::strcmp(argv[1], "--quick") == 0;
    int devices = 0;
    const cudaError_t found = cudaGetDeviceCount(&devices);
    if (found != cudaSuccess || devices == 0) {
        std::printf("skipped: no device (%s)\n", cudaGetErrorString(found));
        return 77;
    }
    cudaDeviceProp device;
    if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) return 1;
    Checks checks;
    run(checks, quick);
    const cudaError_t last = cudaDeviceSynchronize();
    checks.expect(last == cudaSuccess, "device", cudaGetErrorString(last));
    std::printf("%s on %s: %d checks passed, %d failed\n", name, device.name, checks.passed(), checks.failed());
    return checks.failed() == 0 && checks.passed() > 0 ? 0 : 1;
}

}  // namespace interstate::test
