// The CPU executor against the float64 reference: every method, dtype, option and instruction set, sizes around
// every tile, states, packing, strides, threads, pieces and steps, and the numerics that the page promises.
#include <array>

#include <gtest/gtest.h>

#include <interdomain/interdomain.hpp>

#include "../support/isas.hpp"
#include "../support/sanitized.hpp"
#include "interdomain_cases.hpp"

namespace interstate::test {
namespace {

using interdomain::Discretization;
using interdomain::Method;
using interdomain::Normalizer;
using interdomain::Operator;
using interdomain::Options;
using interdomain::Readout;

constexpr Method methods[] = {Method::chunked, Method::scan, Method::parallel_scan, Method::fft};

/// Under AddressSanitizer everything takes fifty times as long: fewer and shorter cases of what there are many.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool sanitized = true;
#else
constexpr bool sanitized = false;
#endif

Options with(Options options, Method method) {
    options.method = method;
    return options;
}

/// The same inputs on the reference once, and then on the CPU in several ways.
template <class T, class P = param_t<T>>
class Truth {
  public:
    explicit Truth(const Case& c, Options options = {}) : in_(rounded<Operator, T, P>(c)), options_(options) {
        const Status status = run_case<Operator, double, double>(reference{}, options, in_, want_);
        EXPECT_TRUE(status.ok()) << status.message();
    }
    void expect(Method method, cpu exec, RunOptions run = {}, double loosen = 1.0) const {
        Case got;
        const Status status = run_case<Operator, T, P>(exec, with(options_, method), in_, got, run);
        ASSERT_TRUE(status.ok()) << status.message();
        EXPECT_EQ((beyond_tolerance<T, P>(in_, got, want_, loosen)), "")
            << to_string(method) << " " << to_string(dtype_of<T>) << " " << to_string(exec.isa)
            << " L=" << in_.tensors.at("q").extent[1] << " Hq=" << in_.tensors.at("q").extent[2]
            << " Hkv=" << in_.tensors.at("k").extent[2] << " R=" << in_.tensors.at("q").extent[3]
            << " d=" << in_.tensors.at("v").extent[3] << " M=" << in_.tensors.at("im").extent[1];
    }
    void expect_of_every_method(cpu exec, RunOptions run = {}, double loosen = 1.0) const {
        for (const Method method : methods) expect(method, exec, run, loosen);
    }

