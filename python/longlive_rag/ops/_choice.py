"""Which implementation of attend runs: the one place that knows the devices, the switch and what was checked."""

from __future__ import annotations

import os
from typing import Literal, get_args

import torch

from longlive_rag import native
from longlive_rag.checking import trust

SWITCH = "LONGLIVE_RAG_ATTEND"
"""Environment variable that forces an implementation; "auto", the default, takes the best that can be trusted."""
Switch = Literal["auto", "hopper", "ampere", "portable", "reference"]
_SWITCHES = frozenset(get_args(Switch))

_chosen: dict[tuple[torch.device, str], str | None] = {}

PORTABLE_IS_FASTER = {10}
"""Major compute capabilities where PyTorch's attention is preferred to our kernels: on sm_100 the instructions of the
kernel for sm_80 reach about a third of the chip (a prediction from its matrix rates, not a measurement)."""


def switch() -> str:
    """The value of `LONGLIVE_RAG_ATTEND`.

    Raises:
        ValueError: it is none of the values allowed.
    """
    value = os.environ.get(SWITCH, "auto")
    if value not in _SWITCHES:
        raise ValueError(f"{SWITCH} must be one of {', '.join(get_args(Switch))}, got {value!r}")
    return value


def attend_kernel(device: torch.device, runs: str) -> str | None:
    """The kernel of attend to launch on a device that has kernels, "sm80" or "sm90"; None: PyTorch's attention instead.

    A dictionary look-up once the choice has been made: the environment is not asked again.

    Args:
        runs: which kernel the extension would launch for the call at hand. On its own it prefers sm_90a.
    """
    if (device, runs) in _chosen:
        return _chosen[device, runs]
    kernel = _choose(device, runs)
    if not trust.cannot_check(device):
        _chosen[device, runs] = kernel
    return kernel


def forget() -> None:
    """Choose again, and ask again what can be trusted: after a check, or in a test."""
    _chosen.clear()
    trust.forget()


def _choose(device: torch.device, runs: str) -> str | None:
    wanted = switch()
    if wanted in ("portable", "reference"):
        return None
    if wanted == "ampere":
        return "sm80"
    if wanted == "hopper":
        return "sm90"
    capability = native.capability(device)
    if capability is not None and capability[0] in PORTABLE_IS_FASTER:
        return None
    if runs == "sm90" and trust.trusted("attend-hopper", device):
        return "sm90"
    return "sm80" if trust.trusted("attend-ampere", device) else None


def attend_is_portable(dtype: torch.dtype) -> bool:
    """Whether a call without a kernel goes to PyTorch's attention in its own dtype; else to the definition, in float32
    or wider, which float64 asks for."""
    return switch() != "reference" and dtype is not torch.float64
