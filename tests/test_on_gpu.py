"""The script for a machine with a GPU, as far as it can be tested in seconds; `.ci/run` rehearses all of it."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_plan
import gpu_summary
import on_gpu
import only
import pytest
from gpu_plan import BUILD, FIGURES, LONGEST_CALL, PARTS, Part, Step

from longlive_rag.bench import attend, layer
from longlive_rag.bench.common import Row

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
STEPS = {f"{part}: {step.name}": step for part, each in PARTS.items() for step in each.steps}


def paths_of(step: Step) -> list[Path]:
    return [ROOT / word for word in step.command if word.startswith(("tests/", "benchmarks/"))]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_fits_into_one_call_with_the_build(part: str) -> None:
    assert BUILD.limit + PARTS[part].limit < LONGEST_CALL


@pytest.mark.parametrize("step", STEPS)
def test_the_files_of_a_step_are_there(step: str) -> None:
    assert [path for path in paths_of(STEPS[step]) if not path.exists()] == []


@pytest.mark.parametrize("tests", [gpu_plan.SMALL_TESTS, gpu_plan.SMALL_HOPPER_TESTS])
def test_selected_tests_exist(tests: dict[str, tuple[str, ...]]) -> None:
    for file, names in tests.items():
        defined = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
        assert set(names) <= defined, file


def test_every_test_that_needs_a_gpu_is_run() -> None:
    marked = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.cuda" in path.read_text()]
    run = [path for name, step in STEPS.items() if not name.startswith("sanitize") for path in paths_of(step)]
    missed = [path for path in marked if path != Path(__file__) and not {path, *path.parents} & set(run)]
    assert len(marked) > 4 and missed == []


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Part]:
    """The script with two parts of its own, on the rehearsal's stand-ins, as if built."""
    parts = {
        "good": Part("", (Step("figures", ("sh", "-c", 'echo "{\\"rows\\": []}" > "$0"; echo fine', FIGURES), 20),)),
        "bad": Part(
            "",
            (
                Step("fails", ("sh", "-c", "echo why; exit 3"), 20),
                Step("hangs", ("sleep", "60"), 1),
                Step("needs", ("true",), 20, needs=("no_such_package",)),
            ),
        ),
        "other": Part("", (Step("newer", ("false",), 20, subcommand="no-such-command"),)),
    }
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    monkeypatch.setattr(on_gpu, "GROUPS", {"all": tuple(parts)})
    monkeypatch.setattr(on_gpu, "WORK", tmp_path / "work")
    (tmp_path / "work" / "rehearsal").mkdir(parents=True)
    monkeypatch.setattr(on_gpu.Runner, "built", lambda self: True)
    monkeypatch.setattr(on_gpu.Runner, "_known_subcommands", lambda self: ["info"])
    return parts


def steps_in(folder: Path) -> dict[str, Any]:
    steps: dict[str, Any] = json.loads((folder / "results.json").read_text())["steps"]
    return steps


def test_a_failed_step_stops_nothing_and_counts(script: dict[str, Part], tmp_path: Path) -> None:
    folder = tmp_path / "results"
    assert on_gpu.main(["all", str(folder), "--rehearse"]) == 3 + 1  # and a summary without the figures of any goal
    steps = steps_in(folder)
    assert {name: step["outcome"] for name, step in steps.items()} == {
        "good: figures": "passed",
        "bad: fails": "failed",
        "bad: hangs": "timed out",
        "bad: needs": "failed",
        "other: newer": "left out",
    }
    assert steps["good: figures"]["figures"] == {"rows": []} and steps["good: figures"]["said"] == "fine"
    assert steps["bad: fails"]["status"] == 3 and steps["bad: fails"]["tail"] == ["why"]
    assert steps["bad: hangs"]["seconds"] < 1 + 2 * on_gpu.GRACE
    assert "no_such_package" in steps["bad: needs"]["reason"]
    assert "no command no-such-command" in steps["other: newer"]["reason"]
    page = (folder / "summary.md").read_text()
    assert "A rehearsal" in page and "why" in page and "not measured" in page
    assert "bad: hangs: timed out" in (folder / "log.txt").read_text()


def test_what_has_passed_is_not_run_again(
    script: dict[str, Part], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(tmp_path / "results")

    def run(*options: str) -> str:
        on_gpu.main(["good", folder, "--rehearse", *options])
        return capsys.readouterr().out

    assert "0 steps had passed before, 1 passed now" in run()
    assert "1 steps had passed before, 0 passed now" in run()
    assert "0 steps had passed before, 1 passed now" in run("--again")
    assert "1 left for another call" in run("--again", "--within", "10")
    monkeypatch.setattr(on_gpu, "sources_digest", lambda: "others")
    assert "0 steps had passed before, 1 passed now" in run()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "")
    assert on_gpu.main(["build"]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "message"), [([], "--list names them"), (["benhc"], "invalid choice: 'benhc'")])
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        on_gpu.main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_the_list_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert on_gpu.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert [name for name in (*PARTS, *gpu_plan.GROUPS) if f"{name} " not in listed] == []


