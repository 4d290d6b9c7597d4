// The transforms of interstate/cpu/fft.hpp against sums written out, in every dtype and instruction set.
#include <gtest/gtest.h>

#include <interstate/cpu/fft.hpp>

#include "support/cases.hpp"
#include "support/isas.hpp"

namespace interstate::test {
namespace {

/// x (m, 2, W), forward, a product with k's values, inverse.
template <class A>
struct Convolution {
    Isa isa;
    Index m, W = simd::lanes<A>(isa);
    std::vector<A> roots{};

    std::vector<A> values(const std::vector<double>& x, const std::vector<double>& imaginary = {}) {
        std::vector<A> v(m * 2 * W);
        for (std::size_t j = 0; j < x.size(); ++j)
            for (Index lane = 0; lane < W; ++lane) {  // lanes differ: lane + 1 times x
                v[j * 2 * W + lane] = static_cast<A>((lane + 1) * x[j]);
                if (!imaginary.empty()) v[j * 2 * W + W + lane] = static_cast<A>((lane + 1) * imaginary[j]);
            }
        if (roots.empty()) {
            roots.resize(fft::roots_size(2 * m));  // a table larger than needed serves too
            fft::fill_roots(roots.data(), 2 * m, 2);
        }
        simd::run_body<fft::Forward<A>>(isa, v.data(), m, static_cast<const A*>(roots.data()));
        return v;
    }
    void invert(std::vector<A>& v) {
        simd::run_body<fft::Inverse<A>>(isa, v.data(), m, static_cast<const A*>(roots.data()));
    }
};

template <class A>
void check(Isa isa, Index m) {
    const double bound = std::is_same_v<A, double> ? 1e-13 : 1e-6;
    Random r(static_cast<std::uint64_t>(m));
    std::vector<double> x(m), k(m), k_im(m);
    for (auto* v : {&x, &k, &k_im})
        for (double& e : *v) e = static_cast<float>(r.normal());
    Convolution<A> c{isa, m};
    const Index W = c.W;

    // All coefficients of x k, k of 2m coefficients, modulo z^2m + 1.
    std::vector<double> want(2 * m);
    for (Index i = 0; i < m; ++i)
        for (Index j = 0; j < 2 * m; ++j) {
            const double term = x[i] * (j < m ? k[j] : k_im[j - m]);
            (i + j < 2 * m ? want[i + j] : want[i + j - 2 * m]) += i + j < 2 * m ? term : -term;
        }
    const auto X = c.values(x), K = c.values(k, k_im);
    auto product = K;
    simd::run_body<fft::Convolve<A>>(isa, X.data(), product.data(), m, A(1) / static_cast<A>(m));
    c.invert(product);
    double error = 0.0, norm = 0.0;
    const auto add = [&](double got, double truth) {
        error += (got - truth) * (got - truth);
        norm += truth * truth;
    };
    for (Index j = 0; j < 2 * m; ++j)
        for (Index lane = 0; lane < W; ++lane)
            add(product[(j % m) * 2 * W + (j < m ? 0 : W) + lane], (lane + 1.0) * (lane + 1.0) * want[j]);
    EXPECT_LE(std::sqrt(error / norm), bound) << "convolution, m=" << m << " " << to_string(isa);

    // Correlations: lag l of sum_t g[t] x[t-l] is coefficient l, lag -l is coefficient 2m - l, negated. The
    // sum over two calls, and the other gradient, of conj(k) g for k of m coefficients.
    std::vector<double> g(m);
    for (double& e : g) e = static_cast<float>(r.normal());
    const auto k_values = c.values(k);
    auto dx = c.values(g), again = dx;
    std::vector<A> dk(m * 2 * W, A(0));
    for (auto* dy : {&dx, &again})
        simd::run_body<fft::Correlate<A>>(isa, X.data(), k_values.data(), dy->data(), dk.data(), m,
                                          A(1) / static_cast<A>(m));
    c.invert(dx);
    c.invert(dk);
    error = norm = 0.0;
    for (Index lane = 0; lane < W; ++lane) {
        const double scale = (lane + 1.0) * (lane + 1.0);
        for (Index l = 1 - m; l < m; ++l) {
            double by_x = 0.0, by_k = 0.0;
            for (Index t = std::max<Index>(l, 0); t < m && t - l < m; ++t) {
                by_x += g[t] * x[t - l];
                by_k += g[t] * k[t - l];
            }
            const Index at = (l >= 0 ? l : m + l) * 2 * W + (l >= 0 ? 0 : W) + lane;
            const double sign = l >= 0 ? 1.0 : -1.0;
            add(sign * dk[at], 2.0 * scale * by_x);
            add(sign * dx[at], scale * by_k);
        }
    }
    EXPECT_LE(std::sqrt(error / norm), bound) << "correlation, m=" << m << " " << to_string(isa);
}

TEST(Fft, ConvolutionsAndCorrelationsOfEverySize) {
    for (const Isa isa : isas())
        for (Index m = 1; m <= 1024; m *= 2) {
            check<float>(isa, m);
            check<double>(isa, m);
        }
}

TEST(Fft, RootsAreThoseOfTheTree) {
    std::vector<double> roots(fft::roots_size(256));
    fft::fill_roots(roots.data(), 256, 1);
    const auto at = [&](Index level, Index k) {
        const double* c = roots.data() + 2 * ((Index{1} << level) - 1 + k);
        return std::complex<double>(c[0], c[1]);
    };
    EXPECT_NEAR(std::abs(at(0, 0) * at(0, 0) - std::complex<double>(0.0, 1.0)), 0.0,
                1e-15);  // c^2 = i at the root
    for (Index level = 0; level + 1 < 8; ++level)
        for (Index k = 0; k < (Index{1} << level); ++k) {  // children's c^2 are c and -c
            EXPECT_NEAR(std::abs(at(level + 1, 2 * k) * at(level + 1, 2 * k) - at(level, k)), 0.0, 1e-15);
            EXPECT_NEAR(std::abs(at(level + 1, 2 * k + 1) * at(level + 1, 2 * k + 1) + at(level, k)), 0.0,
                        1e-15);
        }
    EXPECT_EQ(fft::size_for(0), 1);
    EXPECT_EQ(fft::size_for(1), 1);
    EXPECT_EQ(fft::size_for(1024), 1024);
    EXPECT_EQ(fft::size_for(1025), 2048);
}

}  // namespace
}  // namespace interstate::test
