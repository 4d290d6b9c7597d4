// Attention on the GPU: milliseconds of forward and of forward and backward, bytes of memory, errors against float64, and the
// floors, as JSON lines.
//
// Useful multiply-adds of a causal call: 2 d a score that is read forward, 7 d for both (backward's 5 products, the scores it
// forms again not counted). Floors: those at this run's rate of tensor cores, and each input, output and gradient moved once
// (q, k and v once more for both passes) at its copy speed. The errors are those of one more call, of the first tokens of two heads.
//
// A decoding step reads the cache once, and that is its floor.
#include <algorithm>
#include <cstring>

#include <attention/attention.cuh>
#include <attention/reference.hpp>
#include <interstate/verify.cuh>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using attention::Options;
using bench::Ceilings;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;

struct Sizes {
    Index B, L, Hq, d, Hkv = 0;
    bool causal = true;
    Index kv_heads() const { return Hkv > 0 ? Hkv : Hq; }
};

/// The tensors of a call, and views of all of them or of the first tokens of the first heads.
template <class T>
struct Layer {
    static constexpr Index slice_tokens = 1024;
    Sizes size;
    RandomArray<T> q, k, v, dout;
    DeviceArray<T> o, dq, dk, dv;
    DeviceArray<acc_t<T>> lse;

    explicit Layer(const Sizes& s)
        : size(s), q(queries() * s.d, 1, 3.4), k(keys() * s.d, 2, 3.4), v(keys() * s.d, 3, 3.4), dout(queries() * s.d, 4, 3.4),
          o(q.size()), dq(q.size()), dk(k.size()), dv(v.size()), lse(static_cast<std::size_t>(queries())) {}
    Index queries() const { return size.B * size.L * size.Hq; }
    Index keys() const { return size.B * size.L * size.kv_heads(); }

    /// One batch row, the query heads of one key/value head or two heads.
    Sizes slice() const {
        const Index group = size.Hq / size.kv_heads(), kv = std::min<Index>(size.kv_heads(), group > 1 ? 1 : 2);
        return {1, std::min(size.L, slice_tokens), kv * group, size.d, kv, size.causal};
    }
    template <class E, class M>
    View<E, 4> rows(const M& memory, const Sizes& s, Index heads, Index all) const {
        return view(static_cast<E*>(memory.data()), {s.B, s.L, heads, s.d}, {size.L * all * s.d, all * s.d, s.d, Index{1}});
    }
    attention::Inputs<T> inputs(const Sizes& s) const {
        return {.q = rows<const T>(q, s, s.Hq, size.Hq), .k = rows<const T>(k, s, s.kv_heads(), size.kv_heads()),
                .v = rows<const T>(v, s, s.kv_heads(), size.kv_heads())};
    }
    attention::Upstream<T> upstream(const Sizes& s) const { return {.o = rows<const T>(dout, s, s.Hq, size.Hq)}; }
    attention::Outputs<T> outputs(const Sizes& s) const {
        return {.o = rows<T>(o, s, s.Hq, size.Hq), .lse = view(lse.data(), {s.B, s.L, s.Hq}, {size.L * size.Hq, size.Hq, Index{1}})};
    }
    attention::Grads<T> gradients(const Sizes& s) const {
        return {.q = rows<T>(dq, s, s.Hq, size.Hq), .k = rows<T>(dk, s, s.kv_heads(), size.kv_heads()),
                .v = rows<T>(dv, s, s.kv_heads(), size.kv_heads())};
    }
};

