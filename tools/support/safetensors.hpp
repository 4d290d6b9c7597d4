// SPDX-License-Identifier: Apache-2.0
//
// Reader and writer of safetensors files, for tools, tests and examples. The library headers never
// include this file: it needs nlohmann-json, throws exceptions, and uses POSIX file calls.
//
// The format:
//
//     8 bytes            length of the header, little endian
//     header             a JSON object, padded with spaces:
//                        {"__metadata__": {string: string, ...},                 (optional)
//                         name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]},
//                         ...}
//     data               the tensors, row-major, little endian; offsets count from here
//
// A file is treated as hostile. Whatever it holds, reading it either succeeds or throws
// SafetensorsError with one line of printable ASCII that names the file and the tensor, says what
// was found and what was expected. The header is read by a state machine that accepts only the
// grammar above, so nesting cannot grow the stack, and every number is checked before it is used.
//
// Stricter than the reference implementation where leniency helps nobody: fields other than the
// three above, ranks above 64 (numpy's limit), and shapes whose non-zero extents alone would
// overflow (their strides would) are errors.

#pragma once

#include <nlohmann/json.hpp>

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace interstate::tools {

static_assert(std::endian::native == std::endian::little,
              "safetensors data is little endian and is copied without swapping");

/// Anything wrong with a file, a tensor, or reading and writing one. what() is a single line.
struct SafetensorsError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// The dtypes that can be read and written; the format has a few more.
enum class SafetensorsDtype { f64, f32, f16, bf16, i64, i32, i16, i8, u8, boolean };

/// A tensor that owns its data: row-major, little endian. An empty shape is a scalar.
struct SafetensorsTensor {
    std::string dtype;  // the format's own name, such as "F32"
    std::vector<std::int64_t> shape;
    std::vector<std::byte> data;

    bool operator==(const SafetensorsTensor&) const = default;
};

struct SafetensorsFile {
    std::map<std::string, std::string> metadata;
    std::map<std::string, SafetensorsTensor> tensors;

    bool operator==(const SafetensorsFile&) const = default;
};

namespace st_detail {  // short for safetensors, and apart from other tools' details

struct DtypeRow {
    std::string_view name;
    SafetensorsDtype dtype;
    std::size_t item_size;
};

inline constexpr std::array<DtypeRow, 10> dtype_rows{{
    {"F64", SafetensorsDtype::f64, 8},
    {"F32", SafetensorsDtype::f32, 4},
    {"F16", SafetensorsDtype::f16, 2},
    {"BF16", SafetensorsDtype::bf16, 2},
    {"I64", SafetensorsDtype::i64, 8},
    {"I32", SafetensorsDtype::i32, 4},
    {"I16", SafetensorsDtype::i16, 2},
    {"I8", SafetensorsDtype::i8, 1},
    {"U8", SafetensorsDtype::u8, 1},
    {"BOOL", SafetensorsDtype::boolean, 1},
}};

}  // namespace st_detail

/// The dtype with this name, or nothing when the name is not readable here.
inline std::optional<SafetensorsDtype> dtype_from_name(std::string_view name) {
    for (const st_detail::DtypeRow& row : st_detail::dtype_rows) {
        if (row.name == name) {
            return row.dtype;
        }
    }
    return std::nullopt;
}

/// The format's name of a dtype.
inline std::string_view dtype_name(SafetensorsDtype dtype) {
    for (const st_detail::DtypeRow& row : st_detail::dtype_rows) {
        if (row.dtype == dtype) {
            return row.name;
        }
    }
    throw SafetensorsError("not a value of SafetensorsDtype");
}

/// Bytes of one element.
inline std::size_t dtype_size(SafetensorsDtype dtype) {
    for (const st_detail::DtypeRow& row : st_detail::dtype_rows) {
        if (row.dtype == dtype) {
            return row.item_size;
        }
    }
    throw SafetensorsError("not a value of SafetensorsDtype");
}

namespace st_detail {

// Strings here are never built as literal + temporary: gcc 12 wrongly warns of that at -O3.

inline constexpr std::string_view metadata_key = "__metadata__";
inline constexpr std::size_t length_bytes = 8;
inline constexpr std::size_t max_header_bytes = 100'000'000;  // as the reference implementation
inline constexpr std::size_t max_rank = 64;
inline constexpr std::size_t max_quoted_bytes = 120;  // keeps a message readable in a terminal

// Text from a file must not be able to break a line, move the cursor or hide in a message, so
// everything but printable ASCII is escaped. Long text is cut.
inline std::string printable(std::string_view text, std::size_t limit, bool escape_quote = false) {
    constexpr std::string_view digits = "0123456789abcdef";
    std::string result;
    for (const char c : text.substr(0, limit)) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == '\\' || (c == '"' && escape_quote)) {
            result += '\\';
            result += c;
        } else if (byte >= 0x20 && byte < 0x7f) {
            result += c;
        } else {
            result += "\\x";
            result += digits[byte >> 4U];
            result += digits[byte & 0xfU];
        }
    }
    if (text.size() > limit) {
        result += "...";
    }
    return result;
}

