#include <pybind11/stl.h>

#include <optional>

#include "bindings/arrays.hpp"
#include "bindings/dlpack.hpp"
#include "engine/layer.hpp"

namespace znn::bindings {

namespace {

using E = std::tuple<int, int, int>;
using Shape = std::vector<std::int64_t>;

// A block of the team, as a Python buffer: the spectra of a batch of inputs, from forward to backward.
class Kept {
public:
    explicit Kept(std::size_t floats) : team_(Team::of_process()), block_(team_.take(floats)) {}
    Kept(const Kept&) = delete;
    ~Kept() {
        if (&team_ == &Team::of_process()) team_.give_back(std::move(block_));  // else simply freed, after a fork
    }

    float* data() const { return block_.data(); }
    std::size_t floats() const { return block_.size(); }

private:
    Team& team_;
    AlignedFloats block_;
};

Shape shape(std::int64_t first, std::int64_t maps, Extent e) { return {first, maps, e.z, e.y, e.x}; }

View view(const SharedTensor& t) {
    return {t.data(), long(t.stride(0)), long(t.stride(1)), long(t.stride(2)), long(t.stride(3)), long(t.stride(4))};
}

void need_packed(const SharedTensor& t, const char* what) {
    if (!t.packed()) throw py::value_error(std::string(what) + ": expected C order");
}

std::shared_ptr<Kept> forward(Layer& layer, int batch, const py::object& input, const py::object& kernels,
                              const std::optional<py::object>& bias, const py::object& output, bool keep) {
    const LayerProblem& p = layer.problem();
    const SharedTensor x(input, shape(batch, p.in_maps, p.input), "input");
    const SharedTensor w(kernels, shape(p.out_maps, p.group_in(), p.kernel), "weight");
    const SharedTensor y(output, shape(batch, p.out_maps, p.output()), "output");
    std::optional<SharedTensor> b;
    if (bias) need_packed(b.emplace(*bias, Shape{p.out_maps}, "bias"), "bias");
    const std::size_t floats = keep ? layer.kept_floats() * batch : 0;
    const auto kept = floats ? std::make_shared<Kept>(floats) : nullptr;
    Layer::Forward call{batch, view(x), view(w), view(y), b ? b->data() : nullptr, kept ? kept->data() : nullptr};
    py::gil_scoped_release release;
    layer.forward(call);
    return kept;
}

void backward(Layer& layer, int batch, const std::optional<py::object>& input, const std::optional<py::object>& kept,
              const py::object& kernels, const py::object& output_gradient, const std::optional<py::object>& input_gradient,
              const std::optional<py::object>& kernel_gradient, const std::optional<py::object>& bias_gradient) {
    const LayerProblem& p = layer.problem();
    if (kernel_gradient && !kept && !input) throw py::value_error("input: needed for the weight's gradient where no spectra are kept");
    const SharedTensor w(kernels, shape(p.out_maps, p.group_in(), p.kernel), "weight");
    const SharedTensor g(output_gradient, shape(batch, p.out_maps, p.output()), "output gradient");
    std::optional<SharedTensor> x, s, gx, gw, gb;
    if (kept) need_packed(s.emplace(*kept, Shape{std::int64_t(layer.kept_floats() * batch)}, "kept spectra"), "kept spectra");
    if (input) x.emplace(*input, shape(batch, p.in_maps, p.input), "input");
    if (input_gradient) gx.emplace(*input_gradient, shape(batch, p.in_maps, p.input), "input gradient");
    if (kernel_gradient)
        need_packed(gw.emplace(*kernel_gradient, shape(p.out_maps, p.group_in(), p.kernel), "weight gradient"), "weight gradient");
    if (bias_gradient) need_packed(gb.emplace(*bias_gradient, Shape{p.out_maps}, "bias gradient"), "bias gradient");
    Layer::Backward call{batch, x ? view(*x) : View{}, view(w), view(g), s ? s->data() : nullptr,
                         gx ? view(*gx) : View{}, gw ? gw->data() : nullptr, gb ? gb->data() : nullptr};
    py::gil_scoped_release release;
    layer.backward(call);
}

}  // namespace

void register_layer(py::module_& module) {
    py::class_<Kept, std::shared_ptr<Kept>>(module, "KeptSpectra", py::buffer_protocol()).def_buffer([](Kept& kept) {
        return py::buffer_info(kept.data(), py::ssize_t(kept.floats()));
    });
    py::class_<Layer, std::shared_ptr<Layer>>(module, "Layer")
        .def(py::init([](int in_maps, int out_maps, int groups, E input, E kernel, E dilation, E before, E after, Method method,
                         int bundle, E tile, bool keep) {
                 const LayerProblem problem{in_maps, out_maps, groups, extent(input), extent(kernel), extent(dilation),
                                            extent(before), extent(after)};
                 return std::shared_ptr<Layer>(Layer::make(Team::of_process(), problem, method, bundle, extent(tile), keep));
             }),
             py::arg("in_maps"), py::arg("out_maps"), py::arg("groups"), py::arg("input"), py::arg("kernel"), py::arg("dilation"),
             py::arg("before"), py::arg("after"), py::arg("method"), py::arg("bundle"), py::arg("tile"), py::arg("keep"))
        .def("kept_bytes", [](const Layer& layer, int batch) { return layer.kept_floats() * batch * sizeof(float); })
        .def_property_readonly("space_bytes", [](const Layer& layer) { return layer.space_floats() * sizeof(float); })
        .def("forward", &forward, py::arg("batch"), py::arg("input"), py::arg("weight"), py::arg("bias"), py::arg("output"),
             py::arg("keep"))
        .def("backward", &backward, py::arg("batch"), py::arg("input"), py::arg("kept"), py::arg("weight"),
             py::arg("output_gradient"), py::arg("input_gradient"), py::arg("weight_gradient"), py::arg("bias_gradient"));
    const auto release = py::call_guard<py::gil_scoped_release>();
    module.def("team_threads", [] { return Team::of_process().threads(); }, release);
    module.def("set_team_threads", [](int threads) { Team::of_process().set_threads(threads); }, release);
    module.def("free_team_memory", [] { Team::of_process().free_idle_memory(); }, release);
    module.def("team_idle_bytes", [] { return Team::of_process().idle_bytes(); }, release);
    module.def("team_bytes_in_use", [] { return Team::of_process().bytes_in_use(); }, release);
}

}  // namespace znn::bindings
