"""Which frames a block sees, and at which temporal positions: integers in, tables out.

No attention code knows of any policy; native sliding window, relative and absolute positions are all plans.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longlive_rag.config import RetrievalConfig

UNUSED = -1


@dataclass(frozen=True)
class ContextPlan:
    """The context of the block of `frames` latent frames that starts at `start`.

    The table has one column per context entry, ``[ sink | memory | local ]``, always the same number, so that buffers
    and captured graphs keep their shape. Early in a video some columns are unused, and a frame that is both sink and
    local is listed in the local window only.

    Source: LongLive-RAG (arXiv 2606.02553), section 3; docs/architecture.md, "Positions".
    """

    config: RetrievalConfig
    start: int
    frames: int

    def __post_init__(self) -> None:
        if self.start < 0 or self.frames < 1:
            raise ValueError(f"a block needs start >= 0 and frames >= 1, got start={self.start}, frames={self.frames}")

    @property
    def end(self) -> int:
        return self.start + self.frames

    @property
    def shift(self) -> int:
        """Index of the frame at temporal position 0: the context is numbered from its left end once it is full."""
        return max(0, self.end - self.config.context_frames) if self.config.positions == "relative" else 0

    @property
    def local_columns(self) -> int:
        """Length of the local window. A block as long as the context, which a prompt switch recomputes, sees what the
        context will hold afterwards: the sink and the newest of its own frames."""
        own = min(self.frames, self.config.context_frames - self.config.sink_frames)
        return max(self.config.local_frames, own)

    @property
    def local(self) -> range:
        """Frames of the local window, the block's own included."""
        return range(max(0, self.end - self.local_columns), self.end)

    @property
    def sink(self) -> range:
        """Sink frames that are not in the local window."""
        return range(min(self.config.sink_frames, self.local.start))

    @property
    def candidates(self) -> range:
        """Frames that may be retrieved: those that have left the context, minus the newest `recency_guard` of them."""
        first = self.config.sink_frames
        last = first + self.start - self.config.context_frames - self.config.recency_guard
        return range(first, max(first, last)) if self.config.memory_frames else range(0)

    def keeps(self, frame: int) -> bool:
        """Whether a later block can still see the frame when there is no memory."""
        return frame < self.config.sink_frames or frame in self.local

    @property
    def memory_columns(self) -> slice:
        """Columns of the table that retrieved frames fill."""
        return slice(self.config.sink_frames, self.config.sink_frames + self.config.memory_frames)

    def fixed_entries(self) -> tuple[list[int], list[int]]:
        """Frame and temporal position of every column; memory columns and unused ones are `UNUSED`."""
        config, local, sink = self.config, self.local, self.sink
        frames = [
            *sink,
            *[UNUSED] * (config.sink_frames - len(sink) + config.memory_frames),
            *local,
            *[UNUSED] * (self.local_columns - len(local)),
        ]
        positions = [f if f == UNUSED or f in sink else f - self.shift for f in frames]
        return frames, positions

    def query_positions(self) -> list[int]:
        """Temporal position of each frame of the block."""
        return [f - self.shift for f in range(self.start, self.end)]

    def unseen(self, frames: Tensor) -> Tensor:
        """Retrieved frames [B, K]; those that the block sees anyway become `UNUSED`."""
        return frames

    @property
    def memory_at_zero(self) -> bool:
        """Whether `memory_positions` are 0 whatever is retrieved."""
        return self.config.positions == "relative"

    def memory_positions(self, frames: Tensor) -> Tensor:
        """Temporal positions of retrieved frames, int32 like `frames` [B, K]; negative entries are unused."""
        return torch.zeros_like(frames) if self.memory_at_zero else frames
