// Links both halves and holds their results against each other.
#include <cmath>
#include <cstdio>

#include "odr.hpp"

namespace {

bool close(const char* what, const std::vector<float>& a, const std::vector<float>& b) {
    bool good = !a.empty() && a.size() == b.size();
    for (std::size_t i = 0; good && i < a.size(); ++i)
        good = std::abs(a[i] - b[i]) <= 1e-5f * (1.0f + std::abs(a[i]));  // NaN is not close
    if (!good) std::printf("%s: the two translation units disagree\n", what);
    return good;
}

}  // namespace

int main() {
    // One half may be compiled for AVX2; asking costs nothing where it is not.
    if (!interstate::simd::machine_has(interstate::Isa::avx2)) {
        std::puts("skipped: this machine has no AVX2");
        return 77;
    }
    const bool good = close("cpu", first_on_cpu(), second_on_cpu()) &
                      close("reference", first_on_reference(), second_on_reference()) &
                      close("cpu against reference", first_on_cpu(), second_on_reference());
    return good ? 0 : 1;
}
