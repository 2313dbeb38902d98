"""insert: write the keys and values of new frames into their pages."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, float32

from longlive_rag.ops import _cuda
from longlive_rag.ops._library import FLOATING, Check, check_no_grad, define
from longlive_rag.rotary import rotate_pairs

MAX_WIDTH = 16384
"""Largest H * D the CUDA kernel takes (kInsertMaxWidth of csrc/cuda/insert.h)."""

_check = Check("insert", first="k")


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
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout, or requires grad.

    Source: LongLive-RAG (arXiv 2606.02553), section 3, with the rotation split as in docs/architecture.md.
    """
    if torch.is_grad_enabled():
        check_no_grad("insert", k=k, v=v, k_weight=k_weight, q=q, q_weight=q_weight)
    frames_form, pages_form, weight_form = "[B, F, T, H, D]", "[S, H, T, D]", "[H * D]"
    shape = _check("k", k, None, FLOATING, frames_form, (None,) * 5)
    batch, frames, tokens, heads, head_dim = shape
    device, dtypes, row = k.device, (k.dtype,), (head_dim, 1)
    _check("v", v, device, dtypes, frames_form, shape)
    if q is not None:
        _check("q", q, device, dtypes, frames_form, shape)
    for name, tensor in (("k", k), ("v", v), ("q", q)):
        if tensor is not None and tensor.stride()[3:] != row:
            raise ValueError(
                f"insert: {name} must be contiguous over its last two dimensions [H, D], "
                f"got strides {list(tensor.stride())}"
            )
    width, weight_dtypes = (heads * head_dim,), (float32, *dtypes)
    if k_weight is not None:
        _check("k_weight", k_weight, device, weight_dtypes, weight_form, width)
    if q_weight is not None:
        _check("q_weight", q_weight, device, weight_dtypes, weight_form, width)
    _, pairs, _ = _check("rotation", rotation, device, (float32,), "[T, P, 2]", (tokens, None, 2))
    if 2 * pairs > head_dim:
        raise ValueError(f"insert: rotation turns {pairs} pairs, but a head of {head_dim} has {head_dim // 2}")
    pages = _check("k_pages", k_pages, device, dtypes, pages_form, (None, heads, tokens, head_dim))
    _check("v_pages", v_pages, device, dtypes, pages_form, pages)
    if not (k_pages.is_contiguous() and v_pages.is_contiguous()):
        name, tensor = ("v_pages", v_pages) if k_pages.is_contiguous() else ("k_pages", k_pages)
        raise ValueError(f"insert: {name} must be contiguous, got strides {list(tensor.stride())}")
    _check("slots", slots, device, (torch.int32,), "[B, F]", (batch, frames))
    turned = _insert(k, v, k_weight, rotation, k_pages, v_pages, slots, eps, q, q_weight)
    return None if q is None else turned


def _normalise_and_rotate(x: Tensor, weight: Tensor | None, rotation: Tensor, eps: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if weight is not None:
        mean_square = wide.square().mean(dim=(-2, -1), keepdim=True)
        wide = wide * torch.rsqrt(mean_square + eps) * weight.to(wide.dtype).view(x.shape[-2:])
    unrotated = x.shape[-1] - 2 * rotation.shape[1]
    rotated = rotate_pairs(wide[..., unrotated:], rotation[:, None])
    return torch.cat([wide[..., :unrotated], rotated], dim=-1).to(x.dtype)


def _reference(*arguments: Any) -> Tensor:
    k, v, k_weight, rotation, k_pages, v_pages, slots, eps, q, q_weight = arguments
    written = slots >= 0
    pages = slots[written].long()
    k_pages[pages] = _normalise_and_rotate(k, k_weight, rotation, eps).transpose(2, 3)[written]
    v_pages[pages] = v.transpose(2, 3)[written]
    return k.new_empty(0) if q is None else _normalise_and_rotate(q, q_weight, rotation, eps).flatten(1, 2)


def _output(k: Tensor, q: Tensor | None) -> Tensor:
    batch, frames, tokens, heads, head_dim = k.shape
    return k.new_empty(0) if q is None else k.new_empty(batch, frames * tokens, heads, head_dim)


def _fake(*arguments: Any) -> Tensor:
    k, *_, q, _ = arguments
    return _output(k, q)


def _takes(*arguments: Any) -> bool:
    """What csrc/cuda/insert.cuh handles."""
    k, _, _, _, k_pages, v_pages, *_ = arguments
    heads, head_dim = k.shape[3:]
    aligned = k_pages.data_ptr() % 16 == 0 and v_pages.data_ptr() % 16 == 0
    return k.dtype in _cuda.DTYPE_CODES and head_dim % 8 == 0 and heads * head_dim <= MAX_WIDTH and aligned


def _kernel(extension: ModuleType, *arguments: Any) -> Tensor:
    k, v, k_weight, rotation, k_pages, v_pages, slots, eps, q, q_weight = arguments
    out = _output(k, q)
    k, v, q = _cuda.aligned(k, 3), _cuda.aligned(v, 3), None if q is None else _cuda.aligned(q, 3)
    k_weight = None if k_weight is None else k_weight.contiguous()
    q_weight = None if q_weight is None else q_weight.contiguous()
    rotation, slots = rotation.contiguous(), slots.contiguous()
    extension.insert(
        _rows(k, k_weight),
        _rows(v, None),
        (0, 0, 0, 0, 0, False) if q is None else _rows(q, q_weight),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        out.data_ptr(),
        rotation.data_ptr(),
        slots.data_ptr(),
        k.shape,
        rotation.shape[1],
        _cuda.DTYPE_CODES[k.dtype],
        eps,
        *_cuda.queue(k.device),
    )
    return out


def _rows(tensor: Tensor, weight: Tensor | None) -> tuple[int, int, int, int, int, bool]:
    batch, frame, token, _, _ = tensor.stride()
    if weight is None:
        return tensor.data_ptr(), batch, frame, token, 0, False
    return tensor.data_ptr(), batch, frame, token, weight.data_ptr(), weight.dtype is float32


# An operation that writes to its arguments may not return an optional tensor: torch.compile cannot functionalise it. So
# without q there is an empty one.
_insert = define(
    "insert(Tensor k, Tensor v, Tensor? k_weight, Tensor rotation, Tensor(a!) k_pages, Tensor(b!) v_pages, "
    "Tensor slots, float eps, Tensor? q, Tensor? q_weight) -> Tensor",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    takes=_takes,
    checked_as="insert",
)
