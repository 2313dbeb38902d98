"""A check in a process of its own, so that a hang or an illegal address ends that process and nothing else."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

import torch

from longlive_rag.checking.variants import VARIANTS
from longlive_rag.checking.verdicts import Verdict

START_SECONDS, CASE_SECONDS = 120.0, 30.0
"""How long a process may take until its first case, for Python, torch and CUDA, and how long for each case."""
CHILD = (sys.executable, "-m", "longlive_rag.checking")
SWITCH = "LONGLIVE_RAG_CHECK"
"""Environment variable; "0": kernels are used without being checked, as they are inside a check."""


def check(
    name: str,
    device: torch.device,
    *,
    thorough: bool = False,
    case_seconds: float = CASE_SECONDS,
    command: Sequence[str] = CHILD,
) -> Verdict:
    """Check one variant against the reference. Does not raise, whatever the kernel does.

    Args:
        name: of `VARIANTS`.
        thorough: real sizes too.
        case_seconds: a case that takes longer counts as hung.
        command: what to start; the tests put doubles here.
    """
    arguments = [*command, name, "--device", str(device), *(["--thorough"] if thorough else [])]
    variables = {**os.environ, **VARIANTS[name].environment, SWITCH: "0"}
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            arguments, env=variables, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints
        )
        said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        # The reader ends with the process; it must not keep this one alive where a hung GPU holds on to the child.
        threading.Thread(target=_listen, args=(process, said), daemon=True).start()
        begun, passed, finished = "", 0, False
        while True:
            limit = case_seconds if begun else START_SECONDS
            try:
                entry = said.get(timeout=limit)
            except queue.Empty:
                process.kill()
                return Verdict("hung", f"no end after {limit:g} s, {_where(begun)}", thorough)
            if entry is None:
                break
            if "limit" in entry:
                if not entry["error"] <= entry["limit"]:  # true for NaN
                    process.kill()
                    detail = f"error {entry['error']:.2e}, limit {entry['limit']:.2e}, {_where(begun)}"
                    return Verdict("wrong", detail, thorough)
                passed += 1
            begun = entry.get("begun", begun)
            finished = finished or "finished" in entry
        status = process.wait()
        complaints.seek(0)
        last = complaints.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
    if status or not finished:
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        return Verdict("crashed", f"{how}, {_where(begun)}: {last[0][:300]}", thorough)
    return Verdict("passed", f"{passed} cases", thorough)


def _listen(process: subprocess.Popen[bytes], said: queue.Queue[dict[str, Any] | None]) -> None:
    """Pass on what the child says, a JSON object a line, and None at its end; whatever else is printed is skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            said.put(entry)
    said.put(None)


def _where(begun: str) -> str:
    return f"in {begun}" if begun else "before the first case"
