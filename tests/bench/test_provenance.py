import json
import subprocess

import pytest

from znn.bench import provenance as pv


def test_everything_gathered_is_json_and_plausible():
    facts = pv.gather()
    json.dumps(facts)
    assert 1 <= facts["physical_cores"] <= facts["usable_cores"] <= facts["logical_cores"]
    assert facts["memory_bytes"] > 1 << 28 and facts["cpu"] and facts["packages"]["numpy"]
    assert pv.machine_id(facts) == pv.machine_id(facts) and " " not in pv.machine_id(facts)


def test_virtual_machines_of_one_image_are_told_apart_by_their_caches():
    other = pv.identity()
    here = {**other, "caches": [{"level": 2, "type": "Unified", "bytes": 3 << 19, "shared_by": 1}]}
    assert pv.machine_id(here) == pv.machine_id(dict(here)) != pv.machine_id(other)
    facts = {"cpu": "CPU", "physical_cores": 2, "caches": here["caches"]}
    more = facts | {"caches": [{"level": 2, "type": "Unified", "bytes": 1 << 19, "shared_by": 1}]}
    names = pv.machine_names({"a": facts, "b": more, "c": facts | {"physical_cores": 16}, "d": {}})
    twins = pv.machine_names({"a": facts, "b": facts})
    assert twins == {m: f"CPU, 2 cores, 1.5 MB L2 ({m})" for m in "ab"}
    assert names == {"a": "CPU, 2 cores, 1.5 MB L2", "b": "CPU, 2 cores, 0.5 MB L2", "c": "CPU, 16 cores", "d": "d, ? cores"}


@pytest.mark.parametrize("text, numbers", [("0", [0]), ("0-3,8", [0, 1, 2, 3, 8]), ("", [])])
def test_cpu_lists(text, numbers):
    assert pv.cpu_list(text) == numbers


def test_cgroup_quotas(tmp_path):
    assert pv.cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert pv.cgroup_quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert pv.cgroup_quota(tmp_path) is None
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text("400000")
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert pv.cgroup_quota(tmp_path) == 4


def test_caches_and_hyperthreads(tmp_path, monkeypatch):
    cache = tmp_path / "cpu0/cache/index0"
    cache.mkdir(parents=True)
    for name, text in {"size": "32K", "level": "1", "type": "Data", "shared_cpu_list": "0,2"}.items():
        (cache / name).write_text(text)
    assert pv.caches(tmp_path) == [{"level": 1, "type": "Data", "bytes": 32768, "shared_by": 2}]
    for cpu in range(4):
        (tmp_path / f"cpu{cpu}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{cpu % 2},{cpu % 2 + 2}")
    monkeypatch.setattr(pv.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    monkeypatch.setattr(pv, "usable_cores", lambda: 4)
    assert pv.physical_cores(cpu_dir=tmp_path) == 2


def test_source_state_sees_changes(tmp_path):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
            check=True,
            capture_output=True,
        )

    assert pv.source_state(tmp_path)["commit"] is None
    git("init")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "x")
    clean = pv.source_state(tmp_path)
    (tmp_path / "a").write_text("2")
    dirty = pv.source_state(tmp_path)
    assert (clean["dirty"], dirty["dirty"]) == (False, True) and dirty["diff_hash"] and not clean["diff_hash"]


def test_warnings_name_what_disturbs():
    quiet = {
        "load_1min": 0.1,
        "usable_cores": 4,
        "steal_share": 0.0,
        "governor": "performance",
        "source": {"dirty": False},
    }
    loud = {
        "load_1min": 3.0,
        "usable_cores": 4,
        "steal_share": 0.2,
        "governor": "powersave",
        "source": {"dirty": True, "diff_hash": "abc"},
    }
    own = [w for w in pv.warnings(quiet) if "pinned" not in w]
    found = " ".join(pv.warnings(loud))
    assert own == [] and all(word in found for word in ("load", "steal", "powersave", "abc"))
