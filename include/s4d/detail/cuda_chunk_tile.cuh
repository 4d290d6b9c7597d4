// Tiles of tokens for the chunked method of S4D on the GPU: how they lie in shared memory, a channel after the
// other, how threads bring them in and out, and how lanes read them as factors of products.
#pragma once

#include <interstate/cuda/async.cuh>
#include <s4d/detail/cuda_chunk_tables.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail::chunks {

inline constexpr int lane_chunks = tile_chunks / 4;  // consecutive chunks of a lane where modes are rows
template <class T>
inline constexpr int token_blocks = Form<T>::chunk / 8;  // columns of products, 8 tokens each

/// Channels of a block, a warp each: 32 bytes of a row in memory, what memory moves at once.
template <class T>
inline constexpr int block_channels = 32 / static_cast<int>(sizeof(T));

inline namespace INTERSTATE_KERNELS {

/// Who a thread is, read once: the compiler would read the special register again wherever it is wanted, and
/// wait for it. `group` picks the row of a fragment, `quad` the column pair (cuda/mma.cuh).
struct Lane {
    int thread, index, group, quad;
    __device__ Lane() {
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
        index = thread % 32;
        group = index / 4;
        quad = index % 4;
    }
};

template <class T, int rows>
using FormFactors = device::Factors<acc_t<T>, Form<T>::precision, rows>;

/// In which order the four elements come that a lane reads at once: what one product takes must be in neighbouring
/// registers, and is moved there where it is not.
enum class Interleave { by_token, by_chunk };

/// A channel's tokens as elements of A. Two chunks are interleaved, so that four elements in a row are tokens 2 j
/// and 2 j + 1 of both, and swizzled so that no reader below meets bank conflicts.
template <class T, Interleave order>
struct TokenTile {
    using Element = acc_t<T>;
    static constexpr int chunk = Form<T>::chunk, depth = device::depth<Form<T>::precision>;
    static constexpr int stride = tile_tokens<T> + 4;  // of channels
    __device__ static constexpr int at(int c, int t) {
        const int pair = c / 2, swizzle = (pair / 4 % 2 * 2) | ((pair / 2 ^ pair / 8) % 2 * 4);
        return pair * 2 * chunk + 4 * ((t / 2) ^ swizzle) + place(c % 2, t % 2);
    }
    __device__ static constexpr int place(int c, int t) { return order == Interleave::by_token ? 2 * t + c : 2 * c + t; }
    struct Read {
        Four<Element> four_;
        __device__ Read(const Element* p) : four_(four(p)) {}
        __device__ Element operator()(int c, int t) const { return four_.x[place(c, t)]; }
    };

    /// Rows: a lane's own chunks 2 m and 2 m + 1. Pairs: tokens of product `step`.
    __device__ static void chunks_as_rows(FormFactors<T, 2>& f, const Element* tile, int m, int step, Lane lane) {
        const Read x(tile + at(lane.group * own + 2 * m, 8 * step + 2 * lane.quad));
        f.set(0, 0, x(0, 0), x(0, 1));
        f.set(1, 0, x(1, 0), x(1, 1));
    }
    /// Columns: chunks 4 group + 2 p and the one after. Pairs: tokens of both products.
    __device__ static void chunks_as_columns(FormFactors<T, 1> (&f)[2][2], const Element* tile, int p, Lane lane) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const Read x(tile + at(4 * lane.group + 2 * p, 8 * step + 2 * lane.quad));
            f[0][step].set(0, 0, x(0, 0), x(0, 1));
            f[1][step].set(0, 0, x(1, 0), x(1, 1));
        }
    }
    /// Columns: the tokens of two blocks, which token_of names. Pairs: chunks 2 step and the one after of each
    /// lane_chunks, as chunks_as_pairs has them.
    static constexpr int chunk_steps = tile_chunks / depth;
    __device__ static constexpr int token_of(int block, int column) { return block / 2 * 16 + 2 * column + block % 2; }
    __device__ static void tokens_as_columns(FormFactors<T, 1> (&f)[2], const Element* tile, int two_blocks, int step,
                                             Lane lane) {
        const Read x(tile + at(lane_chunks * lane.quad + 2 * step, 16 * two_blocks + 2 * lane.group));
        f[0].set(0, 0, x(0, 0), x(1, 0));
        f[1].set(0, 0, x(0, 1), x(1, 1));
    }
    /// What a lane has of a product whose rows are chunks and whose columns tokens, back to the tokens' places.
    __device__ static void put_products(Element* tile, const Element (&c)[4], int m, int block, Lane lane) {
        Four<Element> x;
#pragma unroll
        for (int e = 0; e < 4; ++e) x.x[place(e / 2, e % 2)] = c[e];
        four(tile + at(lane.group * own + 2 * m, 8 * block + 2 * lane.quad)) = x;
    }
};

