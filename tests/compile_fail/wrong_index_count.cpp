// An element of a tensor of three axes, named by two indices.
// expect: no match for call to .*View<const float, 3>
#include <s4d/s4d.hpp>

float first(const interstate::s4d::Inputs<float>& in) {
#ifdef MISUSE
    return in.u(0, 0);
#else
    return in.u(0, 0, 0);
#endif
}
