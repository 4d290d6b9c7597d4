// Powers of Abar on the CPU: what the chunked method, the fft method and kernel generation stand on.
// Equation numbers: docs/ops/s4d.md.
//
// One small table a mode serves them all: P[k] = Abar^k for k below 16, formed in float64. Time is cut
// into chunks of 16 tokens, and everything that touches tokens is one of three products with tables, in
// registers, lanes = channels:
//
//     collect    w[r]   = sum_k P[k] z[r,k]               tokens of chunk r -> a complex number per mode
//     spread     y[r,k] += sum_n Re(P[n,k] Y[r,n])        a complex number per mode -> tokens of chunk r
//     convolve   y[r,k] = sum_{j<=k} K[j] u[r,k-j]        within a chunk
//
// each with k running forwards or backwards in time (`step` is the distance of tokens k and k+1). From
// chunk to chunk, numbers per mode are carried by Abar^16; from tile to tile of 256 tokens in float64 by
// Abar^256, because a float power, or a float state rounded 4,096 times, would drift (the page, "Phase").
#pragma once

#include <s4d/detail/cpu_tile.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail {

inline constexpr int chunk_tokens = 16;
inline constexpr int tile_chunks = tile_tokens / chunk_tokens;
inline constexpr int row_group = 4;  // chunks that share the loads of a table, in registers
inline constexpr Index group_tokens = row_group * chunk_tokens;
inline constexpr Index mode_block = 8;  // modes whose tables stay in L1 while a tile passes

/// Chunks of a tile, the last one perhaps short, and how many with whole groups.
struct TileRows {
    Index whole, last, padded;
    explicit TileRows(Index count)
        : whole(count / chunk_tokens),
          last(count % chunk_tokens),
          padded(ceil_div(count, group_tokens) * row_group) {}
};

/// Rows of W lanes a mode, in float64: (re, im) of each.
struct Exact {
    enum Row {
        Abar = 0,
        chunk = 2,       // Abar^16
        tile = 4,        // Abar^256
        tile_slope = 6,  // 256 Abar^255
        Bbar = 8,
        C = 10,          // 2 C
        C_reverse = 12,  // 2 C_reverse
        rows = 14
    };
};
/// Rows of W lanes a mode, in the accumulator dtype.
struct Coefficients {
    enum Row {
        chunk = 0,        // Abar^16
        chunk_slope = 2,  // 16 Abar^15
        Bbar = 4,
        out = 6,          // 2 C Abar, and the same of C_reverse
        out_reverse = 8,
        rows = 10
    };
};

/// The tables of one block of W channels.
template <class A>
struct PowerTables {
    A* power;        // (N, 16, slopes ? 2 : 1, re/im, W): Abar^k and, with slopes, k Abar^(k-1)
    A* coefficient;  // (N, Coefficients::rows, W)
    double* exact;   // (N, Exact::rows, W)
    A* kernel;       // (2, 16, W): K[k] of each direction, D in the first element of the causal one
};

/// The tables of all blocks.
template <class A>
struct PowerLayout {
    PowerTables<A> first;
    Index modes, W;
    bool slopes;

    PowerLayout(Arena& arena, const Shape& s, bool with_slopes, Index lanes)
        : modes(s.modes), W(lanes), slopes(with_slopes) {
        const Index blocks = ceil_div(s.channels, W);
        first.power = arena.take<A>(blocks * power_size());
        first.coefficient = arena.take<A>(blocks * modes * Coefficients::rows * W);
        first.exact = arena.take<double>(blocks * modes * Exact::rows * W);
        first.kernel = arena.take<A>(blocks * 2 * chunk_tokens * W);
    }
    Index power_size() const { return modes * chunk_tokens * (slopes ? 4 : 2) * W; }
    PowerTables<A> block(Index b) const {
        return {first.power + b * power_size(), first.coefficient + b * modes * Coefficients::rows * W,
                first.exact + b * modes * Exact::rows * W, first.kernel + b * 2 * chunk_tokens * W};
    }
};

