"""The streams of one video: one for each policy, from the same noise."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longlive_rag.bank import Usage
from longlive_rag.generation.rollout import FinishedBlock, stream
from longlive_rag.selection import ReplaySelection
from longlive_rag.serve.recording import Recording
from longlive_rag.serve.scene import Scene, Shot, Wish

Event = dict[str, Any]


class Take:
    """The streams of one video, one for each policy, fed with the same noise and prompts."""

    def __init__(self, scene: Scene, recording: Recording) -> None:
        self.scene, self.recording = scene, recording
        self.last_shot: Shot | None = None
        self._shots: dict[int, Shot] = {}
        self._given = recording.blocks
        facts = recording.facts
        self._decoders = [scene.new_decoder() for _ in facts.policies]
        self._streams = [self._stream(panel, name) for panel, name in enumerate(facts.policies)]

    def replay(self) -> Iterator[int]:
        """Go through the blocks that are on disk, so that memory is what it was; yields how many are done."""
        reach = max(decoder.reach for decoder in self._decoders)
        length = self.scene.block_frames
        for block in range(self._given):
            self.last_shot = Shot(**self.recording.record(block)["shot"])
            self._shots = {block: self.last_shot}
            for finished, decoder in zip(map(next, self._streams), self._decoders, strict=True):
                if finished.start + length + reach > self._given * length:
                    decoder.decode(finished.latents[0])
            if block % 16 == 15 or block + 1 == self._given:
                yield block + 1

    def make(self, block: int, shot: Shot, wish: Wish) -> Event:
        """Make the next block and keep it; returns its record."""
        begun = time.monotonic()
        self._shots = {block: shot}
        blocks = [next(each) for each in self._streams]
        panels = [decoder.decode(made.latents[0]) for decoder, made in zip(self._decoders, blocks, strict=True)]
        length = self.scene.block_frames
        thumbnails = [images[round(i * len(images) / length)] for images in panels for i in range(length)]
        shown = np.concatenate(panels, axis=2)
        scale = self.scene.enlarge
        facts = {
            "shot": asdict(shot),
            "wish": asdict(wish),
            "retrieved": [_retrieved(made) for made in blocks],
            "memory": [_memory(made.usage) for made in blocks],
            "seconds": round(time.monotonic() - begun, 4),
        }
        latents = torch.cat([made.latents for made in blocks]).cpu()
        record = self.recording.add(shown.repeat(scale, 1).repeat(scale, 2), thumbnails, latents, facts)
        self.last_shot = shot
        return record

    def close(self) -> None:
        for each in self._streams:
            each.close()
        for decoder in self._decoders:
            decoder.close()

    def _stream(self, panel: int, policy: str) -> Any:
        scene, recording, length = self.scene, self.recording, self.scene.block_frames
        seed, given = recording.facts.seed, self._given

        def noise() -> Iterator[Tensor]:
            block = 0
            while True:
                yield scene.noise(seed, block)
                block += 1

        def known() -> Iterator[Tensor]:
            for block in range(given):
                yield recording.latents(block)[panel : panel + 1]

        shown = scene.policies[policy]
        return stream(
            scene.model,
            noise(),
            lambda start: scene.embeds(self._shots[start // length]),
            shown.config,
            sampling=scene.sampling_from(seed, given),
            embedding=scene.embedding,
            selection=ReplaySelection(_Recorded(recording, panel, given), then=shown.selection),
            given=known(),
            budget=scene.budget,
        )


def _retrieved(made: FinishedBlock) -> Event | None:
    if made.retrieval is None:
        return None
    return {"frames": made.retrieval.frames[0], "similarity": made.retrieval.similarity[0]}


def _memory(usage: Usage) -> Event:
    tiers = {name: tier._asdict() for name, tier in zip(usage._fields, usage[:4], strict=False) if tier.bytes}
    return {**tiers, "forgotten": usage.forgotten}


class _Recorded(Mapping[int, tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]]]):
    """What the blocks on disk retrieved for one policy, by their first latent frame."""

    def __init__(self, recording: Recording, panel: int, blocks: int) -> None:
        self._recording, self._panel, self._blocks = recording, panel, blocks
        self._length = recording.facts.latent_shape[1]

    def __getitem__(self, start: int) -> tuple[list[list[int]], list[list[float]]]:
        if not 0 <= start < self._blocks * self._length:
            raise KeyError(start)
        entry = self._recording.record(start // self._length)["retrieved"][self._panel]
        if entry is None:
            raise KeyError(start)
        return [entry["frames"]], [entry["similarity"]]

    def __contains__(self, start: object) -> bool:
        return isinstance(start, int) and 0 <= start < self._blocks * self._length

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, self._blocks * self._length, self._length))

    def __len__(self) -> int:
        return self._blocks
