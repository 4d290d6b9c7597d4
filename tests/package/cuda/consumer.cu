#include <s4d/s4d.cuh>

#if INTERSTATE_HAS_SM90A != EXPECT_SM90A
#error "INTERSTATE_HAS_SM90A does not say whether 90a is in the target's CUDA_ARCHITECTURES"
#endif

const char* kernel_name() { return interstate::s4d::which_kernel(interstate::cuda{}, {}, {}).name; }
