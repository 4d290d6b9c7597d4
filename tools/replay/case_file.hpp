// Between safetensors files and cases: every tensor float64, "op" and the options in the metadata.
#pragma once

#include <string>
#include <string_view>

#include <interstate/verify.hpp>

#include "../support/safetensors.hpp"

namespace interstate::tools::replay {

/// A file as a case. Throws SafetensorsError, with `what` naming the file, for a tensor that is not float64.
inline Case case_from_file(const SafetensorsFile& file, std::string_view what) {
    Case c{file.metadata, {}};
    for (const auto& [name, tensor] : file.tensors) {
        if (tensor.dtype != dtype_name(SafetensorsDtype::f64))
            throw SafetensorsError(std::string(what) + ": tensor " + name + ": dtype is " + tensor.dtype +
                                   ", must be F64");
        c.tensors[name] = {tensor.shape, to_doubles(tensor)};
    }
    return c;
}

inline SafetensorsFile file_from_case(const Case& c) {
    SafetensorsFile file{c.options, {}};
    for (const auto& [name, tensor] : c.tensors)
        file.tensors[name] = make_tensor(std::span<const double>(tensor.values), tensor.extent);
    return file;
}

}  // namespace interstate::tools::replay
