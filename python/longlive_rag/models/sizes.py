"""What a memory must know of a transformer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import nn


class TransformerSizes(Protocol):
    """What a transformer says of itself, as `CausalWanModel` does, so that a memory can be made for it."""

    num_layers: int
    num_heads: int
    head_dim: int

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights; the first one has the device and dtype of the keys."""
        ...

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of a latent frame of this size."""
        ...