template <class V>
INTERSTATE_INLINE Complexes<V> operator*(const Complexes<V>& a, const Complexes<V>& b) {
    return {simd::fnma(a.im, b.im, a.re * b.re), simd::fma(a.im, b.re, a.re * b.im)};
}
/// a * b + c
template <class V>
INTERSTATE_INLINE Complexes<V> fma(const Complexes<V>& a, const Complexes<V>& b, const Complexes<V>& c) {
    return {simd::fnma(a.im, b.im, simd::fma(a.re, b.re, c.re)),
            simd::fma(a.im, b.re, simd::fma(a.re, b.im, c.im))};
}
template <class V>
INTERSTATE_INLINE Complexes<V> zeros() {
    return {simd::broadcast<V>(0.0), simd::broadcast<V>(0.0)};
}
/// (re, im) rows W apart, converted to the element type of V.
template <class V, class S>
INTERSTATE_INLINE Complexes<V> load_rows(const S* p, Index W) {
    return {simd::load_as<V>(p), simd::load_as<V>(p + W)};
}
template <class V, class S>
INTERSTATE_INLINE void store_rows(S* p, Index W, const Complexes<V>& x) {
    simd::store_as(p, x.re);
    simd::store_as(p + W, x.im);
}
/// base^times
template <class V>
INTERSTATE_INLINE Complexes<V> raise(const Complexes<V>& base, Index times) {
    Complexes<V> power{simd::broadcast<V>(1.0), simd::broadcast<V>(0.0)}, square = base;
    for (; times > 0; times >>= 1) {
        if (times & 1) power = power * square;
        square = square * square;
    }
    return power;
}

/// How a body sees W lanes of the accumulator A: one vector of A, or one or two of float64.
template <class Set, class A>
struct Lanes {
    using V = simd::Native<Set, A>;
    using Wide = simd::Native<Set, double>;
    static constexpr int W = V::lanes;
    static constexpr int tokens = Set::registers == 32 ? 4 : 2;        // of spread and convolve, in registers
    static constexpr int collect_modes = Set::registers == 32 ? 2 : 1;
    static constexpr int slope_rows = Set::registers == 32 ? 4 : 2;    // of collect with slopes
};

/// Fills one block's tables from Abar, Bbar, 2C and 2C_reverse in its `exact` rows.
template <class A>
struct FillPowers {
    template <class Set>
    static INTERSTATE_INLINE void run(const PowerTables<A>& t, bool slopes, Index modes, const double* D) {
        using L = Lanes<Set, A>;
        using V = typename L::Wide;
        constexpr int W = L::W;
        for (int at = 0; at < W; at += V::lanes) {
            V K[2][chunk_tokens];
            for (int k = 0; k < chunk_tokens; ++k) K[0][k] = K[1][k] = simd::broadcast<V>(0.0);
            for (Index n = 0; n < modes; ++n) {
                double* exact = t.exact + n * Exact::rows * W + at;
                A* coefficient = t.coefficient + n * Coefficients::rows * W + at;
                A* power = t.power + n * chunk_tokens * (slopes ? 4 : 2) * W + at;
                const auto a = load_rows<V>(exact + Exact::Abar * W, W);
                const auto b = load_rows<V>(exact + Exact::Bbar * W, W);
                const auto c = load_rows<V>(exact + Exact::C * W, W);
                const auto c_reverse = load_rows<V>(exact + Exact::C_reverse * W, W);
                const auto bc = b * c, bc_reverse = b * c_reverse;
                Complexes<V> p{simd::broadcast<V>(1.0), simd::broadcast<V>(0.0)}, slope = zeros<V>();
                for (int k = 0; k < chunk_tokens; ++k) {
                    store_rows(power, W, p);
                    power += 2 * W;
                    if (slopes) {
                        store_rows(power, W, slope);
                        power += 2 * W;
                    }
                    K[0][k] = simd::fma(bc.re, p.re, simd::fnma(bc.im, p.im, K[0][k]));
                    K[1][k] = simd::fma(bc_reverse.re, p.re, simd::fnma(bc_reverse.im, p.im, K[1][k]));
                    const V next = simd::broadcast<V>(static_cast<double>(k + 1));
                    slope = {next * p.re, next * p.im};
                    p = p * a;
                }
                const auto p15 = raise(p, tile_chunks - 1);
                const V chunks = simd::broadcast<V>(static_cast<double>(tile_chunks));
                store_rows(exact + Exact::chunk * W, W, p);
                store_rows(exact + Exact::tile * W, W, p15 * p);
                store_rows(exact + Exact::tile_slope * W, W,
                           p15 * Complexes<V>{chunks * slope.re, chunks * slope.im});
                store_rows(coefficient + Coefficients::chunk * W, W, p);
                store_rows(coefficient + Coefficients::chunk_slope * W, W, slope);
                store_rows(coefficient + Coefficients::Bbar * W, W, b);
                store_rows(coefficient + Coefficients::out * W, W, c * a);
                store_rows(coefficient + Coefficients::out_reverse * W, W, c_reverse * a);
            }
            K[0][0] = K[0][0] + simd::load<V>(D + at);
            for (int d = 0; d < 2; ++d)
                for (int k = 0; k < chunk_tokens; ++k)
                    simd::store_as(t.kernel + (d * chunk_tokens + k) * W + at, K[d][k]);
        }
    }
};

