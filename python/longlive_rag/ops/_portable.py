"""attend on devices without a kernel of ours: gather, rotate, and PyTorch's `scaled_dot_product_attention`.

The reference in attend.py is the definition and computes in float32 or wider. This path computes in the tensors' own
dtype, which is what matrix units are fast at, and takes a few heads at a time, so that the gathered copy of the pages
stays small. It serves AMD, Intel and Apple GPUs, NVIDIA GPUs that no kernel was compiled for, and CPUs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from longlive_rag.rotary import rotate_pairs

GATHERED_BYTES = 64 * 2**20
"""How much of the pages' keys, and as much again of their values, is gathered at a time, at least one head."""


def attend(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    positions: Tensor,
    query_position: Tensor,
    frequencies: Tensor,
    scale: float,
) -> Tensor:
    """`ops.attend` without its checks and without the log-sum-exp; arguments and result as there."""
    if not len(k_pages):
        return torch.zeros_like(q)
    out = torch.empty_like(q)
    for sample in range(q.shape[0]):
        _attend_sample(
            out[sample],
            q[sample],
            k_pages,
            v_pages,
            slots[sample],
            positions[sample],
            query_position[sample],
            frequencies,
            scale,
        )
    return out


def _attend_sample(
    out: Tensor,  # [F * T, H, D]
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,  # [N]
    positions: Tensor,
    query_position: Tensor,  # [F]
    frequencies: Tensor,
    scale: float,
) -> None:
    tokens, heads = k_pages.shape[2], q.shape[1]
    used = slots >= 0
    mask = None
    if slots.device.type == "cpu":
        # Here the table can be read without waiting for a device, and what is unused need not be gathered.
        slots, positions = slots[used], positions[used]
        if len(slots) == 0:
            out.zero_()
            return
    else:
        mask = used.repeat_interleave(tokens)[None]
        slots, positions = slots.clamp(min=0), positions.masked_fill(~used, 0)

    # Scores depend on differences of positions only. With the first query frame as the origin, the queries of a block
    # are turned by at most its length, and the angles of near keys stay small.
    origin = query_position[:1]
    query_turn = _rotation(query_position - origin, frequencies)[:, None]  # [F, 1, P, 2]
    key_turn = _rotation(positions - origin, frequencies)[:, None]
    head_bytes = len(slots) * tokens * q.shape[2] * q.element_size()
    step = max(1, min(heads, GATHERED_BYTES // max(1, head_bytes)))
    for first in range(0, heads, step):
        some = slice(first, min(heads, first + step))
        queries = _turn(q[:, some].unflatten(0, (-1, tokens)).permute(2, 0, 1, 3), query_turn)  # [h, F, T, D]
        keys, values = (
            pages[:, some].transpose(0, 1).index_select(1, slots)  # [h, N, T, D]
            for pages in (k_pages, v_pages)
        )
        result = F.scaled_dot_product_attention(
            queries.flatten(1, 2)[None],
            _turn(keys, key_turn).flatten(1, 2)[None],
            values.flatten(1, 2)[None],
            attn_mask=mask,
            scale=scale,
        )[0]
        if mask is not None:
            result = result.masked_fill(~used.any(), 0)  # PyTorch leaves open what a row without keys gives
        out[:, some] = result.transpose(0, 1)


def _rotation(distance: Tensor, frequencies: Tensor) -> Tensor:
    """Cosine and sine, float32 [n, P, 2], of integer distances [n] in float64 angles.

    Apple's GPUs have no float64; there the frequencies, and so the angles, are on the CPU.
    """
    angle = distance.to(frequencies.device)[:, None] * frequencies
    return torch.stack([angle.cos(), angle.sin()], dim=-1).to(torch.float32).to(distance.device)


def _turn(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the leading pairs of x [h, n, T, D] by rotation [n, 1, P, 2], rounding once."""
    pairs = rotation.shape[-2]
    if pairs == 0:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    turned = rotate_pairs(x[..., : 2 * pairs].to(wide), rotation.to(wide)).to(x.dtype)
    return torch.cat([turned, x[..., 2 * pairs :]], dim=-1)
