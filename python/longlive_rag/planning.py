"""Where the keys and values of a video will lie, and what moves: known before a GPU is rented or a run begins.

Sizes come from the tiers themselves (`longlive_rag.tiers`), so a plan changes with them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import nn

from longlive_rag.budget import Budget, format_bytes
from longlive_rag.config import RetrievalConfig
from longlive_rag.generation.settings import VideoSettings
from longlive_rag.models import CausalWanModel
from longlive_rag.parallel.costs import Pass, check_ranks
from longlive_rag.tiers.below import PASSING, STAGED
from longlive_rag.tiers.device import unforeseen_bytes
from longlive_rag.tiers.disk import records_at_once
from longlive_rag.tiers.host import host_room, slabs
from longlive_rag.tiers.pages import frame_bytes

_DTYPE = torch.bfloat16
_LATENT_BYTES = 4  # latents are kept in float32
_WORKING_BYTES_PER_PIXEL = 10_000
"""What a block needs to work with, per pixel of a picture: 4 GB at 480 x 832. Most of it is the decoder's, whose last
stages hold a handful of tensors of 96 to 192 channels for four pictures at once, and as much in its cache. Unmeasured;
a run measures its own after the first block."""


@dataclass(frozen=True)
class Family:
    """What the VAE that belongs to a size of the transformer makes of a video, and how large it is.

    Source: Wan 2.1 (arXiv 2503.20314) and Wan 2.2's TI2V-5B, as diffusers' `AutoencoderKLWan` configures them.
    """

    spatial_factor: int
    temporal_factor: int
    channels: int
    vae_parameters: int
    height: int
    width: int
    fps: float
    """Height, width and pictures per second that it was trained for."""


_WAN21 = Family(8, 4, 16, 126_892_531, 480, 832, 16.0)
FAMILIES = {"1.3B": _WAN21, "5B": Family(16, 4, 48, 704_688_668, 704, 1280, 24.0), "14B": _WAN21}


_GATHERED_BLOCKS = 3
"""Of split weights, blocks of the transformer that each GPU has whole at a time: the one at work, the next one, and the
buffer in which that arrives. Unmeasured."""


def _parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


@lru_cache
def _transformer(size: str) -> CausalWanModel:
    """Its shapes alone."""
    with torch.device("meta"):
        return CausalWanModel.from_size(size)


@dataclass(frozen=True)
class Video:
    """A video to plan for: one of them at a time, as `longlive-rag generate` makes it, in bfloat16.

    Raises:
        ValueError: there is no such model, or a value is out of range.
    """

    model: str
    """Size of the transformer: 1.3B, 5B or 14B."""
    settings: VideoSettings
    ranks: int = 1
    """GPUs that make it together. All sizes are those of the first one, which has most to do: it decodes too."""
    shard_weights: bool = False
    """Whether each of them holds a share of the transformer's weights."""

    def __post_init__(self) -> None:
        if self.model not in FAMILIES:
            raise ValueError(f"model must be one of {', '.join(FAMILIES)}, got {self.model!r}")
        step = 2 * self.family.spatial_factor
        if self.settings.height % step or self.settings.width % step:
            raise ValueError(
                f"height and width must be multiples of {step}, got {self.settings.height} x {self.settings.width}"
            )
        check_ranks(f"{self.model} takes", self.ranks, _transformer(self.model).num_heads)
        if self.shard_weights and self.ranks < 2:
            raise ValueError("shard_weights needs several GPUs for a video: give sequence_parallel too")

    @classmethod
    def of(
        cls,
        model: str,
        seconds: float,
        policy: RetrievalConfig,
        *,
        height: int | None = None,
        width: int | None = None,
        fps: float | None = None,
        ranks: int = 1,
        shard_weights: bool = False,
    ) -> Video:
        """A video of this length, with the family's size and rate where none are given."""
        family = FAMILIES.get(model, _WAN21)
        settings = VideoSettings(
            seconds=seconds,
            fps=fps or family.fps,
            height=height or family.height,
            width=width or family.width,
            policy=policy,
        )
        return cls(model, settings, ranks, shard_weights)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model]

    @property
    def latent_frames(self) -> int:
        return self.settings.latent_frames(self.family.temporal_factor)

    @property
    def block_seconds(self) -> float:
        """Of the video that a block makes."""
        return self.settings.policy.block_frames * self.family.temporal_factor / self.settings.fps

    @property
    def latent_frame_bytes(self) -> int:
        """Of one latent frame itself."""
        factor = self.family.spatial_factor
        pixels = self.settings.height * self.settings.width
        return _LATENT_BYTES * self.family.channels * pixels // factor**2

    @property
    def weight_bytes(self) -> int:
        """Of transformer and VAE, at their most; the text encoder has left the GPU when they come."""
        model = _transformer(self.model)
        parameters = _parameters(model)
        if self.shard_weights:
            block = _parameters(model.blocks[0])
            gathered = parameters - len(model.blocks) * block + _GATHERED_BLOCKS * block
            parameters = gathered + (parameters - gathered) // self.ranks
        return (parameters + self.family.vae_parameters) * _DTYPE.itemsize

    @property
    def working_bytes(self) -> int:
        """What a block needs beside weights, keys and values: an estimate, of which several ranks save a part of the
        transformer's and add the buffers of their exchanges."""
        estimate = _WORKING_BYTES_PER_PIXEL * self.settings.height * self.settings.width
        if self.ranks == 1:
            return estimate
        alone, shared = self._passes(1), self._passes(self.ranks)
        ffn_dim = _transformer(self.model).ffn_dim
        saved = alone.activation_bytes(ffn_dim) - shared.activation_bytes(ffn_dim)
        return estimate - saved + shared.buffer_bytes(self._channels)

    @property
    def sent_bytes_per_block(self) -> int:
        """What the first of several ranks sends to the others in all passes over a block."""
        return self._passes_per_block * self._passes(self.ranks).sent_bytes(
            _transformer(self.model).num_layers, self._channels
        )

    @property
    def sent_weight_bytes_per_block(self) -> int:
        """What each of several ranks sends of its share of the weights: to each other rank, in each pass."""
        if not self.shard_weights:
            return 0
        blocks = _parameters(_transformer(self.model).blocks) * _DTYPE.itemsize
        return self._passes_per_block * blocks * (self.ranks - 1) // self.ranks

    @property
    def _passes_per_block(self) -> int:
        return len(self.settings.sampling.denoising_steps) + 1

    @property
    def _channels(self) -> int:
        """Numbers that a token of the transformer's result has."""
        return _transformer(self.model).head.head.out_features

    @property
    def _tokens(self) -> int:
        """Of a latent frame."""
        factor = self.family.spatial_factor
        height, width = self.settings.height // factor, self.settings.width // factor
        return math.prod(_transformer(self.model).token_grid(height, width))

    def _passes(self, ranks: int) -> Pass:
        model = _transformer(self.model)
        frames = self.settings.policy.block_frames
        return Pass(1, frames, self._tokens, model.num_heads, model.head_dim, _DTYPE.itemsize, ranks)

    def record_bytes(self, budget: Budget) -> int:
        """Of the keys and values of a latent frame below the device; `page_bytes` on it."""
        model = _transformer(self.model)
        return frame_bytes(
            layers=model.num_layers,
            heads=model.num_heads // self.ranks,
            tokens=self._tokens,
            head_dim=model.head_dim,
            dtype=_DTYPE,
            bits=budget.bits,
        )

    @property
    def page_bytes(self) -> int:
        return self.record_bytes(Budget())