/// Fills the tables of every block, everything in float64; lanes beyond the last channel are zero.
template <class A, class P>
void fill_powers(const cpu& exec, const Options& options, const Params<P>& p, const PowerLayout<A>& layout) {
    const Index H = p.log_neg_re.extent[0], N = layout.modes, W = layout.W;
    parallel_for(ceil_div(H, W), exec.threads, [&](Index block, int) {
        const PowerTables<A> t = layout.block(block);
        double D[lane_padding] = {};
        for (Index lane = 0; lane < W; ++lane) {
            const Index h = block * W + lane;
            if (h < H && p.D) D[lane] = static_cast<double>(p.D(h));
            for (Index n = 0; n < N; ++n) {
                double* exact = t.exact + n * Exact::rows * W + lane;
                const auto put = [&](Exact::Row row, c64 z) {
                    exact[row * W] = z.re;
                    exact[(row + 1) * W] = z.im;
                };
                const Mode m = h < H ? mode_at(options.disc, p, h, n) : Mode{};
                put(Exact::Abar, m.Abar);
                put(Exact::Bbar, m.Bbar);
                put(Exact::C, h < H ? 2.0 * cast<double>(p.C(h, n)) : c64{});
                put(Exact::C_reverse, h < H && p.C_reverse ? 2.0 * cast<double>(p.C_reverse(h, n)) : c64{});
            }
        }
        simd::run_body<FillPowers<A>>(exec.isa, t, layout.slopes, N, static_cast<const double*>(D));
    });
}

/// w[r][m] = sum over `tokens` of P[k] in[r, k], (2 parts, W) each, and with Parts = 4 the sums with
/// the slopes behind them.
template <int Modes, int Rows, int Parts, class V, class A>
INTERSTATE_INLINE void collect(const A* in, Index step, const A* power, Index tokens, A* w, Index w_row,
                               Index w_mode) {
    constexpr int W = V::lanes;
    V sum[Modes][Parts][Rows];
    INTERSTATE_UNROLL
    for (int m = 0; m < Modes; ++m)
        INTERSTATE_UNROLL
        for (int c = 0; c < Parts; ++c)
            INTERSTATE_UNROLL
            for (int r = 0; r < Rows; ++r) sum[m][c][r] = simd::broadcast<V>(0.0);
    for (Index k = 0; k < tokens; ++k) {
        V z[Rows];
        INTERSTATE_UNROLL
        for (int r = 0; r < Rows; ++r) z[r] = simd::load<V>(in + r * chunk_tokens * W + k * step);
        INTERSTATE_UNROLL
        for (int m = 0; m < Modes; ++m)
            INTERSTATE_UNROLL
            for (int c = 0; c < Parts; ++c) {
                const V p = simd::load<V>(power + ((m * chunk_tokens + k) * Parts + c) * W);
                INTERSTATE_UNROLL
                for (int r = 0; r < Rows; ++r) sum[m][c][r] = simd::fma(p, z[r], sum[m][c][r]);
            }
    }
    INTERSTATE_UNROLL
    for (int m = 0; m < Modes; ++m)
        INTERSTATE_UNROLL
        for (int c = 0; c < Parts; ++c)
            INTERSTATE_UNROLL
            for (int r = 0; r < Rows; ++r) simd::store(w + r * w_row + m * w_mode + c * W, sum[m][c][r]);
}

