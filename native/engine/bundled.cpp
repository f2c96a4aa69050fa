#include "engine/bundled.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace znn {

BundledNetwork::BundledNetwork(std::vector<NodeGroupDescription> nodes, std::vector<EdgeGroupDescription> edges,
                               const NetworkOptions& options)
    : NetworkBase(std::move(nodes), std::move(edges), options), V_(options.bundle), groups_(node_descriptions_),
      edges_(edge_descriptions_) {
    if (!tiled::has_bundle(V_)) throw std::runtime_error("bundles of " + std::to_string(V_) + " maps cannot run here");
    convs_.resize(edges_.size());
    simples_.resize(edges_.size());
    for (int e = 0; e < int(edges_.size()); ++e)
        if (edges_[e].kind == EdgeKind::conv) plan_conv(e);
    build_nodes();
    for (int e = 0; e < int(edges_.size()); ++e) {
        if (convs_[e])
            build_conv(e);
        else if (edges_[e].source >= 0)
            simples_[e] = std::make_unique<Simple>();
    }
    share_buffers();
    build_forward();
    build_backward();
    build_update();
    for (auto& conv : convs_) {
        if (!conv) continue;
        conv->inference = conv->buffers;  // without what only a backward pass reads
        for (auto& buffers : conv->inference) buffers.keep = false, buffers.largest = nullptr;
    }
    set_priorities();
}

BundledNetwork::~BundledNetwork() {
    if (executor_) executor_->drain();
}

// ---------------------------------------------------------------- rounds

// Inference never touches the kernels that only backward reads.
void BundledNetwork::prepare_kernels(bool training) {
    bool any = false;
    const auto prepare = [&](Stage* stage, bool& stale) {
        if (!stage || !stale) return;
        stage->arrive(nullptr);
        stale = false;
        any = true;
    };
    for (auto& conv : convs_) {
        if (!conv) continue;
        prepare(conv->prepare_forward, conv->stale_forward);
        if (training) prepare(conv->prepare_backward, conv->stale_backward);
    }
    if (any) sync();
}

void BundledNetwork::start_forward(const std::vector<const float*>& inputs, bool training) {
    prepare_kernels(training);
    input_data_ = inputs;
    training_ = training;
    refused_.store(false);
    forward_done_.store(false);
    backward_done_.store(false);
    forward_path_ns_.store(0);
    backward_path_ns_.store(0);
    for (auto& [stage, gate] : gated_)
        if (gate->pass(*stage)) stage->arrive(nullptr);
    for (Stage* stage : first_stages_) stage->arrive(nullptr);
}

void BundledNetwork::wait_for(const std::atomic<bool>& flag) {
    executor_->wait([&] { return flag.load(std::memory_order_acquire); });
    if (!executor_->failed()) return;
    executor_->drain();
    for (auto& conv : convs_)
        if (conv) conv->set_stale();
    trained_forward_ = false;
    executor_->rethrow_failure();
}

void BundledNetwork::forward(const std::vector<const float*>& inputs, bool training) {
    trained_forward_ = with_loss_ = false;
    start_forward(inputs, training);
    wait_for(forward_done_);
    throw_if_refused();
    trained_forward_ = training;
}

// The losses wait for the updates of the last round to be over (the forward pass FORCEd all but the transforms of kernels
// for backward): only then may backward and update begin.
void BundledNetwork::start_losses(Worker* worker) {
    if (updates_over_.pass(*losses_)) losses_->arrive(worker);
    losses_->arrive(worker);
}

void BundledNetwork::begin_backward() {
    updates_over_.close();
    for (auto& conv : convs_) {
        if (!conv) continue;
        const EdgeGroupDescription& d = edges_[conv->edge];
        for (auto& b : conv->buffers) b.step = step_.of_group(d.rate, d.decay);
        conv->kernels_ready.close();
        conv->operands_free.close();
    }
    for (auto& n : nodes_) {
        n->step = step_.of_group(n->d.rate, 0);
        if (n->d.bias && n->has_backward) n->bias_ready.close();
    }
}