inline std::string in_quotes(std::string_view text) {
    return std::string("\"") + printable(text, max_quoted_bytes, true) + "\"";
}

inline std::string shape_text(std::span<const std::int64_t> shape) {
    std::string result = "[";
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        if (axis == max_rank) {
            return result + ", ...]";
        }
        result.append(axis == 0 ? "" : ", ").append(std::to_string(shape[axis]));
    }
    return result + "]";
}

// The start of every message: the file, and the tensor where there is one.
inline std::string context(std::string_view what) {
    return printable(what, 4096) + ": ";
}

inline std::string context(std::string_view what, std::string_view tensor_name) {
    return context(what) + "tensor " + in_quotes(tensor_name) + ": ";
}

inline std::size_t checked_item_size(const std::string& where, std::string_view name) {
    const std::optional<SafetensorsDtype> dtype = dtype_from_name(name);
    if (!dtype) {
        std::string readable;
        for (const DtypeRow& row : dtype_rows) {
            readable.append(readable.empty() ? "" : ", ").append(row.name);
        }
        throw SafetensorsError(where + "unsupported dtype " + in_quotes(name) +
                               ", expected one of " + readable);
    }
    return dtype_size(*dtype);
}

// Bytes of a tensor of this shape. Extents of zero do not hide an overflow of the others.
inline std::uint64_t checked_byte_count(const std::string& where,
                                        std::span<const std::int64_t> shape,
                                        std::size_t item_size) {
    constexpr auto limit = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    if (shape.size() > max_rank) {
        throw SafetensorsError(where + "shape has " + std::to_string(shape.size()) +
                               " axes, expected at most " + std::to_string(max_rank));
    }
    std::uint64_t bytes = item_size;
    bool empty = false;
    for (const std::int64_t extent : shape) {
        if (extent < 0) {
            throw SafetensorsError(where + "shape " + shape_text(shape) +
                                   " has a negative extent, expected zero or more");
        }
        if (extent == 0) {
            empty = true;
        } else if (bytes > limit / static_cast<std::uint64_t>(extent)) {
            throw SafetensorsError(where + "shape " + shape_text(shape) +
                                   " is too large, expected fewer than 2^63 bytes");
        } else {
            bytes *= static_cast<std::uint64_t>(extent);
        }
    }
    return empty ? 0 : bytes;
}

// The checks that a tensor made by hand, rather than parsed, has yet to pass.
inline void check_tensor(const std::string& where, const SafetensorsTensor& tensor) {
    const std::size_t item_size = checked_item_size(where, tensor.dtype);
    const std::uint64_t expected = checked_byte_count(where, tensor.shape, item_size);
    if (tensor.data.size() != expected) {
        throw SafetensorsError(where + "holds " + std::to_string(tensor.data.size()) +
                               " bytes of data, expected " + std::to_string(expected) + " for " +
                               tensor.dtype + " of shape " + shape_text(tensor.shape));
    }
}

// One tensor as the header describes it.
struct HeaderEntry {
    std::optional<std::string> dtype;
    std::optional<std::vector<std::int64_t>> shape;
    std::optional<std::vector<std::uint64_t>> offsets;
};

// Receives the header's JSON as events and accepts only the grammar of the format. Building no
// document of the JSON is what makes duplicate keys visible and deep nesting harmless.
class HeaderReader final : public nlohmann::json_sax<nlohmann::json> {
public:
    explicit HeaderReader(std::string_view what) : m_what(what) {}

    std::map<std::string, std::string> metadata;
    std::map<std::string, HeaderEntry> entries;

    bool null() override {
        refuse("null");
    }

    bool boolean(bool value) override {
        refuse(value ? "true" : "false");
    }

    // The parser calls this for numbers with a minus sign only.
    bool number_integer(std::int64_t value) override {
        refuse(std::string("the negative number ") + std::to_string(value));
    }

