"""The index against brute force, however it was filled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longlive_rag.index import LatentIndex


def cosines(stored: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Of each video's query with its stored frames, in float64."""
    stored, query = stored.astype(np.float64), query.astype(np.float64)
    lengths = np.linalg.norm(stored, axis=-1) * np.linalg.norm(query, axis=-1, keepdims=True)
    return np.einsum("bnd,bd->bn", stored, query) / lengths


@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 5), min_size=1, max_size=12),
    st.integers(1, 8),
    st.integers(0, 12),
    st.integers(0, 70),
    st.integers(0, 2**31),
)
def test_finds_what_brute_force_finds(batch: int, blocks: list[int], k: int, first: int, last: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(batch, sum(blocks), 8, generator=generator)
    index = LatentIndex(capacity=2)
    start = 0
    for block_frames in blocks:
        index.put(start, stored[:, start : start + block_frames])
        start += block_frames
    query = torch.randn(batch, 8, generator=generator)
    frames, similarity = index.search(query, first, last, k)
    candidates = range(first, min(last, sum(blocks)))
    for row, exact in zip(frames.tolist(), cosines(stored.numpy(), query.numpy()), strict=True):
        found = [frame for frame in row if frame >= 0]
        assert len(set(found)) == len(found) == min(k, len(candidates)) and set(found) <= set(candidates)
        # Frames closer to each other than float32 tells apart may change places, and no others.
        best = sorted(exact[candidates.start : candidates.stop], reverse=True)[: len(found)]
        np.testing.assert_allclose(exact[found], best, rtol=0, atol=1e-6)
    assert bool((similarity[frames < 0] == -torch.inf).all())
    again = index.similarity(query, frames)
    torch.testing.assert_close(again, similarity, rtol=1e-5, atol=1e-5)


def test_ties_go_to_the_lower_frame() -> None:
    index = LatentIndex()
    index.put(0, torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [4.0, 0.0]]]))
    frames, similarity = index.search(torch.tensor([[3.0, 0.0]]), 0, 4, 3)
    assert frames.tolist() == [[0, 2, 3]]
    assert similarity.tolist() == [[1.0, 1.0, 1.0]]


def test_a_block_made_again_replaces_its_embeddings() -> None:
    index = LatentIndex(capacity=4)
    index.put(0, torch.randn(1, 4, 8))
    again = torch.randn(1, 2, 8)
    index.put(2, again)
    assert index.count == 4
    assert torch.equal(index.embeddings[:, 2:], again)
    index.put(1, again)
    assert index.count == 3


def test_a_gap_is_refused() -> None:
    index = LatentIndex()
    index.put(0, torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match="start must be 0 to 3"):
        index.put(4, torch.randn(1, 3, 8))
    with pytest.raises(ValueError, match=r"embeddings must be \[1, F, 8\]"):
        index.put(3, torch.randn(2, 3, 8))


def test_a_zero_embedding_is_similar_to_nothing() -> None:
    index = LatentIndex()
    index.put(0, torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]))
    frames, similarity = index.search(torch.tensor([[1.0, 1.0]]), 0, 2, 2)
    assert frames.tolist() == [[1, 0]]
    assert similarity[0, 1] == 0
