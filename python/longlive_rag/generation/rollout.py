"""Autoregressive generation, block by block, with retrieval memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from longlive_rag.bank import Usage
from longlive_rag.budget import Budget, format_bytes
from longlive_rag.config import PAPER_STEPS, RetrievalConfig
from longlive_rag.embedding import AveragePool, Embedding
from longlive_rag.generation.sampling import PAPER_SAMPLING, FreshNoise, Renoise, Sampling
from longlive_rag.generation.solving import matching_first, solve
from longlive_rag.memory import Retrieval, RetrievalMemory
from longlive_rag.models import CausalWanModel
from longlive_rag.models.causal_wan import Attention, Prompt
from longlive_rag.models.sizes import TransformerSizes
from longlive_rag.parallel.agreement import Agreement, ShardSizes, SharedSelection, check_same, shared_budget
from longlive_rag.parallel.attention import ShardedAttention
from longlive_rag.parallel.shards import Group, Shards
from longlive_rag.selection import Selection

Prompts = Tensor | Sequence[tuple[int, Tensor]]
"""Prompt embeddings [B, text_len, text_dim], or a schedule of (first latent frame, embeddings) that switches."""
Steering = Callable[[int], Tensor]
"""Is asked for the embeddings as each block begins, with its first latent frame; the same tensor as long as the prompt
does not change."""


@dataclass(frozen=True)
class FinishedBlock:
    """A block of latent frames in its final state."""

    start: int
    latents: Tensor
    """[B, F, C, H, W]."""
    embeddings: Tensor
    """[B, F, D]."""
    retrieval: Retrieval | None
    """What the block retrieved, if anything."""
    usage: Usage
    """What the memory holds, and where."""
    budget: Budget
    """The memory's, with what was measured where none was given (`FrameBank.budget`)."""


@dataclass
class RolloutResult:
    """A finished video, or as much of it as there was when it was interrupted."""

    latents: Tensor
    """[B, frames, C, H, W]."""
    embeddings: Tensor
    """[B, frames, D], one per latent frame."""
    retrieved: list[Retrieval] = field(default_factory=list)
    """One entry per block that retrieved: `.block_start`, `.frames` [B][k], `.similarity` [B][k]."""
    interrupted: bool = False
    """True if KeyboardInterrupt ended it early."""


def stream(
    model: CausalWanModel,
    noise: Iterable[Tensor],
    prompt_embeds: Prompts | Steering,
    config: RetrievalConfig,
    *,
    sampling: Sampling = PAPER_SAMPLING,
    embedding: Embedding | None = None,
    selection: Selection | None = None,
    given: Tensor | Iterable[Tensor] | None = None,
    first: Tensor | None = None,
    budget: Budget | None = None,
    group: Group | None = None,
) -> Iterator[FinishedBlock]:
    """Generate a video and yield each block as soon as it is finished.

    Args:
        model: the frozen backbone.
        noise: initial noise of each block, [B, F, C, H, W]; the video ends with it. Its dtype is the latents'.
        prompt_embeds: the prompt, a schedule of prompts, or a function that steers a video while it grows.
        config: the context policy.
        sampling: the sampler's settings; default the paper's.
        embedding: what memory is searched by; default `AveragePool`.
        selection: which frames come back; default the most similar ones.
        given: latents [B, n, C, H, W], whole blocks, that take the place of the first n frames; or these blocks one at
            a time.
        first: latents [B, n, C, H, W] that the first block begins with, fewer than it has: the others are denoised
            around them, as models of image-to-video are trained to. Unless that block is given.
        budget: of the memory, in bytes (see `RetrievalMemory`); with a group, of each rank's.
        group: the ranks that make this video together, all with the same arguments: each computes a share of the tokens
            and attends with a share of the heads, whose number it must divide. Every rank yields the whole result.
            docs/several_gpus.md.

    To go on with a video that was stopped, pass its finished latents as `given`, a `ReplaySelection` of what its blocks
    retrieved, and a `Sampling.renoise` that counts on from the draws of
    these blocks, ``len(denoising_steps) - 1`` each: what follows is the same to the last bit. A given block costs one
    pass of the model; no noise is drawn for it, and only the shape of its entry in `noise` matters.

    Yields:
        The finished blocks in order.

    Raises:
        ValueError, TypeError: bad arguments, before any work; noise of a wrong form, when its block is reached; noise
            that is not finite, in place of that block.
        RuntimeError: the ranks of the group do not agree on a block.
    """
    _check_policy(config, embedding)
    sizes: TransformerSizes = model
    shards = None
    if group is not None:
        shards = Shards(group, model.num_heads)
        check_same(shards, config=config, sampling=replace(sampling, renoise=None), budget=budget)
        sizes, selection = ShardSizes(model, shards), SharedSelection(selection, shards)
        budget = shared_budget(budget, shards, model.patch_embedding.weight.device)
    open_memory = partial(
        RetrievalMemory.for_model,
        sizes,
        config=config,
        embedding=embedding or AveragePool(),
        selection=selection,
        budget=budget,
    )
    return _blocks(model, noise, _prompter(prompt_embeds), sampling, given, first, open_memory, shards)


