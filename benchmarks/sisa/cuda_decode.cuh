// Decoding of SISA on the GPU: milliseconds of a step, its fraction of the copy speed, and its error, as JSON lines.
#pragma once

#include <algorithm>

#include <sisa/reference.hpp>
#include <sisa/sisa.cuh>

#include "../support/cuda_bench.cuh"

namespace interstate::bench {

/// A step of one token that reads L rows of a cache for each of B sequences, in a CUDA graph of steps on so many caches (a model's layers)
/// that the second-level cache holds none of them. Lengths are in device memory; caches come from `append` of one prompt, which is
/// timed too. The error is that of the heads of one group of the last sequence.
template <class T>
void decode_sisa(Index B, Index Hkv, Index ds, const Ceilings& ceilings) {
    using P = param_t<T>;
    constexpr Index L = 8192, Hq = 32, d = 64;
    const double row_bytes = static_cast<double>(2 * d + ds) * sizeof(T) + sizeof(double), bytes = static_cast<double>(B * L * Hkv) * row_bytes;
    const Index layers = std::max<Index>(1, static_cast<Index>(1e9 / bytes)), rows = B * L * Hkv;
    const DeviceArray<T> cache_k(static_cast<std::size_t>(layers * rows * d)), cache_v(cache_k.size()), cache_B(static_cast<std::size_t>(layers * rows * ds));
    const DeviceArray<double> cache_g(static_cast<std::size_t>(layers * rows)), g_last(static_cast<std::size_t>(layers * B * Hkv)),
        Phi(static_cast<std::size_t>(layers * B * Hkv * ds / 2));
    // One prompt for all sequences; its last row is the token.
    const RandomArray<T> q(B * Hq * d, 1, 3.4), C(B * Hq * ds, 2, 3.4), k(L * Hkv * d, 3, 3.4), v(L * Hkv * d, 4, 3.4), Bs(L * Hkv * ds, 5, 3.4);
    const RandomArray<P> log_alpha(L * Hkv, 6, 0.0134, -0.0067), theta(L * Hkv * ds / 2, 7, 0.4), lam(Hq, 8, 0.5, 0.5);
    const DeviceArray<T> o(static_cast<std::size_t>(layers * B * Hq * d));
    const DeviceArray<std::int32_t> lengths(std::vector<std::int32_t>(static_cast<std::size_t>(B), static_cast<std::int32_t>(L - 1)));
    const sisa::Options options;
    const sisa::Params<P> params{view(static_cast<const P*>(lam.data()), {Hq})};
    const auto keys = [&]<class E>(const RandomArray<E>& x, Index width, Index first, Index count) {
        return view(static_cast<const E*>(x.data()) + first * Hkv * width, {B, count, Hkv, width}, {Index{0}, Hkv * width, width, Index{1}});
    };
    const auto alphas = [&](Index first, Index count) {
        return view(static_cast<const P*>(log_alpha.data()) + first * Hkv, {B, count, Hkv}, {Index{0}, Hkv, Index{1}});
    };
    const sisa::Keys<T, P> prompt{keys(k, d, 0, L - 1), keys(v, d, 0, L - 1), keys(Bs, ds, 0, L - 1), alphas(0, L - 1), keys(theta, ds / 2, 0, L - 1)};
    const sisa::Tokens<T, P> tokens{.q = view(static_cast<const T*>(q.data()), {B, Index{1}, Hq, d}), .k = keys(k, d, L - 1, 1), .v = keys(v, d, L - 1, 1),
                                    .C = view(static_cast<const T*>(C.data()), {B, Index{1}, Hq, ds}), .B = keys(Bs, ds, L - 1, 1),
                                    .log_alpha = alphas(L - 1, 1), .theta = keys(theta, ds / 2, L - 1, 1)};
    const auto state = [&](Index layer) {
        return sisa::State<T>{.k = view(cache_k.data() + layer * rows * d, {B, L, Hkv, d}),
                              .v = view(cache_v.data() + layer * rows * d, {B, L, Hkv, d}),
                              .B = view(cache_B.data() + layer * rows * ds, {B, L, Hkv, ds}),
                              .g = view(cache_g.data() + layer * rows, {B, L, Hkv}),
                              .g_last = view(g_last.data() + layer * B * Hkv, {B, Hkv}),
                              .Phi = view(Phi.data() + layer * B * Hkv * ds / 2, {B, Hkv, ds / 2}),
                              .lengths = view(static_cast<const std::int32_t*>(lengths.data()), {B})};
    };
    const auto fill = [&](Index layer) {
        auto empty = state(layer);
        empty.lengths = {};
        check(append(cuda{}, options, empty, prompt));
    };
    for (Index i = 0; i < layers; ++i) fill(i);
    const DeviceArray<char> memory(workspace_size(cuda{}, options, shape_of(state(0), tokens), pass::step));
    const auto steps = [&](const cuda& exec) {
        for (Index i = 0; i < layers; ++i)
            check(step(exec, options, params, state(i), tokens, sisa::TokensOut<T>{.o = view(o.data() + i * B * Hq * d, {B, Index{1}, Hq, d})},
                       Workspace{memory.data(), memory.size()}));
    };
    steps(cuda{});

    const Index group = Hq / Hkv, row = B - 1;
    const auto slice = [&]<class E>(const RandomArray<E>& x, Index width) {
        return view(static_cast<const E*>(x.data()), {Index{1}, L, Index{1}, width}, {Index{0}, Hkv * width, width, Index{1}});
    };
    const sisa::Inputs<T, P> in{.q = view(static_cast<const T*>(q.data()) + row * Hq * d, {Index{1}, Index{1}, group, d}), .k = slice(k, d), .v = slice(v, d),
                                .C = view(static_cast<const T*>(C.data()) + row * Hq * ds, {Index{1}, Index{1}, group, ds}), .B = slice(Bs, ds),
                                .log_alpha = view(static_cast<const P*>(log_alpha.data()), {Index{1}, L, Index{1}}, {Index{0}, Hkv, Index{1}}),
                                .theta = slice(theta, ds / 2), .lam = view(static_cast<const P*>(lam.data()), {group})};
    Case tensors, truth, got;
    check(collect_case(cuda{}, in, static_cast<const sisa::Upstream<T>*>(nullptr), tensors));
    check(run_case<sisa::Operator, double, double>(reference{}, options, tensors, truth));
    const cuda where;
    interstate::detail::Collect<cuda> collect{where, "out.", got, {}};
    auto o_slice = view(o.data() + row * Hq * d, {Index{1}, Index{1}, group, d});
    collect("o", o_slice, {Index{1}, Index{1}, group, d}, Need::required);
    check(collect.status);
    const TensorError error = compare("o", got.tensors.at("out.o"), truth.tensors.at("out.o"));

    const double ms = graph_milliseconds(steps) / static_cast<double>(layers), append_ms = milliseconds([&] { fill(0); });
    const double moved = bytes + static_cast<double>(B * (Hq * (2 * d + ds) + Hkv * (2 * d + ds))) * sizeof(T);
    std::printf("{\"op\":\"sisa\",\"case\":\"decode\",\"kernel\":\"%s\",\"dtype\":\"%s\",\"B\":%lld,\"L\":%lld,\"Hq\":%lld,\"Hkv\":%lld,\"d\":%lld,\"ds\":%lld,"
                "\"step_ms\":%.5f,\"append_ms\":%.4f,\"floor_bytes_ms\":%.5f,\"of_copy\":%.3f,\"error\":%.2e}\n",
                which_step_kernel(cuda{}, options, state(0), tokens).name, to_string(dtype_of<T>), static_cast<long long>(B), static_cast<long long>(L),
                static_cast<long long>(Hq), static_cast<long long>(Hkv), static_cast<long long>(d), static_cast<long long>(ds), ms, append_ms,
                moved / ceilings.copy_gbps * 1e-6, moved / ms * 1e-6 / ceilings.copy_gbps, error.finite ? error.relative : NAN);
    std::fflush(stdout);
}

/// Every row of decoding that a benchmark prints.
inline void decode_sisa(const Ceilings& c) {
    for (const Index Hkv : {32, 8})
        for (const Index B : {1, 8, 64}) decode_sisa<bf16>(B, Hkv, 16, c);
    decode_sisa<bf16>(64, 8, 64, c);
    decode_sisa<f32>(8, 8, 16, c);
}

}  // namespace interstate::bench
