"""ZNN's bundled engine: maps in bundles, tiled FFT and direct methods (native/tiled) instead of one map per node."""

from __future__ import annotations

from typing import Any

from ..problem import Problem
from .znn_adapter import ZnnAdapter, ZnnSession

TILES_SLACK = 3.0  # tiles overlap, and spectra of images and gradients are kept: a little above the nets measured


class ZnnBundledAdapter(ZnnAdapter):
    name = "znn_bundled"

    def predicted_bytes(self, problem: Problem, options: dict[str, Any]) -> int:
        return int(TILES_SLACK * super().predicted_bytes(problem, {"plan": "direct"}))

    def open(self, problem, graph, options, parameters, inputs, gradients, rate) -> ZnnSession:
        options = {"bundle": 8} | options
        return super().open(problem, graph, options, parameters, inputs, gradients, rate)


ADAPTER = ZnnBundledAdapter()
