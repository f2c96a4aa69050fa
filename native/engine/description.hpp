// The network as the engine receives it: groups of nodes and edges in topological order, extents resolved and checked
// by the graph layer above.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "base/extent.hpp"
#include "base/pool.hpp"
#include "kernels/kernels.hpp"
#include "tasks/concurrent_sum.hpp"
#include "tasks/ready_queue.hpp"

namespace znn {

enum class EdgeKind { conv, max_filter, max_pool, dropout, crop, identity };
enum class Method { direct, fft, tiled, fused };  // fft: bundle 1 only; tiled and fused: bundles only

struct NodeGroupDescription {
    std::string name;
    int maps = 1;
    Extent extent;
    bool input = false;
    bool output = false;
    bool bias = false;
    kernels::Transfer transfer = kernels::Transfer::linear;
    float rate = 1;  // multiplier of the learning rate for the biases
};

struct EdgeGroupDescription {
    std::string name;
    EdgeKind kind = EdgeKind::conv;
    int source = 0, target = 0;     // indices of node groups, source < target
    Extent kernel{1, 1, 1};         // conv
    Extent sparsity{1, 1, 1};       // conv, max_filter
    Extent window{1, 1, 1};         // max_filter, max_pool
    Extent stride{1, 1, 1};         // max_pool
    Extent offset{0, 0, 0};         // crop
    float ratio = 0;                // dropout: probability of dropping
    bool depthwise = false;         // conv: map i to map i only
    float rate = 1, decay = 1;      // multipliers of learning rate and weight decay
    Method method = Method::direct; // conv
    Extent transform{1, 1, 1};      // fft: extent of the transform of one sub-lattice; tiled, fused: of a tile
    bool memoize = true;            // tiled: all spectra are kept for the update, not only those of two slabs
};

struct NetworkOptions {
    int threads = 1;
    Policy policy = Policy::priority;
    SumKind sum = SumKind::wait_free;
    Allocator allocator = Allocator::pools;
    bool memoize_kernels = true, memoize_images = true, memoize_gradients = true;
    bool pin = true, trace = false, input_gradient = false;
    bool second_moments = false;  // the optimiser is Adam
    int patches = 1;
    int bundle = 1;  // maps per bundle: 1 is the paper's engine
    std::uint64_t seed = 0;
    kernels::Loss loss = kernels::Loss::squared;
};

}  // namespace znn
