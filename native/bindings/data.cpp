#include "bindings/data.hpp"

#include <pybind11/stl.h>

#include <algorithm>

#include "bindings/arrays.hpp"
#include "kernels/kernels.hpp"

namespace znn::bindings {

namespace {

[[noreturn]] void refuse(const std::string& text) {
    PyErr_SetString(py::module_::import("znn.errors").attr("DataError").ptr(), text.c_str());
    throw py::error_already_set();
}

std::string text(const Shape& shape) { return py::str(py::tuple(py::cast(shape))); }
std::string text(py::handle object) { return py::str(object); }

bool is_data(py::handle object, const std::vector<Shape>& shapes, bool finite) {
    if (!py::isinstance<py::array_t<float, py::array::c_style>>(object)) return false;
    const auto array = py::reinterpret_borrow<py::array>(object);
    const Shape shape(array.shape(), array.shape() + array.ndim());
    if (std::find(shapes.begin(), shapes.end(), shape) == shapes.end()) return false;
    if (!finite) return true;
    const float* data = static_cast<const float*>(array.data());
    const std::size_t count = std::size_t(array.size());
    py::gil_scoped_release release;
    return kernels::table().all_finite(data, count);
}

[[noreturn]] void explain(py::handle object, const std::string& what, const std::vector<Shape>& shapes) {
    if (!py::isinstance<py::array>(object)) {
        const std::string shown = object.is_none() ? "None" : "a " + text(py::type::of(object).attr("__name__"));
        refuse(what + " is " + shown + ", expected a float32 array of shape " + text(shapes.back()));
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    if (!py::isinstance<py::array_t<float>>(array)) refuse(what + " has dtype " + text(array.dtype()) + ", expected float32");
    const Shape shape(array.shape(), array.shape() + array.ndim());
    if (std::find(shapes.begin(), shapes.end(), shape) == shapes.end()) {
        std::string expected;
        for (auto s = shapes.rbegin(); s != shapes.rend(); ++s) expected += (s == shapes.rbegin() ? "" : " or ") + text(*s);
        refuse(what + " has shape " + text(shape) + ", expected shape " + expected);
    }
    if (!(array.flags() & py::array::c_style))
        refuse(what + " is not in C order, expected a contiguous array (numpy.ascontiguousarray makes one)");
    refuse(what + " holds NaN or infinity, expected finite numbers");
}

std::string quoted(const std::string& name) { return text(py::repr(py::str(name))); }

// Shapes of a node's array: with the patches in front, which a single one may go without.
std::vector<Shape> shapes_of(const NetworkBase& net, const NodeGroupDescription& d) {
    const Shape shape{net.options().patches, d.maps, d.extent.z, d.extent.y, d.extent.x};
    return net.options().patches == 1 ? std::vector<Shape>{shape, Shape(shape.begin() + 1, shape.end())} : std::vector<Shape>{shape};
}

// The groups of the input (output) nodes.
std::vector<int> groups_of(const NetworkBase& net, bool inputs) {
    std::vector<int> found;
    for (int group = 0; group < int(net.node_groups().size()); ++group) {
        const auto& d = net.node_groups()[group];
        if (inputs ? d.input : d.output) found.push_back(group);
    }
    return found;
}

bool is_mapping(const py::object& given) {
    if (py::isinstance<py::array>(given)) return false;
    return PyDict_Check(given.ptr()) || py::isinstance(given, py::module_::import("collections.abc").attr("Mapping"));
}

std::string joined(const std::vector<std::string>& names) {
    std::string all;
    for (const auto& name : names) all += (all.empty() ? "" : ", ") + name;
    return all;
}

// The mapping's values in the order of the nodes, whose names its keys must be; a single array is the first node's.
std::vector<py::object> by_node(const NetworkBase& net, const std::vector<int>& groups, const py::object& given, const char* what) {
    const auto name = [&](std::size_t i) -> const std::string& { return net.node_groups()[groups[i]].name; };
    const bool mapping = is_mapping(given);
    std::vector<py::object> found(groups.size());
    std::vector<std::string> names;
    if (mapping) {
        for (py::handle key : given) {
            names.push_back(text(key));
            for (std::size_t i = 0; i < groups.size(); ++i)
                if (py::isinstance<py::str>(key) && names.back() == name(i)) found[i] = given[key];
        }
    } else {
        found.front() = given;
    }
    const bool complete = std::all_of(found.begin(), found.end(), [](const py::object& array) { return bool(array); });
    if (complete && (!mapping || names.size() == groups.size())) return found;
    std::vector<std::string> wanted;
    for (std::size_t i = 0; i < groups.size(); ++i) wanted.push_back(name(i));
    refuse(std::string(what) + ": got arrays for " + (mapping ? joined(names) : name(0)) + ", expected exactly " + joined(wanted));
}

}  // namespace

void check_data(py::handle array, const std::string& what, const std::vector<Shape>& shapes) {
    if (!is_data(array, shapes, true)) explain(array, what, shapes);
}

Taken take_in(const NetworkBase& net, const py::object& given, bool inputs, const char* what, bool finite) {
    const auto groups = groups_of(net, inputs);
    Taken taken{by_node(net, groups, given, what), {}, false};
    for (std::size_t i = 0; i < groups.size(); ++i) {
        const auto& d = net.node_groups()[groups[i]];
        const auto shapes = shapes_of(net, d);
        if (!is_data(taken.arrays[i], shapes, finite)) explain(taken.arrays[i], what + (" of node " + quoted(d.name)), shapes);
        const auto array = py::reinterpret_borrow<py::array>(taken.arrays[i]);
        taken.data.push_back(static_cast<const float*>(array.data()));
        taken.patches |= std::size_t(array.ndim()) == shapes.front().size();
    }
    return taken;
}

NewArrays::NewArrays(const NetworkBase& net, bool inputs, bool patches) {
    for (const int group : groups_of(net, inputs)) {
        const auto shapes = shapes_of(net, net.node_groups()[group]);
        py::array_t<float> array(patches ? shapes.front() : shapes.back());
        data.push_back({group, array.mutable_data()});
        arrays.push_back(std::move(array));
    }
}

py::object NewArrays::hand_out(const NetworkBase& net) const {
    if (arrays.size() == 1) return arrays.front();
    py::dict found;
    for (std::size_t i = 0; i < arrays.size(); ++i) found[py::str(net.node_groups()[data[i].first].name)] = arrays[i];
    return std::move(found);
}

}  // namespace znn::bindings
