#include "engine/network.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>

namespace znn {

// ---------------------------------------------------------------- loss

LossTask::LossTask(Context& context, NodeGroup& group, int first_map, int maps)
    : first_map(first_map), maps(maps), context_(context), group_(group) {
    label = {std::int16_t(Phase::loss), std::int16_t(WorkKind::loss), group.index, first_map, first_map};
}

void LossTask::compute(std::vector<Buffer>& gradients) {
    const kernels::Table& f = kernels::table();
    const std::size_t n = group_.floats(context_);
    std::vector<const float*> y, t;
    std::vector<float*> g;
    for (int i = 0; i < maps; ++i) {
        gradients.push_back(context_.pool.allocate(n));
        y.push_back(group_.nodes[first_map + i]->forward.value.data());
        t.push_back(targets[i].data());
        g.push_back(gradients.back().data());
    }
    const float* w = weights.empty() ? nullptr : weights[0].data();
    switch (context_.options.loss) {
        case kernels::Loss::squared: loss = f.loss_squared(y[0], t[0], w, g[0], n); break;
        case kernels::Loss::binomial: loss = f.loss_binomial(y[0], t[0], w, g[0], n); break;
        case kernels::Loss::softmax: loss = f.loss_softmax(y.data(), t.data(), w, g.data(), maps, n); break;
    }
}

void LossTask::run(Worker& worker) {
    std::vector<Buffer> gradients;
    if (given)
        gradients = std::move(targets);
    else
        compute(gradients);
    targets.clear();
    weights.clear();
    const std::size_t n = group_.floats(context_);
    for (int i = 0; i < maps; ++i) {
        kernels::table().scale(gradients[i].data(), 1.0f / float(n), n);
        group_.nodes[first_map + i]->contribute_backward(group_.loss_port, std::move(gradients[i]), group_.loss_index,
                                                         worker);
    }
}

// ---------------------------------------------------------------- construction

Network::Network(std::vector<NodeGroupDescription> nodes, std::vector<EdgeGroupDescription> edges,
                 const NetworkOptions& options)
    : NetworkBase(std::move(nodes), std::move(edges), options), context_(options) {
    build_nodes();
    build_edges();
    set_priorities();
}

Network::~Network() {
    if (context_.executor) context_.executor->drain();
}

void Network::build_nodes() {
    for (std::size_t i = 0; i < node_descriptions_.size(); ++i) {
        nodes_.push_back(std::make_unique<NodeGroup>());
        NodeGroup& group = *nodes_.back();
        group.description = node_descriptions_[i];
        group.index = int(i);
        group.keep_image = group.description.transfer != kernels::Transfer::linear;
        group.bias = AlignedFloats(group.description.maps);
        group.bias_momentum = AlignedFloats(group.description.maps);
        if (options_.second_moments) group.bias_second_moment = AlignedFloats(group.description.maps);
        if (group.description.input) inputs_.push_back(int(i));
        if (group.description.output) outputs_.push_back(int(i));
        if (group.description.output) output_nodes_ += group.description.maps;
    }
}

// Gradients are wanted where there are parameters, or upstream of which there are, and at the outputs.
void Network::mark_backward() {
    for (auto& group : nodes_)
        group->has_backward = context_.options.input_gradient || group->description.output || group->description.bias;
    for (const auto& d : edge_descriptions_)
        if (d.kind == EdgeKind::conv || nodes_[d.source]->has_backward) nodes_[d.target]->has_backward = true;
    for (auto& group : nodes_)
        if (group->has_backward) backward_nodes_ += group->description.maps;
}

void Network::plan_conv_group(int g) {
    const EdgeGroupDescription& d = edge_descriptions_[g];
    NodeGroup &source = *nodes_[d.source], &target = *nodes_[d.target];
    const Extent in = source.description.extent, out = target.description.extent;
    const int patches = context_.options.patches;
    const int f = source.description.maps, g_maps = target.description.maps;
    const int fan_in = d.depthwise ? 1 : f, fan_out = d.depthwise ? 1 : g_maps;

    auto conv = std::make_unique<ConvGroup>();
    conv->method = make_method(d.method, {in, d.kernel, d.sparsity, out, patches}, d.transform);
    conv->taps = d.kernel.volume();
    const std::size_t count = std::size_t(fan_in) * g_maps;
    conv->kernels = AlignedFloats(count * conv->taps);
    conv->momentum = AlignedFloats(count * conv->taps);
    if (options_.second_moments) conv->second_moment = AlignedFloats(count * conv->taps);
    if (context_.options.memoize_kernels) conv->spectra = AlignedFloats(count * conv->method->kernel_floats());

    Wiring& w = wiring_[g];
    const ConvMethod& method = *conv->method;
    w.has_backward = source.has_backward;
    w.image_form = source.forward.form(method.image_domain, in, patches);
    source.forward.forms[w.image_form].uses += fan_out;
    source.forward.forms[w.image_form].for_updates = true;
    if (method.image_domain.kind == Domain::Kind::spectrum && !context_.options.memoize_images) source.keep_image = true;
    w.forward = target.forward.port(method.forward_sum, out, patches, fan_in);
    w.update_form = target.backward.form(method.update_domain, out, patches);
    target.backward.forms[w.update_form].for_updates = true;
    if (w.has_backward) {
        w.gradient_form = target.backward.form(method.backward_domain, out, patches);
        target.backward.forms[w.gradient_form].uses += fan_in;
        if (w.update_form != w.gradient_form) target.backward.forms[w.update_form].uses += fan_in;
        w.backward = source.backward.port(method.backward_sum, in, patches, fan_out);
    }
    convs_[g] = std::move(conv);
}

void Network::plan_simple_group(int g) {
    const EdgeGroupDescription& d = edge_descriptions_[g];
    NodeGroup &source = *nodes_[d.source], &target = *nodes_[d.target];
    const int patches = context_.options.patches;
    Wiring& w = wiring_[g];
    w.has_backward = source.has_backward;
    w.image_form = source.forward.form({}, source.description.extent, patches);
    source.forward.forms[w.image_form].uses += 1;
    w.forward = target.forward.port({}, target.description.extent, patches, 1);
    if (!w.has_backward) return;
    w.gradient_form = target.backward.form({}, target.description.extent, patches);
    target.backward.forms[w.gradient_form].uses += 1;
    w.backward = source.backward.port({}, source.description.extent, patches, 1);
}

void Network::plan_losses() {
    for (int index : outputs_) {
        NodeGroup& group = *nodes_[index];
        const auto port = group.backward.port({}, group.description.extent, context_.options.patches, 1);
        group.loss_port = port.port;
        group.loss_index = port.first;
    }
}

void Network::build_edges() {
    mark_backward();
    convs_.resize(edge_descriptions_.size());
    wiring_.resize(edge_descriptions_.size());
    edges_.resize(edge_descriptions_.size());
    for (int g = 0; g < int(edge_descriptions_.size()); ++g)
        edge_descriptions_[g].kind == EdgeKind::conv ? plan_conv_group(g) : plan_simple_group(g);
    plan_losses();
    // What meets at a node is known now: the nodes' sums and encodings can be made.
    for (auto& group : nodes_)
        for (int map = 0; map < group->description.maps; ++map)
            group->nodes.push_back(std::make_unique<Node>(context_, *group, map));
    for (int g = 0; g < int(edge_descriptions_.size()); ++g) create_edges(g);

    for (int index : inputs_)
        for (auto& node : nodes_[index]->nodes) {
            input_tasks_.push_back(std::make_unique<InputTask>(*node));
            input_tasks_.back()->label = {std::int16_t(Phase::input), std::int16_t(WorkKind::input), index, node->map,
                                          node->map};
        }
    const bool joint = context_.options.loss == kernels::Loss::softmax;
    for (int index : outputs_) {
        NodeGroup& group = *nodes_[index];
        const int maps = group.description.maps, each = joint ? maps : 1;
        for (int first = 0; first < maps; first += each)
            loss_tasks_.push_back(std::make_unique<LossTask>(context_, group, first, each));
    }
}

void Network::create_edges(int g) {
    const EdgeGroupDescription& d = edge_descriptions_[g];
    NodeGroup &source = *nodes_[d.source], &target = *nodes_[d.target];
    const Wiring& w = wiring_[g];
    const bool full = d.kind == EdgeKind::conv && !d.depthwise;
    for (int b = 0; b < target.description.maps; ++b)
        for (int a = full ? 0 : b; a < (full ? source.description.maps : b + 1); ++a) {
            Node &from = *source.nodes[a], &to = *target.nodes[b];
            std::unique_ptr<Edge> edge;
            if (d.kind == EdgeKind::conv) {
                auto conv = std::make_unique<ConvEdge>(context_, *convs_[g], d, g, from, to, edges_[g].size());
                conv->update_form = w.update_form;
                from.forward.encodings[w.image_form]->updates.push_back(conv.get());
                to.backward.encodings[w.update_form]->updates.push_back(conv.get());
                if (!w.has_backward) to.updates_without_backward.push_back(conv.get());
                edge = std::move(conv);
            } else {
                edge = make_simple_edge(context_, d, g, from, to);
            }
            edge->image_form = w.image_form;
            edge->gradient_form = w.gradient_form;
            edge->forward_port = w.forward.port;
            edge->forward_index = w.forward.first + (full ? a : 0);
            edge->backward_port = w.backward.port;
            edge->backward_index = w.backward.first + (full ? b : 0);
            edge->has_backward = w.has_backward;
            from.forward.followers.push_back(&edge->forward_task);
            if (w.has_backward) to.backward.followers.push_back(&edge->backward_task);
            edges_[g].push_back(std::move(edge));
        }
}

// Priorities (the paper's section on scheduling): forward tasks by the longest distance of their node to the output,
// backward tasks by the longest distance to the input; nodes of one distance are strictly ordered, so that all edges
// that converge on one node run together. Backward outranks forward, updates come last.
void Network::set_priorities() {
    const std::size_t groups = nodes_.size();
    std::vector<int> to_output(groups, 0), to_input(groups, 0);
    for (const auto& d : edge_descriptions_) to_input[d.target] = std::max(to_input[d.target], to_input[d.source] + 1);
    for (auto d = edge_descriptions_.rbegin(); d != edge_descriptions_.rend(); ++d)
        to_output[d->source] = std::max(to_output[d->source], to_output[d->target] + 1);

    const auto rank = [&](const std::vector<int>& distance) {
        std::vector<Node*> order;
        for (auto& group : nodes_)
            for (auto& node : group->nodes) order.push_back(node.get());
        std::stable_sort(order.begin(), order.end(), [&](const Node* a, const Node* b) {
            return distance[a->group.index] > distance[b->group.index];
        });
        std::vector<std::vector<int>> ranks(groups);
        for (std::size_t g = 0; g < groups; ++g) ranks[g].resize(nodes_[g]->nodes.size());
        for (std::size_t i = 0; i < order.size(); ++i)
            ranks[order[i]->group.index][order[i]->map] = int(order.size() - 1 - i);
        return ranks;
    };
    int total = 0;
    for (auto& group : nodes_) total += group->description.maps;
    const auto forward = rank(to_output), backward = rank(to_input);
    const int update = 0, again = 1, first_forward = 2, first_backward = first_forward + total,
              outermost = first_backward + total;
    for (auto& group : edges_)
        for (auto& edge : group) {
            edge->forward_task.priority = first_forward + forward[edge->target.group.index][edge->target.map];
            edge->backward_task.priority = first_backward + backward[edge->source.group.index][edge->source.map];
            if (auto* conv = dynamic_cast<ConvEdge*>(edge.get())) conv->update_task.priority = update;
        }
    for (auto& group : nodes_)
        for (auto& node : group->nodes)
            for (Side* side : {&node->forward, &node->backward})
                for (auto& encoding : side->encodings) {
                    encoding->again.priority = again;
                    encoding->again.label = {std::int16_t(Phase::update), std::int16_t(WorkKind::transform), group->index,
                                             node->map, node->map};
                }
    for (auto& task : input_tasks_) task->priority = outermost;
    for (auto& task : loss_tasks_) task->priority = outermost;

    const NetworkOptions& o = context_.options;
    context_.executor = std::make_unique<Executor>(ExecutorOptions{o.threads, o.policy, outermost + 1, o.pin, o.trace});
}

// ---------------------------------------------------------------- rounds

void Network::load(std::vector<Buffer>& maps, const float* data, const NodeGroup& group) {
    const std::size_t volume = group.description.extent.volume();
    const int patches = context_.options.patches, count = group.description.maps;
    maps.clear();
    for (int map = 0; map < count; ++map) {
        Buffer buffer = context_.pool.allocate(volume * patches);
        for (int patch = 0; patch < patches; ++patch)
            std::memcpy(buffer.data() + patch * volume, data + (std::size_t(patch) * count + map) * volume,
                        volume * sizeof(float));
        maps.push_back(std::move(buffer));
    }
}

void Network::start_forward(const std::vector<const float*>& inputs, bool training, bool with_loss) {
    context_.training = training;
    context_.forward_left.store(output_nodes_);
    context_.forward_path_ns.store(0);
    context_.backward_path_ns.store(0);
    context_.after_forward.clear();
    if (with_loss)
        for (auto& task : loss_tasks_) context_.after_forward.push_back(task.get());
    std::vector<Task*> ready;
    std::size_t next = 0;
    for (std::size_t i = 0; i < inputs_.size(); ++i) {
        std::vector<Buffer> maps;
        load(maps, inputs[i], *nodes_[inputs_[i]]);
        for (Buffer& map : maps) {
            input_tasks_[next]->image = std::move(map);
            ready.push_back(input_tasks_[next++].get());
        }
    }
    context_.executor->submit(ready, nullptr);
}

// Waits until `left` is zero; if a task failed, puts the network back into a usable state and throws what it threw.
void Network::finish_round(const std::atomic<int>& left) {
    context_.executor->wait([&] { return left.load(std::memory_order_acquire) == 0; });
    if (!context_.executor->failed()) return;
    context_.executor->drain();
    reset_after_failure();
    context_.executor->rethrow_failure();
}

void Network::reset_after_failure() {
    for (auto& group : nodes_)
        for (auto& node : group->nodes) {
            node->forward.clear();
            node->backward.clear();
        }
    for (auto& group : edges_)
        for (auto& edge : group) edge->clear();
    for (auto& task : loss_tasks_) task->targets.clear(), task->weights.clear();
    for (auto& task : input_tasks_) task->image.reset();
    trained_forward_ = false;
}

void Network::forward(const std::vector<const float*>& inputs, bool training) {
    trained_forward_ = false;
    start_forward(inputs, training, false);
    finish_round(context_.forward_left);
    trained_forward_ = training;
}

void Network::prepare_losses(const std::vector<const float*>& data, const std::vector<const float*>& weights, bool given) {
    context_.step = step_of(context_.round);
    context_.backward_left.store(backward_nodes_);
    std::size_t next = 0;
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
        NodeGroup& group = *nodes_[outputs_[i]];
        std::vector<Buffer> maps, map_weights;
        load(maps, data[i], group);
        if (!given && weights[i]) load(map_weights, weights[i], group);
        for (std::size_t map = 0; map < maps.size();) {
            LossTask& task = *loss_tasks_[next++];
            task.given = given;
            task.loss = 0;
            task.targets.clear();
            task.weights.clear();
            for (int m = 0; m < task.maps; ++m, ++map) {
                task.targets.push_back(std::move(maps[map]));
                if (!map_weights.empty()) task.weights.push_back(std::move(map_weights[map]));
            }
        }
    }
}

