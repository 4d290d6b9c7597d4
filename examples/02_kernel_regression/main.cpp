// Interdomain Attention as kernel regression, on a real series: README.md is the place to start.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <numbers>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include <Eigen/SVD>

#include <interdomain/interdomain.hpp>
#include <random_features/init.hpp>
#include <random_features/random_features.hpp>

namespace {

namespace interdomain = interstate::interdomain;
namespace random_features = interstate::random_features;
using interstate::Index;
using interstate::pass;
using interstate::Saved;
using interstate::view;
using interstate::Workspace;
using Complex = interstate::complex<double>;
using Numbers = std::vector<double>;

constexpr double bandwidth = 16.0;  // of the kernel, in chapters
constexpr interstate::cpu executor;
constexpr interdomain::Options options{.normalizer = interdomain::Normalizer::nadaraya_watson};

void check(const interstate::Status& status) {
    if (!status.ok()) throw std::runtime_error(status.message());
}

/// The series: words per verse in each chapter. A verse is a line, an empty line ends a chapter.
Numbers words_per_verse(const std::string& path) {
    std::ifstream file(path);
    if (!file) throw std::runtime_error(path + ": cannot be read");
    Numbers chapters;
    double words = 0.0, verses = 0.0;
    const auto end_chapter = [&] {
        if (verses > 0.0) chapters.push_back(words / verses);
        words = verses = 0.0;
    };
    for (std::string line; std::getline(file, line);) {
        if (line.empty()) end_chapter();
        std::istringstream in(line);
        for (std::string word; in >> word;) words += 1.0;
        verses += line.empty() ? 0.0 : 1.0;
    }
    end_chapter();
    if (chapters.size() < 100) throw std::runtime_error(path + ": has fewer than 100 chapters");
    return chapters;
}

/// What is to be approximated: the mean of all values, weighted by a Gaussian of the distance from `place`.
double kernel_attention(const Numbers& values, double place) {
    double sum = 0.0, weights = 0.0;
    for (std::size_t n = 0; n < values.size(); ++n) {
        const double distance = (place - static_cast<double>(n)) / bandwidth;
        const double weight = std::exp(-0.5 * distance * distance);
        sum += weight * values[n];
        weights += weight;
    }
    return sum / weights;
}

/// (places, 2 F) features, whose products are about the kernel.
Numbers features_of(const Numbers& places, const Numbers& W) {
    const auto length = static_cast<Index>(places.size()), F = static_cast<Index>(W.size());
    Numbers features(places.size() * W.size() * 2);
    const random_features::Inputs<double> in{.x = view(places.data(), {Index(1), length, Index(1), Index(1)}),
                                             .params = {view(W.data(), {Index(1), F, Index(1)})}};
    const random_features::Outputs<double> out{view(features.data(), {Index(1), length, Index(1), 2 * F})};
    std::vector<char> memory(
        random_features::workspace_size(executor, {}, random_features::shape_of(in), pass::forward));
    check(random_features::forward(executor, {}, in, out, Saved{}, Workspace{memory.data(), memory.size()}));
    return features;
}

/// M modes that remember `length` tokens, and the contraction C that makes of them a projection.
struct Basis {
    Numbers log_dt, log_neg_re, im;
    std::vector<Complex> B, C;
    Index modes, kept;  // kept: directions that C does not drop

