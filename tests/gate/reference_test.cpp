// The output gate's reference against the formula written another way, and finite differences.
#include <gtest/gtest.h>

#include <gate/reference.hpp>

#include "../support/differences.hpp"
#include "gate_cases.hpp"

namespace interstate::test {
namespace {

using gate::Operator;

Case run(const Case& c) {
    Case results;
    const Status status = run_case<Operator, double, double>(reference{}, {}, c, results);
    EXPECT_TRUE(status.ok()) << status.message();
    return results;
}

TEST(GateReference, EqualsTheHyperbolicTangent) {
    Case c = make({.batch = 2, .length = 5, .heads = 3, .value_dim = 4}, 1);
    Case got = run(c);
    for (std::size_t i = 0; i < values(c, "o").size(); ++i)
        EXPECT_NEAR(values(got, "out.y")[i], values(c, "o")[i] * 0.5 * (1.0 + std::tanh(0.5 * values(c, "g")[i])), 1e-14);
}

TEST(GateReference, GradientsMatchFiniteDifferences) {
    for (const bool packed : {false, true}) {
        GateCase o{.batch = packed ? 1 : 2, .length = 7, .heads = 2, .value_dim = 3};
        if (packed) o.cu_seqlens = {1, 3, 3, 6};
        const Case c = make(o, 2);
        const Case got = run(c);
        for (const char* name : {"o", "g"}) EXPECT_LE(difference_error(c, got, name, 1e-4, 1, run), 1e-9) << name;
    }
}

TEST(GateReference, ExtremesAreFinite) {
    Case c;
    c.tensors["o"] = {{1, 1, 1, 4}, {1.0, 1.0, 2.0, 2.0}};
    c.tensors["g"] = {{1, 1, 1, 4}, {1e4, -1e4, 40.0, -40.0}};
    c.tensors["dout.y"] = {{1, 1, 1, 4}, {1.0, 1.0, 1.0, 1.0}};
    Case got = run(c);
    EXPECT_EQ(values(got, "out.y")[0], 1.0);
    EXPECT_EQ(values(got, "out.y")[1], 0.0);
    EXPECT_EQ(values(got, "grad.g")[0], 0.0);
    EXPECT_EQ(values(got, "grad.g")[1], 0.0);
    EXPECT_NEAR(values(got, "grad.g")[2] / (2.0 * std::exp(-40.0)), 1.0, 1e-12);  // 1 - sigmoid would be zero here
    EXPECT_NEAR(values(got, "grad.g")[3] / (2.0 * std::exp(-40.0)), 1.0, 1e-12);
}

TEST(GateReference, ErrorsNameTheArgument) {
    Case c = make({.length = 3}, 1), results;
    c.tensors["g"] = Random(1).normal({1, 3, 1, 5});
    Status s = run_case<Operator, double, double>(reference{}, {}, c, results);
    EXPECT_NE(std::string(s.message()).find("g: extent of axis 3 is 5, must be 4"), std::string::npos) << s.message();
    c = make({.length = 3}, 1);
    c.tensors["cu_seqlens"] = {{2}, {0, 4}};
    EXPECT_EQ((run_case<Operator, double, double>(reference{}, {}, c, results).code()), StatusCode::invalid_argument);
    gate::Options options;
    EXPECT_FALSE(set_option(options, "method", "fast").ok());
}

}  // namespace
}  // namespace interstate::test
