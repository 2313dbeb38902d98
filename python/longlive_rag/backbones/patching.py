"""The door: `patch` gives an existing causal video model retrieval memory, and `Patched` takes it back."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from longlive_rag.backbones.caches import Followers, FreedCaches
from longlive_rag.backbones.family import Attachment, CausalTransformer
from longlive_rag.backbones.find import find_transformer
from longlive_rag.backbones.follow import Follower, Kind, check_block_length
from longlive_rag.backbones.forwards import Forwards, is_patched
from longlive_rag.backbones.journal import Journal
from longlive_rag.backbones.own_context import Said
from longlive_rag.budget import Budget, format_bytes
from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import AveragePool, Embedding, LatentAutoencoder
from longlive_rag.memory import Retrieval, RetrievalMemory
from longlive_rag.parallel.agreement import check_same, shared_budget
from longlive_rag.parallel.heads import HeadShardedMemory
from longlive_rag.parallel.shards import Group, Shards
from longlive_rag.selection import Selection
from longlive_rag.tiers.pages import frame_bytes

logger = logging.getLogger(__name__)


def patch(
    model: Any,
    config: RetrievalConfig | Literal["native"] | None = None,
    *,
    embedding: Embedding | str | os.PathLike[str] | None = None,
    selection: Selection | None = None,
    budget: Budget | None = None,
    release_cache: bool = False,
    group: Group | None = None,
) -> Patched:
    """Turn the attention of an existing causal video model into attention with retrieval memory.

        patched = patch(pipeline)
        video = pipeline.inference(noise, prompts)

    The model's own code stays as it is; blocks, videos and prompt switches are read off its calls. Its projections and
    norms are called where they are, so that LoRA and quantised layers keep working. Calls without a key-value cache, or
    with gradients, go to the original attention.

    Args:
        model: a causal video transformer of a family in docs/backbones.md, or a wrapper or pipeline that holds one;
            diffusers' too.
        config: the context policy. Default: the paper's memory within the model's own window, as
            `RetrievalConfig.from_backbone` reads it off the pipeline; "native": the model's own attention, without
            memory. `Patched.config` says what that is in numbers.
        embedding: of clean latent frames: an object, or the path of a retrieval autoencoder's checkpoint; default
            `AveragePool`.
        selection: which frames come back; default the most similar ones.
        budget: of each memory, with a group on each rank, in bytes (see `RetrievalMemory`); `rebuild` takes our own
            backbone.
        release_cache: free the keys and values of the pipeline's own cache, which nothing reads any more, the first
            time it is passed (see `Patched.released_bytes`). Families that read theirs keep it: krea realtime, whose
            pipeline goes by its size, and AnyFlow.
        group: the ranks that make each video together, all with the same arguments and the same calls of the pipeline:
            each holds the keys and values of a share of the heads, whose number it must divide, and attends with them.
            All else is computed on every rank. docs/several_gpus.md.

    Raises:
        TypeError: model holds no causal transformer of a known family, or config or embedding is something else.
        ValueError: model holds several transformers, is patched already, has another rotary embedding, or is split over
            processes by its own code; or config or group does not suit it.
        FileNotFoundError: there is no checkpoint at the path `embedding`.
    """
    if config is not None and config != "native" and not isinstance(config, RetrievalConfig):
        raise TypeError(
            f"config must be a RetrievalConfig, 'native' or None, got {type(config).__name__} {config!r:.80}"
        )
    if budget is not None and budget.rebuild:
        raise ValueError("budget.rebuild must be False: the clean passes of a patched model cannot be run again")
    transformer = find_transformer(model)
    family = transformer.family
    if is_patched(transformer.module):
        raise ValueError("model is patched already; first call unpatch() on what patch() returned")
    if config is None or config == "native":
        config = _own_config(model, transformer, config or "memory")
    if config.query == "draft" and not family.drafts:
        raise ValueError(
            f"config.query must be 'latest' for {family.name}, whose passes predict no single block, got 'draft'"
        )
    longest = family.longest_pass(model, transformer)
    if longest is not None:
        check_block_length(config, longest)
    embed = _embedding(embedding)
    all_heads, head_dim = family.heads(transformer.attentions[0])
    shards = None if group is None else Shards(group, all_heads)
    heads = all_heads if shards is None else shards.heads
    if shards is not None:
        check_same(shards, config=config, budget=budget)

    def make_memory(kind: Kind) -> RetrievalMemory:
        if isinstance(embedding, (str, os.PathLike)) and isinstance(embed, LatentAutoencoder):
            embed.to(kind.device)  # loaded here; an embedding that came as an object stays where its owner put it
        if budget is not None and budget.device is not None and config.memory_frames:
            rows, columns = kind.grid
            page = frame_bytes(
                layers=len(transformer.attentions),
                heads=heads,
                tokens=rows * columns,
                head_dim=head_dim,
                dtype=kind.dtype,
            )
            _check_switch(model, transformer, config, budget.device, kind.batch * page)
        settings: dict[str, Any] = {
            "config": config,
            "batch": kind.batch,
            "layers": len(transformer.attentions),
            "head_dim": head_dim,
            "grid": kind.grid,
            "device": kind.device,
            "dtype": kind.dtype,
            "embedding": embed,
            "selection": selection,
        }
        if shards is None:
            return RetrievalMemory(heads=heads, budget=budget, **settings)
        return HeadShardedMemory(shards, budget=shared_budget(budget, shards, kind.device), **settings)

    journal = Journal()
    said = Said(model, transformer.module, transformer.attentions[0])
    followers = Followers(lambda: Follower(config, make_memory, lambda: family.new_state(said), journal))
    freed_caches = FreedCaches() if release_cache and not family.reads_cache else None
    attachment = Attachment(config, followers, Forwards(), freed_caches)
    family.attach(transformer, attachment)
    logger.info("%s model patched with %s", family.name, config)
    return Patched(transformer, attachment, journal)


class Patched:
    """A patched model; also a context manager that unpatches.

    Conditional and unconditional passes have a cache each, and so a memory each.
    """

    def __init__(self, transformer: CausalTransformer, attachment: Attachment, journal: Journal) -> None:
        self.config, self.family = attachment.config, transformer.family.name
        self._attachment, self._journal = attachment, journal

    @property
    def retrieved(self) -> list[Retrieval]:
        """What each block of the last video got from memory: `.block_start`, `.frames` and `.similarity`, by sample."""
        return self._journal.retrieved

    @property
    def earlier_videos(self) -> list[list[Retrieval]]:
        """`retrieved` of each video before the last one, whatever its size; a video too short for memory has none."""
        return self._journal.earlier_videos

    @property
    def used(self) -> bool:
        """Whether any pass has gone through memory."""
        return bool(self._attachment.followers.all)

    @property
    def released_bytes(self) -> int:
        """Memory of the pipeline's own cache that was freed."""
        freed = self._attachment.freed_caches
        return 0 if freed is None else freed.bytes

    def reset(self) -> None:
        """Forget the videos so far. A pipeline that begins another video does not need it."""
        for follower in self._attachment.followers.all:
            follower.reset()

    def unpatch(self) -> None:
        """Give the model its own attention back, and released caches their size; what they held is gone.

        Between videos: the model's own attention would go on with a cache that holds nothing of a video's first blocks.
        """
        self._attachment.forwards.restore()
        if self._attachment.freed_caches is not None:
            self._attachment.freed_caches.restore()
        for follower in self._attachment.followers.all:
            follower.close()

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unpatch()


