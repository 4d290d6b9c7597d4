// SISA on the GPU: milliseconds of forward and of forward and backward, the same of attention without channels in the same run, bytes
// of memory, errors against float64, and the floors, as JSON lines.
//
// Useful multiply-adds of a call: 2 d + ds a score that is read forward, 7 d + 3 ds for both (backward forms dC and dB, and the
// scores it forms again are not counted). Floors: those at this run's rate of tensor cores, and each input, output and gradient moved
// once at its copy speed. The errors are those of one more call, of the first tokens of two heads.
#include <algorithm>
#include <cstring>
#include <optional>

#include <interstate/verify.cuh>
#include <sisa/reference.hpp>
#include <sisa/sisa.cuh>

#include "../support/cuda_bench.cuh"
#include "cuda_decode.cuh"

namespace {

using namespace interstate;
using bench::Ceilings;
using bench::check;
using bench::DeviceArray;
using bench::RandomArray;
using sisa::Mode;
using sisa::Options;

struct Sizes {
    Index B, L, Hq, d, ds, Hkv = 0;
    double half_life = 100.0;  // tokens; 100 is that of the published initialisation
    Mode mode = Mode::exact;
    Index kv_heads() const { return Hkv > 0 ? Hkv : Hq; }
};

/// The tensors of a call, and views of all of them or of the first tokens of the first heads.
template <class T>
struct Layer {
    using P = param_t<T>;
    static constexpr Index slice_tokens = 1024;
    Sizes size;
    RandomArray<T> q, k, v, C, B, dout;
    RandomArray<P> log_alpha, theta, lam;
    DeviceArray<T> o, dq, dk, dv, dC, dB;
    DeviceArray<P> dlog_alpha, dtheta, dlam;
    DeviceArray<acc_t<T>> lse;

    explicit Layer(const Sizes& s)
        : size(s), q(queries() * s.d, 1, 3.4), k(keys() * s.d, 2, 3.4), v(keys() * s.d, 3, 3.4), C(queries() * s.ds, 4, 3.4), B(keys() * s.ds, 5, 3.4),
          dout(queries() * s.d, 6, 3.4), log_alpha(keys(), 7, 0.6931 / s.half_life, -0.6931 / s.half_life), theta(keys() * s.ds / 2, 8, 0.4),
          lam(s.Hq, 9, 0.1, 0.31), o(q.size()), dq(q.size()), dk(k.size()), dv(v.size()), dC(C.size()), dB(B.size()), dlog_alpha(log_alpha.size()),
          dtheta(theta.size()), dlam(lam.size()), lse(static_cast<std::size_t>(queries())) {}
    Index queries() const { return size.B * size.L * size.Hq; }
    Index keys() const { return size.B * size.L * size.kv_heads(); }

