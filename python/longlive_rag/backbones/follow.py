"""The memory behind one key-value cache: one video under one condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from longlive_rag.config import RetrievalConfig
from longlive_rag.context import ContextPlan
from longlive_rag.memory import Retrieval, RetrievalMemory

PlanType = Callable[[RetrievalConfig, int, int], ContextPlan]
"""From the config, and the first frame and length of a block, to its context."""


class Follower:
    """Follows the passes of a pipeline that knows nothing of it.

    A block is whatever the pipeline passes with the same first frame and length. It is finished when a later block
    begins; the input of its last pass was its clean latents. A pass at the first frame again begins a new video, a pass
    at an earlier one makes the frames from there on again.
    """

    def __init__(self, config: RetrievalConfig, make_memory: Callable[[], RetrievalMemory]) -> None:
        self.config = config
        self._make_memory = make_memory
        self._memory: RetrievalMemory | None = None
        self._origin = 0
        """Frame of the pipeline that is the memory's frame 0."""
        self.notes: dict[str, Any] = {}
        """What the family remembers of the video."""
        self.finished: list[list[Retrieval]] = []
        """What the videos before this one got from memory, on the CPU."""
        self._earlier: list[Retrieval] = []
        self._block: range | None = None
        self._plan_type: PlanType = ContextPlan
        self._latents: Tensor | None = None
        self._restarted = False

    @property
    def memory(self) -> RetrievalMemory:
        if self._memory is None:
            self._memory = self._make_memory()
        return self._memory

    @property
    def retrieved(self) -> list[Retrieval]:
        """What each block of the video got from memory, in the pipeline's frames."""
        return self._earlier + self._log()

    @property
    def block(self) -> range | None:
        """The current block, in the pipeline's frames."""
        return self._block

    def frame(self, start: int) -> int:
        """What the memory calls the pipeline's frame `start`, if a pass begins there; 0: a new video."""
        return 0 if self._block is None else max(0, start - self._origin)

    def follow(self, start: int, frames: int, latents: Tensor, plan_type: PlanType = ContextPlan) -> None:
        """A pass over the frames ``start ..`` begins, with the input `latents` [B, F, C, H, W].

        Args:
            plan_type: the family's context, where it is not the common one.
        """
        block = range(start, start + frames)
        if (block, plan_type) != (self._block, self._plan_type):
            self._finish(block)
            self._next(block, plan_type)
        # The pipeline may go on to overwrite its input.
        self._latents = latents.detach().clone()

    def predicted(self, latents: Tensor) -> None:
        """The pass predicted these clean latents; for pipelines that do not pass them."""
        self._latents = latents

    def restart(self) -> None:
        """Forget all frames; the video goes on."""
        self._earlier = self.retrieved
        self._restarted = True
        self._forget()

    def reset(self) -> None:
        """Forget everything but the record: the next pass begins a new video."""
        self._end_video()
        self._forget()

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()
        self._block = self._latents = None

    def _finish(self, following: range) -> None:
        """The pass over `following` comes next: is the current block finished by it?"""
        if self._block is not None and self._latents is not None and following.start >= self._block.stop:
            self.memory.commit(self._latents)

    def _next(self, block: range, plan_type: PlanType) -> None:
        made_again = self._restarted if self._block is None else block.start < self._block.stop
        if not made_again and len(block) > self.config.local_frames:
            raise ValueError(
                f"config leaves a local window of {self.config.local_frames} latent frames, but the model makes blocks "
                f"of {len(block)}; raise context_frames, or lower sink_frames or memory_frames"
            )
        if self._block is not None and block.start <= self._origin:
            self._end_video()
        if self._block is None or block.start < self._origin:
            self.memory.reset()
            self._origin = block.start
        self.memory.plan_block(plan_type(self.config, block.start - self._origin, len(block)))
        self._block, self._plan_type, self._restarted = block, plan_type, False

    def _end_video(self) -> None:
        if self.retrieved:
            self.finished.append(
                [
                    replace(entry, frame_table=entry.frame_table.cpu(), similarity_table=entry.similarity_table.cpu())
                    for entry in self.retrieved
                ]
            )
        self._earlier = []

    def _forget(self) -> None:
        self.notes.clear()
        self._block = self._latents = None
        if self._memory is not None:
            self._memory.reset()

    def _log(self) -> list[Retrieval]:
        if self._memory is None:
            return []
        # A block that was begun more than once counts as it was made last.
        last = {entry.block_start: entry for entry in self._memory.retrieved}
        return [
            replace(
                entry,
                block_start=entry.block_start + self._origin,
                frame_table=entry.frame_table + self._origin * (entry.frame_table >= 0),
            )
            for _, entry in sorted(last.items())
        ]
