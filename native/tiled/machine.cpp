// The machine's walls and the cost model's constants, measured; what a layer's phases ask of them.
#include "tiled/machine.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include <time.h>

#include "tiled/layout.hpp"
#include "tiled/transform_ops.hpp"

namespace znn::tiled {

#define ZNN_DECLARE(variant)        \
    namespace variant {             \
    float multiply_add(long steps); \
    }
ZNN_DECLARE(baseline)
namespace baseline {
TransformOps transform_ops(int extent);
}
#ifdef ZNN_X86
ZNN_DECLARE(avx2)
ZNN_DECLARE(avx512)
ZNN_DECLARE(avx512w)
#endif

double thread_seconds() {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

namespace {

struct Arena {
    std::vector<std::unique_ptr<float, void (*)(void*)>> blocks;

    float* take(std::size_t bytes) {
        bytes = (bytes + 63) / 64 * 64 + 64;
        blocks.emplace_back(static_cast<float*>(std::aligned_alloc(64, bytes)), std::free);
        std::fill_n(blocks.back().get(), bytes / sizeof(float), 0.5f);
        return blocks.back().get();
    }
};

// The chains of this code path: where there are two kinds of vectors, one is the faster.
struct Chain {
    float (*run)(long);
    int lanes;
};

std::vector<Chain> chains() {
#ifdef ZNN_X86
    const std::string path = isa();
    if (path == "avx2") return {{avx2::multiply_add, 8}};
    if (path == "avx512") return {{avx512::multiply_add, 8}, {avx512w::multiply_add, 16}};
#endif
    return {{baseline::multiply_add, 8}};
}

// Bytes read and written by copying a block.
double copy_rate(std::size_t bytes, int repeats) {
    Arena arena;
    const std::size_t floats = bytes / sizeof(float);
    float *from = arena.take(bytes), *to = arena.take(bytes);
    return 2.0 * double(bytes) / shortest(repeats, [&] { std::copy(from, from + floats, to); });
}

}  // namespace

double peak_seconds(double operations) {
    double best = 1e9;
    volatile float kept = 0;
    for (const Chain& chain : chains()) {
        const long steps = long(operations / (2.0 * 12 * chain.lanes)) + 1;
        best = std::min(best, shortest(1, [&] { kept = chain.run(steps); }));
    }
    return best;
}

Peaks measure_peaks() {
    const Machine machine;
    const double operations = 1e8;
    Peaks peaks;
    double seconds = 1e9;
    for (int repeat = 0; repeat < 9; ++repeat) seconds = std::min(seconds, peak_seconds(operations));
    peaks.flops = operations / seconds;
    peaks.cache_bytes = copy_rate(machine.l3_bytes / 8, 15);
    peaks.memory_bytes = copy_rate(machine.l3_bytes * 2, 4);
    return peaks;
}

namespace {

// A layer with buffers of its own, all of whose phases have run.
struct Trial {
    LayerPlan plan;
    Arena arena;
    Buffers b;
    float* scratch;

    explicit Trial(const LayerPlan& p) : plan(p) {
        const std::size_t in = p.problem.input.volume() * p.bundle, out = p.output.volume() * p.bundle;
        b.input_stride = b.input_gradient_stride = in;
        b.output_stride = b.output_gradient_stride = out;
        b.input = arena.take(in * p.in_bundles * sizeof(float));
        b.input_gradient = arena.take(in * p.in_bundles * sizeof(float));
        b.output = arena.take(out * p.out_bundles * sizeof(float));
        b.output_gradient = arena.take(out * p.out_bundles * sizeof(float));
        b.largest = reinterpret_cast<std::int8_t*>(arena.take(out * p.out_bundles));
        b.kernels = arena.take(kernel_floats(p) * sizeof(float));
        for (int i = 0; i < kBuffers; ++i) b.work[i] = arena.take(buffer_bytes(p, Buffer(i)));
        scratch = arena.take(p.scratch);
        for (int phase = 0; phase < kPhases; ++phase) run(Phase(phase));
    }
    void run(Phase phase) {
        for (int i = 0; i < piece_count(plan, phase); ++i) run_piece(plan, phase, i, b, scratch);
    }
};

// One constant, and the phase of the trial that tells it: its shortest run so far.
struct Fit {
    Trial& trial;
    Phase phase;
    double Machine::*constant;
    double least, most;  // what makes sense
    double measured = 1e9;

    void measure() {
        measured = std::min(measured, shortest(2, [&] { trial.run(phase); }));
    }
    // Scales the constant by how far its phase is from the prediction.
    void apply(Machine& machine) const {
        const auto predicted = [&](double value) {
            Machine other = machine;
            other.*constant = value;
            return predict(trial.plan, other).phase[int(phase)];
        };
        // What the constant has no part in; a rate divides, a factor multiplies.
        const bool rate = least > 1e6;
        const double rest = predicted(rate ? 1e30 : 0.0), part = predicted(machine.*constant) - rest;
        const double share = std::max(measured - rest, 0.1 * measured) / part;
        machine.*constant = std::clamp(rate ? machine.*constant / share : machine.*constant * share, least, most);
    }
};

}  // namespace

Machine calibrate(const Peaks& peaks, int bundle) {
    Machine machine;
    const double peak = peaks.flops;
    machine.memory_bytes = peaks.memory_bytes;
    const Extent once{1, 1, 1};
    const int few = 2 * bundle, many = bundle == 8 ? 24 : 32;  // no bundle is padded
    Trial small(plan_tiled({bundle, bundle, {14, 14, 14}, {3, 3, 3}, once}, bundle, {14, 14, 14}));  // in L2
    Trial tiles(plan_tiled({many, many, {26, 26, 26}, {3, 3, 3}, once}, bundle, {14, 14, 14}));   // eight, beyond it
    Trial outgrown(plan_tiled({many, many, {38, 38, 38}, {3, 3, 3}, once}, bundle, {14, 14, 14}));  // spectra in L3
    Trial one(plan_tiled({many, many, {16, 16, 16}, {5, 5, 5}, once}, bundle, {16, 16, 16}));     // nothing but kernels
    Trial large(plan_tiled({few, few, {40, 40, 76}, {5, 5, 5}, once}, bundle, {40, 40, 40}));   // scratch beyond any L2
    Trial flat(plan_tiled({many, many, {1, 64, 64}, {1, 11, 11}, once}, bundle, {1, 32, 32}));    // kernels too long for tables
    const Problem first{1, many, {42, 42, 42}, {3, 3, 3}, once, {2, 2, 2}};
    Machine alone, crowd;
    alone.workers = 1, crowd.workers = 64;  // so many that the input is transformed in a phase of its own
    Trial fused(plan_fused(first, bundle, {16, 16, 16}, alone)), shared(plan_fused(first, bundle, {16, 16, 16}, crowd));
    Trial direct(plan_direct({many, many, {26, 26, 26}, {3, 3, 3}, once}, bundle));
    Fit fits[] = {
        {tiles, Phase::kernels_forward, &Machine::expand_flops, 0.05 * peak, 1.5 * peak},
        {flat, Phase::kernels_forward, &Machine::line_flops, 0.02 * peak, peak},
        {small, Phase::input_transform, &Machine::transform_flops, 0.05 * peak, 1.5 * peak},
        {outgrown, Phase::input_transform, &Machine::spectra_bytes, 0.1 * peaks.cache_bytes, 10 * peaks.cache_bytes},
        {large, Phase::input_transform, &Machine::spill, 1.0, 3.0},
        {tiles, Phase::forward_product, &Machine::product_flops, 0.2 * peak, peak},
        {one, Phase::forward_product, &Machine::expanded_bytes, 0.1 * peaks.cache_bytes, 10 * peaks.cache_bytes},
        {fused, Phase::forward_inverse, &Machine::fused, 0.5, 4.0},
        {shared, Phase::input_transform, &Machine::gather, 1e-10, 2e-8},
        {direct, Phase::forward_inverse, &Machine::direct_flops, 0.2 * peak, peak},
    };
    // In turns over half a second, so that a short disturbance does not meet all runs of one phase.
    for (int turn = 0; turn < 12; ++turn)
        for (Fit& fit : fits) fit.measure();
    for (int turn = 0; turn < 3; ++turn)  // several constants have a part in a phase
        for (const Fit& fit : fits) fit.apply(machine);
    return machine;
}

// ---- the roofline

namespace {

Work direct_work(const LayerPlan& p, double in_image, double out_image) {
    Work w;
    const Problem& q = p.problem;
    const double flops = 2.0 * double(p.output.volume()) * double(q.kernel.volume()) * q.fan_in() * q.out_maps;
    const double weights = 4.0 * double(q.kernel.volume()) * q.fan_in() * q.out_maps;
    const auto set = [&](Phase phase, double operations, double bytes) {
        w.flops[int(phase)] = operations, w.bytes[int(phase)] = bytes;
    };
    for (const Phase phase : {Phase::kernels_forward, Phase::kernels_backward, Phase::update_inverse})
        set(phase, 0, phase == Phase::kernels_forward && !packs_kernels(p) ? 0 : 2 * weights);
    set(Phase::forward_inverse, flops, in_image + out_image + weights);
    set(Phase::backward_inverse, flops, in_image + out_image + weights);
    set(Phase::update_product, flops, in_image + out_image + weights);
    return w;
}

// Operations of the transform of a tile of `planes` x `rows` voxels that are not known to be zero (or not wanted), of one map,
// with or without the lines along axis 0.
double tile_operations(const LayerPlan& p, int planes, int rows, bool inverse, bool lines) {
    const Axis* a = p.axis;
    const TransformOps x = baseline::transform_ops(a[2].T), y = baseline::transform_ops(a[1].T), z = baseline::transform_ops(a[0].T);
    return planes * (double(rows) * (inverse ? x.inverse : x.real) + (a[1].T > 1 ? a[2].frequencies() * double(y.complex) : 0)) +
           (lines ? double(p.pencils) * z.complex : 0);
}

// The same of a kernel, whose lines are short.
double kernel_operations(const LayerPlan& p, bool lines) {
    const Axis* a = p.axis;
    const auto line = [](const Axis& axis) { return 2.0 * axis.k * axis.frequencies(); };
    return a[0].k * (a[1].k * line(a[2]) + a[2].frequencies() * 2 * line(a[1])) + (lines ? p.pencils * 2.0 * line(a[0]) : 0);
}

}  // namespace

Work work(const LayerPlan& p) {
    const Problem& q = p.problem;
    const double in_image = 4.0 * double(q.input.volume()) * q.in_maps, out_image = 4.0 * double(q.pooled(p.output).volume()) * q.out_maps;
    if (p.method == Method::direct) return direct_work(p, in_image, out_image);
    Work w;
    const Axis* a = p.axis;
    const double pairs = double(q.in_maps) * q.out_maps, frequencies = double(p.pencils) * a[0].T;
    const bool lines = !sums_taps(p);  // in forward and update; the backward phases transform along all axes
    const auto images = [&](int maps, bool outputs, bool inverse, bool along_lines = true) {
        return tile_operations(p, outputs ? a[0].M : a[0].T, outputs ? a[1].M : a[1].T, inverse, along_lines) * p.tiles * maps;
    };
    const double in_spectra = 8 * frequencies * p.tiles * q.in_maps, out_spectra = 8 * frequencies * p.tiles * q.out_maps;
    const double kernel = kernel_operations(p, lines);
    const double weights = 4.0 * double(q.kernel.volume()) * pairs, kernel_spectra = 8.0 * p.pencils * a[0].k * pairs;
    const double product = 8 * frequencies * p.tiles * pairs, all = in_spectra + out_spectra + kernel_spectra;
    const auto set = [&](Phase phase, double operations, double bytes) {
        w.flops[int(phase)] = operations, w.bytes[int(phase)] = bytes;
    };
    set(Phase::kernels_forward, kernel * pairs, weights + kernel_spectra);
    set(Phase::kernels_backward, kernel_operations(p, true) * pairs, weights + kernel_spectra);
    set(Phase::gradient_transform, images(q.out_maps, true, false), out_image + out_spectra);
    set(Phase::backward_product, product, all);
    set(Phase::backward_inverse, images(q.in_maps, false, true), in_spectra + in_image);
    set(Phase::update_inverse, kernel * pairs, kernel_spectra + 2 * weights);
    if (p.fused) {  // spectra of outputs never leave the tile in hand
        const double products = lines ? product : product / a[0].T * a[0].M * a[0].k, outputs = images(q.out_maps, true, true, lines);
        const double inputs = images(q.in_maps, false, false, lines), spectra = double(buffer_bytes(p, Buffer::input_spectra));
        const double again = p.shares_inputs ? 0 : inputs, read = p.shares_inputs ? spectra : in_image;
        if (p.shares_inputs) set(Phase::input_transform, inputs, in_image + spectra);
        set(Phase::forward_inverse, again + outputs + products, read + out_image + kernel_spectra);
        set(Phase::update_product, again + outputs + products, read + out_image + kernel_spectra);
        return w;
    }
    set(Phase::input_transform, images(q.in_maps, false, false), in_image + in_spectra);
    set(Phase::forward_product, product, all);
    set(Phase::forward_inverse, images(q.out_maps, true, true), out_spectra + out_image);
    set(Phase::update_product, product, all);
    return w;
}

// ---- measuring a part

LayerPlan representative(const LayerPlan& p, const Machine& machine, double seconds) {
    if (p.fused) return p;
    const bool tiled = p.method == Method::tiled;
    // The axis (z, y, x) along which the image is cut, and in how many parts: rows of tiles, or of voxels.
    const int along = tiled ? p.order[p.split] : p.output.z > 1 ? 0 : 1;
    Problem q = p.problem;
    int* extents[3] = {&q.input.z, &q.input.y, &q.input.x};
    const int kernels[3] = {q.kernel.z, q.kernel.y, q.kernel.x}, sparsities[3] = {q.sparsity.z, q.sparsity.y, q.sparsity.x};
    const int k = kernels[along], s = sparsities[along], full = *extents[along], outputs = full - s * (k - 1);
    const int windows[3] = {q.pool.z, q.pool.y, q.pool.x};
    const int part = tiled ? p.axis[p.split].M : windows[along], parts = ceil_div(ceil_div(outputs, s), part);
    const double share = seconds / predict(p, machine).total();
    int wanted = std::max(int(std::ceil(share * parts)), tiled ? 1 : 4);
    if (tiled) wanted = std::max(wanted, ceil_div(p.tiles_per_slab * parts, p.tiles));
    if (wanted >= parts) return p;
    *extents[along] = wanted * part * s + s * (k - 1);
    if (*extents[along] >= full) return p;
    if (!tiled) return plan_direct(q, p.bundle, machine);
    return plan_tiled(q, p.bundle, p.tile, machine, p.kept_slabs == p.slabs);
}

}  // namespace znn::tiled