  private:
    Case in_, want_;
    Options options_;
};

template <class F>
void in_every_dtype(F&& f) {
    f.template operator()<f64, double>();
    f.template operator()<f32, float>();
    if constexpr (!sanitized) f.template operator()<f16, float>();
    f.template operator()<bf16, float>();
}

TEST(InterdomainCpu, EveryLengthAroundTheTiles) {
    for (const Index L : {0, 1, 2, 5, 6, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 193, 255, 256, 257, 509, 513}) {
        const Truth<f32> truth(
            make({.length = L, .query_heads = 2, .features = 3, .value_dim = 5, .modes = 4}, 100 + L));
        for (const Isa isa : isas()) truth.expect_of_every_method({.threads = 2, .isa = isa});
    }
}

/// Instruction sets of the i-th case of a test, where sanitized one of them, in turn.
std::vector<Isa> isas_of(std::size_t i) {
    if (sanitized) return {isas()[i % isas().size()]};
    return isas();
}

TEST(InterdomainCpu, EveryDtypeAndSize) {
    std::size_t number = 0;
    for (const auto& [R, d, M] : std::vector<std::array<Index, 3>>{
             {1, 1, 1}, {4, 7, 8}, {15, 16, 17}, {16, 15, 9}, {17, 33, 16}, {3, 64, 31}, {65, 2, 33}, {8, 8, 70}}) {
        ++number;  // so that a dtype does not meet the same one each time
        in_every_dtype([&]<class T, class P>() {
            const Truth<T, P> truth(
                make({.length = 70, .query_heads = 2, .kv_heads = 1, .features = R, .value_dim = d, .modes = M}, R + d));
            // A gradient of few numbers may be a sum that cancels.
            for (const Isa isa : isas_of(number++)) truth.expect_of_every_method({.threads = 2, .isa = isa}, {}, M == 1 ? 4.0 : 1.0);
        });
    }
}

TEST(InterdomainCpu, GroupsBatchesAndHeads) {
    for (const auto& [B, Hq, Hkv] : std::vector<std::array<Index, 3>>{{1, 4, 1}, {3, 2, 2}, {2, 6, 3}, {20, 1, 1}, {2, 3, 3}}) {
        const Truth<f32> truth(make({.batch = B, .length = 67, .query_heads = Hq, .kv_heads = Hkv}, 7 * B + Hq));
        for (const int threads : {1, 3}) truth.expect_of_every_method({.threads = threads});
    }
}

TEST(InterdomainCpu, EveryOption) {
    for (const auto disc : {Discretization::zoh, Discretization::raw})
        for (const auto readout : {Readout::complex_product, Readout::real_parts}) {
            const Options options{.disc = disc, .readout = readout};
            const Case c = make({.batch = 2, .length = 140, .query_heads = 2, .kv_heads = 2, .features = 5, .value_dim = 6,
                                 .modes = 5}, 8);
            in_every_dtype([&]<class T, class P>() { Truth<T, P>(c, options).expect_of_every_method({}); });
            Truth<f32, double>(c, options).expect_of_every_method({});
            Truth<bf16, double>(c, options).expect_of_every_method({});
            Truth<f64, float>(c, options).expect_of_every_method({});
        }
}

/// The denominator of eq. 6 changes sign, so that only float64 has a tolerance, and not the usual one. The widths are
/// those where the column of ones begins a new vector, and where it does not.
TEST(InterdomainCpu, NormalizerInFloat64) {
    for (const auto readout : {Readout::complex_product, Readout::real_parts})
        for (const bool packed : {false, true})
            for (const Index d : {3, 16}) {
                InterdomainCase o{.batch = packed ? 1 : 2, .length = 90, .query_heads = 2, .features = 4, .value_dim = d,
                                  .modes = 5, .normalizer = true};
                if (packed) o.cu_seqlens = {2, 2, 30, 85};
                const Truth<f64> truth(make(o, 31 + d), {.readout = readout, .normalizer = Normalizer::nadaraya_watson});
                for (const Isa isa : isas()) truth.expect_of_every_method({.isa = isa}, {}, 1e3);
            }
}
/// Positive features and modes keep it away from zero: outputs of float then have their usual tolerance. (Not so
/// gradients, where (11) leaves the difference of nearly equal sums.)
TEST(InterdomainCpu, NormalizerOfPositiveFeaturesInFloat) {
    Case c = make({.length = 300, .query_heads = 2, .features = 6, .value_dim = 16, .modes = 4, .initial_state = false,
                   .upstream = false, .normalizer = true}, 17);
    for (const char* name : {"q", "k"})
        for (double& x : c.tensors[name].values) x = std::abs(x) + 0.1;
    for (double& x : c.tensors["im"].values) x = 0.0;
    for (std::size_t i = 0; i < c.tensors["B"].values.size(); ++i) c.tensors["B"].values[i] = i % 2 == 0 ? 1.0 : 0.0;
    for (std::size_t i = 0; i < c.tensors["C"].values.size(); ++i) c.tensors["C"].values[i] = i % 10 == 0 ? 1.0 : 0.0;
    for (const auto readout : {Readout::complex_product, Readout::real_parts})
        Truth<f32>(c, {.readout = readout, .normalizer = Normalizer::nadaraya_watson}).expect_of_every_method({});
}

TEST(InterdomainCpu, EmptySizesAreLegal) {
    for (const auto& [B, L, Hq, Hkv, R, d, M] : std::vector<std::array<Index, 7>>{
             {0, 5, 1, 1, 2, 2, 2}, {2, 0, 1, 1, 2, 2, 2}, {2, 5, 0, 0, 2, 2, 2}, {2, 70, 0, 1, 2, 2, 2},
             {2, 70, 1, 1, 0, 2, 2}, {2, 70, 1, 1, 2, 0, 2}, {2, 70, 1, 1, 2, 2, 0}, {2, 70, 2, 1, 0, 0, 0}}) {
        const Truth<f32> truth(make({.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .features = R, .value_dim = d,
                                     .modes = M}, 3));
        for (const int threads : {1, 8}) truth.expect_of_every_method({.threads = threads});
    }
}

/// Extents of empty tensors mean nothing: no product of them overflows, and little memory is asked for.
TEST(InterdomainCpu, HugeExtentsOfNothingNeedLittleMemory) {
    const Index huge = 0x7fffffff;
    for (const interdomain::Shape& shape :
         {interdomain::Shape{.batch = 0, .length = huge, .query_heads = huge, .kv_heads = 1, .features = huge, .value_dim = huge,
                             .modes = 4},
          interdomain::Shape{.batch = huge, .length = huge, .query_heads = 0, .kv_heads = 0, .features = huge, .value_dim = huge,
                             .modes = huge}})
        for (const Method method : methods) {
            EXPECT_TRUE(validate(shape).ok());
            for (const pass p : {pass::forward, pass::backward, pass::step})
                EXPECT_LT(workspace_size(cpu{.threads = 2}, with({}, method), shape, p), std::size_t{1} << 22);
            EXPECT_LT(saved_size(cpu{}, with({}, method), shape), std::size_t{1} << 22);
        }
}

TEST(InterdomainCpu, StatesAreOptionalOneByOne) {
    for (const bool x0 : {false, true})
        for (const bool dxT : {false, true}) {
            Case c = make({.batch = 2, .length = 300, .initial_state = x0}, 77);
            if (!dxT) c.tensors.erase("dout.xT");
            const Truth<f32> truth(c);
            for (const int threads : {1, 8}) truth.expect_of_every_method({.threads = threads});
        }
}

TEST(InterdomainCpu, AnyStrides) {
    const Case c = make({.batch = 2, .length = 80, .query_heads = 4, .kv_heads = 2, .features = 19, .value_dim = 18, .modes = 6}, 12);
    for (const Layout layout : {Layout::reversed, Layout::padded})
        in_every_dtype([&]<class T, class P>() { Truth<T, P>(c).expect_of_every_method({.threads = 2}, {.layout = layout}); });
}

TEST(InterdomainCpu, PackedSequencesWithNaNNeighboursAndMargins) {
    const std::vector<double> cu{3, 3, 40, 41, 300, 300, 700};
    const Index L = 710, Hq = 2, R = 3, d = 4, S = 6, state = 4 * (R + d) * 2;
    const Case clean = make({.length = L, .query_heads = Hq, .features = R, .value_dim = d, .cu_seqlens = cu}, 4);
    const auto poison = [&](Case& c, double value, auto&& in) {
        for (const auto& [name, row] : {std::pair{"q", Hq * R}, {"k", R}, {"v", d}, {"dout.o", Hq * d}})
            for (Index t = 0; t < L; ++t)
                if (in(t)) std::fill_n(c.tensors[name].values.begin() + t * row, row, value);
    };
    for (const double value : {0.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
        Case c = clean;
        if (value != 0.0) poison(c, value, [](Index t) { return t < 3 || t >= 700; });
        in_every_dtype([&]<class T, class P>() { Truth<T, P>(c).expect_of_every_method({.threads = 2}); });
    }
    // A sequence full of NaN changes nothing in the others.
    Case dirty = clean;
    poison(dirty, std::nan(""), [](Index t) { return t >= 41 && t < 300; });
    for (const Method method : methods)
        for (const int threads : {1, 64}) {
            Case want, got;
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{threads}, with({}, method), clean, want).ok()));
            ASSERT_TRUE((run_case<Operator, float, float>(cpu{threads}, with({}, method), dirty, got).ok()));
            for (const char* name : {"out.xT", "grad.x0"})
                for (Index i = 0; i < S * state; ++i)
                    if (i / state != 3) {
                        ASSERT_EQ(got.tensors[name].values[i], want.tensors[name].values[i]) << name;
                    }
            for (const auto& [name, row] : {std::pair{"out.o", Hq * d}, {"grad.q", Hq * R}, {"grad.k", R}, {"grad.v", d}})
                for (Index i = 0; i < L * row; ++i) {
                    const double x = got.tensors[name].values[i];
                    if (i / row >= 41 && i / row < 300)
                        ASSERT_TRUE(std::isnan(x)) << name << i / row;
                    else
                        ASSERT_EQ(x, want.tensors[name].values[i]) << name << i / row;
                }
        }
}

