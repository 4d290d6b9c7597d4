// The ground floor: dtypes, views, Status, options, workspaces, dispatch, DLPack, packed sequences, threads.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include <interstate/complex.hpp>
#include <interstate/cpu/isa.hpp>
#include <interstate/cpu/parallel.hpp>
#include <interstate/dispatch.hpp>
#include <interstate/dlpack.hpp>
#include <interstate/dtype.hpp>
#include <interstate/executor.hpp>
#include <interstate/options.hpp>
#include <interstate/sequences.hpp>
#include <interstate/status.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace {

using namespace interstate;

bool says(const Status& status, const char* text) {
    return std::string(status.message()).find(text) != std::string::npos;
}

// ---------------------------------------------------------------------------------------------------
// 16-bit dtypes, held against the definition of the formats in double and not against another cast.

template <class T>
struct Format;
template <>
struct Format<f16> {
    static constexpr int mantissa_bits = 10, exponent_bits = 5;
};
template <>
struct Format<bf16> {
    static constexpr int mantissa_bits = 7, exponent_bits = 8;
};

template <class T>
constexpr std::uint16_t infinity_bits = ((1 << Format<T>::exponent_bits) - 1) << Format<T>::mantissa_bits;

/// Value of a bit pattern that is not NaN; the pattern of infinity stands for the next power of two, the
/// value it would have if the format went on: so rounding to it needs no rule of its own.
template <class T>
double value_of(std::uint16_t bits) {
    constexpr int m = Format<T>::mantissa_bits, bias = (1 << (Format<T>::exponent_bits - 1)) - 1;
    const int exponent = (bits & 0x7fff) >> m, mantissa = bits & ((1 << m) - 1);
    const double magnitude = exponent == 0 ? std::ldexp(mantissa, 1 - bias - m)
                                           : std::ldexp(mantissa + (1 << m), exponent - bias - m);
    return bits & 0x8000 ? -magnitude : magnitude;
}

/// Nearest, ties to the even pattern, by looking among all values of the format.
template <class T>
std::uint16_t nearest(double x) {
    static const std::vector<double> values = [] {
        std::vector<double> all;
        for (int bits = 0; bits <= infinity_bits<T>; ++bits)
            all.push_back(value_of<T>(static_cast<std::uint16_t>(bits)));
        return all;
    }();
    const auto sign = static_cast<std::uint16_t>(std::signbit(x) ? 0x8000 : 0);
    const double magnitude = std::abs(x);
    const auto above = std::lower_bound(values.begin(), values.end(), magnitude);
    if (above == values.end()) return sign | infinity_bits<T>;
    auto at = static_cast<std::uint16_t>(above - values.begin());
    if (*above != magnitude) {
        const double down = magnitude - values[at - 1u], up = values[at] - magnitude;  // exact: close numbers
        if (down < up || (down == up && at % 2 == 1)) --at;
    }
    return sign | at;
}

template <class T>
class SixteenBits : public testing::Test {};
using SixteenBitTypes = testing::Types<f16, bf16>;
TYPED_TEST_SUITE(SixteenBits, SixteenBitTypes);

TYPED_TEST(SixteenBits, EveryPatternHasItsValueAndComesBack) {
    using T = TypeParam;
    for (int pattern = 0; pattern < 0x10000; ++pattern) {
        T x;
        x.bits = static_cast<std::uint16_t>(pattern);
        const float value = x;
        const int magnitude = pattern & 0x7fff;
        if (magnitude > infinity_bits<T>) {
            ASSERT_TRUE(std::isnan(value)) << pattern;
            ASSERT_TRUE(std::isnan(static_cast<float>(T(value)))) << pattern;
            ASSERT_TRUE(std::isnan(static_cast<float>(T(static_cast<double>(value))))) << pattern;
            ASSERT_EQ(T(value).bits & 0x8000, pattern & 0x8000) << pattern;
            continue;
        }
        if (magnitude == infinity_bits<T>)
            ASSERT_TRUE(std::isinf(value)) << pattern;
        else
            ASSERT_EQ(static_cast<double>(value), value_of<T>(x.bits)) << pattern;
        ASSERT_EQ(std::signbit(value), (pattern & 0x8000) != 0) << pattern;
        ASSERT_EQ(T(value).bits, pattern);
        ASSERT_EQ(T(static_cast<double>(value)).bits, pattern);
    }
}

