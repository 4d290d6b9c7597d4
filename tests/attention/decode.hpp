// A decoding step of attention with memory of its own, contiguous or paged, for any executor. Everything that must not be
// read is NaN: rows behind the lengths, pages of nobody, rows of pages that a table does not name.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include <attention/reference.hpp>
#include <interstate/random.hpp>

namespace interstate::test {

struct DecodeSizes {
    Index capacity = 1, tokens = 1, query_heads = 1, kv_heads = 1, head_dim = 16, value_dim = 16;
    std::vector<std::int32_t> lengths{};  // one for each sequence
    Index page_size = 0;                  // 0: contiguous
    bool shared = false;                  // paged: sequences share the pages that both have whole, as of one prompt
    bool bias = false;
    double magnitude = 1.0;
};

/// Rows of all sequences through a cache: which batch row and row of the views they have, and the block table that says so.
struct DecodeLayout {
    Index batch, rows;                // extents of the cache: sequences and capacity, or pages and rows of a page
    std::vector<std::int32_t> table;  // (B, pages of a sequence); unused entries are -7
    DecodeLayout(const DecodeSizes& s, Random64& random) : batch(static_cast<Index>(s.lengths.size())), rows(s.capacity) {
        if (s.page_size == 0) return;
        const Index sequences = batch, each = s.capacity / s.page_size;
        rows = s.page_size;
        batch = sequences * each + 3;
        std::vector<std::int32_t> free(static_cast<std::size_t>(batch));
        std::iota(free.begin(), free.end(), 0);
        for (std::size_t i = free.size() - 1; i > 0; --i) std::swap(free[i], free[random.below(i + 1)]);
        table.assign(static_cast<std::size_t>(sequences * each), -7);
        for (Index b = 0; b < sequences; ++b) {
            const Index length = s.lengths[static_cast<std::size_t>(b)], used = std::min(each, (length + s.tokens + s.page_size - 1) / s.page_size);
            for (Index i = 0; i < used; ++i) {
                auto& page = table[static_cast<std::size_t>(b * each + i)];
                if (shares(s, b, i)) {
                    page = table[static_cast<std::size_t>(i)];
                } else {
                    page = free.back();
                    free.pop_back();
                }
            }
        }
    }
    /// Whether page i of sequence b is that of sequence 0.
    static bool shares(const DecodeSizes& s, Index b, Index i) {
        return s.shared && b > 0 && (i + 1) * s.page_size <= std::min(s.lengths[0], s.lengths[static_cast<std::size_t>(b)]);
    }
    /// Of a row of a cache with `width` elements a row.
    std::size_t at(const DecodeSizes& s, Index b, Index row, Index width) const {
        if (table.empty()) return static_cast<std::size_t>((b * rows + row) * width);
        const Index page = table[static_cast<std::size_t>(b * (s.capacity / s.page_size) + row / s.page_size)];
        return static_cast<std::size_t>((page * rows + row % s.page_size) * width);
    }
};

template <class T>
struct Decode {
    using A = acc_t<T>;
    DecodeSizes sizes;
    attention::Options options;
    std::vector<T> q, k, v, cache_k, cache_v, o;
    std::vector<A> bias, lse;
    std::vector<std::int32_t> table;
    std::vector<double> all_k, all_v;  // (B, capacity, Hkv, .): every sequence as it is after the step
    Index cache_batch, cache_rows;

    Decode(const DecodeSizes& s, const attention::Options& opt, std::uint64_t seed) : sizes(s), options(opt) {
        Random64 random(seed);
        const DecodeLayout layout(s, random);
        table = layout.table;
        cache_batch = layout.batch;
        cache_rows = layout.rows;
        const Index B = batch(), n = s.tokens, wide_k = s.kv_heads * s.head_dim, wide_v = s.kv_heads * s.value_dim;
        const auto draw = [&](auto& x, Index count, double scale) {
            using E = typename std::remove_reference_t<decltype(x)>::value_type;
            for (Index i = 0; i < count; ++i) x.push_back(E(scale * random.normal()));
        };
        draw(q, B * n * s.query_heads * s.head_dim, s.magnitude);
        draw(k, B * n * wide_k, s.magnitude);
        draw(v, B * n * wide_v, 1.0);
        draw(bias, s.query_heads, 1.0);
        const auto fill = [&](std::vector<T>& cache, std::vector<double>& all, const std::vector<T>& tokens, Index width, double scale) {
            cache.assign(static_cast<std::size_t>(cache_batch * cache_rows * width), T(NAN));
            all.assign(static_cast<std::size_t>(B * s.capacity * width), NAN);
            for (Index b = 0; b < B; ++b) {
                const Index length = s.lengths[static_cast<std::size_t>(b)];
                for (Index row = 0; row < std::min(s.capacity, length + n); ++row)
                    for (Index d = 0; d < width; ++d) {
                        double& x = all[static_cast<std::size_t>((b * s.capacity + row) * width + d)];
                        if (row >= length) {
                            x = static_cast<double>(tokens[static_cast<std::size_t>((b * n + row - length) * width + d)]);
                            continue;
                        }
                        T& stored = cache[layout.at(s, b, row, width) + static_cast<std::size_t>(d)];
                        if (s.page_size == 0 || !DecodeLayout::shares(s, b, row / s.page_size)) stored = T(scale * random.normal());
                        x = static_cast<double>(stored);
                    }
            }
        };
        fill(cache_k, all_k, k, wide_k, s.magnitude);
        fill(cache_v, all_v, v, wide_v, 1.0);
        o.assign(static_cast<std::size_t>(B * n * s.query_heads * s.value_dim), T(777.0f));
        lse.assign(static_cast<std::size_t>(B * n * s.query_heads), A(777));
    }
    /// The same numbers in float64.
    template <class U>
    explicit Decode(const Decode<U>& other)
        : sizes(other.sizes), options(other.options), table(other.table), all_k(other.all_k), all_v(other.all_v),
          cache_batch(other.cache_batch), cache_rows(other.cache_rows) {
        const auto copy = [](auto& to, const auto& from) {
            using E = typename std::remove_reference_t<decltype(to)>::value_type;
            for (const auto& x : from) to.push_back(static_cast<E>(x));
        };
        copy(q, other.q), copy(k, other.k), copy(v, other.v), copy(cache_k, other.cache_k), copy(cache_v, other.cache_v);
        copy(o, other.o), copy(bias, other.bias), copy(lse, other.lse);
    }
    Index batch() const { return static_cast<Index>(sizes.lengths.size()); }
    bool softmax() const { return options.score == attention::Score::softmax; }

