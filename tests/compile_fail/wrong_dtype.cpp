// A storage dtype that no operator has.
// expect: dtype_traits<int>
#include <s4d/s4d.hpp>

using namespace interstate;

#ifdef MISUSE
using Storage = int;
#else
using Storage = bf16;
#endif

DType dtype(const s4d::Inputs<Storage>& in) { return s4d::shape_of(in).dtype; }
