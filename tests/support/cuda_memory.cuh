// Vectors of the host and their copies on the device.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "cuda_main.cuh"

namespace interstate::test {

/// Where the elements of a vector are on the device: copied there when first asked for. Vectors must not move.
class OnDevice {
  public:
    explicit OnDevice(Checks& checks) : checks_(checks) {}
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;
    ~OnDevice() {
        for (const auto& [host, device] : copies_) cudaFree(device);
        for (void* p : scratch_) cudaFree(p);
    }
    template <class E>
    E* operator()(std::vector<E>& x) {
        void*& p = copies_[&x];
        if (!p) {
            p = allocate(x.size() * sizeof(E) + 16);
            refill(x);
        }
        return static_cast<E*>(p);
    }
    /// Copies the vector over what the device has of it.
    template <class E>
    void refill(const std::vector<E>& x) {
        expect(cudaMemcpy(copies_.at(&x), x.data(), x.size() * sizeof(E), cudaMemcpyHostToDevice));
    }
    /// A vector that was never asked for stays as it is.
    template <class E>
    void bring_back(std::vector<E>& x) {
        if (const auto found = copies_.find(&x); found != copies_.end())
            expect(cudaMemcpy(x.data(), found->second, x.size() * sizeof(E), cudaMemcpyDeviceToHost));
    }
    /// Memory full of junk, on an odd alignment.
    Workspace workspace(std::size_t bytes) {
        scratch_.push_back(allocate(bytes + 8));
        return {bytes ? static_cast<std::byte*>(scratch_.back()) + 8 : nullptr, bytes};
    }

  private:
    void* allocate(std::size_t bytes) {
        void* p = nullptr;
        expect(cudaMalloc(&p, bytes));
        expect(cudaMemset(p, 0xff, bytes));
        return p;
    }
    void expect(cudaError_t e) { checks_.expect(e == cudaSuccess, "memory", cudaGetErrorString(e)); }

    Checks& checks_;
    std::unordered_map<const void*, void*> copies_;
    std::vector<void*> scratch_;
};

}  // namespace interstate::test
