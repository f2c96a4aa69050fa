// The whole engine: random small networks, many rounds, 1 to 8 threads, every policy, sum and memoization switch. Each
// network is also run calmly (one thread, ordered sums): ordered sums must agree to the bit, the others closely.
// usage: engine_stress [networks [seed [libfftw3f]]]     (without a library only direct convolution is run)
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "base/topology.hpp"
#include "engine/bundled.hpp"
#include "engine/exchange.hpp"
#include "engine/network.hpp"
#include "fft/fftw.hpp"
#include "tests/check.hpp"

using namespace znn;
using namespace znn::tests;

namespace {

using Arrays = std::vector<std::vector<float>>;

struct Description {
    std::vector<NodeGroupDescription> nodes;
    std::vector<EdgeGroupDescription> edges;
};

int& axis(Extent& e, int i) { return i == 0 ? e.z : i == 1 ? e.y : e.x; }

// An edge that fits below a source of this extent; gives the extent of its target.
EdgeGroupDescription random_edge(Extent in, bool one_to_one, Extent& out, Random& random) {
    EdgeGroupDescription edge;
    edge.kind = one_to_one ? EdgeKind(random.pick(0, 5)) : EdgeKind::conv;
    edge.depthwise = one_to_one && edge.kind == EdgeKind::conv;
    edge.ratio = 0.3f;
    edge.rate = random.coin() ? 1.0f : 0.5f;
    out = in;
    for (int i = 0; i < 3; ++i) {
        const int n = axis(in, i), size = random.pick(1, std::min(3, n)), spacing = size > 1 ? random.pick(1, (n - 1) / (size - 1)) : 1;
        const int gap = std::min(spacing, 2);
        switch (edge.kind) {
            case EdgeKind::conv: axis(edge.kernel, i) = size, axis(edge.sparsity, i) = gap, axis(out, i) = n - gap * (size - 1); break;
            case EdgeKind::max_filter:
                axis(edge.window, i) = size, axis(edge.sparsity, i) = gap, axis(out, i) = n - gap * (size - 1);
                break;
            case EdgeKind::max_pool:
                axis(edge.window, i) = size, axis(edge.stride, i) = size, axis(out, i) = (n - size) / size + 1;
                break;
            case EdgeKind::crop: axis(edge.offset, i) = random.pick(0, size - 1), axis(out, i) = n - size + 1; break;
            default: break;
        }
    }
    return edge;
}

// A chain of groups with some extra edges that converge on its nodes, from the group before or from further back. wide: some
// groups have maps for several bundles.
Description random_network(bool fft, bool wide, Random& random) {
    Description net;
    const auto add_node = [&](int maps, Extent extent) {
        NodeGroupDescription node;
        node.name = "n" + std::to_string(net.nodes.size());
        node.maps = maps;
        node.extent = extent;
        net.nodes.push_back(node);
    };
    const auto connect = [&](EdgeGroupDescription edge, int source, int target) {
        edge.name = "e" + std::to_string(net.edges.size());
        edge.source = source;
        edge.target = target;
        if (edge.kind == EdgeKind::conv && fft && random.coin()) {
            edge.method = Method::fft;
            edge.transform = sublattice_extent(net.nodes[std::size_t(source)].extent, edge.sparsity);
        }
        net.edges.push_back(edge);
    };
    add_node(random.pick(1, 3), {random.pick(1, 5), random.pick(4, 10), random.pick(4, 12)});
    net.nodes[0].input = true;
    const int layers = random.pick(2, 6);
    for (int i = 1; i <= layers; ++i) {
        const NodeGroupDescription before = net.nodes.back();
        const bool one_to_one = random.coin();
        Extent out;
        const EdgeGroupDescription edge = random_edge(before.extent, one_to_one, out, random);
        add_node(one_to_one ? before.maps : wide && random.coin() ? random.pick(9, 20) : random.pick(1, 5), out);
        NodeGroupDescription& node = net.nodes.back();
        node.bias = random.coin();
        node.transfer = kernels::Transfer(random.coin() ? 2 : random.pick(0, 3));
        node.output = i == layers || random.pick(0, 5) == 0;
        connect(edge, i - 1, i);
        for (int extra = random.pick(0, 2); extra > 0; --extra) {
            const int source = random.pick(0, i - 1);
            const NodeGroupDescription& from = net.nodes[std::size_t(source)];
            EdgeGroupDescription joint;
            const Extent room = from.extent - out;
            joint.kind = from.maps == node.maps && random.coin() ? EdgeKind::crop : EdgeKind::conv;
            joint.kernel = room + Extent{1, 1, 1};
            if (joint.kind == EdgeKind::crop || joint.kernel.volume() <= 64) connect(joint, source, i);
        }
    }
    // Edges in the order of their targets, sources before targets: already so.
    return net;
}

NetworkOptions random_options(Random& random) {
    NetworkOptions options;
    options.threads = random.pick(1, 8);
    options.policy = Policy(random.pick(0, 3));
    options.sum = SumKind(random.pick(0, 2));
    options.allocator = random.pick(0, 3) ? Allocator::pools : Allocator::malloc;
    options.memoize_kernels = random.coin();
    options.memoize_images = random.coin();
    options.memoize_gradients = random.coin();
    options.trace = random.pick(0, 3) == 0;
    options.pin = random.pick(0, 3) == 0;
    return options;
}

std::size_t voxels(const NodeGroupDescription& node, int patches) {
    return node.extent.volume() * std::size_t(node.maps) * std::size_t(patches);
}

std::size_t kernel_floats(const Description& net, const EdgeGroupDescription& edge) {
    const int from = edge.depthwise ? 1 : net.nodes[std::size_t(edge.source)].maps;
    return edge.kernel.volume() * std::size_t(from) * std::size_t(net.nodes[std::size_t(edge.target)].maps);
}

std::vector<float> random_array(std::size_t floats, Random& random) {
    std::vector<float> array(floats);
    for (float& x : array) x = random.normal();
    return array;
}

std::vector<const float*> pointers(const Arrays& arrays) {
    std::vector<const float*> all;
    for (const auto& array : arrays) all.push_back(array.data());
    return all;
}

// The same data and calls for every run of a network, from one seed; everything that comes back.
class Script {
public:
    Script(const Description& net, const NetworkOptions& options, unsigned seed)
        : net_(net), patches_(options.patches), random_(seed) {
        if (options.bundle == 1)
            network_ = std::make_unique<Network>(net.nodes, net.edges, options);
        else
            network_ = std::make_unique<BundledNetwork>(net.nodes, net.edges, options);
        for (std::size_t i = 0; i < net.edges.size(); ++i)
            if (net.edges[i].kind == EdgeKind::conv) {
                auto kernels = random_array(kernel_floats(net, net.edges[i]), random_);
                const float spread = 1.0f / std::sqrt(float(net.edges[i].kernel.volume()));
                for (float& w : kernels) w *= spread;
                network_->set_kernels(int(i), NetworkBase::Which::value, kernels.data());
            }
    }

