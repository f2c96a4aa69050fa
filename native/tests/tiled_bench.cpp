// Times the phases of one layer on one thread: tiled FFT at given or chosen tiles, or direct.
//
//     tiled_bench IN_MAPS OUT_MAPS INPUT KERNEL [TILE | fused:TILE | direct | depthwise | best] [SECONDS] [SPARSITY] [BUNDLE] [POOL | filter:WINDOW]
//
// INPUT, KERNEL, TILE, SPARSITY and POOL, WINDOW (of max-pooling or -filtering of the output) are z,y,x or one number for a cube. `best`
// (the default) tries the model's first candidates and the direct method and reports the fastest. Prints the shortest time of
// every phase, its prediction, and the sums; of products and of direct convolution also the share of the core's peak, the
// median of the rounds.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include <time.h>

#include "base/aligned.hpp"
#include "tiled/machine.hpp"

namespace {

using namespace znn;
using namespace znn::tiled;

const char* const kNames[kPhases] = {"kernels_forward", "kernels_backward", "input_transform", "forward_product",
                                     "forward_inverse", "gradient_transform", "backward_product", "backward_inverse",
                                     "backward_join", "update_product", "update_inverse"};

// Seconds this thread has had on a core: other programs on the machine disturb it least.
double now() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

Extent parse(const std::string& text) {
    Extent e;
    if (std::sscanf(text.c_str(), "%d,%d,%d", &e.z, &e.y, &e.x) != 3) e.z = e.y = e.x = std::atoi(text.c_str());
    return e;
}

constexpr double kPeakOperations = 5e8;  // milliseconds, as the first tenths of one are slower

struct Result {
    double phase[kPhases], total = 0;
    std::vector<double> peaks[kPhases];  // of each round, seconds of kPeakOperations at the core's peak over the phase's
};

// All phases once, slab by slab.
void time_round(const LayerPlan& p, const Buffers& b, float* scratch, Result& r) {
    double spent[kPhases] = {};
    auto run = [&](Phase phase, int slab) {
        const double begin = now();
        for (int i = first_piece(p, phase, slab); i < first_piece(p, phase, slab + 1); ++i)
            run_piece(p, phase, i, b, scratch);
        spent[int(phase)] += now() - begin;
    };
    run(Phase::kernels_forward, 0), run(Phase::kernels_backward, 0);
    for (int slab = 0; slab < p.slabs; ++slab)
        for (Phase phase : {Phase::input_transform, Phase::forward_product, Phase::forward_inverse}) run(phase, slab);
    for (int slab = 0; slab < p.slabs; ++slab)
        for (Phase phase : {Phase::gradient_transform, Phase::backward_product, Phase::backward_inverse,
                            Phase::update_product})
            run(phase, slab);
    run(Phase::backward_join, 0), run(Phase::update_inverse, 0);
    const double peak = peak_seconds(kPeakOperations);
    for (int i = 0; i < kPhases; ++i) {
        r.phase[i] = std::min(r.phase[i], spent[i]);
        r.peaks[i].push_back(peak / spent[i]);
    }
}

Result measure(const LayerPlan& p, double seconds) {
    const std::size_t in = p.problem.input.volume() * p.bundle, out = p.problem.pooled(p.output).volume() * p.bundle;
    Arena arena;
    std::mt19937 random(1);
    std::uniform_real_distribution<float> uniform(-0.5f, 0.5f);
    auto take = [&](std::size_t floats) {
        const AlignedFloats values = arena.floats(floats);
        std::generate_n(values.data(), floats, [&] { return uniform(random); });
        return values.data();
    };
    Buffers b;
    b.input = take(in * p.in_bundles), b.input_gradient = take(in * p.in_bundles);
    b.output = take(out * p.out_bundles), b.output_gradient = take(out * p.out_bundles);
    b.input_stride = b.input_gradient_stride = in;
    b.output_stride = b.output_gradient_stride = out;
    std::vector<std::int8_t> largest(p.pools() ? out * p.out_bundles : 0);
    b.largest = p.pools() ? largest.data() : nullptr;
    b.kernels = take(kernel_floats(p));
    b.kernel_gradient = take(kernel_floats(p));
    b.bias = take(p.out_bundles * p.bundle);
    b.transfer = Transfer::relu;
    b.packed_input = packs_input(p);  // a single map as data comes
    for (int i = 0; i < kBuffers; ++i) b.work[i] = take(buffer_bytes(p, Buffer(i)) / sizeof(float) + 16);
    float* scratch = take(scratch_bytes(p) / sizeof(float));

    Result r;
    std::fill_n(r.phase, kPhases, 1e9);
    const double start = now();
    for (int round = 0; round < 3 || now() - start < seconds; ++round) time_round(p, b, scratch, r);
    for (double t : r.phase) r.total += t;
    return r;
}

double median(std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
}

void report(const LayerPlan& p, const Result& r, const Machine& machine) {
    const Cost cost = predict(p, machine);
    const double flop = 2.0 * p.problem.fan_in() * p.problem.out_maps * double(p.problem.kernel.volume()) *
                        double(p.output.volume());
    const double multiply = 8.0 * p.problem.in_maps * p.out_bundles * p.bundle * double(p.pencils) * p.axis[0].T * p.tiles;
    for (int i = 0; i < kPhases; ++i) {
        const double rate = p.method == Method::tiled ? (i == 3 || i == 6 || i == 9 ? multiply : 0)
                                                      : (i == 4 || i == 7 || i == 9 ? flop : 0);
        std::printf("  %-19s %9.3f ms, predicted %9.3f, %5d pieces", kNames[i], r.phase[i] * 1e3, cost.phase[i] * 1e3,
                    piece_count(p, Phase(i)));
        if (rate > 0)
            std::printf(", %6.1f GFLOP/s, %4.1f %% of the peak", rate / r.phase[i] * 1e-9,
                        100 * rate * median(r.peaks[i]) / kPeakOperations);
        std::printf("\n");
    }
    std::printf("%s %d->%d input %s kernel %s %s: total_ms %.3f predicted %.3f direct-equivalent %.1f GFLOP/s\n", isa(),
                p.problem.in_maps, p.problem.out_maps, to_string(p.problem.input).c_str(), to_string(p.problem.kernel).c_str(),
                p.method == Method::direct ? "direct" : ("tile " + to_string(p.tile)).c_str(), r.total * 1e3,
                cost.total() * 1e3, 3 * flop / r.total * 1e-9);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 5) {
        std::printf("usage: tiled_bench IN_MAPS OUT_MAPS INPUT KERNEL [TILE | fused:TILE | direct | depthwise | best] [SECONDS] [SPARSITY] [BUNDLE] [POOL | filter:WINDOW]\n");
        return 2;
    }
    Problem problem{std::atoi(argv[1]), std::atoi(argv[2]), parse(argv[3]), parse(argv[4]),
                          argc > 7 ? parse(argv[7]) : Extent{1, 1, 1}};
    const std::string how = argc > 5 ? argv[5] : "best";
    problem.depthwise = how == "depthwise";
    const std::string pool = argc > 9 ? argv[9] : "1";
    problem.filter = pool.starts_with("filter:");
    problem.pool = parse(problem.filter ? pool.substr(7) : pool);
    const double seconds = argc > 6 ? std::atof(argv[6]) : 0.5;
    const int bundle = argc > 8 ? std::atoi(argv[8]) : 8;
    const Machine machine = calibrate(measure_peaks(), bundle);
    std::printf("calibrated GFLOP/s: product %.1f, direct %.1f, transform %.1f, kernels %.1f; memory %.1f GB/s\n",
                machine.product_flops * 1e-9, machine.direct_flops * 1e-9, machine.transform_flops * 1e-9,
                machine.expand_flops * 1e-9, machine.memory_bytes * 1e-9);
    std::vector<LayerPlan> plans;
    if (how == "best" || how == "direct" || problem.depthwise) plans.push_back(plan_direct(problem, bundle, machine));
    if (how == "best")
        for (Extent tile : candidate_tiles(problem, bundle, machine, 4))
            plans.push_back(plan_tiled(problem, bundle, tile, machine));
    else if (how.rfind("fused:", 0) == 0)
        plans.push_back(plan_fused(problem, bundle, parse(how.substr(6)), machine));
    else if (how != "direct" && !problem.depthwise)
        plans.push_back(plan_tiled(problem, bundle, parse(how), machine));
    int best = -1;
    Result fastest;
    for (std::size_t i = 0; i < plans.size(); ++i) {
        const Result r = measure(plans[i], seconds);
        if (plans.size() > 1)
            std::printf("candidate %s %.3f ms, predicted %.3f\n",
                        plans[i].method == Method::direct ? "direct" : to_string(plans[i].tile).c_str(), r.total * 1e3,
                        predict(plans[i], machine).total() * 1e3);
        if (best < 0 || r.total < fastest.total) best = int(i), fastest = r;
    }
    report(plans[best], fastest, machine);
}
