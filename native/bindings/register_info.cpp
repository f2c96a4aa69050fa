#include <pybind11/stl.h>

#include <algorithm>

#include "base/topology.hpp"
#include "bindings/arrays.hpp"
#include "kernels/kernels.hpp"

namespace znn::bindings {

void register_info(py::module_& module) {
    module.def("usable_physical_cores", &usable_physical_cores);
    module.def("usable_processors", &usable_processors);
    module.def("isa", [] { return kernels::table().isa; });
    // Whether it is an array of finite float32 in C order and of one of these shapes.
    module.def("is_data", [](const py::object& object, const std::vector<std::vector<py::ssize_t>>& shapes) {
        if (!py::isinstance<py::array_t<float, py::array::c_style>>(object)) return false;
        const auto array = py::reinterpret_borrow<py::array>(object);
        const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
        if (std::find(shapes.begin(), shapes.end(), shape) == shapes.end()) return false;
        const float* data = static_cast<const float*>(array.data());
        const std::size_t count = std::size_t(array.size());
        py::gil_scoped_release release;
        return kernels::table().all_finite(data, count);
    });
    module.def("build_info", [] {
        py::dict d;
        d["version"] = ZNN_VERSION;
        d["compiler"] = ZNN_COMPILER;
        d["flags"] = ZNN_FLAGS;
        d["build_type"] = ZNN_BUILD_TYPE;
        d["commit"] = ZNN_COMMIT;
        return d;
    });
}

}  // namespace znn::bindings
