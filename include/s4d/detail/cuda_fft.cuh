// S4D on the GPU as one long convolution: everything around the transforms, which the caller of FftRun brings
// (s4d/fft.cuh, with cuFFT).
//
// One recurrence at a time. Its tokens are rows (H, n) in workspace, n at least 2 L, zero beyond its end, so that
// the circular convolution is the causal one; the reversed half of a bidirectional layer is the lags -1, -2, .. of
// the same kernel, at n-1, n-2, .. . What is not a convolution goes through the two kernels of cuda_kernel.cuh, the
// whole recurrence being one chunk (docs/ops/s4d.md, eq. 18; here in the terms of cuda_system.cuh). With T tokens,
// X = x0 and E = conj(dxT):
//
//     y[t]  += Re sum gamma X A^t              xT  = A^T X + beta sum_s A^(T-1-s) u[s]
//     du[t] += Re sum beta E A^(T-1-t)         conj(dx0) = A^T E + gamma sum_t A^t dy[t]
//
// and the gradients of A, beta and gamma are those of Re sum (gamma X G + beta E U + X E A^T), with G and U the
// two sums above. Nothing is kept from forward for backward.
#pragma once

#include <algorithm>

#include <interstate/cuda/convert.cuh>
#include <s4d/detail/cuda_driver.cuh>
#include <s4d/detail/cuda_kernel.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail::spectra {

using namespace powers;

inline constexpr int transpose_tile = 32, transpose_rows = 8;  // a block is (tile, rows) threads
inline constexpr int elementwise_threads = 256;

/// Response to a state: gamma x0, and in the exchanged system beta conj(dxT).
template <class A>
struct StateCoefficient {
    View<const complex<A>, 3> state{};
    Index i = 0;
    bool exchanged = false;
    __device__ c64 operator()(const SystemMode& m, Index h, Index n) const {
        const c64 x = cast<double>(state(i, h, n));
        return exchanged ? m.beta * conj(x) : m.gamma * x;
    }
};

inline namespace INTERSTATE_KERNELS {

/// rows (H, n): the tokens of a recurrence, channel by channel, zero from its end on.
template <class A, class T>
__global__ void __launch_bounds__(transpose_tile * transpose_rows)
    gather_rows_kernel(View<const T, 3> u, Recurrence r, View<A, 2> rows) {
    __shared__ A tile[transpose_tile][transpose_tile + 1];
    const Index t0 = static_cast<Index>(blockIdx.x) * transpose_tile;
    const Index h0 = static_cast<Index>(blockIdx.y) * transpose_tile;
    const RowRange range = rows_of(r);
    const int x = static_cast<int>(threadIdx.x);
    for (int k = static_cast<int>(threadIdx.y); k < transpose_tile; k += transpose_rows) {
        const Index row = range.begin + t0 + k, h = h0 + x;
        const bool inside = row < range.end && h < rows.extent[0];
        tile[k][x] = inside ? device::load_as<A>(u(r.cu ? 0 : r.i, row, h)) : A(0);
    }
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.y); k < transpose_tile; k += transpose_rows)
        if (h0 + k < rows.extent[0] && t0 + x < rows.extent[1]) rows(h0 + k, t0 + x) = tile[x][k];
}

/// The way back, for the tokens of the recurrence.
template <class A, class T>
__global__ void __launch_bounds__(transpose_tile * transpose_rows)
    scatter_rows_kernel(View<const A, 2> rows, Recurrence r, View<T, 3> y) {
    __shared__ A tile[transpose_tile][transpose_tile + 1];
    const Index t0 = static_cast<Index>(blockIdx.x) * transpose_tile;
    const Index h0 = static_cast<Index>(blockIdx.y) * transpose_tile;
    const RowRange range = rows_of(r);
    const int x = static_cast<int>(threadIdx.x);
    for (int k = static_cast<int>(threadIdx.y); k < transpose_tile; k += transpose_rows)
        if (h0 + k < rows.extent[0] && t0 + x < rows.extent[1]) tile[k][x] = rows(h0 + k, t0 + x);
    __syncthreads();
    for (int k = static_cast<int>(threadIdx.y); k < transpose_tile; k += transpose_rows) {
        const Index row = range.begin + t0 + k, h = h0 + x;
        if (row < range.end && h < rows.extent[0]) y(r.cu ? 0 : r.i, row, h) = device::store_as<T>(tile[x][k]);
    }
}

