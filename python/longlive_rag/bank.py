"""Pages of keys and values, one for each latent frame of each video and layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longlive_rag.context import UNUSED

Entry = tuple[int, int]
"""A video and one of its latent frames."""


def frame_bytes(*, layers: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one latent frame of one video takes over all layers."""
    return 2 * layers * heads * tokens * head_dim * dtype.itemsize


class FrameBank:
    """A pool of pages ``[slot, head, token, dim]`` per layer, and the table of which frame is in which slot.

    A page is written while its block is made and then left alone: leaving the window, or being retrieved, only changes
    tables of a few integers. With a budget, the least recently used frames move to host memory and come back, once per
    block and for all layers, when they are retrieved.

    Args:
        layers, heads, tokens, head_dim: of the backbone; tokens per latent frame.
        batch: videos.
        capacity: latent frames to allocate up front. A full pool doubles, which copies it once, layer by layer; pass
            the length of the video if it is known, and no page ever moves.
        device_frames: at most this many latent frames of each video on the device; None: no limit.
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
        device_frames: int | None = None,
    ) -> None:
        self.batch, self.device_frames = batch, device_frames
        self.generation = 0
        """How often the pages have moved to other addresses; CUDA graphs captured before that must not be replayed."""
        frames = capacity if device_frames is None else device_frames
        shape = (frames * batch, heads, tokens, head_dim)
        self.k_pages = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self.v_pages = [torch.empty(shape, device=device, dtype=dtype) for _ in range(layers)]
        self._free = list(reversed(range(frames * batch)))
        # Least recently used first.
        self._slots: OrderedDict[Entry, int] = OrderedDict()
        # What the current block writes and sees, and what it has retrieved: these never leave the device.
        self._window: set[Entry] = set()
        self._fetched: set[Entry] = set()
        self._table = torch.full((batch, capacity), UNUSED, dtype=torch.int32, device=device)
        self._host = HostPages(self.k_pages, self.v_pages)

    @property
    def capacity(self) -> int:
        """Latent frames of each video that the device has room for."""
        return len(self.k_pages[0]) // self.batch

    def reserve(self, written: range, read: Iterable[int]) -> None:
        """Give every video pages for the frames that a block will write, and make the frames it reads resident."""
        own = self._entries(written)
        self._window, self._fetched = {*own, *self._entries(read)}, set()
        for entry in own:
            self._host.drop(entry)
        self._occupy([entry for entry in own if entry not in self._slots], self._window)
        self._load(self._window)

    def fetch(self, frames: Sequence[Sequence[int]]) -> None:
        """Make these frames of each video resident too, in place of those that an earlier call asked for."""
        self._fetched = {(video, frame) for video, row in enumerate(frames) for frame in row}
        self._load(self._window | self._fetched)

    def overwrite(self, frames: Iterable[int]) -> None:
        """Make these earlier frames resident, as far as they are held: their pages are about to be written again."""
        held = {entry for entry in self._entries(frames) if entry in self._slots or entry in self._host}
        self._load(self._window | self._fetched | held)
        for entry in held:
            self._host.drop(entry)  # a copy of the old page

    def release(self, frame: int) -> None:
        """Forget a frame of every video."""
        entries = self._entries([frame])
        for entry in entries:
            self._host.drop(entry)
        self._vacate([entry for entry in entries if entry in self._slots])

    def frames(self) -> list[int]:
        """Frames that are held, on the device or in host memory."""
        return sorted({frame for _, frame in [*self._slots, *self._host.entries()]})

    @property
    def dtype(self) -> torch.dtype:
        """Of the pages."""
        return self.k_pages[0].dtype

    @property
    def page_shape(self) -> tuple[int, ...]:
        """[layers, keys and values, heads, tokens, head_dim]: the pages of one frame of one video."""
        return (len(self.k_pages), 2, *self.k_pages[0].shape[1:])

    def entries(self) -> list[Entry]:
        """Every frame of every video that is held, wherever it is."""
        return sorted({*self._slots, *self._host.entries()})

    def read(self, entry: Entry) -> Tensor:
        """A copy of the pages of one frame, of `page_shape`, on the CPU; the frame stays where it is."""
        if entry in self._slots:
            slot = self._slots[entry]
            pages = [pool[slot] for pools in zip(self.k_pages, self.v_pages, strict=True) for pool in pools]
            return torch.stack(pages).view(self.page_shape).cpu()
        return self._host.read(entry)

    def write(self, entry: Entry, pages: Tensor) -> None:
        """Hold a frame with these pages, of `page_shape`."""
        self._occupy([entry], {entry})
        for pools, halves in zip(zip(self.k_pages, self.v_pages, strict=True), pages, strict=True):
            for pool, page in zip(pools, halves, strict=True):
                pool[self._slots[entry]].copy_(page)

    def clear(self) -> None:
        """Forget all frames; the pool is kept."""
        self._host.clear()
        self._vacate(list(self._slots))

    def close(self) -> None:
        """Free all memory. The bank cannot be used again."""
        self.generation += 1
        self.k_pages.clear()
        self.v_pages.clear()
        self._host = HostPages(self.k_pages, self.v_pages)

    def slots(self, frames: Tensor) -> Tensor:
        """Slot of each frame for each video, int32 like `frames` [B, n] on the bank's device; negative: unused."""
        slot = self._table.gather(1, frames.clamp(min=0).long())
        return slot.masked_fill(frames < 0, UNUSED)

    def _entries(self, frames: Iterable[int]) -> list[Entry]:
        """These frames of every video."""
        return [(video, frame) for frame in frames for video in range(self.batch)]

    def _load(self, in_use: set[Entry]) -> None:
        missing = sorted(entry for entry in in_use if entry not in self._slots and entry in self._host)
        self._occupy(missing, in_use)
        for entry in missing:
            self._host.load(entry, self._slots[entry])
        for entry in in_use & self._slots.keys():
            self._slots.move_to_end(entry)

    def _occupy(self, entries: list[Entry], in_use: set[Entry]) -> None:
        shortage = len(entries) - len(self._free)
        if shortage > 0 and self.device_frames is None:
            self._grow(max(2 * self.capacity, self.capacity + -(-shortage // self.batch)))
        elif shortage > 0:
            self._spill(shortage, in_use)
        for entry in entries:
            self._slots[entry] = self._free.pop()
        self._write_table(entries, [self._slots[entry] for entry in entries])

    def _vacate(self, entries: list[Entry]) -> None:
        self._free.extend(self._slots.pop(entry) for entry in entries)
        self._write_table(entries, [UNUSED] * len(entries))

    def _spill(self, count: int, in_use: set[Entry]) -> None:
        idle = [entry for entry in self._slots if entry not in in_use][:count]
        if len(idle) < count:
            raise ValueError(
                f"device_frames must leave room for all that a block uses, {len(in_use)} pages for "
                f"{self.batch} videos, got {self.device_frames} frames for each"
            )
        for entry in idle:
            self._host.store(entry, self._slots[entry])
        self._vacate(idle)

    def _write_table(self, entries: list[Entry], slots: list[int]) -> None:
        if not entries:
            return
        longest = 1 + max(frame for _, frame in entries)
        if longest > self._table.shape[1]:
            table = self._table.new_full((self.batch, max(longest, 2 * self._table.shape[1])), UNUSED)
            table[:, : self._table.shape[1]] = self._table
            self._table = table
        videos, frames, values = torch.tensor(
            [(*entry, slot) for entry, slot in zip(entries, slots, strict=True)]
        ).T.to(self._table.device, non_blocking=True)
        self._table[videos, frames] = values.to(torch.int32)

    def _grow(self, capacity: int) -> None:
        self.generation += 1
        before = len(self.k_pages[0])
        for pools in (self.k_pages, self.v_pages):
            for layer, pool in enumerate(pools):
                larger = pool.new_empty(capacity * self.batch, *pool.shape[1:])
                larger[:before] = pool
                pools[layer] = larger
        self._free = [*reversed(range(before, capacity * self.batch)), *self._free]


class HostPages:
    """Pages in host memory, pinned if the device is a GPU, so that copies do not block it.

    All copies run on the current stream, after the kernels that wrote a page and before those that will read it.
    """

    _SLAB_PAGES = 8

    def __init__(self, k_pages: list[Tensor], v_pages: list[Tensor]) -> None:
        self._k_pages, self._v_pages = k_pages, v_pages
        self._places: dict[Entry, Tensor] = {}
        self._free: list[Tensor] = []

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._places

    def entries(self) -> list[Entry]:
        return list(self._places)

    def store(self, entry: Entry, slot: int) -> None:
        """Copy a page of every layer from the device, unless there is one already: writing a page drops its copy."""
        if entry in self._places:
            return
        place = self._places[entry] = self._free.pop() if self._free else self._allocate()
        for layer, pools in enumerate(zip(self._k_pages, self._v_pages, strict=True)):
            for half, pool in enumerate(pools):
                place[layer, half].copy_(pool[slot], non_blocking=True)

    def load(self, entry: Entry, slot: int) -> None:
        """Copy a page of every layer back to the device; the host copy stays."""
        for layer, pools in enumerate(zip(self._k_pages, self._v_pages, strict=True)):
            for half, pool in enumerate(pools):
                pool[slot].copy_(self._places[entry][layer, half], non_blocking=True)

    def read(self, entry: Entry) -> Tensor:
        """A copy of a frame's pages."""
        return self._places[entry].clone()

    def drop(self, entry: Entry) -> None:
        """Forget a page."""
        place = self._places.pop(entry, None)
        if place is not None:
            self._free.append(place)

    def clear(self) -> None:
        """Forget all pages; their memory is kept."""
        for entry in self.entries():
            self.drop(entry)

    def _allocate(self) -> Tensor:
        """One page out of a new slab. PyTorch rounds pinned allocations up to a power of two: the slab fills it."""
        page = self._k_pages[0][0]
        shape = (len(self._k_pages), 2, *page.shape)
        page_bytes = 2 * len(self._k_pages) * page.nbytes
        slab_bytes = 1 << (self._SLAB_PAGES * page_bytes - 1).bit_length()
        slab = torch.empty((slab_bytes // page_bytes, *shape), dtype=page.dtype, pin_memory=page.device.type == "cuda")
        self._free.extend(slab.unbind())
        return self._free.pop()