/// Not so for fft: a transform mixes all tokens of a sequence.
TEST(InterdomainCpu, NothingReachesEarlierTokens) {
    const Index L = 400, R = 3, d = 4;
    const Case clean = make({.length = L, .features = R, .value_dim = d}, 9);
    for (const Method method : {Method::chunked, Method::scan, Method::parallel_scan}) {
        Case want;
        ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, with({}, method), clean, want).ok()));
        for (const double poison : {std::nan(""), std::numeric_limits<double>::infinity()})
            for (const Index at : {0, 5, 6, 64, 100, 255, 256, 399})
                for (const auto& [name, row] : {std::pair{"k", R}, {"v", d}}) {
                    Case c = clean, got;
                    std::fill_n(c.tensors[name].values.begin() + at * row, row, poison);
                    ASSERT_TRUE((run_case<Operator, float, float>(cpu{}, with({}, method), c, got).ok()));
                    for (Index i = 0; i < at * d; ++i)
                        ASSERT_EQ(got.tensors["out.o"].values[i], want.tensors["out.o"].values[i]) << name << at;
                    for (Index i = 0; i < at * R; ++i)
                        ASSERT_EQ(got.tensors["grad.q"].values[i], want.tensors["grad.q"].values[i]) << name << at;
                    EXPECT_FALSE(std::isfinite(got.tensors["out.o"].values[at * d]));
                }
    }
}

TEST(InterdomainCpu, SameBitsForAnyThreadCountAndRun) {
    const std::vector<double> cu{1, 10, 20, 20, 900, 990, 1500};
    for (const bool packed : {false, true})
        for (const Index B : sanitized ? std::vector<Index>{3} : std::vector<Index>{1, 3}) {
            InterdomainCase o{.batch = packed ? 1 : B, .length = packed ? 1510 : 2500 / B, .query_heads = 2, .kv_heads = B,
                              .features = 5, .value_dim = 3, .modes = 4};
            o.query_heads = 2 * B;
            if (packed) o.cu_seqlens = cu;
            const Case c = make(o, 21);
            for (const Method method : methods) {
                Case first;
                ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = 1}, with({}, method), c, first).ok()));
                for (const int threads : sanitized ? std::vector<int>{7} : std::vector<int>{1, 2, 3, 7, 40}) {
                    Case again;
                    ASSERT_TRUE((run_case<Operator, float, float>(cpu{.threads = threads}, with({}, method), c, again).ok()));
                    for (const auto& [name, tensor] : first.tensors)
                        EXPECT_EQ(tensor.values, again.tensors.at(name).values)
                            << name << " with " << threads << " threads, " << to_string(method);
                }
            }
        }
}

