// What the pieces of the bundled engine do that are not of convolutions: inputs, losses, pooling, dropout, crops, biases.
#include "engine/bundled.hpp"

#include <algorithm>
#include <cstring>

#include "engine/dropout.hpp"

namespace znn {

// [patch][map][voxel] -> [patch][bundle][voxel][lanes], one chunk of one bundle. Whether it is finite is seen here, where it is read
// anyway and by all workers: beside a round of a small network a reading more is felt.
void BundledNetwork::load(const Nodes& n, const float* data, int piece) {
    const int part = piece % n.chunks, image = piece / n.chunks, patch = image / n.bundles, bundle = image % n.bundles;
    const std::size_t first = n.volume * part / n.chunks, end = n.volume * (part + 1) / n.chunks;
    const int lanes = std::min(V_, n.d.maps - bundle * V_);
    float* out = n.image.data() + std::size_t(image) * n.stride;
    for (int lane = 0; lane < lanes; ++lane) {
        const float* in = data + (std::size_t(patch) * n.d.maps + bundle * V_ + lane) * n.volume;
        if (!kernels::table().all_finite(in + first, end - first)) return refused_.store(true, std::memory_order_relaxed);
        if (n.lanes == 1) {
            std::copy(in + first, in + end, out + first);
            continue;
        }
        for (std::size_t i = first; i < end; ++i) out[i * V_ + lane] = in[i];
    }
}

void BundledNetwork::throw_if_refused() const {
    if (refused_.load(std::memory_order_relaxed)) throw NotFinite();
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

bool BundledNetwork::filters_small_windows(int e) const {
    return edges_[e].kind == EdgeKind::max_filter && edges_[e].window.volume() <= kernels::small_window;
}

// Where the source's ReLU had its derivative taken at the maxima, that is 0 or 1 and known when they are found.
bool BundledNetwork::notes_positive_maxima(int e) const {
    return simples_[e]->derivative_at_maxima && nodes_[edges_[e].source]->d.transfer == kernels::Transfer::relu;
}

// A bundle can be cut along z where max-pooling's windows do not overlap; max-filtering's do, so that only its forward
// pass, which reads planes twice but writes its own, is cut. Small windows are filtered by rows, in both passes.
int BundledNetwork::parts(int e, bool forward) const {
    const EdgeGroupDescription& d = edges_[e];
    const Nodes& target = *nodes_[d.target];
    if (filters_small_windows(e)) {
        const Nodes& written = forward ? target : *nodes_[d.source];
        return std::min(written.d.extent.z * written.d.extent.y, written.chunks);
    }
    if (d.kind == EdgeKind::max_pool && d.window == d.stride) return std::min(target.d.extent.z, nodes_[d.source]->chunks);
    if (d.kind != EdgeKind::max_filter || !forward) return 1;
    return std::clamp(target.d.extent.z / (1 + 4 * d.sparsity.z * (d.window.z - 1)), 1, target.chunks);
}

// Pieces of simple edges go part by part through all images, so that a worker's share of them is, as in convolutions, a region
// of all maps.
BundledNetwork::PartOf BundledNetwork::part_of(int e, int piece, bool forward) const {
    const int images = nodes_[edges_[e].target]->bundles * options_.patches;
    return {piece % images, piece / images, parts(e, forward)};
}

// Which part of which bundle a piece of a simple edge is about: extents there, and where it begins.
BundledNetwork::Cut BundledNetwork::cut_of(int e, int piece, bool forward) const {
    const EdgeGroupDescription& d = edges_[e];
    const Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    const auto [image, part, cuts] = part_of(e, piece, forward);
    Cut cut{image, source.d.extent, target.d.extent, 0, 0, 0};
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
                                    source.d.transfer, &source.bias_sums[std::size_t(part_of(e, piece, false).sum()) * V_]);
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

namespace {

// Rows (z, y) of part `part` of `parts`, as floats of an image of `bundle` maps.
struct Rows {
    int first, last;
    std::size_t begin, floats;

    Rows(Extent n, int bundle, int part, int parts)
        : first(int(long(n.z) * n.y * part / parts)), last(int(long(n.z) * n.y * (part + 1) / parts)),
          begin(std::size_t(first) * n.x * bundle), floats(std::size_t(last - first) * n.x * bundle) {}
};

}  // namespace

void BundledNetwork::small_filter_forward_piece(int e, int piece, bool accumulate, Worker& worker) {
    const EdgeGroupDescription& d = edges_[e];
    const Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    const auto [image, part, cuts] = part_of(e, piece, true);
    const Rows rows(target.d.extent, V_, part, cuts);
    const std::size_t first = image * target.stride + rows.begin;
    float* to = target.image.data() + first;
    float* result = accumulate ? worker.scratch.get(rows.floats, 1) : to;
    std::int8_t* place = reinterpret_cast<std::int8_t*>(simples_[e]->state.data()) + first;
    kernels::table().small_max_filter(source.image.data() + image * source.stride, source.d.extent, d.window, d.sparsity, V_,
                                      rows.first, rows.last, result, training_ ? place : nullptr,
                                      notes_positive_maxima(e));
    if (accumulate) kernels::table().add(to, result, rows.floats);
}

void BundledNetwork::small_filter_backward_piece(int e, int piece, bool accumulate, Worker& worker) {
    const EdgeGroupDescription& d = edges_[e];
    Nodes &source = *nodes_[d.source], &target = *nodes_[d.target];
    const PartOf place = part_of(e, piece, false);
    const auto [image, part, cuts] = place;
    const Rows rows(source.d.extent, V_, part, cuts);
    const std::size_t first = image * source.stride + rows.begin, out = image * target.stride;
    float* to = source.gradient.data() + first;
    float* result = accumulate ? worker.scratch.get(rows.floats, 1) : to;
    const kernels::Table& f = kernels::table();
    f.small_max_filter_backward(target.gradient.data() + out,
                                reinterpret_cast<const std::int8_t*>(simples_[e]->state.data()) + out, source.d.extent,
                                d.window, d.sparsity, V_, rows.first, rows.last, result);
    if (accumulate) f.add(to, result, rows.floats);
    if (!simples_[e]->derivative_at_maxima) return;
    // While the rows are in the cache; that of a ReLU has been taken, and only the biases' sums are left.
    const kernels::Transfer left = notes_positive_maxima(e) ? kernels::Transfer::linear : source.d.transfer;
    f.transfer_backward(to, source.image.data() + first, rows.floats, V_, left,
                        &source.bias_sums[std::size_t(place.sum()) * V_]);
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

}  // namespace znn
