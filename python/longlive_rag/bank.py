"""Pages of keys and values, one for each latent frame of each video and layer."""

from __future__ import annotations

import torch
from torch import Tensor

from longlive_rag.context import UNUSED


class FrameBank:
    """A pool of pages ``[slot, head, token, dim]`` per layer, and the table that says which frame lies where.

    A page is written while its block is made and then left alone: leaving the window, or being retrieved, changes only
    tables of a few integers. Frames go through the batch in lockstep, so a frame takes one slot for each video.

    Args:
        layers, heads, tokens, head_dim: of the backbone; tokens per latent frame.
        batch: videos.
        capacity: frames to allocate at once. The pool doubles when it is full, which copies it once, layer by layer;
            who knows the length of the video beforehand passes it and no page ever moves.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        tokens: int,
        head_dim: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.batch, self.capacity = batch, capacity
        shape = (capacity * batch, heads, tokens, head_dim)
        self.k_pages = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.v_pages = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self._free = list(reversed(range(capacity)))
        self._places: dict[int, int] = {}
        self._table = torch.full((capacity,), UNUSED, dtype=torch.int32, device=device)
        self._sample = torch.arange(batch, dtype=torch.int32, device=device)

    @property
    def frame_bytes(self) -> int:
        """Bytes that one latent frame of one video takes over all layers."""
        return 2 * len(self.k_pages) * self.k_pages[0][0].nbytes

    def acquire(self, frames: range) -> None:
        """Give each of the frames a page for every video, where it has none yet."""
        missing = [frame for frame in frames if frame not in self._places]
        if len(missing) > len(self._free):
            self._grow(max(2 * self.capacity, self.capacity + len(missing)))
        for frame in missing:
            self._place(frame, self._free.pop())

    def release(self, frame: int) -> None:
        """Give the pages of a frame back. What they hold is overwritten by the next frame that gets them."""
        self._free.append(self._places[frame])
        self._place(frame, UNUSED)

    def held(self) -> list[int]:
        """Frames that have pages."""
        return list(self._places)

    def clear(self) -> None:
        """Give all pages back; the pool is kept."""
        for frame in self.held():
            self.release(frame)

    def slots(self, frames: Tensor) -> Tensor:
        """Slot of each frame for each video, int32 like `frames` [B, n] on the bank's device; negative stays unused."""
        place = self._table[frames.clamp(min=0).long()]
        slot = place * self.batch + self._sample[:, None]
        return slot.masked_fill((frames < 0) | (place < 0), UNUSED)

    def _place(self, frame: int, place: int) -> None:
        if frame >= len(self._table):
            table = self._table.new_full((max(frame + 1, 2 * len(self._table)),), UNUSED)
            table[: len(self._table)] = self._table
            self._table = table
        self._table[frame] = place
        if place == UNUSED:
            del self._places[frame]
        else:
            self._places[frame] = place

    def _grow(self, capacity: int) -> None:
        for pools in (self.k_pages, self.v_pages):
            for layer, pool in enumerate(pools):
                larger = pool.new_empty(capacity * self.batch, *pool.shape[1:])
                larger[: len(pool)] = pool
                pools[layer] = larger
        self._free = [*reversed(range(self.capacity, capacity)), *self._free]
        self.capacity = capacity
