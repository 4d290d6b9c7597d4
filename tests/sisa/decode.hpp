// A decoding step of SISA with memory of its own, contiguous or paged, for any executor: prompts are appended by the reference.
// Everything that must not be read is NaN.
#pragma once

#include <sisa/reference.hpp>

#include "../attention/decode.hpp"

namespace interstate::test {

struct SisaDecodeSizes : DecodeSizes {
    Index state_dim = 16;
    double half_life = 30.0;
    bool resets = false;
};

template <class T>
struct SisaDecode {
    using A = acc_t<T>;
    using P = param_t<T>;
    SisaDecodeSizes sizes;
    sisa::Options options;
    // Tokens of the step (B, n, ...), and all tokens of the sequences (B, capacity, ...), prompt and step.
    std::vector<T> q, k, v, C, B, all_k, all_v, all_B, cache_k, cache_v, cache_B, o;
    std::vector<P> log_alpha, theta, lam, all_alpha, all_theta;
    std::vector<A> bias, lse;
    std::vector<double> cache_g, g_last, Phi;
    std::vector<std::int32_t> table;
    Index cache_batch, cache_rows;

    SisaDecode(const SisaDecodeSizes& s, const sisa::Options& opt, std::uint64_t seed) : sizes(s), options(opt) {
        Random64 random(seed);
        const DecodeLayout layout(s, random);
        table = layout.table;
        cache_batch = layout.batch;
        cache_rows = layout.rows;
        const Index n = s.tokens, H = s.kv_heads, pairs = s.state_dim / 2;
        const auto draw = [&](auto& x, Index count, auto&& number) {
            using E = typename std::remove_reference_t<decltype(x)>::value_type;
            for (Index i = 0; i < count; ++i) x.push_back(E(static_cast<float>(number())));
        };
        const auto normal = [&] { return s.magnitude * random.normal(); };
        draw(q, batch() * n * s.query_heads * s.head_dim, normal);
        draw(C, batch() * n * s.query_heads * s.state_dim, [&] { return random.normal(); });
        draw(bias, s.query_heads, [&] { return random.normal(); });
        draw(lam, s.query_heads, [&] { return 0.2 + 1.3 * random.uniform(); });
        draw(all_k, batch() * s.capacity * H * s.head_dim, normal);
        draw(all_v, batch() * s.capacity * H * s.value_dim, [&] { return random.normal(); });
        draw(all_B, batch() * s.capacity * H * s.state_dim, [&] { return random.normal(); });
        draw(all_alpha, batch() * s.capacity * H, [&] { return s.resets && random.uniform() < 0.03 ? -INFINITY : -1.4 * random.uniform() / s.half_life; });
        draw(all_theta, batch() * s.capacity * H * pairs, [&] { return 0.3 * random.normal(); });
        const auto each_tensor = [&](auto&& f) {
            f(all_k, k, H * s.head_dim), f(all_v, v, H * s.value_dim), f(all_B, B, H * s.state_dim), f(all_alpha, log_alpha, H), f(all_theta, theta, H * pairs);
        };
        each_tensor([&](auto& all, auto& tokens, Index width) {
            tokens.resize(static_cast<std::size_t>(batch() * n * width));
            for (Index b = 0; b < batch(); ++b) {
                const Index length = this->length(b);
                const auto from = [&](Index of, Index row) { return all.begin() + (of * s.capacity + row) * width; };
                for (Index row = 0; row < length && s.page_size > 0; ++row)  // one prompt, as far as pages are shared
                    if (DecodeLayout::shares(s, b, row / s.page_size)) std::copy_n(from(0, row), width, from(b, row));
                for (Index i = 0; i < n && length + i < s.capacity; ++i) std::copy_n(from(b, length + i), width, tokens.begin() + (b * n + i) * width);
            }
        });
        const auto size = [](Index count) { return static_cast<std::size_t>(count); };
        cache_k.assign(size(cache_batch * cache_rows * H * s.head_dim), T(NAN));
        cache_v.assign(size(cache_batch * cache_rows * H * s.value_dim), T(NAN));
        cache_B.assign(size(cache_batch * cache_rows * H * s.state_dim), T(NAN));
        cache_g.assign(size(cache_batch * cache_rows * H), NAN);
        g_last.assign(size(batch() * H), NAN);
        Phi.assign(size(batch() * H * pairs), NAN);
        for (Index b = 0; b < batch(); ++b) (void)append(reference{}, options, of_sequence(b), prompt(b, 0, length(b)));
        o.assign(size(batch() * n * s.query_heads * s.value_dim), T(777.0f));
        lse.assign(size(batch() * n * s.query_heads), A(777));
    }
    /// The same numbers in float64, the cache as it was stored.
    template <class U>
    explicit SisaDecode(const SisaDecode<U>& other)
        : sizes(other.sizes), options(other.options), cache_g(other.cache_g), g_last(other.g_last), Phi(other.Phi), table(other.table),
          cache_batch(other.cache_batch), cache_rows(other.cache_rows) {
        const auto copy = [](auto& to, const auto& from) {
            using E = typename std::remove_reference_t<decltype(to)>::value_type;
            for (const auto& x : from) to.push_back(static_cast<E>(x));
        };
        copy(q, other.q), copy(k, other.k), copy(v, other.v), copy(C, other.C), copy(B, other.B), copy(all_k, other.all_k), copy(all_v, other.all_v);
        copy(all_B, other.all_B), copy(cache_k, other.cache_k), copy(cache_v, other.cache_v), copy(cache_B, other.cache_B), copy(o, other.o);
        copy(log_alpha, other.log_alpha), copy(theta, other.theta), copy(lam, other.lam), copy(all_alpha, other.all_alpha);
        copy(all_theta, other.all_theta), copy(bias, other.bias), copy(lse, other.lse);
    }
    Index batch() const { return static_cast<Index>(sizes.lengths.size()); }
    Index length(Index b) const { return sizes.lengths[static_cast<std::size_t>(b)]; }
    bool softmax() const { return options.score == sisa::Score::softmax; }

