"""The same model after `znn.torch.replace_convs`, which measures its layers anew here."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

from .torch_model_adapter import ModelSession, TorchModelAdapter


class ReplacedSession(ModelSession):
    """`metrics` says what became of each convolution."""

    decided: dict[str, Any] = {}

    def metrics(self) -> dict[str, Any]:
        return self.decided


class TorchReplacedAdapter(TorchModelAdapter):
    name = "torch_replaced"

    def prepare(self, session: ModelSession) -> ModelSession:
        import znn.torch

        session.__class__ = ReplacedSession
        start = time.perf_counter()
        report = znn.torch.replace_convs(session.model, session.example, backward=session.training, remeasure=True)
        session.decided = {
            "replace_s": time.perf_counter() - start,
            "convolutions": [asdict(decision) for decision in report.decisions],
            "model_s": report.model_s,
        }
        session.plan = f"replaced: {', '.join(report.replaced) or 'none'}\n{report}"
        return session


ADAPTER = TorchReplacedAdapter()
