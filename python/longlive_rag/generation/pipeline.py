"""From a prompt to a video file: each block is denoised, decoded and written while the next one is being made."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import longlive_rag
from longlive_rag.bank import Usage
from longlive_rag.budget import Budget, format_bytes
from longlive_rag.config import RetrievalConfig
from longlive_rag.embedding import Embedding
from longlive_rag.files import write_json
from longlive_rag.generation.decoder import Decoder
from longlive_rag.generation.journal import Journal, JournalBlock
from longlive_rag.generation.rollout import FinishedBlock, stream
from longlive_rag.generation.sampling import PAPER_SAMPLING, Sampling, upload
from longlive_rag.generation.video import VideoWriter
from longlive_rag.memory import Retrieval
from longlive_rag.models import CausalWanModel
from longlive_rag.retrieval_log import draw_retrieval, recorded_retrieval, retrieval_entries
from longlive_rag.selection import ReplaySelection, SimilaritySelection
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

    def flat(self) -> dict[str, Any]:
        """The same under the names of the command line's options."""
        return flat_settings(self.record())

    def latent_frames(self, temporal_factor: int) -> int:
        """Whole blocks of latent frames that make at least `seconds` of video."""
        pictures = math.ceil(self.seconds * self.fps - 1e-6)
        frames = math.ceil((pictures - 1) / temporal_factor) + 1
        block = self.policy.block_frames
        return math.ceil(frames / block) * block


def flat_settings(record: dict[str, Any]) -> dict[str, Any]:
    """Settings as a video's JSON file has them, on one level."""
    return {**{name: value for name, value in record.items() if name != "memory"}, **record["memory"]}


def video_journal(
    path: Path,
    facts: dict[str, Any],
    settings: VideoSettings,
    replay: Sequence[dict[str, Any]] | None,
    budget: Budget,
    device: torch.device,
) -> Journal:
    """The journal of a video, not opened yet; the arguments are those of `Pipeline` and its `generate`."""
    digest = None if replay is None else hashlib.sha256(json.dumps(replay).encode()).hexdigest()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    # Frames that come back from below the device are not what they were.
    changing = {"replay": digest, "page_bits": budget.bits, "rebuild": budget.rebuild}
    notes = {"version": longlive_rag.__version__, "torch": torch.__version__, "device": name}
    return Journal(path, {**facts, **settings.flat(), **changing}, notes)