    bool number_unsigned(std::uint64_t value) override {
        if (m_place == Place::shape) {
            if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
                refuse(std::string("the number ") + std::to_string(value));
            }
            std::vector<std::int64_t>& shape = *m_entry->second.shape;
            if (shape.size() == max_rank) {
                throw SafetensorsError(subject() + "shape has more than " +
                                       std::to_string(max_rank) + " axes");
            }
            shape.push_back(static_cast<std::int64_t>(value));
            return true;
        }
        if (m_place == Place::offsets) {
            std::vector<std::uint64_t>& offsets = *m_entry->second.offsets;
            if (offsets.size() == 2) {
                throw SafetensorsError(subject() +
                                       "data_offsets has more than two numbers, expected [begin, "
                                       "end]");
            }
            offsets.push_back(value);
            return true;
        }
        refuse(std::string("the number ") + std::to_string(value));
    }

    // Fractions, exponents, and integers too large for 64 bits.
    bool number_float(double /*value*/, const std::string& text) override {
        refuse(std::string("the number ") + printable(text, max_quoted_bytes));
    }

    bool string(std::string& value) override {
        if (m_place == Place::metadata) {
            metadata.find(m_key)->second = std::move(value);
            return true;
        }
        if (m_place == Place::entry && m_key == "dtype") {
            m_entry->second.dtype = std::move(value);
            return true;
        }
        refuse(std::string("the string ") + in_quotes(value));
    }

    bool binary(nlohmann::json::binary_t& /*value*/) override {
        refuse("binary data");
    }

    bool start_object(std::size_t /*elements*/) override {
        if (m_place == Place::before) {
            m_place = Place::top;
            return true;
        }
        if (m_place == Place::top) {
            m_place = m_key == metadata_key ? Place::metadata : Place::entry;
            return true;
        }
        refuse("an object");
    }

    bool key(std::string& value) override {
        m_key = std::move(value);
        if (m_place == Place::metadata) {
            if (!metadata.emplace(m_key, std::string()).second) {
                throw SafetensorsError(context(m_what) + "metadata key " + in_quotes(m_key) +
                                       " appears twice");
            }
        } else if (m_place == Place::entry) {
            take_field();
        } else if (m_key == metadata_key) {
            if (std::exchange(m_has_metadata, true)) {
                throw SafetensorsError(context(m_what) + in_quotes(metadata_key) +
                                       " appears twice");
            }
        } else {
            const auto [position, is_new] = entries.emplace(m_key, HeaderEntry());
            if (!is_new) {
                throw SafetensorsError(context(m_what, m_key) + "name appears twice");
            }
            m_entry = position;
        }
        return true;
    }

    bool end_object() override {
        if (m_place == Place::entry) {
            const HeaderEntry& entry = m_entry->second;
            const char* missing = !entry.dtype     ? "dtype"
                                  : !entry.shape   ? "shape"
                                  : !entry.offsets ? "data_offsets"
                                                   : nullptr;
            if (missing != nullptr) {
                throw SafetensorsError(subject() + missing +
                                       " is missing, expected dtype, shape and data_offsets");
            }
        }
        m_place = m_place == Place::top ? Place::after : Place::top;
        return true;
    }

    bool start_array(std::size_t /*elements*/) override {
        if (m_place == Place::entry && m_key == "shape") {
            m_entry->second.shape.emplace();
            m_place = Place::shape;
            return true;
        }
        if (m_place == Place::entry && m_key == "data_offsets") {
            m_entry->second.offsets.emplace();
            m_place = Place::offsets;
            return true;
        }
        refuse("an array");
    }

    bool end_array() override {
        if (m_place == Place::offsets && m_entry->second.offsets->size() != 2) {
            throw SafetensorsError(subject() + "data_offsets has " +
                                   std::to_string(m_entry->second.offsets->size()) +
                                   " numbers, expected [begin, end]");
        }
        m_place = Place::entry;
        return true;
    }

    bool parse_error(std::size_t /*position*/, const std::string& /*last_token*/,
                     const nlohmann::json::exception& error) override {
        // Drops the parser's "[json.exception.parse_error.101] ".
        std::string_view text = error.what();
        if (const std::size_t end = text.find("] "); end != text.npos) {
            text.remove_prefix(end + 2);
        }
        throw SafetensorsError(
            context(m_what) + "header is not valid JSON: " + printable(text, 2 * max_quoted_bytes));
    }

