"""Tiny videos from a double of a public pipeline: what the tests of `patch` generate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longlive_rag import RetrievalConfig

SIZES: dict[str, Any] = {
    "dim": 32, "ffn_dim": 32, "freq_dim": 16, "text_dim": 8, "text_len": 4, "num_heads": 2, "num_layers": 2
}  # fmt: skip
CONFIG = RetrievalConfig(context_frames=5, sink_frames=1, memory_frames=2, recency_guard=0, block_frames=1)
TOKENS = 2
"""Of a latent frame of 2 x 4, or of 4 x 2."""


def noise(frames: int, seed: int = 0, size: tuple[int, int] = (2, 4), batch: int = 1) -> Tensor:
    return torch.randn(batch, frames, 16, *size, generator=torch.Generator().manual_seed(seed))


def generate(
    pipeline: Any,
    frames: int,
    *,
    first: int = 0,
    seed: int = 0,
    cache: Any = None,
    block: int = 1,
    size: tuple[int, int] = (2, 4),
    batch: int = 1,
    frame_tokens: int | None = None,
) -> Tensor:
    """A video in one denoising step per block, as a pipeline would drive its model.

    Args:
        frame_tokens: what the pipeline takes for the tokens of a latent frame; default the right number.
    """
    tokens = size[0] * size[1] // 4 if frame_tokens is None else frame_tokens
    cache = pipeline.cache(batch, 5 * tokens) if cache is None else cache
    dtype = next(pipeline.generator.parameters()).dtype
    prompt, given = torch.ones(batch, 4, 8, dtype=dtype), noise(frames, seed, size, batch).to(dtype)
    output = []
    for start in range(first, first + frames, block):
        latents = given[:, start - first : start - first + block]
        for level in (1000.0, 0.0):
            timestep = torch.full((batch, block), level)
            flow = pipeline.generator(latents, prompt, timestep, kv_cache=cache, current_start=start * tokens)
            latents = latents - level / 1000 * flow
        output.append(latents)
    return torch.cat(output, dim=1)
