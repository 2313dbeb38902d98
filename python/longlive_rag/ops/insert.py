"""insert: write the keys and values of new frames into their pages."""

from __future__ import annotations

import torch
from torch import Tensor

from longlive_rag.ops import _cuda
from longlive_rag.ops._library import FLOATING, LIBRARY, check_dtype, check_shape, check_tensors
from longlive_rag.rotary import rotate_pairs

MAX_WIDTH = 16384
"""Largest H * D the CUDA kernel takes (kInsertMaxWidth of csrc/cuda/insert.h)."""

_FRAMES = (
    "Tensor k, Tensor v, Tensor? k_weight, Tensor rotation, Tensor(a!) k_pages, Tensor(b!) v_pages, "
    "Tensor slots, float eps"
)
LIBRARY.define(f"insert({_FRAMES}) -> ()")
LIBRARY.define(f"insert_with_query(Tensor q, Tensor? q_weight, {_FRAMES}) -> Tensor")


def insert(
    k: Tensor,  # [B, F, T, H, D]
    v: Tensor,  # [B, F, T, H, D]
    k_weight: Tensor | None,  # [H * D]
    rotation: Tensor,  # [T, P, 2] float32
    k_pages: Tensor,  # [S, H, T, D]
    v_pages: Tensor,  # [S, H, T, D]
    slots: Tensor,  # [B, F] int32
    eps: float = 1e-6,
    q: Tensor | None = None,  # [B, F, T, H, D]
    q_weight: Tensor | None = None,  # [H * D]
) -> Tensor | None:
    """Write new frames into the bank, normalised and with their spatial rotation.

    k becomes ``rotate(rms_norm(k) * k_weight)``, the norm taken over the whole model dimension H * D, and goes with v
    to the page ``slots[b, f]``. The temporal rotation is left to `attend`, so a page never has to be rewritten.
    Arithmetic is float32, rounded once.

    Args:
        k, v: keys and values of F new frames of T tokens. The last two dimensions must be contiguous; the strides over
            batch, frame and token are free, so slices of a fused projection need no copy.
        k_weight: weight of the RMS norm in float32 or k's dtype; None if k is normalised already.
        rotation: cosine and sine for the last P adjacent pairs of each head (`rotary.spatial_rotation`).
        k_pages, v_pages: the page pools, in k's dtype; written in place.
        slots: the page of each frame; negative: the frame is not written. Pages must be distinct.
        eps: epsilon of the norm.
        q, q_weight: queries of the same frames, treated like k but returned.

    Returns:
        The queries, normalised and spatially rotated, [B, F * T, H, D], or None without q.

    Raises:
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout.

    Source: LongLive-RAG (arXiv 2606.02553), section 3, with the rotation split as in docs/architecture.md.
    """
    _check(k, v, k_weight, rotation, k_pages, v_pages, slots, q, q_weight)
    frames = (k, v, k_weight, rotation, k_pages, v_pages, slots, eps)
    if q is None:
        torch.ops.longlive_rag.insert(*frames)
        return None
    return torch.ops.longlive_rag.insert_with_query(q, q_weight, *frames)


def _check(
    k: Tensor,
    v: Tensor,
    k_weight: Tensor | None,
    rotation: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    q: Tensor | None,
    q_weight: Tensor | None,
) -> None:
    check_tensors(
        "insert", k=k, v=v, k_weight=k_weight, rotation=rotation, k_pages=k_pages, v_pages=v_pages, slots=slots, q=q,
        q_weight=q_weight,
    )  # fmt: skip
    check_shape("insert", "k", k, "[B, F, T, H, D]", None, None, None, None, None)
    batch, frames, tokens, heads, head_dim = k.shape
    for name, tensor in (("k", k), ("v", v), ("q", q)):
        if tensor is None:
            continue
        check_dtype("insert", name, tensor, *(FLOATING if tensor is k else (k.dtype,)))
        check_shape("insert", name, tensor, "[B, F, T, H, D]", batch, frames, tokens, heads, head_dim)
        if tensor.stride(4) != 1 or tensor.stride(3) != head_dim:
            raise ValueError(
                f"insert: {name} must be contiguous over its last two dimensions [H, D], "
                f"got strides {list(tensor.stride())}"
            )
    for name, weight in (("k_weight", k_weight), ("q_weight", q_weight)):
        if weight is not None:
            check_dtype("insert", name, weight, torch.float32, k.dtype)
            check_shape("insert", name, weight, "[H * D]", heads * head_dim)
    check_dtype("insert", "rotation", rotation, torch.float32)
    check_shape("insert", "rotation", rotation, "[T, P, 2]", tokens, None, 2)
    if 2 * rotation.shape[1] > head_dim:
        raise ValueError(
            f"insert: rotation turns {rotation.shape[1]} pairs, but a head of {head_dim} has {head_dim // 2}"
        )
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        check_dtype("insert", name, pages, k.dtype)
        check_shape("insert", name, pages, "[S, H, T, D]", k_pages.shape[0], heads, tokens, head_dim)
        if not pages.is_contiguous():
            raise ValueError(f"insert: {name} must be contiguous, got strides {list(pages.stride())}")
    check_dtype("insert", "slots", slots, torch.int32)
    check_shape("insert", "slots", slots, "[B, F]", batch, frames)


