// Edges and groups of edges. An edge owns its tasks; a group owns what its edges share.
#pragma once
#include <memory>
#include <vector>

#include "engine/method.hpp"
#include "engine/node.hpp"

namespace znn {

class Edge {
public:
    Edge(Context& context, const EdgeGroupDescription& group, int group_index, Node& source, Node& target);
    virtual ~Edge() = default;

    virtual bool prepare_forward(Task& task, Worker& worker);
    virtual void run_forward(Worker& worker) = 0;
    virtual void run_backward(Worker& worker) = 0;
    virtual void clear() {}

    Context& context;
    const EdgeGroupDescription& group;
    Node& source;
    Node& target;

    // Where this edge takes its input and puts its result (indices into the layouts of source and target).
    int image_form = 0, forward_port = 0, forward_index = 0;
    int gradient_form = 0, backward_port = 0, backward_index = 0;
    bool has_backward = false;

    class ForwardTask final : public Task {
    public:
        explicit ForwardTask(Edge& edge) : edge_(edge) {}
        bool prepare(Worker& worker) override { return edge_.prepare_forward(*this, worker); }
        void run(Worker& worker) override { edge_.run_forward(worker); }

    private:
        Edge& edge_;
    } forward_task;

    class BackwardTask final : public Task {
    public:
        explicit BackwardTask(Edge& edge) : edge_(edge) {}
        void run(Worker& worker) override { edge_.run_backward(worker); }

    private:
        Edge& edge_;
    } backward_task;

protected:
    Encoding& image() { return *source.forward.encodings[image_form]; }
    Encoding& gradient() { return *target.backward.encodings[gradient_form]; }
};

struct ConvGroup;

class ConvEdge final : public Edge {
public:
    ConvEdge(Context& context, ConvGroup& conv, const EdgeGroupDescription& group, int group_index, Node& source,
             Node& target, std::size_t kernel_index);

    bool prepare_forward(Task& task, Worker& worker) override;
    void run_forward(Worker& worker) override;
    void run_backward(Worker& worker) override;
    void clear() override;

    // The edge's own part of the round is over: its update may start once image and gradient are at hand.
    void ready_update(Worker& worker);
    void deliver_image(const Buffer& image, Worker* worker);
    void deliver_gradient(const Buffer& gradient, Worker* worker);
    void kernel_changed() { spectrum_valid_ = false; }

    int update_form = 0;  // of the target's gradient
    class UpdateTask final : public Task {
    public:
        explicit UpdateTask(ConvEdge& edge) : edge_(edge) {}
        void run(Worker& worker) override { edge_.run_update(worker); }

    private:
        ConvEdge& edge_;
    } update_task;

private:
    void run_update(Worker& worker);
    const float* transformed_kernel(Worker& worker);
    bool image_deferred() const;
    bool gradient_deferred() const;
    void one_arrived(Worker* worker);
    Encoding& update_gradient() { return *target.backward.encodings[update_form]; }

    ConvGroup& conv_;
    const std::size_t kernel_index_;
    bool spectrum_valid_ = false;
    std::atomic<int> update_waits_{0};
    Buffer update_image_, update_gradient_;
    UpdateStep step_;
};

// A layer's convolution edges: every map to every map, or map i to map i (depthwise).
struct ConvGroup {
    std::unique_ptr<ConvMethod> method;
    std::size_t taps = 0;             // of one kernel
    AlignedFloats kernels, momentum;  // [out][in][taps], kernels flipped (cross-correlation)
    AlignedFloats second_moment;      // empty with SGD
    AlignedFloats spectra;            // transformed kernels, where they are kept
};

// Everything that joins map i to map i: max-filter, max-pool, dropout, crop, identity.
std::unique_ptr<Edge> make_simple_edge(Context& context, const EdgeGroupDescription& group, int group_index, Node& source,
                                       Node& target);

}  // namespace znn
