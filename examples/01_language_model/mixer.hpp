// What a mixer is: the part of a block in which positions exchange information, and the only part
// that differs between the models this example compares.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <interstate/executor.hpp>
#include <interstate/view.hpp>
#include <interstate/workspace.hpp>

#include "errors.hpp"
#include "layers.hpp"

namespace demo {

using interstate::view;

/// Sizes that every mixer is built from.
struct MixerConfig {
    Index width = 0;        // channels of the residual stream
    Index heads = 0;        // for mixers that have heads
    Index modes = 0;        // for mixers that have a state: complex modes a channel
    double out_gain = 1.0;  // scale of the initial output projection
};

/// How the rows of a matrix are to be read: `sequences` of `length` positions below each other.
struct Batch {
    Index sequences = 0;
    Index length = 0;
    Index judged = length;  // last positions of each sequence, whose predictions the loss counts
    Index rows() const { return sequences * length; }
};

/// Queries and keys as (sequences, length, heads, d), whose products are the scores.
struct Scores {
    interstate::View<const float, 4> queries, keys;
};

/// A mixer owns its projections in and out; (rows, width) goes in and (rows, width) comes out.
class Mixer {
  public:
    virtual ~Mixer() = default;

    virtual void collect(Parameters& all) = 0;

    /// `train` says that backward() will follow; x stays alive and unchanged until then.
    virtual void forward(const Matrix& x, Batch batch, bool train, Matrix& y) = 0;
    virtual void backward(const Matrix& dy, Matrix& dx) = 0;
    /// Of the last forward(); null views where scores are made in another way, or there are none.
    virtual Scores scores() { return {}; }

    /// Decoding one sequence from its start, up to `capacity` positions, one row at a time.
    virtual void begin_decode(Index capacity) = 0;
    virtual void step(const Row& x, Row& y) = 0;
    /// Bytes that must be kept between tokens once `position` of them have been read.
    virtual std::size_t decode_state_bytes(Index position) const = 0;
};

/// Every mixer's file defines one.
using MakeMixer = std::unique_ptr<Mixer>(const std::string& name, const MixerConfig&, Random&);

/// One line of the registry in mixers/registry.cpp.
struct MixerEntry {
    std::string name;
    std::string description;
    bool by_default;  // part of a run without --mixer and --all
    std::function<MakeMixer> make;
    std::string linear_form{};  // the mixer that has the same parameters and no softmax, if there is one
};

/// Memory lent to library calls, which never allocate. Grows to the largest request and stays.
class Scratch {
  public:
    interstate::Workspace workspace(std::size_t bytes) { return {grow(bytes), bytes}; }
    interstate::Saved saved(std::size_t bytes) { return {grow(bytes), bytes}; }

  private:
    void* grow(std::size_t bytes) {
        if (memory_.size() < bytes) memory_.resize(bytes);
        return memory_.data();
    }
    std::vector<std::byte> memory_;
};

/// How the library runs. It could use all threads itself, but train.hpp already has one model at work
/// on each of them.
inline constexpr interstate::cpu executor{.threads = 1};

}  // namespace demo
