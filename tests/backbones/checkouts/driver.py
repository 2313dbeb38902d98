"""The driver of Self-Forcing, and what all drivers share: they recognise a checkout, build its pipeline, and have it
generate."""

from __future__ import annotations

import importlib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.checkouts.foreign import Settings, Sizes, use_tiny
from longlive_rag import RetrievalConfig

Config = RetrievalConfig | str | None


@dataclass(frozen=True)
class Video:
    """What to generate; sizes in latent pixels."""

    frames: int
    size: tuple[int, int] = (4, 8)
    batch: int = 1
    prompts: tuple[str, ...] = ("a cat",)
    switches: tuple[int, ...] = ()
    """First frame of each prompt after the first."""
    given: int = 0
    """Frames of an image or video that it goes on from."""
    seed: int = 0

    def noise(self, channels: int = 16) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, self.frames, channels, *self.size, generator=generator)

    def initial(self, channels: int = 16) -> Tensor | None:
        if not self.given:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.randn(self.batch, self.given, channels, *self.size, generator=generator)


@dataclass(frozen=True)
class Case:
    name: str
    videos: tuple[Video, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    config: Config = "native"
    """For `patch`; None: what it reads off the pipeline."""
    family: str | None = None
    """As which it is recognised, if not as its driver's."""


def sizes_in_turn(frames: int, other: int = 30) -> tuple[Video, ...]:
    """Landscape, portrait with as many tokens, and another number of tokens."""
    return (Video(frames), Video(other, size=(8, 4), seed=1), Video(other, size=(4, 12), seed=2))


class TextEncoder(torch.nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self._sizes = sizes

    def forward(self, text_prompts: Sequence[str]) -> dict[str, Tensor]:
        shape = (self._sizes.text_len, self._sizes.text_dim)
        generators = [torch.Generator().manual_seed(zlib.crc32(prompt.encode())) for prompt in text_prompts]
        return {"prompt_embeds": torch.stack([torch.randn(shape, generator=generator) for generator in generators])}


class Decoder(torch.nn.Module):
    """Stands for the VAE; the latents are what is compared."""

    def decode_to_pixel(self, latents: Tensor, *_: Any, **__: Any) -> Tensor:
        return latents

    decode_to_pixel_chunk = decode_to_pixel


class Driver:
    """Self-Forcing and Causal-Forcing, and what their relatives share."""

    repository = "Self-Forcing"
    family = "Self-Forcing"
    mark = "pipeline/causal_inference.py"
    """A file that only checkouts of this family, or of one that comes later in the list, have."""
    models: tuple[str, ...] = ("wan.modules.causal_model",)
    pipeline = ("pipeline.causal_inference", "CausalInferencePipeline")
    caches: tuple[str, ...] = ("kv_cache1",)
    channels = 16
    published: dict[str, Any] = {  # noqa: RUF012
        "denoising_step_list": [1000, 500], "warp_denoising_step": True, "num_frame_per_block": 3,
        "independent_first_frame": False, "context_noise": 0,
    }  # fmt: skip

    def __init__(self, root: Path, sizes: Sizes, fill: Callable[[torch.nn.Module], None]) -> None:
        self.root, self.sizes, self._fill = root, sizes, fill
        for name in self.models:
            use_tiny(importlib.import_module(name).CausalWanModel, sizes, fill)

    @classmethod
    def fits(cls, root: Path) -> bool:
        return (root / cls.mark).is_file()

    def cases(self, frames: int) -> list[Case]:
        window = {"local_attn_size": 9, "sink_size": 1}
        return [
            Case("window 9, sink 1", sizes_in_turn(frames), {"model_kwargs": window}),
            Case("all of the past", sizes_in_turn(21, other=21)),
            Case("window 9, batch of 2", (Video(30, batch=2),), {"model_kwargs": window}),
            Case(
                "image-to-video",
                (Video(30, given=1),),
                {"model_kwargs": {"local_attn_size": 9}, "independent_first_frame": True},
            ),
        ]

    def build(self, settings: dict[str, Any]) -> Any:
        self.sizes.tokens = 8
        kwargs = Settings({"local_attn_size": -1, "timestep_shift": 5.0} | settings.get("model_kwargs", {}))
        args = Settings(self.published | settings | {"model_kwargs": kwargs})
        pipeline = self.make(args)
        pipeline.num_transformer_blocks = self.sizes.layers
        return pipeline

    def make(self, args: Settings) -> Any:
        module, name = self.pipeline
        make = getattr(importlib.import_module(module), name)
        return make(args, torch.device("cpu"), text_encoder=TextEncoder(self.sizes), vae=Decoder())

    def target(self, pipeline: Any) -> Any:
        """What a user patches."""
        return pipeline

    def resize(self, pipeline: Any, size: tuple[int, int], batch: int) -> None:
        """Set the pipeline up for another number of tokens; with as many, it keeps its cache."""
        tokens = math.prod(size) // 4
        if tokens == self.sizes.tokens:
            return
        for module in pipeline.generator.model.modules():
            for name in ("max_attention_size", "frame_length", "block_length"):
                if hasattr(module, name):
                    setattr(module, name, getattr(module, name) // self.sizes.tokens * tokens)
        pipeline.generator.seq_len = pipeline.generator.seq_len // self.sizes.tokens * tokens
        self.sizes.tokens = pipeline.frame_seq_length = tokens
        for name in self.caches:
            setattr(pipeline, name, None)

    def generate(self, pipeline: Any, video: Video) -> Tensor:
        """Latents [B, F, C, H, W]."""
        self.resize(pipeline, video.size, video.batch)
        torch.manual_seed(video.seed)
        options = {} if video.initial() is None else {"initial_latent": video.initial()}
        prompts = list(video.prompts) * video.batch
        return pipeline.inference(video.noise(), prompts, return_latents=True, **options)[1]

    def expected(self, pipeline: Any, video: Video) -> Tensor:
        """What the patched pipeline should make; the unpatched one's own, unless that is known to be at fault."""
        return self.generate(pipeline, video)

    def retrieved(self, pipeline: Any) -> list[list[int]] | None:
        """Frames that each block retrieved by the repository's own code."""
        return None