/// out[r, k] += sum_n Re(P[n,k] Y[r,n]) for one group of chunks and every k. Parts as in collect.
template <int Tokens, int Parts, class V, class A>
INTERSTATE_INLINE void spread(A* out, Index step, const A* power, const A* Y, Index Y_row, Index modes) {
    constexpr int W = V::lanes;
    for (int k0 = 0; k0 < chunk_tokens; k0 += Tokens) {
        V sum[row_group][Tokens];
        INTERSTATE_UNROLL
        for (int r = 0; r < row_group; ++r)
            INTERSTATE_UNROLL
        for (int k = 0; k < Tokens; ++k)
            sum[r][k] = simd::load<V>(out + r * chunk_tokens * W + (k0 + k) * step);
        for (Index n = 0; n < modes; ++n) {
            const A* p = power + (n * chunk_tokens + k0) * Parts * W;
            const A* y = Y + n * 2 * W;
            V re[row_group], im[row_group];
            INTERSTATE_UNROLL
            for (int r = 0; r < row_group; ++r) {
                re[r] = simd::load<V>(y + r * Y_row);
                im[r] = simd::load<V>(y + r * Y_row + W);
            }
            INTERSTATE_UNROLL
            for (int k = 0; k < Tokens; ++k) {
                const V p_re = simd::load<V>(p + k * Parts * W);
                const V p_im = simd::load<V>(p + k * Parts * W + W);
                INTERSTATE_UNROLL
                for (int r = 0; r < row_group; ++r)
                    sum[r][k] = simd::fma(p_re, re[r], simd::fnma(p_im, im[r], sum[r][k]));
            }
        }
        INTERSTATE_UNROLL
        for (int r = 0; r < row_group; ++r)
            INTERSTATE_UNROLL
        for (int k = 0; k < Tokens; ++k) simd::store(out + r * chunk_tokens * W + (k0 + k) * step, sum[r][k]);
    }
}

/// out[r, k] = sum_{j<=k} kernel[j] in[r, k-j] for one group of chunks. Later tokens are not read, not
/// even times zero: an Inf must not reach the tokens before it.
template <int Tokens, class V, class A>
INTERSTATE_INLINE void convolve(const A* in, A* out, Index step, const A* kernel) {
    constexpr int W = V::lanes;
    for (int k0 = 0; k0 < chunk_tokens; k0 += Tokens) {
        V sum[row_group][Tokens];
        INTERSTATE_UNROLL
        for (int r = 0; r < row_group; ++r)
            INTERSTATE_UNROLL
            for (int k = 0; k < Tokens; ++k) sum[r][k] = simd::broadcast<V>(0.0);
        for (int i = 0; i < k0; ++i) {
            V K[Tokens];
            INTERSTATE_UNROLL
            for (int k = 0; k < Tokens; ++k) K[k] = simd::load<V>(kernel + (k0 + k - i) * W);
            INTERSTATE_UNROLL
            for (int r = 0; r < row_group; ++r) {
                const V z = simd::load<V>(in + r * chunk_tokens * W + i * step);
                INTERSTATE_UNROLL
                for (int k = 0; k < Tokens; ++k) sum[r][k] = simd::fma(K[k], z, sum[r][k]);
            }
        }
        INTERSTATE_UNROLL
        for (int i = 0; i < Tokens; ++i)
            INTERSTATE_UNROLL
            for (int r = 0; r < row_group; ++r) {
                const V z = simd::load<V>(in + r * chunk_tokens * W + (k0 + i) * step);
                INTERSTATE_UNROLL
                for (int k = i; k < Tokens; ++k)
                    sum[r][k] = simd::fma(simd::load<V>(kernel + (k - i) * W), z, sum[r][k]);
            }
        INTERSTATE_UNROLL
        for (int r = 0; r < row_group; ++r)
            INTERSTATE_UNROLL
        for (int k = 0; k < Tokens; ++k) simd::store(out + r * chunk_tokens * W + (k0 + k) * step, sum[r][k]);
    }
}

