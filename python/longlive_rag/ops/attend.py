"""attend: attention over gathered pages."""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag import native
from longlive_rag.ops import _cuda
from longlive_rag.ops._library import FLOATING, LIBRARY, check_dtype, check_shape, check_tensors
from longlive_rag.rotary import rotate_pairs

_ARGUMENTS = (
    "Tensor q, Tensor k_pages, Tensor v_pages, Tensor slots, Tensor positions, Tensor query_position, Tensor frequencies, "
    "float scale"
)
LIBRARY.define(f"attend({_ARGUMENTS}) -> Tensor")
LIBRARY.define(f"attend_with_lse({_ARGUMENTS}) -> (Tensor, Tensor)")


@overload
def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_position: Tensor,
    frequencies: Tensor,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_position: Tensor,
    frequencies: Tensor,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def attend(
    q: Tensor,  # [B, F * T, H, D]
    k_pages: Tensor,  # [S, H, T, D]
    v_pages: Tensor,  # [S, H, T, D]
    slots: Tensor,  # [B, N] int32
    positions: Tensor,  # [B, N] int32
    query_position: Tensor,  # [B, F] int32
    frequencies: Tensor,  # [P] float64
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of F frames of queries over the pages that a table names, without gathering or rewriting them.

    A query frame f meets page n at the temporal distance ``query_position[f] - positions[n]``; scores are those of the
    query whose first P pairs are turned by that distance times `frequencies`, against the key as stored. The softmax runs
    over all tokens of all used pages of the sample.

    Args:
        q: queries of F frames of T tokens, normalised and spatially rotated (`insert` returns them so), contiguous.
        k_pages, v_pages: the page pools in q's dtype, contiguous.
        slots: page of each table entry; negative: unused. The order of the entries does not matter.
        positions: temporal position of each entry, ignored where unused.
        query_position: temporal position of each query frame.
        frequencies: radians per frame of the first P pairs of each head (`rotary.temporal_frequencies`).
        scale: of the scores, positive; default 1 / sqrt(D).
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        [B, F * T, H, D] in q's dtype; with `return_lse` also float32 [B, F * T, H]. A sample whose entries are all
        unused gets zeros (and -inf).

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout.

    Source: the identity of docs/architecture.md, "Positions"; LongLive-RAG (arXiv 2606.02553), section 3.
    """
    _check(q, k_pages, v_pages, slots, positions, query_position, frequencies)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"attend: scale must be positive and finite, got {scale}")
    arguments = (q, k_pages, v_pages, slots, positions, query_position, frequencies, scale)
    operation = torch.ops.longlive_rag.attend_with_lse if return_lse else torch.ops.longlive_rag.attend
    return operation(*arguments)


def _check(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_position: Tensor,
    frequencies: Tensor,
) -> None:
    check_tensors(
        "attend", q=q, k_pages=k_pages, v_pages=v_pages, slots=slots, positions=positions,
        query_position=query_position, frequencies=frequencies,
    )  # fmt: skip
    check_dtype("attend", "q", q, *FLOATING)
    check_shape("attend", "q", q, "[B, F * T, H, D]", None, None, None, None)
    batch, length, heads, head_dim = q.shape
    check_shape("attend", "k_pages", k_pages, "[S, H, T, D]", None, heads, None, head_dim)
    pages, _, tokens, _ = k_pages.shape
    check_shape("attend", "v_pages", v_pages, "[S, H, T, D]", pages, heads, tokens, head_dim)
    check_dtype("attend", "k_pages", k_pages, q.dtype)
    check_dtype("attend", "v_pages", v_pages, q.dtype)
    for name, tensor in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if not tensor.is_contiguous():
            raise ValueError(f"attend: {name} must be contiguous, got strides {list(tensor.stride())}")
    if tokens == 0 or length % tokens:
        raise ValueError(f"attend: q must hold whole frames of {tokens} tokens (k_pages), got {length} queries")
    check_shape("attend", "slots", slots, "[B, N]", batch, None)
    check_shape("attend", "positions", positions, "[B, N]", batch, slots.shape[1])
    check_shape("attend", "query_position", query_position, "[B, F]", batch, length // tokens)
    for name, table in (("slots", slots), ("positions", positions), ("query_position", query_position)):
        check_dtype("attend", name, table, torch.int32)
    check_dtype("attend", "frequencies", frequencies, torch.float64)
    check_shape("attend", "frequencies", frequencies, "[P]", None)
    if 2 * frequencies.shape[0] > head_dim:
        raise ValueError(
            f"attend: frequencies turns {frequencies.shape[0]} pairs, but a head of {head_dim} has {head_dim // 2}"
        )


def _rotate_in_time(x: Tensor, position: Tensor, frequencies: Tensor) -> Tensor:
    """Turn the leading pairs of x [B, H, n, T, D] by position [B, n] times frequencies [P]."""
    angle = (position[..., None] * frequencies)[:, None, :, None]
    turned, still = x.split([2 * frequencies.shape[0], x.shape[-1] - 2 * frequencies.shape[0]], dim=-1)
    return torch.cat([rotate_pairs(turned, torch.stack([angle.cos(), angle.sin()], dim=-1)), still], dim=-1)


def _gather(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_position: Tensor,
    frequencies: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [B, H, L, D], keys and values [B, H, N * T, D], turned to a common origin, and which keys are used."""
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens = k_pages.shape[2]
    used = slots >= 0

    def pages(pool: Tensor) -> Tensor:
        gathered = pool[slots.clamp(min=0).long()].to(wide)  # [B, N, H, T, D]
        return gathered.masked_fill(~used[:, :, None, None, None], 0).transpose(1, 2)

    # Scores depend on differences of positions only, so any common origin gives the same; the first query frame's keeps
    # the angles small.
    origin = query_position[:, :1]
    queries = q.to(wide).unflatten(1, (-1, tokens)).permute(0, 3, 1, 2, 4)  # [B, H, F, T, D]
    queries = _rotate_in_time(queries, query_position - origin, frequencies)
    keys = _rotate_in_time(pages(k_pages), (positions - origin).masked_fill(~used, 0), frequencies)
    mask = used.repeat_interleave(tokens, dim=1)[:, None, None]
    return queries.flatten(2, 3), keys.flatten(2, 3), pages(v_pages).flatten(2, 3), mask


def _reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_position: Tensor,
    frequencies: Tensor,
    scale: float,
) -> Tensor:
    queries, keys, values, mask = _gather(q, k_pages, v_pages, slots, positions, query_position, frequencies)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    out = out.masked_fill(~mask.any(dim=-1, keepdim=True), 0)
    return out.transpose(1, 2).to(q.dtype).contiguous()