template <class T>
void run(const Sizes& s, const Ceilings& ceilings) {
    const Layer<T> layer(s);
    const Options options{.causal = s.causal};
    const interstate::cuda exec;
    const DeviceArray<char> memory(workspace_size(exec, options, shape_of(layer.inputs(s)), pass::backward));
    const auto forwards = [&](const Sizes& of, bool keeps_lse) {
        auto out = layer.outputs(of);
        if (!keeps_lse) out.lse = {};
        check(forward(exec, options, layer.inputs(of), out, Saved{}, Workspace{}));
    };
    const auto both = [&](const Sizes& of) {
        forwards(of, true);
        check(backward(exec, options, layer.inputs(of), layer.outputs(of), Saved{}, layer.upstream(of), layer.gradients(of),
                       Workspace{memory.data(), memory.size()}));
    };
    const Sizes few = layer.slice();
    both(few);
    const bench::Errors errors(bench::results_of(layer.inputs(few), layer.outputs(few), layer.gradients(few)),
                               bench::truth_of<attention::Operator>(options, layer.inputs(few), layer.upstream(few)));

    const double forward_ms = bench::milliseconds([&] { forwards(s, false); }), both_ms = bench::milliseconds([&] { both(s); });
    const auto q = static_cast<double>(layer.queries()), k = static_cast<double>(layer.keys()), d = static_cast<double>(s.d);
    const double scores = q * (s.causal ? 0.5 * static_cast<double>(s.L + 1) : static_cast<double>(s.L));
    const double tflops = sizeof(T) == 2 ? ceilings.bf16_tflops : ceilings.tflops<T>(), products = std::is_same_v<T, f32> ? 3.0 : 1.0;
    const auto product_ms = [&](double macs) { return 2.0 * macs * products / tflops * 1e-9; };
    const auto bytes_ms = [&](double elements) { return elements * sizeof(T) / ceilings.copy_gbps * 1e-6; };
    const double tensors = (4.0 * q + 4.0 * k) * d * sizeof(T);
    std::printf("{\"op\":\"attention\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"causal\":%s,\"B\":%lld,\"L\":%lld,\"Hq\":%lld,\"Hkv\":%lld,\"d\":%lld,"
                "\"forward_ms\":%.4f,\"both_ms\":%.4f,\"floor_bytes_ms\":%.4f,\"floor_products_ms\":%.4f,\"both_floor_bytes_ms\":%.4f,"
                "\"both_floor_products_ms\":%.4f,\"forward_TFLOPs\":%.1f,\"both_TFLOPs\":%.1f,\"memory_ratio\":%.3f,",
                which_kernel(exec, options, shape_of(layer.inputs(s))).name, to_string(dtype_of<T>), s.causal ? "true" : "false",
                static_cast<long long>(s.B), static_cast<long long>(s.L), static_cast<long long>(s.Hq), static_cast<long long>(s.kv_heads()),
                static_cast<long long>(s.d), forward_ms, both_ms, bytes_ms((2.0 * q + 2.0 * k) * d), product_ms(2.0 * d * scores),
                bytes_ms((5.0 * q + 6.0 * k) * d), product_ms(7.0 * d * scores), 4.0 * d * scores / forward_ms * 1e-9,
                14.0 * d * scores / both_ms * 1e-9, 1.0 + static_cast<double>(memory.size() + layer.lse.size() * sizeof(acc_t<T>)) / tensors);
    errors.print();
}

