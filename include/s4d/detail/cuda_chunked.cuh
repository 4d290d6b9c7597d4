// The chunked method of S4D on the GPU for the driver in cuda_driver.cuh: sizes, and launches of its kernels.
#pragma once

#include <algorithm>

#include <interstate/cuda/launch.cuh>
#include <interstate/workspace.hpp>
#include <s4d/detail/cuda_chunk_gradient.cuh>
#include <s4d/detail/cuda_chunk_system.cuh>

namespace interstate::inline INTERSTATE_ABI {
namespace s4d::detail::chunks {
inline namespace INTERSTATE_KERNELS {

/// Channels of a block: `wanted`, fewer where there are fewer or where shared memory is short (`bytes` a channel).
/// Results do not depend on it.
inline Status channels_per_block(int wanted, Index H, std::size_t bytes, int& G) {
    std::size_t limit = 0;
    INTERSTATE_RETURN_IF_ERROR(shared_memory_limit(limit));
    G = wanted;
    while (G > 1 && (G / 2 >= H || static_cast<std::size_t>(G) * bytes > limit)) G /= 2;
    if (static_cast<std::size_t>(G) * bytes > limit)
        return Status::error(StatusCode::unsupported, "s4d.cuda.chunked: needs %zu bytes of shared memory, the device has %zu",
                             bytes, limit);
    return {};
}

/// The chunked method for the driver in cuda_driver.cuh.
template <class T>
struct Chunked {
    using A = acc_t<T>;
    static constexpr Index tile = tile_tokens<T>;
    static constexpr int lag_count = Form<T>::chunk;

    // Work for every multiprocessor, as a function of the shape alone: the order of sums does not depend on the device.
    static constexpr Index enough_blocks = 100;
    static Index blocks(const Shape& s, int channels) { return s.states() * ceil_div(s.channels, channels); }
    /// Channels of a block: half of them before a recurrence is cut.
    static int channels(const Shape& s) {
        return blocks(s, block_channels<T>) < enough_blocks ? block_channels<T> / 2 : block_channels<T>;
    }
    /// Segments of a recurrence. One of several segments is read twice.
    static int segments(const Shape& s) {
        const Index units = blocks(s, channels(s)), tiles = ceil_div(s.length, tile);
        if (units == 0 || units >= enough_blocks || tiles < 2) return 1;
        return static_cast<int>(std::min(ceil_div(2 * enough_blocks, units), tiles));
    }
    /// Many modes are runs of at most max_run_modes, alike.
    static Index runs(const Shape& s) { return std::max<Index>(ceil_div(s.modes, max_run_modes), 1); }
    static ModeRange modes_of(const Shape& s, Index i) {
        const Index each = runs(s) == 1 ? s.modes : ceil_div(ceil_div(s.modes, runs(s)), octet) * octet;
        return {i * each, std::min(each, s.modes - i * each)};
    }
    /// Run i of the whole.
    static SystemRun<T> run_of(SystemRun<T> run, Index i) {
        run.modes = modes_of(run.shape, i);
        const Index first = run.modes.first;
        if (run.initial) run.initial.data += first * run.initial.stride[2];
        if (run.final) run.final.data += first * run.final.stride[2];
        if (run.checkpoints) run.checkpoints += first;
        return run;
    }
    /// Where the tables of run i begin, in A.
    static Index tables_at(const Shape& s, Index i) {
        Index at = 0;
        for (Index j = 0; j < i; ++j) at += s.channels * ChunkTables<T>(modes_of(s, j).count).size();
        return at;
    }

    /// Blocks of the gradient kernel that share channels, and parts of the length axis: two waves on a large GPU.
    static Index mode_blocks(Index modes) { return std::max<Index>(ceil_div(modes, GradientLayout<T>::modes), 1); }
    static int parts(const Shape& s) {
        const Index blocks = std::max<Index>(ceil_div(s.channels, gradient_channels) * mode_blocks(modes_of(s, 0).count), 1);
        return static_cast<int>(std::clamp<Index>(264 / blocks, 1, std::max<Index>(tile_count(s, tile), 1)));
    }

    /// Tables of a system, and scratch of a run.
    struct Tables {
        A* data;
        Tables(Arena& arena, const Shape& s, bool used)
            : data(used ? arena.take<A>(tables_at(s, runs(s))) : nullptr) {}
    };
    struct Scratch {
        complex<A>* segment_states;
        A* sum;  // (B, H, L), where runs wait for each other and the driver has no such memory
        Scratch(Arena& arena, const Shape& s) {
            const int n = segments(s);
            segment_states = n > 1 ? arena.take<complex<A>>(n * s.states() * s.channels * s.modes) : nullptr;
            sum = runs(s) > 1 && !s.bidirectional ? arena.take<A>(s.batch * s.length * s.channels) : nullptr;
        }
    };

    template <class P>
    static Status prepare(const cuda& exec, const Options& options, const Params<P>& params, const Shape& s, Half half,
                          SystemMode* modes, const Tables& tables, const Tables& exchanged) {
        for (Index i = 0; i < runs(s); ++i) {
            const ModeRange range = modes_of(s, i);
            const Index at = tables_at(s, i);
            INTERSTATE_RETURN_IF_ERROR(launch(
                exec, "chunk_tables_kernel", chunk_tables_kernel<T, P>,
                {dim3(static_cast<unsigned>(s.channels)), dim3(table_parts * max_run_modes),
                 sizeof(A) * static_cast<std::size_t>(ChunkTables<T>(range.count).size())},
                options.disc, params, half, s.modes, range, modes, tables.data + at,
                exchanged.data ? exchanged.data + at : nullptr));
        }
        return {};
    }

    static Status run(const cuda& exec, const SystemRun<T>& whole, const SystemMode* modes, const Tables& tables,
                      const Scratch& scratch) {
        const Shape& s = whole.shape;
        const int n = segments(s);
        const int segment_tiles = static_cast<int>(std::max<Index>(ceil_div(ceil_div(s.length, tile), n), 1));
        const auto launch_run = [&](const char* name, auto kernel, const SystemRun<T>& run, Index i) -> Status {
            const ChunkTables<T> at(run.modes.count);
            const std::size_t bytes = sizeof(A) * static_cast<std::size_t>(at.size() + 8 * at.groups) +
                                      sizeof(typename SystemTile<T>::Element) * SystemTile<T>::stride +
                                      TileMover<T, Interleave::by_token>::staging_bytes;
            int G = 0;
            INTERSTATE_RETURN_IF_ERROR(channels_per_block(channels(s), s.channels, bytes, G));
            const Index blocks = ceil_div(s.channels, G) * s.states() * n;
            INTERSTATE_RETURN_IF_ERROR(check_size("u: blocks of a grid", blocks));
            return launch(exec, name, kernel,
                          {dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * G)),
                           static_cast<std::size_t>(G) * bytes},
                          run, tables.data + tables_at(s, i),
                          scratch.segment_states ? scratch.segment_states + run.modes.first : nullptr, n, segment_tiles);
        };
        if (n > 1) {
            for (Index i = 0; i < runs(s); ++i)
                INTERSTATE_RETURN_IF_ERROR(launch_run("chunked_system_kernel, states",
                                                      chunked_system_kernel<T, Leaves::states>, run_of(whole, i), i));
            const Index threads = s.states() * s.channels * s.modes;
            INTERSTATE_RETURN_IF_ERROR(
                launch(exec, "combine_segments_kernel", combine_segments_kernel<T>,
                       {dim3(static_cast<unsigned>(ceil_div(threads, 128))), dim3(128)}, whole.cu, s, whole.backwards,
                       whole.conjugate, whole.initial, modes, n, segment_tiles, scratch.segment_states));
        }
        // Each run adds to what those before left, and the last one rounds.
        A* const between = whole.sum ? whole.sum : whole.addend ? whole.addend : scratch.sum;
        for (Index i = 0; i < runs(s); ++i) {
            SystemRun<T> run = run_of(whole, i);
            run.addend = i == 0 ? whole.addend : between;
            run.sum = i + 1 == runs(s) ? whole.sum : between;
            const auto kernel =
                run.sum || run.addend ? chunked_system_kernel<T, Leaves::part> : chunked_system_kernel<T, Leaves::y>;
            INTERSTATE_RETURN_IF_ERROR(launch_run("chunked_system_kernel", kernel, run, i));
        }
        return {};
    }

