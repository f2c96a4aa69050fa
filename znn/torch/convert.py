"""Networks as PyTorch modules, and sequential PyTorch models as networks.

PyTorch cross-correlates, the engine convolves: kernels are flipped on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from znn import shapes
from znn.errors import DataError, SpecError
from znn.graph import Graph
from znn.init import initial_parameters
from znn.network import Network
from znn.spec import EdgeSpec, Extent, NetworkSpec, topological_order

TRANSFERS = {"relu": torch.relu, "tanh": torch.tanh, "logistic": torch.sigmoid}
ACTIVATIONS = {torch.nn.ReLU: "relu", torch.nn.Tanh: "tanh", torch.nn.Sigmoid: "logistic"}
READ = ("Conv2d, Conv3d, MaxPool2d, MaxPool3d, ReLU, Tanh, Sigmoid, Dropout, Dropout2d, Dropout3d and Identity in any "
        "nesting of Sequential")

Parameters = dict[str, np.ndarray]


# ---- networks as modules ----------------------------------------------------------------------------------
class Crop(torch.nn.Module):
    """Cuts the box that a crop edge takes out of its source."""

    def __init__(self, edge: EdgeSpec) -> None:
        super().__init__()
        self.edge = edge

    def forward(self, images: torch.Tensor, target: Extent) -> torch.Tensor:
        """images: (batch, maps, z, y, x); target: extent of the result. Raises SpecError where it does not fit."""
        offset = shapes.crop_offset(self.edge, tuple(images.shape[2:]), target)
        return images[(..., *(slice(o, o + n) for o, n in zip(offset, target)))]


class NetworkModule(torch.nn.Module):
    """A network description as a module: `edges` holds one module per edge group, `biases` those that no convolution has.

    forward takes one tensor per input node, (batch, maps, z, y, x), or (batch, maps, y, x) for nets of depth 1, and returns
    the output node's tensor, or a dict by name where there are several.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        order = topological_order(spec)
        self.spec = spec
        self.inputs, self.outputs = shapes.input_names(spec), shapes.output_names(spec)
        self._sparsities = shapes.edge_sparsities(spec, order)
        self._crops = any(edge.kind == "crop" for edge in spec.edges)
        self.edges, self.biases = torch.nn.ModuleDict(), torch.nn.ParameterDict()
        self._nodes: list[tuple[str, tuple[EdgeSpec, ...]]] = []
        for name in order:
            if name not in self.inputs:
                self._add_node(name, tuple(edge for edge in spec.edges if edge.target == name))

    def _add_node(self, name: str, incoming: tuple[EdgeSpec, ...]) -> None:
        biased = self.spec.node(name).bias
        for edge in incoming:
            has_bias = biased and edge.kind == "conv"
            biased = biased and not has_bias
            self.edges[_key(edge.name)] = _module(self.spec, edge, self._sparsities[edge.name], has_bias)
        if biased:
            self.biases[_key(name)] = torch.nn.Parameter(torch.zeros(self.spec.node(name).maps))
        self._nodes.append((name, incoming))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        if len(inputs) != len(self.inputs):
            raise DataError(f"network {self.spec.name!r}: got {len(inputs)} inputs, expected {', '.join(self.inputs)}")
        flat = inputs[0].ndim == 4
        images = {name: tensor.unsqueeze(2) if flat else tensor for name, tensor in zip(self.inputs, inputs)}
        extents = self._extents(images) if self._crops else {}
        for name, incoming in self._nodes:
            images[name] = self._node(name, incoming, images, extents)
        results = {name: images[name].squeeze(2) if flat else images[name] for name in self.outputs}
        return results if len(results) > 1 else results[self.outputs[0]]

    def _extents(self, images: Mapping[str, torch.Tensor]) -> dict[str, Extent]:
        """Of all nodes: what a crop cuts out follows from what is done with it."""
        return shapes.node_extents(self.spec, self._sparsities, input={n: tuple(t.shape[2:]) for n, t in images.items()})

    def _node(self, name: str, incoming: tuple[EdgeSpec, ...], images: Mapping[str, torch.Tensor],
              extents: Mapping[str, Extent]) -> torch.Tensor:
        total = None
        for edge in incoming:
            operation, source = self.edges[_key(edge.name)], images[edge.source]
            result = operation(source, extents[name]) if edge.kind == "crop" else operation(source)
            total = result if total is None else total + result
        if _key(name) in self.biases:
            total = total + self.biases[_key(name)].reshape(-1, 1, 1, 1)
        transfer = TRANSFERS.get(self.spec.node(name).transfer)
        return transfer(total) if transfer else total

    def load_network(self, parameters: Mapping[str, np.ndarray]) -> None:
        """Take the values of a network's parameters: kernels by edge, biases by node. Raises DataError."""
        with torch.no_grad():
            for name, tensor in self._by_name().items():
                if name not in parameters or tuple(np.shape(parameters[name])) != tuple(tensor.shape):
                    got = np.shape(parameters[name]) if name in parameters else "nothing"
                    raise DataError(f"parameter {name!r} has shape {got}, expected {tuple(tensor.shape)}")
                tensor.copy_(_flipped(torch.from_numpy(np.array(parameters[name], np.float32))))

    def network_parameters(self) -> Parameters:
        """The parameters as `znn.Network` takes them."""
        return {name: _flipped(tensor.detach().float()).contiguous().numpy().copy() for name, tensor in self._by_name().items()}

    def _by_name(self) -> dict[str, torch.Tensor]:
        found = {}
        for name, incoming in self._nodes:
            for edge in incoming:
                module = self.edges[_key(edge.name)]
                if edge.kind == "conv":
                    found[edge.name] = module.weight
                    if module.bias is not None:
                        found[name] = module.bias
            if _key(name) in self.biases:
                found[name] = self.biases[_key(name)]
        return found


