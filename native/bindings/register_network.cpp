#include <pybind11/stl.h>

#include "bindings/arrays.hpp"
#include "bindings/data.hpp"
#include "engine/bundled.hpp"
#include "engine/network.hpp"

namespace znn::bindings {

namespace {

struct EventRow {  // as znn.trace reads it
    std::int32_t worker, phase, kind, group, a, b;
    std::int64_t start_ns, end_ns;
};

std::vector<py::ssize_t> kernel_shape(const NetworkBase& net, int group) {
    const EdgeGroupDescription& d = net.edge_groups().at(group);
    if (d.kind != EdgeKind::conv) throw py::value_error("edge group " + d.name + " has no kernels");
    const int out = net.node_groups()[d.target].maps, in = d.depthwise ? 1 : net.node_groups()[d.source].maps;
    return {out, in, d.kernel.z, d.kernel.y, d.kernel.x};
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

// What `call` makes of the inputs. What the network itself finds wrong with them is said as of other arrays.
template <class Call>
auto with_inputs(NetworkBase& net, const py::object& inputs, Call call) {
    const Taken in = take_in(net, inputs, true, "input", !net.checks_inputs());
    try {
        return call(in);
    } catch (const NotFinite&) {
        take_in(net, inputs, true, "input");
        throw;
    }
}

void register_rounds(py::class_<NetworkBase>& network) {
    network
        .def("forward",
             [](NetworkBase& net, const py::object& inputs, bool training) {
                 return with_inputs(net, inputs, [&](const Taken& in) {
                     const NewArrays outputs(net, false, in.patches);
                     {
                         py::gil_scoped_release release;
                         net.forward(in.data, training);
                         for (const auto& [group, out] : outputs.data) net.copy_output(group, out);
                     }
                     return outputs.hand_out(net);
                 });
             })
        .def("backward",
             [](NetworkBase& net, const py::object& gradients) {
                 const Taken g = take_in(net, gradients, false, "gradient");
                 py::gil_scoped_release release;
                 net.backward(g.data);
             })
        .def("train_step",
             [](NetworkBase& net, const py::object& inputs, const py::object& targets, const py::object& weights) {
                 return with_inputs(net, inputs, [&](const Taken& in) {
                     const Taken t = take_in(net, targets, false, "target");
                     Taken w;
                     w.data.resize(t.data.size());
                     if (!weights.is_none()) w = take_in(net, weights, false, "weights");
                     py::gil_scoped_release release;
                     return net.train_step(in.data, t.data, w.data);
                 });
             })
        .def("check_weights", [](NetworkBase& net, const py::object& weights) { take_in(net, weights, false, "weights"); })
        .def("input_gradients", [](NetworkBase& net) {
            const NewArrays gradients(net, true, net.options().patches > 1);
            {
                py::gil_scoped_release release;
                for (const auto& [group, out] : gradients.data) net.copy_input_gradient(group, out);
            }
            return gradients.hand_out(net);
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
