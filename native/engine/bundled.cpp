#include "engine/bundled.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "engine/dropout.hpp"
#include "engine/node.hpp"

namespace znn {

using Work = tiled::Buffer;
using PieceOf = tiled::Phase;

namespace {

constexpr std::size_t chunk_floats = std::size_t{1} << 16;  // pointwise pieces of about 20 us

tiled::Transfer tiled_transfer(kernels::Transfer f) { return static_cast<tiled::Transfer>(int(f)); }

}  // namespace

// ---------------------------------------------------------------- construction

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
    set_priorities();
}

BundledNetwork::~BundledNetwork() {
    if (executor_) executor_->drain();
}

void BundledNetwork::plan_conv(int e) {
    const EdgeGroupDescription& d = edges_[e];
    if (d.depthwise)
        throw std::runtime_error("edge group " + d.name + " is depthwise, which bundles of maps do not support: use bundle 1");
    const auto plan = [&](const tiled::Problem& problem) {
        switch (d.method) {
            case Method::tiled: return tiled::plan_tiled(problem, V_, d.transform, {}, d.memoize);
            case Method::fused: return tiled::plan_fused(problem, V_, d.transform);
            default: return tiled::plan_direct(problem, V_);
        }
    };
    tiled::Problem problem{groups_[d.source].maps, groups_[d.target].maps, groups_[d.source].extent, d.kernel, d.sparsity};
    convs_[e] = std::make_unique<Conv>();
    convs_[e]->plan = plan(problem);
    const int pool = pool_to_absorb(e);
    if (pool < 0 || !tiled::can_pool(convs_[e]->plan, edges_[pool].window)) return;
    problem.pool = edges_[pool].window;
    convs_[e]->plan = plan(problem);
    absorb(pool);
}

// The max-pooling edge by disjoint windows that alone follows a convolution, if one does: -1 otherwise.
int BundledNetwork::pool_to_absorb(int e) const {
    const int node = edges_[e].target;
    int pool = -1, converging = 0, leaving = 0, others = 0;
    for (int other = 0; other < int(edges_.size()); ++other) {
        converging += edges_[other].target == node;
        if (edges_[other].source == node) pool = other, ++leaving;
    }
    if (converging != 1 || leaving != 1 || groups_[node].output) return -1;
    const EdgeGroupDescription& d = edges_[pool];
    for (const auto& other : edges_) others += other.target == d.target;
    const NodeGroupDescription& pooled = groups_[d.target];
    const bool plain = !pooled.bias && pooled.transfer == kernels::Transfer::linear && !pooled.output;
    return d.kind == EdgeKind::max_pool && d.window == d.stride && others == 1 && plain ? pool : -1;
}

// The node before the pooling takes the place of the one after it: biases and monotone transfer functions commute with maxima.
void BundledNetwork::absorb(int pool) {
    EdgeGroupDescription& d = edges_[pool];
    const int node = d.source, pooled = d.target;
    groups_[node].extent = groups_[pooled].extent;
    for (auto& other : edges_)
        if (other.source == pooled) other.source = node;
    d.source = d.target = -1;  // gone
    groups_[pooled].extent = {0, 0, 0};
}

void BundledNetwork::build_nodes() {
    for (std::size_t i = 0; i < groups_.size(); ++i) {
        nodes_.push_back(std::make_unique<Nodes>());
        Nodes& n = *nodes_.back();
        n.d = groups_[i];
        n.index = int(i);
        n.bundles = (n.d.maps + V_ - 1) / V_;
        n.volume = n.d.extent.volume();
        n.stride = n.volume * V_;
        n.chunks = int((n.stride + chunk_floats - 1) / chunk_floats);
        n.has_backward = !n.absorbed() && (options_.input_gradient || n.d.output || n.d.bias);
        n.image = AlignedFloats(n.stride * n.bundles * options_.patches);
        n.bias = AlignedFloats(std::size_t(n.bundles) * V_);
        n.bias_momentum = AlignedFloats(std::size_t(n.bundles) * V_);
        if (options_.second_moments) n.bias_second_moment = AlignedFloats(std::size_t(n.bundles) * V_);
        if (n.d.input) inputs_.push_back(int(i));
        if (n.d.output) outputs_.push_back(int(i));
    }
    for (const auto& d : edges_)
        if (d.kind == EdgeKind::conv || (d.source >= 0 && nodes_[d.source]->has_backward))
            nodes_[d.target]->has_backward = true;
    for (auto& n : nodes_)
        if (n->has_backward) n->gradient = AlignedFloats(n->stride * n->bundles * options_.patches);
}

