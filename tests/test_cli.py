"""The command line's manners: what is printed where, and the exit status."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import longlive_rag
from longlive_rag import cli


@dataclass(frozen=True)
class Fake:
    """A command that fails as it is told to."""

    count: int
    """How many."""

    fail: str = ""
    """With what."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count must be at least 1, got {self.count}")

    def run(self) -> int:
        errors = {
            "value": ValueError("frames must be\na multiple of 3, got 4"),
            "type": TypeError("dtype must be float32, got int64"),
            "file": FileNotFoundError(2, "No such file or directory", "weights.safetensors"),
            "extra": ModuleNotFoundError("No module named 'diffusers'", name="diffusers"),
            "interrupt": KeyboardInterrupt(),
            "bug": RuntimeError("a fault of ours"),
        }
        if self.fail:
            raise errors[self.fail]
        print(f"ran {self.count}")
        return 0


@pytest.fixture(autouse=True)
def fake_command(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fake_command")
    module.Fake = Fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_command", "Fake", "for the tests"))


def run(*arguments: str, timeout: float = 120, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longlive_rag", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)  # type: ignore[call-overload]


def test_runs_the_chosen_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fake", "--count", "3"]) == 0
    assert capsys.readouterr().out == "ran 3\n"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in out
        assert command.summary in out


def test_help_of_a_command_shows_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["fake", "--help"])
    assert stop.value.code in (0, None)
    out = capsys.readouterr().out
    assert "--count" in out
    assert "How many." in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"longlive-rag {longlive_rag.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nope", "longlive-rag: unknown command 'nope'; expected one of "),
        ("fake", "longlive-rag fake: missing --count INT"),
        ("fake --count", "longlive-rag fake: missing value for argument '--count'"),
        ("fake --count two", "longlive-rag fake: error parsing --count: invalid literal for int() with base 10: 'two'"),
        ("fake --count 0", "count must be at least 1, got 0"),
        ("fake --count 1 --cuont 2", "longlive-rag fake: unrecognized options: --cuont, 2"),
        ("fake --count 1 --fail value", "longlive-rag fake: frames must be a multiple of 3, got 4\n"),
        ("fake --count 1 --fail type", "longlive-rag fake: dtype must be float32, got int64\n"),
        ("fake --count 1 --fail file", "longlive-rag fake: weights.safetensors: No such file or directory\n"),
        ("fake --count 1 --fail extra", "fake: diffusers is not installed; pip install 'longlive_rag[wan]'\n"),
    ],
)
def test_wrong_use_is_one_line_and_status_two(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err
    assert captured.err.startswith("longlive-rag")
    assert captured.err.count("\n") == 1
    assert captured.err.isascii(), "nothing of the box that tyro draws may be left"


def test_a_misspelt_option_is_met_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fake", "--count", "1", "--fial", "value"]) == 2
    assert "perhaps you meant: --fail STR" in capsys.readouterr().err


def test_a_complaint_in_a_frame_is_condensed_too() -> None:
    done = run("info", "--jsn", env={**os.environ, "PYTHONIOENCODING": "utf-8", "COLUMNS": "40"})
    assert done.returncode == 2
    assert done.stderr == (
        "longlive-rag info: unrecognized options: --jsn; perhaps you meant: --json (see longlive-rag info --help)\n"
    )


def test_an_interrupt_is_one_line_and_status_130(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fake", "--count", "1", "--fail", "interrupt"]) == 130
    assert capsys.readouterr().err == "longlive-rag fake: interrupted\n"


def test_a_fault_of_the_package_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="a fault of ours"):
        cli.main(["fake", "--count", "1", "--fail", "bug"])


def test_a_reader_that_leaves_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "longlive_rag", "info"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


def test_every_listed_command_can_be_imported() -> None:
    for name, command in cli.COMMANDS.items():
        if name == "fake":
            continue
        assert importlib.util.find_spec(command.module), f"{name}: no module {command.module}"
        options = getattr(importlib.import_module(command.module), command.class_name)
        assert options.__doc__, f"{name} has no help"


def test_help_does_not_wait_for_torch() -> None:
    probe = "import sys; from longlive_rag.cli import main; main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "False"


def test_info_as_json(tmp_path: Path) -> None:
    done = run("info", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    assert facts["version"] == longlive_rag.__version__
    assert facts["torch"].startswith("2.")
    assert set(facts["cuda"]) == {"built", "architectures", "available", "reason"}
    assert facts["cuda"]["built"] == bool(facts["cuda"]["architectures"])
    assert facts["cuda"]["available"] == (facts["cuda"]["reason"] is None)


def test_info_as_text_gives_the_reason_why_no_gpu_is_used() -> None:
    facts = json.loads(run("info", "--json").stdout)
    text = run("info").stdout
    assert longlive_rag.__version__ in text
    assert facts["torch"] in text
    if not facts["cuda"]["available"]:
        assert facts["cuda"]["reason"] in text
