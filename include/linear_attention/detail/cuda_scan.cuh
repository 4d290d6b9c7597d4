// Linear attention on the GPU for every size, stride and dtype: token by token, in float64 (docs/ops/linear_attention.md, eq. 2 to 9).
//
// Each pass is a matrix X that takes an outer product from every token and is read after it. A column of ones behind the values makes z a column of S,
// and dw behind e makes r one of R:
//
//     o       X = S        rows phi(k)  columns v       read by phi(q)    column dv: w
//     dq      X = S^T      rows v       columns phi(k)  read by e
//     dk      X = R^T      rows e       columns phi(q)  read by v         backwards in time
//     dv      X = R        rows phi(q)  columns e       read by phi(k)    backwards in time
#pragma once

#include <interstate/cuda/sequences.cuh>
#include <interstate/workspace.hpp>
#include <linear_attention/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace linear_attention::detail {

enum class Scan { output, query, key, value };

inline constexpr int scan_columns = 32, scan_groups = 8, scan_threads = scan_columns * scan_groups;
inline constexpr Index most_scan_shared = 96 * 1024;

/// Tensors of a scan in double. `rows` has dv + 1 columns: o before it is divided and w, then e and dw.
template <class T>
struct ScanCall {
    Shape shape;
    Inputs<T> in;
    FeatureMap map;
    bool divides;
    double* rows;  // (B, L, Hq, dv + 1)
    Outputs<T> out;
    Upstream<T> upstream;
    Grads<T> grads;

    __device__ Index width() const { return shape.value_dim + (divides ? 1 : 0); }
    __device__ double phi(const View<const T, 4>& x, Index b, Index t, Index h, Index m) const { return feature(map, static_cast<double>(x(b, t, h, m))); }
    __device__ double value(Index b, Index t, Index h, Index c) const { return c < shape.value_dim ? static_cast<double>(in.v(b, t, h, c)) : 1.0; }
    __device__ double& row(Index b, Index t, Index h, Index c) const { return rows[((b * shape.length + t) * shape.query_heads + h) * (shape.value_dim + 1) + c]; }
};

/// Rows and columns of X in a pass.
INTERSTATE_HD inline Index scan_rows(const Shape& s, bool divides, Scan pass) {
    return pass == Scan::output || pass == Scan::value ? s.head_dim : s.value_dim + (divides ? 1 : 0);
}
INTERSTATE_HD inline Index scan_width(const Shape& s, bool divides, Scan pass) {
    return pass == Scan::query || pass == Scan::key ? s.head_dim : s.value_dim + (divides && pass == Scan::output ? 1 : 0);
}
inline Index scan_blocks(const Shape& s, bool divides, Scan pass) { return s.states() * s.kv_heads * ceil_div(scan_width(s, divides, pass), scan_columns); }
/// Doubles of a block: X, a row and what reads it.
INTERSTATE_HD inline Index scan_doubles(Index rows) { return rows * (scan_columns + 2) + scan_threads; }

/// Scratch memory of a call: the rows, and X where shared memory is too small.
struct ScanMemory {
    double *rows, *x;
    ScanMemory(Arena& arena, const Shape& s, bool divides, bool backward) : rows(arena.take<double>(s.batch * s.length * s.query_heads * (s.value_dim + 1))) {
        Index most = 0;
        for (const Scan pass : {Scan::output, Scan::query, Scan::key, Scan::value}) {
            const Index doubles = scan_doubles(scan_rows(s, divides, pass));
            if ((backward || pass == Scan::output) && doubles * Index{sizeof(double)} > most_scan_shared) most = std::max(most, doubles * scan_blocks(s, divides, pass));
        }
        x = arena.take<double>(most);
    }
};

