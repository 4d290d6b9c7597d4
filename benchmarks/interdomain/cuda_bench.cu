// Interdomain Attention on the GPU: milliseconds of forward, of forward and backward and of a decoding step, bytes of
// memory, errors against float64, and the floors, as JSON lines.
//
// Timed calls have no states. The errors are those of one more call, of the first tokens of two heads, which has them:
// every output and gradient, relative in the 2-norm, and the largest of them.
//
// Floors: bytes, each input, output and gradient moved once (q, k and v once more for both passes) at this run's copy
// speed; products, the multiply-adds of the chunked form with chunks of 64 tokens at this run's tensor-core rate.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include <interdomain/init.hpp>
#include <interdomain/interdomain.cuh>
#include <interdomain/reference.hpp>
#include <interstate/verify.cuh>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::Ceilings;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;
using interdomain::Method;
using interdomain::Normalizer;
using interdomain::Operator;
using interdomain::Options;

/// As many query as key/value heads.
struct Sizes {
    Index B, L, H, M = 64, R = 64, d = 64;
};

/// Multiply-adds of real numbers a token and head, in chunks of T tokens: a complex times a real number is two, times a
/// complex one four. At M = R = d = T = 64: 73,728 and 282,624.
struct Products {
    double forward, both;
    explicit Products(const Sizes& s, double T = 64.0) {
        const auto M = static_cast<double>(s.M), R = static_cast<double>(s.R), d = static_cast<double>(s.d);
        forward = T * (R + d) + 4.0 * T * M + 4.0 * M * M + 4.0 * M * (R + d);
        const double backward = 2.0 * T * (R + d) + 8.0 * T * M + 8.0 * M * M + 8.0 * M * (R + d);
        // Backward makes a, w, P and the states again: all of forward but o.
        both = 2.0 * forward - (T * d + 2.0 * M * d) + backward;
    }
};

/// Parameters of the published initialisation, in device memory, and room for their gradients. With a normaliser those of
/// sums of k and v that fade: real modes, B = 1 and C = 1, whose denominators stay positive where q and k do.
struct Parameters {
    DeviceArray<float> log_dt, log_neg_re, im;
    DeviceArray<complex<float>> B, C;

    Parameters(Index H, Index M, bool normalized = false)
        : log_dt(static_cast<std::size_t>(H)), log_neg_re(static_cast<std::size_t>(H * M)), im(log_neg_re.size()),
          B(log_neg_re.size()), C(static_cast<std::size_t>(H * M * M)) {
        std::vector<float> dt(log_dt.size()), re(im.size()), frequency(im.size());
        std::vector<complex<float>> b(B.size()), c(C.size());
        check(interdomain::initialize<float>(1, {view(dt.data(), {H}), view(re.data(), {H, M}), view(frequency.data(), {H, M}),
                                                 view(b.data(), {H, M}), view(c.data(), {H, M, M})}));
        if (normalized) {
            std::fill(frequency.begin(), frequency.end(), 0.0f);
            std::fill(b.begin(), b.end(), complex<float>{1.0f, 0.0f});
            for (Index i = 0; i < H * M * M; ++i) c[static_cast<std::size_t>(i)] = {i / M % M == i % M ? 1.0f : 0.0f, 0.0f};
        }
        upload(log_dt, dt);
        upload(log_neg_re, re);
        upload(im, frequency);
        upload(B, b);
        upload(C, c);
    }
    /// Of the first h heads.
    interdomain::BasicParams<float, complex<float>> views(Index h, Index M) const {
        return {view(log_dt.data(), {h}), view(log_neg_re.data(), {h, M}), view(im.data(), {h, M}), view(B.data(), {h, M}),
                view(C.data(), {h, M, M})};
    }
    interdomain::Params<float> inputs(Index h, Index M) const {
        const auto p = views(h, M);
        return {p.log_dt, p.log_neg_re, p.im, p.B, p.C};
    }

