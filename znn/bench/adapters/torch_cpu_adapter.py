"""PyTorch on the CPU, on the same number of threads, in the faster of its two memory layouts."""

from __future__ import annotations

import collections
import os
import re
import tempfile
import time
from importlib import metadata
from typing import Any

from ..memory import torch_bytes
from ..problem import Problem
from .base import Timed
from .torch_net import TorchNet, TorchSession
from .znn_adapter import direct_flop

# Channels-last has no fast kernel for large 2D windows: measured 64 s against 2 s at 20 x 20 (shared
# performance notes).
LARGEST_CHANNELS_LAST_2D = 9


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

        flat = all(node.extent[0] == 1 for node in graph.nodes)
        widest = max(max(e.kernel) for e in graph.edges if e.kind == "conv")
        layouts = ["contiguous"] + ["channels_last"] * (not flat or widest <= LARGEST_CHANNELS_LAST_2D)
        seconds = {layout: _second_lap(session(layout == "channels_last")) for layout in layouts}
        best = min(seconds, key=seconds.__getitem__)
        paths = onednn_paths(session(best == "channels_last"))
        final = session(best == "channels_last")  # fresh, so that the trial laps have not trained it
        trials = ", ".join(f"{layout} {value:.4g} s" for layout, value in seconds.items())
        final.plan = f"layout {best} (trial laps: {trials}); oneDNN: {paths}"
        return final


def _second_lap(session: TorchSession) -> float:
    """Seconds of a lap after one that chose kernels and reordered weights."""
    session.lap()
    start = time.perf_counter()
    session.lap()
    return time.perf_counter() - start


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
        or "no primitive ran"
    )


ADAPTER = TorchCpuAdapter()
