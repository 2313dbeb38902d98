"""A corpus made by a generator: its own roll-outs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from longlive_rag.config import RetrievalConfig
from longlive_rag.generation.rollout import Prompts, rollout
from longlive_rag.models import CausalWanModel


class GeneratorSource:
    """Roll-outs of a frozen causal Wan model.

    Args:
        model: the generator.
        prompts: from a video's number to its prompt embeddings [1, text_len, text_dim], or schedule, and metadata.
        latent_shape: channels, height, width.
        frames: latent frames of a video, whole blocks.
        config: the context policy.
        denoising_steps, timestep_shift: as `rollout`.
        name: of the generator, for the record.
        batch: videos made together.
    """

    def __init__(
        self,
        model: CausalWanModel,
        prompts: Callable[[int], tuple[Prompts, dict[str, str]]],
        latent_shape: tuple[int, int, int],
        frames: int,
        config: RetrievalConfig,
        *,
        denoising_steps: Sequence[float],
        timestep_shift: float,
        seed: int,
        name: str,
        batch: int = 1,
    ) -> None:
        if frames < 1 or frames % config.block_frames:
            raise ValueError(f"frames must be whole blocks of {config.block_frames} latent frames, got {frames}")
        self.model, self.prompts, self.config = model, prompts, config
        self.shape = (frames, *latent_shape)
        self.denoising_steps, self.timestep_shift, self.seed = denoising_steps, timestep_shift, seed
        self.batch = batch
        self.video_bytes = math.prod(self.shape) * model.patch_embedding.weight.element_size()
        self.settings: dict[str, str | int | float] = {
            "source": name,
            "frames": frames,
            "seed": seed,
            "denoising_steps": " ".join(map(str, denoising_steps)),
            "timestep_shift": timestep_shift,
            **asdict(config),
        }

    def make(self, numbers: Sequence[int]) -> list[tuple[Tensor, dict[str, str]]]:
        weight = self.model.patch_embedding.weight
        generators = [torch.Generator().manual_seed(self.seed * 1_000_003 + number) for number in numbers]

        # Drawn on the CPU: the same on every device.
        def draw(shape: Sequence[int]) -> Tensor:
            return torch.stack([torch.randn(*shape, generator=g) for g in generators]).to(weight.device)

        prompts, metadata = zip(*map(self.prompts, numbers), strict=True)
        result = rollout(
            self.model,
            draw(self.shape).to(weight.dtype),
            merge_prompts(prompts),
            self.config,
            denoising_steps=self.denoising_steps,
            timestep_shift=self.timestep_shift,
            renoise=lambda _, shape: draw((shape[0] // len(numbers), *shape[1:])).flatten(0, 1),
        )
        if result.interrupted:
            raise KeyboardInterrupt
        about = [{"source": str(self.settings["source"]), "seed": str(self.seed), **each} for each in metadata]
        return list(zip(result.latents, about, strict=True))


def merge_prompts(prompts: Sequence[Prompts]) -> list[tuple[int, Tensor]]:
    """One schedule for a batch from the prompts or schedules of its videos, embeddings [1, text_len, text_dim] each."""
    schedules = [[(0, each)] if isinstance(each, Tensor) else list(each) for each in prompts]
    merged = []
    for start in sorted({start for schedule in schedules for start, _ in schedule}):
        current = [[embeds for first, embeds in schedule if first <= start][-1] for schedule in schedules]
        merged.append((start, torch.cat(current)))
    return merged