    static Status gradient(const cuda& exec, const SystemRun<T>& whole, const View<const T, 3>& dy, const SystemMode* modes,
                           const Tables& tables, const Tables& exchanged, const complex<A>* exchanged_checkpoints,
                           const PartialSums& sums) {
        const Shape& s = whole.shape;
        const std::size_t bytes = sizeof(A) * static_cast<std::size_t>(GradientLayout<T>::size) +
                                  2 * (sizeof(typename GradientTile<T>::Element) * GradientTile<T>::stride +
                                       GradientMover<T>::staging_bytes);
        int G = 0;
        INTERSTATE_RETURN_IF_ERROR(channels_per_block(gradient_channels, s.channels, bytes, G));
        for (Index i = 0; i < runs(s); ++i) {
            const SystemRun<T> run = run_of(whole, i);
            const Index first = run.modes.first;
            PartialSums sums_of = sums;
            sums_of.modes += first;
            const Index blocks = ceil_div(s.channels, G) * mode_blocks(run.modes.count), at = tables_at(s, i);
            INTERSTATE_RETURN_IF_ERROR(check_size("u: blocks of a grid", blocks));
            INTERSTATE_RETURN_IF_ERROR(
                launch(exec, "chunked_gradient_kernel", chunked_gradient_kernel<T>,
                       {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(sums.parts)),
                        dim3(static_cast<unsigned>(32 * G)), static_cast<std::size_t>(G) * bytes},
                       run, dy, modes + first, tables.data + at, exchanged.data + at, exchanged_checkpoints + first, sums_of));
        }
        return {};
    }
};

}  // namespace INTERSTATE_KERNELS
}  // namespace s4d::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
