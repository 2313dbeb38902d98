"""`longlive-rag vbench`: the folder that VBench-Long reads, and the table of its results."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longlive_rag.cli import main
from longlive_rag.evaluation.vbench import COMMIT, DIMENSIONS, file_name
from longlive_rag.evaluation.vbench_results import Measured, as_markdown, average_ranks, ranks
from longlive_rag.generation.video import VideoWriter

RECORDED = Path(__file__).parent / "vbench_results"
PROMPTS = ["A panda_bear plays the guitar / in the rain.mp4 -Scene 3", "A red fox walks through snow"]
Change = Callable[[dict[str, Any]], None]


def write_video(path: Path, frames: int = 24, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with VideoWriter(path, fps=8) as writer:
        writer.write(np.full((frames, 16, 16, 3), shade, np.uint8))


@pytest.fixture
def methods(tmp_path: Path) -> Path:
    """Two methods' videos as `generate` leaves them, with what it leaves beside them."""
    for shade, method in enumerate(("window", "retrieval")):
        for number, prompt in enumerate(PROMPTS):
            path = tmp_path / "videos" / method / f"{number:04d}-some-words.mp4"
            write_video(path, shade=60 + 50 * shade + number)
            path.with_suffix(".json").write_text(json.dumps({"prompt": prompt, "seed": 0}))
            path.with_suffix(".png").write_bytes(b"")
        (tmp_path / "videos" / method / "0002-begun.partial.mp4").write_bytes(b"")
    return tmp_path / "videos"


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["vbench", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_prepare_writes_what_vbench_reads(methods: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "measured"
    assert (
        main(["vbench", "prepare", str(methods / "window"), str(methods / "retrieval"), "--output", str(output)]) == 0
    )
    names = ["A panda bear plays the guitar in the rain 3-0.mp4", "A red fox walks through snow-0.mp4"]
    for method in ("window", "retrieval"):
        assert sorted(path.name for path in (output / method / "videos").iterdir()) == names
        for name, source in zip(names, sorted((methods / method).glob("*words.mp4")), strict=True):
            assert (output / method / "videos" / name).read_bytes() == source.read_bytes()
        assert json.loads((output / method / "prompts.json").read_text()) == dict(zip(names, PROMPTS, strict=True))
    lines = [line for line in capsys.readouterr().out.splitlines() if "eval_long.py" in line]
    assert len(lines) == 12
    script = (output / "run.sh").read_text()
    assert all(line.strip() in script for line in lines)
    for line, (method, dimension) in zip(
        lines, [(m, d) for m in ("window", "retrieval") for d in DIMENSIONS], strict=True
    ):
        words = shlex.split(line)
        assert "--dev_flag" in words
        for option, value in (
            ("--mode", "long_custom_input"),
            ("--dimension", dimension),
            ("--videos_path", f"{method}/videos"),
            ("--output_path", f"{method}/results"),
        ):
            assert words[words.index(option) + 1] == value
    environment = (output / "environment.sh").read_text()
    assert COMMIT in environment and os.access(output / "environment.sh", os.X_OK)


def test_prepare_again_keeps_what_was_measured(methods: Path, tmp_path: Path) -> None:
    output = tmp_path / "measured"
    words = ["vbench", "prepare", str(methods), "--output", str(output)]
    assert main(words) == 0
    results = output / "window" / "results" / "results_x_eval_results.json"
    results.write_text("{}")
    (output / "window" / "videos" / "split_clip").mkdir()
    assert main(words) == 0
    assert results.read_text() == "{}" and (output / "window" / "videos" / "split_clip").is_dir()


def test_the_script_measures_what_has_not_been_measured(tmp_path: Path) -> None:
    write_video(tmp_path / "two words" / "A fox.mp4")
    output = tmp_path / "measured"
    assert main(["vbench", "prepare", str(tmp_path / "two words"), "--output", str(output)]) == 0
    # In the place of Python: it notes what it was asked for, and leaves what VBench would.
    python = output / "vbench-env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\n"
        'echo "$6" >> asked\n'
        '[ "$6" = aesthetic_quality ] && [ ! -e second ] && touch second && exit 1\n'
        'echo "{\\"$6\\": []}" > "${10}/results_$6_eval_results.json"\n'
    )
    python.chmod(0o755)
    assert [subprocess.run(["sh", output / "run.sh"], cwd="/").returncode for _ in range(3)] == [1, 0, 0]
    # Interrupted at the fifth, it goes on with the fifth.
    assert (output / "asked").read_text().split() == [*DIMENSIONS[:5], *DIMENSIONS[4:]]


def test_prepare_refuses_what_could_not_be_compared(
    methods: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "measured"
    assert "prepare or collect, got nothing" in refusal(capsys)
    assert "prepare or collect, got prepares" in refusal(capsys, "prepares", methods)
    assert "--output" in refusal(capsys, "prepare", methods)
    assert "no folder of videos" in refusal(capsys, "prepare", tmp_path / "none", "--output", output)
    (tmp_path / "empty").mkdir()
    assert "got none" in refusal(capsys, "prepare", tmp_path / "empty", "--output", output)
    assert "two folders are called window" in refusal(
        capsys, "prepare", methods, methods / "window", "--output", output
    )
    short = methods / "window" / "0003-short.mp4"
    write_video(short, frames=16)
    assert "same prompts, but retrieval and window differ in 1: 0003-short-0.mp4" in refusal(
        capsys, "prepare", methods, "--output", output
    )
    assert "16 frames, one clip of 2 seconds" in refusal(capsys, "prepare", methods / "window", "--output", output)
    assert not output.exists()
    short.unlink()
    assert main(["vbench", "prepare", str(methods), "--output", str(output)]) == 0
    capsys.readouterr()
    write_video(methods / "window" / "0000-some-words.mp4", shade=200)
    assert "is another video than" in refusal(capsys, "prepare", methods, "--output", output)
    write_video(output / "window" / "videos" / "other-0.mp4")
    assert "holds other videos, such as other-0.mp4" in refusal(capsys, "prepare", methods, "--output", output)


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A fox", "A fox-0.mp4"),
        ("a_b__c", "a b c-0.mp4"),
        ("../../etc/passwd", "etc passwd-0.mp4"),
        ("line\nbreak\tand\x00nothing", "line break and nothing-0.mp4"),
        ("take 3-7", "take 3-7-0.mp4"),
        ("--dev_flag", "dev flag-0.mp4"),
        ("_", "video-0.mp4"),
        ("", "video-0.mp4"),
    ],
)
def test_a_prompt_becomes_a_name_that_vbench_does_not_trip_over(prompt: str, name: str) -> None:
    assert file_name(prompt, 0) == name


