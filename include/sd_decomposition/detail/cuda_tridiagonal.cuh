// Routing and filtering of attention heads on the GPU, up to tridiagonal matrices. Equations: docs/ops/sd_decomposition.md.
//
// Three kernels, all in the accumulator's dtype:
//   - triangle: a block has a head. Columns' magnitudes, and with them their scales (eq. 7); then T: rows of [Q' K'] come in
//     blocks, which reflections merge into the triangle of the rows before. Four lanes have a column of the block in
//     registers; the vector of a reflection passes through shared memory, and a row of T is touched by its own step alone;
//   - interaction: M = Tq Tk^T in tiles;
//   - tridiagonal: a block has S or F of a head (eq. 6), in shared memory where it fits, and reduces it to a tridiagonal matrix
//     by reflections, from the last row up. The update by one reflection and the product with the next are one walk over the
//     matrix. What is about vectors every warp does for itself, so that a step has one barrier.
#pragma once

#include <limits>

#include <interstate/cuda/convert.cuh>
#include <interstate/cuda/launch.cuh>
#include <interstate/cuda/product.cuh>
#include <interstate/cuda/rows.cuh>
#include <interstate/dispatch.hpp>
#include <interstate/workspace.hpp>
#include <sd_decomposition/detail/outputs.hpp>
#include <sd_decomposition/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_decomposition::detail {

inline constexpr int column_lanes = 4;     // that share a column of a block of rows
inline constexpr int panel_columns = 128;  // in registers at a time
/// Elements of a column that a lane has in registers, and rows of a block.
template <class A>
inline constexpr int lane_rows = 128 / static_cast<int>(sizeof(A));
template <class A>
inline constexpr int merged_rows = column_lanes * lane_rows<A>;

template <class A>
inline constexpr A greatest = std::numeric_limits<A>::max();
template <class A>
inline constexpr double roundoff = std::numeric_limits<A>::epsilon();

struct HeadState {
    double terms;  // the root of the sum in eq. 8
    int G;         // eq. 7
    bool finite;   // else nothing else is there
};
/// Of S or F, which the kernels have as 2^shift times theirs.
struct PartState {
    double norm;  // 0 where the part is zero, and nothing else is there
    int shift;
};

INTERSTATE_HD constexpr Index spectrum_steps(Index n) { return ceil_div(n, 8) * 8; }

/// A part on its way to a tridiagonal matrix. Lanes move 16 bytes at once, V elements.
template <class A>
struct PartLayout {
    static constexpr int V = 16 / static_cast<int>(sizeof(A));
    Index n, width, ld;  // width: n in whole units; rows of the matrix are ld apart
    int warps;
    __host__ __device__ explicit PartLayout(Index size) : n(size), width(ceil_div(size, V) * V), ld(width + V), warps(1) {
        while (warps < 16 && warps * 16 < n) warps *= 2;
    }
    /// The matrix (n, ld); three vectors a warp; twice the parts of a product, a vector a warp.
    Index bytes() const {
        const Index matrix = area(n, ld), elements = matrix < 0 ? -1 : matrix + 5 * warps * width;
        return area(elements, static_cast<Index>(sizeof(A)));
    }
    /// Whether a device of compute capability 8.0 or more surely has the shared memory for it.
    bool surely_fits() const { return bytes() >= 0 && bytes() <= 96 * 1024; }
};

/// What the kernels leave to one another, for some heads.
template <class A>
struct CudaLayout {
    HeadState* heads;     // (heads)
    PartState* states;    // (heads, 2)
    A* columns;           // (heads, 2, 2d): the roots of their scales, and sums of squares
    A* t;                 // (heads, n, 2d): T of eq. 6
    A* vectors;           // (heads, 2d, merged_rows + 2): reflections of a block of rows, where there are several panels
    A* m;                 // (heads, min(d, n), n), where T is a triangle: other rows are zero there; else (heads, n, n)
    unsigned char* parts;  // (heads, 2, PartLayout), where shared memory may not have room for it
    double* spectra;      // (heads, 2, 2 n + 2 spectrum_steps): diagonal, what is beside it, steps of the recurrence