/// In bfloat16, two chunks are 128 bytes, in pieces of 8 tokens, which ldmatrix reads; swizzled likewise.
template <Interleave order>
struct TokenTile<bf16, order> {
    using Element = bf16;
    static constexpr int chunk = Form<bf16>::chunk, depth = 16;
    static constexpr int stride = tile_tokens<bf16> + 8;
    __device__ static constexpr int at(int c, int t) {
        const int four_chunks = c / 4, swizzle = (four_chunks / 2 % 4) | (four_chunks % 2 * 4);
        return c / 2 * 2 * chunk + 8 * ((c % 2 * 4 + t / 8) ^ swizzle) + t % 8;
    }
    __device__ static void chunks_as_rows(FormFactors<bf16, 2>& f, const bf16* tile, int m, int step, Lane lane) {
        const int row = lane.index % 8, matrix = lane.index / 8;
        device::load_matrices<false>(f.word, tile + at(own * row + 2 * m + matrix % 2, 16 * step + matrix / 2 * 8));
    }
    __device__ static void chunks_as_columns(FormFactors<bf16, 1> (&f)[2][2], const bf16* tile, int p, Lane lane) {
        const int row = lane.index % 8, matrix = lane.index / 8;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            std::uint32_t x[4];
            device::load_matrices<false>(x, tile + at(4 * row + 2 * p + i, 8 * matrix));
#pragma unroll
            for (int e = 0; e < 4; ++e) f[i][e / 2].word[e % 2] = x[e];
        }
    }
    static constexpr int chunk_steps = tile_chunks / depth;
    __device__ static constexpr int token_of(int block, int column) { return 8 * block + column; }
    __device__ static void tokens_as_columns(FormFactors<bf16, 1> (&f)[2], const bf16* tile, int two_blocks, int step,
                                             Lane lane) {
        const int row = lane.index % 8, matrix = lane.index / 8;
        const int c = lane_chunks * (row / 2) + 4 * step + matrix % 2 * 2 + row % 2;
        std::uint32_t x[4];
        device::load_matrices<true>(x, tile + at(c, 16 * two_blocks + matrix / 2 * 8));
#pragma unroll
        for (int e = 0; e < 4; ++e) f[e / 2].word[e % 2] = x[e];
    }
    __device__ static void put_products(bf16* tile, const float (&c)[4], int m, int block, Lane lane) {
#pragma unroll
        for (int row = 0; row < 2; ++row)
            *reinterpret_cast<std::uint32_t*>(tile + at(lane.group * own + 2 * m + row, 8 * block + 2 * lane.quad)) =
                device::pack<bf16>(c[2 * row], c[2 * row + 1]);
    }
};

/// A lane's consecutive chunks of its mode as rows (re and im), pairs of step k as in tokens_as_columns.
template <class T>
__device__ void chunks_as_pairs(FormFactors<T, 2> (&f)[tile_chunks / device::depth<Form<T>::precision>], const complex<acc_t<T>> (&x)[lane_chunks]) {
    constexpr int pairs = device::k_pairs<Form<T>::precision>;
#pragma unroll
    for (int i = 0; i < lane_chunks / 2; ++i) {
        f[i / pairs].set(0, i % pairs, x[2 * i].re, x[2 * i + 1].re);
        f[i / pairs].set(1, i % pairs, x[2 * i].im, x[2 * i + 1].im);
    }
}