private:
    // Where in the header's grammar the next event stands.
    enum class Place { before, top, metadata, entry, shape, offsets, after };

    // The file, and the tensor when the reader is inside one.
    std::string subject() const {
        const bool in_tensor = m_place == Place::entry || m_place == Place::shape ||
                               m_place == Place::offsets ||
                               (m_place == Place::top && m_key != metadata_key);
        return in_tensor ? context(m_what, m_entry->first) : context(m_what);
    }

    // A key inside a tensor's object: known, and not seen before.
    void take_field() {
        const HeaderEntry& entry = m_entry->second;
        bool seen = false;
        if (m_key == "dtype") {
            seen = entry.dtype.has_value();
        } else if (m_key == "shape") {
            seen = entry.shape.has_value();
        } else if (m_key == "data_offsets") {
            seen = entry.offsets.has_value();
        } else {
            throw SafetensorsError(subject() + "unknown field " + in_quotes(m_key) +
                                   ", expected dtype, shape and data_offsets only");
        }
        if (seen) {
            throw SafetensorsError(subject() + m_key + " appears twice");
        }
    }

    // Every value that the grammar has no room for ends here.
    [[noreturn]] void refuse(const std::string& found) const {
        std::string place;
        std::string expected;
        switch (m_place) {
            case Place::before:
            case Place::after:
                place = "header";
                expected = "an object";
                break;
            case Place::top:
                place = m_key == metadata_key ? in_quotes(metadata_key) : "its header entry";
                expected = m_key == metadata_key ? "an object of strings"
                                                 : "an object with dtype, shape and data_offsets";
                break;
            case Place::metadata:
                place = std::string("metadata value of ") + in_quotes(m_key);
                expected = "a string";
                break;
            case Place::entry:
                place = m_key;
                expected = m_key == "dtype"   ? "a string"
                           : m_key == "shape" ? "an array of integers"
                                              : "an array of two integers";
                break;
            case Place::shape:
                place = "an extent in shape";
                expected = "an integer from 0 to 2^63 - 1";
                break;
            case Place::offsets:
                place = "an offset in data_offsets";
                expected = "an integer from 0 to 2^64 - 1";
                break;
        }
        throw SafetensorsError(subject() + place + " is " + found + ", expected " + expected);
    }

    std::string_view m_what;
    Place m_place = Place::before;
    std::string m_key;  // the last key seen at the current level
    std::map<std::string, HeaderEntry>::iterator m_entry;
    bool m_has_metadata = false;
};

// The header's text, once its length has been checked against the file.
inline std::string_view header_text(std::span<const std::byte> bytes, std::string_view what) {
    const std::string where = context(what);
    if (bytes.size() < length_bytes) {
        throw SafetensorsError(where + "file has " + std::to_string(bytes.size()) +
                               " bytes, expected at least the 8 bytes of the header length");
    }
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), length_bytes);
    const std::size_t rest = bytes.size() - length_bytes;
    if (length > max_header_bytes) {
        throw SafetensorsError(where + "header length is " + std::to_string(length) +
                               " bytes, expected at most " + std::to_string(max_header_bytes) +
                               " (is this a safetensors file?)");
    }
    if (length > rest) {
        throw SafetensorsError(where + "header length is " + std::to_string(length) +
                               " bytes, but the file has only " + std::to_string(rest) +
                               " bytes after it (truncated?)");
    }
    const std::string_view header(reinterpret_cast<const char*>(bytes.data()) + length_bytes,
                                  static_cast<std::size_t>(length));
    if (header.empty() || header.front() != '{') {
        throw SafetensorsError(where + "header is not a JSON object, expected it to begin with {");
    }
    // The JSON parser takes NUL for the end of the text and would not look at what follows.
    if (const std::size_t position = header.find('\0'); position != header.npos) {
        throw SafetensorsError(where + "header is not valid JSON: NUL byte at byte " +
                               std::to_string(position));
    }
    return header;
}

// Checks one entry against the size of the data.
inline void check_entry(const std::string& where, const HeaderEntry& entry, std::size_t data_size) {
    const std::size_t item_size = checked_item_size(where, *entry.dtype);
    const std::uint64_t expected = checked_byte_count(where, *entry.shape, item_size);
    const std::uint64_t begin = (*entry.offsets)[0];
    const std::uint64_t end = (*entry.offsets)[1];
    const std::string range =
        std::string("[") + std::to_string(begin) + ", " + std::to_string(end) + "]";
    if (begin > end) {
        throw SafetensorsError(where + "data_offsets " + range +
                               " are reversed, expected begin <= end");
    }
    if (end - begin != expected) {
        throw SafetensorsError(where + "data_offsets " + range + " span " +
                               std::to_string(end - begin) + " bytes, expected " +
                               std::to_string(expected) + " for " + *entry.dtype + " of shape " +
                               shape_text(*entry.shape));
    }
    if (end > data_size) {
        throw SafetensorsError(where + "data_offsets " + range + " end after the data, which has " +
                               std::to_string(data_size) + " bytes (truncated?)");
    }
}

}  // namespace st_detail

