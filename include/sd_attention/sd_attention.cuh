// S-D attention, public: the executor `cuda`. Equations, shapes and dtypes: docs/ops/sd_attention.md.
//
// The same names and arguments as sd_attention/sd_attention.hpp, as overloads for `cuda`. Views point to device memory; calls are
// asynchronous on exec.stream and allocate nothing, so that they can be captured in a CUDA graph.
#pragma once

#include <attention/attention.cuh>
#include <linear_attention/linear_attention.cuh>
#include <sd_attention/detail/cuda_projection.cuh>
#include <sd_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_attention {

namespace detail {
inline namespace INTERSTATE_KERNELS {

/// Calls f(std::integral_constant<int, dim>) with the columns of the tiles that hold a head, 64 or 128; 0 asks for the general kernels.
template <class T, class F>
auto dispatch_dim(const Shape& s, F&& f) {
    if constexpr (std::is_same_v<T, f64>) {
        return f(std::integral_constant<int, 0>{});
    } else {
        std::size_t limit = 0;
        const bool known = shared_memory_limit(limit).ok();
        return dispatch_size<64, 128>(s.channels, [&](auto dim) {
            if constexpr (dim > 0)
                if (known && ProjectionForm<T, dim>::backward_shared <= limit) return f(dim);
            return f(std::integral_constant<int, 0>{});
        });
    }
}

/// What a call carves out of its workspace.
template <class T>
struct ProjectionMemory {
    T *K, *x, *dx;       // (H, r, r); (B, L, H, r)
    acc_t<T>* sums;      // (B, H, parts, r, r), the parts of dK
    double* dK;          // (H, r, r)
    std::byte* inner;
    std::size_t inner_bytes;

    ProjectionMemory(Arena& arena, const cuda& exec, const Options& options, const Shape& s, pass which) {
        const bool back = which == pass::backward;
        const bool any = s.channels > 0 && s.heads > 0 && s.batch > 0 && s.length > 0;
        const Index rows = any ? s.batch * s.length * s.heads * s.channels : 0, square = s.heads > 0 ? s.heads * s.channels * s.channels : 0;
        K = arena.take<T>(square);
        x = arena.take<T>(rows);
        dx = arena.take<T>(back ? rows : 0);
        sums = arena.take<acc_t<T>>(back && any ? s.batch * parts_of_row(s) * square : 0);
        dK = arena.take<double>(back ? square : 0);
        inner_bytes = which == pass::step ? step_bytes(exec, options, s)
                      : options.softmax() ? workspace_size(exec, softmax_options(), attention_of(s, s.dtype), which)
                                          : workspace_size(exec, linear_of(options), linear_shape_of(s, s.dtype), which);
        inner = arena.take<std::byte>(static_cast<Index>(inner_bytes));
    }
    Workspace memory() const { return {inner, inner_bytes}; }
};

/// A grid has fewer than 2^31 blocks, and fewer than 65,536 along y.
inline Status check_grid(const Shape& s) {
    if (s.channels > 4096)
        return Status::error(StatusCode::unsupported, "u: channels is %lld, must be at most 4096 on cuda", static_cast<long long>(s.channels));
    const Index most = s.batch * ceil_div(s.length, device::product_tile) * s.heads;
    if (most < (Index{1} << 31)) return {};
    return Status::error(StatusCode::unsupported, "sd_attention on cuda: %lld blocks of rows, heads and batch rows, must be below 2^31",
                         static_cast<long long>(most));
}

template <class T, class W>
struct ProjectionCalls {
    const cuda& exec;
    const Options& options;
    const Inputs<T, W>& in;
    const ProjectionMemory<T>& memory;
    Shape s = shape_of(in);

    /// (B, L, H, r) of the workspace.
    template <class E>
    View<E, 4> all(E* of) const {
        return view(of, {s.batch, s.length, s.heads, s.channels});
    }
    /// The parts of `tokens` tokens each.
    ProjectionCall<T> call(Index tokens) const {
        const View<const T, 4> K{memory.K, {1, s.channels, s.heads, s.channels}, {0, s.channels, s.channels * s.channels, 1}};
        return {in.u, in.cu_seqlens, K, s.heads, ceil_div(s.length, tokens), tokens, device::moves_wide(in.u, s.channels), device::moves_wide(K, s.channels)};
    }
    dim3 grid(const ProjectionCall<T>& c, Index across = 1) const {
        const Index blocks = s.channels > 0 ? s.batch * s.heads * c.parts : 0;
        return {static_cast<unsigned>(blocks), static_cast<unsigned>(across)};
    }

    /// K, and x from it (eq. 1 to 3).
    Status project() const {
        if (s.channels == 0 || s.heads == 0) return {};
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "sd_attention.cuda generator", generator_kernel<T, W>, {dim3(static_cast<unsigned>(s.heads)), dim3(256)}, options, s,
                                          in.generator, factor_of(options, s), memory.K));
        const View<T, 4> x = all(memory.x);
        return dispatch_dim<T>(s, [&](auto dim) {
            if constexpr (dim == 0) {
                const auto c = call(device::product_tile);
                return launch(exec, "sd_attention.cuda.general project", general_project_kernel<T, false>,
                              {grid(c, device::product_tiles(s.channels)), dim3(device::product_threads)}, c, in.u, x);
            } else {
                using Form = ProjectionForm<T, dim>;
                const auto c = call(part_tokens(s));
                return launch(exec, "sd_attention.cuda.projected project", project_kernel<T, dim>, {grid(c), dim3(Form::threads), Form::forward_shared}, c,
                              x, device::moves_wide(x, s.channels));
            }
        });
    }
    /// du += K dx (eq. 7) where there is du, and the gradients of the generator that are wanted (eq. 8 to 10).
    Status add_gradients(const View<T, 4>& du, const BasicGenerator<W>& grads) const {
        if (s.channels == 0 || s.heads == 0) return {};
        const bool sums = grads.P || grads.a || grads.b || grads.delta;
        const View<const T, 4> dx = all(static_cast<const T*>(memory.dx));
        if (s.length > 0 && s.batch > 0)
            INTERSTATE_RETURN_IF_ERROR(dispatch_dim<T>(s, [&](auto dim) -> Status {
                const auto parts = call(part_tokens(s));
                if constexpr (dim == 0) {
                    const auto tiles = call(device::product_tile);
                    const Index across = device::product_tiles(s.channels);
                    if (du)
                        INTERSTATE_RETURN_IF_ERROR(launch(exec, "sd_attention.cuda.general du", general_project_kernel<T, true>,
                                                          {grid(tiles, across), dim3(device::product_threads)}, tiles, dx, du));
                    if (!sums) return {};
                    return launch(exec, "sd_attention.cuda.general dK", general_sum_kernel<T>,
                                  {grid(parts, across * across), dim3(device::product_threads)}, parts, dx, memory.sums);
                } else {
                    using Form = ProjectionForm<T, dim>;
                    return launch(exec, "sd_attention.cuda.projected gradients", project_gradient_kernel<T, dim>,
                                  {grid(parts), dim3(Form::threads), Form::backward_shared}, parts, dx, device::moves_wide(dx, s.channels), du,
                                  device::moves_wide(du, s.channels), sums ? memory.sums : nullptr);
                }
            }));
        if (!sums) return {};
        const auto heads = static_cast<unsigned>(s.heads), tiles = static_cast<unsigned>(ceil_div(s.channels * s.channels, 512));
        INTERSTATE_RETURN_IF_ERROR(launch(exec, "sd_attention.cuda dK", sum_parts_kernel<acc_t<T>>, {dim3(heads, tiles), dim3(512)},
                                          static_cast<const acc_t<T>*>(memory.sums), s.batch, parts_of_row(s), s.channels, factor_of(options, s), memory.dK));
        return launch(exec, "sd_attention.cuda generator gradient", generator_gradient_kernel<W>, {dim3(heads), dim3(128)}, options, s, in.generator, grads,
                      static_cast<const double*>(memory.dK));
    }
};

}  // namespace INTERSTATE_KERNELS
}  // namespace detail

