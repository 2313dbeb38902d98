"""The command line's manners: what is printed where, and the exit status."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import longlive_rag
from longlive_rag import cli
from longlive_rag.commands.info import EXTRAS, extra_steps, gpu_steps
from longlive_rag.options import Parser, options_of


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
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake_command", "Fake", "for the tests", "measure"))


def run(*arguments: str, timeout: float = 120, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "longlive_rag", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **options)  # type: ignore[call-overload]


def test_runs_the_chosen_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fake", "--count", "3"]) == 0
    assert capsys.readouterr().out == "ran 3\n"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"]])
def test_help_lists_every_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for name, command in cli.COMMANDS.items():
        assert f"  {name} " in out
        assert command.summary in out
        assert f"\n{command.purpose}:\n" in out
    assert "--print-completion" in out
    assert max(map(len, out.splitlines())) <= 80


def test_alone_it_greets_with_three_commands_to_begin_with(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  longlive-rag")]
    assert [words[1] for words in lines] == ["info", "demo", "generate"]
    for _program, name, *words in lines:
        parser = Parser(cli.COMMANDS[name].load(), name)
        if words[0] == "--output":
            parser.parse_command(words[:2])


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
        ("genrate", "longlive-rag: unknown command 'genrate'; did you mean generate? (see longlive-rag --help)\n"),
        ("--hlep", "longlive-rag: unknown option '--hlep'; "),
        ("--print-completion", "longlive-rag: --print-completion must be bash, zsh"),
        (
            "run python x.py --config_path y",
            "longlive-rag run: unknown option --config-path; what belongs to the command",
        ),
        ("fake", "longlive-rag fake: missing --count N (see longlive-rag fake --help)\n"),
        ("fake --count", "longlive-rag fake: --count: expected one argument (see longlive-rag fake --help)\n"),
        ("fake --count two", "longlive-rag fake: --count must be an integer, got 'two'"),
        ("fake --count 0", "count must be at least 1, got 0"),
        ("fake --count 1 --cuont 2", "longlive-rag fake: unknown option --cuont; did you mean --count?"),
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


REAL_COMMANDS = [name for name in cli.COMMANDS if name != "fake"]


def wrong_uses(name: str) -> list[list[str]]:
    """For each option of a command a value it cannot have; an unknown option; nothing where something is required."""
    options = list(options_of(cli.COMMANDS[name].load()))
    wrong = [["--no-such-option"], ["--no-such-option=1"]]
    for option in options:
        flag = [] if option.positional else [option.name]
        if option.choices:
            wrong.append([*flag, "no-such-choice"])
        elif option.kind in (int, float):
            wrong.append([*flag, "many"])
        if flag and option.kind is not bool and not option.many:
            wrong.append(flag)
    required = [option for option in options if option.required]
    if required:
        wrong.append([])
    # Nothing else may be wrong, or that would be told.
    given = [word for option in required for word in (option.name, option.choices[0] if option.choices else "x")]
    return [words if not words else [*given, *words] for words in wrong]


@pytest.mark.parametrize("name", REAL_COMMANDS)
def test_wrong_use_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in wrong_uses(name):
        assert cli.main([name, *words]) == 2, words
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"longlive-rag {name}: ")
        assert captured.err.endswith(f" (see longlive-rag {name} --help)\n")
        assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", REAL_COMMANDS)
def test_help_of_every_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = cli.COMMANDS[name].load()
    for columns in (80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        text = Parser(command, f"longlive-rag {name}").format_help()
        assert max(map(len, text.splitlines())) <= min(columns, 100)
        assert text.isascii()
        assert "None" not in text
    for option in options_of(command):
        assert option.help, f"{option.name} has no help"
        assert f"  {option.values if option.positional else option.name}" in text


@pytest.mark.parametrize("name", REAL_COMMANDS)
def test_every_option_is_in_a_group_if_there_are_groups(name: str) -> None:
    command = cli.COMMANDS[name].load()
    grouped = [each for names in getattr(command, "groups", {}).values() for each in names]
    options = [option for option in options_of(command) if not option.positional]
    assert len(set(grouped)) == len(grouped)
    for each in grouped:
        assert any(each in option.path for option in options), f"{each} is no option of {name}"
    if grouped:
        for option in options:
            assert set(option.path) & set(grouped), f"{option.name} is in no group"


@pytest.mark.parametrize("name", REAL_COMMANDS)
def test_the_examples_of_every_command_can_be_typed(name: str) -> None:
    command = cli.COMMANDS[name].load()
    text = Parser(command, f"longlive-rag {name}").format_help()
    lines = text.partition("examples:\n")[2].replace("\\\n", " ").splitlines()
    assert lines, f"{name} has no example"
    for line in lines:
        words = shlex.split(line)
        start = words.index("longlive-rag")
        assert words[start + 1] == name
        assert isinstance(Parser(command, name).parse_command(words[start + 2 :]), command)


def test_a_dumb_terminal_gets_plain_text() -> None:
    environment = {**os.environ, "TERM": "dumb", "FORCE_COLOR": "1", "COLUMNS": "80", "PYTHONIOENCODING": "ascii"}
    done = run("demo", "--help", env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    assert "--output FOLDER (required)" in done.stdout


def test_help_is_no_error_for_a_reader_that_leaves_early() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "longlive_rag", "demo", "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.stderr == ""
    # Without a buffer (PYTHONUNBUFFERED) it is argparse that writes in vain, and says nothing.
    assert done.returncode in (0, 128 + signal.SIGPIPE)


def test_completion_knows_commands_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--print-completion", "bash"]) == 0
    script = capsys.readouterr().out
    for word in ("generate", "--wan-dir", "--context-frames", "small-world", "--segment-frames"):
        assert word in script


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


@pytest.mark.parametrize(
    "arguments",
    [[], ["--help"], ["genrate"], *([name, "--help"] for name in ("info", "demo", "generate", "corpus", "train"))],
)
def test_help_does_not_wait_for_torch(arguments: list[str]) -> None:
    probe = f"""
