"""Pages of keys and values, one for each latent frame of each video and layer: which of them lies where."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from longlive_rag.budget import Budget, format_bytes
from longlive_rag.context import UNUSED
from longlive_rag.tables import uploadable
from longlive_rag.tiers import Entry
from longlive_rag.tiers.below import Below
from longlive_rag.tiers.device import DevicePool
from longlive_rag.tiers.forgetting import Forgetting
from longlive_rag.tiers.latents import LatentTier
from longlive_rag.tiers.pages import Pages
from longlive_rag.tiers.transfer import Copy, Transfer


class TierUsage(NamedTuple):
    """What a tier holds."""

    frames: int
    """Latent frames of all videos whose fastest place this is."""
    bytes: int
    """Allocated."""


class Usage(NamedTuple):
    """What a memory holds, and where."""

    device: TierUsage
    host: TierUsage
    disk: TierUsage
    latents: TierUsage
    forgotten: int
    """Latent frames of all videos that are held no more."""

    def __str__(self) -> str:
        tiers = [
            f"{name} {tier.frames} frames, {format_bytes(tier.bytes)}"
            for name, tier in zip(self._fields, self[:4], strict=False)
            if tier.bytes
        ]
        return "; ".join([*tiers, *([f"forgotten {self.forgotten} frames"] if self.forgotten else [])])


class FrameBank:
    """The table of which frame's pages are in which slot of the device's pools, and which are below.

    A page is written while its block is made and then left alone: leaving the window, or being retrieved, only changes
    tables of a few integers. When the pools are full, the least recently used frames leave the device. They are copied
    down *before* their slots are needed, while a block is made, so that the next block need not wait for that; and a
    frame that comes back keeps its copy below as long as there is room, so that it can leave again at once.

    Args:
        layers, heads, tokens, head_dim: of the backbone; tokens per latent frame.
        batch: videos.
        frames: of each video, to make room for at first.
        budget: of all tiers.
        written, retrieved: frames of each video that a block writes, and retrieves at most.
        forgetting: chooses what is forgotten; None: nothing may be.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        tokens: int,
        head_dim: int,
        frames: int,
        device: torch.device | str,
        dtype: torch.dtype,
        budget: Budget | None = None,
        written: int = 1,
        retrieved: int = 0,
        forgetting: Forgetting | None = None,
    ) -> None:
        budget = budget or Budget()
        self.batch, self._budget = batch, replace(budget, host=budget.host_bytes)
        self.latents: LatentTier | None = None
        """What rebuilds frames that lie nowhere else."""
        self.forgotten = 0
        """Frames of all videos."""
        self._pool = DevicePool(
            layers=layers,
            heads=heads,
            tokens=tokens,
            head_dim=head_dim,
            device=torch.device(device),
            dtype=dtype,
            slots=frames * batch,
            limit=budget.device,
        )
        self.k_pages, self.v_pages = self._pool.k_pages, self._pool.v_pages
        self._pages = Pages(self.k_pages, self.v_pages, budget.bits)
        self.transfer = Transfer(self._pages)
        self._written, self._retrieved, self._forgetting = written * batch, retrieved * batch, forgetting
        # Least recently used first.
        self._slots: OrderedDict[Entry, int] = OrderedDict()
        # What the current block writes, all that it sees, and what it has retrieved. The first are not final yet, and
        # none leaves the device.
        self._own: set[Entry] = set()
        self._window: set[Entry] = set()
        self._fetched: set[Entry] = set()
        # Held, but not on the device.
        self._away: set[Entry] = set()
        self._below = Below(self._pages, self._budget)
        # Slot by video and frame, with a last column that stays unused: -1 finds it.
        self._table = torch.full((batch, frames + 1), UNUSED, dtype=torch.int32, device=device)
        self._table_lacks: set[int] = set()
        self._videos = torch.arange(batch, device=device)[:, None]

    @property
    def generation(self) -> int:
        """How often the pages have moved to other addresses; CUDA graphs captured before that must not be replayed."""
        return self._pool.generation

    @property
    def capacity(self) -> int:
        """Latent frames of each video that the device has room for."""
        return self._pool.slots // self.batch

    @property
    def page_bytes(self) -> int:
        """Of one frame of one video on the device, over all layers."""
        return self._pages.page_bytes

    @property
    def resident(self) -> bool:
        """Whether the device holds every frame, so that the host need not know which are retrieved."""
        return not self._away and not self.forgotten

    @property
    def budget(self) -> Budget:
        """With what was measured where none was given: the device only once its first pools are too small."""
        return replace(self._budget, device=self._pool.limit)

    def usage(self) -> Usage:
        """What is where. A frame counts for the fastest tier that has it; copies below take room there."""
        host, disk = self._below.host, self._below.disk
        in_host = self._away & host.records.keys()
        on_disk = (self._away - in_host) & (disk.places.keys() if disk else set())
        return Usage(
            device=TierUsage(len(self._slots), self._pool.bytes),
            host=TierUsage(len(in_host), self._below.host_bytes),
            disk=TierUsage(len(on_disk), disk.bytes if disk else 0),
            latents=TierUsage(len(self._away - in_host - on_disk), self.latents.bytes if self.latents else 0),
            forgotten=self.forgotten,
        )

    def reserve(self, written: range, read: Iterable[int]) -> None:
        """Give every video pages for the frames that a block will write, and make the frames it reads resident.

        Raises:
            ValueError: the device has too little room for that.
            MemoryError: a frame would have to be forgotten, which the budget forbids.
            OSError: the file on disk does not hold a frame as it was written.
        """
        self.transfer.finish()
        self._below.settle()
        self._own = set(self._entries(written))
        self._window, self._fetched = {*self._own, *self._entries(read)}, set()
        for entry in self._own:
            self._below.drop(entry)
            self._away.discard(entry)
        self._make_resident(self._window)

    def fetch(self, frames: Sequence[Sequence[int]]) -> None:
        """Make these frames of each video resident too, in place of those that an earlier call asked for.

        Raises:
            ValueError, MemoryError, OSError: as `reserve`.
        """
        self._fetched = {(video, frame) for video, row in enumerate(frames) for frame in row}
        self._make_resident(self._window | self._fetched)

    def overwrite(self, frames: Iterable[int]) -> None:
        """Make these earlier frames resident, as far as they are held: their pages are about to be written again.

        Raises:
            ValueError, MemoryError, OSError: as `reserve`.
        """
        held = {entry for entry in self._entries(frames) if entry in self._slots or entry in self._away}
        self._make_resident(self._window | self._fetched | held)
        self.transfer.finish()
        for entry in held:
            self._below.drop(entry)  # a copy of the old page

    def make_ready(self) -> None:
        """Copy down what is going to leave, so that the next block finds slots: once a block's frames are resident."""
        missing = self._needed_next - len(self._pool.free)
        if missing <= 0 or self._pool.grow(missing):
            return
        # The least recently used first; pages of the block itself are not final.
        leaving = dict.fromkeys([entry for entry in self._slots if entry not in self._own][:missing])
        try:
            for entry in leaving:
                if entry in self._slots and entry not in self._below and not self._is_ready(leaving):
                    self._copy_down(entry, self._window | self._fetched, leaving.keys())
        except MemoryError:
            pass  # is raised again if the next block does need the slots
        self._below.write_ahead(len(self._own), self._slots.keys() - leaving, self.transfer, self.latents is not None)

    def release(self, frame: int) -> None:
        """Forget a frame of every video."""
        for entry in self._entries([frame]):
            self._remove(entry)

    def frames(self) -> list[int]:
        """Frames that are held, wherever they lie."""
        return sorted({frame for _, frame in self.entries()})

    @property
    def pages(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape [layers, keys and values, heads, tokens, head_dim] of what `read` returns."""
        return self._pages.dtype, self._pages.shape

    def entries(self) -> list[Entry]:
        """Every frame of every video that is held, wherever it lies."""
        return sorted({*self._slots, *self._away})

    def read(self, entry: Entry) -> Tensor:
        """A copy of a frame's pages in host memory. OSError: the file on disk does not hold it as it was written."""
        if entry in self._slots:
            pools = zip(self.k_pages, self.v_pages, strict=True)
            pages = torch.stack([pool[self._slots[entry]] for halves in pools for pool in halves])
            return pages.view(self._pages.shape).cpu()
        self.transfer.drain()
        return self._pages.unpacked(self._below.read(entry))

    def write(self, entry: Entry, pages: Tensor) -> None:
        """Hold a frame that was read elsewhere; raises what `reserve` does."""
        self.transfer.finish()
        self._below.settle()
        self._own = {entry}
        self._make_resident({entry})
        self._own = set()
        for layer, halves in enumerate(pages):
            for pools, half in zip((self.k_pages, self.v_pages), halves, strict=True):
                pools[layer][self._slots[entry]].copy_(half)

    def clear(self) -> None:
        """Forget all frames; the memory is kept."""
        self.transfer.finish()
        for entry in [*self._slots, *self._away]:
            self._remove(entry)
        self._own, self._window, self._fetched = set(), set(), set()
        self.forgotten = 0
        if self._forgetting is not None:
            self._forgetting.clear()
        if self.latents is not None:
            self.latents.clear()

    def close(self) -> None:
        """Free all memory. The bank cannot be used again."""
        self.transfer.drain()
        self._below.close()
        self._pool.close()

    def slot(self, video: int, frame: int) -> int:
        """Of a frame; negative: it has none."""
        return self._slots.get((video, frame), UNUSED)

    def slots(self, frames: Tensor) -> Tensor:
        """Slot of each frame for each video, int32 like `frames` [B, n] on the bank's device; negative: unused."""
        if self._table_lacks:
            self._write_table()
        return self._table[self._videos, frames]

    def write_slots(self, frames: range, slots: Tensor) -> None:
        """Have `slots` know these frames from int32 [B, F] on the device, which saves it a look at all frames."""
        if frames.stop < self._table.shape[1]:
            self._table[:, frames.start : frames.stop] = slots
            self._table_lacks.difference_update(frames)

    def _entries(self, frames: Iterable[int]) -> list[Entry]:
        """These frames of every video."""
        return [(video, frame) for frame in frames for video in range(self.batch)]

    def _make_resident(self, used: set[Entry]) -> None:
        """Have all this on the device at once."""
        new = self._own - self._slots.keys()
        missing = sorted(entry for entry in used if entry in self._away or entry in new)
        self._free_slots(len(missing), used)
        for entry in missing:
            self._slots[entry] = self._pool.free.pop()
            self._table_lacks.add(entry[1])
        coming = [entry for entry in missing if entry in self._away]
        self._away.difference_update(coming)
        self._bring(coming)
        for entry in (*sorted(used - self._fetched), *sorted(self._fetched)):
            if entry in self._slots:
                self._slots.move_to_end(entry)

    def _bring(self, entries: list[Entry]) -> None:
        lost = self._below.bring(entries, self._slots, self.transfer, self.latents is not None)
        if self.latents is None or not lost:
            return
        self.transfer.finish()
        for video in sorted({video for video, _ in lost}):
            slots = {frame: slot for (each, frame), slot in self._slots.items() if each == video}
            wanted = {frame: slots[frame] for each, frame in lost if each == video}
            self.latents.rebuild(video, wanted, slots)

    def _free_slots(self, count: int, used: set[Entry]) -> None:
        free = self._pool.free
        if count <= len(free) or (self._pool.grow(count - len(free)) and count <= len(free)):
            return
        idle = [entry for entry in self._slots if entry not in used]
        # Those with a copy below can go at once.
        for entry in sorted(idle, key=lambda entry: entry not in self._below):
            # As often as another frame was forgotten in its place, which freed that one's slot.
            while len(free) < count and entry in self._slots:
                if self._copy_down(entry, used):
                    free.append(self._slots.pop(entry))
                    self._away.add(entry)
                    self._table_lacks.add(entry[1])
        self.transfer.hold_for_sent()
        if len(free) < count:
            pages, room = (f"{n} pages ({format_bytes(n * self.page_bytes)})" for n in (len(used), self._pool.slots))
            raise ValueError(
                f"budget.device must leave room for all that a block of {self.batch} videos uses, {pages}, got {room}; "
                f"raise it (--device-memory), or lower context_frames, the number of videos or the size of the picture"
            )

    @property
    def _needed_next(self) -> int:
        """Slots that the next block may need: retrieved frames come from below, if anything can lie there."""
        return self._written + (self._retrieved if self._below or self.latents is not None else 0)

    def _is_ready(self, leaving: Iterable[Entry]) -> bool:
        ready = [entry for entry in leaving if entry in self._slots and entry in self._below]
        return len(self._pool.free) + len(ready) >= self._needed_next

    def _copy_down(self, entry: Entry, spared: set[Entry], leaving: Set[Entry] = frozenset()) -> bool:
        """Give a resident frame a copy below, unless it can be rebuilt; False: it or another one was forgotten instead.

        Args:
            spared: what is not forgotten.
            leaving: resident frames that keep the copies they have.

        Raises:
            MemoryError: a frame would have to be forgotten, but that is forbidden or all are needed.
        """
        while entry not in self._below:
            record = self._below.record(self._slots.keys() - leaving, self.transfer, self.latents is not None)
            if record is not None:
                self._below.host.put(entry, record)
                self.transfer.send([Copy(*entry, self._slots[entry], record)])
            elif self.latents is not None and entry[1] in self.latents:
                return True
            elif self._forget_one(spared):
                return False
        return True

    def _forget_one(self, spared: set[Entry]) -> bool:
        """Forget a frame; whether that has freed a slot.

        Raises:
            MemoryError: that is forbidden, or all are needed.
        """
        held = {*self._slots, *self._away}
        victim = self._forgetting.victim(held - spared) if self._forgetting is not None else None
        if self._forgetting is None or victim is None:
            why = "forgetting is forbidden" if self._forgetting is None else "the current block uses all of them"
            raise MemoryError(
                f"no tier has room for another frame, {format_bytes(self._pages.record_bytes)} ({len(held)} are held), "
                f"and {why}: raise budget.host (--host-memory) or budget.disk (--disk-memory), lower budget.bits "
                f"(--page-bits), or have frames forgotten (without --keep-all) or rebuilt (--rebuild)"
            )
        on_device = victim in self._slots
        self._remove(victim)
        self.forgotten += 1
        self._forgetting.forget(victim)
        return on_device

    def _remove(self, entry: Entry) -> None:
        """A frame is held no more."""
        self._below.drop(entry)
        self._away.discard(entry)
        if entry in self._slots:
            self._pool.free.append(self._slots.pop(entry))
            self._table_lacks.add(entry[1])

    def _write_table(self) -> None:
        longest = 1 + max((frame for _, frame in self._slots), default=0)
        width = self._table.shape[1] - 1
        rows = [[UNUSED] * max(2 * longest if longest > width else width, 1) + [UNUSED] for _ in range(self.batch)]
        for (video, frame), slot in self._slots.items():
            rows[video][frame] = slot
        self._table = uploadable(rows, self._table.device).to(self._table.device, non_blocking=True)
        self._table_lacks.clear()
