// Tests of interstate/verify.hpp: that it agrees where it should, and that nothing wrong gets past it.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <attention/attention.hpp>
#include <interstate/verify.hpp>
#include <s4d/s4d.hpp>

#include "support/cases.hpp"

namespace interstate {

// An operator that is honest, or dishonest in one way: y = 2 x, by way of the workspace.
namespace toy {

enum class Conduct { honest, writes_gap, reads_gap, skips_an_element, trusts_workspace };

struct Options {
    Conduct conduct = Conduct::honest;
    bool secondary = true;
};
inline Status set_option(Options& options, std::string_view name, std::string_view value) {
    if (name == "secondary" && value == "false") return options.secondary = false, Status{};
    return Status::error(StatusCode::invalid_argument, "option %.*s: unknown", static_cast<int>(name.size()),
                         name.data());
}
struct Shape {
    Index rows = 0, columns = 0;
};
template <class T>
struct Inputs {
    View<const T, 2> x{};
    View<const std::int32_t, 1> counts{};
};
template <class T>
struct Outputs {
    View<T, 2> y{};
    View<T, 1> first{};
};
template <class T>
struct Upstream {
    View<const T, 2> y{};
};
template <class T>
struct Grads {
    View<T, 2> x{};
};
template <class T, class F>
void visit(Inputs<T>& in, const Shape& s, F&& f) {
    f("x", in.x, {s.rows, s.columns}, Need::required);
    f("counts", in.counts, {s.rows}, Need::optional);
}
template <class T, class F>
void visit(Outputs<T>& out, const Shape& s, F&& f) {
    f("y", out.y, {s.rows, s.columns}, Need::required);
    f("first", out.first, {s.rows}, Need::optional);
}
template <class T, class F>
void visit(Upstream<T>& up, const Shape& s, F&& f) {
    f("y", up.y, {s.rows, s.columns}, Need::required);
}
template <class T, class F>
void visit(Grads<T>& grads, const Shape& s, F&& f) {
    f("x", grads.x, {s.rows, s.columns}, Need::optional);
}
template <class T>
Shape shape_of(const Inputs<T>& in) {
    return {in.x.extent[0], in.x.extent[1]};
}
inline std::size_t saved_size(reference, const Options&, const Shape&) { return 0; }
inline std::size_t workspace_size(reference, const Options&, const Shape&, pass) { return sizeof(double); }

template <class T>
Status forward(reference, const Options& options, const Inputs<T>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    auto* factor = static_cast<double*>(ws.data);
    if (options.conduct != Conduct::trusts_workspace) *factor = 2.0;
    const Index columns = in.x.extent[1];
    for (Index i = 0; i < in.x.extent[0]; ++i) {
        for (Index j = 0; j < columns; ++j) {
            if (options.conduct == Conduct::skips_an_element && i == 1 && j == 0) continue;
            const Index from = options.conduct == Conduct::reads_gap ? j + 1 : j;
            out.y(i, j) = static_cast<T>(*factor * static_cast<double>(in.x(i, from)));
        }
        if (options.conduct == Conduct::writes_gap) out.y(i, columns) = T(0.0f);
        if (out.first) out.first(i) = in.x(i, 0);
    }
    return {};
}

struct Operator {
    static constexpr const char* name = "toy";
    using Options = toy::Options;
    template <class T, class P>
    using Inputs = toy::Inputs<T>;
    template <class T>
    using Outputs = toy::Outputs<T>;
    template <class T>
    using Upstream = toy::Upstream<T>;
    template <class T, class P>
    using Grads = toy::Grads<T>;
    template <class Exec>
    static constexpr bool has_backward = false;
    static bool has_output(const Options& options, std::string_view output) {
        return output != "first" || options.secondary;
    }
    template <class T>
    static Status validate_inputs(const Options&, const toy::Inputs<T>& in) {
        return check_tensors(in, shape_of(in));
    }
};

}  // namespace toy

namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();
constexpr double inf = std::numeric_limits<double>::infinity();
constexpr Layout every_layout[] = {Layout::contiguous, Layout::reversed, Layout::padded};

HostTensor filled(std::vector<Index> extent, double first = 0.1) {
    Index n = 1;
    for (const Index e : extent) n *= e;
    HostTensor t{std::move(extent), {}};
    for (Index i = 0; i < n; ++i) t.values.push_back(std::sin(first + 1.7 * static_cast<double>(i)));
    return t;
}

Case s4d_case() {
    const Index B = 2, L = 19, H = 3, N = 4;
    Case c{{{"op", "s4d"}}, {}};
    c.tensors = {
        {"u", filled({B, L, H})},         {"log_dt", filled({H}, 1.0)},  {"log_neg_re", filled({H, N}, 2.0)},
        {"im", filled({H, N}, 3.0)},      {"B", filled({H, N, 2}, 4.0)}, {"C", filled({H, N, 2}, 5.0)},
        {"D", filled({H}, 6.0)},          {"x0", filled({B, H, N, 2})},  {"dout.y", filled({B, L, H}, 0.7)},
        {"dout.xT", filled({B, H, N, 2})}};
    return c;
}

Case toy_case() { return {{{"op", "toy"}}, {{"x", filled({3, 4})}}}; }

Status run_toy(toy::Conduct conduct, Layout layout, Case& results) {
    return run_case<toy::Operator, double, double>(reference{}, {conduct}, toy_case(), results,
                                                   {.layout = layout});
}

/// Expects an error whose message holds a piece of text.
void expect_error(const Status& status, const std::string& text) {
    EXPECT_FALSE(status.ok());
    EXPECT_NE(std::string(status.message()).find(text), std::string::npos) << status.message();
}

/// The toy on one case that something is wrong with.
Status run_broken(const Case& c, RunOptions run = {}) {
    Case results;
    return run_case<toy::Operator, float, float>(reference{}, {}, c, results, run);
}

// Views of the user's own arrays.

struct S4dArrays {
    static constexpr Index B = 2, L = 40, H = 5, N = 3;
    std::vector<double> u = filled({B, L, H}).values, dy = filled({B, L, H}, 0.3).values;
    std::vector<double> log_dt = filled({H}, 1.0).values, D = filled({H}, 2.0).values;
    std::vector<double> log_neg_re = filled({H, N}, 3.0).values, im = filled({H, N}, 4.0).values;
    std::vector<double> b = filled({H, N, 2}, 5.0).values, c = filled({H, N, 2}, 6.0).values;

