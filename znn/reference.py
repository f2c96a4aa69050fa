"""Plain float64 NumPy versions of every operation and of a whole training network.

This is what the engine is checked against. It knows NumPy and nothing else of the project: it reads a graph
through its public attributes only. Every function is written to be obviously right first; loops run over taps
of kernels and windows, never over voxels, so that images of about 40^3 with a few maps remain usable.

Arrays are (maps, z, y, x), kernels (out, in, z, y, x) or, depthwise, (maps, 1, z, y, x), biases (maps,).
Convolution is the paper's (arXiv 1510.06706): "valid" and true, that is with the kernel flipped. With
kernel k and sparsity s,

    out[p] = sum_j  image[p + s (k - 1 - j)] kernel[j],      extent n - s (k - 1).
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Array = np.ndarray
Extent = tuple[int, int, int]


# ---- windows and taps -----------------------------------------------------------------------------
def valid_extent(extent: Extent, kernel: Extent, sparsity: Extent = (1, 1, 1)) -> Extent:
    """Extent of a valid convolution or filter, n - s (k - 1). ValueError where nothing would remain."""
    out = tuple(n - s * (k - 1) for n, k, s in zip(extent, kernel, sparsity))
    if min(out) < 1:
        raise ValueError(f"kernel or window {tuple(kernel)} at sparsity {tuple(sparsity)} does not fit into "
                         f"an image of extent {tuple(extent)}")
    return out


def _shifts(kernel: Extent, sparsity: Extent, out: Extent, stride: Extent = (1, 1, 1)
            ) -> Iterator[tuple[Extent, tuple[slice, ...]]]:
    """Each tap j of a kernel or window, in z, y, x order, and the slices of (maps, z, y, x) it meets."""
    for tap in np.ndindex(*kernel):
        box = (slice(s * j, s * j + d * (n - 1) + 1, d) for j, s, n, d in zip(tap, sparsity, out, stride))
        yield tap, (slice(None), *box)


def _flip(kernel: Array) -> Array:
    return kernel[:, :, ::-1, ::-1, ::-1]


# ---- convolution ----------------------------------------------------------------------------------
def convolve(image: Array, kernel: Array, sparsity: Extent = (1, 1, 1), depthwise: bool = False) -> Array:
    """Valid true convolution, summed over the input maps: (in, n) and (out, in, k) give (out, n - s(k-1)).

    depthwise: map i with kernel i of (maps, 1, k), nothing is summed.
    """
    flipped, extent = _flip(kernel), kernel.shape[2:]
    out = np.zeros((kernel.shape[0], *valid_extent(image.shape[1:], extent, sparsity)))
    for tap, box in _shifts(extent, sparsity, out.shape[1:]):
        weights = flipped[(slice(None), slice(None), *tap)]
        if depthwise:
            out += weights[:, 0, None, None, None] * image[box]
        else:
            out += np.tensordot(weights, image[box], axes=1)
    return out


def convolve_backward(gradient: Array, kernel: Array, sparsity: Extent = (1, 1, 1), depthwise: bool = False
                      ) -> Array:
    """Gradient of `convolve` for its image: full convolution of the gradient with the unflipped kernel."""
    flipped, extent = _flip(kernel), kernel.shape[2:]
    maps = kernel.shape[0] if depthwise else kernel.shape[1]
    image = np.zeros((maps, *(n + s * (k - 1) for n, k, s in zip(gradient.shape[1:], extent, sparsity))))
    for tap, box in _shifts(extent, sparsity, gradient.shape[1:]):
        weights = flipped[(slice(None), slice(None), *tap)]
        if depthwise:
            image[box] += weights[:, 0, None, None, None] * gradient
        else:
            image[box] += np.tensordot(weights.T, gradient, axes=1)
    return image


def convolve_kernel_gradient(image: Array, gradient: Array, sparsity: Extent = (1, 1, 1),
                             depthwise: bool = False) -> Array:
    """Gradient of `convolve` for its kernel; the kernel's extent follows from the other two."""
    extent = tuple((n - m) // s + 1 for n, m, s in zip(image.shape[1:], gradient.shape[1:], sparsity))
    flipped = np.zeros((gradient.shape[0], 1 if depthwise else image.shape[0], *extent))
    for tap, box in _shifts(extent, sparsity, gradient.shape[1:]):
        where = (slice(None), slice(None), *tap)
        if depthwise:
            flipped[where] = np.sum(image[box] * gradient, axis=(1, 2, 3))[:, None]
        else:
            flipped[where] = np.tensordot(gradient, image[box], axes=((1, 2, 3), (1, 2, 3)))
    return _flip(flipped).copy()


# ---- max-filter and max-pool ----------------------------------------------------------------------
def max_filter(image: Array, window: Extent, sparsity: Extent = (1, 1, 1)) -> tuple[Array, Array]:
    """Sliding maximum at stride 1: values and argmax, both (maps, n - s(w-1)).

    argmax holds the flat voxel (z*ny + y)*nx + x in the image of the first maximum in z, y, x order. A NaN in
    the window is its maximum.
    """
    return _windowed_max(image, window, sparsity, (1, 1, 1), valid_extent(image.shape[1:], window, sparsity))


def max_pool(image: Array, window: Extent, stride: Extent | None = None) -> tuple[Array, Array]:
    """Maximum over blocks that begin `stride` (default: the window) apart; returns what `max_filter` does.

    The extent is floor((n - w) / stride) + 1.
    """
    stride = stride or window
    out = tuple((n - 1) // d + 1 for n, d in zip(valid_extent(image.shape[1:], window), stride))
    return _windowed_max(image, window, (1, 1, 1), stride, out)


def _windowed_max(image: Array, window: Extent, sparsity: Extent, stride: Extent, out: Extent
                  ) -> tuple[Array, Array]:
    voxel = np.broadcast_to(np.arange(np.prod(image.shape[1:])).reshape(image.shape[1:]), image.shape)
    values = argmax = None
    for _, box in _shifts(window, sparsity, out, stride):
        if values is None:
            values, argmax = image[box].copy(), voxel[box].copy()
            continue
        better = (image[box] > values) | (np.isnan(image[box]) & ~np.isnan(values))
        values[better], argmax[better] = image[box][better], voxel[box][better]
    return values, argmax


def max_backward(gradient: Array, argmax: Array, extent: Extent) -> Array:
    """Gradient of `max_filter` or `max_pool` for their image of the given extent: scattered to the argmax."""
    image = np.zeros((gradient.shape[0], int(np.prod(extent))))
    for row, index, values in zip(image, argmax, gradient):
        np.add.at(row, index.ravel(), values.ravel())
    return image.reshape(gradient.shape[0], *extent)


# ---- pointwise ------------------------------------------------------------------------------------
def logistic(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


TRANSFER = {
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0.0),
    "tanh": np.tanh,
    "logistic": logistic,
}
# The derivatives, as functions of the output y = f(x).
TRANSFER_DERIVATIVE = {
    "linear": np.ones_like,
    "relu": lambda y: (y > 0.0).astype(y.dtype),
    "tanh": lambda y: 1.0 - y * y,
    "logistic": lambda y: y * (1.0 - y),
}


def transfer(image: Array, function: str, bias: Array | None = None) -> Array:
    """f(image + bias per map); function: linear | relu | tanh | logistic."""
    return TRANSFER[function](image if bias is None else image + bias[:, None, None, None])


def transfer_backward(gradient: Array, output: Array, function: str) -> Array:
    """Gradient of `transfer` for its image (the bias gradient is its sum over z, y, x), from the output."""
    return gradient * TRANSFER_DERIVATIVE[function](output)


def dropout(image: Array, mask: Array, ratio: float) -> Array:
    """image * mask / (1 - ratio), mask: 1 keeps, 0 drops a voxel. Its own transpose, so also the backward."""
    return image * mask / (1.0 - ratio)


def crop(image: Array, offset: Extent, extent: Extent) -> Array:
    """The box of the given extent that begins at offset."""
    return image[(slice(None), *(slice(o, o + n) for o, n in zip(offset, extent)))].copy()


def crop_backward(gradient: Array, offset: Extent, extent: Extent) -> Array:
    """Gradient of `crop` for its image of the given extent: zero outside the box."""
    image = np.zeros((gradient.shape[0], *extent))
    image[(slice(None), *(slice(o, o + n) for o, n in zip(offset, gradient.shape[1:])))] = gradient
    return image


# ---- losses ---------------------------------------------------------------------------------------
# (sum over maps and voxels, gradient), not yet divided by the number of output voxels. weights multiply each
# voxel's term: None, (z, y, x), or with one or all maps in front.
def squared_loss(output: Array, target: Array, weights: Array | None = None) -> tuple[float, Array]:
    """0.5 (y - t)^2."""
    weights = 1.0 if weights is None else weights
    difference = output - target
    return float(np.sum(0.5 * weights * difference**2)), weights * difference


def binomial_loss(output: Array, target: Array, weights: Array | None = None) -> tuple[float, Array]:
    """Cross-entropy of logistic(y) with t in [0, 1]: log(1 + exp(y)) - t y, in a form free of overflow."""
    weights = 1.0 if weights is None else weights
    terms = np.maximum(output, 0.0) - output * target + np.log1p(np.exp(-np.abs(output)))
    return float(np.sum(weights * terms)), weights * (logistic(output) - target)


def softmax_loss(output: Array, target: Array, weights: Array | None = None) -> tuple[float, Array]:
    """Cross-entropy of softmax over the maps; targets are probabilities (they sum to 1 over the maps)."""
    weights = 1.0 if weights is None else weights
    shifted = output - output.max(axis=0)
    log_probability = shifted - np.log(np.sum(np.exp(shifted), axis=0))
    gradient = np.exp(log_probability) * target.sum(axis=0) - target
    return float(np.sum(-weights * target * log_probability)), weights * gradient


LOSS = {"squared": squared_loss, "binomial": binomial_loss, "softmax": softmax_loss}


def sgd_step(weights: Array, momenta: Array, gradient: Array, rate: float, momentum: float = 0.0,
             weight_decay: float = 0.0) -> tuple[Array, Array]:
    """g' = g + weight_decay w ; v = momentum v + g' ; w = w - rate v. Returns the new (w, v)."""
    momenta = momentum * momenta + gradient + weight_decay * weights
    return weights - rate * momenta, momenta


def adam_step(weights: Array, momenta: Array, second_moments: Array, gradient: Array, rate: float, t: int,
              momentum: float = 0.9, square_momentum: float = 0.999, epsilon: float = 1e-8,
              weight_decay: float = 0.0) -> tuple[Array, Array, Array]:
    """Adam (Kingma and Ba 2015), its algorithm 1, in round t from 1. Returns the new (w, m, s)."""
    gradient = gradient + weight_decay * weights
    momenta = momentum * momenta + (1 - momentum) * gradient
    second_moments = square_momentum * second_moments + (1 - square_momentum) * gradient**2
    mean, square = momenta / (1 - momentum**t), second_moments / (1 - square_momentum**t)
    return weights - rate * mean / (np.sqrt(square) + epsilon), momenta, second_moments


# ---- whole networks -------------------------------------------------------------------------------
class ReferenceNetwork:
    """A training network with the methods and formulas of `znn.Network`, in float64 and without tasks.

    graph: a `znn.graph.Graph`; parameters: {name: array} as `znn.init.initial_parameters` gives them.
    Inputs are one array or, by name, several: (maps, z, y, x), or (patches, maps, z, y, x) for a minibatch;
    outputs come in the same rank, as a dict where there are several. The loss and its gradients are divided
    by the output voxels N = patches * z * y * x of each output node; `backward(G)` takes G as the gradient
    before that division. `sums` and `images` hold, by node name, what the last forward computed before and
    after the transfer functions (patches first). SGD, or, where `square_momentum` is given, Adam.
    """

    def __init__(self, graph: Any, parameters: Mapping[str, Array], rate: float = 0.01, momentum: float = 0.9,
                 weight_decay: float = 0.0, square_momentum: float | None = None, epsilon: float = 1e-8):
        self.graph = graph
        self.square_momentum, self.epsilon = square_momentum, epsilon
        self.learning_rate, self.momentum, self.weight_decay = rate, momentum, weight_decay
        self.round = 0
        self.sums: dict[str, Array] = {}
        self.images: dict[str, Array] = {}
        self._parameters = {name: np.array(value, np.float64) for name, value in parameters.items()}
        self._momenta = {name: np.zeros_like(value) for name, value in self._parameters.items()}
        self._second_moments = {name: np.zeros_like(value) for name, value in self._parameters.items()}
        self._gradients: dict[str, Array] = {}
        self._image_gradients: dict[str, Array] = {}
        self._argmax: dict[str, list[Array]] = {}
        self._masks: Mapping[str, Array] | None = None
        self._batched = False

    # -- state
    def parameters(self) -> dict[str, Array]:
        return {name: value.copy() for name, value in self._parameters.items()}

    def set_parameters(self, parameters: Mapping[str, Array]) -> None:
        self._parameters.update(_same_shapes(self._parameters, parameters))

    def momenta(self) -> dict[str, Array]:
        return {name: value.copy() for name, value in self._momenta.items()}

    def set_momenta(self, momenta: Mapping[str, Array]) -> None:
        self._momenta.update(_same_shapes(self._momenta, momenta))

    def second_moments(self) -> dict[str, Array]:
        return {name: value.copy() for name, value in self._second_moments.items()}

    def gradients(self) -> dict[str, Array]:
        """The parameters' gradients of the last backward, divided by N, before weight decay."""
        return {name: value.copy() for name, value in self._gradients.items()}

    def input_gradient(self) -> Array | dict[str, Array]:
        """Gradient of the loss (divided by N) for the inputs, after `backward` or `train_step`."""
        return self._hand_out({name: self._image_gradients[name] for name in self.graph.inputs})

    def sync(self) -> None:
        """Nothing is ever queued here; exists to match `znn.Network`."""

    # -- passes
    def forward(self, inputs: Array | Mapping[str, Array], phase: str = "infer",
                masks: Mapping[str, Array] | None = None) -> Array | dict[str, Array]:
        """Outputs for the inputs. masks: by dropout edge, 1 keep or 0 drop, shaped like the edge's source.

        In the phase "train" every dropout edge of ratio > 0 needs its mask: ValueError without it.
        """
        if phase not in ("infer", "train"):
            raise ValueError(f"phase is {phase!r}, expected 'infer' or 'train'")
        images = self._take_in(inputs, self.graph.inputs)
        masks = {name: self._with_patches(mask) for name, mask in (masks or {}).items()}
        self._masks = masks if phase == "train" else None
        self.images, self.sums, self._argmax = {}, {}, {}
        for node in self.graph.nodes:
            if node.name in images:
                self.images[node.name] = self.sums[node.name] = images[node.name]
                continue
            incoming = [edge for edge in self.graph.edges if edge.target == node.index]
            total = sum(self._edge_forward(edge) for edge in incoming)
            if node.spec.kind == "transfer":
                bias = self._parameters.get(node.name)
                total = total if bias is None else total + bias[:, None, None, None]
                self.sums[node.name], self.images[node.name] = total, TRANSFER[node.spec.transfer](total)
            else:
                self.sums[node.name] = self.images[node.name] = total
        return self._hand_out({name: self.images[name] for name in self.graph.outputs})

    def backward(self, output_gradients: Array | Mapping[str, Array]) -> None:
        """Gradients for the last forward, and one step of the optimiser.

        output_gradients: shaped like the outputs, not divided by N.
        """
        gradients = self._take_in(output_gradients, self.graph.outputs)
        self._image_gradients = {name: g / self._voxels(g) for name, g in gradients.items()}
        self._gradients = {}
        for node in reversed(self.graph.nodes):
            gradient = self._image_gradients.get(node.name, 0.0)
            for edge in self.graph.edges:
                if edge.source == node.index:
                    gradient = gradient + self._edge_backward(edge)
            if node.spec.kind == "transfer":
                gradient = transfer_backward(gradient, self.images[node.name], node.spec.transfer)
                if node.name in self._parameters:
                    self._gradients[node.name] = gradient.sum(axis=(0, 2, 3, 4))
            self._image_gradients[node.name] = gradient
        self._update()

    def train_step(self, inputs: Array | Mapping[str, Array], targets: Array | Mapping[str, Array],
                   weights: Array | Mapping[str, Array] | None = None,
                   masks: Mapping[str, Array] | None = None) -> float:
        """Forward in the train phase, loss, backward, the optimiser's step. Returns the loss per output voxel."""
        self.forward(inputs, "train", masks)
        targets = self._take_in(targets, self.graph.outputs)
        weights = {} if weights is None else self._by_name(weights, self.graph.outputs)
        total, gradients = 0.0, {}
        for name in self.graph.outputs:
            output = self.images[name]
            loss, gradients[name] = self._loss(output, targets[name], weights.get(name))
            total += loss / self._voxels(output)
        self.backward(gradients if self._batched else {name: g[0] for name, g in gradients.items()})
        return total

    # -- one edge over all patches
    def _edge_forward(self, edge: Any) -> Array:
        images = self.images[self.graph.nodes[edge.source].name]
        if edge.kind == "conv":
            return np.stack([convolve(x, self._parameters[edge.name], edge.sparsity, edge.spec.depthwise)
                             for x in images])
        if edge.kind in ("max_filter", "max_pool"):
            pairs = [max_filter(x, edge.window, edge.sparsity) if edge.kind == "max_filter" else
                     max_pool(x, edge.window, edge.stride) for x in images]
            self._argmax[edge.name] = [argmax for _, argmax in pairs]
            return np.stack([values for values, _ in pairs])
        if edge.kind == "crop":
            return np.stack([crop(x, edge.offset, edge.out_extent) for x in images])
        return self._dropped(edge, images)

    def _edge_backward(self, edge: Any) -> Array:
        gradients = self._image_gradients[self.graph.nodes[edge.target].name]
        if edge.kind == "conv":
            images, depthwise = self.images[self.graph.nodes[edge.source].name], edge.spec.depthwise
            self._gradients[edge.name] = sum(convolve_kernel_gradient(x, g, edge.sparsity, depthwise)
                                             for x, g in zip(images, gradients))
            return np.stack([convolve_backward(g, self._parameters[edge.name], edge.sparsity, depthwise)
                             for g in gradients])
        if edge.kind in ("max_filter", "max_pool"):
            return np.stack([max_backward(g, argmax, edge.in_extent)
                             for g, argmax in zip(gradients, self._argmax[edge.name])])
        if edge.kind == "crop":
            return np.stack([crop_backward(g, edge.offset, edge.in_extent) for g in gradients])
        return self._dropped(edge, gradients)

    def _dropped(self, edge: Any, images: Array) -> Array:
        """An edge that leaves voxels where they are: identity, or dropout (active in training only)."""
        if edge.kind not in ("identity", "dropout"):
            raise ValueError(f"edge {edge.name!r} is of unknown kind {edge.kind!r}")
        if edge.kind == "identity" or self._masks is None or edge.spec.ratio == 0.0:
            return images
        if edge.name not in self._masks:
            raise ValueError(f"dropout edge {edge.name!r} needs a mask in the train phase")
        return dropout(images, self._masks[edge.name], edge.spec.ratio)

    def _loss(self, outputs: Array, targets: Array, weights: Array | None) -> tuple[float, Array]:
        if weights is None:
            weights = [None] * len(outputs)
        elif not self._batched:
            weights = [np.asarray(weights, np.float64)]
        pairs = [LOSS[self.graph.spec.loss](y, t, w) for y, t, w in zip(outputs, targets, weights)]
        return sum(loss for loss, _ in pairs), np.stack([gradient for _, gradient in pairs])

    def _update(self) -> None:
        groups = {node.name: (node.spec.rate, 0.0) for node in self.graph.nodes}
        groups |= {edge.name: (edge.spec.rate, edge.spec.weight_decay) for edge in self.graph.edges}
        self.round += 1
        for name, gradient in self._gradients.items():
            rate, decay = groups[name]
            self._step(name, gradient, self.learning_rate * rate, self.weight_decay * decay)

    def _step(self, name: str, gradient: Array, rate: float, decay: float) -> None:
        weights, momenta = self._parameters[name], self._momenta[name]
        if self.square_momentum is None:
            self._parameters[name], self._momenta[name] = sgd_step(weights, momenta, gradient, rate, self.momentum, decay)
        else:
            self._parameters[name], self._momenta[name], self._second_moments[name] = adam_step(
                weights, momenta, self._second_moments[name], gradient, rate, self.round, self.momentum,
                self.square_momentum, self.epsilon, decay)

    # -- arrays at the border
    @staticmethod
    def _voxels(images: Array) -> int:
        return images.shape[0] * int(np.prod(images.shape[2:]))

    def _with_patches(self, array: Array) -> Array:
        array = np.asarray(array, np.float64)
        return array if array.ndim == 5 else array[None]

    @staticmethod
    def _by_name(arrays: Array | Mapping[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
        return dict(arrays) if isinstance(arrays, Mapping) else {names[0]: arrays}

    def _take_in(self, arrays: Array | Mapping[str, Array], names: tuple[str, ...]) -> dict[str, Array]:
        """Arrays by name with the patches in front, checked against the graph."""
        by_name = self._by_name(arrays, names)
        if set(by_name) != set(names):
            raise ValueError(f"got arrays for {sorted(by_name)}, expected them for {sorted(names)}")
        nodes = {node.name: node for node in self.graph.nodes}
        for name, array in by_name.items():
            expected = (nodes[name].maps, *nodes[name].extent)
            if np.ndim(array) not in (4, 5) or np.shape(array)[-4:] != expected:
                raise ValueError(f"array for node {name!r} has shape {np.shape(array)}, expected {expected}, "
                                 f"with or without patches in front")
            self._batched = np.ndim(array) == 5
        return {name: self._with_patches(array) for name, array in by_name.items()}

    def _hand_out(self, arrays: dict[str, Array]) -> Array | dict[str, Array]:
        arrays = {name: (value if self._batched else value[0]).copy() for name, value in arrays.items()}
        return arrays if len(arrays) > 1 else next(iter(arrays.values()))


def _same_shapes(old: Mapping[str, Array], new: Mapping[str, Array]) -> dict[str, Array]:
    for name, value in new.items():
        if name not in old or np.shape(value) != old[name].shape:
            expected = old[name].shape if name in old else f"one of {sorted(old)}"
            raise ValueError(f"parameter {name!r} of shape {np.shape(value)}: expected {expected}")
    return {name: np.array(value, np.float64) for name, value in new.items()}