inline namespace INTERSTATE_KERNELS {

/// Bytes of `Saved`, on the current device: what linear attention keeps; softmax keeps o and lse alone.
inline std::size_t saved_size(const cuda& exec, const Options& options, const Shape& s) {
    return options.softmax() ? 0 : saved_size(exec, detail::linear_of(options), detail::linear_shape_of(s, s.dtype));
}

/// Bytes of scratch memory for a pass, on the current device: x, in backward dx and the parts of dK, and what attention or linear attention
/// needs.
inline std::size_t workspace_size(const cuda& exec, const Options& options, const Shape& s, pass which) {
    return dispatch_dtype(s.dtype, [&](auto t) {
        Arena arena;
        detail::ProjectionMemory<decltype(t)>(arena, exec, options, s, which);
        return arena.required();
    });
}

/// The kernels of the projection on the current device; those of attention and linear attention are theirs to name.
inline KernelChoice which_kernel(const cuda&, const Options&, const Shape& s) {
    if (s.dtype == DType::f64) return {"sd_attention.cuda.general", "float64: no tensor cores"};
    if (s.channels > 128) return {"sd_attention.cuda.general", "heads of more than 128 channels: the projection without tensor cores"};
    if (std::size_t limit = 0; !shared_memory_limit(limit).ok())
        return {"sd_attention.cuda.projected or general", "there is no device to ask for its shared memory: the projection on tensor cores where it suffices"};
    const bool fits = dispatch_dtype(s.dtype, [&](auto t) { return detail::dispatch_dim<decltype(t)>(s, [](auto dim) { return dim > 0; }); });
    if (!fits) return {"sd_attention.cuda.general", "a block of this device has too little shared memory: the projection without tensor cores"};
    return {"sd_attention.cuda.projected", "the projection on tensor cores; 16 bytes at once where strides and alignment allow it, single elements otherwise"};
}

/// As on the CPU, but that x, K and dx, which are factors of products, are rounded to T. Pass `saved` memory if backward will follow,
/// Saved{} if not. A launch error is a Status; cu_seqlens is checked on the device and reported in exec.flags.
template <class T, class W>
Status forward(const cuda& exec, const Options& options, const Inputs<T, W>& in, const Outputs<T>& out, Saved saved, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    if (saved.data) INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, s)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    Arena arena(ws.data);
    const detail::ProjectionMemory<T> memory(arena, exec, options, s, pass::forward);
    const detail::ProjectionCalls<T, W> calls{exec, options, in, memory};
    INTERSTATE_RETURN_IF_ERROR(calls.project());
    const View<const T, 4> x = calls.all(static_cast<const T*>(memory.x));
    if (options.softmax())
        return attention::forward(exec, detail::softmax_options(), attention::Inputs<T>{.q = x, .k = in.u, .v = in.v, .cu_seqlens = in.cu_seqlens}, out,
                                  Saved{}, memory.memory());
    return linear_attention::forward(exec, detail::linear_of(options),
                                     linear_attention::Inputs<T>{.q = x, .k = in.u, .v = in.v, .cu_seqlens = in.cu_seqlens},
                                     linear_attention::Outputs<T>{.o = out.o}, saved, memory.memory());
}

