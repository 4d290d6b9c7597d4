// What the chunked method of S4D on the GPU knows of a channel: forms and tables (docs/ops/s4d.md, eq. 16, 19).
//
// Numerics: tables are formed in float64. float32 is kept by splitting factors of products into two tf32 numbers;
// float16 cuts them to tf32, which has its 11 bits; bfloat16 rounds them to bfloat16.
#pragma once

#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/mma.cuh>
#include <s4d/detail/cuda_system.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail::chunks {

using device::Precision;

/// How a storage type is computed: what products make of their factors, how tables and tiles hold them, and how
/// many tokens a chunk has. Factors in bfloat16 take half the room, so chunks are twice as long.
template <class T>
struct Form {
    using A = acc_t<T>;
    using Factor = A;
    static constexpr Precision precision = sizeof(T) == 2 ? Precision::cut : Precision::exact;
    static constexpr int chunk = 16;
};
template <>
struct Form<bf16> {
    using A = float;
    using Factor = bf16;
    static constexpr Precision precision = Precision::bfloat;
    static constexpr int chunk = 32;
};

inline constexpr int tile_chunks = 32;
template <class T>
inline constexpr int tile_tokens = tile_chunks * Form<T>::chunk;
inline constexpr int own = tile_chunks / 8;      // consecutive chunks of a thread
inline constexpr int max_run_modes = 64;         // more do not fit into shared memory
static_assert(Form<bf16>::chunk <= max_lags);

/// Powers with which a mode is carried: over a chunk, over 1, 2 and 4 times the chunks of a thread, what the
/// product of their roundings lacks of A to all 32 chunks, and A itself.
enum ChunkPower { over_chunk, over_own, over_2_own, over_4_own, correction, over_token };

/// Tables of a channel: one array of A, in the order in which lanes read it. Modes are padded to groups of
/// four (an mma is 8 wide), groups to pairs; what is padded is zero.
template <class T>
struct ChunkTables {
    using A = acc_t<T>;
    using Factor = typename Form<T>::Factor;
    static constexpr int chunk = Form<T>::chunk;
    static constexpr int factors = 8 * chunk;  // of a group, in V and in M
    static constexpr int factors_size = factors * static_cast<int>(sizeof(Factor)) / static_cast<int>(sizeof(A));
    static constexpr int mode_powers = 12, power_size = 4 * mode_powers;  // per mode and group: ChunkPower, complex
    int groups;

    INTERSTATE_HD explicit constexpr ChunkTables(Index modes) : groups(static_cast<int>((modes + 7) / 8 * 2)) {}
    /// Per group: V_at of beta A^(chunk-1-s), and M_at of gamma A^t.
    INTERSTATE_HD constexpr int V(int group) const { return group * factors_size; }
    INTERSTATE_HD constexpr int M(int group) const { return (groups + group) * factors_size; }
    INTERSTATE_HD constexpr int power(int group, int mode) const {
        return 2 * groups * factors_size + group * power_size + mode * mode_powers;
    }
    INTERSTATE_HD constexpr int K() const { return groups * (2 * factors_size + power_size); }
    INTERSTATE_HD constexpr int size() const { return K() + lags_before + chunk; }
    /// Pairs (K[lag], K[lag-1]) as a right factor holds them, or K[lag] where it holds single numbers; zeros before lag 0.
    static constexpr int lags_before = 8 * device::k_pairs<Form<T>::precision>;
    INTERSTATE_HD constexpr int K_at(int lag) const { return K() + lags_before + lag; }

    /// Factors of a group: a lane reads chunk / 4 in a row, its pairs of tokens 8 i + 2 quad + {0, 1} of one
    /// column (V; a column is a mode's real or imaginary part), or its pairs (re, im) of tokens 8 i + group (M).
    INTERSTATE_HD static constexpr int V_at(int mode, int part, int token) {
        return (2 * mode + part) * chunk + chunk / 4 * (token % 8 / 2) + 2 * (token / 8) + token % 2;
    }
    INTERSTATE_HD static constexpr int M_at(int mode, int part, int token) {
        return (token % 8 * 4 + mode) * (chunk / 4) + 2 * (token / 8) + part;
    }
};

