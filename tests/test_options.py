"""Options from a dataclass: what is understood, what is refused and how, what the help shows."""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from longlive_rag.options import Parser, Positional, UsageError, completion_script


@dataclass(frozen=True)
class Common:
    wide: bool = False
    """Wide."""


@dataclass(frozen=True)
class Inner(Common):
    context_frames: int = 12
    """Frames of context."""
    scale: float | None = None
    """Default: 100% of it."""

    def __post_init__(self) -> None:
        if self.context_frames < 1:
            raise ValueError(f"context_frames must be at least 1, got {self.context_frames}")


@dataclass(frozen=True)
class Cook:
    """Cook something.

    And a second paragraph, long enough that it has to be broken in a narrow terminal of eighty columns.

    Examples:
      kitchen cook --output a \\
          x.txt
    """

    groups: ClassVar[dict[str, tuple[str, ...]]] = {"what": ("title", "output"), "policy": ("policy",)}

    files: Positional[tuple[Path, ...]]
    """Files."""
    output: Path
    """Where it
    goes."""
    title: str | None = None
    """A title."""
    seconds: float = 30.0
    """How long."""
    kind: Literal["soup", "salad"] = "soup"
    """Which kind."""
    steps: tuple[float, ...] = (1000.0, 0.5)
    """Steps."""
    policy: Inner = field(default_factory=lambda: Inner(context_frames=9))
    """The policy."""
    rate: float = 1e-4
    """The rate."""


def parse(line: str) -> Cook:
    cook = Parser(Cook, "kitchen cook").parse_command(line.split())
    assert isinstance(cook, Cook)
    return cook


def test_defaults_are_those_of_the_dataclass() -> None:
    assert parse("--output x") == Cook(files=(), output=Path("x"))


def test_values_have_the_types_of_the_fields() -> None:
    given = "--output x --title t --seconds 2 --kind salad --steps 3 4.5 --context-frames 4 --scale 1e-3 --wide"
    assert parse(given) == Cook(
        files=(),
        output=Path("x"),
        title="t",
        seconds=2.0,
        kind="salad",
        steps=(3.0, 4.5),
        policy=Inner(wide=True, context_frames=4, scale=1e-3),
    )


@pytest.mark.parametrize(
    "line", ["a b --output x", "--output x a b", "a --output x b", "--output x -- a b", "a --output x -- b"]
)
def test_positional_arguments_may_stand_anywhere(line: str) -> None:
    assert parse(line).files == (Path("a"), Path("b"))


def test_what_follows_two_dashes_is_left_alone() -> None:
    assert parse("--output x -- --kind_of -h --output=y -- z").files == tuple(
        map(Path, ["--kind_of", "-h", "--output=y", "--", "z"])
    )


@pytest.mark.parametrize("line", ["--context_frames 4", "--context_frames=4", "--context-frames=4"])
def test_an_option_may_be_written_as_its_field_is(line: str) -> None:
    assert parse(f"--output a_b {line}").policy.context_frames == 4
    assert parse("--title=a_b --output x").title == "a_b"


