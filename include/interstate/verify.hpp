// Verification: run any operator on any executor from named host tensors, and compare any two runs.
//
// This is a tool, not a kernel: it allocates, copies to where an executor can reach, and throws only
// what allocation throws. The golden cases, tools/replay and the tests all stand on it.
//
//     auto report = verify<s4d::Operator>(on<float>(cpu{}), on<double>(reference{}), options, in, upstream);
//
// Either side may also be a callable (const Case&, Case& results) -> Status, for example one that runs
// the user's own kernel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <interstate/executor.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

namespace interstate::inline INTERSTATE_ABI {

/// A tensor on the host, float64 and contiguous. A complex tensor has a last axis of 2 (re, im).
struct HostTensor {
    std::vector<Index> extent;
    std::vector<double> values;
};

/// Named tensors and options of one call. Inputs have their own names, upstream gradients are
/// "dout.X", results "out.X" and "grad.X": the names of the golden cases.
struct Case {
    std::map<std::string, std::string> options;
    std::map<std::string, HostTensor> tensors;
};

/// Memory where an executor can reach it. Other executors specialise it (see interstate/verify.cuh).
template <class Exec>
struct Memory {
    static void* allocate(std::size_t bytes) {
        void* p = ::operator new(bytes, std::align_val_t{64});
        // Scratch is handed out as garbage on purpose, the same garbage every time.
        return std::memset(p, 0xff, bytes);
    }
    static void release(void* p) { ::operator delete(p, std::align_val_t{64}); }
    static Status to_executor(const Exec&, void* destination, const void* source, std::size_t bytes) {
        if (bytes) std::memcpy(destination, source, bytes);
        return {};
    }
    static Status to_host(const Exec&, void* destination, const void* source, std::size_t bytes) {
        if (bytes) std::memcpy(destination, source, bytes);
        return {};
    }
    static Status finish(const Exec&) { return {}; }
};

/// How run_case lays tensors out, to exercise strides: row-major, axes reversed in memory, or rows
/// with a gap of unused elements between them (which must come back untouched).
enum class Layout : std::uint8_t { contiguous, reversed, padded };

namespace detail {

template <class T>
inline constexpr bool is_complex = false;
template <class T>
inline constexpr bool is_complex<complex<T>> = true;

/// Element of a kernel's tensor from and to float64 scalars: `width` of them.
template <class E>
struct Element {
    static constexpr Index width = 1;
    static E from(const double* p) { return E(p[0]); }
    static void to(const E& e, double* p) { p[0] = static_cast<double>(e); }
};
template <class T>
struct Element<complex<T>> {
    static constexpr Index width = 2;
    static complex<T> from(const double* p) { return {static_cast<T>(p[0]), static_cast<T>(p[1])}; }
    static void to(const complex<T>& e, double* p) {
        p[0] = static_cast<double>(e.re);
        p[1] = static_cast<double>(e.im);
    }
};

/// Largest extent of a tensor, and largest product of the others beside an extent of zero: a few bytes
/// of a file must not be able to ask for sizes whose products overflow or whose loops never end.
inline constexpr Index largest_extent = Index{1} << 28;

/// The tensors of one run, in the executor's memory.
template <class Exec>
class Tensors {
  public:
    Tensors(const Exec& exec, Layout layout, std::size_t memory_limit)
        : exec_(exec), layout_(layout), left_(static_cast<double>(memory_limit)) {}

    /// Memory of the executor, null for zero bytes.
    Status scratch(const char* name, std::size_t bytes, void*& p) {
        INTERSTATE_RETURN_IF_ERROR(claim(name, static_cast<double>(bytes)));
        p = bytes ? block(bytes) : nullptr;
        return {};
    }

