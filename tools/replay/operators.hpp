// From the name of an operator, a dtype and a parameter dtype to one instantiation of run_case.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include <interstate/dispatch.hpp>
#include <interstate/verify.hpp>

#include "replay.hpp"

namespace interstate::tools::replay {

/// One operator as an executor runs it.
template <class Exec>
struct Entry {
    std::string_view name;
    Status (*run)(const Exec& exec, const Request& request, const Case& c, Case& results);
    std::string (*options)();
};

template <class Op, class Exec>
Status run_with_dtypes(const Exec& exec, const Request& request, const Case& c, Case& results) {
    typename Op::Options options{};
    INTERSTATE_RETURN_IF_ERROR(parse_options<Op>(c, options));
    return dispatch_dtype(request.dtype, [&]<class T>(T) {
        if (request.param_dtype == DType::f64)
            return run_case<Op, T, double>(exec, options, c, results, request.run);
        return run_case<Op, T, float>(exec, options, c, results, request.run);
    });
}

/// An operator's options in its own words: what it answers to one that nobody has.
template <class Op>
std::string describe_options() {
    typename Op::Options options{};
    const std::string answer = set_option(options, "", "").message();
    const std::size_t start = answer.find(": ");
    return start == answer.npos ? answer : answer.substr(start + 2);
}

/// A line of a registry: how an executor gets an operator.
template <class Op, class Exec>
constexpr Entry<Exec> run_operator() {
    return {Op::name, &run_with_dtypes<Op, Exec>, &describe_options<Op>};
}

/// The same of an operator whose files may hold a single head: Q and K (L, d), and results without axes for batch and
/// heads.
template <class Op, class Exec>
Status run_heads(const Exec& exec, const Request& request, const Case& c, Case& results) {
    const auto Q = c.tensors.find("Q");
    if (Q == c.tensors.end() || Q->second.extent.size() != 2) return run_with_dtypes<Op>(exec, request, c, results);
    Case whole = c;
    for (const char* name : {"Q", "K"})
        if (const auto found = whole.tensors.find(name); found != whole.tensors.end() && found->second.extent.size() == 2)
            found->second.extent = {1, found->second.extent[0], 1, found->second.extent[1]};
    INTERSTATE_RETURN_IF_ERROR(run_with_dtypes<Op>(exec, request, whole, results));
    for (auto& [name, tensor] : results.tensors) tensor.extent = {tensor.extent.back()};
    return {};
}
template <class Op, class Exec>
constexpr Entry<Exec> run_head_operator() {
    return {Op::name, &run_heads<Op, Exec>, &describe_options<Op>};
}

/// Runs the operator that the case names, if the registry has it.
template <class Exec>
Status run_registered(std::span<const Entry<Exec>> registry, const char* executor, const Exec& exec,
                      const Request& request, const Case& c, Case& results) {
    const auto op = c.options.find("op");
    if (op == c.options.end())
        return Status::error(StatusCode::invalid_argument, "metadata: has no \"op\", must name the operator");
    std::string known;
    for (const Entry<Exec>& entry : registry) {
        if (entry.name == op->second) return entry.run(exec, request, c, results);
        known += (known.empty() ? "" : ", ") + std::string(entry.name);
    }
    return Status::error(StatusCode::unsupported, "unknown operator \"%.64s\": %s runs %s",
                         op->second.c_str(), executor, known.c_str());
}

}  // namespace interstate::tools::replay
