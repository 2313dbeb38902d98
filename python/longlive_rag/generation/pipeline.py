"""From a prompt to a video file: each block is denoised, decoded and written while the next one is being made."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import longlive_rag
from longlive_rag.bank import Usage
from longlive_rag.budget import Bits, Budget
from longlive_rag.embedding import Embedding
from longlive_rag.files import write_json
from longlive_rag.generation.decoder import Decoder
from longlive_rag.generation.journal import Journal, JournalBlock
from longlive_rag.generation.rollout import FinishedBlock, stream
from longlive_rag.generation.room import budget_to_go_on, check_room, whole_budget
from longlive_rag.generation.sampling import upload
from longlive_rag.generation.settings import VideoSettings
from longlive_rag.generation.video import VideoWriter
from longlive_rag.memory import Retrieval
from longlive_rag.models import CausalWanModel
from longlive_rag.parallel.team import Team
from longlive_rag.retrieval_log import draw_retrieval, recorded_retrieval, retrieval_entries
from longlive_rag.selection import ReplaySelection, SimilaritySelection
from longlive_rag.tiers.pages import frame_bytes


def video_journal(
    path: Path,
    facts: dict[str, Any],
    settings: VideoSettings,
    replay: Sequence[dict[str, Any]] | None,
    budget: Budget,
    device: torch.device,
    ranks: int = 1,
) -> Journal:
    """The journal of a video, not opened yet; the arguments are those of `Pipeline` and its `generate`, and how many
    ranks make it."""
    digest = None if replay is None else hashlib.sha256(json.dumps(replay).encode()).hexdigest()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    name = f"{ranks} x {name}" if ranks > 1 else name
    # Frames that come back from below the device are not what they were.
    changing = {"replay": digest, "page_bits": budget.bits, "rebuild": budget.rebuild}
    notes = {"version": longlive_rag.__version__, "torch": torch.__version__, "device": name}
    return Journal(path, {**facts, **settings.flat(), **changing}, notes)


class Finished(NamedTuple):
    """What there is of a video before anything is made."""

    blocks: int
    retrieved: list[Retrieval]
    """By these blocks."""
    random_state: Tensor | None
    """Of the generator after their last draw."""
    beginning: Tensor | None
    """The latents [n, C, H, W] that the video begins with, finished or not."""
    budget: Budget
    """Of each rank, for the whole video."""


class Pipeline:
    """A loaded transformer and VAE that make videos with the same settings.

    Args:
        model: the transformer.
        decoder: makes pictures of latents, as Wan's VAE does.
        embedding: what memory is searched by.
        settings: of every video.
        low_memory: keep the VAE off the GPU while the transformer works.
        budget: of keys and values, in bytes (see `RetrievalMemory`), of each rank.
        team: the processes that make each video together, of which the first decodes and writes.

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
        team: Team | None = None,
    ) -> None:
        self.team = team or Team()
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
        check_room(self.budget, self.device, settings.policy, self.frame_bytes)
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
        """Bytes of keys and values per latent frame, on each rank."""
        return self._frame_bytes(16)

    def _frame_bytes(self, bits: Bits) -> int:
        rows, columns = self.model.token_grid(*self.latent_size)
        return frame_bytes(
            layers=self.model.num_layers,
            heads=self.model.num_heads // self.team.ranks,
            tokens=rows * columns,
            head_dim=self.model.head_dim,
            dtype=self.model.patch_embedding.weight.dtype,
            bits=bits,
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
        byte, as without the interruption. What was measured of the budget when it was begun holds for all of it.

        Args:
            prompt_embeds: [tokens, text_dim]; or seconds of the video and the embeddings from then on, the first at 0.
            path: `.mp4` file.
            facts: more entries for the JSON file, such as the prompt; all that decides what the video looks like and
                is not in the settings must be among them.
            begin: makes the latents [n, C, H, W] that the video begins with, whole blocks and not all of them, or a
                single frame, around which the rest of the first block is made; called once at most, since the journal
                keeps them.
            replay: what each block shall retrieve, the entry `retrieved` of a JSON file; default what is most similar.
            overwrite: begin anew if the video was begun with other settings.

        Returns:
            What the memory held in the end, and where.

        Raises:
            ValueError: the video was begun with other settings, or with more memory than is available now, or `replay`
                is of another video.
            OSError: a file cannot be written, because the disk is full for example.
        """
        settings, config = self.settings, self.settings.policy
        journal = video_journal(path, facts, settings, replay, self.budget, self.device, self.team.ranks)
        schedule = self._schedule(prompt_embeds)
        sharing = self.team.on_this_machine()
        finished = self.team.from_first(partial(self._finished, journal, overwrite, begin, sharing))
        chosen = {} if replay is None else recorded_retrieval(replay, config, self.latent_frames)
        chosen |= {block.block_start: (block.frames, block.similarity) for block in finished.retrieved}
        blocks = self.latent_frames // config.block_frames
        generator = torch.Generator().manual_seed(settings.sampling.seed)
        finished_blocks = self._stream(schedule, journal, finished, chosen, generator)
        if not self.team.first:
            for block in finished_blocks:
                usage = block.usage
            return usage
        for remark in journal.remarks:
            print(remark)
        if journal.blocks:
            seconds = self.decoder.pictures(journal.blocks * config.block_frames) / settings.fps
            print(
                f"{path.name} goes on after {journal.blocks} of {blocks} blocks, at {seconds:.1f} s; "
                f"their keys and values are computed again first.",
                flush=True,
            )

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
            if any(entry["frames"] for entry in entries):
                seconds_per_frame = self.decoder.temporal_factor / settings.fps
                draw_retrieval(entries, config, self.latent_frames, seconds_per_frame, path.with_suffix(".png"))
        journal.remove()
        return usage

    def _finished(
        self, journal: Journal, overwrite: bool, begin: Callable[[], Tensor] | None, sharing: int
    ) -> Finished:
        """Open the journal, and have the beginning made if it is not there yet.

        Args:
            sharing: ranks of the team that share this machine.
        """
        if overwrite:
            journal.remove_others()
        journal.open()
        on_device, below = (self.held_frames * self._frame_bytes(bits) for bits in (16, self.budget.bits))
        budget = budget_to_go_on(journal, self.budget, self.device, on_device, below, self.team.ranks, sharing)
        state = journal.block(journal.blocks - 1).random_state if journal.blocks else None
        return Finished(journal.blocks, journal.retrieved, state, self._beginning(journal, begin), budget)

    def _beginning(self, journal: Journal, begin: Callable[[], Tensor] | None) -> Tensor | None:
        """The latents [n, C, H, W] that the video begins with."""
        if begin is None:
            return None
        latents = journal.beginning()
        if latents is None:
            latents = begin()
            journal.put_beginning(latents)
        frames = self.settings.policy.block_frames
        expected = (self.model.in_dim, *self.latent_size)
        whole = latents.shape[0] % frames == 0 or latents.shape[0] == 1
        if latents.shape[1:] != expected or not whole or latents.shape[0] >= self.latent_frames:
            raise ValueError(
                f"latents to begin with must be [n, {', '.join(map(str, expected))}], n 1 or a multiple of {frames} "
                f"below {self.latent_frames}, got {list(latents.shape)}"
            )
        return latents

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

    def _stream(
        self,
        schedule: list[tuple[int, Tensor]],
        journal: Journal,
        finished: Finished,
        chosen: Mapping[int, tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]]],
        generator: torch.Generator,
    ) -> Iterator[FinishedBlock]:
        """All blocks, first those that are there."""
        settings, config = self.settings, self.settings.policy
        beginning = None if finished.beginning is None else finished.beginning[None]
        begins_in_block = beginning is not None and beginning.shape[1] < config.block_frames
        given = () if beginning is None or begins_in_block else beginning.split(config.block_frames, dim=1)
        made_blocks = max(finished.blocks, len(given))
        block_shape = (1, config.block_frames, self.model.in_dim, *self.latent_size)

        # Drawn on the CPU, block by block: the same on every device, and a longer video begins like a shorter one.
        def draw(shape: tuple[int, ...]) -> Tensor:
            return upload(torch.randn(shape, generator=generator), self.device)

        def noise() -> Iterator[Tensor]:
            for _ in range(made_blocks):
                yield torch.zeros(block_shape, device=self.device)  # these are there already
            if finished.random_state is not None:
                generator.set_state(finished.random_state)
            for _ in range(made_blocks, self.latent_frames // config.block_frames):
                yield draw(block_shape)

        def latents(index: int) -> Tensor:
            return journal.block(index).latents

        recorded = (self.team.from_first(partial(latents, index)) for index in range(finished.blocks))
        return stream(
            self.model,
            noise(),
            schedule,
            config,
            sampling=replace(settings.sampling, renoise=lambda _, shape: draw(shape)),
            embedding=self.embedding,
            selection=ReplaySelection(chosen, SimilaritySelection()),
            given=chain(recorded, given[finished.blocks :]),
            first=beginning if begins_in_block else None,
            budget=finished.budget,
            group=self.team.group,
        )

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
            budget = whole_budget(block.budget, self.team.ranks)
            journal.put_block(index, JournalBlock(block.latents.cpu(), state, block.retrieval, budget))
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
