"""attend: attention over gathered pages."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, float64, int32

from longlive_rag.ops import _choice, _cuda, _portable
from longlive_rag.ops._attend_arguments import Arguments
from longlive_rag.ops._library import FLOATING, Check, check_no_grad, define
from longlive_rag.rotary import rotate_pairs

_check = Check("attend", first="q")


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
    query whose first P pairs are turned by that distance times `frequencies`, against the key as stored. The softmax
    runs over all tokens of all used pages of the sample.

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
        TypeError, ValueError: an argument has the wrong dtype, shape, device or layout, or requires grad.

    Source: the identity of docs/architecture.md, "Positions"; LongLive-RAG (arXiv 2606.02553), section 3.
    """
    if torch.is_grad_enabled():
        check_no_grad("attend", q=q, k_pages=k_pages, v_pages=v_pages)
    batch, length, heads, head_dim = _check("q", q, None, FLOATING, "[B, F * T, H, D]", (None,) * 4)
    device, dtypes, pages_form = q.device, (q.dtype,), "[S, H, T, D]"
    pages = _check("k_pages", k_pages, device, dtypes, pages_form, (None, heads, None, head_dim))
    _check("v_pages", v_pages, device, dtypes, pages_form, pages)
    for name, tensor in (("q", q), ("k_pages", k_pages), ("v_pages", v_pages)):
        if not tensor.is_contiguous():
            raise ValueError(f"attend: {name} must be contiguous, got strides {list(tensor.stride())}")
    tokens = pages[2]
    if tokens == 0 or length % tokens:
        raise ValueError(f"attend: q must hold whole frames of {tokens} tokens (k_pages), got {length} queries")
    table = _check("slots", slots, device, (int32,), "[B, N]", (batch, None))
    _check("positions", positions, device, (int32,), "[B, N]", table)
    _check("query_position", query_position, device, (int32,), "[B, F]", (batch, length // tokens))
    (pairs,) = _check("frequencies", frequencies, device, (float64,), "[P]", (None,))
    if 2 * pairs > head_dim:
        raise ValueError(f"attend: frequencies turns {pairs} pairs, but a head of {head_dim} has {head_dim // 2}")
    scale = head_dim**-0.5 if scale is None else float(scale)
    if not 0 < scale < float("inf"):
        raise ValueError(f"attend: scale must be positive and finite, got {scale}")
    out, lse = _attend(q, k_pages, v_pages, slots, positions, query_position, frequencies, scale, return_lse)
    return (out, lse) if return_lse else out


def _rotate_in_time(x: Tensor, position: Tensor, frequencies: Tensor) -> Tensor:
    """Turn the leading pairs of x [B, H, n, T, D] by position [B, n] times frequencies [P]."""
    angle = (position[..., None] * frequencies)[:, None, :, None]
    turned, still = x.split([2 * frequencies.shape[0], x.shape[-1] - 2 * frequencies.shape[0]], dim=-1)
    return torch.cat([rotate_pairs(turned, torch.stack([angle.cos(), angle.sin()], dim=-1)), still], dim=-1)


def _gather(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries [B, H, L, D], keys and values [B, H, N * T, D], turned to a common origin, and which keys are used."""
    q, k_pages, v_pages, slots, positions, query_position, frequencies = arguments
    wide = torch.promote_types(q.dtype, torch.float32)
    tokens = k_pages.shape[2]
    if not len(k_pages):  # no entry can be used
        slots, positions = slots[:, :0], positions[:, :0]
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


def definition(arguments: Arguments, scale: float) -> Tensor:
    queries, keys, values, mask = _gather(arguments)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    out = out.masked_fill(~mask.any(dim=-1, keepdim=True), 0).transpose(1, 2)
    return out.to(arguments.q.dtype).contiguous()


def _log_sum_exp(arguments: Arguments, scale: float) -> Tensor:
    queries, keys, _, mask = _gather(arguments)
    scores = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~mask, -torch.inf)
    return scores.logsumexp(dim=-1).transpose(1, 2).float().contiguous()


def _fake(q: Tensor, *context: Any) -> tuple[Tensor, Tensor | None]:
    *_, lse = context
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32) if lse else None


def _takes(q: Tensor, *_: object) -> bool:
    """What csrc/cuda/attend_sm80.cuh handles; the rest, float32 above all, is left to the reference."""
    return q.dtype in (torch.float16, torch.bfloat16) and q.shape[3] in (64, 128)


def _pytorch(*arguments: Any) -> tuple[Tensor, Tensor | None]:
    """What runs where no kernel does: the definition, or the same in the tensors' own dtype, which is faster."""
    *tensors, scale, lse = arguments
    inputs = Arguments(*tensors)
    if not inputs.q.numel():
        return _fake(inputs.q, lse)
    attention = _portable.attend if _choice.attend_is_portable(inputs.q.dtype) else definition
    return attention(inputs, scale), _log_sum_exp(inputs, scale) if lse else None


def _kernel(extension: ModuleType, *arguments: Any) -> tuple[Tensor, Tensor | None]:
    *tensors, scale, lse = arguments
    inputs = Arguments(*tensors)
    planned = plan(extension, inputs)
    kernel = _choice.attend_kernel(inputs.q.device, planned.kernel)
    if kernel is None:
        return _pytorch(*arguments)
    if kernel != planned.kernel:
        planned = plan(extension, inputs, kernel)
    out, sums = _fake(inputs.q, lse)
    launch(planned, out, sums, inputs, scale)
    return out, sums


def plan(extension: ModuleType, arguments: Arguments, kernel: str = "auto", key_tile: int = 0) -> Any:
    """`AttendPlan` of csrc/bindings.cpp: what a call decides by its sizes, decided once for all calls of these sizes.

    Args:
        extension: `native.kernels_on` the device.
        kernel, key_tile: `AttendOptions` of csrc/cuda/attend.h, for measurements and checks.
    """
    q, k_pages, _, slots, _, _, frequencies = arguments
    sizes = q.shape, k_pages.shape, slots.shape[1], frequencies.shape[0], _cuda.DTYPE_CODES[q.dtype]
    return _plan(extension, *sizes, kernel, key_tile, _cuda.queue(q.device)[0])


@functools.lru_cache(maxsize=256)
def _plan(extension: ModuleType, *sizes_and_options: Any) -> Any:
    return extension.AttendPlan(*sizes_and_options)


def launch(planned: Any, out: Tensor, lse: Tensor | None, arguments: Arguments, scale: float) -> None:
    """Launch a CUDA kernel on arguments that were checked.

    Args:
        planned: `plan` of these arguments.
        out, lse: where the results go; lse None: not wanted.
    """
    q, k_pages, v_pages, slots, positions, query_position, frequencies = arguments
    slots, positions, query_position = slots.contiguous(), positions.contiguous(), query_position.contiguous()
    frequencies = frequencies.contiguous()
    q, k_pages, v_pages = _cuda.aligned(q), _cuda.aligned(k_pages), _cuda.aligned(v_pages)
    workspace = _cuda.workspace(planned.workspace, q)
    planned.launch(
        q.data_ptr(),
        k_pages.data_ptr(),
        v_pages.data_ptr(),
        slots.data_ptr(),
        positions.data_ptr(),
        query_position.data_ptr(),
        frequencies.data_ptr(),
        out.data_ptr(),
        _cuda.address(lse),
        _cuda.address(workspace),
        scale,
        _cuda.queue(q.device)[1],
    )


_attend = define(
    "attend(Tensor q, Tensor k_pages, Tensor v_pages, Tensor slots, Tensor positions, Tensor query_position, "
    "Tensor frequencies, float scale, bool lse) -> (Tensor, Tensor?)",
    reference=_pytorch,
    fake=_fake,
    kernel=_kernel,
    takes=_takes,
)
