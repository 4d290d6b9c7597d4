// SPDX-License-Identifier: Apache-2.0
//
// libFuzzer target for the safetensors reader. Any input must either parse or throw
// SafetensorsError; what parses must convert to doubles and survive being written and read again.
//
//     clang++ -std=c++20 -g -O1 -fsanitize=fuzzer,address,undefined safetensors_fuzz.cpp

#include "../../tools/support/safetensors.hpp"

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace interstate::tools;

[[noreturn]] void fail(const char* message) {
    std::fprintf(stderr, "safetensors_fuzz: %s\n", message);
    std::abort();
}

void check(std::span<const std::byte> bytes) {
    SafetensorsFile file;
    try {
        file = parse_safetensors(bytes, "fuzz");
    } catch (const SafetensorsError& error) {
        for (const char c : std::string_view(error.what())) {
            if (c < 0x20 || c > 0x7e) {
                fail("a message is not one line of printable ASCII");
            }
        }
        return;
    }
    for (const auto& [name, tensor] : file.tensors) {
        if (to_doubles(tensor).size() != static_cast<std::size_t>(element_count(tensor.shape))) {
            fail("to_doubles gives another number of elements");
        }
    }
    const std::vector<std::byte> written = serialize_safetensors(file, "fuzz");
    const SafetensorsFile again = parse_safetensors(written, "fuzz");
    if (!(again == file)) {
        fail("a file changed when written and read again");
    }
    if (serialize_safetensors(again, "fuzz") != written) {
        fail("the same file was written as different bytes");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    const std::span<const std::byte> bytes = std::as_bytes(std::span(data, size));
    check(bytes);

    // Once more as if the length were right, so that mutations reach the JSON and the offsets: the
    // header goes up to the last closing brace, the rest is data.
    std::vector<std::byte> repaired(bytes.begin(), bytes.end());
    for (std::size_t end = size; end > 8; --end) {
        if (data[end - 1] == '}') {
            const std::uint64_t length = end - 8;
            std::memcpy(repaired.data(), &length, 8);
            check(repaired);
            break;
        }
    }
    return 0;
}