@dataclass(frozen=True)
class Share:
    """What a tier holds.

    Attributes:
        frames: latent frames that lie here and in no faster tier.
        bytes: on the device of these frames, below it what is allocated, copies and rounding included.
    """

    frames: int
    bytes: int


@dataclass(frozen=True)
class Plan:
    """Where the keys and values of a video lie at its end.

    Attributes:
        tiers: device, host, disk, and latents: what fits nowhere, to be rebuilt (`Budget.rebuild`) or else forgotten.
        down_bytes, up_bytes: leave the device in a block, and come back at most.
    """

    tiers: dict[str, Share]
    down_bytes: int
    up_bytes: int

    @property
    def moved_bytes_per_block(self) -> int:
        return self.down_bytes + self.up_bytes


def plan_tiers(
    latent_frames: int,
    config: RetrievalConfig,
    budget: Budget,
    *,
    page_bytes: int,
    record_bytes: int,
    latent_bytes: int,
    batch: int = 1,
    pinned: bool = True,
) -> Plan:
    """Where frames lie after this many, once each tier is filled before the next.

    What a block writes and retrieves has copies below in advance, so that its slots are free at once: these copies are
    the room that no other frame has.

    Args:
        budget: with the device's share as a number.
        page_bytes, record_bytes: of keys and values of a latent frame on the device and below it.
        latent_bytes: of the latent frame itself.
        batch: videos made together; frames are counted over all of them.
        pinned: whether host memory is page-locked, as it is beside a GPU.

    Raises:
        ValueError: the device has no room for the context of a block.
    """
    assert budget.device is not None
    frames, block = batch * latent_frames, batch * config.block_frames
    slots, least = budget.device // page_bytes, batch * config.context_frames
    if slots < least:
        raise ValueError(
            f"the device must have room for the {least} latent frames that a block sees, "
            f"{format_bytes(least * page_bytes)}, got {format_bytes(budget.device)}"
        )
    if not config.memory_frames:
        held = min(frames, least)
        empty = Share(0, 0)
        return Plan({"device": Share(held, held * page_bytes), "host": empty, "disk": empty, "latents": empty}, 0, 0)

    away = max(0, frames - slots)
    most_on_disk = budget.disk // record_bytes
    in_advance = block + batch * config.memory_frames
    copies = max(0, min(frames, away + in_advance, frames + in_advance - slots))
    room = host_room(record_bytes, budget.host_bytes, PASSING if most_on_disk else 0, pinned)
    host_bytes = in_slabs = 0
    for size in slabs(record_bytes, room, pinned):
        if in_slabs >= copies:
            break
        host_bytes += size
        in_slabs += size // record_bytes

    # Frames on the device that have copies in host memory too; with a disk behind it they are only the next to go.
    twice = block if most_on_disk else in_advance
    in_host = min(away, in_slabs if copies <= in_slabs else max(0, in_slabs - twice))
    on_disk = min(away - in_host, most_on_disk)
    written = min(most_on_disk, on_disk + block) if copies > in_slabs else 0
    claims = -(-written // records_at_once(record_bytes))
    if on_disk:
        host_bytes += host_room(record_bytes, 0, STAGED, pinned)
    lost = away - in_host - on_disk
    tiers = {
        "device": Share(frames - away, (frames - away) * page_bytes),
        "host": Share(in_host, host_bytes),
        "disk": Share(on_disk, min(most_on_disk, claims * records_at_once(record_bytes)) * record_bytes),
        "latents": Share(lost, frames * latent_bytes if lost else 0),
    }
    below = away > 0 and in_slabs + most_on_disk > 0
    return Plan(
        tiers,
        block * record_bytes if below else 0,
        batch * config.memory_frames * record_bytes if below else 0,
    )


@dataclass(frozen=True)
class Outlook:
    """A video on a machine; with several ranks, on each of their GPUs.

    Attributes:
        gpu: bytes of the GPU.
        below: budget of host memory and disk, and the bits there; its device share is what the GPU has left. Of each
            rank, as is the link.
        link: bytes a second between host and GPU, each way.
        rate: pictures a second that the GPU makes while nothing has to be waited for.
    """

    video: Video
    gpu: int
    below: Budget
    link: int
    rate: float

    @property
    def device_bytes(self) -> int:
        """What the GPU has left for keys and values; negative: not even the weights and a block fit."""
        return self.gpu - unforeseen_bytes(self.gpu) - self.video.weight_bytes - self.video.working_bytes

    @property
    def fits(self) -> bool:
        """Whether the GPU has room for the context of a block."""
        return self.device_bytes >= self.video.settings.policy.context_frames * self.video.page_bytes

    def plan(self, latent_frames: int | None = None) -> Plan:
        """Where all frames lie at the end of the video, or after so many of them.

        Raises:
            ValueError: they do not fit (`fits`).
        """
        if not self.fits:
            video, policy = self.video, self.video.settings.policy
            context = policy.context_frames * video.page_bytes
            raise ValueError(
                f"{video.model} needs a GPU with more memory than {format_bytes(self.gpu)}: "
                f"{format_bytes(video.weight_bytes)} are weights, about {format_bytes(video.working_bytes)} a block's "
                f"working memory, and the {policy.context_frames} latent frames that a block sees take "
                f"{format_bytes(context)}; choose a smaller model, picture or --context-frames"
            )
        return plan_tiers(
            self.video.latent_frames if latent_frames is None else latent_frames,
            self.video.settings.policy,
            replace(self.below, device=self.device_bytes),
            page_bytes=self.video.page_bytes,
            record_bytes=self.video.record_bytes(self.below),
            latent_bytes=self.video.latent_frame_bytes,
        )

    @property
    def block_seconds(self) -> float:
        """That a block takes while nothing has to be waited for."""
        return self.video.block_seconds * self.video.settings.fps / self.rate

    def transfer_seconds(self, plan: Plan) -> float:
        """That the copies of a block take: those down and those up go at the same time."""
        return max(plan.down_bytes, plan.up_bytes) / self.link
