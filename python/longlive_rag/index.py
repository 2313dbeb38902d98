"""One embedding per finished latent frame, searchable."""

from __future__ import annotations

import torch
from torch import Tensor

from longlive_rag import ops
from longlive_rag.tiers import Entry


class LatentIndex:
    """Embeddings of the committed frames of a batch of videos, in the order of the frames.

    Storage doubles when it is full; the number of frames is unlimited.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.count = 0
        """Committed frames."""
        self.forgotten: set[Entry] = set()
        """Frames that may not come back, their keys and values being gone; `search` does not find them."""
        self._capacity = capacity
        self._keys: Tensor | None = None
        self._inverse_norms: Tensor | None = None

    @property
    def embeddings(self) -> Tensor:
        """[B, count, D], a view."""
        if self._keys is None:
            raise ValueError("the index is empty: no block has been committed yet")
        return self._keys[:, : self.count]

    @property
    def inverse_norms(self) -> Tensor:
        """Inverse norms of the embeddings, float32 [B, count], a view."""
        if self._inverse_norms is None:
            raise ValueError("the index is empty: no block has been committed yet")
        return self._inverse_norms[:, : self.count]

    def restore(self, embeddings: Tensor, inverse_norms: Tensor) -> None:
        """Hold these embeddings [B, N, D] and inverse norms [B, N], NaN for forgotten frames, of a saved index."""
        self.clear()
        self.put(0, embeddings)
        self.inverse_norms.copy_(inverse_norms)
        self.forgotten = {(video, frame) for video, frame in inverse_norms.isnan().nonzero().tolist()}

    def put(self, start: int, embeddings: Tensor) -> None:
        """Store the embeddings [B, F, D] of frames ``start ..``: append them, or replace those of a recomputed block.

        Raises:
            ValueError: `start` leaves a gap, or batch or width differ from what is stored.
        """
        if not 0 <= start <= self.count:
            raise ValueError(f"start must be 0 to {self.count}, the number of committed frames, got {start}")
        batch, frames, width = embeddings.shape
        end = start + frames
        if self._keys is None:
            self._allocate(embeddings, max(self._capacity, end))
        assert self._keys is not None and self._inverse_norms is not None
        if (batch, width) != (self._keys.shape[0], self._keys.shape[2]):
            raise ValueError(
                f"embeddings must be [{self._keys.shape[0]}, F, {self._keys.shape[2]}] like those stored, got "
                f"{list(embeddings.shape)}"
            )
        if end > self._keys.shape[1]:
            keys, inverse_norms = self._keys, self._inverse_norms
            self._allocate(embeddings, max(end, 2 * keys.shape[1]))
            self._keys[:, : self.count] = keys[:, : self.count]
            self._inverse_norms[:, : self.count] = inverse_norms[:, : self.count]
        self._keys[:, start:end] = embeddings
        norms = torch.linalg.vector_norm(embeddings, dim=-1, dtype=torch.promote_types(embeddings.dtype, torch.float32))
        torch.reciprocal(norms.clamp_min_(1e-12), out=self._inverse_norms[:, start:end])
        self.forgotten = {entry for entry in self.forgotten if entry[1] < start}
        self.count = end

    def _allocate(self, like: Tensor, capacity: int) -> None:
        self._keys = like.new_zeros(like.shape[0], capacity, like.shape[2])
        self._inverse_norms = torch.zeros(like.shape[0], capacity, dtype=torch.float32, device=like.device)

    def forget(self, video: int, frame: int) -> None:
        """The keys and values of a frame are gone: it keeps its embedding, but is not found any more."""
        assert self._inverse_norms is not None
        self._inverse_norms[video, frame] = torch.nan
        self.forgotten.add((video, frame))

    def search(self, query: Tensor, first: int | Tensor, last: int | Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k frames in ``first <= frame < last`` most similar to the query [B, D]; see `ops.retrieve`.

        Args:
            first, last: integers, or int32 tensors [B] on the index's device, which cost no transfer.
        """
        keys = self.embeddings
        assert self._inverse_norms is not None
        return ops.retrieve(query.to(keys.dtype), keys, self._inverse_norms[:, : self.count], first, last, k)

    def similarity(self, query: Tensor, frames: Tensor) -> Tensor:
        """Cosine similarity of the query [B, D] with stored `frames` int32 [B, K], float32; -inf where negative."""
        chosen = frames.clamp(min=0).long()
        keys = self.embeddings.gather(1, chosen[..., None].expand(-1, -1, query.shape[-1]))
        cosine = torch.cosine_similarity(query[:, None].float(), keys.float(), dim=-1)
        return cosine.masked_fill(frames < 0, -torch.inf)

    def clear(self) -> None:
        """Forget all frames, but keep the storage."""
        self.count = 0
        self.forgotten = set()