    Arrays run(int rounds) {
        const bool trace = network_->options().trace;
        for (int round = 0; round < rounds; ++round) {
            network_->set_step({0.02f, 0.5f, 0.001f, 1.0f});
            switch (random_.pick(0, 5)) {
                case 0:
                    network_->forward(pointers(data(true)), true);
                    keep_outputs();
                    network_->backward(pointers(data(false)));
                    break;
                case 1:
                    network_->forward(pointers(data(true)), false);
                    keep_outputs();
                    break;
                case 2: network_->forward(pointers(data(true)), true); break;  // never used
                default: {
                    const Arrays inputs = data(true), targets = data(false);
                    const std::vector<const float*> weights(targets.size(), nullptr);
                    results_.push_back({float(network_->train_step(pointers(inputs), pointers(targets), weights))});
                }
            }
            if (random_.pick(0, 7) == 0) network_->sync();
            if (random_.pick(0, 7) == 0) keep_parameters(NetworkBase::Which::value);
        }
        keep_parameters(NetworkBase::Which::value);
        keep_parameters(NetworkBase::Which::momentum);
        if (trace) expect(!network_->executor().take_events().empty(), "nothing was traced");
        return std::move(results_);
    }

private:
    Arrays data(bool inputs) {
        Arrays arrays;
        for (const auto& node : net_.nodes)
            if (inputs ? node.input : node.output) arrays.push_back(random_array(voxels(node, patches_), random_));
        return arrays;
    }
    void keep_outputs() {
        for (std::size_t i = 0; i < net_.nodes.size(); ++i)
            if (net_.nodes[i].output) {
                results_.emplace_back(voxels(net_.nodes[i], patches_));
                network_->copy_output(int(i), results_.back().data());
            }
    }
    void keep_parameters(NetworkBase::Which which) {
        for (std::size_t i = 0; i < net_.edges.size(); ++i)
            if (net_.edges[i].kind == EdgeKind::conv) {
                results_.emplace_back(kernel_floats(net_, net_.edges[i]));
                network_->get_kernels(int(i), which, results_.back().data());
            }
        for (std::size_t i = 0; i < net_.nodes.size(); ++i) {
            results_.emplace_back(std::size_t(net_.nodes[i].maps));
            network_->get_biases(int(i), which, results_.back().data());
        }
    }

