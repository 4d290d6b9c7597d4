// Head dimensions under a budget: budget kept, monotone in the ranks, and the same answer for the same ranks.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include <sd_attention/allocation.hpp>

namespace interstate::test {
namespace {

using sd_attention::AllocationOptions;
using sd_attention::parameter_count;
using Dims = std::vector<Index>;

constexpr AllocationOptions layer{.width = 384, .heads = 12, .value_dim = 32};

/// By hand: u 384 x 12 x 16, v and o 384 x 12 x 32 each, P 12 x 16 x 16 (or a, b 12 x 2 x 16 each), delta 12 x 16.
static_assert(parameter_count(layer, 12, 16) == 73728 + 2 * 147456 + 3072 + 192);
static_assert(parameter_count({.width = 384, .value_dim = 32, .planes = 2}, 12, 16) == 73728 + 2 * 147456 + 2 * 384 + 192);

struct Allocated {
    Status status;
    Dims dims;
    Index used = -1;
};
Allocated allocate(AllocationOptions o, Index budget, const std::vector<double>& ranks, Index groups = 1) {
    o.budget = budget;
    Allocated a{.status = {}, .dims = Dims(ranks.size(), -1)};
    const Index layers = static_cast<Index>(ranks.size()) / groups;
    a.status = allocate_head_dims(o, view(ranks.data(), {layers, groups}), view(a.dims.data(), {layers, groups}), a.used);
    return a;
}
Index cost(const AllocationOptions& o, const Dims& dims, Index groups = 1) {
    Index total = 0;
    for (const Index r : dims) total += parameter_count(o, o.heads / groups, r);
    return total;
}

TEST(Allocation, GrowsWithTheRanksInProportion) {
    const Index enough = cost(layer, {16, 32, 64});
    const Allocated a = allocate(layer, enough, {2.0, 4.0, 8.0});
    ASSERT_TRUE(a.status.ok()) << a.status.message();
    EXPECT_EQ(a.dims, (Dims{16, 32, 64}));
    EXPECT_EQ(a.used, enough);
    // One parameter fewer: the last step, which was that of the smallest rank (of equal ratios the largest rank is first), is not taken.
    EXPECT_EQ(allocate(layer, enough - 1, {2.0, 4.0, 8.0}).dims, (Dims{8, 32, 64}));
}
TEST(Allocation, KeepsTheBudgetAndTheOrderOfRanks) {
    std::mt19937 random(3);
    std::uniform_real_distribution<double> uniform(0.0, 40.0);
    for (int trial = 0; trial < 200; ++trial) {
        const Index groups = trial % 2 == 0 ? 1 : 12;
        AllocationOptions o = layer;
        o.planes = trial % 3 == 0 ? 2 : -1;
        std::vector<double> ranks(static_cast<std::size_t>(groups * (1 + trial % 5)));
        for (double& rank : ranks) rank = trial % 7 == 0 ? std::floor(uniform(random) / 10.0) : uniform(random);
        const Index low = cost(o, Dims(ranks.size(), 8), groups), high = cost(o, Dims(ranks.size(), 128), groups);
        Dims before(ranks.size(), 8);
        for (const double share : {0.0, 0.01, 0.2, 0.6, 1.0}) {
            const Index budget = low + static_cast<Index>(share * static_cast<double>(high - low));
            const Allocated a = allocate(o, budget, ranks, groups);
            ASSERT_TRUE(a.status.ok()) << a.status.message();
            EXPECT_EQ(a.used, cost(o, a.dims, groups));
            EXPECT_LE(a.used, budget);
            for (std::size_t i = 0; i < ranks.size(); ++i) {
                EXPECT_TRUE(a.dims[i] % 8 == 0 && a.dims[i] >= 8 && a.dims[i] <= 128);
                EXPECT_GE(a.dims[i], before[i]) << "a larger budget gave less";
                for (std::size_t j = 0; j < ranks.size(); ++j) {
                    EXPECT_TRUE(ranks[i] <= ranks[j] || a.dims[i] >= a.dims[j]);
                    EXPECT_TRUE(ranks[i] != ranks[j] || a.dims[i] == a.dims[j]);
                }
            }
            before = a.dims;
            EXPECT_EQ(allocate(o, budget, ranks, groups).dims, a.dims);
        }
    }
}
TEST(Allocation, ReachesTheExtremes) {
    const Index all = cost(layer, {128, 128, 128});
    EXPECT_EQ(allocate(layer, all, {1.0, 5.0, 30.0}).dims, (Dims{128, 128, 128}));
    EXPECT_EQ(allocate(layer, 100 * all, {1.0, 5.0, 30.0}).used, all);
    EXPECT_EQ(allocate(layer, cost(layer, {8, 8, 8}), {1.0, 5.0, 30.0}).dims, (Dims{8, 8, 8}));
    EXPECT_EQ(allocate(layer, all, {0.0, 5.0, 0.0}).dims, (Dims{8, 128, 8})) << "a rank of 0 stays at the minimum";
    EXPECT_EQ(allocate(layer, cost(layer, {8, 8, 16}), {4.0, 4.0, 3.0}).dims, (Dims{8, 8, 8})) << "equal ranks together or not at all";
    EXPECT_EQ(allocate(layer, cost(layer, {16, 16, 8}), {4.0, 4.0, 3.0}).dims, (Dims{16, 16, 8}));
    EXPECT_EQ(allocate(layer, 0, {}).used, 0);
    AllocationOptions even = layer;
    even.multiple = 2, even.minimum = 2, even.maximum = 6;
    EXPECT_EQ(allocate(even, cost(even, {2, 4, 6}), {1.0, 2.0, 3.0}).dims, (Dims{2, 4, 6}));
}
TEST(Allocation, TakesStridesAndOneHeadAGroup) {
    const std::vector<double> ranks{1.0, -7.0, 8.0, -7.0};  // every second is another's
    Dims dims(4, -1);
    View<const double, 2> from = view(ranks.data(), {Index(1), Index(2)});
    View<Index, 2> to = view(dims.data(), {Index(1), Index(2)});
    from.stride[1] = 2, to.stride[1] = 2;
    AllocationOptions o = layer;
    o.heads = 2, o.budget = parameter_count(o, 1, 8) + parameter_count(o, 1, 64);
    Index used = 0;
    ASSERT_TRUE(allocate_head_dims(o, from, to, used).ok());
    EXPECT_EQ(dims, (Dims{8, -1, 64, -1}));
}
TEST(Allocation, SaysWhatIsWrong) {
    const auto refused = [](AllocationOptions o, Index budget, const std::vector<double>& ranks, Index groups, const std::string& says) {
        const Allocated a = allocate(o, budget, ranks, groups);
        EXPECT_EQ(a.status.code(), StatusCode::invalid_argument);
        EXPECT_NE(std::string(a.status.message()).find(says), std::string::npos) << a.status.message();
        EXPECT_EQ(a.dims, Dims(ranks.size(), -1)) << "something was written";
        EXPECT_EQ(a.used, -1);
    };
    const Index least = cost(layer, {8, 8});
    refused(layer, least - 1, {2.0, 3.0}, 1,
            "budget is " + std::to_string(least - 1) + ", must be at least the " + std::to_string(least) + " of head dimension 8");
    refused(layer, -5, {2.0}, 1, "budget is -5");
    refused(layer, least, {2.0, -1.0}, 1, "ranks[1,0] is -1");
    refused(layer, least, {2.0, std::nan("")}, 1, "ranks[1,0] is nan");
    refused(layer, least, {std::numeric_limits<double>::infinity(), 1.0}, 1, "ranks[0,0] is inf");
    refused(layer, least, {1.0, 2.0, 3.0, 4.0, 5.0}, 5, "groups is 5, must divide the 12 heads");
    const auto with = [&](auto change, const char* says) {
        AllocationOptions o = layer;
        change(o);
        refused(o, 100 * least, {2.0, 3.0}, 1, says);
    };
    with([](AllocationOptions& o) { o.width = 0; }, "width is 0");
    with([](AllocationOptions& o) { o.heads = -1; }, "heads is -1");
    with([](AllocationOptions& o) { o.value_dim = 0; }, "value_dim is 0");
    with([](AllocationOptions& o) { o.planes = -2; }, "planes is -2");
    with([](AllocationOptions& o) { o.multiple = 0; }, "multiple is 0");
    with([](AllocationOptions& o) { o.minimum = 12; }, "must be multiples of 8");
    with([](AllocationOptions& o) { o.maximum = 0; }, "maximum is 0, must be from 8");
    with([](AllocationOptions& o) { o.width = o.heads = o.value_dim = o.maximum = Index(1) << 20; }, "beyond 9e18");
}

}  // namespace
}  // namespace interstate::test
