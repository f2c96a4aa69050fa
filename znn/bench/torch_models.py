"""Small PyTorch models by name, for measuring `znn.torch.replace_convs`: a line for each, as data.

A layer is (kind, out maps, kernel, options); conv and up are convolutions and transposed ones with the options of PyTorch's modules,
padded by "same" unless they say otherwise. ReLU follows every convolution but the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .problem import ProblemError

if TYPE_CHECKING:
    import torch

SEED = 1510


@dataclass(frozen=True)
class Model:
    """what: in words, for tables; example: the input's shape (batch, maps, [z,] y, x)."""

    what: str
    example: tuple[int, ...]
    layers: tuple[tuple, ...]

    @property
    def dims(self) -> int:
        return len(self.example) - 2


def _conv(maps: int, kernel: int, **options: Any) -> tuple:
    return ("conv", maps, kernel, options)


def _up(maps: int, kernel: int, **options: Any) -> tuple:
    return ("up", maps, kernel, options)


def _depthwise(maps: int, kernel: int) -> tuple:
    """A block of depthwise and pointwise convolutions, as ConvNeXt has them."""
    return (_conv(maps, kernel, groups=maps), ("norm",), _conv(2 * maps, 1), _conv(maps, 1))


_DOWN_UP = {
    2: (_conv(24, 3), _conv(48, 2, stride=2, padding=0), _conv(48, 3), _up(24, 2, stride=2), _conv(24, 3), _conv(1, 1)),
    3: (_conv(12, 3), _conv(24, 2, stride=2, padding=0), _conv(24, 3), _up(12, 2, stride=2), _conv(12, 3), _conv(1, 1)),
}
MODELS = {
    "conv2d_1": Model("1² kernels, 64 maps", (2, 64, 64, 64), (_conv(64, 1), _conv(64, 1), _conv(64, 1))),
    "conv2d_3": Model("3² kernels, 32 maps", (1, 1, 128, 128), (_conv(32, 3), ("norm",), _conv(32, 3), _conv(32, 3), _conv(1, 1))),
    "conv2d_3_large": Model("3² kernels, 8 maps, large image", (1, 1, 384, 384), (_conv(8, 3), _conv(8, 3), _conv(1, 3))),
    "conv2d_3_many": Model("3² kernels, 128 maps, small images", (4, 128, 16, 16), (_conv(128, 3), _conv(128, 3))),
    "conv2d_3_tiny": Model("3² kernels, 4 maps, tiny image", (1, 1, 12, 12), (_conv(4, 3), _conv(4, 3), _conv(1, 1))),
    "conv2d_5": Model("5² kernels, 32 maps", (1, 1, 96, 96), (_conv(32, 5), ("pool",), _conv(32, 5), _conv(1, 1))),
    "conv2d_7": Model("7² kernels, 48 maps", (1, 3, 64, 64), (_conv(48, 7), _conv(48, 7), _conv(2, 1))),
    "conv2d_depthwise": Model("7² depthwise and 1², 64 maps", (2, 64, 56, 56), (*_depthwise(64, 7), *_depthwise(64, 7))),
    "conv2d_grouped": Model("3² kernels, 64 maps in 4 groups", (2, 64, 48, 48), (_conv(64, 3, groups=4), _conv(64, 3, groups=4))),
    "conv2d_strided": Model("3² kernels, strided down and transposed up", (1, 1, 128, 128), _DOWN_UP[2]),
    "conv3d_1": Model("1³ kernels, 32 maps", (1, 32, 24, 24, 24), (_conv(32, 1), _conv(32, 1), _conv(32, 1))),
    "conv3d_3": Model("3³ kernels, 24 maps", (1, 1, 24, 24, 24), (_conv(24, 3), ("norm",), _conv(24, 3), _conv(1, 1))),
    "conv3d_3_large": Model("3³ kernels, 4 maps, large image", (1, 1, 56, 56, 56), (_conv(4, 3), _conv(4, 3), _conv(1, 1))),
    "conv3d_3_many": Model("3³ kernels, 64 maps, small images", (2, 64, 8, 8, 8), (_conv(64, 3), _conv(64, 3))),
    "conv3d_3_tiny": Model("3³ kernels, 4 maps, tiny image", (1, 1, 6, 6, 6), (_conv(4, 3), _conv(4, 3), _conv(1, 1))),
    "conv3d_3_dilated": Model("3³ kernels, dilated by 2, 16 maps", (1, 16, 24, 24, 24), (_conv(16, 3, dilation=2), _conv(16, 3))),
    "conv3d_5": Model("5³ kernels, 16 maps", (1, 1, 20, 20, 20), (_conv(16, 5), ("pool",), _conv(16, 5), _conv(1, 1))),
    "conv3d_7": Model("7³ kernels, 16 maps", (1, 1, 20, 20, 20), (_conv(16, 7), _conv(16, 7), _conv(1, 1))),
    "conv3d_depthwise": Model("7³ depthwise and 1³, 24 maps", (1, 24, 16, 16, 16), (*_depthwise(24, 7), *_depthwise(24, 7))),
    "conv3d_grouped": Model("3³ kernels, 32 maps in 4 groups", (1, 32, 20, 20, 20), (_conv(32, 3, groups=4), _conv(32, 3, groups=4))),
    "conv3d_strided": Model("3³ kernels, strided down and transposed up", (1, 1, 32, 32, 32), _DOWN_UP[3]),
}


def of(name: str | None) -> Model:
    """Raises ProblemError for an unknown name."""
    if name not in MODELS:
        raise ProblemError(f"problem: model {name!r} is not one of {', '.join(MODELS)}")
    return MODELS[name]


def build(model: Model, seed: int = SEED) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model with seeded parameters, and a seeded example of its input."""
    import torch

    nn = torch.nn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules, maps, last = [], model.example[1], max(i for i, layer in enumerate(model.layers) if layer[0] in ("conv", "up"))
        for i, (kind, *rest) in enumerate(model.layers):
            if kind == "norm":
                modules.append(getattr(nn, f"BatchNorm{model.dims}d")(maps))
            elif kind == "pool":
                modules.append(getattr(nn, f"MaxPool{model.dims}d")(2))
            else:
                out, kernel, options = rest
                made = getattr(nn, f"{'ConvTranspose' if kind == 'up' else 'Conv'}{model.dims}d")
                padding = {} if kind == "up" else {"padding": "same"}
                modules += [made(maps, out, kernel, **(padding | options)), *([] if i == last else [nn.ReLU()])]
                maps = out
        return nn.Sequential(*modules), torch.randn(model.example)
