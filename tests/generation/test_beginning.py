"""Videos that begin with a picture or another video, and prompts that change along the way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from longlive_rag.cli import main
from longlive_rag.generation.journal import Journal
from longlive_rag.generation.pipeline import Pipeline
from longlive_rag.generation.prompts import Script, read_scripts, script_of
from longlive_rag.generation.settings import VideoSettings
from longlive_rag.generation.video import VideoWriter
from longlive_rag.models import CausalWanModel
from support.stopped_videos import FACTS, contents, tiny_pipeline
from support.tiny_wan import save_original_folder

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from longlive_rag.generation.beginning import encode, from_image, from_video
from longlive_rag.generation.wan_files import find_wan_files
from longlive_rag.generation.wan_vae import StreamingDecoder, load_vae

SIZES: dict[str, Any] = {"dim": 128, "ffn_dim": 64, "freq_dim": 32, "text_dim": 24, "num_heads": 1, "num_layers": 1}
PROMPTS = [(0.0, torch.ones(4, 8)), (5.0, -torch.ones(4, 8))]
"""4 pictures a second: second 5 is picture 20, which is of latent frame 6."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    save_original_folder(folder / "wan")
    torch.manual_seed(0)
    torch.save(CausalWanModel(**SIZES).state_dict(), folder / "model.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    with VideoWriter(folder / "clip.mp4", fps=4, size=(32, 48)) as writer:
        writer.write(np.random.default_rng(1).integers(0, 256, (24, 32, 48, 3), dtype=np.uint8))
    return folder


def generate(parts: Path, output: Path, *arguments: object) -> int:
    files = ["--wan-dir", parts / "wan", "--checkpoint", parts / "model.pt", "--output", output]
    size = ["--seconds", 8, "--fps", 4, "--height", 32, "--width", 48]
    return main(["generate", "--backbone", "wan", *map(str, [*files, *size, *arguments])])


def test_encoding_a_few_pictures_at_a_time_is_encoding_them_at_once(parts: Path) -> None:
    vae = load_vae(find_wan_files(parts / "wan"), device="cpu", dtype=torch.float32)
    pictures = np.random.default_rng(2).integers(0, 256, (13, 32, 48, 3), dtype=np.uint8)
    found = encode(vae, iter(pictures))
    x = torch.from_numpy(pictures).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mode()[0].transpose(0, 1)
    mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (vae.config.latents_mean, vae.config.latents_std))
    torch.testing.assert_close(found, (z - mean) / std, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("option", "latent_frames"), [("image", 3), ("video", 6)])
