// The calls of the cuda executor, in a translation unit that is compiled for two lists of architectures, with the
// CPU's kernels in sight.
#include <s4d/s4d.hpp>
#include <s4d/s4d.cuh>

using namespace interstate;

Status INTERSTATE_ODR_UNIT(const s4d::Inputs<float>& in, const s4d::Outputs<float>& out, Saved saved,
                           const s4d::Upstream<float>& upstream, const s4d::Grads<float>& grads,
                           const View<float, 2>& K, const s4d::Discrete<float>& discrete, const s4d::State<float>& state,
                           const s4d::Token<float>& token, const s4d::TokenOut<float>& token_out, Workspace ws) {
    const interstate::cuda exec;
    const s4d::Options options;
    INTERSTATE_RETURN_IF_ERROR(forward(exec, options, in, out, saved, ws));
    INTERSTATE_RETURN_IF_ERROR(backward(exec, options, in, out, saved, upstream, grads, ws));
    INTERSTATE_RETURN_IF_ERROR(generate_kernel(exec, options, in.params, K, ws));
    INTERSTATE_RETURN_IF_ERROR(
        generate_kernel_backward(exec, options, in.params, View<const float, 2>(K), grads.params, ws));
    INTERSTATE_RETURN_IF_ERROR(discretize(exec, options, in.params, discrete));
    return step(exec, options, discrete, state, token, token_out, ws);
}