/// Shapes, options and inputs at random: every method finds the same.
TEST(InterdomainCpu, MethodsAgreeOnRandomCases) {
    Random r(2026);
    const auto up_to = [&](Index n) { return r.up_to(n); };
    for (int trial = 0; trial < (sanitized ? 5 : 30); ++trial) {
        const Index Hkv = 1 + up_to(2);
        InterdomainCase o{.batch = 1 + up_to(2), .length = up_to(400), .query_heads = Hkv * (1 + up_to(2)), .kv_heads = Hkv,
                          .features = 1 + up_to(11), .value_dim = 1 + up_to(18), .modes = 3 + up_to(9),
                          .initial_state = up_to(1) == 1, .decay = std::pow(10.0, r.uniform(-3.0, 1.0))};
        if (up_to(2) == 0) {
            o.batch = 1;
            o.cu_seqlens = r.offsets(o.length);
        }
        const Case c = make(o, 1000 + trial);
        const Options options{.disc = up_to(1) == 1 ? Discretization::zoh : Discretization::raw,
                              .readout = up_to(1) == 1 ? Readout::complex_product : Readout::real_parts};
        const cpu exec{.threads = static_cast<int>(1 + up_to(8)),
                       .isa = isas()[static_cast<std::size_t>(up_to(static_cast<Index>(isas().size()) - 1))]};
        Truth<f64>(c, options).expect_of_every_method(exec);
        Truth<f32>(c, options).expect_of_every_method(exec);
        const Truth<bf16> truth(c, options);
        for (const Method method : {Method::automatic, Method::chunked}) truth.expect(method, exec);
    }
}

/// Steps from 1e-5, where nothing decays and states gather all tokens, to 20, where nothing is left of the last
/// token but what Bbar keeps.
TEST(InterdomainCpu, AnyStepSizeAtLongLengths) {
    for (const double dt : {1e-5, 1e-3, 0.1, 20.0})
        for (const Index L : sanitized ? std::vector<Index>{600} : std::vector<Index>{4096, 10007}) {
            Case c = make({.length = L, .features = 3, .value_dim = 3, .modes = 4}, 31);
            for (double& x : c.tensors["log_dt"].values) x = std::log(dt);
            const Truth<f32> truth(c);
            for (const Method method : methods) truth.expect(method, {});
            truth.expect(Method::chunked, {.threads = 40});
            Truth<f64>(c).expect(Method::chunked, {});
        }
}
/// Slowly decaying modes at 65,536 tokens, as docs/ops/s4d.md, "Phase", has them.
TEST(InterdomainCpu, PhaseHoldsOverSixtyFiveThousandTokens) {
    Case c = make({.length = sanitized ? 4096 : 65536, .features = 2, .value_dim = 2, .modes = 2, .decay = 1e-4}, 31);
    for (double& x : c.tensors["log_dt"].values) x = -4.6;
    const Truth<f32> truth(c);
    truth.expect(Method::chunked, {});
    truth.expect(Method::parallel_scan, {});
    Truth<f64>(c).expect(Method::fft, {}, {}, 2.0);
}

TEST(InterdomainCpu, ExtremeDecay) {
    for (const double decay : {0.0, 1e-30, 1e4, 1e8, 1e30}) {
        Case c = make({.length = 300, .query_heads = 2}, 5);
        for (double& x : c.tensors["log_neg_re"].values) x = decay == 0.0 ? -1e4 : std::log(decay);
        Truth<f32>(c).expect_of_every_method({});
        Truth<f64>(c).expect_of_every_method({});
    }
}

TEST(InterdomainCpu, HugeTinyAndZeroInputs) {
    for (const double scale : {0.0, 1e-6, 1e6}) {
        Case c = make({.length = 140, .query_heads = 2, .initial_state = false}, 6);
        for (const char* name : {"q", "k", "v", "dout.o", "dout.xT"})
            for (double& x : c.tensors[name].values) x *= scale;
        Truth<f32>(c).expect_of_every_method({});
    }
}

