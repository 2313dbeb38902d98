"""Copies between the device and host memory, on a stream of their own, layer by layer ahead of the computation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from longlive_rag.tiers import Entry
from longlive_rag.tiers.pages import ALL, Pages

AHEAD = 2
"""Layers whose copies are issued before the computation reaches them. Issuing all at once would keep the host from
launching anything meanwhile (720 copies a block at 30 layers and 12 frames)."""


class Copy(NamedTuple):
    """A page that leaves the device or comes back."""

    video: int
    frame: int
    slot: int
    record: Tensor
    """uint8 [record_bytes] in host memory."""


class Event(NamedTuple):
    """Something that was issued, in the order of issue: "copy frame 7 layer 3 in", "attend layer 3"."""

    action: str
    """"in", "out" or "attend"."""
    layer: int
    frame: int = -1
    video: int = -1

    def __str__(self) -> str:
        if self.action == "attend":
            return f"attend layer {self.layer}"
        layer = "" if self.layer == ALL else f" layer {self.layer}"
        return f"copy frame {self.frame}{layer} {self.action}"


class Timeline(list[Event]):
    """What was issued, for tests and for a look at what a run does: `memory.bank.transfer.timeline = Timeline()`."""


class Transfer:
    """Two streams for the two directions of the bus. On a CPU there are none, and the same calls copy at once.

    A page that comes back overwrites a slot that earlier blocks read, and one that leaves must have been written:
    copies wait for what the computation had issued when they were asked for, and for copies the other way, which may
    use the same record. The computation waits for a layer's copies in front of its attention, and for pages that leave
    before their slots are used again.
    """

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self.timeline: Timeline | None = None
        self.busy = False
        """Whether `before` must be called in front of a layer."""
        self.coming: set[Entry] = set()
        """Frames whose records are still needed."""
        self._device = pages.device
        cuda = pages.device.type == "cuda"
        self._in, self._out = (torch.cuda.Stream(pages.device) if cuda else None for _ in range(2))
        self._events = [torch.cuda.Event() for _ in range(pages.layers)] if cuda else []
        self._issuing: Iterator[None] = iter(())
        self._issued = self._awaited = pages.layers

    def send(self, copies: Sequence[Copy]) -> None:
        """Copy pages to host memory; their contents are final, and their records are free to be written."""
        if not copies:
            return
        self._follow(self._out, self._in)
        with _on(self._out):
            for copy in copies:
                for layer in self._pages.send(copy.slot, copy.record):
                    self._note("out", layer, copy)

    def bring(self, copies: Sequence[Copy]) -> None:
        """Begin to copy records back to the device; `before` goes on with it."""
        if not copies:
            return
        self.finish()
        self._follow(self._in, self._out)
        self._issuing, self._issued, self._awaited, self.busy = self._by_layer(copies), 0, 0, True
        self.coming = {(copy.video, copy.frame) for copy in copies}
        self._issue(AHEAD)

    def before(self, layer: int) -> None:
        """Make the computation that is issued next wait until this layer's pages are back."""
        self._issue(layer + 1 + AHEAD)
        if layer >= self._awaited:
            if self._events:
                torch.cuda.current_stream(self._device).wait_event(self._events[layer])
            self._awaited = layer + 1
        self.busy = self._awaited < self._pages.layers

    def finish(self) -> None:
        """Issue what is left, and make the computation that is issued next wait for all of it."""
        if self.busy:
            self.before(self._pages.layers - 1)

    def hold_for_sent(self) -> None:
        """Make the computation that is issued next wait until pages that leave may be overwritten."""
        if self._out is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._out)

    def drain(self) -> None:
        """Wait on the host until no copy is under way: it is about to touch records itself."""
        self.finish()
        for stream in (self._in, self._out):
            if stream is not None:
                stream.synchronize()

    def sent(self) -> torch.cuda.Event | None:
        """Is passed when all pages sent so far have arrived; None: they have."""
        if self._out is None:
            return None
        event = torch.cuda.Event()
        event.record(self._out)
        return event

    def attends(self, layer: int) -> None:
        """Note that the attention of a layer is issued."""
        if self.timeline is not None:
            self.timeline.append(Event("attend", layer))

    def _by_layer(self, copies: Sequence[Copy]) -> Iterator[None]:
        for layer in range(self._pages.layers):
            with _on(self._in):
                for copy in copies:
                    for at in self._pages.bring(copy.slot, copy.record, layer):
                        self._note("in", at, copy)
                if self._events:
                    self._events[layer].record()
            yield

    def _issue(self, layers: int) -> None:
        """Issue the copies of the first `layers` layers, as far as they are not."""
        while self._issued < min(layers, self._pages.layers):
            next(self._issuing)
            self._issued += 1
        if self._issued == self._pages.layers:
            self.coming = set()

    def _follow(self, stream: torch.cuda.Stream | None, other: torch.cuda.Stream | None) -> None:
        if stream is not None and other is not None:
            stream.wait_stream(torch.cuda.current_stream(self._device))
            stream.wait_stream(other)

    def _note(self, action: str, layer: int, copy: Copy) -> None:
        if self.timeline is not None:
            self.timeline.append(Event(action, layer, copy.frame, copy.video))


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
