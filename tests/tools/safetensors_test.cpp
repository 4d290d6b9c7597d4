// SPDX-License-Identifier: Apache-2.0
//
// Tests of tools/support/safetensors.hpp: round trips, every kind of damage, atomic writing, and
// conversions. Damaged files are built in memory.

#include "../../tools/support/safetensors.hpp"

#include <gtest/gtest.h>

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <new>
#include <span>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

// The largest single allocation since it was last set to zero.
std::atomic<std::size_t> largest_allocation{0};

}  // namespace

// Not inlined, because gcc would then warn of new and delete that do not match.
[[gnu::noinline]] void* operator new(std::size_t size, const std::nothrow_t& /*tag*/) noexcept {
    std::size_t seen = largest_allocation.load();
    while (seen < size && !largest_allocation.compare_exchange_weak(seen, size)) {
    }
    return std::malloc(size == 0 ? 1 : size);
}

[[gnu::noinline]] void* operator new(std::size_t size) {
    if (void* memory = operator new(size, std::nothrow)) {
        return memory;
    }
    throw std::bad_alloc();
}

[[gnu::noinline]] void operator delete(void* memory) noexcept {
    std::free(memory);
}

[[gnu::noinline]] void operator delete(void* memory, std::size_t /*size*/) noexcept {
    std::free(memory);
}

