"""Pages stay where they are and what they are."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from longlive_rag.bank import FrameBank


def bank(capacity: int, batch: int = 2) -> FrameBank:
    return FrameBank(
        layers=2, batch=batch, heads=1, tokens=3, head_dim=4, capacity=capacity, device="cpu", dtype=torch.float32
    )


def slots(pages: FrameBank, frames: list[int]) -> torch.Tensor:
    return pages.slots(torch.tensor(frames, dtype=torch.int32).expand(pages.batch, -1))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=40), st.integers(1, 4), st.integers(1, 3))
def test_every_held_frame_keeps_its_content(steps: list[tuple[bool, int]], capacity: int, batch: int) -> None:
    pages = bank(capacity, batch)
    for acquire, frame in steps:
        if acquire:
            new = frame not in pages.held()
            pages.acquire(range(frame, frame + 1))
            if new:
                for layer in range(2):
                    for video, slot in enumerate(slots(pages, [frame])[:, 0].tolist()):
                        pages.k_pages[layer][slot] = 100 * frame + 10 * video + layer
        elif frame in pages.held():
            pages.release(frame)
        held = pages.held()
        table = slots(pages, held)
        assert table.unique().numel() == table.numel(), "two frames share a page"
        for column, held_frame in enumerate(held):
            for video in range(batch):
                for layer in range(2):
                    page = pages.k_pages[layer][table[video, column]]
                    assert bool((page == 100 * held_frame + 10 * video + layer).all())


def test_frames_without_a_page_are_unused() -> None:
    pages = bank(4)
    pages.acquire(range(2))
    assert (slots(pages, [-1, 3, 99999 % 4]) < 0).all()


def test_within_the_capacity_nothing_is_allocated_or_moved() -> None:
    pages = bank(8)
    before = [pool.data_ptr() for pool in pages.k_pages + pages.v_pages]
    pages.acquire(range(8))
    pages.clear()
    pages.acquire(range(100, 108))
    assert [pool.data_ptr() for pool in pages.k_pages + pages.v_pages] == before


def test_frame_bytes() -> None:
    assert bank(4).frame_bytes == 2 * 2 * 1 * 3 * 4 * 4
