"""`corpus` from a Wan-family checkpoint: tiny random parts in the public layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from longlive_rag.cli import main
from longlive_rag.models import CausalWanModel
from longlive_rag.training.latents import LatentVideo
from support.tiny_wan import save_original_folder

pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_original_folder(folder / "wan")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"dim": 128, "ffn_dim": 64, "freq_dim": 32, "text_dim": 24, "num_heads": 1, "num_layers": 1}
    state = CausalWanModel(**sizes).state_dict()
    torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in state.items()}}, folder / "model.pt")
    (folder / "prompts.txt").write_text("a red fox\n\na blue whale\n", encoding="utf-8")
    return folder


def corpus(parts: Path, output: Path, *more: str) -> int:
    files = ["--wan-dir", parts / "wan", "--checkpoint", parts / "model.pt", "--prompts", parts / "prompts.txt"]
    sizes = ["--height", "32", "--width", "48", "--frames", "6", "--device", "cpu"]
    return main(["corpus", "--source", "self-forcing", "--output", str(output), *map(str, files), *sizes, *more])


def test_a_checkpoint_rolls_out_the_prompt_pool(parts: Path, tmp_path: Path):
    assert corpus(parts, tmp_path, "--videos", "3") == 0
    videos = [LatentVideo.open(path) for path in sorted(tmp_path.glob("*.safetensors"))]
    assert [video.shape for video in videos] == [(6, 16, 4, 6)] * 3
    assert [video.metadata["prompt"] for video in videos] == ["a red fox", "a blue whale", "a red fox"]
    latents = [video.read() for video in videos]
    assert all(each.isfinite().all() for each in latents)
    assert not torch.equal(latents[0], latents[2])  # the same prompt, other noise


def test_other_prompts_are_another_corpus(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert corpus(parts, tmp_path, "--videos", "1") == 0
    (parts / "others.txt").write_text("a green frog\n", encoding="utf-8")
    assert corpus(parts, tmp_path, "--videos", "1", "--prompts", str(parts / "others.txt")) == 2
    assert "holds another corpus: prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--height", "40"], "height and width must be multiples of 16 pixels, got 40 x 48"),
        (["--frames", "7"], "frames must be whole blocks of 3 latent frames, got 7"),
        (["--checkpoint", "missing.pt"], "checkpoint missing.pt does not exist"),
    ],
)
def test_what_does_not_fit_is_refused(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert corpus(parts, tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