def test_the_goals_stand_beside_figures() -> None:
    """Rows as the benchmarks write them, under the names of their own cases."""
    rates = dict(zip(attend.CASES, (660, 650, 600, 600, 500), strict=True))
    peers: dict[str, float | None] = {"SDPA flash": 1.3e-3, "SDPA cuDNN": 1.12e-3}
    rows = {
        "bench-attend: bench": [
            Row("attend", f"{name}: {rate} TFLOP/s", 1e-3, 8e-4, "", peers) for name, rate in rates.items()
        ],
        "bench-sweep: bench": [Row("attend", "rotation costs 0.8%, sizes", 1.008e-3, 1e-3)],
        "bench-layer: bench": [Row("layer", name, 1.2e-3) for name in layer.CASES],
        "bench-encoder: bench": [Row("encoder", "float32", 9e-4), Row("encoder", "CUDA graph", 4e-4)],
    }
    figures: dict[str, Any] = {name: {"rows": [row.as_json() for row in each]} for name, each in rows.items()}
    figures["end-to-end: latents"] = {"retrieval_share": 0.004}
    figures["end-to-end: video"] = {"seconds": 16.5}
    found = [
        (goal.target, figure, figure is not None and goal.reached(figure))
        for goal, figure in gpu_summary.goals(figures)
    ]
    assert [(target, round(figure or 0, 3), reached) for target, figure, reached in found] == [
        (640, 660, True), (690, 660, False), (1.1, 1.12, True), (660, 650, False), (1.05, 1.12, True), (1, 0.8, True),
        (1.1, 1.2, False), (0.5, 0.4, True), (1, 0.4, True), (15, 16.5, False),
    ]  # fmt: skip
    assert {goal.step for goal in gpu_summary.GOALS} <= set(STEPS)
    machine = dict.fromkeys(gpu_summary.MACHINE, "x")
    steps = {name: {"outcome": "passed", "limit": 9, "figures": each} for name, each in figures.items()}
    page = gpu_summary.summary({"rehearsal": False, "machine": machine, "steps": steps})
    assert "rehearsal" not in page
    assert "| attend, 12 heads, first goal | at least 640 TFLOP/s | 660 | reached | bench-attend: bench |" in page
    assert "| 30 s of video, 1.3B | at most 15 s | 16.5 | **missed** | end-to-end: video |" in page


def test_nothing_else_is_needed_than_what_is_named() -> None:
    """With every other package hidden, all that the script runs is imported, and its tests are collected."""
    paths = {str(path.relative_to(ROOT)) for step in STEPS.values() for path in paths_of(step)}
    tests = sorted(path for path in paths if path.startswith("tests/"))
    program = f"""
import importlib.util, pkgutil, sys
import only
only.import_only(only.allowed(with_carried=False))
others = ("av", "diffusers", "matplotlib", "shtab", "transformers", "yaml")
found = [name for name in others if importlib.util.find_spec(name)]
assert found == [], found
import end_to_end, longlive_rag.bench, longlive_rag.cli, longlive_rag.commands
for package in (longlive_rag.bench, longlive_rag.commands):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "cuda", *{tests}]))
"""
    # Plugins of packages that are hidden cannot be imported.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HYPOTHESIS_NO_PLUGINS": "1"}
    inherited = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(BENCHMARKS), str(BENCHMARKS / "rehearsal"), inherited])
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_cuda_graphs" in done.stdout


def test_what_is_needed_is_documented() -> None:
    text = (BENCHMARKS / "README.md").read_text().replace("-", "_")
    assert [name for name in (*gpu_plan.ON_THE_MACHINE, *gpu_plan.CARRIED) if name not in text] == []
    assert not set(gpu_plan.CARRIED) & only.allowed(with_carried=False)


@pytest.mark.parametrize(
    ("options", "status"),
    [(["--tool", "racecheck", "--kernel-name", "kns=longlive"], 0), (["--tool", "race"], 2), (["--kernel", "x=y"], 2)],
)
def test_the_stand_in_takes_what_the_sanitizer_takes(options: list[str], status: int) -> None:
    command = [sys.executable, str(BENCHMARKS / "rehearsal" / "bin" / "compute-sanitizer"), *options, "true"]
    assert subprocess.run(command, capture_output=True).returncode == status