void Network::backward(const std::vector<const float*>& gradients) {
    if (!trained_forward_) throw std::runtime_error("backward needs a forward pass in the train phase before it");
    trained_forward_ = false;
    prepare_losses(gradients, {}, true);
    std::vector<Task*> ready;
    for (auto& task : loss_tasks_) ready.push_back(task.get());
    context_.executor->submit(ready, nullptr);
    finish_round(context_.backward_left);
    ++context_.round;
}

double Network::train_step(const std::vector<const float*>& inputs, const std::vector<const float*>& targets,
                           const std::vector<const float*>& weights) {
    trained_forward_ = false;
    prepare_losses(targets, weights, false);
    start_forward(inputs, true, true);
    finish_round(context_.backward_left);
    ++context_.round;
    double loss = 0;
    std::size_t next = 0;
    for (int index : outputs_) {
        const NodeGroup& group = *nodes_[index];
        double sum = 0;
        for (int map = 0; map < group.description.maps; map += loss_tasks_[next - 1]->maps) sum += loss_tasks_[next++]->loss;
        loss += sum / double(group.floats(context_));
    }
    return loss;
}

void Network::copy_output(int node_group, float* out) const {
    const NodeGroup& group = *nodes_[node_group];
    const std::size_t volume = group.description.extent.volume();
    for (int patch = 0; patch < context_.options.patches; ++patch)
        for (auto& node : group.nodes) {
            std::memcpy(out, node->forward.value.data() + patch * volume, volume * sizeof(float));
            out += volume;
        }
}