    Basis(Index M, Index length) : log_dt(1), im(M), B(M, {1.0, 0.0}), C(M * M), modes(M) {
        // One unit of the system's time is all tokens. Frequencies come in pairs +-f, so that the basis
        // has every real wave, and lie closer than those of a Fourier series: what they make together
        // does not have to end where it began.
        log_dt[0] = -std::log(static_cast<double>(length));
        log_neg_re.assign(M, std::log(0.5));
        for (Index m = 0; m < M; ++m) im[m] = 2.0 * std::numbers::pi / 1.5 * (m - 0.5 * (M - 1));

        std::vector<Complex> Lam(M), Bbar(M);
        check(interdomain::discretize(
            executor, options, params(),
            interdomain::Discrete<double>{
                view(Lam.data(), {Index(1), M}), view(Bbar.data(), {Index(1), M}), {}}));

        // Phi[n,m] = Lam[m]^(N-1-n) Bbar[m]: how much of token n is in mode m at the end. Modes m and
        // M-1-m are conjugate; the unitary T makes real columns of them, Psi = Phi T.
        using namespace std::complex_literals;
        Eigen::MatrixXcd Phi(length, M), T = Eigen::MatrixXcd::Zero(M, M);
        for (Index m = 0; m < M; ++m) {
            const std::complex<double> lambda(Lam[m].re, Lam[m].im), b(Bbar[m].re, Bbar[m].im);
            for (Index n = 0; n < length; ++n)
                Phi(n, m) = b * std::pow(lambda, static_cast<double>(length - 1 - n));
        }
        for (Index m = 0; m < M / 2; ++m) {
            T(m, m) = T(M - 1 - m, m) = std::sqrt(0.5);
            T(m, M - 1 - m) = 1i * std::sqrt(0.5);
            T(M - 1 - m, M - 1 - m) = -1i * std::sqrt(0.5);
        }
        if (M % 2 == 1) T(M / 2, M / 2) = 1.0;

        // With Psi = U S V^T, the C of which C^T C = G is the inverse of Phi^T Phi is S^-1 V^T T^T: then
        // Phi G Phi^T = U U^T. Waves that lie so close together make up fewer directions than they are
        // many, and where S is small, 1/S makes large numbers of rounding errors. The kernels multiply
        // with G, in which it is 1/S^2: 1e-5 of the largest S is 1e-10 of the 1e-16 that float64 has.
        // Directions beyond that are dropped; what is left is still a projection.
        const Eigen::MatrixXd Psi = (Phi * T).real();
        const Eigen::BDCSVD<Eigen::MatrixXd> svd(Psi, Eigen::ComputeThinU | Eigen::ComputeThinV);
        const auto& S = svd.singularValues();
        kept = (S.array() > 1e-5 * S(0)).count();
        const Eigen::MatrixXcd VT = svd.matrixV().transpose() * T.transpose();
        for (Index i = 0; i < kept; ++i)
            for (Index m = 0; m < M; ++m) C[i * M + m] = {VT(i, m).real() / S(i), VT(i, m).imag() / S(i)};
    }

