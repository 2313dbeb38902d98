"""Rotary position embedding of the Wan family, split into a spatial and a temporal part.

Wan rotates the adjacent pairs (2i, 2i + 1) of every head. Of the ``head_dim / 2`` pairs the first ones turn with time,
then ``head_dim // 6`` with the row and as many with the column (22 + 21 + 21 for head_dim 128). A key is stored with
its spatial rotation only; the temporal one is applied to the query, by the difference of positions, when they meet.
"""

from __future__ import annotations

import torch
from torch import Tensor

THETA = 10000.0


def spatial_pairs(head_dim: int) -> int:
    """Number of trailing pairs of a head that turn with row and column."""
    return 2 * (head_dim // 6)


def temporal_pairs(head_dim: int) -> int:
    """Number of leading pairs of a head that turn with time."""
    return head_dim // 2 - spatial_pairs(head_dim)


def _frequencies(pairs: int) -> Tensor:
    """Radians per step of each pair, float64 [pairs]: theta ** (-i / pairs)."""
    return THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)


def spatial_frequencies(head_dim: int) -> Tensor:
    """Radians per row, and per column, of the spatial pairs, float64 [pairs / 2]."""
    return _frequencies(head_dim // 6)


def spatial_rotation(rows: int, columns: int, head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """Cosine and sine of the spatial pairs for each token of a frame, float32 [rows * columns, pairs, 2]."""
    frequencies = spatial_frequencies(head_dim)
    by_row = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
    by_column = torch.arange(columns, dtype=torch.float64)[:, None] * frequencies
    angle = torch.cat(
        [by_row[:, None].expand(-1, columns, -1), by_column[None].expand(rows, -1, -1)],
        dim=-1,
    ).flatten(0, 1)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).to(device=device, dtype=torch.float32)


def temporal_frequencies(head_dim: int, device: torch.device | str | None = None) -> Tensor:
    """Radians per frame of the temporal pairs, float64 [pairs].

    Float64, because an angle is a frequency times a frame distance: an hour of video is 14,400 latent frames, and
    float32 would be off by a milliradian there.
    """
    return _frequencies(temporal_pairs(head_dim)).to(device)


def rotate_pairs(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate adjacent pairs: x [..., 2 * pairs] by rotation [..., pairs, 2] (cosine, sine), in x's dtype."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.to(x.dtype).unbind(-1)
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)
