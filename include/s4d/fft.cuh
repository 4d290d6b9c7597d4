// S4D on the GPU by the method fft: public entry for the executor cuda_fft, whose transforms are cuFFT plans that
// the caller made. The only header that includes <cufft.h>; link cuFFT (CUDA::cufft) with it.
//
//     s4d::cuda_fft exec{.base = cuda{stream}};
//     Status s = s4d::make_fft_plans(shape, exec);     // once for a shape; or plans of your own, see cuda_fft
//     ... s4d::forward(exec, options, in, out, saved, ws) ... as for `cuda` ...
//     s = s4d::destroy_fft_plans(exec);
//
// The same operator as s4d/s4d.cuh: every dtype, states, packed sequences, both directions. The recurrences of a
// call are transformed one after the other with the same plans. Two limits of any convolution by FFT: rounding is
// relative to the largest values of a sequence, not to each y; and a NaN spreads over its whole sequence (not
// beyond it). Equations: docs/ops/s4d.md.
#pragma once

#include <cufft.h>

#include <s4d/detail/cuda_fft.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d {

/// Length n of the transforms for sequences of up to `length` tokens: even, at least 2 length, a product of powers of
/// 2, 3, 5 and 7.
inline Index fft_length(Index length) { return detail::spectra::good_transform_length(length); }

/// The cuda executor with a pair of cuFFT plans for calls of one shape: `channels` transforms of length
/// n = fft_length(length), on contiguous rows of n real and n/2 + 1 complex numbers,
///
///     int n = fft_length(length), bins = n / 2 + 1;
///     cufftPlanMany(&to_spectrum, 1, &n, &n, 1, n, &bins, 1, bins, CUFFT_R2C, channels);
///     cufftPlanMany(&to_rows, 1, &n, &bins, 1, bins, &n, 1, n, CUFFT_C2R, channels);
///
/// with CUFFT_D2Z and CUFFT_Z2D where u is f64. The plans, and their work areas, are the caller's; a call sets their
/// stream to base.stream, so that calls that share plans belong on one stream.
struct cuda_fft {
    cuda base{};
    cufftHandle to_spectrum{};
    cufftHandle to_rows{};
};

namespace detail::spectra {

/// A cuFFT error as a Status; `what` names the call.
inline Status cufft_status(cufftResult error, const char* what) {
    if (error == CUFFT_SUCCESS) return {};
    const char* reason = "see cufftResult in cufft.h";
    switch (error) {
        case CUFFT_INVALID_PLAN: reason = "not a plan"; break;
        case CUFFT_ALLOC_FAILED: reason = "no memory"; break;
        case CUFFT_INVALID_TYPE: reason = "the plan is of another type"; break;
        case CUFFT_INVALID_SIZE: reason = "a size it does not support"; break;
        case CUFFT_EXEC_FAILED: reason = "the GPU refused"; break;
        case CUFFT_SETUP_FAILED: reason = "cuFFT did not start"; break;
        default: break;
    }
    return Status::error(StatusCode::device_error, "%s: cuFFT error %d, %s", what, static_cast<int>(error), reason);
}

/// The transforms of a call, in the accumulator dtype.
struct CufftTransforms {
    const cuda_fft& exec;

    Status start() const {
        INTERSTATE_RETURN_IF_ERROR(
            cufft_status(cufftSetStream(exec.to_spectrum, exec.base.stream), "to_spectrum, cufftSetStream"));
        return cufft_status(cufftSetStream(exec.to_rows, exec.base.stream), "to_rows, cufftSetStream");
    }
    Status to_spectrum(float* rows, complex<float>* bins) const {
        return cufft_status(cufftExecR2C(exec.to_spectrum, rows, reinterpret_cast<cufftComplex*>(bins)),
                            "cufftExecR2C");
    }
    Status to_spectrum(double* rows, complex<double>* bins) const {
        return cufft_status(cufftExecD2Z(exec.to_spectrum, rows, reinterpret_cast<cufftDoubleComplex*>(bins)),
                            "cufftExecD2Z");
    }
    Status to_rows(complex<float>* bins, float* rows) const {
        return cufft_status(cufftExecC2R(exec.to_rows, reinterpret_cast<cufftComplex*>(bins), rows),
                            "cufftExecC2R");
    }
    Status to_rows(complex<double>* bins, double* rows) const {
        return cufft_status(cufftExecZ2D(exec.to_rows, reinterpret_cast<cufftDoubleComplex*>(bins), rows),
                            "cufftExecZ2D");
    }
};

inline Status check_fft_method(const Options& options) {
    if (options.method == Method::automatic || options.method == Method::fft) return {};
    return Status::error(StatusCode::unsupported, "method: is %s, must be fft or automatic on cuda_fft",
                         to_string(options.method));
}

/// Whether a call has anything to transform: without, its plans are not looked at.
inline bool transforms_anything(const Shape& s) { return s.length > 0 && s.channels > 0; }

}  // namespace detail::spectra