TYPED_TEST(SixteenBits, RoundsToNearestEvenAtAndBesideEveryTie) {
    using T = TypeParam;
    for (int pattern = 0; pattern < infinity_bits<T>; ++pattern) {
        const double low = value_of<T>(static_cast<std::uint16_t>(pattern));
        const double high = value_of<T>(static_cast<std::uint16_t>(pattern + 1));
        const double tie = 0.5 * (low + high);
        for (const double sign : {1.0, -1.0}) {
            // The neighbours in double are where rounding to float first, and then again, goes wrong.
            for (const double x : {low, tie, std::nextafter(tie, 0.0), std::nextafter(tie, 1e300), high})
                ASSERT_EQ(T(sign * x).bits, nearest<T>(sign * x)) << std::hexfloat << sign * x;
            const auto t = static_cast<float>(tie);
            ASSERT_EQ(static_cast<double>(t), tie);
            for (const float x : {static_cast<float>(low), t, std::nextafter(t, 0.0f), std::nextafter(t, 1e38f)}) {
                const float signed_x = static_cast<float>(sign) * x;
                ASSERT_EQ(T(signed_x).bits, nearest<T>(static_cast<double>(signed_x))) << std::hexfloat << signed_x;
            }
        }
    }
}

TYPED_TEST(SixteenBits, RoundsRandomNumbersOfEveryMagnitude) {
    using T = TypeParam;
    std::mt19937_64 random(1);
    for (int i = 0; i < 200000; ++i) {
        const auto bits = static_cast<std::uint32_t>(random());
        const auto x = __builtin_bit_cast(float, bits);
        if (!std::isnan(x) && !std::isinf(x)) {
            ASSERT_EQ(T(x).bits, nearest<T>(static_cast<double>(x))) << std::hexfloat << x;
        }
        // Doubles around the range of the format, and a little beyond it on both sides.
        const double mantissa = 1.0 + static_cast<double>(random() >> 12) * 0x1.0p-52;
        const int exponent = static_cast<int>(random() % 300) - 160;
        const double y = (random() & 1 ? -1.0 : 1.0) * std::ldexp(mantissa, exponent);
        ASSERT_EQ(T(y).bits, nearest<T>(y)) << std::hexfloat << y;
    }
}

TYPED_TEST(SixteenBits, OverflowsAndUnderflowsWithTheSign) {
    using T = TypeParam;
    constexpr double inf = std::numeric_limits<double>::infinity();
    for (const double x : {1e300, 3.5e38, inf}) {
        EXPECT_EQ(T(x).bits, infinity_bits<T>) << x;
        EXPECT_EQ(T(-x).bits, 0x8000 | infinity_bits<T>) << x;
    }
    EXPECT_EQ(T(std::numeric_limits<float>::max()).bits, infinity_bits<T>);
    EXPECT_EQ(T(1e-320).bits, 0);
    EXPECT_EQ(T(-1e-320).bits, 0x8000);
    EXPECT_EQ(T(-0.0f).bits, 0x8000);
    EXPECT_EQ(T(-0.0).bits, 0x8000);
}

TEST(DTypes, AreUsableInConstantExpressions) {
    static_assert(f16(1.0f).bits == 0x3c00 && bf16(1.0f).bits == 0x3f80);
    static_assert(f16(-2.0).bits == 0xc000 && bf16(-2.0).bits == 0xc000);
    static_assert(static_cast<float>(f16(0.5f)) == 0.5f && static_cast<float>(bf16(0.5f)) == 0.5f);
}

