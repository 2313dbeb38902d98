"""Runs the parts of `gpu_plan` on a machine with an NVIDIA GPU, or rehearses them on one without.

Uses the standard library only, since the package is not built yet when it starts. Called by `on_gpu.sh`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

from gpu_plan import BUILD, CARRIED, FIGURES, GROUPS, PARTS, PYTHON, SITE, Step
from gpu_summary import figures_of, goals, summary

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "on_gpu"
REHEARSAL = Path(__file__).resolve().parent / "rehearsal"
EMULATOR = Step("emulator", (PYTHON, "-m", "longlive_rag", "--version"), 900)
"""Compiles the emulated kernels, which a rehearsal runs."""
TAIL = 40
"""Last lines of a failed step that the results keep."""
GRACE = 5
"""Seconds between an interrupt and the kill of a step that has reached its limit."""


class Results:
    """`results.json`, written after each step, with `summary.md` and `log.txt` beside it."""

    def __init__(self, folder: Path, machine: dict[str, str], *, rehearsal: bool) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        # What was found with other sources, on another GPU or under another driver is no result of this machine.
        self.steps: dict[str, Any] = before["steps"] if before.get("machine", {}).get("key") == machine["key"] else {}
        self.machine, self.rehearsal = machine, rehearsal

    def passed(self, name: str) -> bool:
        return self.steps.get(name, {}).get("outcome") in ("passed", "left out")

    def add(self, name: str, result: dict[str, Any]) -> None:
        self.steps[name] = result
        everything = {"rehearsal": self.rehearsal, "machine": self.machine, "steps": self.steps}
        partial = self.folder / "results.json.partial"
        partial.write_text(json.dumps(everything, indent=1) + "\n")
        partial.replace(self.folder / "results.json")
        (self.folder / "summary.md").write_text(summary(everything))


class Runner:
    """Runs steps and keeps their results.

    Args:
        results: where to.
        rehearsal: on the stand-ins of benchmarks/rehearsal in place of a GPU.
        log: gets all output.
    """

    def __init__(self, results: Results, *, rehearsal: bool, log: TextIO) -> None:
        self.results, self.rehearsal, self.log = results, rehearsal, log
        self.work = WORK / "rehearsal" if rehearsal else WORK
        self.site = self.work / "site"
        self.hopper = results.machine["capability"] == "9.0"
        self._subcommands: str | None = None

    def built(self) -> bool:
        """Whether the package of these sources is there: a fresh machine has the results, but not the build."""
        stamp = self.site / "built_for"
        return stamp.exists() and stamp.read_text() == self.results.machine["key"]

    def build(self) -> bool:
        """Build and install the package from source; whether that succeeded."""
        shutil.rmtree(self.site, ignore_errors=True)
        steps = {"build: build": BUILD, **({"build: emulator": EMULATOR} if self.rehearsal else {})}
        if not all(self.run(name, step) for name, step in steps.items()):
            return False
        (self.site / "built_for").write_text(self.results.machine["key"])
        return True

    def run(self, name: str, step: Step) -> bool:
        """Run a step and keep its result; whether it passed."""
        reason = self._reason_to_leave_out(step)
        if reason is not None:
            self.say(f"=== {name}: left out, {reason}")
            self.results.add(name, {"outcome": "left out", "reason": reason, "limit": step.limit})
            return True
        missing = [package for package in step.needs if importlib.util.find_spec(package) is None]
        if missing:
            carry = "; benchmarks/README.md says how to carry it as a wheel" if set(missing) <= set(CARRIED) else ""
            return self._failed(name, step, f"not installed: {', '.join(missing)}{carry}")
        figures = self.work / "figures.json"
        figures.unlink(missing_ok=True)
        python = [sys.executable, str(REHEARSAL / "python.py")] if self.rehearsal else [sys.executable]
        values = {FIGURES: [str(figures)], SITE: [str(self.site)], PYTHON: python}
        if step is BUILD:
            values[PYTHON] = [sys.executable]
        command = [word for item in step.command for word in values.get(item, [item])]
        self.say(f"=== {name}, at most {step.limit} s: {shlex.join(command)}")
        begun = time.monotonic()
        status, tail = self._run(command, step)
        seconds = round(time.monotonic() - begun, 1)
        outcome = "passed" if status == 0 else "timed out" if status is None else "failed"
        self.say(f"=== {name}: {outcome} after {seconds} s")
        result: dict[str, Any] = {"outcome": outcome, "seconds": seconds, "limit": step.limit, "status": status}
        result["said"] = tail[-1] if tail else ""
        if outcome != "passed":
            result["tail"] = tail
        if figures.exists():
            result["figures"] = json.loads(figures.read_text())
        self.results.add(name, result)
        return outcome == "passed"

    def say(self, text: str) -> None:
        print(text, flush=True)
        print(text, file=self.log, flush=True)

    def _failed(self, name: str, step: Step, reason: str) -> bool:
        self.say(f"=== {name}: failed, {reason}")
        self.results.add(name, {"outcome": "failed", "reason": reason, "limit": step.limit})
        return False

    def _reason_to_leave_out(self, step: Step) -> str | None:
        if step.hopper and not self.hopper:
            return "for compute capability 9.0 only"
        if step.subcommand is not None and step.subcommand not in self._known_subcommands():
            return f"this version has no command {step.subcommand}"
        return None

    def _known_subcommands(self) -> list[str]:
        if self._subcommands is None:
            command = [sys.executable, "-m", "longlive_rag", "--help"]
            done = subprocess.run(command, cwd=ROOT, env=self._environment({}), capture_output=True, text=True)
            self._subcommands = done.stdout
        return re.findall(r"^  ([\w-]+)  ", self._subcommands, re.MULTILINE)

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        architecture = self.results.machine["capability"].replace(".", "")
        environment = {
            **os.environ,
            "CUDAARCHS": f"{architecture}{'a' if self.hopper else ''}-real",
            "CUDAFLAGS": "-lineinfo",  # changes no instruction; the sanitizer and profilers name lines
            "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()),
            "LONGLIVE_RAG_CUDA": "OFF" if self.rehearsal else "ON",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "HF_HUB_OFFLINE": "1",
            # Nothing may take the place of a kernel that is to be tested or measured.
            "LONGLIVE_RAG_CHECK": "0",
            "LONGLIVE_RAG_ATTEND": "auto",
        }
        if self.rehearsal:
            environment["PATH"] = f"{REHEARSAL / 'bin'}{os.pathsep}{environment['PATH']}"
            environment["XDG_CACHE_HOME"] = str(self.work / "cache")  # verdicts on kernels
        return {**environment, **more}

    def _run(self, command: list[str], step: Step) -> tuple[int | None, list[str]]:
        """Exit status, or None if it reached its limit, and the last lines that it wrote."""
        tail: deque[str] = deque(maxlen=TAIL)
        try:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=self._environment(step.environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                preexec_fn=os.setpgrp,  # a group of its own, to be stopped whole; not a session, which might outlive us
            )
        except OSError as error:
            return 127, [str(error)]

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                self.say(line.rstrip("\n"))
                if line.strip():
                    tail.append(line.rstrip("\n"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        status: int | None = None
        try:
            status = process.wait(step.limit)
        except subprocess.TimeoutExpired:
            for stop, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
                os.killpg(process.pid, stop)
                try:
                    process.wait(wait)
                    break
                except subprocess.TimeoutExpired:
                    pass  # after SIGKILL it hangs in the driver; leave it behind
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        reader.join(GRACE)
        return status, list(tail)


def machine_facts(rehearsal: bool) -> dict[str, str]:
    """What a result belongs to.

    Raises:
        RuntimeError: there is no NVIDIA GPU.
    """
    smi = str(REHEARSAL / "bin" / "nvidia-smi") if rehearsal else "nvidia-smi"
    query = [smi, "--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
        device, capability, driver, memory = (value.strip() for value in answer.strip().split(","))
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"nvidia-smi finds no NVIDIA GPU ({error}); --rehearse needs none") from None
    facts = {
        "device": device,
        "capability": capability,
        "memory": memory,
        "driver": driver,
        "cuda": _first(r"release ([\d.]+)", _output("nvcc", "--version")),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "commit": _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12") or "unknown",
        "sources": sources_digest(),
    }
    return {**facts, "key": ", ".join(facts[name] for name in ("sources", "device", "driver", "torch"))}


def sources_digest() -> str:
    """Of all that a result depends on; where the tree was copied without its history, the commit is not known."""
    digest = hashlib.sha256()
    folders = ("csrc", "python", "tests", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h", ".sh"}
    builds = [ROOT / "CMakeLists.txt", ROOT / "csrc" / "cuda" / "CMakeLists.txt", ROOT / "pyproject.toml"]
    for path in sorted([*builds, *(f for f in files if f.suffix in kinds)]):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else "unknown"


def parser() -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(
        prog="on_gpu.sh",
        description="Proof and measurement on a machine with an NVIDIA GPU, in parts of less than ten minutes. "
        "A step that fails does not stop the others; the exit status is the number of failed steps.",
    )
    arguments.add_argument("part", nargs="?", choices=[*PARTS, *GROUPS], metavar="PART", help="see --list")
    arguments.add_argument(
        "results", nargs="?", type=Path, metavar="RESULTS_FOLDER", help="default benchmarks/results/<name of the GPU>"
    )
    arguments.add_argument("--again", action="store_true", help="also what has passed here with these sources")
    arguments.add_argument(
        "--within", type=float, metavar="SECONDS", help="begin no step that may end later than this; call again for it"
    )
    arguments.add_argument("--rehearse", action="store_true", help="on stand-ins for a GPU, at tiny sizes")
    arguments.add_argument("--list", action="store_true", help="the parts, and what they need")
    return arguments


def listing() -> str:
    width = max(map(len, PARTS))
    lines = [f"{name:{width}}  {part.limit:3d} s  {part.purpose}" for name, part in PARTS.items()]
    lines += [f"{name:{width}}         {' '.join(parts)}" for name, parts in GROUPS.items()]
    return "\n".join([*lines, "", f"The first part on a machine also builds the package, at most {BUILD.limit} s."])


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.list:
        print(listing())
        return 0
    if options.part is None:
        parser().error("give a part; --list names them")
    begun = time.monotonic()
    try:
        machine = machine_facts(options.rehearse)
    except RuntimeError as error:
        print(f"on_gpu.sh: {error}", file=sys.stderr)
        return 2
    named = re.sub(r"[^a-z0-9]+", "_", machine["device"].lower()).strip("_")
    default = WORK / "rehearsal" / "results" if options.rehearse else ROOT / "benchmarks" / "results" / named
    results = Results(options.results or default, machine, rehearsal=options.rehearse)
    wanted = [
        (f"{part}: {step.name}", step)
        for part in GROUPS.get(options.part, (options.part,))
        for step in PARTS[part].steps
    ]
    failed = left = 0
    with (results.folder / "log.txt").open("a") as log:
        runner = Runner(results, rehearsal=options.rehearse, log=log)
        runner.say(f"=== {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC: {machine['key']}")

        def fits(step: Step) -> bool:
            return options.within is None or time.monotonic() - begun + step.limit <= options.within

        todo = [(name, step) for name, step in wanted if options.again or not results.passed(name)]
        if todo and not runner.built():
            if not fits(BUILD):
                runner.say(f"=== the build may take {BUILD.limit} s, more than --within allows")
                return 1
            if not runner.build():
                return 1
        for name, step in todo:
            if fits(step):
                failed += not runner.run(name, step)
            else:
                left += 1
        runner.say(
            f"=== {len(wanted) - len(todo)} steps had passed before, {len(todo) - failed - left} passed now, "
            f"{failed} failed, {left} left for another call; {results.folder / 'summary.md'}"
        )
        if options.rehearse and options.part == "all" and not left:
            without = [goal.what for goal, figure in goals(figures_of({"steps": results.steps})) if figure is None]
            if without:
                runner.say(f"=== the summary finds no figure for: {'; '.join(without)}")
                failed += 1
    return min(failed, 100)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`, which stops the step at hand
    sys.exit(main())
