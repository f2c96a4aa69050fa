"""A problem: a network, its output patch and the arrays that go through it, all determined by a small dict.

The dict is what sweeps expand to and what records store. Building it into a graph needs znn; describing it
does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from znn.graph import Graph
    from znn.spec import NetworkSpec

AXES = ("net", "network", "width", "kernel", "form", "depth", "output", "phase", "patches", "seed")
PHASES = ("round", "forward")


class ProblemError(ValueError):
    """The problem names an unknown network or a value out of range."""


@dataclass(frozen=True)
class Problem:
    """net: a name of the zoo, or "chain" (`depth` fully connected convolution layers); network: path of a
    description.

    output: output patch (z, y, x). phase: "round" (backward i and forward i+1, with the update) or "forward".
    """

    net: str | None = None
    network: str | None = None
    width: int | None = None
    kernel: int | None = None
    form: str | None = None
    depth: int | None = None
    output: tuple[int, int, int] = (1, 1, 1)
    phase: str = "round"
    patches: int = 1
    seed: int = 1510

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Problem:
        unknown = set(data) - set(AXES)
        if unknown:
            raise ProblemError(f"problem: unknown axis {sorted(unknown)[0]!r}; axes are {', '.join(AXES)}")
        if (data.get("net") is None) == (data.get("network") is None):
            raise ProblemError("problem: give either `net` (a name of the zoo) or `network` (a file)")
        if data.get("phase", "round") not in PHASES:
            raise ProblemError(f"problem: phase {data['phase']!r} is not one of {', '.join(PHASES)}")
        values = dict(data)
        if "output" in values:
            values["output"] = extent(values["output"], planar=planar(data.get("net")))
        return cls(**values)

    def spec(self) -> NetworkSpec:
        """The network description, at this problem's width, kernel and form."""
        import znn.spec
        from znn import zoo

        if self.network is not None:
            spec = znn.spec.load(self.network)
            return spec if self.width is None else with_width(spec, self.width)
        if self.net == "chain":
            from znn.theory import chain

            return chain(self.width or 1, self.depth or 4, self.kernel or 3)
        given = {"width": self.width, "kernel": self.kernel, "form": self.form}
        return zoo.build(self.net, **{k: v for k, v in given.items() if v is not None})

    def graph(self) -> Graph:
        from znn.graph import Graph

        return Graph.build(self.spec(), output=self.output)

    def reduced(self) -> Problem:
        """The same network three maps wide with two voxels a side: small enough to check against the float64
        reference, and the same for every width and output patch of a net."""
        if self.net is None:
            output = tuple(min(n, 2) for n in self.output)
        else:
            output = (1 if planar(self.net) else 2, 2, 2)
        return replace(self, width=3, output=output, depth=3 if self.net == "chain" else self.depth)

    def arrays(self, graph: Graph) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Random inputs and output gradients by node name, float32, made before anything is timed."""
        rng = np.random.default_rng(self.seed)
        nodes = {node.name: node for node in graph.nodes}

        def images(names: tuple[str, ...]) -> dict[str, np.ndarray]:
            lead = (self.patches,) if self.patches > 1 else ()
            return {
                name: rng.uniform(-1, 1, (*lead, nodes[name].maps, *nodes[name].extent)).astype(np.float32)
                for name in names
            }

        return images(graph.inputs), images(graph.outputs)


def planar(net: str | None) -> bool:
    """Whether a net of the zoo is two-dimensional."""
    return str(net).startswith(("2d", "scaling_2d"))


def extent(value: Any, planar: bool = False) -> tuple[int, int, int]:
    """An extent from an int (a cube, or a square of depth 1 where planar), a list, or a text such as
    1x48x48."""
    if isinstance(value, str):
        value = [int(part) for part in value.split("x")]
    if isinstance(value, int):
        value = [1 if planar else value, value, value]
    value = [value[0]] * 3 if len(value) == 1 and not planar else list(value)
    value = [1] * (3 - len(value)) + value
    if len(value) != 3 or min(value) < 1:
        raise ProblemError(f"output patch {value} must be one to three positive numbers")
    return tuple(value)


def with_width(spec: NetworkSpec, width: int) -> NetworkSpec:
    """The network with `width` maps in every node that neither is nor is joined map to map to an input or an
    output."""
    sources = {edge.source for edge in spec.edges}
    fixed = {node.name for node in spec.nodes if node.kind == "input" or node.name not in sources}
    joined = [{e.source, e.target} for e in spec.edges if e.kind != "conv" or e.depthwise]
    while any(pair & fixed and not pair <= fixed for pair in joined):
        fixed |= {name for pair in joined if pair & fixed for name in pair}
    return replace(spec, nodes=tuple(n if n.name in fixed else replace(n, maps=width) for n in spec.nodes))
