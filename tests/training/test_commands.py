"""`corpus` and `train` as a user meets them: from nothing to an encoder, interrupted, over several ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from longlive_rag.cli import main
from longlive_rag.embedding import LatentAutoencoder
from longlive_rag.training.interruption import StopSignal
from longlive_rag.training.latents import write_latents

TINY = ("--embedding-dim", "8", "--hidden-dims", "8", "--batch", "2", "--device", "cpu")
COMMAND = [sys.executable, "-m", "longlive_rag"]


def train(folder: Path, output: Path, *more: str) -> int:
    return main(["train", "--data", str(folder), "--output", str(output), *TINY, *more])


def epochs_done(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_from_nothing_to_an_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    corpus, output = tmp_path / "corpus", tmp_path / "encoder"
    arguments = ["corpus", "--output", str(corpus), "--source", "world", "--videos", "4", "--frames", "10"]
    assert main(arguments) == 0
    assert f"next: longlive-rag train --data {corpus}" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "0 videos made" in capsys.readouterr().out
    assert train(corpus, output, "--epochs", "2") == 0
    for name in ("best.pt", "encoder.safetensors"):
        embeddings = LatentAutoencoder.from_checkpoint(output / name).embed(torch.randn(2, 16, 8, 8))
        assert embeddings.shape == (2, 8)
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")


def test_ablation_trains_every_variant_and_compares_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from longlive_rag.small_world import embeddings

    small = embeddings.world_videos
    monkeypatch.setattr(embeddings, "world_videos", lambda codec: small(codec, videos=1, frames=60, draws=1))
    for number in range(3):
        (tmp_path / "latents").mkdir(exist_ok=True)
        write_latents(tmp_path / "latents" / f"{number}.safetensors", torch.randn(9, 16, 8, 8), {})
    output = tmp_path / "out"
    assert train(tmp_path / "latents", output, "--epochs", "1", "--ablation") == 0
    report = json.loads((output / "report.json").read_text())
    variants = {"full", "without_delta", "without_smoothing", "reconstruction_only", "paper_weights"}
    assert set(report["small_world"]) == variants | {"average pool", "average pool, 4 x 4"}
    assert (output / "embeddings.png").exists()
    weights = [torch.load(output / name / "best.pt")["model"]["encoder.fc.weight"] for name in sorted(variants)]
    assert all(not torch.equal(weights[0], other) for other in weights[1:])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals):
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        before = stop.received  # mypy takes a member that was None to stay so
        assert before is None
        os.kill(os.getpid(), number)
        assert stop.received == number
        os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_saves_and_says_how_to_go_on(latents_folder: Path, tmp_path: Path):
    output = tmp_path / "run"
    arguments = ["train", "--data", str(latents_folder), "--output", str(output), *TINY, "--epochs", "100000"]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 600
        while epochs_done(output) < 2 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert error.rstrip().endswith("--resume") and f"saved in {output / 'last.pt'}" in error
    assert "Traceback" not in error
    assert torch.load(output / "last.pt", weights_only=True)["training"]["epoch"] >= 2


def test_two_ranks_train_what_one_does(latents_folder: Path, tmp_path: Path):
    more = ("--epochs", "2", "--delta-margin", "0.2", "--save-every", "1")
    assert train(latents_folder, tmp_path / "one", *more) == 0
    arguments = ["train", "--data", str(latents_folder), "--output", str(tmp_path / "two"), *TINY, *more]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, "-m", "longlive_rag", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [[json.loads(line) for line in (tmp_path / run / "metrics.jsonl").open()] for run in ("one", "two")]
    for mine, theirs in zip(*lines, strict=True):
        assert theirs["train"] == pytest.approx(mine["train"], rel=1e-3)
        assert theirs["validation"] == pytest.approx(mine["validation"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--output", "{}/x"], "give either data, to train on, or evaluate"),
        (["train", "--output", "{}/x", "--data", "{}/missing"], "no folder of latents at"),
        (["train", "--output", "{}/x", "--evaluate", "{}/missing.pt"], "no file to evaluate at"),
        (["train", "--output", "{}/x", "--data", "{}/empty"], "holds no latents"),
        (["train", "--output", "{}/x", "--data", "{}/empty", "--workers", "-1"], "workers must be at least 0"),
        (["corpus", "--output", "{}/x", "--videos", "0"], "videos must be at least 1, got 0"),
        (["corpus", "--output", "{}/x", "--frames", "0"], "frames must be at least 1, got 0"),
        (["corpus", "--output", "{}/x", "--source", "longlive"], "wan_dir, the folder of Wan's text encoder, must be"),
        (["corpus", "--output", "{}/x", "--source", "wan", "--wan-dir", "{}"], "prompts, a text file, must be given"),
    ],
)
def test_wrong_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str):
    (tmp_path / "empty").mkdir()
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_skipped_files_are_counted(latents_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_latents(latents_folder / "short.safetensors", torch.randn(3, 4, 8, 8), {})
    assert train(latents_folder, tmp_path / "run", "--epochs", "1") == 2
    assert "short.safetensors has 3 latent frames, expected at least 8" in capsys.readouterr().err
    assert train(latents_folder, tmp_path / "run", "--epochs", "1", "--bad-data", "skip") == 0
    assert "1 bad files left out" in capsys.readouterr().err
