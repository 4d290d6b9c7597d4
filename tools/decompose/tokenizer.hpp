// SPDX-License-Identifier: Apache-2.0
//
// BERT's tokenizer: text is cleaned and cut at spaces, around CJK characters and around punctuation, accents and capitals are
// taken away where the model wants that, and every word is cut into the longest pieces that the vocabulary has.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "unicode_tables.hpp"

namespace interstate::tools {

struct DecomposeError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

inline std::string read_text_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::string text;
    if (file) text.assign(std::istreambuf_iterator<char>(file), {});
    if (!file || file.bad() || std::filesystem::is_directory(path)) throw DecomposeError(path.string() + ": cannot be read");
    return text;
}

/// Code points of UTF-8; overlong forms, surrogates and codes above 10FFFF are errors, as in the standard.
inline std::vector<std::int32_t> decode_utf8(std::string_view text, const std::string& what) {
    std::vector<std::int32_t> codes;
    codes.reserve(text.size());
    for (std::size_t n = 0; n < text.size();) {
        const auto byte = [&](std::size_t at) { return at < text.size() ? static_cast<unsigned char>(text[at]) : 0U; };
        const unsigned lead = byte(n);
        const int more = lead < 0x80                   ? 0
                         : lead >= 0xC2 && lead < 0xE0 ? 1
                         : (lead & 0xF0U) == 0xE0      ? 2
                         : lead >= 0xF0 && lead < 0xF5 ? 3
                                                       : -1;
        bool good = more >= 0;
        auto code = static_cast<std::int32_t>(more > 0 ? lead & (0x3FU >> more) : lead);
        for (int i = 1; i <= more; ++i) {
            good = good && (byte(n + static_cast<std::size_t>(i)) & 0xC0U) == 0x80;
            code = code * 64 + static_cast<std::int32_t>(byte(n + static_cast<std::size_t>(i)) & 0x3FU);
        }
        good = good && !(more == 2 && code < 0x800) && !(more == 3 && (code < 0x10000 || code > 0x10FFFF)) &&
               !(code >= 0xD800 && code < 0xE000);
        if (!good) throw DecomposeError(what + ": not UTF-8 at byte " + std::to_string(n));
        codes.push_back(code);
        n += static_cast<std::size_t>(more) + 1;
    }
    return codes;
}

inline void append_utf8(std::string& text, std::int32_t code) {
    const auto put = [&](std::int32_t byte) { text.push_back(static_cast<char>(byte)); };
    if (code < 0x80) return put(code);
    if (code < 0x800) {
        put(0xC0 | code >> 6);
    } else {
        if (code < 0x10000) {
            put(0xE0 | code >> 12);
        } else {
            put(0xF0 | code >> 18);
            put(0x80 | (code >> 12 & 0x3F));
        }
        put(0x80 | (code >> 6 & 0x3F));
    }
    put(0x80 | (code & 0x3F));
}

namespace unicode {

template <std::size_t N>
bool in(const Range (&ranges)[N], std::int32_t code) {
    const Range* const r = std::lower_bound(ranges, ranges + N, code, [](const Range& a, std::int32_t c) { return a.last < c; });
    return r != ranges + N && r->first <= code;
}

inline bool is_punctuation(std::int32_t c) {
    return (c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) || (c >= 123 && c <= 126) || in(punctuation, c);
}
inline bool is_space(std::int32_t c) { return c == '\t' || c == '\n' || c == '\r' || in(space, c); }
/// The blocks of ideographs, as BERT lists them: without Hangul, Hiragana and Katakana, which are written with spaces or in words.
inline bool is_cjk(std::int32_t c) {
    return (c >= 0x4E00 && c <= 0x9FFF) || (c >= 0x3400 && c <= 0x4DBF) || (c >= 0x20000 && c <= 0x2A6DF) ||
           (c >= 0x2A700 && c <= 0x2CEAF) || (c >= 0xF900 && c <= 0xFAFF) || (c >= 0x2F800 && c <= 0x2FA1F);
}

/// What a code becomes by two tables: several(code), code + shift, or the code itself.
template <std::size_t N, std::size_t M, class F>
void map(const Shift (&shifts)[N], const Several (&several)[M], std::int32_t code, F&& put) {
    const Several* const s = std::lower_bound(several, several + M, code, [](const Several& a, std::int32_t c) { return a.from < c; });
    if (s != several + M && s->from == code) {
        for (const std::int32_t to : s->to)
            if (to != 0) put(to);
        return;
    }
    const Shift* const next = std::upper_bound(shifts, shifts + N, code, [](std::int32_t c, const Shift& a) { return c < a.first; });
    if (next != shifts) {  // runs do not interleave: a code is in the last that begins before it, or in none
        const Shift& r = next[-1];
        if (code <= r.last && (code - r.first) % r.step == 0) return put(code + r.shift);
    }
    put(code);
}

/// Canonical decomposition without marks (category Mn). Marks of other categories keep the order of the text.
template <class F>
void strip(std::int32_t code, F&& put) {
    if (in(mark, code)) return;
    if (code >= 0xAC00 && code <= 0xD7A3) {  // a syllable of Hangul is two or three letters
        const std::int32_t n = code - 0xAC00;
        put(0x1100 + n / 588);
        put(0x1161 + n % 588 / 28);
        if (n % 28 != 0) put(0x11A7 + n % 28);
        return;
    }
    map(stripped, stripped_several, code, put);
}
template <class F>
void lower(std::int32_t code, F&& put) {
    map(lowered, lowered_several, code, put);
}

}  // namespace unicode

