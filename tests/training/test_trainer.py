"""The trainer: deterministic, resumable at any step, and able to learn."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from longlive_rag.embedding import LatentAutoencoder
from longlive_rag.ranks import Ranks
from longlive_rag.training.config import TrainingConfig, TrainingOptions
from longlive_rag.training.latents import open_corpus
from longlive_rag.training.trainer import BEST, LAST, METRICS, AutoencoderTrainer

CONFIG = TrainingConfig(epochs=3, batch=2, embedding_dim=8, hidden_dims=(8,), learning_rate=3e-3)


def trainer(folder: Path, output: Path, config: TrainingConfig = CONFIG, **options: Any) -> AutoencoderTrainer:
    output.mkdir(exist_ok=True)
    corpus = open_corpus(folder, config.chunk_frames)
    return AutoencoderTrainer(config, corpus, output, ranks=Ranks(), device=torch.device("cpu"), **options)


def outcome(output: Path) -> tuple[dict, list[dict]]:
    """Last state, and the metrics without their timing."""
    lines = [json.loads(line) for line in (output / METRICS).read_text().splitlines()]
    for line in lines:
        del line["frames_per_second"]
    return torch.load(output / LAST, weights_only=True), lines


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, however nested."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def stops_at(step: float, steps: Iterator[int]) -> bool:
    return next(steps) == step


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("stops", [(1,), (3,), (2, 5), (9,)])  # in an epoch, at its end, twice, before the last step
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    latents_folder: Path, tmp_path: Path, precision: Literal["float32", "float16"], stops: tuple[int, ...]
):
    config = replace(CONFIG, precision=precision)
    whole = trainer(latents_folder, tmp_path / "whole", config)
    assert whole.steps == 3
    assert whole.run()
    for done, stop in zip((0, *stops), (*stops, math.inf), strict=True):
        part = trainer(latents_folder, tmp_path / "parts", config, resume=done > 0)
        finished = part.run(partial(stops_at, stop, iter(range(done + 1, 100))))
        assert finished == (stop in (math.inf, 9))  # nothing is left to resume after the last step
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "parts"))
    assert_same(*(torch.load(tmp_path / run / BEST, weights_only=True) for run in ("whole", "parts")))


def test_a_crash_after_the_last_save_does_its_epochs_again(latents_folder: Path, tmp_path: Path):
    trainer(latents_folder, tmp_path / "whole").run()
    crashed = trainer(latents_folder, tmp_path / "crashed", save_every=1)
    steps = iter(range(100))
    with pytest.raises(RuntimeError):
        crashed.run(lambda: next(steps) == 7 and (_ for _ in ()).throw(RuntimeError("power cut")))
    metrics = tmp_path / "crashed" / METRICS
    metrics.write_text(metrics.read_text() + '{"epoch": 2, "written": "after the state was saved"}\n')
    assert trainer(latents_folder, tmp_path / "crashed", resume=True).run()
    assert_same(outcome(tmp_path / "whole"), outcome(tmp_path / "crashed"))


def test_the_seed_decides_the_result(latents_folder: Path, tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trainer(latents_folder, tmp_path / name, replace(CONFIG, epochs=1, seed=seed)).run()
    weights = [torch.load(tmp_path / name / LAST, weights_only=True)["model"]["encoder.fc.weight"] for name in "abc"]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_it_learns(latents_folder: Path, tmp_path: Path):
    config = replace(CONFIG, epochs=30, delta_weight=0, smooth_weight=0)
    trainer(latents_folder, tmp_path / "run", config).run()
    _, lines = outcome(tmp_path / "run")
    assert (
        lines[-1]["train"]["total"] == lines[-1]["train"]["reconstruction"] < 0.6 * lines[0]["train"]["reconstruction"]
    )


@pytest.mark.parametrize(("weight", "term"), [("delta_weight", "delta"), ("smooth_weight", "smooth")])
def test_each_temporal_loss_lowers_what_it_penalises(latents_folder: Path, tmp_path: Path, weight: str, term: str):
    without = replace(CONFIG, epochs=15, delta_weight=0, smooth_weight=0, delta_margin=0.2)
    trainer(latents_folder, tmp_path / "without", without).run()
    weighted: dict[str, Any] = {weight: 3.0}
    trainer(latents_folder, tmp_path / "with", replace(without, **weighted)).run()
    ends = [outcome(tmp_path / name)[1][-1]["train"][term] for name in ("without", "with")]
    assert ends[1] < 0.7 * ends[0]


def test_every_checkpoint_is_an_encoder(latents_folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    trainer(latents_folder, run, save_every=2).run()
    assert sorted(path.name for path in run.glob("*.pt")) == [BEST, "epoch_0002.pt", LAST]
    released = torch.load(run / BEST, weights_only=True)
    assert released.keys() == {"model", "config"}
    assert released["config"] == {
        "in_channels": 4, "spatial_h": 8, "spatial_w": 8, "latent_dim": 8, "hidden_dims": [8]
    }  # fmt: skip
    for name in (BEST, LAST, "epoch_0002.pt"):
        encoder = LatentAutoencoder.from_checkpoint(run / name)
        assert encoder.embed(torch.randn(3, 4, 8, 8)).norm(dim=-1).allclose(torch.ones(3))


def test_the_best_checkpoint_is_the_one_with_the_lowest_validation_loss(
    latents_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    losses = iter([3.0, 1.0, 2.0])
    run = trainer(latents_folder, tmp_path / "run", save_every=1)
    monkeypatch.setattr(run, "_validate", lambda: [next(losses)] * 4)
    run.run()
    best, second = (torch.load(tmp_path / "run" / name, weights_only=True) for name in (BEST, "epoch_0002.pt"))
    assert run.best == 1.0
    assert_same(best, second)


def test_validation_uses_held_out_videos_and_the_same_chunks_every_time(latents_folder: Path, tmp_path: Path):
    run = trainer(latents_folder, tmp_path / "run")
    held_out = run.corpus.videos[run.validation_videos[0]]
    chunk = held_out.read(0, 8)
    with torch.no_grad():
        recon, _ = run.model(chunk)
    assert run._validate()[1] == pytest.approx((recon - chunk).square().mean().item(), rel=1e-5)
    assert run._validate() == run._validate()


def test_an_earlier_training_is_neither_overwritten_nor_mixed_up(latents_folder: Path, tmp_path: Path):
    run = tmp_path / "run"
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        trainer(latents_folder, run, resume=True)
    trainer(latents_folder, run).run()
    with pytest.raises(FileExistsError, match="--resume"):
        trainer(latents_folder, run)
    with pytest.raises(ValueError, match="other settings: batch 2 instead of 3"):
        trainer(latents_folder, run, replace(CONFIG, batch=3), resume=True)
    next(latents_folder.iterdir()).unlink()
    with pytest.raises(ValueError, match="other latents than these 6 videos"):
        trainer(latents_folder, run, resume=True)
    (run / LAST).write_bytes((run / LAST).read_bytes()[:2000])
    with pytest.raises(ValueError, match="cannot be resumed"):
        trainer(latents_folder, run, resume=True)


def test_divergence_is_told(latents_folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"diverged in epoch \d+; learning_rate must be below 1e\+30 here"):
        trainer(latents_folder, tmp_path / "run", replace(CONFIG, learning_rate=1e30)).run()


def test_worker_processes_change_nothing(latents_folder: Path, tmp_path: Path):
    config = replace(CONFIG, epochs=1)
    trainer(latents_folder, tmp_path / "here", config).run()
    trainer(latents_folder, tmp_path / "there", config, workers=1).run()
    assert_same(outcome(tmp_path / "here"), outcome(tmp_path / "there"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("batch", 0), ("learning_rate", 0.0), ("learning_rate", math.nan), ("weight_decay", -1.0),
        ("gradient_clip", 0.0), ("delta_margin", 1.5), ("validation_fraction", 1.0), ("embedding_dim", 0),
        ("hidden_dims", ()), ("precision", "float8"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(field: str, value: object):
    setting: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"^{field} must be"):
        TrainingConfig(**setting)


def test_sizes_default_to_the_paper_and_for_small_frames_to_less():
    assert TrainingOptions().config(60, 104) == TrainingConfig()
    small = TrainingOptions(seed=3, epochs=7).config(8, 8)
    assert (small.embedding_dim, small.hidden_dims) == (128, (32, 64))
    assert (small.seed, small.epochs) == (3, 7)


@pytest.mark.cuda
def test_it_learns_in_mixed_precision_on_a_gpu(latents_folder: Path, tmp_path: Path):
    config = replace(CONFIG, epochs=30, delta_weight=0, smooth_weight=0)
    (tmp_path / "run").mkdir()
    run = AutoencoderTrainer(
        config, open_corpus(latents_folder, 8), tmp_path / "run", ranks=Ranks(), device=torch.device("cuda", 0)
    )
    assert run.dtype == torch.float16 and run.scaler.is_enabled()
    assert run.run()
    _, lines = outcome(tmp_path / "run")
    assert lines[-1]["train"]["total"] < 0.6 * lines[0]["train"]["total"]
