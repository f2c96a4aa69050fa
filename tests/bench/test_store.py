import dataclasses
import os
import shutil

import pytest
from test_record import make

from znn.bench import store
from znn.bench.record import Run


def write(root, machine="m", run_id="r1", started="2026-01-01", records=()):
    writer = store.RunWriter(root, Run(run_id, machine, started, {"cpu": "x"}))
    for record in records:
        writer.write(dataclasses.replace(record, run_id=run_id))
    writer.close()
    return writer.path


def test_records_come_back_with_their_machine(tmp_path):
    write(tmp_path, records=[make(), make(case_id="1" * 12, status="failed", reason="x")])
    loaded = store.load(tmp_path)
    assert [r.machine_id for r in loaded.records] == ["m", "m"] and loaded.problems == []
    assert loaded.runs["r1"].machine == {"cpu": "x"}


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_torn_last_line_is_reported_and_the_rest_kept(tmp_path, cut):
    path = write(tmp_path, records=[make(), make(case_id="1" * 12)])
    os.truncate(path, path.stat().st_size - cut)
    loaded = store.load(tmp_path)
    assert len(loaded.records) == 1 and "torn" in loaded.problems[0] and path.name in loaded.problems[0]


def test_a_damaged_line_in_the_middle_costs_only_itself(tmp_path):
    path = write(tmp_path, records=[make(), make(case_id="1" * 12)])
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:40]
    path.write_text("\n".join(lines) + "\n")
    loaded = store.load(tmp_path)
    assert [r.case_id for r in loaded.records] == ["1" * 12] and ":2:" in loaded.problems[0]


def test_folders_merge_by_copying(tmp_path):
    write(tmp_path / "mine", "m1", "r1", records=[make()])
    write(tmp_path / "theirs", "m2", "r2", records=[make()])
    write(tmp_path / "theirs", "m1", "r3", "2026-02-01", records=[make(samples_s=[9.0])])
    shutil.copytree(tmp_path / "theirs", tmp_path / "mine", dirs_exist_ok=True)
    latest = store.load(tmp_path / "mine").latest()
    assert [(r.machine_id, r.samples_s) for r in latest] == [("m1", [9.0]), ("m2", [0.25, 0.5])]


def test_a_later_failure_does_not_hide_a_good_record(tmp_path):
    write(tmp_path, run_id="r1", records=[make()])
    write(tmp_path, run_id="r2", started="2026-02-01", records=[make(status="failed", samples_s=[])])
    assert [r.status for r in store.load(tmp_path).latest()] == ["ok"]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    writer = store.RunWriter(tmp_path, Run("r", "m", "2026", {}))
    writer.write(make())
    size, real = writer.path.stat().st_size, os.write
    calls = []

    def full(fd, data):
        if fd != writer._fd:
            return real(fd, data)
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(fd, data[:7])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(store.StoreError, match="No space left"):
        writer.write(make(case_id="1" * 12))
    monkeypatch.undo()
    assert writer.path.stat().st_size == size
    writer.write(make(case_id="2" * 12))
    assert [r.case_id for r in store.load(tmp_path).records] == ["0" * 12, "2" * 12]


def test_every_line_is_synced(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    write(tmp_path, records=[make(), make()])
    assert len(synced) == 3


def test_select_looks_in_problem_options_and_metrics():
    records = [make(), make(problem={"net": "o"}, metrics={"count": 3})]
    assert store.select(records, net="o") == [records[1]]
    assert store.select(records, threads=2, adapter="a") == records
    assert store.select(records, count=3) == [records[1]]
    assert store.select(records, where=lambda r: False) == []


def test_of_several_protocols_the_longest_is_shown(tmp_path):
    long, short = make(protocol={"max_rounds": 31}), make(case_id="1" * 12, protocol={"max_rounds": 5})
    write(tmp_path, run_id="r1", records=[long])
    write(tmp_path, run_id="r2", started="2026-02-01", records=[short])
    loaded = store.load(tmp_path)
    assert len(loaded.latest()) == 2 and [r.case_id for r in loaded.distinct()] == [long.case_id]
    write(
        tmp_path,
        run_id="r3",
        started="2026-03-01",
        records=[dataclasses.replace(long, status="failed", case_id="2" * 12)],
    )
    assert [r.case_id for r in store.load(tmp_path).distinct()] == [long.case_id]