    /// Copies a host tensor in; its extents become the view's.
    template <class T, int Rank>
    Status upload(const std::string& name, const HostTensor& host, View<const T, Rank>& v) {
        constexpr Index width = Element<T>::width;
        constexpr std::size_t axes = Rank + (width == 2 ? 1 : 0);
        if (host.extent.size() != axes || (width == 2 && host.extent.back() != 2))
            return Status::error(StatusCode::invalid_argument, "%s: has %zu axes, must have %zu%s",
                                 name.c_str(), host.extent.size(), axes,
                                 width == 2 ? ", the last of 2 (re, im)" : "");
        double elements = 1.0, hidden = 1.0;
        for (const Index e : host.extent) {
            elements *= static_cast<double>(e);
            if (e != 0) hidden *= static_cast<double>(e);
            if (e < 0 || e > largest_extent)
                return Status::error(StatusCode::invalid_argument,
                                     "%s: has an extent of %lld, must be from 0 to %lld", name.c_str(),
                                     static_cast<long long>(e), static_cast<long long>(largest_extent));
        }
        if (elements == 0.0 && hidden > static_cast<double>(largest_extent))
            return Status::error(StatusCode::invalid_argument,
                                 "%s: is empty, its other extents have product %.3g, must be at most %lld",
                                 name.c_str(), hidden, static_cast<long long>(largest_extent));
        if (elements != static_cast<double>(host.values.size()))
            return Status::error(StatusCode::invalid_argument, "%s: has %zu values, its extents ask for %.0f",
                                 name.c_str(), host.values.size(), elements);
        if constexpr (std::is_integral_v<T>)
            for (std::size_t i = 0; i < host.values.size(); ++i) {
                constexpr double low = std::numeric_limits<T>::min(), high = std::numeric_limits<T>::max();
                const double x = host.values[i];
                if (!(x >= low && x <= high && x == std::floor(x)))
                    return Status::error(StatusCode::invalid_argument,
                                         "%s: element %zu is %.17g, must be an integer of %zu bits",
                                         name.c_str(), i, x, 8 * sizeof(T));
            }
        INTERSTATE_RETURN_IF_ERROR((claim_tensor<T, Rank>(name.c_str(), host.extent.data())));
        View<T, Rank> w;
        std::vector<T> staging = lay_out(w, host.extent.data());
        std::size_t at = 0;
        for_each_offset(w, [&](Index offset) {
            staging[static_cast<std::size_t>(offset)] = Element<T>::from(host.values.data() + at);
            at += static_cast<std::size_t>(width);
        });
        w.data = static_cast<T*>(block(staging.size() * sizeof(T)));
        v = w;
        return Memory<Exec>::to_executor(exec_, w.data, staging.data(), staging.size() * sizeof(T));
    }

    /// Makes a tensor to be written, every element NaN until it is.
    template <class T, int Rank>
    Status allocate(const char* name, View<T, Rank>& v, const Index (&extent)[Rank]) {
        INTERSTATE_RETURN_IF_ERROR((claim_tensor<T, Rank>(name, extent)));
        std::vector<T> staging = lay_out(v, extent);
        v.data = static_cast<T*>(block(staging.size() * sizeof(T)));
        return Memory<Exec>::to_executor(exec_, v.data, staging.data(), staging.size() * sizeof(T));
    }

    /// Copies a written tensor out and checks that nothing was written between its elements.
    template <class T, int Rank>
    Status download(const char* name, const View<T, Rank>& v, HostTensor& host) {
        View<T, Rank> w = v;
        std::vector<T> staging = lay_out(w, v.extent);
        const std::vector<T> poison = staging;
        INTERSTATE_RETURN_IF_ERROR(
            Memory<Exec>::to_host(exec_, staging.data(), v.data, staging.size() * sizeof(T)));
        constexpr Index width = Element<T>::width;
        host.extent.assign(v.extent, v.extent + Rank);
        if (width == 2) host.extent.push_back(2);
        host.values.resize(static_cast<std::size_t>(v.size() * width));
        std::vector<bool> used(staging.size(), false);
        std::size_t at = 0;
        for_each_offset(w, [&](Index offset) {
            Element<T>::to(staging[static_cast<std::size_t>(offset)], host.values.data() + at);
            at += static_cast<std::size_t>(width);
            used[static_cast<std::size_t>(offset)] = true;
        });
        for (std::size_t i = 0; i < staging.size(); ++i)
            if (!used[i] && std::memcmp(&staging[i], &poison[i], sizeof(T)) != 0)
                return Status::error(StatusCode::invalid_argument,
                                     "%s: memory between its elements was written", name);
        return {};
    }