/// u = scale K u: the convolution, where scale is what two transforms multiply by too much.
template <class A>
__global__ void __launch_bounds__(elementwise_threads)
    convolve_kernel(Index count, A scale, const complex<A>* K, complex<A>* u) {
    for (Index k = static_cast<Index>(blockIdx.x) * elementwise_threads + threadIdx.x; k < count;
         k += static_cast<Index>(gridDim.x) * elementwise_threads)
        u[k] = scale * (K[k] * u[k]);
}

/// The gradients of K, added to those of earlier recurrences, and of u, in the place of dy. dK or K may be null.
template <class A>
__global__ void __launch_bounds__(elementwise_threads)
    correlate_kernel(Index count, A scale, const complex<A>* K, const complex<A>* u, complex<A>* dy, complex<A>* dK) {
    for (Index k = static_cast<Index>(blockIdx.x) * elementwise_threads + threadIdx.x; k < count;
         k += static_cast<Index>(gridDim.x) * elementwise_threads) {
        const complex<A> g = scale * dy[k];
        if (dK) dK[k] += conj(u[k]) * g;
        if (K) dy[k] = conj(K[k]) * g;
    }
}

/// One thread a mode: the state that a recurrence ends with, xT or, in the exchanged system, dx0, from the sums over
/// its tokens.
template <class A>
__global__ void __launch_bounds__(elementwise_threads)
    end_state_kernel(const SystemMode* modes, Index H, Index N, Recurrence r, bool exchanged,
                     View<const complex<A>, 3> initial, const Sloped<double>* partial, Index parts,
                     View<complex<A>, 3> end) {
    const Index at = static_cast<Index>(blockIdx.x) * elementwise_threads + threadIdx.x;
    if (at >= H * N) return;
    const Index h = at / N, n = at % N;
    const SystemMode m = modes[at];
    c64 x = initial ? cast<double>(initial(r.i, h, n)) : c64{0.0, 0.0};
    if (exchanged) x = conj(x);
    x = power_of(m.A, length_of(r)) * x + (exchanged ? m.gamma : m.beta) * total_of(partial, parts, H, N, at).value;
    end(r.i, h, n) = cast<A>(exchanged ? conj(x) : x);
}

/// One thread a mode: what goes through the states, added to the sums. A state that is absent is zero, and the
/// sums beside it are then not read.
template <class A>
__global__ void __launch_bounds__(elementwise_threads)
    state_sums_kernel(const SystemMode* modes, Index H, Index N, Recurrence r, View<const complex<A>, 3> x0,
                      View<const complex<A>, 3> dxT, const Sloped<double>* u_partial, const Sloped<double>* dy_partial,
                      Index parts, SystemSums* sums) {
    const Index at = static_cast<Index>(blockIdx.x) * elementwise_threads + threadIdx.x;
    if (at >= H * N) return;
    const Index h = at / N, n = at % N;
    const SystemMode m = modes[at];
    c64 X{0.0, 0.0}, E{0.0, 0.0};
    Sloped<double> G{}, U{};
    if (x0) {
        X = cast<double>(x0(r.i, h, n));
        G = total_of(dy_partial, parts, H, N, at);
    }
    if (dxT) {
        E = conj(cast<double>(dxT(r.i, h, n)));
        U = total_of(u_partial, parts, H, N, at);
    }
    sums[at].gamma += X * G.value;
    sums[at].beta += E * U.value;
    sums[at].A += m.gamma * X * G.slope + m.beta * E * U.slope + X * E * power_of(sloped(m.A), length_of(r)).slope;
}

/// The shortest good length of a transform: even, at least 2 length, a product of powers of 2, 3, 5 and 7.
inline Index good_transform_length(Index length) {
    const Index least = 2 * std::max<Index>(length, 1);
    Index best = 2;
    while (best < least) best *= 2;
    for (Index seven = 2; seven < best; seven *= 7)
        for (Index five = seven; five < best; five *= 5)
            for (Index three = five; three < best; three *= 3) {
                Index n = three;
                while (n < least) n *= 2;
                best = std::min(best, n);
            }
    return best;
}

