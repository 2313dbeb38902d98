"""What lies below the device: records in host memory, and from there on disk."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping, Set
from concurrent.futures import wait

import torch
from torch import Tensor

from longlive_rag.budget import Budget
from longlive_rag.tiers import Entry
from longlive_rag.tiers.disk import DiskTier
from longlive_rag.tiers.host import HostTier
from longlive_rag.tiers.pages import Pages
from longlive_rag.tiers.transfer import Copy, Transfer

# Records in host memory that pages go through on their way to the disk, whatever the budget: one is written while
# another one arrives.
PASSING = 2
# And those for frames on their way back from there: one is read and checked while another one is read or copied.
STAGED = 2


class Below:
    """Copies of pages in host memory and on disk; what was written stays valid until it is dropped.

    Args:
        pages: of the device.
        budget: of host memory and disk.
    """

    def __init__(self, pages: Pages, budget: Budget) -> None:
        size, pinned = pages.record_bytes, pages.device.type == "cuda"
        self.host = HostTier(size, budget.host_bytes, least=PASSING if budget.disk >= size else 0, pinned=pinned)
        self.disk = DiskTier(size, budget.disk, budget.folder, readers=STAGED) if budget.disk >= size else None
        self._record_bytes = size
        self._staging = HostTier(size, 0, least=STAGED, pinned=pinned)
        self._staged: list[Tensor] = []

    def __contains__(self, entry: Entry) -> bool:
        return entry in self.host.records or (self.disk is not None and entry in self.disk.places)

    def __bool__(self) -> bool:
        """Whether there is room for any frame."""
        return bool(self.host.records or self.host.free or self.disk)

    @property
    def host_bytes(self) -> int:
        """Of host memory, allocated."""
        return self.host.bytes + self._staging.bytes

    def record(self, resident: Set[Entry], transfer: Transfer, rebuild: bool) -> Tensor | None:
        """A record in host memory to copy a page to; None if a frame would have to be forgotten for that.

        Args:
            resident: frames on the device whose copies may go first.
            rebuild: whether frames may lie nowhere, since they can be rebuilt.
        """
        while True:
            record = self.host.take()
            if record is not None or not self._free_record(resident, transfer, rebuild):
                return record

    def bring(self, entries: list[Entry], slots: Mapping[Entry, int], transfer: Transfer, rebuild: bool) -> list[Entry]:
        """Copy frames to their slots; returns those that must be rebuilt.

        Raises:
            OSError: the file does not hold a frame as it was written, and it cannot be rebuilt.
        """
        copies: list[Copy] = []
        on_disk: list[Entry] = []
        lost: list[Entry] = []
        for entry in entries:
            record = self.host.records.get(entry)
            if record is not None:
                self.host.records.move_to_end(entry)
                copies.append(Copy(*entry, slots[entry], record))
            else:
                (on_disk if entry in self else lost).append(entry)
        if on_disk:
            lost += self._bring_from_disk(on_disk, slots, transfer, rebuild)
        transfer.bring(copies)
        return lost

    def read(self, entry: Entry) -> Tensor:
        """The record of a frame that is here, in host memory.

        Raises:
            OSError: the file does not hold the frame as it was written.
        """
        record = self.host.records.get(entry)
        if record is None:
            assert self.disk is not None
            record = torch.empty(self._record_bytes, dtype=torch.uint8)
            self.disk.load(entry, record).result()
        return record

    def write_ahead(self, count: int, resident: Set[Entry], transfer: Transfer, rebuild: bool) -> None:
        """Begin to write records to disk, so that the next block finds room for `count` pages; see `record`."""
        if self.disk is None:
            return
        waiting = [entry for entry in self.host.records if entry not in self.disk.places]
        short = count - self.host.free - (len(self.host.records) - len(waiting))
        for entry in waiting[: max(0, short)]:
            if not self._room_on_disk(resident, rebuild):
                break
            self.disk.store(entry, self.host.records[entry], transfer.sent())

    def settle(self) -> None:
        """Wait until what `write_ahead` began is written; what could not be stays in host memory."""
        if self.disk is not None:
            self.disk.settle()

    def drop(self, entry: Entry) -> None:
        """Forget the copies of a frame."""
        if self.disk is not None:
            self.disk.drop(entry)
        self.host.drop(entry)

    def close(self) -> None:
        """Free host memory and the file."""
        if self.disk is not None:
            self.disk.close()
        self.host.close()
        self._staging.close()
        self._staged.clear()

    def _free_record(self, resident: Set[Entry], transfer: Transfer, rebuild: bool) -> bool:
        """Have one record fewer in host memory, without losing a frame."""
        records = self.host.records
        if self._demote(resident, transfer, replace=False):
            return True
        # A second copy of what stays on the device, the most recently used first.
        twice = (entry for entry in reversed(records) if entry in resident and entry not in transfer.coming)
        dropped = next(twice, None)
        if dropped is None and rebuild:
            if self._demote(resident, transfer, replace=True):
                return True
            dropped = next(iter(records), None)
        if dropped is not None:
            self._reuse(dropped, transfer)
        return dropped is not None

    def _demote(self, resident: Set[Entry], transfer: Transfer, replace: bool) -> bool:
        """Have one record fewer in host memory, since it is on disk; `replace`: even if another one there must go."""
        if self.disk is None or not self.host.records:
            return False
        self.disk.settle()
        written = next((entry for entry in self.host.records if entry in self.disk.places), None)
        if written is None:
            if not self._room_on_disk(resident, replace):
                return False
            written = next(iter(self.host.records))
            self.disk.store(written, self.host.records[written], transfer.sent())
            if self.disk.settle():
                return False
        self._reuse(written, transfer)
        return True

    def _reuse(self, entry: Entry, transfer: Transfer) -> None:
        """Give a record up for another frame."""
        if entry in transfer.coming:
            transfer.finish()
        self.host.drop(entry)

    def _room_on_disk(self, resident: Set[Entry], replace: bool) -> bool:
        """Whether another record fits, if need be in place of a second copy of what stays on the device."""
        assert self.disk is not None
        if self.disk.full:
            going = next((entry for entry in self.disk.places if entry in resident), None)
            if going is None and replace:
                going = next(iter(self.disk.places), None)
            if going is not None:
                self.disk.drop(going)
        return not self.disk.full

    def _bring_from_disk(
        self, entries: list[Entry], slots: Mapping[Entry, int], transfer: Transfer, rebuild: bool
    ) -> list[Entry]:
        """Those that the file does not hold as they were written, if they can be rebuilt."""
        assert self.disk is not None
        while len(self._staged) < STAGED and (record := self._staging.take()) is not None:
            self._staged.append(record)
        if not self._staged:
            raise MemoryError("the system refuses the host memory that frames need on their way from the disk")
        transfer.drain()
        lost = []
        to_come = iter(sorted(entries, key=self.disk.places.__getitem__))  # as they lie in the file
        first = zip(self._staged, to_come, strict=False)
        loading = deque((entry, record, self.disk.load(entry, record)) for record, entry in first)
        try:
            while loading:
                entry, record, loaded = loading[0]
                try:
                    loaded.result()
                    transfer.bring([Copy(*entry, slots[entry], record)])
                    transfer.drain()
                except OSError as error:
                    if not rebuild:
                        raise
                    warnings.warn(f"{error}; the frame is rebuilt", stacklevel=2)
                    self.disk.drop(entry)
                    lost.append(entry)
                loading.popleft()
                if following := next(to_come, None):
                    loading.append((following, record, self.disk.load(following, record)))
        finally:
            wait(loaded for _, _, loaded in loading)  # nobody else may have the records before
        return lost
