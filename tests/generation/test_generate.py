"""`longlive-rag generate` end to end: tiny random parts in the public layouts, from prompts to videos and logs."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longlive_rag.cli import main
from longlive_rag.generation.video import VideoWriter
from longlive_rag.models import CausalWanModel
from support.stopped_videos import contents
from support.tiny_wan import save_diffusers_folder, save_original_folder
from support.video_files import read_video

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

SIZES: dict[str, Any] = {"dim": 128, "ffn_dim": 64, "freq_dim": 32, "text_dim": 24, "num_heads": 1, "num_layers": 2}
# 9 latent frames, 33 pictures, too short for memory; 33 latent frames, with more candidates than memory takes.
SHORT = ["--seconds", "8", "--fps", "4", "--height", "32", "--width", "48"]
LONG = ["--seconds", "32", *SHORT[2:]]
ONE_BLOCK = ["--seconds", "2", *SHORT[2:]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A Wan folder in each layout, and a checkpoint as training code leaves it."""
    folder = tmp_path_factory.mktemp("parts")
    save_original_folder(folder / "original")
    save_diffusers_folder(folder / "diffusers")
    torch.manual_seed(0)
    state = CausalWanModel(**SIZES).state_dict()
    torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in state.items()}}, folder / "model.pt")
    return folder


@pytest.fixture
def generate(parts, tmp_path):
    def run(*arguments, wan="original", output="videos", checkpoint="model.pt", length=SHORT):
        files = ["--wan-dir", parts / wan, "--checkpoint", parts / checkpoint, "--output", tmp_path / output]
        return main(["generate", "--backbone", "self-forcing", *map(str, files), *length, *arguments])

    return run


def test_prompt_becomes_video_log_and_picture(generate, tmp_path, capsys):
    assert generate("--prompt", "A panda plays the guitar", length=LONG) == 0
    name = "0000-a-panda-plays-the-guitar"
    assert {entry.name for entry in (tmp_path / "videos").iterdir()} == {f"{name}.mp4", f"{name}.json", f"{name}.png"}
    frames, fps = read_video(tmp_path / "videos" / f"{name}.mp4")
    assert frames.shape == (4 * 33 - 3, 32, 48, 3) and fps == 4
    assert frames.std() > 1

    log = json.loads((tmp_path / "videos" / f"{name}.json").read_text())
    assert log["prompt"] == "A panda plays the guitar"
    assert (log["frames"], log["latent_frames"]) == (129, 33)
    assert log["settings"]["memory"]["memory_frames"] == 6
    # Candidates: from the sink's end to the recency guard; at most six of them.
    assert [entry["start"] for entry in log["retrieved"]] == [18, 21, 24, 27, 30]
    for entry in log["retrieved"]:
        candidates = range(1, 1 + entry["start"] - 12 - 5)
        assert len(entry["frames"]) == min(6, len(candidates)) and set(entry["frames"]) <= set(candidates)
        assert entry["similarity"] == sorted(entry["similarity"], reverse=True)
    assert Image.open(tmp_path / "videos" / f"{name}.png").width > 500
    assert "33 latent frames" in capsys.readouterr().out


def test_video_is_that_of_rollout_and_decoding_at_once(generate, parts, monkeypatch):
    """The streaming path is the plain one: all noise, one roll-out, one decode."""
    from longlive_rag import RetrievalConfig, rollout
    from longlive_rag.generation.text_encoder import PromptEncoder
    from longlive_rag.generation.wan_files import find_wan_files
    from longlive_rag.generation.wan_vae import StreamingDecoder
    from longlive_rag.models.checkpoints import load_causal_wan

    written = []
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: written.append(frames))
    assert generate("--prompt", "a cat walks in the rain", "--seed", "3") == 0
    files = find_wan_files(parts / "original")
    prompt = PromptEncoder(files, device="cpu", dtype=torch.float32).encode("a cat walks in the rain")
    generator = torch.Generator().manual_seed(3)
    # Drawn in the order in which the stream draws: each block's first noise, then its fresh noise.
    noise, fresh = [], []
    for _ in range(3):
        noise.append(torch.randn(1, 3, 16, 4, 6, generator=generator))
        fresh += [torch.randn(3, 16, 4, 6, generator=generator) for _ in range(3)]
    model = load_causal_wan(parts / "model.pt", dtype=torch.float32)
    config = RetrievalConfig()
    result = rollout(model, torch.cat(noise, 1), prompt[None], config, renoise=lambda index, _: fresh[index])
    expected = StreamingDecoder.from_files(files, device="cpu", dtype=torch.float32).decode(result.latents[0])
    assert np.array_equal(np.concatenate(written), expected.numpy())


def test_layouts_and_low_memory_do_not_change_the_video(generate, monkeypatch):
    written: list[list[np.ndarray]] = []
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: written[-1].append(frames.astype(int)))
    for arguments in ({"wan": "original"}, {"wan": "diffusers"}):
        written.append([])
        low_memory = ["--low-memory"] if arguments["wan"] == "diffusers" else []
        assert generate("--prompt", "a cat", *low_memory, **arguments) == 0
    one, other = (np.concatenate(frames) for frames in written)
    # Weights are mapped from the files, at other addresses in each layout, for which the CPU's library may add up in
    # another order: one step of 8 bits, for rounding.
    assert np.abs(one - other).max() <= 1


