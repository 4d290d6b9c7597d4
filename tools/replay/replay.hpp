// What replay does, apart from its command line: one case, run by one executor.
//
// Each executor is a translation unit (reference.cpp, cpu.cpp, cuda.cu), so that a build without CUDA
// leaves one file out, and nvcc sees neither JSON nor the command line.
#pragma once

#include <string>
#include <vector>

#include <interstate/verify.hpp>

namespace interstate::tools::replay {

struct Request {
    DType dtype = DType::f64;
    DType param_dtype = DType::f64;  // f64 or f32: what the operator's parameters are stored in
    RunOptions run{};
};

/// Runs the operator that option "op" of the case names. Every output and gradient lands in `results`.
/// Throws only what allocation throws.
Status run_on_reference(const Request& request, const Case& c, Case& results);
Status run_on_cpu(const cpu& exec, const Request& request, const Case& c, Case& results);

/// Built only with INTERSTATE_REPLAY_CUDA. Runs on the current device.
Status run_on_cuda(const Request& request, const Case& c, Case& results);

struct OperatorInfo {
    std::string name;
    std::string options;  // what its options take, in words
};

/// The operators that `reference` runs.
std::vector<OperatorInfo> list_operators();

}  // namespace interstate::tools::replay
