"""A small PyTorch model as it is; `net` names one of `znn.bench.torch_models`. A lap is a forward pass, or a training step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np

from .. import torch_models
from ..problem import Problem
from .base import MOMENTUM, TIMED_RATE, TOLERANCE, Session, relative_error
from .torch_cpu_adapter import TorchCpuAdapter


class ModelSession(Session):
    """The model with its example; in training the gradients of the parameters for a fixed gradient of the output, and SGD."""

    def __init__(self, problem: Problem, rate: float) -> None:
        import torch

        self.training = problem.phase == "round"
        self.model, self.example = torch_models.build(torch_models.of(problem.net), problem.seed)
        self.model.train(self.training)
        with torch.no_grad():
            shape = copy.deepcopy(self.model)(self.example).shape
        generator = torch.Generator().manual_seed(problem.seed)
        self.gradient = torch.randn(shape, generator=generator) / shape.numel()
        self._optimiser = torch.optim.SGD(self.model.parameters(), lr=rate, momentum=MOMENTUM)
        self._grad = torch.set_grad_enabled
        self.output = None

    def lap(self) -> None:
        with self._grad(self.training):
            self.output = self.model(self.example)
        if self.training:
            self._optimiser.zero_grad(set_to_none=True)
            self.output.backward(self.gradient)
            self._optimiser.step()

    def outputs(self) -> dict[str, np.ndarray]:
        return {"output": self.output.detach().numpy()}


class TorchModelAdapter(TorchCpuAdapter):
    name = "torch_model"
    referenced = False

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return 1 << 30

    def flop(self, problem: Problem, options: dict[str, Any]) -> float | None:
        return None

    def start(self, problem: Problem, options: dict[str, Any], rate: float = TIMED_RATE) -> ModelSession:
        import torch

        torch.set_num_threads(options.get("threads") or 1)
        self.session = self.prepare(ModelSession(problem, rate))
        self.session.lap()
        return self.session

    def prepare(self, session: ModelSession) -> ModelSession:
        session.plan = "PyTorch's convolutions"
        return session

    def check(self, problem: Problem, options: dict[str, Any], shared: Path | None = None) -> dict[str, Any]:
        """Output and gradients of the model that is timed against those of a copy in float64, by PyTorch's convolutions. For
        this the copies are smooth (SiLU, mean pooling): where a ReLU switches by rounding, gradients differ and mean nothing."""
        got, want = (gradients(self.session, double) for double in (False, True))
        error = max(relative_error(got[name], want[name]) for name in want)
        return {
            "reference": "the model, smooth, in float64 with PyTorch's convolutions: its output"
            + (" and the gradients of its parameters" if self.session.training else ""),
            "max_rel_err": error,
            "tol": TOLERANCE,
            "passed": bool(error <= TOLERANCE),
        }


def gradients(session: ModelSession, double: bool) -> dict[str, np.ndarray]:
    """The output, and in training the gradients of the parameters, by a copy of the model, which stays as it is."""
    import torch

    model, images, gradient = copy.deepcopy(session.model), session.example, session.gradient
    for i, layer in enumerate(model):
        if isinstance(layer, torch.nn.ReLU):
            model[i] = torch.nn.SiLU()
        elif "MaxPool" in type(layer).__name__:
            model[i] = getattr(torch.nn, type(layer).__name__.replace("Max", "Avg"))(layer.kernel_size)
    if double:
        from znn.torch import restore_convs

        restore_convs(model)
        model, images, gradient = model.double(), images.double(), gradient.double()
    with torch.set_grad_enabled(session.training):
        output = model(images)
    found = {"output": output.detach().numpy()}
    if session.training:
        output.backward(gradient)
        # Kernels and biases each as a whole: of a bias before a normalisation next to nothing is left but rounding.
        for what in ("weight", "bias"):
            parts = [p.grad.flatten() for name, p in model.named_parameters() if name.endswith(what)]
            found |= {what: torch.cat(parts).numpy()}
    return found


ADAPTER = TorchModelAdapter()