/// The rows of a tile in the order of processing: where the first one is, and the way to the next.
struct TileRows {
    Index batch, row;
    int direction;
    __device__ TileRows(Index batch_, Index begin, int count, bool backwards)
        : batch(batch_), row(backwards ? begin + count - 1 : begin), direction(backwards ? -1 : 1) {}
    /// Element of token t, and the stride from token to token.
    template <class T>
    __device__ T* at(const View<T, 3>& x, int t, Index channel) const {
        return x.data + batch * x.stride[0] + (row + direction * t) * x.stride[1] + channel * x.stride[2];
    }
    template <class T>
    __device__ Index stride(const View<T, 3>& x) const {
        return direction * x.stride[1];
    }
    /// On to the tile that follows one of `count` tokens.
    __device__ void advance(int count) { row += direction * count; }
};

/// What a thread moves between memory and the tiles of G channels, with 32 G threads. Where memory allows, 16 bytes at
/// once: the neighbouring channels of one token; else single elements.
template <class T, Interleave order>
struct TileMover {
    using Tile = TokenTile<T, order>;
    using E = typename Tile::Element;
    static constexpr int V = 16 / static_cast<int>(sizeof(T));
    static constexpr int span = sizeof(E) == 2 ? 2 : 1;  // tokens in a row, so that the tile is written by words
    static constexpr int pass_tokens = 32 * V * span, passes = tile_tokens<T> / pass_tokens;
    static constexpr int narrow_step = 32, narrow_passes = tile_tokens<T> / narrow_step;
    struct alignas(16) Unit {
        T x[V];
    };
    struct alignas(span * sizeof(E)) Span {
        E x[span];
    };
    static constexpr int staging_bytes = tile_tokens<T> * static_cast<int>(sizeof(T));  // a channel
    Unit* staging;  // in shared memory, tile_tokens / (32 V) a thread: where the next tile waits
    int G, thread;
    int unit, token;  // of 16 bytes, and the first of the span, in the first pass
    bool there;       // is the unit?

    /// `thread` of 32 G, for the channels from h0 of H.
    __device__ TileMover(int channels, Index h0, Index H, int thread_, void* shared)
        : staging(static_cast<Unit*>(shared) + thread_), G(channels), thread(thread_) {
        const int units = G < V ? 1 : G / V;
        unit = thread % units;
        token = thread / units * span;
        there = h0 + unit * V < H;
    }

    /// May channels h0 .. h0 + G of x, those there are, be moved 16 bytes at once?
    __device__ bool wide(const View<T, 3>& x, Index h0, Index H) const {
        return x.data && G % V == 0 && (h0 + G <= H || H % V == 0) && x.stride[2] == 1 && x.stride[1] % V == 0 && x.stride[0] % V == 0 &&
               reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0;
    }
    __device__ bool wide(const View<const T, 3>& x, Index h0, Index H) const {
        return wide(View<T, 3>{const_cast<T*>(x.data), {}, {x.stride[0], x.stride[1], x.stride[2]}}, h0, H);
    }

    /// The tile's element of token t, first of the unit's channels.
    __device__ int wide_at(int t) const { return unit * V * Tile::stride + Tile::at(t / Tile::chunk, t % Tile::chunk); }
    // Narrow: thread = (token, channel), every narrow_step-th token.
    __device__ int narrow_channel() const { return thread % G; }
    __device__ int narrow_token() const { return thread / G; }
    __device__ int narrow_at(int i) const {
        const int t = narrow_token() + narrow_step * i;
        return narrow_channel() * Tile::stride + Tile::at(t / Tile::chunk, t % Tile::chunk);
    }

