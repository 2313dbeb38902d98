"""Which frames come back: the paper's similarity search, and the controls every comparison needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from longlive_rag.context import UNUSED
from longlive_rag.index import LatentIndex


@dataclass(frozen=True)
class Request:
    """What a block searches memory for."""

    start: int
    """First frame of the block."""
    query: Tensor
    """Embedding to compare with, [B, D]."""
    candidates: range
    """Frames that may come back."""
    k: int
    """How many of them, at most."""
    bounds: tuple[Tensor, Tensor] | None = None
    """First candidate, and the one behind the last, for each video: int32 [B] on the query's device."""


@dataclass(frozen=True)
class Retrieval:
    """What one block retrieved."""

    block_start: int
    frame_table: Tensor
    """int32 [B, K], negative: unused. On the memory's device, so that recording it does not stop the GPU."""
    similarity_table: Tensor
    """float32 [B, K]."""

    @property
    def frames(self) -> list[list[int]]:
        """Retrieved frames of each video, most similar first."""
        return [[frame for frame in row if frame >= 0] for row in self.frame_table.tolist()]

    @property
    def similarity(self) -> list[list[float]]:
        """Cosine similarity of each retrieved frame."""
        rows = zip(self.frame_table.tolist(), self.similarity_table.tolist(), strict=True)
        return [[value for frame, value in zip(*row, strict=True) if frame >= 0] for row in rows]


class Selection(Protocol):
    """Chooses frames for a block."""

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        """Frames int32 [B, k], unused entries negative, and their similarity to the query, float32 [B, k]."""
        ...


class SimilaritySelection:
    """The k candidates most similar to the query: the paper's selection (arXiv 2606.02553)."""

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        first, last = request.bounds or (request.candidates.start, request.candidates.stop)
        return index.search(request.query, first, last, request.k)


class OldestAlikeSelection:
    """The most similar frames, each represented by the oldest frame that shows the same.

    What a block retrieves is copied into its own frames, with small errors; copies of copies drift. Among frames that
    are alike, the oldest has been copied least often. Age must not decide among others, or place and motion are lost:
    a frame counts as alike only if it is `NEARER` times as far as the nearer neighbour in time, or nearer, in 1 -
    cosine. So where nothing moves, hardly anything is alike, and the most similar frames come back. No frame alike to
    one that was chosen is chosen again.

    Source: our own; docs/findings.md has what it brings.
    """

    NEARER = 0.5
    """At 1, the neighbouring beat of another lap is mistaken for the same one by rounding alone."""

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        """The k best pictures, each by its oldest frame."""
        unit = index.embeddings * index.inverse_norms[..., None].nan_to_num(0.0).to(index.embeddings.dtype)
        batch, count = unit.shape[:2]
        frame = torch.arange(count, device=unit.device)
        bounds = [bound[:, None] for bound in request.bounds] if request.bounds else None
        first, last = bounds or (request.candidates.start, request.candidates.stop)
        free = (frame >= first) & (frame < last) & ~index.inverse_norms.isnan()
        query = torch.nn.functional.normalize(request.query.to(unit.dtype), dim=-1)
        similarity = torch.einsum("bnd,bd->bn", unit, query).float()
        rows = torch.arange(batch, device=unit.device)
        frames, values = [], []
        for _ in range(request.k):
            ranked = similarity.masked_fill(~free, -torch.inf)
            value, best = ranked.max(dim=1)
            resemblance = torch.einsum("bnd,bd->bn", unit, unit[rows, best]).float()
            before, after = (best - 1).clamp(min=0), (best + 1).clamp(max=count - 1)
            neighbours = torch.maximum(resemblance[rows, before], resemblance[rows, after])
            alike = (1 - resemblance <= self.NEARER * (1 - neighbours[:, None])) | (frame == best[:, None])
            oldest = (alike & free).int().argmax(dim=1)
            found = value > -torch.inf
            frames.append(torch.where(found, oldest, UNUSED))
            values.append(torch.where(found, similarity[rows, oldest], -torch.inf))
            free = free & ~alike
        return torch.stack(frames, dim=1).int(), torch.stack(values, dim=1)