TEST(DTypes, NameTheirAccumulators) {
    static_assert(std::is_same_v<acc_t<f64>, double> && std::is_same_v<acc_t<const f32>, float>);
    static_assert(std::is_same_v<acc_t<f16>, float> && std::is_same_v<acc_t<const bf16>, float>);
    static_assert(dtype_of<const double> == DType::f64 && dtype_of<bf16> == DType::bf16);
    EXPECT_STREQ(to_string(DType::f64), "f64");
    EXPECT_STREQ(to_string(DType::f32), "f32");
    EXPECT_STREQ(to_string(DType::f16), "f16");
    EXPECT_STREQ(to_string(DType::bf16), "bf16");
}

TEST(Complex, AgreesWithStdComplex) {
    const complex<double> a{1.5, -2.0}, b{0.25, 3.0};
    const std::complex<double> sa{1.5, -2.0}, sb{0.25, 3.0};
    const auto same = [](complex<double> x, std::complex<double> y) {
        return std::abs(x.re - y.real()) < 1e-15 && std::abs(x.im - y.imag()) < 1e-15;
    };
    EXPECT_TRUE(same(a + b, sa + sb));
    EXPECT_TRUE(same(a - b, sa - sb));
    EXPECT_TRUE(same(a * b, sa * sb));
    EXPECT_TRUE(same(2.0 * a, 2.0 * sa));
    EXPECT_TRUE(same(conj(a), std::conj(sa)));
    EXPECT_TRUE(same(reciprocal(a), 1.0 / sa));
    EXPECT_DOUBLE_EQ(dot(a, b), (std::conj(sa) * sb).real());

    std::vector<std::complex<float>> array(3);
    as_complex(array.data())[1] = {4.0f, 5.0f};
    EXPECT_EQ(array[1], (std::complex<float>{4.0f, 5.0f}));
}

// ---------------------------------------------------------------------------------------------------

TEST(Views, ContiguousHasTheLastAxisFastest) {
    std::vector<int> data(2 * 3 * 4);
    for (std::size_t i = 0; i < data.size(); ++i) data[i] = static_cast<int>(i);
    const auto v = view(data.data(), {2, 3, 4});
    static_assert(decltype(v)::rank == 3);
    EXPECT_EQ(v.size(), 24);
    for (int i = 0; i < 2; ++i)
        for (int j = 0; j < 3; ++j)
            for (int k = 0; k < 4; ++k) EXPECT_EQ(v(i, j, k), i * 12 + j * 4 + k);
}

TEST(Views, TakeAnyStrides) {
    std::vector<int> data{0, 1, 2, 3, 4, 5};
    const auto transposed = view(data.data(), {3, 2}, {1, 3});
    EXPECT_EQ(transposed(2, 0), 2);
    EXPECT_EQ(transposed(1, 1), 4);
    const auto backwards = view(data.data() + 5, {6}, {-1});
    EXPECT_EQ(backwards(0), 5);
    EXPECT_EQ(backwards(5), 0);
    const auto broadcast = view(data.data(), {4, 2}, {0, 1});
    EXPECT_EQ(broadcast(3, 1), 1);
    broadcast(0, 1) = 9;
    EXPECT_EQ(data[1], 9);
}

TEST(Views, AbsentIsFalseAndEmptyHasNoSize) {
    EXPECT_FALSE((View<float, 2>{}));
    float x = 1.0f;
    EXPECT_TRUE(view(&x, {1}));
    EXPECT_EQ(view(&x, {3, 0, 5}).size(), 0);
}

TEST(Views, BecomeViewsOfConstants) {
    float data[6] = {1, 2, 3, 4, 5, 6};
    const View<float, 2> v = view(data, {3, 2}, {1, 3});
    const View<const float, 2> c = v;
    EXPECT_EQ(c(2, 1), 6.0f);
    EXPECT_EQ(c.stride[1], 3);
    static_assert(!std::is_convertible_v<View<const float, 2>, View<float, 2>>);
}

