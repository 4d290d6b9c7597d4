// The steps that forward and backward of a chunk are made of: products of one group of 8 warps, which share a chunk's
// tokens. What a step writes to shared memory is read by others after a barrier.
// Equation numbers: docs/ops/interdomain.md.
#pragma once

#include <interdomain/detail/cuda_chunk_form.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace interdomain::detail::chunks {
inline namespace INTERSTATE_KERNELS {

inline constexpr int group_warps = 8, group_threads = 32 * group_warps;

/// Waits for the `threads` threads that share barrier `id`.
template <int threads>
__device__ void wait_for_group(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(threads) : "memory");
}

template <class T>
struct Steps {
    using S = Sizes<T>;
    using F = Form<T>;
    using E = typename F::Element;
    static constexpr int chunk = S::chunk, wide = S::wide;
    static constexpr int row_groups = chunk / 16, column_groups = group_warps / row_groups;
    /// Tiles of a warp where columns are modes (of the wide axis), where they are features, and where they are tokens.
    static constexpr int wide_tiles = wide / 8 / column_groups, feature_tiles = padded / 8 / column_groups;
    static constexpr int token_tiles = chunk / 8 / column_groups < 2 ? 2 : chunk / 8 / column_groups;
    using WideTiles = float[wide_tiles][4];
    using TokenTiles = float[token_tiles][4];
    using FeatureTiles = float[feature_tiles][4];

    Lane lane;
    int row_group, column_group, row;  // row: the first of the warp's 16
    __device__ Steps()
        : row_group(static_cast<int>(threadIdx.x / 32 % row_groups)),
          column_group(static_cast<int>(threadIdx.x / 32 % group_warps / row_groups)),
          row(16 * row_group) {}

    __device__ int wide_column() const { return column_group * 8 * wide_tiles; }
    __device__ int feature_column() const { return column_group * 8 * feature_tiles; }
    __device__ int token_column() const { return column_group * 8 * token_tiles; }
    /// First column of the table that rows of this warp's tokens reach: lags of at most row + 15.
    __device__ int first_lag() const { return chunk - 16 * (row_group + 1); }