import sys
from longlive_rag.cli import main
try:
    main({arguments})
except SystemExit:
    pass
print('torch' in sys.modules)
"""
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


def test_info_says_what_to_do_about_what_is_missing() -> None:
    facts = json.loads(run("info", "--json").stdout)
    text = run("info").stdout
    missing = [package for package in EXTRAS if importlib.util.find_spec(package) is None]
    assert ("What to do next:" in text) == bool(missing or not facts["cuda"]["available"])
    if not facts["cuda"]["available"]:
        assert "longlive-rag demo --output demo" in text
    for package in missing:
        assert f"pip install 'longlive_rag[{EXTRAS[package]}]'" in text


@pytest.mark.parametrize(
    ("situation", "command"),
    [
        ({"importable": False, "built": False}, "pip install --force-reinstall --no-deps ."),
        ({"built": False}, "LONGLIVE_RAG_CUDA=ON pip install --force-reinstall --no-deps ."),
        ({"torch_has_cuda": False}, "--index-url https://download.pytorch.org/whl/cu"),
        ({"driver_fits": False}, "CUDACXX="),
        ({"capability": None}, "nvidia-smi"),
        ({"capability": (10, 3)}, "CUDAARCHS=103-real LONGLIVE_RAG_CUDA=ON pip install"),
    ],
)
def test_the_next_step_towards_a_gpu(situation: dict[str, Any], command: str) -> None:
    fine = {"importable": True, "built": True, "torch_has_cuda": True, "driver_fits": True, "capability": (9, 0)}
    (step,) = gpu_steps(**{**fine, **situation})
    assert command in step.command


def test_a_gpu_too_old_for_the_kernels_is_not_rebuilt_for() -> None:
    assert not gpu_steps(importable=True, built=True, torch_has_cuda=True, driver_fits=True, capability=(7, 5))


def test_each_extra_is_named_once() -> None:
    assert [step.command for step in extra_steps(["ftfy", "diffusers", "tensorboard"])] == [
        "pip install 'longlive_rag[wan]'",
        "pip install 'longlive_rag[tensorboard]'",
    ]
