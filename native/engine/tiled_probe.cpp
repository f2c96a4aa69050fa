#include "engine/tiled_probe.hpp"

#include <chrono>

namespace znn {

TiledProbe::TiledProbe(tiled::LayerPlan plan) : plan_(std::move(plan)) {
    const std::size_t V = plan_.bundle, in = plan_.problem.input.volume() * V, out = plan_.output.volume() * V;
    buffers_.input_stride = buffers_.input_gradient_stride = in;
    buffers_.output_stride = buffers_.output_gradient_stride = out;
    buffers_.input = make(in * plan_.in_bundles).data();
    buffers_.input_gradient = make(in * plan_.in_bundles).data();
    buffers_.output = make(out * plan_.out_bundles).data();
    buffers_.output_gradient = make(out * plan_.out_bundles).data();
    buffers_.kernels = make(tiled::kernel_floats(plan_)).data();
    buffers_.momenta = make(tiled::kernel_floats(plan_)).data();
    buffers_.update = true;  // with a rate of zero: the work without the change
    for (int b = 0; b < tiled::kBuffers; ++b)
        buffers_.work[b] = make((tiled::buffer_bytes(plan_, tiled::Buffer(b)) + 63) / 64 * 16).data();
    scratch_ = make((tiled::scratch_bytes(plan_) + 63) / 64 * 16).data();
}

AlignedFloats& TiledProbe::make(std::size_t floats) {
    memory_.emplace_back(floats);
    // Numbers of ordinary size everywhere: zeros and denormals take other times.
    AlignedFloats& values = memory_.back();
    std::uint32_t state = 1;
    for (std::size_t i = 0; i < values.size(); ++i) {
        state = state * 1664525u + 1013904223u;
        values[i] = float(state >> 8) / float(1 << 24) - 0.5f;
    }
    return values;
}

double TiledProbe::run(tiled::Phase phase) {
    const auto start = std::chrono::steady_clock::now();
    for (int piece = 0; piece < tiled::piece_count(plan_, phase); ++piece)
        tiled::run_piece(plan_, phase, piece, buffers_, scratch_);
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

}  // namespace znn
