"""The memory benchmark goes on where it stopped, and says what it measured."""

import json

import numpy as np
import pytest

from longlive_rag import cli
from longlive_rag.small_world import bench_memory, world
from longlive_rag.small_world.tracks import TRACKS
from longlive_rag.small_world.tracks.track import Cell, Size


@pytest.fixture
def few_cells(monkeypatch):
    """Two policies of cuts, in this process."""
    cells = [Cell("cuts", policy, "given", 0) for policy in ("sliding_window", "retrieval")]
    monkeypatch.setattr(bench_memory, "cells_of", lambda name, brief=False: cells)
    monkeypatch.setattr(
        bench_memory, "in_processes", lambda work, jobs, tick, workers: ((job, work(job, tick)) for job in jobs)
    )
    return cells


def test_a_stopped_benchmark_goes_on(tmp_path, few_cells):
    path, sizes = tmp_path / "memory.json", {"cuts": Size(laps=2, videos=2)}
    heard: list[int] = []
    record = bench_memory.Record(path, sizes, tmp_path)
    next(bench_memory.run(record, heard.append))
    assert sum(heard) == 40
    half = json.loads(path.read_text())["tracks"]["cuts"]
    assert list(half["policies"]) == ["sliding_window"]
    record = bench_memory.Record(path, sizes, tmp_path)
    assert [job.cell for job in record.missing()] == few_cells[1:]
    assert list(bench_memory.run(record, heard.append)) == few_cells[1:]
    whole = json.loads(path.read_text())["tracks"]["cuts"]
    assert whole["cells"]["sliding_window/given/0"] == half["cells"]["sliding_window/given/0"]
    policies = whole["policies"]
    assert (
        policies["retrieval"]["identity_accuracy"]["mean"]
        > 0.8
        > policies["sliding_window"]["identity_accuracy"]["mean"]
    )
    assert policies["retrieval"]["retrieved_right"]["given"] > 0.9
    picture = record.draw("cuts")
    assert picture is not None and picture.stat().st_size > 10_000


def test_results_of_other_sizes_are_not_mixed(tmp_path, few_cells):
    path = tmp_path / "memory.json"
    record = bench_memory.Record(path, {"cuts": Size(2, 2)}, None)
    answers = np.zeros((2, len(world.SPOTS)))
    outcome = bench_memory.Outcome({"truth": answers, "now": answers, "error": answers})
    record.add(few_cells[0], outcome, 1.0)
    with pytest.raises(ValueError, match=r"holds cuts with videos = 2, but 3 are asked for"):
        bench_memory.Record(path, {"cuts": Size(2, 3)}, None)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match="no result of this benchmark"):
        bench_memory.Record(tmp_path / "other.json", {"cuts": Size(2, 3)}, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tracks", "zooms"], "--tracks must be among cuts"),
        (["--videos", "1"], "--videos must be at least 2"),
        (["--laps", "1"], "--laps must be at least 2"),
    ],
)
def test_wrong_arguments_take_one_line(tmp_path, capsys, arguments, message):
    assert cli.main(["bench-memory", "--json", str(tmp_path / "memory.json"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_quick_asks_for_one_training_with_the_first_lap_given():
    for name, track in TRACKS.items():
        brief, whole = bench_memory.cells_of(name, brief=True), bench_memory.cells_of(name)
        assert set(brief) <= set(whole) and {(cell.setting, cell.training) for cell in brief} == {("given", 0)}
        assert {"sliding_window", "retrieval", "oracle"} <= {cell.policy for cell in brief}
        assert len(whole) == len(track.policies) * len(track.settings) * track.trainings


def test_every_track_has_its_controls():
    for track in TRACKS.values():
        assert {"sliding_window", "random", "latest_query", "retrieval", "oracle"} <= set(track.policies)
        walk = track.walk(track.quick.laps)
        assert 0 < walk.lap < len(walk.views)


def test_policies_of_cuts_are_compared_on_the_same_videos():
    who = np.arange(8).reshape(2, 4)
    right, half = {"truth": who, "now": who}, {"truth": who, "now": np.where(who % 2, who, -1)}
    cuts = TRACKS["cuts"]
    facts = cuts.compare(cuts.walk(2), {"oldest_alike/given/0": half, "retrieval/given/0": right})
    assert facts["oldest_alike_less_retrieval"] == {"given": {"mean": -0.5, "low": -0.5, "high": -0.5}}
