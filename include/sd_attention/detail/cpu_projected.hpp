// S-D attention on the CPU (docs/ops/sd_attention.md): the projection x = K^T u as a product of tiles of u with K, then attention or linear
// attention on x, u and v, then, in backward, K dx for du and the sum of u dx^T for dK.
//
// x, u, the gradients of both and, of 16-bit storage, v, o and dv as well, lie in the workspace in the accumulator's dtype, head by head:
// nothing is rounded between the projection and the scores, and rows of a head lie next to each other. dK is summed by parts that follow
// from the shape alone, so that results are the same bits for any number of threads.
//
// What it costs, multiply-adds a token and head: r r forward, 3 r r backward, beside what the operator inside costs.
#pragma once

#include <algorithm>

#include <attention/attention.hpp>
#include <interstate/cpu/parallel.hpp>
#include <interstate/cpu/rows.hpp>
#include <linear_attention/linear_attention.hpp>
#include <sd_attention/reference.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_attention::detail {

using simd::pad;
using simd::padded;

inline constexpr Index tile_rows = 128;
/// Parts of the sum of dK over the tiles of all batch rows.
inline constexpr Index most_parts = 16;

/// Memory of a call. Rows of a head, `rows` of them, are ldr or ldv apart; those behind its last token are the padding of its last tile.
template <class A>
struct ProjectedLayout {
    Index r, dv, ldr, ldv, rows;
    Index tiles, parts;             // of a batch row's rows; of dK
    double* generator;              // (H, r, r): K, and in backward dK
    A *K, *turned;                  // (H, ldr, ldr): K times the scale of eq. 5, and that transposed
    A *x, *u, *dx, *du;             // (B, H, rows, ldr)
    A *v, *o, *dout, *dvalues;      // (B, H, rows, ldv), of 16-bit storage
    A* sums;                        // (parts, H, ldr, ldr)
    A* queries;                     // (B, n, H, r), of a step: x in the storage dtype
    std::byte* inner;
    std::size_t inner_bytes;

    ProjectedLayout(Arena& arena, const cpu& exec, const Options& options, const Shape& s, pass which)
        : r(s.channels), dv(s.value_dim), ldr(padded(r)), ldv(padded(dv)) {
        const bool back = which == pass::backward, steps = which == pass::step, wide = !steps && sizeof_of(s.dtype) < sizeof(A);
        // Of tensors without elements the extents may be anything.
        const bool any = s.batch > 0 && s.length > 0 && s.heads > 0 && (r > 0 || dv > 0);
        tiles = any ? ceil_div(s.length, tile_rows) : 0;
        parts = std::min(most_parts, s.batch * tiles);
        rows = any ? padded(s.length) + pad : 0;
        const Index heads = any ? s.batch * s.heads * rows : 0, square = s.heads > 0 ? s.heads * ldr * ldr : 0;
        const auto take = [&](Index n, bool needed) { return arena.take<A>(needed ? n : 0); };
        generator = arena.take<double>(s.heads > 0 ? s.heads * r * r : 0);
        K = take(square, true), turned = take(square, back);
        x = take(heads * ldr, true), u = take(heads * ldr, true), dx = take(heads * ldr, back), du = take(heads * ldr, back);
        v = take(heads * ldv, wide), o = take(heads * ldv, wide && (!back || options.softmax()));
        dout = take(heads * ldv, wide && back), dvalues = take(heads * ldv, wide && back);
        sums = take(parts * square, back);
        queries = take(any ? s.batch * s.length * s.heads * r : 0, steps);
        inner_bytes = steps              ? step_bytes(exec, options, s)
                      : options.softmax() ? attention::workspace_size(exec, softmax_options(), attention_of(s, dtype_of<A>), which)
                                          : linear_attention::workspace_size(exec, linear_of(options), linear_shape_of(s, dtype_of<A>),
                                                                             which);
        inner = arena.take<std::byte>(static_cast<Index>(inner_bytes));
    }
    static constexpr std::size_t sizeof_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
    Workspace memory() const { return {inner, inner_bytes}; }
};

template <class T, class W>
struct ProjectedCall {
    using A = acc_t<T>;
    static constexpr bool wide = !std::is_same_v<T, A>;

    const cpu& exec;
    const Options& options;
    const Inputs<T, W>& in;
    ProjectedLayout<A> z;
    Shape s = shape_of(in);
    simd::Products<A> product{exec.isa};

