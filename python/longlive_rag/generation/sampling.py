"""Few-step flow matching: noise levels, and the steps between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

STEPS = 1000

Renoise = Callable[[int, tuple[int, ...]], Tensor]
"""The i-th fresh noise of a video and its shape, [B * F, C, H, W], to that noise."""


def warp_steps(denoising_steps: Sequence[float], shift: float) -> list[float]:
    """Timesteps after the shift: sigma' = shift * sigma / (1 + (shift - 1) * sigma), sigma = step / 1000.

    Raises:
        ValueError: no steps, steps outside (0, 1000] or not descending, or a shift that is not positive.
    """
    steps = list(denoising_steps)
    if not steps or any(not 0 < step <= STEPS for step in steps) or sorted(set(steps), reverse=True) != steps:
        raise ValueError(f"denoising_steps must descend strictly within (0, {STEPS}], got {steps}")
    if not shift > 0:
        raise ValueError(f"timestep_shift must be positive, got {shift}")
    sigmas = (step / STEPS for step in steps)
    return [STEPS * shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas]


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    timesteps: Sequence[float],
    fresh_noise: Callable[[int, int, torch.Size], Tensor],
) -> Iterator[Tensor]:
    """Clean predictions of a block after each step, the last one the result.

    Each step predicts the flow at the current noise level, takes the clean latent that it implies, and adds fresh noise
    of the next level.

    Args:
        predict: from noisy latents [B, F, C, H, W] and timesteps float32 [B, F] to the flow.
        noise: [B, F, C, H, W].
        timesteps: descending, as of `warp_steps`.
        fresh_noise: draws noise [B, F, C, H, W] for B, F and (C, H, W).

    Source: Self-Forcing (arXiv 2506.08009), few-step sampler; x0 = x_t - sigma * flow.
    """
    latents = noise
    for step, timestep in enumerate(timesteps):
        flow = predict(latents, noise.new_full(noise.shape[:2], timestep, dtype=torch.float32))
        clean = latents - timestep / STEPS * flow
        yield clean
        if step + 1 < len(timesteps):
            sigma = timesteps[step + 1] / STEPS
            fresh = fresh_noise(noise.shape[0], noise.shape[1], noise.shape[2:]).to(noise)
            latents = (1 - sigma) * clean + sigma * fresh