namespace {

namespace fs = std::filesystem;
using namespace interstate::tools;

using Bytes = std::vector<std::byte>;
using Shape = std::vector<std::int64_t>;

constexpr std::string_view file_name = "test.safetensors";

Bytes to_bytes(std::string_view text) {
    const std::span<const std::byte> bytes = std::as_bytes(std::span(text));
    return {bytes.begin(), bytes.end()};
}

// A file with this header and data, whatever they are.
Bytes file_bytes(std::string_view header, std::string_view data = "") {
    std::string text(8, '\0');
    const std::uint64_t length = header.size();
    std::memcpy(text.data(), &length, 8);
    text += header;
    text += data;
    return to_bytes(text);
}

// A file whose header length says `length`.
Bytes lying_file(std::uint64_t length, std::string_view rest) {
    Bytes bytes = file_bytes(rest);
    std::memcpy(bytes.data(), &length, 8);
    return bytes;
}

template <typename Element>
SafetensorsTensor raw_tensor(std::string dtype, Shape shape, std::vector<Element> elements) {
    const std::span<const std::byte> bytes = std::as_bytes(std::span(elements));
    return {std::move(dtype), std::move(shape), {bytes.begin(), bytes.end()}};
}

// One line of printable ASCII.
void expect_clean(const std::string& message) {
    EXPECT_FALSE(message.empty());
    EXPECT_LT(message.size(), 2000U);
    for (const char c : message) {
        EXPECT_TRUE(c >= 0x20 && c < 0x7f) << message;
    }
}

template <typename Action>
std::string error_of(Action action) {
    try {
        action();
    } catch (const SafetensorsError& error) {
        expect_clean(error.what());
        return error.what();
    }
    ADD_FAILURE() << "no error";
    return {};
}

std::string parse_error(const Bytes& bytes) {
    const std::string message = error_of([&] { parse_safetensors(bytes, file_name); });
    EXPECT_EQ(message.rfind("test.safetensors: ", 0), 0U) << message;
    return message;
}

#define EXPECT_HAS(text, part) \
    EXPECT_NE((text).find(part), std::string::npos) << "message: " << (text)

void expect_parse_error(const Bytes& bytes, std::string_view part) {
    const std::string message = parse_error(bytes);
    EXPECT_HAS(message, part);
}

// A file with the one tensor "x" described by `entry`.
void expect_entry_error(const std::string& entry, std::string_view part, std::string_view data) {
    const std::string message = parse_error(file_bytes("{\"x\":" + entry + "}", data));
    EXPECT_HAS(message, "tensor \"x\": ");
    EXPECT_HAS(message, part);
}

SafetensorsFile parse(std::string_view header, std::string_view data = "") {
    return parse_safetensors(file_bytes(header, data), file_name);
}

SafetensorsFile sample_file() {
    SafetensorsFile file;
    file.metadata = {{"op", "attention"}, {"", "empty key"}, {"quote\"\n", "\xc3\xa9\x01"}};
    const std::vector<double> doubles{1, -2.5, 1e300, 0, -0.0, 3};
    const std::vector<float> floats{1.5F, -3};
    const std::vector<std::int64_t> integers{std::numeric_limits<std::int64_t>::min(), 7};
    file.tensors["a"] = make_tensor(floats, {2});
    file.tensors["bool"] = raw_tensor<std::uint8_t>("BOOL", {3}, {0, 1, 1});
    file.tensors["doubles"] = make_tensor(doubles, {2, 3});
    file.tensors["empty"] = make_tensor(std::span<const double>(), {4, 0, 2});
    file.tensors["half"] = raw_tensor<std::uint16_t>("F16", {1}, {0x3c00});
    file.tensors["integers"] = make_tensor(integers, {2, 1, 1});
    file.tensors["scalar"] = make_tensor(std::span(floats).first(1), {});
    file.tensors[std::string("\0nul", 4)] = raw_tensor<std::int8_t>("I8", {1}, {-4});
    file.tensors[""] = raw_tensor<std::uint8_t>("U8", {1}, {200});
    return file;
}

// ---------------------------------------------------------------------------------------------
// Round trips

TEST(SafetensorsRoundTrip, KeepsEverything) {
    const SafetensorsFile file = sample_file();
    const Bytes bytes = serialize_safetensors(file, file_name);
    const SafetensorsFile back = parse_safetensors(bytes, file_name);
    EXPECT_EQ(back, file);
    EXPECT_EQ(serialize_safetensors(back, file_name), bytes);
}

TEST(SafetensorsRoundTrip, EmptyFile) {
    const Bytes bytes = serialize_safetensors({}, file_name);
    EXPECT_EQ(bytes, file_bytes("{}      "));
    EXPECT_EQ(parse_safetensors(bytes, file_name), SafetensorsFile());
}

TEST(SafetensorsRoundTrip, MetadataOnly) {
    SafetensorsFile file;
    file.metadata = {{"b", "2"}, {"a", "1"}};
    const Bytes bytes = serialize_safetensors(file, file_name);
    EXPECT_EQ(bytes, file_bytes("{\"__metadata__\":{\"a\":\"1\",\"b\":\"2\"}}      "));
    EXPECT_EQ(parse_safetensors(bytes, file_name), file);
}

TEST(SafetensorsRoundTrip, WritesNamesInOrderAndDataAligned) {
    SafetensorsFile file;
    file.tensors["b"] = raw_tensor<std::int16_t>("I16", {1}, {0x4242});
    file.tensors["a"] = raw_tensor<std::uint8_t>("U8", {}, {0x41});
    file.tensors["c"] = raw_tensor<std::int16_t>("I16", {1, 1}, {0x4343});
    const std::string header =
        "{\"a\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[4,5]},"
        "\"b\":{\"dtype\":\"I16\",\"shape\":[1],\"data_offsets\":[0,2]},"
        "\"c\":{\"dtype\":\"I16\",\"shape\":[1,1],\"data_offsets\":[2,4]}}";
    const std::size_t padded = (header.size() + 7) / 8 * 8;
    EXPECT_EQ(serialize_safetensors(file, file_name),
              file_bytes(header + std::string(padded - header.size(), ' '), "BBCCA"));
}

TEST(SafetensorsRoundTrip, HeaderLengthIsAlwaysAMultipleOfEight) {
    for (std::size_t length = 0; length < 20; ++length) {
        SafetensorsFile file;
        file.tensors[std::string(length, 'n')] = make_tensor(std::span<const float>(), {0});
        const Bytes bytes = serialize_safetensors(file, file_name);
        EXPECT_EQ(bytes.size() % 8, 0U);
        EXPECT_EQ(parse_safetensors(bytes, file_name), file);
    }
}

TEST(SafetensorsRoundTrip, ManyTensors) {
    SafetensorsFile file;
    for (std::int64_t i = 0; i < 2000; ++i) {
        const std::vector<double> values(static_cast<std::size_t>(i % 7), static_cast<double>(i));
        file.tensors[std::to_string(i)] = make_tensor(values, {i % 7});
    }
    EXPECT_EQ(parse_safetensors(serialize_safetensors(file, file_name), file_name), file);
}

// Written by the Python package (safetensors 0.8.0, numpy).
TEST(SafetensorsRoundTrip, ReadsTheReferenceImplementation) {
    const std::string_view header =
        R"({"__metadata__":{"format":"np"},)"
        R"("ids":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},)"
        R"("none":{"dtype":"F64","shape":[0,3],"data_offsets":[16,16]},)"
        R"("w":{"dtype":"F32","shape":[2,2],"data_offsets":[16,32]},)"
        R"("s":{"dtype":"F16","shape":[],"data_offsets":[32,34]},)"
        R"("flag":{"dtype":"BOOL","shape":[3],"data_offsets":[34,37]}}  )";
    EXPECT_EQ(header.size(), 320U);
    using namespace std::string_view_literals;
    const std::string_view data =
        "\x07\0\0\0\0\0\0\0\xf7\xff\xff\xff\xff\xff\xff\xff"
        "\0\0\xc0\x3f\0\0\0\xc0\0\0\x80\x3e\0\0\x80\x40\0\x42\x01\0\x01"sv;
    const SafetensorsFile file = parse(header, data);
    EXPECT_EQ(file.metadata.at("format"), "np");
    EXPECT_EQ(to_doubles(file.tensors.at("ids")), (std::vector<double>{7, -9}));
    EXPECT_EQ(to_doubles(file.tensors.at("w")), (std::vector<double>{1.5, -2, 0.25, 4}));
    EXPECT_EQ(to_doubles(file.tensors.at("s")), (std::vector<double>{3}));
    EXPECT_EQ(to_doubles(file.tensors.at("flag")), (std::vector<double>{1, 0, 1}));
    EXPECT_EQ(file.tensors.at("none").shape, (Shape{0, 3}));
}

// ---------------------------------------------------------------------------------------------
// Legal files that a strict reader could get wrong

TEST(SafetensorsParse, AcceptsAnyOrderOfDataAndFields) {
    const std::string header =
        R"({ "b":{"data_offsets":[0,1],"shape":[1],"dtype":"U8"},)"
        R"("a":{"shape" : [ 2 ],"dtype":"U8","data_offsets":[1,3]},"__metadata__":{}})";
    const SafetensorsFile file = parse(header + "\n\r\t ", "xyz");
    EXPECT_EQ(file.tensors.at("b").data, to_bytes("x"));
    EXPECT_EQ(file.tensors.at("a").data, to_bytes("yz"));
    EXPECT_TRUE(file.metadata.empty());
}

TEST(SafetensorsParse, AcceptsScalarsAndEmptyTensors) {
    const SafetensorsFile file =
        parse(R"({"first":{"dtype":"F64","shape":[0],"data_offsets":[0,0]},)"
              R"("middle":{"dtype":"F32","shape":[3,0,5],"data_offsets":[1,1]},)"
              R"("last":{"dtype":"U8","shape":[0,0],"data_offsets":[2,2]},)"
              R"("scalar":{"dtype":"U8","shape":[],"data_offsets":[0,1]},)"
              R"("one":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
              "AB");
    EXPECT_EQ(file.tensors.size(), 5U);
    EXPECT_EQ(to_doubles(file.tensors.at("scalar")), (std::vector<double>{65}));
    EXPECT_TRUE(to_doubles(file.tensors.at("middle")).empty());
    EXPECT_EQ(file.tensors.at("middle").shape, (Shape{3, 0, 5}));
}

TEST(SafetensorsParse, AcceptsEveryReadableDtype) {
    for (const auto& [name, size] : std::vector<std::pair<std::string, std::size_t>>{{"F64", 8},
                                                                                     {"F32", 4},
                                                                                     {"F16", 2},
                                                                                     {"BF16", 2},
                                                                                     {"I64", 8},
                                                                                     {"I32", 4},
                                                                                     {"I16", 2},
                                                                                     {"I8", 1},
                                                                                     {"U8", 1},
                                                                                     {"BOOL", 1}}) {
        const SafetensorsFile file =
            parse("{\"x\":{\"dtype\":\"" + name + "\",\"shape\":[3],\"data_offsets\":[0," +
                      std::to_string(3 * size) + "]}}",
                  std::string(3 * size, '\0'));
        EXPECT_EQ(to_doubles(file.tensors.at("x")), (std::vector<double>{0, 0, 0}));
        ASSERT_TRUE(dtype_from_name(name).has_value());
        EXPECT_EQ(dtype_name(*dtype_from_name(name)), name);
        EXPECT_EQ(dtype_size(*dtype_from_name(name)), size);
    }
    EXPECT_FALSE(dtype_from_name("f32").has_value());
}

TEST(SafetensorsParse, AcceptsRank64) {
    std::string shape = "[1";
    for (int axis = 1; axis < 64; ++axis) {
        shape += ",1";
    }
    const std::string entry = "{\"dtype\":\"U8\",\"data_offsets\":[0,1],\"shape\":" + shape;
    EXPECT_EQ(parse("{\"x\":" + entry + "]}}", "A").tensors.at("x").shape, Shape(64, 1));
    expect_entry_error(entry + ",1]}", "shape has more than 64 axes", "A");
}

// ---------------------------------------------------------------------------------------------
// Damage: length and header

TEST(SafetensorsDamage, TruncatedAnywhere) {
    const Bytes whole = serialize_safetensors(sample_file(), file_name);
    for (std::size_t size = 0; size < whole.size(); ++size) {
        parse_error(Bytes(whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)));
    }
    expect_parse_error({}, "file has 0 bytes");
    expect_parse_error(to_bytes("1234567"), "file has 7 bytes, expected at least the 8 bytes");
    Bytes short_data = whole;
    short_data.pop_back();
    expect_parse_error(short_data, "truncated?");
}