class Pipeline:
    """A loaded transformer and VAE that make videos with the same settings.

    Args:
        model: the transformer.
        decoder: makes pictures of latents, as Wan's VAE does.
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
        decoder: Decoder,
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
        if self.device.type == "cuda":
            self._decoding = torch.cuda.Stream(self.device)
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

    def generate(
        self,
        prompt_embeds: Tensor | Sequence[tuple[float, Tensor]],
        path: Path,
        facts: dict[str, Any],
        *,
        begin: Callable[[], Tensor] | None = None,
        replay: Sequence[dict[str, Any]] | None = None,
        overwrite: bool = False,
    ) -> Usage:
        """Make one video and, next to it, `<stem>.json` with what was retrieved and `<stem>.png`, a picture of that.

        The video gets its final name last, so if it is there, all three are complete. One that was interrupted stays as
        `<stem>.partial.mp4`, with a `Journal` from which the same call goes on: the result is the same, to the last
        byte, as without the interruption.

        Args:
            prompt_embeds: [tokens, text_dim]; or seconds of the video and the embeddings from then on, the first at 0.
            path: `.mp4` file.
            facts: more entries for the JSON file, such as the prompt; all that decides what the video looks like and
                is not in the settings must be among them.
            begin: makes the latents [n, C, H, W] that the video begins with, whole blocks and not all of them; called
                once at most, since the journal keeps them.
            replay: what each block shall retrieve, the entry `retrieved` of a JSON file; default what is most similar.
            overwrite: begin anew if the video was begun with other settings.

        Returns:
            What the memory held in the end, and where.

        Raises:
            ValueError: the video was begun with other settings, or `replay` is of another video.
            OSError: a file cannot be written, because the disk is full for example.
        """
        settings, config = self.settings, self.settings.policy
        journal = video_journal(path, facts, settings, replay, self.budget, self.device)
        if overwrite:
            journal.remove_others()
        journal.open()
        chosen = {} if replay is None else recorded_retrieval(replay, config, self.latent_frames)
        chosen |= {block.block_start: (block.frames, block.similarity) for block in journal.retrieved}
        blocks = self.latent_frames // config.block_frames
        for remark in journal.remarks:
            print(remark)
        if journal.blocks:
            seconds = self.decoder.pictures(journal.blocks * config.block_frames) / settings.fps
            print(
                f"{path.name} goes on after {journal.blocks} of {blocks} blocks, at {seconds:.1f} s; "
                f"their keys and values are computed again first.",
                flush=True,
            )

        block_shape = (1, config.block_frames, self.model.in_dim, *self.latent_size)
        given = self._beginning(journal, begin)
        made_blocks = max(journal.blocks, len(given))
        generator = torch.Generator().manual_seed(settings.sampling.seed)

        # Drawn on the CPU, block by block: the same on every device, and a longer video begins like a shorter one.
        def draw(shape: tuple[int, ...]) -> Tensor:
            return upload(torch.randn(shape, generator=generator), self.device)

        def noise() -> Iterator[Tensor]:
            for _ in range(made_blocks):
                yield torch.zeros(block_shape, device=self.device)  # these are there already
            if journal.blocks:
                generator.set_state(journal.block(journal.blocks - 1).random_state)
            for _ in range(made_blocks, blocks):
                yield draw(block_shape)

        retrieved: list[Retrieval] = []
        self.decoder.reset()
        # One block is decoded and written while the next is made, so there are never more than two.
        writing: Future[None] | None = None
        with (
            VideoWriter(
                path,
                fps=settings.fps,
                size=(settings.height, settings.width),
                store=journal,
                finished=journal.segments(self.decoder.pictures(journal.blocks * config.block_frames)),
            ) as writer,
            ThreadPoolExecutor(1) as writers,
        ):
            finished_pictures = writer.frames_written
            finished_blocks = stream(
                self.model,
                noise(),
                self._schedule(prompt_embeds),
                config,
                sampling=replace(settings.sampling, renoise=lambda _, shape: draw(shape)),
                embedding=self.embedding,
                selection=ReplaySelection(chosen, SimilaritySelection()),
                given=chain((journal.block(index).latents for index in range(journal.blocks)), given[journal.blocks :]),
                budget=self.budget,
            )
            for index, block in enumerate(tqdm(finished_blocks, desc=path.stem[:40], total=blocks, unit="block")):
                state = generator.get_state() if index >= journal.blocks else None
                if writing is not None:
                    writing.result()
                finish = partial(self._finish_block, journal, writer, index, state, finished_pictures, block)
                if self.low_memory:
                    finish()  # the decoder may be on the GPU only while the transformer rests
                else:
                    writing = writers.submit(self._beside, self._made_so_far(), finish)
                if block.retrieval is not None:
                    retrieved.append(block.retrieval)
                usage = block.usage
            if writing is not None:
                writing.result()
            entries = retrieval_entries(retrieved)
            report = {
                **facts,
                "version": longlive_rag.__version__,
                "settings": settings.record(),
                "frames": writer.frames_written,
                "latent_frames": self.latent_frames,
                "retrieved": entries,
            }
            # The earlier video would be taken for one of the new settings. All of the new one is in the journal.
            path.unlink(missing_ok=True)
            write_json(path.with_suffix(".json"), report)
            path.with_suffix(".png").unlink(missing_ok=True)
            if entries:
                seconds_per_frame = self.decoder.temporal_factor / settings.fps
                draw_retrieval(entries, config, self.latent_frames, seconds_per_frame, path.with_suffix(".png"))
        journal.remove()
        return usage

    def _finish_block(
        self,
        journal: Journal,
        writer: VideoWriter,
        index: int,
        state: Tensor | None,
        finished_pictures: int,
        block: FinishedBlock,
    ) -> None:
        """Record a block, decode it, and write its pictures.

        Args:
            state: of the random numbers after the block; None: it is recorded already.
        """
        if state is not None:
            journal.put_block(index, JournalBlock(block.latents.cpu(), state, block.retrieval))
        writer.write(self._decode_after(finished_pictures, block).numpy())

    def _made_so_far(self) -> torch.cuda.Event | None:
        """Marks what the GPU was given to do so far."""
        return torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None

    def _beside(self, made: torch.cuda.Event | None, finish: Callable[[], None]) -> None:
        """Run `finish` while the transformer goes on: on a GPU, on a stream of its own, after `made`."""
        if made is None:
            return finish()
        with torch.cuda.device(self.device), torch.cuda.stream(self._decoding):
            self._decoding.wait_event(made)
            finish()
            # Before the block's latents are given back to the stream that they come from.
            self._decoding.synchronize()

    def _beginning(self, journal: Journal, begin: Callable[[], Tensor] | None) -> list[Tensor]:
        """The blocks [1, F, C, H, W] that the video begins with."""
        if begin is None:
            return []
        latents = journal.beginning()
        if latents is None:
            latents = begin()
            journal.put_beginning(latents)
        frames = self.settings.policy.block_frames
        expected = (self.model.in_dim, *self.latent_size)
        if latents.shape[1:] != expected or latents.shape[0] % frames or latents.shape[0] >= self.latent_frames:
            raise ValueError(
                f"the latents to begin with must be [n, {', '.join(map(str, expected))}], n a multiple of {frames} "
                f"below {self.latent_frames}, got {list(latents.shape)}"
            )
        return list(latents[None].split(frames, dim=1))

    def _schedule(self, prompts: Tensor | Sequence[tuple[float, Tensor]]) -> list[tuple[int, Tensor]]:
        """As `stream` takes it. A prompt holds from the first block that begins at its time or later."""
        timed = [(0.0, prompts)] if isinstance(prompts, Tensor) else prompts
        factor, schedule = self.decoder.temporal_factor, []
        for seconds, embeds in timed:
            # Latent frame f > 0 begins with picture factor * (f - 1) + 1.
            picture = seconds * self.settings.fps
            frame = math.ceil((picture - 1) / factor - 1e-6) + 1 if picture > 0 else 0
            if frame >= self.latent_frames:
                raise ValueError(f"prompts must change before the video's end, got a change at {seconds:g}s")
            schedule.append((frame, embeds[None]))
        return schedule

    def _decode_after(self, finished_pictures: int, block: FinishedBlock) -> Tensor:
        """Those pictures of the block that are not finished, uint8 [N, H, W, 3]; what the decoder must see before them
        is decoded too."""
        frames = block.latents.shape[1]
        end = self.decoder.pictures(block.start + frames)
        to_come = finished_pictures - self.decoder.pictures(block.start + frames + self.decoder.reach)
        if to_come >= 0:
            return torch.empty(0, self.settings.height, self.settings.width, 3, dtype=torch.uint8)
        pictures = self._decode(block.latents[0])
        return pictures[max(0, finished_pictures - (end - len(pictures))) :]

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
