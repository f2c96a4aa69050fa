#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "bindings/arrays.hpp"
#include "engine/bundled.hpp"
#include "engine/network.hpp"

namespace znn::bindings {

namespace {

struct EventRow {  // as znn.trace reads it
    std::int32_t worker, phase, kind, group, a, b;
    std::int64_t start_ns, end_ns;
};

using Arrays = std::vector<py::array>;

std::vector<py::ssize_t> map_shape(const NodeGroupDescription& d, int patches) {
    return {patches, d.maps, d.extent.z, d.extent.y, d.extent.x};
}

std::vector<py::ssize_t> kernel_shape(const NetworkBase& net, int group) {
    const EdgeGroupDescription& d = net.edge_groups().at(group);
    if (d.kind != EdgeKind::conv) throw py::value_error("edge group " + d.name + " has no kernels");
    const int out = net.node_groups()[d.target].maps, in = d.depthwise ? 1 : net.node_groups()[d.source].maps;
    return {out, in, d.kernel.z, d.kernel.y, d.kernel.x};
}

int patches_of(NetworkBase& net) { return net.options().patches; }

// The data of an array of all patches; a single one may go without its axis.
const float* patch_data(NetworkBase& net, const py::array& array, const NodeGroupDescription& d, const char* what) {
    auto shape = map_shape(d, patches_of(net));
    if (shape.front() == 1 && array.ndim() + 1 == py::ssize_t(shape.size())) shape.erase(shape.begin());
    return float_data(array, shape, what + (" of " + d.name));
}

// One array per input (or output) group.
std::vector<const float*> group_data(NetworkBase& net, const Arrays& arrays, bool inputs, const char* what) {
    std::vector<const float*> data;
    for (const auto& d : net.node_groups()) {
        if (inputs ? !d.input : !d.output) continue;
        if (data.size() >= arrays.size()) throw py::value_error(std::string(what) + ": no array for " + d.name);
        data.push_back(patch_data(net, arrays[data.size()], d, what));
    }
    if (data.size() != arrays.size()) throw py::value_error(std::string(what) + ": too many arrays");
    return data;
}

std::vector<const float*> weight_data(NetworkBase& net, const std::vector<std::optional<py::array>>& arrays) {
    std::vector<const float*> data;
    for (const auto& d : net.node_groups()) {
        if (!d.output) continue;
        const auto& array = arrays.at(data.size());
        data.push_back(array ? patch_data(net, *array, d, "weights") : nullptr);
    }
    return data;
}

// New arrays of the outputs' (inputs') shapes, and their data; `patches`: with an axis for them.
struct NewArrays {
    py::list arrays;
    std::vector<std::pair<int, float*>> data;  // by group

