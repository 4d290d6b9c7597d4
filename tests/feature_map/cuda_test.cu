// The cuda executor of the feature map against the float64 reference. A plain program, because it also runs on GPU
// machines that have no GoogleTest: exit 0 passed, 1 failed, 77 skipped (no device). --quick runs a few small cases, for
// compute-sanitizer.
#include <array>
#include <cstdio>
#include <limits>

#include <feature_map/feature_map.cuh>
#include <feature_map/reference.hpp>
#include <interstate/verify.cuh>

#include "../support/cuda_packed.cuh"
#include "feature_map_cases.hpp"

namespace interstate::test {
namespace {

using feature_map::Operator;
using feature_map::Options;
using feature_map::Rope;

template <class T, class P>
void expect_close(Checks& checks, const Case& c, const Options& options, RunOptions run = {}) {
    const Case in = rounded<Operator, T, P>(c);
    Case got, want;
    const Status status = run_case<Operator, T, P>(interstate::cuda{}, options, in, got, run);
    const Status truth = run_case<Operator, double, double>(reference{}, options, in, want);
    const auto& x = in.tensors.at("x").extent;
    const auto weight = in.tensors.find("conv_weight");
    char what[160];
    std::snprintf(what, sizeof what, "%s %s taps=%d B=%d L=%d H=%d R=%d layout=%d", to_string(dtype_of<T>), describe(options).c_str(),
                  weight == in.tensors.end() ? 0 : static_cast<int>(weight->second.extent[2]), static_cast<int>(x[0]),
                  static_cast<int>(x[1]), static_cast<int>(x[2]), static_cast<int>(x[3]), static_cast<int>(run.layout));
    checks.expect(status.ok(), what, status.message());
    checks.expect(truth.ok(), what, truth.message());
    const std::string beyond = beyond_tolerance<T, P>(got, want);
    checks.expect(beyond.empty(), what, beyond.c_str());
}

void every_dtype(Checks& checks, const Case& c, const Options& options, RunOptions run = {}) {
    expect_close<f64, double>(checks, c, options, run);
    expect_close<f32, float>(checks, c, options, run);
    expect_close<f16, float>(checks, c, options, run);
    expect_close<bf16, float>(checks, c, options, run);
}

Options with_rope(Options options, Rope rope) {
    options.rope = rope;
    return options;
}

void stages_and_taps(Checks& checks) {
    for (const Options& options : all_options())
        for (const Index taps : {0, 1, 2, 3, 4, 5, 8})
            every_dtype(checks, make({.batch = 2, .length = 45, .heads = 3, .features = 32, .taps = taps}, options, 3), options);
}

void sizes(Checks& checks) {
    for (const Index R : {1, 2, 4, 6, 8, 16, 30, 32, 40, 64, 66, 96, 128, 130, 136, 192, 250, 256, 258, 600})
        for (const Rope rope : {Rope::none, Rope::interleaved, Rope::half_split}) {
            Options options = with_rope(Options::key(), rope);
            if (rope != Rope::none && R % 2 != 0) continue;
            if (R == 1) options.l2 = options.rms = false;  // the norm of one number is its sign, whose slope is lost in float
            const Case c = make({.length = 21, .heads = 3, .features = R}, options, 5 + R);
            every_dtype(checks, c, options);
            every_dtype(checks, make({.length = 21, .heads = 3, .features = R, .taps = 0}, options, 6 + R), options);
        }
    // Heads beside the powers of two that blocks hold; lengths around taps, chunks, stretches.
    for (const Index H : {1, 2, 5, 16, 33, 70}) expect_close<f32, float>(checks, make({.length = 40, .heads = H, .features = 64}, Options::key(), H), Options::key());
    for (const Index L : {0, 1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 34, 35, 36, 63, 65, 127, 128, 131, 509})
        for (const Index taps : {1, 4, 8}) {
            expect_close<f32, float>(checks, make({.batch = 3, .length = L, .heads = 2, .features = 16, .taps = taps}, Options::key(), L), Options::key());
            expect_close<bf16, float>(checks, make({.batch = 3, .length = L, .heads = 2, .features = 16, .taps = taps}, Options::key(), L), Options::key());
        }
    // Stretches of their full length, in both directions.
    expect_close<bf16, float>(checks, make({.batch = 2, .length = 20000, .heads = 16, .features = 8}, Options::key(), 1), Options::key());
    for (const auto& [B, L, H, R] : {std::array<Index, 4>{0, 5, 3, 2}, std::array<Index, 4>{2, 0, 3, 2}, std::array<Index, 4>{2, 5, 0, 2}, std::array<Index, 4>{2, 5, 3, 0}})
        expect_close<f32, float>(checks, make({.batch = B, .length = L, .heads = H, .features = R}, Options::key(), 3), Options::key());
}

void layouts_and_parameters(Checks& checks) {
    for (const Rope rope : {Rope::none, Rope::interleaved, Rope::half_split})
        for (const Index R : {20, 64, 300}) {
            const Options options = with_rope(Options::key(), rope);
            const Case c = make({.batch = 2, .length = 35, .heads = 3, .features = R}, options, 12);
            for (const Layout layout : {Layout::reversed, Layout::padded}) every_dtype(checks, c, options, {.layout = layout});
        }
    for (const bool optional : {false, true}) {
        Case c = make({.batch = 3, .length = 40, .heads = 2, .features = 16, .state = optional, .offset = optional,
                       .conv_bias = optional}, Options::key(), 8);
        if (!optional)
            for (const char* name : {"scale", "bias", "dout.convT"}) c.tensors.erase(name);
        every_dtype(checks, c, Options::key());
        expect_close<f32, double>(checks, c, Options::key());
        expect_close<bf16, double>(checks, c, Options::key());
        expect_close<f64, float>(checks, c, Options::key());
    }
    for (const Options& options : {Options::query(), Options::key(), Options::value()})
        for (const double scale : {0.0, 1e-5, 1e-3, 1e3}) {
            const Case c = make({.length = 20, .features = 32, .taps = 4, .conv_bias = false, .scale = scale}, options, 6);
            expect_close<f64, double>(checks, c, options);
            expect_close<f32, float>(checks, c, options);
        }
}

void large_positions(Checks& checks) {
    for (const Rope rope : {Rope::interleaved, Rope::half_split})
        for (const double offset : {65536.0 - 7, 1e6 - 3})
            for (const Index R : {64, 300}) {
                const Options options = with_rope(Options::key(), rope);
                Case c = make({.length = 40, .features = R}, options, 4);
                c.tensors["offset"].values[0] = offset;
                expect_close<f32, float>(checks, c, options);
                expect_close<bf16, float>(checks, c, options);
                Case got, want;
                const Status s = run_case<Operator, double, double>(interstate::cuda{}, options, c, got);
                const Status r = run_case<Operator, double, double>(reference{}, options, c, want);
                checks.expect(s.ok() && r.ok(), "positions", s.message());
                for (const TensorError& e : compare(got, want))
                    checks.expect(e.relative <= 1e-15 * offset, "positions", e.name.c_str());
            }
}

void packed(Checks& checks) {
    const std::vector<double> cu{3, 3, 5, 6, 40, 40, 130};
    for (const Index taps : {0, 1, 4, 8})
        for (const Options& options : {Options::query(), Options::key(), Options::value()})
            for (const Index R : {6, 32}) {
                const Case c = make({.length = 140, .heads = 2, .features = R, .taps = taps, .cu_seqlens = cu}, options, 4);
                every_dtype(checks, c, options);
                Case clean, dirty_case = c, dirty;
                for (const char* name : {"x", "dout.y"})
                    for (Index t = 0; t < 140; ++t)
                        if (t < 3 || (t >= 6 && t < 40) || t >= 130)
                            for (Index i = 0; i < 2 * R; ++i) dirty_case.tensors[name].values[t * 2 * R + i] = std::nan("");
                const Status first = run_case<Operator, float, float>(interstate::cuda{}, options, c, clean);
                const Status second = run_case<Operator, float, float>(interstate::cuda{}, options, dirty_case, dirty);
                checks.expect(first.ok() && second.ok(), "packed", first.ok() ? second.message() : first.message());
                if (!first.ok() || !second.ok()) continue;
                bool isolated = true;
                for (const char* name : {"out.y", "grad.x"})
                    for (Index i = 0; i < 140 * 2 * R; ++i) {
                        const Index t = i / (2 * R);
                        const double got = dirty.tensors[name].values[i];
                        isolated = isolated && (t >= 6 && t < 40 ? std::isnan(got)
                                                                 : got == (t >= 3 && t < 130 ? clean.tensors[name].values[i] : 0.0));
                    }
                const Index state = (taps - 1) * 2 * R;
                for (const char* name : {"out.convT", "grad.conv0"})
                    for (Index i = 0; taps > 1 && i < 6 * state; ++i)
                        isolated = isolated && (i / state == 3 || dirty.tensors[name].values[i] == clean.tensors[name].values[i]);
                checks.expect(isolated, "packed", "NaN of one sequence, and of none, must stay in it");
            }
    const double least = std::numeric_limits<std::int32_t>::min();
    const std::vector<double> bad_offsets[] = {{0, 50, 20, 60}, {-5, 10, 20, 1000}, {-51200, 1100}, {least, 1100, least}, {1, 1101}};
    for (const auto& bad : bad_offsets)
        for (const Index taps : {4, 8}) {
            const Case wrong = make({.length = 1100, .heads = 2, .features = 8, .taps = taps, .cu_seqlens = bad}, Options::key(), 4);
            expect_bad_offsets_reported<Operator>(checks, Options::key(), wrong);
        }
    for (const double only : {0.0, 5.0, 9.0, -1.0}) {
        const Case none = make({.length = 7, .heads = 2, .features = 8, .cu_seqlens = {only}}, Options::key(), 4);
        expect_zeros_without_sequences<Operator>(checks, Options::key(), none, only < 0 || only > 7);
    }
}

/// Two runs, pieces that carry the state, and steps all give the same bits.
template <class T>
void same_bits(Checks& checks, const Options& options, Index taps, Index R) {
    const Index B = 2, L = 150, H = 3, past = taps - 1;
    const Case c = rounded<Operator, T, float>(make({.batch = B, .length = L, .heads = H, .features = R, .taps = taps}, options, 5));
    Case whole, again;
    const Status first = run_case<Operator, T, float>(interstate::cuda{}, options, c, whole);
    const Status second = run_case<Operator, T, float>(interstate::cuda{}, options, c, again);
    checks.expect(first.ok() && second.ok(), "bits", first.message());
    if (!first.ok() || !second.ok()) return;
    for (const auto& [name, tensor] : whole.tensors)
        checks.expect(tensor.values == again.tensors[name].values, name.c_str(), "two runs must give the same bits");

    std::vector<void*> memory;
    const auto upload = [&]<class E>(E, const char* name) {
        std::vector<E> values;
        if (c.tensors.contains(name))
            for (const double x : c.tensors.at(name).values) values.push_back(E(x));
        values.resize(values.size() + 1);
        E* p = nullptr;
        checks.expect(cudaMalloc(&p, values.size() * sizeof(E)) == cudaSuccess &&
                          cudaMemcpy(p, values.data(), values.size() * sizeof(E), cudaMemcpyHostToDevice) == cudaSuccess,
                      name, "upload");
        memory.push_back(p);
        return p;
    };
    const auto fixed = [](auto* p) -> const std::remove_pointer_t<decltype(p)>* { return p; };
    feature_map::Params<float> params{.conv_weight = view(fixed(upload(0.0f, "conv_weight")), {H, R, taps}),
                                      .conv_bias = view(fixed(upload(0.0f, "conv_bias")), {H, R})};
    if (options.rms) {
        params.scale = view(fixed(upload(0.0f, "scale")), {R});
        params.bias = view(fixed(upload(0.0f, "bias")), {H, R});
    }
    const T* const x = fixed(upload(T(0.0f), "x"));
    T* const y = upload(T(0.0f), "dout.y");  // of the right size
    for (const bool steps : {true, false}) {
        T* state[2] = {upload(T(0.0f), "conv0"), upload(T(0.0f), "conv0")};
        std::vector<std::int32_t> start(B, 0);
        for (Index b = 0; b < B && options.rope != Rope::none; ++b) start[b] = static_cast<std::int32_t>(c.tensors.at("offset").values[b]);
        std::int32_t* const position = upload(std::int32_t{}, "offset");
        Index piece = 0;
        for (Index t = 0; t < L; ++piece) {
            const Index lengths[] = {1, 70, 2, 77}, n = steps ? 1 : lengths[piece];
            std::vector<std::int32_t> at = start;
            for (std::int32_t& p : at) p += static_cast<std::int32_t>(t);
            if (options.rope != Rope::none) cudaMemcpy(position, at.data(), B * sizeof(std::int32_t), cudaMemcpyHostToDevice);
            Status s;
            if (steps) {
                s = step(interstate::cuda{}, options, params, feature_map::State<T>{view(state[0], {B, past, H, R})},
                         feature_map::Token<T>{.x = {x + t * H * R, {B, H, R}, {L * H * R, R, 1}}, .position = view(fixed(position), {B})},
                         feature_map::TokenOut<T>{{y + t * H * R, {B, H, R}, {L * H * R, R, 1}}}, Workspace{});
            } else {
                feature_map::Inputs<T, float> in{.x = {x + t * H * R, {B, n, H, R}, {L * H * R, H * R, R, 1}}, .params = params,
                                                 .conv0 = view(fixed(state[0]), {B, past, H, R})};
                if (options.rope != Rope::none) in.offset = view(fixed(position), {B});
                s = forward(interstate::cuda{}, options, in, feature_map::Outputs<T>{.y = {y + t * H * R, {B, n, H, R}, {L * H * R, H * R, R, 1}},
                            .convT = view(state[1], {B, past, H, R})}, Saved{}, Workspace{});
                std::swap(state[0], state[1]);
            }
            checks.expect(s.ok(), "pieces", s.message());
            if (!s.ok()) break;
            t += n;
        }
        const auto expect_bits = [&](const T* from, const char* name) {
            const auto& want = whole.tensors.at(name).values;
            std::vector<T> got(want.size());
            checks.expect(cudaMemcpy(got.data(), from, got.size() * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess, name, "copy");
            bool same = true;
            for (std::size_t i = 0; i < got.size(); ++i) same = same && static_cast<double>(got[i]) == want[i];
            char what[120];
            std::snprintf(what, sizeof what, "%s %s taps=%d R=%d %s", name, to_string(dtype_of<T>), static_cast<int>(taps),
                          static_cast<int>(R), describe(options).c_str());
            checks.expect(same, what, steps ? "steps must be one call" : "pieces must be one call");
        };
        expect_bits(y, "out.y");
        expect_bits(state[0], "out.convT");
    }
    for (void* p : memory) cudaFree(p);
}

void gradients_alone(Checks& checks) {
    // A null view is not written, whatever strides it has; asked for alone, a gradient has the bits it has among all.
    const Options options = Options::key();
    for (const Index taps : {4, 8}) {
        const Case c = make({.length = 70, .heads = 2, .features = 8, .taps = taps}, options, 5);
        Case all;
        Status s = run_case<Operator, float, float>(interstate::cuda{}, options, c, all);
        checks.expect(s.ok(), "alone", s.message());
        // Gradients of optional inputs that a case lacks are not asked for.
        Case fewer = c;
        fewer.tensors["conv_bias"].values.assign(16, 0.0);
        fewer.tensors.erase("conv0");
        Case with_zeros = fewer, a, b;
        fewer.tensors.erase("conv_bias");
        s = run_case<Operator, float, float>(interstate::cuda{}, options, with_zeros, a);
        checks.expect(s.ok(), "alone", s.message());
        s = run_case<Operator, float, float>(interstate::cuda{}, options, fewer, b);
        checks.expect(s.ok(), "alone", s.message());
        for (const auto& [name, tensor] : b.tensors)
            checks.expect(tensor.values == a.tensors[name].values, name.c_str(), "must not depend on what else is asked for");
    }
}

void host_errors(Checks& checks) {
    feature_map::Inputs<float> in{};
    in.x.extent[0] = in.x.extent[1] = in.x.extent[2] = in.x.extent[3] = 2;
    const Status s = forward(interstate::cuda{}, Options{}, in, feature_map::Outputs<float>{}, Saved{}, Workspace{});
    checks.expect(s.code() == StatusCode::invalid_argument, "null x", s.message());
    const feature_map::Shape small{.dtype = DType::bf16, .batch = 1, .length = 64, .heads = 4, .features = 64, .taps = 4};
    feature_map::Shape large = small, odd = small;
    large.features = 512;
    odd.features = 60 + 2;
    const auto name = [](const feature_map::Shape& shape) { return std::string(which_kernel(interstate::cuda{}, Options{}, shape).name); };
    checks.expect(name(small) == "feature_map.cuda.teams", "which_kernel", "teams");
    checks.expect(name(odd) == "feature_map.cuda.teams.narrow", "which_kernel", "narrow");
    checks.expect(name(large) == "feature_map.cuda.general", "which_kernel", "general");
}

void run(Checks& checks, bool quick) {
    host_errors(checks);
    packed(checks);
    gradients_alone(checks);
    same_bits<bf16>(checks, Options::key(), 4, 64);
    if (quick) return;
    stages_and_taps(checks);
    sizes(checks);
    layouts_and_parameters(checks);
    large_positions(checks);
    for (const Options& options : {Options::query(), with_rope(Options::key(), Rope::half_split), Options::value()})
        for (const Index taps : {1, 2, 4, 8})
            for (const Index R : {20, 64, 256}) {
                same_bits<f32>(checks, options, taps, R);
                same_bits<f16>(checks, options, taps, R);
            }
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "feature_map.cuda", &interstate::test::run); }
