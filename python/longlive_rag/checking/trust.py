"""The question that the operations ask before they launch a kernel: has it been found right on this machine?"""

from __future__ import annotations

import logging
import os

import torch

from longlive_rag.checking import isolated, verdicts
from longlive_rag.checking.variants import VARIANTS
from longlive_rag.checking.verdicts import Verdict

logger = logging.getLogger("longlive_rag")

_known: dict[tuple[str, torch.device], bool] = {}


def trusted(name: str, device: torch.device) -> bool:
    """Whether a variant may be used on a device; a dictionary look-up after the first time.

    The first time on a machine without a verdict, a quick check runs in a process of its own (seconds), unless
    ``LONGLIVE_RAG_CHECK=0``. Under graph capture and inside a torch.compile trace nothing is checked, and the kernel is
    used as it is. What failed is not used, which is said once.
    """
    answer = _known.get((name, device))
    if answer is not None:
        return answer
    if os.environ.get(isolated.SWITCH) == "0" or cannot_check(device):
        return True
    verdict = verdicts.read(device).get(name)
    if verdict is None:
        logger.info("checking %s on %s, once for this machine; LONGLIVE_RAG_CHECK=0 skips it", name, device)
        verdict = isolated.check(name, device)
        verdicts.write(device, {name: verdict})
    if not verdict.trusted:
        logger.warning("%s", complaint(name, device, verdict))
    _known[name, device] = verdict.trusted
    return verdict.trusted


def cannot_check(device: torch.device) -> bool:
    """Whether the device's stream is being captured, or torch.compile traces: then a check would be part of it."""
    return torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def complaint(name: str, device: torch.device, verdict: Verdict) -> str:
    """One warning: what failed, what is used instead, and what to do."""
    how = {"wrong": "gave a wrong result", "crashed": "crashed", "hung": "did not end"}[verdict.status]
    return (
        f"the kernel {name} {how} on {device} ({verdict.detail}); {VARIANTS[name].instead} is used instead, which is "
        f"slower. Please report it with the file that `longlive-rag check --report FILE` writes."
    )


def forget() -> None:
    """Ask again: after a check, or in a test."""
    _known.clear()