def test_a_long_prompt_is_cut_and_told_apart_by_number(tmp_path: Path) -> None:
    beginning = "\u732b" * 90
    for number in range(2):
        path = tmp_path / "window" / f"{number}.mp4"
        write_video(path, shade=50 + number)
        path.with_suffix(".json").write_text(json.dumps({"prompt": f"{beginning} {number}"}))
    assert main(["vbench", "prepare", str(tmp_path / "window"), "--output", str(tmp_path / "out")]) == 0
    names = sorted(path.name for path in (tmp_path / "out" / "window" / "videos").iterdir())
    assert [name[-6:] for name in names] == ["-0.mp4", "-1.mp4"]
    # A clip's name has 4 more bytes, of the 255 that a name may have.
    assert all(len(name.encode()) < 200 for name in names)
    prompts = json.loads((tmp_path / "out" / "window" / "prompts.json").read_text())
    assert list(prompts.values()) == [f"{beginning} 0", f"{beginning} 1"]


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RECORDED, tmp_path / "recorded"))


def test_recorded_results_become_a_table(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["vbench", "collect", str(recorded)]) == 0
    table = (recorded / "average_ranks.md").read_text()
    assert table in capsys.readouterr().out
    report = json.loads((recorded / "average_ranks.json").read_text())
    assert list(report["methods"]) == ["retrieval", "sliding_window"]
    for method, each in report["methods"].items():
        (path,) = (recorded / method / "results").iterdir()
        written = json.loads(path.read_text())
        assert each["scores"] == {name: float(written[name][0]) for name in DIMENSIONS}
        # Its weights: a half for each part.
        for row in written["subject_consistency"][1]:
            assert row["video_results"] == pytest.approx(
                0.5 * row["inclip_score"] + 0.5 * row["mapped_clip2clip_score"]
            )
        assert 0.5 < each["between_clips"]["background_consistency"] <= 1
    # The stand-ins tell the methods apart in the two kinds of consistency, and nowhere else.
    assert [each["average_rank"] for each in report["methods"].values()] == pytest.approx([(2 + 4 * 1.5) / 6, 10 / 6])
    rows = [line for line in table.splitlines() if line.startswith(("| retrieval", "| sliding_window"))]
    assert rows[0].endswith("| **1.33** |") and rows[1].endswith("| 1.67 |")


