#include "bindings/arrays.hpp"
#include "fft/fftw.hpp"

namespace znn::bindings {

void register_fft(py::module_& module) {
    module.def("load_fftw", &load_fftw);
    module.def("fftw_loaded", &fftw_loaded);
    module.def("fftw_version", &fftw_version);
    module.def("fftw_path", &fftw_path);
    module.def("fftw_rigour", &fftw_rigour);
    module.def("set_fftw_rigour", &set_fftw_rigour);
    module.def("export_wisdom", &export_wisdom);
    module.def("import_wisdom", &import_wisdom);
}

}  // namespace znn::bindings
