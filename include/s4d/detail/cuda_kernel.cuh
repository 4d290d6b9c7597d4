// The Vandermonde kernel of S4D on the GPU, and the sums that its backward needs. Two kernels, both products
// with the matrix A[n]^l that is never stored:
//
//     y[l]  = Re sum_n c[n] A[n]^l                              power_kernel
//     S[n]  = sum_l v[l] A[n]^l  and its derivative in A[n]     power_sums_kernel
//
// A block is one channel and 4,096 lags, and l = 4096 part + 256 i + 16 a + b. Thread (a, b) has 16 lags, one
// for each i, so that neighbours in memory are neighbours in a warp. A^l is the product of three numbers out of
// tables in shared memory, low[b] = A^(4096 part + b), high[a] = A^(16 a) and step[i] = A^(256 i): all of them are
// formed in float64 by repeated squaring and rounded once, so that the phase of A^l is as good at lag 65,536 as
// at lag 1 (docs/ops/s4d.md, "Phase"). step is the same for the whole block, which leaves two FMAs a lag and mode.
//
// In the terms of cuda_system.cuh, K[0] is K0 and K[l] = Re sum_n gamma beta A^(l-1).
#pragma once

#include <algorithm>
#include <type_traits>

#include <cub/block/block_reduce.cuh>

#include <interstate/cuda/launch.cuh>
#include <interstate/workspace.hpp>
#include <s4d/detail/cuda_system.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail::powers {

inline constexpr int power_radix = 16;                             // entries of a table
inline constexpr int power_threads = power_radix * power_radix;    // a thread for each (a, b)
inline constexpr int power_lags = power_radix * power_threads;     // of a block
inline constexpr int power_modes = power_threads / power_radix;    // whose tables are filled at once
inline constexpr int kernel_modes_threads = 128;

inline Index power_parts(Index length) { return ceil_div(length, power_lags); }

/// A function of a mode's A, with its derivative in A.
template <class A>
struct Sloped {
    complex<A> value, slope;
};
template <class A>
INTERSTATE_HD constexpr Sloped<A> operator*(Sloped<A> a, Sloped<A> b) {
    return {a.value * b.value, a.value * b.slope + a.slope * b.value};
}
template <class U, class A>
INTERSTATE_HD constexpr Sloped<U> cast(Sloped<A> a) {
    return {cast<U>(a.value), cast<U>(a.slope)};
}
INTERSTATE_HD constexpr c64 one(c64) { return {1.0, 0.0}; }
INTERSTATE_HD constexpr Sloped<double> one(Sloped<double>) { return {{1.0, 0.0}, {0.0, 0.0}}; }
/// A itself.
INTERSTATE_HD constexpr Sloped<double> sloped(c64 A) { return {A, {1.0, 0.0}}; }

/// a^(the low `bits` of exponent); leaves a^(2^bits) in a.
template <class X>
INTERSTATE_HD X take_power(X& a, Index exponent, int bits) {
    X power = one(a);
    for (int bit = 0; bit < bits; ++bit) {
        if (exponent >> bit & 1) power = power * a;
        a = a * a;
    }
    return power;
}
/// a^exponent.
template <class X>
INTERSTATE_HD X power_of(X a, Index exponent) {
    int bits = 0;
    while (exponent >> bits) ++bits;
    return take_power(a, exponent, bits);
}

/// Which tokens a kernel works on: recurrence i of a call with `length` rows.
struct Recurrence {
    View<const std::int32_t, 1> cu{};
    Index i = 0, length = 0;
};

/// A tensor (channels, length of the recurrence), read or written from its first lag or from its last.
template <class A>
struct Series {
    View<A, 2> x{};
    Recurrence recurrence{};
    bool reversed = false;
};

/// What K = Re sum gamma beta A^l multiplies powers with.
struct KernelCoefficient {
    __device__ c64 operator()(const SystemMode& m, Index, Index) const { return m.beta * m.gamma; }
};