void Network::copy_input_gradient(int node_group, float* out) const {
    const NodeGroup& group = *nodes_[node_group];
    const std::size_t volume = group.description.extent.volume();
    for (int patch = 0; patch < context_.options.patches; ++patch)
        for (auto& node : group.nodes) {
            if (!node->backward.value) throw std::runtime_error("there is no input gradient before a backward pass");
            std::memcpy(out, node->backward.value.data() + patch * volume, volume * sizeof(float));
            out += volume;
        }
}

// ---------------------------------------------------------------- parameters

void Network::sync() {
    context_.executor->drain();
    if (!context_.executor->failed()) return;
    reset_after_failure();
    context_.executor->rethrow_failure();
}

void Network::set_round(std::uint64_t round) {
    sync();
    context_.round = round;
}

namespace {

AlignedFloats& state(ConvGroup& conv, NetworkBase::Which which) {
    if (which == NetworkBase::Which::value) return conv.kernels;
    return which == NetworkBase::Which::momentum ? conv.momentum : conv.second_moment;
}

AlignedFloats& state(NodeGroup& group, NetworkBase::Which which) {
    if (which == NetworkBase::Which::value) return group.bias;
    return which == NetworkBase::Which::momentum ? group.bias_momentum : group.bias_second_moment;
}

}  // namespace