inline namespace INTERSTATE_KERNELS {

/// Four neighbours in shared memory.
template <class A>
struct alignas(4 * sizeof(A) < 16 ? 4 * sizeof(A) : 16) Four {
    A x[4];
};
template <class A>
__device__ Four<A>& four(A* p) {
    return *reinterpret_cast<Four<A>*>(p);
}
template <class A>
__device__ const Four<A>& four(const A* p) {
    return *reinterpret_cast<const Four<A>*>(p);
}
template <class A>
__device__ void put(A* p, complex<A> z) {
    p[0] = z.re;
    p[1] = z.im;
}
/// a * x + b. The functions of the global namespace: the CPU kernels have an fma of their own.
template <class A>
__device__ complex<A> affine(complex<A> a, complex<A> x, complex<A> b) {
    return {::fma(a.re, x.re, ::fma(-a.im, x.im, b.re)), ::fma(a.re, x.im, ::fma(a.im, x.re, b.im))};
}

/// A factor as tables hold it.
template <class T>
__device__ typename Form<T>::Factor factor_of(double x) {
    const auto rounded = static_cast<acc_t<T>>(x);
    if constexpr (Form<T>::precision == Precision::cut) {
        std::uint32_t bits;
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(rounded));
        return __uint_as_float(bits);
    } else if constexpr (Form<T>::precision == Precision::bfloat) {
        return device::store_as<bf16>(rounded);
    } else {
        return rounded;
    }
}
/// What cutting to tf32 takes from a factor on average, 2^-11 times the mean of 1 / mantissa, is given back by
/// the other one.
template <class T>
inline constexpr double uncut = Form<T>::precision == Precision::cut ? 1.0 + 0x1p-11 * 0.7213 : 1.0;

inline constexpr int table_parts = 4;  // threads a mode
template <class T>
inline constexpr int part_powers = Form<T>::chunk / table_parts;

/// Fills a part of one mode's tables: part_powers powers from A^(part_powers part).
template <class T>
__device__ void fill_mode(acc_t<T>* table, const ChunkTables<T>& at, int n, int part, const SystemMode& m) {
    using A = acc_t<T>;
    constexpr int chunk = Form<T>::chunk;
    const int group = n / 4, mode = n % 4;
    c64 step = m.A;
    for (int l = 1; l < part_powers<T>; l *= 2) step = step * step;
    c64 power{1.0, 0.0};
    for (int l = 0; l < part; ++l) power = power * step;
    auto* const V = reinterpret_cast<typename Form<T>::Factor*>(table + at.V(group));
    auto* const M = reinterpret_cast<typename Form<T>::Factor*>(table + at.M(group));
    for (int l = part_powers<T> * part; l < part_powers<T> * (part + 1); ++l) {
        const c64 v = power * m.beta, w = uncut<T> * (power * m.gamma);
        V[at.V_at(mode, 0, chunk - 1 - l)] = factor_of<T>(v.re);
        V[at.V_at(mode, 1, chunk - 1 - l)] = factor_of<T>(v.im);
        M[at.M_at(mode, 0, l)] = factor_of<T>(w.re);
        M[at.M_at(mode, 1, l)] = factor_of<T>(-w.im);
        power = power * m.A;
    }
    if (part != 0) return;
    A* const out = table + at.power(group, mode);
    const auto put_power = [&](ChunkPower which, c64 z) {
        const complex<A> rounded = cast<A>(z);
        put(out + 2 * which, rounded);
        return cast<double>(rounded);
    };
    c64 exact = step;
    for (int l = 1; l < table_parts; l *= 2) exact = exact * exact;
    c64 carried = put_power(over_chunk, exact);
    for (int r = 1; r < own; r *= 2) {
        carried = carried * carried;
        exact = exact * exact;
    }
    for (const ChunkPower which : {over_own, over_2_own, over_4_own}) {
        carried = carried * put_power(which, exact);
        exact = exact * exact;
    }
    put_power(correction, exact - carried);
    put_power(over_token, m.A);
}

