"""retrieve: the stored frames most similar to a query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag.ops._library import FLOATING, LIBRARY, check_dtype, check_shape, check_tensors

MAX_K = 64

LIBRARY.define(
    "retrieve(Tensor query, Tensor keys, Tensor inverse_norms, Tensor first, Tensor last, int k) -> (Tensor, Tensor)"
)


def retrieve(
    query: Tensor,  # [B, D]
    keys: Tensor,  # [B, N, D]
    inverse_norms: Tensor,  # [B, N] float32
    first: int | Tensor,  # int32 [] or [B]
    last: int | Tensor,  # int32 [] or [B]
    k: int,
) -> tuple[Tensor, Tensor]:
    """Top k by cosine similarity among the candidates ``first <= i < last`` of each sample.

    Args:
        query: one embedding per sample.
        keys: stored embeddings, in the query's dtype.
        inverse_norms: 1 / |key|, kept from when the key was stored.
        first, last: the candidate range. As tensors they are read on the device, so a captured graph can replay with
            new values.
        k: how many, 1 to 64.

    Returns:
        indices int32 [B, k] and similarity float32 [B, k] in descending order; ties go to the lower index, NaN is never
        selected, and where there are fewer than k candidates the index is -1 and the similarity -inf.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape or device.

    Source: LongLive-RAG (arXiv 2606.02553), section 3.
    """
    check_tensors("retrieve", query=query, keys=keys, inverse_norms=inverse_norms)
    check_dtype("retrieve", "query", query, *FLOATING)
    check_dtype("retrieve", "keys", keys, query.dtype)
    check_dtype("retrieve", "inverse_norms", inverse_norms, torch.float32)
    check_shape("retrieve", "query", query, "[B, D]", None, None)
    batch, width = query.shape
    check_shape("retrieve", "keys", keys, "[B, N, D]", batch, None, width)
    check_shape("retrieve", "inverse_norms", inverse_norms, "[B, N]", batch, keys.shape[1])
    if not 1 <= k <= MAX_K:
        raise ValueError(f"retrieve: k must be 1 to {MAX_K}, got {k}")
    return torch.ops.longlive_rag.retrieve(
        query,
        keys,
        inverse_norms,
        _bound("first", first, batch, query.device),
        _bound("last", last, batch, query.device),
        k,
    )


def _bound(name: str, bound: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(bound, Tensor):
        return torch.full((batch,), bound, dtype=torch.int32, device=device)
    check_dtype("retrieve", name, bound, torch.int32)
    if bound.device != device:
        raise ValueError(f"retrieve: {name} is on {bound.device}, but query is on {device}; expected one device")
    if bound.shape not in ((), (batch,)):
        raise ValueError(f"retrieve: {name} must be an int or have shape [] or [{batch}], got {list(bound.shape)}")
    return bound.expand(batch)


def _reference(
    query: Tensor, keys: Tensor, inverse_norms: Tensor, first: Tensor, last: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    unit_query = F.normalize(query.to(wide), dim=-1)
    similarity = torch.einsum("bd,bnd->bn", unit_query, keys.to(wide)).float() * inverse_norms
    index = torch.arange(keys.shape[1], device=keys.device)
    candidate = (index >= first[:, None]) & (index < last[:, None]) & ~similarity.isnan()
    similarity = similarity.masked_fill(~candidate, -torch.inf)
    similarity, order = similarity.sort(dim=-1, descending=True, stable=True)
    missing = max(0, k - keys.shape[1])
    similarity = F.pad(similarity[:, :k], (0, missing), value=-torch.inf)
    order = F.pad(order[:, :k], (0, missing)).masked_fill(similarity == -torch.inf, -1)
    return order.to(torch.int32), similarity


def _fake(
    query: Tensor, keys: Tensor, inverse_norms: Tensor, first: Tensor, last: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape, dtype=torch.float32)


LIBRARY.impl("retrieve", _reference, "CompositeExplicitAutograd")
torch.library.register_fake("longlive_rag::retrieve", _fake, lib=LIBRARY)
