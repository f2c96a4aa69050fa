"""PyTorch's files for `znn convert`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from znn.errors import DataError
from znn.files import atomic_write
from znn.spec import NetworkSpec
from znn.torch.convert import NetworkModule, Parameters, from_torch, to_torch
from znn.torch.modules import Conv2d, Conv3d

ENDINGS = (".pt", ".pth")
# What a file may hold besides tensors: nothing that runs code when it is read.
SAFE = [torch.nn.Sequential, torch.nn.Conv2d, torch.nn.Conv3d, Conv2d, Conv3d, torch.nn.MaxPool2d, torch.nn.MaxPool3d,
        torch.nn.ReLU, torch.nn.Tanh, torch.nn.Sigmoid, torch.nn.Dropout, torch.nn.Dropout2d, torch.nn.Dropout3d,
        torch.nn.Identity, set]


def read(path: str | os.PathLike, spec: NetworkSpec | None = None) -> tuple[NetworkSpec, Parameters]:
    """The network in a file that `torch.save` wrote: a Sequential, or a state dict of the network `spec`.

    Raises DataError naming the file, SpecError.
    """
    found = _load(path)
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]  # a checkpoint of a training script
    return from_torch(found, spec)


def _load(path: str | os.PathLike) -> Any:
    before = torch.serialization.get_safe_globals()
    try:
        torch.serialization.add_safe_globals(SAFE)
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001 - a foreign or damaged file raises almost anything
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"{path}: not a state dict or Sequential that torch.save wrote, expected one ({reason[:200]})") from None
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def write(path: str | os.PathLike, spec: NetworkSpec, parameters: Mapping[str, np.ndarray] | None = None) -> NetworkModule:
    """Save the state dict of `to_torch(spec, parameters)`, atomically; returns the module."""
    module = to_torch(spec, parameters)
    with atomic_write(path) as file:
        torch.save(module.state_dict(), file)
    return module