  private:
    /// Sets extents and strides of the layout; returns storage for it filled with NaN.
    template <class T, int Rank>
    std::vector<T> lay_out(View<T, Rank>& v, const Index* extent) const {
        Index step = 1;
        for (int i = 0; i < Rank; ++i) {
            const int a = layout_ == Layout::reversed ? i : Rank - 1 - i;
            v.extent[a] = extent[a];
            v.stride[a] = step;
            step *= std::max<Index>(extent[a], 1);  // an empty tensor is laid out like one row
            // cu_seqlens and other vectors have no rows, so no gap.
            if (layout_ == Layout::padded && i == 0 && Rank > 1) step += gap;
        }
        constexpr double quiet = std::numeric_limits<double>::quiet_NaN();
        const double nan[2] = {quiet, quiet};
        T filler{};
        if constexpr (!std::is_integral_v<T>) filler = Element<T>::from(nan);
        return std::vector<T>(v.size() == 0 ? 0 : static_cast<std::size_t>(step), filler);
    }

    /// Counts memory against the limit, in floating point because a product of extents may overflow.
    Status claim(const char* name, double bytes) {
        if (bytes > left_)
            return Status::error(StatusCode::unsupported, "%s: needs %.3g bytes of memory, %.3g are left",
                                 name, bytes, left_);
        left_ -= bytes;
        return {};
    }
    template <class T, int Rank>
    Status claim_tensor(const char* name, const Index* extent) {
        double elements = 1.0;
        for (int a = 0; a < Rank; ++a) elements *= static_cast<double>(extent[a]);
        const double row = static_cast<double>(extent[Rank - 1]);
        if (layout_ == Layout::padded && elements > 0.0) elements *= (row + gap) / row;
        return claim(name, elements * sizeof(T));
    }

    void* block(std::size_t bytes) {
        blocks_.emplace_back(nullptr, &Memory<Exec>::release);
        blocks_.back().reset(Memory<Exec>::allocate(bytes ? bytes : 1));
        return blocks_.back().get();
    }

    template <class T, int Rank, class F>
    static void for_each_offset(const View<T, Rank>& v, F&& f) {
        const Index n = v.size();
        for (Index i = 0; i < n; ++i) {
            Index rest = i, offset = 0;
            for (int a = Rank - 1; a >= 0; --a) {
                offset += rest % v.extent[a] * v.stride[a];
                rest /= v.extent[a];
            }
            f(offset);
        }
    }

    static constexpr Index gap = 3;

    const Exec& exec_;
    Layout layout_;
    double left_;
    std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
};

/// Fills the views of an input struct from the tensors of a case that are named prefix + field.
template <class Exec>
struct Upload {
    Tensors<Exec>& memory;
    const Case& c;
    const char* prefix;
    bool all_required;  // whether lacking a tensor that is not optional is an error
    bool known_shape;   // whether the extents asked for hold, or are what these tensors will say
    std::vector<std::string>* seen;
    Status status;

