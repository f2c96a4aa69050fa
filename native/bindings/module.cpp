#include "bindings/arrays.hpp"

PYBIND11_MODULE(_core, module) {
    module.doc() = "The native core of ZNN. Private: use the Python classes of the znn package.";
    znn::bindings::register_description(module);
    znn::bindings::register_network(module);
    znn::bindings::register_probe(module);
    znn::bindings::register_tiled(module);
    znn::bindings::register_layer(module);
    znn::bindings::register_fft(module);
    znn::bindings::register_info(module);
}
