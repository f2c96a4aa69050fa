// The paper's engine: builds nodes, edges and tasks, one map per node, from a description and runs rounds.
#pragma once
#include <memory>
#include <vector>

#include "engine/base.hpp"
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

class Network final : public NetworkBase {
public:
    Network(std::vector<NodeGroupDescription> nodes, std::vector<EdgeGroupDescription> edges,
            const NetworkOptions& options);
    ~Network() override;

    void forward(const std::vector<const float*>& inputs, bool training) override;
    void backward(const std::vector<const float*>& gradients) override;
    double train_step(const std::vector<const float*>& inputs, const std::vector<const float*>& targets,
                      const std::vector<const float*>& weights) override;
    void copy_output(int node_group, float* out) const override;
    void copy_input_gradient(int node_group, float* out) const override;
    void get_kernels(int edge_group, Which which, float* out) override;
    void set_kernels(int edge_group, Which which, const float* in) override;
    void get_biases(int node_group, Which which, float* out) override;
    void set_biases(int node_group, Which which, const float* in) override;
    void sync() override;
    std::uint64_t round() const override { return context_.round; }
    void set_round(std::uint64_t round) override;
    Executor& executor() override { return *context_.executor; }
    TransformCounts transforms() const override;
    std::size_t pool_bytes() const override { return context_.pool.bytes_from_system(); }
    std::size_t pool_blocks() const override { return context_.pool.blocks_from_system(); }
    std::size_t kernel_spectra_bytes() const override;
    std::size_t task_count() const override;
    Path critical_path() const override { return {context_.forward_path_ns.load(), context_.backward_path_ns.load()}; }

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

    Context context_;

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
