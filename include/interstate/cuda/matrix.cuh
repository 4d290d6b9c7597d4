// Products of matrices that lie in shared memory, by warps of tensor cores (cuda/mma.cuh).
//
// A matrix is stored in blocks of 8 x 8 elements, each block contiguous, blocks row by row: what ldmatrix reads and
// what a warp has after a product are then contiguous too, without padding, and a matrix can be copied as it lies.
#pragma once

#include <interstate/cuda/async.cuh>
#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/mma.cuh>
#include <interstate/view.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace device {

/// Where element (r, c) of a blocked matrix is.
template <int columns>
__host__ __device__ constexpr int blocked(int r, int c) {
    const unsigned row = static_cast<unsigned>(r), column = static_cast<unsigned>(c);
    return static_cast<int>((row / 8 * (columns / 8) + column / 8) * 64 + row % 8 * 8 + column % 8);
}

/// How a matrix is used: as stored, or transposed.
enum class Read { as_stored, transposed };

/// A blocked matrix as a factor of products. Read as_stored, the sum runs over its columns; transposed, over its rows.
/// `outer` counts rows of a or columns of b, `k` what is summed over; both are multiples of 8.
template <class E, int columns, Read read>
struct Operand {
    using Element = E;
    static constexpr bool is_transposed = read == Read::transposed;
    /// Elements from a block to the next one, either way.
    static constexpr int outer_step = is_transposed ? 64 : 8 * columns, k_step = is_transposed ? 8 * columns : 64;
    const E* data;
    __device__ const E* block(int outer, int k) const {
        return data + static_cast<unsigned>(outer) / 8 * outer_step + static_cast<unsigned>(k) / 8 * k_step;
    }
};
template <int columns, class E>
__device__ Operand<E, columns, Read::as_stored> as_stored(const E* data) {
    return {data};
}
template <int columns, class E>
__device__ Operand<E, columns, Read::transposed> transposed(const E* data) {
    return {data};
}

/// A lane's way to the factors of a product: `gap` rows of a, or columns of b, lie between what it loads at once. Where a
/// factor is follows by adding constants, so that loops over k and tiles cost no arithmetic.
template <class Operand, int gap, class E = typename Operand::Element>
class Loader;

/// In floats, the two neighbouring k of a lane: quad's pair of line `group` of a block.
template <class Operand, int gap>
class Loader<Operand, gap, float> {
  public:
    __device__ Loader(const Operand& from, int outer, int k, int lane)
        : at_(from.block(outer, k) + (Operand::is_transposed ? lane % 4 * 16 + lane / 4 : lane / 4 * 8 + lane % 4 * 2)) {}
    __device__ void move(int k) { at_ += k / 8 * Operand::k_step; }
    template <Precision precision>
    __device__ void load(Factors<float, precision, 2>& f, int outer, int k) const {
        const float2 x = pair(outer, k), y = pair(outer + gap, k);
        f.set(0, 0, x.x, x.y);
        f.set(1, 0, y.x, y.y);
    }
    template <Precision precision>
    __device__ void load(Factors<float, precision, 1> (&f)[2], int outer, int k) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 x = pair(outer + gap * i, k);
            f[i].set(0, 0, x.x, x.y);
        }
    }

    /// Of one line, k and k + 8.
    template <Precision precision>
    __device__ void load_along_k(Factors<float, precision, 1> (&f)[2], int outer, int k) const {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 x = pair(outer, k + 8 * i);
            f[i].set(0, 0, x.x, x.y);
        }
    }

  private:
    __device__ float2 pair(int outer, int k) const {
        const float* const p = at_ + outer / 8 * Operand::outer_step + k / 8 * Operand::k_step;
        if constexpr (Operand::is_transposed) return {p[0], p[8]};
        return *reinterpret_cast<const float2*>(p);
    }
    const float* at_;
};

/// In 16 bits lane i has the address of line i % 8 of the i / 8-th of four blocks, which ldmatrix gives to all lanes.
template <class Operand, int gap, class E>
    requires(sizeof(E) == 2)