/// Milliseconds of a step of one token that reads L rows of a cache for each of B sequences, in a CUDA graph of steps on so many caches
/// (a model's layers) that the second-level cache holds none of them. Lengths are in device memory. The error is that of the heads of
/// one group of one sequence.
template <class T>
void decode(Index B, Index Hkv, const Ceilings& ceilings, Index page_size = 0) {
    constexpr Index L = 8192, Hq = 32, d = 64;
    const double bytes = static_cast<double>(2 * B * L * Hkv * d) * sizeof(T);
    const Index layers = std::max<Index>(1, static_cast<Index>(1e9 / bytes)), rows = B * L * Hkv * d;
    const RandomArray<T> cache_k(layers * rows, 1, 3.4), cache_v(layers * rows, 2, 3.4), q(B * Hq * d, 3, 3.4), k(B * Hkv * d, 4, 3.4), v(B * Hkv * d, 5, 3.4);
    const DeviceArray<T> o(static_cast<std::size_t>(layers * B * Hq * d));
    const DeviceArray<std::int32_t> lengths(std::vector<std::int32_t>(static_cast<std::size_t>(B), static_cast<std::int32_t>(L - 1)));
    std::vector<std::int32_t> pages;  // page i of sequence b is page (b, i), but backwards
    for (Index i = 0; page_size > 0 && i < B * L / page_size; ++i) pages.push_back(static_cast<std::int32_t>(B * L / page_size - 1 - i));
    const DeviceArray<std::int32_t> table(pages);
    const Options options;
    const attention::Token<T> token{view(static_cast<const T*>(q.data()), {B, Hq, d}), view(static_cast<const T*>(k.data()), {B, Hkv, d}),
                                    view(static_cast<const T*>(v.data()), {B, Hkv, d}), {}};
    const auto state = [&](Index layer) {
        const Index batch = page_size > 0 ? B * L / page_size : B, length = page_size > 0 ? page_size : L;
        attention::State<T> x{.k = view(cache_k.data() + layer * rows, {batch, length, Hkv, d}), .v = view(cache_v.data() + layer * rows, {batch, length, Hkv, d}),
                              .lengths = view(static_cast<const std::int32_t*>(lengths.data()), {B})};
        if (page_size > 0) x.block_table = view(static_cast<const std::int32_t*>(table.data()), {B, L / page_size});
        return x;
    };
    const auto out = [&](Index layer) { return attention::TokenOut<T>{.o = view(o.data() + layer * B * Hq * d, {B, Hq, d})}; };
    const DeviceArray<char> memory(workspace_size(interstate::cuda{}, options, shape_of(state(0), token), pass::step));
    const auto steps = [&](const interstate::cuda& exec) {
        for (Index i = 0; i < layers; ++i) check(step(exec, options, attention::Params{}, state(i), token, out(i), Workspace{memory.data(), memory.size()}));
    };
    steps(interstate::cuda{});

    // The last sequence's first group. Its pages, the first ones, lie backwards: the order of keys does not matter to one query.
    const Index group = Hq / Hkv, last = page_size > 0 ? 0 : B - 1;
    const auto slice = [&](const T* data, Index length, Index heads, Index all) { return view(data, {Index{1}, length, heads, d}, {Index{0}, all * d, d, Index{1}}); };
    const attention::Inputs<T> in{.q = slice(q.data() + (B - 1) * Hq * d, 1, group, Hq), .k = slice(cache_k.data() + last * L * Hkv * d, L, 1, Hkv),
                                  .v = slice(cache_v.data() + last * L * Hkv * d, L, 1, Hkv)};
    Case tensors, truth, got;
    check(collect_case(interstate::cuda{}, in, static_cast<const attention::Upstream<T>*>(nullptr), tensors));
    check(run_case<attention::Operator, double, double>(reference{}, options, tensors, truth));
    const interstate::cuda where;
    interstate::detail::Collect<interstate::cuda> collect{where, "out.", got, {}};
    auto o_slice = view(o.data() + (B - 1) * Hq * d, {Index{1}, Index{1}, group, d});
    collect("o", o_slice, {Index{1}, Index{1}, group, d}, Need::required);
    check(collect.status);
    const TensorError error = compare("o", got.tensors.at("out.o"), truth.tensors.at("out.o"));

    const double ms = bench::graph_milliseconds(steps) / static_cast<double>(layers);
    const double moved = bytes + static_cast<double>(B * (2 * Hq + 2 * Hkv) * d) * sizeof(T);
    std::printf("{\"op\":\"attention\",\"case\":\"decode\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,\"Hq\":%lld,\"Hkv\":%lld,\"d\":%lld,"
                "\"page_size\":%lld,\"step_ms\":%.5f,\"floor_bytes_ms\":%.5f,\"of_copy\":%.3f,\"error\":%.2e}\n",
                which_step_kernel(interstate::cuda{}, options, state(0), token).name, to_string(dtype_of<T>), static_cast<long long>(B),
                static_cast<long long>(L), static_cast<long long>(Hq), static_cast<long long>(Hkv), static_cast<long long>(d),
                static_cast<long long>(page_size), ms, moved / ceilings.copy_gbps * 1e-6, moved / ms * 1e-6 / ceilings.copy_gbps,
                error.finite ? error.relative : NAN);
    std::fflush(stdout);
}

void decoding(const Ceilings& c, bool all) {
    for (const Index Hkv : {32, 8})
        for (const Index B : {1, 8, 64}) decode<bf16>(B, Hkv, c);
    if (!all) return;
    for (const Index page_size : {16, 256}) decode<bf16>(64, 8, c, page_size);
    decode<f16>(8, 8, c);
    decode<f32>(8, 8, c);
}

}  // namespace

/// `cuda_bench brief` leaves the sweeps out, `cuda_bench decode` all but decoding.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    const Ceilings c = bench::measure_ceilings();
    if (argc > 1 && std::strcmp(argv[1], "decode") == 0) {
        decoding(c, true);
        return 0;
    }
    run<bf16>({4, 4096, 32, 64}, c);
    run<bf16>({4, 4096, 32, 128}, c);
    run<bf16>({64, 256, 32, 64}, c);
    run<bf16>({2, 16384, 32, 64}, c);
    run<f16>({4, 4096, 32, 64}, c);
    run<f32>({4, 4096, 32, 64}, c);
    const bool brief = argc > 1 && std::strcmp(argv[1], "brief") == 0;
    decoding(c, !brief);
    if (brief) return 0;
    run<bf16>({4, 4096, 32, 64, 8}, c);
    run<bf16>({.B = 4, .L = 4096, .Hq = 32, .d = 64, .causal = false}, c);
    run<bf16>({4, 4096, 32, 80}, c);
    run<bf16>({4, 4096, 16, 256}, c);
    run<f32>({4, 4096, 32, 128}, c);
    run<f32>({1, 4096, 16, 256}, c);
    run<f64>({1, 1024, 8, 64}, c);
    for (Index L = 256; L <= 65536; L *= 2) run<bf16>({1, L, 32, 64}, c);
    return 0;
}
