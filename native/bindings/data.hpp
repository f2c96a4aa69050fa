// Arrays that come to a network and go from it, by its input or output nodes. Looked through here and not in Python: beside a round of
// a small network, after which nothing of the interpreter is in the cache, lines of it are not for nothing.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <utility>
#include <vector>

#include "engine/network.hpp"

namespace znn::bindings {

namespace py = pybind11;

using Shape = std::vector<py::ssize_t>;

// Throws znn.errors.DataError, saying why, unless `array` is a finite float32 array in C order of one of these shapes.
void check_data(py::handle array, const std::string& what, const std::vector<Shape>& shapes);

// Arrays that were given, in the order of the nodes, kept alive; `patches`: some came with an axis for them, which a single patch may
// go without.
struct Taken {
    std::vector<py::object> arrays;
    std::vector<const float*> data;
    bool patches = false;
};

// One array, or a mapping by the names of all input (output) nodes. Throws znn.errors.DataError. finite: look whether they are.
Taken take_in(const NetworkBase& net, const py::object& given, bool inputs, const char* what, bool finite = true);

// New arrays of the input (output) nodes' shapes, and their data by node group.
struct NewArrays {
    std::vector<py::object> arrays;
    std::vector<std::pair<int, float*>> data;

    NewArrays(const NetworkBase& net, bool inputs, bool patches);
    // The array, or a dict of them by node name where there are several.
    py::object hand_out(const NetworkBase& net) const;
};

}  // namespace znn::bindings