def _key(name: str) -> str:
    return name.replace(".", "_")


def _flipped(kernels: torch.Tensor) -> torch.Tensor:
    """The other orientation of kernels (out, in, z, y, x); biases as they are."""
    return kernels.flip(2, 3, 4) if kernels.ndim == 5 else kernels


def _module(spec: NetworkSpec, edge: EdgeSpec, sparsity: Extent, bias: bool) -> torch.nn.Module:
    if edge.kind == "conv":
        maps = spec.node(edge.source).maps, spec.node(edge.target).maps
        return torch.nn.Conv3d(*maps, edge.kernel, dilation=sparsity, groups=maps[0] if edge.depthwise else 1, bias=bias)
    if edge.kind == "max_filter":
        return torch.nn.MaxPool3d(edge.window, stride=1, dilation=sparsity)
    if edge.kind == "max_pool":
        return torch.nn.MaxPool3d(edge.window, stride=edge.stride)
    if edge.kind == "dropout":
        return torch.nn.Dropout(edge.ratio)
    return Crop(edge) if edge.kind == "crop" else torch.nn.Identity()


def to_torch(net: Network | Graph | NetworkSpec, parameters: Mapping[str, np.ndarray] | None = None) -> NetworkModule:
    """The same network as a `torch.nn.Module`, with the network's parameters.

    parameters: as `Network.parameters()` gives them; default those of a Network, else initial ones with seed 0. The module
    takes images of any extent that the network can. Its convolutions are PyTorch's: `replace_convs` exchanges them.
    Raises SpecError, DataError.
    """
    if not isinstance(net, Network | Graph | NetworkSpec):
        raise DataError(f"to_torch: got a {type(net).__name__}, expected a Network, Graph or NetworkSpec")
    graph = net.graph if isinstance(net, Network) else net if isinstance(net, Graph) else None
    spec = graph.spec if graph else net
    module = NetworkModule(spec)
    if parameters is None:
        parameters = net.parameters() if isinstance(net, Network) else initial_parameters(graph or Graph.build(spec, output=1))
    module.load_network(parameters)
    return module


# ---- modules as networks ----------------------------------------------------------------------------------
def from_torch(model: torch.nn.Module | Mapping[str, torch.Tensor], spec: NetworkSpec | None = None, *, name: str = "torch",
               loss: str = "squared") -> tuple[NetworkSpec, Parameters]:
    """A network description and its parameters from a sequential model, a module of `to_torch`, or a state dict.

    Convolutions must have stride 1 and no padding (the engine's are valid), activations directly follow a convolution, with
    no more than pooling in between. A state dict says nothing of pooling and activations: give the network as `spec`; its
    kernels and biases are taken in their order, or by name where they are those of `to_torch`. Raises SpecError naming the
    module, DataError.
    """
    if isinstance(model, Mapping):
        return _from_state(model, spec)
    if isinstance(model, NetworkModule):
        return model.spec, model.network_parameters()
    if not isinstance(model, torch.nn.Module):
        raise DataError(f"from_torch: got a {type(model).__name__}, expected a Module or a state dict")
    found = _Reader(model)
    result = NetworkSpec.layered(name, found.input_maps, found.layers, loss, found.dims)
    if spec is not None and result.edges != spec.edges:
        raise SpecError("from_torch: the model's layers differ from those of spec")
    edges = [edge for edge in result.edges if edge.kind == "conv"]
    parameters: Parameters = {}
    for edge, (kernels, bias) in zip(edges, found.arrays):
        parameters[edge.name] = kernels
        if bias is not None:
            parameters[edge.target] = bias
    return result, parameters


