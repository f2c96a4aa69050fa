#include <pybind11/stl.h>

#include "bindings/arrays.hpp"
#include "engine/description.hpp"

namespace znn::bindings {

void register_description(py::module_& module) {
    using E = std::tuple<int, int, int>;

    py::enum_<EdgeKind>(module, "EdgeKind")
        .value("conv", EdgeKind::conv).value("max_filter", EdgeKind::max_filter).value("max_pool", EdgeKind::max_pool)
        .value("dropout", EdgeKind::dropout).value("crop", EdgeKind::crop).value("identity", EdgeKind::identity);
    py::enum_<Method>(module, "Method").value("direct", Method::direct).value("fft", Method::fft)
        .value("tiled", Method::tiled).value("fused", Method::fused);
    py::enum_<Policy>(module, "Policy")
        .value("priority", Policy::priority).value("fifo", Policy::fifo).value("lifo", Policy::lifo)
        .value("stealing", Policy::stealing);
    py::enum_<SumKind>(module, "SumKind")
        .value("wait_free", SumKind::wait_free).value("locked", SumKind::locked).value("ordered", SumKind::ordered);
    py::enum_<Allocator>(module, "Allocator").value("pools", Allocator::pools).value("malloc", Allocator::malloc);
    py::enum_<kernels::Transfer>(module, "Transfer")
        .value("linear", kernels::Transfer::linear).value("relu", kernels::Transfer::relu)
        .value("tanh", kernels::Transfer::tanh).value("logistic", kernels::Transfer::logistic);
    py::enum_<kernels::Loss>(module, "Loss")
        .value("squared", kernels::Loss::squared).value("binomial", kernels::Loss::binomial)
        .value("softmax", kernels::Loss::softmax);

    py::class_<NodeGroupDescription>(module, "NodeGroupDescription")
        .def(py::init([](std::string name, int maps, E e, bool input, bool output, bool bias, kernels::Transfer transfer,
                         float rate) {
                 return NodeGroupDescription{name, maps, extent(e), input, output, bias, transfer, rate};
             }),
             py::kw_only(), py::arg("name"), py::arg("maps"), py::arg("extent"), py::arg("input"), py::arg("output"),
             py::arg("bias"), py::arg("transfer"), py::arg("rate"));
    py::class_<EdgeGroupDescription>(module, "EdgeGroupDescription")
        .def(py::init([](std::string name, EdgeKind kind, int source, int target, E kernel, E sparsity, E window, E stride,
                         E offset, float ratio, bool depthwise, float rate, float decay, Method method, E transform,
                         bool memoize) {
                 EdgeGroupDescription d;
                 d.name = name; d.kind = kind; d.source = source; d.target = target;
                 d.kernel = extent(kernel); d.sparsity = extent(sparsity); d.window = extent(window);
                 d.stride = extent(stride); d.offset = extent(offset); d.ratio = ratio; d.depthwise = depthwise;
                 d.rate = rate; d.decay = decay; d.method = method; d.transform = extent(transform);
                 d.memoize = memoize;
                 return d;
             }),
             py::kw_only(), py::arg("name"), py::arg("kind"), py::arg("source"), py::arg("target"), py::arg("kernel"),
             py::arg("sparsity"), py::arg("window"), py::arg("stride"), py::arg("offset"), py::arg("ratio"),
             py::arg("depthwise"), py::arg("rate"), py::arg("decay"), py::arg("method"), py::arg("transform"),
             py::arg("memoize"));
    py::class_<NetworkOptions>(module, "NetworkOptions")
        .def(py::init<>())
        .def_readwrite("threads", &NetworkOptions::threads)
        .def_readwrite("policy", &NetworkOptions::policy)
        .def_readwrite("sum", &NetworkOptions::sum)
        .def_readwrite("allocator", &NetworkOptions::allocator)
        .def_readwrite("memoize_kernels", &NetworkOptions::memoize_kernels)
        .def_readwrite("memoize_images", &NetworkOptions::memoize_images)
        .def_readwrite("memoize_gradients", &NetworkOptions::memoize_gradients)
        .def_readwrite("pin", &NetworkOptions::pin)
        .def_readwrite("trace", &NetworkOptions::trace)
        .def_readwrite("input_gradient", &NetworkOptions::input_gradient)
        .def_readwrite("second_moments", &NetworkOptions::second_moments)
        .def_readwrite("bundle", &NetworkOptions::bundle)
        .def_readwrite("patches", &NetworkOptions::patches)
        .def_readwrite("seed", &NetworkOptions::seed)
        .def_readwrite("loss", &NetworkOptions::loss);
}

}  // namespace znn::bindings
