"""The examples run as they stand, and say what they promise."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
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