TEST(CheckView, NamesTheArgumentWhatItWasAndWhatItMustBe) {
    float data[8] = {};
    EXPECT_TRUE(check_view("u", view(data, {2, 4}), {2, 4}, Need::required).ok());

    Status s = check_view("u", view(data, {2, 4}), {2, 5}, Need::required);
    EXPECT_EQ(s.code(), StatusCode::invalid_argument);
    EXPECT_STREQ(s.message(), "u: extent of axis 1 is 4, must be 5");

    s = check_view("u", View<float, 2>{}, {2, 4}, Need::required);
    EXPECT_STREQ(s.message(), "u: is null, must point to 8 elements");
    EXPECT_TRUE(check_view("u", View<float, 2>{}, {2, 4}, Need::optional).ok());
    EXPECT_TRUE(check_view("u", View<float, 2>{}, {0, 4}, Need::required).ok());

    // Only what is written must not be broadcast, and an axis of one element cannot be.
    s = check_view("y", view(data, {2, 4}, {0, 1}), {2, 4}, Need::required);
    EXPECT_TRUE(says(s, "y: stride of axis 0 is 0"));
    const View<const float, 2> broadcast = view(data, {2, 4}, {0, 1});
    EXPECT_TRUE(check_view("u", broadcast, {2, 4}, Need::required).ok());
    EXPECT_TRUE(check_view("y", view(data, {1, 4}, {0, 1}), {1, 4}, Need::required).ok());
}

TEST(CheckView, WantsAlignedPointers) {
    alignas(8) char bytes[16] = {};
    const auto misaligned = view(reinterpret_cast<float*>(bytes + 1), {2});
    const Status s = check_view("u", misaligned, {2}, Need::required);
    EXPECT_STREQ(s.message(), "u: pointer must be aligned to 4 bytes");
}

struct TwoTensors {
    View<float, 1> a{}, b{};
};
template <class F>
void visit(TwoTensors& t, const Index& n, F&& f) {
    f("a", t.a, {n}, Need::required);
    f("b", t.b, {n}, Need::required);
}

TEST(CheckTensors, ReportsTheFirstThatFails) {
    float data[4] = {};
    EXPECT_TRUE(check_tensors(TwoTensors{view(data, {4}), view(data, {4})}, Index{4}).ok());
    EXPECT_STREQ(check_tensors(TwoTensors{view(data, {4}), view(data, {3})}, Index{4}).message(),
                 "b: extent of axis 0 is 3, must be 4");
    EXPECT_STREQ(check_tensors(TwoTensors{view(data, {2}), view(data, {3})}, Index{4}).message(),
                 "a: extent of axis 0 is 2, must be 4");
}

// ---------------------------------------------------------------------------------------------------

TEST(Status, IsOkUntilItSaysOtherwise) {
    const Status fine;
    EXPECT_TRUE(fine.ok());
    EXPECT_TRUE(static_cast<bool>(fine));
    EXPECT_STREQ(fine.message(), "");

    const Status bad = Status::error(StatusCode::unsupported, "%s: has %d, must have %d", "q", 3, 4);
    EXPECT_FALSE(bad.ok());
    EXPECT_FALSE(static_cast<bool>(bad));
    EXPECT_EQ(bad.code(), StatusCode::unsupported);
    EXPECT_STREQ(bad.message(), "q: has 3, must have 4");
    const Status kept = bad;
    EXPECT_STREQ(kept.message(), bad.message());
}

TEST(Status, CutsLongMessages) {
    const std::string text(1000, 'x');
    const Status s = Status::error(StatusCode::device_error, "%s", text.c_str());
    const std::string message = s.message();
    EXPECT_GT(message.size(), 150u);
    EXPECT_EQ(message, text.substr(0, message.size()));
}

TEST(Status, NamesItsCodes) {
    EXPECT_STREQ(to_string(StatusCode::ok), "ok");
    EXPECT_STREQ(to_string(StatusCode::invalid_argument), "invalid argument");
    EXPECT_STREQ(to_string(StatusCode::unsupported), "unsupported");
    EXPECT_STREQ(to_string(StatusCode::workspace_too_small), "workspace too small");
    EXPECT_STREQ(to_string(StatusCode::device_error), "device error");
}