inline namespace INTERSTATE_KERNELS {

__device__ inline RowRange rows_of(const Recurrence& r) { return device::checked_rows(r.cu, r.i, r.length); }
__device__ inline Index length_of(const Recurrence& r) {
    const RowRange rows = rows_of(r);
    return rows.end - rows.begin;
}
template <class A>
__device__ A& at_lag(const Series<A>& s, Index h, Index l, Index length) {
    return s.x(h, s.reversed ? length - 1 - l : l);
}

/// Tables of power_modes modes. Element is complex, or Sloped where derivatives are wanted.
template <class Element>
struct alignas(16) PowerTables {
    Element low[power_modes][power_radix], high[power_modes][power_radix], step[power_modes][power_radix];

    /// Thread (mode, entry) fills its entry of all three; `factor` goes into low.
    template <class A, class X>
    __device__ void fill(X a, X factor, Index part) {
        const int thread = static_cast<int>(threadIdx.x), mode = thread / power_radix, entry = thread % power_radix;
        static_assert(power_radix == 1 << 4);
        const X ones = take_power(a, entry, 4);
        high[mode][entry] = cast<A>(take_power(a, entry, 4));
        step[mode][entry] = cast<A>(take_power(a, entry, 4));
        low[mode][entry] = cast<A>(factor * power_of(a, part) * ones);
    }
    /// A^l over step[i], of this thread's lags.
    __device__ Element entering(int mode) const {
        return low[mode][threadIdx.x % power_radix] * high[mode][threadIdx.x / power_radix];
    }
};

/// out[l] = Re sum_n coefficient A^l, or that added to out.
template <class A, class Coefficient>
__global__ void __launch_bounds__(power_threads)
    power_kernel(const SystemMode* modes, Index H, Index N, Coefficient coefficient, Series<A> out, bool add) {
    __shared__ PowerTables<complex<A>> tables;
    const Index h = static_cast<Index>(blockIdx.x) % H, part = static_cast<Index>(blockIdx.x) / H;
    const Index begin = part * power_lags, length = length_of(out.recurrence);
    if (begin >= length) return;
    A y[power_radix] = {};
    for (Index first = 0; first < N; first += power_modes) {
        const Index n = first + threadIdx.x / power_radix;
        c64 a{0.0, 0.0}, factor{0.0, 0.0};
        if (n < N) {
            const SystemMode m = modes[h * N + n];
            a = m.A;
            factor = coefficient(m, h, n);
        }
        __syncthreads();  // the tables before these are not read any more
        tables.template fill<A>(a, factor, part);
        __syncthreads();
        const int count = N - first < power_modes ? static_cast<int>(N - first) : power_modes;
#pragma unroll 1
        for (int mode = 0; mode < count; ++mode) {
            const complex<A> z = tables.entering(mode);
#pragma unroll
            for (int i = 0; i < power_radix; ++i) {
                const complex<A> step = tables.step[mode][i];
                y[i] += z.re * step.re;
                y[i] -= z.im * step.im;
            }
        }
    }
#pragma unroll
    for (int i = 0; i < power_radix; ++i) {
        const Index l = begin + i * power_threads + threadIdx.x;
        if (l >= length) continue;
        A& to = at_lag(out, h, l, length);
        to = add ? to + y[i] : y[i];
    }
}

/// Adds x[k] over the lanes of a warp, for 32 k at once: lane k is left with total k in x[0].
template <int distance = 16>
__device__ void add_lanes(double (&x)[32]) {
    const bool upper = (threadIdx.x & distance) != 0;
#pragma unroll
    for (int k = 0; k < distance; ++k) {
        const double kept = upper ? x[k + distance] : x[k], sent = upper ? x[k] : x[k + distance];
        x[k] = kept + __shfl_xor_sync(0xffffffffu, sent, distance);
    }
    if constexpr (distance > 1) add_lanes<distance / 2>(x);
}

/// partial (parts, H, N): this part's sum_l v[l] A^l, and its derivative. Added over threads in float64, in a
/// fixed order.
template <class A>
__global__ void __launch_bounds__(power_threads)
    power_sums_kernel(const SystemMode* modes, Index H, Index N, Series<const A> v, Sloped<double>* partial) {
    constexpr int warps = power_threads / 32, numbers = 4, at_once = 32 / numbers;  // (value, slope) is 4 numbers
    __shared__ PowerTables<Sloped<A>> tables;
    __shared__ double warp_sums[warps][power_modes * numbers];
    const int thread = static_cast<int>(threadIdx.x);
    const Index h = static_cast<Index>(blockIdx.x) % H, part = static_cast<Index>(blockIdx.x) / H;
    const Index begin = part * power_lags, length = length_of(v.recurrence);
    partial += (part * H + h) * N;
    if (begin >= length) {
        for (Index n = thread; n < N; n += power_threads) partial[n] = {};
        return;
    }
    A values[power_radix];
#pragma unroll
    for (int i = 0; i < power_radix; ++i) {
        const Index l = begin + i * power_threads + thread;
        values[i] = l < length ? at_lag(v, h, l, length) : A(0);
    }
    for (Index first = 0; first < N; first += power_modes) {
        const Index own = first + thread / power_radix;
        Sloped<double> a{}, factor{};  // a mode beyond the last is zero
        if (own < N) {
            a = sloped(modes[h * N + own].A);
            factor = one(a);
        }
        __syncthreads();  // the tables and sums before these are not read any more
        tables.template fill<A>(a, factor, part);
        __syncthreads();
#pragma unroll 1
        for (int round = 0; round < power_modes / at_once && first + round * at_once < N; ++round) {
            double x[32];
#pragma unroll
            for (int k = 0; k < at_once; ++k) {
                const int mode = round * at_once + k;
                Sloped<A> sum{};
#pragma unroll
                for (int i = 0; i < power_radix; ++i) {
                    const Sloped<A> step = tables.step[mode][i];
                    sum.value += values[i] * step.value;
                    sum.slope += values[i] * step.slope;
                }
                const Sloped<A> share = tables.entering(mode) * sum;
                x[numbers * k] = static_cast<double>(share.value.re);
                x[numbers * k + 1] = static_cast<double>(share.value.im);
                x[numbers * k + 2] = static_cast<double>(share.slope.re);
                x[numbers * k + 3] = static_cast<double>(share.slope.im);
            }
            add_lanes<>(x);
            warp_sums[thread / 32][round * 32 + thread % 32] = x[0];
        }
        __syncthreads();
        const Index n = first + thread / numbers;
        if (thread < power_modes * numbers && n < N) {
            double sum = 0.0;
            for (int warp = 0; warp < warps; ++warp) sum += warp_sums[warp][thread];
            complex<double>& half = thread % numbers < 2 ? partial[n].value : partial[n].slope;
            (thread % 2 == 0 ? half.re : half.im) = sum;
        }
    }
}

/// The parts that power_sums_kernel left for one mode, added in order.
__device__ inline Sloped<double> total_of(const Sloped<double>* partial, Index parts, Index H, Index N, Index at) {
    Sloped<double> sum{};
    for (Index part = 0; part < parts; ++part) {
        const Sloped<double> x = partial[part * H * N + at];
        sum.value += x.value;
        sum.slope += x.slope;
    }
    return sum;
}

/// One block a channel: its modes, and where K is not null K[0], with D if there is one.
template <class A, class P>
__global__ void __launch_bounds__(kernel_modes_threads)
    kernel_modes_kernel(Discretization disc, Params<P> p, Half half, Index N, SystemMode* modes, View<A, 2> K) {
    const Index h = blockIdx.x;
    double sum = 0.0;
    for (Index n = threadIdx.x; n < N; n += kernel_modes_threads)
        modes[h * N + n] = system_mode(disc, p, half, h, n, sum);
    using Reduce = cub::BlockReduce<double, kernel_modes_threads>;
    __shared__ typename Reduce::TempStorage storage;
    sum = Reduce(storage).Sum(sum);
    if (threadIdx.x != 0 || !K) return;
    if (p.D) sum += static_cast<double>(p.D(h));
    K(h, 0) = static_cast<A>(sum);
}

/// One block a channel: adds what goes through K to the sums of a half, from the sums over dK[1..]; the
/// feedthrough is dK[0], of the half that has one.
template <class A>
__global__ void kernel_sums_kernel(const SystemMode* modes, Index N, View<const A, 2> dK, const Sloped<double>* partial,
                                   Index parts, PartialSums sums) {
    const Index h = blockIdx.x, H = gridDim.x;
    for (Index n = threadIdx.x; n < N; n += blockDim.x) {
        const Index at = h * N + n;
        const SystemMode m = modes[at];
        const Sloped<double> s = total_of(partial, parts, H, N, at);
        sums.modes[at].A += s.slope * m.beta * m.gamma;
        sums.modes[at].beta += s.value * m.gamma;
        sums.modes[at].gamma += s.value * m.beta;
    }
    if (threadIdx.x == 0 && sums.lag_count > 0) sums.lags[h] = static_cast<double>(dK(h, 0));
}

/// Gradients of what K does not depend on. One block a channel.
template <class P>
__global__ void zero_unused_gradients_kernel(Index N, View<P, 1> D, View<complex<P>, 2> C_reverse) {
    const Index h = blockIdx.x;
    if (threadIdx.x == 0 && D) D(h) = P(0);
    if (C_reverse)
        for (Index n = threadIdx.x; n < N; n += blockDim.x) C_reverse(h, n) = {};
}

/// Grid of power_kernel and power_sums_kernel.
inline Status power_grid(const Shape& s, Index length, LaunchShape& grid) {
    const Index blocks = s.channels * power_parts(length);
    INTERSTATE_RETURN_IF_ERROR(check_size("K: channels times parts of 4096 lags, blocks of a grid,", blocks));
    grid = {dim3(static_cast<unsigned>(blocks)), dim3(power_threads)};
    return {};
}

template <class A, class Coefficient>
Status add_powers(const cuda& exec, const Shape& s, const SystemMode* modes, Coefficient coefficient,
                  const Series<A>& out, bool add) {
    LaunchShape grid;
    INTERSTATE_RETURN_IF_ERROR(power_grid(s, out.recurrence.length, grid));
    return launch(exec, "power_kernel", power_kernel<A, Coefficient>, grid, modes, s.channels, s.modes, coefficient,
                  out, add);
}

template <class A>
Status sum_powers(const cuda& exec, const Shape& s, const SystemMode* modes, const Series<const A>& v,
                  Sloped<double>* partial) {
    LaunchShape grid;
    INTERSTATE_RETURN_IF_ERROR(power_grid(s, v.recurrence.length, grid));
    return launch(exec, "power_sums_kernel", power_sums_kernel<A>, grid, modes, s.channels, s.modes, v, partial);
}

template <class T>
Status clear(const cuda& exec, T* memory, Index count) {
    if (count == 0) return {};
    return cuda_status(cudaMemsetAsync(memory, 0, static_cast<std::size_t>(count) * sizeof(T), exec.stream),
                       "cudaMemsetAsync");
}

/// Lags 1 and up of a kernel whose lag 0 is K(h, 0).
template <class A>
Series<A> later_lags(const View<A, 2>& K) {
    Series<A> later{.x = K, .recurrence = {.length = std::max<Index>(K.extent[1] - 1, 0)}};
    if (later.recurrence.length > 0) later.x.data += K.stride[1];
    return later;
}

/// The kernel of the causal half with D at lag 0 (H, L), and its modes.
template <class A, class P>
Status causal_kernel(const cuda& exec, const Options& options, const Params<P>& params, const Shape& s,
                     SystemMode* modes, const View<A, 2>& K) {
    INTERSTATE_RETURN_IF_ERROR(launch(exec, "kernel_modes_kernel", kernel_modes_kernel<A, P>,
                                      {dim3(static_cast<unsigned>(s.channels)), dim3(kernel_modes_threads)},
                                      options.disc, params, Half::causal, s.modes, modes,
                                      s.length > 0 ? K : View<A, 2>{}));
    return add_powers(exec, s, modes, KernelCoefficient{}, later_lags(K), false);
}

struct KernelLayout {
    SystemMode* modes;        // (H, N)
    Sloped<double>* partial;  // (parts, H, N)
    PartialSums sums;
    KernelLayout(Arena& arena, const Shape& s, pass p) : modes(arena.take<SystemMode>(s.channels * s.modes)) {
        const Index used = p == pass::backward ? s.channels : 0;
        partial = arena.take<Sloped<double>>(power_parts(s.length) * used * s.modes);
        sums = {arena.take<SystemSums>(used * s.modes), arena.take<double>(used), 1, 1};
    }
};

template <class A, class P>
Status run_generate_kernel_backward(const cuda& exec, const Options& options, Params<P> params,
                                    const View<const A, 2>& dK, BasicParams<P, complex<P>> grads, Workspace ws) {
    const Shape s = shape_of(params, dK);
    Arena arena(ws.data);
    const KernelLayout w(arena, s, pass::backward);
    const LaunchShape channels{dim3(static_cast<unsigned>(s.channels)), dim3(finish_threads)};
    INTERSTATE_RETURN_IF_ERROR(launch(exec, "zero_unused_gradients_kernel", zero_unused_gradients_kernel<P>, channels,
                                      s.modes, grads.D, grads.C_reverse));
    params.D = {};
    params.C_reverse = {};
    grads.D = {};
    grads.C_reverse = {};
    INTERSTATE_RETURN_IF_ERROR(launch(exec, "kernel_modes_kernel", kernel_modes_kernel<A, P>,
                                      {channels.grid, dim3(kernel_modes_threads)}, options.disc, params, Half::causal,
                                      s.modes, w.modes, View<A, 2>{}));
    const Series<const A> later = later_lags(dK);
    INTERSTATE_RETURN_IF_ERROR(sum_powers(exec, s, w.modes, later, w.partial));
    INTERSTATE_RETURN_IF_ERROR(clear(exec, w.sums.modes, s.channels * s.modes));
    INTERSTATE_RETURN_IF_ERROR(clear(exec, w.sums.lags, s.channels));
    if (s.length > 0)
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "kernel_sums_kernel", kernel_sums_kernel<A>, channels, w.modes, s.modes,
                                          dK, w.partial, power_parts(later.recurrence.length), w.sums));
    return launch(exec, "finish_gradients_kernel", finish_gradients_kernel<P>, channels, options.disc, params, s.modes,
                  w.sums, PartialSums{}, grads);
}

}  // namespace INTERSTATE_KERNELS

}  // namespace s4d::detail::powers
}  // namespace interstate::inline INTERSTATE_ABI