class _Reader:
    """The layers of a sequential model, as `NetworkSpec.layered` takes them, and the arrays of its convolutions."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers: list[dict[str, Any]] = []
        self.arrays: list[tuple[np.ndarray, np.ndarray | None]] = []
        self.input_maps, self.dims, self._filtered = 0, 3, (1, 1, 1)
        for path, module in _leaves("", model):
            self._read(f"module {path!r} ({type(module).__name__})", module)
        if not self.arrays:
            raise SpecError(f"from_torch: {type(model).__name__} has no convolution; expected {READ}")

    def _read(self, what: str, module: torch.nn.Module) -> None:
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            self._conv(what, module)
        elif type(module) in ACTIVATIONS:
            self._activation(what, ACTIVATIONS[type(module)])
        elif isinstance(module, torch.nn.MaxPool2d | torch.nn.MaxPool3d):
            self._pool(what, module)
        elif isinstance(module, torch.nn.Dropout | torch.nn.Dropout2d | torch.nn.Dropout3d):
            if module.p > 0:
                self.layers.append({"dropout": float(module.p)})
        elif not isinstance(module, torch.nn.Identity):
            raise SpecError(f"from_torch: {what} cannot be read; expected {READ}")

    def _conv(self, what: str, conv: torch.nn.Module) -> None:
        if any(step != 1 for step in conv.stride):
            raise SpecError(f"from_torch: {what} has stride {conv.stride}; expected 1")
        if conv.padding != "valid" and any(conv.padding if not isinstance(conv.padding, str) else (1,)):
            raise SpecError(f"from_torch: {what} has padding {conv.padding!r}; expected 0: the engine's convolutions are valid")
        depthwise = conv.groups > 1
        if depthwise and not conv.groups == conv.in_channels == conv.out_channels:
            raise SpecError(f"from_torch: {what} has {conv.groups} groups; expected 1, or as many as maps on both sides")
        dims = 2 if isinstance(conv, torch.nn.Conv2d) else 3
        if self.arrays and dims != self.dims:
            raise SpecError(f"from_torch: {what} has {dims} dimensions, those before it have {self.dims}")
        self.dims, self.input_maps = dims, self.input_maps or conv.in_channels
        layer: dict[str, Any] = {"conv": conv.out_channels, "kernel": _deep(conv.kernel_size), "bias": conv.bias is not None}
        if _deep(conv.dilation) != self._filtered:  # else it is what the filters before it imply
            layer["sparsity"] = _deep(conv.dilation)
        self.layers.append(layer | ({"depthwise": True} if depthwise else {}))
        weight = conv.weight.detach().float()
        kernels = _flipped(weight.unsqueeze(2) if dims == 2 else weight)
        self.arrays.append((kernels.contiguous().numpy().copy(),
                            None if conv.bias is None else conv.bias.detach().float().numpy().copy()))

    def _activation(self, what: str, transfer: str) -> None:
        # Maxima commute with increasing functions: an activation behind pooling belongs to the convolution before it.
        before = [layer for layer in self.layers if "max_pool" not in layer and "max_filter" not in layer]
        if not before or "conv" not in before[-1] or "transfer" in before[-1]:
            raise SpecError(f"from_torch: {what} does not follow a convolution; expected one, or pooling, before it")
        before[-1]["transfer"] = transfer

    def _pool(self, what: str, pool: torch.nn.Module) -> None:
        def deep(value: Any) -> Extent:
            dims = 2 if isinstance(pool, torch.nn.MaxPool2d) else 3
            return _deep(value if isinstance(value, tuple) else (value,) * dims)

        window, stride, apart = deep(pool.kernel_size), deep(pool.stride), deep(pool.dilation)
        padding = pool.padding if isinstance(pool.padding, tuple) else (pool.padding,)
        if any(padding) or pool.ceil_mode or pool.return_indices:
            raise SpecError(f"from_torch: {what} has padding, ceil_mode or return_indices; expected none of them")
        if stride == (1, 1, 1) and window != (1, 1, 1):
            self.layers.append({"max_filter": window} | ({"sparsity": apart} if apart != self._filtered else {}))
            self._filtered = tuple(f * w for f, w in zip(self._filtered, window))
        elif apart == (1, 1, 1):
            self.layers.append({"max_pool": window, "stride": stride})
        else:
            raise SpecError(f"from_torch: {what} has stride {stride} and dilation {apart}; expected one of them to be 1")


def _leaves(path: str, module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    if not isinstance(module, torch.nn.Sequential):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _leaves(f"{path}.{name}" if path else name, child)


def _deep(extent: tuple[int, ...]) -> Extent:
    return (1,) * (3 - len(extent)) + tuple(int(n) for n in extent)


def _from_state(state: Mapping[str, torch.Tensor], spec: NetworkSpec | None) -> tuple[NetworkSpec, Parameters]:
    if spec is None:
        raise SpecError("from_torch: a state dict holds no layers; expected the network as spec, or a Sequential")
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}
    module = NetworkModule(spec)
    wanted = dict(module.named_parameters())
    if set(tensors) == set(wanted):
        pairs = [(key, tensors[key], wanted[key]) for key in wanted]
    elif [value.ndim > 1 for value in tensors.values()] == [value.ndim > 1 for value in wanted.values()]:
        pairs = [(key, value, target) for (key, value), target in zip(tensors.items(), wanted.values())]
    else:
        raise DataError(f"from_torch: the state dict has {len(tensors)} arrays ({', '.join(list(tensors)[:4])}, ...), expected "
                        f"the {len(wanted)} of network {spec.name!r}: kernels and biases in its order")
    with torch.no_grad():
        for key, value, target in pairs:
            deep = value.unsqueeze(2) if value.ndim == 4 else value
            if deep.shape != target.shape:
                raise DataError(f"from_torch: {key} has shape {tuple(value.shape)}, expected {tuple(target.shape)}")
            target.copy_(deep)
    return spec, module.network_parameters()