def test_a_device_budget_does_not_change_the_video(generate, tmp_path, capsys):
    prompt = ["--prompt", "a cat"]
    page = 2 * SIZES["num_layers"] * 2 * 3 * SIZES["dim"] * 4  # of a latent frame of 2 x 3 tokens in float32
    assert generate(*prompt, length=LONG, output="a") == 0
    assert generate(*prompt, "--device-memory", f"{12 * page}", length=LONG, output="b") == 0
    assert re.search(r"device 12 frames, .*; host 21 frames, ", capsys.readouterr().out)
    assert (tmp_path / "a" / "0000-a-cat.mp4").read_bytes() == (tmp_path / "b" / "0000-a-cat.mp4").read_bytes()
    assert generate(*prompt, "--device-memory", f"{12 * page - 1}", output="c") == 2
    assert "budget.device must hold the keys and values of context_frames = 12 latent" in capsys.readouterr().err
    assert generate(*prompt, "--host-memory", "much", output="c") == 2
    assert "a size must look like 12GB, 500MiB or 4096, got 'much'" in capsys.readouterr().err


def test_prompt_file_resumes_and_ranks_share_it(generate, tmp_path, capsys, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a panda\n\na cat in the rain\na guitar\n")
    videos = tmp_path / "videos"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert generate("--prompts", str(prompts), length=ONE_BLOCK) == 0
    assert sorted(path.name for path in videos.glob("*.mp4")) == ["0001-a-cat-in-the-rain.mp4"]
    written = (videos / "0001-a-cat-in-the-rain.mp4").stat().st_mtime_ns
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    capsys.readouterr()
    assert generate("--prompts", str(prompts), length=ONE_BLOCK) == 0
    assert "1 of 3 videos are there already" in capsys.readouterr().out
    assert sorted(path.name for path in videos.glob("*.mp4")) == [
        "0000-a-panda.mp4",
        "0001-a-cat-in-the-rain.mp4",
        "0002-a-guitar.mp4",
    ]
    assert (videos / "0001-a-cat-in-the-rain.mp4").stat().st_mtime_ns == written

    assert generate("--prompts", str(prompts), length=ONE_BLOCK) == 0, "nothing is left to do"
    assert "3 of 3" in capsys.readouterr().out
    assert generate("--prompts", str(prompts), "--seed", "1", "--memory-frames", "3", length=ONE_BLOCK) == 2
    error = capsys.readouterr().err
    assert "seed 0, now 1" in error and "memory_frames 6, now 3" in error and error.count("\n") == 1
    log = videos / "0002-a-guitar.json"
    earlier = json.loads(log.read_text())
    earlier["settings"]["memory"]["memory_position"] = "zero"  # an option of earlier versions
    log.write_text(json.dumps(earlier))
    assert generate("--prompts", str(prompts), length=ONE_BLOCK) == 0, "an earlier version's report is understood"
    log.unlink()
    assert generate("--prompts", str(prompts), length=ONE_BLOCK) == 2
    assert "0002-a-guitar.mp4 is there without a readable 0002-a-guitar.json" in capsys.readouterr().err
    assert generate("--prompts", str(prompts), "--overwrite", "--memory-frames", "0", length=ONE_BLOCK) == 0
    assert json.loads((videos / "0002-a-guitar.json").read_text())["retrieved"] == []


def test_interrupted_video_is_kept_and_gone_on_with(generate, tmp_path, capsys, monkeypatch):
    from longlive_rag.generation.wan_vae import StreamingDecoder

    plain, cat = tmp_path / "plain", ["--prompt", "a cat"]
    assert generate(*cat, output="plain") == 0
    decode, blocks = StreamingDecoder.decode, []

    def interrupted(self, latents):
        blocks.append(latents)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return decode(self, latents)

    monkeypatch.setattr(StreamingDecoder, "decode", interrupted)
    assert generate(*cat) == 130
    videos = tmp_path / "videos"
    capsys.readouterr()
    assert {entry.name for entry in videos.iterdir()} == {"0000-a-cat.partial.mp4", ".0000-a-cat.journal"}
    assert len(read_video(videos / "0000-a-cat.partial.mp4")[0]) == 4 * 6 - 3
    monkeypatch.undo()
    error = refusal(capsys, generate(*cat, "--seed", "1"))
    assert "0000-a-cat.mp4 was begun with other settings (seed 0, now 1)" in error
    assert generate(*cat) == 0
    # The third block was recorded before it was decoded.
    assert "0000-a-cat.mp4 goes on after 3 of 3 blocks, at 8.2 s" in capsys.readouterr().out
    assert contents(videos) == contents(plain)
    assert set(contents(videos)) == {"0000-a-cat.mp4", "0000-a-cat.json"}


def test_what_was_left_beside_a_finished_video_is_removed(generate, tmp_path):
    cat, videos = ["--prompt", "a cat"], tmp_path / "videos"
    assert generate(*cat, length=ONE_BLOCK) == 0
    finished = contents(videos)
    journal = videos / ".0000-a-cat.journal"
    journal.mkdir()
    (journal / "block-00000000.safetensors").write_bytes(b"half removed")
    (videos / "0000-a-cat.partial.mp4").write_bytes(b"")
    (videos / ".0000-a-cat.0123abcd.mp4").write_bytes(b"")
    assert generate(*cat, length=ONE_BLOCK) == 0
    assert contents(videos) == finished


def test_a_log_is_replayed_bit_by_bit(generate, tmp_path, capsys, monkeypatch):
    from longlive_rag.selection import SimilaritySelection

    cat = ["--prompt", "a cat"]
    assert generate(*cat, length=LONG, output="first") == 0
    log = tmp_path / "first" / "0000-a-cat.json"
    monkeypatch.setattr(SimilaritySelection, "select", None)  # nothing is searched
    assert generate(*cat, "--replay", str(log), length=LONG, output="again") == 0
    assert contents(tmp_path / "again") == contents(tmp_path / "first")

    capsys.readouterr()
    other = json.loads(log.read_text())
    other["retrieved"][0]["frames"] = [2]  # instead of 1, the only candidate
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(other))
    error = refusal(capsys, generate(*cat, "--replay", str(changed), length=LONG, output="other"))
    assert "block at latent frame 18 may retrieve 6 of the frames 1 to 1, each with its similarity, got" in error
    error = refusal(capsys, generate(*cat, "--replay", str(log), "--seed", "1", output="other", length=LONG))
    assert "first/0000-a-cat.json is of a video with other settings (seed 0, now 1)" in error
    error = refusal(capsys, generate("--prompt", "a dog", "--replay", str(log), output="other", length=LONG))
    assert "(prompt 'a cat', now 'a dog')" in error
    changed.write_text("[]")
    assert "must be the JSON file beside a video" in refusal(capsys, generate(*cat, "--replay", str(changed)))
    other["retrieved"] = [{"start": 18}]
    changed.write_text(json.dumps(other))
    error = refusal(capsys, generate(*cat, "--replay", str(changed), length=LONG, output="other2"))
    assert "must have start, frames and similarity" in error
    other["retrieved"] = []
    changed.write_text(json.dumps(other))
    error = refusal(capsys, generate(*cat, "--replay", str(changed), length=LONG, output="other2"))
    assert "an entry for each block that may retrieve, at latent frames [18, 21, 24, 27, 30]" in error


