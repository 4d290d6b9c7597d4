// libFuzzer target for what replay does to a file: bytes -> safetensors -> case -> operator. Any input must
// end in results or in a message, on reference and cpu alike.
//
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined -I include
//         tests/fuzz/replay_fuzz.cpp tools/replay/reference.cpp tools/replay/cpu.cpp
//
// The mutator edits a file's tensors and options rather than its bytes, since few byte edits leave a header
// that parses, and starts from small cases of its own where it is given none.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "../../tools/replay/case_file.hpp"
#include "../../tools/replay/replay.hpp"

namespace {

using namespace interstate;
using namespace interstate::tools;
using namespace interstate::tools::replay;

[[noreturn]] void fail(const char* what, const Status& status = {}) {
    std::fprintf(stderr, "replay_fuzz: %s: %s\n", what, status.message());
    std::abort();
}

// Running a case.

/// Cases that are legal but slow. Empty tensors of huge extents pass: rejecting those is under test.
bool slow(const Case& c) {
    for (const auto& [name, tensor] : c.tensors) {
        double hidden = 1.0;
        for (const Index e : tensor.extent) hidden *= e == 0 ? 1.0 : static_cast<double>(e);
        if (tensor.values.size() > 512 || (hidden > 0x1p12 && hidden <= 0x1p28)) return true;
    }
    return false;
}

/// Everything about a run that the file does not say, from the file's own bytes.
struct Choices {
    Request request;
    cpu exec;
};
Choices choose(std::span<const std::byte> bytes) {
    std::uint64_t hash = 0xcbf29ce484222325u;
    for (const std::byte b : bytes) hash = (hash ^ static_cast<std::uint64_t>(b)) * 0x100000001b3u;
    const auto pick = [&](std::uint64_t n) {
        hash ^= hash >> 29;
        hash *= 0xbf58476d1ce4e5b9u;
        return (hash >> 33) % n;
    };
    Choices choices;
    choices.request.dtype = static_cast<DType>(pick(4));
    choices.request.param_dtype = pick(2) ? DType::f64 : DType::f32;
    choices.request.run = {static_cast<Layout>(pick(3)), pick(4) != 0, std::size_t{32} << 20};
    choices.exec = {1, static_cast<Isa>(pick(3))};  // automatic, baseline or AVX2
    return choices;
}

void run(std::span<const std::byte> bytes) {
    Case c;
    try {
        c = case_from_file(parse_safetensors(bytes, "fuzz"), "fuzz");
    } catch (const SafetensorsError&) {
        return;
    }
    if (slow(c)) return;
    const Choices choices = choose(bytes);
    Case want, got;
    const Status on_reference = run_on_reference(choices.request, c, want);
    const Status on_cpu = run_on_cpu(choices.exec, choices.request, c, got);
    if (on_reference.ok() && !on_cpu.ok() && on_cpu.code() != StatusCode::unsupported)
        fail("cpu refused what reference takes", on_cpu);
    if (!on_reference.ok() && on_cpu.ok() && on_reference.code() != StatusCode::unsupported)
        fail("reference refused what cpu takes", on_reference);
    if (!on_reference.ok() || !on_cpu.ok()) return;
    for (const auto& [name, tensor] : want.tensors)
        if (!got.tensors.contains(name) || got.tensors.at(name).extent != tensor.extent)
            fail("a result is missing or of another shape");
    if (serialize_safetensors(file_from_case(got), "fuzz").empty()) fail("results gave an empty file");
}

// Making cases.

using Random = std::minstd_rand;
using Extents = std::vector<std::int64_t>;

std::size_t below(Random& random, std::size_t n) { return random() % n; }

template <class List>
const auto& any(Random& random, const List& list) {
    return list[below(random, std::size(list))];
}

const double values[] = {0.0,
                         -0.0,
                         1.0,
                         -1.0,
                         0.5,
                         2.0,
                         1.5,
                         -3.0,
                         7.0,
                         30.0,
                         -700.0,
                         1e-300,
                         5e-324,
                         1e30,
                         1e308,
                         2147483647.0,
                         2147483648.0,
                         -2147483649.0,
                         std::numeric_limits<double>::quiet_NaN(),
                         std::numeric_limits<double>::infinity(),
                         -std::numeric_limits<double>::infinity()};
const std::int64_t extents[] = {0,
                                0,
                                1,
                                1,
                                2,
                                2,
                                3,
                                4,
                                5,
                                8,
                                9,
                                16,
                                17,
                                33,
                                64,
                                257,
                                300,
                                std::int64_t{1} << 20,
                                std::int64_t{1} << 28,
                                (std::int64_t{1} << 28) + 1,
                                std::int64_t{1} << 40,
                                std::int64_t{1} << 59};
const char* const names[] = {
    "u",           "log_dt",     "log_neg_re", "im",      "B",      "C",        "D",
    "x0",          "eta0",       "q",          "k",       "v",      "o",        "g",
    "x",           "W",          "scale",      "bias",    "conv0",  "offset",   "cu_seqlens",
    "conv_weight", "conv_bias",  "dout.y",     "dout.xT", "dout.o", "dout.lse", "dout.z",
    "dout.etaT",   "dout.convT", "out.y",      "grad.u",  "z",      "log_alpha",
    "theta",       "lam",        "s0",         "z0",      "dout.sT", "dout.zT",  "Q",
    "K",           "P",          "a",          "delta",   ""};
const std::pair<const char*, const char*> options[] = {{"op", "s4d"},
                                                       {"op", "attention"},
                                                       {"op", "interdomain"},
                                                       {"op", "feature_map"},
                                                       {"op", "random_features"},
                                                       {"op", "gate"},
                                                       {"op", "sisa"},
                                                       {"op", "sd_attention"},
                                                       {"op", "linear_attention"},
                                                       {"op", "component_attention"},
                                                       {"feature_map", "elu1"},
                                                       {"feature_map", "identity"},
                                                       {"normalized", "true"},
                                                       {"normalized", "by_feature_map"},
                                                       {"op", "sd_decomposition"},
                                                       {"normalizer", "softmax"},
                                                       {"normalizer", "elu1"},
                                                       {"component", "routing"},
                                                       {"component", "filtering"},
                                                       {"mode", "exact"},
                                                       {"mode", "published"},
                                                       {"clamp", "0.5"},
                                                       {"clamp", "0"},
                                                       {"clamp", "1e308"},
                                                       {"disc", "zoh"},
                                                       {"disc", "bilinear"},
                                                       {"disc", "raw"},
                                                       {"method", "scan"},
                                                       {"method", "automatic"},
                                                       {"method", "chunked"},
                                                       {"method", "parallel_scan"},
                                                       {"method", "fft"},
                                                       {"readout", "real_parts"},
                                                       {"normalizer", "none"},
                                                       {"normalizer", "nadaraya_watson"},
                                                       {"rope", "none"},
                                                       {"rope", "interleaved"},
                                                       {"rope", "half_split"},
                                                       {"base", "1"},
                                                       {"base", "1e308"},
                                                       {"activation", "none"},
                                                       {"l2", "false"},
                                                       {"rms", "true"},
                                                       {"rms", "false"},
                                                       {"eps", "1"},
                                                       {"eps", "0"},
                                                       {"causal", "true"},
                                                       {"causal", "false"},
                                                       {"window", "none"},
                                                       {"window", "1"},
                                                       {"window", "3"},
                                                       {"window", "9e15"},
                                                       {"window", "-1"},
                                                       {"window", "8999999999999999"},
                                                       {"scale", "0.5"},
                                                       {"scale", "-1e308"},
                                                       {"scale", "nan"},
                                                       {"score", "softmax"},
                                                       {"score", "sigmoid"},
                                                       {"bias", "-2.5"},
                                                       {"bias", "1e308"},
                                                       {"bias", ""},
                                                       {"", "x"}};

/// Random values that keep results finite, most of the time.
SafetensorsTensor random_tensor(Random& random, Extents shape) {
    std::vector<double> data(static_cast<std::size_t>(element_count(shape)));
    for (double& x : data) x = static_cast<double>(below(random, 4001)) / 1000.0 - 2.0;
    return make_tensor(std::span<const double>(data), std::move(shape));
}

SafetensorsTensor random_offsets(Random& random, std::int64_t sequences, std::int64_t length) {
    std::vector<double> cu;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i <= sequences; ++i) {
        // The first is small, so that most of the rows belong to a sequence.
        const auto step = static_cast<std::int64_t>(below(random, static_cast<std::size_t>(length - at) + 1));
        at += i == 0 ? step / 4 : step;
        cu.push_back(static_cast<double>(at));
    }
    return make_tensor(std::span<const double>(cu), {sequences + 1});
}

