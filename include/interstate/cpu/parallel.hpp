// Threads: OpenMP where the user compiles with it, one thread otherwise.
#pragma once

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <interstate/dtype.hpp>

namespace interstate::inline INTERSTATE_ABI {

/// Threads a cpu executor will use.
inline int thread_count([[maybe_unused]] int requested) {
#if defined(_OPENMP)
    return requested > 0 ? requested : omp_get_max_threads();
#else
    return 1;
#endif
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