  private:
    template <class E>
    static void upload(const DeviceArray<E>& to, const std::vector<E>& from) {
        check(cudaMemcpy(to.data(), from.data(), from.size() * sizeof(E), cudaMemcpyHostToDevice), "upload");
    }
};

/// The tensors of a layer, and views of all of them or of the first tokens of its first heads.
template <class T>
struct Layer {
    using A = acc_t<T>;
    static constexpr Index slice_heads = 2, slice_tokens = 1024;
    Sizes size;
    Parameters params, grads;
    RandomArray<T> q, k, v, dout;
    DeviceArray<T> o, dq, dk, dv;
    RandomArray<A> x0, dxT;  // pairs, of the slice
    DeviceArray<A> xT, dx0, etaT;

    Layer(const Sizes& s, bool normalized)
        : size(s), params(s.H, s.M, normalized), grads(s.H, s.M), q(rows() * s.R, 1, 1.0, normalized ? 0.7 : 0.0),
          k(rows() * s.R, 2, 1.0, normalized ? 0.7 : 0.0), v(rows() * s.d, 3), dout(rows() * s.d, 4), o(dout.size()),
          dq(q.size()), dk(k.size()), dv(v.size()), x0(states(), 5), dxT(states(), 6), xT(x0.size()), dx0(x0.size()),
          etaT(normalized ? static_cast<std::size_t>(2 * slice_heads * s.M) : 0) {}

    Index rows() const { return size.B * size.L * size.H; }
    Index states() const { return 2 * slice_heads * size.M * (size.R + size.d); }
    Sizes slice() const {
        Sizes s = size;
        s.B = 1;
        s.L = std::min(s.L, slice_tokens);
        s.H = std::min(s.H, slice_heads);
        return s;
    }

    interdomain::Inputs<T, float> inputs(const Sizes& s, bool state) const {
        return {.q = tokens<const T>(q.data(), s, s.R), .k = tokens<const T>(k.data(), s, s.R),
                .v = tokens<const T>(v.data(), s, s.d), .params = params.inputs(s.H, s.M),
                .x0 = state ? modes<const complex<A>>(x0.data(), s) : View<const complex<A>, 4>{}};
    }
    interdomain::Upstream<T> upstream(const Sizes& s, bool state) const {
        return {.o = tokens<const T>(dout.data(), s, s.d),
                .xT = state ? modes<const complex<A>>(dxT.data(), s) : View<const complex<A>, 4>{}};
    }
    interdomain::Outputs<T> outputs(const Sizes& s, bool state) const {
        return {.o = tokens<T>(o.data(), s, s.d), .xT = state ? modes<complex<A>>(xT.data(), s) : View<complex<A>, 4>{},
                .etaT = state && etaT.size() > 0 ? view(reinterpret_cast<complex<A>*>(etaT.data()), {s.B, s.H, s.M})
                                                 : View<complex<A>, 3>{}};
    }
    interdomain::Grads<T, float> gradients(const Sizes& s, bool state) const {
        return {.q = tokens<T>(dq.data(), s, s.R), .k = tokens<T>(dk.data(), s, s.R), .v = tokens<T>(dv.data(), s, s.d),
                .params = grads.views(s.H, s.M), .x0 = state ? modes<complex<A>>(dx0.data(), s) : View<complex<A>, 4>{}};
    }

  private:
    template <class E, class Memory>
    View<E, 4> tokens(Memory* data, const Sizes& s, Index n) const {
        return view(static_cast<E*>(data), {s.B, s.L, s.H, n}, {size.L * size.H * n, size.H * n, n, Index{1}});
    }
    template <class E, class Memory>
    View<E, 4> modes(Memory* data, const Sizes& s) const {
        return view(reinterpret_cast<E*>(data), {s.B, s.H, s.M, s.R + s.d});
    }
};

