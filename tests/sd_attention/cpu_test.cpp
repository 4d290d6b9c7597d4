// S-D attention on the CPU against the float64 reference: every form, dtype and instruction set, lengths around tiles, strides, packing,
// threads, and steps on both executors; the spectra of generators against Eigen's.
#include <array>

#include <Eigen/Eigenvalues>
#include <gtest/gtest.h>

#include <sd_attention/sd_attention.hpp>

#include "../support/isas.hpp"
#include "../support/sanitized.hpp"
#include "rounded_formula.hpp"

namespace interstate::test {
namespace {

using sd_attention::Component;
using sd_attention::Normalizer;
using sd_attention::Operator;
using sd_attention::Options;

/// Empty where every tensor is as close to the float64 truth on inputs rounded alike as its dtype promises: f64 1e-12, f32 1e-5, and 16-bit
/// storage the 16-bit rule; forward, which rounds nothing between u and o, 1e-5 and the rounding of o. What the truth leaves nothing of but
/// its own rounding (of a single token, grad.P) is held to as much of zero.
template <class T>
std::string beyond_tolerance(const Options& options, const Case& in, const Case& got, const Case& want) {
    Case plain;
    if (sizeof(T) == 2) plain = rounded_formula<T>(options, in);
    std::string text;
    for (const TensorError& e : compare(got, want)) {
        double bound = sizeof(T) == 8 ? 1e-12 : 1e-5;
        if (sizeof(T) == 2) {
            const bool stored = e.name == "out.o" || e.name == "grad.u" || e.name == "grad.v";
            if (stored) bound += 1.02 * rounding_floor<T>(want.tensors.at(e.name));
            if (e.name.starts_with("grad.")) bound += 2.0 * compare(e.name, plain.tensors.at(e.name), want.tensors.at(e.name)).relative;
        }
        const bool zero = norm_of(want.tensors.at(e.name)) < 1e-13;
        if (e.finite && (zero ? norm_of(got.tensors.at(e.name)) : e.relative) <= bound) continue;
        char line[160];
        std::snprintf(line, sizeof line, "%s: %.2e, may be %.2e%s; ", e.name.c_str(), e.relative, bound, e.finite ? "" : ", not finite");
        text += line;
    }
    return text;
}

template <class T, class W>
void expect_close(const Options& options, const Case& c, cpu exec, RunOptions run = {}) {
    const Case in = rounded<Operator, T, W>(c);
    Case got, want;
    const Status status = run_case<Operator, T, W>(exec, options, in, got, run);
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, in, want).ok()));
    EXPECT_EQ(beyond_tolerance<T>(options, in, got, want), "") << describe(options) << " " << to_string(dtype_of<T>) << " " << to_string(exec.isa);
}
void expect_close_in_every_dtype(const Options& options, const Case& c, cpu exec, RunOptions run = {}) {
    expect_close<f64, double>(options, c, exec, run);
    expect_close<f32, float>(options, c, exec, run);
    expect_close<f32, double>(options, c, exec, run);
    if constexpr (!sanitized) expect_close<f16, float>(options, c, exec, run);
    expect_close<bf16, float>(options, c, exec, run);
}
Case of_form(const Options& options, SdCase o, std::uint64_t seed) {
    o.lse = options.softmax();
    o.unit = true;
    return make(o, seed);
}

TEST(SdAttentionCpu, EveryFormLengthAndInstructionSet) {
    for (const Isa isa : isas())
        for (const Options& options : all_sd_options())
            for (const Index L : sanitized ? std::vector<Index>{129} : std::vector<Index>{1, 128, 131})
                expect_close_in_every_dtype(
                    options, of_form(options, {.batch = 2, .length = L, .channels = 20, .value_dim = 35, .planes = L % 2 == 0 ? 2 : -1}, 10),
                    {.threads = 2, .isa = isa});
}