TEST(SafetensorsDamage, EveryFlippedByteIsHandled) {
    const Bytes whole = serialize_safetensors(sample_file(), file_name);
    for (std::size_t i = 0; i < whole.size(); ++i) {
        for (const int flip : {0x01, 0x20, 0x80, 0xff}) {
            Bytes damaged = whole;
            damaged[i] ^= static_cast<std::byte>(flip);
            try {
                parse_safetensors(damaged, file_name);
            } catch (const SafetensorsError& error) {
                expect_clean(error.what());
            }
        }
    }
}

TEST(SafetensorsDamage, LyingHeaderLength) {
    expect_parse_error(lying_file(0, ""), "expected it to begin with {");
    expect_parse_error(lying_file(3, "{}"), "header length is 3 bytes, but the file has only 2");
    expect_parse_error(lying_file(1, "{}"), "header is not valid JSON");
    expect_parse_error(lying_file(100'000'001, "{}"), "header length is 100000001 bytes, expected");
    expect_parse_error(lying_file(100'000'000, "{}"), "but the file has only 2 bytes");
    for (const std::uint64_t length :
         {std::numeric_limits<std::uint64_t>::max(), std::numeric_limits<std::uint64_t>::max() - 7,
          std::uint64_t{1} << 63U, std::uint64_t{1} << 32U}) {
        expect_parse_error(lying_file(length, "{}"), std::to_string(length));
    }
}

TEST(SafetensorsDamage, NotJson) {
    expect_parse_error(file_bytes(""), "expected it to begin with {");
    expect_parse_error(file_bytes(" {}"), "expected it to begin with {");
    expect_parse_error(file_bytes("[]"), "expected it to begin with {");
    expect_parse_error(file_bytes("\xef\xbb\xbf{}"), "expected it to begin with {");
    for (const std::string_view header :
         {"{", "{}}", "{},", "{}{}", "{]", "{\"x\"}", "{\"x\":}", "{'x':{}}",
          "{\"__metadata__\":{},}", "{\"__metadata__\":{\"a\":\"b\",}}", "{} // comment", "{/**/}",
          "{\"\xff\":{}}", "{\"\\ud800\":{}}", "{\"\n\":{}}", "{\"\\x\":{}}",
          "{\"__metadata__\":{\"a\":nul}}", "{\"__metadata__\":{\"a\":1e999}}"}) {
        expect_parse_error(file_bytes(header), "header is not valid JSON: ");
    }
    // A parser that stops at NUL would call these fine.
    expect_parse_error(file_bytes(std::string_view("{}\0", 3)), "NUL byte at byte 2");
    expect_parse_error(file_bytes(std::string_view("{}\0{\"x\":1}", 10)), "NUL byte");
    expect_parse_error(file_bytes(std::string_view("{\"a\0b\":{}}", 10)), "NUL byte");
}

TEST(SafetensorsDamage, LongJunkGivesAShortMessage) {
    expect_parse_error(file_bytes("{\"" + std::string(1 << 20, '\x01')), "not valid JSON");
    expect_parse_error(file_bytes("{\"" + std::string(1 << 20, 'x')), "not valid JSON");
    expect_parse_error(file_bytes("{\"x\":{\"dtype\":" + std::string(1 << 20, '1') + "}}"),
                       "111...");
    expect_parse_error(file_bytes("{\"" + std::string(1 << 20, 'x') + "\":3}"), "xxx...\": ");
}

TEST(SafetensorsDamage, DeepNesting) {
    const std::size_t depth = 5'000'000;
    std::string objects;
    for (std::size_t i = 0; i < depth; ++i) {
        objects += "{\"a\":";
    }
    expect_parse_error(file_bytes(objects), "tensor \"a\": unknown field \"a\"");
    expect_parse_error(file_bytes("{" + std::string(depth, '{')), "not valid JSON");
    const std::string arrays(depth, '[');
    expect_parse_error(file_bytes("{\"x\":" + arrays), "its header entry is an array, expected");
    expect_parse_error(file_bytes("{\"x\":{\"shape\":" + arrays),
                       "an extent in shape is an array, expected an integer");
    expect_parse_error(file_bytes("{\"__metadata__\":{\"k\":" + arrays),
                       "metadata value of \"k\" is an array, expected a string");
}

