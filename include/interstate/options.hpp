// Options as text: what the set_option of every operator is made of.
#pragma once

#include <cmath>
#include <cstdlib>
#include <string_view>

#include <interstate/status.hpp>

namespace interstate::inline INTERSTATE_ABI {

/// All of the text as a finite number; false where it is none.
inline bool parse_number(std::string_view text, double& out) {
    char copy[64] = {};
    if (text.empty() || text.size() >= sizeof copy) return false;
    text.copy(copy, text.size());
    char* end = nullptr;
    out = std::strtod(copy, &end);
    return end == copy + text.size() && std::isfinite(out);
}

/// true or false; returns false where the text is neither.
inline bool parse_flag(std::string_view text, bool& out) {
    if (text != "true" && text != "false") return false;
    out = text == "true";
    return true;
}

/// The error for an option that an operator does not take; `takes` says what it does.
inline Status unknown_option(std::string_view name, std::string_view value, const char* takes) {
    return Status::error(StatusCode::invalid_argument, "option %.*s=%.*s: %s", static_cast<int>(name.size()), name.data(),
                         static_cast<int>(value.size()), value.data(), takes);
}

}  // namespace interstate::inline INTERSTATE_ABI