/// A call of a layer or of its slice: memory and what runs in it.
template <class T>
struct Call {
    Options options;
    interdomain::Inputs<T, float> in;
    interdomain::Outputs<T> out;
    interdomain::Upstream<T> upstream;
    interdomain::Grads<T, float> grads;
    DeviceArray<char> memory, kept;

    Call(const Layer<T>& layer, const Sizes& s, const Options& opts, bool state)
        : options(opts), in(layer.inputs(s, state)), out(layer.outputs(s, state)), upstream(layer.upstream(s, state)),
          grads(layer.gradients(s, state)),
          memory(std::max(workspace_size(interstate::cuda{}, options, shape_of(in), pass::forward),
                          workspace_size(interstate::cuda{}, options, shape_of(in), pass::backward))),
          kept(saved_size(interstate::cuda{}, options, shape_of(in))) {}

    Workspace ws() const { return {memory.data(), memory.size()}; }
    Saved saved() const { return {kept.data(), kept.size()}; }
    void inference() const { check(forward(interstate::cuda{}, options, in, out, Saved{}, ws())); }
    void both() const {
        check(forward(interstate::cuda{}, options, in, out, saved(), ws()));
        check(backward(interstate::cuda{}, options, in, out, saved(), upstream, grads, ws()));
    }
};

bool has_kernel(const Options& options, const interdomain::Shape& shape) {
    return *which_kernel(interstate::cuda{}, options, shape).name != '\0';
}

/// Times a layer and prints its line. `truth` is the layer's slice in float64.
template <class T>
void measure(const Layer<T>& layer, const Options& options, const Case& truth, const Ceilings& ceilings) {
    const Sizes& s = layer.size;
    Case got;
    {
        const Call<T> slice(layer, layer.slice(), options, true);
        slice.both();
        got = bench::results_of(slice.in, slice.out, slice.grads);
    }
    const bench::Errors errors(got, truth);

    const Call<T> call(layer, s, options, false);
    const double forward_ms = bench::milliseconds([&] { call.inference(); });
    const double both_ms = bench::milliseconds([&] { call.both(); });

    const auto rows = static_cast<double>(layer.rows()), R = static_cast<double>(s.R), d = static_cast<double>(s.d);
    const Products macs(s);
    const double products = std::is_same_v<T, f32> ? 3.0 : 1.0, tflops = ceilings.tflops<T>();
    const auto bytes_ms = [&](double elements) { return elements * rows * sizeof(T) / ceilings.copy_gbps * 1e-6; };
    const auto product_ms = [&](double of) { return 2.0 * of * rows * products / tflops * 1e-9; };
    const double tensors = 2.0 * (2.0 * R + 2.0 * d) * rows * sizeof(T);
    std::printf("{\"op\":\"interdomain\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"normalizer\":\"%s\",\"B\":%lld,\"L\":%lld,\"H\":%lld,\"M\":%lld,\"R\":%lld,"
                "\"d\":%lld,\"forward_ms\":%.4f,\"both_ms\":%.4f,\"floor_bytes_ms\":%.4f,\"floor_products_ms\":%.4f,"
                "\"both_floor_bytes_ms\":%.4f,\"both_floor_products_ms\":%.4f,\"forward_TFLOPs\":%.1f,\"both_TFLOPs\":%.1f,"
                "\"memory_ratio\":%.3f,",
                which_kernel(interstate::cuda{}, call.options, shape_of(call.in)).name, to_string(dtype_of<T>),
                options.normalized() ? "nadaraya_watson" : "none", static_cast<long long>(s.B),
                static_cast<long long>(s.L), static_cast<long long>(s.H), static_cast<long long>(s.M), static_cast<long long>(s.R),
                static_cast<long long>(s.d), forward_ms, both_ms, bytes_ms(2.0 * R + 2.0 * d), product_ms(macs.forward),
                bytes_ms(6.0 * R + 5.0 * d), product_ms(macs.both), 2.0 * macs.forward * rows / forward_ms * 1e-9,
                2.0 * macs.both * rows / both_ms * 1e-9,
                1.0 + static_cast<double>(call.memory.size() + call.kept.size()) / tensors);
    errors.print();
}

