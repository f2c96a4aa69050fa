"""Processes for cases: apart from each other, ended when asked, and never left behind."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from znn.bench.adapters import preloads
from znn.bench.forkserver import ForkServer, ForkServerError


@pytest.fixture
def server():
    server = ForkServer()
    yield server
    server.close()


class Case:
    """A forked process and the pipes to it."""

    def __init__(self, server, **environment):
        theirs_in, self.commands = os.pipe()
        self.replies, theirs_out = os.pipe()
        with open(os.devnull, "w") as log:
            self.pid = server.fork([theirs_in, theirs_out, log.fileno()], environment)
        os.close(theirs_in)
        os.close(theirs_out)

    def close(self):
        os.close(self.commands)
        os.close(self.replies)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_process_ends_with_its_commands(server):
    case = Case(server)
    process = psutil.Process(case.pid)
    assert process.ppid() == server._process.pid and wait_until(lambda: os.getsid(case.pid) == case.pid)
    os.close(case.commands)
    assert os.read(case.replies, 1) == b"" and server.reap(case.pid) == 0
    assert gone(case.pid)


def test_processes_are_apart_and_killed_one_by_one(server):
    first, second = Case(server, OMP_NUM_THREADS="1"), Case(server, OMP_NUM_THREADS="2")
    server.kill(first.pid)
    assert gone(first.pid) and not gone(second.pid)
    server.kill(first.pid)  # a second time is no error
    server.kill(second.pid)
    assert gone(second.pid)


def test_a_process_killed_by_the_system_says_so(server):
    case = Case(server)
    os.kill(case.pid, signal.SIGKILL)
    assert server.reap(case.pid) == -signal.SIGKILL


def test_closing_the_server_ends_its_processes():
    server = ForkServer()
    case = Case(server)
    server.close()
    assert wait_until(lambda: gone(case.pid))


def test_processes_die_with_a_server_that_was_killed():
    server = ForkServer()
    case = Case(server)
    os.kill(server._process.pid, signal.SIGKILL)
    assert wait_until(lambda: gone(case.pid))
    with pytest.raises(ForkServerError):
        Case(server)
    server.close()


def test_what_is_preloaded_starts_no_threads():
    """Else forking would copy locks that other threads hold."""
    code = (
        "import importlib, os, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError: print('missing', name)\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    modules = sorted({m for name in ("znn", "torch_cpu") for m in preloads(name)})
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, env=environment)
    assert done.stdout.split()[-1] == "1", done.stdout + done.stderr


def test_a_library_that_starts_threads_is_left_out(tmp_path, monkeypatch):
    """The server begins again without it and still serves."""
    (tmp_path / "threaded.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    server = ForkServer(["threaded"])
    case = Case(server)
    assert len(os.listdir(f"/proc/{server._process.pid}/task")) == 1
    server.kill(case.pid)
    server.close()
