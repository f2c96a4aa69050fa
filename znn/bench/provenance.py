"""Facts about the machine, the software and the moment of a run. A fact that cannot be had is None, never an
error."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

CPU_DIR = Path("/sys/devices/system/cpu")
ENVIRONMENT = re.compile(
    r"^(OMP_|MKL_|KMP_|GOMP_|OPENBLAS_|DNNL_|ONEDNN_|ZNN_|CUDA_|NVIDIA_|MALLOC_|PYTORCH_|TORCH_|LD_PRELOAD)"
)
PACKAGES = ("numpy", "pyfftw", "torch", "matplotlib", "znn")
BUSY_LOAD, STEAL_SHARE = 0.25, 0.01


def gather(root: Path | None = None) -> dict[str, Any]:
    """Everything a reader needs to judge a run, JSON-ready: hardware, load, software, source state."""
    return {
        "cpu": cpu_model(),
        "caches": caches(),
        "physical_cores": physical_cores(),
        "usable_cores": usable_cores(),
        "logical_cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "governor": governor(),
        "frequency_mhz": frequency(),
        "load_1min": os.getloadavg()[0],
        "steal_share": steal_share(),
        "kernel": platform.release(),
        "system": platform.platform(),
        "build": build_info(),
        "python": sys.version.split()[0],
        "packages": packages(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if ENVIRONMENT.match(k)},
        "source": source_state(root or Path(__file__).resolve().parents[2]),
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def cpu_model() -> str:
    """The model name of the first processor, as the kernel knows it."""
    match = re.search(r"^model name\s*:\s*(.+)$", _read(Path("/proc/cpuinfo")) or "", re.M)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def caches(cpu_dir: Path = CPU_DIR) -> list[dict[str, Any]]:
    """Caches of the first processor: level, type, bytes, and how many processors share each."""
    found = []
    for index in sorted(cpu_dir.glob("cpu0/cache/index*")):
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(index / "size") or "")
        if size:
            found.append(
                {
                    "level": int(_read(index / "level") or 0),
                    "type": _read(index / "type"),
                    "bytes": int(size[1]) * 1024 ** " KMG".index(size[2] or " "),
                    "shared_by": len(cpu_list(_read(index / "shared_cpu_list") or "0")),
                }
            )
    return found


def cpu_list(text: str) -> list[int]:
    """The kernel's list notation, such as 0-3,8, as numbers."""
    numbers: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def physical_cores(usable_only: bool = True, cpu_dir: Path = CPU_DIR) -> int:
    """Physical cores among the processors this process may use: hyper-threads of one core count once."""
    cpus = os.sched_getaffinity(0) if usable_only else range(os.cpu_count() or 1)
    cores = {_read(cpu_dir / f"cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    return max(1, min(len(cores), usable_cores()))


def usable_cores() -> int:
    """Processors this process may use: affinity, and the cgroup's quota rounded down (at least one)."""
    count = len(os.sched_getaffinity(0))
    quota = cgroup_quota()
    return max(1, min(count, int(quota))) if quota else count


def cgroup_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Processors the cgroup grants (v2 cpu.max, v1 cpu.cfs_quota_us); None where it sets no bound."""
    text = _read(root / "cpu.max")
    if text:
        quota, period = text.split()
        return None if quota == "max" else int(quota) / int(period)
    quota, period = (_read(root / "cpu" / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def memory_bytes(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Memory that may be used in all: the machine's, or the cgroup's limit where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read(root / "memory.max") or _read(root / "memory" / "memory.limit_in_bytes")
    return min(total, int(limit)) if limit and limit.isdigit() else total


def available_bytes() -> int:
    """Memory free for new work right now."""
    match = re.search(r"^MemAvailable:\s*(\d+)", _read(Path("/proc/meminfo")) or "", re.M)
    return min(int(match[1]) * 1024 if match else memory_bytes(), memory_bytes())


def governor() -> str | None:
    return _read(CPU_DIR / "cpu0/cpufreq/scaling_governor")


def frequency() -> float | None:
    match = re.search(r"^cpu MHz\s*:\s*([\d.]+)", _read(Path("/proc/cpuinfo")) or "", re.M)
    return float(match[1]) if match else None


def steal_share(seconds: float = 0.2) -> float | None:
    """Share of processor time the hypervisor gave to others, over a short sample."""
    first = _cpu_times()
    time.sleep(seconds)
    second = _cpu_times()
    if not first or not second or sum(second) == sum(first):
        return None
    return (second[7] - first[7]) / (sum(second) - sum(first))


def _cpu_times() -> list[int] | None:
    lines = (_read(Path("/proc/stat")) or "").splitlines()
    return [int(n) for n in lines[0].split()[1:9]] if lines else None


def build_info() -> dict[str, Any] | None:
    """Compiler, flags, FFT library and instruction sets as the engine reports them; None without the
    engine."""
    try:
        from znn import _core
    except ImportError:
        return None
    info = getattr(_core, "build_info", None)
    return dict(info()) if info else None


def packages() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def source_state(root: Path) -> dict[str, Any]:
    """Commit, whether tracked files differ from it, and the hash of that difference. Results do not count."""
    commit = _git(root, "rev-parse", "HEAD")
    diff = _git(root, "diff", "HEAD", "--", ".", ":!results", ":!paper_figs/built")
    return {
        "commit": commit,
        "dirty": None if diff is None else bool(diff),
        "diff_hash": hashlib.sha256(diff.encode()).hexdigest()[:12] if diff else None,
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def identity() -> dict[str, Any]:
    """Of `gather` what a machine's id is made of, without sampling its state."""
    return {"cpu": cpu_model(), "usable_cores": usable_cores(), "caches": caches()}


def machine_id(facts: dict[str, Any]) -> str:
    """A readable name that differs between machines: CPU, cores and a short hash of the host's own id and its caches,
    as virtual machines of one image share an id, and some do not tell the model of their CPU.
    """
    model = re.sub(r"\(r\)|\(tm\)|cpu|processor|core|@.*", " ", facts["cpu"].lower())
    slug = "-".join(re.findall(r"[a-z0-9]+", model)[:4]) or "machine"
    own = _read(Path("/etc/machine-id")) or platform.node()
    own += json.dumps(facts["caches"], sort_keys=True)
    return f"{slug}-{facts['usable_cores']}c-{hashlib.sha256(own.encode()).hexdigest()[:4]}"


def machine_names(facts: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """What tables and legends call machines with these ids and facts: CPU and physical cores, and where these do not
    tell them apart, the L2 of a core, or the id."""
    names = {m: f"{f.get('cpu', m)}, {f.get('physical_cores', '?')} cores" for m, f in facts.items()}
    for more in (lambda m: _second_cache(facts[m]), lambda m: f" ({m})"):
        shared = {name for name, count in Counter(names.values()).items() if count > 1}
        names |= {m: name + more(m) for m, name in names.items() if name in shared}
    return names


def _second_cache(facts: dict[str, Any]) -> str:
    found = next((cache["bytes"] for cache in facts.get("caches") or [] if cache["level"] == 2), None)
    return f", {found / 2**20:g} MB L2" if found else ""


def warnings(facts: dict[str, Any]) -> list[str]:
    """Sentences about what makes this machine noisy right now."""
    found = []
    if facts["load_1min"] > BUSY_LOAD * facts["usable_cores"]:
        found.append(
            f"load average {facts['load_1min']:.2f} on {facts['usable_cores']} cores: other work is running"
        )
    if (facts["steal_share"] or 0) > STEAL_SHARE:
        found.append(
            f"steal time {facts['steal_share']:.1%}: the hypervisor runs other guests on these cores"
        )
    if facts["governor"] not in (None, "performance"):
        found.append(f"frequency governor is {facts['governor']}, not performance: the clock may vary")
    if facts["source"]["dirty"]:
        found.append(f"tracked files differ from the commit (diff hash {facts['source']['diff_hash']})")
    pinned = pinned_elsewhere()
    if pinned:
        found.append(f"other busy processes are pinned to cores of ours: {', '.join(pinned)}")
    return found


def pinned_elsewhere(share: float = 0.2) -> list[str]:
    """Names of processes of others that are bound to a part of our cores and have used more than `share` of
    their life."""
    import psutil

    ours, everything, found = os.sched_getaffinity(0), os.cpu_count() or 1, []
    for process in psutil.process_iter(["name", "pid"]):
        try:
            bound = set(process.cpu_affinity())
            life = max(1e-3, time.time() - process.create_time())
            busy = sum(process.cpu_times()[:2]) / life
        except (psutil.Error, OSError):
            continue
        if process.pid != os.getpid() and len(bound) < everything and bound & ours and busy > share:
            found.append(f"{process.info['name']} ({process.pid})")
    return found
