#include "engine/tiled_probe.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/kernels.hpp"

namespace znn {

TiledProbe::TiledProbe(const tiled::LayerPlan& plan, const tiled::Machine& machine, double seconds)
    : plan_(tiled::representative(plan, machine, seconds)), ordinary_(std::size_t{1} << 16) {
    const tiled::Cost whole = tiled::predict(plan, machine), part = tiled::predict(plan_, machine);
    for (int phase = 0; phase < tiled::kPhases; ++phase) {
        scale_[phase] = part.phase[phase] > 0 ? whole.phase[phase] / part.phase[phase] : 1.0;
        const int count = tiled::piece_count(plan_, tiled::Phase(phase));
        // The fused pipeline takes hardly any memory, so that some pieces of the whole layer can stand for all of them.
        const int some = std::max(1, int(std::ceil(count * seconds / part.total())));
        pieces_[phase] = plan_.fused ? std::min(some, count) : count;
        if (count > 0) scale_[phase] *= double(count) / pieces_[phase];
    }
    // Numbers of ordinary size everywhere: zeros and denormals take other times.
    std::uint32_t state = 1;
    for (float& value : ordinary_) {
        state = state * 1664525u + 1013904223u;
        value = float(state >> 8) / float(1 << 24) - 0.5f;
    }
    const std::size_t V = plan_.bundle, in = plan_.problem.input.volume() * V;
    const std::size_t out = plan_.problem.pooled(plan_.output).volume() * V;
    buffers_.input_stride = buffers_.input_gradient_stride = in;
    buffers_.output_stride = buffers_.output_gradient_stride = out;
    buffers_.packed_input = tiled::packs_input(plan_);
    buffers_.input = make(buffers_.packed_input ? in / V : in * plan_.in_bundles);
    buffers_.input_gradient = memory_.floats(in * plan_.in_bundles).data();  // only written, like the output
    buffers_.output = memory_.floats(out * plan_.out_bundles).data();
    buffers_.output_gradient = make(out * plan_.out_bundles);
    largest_.resize(plan_.pools() ? out * plan_.out_bundles : 0);
    buffers_.largest = largest_.data();
    buffers_.kernels = make(tiled::kernel_floats(plan_));
    buffers_.momenta = make(tiled::kernel_floats(plan_));
    buffers_.update = true;  // with a rate of zero: the work without the change
    for (int b = 0; b < tiled::kBuffers; ++b)
        buffers_.work[b] = make((tiled::buffer_bytes(plan_, tiled::Buffer(b)) + 63) / 64 * 16);
    scratch_ = make((tiled::scratch_bytes(plan_) + 63) / 64 * 16);
}

float* TiledProbe::make(std::size_t floats) {
    AlignedFloats values = memory_.floats(floats);
    for (std::size_t i = 0; i < values.size(); i += ordinary_.size())
        std::copy_n(ordinary_.data(), std::min(ordinary_.size(), values.size() - i), values.data() + i);
    return values.data();
}

double TiledProbe::run(tiled::Phase phase) {
    const long all = tiled::piece_count(plan_, phase), some = pieces_[int(phase)];
    const double start = tiled::thread_seconds();
    for (long i = 0; i < some; ++i) tiled::run_piece(plan_, phase, int(i * all / some), buffers_, scratch_);
    return (tiled::thread_seconds() - start) * scale_[int(phase)];
}

void TiledProbe::run_share(tiled::Phase phase, int worker, int workers, float* scratch) {
    for (int i = worker; i < tiled::piece_count(plan_, phase); i += workers) tiled::run_piece(plan_, phase, i, buffers_, scratch);
}

namespace {

constexpr Extent kPoolWindow{2, 2, 2}, kOnes{1, 1, 1};
constexpr int kPoolRepeats = 9;

float* numbers(Arena& memory, std::size_t count) {
    float* const found = memory.floats(count).data();
    for (std::size_t i = 0; i < count; ++i) found[i] = float(i * 2654435761u % 1000);
    return found;
}

}  // namespace

PoolRates measure_pooling(int bundle) {
    const Extent image{16, 32, 32};
    const std::size_t floats = image.volume() * bundle, pooled = floats / kPoolWindow.volume();
    Arena memory;
    float *in = numbers(memory, floats), *out = memory.floats(pooled).data();
    std::vector<std::int32_t> largest(pooled);
    const kernels::Table& f = kernels::table();
    const double forward = tiled::shortest(kPoolRepeats, [&] {
        f.max_pool(in, image, kPoolWindow, kPoolWindow, bundle, out, largest.data());
    });
    const double backward = tiled::shortest(kPoolRepeats, [&] {
        std::fill_n(in, floats, 0.0f);
        f.max_backward(out, largest.data(), pooled / bundle, bundle, in);
    });
    return {double(floats) / forward, double(floats) / backward};
}

// Of images that outgrow the second cache, as those of layers do whose filters are felt.
PoolRates measure_filtering(int bundle) {
    const Extent image{32, 32, 32}, m = valid_extent(image, kPoolWindow, kOnes);
    const std::size_t floats = image.volume() * bundle;
    Arena memory;
    float *in = numbers(memory, floats), *out = memory.floats(m.volume() * bundle).data();
    std::vector<std::int8_t> places(m.volume() * bundle);
    const kernels::Table& f = kernels::table();
    const double forward = tiled::shortest(kPoolRepeats, [&] {
        f.small_max_filter(in, image, kPoolWindow, kOnes, bundle, 0, m.z * m.y, out, places.data(), false);
    });
    const double backward = tiled::shortest(kPoolRepeats, [&] {
        f.small_max_filter_backward(out, places.data(), image, kPoolWindow, kOnes, bundle, 0, image.z * image.y, in);
    });
    return {double(floats) / forward, double(floats) / backward};
}

}  // namespace znn
