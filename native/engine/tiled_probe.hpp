// One bundled convolution layer outside any network, to time its phases (layer-wise autotuning).
#pragma once
#include <vector>

#include "base/aligned.hpp"
#include "tiled/tiled.hpp"

namespace znn {

class TiledProbe {
public:
    explicit TiledProbe(tiled::LayerPlan plan);

    // Seconds of one execution of all pieces of a phase on this thread.
    double run(tiled::Phase phase);

private:
    AlignedFloats& make(std::size_t floats);

    tiled::LayerPlan plan_;
    std::vector<AlignedFloats> memory_;
    tiled::Buffers buffers_;
    float* scratch_ = nullptr;
};

}  // namespace znn
