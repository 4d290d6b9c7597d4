// SPDX-License-Identifier: Apache-2.0
//
// sd_decomposition of every head of an encoder: on a text, in windows, and of its weights.
#pragma once

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include <sd_decomposition/sd_decomposition.hpp>

#include "bert.hpp"

namespace interstate::tools {

/// What is measured, in the order of the CSV's columns.
inline constexpr std::array<const char*, 10> quantities{"routing_energy",
                                                        "norm",
                                                        "routing_norm",
                                                        "filtering_norm",
                                                        "routing_effective_rank",
                                                        "filtering_effective_rank",
                                                        "routing_participation_ratio",
                                                        "filtering_participation_ratio",
                                                        "routing_stable_rank",
                                                        "filtering_stable_rank"};

enum Quantity : std::size_t { routing_energy = 0, routing_effective_rank = 4, filtering_effective_rank = 5 };

/// Means over windows, of every head.
struct HeadStatistics {
    std::array<double, quantities.size()> values{};
    std::vector<double> routing_spectrum, filtering_spectrum;
};

struct Analysis {
    Index layers = 0, heads = 0;
    Index windows = 0;               // 1 of weights
    Index length = 0;                // tokens of the longest window; the model's width of weights
    double seconds = 0.0;            // in sd_decomposition
    std::vector<HeadStatistics> of;  // (layers, heads)