template <class A>
struct FftLayout {
    Index n, bins;                // of a row, of its transform
    SystemMode* modes[2];         // (H, N)
    A* rows;                      // (H, n)
    complex<A>* K;                // (H, bins), as the others
    complex<A>* u;
    complex<A>* dy;
    complex<A>* dK;
    Sloped<double>* partial[2];   // (parts, H, N): sums over u and over dy
    PartialSums sums[2];

    FftLayout(Arena& arena, const Shape& s, pass p) : n(good_transform_length(s.length)), bins(n / 2 + 1) {
        const Index H = s.length > 0 ? s.channels : 0, per_mode = s.channels * s.modes;
        modes[0] = arena.take<SystemMode>(per_mode);
        modes[1] = arena.take<SystemMode>(s.bidirectional ? per_mode : 0);
        rows = arena.take<A>(H * n);
        K = arena.take<complex<A>>(H * bins);
        u = arena.take<complex<A>>(H * bins);
        partial[0] = arena.take<Sloped<double>>(power_parts(s.length) * per_mode);
        const Index used = p == pass::backward ? 1 : 0;
        dy = arena.take<complex<A>>(used * H * bins);
        dK = arena.take<complex<A>>(used * H * bins);
        partial[1] = arena.take<Sloped<double>>(used * power_parts(s.length) * per_mode);
        sums[0] = {arena.take<SystemSums>(used * per_mode), arena.take<double>(used * s.channels), 1, 1};
        sums[1] = {arena.take<SystemSums>(s.bidirectional ? used * per_mode : 0), nullptr, 1, 0};
    }
};

/// Whether the grids of a call are ones that a GPU takes. Asked before anything is written.
inline Status check_grids(const Shape& s) {
    constexpr Index most = Index{65535} * transpose_tile;  // tiles of channels are the second axis of a grid
    if (s.channels > most)
        return Status::error(StatusCode::invalid_argument, "u: channels is %lld, must be at most %lld on cuda_fft",
                             static_cast<long long>(s.channels), static_cast<long long>(most));
    LaunchShape grid;
    return power_grid(s, s.length, grid);
}

/// Forward and backward of one call. `Transforms` has to_spectrum(rows, bins) and to_rows(bins, rows), neither
/// scaled; to_rows may spoil what it reads.
template <class T, class P, class Transforms>
class FftRun {
    using A = acc_t<T>;

  public:
    FftRun(const cuda& exec, const Options& options, const Inputs<T, P>& in, const Transforms& transforms, Workspace ws,
           pass p)
        : exec_(exec), options_(options), in_(in), transforms_(transforms), s_(shape_of(in)), arena_(ws.data),
          w_(arena_, s_, p) {}

    Status forward(const Outputs<T>& out) const {
        INTERSTATE_RETURN_IF_ERROR(zero_outside(exec_, out.y, in_.cu_seqlens));
        if (s_.states() == 0 || s_.channels == 0) return {};
        INTERSTATE_RETURN_IF_ERROR(prepare());
        for (Index i = 0; i < s_.states(); ++i) {
            INTERSTATE_RETURN_IF_ERROR(gather(in_.u, i));
            if (out.xT) {
                INTERSTATE_RETURN_IF_ERROR(sum(i, true, w_.partial[0]));
                INTERSTATE_RETURN_IF_ERROR(end_state(i, false, in_.x0, w_.partial[0], out.xT));
            }
            if (s_.length == 0) continue;
            INTERSTATE_RETURN_IF_ERROR(transforms_.to_spectrum(w_.rows, w_.u));
            INTERSTATE_RETURN_IF_ERROR(launch(exec_, "convolve_kernel", convolve_kernel<A>, elementwise(),
                                              s_.channels * w_.bins, scale(), w_.K, w_.u));
            INTERSTATE_RETURN_IF_ERROR(transforms_.to_rows(w_.u, w_.rows));
            INTERSTATE_RETURN_IF_ERROR(respond(i, in_.x0, false));
            INTERSTATE_RETURN_IF_ERROR(scatter(i, out.y));
        }
        return {};
    }

