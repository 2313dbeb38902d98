"""attend on devices without a kernel of ours: gather, rotate, and PyTorch's `scaled_dot_product_attention`.

The reference in attend.py is the definition and computes in float32 or wider. This path computes in the tensors' own
dtype, which is what matrix units are fast at, and takes a few samples or heads at a time, so that the gathered copy of
the pages stays small. It serves AMD, Intel and Apple GPUs, NVIDIA GPUs that no kernel was compiled for, and CPUs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag.ops._attend_arguments import Arguments
from longlive_rag.rotary import rotate_pairs

GATHERED_BYTES = 64 * 2**20
"""How much of the pages' keys, and as much again of their values, is gathered at a time, at least one head of one
sample."""


def attend(arguments: Arguments, scale: float) -> Tensor:
    """`ops.attend` without its checks and without the log-sum-exp; arguments and result as there."""
    q, k_pages, v_pages, slots, positions, query_position, frequencies = arguments
    batch, _, heads, head_dim = q.shape
    tokens = k_pages.shape[2]
    used = slots >= 0
    if slots.device.type == "cpu":
        # Here the table can be read without waiting for a device, and what no sample uses need not be gathered.
        columns = used.any(dim=0)
        slots, positions, used = slots[:, columns], positions[:, columns], used[:, columns]
    if slots.shape[1] == 0 or not len(k_pages):
        return torch.zeros_like(q)
    # A mask even where every page is used: without one, PyTorch's CPU kernel (2.5.1; 2.13 for few keys) turns a row of
    # NaN scores into zeros. It costs at most 1% there.
    mask = used.repeat_interleave(tokens, dim=1)[:, None, None]  # [B, 1, 1, N * T]
    slots, positions = slots.clamp(min=0), positions.masked_fill(~used, 0)

    # Scores depend on differences of positions only. With the first query frame as the origin, the queries of a block
    # are turned by at most its length, and the angles of near keys stay small.
    origin = query_position[:, :1]
    query_turn, key_turn = (
        _rotation(position - origin, frequencies)[:, None, :, None]  # [B, 1, n, 1, P, 2]
        for position in (query_position, positions)
    )
    out = torch.empty_like(q)
    head = torch.arange(heads, device=slots.device)
    head_bytes = slots.shape[1] * tokens * head_dim * q.element_size()
    fitting = max(1, GATHERED_BYTES // head_bytes)
    sample_step, head_step = max(1, fitting // heads), min(heads, fitting)
    for some in (slice(first, first + sample_step) for first in range(0, batch, sample_step)):
        some_slots = slots[some]
        for part in (slice(first, first + head_step) for first in range(0, heads, head_step)):
            queries = q[some, :, part].unflatten(1, (-1, tokens)).permute(0, 3, 1, 2, 4)  # [b, h, F, T, D]
            # Rows of the whole pool, since index_select on the CPU first copies a source that is not contiguous.
            rows = some_slots[:, None] * heads + head[part, None]  # [b, h, N]
            keys, values = (
                pages.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)  # [b, h, N, T, D]
                for pages in (k_pages, v_pages)
            )
            result = F.scaled_dot_product_attention(
                _turn(queries, query_turn[some]).flatten(2, 3),
                _turn(keys, key_turn[some]).flatten(2, 3),
                values.flatten(2, 3),
                attn_mask=mask[some],
                scale=scale,
            )
            # PyTorch leaves open what a row without keys gives.
            result = result.masked_fill(~used[some].any(dim=1)[:, None, None, None], 0)
            out[some, :, part] = result.transpose(1, 2)
    return out


def _rotation(distance: Tensor, frequencies: Tensor) -> Tensor:
    """Cosine and sine, float32 [B, n, P, 2], of integer distances [B, n] in float64 angles.

    Apple's GPUs have no float64; there the frequencies, and so the angles, are on the CPU.
    """
    angle = distance.to(frequencies.device)[..., None] * frequencies
    return torch.stack([angle.cos(), angle.sin()], dim=-1).to(torch.float32).to(distance.device)


def _turn(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the leading pairs of x [b, h, n, T, D] by rotation [b, 1, n, 1, P, 2], rounding once."""
    pairs = rotation.shape[-2]
    if pairs == 0:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = rotate_pairs(x[..., : 2 * pairs].to(wide), rotation.to(wide)).to(x.dtype)
    return torch.cat([turned, x[..., 2 * pairs :]], dim=-1)
