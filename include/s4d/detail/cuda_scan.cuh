// S4D on the GPU as a scan: one block runs one channel of one recurrence through time.
//
// A tile is 1,024 tokens, 8 consecutive ones a thread. For every mode a thread runs its tokens from a
// zero state, a CUB block scan with the complex affine operator (a2 a1, a2 b1 + b2) turns the ends into
// the state that enters each thread, and the thread runs its tokens again from there, adding to y in
// registers. The scan and the carry between tiles are float64, so that powers of Abar do not drift
// (docs/ops/s4d.md, "Phase"); inside 8 tokens the accumulator dtype is exact enough.
#pragma once

#include <cub/block/block_scan.cuh>

#include <interstate/cuda/sequences.cuh>
#include <interstate/dispatch.hpp>
#include <s4d/detail/discretize.hpp>

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

template <class A>
struct ScanCoefficients {
    c64 Abar_items;         // Abar^scan_items
    complex<A> Abar, Bbar, C2;  // C2 = 2C
};

template <class A>
struct CudaScanLayout {
    ScanCoefficients<A>* coefficients;  // (H, N)
    c64* carry;                         // (states, H, N)
    CudaScanLayout(Arena& arena, const Shape& s)
        : coefficients(arena.take<ScanCoefficients<A>>(s.channels * s.modes)),
          carry(arena.take<c64>(s.states() * s.channels * s.modes)) {}
};

inline namespace INTERSTATE_KERNELS {

/// One thread a mode: discretisation in float64 (eq. 2).
template <class A, class P>
__global__ void scan_coefficients_kernel(Discretization disc, Params<P> p, Index H, Index N,
                                         ScanCoefficients<A>* out) {
    const Index at = static_cast<Index>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= H * N) return;
    const Index h = at / N, n = at % N;
    const Mode m = mode_at(disc, p, h, n);
    c64 power = m.Abar;
    for (int i = 1; i < scan_items; i *= 2) power = power * power;
    static_assert((scan_items & (scan_items - 1)) == 0);
    out[at] = {power, cast<A>(m.Abar), cast<A>(m.Bbar), cast<A>(2.0 * cast<double>(p.C(h, n)))};
}

template <class T, class P>
__global__ void __launch_bounds__(scan_threads)
    scan_forward_kernel(Inputs<T, P> in, Outputs<T> out, const ScanCoefficients<acc_t<T>>* coefficients, c64* carry,
                        Index H, Index N, std::uint32_t* flags) {
    using A = acc_t<T>;
    using Scan = cub::BlockScan<Affine, scan_threads>;
    __shared__ typename Scan::TempStorage scan_storage;

    const Index h = static_cast<Index>(blockIdx.x) % H, i = static_cast<Index>(blockIdx.x) / H;
    const RowRange rows = device::checked_rows(in.cu_seqlens, i, in.u.extent[1], threadIdx.x == 0 ? flags : nullptr);
    const Index b = in.cu_seqlens ? 0 : i;
    const A D = in.params.D ? static_cast<A>(in.params.D(h)) : A(0);
    coefficients += h * N;
    carry += (i * H + h) * N;

    for (Index n = threadIdx.x; n < N; n += scan_threads) {
        carry[n] = in.x0 ? cast<double>(in.x0(i, h, n)) : c64{0.0, 0.0};
        if (out.xT && rows.begin == rows.end) out.xT(i, h, n) = cast<A>(carry[n]);
    }
    __syncthreads();

    for (Index tile = rows.begin; tile < rows.end; tile += scan_tile) {
        const Index first = tile + static_cast<Index>(threadIdx.x) * scan_items;
        A u[scan_items], y[scan_items];
#pragma unroll
        for (int j = 0; j < scan_items; ++j) {
            u[j] = first + j < rows.end ? static_cast<A>(in.u(b, first + j, h)) : A(0);
            y[j] = D * u[j];
        }
        for (Index n = 0; n < N; ++n) {
            const ScanCoefficients<A> k = coefficients[n];
            const c64 entering = carry[n];  // of the tile
            complex<A> x{A(0), A(0)};
#pragma unroll
            for (int j = 0; j < scan_items; ++j) x = k.Abar * x + u[j] * k.Bbar;
            Affine whole;
            Affine before{k.Abar_items, cast<double>(x)};
            Scan(scan_storage).ExclusiveScan(before, before, Affine{{1.0, 0.0}, {0.0, 0.0}}, ComposeAffine{}, whole);
            x = cast<A>(before.a * entering + before.b);
#pragma unroll
            for (int j = 0; j < scan_items; ++j) {
                x = k.Abar * x + u[j] * k.Bbar;                   // eq. 3
                y[j] += k.C2.re * x.re - k.C2.im * x.im;          // eq. 4
                if (out.xT && first + j == rows.end - 1) out.xT(i, h, n) = x;
            }
            __syncthreads();  // everybody has read carry[n] and is done with scan_storage
            if (threadIdx.x == 0) carry[n] = whole.a * entering + whole.b;
        }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < scan_items; ++j)
            if (first + j < rows.end) out.y(b, first + j, h) = T(y[j]);
    }
}

}  // namespace INTERSTATE_KERNELS

template <class T, class P>
Status cuda_scan_forward(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out,
                         Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    Arena arena(ws.data);
    const CudaScanLayout<A> w(arena, s);
    const Index modes = s.channels * s.modes, blocks = s.states() * s.channels;
    if (in.cu_seqlens && s.length > 0 && s.channels > 0) {
        zero_outside_sequences_kernel<<<static_cast<unsigned>(s.length), 128, 0, exec.stream>>>(out.y, in.cu_seqlens);
        INTERSTATE_RETURN_IF_ERROR(launch_status("zero_outside_sequences_kernel"));
    }
    if (modes > 0) {
        scan_coefficients_kernel<A, P><<<static_cast<unsigned>(ceil_div(modes, 128)), 128, 0, exec.stream>>>(
            options.disc, in.params, s.channels, s.modes, w.coefficients);
        INTERSTATE_RETURN_IF_ERROR(launch_status("scan_coefficients_kernel"));
    }
    if (blocks > 0) {
        scan_forward_kernel<T, P><<<static_cast<unsigned>(blocks), scan_threads, 0, exec.stream>>>(
            in, out, w.coefficients, w.carry, s.channels, s.modes, exec.flags);
        INTERSTATE_RETURN_IF_ERROR(launch_status("scan_forward_kernel"));
    }
    return {};
}

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