Status counted(int& calls, bool good) {
    ++calls;
    return good ? Status{} : Status::error(StatusCode::invalid_argument, "no");
}
Status chain(bool first, bool second, int& calls, bool& reached) {
    if (calls == 0)
        INTERSTATE_RETURN_IF_ERROR(counted(calls, first));
    else  // the macro is one statement: this belongs to the `if` above
        return Status::error(StatusCode::unsupported, "called twice");
    INTERSTATE_RETURN_IF_ERROR(counted(calls, second));
    reached = true;
    return {};
}

TEST(Status, ReturnIfErrorReturnsTheFirstErrorAndEvaluatesOnce) {
    for (const bool first : {true, false})
        for (const bool second : {true, false}) {
            int calls = 0;
            bool reached = false;
            const Status s = chain(first, second, calls, reached);
            EXPECT_EQ(s.ok(), first && second);
            EXPECT_EQ(reached, first && second);
            EXPECT_EQ(calls, first ? 2 : 1);
            EXPECT_STREQ(s.message(), first && second ? "" : "no");
        }
}

// ---------------------------------------------------------------------------------------------------

struct TestLayout {
    float* a;
    double* b;
    char* c;
    explicit TestLayout(Arena& arena) : a(arena.take<float>(5)), b(arena.take<double>(100)), c(arena.take<char>(1)) {}
};

TEST(Arena, MeasuresWhatItCarvesWhateverTheAlignment) {
    Arena measure;
    const TestLayout nowhere(measure);
    EXPECT_EQ(nowhere.a, nullptr);
    EXPECT_EQ(nowhere.c, nullptr);
    const std::size_t bytes = measure.required();

    std::vector<std::byte> memory(bytes + Arena::alignment);
    for (std::size_t shift = 0; shift < Arena::alignment; ++shift) {
        std::byte* const begin = memory.data() + shift;
        Arena arena(begin);
        const TestLayout layout(arena);
        const auto inside = [&](const auto* p, std::size_t n) {
            const auto* at = reinterpret_cast<const std::byte*>(p);
            return at >= begin && at + n * sizeof(*p) <= begin + bytes &&
                   reinterpret_cast<std::uintptr_t>(p) % Arena::alignment == 0;
        };
        ASSERT_TRUE(inside(layout.a, 5) && inside(layout.b, 100) && inside(layout.c, 1)) << shift;
        ASSERT_GE(reinterpret_cast<std::byte*>(layout.b), reinterpret_cast<std::byte*>(layout.a + 5));
        ASSERT_GE(reinterpret_cast<std::byte*>(layout.c), reinterpret_cast<std::byte*>(layout.b + 100));
        ASSERT_EQ(arena.required(), bytes);
    }
}

TEST(Arena, NeedsNothingForNothing) {
    Arena arena;
    EXPECT_EQ(arena.required(), 0u);
    arena.take<double>(0);
    EXPECT_EQ(arena.required(), 0u);
}

TEST(CheckMemory, CarriesBothSizes) {
    char memory[64] = {};
    EXPECT_TRUE(check_workspace("workspace", Workspace{memory, 64}, 64).ok());
    EXPECT_TRUE(check_workspace("workspace", Workspace{}, 0).ok());
    Status s = check_workspace("workspace", Workspace{memory, 63}, 64);
    EXPECT_EQ(s.code(), StatusCode::workspace_too_small);
    EXPECT_STREQ(s.message(), "workspace: has 63 bytes, must have 64");
    s = check_memory("saved", nullptr, 64, 64);
    EXPECT_STREQ(s.message(), "saved: has 64 bytes at a null pointer, must have 64");
}

// ---------------------------------------------------------------------------------------------------

TEST(Dispatch, PicksTheFirstSizeThatHolds) {
    const auto padded = [](Index n) {
        return dispatch_size<32, 64, 128>(n, [](auto size) {
            static_assert(decltype(size)::value >= 0);  // known at compile time
            return static_cast<int>(size);
        });
    };
    EXPECT_EQ(padded(0), 32);
    EXPECT_EQ(padded(1), 32);
    EXPECT_EQ(padded(32), 32);
    EXPECT_EQ(padded(33), 64);
    EXPECT_EQ(padded(64), 64);
    EXPECT_EQ(padded(65), 128);
    EXPECT_EQ(padded(128), 128);
    EXPECT_EQ(padded(129), 0);
    EXPECT_EQ(padded(Index{1} << 40), 0);
}