    template <class T, int Rank>
    void operator()(const char* name, View<const T, Rank>& v, const Index (&want)[Rank], Need need) {
        const std::string full = std::string(prefix) + name;
        const auto found = c.tensors.find(full);
        if (!status.ok()) return;
        if (found == c.tensors.end()) {
            if (need == Need::required && all_required)
                status = Status::error(StatusCode::invalid_argument, "%s: is missing", full.c_str());
            return;
        }
        seen->push_back(full);
        status = memory.upload(full, found->second, v);
        for (int a = 0; a < Rank && status.ok() && known_shape; ++a)
            if (v.extent[a] != want[a])
                status = Status::error(StatusCode::invalid_argument,
                                       "%s: extent of axis %d is %lld, must be %lld", full.c_str(), a,
                                       static_cast<long long>(v.extent[a]), static_cast<long long>(want[a]));
    }
};

/// Allocates the views of an output struct whose name passes a filter.
template <class Exec, class Filter>
struct Allocate {
    Tensors<Exec>& memory;
    Filter wanted;
    Status status;
    template <class T, int Rank>
    void operator()(const char* name, View<T, Rank>& v, const Index (&extent)[Rank], Need) {
        if (status.ok() && wanted(name)) status = memory.allocate(name, v, extent);
    }
};

template <class Exec>
struct Download {
    Tensors<Exec>& memory;
    const char* prefix;
    Case& results;
    Status status;
    template <class T, int Rank>
    void operator()(const char* name, View<T, Rank>& v, const Index (&)[Rank], Need) {
        if (status.ok() && v) status = memory.download(name, v, results.tensors[std::string(prefix) + name]);
    }
};

/// Whether the operator has a secondary output under these options (attention's lse with softmax).
template <class Op, class Options>
bool has_output(const Options& options, const char* name) {
    if constexpr (requires { Op::has_output(options, name); })
        return Op::has_output(options, name);
    else
        return true;
}

}  // namespace detail

struct RunOptions {
    Layout layout = Layout::contiguous;
    bool backward = true;  // also run backward where the case carries upstream gradients
    std::size_t memory_limit = std::numeric_limits<std::size_t>::max();  // of the executor's memory, in bytes
};

/// Options of a case as the operator's struct; "op" is skipped.
template <class Op>
Status parse_options(const Case& c, typename Op::Options& options) {
    for (const auto& [name, value] : c.options)
        if (name != "op") INTERSTATE_RETURN_IF_ERROR(set_option(options, name, value));
    return {};
}

/// Runs a case in storage dtype T with parameters of P on an executor: forward always, backward
/// if the case carries "dout." tensors. Every output and gradient lands in `results`.
template <class Op, class T, class P, class Exec>
Status run_case(const Exec& exec, const typename Op::Options& options, const Case& c, Case& results,
                RunOptions run = {}) {
    detail::Tensors<Exec> memory(exec, run.layout, run.memory_limit);
    std::vector<std::string> seen;

    typename Op::template Inputs<T, P> in{};
    typename Op::template Upstream<T> upstream{};
    detail::Upload<Exec> upload{memory, c, "", true, false, &seen, {}};
    visit(in, decltype(shape_of(in)){}, upload);
    INTERSTATE_RETURN_IF_ERROR(upload.status);
    const auto shape = shape_of(in);
    INTERSTATE_RETURN_IF_ERROR(Op::validate_inputs(options, in));
    bool with_backward = false;
    for (const auto& [name, tensor] : c.tensors) with_backward = with_backward || name.starts_with("dout.");
    with_backward = with_backward && run.backward;
    detail::Upload<Exec> upload_upstream{memory, c, "dout.", with_backward, true, &seen, {}};
    visit(upstream, shape, upload_upstream);
    INTERSTATE_RETURN_IF_ERROR(upload_upstream.status);
    for (const auto& [name, tensor] : c.tensors) {
        if (name.starts_with("out.") || name.starts_with("grad.")) continue;
        bool known = false;
        for (const std::string& s : seen) known = known || s == name;
        if (!known)
            return Status::error(StatusCode::invalid_argument, "tensor %s: %s has no input of that name",
                                 name.c_str(), Op::name);
    }

    typename Op::template Outputs<T> out{};
    const auto wanted = [&](const char* name) { return detail::has_output<Op>(options, name); };
    detail::Allocate<Exec, decltype(wanted)> allocate{memory, wanted, {}};
    visit(out, shape, allocate);
    INTERSTATE_RETURN_IF_ERROR(allocate.status);

    Saved saved{nullptr, with_backward ? saved_size(exec, options, shape) : 0};
    INTERSTATE_RETURN_IF_ERROR(memory.scratch("saved", saved.size, saved.data));
    Workspace forward_ws{nullptr, workspace_size(exec, options, shape, pass::forward)};
    INTERSTATE_RETURN_IF_ERROR(memory.scratch("workspace", forward_ws.size, forward_ws.data));
    INTERSTATE_RETURN_IF_ERROR(forward(exec, options, in, out, saved, forward_ws));
    INTERSTATE_RETURN_IF_ERROR(Memory<Exec>::finish(exec));
    detail::Download<Exec> download{memory, "out.", results, {}};
    visit(out, shape, download);
    INTERSTATE_RETURN_IF_ERROR(download.status);

    if constexpr (Op::template has_backward<Exec>) {
        if (!with_backward) return {};
        typename Op::template Grads<T, P> grads{};
        // Gradients of optional inputs that the case lacks are not asked for.
        const auto present = [&](const char* name) { return c.tensors.contains(name); };
        detail::Allocate<Exec, decltype(present)> allocate_grads{memory, present, {}};
        visit(grads, shape, allocate_grads);
        INTERSTATE_RETURN_IF_ERROR(allocate_grads.status);
        Workspace backward_ws{nullptr, workspace_size(exec, options, shape, pass::backward)};
        INTERSTATE_RETURN_IF_ERROR(memory.scratch("workspace", backward_ws.size, backward_ws.data));
        INTERSTATE_RETURN_IF_ERROR(backward(exec, options, in, out, saved, upstream, grads, backward_ws));
        INTERSTATE_RETURN_IF_ERROR(Memory<Exec>::finish(exec));
        detail::Download<Exec> download_grads{memory, "grad.", results, {}};
        visit(grads, shape, download_grads);
        return download_grads.status;
    } else if (with_backward) {
        return Status::error(StatusCode::unsupported, "%s: this executor has no backward", Op::name);
    }
    return {};
}

/// How far one tensor is from another: ||got - want|| / ||want||, absolute where want is zero.
struct TensorError {
    std::string name;
    double relative = 0.0;
    double largest = 0.0;  // largest absolute difference of an element
    bool finite = true;    // false if either holds NaN or Inf where the other does not agree
};

struct Report {
    Status status;  // of the runs; the errors are empty where it is not ok
    std::vector<TensorError> tensors;