def config_for(model: Any, policy: Literal["memory", "native"], context_frames: int | None = None) -> RetrievalConfig:
    """The config that `patch` uses for a model: by default ("memory"), or with "native".

    Args:
        context_frames: in place of the model's own window.
    """
    return _own_config(model, find_transformer(model), policy, context_frames)


def _own_config(
    model: Any, transformer: CausalTransformer, policy: str, context_frames: int | None = None
) -> RetrievalConfig:
    own = transformer.family.own_context(model, transformer)
    if own is not None:
        if context_frames is not None:
            own = replace(own, context_frames=context_frames)
        return own.native() if policy == "native" else own.with_memory()
    if policy == "native":
        raise ValueError(
            f"config must be a RetrievalConfig for this {transformer.family.name} model, which does not say what its "
            f"own window is, got 'native'"
        )
    return transformer.family.unstated


def _check_switch(
    model: Any, transformer: CausalTransformer, config: RetrievalConfig, device_bytes: int, bytes_a_frame: int
) -> None:
    """Refuse a budget that the first prompt switch would find too small, in the middle of a video."""
    family = transformer.family
    needed = family.switch_frames(config, family.own_context(model, transformer))
    if needed is None or device_bytes >= needed * bytes_a_frame:
        return
    message = (
        f"budget.device must be at least {format_bytes(needed * bytes_a_frame)} ({needed} latent frames) for a prompt "
        f"switch of {family.name}, with the frames made again, the sink and memory; got {format_bytes(device_bytes)}"
    )
    if callable(getattr(model, "_recache_after_switch", None)):
        raise ValueError(message)
    logger.warning("%s; less will do as long as the prompt stays", message)


def _embedding(embedding: object) -> Embedding:
    if embedding is None:
        return AveragePool()
    if isinstance(embedding, (str, os.PathLike)):
        return LatentAutoencoder.from_checkpoint(Path(embedding))
    if isinstance(embedding, type) or not callable(getattr(embedding, "embed", None)):
        raise TypeError(
            f"embedding must have a method embed(latents), as AveragePool() and LatentAutoencoder have, or be the path "
            f"of a checkpoint, got {embedding!r}"
        )
    return embedding  # type: ignore[return-value]
