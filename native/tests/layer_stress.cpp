// Single layers on a shared team: random problems by every method, called from several threads at once while the number of
// workers changes and idle memory is freed, in a work space that is poisoned between calls. Each result is compared to the bit
// with that of one worker, and closely with sums in double precision.
// usage: layer_stress [layers [seed]]
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "engine/layer.hpp"
#include "tests/check.hpp"
#include "tiled/tiled.hpp"

using namespace znn;
using namespace znn::tests;

namespace {

using Floats = std::vector<float>;

View view(Floats& values, long maps, Extent e) {
    const long y = e.x, z = long(e.y) * e.x, map = long(e.volume());
    return {values.data(), maps * map, map, z, y, 1};
}

Floats normal(std::size_t n, Random& random) {
    Floats values(n);
    for (float& v : values) v = random.normal();
    return values;
}

struct Plan {
    Method method;
    int bundle;
    Extent tile;
    bool keep;
};

// A problem, its arrays, and what a round gives: output, then gradients of input, kernels and bias.
struct Case {
    LayerProblem problem;
    int batch;
    Floats input, kernels, bias, gradient;

    explicit Case(Random& random) {
        LayerProblem& p = problem;
        p.groups = random.pick(0, 2) ? 1 : random.pick(1, 4);
        p.in_maps = p.groups * random.pick(1, 10), p.out_maps = p.groups * random.pick(1, 10);
        const auto extent = [&](int low, int high) {
            return Extent{random.pick(low, high), random.pick(low, high), random.pick(low, high)};
        };
        p.kernel = extent(1, 3), p.dilation = extent(1, 2), p.before = extent(0, 2), p.after = extent(0, 2);
        p.input = extent(1, 6) + p.dilation * (p.kernel - Extent{1, 1, 1});
        batch = random.pick(1, 3);
        input = normal(batch * p.in_maps * p.input.volume(), random);
        kernels = normal(p.out_maps * p.group_in() * p.kernel.volume(), random);
        bias = normal(p.out_maps, random);
        gradient = normal(batch * p.out_maps * p.output().volume(), random);
    }

    std::vector<Plan> plans() const {
        std::vector<Plan> found{{Method::direct, 1, {1, 1, 1}, false}, {Method::direct, 8, {1, 1, 1}, false}};
        const tiled::Problem p{problem.group_in(), problem.group_out(), problem.padded(), problem.kernel, problem.dilation};
        for (const Extent tile : tiled::candidate_tiles(p, 8, {}, 2)) {
            for (const bool keep : {false, true}) {
                found.push_back({Method::tiled, 8, tile, keep});
                if (p.in_maps <= 4) found.push_back({Method::fused, 8, tile, keep});
            }
        }
        return found;
    }

    std::vector<Floats> round(Team& team, const Plan& plan, bool poison) {
        const LayerProblem& p = problem;
        const auto layer = Layer::make(team, p, plan.method, plan.bundle, plan.tile, plan.keep);
        std::vector<Floats> results{Floats(gradient.size()), Floats(input.size()), Floats(kernels.size()), Floats(bias.size())};
        AlignedFloats kept = team.take(layer->kept_floats() * batch);
        const View x = view(input, p.in_maps, p.input), w = view(kernels, p.group_in(), p.kernel);
        if (poison) poison_space(team, layer->space_floats());
        layer->forward({batch, x, w, view(results[0], p.out_maps, p.output()), bias.data(), kept.data()});
        if (poison) poison_space(team, layer->space_floats());
        layer->backward({batch, kept.data() ? View{} : x, w, view(gradient, p.out_maps, p.output()), kept.data(),
                         view(results[1], p.in_maps, p.input), results[2].data(), results[3].data()});
        team.give_back(std::move(kept));
        return results;
    }

    // Nothing may depend on what an earlier call left behind.
    static void poison_space(Team& team, std::size_t floats) {
        Team::Turn turn(team);
        std::fill_n(turn.space(floats), floats, std::numeric_limits<float>::quiet_NaN());
    }

