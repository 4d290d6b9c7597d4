// The memory ceiling of a run, for operators that move more than they compute.
#pragma once

#include <chrono>
#include <cstring>
#include <map>

#include "cpu_bench.hpp"

namespace interstate::bench {

/// GB/s of a copy of 64 MiB a thread, bytes read plus bytes written: the best of 10, measured once in a process.
inline double copy_ceiling(int threads) {
    static std::map<int, double> known;
    double& best = known[threads];
    if (best > 0.0) return best;
    constexpr std::size_t bytes = std::size_t{1} << 26;
    std::vector<char> from(bytes * static_cast<std::size_t>(threads), 1), to(from.size());
    for (int repeat = 0; repeat < 10; ++repeat) {
        const auto begin = std::chrono::steady_clock::now();
        parallel_for(threads, threads, [&](Index t, int) {
            std::memcpy(to.data() + static_cast<std::size_t>(t) * bytes, from.data() + static_cast<std::size_t>(t) * bytes, bytes);
        });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        best = std::max(best, 2.0 * static_cast<double>(from.size()) / seconds.count() * 1e-9);
    }
    return best;
}

/// Counters of a finished run that has to move `bytes` an iteration: each input and output once.
inline void report_bytes(benchmark::State& state, double bytes, int threads, double error) {
    const double giga = bytes * static_cast<double>(state.iterations()) * 1e-9;
    state.counters["GB/s"] = benchmark::Counter(giga, benchmark::Counter::kIsRate);
    state.counters["%copy"] = benchmark::Counter(100.0 * giga / copy_ceiling(threads), benchmark::Counter::kIsRate);
    state.counters["error"] = error;
}

}  // namespace interstate::bench
