"""The tables of integers that the operations read of a block."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longlive_rag.context import UNUSED


class Tables:
    """What the operations read of a block: int32 on the device, one row per video, `UNUSED` where there is nothing.

    All are views of one buffer, so that one upload fills them.

    Args:
        batch: videos.
        frames: F, of the block.
        columns: N, context entries.
    """

    def __init__(self, batch: int, frames: int, columns: int, device: torch.device) -> None:
        widths = (frames, columns, columns, frames, 1, 1)
        self._buffer = torch.full((batch * sum(widths),), UNUSED, dtype=torch.int32, device=device)
        views = [part.view(batch, -1) for part in self._buffer.split([batch * width for width in widths])]
        self.block_slots = views[0]
        """[B, F]: the slot that each frame of the block is written to."""
        self.slots = views[1]
        """[B, N]: the slot of each context entry."""
        self.positions = views[2]
        """[B, N]: its temporal position."""
        self.query_positions = views[3]
        """[B, F]: temporal position of each frame of the block."""
        self.candidates = views[4].view(-1), views[5].view(-1)
        """[B] each: the first frame that may be retrieved, and the one behind the last."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.block_slots, self.slots, self.positions, self.query_positions))

    def fill(self, *rows: list[list[int]]) -> None:
        """Upload block_slots, slots, positions, query_positions and candidates, each a list per video, in place."""
        values = [value for table in rows for row in table for value in row]
        self._buffer.copy_(uploadable(values, self._buffer.device), non_blocking=True)


def uploadable(values: list[int] | list[list[int]], device: torch.device) -> Tensor:
    """int32 on the host, pinned if `device` is a GPU: a copy from there does not wait."""
    return torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
