"""Run cases and record them. Each case lives in a process of its own; groups are measured in interleaved
rounds.

A case that fails, or runs out of memory or time, is recorded as such and the sweep goes on. Nothing is
recorded of a case
that was interrupted, so the next run measures it again; everything else counts as done.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from . import provenance
from .adapters import preloads
from .forkserver import ForkServer, ForkServerError
from .record import Record
from .store import RunWriter
from .sweep import Case

MEMORY_SHARE = 0.9  # of what is available when a case starts
PAUSE_S = 0.5  # before a disturbed machine is looked at again: longer than PyTorch's threads spin after their turn
DONE = ("ok", "skipped", "timeout", "oom", "failed")


class CaseStopped(Exception):
    """A case ended before its samples were complete: its status and the reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Child:
    """A case's process, asked one command at a time. Its time limit runs only while it is asked something."""

    def __init__(self, case: Case, server: ForkServer) -> None:
        self._limit = self._left = case.protocol.timeout_s
        self._log, self._server = tempfile.TemporaryFile(), server
        threads = str(case.options.get("threads", 1))
        theirs_in, self._commands = os.pipe()
        self._replies, theirs_out = os.pipe()
        try:
            self._pid = server.fork(
                [theirs_in, theirs_out, self._log.fileno()],
                {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
            )
        except ForkServerError:
            os.close(self._commands)
            os.close(self._replies)
            raise
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._replies, selectors.EVENT_READ)
        self._buffer = b""

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises CaseStopped."""
        message = json.dumps({"do": do} | arguments) + "\n"
        try:
            os.write(self._commands, message.encode())
        except BrokenPipeError:
            self._died()
        reply = json.loads(self._read_line())
        if "error" in reply:
            raise CaseStopped(reply["status"], f"{do}: {reply['error']}")
        return reply

    def _read_line(self) -> bytes:
        begin, left = time.monotonic(), self._left
        while b"\n" not in self._buffer:
            self._left = left - (time.monotonic() - begin)
            if self._left <= 0 or not self._selector.select(self._left):
                raise CaseStopped("timeout", f"took more than {self._limit:g} s in all")
            data = os.read(self._replies, 1 << 16)
            if not data:
                self._died()
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def _died(self) -> None:
        code = self._server.reap(self._pid)
        if code == -signal.SIGKILL:
            raise CaseStopped("oom", "killed by the system, most likely for memory")
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-1:]
        cause = f"signal {-code}" if code < 0 else f"exit status {code}"
        raise CaseStopped("failed", f"the case's process ended with {cause}: {' '.join(tail)}".rstrip(": "))

    def close(self) -> None:
        """End the process, at once."""
        self._selector.close()
        os.close(self._commands)
        os.close(self._replies)
        self._log.close()
        try:
            self._server.kill(self._pid)
        except ForkServerError:
            pass  # it took its children with it


@dataclass
class Measured:
    """A case while it is measured."""

    case: Case
    child: Child | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    warmups: list[float] = field(default_factory=list)
    samples: list[float] = field(default_factory=list)
    waited_s: float = 0.0
    result: dict[str, Any] = field(default_factory=dict)
    status: str = "ok"
    reason: str = ""

    @property
    def alive(self) -> bool:
        return self.status == "ok" and self.child is not None

    def lap_s(self) -> float:
        """Seconds of a lap, or the mean of a turn of them."""
        return self.child.ask("lap", turn_s=self.case.protocol.turn_s)["s"]

    def stop(self, status: str, reason: str) -> None:
        self.status, self.reason = status, reason
        self.shut()

    def shut(self) -> None:
        if self.child:
            self.child.close()
            self.child = None


class Runner:
    """Measures groups of cases and hands every record to `writer`. A context manager: it keeps processes.

    seconds: wall time by stage. Timed work is warm-ups, laps and computing (theory, simulation, cache misses);
    set-up plans and allocates; waiting is for a disturbed machine; the rest of the wall time is the suite's own.
    say: called with what is waited for.
    """

    TIMED = ("warmup", "laps", "compute")
    STAGES = ("start", "check", "setup", "warmup", "waiting", "laps", "compute")

    def __init__(
        self,
        writer: RunWriter,
        run_id: str,
        command: Callable[[Case], str],
        available: Callable[[], int] = provenance.available_bytes,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._writer, self._run_id, self._command, self._available = writer, run_id, command, available
        self._say = say
        self._checks: dict[str, dict] = {}
        # What the checks of a run leave for each other.
        self._shared = tempfile.TemporaryDirectory(prefix="znn-bench-")
        self._servers: dict[tuple[str, ...], ForkServer] = {}
        self.seconds = dict.fromkeys(self.STAGES, 0.0)

    @property
    def measuring_s(self) -> float:
        """Seconds in timed work, in setting it up and in waiting for the machine; what a run took beyond them is the suite's
        overhead.
        """
        return sum(self.seconds[stage] for stage in ("setup", "waiting", *self.TIMED))

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that start cases."""
        while self._servers:
            self._servers.popitem()[1].close()
        self._shared.cleanup()

    def run_group(self, cases: Sequence[Case]) -> list[Record]:
        """Measure cases together; where their memory does not fit together, one after the other."""
        group = [Measured(case) for case in cases]
        records: list[Record] = []
        try:
            for item in group:
                self._guarded(item, "start", self._start)
            need = sum(item.facts.get("predicted_bytes", 0) for item in group if item.alive)
            together = need <= MEMORY_SHARE * self._available()
            batches = [group] if together else [[item] for item in group]
            for batch in batches:
                self._measure(batch)
                for item in batch:
                    item.shut()
                for record in [self._record(item, batch) for item in batch]:
                    self._writer.write(record)
                    records.append(record)
        finally:
            for item in group:
                item.shut()
        return records

    def _guarded(self, item: Measured, stage: str, step: Callable[[Measured], None]) -> None:
        begin = time.perf_counter()
        try:
            step(item)
        except CaseStopped as stopped:
            item.stop(stopped.status, stopped.reason)
        finally:
            self.seconds[stage] += time.perf_counter() - begin

    def _start(self, item: Measured) -> None:
        case = item.case
        item.child = self._child(case)
        described = {"problem": case.problem, "adapter": case.adapter, "options": case.options}
        item.facts = item.child.ask("predict", case=described)
        if "unavailable" in item.facts:
            raise CaseStopped("skipped", f"not available: {item.facts['unavailable']}")
        need, free = item.facts["predicted_bytes"], self._available()
        if need > MEMORY_SHARE * free:
            raise CaseStopped(
                "skipped", f"expected to need {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free"
            )

    def _child(self, case: Case) -> Child:
        modules = preloads(case.adapter)
        try:
            return Child(case, self._server(modules))
        except ForkServerError:  # it was killed: replaced once
            self._servers.pop(modules).close()
            return Child(case, self._server(modules))

    def _server(self, modules: tuple[str, ...]) -> ForkServer:
        if modules not in self._servers:
            self._servers[modules] = ForkServer(modules)
        return self._servers[modules]

    def _measure(self, batch: list[Measured]) -> None:
        computed = [item for item in batch if item.alive and item.facts["computed"]]
        timed = [item for item in batch if item.alive and not item.facts["computed"]]
        steps = [(computed, "compute", self._compute), (timed, "setup", self._open)]
        steps += [(timed, "check", self._check), (timed, "warmup", self._warm_up)]
        for items, stage, step in steps:
            for item in items:
                if item.alive:
                    self._guarded(item, stage, step)
        self._rounds([item for item in timed if item.alive])
        for item in batch:
            if item.alive:
                self._guarded(item, "setup", self._finish)

    def _check(self, item: Measured) -> None:
        """Compare with the reference unless this run has already checked the same adapter, net and options, among
        them what setting up has decided."""
        case = item.case
        key = json.dumps(
            [
                case.adapter,
                {k: v for k, v in case.problem.items() if k not in ("width", "output")},
                {k: v for k, v in case.options.items() if k != "threads"} | item.facts["chosen"],
            ],
            sort_keys=True,
        )
        if key not in self._checks:
            self._checks[key] = item.child.ask("check", shared=self._shared.name)["check"]
        check = item.facts["check"] = self._checks[key]
        if not check["passed"]:
            raise CaseStopped(
                "failed",
                f"wrong result: relative error {check['max_rel_err']:.3g} against "
                f"{check['reference']}, tolerance {check['tol']:g}; not timed",
            )

    def _open(self, item: Measured) -> None:
        item.facts |= item.child.ask("open")

    def _compute(self, item: Measured) -> None:
        item.child.ask("compute")

    def _warm_up(self, item: Measured) -> None:
        for _ in range(item.case.protocol.warmups):
            item.warmups.append(item.lap_s())
        item.child.ask("mark")

    def _rounds(self, live: list[Measured]) -> None:
        if not live:
            return
        protocol = live[0].case.protocol
        patience_s = protocol.patience_s
        for order in protocol.orders(len(live)):
            patience_s -= self._wait(live, patience_s)
            for index in order:
                if live[index].alive:
                    self._guarded(
                        live[index], "laps", lambda item: item.samples.append(item.lap_s())
                    )
            complete = [item.samples for item in live if item.alive]
            if not complete or protocol.enough(complete):
                return

    def _wait(self, live: list[Measured], patience_s: float) -> float:
        """Wait until no case finds the machine disturbed; returns the seconds that took."""
        waited = 0.0
        while waited < patience_s and (cause := self._disturbed(live)):
            if not waited:
                self._say(f"waiting, {patience_s:.0f} s at most: {cause}")
            time.sleep(PAUSE_S)
            waited += PAUSE_S
        self.seconds["waiting"] += waited
        for item in live:
            item.waited_s += waited
        return waited

    def _disturbed(self, live: list[Measured]) -> str:
        causes: list[str] = []
        for item in live:
            if item.alive:
                self._guarded(item, "waiting", lambda item: causes.append(item.child.ask("disturbed")["by"]))
        return next(filter(None, causes), "")

    def _finish(self, item: Measured) -> None:
        item.result = item.child.ask("finish")

    def _record(self, item: Measured, batch: list[Measured]) -> Record:
        case, facts = item.case, item.facts
        others = [other.case.case_id for other in batch if other is not item and other.status == "ok"]
        return Record(
            experiment=case.experiment,
            case_id=case.case_id,
            problem=case.problem,
            adapter={"name": case.adapter, "version": facts.get("version", ""), "options": case.options},
            protocol=case.protocol.to_dict(),
            status=item.status,
            reason=item.reason,
            run_id=self._run_id,
            command=self._command(case),
            plan=facts.get("plan", ""),
            check=facts.get("check"),
            samples_s=item.samples,
            warmups_s=item.warmups,
            interleaved_with=others,
            peak_rss_bytes=item.result.get("peak_rss_bytes"),
            predicted_bytes=facts.get("predicted_bytes"),
            flop=facts.get("flop"),
            metrics=item.result.get("metrics", {}) | ({"waited_s": item.waited_s} if case.protocol.patience_s else {}),
        )


def grouped(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases by their group, in order of first appearance."""
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.experiment, case.group), []).append(case)
    return list(groups.values())


def pending(
    cases: Iterable[Case], records: Iterable[Record], force: bool = False, retry_failed: bool = False
) -> list[Case]:
    """The cases still to be measured: those without a record, of this machine, of the same experiment and
    case id.

    retry_failed: only a good record counts as done. force: none does.
    """
    counts = ("ok",) if retry_failed else DONE
    done = set() if force else {(r.experiment, r.case_id) for r in records if r.status in counts}
    return [case for case in cases if (case.experiment, case.case_id) not in done]
