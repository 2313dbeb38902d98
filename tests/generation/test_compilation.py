"""`generate --compile`: the same video from one compilation, which is kept on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.torch_version import TorchVersion as Version

from longlive_rag.cli import main
from longlive_rag.generation import compilation
from longlive_rag.generation.video import VideoWriter
from longlive_rag.models import CausalWanModel
from support.tiny_wan import save_original_folder

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

SIZES: dict[str, Any] = {"dim": 128, "ffn_dim": 64, "freq_dim": 32, "text_dim": 24, "num_heads": 1, "num_layers": 2}
COMPILATIONS = 1 if Version(torch.__version__) >= Version("2.9") else 2
"""Older versions guard every field of a block's plan, and compile once more with its first frame as a symbol."""


def test_a_compiled_transformer_makes_the_same_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_original_folder(tmp_path / "wan")
    torch.manual_seed(0)
    torch.save(CausalWanModel(**SIZES).state_dict(), tmp_path / "model.pt")
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compilation, "BACKEND", counter)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    pictures: dict[str, list[Any]] = {"plain": [], "compiled": []}
    write = VideoWriter.write

    def run(name: str, *more: str) -> int:
        def keep(self: VideoWriter, frames: Any) -> None:
            pictures[name].append(frames.astype(int))
            write(self, frames)

        monkeypatch.setattr(VideoWriter, "write", keep)
        files: dict[str, Path] = {"wan-dir": tmp_path / "wan", "checkpoint": tmp_path / "model.pt"}
        given = [f"--{option}={path}" for option, path in {**files, "output": tmp_path / name}.items()]
        sizes = ["--seconds", "8", "--fps", "4", "--height", "32", "--width", "48", "--prompt", "a cat"]
        return main(["generate", "--backbone", "wan", *given, *sizes, *more])

    torch._dynamo.reset()
    assert run("plain") == 0 and counter.frame_count == 0
    assert run("compiled", "--compile") == 0 and counter.frame_count == COMPILATIONS
    # Rounded to 8 bits: sums in another order tip a picture element now and then.
    assert np.abs(np.concatenate(pictures["plain"]) - np.concatenate(pictures["compiled"])).max() <= 1
    assert json.loads(next((tmp_path / "compiled").glob("*.json")).read_text())["compile"] is True
    capsys.readouterr()
    assert run("plain", "--compile") == 2 and "compile" in capsys.readouterr().err  # another setting


def test_what_is_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    compilation.compile_model(CausalWanModel(**{**SIZES, "num_layers": 1}))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "longlive_rag" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    assert compilation.cache_folder() == Path("elsewhere")


def test_ranks_that_share_a_video_are_not_compiled(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--backbone", "wan", "--wan-dir", str(tmp_path), "--output", str(tmp_path), "--prompt", "a cat"]
    assert main(["generate", *arguments, "--compile", "--sequence-parallel", "2"]) == 2
    assert "compile must be off with sequence_parallel" in capsys.readouterr().err
