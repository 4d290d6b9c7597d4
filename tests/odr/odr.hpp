// The same call, compiled in two translation units (first.cpp and second.cpp).
#pragma once

#include <vector>

#include <interstate/all.hpp>

/// y of a small S4D layer, by the executor that a translation unit asks for.
template <class Exec>
std::vector<float> run_s4d(const Exec& exec) {
    using namespace interstate;
    constexpr Index B = 8, L = 33, H = 5, N = 3;
    std::vector<float> u(B * L * H), y(u.size()), log_dt(H, -3.0f), log_neg_re(H * N, -0.7f), im(H * N);
    for (std::size_t i = 0; i < u.size(); ++i) u[i] = static_cast<float>(i % 7) - 3.0f;
    for (std::size_t i = 0; i < im.size(); ++i) im[i] = static_cast<float>(i);
    std::vector<complex<float>> b(H * N, {1.0f, 0.0f}), c(H * N, {0.5f, -0.25f});

    const s4d::Options options{};
    const s4d::Inputs<float> in{.u = view(u.data(), {B, L, H}),
                                .params = {.log_dt = view(log_dt.data(), {H}),
                                           .log_neg_re = view(log_neg_re.data(), {H, N}),
                                           .im = view(im.data(), {H, N}),
                                           .B = view(b.data(), {H, N}),
                                           .C = view(c.data(), {H, N})}};
    const s4d::Outputs<float> out{.y = view(y.data(), {B, L, H})};
    std::vector<std::byte> memory(s4d::workspace_size(exec, options, s4d::shape_of(in), pass::forward));
    const Status status = s4d::forward(exec, options, in, out, Saved{}, Workspace{memory.data(), memory.size()});
    return status.ok() ? y : std::vector<float>{};
}

std::vector<float> first_on_cpu();
std::vector<float> first_on_reference();
std::vector<float> second_on_cpu();
std::vector<float> second_on_reference();
