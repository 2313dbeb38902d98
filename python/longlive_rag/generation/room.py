"""Whether a machine has the room for keys and values that a video needs, or that it was begun with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from longlive_rag.budget import Budget, available_host_bytes, format_bytes
from longlive_rag.config import RetrievalConfig
from longlive_rag.generation.journal import Journal


def check_room(given: Budget, device: torch.device, config: RetrievalConfig, frame_bytes: int) -> None:
    """Refuse a device that cannot hold the context of a block.

    Args:
        given: the budget.
        frame_bytes: of the keys and values of a latent frame on the device.

    Raises:
        ValueError: it cannot.
    """
    if given.device is not None:
        room, name = given.device, "budget.device"
    elif device.type == "cuda":
        room, name = torch.cuda.mem_get_info(device)[0], f"the free memory of {device}"
    else:
        return
    context = config.context_frames
    if room < context * frame_bytes:
        raise ValueError(
            f"{name} must hold the keys and values of context_frames = {context} latent frames, "
            f"{format_bytes(context * frame_bytes)} or {format_bytes(frame_bytes)} for each, got "
            f"{format_bytes(room)}; choose a smaller context or video size"
        )


def whole_budget(budget: Budget, ranks: int) -> Budget:
    """The budget of all ranks of a video together, which holds the same frames on any number of ranks."""
    return _sized(budget, lambda size: size * ranks)


def budget_to_go_on(
    journal: Journal,
    given: Budget,
    device: torch.device,
    on_device: int,
    below: int,
    ranks: int = 1,
    sharing: int = 1,
) -> Budget:
    """The budget given, where it is to be measured with what was measured when the video was begun.

    Args:
        journal: of the video, open; gets a remark if the budget was changed by hand. Its budgets are `whole_budget`s.
        given: the budget now, of each rank.
        on_device, below: bytes of the keys and values of the whole video on the device of each rank and below it.
        ranks: that make the video now.
        sharing: those of them that share this machine's host memory.

    Raises:
        ValueError: what was measured then is not available now.
    """
    begun = None if journal.budget is None else _sized(journal.budget, lambda size: size // ranks)
    if begun is None or begun.device is None:
        return given  # nothing has left the device
    sizes = [(name, getattr(begun, name), getattr(given, name)) for name in ("device", "host", "disk")]
    changed = [
        f"{name} {format_bytes(before)}, now {format_bytes(now)}"
        for name, before, now in sizes
        if now not in (None, before)
    ]
    if changed:
        journal.remarks.append(f"Other frames may be forgotten or come back otherwise: {'; '.join(changed)}")
    if given.device is None and device.type == "cuda":
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        _check_as_begun(journal, "device", begun.device, torch.cuda.mem_get_info(device)[0] + reusable)
    if given.host is None and on_device > begun.device:
        _check_as_begun(journal, "host", min(begun.host_bytes, below), available_host_bytes() // sharing)
    return replace(given, **{name: before for name, before, now in sizes if now is None})


def _sized(budget: Budget, change: Callable[[int], int]) -> Budget:
    device, host = (None if size is None else change(size) for size in (budget.device, budget.host))
    return replace(budget, device=device, host=host, disk=change(budget.disk))


def _check_as_begun(journal: Journal, name: str, needed: int, available: int) -> None:
    if needed > available:
        raise ValueError(
            f"{journal.video.name} was begun with room for {format_bytes(needed)} of keys and values in {name} memory, "
            f"and now {format_bytes(available)} are available there: free some to get the video that was begun, or set "
            f"budget.{name} (--{name}-memory) and other frames may be forgotten"
        )
