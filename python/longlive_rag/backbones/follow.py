"""Reads blocks, videos and prompt switches off the passes over one key-value cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from longlive_rag.backbones.journal import Journal
from longlive_rag.config import RetrievalConfig
from longlive_rag.context import ContextPlan
from longlive_rag.memory import Retrieval, RetrievalMemory

logger = logging.getLogger(__name__)

PlanType = Callable[[RetrievalConfig, int, int], ContextPlan]
"""From the config, and the first frame and length of a block, to its context."""
State = TypeVar("State")


@dataclass(frozen=True)
class Kind:
    """What a memory is made for; passes of another kind need another memory."""

    batch: int
    grid: tuple[int, int]
    """Rows and columns of tokens in a latent frame."""
    device: torch.device
    dtype: torch.dtype
    """Of keys and values."""


class Consequences(NamedTuple):
    """What a block means for the memory, given the one before it."""

    commits: bool = False
    """The block before is finished: the input of its last pass was its clean latents."""
    ends_video: bool = False
    empties: bool = False
    """The memory starts from nothing and numbers its frames from this block on."""
    checks_length: bool = False
    """The block must fit into the local window; frames that are made again need not."""


class Step(Enum):
    """How a block relates to the one before it.

    | block before | first frame of the block | step |
    |---|---|---|
    | none | any | `FIRST`; after `restart()`, `RESUMED` |
    | one | its end or later | `NEXT` |
    | one | the first frame of the video, or earlier | `NEW_VIDEO` |
    | one | in between: a prompt switch, or another context for the same frames | `AGAIN` |
    """

    FIRST = Consequences(empties=True, checks_length=True)
    RESUMED = Consequences(empties=True)
    NEXT = Consequences(commits=True, checks_length=True)
    NEW_VIDEO = Consequences(ends_video=True, empties=True)
    AGAIN = Consequences()


class Block(NamedTuple):
    frames: range
    """In the pipeline's numbers."""
    plan_type: PlanType


class Follower(Generic[State]):
    """Follows the passes over one cache: one video after another, under one condition.

    A block is whatever the pipeline passes with the same first frame and length, as often as it likes.

    Args:
        config: the context policy.
        make_memory: makes the memory for a kind of passes.
        make_state: makes what the family remembers of a video that begins.
        journal: is told when videos begin and end.
    """

    def __init__(
        self,
        config: RetrievalConfig,
        make_memory: Callable[[Kind], RetrievalMemory],
        make_state: Callable[[], State],
        journal: Journal,
    ) -> None:
        self.config = config
        self.state = make_state()
        self.kind: Kind | None = None
        """Of the latest pass."""
        self._make_memory, self._make_state, self._journal = make_memory, make_state, journal
        self._memory: RetrievalMemory | None = None
        self._origin = 0
        """The pipeline's number for the memory's frame 0."""
        self._block: Block | None = None
        self._latents: Tensor | None = None
        """Input of the block's last pass, [B, F, C, H, W]."""
        self._in_video = self._restarted = False
        self._before_restart: list[Retrieval] = []

    @property
    def memory(self) -> RetrievalMemory:
        if self._memory is None:
            assert self.kind is not None, "expect() comes before the first pass"
            self._memory = self._make_memory(self.kind)
        return self._memory

    @property
    def retrieved(self) -> list[Retrieval]:
        """What each block of the video got from memory, in the pipeline's frames."""
        return self._before_restart + self._since_restart()

    @property
    def block(self) -> range | None:
        """Frames of the current block, in the pipeline's numbers."""
        return None if self._block is None else self._block.frames

    @property
    def in_first_block(self) -> bool:
        return self._block is not None and self._block.frames.start == self._origin

    def frame(self, start: int) -> int:
        """The memory's number for the pipeline's frame `start`, if a pass begins there; 0: it begins a new video."""
        return 0 if self._block is None else max(0, start - self._origin)

    def expect(self, kind: Kind) -> None:
        """A pass of this kind comes next. Another kind than before begins a new video, with a memory of its own."""
        if kind != self.kind:
            self.retire()
            self.kind = kind

    def follow(self, start: int, frames: int, latents: Tensor, plan_type: PlanType = ContextPlan) -> None:
        """A pass over the frames ``start ..`` begins, with the input `latents` [B, F, C, H, W].

        Args:
            plan_type: the family's context, where it is not the common one.

        Raises:
            ValueError: the block does not fit into the local window, or leaves out frames.
        """
        block = Block(range(start, start + frames), plan_type)
        if block != self._block:
            self._take(self._step(block), block)
        # The pipeline may go on to overwrite its input.
        self._latents = latents.detach().clone()

    def note_clean(self, latents: Tensor) -> None:
        """These are the block's clean latents so far; for pipelines that never pass them."""
        self._latents = latents

    def restart(self) -> None:
        """Forget all frames; the video goes on."""
        self._before_restart = self.retrieved
        self._restarted = True
        self._forget()

    def reset(self) -> None:
        """Forget the video: the next pass begins another one."""
        self._end_video()
        self._forget()

    def retire(self) -> None:
        """Forget the video, and give its memory back to the device."""
        self.reset()
        self.close()
        self._memory = self.kind = None

    def close(self) -> None:
        """Give the memory back to the device; the record stays."""
        if self._memory is not None:
            self._memory.close()
        self._block = self._latents = None

    def _step(self, block: Block) -> Step:
        if self._block is None:
            return Step.RESUMED if self._restarted else Step.FIRST
        if block.frames.start >= self._block.frames.stop:
            return Step.NEXT
        return Step.NEW_VIDEO if block.frames.start <= self._origin else Step.AGAIN

    def _take(self, step: Step, block: Block) -> None:
        commits, ends_video, empties, checks_length = step.value
        start, length = block.frames.start, len(block.frames)
        if commits and self._latents is not None:
            self.memory.commit(self._latents)
        if checks_length:
            check_block_length(self.config, length)
        if ends_video:
            self._end_video()
        if empties:
            self.memory.reset()
            self._origin = start
        if step is Step.FIRST and start:
            logger.warning("memory begins at latent frame %d, and has nothing of what came before it", start)
        if not self._in_video:
            self._journal.begins(self)
        self._in_video, self._restarted = True, False
        self.memory.plan_block(block.plan_type(self.config, start - self._origin, length))
        self._block = block

    def _end_video(self) -> None:
        self._journal.ends(self)
        self._before_restart = []
        self._in_video = False

    def _forget(self) -> None:
        self.state = self._make_state()
        self._block = self._latents = None
        if self._memory is not None:
            self._memory.reset()

    def _since_restart(self) -> list[Retrieval]:
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


def check_block_length(config: RetrievalConfig, frames: int) -> None:
    """Raise unless a block of `frames` latent frames fits into the config's local window.

    Raises:
        ValueError: it does not.
    """
    if frames > config.local_frames:
        raise ValueError(
            f"config leaves a local window of {config.local_frames} latent frames, but the model makes blocks of "
            f"{frames}; raise context_frames, or lower sink_frames or memory_frames"
        )
