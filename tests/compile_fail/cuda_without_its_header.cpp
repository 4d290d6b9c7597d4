// The cuda executor needs the operator's .cuh.
// expect: no matching function for call to .forward\(.*cuda
#include <s4d/s4d.hpp>

using namespace interstate;

#ifdef MISUSE
using Executor = cuda;
#else
using Executor = cpu;
#endif

Status run(const s4d::Inputs<float>& in, const s4d::Outputs<float>& out, Workspace ws) {
    return s4d::forward(Executor{}, {}, in, out, Saved{}, ws);
}
