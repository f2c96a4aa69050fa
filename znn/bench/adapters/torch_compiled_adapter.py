"""Single layers by torch.compile (Inductor, which writes C++ and needs a compiler while it runs)."""

from __future__ import annotations

import os
import shutil
from typing import Any

from .torch_layers_adapter import LayerSession, TorchLayersAdapter
from .torch_net import TorchNet


class TorchCompiledAdapter(TorchLayersAdapter):
    name = "torch_compiled"

    def unavailable(self) -> str | None:
        compiler = os.environ.get("CXX", "g++")
        if not shutil.which(compiler):
            return f"torch.compile needs a C++ compiler while it runs, and {compiler} is not installed"
        return super().unavailable()

    def net(self, graph: Any, parameters: Any, channels_last: bool) -> TorchNet:
        import torch

        net = super().net(graph, parameters, channels_last)
        net.forward = torch.compile(net.forward, dynamic=False)
        return net

    def ran(self, session: LayerSession, graph: Any) -> str:
        session.lap()  # compiles
        return f"inductor; {super().ran(session, graph)}"


ADAPTER = TorchCompiledAdapter()