@torch.no_grad()
def _blocks(
    model: CausalWanModel,
    noise: Iterable[Tensor],
    prompt_at: Steering,
    sampling: Sampling,
    given: Tensor | Iterable[Tensor] | None,
    first: Tensor | None,
    open_memory: Callable[..., RetrievalMemory],
    shards: Shards | None,
) -> Iterator[FinishedBlock]:
    fresh_noise = FreshNoise(sampling, model.patch_embedding.weight.device)
    memory: RetrievalMemory | None = None
    # Prompts so far, by the first frame that they were for: what is rebuilt is rebuilt with its own.
    prompts: list[tuple[int, Prompt]] = []
    latest_embeds: Tensor | None = None
    given_blocks: Iterator[Tensor] = iter(())
    agreement = None if shards is None else Agreement(shards)
    start = 0

    def on_this_rank(attention: Attention, latents: Tensor) -> Attention:
        if shards is None:
            return attention
        rows, columns = model.token_grid(*latents.shape[3:])
        return ShardedAttention(attention, shards, rows * columns)

    def clean_pass(video: int, frames: range, latents: Tensor, attention: Attention) -> None:
        prompt = next(prompt for first, prompt in reversed(prompts) if first <= frames.start)
        of_video = [(k[video : video + 1], v[video : video + 1]) for k, v in prompt]
        model(latents, _context_timestep(latents, sampling), of_video, on_this_rank(attention, latents))

    try:
        for block_noise in noise:
            _check_form("noise", block_noise, model)
            check_finite = _deferred_check("noise", block_noise)
            # Other strides, even of a single video, would make a compiled model compile again.
            block_noise = block_noise.clone(memory_format=torch.contiguous_format)
            batch, frames = block_noise.shape[:2]
            if memory is None:
                memory = open_memory(shape=block_noise.shape, clean_pass=clean_pass)
                _check_given(given, block_noise, memory.config)
                attention = on_this_rank(memory, block_noise)
                given_blocks = iter(given.split(frames, dim=1) if isinstance(given, Tensor) else given or ())
            embeds = prompt_at(start)
            if embeds is not latest_embeds:
                prompt = model.prepare_prompt(_matching_prompt(embeds, batch, block_noise.device))
                if memory.bank.latents is None:
                    prompts.clear()  # nothing will be rebuilt
                prompts.append((start, prompt))
                latest_embeds = embeds
            predict = partial(model, prompt=prompts[-1][1], attention=attention)

            memory.begin_block(start, frames)
            given_block = next(given_blocks, None)
            if given_block is not None:
                _check_given(given_block, block_noise, memory.config)
                # A tensor of its own: libraries may add up in another order at addresses that are aligned otherwise.
                clean = given_block.to(block_noise).clone(memory_format=torch.contiguous_format)
                if memory.config.query == "draft":
                    memory.ask(clean)
            else:
                begun = None if first is None or start else matching_first(first, block_noise)
                for step, clean in enumerate(solve(predict, block_noise, sampling, fresh_noise, begun)):
                    if step == 0 and memory.config.query == "draft":
                        memory.ask(clean)
            predict(clean, _context_timestep(clean, sampling))
            check_finite()
            embeddings = memory.commit(clean)
            if agreement is not None:
                agreement.check()
                agreement.note(start, clean, memory.bank.forgotten)
            last = memory.retrieved[-1] if memory.retrieved else None
            retrieval = last if last and last.block_start == start else None
            memory.retrieved.clear()  # the caller has the record; a video without an end must not gather it twice
            yield FinishedBlock(start, clean, embeddings, retrieval, memory.usage(), memory.bank.budget)
            start += frames
        if agreement is not None:
            agreement.check()
    except torch.OutOfMemoryError as error:
        held = format_bytes(memory.usage().device.bytes) if memory is not None else "none"
        raise torch.OutOfMemoryError(
            f"{str(error).splitlines()[0]} Keys and values take {held} of the device: lower budget.device "
            f"(--device-memory), so that more of them wait in host memory"
        ) from error
    finally:
        if memory is not None:
            memory.close()