/// A view that is null is not computed, and what is computed does not depend on which others are.
TEST(InterdomainCpu, GradientsOneByOne) {
    const Index B = 1, L = 300, Hq = 2, Hkv = 1, R = 3, d = 4, M = 3, W = R + d;
    const Case c = make({.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .features = R, .value_dim = d, .modes = M}, 14);
    const auto real = [&](const char* name) {
        const auto& v = c.tensors.at(name).values;
        return std::vector<float>(v.begin(), v.end());
    };
    const auto pairs = [&](const char* name) {
        const auto& v = c.tensors.at(name).values;
        std::vector<complex<float>> z;
        for (std::size_t i = 0; i < v.size(); i += 2) z.push_back({static_cast<float>(v[i]), static_cast<float>(v[i + 1])});
        return z;
    };
    const auto q = real("q"), k = real("k"), v = real("v"), dO = real("dout.o"), log_dt = real("log_dt"),
               log_neg_re = real("log_neg_re"), im = real("im");
    const auto Bs = pairs("B"), Cs = pairs("C"), x0 = pairs("x0"), dxT = pairs("dout.xT");
    const interdomain::Inputs<float> in{
        .q = view(q.data(), {B, L, Hq, R}), .k = view(k.data(), {B, L, Hkv, R}), .v = view(v.data(), {B, L, Hkv, d}),
        .params = {view(log_dt.data(), {Hkv}), view(log_neg_re.data(), {Hkv, M}), view(im.data(), {Hkv, M}),
                   view(Bs.data(), {Hkv, M}), view(Cs.data(), {Hkv, M, M})},
        .x0 = view(x0.data(), {B, Hkv, M, W})};
    const interdomain::Upstream<float> upstream{.o = view(dO.data(), {B, L, Hq, d}), .xT = view(dxT.data(), {B, Hkv, M, W})};
    std::vector<float> o(B * L * Hq * d);
    const interdomain::Outputs<float> out{.o = view(o.data(), {B, L, Hq, d})};
    constexpr int parts = 9;
    // Gradient number `which`, or all of them (-1), in one array of floats each.
    const auto run = [&](Method method, int threads, int which) {
        std::vector<std::vector<float>> g(parts);
        interdomain::Grads<float> grads{};
        int at = 0;
        visit(grads, shape_of(in), [&]<class E, int Rank>(const char* name, View<E, Rank>& x, const Index(&extent)[Rank], Need) {
            if (std::string_view(name) == "eta0") return;
            const int number = at++;
            if (which >= 0 && which != number) return;
            Index n = 1;
            for (const Index e : extent) n *= e;
            g[number].assign(static_cast<std::size_t>(n) * sizeof(E) / sizeof(float), std::nanf(""));
            x = view(reinterpret_cast<E*>(g[number].data()), extent);
        });
        EXPECT_EQ(at, parts);
        const cpu exec{threads};
        const Options options = with({}, method);
        std::vector<char> saved(saved_size(exec, options, shape_of(in)));
        std::vector<char> memory(std::max(workspace_size(exec, options, shape_of(in), pass::forward),
                                          workspace_size(exec, options, shape_of(in), pass::backward)));
        const Saved kept{saved.data(), saved.size()};
        const Workspace ws{memory.data(), memory.size()};
        EXPECT_TRUE(forward(exec, options, in, out, kept, ws).ok());
        EXPECT_TRUE(backward(exec, options, in, out, kept, upstream, grads, ws).ok());
        return g;
    };
    for (const Method method : methods)
        for (const int threads : {1, 8}) {
            const auto all = run(method, threads, -1);
            for (int which = 0; which < parts; ++which) {
                const auto one = run(method, threads, which);
                EXPECT_EQ(one[which], all[which]) << to_string(method) << " gradient " << which;
                for (const float x : one[which]) ASSERT_TRUE(std::isfinite(x)) << to_string(method) << " gradient " << which;
            }
        }
}

/// Rows [begin, end) of the tokens of a case.
Case piece(Case c, Index begin, Index end) {
    for (const char* name : {"q", "k", "v"}) {
        HostTensor& whole = c.tensors.at(name);
        const Index B = whole.extent[0], L = whole.extent[1], row = whole.extent[2] * whole.extent[3];
        HostTensor part{{B, end - begin, whole.extent[2], whole.extent[3]}, {}};
        for (Index b = 0; b < B; ++b) {
            const auto from = whole.values.begin() + (b * L + begin) * row;
            part.values.insert(part.values.end(), from, from + (end - begin) * row);
        }
        whole = part;
    }
    return c;
}

TEST(InterdomainCpu, PiecesThatCarryTheStateEqualOneRun) {
    const Index L = 600, row = 2 * 4;
    for (const bool normalizer : {false, true})
        for (const Method method : methods) {
            const Options options = with({.normalizer = normalizer ? Normalizer::nadaraya_watson : Normalizer::none}, method);
            const Case c = make({.length = L, .query_heads = 2, .upstream = false, .normalizer = normalizer}, 15);
            Case whole;
            ASSERT_TRUE((run_case<Operator, double, double>(cpu{}, options, c, whole).ok()));
            for (const std::vector<Index>& cuts :
                 {std::vector<Index>{0, 1, L}, {0, 64, 65, 100, 100, 257, L}, {0, 256, 512, L}, {0, 311, 312, 313, 314, L}}) {
                Case at = c, part;
                for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
                    Case in = piece(c, cuts[i], cuts[i + 1]);
                    in.tensors["x0"] = at.tensors["x0"];
                    if (normalizer) in.tensors["eta0"] = at.tensors["eta0"];
                    ASSERT_TRUE((run_case<Operator, double, double>(cpu{}, options, in, part).ok()));
                    at.tensors["x0"] = part.tensors["out.xT"];
                    if (normalizer) at.tensors["eta0"] = part.tensors["out.etaT"];
                    for (Index j = cuts[i] * row; j < cuts[i + 1] * row; ++j) {
                        const double want = whole.tensors["out.o"].values[j];
                        ASSERT_NEAR(part.tensors["out.o"].values[j - cuts[i] * row], want,
                                    (normalizer ? 1e-7 : 1e-11) * (1.0 + std::abs(want)));
                    }
                }
                EXPECT_LE(compare("xT", part.tensors["out.xT"], whole.tensors["out.xT"]).relative, 1e-12);
            }
        }
}