void BundledNetwork::backward(const std::vector<const float*>& gradients) {
    if (!trained_forward_) throw std::runtime_error("backward needs a forward pass in the train phase before it");
    trained_forward_ = false;
    target_data_ = gradients;
    given_ = true;
    losses_sum_.assign(task_count() + 1, 0.0);
    step_ = step_of(round_);
    start_losses(nullptr);
    wait_for(backward_done_);
    ++round_;
}

double BundledNetwork::train_step(const std::vector<const float*>& inputs, const std::vector<const float*>& targets,
                                  const std::vector<const float*>& weights) {
    trained_forward_ = false;
    target_data_ = targets;
    weight_data_ = weights;
    given_ = false;
    with_loss_ = true;
    step_ = step_of(round_);
    losses_sum_.assign(task_count() + 1, 0.0);
    start_forward(inputs, true);
    wait_for(backward_done_);
    throw_if_refused();
    ++round_;
    double loss = 0;
    for (const double part : losses_sum_) loss += part;
    return loss;
}

void BundledNetwork::copy_output(int group, float* out) const { unbundle(nodes_[group]->image, *nodes_[group], out); }

void BundledNetwork::copy_input_gradient(int group, float* out) const {
    if (round_ == 0) throw std::runtime_error("there is no input gradient before a backward pass");
    unbundle(nodes_[group]->gradient, *nodes_[group], out);
}

void BundledNetwork::sync() {
    executor_->drain();
    if (executor_->failed()) executor_->rethrow_failure();
}

void BundledNetwork::set_round(std::uint64_t round) {
    sync();
    round_ = round;
}

// ---------------------------------------------------------------- parameters

// Calls each(offset in [out][in][taps] reversed order of taps, offset in the bundled layout) for all weights of a layer.
template <class Each>
void BundledNetwork::each_kernel(int e, Each each) const {
    const EdgeGroupDescription& d = edges_[e];
    const int in = d.depthwise ? 1 : nodes_[d.source]->d.maps, out = nodes_[d.target]->d.maps;
    const std::size_t taps = d.kernel.volume();
    for (int o = 0; o < out; ++o)
        for (int i = 0; i < in; ++i)
            for (std::size_t t = 0; t < taps; ++t)
                each((std::size_t(o) * in + i) * taps + (taps - 1 - t),
                     ((std::size_t(o / V_) * in + i) * taps + t) * V_ + o % V_);
}

void BundledNetwork::get_kernels(int e, Which which, float* out) {
    sync();
    const float* in = convs_[e]->state(which).data();
    each_kernel(e, [&](std::size_t plain, std::size_t bundled) { out[plain] = in[bundled]; });
}

void BundledNetwork::set_kernels(int e, Which which, const float* in) {
    sync();
    float* out = convs_[e]->state(which).data();
    each_kernel(e, [&](std::size_t plain, std::size_t bundled) { out[bundled] = in[plain]; });
    convs_[e]->set_stale();
}

void BundledNetwork::get_biases(int group, Which which, float* out) {
    sync();
    Nodes& n = *nodes_[group];
    std::copy_n(n.state(which).data(), n.d.maps, out);
}

void BundledNetwork::set_biases(int group, Which which, const float* in) {
    sync();
    Nodes& n = *nodes_[group];
    std::copy_n(in, n.d.maps, n.state(which).data());
}

std::size_t BundledNetwork::kernel_spectra_bytes() const {
    std::size_t bytes = 0;
    for (const auto& conv : convs_)
        if (conv)
            bytes += tiled::buffer_bytes(conv->plan, tiled::Buffer::kernels_forward) +
                     tiled::buffer_bytes(conv->plan, tiled::Buffer::kernels_backward);
    return bytes;
}

std::size_t BundledNetwork::task_count() const {
    std::size_t count = 0;
    for (const Pass pass : {Pass::forward, Pass::backward, Pass::update})
        for (const auto& stage : stages_[int(pass)]) count += stage->pieces();
    return count;
}

}  // namespace znn
