"""One small module per competitor or computation. An adapter turns a problem and options into something
measurable."""

from __future__ import annotations

import importlib

from .base import Adapter, AdapterError, Computed, Session, Timed, reference

BUILT_IN = (
    "znn", "znn_bundled", "znn_copies", "torch_cpu", "torch_gpu", "torch_layers", "torch_znn", "torch_model", "torch_replaced",
    "theory", "trace", "locks", "simulate", "valgrind", "plan_search",
    "direct_passes"
)

__all__ = ["BUILT_IN", "Adapter", "AdapterError", "Computed", "Session", "Timed", "load", "preloads", "reference"]

OURS = ("numpy", "pyfftw", "znn", "znn.reference", "znn.init", "znn.theory")


def preloads(name: str) -> tuple[str, ...]:
    """Modules that are worth importing once for all cases of an adapter; none of them may start a thread."""
    return (*OURS, "torch") if name.startswith("torch") else OURS



def load(name: str) -> Adapter:
    """The adapter of that name: a built-in one, or `module:Class` for one of your own. Raises
    AdapterError."""
    module, _, attribute = name.partition(":")
    if not attribute:
        if name not in BUILT_IN:
            raise AdapterError(
                f"adapter {name!r} is not one of {', '.join(BUILT_IN)}, nor of the form module:Class"
            )
        module, attribute = f"znn.bench.adapters.{name}_adapter", "ADAPTER"
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise AdapterError(f"adapter {name!r} cannot be loaded: {error}") from error
    return found() if isinstance(found, type) else found
