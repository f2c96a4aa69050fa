// The task graph of the bundled engine: a stage per layer and phase, what comes before what, and priorities.
#include "engine/bundled.hpp"

#include <algorithm>
#include <utility>

#include "engine/node.hpp"

namespace znn {

using PieceOf = tiled::Phase;

namespace {

tiled::Transfer tiled_transfer(kernels::Transfer f) { return static_cast<tiled::Transfer>(int(f)); }

}  // namespace

TaskLabel BundledNetwork::label(Pass pass, int kind, int group) const {
    const Phase phase = pass == Pass::forward ? Phase::forward : pass == Pass::backward ? Phase::backward : Phase::update;
    return {std::int16_t(phase), std::int16_t(kind), group, 0, 0};
}

Stage* BundledNetwork::add(Pass pass, TaskLabel label, int pieces, Stage::Body body) {
    auto& stages = stages_[int(pass)];
    if (pass == Pass::forward)
        body = [this, body = std::move(body)](int piece, Worker& worker) {
            if (!refused_.load(std::memory_order_relaxed)) body(piece, worker);
        };
    stages.push_back(std::make_unique<Stage>(label, pieces, std::move(body)));
    return stages.back().get();
}

void BundledNetwork::gate(Stage* stage, Gate& gate) {
    stage->await(1);
    gated_.push_back({stage, &gate});
}

Stage* BundledNetwork::join(Pass pass, TaskLabel label) { return add(pass, label, 0, {}); }

// All patches' pieces of one phase of a convolution layer (slab -1: of all slabs).
Stage* BundledNetwork::add_conv(Pass pass, int e, tiled::Phase phase, int slab) {
    Conv& conv = *convs_[e];
    const bool kernels = phase == PieceOf::kernels_forward || phase == PieceOf::kernels_backward;
    const int first = slab < 0 ? 0 : tiled::first_piece(conv.plan, phase, slab);
    const int end = slab < 0 ? tiled::piece_count(conv.plan, phase) : tiled::first_piece(conv.plan, phase, slab + 1);
    const int count = end - first, patches = kernels ? 1 : options_.patches;
    const std::size_t scratch = (tiled::scratch_bytes(conv.plan) + 63) / 64 * 16;
    return add(pass, label(pass, int(EdgeKind::conv), e), count * patches,
               [this, &conv, pass, phase, first, count, scratch](int piece, Worker& worker) {
                   const auto& buffers = pass == Pass::forward && !training_ ? conv.inference : conv.buffers;
                   tiled::run_piece(conv.plan, phase, first + piece % count, buffers[piece / count],
                                    worker.scratch.get(scratch, 0));
               });
}

// ---- forward

Stage* BundledNetwork::load_stage(Nodes& nodes, int input) {
    Stage* stage = add(Pass::forward, label(Pass::forward, int(WorkKind::input), nodes.index),
                       nodes.chunks * nodes.bundles * options_.patches,
                       [this, &nodes, input](int piece, Worker&) { load(nodes, input_data_[input], piece); });
    stage->await(1);  // the caller
    first_stages_.push_back(stage);
    nodes.writers.push_back(stage);
    return stage;
}

// Transform, product and inverse of all slabs of a convolution layer. A slab waits for the earlier one whose place it takes.
std::vector<BundledNetwork::Slab> BundledNetwork::add_slabs(Pass pass, int e, const Around& around) {
    const bool forward = pass == Pass::forward;
    const tiled::LayerPlan& plan = convs_[e]->plan;
    std::vector<Slab> slabs;
    for (int i = 0; i < plan.slabs; ++i) {
        const Slab slab{add_conv(pass, e, forward ? PieceOf::input_transform : PieceOf::gradient_transform, i),
                        add_conv(pass, e, forward ? PieceOf::forward_product : PieceOf::backward_product, i),
                        add_conv(pass, e, forward ? PieceOf::forward_inverse : PieceOf::backward_inverse, i)};
        around.ready->before(*slab.transform);
        slab.transform->before(*slab.product);
        slab.product->before(*slab.inverse);
        slab.inverse->before(*around.end);
        if (around.turn) around.turn->before(*slab.product);
        if (i >= plan.passing_slabs) {
            slabs[i - plan.passing_slabs].inverse->before(*slab.product);
            slabs[i - plan.passing_slabs].product->before(*slab.transform);
        }
        if (around.previous) around.previous->before(*slab.inverse);
        slabs.push_back(slab);
    }
    return slabs;
}

Stage* BundledNetwork::conv_forward(int e, bool accumulate, bool last, Stage* previous) {
    Conv& conv = *convs_[e];
    Nodes &source = *nodes_[edges_[e].source], &target = *nodes_[edges_[e].target];
    // What filters is the only convolution that leads there: see pool_to_absorb.
    if (last) target.derivative_noted = conv.plan.filters() && target.d.transfer == kernels::Transfer::relu;
    for (std::size_t patch = 0; patch < conv.buffers.size(); ++patch) {
        conv.buffers[patch].accumulate_output = accumulate;
        if (!last) continue;
        if (target.d.bias) conv.buffers[patch].bias = target.bias.data();
        conv.buffers[patch].transfer = tiled_transfer(target.d.transfer);
        conv.buffers[patch].note_positive = target.derivative_noted;
    }
    Stage* end = join(Pass::forward, label(Pass::forward, int(EdgeKind::conv), e));
    // Layers take turns in the shared buffer of spectra.
    Stage* turn = std::exchange(forward_turn_, end);
    for (const Slab& slab : add_slabs(Pass::forward, e, {source.ready, turn, previous, end})) {
        gate(slab.transform, conv.operands_free);
        gate(slab.product, conv.kernels_ready);
        gate(slab.inverse, conv.kernels_ready);  // direct layers have no product
        if (last && target.d.bias) gate(slab.inverse, target.bias_ready);
        target.writers.push_back(slab.inverse);
    }
    target.writers.push_back(end);
    return end;
}

Stage* BundledNetwork::simple_forward(int e, bool accumulate, Stage* previous) {
    const EdgeGroupDescription& d = edges_[e];
    Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    Stage* stage = add(Pass::forward, label(Pass::forward, int(d.kind), e), parts(e, true) * target.bundles * options_.patches,
                       [this, e, accumulate, small = filters_small_windows(e)](int piece, Worker& worker) {
                           if (small)
                               small_filter_forward_piece(e, piece, accumulate, worker);
                           else
                               simple_forward_piece(e, piece, accumulate, worker);
                       });
    source.ready->before(*stage);
    if (previous) previous->before(*stage);
    const bool maxima = d.kind == EdgeKind::max_filter || d.kind == EdgeKind::max_pool;
    const std::size_t voxels = target.stride * target.bundles * options_.patches;
    if (maxima || d.kind == EdgeKind::dropout)
        simples_[e]->state = arena_.floats(filters_small_windows(e) ? (voxels + 3) / 4 : voxels);
    target.writers.push_back(stage);
    return stage;
}

Stage* BundledNetwork::transfer_forward(Nodes& n, Stage* previous) {
    Stage* stage = add(Pass::forward, label(Pass::forward, int(WorkKind::node), n.index),
                       n.chunks * n.bundles * options_.patches, [this, &n](int piece, Worker&) {
                           const int part = piece % n.chunks, image = piece / n.chunks, bundle = image % n.bundles;
                           const std::size_t first = n.chunk * part, count = std::min(n.chunk, n.stride - first);
                           kernels::table().transfer_forward(n.image.data() + image * n.stride + first, count,
                                                             n.bias.data() + std::size_t(bundle) * V_, V_, n.d.transfer);
                       });
    previous->before(*stage);
    if (n.d.bias) gate(stage, n.bias_ready);
    n.writers.push_back(stage);
    return stage;
}

void BundledNetwork::build_forward() {
    forward_end_ = join(Pass::forward, label(Pass::forward, int(WorkKind::node), 0));
    int input = 0;
    for (auto& owned : nodes_) {
        Nodes& n = *owned;
        if (n.absorbed()) continue;
        if (n.d.input) {
            n.ready = load_stage(n, input++);
        } else {
            std::vector<int> incoming;
            for (int e = 0; e < int(edges_.size()); ++e)
                if (edges_[e].target == n.index) incoming.push_back(e);
            Stage* previous = nullptr;
            for (std::size_t i = 0; i < incoming.size(); ++i) {
                const bool last = i + 1 == incoming.size();
                previous = convs_[incoming[i]] ? conv_forward(incoming[i], i > 0, last, previous)
                                               : simple_forward(incoming[i], i > 0, previous);
            }
            const bool fused = convs_[incoming.back()] != nullptr;
            if (!fused && (n.d.bias || n.d.transfer != kernels::Transfer::linear)) previous = transfer_forward(n, previous);
            n.ready = previous;
        }
        n.ready->before(*forward_end_);
    }
    // The update of a layer that keeps no spectra reads the source's image itself: nobody may write it before.
    for (auto& conv : convs_) {
        if (!conv || (conv->plan.updates_from_spectra() && conv->keeps())) continue;
        for (Stage* writer : nodes_[edges_[conv->edge].source]->writers)
            gate(writer, conv->operands_free);
    }
    forward_end_->when_done([this](Worker* worker) {
        if (worker) raise_to(forward_path_ns_, worker->path_now());
        if (with_loss_ && !refused_.load(std::memory_order_relaxed)) return start_losses(worker);
        if (with_loss_) backward_done_.store(true, std::memory_order_release);
        forward_done_.store(true, std::memory_order_release);
        executor_->wake();
    });
}

// ---- backward

Stage* BundledNetwork::loss_stage(int output) {
    Nodes& n = *nodes_[outputs_[output]];
    const bool joint = options_.loss == kernels::Loss::softmax;
    Stage* stage = add(Pass::backward, {std::int16_t(Phase::loss), std::int16_t(WorkKind::loss), n.index, 0, 0},
                       options_.patches * (joint ? 1 : n.bundles),
                       [this, output](int piece, Worker& worker) { run_loss(output, piece, worker); });
    losses_->before(*stage);
    return stage;
}

Stage* BundledNetwork::conv_backward(int e, bool accumulate, bool last, Stage* previous) {
    Conv& conv = *convs_[e];
    Nodes &source = *nodes_[edges_[e].source], &target = *nodes_[edges_[e].target];
    for (std::size_t patch = 0; patch < conv.buffers.size(); ++patch) {
        tiled::Buffers& b = conv.buffers[patch];
        b.accumulate_input_gradient = accumulate;
        if (last && source.d.transfer != kernels::Transfer::linear && !source.derivative_noted) {
            b.activation = b.input;
            b.activation_transfer = tiled_transfer(source.d.transfer);
        }
    }
    Stage* joined = add_conv(Pass::backward, e, PieceOf::backward_join, -1);
    Stage* turn = std::exchange(backward_turn_, joined);
    for (const Slab& slab : add_slabs(Pass::backward, e, {target.gradient_ready, turn, previous, joined}))
        conv.gradient_transforms.push_back(slab.transform);
    return joined;
}

// The gradient passes through a maximum unchanged, so where nothing else leaves the source, its transfer function's
// derivative can be taken at the maxima alone, of which a pooling layer has far fewer than voxels.
bool BundledNetwork::takes_derivative_at_maxima(int e) const {
    const EdgeGroupDescription& d = edges_[e];
    const bool maxima = d.kind == EdgeKind::max_filter || d.kind == EdgeKind::max_pool;
    const Nodes& target = *nodes_[d.target];
    int leaving = 0, converging = 0;
    for (const auto& other : edges_) {
        leaving += other.source == d.source;
        converging += other.target == d.target;
    }
    const Nodes& source = *nodes_[d.source];
    return maxima && leaving == 1 && converging == 1 && !source.derivative_noted && !source.d.output && !target.d.bias &&
           target.d.transfer == kernels::Transfer::linear;
}

Stage* BundledNetwork::simple_backward(int e, bool accumulate, Stage* previous) {
    const EdgeGroupDescription& d = edges_[e];
    Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    const int count = parts(e, false) * target.bundles * options_.patches;
    Stage* stage = add(Pass::backward, label(Pass::backward, int(d.kind), e), count,
                       [this, e, accumulate, small = filters_small_windows(e)](int piece, Worker& worker) {
                           if (small)
                               small_filter_backward_piece(e, piece, accumulate, worker);
                           else
                               simple_backward_piece(e, piece, accumulate, worker);
                       });
    target.gradient_ready->before(*stage);
    if (previous) previous->before(*stage);
    simples_[e]->derivative_at_maxima = takes_derivative_at_maxima(e);
    if (simples_[e]->derivative_at_maxima) {
        source.bias_sums.assign(std::size_t(count) * V_, 0.0);
        if (source.d.bias) stage->when_done([this, &source, count](Worker*) { update_biases(source, count); });
    }
    return stage;
}

// The derivative of the transfer function f (in the backward pass, where it is not fused), and the biases' gradient.
Stage* BundledNetwork::transfer_backward(Nodes& n, Pass pass, kernels::Transfer f, Stage* previous) {
    const int count = n.chunks * n.bundles * options_.patches;
    n.bias_sums.assign(std::size_t(count) * V_, 0.0);
    // Pieces are numbered chunk by chunk of a bundle, then bundle by bundle.
    Stage* stage = add(pass, label(pass, int(WorkKind::node), n.index), count, [this, &n, f](int piece, Worker&) {
        const int part = piece % n.chunks, image = piece / n.chunks;
        const std::size_t first = image * n.stride + n.chunk * part;
        const std::size_t length = std::min(n.chunk, n.stride - n.chunk * part);
        kernels::table().transfer_backward(n.gradient.data() + first, n.image.data() + first, length, V_, f,
                                           &n.bias_sums[std::size_t(piece) * V_]);
    });
    previous->before(*stage);
    if (n.d.bias) stage->when_done([this, &n, count](Worker*) { update_biases(n, count); });
    return stage;
}

void BundledNetwork::build_backward() {
    losses_ = join(Pass::backward, label(Pass::backward, int(WorkKind::loss), 0));
    losses_->await(2);  // the caller (or the end of the forward pass), and the gate of the updates
    losses_->when_done([this](Worker*) { begin_backward(); });
    backward_end_ = join(Pass::backward, label(Pass::backward, int(WorkKind::node), 0));
    for (auto owned = nodes_.rbegin(); owned != nodes_.rend(); ++owned) {
        Nodes& n = **owned;
        if (!n.has_backward) continue;
        Stage* previous = nullptr;
        for (std::size_t output = 0; output < outputs_.size(); ++output)
            if (outputs_[output] == n.index) previous = loss_stage(int(output));
        std::vector<int> leaving;
        for (int e = int(edges_.size()) - 1; e >= 0; --e)
            if (edges_[e].source == n.index) leaving.push_back(e);
        bool derivative_taken = n.d.transfer == kernels::Transfer::linear || n.derivative_noted;
        bool biases_updated = !n.d.bias || n.derivative_noted;
        for (std::size_t i = 0; i < leaving.size(); ++i) {
            const int e = leaving[i];
            const bool accumulate = previous != nullptr, last = i + 1 == leaving.size();
            if (convs_[e]) {
                previous = conv_backward(e, accumulate, last, previous);
                if (last) derivative_taken = true;
            } else {
                if (takes_derivative_at_maxima(e)) derivative_taken = biases_updated = true;
                previous = simple_backward(e, accumulate, previous);
            }
        }
        if (!derivative_taken)
            previous = transfer_backward(n, Pass::backward, n.d.transfer, previous);
        else if (!biases_updated)
            transfer_backward(n, Pass::update, kernels::Transfer::linear, previous);
        n.gradient_ready = previous;
        previous->before(*backward_end_);
    }
    backward_end_->when_done([this](Worker* worker) {
        if (worker) raise_to(backward_path_ns_, worker->path_now());
        backward_done_.store(true, std::memory_order_release);
        executor_->wake();
    });
}

// ---- update

// The products of all slabs, which add to one sum; returns the last. Each comes before the gradient's spectra are overwritten
// by those of a later slab.
Stage* BundledNetwork::update_products(Conv& conv) {
    Stage* gradient_ready = nodes_[edges_[conv.edge].target]->gradient_ready;
    const int passing = conv.plan.passing_slabs;
    std::vector<Stage*> products;
    for (int slab = 0; slab < int(conv.gradient_transforms.size()); ++slab) {
        Stage* product = add_conv(Pass::update, conv.edge, PieceOf::update_product, slab);
        Stage* transform = conv.gradient_transforms[slab];
        transform->before(*product);
        if (slab >= passing) products[slab - passing]->before(*transform);
        if (!conv.keeps()) {
            Stage* again = add_conv(Pass::update, conv.edge, PieceOf::input_transform, slab);
            gradient_ready->before(*again);
            again->before(*product);
            if (slab >= passing) products[slab - passing]->before(*again);
        }
        if (!products.empty()) products.back()->before(*product);
        products.push_back(product);
    }
    conv.sums_begin = products.front();
    return products.back();
}

// Those of a node that follows a filtering convolution, which sums their gradients while it collects its own.
void BundledNetwork::sum_biases(Conv& conv, Stage* product) {
    Nodes& target = *nodes_[edges_[conv.edge].target];
    const int parts = tiled::bias_parts(conv.plan) * target.bundles;
    target.bias_sums.assign(std::size_t(parts) * options_.patches * V_, 0.0);
    for (int patch = 0; patch < options_.patches; ++patch)
        conv.buffers[patch].bias_sums = &target.bias_sums[std::size_t(patch) * parts * V_];
    Stage* summed = join(Pass::update, label(Pass::update, int(WorkKind::node), target.index));
    if (conv.plan.method == tiled::Method::direct)
        product->before(*summed);
    else
        for (Stage* transform : conv.gradient_transforms) transform->before(*summed);
    summed->when_done([this, &target, parts](Worker*) { update_biases(target, parts * options_.patches); });
}

void BundledNetwork::update_conv(int e) {
    Conv& conv = *convs_[e];
    Nodes& target = *nodes_[edges_[e].target];
    Stage* inverse = add_conv(Pass::update, e, PieceOf::update_inverse, -1);
    Stage* forward = add_conv(Pass::update, e, PieceOf::kernels_forward, -1);
    conv.prepare_forward = add_conv(Pass::prepare, e, PieceOf::kernels_forward, -1);
    conv.prepare_forward->await(1);
    if (conv.plan.fused || (!conv.has_backward && !tiled::takes_part(conv.plan, PieceOf::gradient_transform, false))) {
        conv.gradient_transforms = {target.gradient_ready};
    } else if (!conv.has_backward) {
        for (int slab = 0; slab < conv.plan.slabs; ++slab) {
            conv.gradient_transforms.push_back(add_conv(Pass::update, e, PieceOf::gradient_transform, slab));
            target.gradient_ready->before(*conv.gradient_transforms.back());
        }
    }
    Stage* product = update_products(conv);
    product->before(*inverse);
    conv.sums_end = inverse;
    product->when_done([&conv](Worker* worker) { conv.operands_free.open(worker); });
    if (target.derivative_noted && target.d.bias) sum_biases(conv, product);
    Stage* applied = inverse;
    if (options_.patches > 1) {
        const std::size_t floats = conv.kernels.size(), chunk = chunk_floats(floats);
        const int parts = int((floats + chunk - 1) / chunk);
        applied = add(Pass::update, label(Pass::update, int(EdgeKind::conv), e), parts,
                      [this, &conv, floats, chunk](int piece, Worker&) {
                          const std::size_t first = chunk * piece, count = std::min(chunk, floats - first);
                          float* sum = conv.gradient.data() + first;
                          for (int patch = 1; patch < options_.patches; ++patch)
                              kernels::table().add(sum, sum + patch * floats, count);
                          float* second = options_.second_moments ? conv.second_moment.data() + first : nullptr;
                          kernels::table().update(conv.kernels.data() + first, conv.momentum.data() + first, second, sum,
                                                  count, conv.buffers[0].step);
                      });
        inverse->before(*applied);
    }
    applied->before(*forward);
    forward->when_done([&conv](Worker* worker) { conv.kernels_ready.open(worker); });
    forward->before(*update_end_);
    if (!conv.has_backward) return;
    Stage* backward = add_conv(Pass::update, e, PieceOf::kernels_backward, -1);
    conv.prepare_backward = add_conv(Pass::prepare, e, PieceOf::kernels_backward, -1);
    conv.prepare_backward->await(1);
    applied->before(*backward);
    // The backward pass of this round still reads the old ones.
    nodes_[edges_[e].source]->gradient_ready->before(*backward);
    backward->before(*update_end_);
}

// The last layer's gradient is there first.
void BundledNetwork::take_turns_in_sums() {
    Stage* turn = nullptr;
    for (auto conv = convs_.rbegin(); conv != convs_.rend(); ++conv) {
        if (!*conv || !(*conv)->shares_sums) continue;
        if (turn) turn->before(*(*conv)->sums_begin);
        turn = (*conv)->sums_end;
    }
}

void BundledNetwork::build_update() {
    update_end_ = join(Pass::update, label(Pass::update, int(WorkKind::node), 0));
    for (std::size_t e = 0; e < convs_.size(); ++e)
        if (convs_[e]) update_conv(int(e));
    take_turns_in_sums();
    for (auto& stage : stages_[int(Pass::update)])
        if (stage->label.kind == int(WorkKind::node) && stage.get() != update_end_) stage->before(*update_end_);
    backward_end_->before(*update_end_);
    update_end_->when_done([this](Worker* worker) { updates_over_.open(worker); });
}

// Forward by distance to the output, backward by distance to the input, updates last, those first whose layers the next
// forward pass meets first. Within a layer the later phase goes first: what is begun is finished while it is in cache. A single
// worker has no gaps for updates to fill: it does each at once, while the spectra of gradients that it needs are in cache.
void BundledNetwork::set_priorities() {
    int next = 0;
    const auto assign = [&](Pass pass, bool reverse) {
        auto& stages = stages_[int(pass)];
        for (std::size_t i = 0; i < stages.size(); ++i)
            stages[reverse ? stages.size() - 1 - i : i]->set_priority(next++);
    };
    const bool alone = options_.threads == 1;
    if (!alone) assign(Pass::update, true);
    assign(Pass::forward, true);
    assign(Pass::backward, true);
    if (alone) assign(Pass::update, true);
    assign(Pass::prepare, false);
    executor_ = std::make_unique<Executor>(
        ExecutorOptions{options_.threads, options_.policy, std::max(1, next), options_.pin, options_.trace});
    for (auto& stages : stages_)
        for (auto& stage : stages) stage->set_executor(executor_.get());
}

}  // namespace znn