/// Collects rows [0, rows), rounded up to whole groups, for modes [0, modes): w (rows, w_row).
template <class Set, int Parts, class A>
INTERSTATE_INLINE void collect_tile(const A* in, Index step, const A* power, Index rows, Index modes, A* w,
                                    Index w_row) {
    using L = Lanes<Set, A>;
    using V = typename L::V;
    constexpr int W = L::W;
    constexpr int Rows = Parts == 2 ? row_group : L::slope_rows;
    constexpr int Modes = Parts == 2 ? L::collect_modes : 1;
    Index n = 0;
    for (; n + Modes <= modes; n += Modes)
        for (Index r = 0; r < rows; r += Rows)
            collect<Modes, Rows, Parts, V>(in + r * chunk_tokens * W, step,
                                           power + n * chunk_tokens * Parts * W, chunk_tokens,
                                           w + r * w_row + n * Parts * W, w_row, Parts * W);
    for (; n < modes; ++n)
        for (Index r = 0; r < rows; r += Rows)
            collect<1, Rows, Parts, V>(in + r * chunk_tokens * W, step, power + n * chunk_tokens * Parts * W,
                                       chunk_tokens, w + r * w_row + n * Parts * W, w_row, Parts * W);
}

/// state <- base^times state + local, in float64; state, base and local are (2, W).
template <class Set, class A>
INTERSTATE_INLINE void carry(double* state, const double* base, Index times, const A* local) {
    using V = typename Lanes<Set, A>::Wide;
    constexpr int W = Lanes<Set, A>::W;
    for (int at = 0; at < W; at += V::lanes) {
        auto power = load_rows<V>(base + at, W);
        if (times != 1) power = raise(power, times);
        store_rows(state + at, W, fma(power, load_rows<V>(state + at, W), load_rows<V>(local + at, W)));
    }
}

/// A (tile_chunks, mode_block, 2, W) block of numbers per chunk and mode, and a few rows more.
inline Index powers_scratch(Index W) { return (tile_chunks + 2) * mode_block * 2 * W; }

/// Response to a start: out[k] += sum_n Re(Z[n] Abar[n]^k) for one tile; Z <- Abar^256 Z. `out` has
/// whole groups of chunks.
template <class A>
struct Response {
    template <class Set>
    static INTERSTATE_INLINE void run(const PowerTables<A>& t, bool slopes, double* Z, A* out, A* scratch,
                                      Index modes, Index count) {
        using L = Lanes<Set, A>;
        using V = typename L::V;
        constexpr int W = L::W;
        const Index Parts = slopes ? 4 : 2;
        const Index rows = TileRows(count).padded;
        constexpr Index Y_row = mode_block * 2 * W;
        A* zero = scratch + tile_chunks * Y_row;
        std::fill_n(zero, 2 * W, A(0));
        for (Index n0 = 0; n0 < modes; n0 += mode_block) {
            const Index block = std::min(mode_block, modes - n0);
            for (Index n = 0; n < block; ++n) {
                auto Y = load_rows<V>(Z + (n0 + n) * 2 * W, W);
                const auto a = load_rows<V>(
                    t.coefficient + ((n0 + n) * Coefficients::rows + Coefficients::chunk) * W, W);
                for (Index r = 0; r < rows; ++r, Y = Y * a) store_rows(scratch + r * Y_row + n * 2 * W, W, Y);
                carry<Set>(Z + (n0 + n) * 2 * W, t.exact + ((n0 + n) * Exact::rows + Exact::tile) * W, 1,
                           static_cast<const A*>(zero));
            }
            const A* power = t.power + n0 * chunk_tokens * Parts * W;
            for (Index r = 0; r < rows; r += row_group) {
                A* to = out + r * chunk_tokens * W;
                if (slopes)
                    spread<L::tokens, 4, V>(to, W, power, scratch + r * Y_row, Y_row, block);
                else
                    spread<L::tokens, 2, V>(to, W, power, scratch + r * Y_row, Y_row, block);
            }
        }
    }
};

