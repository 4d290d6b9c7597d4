// Initialisations of S4D (docs/ops/s4d.md, eq. 11): host arrays in, parameters out.
#pragma once

#include <cmath>
#include <numbers>
#include <vector>

#include <Eigen/Eigenvalues>

#include <interstate/random.hpp>
#include <s4d/params.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d {

/// inv, lin, real: closed forms. legs: eigenvalues of the normal part of HiPPO-LegS, computed.
enum class Init : std::uint8_t { inv, lin, real, legs };

/// Continuous eigenvalues of one channel, N of them with im >= 0.
struct Spectrum {
    std::vector<double> neg_re;  // -Re A > 0
    std::vector<double> im;
};

inline Spectrum spectrum(Init init, Index modes) {
    const auto N = static_cast<double>(modes);
    Spectrum s{std::vector<double>(static_cast<std::size_t>(modes), 0.5),
               std::vector<double>(static_cast<std::size_t>(modes), 0.0)};
    for (Index i = 0; i < modes; ++i) {
        const auto n = static_cast<double>(i);
        const auto at = static_cast<std::size_t>(i);
        switch (init) {
            case Init::inv: s.im[at] = 2.0 * N / std::numbers::pi * (2.0 * N / (2.0 * n + 1.0) - 1.0); break;
            case Init::lin: s.im[at] = std::numbers::pi * n; break;
            case Init::real: s.neg_re[at] = n + 1.0; break;
            case Init::legs: break;
        }
    }
    if (init == Init::legs && modes > 0) {
        // HiPPO-LegS plus its rank-one correction is -1/2 I plus a skew-symmetric matrix of size 2N
        // with entries sqrt((2i+1)(2j+1))/2 above the diagonal; i times it is Hermitian, and its 2N
        // eigenvalues come in pairs +-im.
        const Eigen::Index size = 2 * modes;
        Eigen::MatrixXcd hermitian = Eigen::MatrixXcd::Zero(size, size);
        for (Eigen::Index i = 0; i < size; ++i)
            for (Eigen::Index j = i + 1; j < size; ++j) {
                const double a = 0.5 * std::sqrt((2.0 * static_cast<double>(i) + 1.0) *
                                                 (2.0 * static_cast<double>(j) + 1.0));
                hermitian(i, j) = {0.0, a};
                hermitian(j, i) = {0.0, -a};
            }
        const Eigen::VectorXd values =
            Eigen::SelfAdjointEigenSolver<Eigen::MatrixXcd>(hermitian, Eigen::EigenvaluesOnly).eigenvalues();
        for (Index i = 0; i < modes; ++i) s.im[static_cast<std::size_t>(i)] = values(modes + i);  // ascending
    }
    return s;
}

/// Mutable parameters, to be initialised or updated.
template <class P>
using MutableParams = BasicParams<P, complex<P>>;

/// Fills log_neg_re, im (eq. 11), log_dt uniform in [log dt_min, log dt_max], B = 1, C complex normal of
/// unit variance, D = 1. Deterministic in `seed` on every platform.
template <class P>
Status initialize(Init init, std::uint64_t seed, const MutableParams<P>& params, double dt_min = 1e-3,
                  double dt_max = 1e-1) {
    const Index H = params.log_neg_re.extent[0], N = params.log_neg_re.extent[1];
    CheckTensors check;
    auto tensors = params;
    visit_params(tensors, Shape{.channels = H, .modes = N}, Need::required, check);
    INTERSTATE_RETURN_IF_ERROR(check.status);
    if (!(dt_min > 0.0) || !(dt_max >= dt_min))
        return Status::error(StatusCode::invalid_argument, "dt_min and dt_max are %g and %g, must be 0 < dt_min <= dt_max",
                             dt_min, dt_max);
    Random64 random(seed);
    const Spectrum s = spectrum(init, N);
    for (Index h = 0; h < H; ++h) {
        params.log_dt(h) = static_cast<P>(std::log(dt_min) + random.uniform() * (std::log(dt_max) - std::log(dt_min)));
        for (Index n = 0; n < N; ++n) {
            const auto at = static_cast<std::size_t>(n);
            params.log_neg_re(h, n) = static_cast<P>(std::log(s.neg_re[at]));
            params.im(h, n) = static_cast<P>(s.im[at]);
            params.B(h, n) = {P(1), P(0)};
            params.C(h, n) = cast<P>(random.complex_normal());
        }
        if (params.D) params.D(h) = P(1);
    }
    return {};
}

}  // namespace s4d
}  // namespace interstate::inline INTERSTATE_ABI
