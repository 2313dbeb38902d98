"""The bundled backbone remembers, and the demo reports it."""

import json

import av
import numpy as np
import pytest
import torch

from longlive_rag import cli
from longlive_rag.small_world import measure, report, world
from longlive_rag.small_world.backbone import ASSETS, load_backbone, load_codec
from longlive_rag.small_world.measure import Condition, Score
from longlive_rag.small_world.policies import POLICIES


@pytest.fixture(scope="module")
def scores() -> dict[str, tuple[Score, measure.Videos]]:
    model, codec, walk = load_backbone(), load_codec(), world.walk("cuts", 41)
    return {
        name: measure.measure(model, codec, POLICIES[name], walk, seed=77, videos=3, given=True)
        for name in ("sliding_window", "retrieval")
    }


def test_retrieval_beats_the_window(scores):
    assert scores["retrieval"][0].correct.mean() > 0.8
    assert scores["sliding_window"][0].correct.mean() < 0.3


def test_the_draft_asks_for_the_place_that_comes(scores):
    walk = world.walk("cuts", 41)
    recalls = [recall for recall in scores["retrieval"][1].recalls if recall.block_start >= walk.lap + world.DWELL]
    same = [walk.views[f] == walk.views[recall.block_start] for recall in recalls for row in recall.frames for f in row]
    assert np.mean(same) > 0.95


def test_score_counts_videos_and_knows_chance():
    truth = np.array([[0, 1], [2, 3], [0, 5]])
    score = measure.score(truth, np.array([[0, 1], [2, 9], [0, 9]]), np.full((3, 2), 0.1))
    assert score.interval()["mean"] == pytest.approx((1 + 0.5 + 0.5) / 3, abs=1e-4)
    assert score.interval()["videos"] == 3
    assert score.chance == pytest.approx(2 / 12)  # videos 0 and 2 share their first inhabitant
    assert score.interval(np.array([True, False]))["mean"] == 1


def test_videos_are_paired_and_independent_of_the_batch():
    assert np.array_equal(measure.initial_noise(3, 4, 5)[:2], measure.initial_noise(3, 2, 5))
    model, codec, walk = load_backbone(), load_codec(), world.walk("pans", 9)
    together, alone = (
        measure.collect(codec, measure.generate(model, POLICIES["retrieval"], walk, seed=5, videos=videos))
        for videos in (2, 1)
    )
    assert np.abs(together.frames[:1].astype(int) - alone.frames).max() <= 1


def test_workers_give_what_this_process_gives():
    heard: list[int] = []
    results = measure.measure_all("cuts", 26, policies=["oracle"], seed=1, videos=2, tick=heard.append, workers=1)
    assert set(results) == {Condition("oracle", True), Condition("oracle", False)}
    assert sum(heard) == 2 * 26
    walk = world.walk("cuts", 26)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker: other numbers of threads add up in other orders
    try:
        score, videos = measure.measure(
            load_backbone(), load_codec(), POLICIES["oracle"], walk, seed=1, videos=2, given=True
        )
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(results[Condition("oracle", True)][0].correct, score.correct)
    assert results[Condition("oracle", True)][1].frames.shape == videos.frames.shape


def test_report_and_pictures(tmp_path, scores):
    walk = world.walk("cuts", 41)
    facts = {name: report.entry(walk, {"given": score, "generated": score}) for name, (score, _) in scores.items()}
    facts = json.loads(json.dumps(facts))
    for entry in facts.values():
        for name in ("identity_accuracy", "identity_accuracy_generated"):
            assert set(entry[name]) == {"mean", "low", "high", "videos", "chance"}
            assert 0 <= entry[name]["low"] <= entry[name]["mean"] <= entry[name]["high"] <= 1
    assert "draft" in report.table(facts)
    clips = {name: videos.frames[0] for name, (_, videos) in scores.items()}
    report.write_video(tmp_path / "retrieval.mp4", clips["retrieval"])
    residents = {name: report.first_residents(walk, clip) for name, clip in clips.items()}
    report.write_comparison(tmp_path / "comparison.mp4", walk, clips, residents)
    report.draw_memory(tmp_path / "memory.png", walk, {"retrieval": scores["retrieval"][1]})
    for name, size in (("retrieval", (384, 384)), ("comparison", (256, 590))):
        with av.open(str(tmp_path / f"{name}.mp4")) as video:
            stream = video.streams.video[0]
            assert (stream.width, stream.height, stream.codec_context.name) == (*size, "h264")
            assert stream.frames == 41
    assert (tmp_path / "memory.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--laps", "1"], "--laps must be at least 2"),
        (["--videos", "1"], "--videos must be at least 2"),
        (["--seed", "-1"], "--seed must not be negative"),
        (["--track", "zooms"], "zooms"),
    ],
)
def test_wrong_arguments_take_one_line(tmp_path, capsys, arguments, message):
    assert cli.main(["demo", "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file(tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "taken")]) == 2
    assert "taken is a file" in capsys.readouterr().err


def test_weights_are_small_and_damage_is_named(tmp_path):
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 25e6
    damaged = tmp_path / "backbone.safetensors"
    damaged.write_bytes((ASSETS / "backbone.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        load_backbone(damaged)
    with pytest.raises(ValueError, match="other weights than SmallBackbone"):
        load_backbone(ASSETS / "codec.safetensors")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_codec(tmp_path / "nothing.safetensors")
