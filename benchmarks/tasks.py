"""Queues and sums: rounds of a network whose tasks have next to nothing to compute."""

from __future__ import annotations

from benchmarks.common import Rounds, check, layered, network

WIDTH, DEPTH = 12, 4


class TinyTasks(Rounds):
    """Four layers of 12 x 12 edges between images of a few voxels: what is timed is mostly scheduling and summing."""

    params = [["priority", "fifo", "lifo", "stealing"], ["wait-free", "locked"], [1, 2]]
    param_names = ["policy", "sum", "threads"]
    unit = "s"

    def setup(self, policy: str, sum: str, threads: int) -> None:  # noqa: A002
        spec = layered(*[{"conv": WIDTH, "kernel": 1}] * DEPTH, maps=WIDTH)
        check(spec, 2, "direct")
        self.start(spec, 2, plan="direct", policy=policy, sum=sum, threads=threads)

    def time_round(self, *_: object) -> None:
        self.round()

    def track_seconds_per_task(self, *_: object) -> float:
        """Seconds by the clock for one task of many rounds."""
        import time

        before, rounds = self.net.stats()["tasks"], 50
        started = time.perf_counter()
        for _ in range(rounds):
            self.net.train_step(self.image, self.target)
        self.net.sync()
        elapsed = time.perf_counter() - started
        return elapsed / (self.net.stats()["tasks"] - before)


class Workers:
    """Starting and ending the workers of a network that is hardly there."""

    params = [[1, 2, 4]]
    param_names = ["threads"]

    def setup(self, threads: int) -> None:
        self.spec = layered({"conv": 1, "kernel": 1})
        check(self.spec, 1, "direct")

    def time_network(self, threads: int) -> None:
        network(self.spec, 1, plan="direct", threads=threads).close()
