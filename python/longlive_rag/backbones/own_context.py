"""Context policies that follow from what a model and its pipeline say of themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from longlive_rag.config import Positions, RetrievalConfig

PAST_FRAMES = 2
"""Newest past frames that stay in the context beside memory: as many as the paper's, 5 - 3."""


@dataclass(frozen=True)
class OwnContext:
    """What a model attends to by itself, and what its repository publishes for memory."""

    context_frames: int
    sink_frames: int
    block_frames: int
    positions: Positions
    """Of the model's own attention."""
    memory_positions: Positions = "relative"
    """Of the context with memory: the paper's, unless the family is made for others."""
    longest_pass: int = 1
    """Latent frames of its longest pass over a block, or window of blocks."""
    memory_frames: int | None = None
    """Published; None: the paper's, as far as they fit."""
    recency_guard: int | None = None

    def native(self) -> RetrievalConfig:
        """The model's own attention."""
        return RetrievalConfig(
            context_frames=self.context_frames,
            sink_frames=min(self.sink_frames, self.context_frames - self._longest),
            memory_frames=0,
            block_frames=self.block_frames,
            positions=self.positions,
        )

    def with_memory(self) -> RetrievalConfig:
        """The paper's memory within the model's own window.

        Memory takes the place of past frames, all but the newest `PAST_FRAMES`, or of all but one where there are no
        more than those.

        Raises:
            ValueError: the window has no room for memory.
        """
        paper = RetrievalConfig()
        sink = min(self.sink_frames, self.context_frames - self._longest)
        past = self.context_frames - sink - self._longest
        if past < 1:
            raise ValueError(
                f"the model's own window of {self.context_frames} latent frames, {sink} of them sink, leaves no room "
                f"for memory beside passes of {self._longest}; give a config with more context_frames"
            )
        memory = min(paper.memory_frames, max(1, past - PAST_FRAMES))
        return RetrievalConfig(
            context_frames=self.context_frames,
            sink_frames=sink,
            memory_frames=memory if self.memory_frames is None else self.memory_frames,
            recency_guard=paper.recency_guard if self.recency_guard is None else self.recency_guard,
            block_frames=self.block_frames,
            positions=self.memory_positions,
        )

    @property
    def _longest(self) -> int:
        return max(self.longest_pass, self.block_frames)


class Said:
    """Reads settings off a model, its pipeline, its attention and its transformer; the first that has one counts."""

    def __init__(self, model: Any, transformer: Any, attention: Any) -> None:
        pipeline = getattr(model, "pipeline", None)
        # Attention before the transformer, since diffusers warns where it finds a name in a transformer's config.
        self._holders = [model, pipeline, attention, transformer]
        self._options = [
            getattr(getattr(holder, "args", None), "model_kwargs", None) for holder in (model, pipeline)
        ]  # as OmegaConf gives them

    def integer(self, name: str) -> int | None:
        """The first whole number of that name. A sequence stands for its largest."""
        return next(self._integers(name), None)

    def flag(self, name: str) -> bool | None:
        return next((value for value in self._values(name) if isinstance(value, bool)), None)

    def _integers(self, name: str) -> Iterator[int]:
        for value in self._values(name):
            if isinstance(value, int) and not isinstance(value, bool):
                yield value
            elif hasattr(value, "__iter__") and not isinstance(value, str):
                entries = [entry for entry in value if isinstance(entry, int)]
                if entries:
                    yield max(entries)

    def _values(self, name: str) -> Iterator[Any]:
        for holder in (*self._holders, *self._options):
            value = getattr(holder, name, None)
            if value is not None:
                yield value