    // The same by the definition.
    std::vector<Floats> reference() const {
        const LayerProblem& p = problem;
        const Extent n = p.input, m = p.output(), k = p.kernel;
        std::vector<std::vector<double>> sums{std::vector<double>(gradient.size()), std::vector<double>(input.size()),
                                              std::vector<double>(kernels.size()), std::vector<double>(bias.size())};
        for (int b = 0; b < batch; ++b)
            for (int o = 0; o < p.out_maps; ++o)
                for (std::size_t at = 0; at < m.volume(); ++at) {
                    const std::size_t out = (std::size_t(b) * p.out_maps + o) * m.volume() + at;
                    const int z = int(at / (m.y * m.x)), y = int(at / m.x) % m.y, x = int(at) % m.x;
                    sums[0][out] += double(bias[o]);
                    sums[3][o] += double(gradient[out]);
                    for (int i = 0; i < p.group_in(); ++i)
                        for (std::size_t tap = 0; tap < k.volume(); ++tap) {
                            const int from_z = z + int(tap / (k.y * k.x)) * p.dilation.z - p.before.z;
                            const int from_y = y + int(tap / k.x) % k.y * p.dilation.y - p.before.y;
                            const int from_x = x + int(tap) % k.x * p.dilation.x - p.before.x;
                            if (from_z < 0 || from_z >= n.z || from_y < 0 || from_y >= n.y || from_x < 0 || from_x >= n.x) continue;
                            const int map = o / p.group_out() * p.group_in() + i;
                            const std::size_t in = (std::size_t(b) * p.in_maps + map) * n.volume() +
                                                   (std::size_t(from_z) * n.y + from_y) * n.x + from_x;
                            const std::size_t weight = (std::size_t(o) * p.group_in() + i) * k.volume() + tap;
                            sums[0][out] += double(input[in]) * double(kernels[weight]);
                            sums[1][in] += double(gradient[out]) * double(kernels[weight]);
                            sums[2][weight] += double(gradient[out]) * double(input[in]);
                        }
                }
        std::vector<Floats> results;
        for (const auto& sum : sums) results.emplace_back(sum.begin(), sum.end());
        return results;
    }
};

double difference(const std::vector<Floats>& a, const std::vector<Floats>& b) {
    double worst = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        double largest = 1e-6, apart = 0;
        for (std::size_t j = 0; j < a[i].size(); ++j) {
            if (!std::isfinite(a[i][j])) return 1e30;
            largest = std::max(largest, double(std::fabs(b[i][j])));
            apart = std::max(apart, std::fabs(double(a[i][j]) - double(b[i][j])));
        }
        worst = std::max(worst, apart / largest);
    }
    return worst;
}

void stress(int number, unsigned seed) {
    Random random(seed * 7919 + unsigned(number));
    Case one(random);
    const auto expected = one.reference();
    Team calm(1), busy(random.pick(2, 5));
    for (const Plan& plan : one.plans()) {
        const std::string name = "layer " + std::to_string(number) + ", method " + std::to_string(int(plan.method)) + ", bundle " +
                                 std::to_string(plan.bundle) + ", tile " + to_string(plan.tile) + (plan.keep ? ", kept" : "");
        const auto alone = one.round(calm, plan, true);
        expect(difference(alone, expected) < 1e-5, name + ": wrong by " + std::to_string(difference(alone, expected)));
        std::vector<std::thread> callers;
        for (int caller = 0; caller < 3; ++caller)
            callers.emplace_back([&, caller] {
                for (int i = 0; i < 2; ++i) {
                    if (caller == 0) busy.set_threads(1 + (number + i) % 4);
                    if (caller == 1 && i == 1) busy.free_idle_memory();
                    expect(one.round(busy, plan, caller == 2) == alone, name + ": differs from one worker");
                }
            });
        for (std::thread& caller : callers) caller.join();
    }
    expect(busy.bytes_in_use() == 0, "layer " + std::to_string(number) + ": blocks were not given back");
}

}  // namespace

int main(int argc, char** argv) {
    const int layers = argc > 1 ? std::atoi(argv[1]) : 40;
    const unsigned seed = argc > 2 ? unsigned(std::atol(argv[2])) : 1;
    for (int i = 0; i < layers; ++i) stress(i, seed);
    return report();
}
