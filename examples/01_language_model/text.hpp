// The text: read from a file, split into training and validation bytes, and judged by the two
// simplest language models there are, which the trained one has to beat.
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <span>
#include <string>
#include <vector>

#include "errors.hpp"
#include "random.hpp"

namespace demo {

using Bytes = std::span<const std::uint8_t>;

/// FNV-1a, enough to notice that a file is not the one we knew. `hash` continues an earlier one.
inline std::uint64_t fnv1a(const void* data, std::size_t size, std::uint64_t hash = 0xcbf29ce484222325u) {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    for (std::size_t i = 0; i < size; ++i) hash = (hash ^ bytes[i]) * 0x100000001b3u;
    return hash;
}

/// A text and its two splits. The validation split is the end of the text, a whole number of windows
/// of `context` bytes (and the one byte after the last window, which it predicts), so that every
/// model is judged on exactly the same bytes.
class Text {
  public:
    Text(std::string name, std::vector<std::uint8_t> bytes, std::int64_t context)
        : name_(std::move(name)), bytes_(std::move(bytes)), context_(static_cast<std::size_t>(context)) {
        const std::size_t need = validation_share * (context_ + 1);
        if (bytes_.empty()) throw InputError("text " + name_ + ": the file is empty");
        if (bytes_.size() < need)
            throw InputError("text " + name_ + ": too short, has " + std::to_string(bytes_.size()) +
                             " bytes, needs at least " + std::to_string(need));
        windows_ = std::min(most_windows, (bytes_.size() / validation_share - 1) / context_);
        hash_ = fnv1a(bytes_.data(), bytes_.size());
    }

    const std::string& name() const { return name_; }
    std::uint64_t hash() const { return hash_; }
    std::size_t size() const { return bytes_.size(); }
    std::size_t windows() const { return windows_; }

    Bytes validation() const { return Bytes(bytes_).last(windows_ * context_ + 1); }
    Bytes training() const { return Bytes(bytes_).first(bytes_.size() - validation().size()); }

    /// A training window starting anywhere: `context` bytes to read and the one after them.
    Bytes random_window(Random& random) const {
        const Bytes split = training();
        return split.subspan(random.below(split.size() - context_), context_ + 1);
    }
    Bytes validation_window(std::size_t window) const {
        return validation().subspan(window * context_, context_ + 1);
    }

  private:
    static constexpr std::size_t validation_share = 16;  // one byte in 16,
    static constexpr std::size_t most_windows = 256;     // but no more windows than this

    std::string name_;
    std::vector<std::uint8_t> bytes_;
    std::size_t context_;
    std::size_t windows_ = 0;
    std::uint64_t hash_ = 0;
};

inline Text read_text(const std::string& path, std::int64_t context) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw InputError("text " + path + ": cannot be read: " + std::strerror(errno));
    std::vector<std::uint8_t> bytes;
    std::array<char, 1 << 16> chunk{};
    while (file.read(chunk.data(), chunk.size()) || file.gcount() > 0)
        bytes.insert(bytes.end(), chunk.begin(), chunk.begin() + file.gcount());
    if (file.bad()) throw InputError("text " + path + ": cannot be read: " + std::strerror(errno));
    return Text(path, std::move(bytes), context);
}

/// Bits per byte of two models that only count. The unigram model knows how often each byte occurs,
/// the bigram model how often each byte follows each other byte; both count the training bytes and
/// start every count at one, so that a byte never seen is unlikely instead of impossible.
struct Baselines {
    double unigram = 0.0;
    double bigram = 0.0;
};

/// The first byte of `validation` is only read as context, as the trained models read it.
inline Baselines baselines(Bytes training, Bytes validation) {
    std::vector<double> single(256, 1.0), pair(256 * 256, 1.0), follows(256, 256.0);
    for (const std::uint8_t byte : training) single[byte] += 1.0;
    for (std::size_t i = 1; i < training.size(); ++i) {
        pair[training[i - 1] * 256u + training[i]] += 1.0;
        follows[training[i - 1]] += 1.0;
    }
    Baselines bits;
    for (std::size_t i = 1; i < validation.size(); ++i) {
        bits.unigram -= std::log2(single[validation[i]] / (static_cast<double>(training.size()) + 256.0));
        bits.bigram -= std::log2(pair[validation[i - 1] * 256u + validation[i]] / follows[validation[i - 1]]);
    }
    const double predicted = static_cast<double>(validation.size()) - 1.0;
    return {bits.unigram / predicted, bits.bigram / predicted};
}

}  // namespace demo
