// S4D on the GPU as a scan: one block runs one channel of one recurrence through time. Any number of modes, and
// the method of float64.
//
// A tile is 1,024 tokens, 8 consecutive ones a thread. For every mode a thread runs its tokens from a zero
// state, a CUB block scan with the complex affine operator (a2 a1, a2 b1 + b2) turns the ends into the state
// that enters each thread, and the thread runs its tokens again from there. The scan and the carry between tiles
// are float64, so that powers of A do not drift (docs/ops/s4d.md, "Phase"); inside 8 tokens the accumulator
// dtype is exact enough.
#pragma once

#include <algorithm>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/launch.cuh>
#include <interstate/workspace.hpp>
#include <s4d/detail/cuda_system.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

inline constexpr int scan_threads = 128;
inline constexpr int scan_items = 8;
inline constexpr int scan_tile = scan_threads * scan_items;

/// x -> a x + b.
struct Affine {
    c64 a, b;
};
struct ComposeAffine {
    __device__ Affine operator()(const Affine& first, const Affine& second) const {
        return {second.a * first.a, second.a * first.b + second.b};
    }
};

/// A mode as a thread uses it.
template <class A>
struct ScanMode {
    c64 over_items, A1;  // A^scan_items, A
    complex<A> a, beta, gamma;
};