    interdomain::Params<double> params() const {
        return {view(log_dt.data(), {Index(1)}), view(log_neg_re.data(), {Index(1), modes}),
                view(im.data(), {Index(1), modes}), view(B.data(), {Index(1), modes}),
                view(C.data(), {Index(1), modes, modes})};
    }
};

/// Interdomain Attention: the tokens pass once, then all queries read the state that is left. They are query
/// heads of the last token: any number of them can share a key/value head.
Numbers interdomain_attention(const Basis& basis, const Numbers& queries, const Numbers& keys,
                              const Numbers& values, Index R) {
    const auto length = static_cast<Index>(values.size()), Q = static_cast<Index>(queries.size()) / R;
    const Index M = basis.modes;
    std::vector<Complex> x(M * (R + 1)), eta(M);
    Numbers unasked(length * 1), answers(Q);

    const auto tokens = [&](Index first, Index count) {
        return interdomain::Inputs<double>{
            .k = view(keys.data() + first * R, {Index(1), count, Index(1), R}),
            .v = view(values.data() + first, {Index(1), count, Index(1), Index(1)}),
            .params = basis.params()};
    };
    const auto run = [&](const interdomain::Inputs<double>& in, const interdomain::Outputs<double>& out) {
        std::vector<char> memory(
            interdomain::workspace_size(executor, options, interdomain::shape_of(in), pass::forward));
        check(interdomain::forward(executor, options, in, out, Saved{},
                                   Workspace{memory.data(), memory.size()}));
    };

    auto past = tokens(0, length - 1);
    past.q = past.k;  // somebody has to ask; the answers are not used
    run(past, {.o = view(unasked.data(), {Index(1), length - 1, Index(1), Index(1)}),
               .xT = view(x.data(), {Index(1), Index(1), M, R + 1}),
               .etaT = view(eta.data(), {Index(1), Index(1), M})});

    auto last = tokens(length - 1, 1);
    last.q = view(queries.data(), {Index(1), Index(1), Q, R});
    last.x0 = view(x.data(), {Index(1), Index(1), M, R + 1});
    last.eta0 = view(eta.data(), {Index(1), Index(1), M});
    run(last, {.o = view(answers.data(), {Index(1), Index(1), Q, Index(1)})});
    return answers;
}

/// The same without compression: every query meets every key. What M modes tend to.
Numbers feature_attention(const Numbers& queries, const Numbers& keys, const Numbers& values, Index R) {
    using RowMajor = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
    const auto N = static_cast<Index>(values.size()), Q = static_cast<Index>(queries.size()) / R;
    const Eigen::MatrixXd weights = Eigen::Map<const RowMajor>(queries.data(), Q, R) *
                                    Eigen::Map<const RowMajor>(keys.data(), N, R).transpose();
    const Eigen::VectorXd sums = weights * Eigen::Map<const Eigen::VectorXd>(values.data(), N);
    Numbers answers(Q);
    for (Index i = 0; i < Q; ++i) answers[i] = sums(i) / weights.row(i).sum();
    return answers;
}

/// The features of one draw of random frequencies.
struct Draw {
    Index R;
    Numbers queries, keys;
};

double rms_difference(const Numbers& a, const Numbers& b) {
    double sum = 0.0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
    return std::sqrt(sum / static_cast<double>(a.size()));
}

int compare(const std::string& path) {
    const Numbers values = words_per_verse(path);
    const auto N = static_cast<Index>(values.size());
    Numbers places(values.size()), asked, exact;
    for (Index n = 0; n < N; ++n) places[n] = static_cast<double>(n);
    for (double place = 0.5; place < static_cast<double>(N - 1); place += 2.0) asked.push_back(place);
    for (const double place : asked) exact.push_back(kernel_attention(values, place));

    double mean = 0.0;
    for (const double e : exact) mean += e / static_cast<double>(exact.size());
    std::printf(
        "words per verse in %lld chapters, smoothed by a Gaussian kernel of bandwidth %.0f chapters and read "
        "at\n"
        "%zu places: %.1f on average, give or take %.1f\n\n",
        static_cast<long long>(N), bandwidth, exact.size(), mean,
        rms_difference(exact, Numbers(exact.size(), mean)));
    std::printf(
        "root mean square error of Interdomain Attention against exact kernel attention, words per verse,\n"
        "median of three draws of the features (lower is better)\n\n");

    const std::vector<Index> feature_counts{256, 1024, 4096, 16384}, mode_counts{8, 16, 32, 64};
    constexpr int draws = 3;
    std::vector<std::vector<Draw>> columns;
    for (const Index R : feature_counts) {
        columns.emplace_back();
        for (int seed = 1; seed <= draws; ++seed) {
            Numbers W(R / 2);
            check(random_features::initialize(seed, view(W.data(), {Index(1), R / 2, Index(1)}), bandwidth));
            columns.back().push_back({R, features_of(asked, W), features_of(places, W)});
        }
    }
    // One row of the table: attend(draw) answers all queries.
    Numbers errors;
    const auto print_row = [&](const auto& attend) {
        errors.clear();
        for (const auto& column : columns) {
            Numbers of_draws;
            for (const Draw& draw : column) of_draws.push_back(rms_difference(exact, attend(draw)));
            std::sort(of_draws.begin(), of_draws.end());
            errors.push_back(of_draws[draws / 2]);
            std::printf("%10.4f", errors.back());
            std::fflush(stdout);
        }
        std::printf("\n");
    };
    std::printf("%24s", "features R:");
    for (const Index R : feature_counts) std::printf("%10lld", static_cast<long long>(R));
    std::printf("\n");
    double fewest_modes = 0.0;
    for (const Index M : mode_counts) {
        const Basis basis(M, N);
        std::printf("%4lld modes (rank %2lld)     ", static_cast<long long>(M),
                    static_cast<long long>(basis.kept));
        print_row(
            [&](const Draw& d) { return interdomain_attention(basis, d.queries, d.keys, values, d.R); });
        if (M == mode_counts.front()) fewest_modes = errors.back();
    }
    const double best = errors.back(), fewest_features = errors.front();
    std::printf("%-24s", "all tokens, no modes");
    print_row([&](const Draw& d) { return feature_attention(d.queries, d.keys, values, d.R); });

    // Both must count: modes, with the most features, and features, with the most modes.
    const bool falls = best < 0.5 * fewest_modes && best < 0.5 * fewest_features;
    if (!falls) std::printf("\nThe error does not fall as it must.\n");
    return falls ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    const auto examples = std::filesystem::path(__FILE__).parent_path().parent_path();
    try {
        return compare(argc > 1 ? argv[1] : (examples / "data" / "kjv_psalms_new_testament.txt").string());
    } catch (const std::exception& error) {
        std::fprintf(stderr, "kernel_regression: %s\n", error.what());
        return 2;
    }
}
