// The instruction sets that this machine can test.
#pragma once

#include <vector>

#include <interstate/cpu/simd.hpp>

namespace interstate::test {

inline std::vector<Isa> isas() {
    std::vector<Isa> all;
    for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512})
        if (simd::machine_has(isa)) all.push_back(isa);
    return all;
}

}  // namespace interstate::test
