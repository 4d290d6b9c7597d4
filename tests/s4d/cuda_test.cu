// The cuda executor of S4D against the float64 reference. A plain program, because it also runs on GPU
// machines that have no GoogleTest: exit 0 passed, 1 failed, 77 skipped (no device). --quick runs a few
// small cases, for compute-sanitizer.
#include <array>
#include <cstdio>
#include <cstring>
#include <limits>

#include <interstate/verify.cuh>
#include <s4d/reference.hpp>
#include <s4d/s4d.cuh>

#include "../support/cuda_graph.cuh"
#include "../support/cuda_packed.cuh"
#include "s4d_cases.hpp"

namespace interstate::test {
namespace {

using s4d::Operator;

/// What the chunked kernels may add for rounding both factors of matrix products: bfloat16 to its own 8 bits, float16 to
/// the 11 bits of tf32 (docs/ops/s4d.md, "CUDA kernels"), each twice.
template <class T>
double rounded_factors(s4d::Method method) {
    if (sizeof(T) != 2 || method != s4d::Method::chunked) return 0.0;
    constexpr double one_factor = std::is_same_v<T, bf16> ? 0x1p-9 : 0x1p-12;
    return 2.0 * 2.0 * one_factor;
}

template <class T, class P>
void expect_close(Checks& checks, const Case& c, s4d::Options options = {}, RunOptions run = {}) {
    const Case in = rounded<Operator, T, P>(c);
    Case got, want;
    const Status status = run_case<Operator, T, P>(interstate::cuda{}, options, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, options, in, want, run);
    const auto& u = in.tensors.at("u").extent;
    char what[128];
    std::snprintf(what, sizeof what, "%s %s B=%d L=%d H=%d N=%d", to_string(options.method), to_string(dtype_of<T>),
                  static_cast<int>(u[0]), static_cast<int>(u[1]), static_cast<int>(u[2]),
                  static_cast<int>(in.tensors.at("im").extent[1]));
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    const std::string beyond = beyond_tolerance<T>(in, got, want, rounded_factors<T>(options.method));
    checks.expect(beyond.empty(), what, beyond.c_str());
}

/// Every method in every dtype.
void every_dtype(Checks& checks, const Case& c, s4d::Options options = {}, RunOptions run = {}) {
    for (const s4d::Method method : {s4d::Method::chunked, s4d::Method::scan}) {
        options.method = method;
        expect_close<f64, double>(checks, c, options, run);
        expect_close<f32, float>(checks, c, options, run);
        expect_close<f16, float>(checks, c, options, run);
        expect_close<bf16, float>(checks, c, options, run);
    }
}

/// The 16-bit rule itself: at most twice the error of the plain formula, y = K * u with both rounded to the storage
/// dtype and exact otherwise, beside the rounding of y.
template <class T>
void sixteen_bit_rule(Checks& checks, Index L, Index N, std::uint64_t seed) {
    const Index H = 4;
    const Case c = rounded<Operator, T, float>(
        make({.length = L, .channels = H, .modes = N, .initial_state = false, .feedthrough = false, .upstream = false}, seed));
    Case impulse = c, got, want, kernel;
    for (Index i = 0; i < L * H; ++i) impulse.tensors["u"].values[i] = i < H ? 1.0 : 0.0;
    bool ok = run_case<Operator, T, float>(interstate::cuda{}, {.method = s4d::Method::chunked}, c, got).ok();
    ok = ok && run_case<Operator, double, double>(reference{}, {}, c, want).ok();
    ok = ok && run_case<Operator, double, double>(reference{}, {}, impulse, kernel).ok();
    checks.expect(ok, "16-bit rule", "runs");
    if (!ok) return;
    const auto& u = c.tensors.at("u").values;
    std::vector<double> K = kernel.tensors.at("out.y").values;
    for (double& x : K) x = static_cast<double>(T(x));
    const HostTensor& y = want.tensors.at("out.y");
    double plain = 0.0, ours = 0.0, size = 0.0;
    for (Index t = 0; t < L; ++t)
        for (Index h = 0; h < H; ++h) {
            double sum = 0.0;
            for (Index s = 0; s <= t; ++s) sum += K[(t - s) * H + h] * u[s * H + h];
            const double exact = y.values[t * H + h];
            plain += (sum - exact) * (sum - exact);
            ours += std::pow(got.tensors.at("out.y").values[t * H + h] - exact, 2);
            size += exact * exact;
        }
    const double allowed = 2.0 * std::sqrt(plain / size) + tolerance<T>(y, true);
    char text[96];
    std::snprintf(text, sizeof text, "error %.2e, allowed %.2e", std::sqrt(ours / size), allowed);
    checks.expect(std::sqrt(ours / size) <= allowed, "16-bit rule", text);
}

void packed_with_bad_offsets(Checks& checks) {
    // NaN in the margins and in a neighbouring sequence.
    const std::vector<double> cu{3, 3, 40, 41, 1300, 1300, 1700};
    Case c = make({.length = 1710, .channels = 5, .modes = 4, .cu_seqlens = cu}, 4);
    auto& u = c.tensors["u"].values;
    for (Index t = 0; t < 1710; ++t)
        if (t < 3 || t >= 1700)
            for (Index h = 0; h < 5; ++h) u[t * 5 + h] = std::nan("");
    every_dtype(checks, c);
    // Margins wider than a tile, of NaN in u and in dy, for blocks that move single elements and those that move 16 bytes.
    for (const Index H : {3, 8})
        for (const bool bidirectional : {false, true}) {
            Case wide = make({.length = 6000, .channels = H, .modes = 3, .cu_seqlens = {2600, 2600, 3300, 3400},
                              .bidirectional = bidirectional}, 5);
            for (Index t = 0; t < 6000; ++t)
                if (t < 2600 || t >= 3400)
                    for (Index h = 0; h < H; ++h)
                        wide.tensors["u"].values[t * H + h] = wide.tensors["dout.y"].values[t * H + h] = std::nan("");
            every_dtype(checks, wide);
        }
    Case clean, dirty;
    const Status first = run_case<Operator, float, float>(interstate::cuda{}, {}, c, clean);
    for (Index i = 41 * 5; i < 1300 * 5; ++i) u[i] = c.tensors["dout.y"].values[i] = std::nan("");
    const Status second = run_case<Operator, float, float>(interstate::cuda{}, {}, c, dirty);
    bool isolated = first.ok() && second.ok();
    checks.expect(isolated, "packed", isolated ? "" : first.ok() ? second.message() : first.message());
    for (const char* name : {"out.y", "grad.u"})
        for (Index i = 0; isolated && i < 1710 * 5; ++i) {
            const double a = clean.tensors[name].values[i], b = dirty.tensors[name].values[i];
            isolated = i >= 41 * 5 && i < 1300 * 5 ? std::isnan(b) : a == b;
        }
    for (const char* name : {"out.xT", "grad.x0"})
        for (Index i = 0; isolated && i < 6 * 5 * 4 * 2; ++i)
            isolated = i / (5 * 4 * 2) == 3 || clean.tensors[name].values[i] == dirty.tensors[name].values[i];
    checks.expect(isolated, "packed", "NaN of one sequence must stay in it");

    const double least = std::numeric_limits<std::int32_t>::min();
    const std::vector<double> bad_offsets[] = {{0, 50, 20, 60}, {-5, 10, 20, 1000}, {-51200, 1100}, {least, 1100, least}};
    for (const auto& bad : bad_offsets)
        for (const s4d::Method method : {s4d::Method::chunked, s4d::Method::scan})
            expect_bad_offsets_reported<Operator>(
                checks, {.method = method}, make({.length = 1100, .channels = 8, .modes = 2, .cu_seqlens = bad}, 4));
}

void states_carry_and_runs_agree(Checks& checks) {
    Case c = rounded<Operator, float, float>(make({.length = 3000, .channels = 3, .modes = 4, .upstream = false}, 6));
    Case whole, again, truth;
    const auto run = [&](Case& results) {
        const Status s = run_case<Operator, float, float>(interstate::cuda{}, {}, c, results);
        checks.expect(s.ok(), "states", s.message());
    };
    run(whole);
    run(again);
    for (const auto& [name, tensor] : whole.tensors)
        checks.expect(tensor.values == again.tensors[name].values, name.c_str(), "two runs must give the same bits");
    const Status s = run_case<Operator, double, double>(reference{}, {}, c, truth);
    checks.expect(s.ok(), "states", s.message());
    const HostTensor u = c.tensors["u"];
    HostTensor y{{1, 3000, 3}, {}};
    for (const Index chunk : {1000, 24, 1, 1975}) {
        const Index t = static_cast<Index>(y.values.size()) / 3;
        c.tensors["u"] = {{1, chunk, 3}, {u.values.begin() + t * 3, u.values.begin() + (t + chunk) * 3}};
        Case piece;
        run(piece);
        const auto& out = piece.tensors["out.y"].values;
        y.values.insert(y.values.end(), out.begin(), out.end());
        c.tensors["x0"] = piece.tensors["out.xT"];
    }
    const TensorError e = compare("y", y, truth.tensors["out.y"]);
    checks.expect(e.finite && e.relative < tolerance<float>(truth.tensors["out.y"], true), "split with carried state", "must be one run to rounding");
}

/// `step`, token by token with a state kept in T's accumulator, is forward.
template <class T>
void steps(Checks& checks) {
    using A = acc_t<T>;
    const Index B = 2, L = 600, H = 5, N = 37;
    const Case c = rounded<Operator, T, float>(
        make({.batch = B, .length = L, .channels = H, .modes = N, .upstream = false, .decay = 1e-2}, 9));
    Case truth;
    checks.expect(run_case<Operator, double, double>(reference{}, {}, c, truth).ok(), "steps", "reference");
    const auto upload = [&]<class E>(E, const char* name) {
        const auto& host = c.tensors.at(name).values;
        std::vector<E> values;
        for (const double x : host) values.push_back(E(x));
        E* p = nullptr;
        checks.expect(cudaMalloc(&p, values.size() * sizeof(E)) == cudaSuccess &&
                          cudaMemcpy(p, values.data(), values.size() * sizeof(E), cudaMemcpyHostToDevice) == cudaSuccess,
                      name, "upload");
        return p;
    };
    const auto pairs = [&]<class E>(E e, const char* name) { return reinterpret_cast<complex<E>*>(upload(e, name)); };
    const s4d::BasicParams<float, complex<float>> p{view(upload(0.0f, "log_dt"), {H}), view(upload(0.0f, "log_neg_re"), {H, N}),
                                                    view(upload(0.0f, "im"), {H, N}),  view(pairs(0.0f, "B"), {H, N}),
                                                    view(pairs(0.0f, "C"), {H, N}),    view(upload(0.0f, "D"), {H})};
    const s4d::Params<float> params{p.log_dt, p.log_neg_re, p.im, p.B, p.C, p.D};
    T* u = upload(T(0.0f), "u");
    complex<A>* x = pairs(A(0), "x0");
    T* y = nullptr;
    complex<double>* discrete = nullptr;
    checks.expect(cudaMalloc(&y, B * L * H * sizeof(T)) == cudaSuccess &&
                      cudaMalloc(&discrete, 2 * H * N * sizeof *discrete) == cudaSuccess, "steps", "cudaMalloc");
    const s4d::Discrete<float> d{view(discrete, {H, N}), view(discrete + H * N, {H, N}), params.C, params.D};
    const interstate::cuda exec;
    Status s = discretize(exec, s4d::Options{}, params, d);
    for (Index t = 0; t < L && s.ok(); ++t)
        s = step(exec, s4d::Options{}, d, s4d::State<A>{view(x, {B, H, N})},
                 s4d::Token<T>{view(static_cast<const T*>(u) + t * H, {B, H}, {L * H, 1})},
                 s4d::TokenOut<T>{view(y + t * H, {B, H}, {L * H, 1})}, Workspace{});
    checks.expect(s.ok(), "steps", s.message());
    std::vector<T> got(B * L * H);
    checks.expect(cudaMemcpy(got.data(), y, got.size() * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess, "steps", "copy");
    HostTensor stepped{{B, L, H}, {}};
    for (const T v : got) stepped.values.push_back(static_cast<double>(v));
    const TensorError e = compare("y", stepped, truth.tensors["out.y"]);
    const double bound = tolerance<T>(truth.tensors["out.y"], true);
    char what[96];
    std::snprintf(what, sizeof what, "%s: off by %.2e, must be at most %.2e", to_string(dtype_of<T>), e.relative, bound);
    checks.expect(e.finite && e.relative < bound, "steps", what);
    for (void* memory : std::initializer_list<void*>{p.log_dt.data, p.log_neg_re.data, p.im.data, p.B.data, p.C.data,
                                                     p.D.data, u, x, y, discrete})
        cudaFree(memory);
}

void host_errors(Checks& checks) {
    s4d::Inputs<float> in{};
    in.u.extent[0] = in.u.extent[1] = in.u.extent[2] = 2;
    const Status s = forward(interstate::cuda{}, s4d::Options{}, in, s4d::Outputs<float>{}, Saved{}, Workspace{});
    checks.expect(s.code() == StatusCode::invalid_argument, "null u", s.message());
}

/// No sequences at all: nothing to read but the one offset, and gradients of parameters are zero.
void no_sequences(Checks& checks) {
    for (const s4d::Method method : {s4d::Method::chunked, s4d::Method::scan})
        for (const Index L : {0, 5, 1100})
            for (const Index offset : {Index{0}, L, Index{-1}, L + 1}) {
                const Case c = make({.length = L, .channels = 8, .modes = 3,
                                     .cu_seqlens = {static_cast<double>(offset)}, .bidirectional = true}, 3);
                expect_zeros_without_sequences<Operator>(checks, {.method = method}, c, offset < 0 || offset > L);
            }
}

/// du and the gradients of the parameters, wanted alone: a null view is not written, whatever strides it has.
void gradients_alone(Checks& checks) {
    const Index B = 1, L = 700, H = 8, N = 4;
    const auto zeros = [&]<class E>(E, Index n) {
        E* p = nullptr;
        checks.expect(cudaMalloc(&p, n * sizeof(E)) == cudaSuccess && cudaMemset(p, 0, n * sizeof(E)) == cudaSuccess,
                      "alone", "cudaMalloc");
        return p;
    };
    using C32 = complex<float>;
    float* real = zeros(0.0f, H * N);
    C32* pairs = zeros(C32{}, 4 * H * N);
    float* tokens = zeros(0.0f, B * L * H);
    float* grad = zeros(0.0f, H);
    const s4d::BasicParams<float, C32> p{view(real, {H}), view(real, {H, N}), view(real, {H, N}), view(pairs, {H, N}),
                                         view(pairs, {H, N})};
    const s4d::Inputs<float> in{.u = view(static_cast<const float*>(tokens), {B, L, H}),
                                .params = {p.log_dt, p.log_neg_re, p.im, p.B, p.C}};
    const s4d::Upstream<float> upstream{.y = in.u};
    const interstate::cuda exec;
    for (const s4d::Method method : {s4d::Method::chunked, s4d::Method::scan}) {
        const s4d::Options options{.method = method};
        const s4d::Shape shape = shape_of(in);
        const std::size_t bytes = workspace_size(exec, options, shape, pass::backward), kept = saved_size(exec, options, shape);
        char* ws = zeros('0', static_cast<Index>(bytes));
        char* saved = zeros('0', static_cast<Index>(kept));
        for (const bool strides : {false, true}) {
            s4d::Grads<float> grads{.params = {.log_dt = view(grad, {H}), .C_reverse = view(pairs + H * N, {H, N})}};
            if (strides) grads.u = view(static_cast<float*>(nullptr), {B, L, H});
            checks.expect(cudaMemset(pairs + H * N, 0xff, H * N * sizeof(C32)) == cudaSuccess, "alone", "cudaMemset");
            const Status s = backward(exec, options, in, s4d::Outputs<float>{}, Saved{saved, kept}, upstream, grads,
                                      Workspace{ws, bytes});
            checks.expect(s.ok(), "gradients alone", s.message());
            const cudaError_t ran = cudaDeviceSynchronize();
            checks.expect(ran == cudaSuccess, "gradients alone", cudaGetErrorString(ran));
            std::vector<C32> reverse(H * N);
            checks.expect(cudaMemcpy(reverse.data(), pairs + H * N, H * N * sizeof(C32), cudaMemcpyDeviceToHost) ==
                              cudaSuccess, "alone", "copy");
            for (const C32 z : reverse)
                if (z.re != 0.0f || z.im != 0.0f) checks.expect(false, "grad.C_reverse", "must be zero in a causal layer");
        }
        cudaFree(ws);
        cudaFree(saved);
    }
    for (void* memory : std::initializer_list<void*>{real, pairs, tokens, grad}) cudaFree(memory);
}

template <class T>
void in_a_graph(Checks& checks, s4d::Method method, bool bidirectional) {
    Case cases[2];
    for (int i = 0; i < 2; ++i)
        cases[i] = rounded<Operator, T, float>(
            make({.batch = 2, .length = 1300, .channels = 11, .modes = 5, .bidirectional = bidirectional}, 20 + i));
    test::in_a_graph<Operator, T>(checks, {.method = method}, cases[0], cases[1]);
}

/// discretize and step in a graph, whose state goes on from replay to replay.
template <class T>
void step_in_a_graph(Checks& checks) {
    using A = acc_t<T>;
    const Index B = 2, H = 5, N = 37;
    const Case c = rounded<Operator, T, float>(make({.batch = B, .length = 1, .channels = H, .modes = N, .upstream = false}, 9));
    const interstate::cuda exec;
    interstate::detail::Tensors<interstate::cuda> memory(exec, Layout::contiguous, std::numeric_limits<std::size_t>::max());
    const auto expect = [&](const Status& s) { checks.expect(s.ok(), "step graph", s.message()); };
    std::vector<std::string> seen;
    s4d::Params<float> params{};
    interstate::detail::Upload<interstate::cuda> upload{memory, c, "", true, false, &seen, {}};
    s4d::visit_params(params, s4d::Shape{}, Need::required, upload);
    expect(upload.status);
    // Plain calls on the first of each, the graph on the second.
    s4d::Discrete<float> discrete[2];
    s4d::State<A> state[2];
    s4d::TokenOut<T> out[2];
    for (int i = 0; i < 2; ++i) {
        discrete[i].C = params.C;
        discrete[i].D = params.D;
        expect(memory.allocate("Abar", discrete[i].Abar, {H, N}));
        expect(memory.allocate("Bbar", discrete[i].Bbar, {H, N}));
        expect(memory.allocate("y", out[i].y, {B, H}));
        View<const complex<A>, 3> x;
        expect(memory.upload("x0", c.tensors.at("x0"), x));
        state[i].x = view(const_cast<complex<A>*>(x.data), {B, H, N});
    }
    s4d::Token<T> tokens[3];  // two to be read, and the one that the graph reads
    for (std::uint64_t i = 0; i < 3; ++i) expect(memory.upload("u", Random(i).normal({B, H}), tokens[i].u));

    Graph graph(checks, "step graph", [&](const interstate::cuda& recorded) -> Status {
        INTERSTATE_RETURN_IF_ERROR(discretize(recorded, s4d::Options{}, params, discrete[1]));
        return step(recorded, s4d::Options{}, discrete[1], state[1], tokens[2], out[1], Workspace{});
    });
    expect(discretize(exec, s4d::Options{}, params, discrete[0]));
    for (int t = 0; t < 2; ++t) {
        expect(step(exec, s4d::Options{}, discrete[0], state[0], tokens[t], out[0], Workspace{}));
        expect(cuda_status(cudaMemcpy(const_cast<T*>(tokens[2].u.data), tokens[t].u.data, B * H * sizeof(T),
                                      cudaMemcpyDeviceToDevice), "cudaMemcpy"));
        expect(cuda_status(cudaDeviceSynchronize(), "cudaDeviceSynchronize"));
        graph.replay();
        HostTensor y[2], x[2];
        for (int i = 0; i < 2; ++i) {
            expect(memory.download("y", out[i].y, y[i]));
            expect(memory.download("x", state[i].x, x[i]));
        }
        checks.expect(y[0].values == y[1].values && x[0].values == x[1].values, "step graph",
                      "replayed, must be the bits of plain calls");
    }
}

void unsupported(Checks& checks) {
    Case results;
    const auto name = [](s4d::Method method) {
        return std::string(which_kernel(interstate::cuda{}, {.method = method}, s4d::Shape{.modes = 65}).name);
    };
    checks.expect(name(s4d::Method::automatic) == "s4d.cuda.chunked" && name(s4d::Method::scan) == "s4d.cuda.scan" &&
                      name(s4d::Method::fft).empty(),
                  "which_kernel", "must name what runs, and nothing where nothing does");
    const Case c = make({.length = 3, .channels = 2, .modes = 5}, 1);
    const Status f = run_case<Operator, float, float>(interstate::cuda{}, {.method = s4d::Method::fft}, c, results);
    checks.expect(f.code() == StatusCode::unsupported, "fft without plans", f.message());
}

void run(Checks& checks, bool quick) {
    every_dtype(checks, make({.batch = 2, .length = 1030, .channels = 3, .modes = 5}, 1));
    packed_with_bad_offsets(checks);
    host_errors(checks);
    steps<f32>(checks);
    no_sequences(checks);
    gradients_alone(checks);
    in_a_graph<f32>(checks, s4d::Method::chunked, true);
    step_in_a_graph<f32>(checks);
    every_dtype(checks, make({.batch = 2, .length = 700, .channels = 3, .modes = 5, .bidirectional = true}, 2));
    if (quick) return;
    for (const Index L : {0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 2048, 2049, 5003})
        every_dtype(checks, make({.length = L, .channels = 11, .modes = 3}, 50 + L));
    steps<f64>(checks);
    steps<f16>(checks);
    steps<bf16>(checks);
    for (const Index N : {1, 2, 7, 8, 9, 32, 33, 64, 65, 131}) every_dtype(checks, make({.length = 100, .channels = 11, .modes = N}, N));
    for (const auto disc : {s4d::Discretization::zoh, s4d::Discretization::bilinear}) {
        every_dtype(checks, make({.batch = 3, .length = 1100, .channels = 4, .modes = 6, .initial_state = false,
                                  .feedthrough = false}, 8), {.disc = disc});
        expect_close<f32, double>(checks, make({.length = 500, .channels = 4, .modes = 6}, 8), {.disc = disc});
        for (const double decay : {1e3, 1e8, 1e30})
            every_dtype(checks, make({.length = 300, .channels = 5, .modes = 3, .decay = decay}, 2), {.disc = disc});
    }
    for (const Layout layout : {Layout::reversed, Layout::padded})
        for (const Index H : {5, 16})
            every_dtype(checks, make({.batch = 2, .length = 1100, .channels = H, .modes = 3}, 12), {}, {.layout = layout});
    // Whole blocks of channels, and half ones, which move 16 bytes at once; packed starts that leave them unaligned; many.
    every_dtype(checks, make({.batch = 2, .length = 1203, .channels = 24, .modes = 12, .bidirectional = true}, 13));
    every_dtype(checks, make({.length = 2100, .channels = 16, .modes = 5,
                              .cu_seqlens = {0, 1, 513, 513, 1030, 1031, 1600, 2099}, .bidirectional = true}, 14));
    every_dtype(checks, make({.length = 9000, .channels = 8, .modes = 4, .cu_seqlens = {0, 8000, 9000}}, 15));
    // More modes than tables hold are several runs: packed, both directions, segments.
    every_dtype(checks, make({.length = 1100, .channels = 9, .modes = 70, .cu_seqlens = {2, 2, 600, 1099}}, 18));
    every_dtype(checks, make({.length = 2300, .channels = 3, .modes = 80, .bidirectional = true}, 19));
    // As many channels a block as there can be, which takes enough recurrences.
    const Case wide = make({.batch = 104, .length = 1100, .channels = 16, .modes = 2}, 17);
    expect_close<bf16, float>(checks, wide, {.method = s4d::Method::chunked});
    expect_close<f16, float>(checks, wide, {.method = s4d::Method::chunked});
    for (const Index N : {1, 4, 16, 32, 64})
        for (const std::uint64_t seed : {1, 2, 3}) {
            sixteen_bit_rule<bf16>(checks, 1500, N, seed);
            sixteen_bit_rule<f16>(checks, 1500, N, seed);
        }
    Case huge = make({.length = 700, .channels = 8, .modes = 4}, 16);
    for (double& x : huge.tensors["u"].values) x *= 1e15;
    expect_close<f32, float>(checks, huge);
    for (const auto& [B, L, H, N] :
         {std::array<Index, 4>{0, 5, 3, 2}, std::array<Index, 4>{2, 5, 0, 2}, std::array<Index, 4>{2, 5, 3, 0}})
        expect_close<f32, float>(checks, make({.batch = B, .length = L, .channels = H, .modes = N}, 3));
    Case slow = make({.length = 65536, .channels = 3, .modes = 4, .decay = 1e-4}, 31);
    for (double& x : slow.tensors["log_dt"].values) x = -4.6;
    for (const s4d::Method method : {s4d::Method::chunked, s4d::Method::scan}) {  // in float64 the truth is no better
        expect_close<f32, float>(checks, slow, {.method = method});
        expect_close<f16, float>(checks, slow, {.method = method});
        expect_close<bf16, float>(checks, slow, {.method = method});
    }
    for (const s4d::Method method : {s4d::Method::chunked, s4d::Method::scan})
        for (const bool bidirectional : {false, true}) {
            in_a_graph<f32>(checks, method, bidirectional);
            in_a_graph<bf16>(checks, method, bidirectional);
        }
    step_in_a_graph<bf16>(checks);
    states_carry_and_runs_agree(checks);
    unsupported(checks);
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) {
    return interstate::test::cuda_main(argc, argv, "s4d", interstate::test::run);
}