/// The gradients whose views are not null, the same bits on every call. `saved` is what forward filled for the same inputs.
template <class T, class W>
Status backward(const cuda& exec, const Options& options, const Inputs<T, W>& in, const Outputs<T>& out, Saved saved, const Upstream<T>& upstream,
                const Grads<T, W>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, in, out, upstream, grads));
    const Shape s = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    INTERSTATE_RETURN_IF_ERROR(check_memory("saved", saved.data, saved.size, saved_size(exec, options, s)));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    Arena arena(ws.data);
    const detail::ProjectionMemory<T> memory(arena, exec, options, s, pass::backward);
    const detail::ProjectionCalls<T, W> calls{exec, options, in, memory};
    INTERSTATE_RETURN_IF_ERROR(calls.project());
    const View<const T, 4> x = calls.all(static_cast<const T*>(memory.x));
    const auto& g = grads.generator;
    const View<T, 4> dx = grads.u || g.P || g.a || g.b || g.delta ? calls.all(memory.dx) : View<T, 4>{};
    if (options.softmax())
        INTERSTATE_RETURN_IF_ERROR(attention::backward(exec, detail::softmax_options(),
                                                       attention::Inputs<T>{.q = x, .k = in.u, .v = in.v, .cu_seqlens = in.cu_seqlens}, out, Saved{},
                                                       upstream, attention::Grads<T>{dx, grads.u, grads.v}, memory.memory()));
    else
        INTERSTATE_RETURN_IF_ERROR(linear_attention::backward(
            exec, detail::linear_of(options), linear_attention::Inputs<T>{.q = x, .k = in.u, .v = in.v, .cu_seqlens = in.cu_seqlens},
            linear_attention::Outputs<T>{.o = out.o}, saved, linear_attention::Upstream<T>{.o = upstream.o},
            linear_attention::Grads<T>{.q = dx, .k = grads.u, .v = grads.v}, memory.memory()));
    return calls.add_gradients(grads.u, g);
}

