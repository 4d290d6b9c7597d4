#include "odr.hpp"

std::vector<float> first_on_cpu() { return run_s4d(interstate::cpu{.threads = 4}); }
std::vector<float> first_on_reference() { return run_s4d(interstate::reference{}); }
