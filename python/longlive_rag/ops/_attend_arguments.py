"""The tensors that a call of attend takes, as one thing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Arguments(NamedTuple):
    """The tensors of `ops.attend`, in its order."""

    q: Tensor
    """[B, F * T, H, D]."""
    k_pages: Tensor
    """[S, H, T, D], as `v_pages`."""
    v_pages: Tensor
    slots: Tensor
    """[B, N] int32, as `positions`."""
    positions: Tensor
    query_position: Tensor
    """[B, F] int32."""
    frequencies: Tensor
    """[P] float64."""