    CudaLayout(Arena& arena, const Shape& s, Index count) {
        const Index n = s.values(), width = 2 * s.head_dim;
        const PartLayout<A> part(n);
        heads = arena.take<HeadState>(count);
        states = arena.take<PartState>(2 * count);
        columns = arena.take<A>(area(count, 2 * width));
        t = arena.take<A>(area(count, area(n, width)));
        vectors = arena.take<A>(several_panels(s) ? area(count, area(width, merged_rows<A> + 2)) : 0);
        m = arena.take<A>(area(count, area(rows_of_m(s), n)));
        parts = arena.take<unsigned char>(part.surely_fits() ? 0 : area(2 * count, part.bytes()));
        spectra = arena.take<double>(area(2 * count, 2 * n + 2 * spectrum_steps(n)));
    }
    static constexpr bool several_panels(const Shape& s) { return s.length > 2 * s.head_dim && 2 * s.head_dim > panel_columns; }
    INTERSTATE_HD static constexpr Index rows_of_m(const Shape& s) { return s.length > 2 * s.head_dim ? s.head_dim : s.length; }
    /// How many heads go through the kernels together: as many as 256 MiB have room for, but 16 at least.
    static Index together(const Shape& s) {
        const Index all = s.batch * s.query_heads;
        Arena arena;
        CudaLayout(arena, s, 1);
        const Index room = static_cast<Index>((std::size_t{1} << 28) / (arena.required() + 1)), some = room < 16 ? 16 : room;
        return all < some ? all : some;
    }
};

/// One launch of each kernel: heads from `first` on of all.
template <class A>
struct Call {
    Shape s;
    CudaLayout<A> w;
    Outputs<A> out;
    double scale;
    Index first;

    INTERSTATE_HD bool tall() const { return s.length > 2 * s.head_dim; }  // T is a triangle
    INTERSTATE_HD PartOutputs<A> part(Index which) const { return which == 0 ? routing_of(out) : filtering_of(out); }
    /// Diagonal (n), off (n), steps (2, spectrum_steps) of a part of a head of this launch.
    __device__ double* spectrum(Index task) const { return w.spectra + task * (2 * s.values() + 2 * spectrum_steps(s.values())); }
};

struct Add {
    template <class X>
    __device__ X operator()(X a, X b) const {
        return a + b;
    }
};
struct Largest {
    template <class X>
    __device__ X operator()(X a, X b) const {
        return a > b ? a : b;
    }
};

/// Joins x of `lanes` neighbouring lanes, a power of two, for all of them; `mask` has the lanes of the warp that call.
template <int lanes, class X, class Join>
__device__ X join_lanes(X x, Join join, unsigned mask = 0xffffffffu) {
#pragma unroll
    for (int step = lanes / 2; step > 0; step /= 2) x = join(x, __shfl_xor_sync(mask, x, step));
    return x;
}
/// Joins x of all threads of a block of whole warps, for all of them and in one order. Every thread calls it.
template <class X, class Join>
__device__ X join_block(X x, Join join) {
    __shared__ X of_warps[32];
    x = join_lanes<32>(x, join);
    __syncthreads();  // what was there before has been read
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = of_warps[0];
    for (unsigned i = 1; i < blockDim.x / 32; ++i) x = join(x, of_warps[i]);
    return x;
}

template <class A>
__device__ void store_wide(A* to, const device::Wide<A>& x) {
    *reinterpret_cast<int4*>(to) = __builtin_bit_cast(int4, x);
}

/// The reflection that takes (head, x) to (head - top, 0), |x|^2 = below: 1 - weight v v^T, v = (top, x).
template <class A>
struct Reflector {
    A top = A(0), weight = A(0);
    __device__ Reflector(A head, A below) {
        const A square = head * head + below, norm = std::sqrt(square);
        if (!(below > A(0) && square > nothing<A>)) return;
        top = head > A(0) ? head + norm : head - norm;
        weight = A(1) / (norm * (norm + std::abs(head)));
    }
};

