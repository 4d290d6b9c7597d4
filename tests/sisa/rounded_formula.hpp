// SISA's plain formula as a 16-bit kernel may compute it: inputs and operands of matrix products rounded to the storage
// dtype (rotated channels, weights, score gradients), all else in double. Its error is what the 16-bit rule compares with.
#pragma once

#include <vector>

#include <sisa/sisa.hpp>

#include "../support/cases.hpp"

namespace interstate::test {

/// Results by the names of the case. Inputs must be rounded already (`rounded`). `operand` rounds an operand.
template <class Rounding>
Case formula_with_operands(const sisa::Options& o, const Case& c, Rounding&& operand) {
    const auto extent = [&](const char* name, std::size_t axis) { return c.tensors.at(name).extent[axis]; };
    const Index batch = extent("q", 0), Lq = extent("q", 1), Hq = extent("q", 2), dh = extent("q", 3);
    const Index Lk = extent("k", 1), Hkv = extent("k", 2), dv = extent("v", 3), ds = extent("C", 3), pairs = ds / 2;
    const bool softmax = o.score == sisa::Score::softmax, exact = o.mode == sisa::Mode::exact;
    const attention::Options plain{.causal = true, .window = o.window, .scale = o.scale};
    const double scale = attention::scale_of(plain, dh);

    Case result;
    const auto zeros = [&](const std::string& name, const HostTensor& like) -> HostTensor& {
        return result.tensors[name] = HostTensor{like.extent, std::vector<double>(like.values.size(), 0.0)};
    };
    struct Rows {  // (batch, L, heads, width)
        double* data;
        Index L, heads, width;
        double* operator()(Index b, Index i, Index h) const { return data + ((b * L + i) * heads + h) * width; }
    };
    const auto rows = [](HostTensor& x) {
        const Index width = x.extent.size() > 3 ? x.extent[3] : 1;
        return Rows{x.values.data(), x.extent[1], x.extent[2], width};
    };
    auto in = c.tensors;
    const Rows q = rows(in["q"]), k = rows(in["k"]), v = rows(in["v"]), C = rows(in["C"]), B = rows(in["B"]);
    const Rows log_alpha = rows(in["log_alpha"]), theta = rows(in["theta"]);
    const std::vector<double>& lam = in["lam"].values;
    const bool backward = in.contains("dout.o");
    HostTensor no_dlse{{batch, Lq, Hq}, std::vector<double>(static_cast<std::size_t>(batch * Lq * Hq), 0.0)};
    HostTensor lse_values = no_dlse, o_values{{batch, Lq, Hq, dv}, {}};
    o_values.values.assign(static_cast<std::size_t>(batch * Lq * Hq * dv), 0.0);
    const Rows dout = backward ? rows(in["dout.o"]) : Rows{};
    const Rows dlse = rows(in.contains("dout.lse") ? in["dout.lse"] : no_dlse);
    const Rows out = rows(zeros("out.o", o_values)), lse = rows(softmax ? zeros("out.lse", lse_values) : lse_values);
    const Rows dq = rows(zeros("grad.q", in["q"])), dk = rows(zeros("grad.k", in["k"])), dvs = rows(zeros("grad.v", in["v"]));
    const Rows dC = rows(zeros("grad.C", in["C"])), dB = rows(zeros("grad.B", in["B"]));
    const Rows dalpha = rows(zeros("grad.log_alpha", in["log_alpha"])), dtheta = rows(zeros("grad.theta", in["theta"]));
    std::vector<double>& dlam = zeros("grad.lam", in["lam"]).values;

    const auto size = [](Index n) { return static_cast<std::size_t>(n); };
    const auto dot = [](const double* a, const double* b, Index n) {
        double sum = 0.0;
        for (Index d = 0; d < n; ++d) sum += a[d] * b[d];
        return sum;
    };
    const auto turn = [&](const double* x, const double* Phi, double sign, double* to) {
        for (Index n = 0; n < pairs; ++n) {
            const double co = std::cos(Phi[n]), si = sign * std::sin(Phi[n]);
            to[2 * n] = x[2 * n] * co - x[2 * n + 1] * si;
            to[2 * n + 1] = x[2 * n] * si + x[2 * n + 1] * co;
        }
    };
    // x.d to dg and the cross product to dPhi (eq. 22 and 23).
    const auto reduce = [&](const double* x, const double* d, double sign, double& dg, double* dPhi) {
        dg += sign * dot(x, d, ds);
        for (Index n = 0; n < pairs; ++n) dPhi[n] += x[2 * n] * d[2 * n + 1] - x[2 * n + 1] * d[2 * n];
    };

    const bool packed = in.contains("cu_seqlens");
    const std::vector<double> offsets = packed ? in["cu_seqlens"].values : std::vector<double>{0.0, static_cast<double>(Lk)};
    for (std::size_t sequence = 0; sequence + 1 < offsets.size(); ++sequence)
        for (Index b = 0; b < batch; ++b)
            for (Index kv = 0; kv < Hkv; ++kv) {
                const Index key0 = static_cast<Index>(offsets[sequence]), n = static_cast<Index>(offsets[sequence + 1]) - key0;
                const Index queries = packed ? n : Lq, offset = n - queries, query0 = packed ? key0 : 0;
                if (n == 0) continue;
                std::vector<double> g(size(n)), level(size(n)), Phi(size(n * pairs)), Bhat(size(n * ds)), dBhat(size(n * ds));
                std::vector<double> dg(size(n)), dPhi(size(n * pairs)), Chat(size(ds)), dChat(size(ds)), p(size(n)), decay(size(n)), dp(size(n));
                for (Index j = 0; j < n; ++j) {
                    const double a = *log_alpha(b, key0 + j, kv);
                    g[size(j)] = (j > 0 ? g[size(j - 1)] : 0.0) + (exact ? sisa::detail::floored(a) : a);
                    for (Index m = 0; m < pairs; ++m)
                        Phi[size(j * pairs + m)] = (j > 0 ? Phi[size((j - 1) * pairs + m)] : 0.0) + theta(b, key0 + j, kv)[m];
                    turn(B(b, key0 + j, kv), &Phi[size(j * pairs)], 1.0, &Bhat[size(j * ds)]);
                    for (Index d = 0; d < ds; ++d) Bhat[size(j * ds + d)] = operand(Bhat[size(j * ds + d)]);
                }
                level = g;
                if (!exact) {
                    double most = g[0], least = g[0];
                    for (const double x : g) most = std::max(most, x), least = std::min(least, x);
                    for (double& x : g) x -= (most + least) / 2.0;
                    for (Index j = 0; j < n; ++j) level[size(j)] = sisa::detail::clamped(g[size(j)], o.clamp);
                }
                for (Index h = kv * (Hq / Hkv); h < (kv + 1) * (Hq / Hkv); ++h) {
                    const double bias = in.contains("bias") ? in["bias"].values[size(h)] : o.bias, l = lam[size(h)];
                    for (Index i = 0; i < queries; ++i) {
                        const Index row = query0 + i, at = i + offset;
                        turn(C(b, row, h), &Phi[size(at * pairs)], 1.0, Chat.data());
                        for (double& x : Chat) x = operand(x);
                        const RowRange read = attention::keys_read(plain, at, n);
                        double largest = -INFINITY, sum = 0.0, delta = 0.0;
                        for (Index j = read.begin; j < read.end; ++j) {
                            decay[size(j)] = std::exp(level[size(at)] - level[size(j)]);
                            p[size(j)] = scale * dot(q(b, row, h), k(b, key0 + j, kv), dh) +
                                         l * decay[size(j)] * dot(Chat.data(), &Bhat[size(j * ds)], ds);
                            largest = std::max(largest, p[size(j)]);
                        }
                        for (Index j = read.begin; j < read.end; ++j)
                            sum += p[size(j)] = softmax ? std::exp(p[size(j)] - largest) : 1.0 / (1.0 + std::exp(-p[size(j)] - bias));
                        if (softmax) *lse(b, row, h) = largest + std::log(sum);
                        for (Index j = read.begin; j < read.end; ++j) {
                            if (softmax) p[size(j)] /= sum;
                            for (Index d = 0; d < dv; ++d) out(b, row, h)[d] += operand(p[size(j)]) * v(b, key0 + j, kv)[d];
                        }
                        if (!backward) continue;
                        for (Index j = read.begin; j < read.end; ++j)
                            delta += p[size(j)] * (dp[size(j)] = dot(dout(b, row, h), v(b, key0 + j, kv), dv));
                        std::fill(dChat.begin(), dChat.end(), 0.0);
                        for (Index j = read.begin; j < read.end; ++j) {
                            const double w = p[size(j)];
                            const double x = softmax ? w * (dp[size(j)] - delta + *dlse(b, row, h)) : w * (1.0 - w) * dp[size(j)];
                            const double p16 = operand(w), ds16 = operand(x), channels16 = operand(x * decay[size(j)]);
                            for (Index d = 0; d < dv; ++d) dvs(b, key0 + j, kv)[d] += p16 * dout(b, row, h)[d];
                            for (Index d = 0; d < dh; ++d) {
                                dq(b, row, h)[d] += scale * ds16 * k(b, key0 + j, kv)[d];
                                dk(b, key0 + j, kv)[d] += scale * ds16 * q(b, row, h)[d];
                            }
                            for (Index d = 0; d < ds; ++d) {
                                dChat[size(d)] += l * channels16 * Bhat[size(j * ds + d)];
                                dBhat[size(j * ds + d)] += l * channels16 * Chat[size(d)];
                            }
                        }
                        dlam[size(h)] += dot(Chat.data(), dChat.data(), ds) / l;
                        reduce(Chat.data(), dChat.data(), 1.0, dg[size(at)], &dPhi[size(at * pairs)]);
                        turn(dChat.data(), &Phi[size(at * pairs)], -1.0, dC(b, row, h));
                    }
                }
                if (!backward) continue;
                std::vector<double> later(size(pairs), 0.0);
                for (Index j = n - 1; j >= 0; --j) {
                    reduce(&Bhat[size(j * ds)], &dBhat[size(j * ds)], -1.0, dg[size(j)], &dPhi[size(j * pairs)]);
                    turn(&dBhat[size(j * ds)], &Phi[size(j * pairs)], -1.0, dB(b, key0 + j, kv));
                    for (Index m = 0; m < pairs; ++m)
                        dtheta(b, key0 + j, kv)[m] = j == 0 ? 0.0 : later[size(m)] += dPhi[size(j * pairs + m)];
                }
                if (exact) {
                    double sum = 0.0;
                    for (Index j = n - 1; j >= 0; --j) {
                        sum += dg[size(j)];
                        if (j == 0 || *log_alpha(b, key0 + j, kv) <= sisa::hard_reset) sum = 0.0;
                        *dalpha(b, key0 + j, kv) = sum;
                    }
                } else {
                    sisa::detail::reference_published_gradient(o.clamp, g.data(), n, dg.data());
                    for (Index j = 0; j < n; ++j) *dalpha(b, key0 + j, kv) = dg[size(j)];
                }
            }
    if (!backward)
        std::erase_if(result.tensors, [](const auto& x) { return x.first.starts_with("grad."); });
    return result;
}

/// The formula of the 16-bit rule for storage T.
/// `grid` moves the numbers that operands are rounded to: another sample of the same rounding.
template <class T>
Case rounded_formula(const sisa::Options& o, const Case& c, double grid = 1.0) {
    return formula_with_operands(o, c, [grid](double x) { return static_cast<double>(T(static_cast<float>(x * grid))) / grid; });
}

/// sqrt(sum over rows of (|x| |d|)^2), rows of the last axis.
inline double terms(const Case& c, const Case& truth, const char* x, const char* d) {
    if (!c.tensors.contains(x)) return 0.0;
    const HostTensor &a = c.tensors.at(x), &b = truth.tensors.at(d);
    const std::size_t width = static_cast<std::size_t>(a.extent.back());
    double sum = 0.0;
    for (std::size_t r = 0; width > 0 && r < a.values.size(); r += width) {
        double aa = 0.0, bb = 0.0;
        for (std::size_t i = r; i < r + width; ++i) aa += a.values[i] * a.values[i], bb += b.values[i] * b.values[i];
        sum += aa * bb;
    }
    return std::sqrt(sum);
}
inline double norm(const HostTensor& x) {
    double sum = 0.0;
    for (const double v : x.values) sum += v * v;
    return std::sqrt(sum);
}
/// Results that are float where storage is of 16 bits.
inline bool is_parameter(const std::string& name) {
    return name == "out.lse" || name == "grad.log_alpha" || name == "grad.theta" || name == "grad.lam";
}

/// The size of what a result's error is compared with: its own; of sums over all that dC and dB make, whose terms cancel (eq. 22 and
/// 23), with that of the terms.
inline double size_of_terms(const Case& in, const Case& want, const std::string& name) {
    const double own = norm(want.tensors.at(name));
    if (name != "grad.log_alpha" && name != "grad.theta" && name != "grad.lam") return own;
    return own + terms(in, want, "C", "grad.C") + terms(in, want, "B", "grad.B");
}

/// The largest error that the 16-bit rule allows: twice that of the formula, and the rounding of the result.
template <class T>
double sixteen_bit_bound(const std::string& name, const Case& formula, const HostTensor& truth) {
    return 2.0 * compare(name, formula.tensors.at(name), truth).relative + (is_parameter(name) ? rounding_floor<float>(truth) : rounding_floor<T>(truth));
}

}  // namespace interstate::test