def _normalise_and_rotate(x: Tensor, weight: Tensor | None, rotation: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        mean_square = wide.square().mean(dim=(-2, -1), keepdim=True)
        wide = wide * torch.rsqrt(mean_square + eps) * weight.to(wide.dtype).view(x.shape[-2:])
    unrotated = x.shape[-1] - 2 * rotation.shape[1]
    rotated = rotate_pairs(wide[..., unrotated:], rotation[:, None])
    return torch.cat([wide[..., :unrotated], rotated], dim=-1).to(x.dtype)


def _reference(
    k: Tensor,
    v: Tensor,
    k_weight: Tensor | None,
    rotation: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    eps: float,
) -> None:
    written = slots >= 0
    pages = slots[written].long()
    k_pages[pages] = _normalise_and_rotate(k, k_weight, rotation, eps).transpose(2, 3)[written]
    v_pages[pages] = v.transpose(2, 3)[written]


def _reference_with_query(q: Tensor, q_weight: Tensor | None, *frames: object) -> Tensor:
    _reference(*frames)  # type: ignore[arg-type]
    _, _, _, rotation, _, _, _, eps = frames
    return _normalise_and_rotate(q, q_weight, rotation, eps).flatten(1, 2)  # type: ignore[arg-type]


def _fake_with_query(q: Tensor, q_weight: Tensor | None, *frames: object) -> Tensor:
    batch, count, tokens, heads, head_dim = q.shape
    return q.new_empty(batch, count * tokens, heads, head_dim)


def _cuda_insert(
    k: Tensor,
    v: Tensor,
    k_weight: Tensor | None,
    rotation: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    eps: float,
) -> None:
    if _has_kernel(k, k_pages, v_pages):
        _launch(k, v, k_weight, rotation, k_pages, v_pages, slots, eps, None, None, None)
    else:
        _reference(k, v, k_weight, rotation, k_pages, v_pages, slots, eps)


def _cuda_insert_with_query(
    q: Tensor,
    q_weight: Tensor | None,
    k: Tensor,
    v: Tensor,
    k_weight: Tensor | None,
    rotation: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    eps: float,
) -> Tensor:
    if not _has_kernel(k, k_pages, v_pages):
        return _reference_with_query(q, q_weight, k, v, k_weight, rotation, k_pages, v_pages, slots, eps)
    q_out = _fake_with_query(q, q_weight)
    _launch(k, v, k_weight, rotation, k_pages, v_pages, slots, eps, q, q_weight, q_out)
    return q_out


def _has_kernel(k: Tensor, k_pages: Tensor, v_pages: Tensor) -> bool:
    """What csrc/cuda/insert.cuh handles; the rest is left to the reference."""
    heads, head_dim = k.shape[3:]
    aligned = k_pages.data_ptr() % 16 == 0 and v_pages.data_ptr() % 16 == 0
    return k.dtype in _cuda.DTYPE_CODES and head_dim % 8 == 0 and heads * head_dim <= MAX_WIDTH and aligned


def _launch(
    k: Tensor,
    v: Tensor,
    k_weight: Tensor | None,
    rotation: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    eps: float,
    q: Tensor | None,
    q_weight: Tensor | None,
    q_out: Tensor | None,
) -> None:
    rotation, slots = rotation.contiguous(), slots.contiguous()
    rows = []
    for tensor, weight in ((k, k_weight), (v, None), (q, q_weight)):
        tensor = None if tensor is None else _cuda.aligned(tensor, 3)
        rows.append((tensor, None if weight is None else weight.contiguous()))
    _cuda.launch(
        "insert",
        k.device,
        *map(_row_arguments, rows),
        *map(_cuda.address, (k_pages, v_pages, q_out, rotation, slots)),
        tuple(k.shape),
        rotation.shape[1],
        _cuda.DTYPE_CODES[k.dtype],
        eps,
    )


def _row_arguments(row: tuple[Tensor | None, Tensor | None]) -> tuple[int, int, int, int, int, bool]:
    tensor, weight = row
    b, f, t = (0, 0, 0) if tensor is None else tensor.stride()[:3]
    return _cuda.address(tensor), b, f, t, _cuda.address(weight), weight is not None and weight.dtype == torch.float32


LIBRARY.impl("insert", _reference, "CompositeExplicitAutograd")
LIBRARY.impl("insert_with_query", _reference_with_query, "CompositeExplicitAutograd")
torch.library.register_fake("longlive_rag::insert", lambda *frames: None, lib=LIBRARY)
torch.library.register_fake("longlive_rag::insert_with_query", _fake_with_query, lib=LIBRARY)
if _cuda.available():
    LIBRARY.impl("insert", _cuda_insert, "CUDA")
    LIBRARY.impl("insert_with_query", _cuda_insert_with_query, "CUDA")