TEST(SafetensorsDamage, DuplicateNames) {
    const std::string entry = R"({"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
    expect_parse_error(file_bytes("{\"x\":" + entry + ",\"x\":" + entry + "}"),
                       "tensor \"x\": name appears twice");
    expect_parse_error(
        file_bytes("{\"x\":" + entry + ",\"y\":" + entry + ",\"\\u0078\":" + entry + "}"),
        "tensor \"x\": name appears twice");
    expect_parse_error(file_bytes(R"({"__metadata__":{"a":"1","a":"1"}})"),
                       "metadata key \"a\" appears twice");
    expect_parse_error(file_bytes(R"({"__metadata__":{},"__metadata__":{}})"),
                       "\"__metadata__\" appears twice");
    expect_entry_error(R"({"dtype":"U8","dtype":"U8"})", "dtype appears twice", "");
    expect_entry_error(R"({"shape":[],"shape":[]})", "shape appears twice", "");
    expect_entry_error(R"({"data_offsets":[0,0],"data_offsets":[0,0]})",
                       "data_offsets appears twice", "");
}

TEST(SafetensorsDamage, WrongTypes) {
    for (const std::string value : {"null", "true", "1", "-1", "1.5", "\"s\"", "[]"}) {
        expect_parse_error(file_bytes("{\"__metadata__\":" + value + "}"), "\"__metadata__\" is ");
        expect_parse_error(file_bytes("{\"__metadata__\":" + value + "}"),
                           "expected an object of strings");
        expect_entry_error(value, "expected an object with dtype, shape and data_offsets", "");
    }
    for (const std::string value : {"null", "false", "1", "-1", "1.5", "{}", "[]"}) {
        expect_parse_error(file_bytes("{\"__metadata__\":{\"k\":" + value + "}}"),
                           "metadata value of \"k\" is ");
        expect_entry_error("{\"dtype\":" + value + "}", "dtype is ", "");
        expect_entry_error("{\"dtype\":" + value + "}", "expected a string", "");
    }
    for (const std::string value : {"null", "true", "1", "-1", "1.5", "\"s\"", "{}"}) {
        expect_entry_error("{\"shape\":" + value + "}", "expected an array of integers", "");
        expect_entry_error("{\"data_offsets\":" + value + "}", "expected an array of two integers",
                           "");
    }
    for (const std::string value : {"null", "true", "-1", "-0", "1.5", "2.0", "1e2", "\"1\"", "{}",
                                    "[]", "99999999999999999999", "18446744073709551616"}) {
        expect_entry_error("{\"shape\":[" + value + "]}", "expected an integer from 0 to 2^63 - 1",
                           "");
        expect_entry_error("{\"data_offsets\":[0," + value + "]}",
                           "expected an integer from 0 to 2^64 - 1", "");
    }
    expect_entry_error(R"({"shape":[9223372036854775808]})",
                       "an extent in shape is the number 9223372036854775808", "");
    expect_entry_error(R"({"shape":[-3]})", "an extent in shape is the negative number -3", "");
    expect_entry_error(R"({"shape":[0.5]})", "an extent in shape is the number 0.5", "");
}

TEST(SafetensorsDamage, MissingAndUnknownFields) {
    expect_entry_error("{}", "dtype is missing", "");
    expect_entry_error(R"({"dtype":"U8","data_offsets":[0,0]})", "shape is missing", "");
    expect_entry_error(R"({"dtype":"U8","shape":[0]})", "data_offsets is missing", "");
    expect_entry_error(R"({"dtype":"U8","shape":[0],"data_offsets":[0,0],"more":1})",
                       "unknown field \"more\"", "");
    expect_entry_error(R"({"data_offsets":[]})", "data_offsets has 0 numbers", "");
    expect_entry_error(R"({"data_offsets":[0]})", "data_offsets has 1 numbers", "");
    expect_entry_error(R"({"data_offsets":[0,0,0]})", "data_offsets has more than two", "");
}

TEST(SafetensorsDamage, UnsupportedDtypes) {
    for (const std::string name :
         {"F8_E4M3", "F8_E5M2", "U16", "U32", "U64", "C64", "f32", "", "F"}) {
        expect_entry_error(
            "{\"dtype\":\"" + name + "\",\"shape\":[1],\"data_offsets\":[0,1]}",
            "unsupported dtype \"" + name +
                "\", expected one of F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL",
            "A");
    }
}

// ---------------------------------------------------------------------------------------------
// Damage: shapes and offsets

TEST(SafetensorsDamage, ShapeOverflow) {
    for (const std::string shape :
         {"[9223372036854775807,2]", "[4294967296,4294967296]", "[4294967296,2147483648]",
          "[9223372036854775807]", "[1152921504606846976]", "[0,9223372036854775807,4]",
          "[9223372036854775807,4,0]", "[65536,65536,65536,65536,1]"}) {
        // The product modulo 2^64 is 0 or small in most of these.
        for (const std::string end : {"0", "8", "18446744073709551608", "18446744073709551615"}) {
            expect_entry_error(
                "{\"dtype\":\"F64\",\"shape\":" + shape + ",\"data_offsets\":[0," + end + "]}",
                "is too large, expected fewer than 2^63 bytes", "12345678");
        }
    }
}

TEST(SafetensorsDamage, OffsetsDoNotMatchTheShape) {
    expect_entry_error(R"({"dtype":"F32","shape":[2],"data_offsets":[0,7]})",
                       "data_offsets [0, 7] span 7 bytes, expected 8 for F32 of shape [2]",
                       "1234567");
    expect_entry_error(R"({"dtype":"F32","shape":[2,3],"data_offsets":[0,32]})",
                       "span 32 bytes, expected 24 for F32 of shape [2, 3]", std::string(32, 'x'));
    expect_entry_error(R"({"dtype":"F32","shape":[],"data_offsets":[0,0]})",
                       "span 0 bytes, expected 4 for F32 of shape []", "");
    expect_entry_error(R"({"dtype":"F32","shape":[0],"data_offsets":[0,4]})", "span 4 bytes",
                       "1234");
}

