// The executor cuda_fft of S4D, and the Vandermonde kernel on `cuda`, against the float64 reference. A plain program
// like cuda_test.cu, with the same arguments and exit codes.
#include <array>
#include <cmath>
#include <cstdio>

#include <interstate/verify.cuh>
#include <s4d/fft.cuh>
#include <s4d/reference.hpp>
#include <s4d/s4d.cuh>

#include "../support/cuda_main.cuh"
#include "s4d_cases.hpp"

namespace interstate {

template <>
struct Memory<s4d::cuda_fft> : Memory<cuda> {
    static Status to_executor(const s4d::cuda_fft& exec, void* destination, const void* source, std::size_t bytes) {
        return Memory<cuda>::to_executor(exec.base, destination, source, bytes);
    }
    static Status to_host(const s4d::cuda_fft& exec, void* destination, const void* source, std::size_t bytes) {
        return Memory<cuda>::to_host(exec.base, destination, source, bytes);
    }
    static Status finish(const s4d::cuda_fft& exec) { return Memory<cuda>::finish(exec.base); }
};

}  // namespace interstate

namespace interstate::test {
namespace {

using s4d::Operator;

/// generate_kernel of length L, and its backward where the case has "dout.K".
template <class A, class P, class Exec>
Status run_kernel(const Exec& exec, const s4d::Options& options, const Case& c, Index L, Layout layout, Case& results) {
    interstate::detail::Tensors<Exec> memory(exec, layout, std::numeric_limits<std::size_t>::max());
    std::vector<std::string> seen;
    s4d::Params<P> params{};
    interstate::detail::Upload<Exec> upload{memory, c, "", true, false, &seen, {}};
    s4d::visit_params(params, s4d::Shape{}, Need::required, upload);
    INTERSTATE_RETURN_IF_ERROR(upload.status);
    View<A, 2> K{};
    INTERSTATE_RETURN_IF_ERROR(memory.allocate("K", K, {params.im.extent[0], L}));
    const s4d::Shape shape = shape_of(params, K);
    const auto workspace = [&](pass p, Workspace& ws) {
        ws.size = generate_kernel_workspace_size(exec, options, shape, p);
        return memory.scratch("workspace", ws.size, ws.data);
    };
    Workspace ws;
    INTERSTATE_RETURN_IF_ERROR(workspace(pass::forward, ws));
    INTERSTATE_RETURN_IF_ERROR(generate_kernel(exec, options, params, K, ws));
    INTERSTATE_RETURN_IF_ERROR(Memory<Exec>::finish(exec));
    INTERSTATE_RETURN_IF_ERROR(memory.download("K", K, results.tensors["out.K"]));

    View<const A, 2> dK{};
    INTERSTATE_RETURN_IF_ERROR(memory.upload("dout.K", c.tensors.at("dout.K"), dK));
    s4d::BasicParams<P, complex<P>> grads{};
    const auto present = [&](const char* name) { return c.tensors.contains(name); };
    interstate::detail::Allocate<Exec, decltype(present)> allocate{memory, present, {}};
    s4d::visit_params(grads, shape, Need::optional, allocate);
    INTERSTATE_RETURN_IF_ERROR(allocate.status);
    INTERSTATE_RETURN_IF_ERROR(workspace(pass::backward, ws));
    INTERSTATE_RETURN_IF_ERROR(generate_kernel_backward(exec, options, params, dK, grads, ws));
    INTERSTATE_RETURN_IF_ERROR(Memory<Exec>::finish(exec));
    interstate::detail::Download<Exec> download{memory, "grad.", results, {}};
    s4d::visit_params(grads, shape, Need::optional, download);
    return download.status;
}

struct KernelCase {
    Index length = 1, channels = 2, modes = 3;
    s4d::Discretization disc = s4d::Discretization::zoh;
    Layout layout = Layout::contiguous;
    double decay = 0.5, log_dt = 0.0;  // log_dt 0: as initialised
    bool bidirectional = false;
};

template <class A, class P>
void expect_kernel(Checks& checks, const KernelCase& k) {
    Case c = make({.channels = k.channels, .modes = k.modes, .decay = k.decay, .bidirectional = k.bidirectional},
                  static_cast<std::uint64_t>(k.length + 7 * k.modes));
    if (k.log_dt != 0.0)
        for (double& x : c.tensors["log_dt"].values) x = k.log_dt;
    c = rounded<Operator, A, P>(c);
    c.tensors["dout.K"] = Random(5).normal({k.channels, k.length});
    for (double& x : c.tensors["dout.K"].values) x = static_cast<A>(x);
    const s4d::Options options{.disc = k.disc};
    Case got, want;
    const Status status = run_kernel<A, P>(interstate::cuda{}, options, c, k.length, k.layout, got);
    const Status truth = run_kernel<double, double>(reference{}, options, c, k.length, k.layout, want);
    char what[128];
    std::snprintf(what, sizeof what, "kernel %s L=%d H=%d N=%d", to_string(dtype_of<A>), static_cast<int>(k.length),
                  static_cast<int>(k.channels), static_cast<int>(k.modes));
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    // The last bit of Abar, which host and device may round differently, is multiplied by the number of lags that a
    // mode lives.
    const double conditioning = sizeof(A) == 8 && k.length > 10000 ? static_cast<double>(k.length) * 0x1p-51 : 0.0;
    const std::string beyond = beyond_tolerance<A>(c, got, want, conditioning);
    checks.expect(beyond.empty(), what, beyond.c_str());
}

void every_kernel_dtype(Checks& checks, const KernelCase& k) {
    expect_kernel<double, double>(checks, k);
    expect_kernel<float, float>(checks, k);
}

/// run_case with plans made for it.
template <class T, class P>
Status run_fft(const s4d::Options& options, const Case& c, Case& results, RunOptions run = {},
               std::uint32_t* flags = nullptr) {
    const auto& u = c.tensors.at("u").extent;
    s4d::cuda_fft exec{.base = {.flags = flags}};
    INTERSTATE_RETURN_IF_ERROR(make_fft_plans({.dtype = dtype_of<T>, .length = u[1], .channels = u[2]}, exec));
    const Status status = run_case<Operator, T, P>(exec, options, c, results, run);
    const Status destroyed = destroy_fft_plans(exec);
    return status.ok() ? destroyed : status;
}

template <class T, class P>
void expect_close(Checks& checks, const Case& c, s4d::Options options = {}, RunOptions run = {}) {
    const Case in = rounded<Operator, T, P>(c);
    Case got, want;
    const Status status = run_fft<T, P>(options, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, options, in, want, run);
    const auto& u = in.tensors.at("u").extent;
    char what[128];
    std::snprintf(what, sizeof what, "fft %s B=%d L=%d H=%d N=%d", to_string(dtype_of<T>), static_cast<int>(u[0]),
                  static_cast<int>(u[1]), static_cast<int>(u[2]), static_cast<int>(in.tensors.at("im").extent[1]));
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    const std::string beyond = beyond_tolerance<T>(in, got, want);
    checks.expect(beyond.empty(), what, beyond.c_str());
}

void every_dtype(Checks& checks, const Case& c, s4d::Options options = {}, RunOptions run = {}) {
    expect_close<f64, double>(checks, c, options, run);
    expect_close<f32, float>(checks, c, options, run);
    expect_close<f16, float>(checks, c, options, run);
    expect_close<bf16, float>(checks, c, options, run);
}

void packed(Checks& checks, bool bidirectional) {
    // NaN in the margins and in a neighbouring sequence.
    const std::vector<double> cu{3, 3, 40, 41, 600, 600, 700};
    Case c = make({.length = 710, .channels = 5, .modes = 4, .cu_seqlens = cu, .bidirectional = bidirectional}, 4);
    auto& u = c.tensors["u"].values;
    for (Index t = 0; t < 710; ++t)
        if (t < 3 || t >= 700)
            for (Index h = 0; h < 5; ++h) u[t * 5 + h] = std::nan("");
    every_dtype(checks, c);
    Case clean, dirty;
    const Status first = run_fft<float, float>({}, c, clean);
    for (Index i = 41 * 5; i < 600 * 5; ++i) u[i] = c.tensors["dout.y"].values[i] = std::nan("");
    const Status second = run_fft<float, float>({}, c, dirty);
    bool isolated = first.ok() && second.ok();
    checks.expect(isolated, "fft packed", isolated ? "" : first.ok() ? second.message() : first.message());
    for (const char* name : {"out.y", "grad.u"})
        for (Index i = 0; isolated && i < 710 * 5; ++i) {
            const double a = clean.tensors[name].values[i], b = dirty.tensors[name].values[i];
            isolated = i >= 41 * 5 && i < 600 * 5 ? std::isnan(b) : a == b;
        }
    for (const char* name : {"out.xT", "grad.x0"})
        for (Index i = 0; isolated && i < 6 * 5 * 4 * 2; ++i)
            isolated = i / (5 * 4 * 2) == 3 || clean.tensors[name].values[i] == dirty.tensors[name].values[i];
    checks.expect(isolated, "fft packed", "NaN of one sequence must stay in it, and runs must give the same bits");
}

void bad_offsets(Checks& checks) {
    const std::vector<double> bad_offsets[] = {{0, 50, 20, 60}, {-5, 10, 20, 1000}, {61}};
    for (const auto& bad : bad_offsets) {
        const Case wrong = make({.length = 60, .channels = 3, .modes = 2, .cu_seqlens = bad}, 4);
        const std::uint32_t seen = flags_after(checks, "fft bad cu_seqlens", [&](std::uint32_t* flags) {
            Case results;
            return run_fft<float, float>({}, wrong, results, {}, flags);
        });
        checks.expect(seen == flag_bad_cu_seqlens, "fft bad cu_seqlens", "the device flag must be set");
    }
}

/// Each gradient on its own is what it is among the others: what is not asked for is not computed, nor needed.
void gradients_alone(Checks& checks) {
    const Case all = rounded<Operator, float, float>(
        make({.batch = 2, .length = 50, .channels = 3, .modes = 4, .bidirectional = true}, 9));
    Case want;
    const Status truth = run_case<Operator, double, double>(reference{}, {}, all, want);
    checks.expect(truth.ok(), "gradients alone", truth.message());
    s4d::cuda_fft exec;
    interstate::detail::Tensors<interstate::cuda> memory(exec.base, Layout::contiguous,
                                                         std::numeric_limits<std::size_t>::max());
    std::vector<std::string> seen;
    s4d::Inputs<float> in{};
    interstate::detail::Upload<interstate::cuda> upload{memory, all, "", true, false, &seen, {}};
    visit(in, s4d::Shape{}, upload);
    checks.expect(upload.status.ok(), "gradients alone", upload.status.message());
    const s4d::Shape shape = shape_of(in);
    s4d::Upstream<float> upstream{};
    interstate::detail::Upload<interstate::cuda> upload_upstream{memory, all, "dout.", true, true, &seen, {}};
    visit(upstream, shape, upload_upstream);
    checks.expect(upload_upstream.status.ok(), "gradients alone", upload_upstream.status.message());
    Status s = make_fft_plans(shape, exec);
    checks.expect(s.ok(), "gradients alone", s.message());
    Workspace ws{nullptr, workspace_size(exec, s4d::Options{}, shape, pass::backward)};
    s = memory.scratch("workspace", ws.size, ws.data);
    checks.expect(s.ok(), "gradients alone", s.message());
    for (const std::string one : {"u", "x0", "log_dt", "C_reverse", "D"}) {
        s4d::Grads<float> grads{};
        const auto wanted = [&](const char* name) { return one == name; };
        interstate::detail::Allocate<interstate::cuda, decltype(wanted)> allocate{memory, wanted, {}};
        visit(grads, shape, allocate);
        checks.expect(allocate.status.ok(), one.c_str(), allocate.status.message());
        s = backward(exec, s4d::Options{}, in, s4d::Outputs<float>{}, Saved{}, upstream, grads, ws);
        checks.expect(s.ok(), one.c_str(), s.message());
        Case got;
        interstate::detail::Download<interstate::cuda> download{memory, "grad.", got, {}};
        visit(grads, shape, download);
        checks.expect(download.status.ok(), one.c_str(), download.status.message());
        const TensorError e = compare(one, got.tensors["grad." + one], want.tensors["grad." + one]);
        checks.expect(e.finite && e.relative < 1e-5, one.c_str(), "alone, must be the gradient");
    }
    s = destroy_fft_plans(exec);
    checks.expect(s.ok(), "gradients alone", s.message());
}

void transform_lengths(Checks& checks) {
    for (Index length = 0; length < 5000; ++length) {
        const Index n = s4d::fft_length(length);
        Index rest = n;
        for (const Index prime : {2, 3, 5, 7})
            while (rest % prime == 0) rest /= prime;
        if (n % 2 != 0 || n < 2 * length || n < 2 || n > 4 * std::max<Index>(length, 1) || rest != 1)
            checks.expect(false, "fft_length", std::to_string(length).c_str());
    }
    checks.expect(s4d::fft_length(65536) == 131072 && s4d::fft_length(1000) == 2000, "fft_length", "the smallest");
}

void host_errors(Checks& checks) {
    const s4d::Inputs<float> in{};
    Status s = forward(s4d::cuda_fft{}, s4d::Options{.method = s4d::Method::scan}, in, s4d::Outputs<float>{}, Saved{},
                       Workspace{});
    checks.expect(!s.ok(), "method scan on cuda_fft", s.message());
    Case c = make({.length = 10, .upstream = false}, 1), results;
    s = run_case<Operator, float, float>(s4d::cuda_fft{.to_spectrum = 12345, .to_rows = 12345}, {}, c, results);
    checks.expect(s.code() == StatusCode::device_error, "without plans", "must be a device error");
}

/// More channels than a grid has room for: refused on sight of the sizes, before plans, memory or output are touched.
void too_many_channels(Checks& checks) {
    const Index H = 65535 * 32 + 1;
    float number = 0.0f;
    complex<float> pair{};
    s4d::Inputs<float> wide{.u = view(&std::as_const(number), {Index{1}, Index{1}, H})};
    wide.params = {.log_dt = view(&std::as_const(number), {H}), .log_neg_re = view(&std::as_const(number), {H, Index{1}}),
                   .im = view(&std::as_const(number), {H, Index{1}}), .B = view(&std::as_const(pair), {H, Index{1}}),
                   .C = view(&std::as_const(pair), {H, Index{1}})};
    const s4d::Grads<float> grads{.u = view(&number, {Index{1}, Index{1}, H})};
    const s4d::cuda_fft exec;
    for (const Status& refused :
         {forward(exec, s4d::Options{}, wide, s4d::Outputs<float>{.y = grads.u}, Saved{}, Workspace{}),
          backward(exec, s4d::Options{}, wide, s4d::Outputs<float>{}, Saved{}, s4d::Upstream<float>{.y = wide.u}, grads,
                   Workspace{})})
        checks.expect(refused.code() == StatusCode::invalid_argument, "2,097,121 channels", refused.message());
}

void run(Checks& checks, bool quick) {
    using s4d::Discretization;
    transform_lengths(checks);
    every_kernel_dtype(checks, {.length = 4100, .modes = 17});
    every_dtype(checks, make({.batch = 2, .length = 257, .channels = 3, .modes = 5}, 1));
    packed(checks, false);
    host_errors(checks);
    too_many_channels(checks);
    if (quick) return;
    for (const Discretization disc : {Discretization::zoh, Discretization::bilinear})
        for (const Index L : {0, 1, 2, 15, 16, 17, 255, 256, 257, 4095, 4096, 4097, 9001})
            every_kernel_dtype(checks, {.length = L, .disc = disc, .bidirectional = L % 2 == 0});
    for (const Index N : {0, 1, 5, 8, 9, 15, 16, 17, 24, 25, 64, 131})
        every_kernel_dtype(checks, {.length = 300, .modes = N});
    for (const Layout layout : {Layout::reversed, Layout::padded})
        every_kernel_dtype(checks, {.length = 5000, .channels = 3, .layout = layout});
    for (const Discretization disc : {Discretization::zoh, Discretization::bilinear})
        every_kernel_dtype(checks, {.length = 65536, .modes = 4, .disc = disc, .decay = 1e-4, .log_dt = -4.6});
    every_kernel_dtype(checks, {.length = 40, .channels = 0});
    for (const double decay : {1e3, 1e8, 1e30})
        for (const Discretization disc : {Discretization::zoh, Discretization::bilinear})
            expect_kernel<float, float>(checks, {.length = 300, .disc = disc, .decay = decay});
    expect_kernel<float, double>(checks, {.length = 300});

    packed(checks, true);
    bad_offsets(checks);
    gradients_alone(checks);
    for (const Index L : {0, 1, 2, 31, 32, 33, 4096, 4097, 5003})
        for (const bool bidirectional : {false, true})
            every_dtype(checks, make({.length = L, .channels = 2, .modes = 3, .bidirectional = bidirectional}, 50 + L));
    for (const Discretization disc : {Discretization::zoh, Discretization::bilinear}) {
        every_dtype(checks, make({.batch = 3, .length = 1100, .channels = 4, .modes = 6, .initial_state = false,
                                  .feedthrough = false}, 8), {.disc = disc, .method = s4d::Method::fft});
        expect_close<f32, double>(checks, make({.length = 500, .channels = 4, .modes = 6}, 8), {.disc = disc});
    }
    every_dtype(checks, make({.batch = 2, .length = 100, .channels = 70, .modes = 65, .bidirectional = true}, 13));
    for (const Layout layout : {Layout::reversed, Layout::padded})
        every_dtype(checks, make({.batch = 2, .length = 300, .channels = 5, .modes = 3}, 12), {}, {.layout = layout});
    for (const auto& [B, L, H, N] :
         {std::array<Index, 4>{0, 5, 3, 2}, std::array<Index, 4>{2, 5, 0, 2}, std::array<Index, 4>{2, 5, 3, 0}})
        expect_close<f32, float>(checks, make({.batch = B, .length = L, .channels = H, .modes = N}, 3));
    Case slow = make({.length = 65536, .channels = 3, .modes = 4, .decay = 1e-4}, 31);
    for (double& x : slow.tensors["log_dt"].values) x = -4.6;
    expect_close<f32, float>(checks, slow);
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) {
    return interstate::test::cuda_main(argc, argv, "s4d fft", interstate::test::run);
}