    /// Views; `at(vector)` is where its elements are.
    template <class Memory>
    sisa::State<T> state(Memory&& at) {
        const SisaDecodeSizes& s = sizes;
        sisa::State<T> x{.k = view(at(cache_k), {cache_batch, cache_rows, s.kv_heads, s.head_dim}),
                         .v = view(at(cache_v), {cache_batch, cache_rows, s.kv_heads, s.value_dim}),
                         .length = -1,
                         .lengths = view(static_cast<const std::int32_t*>(at(sizes.lengths)), {batch()})};
        if (s.state_dim > 0) {
            x.B = view(at(cache_B), {cache_batch, cache_rows, s.kv_heads, s.state_dim});
            x.g = view(at(cache_g), {cache_batch, cache_rows, s.kv_heads});
            x.g_last = view(at(g_last), {batch(), s.kv_heads});
            x.Phi = view(at(Phi), {batch(), s.kv_heads, s.state_dim / 2});
        }
        if (s.page_size > 0) x.block_table = view(static_cast<const std::int32_t*>(at(table)), {batch(), s.capacity / s.page_size});
        return x;
    }
    template <class Memory>
    sisa::Tokens<T, P> tokens(Memory&& at) {
        const SisaDecodeSizes& s = sizes;
        const Index n = s.tokens;
        const auto rows = [&]<class E>(std::vector<E>& x, Index heads, Index width) {
            return view(static_cast<const E*>(at(x)), {batch(), n, heads, width});
        };
        sisa::Tokens<T, P> x{.q = rows(q, s.query_heads, s.head_dim), .k = rows(k, s.kv_heads, s.head_dim), .v = rows(v, s.kv_heads, s.value_dim)};
        if (s.state_dim > 0) {
            x.C = rows(C, s.query_heads, s.state_dim);
            x.B = rows(B, s.kv_heads, s.state_dim);
            x.log_alpha = view(static_cast<const P*>(at(log_alpha)), {batch(), n, s.kv_heads});
            x.theta = rows(theta, s.kv_heads, s.state_dim / 2);
        }
        if (s.bias && !softmax()) x.bias = view(static_cast<const A*>(at(bias)), {s.query_heads});
        return x;
    }
    template <class Memory>
    sisa::Params<P> params(Memory&& at) {
        if (sizes.state_dim == 0) return {};
        return {.lam = view(static_cast<const P*>(at(lam)), {sizes.query_heads})};
    }
    template <class Memory>
    sisa::TokensOut<T> out(Memory&& at) {
        sisa::TokensOut<T> x{.o = view(at(o), {batch(), sizes.tokens, sizes.query_heads, sizes.value_dim})};
        if (softmax()) x.lse = view(at(lse), {batch(), sizes.tokens, sizes.query_heads});
        return x;
    }
    /// The cache of sequence b alone, empty; and its tokens [begin, end), prompt and step. On the host.
    sisa::State<T> of_sequence(Index b) {
        sisa::State<T> x = state(on_host);
        x.length = 0;
        x.lengths = {};
        const auto cut = [&](auto& of) {
            if (of) of.data += b * of.stride[0], of.extent[0] = 1;
        };
        cut(x.g_last), cut(x.Phi), cut(x.block_table);
        if (sizes.page_size == 0) cut(x.k), cut(x.v), cut(x.B), cut(x.g);
        return x;
    }
    sisa::Keys<T, P> prompt(Index b, Index begin, Index end) const {
        const SisaDecodeSizes& s = sizes;
        const auto rows = [&]<class E>(const std::vector<E>& x, Index width) {
            return view(x.data() + (b * s.capacity + begin) * s.kv_heads * width, {Index{1}, end - begin, s.kv_heads, width});
        };
        sisa::Keys<T, P> x{.k = rows(all_k, s.head_dim), .v = rows(all_v, s.value_dim)};
        if (s.state_dim == 0) return x;
        x.B = rows(all_B, s.state_dim);
        x.log_alpha = view(all_alpha.data() + (b * s.capacity + begin) * s.kv_heads, {Index{1}, end - begin, s.kv_heads});
        x.theta = rows(all_theta, s.state_dim / 2);
        return x;
    }
    std::string describe() const {
        char text[256];
        std::snprintf(text, sizeof text, "%s n=%d capacity=%d page=%d B=%d length[0]=%d Hq=%d Hkv=%d dh=%d dv=%d ds=%d window=%d sigmoid=%d half-life=%g resets=%d",
                      to_string(dtype_of<T>), static_cast<int>(sizes.tokens), static_cast<int>(sizes.capacity), static_cast<int>(sizes.page_size),
                      static_cast<int>(batch()), batch() > 0 ? static_cast<int>(length(0)) : -1, static_cast<int>(sizes.query_heads),
                      static_cast<int>(sizes.kv_heads), static_cast<int>(sizes.head_dim), static_cast<int>(sizes.value_dim),
                      static_cast<int>(sizes.state_dim), static_cast<int>(options.window), !softmax(), sizes.half_life, sizes.resets);
        return text;
    }
};

/// A step on the host.
template <class Exec, class T>
Status run_step(const Exec& exec, SisaDecode<T>& c) {
    const auto state = c.state(on_host);
    const auto tokens = c.tokens(on_host);
    std::vector<std::byte> memory(workspace_size(exec, c.options, shape_of(state, tokens), pass::step));
    return step(exec, c.options, c.params(on_host), state, tokens, c.out(on_host), Workspace{memory.data(), memory.size()});
}

/// Results of a step, or how far they may be off.
template <class Number>
struct StepResults {
    Number o, lse;
};

/// The plain formula with operands of products rounded to T (rotated channels, weights), all else exact: what the 16-bit rule
/// compares with. Of a case after its step.
template <class T>
StepResults<std::vector<double>> rounded_step(SisaDecode<double>& c) {
    const SisaDecodeSizes& s = c.sizes;
    const auto operand = [](double x) { return static_cast<double>(T(x)); };
    const auto size = [](Index n) { return static_cast<std::size_t>(n); };
    const sisa::State<double> state = c.state(on_host);
    const attention::CacheRows rows = attention::cache_rows(state);
    const attention::Options plain = sisa::attention_of(c.options);
    const double scale = attention::scale_of(plain, s.head_dim);
    const Index pairs = s.state_dim / 2;
    std::vector<double> o(c.o.size(), 0.0), lse(c.lse.size(), 0.0);
    for (Index b = 0; b < c.batch(); ++b)
        for (Index i = 0; i < s.tokens; ++i)
            for (Index h = 0; h < s.query_heads; ++h) {
                const Index kv = h / (s.query_heads / s.kv_heads), at = c.length(b) + i, row = (b * s.tokens + i) * s.query_heads + h;
                const RowRange read = attention::keys_read(plain, at, at + 1);
                std::vector<double> Chat(size(s.state_dim)), p(size(s.capacity));
                for (Index d = 0; d < s.state_dim; ++d) Chat[size(d)] = c.C[size(row * s.state_dim + d)];
                for (Index n = 0; n < pairs; ++n) {
                    double angle = state.Phi(b, kv, n);  // of the last token
                    for (Index later = i + 1; later < s.tokens; ++later) angle -= c.theta[size(((b * s.tokens + later) * s.kv_heads + kv) * pairs + n)];
                    sisa::detail::turn_pair(Chat.data(), n, angle);
                }
                const attention::CacheRows::Place own = rows.place(b, at);
                double largest = -INFINITY, sum = 0.0;
                for (Index j = read.begin; j < read.end; ++j) {
                    const attention::CacheRows::Place key = rows.place(b, j);
                    double dot = 0.0, importance = 0.0;
                    for (Index d = 0; d < s.head_dim; ++d) dot += c.q[size(row * s.head_dim + d)] * state.k(key.batch, key.row, kv, d);
                    for (Index d = 0; d < s.state_dim; ++d) importance += operand(Chat[size(d)]) * operand(state.B(key.batch, key.row, kv, d));
                    p[size(j)] = scale * dot;
                    if (s.state_dim > 0) p[size(j)] += c.lam[size(h)] * std::exp(state.g(own.batch, own.row, kv) - state.g(key.batch, key.row, kv)) * importance;
                    largest = std::max(largest, p[size(j)]);
                }
                for (Index j = read.begin; j < read.end; ++j) {
                    double& x = p[size(j)];
                    x = c.softmax() ? std::exp(x - largest) : 1.0 / (1.0 + std::exp(-x - (s.bias ? c.bias[size(h)] : c.options.bias)));
                    sum += x;
                }
                lse[size(row)] = largest + std::log(sum);
                for (Index j = read.begin; j < read.end; ++j) {
                    const attention::CacheRows::Place key = rows.place(b, j);
                    for (Index d = 0; d < s.value_dim; ++d)
                        o[size(row * s.value_dim + d)] += operand(c.softmax() ? p[size(j)] / sum : p[size(j)]) * state.v(key.batch, key.row, kv, d);
                }
            }
    return {o, lse};
}
/// The 16-bit rule for a step whose truth is `c` (lse is float); 1e-5 of float32 and 1e-12 of float64.
template <class T>
StepResults<double> bounds_of_step(SisaDecode<double>& c) {
    if (sizeof(T) == 8) return {1e-12, 1e-12};
    if (sizeof(T) == 4) return {1e-5, 1e-5};
    std::vector<double> rounded;
    for (const double x : c.o) rounded.push_back(static_cast<double>(T(x)));
    const auto formula = rounded_step<T>(c);
    return {2.0 * relative_error(formula.o, c.o) + relative_error(rounded, c.o) + 1e-5,
            (c.softmax() ? 2.0 * relative_error(formula.lse, c.lse) : 0.0) + 1e-5};
}

inline std::vector<SisaDecodeSizes> every_sisa_cache(Index tokens) {
    std::vector<SisaDecodeSizes> all;
    for (const DecodeSizes& s : every_cache(tokens))
        for (const Index ds : {0, 6, 16}) {
            SisaDecodeSizes with{s};
            with.state_dim = ds;
            with.resets = ds == 16;
            all.push_back(with);
        }
    return all;
}

}  // namespace interstate::test
