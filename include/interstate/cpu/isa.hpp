// Instruction sets: which the machine has, and how a kernel body is compiled once for each.
//
// A body is a struct with a static always-inline template `run<Isa>(args...)`, written on
// cpu/simd.hpp. `run_body` inlines it into a function that carries the target attribute, so the
// user's build needs no -march and the choice is made at run time. (Lambdas and OpenMP regions lose
// target attributes; that is why a body is a named struct and never contains either.)
#pragma once

#include <interstate/executor.hpp>
#include <interstate/status.hpp>

// The widest instruction set kernels are compiled for: 0 baseline, 1 AVX2, 2 AVX-512. A build that sets
// it lower compiles faster and runs narrower; every translation unit of a program must agree.
#if !defined(__x86_64__)
#undef INTERSTATE_WIDEST_ISA
#define INTERSTATE_WIDEST_ISA 0
#elif !defined(INTERSTATE_WIDEST_ISA)
#define INTERSTATE_WIDEST_ISA 2
#endif
// Leaves AVX2 out, between the baseline and AVX-512, in a build that must compile fast and still run both; as above, in every unit.
#if !defined(INTERSTATE_LEAVE_OUT_AVX2)
#define INTERSTATE_LEAVE_OUT_AVX2 0
#endif

namespace interstate::inline INTERSTATE_ABI {
namespace simd {

/// What a body is told about the instruction set it is compiled for.
struct Baseline {
    static constexpr Isa isa = Isa::baseline;
    static constexpr int bytes = 16;      // of a vector register
    static constexpr int registers = 16;  // how many there are
};
struct Avx2 {
    static constexpr Isa isa = Isa::avx2;
    static constexpr int bytes = 32;
    static constexpr int registers = 16;
};
struct Avx512 {
    static constexpr Isa isa = Isa::avx512;
    static constexpr int bytes = 64;
    static constexpr int registers = 32;
};

#if defined(__x86_64__)
#define INTERSTATE_TARGET_AVX2 __attribute__((target("avx2,fma")))
#define INTERSTATE_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))

inline bool machine_has(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return INTERSTATE_WIDEST_ISA >= 2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                   __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                   __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
        case Isa::avx2:
            return INTERSTATE_WIDEST_ISA >= 1 && !INTERSTATE_LEAVE_OUT_AVX2 && __builtin_cpu_supports("avx2") &&
                   __builtin_cpu_supports("fma");
        default: return true;
    }
}
#else
#define INTERSTATE_TARGET_AVX2
#define INTERSTATE_TARGET_AVX512
inline bool machine_has(Isa isa) { return isa == Isa::baseline || isa == Isa::automatic; }
#endif

/// The instruction set a call will use: the requested one, or the best the machine has.
inline Isa resolve(Isa requested) {
    if (requested != Isa::automatic) return requested;
    if (machine_has(Isa::avx512)) return Isa::avx512;
    if (machine_has(Isa::avx2)) return Isa::avx2;
    return Isa::baseline;
}

inline Status check_isa(Isa requested) {
    if (machine_has(requested)) return {};
    return Status::error(StatusCode::unsupported, "cpu.isa: %s, must be one that this machine and build have (best: %s)",
                         to_string(requested), to_string(resolve(Isa::automatic)));
}

namespace detail {
template <class Body, class... Args>
void run_baseline(Args... args) {
    Body::template run<Baseline>(args...);
}
template <class Body, class... Args>
INTERSTATE_TARGET_AVX2 void run_avx2(Args... args) {
    Body::template run<Avx2>(args...);
}
template <class Body, class... Args>
INTERSTATE_TARGET_AVX512 void run_avx512(Args... args) {
    Body::template run<Avx512>(args...);
}
}  // namespace detail

/// Runs Body::run for a resolved instruction set. Arguments go by value: pointers, sizes, views.
template <class Body, class... Args>
void run_body(Isa isa, Args... args) {
    switch (isa) {
#if INTERSTATE_WIDEST_ISA >= 2
        case Isa::avx512: return detail::run_avx512<Body>(args...);
#endif
#if INTERSTATE_WIDEST_ISA >= 1 && !INTERSTATE_LEAVE_OUT_AVX2
        case Isa::avx2: return detail::run_avx2<Body>(args...);
#endif
        default: return detail::run_baseline<Body>(args...);
    }
}

/// Lanes of a vector of T for a resolved instruction set.
template <class T>
constexpr int lanes(Isa isa) {
    const int bytes = isa == Isa::avx512 ? Avx512::bytes : isa == Isa::avx2 ? Avx2::bytes : Baseline::bytes;
    return bytes / static_cast<int>(sizeof(T));
}

}  // namespace simd
}  // namespace interstate::inline INTERSTATE_ABI