def test_a_video_begins_with_what_it_was_given(
    parts: Path, tmp_path: Path, option: str, latent_frames: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 pictures are 6 latent frames and 3 pictures more, which are those of its beginning."""
    file = parts / {"image": "picture.png", "video": "clip.mp4"}[option]
    written: list[np.ndarray] = []
    with monkeypatch.context() as patch:
        patch.setattr(VideoWriter, "write", lambda self, frames: written.append(frames))
        assert generate(parts, tmp_path / "seen", "--prompt", "a cat", f"--{option}", file) == 0
    settings = VideoSettings(seconds=8, fps=4, height=32, width=48)
    read = {"image": from_image, "video": from_video}[option]
    beginning = read(file, settings)
    pictures = list(beginning.pictures())
    assert len(pictures) == 4 * latent_frames - 3 and pictures[0].shape == (32, 48, 3)
    files = find_wan_files(parts / "wan")
    vae = load_vae(files, device="cpu", dtype=torch.float32)
    expected = StreamingDecoder(vae).decode(encode(vae, pictures))
    frames = np.concatenate(written)
    assert len(frames) == 33
    # One step of 8 bits, for rounding.
    assert np.abs(frames[: len(expected)].astype(int) - expected.numpy().astype(int)).max() <= 1


def test_other_beginnings_and_prompts_are_other_settings(parts: Path, tmp_path: Path, capsys: Any) -> None:
    cat = ["--prompt", "a cat", "--image", parts / "picture.png"]
    changes = ["--prompt-at", "2s", "a panda", "--prompt-at", "4s", "the guitar"]
    assert generate(parts, tmp_path / "videos", *cat, *changes) == 0
    log = json.loads((tmp_path / "videos" / "0000-a-cat.json").read_text())
    assert log["prompt_at"] == [[2, "a panda"], [4, "the guitar"]] and log["beginning"].startswith("image sha256:")
    capsys.readouterr()
    assert generate(parts, tmp_path / "videos", *cat, *changes) == 0
    assert "1 of 1 videos are there already" in capsys.readouterr().out
    for other, name in ((cat, "prompt_at"), (["--prompt", "a cat", *changes], "beginning")):
        assert generate(parts, tmp_path / "videos", *other) == 2
        assert f"was made with other settings ({name} " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "picture.png", "--video", "clip.mp4"], "give either image or video, got both"),
        (["--image", "nothing.png"], "image file .*nothing.png does not exist"),
        (["--image", "model.pt"], "image must be a picture, got .*model.pt"),
        (["--video", "picture.png"], "video must have fps = 4"),
        (["--video", "clip.mp4", "--fps", "8"], "video must have fps = 8 pictures a second like the new one, got 4"),
        (["--video", "clip.mp4", "--seconds", "5"], "seconds must be longer than the video .*6 latent frames.*got 5"),
        (["--prompt-at", "soon", "a dog"], "got 'soon' for a time"),
        (["--prompt-at", "2s"], "got no prompt after '2s'"),
        (["--prompt-at", "2s", "a dog", "2s", "a cat"], "rising times above 0, got 2s after 2s"),
        (["--prompt-at", "9s", "a dog"], "before the video's end at 8s, got 9s"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line(
    parts: Path, tmp_path: Path, capsys: Any, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(parts)
    assert generate(parts, tmp_path, "--prompt", "a cat", *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


def test_lines_of_the_file_of_prompts(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n a fox walks @10s it sleeps @ home @2.5 @20.5s it wakes up\nmail to a@3s.org\n")
    assert read_scripts(path) == [
        Script("a cat"),
        Script("a fox walks", ((10.0, "it sleeps @ home @2.5"), (20.5, "it wakes up"))),
        Script("mail to a@3s.org"),
    ]
    assert script_of("a fox walks", ["10s", "it sleeps", "20.5", "it wakes up"]).texts == [
        "a fox walks", "it sleeps", "it wakes up",
    ]  # fmt: skip
    for line, message in (("@5s a dog", "hold a prompt, got none"), ("a @5s b @4s c", "got 4s after 5s, in the line")):
        path.write_text(line)
        with pytest.raises(ValueError, match=message):
            read_scripts(path)


def make(pipeline: Pipeline, folder: Path, begin: Any, prompts: Any = PROMPTS) -> dict[str, bytes]:
    folder.mkdir(exist_ok=True)
    pipeline.generate(prompts, folder / "cat.mp4", FACTS, begin=begin)
    return contents(folder)


@pytest.mark.parametrize("block", [0, 1, 2, 7])
def test_it_goes_on_to_the_last_byte(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped within what was given, right after it, and after the prompt's change."""
    pipeline, calls = tiny_pipeline(), []

    def begin() -> Tensor:
        calls.append(1)
        return torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(5)) + (len(calls) > 2)

    expected = make(pipeline, tmp_path / "whole", begin)
    put_block = Journal.put_block

    def interrupted(self: Journal, index: int, made: Any) -> None:
        if index == block:
            raise KeyboardInterrupt
        put_block(self, index, made)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "put_block", interrupted)
        make(pipeline, tmp_path / "stopped", begin)
    assert make(pipeline, tmp_path / "stopped", begin) == expected
    assert len(calls) == 2, "the journal keeps what a video begins with"


def test_a_prompt_holds_from_its_time_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[list[np.ndarray]] = []
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: written[-1].append(frames))
    for number, prompts in enumerate([PROMPTS, PROMPTS[0][1]]):
        written.append([])
        make(tiny_pipeline(), tmp_path / str(number), None, prompts)
    changed, same = (np.concatenate(frames) for frames in written)
    # Latent frame 6 is pictures 21 to 24.
    assert np.array_equal(changed[:21], same[:21]) and not np.array_equal(changed[21:25], same[21:25])
    with pytest.raises(ValueError, match="before the video's end, got a change at 60s"):
        make(tiny_pipeline(), tmp_path / "late", None, [PROMPTS[0], (60.0, PROMPTS[1][1])])
    with pytest.raises(ValueError, match="to begin with must be .n, 16, 4, 4., n 1 or a multiple of 1 below 12"):
        make(tiny_pipeline(), tmp_path / "long", lambda: torch.zeros(12, 16, 4, 4))
