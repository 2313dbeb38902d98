"""Autoregressive generation, block by block, with retrieval memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import AveragePool, Embedding
from longlive_rag.generation.sampling import STEPS, Renoise, denoise, warp_steps
from longlive_rag.memory import Retrieval, RetrievalMemory
from longlive_rag.models import CausalWanModel
from longlive_rag.selection import Selection

PAPER_STEPS = (1000, 750, 500, 250)

Prompts = Tensor | Sequence[tuple[int, Tensor]]
"""Prompt embeddings [B, text_len, text_dim], or a schedule of (first latent frame, embeddings) that switches."""


@dataclass(frozen=True)
class FinishedBlock:
    """A block of latent frames that will not change any more."""

    start: int
    latents: Tensor
    """[B, F, C, H, W]."""
    embeddings: Tensor
    """[B, F, D]."""
    retrieval: Retrieval | None
    """What the block got from memory, if anything."""


@dataclass
class RolloutResult:
    """A finished video, or what there was of it when it was interrupted."""

    latents: Tensor
    """[B, frames, C, H, W]."""
    embeddings: Tensor
    """[B, frames, D], one per latent frame."""
    retrieved: list[Retrieval] = field(default_factory=list)
    """One entry per block with memory: `.block_start`, `.frames` [B][k], `.similarity` [B][k]."""
    interrupted: bool = False
    """True if KeyboardInterrupt ended it early."""


def stream(
    model: CausalWanModel,
    noise: Iterable[Tensor],
    prompt_embeds: Prompts,
    config: RetrievalConfig,
    *,
    embedding: Embedding | None = None,
    denoising_steps: Sequence[float] = PAPER_STEPS,
    timestep_shift: float = 5.0,
    context_noise: float = 0.0,
    renoise: Renoise | None = None,
    seed: int = 0,
    selection: Selection | None = None,
    given: Tensor | None = None,
    capacity: int = 64,
    device_frames: int | None = None,
) -> Iterator[FinishedBlock]:
    """Generate a video and yield each block as soon as it is finished.

    Args:
        model: the frozen backbone.
        noise: initial noise of each block, [B, F, C, H, W]; the video ends with it. Its dtype is the latents'.
        prompt_embeds: the prompt, or a schedule of prompts.
        config: the context policy.
        embedding: default `AveragePool`.
        denoising_steps: before the shift, descending from 1000.
        timestep_shift: of the noise schedule.
        context_noise: timestep of the clean pass, whose keys and values later blocks see.
        renoise: supplies the sampler's fresh noise; by default video b draws from a generator seeded with ``seed + b``,
            so that a batch gives what single runs give.
        selection: which frames come back; default the most similar ones.
        given: latents [B, n, C, H, W] that stand for the first n frames instead of generating them; whole blocks.
        capacity: latent frames to make room for at once.
        device_frames: latent frames to keep on the device; older ones wait in host memory (see `RetrievalMemory`).

    Yields:
        The finished blocks in order.

    Raises:
        ValueError, TypeError: bad arguments, before any work; non-finite noise or prompts, when they come.
    """
    timesteps = warp_steps(denoising_steps, timestep_shift)
    if not 0 <= context_noise <= STEPS:
        raise ValueError(f"context_noise must be a timestep from 0 to {STEPS}, got {context_noise}")
    _check_policy(config, embedding)
    device = model.patch_embedding.weight.device

    def open_memory(block_noise: Tensor) -> RetrievalMemory:
        return RetrievalMemory(
            config,
            batch=block_noise.shape[0],
            layers=model.num_layers,
            heads=model.num_heads,
            head_dim=model.head_dim,
            grid=model.token_grid(*block_noise.shape[3:]),
            device=device,
            dtype=model.patch_embedding.weight.dtype,
            embedding=embedding or AveragePool(),
            capacity=capacity,
            selection=selection,
            device_frames=device_frames,
        )

    fresh_noise = _FreshNoise(renoise, seed, device)
    return _blocks(
        model, noise, _schedule(prompt_embeds), config, open_memory, timesteps, context_noise, fresh_noise, given
    )


@torch.no_grad()
def _blocks(
    model: CausalWanModel,
    noise: Iterable[Tensor],
    schedule: list[tuple[int, Tensor]],
    config: RetrievalConfig,
    open_memory: Callable[[Tensor], RetrievalMemory],
    timesteps: list[float],
    context_noise: float,
    fresh_noise: _FreshNoise,
    given: Tensor | None,
) -> Iterator[FinishedBlock]:
    memory: RetrievalMemory | None = None
    start = 0
    try:
        for block_noise in noise:
            _check_latents("noise", block_noise, model)
            block_noise = block_noise.contiguous()  # other strides would make a compiled model compile again
            batch, frames = block_noise.shape[:2]
            if memory is None:
                _check_given(given, block_noise, config)
                memory = open_memory(block_noise)
            while schedule and schedule[0][0] <= start:
                prompt = model.prepare_prompt(_matching_prompt(schedule.pop(0)[1], batch, block_noise.device))
            predict = partial(model, prompt=prompt, attention=memory)

            memory.begin_block(start, frames)
            if given is not None and start < given.shape[1]:
                clean = given[:, start : start + frames].to(block_noise).contiguous()
                if config.query == "draft":
                    memory.ask(clean)
            else:
                for step, clean in enumerate(denoise(predict, block_noise, timesteps, fresh_noise)):
                    if step == 0 and config.query == "draft":
                        memory.ask(clean)
            predict(clean, clean.new_full((batch, frames), context_noise, dtype=torch.float32))
            embeddings = memory.commit(clean)
            last = memory.retrieved[-1] if memory.retrieved else None
            yield FinishedBlock(start, clean, embeddings, last if last and last.block_start == start else None)
            start += frames
    finally:
        if memory is not None:
            memory.close()


def rollout(
    model: CausalWanModel,
    noise: Tensor,
    prompt_embeds: Prompts,
    config: RetrievalConfig,
    *,
    embedding: Embedding | None = None,
    denoising_steps: Sequence[float] = PAPER_STEPS,
    timestep_shift: float = 5.0,
    context_noise: float = 0.0,
    renoise: Renoise | None = None,
    seed: int = 0,
    selection: Selection | None = None,
    given: Tensor | None = None,
    device_frames: int | None = None,
) -> RolloutResult:
    """Generate a whole video; see `stream` for the arguments.

    Args:
        noise: [B, frames, C, H, W]; frames a multiple of ``config.block_frames``.

    Returns:
        The video. After KeyboardInterrupt, what was finished by then, with ``interrupted`` set.
    """
    _check_policy(config, embedding)
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must be a tensor, got {type(noise).__name__}")
    _check_latents("noise", noise, model)
    frames = noise.shape[1]
    if frames == 0 or frames % config.block_frames:
        raise ValueError(f"noise must hold whole blocks of {config.block_frames} latent frames, got {frames}")
    blocks: list[FinishedBlock] = []
    interrupted = False
    try:
        for block in stream(
            model,
            noise.split(config.block_frames, dim=1),
            prompt_embeds,
            config,
            embedding=embedding,
            denoising_steps=denoising_steps,
            timestep_shift=timestep_shift,
            context_noise=context_noise,
            renoise=renoise,
            seed=seed,
            selection=selection,
            given=given,
            capacity=frames,
            device_frames=device_frames,
        ):
            blocks.append(block)
    except KeyboardInterrupt:
        if not blocks:
            raise
        interrupted = True
    return RolloutResult(
        latents=torch.cat([block.latents for block in blocks], dim=1),
        embeddings=torch.cat([block.embeddings for block in blocks], dim=1),
        retrieved=[block.retrieval for block in blocks if block.retrieval is not None],
        interrupted=interrupted,
    )


class _FreshNoise:
    """The sampler's fresh noise: the caller's, or that of one seeded generator for each video."""

    def __init__(self, renoise: Renoise | None, seed: int, device: torch.device) -> None:
        self.renoise, self.seed, self.device = renoise, seed, device
        self.drawn = 0
        self.generators: list[torch.Generator] = []

    def __call__(self, batch: int, frames: int, frame_shape: torch.Size) -> Tensor:
        """Noise [B, F, C, H, W]."""
        self.drawn += 1
        if self.renoise is not None:
            return self.renoise(self.drawn - 1, (batch * frames, *frame_shape)).view(batch, frames, *frame_shape)
        while len(self.generators) < batch:
            self.generators.append(torch.Generator(self.device).manual_seed(self.seed + len(self.generators)))
        return torch.stack([torch.randn(frames, *frame_shape, generator=g, device=g.device) for g in self.generators])


def _check_policy(config: RetrievalConfig, embedding: Embedding | None) -> None:
    if not isinstance(config, RetrievalConfig):
        raise TypeError(f"config must be a RetrievalConfig, got {type(config).__name__}")
    if embedding is not None and not hasattr(embedding, "embed"):
        raise TypeError(f"embedding must have a method embed(latents), got {type(embedding).__name__}")


def _check_latents(name: str, latents: Tensor, model: CausalWanModel) -> None:
    if latents.ndim != 5 or latents.shape[2] != model.in_dim:
        raise ValueError(f"{name} must be [B, frames, {model.in_dim}, height, width], got {list(latents.shape)}")
    if not latents.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {latents.dtype}")
    model.token_grid(latents.shape[3], latents.shape[4])
    if latents.device != model.patch_embedding.weight.device:
        raise ValueError(f"{name} is on {latents.device}, but the model is on {model.patch_embedding.weight.device}")
    if not torch.isfinite(latents).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def _check_given(given: Tensor | None, noise: Tensor, config: RetrievalConfig) -> None:
    if given is None:
        return
    if given.ndim != 5 or given.shape[0] != noise.shape[0] or given.shape[2:] != noise.shape[2:]:
        raise ValueError(
            f"given must be [{noise.shape[0]}, n, {', '.join(map(str, noise.shape[2:]))}] like the noise, "
            f"got {list(given.shape)}"
        )
    if given.shape[1] % config.block_frames:
        raise ValueError(f"given must hold whole blocks of {config.block_frames} latent frames, got {given.shape[1]}")
    if not torch.isfinite(given).all():
        raise ValueError("given must be finite, got NaN or infinity")


def _schedule(prompts: Prompts) -> list[tuple[int, Tensor]]:
    if not isinstance(prompts, (Tensor, list, tuple)):
        raise TypeError(
            f"prompt_embeds must be a tensor or a list of (first latent frame, tensor), got {type(prompts).__name__}"
        )
    schedule = [(0, prompts)] if isinstance(prompts, Tensor) else sorted(prompts, key=lambda entry: entry[0])
    if not schedule or schedule[0][0] != 0:
        first = schedule[0][0] if schedule else "none"
        raise ValueError(f"prompt_embeds must begin with a prompt for latent frame 0, got {first}")
    for start, embeds in schedule:
        if not torch.isfinite(embeds).all():
            raise ValueError(
                f"prompt_embeds must be finite, got NaN or infinity in the prompt for latent frame {start}"
            )
    return schedule


def _matching_prompt(embeds: Tensor, batch: int, device: torch.device) -> Tensor:
    if embeds.ndim != 3 or embeds.shape[0] not in (1, batch):
        raise ValueError(
            f"prompt_embeds must be [1 or {batch}, text_len, text_dim] for this noise, got {list(embeds.shape)}"
        )
    return embeds.to(device).expand(batch, -1, -1)