inline namespace INTERSTATE_KERNELS {

/// One block a channel: its modes in both roles, and K0.
template <class A, class P>
__global__ void __launch_bounds__(scan_threads)
    scan_modes_kernel(Discretization disc, Params<P> p, Half half, Index N, SystemMode* modes, ScanMode<A>* system,
                      A* K0, ScanMode<A>* exchanged, A* K0_exchanged) {
    const Index h = blockIdx.x;
    double sum = 0.0;
    for (Index n = threadIdx.x; n < N; n += scan_threads) {
        const SystemMode m = system_mode(disc, p, half, h, n, sum);
        c64 power = m.A;
        static_assert((scan_items & (scan_items - 1)) == 0);
        for (int i = 1; i < scan_items; i *= 2) power = power * power;
        const Index at = h * N + n;
        modes[at] = m;
        system[at] = {power, m.A, cast<A>(m.A), cast<A>(m.beta), cast<A>(m.gamma)};
        if (exchanged) exchanged[at] = {power, m.A, cast<A>(m.A), cast<A>(m.gamma), cast<A>(m.beta)};
    }
    using Reduce = cub::BlockReduce<double, scan_threads>;
    __shared__ typename Reduce::TempStorage storage;
    sum = Reduce(storage).Sum(sum);
    if (threadIdx.x != 0) return;
    if (half == Half::causal && p.D) sum += static_cast<double>(p.D(h));
    K0[h] = static_cast<A>(sum);
    if (exchanged) K0_exchanged[h] = static_cast<A>(sum);
}

/// What a thread's first `valid` tokens do to a state that enters with `run` being their response from zero:
/// tokens beyond a tile's end leave it as it is.
template <class A>
__device__ Affine affine_of(const ScanMode<A>& m, int valid, complex<A> run) {
    c64 a = m.over_items;
    if (valid < scan_items) {
        a = {1.0, 0.0};
        for (int j = 0; j < valid; ++j) a = a * m.A1;
    }
    return {a, cast<double>(run)};
}

/// Tokens of a thread in the order of processing.
template <class A, class T>
__device__ void load_items(A (&x)[scan_items], const View<const T, 3>& from, Index batch, Index row, int direction,
                           int valid, Index h) {
#pragma unroll
    for (int j = 0; j < scan_items; ++j)
        x[j] = j < valid ? device::load_as<A>(from(batch, row + direction * j, h)) : A(0);
}

/// Where a thread is in a tile of `count` tokens that starts at row `begin`.
struct ScanPlace {
    int valid, direction;
    Index row;
    __device__ ScanPlace(Index begin, int count, bool backwards) : direction(backwards ? -1 : 1) {
        const int first = static_cast<int>(threadIdx.x) * scan_items;
        valid = count - first < 0 ? 0 : count - first < scan_items ? count - first : scan_items;
        row = backwards ? begin + count - 1 - first : begin + first;
    }
};

template <class T>
__global__ void __launch_bounds__(scan_threads)
    scan_system_kernel(SystemRun<T> run, const ScanMode<acc_t<T>>* modes, const acc_t<T>* K0, c64* carry) {
    using A = acc_t<T>;
    using Scan = cub::BlockScan<Affine, scan_threads>;
    __shared__ typename Scan::TempStorage scan_storage;

    const Index H = run.shape.channels, N = run.shape.modes;
    const Index h = static_cast<Index>(blockIdx.x) % H, i = static_cast<Index>(blockIdx.x) / H;
    const RowRange rows = device::checked_rows(run.cu, i, run.shape.length);
    const Index b = run.cu ? 0 : i;
    modes += h * N;
    carry += (i * H + h) * N;

    for (Index n = threadIdx.x; n < N; n += scan_threads) {
        carry[n] = run.initial ? cast<double>(run.initial(i, h, n)) : c64{0.0, 0.0};
        if (run.conjugate) carry[n] = conj(carry[n]);
    }
    __syncthreads();

    const Index tiles = ceil_div(rows.end - rows.begin, scan_tile);
    for (Index step = 0; step < tiles; ++step) {
        const Index k = run.backwards ? tiles - 1 - step : step, begin = rows.begin + k * scan_tile;
        const int count = static_cast<int>(rows.end - begin < scan_tile ? rows.end - begin : scan_tile);
        const ScanPlace place(begin, count, run.backwards);
        A u[scan_items], y[scan_items];
        load_items(u, run.u, b, place.row, place.direction, place.valid, h);
#pragma unroll
        for (int j = 0; j < scan_items; ++j) y[j] = K0[h] * u[j];
        complex<A>* const checkpoint =
            run.checkpoints ? run.checkpoints + ((device::first_tile(run.cu, i, run.shape.length, scan_tile) + k) * H + h) * N
                            : nullptr;
        for (Index n = 0; n < N; ++n) {
            const ScanMode<A> m = modes[n];
            const c64 entering = carry[n];  // of the tile
            if (checkpoint && threadIdx.x == 0) checkpoint[n] = cast<A>(entering);
            complex<A> x{A(0), A(0)};
#pragma unroll
            for (int j = 0; j < scan_items; ++j)
                if (j < place.valid) x = m.a * x + u[j] * m.beta;
            Affine whole;
            Affine before = affine_of(m, place.valid, x);
            Scan(scan_storage).ExclusiveScan(before, before, Affine{{1.0, 0.0}, {0.0, 0.0}}, ComposeAffine{}, whole);
            x = cast<A>(before.a * entering + before.b);
#pragma unroll
            for (int j = 0; j < scan_items; ++j) {
                y[j] += m.gamma.re * x.re - m.gamma.im * x.im;
                x = m.a * x + u[j] * m.beta;
            }
            __syncthreads();  // everybody has read carry[n] and is done with scan_storage
            if (threadIdx.x == 0) carry[n] = whole.a * entering + whole.b;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < scan_items; ++j) {
            if (j >= place.valid) continue;
            const Index row = place.row + place.direction * j, flat = (b * H + h) * run.shape.length + row;
            if (run.sum)
                run.sum[flat] = y[j];
            else if (run.y)
                run.y(b, row, h) = device::store_as<T>(run.addend ? y[j] + run.addend[flat] : y[j]);
        }
    }
    if (run.final)
        for (Index n = threadIdx.x; n < N; n += scan_threads)
            run.final(i, h, n) = cast<A>(run.conjugate ? conj(carry[n]) : carry[n]);
}

/// One block a channel and part: sums over the part's tiles (eq. 20), from the states that enter each tile from
/// both sides.
template <class T>
__global__ void __launch_bounds__(scan_threads)
    scan_gradient_kernel(SystemRun<T> run, View<const T, 3> dy, const ScanMode<acc_t<T>>* modes,
                         const complex<acc_t<T>>* exchanged_checkpoints, PartialSums sums) {
    using A = acc_t<T>;
    using Scan = cub::BlockScan<Affine, scan_threads>;
    using Reduce = cub::BlockReduce<double, scan_threads>;
    __shared__ typename Scan::TempStorage scan_storage;
    __shared__ typename Reduce::TempStorage reduce_storage;
    __shared__ Affine turned[scan_threads];

    const Index H = run.shape.channels, N = run.shape.modes, h = blockIdx.x;
    const int thread = static_cast<int>(threadIdx.x);
    modes += h * N;
    SystemSums* const total = sums.modes + (static_cast<Index>(blockIdx.y) * H + h) * N;
    for (Index n = thread; n < N; n += scan_threads) total[n] = {};
    __syncthreads();

    double u_dy = 0.0;
    const Index slots = tile_count(run.shape, scan_tile);
    for (Index slot = blockIdx.y; slot < slots; slot += gridDim.y) {
        const Index i = device::recurrence_of(run.cu, run.shape.states(), run.shape.length, slot, scan_tile);
        const RowRange rows = device::checked_rows(run.cu, i, run.shape.length);
        const Index begin = rows.begin + (slot - device::first_tile(run.cu, i, run.shape.length, scan_tile)) * scan_tile;
        if (begin < rows.begin || begin >= rows.end) continue;  // a number that no tile has
        const int count = static_cast<int>(rows.end - begin < scan_tile ? rows.end - begin : scan_tile);
        const ScanPlace place(begin, count, run.backwards);
        A u[scan_items], g[scan_items];
        load_items(u, run.u, run.cu ? 0 : i, place.row, place.direction, place.valid, h);
        load_items(g, dy, run.cu ? 0 : i, place.row, place.direction, place.valid, h);
#pragma unroll
        for (int j = 0; j < scan_items; ++j) u_dy += static_cast<double>(u[j]) * static_cast<double>(g[j]);
        for (Index n = 0; n < N; ++n) {
            const ScanMode<A> m = modes[n];
            const Index at = (slot * H + h) * N + n;
            const c64 first = cast<double>(run.checkpoints[at]), last = cast<double>(exchanged_checkpoints[at]);
            complex<A> x{A(0), A(0)}, e{A(0), A(0)};
#pragma unroll
            for (int j = 0; j < scan_items; ++j) {
                if (j < place.valid) x = m.a * x + u[j] * m.beta;
                if (scan_items - 1 - j < place.valid) e = m.a * e + g[scan_items - 1 - j] * m.gamma;
            }
            Affine before = affine_of(m, place.valid, x), after = affine_of(m, place.valid, e);
            const Affine identity{{1.0, 0.0}, {0.0, 0.0}};
            Scan(scan_storage).ExclusiveScan(before, before, identity, ComposeAffine{});
            // The other scan runs from the last thread to the first.
            turned[scan_threads - 1 - thread] = after;
            __syncthreads();
            after = turned[thread];
            Scan(scan_storage).ExclusiveScan(after, after, identity, ComposeAffine{});
            __syncthreads();
            turned[scan_threads - 1 - thread] = after;
            __syncthreads();
            after = turned[thread];
            x = cast<A>(before.a * first + before.b);
            e = cast<A>(after.a * last + after.b);
            complex<A> entering[scan_items];
#pragma unroll
            for (int j = 0; j < scan_items; ++j) {
                entering[j] = x;
                x = m.a * x + u[j] * m.beta;
            }
            complex<A> dA{A(0), A(0)}, dbeta{A(0), A(0)}, dgamma{A(0), A(0)};
#pragma unroll
            for (int j = scan_items - 1; j >= 0; --j) {
                if (j >= place.valid) continue;
                dA += e * entering[j];
                dbeta += u[j] * e;
                dgamma += g[j] * entering[j];
                e = m.a * e + g[j] * m.gamma;
            }
            const A parts[6] = {dA.re, dA.im, dbeta.re, dbeta.im, dgamma.re, dgamma.im};
            double reduced[6];
            for (int c = 0; c < 6; ++c) {
                reduced[c] = Reduce(reduce_storage).Sum(static_cast<double>(parts[c]));
                __syncthreads();
            }
            if (thread == 0) {
                total[n].A += {reduced[0], reduced[1]};
                total[n].beta += {reduced[2], reduced[3]};
                total[n].gamma += {reduced[4], reduced[5]};
            }
        }
    }
    u_dy = Reduce(reduce_storage).Sum(u_dy);
    if (thread == 0) sums.lags[static_cast<Index>(blockIdx.y) * H + h] = u_dy;
}

/// The scan method for the driver in cuda_driver.cuh.
template <class T>
struct Scanned {
    using A = acc_t<T>;
    static constexpr Index tile = scan_tile;
    static constexpr int lag_count = 1;

    static int parts(const Shape& s) {
        const Index wanted = ceil_div(528, std::max<Index>(s.channels, 1));
        return static_cast<int>(std::max<Index>(std::min(wanted, tile_count(s, tile)), 1));
    }
    struct Tables {
        ScanMode<A>* modes;
        A* K0;
        Tables(Arena& arena, const Shape& s, bool used)
            : modes(used ? arena.take<ScanMode<A>>(s.channels * s.modes) : nullptr),
              K0(used ? arena.take<A>(s.channels) : nullptr) {}
    };
    struct Scratch {
        c64* carry;  // (states, H, N)
        Scratch(Arena& arena, const Shape& s) : carry(arena.take<c64>(s.states() * s.channels * s.modes)) {}
    };

    template <class P>
    static Status prepare(const cuda& exec, const Options& options, const Params<P>& params, const Shape& s, Half half,
                          SystemMode* modes, const Tables& tables, const Tables& exchanged) {
        return launch(exec, "scan_modes_kernel", scan_modes_kernel<A, P>,
                      {dim3(static_cast<unsigned>(s.channels)), dim3(scan_threads)}, options.disc, params, half, s.modes,
                      modes, tables.modes, tables.K0, exchanged.modes, exchanged.K0);
    }
    static Status run(const cuda& exec, const SystemRun<T>& run, const SystemMode*, const Tables& tables,
                      const Scratch& scratch) {
        const Index blocks = run.shape.states() * run.shape.channels;
        INTERSTATE_RETURN_IF_ERROR(check_size("u: recurrences, blocks of a grid,", blocks));
        return launch(exec, "scan_system_kernel", scan_system_kernel<T>,
                      {dim3(static_cast<unsigned>(blocks)), dim3(scan_threads)}, run, tables.modes, tables.K0,
                      scratch.carry);
    }
    static Status gradient(const cuda& exec, const SystemRun<T>& run, const View<const T, 3>& dy, const SystemMode*,
                           const Tables& tables, const Tables&, const complex<A>* exchanged_checkpoints,
                           const PartialSums& sums) {
        return launch(exec, "scan_gradient_kernel", scan_gradient_kernel<T>,
                      {dim3(static_cast<unsigned>(run.shape.channels), static_cast<unsigned>(sums.parts)),
                       dim3(scan_threads)},
                      run, dy, tables.modes, exchanged_checkpoints, sums);
    }
};

}  // namespace INTERSTATE_KERNELS

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
