// Head dimensions of S-D attention from measured ranks under a budget of parameters (docs/ops/sd_attention.md, "Head dimensions").
#pragma once

#include <cmath>

#include <interstate/status.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace sd_attention {

struct AllocationOptions {
    Index width = 0;      // D, of the model
    Index heads = 0;      // H, of a layer
    Index value_dim = 0;  // dv
    Index budget = 0;     // parameters of all layers together
    Index planes = -1;    // p of a generator of low rank; -1 is dense
    Index minimum = 8, maximum = 128, multiple = 8;  // of r; the first two are multiples of the third
};

/// Parameters of `heads` heads of r channels: the projections to u and v and from o, width (r + 2 dv) a head, and the generator, P (r r)
/// or a and b (2 p r), and delta (r).
constexpr Index parameter_count(const AllocationOptions& o, Index heads, Index r) {
    return heads * (o.width * (r + 2 * o.value_dim) + (o.planes >= 0 ? 2 * o.planes * r : r * r) + r);
}

/// Head dimensions head_dims (layers, groups) from ranks (layers, groups), of which a group is heads / groups heads of a layer: groups = 1
/// allocates by layer, groups = heads by head. All begin at the minimum; then, as long as the budget holds it, the one with the least
/// (r + multiple) / rank grows by `multiple`, of several the one with the larger rank, and those with equal ranks together or not at all.
/// The first step that the budget does not hold ends it. So dimensions do not fall where ranks rise, equal ranks have equal dimensions, a
/// larger budget gives no smaller dimension, and a rank of 0 stays at the minimum. `used` is what the result costs, never more than the
/// budget.
///
/// Errors, before anything is written: invalid_argument (options; ranks that are negative or not finite; heads that are no multiple of
/// groups; a budget below what the minimum costs).
inline Status allocate_head_dims(const AllocationOptions& o, const View<const double, 2>& ranks, const View<Index, 2>& head_dims,
                                 Index& used) {
    const auto as_printed = [](Index n) { return static_cast<long long>(n); };
    constexpr Index most = Index(1) << 20;
    const struct {
        const char* name;
        Index value, least;
    } sizes[] = {{"width", o.width, 1}, {"heads", o.heads, 1}, {"value_dim", o.value_dim, 1}, {"planes", o.planes, -1},
                 {"multiple", o.multiple, 1}, {"minimum", o.minimum, 1}, {"maximum", o.maximum, o.minimum}};
    for (const auto& size : sizes)
        if (size.value < size.least || size.value > most)
            return Status::error(StatusCode::invalid_argument, "options.%s is %lld, must be from %lld to 2^20", size.name,
                                 as_printed(size.value), as_printed(size.least));
    if (o.minimum % o.multiple != 0 || o.maximum % o.multiple != 0)
        return Status::error(StatusCode::invalid_argument, "options.minimum is %lld and maximum %lld, must be multiples of %lld",
                             as_printed(o.minimum), as_printed(o.maximum), as_printed(o.multiple));
    const Index layers = ranks.extent[0], groups = ranks.extent[1];
    INTERSTATE_RETURN_IF_ERROR(check_size("ranks: layers", layers));
    INTERSTATE_RETURN_IF_ERROR(check_size("ranks: groups", groups));
    INTERSTATE_RETURN_IF_ERROR(check_view("ranks", ranks, {layers, groups}, Need::required));
    INTERSTATE_RETURN_IF_ERROR(check_view("head_dims", head_dims, {layers, groups}, Need::required));
    if (groups == 0 || o.heads % groups != 0)
        return Status::error(StatusCode::invalid_argument, "ranks: groups is %lld, must divide the %lld heads", as_printed(groups),
                             as_printed(o.heads));
    for (Index n = 0; n < layers; ++n)
        for (Index g = 0; g < groups; ++g)
            if (!std::isfinite(ranks(n, g)) || ranks(n, g) < 0.0)
                return Status::error(StatusCode::invalid_argument, "ranks[%lld,%lld] is %g, must be finite and not negative", as_printed(n),
                                     as_printed(g), ranks(n, g));
    const Index heads = o.heads / groups, members = layers * groups;
    const auto cost = [&](Index r) { return parameter_count(o, heads, r); };
    // The largest count must be a number: in double first, because it may not be one.
    const double largest = static_cast<double>(o.maximum), planes = static_cast<double>(o.planes);
    if (static_cast<double>(members) * static_cast<double>(heads) *
            (static_cast<double>(o.width) * (largest + 2.0 * static_cast<double>(o.value_dim)) +
             (o.planes >= 0 ? 2.0 * planes : largest) * largest + largest) > 9e18)
        return Status::error(StatusCode::invalid_argument, "options: the count of parameters at maximum is beyond 9e18");
    Index total = members * cost(o.minimum);
    if (total > o.budget)
        return Status::error(StatusCode::invalid_argument, "options.budget is %lld, must be at least the %lld of head dimension %lld",
                             as_printed(o.budget), as_printed(total), as_printed(o.minimum));
    const auto each = [&](auto&& f) {
        for (Index n = 0; n < layers; ++n)
            for (Index g = 0; g < groups; ++g) f(ranks(n, g), head_dims(n, g));
    };
    each([&](double, Index& r) { r = o.minimum; });
    for (;;) {
        double best = INFINITY, rank = 0.0;
        Index r = 0, equal = 0;
        each([&](double k, Index& dim) {
            const double next = static_cast<double>(dim + o.multiple) / k;
            if (k == 0.0 || dim + o.multiple > o.maximum || next > best || (next == best && k < rank)) return;
            if (k == rank && equal > 0) return void(++equal);
            best = next, rank = k, r = dim, equal = 1;
        });
        if (equal == 0) break;
        const Index step = equal * (cost(r + o.multiple) - cost(r));
        if (total + step > o.budget) break;
        total += step;
        each([&](double k, Index& dim) {
            if (k == rank) dim = r + o.multiple;
        });
    }
    used = total;
    return {};
}

}  // namespace sd_attention
}  // namespace interstate::inline INTERSTATE_ABI
