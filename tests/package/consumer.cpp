// A user's program: one call of the CPU kernel, held against the reference by changing one word.
#include <cmath>
#include <cstdio>
#include <vector>

#include <s4d/s4d.hpp>

using namespace interstate;

template <class Exec>
Status run(const Exec& exec, const s4d::Inputs<float>& in, std::vector<float>& y) {
    const auto shape = s4d::shape_of(in);
    y.assign(static_cast<std::size_t>(in.u.size()), 0.0f);
    const s4d::Outputs<float> out{.y = view(y.data(), in.u.extent)};
    std::vector<std::byte> memory(s4d::workspace_size(exec, {}, shape, pass::forward));
    return s4d::forward(exec, {}, in, out, Saved{}, Workspace{memory.data(), memory.size()});
}

int main() {
    constexpr Index B = 2, L = 100, H = 9, N = 4;
    std::vector<float> u(B * L * H), log_dt(H, -3.0f), log_neg_re(H * N, -0.7f), im(H * N, 2.0f);
    std::vector<complex<float>> b(H * N, {1.0f, 0.0f}), c(H * N, {0.5f, 0.5f});
    for (std::size_t i = 0; i < u.size(); ++i) u[i] = std::sin(0.1f * static_cast<float>(i));
    const s4d::Inputs<float> in{.u = view(u.data(), {B, L, H}),
                                .params = {.log_dt = view(log_dt.data(), {H}),
                                           .log_neg_re = view(log_neg_re.data(), {H, N}),
                                           .im = view(im.data(), {H, N}),
                                           .B = view(b.data(), {H, N}),
                                           .C = view(c.data(), {H, N})}};
    std::vector<float> fast, truth;
    for (const Status& status : {run(cpu{}, in, fast), run(reference{}, in, truth)})
        if (!status.ok()) return std::puts(status.message()), 1;
    for (std::size_t i = 0; i < truth.size(); ++i)
        if (!(std::abs(fast[i] - truth[i]) <= 1e-4f)) return std::puts("cpu and reference disagree"), 1;
    return 0;
}
