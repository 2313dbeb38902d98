"""Which frames come back: the paper's similarity search, and the controls every comparison needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
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


class Selection(Protocol):
    """Chooses frames for a block."""

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        """Frames int32 [B, k], unused entries negative, and their similarity to the query, float32 [B, k]."""
        ...


class SimilaritySelection:
    """The k candidates most similar to the query: the paper's selection (arXiv 2606.02553)."""

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        return index.search(request.query, request.candidates.start, request.candidates.stop, request.k)


class Recorded(Protocol):
    """What a block retrieved, as a `Retrieval` of the memory records it."""

    @property
    def block_start(self) -> int:
        """First frame of the block."""
        ...

    @property
    def frame_table(self) -> Tensor:
        """int32 [B, K], negative: unused."""
        ...

    @property
    def similarity_table(self) -> Tensor:
        """float32 [B, K]."""
        ...


class ReplaySelection:
    """What was recorded comes back again, frames and similarities, whatever the query is.

    Args:
        recorded: the retrieval of each block, `RolloutResult.retrieved` for example.
        afterwards: chooses for blocks after the last recorded one; None: such a block is an error.
    """

    def __init__(self, recorded: Iterable[Recorded], afterwards: Selection | None = None) -> None:
        self.recorded = {block.block_start: block for block in recorded}
        self.afterwards = afterwards
        self._last = max(self.recorded, default=-1)

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        """See `Selection`.

        Raises:
            ValueError: nothing was recorded for this block, or frames that it may not retrieve.
        """
        if self.afterwards is not None and request.start > self._last:
            return self.afterwards.select(request, index)
        if request.start not in self.recorded:
            raise ValueError(f"the record has no entry for the block at latent frame {request.start}, which retrieves")
        block, shape = self.recorded[request.start], (request.query.shape[0], request.k)
        if tuple(block.frame_table.shape) != shape:
            raise ValueError(
                f"the record must hold [videos, frames] = {list(shape)}, got {list(block.frame_table.shape)}"
            )
        alien = [frame for row in block.frame_table.tolist() for frame in row if frame >= 0]
        alien = [frame for frame in alien if frame not in request.candidates]
        if alien:
            raise ValueError(
                f"the record has the block at latent frame {request.start} retrieve {alien}, but it may retrieve "
                f"frames {request.candidates.start} to {request.candidates.stop - 1} alone"
            )
        device = request.query.device
        return block.frame_table.to(device), block.similarity_table.to(device)


class _Control(ABC):
    """A choice that ignores the embeddings; their similarity to the query is reported nevertheless."""

    @abstractmethod
    def choose(self, request: Request, batch: int) -> Sequence[Sequence[int]]:
        """Frames for each video, best first; those that are not candidates are skipped."""

    def select(self, request: Request, index: LatentIndex) -> tuple[Tensor, Tensor]:
        batch = request.query.shape[0]
        frames = torch.full((batch, request.k), UNUSED, dtype=torch.int32)
        for sample, chosen in enumerate(self.choose(request, batch)):
            allowed = [frame for frame in chosen if frame in request.candidates][: request.k]
            frames[sample, : len(allowed)] = torch.tensor(allowed, dtype=torch.int32)
        frames = frames.to(request.query.device)
        return frames, index.similarity(request.query, frames)


class RandomSelection(_Control):
    """k random candidates, drawn separately for each video and block and reproducible by seed."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def choose(self, request: Request, batch: int) -> Sequence[Sequence[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + request.start)
        count, first = len(request.candidates), request.candidates.start
        return [(first + torch.randperm(count, generator=generator)[: request.k]).tolist() for _ in range(batch)]


class RecentSelection(_Control):
    """The k newest candidates."""

    def choose(self, request: Request, batch: int) -> Sequence[Sequence[int]]:
        return [request.candidates[::-1][: request.k]] * batch


class UniformSelection(_Control):
    """k candidates spread evenly over the whole past."""

    def choose(self, request: Request, batch: int) -> Sequence[Sequence[int]]:
        count = len(request.candidates)
        if count <= request.k:
            return [request.candidates] * batch
        places = torch.linspace(0, count - 1, request.k).round().long().tolist()
        return [[request.candidates[place] for place in places]] * batch


class OracleSelection(_Control):
    """A choice made with knowledge of the right answer.

    Args:
        answer: maps the first frame of a block and the number of videos to the frames for each video, best first.
    """

    def __init__(self, answer: Callable[[int, int], Sequence[Sequence[int]]]) -> None:
        self.answer = answer

    def choose(self, request: Request, batch: int) -> Sequence[Sequence[int]]:
        return self.answer(request.start, batch)