    const HeadStatistics& at(Index layer, Index head) const { return of[static_cast<std::size_t>(layer * heads + head)]; }
    double layer_mean(Index layer, std::size_t quantity) const {
        double sum = 0.0;
        for (Index h = 0; h < heads; ++h) sum += at(layer, h).values[quantity];
        return sum / static_cast<double>(heads);
    }
};

/// Adds the decomposition of a layer's heads, times `share`, to its statistics.
inline void add_decomposition(const sd_decomposition::Options& options, const sd_decomposition::Inputs<float>& in, Index layer,
                              double share, Analysis& analysis) {
    const sd_decomposition::Shape shape = sd_decomposition::shape_of(in);
    const auto H = static_cast<std::size_t>(shape.query_heads), n = static_cast<std::size_t>(shape.values());
    std::vector<float> values(quantities.size() * H), routing(H * n), filtering(H * n);
    const auto heads = [&](std::size_t quantity) { return view(values.data() + quantity * H, {Index(1), shape.query_heads}); };
    const auto spectra = [&](std::vector<float>& s) { return view(s.data(), {Index(1), shape.query_heads, shape.values()}); };
    const sd_decomposition::Outputs<float> out{.routing_energy = heads(0),
                                               .norm = heads(1),
                                               .routing_norm = heads(2),
                                               .filtering_norm = heads(3),
                                               .routing_singular_values = spectra(routing),
                                               .filtering_singular_values = spectra(filtering),
                                               .routing_effective_rank = heads(4),
                                               .filtering_effective_rank = heads(5),
                                               .routing_participation_ratio = heads(6),
                                               .filtering_participation_ratio = heads(7),
                                               .routing_stable_rank = heads(8),
                                               .filtering_stable_rank = heads(9)};
    const cpu exec;
    std::vector<char> memory(sd_decomposition::workspace_size(exec, options, shape, pass::forward));
    const auto begin = std::chrono::steady_clock::now();
    check(sd_decomposition::forward(exec, options, in, out, Saved{}, Workspace{memory.data(), memory.size()}));
    analysis.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    for (std::size_t h = 0; h < H; ++h) {
        HeadStatistics& head = analysis.of[static_cast<std::size_t>(layer) * H + h];
        for (std::size_t i = 0; i < quantities.size(); ++i) head.values[i] += share * static_cast<double>(values[i * H + h]);
        const auto add = [&](std::vector<double>& mean, const std::vector<float>& s) {
            if (mean.empty()) mean.assign(n, 0.0);
            mean.resize(std::min(mean.size(), n));  // of windows shorter than 2 d, as many as all have
            for (std::size_t i = 0; i < mean.size(); ++i) mean[i] += share * static_cast<double>(s[h * n + i]);
        };
        add(head.routing_spectrum, routing);
        add(head.filtering_spectrum, filtering);
    }
}

/// Cuts tokens into the fewest windows that hold `most` each, [CLS] and [SEP] included; their lengths differ by one at most.
inline std::vector<std::vector<std::int64_t>> cut_windows(const std::vector<std::int64_t>& tokens, const Tokenizer& tokenizer,
                                                          Index most) {
    const std::size_t room = static_cast<std::size_t>(most - 2), count = (tokens.size() + room - 1) / room;
    std::vector<std::vector<std::int64_t>> windows(count);
    for (std::size_t w = 0; w < count; ++w) {
        const auto at = [&](std::size_t n) { return tokens.begin() + static_cast<std::ptrdiff_t>(tokens.size() * n / count); };
        windows[w].push_back(tokenizer.cls());
        windows[w].insert(windows[w].end(), at(w), at(w + 1));
        windows[w].push_back(tokenizer.sep());
    }
    return windows;
}

/// Of Q and K on the windows, biases included and scale 1/sqrt(head dim): the scores before their softmax.
inline Analysis analyse_text(const Bert& bert, const std::vector<std::vector<std::int64_t>>& windows) {
    const BertConfig& c = bert.config();
    Analysis analysis{.layers = c.layers, .heads = c.heads, .windows = static_cast<Index>(windows.size()), .of = {}};
    analysis.of.resize(static_cast<std::size_t>(c.layers * c.heads));
    for (const std::vector<std::int64_t>& window : windows) {
        analysis.length = std::max(analysis.length, static_cast<Index>(window.size()));
        bert.run(window, [&](Index layer, const Matrix&, const Matrix& q, const Matrix& k) {
            add_decomposition({}, {.Q = bert.heads_of(q), .K = bert.heads_of(k)}, layer, 1.0 / static_cast<double>(windows.size()),
                              analysis);
        });
    }
    return analysis;
}

/// Of W_Q W_K^T of every head, without the biases; scale 1.
inline Analysis analyse_weights(const Bert& bert) {
    const BertConfig& c = bert.config();
    Analysis analysis{.layers = c.layers, .heads = c.heads, .windows = 1, .length = c.width, .of = {}};
    analysis.of.resize(static_cast<std::size_t>(c.layers * c.heads));
    for (Index layer = 0; layer < c.layers; ++layer) {
        const BertLayer& l = bert.layers()[static_cast<std::size_t>(layer)];
        const auto heads = [&](const Matrix& weight) {  // weight (out, in), out = (head, channel)
            View<const float, 4> w = view(weight.data(), {Index(1), c.width, c.heads, c.head_dim()});
            w.stride[1] = 1, w.stride[2] = c.head_dim() * c.width, w.stride[3] = c.width;
            return w;
        };
        add_decomposition({.scale = 1.0}, {.Q = heads(l.query.weight), .K = heads(l.key.weight)}, layer, 1.0, analysis);
    }
    return analysis;
}

inline std::string number_text(double x) {
    char text[40];
    std::snprintf(text, sizeof text, "%.9g", x);
    return text;
}

/// source,layer,head,...: the cells as they are, with commas between them.
inline void add_row(std::string& text, const char* source, const std::vector<double>& cells) {
    text += source;
    for (const double cell : cells) {
        text += ',';
        text += number_text(cell);
    }
    text += '\n';
}

/// Layers and heads are counted from 0.
inline std::string csv_rows(const Analysis& a, const char* source) {
    std::string text;
    for (Index layer = 0; layer < a.layers; ++layer)
        for (Index head = 0; head < a.heads; ++head) {
            std::vector<double> cells{static_cast<double>(layer), static_cast<double>(head), static_cast<double>(a.windows),
                                      static_cast<double>(a.length)};
            cells.insert(cells.end(), a.at(layer, head).values.begin(), a.at(layer, head).values.end());
            add_row(text, source, cells);
        }
    return text;
}
inline std::string csv_header() {
    std::string text = "source,layer,head,windows,length";
    for (const char* quantity : quantities) {
        text += ',';
        text += quantity;
    }
    text += '\n';
    return text;
}

inline std::string spectra_rows(const Analysis& a, const char* source) {
    std::string text;
    for (Index layer = 0; layer < a.layers; ++layer)
        for (Index head = 0; head < a.heads; ++head) {
            const HeadStatistics& h = a.at(layer, head);
            for (std::size_t i = 0; i < h.routing_spectrum.size(); ++i)
                add_row(text, source, {static_cast<double>(layer), static_cast<double>(head), static_cast<double>(i), h.routing_spectrum[i],
                                       h.filtering_spectrum[i]});
        }
    return text;
}
inline std::string spectra_header() { return "source,layer,head,index,routing_singular_value,filtering_singular_value\n"; }

/// A line a layer: the mean over its heads and, of the routing energy and rank, the smallest and the largest.
inline std::string layer_table(const Analysis& a) {
    std::string text = "layer  routing energy (heads)     effective rank: routing (heads)  filtering  participation: routing  filtering"
                       "  stable: routing  filtering\n";
    for (Index layer = 0; layer < a.layers; ++layer) {
        double low[2], high[2];
        for (const int i : {0, 1}) {
            const std::size_t q = i == 0 ? routing_energy : routing_effective_rank;
            low[i] = high[i] = a.at(layer, 0).values[q];
            for (Index h = 1; h < a.heads; ++h) {
                low[i] = std::min(low[i], a.at(layer, h).values[q]);
                high[i] = std::max(high[i], a.at(layer, h).values[q]);
            }
        }
        char line[200];
        std::snprintf(line, sizeof line,
                      "%5lld  %.3f (%.3f to %.3f)             %6.2f (%.2f to %.2f)  %9.2f  %22.2f  %9.2f  %15.2f  %9.2f\n",
                      static_cast<long long>(layer), a.layer_mean(layer, 0), low[0], high[0], a.layer_mean(layer, 4), low[1], high[1],
                      a.layer_mean(layer, 5), a.layer_mean(layer, 6), a.layer_mean(layer, 7), a.layer_mean(layer, 8),
                      a.layer_mean(layer, 9));
        text += line;
    }
    return text;
}

}  // namespace interstate::tools
