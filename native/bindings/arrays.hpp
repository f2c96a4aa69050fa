// Strict array arguments: nothing is converted or copied behind the caller's back.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "base/extent.hpp"

namespace znn::bindings {

namespace py = pybind11;

// The data of a C-ordered float32 array of exactly this shape. Throws ValueError / TypeError saying what was expected.
inline float* float_data(const py::array& array, const std::vector<py::ssize_t>& shape, const std::string& what) {
    if (!array.dtype().is(py::dtype::of<float>()))
        throw py::type_error(what + ": expected float32, got " + py::str(array.dtype()).cast<std::string>());
    const std::vector<py::ssize_t> got(array.shape(), array.shape() + array.ndim());
    if (got != shape) {
        const auto text = [](const std::vector<py::ssize_t>& s) {
            std::string out = "(";
            for (auto n : s) out += std::to_string(n) + ", ";
            return out + ")";
        };
        throw py::value_error(what + ": expected shape " + text(shape) + ", got " + text(got));
    }
    if (!(array.flags() & py::array::c_style)) throw py::value_error(what + ": expected C order");
    return static_cast<float*>(const_cast<void*>(array.data()));
}

inline Extent extent(const std::tuple<int, int, int>& t) { return {std::get<0>(t), std::get<1>(t), std::get<2>(t)}; }

void register_description(py::module_& module);
void register_network(py::module_& module);
void register_probe(py::module_& module);
void register_tiled(py::module_& module);
void register_layer(py::module_& module);
void register_fft(py::module_& module);
void register_info(py::module_& module);

}  // namespace znn::bindings