using Shapes = std::vector<std::pair<const char*, Extents>>;

/// What the cases of every operator share: the choices, and the file without its tensors.
struct Sketch {
    Random& random;
    bool packed = size(3) == 0, gradients = size(4) != 0, optional = size(2) == 0, longer = size(8) == 0;
    std::int64_t sequences = size(4), batch = packed ? 1 : size(4), states = packed ? sequences : batch;
    bool positions = false;  // whether sequences say at which position they begin
    std::map<std::string, std::string> options = {};

    std::int64_t size(std::size_t n) { return static_cast<std::int64_t>(below(random, n)); }
};

Shapes s4d_shapes(Sketch& s) {
    s.options["disc"] = s.size(2) ? "zoh" : "bilinear";
    if (s.longer && !s.packed) s.batch = s.states = s.batch / 3;
    const std::int64_t H = s.longer ? 1 : s.size(20), N = s.size(6),
                       L = s.longer ? 250 + s.size(20) : s.size(9);
    Shapes shapes = {{"u", {s.batch, L, H}}, {"log_dt", {H}},  {"log_neg_re", {H, N}},
                     {"im", {H, N}},         {"B", {H, N, 2}}, {"C", {H, N, 2}}};
    if (s.optional) shapes.insert(shapes.end(), {{"D", {H}}, {"x0", {s.states, H, N, 2}}});
    if (s.gradients) shapes.push_back({"dout.y", {s.batch, L, H}});
    if (s.gradients && s.optional) shapes.push_back({"dout.xT", {s.states, H, N, 2}});
    return shapes;
}