template <class T>
void run(const Sizes& size, std::initializer_list<Method> methods, const Ceilings& ceilings, Options options = {}) {
    const Layer<T> layer(size, options.normalized());
    Case truth;
    for (const Method method : methods) {
        options.method = method;
        if (!has_kernel(options, shape_of(layer.inputs(size, false)))) continue;
        if (truth.tensors.empty())
            truth = bench::truth_of<Operator>(options, layer.inputs(layer.slice(), true), layer.upstream(layer.slice(), true));
        measure(layer, options, truth, ceilings);
    }
}

/// Milliseconds of a decoding step in a CUDA graph of 100 of them, after 100 tokens and after 20,000: a state has one
/// size whatever the position. The error is that of the outputs of the first 100 of two heads.
template <class T>
void decode(Index B, const Sizes& size, const Ceilings& ceilings) {
    using A = acc_t<T>;
    constexpr Index steps = 100;
    const Index H = size.H, M = size.M, R = size.R, d = size.d, few = std::min<Index>(H, 2);
    const Parameters params(H, M);
    const RandomArray<T> q(steps * B * H * R, 1), k(steps * B * H * R, 2), v(steps * B * H * d, 3);
    const DeviceArray<T> o(static_cast<std::size_t>(steps * B * H * d));
    const DeviceArray<complex<A>> x(static_cast<std::size_t>(B * H * M * (R + d)));
    const DeviceArray<complex<double>> discrete_modes(static_cast<std::size_t>(2 * H * M));
    check(cudaMemset(x.data(), 0, x.size() * sizeof(complex<A>)), "memset");
    const Options options;
    const interdomain::Discrete<float> discrete{view(discrete_modes.data(), {H, M}), view(discrete_modes.data() + H * M, {H, M}),
                                                params.inputs(H, M).C};
    const interdomain::State<A> state{.x = view(x.data(), {B, H, M, R + d})};
    const auto token = [&](Index t) {
        const auto at = [&](const T* data, Index n) { return view(data + t * B * H * n, {B, H, n}); };
        return interdomain::Token<T>{at(q.data(), R), at(k.data(), R), at(v.data(), d)};
    };
    const DeviceArray<char> memory(workspace_size(interstate::cuda{}, options, shape_of(discrete, token(0)), pass::step));
    const auto run_steps = [&](const interstate::cuda& exec) {
        for (Index t = 0; t < steps; ++t)
            check(step(exec, options, discrete, state, token(t),
                       interdomain::TokenOut<T>{view(o.data() + t * B * H * d, {B, H, d})}, Workspace{memory.data(), memory.size()}));
    };
    check(discretize(interstate::cuda{}, options, params.inputs(H, M), discrete));
    run_steps(interstate::cuda{});

    // Of the first batch row: (steps, B, H, n) is (1, steps, few, n) with other strides.
    const auto slice = [&]<class E>(E* data, Index n) {
        return view(data, {Index{1}, steps, few, n}, {Index{0}, B * H * n, n, Index{1}});
    };
    const interdomain::Inputs<T, float> in{.q = slice(static_cast<const T*>(q.data()), R), .k = slice(static_cast<const T*>(k.data()), R),
                                           .v = slice(static_cast<const T*>(v.data()), d), .params = params.inputs(few, M)};
    Case tokens, truth, got;
    check(collect_case(interstate::cuda{}, in, static_cast<const interdomain::Upstream<T>*>(nullptr), tokens));
    check(run_case<Operator, double, double>(reference{}, options, tokens, truth));
    const interstate::cuda where;
    interstate::detail::Collect<interstate::cuda> collect{where, "out.", got, {}};
    auto o_slice = slice(o.data(), d);
    collect("o", o_slice, {Index{1}, steps, few, d}, Need::required);
    check(collect.status);
    const TensorError error = compare("o", got.tensors.at("out.o"), truth.tensors.at("out.o"));

    cudaStream_t stream;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "stream");
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
    run_steps(interstate::cuda{stream});
    check(cudaStreamEndCapture(stream, &graph), "capture");
    check(cudaGraphInstantiate(&executable, graph, 0), "graph");
    // Launched on the stream that the events are recorded on.
    const auto replay = [&] { check(cudaGraphLaunch(executable, nullptr), "graph"); };
    const double early = bench::milliseconds(replay) / static_cast<double>(steps);
    for (int i = 0; i < 200; ++i) replay();
    const double late = bench::milliseconds(replay) / static_cast<double>(steps);
    check(cudaGraphExecDestroy(executable), "graph");
    check(cudaGraphDestroy(graph), "graph");
    check(cudaStreamDestroy(stream), "stream");

    const double moved = 2.0 * static_cast<double>(x.size()) * sizeof(complex<A>) +
                         static_cast<double>(B * H * (2 * R + 2 * d)) * sizeof(T) +
                         static_cast<double>(H * M * M) * sizeof(complex<float>);
    std::printf("{\"op\":\"interdomain\",\"case\":\"decode\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"H\":%lld,\"M\":%lld,\"R\":%lld,"
                "\"d\":%lld,\"step_ms\":%.5f,\"step_ms_after_20000\":%.5f,\"floor_bytes_ms\":%.5f,\"of_copy\":%.3f,\"error\":%.2e}\n",
                which_step_kernel(interstate::cuda{}, options, discrete, state, token(0)).name, to_string(dtype_of<T>),
                static_cast<long long>(B), static_cast<long long>(H), static_cast<long long>(M), static_cast<long long>(R),
                static_cast<long long>(d), early, late, moved / ceilings.copy_gbps * 1e-6, moved / early * 1e-6 / ceilings.copy_gbps,
                error.finite ? error.relative : NAN);
    std::fflush(stdout);
}

}  // namespace

