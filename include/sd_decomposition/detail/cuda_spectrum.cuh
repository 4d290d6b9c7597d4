// Singular values of tridiagonal matrices, symmetric or skew-symmetric, on the GPU, and the outputs of a head.
//
// Bisection in float64: a thread looks for the k-th eigenvalue by how many there are below the middle of an interval, which
// is the number of sign changes among the leading principal minors of the matrix less x. Their recurrence has no
// divisions; every eighth step both of its terms are divided by a power of two. Elements beside the diagonal are made
// 2^-56 of the largest row at least, so that no minor vanishes together with the one before it and eight steps stay far
// above the smallest number; that moves no eigenvalue by more than 2^-55 of that row.
//
// A skew-symmetric matrix with b beside its zero diagonal has the singular values of the symmetric one with b there: +-sigma.
#pragma once

#include <sd_decomposition/detail/cuda_tridiagonal.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition::detail {

inline constexpr int spectrum_threads = 128;
inline constexpr double least_link = 0x1p-56;
/// Halvings of an interval of at most twice the largest singular value's bound: to the last bit of double, or well below
/// the noise of float.
template <class A>
inline constexpr int halvings = sizeof(A) == 8 ? 55 : 36;

inline constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

/// A step of the recurrence: the element on the diagonal, and the square of that beside it, to the row before.
struct alignas(16) MinorStep {
    double diagonal, link;
};

inline namespace INTERSTATE_KERNELS {

/// How many eigenvalues are below x; count is a multiple of 8.
__device__ inline int eigenvalues_below(const MinorStep* steps, Index count, double x) {
    int changes = 0;
    double minor = 1.0, before = 0.0;
    for (Index i = 0; i < count; i += 8) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const MinorStep step = steps[i + k];
            const double next = std::fma(step.diagonal - x, minor, -(step.link * before));
            changes += static_cast<int>(static_cast<unsigned>(__double2hiint(next) ^ __double2hiint(minor)) >> 31);
            before = minor;
            minor = next;
        }
        const int a = __double2hiint(minor) & 0x7ff00000, b = __double2hiint(before) & 0x7ff00000;
        const double factor = __hiloint2double(0x7fe00000 - (a > b ? a : b), 0);
        minor *= factor;
        before *= factor;
    }
    return changes;
}

/// A block has S or F of a head.
template <class A>
__global__ void __launch_bounds__(spectrum_threads) spectrum_kernel(Call<A> p) {
    const Index task = blockIdx.x, head = task / 2, part = task % 2, n = p.s.values(), at = p.first + head;
    const Index b = at / p.s.query_heads, h = at % p.s.query_heads;
    const PartOutputs<A> out = p.part(part);
    const bool finite = n == 0 || p.w.heads[head].finite;
    const double empty = finite ? 0.0 : not_a_number;  // of what was not computed
    const bool computed = n > 0 && finite;
    const PartState state = computed ? p.w.states[task] : PartState{empty, 0};
    const Factor factor = factor_of(p.scale, computed ? p.w.heads[head].G + state.shift : 0);
    if (part == 0 && threadIdx.x == 0)
        write_norms(p.out, b, h, state.norm, computed ? p.w.states[task + 1].norm : empty, factor);
    if (!out.want_spectrum()) return;
    if (!(state.norm > 0.0)) {
        for (Index i = threadIdx.x; i < n && out.singular_values; i += spectrum_threads)
            out.singular_values(b, h, i) = static_cast<A>(state.norm);
        if (threadIdx.x == 0) write_ranks(out, b, h, n > 0 ? state.norm : 0.0, state.norm, state.norm, state.norm);
        return;
    }

    // The rows' largest sums become a number in [1/2, 1).
    double *const diagonal = p.spectrum(task), *const off = diagonal + n;
    MinorStep* const steps = reinterpret_cast<MinorStep*>(off + n);
    const auto beside = [&](Index i) { return i >= 0 && i + 1 < n ? std::abs(off[i]) : 0.0; };
    const auto on = [&](Index i) { return part == 0 ? 0.0 : diagonal[i]; };
    double bound = 0.0;
    for (Index i = threadIdx.x; i < n; i += spectrum_threads) bound = Largest{}(bound, std::abs(on(i)) + (beside(i - 1) + beside(i)));
    bound = join_block(bound, Largest{});
    const int exponent = bound > 0.0 ? std::ilogb(bound) + 1 : 0;
    const Index count = spectrum_steps(n);
    for (Index i = threadIdx.x; i < count; i += spectrum_threads) {
        const double link = Largest{}(std::ldexp(beside(i - 1), -exponent), least_link);
        steps[i] = i < n ? MinorStep{std::ldexp(on(i), -exponent), i > 0 ? link * link : 0.0} : MinorStep{2.0, 0.0};
    }
    __syncthreads();

    const Index searched = part == 0 ? n / 2 : n;
    double* const found = diagonal;  // magnitudes, in the order of the eigenvalues
    for (Index k = threadIdx.x; k < searched; k += spectrum_threads) {
        const Index index = n - 1 - k;  // below it in ascending order
        double low = part == 0 ? 0.0 : -1.0, high = 1.0;
#pragma unroll 1
        for (int i = 0; i < halvings<A>; ++i) {
            const double middle = 0.5 * (low + high);
            if (eigenvalues_below(steps, count, middle) > index)
                high = middle;
            else
                low = middle;
        }
        found[k] = std::abs(0.5 * (low + high));
    }
    __syncthreads();

    double* const s = off;  // descending; of S every value twice, and a zero where n is odd
    const int copies = part == 0 ? 2 : 1;
    for (Index k = threadIdx.x; k < searched; k += spectrum_threads) {
        const double value = found[k];
        Index place = 0;
        for (Index j = 0; j < searched; ++j) place += found[j] > value || (found[j] == value && j < k) ? 1 : 0;
        for (int i = 0; i < copies; ++i) s[place * copies + i] = value;
    }
    if (threadIdx.x == 0 && searched * copies < n) s[n - 1] = 0.0;
    __syncthreads();

    const Factor back{factor.fraction, factor.exponent + exponent};
    const double largest = s[0];
    double sum = 0.0, squares = 0.0, fourths = 0.0, entropy = 0.0;
    for (Index i = threadIdx.x; i < n; i += spectrum_threads) {
        const double ratio = largest == 0.0 ? 0.0 : s[i] / largest, square = ratio * ratio;
        sum += ratio, squares += square, fourths += square * square;
        if (out.singular_values) out.singular_values(b, h, i) = static_cast<A>(back.times(s[i]));
    }
    sum = join_block(sum, Add{});
    squares = join_block(squares, Add{});
    fourths = join_block(fourths, Add{});
    for (Index i = threadIdx.x; i < n && largest != 0.0; i += spectrum_threads) {
        const double share = s[i] / largest / sum;
        if (share != 0.0) entropy -= share * std::log(share);
    }
    entropy = join_block(entropy, Add{});
    if (threadIdx.x == 0) write_ranks(out, b, h, largest, entropy, squares, fourths);
}

