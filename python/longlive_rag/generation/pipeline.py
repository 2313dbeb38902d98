"""From a prompt to a video file: each block is denoised, decoded and written while the next one is being made."""

from __future__ import annotations

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from longlive_rag.bank import Usage
from longlive_rag.budget import Budget, format_bytes
from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import Embedding
from longlive_rag.files import write_json
from longlive_rag.generation.rollout import stream
from longlive_rag.generation.sampling import PAPER_SAMPLING, Sampling
from longlive_rag.generation.video import VideoWriter
from longlive_rag.generation.wan_vae import StreamingDecoder
from longlive_rag.memory import Retrieval
from longlive_rag.models import CausalWanModel
from longlive_rag.retrieval_log import draw_retrieval, retrieval_entries
from longlive_rag.tiers.pages import frame_bytes

# Rows and columns of pixels per token, at least: the VAE's 8 times the patch of 2.
_PIXELS_PER_TOKEN = 16


@dataclass(frozen=True)
class VideoSettings:
    """Everything besides weights and prompt that decides what a video looks like.

    Raises:
        ValueError: a value is out of range.
    """

    seconds: float = 30.0
    fps: float = 16.0
    height: int = 480
    width: int = 832
    sampling: Sampling = PAPER_SAMPLING
    """Its seed also fixes the initial noise; its `renoise` is not used."""
    policy: RetrievalConfig = field(default_factory=RetrievalConfig)

    def __post_init__(self) -> None:
        if not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds must be positive, got {self.seconds}")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {self.fps}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value < _PIXELS_PER_TOKEN or value % _PIXELS_PER_TOKEN:
                raise ValueError(f"{name} must be a positive multiple of {_PIXELS_PER_TOKEN} pixels, got {value}")

    def record(self) -> dict[str, Any]:
        """What a video's JSON file says of its settings."""
        return {
            "seconds": self.seconds,
            "fps": self.fps,
            "height": self.height,
            "width": self.width,
            "denoising_steps": list(self.sampling.denoising_steps),
            "timestep_shift": self.sampling.timestep_shift,
            "context_noise": self.sampling.context_noise,
            "seed": self.sampling.seed,
            "memory": asdict(self.policy),
        }

    def latent_frames(self, temporal_factor: int) -> int:
        """Whole blocks of latent frames that make at least `seconds` of video."""
        pictures = math.ceil(self.seconds * self.fps - 1e-6)
        frames = math.ceil((pictures - 1) / temporal_factor) + 1
        block = self.policy.block_frames
        return math.ceil(frames / block) * block


