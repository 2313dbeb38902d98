"""A memory of a share of the heads, for a model that computes everything but its attention on every rank."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from longlive_rag.memory import RetrievalMemory
from longlive_rag.parallel.agreement import Agreement, SharedSelection
from longlive_rag.parallel.shards import Shards, normalised
from longlive_rag.selection import Selection


class HeadShardedMemory(RetrievalMemory):
    """Takes queries, keys and values of all heads, holds and attends with this rank's, and returns all.

    Args:
        shards: this rank's share of the heads.
        selection: which frames come back, as the first rank decides.
        settings: more of `RetrievalMemory`, without the number of heads.
    """

    def __init__(self, shards: Shards, *, selection: Selection | None, **settings: Any) -> None:
        super().__init__(heads=shards.heads, selection=SharedSelection(selection, shards), **settings)
        self._shards, self._agreement = shards, Agreement(shards)

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        q_weight: Tensor | None = None,
        k_weight: Tensor | None = None,
        eps: float = 1e-6,
    ) -> Tensor:
        """As `RetrievalMemory.attend`, of all heads."""
        q, k = normalised(q, q_weight, eps), normalised(k, k_weight, eps)  # over all heads
        own = (self._shards.own_heads(x) for x in (q, k, v))
        return self._shards.all_heads(super().attend(layer, *own, eps=eps))

    def attend_part(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """As `RetrievalMemory.attend_part`, of all heads."""
        out, lse = super().attend_part(layer, *(self._shards.own_heads(x) for x in (q, k, v)))
        return self._shards.all_heads(out), self._shards.all_heads(lse[..., None])[..., 0]

    def rewrite(self, layer: int, frames: Iterable[int], k: Tensor, v: Tensor) -> None:
        """As `RetrievalMemory.rewrite`, of all heads."""
        super().rewrite(layer, frames, self._shards.own_heads(k), self._shards.own_heads(v))

    def commit(self, latents: Tensor) -> Tensor:
        """As `RetrievalMemory.commit`.

        Raises:
            RuntimeError: the ranks do not agree on the block before.
        """
        self._agreement.check()
        self._agreement.note(self.plan.start, latents, self.bank.forgotten)
        return super().commit(latents)