TEST(SafetensorsDamage, OffsetsOutOfRangeOrReversed) {
    expect_entry_error(R"({"dtype":"U8","shape":[4],"data_offsets":[0,4]})",
                       "data_offsets [0, 4] end after the data, which has 3 bytes", "123");
    expect_entry_error(R"({"dtype":"U8","shape":[1],"data_offsets":[4,5]})", "end after", "1");
    expect_entry_error(R"({"dtype":"U8","shape":[0],"data_offsets":[9,9]})", "end after", "1");
    expect_entry_error(R"({"dtype":"U8","shape":[1],"data_offsets":[1,0]})",
                       "data_offsets [1, 0] are reversed", "1");
    expect_entry_error(R"({"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,0]})",
                       "reversed", "1");
    expect_entry_error(
        R"({"dtype":"U8","shape":[1],"data_offsets":[18446744073709551614,18446744073709551615]})",
        "end after", "1");
}

TEST(SafetensorsDamage, OverlapsGapsAndTrailingBytes) {
    const auto two = [](const std::string& a, const std::string& b) {
        return R"({"a":{"dtype":"U8","shape":[2],"data_offsets":)" + a +
               R"(},"b":{"dtype":"U8","shape":[2],"data_offsets":)" + b + "}}";
    };
    expect_parse_error(file_bytes(two("[0,2]", "[1,3]"), "123"),
                       "tensor \"b\": data begins at byte 1, expected 2 where the tensor before it "
                       "ends (overlap)");
    expect_parse_error(file_bytes(two("[0,2]", "[0,2]"), "12"), "(overlap)");
    expect_parse_error(file_bytes(two("[3,5]", "[0,2]"), "12345"),
                       "tensor \"a\": data begins at byte 3, expected 2 where the tensor before it "
                       "ends (gap)");
    expect_parse_error(file_bytes(two("[1,3]", "[3,5]"), "12345"), "begins at byte 1, expected 0");
    expect_parse_error(file_bytes(two("[0,2]", "[2,4]"), "12345"),
                       "1 bytes follow the last tensor");
    expect_parse_error(file_bytes("{}", "12345"), "5 bytes follow the last tensor");
    // An empty tensor inside another one.
    expect_parse_error(file_bytes(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                                  R"("b":{"dtype":"U8","shape":[0],"data_offsets":[1,1]}})",
                                  "12"),
                       "(overlap)");
}

// ---------------------------------------------------------------------------------------------
// Messages and memory

TEST(SafetensorsMessages, EscapeWhatTheFileSays) {
    expect_parse_error(file_bytes("{\"a\\u0000\\n\\u001b[31m\\\"\\\\\xc3\xa9\x7f\":1}"),
                       R"(tensor "a\x00\x0a\x1b[31m\"\\\xc3\xa9\x7f": )");
    expect_parse_error(file_bytes(R"({"__metadata__":{"\r\n":1}})"), R"("\x0d\x0a")");
    expect_parse_error(file_bytes(R"({"x":{"\u0007":1}})"), R"("\x07")");
    expect_parse_error(file_bytes(R"({"x":{"dtype":"\b","shape":[],"data_offsets":[0,0]}})"),
                       R"("\x08")");
    expect_parse_error(file_bytes(R"({"x":"\t"})"), R"(is the string "\x09")");
    const std::string message =
        error_of([] { parse_safetensors(Bytes(), std::string_view("bad\n\0name", 9)); });
    EXPECT_HAS(message, R"(bad\x0a\x00name: )");
}

TEST(SafetensorsMemory, LyingHeadersAllocateNoMoreThanTheFile) {
    // One MiB of spaces keeps the small fixed allocations of any parse below the size of the file.
    const std::string padding(std::size_t{1} << 20U, ' ');
    const std::vector<std::string> headers{
        R"({"x":{"dtype":"F64","shape":[536870912],"data_offsets":[0,4294967296]}})",
        R"({"x":{"dtype":"U8","shape":[1073741824],"data_offsets":[0,1073741824]}})",
        R"({"x":{"dtype":"U8","shape":[0],"data_offsets":[0,1073741824]}})",
        R"({"x":{"dtype":"U8","shape":[1073741824],"data_offsets":[0,0]}})",
    };
    for (const std::string& header : headers) {
        const Bytes bytes = file_bytes(header + padding);
        largest_allocation = 0;
        EXPECT_THROW(parse_safetensors(bytes, file_name), SafetensorsError);
        EXPECT_LT(largest_allocation.load(), bytes.size());
    }
    for (const std::uint64_t length : {std::uint64_t{99'999'999}, std::uint64_t{1} << 40U}) {
        const Bytes bytes = lying_file(length, padding);
        largest_allocation = 0;
        EXPECT_THROW(parse_safetensors(bytes, file_name), SafetensorsError);
        EXPECT_LT(largest_allocation.load(), bytes.size());
    }
    // A million extents must not become a vector of eight million bytes.
    std::string shape = "{\"x\":{\"shape\":[0";
    while (shape.size() < padding.size()) {
        shape += ",0";
    }
    const Bytes bytes = file_bytes(shape);
    largest_allocation = 0;
    EXPECT_THROW(parse_safetensors(bytes, file_name), SafetensorsError);
    EXPECT_LT(largest_allocation.load(), bytes.size());
}

// ---------------------------------------------------------------------------------------------
// What the writer refuses

TEST(SafetensorsSerialize, RefusesBadTensors) {
    const auto error_for = [](const std::string& name, SafetensorsTensor tensor) {
        SafetensorsFile file;
        file.tensors[name] = std::move(tensor);
        return error_of([&] { serialize_safetensors(file, file_name); });
    };
    EXPECT_HAS(error_for("x", {"F32", {2}, Bytes(7)}),
               "tensor \"x\": holds 7 bytes of data, expected 8 for F32 of shape [2]");
    EXPECT_HAS(error_for("x", {"F8_E4M3", {1}, Bytes(1)}), "unsupported dtype \"F8_E4M3\"");
    EXPECT_HAS(error_for("x", {"F32", {-1}, {}}), "negative extent");
    EXPECT_HAS(error_for("x", {"F32", {std::int64_t{1} << 62, 0}, {}}), "too large");
    EXPECT_HAS(error_for("x", {"U8", Shape(65, 1), Bytes(1)}), "65 axes, expected at most 64");
    EXPECT_HAS(error_for("__metadata__", {"U8", {0}, {}}), "reserves this name");
    EXPECT_HAS(error_for("\xff\n", {"U8", {0}, {}}), R"("\xff\x0a" is not valid UTF-8)");
    SafetensorsFile file;
    file.metadata["k"] = "\xc3";
    EXPECT_HAS(error_of([&] { serialize_safetensors(file, file_name); }),
               R"(metadata value "\xc3" is not valid UTF-8)");
    file.metadata = {{"\x80", "v"}};
    EXPECT_HAS(error_of([&] { serialize_safetensors(file, file_name); }), "metadata key");
}

// ---------------------------------------------------------------------------------------------
// Files

class SafetensorsDisk : public testing::Test {
protected:
    void SetUp() override {
        std::string name = (fs::temp_directory_path() / "safetensors_test_XXXXXX").string();
        ASSERT_NE(::mkdtemp(name.data()), nullptr);
        m_directory = name;
        ASSERT_EQ(::chmod(name.c_str(), 0755), 0);
    }

    void TearDown() override {
        std::error_code ignored;
        fs::remove_all(m_directory, ignored);
    }

    fs::path path(const std::string& name = "file.safetensors") const {
        return m_directory / name;
    }

    std::size_t files_in_directory() const {
        return static_cast<std::size_t>(
            std::distance(fs::directory_iterator(m_directory), fs::directory_iterator()));
    }

    fs::path m_directory;
};

Bytes content(const fs::path& path) {
    std::ifstream stream(path, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(stream)), {});
    return to_bytes(text);
}

