// A network: builds nodes, edges and tasks from a description and runs rounds.
#pragma once
#include <memory>
#include <vector>

#include "engine/description.hpp"
#include "engine/edge.hpp"
#include "engine/node.hpp"

namespace znn {

// Computes the loss of one output map (softmax: of all maps of the group) and its gradient, or passes on a gradient that
// was given; either way divided by the number of output voxels.
class LossTask final : public Task {
public:
    LossTask(Context& context, NodeGroup& group, int first_map, int maps);
    void run(Worker& worker) override;

    std::vector<Buffer> targets;  // of its maps: targets, or (given) gradients
    std::vector<Buffer> weights;  // of its maps, or empty
    bool given = false;
    double loss = 0;                // summed over voxels, not yet divided
    const int first_map, maps;

private:
    void compute(std::vector<Buffer>& gradients);

    Context& context_;
    NodeGroup& group_;
};

// Hands a new image to an input node.
class InputTask final : public Task {
public:
    explicit InputTask(Node& node) : node_(node) {}
    void run(Worker& worker) override { node_.complete_forward(std::move(image), worker); }
    Buffer image;

private:
    Node& node_;
};

class Network {
public:
    Network(std::vector<NodeGroupDescription> nodes, std::vector<EdgeGroupDescription> edges,
            const NetworkOptions& options);
    ~Network();

    // All pointers below are to float32 arrays [patch][map][z][y][x] of the group's extent, one per input (output) group
    // in order of description; weights may be null. softmax takes the weights of the first map for all. Calls wait for what they return, not for the updates, which overlap the next round.
    void forward(const std::vector<const float*>& inputs, bool training);
    void backward(const std::vector<const float*>& gradients);
    double train_step(const std::vector<const float*>& inputs, const std::vector<const float*>& targets,
                      const std::vector<const float*>& weights);
    void copy_output(int node_group, float* out) const;
    void copy_input_gradient(int node_group, float* out) const;

    // Parameters in the paper's orientation (kernels flipped back). These wait for the pending updates.
    enum class Which { value, momentum };
    void get_kernels(int edge_group, Which which, float* out);
    void set_kernels(int edge_group, Which which, const float* in);
    void get_biases(int node_group, Which which, float* out);
    void set_biases(int node_group, Which which, const float* in);
    std::size_t kernel_floats(int edge_group) const;

    void sync();
    void set_step(kernels::SgdStep step) { next_step_ = step; }
    std::uint64_t round() const { return context_.round; }
    void set_round(std::uint64_t round);

    const std::vector<NodeGroupDescription>& node_groups() const { return node_descriptions_; }
    const std::vector<EdgeGroupDescription>& edge_groups() const { return edge_descriptions_; }
    Executor& executor() { return *context_.executor; }
    Context& context() { return context_; }
    TransformCounts transforms() const;
    std::size_t kernel_spectra_bytes() const;
    std::size_t task_count() const;

private:
    void build_nodes();
    void build_edges();
    void mark_backward();
    void plan_conv_group(int g);
    void plan_simple_group(int g);
    void create_edges(int g);
    void plan_losses();
    void set_priorities();
    void start_forward(const std::vector<const float*>& inputs, bool training, bool with_loss);
    void load(std::vector<Buffer>& maps, const float* data, const NodeGroup& group);
    void prepare_losses(const std::vector<const float*>& data, const std::vector<const float*>& weights, bool given);
    void finish_round(const std::atomic<int>& left);
    void reset_after_failure();

    std::vector<NodeGroupDescription> node_descriptions_;
    std::vector<EdgeGroupDescription> edge_descriptions_;
    Context context_;
    kernels::SgdStep next_step_{};

    struct Wiring {  // indices shared by the edges of a group
        int image_form = 0, gradient_form = 0, update_form = 0;
        SideLayout::PortIndex forward{0, 0}, backward{0, 0};
        bool has_backward = false;
    };
    std::vector<std::unique_ptr<NodeGroup>> nodes_;
    std::vector<std::unique_ptr<ConvGroup>> convs_;  // per edge group, null for the others
    std::vector<Wiring> wiring_;
    std::vector<std::vector<std::unique_ptr<Edge>>> edges_;
    std::vector<int> inputs_, outputs_;
    std::vector<std::unique_ptr<InputTask>> input_tasks_;
    std::vector<std::unique_ptr<LossTask>> loss_tasks_;
    int backward_nodes_ = 0, output_nodes_ = 0;
    bool trained_forward_ = false;
};

}  // namespace znn
