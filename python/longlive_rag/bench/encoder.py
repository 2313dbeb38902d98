"""encoder: what embedding a block costs, the retrieval encoder at Wan's size, three latent frames of 16 x 60 x 104.

The paper reports 3.96 ms a block (arXiv 2606.02553). The goal on an H200 is 0.5 ms, about which the two ways that a CPU
can run say nothing.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from longlive_rag.bench.common import Case, Machine, Row
from longlive_rag.embedding import LatentAutoencoder

FRAMES, CHANNELS, HEIGHT, WIDTH = 3, 16, 60, 104
HIDDEN_DIMS, EMBEDDING_DIM = (64, 128, 256), 1024
GOAL_SECONDS = 0.5e-3


def cases(machine: Machine) -> dict[str, Case]:
    ways: dict[str, Case] = {
        "float32": partial(measure, machine, "float32", torch.float32, graph=False),
        "bfloat16, channels last": partial(measure, machine, "bfloat16, channels last", torch.bfloat16, graph=False),
    }
    if machine.cuda:
        for compiled in (False, True):
            name = f"bfloat16, channels last, {'compiled, ' if compiled else ''}CUDA graph"
            ways[name] = partial(measure, machine, name, torch.bfloat16, graph=True, compiled=compiled)
    return ways


@torch.no_grad()
def measure(machine: Machine, case: str, dtype: torch.dtype, *, graph: bool, compiled: bool = False) -> Row:
    encoder = LatentAutoencoder(hidden_dims=HIDDEN_DIMS, embedding_dim=EMBEDDING_DIM).to(machine.device, dtype).eval()
    latents = torch.randn(FRAMES, CHANNELS, HEIGHT, WIDTH, device=machine.device).to(dtype)
    if dtype == torch.bfloat16:
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        latents = latents.contiguous(memory_format=torch.channels_last)
    if compiled:
        encoder.encoder.compile()

    def ours(_: int) -> Tensor:
        return encoder.embed(latents)

    # One set of data: a block's latents come straight from the sampler, so they are in the L2 cache in use, too.
    (seconds,) = machine.seconds([ours], sets=1, graph=graph)
    goal = GOAL_SECONDS if machine.cuda else None
    return Row("encoder", case, seconds, encoder_flops() / machine.matmul_rate, "matmul rate", goal=goal)


def encoder_flops() -> int:
    """Multiplications and additions of the convolutions and the projection for one block."""
    height, width, before, total = HEIGHT, WIDTH, CHANNELS, 0
    for after in HIDDEN_DIMS:
        height, width = -(-height // 2), -(-width // 2)
        total += 2 * 9 * after * (before + 2 * after) * height * width
        before = after
    return FRAMES * (total + 2 * before * EMBEDDING_DIM)
