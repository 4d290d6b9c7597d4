// The tables of cuda_chunk_form.cuh.
#pragma once

#include <interdomain/detail/cuda_chunk_form.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail::chunks {
inline namespace INTERSTATE_KERNELS {

inline constexpr int table_threads = 256, mix_rows = 8;

/// Block (head, panel of modes): powers by products in float64, and from them the table.
template <class T, class P>
__global__ void __launch_bounds__(table_threads) powers_kernel(Discretization disc, Params<P> params, Index M, Tables<T> tables) {
    using S = Sizes<T>;
    const Index h = blockIdx.x, panel = h * gridDim.y + blockIdx.y;
    device::wait_for_previous_kernel();
    complex<double>* const powers64 = tables.powers64 + panel * Tables<T>::power_size;
    auto* const powers = tables.powers + panel * Tables<T>::power_size;
    auto* const table = tables.table + panel * S::coefficients;
    const int m = static_cast<int>(threadIdx.x) % padded;
    const Index number = static_cast<Index>(blockIdx.y) * padded + m;
    const bool used = number < M;
    Mode mode{};
    if (used) mode = mode_at(disc, params, h, number);
    // Each quarter of the block has a quarter of the powers.
    constexpr int parts = table_threads / padded, each = S::chunk / parts;
    const int part = static_cast<int>(threadIdx.x) / padded, first = part * each;
    c64 power = used ? s4d::detail::raise(mode.Abar, first) : c64{};
    for (int n = first; n < first + each + (part == parts - 1 ? 1 : 0); ++n) {
        powers64[n * padded + m] = power;
        powers[n * padded + m] = {Power<T>(static_cast<float>(power.re)), Power<T>(static_cast<float>(power.im))};
        if (n < S::chunk) {
            const c64 x = power * mode.Bbar;
            const int at = device::blocked<S::wide>(S::chunk - 1 - n, m / 8 * 16 + m % 8);
            table[at] = device::store_as<typename Form<T>::Element>(factor<T>(static_cast<float>(x.re)));
            table[at + 64] = device::store_as<typename Form<T>::Element>(factor<T>(static_cast<float>(x.im)));
        }
        power = power * mode.Abar;
    }
}

/// conj(C^T C), or C for real_parts. Block (head, mix_rows rows, panel of columns).
template <class T, class P>
__global__ void __launch_bounds__(table_threads) mix_kernel(Readout readout, View<const complex<P>, 3> C, Index M, Tables<T> tables) {
    using S = Sizes<T>;
    const Index h = blockIdx.x, panels = gridDim.z;
    device::wait_for_previous_kernel();
    for (int i = static_cast<int>(threadIdx.x); i < mix_rows * padded; i += table_threads) {
        const int n = static_cast<int>(blockIdx.y) * mix_rows + i / padded, k = static_cast<int>(blockIdx.z) * padded + i % padded;
        auto* const mix = tables.mix + ((h * panels + n / padded) * panels + blockIdx.z) * S::mix;
        c64 x{};
        if (n < M && k < M) {
            if (readout == Readout::real_parts)
                x = cast<double>(C(h, n, k));
            else
                for (Index j = 0; j < M; ++j) x += conj(cast<double>(C(h, j, n)) * cast<double>(C(h, j, k)));
        }
        const int at = device::blocked<S::wide>(n % padded, k % padded / 8 * 16 + k % 8);
        mix[at] = device::store_as<typename Form<T>::Element>(factor<T>(static_cast<float>(x.re)));
        mix[at + 64] = device::store_as<typename Form<T>::Element>(factor<T>(static_cast<float>(x.im)));
    }
}

template <class T, class P>
Status make_tables(const cuda& exec, const Options& options, const Params<P>& params, const Shape& s, const Panels& panels, const Tables<T>& tables) {
    const auto heads = static_cast<unsigned>(s.kv_heads), of_modes = static_cast<unsigned>(panels.modes);
    INTERSTATE_RETURN_IF_ERROR(launch(exec, "powers_kernel", powers_kernel<T, P>, {dim3(heads, of_modes), dim3(table_threads), 0, true}, options.disc,
                                      params, s.modes, tables));
    return launch(exec, "mix_kernel", mix_kernel<T, P>, {dim3(heads, of_modes * padded / mix_rows, of_modes), dim3(table_threads), 0, true}, options.readout,
                  params.C, s.modes, tables);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
