"""insert: normalise, rotate and store the K, V and Q of a block."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from longlive_rag import ops, rotary
from longlive_rag.bench.common import Case, Machine, Row

# heads, rows and columns of tokens, frames of a block; head_dim 128
CASES = {
    "Wan 1.3B, 480x832": (12, 30, 52, 3),
    "Wan 14B, 480x832": (40, 30, 52, 3),
    "Wan 14B, 720x1280": (40, 45, 80, 3),
}
CPU_CASES = {"2 heads, 8 x 12 tokens": (2, 8, 12, 3)}
HEAD_DIM = 128


def cases(machine: Machine) -> dict[str, Case]:
    return {
        name: partial(measure, machine, name, *sizes) for name, sizes in (CASES if machine.cuda else CPU_CASES).items()
    }


def measure(machine: Machine, case: str, heads: int, height: int, width: int, frames: int) -> Row:
    dtype = torch.bfloat16 if machine.cuda else torch.float32
    tokens, dim = height * width, heads * HEAD_DIM
    like: dict[str, Any] = {"device": machine.device, "dtype": dtype}
    moved = 6 * frames * tokens * dim * dtype.itemsize  # K, V and Q, read and written
    sets = machine.sets(moved)
    fused = [torch.randn(1, frames, tokens, 3, heads, HEAD_DIM, **like) for _ in range(sets)]
    pages = [torch.zeros(2, frames, heads, tokens, HEAD_DIM, **like) for _ in range(sets)]
    k_weight, q_weight = torch.rand(2, dim, **like)
    rotation = rotary.spatial_rotation(height, width, HEAD_DIM, machine.device)
    slots = torch.arange(frames, dtype=torch.int32, device=machine.device)[None]

    def ours(index: int) -> object:
        q, k, v = fused[index].unbind(3)
        k_pages, v_pages = pages[index]
        return ops.insert(k, v, k_weight, rotation, k_pages, v_pages, slots, q=q, q_weight=q_weight)

    def eager(index: int) -> Tensor:
        q, k, v = fused[index].unbind(3)
        k_pages, v_pages = pages[index]
        k_pages.copy_(_norm_and_rotate(k, k_weight, rotation)[0].transpose(1, 2))
        v_pages.copy_(v[0].transpose(1, 2))
        return _norm_and_rotate(q, q_weight, rotation)

    mine, theirs = machine.seconds([ours, eager], sets=sets)
    return Row("insert", case, mine, moved / machine.copy_rate, "copy rate", {"PyTorch": theirs})


def _norm_and_rotate(x: Tensor, weight: Tensor, rotation: Tensor) -> Tensor:
    """What a model does without the operation: RMS norm, rotation in float32, cast."""
    normalised = torch.nn.functional.rms_norm(x.flatten(-2), weight.shape, weight, 1e-6).view_as(x)
    still = x.shape[-1] - 2 * rotation.shape[1]
    turned = rotary.rotate_pairs(normalised[..., still:].float(), rotation[:, None]).to(x.dtype)
    return torch.cat([normalised[..., :still], turned], dim=-1)
