"""retrieve: the stored frames most similar to a query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag.ops import _cuda
from longlive_rag.ops._library import FLOATING, LIBRARY, check_dtype, check_shape, check_tensors

MAX_K = 64

MAX_WIDTH = 4096
"""Widest embedding the CUDA kernel takes (kRetrieveMaxWidth of csrc/cuda/retrieve.h)."""

_SEARCH = "Tensor query, Tensor keys, Tensor inverse_norms, Tensor first, Tensor last, int k"
LIBRARY.define(f"retrieve({_SEARCH}) -> (Tensor, Tensor)")
LIBRARY.define(f"retrieve_into({_SEARCH}, Tensor frame_slots, Tensor(a!) slots) -> (Tensor, Tensor)")


def retrieve(
    query: Tensor,  # [B, D]
    keys: Tensor,  # [B, N, D]
    inverse_norms: Tensor,  # [B, N] float32
    first: int | Tensor,  # int32 [] or [B]
    last: int | Tensor,  # int32 [] or [B]
    k: int,
    *,
    frame_slots: Tensor | None = None,  # [B, N] int32
    slots: Tensor | None = None,  # [B, k] int32
) -> tuple[Tensor, Tensor]:
    """Top k by cosine similarity among the candidates ``first <= i < last`` of each sample.

    Args:
        query: one embedding per sample.
        keys: stored embeddings, in the query's dtype.
        inverse_norms: 1 / |key|, kept from when the key was stored.
        first, last: the candidate range. As tensors they are read on the device, so a captured graph can replay with
            new values.
        k: how many, 1 to 64.
        frame_slots, slots: with both, the page of each result, ``frame_slots[b, index]``, is written to `slots` too, -1
            where there is none. `slots` may be the memory's columns of the table that `attend` reads: then what was
            found reaches attention without leaving the device.

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
    bounds = [_bound(name, bound, batch, query.device) for name, bound in (("first", first), ("last", last))]
    if frame_slots is None and slots is None:
        return torch.ops.longlive_rag.retrieve(query, keys, inverse_norms, *bounds, k)
    if frame_slots is None or slots is None:
        raise ValueError("retrieve: frame_slots and slots must be given together, got only one of them")
    check_tensors("retrieve", query=query, frame_slots=frame_slots, slots=slots)
    for name, table in (("frame_slots", frame_slots), ("slots", slots)):
        check_dtype("retrieve", name, table, torch.int32)
    check_shape("retrieve", "frame_slots", frame_slots, "[B, N]", batch, keys.shape[1])
    check_shape("retrieve", "slots", slots, "[B, k]", batch, k)
    return torch.ops.longlive_rag.retrieve_into(query, keys, inverse_norms, *bounds, k, frame_slots, slots)


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


def _reference_into(
    query: Tensor,
    keys: Tensor,
    inverse_norms: Tensor,
    first: Tensor,
    last: Tensor,
    k: int,
    frame_slots: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    indices, similarity = _reference(query, keys, inverse_norms, first, last, k)
    if frame_slots.shape[1] == 0:
        slots.fill_(-1)
    else:
        slots.copy_(frame_slots.gather(1, indices.clamp(min=0).long()).masked_fill(indices < 0, -1))
    return indices, similarity


def _fake(
    query: Tensor, keys: Tensor, inverse_norms: Tensor, first: Tensor, last: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    shape = (query.shape[0], k)
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape, dtype=torch.float32)


def _fake_into(
    query: Tensor,
    keys: Tensor,
    inverse_norms: Tensor,
    first: Tensor,
    last: Tensor,
    k: int,
    frame_slots: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    return _fake(query, keys, inverse_norms, first, last, k)


def _cuda_retrieve(
    query: Tensor, keys: Tensor, inverse_norms: Tensor, first: Tensor, last: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    if not _has_kernel(query):
        return _reference(query, keys, inverse_norms, first, last, k)
    return _launch(query, keys, inverse_norms, first, last, k, None, None)


def _cuda_retrieve_into(
    query: Tensor,
    keys: Tensor,
    inverse_norms: Tensor,
    first: Tensor,
    last: Tensor,
    k: int,
    frame_slots: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    if not _has_kernel(query) or slots.stride(1) != 1:
        return _reference_into(query, keys, inverse_norms, first, last, k, frame_slots, slots)
    return _launch(query, keys, inverse_norms, first, last, k, frame_slots, slots)


def _has_kernel(query: Tensor) -> bool:
    """What csrc/cuda/retrieve.cuh handles; the rest is left to the reference."""
    return query.dtype in _cuda.DTYPE_CODES and query.shape[1] % 8 == 0 and 0 < query.shape[1] <= MAX_WIDTH


def _launch(
    query: Tensor,
    keys: Tensor,
    inverse_norms: Tensor,
    first: Tensor,
    last: Tensor,
    k: int,
    frame_slots: Tensor | None,
    slots: Tensor | None,
) -> tuple[Tensor, Tensor]:
    indices, similarity = _fake(query, keys, inverse_norms, first, last, k)
    batch, count, width = keys.shape
    list_bytes = _cuda.call("retrieve_list_bytes", query.device, batch, count, k)
    lists = query.new_empty(list_bytes, dtype=torch.uint8)
    finished_blocks = _cuda.zero_counters(query.device, batch)
    query, keys = query.contiguous(), _cuda.aligned(keys, 2)
    inverse_norms = inverse_norms if inverse_norms.stride(1) == 1 else inverse_norms.contiguous()
    if frame_slots is not None and frame_slots.stride(1) != 1:
        frame_slots = frame_slots.contiguous()
    tensors = (query, keys, inverse_norms, first, last, frame_slots, indices, similarity, slots, finished_blocks, lists)
    batch_strides = (0 if table is None else table.stride(0) for table in (inverse_norms, frame_slots, slots))
    _cuda.launch(
        "retrieve",
        query.device,
        *map(_cuda.address, tensors),
        (*keys.stride()[:2], *batch_strides, first.stride(0), last.stride(0)),
        (batch, count, width),
        k,
        _cuda.DTYPE_CODES[query.dtype],
    )
    return indices, similarity


LIBRARY.impl("retrieve", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("retrieve_into", _reference_into, "CompositeExplicitAutograd")
torch.library.register_fake("longlive_rag::retrieve", _fake, lib=LIBRARY)
torch.library.register_fake("longlive_rag::retrieve_into", _fake_into, lib=LIBRARY)

if _cuda.available():
    LIBRARY.impl("retrieve", _cuda_retrieve, "CUDA")
    LIBRARY.impl("retrieve_into", _cuda_retrieve_into, "CUDA")
