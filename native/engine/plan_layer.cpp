#include "engine/plan_layer.hpp"

#include <stdexcept>

namespace znn {

tiled::LayerPlan plan_layer(const tiled::Problem& problem, Method method, int bundle, Extent tile, const tiled::Machine& machine,
                            bool memoize) {
    switch (method) {
        case Method::tiled: return tiled::plan_tiled(problem, bundle, tile, machine, memoize);
        case Method::fused: return tiled::plan_fused(problem, bundle, tile, machine, memoize);
        case Method::direct: return tiled::plan_direct(problem, bundle, machine);
        case Method::fft: break;
    }
    throw std::invalid_argument("convolution layer: the fft method works on single maps, not on bundles");
}

}  // namespace znn
