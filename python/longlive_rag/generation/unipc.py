"""UniPC, the multistep sampler of LongLive 2: a predictor and a corrector of second order, without fresh noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from longlive_rag.generation.sampling import STEPS


def unipc(predict: Callable[[Tensor, Tensor], Tensor], noise: Tensor, timesteps: Sequence[float]) -> Iterator[Tensor]:
    """Yield the clean prediction of a block after each step; the last one is the result.

    As `sampling.denoise`, but from one noise level to the next along the flow, through the clean predictions of the
    last two steps. All coefficients are numbers of the host, computed in float64.

    Args:
        predict: maps noisy latents [B, F, C, H, W] and timesteps float32 [B, F] to the flow. It is shown whole
            timesteps, as the models were trained with.
        noise: [B, F, C, H, W].
        timesteps: descending, as `sampling.warp_steps` returns them.

    Source: UniPC (arXiv 2302.04867), data prediction, B2(h), orders 1, 2, ..., 2, 1; for a flow, alpha = 1 - sigma.
    """
    sigmas = [timestep / STEPS for timestep in timesteps]
    latents = before = noise
    cleans: list[Tensor] = []
    order = 0
    for step, sigma in enumerate(sigmas):
        flow = predict(latents, noise.new_full(noise.shape[:2], int(timesteps[step]), dtype=torch.float32))
        clean = latents - sigma * flow
        yield clean
        if step + 1 == len(sigmas):
            return
        if step:
            latents = _corrected(before, clean, cleans, sigmas[: step + 1], order)
        cleans = [*cleans[-1:], clean]
        # The last step, to no noise at all, is of order 1.
        order = min(2, len(cleans), len(sigmas) - step)
        before = latents
        latents = _predicted(latents, cleans, sigmas[: step + 2], order)


def _level(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio."""
    return math.log((1 - sigma) / sigma)


def _predicted(latents: Tensor, cleans: Sequence[Tensor], sigmas: Sequence[float], order: int) -> Tensor:
    """The latents at the last of these noise levels, from those at the one before and the newest clean predictions."""
    here, there = sigmas[-2:]
    width = _level(there) - _level(here)
    growth = math.expm1(-width)
    result = there / here * latents - (1 - there) * growth * cleans[-1]
    if order == 2:
        ratio = (_level(sigmas[-3]) - _level(here)) / width
        result = result - (1 - there) * growth * 0.5 / ratio * (cleans[-2] - cleans[-1])
    return result


def _corrected(before: Tensor, clean: Tensor, cleans: Sequence[Tensor], sigmas: Sequence[float], order: int) -> Tensor:
    """The latents at the last of these noise levels, now that the clean prediction there is known.

    Args:
        before: latents at the level before.
        clean: prediction at the last level; `cleans` are those before it.
    """
    here, there = sigmas[-2:]
    width = _level(there) - _level(here)
    growth = math.expm1(-width)
    result = there / here * before - (1 - there) * growth * cleans[-1]
    change = clean - cleans[-1]
    if order == 1:
        return result - (1 - there) * growth * 0.5 * change
    ratio = (_level(sigmas[-3]) - _level(here)) / width
    first = growth / -width - 1
    second = first / -width - 0.5
    # Solves [[1, 1], [ratio, 1]] (older, newer) = (first, 2 second) / growth.
    older = (first - 2 * second) / growth / (1 - ratio)
    newer = first / growth - older
    return result - (1 - there) * growth * (older / ratio * (cleans[-2] - cleans[-1]) + newer * change)
