import dataclasses
import json
from pathlib import Path

import pytest

from znn.bench import record as rec

OLD = Path(__file__).parent / "old_records" / "schema_1.jsonl"


def make(**changes):
    values = dict(
        experiment="e",
        case_id="0" * 12,
        problem={"net": "n"},
        adapter={"name": "a", "options": {"threads": 2}},
        protocol={"seed": 1},
        status="ok",
        run_id="r",
        command="c",
        samples_s=[0.25, 0.5],
        metrics={"x": [1]},
    )
    return rec.Record(**values | changes)


def test_round_trip_of_every_field():
    record = make(
        reason="why",
        plan="p",
        check={"passed": True},
        warmups_s=[1.0],
        interleaved_with=["b"],
        peak_rss_bytes=5,
        predicted_bytes=6,
        flop=7.5,
        machine_id="m",
    )
    assert rec.from_line(rec.to_line(record)) == record
    run = rec.Run("r", "m", "2026-01-01", {"cpu": "x"}, {"tier": "smoke"}, ["noisy"])
    assert rec.from_line(rec.to_line(run)) == run


def test_case_id_ignores_key_order_and_sees_every_part():
    one = rec.case_id({"a": 1, "b": 2}, "x", {"t": 1}, {"s": 1})
    assert one == rec.case_id({"b": 2, "a": 1}, "x", {"t": 1}, {"s": 1})
    others = [
        rec.case_id({"a": 2, "b": 2}, "x", {"t": 1}, {"s": 1}),
        rec.case_id({"a": 1, "b": 2}, "y", {"t": 1}, {"s": 1}),
        rec.case_id({"a": 1, "b": 2}, "x", {"t": 2}, {"s": 1}),
        rec.case_id({"a": 1, "b": 2}, "x", {"t": 1}, {"s": 2}),
    ]
    assert len({one, *others}) == 5


def test_a_stored_schema_1_file_loads():
    run, record, _ = [rec.from_line(line) for line in OLD.read_text().splitlines()]
    assert run.machine["cpu"] == "Example CPU"
    assert record.experiment == "scaling_3d" and record.samples_s == [0.5, 0.51] and record.metrics == {}
    assert json.loads(rec.to_line(record))["schema"] == rec.SCHEMA


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"kind": "case", "schema"', "not a JSON line"),
        ("[1]", "JSON object"),
        ('{"kind": "case", "schema": 99}', "schema 99"),
        ('{"kind": "other", "schema": 2}', "kind 'other'"),
        ('{"kind": "run", "schema": 2}', "does not fit"),
        ('{"kind": "case", "schema": 2, "extra": 1}', "does not fit"),
    ],
)
def test_foreign_lines_are_refused_with_a_reason(line, words):
    with pytest.raises(rec.RecordError, match=words.replace("[", r"\[")):
        rec.from_line(line)


def test_unknown_status_is_refused():
    with pytest.raises(rec.RecordError, match="'good'"):
        make(status="good")
    assert dataclasses.replace(make(), status="oom").status == "oom"
