#include <attention/attention.cuh>
#include <component_attention/component_attention.cuh>
#include <feature_map/feature_map.cuh>
#include <gate/gate.cuh>
#include <interdomain/interdomain.cuh>
#include <interstate/verify.cuh>
#include <linear_attention/linear_attention.cuh>
#include <random_features/random_features.cuh>
#include <s4d/s4d.cuh>
#include <sd_attention/sd_attention.cuh>
#include <sd_decomposition/sd_decomposition.cuh>
#include <sisa/sisa.cuh>

#include "operators.hpp"

namespace interstate::tools::replay {

namespace {

constexpr Entry<cuda> cuda_operators[] = {
    run_operator<attention::Operator, cuda>(),
    run_operator<component_attention::Operator, cuda>(),
    run_operator<feature_map::Operator, cuda>(),
    run_operator<gate::Operator, cuda>(),
    run_operator<interdomain::Operator, cuda>(),
    run_operator<linear_attention::Operator, cuda>(),
    run_operator<random_features::Operator, cuda>(),
    run_operator<s4d::Operator, cuda>(),
    run_operator<sd_attention::Operator, cuda>(),
    run_head_operator<sd_decomposition::Operator, cuda>(),
    run_operator<sisa::Operator, cuda>(),
};

}  // namespace

Status run_on_cuda(const Request& request, const Case& c, Case& results) {
    int devices = 0;
    INTERSTATE_RETURN_IF_ERROR(cuda_status(cudaGetDeviceCount(&devices), "cuda"));
    if (devices == 0) return Status::error(StatusCode::device_error, "cuda: this machine has no device");
    void* memory = nullptr;
    INTERSTATE_RETURN_IF_ERROR(cuda_status(cudaMalloc(&memory, sizeof(std::uint32_t)), "cuda"));
    const std::unique_ptr<void, cudaError_t (*)(void*)> flags(memory, &cudaFree);
    INTERSTATE_RETURN_IF_ERROR(cuda_status(cudaMemset(memory, 0, sizeof(std::uint32_t)), "cuda"));

    const cuda exec{nullptr, static_cast<std::uint32_t*>(memory)};
    INTERSTATE_RETURN_IF_ERROR(run_registered<cuda>(cuda_operators, "cuda", exec, request, c, results));

    // What the host cannot see, the kernels report here.
    std::uint32_t seen = 0;
    INTERSTATE_RETURN_IF_ERROR(
        cuda_status(cudaMemcpy(&seen, memory, sizeof seen, cudaMemcpyDeviceToHost), "cuda"));
    if (seen & flag_bad_cu_seqlens)
        return Status::error(StatusCode::invalid_argument,
                             "cu_seqlens: offsets must not decrease and must be inside the packed length");
    return {};
}

}  // namespace interstate::tools::replay