class Loader<Operand, gap, E> {
  public:
    /// `rows` of a want blocks in the order (outer, k) (0,0) (1,0) (0,1) (1,1), columns of b (0,0) (0,1) (1,0) (1,1).
    __device__ Loader(const Operand& from, int outer, int k, int lane)
        : at_(static_cast<unsigned>(__cvta_generic_to_shared(from.block(outer, k) + lane % 8 * 8))), lane_(lane) {}
    __device__ void as_rows() { at_ += 2 * (lane_ / 8 % 2 * (gap / 8 * Operand::outer_step) + lane_ / 16 * Operand::k_step); }
    __device__ void as_columns() { at_ += 2 * (lane_ / 16 * (gap / 8 * Operand::outer_step) + lane_ / 8 % 2 * Operand::k_step); }
    __device__ void move(int k) { at_ += 2 * (k / 8 * Operand::k_step); }
    template <Precision precision>
    __device__ void load(Factors<float, precision, 2>& f, int outer, int k) const {
        load_matrices<Operand::is_transposed>(f.word, at(outer, k));
    }
    template <Precision precision>
    __device__ void load(Factors<float, precision, 1> (&f)[2], int outer, int k) const {
        std::uint32_t x[4];
        load_matrices<Operand::is_transposed>(x, at(outer, k));
#pragma unroll
        for (int i = 0; i < 4; ++i) f[i / 2].word[i % 2] = x[i];
    }

  private:
    __device__ unsigned at(int outer, int k) const { return at_ + 2 * (outer / 8 * Operand::outer_step + k / 8 * Operand::k_step); }
    unsigned at_;
    int lane_;
};

/// Rows row .. row + 7 and row + gap .. row + gap + 7 of `a`, from k on.
template <int gap = 8, class Operand>
__device__ Loader<Operand, gap> rows_of(const Operand& a, int row, int k, int lane) {
    Loader<Operand, gap> loader(a, row, k, lane);
    if constexpr (sizeof(typename Operand::Element) == 2) loader.as_rows();
    return loader;
}
/// Columns n .. n + 7 and n + gap .. n + gap + 7 of `b`, two tiles.
template <int gap = 8, class Operand>
__device__ Loader<Operand, gap> columns_of(const Operand& b, int n, int k, int lane) {
    Loader<Operand, gap> loader(b, n, k, lane);
    if constexpr (sizeof(typename Operand::Element) == 2) loader.as_columns();
    return loader;
}

/// -f.
template <Precision precision, int rows>
__device__ Factors<float, precision, rows> negated(Factors<float, precision, rows> f) {
#pragma unroll
    for (int i = 0; i < 2 * rows; ++i) {
        if constexpr (precision == Precision::exact) {
            f.high[i] ^= 0x80000000u;
            f.low[i] ^= 0x80000000u;
        } else if constexpr (precision == Precision::cut) {
            f.value[i] ^= 0x80000000u;
        } else {
            f.word[i] ^= 0x80008000u;
        }
    }
    return f;
}

/// Sums of products for tiles that are added to c in the end. The unit cuts what it adds to a sum, always towards zero: for
/// `exact`, small products and large ones have sums of their own, and c, which may be the sum of many calls, is added to by
/// rounding.
template <Precision precision, int tiles>
class Sums {
  public:
    __device__ explicit Sums(float (&c)[tiles][4]) : c_(c) {
        if constexpr (precision == Precision::exact)
#pragma unroll
            for (int i = 0; i < tiles; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) parts_.large[i][e] = parts_.small[i][e] = 0.0f;
    }
    /// Tile i += a b.
    __device__ void add(int i, const Factors<float, precision, 2>& a, const Factors<float, precision, 1>& b) {
        if constexpr (precision == Precision::exact) {
            mma_tf32(parts_.small[i], a.low, b.high);
            mma_tf32(parts_.large[i], a.high, b.high);
            mma_tf32(parts_.small[i], a.high, b.low);
        } else {
            multiply_add(c_[i], a, b);
        }
    }
    __device__ void finish() {
        if constexpr (precision == Precision::exact)
#pragma unroll
            for (int i = 0; i < tiles; ++i)
#pragma unroll
                for (int e = 0; e < 4; ++e) c_[i][e] += parts_.large[i][e] + parts_.small[i][e];
    }

  private:
    struct Nothing {};
    struct Parts {
        float large[tiles][4], small[tiles][4];
    };
    float (&c_)[tiles][4];
    [[no_unique_address]] std::conditional_t<precision == Precision::exact, Parts, Nothing> parts_;
};

/// `count` steps of k of a product.
template <Precision precision, int count, int tiles, class FromA, class FromB>
__device__ void add_products(Sums<precision, tiles>& sums, const FromA& from_a, const FromB& from_b) {
    static_assert(tiles % 2 == 0);
#pragma unroll
    for (int k = 0; k < count; k += depth<precision>) {
        Factors<float, precision, 2> fa;
        from_a.load(fa, 0, k);
#pragma unroll
        for (int i = 0; i < tiles; i += 2) {
            Factors<float, precision, 1> fb[2];
            from_b.load(fb, 8 * i, k);
            sums.add(i, fa, fb[0]);
            sums.add(i + 1, fa, fb[1]);
        }
    }
}