struct TokenizerOptions {
    bool lower_case = true, strip_accents = true, split_cjk = true;
};

class Tokenizer {
  public:
    /// vocab.txt: a piece a line; its number is its id.
    Tokenizer(const std::filesystem::path& vocabulary, TokenizerOptions options) : options_(options) {
        const std::string text = read_text_file(vocabulary);
        decode_utf8(text, vocabulary.string());
        std::int64_t id = 0;
        for (std::size_t begin = 0; begin < text.size(); ++id) {
            const std::size_t end = std::min(text.find('\n', begin), text.size());
            std::string piece = text.substr(begin, end - begin);
            if (piece.ends_with('\r')) piece.pop_back();
            ids_.insert_or_assign(std::move(piece), id);
            begin = end + 1;
        }
        size_ = id;
        const auto special = [&](const char* piece) {
            const auto found = ids_.find(piece);
            if (found == ids_.end()) throw DecomposeError(vocabulary.string() + ": has no " + piece);
            return found->second;
        };
        unknown_ = special("[UNK]"), cls_ = special("[CLS]"), sep_ = special("[SEP]");
    }

    std::int64_t size() const { return size_; }
    std::int64_t cls() const { return cls_; }
    std::int64_t sep() const { return sep_; }

    /// Ids of the pieces, without [CLS] and [SEP]. Names of special tokens in the text are text.
    std::vector<std::int64_t> encode(std::string_view text, const std::string& what) const {
        std::vector<std::int64_t> out;
        std::vector<std::int32_t> word;
        const auto end_word = [&] {
            if (!word.empty()) pieces(word, out);
            word.clear();
        };
        const auto letter = [&](std::int32_t c) {
            if (unicode::is_space(c)) return end_word();
            if (!unicode::is_punctuation(c)) return word.push_back(c);
            end_word();
            word.push_back(c);
            end_word();
        };
        const auto lower = [&](std::int32_t c) { options_.lower_case ? unicode::lower(c, letter) : letter(c); };
        for (const std::int32_t c : decode_utf8(text, what)) {
            if (c == 0xFFFD || (in(unicode::control, c) && !unicode::is_space(c))) continue;
            const bool alone = options_.split_cjk && unicode::is_cjk(c);
            if (alone) end_word();
            options_.strip_accents ? unicode::strip(c, lower) : lower(c);
            if (alone) end_word();
        }
        end_word();
        return out;
    }

  private:
    static constexpr std::size_t longest_word = 100;  // BERT's: a longer one is unknown

    void pieces(const std::vector<std::int32_t>& word, std::vector<std::int64_t>& out) const {
        if (word.size() > longest_word) return out.push_back(unknown_);
        const std::size_t before = out.size();
        for (std::size_t begin = 0; begin < word.size();) {
            std::string piece = begin > 0 ? "##" : "";
            std::vector<std::size_t> bytes;  // of the piece, by its letters
            for (std::size_t n = begin; n < word.size(); ++n) append_utf8(piece, word[n]), bytes.push_back(piece.size());
            std::size_t letters = bytes.size();
            auto found = ids_.end();
            for (; letters > 0 && found == ids_.end(); --letters) found = ids_.find(piece.substr(0, bytes[letters - 1]));
            if (found == ids_.end()) {
                out.resize(before);
                return out.push_back(unknown_);
            }
            out.push_back(found->second);
            begin += letters + 1;
        }
    }

    TokenizerOptions options_;
    std::unordered_map<std::string, std::int64_t> ids_;
    std::int64_t size_ = 0, unknown_ = 0, cls_ = 0, sep_ = 0;
};

}  // namespace interstate::tools
