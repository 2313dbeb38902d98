"""The context policies that the demo compares. All have a context of six frames; they differ in what fills it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longlive_rag.config import Query, RetrievalConfig
from longlive_rag.embedding import Embedding
from longlive_rag.selection import (
    OldestAlikeSelection,
    OracleSelection,
    RandomSelection,
    RecentSelection,
    Selection,
    SimilaritySelection,
    UniformSelection,
)
from longlive_rag.small_world import world

CONTEXT, MEMORY = 6, 2


@dataclass(frozen=True)
class Policy:
    """A way to fill the context."""

    label: str
    config: RetrievalConfig
    selection: Callable[[world.Walk, int], Selection] | None = None
    """Makes the selection for a camera walk and a seed."""
    embedding: Callable[[], Embedding] | None = None
    """Loads what memory is searched by; default the track's own encoder."""


def memory_config(query: Query = "latest", recency_guard: int = 0) -> RetrievalConfig:
    """A sink, memory and a window."""
    return RetrievalConfig(
        context_frames=CONTEXT,
        sink_frames=1,
        memory_frames=MEMORY,
        recency_guard=recency_guard,
        block_frames=1,
        query=query,
    )


def _window(sink: int) -> RetrievalConfig:
    return RetrievalConfig(context_frames=CONTEXT, sink_frames=sink, memory_frames=0, recency_guard=0, block_frames=1)


def oracle(walk: world.Walk) -> OracleSelection:
    """Frames of the nearest camera position, then of the nearest motion phase, then the newest."""

    def answer(start: int, batch: int) -> list[list[int]]:
        frames = np.arange(start)
        beat = np.abs(walk.phases[:start] - walk.phases[start])
        beat = np.minimum(beat, world.PHASES - beat)
        order = np.lexsort((-frames, beat, np.abs(walk.views[:start] - walk.views[start])))
        return [order.tolist()] * batch

    return OracleSelection(answer)


POLICIES = {
    "sliding_window": Policy("sliding window", _window(sink=0)),
    "sink_window": Policy("sink + window", _window(sink=1)),
    "recent": Policy("newest evicted frames", memory_config(), lambda walk, seed: RecentSelection()),
    "uniform": Policy("evenly spread frames", memory_config(), lambda walk, seed: UniformSelection()),
    "random": Policy("random frames", memory_config(), lambda walk, seed: RandomSelection(seed)),
    # The paper's guard: the newest frame would find its own neighbours. A draft need not be kept from them, and a
    # camera that turns back wants them: on pans .953 without the guard, .885 with it (8 videos of the tuning seed).
    "latest_query": Policy(
        "retrieval, newest frame asks", memory_config(recency_guard=5), lambda walk, seed: SimilaritySelection()
    ),
    "retrieval": Policy("retrieval, draft asks", memory_config("draft"), lambda walk, seed: SimilaritySelection()),
    "oldest_alike": Policy(
        "draft asks, oldest of those alike", memory_config("draft"), lambda walk, seed: OldestAlikeSelection()
    ),
    "oracle": Policy("oracle", memory_config(), lambda walk, seed: oracle(walk)),
}

OURS = "oldest_alike"
"""The best that is known (docs/findings.md): our own policy wherever one is shown."""

SHOWN = ("sliding_window", "sink_window", "latest_query", "retrieval", OURS, "oracle")
"""What the demo makes; the benchmark compares all."""
