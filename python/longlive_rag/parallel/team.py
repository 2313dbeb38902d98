"""The processes of a launch in teams: each team makes a video together, and the teams share the videos."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import init_device_mesh

from longlive_rag.parallel.watch import Watch
from longlive_rag.ranks import Ranks, from_all, result_of

Result = TypeVar("Result")


@dataclass(frozen=True)
class Team:
    """The processes that make a video with this one, by default none."""

    group: ProcessGroup | None = None
    number: int = 0
    """Of this team."""
    teams: int = 1

    @property
    def ranks(self) -> int:
        """Processes of the team."""
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def first(self) -> bool:
        """Whether this process prints and writes for the team."""
        return self.group is None or dist.get_rank(self.group) == 0

    def on_this_machine(self) -> int:
        """How many of the team's processes run on this machine; all of them must ask."""
        if self.group is None:
            return 1
        here = socket.gethostname()
        return from_all(here, self.group).count(here)

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Do `work` on the first rank of the team; all return its result, or raise its ValueError or OSError."""
        if self.group is None:
            return work()
        return result_of(dist.get_global_rank(self.group, 0), self.first, work, self.group)


@contextlib.contextmanager
def join_team(ranks: Ranks, size: int, device: torch.device) -> Iterator[Team]:
    """This process's team of `size` neighbours while the block runs; one that fails ends all of its team.

    Neighbours are ranks in a row: on one machine as long as `size` divides its processes.

    Raises:
        ValueError: `size` does not divide the number of processes.
    """
    if size < 1 or ranks.world % size:
        raise ValueError(
            f"sequence_parallel must divide the number of processes under torchrun, {ranks.world}, got {size}"
        )
    number, teams = ranks.rank // size, ranks.world // size
    if size == 1:
        yield Team(None, number, teams)
        return
    with ranks.process_group(device):
        mesh = init_device_mesh(device.type, (teams, size), mesh_dim_names=("videos", "tokens"))
        group = mesh.get_group("tokens")
        with Watch(group):
            yield Team(group, number, teams)
