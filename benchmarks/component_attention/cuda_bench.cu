// Attention by one component on the GPU beside attention of the same heads in the same run: milliseconds of forward and of forward and
// backward, their ratios, bytes of scratch memory over inputs, outputs and gradients, and errors against float64, as JSON lines. The errors
// are those of one more call, of the first tokens of one key/value head.
#include <algorithm>
#include <cstring>

#include <component_attention/component_attention.cuh>
#include <component_attention/reference.hpp>
#include <interstate/verify.cuh>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;
using component_attention::Component;
using component_attention::Options;

struct Sizes {
    Index B, L, Hq, Hkv, d;
};

template <class T>
struct Layer {
    static constexpr Index slice_tokens = 1024;
    Sizes size;
    RandomArray<T> q, k, v, dout;
    DeviceArray<T> o, dq, dk, dv;
    DeviceArray<float> lse;

    explicit Layer(const Sizes& s)
        : size(s),
          q(s.B * s.L * s.Hq * s.d, 1, 3.4),
          k(s.B * s.L * s.Hkv * s.d, 2, 3.4),
          v(s.B * s.L * s.Hkv * s.d, 3, 3.4),
          dout(s.B * s.L * s.Hq * s.d, 4, 3.4),
          o(q.size()),
          dq(q.size()),
          dk(k.size()),
          dv(v.size()),
          lse(static_cast<std::size_t>(s.B * s.L * s.Hq)) {}
    Sizes slice() const { return {1, std::min(size.L, slice_tokens), size.Hq / size.Hkv, 1, size.d}; }
    template <class E, class M>
    View<E, 4> rows(const M& memory, const Sizes& s, Index heads, Index all) const {
        return view(static_cast<E*>(memory.data()), {s.B, s.L, heads, s.d}, {size.L * all * s.d, all * s.d, s.d, Index{1}});
    }
    attention::Inputs<T> inputs(const Sizes& s) const {
        return {
            .q = rows<const T>(q, s, s.Hq, size.Hq), .k = rows<const T>(k, s, s.Hkv, size.Hkv), .v = rows<const T>(v, s, s.Hkv, size.Hkv)};
    }
    attention::Outputs<T> outputs(const Sizes& s) const {
        return {.o = rows<T>(o, s, s.Hq, size.Hq), .lse = view(lse.data(), {s.B, s.L, s.Hq}, {size.L * size.Hq, size.Hq, Index{1}})};
    }
    attention::Upstream<T> upstream(const Sizes& s) const { return {.o = rows<const T>(dout, s, s.Hq, size.Hq)}; }
    attention::Grads<T> gradients(const Sizes& s) const {
        return {rows<T>(dq, s, s.Hq, size.Hq), rows<T>(dk, s, s.Hkv, size.Hkv), rows<T>(dv, s, s.Hkv, size.Hkv)};
    }
};

template <class T>
struct Runs {
    const Layer<T>& layer;
    Options options;
    interstate::cuda exec{};
    DeviceArray<char> memory;
    Runs(const Layer<T>& of, const Options& with)
        : layer(of), options(with), memory(std::max<std::size_t>({1, bytes(of, with, pass::forward), bytes(of, with, pass::backward)})) {}
    static std::size_t bytes(const Layer<T>& of, const Options& with, pass which) {
        return workspace_size(interstate::cuda{}, with, shape_of(of.inputs(of.size)), which);
    }
    void forward_of(const Sizes& s) const {
        check(forward(exec, options, layer.inputs(s), layer.outputs(s), Saved{}, {memory.data(), memory.size()}));
    }
    void both_of(const Sizes& s) const {
        forward_of(s);
        check(backward(exec, options, layer.inputs(s), layer.outputs(s), Saved{}, layer.upstream(s), layer.gradients(s),
                       {memory.data(), memory.size()}));
    }
};

template <class T>
void run(const Sizes& s, const bool causal) {
    const Layer<T> layer(s);
    const Runs<T> whole(layer, {.causal = causal}), part(layer, {.component = Component::routing, .causal = causal});
    const Sizes few = layer.slice();
    part.both_of(few);
    const bench::Errors errors(bench::results_of(layer.inputs(few), layer.outputs(few), layer.gradients(few)),
                               bench::truth_of<component_attention::Operator>(part.options, layer.inputs(few), layer.upstream(few)));
    const auto times = [&](const Runs<T>& runs) {
        return std::pair(bench::milliseconds([&] { runs.forward_of(s); }), bench::milliseconds([&] { runs.both_of(s); }));
    };
    const auto [whole_forward, whole_both] = times(whole);
    const auto [part_forward, part_both] = times(part);
    const double tensors = 4.0 * sizeof(T) * static_cast<double>(layer.q.size() + layer.k.size());
    std::printf(
        "{\"op\":\"component_attention\",\"kernel\":\"%s\",\"component\":\"routing\",\"causal\":%s,\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,"
        "\"Hq\":%lld,\"Hkv\":%lld,\"d\":%lld,"
        "\"forward_ms\":%.4f,\"both_ms\":%.4f,\"attention_forward_ms\":%.4f,\"attention_both_ms\":%.4f,\"forward_ratio\":%.3f,\"both_"
        "ratio\":%.3f,\"memory_ratio\":%.3f,",
        which_kernel(part.exec, part.options, shape_of(layer.inputs(s))).name, causal ? "true" : "false", to_string(dtype_of<T>),
        static_cast<long long>(s.B), static_cast<long long>(s.L), static_cast<long long>(s.Hq), static_cast<long long>(s.Hkv),
        static_cast<long long>(s.d), part_forward, part_both, whole_forward, whole_both, part_forward / whole_forward,
        part_both / whole_both, 1.0 + static_cast<double>(part.memory.size()) / tensors);
    errors.print();
}

}  // namespace

/// `cuda_bench brief` leaves all but the first shape out.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    run<bf16>({4, 4096, 32, 32, 64}, true);
    if (argc > 1 && std::strcmp(argv[1], "brief") == 0) return 0;
    run<bf16>({4, 4096, 32, 8, 64}, true);
    run<bf16>({4, 4096, 32, 32, 128}, true);
    run<bf16>({64, 512, 12, 12, 32}, false);  // an encoder's heads
    run<f32>({4, 4096, 32, 32, 64}, true);
}
