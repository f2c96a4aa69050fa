"""Processes for cases without the cost of starting them: a clean process imports what cases need and forks one
child a case.

Every case still has a process of its own, in a session of its own. The server has one thread, runs no case and
opens no device; it dies with the runner, and its children die with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

PR_SET_PDEATHSIG = 1
MESSAGE_BYTES = 1 << 16
GRACE_S = 5.0  # for a case that has closed its pipe to end by itself


class ForkServerError(RuntimeError):
    """The server has ended, so no process can be had from it."""


class ForkServer:
    """Starts processes of `znn.bench.child` with `modules` already imported; modules that are missing are left
    out."""

    def __init__(self, modules: Sequence[str] = ()) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # One thread for OpenBLAS, which would start its others on import: a process with threads must not fork.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno()), *modules],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )  # Ctrl-C reaches the runner only
        theirs.close()

    def fork(self, files: Sequence[int], environment: dict[str, str]) -> int:
        """A new case's process with these files as standard input, output and error; returns its id."""
        return self._ask({"do": "fork", "environment": environment}, files)["pid"]

    def reap(self, pid: int) -> int:
        """The exit status of a process that has closed its output (negative: the signal that ended it)."""
        return self._ask({"do": "reap", "pid": pid})["code"]

    def kill(self, pid: int) -> None:
        """End a process at once; nothing happens if it has been reaped."""
        self._ask({"do": "kill", "pid": pid})

    def close(self) -> None:
        """End the server and, with it, every process it has started."""
        self._socket.close()
        self._process.wait()

    def _ask(self, message: dict[str, Any], files: Sequence[int] = ()) -> dict[str, Any]:
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], list(files))
            data = self._socket.recv(MESSAGE_BYTES)
        except OSError:
            data = b""
        if not data:
            raise ForkServerError("the process that starts cases has ended")
        return json.loads(data)


def main() -> None:
    die_with_parent()
    for name in sys.argv[2:]:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # the case that needs it says so
    if len(os.listdir("/proc/self/task")) > 1:  # a library has started threads: begin again without it
        os.execv(sys.executable, [sys.executable, "-m", __spec__.name, sys.argv[1]])
    gc.freeze()  # the children share these pages
    serve(socket.socket(fileno=int(sys.argv[1])))


def serve(control: socket.socket) -> None:
    """Carry out the runner's commands until it closes its end."""
    children: set[int] = set()
    while True:
        data, files, _, _ = socket.recv_fds(control, MESSAGE_BYTES, 3)
        if not data:
            break
        message = json.loads(data)
        if message["do"] == "fork":
            reply = {"pid": _fork(control, files, message["environment"])}
            children.add(reply["pid"])
        elif message["pid"] not in children:
            reply = {"code": 0}
        else:
            children.discard(message["pid"])
            reply = {"code": _end(message["pid"], GRACE_S if message["do"] == "reap" else 0.0)}
        control.send(json.dumps(reply).encode())
    for pid in children:
        _end(pid, 0.0)


def _fork(control: socket.socket, files: Sequence[int], environment: dict[str, str]) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        for file in files:
            os.close(file)
        return pid
    status = 1
    try:
        os.setsid()
        die_with_parent(server)
        control.close()
        for place, file in enumerate(files):
            os.dup2(file, place)
            os.close(file)
        os.environ.update(environment)
        from . import child

        child.serve()
        status = 0
    finally:
        os._exit(status)  # skip destructors of foreign libraries: everything is recorded


def _end(pid: int, grace_s: float) -> int:
    """Wait for a child at most `grace_s`, then kill it; returns its exit status."""
    deadline = time.monotonic() + grace_s
    done, status = os.waitpid(pid, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.002)
        done, status = os.waitpid(pid, os.WNOHANG)
    if not done:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # whatever it has started itself
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends; at once where it already has."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    main()
