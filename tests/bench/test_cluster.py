"""The sweep on a dask.distributed cluster of one machine, which is all a test can have."""

import pytest

from test_suite import SWEEP

from znn.bench import cluster, store, suite

distributed = pytest.importorskip("distributed")


@pytest.fixture
def local(tmp_path, monkeypatch):
    folder = tmp_path / "root" / "experiments" / "sweeps"
    folder.mkdir(parents=True)
    (folder / "fakes.toml").write_text(SWEEP)
    monkeypatch.setattr(suite, "ROOT", tmp_path / "root")
    monkeypatch.setattr(suite, "build_figures", lambda results: 0)

    def start(workers=1):
        return distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None
        )

    return start


def test_records_come_back_with_their_machine_and_resume(local, tmp_path):
    with local() as machines:
        arguments = ["--cluster", machines.scheduler_address, "--out", str(tmp_path / "results")]
        assert suite.main(arguments) == 0
        loaded = store.load(tmp_path / "results")
        assert (
            len(loaded.records) == 4
            and {r.status for r in loaded.records} == {"ok"}
            and loaded.problems == []
        )
        (run,) = loaded.runs.values()
        assert {r.machine_id for r in loaded.records} == {run.machine_id} and {
            r.run_id for r in loaded.records
        } == {run.run_id}
        assert all(r.interleaved_with for r in loaded.records) and "--case" in loaded.records[0].command
        assert suite.main(arguments) == 0 and len(store.load(tmp_path / "results").records) == 4


def test_two_workers_on_one_machine_are_refused(local):
    with local(workers=2) as machines, pytest.raises(cluster.ClusterError, match="disturb each other"):
        cluster.Cluster(machines.scheduler_address)


def test_no_scheduler_is_one_sentence(tmp_path, capsys):
    assert suite.main(["--cluster", "tcp://127.0.0.1:1", "--out", str(tmp_path)]) == 2
    assert "no scheduler answers" in capsys.readouterr().err
