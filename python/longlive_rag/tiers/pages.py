"""What the keys and values of one frame look like below the device: one contiguous range of bytes, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longlive_rag.budget import Bits


def frame_bytes(*, layers: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, bits: Bits = 16) -> int:
    """Bytes of keys and values that one latent frame of one video takes over all layers.

    Args:
        bits: 16 for pages as they are on the device, 8 or 4 for quantised ones below it.
    """
    return 2 * layers * heads * tokens * head_dim * dtype.itemsize


class Pages:
    """The page pools of the device, and how a page travels to a record below it and back.

    Args:
        k_pages, v_pages: per layer [slots, heads, tokens, head_dim]; the lists may get other tensors later.
        bits: of the records.
    """

    def __init__(self, k_pages: list[Tensor], v_pages: list[Tensor], bits: Bits) -> None:
        self.k_pages, self.v_pages, self.bits = k_pages, v_pages, bits
        page = k_pages[0]
        self.layers, self._shape, self.dtype, self.device = len(k_pages), page.shape[1:], page.dtype, page.device
        heads, tokens, head_dim = self._shape
        sizes = {"layers": self.layers, "heads": heads, "tokens": tokens, "head_dim": head_dim, "dtype": self.dtype}
        self.page_bytes = frame_bytes(**sizes)  # type: ignore[arg-type]
        """Of one video's frame on the device."""
        self.record_bytes = frame_bytes(**sizes, bits=bits)  # type: ignore[arg-type]
        """Of one video's frame below it."""

    def send(self, slot: int, record: Tensor) -> Iterator[int]:
        """Copy a page of every layer into a record, uint8 [record_bytes]; yields the layer of each copy."""
        for layer, halves in enumerate(self._halves(record)):
            for pool, half in zip((self.k_pages[layer], self.v_pages[layer]), halves, strict=True):
                half.copy_(pool[slot], non_blocking=True)
                yield layer

    def bring(self, slot: int, record: Tensor, layer: int) -> Iterator[int]:
        """Copy one layer of a record back into its pages; yields the layer once a copy."""
        halves = self._halves(record)[layer]
        for pool, half in zip((self.k_pages[layer], self.v_pages[layer]), halves, strict=True):
            pool[slot].copy_(half, non_blocking=True)
            yield layer

    def _halves(self, record: Tensor) -> Tensor:
        """[layers, 2, heads, tokens, head_dim], a view."""
        return record.view(self.dtype).view(self.layers, 2, *self._shape)