void BundledNetwork::build_conv(int e) {
    const EdgeGroupDescription& d = edges_[e];
    Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    Conv* conv = convs_[e].get();
    conv->edge = e;
    conv->has_backward = source.has_backward;
    const std::size_t floats = tiled::kernel_floats(conv->plan);
    conv->kernels = AlignedFloats(floats);
    conv->momentum = AlignedFloats(floats);
    if (options_.second_moments) conv->second_moment = AlignedFloats(floats);
    if (options_.patches > 1) conv->gradient = AlignedFloats(floats * options_.patches);
    if (conv->plan.pools()) conv->largest.resize(target.stride * target.bundles * options_.patches);
    for (int patch = 0; patch < options_.patches; ++patch) {
        tiled::Buffers b;
        b.input = source.image.data() + std::size_t(patch) * source.bundles * source.stride;
        b.input_stride = source.stride;
        b.output = target.image.data() + std::size_t(patch) * target.bundles * target.stride;
        b.output_stride = target.stride;
        if (conv->plan.pools()) b.largest = conv->largest.data() + std::size_t(patch) * target.bundles * target.stride;
        b.output_gradient = target.gradient.data() + std::size_t(patch) * target.bundles * target.stride;
        b.output_gradient_stride = target.stride;
        if (conv->has_backward) {
            b.input_gradient = source.gradient.data() + std::size_t(patch) * source.bundles * source.stride;
            b.input_gradient_stride = source.stride;
        }
        b.kernels = conv->kernels.data();
        b.momenta = conv->momentum.data();
        if (options_.second_moments) b.second_moments = conv->second_moment.data();
        b.update = options_.patches == 1;
        if (options_.patches > 1) b.kernel_gradient = conv->gradient.data() + patch * floats;
        conv->buffers.push_back(b);
    }
}

// Transformed kernels, spectra of images and gradients belong to a layer; results on their way back from the frequency
// domain do not outlive their layer's turn, so all layers share one buffer for them.
void BundledNetwork::share_buffers() {
    std::size_t spectra = 0, halo = 0;
    const std::size_t patches = options_.patches;
    for (auto& conv : convs_) {
        if (!conv) continue;
        const auto bytes = [&](Work b) { return tiled::buffer_bytes(conv->plan, b); };
        spectra = std::max({spectra, bytes(Work::output_spectra), bytes(Work::input_gradient_spectra)});
        halo = std::max(halo, bytes(Work::halo));
    }
    const auto floats = [](std::size_t bytes) { return (bytes + 63) / 64 * 16; };
    shared_spectra_ = AlignedFloats(floats(spectra) * patches);
    shared_halo_ = AlignedFloats(floats(halo) * patches);
    for (auto& conv : convs_) {
        if (!conv) continue;
        for (const Work b : {Work::kernels_forward, Work::kernels_backward}) {
            conv->own.emplace_back(floats(tiled::buffer_bytes(conv->plan, b)));
            for (auto& buffers : conv->buffers) buffers.work[int(b)] = conv->own.back().data();
        }
        for (const Work b : {Work::input_spectra, Work::gradient_spectra, Work::update_spectra}) {
            const std::size_t each = floats(tiled::buffer_bytes(conv->plan, b));
            conv->own.emplace_back(each * patches);
            for (std::size_t p = 0; p < patches; ++p) conv->buffers[p].work[int(b)] = conv->own.back().data() + p * each;
        }
        for (std::size_t p = 0; p < patches; ++p) {
            conv->buffers[p].work[int(Work::output_spectra)] = shared_spectra_.data() + p * floats(spectra);
            conv->buffers[p].work[int(Work::input_gradient_spectra)] = shared_spectra_.data() + p * floats(spectra);
            conv->buffers[p].work[int(Work::halo)] = shared_halo_.data() + p * floats(halo);
        }
    }
}

