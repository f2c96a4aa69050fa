"""PyTorch on a GPU with cuDNN, in true float32: TF32 is off, and that is recorded."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from ..problem import Problem
from .base import Timed, direct_flop
from .torch_net import TorchNet, TorchSession


class TorchGpuSession(TorchSession):
    def metrics(self) -> dict[str, Any]:
        import torch

        return {"device_peak_bytes": torch.cuda.max_memory_allocated()} | device_facts()


class TorchGpuAdapter(Timed):
    name = "torch_gpu"

    def version(self) -> str:
        return metadata.version("torch")

    def unavailable(self) -> str | None:
        try:
            import torch
        except ImportError:
            return "PyTorch is not installed (pip install 'znn[torch]')"
        if torch.version.cuda is None:
            return f"PyTorch {torch.__version__} is a CPU build without CUDA"
        if not torch.cuda.is_available():
            return "no CUDA device is visible to PyTorch"
        return None

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return 4 << 30  # host side: the CUDA libraries; device memory runs out on its own and is recorded

    def flop(self, problem: Problem, options: dict[str, Any]) -> float | None:
        return direct_flop(problem)

    def open(self, problem, graph, options, parameters, inputs, gradients, rate) -> TorchGpuSession:
        import torch

        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True
        net = TorchNet(graph, parameters, "cuda", channels_last=False)
        session = TorchGpuSession(problem, net, inputs, gradients, rate, torch.cuda.synchronize)
        session.plan = ", ".join(f"{key} {value}" for key, value in device_facts().items())
        return session


def device_facts() -> dict[str, Any]:
    """Device, driver, library versions and precision settings."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "device_memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": _driver(),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "dtype": "float32",
    }


def _driver() -> str | None:
    try:
        with open("/proc/driver/nvidia/version") as file:
            return file.readline().strip()
    except OSError:
        return None


ADAPTER = TorchGpuAdapter()
