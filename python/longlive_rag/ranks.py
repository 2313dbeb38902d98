"""Ranks of a torchrun launch; without one, a single rank."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

Result = TypeVar("Result")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the launch."""

    rank: int = 0
    world: int = 1
    local: int = 0
    """Rank on this machine, which is also the number of its GPU."""

    @classmethod
    def from_environment(cls) -> Ranks:
        """Read RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them."""
        rank, world, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(rank, max(world, 1), local)

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes for all."""
        return self.rank == 0

    def device(self, device: str | None = None) -> torch.device:
        """`device`, by default this rank's GPU if the machine has one."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device must be cpu, since there is no usable GPU, got cuda")
        return torch.device("cuda", self.local) if device == "cuda" else torch.device(device)

    @contextlib.contextmanager
    def process_group(self, device: torch.device) -> Iterator[None]:
        """Join the other ranks while the block runs; a single rank does nothing."""
        if self.world == 1:
            yield
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # The other ranks wait while the first one reads through the whole corpus.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=6))
        try:
            yield
        finally:
            dist.destroy_process_group()

    def mean(self, values: list[float], device: torch.device) -> list[float]:
        """Element-wise mean over the ranks."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return (total / self.world).tolist()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any rank."""
        if self.world == 1:
            return flag
        flags = torch.tensor(flag, dtype=torch.int32, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def on_first(self, work: Callable[[], Result]) -> Result:
        """Do `work` on the first rank; every rank returns its result, or raises the ValueError or OSError it raised."""
        return work() if self.world == 1 else result_of(0, self.first, work)


def from_all(value: Value, group: ProcessGroup) -> list[Value]:
    """Every rank's value, a small Python object, in the order of the ranks."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def result_of(rank: int, here: bool, work: Callable[[], Result], group: ProcessGroup | None = None) -> Result:
    """What `work` returns on one rank, on all ranks of the group; or the ValueError or OSError that it raises there.

    Args:
        rank: as all processes count.
        here: whether this is it.
        group: default all ranks.
    """
    box: list[Any] = [None]
    if here:
        try:
            box[0] = work()
        except (ValueError, OSError) as error:
            box[0] = error
    dist.broadcast_object_list(box, src=rank, group=group)
    if isinstance(box[0], Exception):
        raise box[0]
    result: Result = box[0]
    return result