def test_a_negative_number_is_a_value() -> None:
    assert parse("--output x --scale -1.5").policy.scale == -1.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "missing --output FOLDER"),
        ("--output", "--output: expected one argument"),
        ("--output x --seconds long", "--seconds must be a number, got 'long'"),
        ("--output x --context-frames 1.5", "--context-frames must be an integer, got '1.5'"),
        ("--output x --kind cake", "--kind must be soup or salad, got 'cake'"),
        ("--output x --secnods 3", "unknown option --secnods; did you mean --seconds?"),
        ("--secnods=3", "unknown option --secnods; did you mean --seconds?"),
        ("--output x --sec 3", "unknown option --sec"),
        ("--output x --zzz", "unknown option --zzz"),
        ("--output x -q", "unknown option -q"),
        ("--output x --wide=yes", "--wide"),
    ],
)
def test_wrong_words_are_met_with_one_sentence(line: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse(line)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_every_missing_option_is_named() -> None:
    @dataclass(frozen=True)
    class Strict:
        one: int
        two: str
        three: Path

    with pytest.raises(UsageError, match="^missing --one N, --two TEXT and --three FILE$"):
        Parser(Strict, "strict").parse_command([])


def test_words_without_an_option_are_refused_where_there_is_no_place_for_them() -> None:
    with pytest.raises(UsageError, match="unexpected argument 'x'"):
        Parser(Inner, "inner").parse_command(["x"])
    with pytest.raises(UsageError, match="unexpected argument 'x'"):
        Parser(Inner, "inner").parse_command(["--", "x"])


def test_the_dataclass_may_refuse_too() -> None:
    with pytest.raises(ValueError, match="context_frames must be at least 1, got 0"):
        parse("--output x --context-frames 0")


def test_a_type_that_cannot_be_typed_is_a_mistake_of_the_command() -> None:
    @dataclass(frozen=True)
    class Odd:
        table: dict[str, int]

    with pytest.raises(TypeError, match="table must have a type"):
        Parser(Odd, "odd")


def help_of(columns: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    return Parser(Cook, "kitchen cook").format_help()


def test_help_shows_type_and_default_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(100, monkeypatch)
    for head in (
        "--output FOLDER (required)",
        "--title TEXT ",
        "--seconds SECONDS (30)",
        "--kind {soup|salad} (soup)",
        "--steps X... (1000 0.5)",
        "--context-frames N (9)",
        "--scale X ",
        "--wide ",
        "--rate X (0.0001)",
        "FILE...",
    ):
        assert f"  {head}" in text
    assert "None" not in text
    assert "Where it goes." in text
    assert "Default: 100% of it." in text


def test_help_has_groups_and_ends_with_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(100, monkeypatch)
    headings = [line for line in text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["arguments:", "what:", "policy:", "options:", "examples:"]
    assert (
        text.index("what:") < text.index("--title") < text.index("--output FOLDER (required)") < text.index("policy:")
    )
    assert text.index("policy:") < text.index("--wide") < text.index("options:") < text.index("--kind")
    assert text.endswith("examples:\n  kitchen cook --output a \\\n      x.txt\n")


@pytest.mark.parametrize("columns", [40, 60, 80, 100, 200])
def test_help_fits_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = help_of(columns, monkeypatch)
    assert max(map(len, text.splitlines())) <= min(columns, 100)
    assert text.isascii()


def test_help_is_printed_and_ends_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code in (0, None)
    assert capsys.readouterr().out == Parser(Cook, "kitchen cook").format_help()


def complete(line: str, tmp_path: Path) -> list[str]:
    """What bash offers for the last word of the line."""
    script = completion_script("kitchen", {"cook": (Cook, "cook something"), "clean": (Inner, "clean")}, "bash")
    last = line.count(" ")
    (tmp_path / "completion.sh").write_text(
        f'{script}\nCOMP_WORDS=({line})\nCOMP_CWORD={last}\n_shtab_kitchen\nprintf "%s\\n" "${{COMPREPLY[@]}}"\n'
    )
    done = subprocess.run(["bash", tmp_path / "completion.sh"], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


def test_tab_completes_commands_options_and_values(tmp_path: Path) -> None:
    assert complete("kitchen c", tmp_path) == ["cook", "clean"]
    assert complete("kitchen cook --out", tmp_path) == ["--output"]
    assert complete("kitchen clean --cont", tmp_path) == ["--context-frames"]
    assert complete("kitchen cook --kind s", tmp_path) == ["soup", "salad"]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_complete_too(shell: str) -> None:
    assert "cook" in completion_script("kitchen", {"cook": (Cook, "cook something")}, shell)


def test_an_unknown_shell_is_refused() -> None:
    with pytest.raises(UsageError, match="--print-completion must be bash, zsh.* got 'dos'"):
        completion_script("kitchen", {}, "dos")


def test_argparse_gives_no_format_to_a_per_cent_sign() -> None:
    parser = Parser(Inner, "inner")
    assert "100% of it" in argparse.ArgumentParser.format_help(parser)
