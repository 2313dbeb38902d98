"""`longlive-rag evaluate`: report, picture and table; wrong input is refused in one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from longlive_rag.cli import main
from longlive_rag.generation.video import VideoWriter
from support.video_files import read_video


@pytest.fixture
def write_video(tmp_path):
    def write(name, frames=24, growth=0.0):
        pattern = np.random.default_rng(0).uniform(-60, 60, (32, 48, 3)).repeat(2, 0).repeat(2, 1)
        images = [128 + pattern * (1 + growth * index / frames) for index in range(frames)]
        path = tmp_path / name
        with VideoWriter(path, fps=8) as writer:
            writer.write(np.clip(images, 0, 255).astype(np.uint8))
        return path

    return write


def test_report_ranks_videos_by_what_drifted(tmp_path, write_video, capsys):
    steady, drifting = write_video("steady.mp4"), write_video("drifting.mp4", growth=0.8)
    output = tmp_path / "results" / "drift"
    assert main(["evaluate", str(steady), str(drifting), "--output", str(output), "--segment-frames", "6"]) == 0
    report = json.loads((output / "report.json").read_text())
    assert [video["path"] for video in report["videos"]] == [str(steady), str(drifting)]
    assert [video["frames"] for video in report["videos"]] == [24, 24]
    first, second = (video["drift"] for video in report["videos"])
    assert abs(first["sharpness"]) < 0.02
    # The segments' middles are frames 2.5 and 20.5 of 24, and sharpness grows as contrast does.
    assert second["sharpness"] == pytest.approx((1 + 0.8 * 20.5 / 24) / (1 + 0.8 * 2.5 / 24) - 1, abs=0.05)
    table = capsys.readouterr().out
    assert "steady.mp4" in table and "drifting.mp4" in table
    assert f"{100 * second['sharpness']:+.1f}%" in table
    picture = Image.open(output / "drift.png")
    assert picture.width > 1000
    beside = ["01_steady_first_and_last.mp4", "02_drifting_first_and_last.mp4"]
    assert sorted(entry.name for entry in output.iterdir()) == [*beside, "drift.png", "report.json"]
    (comparison,) = report["comparisons"]
    assert (comparison["video"], comparison["other"]) == (str(steady), str(drifting))
    # The first video, the steady one, moves less; of three later segments no interval is claimed.
    assert comparison["further"]["sharpness"]["mean"] < -0.1
    assert comparison["further"]["sharpness"]["low"] is None
    assert [video["segments"] for video in report["videos"]] == [4, 4]
    errors = [video["video_drift_error"]["sharpness"] for video in report["videos"]]
    assert errors[0] < 0.1 < errors[1]
    assert f"{errors[1]:.2f}" in table and "drifting.mp4 is farthest from its beginning in " in table


def test_the_first_seconds_play_beside_the_last(tmp_path, write_video):
    drifting = write_video("drifting.mp4", frames=48, growth=0.8)
    assert main(["evaluate", str(drifting), "--output", str(tmp_path / "out"), "--segment-frames", "6"]) == 0
    images, fps = read_video(tmp_path / "out" / "01_drifting_first_and_last.mp4")
    # Six seconds at 8 a second: 24 frames each, of 64 x 96 with a white gap between.
    assert (images.shape, fps) == ((24, 64, 200, 3), 8)
    assert images[:, :, 100].min() > 200
    whole, _ = read_video(drifting)
    for half, original in ((images[:, :, :92], whole[:24, :, :92]), (images[:, :, 108:], whole[24:, :, 4:])):
        # Coded twice, in half the colour resolution each time.
        assert abs(half.mean(axis=-1) - original.mean(axis=-1)).mean() < 6


def test_videos_of_one_name_stay_apart(tmp_path, write_video, capsys):
    path = write_video("video.mp4")
    (tmp_path / "other").mkdir()
    other = write_video("other/video.mp4", growth=0.5)
    arguments = [str(path), str(other), str(path), "--output", str(tmp_path / "out"), "--segment-frames", "4"]
    assert main(["evaluate", *arguments]) == 0
    table = capsys.readouterr().out
    assert f"{path} (1)" in table and f"{path} (3)" in table and f"{other} " in table


def refusal(capsys, *arguments):
    assert main(["evaluate", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_wrong_input_is_refused_before_work(tmp_path, write_video, capsys):
    video, output = write_video("video.mp4"), tmp_path / "out"
    assert "none.mp4 does not exist" in refusal(capsys, video, tmp_path / "none.mp4", "--output", output)
    assert "24 frames, too few for two segments of 48" in refusal(capsys, video, "--output", output)
    assert "at least 2, got 1" in refusal(capsys, video, "--output", output, "--segment-frames", 1)
    assert "videos" in refusal(capsys, "--output", output)
    assert not output.exists()
    assert "is a file" in refusal(capsys, video, "--output", video, "--segment-frames", 4)


def test_truncated_video_leaves_no_report(tmp_path, write_video, capsys):
    video = write_video("video.mp4", frames=60)
    data = video.read_bytes()
    video.write_bytes(data[: int(0.7 * len(data))])
    output = tmp_path / "out"
    assert main(["evaluate", str(video), "--output", str(output), "--segment-frames", "4"]) == 2
    assert "video.mp4 is" in capsys.readouterr().err
    assert list(output.iterdir()) == []