/// Token by token with step, on strided states, against the reference's recurrence.
template <class T, class P>
void expect_steps(const Options& options, cpu exec, Index B, Index Hq, Index Hkv, Index R, Index d, Index M, double loosen) {
    using A = acc_t<T>;
    const Index L = 40, W = R + d;
    const Case c = rounded<Operator, T, P>(make({.batch = B, .length = L, .query_heads = Hq, .kv_heads = Hkv, .features = R,
                                                 .value_dim = d, .modes = M, .upstream = false,
                                                 .normalizer = options.normalized()}, R + d + M));
    Case want, got;
    ASSERT_TRUE((run_case<Operator, double, double>(reference{}, options, c, want).ok()));
    const auto real = [&]<class E>(E, const char* name) {
        std::vector<E> x;
        for (const double value : c.tensors.at(name).values) x.push_back(E(value));
        return x;
    };
    const auto pairs = [&]<class E>(E, const char* name) {
        const auto& v = c.tensors.at(name).values;
        std::vector<complex<E>> z;
        for (std::size_t i = 0; i < v.size(); i += 2) z.push_back({static_cast<E>(v[i]), static_cast<E>(v[i + 1])});
        return z;
    };
    const auto log_dt = real(P{}, "log_dt"), log_neg_re = real(P{}, "log_neg_re"), im = real(P{}, "im");
    const auto Bs = pairs(P{}, "B"), Cs = pairs(P{}, "C");
    const auto q = real(T{}, "q"), k = real(T{}, "k"), v = real(T{}, "v");
    const interdomain::Params<P> params{view(log_dt.data(), {Hkv}), view(log_neg_re.data(), {Hkv, M}), view(im.data(), {Hkv, M}),
                                        view(Bs.data(), {Hkv, M}), view(Cs.data(), {Hkv, M, M})};
    std::vector<complex<double>> Lam(Hkv * M), Bbar(Hkv * M);
    const interdomain::Discrete<P> discrete{view(Lam.data(), {Hkv, M}), view(Bbar.data(), {Hkv, M}), params.C};
    ASSERT_TRUE(discretize(exec, options, params, discrete).ok());
    for (const bool strided : {false, true}) {
        // Strided: columns are the slowest axis.
        const Index step = strided ? B * Hkv * M : 1;
        std::vector<complex<A>> x(B * Hkv * M * W), eta = options.normalized() ? pairs(A{}, "eta0") : std::vector<complex<A>>{};
        const auto x0 = pairs(A{}, "x0");
        interdomain::State<A> state{
            .x = strided ? view(x.data(), {B, Hkv, M, W}, {Hkv * M, M, 1, step}) : view(x.data(), {B, Hkv, M, W})};
        for (Index i = 0; i < B * Hkv * M * W; ++i) state.x(i / (Hkv * M * W), i / (M * W) % Hkv, i / W % M, i % W) = x0[i];
        if (options.normalized()) state.eta = view(eta.data(), {B, Hkv, M});
        HostTensor& o = got.tensors["out.o"] = {{B, L, Hq, d}, std::vector<double>(B * L * Hq * d)};
        std::vector<T> row(B * Hq * d);
        for (Index t = 0; t < L; ++t) {
            const auto token_of = [&](const std::vector<T>& from, Index heads, Index size) {
                return View<const T, 3>{from.data() + t * heads * size, {B, heads, size}, {L * heads * size, size, 1}};
            };
            const interdomain::Token<T> token{token_of(q, Hq, R), token_of(k, Hkv, R), token_of(v, Hkv, d)};
            const interdomain::TokenOut<T> out{view(row.data(), {B, Hq, d})};
            std::vector<char> memory(workspace_size(exec, options, shape_of(discrete, token), pass::step));
            if (t == 0) {
                EXPECT_EQ(interdomain::step(exec, options, discrete, state, token, out, Workspace{memory.data(), memory.size() - 1}).code(),
                          StatusCode::workspace_too_small);
            }
            ASSERT_TRUE(interdomain::step(exec, options, discrete, state, token, out, Workspace{memory.data(), memory.size()}).ok());
            for (Index b = 0; b < B; ++b)
                for (Index i = 0; i < Hq * d; ++i)
                    o.values[(b * L + t) * Hq * d + i] = static_cast<double>(row[b * Hq * d + i]);
        }
        HostTensor& xT = got.tensors["out.xT"] = {{B, Hkv, M, W, 2}, {}};
        for (Index i = 0; i < B * Hkv * M * W; ++i) {
            const auto z = state.x(i / (Hkv * M * W), i / (M * W) % Hkv, i / W % M, i % W);
            xT.values.insert(xT.values.end(), {static_cast<double>(z.re), static_cast<double>(z.im)});
        }
        for (const char* name : {"out.o", "out.xT"}) {
            const TensorError e = compare(name, got.tensors[name], want.tensors[name]);
            EXPECT_TRUE(e.finite) << name;
            EXPECT_LE(e.relative, loosen * tolerance<T>(name, want.tensors[name]))
                << name << " " << to_string(dtype_of<T>) << " " << to_string(exec.isa) << " M=" << M;
        }
    }
}

