"""The networks of the experiments, at any width, kernel and form.

scaling_3d, scaling_2d    the nets of the scaling experiments
3d_K, 2d_K                the GPU-comparison nets with kernels of K^3 or K^2 (any K; 3d_5, 2d_10, ...)
m36, m56, m76, m96        the inference nets of ZNNi's published reports
multiscale                two paths of different field of view that meet by a crop

A *strided* net pools with max-pooling; its *dense* form has max-filters in their place and sparse
convolutions behind them, the same parameters under the same names, and at every voxel of its output what the
strided net gives at one.
"""

from __future__ import annotations

import re
from typing import Any

from znn.errors import SpecError
from znn.spec import EdgeSpec, Extent, NetworkSpec, NodeSpec

_COMPARISON = re.compile(r"([23])d_([1-9][0-9]*)\Z")
_LISTED = (
    "scaling_3d",
    "scaling_2d",
    "3d_3",
    "3d_5",
    "3d_7",
    "2d_10",
    "2d_20",
    "2d_30",
    "2d_40",
    "m36",
    "m56",
    "m76",
    "m96",
    "multiscale",
)
# First kernel, later kernels, number of poolings (networks/m*.znni of seung-lab/ZNNi at width 80).
_INFERENCE = {"m36": (2, 3, 3), "m56": (4, 5, 3), "m76": (6, 7, 2), "m96": (8, 9, 2)}


def names() -> tuple[str, ...]:
    """The networks of the experiments; `build` also takes 2d_K and 3d_K for every other K."""
    return _LISTED


def build(
    name: str, width: int | None = None, kernel: int | None = None, form: str | None = None
) -> NetworkSpec:
    """The network called `name`.

    width: maps of the hidden layers; default 40 (m36 to m96: 80, multiscale: 10). kernel: side of the
    kernels; default 3 (scaling_3d), 11 (scaling_2d), K (2d_K, 3d_K). Other nets have no choice. form: "dense"
    (default for the scaling nets and multiscale, which has no other) or "strided". Raises SpecError for an
    unknown name, a form or kernel that the net does not have.
    """
    if form not in (None, "strided", "dense"):
        raise SpecError(f"form of {name} is {form!r}; expected 'strided' or 'dense'")
    match = _COMPARISON.match(name)
    if match:
        dims, own = int(match[1]), int(match[2])
        if kernel is not None and kernel != own:
            name = f"{dims}d_{kernel}"
        return _comparison(name, dims, _default(width, 40), _default(kernel, own), form or "strided")
    if name in ("scaling_3d", "scaling_2d"):
        return _scaling(name, _default(width, 40), kernel, form or "dense")
    if kernel is not None and name in _LISTED:
        raise SpecError(f"kernel={kernel!r} is given for {name}, whose kernels are fixed")
    if name in _INFERENCE:
        return _inference(name, _default(width, 80), form or "strided")
    if name == "multiscale":
        if form == "strided":
            raise SpecError("multiscale has no strided form: its paths meet voxel by voxel")
        return _multiscale(_default(width, 10))
    raise SpecError(
        f"there is no network {name!r} in the zoo; it has {', '.join(_LISTED)} and 2d_K, 3d_K for any K"
    )


def default_output(name: str) -> Extent:
    """The output patch the paper's experiments begin with: 12^3, 48^2 (scaling nets), one voxel (others)."""
    build(name)
    return {"scaling_3d": (12, 12, 12), "scaling_2d": (1, 48, 48)}.get(name, (1, 1, 1))


def _default(value: Any, default: int) -> int:
    return default if value is None else value


def _pool(form: str) -> dict[str, Any]:
    return {"max_pool": 2} if form == "strided" else {"max_filter": 2}