TEST(Dispatch, CallsOnce) {
    int calls = 0;
    for (const Index n : {Index{1}, Index{40}, Index{200}}) dispatch_size<32, 64>(n, [&](auto) { return ++calls; });
    EXPECT_EQ(calls, 3);
}

TEST(Dispatch, NamesDtypes) {
    for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16})
        EXPECT_EQ(dispatch_dtype(dtype, []<class T>(T) { return dtype_of<T>; }), dtype);
}

TEST(Dispatch, DividesUpwards) {
    EXPECT_EQ(ceil_div(0, 64), 0);
    EXPECT_EQ(ceil_div(1, 64), 1);
    EXPECT_EQ(ceil_div(64, 64), 1);
    EXPECT_EQ(ceil_div(65, 64), 2);
}

// ---------------------------------------------------------------------------------------------------

/// The fields of dlpack.h, as its ABI lays them out.
struct DLDevice {
    std::int32_t device_type;
    std::int32_t device_id;
};
struct DLDataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};
struct DLTensor {
    void* data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

TEST(DLPack, ViewsATensorAsItIs) {
    float data[12] = {};
    std::int64_t shape[2] = {3, 2}, strides[2] = {1, 3};
    DLTensor tensor{data, {1, 0}, 2, {2, 32, 1}, shape, strides, 0};

    View<float, 2> v;
    ASSERT_TRUE(view_from_dlpack("u", tensor, v).ok());
    EXPECT_EQ(v.data, data);
    EXPECT_EQ(v.extent[0], 3);
    EXPECT_EQ(v.stride[1], 3);

    tensor.strides = nullptr;  // row-major
    tensor.byte_offset = 2 * sizeof(float);
    View<const float, 2> c;
    ASSERT_TRUE(view_from_dlpack("u", tensor, c).ok());
    EXPECT_EQ(c.data, data + 2);
    EXPECT_EQ(c.stride[0], 2);
    EXPECT_EQ(c.stride[1], 1);

    tensor.data = nullptr;
    ASSERT_TRUE(view_from_dlpack("u", tensor, c).ok());
    EXPECT_FALSE(c);
}

TEST(DLPack, KnowsEveryDtype) {
    std::int64_t shape[1] = {1};
    alignas(16) char data[16] = {};
    const auto accepts = [&]<class T>(T, int code, int bits) {
        const DLTensor tensor{data, {1, 0}, 1, {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1},
                              shape, nullptr, 0};
        View<T, 1> v;
        return view_from_dlpack("u", tensor, v).ok();
    };
    EXPECT_TRUE(accepts(f64{}, 2, 64));
    EXPECT_TRUE(accepts(f32{}, 2, 32));
    EXPECT_TRUE(accepts(f16{}, 2, 16));
    EXPECT_TRUE(accepts(bf16{}, 4, 16));
    EXPECT_TRUE(accepts(complex<float>{}, 5, 64));
    EXPECT_TRUE(accepts(complex<double>{}, 5, 128));
    EXPECT_TRUE(accepts(std::int32_t{}, 0, 32));
    EXPECT_FALSE(accepts(f16{}, 4, 16));
    EXPECT_FALSE(accepts(bf16{}, 2, 16));
    EXPECT_FALSE(accepts(f32{}, 2, 64));
    EXPECT_FALSE(accepts(f32{}, 0, 32));
}

TEST(DLPack, NamesWhatDoesNotFit) {
    std::int64_t shape[2] = {3, 2};
    float data[6] = {};
    DLTensor tensor{data, {1, 0}, 2, {2, 32, 1}, shape, nullptr, 0};
    View<float, 3> three;
    EXPECT_STREQ(view_from_dlpack("u", tensor, three).message(), "u: has 2 axes, must have 3");
    View<float, 2> two;
    tensor.dtype.lanes = 4;
    EXPECT_TRUE(says(view_from_dlpack("u", tensor, two), "4 lanes, must be code 2, 32 bits, 1 lane"));
}

// ---------------------------------------------------------------------------------------------------

Status check_offsets(std::vector<std::int32_t> offsets, Index length) {
    return check_cu_seqlens(view(offsets.data(), {offsets.size()}), length);
}

TEST(OptionsAsText, AreAllOfANumberOrNone) {
    double x = 0.0;
    EXPECT_TRUE(parse_number("-2.5e3", x));
    EXPECT_EQ(x, -2500.0);
    using namespace std::string_view_literals;
    for (const std::string_view text : {""sv, "x"sv, "1x"sv, "1 "sv, "1\0"sv, "nan"sv, "inf"sv, "1e999"sv})
        EXPECT_FALSE(parse_number(text, x)) << text;
    EXPECT_FALSE(parse_number(std::string(64, '1'), x));
    bool on = false;
    EXPECT_TRUE(parse_flag("true", on) && on);
    EXPECT_TRUE(parse_flag("false", on) && !on);
    EXPECT_FALSE(parse_flag("True", on));
    EXPECT_TRUE(says(unknown_option("window", "x", "it takes none"), "option window=x: it takes none"));
}

TEST(Sequences, OffsetsMustGoUpAndStayInside) {
    EXPECT_TRUE(check_offsets({0, 3, 3, 10}, 10).ok());
    EXPECT_TRUE(check_offsets({2, 3, 8}, 10).ok());  // margins belong to no sequence
    EXPECT_TRUE(check_offsets({0}, 0).ok());
    EXPECT_TRUE(check_offsets({10, 10}, 10).ok());
    EXPECT_STREQ(check_offsets({0, 5, 4}, 10).message(),
                 "cu_seqlens: element 2 is 4, must be at least 5 and at most 10");
    EXPECT_STREQ(check_offsets({0, 11}, 10).message(),
                 "cu_seqlens: element 1 is 11, must be at least 0 and at most 10");
    EXPECT_FALSE(check_offsets({-1, 5}, 10).ok());
}

TEST(Sequences, RowsAreTheRangeOrTheWholeLength) {
    std::int32_t offsets[4] = {1, 4, 4, 9};
    const View<const std::int32_t, 1> cu = view(offsets, {4});
    EXPECT_EQ(rows_of(cu, 0, 10).begin, 1);
    EXPECT_EQ(rows_of(cu, 0, 10).end, 4);
    EXPECT_EQ(rows_of(cu, 1, 10).begin, rows_of(cu, 1, 10).end);
    EXPECT_EQ(rows_of(cu, 2, 10).end, 9);
    const RowRange dense = rows_of({}, 5, 10);
    EXPECT_EQ(dense.begin, 0);
    EXPECT_EQ(dense.end, 10);
}

// ---------------------------------------------------------------------------------------------------

TEST(ParallelFor, DoesEveryTaskOnceWithAWorkerInRange) {
    for (const int threads : {1, 2, 5, 0})
        for (const Index tasks : {0, 1, 3, 100}) {
            std::vector<std::atomic<int>> done(static_cast<std::size_t>(tasks));
            std::atomic<bool> in_range{true};
            parallel_for(tasks, threads, [&](Index task, int worker) {
                ++done[static_cast<std::size_t>(task)];
                if (worker < 0 || worker >= thread_count(threads)) in_range = false;
            });
            EXPECT_TRUE(in_range);
            for (const auto& d : done) EXPECT_EQ(d, 1);
        }
}

TEST(Isa, ResolvesToWhatTheMachineHas) {
    EXPECT_TRUE(simd::machine_has(simd::resolve(Isa::automatic)));
    EXPECT_EQ(simd::resolve(Isa::baseline), Isa::baseline);
    EXPECT_TRUE(simd::check_isa(Isa::automatic).ok());
    EXPECT_TRUE(simd::check_isa(Isa::baseline).ok());
    for (const Isa isa : {Isa::avx2, Isa::avx512}) {
        const Status s = simd::check_isa(isa);
        EXPECT_EQ(s.ok(), simd::machine_has(isa));
        EXPECT_TRUE(s.ok() || says(s, to_string(isa)));
    }
}

}  // namespace
