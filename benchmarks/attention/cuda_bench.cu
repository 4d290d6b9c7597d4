// Attention on the GPU: milliseconds of forward and of forward and backward, bytes of memory, errors against float64, and the
// floors, as JSON lines.
//
// Useful multiply-adds of a causal call: 2 d a score that is read forward, 7 d for both (backward's 5 products, the scores it
// forms again not counted). Floors: those at this run's rate of tensor cores, and each input, output and gradient moved once
// (q, k and v once more for both passes) at its copy speed. The errors are those of one more call, of the first tokens of two heads.
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

}  // namespace

/// `cuda_bench brief` leaves the sweeps out.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    const Ceilings c = bench::measure_ceilings();
    run<bf16>({4, 4096, 32, 64}, c);
    run<bf16>({4, 4096, 32, 128}, c);
    run<bf16>({64, 256, 32, 64}, c);
    run<bf16>({2, 16384, 32, 64}, c);
    run<f16>({4, 4096, 32, 64}, c);
    run<f32>({4, 4096, 32, 64}, c);
    if (argc > 1 && std::strcmp(argv[1], "brief") == 0) return 0;
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