/// n tokens for every batch row, softmax, as on the CPU; lengths and block table are read on the device alone, as in attention's step.
template <class T, class W>
Status step(const cuda& exec, const Options& options, const Params<W>& params, const Cache<T>& cache, const Tokens<T>& tokens, const TokensOut<T>& out,
            Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, cache, tokens, out));
    const Shape s = shape_of(params, cache, tokens);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    Arena arena(ws.data);
    const detail::ProjectionMemory<T> memory(arena, exec, options, s, pass::step);
    const Inputs<T, W> in = inputs_of(params, tokens);
    const detail::ProjectionCalls<T, W> calls{exec, options, in, memory};
    INTERSTATE_RETURN_IF_ERROR(calls.project());
    return attention::step(exec, detail::softmax_options(), attention::Params{}, cache,
                           attention::Tokens<T>{.q = calls.all(static_cast<const T*>(memory.x)), .k = tokens.u, .v = tokens.v}, out, memory.memory());
}
template <class T, class W>
Status step(const cuda& exec, const Options& options, const Params<W>& params, const Cache<T>& cache, const Token<T>& token, const TokenOut<T>& out,
            Workspace ws) {
    return step(exec, options, params, cache, tokens_of(token), attention::tokens_of(out), ws);
}
/// One token for every batch row, identity and elu1; the state is updated in place.
template <class T, class W>
Status step(const cuda& exec, const Options& options, const Params<W>& params, const State<acc_t<T>>& state, const Token<T>& token,
            const TokenOut<T>& out, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(options, params, state, token, out));
    const Shape s = shape_of(params, state, token);
    INTERSTATE_RETURN_IF_ERROR(detail::check_grid(s));
    INTERSTATE_RETURN_IF_ERROR(check_workspace("workspace", ws, workspace_size(exec, options, s, pass::step)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    Arena arena(ws.data);
    const detail::ProjectionMemory<T> memory(arena, exec, options, s, pass::step);
    const Inputs<T, W> in = inputs_of(params, tokens_of(token));
    const detail::ProjectionCalls<T, W> calls{exec, options, in, memory};
    INTERSTATE_RETURN_IF_ERROR(calls.project());
    return linear_attention::step(
        exec, detail::linear_of(options), linear_attention::Params{}, state,
        linear_attention::Token<T>{.q = detail::only_token(calls.all(static_cast<const T*>(memory.x))), .k = token.u, .v = token.v},
        linear_attention::TokenOut<T>{out.o}, memory.memory());
}

}  // namespace INTERSTATE_KERNELS
}  // namespace sd_attention
}  // namespace interstate::inline INTERSTATE_ABI
