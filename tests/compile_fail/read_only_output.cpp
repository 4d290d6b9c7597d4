// An output that points to constant memory.
// expect: cannot convert .*View<const float, 3>
#include <s4d/s4d.hpp>

using namespace interstate;

#ifdef MISUSE
using Element = const float;
#else
using Element = float;
#endif

void set_output(s4d::Outputs<float>& out, Element* y, Index B, Index L, Index H) {
    const View<Element, 3> tokens = view(y, {B, L, H});
    out = s4d::Outputs<float>{.y = tokens};
}
