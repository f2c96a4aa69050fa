"""Convolution layers by phase and method, and the transforms of an image: seconds in their tasks, by one worker."""

from __future__ import annotations

from benchmarks.common import Traced, check, layered

MAPS = 8


class Convolution(Traced):
    """A layer of 8 x 8 maps and a 16^3 output: seconds of all its convolution tasks in one phase."""

    params = [["direct", "fft"], [3, 5, 7], [1, 2]]
    param_names = ["method", "kernel", "sparsity"]
    unit = "s"

    def setup(self, method: str, kernel: int, sparsity: int) -> None:
        spec = layered({"conv": MAPS, "kernel": kernel, "sparsity": sparsity}, maps=MAPS)
        check(spec, 2, method)
        self.start(spec, 16, plan=method, input_gradient=True)

    def track_forward(self, *_: object) -> float:
        return self.seconds("forward", "conv")

    def track_backward(self, *_: object) -> float:
        return self.seconds("backward", "conv")

    def track_update(self, *_: object) -> float:
        return self.seconds("update", "conv")


class Transform(Traced):
    """One map's Fourier transform (its image is copied first) and the inverse (its bias is added after)."""

    params = [[24, 32, 48, 64]]
    param_names = ["extent"]
    unit = "s"

    def setup(self, extent: int) -> None:
        spec = layered({"conv": MAPS, "kernel": 3}, maps=MAPS)
        check(spec, 2, "fft")
        self.start(spec, extent - 2, plan="fft")

    def track_image(self, *_: object) -> float:
        return self.seconds("input", "input") / MAPS

    def track_inverse(self, *_: object) -> float:
        return self.seconds("forward", "node") / MAPS
