"""Rounds of training as the experiments run them, and the memory they take."""

from __future__ import annotations

from benchmarks.common import Rounds, check, engine


def scaling_3d(width: int):
    return engine().zoo.build("scaling_3d", width=width)


class Round(Rounds):
    """backward(i) and forward(i+1) of the 3D scaling net, all convolutions by one method."""

    params = [[5, 10], ["direct", "fft"], [1, 2]]
    param_names = ["width", "method", "threads"]
    timeout = 300

    def setup(self, width: int, method: str, threads: int) -> None:
        check(scaling_3d(2), 2, method)
        self.start(scaling_3d(width), 12, plan=method, threads=threads)
        self.net.forward(self.image, phase="train")

    def time_round(self, *_: object) -> None:
        self.net.backward(self.target)
        self.net.forward(self.image, phase="train")


class BundledRound(Rounds):
    """The same net with several maps per node, by the plan of the cost model."""

    params = [[8, 16], [16, 40], [1, 2]]
    param_names = ["bundle", "width", "threads"]
    timeout = 300

    def setup(self, bundle: int, width: int, threads: int) -> None:
        check(scaling_3d(2), 2, bundle=bundle)
        self.start(scaling_3d(width), 12, bundle=bundle, threads=threads)
        self.net.forward(self.image, phase="train")

    def time_round(self, *_: object) -> None:
        self.net.backward(self.target)
        self.net.forward(self.image, phase="train")


class Memory(Rounds):
    """The most memory the process takes for a round of the 3D scaling net."""

    params = [[5, 10], ["direct", "fft"]]
    param_names = ["width", "method"]

    def setup(self, width: int, method: str) -> None:
        check(scaling_3d(2), 2, method)

    def peakmem_round(self, width: int, method: str) -> None:
        self.start(scaling_3d(width), 12, plan=method, threads=2)


class Inference(Rounds):
    """A forward pass of the 3D scaling net, nothing kept for a backward pass."""

    params = [["direct", "fft"]]
    param_names = ["method"]

    def setup(self, method: str) -> None:
        check(scaling_3d(2), 2, method)
        self.start(scaling_3d(10), 12, plan=method)

    def time_forward(self, *_: object) -> None:
        self.net.forward(self.image)