/// Elements of a tensor of this shape; throws where an extent is negative or the product too large.
inline std::int64_t element_count(std::span<const std::int64_t> shape) {
    return static_cast<std::int64_t>(st_detail::checked_byte_count("tensor: ", shape, 1));
}

/// Parses a whole file held in memory. `what` names it in messages.
inline SafetensorsFile parse_safetensors(std::span<const std::byte> bytes, std::string_view what) {
    const std::string_view header = st_detail::header_text(bytes, what);
    st_detail::HeaderReader reader(what);
    // Without the padding, which the JSON parser would keep as one long token.
    const std::string_view json = header.substr(0, header.find_last_not_of(" \t\r\n") + 1);
    nlohmann::json::sax_parse(json.begin(), json.end(), &reader);

    const std::span<const std::byte> data = bytes.subspan(st_detail::length_bytes + header.size());
    using Entry = std::pair<const std::string, st_detail::HeaderEntry>;
    std::vector<const Entry*> in_file_order;
    in_file_order.reserve(reader.entries.size());
    for (const Entry& entry : reader.entries) {
        st_detail::check_entry(st_detail::context(what, entry.first), entry.second, data.size());
        in_file_order.push_back(&entry);
    }
    // The end counts too: an empty tensor stands before the one that begins at the same offset.
    std::sort(in_file_order.begin(), in_file_order.end(), [](const Entry* a, const Entry* b) {
        return *a->second.offsets < *b->second.offsets;
    });

    // The tensors must tile the data: a byte that belongs to two, or to none, is an error.
    std::uint64_t covered = 0;
    for (const Entry* entry : in_file_order) {
        const std::uint64_t begin = (*entry->second.offsets)[0];
        if (begin != covered) {
            throw SafetensorsError(st_detail::context(what, entry->first) + "data begins at byte " +
                                   std::to_string(begin) + ", expected " + std::to_string(covered) +
                                   " where the tensor before it ends (" +
                                   (begin < covered ? "overlap" : "gap") + ")");
        }
        covered = (*entry->second.offsets)[1];
    }
    if (covered != data.size()) {
        throw SafetensorsError(st_detail::context(what) + std::to_string(data.size() - covered) +
                               " bytes follow the last tensor, expected the file to end there");
    }

    SafetensorsFile file;
    file.metadata = std::move(reader.metadata);
    for (auto& [name, entry] : reader.entries) {
        const auto begin = static_cast<std::size_t>((*entry.offsets)[0]);
        const auto end = static_cast<std::size_t>((*entry.offsets)[1]);
        const std::span<const std::byte> region = data.subspan(begin, end - begin);
        file.tensors.emplace(name, SafetensorsTensor{std::move(*entry.dtype),
                                                     std::move(*entry.shape),
                                                     {region.begin(), region.end()}});
    }
    return file;
}

namespace st_detail {

// What a file holds before its data, and the order of the data.
struct FileLayout {
    std::string head;  // length and padded header
    std::vector<const SafetensorsTensor*> tensors;
};

inline FileLayout make_layout(const SafetensorsFile& file, std::string_view what) {
    const auto json_string = [&](const std::string& text, const char* role) {
        try {
            return nlohmann::json(text).dump();
        } catch (const nlohmann::json::exception&) {
            throw SafetensorsError(context(what) + role + " " + in_quotes(text) +
                                   " is not valid UTF-8");
        }
    };

    struct Item {
        const std::string* name;
        const SafetensorsTensor* tensor;
        std::size_t item_size;
        std::uint64_t begin;
    };
    std::vector<Item> items;  // in order of names, as the map
    items.reserve(file.tensors.size());
    for (const auto& [name, tensor] : file.tensors) {
        if (name == metadata_key) {
            throw SafetensorsError(context(what, name) + "the format reserves this name");
        }
        check_tensor(context(what, name), tensor);
        items.push_back({&name, &tensor, dtype_size(*dtype_from_name(tensor.dtype)), 0});
    }

    // Data goes by falling element size, as the reference implementation does: together with the
    // padding of the header it keeps every tensor aligned for whoever maps the file into memory.
    std::vector<Item*> in_file_order;
    in_file_order.reserve(items.size());
    for (Item& item : items) {
        in_file_order.push_back(&item);
    }
    std::stable_sort(in_file_order.begin(), in_file_order.end(),
                     [](const Item* a, const Item* b) { return a->item_size > b->item_size; });
    FileLayout layout;
    layout.tensors.reserve(items.size());
    std::uint64_t offset = 0;
    for (Item* item : in_file_order) {
        item->begin = offset;
        offset += item->tensor->data.size();
        layout.tensors.push_back(item->tensor);
    }

    std::string header = "{";
    const char* separator = "";
    if (!file.metadata.empty()) {
        header.append("\"").append(metadata_key).append("\":{");
        for (const auto& [key, value] : file.metadata) {
            header.append(separator).append(json_string(key, "metadata key"));
            header.append(":").append(json_string(value, "metadata value"));
            separator = ",";
        }
        header += "}";
        separator = ",";
    }
    for (const Item& item : items) {
        header.append(separator).append(json_string(*item.name, "tensor name"));
        header.append(":{\"dtype\":\"").append(item.tensor->dtype).append("\",\"shape\":[");
        separator = "";
        for (const std::int64_t extent : item.tensor->shape) {
            header.append(separator).append(std::to_string(extent));
            separator = ",";
        }
        const std::uint64_t end = item.begin + item.tensor->data.size();
        header.append("],\"data_offsets\":[").append(std::to_string(item.begin));
        header.append(",").append(std::to_string(end)).append("]}");
        separator = ",";
    }
    header += "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    if (header.size() > max_header_bytes) {
        throw SafetensorsError(context(what) + "header needs " + std::to_string(header.size()) +
                               " bytes, expected at most " + std::to_string(max_header_bytes));
    }