SafetensorsFile constant_file(double value, std::size_t count) {
    SafetensorsFile file;
    file.tensors["x"] =
        make_tensor(std::vector<double>(count, value), {static_cast<std::int64_t>(count)});
    return file;
}

TEST_F(SafetensorsDisk, WritesAndReads) {
    write_safetensors(path(), sample_file());
    EXPECT_EQ(read_safetensors(path()), sample_file());
    EXPECT_EQ(content(path()), serialize_safetensors(sample_file(), ""));
    EXPECT_EQ(files_in_directory(), 1U);
}

TEST_F(SafetensorsDisk, WritesToARelativePathAndALongName) {
    const fs::path before = fs::current_path();
    fs::current_path(m_directory);
    const std::string long_name(255, 'n');
    write_safetensors("relative", sample_file());
    write_safetensors(long_name, sample_file());
    fs::current_path(before);
    EXPECT_EQ(read_safetensors(path("relative")), sample_file());
    EXPECT_EQ(read_safetensors(path(long_name)), sample_file());
}

TEST_F(SafetensorsDisk, ReadErrorsNameTheFile) {
    const auto error_for = [](const fs::path& file) {
        const std::string message = error_of([&] { read_safetensors(file); });
        EXPECT_EQ(message.rfind(file.string() + ": ", 0), 0U) << message;
        return message;
    };
    EXPECT_HAS(error_for(path("absent")), "cannot open: No such file or directory");
    EXPECT_HAS(error_for(m_directory), "not a regular file");
    ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
    EXPECT_HAS(error_for(path("pipe")), "not a regular file");
    EXPECT_HAS(error_for("/dev/zero"), "not a regular file");
    std::ofstream(path("short")) << "1234";
    EXPECT_HAS(error_for(path("short")), "file has 4 bytes");
    std::ofstream(path("empty")).flush();
    EXPECT_HAS(error_for(path("empty")), "file has 0 bytes");
    EXPECT_HAS(error_of([&] { read_safetensors(path("new\nline")); }),
               R"(new\x0aline: cannot open)");
}

TEST_F(SafetensorsDisk, ReplacesRatherThanOverwrites) {
    write_safetensors(path(), constant_file(1, 10));
    fs::create_hard_link(path(), path("old"));
    write_safetensors(path(), constant_file(2, 5));
    EXPECT_EQ(read_safetensors(path()), constant_file(2, 5));
    EXPECT_EQ(read_safetensors(path("old")), constant_file(1, 10));
    EXPECT_EQ(files_in_directory(), 2U);
}

TEST_F(SafetensorsDisk, PermissionBits) {
    const mode_t mask = ::umask(0027);
    write_safetensors(path(), sample_file());
    ::umask(mask);
    EXPECT_EQ(static_cast<int>(fs::status(path()).permissions()), 0640);
    ASSERT_EQ(::chmod(path().c_str(), 0604), 0);
    write_safetensors(path(), constant_file(1, 1));
    EXPECT_EQ(static_cast<int>(fs::status(path()).permissions()), 0604);
}

TEST_F(SafetensorsDisk, FollowsSymbolicLinks) {
    write_safetensors(path("real"), constant_file(1, 1));
    fs::create_symlink("real", path("link"));
    write_safetensors(path("link"), constant_file(2, 2));
    EXPECT_TRUE(fs::is_symlink(path("link")));
    EXPECT_EQ(read_safetensors(path("real")), constant_file(2, 2));
    fs::create_symlink("nowhere", path("dangling"));
    EXPECT_HAS(error_of([&] { write_safetensors(path("dangling"), sample_file()); }),
               "cannot follow the symbolic link");
    EXPECT_EQ(files_in_directory(), 3U);
}

TEST_F(SafetensorsDisk, RefusesTargetsThatAreNotFiles) {
    const auto error_for = [](const fs::path& file) {
        return error_of([&] { write_safetensors(file, sample_file()); });
    };
    EXPECT_HAS(error_for(path("absent") / "file"), "No such file or directory");
    EXPECT_HAS(error_for(m_directory), "exists and is not a regular file");
    EXPECT_HAS(error_for(path("absent/")), "expected the name of a file");
    EXPECT_HAS(error_for(""), "expected the name of a file");
    EXPECT_HAS(error_for("/dev/full"), "exists and is not a regular file");
    std::ofstream(path("plain")).flush();
    EXPECT_HAS(error_for(path("plain") / "file"), "Not a directory");
    EXPECT_EQ(files_in_directory(), 1U);
}

