"""The command line `longlive-rag`: finds the command, imports that module alone, and turns errors into one line."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import longlive_rag
from longlive_rag.commands.info import EXTRAS
from longlive_rag.options import Parser, UsageError, completion_script

PROGRAM = "longlive-rag"


class Command(NamedTuple):
    module: str
    class_name: str
    summary: str
    purpose: str
    """Heading that it is listed under."""

    def load(self) -> type:
        """Import the command, which may take as long as importing torch."""
        command: type = getattr(importlib.import_module(self.module), self.class_name)
        return command


COMMANDS = {
    "info": Command(
        "longlive_rag.commands.info", "Info", "what is installed, and whether a GPU can be used", "start here"
    ),
    "check": Command("longlive_rag.commands.check", "Check", "whether the kernels are right on this GPU", "start here"),
    "demo": Command(
        "longlive_rag.commands.demo", "Demo", "one long video under every context policy, on any machine", "start here"
    ),
    "serve": Command(
        "longlive_rag.commands.serve", "Serve", "a video that grows while you watch and steer it", "start here"
    ),
    "plan": Command(
        "longlive_rag.commands.plan",
        "Plan",
        "what a GPU has room for, and what moves while a video grows",
        "make videos",
    ),
    "generate": Command(
        "longlive_rag.commands.generate", "Generate", "long videos from a checkpoint and your prompts", "make videos"
    ),
    "run": Command("longlive_rag.commands.run", "Run", "your own inference script, with memory added", "make videos"),
    "corpus": Command(
        "longlive_rag.commands.corpus", "Corpus", "latents to train on", "train the retrieval autoencoder"
    ),
    "train": Command(
        "longlive_rag.commands.train", "Train", "train it, or compare trained ones", "train the retrieval autoencoder"
    ),
    "evaluate": Command("longlive_rag.commands.evaluate", "Evaluate", "how far videos drift", "measure"),
    "vbench": Command(
        "longlive_rag.commands.vbench", "Vbench", "videos for VBench-Long, and its results as a table", "measure"
    ),
    "bench": Command("longlive_rag.commands.bench", "Bench", "how fast the operations run here", "measure"),
    "bench-memory": Command(
        "longlive_rag.commands.bench_memory", "BenchMemory", "which memory keeps a long video true to itself", "measure"
    ),
}

_SENTENCE = "Long videos from autoregressive diffusion models, with retrieval memory."

_GREETING = f"""\
{_SENTENCE}

Three commands to begin with:
  {PROGRAM} info                 what is installed, and what is missing
  {PROGRAM} demo --output demo   a first long video, on any machine
  {PROGRAM} generate --help      how to make videos from your own prompts

{PROGRAM} --help lists all commands."""

_ALSO = f"""
also:
  {PROGRAM} COMMAND --help                  options and examples of a command
  {PROGRAM} --print-completion bash > FILE  tab completion; also zsh, tcsh
  {PROGRAM} --version                       the version"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    Wrong use (bad arguments; ValueError, TypeError or OSError from the command) is told in one line on stderr and gives
    2, an interrupt gives 130. Anything else is a fault of this package and keeps its traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    name = arguments[0] if arguments else ""
    program = f"{PROGRAM} {name}" if name in COMMANDS else PROGRAM
    try:
        try:
            return _command(name, program, arguments[1:])
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output has gone (`longlive-rag ... | head`). Python flushes stdout again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    except UsageError as error:
        return _fail(program, f"{error} (see {program} --help)")
    except OSError as error:
        return _fail(
            program, f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        )
    except (ValueError, TypeError) as error:
        return _fail(program, str(error))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return _fail(program, f"{error.name} is not installed; pip install 'longlive_rag[{EXTRAS[error.name]}]'")


def _command(name: str, program: str, arguments: list[str]) -> int:
    if name in COMMANDS:
        status: int = Parser(COMMANDS[name].load(), program).parse_command(arguments).run()
        return status
    if name == "":
        print(_GREETING)
    elif name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"{PROGRAM} {longlive_rag.__version__}")
    elif name == "--print-completion":
        commands = {each: (command.load(), command.summary) for each, command in COMMANDS.items()}
        print(completion_script(PROGRAM, commands, arguments[0] if arguments else ""))
    else:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(COMMANDS)}"
        raise UsageError(f"unknown {'option' if name.startswith('-') else 'command'} {name!r}; {hint}")
    return 0


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"usage: {PROGRAM} COMMAND [OPTIONS]", "", _SENTENCE]
    for purpose in dict.fromkeys(command.purpose for command in COMMANDS.values()):
        lines += ["", f"{purpose}:"]
        lines += [
            f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items() if command.purpose == purpose
        ]
    return "\n".join([*lines, _ALSO])


def _fail(program: str, message: str) -> int:
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    return 2