TEST(SdAttentionCpu, EveryHeadAndLayout) {
    for (const auto& [r, dv, planes] : std::vector<std::array<Index, 3>>{{1, 1, -1}, {7, 33, 0}, {64, 16, -1}, {16, 64, 3}, {130, 70, -1}})
        for (const Layout layout : {Layout::contiguous, Layout::reversed, Layout::padded})
            for (const Options& options : all_sd_options()) {
                const Case c = of_form(options, {.length = 70, .heads = 2, .channels = r, .value_dim = dv, .planes = planes}, 11);
                expect_close<f32, float>(options, c, {}, {.layout = layout});
                expect_close<bf16, float>(options, c, {}, {.layout = layout});
            }
}

TEST(SdAttentionCpu, LongAndPacked) {
    const Index L = sanitized ? 300 : 2500;
    for (const Options& options : all_sd_options()) {
        expect_close<f32, float>(options, of_form(options, {.length = L, .channels = 8, .value_dim = 8}, 12), {.threads = 2});
        expect_close_in_every_dtype(
            options, of_form(options, {.length = 260, .heads = 2, .channels = 5, .value_dim = 3, .cu_seqlens = {3, 3, 130, 131, 257}}, 13), {.threads = 2});
    }
}

TEST(SdAttentionCpu, EmptySizesAreLegal) {
    for (const auto& [B, L, H, r, dv, planes] : std::vector<std::array<Index, 6>>{
             {0, 5, 2, 3, 4, -1}, {2, 0, 2, 3, 4, -1}, {2, 5, 0, 3, 4, -1}, {2, 5, 2, 0, 4, -1}, {2, 5, 2, 3, 0, -1}, {2, 5, 2, 3, 4, 0}, {2, 5, 2, 0, 0, 1}})
        for (const Options& options : all_sd_options())
            expect_close_in_every_dtype(options, of_form(options, {.batch = B, .length = L, .heads = H, .channels = r, .value_dim = dv, .planes = planes}, 14), {});
    expect_close<f32, float>({}, make({.length = 7, .cu_seqlens = {3}}, 15), {});
}

/// Tensors without elements may be null, in every dtype.
template <class T>
void expect_null_values_are_legal(const Options& options) {
    const Index L = 3, r = 2;
    const std::vector<T> u(L * r, T(0.5f));
    const std::vector<float> P = {1.0f, 2.0f, 3.0f, 4.0f}, delta(r);
    std::vector<T> du(L * r, T(7.0f));
    std::vector<acc_t<T>> lse(L);
    const View<T, 4> none{nullptr, {1, L, 1, 0}, {0, 0, 0, 1}};
    const sd_attention::Inputs<T, float> in{.u = view(u.data(), {1, L, 1, r}), .v = none, .generator = {.P = view(P.data(), {1, r, r}), .delta = view(delta.data(), {1, r})}};
    const sd_attention::Outputs<T> out{.o = none, .lse = options.softmax() ? view(lse.data(), {1, L, 1}) : View<acc_t<T>, 3>{}};
    std::vector<std::byte> memory(workspace_size(cpu{}, options, shape_of(in), pass::backward));
    const Workspace ws{memory.data(), memory.size()};
    Status status = forward(cpu{}, options, in, out, Saved{}, ws);
    EXPECT_TRUE(status.ok()) << status.message();
    status = backward(cpu{}, options, in, out, Saved{}, {.o = none}, {.u = view(du.data(), {1, L, 1, r})}, ws);
    EXPECT_TRUE(status.ok()) << status.message();
    for (const T x : du) EXPECT_EQ(static_cast<float>(x), 0.0f) << to_string(dtype_of<T>) << " " << describe(options);
}
TEST(SdAttentionCpu, NullTensorsWithoutElementsAreLegal) {
    for (const Options& options : all_sd_options()) {
        expect_null_values_are_legal<f64>(options);
        expect_null_values_are_legal<f32>(options);
        if constexpr (!sanitized) expect_null_values_are_legal<f16>(options);
        expect_null_values_are_legal<bf16>(options);
    }
}