    const std::uint64_t length = header.size();
    layout.head.resize(length_bytes);
    std::memcpy(layout.head.data(), &length, length_bytes);
    layout.head += header;
    return layout;
}

}  // namespace st_detail

/// The bytes of a file: the same input always gives the same bytes. `what` names it in messages.
inline std::vector<std::byte> serialize_safetensors(const SafetensorsFile& file,
                                                    std::string_view what) {
    const st_detail::FileLayout layout = st_detail::make_layout(file, what);
    const std::span<const std::byte> head = std::as_bytes(std::span(layout.head));
    std::vector<std::byte> bytes(head.begin(), head.end());
    for (const SafetensorsTensor* tensor : layout.tensors) {
        bytes.insert(bytes.end(), tensor->data.begin(), tensor->data.end());
    }
    return bytes;
}

namespace st_detail {

[[noreturn]] inline void throw_system_error(const std::filesystem::path& path,
                                            const std::string& action, int error_number) {
    throw SafetensorsError(context(path.native()) + action + ": " +
                           std::generic_category().message(error_number));
}

// Closes a file descriptor when an exception passes by.
class Descriptor {
public:
    explicit Descriptor(int number) : m_number(number) {}
    Descriptor(const Descriptor&) = delete;
    Descriptor& operator=(const Descriptor&) = delete;

    ~Descriptor() {
        close();
    }

    int get() const {
        return m_number;
    }

    // False, with errno set, where the system reports late that data was lost.
    bool close() {
        const int number = std::exchange(m_number, -1);
        return number < 0 || ::close(number) == 0 || errno == EINTR;
    }

private:
    int m_number;
};

inline int open_retrying(const std::filesystem::path& path, int flags, mode_t mode = 0) {
    int number = -1;
    do {
        number = ::open(path.c_str(), flags | O_CLOEXEC, mode);
    } while (number < 0 && errno == EINTR);
    return number;
}

inline void write_all(const Descriptor& descriptor, std::span<const std::byte> bytes,
                      const std::filesystem::path& path) {
    while (!bytes.empty()) {
        const ssize_t count = ::write(descriptor.get(), bytes.data(), bytes.size());
        if (count > 0) {
            bytes = bytes.subspan(static_cast<std::size_t>(count));
        } else if (count == 0 || errno != EINTR) {
            throw_system_error(path, "cannot write", count == 0 ? EIO : errno);
        }
    }
}

inline void sync_to_disk(const Descriptor& descriptor, const std::filesystem::path& path) {
    // EINVAL: the file system has nothing to sync, which is not a loss of data.
    if (::fsync(descriptor.get()) != 0 && errno != EINVAL) {
        throw_system_error(path, "cannot flush to disk", errno);
    }
}

// A new file beside the target, removed unless it has taken the target's name. Its own name is
// short, so that it fits wherever the target's does, and says what it is, should a killed program
// leave it behind.
class TemporaryFile {
public:
    // `path` is the target as the caller knows it, for messages.
    TemporaryFile(const std::filesystem::path& directory, const std::filesystem::path& path) {
        static std::atomic<unsigned> counter{0};
        int error_number = EEXIST;
        for (int attempt = 0; attempt < 1000 && error_number == EEXIST; ++attempt) {
            m_path = directory / (std::string(".safetensors-") + std::to_string(::getpid()) + "-" +
                                  std::to_string(counter.fetch_add(1)) + ".tmp");
            m_descriptor.emplace(open_retrying(m_path, O_WRONLY | O_CREAT | O_EXCL, 0666));
            if (m_descriptor->get() >= 0) {
                return;
            }
            error_number = errno;
        }
        throw_system_error(path, "cannot create a temporary file beside it", error_number);
    }
    TemporaryFile(const TemporaryFile&) = delete;
    TemporaryFile& operator=(const TemporaryFile&) = delete;

