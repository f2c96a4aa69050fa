"""What happens before the first round: importing, describing, planning."""

from __future__ import annotations

import os
import tempfile
from unittest import mock

from benchmarks.common import check, engine


def timeraw_import() -> str:
    """A fresh process each time."""
    return "import znn"


class Planning:
    """From a description to a plan, for the 3D scaling net at width 10."""

    def setup(self) -> None:
        znn = engine()
        try:
            from znn.plan import autotune_plan, model_plan
        except ImportError as error:
            raise NotImplementedError(str(error)) from None
        self.spec = znn.zoo.build("scaling_3d", width=10)
        self.graph = znn.Graph.build(self.spec, output=12)
        self.autotune, self.model = autotune_plan, model_plan
        small = znn.zoo.build("scaling_3d", width=2)
        check(small, 2, "autotune")

    def time_graph(self) -> None:
        engine().Graph.build(self.spec, output=12)

    def time_model(self) -> None:
        self.model(self.graph)

    def time_autotune(self) -> None:
        """Measured anew: nothing comes from the cache. (FFTW keeps its wisdom within the process.)"""
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, ZNN_CACHE=folder):
            plan = self.autotune(self.graph)
        assert set(plan.layers) == {edge.name for edge in self.graph.edges if edge.kind == "conv"}
