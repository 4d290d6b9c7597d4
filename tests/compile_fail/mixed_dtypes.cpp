// Inputs in one dtype, outputs in another.
// expect: no matching function for call to .forward\(
#include <s4d/s4d.hpp>

using namespace interstate;

#ifdef MISUSE
using Out = double;
#else
using Out = float;
#endif

Status run(const s4d::Inputs<float>& in, const s4d::Outputs<Out>& out, Workspace ws) {
    return s4d::forward(cpu{}, {}, in, out, Saved{}, ws);
}
