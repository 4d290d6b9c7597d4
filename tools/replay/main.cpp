// replay: runs an operator on tensors from a safetensors file, so that any language that can write such
// a file can check itself against Interstate, and any executor against a stored result.
//
//     replay --exec reference|cpu|cuda --dtype f64|f32|f16|bf16 [--method NAME]
//            in.safetensors out.safetensors
//     replay --check [--rtol X] --exec ... --dtype ... in.safetensors
//
// The file holds the operator's inputs and, for gradients, dout.*, all float64; its metadata holds "op"
// and options. The exit code is 0 for success, 1 where --check finds a difference, 2 for any error.

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cmath>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "case_file.hpp"
#include "replay.hpp"

namespace {

using namespace interstate;
using namespace interstate::tools;
using namespace interstate::tools::replay;

constexpr int exit_ok = 0;
constexpr int exit_differs = 1;
constexpr int exit_error = 2;

/// Anything that ends the program with one line and exit code 2.
struct Failure {
    std::string message;
};

struct Arguments {
    std::string exec, dtype, param_dtype, method, isa, in, out;
    std::vector<std::string> options;
    std::optional<int> threads;
    std::optional<double> rtol;
    bool check = false, forward_only = false, list = false;
};

/// Text from a file or the command line must not break the line it is printed on.
std::string one_line(std::string_view text) {
    std::string line(text);
    for (char& c : line)
        if (c < 0x20 || c > 0x7e) c = '?';
    return line;
}

DType dtype_named(const std::string& name) {
    for (const DType dtype : {DType::f64, DType::f32, DType::f16, DType::bf16})
        if (name == to_string(dtype)) return dtype;
    throw Failure{"dtype is " + name + ", must be f64, f32, f16 or bf16"};
}

Isa isa_named(const std::string& name) {
    for (const Isa isa : {Isa::automatic, Isa::baseline, Isa::avx2, Isa::avx512})
        if (name == to_string(isa)) return isa;
    throw Failure{"isa is " + name + ", must be automatic, baseline, avx2 or avx512"};
}

/// Bound of --check where --rtol gives none. 16-bit results carry the rounding of every input, upstream
/// gradient and output: eight unit roundoffs (2^-11 and 2^-8) leave room for their sum.
double default_rtol(DType dtype) {
    switch (dtype) {
        case DType::f64: return 1e-12;
        case DType::f32: return 1e-5;
        case DType::f16: return 0x1p-8;
        case DType::bf16: return 0x1p-5;
    }
    return 0.0;
}

/// Asking for more than half of the machine would end in the kernel's killer, not in an error.
std::size_t memory_limit() {
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return static_cast<std::size_t>(pages) * static_cast<std::size_t>(size) / 2;
}

Status run(const Arguments& args, const Request& request, const Case& c, Case& results) {
    if (args.exec == "reference") return run_on_reference(request, c, results);
    if (args.exec == "cpu")
        return run_on_cpu({args.threads.value_or(0), isa_named(args.isa)}, request, c, results);
#if defined(INTERSTATE_REPLAY_CUDA)
    return run_on_cuda(request, c, results);
#else
    return Status::error(StatusCode::unsupported, "this build of replay has no cuda executor");
#endif
}

bool is_result(std::string_view name, bool forward_only) {
    return name.starts_with("out.") || (name.starts_with("grad.") && !forward_only);
}

int check(const Case& c, const Case& results, double rtol, bool forward_only) {
    Case want;
    for (const auto& [name, tensor] : c.tensors)
        if (is_result(name, forward_only)) want.tensors[name] = tensor;
    bool good = true;
    for (const TensorError& e : compare(results, want)) {
        const bool same = e.finite && e.relative <= rtol;
        const char* verdict = same       ? "ok"
                              : e.finite ? "DIFFERS"
                                         : "DIFFERS: missing, of another shape, NaN or Inf";
        good = good && same;
        std::printf("%-20s relative %.3e  largest %.3e  %s\n", one_line(e.name).c_str(), e.relative,
                    e.largest, verdict);
    }
    return good ? exit_ok : exit_differs;
}

int run(const Arguments& args) {
    if (args.list) {
        for (const OperatorInfo& op : list_operators()) std::printf("%s\n", op.options.c_str());
        return exit_ok;
    }
    if (args.exec.empty() || args.dtype.empty()) throw Failure{"--exec and --dtype are required"};
    if (args.exec != "reference" && args.exec != "cpu" && args.exec != "cuda")
        throw Failure{"--exec is " + args.exec + ", must be reference, cpu or cuda"};
    if (args.exec != "cpu" && (args.threads || args.isa != "automatic"))
        throw Failure{"--threads and --isa are for --exec cpu"};
    if (args.threads && (*args.threads < 0 || *args.threads > 1024))
        throw Failure{"--threads is " + std::to_string(*args.threads) + ", must be from 0 (all) to 1024"};
    if (args.rtol && !args.check) throw Failure{"--rtol is for --check"};
    if (args.rtol && !(*args.rtol >= 0.0 && std::isfinite(*args.rtol)))
        throw Failure{"--rtol must be zero or more"};
    if (args.in.empty()) throw Failure{"in.safetensors is missing"};
    if (args.check && !args.out.empty()) throw Failure{"--check takes one file"};
    if (!args.check && args.out.empty()) throw Failure{"out.safetensors is missing"};
    std::error_code ignored;
    if (!args.check && std::filesystem::equivalent(args.in, args.out, ignored))
        throw Failure{"out.safetensors is the input file"};

    Request request;
    request.dtype = dtype_named(args.dtype);
    if (!args.param_dtype.empty()) request.param_dtype = dtype_named(args.param_dtype);
    if (request.param_dtype != DType::f64 && request.param_dtype != DType::f32)
        throw Failure{"--param-dtype is " + args.param_dtype + ", must be f32 or f64"};
    request.run.memory_limit = memory_limit();

    Case c = case_from_file(read_safetensors(args.in), args.in);
    if (!args.method.empty()) c.options["method"] = args.method;
    for (const std::string& option : args.options) {
        const std::size_t equals = option.find('=');
        if (equals == 0 || equals == option.npos)
            throw Failure{"--option is " + option + ", must be name=value"};
        c.options[option.substr(0, equals)] = option.substr(equals + 1);
    }

    // Gradients that nothing will be compared with need not be computed.
    bool has_results = false, has_gradients = false;
    for (const auto& [name, tensor] : c.tensors) {
        has_results = has_results || is_result(name, args.forward_only);
        has_gradients = has_gradients || name.starts_with("grad.");
    }
    if (args.check && !has_results) throw Failure{args.in + ": holds no results to compare with"};
    request.run.backward = !args.forward_only && (!args.check || has_gradients);

    Case results;
    const Status status = run(args, request, c, results);
    if (!status.ok()) throw Failure{args.in + ": " + status.message()};
    const double rtol = args.rtol.value_or(default_rtol(request.dtype));
    if (args.check) return check(c, results, rtol, args.forward_only);
    results.options = c.options;
    write_safetensors(args.out, file_from_case(results));
    return exit_ok;
}

void declare(CLI::App& app, Arguments& args) {
    // CLI11 would take an empty number for one that was not given.
    const auto not_empty = [](const std::string& text) {
        return std::string(text.empty() ? "must not be empty" : "");
    };
    app.add_option("in", args.in, "inputs, dout.* for gradients, and, for --check, results");
    app.add_option("out", args.out, "where out.* and grad.* are written");
    app.add_option("--exec", args.exec, "reference, cpu or cuda");
    app.add_option("--dtype", args.dtype, "storage: f64, f32, f16 or bf16");
    app.add_option("--param-dtype", args.param_dtype, "of parameters: f64 (default, as in the file) or f32");
    app.add_option("--method", args.method, "the same as --option method=NAME");
    app.add_option("--option", args.options, "name=value, over the file's own; repeatable")
        ->allow_extra_args(false);
    app.add_option("--threads", args.threads, "of --exec cpu; 0 takes all")->check(not_empty);
    app.add_option("--isa", args.isa, "of --exec cpu: automatic, baseline, avx2 or avx512");
    app.add_flag("--check", args.check, "compare with out.* and grad.* of the file");
    app.add_option("--rtol", args.rtol,
                   "of --check: |got - want| / |want| (default: f64 1e-12, f32 1e-5, f16 2^-8, bf16 2^-5)")
        ->check(not_empty);
    app.add_flag("--forward-only", args.forward_only, "no gradients");
    app.add_flag("--list", args.list, "list the operators and their options");
    app.footer("Exit code: 0 ok, 1 --check found a difference, 2 error.");
}

}  // namespace

int main(int argc, char** argv) {
    std::string error;
    int code = exit_error;
    try {
        CLI::App app{"Runs an operator on the tensors of a safetensors file.", "replay"};
        Arguments args;
        args.isa = "automatic";
        declare(app, args);
        try {
            app.parse(argc, argv);
        } catch (const CLI::Success& help) {
            return app.exit(help);
        }
        code = run(args);
        // A full disk behind the redirected output shows when it is flushed.
        if (std::fflush(stdout) != 0 || std::ferror(stdout)) error = "cannot write to the standard output";
    } catch (const Failure& failure) {
        error = failure.message;
    } catch (const std::bad_alloc&) {
        error = "not enough memory";
    } catch (const std::exception& exception) {
        error = exception.what();
    }
    if (error.empty()) return code;
    std::fprintf(stderr, "replay: %s\n", one_line(error).c_str());
    return exit_error;
}
