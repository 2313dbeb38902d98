"""Retrieval quality against cases whose answer is plain."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from longlive_rag import RetrievalConfig
from longlive_rag.embedding import AveragePool, Embedding, LatentAutoencoder
from longlive_rag.generation.video import VideoWriter
from longlive_rag.small_world import embeddings, world
from longlive_rag.small_world.backbone import ASSETS, load_backbone, load_codec
from longlive_rag.small_world.embeddings import (
    comparison_table,
    draw_comparison,
    measure_alone,
    measure_on_world,
    read_latents_or_video,
    world_videos,
)
from longlive_rag.small_world.retrieval_quality import (
    RetrievalQuality,
    effective_rank,
    retrieval_quality,
    similarity_by_lag,
)

CONFIG = RetrievalConfig(context_frames=6, sink_frames=1, memory_frames=2, recency_guard=5, block_frames=1)
WALK = world.walk("cuts", 60)


def place_and_beat(beat_weight: float) -> torch.Tensor:
    """The ideal embedding: a direction for each place, and a circle of beats."""
    places = torch.eye(world.PLACES)[WALK.views // world.VIEWS_PER_PLACE]
    angle = torch.from_numpy(WALK.phases) * (2 * math.pi / world.PHASES)
    return torch.cat([places, beat_weight * torch.stack([angle.cos(), angle.sin()], dim=1)], dim=1).float()


def quality_of(
    embeddings: torch.Tensor,
    queries: torch.Tensor,
    walk: world.Walk,
    config: RetrievalConfig,
    arrivals_only: bool = False,
) -> RetrievalQuality:
    """Where there is something to retrieve."""
    quality = retrieval_quality(embeddings, queries, walk, config, arrivals_only=arrivals_only)
    assert quality is not None
    return quality


def test_an_embedding_that_knows_place_and_beat_is_perfect():
    embeddings = place_and_beat(0.5)
    quality = quality_of(embeddings, embeddings, WALK, CONFIG)
    assert (quality.precision_at_1, quality.precision_at_k, quality.recall_at_k, quality.best_at_1) == (1, 1, 1, 1)
    assert quality.margin > 0


def test_an_embedding_that_knows_the_beat_only_is_told_apart():
    embeddings = place_and_beat(100.0)
    quality = quality_of(embeddings, embeddings, WALK, CONFIG)
    assert quality.precision_at_1 < 0.75 and quality.margin < 0.01


def test_the_newest_frame_finds_the_place_that_is_left():
    embeddings = place_and_beat(0.5)
    arriving = quality_of(embeddings, embeddings.roll(1, dims=0), WALK, CONFIG, arrivals_only=True)
    everywhere = quality_of(embeddings, embeddings.roll(1, dims=0), WALK, CONFIG)
    assert arriving.blocks == everywhere.blocks / world.DWELL
    assert arriving.precision_at_1 < 0.2 and everywhere.precision_at_1 > 0.75


def test_numbers_by_hand():
    """Frame 6 asks; of frames 0 .. 5, context and sink leave 1 .. 3 (views 0, 1, 0)."""
    config = RetrievalConfig(context_frames=3, sink_frames=1, memory_frames=1, recency_guard=0, block_frames=1)
    walk = world.Walk("cuts", np.array([3, 0, 1, 0, 2, 2, 0]), np.arange(7), lap=7)
    unit = torch.tensor([[0.0, 1.0], [0.6, 0.8], [0.8, 0.6], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    quality = quality_of(unit, unit, walk, config, arrivals_only=True)
    # Frames 1, 2 and 3 have similarity .6, .8 and 0, so that the wrong frame 2 comes first.
    assert (quality.precision_at_1, quality.recall_at_k, quality.blocks) == (0, 0, 1)
    assert quality.margin == pytest.approx(-0.2)
    early = world.Walk("cuts", walk.views[:3], walk.phases[:3], 3)
    assert retrieval_quality(unit[:3], unit[:3], early, config) is None


def test_recall_counts_what_k_frames_can_hold():
    config = RetrievalConfig(context_frames=4, sink_frames=0, memory_frames=3, recency_guard=0, block_frames=1)
    walk = world.Walk("cuts", np.array([0, 1, 1, 1, 2, 2, 2, 2, 0]), np.arange(9) % 8, lap=9)
    unit = torch.eye(3)[walk.views]
    quality = quality_of(unit, unit, walk, config, arrivals_only=True)
    assert (quality.precision_at_k, quality.recall_at_k) == (pytest.approx(1 / 3), 1)


def test_similarity_by_lag():
    turning = torch.tensor([[math.cos(t), math.sin(t)] for t in np.arange(9) * math.pi / 4]) * 7
    assert similarity_by_lag(turning, 4) == pytest.approx([math.cos(k * math.pi / 4) for k in (1, 2, 3, 4)], abs=1e-6)
    assert len(similarity_by_lag(turning, 99)) == 8


def test_effective_rank_counts_directions():
    axes = torch.cat([torch.eye(6), -torch.eye(6)])
    assert effective_rank(axes) == pytest.approx(6)
    assert effective_rank(axes[:, :2][[0, 1, 6, 7]]) == pytest.approx(2)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)


@pytest.fixture(scope="module")
def truth():
    return world_videos(load_codec(), videos=2, frames=70, draws=3)


def test_a_draft_finds_the_place_where_the_newest_frame_does_not(truth):
    for grid in (1, 4):
        cuts = measure_on_world(AveragePool(grid), truth, CONFIG)["tracks"]["cuts"]["queries"]
        assert cuts["draft"]["precision_at_1"]["mean"] > 0.9 > 0.3 > cuts["latest"]["precision_at_1"]["mean"]


def test_intervals_contain_their_mean(truth):
    for quality in measure_on_world(AveragePool(), truth, CONFIG)["tracks"]["pans"]["queries"].values():
        for value in quality.values():
            assert value["low"] <= value["mean"] <= value["high"]


def test_rollouts_are_searched_by_the_embedding_that_is_given(monkeypatch):
    monkeypatch.setattr(embeddings, "ROLLOUT_TRACK", "cuts")
    monkeypatch.setattr(embeddings, "ROLLOUT_LAPS", 2)
    searched = []

    class Recording(AveragePool):
        def embed(self, latents: torch.Tensor) -> torch.Tensor:
            searched.append(len(latents))
            return super().embed(latents)

    result = embeddings.measure_in_rollouts(Recording(), load_backbone(), load_codec(), videos=2)
    assert searched and 0.8 < result["mean"] <= 1 and result["videos"] == 2
    assert result["chance"] < 0.3


def test_report_of_embeddings(truth, tmp_path: Path):
    video = tmp_path / "clip.mp4"
    with VideoWriter(video, fps=16) as writer:
        writer.write(np.random.default_rng(0).integers(0, 255, (16, 32, 48, 3), dtype=np.uint8))
    latents = read_latents_or_video(video)
    assert latents.shape == (4, 3, 4, 6) and latents.abs().max() <= 1
    encoder = LatentAutoencoder(16, 8, 8, embedding_dim=8, hidden_dims=(8,))
    everything: dict[str, Embedding] = {"average pool": AveragePool(), "encoder": encoder}
    report = {
        "small_world": {name: measure_on_world(each, truth, CONFIG) for name, each in everything.items()},
        "files": {str(video): {name: measure_alone(each, latents) for name, each in everything.items()}},
    }
    assert comparison_table(report).splitlines()[2].endswith("-")  # no roll-outs
    report["small_world"]["encoder"]["rollouts"] = {"mean": 0.75, "low": 0.5, "high": 1.0, "videos": 2, "chance": 0.1}
    assert report["files"][str(video)]["encoder"] is None  # made for 16 channels, not for 3 colours
    json.dumps(report, allow_nan=False)
    draw_comparison(report, tmp_path / "embeddings.png")
    assert (tmp_path / "embeddings.png").stat().st_size > 10_000
    table = comparison_table(report)
    assert "average pool" in table and "for other latents" in table and "0.750 [0.500, 1.000]" in table


def test_the_bundled_encoder_finds_the_place_and_mostly_the_beat(truth):
    encoder = LatentAutoencoder.from_checkpoint(ASSETS / "encoder.safetensors")
    measured = measure_on_world(encoder, truth, CONFIG)
    for track in measured["tracks"].values():
        assert track["queries"]["draft"]["precision_at_1"]["mean"] > 0.97
        assert track["queries"]["draft"]["best_at_1"]["mean"] > 0.85