TEST_F(SafetensorsDisk, BadTensorsLeaveTheOldFile) {
    write_safetensors(path(), constant_file(1, 3));
    SafetensorsFile bad = constant_file(2, 3);
    bad.tensors["y"] = {"F32", {1}, {}};
    EXPECT_HAS(error_of([&] { write_safetensors(path(), bad); }), "tensor \"y\"");
    EXPECT_EQ(read_safetensors(path()), constant_file(1, 3));
    EXPECT_EQ(files_in_directory(), 1U);
}

// A limit on the size of files stands in for a full disk: writes fail midway in the same manner.
TEST_F(SafetensorsDisk, FailedWriteLeavesTheOldFile) {
    write_safetensors(path(), constant_file(1, 3));
    rlimit old_limit{};
    ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old_limit), 0);
    rlimit limit = old_limit;
    limit.rlim_cur = 10'000;
    const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &limit), 0);
    std::string message;
    try {
        write_safetensors(path(), constant_file(2, 10'000));
    } catch (const SafetensorsError& error) {
        message = error.what();
    }
    ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old_limit), 0);
    std::signal(SIGXFSZ, old_handler);
    EXPECT_HAS(message, "file.safetensors: cannot write: File too large");
    EXPECT_EQ(read_safetensors(path()), constant_file(1, 3));
    EXPECT_EQ(files_in_directory(), 1U);
}

TEST_F(SafetensorsDisk, NoPermission) {
    write_safetensors(path(), constant_file(1, 3));
    fs::create_directory(path("locked"));
    write_safetensors(path("locked") / "file", constant_file(1, 3));
    fs::create_directory(path("open"));
    write_safetensors(path("open") / "read_only", constant_file(1, 3));
    ASSERT_EQ(::chmod((path("open") / "read_only").c_str(), 0444), 0);
    ASSERT_EQ(::chmod(path("open").c_str(), 0777), 0);
    ASSERT_EQ(::chmod(path("locked").c_str(), 0555), 0);

    // Root passes every check, so that root becomes nobody for a moment.
    const uid_t user = ::geteuid();
    if (user == 0 && ::seteuid(65534) != 0) {
        GTEST_SKIP() << "root cannot become another user here";
    }
    std::string in_locked;
    std::string over_read_only;
    try {
        write_safetensors(path("locked") / "new", constant_file(2, 3));
    } catch (const SafetensorsError& error) {
        in_locked = error.what();
    }
    try {
        write_safetensors(path("open") / "read_only", constant_file(2, 3));
    } catch (const SafetensorsError& error) {
        over_read_only = error.what();
    }
    if (user == 0) {
        ASSERT_EQ(::seteuid(0), 0);
    }
    EXPECT_HAS(in_locked, "Permission denied");
    EXPECT_HAS(over_read_only, "Permission denied");
    EXPECT_FALSE(fs::exists(path("locked") / "new"));
    EXPECT_EQ(read_safetensors(path("open") / "read_only"), constant_file(1, 3));
    ASSERT_EQ(::chmod(path("locked").c_str(), 0755), 0);
}

// A reader never sees anything but a whole file, whatever the writers do meanwhile.
TEST_F(SafetensorsDisk, ReadersSeeWholeFilesOnly) {
    write_safetensors(path(), constant_file(0, 1000));
    std::atomic<bool> stop{false};
    std::vector<std::thread> writers;
    for (int writer = 0; writer < 2; ++writer) {
        writers.emplace_back([&, writer] {
            for (std::size_t i = 0; !stop; ++i) {
                write_safetensors(path(), constant_file(writer, 1000 + i % 1000));
            }
        });
    }
    for (int i = 0; i < 200; ++i) {
        const std::vector<double> values = to_doubles(read_safetensors(path()).tensors.at("x"));
        EXPECT_EQ(std::count(values.begin(), values.end(), values.front()),
                  static_cast<std::ptrdiff_t>(values.size()));
    }
    stop = true;
    for (std::thread& writer : writers) {
        writer.join();
    }
    EXPECT_EQ(files_in_directory(), 1U);
}

