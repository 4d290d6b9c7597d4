// Scratch memory: the caller owns it, calls carve it.
#pragma once

#include <cstddef>
#include <cstdint>

#include <interstate/dtype.hpp>
#include <interstate/status.hpp>

namespace interstate::inline INTERSTATE_ABI {

/// Scratch memory for one call, reachable by its executor; its content need not survive the call.
/// `workspace_size` of each operator says how many bytes.
struct Workspace {
    void* data = nullptr;
    std::size_t size = 0;
};

/// What forward keeps for backward (checkpointed states, statistics): memory of `saved_size` bytes
/// that the caller owns, filled by forward and read by backward of the same executor. Inference
/// passes none. Forward and backward must get it at the same address, with the same executor, options
/// and shape: it is bytes, and backward cannot tell.
struct Saved {
    void* data = nullptr;
    std::size_t size = 0;
};

/// Carves aligned arrays out of a Workspace, or, started with no memory, measures how much a layout
/// needs: one function describes a layout for both uses.
class Arena {
  public:
    static constexpr std::size_t alignment = 256;

    Arena() = default;
    explicit Arena(void* memory) : base_(static_cast<std::byte*>(memory)) {
        // Room for aligning the caller's pointer is part of every measured size.
        const auto misaligned = reinterpret_cast<std::uintptr_t>(base_) % alignment;
        if (base_ && misaligned) base_ += alignment - misaligned;
    }

    /// Array of n elements, which may be 0; null only while measuring.
    template <class T>
    T* take(Index n) {
        const std::size_t at = used_;
        std::size_t bytes = 0;
        // More than memory can hold stays more: a size check then fails, whatever comes after.
        if (n < 0 || __builtin_mul_overflow(static_cast<std::size_t>(n), sizeof(T), &bytes) || bytes > limit - used_)
            used_ = limit;
        else
            used_ += (bytes + alignment - 1) / alignment * alignment;
        return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
    }

    /// Bytes a caller must provide for what was taken so far, whatever its pointer's alignment.
    std::size_t required() const { return used_ == 0 ? 0 : used_ + alignment; }

  private:
    static constexpr std::size_t limit = std::size_t{1} << 62;
    std::byte* base_ = nullptr;
    std::size_t used_ = 0;
};

inline Status check_memory(const char* name, const void* data, std::size_t size, std::size_t need) {
    if (need == 0 || (data && size >= need)) return {};
    return Status::error(StatusCode::workspace_too_small, "%s: has %zu bytes%s, must have %zu", name, size,
                         data ? "" : " at a null pointer", need);
}
inline Status check_workspace(const char* name, Workspace ws, std::size_t need) {
    return check_memory(name, ws.data, ws.size, need);
}

}  // namespace interstate::inline INTERSTATE_ABI
