"""Max-filtering and max-pooling, forward and backward, of 8 maps of about 48^3: seconds in their tasks, by one worker."""

from __future__ import annotations

from benchmarks.common import Traced, check, layered

MAPS, SIDE = 8, 48


class _Maxima(Traced):
    kind = ""
    unit = "s"

    def begin(self, output: int, **options: int) -> None:
        spec = layered({self.kind: options.pop("window"), **options}, maps=MAPS)
        check(spec, 3)
        self.start(spec, output, input_gradient=True)

    def track_forward(self, *_: object) -> float:
        return self.seconds("forward", self.kind)

    def track_backward(self, *_: object) -> float:
        return self.seconds("backward", self.kind)


class MaxFilter(_Maxima):
    """Stride 1: a maximum at every voxel."""

    kind = "max_filter"
    params = [[2, 5], [1, 2]]
    param_names = ["window", "sparsity"]

    def setup(self, window: int, sparsity: int) -> None:
        self.begin(SIDE, window=window, sparsity=sparsity)


class MaxPool(_Maxima):
    """A maximum per block."""

    kind = "max_pool"
    params = [[2, 3]]
    param_names = ["window"]

    def setup(self, window: int) -> None:
        self.begin(SIDE // window, window=window)
