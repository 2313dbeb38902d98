"""Which of the frames that are alike comes back."""

import math

import pytest
import torch

from longlive_rag.index import LatentIndex
from longlive_rag.selection import OldestAlikeSelection, Request, SimilaritySelection

BEATS, LAPS = 8, 4


def circling(batch: int = 1, drift: float = 0.02) -> LatentIndex:
    """Laps through eight beats; every lap is a little off the one before."""
    frame = torch.arange(BEATS * LAPS)
    angle = frame * (2 * math.pi / BEATS)
    lap = (frame // BEATS).float()
    index = LatentIndex()
    embeddings = torch.stack([angle.cos(), angle.sin(), drift * lap, torch.ones_like(angle)], dim=1)
    index.put(0, embeddings.expand(batch, -1, -1))
    return index


def ask(index: LatentIndex, frame: int, k: int = 2, candidates: range = range(BEATS * LAPS - 3)) -> Request:
    return Request(BEATS * LAPS, index.embeddings[:, frame], candidates, k)


def test_the_oldest_of_the_same_beat_comes_back_and_then_a_neighbour():
    index = circling()
    newest = 2 * BEATS + 3
    alike, _ = SimilaritySelection().select(ask(index, newest), index)
    assert (alike % BEATS == 3).all() and newest in alike
    frames, similarity = OldestAlikeSelection().select(ask(index, newest), index)
    assert frames.dtype == torch.int32 and frames[0, 0] == 3 and frames[0, 1] in (2, 4)
    assert torch.allclose(similarity, index.similarity(ask(index, newest).query, frames))


def test_age_does_not_decide_where_nothing_moves():
    index = LatentIndex()
    generator = torch.Generator().manual_seed(0)
    slow = torch.cumsum(0.001 * torch.randn(30, 16, generator=generator), dim=0) + 1
    index.put(0, slow[None])
    frames, _ = OldestAlikeSelection().select(Request(30, slow[None, 20], range(28), 1), index)
    assert abs(int(frames[0, 0]) - 20) <= 1


@pytest.mark.parametrize("drift", [0.0, 0.02])
def test_bounds_are_kept_for_each_video(drift):
    index = circling(batch=2, drift=drift)
    request = ask(index, 2 * BEATS + 3)
    bounds = torch.tensor([1, BEATS], dtype=torch.int32), torch.tensor([29, 29], dtype=torch.int32)
    bounded = Request(request.start, request.query, request.candidates, request.k, bounds)
    frames, _ = OldestAlikeSelection().select(bounded, index)
    assert frames[:, 0].tolist() == [3, BEATS + 3]


def test_forgotten_frames_and_missing_ones():
    index = circling()
    index.forget(0, 3)
    frames, _ = OldestAlikeSelection().select(ask(index, 2 * BEATS + 3), index)
    assert frames[0, 0] == BEATS + 3
    frames, similarity = OldestAlikeSelection().select(ask(index, 5, k=3, candidates=range(4, 5)), index)
    assert frames.tolist() == [[4, -1, -1]] and similarity[0, 1:].isinf().all()