    Index begin() const { return in.cu_seqlens ? in.cu_seqlens(0) : 0; }
    Index end() const { return in.cu_seqlens ? in.cu_seqlens(s.sequences) : s.length; }
    A* at(A* of, Index ld, Index b, Index h, Index row) const { return of + ((b * s.heads + h) * z.rows + row) * ld; }
    A* square(A* of, Index h) const { return of + h * z.ldr * z.ldr; }
    template <class E>
    View<E, 4> all(E* of, Index columns, Index ld) const {
        return view(of, {s.batch, s.length, s.heads, columns}, {s.heads * z.rows * ld, ld, z.rows * ld, Index{1}});
    }
    View<const A, 4> read(const A* of, Index columns, Index ld) const { return all(of, columns, ld); }

    /// f(b, first row, rows) of tiles [from, to) of all batch rows.
    template <class F>
    void tiles(Index from, Index to, F&& f) const {
        for (Index n = from; n < to; ++n) {
            const Index row = begin() + n % z.tiles * tile_rows, count = std::min(tile_rows, end() - row);
            if (count > 0) f(n / z.tiles, row, count);
        }
    }
    /// f(b, h, first row, rows), in parallel.
    template <class F>
    void each_tile(F&& f) const {
        parallel_for(s.batch * z.tiles * s.heads, exec.threads, [&](Index task, int) {
            const Index h = task % s.heads, n = task / s.heads;
            tiles(n, n + 1, [&](Index b, Index row, Index count) { f(b, h, row, count); });
        });
    }

    void make_generators(bool transposed) const {
        parallel_for(s.heads, exec.threads, [&](Index h, int) {
            double* const K = z.generator + h * z.r * z.r;
            make_generator(options, s, in.generator, h, K);
            const double factor = factor_of(options, s);
            A *const to = square(z.K, h), *const turned = square(z.turned, h);
            std::fill_n(to, z.ldr * z.ldr, A(0));
            if (transposed) std::fill_n(turned, z.ldr * z.ldr, A(0));
            for (Index e = 0; e < z.r; ++e)
                for (Index c = 0; c < z.r; ++c) {
                    to[e * z.ldr + c] = static_cast<A>(factor * K[e * z.r + c]);
                    if (transposed) turned[c * z.ldr + e] = to[e * z.ldr + c];
                }
        });
    }
    /// u and x (eq. 3), and v where it is widened.
    void project(bool values) const {
        each_tile([&](Index b, Index h, Index row, Index count) {
            A* const u = at(z.u, z.ldr, b, h, row);
            simd::load_rows<T>(exec.isa, in.u, b, row, h, count, u, z.ldr);
            product({u, z.ldr}, square(z.K, h), z.ldr, at(z.x, z.ldr, b, h, row), z.ldr, count, z.ldr, z.r, false);
            if (wide && values) simd::load_rows<T>(exec.isa, in.v, b, row, h, count, at(z.v, z.ldv, b, h, row), z.ldv);
        });
    }
    /// The operator's own tensor, or the copy of it in the accumulator's dtype.
    template <class X>
    auto own_or(const X& own, A* copy) const {
        if constexpr (wide)
            return own ? all(copy, z.dv, z.ldv) : View<A, 4>{};
        else
            return own;
    }
    /// Never null, as v without elements may be: its extents count.
    View<const A, 4> values() const {
        if constexpr (wide)
            return all(z.v, z.dv, z.ldv);
        else
            return in.v;
    }

    Status forward(const Outputs<T>& out) const {
        make_generators(false);
        project(true);
        const auto x = read(z.x, z.r, z.ldr), u = read(z.u, z.r, z.ldr);
        const auto o = own_or(out.o, z.o);
        if (options.softmax())
            INTERSTATE_RETURN_IF_ERROR(attention::forward(exec, softmax_options(),
                                                          attention::Inputs<A>{.q = x, .k = u, .v = values(), .cu_seqlens = in.cu_seqlens},
                                                          attention::Outputs<A>{.o = o, .lse = out.lse}, Saved{}, z.memory()));
        else
            INTERSTATE_RETURN_IF_ERROR(linear_attention::forward(
                exec, linear_of(options), linear_attention::Inputs<A>{.q = x, .k = u, .v = values(), .cu_seqlens = in.cu_seqlens},
                linear_attention::Outputs<A>{.o = o}, Saved{}, z.memory()));
        if constexpr (wide) {
            zero_outside_sequences(out.o, in.cu_seqlens);
            each_tile([&](Index b, Index h, Index row, Index count) {
                simd::store_rows<T>(exec.isa, at(z.o, z.ldv, b, h, row), z.ldv, out.o, b, row, h, count);
            });
        }
        return {};
    }