    /// One batch row, the query heads of one key/value head or two heads.
    Sizes slice() const {
        const Index group = size.Hq / size.kv_heads(), kv = std::min<Index>(size.kv_heads(), group > 1 ? 1 : 2);
        Sizes s = size;
        s.B = 1;
        s.L = std::min(size.L, slice_tokens);
        s.Hq = kv * group;
        s.Hkv = kv;
        return s;
    }
    template <class E, class M>
    View<E, 4> rows(const M& memory, const Sizes& s, Index heads, Index all, Index width) const {
        return view(static_cast<E*>(memory.data()), {s.B, s.L, heads, width}, {size.L * all * width, all * width, width, Index{1}});
    }
    template <class E, class M>
    View<E, 3> tokens(const M& memory, const Sizes& s, Index heads, Index all) const {
        return view(static_cast<E*>(memory.data()), {s.B, s.L, heads}, {size.L * all, all, Index{1}});
    }
    sisa::Inputs<T, P> inputs(const Sizes& s) const {
        const Index kv = s.kv_heads(), all = size.kv_heads();
        sisa::Inputs<T, P> in{.q = rows<const T>(q, s, s.Hq, size.Hq, s.d), .k = rows<const T>(k, s, kv, all, s.d), .v = rows<const T>(v, s, kv, all, s.d)};
        if (s.ds == 0) return in;
        in.C = rows<const T>(C, s, s.Hq, size.Hq, s.ds);
        in.B = rows<const T>(B, s, kv, all, s.ds);
        in.log_alpha = tokens<const P>(log_alpha, s, kv, all);
        in.theta = rows<const P>(theta, s, kv, all, s.ds / 2);
        in.lam = view(static_cast<const P*>(lam.data()), {s.Hq});
        return in;
    }
    sisa::Upstream<T> upstream(const Sizes& s) const { return {.o = rows<const T>(dout, s, s.Hq, size.Hq, s.d)}; }
    sisa::Outputs<T> outputs(const Sizes& s) const { return {.o = rows<T>(o, s, s.Hq, size.Hq, s.d), .lse = tokens<acc_t<T>>(lse, s, s.Hq, size.Hq)}; }
    sisa::Grads<T, P> gradients(const Sizes& s) const {
        const Index kv = s.kv_heads(), all = size.kv_heads();
        sisa::Grads<T, P> g{.q = rows<T>(dq, s, s.Hq, size.Hq, s.d), .k = rows<T>(dk, s, kv, all, s.d), .v = rows<T>(dv, s, kv, all, s.d)};
        if (s.ds == 0) return g;
        g.C = rows<T>(dC, s, s.Hq, size.Hq, s.ds);
        g.B = rows<T>(dB, s, kv, all, s.ds);
        g.log_alpha = tokens<P>(dlog_alpha, s, kv, all);
        g.theta = rows<P>(dtheta, s, kv, all, s.ds / 2);
        g.lam = view(dlam.data(), {s.Hq});
        return g;
    }
    /// Of inputs, outputs and gradients.
    double tensor_bytes() const {
        return sizeof(T) * (4.0 * static_cast<double>(q.size()) + 2.0 * static_cast<double>(k.size() + v.size() + C.size() + B.size())) +
               sizeof(P) * 2.0 * static_cast<double>(log_alpha.size() + theta.size() + lam.size()) + sizeof(acc_t<T>) * static_cast<double>(lse.size());
    }
};

struct Times {
    double forward = 0.0, both = 0.0;
    std::size_t memory = 0;
};

/// A call's times; its results of the slice go to `check_results`.
template <class T, class F>
Times time(const Layer<T>& layer, const Sizes& s, F&& check_results) {
    const Options options{.mode = s.mode};
    const interstate::cuda exec;
    const auto shape = shape_of(layer.inputs(s));
    const DeviceArray<char> memory(std::max(workspace_size(exec, options, shape, pass::forward), workspace_size(exec, options, shape, pass::backward))),
        kept(saved_size(exec, options, shape));
    const Workspace ws{memory.data(), memory.size()};
    const auto forwards = [&](const Sizes& of, bool trains) {
        auto out = layer.outputs(of);
        if (!trains) out.lse = {};
        check(forward(exec, options, layer.inputs(of), out, trains ? Saved{kept.data(), kept.size()} : Saved{}, ws));
    };
    const auto both = [&](const Sizes& of) {
        forwards(of, true);
        check(backward(exec, options, layer.inputs(of), layer.outputs(of), Saved{kept.data(), kept.size()}, layer.upstream(of), layer.gradients(of), ws));
    };
    Sizes few = layer.slice();
    few.ds = s.ds;
    both(few);
    check_results(few, options);
    return {bench::milliseconds([&] { forwards(s, false); }), bench::milliseconds([&] { both(s); }), memory.size() + kept.size()};
}

template <class T>
void run(const Sizes& s, const Ceilings& ceilings) {
    const Layer<T> layer(s);
    Sizes plain = s;
    plain.ds = 0;
    plain.mode = Mode::exact;
    const Times attention = time<T>(layer, plain, [](const Sizes&, const Options&) {});
    std::optional<bench::Errors> errors;
    const Times own = time<T>(layer, s, [&](const Sizes& few, const Options& options) {
        errors.emplace(bench::results_of(layer.inputs(few), layer.outputs(few), layer.gradients(few)),
                       bench::truth_of<sisa::Operator>(options, layer.inputs(few), layer.upstream(few)));
    });
    const auto q = static_cast<double>(layer.queries()), k = static_cast<double>(layer.keys()), d = static_cast<double>(s.d), ds = static_cast<double>(s.ds);
    const double scores = q * 0.5 * static_cast<double>(s.L + 1);
    const double tflops = sizeof(T) == 2 ? ceilings.bf16_tflops : ceilings.tflops<T>(), products = std::is_same_v<T, f32> ? 3.0 : 1.0;
    const auto product_ms = [&](double macs) { return 2.0 * macs * products / tflops * 1e-9; };
    const auto bytes_ms = [&](double bytes) { return bytes / ceilings.copy_gbps * 1e-6; };
    const double forward_bytes = sizeof(T) * (2.0 * q * d + 2.0 * k * d + (q + k) * ds) + sizeof(param_t<T>) * k * (1.0 + ds / 2.0);
    std::printf("{\"op\":\"sisa\",\"kernel\":\"%s\",\"mode\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,\"Hq\":%lld,\"Hkv\":%lld,\"d\":%lld,\"ds\":%lld,"
                "\"half_life\":%g,\"forward_ms\":%.4f,\"both_ms\":%.4f,\"attention_forward_ms\":%.4f,\"attention_both_ms\":%.4f,\"forward_ratio\":%.3f,"
                "\"both_ratio\":%.3f,\"floor_bytes_ms\":%.4f,\"floor_products_ms\":%.4f,\"both_floor_bytes_ms\":%.4f,\"both_floor_products_ms\":%.4f,"
                "\"memory_ratio\":%.3f,",
                which_kernel(interstate::cuda{}, Options{.mode = s.mode}, shape_of(layer.inputs(s))).name, s.mode == Mode::exact ? "exact" : "published",
                to_string(dtype_of<T>), static_cast<long long>(s.B), static_cast<long long>(s.L), static_cast<long long>(s.Hq),
                static_cast<long long>(s.kv_heads()), static_cast<long long>(s.d), static_cast<long long>(s.ds), s.half_life, own.forward, own.both,
                attention.forward, attention.both, own.forward / attention.forward, own.both / attention.both, bytes_ms(forward_bytes),
                product_ms((2.0 * d + ds) * scores), bytes_ms(layer.tensor_bytes()), product_ms((7.0 * d + 3.0 * ds) * scores),
                1.0 + static_cast<double>(own.memory) / layer.tensor_bytes());
    errors->print();
}

}  // namespace