    ~TemporaryFile() {
        if (!m_renamed) {
            ::unlink(m_path.c_str());
        }
    }

    Descriptor& descriptor() {
        return *m_descriptor;
    }

    // False, with errno set, when the target could not be replaced.
    bool rename_to(const std::filesystem::path& target) {
        m_renamed = ::rename(m_path.c_str(), target.c_str()) == 0;
        return m_renamed;
    }

private:
    std::filesystem::path m_path;
    std::optional<Descriptor> m_descriptor;
    bool m_renamed = false;
};

}  // namespace st_detail

/// Reads a file. Needs memory for twice its size while it runs.
inline SafetensorsFile read_safetensors(const std::filesystem::path& path) {
    // Non-blocking, so that opening a named pipe without a writer does not hang.
    const st_detail::Descriptor descriptor(st_detail::open_retrying(path, O_RDONLY | O_NONBLOCK));
    if (descriptor.get() < 0) {
        st_detail::throw_system_error(path, "cannot open", errno);
    }
    struct stat status {};
    if (::fstat(descriptor.get(), &status) != 0) {
        st_detail::throw_system_error(path, "cannot read", errno);
    }
    if (!S_ISREG(status.st_mode)) {
        throw SafetensorsError(st_detail::context(path.native()) + "not a regular file");
    }
    std::vector<std::byte> bytes(static_cast<std::size_t>(status.st_size));
    for (std::size_t filled = 0; filled < bytes.size();) {
        const ssize_t count =
            ::read(descriptor.get(), bytes.data() + filled, bytes.size() - filled);
        if (count > 0) {
            filled += static_cast<std::size_t>(count);
        } else if (count == 0) {
            throw SafetensorsError(st_detail::context(path.native()) +
                                   "the file became shorter while it was read");
        } else if (errno != EINTR) {
            st_detail::throw_system_error(path, "cannot read", errno);
        }
    }
    return parse_safetensors(bytes, path.native());
}

/// Writes a file atomically: whatever happens, `path` holds either its old content or all of the
/// new. Only a killed program can leave a temporary file (.safetensors-*.tmp) beside it. A symbolic
/// link is followed; an existing file keeps its permission bits.
inline void write_safetensors(const std::filesystem::path& path, const SafetensorsFile& file) {
    const st_detail::FileLayout layout = st_detail::make_layout(file, path.native());

    std::filesystem::path target = path;
    std::error_code error;
    if (std::filesystem::is_symlink(std::filesystem::symlink_status(path, error))) {
        target = std::filesystem::canonical(path, error);
        if (error) {
            throw SafetensorsError(st_detail::context(path.native()) +
                                   "cannot follow the symbolic link: " + error.message());
        }
    }
    if (!target.has_filename()) {
        throw SafetensorsError(st_detail::context(path.native()) + "expected the name of a file");
    }
    struct stat status {};
    const bool exists = ::stat(target.c_str(), &status) == 0;
    if (exists && !S_ISREG(status.st_mode)) {
        throw SafetensorsError(st_detail::context(path.native()) +
                               "exists and is not a regular file");
    }
    // rename() would replace a file that its owner protected against writing.
    if (exists && ::faccessat(AT_FDCWD, target.c_str(), W_OK, AT_EACCESS) != 0) {
        st_detail::throw_system_error(path, "cannot write", errno);
    }

    const std::filesystem::path directory = target.has_parent_path() ? target.parent_path() : ".";
    st_detail::TemporaryFile temporary(directory, path);
    st_detail::Descriptor& descriptor = temporary.descriptor();
    if (exists && ::fchmod(descriptor.get(), status.st_mode & 0777U) != 0) {
        st_detail::throw_system_error(path, "cannot keep the permissions of the file", errno);
    }
    st_detail::write_all(descriptor, std::as_bytes(std::span(layout.head)), path);
    for (const SafetensorsTensor* tensor : layout.tensors) {
        st_detail::write_all(descriptor, tensor->data, path);
    }
    st_detail::sync_to_disk(descriptor, path);
    if (!descriptor.close()) {
        st_detail::throw_system_error(path, "cannot write", errno);
    }
    if (!temporary.rename_to(target)) {
        st_detail::throw_system_error(path, "cannot rename the temporary file to it", errno);
    }
    // Makes the new name survive a power cut. The file is complete either way, so that a file
    // system which cannot do it is no error.
    const st_detail::Descriptor parent(st_detail::open_retrying(directory, O_RDONLY | O_DIRECTORY));
    if (parent.get() >= 0) {
        ::fsync(parent.get());
    }
}