    NewArrays(NetworkBase& net, bool inputs, bool patches) {
        for (int group = 0; group < int(net.node_groups().size()); ++group) {
            const auto& d = net.node_groups()[group];
            if (inputs ? !d.input : !d.output) continue;
            auto shape = map_shape(d, patches_of(net));
            if (!patches) shape.erase(shape.begin());
            py::array_t<float> array(shape);
            data.push_back({group, array.mutable_data()});
            arrays.append(std::move(array));
        }
    }
};

bool has_patches(const Arrays& arrays) {
    return std::any_of(arrays.begin(), arrays.end(), [](const py::array& array) { return array.ndim() == 5; });
}

py::dict transform_dict(const NetworkBase& net) {
    const TransformCounts t = net.transforms();
    py::dict d;
    d["kernels"] = t.kernels;
    d["images"] = t.images;
    d["gradients"] = t.gradients;
    d["inverse_images"] = t.inverse_images;
    d["inverse_gradients"] = t.inverse_gradients;
    d["inverse_kernels"] = t.inverse_kernels;
    return d;
}

py::list worker_list(NetworkBase& net) {
    py::list list;
    for (const WorkerCounters& c : net.executor().counters()) {
        py::dict d;
        d["tasks"] = c.tasks;
        d["forced"] = c.forced;
        d["delegated"] = c.delegated;
        d["task_s"] = double(c.task_ns) * 1e-9;
        d["queue_s"] = double(c.queue_ns) * 1e-9;
        d["idle_s"] = double(c.idle_ns) * 1e-9;
        d["lock_s"] = double(c.lock_ns) * 1e-9;
        list.append(d);
    }
    return list;
}

py::array take_events(NetworkBase& net) {
    net.sync();
    const std::vector<TraceEvent> events = net.executor().take_events();
    py::array_t<EventRow> rows{py::ssize_t(events.size())};
    EventRow* row = rows.mutable_data();
    for (const TraceEvent& e : events)
        *row++ = {e.worker, e.label.phase, e.label.kind, e.label.group, e.label.a, e.label.b, e.start_ns, e.end_ns};
    return rows;
}

void register_parameters(py::class_<NetworkBase>& network) {
    using Which = NetworkBase::Which;
    py::enum_<Which>(network, "State")
        .value("value", Which::value)
        .value("momentum", Which::momentum)
        .value("second_moment", Which::second_moment);
    network
        .def("get_kernels",
             [](NetworkBase& net, int group, Which which) {
                 py::array_t<float> out(kernel_shape(net, group));
                 float* data = out.mutable_data();
                 py::gil_scoped_release release;
                 net.get_kernels(group, which, data);
                 return out;
             })
        .def("set_kernels",
             [](NetworkBase& net, int group, Which which, const py::array& values) {
                 const float* data = float_data(values, kernel_shape(net, group), "kernels");
                 py::gil_scoped_release release;
                 net.set_kernels(group, which, data);
             })
        .def("get_biases",
             [](NetworkBase& net, int group, Which which) {
                 py::array_t<float> out(net.node_groups().at(group).maps);
                 float* data = out.mutable_data();
                 py::gil_scoped_release release;
                 net.get_biases(group, which, data);
                 return out;
             })
        .def("set_biases", [](NetworkBase& net, int group, Which which, const py::array& values) {
            const float* data = float_data(values, {net.node_groups().at(group).maps}, "biases");
            py::gil_scoped_release release;
            net.set_biases(group, which, data);
        });
}

void register_rounds(py::class_<NetworkBase>& network) {
    network
        .def("forward",
             [](NetworkBase& net, const Arrays& inputs, bool training) {
                 const auto data = group_data(net, inputs, true, "input");
                 NewArrays outputs(net, false, has_patches(inputs));
                 {
                     py::gil_scoped_release release;
                     net.forward(data, training);
                     for (const auto& [group, out] : outputs.data) net.copy_output(group, out);
                 }
                 return outputs.arrays;
             })
        .def("backward",
             [](NetworkBase& net, const Arrays& gradients) {
                 const auto data = group_data(net, gradients, false, "gradient");
                 py::gil_scoped_release release;
                 net.backward(data);
             })
        .def("train_step",
             [](NetworkBase& net, const Arrays& inputs, const Arrays& targets,
                const std::vector<std::optional<py::array>>& weights) {
                 const auto in = group_data(net, inputs, true, "input"), t = group_data(net, targets, false, "target");
                 const auto w = weight_data(net, weights);
                 py::gil_scoped_release release;
                 return net.train_step(in, t, w);
             })
        .def("input_gradients", [](NetworkBase& net) {
            NewArrays gradients(net, true, patches_of(net) > 1);
            {
                py::gil_scoped_release release;
                for (const auto& [group, out] : gradients.data) net.copy_input_gradient(group, out);
            }
            return gradients.arrays;
        });
}

std::unique_ptr<NetworkBase> make_network(std::vector<NodeGroupDescription> nodes, std::vector<EdgeGroupDescription> edges,
                                          const NetworkOptions& options) {
    if (options.bundle == 1) return std::make_unique<Network>(std::move(nodes), std::move(edges), options);
    return std::make_unique<BundledNetwork>(std::move(nodes), std::move(edges), options);
}

}  // namespace

void register_network(py::module_& module) {
    PYBIND11_NUMPY_DTYPE(EventRow, worker, phase, kind, group, a, b, start_ns, end_ns);
    py::class_<NetworkBase> network(module, "Network");
    network
        .def(py::init([](std::vector<NodeGroupDescription> nodes, std::vector<EdgeGroupDescription> edges,
                         const NetworkOptions& options) {
            py::gil_scoped_release release;
            return make_network(std::move(nodes), std::move(edges), options);
        }))
        .def("sync", &NetworkBase::sync, py::call_guard<py::gil_scoped_release>())
        .def("set_step",
             [](NetworkBase& net, float rate, float momentum, float decay, float square_momentum, float epsilon) {
                 net.set_step({rate, momentum, decay, 1.0f, square_momentum, epsilon});
             })
        .def_property("round", &NetworkBase::round, &NetworkBase::set_round)
        .def_property_readonly("threads", [](NetworkBase& net) { return net.executor().threads(); })
        .def_property_readonly("processors", [](NetworkBase& net) { return net.executor().processors(); })
        .def_property_readonly("task_count", &NetworkBase::task_count)
        .def_property_readonly("transforms", &transform_dict)
        .def_property_readonly("workers", &worker_list)
        .def_property_readonly("pool_bytes", [](NetworkBase& net) { return net.pool_bytes(); })
        .def_property_readonly("pool_blocks", [](NetworkBase& net) { return net.pool_blocks(); })
        .def_property_readonly("kernel_spectra_bytes", &NetworkBase::kernel_spectra_bytes)
        .def_property_readonly("critical_path_s",
                               [](NetworkBase& net) {
                                   const auto path = net.critical_path();
                                   return py::make_tuple(double(path.forward_ns) * 1e-9, double(path.backward_ns) * 1e-9);
                               })
        .def("set_trace",
             [](NetworkBase& net, bool on) {
                 net.sync();
                 net.executor().set_trace(on);
             })
        .def("reset_counters",
             [](NetworkBase& net) {
                 net.sync();
                 net.executor().reset_counters();
             })
        .def("take_events", &take_events);
    register_rounds(network);
    register_parameters(network);
}

}  // namespace znn::bindings