def test_ties_share_the_mean_of_their_ranks() -> None:
    assert ranks({"a": 0.9, "b": 0.8, "c": 0.8, "d": 0.7}) == {"a": 1, "b": 2.5, "c": 2.5, "d": 4}
    assert ranks({"a": 0.5, "b": 0.5, "c": 0.5}) == {"a": 2, "b": 2, "c": 2}
    # As printed, 97.12 both.
    assert ranks({"a": 0.97123, "b": 0.97118}) == {"a": 1.5, "b": 1.5}


def test_average_rank_is_the_mean_over_the_dimensions() -> None:
    scores = {
        "a": (0.9, 0.9, 0.9, 0.1, 0.5, 0.5),
        "b": (0.8, 0.9, 0.7, 0.2, 0.5, 0.6),
        "c": (0.7, 0.6, 0.8, 0.3, 0.5, 0.7),
    }
    results = {method: Measured(dict(zip(DIMENSIONS, row, strict=True)), {}) for method, row in scores.items()}
    expected = {
        "a": (1 + 1.5 + 1 + 3 + 2 + 3) / 6,
        "b": (2 + 1.5 + 3 + 2 + 2 + 2) / 6,
        "c": (3 + 3 + 2 + 1 + 2 + 1) / 6,
    }
    assert average_ranks(results) == pytest.approx(expected)
    assert math.isclose(sum(expected.values()), 6)
    assert re.search(r"^\| a \| \*\*90\.00\*\* .* \| \*\*1\.92\*\* \|$", as_markdown(results), flags=re.MULTILINE)


def without_flag(results: dict[str, Any]) -> None:
    for row in results["subject_consistency"][1]:
        row["video_results"] = row["inclip_score"]


def without_a_second_clip(results: dict[str, Any]) -> None:
    results["background_consistency"][1][0].update(clip2clip_score=0, mapped_clip2clip_score=0.0)


def without_a_video(results: dict[str, Any]) -> None:
    rows = results["imaging_quality"][1]
    rows[:] = [row for row in rows if "fox" not in row["video_path"]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_flag, "subject_consistency was measured without --dev_flag"),
        (without_a_second_clip, "background_consistency has a video without a score between clips"),
        (
            without_a_video,
            "imaging_quality was not measured on the videos that were prepared; 1 differ, such as A red fox",
        ),
        (lambda results: results.pop("dynamic_degree"), "retrieval lacks dynamic_degree; in "),
        (lambda results: results["aesthetic_quality"].__setitem__(0, math.nan), "from 0 to 1, got nan"),
        (lambda results: results["imaging_quality"].__setitem__(0, 71.2), "from 0 to 1, got 71.2"),
        (lambda results: results.update(motion_smoothness=0.97), "motion_smoothness is not as VBench-Long writes it"),
    ],
)
def test_results_that_would_mislead_are_refused(
    recorded: Path, capsys: pytest.CaptureFixture[str], change: Change, says: str
) -> None:
    (path,) = (recorded / "retrieval" / "results").iterdir()
    results = json.loads(path.read_text())
    change(results)
    path.write_text(json.dumps(results))
    assert says in refusal(capsys, "collect", recorded)
    assert not (recorded / "average_ranks.json").exists()


def test_the_newest_result_of_a_dimension_counts(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (recorded / "retrieval" / "results").iterdir()
    again = json.loads(path.read_text())["motion_smoothness"]
    again[0] = 0.99
    path.with_name("results_2026-11-28-09-00-00_eval_results.json").write_text(json.dumps({"motion_smoothness": again}))
    assert main(["vbench", "collect", str(recorded)]) == 0
    assert "| **99.00** |" in capsys.readouterr().out


def test_damaged_files_are_named(recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "vbench.json does not exist" in refusal(capsys, "collect", tmp_path)
    assert "takes the one folder" in refusal(capsys, "collect")
    (path,) = (recorded / "retrieval" / "results").iterdir()
    path.write_text(path.read_text()[:100])
    assert "_eval_results.json is no JSON file" in refusal(capsys, "collect", recorded)
    (recorded / "vbench.json").write_text("[]")
    assert "vbench.json is not as `vbench prepare` wrote it" in refusal(capsys, "collect", recorded)
