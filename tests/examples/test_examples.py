"""The examples run as they stand, and say what they promise."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
import sys
from pathlib import Path
from unittest import mock

import pytest
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    script = str(EXAMPLES / f"{name}.py")
    with mock.patch.object(sys, "argv", [script, *arguments]), mock.patch.object(sys, "path", [*sys.path]):
        runpy.run_path(script, run_name="__main__")
    return capsys.readouterr().out


def rows(pattern: str, output: str) -> list[tuple[int, list[int]]]:
    """A frame and a list of frames for each line that fits."""
    return [(int(frame), ast.literal_eval(frames)) for frame, frames in re.findall(pattern, output)]


def test_patch_your_pipeline(capsys: pytest.CaptureFixture[str]) -> None:
    output = run("patch_your_pipeline", capsys)
    without, with_memory = (float(value) for value in re.findall(r"by (\d\.\de[+-]\d+)", output))
    assert without < 1e-5, "float32; another order of summation than the model's own attention"
    assert with_memory > 1e-3
    entries = rows(r"frames (\d+) to \d+ saw (\[.*\])", output)
    assert [start for start, _ in entries] == [15, 18, 21, 24, 27]
    assert all(frame < start for start, frames in entries for frame in frames)


def test_patch_self_forcing(capsys: pytest.CaptureFixture[str]) -> None:
    output = run("patch_self_forcing", capsys)
    assert "patched as Self-Forcing" in output
    entries = rows(r"frames (\d+) to \d+ saw (\[.*\])", output)
    assert [start for start, _ in entries] == [18, 21, 24, 27], "context 12, recency guard 5"
    assert all(frame < start - 6 for start, frames in entries for frame in frames)


def test_search_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "found.png"
    output = run("search_a_video", capsys, "--output", str(picture))
    hits = re.findall(r"frame +(\d+), similarity \S+: the (.*)", output)
    assert [place for _, place in hits] == ["seaside"] * 5
    assert {int(frame) // 5 % 4 for frame, _ in hits} == {1}
    assert Image.open(picture).size == (6 * 256, 256)
    # What was found first is asked for in its turn, by way of a file: it finds itself.
    Image.open(picture).crop((256, 0, 512, 256)).save(tmp_path / "asked.png")
    again = run("search_a_video", capsys, "--picture", str(tmp_path / "asked.png"))
    assert re.findall(r"frame +(\d+)", again)[0] == hits[0][0]


def test_your_own_model(capsys: pytest.CaptureFixture[str]) -> None:
    output = run("your_own_model", capsys)
    assert re.findall(r"block at frame (\d+)", output) == ["15", "18", "21", "24", "27"]
    assert len(re.findall(r"\d+ \(0\.\d\d\)", output.splitlines()[-1])) == 6


def test_own_policy(capsys: pytest.CaptureFixture[str]) -> None:
    (_, similar), (_, spaced) = rows(r"frame (\d+) saw frames (\[.*\])", run("own_policy", capsys))
    assert len(similar) == len(spaced) == 4
    assert min(later - earlier for earlier, later in itertools.pairwise(spaced)) >= 8


def test_every_example_has_its_test() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        name.removeprefix("test_") for name in globals() if (EXAMPLES / f"{name.removeprefix('test_')}.py").exists()
    }