/// Makes the plans of `exec` for calls of a shape (its dtype, length and channels), with work areas that cuFFT
/// allocates. Any plans that were there are not touched, only forgotten.
inline Status make_fft_plans(const Shape& shape, cuda_fft& exec) {
    INTERSTATE_RETURN_IF_ERROR(validate(shape));
    const bool f64 = shape.dtype == DType::f64;
    // An empty shape gets the smallest plans, so that there is always a pair to destroy.
    const long long channels = std::max<Index>(shape.channels, 1);
    long long n = fft_length(shape.length), bins = n / 2 + 1;
    std::size_t work = 0;
    cufftHandle to_spectrum{}, to_rows{};
    INTERSTATE_RETURN_IF_ERROR(detail::spectra::cufft_status(cufftCreate(&to_spectrum), "to_spectrum, cufftCreate"));
    Status s = detail::spectra::cufft_status(cufftCreate(&to_rows), "to_rows, cufftCreate");
    if (!s.ok()) {
        cufftDestroy(to_spectrum);
        return s;
    }
    s = detail::spectra::cufft_status(cufftMakePlanMany64(to_spectrum, 1, &n, &n, 1, n, &bins, 1, bins,
                                                 f64 ? CUFFT_D2Z : CUFFT_R2C, channels, &work),
                             "to_spectrum, cufftMakePlanMany64");
    if (s.ok())
        s = detail::spectra::cufft_status(cufftMakePlanMany64(to_rows, 1, &n, &bins, 1, bins, &n, 1, n,
                                                     f64 ? CUFFT_Z2D : CUFFT_C2R, channels, &work),
                                 "to_rows, cufftMakePlanMany64");
    if (!s.ok()) {
        cufftDestroy(to_spectrum);
        cufftDestroy(to_rows);
        return s;
    }
    exec.to_spectrum = to_spectrum;
    exec.to_rows = to_rows;
    return {};
}

/// Gives back what make_fft_plans made.
inline Status destroy_fft_plans(const cuda_fft& exec) {
    const cufftResult first = cufftDestroy(exec.to_spectrum), second = cufftDestroy(exec.to_rows);
    return detail::spectra::cufft_status(first != CUFFT_SUCCESS ? first : second, "cufftDestroy");
}

inline KernelChoice which_kernel(const cuda_fft&, const Options& options, const Shape&) {
    if (!detail::spectra::check_fft_method(options).ok()) return {"", "cuda_fft has no method but fft"};
    return {"s4d.cuda.fft", "one convolution a sequence, transforms by the caller's cuFFT plans"};
}

/// Nothing is kept between forward and backward.
inline std::size_t saved_size(const cuda_fft&, const Options&, const Shape&) { return 0; }

/// Bytes of workspace in device memory, beside the plans' own work areas.
inline std::size_t workspace_size(const cuda_fft&, const Options&, const Shape& shape, pass p) {
    if (p == pass::step) return 0;
    Arena arena;
    if (shape.dtype == DType::f64)
        detail::spectra::FftLayout<double>(arena, shape, p);
    else
        detail::spectra::FftLayout<float>(arena, shape, p);
    return arena.required();
}

inline namespace INTERSTATE_KERNELS {

/// y (B, L, H) and the final states xT; `saved` is not used. A launch or cuFFT error is a Status; cu_seqlens is
/// checked on the device and reported in exec.base.flags.
template <class T, class P>
Status forward(const cuda_fft& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>& out, Saved,
               Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, out));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::spectra::check_fft_method(options));
    INTERSTATE_RETURN_IF_ERROR(detail::spectra::check_grids(shape));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::forward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec.base, in.cu_seqlens, shape.length));
    const detail::spectra::CufftTransforms transforms{exec};
    if (detail::spectra::transforms_anything(shape)) INTERSTATE_RETURN_IF_ERROR(transforms.start());
    return detail::spectra::FftRun(exec.base, options, in, transforms, ws, pass::forward).forward(out);
}

/// Gradients of every input whose view in `grads` is not null; `out` and `saved` are not read.
template <class T, class P>
Status backward(const cuda_fft& exec, const Options& options, const Inputs<T, P>& in, const Outputs<T>&, Saved,
                const Upstream<T>& upstream, const Grads<T, P>& grads, Workspace ws) {
    INTERSTATE_RETURN_IF_ERROR(validate(in, upstream, grads));
    const Shape shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(detail::spectra::check_fft_method(options));
    INTERSTATE_RETURN_IF_ERROR(detail::spectra::check_grids(shape));
    INTERSTATE_RETURN_IF_ERROR(
        check_workspace("workspace", ws, workspace_size(exec, options, shape, pass::backward)));
    INTERSTATE_RETURN_IF_ERROR(pending_status());
    INTERSTATE_RETURN_IF_ERROR(check_offsets(exec.base, in.cu_seqlens, shape.length));
    const detail::spectra::CufftTransforms transforms{exec};
    if (detail::spectra::transforms_anything(shape)) INTERSTATE_RETURN_IF_ERROR(transforms.start());
    return detail::spectra::FftRun(exec.base, options, in, transforms, ws, pass::backward).backward(upstream, grads);
}

}  // namespace INTERSTATE_KERNELS
}  // namespace s4d
}  // namespace interstate::inline INTERSTATE_ABI
