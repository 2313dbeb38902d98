"""The command line `longlive-rag`: finds the command, imports that module alone, and turns errors into one line."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import longlive_rag

PROGRAM = "longlive-rag"


class Command(NamedTuple):
    module: str
    class_name: str
    summary: str


COMMANDS = {
    "info": Command("longlive_rag.commands.info", "Info", "versions, and whether a GPU can be used"),
    "demo": Command("longlive_rag.commands.demo", "Demo", "the same long video under every context policy, on a CPU"),
    "generate": Command("longlive_rag.commands.generate", "Generate", "long videos from a checkpoint and prompts"),
    "run": Command("longlive_rag.commands.run", "Run", "a script of your own, with its model patched"),
    "corpus": Command("longlive_rag.commands.corpus", "Corpus", "latents to train the retrieval autoencoder on"),
    "train": Command("longlive_rag.commands.train", "Train", "train the retrieval autoencoder"),
    "evaluate": Command("longlive_rag.commands.evaluate", "Evaluate", "drift of each of several videos"),
    "bench": Command("longlive_rag.commands.bench", "Bench", "how fast the operations are, and their limits"),
}

# Packages that come with an extra: missing, they are the user's choice and no fault of the installation.
_EXTRAS = {"diffusers": "wan", "ftfy": "wan", "transformers": "wan", "tensorboard": "tensorboard"}


class _Runnable(Protocol):
    def run(self) -> int: ...


class _UsageError(Exception):
    """The arguments do not parse; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Wrong use (bad arguments; ValueError, TypeError or OSError from the command) is told in one line on stderr and gives
    2, an interrupt gives 130. Anything else is a fault of this package and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_overview())
        return 0
    if name == "--version":
        print(f"{PROGRAM} {longlive_rag.__version__}")
        return 0
    if name not in COMMANDS:
        return _fail(PROGRAM, f"unknown command {name!r}; expected one of {', '.join(COMMANDS)}")
    program = f"{PROGRAM} {name}"
    try:
        status = _parse(COMMANDS[name], program, arguments[1:]).run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader of our output has gone (`longlive-rag ... | head`). Python flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except _UsageError as error:
        return _fail(program, f"{error} (see {program} --help)")
    except OSError as error:
        return _fail(
            program, f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        )
    except (ValueError, TypeError) as error:
        return _fail(program, str(error))
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        return _fail(program, f"{error.name} is not installed; pip install 'longlive_rag[{_EXTRAS[error.name]}]'")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [OPTIONS]",
            "",
            "Long videos from autoregressive diffusion models, with retrieval memory.",
            "",
            "commands:",
            *lines,
            "",
            f"{PROGRAM} COMMAND --help shows the options of one; {PROGRAM} --version the version.",
        ]
    )


def _fail(program: str, message: str) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _parse(command: Command, program: str, arguments: list[str]) -> _Runnable:
    import tyro

    options = getattr(importlib.import_module(command.module), command.class_name)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            parsed: _Runnable = tyro.cli(options, prog=program, args=arguments, config=(tyro.conf.FlagCreatePairsOff,))
            return parsed
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _UsageError(_condense(complaint.getvalue(), program)) from None


def _condense(box: str, program: str) -> str:
    """The sentence in the box that tyro draws around a complaint.

    Under its title a box has sections between rules: the complaint, at times a suggestion, then help. Where the
    terminal cannot show a frame there are spaces in its place.
    """
    sections: list[list[str]] = [[]]
    for row in box.splitlines():
        text = row[2:].rstrip(" │")
        is_help = text.startswith(" " * 8)
        if row.startswith("╭") or (text and set(text) <= {"─", "-"}):
            sections.append([])
        elif text and not is_help:
            sections[-1].append(text.strip())
    _title, complaint, *others = sections
    suggestions = [section for section in others if section and section[0].startswith("Perhaps you meant")]
    message = "; ".join(" ".join(section) for section in [complaint, *suggestions])
    message = message.replace(f"Missing from {program}:", "missing").replace("; P", "; p")
    message = re.sub(r" ([.,:;])", r"\1", message).rstrip(".")  # a wrapped line may begin with its full stop
    return message[:1].lower() + message[1:]