TEST_F(SafetensorsDisk, KilledWriterLeavesAWholeFile) {
    const SafetensorsFile first = constant_file(1, 200'000);
    const SafetensorsFile second = constant_file(2, 300'000);
    write_safetensors(path(), first);
    for (int attempt = 0; attempt < 20; ++attempt) {
        const pid_t child = ::fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
            std::signal(SIGINT, SIG_DFL);  // a background job inherits that it is ignored
            ::alarm(60);                   // does not outlive a failed test for long
            for (;;) {
                try {
                    write_safetensors(path(), second);
                    write_safetensors(path(), first);
                } catch (const std::exception&) {
                    ::_exit(1);
                }
            }
        }
        ::usleep(static_cast<useconds_t>(500 + 1700 * attempt));
        ::kill(child, attempt % 2 == 0 ? SIGKILL : SIGINT);
        int status = 0;
        ASSERT_EQ(::waitpid(child, &status, 0), child);
        EXPECT_TRUE(WIFSIGNALED(status));
        const SafetensorsFile found = read_safetensors(path());
        EXPECT_TRUE(found == first || found == second);
    }
}

// ---------------------------------------------------------------------------------------------
// Conversions

TEST(SafetensorsConvert, MakesTensors) {
    const std::vector<double> doubles{1, 2, 3, 4, 5, 6};
    const std::vector<float> floats{0.1F, -0.0F};
    const std::vector<std::int64_t> integers{std::int64_t{1} << 62, -1};
    EXPECT_EQ(make_tensor(doubles, {2, 3}).dtype, "F64");
    EXPECT_EQ(make_tensor(doubles, {2, 3}).shape, (Shape{2, 3}));
    EXPECT_EQ(to_doubles(make_tensor(doubles, {6})), doubles);
    EXPECT_EQ(make_tensor(floats, {2}).dtype, "F32");
    EXPECT_EQ(to_doubles(make_tensor(floats, {2}))[0], static_cast<double>(0.1F));
    EXPECT_TRUE(std::signbit(to_doubles(make_tensor(floats, {2}))[1]));
    EXPECT_EQ(make_tensor(integers, {2}).dtype, "I64");
    EXPECT_EQ(to_doubles(make_tensor(integers, {2})), (std::vector<double>{0x1p62, -1}));
    EXPECT_EQ(to_doubles(make_tensor(std::span(doubles).last(1), {})), (std::vector<double>{6}));
    EXPECT_TRUE(to_doubles(make_tensor(std::span<const float>(), {0, 7})).empty());
    EXPECT_HAS(error_of([&] {
                   make_tensor(doubles, {2, 2});
               }),
               "tensor: holds 48 bytes of data, expected 32 for F64 of shape [2, 2]");
    EXPECT_HAS(error_of([&] { make_tensor(doubles, {-2, -3}); }), "negative extent");
    EXPECT_HAS(error_of([&] { make_tensor(doubles, {}); }), "expected 8");
}

TEST(SafetensorsConvert, ElementCount) {
    EXPECT_EQ(element_count(Shape{}), 1);
    EXPECT_EQ(element_count(Shape{2, 3, 4}), 24);
    EXPECT_EQ(element_count(Shape{2, 0, 4}), 0);
    EXPECT_EQ(element_count(Shape{std::numeric_limits<std::int64_t>::max()}),
              std::numeric_limits<std::int64_t>::max());
    EXPECT_THROW(element_count(Shape{-1}), SafetensorsError);
    EXPECT_THROW(element_count(Shape{std::int64_t{1} << 32, std::int64_t{1} << 31}),
                 SafetensorsError);
}

TEST(SafetensorsConvert, Integers) {
    EXPECT_EQ(to_doubles(raw_tensor<std::int64_t>(
                  "I64", {3}, {std::numeric_limits<std::int64_t>::min(), -1, 9007199254740993})),
              (std::vector<double>{-0x1p63, -1, 9007199254740992.0}));
    EXPECT_EQ(to_doubles(raw_tensor<std::int32_t>("I32", {2}, {-2147483647 - 1, 2147483647})),
              (std::vector<double>{-2147483648.0, 2147483647.0}));
    EXPECT_EQ(to_doubles(raw_tensor<std::int16_t>("I16", {2}, {-32768, 32767})),
              (std::vector<double>{-32768, 32767}));
    EXPECT_EQ(to_doubles(raw_tensor<std::int8_t>("I8", {2}, {-128, 127})),
              (std::vector<double>{-128, 127}));
    EXPECT_EQ(to_doubles(raw_tensor<std::uint8_t>("U8", {2}, {0, 255})),
              (std::vector<double>{0, 255}));
    EXPECT_EQ(to_doubles(raw_tensor<std::uint8_t>("BOOL", {3}, {0, 1, 255})),
              (std::vector<double>{0, 1, 1}));
}

TEST(SafetensorsConvert, FloatSpecials) {
    const std::vector<double> values = to_doubles(raw_tensor<std::uint32_t>(
        "F32", {5}, {0x7f800000, 0xff800000, 0x7fc00000, 0x80000000, 0x00000001}));
    EXPECT_EQ(values[0], std::numeric_limits<double>::infinity());
    EXPECT_EQ(values[1], -std::numeric_limits<double>::infinity());
    EXPECT_TRUE(std::isnan(values[2]));
    EXPECT_TRUE(values[3] == 0 && std::signbit(values[3]));
    EXPECT_EQ(values[4], 0x1p-149);
}

// All of f16, against a conversion that works on the bits of a float instead.
TEST(SafetensorsConvert, EveryHalf) {
    std::vector<std::uint16_t> halves(65536);
    for (std::size_t i = 0; i < halves.size(); ++i) {
        halves[i] = static_cast<std::uint16_t>(i);
    }
    const std::vector<double> values = to_doubles(raw_tensor("F16", {65536}, halves));
    for (std::uint32_t bits = 0; bits < 65536; ++bits) {
        // Moving exponent and mantissa into a float's place and scaling by 2^112 changes the bias.
        const std::uint32_t moved = (bits & 0x7fffU) << 13U;
        float expected = std::bit_cast<float>(moved) * 0x1p112F;
        if ((bits & 0x7c00U) == 0x7c00U) {
            expected = std::bit_cast<float>(moved | 0x7f800000U);
        }
        const double value = values[bits];
        EXPECT_EQ(std::signbit(value), (bits & 0x8000U) != 0) << bits;
        if (std::isnan(expected)) {
            EXPECT_TRUE(std::isnan(value)) << bits;
        } else {
            EXPECT_EQ(std::abs(value), static_cast<double>(expected)) << bits;
        }
    }
    EXPECT_EQ(values[0x0001], 0x1p-24);
    EXPECT_EQ(values[0x03ff], 0x1.ff8p-15);
    EXPECT_EQ(values[0x0400], 0x1p-14);
    EXPECT_EQ(values[0x3c00], 1);
    EXPECT_EQ(values[0x7bff], 65504);
    EXPECT_EQ(values[0xfc00], -std::numeric_limits<double>::infinity());
}

TEST(SafetensorsConvert, Bfloat16) {
    const std::vector<double> values = to_doubles(raw_tensor<std::uint16_t>(
        "BF16", {8}, {0x3f80, 0xbf80, 0x0001, 0x7f80, 0xff80, 0x7fc0, 0x8000, 0x4049}));
    EXPECT_EQ(values[0], 1);
    EXPECT_EQ(values[1], -1);
    EXPECT_EQ(values[2], 0x1p-133);
    EXPECT_EQ(values[3], std::numeric_limits<double>::infinity());
    EXPECT_EQ(values[4], -std::numeric_limits<double>::infinity());
    EXPECT_TRUE(std::isnan(values[5]));
    EXPECT_TRUE(values[6] == 0 && std::signbit(values[6]));
    EXPECT_EQ(values[7], 3.140625);
}

TEST(SafetensorsConvert, RefusesBadTensors) {
    EXPECT_HAS(error_of([] { to_doubles({"F32", {2}, Bytes(4)}); }), "holds 4 bytes");
    EXPECT_HAS(error_of([] { to_doubles({"U64", {1}, Bytes(8)}); }), "unsupported dtype \"U64\"");
    EXPECT_HAS(error_of([] { to_doubles({"I8", {-1}, {}}); }), "negative extent");
    EXPECT_HAS(error_of([] { to_doubles({"", {}, {}}); }), "unsupported dtype \"\"");
}

}  // namespace
