"""Properties of the planner, for any policy and any block of any video."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from longlive_rag import RetrievalConfig
from longlive_rag.context import UNUSED, ContextPlan


@st.composite
def configs(draw: st.DrawFn) -> RetrievalConfig:
    sink, memory, block = draw(st.integers(0, 5)), draw(st.integers(0, 8)), draw(st.integers(1, 4))
    return RetrievalConfig(
        context_frames=sink + memory + block + draw(st.integers(0, 9)),
        sink_frames=sink,
        memory_frames=memory,
        block_frames=block,
        recency_guard=draw(st.integers(0, 6)),
        positions=draw(st.sampled_from(["relative", "absolute"])),
    )


@st.composite
def plans(draw: st.DrawFn) -> ContextPlan:
    config = draw(configs())
    return ContextPlan(config, config.block_frames * draw(st.integers(0, 2000)), config.block_frames)


@given(plans())
def test_the_context_holds_sink_and_the_newest_frames_once_each(plan: ContextPlan) -> None:
    frames = [frame for frame in plan.fixed_entries()[0] if frame != UNUSED]
    config = plan.config
    newest = range(max(0, plan.end - config.local_frames), plan.end)
    assert sorted(frames) == sorted(set(newest) | set(range(min(config.sink_frames, plan.end))))
    assert len(frames) + config.memory_frames <= config.context_frames


@given(plans())
def test_the_table_keeps_its_shape(plan: ContextPlan) -> None:
    frames, positions = plan.fixed_entries()
    assert len(frames) == len(positions) == plan.config.context_frames
    assert frames[plan.memory_columns] == [UNUSED] * plan.config.memory_frames


@given(plans())
def test_what_may_be_retrieved(plan: ContextPlan) -> None:
    config = plan.config
    expected = [
        frame
        for frame in range(plan.start)
        if config.memory_frames
        and config.sink_frames <= frame < config.sink_frames + plan.start - config.context_frames - config.recency_guard
    ]
    assert list(plan.candidates) == expected
    assert not set(plan.candidates) & (set(plan.local) | set(plan.sink))


@given(plans())
def test_relative_positions_number_the_context_from_its_left_end(plan: ContextPlan) -> None:
    config = plan.config
    at = dict(zip(*plan.fixed_entries(), strict=True))
    query = plan.query_positions()
    if config.positions == "absolute":
        assert all(at[frame] == frame for frame in [*plan.sink, *plan.local])
        assert query == list(range(plan.start, plan.end))
        return
    assert all(at[frame] == frame for frame in plan.sink)
    if plan.end <= config.context_frames:
        assert all(at[frame] == frame for frame in plan.local)
    else:
        assert query == list(range(config.context_frames - plan.frames, config.context_frames))
        assert all(at[frame] == config.context_frames - (plan.end - frame) for frame in plan.local)
    assert query == [at[frame] for frame in range(plan.start, plan.end)]


@given(plans(), st.data())
def test_memory_positions(plan: ContextPlan, data: st.DataObject) -> None:
    config = plan.config
    if not plan.candidates:
        return
    count = min(config.memory_frames, len(plan.candidates))
    chosen = data.draw(st.lists(st.sampled_from(plan.candidates), min_size=count, max_size=count, unique=True))
    padded = chosen + [UNUSED] * (config.memory_frames - count)
    positions = plan.memory_positions(torch.tensor([padded], dtype=torch.int32))
    assert positions.dtype == torch.int32
    assert positions[0, :count].tolist() == (chosen if config.positions == "absolute" else [0] * count)


@given(configs(), st.integers(0, 100), st.integers(1, 40))
def test_a_long_block_sees_its_newest_frames(config: RetrievalConfig, start: int, frames: int) -> None:
    plan = ContextPlan(config, start, frames)
    used = [frame for frame in plan.fixed_entries()[0] if frame != UNUSED]
    assert len(used) == len(set(used))
    newest = max(start, plan.end - (config.context_frames - config.sink_frames))
    assert set(range(newest, plan.end)) <= set(used)


def test_the_first_candidate_of_the_paper() -> None:
    config = RetrievalConfig()
    assert list(ContextPlan(config, 15, 3).candidates) == []
    assert list(ContextPlan(config, 18, 3).candidates) == [1]