/// c (16 x 8 tiles) += rows row .. row + 15 of a times columns n .. of b, summed over k = first .. first + count - 1.
template <Precision precision, int count, int tiles, class A, class B>
__device__ void multiply(float (&c)[tiles][4], const A& a, int row, const B& b, int n, int first, int lane) {
    Sums<precision, tiles> sums(c);
    add_products<precision, count>(sums, rows_of(a, row, first, lane), columns_of(b, n, first, lane));
    sums.finish();
}
/// The same with a count, a multiple of 16, that is known at run time.
template <Precision precision, int tiles, class A, class B>
__device__ void multiply(float (&c)[tiles][4], const A& a, int row, const B& b, int n, int first, int count, int lane) {
    auto from_a = rows_of(a, row, first, lane);
    auto from_b = columns_of(b, n, first, lane);
    Sums<precision, tiles> sums(c);
#pragma unroll 1
    for (; count > 0; count -= 16) {
        add_products<precision, 16>(sums, from_a, from_b);
        from_a.move(16);
        from_b.move(16);
    }
    sums.finish();
}

/// The complex product c += a b: rows of `a` have 8 real and 8 imaginary parts in turn, and so has c (tile i real, i + 1
/// imaginary). b (columns n, k), as stored, is likewise, by columns n that count complex numbers.
template <Precision precision, int count, int tiles, class A, class B>
__device__ void multiply_complex(float (&c)[tiles][4], const A& a, int row, const B& b, int n, int lane) {
    static_assert(tiles % 2 == 0 && !B::is_transposed);
    const auto from_a = rows_of(a, row, 0, lane);
    if constexpr (precision == Precision::bfloat) {
        // A depth of 16 is the real and imaginary parts of 8 numbers: of b as they lie, of a what each result wants.
        const auto from_b = static_cast<unsigned>(__cvta_generic_to_shared(b.block(n, 0) + lane * 8));
#pragma unroll
        for (int k = 0; k < count; k += 32) {
            Factors<float, precision, 2> real[2], imaginary[2];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                from_a.load(real[half], 0, k + 16 * half);
#pragma unroll
                for (int i = 0; i < 4; ++i) imaginary[half].word[i] = real[half].word[i ^ 2];
                real[half].word[2] ^= 0x80008000u;
                real[half].word[3] ^= 0x80008000u;
            }
#pragma unroll
            for (int i = 0; i < tiles; i += 2) {
                std::uint32_t x[4];  // of two blocks of 8 numbers
                load_matrices<false>(x, from_b + 2 * (i / 2 * B::outer_step + k / 8 * 64));
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const Factors<float, precision, 1> fb{x[2 * half], x[2 * half + 1]};
                    multiply_add(c[i], real[half], fb);
                    multiply_add(c[i + 1], imaginary[half], fb);
                }
            }
        }
    } else {
        const Loader<B, 8> from_b(b, n, 0, lane);
        Sums<precision, tiles> sums(c);
#pragma unroll
        for (int k = 0; k < count; k += 16) {
            Factors<float, precision, 2> real, imaginary;
            from_a.load(real, 0, k);
            from_a.load(imaginary, 0, k + 8);
            const auto minus = negated(imaginary);
#pragma unroll
            for (int i = 0; i < tiles; i += 2) {
                Factors<float, precision, 1> fb[2];
                from_b.load_along_k(fb, 4 * i, k);
                sums.add(i, real, fb[0]);
                sums.add(i + 1, real, fb[1]);
                sums.add(i, minus, fb[1]);
                sums.add(i + 1, imaginary, fb[0]);
            }
        }
        sums.finish();
    }
}

template <int tiles>
__device__ void clear(float (&c)[tiles][4]) {
#pragma unroll
    for (int i = 0; i < tiles; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) c[i][e] = 0.0f;
}

/// Two neighbouring elements, written at once.
template <class E>
__device__ void put_pair(E* to, float x, float y) {
    *reinterpret_cast<Pair<E>*>(to) = pack<E>(x, y);
}
template <class E>
__device__ float2 get_pair(const E* from) {
    float2 pair;
    unpack<E>(*reinterpret_cast<const Pair<E>*>(from), pair.x, pair.y);
    return pair;
}

/// A line of a block: 8 elements, aligned to 16 bytes.
template <class E>
struct alignas(16) Line {
    E x[8];
    __device__ explicit Line(const E* from) {
        constexpr int words = sizeof(x) / 16;
#pragma unroll
        for (int i = 0; i < words; ++i) reinterpret_cast<int4*>(x)[i] = reinterpret_cast<const int4*>(from)[i];
    }
    __device__ float2 pair(int e) const { return get_pair(x + e); }
};

}  // namespace device
}  // namespace interstate::inline INTERSTATE_ABI