def _reference_with_lse(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_position: Tensor,
    frequencies: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    context = (q, k_pages, v_pages, slots, positions, query_position, frequencies)
    queries, keys, _, mask = _gather(*context)
    scores = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(dim=-1).transpose(1, 2).float().contiguous()
    return _reference(*context, scale), lse


def _fake(q: Tensor, *context: object) -> Tensor:
    return torch.empty_like(q)


def _fake_with_lse(q: Tensor, *context: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


def _cuda_attend(q: Tensor, *context: Any) -> Tensor:
    if not _has_kernel(q):
        return _reference(q, *context)
    out = torch.empty_like(q)
    _launch(out, None, q, *context)
    return out


def _cuda_attend_with_lse(q: Tensor, *context: Any) -> tuple[Tensor, Tensor]:
    if not _has_kernel(q):
        return _reference_with_lse(q, *context)
    out, lse = _fake_with_lse(q)
    _launch(out, lse, q, *context)
    return out, lse


def _has_kernel(q: Tensor) -> bool:
    """What csrc/cuda/attend_sm80.cuh handles; the rest, float32 above all, is left to the reference."""
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] in (64, 128)


class _Sizes(NamedTuple):
    """AttendShape of csrc/bindings.cpp, and the dtype."""

    shape: tuple[int, ...]
    dtype: int


def _launch(
    out: Tensor,
    lse: Tensor | None,
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_position: Tensor,
    frequencies: Tensor,
    scale: float,
) -> None:
    tables = [table.contiguous() for table in (slots, positions, query_position, frequencies)]
    q, k_pages, v_pages = (_cuda.aligned(tensor, 0) for tensor in (q, k_pages, v_pages))
    tensors = [q, k_pages, v_pages, *tables, out, lse]
    sizes = _Sizes((*q.shape, k_pages.shape[2], slots.shape[1], frequencies.shape[0]), _cuda.DTYPE_CODES[q.dtype])
    if _is_hopper(q.device) and _hopper_workspace(q.device, sizes) is not None:
        _launch_sm90(tensors, sizes, scale)
    else:
        _launch_sm80(tensors, sizes, scale)


def _launch_sm80(tensors: list[Tensor | None], sizes: _Sizes, scale: float) -> None:
    *shape, tokens, entries, pairs = sizes.shape
    addresses = map(_cuda.address, tensors)
    _cuda.launch("attend", _device(tensors), *addresses, tuple(shape), tokens, entries, pairs, sizes.dtype, scale)


def _launch_sm90(tensors: list[Tensor | None], sizes: _Sizes, scale: float, key_tile: int = 0) -> None:
    """`key_tile` as in csrc/cuda/attend_sm90.h; zero: as the kernel chooses."""
    device = _device(tensors)
    size = _hopper_workspace(device, sizes, key_tile)
    assert size is not None and tensors[1] is not None
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    addresses = map(_cuda.address, [*tensors, workspace])
    pages = tensors[1].shape[0]
    _cuda.launch("attend_sm90", device, *addresses, sizes.shape, pages, sizes.dtype, scale, key_tile)


def _device(tensors: list[Tensor | None]) -> torch.device:
    assert tensors[0] is not None
    return tensors[0].device


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    """Whether the device runs what is compiled for sm_90a, and that is compiled in."""
    if device.type != "cuda" or not hasattr(native.kernels(), "attend_sm90"):
        return False
    return torch.cuda.get_device_capability(device) == (9, 0)


@functools.lru_cache(maxsize=1024)
def _hopper_workspace(device: torch.device, sizes: _Sizes, key_tile: int = 0) -> int | None:
    """Bytes, or None if csrc/cuda/attend_sm90.cuh does not handle these sizes."""
    return _cuda.call("attend_sm90_workspace", device, sizes.shape, sizes.dtype, key_tile)


LIBRARY.impl("attend", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("attend_with_lse", _reference_with_lse, "CompositeExplicitAutograd")
torch.library.register_fake("longlive_rag::attend", _fake, lib=LIBRARY)
torch.library.register_fake("longlive_rag::attend_with_lse", _fake_with_lse, lib=LIBRARY)
if _cuda.available():
    LIBRARY.impl("attend", _cuda_attend, "CUDA")
    LIBRARY.impl("attend_with_lse", _cuda_attend_with_lse, "CUDA")