/// Scores of thousands, which softmax would saturate, keep their dtype's rounding; so do generators of any size.
TEST(SdAttentionCpu, LargeScoresAndExtremeGenerators) {
    const Options identity{.normalizer = Normalizer::identity};
    for (const double size : {1e-3, 8.0})
        expect_close_in_every_dtype(identity, make({.length = 200, .channels = 16, .value_dim = 16, .size = size}, 16), {});
    expect_close<bf16, float>(identity, make({.length = 200, .channels = 16, .value_dim = 16, .size = 300.0}, 16), {});  // beyond what f16 holds
    for (const double delta : {-60.0, 40.0})
        for (const Options& options : all_sd_options()) {
            Case c = of_form(options, {.length = 90, .channels = 8, .value_dim = 8}, 17);
            for (double& x : values(c, "delta")) x = delta;
            Case got;
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, options, rounded<Operator, float, float>(c), got).ok()));
            for (const auto& [name, tensor] : got.tensors)
                for (const double x : tensor.values) ASSERT_TRUE(std::isfinite(x)) << name << " " << describe(options);
            if (options.normalizer == Normalizer::identity && options.component != Component::routing) expect_close_in_every_dtype(options, c, {});
        }
}

TEST(SdAttentionCpu, NeitherLaterTokensNorOtherSequencesAreRead) {
    for (const Options& options : all_sd_options()) {
        Case c = of_form(options, {.length = 300, .channels = 5, .value_dim = 6, .cu_seqlens = {3, 160, 297}}, 19), clean, dirty;
        ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{}, options, c, clean).ok()));
        for (const char* name : {"u", "v", "dout.o"}) {
            auto& x = values(c, name);
            const std::size_t row = x.size() / 300;
            for (std::size_t i = 0; i < x.size(); ++i)
                if (i / row < 3 || i / row >= 297 || (i / row >= 60 && name[0] != 'd')) x[i] = std::nan("");
        }
        ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{}, options, c, dirty).ok()));
        for (std::size_t i = 0; i < 60 * 6; ++i) EXPECT_EQ(values(clean, "out.o")[i], values(dirty, "out.o")[i]) << i;
        for (std::size_t i = 0; i < 3 * 5; ++i) EXPECT_EQ(values(dirty, "grad.u")[i], 0.0);
        for (std::size_t i = 297 * 6; i < 300 * 6; ++i) EXPECT_EQ(values(dirty, "grad.v")[i], 0.0);
    }
}

TEST(SdAttentionCpu, SameBitsForAnyNumberOfThreads) {
    for (const Options& options : all_sd_options()) {
        const Case c = of_form(options, {.batch = 2, .length = 600, .heads = 2, .channels = 20, .value_dim = 24}, 20);
        Case one;
        ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = 1}, options, c, one).ok()));
        for (const int threads : {2, 5}) {
            Case many;
            ASSERT_TRUE((run_case<Operator, bf16, float>(cpu{.threads = threads}, options, c, many).ok()));
            for (const auto& [name, tensor] : one.tensors) EXPECT_EQ(tensor.values, many.tensors[name].values) << name;
        }
    }
}

// ---- Steps -----------------------------------------------------------------------------------------

