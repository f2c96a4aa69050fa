"""Single layers by PyTorch, eagerly, in the faster of its memory layouts. Unlike in whole nets, the gradient of the input is
computed as well: a layer inside a net needs it."""

from __future__ import annotations

import time
from typing import Any

from .torch_cpu_adapter import TorchCpuAdapter, onednn_paths
from .torch_net import TorchNet, TorchSession


class LayerSession(TorchSession):
    """A lap as of a net, with the gradients of the inputs."""

    def _begin(self) -> None:
        for tensor in self._inputs.values():
            tensor.requires_grad_(self._round)
        super()._begin()

    def lap(self) -> None:
        for tensor in self._inputs.values():
            tensor.grad = None
        super().lap()


class TorchLayersAdapter(TorchCpuAdapter):
    name = "torch_layers"
    layouts: tuple[bool, ...] = (False, True)  # channels last

    def net(self, graph: Any, parameters: Any, channels_last: bool) -> TorchNet:
        return TorchNet(graph, parameters, "cpu", channels_last)

    def open(self, problem, graph, options, parameters, inputs, gradients, rate) -> LayerSession:
        import torch

        torch.set_num_threads(options.get("threads") or 1)
        sessions, seconds, ran = {}, {}, {}
        for channels_last in self.layouts:
            name = "channels_last" if channels_last else "contiguous"
            net = self.net(graph, parameters, channels_last)
            session = sessions[name] = LayerSession(problem, net, inputs, gradients, rate)
            ran[name] = self.ran(session, graph)
            start = time.perf_counter()
            session.lap()
            seconds[name] = time.perf_counter() - start
        best = min(seconds, key=seconds.get)
        trials = ", ".join(f"{layout} {value:.4g} s" for layout, value in seconds.items())
        sessions[best].reset()
        sessions[best].plan = f"layout {best} (trial laps: {trials}); {ran[best]}"
        return sessions[best]

    def ran(self, session: LayerSession, graph: Any) -> str:
        """Runs the first lap, which may choose kernels or compile, and says which code that was."""
        return f"oneDNN: {onednn_paths(session)}"


ADAPTER = TorchLayersAdapter()