/// Moments of a sequence z, token by token from its first: S[n] = sum_k Abar^(k of the last - k) z[k], and
/// with slopes also dS/dAbar; S (N, 2 or 4, W) takes in one more tile of `count` tokens, which end at
/// the end of a chunk (zeros before them).
template <class A>
struct Moments {
    template <class Set, int Parts>
    static INTERSTATE_INLINE void tile(const PowerTables<A>& t, double* S, const A* z, A* scratch,
                                       Index modes, Index count) {
        using L = Lanes<Set, A>;
        using V = typename L::V;
        using Wide = typename L::Wide;
        constexpr int W = L::W;
        const Index rows = ceil_div(count, chunk_tokens);
        A* local = scratch + tile_chunks * Parts * W;
        for (Index n = 0; n < modes; ++n) {
            const A* coefficient = t.coefficient + n * Coefficients::rows * W;
            collect_tile<Set, Parts>(z + (chunk_tokens - 1) * W, Index{-W},
                                     t.power + n * chunk_tokens * Parts * W, rows, 1, scratch,
                                     Index{Parts * W});
            const auto a = load_rows<V>(coefficient + Coefficients::chunk * W, W);
            const auto slope = load_rows<V>(coefficient + Coefficients::chunk_slope * W, W);
            auto s = zeros<V>(), ds = zeros<V>();
            for (Index r = 0; r < rows; ++r) {
                if constexpr (Parts == 4)
                    ds = fma(a, ds, fma(slope, s, load_rows<V>(scratch + (r * Parts + 2) * W, W)));
                s = fma(a, s, load_rows<V>(scratch + r * Parts * W, W));
            }
            store_rows(local, W, s);
            store_rows(local + 2 * W, W, ds);
            double* state = S + n * Parts * W;
            const double* exact = t.exact + n * Exact::rows * W;
            for (int at = 0; at < W; at += Wide::lanes) {
                auto power = load_rows<Wide>(exact + Exact::tile * W + at, W);
                auto power_slope = load_rows<Wide>(exact + Exact::tile_slope * W + at, W);
                if (count != tile_tokens) {
                    const auto one = load_rows<Wide>(exact + Exact::Abar * W + at, W);
                    const auto before = raise(one, count - 1);
                    const Wide times = simd::broadcast<Wide>(static_cast<double>(count));
                    power = before * one;
                    power_slope = {times * before.re, times * before.im};
                }
                const auto now = load_rows<Wide>(state + at, W);
                if constexpr (Parts == 4)
                    store_rows(state + 2 * W + at, W,
                               fma(power, load_rows<Wide>(state + 2 * W + at, W),
                                   fma(power_slope, now, load_rows<Wide>(local + 2 * W + at, W))));
                store_rows(state + at, W, fma(power, now, load_rows<Wide>(local + at, W)));
            }
        }
    }
    template <class Set>
    static INTERSTATE_INLINE void run(const PowerTables<A>& t, bool slopes, double* S, const A* z, A* scratch,
                                      Index modes, Index count) {
        if (slopes)
            tile<Set, 4>(t, S, z, scratch, modes, count);
        else
            tile<Set, 2>(t, S, z, scratch, modes, count);
    }
};

/// The response of length `length` to a start Z, which is used up: use(tile, begin, count) tile by tile. Behind
/// the tile is scratch.
template <class A, class F>
void each_response(Isa isa, const PowerTables<A>& t, bool slopes, double* Z, A* tile, Index modes, Index length,
                   F&& use) {
    const Index W = simd::lanes<A>(isa);
    for (Index begin = 0; begin < length; begin += tile_tokens) {
        const Index count = std::min(tile_tokens, length - begin);
        std::fill_n(tile, tile_tokens * W, A(0));
        simd::run_body<Response<A>>(isa, t, slopes, Z, tile, tile + tile_tokens * W, modes, count);
        use(static_cast<const A*>(tile), begin, count);
    }
}

/// Moments of `length` tokens, of which load(to, begin, count) puts some into a tile. Behind it is scratch.
template <class A, class F>
void all_moments(Isa isa, const PowerTables<A>& t, bool slopes, double* S, A* tile, Index modes, Index length,
                 F&& load) {
    const Index W = simd::lanes<A>(isa);
    std::fill_n(S, modes * (slopes ? 4 : 2) * W, 0.0);
    for (Index begin = 0; begin < length; begin += tile_tokens) {
        const Index count = std::min(tile_tokens, length - begin);
        std::fill_n(tile, tile_tokens * W, A(0));
        load(tile + (ceil_div(count, chunk_tokens) * chunk_tokens - count) * W, begin, count);
        simd::run_body<Moments<A>>(isa, t, slopes, S, static_cast<const A*>(tile), tile + tile_tokens * W, modes,
                                   count);
    }
}

}  // namespace s4d::detail
}  // namespace interstate::inline INTERSTATE_ABI