/// Decodes a case token by token, softmax by several at first, the cache in pages of three rows if `paged`: o and, of softmax, lse.
template <class T, class Exec>
Case decode(const Exec& exec, const Options& options, const Case& c, bool paged) {
    using A = acc_t<T>;
    const auto& shape = c.tensors.at("u").extent;
    const Index B = shape[0], L = shape[1], H = shape[2], r = shape[3], dv = c.tensors.at("v").extent[3], page = 3, pages = ceil_div(L, page);
    std::vector<T> u, v, o(B * L * H * dv);
    for (const double x : c.tensors.at("u").values) u.push_back(T(x));
    for (const double x : c.tensors.at("v").values) v.push_back(T(x));
    std::vector<float> P(c.tensors.at("P").values.begin(), c.tensors.at("P").values.end());
    std::vector<float> delta(c.tensors.at("delta").values.begin(), c.tensors.at("delta").values.end());
    const sd_attention::Params<float> params{{.P = view<const float>(P.data(), {H, r, r}), .delta = view<const float>(delta.data(), {H, r})}};
    std::vector<A> lse(B * L * H), s(B * H * r * dv), z(B * H * r);
    std::vector<T> cache_u(B * pages * page * H * r, T(NAN)), cache_v(B * pages * page * H * dv, T(NAN));
    std::vector<std::int32_t> table(B * pages);
    for (Index i = 0; i < B * pages; ++i) table[i] = static_cast<std::int32_t>(B * pages - 1 - i);
    sd_attention::Cache<T> cache;
    if (paged) {
        cache.k = view(cache_u.data(), {B * pages, page, H, r}), cache.v = view(cache_v.data(), {B * pages, page, H, dv});
        cache.block_table = view<const std::int32_t>(table.data(), {B, pages});
    } else {
        cache.k = view(cache_u.data(), {B, pages * page, H, r}), cache.v = view(cache_v.data(), {B, pages * page, H, dv});
    }
    const sd_attention::State<A> state{view(s.data(), {B, H, r, dv}), options.normalizer == Normalizer::elu1 ? view(z.data(), {B, H, r}) : View<A, 3>{}};
    const auto rows = [&](auto& x, Index t, Index n, Index columns) {
        using E = std::remove_reference_t<decltype(x[0])>;
        return View<E, 4>{x.data() + t * H * columns, {B, n, H, columns}, {L * H * columns, H * columns, columns, 1}};
    };
    for (Index t = 0, n = 0; t < L; t += n) {
        n = options.softmax() && t == 0 ? std::min<Index>(5, L) : 1;
        const auto scratch = [&](std::size_t bytes) { return std::vector<std::byte>(bytes); };
        Status status;
        if (n > 1) {
            const sd_attention::Tokens<T> tokens{rows(u, t, n, r), rows(v, t, n, dv)};
            auto memory = scratch(workspace_size(exec, options, shape_of(params, cache, tokens), pass::step));
            const sd_attention::TokensOut<T> out{.o = rows(o, t, n, dv), .lse = {lse.data() + t * H, {B, n, H}, {L * H, H, 1}}};
            status = step(exec, options, params, cache, tokens, out, Workspace{memory.data(), memory.size()});
        } else {
            const sd_attention::Token<T> token{sd_attention::detail::only_token(View<const T, 4>(rows(u, t, 1, r))),
                                               sd_attention::detail::only_token(View<const T, 4>(rows(v, t, 1, dv)))};
            const sd_attention::TokenOut<T> out{.o = sd_attention::detail::only_token(rows(o, t, 1, dv)),
                                                .lse = options.softmax() ? View<A, 2>{lse.data() + t * H, {B, H}, {L * H, 1}} : View<A, 2>{}};
            auto memory = scratch(options.softmax() ? workspace_size(exec, options, shape_of(params, cache, token), pass::step)
                                                    : workspace_size(exec, options, shape_of(params, state, token), pass::step));
            const Workspace ws{memory.data(), memory.size()};
            status = options.softmax() ? step(exec, options, params, cache, token, out, ws) : step(exec, options, params, state, token, out, ws);
        }
        EXPECT_TRUE(status.ok()) << status.message();
        cache.length += n;
    }
    Case got;
    got.tensors["out.o"] = {{B, L, H, dv}, {}};
    for (const T x : o) values(got, "out.o").push_back(static_cast<double>(x));
    if (options.softmax()) got.tensors["out.lse"] = {{B, L, H}, {lse.begin(), lse.end()}};
    return got;
}
template <class T, class Exec>
void expect_steps_close(const Exec& exec, const Options& options, bool paged) {
    Case c = rounded<Operator, T, float>(of_form(options, {.batch = 2, .length = 40, .heads = 3, .channels = 20, .value_dim = 7}, 21)), want;
    c.tensors.erase("dout.o"), c.tensors.erase("dout.lse");
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, c, want).ok()));
    const Case got = decode<T>(exec, options, c, paged);
    Case plain;
    if (sizeof(T) == 2) plain = rounded_formula<T>(options, c);
    for (const TensorError& e : compare(got, want)) {
        double bound = sizeof(T) == 8 ? 1e-12 : 1e-5;
        if (sizeof(T) == 2) bound += 2.0 * compare(e.name, plain.tensors.at(e.name), want.tensors.at(e.name)).relative;
        if (sizeof(T) == 2 && e.name == "out.o") bound += 1.02 * rounding_floor<T>(want.tensors.at(e.name));
        EXPECT_TRUE(e.finite && e.relative <= bound) << e.name << " " << describe(options) << " " << to_string(dtype_of<T>) << " " << e.relative << " > " << bound;
    }
}

