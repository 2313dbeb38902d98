"""Records in host memory, pinned where the device is a GPU."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor

from longlive_rag.budget import format_bytes
from longlive_rag.tiers import Entry

_LEAST_SLAB = 64 * 2**20
# Of a pinned slab, that records do not fill. PyTorch rounds pinned allocations up to a power of two.
_LARGEST_WASTE = 1 / 8


def slab_bytes(record_bytes: int, room: int, pinned: bool) -> int:
    """Size of the next slab of records: 0 if not one record fits into `room` bytes.

    A pinned slab is a power of two: the smallest, from 64 MiB, that records fill to 7/8, or a smaller one at the end of
    the room. Others hold up to 64 MiB of whole records.
    """
    if not pinned:
        return min(max(1, _LEAST_SLAB // record_bytes), room // record_bytes) * record_bytes
    size = _rounded(max(record_bytes, _LEAST_SLAB))
    while size % record_bytes > _LARGEST_WASTE * size:
        size *= 2
    while size > room:
        size //= 2
    return size if size >= record_bytes else 0


def slabs(record_bytes: int, room: int, pinned: bool) -> Iterator[int]:
    """Sizes of all slabs of records that `room` bytes have room for, one after the other."""
    while size := slab_bytes(record_bytes, room, pinned):
        yield size
        room -= size


def host_room(record_bytes: int, budget: int, least: int, pinned: bool) -> int:
    """Bytes that slabs may take: the budget, or what this number of records needs."""
    return max(budget, least * (_rounded(record_bytes) if pinned else record_bytes))


class HostTier:
    """Records in slabs that are allocated as they are needed.

    Args:
        record_bytes: of one frame.
        budget: bytes of all slabs at most.
        least: records that there is room for whatever the budget.
        pinned: page-locked, so that copies to and from a GPU do not stop the host. Where the system refuses that,
            pageable memory serves.
    """

    def __init__(self, record_bytes: int, budget: int, *, least: int, pinned: bool) -> None:
        self._record_bytes, self._pinned = record_bytes, pinned
        self._room = host_room(record_bytes, budget, least, pinned)
        self._slabs: list[Tensor] = []
        self._free: list[Tensor] = []
        # Records at the head of the newest slab that were never taken.
        self._fresh = 0
        self.records: OrderedDict[Entry, Tensor] = OrderedDict()
        """uint8 [record_bytes] by entry, the least recently used first."""

    @property
    def bytes(self) -> int:
        """Allocated."""
        return sum(slab.nbytes for slab in self._slabs)

    @property
    def free(self) -> int:
        """Records that there is still room for."""
        return len(self._free) + self._fresh + max(0, self._room - self.bytes) // self._record_bytes

    def take(self) -> Tensor | None:
        """A record to write to; None if the tier is full, or the system refuses it more memory."""
        if self._free:
            return self._free.pop()
        if not self._fresh:
            self._grow()
        if not self._fresh:
            return None
        self._fresh -= 1
        return self._slabs[-1][self._fresh * self._record_bytes : (self._fresh + 1) * self._record_bytes]

    def put(self, entry: Entry, record: Tensor) -> None:
        """The record taken holds this frame now."""
        self.records[entry] = record

    def drop(self, entry: Entry) -> None:
        """Forget a frame, if it is here."""
        record = self.records.pop(entry, None)
        if record is not None:
            self._free.append(record)

    def clear(self) -> None:
        """Forget all frames; the memory is kept."""
        for entry in list(self.records):
            self.drop(entry)

    def close(self) -> None:
        """Free the memory."""
        self.records.clear()
        self._free.clear()
        self._slabs.clear()
        self._fresh = 0

    def _grow(self) -> None:
        size = slab_bytes(self._record_bytes, self._room - self.bytes, self._pinned)
        if size == 0:
            return
        try:
            slab = self._allocate(size)
        except (RuntimeError, MemoryError):
            self._room = self.bytes  # what does not fit goes down to the next tier
            return
        self._slabs.append(slab)
        self._fresh = slab.nbytes // self._record_bytes

    def _allocate(self, size: int) -> Tensor:
        if self._pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self._pinned = False
                warnings.warn(
                    f"the system refuses {format_bytes(size)} of pinned memory ({str(error).splitlines()[0]}); frames "
                    f"that leave the device go to pageable memory, and copies no longer overlap with the computation",
                    stacklevel=2,
                )
        return torch.empty(size, dtype=torch.uint8)


def _rounded(size: int) -> int:
    """As PyTorch rounds pinned allocations."""
    return 1 << (size - 1).bit_length()
