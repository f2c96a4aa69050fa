"""A network graph as a PyTorch module, for the baselines. Kernels are flipped: PyTorch cross-correlates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..problem import Problem
from .base import MOMENTUM, AdapterError, Session

if TYPE_CHECKING:
    import torch

    from znn.graph import Graph

TRANSFERS = ("linear", "relu", "tanh", "logistic")


class TorchNet:
    """The graph's operations in topological order on (patches, maps, z, y, x) tensors, or (patches, maps, y,
    x) where flat."""

    def __init__(
        self, graph: Graph, parameters: dict[str, np.ndarray], device: Any, channels_last: bool
    ) -> None:
        import torch

        self._torch, self._graph = torch, graph
        self.flat = all(node.extent[0] == 1 for node in graph.nodes)
        self.format = (
            (torch.channels_last if self.flat else torch.channels_last_3d)
            if channels_last
            else torch.contiguous_format
        )
        self._device = device
        self._parameters = parameters
        self.weights = {name: self._weight(name, value) for name, value in parameters.items()}

    def reset(self) -> None:
        """Give the weights their initial values, in place."""
        with self._torch.no_grad():
            for name, value in self._parameters.items():
                self.weights[name].copy_(self._weight(name, value))

    def _weight(self, name: str, value: np.ndarray) -> torch.Tensor:
        if value.ndim == 1:
            tensor = self._torch.from_numpy(value.copy()).to(self._device)
        else:
            tensor = self.tensor(value[:, :, ::-1, ::-1, ::-1].copy())
        return tensor.requires_grad_()

    def values(self) -> dict[str, np.ndarray]:
        """The parameters by name, in the paper's orientation."""
        return {name: self._value(weight.detach().cpu().contiguous().numpy()) for name, weight in self.weights.items()}

    def _value(self, array: np.ndarray) -> np.ndarray:
        if array.ndim == 1:
            return array
        return (array[:, :, None] if self.flat else array)[:, :, ::-1, ::-1, ::-1]

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """An array of five dimensions on the device, in this network's layout and without its depth where
        flat."""
        tensor = self._torch.from_numpy(np.ascontiguousarray(array)).to(self._device)
        return (tensor[:, :, 0] if self.flat else tensor).contiguous(memory_format=self.format)

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        images: dict[int, Any] = {}
        for node in self._graph.nodes:
            if node.name in inputs:
                images[node.index] = inputs[node.name]
                continue
            edges = [edge for edge in self._graph.edges if edge.target == node.index]
            bias = self.weights.get(node.name)
            total = self._edge(edges[0], images, bias)
            for edge in edges[1:]:
                total = total + self._edge(edge, images, None)
            images[node.index] = self._transfer(node, total)
        return {
            name: next(images[n.index] for n in self._graph.nodes if n.name == name)
            for name in self._graph.outputs
        }

    def _edge(self, edge: Any, images: dict[int, Any], bias: Any) -> Any:
        functional, cut = self._torch.nn.functional, (1 if self.flat else 0)
        image, dims = images[edge.source], "2d" if self.flat else "3d"
        if edge.kind == "conv":
            groups = image.shape[1] if edge.spec.depthwise else 1
            return getattr(functional, f"conv{dims}")(
                image, self.weights[edge.name], bias, dilation=edge.sparsity[cut:], groups=groups
            )
        if edge.kind in ("max_filter", "max_pool"):
            stride, dilation = (
                (1, edge.sparsity[cut:]) if edge.kind == "max_filter" else (edge.stride[cut:], 1)
            )
            image = getattr(functional, f"max_pool{dims}")(
                image, edge.window[cut:], stride, dilation=dilation
            )
        elif edge.kind == "crop":
            image = image[(..., *(slice(o, o + n) for o, n in zip(edge.offset[cut:], edge.out_extent[cut:])))]
        elif edge.kind != "identity":
            raise AdapterError(f"edge {edge.name}: the PyTorch adapters do not know {edge.kind}")
        return image if bias is None else image + bias.reshape(-1, *[1] * (image.ndim - 2))

    def _transfer(self, node: Any, image: Any) -> Any:
        transfer = node.spec.transfer if node.spec.kind == "transfer" else "linear"
        if transfer not in TRANSFERS:
            raise AdapterError(
                f"node {node.name}: the PyTorch adapters do not know the transfer function {transfer}"
            )
        return (
            image
            if transfer == "linear"
            else getattr(self._torch, {"logistic": "sigmoid"}.get(transfer, transfer))(image)
        )


class TorchSession(Session):
    """A lap: gradients from the kept outputs, SGD step, next forward. `synchronize` waits for a device's
    queue."""

    def __init__(
        self,
        problem: Problem,
        net: TorchNet,
        inputs: dict[str, np.ndarray],
        gradients: dict[str, np.ndarray],
        rate: float,
        synchronize: Any = None,
    ) -> None:
        import torch

        self._torch, self._net, self._round = torch, net, problem.phase == "round"
        self._lead = problem.patches > 1
        self._inputs = {name: net.tensor(self._five(array)) for name, array in inputs.items()}
        voxels = {name: array.size / array.shape[-4] for name, array in gradients.items()}
        self._gradients = {
            name: net.tensor(self._five(array) / np.float32(voxels[name]))
            for name, array in gradients.items()
        }
        self._rate, self._synchronize = rate, synchronize or (lambda: None)
        self._outputs: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        self._optimiser = self._torch.optim.SGD(self._net.weights.values(), lr=self._rate, momentum=MOMENTUM)
        self._forward()

    def reset(self) -> None:
        """Back to the initial parameters, without momentum, as if no lap had been run."""
        self._net.reset()
        self._begin()

    def _five(self, array: np.ndarray) -> np.ndarray:
        return array if self._lead else array[None]

    def _forward(self) -> None:
        with self._torch.set_grad_enabled(self._round):
            self._outputs = self._net.forward(self._inputs)
        self._synchronize()

    def lap(self) -> None:
        if self._round:
            self._optimiser.zero_grad(set_to_none=True)
            names = list(self._outputs)
            self._torch.autograd.backward(
                [self._outputs[n] for n in names], [self._gradients[n] for n in names]
            )
            self._optimiser.step()
        self._forward()

    def parameters(self) -> dict[str, np.ndarray]:
        return self._net.values()

    def outputs(self) -> dict[str, np.ndarray]:
        arrays = {name: value.detach().cpu().contiguous().numpy() for name, value in self._outputs.items()}
        if self._net.flat:
            arrays = {name: value[:, :, None] for name, value in arrays.items()}
        return arrays if self._lead else {name: value[0] for name, value in arrays.items()}