TEST(SdAttentionStep, IsForward) {
    for (const Options& options : all_sd_options())
        for (const bool paged : {false, true}) {
            if (paged && !options.softmax()) continue;
            expect_steps_close<f64>(reference{}, options, paged);
            expect_steps_close<f64>(cpu{}, options, paged);
            expect_steps_close<f32>(cpu{.threads = 2}, options, paged);
            if constexpr (!sanitized) expect_steps_close<f16>(cpu{}, options, paged);
            expect_steps_close<bf16>(cpu{.threads = 3}, options, paged);
        }
}

TEST(SdAttentionStep, ErrorsNameTheArgument) {
    std::vector<float> x(64), y(64), k(64), v(64);
    const sd_attention::Params<float> params{{.P = view<const float>(x.data(), {1, 2, 2}), .delta = view<const float>(x.data(), {1, 2})}};
    const sd_attention::Token<float> token{view<const float>(x.data(), {1, 1, 2}), view<const float>(x.data(), {1, 1, 3})};
    const sd_attention::TokenOut<float> out{.o = view(y.data(), {1, 1, 3})};
    const sd_attention::Cache<float> cache{.k = view(k.data(), {1, 4, 1, 2}), .v = view(v.data(), {1, 4, 1, 3}), .length = 4};
    const sd_attention::State<float> state{view(k.data(), {1, 1, 2, 3}), {}};
    std::vector<std::byte> memory(1 << 16);
    const Workspace ws{memory.data(), memory.size()};
    const auto check = [&](auto exec) {
        EXPECT_STREQ(step(exec, Options{.normalizer = Normalizer::elu1}, params, cache, token, out, ws).message(),
                     "options.normalizer: must be softmax with a cache, identity and elu1 have a state");
        EXPECT_STREQ(step(exec, Options{}, params, state, token, out, ws).message(),
                     "options.normalizer: must be identity or elu1 with a state, softmax has a cache");
        EXPECT_STREQ(step(exec, Options{}, params, cache, token, out, ws).message(),
                     "state.length is 4, must be at least 0 and leave 1 of the 4 rows of the cache");
        EXPECT_EQ(step(exec, Options{.normalizer = Normalizer::identity}, params, state, token, out, Workspace{}).code(), StatusCode::workspace_too_small);
        EXPECT_STREQ(step(exec, Options{.normalizer = Normalizer::elu1}, params, state, token, out, ws).message(), "z: is missing, must be a view");
        const std::vector<float> zeros(64);
        EXPECT_EQ(y, zeros);
        EXPECT_EQ(k, zeros);
    };
    check(reference{});
    check(cpu{});
}