def _scaling(name: str, width: int, kernel: int | None, form: str) -> NetworkSpec:
    """conv M conv M conv conv (3D, one output map), conv M conv M conv conv conv conv (2D, three); ReLUs."""
    dims, maps, last = (3, [width] * 3, 1) if name == "scaling_3d" else (2, [width] * 5, 3)
    size = _default(kernel, 3 if dims == 3 else 11)
    convs = [{"conv": m, "kernel": size, "transfer": "relu"} for m in (*maps, last)]
    layers = [convs[0], _pool(form), convs[1], _pool(form), *convs[2:]]
    return NetworkSpec.layered(name, 1, layers, dims=dims)


def _comparison(name: str, dims: int, width: int, kernel: int, form: str) -> NetworkSpec:
    """conv P conv P conv conv conv conv, three output maps, ReLU after each convolution but the last.

    Strided, an output of side n needs an input of side 4 n + 19 (kernel - 1).
    """
    convs = [{"conv": width, "kernel": kernel, "transfer": "relu"} for _ in range(5)]
    layers = [convs[0], _pool(form), convs[1], _pool(form), *convs[2:], {"conv": 3, "kernel": kernel}]
    return NetworkSpec.layered(name, 1, layers, dims=dims)


def _inference(name: str, width: int, form: str) -> NetworkSpec:
    """A convolution and a pooling, `poolings` times, then convolutions only; three output maps, ReLU but for
    the last.

    m36: 2^3 P 3^3 P 3^3 P 3^3 3^3 3^3 3^3            field of view  85^3
    m56: 4^3 P 5^3 P 5^3 P 5^3 5^3 5^3 5^3            field of view 163^3
    m76: 6^3 P 7^3 P 7^3 7^3 7^3 7^3                  field of view 117^3
    m96: 8^3 P 9^3 P 9^3 9^3 9^3 9^3                  field of view 155^3
    The names do not say the field of view: the first digit is the side of the kernels after the first one.
    """
    first, later, poolings = _INFERENCE[name]
    layers: list[dict[str, Any]] = []
    for i in range(poolings):
        layers += [{"conv": width, "kernel": later if i else first, "transfer": "relu"}, _pool(form)]
    layers += [{"conv": width, "kernel": later, "transfer": "relu"}] * 3 + [{"conv": 3, "kernel": later}]
    return NetworkSpec.layered(name, 1, layers)


def _multiscale(width: int) -> NetworkSpec:
    """A fine path (three 3^3 convolutions, view 7^3) and a coarse one (3^3, max-filter 3^3, two sparse 3^3,
    view 17^3).

    The fine path is cropped to the coarse one's extent; 1^3 convolutions of both converge on `merged`.
    """

    def conv(name: str, source: str, target: str, kernel: int, sparsity: int) -> EdgeSpec:
        return EdgeSpec(name, "conv", source, target, kernel=kernel, sparsity=sparsity)

    def relu(*names: str) -> list[NodeSpec]:
        return [NodeSpec(name, width, "transfer", "relu") for name in names]

    nodes = [
        NodeSpec("input", 1, "input"),
        *relu("fine1", "fine2", "fine3"),
        NodeSpec("cropped", width, "sum"),
        *relu("coarse1"),
        NodeSpec("filtered", width, "sum"),
        *relu("coarse2", "coarse3", "merged"),
        NodeSpec("output", 1, "transfer"),
    ]
    edges = [
        conv("fine_conv1", "input", "fine1", 3, 1),
        conv("fine_conv2", "fine1", "fine2", 3, 1),
        conv("fine_conv3", "fine2", "fine3", 3, 1),
        EdgeSpec("crop", "crop", "fine3", "cropped"),
        conv("coarse_conv1", "input", "coarse1", 3, 1),
        EdgeSpec("filter", "max_filter", "coarse1", "filtered", window=3),
        conv("coarse_conv2", "filtered", "coarse2", 3, 3),
        conv("coarse_conv3", "coarse2", "coarse3", 3, 3),
        conv("merge_fine", "cropped", "merged", 1, 1),
        conv("merge_coarse", "coarse3", "merged", 1, 1),
        conv("conv_output", "merged", "output", 1, 1),
    ]
    return NetworkSpec("multiscale", tuple(nodes), tuple(edges))
