// The one error channel: a call returns a Status; nothing throws, nothing aborts.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include <interstate/config.hpp>

namespace interstate::inline INTERSTATE_ABI {

enum class StatusCode : std::uint8_t {
    ok,
    invalid_argument,     // a shape, stride, option, pointer or cu_seqlens that breaks the contract
    unsupported,          // legal, but no kernel of this executor does it (the message says which)
    workspace_too_small,  // the message carries both sizes
    device_error,         // the CUDA runtime refused; the message is its own
};

constexpr const char* to_string(StatusCode c) {
    switch (c) {
        case StatusCode::ok: return "ok";
        case StatusCode::invalid_argument: return "invalid argument";
        case StatusCode::unsupported: return "unsupported";
        case StatusCode::workspace_too_small: return "workspace too small";
        case StatusCode::device_error: return "device error";
    }
    return "?";
}

/// Result of a call. The message names the argument, what it was and what it must be; it lives
/// inside the Status, so nothing is allocated and it may be kept.
class [[nodiscard]] Status {
  public:
    Status() { text_[0] = '\0'; }

    __attribute__((format(printf, 2, 3)))
    static Status error(StatusCode code, const char* format, ...) {
        Status s;
        s.code_ = code;
        std::va_list args;
        va_start(args, format);
        std::vsnprintf(s.text_, sizeof s.text_, format, args);
        va_end(args);
        return s;
    }

    bool ok() const { return code_ == StatusCode::ok; }
    explicit operator bool() const { return ok(); }
    StatusCode code() const { return code_; }
    const char* message() const { return text_; }

  private:
    StatusCode code_ = StatusCode::ok;
    char text_[215];
};

}  // namespace interstate::inline INTERSTATE_ABI

/// Returns the Status of an expression from the enclosing function unless it is ok.
#define INTERSTATE_RETURN_IF_ERROR(expression)                             \
    do {                                                                   \
        if (::interstate::Status interstate_status_ = (expression); !interstate_status_.ok()) \
            return interstate_status_;                                     \
    } while (false)