TEST(InterdomainCpu, StepsEqualOneRun) {
    for (const Isa isa : isas())
        for (const auto disc : {Discretization::zoh, Discretization::raw})
            for (const auto readout : {Readout::complex_product, Readout::real_parts}) {
                const Options options{.disc = disc, .readout = readout};
                const cpu exec{.threads = 3, .isa = isa};
                expect_steps<f64, double>(options, exec, 2, 4, 2, 5, 7, 6, 1.0);
                expect_steps<f32, float>(options, exec, 2, 4, 2, 16, 8, 17, 1.0);
                expect_steps<f32, double>(options, exec, 1, 1, 1, 1, 1, 1, 1.0);
                if constexpr (!sanitized) expect_steps<f16, float>(options, exec, 1, 2, 1, 9, 33, 4, 1.0);
                expect_steps<bf16, float>(options, exec, 3, 3, 3, 3, 2, 40, 1.0);
                Options normalized = options;
                normalized.normalizer = Normalizer::nadaraya_watson;
                expect_steps<f64, double>(normalized, exec, 2, 4, 2, 5, 8, 6, 1e3);
            }
    // Enough of them to be shared by threads.
    expect_steps<f32, float>({}, {.threads = 4}, 8, 2, 2, 64, 64, 64, 1.0);
}

/// NaN in one column of a token's values stays in that column of o, whatever lies beside it in a vector.
TEST(InterdomainCpu, StepKeepsColumnsApart) {
    const Index R = 3, d = 3, M = 2;
    std::vector<complex<double>> Lam(M, {0.5, 0.1}), Bbar(M, {1.0, 0.0});
    std::vector<complex<float>> C(M * M, {0.3f, 0.2f}), x(M * (R + d));
    std::vector<float> q{1, 2, 3}, k{3, 2, 1}, v{1, std::nanf(""), 2}, o(d);
    const interdomain::Discrete<float> discrete{view(Lam.data(), {1, M}), view(Bbar.data(), {1, M}),
                                                view(static_cast<const complex<float>*>(C.data()), {1, M, M})};
    const interdomain::Token<float> token{view(static_cast<const float*>(q.data()), {1, 1, R}),
                                          view(static_cast<const float*>(k.data()), {1, 1, R}),
                                          view(static_cast<const float*>(v.data()), {1, 1, d})};
    for (const Isa isa : isas()) {
        const cpu exec{.threads = 1, .isa = isa};
        std::vector<char> memory(workspace_size(exec, Options{}, shape_of(discrete, token), pass::step));
        ASSERT_TRUE(interdomain::step(exec, Options{}, discrete, interdomain::State<float>{view(x.data(), {1, 1, M, R + d})},
                                      token, {view(o.data(), {1, 1, d})}, Workspace{memory.data(), memory.size()})
                        .ok());
        EXPECT_TRUE(std::isfinite(o[0]) && std::isnan(o[1]) && std::isfinite(o[2])) << to_string(isa);
    }
}

TEST(InterdomainCpu, ErrorsNameTheArgumentAndTouchNothing) {
    const Index L = 70, H = 2, R = 3, d = 4, M = 3;
    std::vector<float> q(L * H * R), v(L * H * d), o(L * H * d, 7.0f), log_dt(H), rows(H * M);
    std::vector<complex<float>> B(H * M), C(H * M * M);
    const auto in_view = [](const std::vector<float>& x, Index l, Index h, Index n) {
        return view(x.data(), {Index{1}, l, h, n});
    };
    const interdomain::Inputs<float> in{.q = in_view(q, L, H, R), .k = in_view(q, L, H, R), .v = in_view(v, L, H, d),
                                        .params = {view(std::as_const(log_dt).data(), {H}), view(std::as_const(rows).data(), {H, M}),
                                                   view(std::as_const(rows).data(), {H, M}), view(std::as_const(B).data(), {H, M}),
                                                   view(std::as_const(C).data(), {H, M, M})}};
    const interdomain::Outputs<float> out{.o = view(o.data(), {Index{1}, L, H, d})};
    const auto untouched = [&] {
        for (const float x : o)
            if (x != 7.0f) return false;
        return true;
    };
    for (const Method method : methods) {
        const cpu exec{.threads = 2};
        const Options options = with({}, method);
        std::vector<char> memory(workspace_size(exec, options, shape_of(in), pass::forward));
        const Workspace ws{memory.data(), memory.size()};
        const Status small = forward(exec, options, in, out, Saved{}, Workspace{memory.data(), memory.size() - 1});
        EXPECT_EQ(small.code(), StatusCode::workspace_too_small);
        EXPECT_NE(std::string(small.message()).find("must have " + std::to_string(memory.size())), std::string::npos);
        const interdomain::Upstream<float> upstream{.o = in_view(v, L, H, d)};
        std::vector<char> back(workspace_size(exec, options, shape_of(in), pass::backward));
        if (method != Method::fft) {
            EXPECT_EQ(forward(exec, options, in, out, Saved{memory.data(), 1}, ws).code(), StatusCode::workspace_too_small);
            const Status unsaved = backward(exec, options, in, out, Saved{}, upstream, interdomain::Grads<float>{},
                                            Workspace{back.data(), back.size()});
            EXPECT_EQ(std::string(unsaved.message()).rfind("saved:", 0), 0u);
        } else {
            EXPECT_EQ(saved_size(exec, options, shape_of(in)), 0u);
        }
        EXPECT_EQ(forward(cpu{.threads = -7}, options, in, out, Saved{}, ws).code(), StatusCode::invalid_argument);
        auto broadcast = out;
        broadcast.o.stride[1] = 0;
        EXPECT_EQ(std::string(forward(exec, options, in, broadcast, Saved{}, ws).message()),
                  "o: stride of axis 1 is 0, must not be 0 for a tensor that is written");
        std::int32_t cu[] = {0, 71};
        auto packed = in;
        packed.cu_seqlens = view(static_cast<const std::int32_t*>(cu), {2});
        EXPECT_EQ(forward(exec, options, packed, out, Saved{}, ws).code(), StatusCode::invalid_argument);
        std::vector<complex<float>> eta(H * M);
        auto with_eta = in;
        with_eta.eta0 = view(std::as_const(eta).data(), {Index{1}, H, M});
        EXPECT_EQ(forward(exec, options, with_eta, out, Saved{}, ws).code(), StatusCode::invalid_argument);
        for (const Isa isa : {Isa::avx2, Isa::avx512})
            if (!simd::machine_has(isa)) {
                EXPECT_EQ(forward(cpu{.isa = isa}, options, in, out, Saved{}, ws).code(), StatusCode::unsupported);
            }
        EXPECT_TRUE(untouched());
        EXPECT_TRUE(forward(exec, options, in, out, Saved{}, ws).ok());
        EXPECT_FALSE(untouched());
        std::fill(o.begin(), o.end(), 7.0f);
    }
}