    Status backward(const Upstream<T>& upstream, const Grads<T, P>& grads) const {
        const auto& g = grads.params;
        const bool params = g.log_dt || g.log_neg_re || g.im || g.B || g.C || g.D || g.C_reverse;
        const bool tokens = s_.length > 0;
        const bool through_x0 = grads.x0 || (params && in_.x0), through_xT = params && upstream.xT;
        INTERSTATE_RETURN_IF_ERROR(zero_outside(exec_, grads.u, in_.cu_seqlens));
        if (s_.channels == 0) return {};
        INTERSTATE_RETURN_IF_ERROR(prepare());
        if (params) {
            INTERSTATE_RETURN_IF_ERROR(clear(exec_, w_.sums[0].lags, s_.channels));
            for (int half = 0; half < halves(); ++half)
                INTERSTATE_RETURN_IF_ERROR(clear(exec_, w_.sums[half].modes, s_.channels * s_.modes));
            if (tokens) INTERSTATE_RETURN_IF_ERROR(clear(exec_, w_.dK, s_.channels * w_.bins));
        }
        for (Index i = 0; i < s_.states(); ++i) {
            if (params) {
                INTERSTATE_RETURN_IF_ERROR(gather(in_.u, i));
                if (through_xT) INTERSTATE_RETURN_IF_ERROR(sum(i, true, w_.partial[0]));
                if (tokens) INTERSTATE_RETURN_IF_ERROR(transforms_.to_spectrum(w_.rows, w_.u));
            }
            INTERSTATE_RETURN_IF_ERROR(gather(upstream.y, i));
            if (through_x0) INTERSTATE_RETURN_IF_ERROR(sum(i, false, w_.partial[1]));
            if (tokens && (params || grads.u)) {
                INTERSTATE_RETURN_IF_ERROR(transforms_.to_spectrum(w_.rows, w_.dy));
                INTERSTATE_RETURN_IF_ERROR(launch(exec_, "correlate_kernel", correlate_kernel<A>, elementwise(),
                                                  s_.channels * w_.bins, scale(), grads.u ? w_.K : nullptr, w_.u, w_.dy,
                                                  params ? w_.dK : nullptr));
            }
            if (tokens && grads.u) {
                INTERSTATE_RETURN_IF_ERROR(transforms_.to_rows(w_.dy, w_.rows));
                INTERSTATE_RETURN_IF_ERROR(respond(i, upstream.xT, true));
                INTERSTATE_RETURN_IF_ERROR(scatter(i, grads.u));
            }
            if (grads.x0) INTERSTATE_RETURN_IF_ERROR(end_state(i, true, upstream.xT, w_.partial[1], grads.x0));
            if (params && (in_.x0 || upstream.xT))
                INTERSTATE_RETURN_IF_ERROR(launch(exec_, "state_sums_kernel", state_sums_kernel<A>, mode_threads(),
                                                  w_.modes[0], s_.channels, s_.modes, recurrence(i), in_.x0,
                                                  upstream.xT, w_.partial[0], w_.partial[1], power_parts(s_.length),
                                                  w_.sums[0].modes));
        }
        if (!params) return {};
        if (tokens) {
            INTERSTATE_RETURN_IF_ERROR(transforms_.to_rows(w_.dK, w_.rows));
            for (int half = 0; half < halves(); ++half) {
                const Series<A> lags = later(half);
                const Series<const A> dK{lags.x, lags.recurrence};
                INTERSTATE_RETURN_IF_ERROR(sum_powers(exec_, s_, w_.modes[half], dK, w_.partial[0]));
                INTERSTATE_RETURN_IF_ERROR(launch(exec_, "kernel_sums_kernel", kernel_sums_kernel<A>, channels(),
                                                  w_.modes[half], s_.modes, View<const A, 2>(rows(s_.length)),
                                                  w_.partial[0], power_parts(dK.recurrence.length), w_.sums[half]));
            }
        }
        return launch(exec_, "finish_gradients_kernel", finish_gradients_kernel<P>, channels(), options_.disc,
                      in_.params, s_.modes, w_.sums[0], w_.sums[1], g);
    }

  private:
    int halves() const { return s_.bidirectional ? 2 : 1; }
    A scale() const { return A(1) / static_cast<A>(w_.n); }
    Recurrence recurrence(Index i) const { return {in_.cu_seqlens, i, s_.length}; }
    View<A, 2> rows(Index length) const { return view(w_.rows, {s_.channels, length}, {w_.n, Index{1}}); }