    /// Every tensor within the bound; a failed run, or one that compared nothing, is not.
    bool within(double relative) const {
        bool good = status.ok() && !tensors.empty();
        for (const TensorError& e : tensors) good = good && e.finite && e.relative <= relative;
        return good;
    }
    /// Infinite where the runs failed or nothing was compared.
    double worst() const {
        double w = status.ok() && !tensors.empty() ? 0.0 : std::numeric_limits<double>::infinity();
        for (const TensorError& e : tensors)
            w = e.finite ? std::max(w, e.relative) : std::numeric_limits<double>::infinity();
        return w;
    }
};

/// Compares two tensors. NaN and Inf always fail, but for the lse of a row that reads nothing, -inf on
/// both sides.
inline TensorError compare(const std::string& name, const HostTensor& got, const HostTensor& want) {
    const bool same_shape = got.extent == want.extent && got.values.size() == want.values.size();
    TensorError e{name, 0.0, 0.0, same_shape};
    if (!e.finite) return e;
    double difference = 0.0, norm = 0.0;
    for (std::size_t i = 0; i < want.values.size(); ++i) {
        const double g = got.values[i], w = want.values[i];
        if (g == w && std::isinf(w) && w < 0.0 && name.ends_with("lse")) continue;
        if (!std::isfinite(g) || !std::isfinite(w)) {
            e.finite = false;
            continue;
        }
        difference += (g - w) * (g - w);
        norm += w * w;
        e.largest = std::max(e.largest, std::abs(g - w));
    }
    e.relative = std::sqrt(difference) / (norm > 0.0 ? std::sqrt(norm) : 1.0);
    if (std::isnan(e.relative)) e.relative = std::numeric_limits<double>::infinity();  // both sums overflowed
    return e;
}

/// Compares the "out." and "grad." tensors of two runs; one that only `want` has counts as missing.
inline std::vector<TensorError> compare(const Case& got, const Case& want) {
    std::vector<TensorError> errors;
    for (const auto& [name, tensor] : want.tensors) {
        if (!name.starts_with("out.") && !name.starts_with("grad.")) continue;
        const auto found = got.tensors.find(name);
        if (found == got.tensors.end())
            errors.push_back({name + " (missing)", 0.0, 0.0, false});
        else
            errors.push_back(compare(name, found->second, tensor));
    }
    return errors;
}

/// One side of `verify`: an executor, the dtype it computes in and the dtype of the parameters.
template <class T, class P, class Exec>
struct Side {
    Exec exec;
};
template <class T, class P = param_t<T>, class Exec>
Side<T, P, Exec> on(Exec exec) {
    return {exec};
}

/// Runs one case on two sides, each a Side or a callable (const Case&, Case& results) -> Status, and
/// reports how far `got` is from `want`.
template <class Op, class Got, class Want>
Report verify_case(const Got& got, const Want& want, const typename Op::Options& options, const Case& c) {
    const auto run = [&]<class S>(const S& side, Case& results) -> Status {
        if constexpr (requires { side(c, results); })
            return side(c, results);
        else
            return [&]<class T, class P, class Exec>(const Side<T, P, Exec>& s) {
                return run_case<Op, T, P>(s.exec, options, c, results);
            }(side);
    };
    Report report;
    Case got_results, want_results;
    report.status = run(got, got_results);
    if (report.status.ok()) report.status = run(want, want_results);
    if (!report.status.ok()) return report;
    report.tensors = compare(got_results, want_results);
    for (const auto& [name, tensor] : got_results.tensors)
        if (!want_results.tensors.contains(name)) report.tensors.push_back({name + " (unexpected)", 0.0, 0.0, false});
    return report;
}

namespace detail {
/// Copies the views of a struct, in the memory of `Exec`, into a case.
template <class Exec>
struct Collect {
    const Exec& exec;
    const char* prefix;
    Case& c;
    Status status;
    template <class T, int Rank>
    void operator()(const char* name, View<T, Rank>& v, const Index (&want)[Rank], Need need) {
        using E = std::remove_const_t<T>;
        if (!status.ok()) return;
        for (int a = 0; a < Rank; ++a)
            if (v.extent[a] < 0)
                status = Status::error(StatusCode::invalid_argument,
                                       "%s: extent of axis %d is %lld, must not be negative", name, a,
                                       static_cast<long long>(v.extent[a]));
        // A tensor without elements may be null and still be there; one with elements may not.
        const bool empty = v.size() == 0 && need == Need::required && std::equal(want, want + Rank, v.extent);
        if (!status.ok() || (!v && !empty)) return;
        // The smallest block of memory that holds every element, whatever the strides.
        Index low = 0, high = 0;
        for (int a = 0; a < Rank; ++a)
            (v.stride[a] < 0 ? low : high) += v.extent[a] > 0 ? (v.extent[a] - 1) * v.stride[a] : 0;
        HostTensor& host = c.tensors[std::string(prefix) + name];
        host.extent.assign(v.extent, v.extent + Rank);
        constexpr Index width = Element<E>::width;
        if (width == 2) host.extent.push_back(2);
        const Index n = v.size();
        host.values.resize(static_cast<std::size_t>(n * width));
        if (n == 0) return;
        std::vector<E> staging(static_cast<std::size_t>(high - low + 1));
        status = Memory<Exec>::to_host(exec, staging.data(), v.data + low, staging.size() * sizeof(E));
        for (Index i = 0; i < n; ++i) {
            Index rest = i, offset = -low;
            for (int a = Rank - 1; a >= 0; --a) {
                offset += rest % v.extent[a] * v.stride[a];
                rest /= v.extent[a];
            }
            Element<E>::to(staging[static_cast<std::size_t>(offset)],
                           host.values.data() + static_cast<std::size_t>(i * width));
        }
    }
};
}  // namespace detail

/// A case from the views of a call; `where` is the executor whose memory they point to. A null
/// `upstream` compares forward only.
template <class Exec, class Inputs, class Upstream>
Status collect_case(const Exec& where, Inputs in, const Upstream* upstream, Case& c) {
    const auto shape = shape_of(in);
    detail::Collect<Exec> collect{where, "", c, {}};
    visit(in, shape, collect);
    if (!upstream || !collect.status.ok()) return collect.status;
    Upstream up = *upstream;
    detail::Collect<Exec> collect_upstream{where, "dout.", c, {}};
    visit(up, shape, collect_upstream);
    return collect_upstream.status;
}

/// verify(got, want, options, inputs, upstream): the same inputs through two executors, in host memory.
template <class Op, class Got, class Want, class Inputs, class Upstream>
Report verify(const Got& got, const Want& want, const typename Op::Options& options, const Inputs& in,
              const Upstream& upstream) {
    Case c;
    Report report;
    report.status = collect_case(cpu{}, in, &upstream, c);
    return report.status.ok() ? verify_case<Op>(got, want, options, c) : report;
}

/// One line a tensor, for people.
inline std::string to_string(const Report& report) {
    if (!report.status.ok()) return std::string("failed: ") + report.status.message() + "\n";
    std::string text;
    char line[160];
    for (const TensorError& e : report.tensors) {
        std::snprintf(line, sizeof line, "%-24s relative %.3e  largest %.3e%s\n", e.name.c_str(), e.relative,
                      e.largest, e.finite ? "" : "  NOT FINITE OR OF ANOTHER SHAPE");
        text += line;
    }
    return text;
}

}  // namespace interstate::inline INTERSTATE_ABI
