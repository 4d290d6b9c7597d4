// A call whose Status nobody looks at.
// expect: ignoring returned value of type .*Status
#include <s4d/s4d.hpp>

using namespace interstate;

void run(const s4d::Inputs<float>& in, const s4d::Outputs<float>& out, Workspace ws) {
#ifdef MISUSE
    s4d::forward(cpu{}, {}, in, out, Saved{}, ws);
#else
    if (!s4d::forward(cpu{}, {}, in, out, Saved{}, ws)) __builtin_abort();
#endif
}