    LaunchShape channels() const { return {dim3(static_cast<unsigned>(s_.channels)), dim3(finish_threads)}; }
    LaunchShape mode_threads() const {
        return {dim3(static_cast<unsigned>(ceil_div(s_.channels * s_.modes, elementwise_threads))),
                dim3(elementwise_threads)};
    }
    LaunchShape elementwise() const {
        const Index blocks = ceil_div(s_.channels * w_.bins, elementwise_threads);
        return {dim3(static_cast<unsigned>(std::min<Index>(blocks, 1 << 16))), dim3(elementwise_threads)};
    }
    LaunchShape transpose(Index length) const {
        return {dim3(static_cast<unsigned>(ceil_div(length, transpose_tile)),
                     static_cast<unsigned>(ceil_div(s_.channels, transpose_tile))),
                dim3(transpose_tile, transpose_rows)};
    }

    /// Lags of a half beside K[0], as the rows hold them: 1, 2, .. or -1, -2, ..
    Series<A> later(int half) const {
        if (half == 0) return later_lags(rows(s_.length));
        return {.x = view(w_.rows + (w_.n - 1), {s_.channels, s_.length - 1}, {w_.n, Index{-1}}),
                .recurrence = {.length = s_.length - 1}};
    }

    /// Modes, and the transform of the kernel.
    Status prepare() const {
        if (s_.length > 0) INTERSTATE_RETURN_IF_ERROR(clear(exec_, w_.rows, s_.channels * w_.n));
        INTERSTATE_RETURN_IF_ERROR(causal_kernel(exec_, options_, in_.params, s_, w_.modes[0], rows(s_.length)));
        if (s_.bidirectional) {
            INTERSTATE_RETURN_IF_ERROR(launch(exec_, "kernel_modes_kernel", kernel_modes_kernel<A, P>,
                                              {channels().grid, dim3(kernel_modes_threads)}, options_.disc, in_.params,
                                              Half::reversed, s_.modes, w_.modes[1], View<A, 2>{}));
            if (s_.length > 0)
                INTERSTATE_RETURN_IF_ERROR(add_powers(exec_, s_, w_.modes[1], KernelCoefficient{}, later(1), false));
        }
        return s_.length > 0 ? transforms_.to_spectrum(w_.rows, w_.K) : Status{};
    }
    Status gather(const View<const T, 3>& u, Index i) const {
        if (s_.length == 0) return {};
        return launch(exec_, "gather_rows_kernel", gather_rows_kernel<A, T>, transpose(w_.n), u, recurrence(i),
                      rows(w_.n));
    }
    Status scatter(Index i, const View<T, 3>& y) const {
        return launch(exec_, "scatter_rows_kernel", scatter_rows_kernel<A, T>, transpose(s_.length),
                      View<const A, 2>(rows(s_.length)), recurrence(i), y);
    }
    Status sum(Index i, bool reversed, Sloped<double>* partial) const {
        return sum_powers(exec_, s_, w_.modes[0], Series<const A>{rows(s_.length), recurrence(i), reversed}, partial);
    }
    /// Adds the response to a state, to the rows: of x0 forwards, of dxT backwards.
    Status respond(Index i, const View<const complex<A>, 3>& state, bool exchanged) const {
        if (!state) return {};
        return add_powers(exec_, s_, w_.modes[0], StateCoefficient<A>{state, i, exchanged},
                          Series<A>{rows(s_.length), recurrence(i), exchanged}, true);
    }
    Status end_state(Index i, bool exchanged, const View<const complex<A>, 3>& initial, const Sloped<double>* partial,
                     const View<complex<A>, 3>& end) const {
        return launch(exec_, "end_state_kernel", end_state_kernel<A>, mode_threads(), w_.modes[0], s_.channels,
                      s_.modes, recurrence(i), exchanged, initial, partial, power_parts(s_.length), end);
    }

    const cuda& exec_;
    const Options& options_;
    const Inputs<T, P>& in_;
    const Transforms& transforms_;
    Shape s_;
    Arena arena_;
    FftLayout<A> w_;
};

}  // namespace INTERSTATE_KERNELS

}  // namespace s4d::detail::spectra
}  // namespace interstate::inline INTERSTATE_ABI