    const Description& net_;
    const int patches_;
    Random random_;
    std::unique_ptr<NetworkBase> network_;
    Arrays results_;
};

bool identical(const Arrays& a, const Arrays& b) {
    if (a.size() != b.size()) return false;
    for (std::size_t i = 0; i < a.size(); ++i)
        if (a[i].size() != b[i].size() || std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) != 0) return false;
    return true;
}

// The largest difference, relative to the largest value of an array or to 1.
double difference(const Arrays& a, const Arrays& b) {
    if (a.size() != b.size()) return INFINITY;
    double worst = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        double largest = 1, apart = 0;
        for (std::size_t j = 0; j < a[i].size(); ++j) {
            if (!std::isfinite(a[i][j])) return INFINITY;
            largest = std::max(largest, double(std::abs(a[i][j])));
            apart = std::max(apart, double(std::abs(a[i][j] - b[i][j])));
        }
        worst = std::max(worst, apart / largest);
    }
    return worst;
}

std::string describe(const NetworkOptions& o, int network) {
    const char* policies[] = {"priority", "fifo", "lifo", "stealing"};
    const char* sums[] = {"wait-free", "locked", "ordered"};
    return "network " + std::to_string(network) + ", " + std::to_string(o.threads) + " threads, " + policies[int(o.policy)] + ", " +
           sums[int(o.sum)] + ", memoize " + std::to_string(o.memoize_kernels) + std::to_string(o.memoize_images) +
           std::to_string(o.memoize_gradients) + ", patches " + std::to_string(o.patches) + ", loss " + std::to_string(int(o.loss));
}

void stress(int number, bool fft, unsigned seed) {
    Random random(seed * 1000 + unsigned(number));
    const Description net = random_network(fft, false, random);
    const int rounds = 8;
    NetworkOptions calm;
    calm.sum = SumKind::ordered;
    calm.patches = random.pick(0, 2) ? 1 : 2;
    calm.loss = kernels::Loss(random.pick(0, 2));
    calm.input_gradient = random.coin();
    calm.seed = seed;
    const Arrays expected = Script(net, calm, seed).run(rounds);
    for (int i = 0; i < 4; ++i) {
        NetworkOptions options = random_options(random);
        options.patches = calm.patches;
        options.loss = calm.loss;
        options.input_gradient = calm.input_gradient;
        options.seed = calm.seed;
        const Arrays results = Script(net, options, seed).run(rounds);
        if (options.sum == SumKind::ordered)
            expect(identical(results, expected), describe(options, number) + ": differs from one thread");
        else
            expect(difference(results, expected) < 1e-2,
                   describe(options, number) + ": differs by " + std::to_string(difference(results, expected)));
    }
    Description direct = net;
    for (auto& edge : direct.edges) edge.method = Method::direct;
    const double apart = difference(Script(direct, calm, seed).run(rounds), expected);
    expect(apart < 1e-2, "network " + std::to_string(number) + ": direct and fft differ by " + std::to_string(apart));
}

// A random network with a method of bundles for every convolution.
Description bundled_network(Random& random) {
    Description net = random_network(false, true, random);
    for (auto& edge : net.edges) {
        if (edge.kind != EdgeKind::conv || edge.depthwise || random.coin()) continue;
        const tiled::Problem problem{net.nodes[edge.source].maps, net.nodes[edge.target].maps, net.nodes[edge.source].extent,
                                     edge.kernel, edge.sparsity};
        const auto tiles = tiled::candidate_tiles(problem, 8, {}, 4);  // fit bundles of 16 as well
        if (tiles.empty()) continue;
        edge.method = problem.in_maps <= 4 && random.coin() ? Method::fused : Method::tiled;
        edge.transform = tiles[std::size_t(random.pick(0, int(tiles.size()) - 1))];
        edge.memoize = random.coin();
    }
    return net;
}