Shapes attention_shapes(Sketch& s) {
    const std::int64_t group = 1 + s.size(3), Hkv = s.longer ? 1 : s.size(3), Hq = Hkv * group;
    const std::int64_t dh = s.longer ? 1 : s.size(10), dv = s.longer ? 1 : s.size(10);
    const std::int64_t Lk = s.longer ? 60 + s.size(80) : s.size(9), Lq = s.packed || s.size(2) ? Lk : Lk / 2;
    const bool sigmoid = s.size(4) == 0;
    if (sigmoid) s.options["score"] = "sigmoid";
    if (s.size(3) == 0) s.options["causal"] = "false";
    if (s.size(3) == 0) s.options["window"] = std::to_string(1 + s.size(6));
    Shapes shapes = {
        {"q", {s.batch, Lq, Hq, dh}}, {"k", {s.batch, Lk, Hkv, dh}}, {"v", {s.batch, Lk, Hkv, dv}}};
    if (sigmoid && s.optional) shapes.push_back({"bias", {Hq}});
    if (s.gradients) shapes.push_back({"dout.o", {s.batch, Lq, Hq, dv}});
    if (s.gradients && s.optional && !sigmoid) shapes.push_back({"dout.lse", {s.batch, Lq, Hq}});
    return shapes;
}

Shapes component_attention_shapes(Sketch& s) {
    const char* const components[] = {"both", "routing", "filtering"};
    s.options["component"] = any(s.random, components);
    Shapes shapes = attention_shapes(s);  // q and k come first
    const std::int64_t length = shapes[1].second[1];
    for (auto& [name, shape] : shapes)
        if (shape.size() > 1) shape[1] = length;
    return shapes;
}

Shapes linear_attention_shapes(Sketch& s) {
    const bool elu1 = s.size(2) == 0, forced = s.size(4) == 0;
    s.options["feature_map"] = elu1 ? "elu1" : "identity";
    if (forced) s.options["normalized"] = "true";
    if (s.longer && !s.packed) s.batch = s.states = s.batch / 3;
    // Around chunks of 64 tokens and segments of 512.
    const std::int64_t L = s.longer ? (s.size(2) ? 60 : 505) + s.size(20) : s.size(9);
    const std::int64_t Hkv = s.longer ? 1 : s.size(3), Hq = Hkv * (s.longer ? 1 : 1 + s.size(3));
    const std::int64_t dk = s.longer ? 1 : s.size(6), dv = s.longer ? 1 : s.size(6);
    Shapes shapes = {{"q", {s.batch, L, Hq, dk}}, {"k", {s.batch, L, Hkv, dk}}, {"v", {s.batch, L, Hkv, dv}}};
    if (s.optional) shapes.push_back({"s0", {s.states, Hkv, dk, dv}});
    if (s.gradients) shapes.push_back({"dout.o", {s.batch, L, Hq, dv}});
    if (s.gradients && s.optional) shapes.push_back({"dout.sT", {s.states, Hkv, dk, dv}});
    if (!elu1 && !forced) return shapes;
    if (s.optional) shapes.push_back({"z0", {s.states, Hkv, dk}});
    if (s.gradients && s.optional) shapes.push_back({"dout.zT", {s.states, Hkv, dk}});
    return shapes;
}