    /// From a tile's first element to the thread's.
    template <class U>
    __device__ Index offset(const View<U, 3>& x, int direction) const {
        return token * direction * x.stride[1] + unit * V * x.stride[2];
    }
    /// Starts the wide loads of a tile, which fly while the one before it is computed.
    __device__ void start(const View<const T, 3>& x, Index offset, const TileRows& rows, Index h0, int count) {
        const T* p = rows.at(x, 0, h0) + offset;
        const Index step = rows.stride(x), pass = step * (pass_tokens - span + 1);
#pragma unroll
        for (int i = 0; i < passes; ++i, p += pass)
#pragma unroll
            for (int s = 0; s < span; ++s) {
                if (s > 0) p += step;
                device::copy_async_16(staging + (i * span + s) * 32 * G, p, there && token + i * pass_tokens + s < count);
            }
    }
    /// Puts the tile in its place, after wait_for_copies.
    __device__ void finish(E* tiles, const View<const T, 3>& x, bool is_wide, const TileRows& rows, Index h0, Index H,
                           int count) const {
        if (is_wide) {
#pragma unroll
            for (int i = 0; i < passes; ++i) {
                Unit in[span];
#pragma unroll
                for (int s = 0; s < span; ++s) in[s] = staging[(i * span + s) * 32 * G];
                E* const to = tiles + wide_at(token + i * pass_tokens);
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    Span out;
#pragma unroll
                    for (int s = 0; s < span; ++s) out.x[s] = device::load_as<E>(in[s].x[e]);
                    *reinterpret_cast<Span*>(to + e * Tile::stride) = out;
                }
            }
        } else {
            const int limit = h0 + narrow_channel() < H ? count : 0;
#pragma unroll 1  // small rather than fast: beside the wide path it would crowd the instruction cache
            for (int i = 0; i < narrow_passes; ++i) {
                const int t = narrow_token() + narrow_step * i;
                T value = T(0.0f);
                if (t < limit) value = *rows.at(x, t, h0 + narrow_channel());
                tiles[narrow_at(i)] = device::load_as<E>(value);
            }
        }
    }
    /// Takes the tile out.
    __device__ void store(const E* tiles, const View<T, 3>& x, bool is_wide, const TileRows& rows, Index h0, Index H,
                          int count) const {
        if (is_wide) {
            T* p = rows.at(x, token, h0 + unit * V);
            const Index step = rows.stride(x), pass = step * (pass_tokens - span + 1);
#pragma unroll
            for (int i = 0; i < passes; ++i, p += pass) {
                const E* const from = tiles + wide_at(token + i * pass_tokens);
                Unit out[span];
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    const Span in = *reinterpret_cast<const Span*>(from + e * Tile::stride);
#pragma unroll
                    for (int s = 0; s < span; ++s) out[s].x[e] = device::store_as<T>(in.x[s]);
                }
#pragma unroll
                for (int s = 0; s < span; ++s) {
                    if (s > 0) p += step;
                    if (there && token + i * pass_tokens + s < count)
                        *reinterpret_cast<int4*>(p) = __builtin_bit_cast(int4, out[s]);  // one store, not V
                }
            }
        } else if (h0 + narrow_channel() < H) {
#pragma unroll 1
            for (int i = 0; i < narrow_passes; ++i) {
                const int t = narrow_token() + narrow_step * i;
                if (t < count) *rows.at(x, t, h0 + narrow_channel()) = device::store_as<T>(tiles[narrow_at(i)]);
            }
        }
    }
};

template <class A>
__device__ complex<A> shuffle_up(complex<A> z, int lanes) {
    return {__shfl_up_sync(0xffffffffu, z.re, lanes), __shfl_up_sync(0xffffffffu, z.im, lanes)};
}
template <class A>
__device__ complex<A> shuffle_down(complex<A> z, int lanes) {
    return {__shfl_down_sync(0xffffffffu, z.re, lanes), __shfl_down_sync(0xffffffffu, z.im, lanes)};
}
template <class A>
__device__ complex<A> shuffle(complex<A> z, int lane) {
    return {__shfl_sync(0xffffffffu, z.re, lane), __shfl_sync(0xffffffffu, z.im, lane)};
}

}  // namespace INTERSTATE_KERNELS

}  // namespace s4d::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
