#include <pybind11/stl.h>

#include "base/topology.hpp"
#include "bindings/arrays.hpp"
#include "kernels/kernels.hpp"

namespace znn::bindings {

void register_info(py::module_& module) {
    module.def("usable_physical_cores", &usable_physical_cores);
    module.def("usable_processors", &usable_processors);
    module.def("isa", [] { return kernels::table().isa; });
    module.def("all_finite", [](const py::array& array) {
        const std::vector<py::ssize_t> shape(array.shape(), array.shape() + array.ndim());
        const float* data = float_data(array, shape, "array");
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
