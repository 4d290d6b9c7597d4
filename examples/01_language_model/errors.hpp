// How the example reports trouble: exceptions inside, one line and an exit code outside (main.cpp).
#pragma once

#include <stdexcept>
#include <string>

#include <interstate/status.hpp>

namespace demo {

/// Something the user gave us cannot be used: an argument, a text, a checkpoint.
struct InputError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// The library refused a call. That is a defect of this example, never of its input.
struct LibraryError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

/// Library calls do not throw, they return a Status that must be looked at. `call` names the call.
inline void check(const interstate::Status& status, const char* call) {
    if (!status.ok())
        throw LibraryError(std::string(call) + ": " + interstate::to_string(status.code()) + ": " +
                           status.message());
}

}  // namespace demo
