// Executors: where and how a call runs. Every operator takes one as its first argument.
#pragma once

#include <cstdint>

#include <interstate/config.hpp>

struct CUstream_st;  // the CUDA runtime's stream, so that `cuda` needs no toolkit header

namespace interstate::inline INTERSTATE_ABI {

/// Plain loops in float64 that read like the page of equations: the truth the others are held to.
struct reference {};

/// Instruction sets a CPU kernel is built for; the best one the machine has is chosen at run time.
enum class Isa : std::uint8_t { automatic, baseline, avx2, avx512 };

constexpr const char* to_string(Isa isa) {
    switch (isa) {
        case Isa::automatic: return "automatic";
        case Isa::baseline: return "baseline";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
    }
    return "?";
}

/// Threads and vectors of the host. threads = 0 takes OpenMP's default; results are the same bits
/// for any number. An `isa` the machine lacks is an error, never replaced silently.
struct cpu {
    int threads = 0;
    Isa isa = Isa::automatic;
};

/// One NVIDIA GPU, asynchronously on a stream. `flags` (device memory, optional) is where kernels report what only they
/// can see, each in a bit of its own (below) that is set and never cleared.
struct cuda {
    CUstream_st* stream = nullptr;
    std::uint32_t* flags = nullptr;
};

inline constexpr std::uint32_t flag_bad_cu_seqlens = 1u;   // cu_seqlens decreases or leaves its range
inline constexpr std::uint32_t flag_bad_lengths = 2u;      // lengths of a cache: negative, or without room for the new tokens
inline constexpr std::uint32_t flag_bad_block_table = 4u;  // a page that is read or written is none of the cache's

/// Which pass a workspace is for.
enum class pass : std::uint8_t { forward, backward, step };

/// The kernel that a call will run, and why that one.
struct KernelChoice {
    const char* name;
    const char* reason;
};

}  // namespace interstate::inline INTERSTATE_ABI