TaskLabel BundledNetwork::label(Pass pass, int kind, int group) const {
    const Phase phase = pass == Pass::forward ? Phase::forward : pass == Pass::backward ? Phase::backward : Phase::update;
    return {std::int16_t(phase), std::int16_t(kind), group, 0, 0};
}

Stage* BundledNetwork::add(Pass pass, TaskLabel label, int pieces, Stage::Body body) {
    auto& stages = stages_[int(pass)];
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
               [&conv, phase, first, count, scratch](int piece, Worker& worker) {
                   tiled::run_piece(conv.plan, phase, first + piece % count, conv.buffers[piece / count],
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

Stage* BundledNetwork::conv_forward(int e, bool accumulate, bool last, Stage* previous) {
    Conv& conv = *convs_[e];
    Nodes &source = *nodes_[edges_[e].source], &target = *nodes_[edges_[e].target];
    for (std::size_t patch = 0; patch < conv.buffers.size(); ++patch) {
        conv.buffers[patch].accumulate_output = accumulate;
        if (!last) continue;
        if (target.d.bias) conv.buffers[patch].bias = target.bias.data();
        conv.buffers[patch].transfer = tiled_transfer(target.d.transfer);
    }
    Stage* end = join(Pass::forward, label(Pass::forward, int(EdgeKind::conv), e));
    // Layers take turns in the shared buffer of spectra.
    Stage* turn = std::exchange(forward_turn_, end);
    std::vector<Stage*> products, inverses;
    for (int slab = 0; slab < conv.plan.slabs; ++slab) {
        Stage* transform = add_conv(Pass::forward, e, PieceOf::input_transform, slab);
        Stage* product = add_conv(Pass::forward, e, PieceOf::forward_product, slab);
        Stage* inverse = add_conv(Pass::forward, e, PieceOf::forward_inverse, slab);
        source.ready->before(*transform);
        transform->before(*product);
        product->before(*inverse);
        inverse->before(*end);
        if (turn) turn->before(*product);
        if (slab >= conv.plan.passing_slabs) inverses[slab - conv.plan.passing_slabs]->before(*product);
        if (slab >= conv.plan.kept_slabs) products[slab - conv.plan.kept_slabs]->before(*transform);
        products.push_back(product);
        inverses.push_back(inverse);
        if (previous) previous->before(*inverse);
        gate(transform, conv.operands_free);
        gate(product, conv.kernels_ready);
        gate(inverse, conv.kernels_ready);  // direct layers have no product
        if (last && target.d.bias) gate(inverse, target.bias_ready);
        target.writers.push_back(inverse);
    }
    target.writers.push_back(end);
    return end;
}

Stage* BundledNetwork::simple_forward(int e, bool accumulate, Stage* previous) {
    const EdgeGroupDescription& d = edges_[e];
    Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    Stage* stage = add(Pass::forward, label(Pass::forward, int(d.kind), e), parts(e, true) * target.bundles * options_.patches,
                       [this, e, accumulate](int piece, Worker& worker) {
                           simple_forward_piece(e, piece, accumulate, worker);
                       });
    source.ready->before(*stage);
    if (previous) previous->before(*stage);
    const bool maxima = d.kind == EdgeKind::max_filter || d.kind == EdgeKind::max_pool;
    if (maxima || d.kind == EdgeKind::dropout)
        simples_[e]->state = AlignedFloats(target.stride * target.bundles * options_.patches);
    target.writers.push_back(stage);
    return stage;
}

Stage* BundledNetwork::transfer_forward(Nodes& n, Stage* previous) {
    Stage* stage = add(Pass::forward, label(Pass::forward, int(WorkKind::node), n.index),
                       n.chunks * n.bundles * options_.patches, [this, &n](int piece, Worker&) {
                           const int part = piece % n.chunks, image = piece / n.chunks, bundle = image % n.bundles;
                           const std::size_t first = chunk_floats * part, count = std::min(chunk_floats, n.stride - first);
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
        if (!conv || (conv->plan.method == tiled::Method::tiled && !conv->plan.fused && conv->keeps())) continue;
        for (Stage* writer : nodes_[edges_[conv->edge].source]->writers)
            gate(writer, conv->operands_free);
    }
    forward_end_->when_done([this](Worker* worker) {
        if (worker) raise_to(forward_path_ns_, worker->path_now());
        if (with_loss_) return start_losses(worker);
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
        if (last && source.d.transfer != kernels::Transfer::linear) {
            b.activation = b.input;
            b.activation_transfer = tiled_transfer(source.d.transfer);
        }
    }
    Stage* joined = add_conv(Pass::backward, e, PieceOf::backward_join, -1);
    Stage* turn = std::exchange(backward_turn_, joined);
    std::vector<Stage*> products, inverses;
    for (int slab = 0; slab < conv.plan.slabs; ++slab) {
        Stage* transform = add_conv(Pass::backward, e, PieceOf::gradient_transform, slab);
        Stage* product = add_conv(Pass::backward, e, PieceOf::backward_product, slab);
        Stage* inverse = add_conv(Pass::backward, e, PieceOf::backward_inverse, slab);
        target.gradient_ready->before(*transform);
        transform->before(*product);
        product->before(*inverse);
        inverse->before(*joined);
        if (turn) turn->before(*product);
        if (slab >= conv.plan.passing_slabs) inverses[slab - conv.plan.passing_slabs]->before(*product);
        if (slab >= conv.plan.kept_slabs) products[slab - conv.plan.kept_slabs]->before(*transform);
        if (previous) previous->before(*inverse);
        products.push_back(product);
        inverses.push_back(inverse);
        if (conv.keeps()) conv.gradient_transforms.push_back(transform);
    }
    if (!conv.keeps()) conv.gradient_transforms = {joined};
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
    return maxima && leaving == 1 && converging == 1 && !nodes_[d.source]->d.output && !target.d.bias &&
           target.d.transfer == kernels::Transfer::linear;
}

Stage* BundledNetwork::simple_backward(int e, bool accumulate, Stage* previous) {
    const EdgeGroupDescription& d = edges_[e];
    Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    const int count = parts(e, false) * target.bundles * options_.patches;
    Stage* stage = add(Pass::backward, label(Pass::backward, int(d.kind), e), count,
                       [this, e, accumulate](int piece, Worker& worker) {
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
        const std::size_t first = image * n.stride + chunk_floats * part;
        const std::size_t length = std::min(chunk_floats, n.stride - chunk_floats * part);
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
    losses_->when_done([this](Worker*) { arm_backward(); });
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
        bool derivative_taken = n.d.transfer == kernels::Transfer::linear, biases_updated = !n.d.bias;
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

// The products of all slabs, which add to one sum; returns the last.
Stage* BundledNetwork::update_products(Conv& conv) {
    std::vector<Stage*> products;
    for (int slab = 0; slab < conv.plan.slabs; ++slab) {
        std::vector<Stage*> before = conv.gradient_transforms;
        if (!conv.keeps()) {
            before = {add_conv(Pass::update, conv.edge, PieceOf::input_transform, slab),
                      add_conv(Pass::update, conv.edge, PieceOf::gradient_transform, slab)};
            for (Stage* transform : before) {
                for (Stage* stage : conv.gradient_transforms) stage->before(*transform);
                if (slab >= conv.plan.kept_slabs) products[slab - conv.plan.kept_slabs]->before(*transform);
            }
        }
        Stage* product = add_conv(Pass::update, conv.edge, PieceOf::update_product, slab);
        for (Stage* transform : before) transform->before(*product);
        if (!products.empty()) products.back()->before(*product);
        products.push_back(product);
    }
    return products.back();
}

void BundledNetwork::update_conv(int e) {
    Conv& conv = *convs_[e];
    Nodes& target = *nodes_[edges_[e].target];
    Stage* inverse = add_conv(Pass::update, e, PieceOf::update_inverse, -1);
    Stage* forward = add_conv(Pass::update, e, PieceOf::kernels_forward, -1);
    conv.prepare_forward = add_conv(Pass::prepare, e, PieceOf::kernels_forward, -1);
    conv.prepare_forward->await(1);
    const bool direct = conv.plan.method == tiled::Method::direct;
    if (conv.plan.fused || (!conv.has_backward && (direct || !conv.keeps()))) {
        conv.gradient_transforms = {target.gradient_ready};
    } else if (!conv.has_backward) {
        conv.gradient_transforms.push_back(add_conv(Pass::update, e, PieceOf::gradient_transform, -1));
        target.gradient_ready->before(*conv.gradient_transforms.back());
    }
    Stage* product = update_products(conv);
    product->before(*inverse);
    product->when_done([&conv](Worker* worker) { conv.operands_free.open(worker); });
    Stage* applied = inverse;
    if (options_.patches > 1) {
        const std::size_t floats = conv.kernels.size();
        const int parts = int((floats + chunk_floats - 1) / chunk_floats);
        applied = add(Pass::update, label(Pass::update, int(EdgeKind::conv), e), parts,
                      [this, &conv, floats](int piece, Worker&) {
                          const std::size_t first = chunk_floats * piece, count = std::min(chunk_floats, floats - first);
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

void BundledNetwork::build_update() {
    update_end_ = join(Pass::update, label(Pass::update, int(WorkKind::node), 0));
    for (std::size_t e = 0; e < convs_.size(); ++e)
        if (convs_[e]) update_conv(int(e));
    for (auto& stage : stages_[int(Pass::update)])
        if (stage->label.kind == int(WorkKind::node) && stage.get() != update_end_) stage->before(*update_end_);
    backward_end_->before(*update_end_);
    update_end_->when_done([this](Worker* worker) { updates_over_.open(worker); });
}

// Forward by distance to the output, backward by distance to the input, updates last, those first whose layers the next
// forward pass meets first. Within a layer the later phase goes first: what is begun is finished while it is in cache.
void BundledNetwork::set_priorities() {
    int next = 0;
    const auto assign = [&](Pass pass, bool reverse) {
        auto& stages = stages_[int(pass)];
        for (std::size_t i = 0; i < stages.size(); ++i)
            stages[reverse ? stages.size() - 1 - i : i]->set_priority(next++);
    };
    assign(Pass::update, true);
    assign(Pass::forward, true);
    assign(Pass::backward, true);
    assign(Pass::prepare, false);
    executor_ = std::make_unique<Executor>(
        ExecutorOptions{options_.threads, options_.policy, std::max(1, next), options_.pin, options_.trace});
    for (auto& stages : stages_)
        for (auto& stage : stages) stage->set_executor(executor_.get());
}

// ---------------------------------------------------------------- pieces

// [patch][map][voxel] -> [patch][bundle][voxel][V], one chunk of one bundle.
void BundledNetwork::load(const Nodes& n, const float* data, int piece) {
    const int part = piece % n.chunks, image = piece / n.chunks, patch = image / n.bundles, bundle = image % n.bundles;
    const std::size_t first = n.volume * part / n.chunks, end = n.volume * (part + 1) / n.chunks;
    const int lanes = std::min(V_, n.d.maps - bundle * V_);
    float* out = n.image.data() + std::size_t(image) * n.stride;
    for (int lane = 0; lane < lanes; ++lane) {
        const float* in = data + (std::size_t(patch) * n.d.maps + bundle * V_ + lane) * n.volume;
        for (std::size_t i = first; i < end; ++i) out[i * V_ + lane] = in[i];
    }
}

void BundledNetwork::unbundle(const AlignedFloats& images, const Nodes& n, float* out) const {
    for (int patch = 0; patch < options_.patches; ++patch)
        for (int map = 0; map < n.d.maps; ++map, out += n.volume) {
            const float* in = images.data() + (std::size_t(patch) * n.bundles + map / V_) * n.stride + map % V_;
            for (std::size_t i = 0; i < n.volume; ++i) out[i] = in[i * V_];
        }
}

// The loss of one bundle of one patch (softmax: of all maps of one patch) and its gradient over the output voxels.
void BundledNetwork::run_loss(int output, int piece, Worker& worker) {
    const kernels::Table& f = kernels::table();
    const Nodes& n = *nodes_[outputs_[output]];
    const bool joint = options_.loss == kernels::Loss::softmax;
    const int patch = joint ? piece : piece / n.bundles, first = joint ? 0 : piece % n.bundles * V_;
    const int maps = joint ? n.d.maps : std::min(V_, n.d.maps - first);
    float* y = worker.scratch.get(2 * maps * n.volume, 1);
    float* g = y + maps * n.volume;
    const std::size_t at = (std::size_t(patch) * n.d.maps + first) * n.volume;
    const float* target = target_data_[output] + at;
    const float* weight = !given_ && weight_data_[output] ? weight_data_[output] + at : nullptr;
    const auto lane = [&](const AlignedFloats& images, int map) {
        return images.data() + (std::size_t(patch) * n.bundles + map / V_) * n.stride + map % V_;
    };
    double loss = 0;
    if (given_) {
        std::memcpy(g, target, maps * n.volume * sizeof(float));
    } else {
        std::vector<const float*> ys, ts;
        std::vector<float*> gs;
        for (int map = 0; map < maps; ++map) {
            const float* in = lane(n.image, first + map);
            for (std::size_t i = 0; i < n.volume; ++i) y[map * n.volume + i] = in[i * V_];
            ys.push_back(y + map * n.volume);
            ts.push_back(target + map * n.volume);
            gs.push_back(g + map * n.volume);
        }
        if (joint) loss = f.loss_softmax(ys.data(), ts.data(), weight, gs.data(), maps, n.volume);
        for (int map = 0; map < maps && !joint; ++map) {
            const auto one = options_.loss == kernels::Loss::squared ? f.loss_squared : f.loss_binomial;
            loss += one(ys[map], ts[map], weight ? weight + map * n.volume : nullptr, gs[map], n.volume);
        }
    }
    const float scale = 1.0f / (float(n.volume) * float(options_.patches));
    for (int map = 0; map < maps; ++map) {
        float* out = lane(n.gradient, first + map);
        for (std::size_t i = 0; i < n.volume; ++i) out[i * V_] = g[map * n.volume + i] * scale;
    }
    int base = 0;
    for (int before = 0; before < output; ++before)
        base += options_.patches * (joint ? 1 : nodes_[outputs_[before]]->bundles);
    losses_sum_[base + piece] = loss * double(scale);
}

// A bundle can be cut along z where max-pooling's windows do not overlap; max-filtering's do, so that only its forward
// pass, which reads planes twice but writes its own, is cut.
int BundledNetwork::parts(int e, bool forward) const {
    const EdgeGroupDescription& d = edges_[e];
    const Nodes& target = *nodes_[d.target];
    if (d.kind == EdgeKind::max_pool && d.window == d.stride) return std::min(target.d.extent.z, target.chunks);
    if (d.kind != EdgeKind::max_filter || !forward) return 1;
    return std::clamp(target.d.extent.z / (1 + 4 * d.sparsity.z * (d.window.z - 1)), 1, target.chunks);
}

// Which part of which bundle a piece of a simple edge is about: extents there, and where it begins.
BundledNetwork::Cut BundledNetwork::cut_of(int e, int piece, bool forward) const {
    const EdgeGroupDescription& d = edges_[e];
    const Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    const int cuts = parts(e, forward), part = piece % cuts;
    Cut cut{piece / cuts, source.d.extent, target.d.extent, 0, 0, 0};
    const int first = cut.out.z * part / cuts, end = cut.out.z * (part + 1) / cuts;
    cut.in_first = cut.image * source.stride;
    cut.out_first = cut.image * target.stride + std::size_t(first) * cut.out.y * cut.out.x * V_;
    if (cuts == 1) return cut;
    const bool filter = d.kind == EdgeKind::max_filter;
    cut.first_voxel = first * (filter ? 1 : d.stride.z) * cut.in.y * cut.in.x;
    cut.in_first += std::size_t(cut.first_voxel) * V_;
    cut.in.z = filter ? end - first + d.sparsity.z * (d.window.z - 1) : (end - first) * d.stride.z;
    cut.out.z = end - first;
    return cut;
}

void BundledNetwork::simple_forward_piece(int e, int piece, bool accumulate, Worker& worker) {
    const kernels::Table& f = kernels::table();
    const EdgeGroupDescription& d = edges_[e];
    const Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    const auto [image, in, out, in_first, out_first, first_voxel] = cut_of(e, piece, true);
    const float* from = source.image.data() + in_first;
    float* to = target.image.data() + out_first;
    const std::size_t floats = out.volume() * V_;
    float* result = accumulate ? worker.scratch.get(floats, 1) : to;
    float* state = simples_[e]->state.size() ? simples_[e]->state.data() + out_first : nullptr;
    switch (d.kind) {
        case EdgeKind::max_pool:
            f.max_pool(from, in, d.window, d.stride, V_, result, reinterpret_cast<std::int32_t*>(state));
            break;
        case EdgeKind::max_filter: {
            const std::size_t bytes = kernels::max_filter_scratch_bytes(in, d.window, d.sparsity, V_);
            std::int32_t* index = reinterpret_cast<std::int32_t*>(state);
            f.max_filter(from, in, d.window, d.sparsity, V_, result, index, worker.scratch.get((bytes + 3) / 4, 0));
            for (std::size_t i = 0; first_voxel && i < floats; ++i) index[i] += first_voxel;  // of the image, not the part
            break;
        }
        case EdgeKind::dropout:
            std::memcpy(result, from, floats * sizeof(float));
            if (!training_) break;
            fill_dropout_mask({options_.seed, round_, e, image % target.bundles * V_, image / target.bundles}, d.ratio,
                              state, target.volume, V_);
            f.multiply(result, state, floats);
            break;
        default: f.extract(from, in, result, out, d.offset, V_, false); break;
    }
    if (accumulate) f.add(to, result, floats);
}

void BundledNetwork::simple_backward_piece(int e, int piece, bool accumulate, Worker& worker) {
    const kernels::Table& f = kernels::table();
    const EdgeGroupDescription& d = edges_[e];
    Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    const auto [image, in, out, in_first, out_first, first_voxel] = cut_of(e, piece, false);
    const std::size_t floats = in.volume() * V_;
    float* gradient = target.gradient.data() + out_first;
    float* to = source.gradient.data() + in_first;
    float* result = accumulate ? worker.scratch.get(floats, 1) : to;
    float* state = simples_[e]->state.size() ? simples_[e]->state.data() + out_first : nullptr;
    switch (d.kind) {
        case EdgeKind::max_pool:
        case EdgeKind::max_filter:
            if (simples_[e]->derivative_at_maxima)
                f.transfer_backward(gradient, target.image.data() + out_first, out.volume() * V_, V_,
                                    source.d.transfer, &source.bias_sums[std::size_t(piece) * V_]);
            std::memset(result, 0, floats * sizeof(float));
            f.max_backward(gradient, reinterpret_cast<std::int32_t*>(state), out.volume(), V_, result);
            break;
        case EdgeKind::dropout:
            std::memcpy(result, gradient, floats * sizeof(float));
            f.multiply(result, state, floats);
            break;
        default: f.embed(gradient, out, result, in, d.offset, V_); break;
    }
    if (accumulate) f.add(to, result, floats);
}

// Adds up the parts' sums in a fixed order and takes the step. `parts` are [patch][bundle][part of a bundle].
void BundledNetwork::update_biases(Nodes& n, int parts) {
    const int each = parts / (n.bundles * options_.patches);
    std::vector<float> gradient(std::size_t(n.bundles) * V_);
    for (int bundle = 0; bundle < n.bundles; ++bundle)
        for (int lane = 0; lane < V_; ++lane) {
            double sum = 0;
            for (int patch = 0; patch < options_.patches; ++patch)
                for (int part = 0; part < each; ++part)
                    sum += n.bias_sums[(std::size_t(patch * n.bundles + bundle) * each + part) * V_ + lane];
            if (bundle * V_ + lane < n.d.maps) gradient[std::size_t(bundle) * V_ + lane] = float(sum);
        }
    float* second_moment = options_.second_moments ? n.bias_second_moment.data() : nullptr;
    kernels::table().update(n.bias.data(), n.bias_momentum.data(), second_moment, gradient.data(), gradient.size(), n.step);
    n.bias_ready.open(nullptr);
}

// ---------------------------------------------------------------- rounds

void BundledNetwork::prepare_kernels() {
    bool any = false;
    for (auto& conv : convs_) {
        if (!conv || !conv->stale) continue;
        for (Stage* stage : {conv->prepare_forward, conv->prepare_backward})
            if (stage) {
                stage->arm();
                stage->arrive(nullptr);
            }
        conv->stale = false;
        any = true;
    }
    if (any) sync();
}

void BundledNetwork::start_forward(const std::vector<const float*>& inputs, bool training) {
    prepare_kernels();
    input_data_ = inputs;
    training_ = training;
    forward_done_.store(false);
    backward_done_.store(false);
    forward_path_ns_.store(0);
    backward_path_ns_.store(0);
    for (auto& stage : stages_[int(Pass::forward)]) stage->arm();  // before anything can arrive
    for (auto& [stage, gate] : gated_)
        if (gate->pass(*stage)) stage->arrive(nullptr);
    for (Stage* stage : first_stages_) stage->arrive(nullptr);
}

void BundledNetwork::wait_for(const std::atomic<bool>& flag) {
    executor_->wait([&] { return flag.load(std::memory_order_acquire); });
    if (!executor_->failed()) return;
    executor_->drain();
    for (auto& conv : convs_)
        if (conv) conv->stale = true;
    trained_forward_ = false;
    executor_->rethrow_failure();
}

void BundledNetwork::forward(const std::vector<const float*>& inputs, bool training) {
    trained_forward_ = with_loss_ = false;
    start_forward(inputs, training);
    wait_for(forward_done_);
    trained_forward_ = training;
}

// The losses wait for the updates of the last round to be over (the forward pass FORCEd all but the transforms of kernels
// for backward): only then may backward and update be armed for this round.
void BundledNetwork::start_losses(Worker* worker) {
    losses_->arm();
    if (updates_over_.pass(*losses_)) losses_->arrive(worker);
    losses_->arrive(worker);
}

void BundledNetwork::arm_backward() {
    for (const Pass pass : {Pass::backward, Pass::update})
        for (auto& stage : stages_[int(pass)])
            if (stage.get() != losses_) stage->arm();
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
    const int in = nodes_[d.source]->d.maps, out = nodes_[d.target]->d.maps;
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
    convs_[e]->stale = true;
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
            bytes += tiled::buffer_bytes(conv->plan, Work::kernels_forward) +
                     tiled::buffer_bytes(conv->plan, Work::kernels_backward);
    return bytes;
}

std::size_t BundledNetwork::task_count() const {
    std::size_t count = 0;
    for (const Pass pass : {Pass::forward, Pass::backward, Pass::update})
        for (const auto& stage : stages_[int(pass)]) count += stage->pieces();
    return count;
}

}  // namespace znn
