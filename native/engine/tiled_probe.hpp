// One bundled convolution layer outside any network, to time its phases (layer-wise autotuning).
#pragma once
#include <cstdint>
#include <vector>

#include "base/aligned.hpp"
#include "tiled/machine.hpp"

namespace znn {

class TiledProbe {
public:
    // Of a large layer a part is measured that takes about `seconds` a round, or one slab of tiles; of a fused one, some pieces.
    TiledProbe(const tiled::LayerPlan& plan, const tiled::Machine& machine, double seconds);

    // Seconds of all pieces of a phase on this thread: those of the part, in proportion to the model's predictions.
    double run(tiled::Phase phase);
    // Pieces worker, worker + workers, ... of a phase, all of them and not timed, in scratch of its own.
    void run_share(tiled::Phase phase, int worker, int workers, float* scratch);

private:
    float* make(std::size_t floats);

    tiled::LayerPlan plan_;
    double scale_[tiled::kPhases];
    int pieces_[tiled::kPhases];  // that are run
    std::vector<float> ordinary_;
    Arena memory_;
    std::vector<std::int8_t> largest_;
    tiled::Buffers buffers_;
    float* scratch_ = nullptr;
};

// Floats of an image in the caches that a pooling, or filtering, by windows of 2x2x2 takes in a second on this thread, forward and
// backward.
struct PoolRates {
    double forward = 0, backward = 0;
};
PoolRates measure_pooling(int bundle);
PoolRates measure_filtering(int bundle);

}  // namespace znn