void Network::get_kernels(int edge_group, Which which, float* out) {
    sync();
    ConvGroup& conv = *convs_[edge_group];
    const float* in = state(conv, which).data();
    for (std::size_t i = 0; i < conv.kernels.size(); i += conv.taps) std::reverse_copy(in + i, in + i + conv.taps, out + i);
}

void Network::set_kernels(int edge_group, Which which, const float* in) {
    sync();
    ConvGroup& conv = *convs_[edge_group];
    float* out = state(conv, which).data();
    for (std::size_t i = 0; i < conv.kernels.size(); i += conv.taps) std::reverse_copy(in + i, in + i + conv.taps, out + i);
    for (auto& edge : edges_[edge_group]) static_cast<ConvEdge&>(*edge).kernel_changed();
}

void Network::get_biases(int node_group, Which which, float* out) {
    sync();
    NodeGroup& group = *nodes_[node_group];
    std::copy_n(state(group, which).data(), group.description.maps, out);
}

void Network::set_biases(int node_group, Which which, const float* in) {
    sync();
    NodeGroup& group = *nodes_[node_group];
    std::copy_n(in, group.description.maps, state(group, which).data());
}

// ---------------------------------------------------------------- statistics

TransformCounts Network::transforms() const {
    TransformCounts total;
    for (const auto& c : context_.counts) {
        total.kernels += c.kernels;
        total.images += c.images;
        total.gradients += c.gradients;
        total.inverse_images += c.inverse_images;
        total.inverse_gradients += c.inverse_gradients;
        total.inverse_kernels += c.inverse_kernels;
    }
    return total;
}

std::size_t Network::kernel_spectra_bytes() const {
    std::size_t floats = 0;
    for (const auto& conv : convs_)
        if (conv) floats += conv->spectra.size();
    return floats * sizeof(float);
}

std::size_t Network::task_count() const {
    std::size_t count = 0;
    for (std::size_t g = 0; g < edges_.size(); ++g)
        count += edges_[g].size() * (1 + wiring_[g].has_backward + (convs_[g] != nullptr));
    return count + input_tasks_.size() + loss_tasks_.size();
}

}  // namespace znn
