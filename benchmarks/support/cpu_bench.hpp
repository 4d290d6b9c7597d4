// What CPU benchmarks report beside a time, each measured in the same run: useful GFLOP/s, the share of
// the FMA rate of the same threads, and the error against the float64 reference.
#pragma once

#include <chrono>
#include <cmath>
#include <map>
#include <stdexcept>
#include <vector>

#include <benchmark/benchmark.h>

#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/simd.hpp>
#include <interstate/view.hpp>

namespace interstate::bench {

inline void check(const Status& s) {
    if (!s.ok()) throw std::runtime_error(s.message());
}

/// Numbers, real or complex, as float64.
template <class From, class To>
void widen(const std::vector<From>& from, std::vector<To>& to) {
    for (std::size_t i = 0; i < from.size(); ++i) {
        if constexpr (requires { from[i].re; })
            to[i] = cast<double>(from[i]);
        else
            to[i] = from[i];
    }
}

/// 16 independent chains of FMAs, in registers.
template <class A>
struct FmaChains {
    template <class Set>
    static INTERSTATE_INLINE void run(A* values, Index steps) {
        using V = simd::Native<Set, A>;
        constexpr int chains = Set::registers == 32 ? 16 : 12;
        const V a = simd::load<V>(values), b = simd::load<V>(values + V::lanes);
        V x[chains];
        INTERSTATE_UNROLL
        for (int i = 0; i < chains; ++i)
            x[i] = simd::load<V>(values + i);  // all different: equal chains would be one
        for (Index t = 0; t < steps; ++t) {
            INTERSTATE_UNROLL
            for (int i = 0; i < chains; ++i) x[i] = simd::fma(x[i], a, b);
        }
        INTERSTATE_UNROLL
        for (int i = 1; i < chains; ++i) x[0] = x[0] + x[i];
        simd::store(values, x[0]);
    }
    static Index flops(Isa isa) { return 2 * simd::lanes<A>(isa) * (isa == Isa::avx512 ? 16 : 12); }
};

/// GFLOP/s of FMAs on that many threads: the best of 20 runs, measured once in a process.
template <class A>
double fma_ceiling(int threads) {
    static std::map<int, double> known;
    double& best = known[threads];
    if (best > 0.0) return best;
    const Isa isa = simd::resolve(Isa::automatic);
    constexpr Index steps = 1 << 20;
    std::vector<A> values(static_cast<std::size_t>(threads) * 64);
    for (int repeat = 0; repeat < 20; ++repeat) {
        for (std::size_t i = 0; i < values.size(); ++i)
            values[i] = A(0.5) + A(0.001) * static_cast<A>(i % 64);
        const auto begin = std::chrono::steady_clock::now();
        parallel_for(threads, threads,
                     [&](Index t, int) { simd::run_body<FmaChains<A>>(isa, values.data() + t * 64, steps); });
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
        const double flops = static_cast<double>(FmaChains<A>::flops(isa) * steps * threads);
        best = std::max(best, flops / seconds.count() * 1e-9);
    }
    return best;
}

/// ||got - want|| / ||want||, summed up over as many tensors as are added; the worst of the tensors.
class Error {
  public:
    template <class T, class W, int Rank>
    void add(const View<T, Rank>& got, const View<W, Rank>& want) {
        double difference = 0.0, norm = 0.0;
        for (Index i = 0; i < want.size(); ++i) {
            Index rest = i, at_got = 0, at_want = 0;
            for (int a = Rank - 1; a >= 0; --a) {
                at_got += rest % want.extent[a] * got.stride[a];
                at_want += rest % want.extent[a] * want.stride[a];
                rest /= want.extent[a];
            }
            add_element(got.data[at_got], want.data[at_want], difference, norm);
        }
        const double relative = std::sqrt(difference / (norm > 0.0 ? norm : 1.0));
        worst_ = std::isnan(relative) ? relative : std::max(worst_, relative);
    }
    double worst() const { return worst_; }

  private:
    template <class T, class W>
    static void add_element(T got, W want, double& difference, double& norm) {
        const double g = static_cast<double>(got), w = static_cast<double>(want);
        difference += (g - w) * (g - w);
        norm += w * w;
    }
    template <class T, class W>
    static void add_element(complex<T> got, complex<W> want, double& difference, double& norm) {
        add_element(got.re, want.re, difference, norm);
        add_element(got.im, want.im, difference, norm);
    }
    double worst_ = 0.0;
};

/// Counters of a finished run. `flops` is what one iteration usefully does (0: not counted).
template <class A>
void report(benchmark::State& state, double flops, int threads, double error) {
    if (flops > 0.0) {
        const double giga = flops * static_cast<double>(state.iterations()) * 1e-9;
        state.counters["GFLOP/s"] = benchmark::Counter(giga, benchmark::Counter::kIsRate);
        state.counters["%FMA"] =
            benchmark::Counter(100.0 * giga / fma_ceiling<A>(threads), benchmark::Counter::kIsRate);
    }
    state.counters["error"] = error;
}

/// Milliseconds of wall time, and with --benchmark_repetitions their minimum beside mean and median. (Beside
/// a rate, the minimum is that of the rate: the slowest repetition's.)
inline void timed(benchmark::internal::Benchmark* b) {
    b->Unit(benchmark::kMillisecond)
        ->UseRealTime()
        ->ComputeStatistics(
            "min", [](const std::vector<double>& v) { return *std::min_element(v.begin(), v.end()); });
}

}  // namespace interstate::bench
