"""What the keys and values of one frame look like below the device: one contiguous range of bytes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from longlive_rag import ops
from longlive_rag.budget import Bits

ALL = -1
"""In place of a layer: all of them in one copy."""


def frame_bytes(*, layers: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, bits: Bits = 16) -> int:
    """Bytes of keys and values that one latent frame of one video takes over all layers.

    Args:
        bits: 16 for pages as they are on the device, 8 or 4 for packed ones below it (`ops.pack`).
    """
    if bits == 16:
        return 2 * layers * heads * tokens * head_dim * dtype.itemsize
    return ops.packed_bytes(layers, heads, tokens, head_dim, bits)


class Pages:
    """The page pools of the device, and how a page travels to a record below it and back.

    Args:
        k_pages, v_pages: per layer [slots, heads, tokens, head_dim]; the lists may get other tensors later.
        bits: of the records; with 8 or 4, the device holds one packed frame and one packed layer on their way.
    """

    def __init__(self, k_pages: list[Tensor], v_pages: list[Tensor], bits: Bits) -> None:
        self._k_pages, self._v_pages, self._bits = k_pages, v_pages, bits
        page = k_pages[0]
        self.layers, self._shape, self.dtype, self.device = len(k_pages), page.shape[1:], page.dtype, page.device
        heads, tokens, head_dim = self._shape
        of_layer = partial(frame_bytes, layers=1, heads=heads, tokens=tokens, head_dim=head_dim, dtype=self.dtype)
        self.page_bytes = self.layers * of_layer()
        """Of one video's frame on the device."""
        self._layer_bytes = of_layer(bits=bits)
        self.record_bytes = self.layers * self._layer_bytes
        """Of one video's frame below it."""
        self._leaving: Tensor | None = None
        self._coming: Tensor | None = None

    def send(self, slot: int, record: Tensor) -> Iterator[int]:
        """Copy a page of every layer into a record, uint8 [record_bytes]; yields the layer of each copy, or `ALL`."""
        if self._bits != 16:
            if record.device == self.device:
                ops.pack(self._k_pages, self._v_pages, slot, self._bits, out=record)
            else:
                if self._leaving is None:
                    self._leaving = torch.empty(self.record_bytes, dtype=torch.uint8, device=self.device)
                ops.pack(self._k_pages, self._v_pages, slot, self._bits, out=self._leaving)
                record.copy_(self._leaving, non_blocking=True)
            yield ALL
            return
        for layer, halves in enumerate(self._halves(record)):
            for pool, half in zip((self._k_pages[layer], self._v_pages[layer]), halves, strict=True):
                half.copy_(pool[slot], non_blocking=True)
                yield layer

    def bring(self, slot: int, record: Tensor, layer: int) -> Iterator[int]:
        """Copy one layer of a record back into its pages; yields the layer once a copy."""
        if self._bits != 16:
            part = record[layer * self._layer_bytes : (layer + 1) * self._layer_bytes]
            if record.device != self.device:
                if self._coming is None:
                    self._coming = torch.empty_like(part, device=self.device)
                part = self._coming.copy_(part, non_blocking=True)
            ops.unpack(part, self._k_pages[layer : layer + 1], self._v_pages[layer : layer + 1], slot, self._bits)
            yield layer
            return
        halves = self._halves(record)[layer]
        for pool, half in zip((self._k_pages[layer], self._v_pages[layer]), halves, strict=True):
            pool[slot].copy_(half, non_blocking=True)
            yield layer

    @property
    def shape(self) -> tuple[int, ...]:
        """[layers, keys and values, heads, tokens, head_dim], of one video's frame."""
        return (self.layers, 2, *self._shape)

    def unpacked(self, record: Tensor) -> Tensor:
        """What a record in host memory holds, of `shape`, as a copy."""
        if self._bits == 16:
            return self._halves(record).clone()
        pages = torch.empty(self.shape, dtype=self.dtype)
        k_pages, v_pages = ([page[None] for page in half] for half in pages.unbind(1))
        ops.unpack(record, k_pages, v_pages, 0, self._bits)
        return pages

    def _halves(self, record: Tensor) -> Tensor:
        """[layers, 2, heads, tokens, head_dim], a view."""
        return record.view(self.dtype).view(self.layers, 2, *self._shape)
