// SPDX-License-Identifier: Apache-2.0
//
// The pictures of an analysis, as SVG: ranks against depth, and routing energy over layers and heads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <string>

#include "analysis.hpp"

namespace interstate::tools {

namespace svg {

__attribute__((format(printf, 2, 3))) inline void add(std::string& out, const char* format, ...) {
    char text[400];
    std::va_list args;
    va_start(args, format);
    std::vsnprintf(text, sizeof text, format, args);
    va_end(args);
    out += text;
    out += '\n';
}

inline std::string begin(int width, int height) {
    std::string out;
    add(out, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" "
             "font-size=\"12\">", width, height, width, height);
    add(out, "<rect width=\"%d\" height=\"%d\" fill=\"white\"/>", width, height);
    return out;
}

/// The smallest of 1, 2, 5, 10, 20, ... that cuts `most` into six parts or fewer.
inline double tick(double most) {
    double step = std::pow(10.0, std::floor(std::log10(most / 6.0)));
    for (const double factor : {2.0, 2.5, 2.0})
        if (most / step > 6.0) step *= factor;
    return step;
}

}  // namespace svg

/// Effective ranks of routing and filtering against depth: a point a head, a line through the means of layers.
inline std::string picture_of_ranks(const Analysis& a, const std::string& title) {
    constexpr int left = 60, right = 540, top = 40, bottom = 320;
    constexpr struct {
        std::size_t quantity;
        const char *name, *color;
        int shift;
    } parts[] = {{routing_effective_rank, "routing", "#c1440e", -5}, {filtering_effective_rank, "filtering", "#1f5fa8", 5}};
    double most = 1.0;
    for (const auto& part : parts)
        for (const HeadStatistics& head : a.of)
            if (std::isfinite(head.values[part.quantity])) most = std::max(most, head.values[part.quantity]);
    const double step = svg::tick(most);
    const auto x = [&](Index layer) { return left + (right - left) * (static_cast<double>(layer) + 0.5) / static_cast<double>(a.layers); };
    const auto y = [&](double rank) { return bottom - (bottom - top) * rank / (1.05 * most); };

    std::string out = svg::begin(700, 370);
    svg::add(out, "<text x=\"%d\" y=\"22\" font-size=\"14\">%s</text>", left, title.c_str());
    for (double rank = 0.0; rank <= 1.05 * most; rank += step) {
        svg::add(out, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#ddd\"/>", left, right, y(rank), y(rank));
        svg::add(out, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%g</text>", left - 6, y(rank) + 4, rank);
    }
    const Index every = std::max<Index>(1, (a.layers + 23) / 24);
    for (Index layer = 0; layer < a.layers; layer += every)
        svg::add(out, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%lld</text>", x(layer), bottom + 18, static_cast<long long>(layer));
    svg::add(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">layer</text>", (left + right) / 2, bottom + 38);
    svg::add(out, "<text transform=\"translate(18 %d) rotate(-90)\" text-anchor=\"middle\">effective rank</text>", (top + bottom) / 2);
    int legend = top + 20;
    for (const auto& part : parts) {
        std::string line;
        for (Index layer = 0; layer < a.layers; ++layer) {
            for (Index head = 0; head < a.heads; ++head) {
                const double rank = a.at(layer, head).values[part.quantity];
                if (std::isfinite(rank))
                    svg::add(out, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3\" fill=\"%s\" fill-opacity=\"0.35\"/>", x(layer) + part.shift,
                             y(rank), part.color);
            }
            const double mean = a.layer_mean(layer, part.quantity);
            char point[60];
            std::snprintf(point, sizeof point, "%.1f,%.1f ", x(layer), y(mean));
            if (std::isfinite(mean)) line += point;
        }
        out += "<polyline points=\"" + line + "\" fill=\"none\" stroke=\"" + part.color + "\" stroke-width=\"2\"/>\n";
        svg::add(out, "<line x1=\"%d\" x2=\"%d\" y1=\"%d\" y2=\"%d\" stroke=\"%s\" stroke-width=\"2\"/>", right + 15, right + 39, legend,
                 legend, part.color);
        svg::add(out, "<text x=\"%d\" y=\"%d\">%s, mean</text>", right + 46, legend + 4, part.name);
        legend += 20;
    }
    svg::add(out, "<text x=\"%d\" y=\"%d\">points: heads</text>", right + 46, legend + 4);
    return out + "</svg>\n";
}

/// Routing energy, 0 white to 1 dark: a row a layer, a column a head, the number in each cell.
inline std::string picture_of_energy(const Analysis& a, const std::string& title) {
    constexpr int left = 60, top = 50, cell_x = 44, cell_y = 28;
    const int width = left + cell_x * static_cast<int>(a.heads) + 20, height = top + cell_y * static_cast<int>(a.layers) + 50;
    std::string out = svg::begin(std::max(width, 420), height);
    svg::add(out, "<text x=\"%d\" y=\"22\" font-size=\"14\">%s</text>", left, title.c_str());
    for (Index layer = 0; layer < a.layers; ++layer) {
        const int y = top + cell_y * static_cast<int>(layer);
        svg::add(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">%lld</text>", left - 6, y + 18, static_cast<long long>(layer));
        for (Index head = 0; head < a.heads; ++head) {
            const double energy = a.at(layer, head).values[routing_energy];
            if (!std::isfinite(energy)) continue;
            const int x = left + cell_x * static_cast<int>(head);
            const auto mix = [&](int dark) { return static_cast<int>(std::lround(255.0 + energy * (dark - 255.0))); };
            svg::add(out, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"rgb(%d,%d,%d)\"/>", x, y, cell_x - 1, cell_y - 1,
                     mix(110), mix(25), mix(0));
            svg::add(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\" font-size=\"11\" fill=\"%s\">%.2f</text>", x + cell_x / 2, y + 18,
                     energy > 0.5 ? "white" : "black", energy);
        }
    }
    const int low = top + cell_y * static_cast<int>(a.layers);
    for (Index head = 0; head < a.heads; ++head)
        svg::add(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%lld</text>", left + cell_x * static_cast<int>(head) + cell_x / 2,
                 low + 16, static_cast<long long>(head));
    svg::add(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">head</text>", left + cell_x * static_cast<int>(a.heads) / 2, low + 36);
    svg::add(out, "<text transform=\"translate(18 %d) rotate(-90)\" text-anchor=\"middle\">layer</text>", (top + low) / 2);
    return out + "</svg>\n";
}

}  // namespace interstate::tools