class Pipeline:
    """A loaded transformer and VAE that make videos with the same settings.

    Args:
        model: the transformer.
        decoder: the VAE.
        embedding: what memory is searched by.
        settings: of every video.
        low_memory: keep the VAE off the GPU while the transformer works.
        budget: of keys and values, in bytes (see `RetrievalMemory`).

    Raises:
        ValueError: the parts do not fit together, or the device has no room for the context of a single block.
    """

    def __init__(
        self,
        model: CausalWanModel,
        decoder: StreamingDecoder,
        embedding: Embedding,
        settings: VideoSettings,
        *,
        low_memory: bool = False,
        budget: Budget | None = None,
    ) -> None:
        self.model, self.decoder, self.embedding, self.settings = model, decoder, embedding, settings
        self.low_memory = low_memory
        self.device = model.patch_embedding.weight.device
        if model.in_dim != decoder.channels:
            raise ValueError(f"the transformer has {model.in_dim} latent channels, but the VAE has {decoder.channels}")
        factor = decoder.spatial_factor
        if settings.height % factor or settings.width % factor:
            raise ValueError(
                f"height and width must be multiples of {factor}, got {settings.height} x {settings.width}"
            )
        self.latent_size = (settings.height // factor, settings.width // factor)
        model.token_grid(*self.latent_size)
        self.latent_frames = settings.latent_frames(decoder.temporal_factor)
        self.budget = budget or Budget()
        self._check_room()
        if low_memory:
            decoder.offload()

    @property
    def held_frames(self) -> int:
        """Latent frames whose keys and values are kept, on the device or in host memory."""
        config = self.settings.policy
        return self.latent_frames if config.memory_frames else config.context_frames + config.block_frames

    @property
    def frame_bytes(self) -> int:
        """Bytes of keys and values per latent frame."""
        rows, columns = self.model.token_grid(*self.latent_size)
        return frame_bytes(
            layers=self.model.num_layers,
            heads=self.model.num_heads,
            tokens=rows * columns,
            head_dim=self.model.head_dim,
            dtype=self.model.patch_embedding.weight.dtype,
        )

    def generate(self, prompt_embeds: Tensor, path: Path, facts: dict[str, Any]) -> Usage:
        """Make one video and, next to it, `<stem>.json` with what was retrieved and `<stem>.png`, a picture of that.

        The video gets its final name last, so if it is there, all three are complete. An interrupted one stays as
        `<stem>.partial.mp4`.

        Args:
            prompt_embeds: [tokens, text_dim].
            path: `.mp4` file.
            facts: more entries for the JSON file, such as the prompt.

        Returns:
            What the memory held in the end, and where.
        """
        settings, config = self.settings, self.settings.policy
        generator = torch.Generator().manual_seed(settings.sampling.seed)

        # Drawn on the CPU, block by block: the same on every device, and a longer video begins like a shorter one.
        def draw(shape: tuple[int, ...]) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        block_shape = (1, config.block_frames, self.model.in_dim, *self.latent_size)
        blocks = self.latent_frames // config.block_frames
        retrieved: list[Retrieval] = []
        started = time.monotonic()
        self.decoder.reset()
        # One block is written while the next is made, so there are never more than two.
        writing: Future[None] | None = None
        with (
            VideoWriter(path, fps=settings.fps, size=(settings.height, settings.width)) as writer,
            ThreadPoolExecutor(1) as writers,
        ):
            finished_blocks = stream(
                self.model,
                (draw(block_shape) for _ in range(blocks)),
                prompt_embeds[None],
                config,
                sampling=replace(settings.sampling, renoise=lambda _, shape: draw(shape)),
                embedding=self.embedding,
                budget=self.budget,
            )
            bar = tqdm(finished_blocks, desc=path.stem[:40], total=blocks, unit="block")
            for block in bar:
                pictures = self._decode(block.latents[0])
                if writing is not None:
                    writing.result()
                writing = writers.submit(writer.write, pictures.numpy())
                if block.retrieval is not None:
                    retrieved.append(block.retrieval)
                usage = block.usage
            if writing is not None:
                writing.result()
            entries = retrieval_entries(retrieved)
            report = {
                **facts,
                "settings": settings.record(),
                "frames": writer.frames_written,
                "latent_frames": self.latent_frames,
                "wall_seconds": round(time.monotonic() - started, 3),
                "retrieved": entries,
            }
            write_json(path.with_suffix(".json"), report)
            if entries:
                seconds_per_frame = self.decoder.temporal_factor / settings.fps
                draw_retrieval(entries, config, self.latent_frames, seconds_per_frame, path.with_suffix(".png"))
        return usage

    def _decode(self, latents: Tensor) -> Tensor:
        if not self.low_memory:
            return self.decoder.decode(latents)
        self.decoder.restore()
        pictures = self.decoder.decode(latents)
        self.decoder.offload()
        return pictures

    def _check_room(self) -> None:
        if self.budget.device is not None:
            room, name = self.budget.device, "budget.device"
        elif self.device.type == "cuda":
            room, name = torch.cuda.mem_get_info(self.device)[0], f"the free memory of {self.device}"
        else:
            return
        context = self.settings.policy.context_frames
        if room < context * self.frame_bytes:
            raise ValueError(
                f"{name} must hold the keys and values of context_frames = {context} latent frames, "
                f"{format_bytes(context * self.frame_bytes)} or {format_bytes(self.frame_bytes)} for each, got "
                f"{format_bytes(room)}; choose a smaller context or video size"
            )
