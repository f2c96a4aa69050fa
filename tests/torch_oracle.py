"""PyTorch as an oracle: the network of a graph in torch.nn.functional, autograd and torch.optim.SGD.

It has the methods of `znn.reference.ReferenceNetwork` that a training step needs, so that one test body
checks the engine and the reference against it. PyTorch cross-correlates: kernels are flipped where used, and
stay in the paper's orientation as parameters.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

TRANSFER = {"linear": lambda x: x, "relu": torch.relu, "tanh": torch.tanh, "logistic": torch.sigmoid}


def conv(images: Any, kernel: Any, sparsity: tuple[int, ...] = (1, 1, 1), depthwise: bool = False) -> Any:
    """The paper's convolution of (patches, maps, z, y, x) through conv3d."""
    return F.conv3d(images, torch.flip(kernel, (2, 3, 4)), dilation=tuple(sparsity),
                    groups=kernel.shape[0] if depthwise else 1)


def loss(kind: str, output: Any, target: Any, weights: Any) -> Any:
    """The loss of (patches, maps, z, y, x), divided by the output voxels. weights: broadcast, may be 1.0."""
    if kind == "squared":
        terms = 0.5 * (output - target) ** 2
    elif kind == "binomial":
        terms = F.binary_cross_entropy_with_logits(output, target, reduction="none")
    else:
        terms = -target * F.log_softmax(output, dim=1)
    return (terms * weights).sum() / (output.numel() / output.shape[1])


class TorchNetwork:
    """graph: a znn Graph; parameters: {name: array}. Trains in float64. Dropout edges must have ratio 0.

    `sums` and `images` are those of `ReferenceNetwork`.
    """

    def __init__(self, graph: Any, parameters: Mapping[str, np.ndarray], rate: float = 0.01,
                 momentum: float = 0.9, weight_decay: float = 0.0):
        self.graph = graph
        self.tensors = {name: torch.tensor(np.asarray(value, np.float64), requires_grad=True)
                        for name, value in parameters.items()}
        edges = {edge.name: edge.spec for edge in graph.edges}
        nodes = {node.name: node.spec for node in graph.nodes}
        groups = []
        for name, tensor in self.tensors.items():
            multiplier, decay = (edges[name].rate, edges[name].weight_decay) if name in edges else (
                nodes[name].rate, 0.0)
            groups.append({"params": [tensor], "lr": rate * multiplier, "weight_decay": weight_decay * decay})
        self.optimiser = torch.optim.SGD(groups, lr=rate, momentum=momentum)

    def _edge(self, edge: Any, images: Any) -> Any:
        if edge.kind == "conv":
            return conv(images, self.tensors[edge.name], edge.sparsity, edge.spec.depthwise)
        if edge.kind == "max_filter":
            return F.max_pool3d(images, tuple(edge.window), stride=1, dilation=tuple(edge.sparsity))
        if edge.kind == "max_pool":
            return F.max_pool3d(images, tuple(edge.window), stride=tuple(edge.stride))
        if edge.kind == "crop":
            z, y, x = (slice(o, o + n) for o, n in zip(edge.offset, edge.out_extent))
            return images[:, :, z, y, x]
        assert edge.kind == "identity" or edge.spec.ratio == 0.0, f"edge {edge.name!r} is not for this oracle"
        return images

    def _run(self, inputs: Any) -> dict[str, Any]:
        self._batched = next(iter(_by_name(inputs, self.graph.inputs).values())).ndim == 5
        images = {name: _tensor(value).requires_grad_() for name, value in
                  _by_name(inputs, self.graph.inputs).items()}
        self._inputs, self.sums = dict(images), {}
        for node in self.graph.nodes:
            if node.name in images:
                continue
            total = sum(self._edge(edge, images[self.graph.nodes[edge.source].name])
                        for edge in self.graph.edges if edge.target == node.index)
            if node.spec.kind == "transfer":
                if node.name in self.tensors:
                    total = total + self.tensors[node.name][:, None, None, None]
                self.sums[node.name] = total.detach().numpy()
                total = TRANSFER[node.spec.transfer](total)
            images[node.name] = total
        self.images = {name: value.detach().numpy() for name, value in images.items()}
        return {name: images[name] for name in self.graph.outputs}

    def _hand_out(self, tensors: Mapping[str, Any]) -> Any:
        arrays = {name: tensor.detach().numpy().copy() for name, tensor in tensors.items()}
        arrays = arrays if self._batched else {name: array[0] for name, array in arrays.items()}
        return arrays if len(arrays) > 1 else next(iter(arrays.values()))

    def forward(self, inputs: Any, phase: str = "infer") -> Any:
        return self._hand_out(self._run(inputs))

    def train_step(self, inputs: Any, targets: Any, weights: Any = None) -> float:
        self.optimiser.zero_grad()
        outputs = self._run(inputs)
        targets = _by_name(targets, self.graph.outputs)
        weights = {} if weights is None else _by_name(weights, self.graph.outputs)
        total = sum(loss(self.graph.spec.loss, output, _tensor(targets[name]),
                         _tensor(weights.get(name, 1.0))) for name, output in outputs.items())
        total.backward()
        self.optimiser.step()
        return total.item()

    def input_gradient(self) -> Any:
        return self._hand_out({name: tensor.grad for name, tensor in self._inputs.items()})

    def parameters(self) -> dict[str, np.ndarray]:
        return {name: tensor.detach().numpy().copy() for name, tensor in self.tensors.items()}

    def momenta(self) -> dict[str, np.ndarray]:
        return {name: self.optimiser.state[tensor]["momentum_buffer"].numpy().copy()
                for name, tensor in self.tensors.items()}


def _by_name(arrays: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return dict(arrays) if isinstance(arrays, Mapping) else {names[0]: arrays}


def _tensor(array: Any) -> Any:
    """float64, with the patches in front (a single voxel-weight array may have fewer axes: broadcast)."""
    array = np.asarray(array, np.float64)
    return torch.tensor(array[None] if array.ndim == 4 else array)
