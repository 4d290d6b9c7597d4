// Decoding on the cuda executor against the float64 reference: every kind of cache, sizes around tiles and splits, graphs that are
// replayed at other lengths, what only the device can see. A plain program: exit 0 passed, 1 failed, 77 skipped (no device). --quick
// runs a few small cases, for compute-sanitizer.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>

#include <attention/attention.cuh>
#include <attention/reference.hpp>

#include "../support/cuda_graph.cuh"
#include "../support/cuda_memory.cuh"
#include "decode.hpp"

namespace interstate::test {
namespace {

using attention::Options;
using attention::Score;

const Options causal{}, windowed{.window = 37}, band{.causal = false, .window = 50}, scaled{.causal = false, .scale = -0.2},
    sigmoid{.score = Score::sigmoid, .bias = -1.5};

template <class T>
Status run_on(const interstate::cuda& exec, Decode<T>& c, OnDevice& device) {
    const auto state = c.state(device);
    const auto tokens = c.tokens(device);
    const Workspace ws = device.workspace(workspace_size(exec, c.options, shape_of(state, tokens), pass::step));
    return step(exec, c.options, attention::Params{}, state, tokens, c.out(device), ws);
}
template <class T>
Status run_step(Checks& checks, Decode<T>& c) {
    OnDevice device(checks);
    const Status s = run_on(interstate::cuda{}, c, device);
    device.bring_back(c.o);
    device.bring_back(c.lse);
    device.bring_back(c.cache_k);
    device.bring_back(c.cache_v);
    return s;
}

/// The plain formula with weights rounded to T, all else exact: what the 16-bit rule compares with.
template <class T>
std::vector<double> rounded_weights(const Decode<double>& c) {
    const DecodeSizes& s = c.sizes;
    const auto size = [](Index n) { return static_cast<std::size_t>(n); };
    const double scale = attention::scale_of(c.options, s.head_dim);
    std::vector<double> o(c.o.size(), 0.0);
    for (Index b = 0; b < c.batch(); ++b)
        for (Index i = 0; i < s.tokens; ++i)
            for (Index h = 0; h < s.query_heads; ++h) {
                const Index kv = h / (s.query_heads / s.kv_heads), length = s.lengths[size(b)], row = (b * s.tokens + i) * s.query_heads + h;
                const RowRange read = attention::keys_read(c.options, length + i, length + s.tokens);
                std::vector<double> p(size(s.capacity));
                double largest = -INFINITY, sum = 0.0;
                for (Index j = read.begin; j < read.end; ++j) {
                    for (Index d = 0; d < s.head_dim; ++d)
                        p[size(j)] += scale * c.q[size(row * s.head_dim + d)] * c.all_k[size(((b * s.capacity + j) * s.kv_heads + kv) * s.head_dim + d)];
                    largest = std::max(largest, p[size(j)]);
                }
                for (Index j = read.begin; j < read.end; ++j) {
                    double& x = p[size(j)];
                    x = c.softmax() ? std::exp(x - largest) : 1.0 / (1.0 + std::exp(-x - (s.bias ? c.bias[size(h)] : c.options.bias)));
                    sum += x;
                }
                for (Index j = read.begin; j < read.end; ++j)
                    for (Index d = 0; d < s.value_dim; ++d)
                        o[size(row * s.value_dim + d)] += static_cast<double>(T(c.softmax() ? p[size(j)] / sum : p[size(j)])) *
                                                          c.all_v[size(((b * s.capacity + j) * s.kv_heads + kv) * s.value_dim + d)];
            }
    return o;
}

template <class T>
double bound_of_o(const Decode<double>& truth) {
    if (sizeof(T) > 2) return sizeof(T) == 8 ? 1e-12 : 1e-5;
    std::vector<double> rounded;
    for (const double x : truth.o) rounded.push_back(static_cast<double>(T(x)));
    return 2.0 * relative_error(rounded_weights<T>(truth), truth.o) + relative_error(rounded, truth.o) + 1e-5;
}
template <class T>
void expect_results(Checks& checks, const Decode<T>& got, const Decode<double>& truth) {
    const double o = relative_error(got.o, truth.o), lse = got.softmax() ? relative_error(got.lse, truth.lse) : 0.0;
    const double bound = bound_of_o<T>(truth), of_lse = sizeof(T) == 8 ? 1e-12 : 1e-5;
    char text[128];
    std::snprintf(text, sizeof text, "o: %.2e, may be %.2e; lse: %.2e, may be %.2e", o, bound, lse, of_lse);
    checks.expect(o <= bound && lse <= of_lse, got.describe().c_str(), text);
    bool written = true;
    const auto compare = [&](const std::vector<T>& a, const std::vector<double>& b) {
        for (std::size_t i = 0; i < a.size(); ++i) written = written && (static_cast<double>(a[i]) == b[i] || (std::isnan(static_cast<double>(a[i])) && std::isnan(b[i])));
    };
    compare(got.cache_k, truth.cache_k);
    compare(got.cache_v, truth.cache_v);
    checks.expect(written, got.describe().c_str(), "the cache must be what the reference makes of it");
}

template <class T>
void expect_close(Checks& checks, const DecodeSizes& s, const Options& options, std::uint64_t seed) {
    Decode<T> c(s, options, seed);
    Decode<double> truth(c);
    const Status told = run_step(reference{}, truth), ran = run_step(checks, c);
    checks.expect(told.ok(), c.describe().c_str(), told.message());
    checks.expect(ran.ok(), c.describe().c_str(), ran.message());
    if (told.ok() && ran.ok()) expect_results(checks, c, truth);
}
void every_dtype(Checks& checks, const DecodeSizes& s, const Options& options = {}, std::uint64_t seed = 1) {
    expect_close<f64>(checks, s, options, seed);
    expect_close<f32>(checks, s, options, seed);
    expect_close<f16>(checks, s, options, seed);
    expect_close<bf16>(checks, s, options, seed);
}

void caches(Checks& checks) {
    for (const Index n : {1, 2, 3, 5})
        for (const DecodeSizes& cache : every_cache(n))
            for (const Options& options : {causal, windowed, band, scaled, sigmoid}) {
                DecodeSizes s = cache;
                s.bias = n == 2;
                s.head_dim = s.value_dim = n == 5 ? 64 : 32;
                every_dtype(checks, s, options, static_cast<std::uint64_t>(n));
            }
}
/// Lengths around tiles of 16 and splits of any number of them, in a cache for more.
void lengths(Checks& checks) {
    for (const Index capacity : {40, 700, 5000})
        for (const Index heads : {1, 3}) {
            DecodeSizes s{.capacity = capacity, .query_heads = 2 * heads, .kv_heads = heads, .head_dim = 64, .value_dim = 64};
            for (const std::int32_t length : {0, 1, 14, 15, 16, 17, 31, 32, 39, 63, 64, 127, 128, 129, 255, 500, 699, 1023, 2047, 3333, 4999})
                if (length < capacity) {
                    s.lengths = {length};
                    every_dtype(checks, s, length % 2 == 0 ? causal : Options{.window = 100}, 3);
                }
        }
    DecodeSizes s{.capacity = 3000, .query_heads = 8, .kv_heads = 2, .head_dim = 64, .value_dim = 64, .lengths = {2999, 1, 700, 0, 1500}};
    every_dtype(checks, s);
    s.page_size = 8;
    s.shared = true;
    every_dtype(checks, s);
    s.magnitude = 12.0;  // scores in the hundreds
    expect_close<f64>(checks, s, {}, 4);
    expect_close<bf16>(checks, s, {}, 4);
    expect_close<f16>(checks, s, {}, 4);
}
void dims(Checks& checks) {
    for (const auto& [dh, dv] : std::vector<std::array<Index, 2>>{{1, 1}, {3, 5}, {8, 64}, {64, 8}, {40, 72}, {96, 96}, {80, 128}, {128, 128}, {160, 100}, {192, 128}, {256, 256}, {257, 16}, {16, 300}})
        for (const Index n : {1, 4}) {
            DecodeSizes s{.capacity = 300, .tokens = n, .query_heads = 6, .kv_heads = 2, .head_dim = dh, .value_dim = dv, .lengths = {250, 31}, .page_size = n == 1 ? 0 : 20};
            every_dtype(checks, s, {}, 5);
            every_dtype(checks, s, {.window = 90, .score = Score::sigmoid, .bias = -3.0}, 5);
        }
    // Rows of queries: one tile, several in a block, several blocks.
    for (const Index group : {1, 7, 8, 16, 17, 33})
        for (const Index n : {1, 2, 5})
            for (const Index dim : {64, 128, 256}) {
                DecodeSizes s{.capacity = 200, .tokens = n, .query_heads = 2 * group, .kv_heads = 2, .head_dim = dim, .value_dim = dim, .lengths = {150, 60}};
                expect_close<bf16>(checks, s, causal, 6);
                expect_close<f32>(checks, s, windowed, 6);
            }
    for (const auto& [B, n, Hq, Hkv, dh, dv] : std::vector<std::array<Index, 6>>{{0, 1, 2, 1, 8, 8}, {2, 0, 2, 1, 8, 8}, {2, 1, 0, 2, 8, 8}, {2, 1, 0, 0, 8, 8}, {2, 2, 2, 1, 0, 8}, {2, 2, 2, 1, 8, 0}}) {
        DecodeSizes s{.capacity = 9, .tokens = n, .query_heads = Hq, .kv_heads = Hkv, .head_dim = dh, .value_dim = dv, .lengths = std::vector<std::int32_t>(static_cast<std::size_t>(B), 3)};
        expect_close<f64>(checks, s, {}, 7);
        expect_close<bf16>(checks, s, {}, 7);
    }
}

/// (B, H, L, d) memory, one element off an alignment of 16 bytes, and one length on the host.
template <class T>
void strides(Checks& checks, Index off) {
    DecodeSizes s{.capacity = 130, .tokens = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 64, .value_dim = 64, .lengths = {101, 101}};
    Decode<T> c(s, {}, 8);
    Decode<double> truth(c);
    checks.expect(run_step(reference{}, truth).ok(), "strides", "reference");
    OnDevice device(checks);
    auto state = c.state(device);
    std::vector<T> moved[2];
    for (int i = 0; i < 2; ++i) {
        const std::vector<T>& from = i == 0 ? c.cache_k : c.cache_v;
        moved[i].assign(from.size() + static_cast<std::size_t>(off), T(0.0f));
        for (Index b = 0; b < 2; ++b)
            for (Index row = 0; row < 130; ++row)
                for (Index x = 0; x < 128; ++x)
                    moved[i][static_cast<std::size_t>(off + ((b * 2 + x / 64) * 130 + row) * 64 + x % 64)] = from[static_cast<std::size_t>((b * 130 + row) * 128 + x)];
        (i == 0 ? state.k : state.v) = view(device(moved[i]) + off, {2, 130, 2, 64}, {2 * 130 * 64, 64, 130 * 64, 1});
    }
    state.length = 101;
    state.lengths = {};
    const auto tokens = c.tokens(device);
    const Workspace ws = device.workspace(workspace_size(interstate::cuda{}, c.options, shape_of(state, tokens), pass::step));
    const Status ran = step(interstate::cuda{}, c.options, attention::Params{}, state, tokens, c.out(device), ws);
    checks.expect(ran.ok(), "strides", ran.message());
    device.bring_back(c.o);
    checks.expect(relative_error(c.o, truth.o) <= bound_of_o<T>(truth), c.describe().c_str(), off ? "unaligned (B, H, L, d) memory" : "(B, H, L, d) memory");
}
/// Token and TokenOut, without lse, are Tokens of one.
void one_token(Checks& checks) {
    DecodeSizes s{.capacity = 90, .query_heads = 4, .kv_heads = 2, .head_dim = 64, .value_dim = 64, .lengths = {80, 7}};
    Decode<bf16> several(s, {}, 9), single(s, {}, 9);
    checks.expect(run_step(checks, several).ok(), "one token", "Tokens");
    OnDevice device(checks);
    const auto state = single.state(device);
    const auto cut = [](const auto& x) { return view(x.data, {x.extent[0], x.extent[2], x.extent[3]}); };
    const auto tokens = single.tokens(device);
    const attention::Token<bf16> token{cut(tokens.q), cut(tokens.k), cut(tokens.v), {}};
    const Workspace ws = device.workspace(workspace_size(interstate::cuda{}, Options{}, shape_of(state, token), pass::step));
    const Status ran = step(interstate::cuda{}, Options{}, attention::Params{}, state, token, attention::TokenOut<bf16>{.o = cut(single.out(device).o)}, ws);
    checks.expect(ran.ok(), "one token", ran.message());
    device.bring_back(single.o);
    checks.expect(std::memcmp(single.o.data(), several.o.data(), single.o.size() * sizeof(bf16)) == 0, "one token", "must be the bits of Tokens with n = 1");
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}
/// A graph is captured once and replayed at other lengths, on the bits of plain calls, which are the same every time.
template <class T>
void graphs(Checks& checks, Index page_size, const Options& options) {
    DecodeSizes s{.capacity = 960, .tokens = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 64, .value_dim = 64, .lengths = {958, 958, 958}, .page_size = page_size};
    Decode<T> c(s, options, 10);
    const Decode<T> whole(c);
    OnDevice device(checks);
    const auto state = c.state(device);
    const auto tokens = c.tokens(device);
    const auto out = c.out(device);
    const Workspace ws = device.workspace(workspace_size(interstate::cuda{}, options, shape_of(state, tokens), pass::step));
    Graph graph(checks, "step in a graph", [&](const interstate::cuda& exec) { return step(exec, options, attention::Params{}, state, tokens, out, ws); });
    for (const std::vector<std::int32_t>& lengths : std::vector<std::vector<std::int32_t>>{{958, 0, 17}, {1, 2, 3}, {600, 601, 64}, {0, 0, 0}}) {
        Decode<T> replayed(whole), plain(whole);
        replayed.sizes.lengths = plain.sizes.lengths = c.sizes.lengths = lengths;
        Decode<double> truth(plain);
        checks.expect(run_step(reference{}, truth).ok() && run_step(checks, plain).ok(), "step in a graph", "plain calls");
        for (int again = 0; again < 2; ++again) {
            c.cache_k = whole.cache_k, c.cache_v = whole.cache_v;
            device.refill(c.cache_k), device.refill(c.cache_v), device.refill(c.sizes.lengths);
            graph.replay();
            device.bring_back(c.o), device.bring_back(c.lse), device.bring_back(c.cache_k);
            checks.expect(same_bits(c.o, plain.o) && same_bits(c.lse, plain.lse) && same_bits(c.cache_k, plain.cache_k), c.describe().c_str(), "replayed, must be the bits of plain calls");
        }
        const double o = relative_error(c.o, truth.o);
        checks.expect(o <= (sizeof(T) == 2 ? 1e-2 : sizeof(T) == 4 ? 1e-5 : 1e-12), c.describe().c_str(), ("replayed, error " + std::to_string(o)).c_str());
    }
}

/// What only the device can see is reported, leaves those sequences alone, and does not reach others.
template <class T>
void reports(Checks& checks) {
    for (const bool paged : {false, true})
        for (const bool lengths : {true, false}) {
            if (!paged && !lengths) continue;
            DecodeSizes s{.capacity = 64, .tokens = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 32, .value_dim = 32, .lengths = {3, 40, 35, 62}, .page_size = paged ? 16 : 0};
            Decode<T> c(s, {}, 11);
            Decode<double> truth(c);
            checks.expect(run_step(reference{}, truth).ok(), "reports", "reference");
            std::vector<T> want_k = c.cache_k, want_v = c.cache_v;
            Decode<T> written(c);
            checks.expect(run_step(reference{}, written).ok(), "reports", "reference in T");
            const Index pages = s.capacity / 16;
            const auto take = [&](Index b, Index row) {  // what a good sequence writes
                const std::size_t width = 64, at = width * static_cast<std::size_t>(paged ? c.table[static_cast<std::size_t>(b * pages + row / 16)] * 16 + row % 16 : b * 64 + row);
                std::copy_n(written.cache_k.begin() + static_cast<std::ptrdiff_t>(at), width, want_k.begin() + static_cast<std::ptrdiff_t>(at));
                std::copy_n(written.cache_v.begin() + static_cast<std::ptrdiff_t>(at), width, want_v.begin() + static_cast<std::ptrdiff_t>(at));
            };
            for (const Index b : {0, 3})
                for (Index i = 0; i < 2; ++i) take(b, s.lengths[static_cast<std::size_t>(b)] + i);
            if (lengths) {
                c.sizes.lengths[1] = 63;  // one row is left
                c.sizes.lengths[2] = -1;
            } else {
                for (Index i = 0; i < 2; ++i) take(1, 40 + i);
                c.table[static_cast<std::size_t>(pages)] = 99;       // of sequence 1, read
                c.table[static_cast<std::size_t>(2 * pages + 2)] = -3;  // of sequence 2, written
            }
            const std::uint32_t seen = flags_after(checks, "reports", [&](std::uint32_t* flags) {
                OnDevice device(checks);
                const Status ran = run_on(interstate::cuda{.flags = flags}, c, device);
                device.bring_back(c.o), device.bring_back(c.lse), device.bring_back(c.cache_k), device.bring_back(c.cache_v);
                return ran;
            });
            const char* const what = lengths ? "bad lengths" : "bad pages";
            checks.expect(seen == (lengths ? flag_bad_lengths : flag_bad_block_table), what, ("flags are " + std::to_string(seen)).c_str());
            checks.expect(same_bits(c.cache_k, want_k) && same_bits(c.cache_v, want_v), what, "no other row of the cache may be written");
            const std::size_t each = c.o.size() / 4, of_lse = c.lse.size() / 4;
            for (const std::size_t b : {0, 3}) {
                const std::vector<T> got(c.o.begin() + static_cast<std::ptrdiff_t>(b * each), c.o.begin() + static_cast<std::ptrdiff_t>((b + 1) * each));
                const std::vector<double> want(truth.o.begin() + static_cast<std::ptrdiff_t>(b * each), truth.o.begin() + static_cast<std::ptrdiff_t>((b + 1) * each));
                checks.expect(relative_error(got, want) < 1e-2, what, "other sequences must be right");
            }
            for (std::size_t i = each; i < 3 * each; ++i)
                checks.expect(lengths ? static_cast<double>(c.o[i]) == 0.0 : std::isfinite(static_cast<double>(c.o[i])), what, "a sequence without room must be zero, one with a bad page finite");
            for (std::size_t i = of_lse; i < 3 * of_lse && lengths; ++i) checks.expect(c.lse[i] == -INFINITY, what, "lse of a sequence without room must be -inf");
        }
    // A good call reports nothing.
    Decode<T> good({.capacity = 64, .tokens = 2, .lengths = {62, 5}, .page_size = 16}, {}, 12);
    const std::uint32_t seen = flags_after(checks, "reports", [&](std::uint32_t* flags) {
        OnDevice device(checks);
        return run_on(interstate::cuda{.flags = flags}, good, device);
    });
    checks.expect(seen == 0u, "reports", "nothing is wrong");
}

void refusals(Checks& checks) {
    Decode<float> c({.capacity = 2000, .tokens = 2, .lengths = {1, 2}}, {}, 13);
    OnDevice device(checks);
    auto state = c.state(device);
    const auto tokens = c.tokens(device);
    Status s = step(interstate::cuda{}, c.options, attention::Params{}, state, tokens, c.out(device), Workspace{});
    checks.expect(s.code() == StatusCode::workspace_too_small, "workspace", s.message());
    state.lengths = {};
    state.length = 1999;
    s = step(interstate::cuda{}, c.options, attention::Params{}, state, tokens, c.out(device), Workspace{});
    checks.expect(std::string(s.message()) == "state.length is 1999, must be at least 0 and leave 2 of the 2000 rows of the cache", "length", s.message());
}

void run(Checks& checks, bool quick) {
    if (quick) {
        for (const Index page : {0, 16})
            every_dtype(checks, {.capacity = 160, .tokens = 2, .query_heads = 4, .kv_heads = 2, .head_dim = 64, .value_dim = 40, .lengths = {0, 100, 17}, .page_size = page});
        every_dtype(checks, {.capacity = 64, .tokens = 1, .query_heads = 34, .kv_heads = 2, .head_dim = 100, .value_dim = 130, .lengths = {50}}, sigmoid);
        expect_close<f32>(checks, {.capacity = 64, .query_heads = 2, .head_dim = 300, .value_dim = 8, .lengths = {50}}, {}, 2);
        reports<bf16>(checks);
        graphs<bf16>(checks, 16, causal);
        return;
    }
    refusals(checks);
    caches(checks);
    lengths(checks);
    dims(checks);
    for (const Index off : {0, 1}) {
        strides<f64>(checks, off);
        strides<f32>(checks, off);
        strides<bf16>(checks, off);
    }
    one_token(checks);
    for (const Index page : {0, 16, 60})
        for (const Options& options : {causal, Options{.window = 200}, sigmoid}) {
            graphs<bf16>(checks, page, options);
            graphs<f16>(checks, page, options);
            graphs<f32>(checks, page, options);
            graphs<f64>(checks, page, options);
        }
    reports<bf16>(checks);
    reports<f32>(checks);
    reports<f64>(checks);
}

}  // namespace
}  // namespace interstate::test

int main(int argc, char** argv) { return interstate::test::cuda_main(argc, argv, "attention step", &interstate::test::run); }
