"""What keeps the ranks of a video in agreement: the same arguments, the same choice of frames, the same latents."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from longlive_rag.budget import Budget
from longlive_rag.index import LatentIndex
from longlive_rag.models.sizes import TransformerSizes
from longlive_rag.parallel.shards import Shards
from longlive_rag.ranks import from_all
from longlive_rag.selection import Request, Selection, SimilaritySelection

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_same(shards: Shards, **values: object) -> None:
    """
    Raises:
        ValueError: a rank was given another value than the first one; the message names both.
    """
    said = from_all({name: repr(value) for name, value in values.items()}, shards.group)
    for rank, others in enumerate(said):
        for name, value in said[0].items():
            if others[name] != value:
                raise ValueError(
                    f"{name} must be the same on all ranks, got {value} on rank 0, {others[name]} on {rank}"
                )


def shared_budget(budget: Budget | None, shards: Shards, device: torch.device) -> Budget:
    """The budget of each rank, the same on all, so that they keep and forget the same frames.

    What is measured is the least that any rank finds; ranks on one machine share its memory.

    Raises:
        ValueError: frames are to be rebuilt, which all ranks do together, but how many stay on a GPU is not said.
    """
    budget = budget or Budget()
    if budget.rebuild and budget.device is None and device.type == "cuda":
        raise ValueError("budget.device must be given with budget.rebuild and several ranks, got None")
    if budget.host is not None:
        return budget
    found = from_all((socket.gethostname(), budget.host_bytes), shards.group)
    machines = [machine for machine, _ in found]
    return replace(budget, host=min(size // machines.count(machine) for machine, size in found))


class ShardSizes:
    """What a memory must know of a transformer of which it holds a share of the heads."""

    def __init__(self, model: TransformerSizes, shards: Shards) -> None:
        self._model = model
        self.num_layers, self.num_heads, self.head_dim = model.num_layers, shards.heads, model.head_dim

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._model.parameters()

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        return self._model.token_grid(height, width)


class SharedSelection:
    """The first rank's choice, on all ranks.

    Args:
        selection: default the most similar frames. Every rank runs it, so that one that fails fails everywhere.
    """

    def __init__(self, selection: Selection | None, shards: Shards) -> None:
        self._selection, self._shards = selection or SimilaritySelection(), shards

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        frames, similarity = (part.contiguous() for part in self._selection.select(request, index))
        for part in (frames, similarity):
            dist.broadcast(part, self._shards.first_rank, group=self._shards.group)
        return frames, similarity


class Agreement:
    """Compares a finished block's latents, and the number of frames forgotten, on all ranks, a block later: by then
    they have long arrived, and nobody waits."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._said: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def note(self, start: int, latents: Tensor, forgotten: int) -> None:
        """Send what is to be compared of the block at `start`."""
        bits = latents.contiguous().view(_INTEGERS[latents.itemsize])
        digest = bits.sum(dtype=torch.int64)
        own = torch.stack([digest, torch.full_like(digest, forgotten)])
        said = own.new_empty(self._shards.ranks, len(own))
        dist.all_gather(list(said), own, group=self._shards.group)
        arrived = None
        if said.is_cuda:
            # A copy that is asked for later would wait for the work of the block after this one.
            said = torch.empty(said.shape, dtype=said.dtype, pin_memory=True).copy_(said, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._said = start, said, arrived

    def check(self) -> None:
        """
        Raises:
            RuntimeError: the ranks do not agree on the block that was noted last; the message says who and on what.
        """
        if self._said is None:
            return
        (start, said, arrived), self._said = self._said, None
        if arrived is not None:
            arrived.synchronize()
        rows = said.tolist()
        for what, column in (("latents", 0), ("number of frames forgotten", 1)):
            others = [rank for rank, row in enumerate(rows) if row[column] != rows[0][column]]
            if others:
                raise RuntimeError(
                    f"the {what} of the block at frame {start} on rank {', '.join(map(str, others))} differ from those "
                    f"on rank 0: all ranks need the same weights, noise, prompts and memory budget (budget.device and "
                    f"budget.host in bytes), and GPUs of one kind"
                )