    /// Views; `at(vector)` is where its elements are.
    template <class Memory>
    attention::State<T> state(Memory&& at) {
        attention::State<T> x{.k = view(at(cache_k), {cache_batch, cache_rows, sizes.kv_heads, sizes.head_dim}),
                              .v = view(at(cache_v), {cache_batch, cache_rows, sizes.kv_heads, sizes.value_dim}),
                              .length = sizes.lengths.empty() ? 0 : -1,
                              .lengths = view(static_cast<const std::int32_t*>(at(sizes.lengths)), {batch()})};
        if (sizes.page_size > 0)
            x.block_table = view(static_cast<const std::int32_t*>(at(table)), {batch(), sizes.capacity / sizes.page_size});
        return x;
    }
    template <class Memory>
    attention::Tokens<T> tokens(Memory&& at) {
        const Index n = sizes.tokens;
        attention::Tokens<T> x{.q = view(static_cast<const T*>(at(q)), {batch(), n, sizes.query_heads, sizes.head_dim}),
                               .k = view(static_cast<const T*>(at(k)), {batch(), n, sizes.kv_heads, sizes.head_dim}),
                               .v = view(static_cast<const T*>(at(v)), {batch(), n, sizes.kv_heads, sizes.value_dim})};
        if (sizes.bias && !softmax()) x.bias = view(static_cast<const A*>(at(bias)), {sizes.query_heads});
        return x;
    }
    template <class Memory>
    attention::TokensOut<T> out(Memory&& at) {
        attention::TokensOut<T> x{.o = view(at(o), {batch(), sizes.tokens, sizes.query_heads, sizes.value_dim})};
        if (softmax()) x.lse = view(at(lse), {batch(), sizes.tokens, sizes.query_heads});
        return x;
    }
    std::string describe() const {
        char text[256];
        std::snprintf(text, sizeof text, "%s n=%d capacity=%d page=%d B=%d length[0]=%d Hq=%d Hkv=%d dh=%d dv=%d window=%d causal=%d sigmoid=%d",
                      to_string(dtype_of<T>), static_cast<int>(sizes.tokens), static_cast<int>(sizes.capacity), static_cast<int>(sizes.page_size),
                      static_cast<int>(batch()), batch() > 0 ? static_cast<int>(sizes.lengths[0]) : -1, static_cast<int>(sizes.query_heads),
                      static_cast<int>(sizes.kv_heads), static_cast<int>(sizes.head_dim), static_cast<int>(sizes.value_dim),
                      static_cast<int>(options.window), options.causal, !softmax());
        return text;
    }
};

/// Where elements of a vector are on the host.
inline constexpr auto on_host = [](auto& x) { return x.data(); };

/// A step on the host.
template <class Exec, class T>
Status run_step(const Exec& exec, Decode<T>& c) {
    const auto state = c.state(on_host);
    const auto tokens = c.tokens(on_host);
    std::vector<std::byte> memory(workspace_size(exec, c.options, shape_of(state, tokens), pass::step));
    return step(exec, c.options, attention::Params{}, state, tokens, c.out(on_host), Workspace{memory.data(), memory.size()});
}

/// Every kind of cache that decoding has, for `tokens` new tokens.
inline std::vector<DecodeSizes> every_cache(Index tokens) {
    DecodeSizes s{.capacity = 192, .tokens = tokens, .query_heads = 4, .kv_heads = 2, .lengths = {0, 70, 131, static_cast<std::int32_t>(192 - tokens)}};
    std::vector<DecodeSizes> all{s};
    for (const Index page : {1, 16, 24, 64}) {
        s.page_size = page;
        s.shared = page != 24;
        all.push_back(s);
    }
    return all;
}

/// ||got - want|| / ||want||, absolute where want is zero; infinite where one is not finite, unless both are the same infinity.
template <class X, class Y>
double relative_error(const std::vector<X>& got, const std::vector<Y>& want) {
    double difference = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < want.size(); ++i) {
        const double g = static_cast<double>(got[i]), w = static_cast<double>(want[i]);
        if (std::isinf(w) && g == w) continue;
        difference += (g - w) * (g - w);
        norm += w * w;
    }
    const double e = norm > 0.0 ? std::sqrt(difference / norm) : std::sqrt(difference);
    return std::isfinite(e) ? e : INFINITY;
}

}  // namespace interstate::test