/// Whether a block of the current device has the shared memory for a part.
template <class A>
bool tridiagonal_in_shared(const PartLayout<A>& part) {
    if (part.surely_fits()) return true;
    std::size_t limit = 0;
    return part.bytes() >= 0 && shared_memory_limit(limit).ok() && static_cast<std::size_t>(part.bytes()) + 1024 <= limit;  // and a little beside
}

/// All heads of a call, so many together that the layout of them has room for.
template <class T>
Status cuda_forward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Workspace ws) {
    using A = acc_t<T>;
    const Shape s = shape_of(in);
    const Index all = s.batch * s.query_heads, together = CudaLayout<A>::together(s), n = s.values();
    const auto& [energy, norm, s_norm, f_norm, s_values, f_values, s_effective, f_effective, s_participation, f_participation, s_stable,
                 f_stable] = out;
    Arena arena(ws.data);
    Call<A> call{.s = s,
                 .w = CudaLayout<A>(arena, s, together),
                 .out = {energy, norm, s_norm, f_norm, s_values, f_values, s_effective, f_effective, s_participation,
                         f_participation, s_stable, f_stable},
                 .scale = scale_of(options, s.head_dim),
                 .first = 0};
    const PartLayout<A> part(n);
    const bool in_shared = tridiagonal_in_shared(part);
    const Index top = CudaLayout<A>::rows_of_m(s), width = 2 * s.head_dim < panel_columns ? ceil_div(2 * s.head_dim, 8) * 8 : panel_columns;
    const auto grid = [](Index blocks) { return dim3(static_cast<unsigned>(blocks)); };
    for (; call.first < all; call.first += together) {
        const Index heads = all - call.first < together ? all - call.first : together;
        if (n > 0) {
            INTERSTATE_RETURN_IF_ERROR(launch(exec, "triangle_kernel", triangle_kernel<T>, {grid(heads), grid(width * column_lanes)},
                                              in.Q, in.K, call));
            INTERSTATE_RETURN_IF_ERROR(launch(exec, "interaction_kernel", interaction_kernel<A>,
                                              {grid(heads * device::product_tiles(top) * device::product_tiles(n)), grid(device::product_threads)},
                                              call));
            INTERSTATE_RETURN_IF_ERROR(launch(exec, "tridiagonal_kernel", in_shared ? tridiagonal_kernel<A, true> : tridiagonal_kernel<A, false>,
                                              {grid(2 * heads), grid(32 * part.warps), in_shared ? static_cast<std::size_t>(part.bytes()) : 0}, call));
        }
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "spectrum_kernel", spectrum_kernel<A>, {grid(2 * heads), grid(spectrum_threads)}, call));
    }
    return {};
}

}  // namespace INTERSTATE_KERNELS

}  // namespace sd_decomposition::detail
}  // namespace interstate::inline INTERSTATE_ABI