inline namespace INTERSTATE_KERNELS {

/// `memory`: X of each block where it is not in shared memory.
template <Scan pass, class T>
__global__ __launch_bounds__(scan_threads) void scan_kernel(const __grid_constant__ ScanCall<T> call, double* memory) {
    extern __shared__ double scan_shared[];
    const Shape& s = call.shape;
    const Index rows = scan_rows(s, call.divides, pass), width = scan_width(s, call.divides, pass), parts = ceil_div(width, scan_columns), G = s.group();
    const Index n = blockIdx.x / parts / s.kv_heads, h = blockIdx.x / parts % s.kv_heads, c = blockIdx.x % parts * scan_columns + threadIdx.x % scan_columns;
    const int lane = static_cast<int>(threadIdx.x) % scan_columns, first = static_cast<int>(threadIdx.x) / scan_columns;
    double* const x = memory ? memory + static_cast<Index>(blockIdx.x) * scan_doubles(rows) : scan_shared;
    double *const given = x + rows * scan_columns, *const reader = given + rows, *const sums = reader + rows;
    const RowRange range = device::checked_rows(call.in.cu_seqlens, n, s.length);
    const Index b = s.packed() ? 0 : n;
    constexpr bool backwards = pass == Scan::key || pass == Scan::value;
    const bool inside = c < width;

    // Where element (i, c) of X is in the state tensors.
    const auto state_at = [&](const auto& S, const auto& Z, Index i, auto&& f) {
        const Index m = pass == Scan::output || pass == Scan::value ? i : c, column = pass == Scan::output || pass == Scan::value ? c : i;
        if (column < s.value_dim) {
            if (S) f(S(n, h, m, column));
        } else if (Z) {
            f(Z(n, h, m));
        }
    };
    for (Index i = first; i < rows; i += scan_groups) {
        double at = 0.0;
        if (inside) {
            if constexpr (backwards)
                state_at(call.upstream.sT, call.upstream.zT, i, [&](const auto& from) { at = static_cast<double>(from); });
            else
                state_at(call.in.s0, call.in.z0, i, [&](const auto& from) { at = static_cast<double>(from); });
        }
        x[i * scan_columns + lane] = at;
    }
    // What a token gives to row i, to column c, and what reads row i; u counts the queries that give or read.
    const auto to_row = [&](Index t, Index u, Index i) {
        if constexpr (pass == Scan::output) return call.phi(call.in.k, b, t, h, i);
        if constexpr (pass == Scan::query) return call.value(b, t, h, i);
        if constexpr (pass == Scan::key) return call.row(b, t, h * G + u, i);
        if constexpr (pass == Scan::value) return call.phi(call.in.q, b, t, h * G + u, i);
    };
    const auto to_column = [&](Index t, Index u) {
        if constexpr (pass == Scan::output) return call.value(b, t, h, c);
        if constexpr (pass == Scan::query) return call.phi(call.in.k, b, t, h, c);
        if constexpr (pass == Scan::key) return call.phi(call.in.q, b, t, h * G + u, c);
        if constexpr (pass == Scan::value) return call.row(b, t, h * G + u, c);
    };
    const auto reads = [&](Index t, Index u, Index i) {
        if constexpr (pass == Scan::output) return call.phi(call.in.q, b, t, h * G + u, i);
        if constexpr (pass == Scan::query) return call.row(b, t, h * G + u, i);
        if constexpr (pass == Scan::key) return call.value(b, t, h, i);
        if constexpr (pass == Scan::value) return call.phi(call.in.k, b, t, h, i);
    };
    const auto put = [&](Index t, Index u, double y) {
        if constexpr (pass == Scan::output) call.row(b, t, h * G + u, c) = y;
        if constexpr (pass == Scan::query) call.grads.q(b, t, h * G + u, c) = T(y * feature_slope(call.map, static_cast<double>(call.in.q(b, t, h * G + u, c))));
        if constexpr (pass == Scan::key)
            if (call.grads.k) call.grads.k(b, t, h, c) = T(y * feature_slope(call.map, static_cast<double>(call.in.k(b, t, h, c))));
        if constexpr (pass == Scan::value) call.grads.v(b, t, h, c) = T(y);
    };
    const Index givers = backwards ? G : 1, readers = backwards ? 1 : G;
    for (Index step = 0; step < range.end - range.begin; ++step) {
        const Index t = backwards ? range.end - 1 - step : range.begin + step;
        for (Index u = 0; u < givers; ++u) {
            for (Index i = threadIdx.x; i < rows; i += scan_threads) given[i] = to_row(t, u, i);
            __syncthreads();
            const double column = inside ? to_column(t, u) : 0.0;
            for (Index i = first; i < rows; i += scan_groups) x[i * scan_columns + lane] += given[i] * column;
            __syncthreads();
        }
        for (Index u = 0; u < readers; ++u) {
            for (Index i = threadIdx.x; i < rows; i += scan_threads) reader[i] = reads(t, u, i);
            __syncthreads();
            double sum = 0.0;
            for (Index i = first; i < rows; i += scan_groups) sum += x[i * scan_columns + lane] * reader[i];
            sums[threadIdx.x] = sum;
            __syncthreads();
            if (first == 0 && inside) {
                for (int k = 1; k < scan_groups; ++k) sum += sums[k * scan_columns + lane];
                put(t, u, sum);
            }
        }
        __syncthreads();
    }
    if constexpr (pass == Scan::output || pass == Scan::key) {
        using A = acc_t<T>;
        for (Index i = first; i < rows; i += scan_groups) {
            if (!inside) continue;
            const double at = x[i * scan_columns + lane];
            const auto store = [&](A& to) { to = static_cast<A>(at); };
            if constexpr (pass == Scan::output)
                state_at(call.out.sT, call.out.zT, i, store);
            else
                state_at(call.grads.s0, call.grads.z0, i, store);
        }
    }
}

/// Divides rows into o, or makes e and dw of them. A block a row and query head.
template <class T>
__global__ __launch_bounds__(128) void divide_rows_kernel(const __grid_constant__ ScanCall<T> call, bool backward) {
    const Shape& s = call.shape;
    const Index h = blockIdx.x % s.query_heads, t = blockIdx.x / s.query_heads % s.length, b = blockIdx.x / s.query_heads / s.length;
    if (s.packed() && (t < call.in.cu_seqlens(0) || t >= call.in.cu_seqlens(s.sequences))) return;
    const double w = call.divides ? call.row(b, t, h, s.value_dim) : 1.0, over = w == 0.0 ? 0.0 : 1.0 / w;
    __shared__ double parts[128];
    double along = 0.0;
    for (Index c = threadIdx.x; c < s.value_dim; c += blockDim.x) {
        double& at = call.row(b, t, h, c);
        if (backward) {
            const double e = static_cast<double>(call.upstream.o(b, t, h, c)) * over;
            along += at * over * e;
            at = e;
        } else {
            call.out.o(b, t, h, c) = T(at * over);
        }
    }
    if (!backward || !call.divides) return;
    parts[threadIdx.x] = along;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (int i = 1; i < 128; ++i) along += parts[i];
    call.row(b, t, h, s.value_dim) = -along;
}

template <Scan pass, class T>
Status launch_scan(const cuda& exec, const ScanCall<T>& call, double* x) {
    const Index doubles = scan_doubles(scan_rows(call.shape, call.divides, pass)), bytes = doubles * Index{sizeof(double)};
    const bool in_memory = bytes > most_scan_shared;
    return launch(exec, "linear_attention.cuda scan of tokens", scan_kernel<pass, T>,
                  {dim3(static_cast<unsigned>(scan_blocks(call.shape, call.divides, pass))), dim3(scan_threads), in_memory ? 0 : static_cast<std::size_t>(bytes)}, call,
                  in_memory ? x : nullptr);
}
template <class T>
Status launch_divide(const cuda& exec, const ScanCall<T>& call, bool backward) {
    const Shape& s = call.shape;
    return launch(exec, "linear_attention.cuda rows", divide_rows_kernel<T>, {dim3(static_cast<unsigned>(s.batch * s.length * s.query_heads)), dim3(128)}, call, backward);
}

template <class T>
Status run_scan_forward(const cuda& exec, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Workspace ws) {
    Arena arena(ws.data);
    const ScanMemory memory(arena, shape_of(in), options.divides(), false);
    const ScanCall<T> call{.shape = shape_of(in), .in = in, .map = options.feature_map, .divides = options.divides(), .rows = memory.rows, .out = out, .upstream = {}, .grads = {}};
    INTERSTATE_RETURN_IF_ERROR(launch_scan<Scan::output>(exec, call, memory.x));
    return launch_divide(exec, call, false);
}

template <class T>
Status run_scan_backward(const cuda& exec, const Options& options, const Inputs<T>& in, const Upstream<T>& upstream, const Grads<T>& grads, Workspace ws) {
    Arena arena(ws.data);
    const ScanMemory memory(arena, shape_of(in), options.divides(), true);
    const ScanCall<T> call{.shape = shape_of(in), .in = in, .map = options.feature_map, .divides = options.divides(), .rows = memory.rows, .out = {}, .upstream = upstream, .grads = grads};
    INTERSTATE_RETURN_IF_ERROR(launch_scan<Scan::output>(exec, call, memory.x));
    INTERSTATE_RETURN_IF_ERROR(launch_divide(exec, call, true));
    if (grads.q) INTERSTATE_RETURN_IF_ERROR(launch_scan<Scan::query>(exec, call, memory.x));
    if (grads.k || grads.s0 || grads.z0) INTERSTATE_RETURN_IF_ERROR(launch_scan<Scan::key>(exec, call, memory.x));
    if (grads.v) INTERSTATE_RETURN_IF_ERROR(launch_scan<Scan::value>(exec, call, memory.x));
    return {};
}

}  // namespace INTERSTATE_KERNELS
}  // namespace linear_attention::detail
}  // namespace interstate::inline INTERSTATE_ABI
