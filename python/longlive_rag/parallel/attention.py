"""Self-attention with the heads split over ranks: what a model that holds a share of the tokens is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from longlive_rag.parallel.shards import Shards

if TYPE_CHECKING:
    from longlive_rag.models.causal_wan import Attention


class ShardedAttention:
    """An attention over this rank's heads, for a model that runs on this rank's tokens.

    Args:
        attention: over all tokens and this rank's heads, such as a `RetrievalMemory` of as many heads.
        shards: this rank's share.
        tokens: T, of a latent frame.
    """

    def __init__(self, attention: Attention, shards: Shards, tokens: int) -> None:
        self.attention, self.shards, self.tokens = attention, shards, tokens

    def own_tokens(self, x: Tensor) -> Tensor:
        """This rank's tokens of x [B, F, T, C]."""
        return self.shards.own_tokens(x)

    def all_tokens(self, x: Tensor) -> Tensor:
        """The tokens [B, F, T, C] of all ranks from this rank's own."""
        return self.shards.all_tokens(x, self.tokens)

    def attend(
        self,
        layer: int,
        q: Tensor,  # [B, F, own tokens, H, D]
        k: Tensor,
        v: Tensor,
        *,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        eps: float,
    ) -> Tensor:  # [B, F * own tokens, H, D]
        """As `RetrievalMemory.attend`, of this rank's tokens. In 16 bits q and k are rounded once more than there:
        between their norm and their rotation they travel."""
        q, k, v = self.shards.to_heads(q, k, v, q_weight, k_weight, eps, self.tokens)
        out = self.attention.attend(layer, q, k, v, q_weight=None, k_weight=None, eps=eps)
        return self.shards.to_tokens(out, q.shape[1])