namespace st_detail {

inline double double_from_f16(std::uint16_t bits) {
    const int exponent = (bits >> 10) & 0x1f;
    const int mantissa = bits & 0x3ff;
    double magnitude = 0;
    if (exponent == 0x1f) {
        magnitude = mantissa == 0 ? std::numeric_limits<double>::infinity()
                                  : std::numeric_limits<double>::quiet_NaN();
    } else if (exponent == 0) {
        magnitude = std::ldexp(mantissa, -24);  // zero and subnormals
    } else {
        magnitude = std::ldexp(1024 + mantissa, exponent - 25);
    }
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

inline double double_from_bf16(std::uint16_t bits) {
    return static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16U));
}

// Reads elements of type Stored, at any alignment, and converts each.
template <typename Stored, typename Convert>
std::vector<double> convert_elements(std::span<const std::byte> data, Convert convert) {
    std::vector<double> values(data.size() / sizeof(Stored));
    for (std::size_t i = 0; i < values.size(); ++i) {
        Stored stored{};
        std::memcpy(&stored, data.data() + i * sizeof(Stored), sizeof(Stored));
        values[i] = convert(stored);
    }
    return values;
}

template <typename Stored>
std::vector<double> convert_elements(std::span<const std::byte> data) {
    return convert_elements<Stored>(data, [](Stored value) { return static_cast<double>(value); });
}

template <typename Element>
SafetensorsTensor tensor_from(SafetensorsDtype dtype, std::span<const Element> values,
                              std::vector<std::int64_t> shape) {
    const std::span<const std::byte> bytes = std::as_bytes(values);
    SafetensorsTensor tensor{
        std::string(dtype_name(dtype)), std::move(shape), {bytes.begin(), bytes.end()}};
    check_tensor("tensor: ", tensor);
    return tensor;
}

}  // namespace st_detail

/// The elements as doubles. Exact, but for I64 beyond 2^53, which rounds. BOOL gives 0 or 1.
inline std::vector<double> to_doubles(const SafetensorsTensor& tensor) {
    st_detail::check_tensor("tensor: ", tensor);
    switch (*dtype_from_name(tensor.dtype)) {
        case SafetensorsDtype::f64:
            return st_detail::convert_elements<double>(tensor.data);
        case SafetensorsDtype::f32:
            return st_detail::convert_elements<float>(tensor.data);
        case SafetensorsDtype::f16:
            return st_detail::convert_elements<std::uint16_t>(tensor.data,
                                                              st_detail::double_from_f16);
        case SafetensorsDtype::bf16:
            return st_detail::convert_elements<std::uint16_t>(tensor.data,
                                                              st_detail::double_from_bf16);
        case SafetensorsDtype::i64:
            return st_detail::convert_elements<std::int64_t>(tensor.data);
        case SafetensorsDtype::i32:
            return st_detail::convert_elements<std::int32_t>(tensor.data);
        case SafetensorsDtype::i16:
            return st_detail::convert_elements<std::int16_t>(tensor.data);
        case SafetensorsDtype::i8:
            return st_detail::convert_elements<std::int8_t>(tensor.data);
        case SafetensorsDtype::u8:
            return st_detail::convert_elements<std::uint8_t>(tensor.data);
        case SafetensorsDtype::boolean:
            return st_detail::convert_elements<std::uint8_t>(
                tensor.data, [](std::uint8_t value) { return value != 0 ? 1.0 : 0.0; });
    }
    throw SafetensorsError("not a value of SafetensorsDtype");
}

/// An F64 tensor. Throws when the number of values is not that of the shape.
inline SafetensorsTensor make_tensor(std::span<const double> values,
                                     std::vector<std::int64_t> shape) {
    return st_detail::tensor_from(SafetensorsDtype::f64, values, std::move(shape));
}

/// An F32 tensor.
inline SafetensorsTensor make_tensor(std::span<const float> values,
                                     std::vector<std::int64_t> shape) {
    return st_detail::tensor_from(SafetensorsDtype::f32, values, std::move(shape));
}

/// An I64 tensor.
inline SafetensorsTensor make_tensor(std::span<const std::int64_t> values,
                                     std::vector<std::int64_t> shape) {
    return st_detail::tensor_from(SafetensorsDtype::i64, values, std::move(shape));
}

}  // namespace interstate::tools
