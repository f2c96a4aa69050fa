#include <pybind11/stl.h>

#include "bindings/arrays.hpp"
#include "engine/probe.hpp"

namespace znn::bindings {

void register_probe(py::module_& module) {
    using E = std::tuple<int, int, int>;
    using Piece = ConvProbe::Piece;
    py::class_<ConvProbe> probe(module, "ConvProbe");
    py::enum_<Piece>(probe, "Piece")
        .value("encode_image", Piece::encode_image).value("encode_gradient", Piece::encode_gradient)
        .value("encode_padding", Piece::encode_padding).value("transform_kernel", Piece::transform_kernel)
        .value("forward", Piece::forward).value("backward", Piece::backward).value("update", Piece::update)
        .value("decode_forward", Piece::decode_forward).value("decode_backward", Piece::decode_backward);
    probe
        .def(py::init([](Method method, E in, E kernel, E sparsity, int patches, E transform, int images, int kernels) {
                 const Extent n = extent(in), k = extent(kernel), s = extent(sparsity);
                 return std::make_unique<ConvProbe>(method, ConvShape{n, k, s, valid_extent(n, k, s), patches},
                                                    extent(transform), images, kernels);
             }),
             py::arg("method"), py::arg("extent"), py::arg("kernel"), py::arg("sparsity"), py::arg("patches"),
             py::arg("transform"), py::arg("images"), py::arg("kernels"))
        .def("run", &ConvProbe::run, py::call_guard<py::gil_scoped_release>());
}

}  // namespace znn::bindings
