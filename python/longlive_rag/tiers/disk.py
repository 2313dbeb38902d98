"""Records in a file, each with a checksum."""

from __future__ import annotations

import os
import tempfile
import warnings
import zlib
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from longlive_rag.tiers import Entry

_SLAB = 2**30
"""Bytes of the file that are claimed at once: whole records, at least one."""


def records_at_once(record_bytes: int) -> int:
    """Records by which the file grows."""
    return max(1, _SLAB // record_bytes)


class DiskTier:
    """Records written one after the other by a thread, while the next block is made.

    The file is made when the first record comes. It has no name, so that it is gone when the tier is closed or the
    process ends, however it ends.

    Args:
        record_bytes: of one frame.
        budget: bytes of the file at most.
        folder: where it lies; None: the folder for temporary files.
        readers: records that are read at the same time.
    """

    def __init__(self, record_bytes: int, budget: int, folder: Path | None, *, readers: int = 1) -> None:
        self._record_bytes, self._folder = record_bytes, folder
        self._limit = budget // record_bytes
        self._allocated = 0
        self._file: IO[bytes] | None = None
        self._free: list[int] = []
        self._checksums: dict[int, int] = {}
        self._writing: dict[Entry, Future[int]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="longlive-rag-disk")
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="longlive-rag-disk-read")
        self.places: OrderedDict[Entry, int] = OrderedDict()
        """Number of the record by entry, the oldest first."""

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self._allocated * self._record_bytes

    @property
    def full(self) -> bool:
        """Whether a record would have to go before another can come."""
        if not self._free:
            self._claim()
        return not self._free

    def store(self, entry: Entry, record: Tensor, arrived: torch.cuda.Event | None) -> None:
        """Begin to write a record, which must stay as it is until `settle`; the tier must not be full.

        Args:
            arrived: is passed when the record holds the frame.
        """
        place = self._free.pop()
        self.places[entry] = place
        self._writing[entry] = self._writer.submit(self._write, place, record, arrived)

    def settle(self) -> list[Entry]:
        """Wait until all is written; returns the frames that could not be, and are not here."""
        failed = []
        for entry, writing in self._writing.items():
            try:
                self._checksums[self.places[entry]] = writing.result()
            except OSError as error:
                warnings.warn(f"{self._name} cannot be written to ({error}); it takes no more frames", stacklevel=2)
                self.places.pop(entry)  # the place may be bad: it is not used again
                self._limit = 0
                self._free.clear()
                failed.append(entry)
        self._writing.clear()
        return failed

    def load(self, entry: Entry, record: Tensor) -> Future[None]:
        """Begin to read a frame into a record; the future raises OSError if the file does not hold what was written."""
        self.settle()
        place = self.places[entry]
        return self._readers.submit(self._read, entry, place, self._checksums[place], record)

    def drop(self, entry: Entry) -> None:
        """Forget a frame, if it is here."""
        if entry in self._writing:
            self.settle()
        place = self.places.pop(entry, None)
        if place is not None and self._limit:
            self._free.append(place)

    def clear(self) -> None:
        """Forget all frames; the file is kept."""
        for entry in list(self.places):
            self.drop(entry)

    def close(self) -> None:
        """Remove the file."""
        self._writer.shutdown()
        self._readers.shutdown()
        self._writing.clear()
        self.places.clear()
        self._free.clear()
        self._limit = self._allocated = 0
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _name(self) -> str:
        return f"the file for keys and values in {self._folder or tempfile.gettempdir()}"

    def _claim(self) -> None:
        """Make room for more records, as far as budget and disk allow."""
        count = min(records_at_once(self._record_bytes), self._limit - self._allocated)
        if count <= 0:
            return
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115, `close` closes it
            # Room that is claimed now will not be missing in the middle of a record.
            os.posix_fallocate(self._file.fileno(), self.bytes, count * self._record_bytes)
        except OSError as error:
            warnings.warn(
                f"{self._name} takes no more frames ({error.strerror}); it holds {self._allocated}", stacklevel=2
            )
            self._limit = self._allocated
            return
        self._free.extend(reversed(range(self._allocated, self._allocated + count)))
        self._allocated += count

    def _write(self, place: int, record: Tensor, arrived: torch.cuda.Event | None) -> int:
        """Checksum of what was written."""
        if arrived is not None:
            arrived.synchronize()
        assert self._file is not None
        view, done = memoryview(record.numpy().data), 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], place * self._record_bytes + done)
        return zlib.crc32(view)

    def _read(self, entry: Entry, place: int, expected: int, record: Tensor) -> None:
        assert self._file is not None
        view, done = memoryview(record.numpy().data), 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], place * self._record_bytes + done)
            if count == 0:
                raise OSError(f"{self._name} ends early: frame {entry[1]} of video {entry[0]} is cut off")
            done += count
        checksum = zlib.crc32(view)
        if checksum != expected:
            raise OSError(
                f"{self._name} does not hold what was written: the checksum of frame {entry[1]} of video {entry[0]} "
                f"is {checksum:08x}, expected {expected:08x}; it was altered, or the disk fails"
            )
