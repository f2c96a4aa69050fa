"""What the benchmarks share: networks of a few layers, random arrays, and the check against the reference."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

TOLERANCE = 1e-4
RATE, MOMENTUM = 0.01, 0.9


def engine() -> Any:
    """The package `znn`. Raises NotImplementedError, asv's word for skipping, where this build lacks a name used here."""
    try:
        import znn
        from znn import zoo  # noqa: F401
        from znn.reference import ReferenceNetwork  # noqa: F401

        znn.Network, znn.Graph, znn.SGD, znn.NetworkSpec.layered
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"this build lacks what the benchmark uses: {error}") from None
    return znn


def network(spec: Any, output: Any, **options: Any) -> Any:
    """A `znn.Network`. Raises NotImplementedError for an option, or a value of one, that this build does not know."""
    znn = engine()
    try:
        return znn.Network(spec, output=output, optimiser=znn.SGD(rate=RATE, momentum=MOMENTUM), **options)
    except (TypeError, znn.SpecError) as error:
        raise NotImplementedError(f"this build does not know an option: {error}") from None


def layered(*layers: dict[str, Any], maps: int = 1) -> Any:
    return engine().NetworkSpec.layered("benchmark", maps, list(layers))


def arrays(graph: Any) -> tuple[np.ndarray, np.ndarray]:
    """A random input and a random target (or output gradient) for a graph with one of each."""
    rng = np.random.default_rng(1510)
    shapes = [(graph.node(name).maps, *graph.node(name).extent) for name in (graph.inputs[0], graph.outputs[0])]
    image, target = (rng.uniform(-1, 1, shape).astype(np.float32) for shape in shapes)
    return image, target


@lru_cache(maxsize=None)
def check(spec: Any, output: int, plan: Any = "model", **options: Any) -> None:
    """Two rounds of training and one more forward pass equal the reference's. Raises AssertionError."""
    from znn.init import initial_parameters
    from znn.reference import ReferenceNetwork

    with network(spec, output, plan=plan, threads=2, seed=1, **options) as net:
        image, target = arrays(net.graph)
        wanted = ReferenceNetwork(net.graph, initial_parameters(net.graph, 1), rate=RATE, momentum=MOMENTUM)
        for _ in range(2):
            net.train_step(image, target)
            wanted.train_step(image, target)
        got, expected = net.forward(image), wanted.forward(image)
    scale = np.abs(expected).max()
    assert scale > 0, f"{spec.name}: the reference's output is zero, which compares with nothing"
    error = np.abs(got - expected).max() / scale
    assert error <= TOLERANCE, f"{spec.name}: the output is off by {error:.1e}, at most {TOLERANCE:.0e} expected"


class Rounds:
    """A network, ready for rounds; the first has been run. Subclasses call `start` in `setup`."""

    net: Any = None

    def start(self, spec: Any, output: Any, **options: Any) -> None:
        self.net = network(spec, output, **options)
        self.image, self.target = arrays(self.net.graph)
        self.round()

    def round(self) -> None:
        self.net.train_step(self.image, self.target)
        self.net.sync()

    def teardown(self, *_: Any) -> None:
        if self.net is not None:
            self.net.close()
            self.net = None


class Traced(Rounds):
    """Rounds whose tasks are timed one by one; `seconds` adds up those of a phase and kind over one round."""

    ROUNDS = 7

    def start(self, spec: Any, output: Any, **options: Any) -> None:
        super().start(spec, output, threads=1, trace=True, **options)
        self.net.trace()

    def seconds(self, phase: str, kind: str) -> float:
        """The median over some rounds."""
        samples = []
        for _ in range(self.ROUNDS):
            self.round()
            trace = self.net.trace()
            events = trace.events
            chosen = ((events["phase"] == trace.names["phase"].index(phase))
                      & (events["kind"] == trace.names["kind"].index(kind)))
            assert chosen.any(), f"no task of phase {phase} and kind {kind} has run"
            samples.append(float((events["end_ns"] - events["start_ns"])[chosen].sum()) * 1e-9)
        return float(np.median(samples))