TEST(SdAttentionCpu, GradientsOneByOneAndErrors) {
    const Index L = 130, n = 4;
    for (const Options& options : all_sd_options()) {
        const Case c = of_form(options, {.length = L, .channels = n, .value_dim = n}, 22);
        std::vector<float> u, v, dout, P, delta, o(L * n), lse(L), du(L * n), dv(L * n), dP(n * n), ddelta(n), one(L * n);
        for (auto [to, name] : {std::pair{&u, "u"}, std::pair{&v, "v"}, std::pair{&dout, "dout.o"}, std::pair{&P, "P"}, std::pair{&delta, "delta"}})
            to->assign(c.tensors.at(name).values.begin(), c.tensors.at(name).values.end());
        const auto rows = [&](auto& x) { return view(x.data(), {1, L, 1, n}); };
        const auto read = [&](auto& x) { return view(static_cast<const float*>(x.data()), {1, L, 1, n}); };
        const sd_attention::Inputs<float> in{
            .u = read(u), .v = read(v), .generator = {.P = view<const float>(P.data(), {1, n, n}), .delta = view<const float>(delta.data(), {1, n})}};
        std::vector<std::byte> memory(workspace_size(cpu{}, options, shape_of(in), pass::backward));
        const Workspace ws{memory.data(), memory.size()};
        const sd_attention::Outputs<float> out{rows(o), options.softmax() ? view(lse.data(), {1, L, 1}) : View<float, 3>{}};
        ASSERT_TRUE(forward(cpu{}, options, in, out, Saved{}, Workspace{memory.data(), memory.size()}).ok());
        const auto run = [&](const sd_attention::Grads<float>& grads) {
            ASSERT_TRUE(backward(cpu{}, options, in, out, Saved{}, {.o = read(dout)}, grads, ws).ok());
        };
        run({rows(du), rows(dv), {.P = view(dP.data(), {1, n, n}), .delta = view(ddelta.data(), {1, n})}});
        run({.u = rows(one)});
        EXPECT_EQ(one, du);
        run({.v = rows(one)});
        EXPECT_EQ(one, dv);
        one.assign(n * n, 7.0f);
        run({.generator = {.P = view(one.data(), {1, n, n})}});
        EXPECT_EQ(one, dP);
        one.assign(n, 7.0f);
        run({.generator = {.delta = view(one.data(), {1, n})}});
        EXPECT_EQ(one, ddelta);

        EXPECT_EQ(forward(cpu{}, options, in, out, Saved{}, Workspace{}).code(), StatusCode::workspace_too_small);
        EXPECT_EQ(forward(cpu{.threads = -1}, options, in, out, Saved{}, ws).code(), StatusCode::invalid_argument);
        EXPECT_EQ(backward(cpu{}, options, in, out, Saved{}, {.o = read(dout)}, {.u = rows(du)}, Workspace{}).code(), StatusCode::workspace_too_small);
    }
}

// ---- Stability -------------------------------------------------------------------------------------

struct Generators {
    Index heads, channels, planes;
    std::vector<double> P, a, b, delta;

    Generators(Index H, Index r, Index p, double size, double low, double high, std::uint64_t seed) : heads(H), channels(r), planes(p) {
        Random random(seed);
        P = random.normal({H, r, r}, size).values;
        a = random.normal({H, std::max<Index>(p, 0), r}, size).values, b = random.normal({H, std::max<Index>(p, 0), r}).values;
        delta = random.uniform({H, r}, low, high).values;
    }
    sd_attention::Generator<double> views() const {
        sd_attention::Generator<double> g{.delta = view(delta.data(), {heads, channels})};
        if (planes < 0) return g.P = view(P.data(), {heads, channels, channels}), g;
        g.a = view(a.data(), {heads, planes, channels}), g.b = view(b.data(), {heads, planes, channels});
        return g;
    }
    std::vector<double> largest_real_parts(const Options& options, cpu exec = {}) const {
        std::vector<double> largest(heads, 7.0);
        const auto g = views();
        std::vector<std::byte> memory(largest_real_part_workspace_size(exec, shape_of(g)));
        const Status status = largest_real_part(exec, options, g, view(largest.data(), {heads}), Workspace{memory.data(), memory.size()});
        EXPECT_TRUE(status.ok()) << status.message();
        return largest;
    }
};

