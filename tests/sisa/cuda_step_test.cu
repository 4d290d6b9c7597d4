// Decoding of SISA on the cuda executor against the float64 reference: every kind of cache, channels, decays, appended prompts, graphs
// that are replayed at other lengths, what only the device can see. A plain program: exit 0 passed, 1 failed, 77 skipped (no device).
// --quick runs a few small cases, for compute-sanitizer.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>

#include <sisa/reference.hpp>
#include <sisa/sisa.cuh>

#include "../support/cuda_graph.cuh"
#include "../support/cuda_memory.cuh"
#include "decode.hpp"

namespace interstate::test {
namespace {

using sisa::Options;
using sisa::Score;

const Options plain{}, windowed{.window = 37}, sigmoid{.score = Score::sigmoid, .bias = -1.5};

template <class T>
Status run_on(const interstate::cuda& exec, SisaDecode<T>& c, OnDevice& device) {
    const auto state = c.state(device);
    const auto tokens = c.tokens(device);
    const Workspace ws = device.workspace(workspace_size(exec, c.options, shape_of(state, tokens), pass::step));
    return step(exec, c.options, c.params(device), state, tokens, c.out(device), ws);
}
/// Everything that a step or an append may have written.
template <class T>
void bring_back(OnDevice& device, SisaDecode<T>& c) {
    device.bring_back(c.o), device.bring_back(c.lse), device.bring_back(c.cache_k), device.bring_back(c.cache_v);
    if (c.sizes.state_dim > 0) device.bring_back(c.cache_B), device.bring_back(c.cache_g), device.bring_back(c.g_last), device.bring_back(c.Phi);
}
template <class T>
Status run_step(Checks& checks, SisaDecode<T>& c) {
    OnDevice device(checks);
    const Status s = run_on(interstate::cuda{}, c, device);
    bring_back(device, c);
    return s;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
/// Elements are NaN where they should be, and else differ by `bound` of 1 or of themselves at most.
template <class X, class Y>
bool near(const std::vector<X>& got, const std::vector<Y>& want, double bound) {
    for (std::size_t i = 0; i < want.size(); ++i) {
        const double g = static_cast<double>(got[i]), w = static_cast<double>(want[i]);
        if (std::isnan(g) != std::isnan(w) || std::abs(g - w) > bound * std::max(1.0, std::abs(w))) return false;
    }
    return true;
}
/// The cache and the running sums against those of the reference; B to the rounding of T.
template <class T>
void expect_state(Checks& checks, const SisaDecode<T>& got, const SisaDecode<double>& truth) {
    const double of_T = sizeof(T) == 8 ? 1e-13 : sizeof(T) == 4 ? 1e-6 : std::is_same_v<T, f16> ? 2e-3 : 1e-2;
    checks.expect(near(got.cache_k, truth.cache_k, 0.0) && near(got.cache_v, truth.cache_v, 0.0), got.describe().c_str(), "keys and values in the cache");
    checks.expect(near(got.cache_B, truth.cache_B, of_T), got.describe().c_str(), "rotated B in the cache");
    checks.expect(near(got.cache_g, truth.cache_g, 0.0) && near(got.g_last, truth.g_last, 0.0), got.describe().c_str(), "g, to the bit");
    checks.expect(near(got.Phi, truth.Phi, 0.0), got.describe().c_str(), "Phi, to the bit");
}
template <class T>
void expect_close(Checks& checks, const SisaDecodeSizes& s, const Options& options, std::uint64_t seed) {
    SisaDecode<T> c(s, options, seed);
    SisaDecode<double> truth(c);
    const Status told = run_step(reference{}, truth), ran = run_step(checks, c);
    checks.expect(told.ok(), c.describe().c_str(), told.message());
    checks.expect(ran.ok(), c.describe().c_str(), ran.message());
    if (!told.ok() || !ran.ok()) return;
    const double o = relative_error(c.o, truth.o), lse = c.softmax() ? relative_error(c.lse, truth.lse) : 0.0;
    const auto bounds = bounds_of_step<T>(truth);
    char text[128];
    std::snprintf(text, sizeof text, "o: %.2e, may be %.2e; lse: %.2e, may be %.2e", o, bounds.o, lse, bounds.lse);
    checks.expect(o <= bounds.o && lse <= bounds.lse, c.describe().c_str(), text);
    expect_state(checks, c, truth);
}
void every_dtype(Checks& checks, const SisaDecodeSizes& s, const Options& options = {}, std::uint64_t seed = 1) {
    expect_close<f64>(checks, s, options, seed);
    expect_close<f32>(checks, s, options, seed);
    expect_close<f16>(checks, s, options, seed);
    expect_close<bf16>(checks, s, options, seed);
}

SisaDecodeSizes sized(Index capacity, Index tokens, Index query_heads, Index kv_heads, Index dim, Index ds, std::vector<std::int32_t> lengths, Index page_size = 0) {
    SisaDecodeSizes s;
    s.capacity = capacity, s.tokens = tokens, s.query_heads = query_heads, s.kv_heads = kv_heads, s.head_dim = s.value_dim = dim;
    s.state_dim = ds, s.lengths = std::move(lengths), s.page_size = page_size;
    return s;
}

void caches(Checks& checks) {
    for (const Index n : {1, 2, 5})
        for (SisaDecodeSizes s : every_sisa_cache(n))
            for (const Options& options : {plain, windowed, sigmoid}) {
                s.bias = n == 2;
                s.head_dim = s.value_dim = n == 5 ? 64 : 32;
                every_dtype(checks, s, options, static_cast<std::uint64_t>(n));
            }
}
void sizes(Checks& checks) {
    for (const Index ds : {2, 16, 20, 32, 50, 64, 100, 128, 130})
        for (const Index dim : {20, 64, 128, 200})
            for (const Index n : {1, 4}) every_dtype(checks, sized(260, n, 6, 2, dim, ds, {200, 17}, n == 1 ? 0 : 20), {}, 5);
    for (const Index group : {1, 8, 17, 33})
        for (const Index n : {1, 5})
            for (const Index ds : {16, 64}) {
                expect_close<bf16>(checks, sized(200, n, 2 * group, 2, 64, ds, {150, 60}), plain, 6);
                expect_close<f32>(checks, sized(200, n, 2 * group, 2, 128, ds, {150, 60}), windowed, 6);
            }
    for (const std::int32_t length : {0, 1, 15, 16, 17, 63, 64, 129, 700, 2047, 3998}) every_dtype(checks, sized(4000, 2, 2, 1, 64, 16, {length}), plain, 7);
}
void decays(Checks& checks) {
    for (const double half_life : {0.02, 0.3, 5.0, 1000.0})
        for (const bool resets : {false, true}) {
            SisaDecodeSizes s = sized(608, 3, 4, 2, 64, 16, {597, 300, 2}, 16);
            s.half_life = half_life;
            s.resets = resets;
            every_dtype(checks, s, {}, 8);
            every_dtype(checks, s, {.window = 50, .score = Score::sigmoid, .bias = -1.0}, 8);
        }
}

/// A prompt that is appended at once, or in parts, is the bits of tokens that come one by one, and what the reference has.
template <class T>
void prompts(Checks& checks, Index ds, Index page_size) {
    SisaDecodeSizes s = sized(320, 1, 2, 2, 64, ds, {0, 0}, page_size);
    s.tokens = 300;  // so that all pages have a place
    s.half_life = 5.0;
    s.resets = true;
    SisaDecode<T> c(s, {}, 9);
    SisaDecode<double> truth(c);
    checks.expect(append(reference{}, {}, truth.state(on_host), keys_of(truth.tokens(on_host))).ok(), "append", "reference");
    std::vector<SisaDecode<T>> results;
    for (const Index each : {300, 64, 7, 1}) {
        results.emplace_back(c);
        SisaDecode<T>& x = results.back();
        OnDevice device(checks);
        auto state = x.state(device);
        const auto keys = keys_of(x.tokens(device));
        state.lengths = {};
        for (Index first = 0; first < 300; first += each) {
            auto part = keys;
            const auto cut = [&](auto& of) {
                if (of) of.data += first * of.stride[1], of.extent[1] = std::min(each, 300 - first);
            };
            cut(part.k), cut(part.v), cut(part.B), cut(part.log_alpha), cut(part.theta);
            state.length = first;
            const Status ran = append(interstate::cuda{}, {}, state, part);
            checks.expect(ran.ok(), "append", ran.message());
        }
        bring_back(device, x);
        expect_state(checks, x, truth);
        const SisaDecode<T>& whole = results.front();
        checks.expect(same_bits(x.cache_B, whole.cache_B) && same_bits(x.cache_g, whole.cache_g) && same_bits(x.Phi, whole.Phi) && same_bits(x.g_last, whole.g_last),
                      x.describe().c_str(), "appended in parts, must be the bits of all at once");
    }
}

/// A graph is captured once and replayed token by token, with lengths that the device has.
template <class T>
void graphs(Checks& checks, Index page_size, const Options& options) {
    SisaDecodeSizes s = sized(480, 2, 4, 2, 64, 16, {478, 478, 478}, page_size);
    SisaDecode<T> c(s, options, 10);
    const SisaDecode<T> whole(c);
    OnDevice device(checks);
    const auto state = c.state(device);
    const auto tokens = c.tokens(device);
    const auto params = c.params(device);
    const auto out = c.out(device);
    const Workspace ws = device.workspace(workspace_size(interstate::cuda{}, options, shape_of(state, tokens), pass::step));
    Graph graph(checks, "step in a graph", [&](const interstate::cuda& exec) { return step(exec, options, params, state, tokens, out, ws); });
    for (const std::vector<std::int32_t>& lengths : std::vector<std::vector<std::int32_t>>{{478, 0, 17}, {1, 2, 3}, {300, 301, 64}}) {
        SisaDecode<T> expected(whole);
        expected.sizes.lengths = c.sizes.lengths = lengths;
        checks.expect(run_step(checks, expected).ok(), "step in a graph", "plain call");
        for (int again = 0; again < 2; ++again) {
            c.cache_k = whole.cache_k, c.cache_v = whole.cache_v, c.cache_B = whole.cache_B, c.cache_g = whole.cache_g, c.g_last = whole.g_last, c.Phi = whole.Phi;
            device.refill(c.cache_k), device.refill(c.cache_v), device.refill(c.cache_B), device.refill(c.cache_g), device.refill(c.g_last), device.refill(c.Phi);
            device.refill(c.sizes.lengths);
            graph.replay();
            bring_back(device, c);
            checks.expect(same_bits(c.o, expected.o) && same_bits(c.lse, expected.lse) && same_bits(c.cache_B, expected.cache_B) && same_bits(c.Phi, expected.Phi) &&
                              same_bits(c.g_last, expected.g_last) && same_bits(c.cache_g, expected.cache_g),
                          c.describe().c_str(), "replayed, must be the bits of plain calls");
        }
    }
}

/// What only the device can see is reported, and leaves those sequences alone.
template <class T>
void reports(Checks& checks) {
    for (const bool lengths : {true, false}) {
        SisaDecode<T> c(sized(64, 2, 4, 2, 32, 16, {3, 40, 35, 62}, 16), {}, 11);
        SisaDecode<T> want(c);
        checks.expect(run_step(reference{}, want).ok(), "reports", "reference");
        const SisaDecode<T> before(c);
        if (lengths) {
            c.sizes.lengths[1] = 63;
            c.sizes.lengths[2] = -1;
        } else {
            c.table[4] = 99;        // of sequence 1, read
            c.table[2 * 4 + 2] = -3;  // of sequence 2, written
        }
        const std::uint32_t seen = flags_after(checks, "reports", [&](std::uint32_t* flags) {
            OnDevice device(checks);
            const Status ran = run_on(interstate::cuda{.flags = flags}, c, device);
            bring_back(device, c);
            return ran;
        });
        const char* const what = lengths ? "bad lengths" : "bad pages";
        checks.expect(seen == (lengths ? flag_bad_lengths : flag_bad_block_table), what, ("flags are " + std::to_string(seen)).c_str());
        // Rows of the cache are what they were or what the reference writes there; of bad sequences, what they were.
        const auto rows = [&](const auto& got, const auto& old, const auto& written, Index width) {
            bool good = true;
            for (Index b = 0; b < 4; ++b)
                for (Index i = 0; i < 2; ++i) {
                    const Index row = before.sizes.lengths[static_cast<std::size_t>(b)] + i, page = before.table[static_cast<std::size_t>(b * 4 + row / 16)];
                    const bool bad = lengths ? b == 1 || b == 2 : b == 2;
                    const auto at = static_cast<std::size_t>((page * 16 + row % 16) * width);
                    good = good && std::memcmp(&got[at], bad ? &old[at] : &written[at], static_cast<std::size_t>(width) * sizeof got[0]) == 0;
                }
            std::size_t changed = 0;
            for (std::size_t i = 0; i < got.size(); i += static_cast<std::size_t>(width)) changed += std::memcmp(&got[i], &old[i], static_cast<std::size_t>(width) * sizeof got[0]) != 0;
            return good && changed == (lengths ? 4u : 6u);
        };
        checks.expect(rows(c.cache_k, before.cache_k, want.cache_k, 64), what, "k: no other row of the cache may be written");
        checks.expect(rows(c.cache_v, before.cache_v, want.cache_v, 64), what, "v: no other row of the cache may be written");
        checks.expect(rows(c.cache_g, before.cache_g, want.cache_g, 2), what, "g: no other row of the cache may be written");
        for (std::size_t i = 0; i < c.g_last.size() && lengths; ++i) {
            const bool bad = i / 2 == 1 || i / 2 == 2;
            checks.expect(c.g_last[i] == (bad ? before.g_last[i] : want.g_last[i]), what, "g_last");
        }
        const std::size_t each = c.o.size() / 4;
        std::vector<T> good;
        std::vector<double> right;
        for (std::size_t i = 0; i < c.o.size(); ++i) {
            const double got = static_cast<double>(c.o[i]);
            if (i / each == 0 || i / each == 3)
                good.push_back(c.o[i]), right.push_back(static_cast<double>(want.o[i]));
            else
                checks.expect(lengths ? got == 0.0 : std::isfinite(got), what, "a sequence without room must be zero, one with a bad page finite");
        }
        checks.expect(relative_error(good, right) < 2e-2, what, "other sequences must be right");
    }
}

void run(Checks& checks, bool quick) {
    if (quick) {
        for (const Index page : {0, 16}) every_dtype(checks, sized(160, 2, 4, 2, 64, 16, {0, 100, 17}, page));
        every_dtype(checks, sized(64, 1, 34, 2, 100, 40, {50}), sigmoid);
        expect_close<f32>(checks, sized(64, 1, 2, 1, 160, 130, {50}), {}, 2);
        reports<bf16>(checks);
        graphs<bf16>(checks, 16, plain);
        return;
    }
    caches(checks);
    sizes(checks);
    decays(checks);
    for (const Index page : {0, 16}) {
        prompts<bf16>(checks, 64, page);
        prompts<f32>(checks, 6, page);
        prompts<f64>(checks, 16, page);
        prompts<f16>(checks, 0, page);
        for (const Options& options : {plain, Options{.window = 200}, sigmoid}) {
            graphs<bf16>(checks, page, options);
            graphs<f32>(checks, page, options);
            graphs<f64>(checks, page, options);
        }
    }
    reports<bf16>(checks);
    reports<f32>(checks);
    reports<f64>(checks);
    SisaDecode<float> c(sized(32, 2, 2, 1, 16, 4, {3}), {.mode = sisa::Mode::published}, 12);
    OnDevice device(checks);
    const Status s = run_on(interstate::cuda{}, c, device);
    checks.expect(s.code() == StatusCode::unsupported, "published", s.message());
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "sisa step", &interstate::test::run); }
