// The decomposition on the CPU: whole calls, beside the singular values alone of the reduced matrices S and F by Eigen's
// BDCSVD (values only), a head a task on the same threads. The errors are those of the worst singular value, relative to the
// largest, against the float64 reference.
#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include <Eigen/SVD>

#include <sd_decomposition/sd_decomposition.hpp>

#include "../support/cpu_bench.hpp"

namespace {

using namespace interstate;
using bench::check;

constexpr Index heads = 4;

template <class T>
struct Problem {
    Index L, d, n;
    std::vector<T> q, k;
    std::vector<acc_t<T>> routing, filtering;
    std::vector<std::byte> memory;

    Problem(Index length, Index dim) : L(length), d(dim), n(std::min(L, 2 * d)), q(size()), k(size()), routing(values()), filtering(values()) {
        for (std::size_t i = 0; i < size(); ++i) {  // far from periodic, and no two heads alike
            const double at = static_cast<double>(i);
            q[i] = T(std::sin(0.7 * at + 1e-3 * at * std::sqrt(at))), k[i] = T(std::cos(1.3 * at + 2e-3 * at * std::sqrt(at)));
        }
    }
    std::size_t size() const { return static_cast<std::size_t>(L * heads * d); }
    std::size_t values() const { return static_cast<std::size_t>(heads * n); }

    template <class Exec>
    void run(const Exec& exec) {
        const sd_decomposition::Inputs<T> in{.Q = view(static_cast<const T*>(q.data()), {Index{1}, L, heads, d}),
                                             .K = view(static_cast<const T*>(k.data()), {Index{1}, L, heads, d})};
        const sd_decomposition::Outputs<T> out{.routing_singular_values = view(routing.data(), {Index{1}, heads, n}),
                                               .filtering_singular_values = view(filtering.data(), {Index{1}, heads, n})};
        memory.resize(workspace_size(exec, sd_decomposition::Options{}, shape_of(in), pass::forward));
        check(forward(exec, sd_decomposition::Options{}, in, out, Saved{}, Workspace{memory.data(), memory.size()}));
    }
    /// The float64 truth of these inputs, found once in a process.
    const Problem<double>& truth() const {
        static std::map<std::pair<Index, Index>, Problem<double>> known;
        const auto found = known.find({L, d});
        if (found != known.end()) return found->second;
        Problem<double>& fresh = known.emplace(std::pair{L, d}, Problem<double>(L, d)).first->second;
        bench::widen(q, fresh.q);
        bench::widen(k, fresh.k);
        fresh.run(reference{});
        return fresh;
    }
    double error() const {
        const Problem<double>& want = truth();
        double worst = 0.0;
        for (Index i = 0; i < heads * n; ++i) {
            const auto at = static_cast<std::size_t>(i), first = static_cast<std::size_t>(i / n * n);
            worst = std::max({worst, std::abs(static_cast<double>(routing[at]) - want.routing[at]) / want.routing[first],
                              std::abs(static_cast<double>(filtering[at]) - want.filtering[at]) / want.filtering[first]});
        }
        return worst;
    }
};

// Arguments: L, d, threads.
template <class T>
void forward_of(benchmark::State& state) {
    Problem<T> p(state.range(0), state.range(1));
    const cpu exec{.threads = static_cast<int>(state.range(2))};
    for (auto _ : state) p.run(exec);
    state.counters["error"] = p.error();
}

/// For L <= 2d, where A is its own reduced matrix; forming S and F is not timed.
void eigen_bdcsvd(benchmark::State& state) {
    using Matrix = Eigen::MatrixXd;
    Problem<double> p(state.range(0), state.range(1));
    const int threads = static_cast<int>(state.range(2));
    std::vector<Matrix> parts;
    for (Index h = 0; h < heads; ++h) {
        using Columns = Eigen::Map<const Matrix, 0, Eigen::OuterStride<>>;  // of Q^T and K^T
        const Columns q(p.q.data() + h * p.d, p.d, p.L, Eigen::OuterStride<>(heads * p.d));
        const Columns k(p.k.data() + h * p.d, p.d, p.L, Eigen::OuterStride<>(heads * p.d));
        const Matrix interaction = q.transpose().lazyProduct(k) / std::sqrt(static_cast<double>(p.d));
        parts.push_back((interaction - interaction.transpose()) / 2.0);
        parts.push_back((interaction + interaction.transpose()) / 2.0);
    }
    Eigen::setNbThreads(1);  // its products would take threads of their own
    for (auto _ : state)
        parallel_for(heads, threads, [&](Index h, int) {
            for (const Index part : {0, 1}) {
                const Eigen::BDCSVD<Matrix> svd(parts[static_cast<std::size_t>(2 * h + part)]);
                std::copy_n(svd.singularValues().data(), p.n, (part == 0 ? p.routing : p.filtering).data() + h * p.n);
            }
        });
    state.counters["error"] = p.error();
}

void reduced(benchmark::internal::Benchmark* b) {
    b->ArgNames({"L", "d", "threads"});
    for (const int n : {32, 64, 128, 256})
        for (const int threads : {1, 2}) b->Args({n, n / 2, threads});
    bench::timed(b);
}
void tall(benchmark::internal::Benchmark* b) {
    b->ArgNames({"L", "d", "threads"});
    for (const int length : {512, 4096})
        for (const int threads : {1, 2}) b->Args({length, 64, threads});
    bench::timed(b);
}
BENCHMARK_TEMPLATE(forward_of, interstate::f64)->Apply(reduced);
BENCHMARK(eigen_bdcsvd)->Apply(reduced);
BENCHMARK_TEMPLATE(forward_of, interstate::f32)->Apply(reduced);
BENCHMARK_TEMPLATE(forward_of, interstate::f64)->Apply(tall);
BENCHMARK_TEMPLATE(forward_of, interstate::f32)->Apply(tall);
BENCHMARK_TEMPLATE(forward_of, interstate::bf16)->Apply(tall);

}  // namespace