TEST(InterdomainCpu, WhichKernelNamesMethodAndInstructionSet) {
    const interdomain::Shape shape{.batch = 1, .length = 4096, .query_heads = 8, .kv_heads = 8, .features = 64, .value_dim = 64,
                                   .modes = 64};
    for (const Isa isa : isas())
        for (const Method method : methods)
            EXPECT_EQ(std::string(which_kernel(cpu{.isa = isa}, with({}, method), shape).name),
                      std::string("interdomain.cpu.") + to_string(method) + "." + to_string(isa));
    EXPECT_EQ(std::string(which_kernel(cpu{}, Options{}, shape).name),
              which_kernel(cpu{}, with({}, Method::chunked), shape).name);
    EXPECT_NE(std::string(which_kernel(cpu{}, Options{}, shape).reason),
              which_kernel(cpu{}, with({}, Method::chunked), shape).reason);
}

/// The page, "Memory": of what grows with the length, one state for 256 tokens is kept, and where stretches are
/// tasks another one; fft's arrays are those of queries, never of states.
TEST(InterdomainCpu, TakesTheMemoryThatThePageSays) {
    const auto bytes = [](Method method, pass p, int threads, Index length) {
        const interdomain::Shape shape{.dtype = DType::f32, .batch = 1, .length = length, .query_heads = 1, .kv_heads = 1,
                                       .features = 64, .value_dim = 64, .modes = 64};
        return static_cast<Index>(workspace_size(cpu{.threads = threads}, with({}, method), shape, p));
    };
    const auto kept = [](Method method, Index length) {
        const interdomain::Shape shape{.dtype = DType::f32, .batch = 1, .length = length, .query_heads = 1, .kv_heads = 1,
                                       .features = 64, .value_dim = 64, .modes = 64};
        return static_cast<Index>(saved_size(cpu{}, with({}, method), shape));
    };
    const Index more = 256 * 1024, state = 64 * 128 * 2 * 4, long_length = 1 << 20;
    for (const Method method : {Method::chunked, Method::scan, Method::parallel_scan})
        EXPECT_EQ(kept(method, long_length + more) - kept(method, long_length), more / 256 * state);
    for (const pass p : {pass::forward, pass::backward}) {
        const auto growth = [&](Method method, int threads) {
            return bytes(method, p, threads, long_length + more) - bytes(method, p, threads, long_length);
        };
        EXPECT_EQ(growth(Method::chunked, 1), 0);
        EXPECT_EQ(growth(Method::scan, 4), 0);
        EXPECT_EQ(growth(Method::chunked, 2), more / 256 * state);
        EXPECT_EQ(growth(Method::parallel_scan, 1), more / 256 * state);
    }
    // Two lengths of one transform's size: a, w, e and p, do, and a few vectors a token.
    const auto per_token = [&](pass p) {
        return static_cast<double>(bytes(Method::fft, p, 1, 900000) - bytes(Method::fft, p, 1, 600000)) / 300000.0;
    };
    EXPECT_LE(per_token(pass::forward), 8.0 * (2 * 2 * 64 + 64));
    EXPECT_LE(per_token(pass::backward), 8.0 * (4 * 2 * 64 + 64 + 64));
}

}  // namespace
}  // namespace interstate::test