TEST(SdAttentionStability, IsWhatEigenFindsAndAtMostZero) {
    for (const auto component : {Component::both, Component::routing, Component::filtering})
        for (const auto& [low, high] : {std::pair{-50.0, -50.0}, std::pair{-50.0, 50.0}, std::pair{-2.0, 2.0}, std::pair{50.0, 50.0}})
            for (const double size : {0.0, 1e-30, 1.0, 1e3, 1e150})
                for (const auto& [r, planes] : {std::pair<Index, Index>{1, -1}, {2, -1}, {3, 1}, {17, -1}, {33, 4}, {64, -1}}) {
                    const Generators g(2, r, planes, size, low, high, 30);
                    const Options options{.component = component};
                    const std::vector<double> got = g.largest_real_parts(options, {.threads = 2});
                    for (Index h = 0; h < 2; ++h) {
                        Eigen::Matrix<double, -1, -1, Eigen::RowMajor> K(r, r);
                        sd_attention::detail::make_generator(options, shape_of(g.views()), g.views(), h, K.data());
                        const double norm = K.norm(), rounding = 4.0 * static_cast<double>(r) * 2.3e-16 * norm;
                        const double filter = -K.diagonal().maxCoeff();  // the least of D: no real part is above -it
                        EXPECT_LE(got[h], rounding) << r << " " << size;
                        EXPECT_LE(got[h], -filter + rounding) << r << " " << size;
                        const double want = K.eigenvalues().real().maxCoeff();
                        EXPECT_NEAR(got[h], want, 1e3 * rounding) << r << " " << size << " " << low << " " << high;
                    }
                }
}

TEST(SdAttentionStability, KnownSpectra) {
    const auto softplus = [](double x) { return sd_attention::softplus(x); };
    Generators g(1, 4, -1, 1.0, 0.3, 0.3, 31);
    EXPECT_NEAR(g.largest_real_parts({})[0], -softplus(0.3), 1e-14);  // S - d: lambda = -d +- i sigma
    EXPECT_NEAR(g.largest_real_parts({.component = Component::routing})[0], 0.0, 1e-14);
    g.delta = {0.1, -2.0, 3.0, 0.0};
    EXPECT_EQ(g.largest_real_parts({.component = Component::filtering})[0], -softplus(-2.0));
    // [-a, s; -s, -b]: real while |a - b| > 2 s, where the two meet in -(a + b) / 2.
    g.P.assign(16, 0.0), g.P[1] = 2.0 * 0.25, g.P[11] = 2.0 * 3.0;  // S(0, 1) = 0.25 and S(2, 3) = 3
    g.delta = {2.0, 0.0, 1.0, 1.0};
    const double a = softplus(2.0), b = softplus(0.0);
    const double real = -(a + b) / 2.0 + std::sqrt((a - b) * (a - b) / 4.0 - 0.0625);
    EXPECT_NEAR(g.largest_real_parts({})[0], std::max(real, -softplus(1.0)), 1e-14);
    g.P[1] = 2.0 * 5.0;
    EXPECT_NEAR(g.largest_real_parts({})[0], std::max(-(a + b) / 2.0, -softplus(1.0)), 1e-14);
    EXPECT_TRUE(std::isinf(Generators(1, 0, 0, 1.0, 0.0, 0.0, 32).largest_real_parts({})[0]));
    g.delta.assign(4, -2000.0);  // D is 0: +-i and +-i small, of a square that is no number
    for (const double small : {1e-100, 1e-200, 1e-300}) {
        g.P.assign(16, 0.0), g.P[1] = 2.0, g.P[11] = 2.0 * small;
        EXPECT_NEAR(g.largest_real_parts({})[0], 0.0, 1e-14) << small;
    }
    g.delta = {0.1, -2.0, 3.0, 0.0};
    g.delta[2] = std::nan("");
    EXPECT_TRUE(std::isnan(g.largest_real_parts({})[0]));
}

TEST(SdAttentionStability, ErrorsNameTheArgument) {
    const Generators g(2, 3, -1, 1.0, 0.0, 1.0, 33);
    std::vector<double> largest(2, 7.0);
    std::vector<std::byte> memory(1 << 14);
    auto views = g.views();
    const auto message = [&](Workspace ws) {
        return std::string(largest_real_part(cpu{.threads = 1}, Options{}, views, view(largest.data(), {Index(2)}), ws).message());
    };
    EXPECT_NE(message({}).find("workspace"), std::string::npos);
    views.P.extent[1] = 4;
    EXPECT_EQ(message({memory.data(), memory.size()}), "P: extent of axis 1 is 4, must be 3");
    views.P = {};
    EXPECT_EQ(message({memory.data(), memory.size()}), "P: is missing, must be a view where a and b are none");
    EXPECT_EQ(largest, std::vector<double>(2, 7.0));
}

}  // namespace
}  // namespace interstate::test