    Status backward(const Outputs<T>& out, const Upstream<T>& upstream, const Grads<T, W>& grads) const {
        const auto& g = grads.generator;
        const bool generators = g.P || g.a || g.b || g.delta;
        make_generators(true);
        project(true);
        if constexpr (wide)
            each_tile([&](Index b, Index h, Index row, Index count) {
                simd::load_rows<T>(exec.isa, upstream.o, b, row, h, count, at(z.dout, z.ldv, b, h, row), z.ldv);
                if (options.softmax()) simd::load_rows<T>(exec.isa, out.o, b, row, h, count, at(z.o, z.ldv, b, h, row), z.ldv);
            });
        const auto x = read(z.x, z.r, z.ldr), u = read(z.u, z.r, z.ldr);
        const View<const A, 4> dout = own_or(upstream.o, z.dout);
        const auto dx = grads.u || generators ? all(z.dx, z.r, z.ldr) : View<A, 4>{}, du = grads.u ? all(z.du, z.r, z.ldr) : View<A, 4>{};
        const auto dvalues = own_or(grads.v, z.dvalues);
        if (options.softmax())
            INTERSTATE_RETURN_IF_ERROR(
                attention::backward(exec, softmax_options(),
                                    attention::Inputs<A>{.q = x, .k = u, .v = values(), .cu_seqlens = in.cu_seqlens},
                                    attention::Outputs<A>{.o = own_or(out.o, z.o), .lse = out.lse}, Saved{},
                                    attention::Upstream<A>{.o = dout, .lse = upstream.lse}, attention::Grads<A>{dx, du, dvalues},
                                    z.memory()));
        else
            INTERSTATE_RETURN_IF_ERROR(linear_attention::backward(
                exec, linear_of(options), linear_attention::Inputs<A>{.q = x, .k = u, .v = values(), .cu_seqlens = in.cu_seqlens},
                linear_attention::Outputs<A>{}, Saved{}, linear_attention::Upstream<A>{.o = dout},
                linear_attention::Grads<A>{.q = dx, .k = du, .v = dvalues}, z.memory()));
        zero_outside_sequences(grads.u, in.cu_seqlens);
        if (wide) zero_outside_sequences(grads.v, in.cu_seqlens);
        each_tile([&](Index b, Index h, Index row, Index count) {
            if (grads.u) {  // eq. 7
                A* const own = at(z.du, z.ldr, b, h, row);
                product({at(z.dx, z.ldr, b, h, row), z.ldr}, square(z.turned, h), z.ldr, own, z.ldr, count, z.ldr, z.r, true);
                simd::store_rows<T>(exec.isa, own, z.ldr, grads.u, b, row, h, count);
            }
            if (wide) simd::store_rows<T>(exec.isa, at(z.dvalues, z.ldv, b, h, row), z.ldv, grads.v, b, row, h, count);
        });
        if (generators) generator_sums(g);
        return {};
    }
    /// dK (eq. 8), and from it the gradients of the generator.
    void generator_sums(const BasicGenerator<W>& grads) const {
        const Index each = z.parts > 0 ? ceil_div(s.batch * z.tiles, z.parts) : 0;
        parallel_for(z.parts * s.heads, exec.threads, [&](Index task, int) {
            const Index h = task % s.heads, part = task / s.heads;
            A* const sum = square(z.sums, task);
            std::fill_n(sum, z.ldr * z.ldr, A(0));
            tiles(part * each, std::min((part + 1) * each, s.batch * z.tiles), [&](Index b, Index row, Index count) {
                product({at(z.u, z.ldr, b, h, row), 1, z.ldr}, at(z.dx, z.ldr, b, h, row), z.ldr, sum, z.ldr, z.r, z.ldr, count, true);
            });
        });
        parallel_for(s.heads, exec.threads, [&](Index h, int) {
            double* const dK = z.generator + h * z.r * z.r;
            const double factor = factor_of(options, s);
            for (Index e = 0; e < z.r; ++e)
                for (Index c = 0; c < z.r; ++c) {
                    double sum = 0.0;
                    for (Index part = 0; part < z.parts; ++part)
                        sum += static_cast<double>(square(z.sums, part * s.heads + h)[e * z.ldr + c]);
                    dK[e * z.r + c] = factor * sum;
                }
            generator_gradients(options, s, in.generator, grads, h, dK);
        });
    }

    /// x of the tokens of a step, (B, n, H, r).
    View<const T, 4> queries() const {
        make_generators(false);
        project(false);
        if constexpr (!wide) return read(z.x, z.r, z.ldr);
        const auto to = view(reinterpret_cast<T*>(z.queries), {s.batch, s.length, s.heads, z.r});
        each_tile([&](Index b, Index h, Index row, Index count) {
            simd::store_rows<T>(exec.isa, at(z.x, z.ldr, b, h, row), z.ldr, to, b, row, h, count);
        });
        return to;
    }
};

}  // namespace sd_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
