// Layers of the bundled engine: which method each convolution takes, whether it absorbs the pooling or filtering after it, and memory.
#include "engine/bundled.hpp"

#include <algorithm>
#include <stdexcept>

#include "engine/plan_layer.hpp"

namespace znn {

using Work = tiled::Buffer;

void BundledNetwork::plan_conv(int e) {
    const EdgeGroupDescription& d = edges_[e];
    tiled::Machine machine;
    machine.workers = (options_.threads + options_.patches - 1) / options_.patches;  // every patch has its pieces
    const auto plan = [&](const tiled::Problem& problem) {
        return plan_layer(problem, d.method, V_, d.transform, machine, d.memoize);
    };
    tiled::Problem problem{groups_[d.source].maps, groups_[d.target].maps, groups_[d.source].extent, d.kernel, d.sparsity};
    problem.depthwise = d.depthwise;
    convs_[e] = std::make_unique<Conv>();
    convs_[e]->plan = plan(problem);
    const int pool = pool_to_absorb(e);
    if (pool < 0) return;
    problem.filter = edges_[pool].kind == EdgeKind::max_filter;
    if (!tiled::can_pool(convs_[e]->plan, edges_[pool].window, problem.filter)) return;
    problem.pool = edges_[pool].window;
    convs_[e]->plan = plan(problem);
    absorb(pool);
}

// The max-pooling edge by disjoint windows, or -filtering edge of the same sparsity, that alone follows a convolution, if one does:
// -1 otherwise.
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
    const bool disjoint = d.kind == EdgeKind::max_pool && d.window == d.stride;
    const bool alike = d.kind == EdgeKind::max_filter && d.sparsity == edges_[e].sparsity;
    return (disjoint || alike) && others == 1 && plain ? pool : -1;
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

// A single map that comes in and that only convolutions read stays as it comes: in a bundle it would be moved V-fold.
bool BundledNetwork::packs(int node) const {
    const NodeGroupDescription& d = groups_[node];
    if (!d.input || d.output || d.bias || d.maps > 1 || d.transfer != kernels::Transfer::linear || options_.input_gradient)
        return false;
    for (std::size_t e = 0; e < edges_.size(); ++e)
        if (edges_[e].source == node && !(convs_[e] && tiled::packs_input(convs_[e]->plan))) return false;
    return true;
}

void BundledNetwork::build_nodes() {
    for (std::size_t i = 0; i < groups_.size(); ++i) {
        nodes_.push_back(std::make_unique<Nodes>());
        Nodes& n = *nodes_.back();
        n.d = groups_[i];
        n.index = int(i);
        n.bundles = (n.d.maps + V_ - 1) / V_;
        n.volume = n.d.extent.volume();
        n.lanes = packs(int(i)) ? 1 : V_;
        n.stride = n.volume * n.lanes;
        n.cut(chunk_floats(n.stride * n.bundles * options_.patches));
        n.has_backward = !n.absorbed() && (options_.input_gradient || n.d.output || n.d.bias);
        n.image = arena_.floats(n.stride * n.bundles * options_.patches);
        n.bias = arena_.floats(std::size_t(n.bundles) * V_);
        n.bias_momentum = arena_.floats(std::size_t(n.bundles) * V_);
        if (options_.second_moments) n.bias_second_moment = arena_.floats(std::size_t(n.bundles) * V_);
        if (n.d.input) inputs_.push_back(int(i));
        if (n.d.output) outputs_.push_back(int(i));
    }
    for (const auto& d : edges_)
        if (d.kind == EdgeKind::conv || (d.source >= 0 && nodes_[d.source]->has_backward))
            nodes_[d.target]->has_backward = true;
    for (auto& n : nodes_)
        if (n->has_backward) n->gradient = arena_.floats(n->stride * n->bundles * options_.patches);
}

void BundledNetwork::build_conv(int e) {
    const EdgeGroupDescription& d = edges_[e];
    Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    Conv* conv = convs_[e].get();
    conv->edge = e;
    conv->has_backward = source.has_backward;
    const std::size_t floats = tiled::kernel_floats(conv->plan);
    conv->kernels = arena_.floats(floats);
    conv->momentum = arena_.floats(floats);
    if (options_.second_moments) conv->second_moment = arena_.floats(floats);
    if (options_.patches > 1) conv->gradient = arena_.floats(floats * options_.patches);
    if (conv->plan.pools()) conv->largest.resize(target.stride * target.bundles * options_.patches);
    for (int patch = 0; patch < options_.patches; ++patch) {
        tiled::Buffers b;
        b.input = source.image.data() + std::size_t(patch) * source.bundles * source.stride;
        b.input_stride = source.stride;
        b.packed_input = source.lanes == 1;
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
// domain do not outlive their layer's turn, so all layers share one buffer for them. The sums of the kernels' gradients are
// shared only where they are large: with turns to take, small updates could not fill the gaps that others leave.
void BundledNetwork::share_buffers() {
    std::size_t spectra = 0, halo = 0, sums = 0;
    const std::size_t patches = options_.patches;
    for (auto& conv : convs_) {
        if (!conv) continue;
        const auto bytes = [&](Work b) { return tiled::buffer_bytes(conv->plan, b); };
        spectra = std::max({spectra, bytes(Work::output_spectra), bytes(Work::input_gradient_spectra)});
        halo = std::max(halo, bytes(Work::halo));
        conv->shares_sums = bytes(Work::update_spectra) >= tiled::shared_sums_bytes;
        if (conv->shares_sums) sums = std::max(sums, bytes(Work::update_spectra));
    }
    const auto floats = [](std::size_t bytes) { return (bytes + 63) / 64 * 16; };
    float* const shared_spectra = arena_.floats(floats(spectra) * patches).data();
    float* const shared_halo = arena_.floats(floats(halo) * patches).data();
    float* const shared_sums = arena_.floats(floats(sums) * patches).data();
    for (auto& conv : convs_) {
        if (!conv) continue;
        for (const Work b : {Work::kernels_forward, Work::kernels_backward}) {
            float* const own = arena_.floats(floats(tiled::buffer_bytes(conv->plan, b))).data();
            for (auto& buffers : conv->buffers) buffers.work[int(b)] = own;
        }
        for (const Work b : {Work::input_spectra, Work::gradient_spectra, Work::update_spectra}) {
            if (b == Work::update_spectra && conv->shares_sums) continue;
            const std::size_t each = floats(tiled::buffer_bytes(conv->plan, b));
            float* const own = arena_.floats(each * patches).data();
            for (std::size_t p = 0; p < patches; ++p) conv->buffers[p].work[int(b)] = own + p * each;
        }
        for (std::size_t p = 0; p < patches; ++p) {
            conv->buffers[p].work[int(Work::output_spectra)] = shared_spectra + p * floats(spectra);
            conv->buffers[p].work[int(Work::input_gradient_spectra)] = shared_spectra + p * floats(spectra);
            conv->buffers[p].work[int(Work::halo)] = shared_halo + p * floats(halo);
            if (conv->shares_sums) conv->buffers[p].work[int(Work::update_spectra)] = shared_sums + p * floats(sums);
        }
    }
}

}  // namespace znn
