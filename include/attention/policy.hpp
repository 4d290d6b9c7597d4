// How another operator plugs into the CPU mainloop of attention: a policy. docs/ops/attention.md, "Policies".
//
// A policy is a small object of views and numbers (it is passed by value to leaf bodies) whose three flags say which
// hooks it has. What a flag turns off is not compiled: with Plain the mainloop is attention and nothing else.
#pragma once

#include <attention/params.hpp>
#include <interstate/cpu/simd.hpp>

namespace interstate::inline INTERSTATE_ABI {
namespace attention {

/// The scores that the lanes of one vector hold. Positions count on the key axis of their sequence.
struct Cells {
    Index batch, head;  // of the query
    Index first_key;    // row of the key tensors where the sequence begins
    Index query, key;   // positions of lane 0
    bool query_lanes;   // lane i is (query + i, key); otherwise it is (query, key + i)

    /// query - key of each lane. Exact below 2^24 in float.
    template <class V>
    INTERSTATE_INLINE V distance() const {
        V lanes{};
        INTERSTATE_UNROLL
        for (int i = 0; i < V::lanes; ++i) lanes.v[i] = static_cast<std::remove_cvref_t<decltype(lanes.v[0])>>(i);
        const V first = simd::broadcast<V>(query - key);
        return query_lanes ? first + lanes : first - lanes;
    }
};

/// Attention itself, and the list of what a policy may have. Rows are counted in the tensors; A is the accumulator.
struct Plain {
    /// score += score_term(cells), after the scale and before the mask. Leaf code: always inline, on simd.hpp alone.
    ///     template <class V> INTERSTATE_INLINE V score_term(const Cells& cells) const;
    static constexpr bool adds_term = false;

    /// Queries are changed as they are loaded: rows of dh numbers, `ld` apart and without the scale, become others in
    /// place; and their gradients, once complete, go back the same way. Each query row's gradient comes exactly once,
    /// in no order that may matter.
    ///     void transform(Isa, Index b, Index h, Index row, Index count, A* q, Index ld) const;
    ///     void transform_gradient(Isa, Index b, Index h, Index row, Index count, A* dq, Index ld) const;
    static constexpr bool changes_query = false;

    /// score[i,j] += exp(g[i] - g[j]) C[i].B[j] with ds channels, g never increasing along a sequence (causal only).
    /// A load writes ds numbers a row; g is asked for by rows of the key axis. dC[i] and dB[j] come complete, each row
    /// that belongs to a sequence exactly once.
    ///     Index channel_dim() const;
    ///     void load_c(Isa, Index b, Index h, Index row, Index count, A* to, Index ld) const;
    ///     void load_b(Isa, Index b, Index kv, Index row, Index count, A* to, Index ld) const;
    ///     void decay(Index b, Index kv, Index row, Index count, double* g) const;
    ///     void store_dc(Isa, Index b, Index h, Index row, Index count, const A* from, Index ld) const;
    ///     void store_db(Isa, Index b, Index kv, Index row, Index count, const A* from, Index ld) const;
    static constexpr bool has_channels = false;
};

}  // namespace attention
}  // namespace interstate::inline INTERSTATE_ABI
