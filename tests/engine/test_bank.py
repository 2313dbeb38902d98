"""Pages stay where they are and what they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longlive_rag.bank import FrameBank
from longlive_rag.budget import Budget
from longlive_rag.tiers.pages import frame_bytes

PAGE = frame_bytes(layers=2, heads=1, tokens=3, head_dim=4, dtype=torch.float32)


def bank(frames: int, batch: int = 2, device_frames: int | None = None) -> FrameBank:
    return FrameBank(
        layers=2, batch=batch, heads=1, tokens=3, head_dim=4, frames=frames, device="cpu", dtype=torch.float32,
        budget=Budget(device=None if device_frames is None else device_frames * batch * PAGE),
    )  # fmt: skip


def slots(pages: FrameBank, frames: list[int]) -> torch.Tensor:
    return pages.slots(torch.tensor(frames, dtype=torch.int32).expand(pages.batch, -1))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_every_held_frame_keeps_its_content(steps: list[tuple[bool, int]], capacity: int, batch: int) -> None:
    pages = bank(capacity, batch)
    for acquire, frame in steps:
        if acquire:
            new = frame not in pages.frames()
            pages.reserve(range(frame, frame + 1), [])
            if new:
                for layer in range(2):
                    for video, slot in enumerate(slots(pages, [frame])[:, 0].tolist()):
                        pages.k_pages[layer][slot] = 100 * frame + 10 * video + layer
        elif frame in pages.frames():
            pages.release(frame)
        held = pages.frames()
        table = slots(pages, held)
        assert table.unique().numel() == table.numel(), "two frames share a page"
        for column, held_frame in enumerate(held):
            for video in range(batch):
                for layer in range(2):
                    page = pages.k_pages[layer][table[video, column]]
                    assert bool((page == 100 * held_frame + 10 * video + layer).all())


def test_frames_without_a_page_are_unused() -> None:
    pages = bank(4)
    pages.reserve(range(2), [])
    assert (slots(pages, [-1, 3]) < 0).all()


def test_within_the_capacity_nothing_is_allocated_or_moved() -> None:
    pages = bank(8)
    before = [pool.data_ptr() for pool in pages.k_pages + pages.v_pages]
    pages.reserve(range(8), [])
    pages.clear()
    pages.reserve(range(100, 108), [])
    assert [pool.data_ptr() for pool in pages.k_pages + pages.v_pages] == before
    assert pages.generation == 0


def test_the_generation_says_when_pages_have_moved() -> None:
    """What captured CUDA graphs go by: they hold the addresses of the pages."""
    pages = bank(2)
    for frame in range(12):
        before = [pool.data_ptr() for pool in pages.k_pages + pages.v_pages], pages.generation
        pages.reserve(range(frame, frame + 1), [])
        after = [pool.data_ptr() for pool in pages.k_pages + pages.v_pages], pages.generation
        assert (before[0] == after[0]) == (before[1] == after[1])
    assert pages.generation == 3, "2, 4, 8 and 16 frames"
    pages.close()
    assert pages.generation == 4


def test_frame_bytes() -> None:
    pages = bank(4, batch=3)
    allocated = sum(pool.nbytes for pool in pages.k_pages + pages.v_pages)
    assert frame_bytes(layers=2, heads=1, tokens=3, head_dim=4, dtype=torch.float32) == allocated // (4 * 3)


@given(st.lists(st.lists(st.integers(0, 60), max_size=3), min_size=1, max_size=40), st.integers(1, 3))
def test_with_a_budget_frames_come_back_as_they_were(asked: list[list[int]], batch: int) -> None:
    pages = bank(frames=2, batch=batch, device_frames=5)
    assert pages.capacity == 5
    for frame, wanted in enumerate(asked):
        pages.reserve(range(frame, frame + 1), [frame - 1] if frame else [])
        for video, slot in enumerate(slots(pages, [frame])[:, 0].tolist()):
            for layer in range(2):
                pages.k_pages[layer][slot] = 100 * frame + 10 * video + layer
                pages.v_pages[layer][slot] = -(100 * frame + 10 * video + layer)
        rows = [[(one + video) % (frame + 1) for one in wanted] for video in range(batch)]
        pages.fetch(rows)
        pages.transfer.finish()
        at_hand = [sorted({*row, frame, max(frame - 1, 0)}) for row in rows]
        for video, row in enumerate(at_hand):
            for one, slot in zip(row, slots(pages, row)[video].tolist(), strict=True):
                assert slot >= 0
                for layer in range(2):
                    assert bool((pages.k_pages[layer][slot] == 100 * one + 10 * video + layer).all())
                    assert bool((pages.v_pages[layer][slot] == -(100 * one + 10 * video + layer)).all())
        assert pages.capacity == 5


def test_a_budget_that_cannot_hold_one_block_is_refused() -> None:
    pages = bank(frames=4, device_frames=2)
    with pytest.raises(
        ValueError, match="budget.device must leave room for all that a block of . videos uses, 6 pages"
    ):
        pages.reserve(range(3), [])