    /// Products x[t].y[s] of a warp's tokens; only of a warp that has an s as early as a t.
    __device__ bool has_scores() const { return token_column() < chunk && token_column() <= row + 15; }
    __device__ void add_scores(TokenTiles& c, const E* x, const E* y) const {
        device::multiply<F::precision, padded>(c, device::as_stored<padded>(x), row, device::as_stored<padded>(y), token_column(), 0, lane.index);
    }
    /// to[t][chunk - 1 - t + s], s <= t: shifted so that columns are lags, from the longest one down.
    __device__ void put_scores(const TokenTiles& c, E* to) const {
        put_shifted<-8>(c, to, token_column(), chunk - 1 - (row + lane.group), row_group);
    }
    __device__ void scores(const E* x, const E* y, E* to) const {
        if (!has_scores()) return;
        TokenTiles c;
        device::clear(c);
        add_scores(c, x, y);
        put_scores(c, to);
    }
    /// Puts element (t, first + ...) of c `shift` columns on in a (chunk, chunk) matrix; from a lane's first row to its
    /// second, 8 below, the shift grows by `step`. Of the block `edge` of 16 columns half comes to lie outside: it leaves zeros
    /// where, 16 (row_group + 1) columns off, the other half wants them. What is beyond that block is left out.
    template <int step>
    __device__ void put_shifted(const TokenTiles& c, E* to, int first, int shift, int edge) const {
        const int wrap = (step < 0 ? -128 : 128) * (row_group + 1);
#pragma unroll
        for (int parity = 0; parity < 2; ++parity) {
            const int column = first + 2 * lane.quad + parity + shift;
            E* const at = to + device::blocked<chunk>(row + lane.group, 0) + (column >> 3) * 64 + (column & 7);
#pragma unroll
            for (int i = 0; i < token_tiles; ++i) {
                const int block = first / 16 + i / 2;
                if (step < 0 ? block > edge : block < edge) continue;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    E* const place = at + (e * 8 * chunk + (i + e * step / 8) * 64);
                    const float x = factor<T>(c[i][2 * e + parity]);
                    if (block == edge) {
                        const int there = column + 8 * i + e * step;
                        const bool inside = step < 0 ? there < chunk : there >= 0;
                        place[inside ? 0 : wrap] = device::store_as<E>(inside ? x : 0.0f);
                    } else {
                        *place = device::store_as<E>(x);
                    }
                }
            }
        }
    }

    /// f(i, e, at, t, m): for the numbers of a WideTiles: tiles i and i + 1 have real and imaginary parts, e and e + 1 are
    /// neighbouring modes m and m + 1 of one token; `at` is the real part's place in a blocked (chunk, wide) matrix.
    template <class Function>
    __device__ void each_pair(Function&& f) const {
        const int t = row + lane.group;
        const int at = device::blocked<wide>(t, wide_column()) + 2 * lane.quad, m = wide_column() / 2 + 2 * lane.quad;
#pragma unroll
        for (int i = 0; i < wide_tiles; i += 2)
#pragma unroll
            for (int e = 0; e < 4; e += 2) f(i, e, at + 64 * i + e * 4 * wide, t + 4 * e, m + 4 * i);
    }
    /// The powers Lam^(t+1) of a WideTiles.
    class Powers {
      public:
        __device__ Powers(const Steps& steps, const complex<Power<T>>* powers) {
            steps.each_pair([&](int i, int e, int, int t, int m) {
                x_[i / 2][e / 2] = *reinterpret_cast<const Two*>(powers + (t + 1) * padded + m);
            });
        }
        /// Of two neighbouring modes, in a lane's pair e of tile i.
        __device__ float4 operator()(int i, int e) const {
            const complex<Power<T>>(&x)[2] = x_[i / 2][e / 2].x;
            return {device::load_as<float>(x[0].re), device::load_as<float>(x[0].im), device::load_as<float>(x[1].re), device::load_as<float>(x[1].im)};
        }

      private:
        struct alignas(2 * sizeof(complex<Power<T>>)) Two {
            complex<Power<T>> x[2];
        };
        Two x_[wide_tiles / 2][2];
    };

    /// X x[t].
    __device__ void add_products_with_state(WideTiles& c, const E* x, const E* state) const {
        device::multiply<F::precision, padded>(c, device::as_stored<padded>(x), row, device::as_stored<padded>(state), wide_column(), 0, lane.index);
    }
    /// c by Lam^(t+1) or its conjugate.
    template <bool conjugate>
    __device__ void turn(WideTiles& c, const Powers& powers) const {
        each_pair([&](int i, int e, int, int, int) {
            const float4 p = powers(i, e);
            const float y = conjugate ? -p.y : p.y, w = conjugate ? -p.w : p.w;
            const float re0 = c[i][e], re1 = c[i][e + 1], im0 = c[i + 1][e], im1 = c[i + 1][e + 1];
            c[i][e] = p.x * re0 - y * im0;
            c[i + 1][e] = p.x * im0 + y * re0;
            c[i][e + 1] = p.z * re1 - w * im1;
            c[i + 1][e + 1] = p.z * im1 + w * re1;
        });
    }
    /// Lam^(t+1) o c.
    __device__ void age(WideTiles& c, const Powers& powers) const { turn<false>(c, powers); }
    /// conj(Lam)^(t+1) o conj(w).
    __device__ void scale(WideTiles& c, const Powers& powers) const { turn<true>(c, powers); }
    /// What the entering state adds: Lam^(t+1) (X x[t]).
    __device__ void coefficients_of_state(WideTiles& c, const E* x, const E* state, const Powers& powers) const {
        device::clear(c);
        add_products_with_state(c, x, state);
        age(c, powers);
    }
    /// And what the chunk's own tokens add.
    __device__ void add_coefficients_of_chunk(WideTiles& c, const E* scores, const E* table) const {
        device::multiply<F::precision>(c, device::as_stored<chunk>(scores), row, device::transposed<wide>(table), wide_column(),
                                       first_lag(), chunk - first_lag(), lane.index);
    }
    __device__ void put_conjugates(const WideTiles& c, E* to) const {
        each_pair([&](int i, int e, int at, int, int) {
            put_factors<T>(to + at, c[i][e], c[i][e + 1]);
            put_factors<T>(to + at + 64, -c[i + 1][e], -c[i + 1][e + 1]);
        });
    }
    __device__ void put(const WideTiles& c, E* to) const {
        each_pair([&](int i, int e, int at, int, int) {
            put_factors<T>(to + at, c[i][e], c[i][e + 1]);
            put_factors<T>(to + at + 64, c[i + 1][e], c[i + 1][e + 1]);
        });
    }

    __device__ void get(WideTiles& c, const E* from) const {
        each_pair([&](int i, int e, int at, int, int) {
            const float2 re = device::get_pair(from + at), im = device::get_pair(from + at + 64);
            c[i][e] = re.x, c[i][e + 1] = re.y;
            c[i + 1][e] = im.x, c[i + 1][e + 1] = im.y;
        });
    }

    /// WideTiles as they are put, to be multiplied by what comes later.
    struct alignas(2 * sizeof(E)) Pair {
        E x[2];
    };
    using Kept = Pair[wide_tiles][2];
    __device__ void keep(const WideTiles& c, Kept& kept) const {
#pragma unroll
        for (int i = 0; i < wide_tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; e += 2) device::put_pair(kept[i][e / 2].x, c[i][e], c[i][e + 1]);
    }
    __device__ void put_kept(const WideTiles& c, E* to) const {
        each_pair([&](int i, int e, int at, int, int) {
            device::put_pair(to + at, c[i][e], c[i][e + 1]);
            device::put_pair(to + at + 64, c[i + 1][e], c[i + 1][e + 1]);
        });
    }
    __device__ void get_kept(Kept& kept, const E* from) const {
        each_pair([&](int i, int e, int at, int, int) {
            kept[i][e / 2] = *reinterpret_cast<const Pair*>(from + at);
            kept[i + 1][e / 2] = *reinterpret_cast<const Pair*>(from + at + 64);
        });
    }
    /// Sums over a warp's tokens of what is given for each of its modes, a few of them in each lane.
    static constexpr int scaled_count = wide_tiles / 4;
    using ScaledSums = float[scaled_count];
    /// sums += sum_t (t + 1) conj(p[t,m]) conj(kept[t,m]); p as conjugates.
    __device__ void add_scaled(ScaledSums& sums, const Kept& kept, const E* p) const {
        constexpr int count = 8 * scaled_count;  // of floats: numbers of a tile pair's two modes, tile after tile
        float sum[count] = {};
        each_pair([&](int i, int e, int at, int t, int) {
            const float2 pr = device::get_pair(p + at), pi = device::get_pair(p + at + 64);
            const float2 ar = device::get_pair(kept[i][e / 2].x), ai = device::get_pair(kept[i + 1][e / 2].x);
            const float age = static_cast<float>(t + 1);
            sum[2 * i] += age * (pr.x * ar.x + pi.x * ai.x);
            sum[2 * i + 1] += age * (pi.x * ar.x - pr.x * ai.x);
            sum[2 * i + 2] += age * (pr.y * ar.y + pi.y * ai.y);
            sum[2 * i + 3] += age * (pi.y * ar.y - pr.y * ai.y);
        });
        // Over the lanes of a column: each exchange leaves a lane half of the sums.
#pragma unroll
        for (int lanes = 16, left = count / 2; lanes >= 4; lanes /= 2, left /= 2) {
            const bool upper = lane.index & lanes;
#pragma unroll
            for (int j = 0; j < count / 2; ++j) {
                if (j >= left) continue;
                const float other = __shfl_xor_sync(0xffffffffu, upper ? sum[j] : sum[j + left], lanes);
                sum[j] = (upper ? sum[j + left] : sum[j]) + other;
            }
        }
#pragma unroll
        for (int j = 0; j < scaled_count; ++j) sums[j] += sum[j];
    }
    /// f(m, part, sum) for a lane's sums: part 0 of a number is real.
    template <class Function>
    __device__ void each_scaled(const ScaledSums& sums, Function&& f) const {
        // Lane bits 4, 3 and 2 have chosen the upper halves.
        const int first = (lane.index / 16 % 2 * 4 + lane.index / 8 % 2 * 2 + lane.index / 4 % 2) * scaled_count;
#pragma unroll
        for (int j = 0; j < scaled_count; ++j) {
            const int number = (first + j) / 2;
            f(wide_column() / 2 + number / 2 * 8 + 2 * lane.quad + number % 2, (first + j) % 2, sums[j]);
        }
    }

    /// conj(w) += conj(C^T C) conj(a) (eq. 15).
    __device__ void add_mixed(WideTiles& c, const E* a, const E* mix) const {
        device::multiply_complex<F::precision, wide>(c, device::as_stored<wide>(a), row, device::as_stored<wide>(mix), wide_column() / 2, lane.index);
    }
    __device__ void read_out(WideTiles& c, const E* a, const E* mix) const {
        device::clear(c);
        add_mixed(c, a, mix);
    }
    /// For real_parts in two steps: s = 2 Re(C a), then conj(w) = conj(2 C^T s).
    __device__ void add_half_of_real_parts(FeatureTiles& c, const E* a, const E* mix) const {
        device::multiply<F::precision, wide>(c, device::as_stored<wide>(a), row, device::as_stored<wide>(mix), feature_column(), 0, lane.index);
    }
    __device__ void put_doubled(const FeatureTiles& c, E* s) const {
#pragma unroll
        for (int i = 0; i < feature_tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; e += 2)
                put_factors<T>(s + device::blocked<padded>(row + lane.group, feature_column()) + 2 * lane.quad + 64 * i + e * 4 * padded,
                               2.0f * c[i][e], 2.0f * c[i][e + 1]);
    }
    __device__ void real_parts(const E* a, const E* mix, E* s) const {
        FeatureTiles c;
        device::clear(c);
        add_half_of_real_parts(c, a, mix);
        put_doubled(c, s);
    }
    __device__ void add_mixed_real(WideTiles& c, const E* s, const E* mix) const {
        device::multiply<F::precision, padded>(c, device::as_stored<padded>(s), row, device::transposed<wide>(mix), wide_column(), 0, lane.index);
    }
    __device__ void double_and_conjugate(WideTiles& c) const {
#pragma unroll
        for (int i = 0; i < wide_tiles; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) c[i][e] *= i % 2 == 0 ? 2.0f : -2.0f;
    }
    __device__ void read_out_real(WideTiles& c, const E* s, const E* mix) const {
        device::clear(c);
        add_mixed_real(c, s, mix);
        double_and_conjugate(c);
    }

    /// Re sum_m w[t,m] Lam[m]^n Bbar[m] (eq. 16) of a warp's tokens; only of a warp that has a lag n <= t.
    __device__ bool has_weights() const { return token_column() < chunk && token_column() + 8 * token_tiles > first_lag(); }
    __device__ void add_weights(TokenTiles& c, const E* w, const E* table) const {
        device::multiply<F::precision, wide>(c, device::as_stored<wide>(w), row, device::as_stored<wide>(table), token_column(), 0, lane.index);
    }
    /// P[t][s], s <= t; zero within 16 tokens after t.
    __device__ void put_weights(const TokenTiles& c, E* to) const {
        put_shifted<8>(c, to, token_column(), row + lane.group - (chunk - 1), first_lag() / 16);
    }
    __device__ void weights(const E* w, const E* table, E* to) const {
        if (!has_weights()) return;
        TokenTiles c;
        device::clear(c);
        add_weights(c, w, table);
        put_weights(c, to);
    }
};