inline namespace INTERSTATE_KERNELS {

template <class T>
__global__ void __launch_bounds__(panel_columns * column_lanes, 2)
    triangle_kernel(View<const T, 4> Q, View<const T, 4> K, Call<acc_t<T>> p) {
    using A = acc_t<T>;
    constexpr int rows = merged_rows<A>, held = lane_rows<A>, V = PartLayout<A>::V;
    __shared__ __align__(16) A vector[2][rows];  // of a reflection, and of the next
    __shared__ A tops[2], weights[2];
    const Index L = p.s.length, d = p.s.head_dim, columns = 2 * d, at = p.first + blockIdx.x;
    const Index b = at / p.s.query_heads, h = at % p.s.query_heads, g = h / p.s.group();
    const int lane = threadIdx.x % column_lanes, team = threadIdx.x / column_lanes, teams = blockDim.x / column_lanes;
    const unsigned mask = 0xfu << (threadIdx.x % 32 / column_lanes * column_lanes);
    A *const root = p.w.columns + blockIdx.x * 2 * columns, *const squares = root + columns;
    A* const t = p.w.t + blockIdx.x * p.s.values() * columns;
    HeadState& state = p.w.heads[blockIdx.x];
    const auto column = [&](Index c) {
        return c < d ? Q.data + b * Q.stride[0] + h * Q.stride[2] + c * Q.stride[3]
                     : K.data + b * K.stride[0] + g * K.stride[2] + (c - d) * K.stride[3];
    };
    const auto row_stride = [&](Index c) { return c < d ? Q.stride[1] : K.stride[1]; };

    bool finite = true;
    for (Index c = team; c < columns; c += teams) {
        const T* const from = column(c);
        const Index stride = row_stride(c);
        A largest = A(0);
#pragma unroll 8
        for (Index r = lane; r < L; r += column_lanes) {
            const A x = std::abs(device::load_as<A>(from[r * stride]));
            finite = finite && x <= greatest<A>;
            largest = x > largest ? x : largest;
        }
        largest = join_lanes<column_lanes>(largest, Largest{}, mask);
        if (lane == 0) root[c] = largest;
    }
    if (!__syncthreads_and(finite)) {
        if (threadIdx.x == 0) state = {0.0, 0, false};
        return;
    }
    int exponent = no_pair;
    for (Index i = threadIdx.x; i < d; i += blockDim.x)
        exponent = Largest{}(exponent, pair_exponent(static_cast<double>(root[i]), static_cast<double>(root[d + i])));
    const int G = common_exponent(join_block(exponent, Largest{}));
    for (Index i = threadIdx.x; i < d; i += blockDim.x) {
        auto q = static_cast<double>(root[i]), k = static_cast<double>(root[d + i]);
        balance_pair(q, k, G);
        root[i] = static_cast<A>(q);
        root[d + i] = static_cast<A>(k);
    }
    __syncthreads();

    if (p.tall()) {
        const int width = static_cast<int>(columns);  // L is more than that
        A* const stored = p.w.vectors + blockIdx.x * columns * (rows + 2);
        for (Index first = 0; first < L; first += rows)
            for (int base = 0; base < width; base += teams) {
                const int c = base + team, end = base + teams < width ? base + teams : width;
                const bool own = c < width, before = own && first > 0;
                A x[held], sum = A(0);
                {
                    const A scale = own ? root[c] : A(0);
                    const Index stride = row_stride(own ? c : 0);
                    Index row = first + lane * V;
                    const T* from = column(own ? c : 0) + row * stride;
#pragma unroll
                    for (int i = 0; i < held; i += V, row += column_lanes * V, from += column_lanes * V * stride)
#pragma unroll
                        for (int e = 0; e < V; ++e) {
                            x[i + e] = own && row + e < L ? device::load_as<A>(from[e * stride]) * scale * scale : A(0);
                            sum += x[i + e] * x[i + e];
                        }
                }
                sum = join_lanes<column_lanes>(sum, Add{});
                if (own && lane == 0) squares[c] = first > 0 ? squares[c] + sum : sum;

                // Column j, which this team has, becomes the vector of a reflection; `corner` is T[j][j].
                const auto publish = [&](int j, A head, A* corner) {
                    A below = A(0);
#pragma unroll
                    for (int i = 0; i < held; ++i) below += x[i] * x[i];
                    const Reflector<A> reflector(head, join_lanes<column_lanes>(below, Add{}, mask));
#pragma unroll
                    for (int i = 0; i < held; i += V) {
                        device::Wide<A> unit;
#pragma unroll
                        for (int e = 0; e < V; ++e) unit.x[e] = x[i + e];
                        store_wide(vector[j & 1] + (i / V * column_lanes + lane) * V, unit);
                    }
                    if (lane == 0) {
                        tops[j & 1] = reflector.top;
                        weights[j & 1] = reflector.weight;
                        *corner = head - reflector.top;
                    }
                    if (end == width) return;
                    A* const to = stored + static_cast<Index>(j) * (rows + 2);
#pragma unroll
                    for (int i = 0; i < held; ++i) to[(i / V * column_lanes + lane) * V + i % V] = x[i];
                    if (lane == 0) to[rows] = reflector.top, to[rows + 1] = reflector.weight;
                };
                // A reflection of an earlier panel.
                const auto bring = [&](int j) {
                    const A* const from = stored + static_cast<Index>(j) * (rows + 2);
                    if (threadIdx.x < rows) vector[j & 1][threadIdx.x] = from[threadIdx.x];
                    if (threadIdx.x == 0) tops[j & 1] = from[rows], weights[j & 1] = from[rows + 1];
                };

                A* at = t + c;  // T[j][c]
                A above = before ? *at : A(0);
                if (base > 0)
                    bring(0);
                else if (team == 0)
                    publish(0, above, at);
                const int last = base + (threadIdx.x / 32 + 1) * (32 / column_lanes) - 1;  // column of this warp
                for (int j = 0; j < end; ++j, at += width) {
                    __syncthreads();
                    const A next = before && j < c ? at[width] : A(0);
                    if (last > j) {
                        const A* const v = vector[j & 1] + lane * V;
                        A sums[4] = {};
#pragma unroll
                        for (int i = 0; i < held; i += V) {
                            const auto unit = device::load_wide(v + i * column_lanes);
#pragma unroll
                            for (int e = 0; e < V; ++e) sums[(i + e) % 4] += x[i + e] * unit.x[e];
                        }
                        const A dot = join_lanes<column_lanes>(sums[0] + sums[1] + (sums[2] + sums[3]), Add{});
                        const A top = tops[j & 1], along = c > j ? (top * above + dot) * weights[j & 1] : A(0);
                        if (own && c > j && lane == 0) *at = above - top * along;
                        __syncwarp();  // v is read again: there are no registers to keep it in
#pragma unroll
                        for (int i = 0; i < held; i += V) {
                            const auto unit = device::load_wide(v + i * column_lanes);
#pragma unroll
                            for (int e = 0; e < V; ++e) x[i + e] -= along * unit.x[e];
                        }
                    }
                    above = next;
                    if (j + 1 < base)
                        bring(j + 1);
                    else if (j + 1 < end && c == j + 1)
                        publish(j + 1, above, at + width);
                }
                __syncthreads();
            }
    } else {
        for (Index c = team; c < columns; c += teams) {
            const T* const from = column(c);
            const Index stride = row_stride(c);
            const A scale = root[c];
            A sum = A(0);
            for (Index r = lane; r < L; r += column_lanes) {
                const A x = device::load_as<A>(from[r * stride]) * scale * scale;
                t[r * columns + c] = x;
                sum += x * x;
            }
            sum = join_lanes<column_lanes>(sum, Add{}, mask);
            if (lane == 0) squares[c] = sum;
        }
    }

    __syncthreads();
    double terms = 0.0;
    for (Index i = threadIdx.x; i < d; i += blockDim.x) terms += static_cast<double>(squares[i]) * static_cast<double>(squares[d + i]);
    terms = join_block(terms, Add{});
    if (threadIdx.x == 0) state = {std::sqrt(terms), G, true};
}

/// A tile of M. Of a triangle T what is below the diagonal was never written.
template <class A>
__global__ void __launch_bounds__(device::product_threads) interaction_kernel(Call<A> p) {
    const Index n = p.s.values(), d = p.s.head_dim, top = CudaLayout<A>::rows_of_m(p.s);
    const Index across = ceil_div(n, device::product_tile), tiles = ceil_div(top, device::product_tile) * across;
    const Index head = blockIdx.x / tiles, tile = blockIdx.x % tiles;
    const Index row = tile / across * device::product_tile, column = tile % across * device::product_tile;
    if (!p.w.heads[head].finite) return;
    const A* const t = p.w.t + head * n * 2 * d;
    const bool tall = p.tall();
    const Index from = tall ? row : 0;  // Tq is zero to the left
    A sum[4][4];
    device::product<false, false>(
        d - from,
        [&](int i, Index k) {
            const Index r = row + i, c = from + k;
            return r < top && !(tall && c < r) ? t[r * 2 * d + c] : A(0);
        },
        [&](Index k, int j) {
            const Index r = column + j, c = d + from + k;
            return r < n && !(tall && c < r) ? t[r * 2 * d + c] : A(0);
        },
        sum);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const Index r = row + threadIdx.x / 16 + 16 * i, c = column + threadIdx.x % 16 + 16 * j;
            if (r < top && c < n) p.w.m[(head * top + r) * n + c] = sum[i][j];
        }
}

