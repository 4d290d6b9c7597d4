// The calls of the cuda executor, in a translation unit that is compiled for two lists of architectures, with the
// CPU's kernels in sight.
#include <s4d/s4d.hpp>
#include <linear_attention/linear_attention.cuh>
#include <s4d/s4d.cuh>
#include <sd_decomposition/sd_decomposition.cuh>

using namespace interstate;

Status INTERSTATE_ODR_UNIT(const s4d::Inputs<float>& in, const s4d::Outputs<float>& out, Saved saved,
                           const s4d::Upstream<float>& upstream, const s4d::Grads<float>& grads,
                           const View<float, 2>& K, const s4d::Discrete<float>& discrete, const s4d::State<float>& state,
                           const s4d::Token<float>& token, const s4d::TokenOut<float>& token_out,
                           const linear_attention::Inputs<float>& tokens, const linear_attention::Outputs<float>& outputs,
                           const linear_attention::Upstream<float>& of_outputs, const linear_attention::Grads<float>& of_tokens,
                           const linear_attention::State<float>& sums, const linear_attention::Token<float>& next,
                           const linear_attention::TokenOut<float>& next_out, const sd_decomposition::Inputs<float>& heads,
                           const sd_decomposition::Outputs<float>& measures, Workspace ws) {
    const interstate::cuda exec;
    const s4d::Options options;
    INTERSTATE_RETURN_IF_ERROR(forward(exec, options, in, out, saved, ws));
    INTERSTATE_RETURN_IF_ERROR(backward(exec, options, in, out, saved, upstream, grads, ws));
    INTERSTATE_RETURN_IF_ERROR(generate_kernel(exec, options, in.params, K, ws));
    INTERSTATE_RETURN_IF_ERROR(
        generate_kernel_backward(exec, options, in.params, View<const float, 2>(K), grads.params, ws));
    INTERSTATE_RETURN_IF_ERROR(discretize(exec, options, in.params, discrete));
    INTERSTATE_RETURN_IF_ERROR(step(exec, options, discrete, state, token, token_out, ws));
    const linear_attention::Options linear;
    INTERSTATE_RETURN_IF_ERROR(forward(exec, linear, tokens, outputs, saved, ws));
    INTERSTATE_RETURN_IF_ERROR(backward(exec, linear, tokens, outputs, saved, of_outputs, of_tokens, ws));
    INTERSTATE_RETURN_IF_ERROR(step(exec, linear, linear_attention::Params{}, sums, next, next_out, ws));
    return forward(exec, sd_decomposition::Options{}, heads, measures, saved, ws);
}