Shapes sisa_shapes(Sketch& s) {
    if (s.size(3) == 0) s.options["mode"] = "published";
    if (s.size(3) == 0) s.options["clamp"] = "0.5";
    Shapes shapes = attention_shapes(s);  // q and k come first
    s.options.erase("causal");
    const Extents q = shapes[0].second, k = shapes[1].second;
    const std::int64_t pairs = s.longer ? 1 : s.size(5);
    if (pairs == 0 && s.optional) return shapes;
    shapes.insert(shapes.end(), {{"C", {s.batch, q[1], q[2], 2 * pairs}},
                                 {"B", {s.batch, k[1], k[2], 2 * pairs}},
                                 {"log_alpha", {s.batch, k[1], k[2]}},
                                 {"theta", {s.batch, k[1], k[2], pairs}},
                                 {"lam", {q[2]}}});
    return shapes;
}

Shapes interdomain_shapes(Sketch& s) {
    const char* const methods[] = {"automatic", "chunked", "scan", "parallel_scan", "fft"};
    s.options["method"] = any(s.random, methods);
    if (s.size(4) == 0) s.options["disc"] = "raw";
    if (s.size(3) == 0) s.options["readout"] = "real_parts";
    const bool normalized = s.size(3) == 0;
    if (normalized) s.options["normalizer"] = "nadaraya_watson";
    if (s.longer && !s.packed) s.batch = s.states = s.batch / 3;
    // Around chunks of 64 tokens and stretches of 256.
    const std::int64_t L = s.longer ? (s.size(2) ? 60 : 250) + s.size(20) : s.size(9);
    const std::int64_t Hkv = s.longer ? 1 : s.size(3), Hq = Hkv * (s.longer ? 1 : 1 + s.size(3)),
                       M = s.size(6);
    const std::int64_t R = s.longer ? 1 : s.size(6), d = s.longer ? 1 : s.size(6);
    Shapes shapes = {{"q", {s.batch, L, Hq, R}}, {"k", {s.batch, L, Hkv, R}}, {"v", {s.batch, L, Hkv, d}},
                     {"log_dt", {Hkv}},          {"log_neg_re", {Hkv, M}},    {"im", {Hkv, M}},
                     {"B", {Hkv, M, 2}},         {"C", {Hkv, M, M, 2}}};
    if (s.optional) shapes.push_back({"x0", {s.states, Hkv, M, R + d, 2}});
    if (s.optional && normalized) shapes.push_back({"eta0", {s.states, Hkv, M, 2}});
    if (s.gradients) shapes.push_back({"dout.o", {s.batch, L, Hq, d}});
    if (s.gradients && s.optional) shapes.push_back({"dout.xT", {s.states, Hkv, M, R + d, 2}});
    if (s.gradients && s.optional && normalized) shapes.push_back({"dout.etaT", {s.states, Hkv, M, 2}});
    return shapes;
}

Shapes feature_map_shapes(Sketch& s) {
    const char* const ropes[] = {"none", "interleaved", "half_split"};
    const std::string rope = any(s.random, ropes);
    const bool rms = s.size(2) == 0;
    s.options["rope"] = rope;
    s.positions = rope != "none" && s.optional;
    s.options["rms"] = rms ? "true" : "false";
    if (s.size(3) == 0) s.options["l2"] = "false";
    if (s.size(3) == 0) s.options["activation"] = "none";
    const std::int64_t L = s.longer ? 60 + s.size(10) : s.size(9), H = s.longer ? 1 : s.size(4),
                       taps = s.size(9);
    const std::int64_t R = rope == "none" ? s.size(10) : 2 * s.size(s.longer ? 2 : 5);
    const Extents past = {s.states, std::max<std::int64_t>(taps - 1, 0), H, R};
    Shapes shapes = {{"x", {s.batch, L, H, R}}};
    if (taps > 0) shapes.push_back({"conv_weight", {H, R, taps}});
    if (taps > 0 && s.optional) shapes.insert(shapes.end(), {{"conv_bias", {H, R}}, {"conv0", past}});
    if (rms && s.optional) shapes.insert(shapes.end(), {{"scale", {R}}, {"bias", {H, R}}});
    if (s.gradients) shapes.push_back({"dout.y", {s.batch, L, H, R}});
    if (s.gradients && s.optional) shapes.push_back({"dout.convT", past});
    return shapes;
}

