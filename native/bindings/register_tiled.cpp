#include <pybind11/stl.h>

#include "base/scratch.hpp"
#include "bindings/arrays.hpp"
#include "engine/exchange.hpp"
#include "engine/plan_layer.hpp"
#include "engine/tiled_probe.hpp"
#include "kernels/kernels.hpp"

namespace znn::bindings {

namespace {

using E = std::tuple<int, int, int>;

E tuple_of(Extent e) { return {e.z, e.y, e.x}; }

tiled::Problem problem_of(int in_maps, int out_maps, E input, E kernel, E sparsity, bool depthwise) {
    return {in_maps, out_maps, extent(input), extent(kernel), extent(sparsity), {1, 1, 1}, depthwise};
}

tiled::LayerPlan plan_without_pool(const tiled::Problem& problem, int bundle, Method method, E tile, bool memoize, int workers) {
    tiled::Machine machine;
    machine.workers = workers;
    return plan_layer(problem, method, bundle, extent(tile), machine, memoize);
}

// The pooling or filtering after the layer is part of it wherever its plan can do it, as in the engine.
tiled::LayerPlan plan_of(tiled::Problem problem, int bundle, Method method, E tile, bool memoize, E pool, bool filter, int workers) {
    const tiled::LayerPlan plan = plan_without_pool(problem, bundle, method, tile, memoize, workers);
    if (extent(pool).volume() == 1 || !tiled::can_pool(plan, extent(pool), filter)) return plan;
    problem.pool = extent(pool);
    problem.filter = filter;
    return plan_without_pool(problem, bundle, method, tile, memoize, workers);
}

std::vector<double> listed(const double (&values)[tiled::kPhases]) { return {values, values + tiled::kPhases}; }

}  // namespace

void register_tiled(py::module_& module) {
    using Machine = tiled::Machine;
    py::class_<Machine>(module, "TiledMachine")
        .def(py::init<>())
        .def_readonly("l2_bytes", &Machine::l2_bytes)
        .def_readonly("l3_bytes", &Machine::l3_bytes)
        .def_readwrite("product_flops", &Machine::product_flops)
        .def_readwrite("direct_flops", &Machine::direct_flops)
        .def_readwrite("transform_flops", &Machine::transform_flops)
        .def_readwrite("expand_flops", &Machine::expand_flops)
        .def_readwrite("line_flops", &Machine::line_flops)
        .def_readwrite("memory_bytes", &Machine::memory_bytes)
        .def_readwrite("spectra_bytes", &Machine::spectra_bytes)
        .def_readwrite("expanded_bytes", &Machine::expanded_bytes)
        .def_readwrite("spill", &Machine::spill)
        .def_readwrite("fused", &Machine::fused)
        .def_readwrite("gather", &Machine::gather);
    using Peaks = tiled::Peaks;
    py::class_<Peaks>(module, "TiledPeaks")
        .def(py::init<>())
        .def_readwrite("flops", &Peaks::flops)
        .def_readwrite("cache_bytes", &Peaks::cache_bytes)
        .def_readwrite("memory_bytes", &Peaks::memory_bytes);
    module.def("tiled_peaks", &tiled::measure_peaks, py::call_guard<py::gil_scoped_release>());
    module.def("tiled_peak_seconds", &tiled::peak_seconds, py::call_guard<py::gil_scoped_release>());
    module.def("tiled_calibrate", &tiled::calibrate, py::call_guard<py::gil_scoped_release>());
    py::class_<PoolRates>(module, "PoolRates")
        .def(py::init<>())
        .def_readwrite("forward", &PoolRates::forward)
        .def_readwrite("backward", &PoolRates::backward);
    module.def("measure_pooling", &measure_pooling, py::call_guard<py::gil_scoped_release>());
    module.def("measure_filtering", &measure_filtering, py::call_guard<py::gil_scoped_release>());
    module.def("exchange_rate", &exchange_rate, py::call_guard<py::gil_scoped_release>());
    module.def("has_bundle", &tiled::has_bundle);
    module.def("tiled_candidates", [](int in_maps, int out_maps, E input, E kernel, E sparsity, bool depthwise,
                                      int bundle, const Machine& machine, int count, bool backward,
                                      bool fused) {
        std::vector<E> tiles;
        const tiled::Problem problem = problem_of(in_maps, out_maps, input, kernel, sparsity, depthwise);
        for (Extent tile : tiled::candidate_tiles(problem, bundle, machine, count, backward, fused))
            tiles.push_back(tuple_of(tile));
        return tiles;
    });
    // A layer as it was planned: what it takes by the model, at least by its work, and in memory; and its probe.
    py::class_<tiled::LayerPlan>(module, "TiledLayer")
        .def(py::init([](int in_maps, int out_maps, E input, E kernel, E sparsity, bool depthwise, int bundle, Method method,
                         E tile, bool memoize, E pool, bool filter, int workers) {
                 return plan_of(problem_of(in_maps, out_maps, input, kernel, sparsity, depthwise), bundle, method, tile, memoize,
                                pool, filter, workers);
             }))
        .def("predict", [](const tiled::LayerPlan& plan, const Machine& machine, bool backward) {
            return listed(tiled::predict(plan, machine, backward).phase);
        })
        .def("takes_part", [](const tiled::LayerPlan& plan, int phase, bool backward) {
            return tiled::takes_part(plan, tiled::Phase(phase), backward);
        })
        .def_property_readonly("flops", [](const tiled::LayerPlan& plan) { return listed(tiled::work(plan).flops); })
        .def_property_readonly("bytes", [](const tiled::LayerPlan& plan) { return listed(tiled::work(plan).bytes); })
        .def_property_readonly("buffer_bytes", [](const tiled::LayerPlan& plan) {
            std::vector<std::size_t> bytes;
            for (int b = 0; b < tiled::kBuffers; ++b) bytes.push_back(tiled::buffer_bytes(plan, tiled::Buffer(b)));
            return bytes;
        })
        .def_property_readonly("kernel_bytes", [](const tiled::LayerPlan& plan) { return 4 * tiled::kernel_floats(plan); })
        .def_property_readonly("scratch_bytes", [](const tiled::LayerPlan& plan) { return tiled::scratch_bytes(plan); })
        .def_property_readonly("pools", &tiled::LayerPlan::pools)
        .def_property_readonly("pieces", [](const tiled::LayerPlan& plan) {
            return std::vector<int>(std::begin(plan.pieces), std::end(plan.pieces));
        })
        .def_property_readonly("packs_input", &tiled::packs_input)
        .def_readonly("slabs", &tiled::LayerPlan::slabs)
        .def_readonly("kept_slabs", &tiled::LayerPlan::kept_slabs)
        .def_readonly("passing_slabs", &tiled::LayerPlan::passing_slabs);
    py::class_<TiledProbe>(module, "TiledProbe")
        .def(py::init<const tiled::LayerPlan&, const Machine&, double>(), py::call_guard<py::gil_scoped_release>())
        .def("run", [](TiledProbe& probe, int phase) { return probe.run(static_cast<tiled::Phase>(phase)); },
             py::call_guard<py::gil_scoped_release>());
    module.attr("TILED_PHASES") = tiled::kPhases;
    module.attr("SMALL_WINDOW") = kernels::small_window;
    module.def("scratch_room", &Scratch::room);
    module.attr("SHARED_SUMS_BYTES") = tiled::shared_sums_bytes;
}

}  // namespace znn::bindings
