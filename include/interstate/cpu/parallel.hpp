// Threads: OpenMP where the user compiles with it, one thread otherwise.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <interstate/cpu/isa.hpp>
#include <interstate/dtype.hpp>

namespace interstate::inline INTERSTATE_ABI {

/// Threads a cpu executor will use. Only the answer for 0 depends on how this was compiled.
inline int thread_count(int requested) {
    if (requested > 0) return requested;
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

/// Checks an executor and settles its choices, once per call: layout, size check and loops must agree on
/// the number of threads even where units with and without OpenMP are linked into one program.
inline Status resolve(const cpu& requested, cpu& exec) {
    if (requested.threads < 0)
        return Status::error(StatusCode::invalid_argument, "cpu.threads: %d, must be positive, or 0 for OpenMP's default",
                             requested.threads);
    INTERSTATE_RETURN_IF_ERROR(simd::check_isa(requested.isa));
    exec = {.threads = thread_count(requested.threads), .isa = simd::resolve(requested.isa)};
    return {};
}

/// f(task, worker) for every task in [0, tasks); worker < thread_count(requested) indexes scratch
/// memory. Tasks must be independent and must not depend on the number of threads: that is what makes
/// results the same bits for any number.
template <class F>
void parallel_for(Index tasks, [[maybe_unused]] int requested, F&& f) {
#if defined(_OPENMP)
    const int threads = static_cast<int>(tasks < thread_count(requested) ? tasks : thread_count(requested));
    if (threads > 1) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
        for (Index t = 0; t < tasks; ++t) f(t, omp_get_thread_num());
        return;
    }
#endif
    for (Index t = 0; t < tasks; ++t) f(t, 0);
}

}  // namespace interstate::inline INTERSTATE_ABI