Shapes random_features_shapes(Sketch& s) {
    const std::int64_t L = s.longer ? 60 + s.size(10) : s.size(9), H = s.longer ? 1 : s.size(4),
                       F = s.size(6);
    const std::int64_t dh = s.longer ? 1 : s.size(10);
    Shapes shapes = {{"x", {s.batch, L, H, dh}}, {"W", {s.optional ? 1 : H, F, dh}}};
    if (s.gradients) shapes.push_back({"dout.y", {s.batch, L, H, 2 * F}});
    return shapes;
}

Shapes gate_shapes(Sketch& s) {
    const Extents shape = {s.batch, s.size(9), s.size(4), s.size(20)};
    Shapes shapes = {{"o", shape}, {"g", shape}};
    if (s.gradients) shapes.push_back({"dout.y", shape});
    return shapes;
}

Shapes sd_attention_shapes(Sketch& s) {
    const char *const normalizers[] = {"softmax", "identity", "elu1"}, *const components[] = {"both", "routing", "filtering"};
    s.options["normalizer"] = any(s.random, normalizers);
    s.options["component"] = any(s.random, components);
    const std::int64_t L = s.longer ? 60 + s.size(20) : s.size(9), H = s.longer ? 1 : s.size(3), r = s.longer ? 1 + s.size(2) : s.size(6);
    const std::int64_t dv = s.longer ? 1 : s.size(6);
    Shapes shapes = {{"u", {s.batch, L, H, r}}, {"v", {s.batch, L, H, dv}}, {"delta", {H, r}}};
    if (s.optional)
        shapes.insert(shapes.end(), {{"a", {H, 1, r}}, {"b", {H, 1, r}}});
    else
        shapes.push_back({"P", {H, r, r}});
    if (s.gradients) shapes.push_back({"dout.o", {s.batch, L, H, dv}});
    return shapes;
}

Shapes sd_decomposition_shapes(Sketch& s) {
    s.packed = false;
    const std::int64_t L = s.longer ? 120 + s.size(20) : s.size(20), d = s.longer ? 1 + s.size(2) : s.size(10);
    if (s.optional) return {{"Q", {L, d}}, {"K", {L, d}}};  // a head alone
    const std::int64_t batch = s.longer ? 1 : s.size(3), Hk = s.longer ? 1 : s.size(3), group = s.longer ? 1 : 1 + s.size(2);
    return {{"Q", {batch, L, Hk * group, d}}, {"K", {batch, L, Hk, d}}};
}

/// An operator, and its tensors; the second axis of the first is the length.
struct Maker {
    const char* op;
    Shapes (*shapes)(Sketch&);
};
const Maker makers[] = {{"s4d", s4d_shapes},
                        {"attention", attention_shapes},
                        {"interdomain", interdomain_shapes},
                        {"feature_map", feature_map_shapes},
                        {"random_features", random_features_shapes},
                        {"gate", gate_shapes},
                        {"sisa", sisa_shapes},
                        {"component_attention", component_attention_shapes},
                        {"linear_attention", linear_attention_shapes},
                        {"sd_attention", sd_attention_shapes},
                        {"sd_decomposition", sd_decomposition_shapes}};

SafetensorsFile random_case(Random& random) {
    Sketch sketch{random};
    const Maker& maker = any(random, makers);
    Shapes shapes = maker.shapes(sketch);
    SafetensorsFile file;
    file.metadata = sketch.options;
    file.metadata["op"] = maker.op;
    const std::int64_t length = shapes[0].second[1];
    for (auto& [name, shape] : shapes) file.tensors[name] = random_tensor(random, std::move(shape));
    if (sketch.packed) file.tensors["cu_seqlens"] = random_offsets(random, sketch.sequences, length);
    if (sketch.positions) file.tensors["offset"] = random_offsets(random, sketch.states - 1, 4000);
    return file;
}

