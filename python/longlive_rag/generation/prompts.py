"""What is asked for: prompts that may change along a video, from the command line and from files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_CHANGE = re.compile(r"(?:^|\s)@(\d+(?:\.\d+)?)s(?:\s|$)")
"""Between two prompts of a line: a word like @10s or @2.5s."""
_SECONDS = re.compile(r"(\d+(?:\.\d+)?)s?")


@dataclass(frozen=True)
class Script:
    """The prompts of one video.

    Raises:
        ValueError: a prompt is empty, or the times do not rise from above 0.
    """

    prompt: str
    """From the beginning."""
    changes: tuple[tuple[float, str], ...] = ()
    """Second from which on another prompt holds, and that prompt."""

    def __post_init__(self) -> None:
        if not all(self.texts):
            raise ValueError("prompt must hold a prompt, got none" + (" at a change" if self.prompt else ""))
        before = 0.0
        for seconds, _ in self.changes:
            if seconds <= before:
                raise ValueError(f"prompts must change at rising times above 0, got {seconds:g}s after {before:g}s")
            before = seconds

    @property
    def texts(self) -> list[str]:
        return [self.prompt, *(text for _, text in self.changes)]


@dataclass(frozen=True)
class PromptVideo:
    """A script and where its video goes."""

    script: Script
    path: Path


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line; empty lines are skipped.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts must be a UTF-8 text file, got {path}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"prompts must hold at least one prompt, got none in {path}")
    return prompts


def read_scripts(path: Path) -> list[Script]:
    """Read one script per line, ``first prompt @10s next prompt @20s ...``; empty lines are skipped.

    Raises:
        OSError, ValueError: as `read_prompts`; or a line is no script.
    """
    scripts = []
    for line in read_prompts(path):
        first, *rest = _CHANGE.split(line)
        times, texts = rest[::2], rest[1::2]
        changes = tuple((float(time), text.strip()) for time, text in zip(times, texts, strict=True))
        try:
            scripts.append(Script(first.strip(), changes))
        except ValueError as error:
            raise ValueError(f"{error}, in the line {line[:60]!r} of {path}") from None
    return scripts


def script_of(prompt: str, prompt_at: Sequence[str]) -> Script:
    """A script from what was typed.

    Args:
        prompt_at: in turn a time, as 10s, and the prompt from then on.

    Raises:
        ValueError: there are not as many times as prompts, or one of them is no time; or as `Script`.
    """
    times, texts = prompt_at[::2], prompt_at[1::2]
    for time in times:
        if not _SECONDS.fullmatch(time):
            raise ValueError(
                f"prompt_at takes a time and a prompt in turn, as 10s 'a dog runs', got {time!r} for a time"
            )
    if len(times) != len(texts):
        raise ValueError(f"prompt_at takes a time and a prompt in turn, got no prompt after {times[-1]!r}")
    changes = zip((float(time.removesuffix("s")) for time in times), (text.strip() for text in texts), strict=True)
    return Script(prompt.strip(), tuple(changes))


def enumerate_videos(scripts: Sequence[Script], output: Path) -> Iterator[PromptVideo]:
    """Name each script's video by its number and its first words."""
    for index, script in enumerate(scripts):
        words = re.sub(r"[^a-z0-9]+", "-", script.prompt.lower()).strip("-")[:48].rstrip("-")
        yield PromptVideo(script, output / f"{'-'.join(filter(None, (f'{index:04d}', words)))}.mp4")
