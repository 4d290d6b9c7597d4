// Packed sequences in tests of the cuda executor: what is in the margins is not read, and bad offsets are reported.
#pragma once

#include <cmath>
#include <initializer_list>

#include <interstate/verify.cuh>

#include "cuda_main.cuh"

namespace interstate::test {

/// NaN in the rows of the named tensors that belong to no sequence must not change a bit of any result.
template <class Op>
void expect_margins_unread(Checks& checks, Case c, std::initializer_list<const char*> names, const typename Op::Options& options = {}) {
    const interstate::cuda exec;
    Case clean, dirty;
    Status s = run_case<Op, float, float>(exec, options, c, clean);
    checks.expect(s.ok(), "packed", s.message());
    const auto& offsets = c.tensors.at("cu_seqlens").values;
    for (const char* name : names) {
        HostTensor& x = c.tensors.at(name);  // (1, L, ..)
        const std::size_t row = x.values.size() / static_cast<std::size_t>(x.extent[1]);
        for (std::size_t i = 0; i < x.values.size(); ++i) {
            const auto t = static_cast<double>(i / row);
            if (t < offsets.front() || t >= offsets.back()) x.values[i] = std::nan("");
        }
    }
    s = run_case<Op, float, float>(exec, options, c, dirty);
    checks.expect(s.ok(), "packed", s.message());
    for (const auto& [name, tensor] : clean.tensors)
        checks.expect(tensor.values == dirty.tensors[name].values, name.c_str(), "rows of no sequence must not be read");
}

/// Offsets that decrease or leave the range are reported (and compute-sanitizer sees that nothing outside is touched).
template <class Op>
void expect_bad_offsets_reported(Checks& checks, const typename Op::Options& options, const Case& c) {
    const std::uint32_t seen = flags_after(checks, "bad cu_seqlens", [&](std::uint32_t* flags) {
        Case results;
        return run_case<Op, float, float>(interstate::cuda{.flags = flags}, options, c, results);
    });
    checks.expect(seen == flag_bad_cu_seqlens, "bad cu_seqlens", "the device flag must be set");
}

/// Without sequences every result is zero; the one offset is reported where it leaves the rows, and only there.
template <class Op>
void expect_zeros_without_sequences(Checks& checks, const typename Op::Options& options, const Case& c, bool leaves) {
    Case got;
    const std::uint32_t seen = flags_after(checks, "no sequences", [&](std::uint32_t* flags) {
        return run_case<Op, float, float>(interstate::cuda{.flags = flags}, options, c, got);
    });
    checks.expect(seen == (leaves ? flag_bad_cu_seqlens : 0u), "no sequences",
                  "the device flag must be set where the offset leaves the rows, and only there");
    for (const auto& [name, tensor] : got.tensors)
        for (const double x : tensor.values)
            if (x != 0.0) checks.expect(false, name.c_str(), "must be zero without sequences");
}

}  // namespace interstate::test
