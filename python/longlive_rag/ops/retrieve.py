"""retrieve: the stored frames most similar to a query."""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag.ops import _cuda
from longlive_rag.ops._library import FLOATING, Check, check_no_grad, define

MAX_K = 64

MAX_WIDTH = 4096
"""Widest embedding the CUDA kernel takes (kRetrieveMaxWidth of csrc/cuda/retrieve.h)."""

_check = Check("retrieve", first="query")


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
        TypeError, ValueError: an argument has the wrong dtype, shape or device, or requires grad.

    Source: LongLive-RAG (arXiv 2606.02553), section 3.
    """
    if torch.is_grad_enabled():
        check_no_grad("retrieve", query=query, keys=keys, inverse_norms=inverse_norms)
    batch, width = _check("query", query, None, FLOATING, "[B, D]", (None, None))
    device = query.device
    _, count, _ = _check("keys", keys, device, (query.dtype,), "[B, N, D]", (batch, None, width))
    _check("inverse_norms", inverse_norms, device, (torch.float32,), "[B, N]", (batch, count))
    if not 1 <= k <= MAX_K:
        raise ValueError(f"retrieve: k must be 1 to {MAX_K}, got {k}")
    bounds = (_bound(name, bound, batch, device) for name, bound in (("first", first), ("last", last)))
    return _retrieve(query, keys, inverse_norms, *bounds, k)


def _bound(name: str, bound: int | Tensor, batch: int, device: torch.device) -> Tensor:
    if not isinstance(bound, Tensor):
        return torch.full((batch,), bound, dtype=torch.int32, device=device)
    if bound.shape not in ((), (batch,)):
        raise ValueError(f"retrieve: {name} must be an int or have shape [] or [{batch}], got {list(bound.shape)}")
    _check(name, bound, device, (torch.int32,), "[] or [B]", bound.shape)
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


def _takes(query: Tensor, *_: object) -> bool:
    """What csrc/cuda/retrieve.cuh handles."""
    return query.dtype in _cuda.DTYPE_CODES and query.shape[1] % 8 == 0 and 0 < query.shape[1] <= MAX_WIDTH


def _kernel(
    extension: ModuleType,
    query: Tensor,
    keys: Tensor,
    inverse_norms: Tensor,
    first: Tensor,
    last: Tensor,
    k: int,
) -> tuple[Tensor, Tensor]:
    indices, similarity = _fake(query, keys, inverse_norms, first, last, k)
    query = query.contiguous()
    keys = _cuda.aligned(keys if keys.stride(2) == 1 else keys.contiguous(), 2)
    inverse_norms = inverse_norms if inverse_norms.stride(1) == 1 else inverse_norms.contiguous()
    device, stream = _cuda.queue(query.device)
    workspace = _cuda.workspace(extension.retrieve_workspace(*keys.shape[:2], k, device), query)
    extension.retrieve(
        query.data_ptr(),
        keys.data_ptr(),
        inverse_norms.data_ptr(),
        first.data_ptr(),
        last.data_ptr(),
        indices.data_ptr(),
        similarity.data_ptr(),
        _cuda.address(workspace),
        keys.shape,
        keys.stride(),
        inverse_norms.stride(0),
        first.stride(0),
        last.stride(0),
        k,
        _cuda.DTYPE_CODES[query.dtype],
        device,
        stream,
    )
    return indices, similarity


_retrieve = define(
    "retrieve(Tensor query, Tensor keys, Tensor inverse_norms, Tensor first, Tensor last, int k) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    takes=_takes,
    checked_as="retrieve",
)
