"""Which frames come back: the paper's similarity search, and the controls every comparison needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