/// Gives a tensor another shape; its data is repeated or cut. Not done where there would be too much of it.
void reshape(SafetensorsTensor& tensor, Extents shape) {
    double elements = 1.0, hidden = 1.0;
    for (const std::int64_t e : shape) {
        elements *= static_cast<double>(e);
        hidden *= e == 0 ? 1.0 : static_cast<double>(e);
    }
    if (elements > 1024.0 || hidden > 0x1p59) return;
    const std::vector<std::byte> old = tensor.data;
    tensor.data.assign(static_cast<std::size_t>(elements) * sizeof(double), std::byte{0});
    for (std::size_t i = 0; i < tensor.data.size() && !old.empty(); ++i) tensor.data[i] = old[i % old.size()];
    tensor.shape = std::move(shape);
}

/// One change that leaves a file that parses, if not a case that runs.
void edit(Random& random, SafetensorsFile& file) {
    if (file.tensors.empty()) {
        file = random_case(random);
        return;
    }
    const auto tensor =
        std::next(file.tensors.begin(), static_cast<std::ptrdiff_t>(below(random, file.tensors.size())));
    Extents shape = tensor->second.shape;
    switch (below(random, 9)) {
        case 0: {
            const auto& [name, value] = any(random, options);
            file.metadata[name] = value;
            return;
        }
        case 1: file.metadata.erase(any(random, options).first); return;
        case 2: file.tensors.erase(tensor); return;
        case 3: file.tensors[any(random, names)] = SafetensorsTensor(tensor->second); return;
        case 4: {  // one extent of one tensor
            if (shape.empty()) return;
            shape[below(random, shape.size())] = any(random, extents);
            return reshape(tensor->second, shape);
        }
        case 5: {  // a size that tensors share, in all of them
            if (shape.empty()) return;
            const std::int64_t from = any(random, shape), to = any(random, extents);
            for (auto& [name, other] : file.tensors) {
                Extents changed = other.shape;
                for (std::int64_t& e : changed) e = e == from ? to : e;
                reshape(other, changed);
            }
            return;
        }
        case 6: {  // the number of axes
            if (shape.empty() || below(random, 2))
                shape.insert(shape.begin() + static_cast<std::ptrdiff_t>(below(random, shape.size() + 1)),
                             any(random, extents));
            else
                shape.erase(shape.begin() + static_cast<std::ptrdiff_t>(below(random, shape.size())));
            return reshape(tensor->second, shape);
        }
        case 7: {  // offsets for the longest axis there is
            std::int64_t length = 0;
            for (const auto& [name, other] : file.tensors)
                if (other.shape.size() > 1 && other.shape[1] <= 1024)
                    length = std::max(length, other.shape[1]);
            const auto sequences = static_cast<std::int64_t>(below(random, 5));
            file.tensors["cu_seqlens"] = random_offsets(random, sequences, length);
            return;
        }
        default: {  // one value
            auto& data = tensor->second.data;
            if (data.size() < sizeof(double)) return;
            const double x = any(random, values);
            std::memcpy(data.data() + below(random, data.size() / sizeof x) * sizeof x, &x, sizeof x);
            return;
        }
    }
}

}  // namespace

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned int seed) {
    Random random(seed);
    if (below(random, 16) == 0) return LLVMFuzzerMutate(data, size, max_size);
    try {
        SafetensorsFile file;
        try {
            file = parse_safetensors(std::as_bytes(std::span(data, size)), "fuzz");
        } catch (const SafetensorsError&) {
            file = random_case(random);
        }
        // Most edits leave a case that is refused, so that every fourth is a new one, as it is made.
        if (below(random, 4) == 0)
            file = random_case(random);
        else
            for (std::size_t n = 1 + below(random, 3); n > 0; --n) edit(random, file);
        const std::vector<std::byte> bytes = serialize_safetensors(file, "fuzz");
        if (bytes.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
        std::memcpy(data, bytes.data(), bytes.size());
        return bytes.size();
    } catch (const SafetensorsError&) {  // names from a mutated file need not be text
        return LLVMFuzzerMutate(data, size, max_size);
    }
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    run(std::as_bytes(std::span(data, size)));
    return 0;
}
