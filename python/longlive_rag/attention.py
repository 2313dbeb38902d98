"""Attention of a block over pages: insert its own, attend to all; arguments are checked once a block."""

from __future__ import annotations

import torch
from torch import Tensor

from longlive_rag import ops
from longlive_rag.tables import Tables

# The registered operations, without the checks of `ops`.
_insert, _attend = (getattr(torch.ops.longlive_rag, name).default for name in ("insert", "attend"))


class PagedAttention:
    """`ops.insert` and `ops.attend` of one layer.

    Args:
        rotation: cosine and sine of the spatial pairs (`ops.insert`).
        frequencies: radians per frame of the temporal pairs (`ops.attend`).
        head_dim: of the backbone.
    """

    def __init__(self, rotation: Tensor, frequencies: Tensor, head_dim: int) -> None:
        self.rotation, self.frequencies = rotation, frequencies
        self._scale = head_dim**-0.5
        # Of each layer, what its arguments looked like when they were checked, and its weights.
        self._looks: dict[int, tuple[object, ...]] = {}
        self._weights: dict[int, tuple[Tensor | None, Tensor | None]] = {}

    def expect_new_tables(self) -> None:
        """Check everything again: another block begins."""
        self._looks.clear()

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
        k_pages: Tensor,
        v_pages: Tensor,
        tables: Tables,
        lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """
        Raises:
            TypeError, ValueError: an argument has the wrong dtype, shape, device or layout, or requires grad.
        """
        context = (k_pages, v_pages, tables.slots, tables.positions, tables.query_positions, self.frequencies)
        checked = not torch.compiler.is_compiling()
        if checked:
            # Passes of a block differ in addresses alone. Whatever looks different is checked again.
            looks = (
                *(q.shape, q.stride(), q.dtype, q.device),
                *(k.shape, k.stride(), k.dtype, k.device),
                *(v.shape, v.stride(), v.dtype, v.device),
            )
            if self._looks.get(layer) == looks and not torch.is_grad_enabled():
                weights = self._weights[layer]
                if weights[0] is q_weight and weights[1] is k_weight:
                    turned = _insert(
                        k, v, k_weight, self.rotation, k_pages, v_pages, tables.block_slots, eps, q, q_weight
                    )
                    result: tuple[Tensor, Tensor | None] = _attend(turned, *context, self._scale, lse)
                    return result
        batch, frames = tables.block_slots.shape
        if k.shape[:2] != (batch, frames):
            raise ValueError(
                f"k must hold {batch} videos and the block's {frames} frames, [B, F, T, H, D], got {list(k.shape)}"
            )
        turned = ops.insert(k, v, k_weight, self.rotation, k_pages, v_pages, tables.block_slots, eps, q, q_weight)
        assert turned is not None
        result = ops.attend(turned, *context, return_lse=True) if lse else (ops.attend(turned, *context), None)
        if checked:
            self._looks[layer], self._weights[layer] = looks, (q_weight, k_weight)
        return result