def refusal(capsys, status):
    captured = capsys.readouterr()
    assert status == 2 and captured.err.count("\n") == 1, captured.err
    return captured.err


def test_wrong_use_is_refused_before_anything_is_loaded(generate, tmp_path, capsys, monkeypatch):
    from longlive_rag.generation import text_encoder

    monkeypatch.setattr(text_encoder, "PromptEncoder", None)
    cat = ["--prompt", "a cat"]
    assert "neither" in refusal(capsys, generate())
    assert "both" in refusal(capsys, generate(*cat, "--prompts", "x.txt"))
    assert "must hold a prompt" in refusal(capsys, generate("--prompt", "  "))
    assert "none.txt" in refusal(capsys, generate("--prompts", "none.txt"))
    assert "multiple of 16 pixels, got 40" in refusal(capsys, generate(*cat, "--height", "40"))
    assert "seconds must be positive" in refusal(capsys, generate(*cat, "--seconds", "0"))
    assert "must fit into context_frames" in refusal(capsys, generate(*cat, "--memory-frames", "20"))
    assert "descend strictly" in refusal(capsys, generate(*cat, "--denoising-steps", "250", "1000"))
    assert "lora file none.pt" in refusal(capsys, generate(*cat, "--lora", "none.pt"))
    assert "device must be auto" in refusal(capsys, generate(*cat, "--device", "gpu"))
    error = refusal(capsys, generate(*cat, checkpoint="none.pt"))
    assert "self_forcing_dmd.pt (about 5.7 GB) from https://huggingface.co/gdhe17/Self-Forcing" in error
    assert "11.4 GB" in refusal(capsys, generate(*cat, wan="none"))
    assert not (tmp_path / "videos").exists()


def test_parts_that_do_not_fit_are_refused(generate, parts, tmp_path, capsys):
    state = CausalWanModel(**{**SIZES, "text_dim": 20}).state_dict()
    torch.save({"generator": state}, parts / "narrow.pt")
    assert "width 20, but the text encoder" in refusal(capsys, generate("--prompt", "a cat", checkpoint="narrow.pt"))
    state = CausalWanModel(**SIZES, in_dim=4, out_dim=4).state_dict()
    torch.save({"generator": state}, parts / "channels.pt")
    error = refusal(capsys, generate("--prompt", "a cat", checkpoint="channels.pt"))
    assert "4 latent channels, but the VAE has 16" in error
    assert list((tmp_path / "videos").iterdir()) == []
