// How the core plans a convolution layer of bundles by the method that a plan of the network names.
#pragma once
#include "engine/description.hpp"
#include "tiled/tiled.hpp"

namespace znn {

// Throws std::invalid_argument where the method cannot do the problem; fft works on single maps.
tiled::LayerPlan plan_layer(const tiled::Problem& problem, Method method, int bundle, Extent tile, const tiled::Machine& machine,
                            bool memoize);

}  // namespace znn
