#include <pybind11/stl.h>

#include "bindings/arrays.hpp"
#include "engine/description.hpp"
#include "engine/tiled_probe.hpp"

namespace znn::bindings {

namespace {

using E = std::tuple<int, int, int>;

E tuple_of(Extent e) { return {e.z, e.y, e.x}; }

tiled::Problem problem_of(int in_maps, int out_maps, E input, E kernel, E sparsity) {
    return {in_maps, out_maps, extent(input), extent(kernel), extent(sparsity)};
}

tiled::LayerPlan plan_of(const tiled::Problem& problem, int bundle, Method method, E tile) {
    switch (method) {
        case Method::tiled: return tiled::plan_tiled(problem, bundle, extent(tile));
        case Method::fused: return tiled::plan_fused(problem, bundle, extent(tile));
        case Method::direct: return tiled::plan_direct(problem, bundle);
        case Method::fft: break;
    }
    throw py::value_error("the fft method works on single maps, not on bundles");
}

// (forward, backward, update) seconds on one core by the cost model.
std::tuple<double, double, double> seconds_of(const tiled::LayerPlan& plan, const tiled::Machine& machine) {
    const tiled::Cost cost = tiled::predict(plan, machine);
    return {cost.forward(), cost.backward(), cost.update()};
}

}  // namespace

void register_tiled(py::module_& module) {
    using Machine = tiled::Machine;
    py::class_<Machine>(module, "TiledMachine")
        .def(py::init<>())
        .def_readwrite("product_flops", &Machine::product_flops)
        .def_readwrite("direct_flops", &Machine::direct_flops)
        .def_readwrite("transform_flops", &Machine::transform_flops)
        .def_readwrite("expand_flops", &Machine::expand_flops)
        .def_readwrite("memory_bytes", &Machine::memory_bytes)
        .def_readwrite("spectra_bytes", &Machine::spectra_bytes);
    module.def("tiled_calibrate", &tiled::calibrate, py::call_guard<py::gil_scoped_release>());
    module.def("has_bundle", &tiled::has_bundle);
    module.def("preferred_bundle", &tiled::preferred_bundle);
    module.def("tiled_candidates", [](int in_maps, int out_maps, E input, E kernel, E sparsity, int bundle,
                                      const Machine& machine, int count) {
        std::vector<E> tiles;
        for (Extent tile : tiled::candidate_tiles(problem_of(in_maps, out_maps, input, kernel, sparsity), bundle, machine,
                                                  count))
            tiles.push_back(tuple_of(tile));
        return tiles;
    });
    module.def("tiled_predict", [](int in_maps, int out_maps, E input, E kernel, E sparsity, int bundle,
                                   Method method, E tile, const Machine& machine) {
        return seconds_of(plan_of(problem_of(in_maps, out_maps, input, kernel, sparsity), bundle, method, tile), machine);
    });
    py::class_<TiledProbe>(module, "TiledProbe")
        .def(py::init([](int in_maps, int out_maps, E input, E kernel, E sparsity, int bundle, Method method, E tile) {
            return std::make_unique<TiledProbe>(
                plan_of(problem_of(in_maps, out_maps, input, kernel, sparsity), bundle, method, tile));
        }))
        .def("run", [](TiledProbe& probe, int phase) { return probe.run(static_cast<tiled::Phase>(phase)); },
             py::call_guard<py::gil_scoped_release>());
    module.attr("TILED_PHASES") = tiled::kPhases;
}

}  // namespace znn::bindings
