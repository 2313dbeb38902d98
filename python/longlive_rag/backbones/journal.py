"""What each video got from memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from longlive_rag.memory import Retrieval


class Recorded(Protocol):
    """What follows the passes over one cache, as the journal sees it."""

    @property
    def retrieved(self) -> list[Retrieval]:
        """What the blocks of the current video got so far."""

    @property
    def kind(self) -> object:
        """Equal for caches of the same sizes."""

    @property
    def in_first_block(self) -> bool:
        """Whether the current block is the first of its video."""


class Journal:
    """The videos of all caches, in the order in which they began.

    With guidance, a conditional and an unconditional cache make one video together; the one that is passed first speaks
    for it.
    """

    def __init__(self) -> None:
        self.earlier_videos: list[list[Retrieval]] = []
        """What the blocks of each earlier video got, on the CPU; a video too short for memory has no entry."""
        self._speaker: Recorded | None = None

    @property
    def retrieved(self) -> list[Retrieval]:
        """What the blocks of the last video got."""
        return [] if self._speaker is None else self._speaker.retrieved

    def begins(self, follower: Recorded) -> None:
        """A video begins; the follower's previous one has ended."""
        speaker = self._speaker
        if speaker is not None and speaker is not follower:
            if speaker.in_first_block and speaker.kind == follower.kind:
                return  # the other condition of the speaker's video
            self.ends(speaker)
        self._speaker = follower

    def ends(self, follower: Recorded) -> None:
        """The follower's current video ends; its record is about to be dropped."""
        if follower is self._speaker and follower.retrieved:
            self.earlier_videos.append([_on_cpu(entry) for entry in follower.retrieved])


def _on_cpu(entry: Retrieval) -> Retrieval:
    return replace(entry, frame_table=entry.frame_table.cpu(), similarity_table=entry.similarity_table.cpu())
