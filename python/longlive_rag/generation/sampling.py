"""Few-step flow matching: the recipe, the noise levels, and the steps between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from longlive_rag.config import PAPER_STEPS, Solver

STEPS = 1000

Renoise = Callable[[int, tuple[int, ...]], Tensor]
"""From the index of a draw, counted over the whole video, and a shape [B * F, C, H, W] to that noise."""


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


@dataclass(frozen=True)
class Sampling:
    """The sampler's settings, by default the paper's (arXiv 2606.02553).

    Raises:
        ValueError: a value is out of range.
    """

    denoising_steps: tuple[float, ...] = PAPER_STEPS
    """Timesteps before the shift, descending from 1000."""
    timestep_shift: float = 5.0
    """Shift of the noise schedule."""
    context_noise: float = 0.0
    """Timestep of the clean pass, whose keys and values later blocks see."""
    seed: int = 0
    """Of the fresh noise between steps. Video b of a batch has a generator of its own, seeded with ``seed + b``, so
    that a batch gives what single runs give."""
    renoise: Renoise | None = None
    """Supplies the fresh noise instead of these generators."""
    solver: Solver = "renoise"
    """From step to step: fresh noise on the clean prediction (Self-Forcing and relatives), or UniPC (LongLive 2)."""

    def __post_init__(self) -> None:
        warp_steps(self.denoising_steps, self.timestep_shift)
        if self.solver not in get_args(Solver):
            raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {self.solver!r}")
        if self.solver == "unipc" and self.denoising_steps[0] >= STEPS:
            raise ValueError(
                f"denoising_steps must begin below {STEPS} for solver unipc, as 999 of LongLive 2 does, got "
                f"{self.denoising_steps[0]:g}"
            )
        if not 0 <= self.context_noise <= STEPS:
            raise ValueError(f"context_noise must be a timestep from 0 to {STEPS}, got {self.context_noise}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be from 0 to 2**63 - 1, got {self.seed}")

    @property
    def timesteps(self) -> list[float]:
        """The denoising steps after the shift."""
        return warp_steps(self.denoising_steps, self.timestep_shift)


PAPER_SAMPLING = Sampling()


class FreshNoise:
    """Draws the noise that is added between the denoising steps of a video."""

    def __init__(self, sampling: Sampling, device: torch.device) -> None:
        self.sampling, self.device = sampling, device
        self.draws = 0
        self.generators: list[torch.Generator] = []

    def __call__(self, batch: int, frames: int, frame_shape: torch.Size) -> Tensor:
        """Noise [B, F, C, H, W]."""
        self.draws += 1
        if self.sampling.renoise is not None:
            fresh = self.sampling.renoise(self.draws - 1, (batch * frames, *frame_shape))
            return fresh.view(batch, frames, *frame_shape)
        while len(self.generators) < batch:
            seed = self.sampling.seed + len(self.generators)
            self.generators.append(torch.Generator(self.device).manual_seed(seed))
        return torch.stack([torch.randn(frames, *frame_shape, generator=g, device=g.device) for g in self.generators])


def upload(drawn: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`. What was drawn on the CPU is copied from pinned memory: the host does not wait."""
    if drawn.device.type == "cpu" and device.type == "cuda":
        drawn = drawn.pin_memory()
    return drawn.to(device, non_blocking=True)


def denoise(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    timesteps: Sequence[float],
    fresh_noise: Callable[[int, int, torch.Size], Tensor],
) -> Iterator[Tensor]:
    """Yield the clean prediction of a block after each step; the last one is the result.

    Each step predicts the flow at the current noise level, takes the clean latent that it implies, and adds fresh noise
    of the next level.

    Args:
        predict: maps noisy latents [B, F, C, H, W] and timesteps float32 [B, F] to the flow.
        noise: [B, F, C, H, W].
        timesteps: descending, as `warp_steps` returns them.
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
            fresh = upload(fresh_noise(noise.shape[0], noise.shape[1], noise.shape[2:]), noise.device).to(noise.dtype)
            latents = (1 - sigma) * clean + sigma * fresh