/// One block a channel, four threads a mode: the tables of some modes of a half's system and, where asked for, of the
/// exchanged one, made in shared memory. The first modes have the feedthrough.
template <class T, class P>
__global__ void __launch_bounds__(table_parts* max_run_modes)
    chunk_tables_kernel(Discretization disc, Params<P> p, Half half, Index N, ModeRange range, SystemMode* modes,
                        acc_t<T>* tables, acc_t<T>* exchanged) {
    using A = acc_t<T>;
    constexpr int chunk = Form<T>::chunk;
    extern __shared__ __align__(16) unsigned char shared[];
    A* const table = reinterpret_cast<A*>(shared);
    const Index h = blockIdx.x;
    const int thread = static_cast<int>(threadIdx.x), n = thread % max_run_modes, part = thread / max_run_modes;
    const ChunkTables<T> at(range.count);
    const bool used = n < 4 * at.groups, feeds = range.first == 0 && half == Half::causal && p.D;
    __shared__ SystemMode shared_modes[max_run_modes];
    __shared__ double sums[max_run_modes / 32][chunk + 1];  // K by warps of modes, and K0 at the end
    double K0 = 0.0;
    if (part == 0) {
        SystemMode m{};
        if (n < range.count) {
            m = system_mode(disc, p, half, h, range.first + n, K0);
            modes[h * N + range.first + n] = m;
        }
        shared_modes[n] = m;
        for (int d = 16; d > 0; d /= 2) K0 += __shfl_xor_sync(0xffffffffu, K0, d);
        if (n % 32 == 0) sums[n / 32][chunk] = K0;
    }
    __syncthreads();
    const SystemMode m = shared_modes[n];
    if (used) fill_mode<T>(table, at, n, part, m);
    // K[l + 1] = Re sum_n gamma A^l beta.
    c64 response = m.beta * m.gamma;
    for (int i = 0; i < part_powers<T> * part; ++i) response = response * m.A;
    for (int i = 0; i < part_powers<T>; ++i) {
        double K = response.re;
        for (int d = 16; d > 0; d /= 2) K += __shfl_xor_sync(0xffffffffu, K, d);
        if (n % 32 == 0) sums[n / 32][part_powers<T> * part + i] = K;
        response = response * m.A;
    }
    __syncthreads();
    const int lag = thread - at.lags_before;
    if (lag < chunk) {
        const auto K = [&](int l) {
            if (l < 0) return 0.0;
            double sum = l == 0 && feeds ? static_cast<double>(p.D(h)) : 0.0;
            for (int warp = 0; warp < max_run_modes / 32; ++warp) sum += sums[warp][l == 0 ? chunk : l - 1];
            return sum;
        };
        if constexpr (Form<T>::precision == Precision::bfloat)
            table[at.K_at(lag)] =
                __uint_as_float(device::pack<bf16>(static_cast<float>(K(lag)), static_cast<float>(K(lag - 1))));
        else
            table[at.K_at(lag)] = factor_of<T>(K(lag));
    }
    const auto write_out = [&](A* to) {
        __syncthreads();
        for (int i = thread; i < at.size() / 4; i += static_cast<int>(blockDim.x))
            four(to + h * at.size() + 4 * i) = four(table + 4 * i);
    };
    write_out(tables);
    if (!exchanged) return;
    __syncthreads();
    if (used) fill_mode<T>(table, at, n, part, {m.A, m.gamma, m.beta});  // K is the same
    write_out(exchanged);
}

/// The carrying powers of a mode, from shared memory.
template <class A>
struct Powers {
    complex<A> chunk, own, two, four_;
    __device__ explicit Powers(const A* p) {
        const Four<A> a = four(p), b = four(p + 4);
        chunk = {a.x[0], a.x[1]};
        own = {a.x[2], a.x[3]};
        two = {b.x[0], b.x[1]};
        four_ = {b.x[2], b.x[3]};
    }
};
/// One of them.
template <class A>
__device__ complex<A> power_of(const A* p, ChunkPower which) {
    return {p[2 * which], p[2 * which + 1]};
}

/// What a lane reads of V or M: pairs, as right factors.
template <class T>
struct TablePairs {
    using A = acc_t<T>;
    static constexpr Precision precision = Form<T>::precision;
    A x[Form<T>::chunk / 4];
    __device__ TablePairs(const typename Form<T>::Factor* table, int lane_place) {
        const Four<A> v = four(table + lane_place * (Form<T>::chunk / 4));
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = v.x[e];
    }
    /// Pair i as pair k_pair of f.
    __device__ void as(device::Factors<A, precision, 1>& f, int k_pair, int i) const {
        f.set(0, k_pair, x[2 * i], x[2 * i + 1]);
    }
    /// (K[lag], K[lag-1]) as pair k_pair of f, K = K_at(lag) of the table.
    __device__ static void lags(device::Factors<A, precision, 1>& f, int k_pair, const A* K) { f.set(0, k_pair, K[0], K[-1]); }
};
template <>
struct TablePairs<bf16> {
    std::uint32_t x[4];
    __device__ TablePairs(const bf16* table, int lane_place) {
        const Four<std::uint32_t> v = four(reinterpret_cast<const std::uint32_t*>(table) + 4 * lane_place);
#pragma unroll
        for (int e = 0; e < 4; ++e) x[e] = v.x[e];
    }
    __device__ void as(device::Factors<float, Precision::bfloat, 1>& f, int k_pair, int i) const {
        f.set_packed(0, k_pair, x[i]);
    }
    __device__ static void lags(device::Factors<float, Precision::bfloat, 1>& f, int k_pair, const float* K) {
        f.set_packed(0, k_pair, __float_as_uint(K[0]));
    }
};

}  // namespace INTERSTATE_KERNELS

}  // namespace s4d::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
