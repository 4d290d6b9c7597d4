// S-D attention on the GPU beside the operator inside it, attention or linear attention on u, u and v, in the same run: milliseconds of forward
// and of forward and backward, their ratios, the time of the projection's bytes at this run's copy speed (u read, x written), and errors against
// float64, as JSON lines. The errors are those of one more call, of the first tokens of two heads.
#include <algorithm>
#include <cstring>

#include <interstate/verify.cuh>
#include <sd_attention/reference.hpp>
#include <sd_attention/sd_attention.cuh>

#include "../support/cuda_bench.cuh"

namespace {

using namespace interstate;
using bench::Ceilings;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;
using sd_attention::Normalizer;
using sd_attention::Options;

struct Sizes {
    Index B, L, H, r;
};

template <class T>
struct Layer {
    static constexpr Index slice_tokens = 2048;
    Sizes size;
    RandomArray<T> u, v, dout;
    RandomArray<float> P, delta;
    DeviceArray<T> o, du, dq, dv;
    DeviceArray<float> lse, dP, ddelta;

    explicit Layer(const Sizes& s)
        : size(s), u(rows() * s.r, 1, 3.4), v(rows() * s.r, 2, 3.4), dout(rows() * s.r, 3, 3.4), P(s.H * s.r * s.r, 4, 0.4), delta(s.H * s.r, 5, 1.0), o(u.size()),
          du(u.size()), dq(u.size()), dv(u.size()), lse(static_cast<std::size_t>(rows())), dP(P.size()), ddelta(delta.size()) {}
    Index rows() const { return size.B * size.L * size.H; }
    /// One batch row of two heads.
    Sizes slice() const { return {1, std::min(size.L, slice_tokens), std::min<Index>(size.H, 2), size.r}; }
    template <class E, class M>
    View<E, 4> all(const M& memory, const Sizes& s) const {
        return view(static_cast<E*>(memory.data()), {s.B, s.L, s.H, s.r}, {size.L * size.H * s.r, size.H * s.r, s.r, Index{1}});
    }
    template <class E, class M, class N>
    sd_attention::BasicGenerator<E> generator(const M& p, const N& d, const Sizes& s) const {
        return {.P = view(static_cast<E*>(p.data()), {s.H, s.r, s.r}), .delta = view(static_cast<E*>(d.data()), {s.H, s.r})};
    }
    sd_attention::Inputs<T, float> inputs(const Sizes& s) const {
        return {.u = all<const T>(u, s), .v = all<const T>(v, s), .generator = generator<const float>(P, delta, s)};
    }
    attention::Outputs<T> outputs(const Sizes& s, bool softmax) const {
        attention::Outputs<T> out{.o = all<T>(o, s)};
        if (softmax) out.lse = view(lse.data(), {s.B, s.L, s.H}, {size.L * size.H, size.H, Index{1}});
        return out;
    }
    attention::Upstream<T> upstream(const Sizes& s) const { return {.o = all<const T>(dout, s)}; }
    sd_attention::Grads<T, float> gradients(const Sizes& s) const { return {all<T>(du, s), all<T>(dv, s), generator<float>(dP, ddelta, s)}; }
};

/// Forward, and forward and backward, in milliseconds.
struct Times {
    double forward, both;
};

template <class T>
Times time_inside(const Layer<T>& layer, const Options& options) {
    const interstate::cuda exec;
    const Sizes& s = layer.size;
    const auto u = layer.template all<const T>(layer.u, s), v = layer.template all<const T>(layer.v, s);
    const auto measure = [&](const auto& of, const auto& in, const auto& out, const auto& upstream, const auto& grads) {
        const auto shape = shape_of(in);
        const DeviceArray<char> memory(std::max<std::size_t>({1, workspace_size(exec, of, shape, pass::forward), workspace_size(exec, of, shape, pass::backward)}));
        const DeviceArray<char> kept(saved_size(exec, of, shape));
        const Workspace ws{memory.data(), memory.size()};
        const auto forwards = [&](Saved saved) { check(forward(exec, of, in, out, saved, ws)); };
        const auto both = [&] {
            forwards(Saved{kept.data(), kept.size()});
            check(backward(exec, of, in, out, Saved{kept.data(), kept.size()}, upstream, grads, ws));
        };
        both();
        const double first = bench::milliseconds([&] { forwards(Saved{}); });
        return Times{first, bench::milliseconds(both)};
    };
    const auto dq = layer.template all<T>(layer.dq, s), du = layer.template all<T>(layer.du, s), dv = layer.template all<T>(layer.dv, s);
    if (options.softmax())
        return measure(attention::Options{}, attention::Inputs<T>{.q = u, .k = u, .v = v}, layer.outputs(s, true), layer.upstream(s), attention::Grads<T>{dq, du, dv});
    return measure(sd_attention::detail::linear_of(options), linear_attention::Inputs<T>{.q = u, .k = u, .v = v},
                   linear_attention::Outputs<T>{.o = layer.outputs(s, false).o}, linear_attention::Upstream<T>{.o = layer.upstream(s).o},
                   linear_attention::Grads<T>{.q = dq, .k = du, .v = dv});
}

template <class T>
void run(const Sizes& s, Normalizer normalizer, const Ceilings& ceilings) {
    const Layer<T> layer(s);
    const Options options{.normalizer = normalizer};
    const interstate::cuda exec;
    const auto shape = shape_of(layer.inputs(s));
    const DeviceArray<char> memory(std::max(workspace_size(exec, options, shape, pass::forward), workspace_size(exec, options, shape, pass::backward)));
    const DeviceArray<char> kept(saved_size(exec, options, shape));
    const Workspace ws{memory.data(), memory.size()};
    const auto forwards = [&](const Sizes& of, bool keeps) {
        check(forward(exec, options, layer.inputs(of), layer.outputs(of, options.softmax()), keeps ? Saved{kept.data(), kept.size()} : Saved{}, ws));
    };
    const auto both = [&](const Sizes& of) {
        forwards(of, true);
        check(backward(exec, options, layer.inputs(of), layer.outputs(of, options.softmax()), Saved{kept.data(), kept.size()}, layer.upstream(of), layer.gradients(of), ws));
    };
    const Sizes few = layer.slice();
    both(few);
    const bench::Errors errors(bench::results_of(layer.inputs(few), layer.outputs(few, options.softmax()), layer.gradients(few)),
                               bench::truth_of<sd_attention::Operator>(options, layer.inputs(few), layer.upstream(few)));
    const double forward_ms = bench::milliseconds([&] { forwards(s, false); }), both_ms = bench::milliseconds([&] { both(s); });
    const Times inside = time_inside(layer, options);
    static constexpr const char* names[] = {"softmax", "identity", "elu1"};
    std::printf("{\"op\":\"sd_attention\",\"kernel\":\"%s\",\"normalizer\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,\"H\":%lld,\"r\":%lld,\"forward_ms\":%.4f,\"both_ms\":%.4f,"
                "\"inside_forward_ms\":%.4f,\"inside_both_ms\":%.4f,\"forward_ratio\":%.3f,\"both_ratio\":%.3f,\"projection_bytes_ms\":%.4f,",
                which_kernel(exec, options, shape).name, names[static_cast<int>(normalizer)], to_string(dtype_of<T>), static_cast<long long>(s.B), static_cast<long long>(s.L),
                static_cast<long long>(s.H), static_cast<long long>(s.r), forward_ms, both_ms, inside.forward, inside.both, forward_ms / inside.forward, both_ms / inside.both,
                2.0 * static_cast<double>(layer.rows() * s.r) * sizeof(T) / ceilings.copy_gbps * 1e-6);
    errors.print();
}

}  // namespace

/// `cuda_bench brief` leaves all but the first shapes out.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    const Ceilings c = bench::measure_ceilings();
    const bool brief = argc > 1 && std::strcmp(argv[1], "brief") == 0;
    for (const Normalizer normalizer : {Normalizer::softmax, Normalizer::identity, Normalizer::elu1}) {
        run<bf16>({4, 4096, 32, 64}, normalizer, c);
        run<bf16>({4, 4096, 32, 128}, normalizer, c);
        if (brief) continue;
        run<bf16>({2, 16384, 32, 64}, normalizer, c);
        run<f16>({4, 4096, 32, 64}, normalizer, c);
        run<f32>({4, 4096, 32, 64}, normalizer, c);
    }
}
