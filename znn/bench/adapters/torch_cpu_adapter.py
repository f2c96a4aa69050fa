"""PyTorch on the CPU, on the same number of threads, in the faster of its two memory layouts (or the one given)."""

from __future__ import annotations

import collections
import math
import os
import re
import tempfile
import time
from importlib import metadata
from typing import Any

from ..memory import torch_bytes
from ..problem import Problem
from .base import Timed, direct_flop
from .torch_net import TorchNet, TorchSession

# Channels-last has no fast kernel for large 2D windows: measured 64 s against 2 s at 20 x 20 (shared
# performance notes).
LARGEST_CHANNELS_LAST_2D = 9
HOPELESS, CERTAIN_S = 3.0, 0.2  # a first lap so many times slower, and so long that choosing kernels is no part


class TorchCpuAdapter(Timed):
    name = "torch_cpu"

    def version(self) -> str:
        return metadata.version("torch")

    def unavailable(self) -> str | None:
        try:
            metadata.version("torch")
        except metadata.PackageNotFoundError:
            return "PyTorch is not installed (pip install 'znn[torch]')"
        return None

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return torch_bytes(problem.graph())

    def flop(self, problem: Problem, options: dict[str, Any]) -> float | None:
        return direct_flop(problem)

    def open(self, problem, graph, options, parameters, inputs, gradients, rate) -> TorchSession:
        import torch

        torch.set_num_threads(options.get("threads") or 1)

        def session(channels_last: bool) -> TorchSession:
            return TorchSession(
                problem, TorchNet(graph, parameters, "cpu", channels_last), inputs, gradients, rate
            )

        if options.get("layout"):
            given = session(options["layout"] == "channels_last")
            given.plan = f"layout {options['layout']}"
            return given
        flat = all(node.extent[0] == 1 for node in graph.nodes)
        widest = max(max(e.kernel) for e in graph.edges if e.kind == "conv")
        if "layout" in options:
            return session(options["layout"] == "channels_last")
        several, tried = not flat or widest <= LARGEST_CHANNELS_LAST_2D, ""
        best = Trial("contiguous", session(False), math.inf if several else 0.0)
        if several:
            other = Trial("channels_last", session(True), best.seconds)
            tried = f" (trial laps: contiguous {best.seconds:.4g} s, channels_last {other.seconds:.4g} s)"
            best = min(best, other, key=lambda trial: trial.seconds)
        best.session.reset()
        best.session.chosen = {"layout": best.layout}
        best.session.plan = f"layout {best.layout}{tried}; oneDNN: {best.paths}"
        return best.session


class Trial:
    """Seconds of a lap in one layout, after one that chose kernels and reordered weights, and the code it ran.

    Where the first lap is already hopeless against `against` seconds, there is no second.
    """

    def __init__(self, layout: str, session: TorchSession, against: float = math.inf) -> None:
        self.layout, self.session = layout, session
        start = time.perf_counter()
        self.paths = onednn_paths(session)
        self.seconds = time.perf_counter() - start
        if self.seconds < HOPELESS * against or self.seconds < CERTAIN_S:
            start = time.perf_counter()
            session.lap()
            self.seconds = time.perf_counter() - start


def onednn_paths(session: TorchSession) -> str:
    """The oneDNN implementations one lap ran, with their counts, from its verbose output (it writes to
    stdout)."""
    import torch

    if not torch.backends.mkldnn.is_available():
        return "not in this build"
    with tempfile.TemporaryFile() as log:
        kept = os.dup(1)
        os.dup2(log.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                session.lap()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        log.seek(0)
        text = log.read().decode(errors="replace")
    counts = collections.Counter(re.findall(r"exec,cpu,(convolution|pooling|eltwise),([^,]+),", text))
    return (
        ", ".join(f"{kind} {name} x{count}" for (kind, name), count in sorted(counts.items()))
        or "no oneDNN primitive ran, but PyTorch's own code"
    )


ADAPTER = TorchCpuAdapter()
