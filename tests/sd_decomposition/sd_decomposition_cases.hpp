// Cases of the routing/filtering decomposition, and how far spectra are from each other.
#pragma once

#include <algorithm>
#include <vector>

#include <sd_decomposition/params.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

/// What the heads of a case are like; all but `random` are of lower rank, in one of the parts or in both. Those that
/// relate Q to K are for as many key heads as query heads.
enum class Heads { random, low_rank, equal, skew, partly_empty, zero };
inline const Heads every_kind_of_heads[] = {Heads::random, Heads::low_rank,     Heads::equal,
                                            Heads::skew,   Heads::partly_empty, Heads::zero};

struct DecompositionCase {
    Index batch = 1, length = 1, query_heads = 1, key_heads = 1, head_dim = 4;
    Heads heads = Heads::random;
    double scale_q = 1.0, scale_k = 1.0;
};

/// Small numbers of three binary digits: their products are exact, so that what cancels cancels in every dtype.
inline Case make(const DecompositionCase& o, std::uint64_t seed) {
    Random r(seed);
    Case c;
    const Index d = o.head_dim;
    HostTensor q = r.normal({o.batch, o.length, o.query_heads, d}), k = r.normal({o.batch, o.length, o.key_heads, d});
    for (HostTensor* x : {&q, &k})
        for (double& v : x->values) v = std::round(8.0 * v) / 8.0;
    const auto row = [&](HostTensor& x, Index n) { return x.values.data() + n * d; };
    const Index rows = o.batch * o.length * o.query_heads;
    if (o.heads == Heads::equal || o.heads == Heads::skew) k = q;
    for (Index n = 0; n < rows; ++n) {
        double *const x = row(q, n), *const y = o.query_heads == o.key_heads ? row(k, n) : nullptr;
        for (Index i = 0; i < d; ++i) switch (o.heads) {
            case Heads::random:
            case Heads::equal: break;
            case Heads::low_rank:  // the rank of A is 1, and that of its parts 2
                if (i > 0) x[i] = -2.0 * x[0];
                break;
            case Heads::skew:  // a b^T - b a^T for every pair of columns
                if (i + 1 < d && i % 2 == 0) y[i] = -x[i + 1], y[i + 1] = x[i];
                if (i + 1 == d && i % 2 == 0) x[i] = 0.0;
                break;
            case Heads::partly_empty:  // columns that are only in Q, only in K, and in both
                if (i % 3 == 0) x[i] = 0.0;
                if (i % 3 == 1) y[i] = 0.0;
                break;
            case Heads::zero: x[i] = 0.0; break;
        }
    }
    for (double& v : q.values) v *= o.scale_q;
    for (double& v : k.values) v *= o.scale_k;
    c.tensors["Q"] = std::move(q);
    c.tensors["K"] = std::move(k);
    return c;
}

/// The largest error of a singular value, relative to the largest of its spectrum, or where that is zero to the norm of
/// A; the worst of all heads. Infinite for what is missing, of another shape, not finite or not descending.
inline double spectrum_error(const Case& got, const Case& want) {
    double worst = 0.0;
    for (const char* name : {"out.routing_singular_values", "out.filtering_singular_values"}) {
        const auto found = got.tensors.find(name);
        const HostTensor& truth = want.tensors.at(name);
        if (found == got.tensors.end() || found->second.extent != truth.extent) return std::numeric_limits<double>::infinity();
        const Index N = truth.extent[2];
        for (Index head = 0; N > 0 && head < truth.extent[0] * truth.extent[1]; ++head) {
            const double *const x = found->second.values.data() + head * N, *const y = truth.values.data() + head * N;
            const double norm = y[0] > 0.0 ? y[0] : want.tensors.at("out.norm").values[static_cast<std::size_t>(head)];
            for (Index i = 0; i < N; ++i) {
                if (!std::isfinite(x[i]) || x[i] < 0.0 || (i > 0 && x[i] > x[i - 1])) return std::numeric_limits<double>::infinity();
                if (x[i] != y[i]) worst = std::max(worst, std::abs(x[i] - y[i]) / norm);
            }
        }
    }
    return worst;
}

/// The largest relative error of every other output: norms, the energy and ranks.
inline double summary_error(const Case& got, const Case& want) {
    double worst = 0.0;
    for (const TensorError& e : compare(got, want))
        if (!e.name.ends_with("singular_values"))
            worst = e.finite ? std::max(worst, e.relative) : std::numeric_limits<double>::infinity();
    return worst;
}

}  // namespace interstate::test
