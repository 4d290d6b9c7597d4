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
    /// Blocks of the gradient kernel that share channels, and parts of the length axis: two waves on a large GPU.
    static Index mode_blocks(const Shape& s) { return std::max<Index>(ceil_div(s.modes, GradientLayout<T>::modes), 1); }
    static int parts(const Shape& s) {
        const Index blocks = std::max<Index>(ceil_div(s.channels, gradient_channels) * mode_blocks(s), 1);
        return static_cast<int>(std::clamp<Index>(264 / blocks, 1, std::max<Index>(tile_count(s, tile), 1)));
    }

    /// Tables of a system, and scratch of a run.
    struct Tables {
        A* data;
        Tables(Arena& arena, const Shape& s, bool used)
            : data(used ? arena.take<A>(s.channels * ChunkTables<T>(s.modes).size()) : nullptr) {}
    };
    struct Scratch {
        complex<A>* segment_states;
        Scratch(Arena& arena, const Shape& s) {
            const int n = segments(s);
            segment_states = n > 1 ? arena.take<complex<A>>(n * s.states() * s.channels * s.modes) : nullptr;
        }
    };

    template <class P>
    static Status prepare(const cuda& exec, const Options& options, const Params<P>& params, const Shape& s, Half half,
                          SystemMode* modes, const Tables& tables, const Tables& exchanged) {
        return launch(exec, "chunk_tables_kernel", chunk_tables_kernel<T, P>,
                      {dim3(static_cast<unsigned>(s.channels)), dim3(table_parts * max_chunked_modes),
                       sizeof(A) * static_cast<std::size_t>(ChunkTables<T>(s.modes).size())},
                      options.disc, params, half,
                      s.modes, modes, tables.data, exchanged.data);
    }

    static Status run(const cuda& exec, const SystemRun<T>& run, const SystemMode* modes, const Tables& tables,
                      const Scratch& scratch) {
        const Shape& s = run.shape;
        const ChunkTables<T> at(s.modes);
        const std::size_t bytes = sizeof(A) * static_cast<std::size_t>(at.size() + 8 * at.groups) +
                                  sizeof(typename SystemTile<T>::Element) * SystemTile<T>::stride +
                                  TileMover<T, Interleave::by_token>::staging_bytes;
        int G = 0;
        INTERSTATE_RETURN_IF_ERROR(channels_per_block(channels(s), s.channels, bytes, G));
        const int n = segments(s);
        const Index tiles = ceil_div(s.length, tile);
        const int segment_tiles = static_cast<int>(std::max<Index>(ceil_div(tiles, n), 1));
        const Index blocks = ceil_div(s.channels, G) * s.states() * n;
        INTERSTATE_RETURN_IF_ERROR(check_size("u: blocks of a grid", blocks));
        const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(32 * G)),
                                static_cast<std::size_t>(G) * bytes};
        if (n > 1) {
            INTERSTATE_RETURN_IF_ERROR(launch(exec, "chunked_system_kernel, states", chunked_system_kernel<T, Leaves::states>, shape,
                                              run, tables.data, scratch.segment_states, n, segment_tiles, exec.flags));
            const Index threads = s.states() * s.channels * s.modes;
            INTERSTATE_RETURN_IF_ERROR(
                launch(exec, "combine_segments_kernel", combine_segments_kernel<T>,
                       {dim3(static_cast<unsigned>(ceil_div(threads, 128))), dim3(128)}, run.cu, s, run.backwards,
                       run.conjugate, run.initial, modes, n, segment_tiles, scratch.segment_states));
        }
        const auto kernel =
            run.sum || run.addend ? chunked_system_kernel<T, Leaves::half> : chunked_system_kernel<T, Leaves::y>;
        return launch(exec, "chunked_system_kernel", kernel, shape, run, tables.data, scratch.segment_states, n,
                      segment_tiles, exec.flags);
    }

    static Status gradient(const cuda& exec, const SystemRun<T>& run, const View<const T, 3>& dy, const SystemMode* modes,
                           const Tables& tables, const Tables& exchanged, const complex<A>* exchanged_checkpoints,
                           const PartialSums& sums) {
        const Shape& s = run.shape;
        const std::size_t bytes = sizeof(A) * static_cast<std::size_t>(GradientLayout<T>::size) +
                                  2 * (sizeof(typename GradientTile<T>::Element) * GradientTile<T>::stride +
                                       GradientMover<T>::staging_bytes);
        int G = 0;
        INTERSTATE_RETURN_IF_ERROR(channels_per_block(gradient_channels, s.channels, bytes, G));
        const Index blocks = ceil_div(s.channels, G) * mode_blocks(s);
        INTERSTATE_RETURN_IF_ERROR(check_size("u: blocks of a grid", blocks));
        return launch(exec, "chunked_gradient_kernel", chunked_gradient_kernel<T>,
                      {dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(sums.parts)), dim3(static_cast<unsigned>(32 * G)),
                       static_cast<std::size_t>(G) * bytes},
                      run, dy, modes, tables.data, exchanged.data, exchanged_checkpoints, sums);
    }
};

}  // namespace INTERSTATE_KERNELS
}  // namespace s4d::detail::chunks
}  // namespace interstate::inline INTERSTATE_ABI