/// S or F, and the diagonal and off[i] to its left in row i + 1 of a tridiagonal matrix of the same singular values.
///
/// A reflection 1 - g u u^T takes x to x - sign u w^T - w u^T, w = g p - (g^2 p.u / 2) u, p = x u; p.u = 0 where x is skew.
template <class A, bool in_shared>
__global__ void __launch_bounds__(512) tridiagonal_kernel(Call<A> p) {
    extern __shared__ __align__(16) unsigned char memory[];
    const Index task = blockIdx.x, head = task / 2, n = p.s.values(), top = CudaLayout<A>::rows_of_m(p.s);
    const HeadState state = p.w.heads[head];
    if (!state.finite) return;
    const A sign = task % 2 == 0 ? A(-1) : A(1);
    const PartLayout<A> layout(n);
    constexpr int V = PartLayout<A>::V;
    const Index ld = layout.ld, width = layout.width;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    A* x;
    if constexpr (in_shared)
        x = reinterpret_cast<A*>(memory);
    else
        x = reinterpret_cast<A*>(p.w.parts) + task * (n * ld + 5 * warps * width);
    A *const vectors = x + n * ld, *const partial = vectors + 3 * warps * width;

    const A* const m = p.w.m + head * top * n;
    A most = A(0);
    for (Index i = warp; i < n; i += warps)
        for (Index c = lane; c < ld; c += 32) {
            const A e = i < top && c < n ? m[i * n + c] : A(0);
            x[i * ld + c] = e;
            most = Largest{}(most, std::abs(e));
        }
    most = join_block(most, Largest{});
    // The parts are scaled once more: Q' K'^T may be small by cancellation.
    int shift = most > A(0) ? std::ilogb(static_cast<double>(most)) : 0;
    shift = shift < -100 ? -100 : shift > 100 ? 100 : shift;
    const A factor = static_cast<A>(std::ldexp(0.5, -shift));
    double squares = 0.0;
    for (Index i = warp; i < n; i += warps)
        for (Index c = lane; c <= i; c += 32) {
            const A low = x[i * ld + c], high = x[c * ld + i];
            const A e = (low + sign * high) * factor;
            x[i * ld + c] = e;
            x[c * ld + i] = i == c ? e : (high + sign * low) * factor;
            squares += (i == c ? 1.0 : 2.0) * (static_cast<double>(e) * static_cast<double>(e));
        }
    const double norm = part_norm(std::sqrt(join_block(squares, Add{})), std::ldexp(state.terms, -shift), n, roundoff<A>);
    if (threadIdx.x == 0) p.w.states[task] = {norm, shift};
    if (norm == 0.0 || !p.part(task % 2).want_spectrum()) return;

    A *v = vectors + warp * 3 * width, *w = v + width, *u = w + width;
    for (Index c = lane; c < width; c += 32) v[c] = w[c] = A(0);
    __syncwarp();
    double *const diagonal = p.spectrum(task), *const off = diagonal + n;
    for (Index r = n - 1;; --r) {
        const A vr = sign * v[r], wr = w[r];
        const A* const row = x + r * ld;
        const auto updated = [&](A e, A vc, A wc) { return e - vr * wc - wr * vc; };
        if (threadIdx.x == 0) diagonal[r] = static_cast<double>(updated(row[r], v[r], w[r]));
        if (r == 0) return;
        const A first = updated(row[r - 1], v[r - 1], w[r - 1]);
        A rest = A(0);
        for (Index c = lane * V; c < r; c += 32 * V) {
            auto unit = device::load_wide(row + c);
            const auto vc = device::load_wide(v + c), wc = device::load_wide(w + c);
#pragma unroll
            for (int e = 0; e < V; ++e) {
                unit.x[e] = c + e < r - 1 ? updated(unit.x[e], vc.x[e], wc.x[e]) : A(0);
                rest += unit.x[e] * unit.x[e];
            }
            store_wide(u + c, unit);
        }
        const Reflector<A> reflector(first, join_lanes<32>(rest, Add{}));
        if (lane == (r - 1) / V % 32) u[r - 1] = reflector.top;  // which this lane has made zero
        if (threadIdx.x == 0) off[r - 1] = static_cast<double>(first - reflector.top);
        __syncwarp();

        A* const products = partial + (r & 1) * warps * width;
        for (Index c = lane * V; c < r; c += 32 * V) {
            const auto vc = device::load_wide(v + c), wc = device::load_wide(w + c);
            device::Wide<A> sum{};
            A* place = x + warp * ld + c;
#pragma unroll 4
            for (Index i = warp; i < r; i += warps, place += warps * ld) {
                const A vi = sign * v[i], wi = w[i], ui = u[i];
                auto unit = device::load_wide(place);
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    unit.x[e] = unit.x[e] - vi * wc.x[e] - wi * vc.x[e];
                    sum.x[e] += unit.x[e] * ui;
                }
                store_wide(place, unit);
            }
            store_wide(products + warp * width + c, sum);
        }
        __syncthreads();
        A along = A(0);
        for (Index c = lane * V; c < r; c += 32 * V) {
            device::Wide<A> sum{};
            for (int i = 0; i < warps; ++i) {
                const auto unit = device::load_wide(products + i * width + c);
#pragma unroll
                for (int e = 0; e < V; ++e) sum.x[e] += sign * unit.x[e];
            }
            store_wide(w + c, sum);
            const auto uc = device::load_wide(u + c);
#pragma unroll
            for (int e = 0; e < V; ++e) along += sum.x[e] * uc.x[e];
        }
        const A g = reflector.weight, half = sign > A(0) ? A(0.5) * g * (g * join_lanes<32>(along, Add{})) : A(0);
        for (Index c = lane * V; c < r; c += 32 * V) {
            auto unit = device::load_wide(w + c);
            const auto uc = device::load_wide(u + c);
#pragma unroll
            for (int e = 0; e < V; ++e) unit.x[e] = g * unit.x[e] - half * uc.x[e];
            store_wide(w + c, unit);
        }
        __syncwarp();
        A* const before = v;
        v = u;
        u = before;
    }
}

}  // namespace INTERSTATE_KERNELS

}  // namespace sd_decomposition::detail
}  // namespace interstate::inline INTERSTATE_ABI
