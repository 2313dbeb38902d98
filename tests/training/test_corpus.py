"""Making a corpus: by number, in any company, once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from longlive_rag import RetrievalConfig
from longlive_rag.models import CausalWanModel
from longlive_rag.ranks import Ranks
from longlive_rag.small_world import world
from longlive_rag.small_world.backbone import load_codec
from longlive_rag.small_world.corpus import WorldSource, random_walk
from longlive_rag.training import corpus as corpus_module
from longlive_rag.training.corpus import video_path, write_corpus
from longlive_rag.training.latents import LatentVideo
from longlive_rag.training.sources import GeneratorSource


class Numbers:
    """Latents that hold the video's number."""

    def __init__(self, batch: int = 2, seed: int = 0) -> None:
        self.batch, self.video_bytes = batch, 4 * 2 * 3 * 4
        self.settings: dict[str, str | int | float] = {"source": "numbers", "seed": seed}
        self.made: list[int] = []

    def make(self, numbers: Sequence[int]) -> list[tuple[Tensor, dict[str, str]]]:
        self.made += numbers
        return [(torch.full((2, 3, 2, 2), float(number)), {"prompt": f"number {number}"}) for number in numbers]


def test_a_video_carries_its_latents_and_metadata(tmp_path: Path):
    assert write_corpus(Numbers(), tmp_path, 3) == (3, 0)
    video = LatentVideo.open(video_path(tmp_path, 2))
    assert video.metadata == {"number": "2", "prompt": "number 2"}
    assert torch.equal(video.read(), torch.full((2, 3, 2, 2), 2.0))


def test_only_what_is_missing_is_made(tmp_path: Path):
    write_corpus(Numbers(), tmp_path, 5)
    video_path(tmp_path, 1).unlink()
    again = Numbers()
    assert write_corpus(again, tmp_path, 6) == (2, 4)
    assert again.made == [1, 5]


@pytest.mark.parametrize("together", [True, False])
def test_ranks_share_the_videos_without_gap_or_overlap(tmp_path: Path, together: bool):
    """Whether all ranks look at the empty folder at once, or each when those before it have finished."""
    made = []
    for rank in range(3):
        source = Numbers()
        write_corpus(source, tmp_path / (str(rank) if together else "common"), 7, Ranks(rank, 3, 0))
        made += source.made
    assert sorted(made) == list(range(7))


def test_a_folder_holds_one_corpus(tmp_path: Path):
    write_corpus(Numbers(), tmp_path, 1)
    with pytest.raises(ValueError, match="another corpus: seed 0 instead of 1"):
        write_corpus(Numbers(seed=1), tmp_path, 2)
    (tmp_path / "corpus.json").write_text("{")
    with pytest.raises(ValueError, match="corpus.json is damaged"):
        write_corpus(Numbers(), tmp_path, 2)


def test_a_full_disk_is_noticed_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=corpus_module.SPARE_BYTES + 200)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    source = Numbers()
    with pytest.raises(OSError, match="GiB free"):
        write_corpus(source, tmp_path, 3)
    assert not source.made
    assert write_corpus(source, tmp_path, 2).made == 2


def test_world_videos_show_what_their_metadata_says():
    codec = load_codec()
    latents, metadata = WorldSource(codec, frames=12, seed=5).make([3])[0]
    views, phases, cast = (np.array(json.loads(metadata[name])) for name in ("views", "phases", "cast"))
    assert latents.shape == (12, 16, 8, 8)
    sprites, _ = world.decode(codec.decode(latents), views)
    seen = sprites >= 0
    assert seen.any() and (sprites == cast)[seen].mean() > 0.99
    assert ((phases[1:] - phases[:-1]) % world.PHASES == 1).all()


def test_random_walks_are_walks():
    tracks = set()
    for seed in range(20):
        walk = random_walk(np.random.default_rng(seed), 50)
        steps = np.abs(np.diff(walk.views))
        assert len(walk.views) == 50 and walk.views.min() >= 0 and walk.views.max() < world.VIEWS
        assert (steps % world.VIEWS_PER_PLACE == 0).all() if walk.track == "cuts" else (steps <= 1).all()
        tracks.add(walk.track)
    assert tracks == set(world.TRACKS)


def test_a_generated_video_is_the_same_alone_and_in_company():
    torch.manual_seed(0)
    model = CausalWanModel(
        dim=24, ffn_dim=24, freq_dim=16, text_dim=8, text_len=2, num_heads=2, num_layers=1, in_dim=4, out_dim=4
    ).eval()

    def prompts(number: int) -> tuple[list[tuple[int, Tensor]], dict[str, str]]:
        generator = torch.Generator().manual_seed(number)
        first, second = torch.randn(2, 1, 2, 8, generator=generator)
        return [(0, first), (number + 1, second)], {"prompt": f"number {number}"}

    config = RetrievalConfig(context_frames=4, sink_frames=1, memory_frames=1, recency_guard=1, block_frames=1)
    source = GeneratorSource(
        model, prompts, (4, 4, 4), 8, config, denoising_steps=(1000, 500), timestep_shift=5.0, seed=1, name="tiny"
    )
    (together, about), (other, _) = source.make([2, 5])
    [(alone, _)] = source.make([2])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, other)
    assert about == {"source": "tiny", "seed": "1", "prompt": "number 2"}
    with pytest.raises(ValueError, match="whole blocks of 3 latent frames, got 8"):
        GeneratorSource(
            model,
            prompts,
            (4, 4, 4),
            8,
            RetrievalConfig(),
            denoising_steps=(1000,),
            timestep_shift=5.0,
            seed=1,
            name="x",
        )