class _Control(ABC):
    """A choice that ignores the embeddings; their similarity to the query is reported nevertheless."""

    @abstractmethod
    def choose(self, start: int, candidates: Sequence[Sequence[int]], k: int) -> Sequence[Sequence[int]]:
        """Frames for each video, best first; those that are not candidates are skipped.

        Args:
            start: first frame of the block.
            candidates: frames of each video that may come back, in order.
            k: how many of them, at most.
        """

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        batch = request.query.shape[0]
        frames = torch.full((batch, request.k), UNUSED, dtype=torch.int32)
        candidates: list[Sequence[int]] = [request.candidates] * batch
        if index.forgotten:
            candidates = [
                [frame for frame in request.candidates if (video, frame) not in index.forgotten]
                for video in range(batch)
            ]
        for video, chosen in enumerate(self.choose(request.start, candidates, request.k)):
            allowed = [frame for frame in chosen if frame in candidates[video]][: request.k]
            frames[video, : len(allowed)] = torch.tensor(allowed, dtype=torch.int32)
        frames = frames.to(request.query.device)
        return frames, index.similarity(request.query, frames)


class RandomSelection(_Control):
    """k random candidates, drawn separately for each video and block and reproducible by seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def choose(self, start: int, candidates: Sequence[Sequence[int]], k: int) -> Sequence[Sequence[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + start)
        return [[row[i] for i in torch.randperm(len(row), generator=generator)[:k].tolist()] for row in candidates]


class RecentSelection(_Control):
    """The k newest candidates."""

    def choose(self, start: int, candidates: Sequence[Sequence[int]], k: int) -> Sequence[Sequence[int]]:
        return [row[::-1][:k] for row in candidates]


class UniformSelection(_Control):
    """k candidates spread evenly over the whole past."""

    def choose(self, start: int, candidates: Sequence[Sequence[int]], k: int) -> Sequence[Sequence[int]]:
        return [self._spread(row, k) for row in candidates]

    @staticmethod
    def _spread(row: Sequence[int], k: int) -> Sequence[int]:
        if len(row) <= k:
            return row
        return [row[place] for place in torch.linspace(0, len(row) - 1, k).round().long().tolist()]


class OracleSelection(_Control):
    """A choice made with knowledge of the right answer.

    Args:
        answer: maps the first frame of a block and the number of videos to the frames for each video, best first.
    """

    def __init__(self, answer: Callable[[int, int], Sequence[Sequence[int]]]) -> None:
        self.answer = answer

    def choose(self, start: int, candidates: Sequence[Sequence[int]], k: int) -> Sequence[Sequence[int]]:
        return self.answer(start, len(candidates))


class ReplaySelection:
    """What an earlier run chose, block by block, and then another selection.

    Args:
        recorded: by first frame of the block, the frames of each video, most similar first, and their similarities;
            what the run said is said again, so that its log repeats to the last digit.
        then: for blocks that are not recorded; default the most similar frames.
    """

    def __init__(
        self,
        recorded: Mapping[int, tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]]],
        then: Selection | None = None,
    ) -> None:
        self.recorded, self.then = recorded, then or SimilaritySelection()

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        """
        Raises:
            ValueError: the record is of another number of videos, or of frames that cannot come back.
        """
        if request.start not in self.recorded:
            return self.then.select(request, index)
        batch, device = request.query.shape[0], request.query.device
        rows, similarities = self.recorded[request.start]
        if len(rows) != batch or len(similarities) != batch:
            raise ValueError(f"the record of block {request.start} is of {len(rows)} videos, expected {batch}")
        frames = torch.full((batch, request.k), UNUSED, dtype=torch.int32)
        similarity = torch.full((batch, request.k), -torch.inf)
        for video, row in enumerate(rows):
            wrong = [f for f in row if f not in request.candidates or (video, f) in index.forgotten]
            if wrong or len(row) > request.k or len(row) != len(similarities[video]):
                raise ValueError(
                    f"the record of block {request.start} must hold at most {request.k} of the frames "
                    f"{request.candidates.start} to {request.candidates.stop - 1} that are kept, with their "
                    f"similarities, got {list(row)}"
                )
            frames[video, : len(row)] = torch.tensor(row, dtype=torch.int32)
            similarity[video, : len(row)] = torch.tensor(similarities[video])
        return frames.to(device, non_blocking=True), similarity.to(device, non_blocking=True)