/// `cuda_bench brief` leaves the sweeps out, `cuda_bench decode` has the steps alone.
int main(int argc, char** argv) {
    if (!bench::has_device()) return bench::skipped;
    const Ceilings c = bench::measure_ceilings();
    if (argc > 1 && std::strcmp(argv[1], "decode") == 0) {
        bench::decode_sisa(c);
        return 0;
    }
    run<bf16>({4, 4096, 32, 64, 16}, c);
    run<bf16>({4, 4096, 32, 64, 64}, c);
    run<bf16>({2, 16384, 32, 64, 16}, c);
    run<bf16>({2, 16384, 32, 64, 64}, c);
    run<bf16>({4, 4096, 32, 128, 16}, c);
    run<f32>({4, 4096, 32, 64, 16}, c);
    if (argc > 1 && std::strcmp(argv[1], "brief") == 0) return 0;
    for (const Index ds : {0, 32, 128}) run<bf16>({4, 4096, 32, 64, ds}, c);
    run<bf16>({.B = 4, .L = 4096, .Hq = 32, .d = 64, .ds = 16, .mode = Mode::published}, c);
    for (const double half_life : {0.5, 10.0, 1e4}) run<bf16>({.B = 4, .L = 4096, .Hq = 32, .d = 64, .ds = 16, .half_life = half_life}, c);
    run<bf16>({4, 4096, 32, 64, 16, 8}, c);
    run<f16>({4, 4096, 32, 64, 16}, c);
    run<f16>({.B = 4, .L = 4096, .Hq = 32, .d = 64, .ds = 16, .half_life = 10.0}, c);
    run<bf16>({4, 4096, 32, 128, 64}, c);
    run<f64>({1, 1024, 8, 64, 16}, c);
    bench::decode_sisa(c);
    for (Index L = 256; L <= 65536; L *= 2) run<bf16>({1, L, 32, 64, 16}, c);
    return 0;
}