def _context_timestep(latents: Tensor, sampling: Sampling) -> Tensor:
    return latents.new_full(latents.shape[:2], sampling.context_noise, dtype=torch.float32)


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
    budget: Budget | None = None,
    group: Group | None = None,
) -> RolloutResult:
    """Generate a whole video; see `stream`, and `Sampling` for the sampler's settings.

    Args:
        noise: [B, frames, C, H, W]; frames a multiple of ``config.block_frames``.

    Returns:
        The video. After KeyboardInterrupt, what was finished by then, with ``interrupted`` set; its `latents` and
        `retrieved` are what another call needs to go on from there (see `stream`). With the default `renoise`, whose
        generator begins anew, that call gives later blocks other fresh noise.
    """
    _check_policy(config, embedding)
    sampling = Sampling(tuple(denoising_steps), timestep_shift, context_noise, seed, renoise)
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must be a tensor, got {type(noise).__name__}")
    _check_form("noise", noise, model)
    _deferred_check("noise", noise)()  # all of it before any work
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
            sampling=sampling,
            embedding=embedding,
            selection=selection,
            given=given,
            budget=budget,
            group=group,
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


def _check_policy(config: RetrievalConfig, embedding: Embedding | None) -> None:
    if not isinstance(config, RetrievalConfig):
        raise TypeError(f"config must be a RetrievalConfig, got {type(config).__name__}")
    if embedding is not None and not hasattr(embedding, "embed"):
        raise TypeError(f"embedding must have a method embed(latents), got {type(embedding).__name__}")


def _check_form(name: str, latents: Tensor, model: CausalWanModel) -> None:
    if latents.ndim != 5 or latents.shape[2] != model.in_dim:
        raise ValueError(f"{name} must be [B, frames, {model.in_dim}, height, width], got {list(latents.shape)}")
    if not latents.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {latents.dtype}")
    model.token_grid(latents.shape[3], latents.shape[4])
    if latents.device != model.patch_embedding.weight.device:
        raise ValueError(f"{name} is on {latents.device}, but the model is on {model.patch_embedding.weight.device}")


def _deferred_check(name: str, latents: Tensor) -> Callable[[], None]:
    """Begin to look for NaN and infinity; the function returned raises ValueError if there are any.

    What it waits for was queued before the block's work, so the device is not drained.
    """
    finite = torch.isfinite(latents).all()
    event: torch.cuda.Event | None = None
    if latents.device.type == "cuda":
        finite = torch.empty_like(finite, device="cpu", pin_memory=True).copy_(finite, non_blocking=True)
        event = torch.cuda.Event()
        event.record()

    def check() -> None:
        if event is not None:
            event.synchronize()
        if not finite:
            raise ValueError(f"{name} must be finite, got NaN or infinity")

    return check


def _check_given(given: object, noise: Tensor, config: RetrievalConfig) -> None:
    if not isinstance(given, Tensor):
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


def _prompter(prompts: Prompts | Steering) -> Steering:
    if callable(prompts):
        return prompts
    if not isinstance(prompts, (Tensor, list, tuple)):
        raise TypeError(
            f"prompt_embeds must be a tensor or a list of (first latent frame, tensor) or a function, "
            f"got {type(prompts).__name__}"
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
    return lambda start: next(embeds for first, embeds in reversed(schedule) if first <= start)


def _matching_prompt(embeds: Tensor, batch: int, device: torch.device) -> Tensor:
    if embeds.ndim != 3 or embeds.shape[0] not in (1, batch):
        raise ValueError(
            f"prompt_embeds must be [1 or {batch}, text_len, text_dim] for this noise, got {list(embeds.shape)}"
        )
    return embeds.to(device).expand(batch, -1, -1)
