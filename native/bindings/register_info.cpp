#include <pybind11/stl.h>

#include "base/topology.hpp"
#include "bindings/arrays.hpp"
#include "bindings/data.hpp"
#include "kernels/kernels.hpp"

namespace znn::bindings {

void register_info(py::module_& module) {
    module.def("usable_physical_cores", &usable_physical_cores);
    module.def("usable_processors", &usable_processors);
    module.def("isa", [] { return kernels::table().isa; });
    module.def("check_data", &check_data);
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
