// CUDA graphs in tests: what a graph records must do, replayed on other inputs, what plain calls do, to the bit.
#pragma once

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include <interstate/verify.cuh>

#include "cuda_main.cuh"

namespace interstate::test {

/// What record(exec) puts on a stream, captured and not run.
class Graph {
  public:
    template <class Record>
    Graph(Checks& checks, const char* what, Record&& record) : checks_(checks), what_(what) {
        expect(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
        // Global: calls that allocate or synchronise fail, on any thread.
        expect(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal));
        const Status s = record(interstate::cuda{stream_});
        checks.expect(s.ok(), what, s.message());
        cudaGraph_t graph = nullptr;
        expect(cudaStreamEndCapture(stream_, &graph));
        expect(cudaGraphInstantiate(&executable_, graph, 0));
        expect(cudaGraphDestroy(graph));
    }
    Graph(const Graph&) = delete;
    Graph& operator=(const Graph&) = delete;
    ~Graph() {
        cudaGraphExecDestroy(executable_);
        cudaStreamDestroy(stream_);
    }
    void replay() {
        expect(cudaGraphLaunch(executable_, stream_));
        expect(cudaStreamSynchronize(stream_));
    }

  private:
    void expect(cudaError_t e) { checks_.expect(e == cudaSuccess, what_, cudaGetErrorString(e)); }

    Checks& checks_;
    const char* what_;
    cudaStream_t stream_ = nullptr;
    cudaGraphExec_t executable_ = nullptr;
};

/// Writes a case over tensors that another one of its shape was uploaded to.
struct Refill {
    const Case& c;
    const char* prefix;
    Status status;
    template <class T, int Rank>
    void operator()(const char* name, View<const T, Rank>& v, const Index (&)[Rank], Need) {
        using E = interstate::detail::Element<T>;
        if (!status.ok() || !v) return;
        const auto& values = c.tensors.at(std::string(prefix) + name).values;
        std::vector<T> staged;
        for (std::size_t i = 0; i < values.size(); i += E::width) staged.push_back(E::from(values.data() + i));
        status = Memory<interstate::cuda>::to_executor({}, const_cast<T*>(v.data), staged.data(), staged.size() * sizeof(T));
    }
};

/// Forward and backward in a graph give, for what its inputs hold when it is replayed, the bits of plain calls. The
/// cases have the same sizes, every tensor of the other's, and upstream gradients; parameters are float.
template <class Op, class T>
void in_a_graph(Checks& checks, const typename Op::Options& options, const Case& first, const Case& second) {
    const interstate::cuda exec;
    const Case* const cases[2] = {&first, &second};
    Case want[2];
    for (int i = 0; i < 2; ++i) {
        const Status s = run_case<Op, T, float>(exec, options, *cases[i], want[i]);
        checks.expect(s.ok(), "graph", s.message());
    }

    interstate::detail::Tensors<interstate::cuda> memory(exec, Layout::contiguous, std::numeric_limits<std::size_t>::max());
    std::vector<std::string> seen;
    typename Op::template Inputs<T, float> in{};
    typename Op::template Upstream<T> upstream{};
    interstate::detail::Upload<interstate::cuda> upload{memory, first, "", true, false, &seen, {}};
    visit(in, decltype(shape_of(in)){}, upload);
    const auto shape = shape_of(in);
    interstate::detail::Upload<interstate::cuda> upload_upstream{memory, first, "dout.", true, false, &seen, {}};
    visit(upstream, shape, upload_upstream);
    typename Op::template Outputs<T> out{};
    typename Op::template Grads<T, float> grads{};
    const auto present = [&](const char* name) { return first.tensors.contains(name); };
    const auto wanted = [&](const char* name) { return interstate::detail::has_output<Op>(options, name); };
    interstate::detail::Allocate<interstate::cuda, decltype(wanted)> allocate{memory, wanted, {}};
    visit(out, shape, allocate);
    interstate::detail::Allocate<interstate::cuda, decltype(present)> allocate_grads{memory, present, {}};
    visit(grads, shape, allocate_grads);
    Saved saved{nullptr, saved_size(exec, options, shape)};
    Workspace ws{nullptr, std::max(workspace_size(exec, options, shape, pass::forward),
                                   workspace_size(exec, options, shape, pass::backward))};
    const Status scratch[] = {upload.status, upload_upstream.status, allocate.status, allocate_grads.status,
                              memory.scratch("saved", saved.size, saved.data), memory.scratch("workspace", ws.size, ws.data)};
    for (const Status& made : scratch) checks.expect(made.ok(), "graph", made.message());

    Graph graph(checks, "graph", [&](const interstate::cuda& recorded) -> Status {
        INTERSTATE_RETURN_IF_ERROR(forward(recorded, options, in, out, saved, ws));
        return backward(recorded, options, in, out, saved, upstream, grads, ws);
    });
    for (int i = 0; i < 2; ++i) {
        Refill refill{*cases[i], "", {}}, refill_upstream{*cases[i], "dout.", {}};
        visit(in, shape, refill);
        visit(upstream, shape, refill_upstream);
        graph.replay();
        Case got;
        interstate::detail::Download<interstate::cuda> download{memory, "out.", got, {}}, download_grads{memory, "grad.", got, {}};
        visit(out, shape, download);
        visit(grads, shape, download_grads);
        for (const Status& moved : {refill.status, refill_upstream.status, download.status, download_grads.status})
            checks.expect(moved.ok(), "graph", moved.message());
        for (const auto& [name, tensor] : want[i].tensors)
            checks.expect(tensor.values == got.tensors[name].values, name.c_str(), "replayed, must be the bits of plain calls");
    }
}

}  // namespace interstate::test
