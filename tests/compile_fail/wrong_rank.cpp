// A view of two axes where three are wanted.
// expect: cannot convert .*View<float, 2>
#include <s4d/s4d.hpp>

using namespace interstate;

void set_input(s4d::Inputs<float>& in, float* u, Index B, Index L, Index H) {
#ifdef MISUSE
    const View<float, 2> tokens = view(u, {B * L, H});
#else
    const View<float, 3> tokens = view(u, {B, L, H});
#endif
    in = s4d::Inputs<float>{.u = tokens};
}