    static const complex<double>* pairs(const std::vector<double>& v) {
        return reinterpret_cast<const complex<double>*>(v.data());
    }
    s4d::Inputs<double> inputs() const {
        s4d::Inputs<double> in{};
        in.u = view(u.data(), {B, L, H});
        in.params = {.log_dt = view(log_dt.data(), {H}),
                     .log_neg_re = view(log_neg_re.data(), {H, N}),
                     .im = view(im.data(), {H, N}),
                     .B = view(pairs(b), {H, N}),
                     .C = view(pairs(c), {H, N}),
                     .D = view(D.data(), {H})};
        return in;
    }
    s4d::Upstream<double> upstream() const { return {.y = view(dy.data(), {B, L, H}), .xT = {}}; }
};

TEST(Verify, ExecutorsAgreeOnViews) {
    const S4dArrays a;
    const auto f64_report =
        verify<s4d::Operator>(on<double>(cpu{}), on<double>(reference{}), {}, a.inputs(), a.upstream());
    EXPECT_TRUE(f64_report.within(1e-12)) << to_string(f64_report);
    EXPECT_EQ(f64_report.tensors.size(), 9u);  // y, xT, and seven gradients: x0 was not given
    const auto f32_report = verify<s4d::Operator>(on<float, double>(cpu{}), on<double>(reference{}), {},
                                                  a.inputs(), a.upstream());
    EXPECT_TRUE(f32_report.within(1e-5)) << to_string(f32_report);
    EXPECT_FALSE(f32_report.within(1e-12)) << "float cannot be that close";
    EXPECT_GT(f32_report.worst(), 0.0);
}

TEST(Verify, StridesOfViewsAreFollowed) {
    const S4dArrays a;
    const auto [B, L, H] = std::tuple{a.B, a.L, a.H};
    std::vector<double> channels_first(a.u.size());
    for (Index b = 0; b < B; ++b)
        for (Index t = 0; t < L; ++t)
            for (Index h = 0; h < H; ++h)
                channels_first[static_cast<std::size_t>((b * H + h) * L + t)] =
                    a.u[static_cast<std::size_t>((b * L + t) * H + h)];
    s4d::Inputs<double> in = a.inputs();
    in.u = view(channels_first.data(), {B, L, H}, {H * L, Index{1}, L});
    Case plain, transposed;
    ASSERT_TRUE(collect_case(cpu{}, a.inputs(), static_cast<s4d::Upstream<double>*>(nullptr), plain).ok());
    ASSERT_TRUE(collect_case(cpu{}, in, static_cast<s4d::Upstream<double>*>(nullptr), transposed).ok());
    EXPECT_EQ(plain.tensors.at("u").values, transposed.tensors.at("u").values);

    // Backwards in memory: the view starts at its last element.
    in.u = view(a.u.data() + a.u.size() - 1, {B, L, H}, {-L * H, -H, Index{-1}});
    Case reversed;
    ASSERT_TRUE(collect_case(cpu{}, in, static_cast<s4d::Upstream<double>*>(nullptr), reversed).ok());
    const std::vector<double> backwards(a.u.rbegin(), a.u.rend());
    EXPECT_EQ(reversed.tensors.at("u").values, backwards);
}

TEST(Verify, AttentionOn16BitViews) {
    const Index B = 1, L = 33, H = 2, d = 8;
    std::vector<bf16> q, k, v, dout;
    for (auto* values : {&q, &k, &v, &dout})
        for (const double x : filled({B, L, H, d}, values == &k ? 0.5 : 0.1).values)
            values->push_back(bf16(x));
    const auto whole = [&](const std::vector<bf16>& x) { return view(x.data(), {B, L, H, d}); };
    attention::Inputs<bf16> in{};
    in.q = whole(q);
    in.k = whole(k);
    in.v = whole(v);
    const attention::Upstream<bf16> upstream{.o = whole(dout), .lse = {}};
    const auto report =
        verify<attention::Operator>(on<float>(cpu{}), on<double>(reference{}), {}, in, upstream);
    EXPECT_TRUE(report.within(1e-5)) << to_string(report);
}

/// Sums over 4,097 keys in float32, the length its tolerance is meant for.
TEST(Verify, AttentionOverFourThousandKeys) {
    test::Random random(9);
    Case c;
    for (const char* name : {"q", "k", "v", "dout.o"}) c.tensors[name] = random.normal({1, 4097, 1, 16});
    c = test::rounded<attention::Operator, float, float>(c);
    const Report report =
        verify_case<attention::Operator>(on<float>(cpu{}), on<double>(reference{}), attention::Options{}, c);
    EXPECT_EQ(report.tensors.size(), 5u);
    EXPECT_TRUE(report.within(1e-5)) << to_string(report);
}

TEST(Verify, NullViews) {
    const S4dArrays a;
    const auto run = [&](const s4d::Inputs<double>& in) {
        return verify<s4d::Operator>(on<double>(cpu{}), on<double>(reference{}), {}, in, a.upstream());
    };
    s4d::Inputs<double> in = a.inputs();
    in.params.C.data = nullptr;
    const auto report = run(in);
    EXPECT_FALSE(report.within(inf));
    expect_error(report.status, "C: is missing");

    // Without modes there is nothing to point to.
    in = a.inputs();
    for (auto* w : {&in.params.log_neg_re, &in.params.im})
        *w = view(static_cast<const double*>(nullptr), {a.H, Index{0}});
    for (auto* w : {&in.params.B, &in.params.C})
        *w = view(static_cast<const complex<double>*>(nullptr), {a.H, Index{0}});
    const auto empty = run(in);
    EXPECT_TRUE(empty.within(1e-12)) << to_string(empty);

    in = a.inputs();
    in.params.D.extent[0] = -1;
    expect_error(run(in).status, "D: extent of axis 0 is -1");
}

// A user's own kernel.

/// y and xT of S4D as a user would write them, with a mistake on request.
Status own_kernel(const Case& c, Case& results, double mistake) {
    Case truth;
    INTERSTATE_RETURN_IF_ERROR((run_case<s4d::Operator, double, double>(reference{}, {}, c, truth)));
    results.tensors = truth.tensors;
    results.tensors.at("out.y").values.at(7) += mistake;
    return {};
}

TEST(VerifyCallable, RightKernelPasses) {
    const auto own = [](const Case& c, Case& results) { return own_kernel(c, results, 0.0); };
    const auto report = verify_case<s4d::Operator>(own, on<double>(cpu{}), {}, s4d_case());
    EXPECT_TRUE(report.within(1e-12)) << to_string(report);
    EXPECT_EQ(report.tensors.size(), 10u);
    const auto other_way = verify_case<s4d::Operator>(on<double>(cpu{}), own, {}, s4d_case());
    EXPECT_TRUE(other_way.within(1e-12)) << to_string(other_way);
}

TEST(VerifyCallable, WrongKernelIsCaught) {
    const auto own = [](const Case& c, Case& results) { return own_kernel(c, results, 1e-6); };
    const auto report = verify_case<s4d::Operator>(own, on<double>(reference{}), {}, s4d_case());
    EXPECT_TRUE(report.status.ok());
    EXPECT_FALSE(report.within(1e-9));
    for (const TensorError& e : report.tensors) EXPECT_EQ(e.relative > 0.0, e.name == "out.y") << e.name;
}

TEST(VerifyCallable, NanIsCaught) {
    for (const double bad : {nan, inf, -inf}) {
        const auto own = [&](const Case& c, Case& results) { return own_kernel(c, results, bad); };
        const auto report = verify_case<s4d::Operator>(own, on<double>(reference{}), {}, s4d_case());
        EXPECT_FALSE(report.within(inf));
        EXPECT_EQ(report.worst(), inf);
        EXPECT_NE(to_string(report).find("NOT FINITE"), std::string::npos);
    }
}

TEST(VerifyCallable, MissingTensorIsCaught) {
    const auto own = [](const Case& c, Case& results) {
        INTERSTATE_RETURN_IF_ERROR(own_kernel(c, results, 0.0));
        results.tensors.erase("grad.im");
        return Status{};
    };
    const auto report = verify_case<s4d::Operator>(own, on<double>(reference{}), {}, s4d_case());
    EXPECT_FALSE(report.within(inf));
    EXPECT_NE(to_string(report).find("grad.im (missing)"), std::string::npos);
}

TEST(VerifyCallable, WrongShapeIsCaught) {
    const auto own = [](const Case& c, Case& results) {
        INTERSTATE_RETURN_IF_ERROR(own_kernel(c, results, 0.0));
        HostTensor& y = results.tensors.at("out.y");
        std::swap(y.extent[1], y.extent[2]);
        return Status{};
    };
    EXPECT_FALSE(verify_case<s4d::Operator>(own, on<double>(reference{}), {}, s4d_case()).within(inf));
}

TEST(VerifyCallable, FailureIsReported) {
    const auto own = [](const Case&, Case&) {
        return Status::error(StatusCode::device_error, "out of paper");
    };
    const auto report = verify_case<s4d::Operator>(own, on<double>(reference{}), {}, s4d_case());
    EXPECT_FALSE(report.within(inf));
    EXPECT_NE(to_string(report).find("out of paper"), std::string::npos);
}

TEST(VerifyCallable, ComparingNothingIsNoSuccess) {
    const auto nothing = [](const Case&, Case&) { return Status{}; };
    EXPECT_FALSE(verify_case<s4d::Operator>(on<double>(reference{}), nothing, {}, s4d_case()).within(inf));
}

// Layouts.

TEST(Layouts, GiveTheSameBits) {
    Case want;
    ASSERT_TRUE((run_case<s4d::Operator, float, float>(cpu{}, {}, s4d_case(), want).ok()));
    for (const Layout layout : every_layout) {
        Case got;
        const Status status =
            run_case<s4d::Operator, float, float>(cpu{}, {}, s4d_case(), got, {.layout = layout});
        ASSERT_TRUE(status.ok()) << status.message();
        ASSERT_EQ(got.tensors.size(), 10u);
        for (const auto& [name, tensor] : want.tensors) {
            EXPECT_EQ(got.tensors.at(name).extent, tensor.extent) << name;
            EXPECT_EQ(got.tensors.at(name).values, tensor.values) << name;
        }
    }
}

TEST(Layouts, HonestOperatorPassesInAll) {
    for (const Layout layout : every_layout) {
        Case results;
        const Status status = run_toy(toy::Conduct::honest, layout, results);
        ASSERT_TRUE(status.ok()) << status.message();
        const Case c = toy_case();
        for (std::size_t i = 0; i < 12; ++i)
            EXPECT_EQ(results.tensors.at("out.y").values.at(i), 2.0 * c.tensors.at("x").values.at(i));
    }
}

TEST(Layouts, WriteBetweenElementsIsCaught) {
    Case results;
    expect_error(run_toy(toy::Conduct::writes_gap, Layout::padded, results),
                 "y: memory between its elements was written");
}

TEST(Layouts, ReadBetweenElementsGivesNan) {
    Case results;
    ASSERT_TRUE(run_toy(toy::Conduct::reads_gap, Layout::padded, results).ok());
    EXPECT_TRUE(std::isnan(results.tensors.at("out.y").values.at(3)));
}

TEST(Layouts, UnwrittenElementIsNan) {
    for (const Layout layout : every_layout) {
        Case results;
        ASSERT_TRUE(run_toy(toy::Conduct::skips_an_element, layout, results).ok());
        EXPECT_TRUE(std::isnan(results.tensors.at("out.y").values.at(4)));
    }
}

TEST(Layouts, WorkspaceStartsAsGarbage) {
    Case results;
    ASSERT_TRUE(run_toy(toy::Conduct::trusts_workspace, Layout::contiguous, results).ok());
    EXPECT_TRUE(std::isnan(results.tensors.at("out.y").values.at(0)));
}

// What a case can get wrong.

TEST(RunCase, MissingAndUnknownTensors) {
    Case c = toy_case();
    c.tensors.erase("x");
    expect_error(run_broken(c), "x: is missing");
    c = toy_case();
    c.tensors["z"] = filled({1});
    expect_error(run_broken(c), "tensor z: toy has no input of that name");
    c.tensors["dout.z"] = filled({1});
    expect_error(run_broken(c), "dout.y: is missing");
    c.tensors["dout.y"] = filled({3, 3});
    expect_error(run_broken(c), "dout.y: extent of axis 1 is 3, must be 4");
    c.tensors["dout.y"] = filled({3, 4});
    c.tensors.erase("z");
    expect_error(run_broken(c), "tensor dout.z");
    c = toy_case();
    c.tensors["out.anything"] = filled({1});
    EXPECT_TRUE(run_broken(c).ok()) << "results in the case are not inputs";
}

TEST(RunCase, ShapesThatLie) {
    const auto broken = [](HostTensor x) {
        Case c = toy_case();
        c.tensors["x"] = std::move(x);
        return run_broken(c);
    };
    expect_error(broken(filled({12})), "x: has 1 axes, must have 2");
    expect_error(broken({{3, 4}, {1.0}}), "x: has 1 values, its extents ask for 12");
    expect_error(broken({{-1, 0}, {}}), "x: has an extent of -1");
    expect_error(broken({{0, Index{1} << 62}, {}}), "x: has an extent of 4611686018427387904");
    expect_error(broken({{Index{1} << 40, Index{1} << 40}, {}}), "x: has an extent of");
    EXPECT_TRUE(broken({{0, Index{1} << 20}, {}}).ok());
    EXPECT_TRUE(broken({{0, 0}, {}}).ok());

    // Two extents that are small enough, but not together.
    const auto broken_s4d = [](const char* name, HostTensor tensor) {
        Case c = s4d_case(), results;
        c.tensors[name] = std::move(tensor);
        return run_case<s4d::Operator, double, double>(reference{}, {}, c, results);
    };
    expect_error(broken_s4d("u", {{Index{1} << 20, Index{1} << 20, 0}, {}}),
                 "u: is empty, its other extents have product 1.1e+12");
    expect_error(broken_s4d("B", filled({3, 2, 4})), "the last of 2 (re, im)");
}

TEST(RunCase, IntegersMustBeIntegers) {
    for (const double bad : {1.5, nan, inf, 2147483648.0, -2147483649.0}) {
        Case c = toy_case();
        c.tensors["counts"] = {{3}, {0.0, bad, 2.0}};
        expect_error(run_broken(c), "counts: element 1 is");
    }
    Case c = toy_case();
    c.tensors["counts"] = {{3}, {-2147483648.0, 2147483647.0, -0.0}};
    EXPECT_TRUE(run_broken(c).ok());
}

TEST(RunCase, MemoryLimit) {
    for (const Layout layout : every_layout) {
        expect_error(run_broken(toy_case(), {.layout = layout, .memory_limit = 100}), "bytes of memory");
        EXPECT_TRUE(run_broken(toy_case(), {.layout = layout, .memory_limit = 400}).ok());
    }
}

TEST(RunCase, BackwardThatAnExecutorLacks) {
    Case c = toy_case();
    c.tensors["dout.y"] = filled({3, 4});
    expect_error(run_broken(c), "no backward");
    EXPECT_TRUE(run_broken(c, {.backward = false}).ok());
}

TEST(RunCase, OutputsThatOptionsTakeAway) {
    Case with, without;
    ASSERT_TRUE((run_case<toy::Operator, double, double>(reference{}, {}, toy_case(), with).ok()));
    EXPECT_TRUE(with.tensors.contains("out.first"));
    Case c = toy_case();
    c.options["secondary"] = "false";
    toy::Options options;
    ASSERT_TRUE(parse_options<toy::Operator>(c, options).ok());
    ASSERT_TRUE((run_case<toy::Operator, double, double>(reference{}, options, c, without).ok()));
    EXPECT_FALSE(without.tensors.contains("out.first"));
    c.options["primary"] = "false";
    expect_error(parse_options<toy::Operator>(c, options), "option primary");
}

// Comparing tensors.

TensorError compare_values(std::vector<double> got, std::vector<double> want,
                           const std::string& name = "out.y") {
    const auto n = static_cast<Index>(want.size());
    return compare(name, {{n}, std::move(got)}, {{n}, std::move(want)});
}

TEST(Compare, RelativeAndAbsolute) {
    EXPECT_DOUBLE_EQ(compare_values({3.0, 4.5}, {3.0, 4.0}).relative, 0.1);
    EXPECT_DOUBLE_EQ(compare_values({3.0, 4.5}, {3.0, 4.0}).largest, 0.5);
    EXPECT_DOUBLE_EQ(compare_values({0.0, 0.25}, {0.0, 0.0}).relative, 0.25);
    EXPECT_DOUBLE_EQ(compare_values({}, {}).relative, 0.0);
    EXPECT_EQ(compare_values({1e300}, {-1e300}).relative, inf) << "sums that overflow must not pass";
}

TEST(Compare, NotFinite) {
    EXPECT_FALSE(compare_values({nan}, {nan}).finite);
    EXPECT_FALSE(compare_values({nan}, {1.0}).finite);
    EXPECT_FALSE(compare_values({inf}, {inf}).finite);
    EXPECT_FALSE(compare_values({-inf}, {-inf}).finite);
    EXPECT_TRUE(compare_values({-inf, 1.0}, {-inf, 1.0}, "out.lse").finite) << "a row that reads nothing";
    EXPECT_FALSE(compare_values({inf}, {inf}, "out.lse").finite);
    EXPECT_FALSE(compare_values({-inf}, {1.0}, "out.lse").finite);
    EXPECT_FALSE(compare_values({1.0}, {-inf}, "out.lse").finite);
}

TEST(Compare, Shapes) {
    const std::vector<double> six(6);
    EXPECT_TRUE(compare("out.y", {{2, 3}, six}, {{2, 3}, six}).finite);
    EXPECT_FALSE(compare("out.y", {{2, 3}, six}, {{3, 2}, six}).finite);
    EXPECT_FALSE(compare("out.y", {{6}, {}}, {{6}, six}).finite) << "fewer values than its extents say";
}

}  // namespace
}  // namespace interstate
