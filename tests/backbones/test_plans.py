"""The families' contexts as integers: what no trace shows, because the public models have no memory."""

from __future__ import annotations

import pytest
import torch

from longlive_rag.backbones.families.infinity_rope import Scene
from longlive_rag.backbones.families.longlive2 import Shots
from longlive_rag.backbones.families.rolling_forcing import CleanPlan, WindowPlan
from longlive_rag.config import RetrievalConfig
from longlive_rag.context import UNUSED, ContextPlan

LONGLIVE2 = RetrievalConfig(context_frames=16, sink_frames=2, memory_frames=4, block_frames=2, positions="absolute")


def used(plan: ContextPlan) -> dict[int, int]:
    return {frame: position for frame, position in zip(*plan.fixed_entries(), strict=True) if frame != UNUSED}


@pytest.mark.parametrize("start", range(10, 60, 2))
def test_pinned_frames_take_the_place_of_local_ones(start: int) -> None:
    plan = Shots(offsets=((0, 0),), pinned=range(8, 10))(LONGLIVE2, start, 2)
    frames = list(used(plan))
    assert {8, 9} <= set(frames) and len(frames) == len(set(frames)) == min(plan.end, 12)
    assert frames == [*range(len(plan.sink)), *plan.local, *([8, 9] if plan.local.start > 9 else [])]


def test_a_pinned_frame_is_not_retrieved_a_second_time() -> None:
    plan = Shots(offsets=((0, 0),), pinned=range(8, 10))(LONGLIVE2, 40, 2)
    chosen = torch.tensor([[7, 8, 9, 11], [8, 3, UNUSED, UNUSED]], dtype=torch.int32)
    assert plan.unseen(chosen).tolist() == [[7, UNUSED, UNUSED, 11], [UNUSED, 3, UNUSED, UNUSED]]


def test_shots_stand_apart_in_time() -> None:
    """Frames before the second shot stand where they were, memory included; those of the third are two offsets on."""
    plan = Shots(offsets=((0, 0), (20, 8), (30, 16)))(LONGLIVE2, 34, 2)
    expected = {frame: frame + 8 * ((frame >= 20) + (frame >= 30)) for frame in used(plan)}
    assert used(plan) == expected and plan.query_positions() == [50, 51]
    assert plan.memory_positions(torch.tensor([[5, 19, 20, 31]], dtype=torch.int32)).tolist() == [[5, 19, 28, 47]]


def test_the_clean_pass_of_rolling_forcing_reads_what_the_window_kept() -> None:
    config = RetrievalConfig(context_frames=21, sink_frames=3, memory_frames=0, block_frames=3)
    for start in range(0, 90, 3):
        window, clean = WindowPlan(config, start, 15), CleanPlan(config, start, 3)
        assert all(window.keeps(frame) for frame in used(clean))
        assert all(WindowPlan(config, start + 3, 15).keeps(frame) for frame in used(CleanPlan(config, start + 3, 3)))
        assert len(used(window)) == min(window.end, 21) and len(used(clean)) == min(clean.end, 21)


def test_a_scene_begins_with_the_sink_and_the_two_newest_frames() -> None:
    config = RetrievalConfig(context_frames=9, sink_frames=1, memory_frames=0)
    soft, cut = (Scene(30, hard)(config, 30, 3) for hard in (False, True))
    assert used(soft) == {0: 0, 28: 1, 29: 2, 30: 3, 31: 4, 32: 5} and soft.query_positions() == [6, 7, 8]
    assert used(cut) == {0: 0, 28: 1, 29: 2, 30: 45, 31: 46, 32: 47} and cut.query_positions() == [45, 46, 47]
    full = Scene(30, True)(config, 36, 3)
    assert used(full) == used(ContextPlan(config, 36, 3)) and full.query_positions() == [6, 7, 8]