/// `cuda_bench brief` leaves the sweeps out.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    const Ceilings c = bench::measure_ceilings();
    const auto fast = {Method::chunked};
    run<bf16>({4, 4096, 32}, fast, c);
    run<bf16>({2, 16384, 32}, fast, c);
    run<bf16>({1, 4096, 32}, fast, c);
    run<f32>({4, 4096, 32}, fast, c);
    run<f16>({4, 4096, 32}, fast, c);
    run<f32>({1, 1024, 32}, {Method::chunked, Method::scan}, c);
    for (const Index B : {1, 8, 32, 64, 128}) decode<bf16>(B, {B, 1, 32}, c);
    if (argc > 1 && std::strcmp(argv[1], "brief") == 0) return 0;
    for (const Index B : {1, 64}) decode<f32>(B, {B, 1, 32}, c);
    decode<f64>(8, {8, 1, 32}, c);
    for (const Index n : {32, 128}) decode<bf16>(32, {32, 1, 32, n, n, n}, c);
    run<f64>({1, 1024, 32}, {Method::chunked, Method::scan}, c);
    run<bf16>({1, 4096, 32, 64, 64, 64}, {Method::scan}, c);
    for (const Index n : {32, 128}) {
        run<bf16>({4, 4096, 32, n, n, n}, fast, c);
        run<f32>({4, 4096, 32, n, n, n}, fast, c);
    }
    run<bf16>({1, 65536, 8}, {Method::chunked, Method::parallel_scan}, c);
    run<bf16>({4, 4096, 32}, fast, c, {.normalizer = Normalizer::nadaraya_watson});
    for (Index L = 1024; L <= 262144; L *= 2) run<bf16>({1, L, 32}, fast, c);
    return 0;
}
