"""Spread a sweep over machines with dask.distributed: one worker process a machine, one group of cases at a
time on it.

    dask scheduler                                        on one machine
    dask worker ADDRESS --nworkers 1 --nthreads 1         on every machine, in an environment with this
    project
    python experiments/run_all.py --cluster ADDRESS ...
Records come back as they are measured and are written here, in the folder of the machine that measured them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from . import provenance
from .record import Record, Run
from .runner import Runner
from .sweep import Case


class ClusterError(ValueError):
    """The cluster cannot be reached, or is not one worker with one thread on each of several equal
    machines."""


class _Collector:
    """Takes records where a run file would, to be sent back."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)


def cores() -> tuple[int, int]:
    """Physical cores and hardware threads of this machine; runs on a worker."""
    return provenance.physical_cores(), provenance.usable_cores()


def describe() -> dict[str, Any]:
    """The machine's facts, its id and what disturbs it; runs on a worker."""
    facts = provenance.gather()
    return {
        "facts": facts,
        "machine_id": provenance.machine_id(facts),
        "warnings": provenance.warnings(facts),
    }


def measure_group(cases: Sequence[Case], commands: dict[str, str], run_id: str) -> tuple[str, list[Record]]:
    """Measure a group on the worker this runs on; returns its machine id and the records."""
    collector = _Collector()
    with Runner(collector, run_id, lambda case: commands[case.case_id]) as runner:
        runner.run_group(cases)
    return provenance.machine_id(provenance.identity()), collector.records


class Cluster:
    """A connection to the scheduler, checked: every worker is alone on its machine and runs one thing at a
    time."""

    def __init__(self, address: str, timeout_s: float = 20.0) -> None:
        try:
            from distributed import Client
        except ImportError:
            raise ClusterError("--cluster needs dask.distributed (pip install 'znn[cluster]')") from None
        try:
            self._client = Client(address, timeout=timeout_s)
        except (OSError, ValueError) as error:
            raise ClusterError(f"--cluster {address}: no scheduler answers: {error}") from None
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        self.machines: dict[str, dict[str, Any]] = self._client.run(describe)
        names = [machine["machine_id"] for machine in self.machines.values()]
        if not workers:
            raise ClusterError(f"--cluster {address}: no worker has joined")
        if any(worker["nthreads"] != 1 for worker in workers.values()) or len(set(names)) < len(names):
            raise ClusterError(
                f"--cluster {address}: measurements would disturb each other; start one worker a machine with "
                f""
                f""
                "--nworkers 1 --nthreads 1"
            )

    def cores(self) -> tuple[int, int]:
        """Physical cores and hardware threads, the same on every machine. Raises ClusterError."""
        found = set(self._client.run(cores).values())
        if len(found) > 1:
            raise ClusterError(f"machines differ in their cores ({sorted(found)}): sweep each kind by itself")
        return found.pop()

    def runs(self, run_id: str, settings: dict[str, Any]) -> dict[str, Run]:
        """A run line for each machine, by machine id."""
        return {
            m["machine_id"]: Run(
                f"{run_id}-{m['machine_id']}",
                m["machine_id"],
                provenance.now(),
                m["facts"],
                settings,
                m["warnings"],
            )
            for m in self.machines.values()
        }

    def measure(
        self, groups: Sequence[Sequence[Case]], commands: dict[str, str], run_id: str
    ) -> Iterator[tuple[str, list[Record]]]:
        """Hand out the groups and yield (machine id, records) as they come back, in any order."""
        from distributed import as_completed

        futures = [
            self._client.submit(measure_group, list(group), commands, run_id, pure=False, retries=0)
            for group in groups
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            self._client.cancel(futures)

    def close(self) -> None:
        self._client.close()