/// Rows of a warp: sum_{s <= t} P[t][s] v[s] + Re(X^T (Lam^(t+1) w[t])), w as scaled conjugates.
template <class T, int tiles>
__device__ void read_tokens(float (&c)[tiles][4], const typename Form<T>::Element* weights, const typename Form<T>::Element* tokens,
                            const typename Form<T>::Element* scaled, const typename Form<T>::Element* state, int row, int first, int lane) {
    using F = Form<T>;
    constexpr int chunk = F::chunk, wide = Sizes<T>::wide;
    device::multiply<F::precision>(c, device::as_stored<chunk>(weights), row, device::transposed<padded>(tokens), first, 0, row + 16, lane);
    device::multiply<F::precision, wide>(c, device::as_stored<wide>(scaled), row, device::transposed<padded>(state), first, 0, lane);
}

/// c += conj(e^T a), numbers of 16 modes of e by 16 of a, summed over the tokens; tiles i real, i + 1 imaginary.
template <class T>
__device__ void multiply_mix(float (&c)[4][4], int mix_row, int mix_column, const typename Form<T>::Element* e, const typename Form<T>::Element* a,
                             int lane) {
    using F = Form<T>;
    constexpr int wide = Sizes<T>::wide;
    const auto real_of_e = device::rows_of<16>(device::transposed<wide>(e), 32 * mix_row, 0, lane);
    const auto imaginary_of_e = device::rows_of<16>(device::transposed<wide>(e), 32 * mix_row + 8, 0, lane);
    const auto from_a = device::columns_of(device::transposed<wide>(a), 32 * mix_column, 0, lane);
    device::Sums<F::precision, 4> sums(c);
#pragma unroll
    for (int t = 0; t < F::chunk; t += device::depth<F::precision>) {
        device::Factors<float, F::precision, 2> real, imaginary;
        real_of_e.load(real, 0, t);
        imaginary_of_e.load(imaginary, 0, t);
        const auto minus = device::negated(imaginary);
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            device::Factors<float, F::precision, 1> fa[2];
            from_a.load(fa, 8 * i, t);
            sums.add(i, real, fa[0]);
            sums.add(i + 1, real, fa[1]);
            sums.add(i, minus, fa[1]);
            sums.add(i + 1, imaginary, fa[0]);
        }
    }
    sums.finish();
}

/// A warp's tiles into a blocked matrix of `columns` columns.
template <int columns, int tiles, class E>
__device__ void put_tiles(const float (&c)[tiles][4], E* to, int row, int first, const Lane& lane) {
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; e += 2)
            device::put_pair(to + device::blocked<columns>(row + lane.group, first) + 2 * lane.quad + 64 * i + e * 4 * columns, c[i][e], c[i][e + 1]);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace interdomain::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