// Convolutions with the filters after them that they do themselves: of a single map directly, and of several by one tile.
Description filtering_network(Random& random) {
    Description net;
    Extent extent{random.pick(7, 8), random.pick(8, 12), random.pick(8, 12)};
    net.nodes.push_back({.name = "n0", .maps = 1, .extent = extent, .input = true});
    const auto add = [&](EdgeGroupDescription edge, Extent size, int maps, bool plain) {
        const int source = int(net.nodes.size()) - 1;
        edge.name = "e" + std::to_string(source), edge.source = source, edge.target = source + 1;
        extent = valid_extent(extent, size, edge.sparsity);
        NodeGroupDescription node{.name = "n" + std::to_string(source + 1), .maps = maps, .extent = extent};
        if (!plain) node.bias = random.coin(), node.transfer = random.coin() ? kernels::Transfer::relu : kernels::Transfer::tanh;
        net.nodes.push_back(node), net.edges.push_back(edge);
    };
    const Extent two{2, 2, 2};
    for (const int sparsity : {1, 2}) {
        EdgeGroupDescription conv{.kind = EdgeKind::conv}, filter{.kind = EdgeKind::max_filter};
        conv.kernel = filter.window = two, conv.sparsity = filter.sparsity = {sparsity, sparsity, sparsity};
        if (sparsity > 1) conv.method = Method::tiled, conv.transform = sublattice_extent(extent, conv.sparsity);
        const int maps = random.pick(1, 20);
        add(conv, two, maps, false);
        add(filter, two, maps, true);
    }
    EdgeGroupDescription last{.kind = EdgeKind::conv};
    last.kernel = {1, 2, 2};
    add(last, last.kernel, random.pick(1, 3), false);
    net.nodes.back().output = true;
    return net;
}

// The engine with bundles of maps: the same bits for any threads and policy, and nearly those of single maps; unless there are so many
// windows that in some of them rounding decides which of two voxels is the larger.
void stress_bundles(int number, Description net, bool many_windows, Random& random, unsigned seed) {
    NetworkOptions calm;
    calm.sum = SumKind::ordered;
    calm.patches = random.pick(0, 2) ? 1 : 2;
    calm.loss = kernels::Loss(random.pick(0, 2));
    calm.input_gradient = random.coin();
    calm.seed = seed;
    calm.bundle = tiled::has_bundle(16) && random.coin() ? 16 : 8;
    const Arrays expected = Script(net, calm, seed).run(8);
    for (int i = 0; i < 3; ++i) {
        NetworkOptions options = calm;
        options.threads = random.pick(2, 8);
        options.policy = Policy(random.pick(0, 3));
        options.pin = false;
        expect(identical(Script(net, options, seed).run(8), expected), "bundles, " + describe(options, number) + ": differs");
    }
    if (many_windows) return;
    for (auto& edge : net.edges) edge.method = Method::direct;
    calm.bundle = 1;
    const double apart = difference(Script(net, calm, seed).run(8), expected);
    expect(apart < 1e-2, "network " + std::to_string(number) + ": bundles and single maps differ by " + std::to_string(apart));
}

}  // namespace

int main(int argc, char** argv) {
    const int networks = argc > 1 ? std::atoi(argv[1]) : 60;
    const unsigned seed = argc > 2 ? unsigned(std::atol(argv[2])) : 1;
    if (argc > 3) {
        set_fftw_rigour("estimate");  // the same plan in every run
        load_fftw(argv[3]);
    }
    expect((exchange_rate(8) > 0) == (usable_physical_cores().size() > 1), "two cores share a layer");
    for (int i = 0; i < networks; ++i) {
        stress(i, argc > 3, seed);
        Random random(seed * 1000 + unsigned(i));
        stress_bundles(i, bundled_network(random), false, random, seed);
        stress_bundles(i, filtering_network(random), true, random, seed);
    }
    return report();
}
