// What both engines offer: the paper's (one map per node, network.hpp) and the bundled one (bundled.hpp).
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "base/update_step.hpp"
#include "engine/description.hpp"
#include "tasks/executor.hpp"

namespace znn {

struct TransformCounts {
    std::int64_t kernels = 0, images = 0, gradients = 0, inverse_images = 0, inverse_gradients = 0, inverse_kernels = 0;
};

// Thrown by calls that have found NaN or infinity in an input; nothing is changed by them.
struct NotFinite : std::runtime_error {
    NotFinite() : std::runtime_error("an input holds NaN or infinity") {}
};

class NetworkBase {
public:
    NetworkBase(std::vector<NodeGroupDescription> nodes, std::vector<EdgeGroupDescription> edges,
                const NetworkOptions& options)
        : node_descriptions_(std::move(nodes)), edge_descriptions_(std::move(edges)), options_(options) {}
    virtual ~NetworkBase() = default;

    // All pointers below are to float32 arrays [patch][map][z][y][x] of the group's extent, one per input (output) group
    // in order of description; weights may be null. softmax takes the weights of the first map for all. Calls wait for
    // what they return, not for the updates, which overlap the next round.
    virtual void forward(const std::vector<const float*>& inputs, bool training) = 0;
    virtual void backward(const std::vector<const float*>& gradients) = 0;
    virtual double train_step(const std::vector<const float*>& inputs, const std::vector<const float*>& targets,
                              const std::vector<const float*>& weights) = 0;
    // Whether forward and train_step look themselves whether inputs are finite, while they load them, and throw NotFinite.
    virtual bool checks_inputs() const { return false; }
    virtual void copy_output(int node_group, float* out) const = 0;
    virtual void copy_input_gradient(int node_group, float* out) const = 0;

    // Parameters in the paper's orientation (kernels flipped back). These wait for the pending updates.
    enum class Which { value, momentum, second_moment };
    virtual void get_kernels(int edge_group, Which which, float* out) = 0;
    virtual void set_kernels(int edge_group, Which which, const float* in) = 0;
    virtual void get_biases(int node_group, Which which, float* out) = 0;
    virtual void set_biases(int node_group, Which which, const float* in) = 0;

    virtual void sync() = 0;
    virtual std::uint64_t round() const = 0;
    virtual void set_round(std::uint64_t round) = 0;
    virtual Executor& executor() = 0;

    virtual TransformCounts transforms() const { return {}; }
    virtual std::size_t pool_bytes() const { return 0; }
    virtual std::size_t pool_blocks() const { return 0; }
    virtual std::size_t kernel_spectra_bytes() const { return 0; }
    virtual std::size_t task_count() const = 0;
    struct Path {
        std::int64_t forward_ns = 0, backward_ns = 0;
    };
    virtual Path critical_path() const = 0;

    void set_step(UpdateStep step) { next_step_ = step; }
    const std::vector<NodeGroupDescription>& node_groups() const { return node_descriptions_; }
    const std::vector<EdgeGroupDescription>& edge_groups() const { return edge_descriptions_; }
    const NetworkOptions& options() const { return options_; }

protected:
    // The step of the round in hand, the one after `rounds` rounds.
    UpdateStep step_of(std::uint64_t rounds) const {
        return options_.second_moments ? next_step_.adam(rounds + 1) : next_step_;
    }

    std::vector<NodeGroupDescription> node_descriptions_;
    std::vector<EdgeGroupDescription> edge_descriptions_;
    NetworkOptions options_;
    UpdateStep next_step_;
};

}  // namespace znn
