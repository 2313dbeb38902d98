"""Wan 2.2's 5B: its VAE, LongLive 2's sampler, and videos from tiny random weights in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from golden.params import tensor
from longlive_rag import RetrievalConfig, stream
from longlive_rag.cli import main
from longlive_rag.generation.sampling import Sampling, warp_steps
from longlive_rag.generation.settings import VideoSettings
from longlive_rag.generation.unipc import unipc
from longlive_rag.generation.video import VideoWriter
from longlive_rag.models import CausalWanModel
from support.tiny_wan import TRACES, save_5b_folder, trace
from support.video_files import read_video

pytest.importorskip("diffusers", reason="diffusers is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from longlive_rag.generation.beginning import encode, from_image
from longlive_rag.generation.wan_files import WanFiles, find_tiny_decoder, find_wan_files
from longlive_rag.generation.wan_vae import StreamingDecoder, load_vae

SIZES: dict[str, Any] = {
    "dim": 128, "ffn_dim": 64, "freq_dim": 32, "text_dim": 24, "num_heads": 1, "num_layers": 2, "in_dim": 48,
    "out_dim": 48,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan22")
    save_5b_folder(folder)
    return folder


@pytest.fixture(scope="module")
def files(folder: Path) -> WanFiles:
    return find_wan_files(folder, "longlive2")


def test_the_decoder_agrees_with_the_published_code(files: WanFiles) -> None:
    _, recorded = trace("wan22_vae", "vae.")
    decoder = StreamingDecoder.from_files(files, device="cpu", dtype=torch.float32)
    assert (decoder.channels, decoder.spatial_factor, decoder.temporal_factor) == (48, 16, 4)
    frames = decoder.decode(recorded["latents"])
    assert frames.shape == (13, 32, 48, 3)
    # One step of 8 bits, for rounding; the recorded pictures are in float16.
    assert (frames.float() - recorded["frames"].float() * 255).abs().max() < 0.6
    decoder.reset()
    pieces = [decoder.decode(part) for part in recorded["latents"].split([3, 1])]
    assert torch.equal(torch.cat(pieces), frames)


def test_the_encoder_agrees_with_the_published_code(files: WanFiles) -> None:
    _, recorded = trace("wan22_vae", "vae.")
    vae = load_vae(files, device="cpu", dtype=torch.float32)
    # Pictures are bytes here: recorded are numbers from -1 to 1.
    pictures = (recorded["pictures"].float() + 1) * 127.5
    latents = encode(vae, iter(pictures.numpy()))
    torch.testing.assert_close(latents, recorded["encoded"], rtol=1e-3, atol=1e-3)


def test_missing_and_extra_weights_of_the_vae_are_named(folder: Path, tmp_path: Path) -> None:
    state = torch.load(folder / "Wan2.2_VAE.pth")
    lost = "decoder.upsamples.1.upsamples.3.time_conv.bias"
    for changed, message in (
        ({name: each for name, each in state.items() if name != lost}, "lacks decoder.up_blocks.1.upsampler.time_conv"),
        ({**state, "surplus.weight": torch.zeros(2)}, "holds surplus.weight"),
        ({name: each for name, each in state.items() if name != "conv2.weight"}, "no Wan VAE: it lacks conv2.weight"),
    ):
        torch.save(changed, tmp_path / "vae.pth")
        with pytest.raises(ValueError, match=message):
            load_vae(WanFiles(folder, folder, tmp_path / "vae.pth"), device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("steps", [1, 2, 4, 6])
def test_unipc_agrees_with_the_published_sampler(steps: int) -> None:
    recorded = load_file(TRACES / "unipc.safetensors")[f"latents_{steps}"]
    seen: list[float] = []

    def flow(latents: Tensor, timestep: Tensor) -> Tensor:
        seen.append(float(timestep[0, 0]))
        return torch.tanh(1.3 * latents + timestep.view(1, 2, 1, 1, 1) / 1000) - 0.2 * latents

    levels = warp_steps([999 * (steps - step) / steps for step in range(steps)], 5.0)
    cleans = list(unipc(flow, tensor(9, "noise", [1, 2, 3, 2, 2]), levels))
    assert len(cleans) == steps and seen == [float(int(level)) for level in levels]
    # Coefficients in float64 here, in float32 there.
    torch.testing.assert_close(cleans[-1], recorded, rtol=1e-5, atol=2e-6)


def test_settings_of_the_solver() -> None:
    with pytest.raises(ValueError, match="solver must be one of renoise, unipc, got 'euler'"):
        Sampling(solver="euler")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="denoising_steps must begin below 1000 for solver unipc.*got 1000"):
        Sampling(solver="unipc")


PUBLISHED = [
    "--solver", "unipc", "--denoising-steps", "999", "749.25", "499.5", "249.75", "--positions", "absolute",
]  # fmt: skip
SHORT = [
    "--seconds", "4", "--fps", "8", "--height", "32", "--width", "64", "--context-frames", "6", "--sink-frames", "2",
    "--memory-frames", "1", "--recency-guard", "0", "--block-frames", "2", "--prompt", "a cat",
]  # fmt: skip


def test_longlive_2_makes_a_video(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    state = {f"model.{name}": each for name, each in CausalWanModel(**SIZES).state_dict().items()}
    torch.save({"generator": state}, tmp_path / "model.pt")
    arguments = [f"--wan-dir={folder}", f"--checkpoint={tmp_path / 'model.pt'}", *SHORT]
    assert main(["generate", "--backbone", "longlive2", *arguments, *PUBLISHED, f"--output={tmp_path / 'a'}"]) == 0
    printed = capsys.readouterr().out
    assert "published with --height 704 --width 1280 --fps 24 --context-frames 32 --sink-frames 8" in printed
    assert "--solver" not in printed  # that is as published
    frames, fps = read_video(tmp_path / "a" / "0000-a-cat.mp4")
    assert frames.shape == (37, 32, 64, 3) and fps == 8 and frames.std() > 1
    log = json.loads((tmp_path / "a" / "0000-a-cat.json").read_text())
    assert log["solver"] == "unipc" and [entry["start"] for entry in log["retrieved"]] == [8]
    # The other sampler, and the same checkpoint as any causal model.
    assert main(["generate", "--backbone", "wan", *arguments, f"--output={tmp_path / 'b'}"]) == 0
    other, _ = read_video(tmp_path / "b" / "0000-a-cat.mp4")
    assert other.shape == frames.shape and np.abs(other.astype(int) - frames.astype(int)).max() > 10


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "models_t5_umt5-xxl-enc-bf16.pth").touch()
    with pytest.raises(FileNotFoundError, match=r"Wan2\.2_VAE\.pth \(about 2\.8 GB\) from .*Wan-AI/Wan2\.2-TI2V-5B"):
        find_wan_files(tmp_path, "longlive2")
    with pytest.raises(FileNotFoundError, match=r"taew2_2\.safetensors"):
        find_tiny_decoder(tmp_path, "longlive2")
    for name in ("taew2_2.pth", "Wan2.2_VAE.pth"):
        (tmp_path / name).touch()
    assert find_tiny_decoder(tmp_path, "longlive2").name == find_tiny_decoder(tmp_path, "wan").name == "taew2_2.pth"


@pytest.mark.parametrize("solver", ["unipc", "renoise"])
def test_the_first_block_is_made_around_its_first_frame(solver: Any) -> None:
    torch.manual_seed(0)
    model = CausalWanModel(
        dim=32, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=2, num_layers=1, in_dim=4, out_dim=4
    ).eval()
    noise, first, prompt = torch.randn(1, 8, 4, 4, 4), torch.randn(1, 1, 4, 4, 4), torch.randn(1, 4, 8)
    seen: list[tuple[Tensor, Tensor]] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0], inputs[1])))
    config = RetrievalConfig(context_frames=8, sink_frames=1, memory_frames=1, block_frames=4)
    sampling = Sampling((999, 500), solver=solver)
    made = list(stream(model, noise.split(4, dim=1), prompt, config, sampling=sampling, first=first))
    assert torch.equal(made[0].latents[:, :1], first) and not torch.equal(made[1].latents[:, :1], first)
    # Two steps and the clean pass of each block.
    assert all(torch.equal(latents[:, :1], first) for latents, _ in seen[:3])
    assert [timestep[0].tolist()[0] for _, timestep in seen[:3]] == [0, 0, 0]
    assert all(timestep[0, 1:].min() > 0 for _, timestep in seen[:2]) and seen[3][1].min() > 0
    assert made[0].latents.std() > 0.5
    with pytest.raises(ValueError, match=r"first must be \[1, n, 4, 4, 4\] like the noise, with n below 4, got"):
        next(stream(model, noise.split(4, dim=1), prompt, config, first=torch.randn(1, 4, 4, 4, 4)))


def test_longlive_2_goes_on_from_a_picture(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    torch.save(CausalWanModel(**SIZES).state_dict(), tmp_path / "model.pt")
    Image.fromarray(np.full((40, 80, 3), (200, 60, 20), dtype=np.uint8)).save(tmp_path / "picture.png")
    arguments = [f"--wan-dir={folder}", f"--checkpoint={tmp_path / 'model.pt'}", *SHORT, *PUBLISHED]
    written: list[Any] = []
    monkeypatch.setattr(VideoWriter, "write", lambda self, frames: written.append(frames.astype(int)))
    picture = [f"--image={tmp_path / 'picture.png'}", f"--output={tmp_path / 'out'}"]
    assert main(["generate", "--backbone", "longlive2", *arguments, *picture]) == 0
    settings = VideoSettings(
        seconds=4, fps=8, height=32, width=64, policy=RetrievalConfig(6, 2, 1, recency_guard=0, block_frames=2)
    )
    vae = load_vae(find_wan_files(folder, "longlive2"), device="cpu", dtype=torch.float32)
    latents = encode(vae, from_image(tmp_path / "picture.png", settings, one_frame=True).pictures())
    assert latents.shape == (1, 48, 2, 4)
    expected = StreamingDecoder(vae).decode(latents).numpy().astype(int)
    # The weights lie elsewhere in memory than in the command: one step of 8 bits, for rounding.
    assert np.abs(written[0][:1] - expected).max() <= 1
    assert sum(map(len, written)) == 37 and np.abs(written[0][1:] - expected).max() > 10
